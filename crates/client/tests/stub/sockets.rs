//! The WebSockets of the stand-in: commands, processes and terminals.

use std::collections::BTreeMap;
use std::process::Stdio;

use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{Path, Query, State};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;

use super::{Answer, Stub, refuse, strings};

async fn text(socket: &mut WebSocket, frame: Value) {
    let _ = socket.send(Message::text(frame.to_string())).await;
}

pub(super) async fn exec_stream(
    State(stub): State<Stub>,
    Path(id): Path<String>,
    Query(query): Query<BTreeMap<String, String>>,
    upgrade: WebSocketUpgrade,
) -> Answer {
    stub.known(&id)?;
    let exact = query.get("encoding").is_some_and(|encoding| encoding == "base64");
    Ok(upgrade.on_upgrade(move |socket| run(stub, socket, exact)))
}

/// The exec protocol over a process of this machine.
async fn run(stub: Stub, mut socket: WebSocket, exact: bool) {
    let Some(Ok(Message::Text(first))) = socket.recv().await else {
        return;
    };
    let start: Value = serde_json::from_str(&first).unwrap();
    assert_eq!(start["type"], "start");
    let mut command = tokio::process::Command::new(start["cmd"].as_str().unwrap());
    command
        .args(strings(&start["args"]))
        .current_dir(
            start["cwd"]
                .as_str()
                .map_or(stub.root.clone(), |cwd| stub.path(cwd)),
        )
        .envs(
            start["envs"]
                .as_object()
                .into_iter()
                .flatten()
                .map(|(k, v)| (k, v.as_str().unwrap())),
        )
        .stdin(if start["stdin"] == true {
            Stdio::piped()
        } else {
            Stdio::null()
        })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            let message = format!("cannot start {}: {error}", start["cmd"]);
            text(
                &mut socket,
                json!({"type": "error", "data": message, "code": "invalid_request", "fatal": true}),
            )
            .await;
            close(socket).await;
            return;
        }
    };
    text(&mut socket, json!({"type": "ping"})).await;
    text(&mut socket, json!({"type": "start", "pid": child.id()})).await;
    let (sender, mut output) = mpsc::channel(4);
    pump("stdout", child.stdout.take().unwrap(), sender.clone());
    pump("stderr", child.stderr.take().unwrap(), sender);
    // Written by a task of its own: a command that does not read must not keep its output from being shown.
    let mut stdin = child.stdin.take().map(feed);
    let mut listening = true;
    loop {
        tokio::select! {
            chunk = output.recv() => match chunk {
                Some((stream, data)) => {
                    text(&mut socket, printed(stream, &data, exact)).await;
                }
                None => break,
            },
            message = socket.recv(), if listening => match message {
                Some(Ok(Message::Text(frame))) => {
                    let frame: Value = serde_json::from_str(&frame).unwrap();
                    match frame["type"].as_str().unwrap() {
                        "input" => {
                            let data = STANDARD.decode(frame["data"].as_str().unwrap()).unwrap();
                            if let Some(stdin) = &stdin {
                                let _ = stdin.send(data);
                            }
                        }
                        "eof" => {
                            stdin = None;
                            // As the platform answers input that nobody takes any more.
                            text(&mut socket, json!({"type": "error", "data": "no input is taken"})).await;
                        }
                        "stop" => {
                            stub.state.lock().unwrap().log.push("FRAME stop".to_owned());
                            let _ = child.start_kill();
                        }
                        "pong" => stub.state.lock().unwrap().log.push("FRAME pong".to_owned()),
                        other => panic!("unexpected frame {other}"),
                    }
                }
                Some(Ok(_)) => {}
                Some(Err(_)) | None => listening = false,
            }
        }
    }
    let code = child.wait().await.unwrap().code().unwrap_or(-1);
    text(&mut socket, json!({"type": "newer-than-you", "x": 1})).await;
    text(&mut socket, json!({"type": "exit", "exit_code": code})).await;
    close(socket).await;
}

/// A frame of output, as the platform makes it: damaged for those that did not ask for the bytes.
fn printed(stream: &str, data: &[u8], exact: bool) -> Value {
    if exact {
        json!({"type": stream, "data": STANDARD.encode(data), "encoding": "base64"})
    } else {
        json!({"type": stream, "data": String::from_utf8_lossy(data)})
    }
}

