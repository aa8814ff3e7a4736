//! What platform admins see and do: teams, users and templates of all, and the platform team's sandboxes.

use axum::extract::State;
use axum::http::StatusCode;
use axum::{Extension, Json};
use utoipa::openapi::path::Operation;
use utoipa::openapi::security::SecurityRequirement;
use utoipa::openapi::{Content, Ref, ResponseBuilder};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use wrenn_proto::rest::{
    AdminTeam, AdminTeamList, AdminTemplate, AdminTemplateList, AdminUser, AdminUserList, CreateSnapshot,
    ErrorBody, SetTeamByoc, SetUserActive, SnapshotCapsule, Template,
};

use super::error::ApiResult;
use super::extract::{Body, Caller, Params, PlatformAdmin, Segments, Wait};
use super::snapshots::{self, SnapshotParams};
use super::teams::PageParams;
use crate::domain::{self, Realm, TeamId, timestamp};
use crate::service::Services;
use crate::service::admin::Page;
use crate::store::admin::{AdminTeamRow, AdminUserRow};

pub(super) fn routes() -> OpenApiRouter<Services> {
    OpenApiRouter::new()
        .routes(routes!(list_teams))
        .routes(routes!(set_byoc))
        .routes(routes!(delete_team))
        .routes(routes!(list_users))
        .routes(routes!(set_active))
        .routes(routes!(list_templates))
        .routes(routes!(delete_template))
        .nest("/v1/admin/capsules", capsules())
}

/// The sandbox routes again, for the platform's own team: the same handlers, whose extractors take a platform admin's
/// session instead of a team's key or session.
fn capsules() -> OpenApiRouter<Services> {
    let mut router = super::sandbox_routes().routes(routes!(snapshot));
    let document = router.get_openapi_mut();
    for item in document.paths.paths.values_mut() {
        for operation in [
            &mut item.get,
            &mut item.post,
            &mut item.put,
            &mut item.patch,
            &mut item.delete,
        ]
        .into_iter()
        .flatten()
        {
            for_admins(operation);
        }
    }
    router.layer(Extension(Realm::Platform))
}

/// Describes an operation of the sandboxes as one of platform admins.
fn for_admins(operation: &mut Operation) {
    operation.tags = Some(vec!["admin".to_owned()]);
    operation.security = Some(vec![SecurityRequirement::new("session", Vec::<String>::new())]);
    operation.operation_id = operation.operation_id.take().map(|id| format!("admin_{id}"));
    let forbidden = ResponseBuilder::new()
        .description("`forbidden`: not a platform admin")
        .content(
            "application/json",
            Content::new(Some(Ref::from_schema_name("ErrorBody"))),
        )
        .build();
    operation
        .responses
        .responses
        .insert("403".to_owned(), forbidden.into());
}

/// The id that the next page begins behind.
fn next<T>(page: &Page<T>, id: impl Fn(&T) -> String) -> Option<String> {
    page.items.last().filter(|_| page.more).map(id)
}

/// List all teams, newest first.
#[utoipa::path(get, path = "/v1/admin/teams", tag = "admin", operation_id = "admin_list_teams", params(PageParams),
    security(("session" = [])), responses(
    (status = 200, body = AdminTeamList),
    (status = 400, body = ErrorBody, description = "`invalid_request`"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 403, body = ErrorBody, description = "`forbidden`: not a platform admin")))]
async fn list_teams(
    State(services): State<Services>,
    PlatformAdmin(_): PlatformAdmin,
    Params(PageParams { limit, before }): Params<PageParams>,
) -> ApiResult<Json<AdminTeamList>> {
    let page = services.admin_teams(limit, before.as_deref()).await?;
    Ok(Json(AdminTeamList {
        next: next(&page, |team| team.id.to_string()),
        total: page.total,
        teams: page
            .items
            .into_iter()
            .map(
                |AdminTeamRow {
                     id,
                     name,
                     slug,
                     byoc,
                     members,
                     created_at,
                 }| AdminTeam {
                    id: id.to_string(),
                    name,
                    slug,
                    byoc,
                    member_count: members,
                    created_at: timestamp(created_at),
                },
            )
            .collect(),
    }))
}

