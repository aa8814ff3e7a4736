//! WebSockets: exec, processes and terminals.
//!
//! Control frames are JSON text ([`ClientFrame`], [`ServerFrame`]). Reading and writing run side by
//! side, so a client that does not read what its program prints holds up the program (the RPC stream
//! is not read either) but can still be heard when it says `stop`. Every connection ends with a close
//! frame, since older clients take anything else for an error.
//!
//! A client that cannot set headers (a browser) sends its key in a first message of its own:
//! `{"type":"auth","api_key":"wrn_…"}`, or its session: `{"type":"auth","token":"…"}`.

pub(crate) mod exec;
pub(crate) mod pty;

use std::net::IpAddr;
use std::time::Duration;

use axum::extract::ws::{CloseFrame, Message, Utf8Bytes, WebSocket, WebSocketUpgrade};
use futures::stream::SplitSink;
use futures::{SinkExt, StreamExt};
use serde::Deserialize;
use wrenn_proto::rest::{ClientFrame, ServerFrame};

use super::extract::SocketCaller;
use crate::domain::around::{AuditEntry, AuditOutcome};
use crate::domain::{Principal, Realm};
use crate::service::Services;
use crate::service::processes::ProcessHandle;
use crate::tasks::TaskKind;
use crate::{Error, ErrorCode};

/// Largest frame of a client.
const MAX_FRAME: usize = 1 << 20;
/// How long a new connection may take to say what it wants.
const FIRST_FRAME: Duration = Duration::from_secs(30);
/// How long a client may take to let a frame in before the connection is given up at its end.
const LAST_FRAMES: Duration = Duration::from_secs(10);
/// How long a client has to answer a close.
const LINGER: Duration = Duration::from_secs(2);

/// The connection is gone; nobody is left to be told.
#[derive(Debug)]
pub(super) struct Gone;

pub(super) type Sink = SplitSink<WebSocket, Message>;

/// Sets the bounds of a connection.
pub(super) fn bounded(upgrade: WebSocketUpgrade) -> WebSocketUpgrade {
    upgrade.max_message_size(MAX_FRAME).max_frame_size(MAX_FRAME)
}

/// Sends a JSON frame.
pub(super) async fn send(sink: &mut Sink, frame: &ServerFrame) -> Result<(), Gone> {
    let text = serde_json::to_string(frame).map_err(|_| Gone)?;
    sink.send(Message::Text(text.into())).await.map_err(|_| Gone)
}

/// Shows a quiet connection to be alive: proxies cut those that look idle, and the system notices by what is not
/// acknowledged that a client is gone.
pub(super) async fn ping(sink: &mut Sink) -> Result<(), Gone> {
    sink.send(Message::Ping(bytes::Bytes::new()))
        .await
        .map_err(|_| Gone)
}

/// An error as a frame.
pub(super) fn error_frame(error: &Error, fatal: bool) -> ServerFrame {
    ServerFrame::Error {
        data: error.message.clone(),
        code: Some(error.code.as_str().to_owned()),
        fatal,
    }
}

/// Says what went wrong and closes.
pub(super) async fn fail(sink: &mut Sink, error: &Error) {
    let _ = tokio::time::timeout(LAST_FRAMES, send(sink, &error_frame(error, true))).await;
    close(sink).await;
}

/// Closes cleanly.
pub(super) async fn close(sink: &mut Sink) {
    let frame = CloseFrame {
        code: 1000,
        reason: Utf8Bytes::from_static(""),
    };
    let _ = tokio::time::timeout(LAST_FRAMES, async {
        let _ = sink.send(Message::Close(Some(frame))).await;
        let _ = sink.close().await;
    })
    .await;
}

/// Reads on for a moment after a close: input still on its way to a closed socket makes the kernel reset the
/// connection, and the client would lose the frames it has not read yet, the exit code among them.
pub(super) async fn linger(stream: &mut (impl StreamExt<Item = Result<Message, axum::Error>> + Unpin)) {
    let _ = tokio::time::timeout(LINGER, async { while let Some(Ok(_)) = stream.next().await {} }).await;
}

/// What a client sent.
pub(super) enum Received {
    Frame(ClientFrame),
    Binary(bytes::Bytes),
    Malformed(Error),
}

/// The client's next frame; `None` when it has closed or is gone.
pub(super) async fn receive(
    stream: &mut (impl StreamExt<Item = Result<Message, axum::Error>> + Unpin),
) -> Option<Received> {
    loop {
        return Some(match stream.next().await? {
            Ok(Message::Text(text)) => match serde_json::from_str(&text) {
                Ok(frame) => Received::Frame(frame),
                Err(error) => {
                    Received::Malformed(Error::invalid(format!("not a frame that is known here: {error}")))
                }
            },
            Ok(Message::Binary(data)) => Received::Binary(data),
            Ok(Message::Ping(_) | Message::Pong(_)) => continue,
            Ok(Message::Close(_)) | Err(_) => return None,
        });
    }
}

/// The message in which a browser sends its key or its session.
#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum AuthFrame {
    Auth {
        api_key: Option<String>,
        token: Option<String>,
    },
}

/// Who the client is, and with what it can be asked again whether it still is.
pub(super) struct Known {
    pub(super) services: Services,
    pub(super) principal: Principal,
    credential: (Option<String>, Option<String>),
    realm: Realm,
    source: Option<IpAddr>,
    /// The sandbox, as the path names it.
    sandbox: String,
}

