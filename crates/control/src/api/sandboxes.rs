//! Sandboxes: life and metrics.

use std::time::Duration;

use axum::Json;
use axum::extract::{OriginalUri, State};
use axum::http::StatusCode;
use serde::Deserialize;
use wrenn_proto::rest::{Console, CreateSandbox, ErrorBody, Metrics, MetricsPoint, Sandbox, SandboxStatus};

use super::convert;
use super::error::ApiResult;
use super::extract::{Body, Caller, Params, Segments, Wait};
use crate::Error;
use crate::domain::lifecycle::Request;
use crate::service::Services;
use crate::service::sandbox_metrics::MetricsRange;
use crate::service::sandboxes::{Accepted, ListSandboxes};

/// How long pause and resume wait under `/v1/capsules` when the client says nothing: the older line of
/// Wrenn's SDKs expects the final status in the answer.
const CAPSULE_WAIT: Duration = Duration::from_secs(60);

/// Waits as asked and answers with the settled status code, or 202 when the operation is still under way.
async fn answer(
    services: &Services,
    accepted: Accepted,
    wait: Option<Duration>,
    settled: StatusCode,
) -> ApiResult<(StatusCode, Json<Sandbox>)> {
    let Some(wait) = wait else {
        return Ok((StatusCode::ACCEPTED, Json(convert::sandbox(accepted.sandbox))));
    };
    let sandbox = services.outcome(accepted, wait).await?;
    let code = if sandbox.status.is_transient() {
        StatusCode::ACCEPTED
    } else {
        settled
    };
    Ok((code, Json(convert::sandbox(sandbox))))
}

/// Create a sandbox.
///
/// Answers at once; the sandbox starts in the background. With `wait`, answers when it runs or has failed.
#[utoipa::path(post, operation_id = "create_sandbox", path = "", tag = "sandboxes", params(Wait,
    ("Idempotency-Key" = Option<String>, Header, description = "Repeated under one key within a day, it happens once")), security(("api_key" = []), ("session" = [])),
    request_body = CreateSandbox, responses(
    (status = 201, body = Sandbox, description = "Settled within `wait`; look at `status`"),
    (status = 202, body = Sandbox, description = "Accepted"),
    (status = 400, body = ErrorBody, description = "`invalid_request`"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 403, body = ErrorBody, description = "`forbidden`: a session in no active team"),
    (status = 404, body = ErrorBody, description = "`not_found`: no such template"),
    (status = 409, body = ErrorBody, description = "`invalid_state`: the template is not ready; `conflict`: the `Idempotency-Key` was used otherwise, or is in use"),
    (status = 413, body = ErrorBody, description = "`payload_too_large`"),
    (status = 503, body = ErrorBody, description = "`no_capacity`")))]
pub(crate) async fn create(
    State(services): State<Services>,
    Caller(caller): Caller,
    Params(wait): Params<Wait>,
    Body(body): Body<CreateSandbox>,
) -> ApiResult<(StatusCode, Json<Sandbox>)> {
    let wait = wait.duration()?;
    let accepted = services.create_sandbox(caller, body).await?;
    answer(&services, accepted, wait, StatusCode::CREATED).await
}

/// Which sandboxes to list.
#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct ListParams {
    /// Only these statuses, separated by commas.
    status: Option<String>,
    /// Include stopped sandboxes.
    #[serde(default)]
    all: bool,
    /// At most this many, 1 to 1000.
    limit: Option<u32>,
    /// Only sandboxes older than this one: the last id of the previous page.
    before: Option<String>,
}

/// List the team's sandboxes, newest first.
///
/// Stopped ones are left out unless asked for by `status` or `all`.
#[utoipa::path(get, operation_id = "list_sandboxes", path = "", tag = "sandboxes", params(ListParams), security(("api_key" = []), ("session" = [])), responses(
    (status = 200, body = [Sandbox]),
    (status = 400, body = ErrorBody, description = "`invalid_request`"),
    (status = 401, body = ErrorBody, description = "`unauthorized`")))]
