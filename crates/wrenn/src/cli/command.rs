//! A command in a sandbox whose output is shown as it comes: what `run` and `exec` share.

use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use wrenn_client::{ExecEvent, ExecOptions, ExecResult, ExecStdin, ExecStream, SandboxHandle};

use super::error::{CliError, TIMED_OUT};
use super::signals::{Interrupt, Signals};

/// Most that is collected of each stream for `--json`.
const MAX_COLLECTED: usize = 16 << 20;
/// Exit code for a command that a signal ended: the API does not say which.
const KILLED: u8 = 255;

/// How a command came to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ending {
    /// By itself, or through a signal in the sandbox (-1).
    Exited(i32),
    /// `--timeout`.
    TimedOut,
    /// A signal to this process.
    Interrupted(Interrupt),
}

impl Ending {
    /// This process's exit code.
    pub(super) fn exit_code(self) -> u8 {
        match self {
            // Exit codes in a guest are what waitpid reports: 0 to 255.
            Self::Exited(code) => u8::try_from(code).unwrap_or(KILLED),
            Self::TimedOut => TIMED_OUT,
            Self::Interrupted(interrupt) => interrupt.exit_code(),
        }
    }
}

/// Where the output goes.
#[derive(Debug)]
pub(super) enum Output {
    /// To this process's own streams, byte for byte.
    Live,
    /// To standard output, as lines of JSON.
    Lines,
    /// Into memory, for `--json`.
    Collect(Collected),
}

/// Output kept for `--json`.
#[derive(Debug, Default)]
pub(super) struct Collected {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    truncated: bool,
}

impl Output {
    pub(super) fn new(json: bool) -> Self {
        if json {
            Self::Collect(Collected::default())
        } else {
            Self::Live
        }
    }

    async fn stdout(&mut self, data: &[u8]) -> Result<(), CliError> {
        match self {
            Self::Live => write(tokio::io::stdout(), data).await,
            Self::Lines => super::output::line(&event("stdout", data)),
            Self::Collect(kept) => {
                kept.truncated |= keep(&mut kept.stdout, data);
                Ok(())
            }
        }
    }

    async fn stderr(&mut self, data: &[u8]) -> Result<(), CliError> {
        match self {
            Self::Live => write(tokio::io::stderr(), data).await,
            Self::Lines => super::output::line(&event("stderr", data)),
            Self::Collect(kept) => {
                kept.truncated |= keep(&mut kept.stderr, data);
                Ok(())
            }
        }
    }

    /// The result for `--json`, in the form of the API's own `exec`; nothing when the output was live.
    pub(super) fn result(
        self,
        sandbox: &str,
        cmd: &str,
        ending: Ending,
        took: Duration,
    ) -> Option<ExecResult> {
        let Self::Collect(Collected {
            stdout,
            stderr,
            truncated,
        }) = self
        else {
            return None;
        };
        let exit_code = match ending {
            Ending::Exited(code) => code,
            other => i32::from(other.exit_code()),
        };
        let (stdout, stderr, encoding) = match (String::from_utf8(stdout), String::from_utf8(stderr)) {
            (Ok(stdout), Ok(stderr)) => (stdout, stderr, "utf-8"),
            (stdout, stderr) => {
                let encode = |text: Result<String, std::string::FromUtf8Error>| {
                    STANDARD.encode(text.map_or_else(|error| error.into_bytes(), String::into_bytes))
                };
                (encode(stdout), encode(stderr), "base64")
            }
        };
        Some(ExecResult {
            sandbox_id: sandbox.to_owned(),
            cmd: cmd.to_owned(),
            stdout,
            stderr,
            exit_code,
            duration_ms: u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
            encoding: encoding.to_owned(),
            truncated,
        })
    }
}

