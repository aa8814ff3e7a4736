//! `exec/stream`: start a program and follow it. `processes/{selector}/stream`: follow one that runs.
//!
//! A client that goes away leaves the program running: it can be followed again by its pid.
//!
//! Output is bytes, and a JSON frame holds text. Clients that say nothing get text: a character that is
//! cut by a chunk's edge waits for its rest, and bytes that are no text become the replacement
//! character. `?encoding=base64` is for those that need the bytes as they were written: every chunk
//! travels as base64, and says so, so that a reader never has to guess.

use std::time::Duration;

use axum::extract::State;
use axum::extract::ws::{Message, WebSocketUpgrade};
use axum::response::Response;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use futures::StreamExt;
use serde::Deserialize;
use tokio::sync::mpsc;
use wrenn_proto::rest::{ClientFrame, ErrorBody, ServerFrame};

use super::{
    Gone, Known, Received, Sink, TextDecoder, bounded, close, error_frame, fail, first, identify, linger,
    ping, receive, revoked, send,
};
use crate::api::error::{ApiError, ApiResult};
use crate::api::extract::{Params, Segments, SocketCaller};
use crate::service::Services;
use crate::service::processes::{Input, ProcessEvent, ProcessHandle, ProcessStream, Selector, Spec};
use crate::{Error, ErrorCode};

/// Pieces of standard input that wait for the program to read.
const STDIN_QUEUE: usize = 64;

/// How output travels.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, utoipa::ToSchema)]
pub(crate) enum Encoding {
    /// Text; what is not valid UTF-8 is replaced.
    #[default]
    #[serde(rename = "utf-8")]
    Utf8,
    /// The bytes as they were written.
    #[serde(rename = "base64")]
    Base64,
}

/// How to speak.
#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct StreamParams {
    /// How `stdout` and `stderr` carry their `data`: `utf-8`, the default, is text in which invalid bytes are
    /// replaced; with `base64`, the frames have `"encoding": "base64"` and the bytes as they were written.
    #[param(inline)]
    encoding: Option<Encoding>,
}

type Upgrade = Result<WebSocketUpgrade, axum::extract::ws::rejection::WebSocketUpgradeRejection>;

/// The upgrade, or our kind of error.
pub(super) fn upgrade(upgrade: Upgrade) -> ApiResult<WebSocketUpgrade> {
    match upgrade {
        Ok(upgrade) => Ok(bounded(upgrade)),
        Err(rejection) => Err(ApiError(Error::invalid(format!(
            "this route is a WebSocket: {}",
            rejection.body_text()
        )))),
    }
}

/// Start a program and stream its output (WebSocket).
///
/// The first frame is `start`; `stop` kills the program; `input` and `eof` feed its standard input when
/// `start` said `stdin`. The server sends `start`, `stdout`, `stderr`,
/// `error` and at last `exit`. `"binary": true` in `start` means the same as `encoding=base64`.
#[utoipa::path(get, path = "/{id}/exec/stream", tag = "processes",
    params(("id" = String, Path, description = "`sb-{uuid}`"), StreamParams),
    security(("api_key" = []), ("session" = [])), responses(
    (status = 101, description = "A WebSocket"),
    (status = 400, body = ErrorBody, description = "`invalid_request`: not a WebSocket, or an unknown `encoding`"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 404, body = ErrorBody, description = "`not_found`")))]
pub(crate) async fn exec_stream(
    State(services): State<Services>,
    caller: SocketCaller,
    Segments(id): Segments<String>,
    Params(StreamParams { encoding }): Params<StreamParams>,
    socket: Upgrade,
) -> ApiResult<Response> {
    if let Some(caller) = caller.known {
        services.sandbox(caller, &id).await?;
    }
    let socket = upgrade(socket)?;
    Ok(socket.on_upgrade(move |socket| async move {
        let (mut sink, mut stream) = socket.split();
        let known = match identify(&services, &caller, &id, &mut stream).await {
            Ok(known) => known,
            Err(error) => return fail(&mut sink, &error).await,
        };
        let started = match first(&mut stream).await {
            None => return,
            Some(Ok(ClientFrame::Start {
                cmd,
                args,
                envs,
                cwd,
                user,
                stdin,
                binary,
                cols: _,
                rows: _,
            })) => {
                let spec = Spec {
                    cmd,
                    args,
                    envs: envs.unwrap_or_default(),
                    cwd,
                    user,
                    tag: None,
                };
                let input = if stdin { Input::Pipe } else { Input::Nothing };
                services
                    .start_process(known.principal, &id, spec, input)
                    .await
                    .map(|started| {
                        let encoding = if binary {
                            Encoding::Base64
                        } else {
                            encoding.unwrap_or_default()
                        };
                        (started, stdin, encoding)
                    })
            }
            Some(Ok(_)) => Err(Error::invalid("the first frame must be start")),
            Some(Err(error)) => Err(error),
        };
        match started {
            Ok(((events, handle), stdin, encoding)) => {
                follow(&known, &mut sink, &mut stream, events, &handle, stdin, encoding).await;
            }
            Err(error) => fail(&mut sink, &error).await,
        }
    }))
}

