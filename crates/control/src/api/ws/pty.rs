//! `pty`: a terminal.
//!
//! Two generations of clients speak two dialects of the data: raw binary frames both ways, or JSON
//! `input`/`output` frames with base64. Their first frame is the same, so the server finds out:
//!
//! 1. `?encoding=binary` or `?encoding=base64`, or `binary` in the first frame, says it.
//! 2. Otherwise a client that is not Wrenn's Python SDK speaks binary.
//! 3. The SDK is sent a `ping` after `started`, and output is held back until it shows its age: the
//!    newer answers `pong` (or sends binary input), the older sends `input` or says nothing for a
//!    second, because it does not know `ping` needs an answer.
//!
//! Whatever was chosen, a client's first frame of input in the other dialect corrects it. Holding back
//! costs no memory: the host's stream is simply not read yet.
//!
//! A client that goes away leaves the terminal running; `connect` with its tag attaches to it again.

use std::time::Duration;

use axum::extract::State;
use axum::extract::ws::{Message, WebSocketUpgrade};
use axum::http::{HeaderMap, header};
use axum::response::Response;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use futures::{SinkExt, StreamExt};
use serde::Deserialize;
use tokio::sync::{mpsc, watch};
use wrenn_proto::rest::{ClientFrame, ErrorBody, ServerFrame};

use super::exec::upgrade;
use super::{Gone, Known, Received, Sink, close, error_frame, fail, first, identify, receive, revoked, send};
use crate::api::error::ApiResult;
use crate::api::extract::{Params, Segments, SocketCaller};
use crate::service::Services;
use crate::service::processes::{Input, ProcessEvent, ProcessHandle, ProcessStream, Selector, Spec};
use crate::{Error, ErrorCode};

/// Pieces of typing that wait for the program to read.
const KEYS_QUEUE: usize = 64;
/// How long Wrenn's SDK has to show its age.
const AGE_TEST: Duration = Duration::from_secs(1);
/// Terminal size of a client that names none.
const DEFAULT_SIZE: (u32, u32) = (80, 24);

/// How data travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Encoding {
    /// Binary frames both ways.
    Binary,
    /// `input` and `output` frames with base64.
    Base64,
}

/// How to speak.
#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct PtyParams {
    /// How data travels; found out by the client's behaviour when absent.
    #[param(inline)]
    encoding: Option<Encoding>,
}

type Upgrade = Result<WebSocketUpgrade, axum::extract::ws::rejection::WebSocketUpgradeRejection>;

/// Open a terminal, or attach to one (WebSocket).
///
/// The first frame is `start` or `connect`; then `resize`, `kill`, and data as binary frames or as
/// `input`. The server sends `started`, data as binary frames or as `output`, `ping`, `error` and at
/// last `exit`.
#[utoipa::path(get, path = "/{id}/pty", tag = "processes",
    params(("id" = String, Path, description = "`sb-{uuid}`"), PtyParams), security(("api_key" = []), ("session" = [])), responses(
    (status = 101, description = "A WebSocket"),
    (status = 400, body = ErrorBody, description = "`invalid_request`: not a WebSocket"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 404, body = ErrorBody, description = "`not_found`")))]