/// A piece of a program's output as a line. One that is no text by itself, be it for a letter that is cut in two, is
/// told as base64, so that the pieces together are every byte.
fn event(kind: &str, data: &[u8]) -> String {
    let event = match std::str::from_utf8(data) {
        Ok(text) => serde_json::json!({ "type": kind, "data": text }),
        Err(_) => serde_json::json!({ "type": kind, "data": STANDARD.encode(data), "encoding": "base64" }),
    };
    event.to_string()
}

async fn write(mut target: impl AsyncWrite + Unpin, data: &[u8]) -> Result<(), CliError> {
    target.write_all(data).await.map_err(CliError::output)?;
    target.flush().await.map_err(CliError::output)
}

/// Whether something had to be left out.
fn keep(kept: &mut Vec<u8>, data: &[u8]) -> bool {
    let room = MAX_COLLECTED - kept.len();
    kept.extend_from_slice(&data[..data.len().min(room)]);
    data.len() > room
}

/// Runs a command to its end, or until a signal or the time limit ends it; then it is killed.
pub(super) async fn follow(
    sandbox: &SandboxHandle,
    options: &ExecOptions,
    limit: Option<Duration>,
    output: &mut Output,
    signals: &mut Signals,
) -> Result<(Ending, Duration), CliError> {
    let start = Instant::now();
    let mut stream = tokio::select! {
        stream = sandbox.exec_stream(options) => stream?,
        interrupt = signals.recv() => return Ok((Ending::Interrupted(interrupt), start.elapsed())),
    };
    let control = stream.control();
    let input = options.stdin.then(|| tokio::spawn(forward_stdin(stream.stdin())));
    let expired = async {
        match limit {
            Some(limit) => tokio::time::sleep(limit).await,
            None => std::future::pending().await,
        }
    };
    let ending = tokio::select! {
        code = pump(&mut stream, output) => code.map(Ending::Exited),
        interrupt = signals.recv() => Ok(Ending::Interrupted(interrupt)),
        () = expired => Ok(Ending::TimedOut),
    };
    if let Some(input) = input {
        input.abort();
    }
    if !matches!(ending, Ok(Ending::Exited(_))) {
        // Nobody follows the command any more. That it cannot be killed is no news beside why.
        let _ = control.kill().await;
    }
    Ok((ending?, start.elapsed()))
}

/// Shows events until the command exits.
pub(super) async fn pump(stream: &mut ExecStream, output: &mut Output) -> Result<i32, CliError> {
    loop {
        match stream.next().await? {
            Some(ExecEvent::Stdout(data)) => output.stdout(&data).await?,
            Some(ExecEvent::Stderr(data)) => output.stderr(&data).await?,
            Some(ExecEvent::Exited { code }) => return Ok(code),
            Some(_) => {}
            None => return Ok(0),
        }
    }
}

async fn forward_stdin(target: ExecStdin) {
    let mut source = super::stdin::read();
    while let Some(data) = source.recv().await {
        // The events tell what broke; here it only means that nobody takes the input.
        if target.write(&data).await.is_err() {
            return;
        }
    }
    let _ = target.close().await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_pass_through_and_signals_have_one_of_their_own() {
        assert_eq!(Ending::Exited(0).exit_code(), 0);
        assert_eq!(Ending::Exited(7).exit_code(), 7);
        assert_eq!(Ending::Exited(-1).exit_code(), 255);
        assert_eq!(Ending::Exited(4711).exit_code(), 255);
        assert_eq!(Ending::TimedOut.exit_code(), 124);
        assert_eq!(Ending::Interrupted(Interrupt::Term).exit_code(), 143);
    }

    #[test]
    fn collected_output_that_is_not_text_is_told_as_base64() {
        let kept = Collected {
            stdout: vec![0xff, 0],
            stderr: b"ok".to_vec(),
            truncated: false,
        };
        let result = Output::Collect(kept)
            .result("sb-1", "cat", Ending::Exited(0), Duration::from_millis(5))
            .unwrap();
        assert_eq!(
            (
                result.encoding.as_str(),
                result.stdout.as_str(),
                result.stderr.as_str()
            ),
            ("base64", "/wA=", "b2s=")
        );
    }
}
