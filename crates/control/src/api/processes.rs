//! Exec, and the processes that run.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use wrenn_proto::rest::{ErrorBody, Exec, ExecResult, ExecStarted, Process, ProcessList};

use super::convert;
use super::error::ApiResult;
use super::extract::{Body, Caller, Segments};
use crate::service::Services;
use crate::service::processes::Selector;

/// Run a program.
///
/// In the foreground, answers with its collected output when it has ended; with `background`, answers
/// with its pid at once.
#[utoipa::path(post, path = "/{id}/exec", tag = "processes",
    params(("id" = String, Path, description = "`sb-{uuid}`")), security(("api_key" = []), ("session" = [])),
    request_body = Exec, responses(
    (status = 200, body = ExecResult, description = "It ended"),
    (status = 202, body = ExecStarted, description = "It runs in the background"),
    (status = 400, body = ErrorBody, description = "`invalid_request`"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 404, body = ErrorBody, description = "`not_found`"),
    (status = 409, body = ErrorBody, description = "`invalid_state`: not running"),
    (status = 413, body = ErrorBody, description = "`payload_too_large`"),
    (status = 502, body = ErrorBody, description = "`agent_error`"),
    (status = 503, body = ErrorBody, description = "`host_unavailable`"),
    (status = 504, body = ErrorBody, description = "`timeout`: it was killed")))]
pub(crate) async fn exec(
    State(services): State<Services>,
    Caller(caller): Caller,
    Segments(id): Segments<String>,
    Body(body): Body<Exec>,
) -> ApiResult<Response> {
    let cmd = body.cmd.clone();
    let (sandbox, outcome) = services.exec(caller, &id, body).await?;
    Ok(match convert::exec(sandbox, cmd, outcome) {
        Ok(result) => Json(result).into_response(),
        Err(started) => (StatusCode::ACCEPTED, Json(started)).into_response(),
    })
}

/// List the processes that were started through the API and still run.
#[utoipa::path(get, operation_id = "list_processes", path = "/{id}/processes", tag = "processes",
    params(("id" = String, Path, description = "`sb-{uuid}`")), security(("api_key" = []), ("session" = [])), responses(
    (status = 200, body = ProcessList),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 404, body = ErrorBody, description = "`not_found`"),
    (status = 409, body = ErrorBody, description = "`invalid_state`: not running")))]
pub(crate) async fn list(
    State(services): State<Services>,
    Caller(caller): Caller,
    Segments(id): Segments<String>,
) -> ApiResult<Json<ProcessList>> {
    let processes = services.list_processes(caller, &id).await?;
    let processes = processes
        .into_iter()
        .map(|process| Process {
            pid: process.pid,
            tag: process.tag,
            cmd: process.cmd,
            args: process.args,
        })
        .collect();
    Ok(Json(ProcessList { processes }))
}

/// Kill a process and its group.
#[utoipa::path(delete, path = "/{id}/processes/{selector}", tag = "processes",
    params(("id" = String, Path, description = "`sb-{uuid}`"), ("selector" = String, Path, description = "Pid or tag")),
    security(("api_key" = []), ("session" = [])), responses(
    (status = 204, description = "Killed"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 404, body = ErrorBody, description = "`not_found`"),
    (status = 409, body = ErrorBody, description = "`invalid_state`: not running")))]
pub(crate) async fn kill(
    State(services): State<Services>,
    Caller(caller): Caller,
    Segments((id, selector)): Segments<(String, String)>,
) -> ApiResult<StatusCode> {
    services
        .kill_process(caller, &id, Selector::parse(&selector)?)
        .await?;
    Ok(StatusCode::NO_CONTENT)
}
