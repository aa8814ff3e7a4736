//! Hosts as people manage them.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::Deserialize;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use wrenn_proto::rest::{
    AddHostTag, CreateHost, ErrorBody, Host, HostDeletePreview, HostRegistrationToken, HostStatus, HostType,
};

use super::error::ApiResult;
use super::extract::{Body, Params, Segments, Signed};
use super::teams::PageParams;
use crate::domain::{self, HostOwner, timestamp};
use crate::service::Services;
use crate::service::host_management::NewHostToken;

pub(super) fn routes() -> OpenApiRouter<Services> {
    OpenApiRouter::new()
        .routes(routes!(create, list))
        .routes(routes!(get, delete))
        .routes(routes!(delete_preview))
        .routes(routes!(new_token))
        .routes(routes!(list_tags, add_tag))
        .routes(routes!(remove_tag))
}

/// How to delete a host.
#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
struct DeleteParams {
    /// Also with sandboxes on it, which are destroyed, and with snapshots that are nowhere else, which are lost.
    #[serde(default)]
    force: bool,
}

fn wire(host: domain::Host) -> Host {
    let domain::Host {
        id,
        owner,
        provider,
        availability_zone,
        status,
        deletion: _,
        arch,
        version,
        address,
        rpc_token: _,
        cpu_cores,
        memory_mb,
        disk_gb,
        memory_available_mb,
        disk_available_mb,
        last_heartbeat_at,
        created_at,
    } = host;
    Host {
        id: id.to_string(),
        kind: match owner {
            HostOwner::Platform => HostType::Regular,
            HostOwner::Team(_) => HostType::Byoc,
        },
        team_id: owner.team().map(|team| team.to_string()),
        provider,
        availability_zone,
        status: match status {
            domain::HostStatus::Pending => HostStatus::Pending,
            domain::HostStatus::Online => HostStatus::Online,
            domain::HostStatus::Offline => HostStatus::Offline,
            domain::HostStatus::Draining => HostStatus::Draining,
            domain::HostStatus::Unreachable => HostStatus::Unreachable,
        },
        arch,
        address,
        version,
        cpu_cores,
        memory_mb,
        memory_available_mb,
        disk_gb,
        disk_available_mb,
        last_heartbeat_at: last_heartbeat_at.map(timestamp),
        created_at: timestamp(created_at),
    }
}

fn wire_token(NewHostToken { host, token }: NewHostToken) -> Json<HostRegistrationToken> {
    Json(HostRegistrationToken {
        host: wire(host),
        registration_token: token,
    })
}

/// Create a host that waits for its agent.
///
/// A `regular` host takes the sandboxes of all teams, and platform admins add it. A `byoc` host takes its team's alone;
/// admins and owners of the team add it, if a platform admin lets the team bring hosts.
#[utoipa::path(post, path = "/v1/hosts", tag = "hosts", operation_id = "create_host", security(("session" = [])),
    request_body = CreateHost, responses(
    (status = 201, body = HostRegistrationToken),
    (status = 400, body = ErrorBody, description = "`invalid_request`"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 403, body = ErrorBody, description = "`forbidden`: not a platform admin or the team's admin, or the team may not bring hosts"),
    (status = 404, body = ErrorBody, description = "`not_found`: no such team")))]
async fn create(
    State(services): State<Services>,
    Signed(session): Signed,
    Body(body): Body<CreateHost>,
) -> ApiResult<(StatusCode, Json<HostRegistrationToken>)> {
    let created = services.create_host(&session, body).await?;
    Ok((StatusCode::CREATED, wire_token(created)))
}

/// List hosts, newest first: for platform admins all, for others those of the session's team.
#[utoipa::path(get, path = "/v1/hosts", tag = "hosts", operation_id = "list_hosts", params(PageParams),
    security(("session" = [])), responses(
    (status = 200, body = [Host]),
    (status = 400, body = ErrorBody, description = "`invalid_request`"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 403, body = ErrorBody, description = "`forbidden`: in no active team")))]
async fn list(
    State(services): State<Services>,
    Signed(session): Signed,
    Params(PageParams { limit, before }): Params<PageParams>,
) -> ApiResult<Json<Vec<Host>>> {
    let hosts = services.list_hosts(&session, limit, before.as_deref()).await?;
    Ok(Json(hosts.into_iter().map(wire).collect()))
}

/// Get a host.
#[utoipa::path(get, path = "/v1/hosts/{id}", tag = "hosts", operation_id = "get_host",
    params(("id" = String, Path, description = "`host-{uuid}`")), security(("session" = [])), responses(
    (status = 200, body = Host),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 404, body = ErrorBody, description = "`not_found`")))]
async fn get(
    State(services): State<Services>,
    Signed(session): Signed,
    Segments(id): Segments<String>,
) -> ApiResult<Json<Host>> {
    Ok(Json(wire(services.seen_host(&session, &id).await?)))
}

