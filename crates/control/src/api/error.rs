//! Errors on the wire: the one place that chooses an HTTP status.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use wrenn_proto::rest::{ErrorBody, ErrorDetail};

use crate::{Error, ErrorCode};

/// A service's failure on its way to the client.
#[derive(Debug)]
pub struct ApiError(pub Error);

/// What a handler returns.
pub type ApiResult<T> = Result<T, ApiError>;

impl From<Error> for ApiError {
    fn from(error: Error) -> Self {
        Self(error)
    }
}

pub(crate) fn status(code: ErrorCode) -> StatusCode {
    match code {
        ErrorCode::InvalidRequest => StatusCode::BAD_REQUEST,
        ErrorCode::Unauthorized => StatusCode::UNAUTHORIZED,
        ErrorCode::Forbidden => StatusCode::FORBIDDEN,
        ErrorCode::NotFound => StatusCode::NOT_FOUND,
        ErrorCode::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
        ErrorCode::InvalidState | ErrorCode::Conflict | ErrorCode::HostHasSandboxes => StatusCode::CONFLICT,
        ErrorCode::PayloadTooLarge => StatusCode::PAYLOAD_TOO_LARGE,
        ErrorCode::RateLimited => StatusCode::TOO_MANY_REQUESTS,
        ErrorCode::NoCapacity | ErrorCode::HostUnavailable | ErrorCode::DatabaseUnavailable => {
            StatusCode::SERVICE_UNAVAILABLE
        }
        ErrorCode::AgentError | ErrorCode::ProviderError => StatusCode::BAD_GATEWAY,
        ErrorCode::Timeout => StatusCode::GATEWAY_TIMEOUT,
        ErrorCode::InternalError => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let Self(error) = self;
        let status = status(error.code);
        if status == StatusCode::INTERNAL_SERVER_ERROR {
            tracing::error!(error = &error as &dyn std::error::Error, "a request failed");
        } else if error.code == ErrorCode::DatabaseUnavailable {
            tracing::warn!(error = &error as &dyn std::error::Error, "a request failed");
        } else {
            tracing::debug!(
                code = error.code.as_str(),
                error = &error as &dyn std::error::Error,
                "a request was refused"
            );
        }
        let retry_after = error.retry_after;
        let body = ErrorBody {
            error: ErrorDetail {
                code: error.code.as_str().to_owned(),
                message: error.message,
            },
            sandbox_ids: error.sandboxes.iter().map(ToString::to_string).collect(),
        };
        let mut response = (status, Json(body)).into_response();
        if let Some(wait) = retry_after {
            response
                .headers_mut()
                .insert(header::RETRY_AFTER, HeaderValue::from(wait.as_secs()));
        } else if status == StatusCode::SERVICE_UNAVAILABLE {
            response
                .headers_mut()
                .insert(header::RETRY_AFTER, HeaderValue::from_static("5"));
        }
        if status == StatusCode::UNAUTHORIZED {
            response
                .headers_mut()
                .insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}
