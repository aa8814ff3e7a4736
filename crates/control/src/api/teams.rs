//! Teams, members, API keys, user search, and the deletion of an account (which takes teams with it).

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::Deserialize;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use wrenn_proto::rest::{
    AddTeamMember, ApiKey, ChangeTeamMember, CreateApiKey, CreateTeam, ErrorBody, FoundUser, RenameTeam,
    Team, TeamMember, TeamRole,
};

use super::error::ApiResult;
use super::extract::{Body, Params, Segments, Signed};
use crate::domain::{Role, team, timestamp};
use crate::service::Services;

pub(super) fn routes() -> OpenApiRouter<Services> {
    OpenApiRouter::new()
        .routes(routes!(create_key, list_keys))
        .routes(routes!(delete_key))
        .routes(routes!(create_team, list_teams))
        .routes(routes!(get_team, rename_team, delete_team))
        .routes(routes!(add_member, list_members))
        .routes(routes!(change_member, remove_member))
        .routes(routes!(leave_team))
        .routes(routes!(search_users))
        .routes(routes!(delete_account))
}

/// Which part of a listing to return.
#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct PageParams {
    /// At most this many, 1 to 1000; 100 when absent.
    #[param(minimum = 1, maximum = 1000)]
    pub(super) limit: Option<u32>,
    /// Only what is older than this one: the last id of the previous page.
    pub(super) before: Option<String>,
}

fn wire_role(role: Role) -> TeamRole {
    match role {
        Role::Member => TeamRole::Member,
        Role::Admin => TeamRole::Admin,
        Role::Owner => TeamRole::Owner,
    }
}

fn domain_role(role: TeamRole) -> Role {
    match role {
        TeamRole::Member => Role::Member,
        TeamRole::Admin => Role::Admin,
        TeamRole::Owner => Role::Owner,
    }
}

fn wire_key(shown: team::ApiKey, key: Option<String>) -> ApiKey {
    let team::ApiKey {
        id,
        team,
        name,
        prefix,
        created_at,
        last_used,
        creator_email,
    } = shown;
    ApiKey {
        id: id.to_string(),
        team_id: team.to_string(),
        name,
        key_prefix: prefix,
        created_at: timestamp(created_at),
        last_used: last_used.map(timestamp),
        creator_email,
        key,
    }
}

fn wire_team(shown: team::Team) -> Team {
    let team::Team {
        id,
        name,
        slug,
        role,
        created_at,
    } = shown;
    Team {
        id: id.to_string(),
        name,
        slug,
        role: wire_role(role),
        created_at: timestamp(created_at),
    }
}

fn wire_member(shown: team::Member) -> TeamMember {
    let team::Member {
        user,
        name,
        email,
        role,
        joined_at,
    } = shown;
    TeamMember {
        user_id: user.to_string(),
        name,
        email,
        role: wire_role(role),
        joined_at: timestamp(joined_at),
    }
}

/// Create an API key for the session's team.
///
/// Every member may. The secret is in this answer only. A key belongs to its team: it stays when its creator
/// leaves.
#[utoipa::path(post, path = "/v1/api-keys", tag = "teams", operation_id = "create_api_key", security(("session" = [])),
    request_body = CreateApiKey, responses(
    (status = 201, body = ApiKey),
    (status = 400, body = ErrorBody, description = "`invalid_request`"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 403, body = ErrorBody, description = "`forbidden`: in no active team"),
    (status = 404, body = ErrorBody, description = "`not_found`: the team has just been deleted"),
    (status = 413, body = ErrorBody, description = "`payload_too_large`")))]
async fn create_key(
    State(services): State<Services>,
    Signed(session): Signed,
    Body(body): Body<CreateApiKey>,
) -> ApiResult<(StatusCode, Json<ApiKey>)> {
    let (row, key) = services.create_key(&session, &body.name).await?;
    Ok((StatusCode::CREATED, Json(wire_key(row, Some(key)))))
}