pub(crate) async fn list(
    State(services): State<Services>,
    Caller(caller): Caller,
    Params(ListParams {
        status,
        all,
        limit,
        before,
    }): Params<ListParams>,
) -> ApiResult<Json<Vec<Sandbox>>> {
    let statuses = status
        .iter()
        .flat_map(|words| words.split(','))
        .filter(|word| !word.is_empty())
        .map(|word| {
            word.parse::<SandboxStatus>()
                .map_err(|error| Error::invalid(format!("status: {error}")))
        })
        .collect::<Result<_, _>>()?;
    let sandboxes = services
        .list_sandboxes(
            caller,
            ListSandboxes {
                statuses,
                all,
                limit,
                before,
            },
        )
        .await?;
    Ok(Json(sandboxes.into_iter().map(convert::sandbox).collect()))
}

/// Get a sandbox.
///
/// With `wait`, answers when no operation is under way any more. Stopped sandboxes are still found.
#[utoipa::path(get, operation_id = "get_sandbox", path = "/{id}", tag = "sandboxes", params(("id" = String, Path, description = "`sb-{uuid}`"), Wait),
    security(("api_key" = []), ("session" = [])), responses(
    (status = 200, body = Sandbox),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 404, body = ErrorBody, description = "`not_found`")))]
pub(crate) async fn get(
    State(services): State<Services>,
    Caller(caller): Caller,
    Segments(id): Segments<String>,
    Params(wait): Params<Wait>,
) -> ApiResult<Json<Sandbox>> {
    let wait = wait.duration()?;
    let mut sandbox = services.sandbox(caller, &id).await?;
    if let Some(wait) = wait {
        sandbox = services.wait_settled(sandbox, wait).await?;
    }
    Ok(Json(convert::sandbox(sandbox)))
}

/// Destroy a sandbox.
///
/// Works from every status, and twice. With `wait`, answers when it is gone.
#[utoipa::path(delete, path = "/{id}", tag = "sandboxes",
    params(("id" = String, Path, description = "`sb-{uuid}`"), Wait), security(("api_key" = []), ("session" = [])), responses(
    (status = 200, body = Sandbox, description = "Settled within `wait`"),
    (status = 202, body = Sandbox, description = "Accepted"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 404, body = ErrorBody, description = "`not_found`")))]
pub(crate) async fn destroy(
    State(services): State<Services>,
    Caller(caller): Caller,
    Segments(id): Segments<String>,
    Params(wait): Params<Wait>,
) -> ApiResult<(StatusCode, Json<Sandbox>)> {
    let wait = wait.duration()?;
    let accepted = services.request(caller, &id, Request::Destroy).await?;
    answer(&services, accepted, wait, StatusCode::OK).await
}

/// Reset the inactivity clock.
#[utoipa::path(post, path = "/{id}/ping", tag = "sandboxes",
    params(("id" = String, Path, description = "`sb-{uuid}`")), security(("api_key" = []), ("session" = [])), responses(
    (status = 204, description = "Done"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 404, body = ErrorBody, description = "`not_found`"),
    (status = 409, body = ErrorBody, description = "`invalid_state`: not running"),
    (status = 503, body = ErrorBody, description = "`host_unavailable`")))]
pub(crate) async fn ping(
    State(services): State<Services>,
    Caller(caller): Caller,
    Segments(id): Segments<String>,
) -> ApiResult<StatusCode> {
    services.ping(caller, &id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Pause a running sandbox, keeping its memory.
#[utoipa::path(post, path = "/{id}/pause", tag = "sandboxes",
    params(("id" = String, Path, description = "`sb-{uuid}`"), Wait), security(("api_key" = []), ("session" = [])), responses(
    (status = 200, body = Sandbox, description = "Settled within `wait`"),
    (status = 202, body = Sandbox, description = "Accepted"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 404, body = ErrorBody, description = "`not_found`"),
    (status = 409, body = ErrorBody, description = "`invalid_state`: not running"),
    (status = 502, body = ErrorBody, description = "`agent_error`, within `wait`")))]
pub(crate) async fn pause(
    State(services): State<Services>,
    Caller(caller): Caller,
    Segments(id): Segments<String>,
    Params(wait): Params<Wait>,
    OriginalUri(uri): OriginalUri,
) -> ApiResult<(StatusCode, Json<Sandbox>)> {
    let wait = wait.duration()?.or_else(|| capsule_wait(&uri));
    let accepted = services.request(caller, &id, Request::Pause).await?;
    answer(&services, accepted, wait, StatusCode::OK).await
}

