//! The middleware: a team that is suspended starts nothing. What it has goes on, and can be paused and destroyed.

use wrenn_control::axum::extract::{FromRequestParts as _, MatchedPath, Request, State};
use wrenn_control::axum::http::Method;
use wrenn_control::axum::middleware::Next;
use wrenn_control::axum::response::{IntoResponse as _, Response};
use wrenn_control::extension::{ApiError, Caller};
use wrenn_control::services::Services;
use wrenn_control::{Error, ErrorCode};

use crate::table;

/// The routes that start something, `/v1/capsules` being another name of `/v1/sandboxes`.
const STARTING: [&str; 4] = [
    "/v1/sandboxes",
    "/v1/capsules",
    "/v1/sandboxes/{id}/resume",
    "/v1/capsules/{id}/resume",
];

/// Refuses to start sandboxes for suspended teams; lets everything else pass.
pub async fn refuse_suspended(
    State(services): State<Services>,
    matched: Option<MatchedPath>,
    request: Request,
    next: Next,
) -> Response {
    let starts = request.method() == Method::POST
        && matched.is_some_and(|path| STARTING.contains(&path.as_str().trim_end_matches('/')));
    if !starts {
        return next.run(request).await;
    }
    let (mut parts, body) = request.into_parts();
    // Callers who are not known are the route's to refuse.
    if let Ok(Caller(principal)) = Caller::from_request_parts(&mut parts, &services).await {
        match table::agreement(services.database(), principal.team).await {
            Ok(agreement) if agreement.suspended => {
                return ApiError(Error::new(
                    ErrorCode::Forbidden,
                    "the team is suspended and cannot start sandboxes; its owner can settle the open invoice",
                ))
                .into_response();
            }
            Ok(_) => {}
            Err(error) => return ApiError(error).into_response(),
        }
    }
    next.run(Request::from_parts(parts, body)).await
}