/// List the API keys of the session's team, newest first.
#[utoipa::path(get, path = "/v1/api-keys", tag = "teams", operation_id = "list_api_keys", params(PageParams),
    security(("session" = [])), responses(
    (status = 200, body = [ApiKey]),
    (status = 400, body = ErrorBody, description = "`invalid_request`"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 403, body = ErrorBody, description = "`forbidden`: in no active team")))]
async fn list_keys(
    State(services): State<Services>,
    Signed(session): Signed,
    Params(PageParams { limit, before }): Params<PageParams>,
) -> ApiResult<Json<Vec<ApiKey>>> {
    let keys = services.list_keys(&session, limit, before.as_deref()).await?;
    Ok(Json(keys.into_iter().map(|row| wire_key(row, None)).collect()))
}

/// Revoke an API key of the session's team.
///
/// Admins and owners may revoke every key, members those that they made. It is refused everywhere within a second.
#[utoipa::path(delete, path = "/v1/api-keys/{id}", tag = "teams", operation_id = "delete_api_key",
    params(("id" = String, Path, description = "`key-{uuid}`")), security(("session" = [])), responses(
    (status = 204, description = "Revoked"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 403, body = ErrorBody, description = "`forbidden`: in no active team, or a member and another's key"),
    (status = 404, body = ErrorBody, description = "`not_found`")))]
async fn delete_key(
    State(services): State<Services>,
    Signed(session): Signed,
    Segments(id): Segments<String>,
) -> ApiResult<StatusCode> {
    services.delete_key(&session, &id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Create a team and own it.
#[utoipa::path(post, path = "/v1/teams", tag = "teams", operation_id = "create_team", security(("session" = [])),
    request_body = CreateTeam, responses(
    (status = 201, body = Team),
    (status = 400, body = ErrorBody, description = "`invalid_request`"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 413, body = ErrorBody, description = "`payload_too_large`")))]
async fn create_team(
    State(services): State<Services>,
    Signed(session): Signed,
    Body(body): Body<CreateTeam>,
) -> ApiResult<(StatusCode, Json<Team>)> {
    let team = services.team_create(&session, &body.name).await?;
    Ok((StatusCode::CREATED, Json(wire_team(team))))
}

/// List the teams that you are in, newest first, with your role in each.
#[utoipa::path(get, path = "/v1/teams", tag = "teams", operation_id = "list_teams", params(PageParams),
    security(("session" = [])), responses(
    (status = 200, body = [Team]),
    (status = 400, body = ErrorBody, description = "`invalid_request`"),
    (status = 401, body = ErrorBody, description = "`unauthorized`")))]
async fn list_teams(
    State(services): State<Services>,
    Signed(session): Signed,
    Params(PageParams { limit, before }): Params<PageParams>,
) -> ApiResult<Json<Vec<Team>>> {
    let teams = services.list_teams(&session, limit, before.as_deref()).await?;
    Ok(Json(teams.into_iter().map(wire_team).collect()))
}

/// Get a team that you are in.
#[utoipa::path(get, path = "/v1/teams/{id}", tag = "teams", operation_id = "get_team",
    params(("id" = String, Path, description = "`team-{uuid}`")), security(("session" = [])), responses(
    (status = 200, body = Team),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 404, body = ErrorBody, description = "`not_found`: also when you are not in it")))]
async fn get_team(
    State(services): State<Services>,
    Signed(session): Signed,
    Segments(id): Segments<String>,
) -> ApiResult<Json<Team>> {
    Ok(Json(wire_team(services.team(&session, &id).await?)))
}

/// Rename a team; admins and owners may. Its slug stays.
#[utoipa::path(patch, path = "/v1/teams/{id}", tag = "teams", operation_id = "rename_team",
    params(("id" = String, Path, description = "`team-{uuid}`")), security(("session" = [])),
    request_body = RenameTeam, responses(
    (status = 200, body = Team),
    (status = 400, body = ErrorBody, description = "`invalid_request`"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 403, body = ErrorBody, description = "`forbidden`: a member"),
    (status = 404, body = ErrorBody, description = "`not_found`"),
    (status = 413, body = ErrorBody, description = "`payload_too_large`")))]