/// Says goodbye and hears the client out: a socket dropped with something unread is reset, and the
/// client may lose the last frames.
async fn close(mut socket: WebSocket) {
    let _ = socket.send(Message::Close(None)).await;
    while let Some(Ok(_)) = socket.recv().await {}
}

fn feed(mut target: tokio::process::ChildStdin) -> mpsc::UnboundedSender<Vec<u8>> {
    let (sender, mut data) = mpsc::unbounded_channel::<Vec<u8>>();
    tokio::spawn(async move {
        while let Some(data) = data.recv().await {
            let _ = target.write_all(&data).await;
        }
    });
    sender
}

fn pump(
    name: &'static str,
    mut source: impl AsyncReadExt + Unpin + Send + 'static,
    sender: mpsc::Sender<(&'static str, Vec<u8>)>,
) {
    tokio::spawn(async move {
        let mut buffer = vec![0; 4096];
        while let Ok(read @ 1..) = source.read(&mut buffer).await {
            if sender.send((name, buffer[..read].to_vec())).await.is_err() {
                return;
            }
        }
    });
}

pub(super) async fn process_stream(
    State(stub): State<Stub>,
    Path((id, selector)): Path<(String, String)>,
    Query(query): Query<BTreeMap<String, String>>,
    upgrade: WebSocketUpgrade,
) -> Answer {
    stub.known(&id)?;
    if selector != "web" {
        return Err(refuse(
            404,
            "not_found",
            &format!("process '{selector}' was not found"),
        ));
    }
    let exact = query.get("encoding").is_some_and(|encoding| encoding == "base64");
    Ok(upgrade.on_upgrade(async move |mut socket| {
        text(&mut socket, json!({"type": "start", "pid": 7})).await;
        text(&mut socket, printed("stdout", b"listening\xff\n", exact)).await;
        text(&mut socket, json!({"type": "exit", "exit_code": 3})).await;
        close(socket).await;
    }))
}

/// A terminal whose program shouts what is typed, tells its sizes, and exits on `exit N`.
pub(super) async fn pty(
    State(stub): State<Stub>,
    Path(id): Path<String>,
    Query(query): Query<BTreeMap<String, String>>,
    upgrade: WebSocketUpgrade,
) -> Answer {
    stub.known(&id)?;
    assert_eq!(query["encoding"], "binary");
    Ok(upgrade.on_upgrade(async move |mut socket| {
        let Some(Ok(Message::Text(first))) = socket.recv().await else {
            return;
        };
        let first: Value = serde_json::from_str(&first).unwrap();
        let greeting = match first["type"].as_str().unwrap() {
            "start" => format!(
                "{} {}x{} {}\r\n",
                first["cmd"], first["cols"], first["rows"], first["envs"]["TERM"]
            ),
            "connect" => format!("back at {}\r\n", first["tag"]),
            other => panic!("unexpected first frame {other}"),
        };
        text(&mut socket, json!({"type": "started", "tag": "pty-1", "pid": 9})).await;
        let _ = socket.send(Message::Binary(greeting.into_bytes().into())).await;
        let mut line = String::new();
        while let Some(Ok(message)) = socket.recv().await {
            match message {
                Message::Binary(data) => {
                    let typed = String::from_utf8(data.to_vec()).unwrap();
                    let _ = socket
                        .send(Message::Binary(typed.to_uppercase().into_bytes().into()))
                        .await;
                    line.push_str(&typed.replace('\r', "\n"));
                    if let Some(code) = line
                        .strip_suffix('\n')
                        .and_then(|line| line.lines().last()?.strip_prefix("exit "))
                    {
                        text(
                            &mut socket,
                            json!({"type": "exit", "exit_code": code.parse::<i32>().unwrap()}),
                        )
                        .await;
                        close(socket).await;
                        return;
                    }
                }
                Message::Text(frame) => {
                    let frame: Value = serde_json::from_str(&frame).unwrap();
                    stub.state.lock().unwrap().log.push(format!("FRAME {frame}"));
                    let note = format!("<{frame}>");
                    // Half of it in the older dialect, which clients take too.
                    text(
                        &mut socket,
                        json!({"type": "output", "data": STANDARD.encode(note)}),
                    )
                    .await;
                }
                _ => {}
            }
        }
    }))
}
