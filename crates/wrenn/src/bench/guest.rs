//! The guest agent of a bare virtual machine, spoken to directly: what the platform's calls cost at the very least.

use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use bytes::{Buf as _, Bytes, BytesMut};
use serde_json::json;
use wrenn_proto::guest::InitRequest;

/// Longer than anything healthy takes.
const LIMIT: Duration = Duration::from_secs(120);

/// One guest's agent behind a forwarded port.
#[derive(Debug, Clone)]
pub(super) struct BareGuest {
    http: reqwest::Client,
    base: String,
}

/// When a command's first output arrived, and when its end.
#[derive(Debug, Clone, Copy)]
pub(super) struct ExecTimes {
    pub(super) first_output: Instant,
    pub(super) end: Instant,
}

impl BareGuest {
    pub(super) fn new(port: u16) -> anyhow::Result<Self> {
        let http = reqwest::Client::builder()
            .no_proxy()
            .http1_only()
            .tcp_nodelay(true)
            .timeout(LIMIT)
            .build()?;
        Ok(Self {
            http,
            base: format!("http://127.0.0.1:{port}"),
        })
    }

    /// Waits for the first answer.
    pub(super) async fn wait_healthy(&self) -> anyhow::Result<()> {
        let deadline = Instant::now() + LIMIT;
        loop {
            // A guest whose agent does not listen yet may also leave a connection without an answer.
            let asked = self
                .http
                .get(format!("{}/health", self.base))
                .timeout(Duration::from_secs(5))
                .send()
                .await;
            match asked {
                Ok(answer) if answer.status().is_success() => return Ok(()),
                Ok(answer) => bail!("a bare guest's health check answered {}", answer.status()),
                Err(error) if Instant::now() > deadline => {
                    return Err(error).context("a bare guest does not answer");
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        }
    }

    /// Gives the guest the time and nothing else.
    pub(super) async fn init(&self) -> anyhow::Result<()> {
        let body = InitRequest {
            timestamp: Some(jiff::Timestamp::now().to_string()),
            default_user: Some("user".to_owned()),
            ..Default::default()
        };
        self.http
            .post(format!("{}/init", self.base))
            .json(&body)
            .send()
            .await?
            .error_for_status()?;
        Ok(())
    }

    /// Runs a command to its end.
    pub(super) async fn exec(&self, cmd: &str, args: &[&str]) -> anyhow::Result<ExecTimes> {
        let message = json!({ "process": { "cmd": cmd, "args": args } }).to_string();
        let mut body = vec![0];
        body.extend(u32::try_from(message.len())?.to_be_bytes());
        body.extend(message.into_bytes());
        let mut answer = self
            .http
            .post(format!("{}/process.Process/Start", self.base))
            .header("content-type", "application/connect+json")
            .header("connect-protocol-version", "1")
            .body(body)
            .send()
            .await?
            .error_for_status()?;
        let mut buffer = BytesMut::new();
        let mut first_output = None;
        while let Some(chunk) = answer.chunk().await? {
            buffer.extend_from_slice(&chunk);
            while let Some((flags, message)) = take_envelope(&mut buffer) {
                let event: serde_json::Value = serde_json::from_slice(&message)?;
                if event.pointer("/event/data/stdout").is_some() && first_output.is_none() {
                    first_output = Some(Instant::now());
                }
                // The envelope that ends the stream carries its error, if there was one.
                if flags & 2 != 0
                    && let Some(error) = event.get("error")
                {
                    bail!("a bare guest refused a command: {error}");
                }
            }
        }
        Ok(ExecTimes {
            first_output: first_output.context("a command in a bare guest wrote nothing")?,
            end: Instant::now(),
        })
    }

    /// Uploads a file.
    pub(super) async fn put(&self, path: &str, content: Bytes) -> anyhow::Result<()> {
        self.http
            .post(format!("{}/files", self.base))
            .query(&[("path", path)])
            .header("content-type", "application/octet-stream")
            .body(content)
            .send()
            .await?
            .error_for_status()?;
        Ok(())
    }

    /// Downloads a file and tells its length.
    pub(super) async fn get(&self, path: &str) -> anyhow::Result<usize> {
        let mut answer = self
            .http
            .get(format!("{}/files", self.base))
            .query(&[("path", path)])
            .send()
            .await?
            .error_for_status()?;
        let mut length = 0;
        while let Some(chunk) = answer.chunk().await? {
            length += chunk.len();
        }
        Ok(length)
    }
}

/// One message of a Connect stream: a byte of flags, its length in four bytes, and the message.
fn take_envelope(buffer: &mut BytesMut) -> Option<(u8, Bytes)> {
    let length = u32::from_be_bytes(buffer.get(1..5)?.try_into().ok()?) as usize;
    if buffer.len() - 5 < length {
        return None;
    }
    let flags = buffer.get_u8();
    buffer.advance(4);
    Some((flags, buffer.split_to(length).freeze()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn envelopes_are_taken_only_whole() {
        let mut buffer = BytesMut::from(&b"\x00\x00\x00\x00\x02{}\x02\x00\x00\x00\x02{"[..]);
        assert_eq!(take_envelope(&mut buffer), Some((0, Bytes::from_static(b"{}"))));
        assert_eq!(take_envelope(&mut buffer), None);
        buffer.extend_from_slice(b"}");
        assert_eq!(take_envelope(&mut buffer), Some((2, Bytes::from_static(b"{}"))));
        assert_eq!(take_envelope(&mut buffer), None);
    }
}
