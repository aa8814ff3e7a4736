//! The WebSockets of the API: opened as an upgrade of an ordinary request, so that the key, TLS and
//! refusals before the upgrade work as everywhere else.
//!
//! Text frames hold JSON ([`ClientFrame`], [`ServerFrame`]), binary frames a terminal's bytes. The
//! server's application-level `ping` is answered here. A socket is read by one owner and written
//! through [`Writer`], which clones share.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::stream::{SplitSink, SplitStream};
use futures::{SinkExt, StreamExt};
use reqwest::{Method, StatusCode, Upgraded};
use tokio::sync::Mutex;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::{client::generate_key, derive_accept_key};
use tokio_tungstenite::tungstenite::protocol::{Message, Role, WebSocketConfig};
use wrenn_proto::rest::{ClientFrame, ServerFrame};

use crate::client::{CALL_TIMEOUT, Client, Retry};
use crate::error::{Error, Refusal, Result};

/// Largest message taken from the server: far above what it sends, far below what would hurt.
const MAX_MESSAGE: usize = 16 << 20;
/// Largest piece of input put into one message, so that control messages get in between.
pub(crate) const INPUT_CHUNK: usize = 32 << 10;
/// How long saying goodbye may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

type Stream = WebSocketStream<Upgraded>;

/// The reading half.
#[derive(Debug)]
pub(crate) struct Reader {
    stream: SplitStream<Stream>,
    writer: Writer,
}

/// The writing half.
#[derive(Debug, Clone)]
pub(crate) struct Writer {
    sink: Arc<Mutex<SplitSink<Stream, Message>>>,
    url: Arc<str>,
}

/// What the server sent.
#[derive(Debug)]
pub(crate) enum Received {
    Frame(ServerFrame),
    Binary(Bytes),
    Closed,
}

/// Opens a WebSocket at the path of the given segments.
pub(crate) async fn open(
    client: &Client,
    segments: &[&str],
    query: &[(&str, &str)],
) -> Result<(Reader, Writer)> {
    let key = generate_key();
    let request = client
        .request(Method::GET, segments)
        .query(query)
        .header("connection", "Upgrade")
        .header("upgrade", "websocket")
        .header("sec-websocket-version", "13")
        .header("sec-websocket-key", &key);
    // Only the opening is limited: a timeout on the request itself would also end the open socket.
    let answer = tokio::time::timeout(CALL_TIMEOUT, client.send_any(request, Retry::Unsent))
        .await
        .map_err(|elapsed| Error::transport(client.base_url(), elapsed))??;
    if answer.status() != StatusCode::SWITCHING_PROTOCOLS {
        return Err(if answer.status().is_success() {
            Error::protocol(client.base_url(), "no WebSocket is served here")
        } else {
            client.refusal(answer).await
        });
    }
    let accept = answer
        .headers()
        .get("sec-websocket-accept")
        .map(|value| value.as_bytes());
    if accept != Some(derive_accept_key(key.as_bytes()).as_bytes()) {
        return Err(Error::protocol(
            client.base_url(),
            "the WebSocket handshake has a wrong key",
        ));
    }
    let upgraded = answer
        .upgrade()
        .await
        .map_err(|error| Error::transport(client.base_url(), error.without_url()))?;
    let config = WebSocketConfig::default()
        .max_message_size(Some(MAX_MESSAGE))
        .max_frame_size(Some(MAX_MESSAGE));
    let socket = WebSocketStream::from_raw_socket(upgraded, Role::Client, Some(config)).await;
    let (sink, stream) = socket.split();
    let writer = Writer {
        sink: Arc::new(Mutex::new(sink)),
        url: client.base_url().into(),
    };
    Ok((
        Reader {
            stream,
            writer: writer.clone(),
        },
        writer,
    ))
}

impl Reader {
    /// The next message. Cancel-safe: a dropped call loses nothing.
    pub(crate) async fn next(&mut self) -> Result<Received> {
        loop {
            let message = match self.stream.next().await {
                Some(Ok(message)) => message,
                Some(Err(error)) => return Err(Error::transport(&self.writer.url, error)),
                None => return Ok(Received::Closed),
            };
            match message {
                Message::Text(text) => match parse(text.as_str()) {
                    Ok(Some(ServerFrame::Ping {})) => self.writer.pong(),
                    Ok(Some(frame)) => return Ok(Received::Frame(frame)),
                    // A frame of a newer server that this client does not know.
                    Ok(None) => {}
                    Err(detail) => return Err(Error::protocol(&self.writer.url, detail)),
                },
                Message::Binary(data) => return Ok(Received::Binary(data)),
                Message::Close(_) => return Ok(Received::Closed),
                Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => {}
            }
        }
    }

    pub(crate) fn url(&self) -> &str {
        &self.writer.url
    }
}

impl Writer {
    pub(crate) async fn frame(&self, frame: &ClientFrame) -> Result<()> {
        let text =
            serde_json::to_string(frame).map_err(|error| Error::protocol(&self.url, error.to_string()))?;
        self.send(Message::text(text)).await
    }

    pub(crate) async fn binary(&self, data: Bytes) -> Result<()> {
        self.send(Message::Binary(data)).await
    }

    async fn send(&self, message: Message) -> Result<()> {
        self.sink
            .lock()
            .await
            .send(message)
            .await
            .map_err(|error| Error::transport(&self.url, error))
    }

    /// Answers a ping without waiting: while someone else writes, that is answer enough.
    fn pong(&self) {
        if let Ok(mut sink) = self.sink.try_lock()
            && let Ok(text) = serde_json::to_string(&ClientFrame::Pong {})
        {
            // Polled once: the message is buffered at least, and flushed by the next read or write.
            let _ = futures::FutureExt::now_or_never(sink.send(Message::text(text)));
        }
    }

    /// Says goodbye, but does not insist on an answer.
    pub(crate) async fn close(&self) {
        let _ = tokio::time::timeout(CLOSE_TIMEOUT, async {
            let _ = self.sink.lock().await.close().await;
        })
        .await;
    }
}

/// A frame; `None` for a type that this version does not know.
fn parse(text: &str) -> Result<Option<ServerFrame>, String> {
    const KNOWN: [&str; 8] = [
        "start", "started", "stdout", "stderr", "output", "exit", "error", "ping",
    ];
    match serde_json::from_str(text) {
        Ok(frame) => Ok(Some(frame)),
        Err(error) => {
            #[derive(serde::Deserialize)]
            struct Typed {
                r#type: String,
            }
            match serde_json::from_str::<Typed>(text) {
                Ok(typed) if !KNOWN.contains(&typed.r#type.as_str()) => Ok(None),
                _ => Err(format!("a frame that is none: {error}")),
            }
        }
    }
}

/// The error that an `error` frame tells.
pub(crate) fn frame_error(data: String, code: Option<String>) -> Error {
    let code = code.unwrap_or_else(|| "agent_error".to_owned());
    Error::refused(Refusal {
        status: 0,
        code,
        message: data,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_of_unknown_type_are_skipped_and_broken_ones_are_not() {
        assert!(matches!(
            parse(r#"{"type":"exit","exit_code":3}"#),
            Ok(Some(ServerFrame::Exit { exit_code: 3 }))
        ));
        assert!(matches!(parse(r#"{"type":"newer","x":1}"#), Ok(None)));
        assert!(parse(r#"{"type":"exit"}"#).is_err());
        assert!(parse("hello").is_err());
    }
}
