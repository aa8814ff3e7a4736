//! What host agents call.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use wrenn_proto::rest::{
    ErrorBody, Heartbeat, HostTokens, RefreshHostToken, RegisterHost, RegisteredHost, SandboxEvents,
};

use super::error::ApiResult;
use super::extract::{Agent, Body, Segments};
use crate::Error;
use crate::service::Services;

/// Register a host with a one-time token.
#[utoipa::path(post, path = "/v1/hosts/register", tag = "hosts", request_body = RegisterHost, responses(
    (status = 201, body = RegisteredHost),
    (status = 400, body = ErrorBody, description = "`invalid_request`"),
    (status = 401, body = ErrorBody, description = "`unauthorized`: the token is unknown, used or too old")))]
pub(crate) async fn register(
    State(services): State<Services>,
    Body(body): Body<RegisterHost>,
) -> ApiResult<(StatusCode, Json<RegisteredHost>)> {
    Ok((StatusCode::CREATED, Json(services.register_host(body).await?)))
}

/// Exchange a host's refresh token for a new pair.
#[utoipa::path(post, path = "/v1/hosts/auth/refresh", tag = "hosts", request_body = RefreshHostToken, responses(
    (status = 200, body = HostTokens),
    (status = 400, body = ErrorBody, description = "`invalid_request`"),
    (status = 401, body = ErrorBody, description = "`unauthorized`")))]
pub(crate) async fn refresh(
    State(services): State<Services>,
    Body(body): Body<RefreshHostToken>,
) -> ApiResult<Json<HostTokens>> {
    Ok(Json(services.refresh_host(body).await?))
}

/// Tell that a host is alive, and what it has.
#[utoipa::path(post, path = "/v1/hosts/{id}/heartbeat", tag = "hosts",
    params(("id" = String, Path, description = "`host-{uuid}`")), security(("host_token" = [])),
    request_body = Heartbeat, responses(
    (status = 204, description = "Noted"),
    (status = 400, body = ErrorBody, description = "`invalid_request`"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 404, body = ErrorBody, description = "`not_found`: not the token's host")))]
pub(crate) async fn heartbeat(
    State(services): State<Services>,
    Agent(host): Agent,
    Segments(id): Segments<String>,
    Body(body): Body<Heartbeat>,
) -> ApiResult<StatusCode> {
    if id != host.id.to_string() {
        return Err(Error::not_found("host", id).into());
    }
    services.heartbeat(&host, body).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Tell what happened to sandboxes by itself.
#[utoipa::path(post, path = "/v1/hosts/sandbox-events", tag = "hosts", security(("host_token" = [])),
    request_body = SandboxEvents, responses(
    (status = 204, description = "Taken; stale and unknown ones are dropped"),
    (status = 400, body = ErrorBody, description = "`invalid_request`"),
    (status = 401, body = ErrorBody, description = "`unauthorized`")))]
pub(crate) async fn sandbox_events(
    State(services): State<Services>,
    Agent(host): Agent,
    Body(body): Body<SandboxEvents>,
) -> ApiResult<StatusCode> {
    services.host_events(&host, body.events).await?;
    Ok(StatusCode::NO_CONTENT)
}
