//! What handlers take from a request. Every refusal is one of our error bodies.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use axum::Json;
use axum::extract::{ConnectInfo, FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::request::Parts;
use axum::http::{Extensions, HeaderMap, header};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::audit::AuditNotes;
use super::error::ApiError;
use crate::domain::around::{ActorType, AuditActor};
use crate::domain::{Actor, Host, Principal, Realm, Session};
use crate::service::Services;
use crate::service::sandboxes::MAX_WAIT;
use crate::{Error, ErrorCode};

/// Whose things a request is about: a router's layer says it for routes that are mounted twice.
fn realm(parts: &Parts) -> Realm {
    parts.extensions.get().copied().unwrap_or_default()
}

/// The caller, by API key or session token; in the platform's realm a platform admin, acting for the platform team.
#[derive(Debug, Clone, Copy)]
pub struct Caller(pub Principal);

impl FromRequestParts<Services> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, services: &Services) -> Result<Self, ApiError> {
        let key = parts
            .headers
            .get("x-api-key")
            .and_then(|value| value.to_str().ok());
        let bearer = bearer(&parts.headers);
        let principal = match realm(parts) {
            Realm::Team => services.authenticate(key, bearer).await?,
            Realm::Platform => services.authenticate_platform(bearer).await?,
        };
        AuditNotes::caller(&parts.extensions, principal.actor.into(), Some(principal.team));
        Ok(Self(principal))
    }
}

/// The calling person, by session token.
#[derive(Debug, Clone)]
pub struct Signed(pub Session);

impl FromRequestParts<Services> for Signed {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, services: &Services) -> Result<Self, ApiError> {
        let session = services.authenticate_session(bearer(&parts.headers)).await?;
        let team = session.team.map(|(team, _)| team);
        AuditNotes::caller(&parts.extensions, Actor::User(session.user).into(), team);
        Ok(Self(session))
    }
}

/// A platform admin, by session token.
#[derive(Debug, Clone)]
pub struct PlatformAdmin(pub Session);

impl FromRequestParts<Services> for PlatformAdmin {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, services: &Services) -> Result<Self, ApiError> {
        let session = services.authenticate_admin(bearer(&parts.headers)).await?;
        AuditNotes::caller(&parts.extensions, Actor::User(session.user).into(), None);
        Ok(Self(session))
    }
}

/// The caller of a WebSocket: by API key, or not yet known. Browsers cannot set headers on a WebSocket,
/// so the key may come in the first message; a key that is in a header has to be valid.
#[derive(Clone)]
pub(crate) struct SocketCaller {
    pub(crate) known: Option<Principal>,
    /// With what it is known: an API key, a bearer token.
    pub(crate) credential: (Option<String>, Option<String>),
    pub(crate) realm: Realm,
    /// Where the connection comes from.
    pub(crate) source: Option<IpAddr>,
    /// Where the audit log waits to learn who it is.
    notes: Option<AuditNotes>,
}

impl SocketCaller {
    /// The client has said who it is, or has failed to.
    pub(crate) fn identified(&self, principal: Option<&Principal>) {
        if let Some(notes) = &self.notes {
            notes.late(principal.map(|principal| (principal.actor.into(), principal.team)));
        }
    }
}

impl FromRequestParts<Services> for SocketCaller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, services: &Services) -> Result<Self, ApiError> {
        let tried = [
            header::HeaderName::from_static("x-api-key"),
            header::AUTHORIZATION,
        ];
        let source = ClientAddress::of(&parts.extensions, &parts.headers, services).0;
        if !tried.iter().any(|name| parts.headers.contains_key(name)) {
            return Ok(Self {
                known: None,
                credential: (None, None),
                realm: realm(parts),
                source,
                notes: parts.extensions.get().cloned(),
            });
        }
        let Caller(principal) = Caller::from_request_parts(parts, services).await?;
        let key = parts
            .headers
            .get("x-api-key")
            .and_then(|value| value.to_str().ok());
        Ok(Self {
            known: Some(principal),
            credential: (key.map(str::to_owned), bearer(&parts.headers).map(str::to_owned)),
            realm: realm(parts),
            source,
            notes: None,
        })
    }
}

/// The calling host agent, by its bearer token.
#[derive(Debug, Clone)]
pub(crate) struct Agent(pub(crate) Host);

impl FromRequestParts<Services> for Agent {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, services: &Services) -> Result<Self, ApiError> {
        let host = services.authenticate_host(bearer(&parts.headers)).await?;
        let actor = AuditActor {
            kind: ActorType::System,
            id: Some(host.id.to_string()),
        };
        AuditNotes::caller(&parts.extensions, actor, None);
        Ok(Self(host))
    }
}

/// Where the request comes from: the connection's other end, or what trusted proxies say. `None` without a
/// connection (a router that is called directly).
#[derive(Debug, Clone, Copy)]
pub struct ClientAddress(pub Option<IpAddr>);