/// Delete a host.
///
/// Its agent's tokens end at once. With `force`, its sandboxes are destroyed in the background, also when the host does
/// not answer any more.
#[utoipa::path(delete, path = "/v1/hosts/{id}", tag = "hosts", operation_id = "delete_host",
    params(("id" = String, Path, description = "`host-{uuid}`"), DeleteParams), security(("session" = [])), responses(
    (status = 204, description = "Deleted"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 403, body = ErrorBody, description = "`forbidden`: not an admin of its team"),
    (status = 404, body = ErrorBody, description = "`not_found`"),
    (status = 409, body = ErrorBody, description = "`host_has_sandboxes`, with `sandbox_ids`; `conflict`: snapshots are on it alone")))]
async fn delete(
    State(services): State<Services>,
    Signed(session): Signed,
    Segments(id): Segments<String>,
    Params(DeleteParams { force }): Params<DeleteParams>,
) -> ApiResult<StatusCode> {
    services.delete_host(&session, &id, force).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Tell which sandboxes would go with a host.
#[utoipa::path(get, path = "/v1/hosts/{id}/delete-preview", tag = "hosts", operation_id = "preview_host_deletion",
    params(("id" = String, Path, description = "`host-{uuid}`")), security(("session" = [])), responses(
    (status = 200, body = HostDeletePreview),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 404, body = ErrorBody, description = "`not_found`")))]
async fn delete_preview(
    State(services): State<Services>,
    Signed(session): Signed,
    Segments(id): Segments<String>,
) -> ApiResult<Json<HostDeletePreview>> {
    let (host, sandboxes) = services.host_delete_preview(&session, &id).await?;
    Ok(Json(HostDeletePreview {
        host: wire(host),
        sandbox_ids: sandboxes.iter().map(ToString::to_string).collect(),
    }))
}

/// Issue a new registration token for a host; those before it stop working.
///
/// When an agent registers with it, the tokens that the host's agent had until then end.
#[utoipa::path(post, path = "/v1/hosts/{id}/token", tag = "hosts", operation_id = "issue_host_token",
    params(("id" = String, Path, description = "`host-{uuid}`")), security(("session" = [])), responses(
    (status = 201, body = HostRegistrationToken),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 403, body = ErrorBody, description = "`forbidden`: not an admin of its team"),
    (status = 404, body = ErrorBody, description = "`not_found`")))]
async fn new_token(
    State(services): State<Services>,
    Signed(session): Signed,
    Segments(id): Segments<String>,
) -> ApiResult<(StatusCode, Json<HostRegistrationToken>)> {
    let issued = services.new_host_token(&session, &id).await?;
    Ok((StatusCode::CREATED, wire_token(issued)))
}

/// List a host's tags.
#[utoipa::path(get, path = "/v1/hosts/{id}/tags", tag = "hosts", operation_id = "list_host_tags",
    params(("id" = String, Path, description = "`host-{uuid}`")), security(("session" = [])), responses(
    (status = 200, body = [String]),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 404, body = ErrorBody, description = "`not_found`")))]
async fn list_tags(
    State(services): State<Services>,
    Signed(session): Signed,
    Segments(id): Segments<String>,
) -> ApiResult<Json<Vec<String>>> {
    Ok(Json(services.host_tags(&session, &id).await?))
}

/// Add a tag to a host; one that it has already is no fault.
#[utoipa::path(post, path = "/v1/hosts/{id}/tags", tag = "hosts", operation_id = "add_host_tag",
    params(("id" = String, Path, description = "`host-{uuid}`")), security(("session" = [])),
    request_body = AddHostTag, responses(
    (status = 204, description = "The host has it"),
    (status = 400, body = ErrorBody, description = "`invalid_request`"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 403, body = ErrorBody, description = "`forbidden`: not an admin of its team"),
    (status = 404, body = ErrorBody, description = "`not_found`"),
    (status = 409, body = ErrorBody, description = "`conflict`: it has as many as it may")))]
async fn add_tag(
    State(services): State<Services>,
    Signed(session): Signed,
    Segments(id): Segments<String>,
    Body(body): Body<AddHostTag>,
) -> ApiResult<StatusCode> {
    services.add_host_tag(&session, &id, &body.tag).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Take a tag from a host.
#[utoipa::path(delete, path = "/v1/hosts/{id}/tags/{tag}", tag = "hosts", operation_id = "remove_host_tag",
    params(("id" = String, Path, description = "`host-{uuid}`"), ("tag" = String, Path, description = "The tag")),
    security(("session" = [])), responses(
    (status = 204, description = "Taken away"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 403, body = ErrorBody, description = "`forbidden`: not an admin of its team"),
    (status = 404, body = ErrorBody, description = "`not_found`: no such host, or it has no such tag")))]
async fn remove_tag(
    State(services): State<Services>,
    Signed(session): Signed,
    Segments((id, tag)): Segments<(String, String)>,
) -> ApiResult<StatusCode> {
    services.remove_host_tag(&session, &id, &tag).await?;
    Ok(StatusCode::NO_CONTENT)
}
