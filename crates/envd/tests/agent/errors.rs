//! Malformed input on every road in.

use std::io::{Read, Write};
use std::net::TcpStream;

use serde_json::{Value, json};

use crate::harness::{Agent, envelope};

#[tokio::test]
async fn unary_errors_have_a_status_a_code_and_a_message() {
    let agent = Agent::start().await;
    let cases = [
        (
            "process.Process/SendSignal",
            json!({ "process": { "pid": 999_999_999 }, "signal": "SIGNAL_SIGTERM" }),
            404,
            "not_found",
        ),
        (
            "process.Process/SendSignal",
            json!({ "process": { "pid": "nine" } }),
            400,
            "invalid_argument",
        ),
        (
            "process.Process/SendSignal",
            json!({ "signal": "SIGNAL_SIGTERM" }),
            400,
            "invalid_argument",
        ),
        (
            "process.Process/SendSignal",
            json!({ "process": { "pid": 1 }, "signal": "SIGNAL_SIGHUP" }),
            400,
            "invalid_argument",
        ),
        (
            "process.Process/SendInput",
            json!({ "process": { "tag": "none" } }),
            404,
            "not_found",
        ),
        (
            "process.Process/SendInput",
            json!({ "process": { "tag": "x" }, "input": { "stdin": "?" } }),
            400,
            "invalid_argument",
        ),
        (
            "process.Process/Update",
            json!({ "process": {} }),
            400,
            "invalid_argument",
        ),
        (
            "filesystem.Filesystem/Stat",
            json!({ "path": "a\u{0}b" }),
            400,
            "invalid_argument",
        ),
        (
            "filesystem.Filesystem/GetWatcherEvents",
            json!({ "watcherId": "none" }),
            404,
            "not_found",
        ),
        ("process.Process/Nothing", json!({}), 404, "unimplemented"),
        ("no.Service/Method", json!({}), 404, "unimplemented"),
    ];
    for (method, body, status, code) in cases {
        let (found, answer) = agent.call(method, body.clone()).await;
        assert_eq!(
            (found, answer["code"].as_str()),
            (status, Some(code)),
            "{method} {body}: {answer}"
        );
        assert!(
            answer["message"]
                .as_str()
                .is_some_and(|message| !message.is_empty())
        );
    }
}

#[tokio::test]
async fn unknown_fields_are_ignored() {
    let agent = Agent::start().await;
    let request = json!({ "path": "/", "fromTheFuture": { "a": [1] } });
    assert_eq!(
        agent.ok("filesystem.Filesystem/Stat", request).await["entry"]["name"],
        "/"
    );
}

#[tokio::test]
async fn bodies_that_are_no_messages() {
    let agent = Agent::start().await;
    let send = async |path: &str, kind: &str, body: Vec<u8>| {
        let answer = agent
            .post(path)
            .header("Content-Type", kind)
            .body(body)
            .send()
            .await
            .expect("an answer");
        let status = answer.status().as_u16();
        (
            status,
            String::from_utf8_lossy(&answer.bytes().await.expect("a body")).into_owned(),
        )
    };
    for body in [&b"{"[..], b"null", b"\xff\xfe", b"[[[["] {
        let (status, _) = send("/process.Process/List", "application/json", body.to_vec()).await;
        assert!((200..500).contains(&status), "{body:?}: {status}");
    }
    let start = "/process.Process/Start";
    let kind = "application/connect+json";
    let mut too_long = vec![0, 0xff, 0xff, 0xff, 0xff];
    too_long.extend(b"{}");
    let mut cut = envelope(&json!({ "process": { "cmd": "true" } }));
    cut.truncate(10);
    for body in [Vec::new(), vec![0], too_long, cut, vec![0xff; 64]] {
        let (status, answer) = send(start, kind, body.clone()).await;
        assert!(
            status != 200 || answer.contains("\"error\""),
            "{body:?}: {status} {answer}"
        );
    }
    let (status, _) = send(start, "text/plain", b"hello".to_vec()).await;
    assert_eq!(status, 415);
    assert!(agent.pids().await.is_empty(), "nothing was started");
}

#[tokio::test]
async fn noise_on_the_wire_harms_nobody() {
    let agent = Agent::start().await;
    for noise in [
        &b"\x16\x03\x01\x02\x00\x01"[..],
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /files HTTP/1.1\r\nContent-Length: x\r\n\r\n",
    ] {
        let mut stream = TcpStream::connect(("127.0.0.1", agent.port)).expect("connected");
        stream.write_all(noise).expect("sent");
        stream.shutdown(std::net::Shutdown::Write).expect("closed");
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
    }
    assert_eq!(
        agent.get("/health").send().await.expect("an answer").status(),
        204
    );
}

#[tokio::test]
async fn browsers_may_ask_from_any_page() {
    let agent = Agent::start().await;
    let set = json!({ "accessToken": "secret" });
    assert_eq!(
        agent
            .post("/init")
            .json(&set)
            .send()
            .await
            .expect("an answer")
            .status(),
        204
    );
    let preflight = agent
        .http
        .request(reqwest::Method::OPTIONS, agent.url("/files"))
        .header("Origin", "https://example.org")
        .header("Access-Control-Request-Method", "POST")
        .header("Access-Control-Request-Headers", "x-access-token");
    let answer = preflight.send().await.expect("an answer");
    assert_eq!(answer.status(), 200);
    assert_eq!(answer.headers()["access-control-allow-origin"], "*");
    let body: Value = agent
        .get("/files?path=/")
        .send()
        .await
        .expect("an answer")
        .json()
        .await
        .expect("JSON");
    assert_eq!(body["code"], 401);
}
