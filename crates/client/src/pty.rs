//! Terminals: `/pty`. Data travels in binary frames; servers that answer in base64 text are understood too.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use wrenn_proto::rest::{ClientFrame, ServerFrame};

use crate::error::{Error, Result};
use crate::sandboxes::SandboxHandle;
use crate::socket::{self, INPUT_CHUNK, Reader, Received, Writer};

/// What to run in a terminal.
#[derive(Clone, PartialEq, Eq)]
pub struct PtyOptions {
    /// Program; the server's choice of shell when empty.
    pub cmd: String,
    /// Its arguments.
    pub args: Vec<String>,
    /// Width.
    pub cols: u32,
    /// Height.
    pub rows: u32,
    /// Added to the sandbox's environment.
    pub envs: BTreeMap<String, String>,
    /// Working directory; the user's home when absent.
    pub cwd: Option<String>,
    /// User to run as; the sandbox's default user when absent.
    pub user: Option<String>,
}

wrenn_proto::discreet_debug!(PtyOptions shows(cmd, args, cols, rows, cwd, user) hides(envs));

impl Default for PtyOptions {
    /// A login shell of 80 by 24.
    fn default() -> Self {
        Self {
            cmd: "/bin/bash".to_owned(),
            args: vec!["-l".to_owned()],
            cols: 80,
            rows: 24,
            envs: BTreeMap::new(),
            cwd: None,
            user: None,
        }
    }
}

/// What a terminal does.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum PtyEvent {
    /// Bytes for the screen.
    Output(Bytes),
    /// Its program ended; the last event.
    Exited {
        /// Exit code; -1 when a signal ended it.
        code: i32,
    },
}

/// A terminal in a sandbox. Dropping it leaves its program running;
/// [`SandboxHandle::pty_connect`] comes back to it.
///
/// ```no_run
/// use wrenn_client::{PtyEvent, PtyOptions};
///
/// # async fn example(sandbox: wrenn_client::SandboxHandle) -> Result<(), wrenn_client::Error> {
/// let mut terminal = sandbox.pty(&PtyOptions::default()).await?;
/// terminal.writer().write(b"tty; exit\n").await?;
/// while let Some(event) = terminal.next().await? {
///     if let PtyEvent::Output(bytes) = event {
///         print!("{}", String::from_utf8_lossy(&bytes));
///     }
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Pty {
    reader: Reader,
    writer: Writer,
    tag: String,
    pid: u32,
    /// Output that came before the server said that the terminal had started.
    early: Option<Bytes>,
    ended: bool,
}

impl Pty {
    pub(crate) async fn start(sandbox: &SandboxHandle, options: &PtyOptions) -> Result<Self> {
        let start = ClientFrame::Start {
            cmd: options.cmd.clone(),
            args: options.args.clone(),
            cols: Some(options.cols),
            rows: Some(options.rows),
            envs: Some(options.envs.clone()).filter(|envs| !envs.is_empty()),
            cwd: options.cwd.clone(),
            user: options.user.clone(),
            stdin: false,
            binary: true,
        };
        Self::open(sandbox, &start).await
    }

    pub(crate) async fn connect(sandbox: &SandboxHandle, tag: &str) -> Result<Self> {
        Self::open(sandbox, &ClientFrame::Connect { tag: tag.to_owned() }).await
    }

    async fn open(sandbox: &SandboxHandle, first: &ClientFrame) -> Result<Self> {
        let path = ["v1", "sandboxes", sandbox.id(), "pty"];
        let (mut reader, writer) = socket::open(sandbox.client(), &path, &[("encoding", "binary")]).await?;
        writer.frame(first).await?;
        let mut early = None;
        loop {
            match reader.next().await? {
                Received::Frame(ServerFrame::Started { tag, pid }) => {
                    return Ok(Self {
                        reader,
                        writer,
                        tag,
                        pid,
                        early,
                        ended: false,
                    });
                }
                Received::Frame(ServerFrame::Error { data, code, .. }) => {
                    return Err(socket::frame_error(data, code));
                }
                Received::Binary(data) if early.is_none() => early = Some(data),
                Received::Closed => {
                    return Err(Error::transport(
                        reader.url(),
                        "the server closed the stream before the terminal started",
                    ));
                }
                Received::Frame(_) | Received::Binary(_) => {
                    return Err(Error::protocol(
                        reader.url(),
                        "the terminal did not start with 'started'",
                    ));
                }
            }
        }
    }

    /// By which it can be attached to again.
    #[must_use]
    pub fn tag(&self) -> &str {
        &self.tag
    }

    /// Its program's pid in the guest.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Input, size and end; usable while another task reads the events.
    #[must_use]
    pub fn writer(&self) -> PtyWriter {
        PtyWriter {
            writer: self.writer.clone(),
        }
    }

    /// The next event; `None` after [`PtyEvent::Exited`]. Cancel-safe.
    ///
    /// # Errors
    /// [`Error::Transport`] when the connection breaks; what the server tells as fatal.
    pub async fn next(&mut self) -> Result<Option<PtyEvent>> {
        if let Some(data) = self.early.take() {
            return Ok(Some(PtyEvent::Output(data)));
        }
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
                Received::Binary(data) => Ok(Some(PtyEvent::Output(data))),
                Received::Frame(ServerFrame::Output { data }) => match STANDARD.decode(data) {
                    Ok(data) => Ok(Some(PtyEvent::Output(data.into()))),
                    Err(error) => Err(Error::protocol(self.reader.url(), error.to_string())),
                },
                Received::Frame(ServerFrame::Exit { exit_code }) => {
                    self.ended = true;
                    self.writer.close().await;
                    Ok(Some(PtyEvent::Exited { code: exit_code }))
                }
                Received::Frame(ServerFrame::Error {
                    data,
                    code,
                    fatal: true,
                }) => {
                    self.ended = true;
                    Err(socket::frame_error(data, code))
                }
                Received::Closed => {
                    self.ended = true;
                    Err(Error::transport(
                        self.reader.url(),
                        "the server closed the terminal's stream",
                    ))
                }
                Received::Frame(
                    ServerFrame::Error { fatal: false, .. }
                    | ServerFrame::Start { .. }
                    | ServerFrame::Started { .. }
                    | ServerFrame::Stdout { .. }
                    | ServerFrame::Stderr { .. }
                    | ServerFrame::Ping {},
                ) => continue,
            };
        }
    }
}

/// Writes to a terminal.
#[derive(Debug, Clone)]
pub struct PtyWriter {
    writer: Writer,
}

impl PtyWriter {
    /// Types.
    ///
    /// # Errors
    /// [`Error::Transport`] when the connection is gone.
    pub async fn write(&self, data: &[u8]) -> Result<()> {
        for chunk in data.chunks(INPUT_CHUNK) {
            self.writer.binary(Bytes::copy_from_slice(chunk)).await?;
        }
        Ok(())
    }

    /// Gives it a new size.
    ///
    /// # Errors
    /// [`Error::Transport`] when the connection is gone.
    pub async fn resize(&self, cols: u32, rows: u32) -> Result<()> {
        self.writer.frame(&ClientFrame::Resize { cols, rows }).await
    }

    /// Kills its program and that program's group.
    ///
    /// # Errors
    /// [`Error::Transport`] when the connection is gone.
    pub async fn kill(&self) -> Result<()> {
        self.writer.frame(&ClientFrame::Kill {}).await
    }
}
