//! The routes.

use serde::{Deserialize, Serialize};
use wrenn_control::axum::extract::State;
use wrenn_control::axum::{self, Json};
use wrenn_control::domain::{Millis, Role, TeamId, now};
use wrenn_control::extension::{ApiResult, Body, Caller, Params, PlatformAdmin, Segments, Signed};
use wrenn_control::jiff::civil::Date;
use wrenn_control::services::Services;
use wrenn_control::services::rest::ErrorBody;
use wrenn_control::utoipa;
use wrenn_control::utoipa_axum::router::OpenApiRouter;
use wrenn_control::utoipa_axum::routes;
use wrenn_control::{Error, ErrorCode, Result};

use crate::close::{day_of, number};
use crate::price::{CURRENCY, Plan};
use crate::table::{self, Agreement};

/// Milliseconds of a day.
const DAY: Millis = 24 * 3_600_000;

pub(crate) fn routes() -> OpenApiRouter<Services> {
    OpenApiRouter::new()
        .routes(routes!(invoice))
        .routes(routes!(set_plan))
        .routes(routes!(set_suspension))
}

/// Which month.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
struct Month {
    /// `YYYY-MM`.
    month: String,
}

impl Month {
    /// Its first day.
    fn first(&self) -> Result<Date> {
        let bad = || Error::invalid("month must be one such as 2026-01");
        if self.month.len() != 7 {
            return Err(bad());
        }
        format!("{}-01", self.month).parse().map_err(|_| bad())
    }
}

/// What a team has to pay for a month.
#[derive(Debug, Serialize, utoipa::ToSchema)]
struct Invoice {
    /// The team.
    team_id: String,
    /// `YYYY-MM`, in UTC.
    month: String,
    /// The plan that the team has now.
    plan: Plan,
    /// Whether the team can start sandboxes no more.
    suspended: bool,
    /// The currency of the amounts.
    currency: &'static str,
    /// Sandboxes that came to run in the month.
    sandboxes_started: u64,
    /// One for every day with use, oldest first.
    lines: Vec<Line>,
    /// The sum of the lines, in millionths of the currency's unit.
    total_micros: i64,
}

/// What a day costs.
#[derive(Debug, Serialize, utoipa::ToSchema)]
struct Line {
    /// The day, in UTC.
    date: String,
    /// For CPUs, in millionths of the currency's unit.
    cpu_micros: i64,
    /// For memory, in millionths of the currency's unit.
    ram_micros: i64,
    /// Both.
    total_micros: i64,
    /// Whether the amounts are final.
    closed: bool,
}

/// Get the team's invoice for a month.
///
/// Days that are not closed are priced by the present plan and the use so far.
#[utoipa::path(get, path = "/v1/billing/invoice", tag = "billing", operation_id = "get_invoice", params(Month),
    security(("api_key" = []), ("session" = [])), responses(
    (status = 200, body = Invoice),
    (status = 400, body = ErrorBody, description = "`invalid_request`"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 403, body = ErrorBody, description = "`forbidden`: in no active team")))]
async fn invoice(
    State(services): State<Services>,
    Caller(caller): Caller,
    Params(month): Params<Month>,
) -> ApiResult<Json<Invoice>> {
    let first = month.first()?;
    let last = first.last_of_month();
    let db = services.database();
    let Agreement { plan, suspended } = table::agreement(db, caller.team).await?;
    let closed = table::charges(db, caller.team, number(first), number(last)).await?;
    // Nothing is used in days to come; those of a clock that was set back are charged all the same.
    let used = if first > day_of(now()) {
        Vec::new()
    } else {
        let (from, to) = (first.to_string(), last.to_string());
        services.team_usage(caller.team, Some(&from), Some(&to)).await?
    };
    let lines: Vec<Line> = used
        .into_iter()
        .filter_map(|used| {
            let settled = closed.get(&number(used.date)).copied();
            let charge = settled.unwrap_or_else(|| plan.charge(used.cpu_ms, used.ram_mb_ms));
            let empty = settled.is_none() && used.cpu_ms == 0 && used.ram_mb_ms == 0;
            (!empty).then(|| Line {
                date: used.date.to_string(),
                cpu_micros: charge.cpu_micros,
                ram_micros: charge.ram_micros,
                total_micros: charge.total(),
                closed: settled.is_some(),
            })
        })
        .collect();
    let [from, until] = [number(first), number(last) + 1].map(|day| day * DAY);
    let sandboxes_started = table::starts(db, caller.team, from, until).await?;
    Ok(Json(Invoice {
        team_id: caller.team.to_string(),
        month: month.month,
        plan,
        suspended,
        currency: CURRENCY,
        sandboxes_started,
        total_micros: lines
            .iter()
            .fold(0, |sum: i64, line| sum.saturating_add(line.total_micros)),
        lines,
    }))
}