/// Let a team bring hosts of its own, or not.
#[utoipa::path(put, path = "/v1/admin/teams/{id}/byoc", tag = "admin", operation_id = "admin_set_team_byoc",
    params(("id" = String, Path, description = "`team-{uuid}`")), security(("session" = [])),
    request_body = SetTeamByoc, responses(
    (status = 204, description = "Done"),
    (status = 400, body = ErrorBody, description = "`invalid_request`"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 403, body = ErrorBody, description = "`forbidden`: not a platform admin"),
    (status = 404, body = ErrorBody, description = "`not_found`"),
    (status = 413, body = ErrorBody, description = "`payload_too_large`")))]
async fn set_byoc(
    State(services): State<Services>,
    PlatformAdmin(admin): PlatformAdmin,
    Segments(id): Segments<String>,
    Body(body): Body<SetTeamByoc>,
) -> ApiResult<StatusCode> {
    services.set_byoc(&admin, &id, body.byoc).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Delete a team with everything in it, as its owner can.
#[utoipa::path(delete, path = "/v1/admin/teams/{id}", tag = "admin", operation_id = "admin_delete_team",
    params(("id" = String, Path, description = "`team-{uuid}`")), security(("session" = [])), responses(
    (status = 204, description = "Deleted"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 403, body = ErrorBody, description = "`forbidden`: not a platform admin, or the platform's own team"),
    (status = 404, body = ErrorBody, description = "`not_found`")))]
async fn delete_team(
    State(services): State<Services>,
    PlatformAdmin(admin): PlatformAdmin,
    Segments(id): Segments<String>,
) -> ApiResult<StatusCode> {
    services.admin_delete_team(&admin, &id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// List all users, newest first.
#[utoipa::path(get, path = "/v1/admin/users", tag = "admin", operation_id = "admin_list_users", params(PageParams),
    security(("session" = [])), responses(
    (status = 200, body = AdminUserList),
    (status = 400, body = ErrorBody, description = "`invalid_request`"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 403, body = ErrorBody, description = "`forbidden`: not a platform admin")))]
async fn list_users(
    State(services): State<Services>,
    PlatformAdmin(_): PlatformAdmin,
    Params(PageParams { limit, before }): Params<PageParams>,
) -> ApiResult<Json<AdminUserList>> {
    let page = services.admin_users(limit, before.as_deref()).await?;
    Ok(Json(AdminUserList {
        next: next(&page, |user| user.id.to_string()),
        total: page.total,
        users: page
            .items
            .into_iter()
            .map(
                |AdminUserRow {
                     id,
                     email,
                     name,
                     active,
                     platform_admin,
                     created_at,
                     last_login_at,
                 }| AdminUser {
                    id: id.to_string(),
                    email,
                    name,
                    active,
                    platform_admin,
                    created_at: timestamp(created_at),
                    last_login_at: last_login_at.map(timestamp),
                },
            )
            .collect(),
    }))
}

/// Let a user log in, or end their sessions and keep them out.
///
/// API keys of teams that the user owns alone stop working too, within a second, and work again with the user. What runs
/// in those teams runs on.
#[utoipa::path(put, path = "/v1/admin/users/{id}/active", tag = "admin", operation_id = "admin_set_user_active",
    params(("id" = String, Path, description = "`usr-{uuid}`")), security(("session" = [])),
    request_body = SetUserActive, responses(
    (status = 204, description = "Done"),
    (status = 400, body = ErrorBody, description = "`invalid_request`"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 403, body = ErrorBody, description = "`forbidden`: not a platform admin"),
    (status = 404, body = ErrorBody, description = "`not_found`"),
    (status = 409, body = ErrorBody, description = "`conflict`: the last active platform admin"),
    (status = 413, body = ErrorBody, description = "`payload_too_large`")))]
