//! Sign-up, login and a person's own account.

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Redirect, Response};
use serde::Deserialize;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use wrenn_proto::rest::{
    Activate, ChangePassword, ConfirmReset, ErrorBody, LogIn, LoggedIn, Me, ProviderUrl, ResetPassword,
    SignUp, SignedUp, SwitchTeam, UpdateMe,
};

use super::audit::AuditNotes;
use super::error::{ApiError, ApiResult};
use super::extract::{Body, ClientAddress, Params, Segments, Signed};
use crate::service::Services;
use crate::service::accounts::{Arrival, Departure, STATE_LIFE};
use crate::{Error, ErrorCode};

/// Ties a login at a provider to the browser in which it began.
const COOKIE: &str = "wrenn_oauth";

pub(super) fn routes() -> OpenApiRouter<Services> {
    OpenApiRouter::new()
        .routes(routes!(signup))
        .routes(routes!(login))
        .routes(routes!(activate))
        .routes(routes!(switch_team))
        .routes(routes!(me, update_me))
        .routes(routes!(change_password))
        .routes(routes!(reset_password))
        .routes(routes!(confirm_reset))
        .routes(routes!(oauth_start))
        .routes(routes!(oauth_callback))
        .routes(routes!(connect_provider))
        .routes(routes!(disconnect_provider))
}

/// Create an account with its first team.
#[utoipa::path(post, path = "/v1/auth/signup", tag = "accounts", request_body = SignUp, responses(
    (status = 201, body = SignedUp),
    (status = 400, body = ErrorBody, description = "`invalid_request`"),
    (status = 409, body = ErrorBody, description = "`conflict`: there is an account with this email"),
    (status = 413, body = ErrorBody, description = "`payload_too_large`"),
    (status = 429, body = ErrorBody, description = "`rate_limited`")))]
pub(crate) async fn signup(
    State(services): State<Services>,
    ClientAddress(from): ClientAddress,
    Body(body): Body<SignUp>,
) -> ApiResult<(StatusCode, Json<SignedUp>)> {
    Ok((StatusCode::CREATED, Json(services.sign_up(from, body).await?)))
}

/// Begin a session by email and password.
#[utoipa::path(post, path = "/v1/auth/login", tag = "accounts", request_body = LogIn, responses(
    (status = 200, body = LoggedIn),
    (status = 400, body = ErrorBody, description = "`invalid_request`"),
    (status = 401, body = ErrorBody, description = "`unauthorized`: the email or the password is wrong"),
    (status = 403, body = ErrorBody, description = "`forbidden`: the account is not active"),
    (status = 413, body = ErrorBody, description = "`payload_too_large`"),
    (status = 429, body = ErrorBody, description = "`rate_limited`")))]
pub(crate) async fn login(
    State(services): State<Services>,
    ClientAddress(from): ClientAddress,
    notes: AuditNotes,
    Body(body): Body<LogIn>,
) -> ApiResult<Json<LoggedIn>> {
    // Of what was typed only an account that exists is noted, by its id: some type their password as address.
    let tried = |user| notes.resource(user);
    Ok(Json(services.log_in(from, body, tried).await?))
}

/// Activate an account by the token of its mail, and begin a session.
#[utoipa::path(post, path = "/v1/auth/activate", tag = "accounts", request_body = Activate, responses(
    (status = 200, body = LoggedIn),
    (status = 400, body = ErrorBody, description = "`invalid_request`: the token is not valid, was used or is too old"),
    (status = 413, body = ErrorBody, description = "`payload_too_large`")))]
pub(crate) async fn activate(
    State(services): State<Services>,
    Body(body): Body<Activate>,
) -> ApiResult<Json<LoggedIn>> {
    Ok(Json(services.activate(body).await?))
}

/// Go on in another of the caller's teams.
#[utoipa::path(post, path = "/v1/auth/switch-team", tag = "accounts", security(("session" = [])),
    request_body = SwitchTeam, responses(
    (status = 200, body = LoggedIn),
    (status = 400, body = ErrorBody, description = "`invalid_request`"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 404, body = ErrorBody, description = "`not_found`: no such team, or the caller is not in it"),
    (status = 413, body = ErrorBody, description = "`payload_too_large`")))]
