//! Audit log, notification channels, stats and usage.

use axum::Json;
use axum::extract::State;
use serde::Deserialize;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use wrenn_proto::rest::{ActorType, AuditPage, ErrorBody, Stats, Usage};

use super::error::ApiResult;
use super::extract::{Caller, Params, PlatformAdmin, Signed};
use super::{channels, convert};
use crate::domain::TeamId;
use crate::service::Services;
use crate::service::audit::{ListAudit, moment};
use crate::service::usage::Range;
use crate::store::AuditFilter;
use crate::{Error, Result};

pub(super) fn routes() -> OpenApiRouter<Services> {
    OpenApiRouter::new()
        .routes(routes!(audit_logs))
        .routes(routes!(admin_audit_logs))
        .routes(routes!(channels::create, channels::list))
        .routes(routes!(channels::test))
        .routes(routes!(channels::get, channels::update, channels::delete))
        .routes(routes!(channels::configure))
}

/// Which entries to list.
#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct AuditParams {
    /// Only what this kind of actor did.
    #[param(inline)]
    actor_type: Option<ActorType>,
    /// Only what this actor did: `usr-…`, `key-…`, `host-…`.
    actor: Option<String>,
    /// Only this action, for example `sandbox.create`.
    action: Option<String>,
    /// Only what was done to this kind of thing, for example `sandbox`.
    resource_type: Option<String>,
    /// Only what was done to this thing.
    resource: Option<String>,
    /// Only what was answered with this HTTP status.
    #[param(minimum = 100, maximum = 599)]
    status: Option<u16>,
    /// From this time on, RFC 3339.
    since: Option<String>,
    /// Before this time, RFC 3339.
    until: Option<String>,
    /// The `next_cursor` of the previous page.
    cursor: Option<String>,
    /// At most this many, 1 to 500; 100 when absent.
    #[param(minimum = 1, maximum = 500)]
    limit: Option<u32>,
}

impl AuditParams {
    fn list(self, team: Option<TeamId>) -> Result<ListAudit> {
        let Self {
            actor_type,
            actor,
            action,
            resource_type,
            resource,
            status,
            since,
            until,
            cursor,
            limit,
        } = self;
        for text in [&actor, &action, &resource_type, &resource].into_iter().flatten() {
            if text.contains('\0') {
                return Err(Error::invalid("a filter must not contain a NUL character"));
            }
        }
        Ok(ListAudit {
            filter: AuditFilter {
                team,
                actor_type,
                actor_id: actor,
                action,
                resource_type,
                resource_id: resource,
                status,
                since: moment("since", since.as_deref())?,
                until: moment("until", until.as_deref())?,
                ..AuditFilter::default()
            },
            cursor,
            limit,
        })
    }
}

/// List what was done in the team, newest first.
#[utoipa::path(get, path = "/v1/audit-logs", tag = "audit", params(AuditParams), security(("session" = [])), responses(
    (status = 200, body = AuditPage),
    (status = 400, body = ErrorBody, description = "`invalid_request`"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 403, body = ErrorBody, description = "`forbidden`: in no team")))]
pub(crate) async fn audit_logs(
    State(services): State<Services>,
    Signed(session): Signed,
    Params(params): Params<AuditParams>,
) -> ApiResult<Json<AuditPage>> {
    let (team, _) = session.in_team()?;
    let (entries, next) = services.audit_list(params.list(Some(team))?).await?;
    Ok(Json(convert::audit_page(entries, next)))
}

/// Which team's entries to list.
#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct AdminAuditParams {
    /// Only this team's; all when absent.
    team: Option<String>,
}

/// List what was done on the platform, newest first.
#[utoipa::path(get, path = "/v1/admin/audit-logs", tag = "admin", params(AuditParams, AdminAuditParams),
    security(("session" = [])), responses(
    (status = 200, body = AuditPage),
    (status = 400, body = ErrorBody, description = "`invalid_request`"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 403, body = ErrorBody, description = "`forbidden`: not a platform admin")))]
pub(crate) async fn admin_audit_logs(
    State(services): State<Services>,
    PlatformAdmin(_): PlatformAdmin,
    Params(params): Params<AuditParams>,
    Params(AdminAuditParams { team }): Params<AdminAuditParams>,
) -> ApiResult<Json<AuditPage>> {
    let team = team
        .map(|team| {
            team.parse::<TeamId>()
                .map_err(|error| Error::invalid(format!("team: {error}")))
        })
        .transpose()?;
    let (entries, next) = services.audit_list(params.list(team)?).await?;
    Ok(Json(convert::audit_page(entries, next)))
}

/// Which range to draw.
#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct StatsParams {
    /// `5m`, `1h`, `6h`, `24h` or `30d`; `1h` when absent.
    range: Option<String>,
}

/// Get what the team's running sandboxes hold: now, at most within 30 days, and over a range.
#[utoipa::path(get, path = "/stats", tag = "sandboxes", params(StatsParams), security(("api_key" = []), ("session" = [])), responses(
    (status = 200, body = Stats),
    (status = 400, body = ErrorBody, description = "`invalid_request`"),
    (status = 401, body = ErrorBody, description = "`unauthorized`")))]
pub(crate) async fn stats(
    State(services): State<Services>,
    Caller(caller): Caller,
    Params(StatsParams { range }): Params<StatsParams>,
) -> ApiResult<Json<Stats>> {
    let range = Range::parse(range.as_deref())?;
    let stats = services.team_stats(caller.team, range).await?;
    Ok(Json(convert::stats(range.word, stats)))
}

/// Which days to list.
#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct UsageParams {
    /// First day, `YYYY-MM-DD` in UTC; 29 days before `to` when absent.
    from: Option<String>,
    /// Last day; today when absent.
    to: Option<String>,
}

/// Get the team's use of CPUs and memory per day.
///
/// Counted from the moments at which sandboxes began and ceased to run; at most a minute behind.
#[utoipa::path(get, path = "/usage", tag = "sandboxes", params(UsageParams), security(("api_key" = []), ("session" = [])), responses(
    (status = 200, body = Usage),
    (status = 400, body = ErrorBody, description = "`invalid_request`"),
    (status = 401, body = ErrorBody, description = "`unauthorized`")))]
pub(crate) async fn usage(
    State(services): State<Services>,
    Caller(caller): Caller,
    Params(UsageParams { from, to }): Params<UsageParams>,
) -> ApiResult<Json<Usage>> {
    let points = services
        .team_usage(caller.team, from.as_deref(), to.as_deref())
        .await?;
    Ok(Json(convert::usage(&points)))
}