pub(crate) async fn pty(
    State(services): State<Services>,
    caller: SocketCaller,
    Segments(id): Segments<String>,
    Params(PtyParams { encoding }): Params<PtyParams>,
    headers: HeaderMap,
    socket: Upgrade,
) -> ApiResult<Response> {
    if let Some(caller) = caller.known {
        services.sandbox(caller, &id).await?;
    }
    let socket = upgrade(socket)?;
    let agent = headers
        .get(header::USER_AGENT)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    let encoding = encoding.or_else(|| (!agent.starts_with("python-httpx")).then_some(Encoding::Binary));
    Ok(socket.on_upgrade(move |socket| async move {
        let (mut sink, mut stream) = socket.split();
        let known = match identify(&services, &caller, &id, &mut stream).await {
            Ok(known) => known,
            Err(error) => return fail(&mut sink, &error).await,
        };
        let mut encoding = encoding;
        let opened = match first(&mut stream).await {
            None => return,
            Some(Ok(ClientFrame::Start {
                cmd,
                args,
                cols,
                rows,
                envs,
                cwd,
                user,
                stdin: _,
                binary,
            })) => {
                let size = (cols.unwrap_or(DEFAULT_SIZE.0), rows.unwrap_or(DEFAULT_SIZE.1));
                let cmd = if cmd.is_empty() {
                    "/bin/bash".to_owned()
                } else {
                    cmd
                };
                let spec = Spec {
                    cmd,
                    args,
                    envs: envs.unwrap_or_default(),
                    cwd,
                    user,
                    tag: None,
                };
                if binary {
                    encoding = Some(Encoding::Binary);
                }
                services
                    .start_process(
                        known.principal,
                        &id,
                        spec,
                        Input::Terminal {
                            cols: size.0,
                            rows: size.1,
                        },
                    )
                    .await
            }
            Some(Ok(ClientFrame::Connect { tag })) => match Selector::parse(&tag) {
                Ok(selector) => services.connect_process(known.principal, &id, selector).await,
                Err(error) => Err(error),
            },
            Some(Ok(_)) => Err(Error::invalid("the first frame must be start or connect")),
            Some(Err(error)) => Err(error),
        };
        match opened {
            Ok((events, handle)) => {
                session(
                    &services,
                    &known,
                    &mut sink,
                    &mut stream,
                    events,
                    &handle,
                    encoding,
                )
                .await
            }
            Err(error) => fail(&mut sink, &error).await,
        }
    }))
}

async fn session(
    services: &Services,
    client: &Known,
    sink: &mut Sink,
    stream: &mut (impl StreamExt<Item = Result<Message, axum::Error>> + Unpin),
    events: ProcessStream,
    handle: &ProcessHandle,
    encoding: Option<Encoding>,
) {
    let (dialect, known) = watch::channel(encoding);
    // Complaints about input travel to the writer, which alone owns the sink.
    let (complain, complaints) = mpsc::channel(8);
    // Keys wait beside the listener, which has to hear a kill while a program does not read.
    let (keys, typed) = mpsc::channel(KEYS_QUEUE);
    let writing = write(services, sink, events, handle, &dialect, known, complaints);
    let ended = tokio::select! {
        ended = writing => Some(ended),
        () = listen(stream, client, handle, &dialect, &keys, &complain) => None,
        never = type_keys(typed, handle, &complain) => match never {},
        error = revoked(client) => Some(Err(Some(error))),
        () = services.tasks.closing().cancelled() => Some(Ok(())),
    };
    match ended {
        Some(Err(Some(error))) => fail(sink, &error).await,
        Some(Ok(()) | Err(None)) | None => close(sink).await,
    }
}

/// Does what the client's frames say until it goes.
async fn listen(
    stream: &mut (impl StreamExt<Item = Result<Message, axum::Error>> + Unpin),
    client: &Known,
    handle: &ProcessHandle,
    dialect: &watch::Sender<Option<Encoding>>,
    keys: &mpsc::Sender<Vec<u8>>,
    complain: &mpsc::Sender<Error>,
) {
    // A full queue is back-pressure. Its other end lives as long as this.
    let queue = async |data: Vec<u8>| {
        let _ = keys.send(data).await;
        Ok(())
    };
    let speaks = |encoding: Encoding| {
        dialect.send_if_modified(|known| {
            let changed = *known != Some(encoding);
            *known = Some(encoding);
            changed
        })
    };
    while let Some(received) = receive(stream).await {
        let done = match received {
            Received::Binary(data) => {
                speaks(Encoding::Binary);
                queue(data.into()).await
            }
            Received::Frame(ClientFrame::Input { data }) => {
                speaks(Encoding::Base64);
                match BASE64.decode(data) {
                    Ok(data) => queue(data).await,
                    Err(_) => Err(Error::invalid("data of an input frame must be base64")),
                }
            }
            Received::Frame(ClientFrame::Pong {}) => {
                dialect.send_if_modified(|known| {
                    let undecided = known.is_none();
                    known.get_or_insert(Encoding::Binary);
                    undecided
                });
                Ok(())
            }
            Received::Frame(ClientFrame::Resize { cols, rows }) => handle.resize(cols, rows).await,
            Received::Frame(ClientFrame::Kill {} | ClientFrame::Stop {}) => client.kill(handle).await,
            // A terminal's end of input is a key: ^D.
            Received::Frame(ClientFrame::Eof {}) => queue(vec![4]).await,
            Received::Frame(ClientFrame::Start { .. } | ClientFrame::Connect { .. }) => {
                Err(Error::invalid("the terminal has been opened already"))
            }
            Received::Malformed(error) => Err(error),
        };
        if let Err(error) = done
            && complain.send(error).await.is_err()
        {
            return;
        }
    }
}

