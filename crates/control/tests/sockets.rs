//! WebSockets: exec, processes, and terminals in both dialects.

mod common;

use common::{DEADLINE, World};
use futures::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};
use wrenn_testkit::simhost::Call;

struct Socket(WebSocketStream<MaybeTlsStream<TcpStream>>);

async fn try_open(world: &World, path: &str, agent: &str, key: &str) -> Result<Socket, Error> {
    let url = world.url(path).replacen("http", "ws", 1);
    let mut request = url.into_client_request().expect("a request");
    request
        .headers_mut()
        .insert("x-api-key", key.parse().expect("a header"));
    request
        .headers_mut()
        .insert("user-agent", agent.parse().expect("a header"));
    tokio_tungstenite::connect_async(request)
        .await
        .map(|(socket, _)| Socket(socket))
}

async fn open(world: &World, path: &str) -> Socket {
    try_open(world, path, "test", &world.key)
        .await
        .expect("a WebSocket")
}

impl Socket {
    async fn send(&mut self, frame: Value) {
        self.0.send(Message::text(frame.to_string())).await.expect("sent");
    }

    async fn next(&mut self) -> Message {
        let message = tokio::time::timeout(DEADLINE, self.0.next())
            .await
            .expect("in time");
        message.expect("a message").expect("no failure")
    }

    /// The next JSON frame that is no ping.
    async fn frame(&mut self) -> Value {
        loop {
            let message = self.next().await;
            // A silent program's stream shows that it is alive.
            if matches!(message, Message::Ping(_)) {
                continue;
            }
            let Message::Text(text) = message else {
                panic!("not text: {message:?}")
            };
            let frame: Value = serde_json::from_str(&text).expect("JSON");
            if frame["type"] != "ping" {
                return frame;
            }
        }
    }

    async fn closed(&mut self) {
        let mut message = self.next().await;
        while matches!(message, Message::Ping(_)) {
            message = self.next().await;
        }
        let Message::Close(Some(frame)) = message else {
            panic!("not a close frame: {message:?}")
        };
        assert_eq!(u16::from(frame.code), 1000);
    }
}

#[tokio::test]
async fn a_program_streams() {
    let world = World::new().await;
    let sandbox = world.sandbox().await;
    let mut socket = open(&world, &format!("/v1/sandboxes/{sandbox}/exec/stream")).await;
    socket
        .send(json!({"type": "start", "cmd": "echo", "args": ["hé"]}))
        .await;
    assert_eq!(socket.frame().await["type"], "start");
    assert_eq!(socket.frame().await, json!({"type": "stdout", "data": "hé\n"}));
    assert_eq!(socket.frame().await, json!({"type": "exit", "exit_code": 0}));
    socket.closed().await;

    // Standard input, to its end.
    let mut socket = open(&world, &format!("/v1/sandboxes/{sandbox}/exec/stream")).await;
    socket
        .send(json!({"type": "start", "cmd": "cat", "stdin": true}))
        .await;
    socket.frame().await;
    socket.send(json!({"type": "input", "data": "aGVsbG8="})).await;
    assert_eq!(socket.frame().await, json!({"type": "stdout", "data": "hello"}));
    socket.send(json!({"type": "eof"})).await;
    assert_eq!(socket.frame().await, json!({"type": "exit", "exit_code": 0}));
    socket.closed().await;
}

#[tokio::test]
async fn output_is_text_unless_a_client_asks_for_the_bytes() {
    let world = World::new().await;
    let sandbox = world.sandbox().await;
    let path = format!("/v1/capsules/{sandbox}/exec/stream");
    let text = json!({"type": "stdout", "data": "a\u{fffd}"});
    let exact = json!({"type": "stdout", "data": "Yf8=", "encoding": "base64"});
    for (query, binary, stdout) in [
        ("", false, &text),
        ("?encoding=utf-8", false, &text),
        ("?encoding=base64", false, &exact),
        ("", true, &exact),
    ] {
        let mut socket = open(&world, &format!("{path}{query}")).await;
        socket
            .send(json!({"type": "start", "cmd": "bytes", "args": ["61ff"], "binary": binary}))
            .await;
        socket.frame().await;
        assert_eq!(&socket.frame().await, stdout, "{query} {binary}");
        assert_eq!(socket.frame().await["type"], "exit");
        socket.closed().await;
    }
    // What is text travels the same way as the rest, and standard error as standard output.
    let mut socket = open(&world, &format!("{path}?encoding=base64")).await;
    socket
        .send(json!({"type": "start", "cmd": "exit", "args": ["3"]}))
        .await;
    socket.frame().await;
    assert_eq!(
        socket.frame().await,
        json!({"type": "stderr", "data": "YnllCg==", "encoding": "base64"})
    );
    assert_eq!(socket.frame().await, json!({"type": "exit", "exit_code": 3}));
    let refused = try_open(&world, &format!("{path}?encoding=latin-1"), "test", &world.key).await;
    assert!(
        matches!(&refused, Err(Error::Http(response)) if response.status() == 400
            && String::from_utf8_lossy(response.body().as_deref().unwrap_or_default()).contains("encoding")),
        "{:?}",
        refused.err()
    );
}