/// A choice of plan.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
struct ChoosePlan {
    /// The plan from now on; days that are closed keep their prices.
    plan: Plan,
}

/// A team's plan.
#[derive(Debug, Serialize, utoipa::ToSchema)]
struct TeamPlan {
    /// The team.
    team_id: String,
    /// Its plan.
    plan: Plan,
    /// Whether the team can start sandboxes no more.
    suspended: bool,
}

async fn team_plan(services: &Services, team: TeamId) -> Result<Json<TeamPlan>> {
    let Agreement { plan, suspended } = table::agreement(services.database(), team).await?;
    Ok(Json(TeamPlan {
        team_id: team.to_string(),
        plan,
        suspended,
    }))
}

/// Choose the plan of the session's team; for its admins and owners.
#[utoipa::path(put, path = "/v1/billing/plan", tag = "billing", operation_id = "set_billing_plan",
    security(("session" = [])), request_body = ChoosePlan, responses(
    (status = 200, body = TeamPlan),
    (status = 400, body = ErrorBody, description = "`invalid_request`"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 403, body = ErrorBody, description = "`forbidden`: a member, or in no active team"),
    (status = 404, body = ErrorBody, description = "`not_found`: the team has just been deleted"),
    (status = 413, body = ErrorBody, description = "`payload_too_large`")))]
async fn set_plan(
    State(services): State<Services>,
    Signed(session): Signed,
    Body(ChoosePlan { plan }): Body<ChoosePlan>,
) -> ApiResult<Json<TeamPlan>> {
    let (team, role) = session.in_team()?;
    if role < Role::Admin {
        return Err(Error::new(
            ErrorCode::Forbidden,
            "only admins and owners of the team may choose its plan",
        )
        .into());
    }
    table::set_plan(services.database(), team, plan).await?;
    Ok(team_plan(&services, team).await?)
}

/// Whether a team is suspended.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
struct Suspension {
    /// Whether it can start sandboxes no more.
    suspended: bool,
}

/// Suspend a team, or end that; for platform admins.
#[utoipa::path(put, path = "/v1/admin/billing/{team}/suspension", tag = "billing", operation_id = "set_billing_suspension",
    params(("team" = String, Path, description = "The team's id")), security(("session" = [])),
    request_body = Suspension, responses(
    (status = 200, body = TeamPlan),
    (status = 400, body = ErrorBody, description = "`invalid_request`"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 403, body = ErrorBody, description = "`forbidden`: not a platform admin"),
    (status = 404, body = ErrorBody, description = "`not_found`"),
    (status = 413, body = ErrorBody, description = "`payload_too_large`")))]
async fn set_suspension(
    State(services): State<Services>,
    PlatformAdmin(_): PlatformAdmin,
    Segments(id): Segments<String>,
    Body(Suspension { suspended }): Body<Suspension>,
) -> ApiResult<Json<TeamPlan>> {
    let team: TeamId = id.parse().map_err(|_| Error::not_found("team", &id))?;
    table::set_suspended(services.database(), team, suspended).await?;
    Ok(team_plan(&services, team).await?)
}
