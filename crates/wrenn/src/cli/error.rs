//! How a command fails: which exit code, and what it says about cause and remedy.

use std::error::Error as StdError;
use std::process::ExitCode;

use super::signals::Interrupt;

/// Something on this machine failed.
const LOCAL: u8 = 1;
/// The command line is wrong.
const USAGE: u8 = 2;
/// `--timeout` ended the command.
pub(super) const TIMED_OUT: u8 = 124;
/// The platform refused, failed, or cannot be reached.
const PLATFORM: u8 = 125;
/// Whoever read the output has gone away (128 + SIGPIPE, as shells report it).
const OUTPUT_CLOSED: u8 = 141;

/// Why a command did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub(super) enum CliError {
    /// The arguments make no sense together.
    #[error("{0}")]
    Usage(String),
    /// The platform, or the way to it.
    #[error(transparent)]
    Platform(#[from] wrenn_client::Error),
    /// This machine.
    #[error("{what}")]
    Local {
        what: String,
        #[source]
        source: std::io::Error,
    },
    /// The reader of standard output has gone away, as `head` does: nothing to complain about.
    #[error("the output was closed")]
    OutputClosed,
    /// The user or the system asked to stop.
    #[error("interrupted by {0}")]
    Interrupted(Interrupt),
}

impl CliError {
    pub(super) fn local(what: impl Into<String>, source: std::io::Error) -> Self {
        Self::Local {
            what: what.into(),
            source,
        }
    }

    /// The failure of a write to standard output.
    pub(super) fn output(source: std::io::Error) -> Self {
        if source.kind() == std::io::ErrorKind::BrokenPipe {
            Self::OutputClosed
        } else {
            Self::local("cannot write to standard output", source)
        }
    }

    fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) => USAGE,
            // Reading a source or writing a target failed on this side of the connection.
            Self::Platform(wrenn_client::Error::Io { .. }) | Self::Local { .. } => LOCAL,
            Self::Platform(_) => PLATFORM,
            Self::OutputClosed => OUTPUT_CLOSED,
            Self::Interrupted(interrupt) => interrupt.exit_code(),
        }
    }

    fn code(&self) -> &str {
        match self {
            Self::Usage(_) => "usage",
            Self::Platform(error) => error.code(),
            Self::Local { .. } => "local",
            Self::OutputClosed => "output_closed",
            Self::Interrupted(_) => "interrupted",
        }
    }

    /// What the user can do about it, where the message does not say so already.
    fn remedy(&self) -> Option<&'static str> {
        use wrenn_client::Error;
        match self {
            Self::Platform(Error::Transport { .. }) => Some(
                "is the platform running there? `make up` (or `wrenn up`) starts one on this machine; \
                 --url or WRENN_BASE_URL names another",
            ),
            Self::Platform(Error::Protocol { .. }) => Some(
                "check that --url or WRENN_BASE_URL names a Wrenn server, and that its version fits this one",
            ),
            Self::Platform(Error::Unauthorized(_)) => Some(
                "check WRENN_API_KEY or --api-key; the key of the platform on this machine is in `local.env` \
                 in its data directory",
            ),
            Self::Platform(Error::NoCapacity(_)) => Some(
                "pause or remove what is not needed (`wrenn sandbox ls`), or ask for less with --memory and --vcpus",
            ),
            Self::Platform(Error::HostUnavailable(_)) => {
                Some("try again in a moment; the sandbox may come back")
            }
            _ => None,
        }
    }

    /// Tells the user, and gives the exit code.
    pub(super) fn report(&self, json: bool) -> ExitCode {
        let code = ExitCode::from(self.exit_code());
        if matches!(self, Self::OutputClosed) {
            return code;
        }
        let causes = self.causes();
        if json {
            let mut body = super::told::error_line(self.code(), &self.to_string());
            if !causes.is_empty() {
                body["error"]["cause"] = causes.join(": ").into();
            }
            if let Some(remedy) = self.remedy() {
                body["error"]["help"] = remedy.into();
            }
            if let Self::Platform(wrenn_client::Error::SandboxFailed {
                console: Some(console),
                ..
            }) = self
            {
                body["error"]["console"] = console.as_str().into();
            }
            eprintln!("{body}");
            return code;
        }
        eprintln!("error: {self}");
        // What lies between is how this program got there.
        if let Some(cause) = causes.last() {
            eprintln!("  cause: {cause}");
        }
        if let Some(remedy) = self.remedy() {
            eprintln!("  help: {remedy}");
        }
        if let Self::Platform(wrenn_client::Error::SandboxFailed {
            console: Some(console),
            ..
        }) = self
        {
            eprintln!("  last lines of its console:");
            for line in console.lines() {
                eprintln!("    {}", super::output::printable(line));
            }
        }
        code
    }

    /// The chain below the message, without what it says already.
    fn causes(&self) -> Vec<String> {
        let first: Option<&dyn StdError> = match self {
            // Shows as its inner error, whose source is the next link.
            Self::Platform(error) => error.source(),
            other => other.source(),
        };
        let mut causes: Vec<String> = Vec::new();
        let mut next = first;
        while let Some(error) = next {
            let text = error.to_string();
            if causes.last().is_none_or(|last| !last.contains(&text)) {
                causes.push(text);
            }
            next = error.source();
        }
        causes
    }
}