#[tokio::test]
async fn a_character_that_is_cut_by_a_chunks_edge_arrives_whole() {
    let world = World::new().await;
    let sandbox = world.sandbox().await;
    // A euro sign, byte by byte, and a byte that is no text.
    let drip = json!({"cmd": "drip", "args": ["e282acff"], "background": true, "tag": "drip"});
    let (status, body) = world.post(&format!("/v1/sandboxes/{sandbox}/exec"), drip).await;
    assert_eq!(status, 202, "{body}");
    let path = format!("/v1/sandboxes/{sandbox}/processes/drip/stream");
    let mut socket = open(&world, &path).await;
    assert_eq!(socket.frame().await["type"], "start");
    assert_eq!(socket.frame().await, json!({"type": "stdout", "data": "€"}));
    assert_eq!(
        socket.frame().await,
        json!({"type": "stdout", "data": "\u{fffd}"})
    );
    // As bytes, nothing waits and nothing is lost, for those who follow a process too.
    let mut socket = open(&world, &format!("{path}?encoding=base64")).await;
    assert_eq!(socket.frame().await["type"], "start");
    for data in ["4g==", "gg==", "rA==", "/w=="] {
        assert_eq!(
            socket.frame().await,
            json!({"type": "stdout", "data": data, "encoding": "base64"})
        );
    }
}

#[tokio::test]
async fn stop_kills_and_leaving_does_not() {
    let world = World::new().await;
    let sandbox = world.sandbox().await;
    let path = format!("/v1/sandboxes/{sandbox}/exec/stream");
    let mut socket = open(&world, &path).await;
    socket.send(json!({"type": "start", "cmd": "sleep"})).await;
    socket.frame().await;
    socket.send(json!({"type": "stop"})).await;
    assert_eq!(socket.frame().await, json!({"type": "exit", "exit_code": -1}));
    socket.closed().await;

    let mut socket = open(&world, &path).await;
    socket.send(json!({"type": "start", "cmd": "sleep"})).await;
    let pid = socket.frame().await["pid"].clone();
    drop(socket);
    let (_, list) = world.get(&format!("/v1/sandboxes/{sandbox}/processes")).await;
    assert_eq!(list["processes"][0]["pid"], pid);
    // Followed again by its pid, and killed.
    let mut socket = open(&world, &format!("/v1/sandboxes/{sandbox}/processes/{pid}/stream")).await;
    assert_eq!(socket.frame().await, json!({"type": "start", "pid": pid}));
    assert_eq!(
        world
            .call(
                "DELETE",
                &format!("/v1/sandboxes/{sandbox}/processes/{pid}"),
                None
            )
            .await
            .0,
        204
    );
    assert_eq!(socket.frame().await["type"], "exit");
    socket.closed().await;
    // It is gone.
    let mut socket = open(&world, &format!("/v1/sandboxes/{sandbox}/processes/{pid}/stream")).await;
    let frame = socket.frame().await;
    assert_eq!(
        (&frame["type"], &frame["code"], &frame["fatal"]),
        (&json!("error"), &json!("not_found"), &json!(true))
    );
    socket.closed().await;
}