pub(crate) async fn switch_team(
    State(services): State<Services>,
    Signed(session): Signed,
    Body(body): Body<SwitchTeam>,
) -> ApiResult<Json<LoggedIn>> {
    Ok(Json(services.switch_team(&session, body).await?))
}

/// Get the caller's account.
#[utoipa::path(get, path = "/v1/me", tag = "accounts", security(("session" = [])), responses(
    (status = 200, body = Me),
    (status = 401, body = ErrorBody, description = "`unauthorized`")))]
pub(crate) async fn me(State(services): State<Services>, Signed(session): Signed) -> ApiResult<Json<Me>> {
    Ok(Json(services.me(&session).await?))
}

/// Change the caller's name.
#[utoipa::path(patch, path = "/v1/me", tag = "accounts", security(("session" = [])), request_body = UpdateMe, responses(
    (status = 200, body = Me),
    (status = 400, body = ErrorBody, description = "`invalid_request`"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 413, body = ErrorBody, description = "`payload_too_large`")))]
pub(crate) async fn update_me(
    State(services): State<Services>,
    Signed(session): Signed,
    Body(body): Body<UpdateMe>,
) -> ApiResult<Json<Me>> {
    Ok(Json(services.update_me(&session, body).await?))
}

/// Change the caller's password. All other sessions end; the answer has this one's new token.
#[utoipa::path(post, path = "/v1/me/password", tag = "accounts", security(("session" = [])),
    request_body = ChangePassword, responses(
    (status = 200, body = LoggedIn),
    (status = 400, body = ErrorBody, description = "`invalid_request`"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 403, body = ErrorBody, description = "`forbidden`: the current password is wrong"),
    (status = 413, body = ErrorBody, description = "`payload_too_large`"),
    (status = 429, body = ErrorBody, description = "`rate_limited`")))]
pub(crate) async fn change_password(
    State(services): State<Services>,
    ClientAddress(from): ClientAddress,
    Signed(session): Signed,
    Body(body): Body<ChangePassword>,
) -> ApiResult<Json<LoggedIn>> {
    Ok(Json(services.change_own_password(&session, from, body).await?))
}

/// Ask for a mail with a link that sets a new password. The answer is the same whether or not there is an account.
#[utoipa::path(post, path = "/v1/me/password/reset", tag = "accounts", request_body = ResetPassword, responses(
    (status = 202, description = "If there is such an account, a mail is on its way"),
    (status = 400, body = ErrorBody, description = "`invalid_request`"),
    (status = 413, body = ErrorBody, description = "`payload_too_large`"),
    (status = 429, body = ErrorBody, description = "`rate_limited`")))]
pub(crate) async fn reset_password(
    State(services): State<Services>,
    ClientAddress(from): ClientAddress,
    Body(body): Body<ResetPassword>,
) -> ApiResult<StatusCode> {
    services.request_reset(from, body).await?;
    Ok(StatusCode::ACCEPTED)
}

/// Set a new password by the token of a mail. All sessions end.
#[utoipa::path(post, path = "/v1/me/password/reset/confirm", tag = "accounts", request_body = ConfirmReset, responses(
    (status = 204, description = "Set"),
    (status = 400, body = ErrorBody, description = "`invalid_request`: also when the token is not valid, was used or is too old"),
    (status = 413, body = ErrorBody, description = "`payload_too_large`"),
    (status = 429, body = ErrorBody, description = "`rate_limited`")))]
pub(crate) async fn confirm_reset(
    State(services): State<Services>,
    ClientAddress(from): ClientAddress,
    notes: AuditNotes,
    Body(body): Body<ConfirmReset>,
) -> ApiResult<StatusCode> {
    let user = services.confirm_reset(from, body).await?;
    notes.proved(user, None);
    Ok(StatusCode::NO_CONTENT)
}