async fn rename_team(
    State(services): State<Services>,
    Signed(session): Signed,
    Segments(id): Segments<String>,
    Body(body): Body<RenameTeam>,
) -> ApiResult<Json<Team>> {
    let team = services.rename_team(&session, &id, &body.name).await?;
    Ok(Json(wire_team(team)))
}

/// Delete a team; owners may.
///
/// Its keys end at once. Its sandboxes (running, paused and missing ones), templates, metrics and channels are removed in the
/// background, on hosts that are away when they are back. Its slug is never used again.
#[utoipa::path(delete, path = "/v1/teams/{id}", tag = "teams", operation_id = "delete_team",
    params(("id" = String, Path, description = "`team-{uuid}`")), security(("session" = [])), responses(
    (status = 204, description = "Deleted"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 403, body = ErrorBody, description = "`forbidden`: not an owner"),
    (status = 404, body = ErrorBody, description = "`not_found`")))]
async fn delete_team(
    State(services): State<Services>,
    Signed(session): Signed,
    Segments(id): Segments<String>,
) -> ApiResult<StatusCode> {
    services.delete_team(&session, &id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Add somebody who has an account to a team, as a member; admins and owners may.
#[utoipa::path(post, path = "/v1/teams/{id}/members", tag = "teams", operation_id = "add_team_member",
    params(("id" = String, Path, description = "`team-{uuid}`")), security(("session" = [])),
    request_body = AddTeamMember, responses(
    (status = 201, body = TeamMember),
    (status = 400, body = ErrorBody, description = "`invalid_request`"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 403, body = ErrorBody, description = "`forbidden`: a member"),
    (status = 404, body = ErrorBody, description = "`not_found`: no such team, or nobody with this address"),
    (status = 409, body = ErrorBody, description = "`conflict`: in the team already"),
    (status = 413, body = ErrorBody, description = "`payload_too_large`")))]
async fn add_member(
    State(services): State<Services>,
    Signed(session): Signed,
    Segments(id): Segments<String>,
    Body(body): Body<AddTeamMember>,
) -> ApiResult<(StatusCode, Json<TeamMember>)> {
    let member = services.add_member(&session, &id, &body.email).await?;
    Ok((StatusCode::CREATED, Json(wire_member(member))))
}

/// List the members of a team that you are in, newest accounts first.
#[utoipa::path(get, path = "/v1/teams/{id}/members", tag = "teams", operation_id = "list_team_members",
    params(("id" = String, Path, description = "`team-{uuid}`"), PageParams), security(("session" = [])), responses(
    (status = 200, body = [TeamMember]),
    (status = 400, body = ErrorBody, description = "`invalid_request`"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 404, body = ErrorBody, description = "`not_found`")))]
async fn list_members(
    State(services): State<Services>,
    Signed(session): Signed,
    Segments(id): Segments<String>,
    Params(PageParams { limit, before }): Params<PageParams>,
) -> ApiResult<Json<Vec<TeamMember>>> {
    let members = services
        .list_members(&session, &id, limit, before.as_deref())
        .await?;
    Ok(Json(members.into_iter().map(wire_member).collect()))
}

/// Change a member's role.
///
/// Admins may change members and admins; only owners change owners and make them. The last owner keeps their role.
#[utoipa::path(patch, path = "/v1/teams/{id}/members/{uid}", tag = "teams", operation_id = "change_team_member",
    params(("id" = String, Path, description = "`team-{uuid}`"), ("uid" = String, Path, description = "`usr-{uuid}`")),
    security(("session" = [])), request_body = ChangeTeamMember, responses(
    (status = 200, body = TeamMember),
    (status = 400, body = ErrorBody, description = "`invalid_request`"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 403, body = ErrorBody, description = "`forbidden`: a member, or an admin and an owner's role"),
    (status = 404, body = ErrorBody, description = "`not_found`"),
    (status = 409, body = ErrorBody, description = "`conflict`: the last owner"),
    (status = 413, body = ErrorBody, description = "`payload_too_large`")))]
