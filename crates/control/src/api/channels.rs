//! Notification channels.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::Deserialize;
use wrenn_proto::rest::{
    Channel, ChannelTested, CreateChannel, ErrorBody, ReplaceChannelConfig, TestChannel, UpdateChannel,
};

use super::convert;
use super::error::ApiResult;
use super::extract::{Body, Params, Segments, Signed};
use crate::service::Services;

/// Create a notification channel.
///
/// A webhook's requests carry `Wrenn-Timestamp` (Unix seconds) and `Wrenn-Signature`: `v1=` and the hex
/// HMAC-SHA256, under the channel's secret, of timestamp, a dot, and the body. A secret that is made up here
/// is shown this once. Owners and admins of the team may do this.
#[utoipa::path(post, operation_id = "create_channel", path = "/v1/channels", tag = "channels", security(("session" = [])),
    params(("Idempotency-Key" = Option<String>, Header, description = "Repeated under one key within a day, it happens once")),
    request_body = CreateChannel, responses(
    (status = 201, body = Channel),
    (status = 400, body = ErrorBody, description = "`invalid_request`"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 403, body = ErrorBody, description = "`forbidden`: a member, or in no team"),
    (status = 409, body = ErrorBody, description = "`conflict`: the name is taken, or there are too many"),
    (status = 413, body = ErrorBody, description = "`payload_too_large`")))]
pub(crate) async fn create(
    State(services): State<Services>,
    Signed(session): Signed,
    Body(body): Body<CreateChannel>,
) -> ApiResult<(StatusCode, Json<Channel>)> {
    let channel = services.create_channel(&session, body).await?;
    Ok((StatusCode::CREATED, Json(convert::channel(channel))))
}

/// Which channels to list.
#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct ListParams {
    /// At most this many, 1 to 100.
    #[param(minimum = 1, maximum = 100)]
    limit: Option<u32>,
    /// Only channels whose name comes after this one: the last name of the previous page.
    after: Option<String>,
}

/// List the team's notification channels, by name.
#[utoipa::path(get, operation_id = "list_channels", path = "/v1/channels", tag = "channels", params(ListParams), security(("session" = [])), responses(
    (status = 200, body = [Channel]),
    (status = 400, body = ErrorBody, description = "`invalid_request`"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 403, body = ErrorBody, description = "`forbidden`: in no team")))]
pub(crate) async fn list(
    State(services): State<Services>,
    Signed(session): Signed,
    Params(ListParams { limit, after }): Params<ListParams>,
) -> ApiResult<Json<Vec<Channel>>> {
    let channels = services.list_channels(&session, after.as_deref(), limit).await?;
    Ok(Json(channels.into_iter().map(convert::channel).collect()))
}

/// Send a test message now, through a channel of the team or through one to be.
#[utoipa::path(post, operation_id = "test_channel", path = "/v1/channels/test", tag = "channels", security(("session" = [])),
    request_body = TestChannel, responses(
    (status = 200, body = ChannelTested),
    (status = 400, body = ErrorBody, description = "`invalid_request`"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 403, body = ErrorBody, description = "`forbidden`: a member, or in no team"),
    (status = 404, body = ErrorBody, description = "`not_found`"),
    (status = 413, body = ErrorBody, description = "`payload_too_large`")))]
pub(crate) async fn test(
    State(services): State<Services>,
    Signed(session): Signed,
    Body(body): Body<TestChannel>,
) -> ApiResult<Json<ChannelTested>> {
    Ok(Json(services.test_channel(&session, body).await?))
}

/// Get a notification channel, with its secrets masked.
#[utoipa::path(get, operation_id = "get_channel", path = "/v1/channels/{id}", tag = "channels",
    params(("id" = String, Path, description = "`chn-{uuid}`")), security(("session" = [])), responses(
    (status = 200, body = Channel),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 403, body = ErrorBody, description = "`forbidden`: in no team"),
    (status = 404, body = ErrorBody, description = "`not_found`")))]
pub(crate) async fn get(
    State(services): State<Services>,
    Signed(session): Signed,
    Segments(id): Segments<String>,
) -> ApiResult<Json<Channel>> {
    Ok(Json(convert::channel(services.get_channel(&session, &id).await?)))
}

/// Change a notification channel's name and events.
#[utoipa::path(patch, operation_id = "update_channel", path = "/v1/channels/{id}", tag = "channels",
    params(("id" = String, Path, description = "`chn-{uuid}`")), security(("session" = [])),
    request_body = UpdateChannel, responses(
    (status = 200, body = Channel),
    (status = 400, body = ErrorBody, description = "`invalid_request`"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 403, body = ErrorBody, description = "`forbidden`: a member, or in no team"),
    (status = 404, body = ErrorBody, description = "`not_found`"),
    (status = 409, body = ErrorBody, description = "`conflict`: the name is taken"),
    (status = 413, body = ErrorBody, description = "`payload_too_large`")))]
pub(crate) async fn update(
    State(services): State<Services>,
    Signed(session): Signed,
    Segments(id): Segments<String>,
    Body(body): Body<UpdateChannel>,
) -> ApiResult<Json<Channel>> {
    let channel = services.update_channel(&session, &id, body).await?;
    Ok(Json(convert::channel(channel)))
}

/// Replace a notification channel's configuration, for example to rotate its secrets.
#[utoipa::path(put, path = "/v1/channels/{id}/config", tag = "channels",
    params(("id" = String, Path, description = "`chn-{uuid}`")), security(("session" = [])),
    request_body = ReplaceChannelConfig, responses(
    (status = 200, body = Channel),
    (status = 400, body = ErrorBody, description = "`invalid_request`"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 403, body = ErrorBody, description = "`forbidden`: a member, or in no team"),
    (status = 404, body = ErrorBody, description = "`not_found`"),
    (status = 413, body = ErrorBody, description = "`payload_too_large`")))]
pub(crate) async fn configure(
    State(services): State<Services>,
    Signed(session): Signed,
    Segments(id): Segments<String>,
    Body(ReplaceChannelConfig { config }): Body<ReplaceChannelConfig>,
) -> ApiResult<Json<Channel>> {
    let channel = services.reconfigure_channel(&session, &id, config).await?;
    Ok(Json(convert::channel(channel)))
}

/// Delete a notification channel; messages on their way to it are dropped.
#[utoipa::path(delete, operation_id = "delete_channel", path = "/v1/channels/{id}", tag = "channels",
    params(("id" = String, Path, description = "`chn-{uuid}`")), security(("session" = [])), responses(
    (status = 204, description = "Deleted"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 403, body = ErrorBody, description = "`forbidden`: a member, or in no team"),
    (status = 404, body = ErrorBody, description = "`not_found`")))]
pub(crate) async fn delete(
    State(services): State<Services>,
    Signed(session): Signed,
    Segments(id): Segments<String>,
) -> ApiResult<StatusCode> {
    services.delete_channel(&session, &id).await?;
    Ok(StatusCode::NO_CONTENT)
}