#[tokio::test]
async fn what_is_wrong_is_said_before_or_in_the_socket() {
    let world = World::new().await;
    let sandbox = world.sandbox().await;
    let path = format!("/v1/sandboxes/{sandbox}/exec/stream");
    let refused = |result: Result<Socket, Error>| match result {
        Err(Error::Http(response)) => response.status().as_u16(),
        Err(error) => panic!("another failure: {error}"),
        Ok(_) => panic!("not refused"),
    };
    assert_eq!(refused(try_open(&world, &path, "test", "wrn_no").await), 401);
    let unknown = format!("/v1/sandboxes/{}/pty", wrenn_proto::id::SandboxId::new());
    assert_eq!(refused(try_open(&world, &unknown, "test", &world.key).await), 404);
    assert_eq!(world.get(&path).await.0, 400, "not a WebSocket");
    for first in [
        "{broken",
        r#"{"type":"odd"}"#,
        r#"{"type":"stop"}"#,
        r#"{"type":"start","cmd":""}"#,
    ] {
        for route in ["exec/stream", "pty"] {
            if route == "pty" && first.contains("start") {
                // A terminal without a program is a shell.
                continue;
            }
            let mut socket = open(&world, &format!("/v1/sandboxes/{sandbox}/{route}")).await;
            socket.0.send(Message::text(first)).await.expect("sent");
            let frame = socket.frame().await;
            assert_eq!(
                (&frame["type"], &frame["code"]),
                (&json!("error"), &json!("invalid_request")),
                "{route} {first}"
            );
            socket.closed().await;
        }
    }
    world
        .post(&format!("/v1/sandboxes/{sandbox}/pause?wait=20"), json!({}))
        .await;
    let mut socket = open(&world, &path).await;
    socket.send(json!({"type": "start", "cmd": "echo"})).await;
    assert_eq!(socket.frame().await["code"], "invalid_state");
}

#[tokio::test]
async fn a_browser_sends_its_key_first() {
    let world = World::new().await;
    let sandbox = world.sandbox().await;
    for (route, opened) in [("exec/stream", "start"), ("pty", "started")] {
        let url = world
            .url(&format!("/v1/sandboxes/{sandbox}/{route}"))
            .replacen("http", "ws", 1);
        let (socket, _) = tokio_tungstenite::connect_async(&url).await.expect("a WebSocket");
        let mut socket = Socket(socket);
        socket.send(json!({"type": "auth", "api_key": world.key})).await;
        socket
            .send(json!({"type": "start", "cmd": "echo", "args": ["hi"]}))
            .await;
        assert_eq!(socket.frame().await["type"], opened);
        for first in [
            json!({"type": "auth", "api_key": "wrn_no"}),
            json!({"type": "start", "cmd": "echo"}),
        ] {
            let (socket, _) = tokio_tungstenite::connect_async(&url).await.expect("a WebSocket");
            let mut socket = Socket(socket);
            socket.send(first).await;
            assert_eq!(socket.frame().await["code"], "unauthorized");
            socket.closed().await;
        }
    }
}

#[tokio::test]
async fn a_client_that_does_not_read_stops_the_program() {
    let world = World::new().await;
    let sandbox = world.sandbox().await;
    let mut socket = open(&world, &format!("/v1/sandboxes/{sandbox}/exec/stream")).await;
    socket
        .send(json!({"type": "start", "cmd": "flood", "args": ["100000"]}))
        .await;
    world.host.wait_arrived(Call::Start, 1).await;
    let produced = || {
        world
            .host
            .with(|model| model.produced.load(std::sync::atomic::Ordering::SeqCst))
    };
    let mut last = u64::MAX;
    let deadline = tokio::time::Instant::now() + DEADLINE;
    while last != produced() || last == 0 {
        last = produced();
        assert!(
            tokio::time::Instant::now() < deadline,
            "it never stops: {last} chunks"
        );
        for _ in 0..20 {
            assert_eq!(world.get("/health").await.0, 200);
        }
    }
    assert!(last < 2000, "{last} chunks of 64 KiB are in buffers");
    // Reading lets it go on.
    socket.frame().await;
    while produced() <= last {
        socket.frame().await;
    }
}

#[tokio::test]
async fn a_silent_program_is_shown_to_be_alive() {
    let world = World::new().await;
    let sandbox = world.sandbox().await;
    let mut socket = open(&world, &format!("/v1/sandboxes/{sandbox}/exec/stream")).await;
    let start = json!({"type": "start", "cmd": "cat", "stdin": true});
    socket.send(start).await;
    assert_eq!(socket.frame().await["type"], "start");
    for _ in 0..2 {
        let message = socket.next().await;
        assert!(matches!(message, Message::Ping(_)), "{message:?}");
    }
    socket.send(json!({"type": "eof"})).await;
    assert_eq!(socket.frame().await["type"], "exit");
}