/// Begin a login with a provider: sends a browser to the provider's page.
#[utoipa::path(get, path = "/v1/auth/oauth/{provider}", tag = "accounts",
    params(("provider" = String, Path, description = "`github`")), responses(
    (status = 200, body = ProviderUrl, description = "With `Accept: application/json`"),
    (status = 303, description = "To the provider's page, with a cookie"),
    (status = 404, body = ErrorBody, description = "`not_found`: no such provider is set up")))]
pub(crate) async fn oauth_start(
    State(services): State<Services>,
    Segments(provider): Segments<String>,
    headers: HeaderMap,
) -> ApiResult<Response> {
    depart(
        services.oauth_start(&provider)?,
        wants(&headers, "application/json"),
    )
}

/// What a provider sends a browser back with.
#[derive(Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct Callback {
    /// The provider's one-time code.
    code: Option<String>,
    /// The state that the login began with.
    state: Option<String>,
    /// Why there is no code.
    error: Option<String>,
}

/// Finish a login with a provider. A browser goes on to the dashboard, with the session in the fragment.
#[utoipa::path(get, path = "/v1/auth/oauth/{provider}/callback", tag = "accounts",
    params(("provider" = String, Path, description = "`github`"), Callback), responses(
    (status = 200, body = LoggedIn, description = "With `Accept: application/json`"),
    (status = 204, description = "With `Accept: application/json`, when a provider was connected"),
    (status = 303, description = "To the dashboard"),
    (status = 400, body = ErrorBody, description = "`invalid_request`: expired, or begun in another browser"),
    (status = 401, body = ErrorBody, description = "`unauthorized`: the session that wanted to connect has ended"),
    (status = 403, body = ErrorBody, description = "`forbidden`: no consent, no verified address, or the account is deactivated"),
    (status = 404, body = ErrorBody, description = "`not_found`: no such provider is set up"),
    (status = 409, body = ErrorBody, description = "`conflict`: the address or the provider's user has another account"),
    (status = 429, body = ErrorBody, description = "`rate_limited`"),
    (status = 502, body = ErrorBody, description = "`provider_error`")))]
pub(crate) async fn oauth_callback(
    State(services): State<Services>,
    ClientAddress(from): ClientAddress,
    notes: AuditNotes,
    Segments(provider): Segments<String>,
    headers: HeaderMap,
    Params(query): Params<Callback>,
) -> ApiResult<Response> {
    let arrival = arrive(&services, from, &provider, &headers, query).await;
    match &arrival {
        Ok(Arrival::LoggedIn { user, team, .. }) => notes.proved(*user, *team),
        Ok(Arrival::Connected { user, .. }) => {
            notes.action("account.connect");
            notes.proved(*user, None);
        }
        // A browser is sent on with a status that does not tell.
        Err(error) => notes.failed(error.code),
    }
    let mut response = match (arrival, wants(&headers, "application/json")) {
        (Ok(Arrival::LoggedIn { session, .. }), true) => Json(session).into_response(),
        (Ok(Arrival::Connected { .. }), true) => StatusCode::NO_CONTENT.into_response(),
        (Ok(Arrival::LoggedIn { session, .. }), false) => {
            let LoggedIn {
                token,
                user_id,
                team_id,
                email,
                name,
            } = session;
            let fields = [
                ("token", token.reveal()),
                ("user_id", &user_id),
                ("team_id", team_id.as_deref().unwrap_or_default()),
                ("email", &email),
                ("name", &name),
            ];
            to_dashboard(&services, "login", &fields)
        }
        (Ok(Arrival::Connected { provider, .. }), false) => {
            to_dashboard(&services, "settings", &[("connected", &provider)])
        }
        // A person in front of a browser gets the dashboard's words, a program the error.
        (Err(error), false) if wants(&headers, "text/html") && error.code != ErrorCode::InternalError => {
            let fields = [
                ("error", error.code.as_str()),
                ("message", error.message.as_str()),
            ];
            to_dashboard(&services, "login", &fields)
        }
        (Err(error), _) => ApiError(error).into_response(),
    };
    // What answers with a session is kept by nobody on the way.
    response
        .headers_mut()
        .insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Ok(response)
}

