//! A client of QEMU's machine protocol (QMP): JSON lines over a Unix socket.
//! Source: QEMU's `docs/interop/qmp-spec.rst`.

use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

use crate::error::{HostError, Result};

/// One answer or event is never longer; QEMU itself is not trusted to be well once its guest had a way in.
const MAX_LINE: u64 = 4 << 20;

#[derive(Deserialize)]
struct Message {
    /// The command's number, which QEMU gives back.
    id: Option<u64>,
    #[serde(rename = "return")]
    ok: Option<Value>,
    error: Option<QmpError>,
    event: Option<String>,
}

#[derive(Deserialize)]
struct QmpError {
    desc: String,
}

/// A connection to one QEMU. There is one owner: the VM's driver.
#[derive(Debug)]
pub(crate) struct Qmp {
    reader: BufReader<OwnedReadHalf>,
    writer: OwnedWriteHalf,
    /// How many commands were sent.
    sent: u64,
}

impl Qmp {
    /// Takes a fresh connection through the greeting.
    pub(crate) async fn handshake(stream: UnixStream) -> Result<Self> {
        let (reader, writer) = stream.into_split();
        let mut qmp = Self {
            reader: BufReader::new(reader),
            writer,
            sent: 0,
        };
        // QEMU's main loop greets once it runs, which is after all devices are made.
        tokio::time::timeout(Duration::from_secs(30), qmp.read_line())
            .await
            .map_err(|_| HostError::Vmm("QEMU did not greet within 30 s".to_owned()))??;
        qmp.execute("qmp_capabilities", json!({})).await?;
        Ok(qmp)
    }

    /// Runs a command; 30 s without an answer is an error.
    pub(crate) async fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.execute_within(command, arguments, Duration::from_secs(30))
            .await
    }

    async fn execute_within(&mut self, command: &str, arguments: Value, limit: Duration) -> Result<Value> {
        self.sent += 1;
        let id = self.sent;
        let mut line = json!({ "execute": command, "arguments": arguments, "id": id }).to_string();
        line.push('\n');
        let answer = async {
            self.writer
                .write_all(line.as_bytes())
                .await
                .map_err(|error| lost(&error))?;
            loop {
                match self.read_message().await? {
                    // The answer to a command that was given up comes late, and is not this one's.
                    Message { id: Some(other), .. } if other != id => {}
                    Message { ok: Some(value), .. } => return Ok(value),
                    Message {
                        error: Some(error), ..
                    } => {
                        return Err(HostError::Vmm(format!("QEMU refused {command}: {}", error.desc)));
                    }
                    // An event that nobody waits for; the driver learns what it must know by asking.
                    Message { .. } => {}
                }
            }
        };
        tokio::time::timeout(limit, answer).await.map_err(|_| {
            HostError::Vmm(format!(
                "QEMU did not answer {command} within {} s",
                limit.as_secs()
            ))
        })?
    }

    /// Waits for an event that no command has swallowed: the caller causes it after its last command. 30 s without it
    /// is an error.
    pub(crate) async fn event(&mut self, name: &str) -> Result<()> {
        let limit = Duration::from_secs(30);
        let seen = async {
            while self.read_message().await?.event.as_deref() != Some(name) {}
            Ok(())
        };
        tokio::time::timeout(limit, seen)
            .await
            .map_err(|_| HostError::Vmm(format!("QEMU did not report {name} within {} s", limit.as_secs())))?
    }

    async fn read_message(&mut self) -> Result<Message> {
        serde_json::from_slice(&self.read_line().await?)
            .map_err(|error| HostError::Vmm(format!("QEMU sent what is not QMP: {error}")))
    }

    async fn read_line(&mut self) -> Result<Vec<u8>> {
        let mut line = Vec::new();
        (&mut self.reader)
            .take(MAX_LINE)
            .read_until(b'\n', &mut line)
            .await
            .map_err(|error| lost(&error))?;
        if line.last() != Some(&b'\n') {
            return Err(HostError::Vmm("QEMU closed its control socket".to_owned()));
        }
        Ok(line)
    }
}

fn lost(error: &std::io::Error) -> HostError {
    HostError::Vmm(format!("lost QEMU's control socket: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_late_answer_is_not_taken_for_the_next_commands() {
        let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
        let qemu = async {
            let (reader, mut writer) = theirs.into_split();
            let mut lines = BufReader::new(reader).lines();
            let mut say = async |text: String| writer.write_all(text.as_bytes()).await.expect("a reader");
            say("{\"QMP\":{}}\n".to_owned()).await;
            let mut unanswered = Vec::new();
            while let Ok(Some(line)) = lines.next_line().await {
                let command: Value = serde_json::from_str(&line).expect("JSON");
                let answer = |of: &Value| format!("{{\"return\":{},\"id\":{}}}\n", of["execute"], of["id"]);
                if command["execute"] == "stop" {
                    unanswered.push(command);
                    continue;
                }
                for late in unanswered.drain(..) {
                    say(answer(&late)).await;
                }
                say(answer(&command)).await;
            }
        };
        let client = async {
            let mut qmp = Qmp::handshake(ours).await.expect("greeted");
            assert!(qmp.execute("stop", json!({})).await.is_err(), "nobody answered");
            assert_eq!(
                qmp.execute("query-status", json!({})).await.expect("answered"),
                "query-status"
            );
        };
        tokio::join!(qemu, client);
    }
}
