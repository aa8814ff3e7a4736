//! Commands with live output: `/exec/stream`, and `/processes/{selector}/stream` for one that runs already.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt};
use wrenn_proto::rest::{ClientFrame, ServerFrame};

use crate::error::{Error, Result};
use crate::sandboxes::SandboxHandle;
use crate::socket::{self, INPUT_CHUNK, Reader, Received, Writer};

/// Asks for output as it was written: text frames alone would replace what is not valid UTF-8.
const EXACT: [(&str, &str); 1] = [("encoding", "base64")];
/// How long a kill may wait for room on a socket whose other end does not read.
const KILL_TIMEOUT: Duration = Duration::from_secs(2);

/// What to run, and how.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct ExecOptions {
    /// Program; looked up in the user's `PATH`.
    pub cmd: String,
    /// Its arguments.
    pub args: Vec<String>,
    /// Added to the sandbox's environment.
    pub envs: BTreeMap<String, String>,
    /// Working directory; the user's home when absent.
    pub cwd: Option<String>,
    /// User to run as; the sandbox's default user when absent.
    pub user: Option<String>,
    /// Whether the process gets a standard input to write to ([`ExecStream::stdin`]); else it is empty.
    pub stdin: bool,
}

wrenn_proto::discreet_debug!(ExecOptions shows(cmd, args, cwd, user, stdin) hides(envs));

/// What a running command does.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ExecEvent {
    /// It started.
    Started {
        /// Its pid in the guest.
        pid: u32,
    },
    /// Bytes of its standard output, as they were written.
    Stdout(Bytes),
    /// Bytes of its standard error.
    Stderr(Bytes),
    /// It ended; the last event.
    Exited {
        /// Exit code; -1 when a signal ended it.
        code: i32,
    },
}

/// A command with live output.
///
/// A reader that stops reading stops the command, not the platform. Dropping the stream leaves the
/// command running; [`ExecControl::kill`] ends it.
///
/// ```no_run
/// use wrenn_client::{ExecEvent, ExecOptions};
///
/// # async fn example(sandbox: wrenn_client::SandboxHandle) -> Result<(), wrenn_client::Error> {
/// let options = ExecOptions { cmd: "sort".into(), stdin: true, ..ExecOptions::default() };
/// let mut command = sandbox.exec_stream(&options).await?;
/// let input = command.stdin();
/// input.write(b"b\na\n").await?;
/// input.close().await?;
/// while let Some(event) = command.next().await? {
///     match event {
///         ExecEvent::Stdout(bytes) => print!("{}", String::from_utf8_lossy(&bytes)),
///         ExecEvent::Exited { code } => println!("exit code {code}"),
///         _ => {}
///     }
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct ExecStream {
    sandbox: SandboxHandle,
    reader: Reader,
    writer: Writer,
    /// Pid or tag, once known; shared with the handles that can end the command.
    selector: Arc<OnceLock<String>>,
    /// Whether it was given a standard input.
    stdin: bool,
    /// What the server complained about without ending the stream.
    complaint: Option<Error>,
    ended: bool,
}

impl ExecStream {
    pub(crate) async fn start(sandbox: &SandboxHandle, options: &ExecOptions) -> Result<Self> {
        let (reader, writer) = socket::open(
            sandbox.client(),
            &["v1", "sandboxes", sandbox.id(), "exec", "stream"],
            &EXACT,
        )
        .await?;
        let start = ClientFrame::Start {
            cmd: options.cmd.clone(),
            args: options.args.clone(),
            cols: None,
            rows: None,
            envs: Some(options.envs.clone()).filter(|envs| !envs.is_empty()),
            cwd: options.cwd.clone(),
            user: options.user.clone(),
            stdin: options.stdin,
            binary: false,
        };
        writer.frame(&start).await?;
        Ok(Self {
            sandbox: sandbox.clone(),
            reader,
            writer,
            selector: Arc::default(),
            stdin: options.stdin,
            complaint: None,
            ended: false,
        })
    }

    pub(crate) async fn follow(sandbox: &SandboxHandle, selector: &str) -> Result<Self> {
        let path = ["v1", "sandboxes", sandbox.id(), "processes", selector, "stream"];
        let (reader, writer) = socket::open(sandbox.client(), &path, &EXACT).await?;
        Ok(Self {
            sandbox: sandbox.clone(),
            reader,
            writer,
            selector: Arc::new(OnceLock::from(selector.to_owned())),
            stdin: false,
            complaint: None,
            ended: false,
        })
    }