#[tokio::test]
async fn terminals_speak_binary_by_default() {
    let world = World::new().await;
    let sandbox = world.sandbox().await;
    let mut socket = open(&world, &format!("/v1/sandboxes/{sandbox}/pty")).await;
    socket
        .send(json!({"type": "start", "cmd": "cat", "cols": 80, "rows": 24}))
        .await;
    let started = socket.frame().await;
    assert!(
        started["tag"].as_str().is_some_and(|tag| tag.starts_with("pty-")),
        "{started}"
    );
    socket
        .0
        .send(Message::binary(b"hi\xff".to_vec()))
        .await
        .expect("sent");
    let echoed = loop {
        match socket.next().await {
            Message::Binary(data) => break data,
            Message::Text(text) => assert!(text.contains("ping"), "{text}"),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(&echoed[..], b"hi\xff");
    socket
        .send(json!({"type": "resize", "cols": 100, "rows": 30}))
        .await;
    let resized = loop {
        if let Message::Binary(data) = socket.next().await {
            break data;
        }
    };
    assert_eq!(&resized[..], b"[100x30]");
    // Bad frames are told and survived.
    socket
        .send(json!({"type": "resize", "cols": 0, "rows": 30}))
        .await;
    let frame = socket.frame().await;
    assert_eq!(
        (&frame["type"], frame.get("fatal")),
        (&json!("error"), None),
        "{frame}"
    );
    socket.send(json!({"type": "kill"})).await;
    assert_eq!(socket.frame().await, json!({"type": "exit", "exit_code": -1}));
    socket.closed().await;
}

#[tokio::test]
async fn a_terminal_is_pinged() {
    let world = World::new().await;
    let sandbox = world.sandbox().await;
    let mut socket = open(&world, &format!("/v1/sandboxes/{sandbox}/pty")).await;
    socket.send(json!({"type": "start", "cmd": "cat"})).await;
    assert_eq!(socket.frame().await["type"], "started");
    let Message::Text(text) = socket.next().await else {
        panic!("not text")
    };
    assert_eq!(&text[..], r#"{"type":"ping"}"#);
    world.host.wait_arrived(Call::Ping, 1).await;
}

#[tokio::test]
async fn the_older_dialect_is_found_out() {
    let world = World::new().await;
    let sandbox = world.sandbox().await;
    let path = format!("/v1/capsules/{sandbox}/pty");
    // The older SDK writes JSON input: the answer comes as JSON output.
    let mut socket = try_open(&world, &path, "python-httpx/0.28", &world.key)
        .await
        .expect("a WebSocket");
    socket
        .send(json!({"type": "start", "cmd": "cat", "cols": 80, "rows": 24}))
        .await;
    assert_eq!(socket.frame().await["type"], "started");
    socket.send(json!({"type": "input", "data": "aGk="})).await;
    assert_eq!(socket.frame().await, json!({"type": "output", "data": "aGk="}));
    // It only reads and knows no pong: output comes as JSON too.
    let mut socket = try_open(&world, &path, "python-httpx/0.28", &world.key)
        .await
        .expect("a WebSocket");
    socket
        .send(json!({"type": "start", "cmd": "echo", "args": ["hi"], "cols": 80, "rows": 24}))
        .await;
    assert_eq!(socket.frame().await["type"], "started");
    assert_eq!(socket.frame().await, json!({"type": "output", "data": "aGkK"}));
    // The newer one answers the ping: binary.
    let mut socket = try_open(&world, &path, "python-httpx/0.28", &world.key)
        .await
        .expect("a WebSocket");
    socket
        .send(json!({"type": "start", "cmd": "echo", "args": ["hi"], "cols": 80, "rows": 24}))
        .await;
    assert_eq!(socket.frame().await["type"], "started");
    let Message::Text(ping) = socket.next().await else {
        panic!("not text")
    };
    assert_eq!(&ping[..], r#"{"type":"ping"}"#);
    socket.send(json!({"type": "pong"})).await;
    let Message::Binary(data) = socket.next().await else {
        panic!("not binary")
    };
    assert_eq!(&data[..], b"hi\n");
    // Whoever says it gets it.
    let mut socket = open(&world, &format!("{path}?encoding=base64")).await;
    socket
        .send(json!({"type": "start", "cmd": "echo", "args": ["hi"]}))
        .await;
    socket.frame().await;
    assert_eq!(socket.frame().await["type"], "output");
}

#[tokio::test]
async fn a_terminal_is_attached_to_again() {
    let world = World::new().await;
    let sandbox = world.sandbox().await;
    let path = format!("/v1/sandboxes/{sandbox}/pty");
    let mut socket = open(&world, &path).await;
    socket.send(json!({"type": "start", "cmd": "cat"})).await;
    let started = socket.frame().await;
    drop(socket);
    let mut socket = open(&world, &path).await;
    socket
        .send(json!({"type": "connect", "tag": started["tag"]}))
        .await;
    assert_eq!(socket.frame().await, started);
    socket.send(json!({"type": "kill"})).await;
    assert_eq!(socket.frame().await["type"], "exit");
    let mut socket = open(&world, &path).await;
    socket.send(json!({"type": "connect", "tag": "pty-none"})).await;
    assert_eq!(socket.frame().await["code"], "not_found");
}

/// A key that is deleted ends what was opened with it, also what is never silent.
#[tokio::test]
async fn a_deleted_key_ends_open_connections() {
    let world = World::new().await;
    let ann = world.person("ann").await;
    let made = world
        .call_as(&ann.token, "POST", "/v1/api-keys", Some(json!({"name": "k"})))
        .await
        .1;
    let key = made["key"].as_str().expect("a key").to_owned();
    let sandbox = world
        .call_as(&ann.token, "POST", "/v1/sandboxes?wait=30", Some(json!({})))
        .await
        .1;
    let id = sandbox["id"].as_str().expect("an id");

    let path = format!("/v1/sandboxes/{id}/exec/stream");
    let mut exec = try_open(&world, &path, "test", &key).await.expect("a WebSocket");
    exec.send(json!({"type": "start", "cmd": "cat", "stdin": true}))
        .await;
    assert_eq!(exec.frame().await["type"], "start");
    let mut terminal = try_open(&world, &format!("/v1/sandboxes/{id}/pty"), "test", &key)
        .await
        .expect("a WebSocket");
    terminal
        .send(json!({"type": "start", "cmd": "cat", "cols": 80, "rows": 24}))
        .await;
    assert_eq!(terminal.frame().await["type"], "started");
    let mut events = world
        .http
        .get(world.url("/v1/events/stream"))
        .header("x-api-key", &key)
        .send()
        .await
        .expect("a stream");
    assert!(events.chunk().await.expect("its beginning").is_some());

    let key_id = made["id"].as_str().expect("an id");
    let (status, _) = world
        .call_as(&ann.token, "DELETE", &format!("/v1/api-keys/{key_id}"), None)
        .await;
    assert_eq!(status, 204);
    for socket in [&mut exec, &mut terminal] {
        let frame = socket.frame().await;
        assert_eq!(
            (&frame["type"], &frame["code"]),
            (&json!("error"), &json!("unauthorized")),
            "{frame}"
        );
        assert_eq!(frame["fatal"], true);
    }
    let end = async { while let Ok(Some(_)) = events.chunk().await {} };
    tokio::time::timeout(DEADLINE, end)
        .await
        .expect("the stream of events ends");
}

#[tokio::test]
async fn a_host_that_says_nothing_holds_nobody_up() {
    let world = World::new().await;
    let sandbox = world.sandbox().await;
    let world = world
        .restart_with(|config| config.timings.short_rpc = std::time::Duration::from_millis(300))
        .await;
    world.host.hold(Call::Start);
    world.host.hold(Call::Read);
    let mut socket = open(&world, &format!("/v1/sandboxes/{sandbox}/exec/stream")).await;
    socket.send(json!({"type": "start", "cmd": "cat"})).await;
    let frame = socket.frame().await;
    assert_eq!(frame["type"], "error", "{frame}");
    assert!(frame.to_string().contains("did not answer in time"), "{frame}");
    let path = format!("/v1/sandboxes/{sandbox}/files/read");
    let (status, body) = world.post(&path, json!({"path": "/etc/passwd"})).await;
    assert_eq!((status, common::code(&body)), (504, "timeout"), "{body}");
    world.host.release(Call::Start);
    world.host.release(Call::Read);
}