/// Begin to connect the caller's account with a provider; the browser then goes to the URL.
#[utoipa::path(get, path = "/v1/me/providers/{provider}/connect", tag = "accounts", security(("session" = [])),
    params(("provider" = String, Path, description = "`github`")), responses(
    (status = 200, body = ProviderUrl, description = "With the cookie that the callback needs"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 404, body = ErrorBody, description = "`not_found`: no such provider is set up")))]
pub(crate) async fn connect_provider(
    State(services): State<Services>,
    Signed(session): Signed,
    Segments(provider): Segments<String>,
) -> ApiResult<Response> {
    // A browser cannot be redirected here: it does not send the session's header by itself.
    depart(services.oauth_connect(&session, &provider)?, true)
}

/// Disconnect the caller's account from a provider.
#[utoipa::path(delete, path = "/v1/me/providers/{provider}", tag = "accounts", security(("session" = [])),
    params(("provider" = String, Path, description = "`github`")), responses(
    (status = 204, description = "Disconnected"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 404, body = ErrorBody, description = "`not_found`: not connected"),
    (status = 409, body = ErrorBody, description = "`conflict`: it is the only way to log in")))]
pub(crate) async fn disconnect_provider(
    State(services): State<Services>,
    Signed(session): Signed,
    Segments(provider): Segments<String>,
) -> ApiResult<StatusCode> {
    services.oauth_disconnect(&session, &provider).await?;
    Ok(StatusCode::NO_CONTENT)
}

fn depart(departure: Departure, json: bool) -> ApiResult<Response> {
    let Departure {
        url,
        cookie,
        cookie_path,
        secure,
    } = departure;
    let cookie = format!(
        "{COOKIE}={}; Path={cookie_path}; Max-Age={}; HttpOnly; SameSite=Lax{}",
        cookie.reveal(),
        STATE_LIFE / 1000,
        if secure { "; Secure" } else { "" },
    );
    let mut cookie = HeaderValue::try_from(cookie).map_err(Error::internal)?;
    cookie.set_sensitive(true);
    let mut response = if json {
        Json(ProviderUrl { url }).into_response()
    } else {
        Redirect::to(url.reveal()).into_response()
    };
    response.headers_mut().insert(header::SET_COOKIE, cookie);
    response
        .headers_mut()
        .insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Ok(response)
}

async fn arrive(
    services: &Services,
    from: Option<std::net::IpAddr>,
    provider: &str,
    headers: &HeaderMap,
    query: Callback,
) -> Result<Arrival, Error> {
    let Callback { code, state, error } = query;
    if error.is_some() {
        return Err(Error::new(
            ErrorCode::Forbidden,
            "the provider did not let the login go on; begin again and consent there",
        ));
    }
    let (Some(code), Some(state)) = (code, state) else {
        return Err(Error::invalid("code and state are required; begin again"));
    };
    services
        .oauth_finish(from, provider, &state, &code, cookie(headers))
        .await
}

/// Fields travel in the fragment, which browsers send to no server.
fn to_dashboard(services: &Services, page: &str, fields: &[(&str, &str)]) -> Response {
    let fragment = url::form_urlencoded::Serializer::new(String::new())
        .extend_pairs(fields)
        .finish();
    Redirect::to(&format!("{}#{fragment}", services.dashboard_url(page))).into_response()
}

fn cookie(headers: &HeaderMap) -> Option<&str> {
    headers
        .get_all(header::COOKIE)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|line| line.split(';'))
        .filter_map(|pair| pair.trim().split_once('='))
        .find_map(|(name, value)| (name == COOKIE).then_some(value))
}

/// Whether the client names a media type.
fn wants(headers: &HeaderMap, media: &str) -> bool {
    headers
        .get_all(header::ACCEPT)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|line| line.split(','))
        .filter_map(|range| range.split(';').next())
        .any(|range| range.trim().eq_ignore_ascii_case(media))
}
