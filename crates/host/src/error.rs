//! What can go wrong on a host, by the decision a reader can take.

use std::path::PathBuf;

use connectrpc::{ConnectError, ErrorCode};

/// An error of the host agent. `Display` is text for the public; causes are in `source()`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HostError {
    /// The thing named does not exist here.
    #[error("{what} '{id}' not found")]
    NotFound {
        /// Kind of thing.
        what: &'static str,
        /// Its id as asked for.
        id: String,
    },
    /// The sandbox is not in a state that allows the operation.
    #[error("sandbox is {state}, not {wanted}")]
    WrongState {
        /// The state it is in.
        state: &'static str,
        /// What would have been needed.
        wanted: &'static str,
    },
    /// A sandbox of this id is there, and no longer where its create had left it.
    #[error("sandbox '{id}' exists")]
    Exists {
        /// Its id.
        id: String,
    },
    /// The request was decided before one that has been acted on already.
    #[error("request of generation {got} is older than generation {seen}")]
    Stale {
        /// Generation of the request.
        got: u64,
        /// Newest generation seen.
        seen: u64,
    },
    /// There is not enough of something; nothing was started.
    #[error("no capacity: {0}")]
    NoCapacity(String),
    /// A value in the request is not usable.
    #[error("{field}: {message}")]
    InvalidArgument {
        /// The request's field.
        field: &'static str,
        /// Why not, and what would be.
        message: String,
    },
    /// The template exists but cannot be started from yet, or no more.
    #[error("template is not ready: {0}")]
    TemplateNotReady(String),
    /// The guest agent did not answer as it should.
    #[error("guest agent: {0}")]
    Guest(String),
    /// The guest agent answered with an error of its own.
    #[error("{}", .0.message.as_deref().unwrap_or("the guest agent refused"))]
    GuestRefused(#[source] Box<ConnectError>),
    /// The VM could not be started, or died.
    #[error("virtual machine: {0}")]
    Vmm(String),
    /// A program that the agent runs failed.
    #[error("{program} failed: {detail}")]
    Program {
        /// The program's name.
        program: &'static str,
        /// Its last words, and a remedy.
        detail: String,
    },
    /// The host's file system said no.
    #[error("{what}: {}", path.display())]
    Io {
        /// What was being done.
        what: &'static str,
        /// To which file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The agent is going down.
    #[error("the host agent is shutting down")]
    ShuttingDown,
}

/// Result of the host agent's operations.
pub type Result<T, E = HostError> = std::result::Result<T, E>;

/// Adds to an I/O error what was being done to which file.
pub(crate) trait IoContext<T> {
    fn at(self, what: &'static str, path: impl Into<PathBuf>) -> Result<T>;
}

impl<T> IoContext<T> for std::io::Result<T> {
    fn at(self, what: &'static str, path: impl Into<PathBuf>) -> Result<T> {
        self.map_err(|source| {
            if matches!(
                source.kind(),
                std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded
            ) {
                HostError::NoCapacity(format!("the host's disk is full ({what})"))
            } else {
                HostError::Io {
                    what,
                    path: path.into(),
                    source,
                }
            }
        })
    }
}

impl From<HostError> for ConnectError {
    fn from(error: HostError) -> Self {
        let code = match &error {
            HostError::NotFound { .. } => ErrorCode::NotFound,
            HostError::WrongState { .. } | HostError::TemplateNotReady(_) => ErrorCode::FailedPrecondition,
            HostError::Exists { .. } => ErrorCode::AlreadyExists,
            HostError::Stale { .. } => ErrorCode::Aborted,
            HostError::NoCapacity(_) => ErrorCode::ResourceExhausted,
            HostError::InvalidArgument { .. } => ErrorCode::InvalidArgument,
            HostError::ShuttingDown => ErrorCode::Unavailable,
            HostError::GuestRefused(inner) => {
                return ConnectError::new(inner.code, error.to_string());
            }
            // What a guest does to its own agent is not the operator's business; and it is an answer, unlike the
            // silence of a host.
            HostError::Guest(_) => return ConnectError::internal(error.to_string()),
            HostError::Vmm(_) | HostError::Program { .. } | HostError::Io { .. } => ErrorCode::Internal,
        };
        if code == ErrorCode::Internal {
            // The chain holds paths and causes that are the operator's business, not the client's.
            tracing::error!(error = &error as &dyn std::error::Error, "request failed");
            return ConnectError::internal(public(&error.to_string()));
        }
        ConnectError::new(code, error.to_string())
    }
}

/// A text without the host's absolute paths, for readers who do not run the host. Programs and QEMU quote them.
pub(crate) fn public(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('/') {
        let (before, from) = rest.split_at(at);
        shown.push_str(before);
        let end = from
            .find(|c: char| c.is_whitespace() || matches!(c, ':' | ',' | ';' | '\'' | '"' | ')' | '('))
            .unwrap_or(from.len());
        let (path, after) = from.split_at(end);
        // "and/or" is a word, and so is a lone slash.
        let starts_a_word = !before.ends_with(|c: char| c.is_alphanumeric());
        shown.push_str(if starts_a_word && path.len() > 1 {
            "(path)"
        } else {
            path
        });
        rest = after;
    }
    shown.push_str(rest);
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_the_host_are_not_shown() {
        for (text, shown) in [
            ("read: /srv/wrenn/images/x/manifest.json", "read: (path)"),
            (
                "QEMU said: can't open backing store /a/b,c: No such file",
                "QEMU said: can't open backing store (path),c: No such file",
            ),
            ("'/etc/x' and/or 5 / 2", "'(path)' and/or 5 / 2"),
            ("nothing here", "nothing here"),
            ("/", "/"),
        ] {
            assert_eq!(public(text), shown);
        }
    }
}