/// Follow a process that runs already (WebSocket).
#[utoipa::path(get, path = "/{id}/processes/{selector}/stream", tag = "processes",
    params(("id" = String, Path, description = "`sb-{uuid}`"), ("selector" = String, Path, description = "Pid or tag"), StreamParams),
    security(("api_key" = []), ("session" = [])), responses(
    (status = 101, description = "A WebSocket"),
    (status = 400, body = ErrorBody, description = "`invalid_request`: not a WebSocket, or an unknown `encoding`"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 404, body = ErrorBody, description = "`not_found`")))]
pub(crate) async fn process_stream(
    State(services): State<Services>,
    caller: SocketCaller,
    Segments((id, selector)): Segments<(String, String)>,
    Params(StreamParams { encoding }): Params<StreamParams>,
    socket: Upgrade,
) -> ApiResult<Response> {
    let selector = Selector::parse(&selector)?;
    if let Some(caller) = caller.known {
        services.sandbox(caller, &id).await?;
    }
    let socket = upgrade(socket)?;
    Ok(socket.on_upgrade(move |socket| async move {
        let (mut sink, mut stream) = socket.split();
        let known = match identify(&services, &caller, &id, &mut stream).await {
            Ok(known) => known,
            Err(error) => return fail(&mut sink, &error).await,
        };
        match services.connect_process(known.principal, &id, selector).await {
            Ok((events, handle)) => {
                follow(
                    &known,
                    &mut sink,
                    &mut stream,
                    events,
                    &handle,
                    false,
                    encoding.unwrap_or_default(),
                )
                .await
            }
            Err(error) => fail(&mut sink, &error).await,
        }
    }))
}

async fn follow(
    known: &Known,
    sink: &mut Sink,
    stream: &mut (impl StreamExt<Item = Result<Message, axum::Error>> + Unpin),
    events: ProcessStream,
    handle: &ProcessHandle,
    stdin: bool,
    encoding: Encoding,
) {
    // Complaints about input travel to the writer, which alone owns the sink.
    let (complain, complaints) = mpsc::channel(8);
    let (feed, food) = mpsc::channel(STDIN_QUEUE);
    let ended = tokio::select! {
        ended = write(sink, events, encoding, complaints, known.services.config.timings.pty_ping) => Some(ended),
        () = listen(stream, known, handle, stdin.then_some(feed), &complain) => None,
        never = feed_stdin(food, handle, &complain) => match never {},
        error = revoked(known) => Some(Err(Some(error))),
        () = known.services.tasks.closing().cancelled() => Some(Ok(())),
    };
    match ended {
        Some(Err(Some(error))) => fail(sink, &error).await,
        // The client is gone; answering its close is all that is left.
        Some(Ok(()) | Err(None)) | None => close(sink).await,
    }
    linger(stream).await;
}

/// A piece of standard input; `None` is its end.
type Food = Option<Vec<u8>>;

/// Does what the client's frames say until it goes.
async fn listen(
    stream: &mut (impl StreamExt<Item = Result<Message, axum::Error>> + Unpin),
    known: &Known,
    handle: &ProcessHandle,
    mut feed: Option<mpsc::Sender<Food>>,
    complain: &mpsc::Sender<Error>,
) {
    while let Some(received) = receive(stream).await {
        let food = match received {
            Received::Frame(ClientFrame::Stop {} | ClientFrame::Kill {}) => {
                if let Err(error) = known.kill(handle).await {
                    tracing::debug!(error = &error as &dyn std::error::Error, "a stop came too late");
                }
                continue;
            }
            Received::Frame(ClientFrame::Input { data }) => match BASE64.decode(data) {
                Ok(data) => Some(data),
                Err(_) => {
                    let _ = complain.try_send(Error::invalid("data of an input frame must be base64"));
                    continue;
                }
            },
            Received::Binary(data) => Some(data.into()),
            Received::Frame(ClientFrame::Eof {}) => None,
            Received::Malformed(error) => {
                let _ = complain.try_send(error);
                continue;
            }
            // Frames that mean nothing here are harmless.
            Received::Frame(
                ClientFrame::Start { .. }
                | ClientFrame::Connect { .. }
                | ClientFrame::Resize { .. }
                | ClientFrame::Pong {},
            ) => continue,
        };
        let last = food.is_none();
        match &feed {
            Some(queue) => {
                // A full queue is back-pressure: the program does not read its input.
                let _ = queue.send(food).await;
            }
            None => {
                let _ = complain.try_send(Error::invalid(
                    "the process was not started with stdin, or its end was sent",
                ));
            }
        }
        if last {
            feed = None;
        }
    }
}