impl ClientAddress {
    /// The address behind a request's head.
    pub fn of(extensions: &Extensions, headers: &HeaderMap, services: &Services) -> Self {
        let Some(ConnectInfo(peer)) = extensions.get::<ConnectInfo<SocketAddr>>() else {
            return Self(None);
        };
        let forwarded = headers
            .get_all("x-forwarded-for")
            .iter()
            .filter_map(|value| value.to_str().ok());
        Self(Some(super::address::client(
            peer.ip(),
            forwarded,
            &services.config.trusted_proxies,
        )))
    }
}

impl FromRequestParts<Services> for ClientAddress {
    type Rejection = std::convert::Infallible;

    async fn from_request_parts(parts: &mut Parts, services: &Services) -> Result<Self, Self::Rejection> {
        Ok(Self::of(&parts.extensions, &parts.headers, services))
    }
}

pub(super) fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

/// A JSON body within the limit, whatever its content type and transfer encoding. An empty body is `{}`.
#[derive(Debug)]
pub struct Body<T>(pub T);

impl<T: DeserializeOwned> FromRequest<Services> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, services: &Services) -> Result<Self, ApiError> {
        let limit = services.config.limits.max_json_bytes;
        let too_large = || {
            Error::new(
                ErrorCode::PayloadTooLarge,
                format!("a JSON body must be at most {limit} bytes"),
            )
        };
        let declared = request
            .headers()
            .get(header::CONTENT_LENGTH)
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.parse::<u64>().ok());
        if declared.is_some_and(|declared| declared > limit as u64) {
            return Err(too_large().into());
        }
        let bytes = axum::body::to_bytes(request.into_body(), limit)
            .await
            .map_err(|error| {
                // Either the limit or a connection that broke; the latter has nobody left to tell.
                let limited = std::error::Error::source(&error)
                    .is_some_and(|source| source.is::<http_body_util::LengthLimitError>());
                if limited {
                    too_large()
                } else {
                    Error::invalid("the request's body ended early")
                }
            })?;
        let bytes = if bytes.iter().all(u8::is_ascii_whitespace) {
            b"{}".as_slice()
        } else {
            &bytes
        };
        match Json::from_bytes(bytes) {
            Ok(Json(body)) => Ok(Self(body)),
            Err(rejection) => Err(Error::invalid(rejection.body_text()).into()),
        }
    }
}

/// Path parameters. What cannot be decoded names nothing, and nothing has a name with a NUL in it: databases and
/// systems differ in what they do with one, so it stops here.
#[derive(Debug)]
pub struct Segments<T>(pub T);

impl<T: DeserializeOwned + Send> FromRequestParts<Services> for Segments<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, services: &Services) -> Result<Self, ApiError> {
        match Path::<T>::from_request_parts(parts, services).await {
            Ok(Path(segments)) if !parts.uri.path().contains(NUL) => Ok(Self(segments)),
            Ok(_) | Err(_) => Err(Error::not_found("path", parts.uri.path()).into()),
        }
    }
}

/// A NUL character as it comes in a URI; there is no other way to write one.
const NUL: &str = "%00";

/// Query parameters, none of which may have a NUL in it.
#[derive(Debug)]
pub struct Params<T>(pub T);

impl<T: DeserializeOwned> FromRequestParts<Services> for Params<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, services: &Services) -> Result<Self, ApiError> {
        let mut pairs = parts.uri.query().unwrap_or_default().split('&');
        if let Some(pair) = pairs.find(|pair| pair.contains(NUL)) {
            let name: String = pair
                .split('=')
                .next()
                .unwrap_or_default()
                .chars()
                .take(64)
                .collect();
            return Err(Error::invalid(format!(
                "query parameter '{name}' must not contain a NUL character ({NUL}); leave it out"
            ))
            .into());
        }
        match Query::<T>::from_request_parts(parts, services).await {
            Ok(Query(params)) => Ok(Self(params)),
            Err(rejection) => Err(Error::invalid(rejection.body_text()).into()),
        }
    }
}

/// How long the client wants to wait for the end of what it asks for.
#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct Wait {
    /// Answer when the operation has ended, or after this many seconds (at most 300).
    #[param(maximum = 300)]
    wait: Option<u32>,
}

impl Wait {
    /// The time to wait; `None` when the client did not ask for any.
    pub(crate) fn duration(&self) -> Result<Option<Duration>, Error> {
        let Some(seconds) = self.wait else { return Ok(None) };
        let wait = Duration::from_secs(seconds.into());
        if wait > MAX_WAIT {
            return Err(Error::invalid(format!(
                "wait must be between 0 and {}, not {seconds}",
                MAX_WAIT.as_secs()
            )));
        }
        Ok(Some(wait))
    }
}
