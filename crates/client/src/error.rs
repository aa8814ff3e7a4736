//! The SDK's error: one variant for each decision that a caller can take.

use std::time::Duration;

use wrenn_proto::rest::{ErrorBody, SandboxStatus};

/// A result of the SDK.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What the server said when it refused a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// HTTP status; 0 when the refusal came over a WebSocket that was already open.
    pub status: u16,
    /// The server's stable code.
    pub code: String,
    /// The server's message, for people.
    pub message: String,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A field or argument is wrong; the message names it. Asking again will not help.
    #[error("{0}")]
    InvalidRequest(Refusal),
    /// The API key is missing or unknown.
    #[error("{0}")]
    Unauthorized(Refusal),
    /// The API key is known, but may not do this.
    #[error("{0}")]
    Forbidden(Refusal),
    /// No such sandbox, template, process or file (or not one of yours).
    #[error("{0}")]
    NotFound(Refusal),
    /// The sandbox is in a status in which this cannot be done; the message names it.
    #[error("{0}")]
    InvalidState(Refusal),
    /// Something of that name or at that place exists already.
    #[error("{0}")]
    Conflict(Refusal),
    /// No host has room for it now. Free something, or try later.
    #[error("{0}")]
    NoCapacity(Refusal),
    /// Too many requests; try later.
    #[error("{0}")]
    RateLimited(Refusal),
    /// The request's body is larger than the server takes.
    #[error("{0}")]
    TooLarge(Refusal),
    /// The sandbox's host cannot be reached; the sandbox may come back.
    #[error("{0}")]
    HostUnavailable(Refusal),
    /// The host or the agent inside the sandbox failed.
    #[error("{0}")]
    Agent(Refusal),
    /// It took longer than the server, or the given limit, allows.
    #[error("{0}")]
    Timeout(Refusal),
    /// The server failed.
    #[error("{0}")]
    Internal(Refusal),
    /// A code that this version of the SDK does not know.
    #[error("{0}")]
    Other(Refusal),
    /// A sandbox settled in another status than the one that was waited for.
    #[error("sandbox {id} is {status}{}", message.as_deref().map(|text| format!(": {text}")).unwrap_or_default())]
    SandboxFailed {
        /// The sandbox.
        id: String,
        /// The status in which it settled.
        status: SandboxStatus,
        /// What happened, as the server tells it.
        message: Option<String>,
        /// Last lines of the guest's console.
        console: Option<String>,
    },
    /// A template could not be made.
    #[error("template {name} could not be made")]
    TemplateFailed {
        /// Its name.
        name: String,
    },
    /// What was waited for did not happen in time.
    #[error("{what} is still under way after {} s", after.as_secs())]
    WaitTimeout {
        /// What was waited for.
        what: String,
        /// How long.
        after: Duration,
    },
    /// The server could not be reached, or the connection broke.
    #[error("the connection to {url} failed")]
    Transport {
        /// The server.
        url: String,
        /// The cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The server answered something that is not Wrenn's API.
    #[error("{url} did not answer as a Wrenn server: {detail}")]
    Protocol {
        /// The server.
        url: String,
        /// What is wrong with the answer.
        detail: String,
    },
    /// No settings to connect with, or wrong ones.
    #[error("{0}")]
    Config(String),
    /// Reading or writing on this side failed.
    #[error("{what}")]
    Io {
        /// What was being done.
        what: String,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
}

impl Error {
    /// A stable code to branch on or to log: the server's where it refused, else one of the SDK's
    /// (`sandbox_failed`, `template_failed`, `wait_timeout`, `transport`, `protocol`, `config`, `io`).
    #[must_use]
    pub fn code(&self) -> &str {
        match self {
            Self::SandboxFailed { .. } => "sandbox_failed",
            Self::TemplateFailed { .. } => "template_failed",
            Self::WaitTimeout { .. } => "wait_timeout",
            Self::Transport { .. } => "transport",
            Self::Protocol { .. } => "protocol",
            Self::Config(_) => "config",
            Self::Io { .. } => "io",
            refused => refused
                .refusal()
                .map_or("unknown", |refusal| refusal.code.as_str()),
        }
    }

    /// What the server said, where it refused.
    #[must_use]
    pub fn refusal(&self) -> Option<&Refusal> {
        match self {
            Self::InvalidRequest(refusal)
            | Self::Unauthorized(refusal)
            | Self::Forbidden(refusal)
            | Self::NotFound(refusal)
            | Self::InvalidState(refusal)
            | Self::Conflict(refusal)
            | Self::NoCapacity(refusal)
            | Self::RateLimited(refusal)
            | Self::TooLarge(refusal)
            | Self::HostUnavailable(refusal)
            | Self::Agent(refusal)
            | Self::Timeout(refusal)
            | Self::Internal(refusal)
            | Self::Other(refusal) => Some(refusal),
            Self::SandboxFailed { .. }
            | Self::TemplateFailed { .. }
            | Self::WaitTimeout { .. }
            | Self::Transport { .. }
            | Self::Protocol { .. }
            | Self::Config(_)
            | Self::Io { .. } => None,
        }
    }

    /// Whether the thing asked for does not exist.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::NotFound(_))
    }

    pub(crate) fn transport(
        url: impl ToString,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self::Transport {
            url: url.to_string(),
            source: source.into(),
        }
    }

    pub(crate) fn protocol(url: impl ToString, detail: impl Into<String>) -> Self {
        Self::Protocol {
            url: url.to_string(),
            detail: detail.into(),
        }
    }

    /// The variant of the server's code.
    pub(crate) fn refused(refusal: Refusal) -> Self {
        match refusal.code.as_str() {
            "invalid_request" => Self::InvalidRequest(refusal),
            "unauthorized" => Self::Unauthorized(refusal),
            "forbidden" => Self::Forbidden(refusal),
            "not_found" => Self::NotFound(refusal),
            "invalid_state" => Self::InvalidState(refusal),
            "conflict" => Self::Conflict(refusal),
            "no_capacity" => Self::NoCapacity(refusal),
            "rate_limited" => Self::RateLimited(refusal),
            "payload_too_large" => Self::TooLarge(refusal),
            "host_unavailable" => Self::HostUnavailable(refusal),
            "agent_error" => Self::Agent(refusal),
            "timeout" => Self::Timeout(refusal),
            "internal_error" => Self::Internal(refusal),
            _ => Self::Other(refusal),
        }
    }

    /// The error of an answer that is not a success: by its code, else (a proxy in between answers
    /// in its own words) by its HTTP status.
    pub(crate) fn from_answer(url: &str, status: u16, body: &[u8]) -> Self {
        if let Ok(ErrorBody { error, .. }) = serde_json::from_slice(body) {
            return Self::refused(Refusal {
                status,
                code: error.code,
                message: error.message,
            });
        }
        let code = match status {
            400 | 422 => "invalid_request",
            401 => "unauthorized",
            403 => "forbidden",
            404 => "not_found",
            409 => "conflict",
            413 => "payload_too_large",
            429 => "rate_limited",
            502..=504 => "host_unavailable",
            500..=599 => "internal_error",
            _ => return Self::protocol(url, format!("HTTP status {status}")),
        };
        let text = String::from_utf8_lossy(&body[..body.len().min(300)]);
        let text = text.trim();
        let message = if text.is_empty() || text.starts_with('<') {
            format!("the server answered with HTTP status {status}")
        } else {
            format!("the server answered with HTTP status {status}: {text}")
        };
        Self::refused(Refusal {
            status,
            code: code.to_owned(),
            message,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_chooses_the_variant_and_the_status_only_where_there_is_none() {
        let coded = br#"{"error":{"code":"no_capacity","message":"no host has 4096 MiB free"}}"#;
        let error = Error::from_answer("http://x", 503, coded);
        assert!(matches!(error, Error::NoCapacity(_)));
        assert_eq!(error.to_string(), "no host has 4096 MiB free");
        assert_eq!(error.code(), "no_capacity");

        let foreign = Error::from_answer("http://x", 502, b"<html>Bad gateway</html>");
        assert!(matches!(foreign, Error::HostUnavailable(_)));
        assert!(!foreign.to_string().contains("<html>"));

        let unknown = Error::from_answer(
            "http://x",
            418,
            br#"{"error":{"code":"teapot","message":"short"}}"#,
        );
        assert!(matches!(unknown, Error::Other(_)));
        assert_eq!(unknown.code(), "teapot");

        assert!(matches!(
            Error::from_answer("http://x", 302, b""),
            Error::Protocol { .. }
        ));
    }
}