/// Types in order what was received.
async fn type_keys(
    mut typed: mpsc::Receiver<Vec<u8>>,
    handle: &ProcessHandle,
    complain: &mpsc::Sender<Error>,
) -> std::convert::Infallible {
    while let Some(data) = typed.recv().await {
        if let Err(error) = handle.input(data).await {
            let _ = complain.try_send(error);
        }
    }
    std::future::pending().await
}

/// Forwards the terminal's output; `Err(None)` when the client is gone.
async fn write(
    services: &Services,
    sink: &mut Sink,
    mut events: ProcessStream,
    handle: &ProcessHandle,
    dialect: &watch::Sender<Option<Encoding>>,
    mut known: watch::Receiver<Option<Encoding>>,
    mut complaints: mpsc::Receiver<Error>,
) -> Result<(), Option<Error>> {
    let gone = |_: Gone| None;
    let every = services.config.timings.pty_ping;
    let mut ping = tokio::time::interval_at(tokio::time::Instant::now() + every, every);
    loop {
        let event = tokio::select! {
            event = events.next() => event.map_err(Some)?,
            Some(error) = complaints.recv() => {
                send(sink, &error_frame(&error, false)).await.map_err(gone)?;
                continue;
            }
            _ = ping.tick() => {
                send(sink, &ServerFrame::Ping {}).await.map_err(gone)?;
                // An open terminal is use: without this a quiet one would be paused under its user.
                if let Err(error) = handle.ping().await {
                    tracing::debug!(error = &error as &dyn std::error::Error, "a terminal's ping failed");
                }
                continue;
            }
        };
        let Some(event) = event else {
            return Err(Some(Error::new(
                ErrorCode::AgentError,
                "the terminal's stream ended early",
            )));
        };
        match event {
            ProcessEvent::Start { pid, tag } => {
                send(sink, &ServerFrame::Started { tag, pid })
                    .await
                    .map_err(gone)?;
                if known.borrow().is_none() {
                    send(sink, &ServerFrame::Ping {}).await.map_err(gone)?;
                    let age = tokio::time::timeout(AGE_TEST, known.wait_for(Option::is_some))
                        .await
                        .is_err();
                    if age {
                        dialect.send_if_modified(|known| known.replace(Encoding::Base64).is_none());
                    }
                }
            }
            ProcessEvent::Pty(data) | ProcessEvent::Stdout(data) | ProcessEvent::Stderr(data) => {
                let encoding = known.borrow().unwrap_or(Encoding::Binary);
                match encoding {
                    Encoding::Binary => sink.send(Message::Binary(data.into())).await.map_err(|_| None)?,
                    Encoding::Base64 => {
                        let data = BASE64.encode(&data);
                        send(sink, &ServerFrame::Output { data }).await.map_err(gone)?;
                    }
                }
            }
            ProcessEvent::KeepAlive => {}
            ProcessEvent::Exit { exit_code } => {
                return send(sink, &ServerFrame::Exit { exit_code }).await.map_err(gone);
            }
        }
    }
}
