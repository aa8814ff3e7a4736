//! Snapshots and templates.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::Deserialize;
use wrenn_proto::rest::{CreateSnapshot, ErrorBody, Template, TemplateKind, TemplateStatus};

use super::convert;
use super::error::ApiResult;
use super::extract::{Body, Caller, Params, Segments, Wait};
use crate::service::Services;

/// What to do about a template of the same name.
#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct SnapshotParams {
    /// Replace a template of the same name when the new one is ready.
    #[serde(default)]
    overwrite: bool,
}

/// Make a template from a running or paused sandbox; the sandbox goes on as it was.
///
/// Answers when the template is ready, or after 60 s (or `wait`) with the template still building.
#[utoipa::path(post, operation_id = "create_snapshot", path = "/v1/snapshots", tag = "templates", params(SnapshotParams, Wait,
    ("Idempotency-Key" = Option<String>, Header, description = "Repeated under one key within a day, it happens once")), security(("api_key" = []), ("session" = [])),
    request_body = CreateSnapshot, responses(
    (status = 201, body = Template, description = "Ready"),
    (status = 202, body = Template, description = "Still building"),
    (status = 400, body = ErrorBody, description = "`invalid_request`"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 404, body = ErrorBody, description = "`not_found`: no such sandbox"),
    (status = 409, body = ErrorBody, description = "`conflict`: the name is taken; `invalid_state`: neither running nor paused"),
    (status = 502, body = ErrorBody, description = "`agent_error`"),
    (status = 503, body = ErrorBody, description = "`no_capacity`")))]
pub(crate) async fn create(
    State(services): State<Services>,
    Caller(caller): Caller,
    Params(SnapshotParams { overwrite }): Params<SnapshotParams>,
    Params(wait): Params<Wait>,
    Body(body): Body<CreateSnapshot>,
) -> ApiResult<(StatusCode, Json<Template>)> {
    let wait = wait.duration()?.unwrap_or(services.config.timings.snapshot_wait);
    let template = services.create_snapshot(caller, body, overwrite, wait).await?;
    let code = match template.status {
        TemplateStatus::Ready | TemplateStatus::Failed => StatusCode::CREATED,
        TemplateStatus::Building => StatusCode::ACCEPTED,
    };
    Ok((code, Json(convert::template(template))))
}

/// Which templates to list.
#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct ListParams {
    /// Only this kind.
    #[serde(rename = "type")]
    #[param(inline)]
    kind: Option<TemplateKind>,
}

/// List the team's templates and the platform's, newest first.
#[utoipa::path(get, operation_id = "list_snapshots", path = "/v1/snapshots", tag = "templates", params(ListParams), security(("api_key" = []), ("session" = [])), responses(
    (status = 200, body = [Template]),
    (status = 400, body = ErrorBody, description = "`invalid_request`"),
    (status = 401, body = ErrorBody, description = "`unauthorized`")))]
pub(crate) async fn list(
    State(services): State<Services>,
    Caller(caller): Caller,
    Params(ListParams { kind }): Params<ListParams>,
) -> ApiResult<Json<Vec<Template>>> {
    let templates = services.list_templates(caller, kind).await?;
    Ok(Json(templates.into_iter().map(convert::template).collect()))
}

/// List templates (another name of the same list).
#[utoipa::path(get, path = "/v1/templates", tag = "templates", params(ListParams), security(("api_key" = []), ("session" = [])), responses(
    (status = 200, body = [Template]),
    (status = 400, body = ErrorBody, description = "`invalid_request`"),
    (status = 401, body = ErrorBody, description = "`unauthorized`")))]
pub(crate) async fn templates(
    services: State<Services>,
    caller: Caller,
    params: Params<ListParams>,
) -> ApiResult<Json<Vec<Template>>> {
    list(services, caller, params).await
}

/// Delete one of the team's templates, by name or id.
#[utoipa::path(delete, operation_id = "delete_snapshot", path = "/v1/snapshots/{name}", tag = "templates",
    params(("name" = String, Path, description = "Name or `tpl-{uuid}`")), security(("api_key" = []), ("session" = [])), responses(
    (status = 204, description = "Deleted"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 403, body = ErrorBody, description = "`forbidden`: the platform's"),
    (status = 404, body = ErrorBody, description = "`not_found`"),
    (status = 409, body = ErrorBody, description = "`conflict`: sandboxes still use it; `invalid_state`: still building")))]
pub(crate) async fn delete(
    State(services): State<Services>,
    Caller(caller): Caller,
    Segments(name): Segments<String>,
) -> ApiResult<StatusCode> {
    services.delete_snapshot(caller, &name).await?;
    Ok(StatusCode::NO_CONTENT)
}