/// Feeds standard input in order, beside the listener, which has to hear a `stop` meanwhile.
async fn feed_stdin(
    mut food: mpsc::Receiver<Food>,
    handle: &ProcessHandle,
    complain: &mpsc::Sender<Error>,
) -> std::convert::Infallible {
    while let Some(piece) = food.recv().await {
        let fed = match piece {
            Some(data) => handle.feed(data).await,
            None => handle.end_input().await,
        };
        if let Err(error) = fed {
            let _ = complain.try_send(error);
        }
    }
    std::future::pending().await
}

/// Forwards events; `Err(None)` when the client is gone.
async fn write(
    sink: &mut Sink,
    mut events: ProcessStream,
    encoding: Encoding,
    mut complaints: mpsc::Receiver<Error>,
    every: Duration,
) -> Result<(), Option<Error>> {
    let mut alive = tokio::time::interval_at(tokio::time::Instant::now() + every, every);
    let (mut out, mut err) = (Output::new(encoding), Output::new(encoding));
    let gone = |_: Gone| None;
    loop {
        let event = tokio::select! {
            event = events.next() => event.map_err(Some)?,
            Some(error) = complaints.recv() => {
                send(sink, &error_frame(&error, false)).await.map_err(gone)?;
                continue;
            }
            _ = alive.tick() => {
                ping(sink).await.map_err(gone)?;
                continue;
            }
        };
        let Some(event) = event else {
            return Err(Some(Error::new(
                ErrorCode::AgentError,
                "the process's stream ended early",
            )));
        };
        match event {
            ProcessEvent::Start { pid, tag: _ } => {
                send(sink, &ServerFrame::Start { pid }).await.map_err(gone)?
            }
            ProcessEvent::Stdout(data) | ProcessEvent::Pty(data) => {
                if let Some((data, encoding)) = out.push(data) {
                    send(sink, &ServerFrame::Stdout { data, encoding })
                        .await
                        .map_err(gone)?;
                }
            }
            ProcessEvent::Stderr(data) => {
                if let Some((data, encoding)) = err.push(data) {
                    send(sink, &ServerFrame::Stderr { data, encoding })
                        .await
                        .map_err(gone)?;
                }
            }
            ProcessEvent::KeepAlive => {}
            ProcessEvent::Exit { exit_code } => {
                if let Some((data, encoding)) = out.finish() {
                    send(sink, &ServerFrame::Stdout { data, encoding })
                        .await
                        .map_err(gone)?;
                }
                if let Some((data, encoding)) = err.finish() {
                    send(sink, &ServerFrame::Stderr { data, encoding })
                        .await
                        .map_err(gone)?;
                }
                return send(sink, &ServerFrame::Exit { exit_code }).await.map_err(gone);
            }
        }
    }
}

/// One output stream's way into text frames.
enum Output {
    Text(TextDecoder),
    Base64,
}

impl Output {
    fn new(encoding: Encoding) -> Self {
        match encoding {
            Encoding::Utf8 => Self::Text(TextDecoder::default()),
            Encoding::Base64 => Self::Base64,
        }
    }

    /// A frame's data and encoding; `None` when there is nothing to send (yet).
    fn push(&mut self, data: Vec<u8>) -> Option<(String, Option<String>)> {
        let frame = match self {
            Self::Text(decoder) => (decoder.push(&data), None),
            Self::Base64 => (BASE64.encode(data), Some("base64".to_owned())),
        };
        Some(frame).filter(|(data, _)| !data.is_empty())
    }

    /// What is left at the end.
    fn finish(&mut self) -> Option<(String, Option<String>)> {
        match self {
            Self::Text(decoder) => Some((decoder.finish(), None)).filter(|(data, _)| !data.is_empty()),
            Self::Base64 => None,
        }
    }
}