    /// The next event; `None` after [`ExecEvent::Exited`]. Cancel-safe.
    ///
    /// # Errors
    /// [`Error::InvalidRequest`] or [`Error::Agent`] when the command cannot start;
    /// [`Error::Transport`] when the connection breaks before the command ends.
    pub async fn next(&mut self) -> Result<Option<ExecEvent>> {
        if self.ended {
            return Ok(None);
        }
        loop {
            let received = match self.reader.next().await {
                Ok(received) => received,
                Err(error) => {
                    self.ended = true;
                    return Err(error);
                }
            };
            return match received {
                Received::Frame(ServerFrame::Start { pid }) => {
                    // A followed process was named by the caller already, as well as by its pid.
                    let _ = self.selector.set(pid.to_string());
                    Ok(Some(ExecEvent::Started { pid }))
                }
                Received::Frame(ServerFrame::Stdout { data, encoding }) => self
                    .decode(data, encoding.as_deref())
                    .map(|bytes| Some(ExecEvent::Stdout(bytes))),
                Received::Frame(ServerFrame::Stderr { data, encoding }) => self
                    .decode(data, encoding.as_deref())
                    .map(|bytes| Some(ExecEvent::Stderr(bytes))),
                Received::Frame(ServerFrame::Exit { exit_code }) => {
                    self.ended = true;
                    self.writer.close().await;
                    Ok(Some(ExecEvent::Exited { code: exit_code }))
                }
                Received::Frame(ServerFrame::Error {
                    data,
                    code,
                    fatal: true,
                }) => {
                    self.ended = true;
                    Err(socket::frame_error(data, code))
                }
                // For example input for a command that has closed its own: of interest only if it
                // turns out to have been the last word.
                Received::Frame(ServerFrame::Error {
                    data,
                    code,
                    fatal: false,
                }) => {
                    self.complaint = Some(socket::frame_error(data, code));
                    continue;
                }
                Received::Closed => {
                    self.ended = true;
                    Err(self.complaint.take().unwrap_or_else(|| {
                        Error::transport(
                            self.reader.url(),
                            "the server closed the stream before the command ended",
                        )
                    }))
                }
                // Frames of terminals.
                Received::Frame(
                    ServerFrame::Started { .. } | ServerFrame::Output { .. } | ServerFrame::Ping {},
                )
                | Received::Binary(_) => continue,
            };
        }
    }

    fn decode(&self, data: String, encoding: Option<&str>) -> Result<Bytes> {
        match encoding {
            None | Some("utf-8") => Ok(data.into()),
            Some("base64") => STANDARD
                .decode(data)
                .map(Bytes::from)
                .map_err(|error| Error::protocol(self.reader.url(), error.to_string())),
            Some(other) => Err(Error::protocol(
                self.reader.url(),
                format!("unknown encoding '{other}'"),
            )),
        }
    }

    /// Its standard input; of use only when [`ExecOptions::stdin`] was set.
    #[must_use]
    pub fn stdin(&self) -> ExecStdin {
        ExecStdin {
            writer: self.writer.clone(),
        }
    }

    /// A handle that can end it while another task reads its events.
    #[must_use]
    pub fn control(&self) -> ExecControl {
        ExecControl {
            sandbox: self.sandbox.clone(),
            writer: self.writer.clone(),
            selector: Arc::clone(&self.selector),
            stdin: self.stdin,
        }
    }
}

/// Standard input of a streamed command.
#[derive(Debug, Clone)]
pub struct ExecStdin {
    writer: Writer,
}

impl ExecStdin {
    /// Writes all of it; waits while the command does not read. Events must be read meanwhile.
    ///
    /// # Errors
    /// [`Error::Transport`] when the connection is gone.
    pub async fn write(&self, data: &[u8]) -> Result<()> {
        for chunk in data.chunks(INPUT_CHUNK) {
            self.writer
                .frame(&ClientFrame::Input {
                    data: STANDARD.encode(chunk),
                })
                .await?;
        }
        Ok(())
    }

    /// Copies all that a reader gives, then closes the input.
    ///
    /// ```no_run
    /// # async fn example(command: wrenn_client::ExecStream) -> Result<(), wrenn_client::Error> {
    /// command.stdin().copy_from(tokio::io::stdin()).await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::Io`] when reading fails; [`Error::Transport`].
    pub async fn copy_from(&self, mut source: impl AsyncRead + Unpin) -> Result<()> {
        let mut buffer = vec![0; INPUT_CHUNK];
        loop {
            let read = source.read(&mut buffer).await.map_err(|source| Error::Io {
                what: "cannot read the input".to_owned(),
                source,
            })?;
            if read == 0 {
                return self.close().await;
            }
            self.write(&buffer[..read]).await?;
        }
    }

    /// Ends the input: the command reads end-of-file.
    ///
    /// # Errors
    /// [`Error::Transport`] when the connection is gone.
    pub async fn close(&self) -> Result<()> {
        self.writer.frame(&ClientFrame::Eof {}).await
    }
}

/// Ends a streamed command.
#[derive(Debug, Clone)]
pub struct ExecControl {
    sandbox: SandboxHandle,
    writer: Writer,
    selector: Arc<OnceLock<String>>,
    stdin: bool,
}

impl ExecControl {
    /// Kills the command and its process group.
    ///
    /// # Errors
    /// [`Error::Transport`]. A command that has ended already is no error.
    pub async fn kill(&self) -> Result<()> {
        let stop = ClientFrame::Stop {};
        let sent = tokio::time::timeout(KILL_TIMEOUT, self.writer.frame(&stop)).await;
        match (self.selector.get(), sent) {
            (_, Ok(Ok(()))) if !self.stdin => Ok(()),
            // The socket is broken, or `stop` may wait behind input that the command does not read:
            // the other door.
            (Some(selector), _) => match self.sandbox.kill_process(selector).await {
                Err(Error::NotFound(_)) => Ok(()),
                outcome => outcome,
            },
            (None, Ok(outcome)) => outcome,
            (None, Err(elapsed)) => Err(Error::transport(self.sandbox.client().base_url(), elapsed)),
        }
    }
}
