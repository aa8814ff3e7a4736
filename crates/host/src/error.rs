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
            HostError::Stale { .. } => ErrorCode::Aborted,
            HostError::NoCapacity(_) => ErrorCode::ResourceExhausted,
            HostError::InvalidArgument { .. } => ErrorCode::InvalidArgument,
            HostError::Guest(_) | HostError::ShuttingDown => ErrorCode::Unavailable,
            HostError::GuestRefused(inner) => {
                return ConnectError::new(inner.code, error.to_string());
            }
            HostError::Vmm(_) | HostError::Program { .. } | HostError::Io { .. } => ErrorCode::Internal,
        };
        if code == ErrorCode::Internal {
            // The chain holds paths and causes that are the operator's business, not the client's.
            tracing::error!(error = &error as &dyn std::error::Error, "request failed");
        }
        ConnectError::new(code, error.to_string())
    }
}
