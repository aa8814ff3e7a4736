//! The HTTP edge: plain endpoints, Connect RPC, and the access token in front of both.
//!
//! | path | token once set |
//! |---|---|
//! | `GET /health` | no |
//! | `POST /init` | checks by itself ([`init`]) |
//! | `GET`/`POST /files` | token or signature ([`signature`]) |
//! | everything else, RPC included | yes |

pub(crate) mod download;
pub(crate) mod init;
pub(crate) mod metrics;
pub(crate) mod signature;
pub(crate) mod upload;

use std::sync::Arc;

use axum::Json;
use axum::Router;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use connectrpc::{ConnectError, ConnectRpcService, Limits};
use http::{HeaderMap, Method, StatusCode};
use tower_http::cors::{self, CorsLayer};
use tower_http::decompression::RequestDecompressionLayer;
use wrenn_proto::guest::{ACCESS_TOKEN_HEADER, HttpError, RUN_PATH};

use crate::files::service::FilesystemService;
use crate::process::run;
use crate::process::service::ProcessService;
use crate::state::Agent;

/// Bound of one RPC message: standard input arrives in these, files do not.
const MAX_MESSAGE: usize = 64 * 1024 * 1024;
/// Bound of `/init`, which carries environment variables and certificates.
const MAX_INIT: usize = 16 * 1024 * 1024;

/// An error of the plain endpoints: a status and a text for the caller, as `{"code", "message"}`.
#[derive(Debug)]
pub(crate) struct Failure {
    status: StatusCode,
    message: String,
}

impl Failure {
    pub(crate) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self {
            status,
            message: message.into(),
        }
    }

    pub(crate) fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    pub(crate) fn unauthorized(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, message)
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let body = HttpError {
            code: self.status.as_u16(),
            message: self.message,
        };
        (self.status, Json(body)).into_response()
    }
}

/// All routes of the agent.
pub(crate) fn router(agent: Arc<Agent>) -> Router {
    let rpc = connectrpc::Router::new()
        .add_service(Arc::new(ProcessService::new(agent.clone())))
        .add_service(Arc::new(FilesystemService::new(agent.clone())));
    let limits = Limits::default()
        .with_max_message_size(MAX_MESSAGE)
        .with_max_request_body_size(MAX_MESSAGE);
    let rpc = ConnectRpcService::new(rpc).with_limits(limits);
    let files = Router::new()
        .route("/files", get(download::download).post(upload::upload))
        .layer(RequestDecompressionLayer::new())
        .layer(DefaultBodyLimit::disable());
    Router::new()
        .route("/health", get(async || StatusCode::NO_CONTENT))
        .route("/metrics", get(metrics::metrics))
        .route("/envs", get(envs))
        .route("/freeze", post(init::freeze))
        .route(RUN_PATH, get(run::upgrade))
        .route("/init", post(init::init).layer(DefaultBodyLimit::max(MAX_INIT)))
        .merge(files)
        .fallback_service(rpc)
        .layer(middleware::from_fn_with_state(agent.clone(), require_token))
        .layer(cross_origin())
        .with_state(agent)
}

/// Browsers may talk to a sandbox from any page: the token or the signature is what protects it.
fn cross_origin() -> CorsLayer {
    CorsLayer::new()
        .allow_origin(cors::Any)
        .allow_methods(cors::Any)
        .allow_headers(cors::Any)
        .expose_headers(cors::Any)
        .max_age(std::time::Duration::from_secs(7200))
}

async fn envs(State(agent): State<Arc<Agent>>) -> impl IntoResponse {
    Json(agent.settings().env_vars.clone())
}

/// Whether the request carries the token in its header.
pub(crate) fn carries_token(headers: &HeaderMap, token: &str) -> bool {
    headers
        .get(ACCESS_TOKEN_HEADER)
        .is_some_and(|sent| constant_time_equal(sent.as_bytes(), token.as_bytes()))
}

/// Compares without telling by its duration where the first difference is. The length is no secret.
pub(crate) fn constant_time_equal(a: &[u8], b: &[u8]) -> bool {
    let difference = a.iter().zip(b).fold(0u8, |sum, (a, b)| sum | (a ^ b));
    a.len() == b.len() && std::hint::black_box(difference) == 0
}

async fn require_token(State(agent): State<Arc<Agent>>, request: Request, next: Next) -> Response {
    let exempt = matches!(
        (request.method(), request.uri().path()),
        (&Method::GET | &Method::HEAD, "/health") | (_, "/init" | "/files")
    );
    if !exempt
        && let Some(token) = &agent.settings().access_token
        && !carries_token(request.headers(), token)
    {
        let message = "unauthorized access, a valid access token is required";
        let path = request.uri().path();
        return if path.starts_with("/process.") || path.starts_with("/filesystem.") {
            ConnectError::unauthenticated(message).into_response()
        } else {
            Failure::unauthorized(message).into_response()
        };
    }
    next.run(request).await
}

#[cfg(test)]
mod tests {
    use super::constant_time_equal;

    #[test]
    fn equality() {
        assert!(constant_time_equal(b"abc", b"abc"));
        assert!(!constant_time_equal(b"abc", b"abd"));
        assert!(!constant_time_equal(b"abc", b"ab"));
        assert!(!constant_time_equal(b"", b"a"));
        assert!(constant_time_equal(b"", b""));
    }
}
