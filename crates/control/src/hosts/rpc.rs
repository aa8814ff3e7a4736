//! What a host agent's answers mean to a caller of the API.

use connectrpc::{ConnectError, ErrorCode as Rpc};
use wrenn_proto::hostagent;

use crate::domain::lifecycle::HostState;
use crate::domain::{Failure, SandboxId};
use crate::{Error, ErrorCode};

/// Longest text of a host that is passed on or stored.
const MAX_TEXT: usize = 4096;

/// Whether an operation may or may not have happened: no answer came.
pub(crate) fn is_ambiguous(error: &ConnectError) -> bool {
    matches!(
        error.code,
        Rpc::Unavailable
            | Rpc::DeadlineExceeded
            | Rpc::Canceled
            | Rpc::Unknown
            | Rpc::Aborted
            | Rpc::Unauthenticated
    )
}

/// Text of a host or guest: bounded, and without the one character that PostgreSQL cannot keep.
pub(crate) fn text(text: &str) -> String {
    let mut end = text.len().min(MAX_TEXT);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.get(..end).unwrap_or_default().replace('\0', "")
}

/// A host's refusal as the caller's error. The host's texts are written for callers.
pub(crate) fn error(failure: ConnectError) -> Error {
    let message = text(failure.message.as_deref().unwrap_or_default());
    let said = |code, otherwise: &str| {
        Error::new(
            code,
            if message.is_empty() {
                otherwise.to_owned()
            } else {
                message.clone()
            },
        )
    };
    let mut error = match failure.code {
        Rpc::NotFound => said(ErrorCode::NotFound, "not found in the sandbox"),
        Rpc::FailedPrecondition => said(
            ErrorCode::InvalidState,
            "the sandbox is in the wrong state for this",
        ),
        Rpc::InvalidArgument | Rpc::OutOfRange => {
            said(ErrorCode::InvalidRequest, "the host refused the request")
        }
        Rpc::AlreadyExists => said(ErrorCode::Conflict, "it exists already"),
        Rpc::ResourceExhausted => said(ErrorCode::NoCapacity, "the host has no room"),
        Rpc::PermissionDenied => said(ErrorCode::Forbidden, "the guest denied it"),
        Rpc::DeadlineExceeded => said(ErrorCode::Timeout, "it took longer than allowed"),
        Rpc::Unavailable if crate::outbound::was_refused(&failure) => super::pool::private(),
        // No agent answered, or one that is about to end.
        Rpc::Unavailable => Error::new(
            ErrorCode::HostUnavailable,
            "the sandbox's host cannot be reached; try again shortly",
        ),
        Rpc::Unauthenticated => Error::new(
            ErrorCode::HostUnavailable,
            "the sandbox's host refused the control plane",
        ),
        _ => said(ErrorCode::AgentError, "the host agent failed"),
    };
    error.cause = Some(Box::new(failure));
    error
}

/// The same for what was asked of a guest: what is exhausted there (its disk, its processes) is not the
/// platform's room, which a later attempt may find.
pub(crate) fn guest_error(failure: ConnectError) -> Error {
    let exhausted = failure.code == Rpc::ResourceExhausted;
    let mut error = error(failure);
    if exhausted {
        error.code = ErrorCode::AgentError;
    }
    error
}

/// The same as a record of a failed operation.
pub(crate) fn failure(failed: ConnectError, generation: u64) -> Failure {
    let error = error(failed);
    Failure {
        code: error.code.as_str().to_owned(),
        message: error.message,
        console: None,
        generation,
    }
}

/// A host's sandbox, as far as the control plane cares.
#[derive(Debug, Clone)]
pub(crate) struct Report {
    pub(crate) id: Option<SandboxId>,
    pub(crate) state: HostState,
    pub(crate) generation: u64,
    pub(crate) error: String,
    pub(crate) console: String,
    pub(crate) created_at_ms: i64,
}

impl Report {
    /// Reads a host's sandbox. An id that is none of ours is kept as `None`.
    pub(crate) fn read(sandbox: &hostagent::Sandbox) -> Self {
        use hostagent::SandboxState as State;
        let state = match sandbox.state.as_known() {
            Some(State::SANDBOX_STATE_RUNNING) => HostState::Running,
            Some(State::SANDBOX_STATE_PAUSED) => HostState::Paused,
            Some(State::SANDBOX_STATE_ERROR) => HostState::Error,
            Some(
                State::SANDBOX_STATE_UNSPECIFIED
                | State::SANDBOX_STATE_STARTING
                | State::SANDBOX_STATE_PAUSING
                | State::SANDBOX_STATE_RESUMING
                | State::SANDBOX_STATE_SNAPSHOTTING
                | State::SANDBOX_STATE_STOPPING,
            )
            | None => HostState::Busy,
        };
        Self {
            id: sandbox.sandbox_id.parse().ok(),
            state,
            generation: sandbox.generation,
            error: text(&sandbox.error),
            console: text(&sandbox.console_tail),
            created_at_ms: sandbox.created_at_ms,
        }
    }

    /// Why a dead sandbox died.
    pub(crate) fn failure(&self, generation: u64) -> Option<Failure> {
        (self.state == HostState::Error).then(|| Failure {
            code: ErrorCode::AgentError.as_str().to_owned(),
            message: if self.error.is_empty() {
                "the sandbox's VM died".to_owned()
            } else {
                self.error.clone()
            },
            console: Some(self.console.clone()).filter(|console| !console.is_empty()),
            generation,
        })
    }
}