impl Known {
    /// Kills the process. It is a frame and no request, so the audit log hears of it here; in a task of its own, since
    /// the process's end, and with it the connection's, may come before the answer.
    pub(super) async fn kill(&self, handle: &ProcessHandle) -> Result<(), Error> {
        let team = Some(self.principal.team);
        let mut entry = AuditEntry {
            actor: self.principal.actor.into(),
            source: self.source,
            ..AuditEntry::system(team, "sandbox.kill", "sandbox", &self.sandbox)
        };
        let (services, handle) = (self.services.clone(), handle.clone());
        let (tell, told) = tokio::sync::oneshot::channel();
        self.services.tasks.spawn(TaskKind::Request, async move {
            let killed = handle.kill().await;
            if killed.is_err() {
                entry.outcome = AuditOutcome::Failure;
            }
            services.audit(entry);
            let _ = tell.send(killed);
        });
        told.await
            .unwrap_or_else(|_| Err(Error::internal("a kill ended without an answer")))
    }
}

/// Who the client is: known from the headers, or told now in the first message.
pub(super) async fn identify(
    services: &Services,
    caller: &SocketCaller,
    sandbox: &str,
    stream: &mut (impl StreamExt<Item = Result<Message, axum::Error>> + Unpin),
) -> Result<Known, Error> {
    let known = |principal, credential| Known {
        services: services.clone(),
        principal,
        credential,
        realm: caller.realm,
        source: caller.source,
        sandbox: sandbox.to_owned(),
    };
    if let Some(principal) = caller.known {
        return Ok(known(principal, caller.credential.clone()));
    }
    let message = tokio::time::timeout(FIRST_FRAME, stream.next()).await;
    let (key, token) = match message {
        Ok(Some(Ok(Message::Text(text)))) => match serde_json::from_str(&text) {
            Ok(AuthFrame::Auth { api_key, token }) => (api_key, token),
            Err(_) => (None, None),
        },
        _ => (None, None),
    };
    let principal = match caller.realm {
        Realm::Team => services.authenticate(key.as_deref(), token.as_deref()).await,
        Realm::Platform => services.authenticate_platform(token.as_deref()).await,
    };
    caller.identified(principal.as_ref().ok());
    Ok(known(principal?, (key, token)))
}

/// Waits until the client's key or session counts no more: a connection may stay open for days.
pub(super) async fn revoked(known: &Known) -> Error {
    let services = &known.services;
    let (key, token) = &known.credential;
    loop {
        tokio::time::sleep(services.config.timings.recheck).await;
        let still = match known.realm {
            Realm::Team => {
                services
                    .reauthenticate((key.as_deref(), token.as_deref()), known.principal)
                    .await
            }
            Realm::Platform => match services.authenticate_platform(token.as_deref()).await {
                Err(error) if error.code != ErrorCode::DatabaseUnavailable => Err(error),
                _ => Ok(()),
            },
        };
        if let Err(error) = still {
            return error;
        }
    }
}

/// The first frame, which has to come in time and be JSON.
pub(super) async fn first(
    stream: &mut (impl StreamExt<Item = Result<Message, axum::Error>> + Unpin),
) -> Option<Result<ClientFrame, Error>> {
    match tokio::time::timeout(FIRST_FRAME, receive(stream)).await {
        Ok(Some(Received::Frame(frame))) => Some(Ok(frame)),
        Ok(Some(Received::Malformed(error))) => Some(Err(error)),
        Ok(Some(Received::Binary(_))) => Some(Err(Error::invalid("the first frame must be JSON text"))),
        Ok(None) => None,
        Err(_) => Some(Err(Error::invalid("the first frame did not come in time"))),
    }
}

/// Turns a stream of bytes, cut anywhere, into text: characters that are cut wait for their rest,
/// invalid bytes become the replacement character.
#[derive(Debug, Default)]
pub(super) struct TextDecoder {
    rest: Vec<u8>,
}

impl TextDecoder {
    pub(super) fn push(&mut self, data: &[u8]) -> String {
        self.rest.extend_from_slice(data);
        let mut text = String::with_capacity(self.rest.len());
        let mut at = 0;
        while let Some(bytes) = self.rest.get(at..) {
            match std::str::from_utf8(bytes) {
                Ok(valid) => {
                    text.push_str(valid);
                    at = self.rest.len();
                    break;
                }
                Err(error) => {
                    let (valid, _) = bytes.split_at(error.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(valid));
                    at += error.valid_up_to();
                    match error.error_len() {
                        Some(bad) => {
                            text.push(char::REPLACEMENT_CHARACTER);
                            at += bad;
                        }
                        None => break,
                    }
                }
            }
        }
        self.rest.drain(..at.min(self.rest.len()));
        text
    }

    /// What is left at the end.
    pub(super) fn finish(&mut self) -> String {
        let rest = std::mem::take(&mut self.rest);
        String::from_utf8_lossy(&rest).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn text_survives_any_cut(text in "\\PC{0,60}", cuts in proptest::collection::vec(1usize..8, 0..40)) {
            let mut decoder = TextDecoder::default();
            let mut got = String::new();
            let mut bytes = text.as_bytes();
            for cut in cuts {
                let (head, tail) = bytes.split_at(cut.min(bytes.len()));
                got.push_str(&decoder.push(head));
                bytes = tail;
            }
            got.push_str(&decoder.push(bytes));
            got.push_str(&decoder.finish());
            prop_assert_eq!(got, text);
        }

        #[test]
        fn garbage_reads_as_the_lossy_whole(bytes in proptest::collection::vec(any::<u8>(), 0..60), cut in 0usize..60) {
            let mut decoder = TextDecoder::default();
            let (head, tail) = bytes.split_at(cut.min(bytes.len()));
            let got = decoder.push(head) + &decoder.push(tail) + &decoder.finish();
            prop_assert_eq!(got, String::from_utf8_lossy(&bytes).into_owned());
        }
    }
}