async fn set_active(
    State(services): State<Services>,
    PlatformAdmin(admin): PlatformAdmin,
    Segments(id): Segments<String>,
    Body(body): Body<SetUserActive>,
) -> ApiResult<StatusCode> {
    services.set_active(&admin, &id, body.active).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// List the templates of all teams, newest first.
#[utoipa::path(get, path = "/v1/admin/templates", tag = "admin", operation_id = "admin_list_templates", params(PageParams),
    security(("session" = [])), responses(
    (status = 200, body = AdminTemplateList),
    (status = 400, body = ErrorBody, description = "`invalid_request`"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 403, body = ErrorBody, description = "`forbidden`: not a platform admin")))]
async fn list_templates(
    State(services): State<Services>,
    PlatformAdmin(_): PlatformAdmin,
    Params(PageParams { limit, before }): Params<PageParams>,
) -> ApiResult<Json<AdminTemplateList>> {
    let page = services.admin_templates(limit, before.as_deref()).await?;
    Ok(Json(AdminTemplateList {
        next: next(&page, |(template, _)| template.id.to_string()),
        total: page.total,
        templates: page.items.into_iter().map(wire_template).collect(),
    }))
}

fn wire_template((template, team_name): (domain::Template, String)) -> AdminTemplate {
    let domain::Template {
        id,
        team,
        name,
        kind,
        status,
        detail,
        progress_pct: _,
        vcpus,
        memory_mb,
        disk_size_mb,
        size_bytes,
        created_at,
    } = template;
    AdminTemplate {
        id: id.to_string(),
        name,
        team_id: team.to_string(),
        team_name,
        kind,
        status,
        detail,
        vcpus,
        memory_mb,
        disk_size_mb,
        size_bytes,
        platform: team == TeamId::PLATFORM,
        created_at: timestamp(created_at),
    }
}

/// Delete any team's template, by id or name.
///
/// A name means the platform's template, or the only one of that name.
#[utoipa::path(delete, path = "/v1/admin/templates/{name}", tag = "admin", operation_id = "admin_delete_template",
    params(("name" = String, Path, description = "Name or `tpl-{uuid}`")), security(("session" = [])), responses(
    (status = 204, description = "Deleted"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 403, body = ErrorBody, description = "`forbidden`: not a platform admin, or the built-in template"),
    (status = 404, body = ErrorBody, description = "`not_found`"),
    (status = 409, body = ErrorBody, description = "`conflict`: sandboxes still use it, or several have this name; `invalid_state`: still building")))]
async fn delete_template(
    State(services): State<Services>,
    PlatformAdmin(admin): PlatformAdmin,
    Segments(name): Segments<String>,
) -> ApiResult<StatusCode> {
    services.admin_delete_template(&admin, &name).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Make a platform template, which every team sees, from one of the platform's sandboxes.
#[utoipa::path(post, path = "/{id}/snapshot", tag = "admin", operation_id = "snapshot_capsule",
    params(("id" = String, Path, description = "`sb-{uuid}`"), SnapshotParams, Wait), security(("session" = [])),
    request_body = SnapshotCapsule, responses(
    (status = 201, body = Template, description = "Ready"),
    (status = 202, body = Template, description = "Still building"),
    (status = 400, body = ErrorBody, description = "`invalid_request`"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 404, body = ErrorBody, description = "`not_found`"),
    (status = 409, body = ErrorBody, description = "`conflict`: the name is taken; `invalid_state`: neither running nor paused"),
    (status = 413, body = ErrorBody, description = "`payload_too_large`"),
    (status = 502, body = ErrorBody, description = "`agent_error`"),
    (status = 503, body = ErrorBody, description = "`no_capacity`")))]
async fn snapshot(
    services: State<Services>,
    caller: Caller,
    Segments(sandbox_id): Segments<String>,
    overwrite: Params<SnapshotParams>,
    wait: Params<Wait>,
    Body(SnapshotCapsule { name }): Body<SnapshotCapsule>,
) -> ApiResult<(StatusCode, Json<Template>)> {
    let body = Body(CreateSnapshot { sandbox_id, name });
    snapshots::create(services, caller, overwrite, wait, body).await
}