/// Resume a paused sandbox.
#[utoipa::path(post, path = "/{id}/resume", tag = "sandboxes",
    params(("id" = String, Path, description = "`sb-{uuid}`"), Wait), security(("api_key" = []), ("session" = [])), responses(
    (status = 200, body = Sandbox, description = "Settled within `wait`"),
    (status = 202, body = Sandbox, description = "Accepted"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 404, body = ErrorBody, description = "`not_found`"),
    (status = 409, body = ErrorBody, description = "`invalid_state`: not paused"),
    (status = 503, body = ErrorBody, description = "`no_capacity`, within `wait`: it stays paused")))]
pub(crate) async fn resume(
    State(services): State<Services>,
    Caller(caller): Caller,
    Segments(id): Segments<String>,
    Params(wait): Params<Wait>,
    OriginalUri(uri): OriginalUri,
) -> ApiResult<(StatusCode, Json<Sandbox>)> {
    let wait = wait.duration()?.or_else(|| capsule_wait(&uri));
    let accepted = services.request(caller, &id, Request::Resume).await?;
    answer(&services, accepted, wait, StatusCode::OK).await
}

fn capsule_wait(uri: &axum::http::Uri) -> Option<Duration> {
    uri.path().starts_with("/v1/capsules/").then_some(CAPSULE_WAIT)
}

/// Get the last lines of a sandbox's serial console: what its kernel and init said.
///
/// Of one that runs or is paused since its host started to read; of one that failed, those right before.
#[utoipa::path(get, operation_id = "sandbox_console", path = "/{id}/console", tag = "sandboxes",
    params(("id" = String, Path, description = "`sb-{uuid}`")), security(("api_key" = []), ("session" = [])), responses(
    (status = 200, body = Console),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 403, body = ErrorBody, description = "`forbidden`: a session in no active team"),
    (status = 404, body = ErrorBody, description = "`not_found`: also when it was destroyed"),
    (status = 503, body = ErrorBody, description = "`host_unavailable`")))]
pub(crate) async fn console(
    State(services): State<Services>,
    Caller(caller): Caller,
    Segments(id): Segments<String>,
) -> ApiResult<Json<Console>> {
    let console = services.console(caller, &id).await?;
    Ok(Json(Console { console }))
}

/// Which samples to return.
#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct MetricsParams {
    /// `5m`, `10m`, `1h`, `2h`, `6h`, `12h` or `24h`; `10m` when absent.
    range: Option<String>,
}

/// Get a sandbox's use of CPU, memory and disk.
///
/// Up to two hours there is a point for every 15 s, beyond that for every 5 min: the mean of the CPU, and the most of memory
/// and disk. A paused sandbox shows what it used before.
#[utoipa::path(get, operation_id = "sandbox_metrics", path = "/{id}/metrics", tag = "sandboxes",
    params(("id" = String, Path, description = "`sb-{uuid}`"), MetricsParams), security(("api_key" = []), ("session" = [])), responses(
    (status = 200, body = Metrics),
    (status = 400, body = ErrorBody, description = "`invalid_request`"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 404, body = ErrorBody, description = "`not_found`: also when it was destroyed")))]
pub(crate) async fn metrics(
    State(services): State<Services>,
    Caller(caller): Caller,
    Segments(id): Segments<String>,
    Params(MetricsParams { range }): Params<MetricsParams>,
) -> ApiResult<Json<Metrics>> {
    let range = MetricsRange::parse(range.as_deref())?;
    let (sandbox, points) = services.metrics(caller, &id, range).await?;
    let points = points
        .into_iter()
        .map(|point| MetricsPoint {
            timestamp_unix: point.at.div_euclid(1000),
            cpu_pct: point.cpu_pct,
            mem_bytes: point.mem_bytes,
            disk_bytes: point.disk_bytes,
        })
        .collect();
    Ok(Json(Metrics {
        sandbox_id: sandbox.id.to_string(),
        range: range.word.to_owned(),
        points,
    }))
}
