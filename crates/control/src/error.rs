//! What can go wrong in the services, as decisions a caller can take.
//!
//! Each variant has a stable code (the API's contract, listed with advice in `docs/errors.md`), a text
//! for the caller, and, where there is one, a private cause in `source()` that only the log sees. The
//! HTTP status belongs to the edge (`api::error`).

use std::error::Error as StdError;

use crate::domain::SandboxStatus;
use crate::domain::lifecycle::Denied;

/// The stable codes of the API's error bodies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorCode {
    /// The request is malformed or a value is out of range.
    InvalidRequest,
    /// No valid credentials.
    Unauthorized,
    /// Valid credentials that do not allow this.
    Forbidden,
    /// Unknown, or not the caller's.
    NotFound,
    /// The path exists, with other methods.
    MethodNotAllowed,
    /// The thing is in a status that forbids this.
    InvalidState,
    /// Something else is in the way.
    Conflict,
    /// A host cannot go while there are sandboxes on it.
    HostHasSandboxes,
    /// The body is larger than allowed.
    PayloadTooLarge,
    /// Tried too often, or too much at once.
    RateLimited,
    /// No host has room.
    NoCapacity,
    /// The sandbox's host cannot be reached.
    HostUnavailable,
    /// The host or the guest answered with a failure.
    AgentError,
    /// A login provider answered with a failure, or not at all.
    ProviderError,
    /// It took longer than allowed.
    Timeout,
    /// The database does not answer.
    DatabaseUnavailable,
    /// A fault of the server.
    InternalError,
}

impl ErrorCode {
    /// All codes; the documentation's test walks them.
    pub const ALL: [Self; 17] = [
        Self::InvalidRequest,
        Self::Unauthorized,
        Self::Forbidden,
        Self::NotFound,
        Self::MethodNotAllowed,
        Self::InvalidState,
        Self::Conflict,
        Self::HostHasSandboxes,
        Self::PayloadTooLarge,
        Self::RateLimited,
        Self::NoCapacity,
        Self::HostUnavailable,
        Self::AgentError,
        Self::ProviderError,
        Self::Timeout,
        Self::DatabaseUnavailable,
        Self::InternalError,
    ];

    /// The word on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::InvalidRequest => "invalid_request",
            Self::Unauthorized => "unauthorized",
            Self::Forbidden => "forbidden",
            Self::NotFound => "not_found",
            Self::MethodNotAllowed => "method_not_allowed",
            Self::InvalidState => "invalid_state",
            Self::Conflict => "conflict",
            Self::HostHasSandboxes => "host_has_sandboxes",
            Self::PayloadTooLarge => "payload_too_large",
            Self::RateLimited => "rate_limited",
            Self::NoCapacity => "no_capacity",
            Self::HostUnavailable => "host_unavailable",
            Self::AgentError => "agent_error",
            Self::ProviderError => "provider_error",
            Self::Timeout => "timeout",
            Self::DatabaseUnavailable => "database_unavailable",
            Self::InternalError => "internal_error",
        }
    }

    /// The code of a word, for failures that were stored.
    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|code| code.as_str() == word)
    }
}

/// A service's failure.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// What the caller can branch on.
    pub code: ErrorCode,
    /// For the caller: resource or field, cause and remedy.
    pub message: String,
    /// For the log.
    #[source]
    pub cause: Option<Box<dyn StdError + Send + Sync>>,
    /// When it is worth trying again.
    pub retry_after: Option<std::time::Duration>,
    /// The sandboxes that are in the way.
    pub sandboxes: Vec<crate::domain::SandboxId>,
}

/// A service's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// A failure without a private cause.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            cause: None,
            retry_after: None,
            sandboxes: Vec::new(),
        }
    }

    /// A value that cannot be accepted.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::InvalidRequest, message)
    }

    /// Unknown, or not the caller's: the two look alike on purpose.
    pub fn not_found(kind: &str, name: impl std::fmt::Display) -> Self {
        let name: String = name.to_string().chars().take(200).collect();
        Self::new(ErrorCode::NotFound, format!("{kind} '{name}' was not found"))
    }

    /// A fault of the server; the cause goes to the log only.
    pub fn internal(cause: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Self {
            code: ErrorCode::InternalError,
            message: "internal error; the server's log has the cause".to_owned(),
            cause: Some(cause.into()),
            retry_after: None,
            sandboxes: Vec::new(),
        }
    }

    /// Tried too often; names what, and when to try again.
    #[must_use]
    pub fn rate_limited(what: &str, retry_after: std::time::Duration) -> Self {
        let retry_after = retry_after.max(std::time::Duration::from_secs(1));
        Self {
            retry_after: Some(retry_after),
            ..Self::new(
                ErrorCode::RateLimited,
                format!("too many {what}; try again in {} s", retry_after.as_secs()),
            )
        }
    }

    /// The sandbox is in a status in which this cannot be done.
    #[must_use]
    pub fn wrong_status(verb: &str, status: SandboxStatus) -> Self {
        let hint = match status {
            SandboxStatus::Paused | SandboxStatus::Hibernated => "; resume it first",
            SandboxStatus::Missing => "; its host cannot be reached at the moment",
            SandboxStatus::Error => "; it can only be destroyed, unless its host brings it back",
            status if status.is_transient() => "; wait until the operation under way has ended",
            _ => "",
        };
        Self::new(
            ErrorCode::InvalidState,
            format!("cannot {verb} a sandbox that is {status}{hint}"),
        )
    }
}

impl From<Denied> for Error {
    fn from(denied: Denied) -> Self {
        Self::wrong_status(denied.request.verb(), denied.status)
    }
}

impl From<sea_orm::DbErr> for Error {
    fn from(cause: sea_orm::DbErr) -> Self {
        if !crate::store::is_unavailable(&cause) {
            return Self::internal(cause);
        }
        metrics::counter!("wrenn_database_unavailable_total").increment(1);
        Self {
            code: ErrorCode::DatabaseUnavailable,
            message: "the database does not answer at the moment; try again in a few seconds".to_owned(),
            cause: Some(cause.into()),
            retry_after: Some(std::time::Duration::from_secs(5)),
            sandboxes: Vec::new(),
        }
    }
}