async fn change_member(
    State(services): State<Services>,
    Signed(session): Signed,
    Segments((id, uid)): Segments<(String, String)>,
    Body(body): Body<ChangeTeamMember>,
) -> ApiResult<Json<TeamMember>> {
    let member = services
        .set_role(&session, &id, &uid, domain_role(body.role))
        .await?;
    Ok(Json(wire_member(member)))
}

/// Remove a member; admins and owners may, but only owners remove owners, and nobody the last one.
#[utoipa::path(delete, path = "/v1/teams/{id}/members/{uid}", tag = "teams", operation_id = "remove_team_member",
    params(("id" = String, Path, description = "`team-{uuid}`"), ("uid" = String, Path, description = "`usr-{uuid}`")),
    security(("session" = [])), responses(
    (status = 204, description = "Removed"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 403, body = ErrorBody, description = "`forbidden`: a member, or an admin and an owner"),
    (status = 404, body = ErrorBody, description = "`not_found`"),
    (status = 409, body = ErrorBody, description = "`conflict`: the last owner")))]
async fn remove_member(
    State(services): State<Services>,
    Signed(session): Signed,
    Segments((id, uid)): Segments<(String, String)>,
) -> ApiResult<StatusCode> {
    services.remove_member(&session, &id, &uid).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Leave a team; the last owner cannot.
#[utoipa::path(post, path = "/v1/teams/{id}/leave", tag = "teams", operation_id = "leave_team",
    params(("id" = String, Path, description = "`team-{uuid}`")), security(("session" = [])), responses(
    (status = 204, description = "Left"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 404, body = ErrorBody, description = "`not_found`"),
    (status = 409, body = ErrorBody, description = "`conflict`: the last owner")))]
async fn leave_team(
    State(services): State<Services>,
    Signed(session): Signed,
    Segments(id): Segments<String>,
) -> ApiResult<StatusCode> {
    services.leave_team(&session, &id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Whom to search for.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct SearchParams {
    /// The beginning of an address, 3 characters or more.
    #[param(min_length = 3)]
    email: String,
}

/// Search for people by the beginning of their address; finds at most 10, in the order of addresses.
#[utoipa::path(get, path = "/v1/users/search", tag = "teams", operation_id = "search_users", params(SearchParams),
    security(("session" = [])), responses(
    (status = 200, body = [FoundUser]),
    (status = 400, body = ErrorBody, description = "`invalid_request`"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 429, body = ErrorBody, description = "`rate_limited`")))]
async fn search_users(
    State(services): State<Services>,
    Signed(session): Signed,
    Params(SearchParams { email }): Params<SearchParams>,
) -> ApiResult<Json<Vec<FoundUser>>> {
    let found = services.search_users(&session, &email).await?;
    let found = found
        .into_iter()
        .map(|(id, email)| FoundUser {
            user_id: id.to_string(),
            email,
        })
        .collect();
    Ok(Json(found))
}

/// Delete your account.
///
/// All its sessions end at once, and the teams that you alone own are deleted with everything in them, whoever else is
/// in them. The row goes for good after a grace of 15 days; as long, your address cannot be used for another account.
#[utoipa::path(delete, path = "/v1/me", tag = "accounts", operation_id = "delete_account", security(("session" = [])),
    responses(
    (status = 204, description = "Deleted"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 409, body = ErrorBody, description = "`conflict`: the last platform admin")))]
async fn delete_account(State(services): State<Services>, Signed(session): Signed) -> ApiResult<StatusCode> {
    services.delete_account(&session).await?;
    Ok(StatusCode::NO_CONTENT)
}
