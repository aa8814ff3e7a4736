//! The audit log's source: a middleware around all routes, so that no handler can forget it.
//!
//! [`ROUTES`] names the action of every route that changes something; a test compares it with the OpenAPI
//! document. A route that is in no table (an extension's) is recorded under its method and path. Requests
//! are recorded when their answer is known, and also when the client goes away before: those of which only the
//! answer tells who it was or what was made run to their end all the same, others are recorded with an unknown
//! outcome. Bodies are never recorded; of an answer, only the id of what was created is read. Where the answer
//! does not tell either (a redirect, an empty one), handlers note it ([`AuditNotes`]).

mod notes;

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::LazyLock;

use axum::body::{Body, HttpBody as _};
use axum::extract::{FromRequestParts as _, MatchedPath, RawPathParams, Request, State};
use axum::http::{Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use serde_json::Value;

use super::error::ApiError;
use super::extract::ClientAddress;
use super::idempotency::Replayed;
use crate::Error;
use crate::domain::around::{ActorType, AuditActor, AuditEntry, AuditOutcome};
use crate::domain::{AuditId, TeamId, now};
use crate::service::Services;
use crate::tasks::TaskKind;

pub(crate) use notes::AuditNotes;

/// Largest answer that is searched for an id, bytes.
const MAX_ANSWER: u64 = 1 << 20;

/// Where the id of the thing is that was acted on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Id {
    /// A parameter of the path.
    Path(&'static str),
    /// In the answer, as a JSON pointer.
    Answer(&'static str),
    /// The caller.
    Caller,
    /// There is none.
    None,
}

/// A route that changes something.
#[derive(Debug, Clone, Copy)]
struct Route {
    method: &'static str,
    path: &'static str,
    action: &'static str,
    resource: &'static str,
    id: Id,
    /// What the answer says about who the caller has proved to be.
    identifies: Identifies,
    /// Takes an `Idempotency-Key`.
    once: bool,
    /// A WebSocket: its caller may be known only after the answer.
    socket: bool,
}

/// Who a caller without a session or key turns out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Identifies {
    /// Callers are known before.
    Nobody,
    /// The user of `user_id`, in the team of `team_id`.
    User,
    /// A host agent: the host of `host_id`, where the answer has it.
    Host,
    /// Whom the handler notes.
    Noted,
}

impl Route {
    const fn user(self) -> Self {
        Self {
            identifies: Identifies::User,
            ..self
        }
    }

    const fn host(self) -> Self {
        Self {
            identifies: Identifies::Host,
            ..self
        }
    }

    const fn noted(self) -> Self {
        Self {
            identifies: Identifies::Noted,
            ..self
        }
    }

    const fn once(self) -> Self {
        Self { once: true, ..self }
    }

    const fn socket(self) -> Self {
        Self { socket: true, ..self }
    }

    /// Whether only its end tells what the log has to know.
    const fn tells_at_its_end(&self) -> bool {
        matches!(self.id, Answer(_)) || !matches!(self.identifies, Identifies::Nobody)
    }
}

const fn on(
    method: &'static str,
    path: &'static str,
    action: &'static str,
    resource: &'static str,
    id: Id,
) -> Route {
    Route {
        method,
        path,
        action,
        resource,
        id,
        identifies: Identifies::Nobody,
        once: false,
        socket: false,
    }
}

use Id::{Answer, Caller, Path};

/// What changes something. Paths under `/v1/capsules` and `/v1/admin/capsules` count as `/v1/sandboxes`.
#[rustfmt::skip]
const ROUTES: &[Route] = &[
    // Accounts.
    on("POST", "/v1/auth/signup", "account.signup", "user", Answer("/user_id")).user(),
    on("POST", "/v1/auth/login", "account.login", "user", Answer("/user_id")).user(),
    on("POST", "/v1/auth/activate", "account.activate", "user", Answer("/user_id")).user(),
    on("POST", "/v1/auth/switch-team", "account.switch_team", "team", Answer("/team_id")),
    // A connection of an account that exists is noted as `account.connect`.
    on("GET", "/v1/auth/oauth/{provider}/callback", "account.oauth_login", "user", Caller).noted(),
    on("POST", "/v1/me/password/reset", "account.reset_request", "user", Id::None),
    on("POST", "/v1/me/password/reset/confirm", "account.reset", "user", Caller).noted(),
    on("PATCH", "/v1/me", "account.update", "user", Caller),
    on("DELETE", "/v1/me", "account.delete", "user", Caller),
    on("POST", "/v1/me/password", "account.password", "user", Caller),
    on("DELETE", "/v1/me/providers/{provider}", "account.disconnect", "user", Caller),
    // Keys and teams.
    on("POST", "/v1/api-keys", "api_key.create", "api_key", Answer("/id")).once(),
    on("DELETE", "/v1/api-keys/{id}", "api_key.delete", "api_key", Path("id")),
    on("POST", "/v1/teams", "team.create", "team", Answer("/id")).once(),
    on("PATCH", "/v1/teams/{id}", "team.rename", "team", Path("id")),
    on("DELETE", "/v1/teams/{id}", "team.delete", "team", Path("id")),
    on("POST", "/v1/teams/{id}/members", "team.member_add", "user", Answer("/user_id")),
    on("PATCH", "/v1/teams/{id}/members/{uid}", "team.member_role", "user", Path("uid")),
    on("DELETE", "/v1/teams/{id}/members/{uid}", "team.member_remove", "user", Path("uid")),
    on("POST", "/v1/teams/{id}/leave", "team.leave", "team", Path("id")),
    // Sandboxes.
    on("POST", "/v1/sandboxes", "sandbox.create", "sandbox", Answer("/id")).once(),
    on("DELETE", "/v1/sandboxes/{id}", "sandbox.destroy", "sandbox", Path("id")),
    on("POST", "/v1/sandboxes/{id}/pause", "sandbox.pause", "sandbox", Path("id")),
    on("POST", "/v1/sandboxes/{id}/resume", "sandbox.resume", "sandbox", Path("id")),
    on("POST", "/v1/sandboxes/{id}/exec", "sandbox.exec", "sandbox", Path("id")),
    on("GET", "/v1/sandboxes/{id}/exec/stream", "sandbox.exec", "sandbox", Path("id")).socket(),
    on("GET", "/v1/sandboxes/{id}/pty", "sandbox.pty", "sandbox", Path("id")).socket(),
    on("DELETE", "/v1/sandboxes/{id}/processes/{selector}", "sandbox.kill", "sandbox", Path("id")),
    on("POST", "/v1/sandboxes/{id}/files/write", "sandbox.file_write", "sandbox", Path("id")),
    on("POST", "/v1/sandboxes/{id}/files/stream/write", "sandbox.file_write", "sandbox", Path("id")),
    on("POST", "/v1/sandboxes/{id}/files/mkdir", "sandbox.file_mkdir", "sandbox", Path("id")),
    on("POST", "/v1/sandboxes/{id}/files/remove", "sandbox.file_remove", "sandbox", Path("id")),
    on("POST", "/v1/sandboxes/{id}/snapshot", "template.create", "template", Answer("/id")).once(),
    // Templates.
    on("POST", "/v1/snapshots", "template.create", "template", Answer("/id")).once(),
    on("DELETE", "/v1/snapshots/{name}", "template.delete", "template", Path("name")),
    // Hosts.
    on("POST", "/v1/hosts/register", "host.register", "host", Answer("/host_id")).host(),
    on("POST", "/v1/hosts/auth/refresh", "host.refresh_token", "host", Id::None).host(),
    on("POST", "/v1/hosts", "host.create", "host", Answer("/host/id")).once(),
    on("DELETE", "/v1/hosts/{id}", "host.delete", "host", Path("id")),
    on("POST", "/v1/hosts/{id}/token", "host.issue_token", "host", Path("id")),
    on("POST", "/v1/hosts/{id}/tags", "host.tag_add", "host", Path("id")),
    on("DELETE", "/v1/hosts/{id}/tags/{tag}", "host.tag_remove", "host", Path("id")),
    // Channels.
    on("POST", "/v1/channels", "channel.create", "channel", Answer("/id")).once(),
    on("PATCH", "/v1/channels/{id}", "channel.update", "channel", Path("id")),
    on("PUT", "/v1/channels/{id}/config", "channel.configure", "channel", Path("id")),
    on("DELETE", "/v1/channels/{id}", "channel.delete", "channel", Path("id")),
    on("POST", "/v1/channels/test", "channel.test", "channel", Id::None),
    // Platform admins.
    on("PUT", "/v1/admin/teams/{id}/byoc", "admin.team_byoc", "team", Path("id")),
    on("DELETE", "/v1/admin/teams/{id}", "admin.team_delete", "team", Path("id")),
    on("PUT", "/v1/admin/users/{id}/active", "admin.user_active", "user", Path("id")),
    on("DELETE", "/v1/admin/templates/{name}", "admin.template_delete", "template", Path("name")),
];

/// What is not recorded although its method could change something, and why.
const QUIET: &[(&str, &str, &str)] = &[
    ("POST", "/v1/sandboxes/{id}/files/read", "reads"),
    ("POST", "/v1/sandboxes/{id}/files/list", "reads"),
    ("POST", "/v1/sandboxes/{id}/files/stream/read", "reads"),
    (
        "POST",
        "/v1/sandboxes/{id}/ping",
        "says only that somebody is there",
    ),
    (
        "POST",
        "/v1/hosts/{id}/heartbeat",
        "a report; what follows from it is recorded by itself",
    ),
    (
        "POST",
        "/v1/hosts/sandbox-events",
        "a report; what follows from it is recorded by itself",
    ),
];

/// What becomes of a request.
enum Kind {
    Known(&'static Route),
    /// Changes something, but no table knows it.
    Other,
    /// Not recorded.
    Quiet,
}

fn kind(method: &Method, path: &str) -> Kind {
    type Table = HashMap<(&'static str, &'static str), Option<&'static Route>>;
    static TABLE: LazyLock<Table> = LazyLock::new(|| {
        let known = ROUTES
            .iter()
            .map(|route| ((route.method, route.path), Some(route)));
        let quiet = QUIET.iter().map(|(method, path, _)| ((*method, *path), None));
        known.chain(quiet).collect()
    });
    match TABLE.get(&(method.as_str(), path)) {
        Some(Some(route)) => Kind::Known(route),
        Some(None) => Kind::Quiet,
        None if matches!(
            *method,
            Method::POST | Method::PUT | Method::PATCH | Method::DELETE
        ) =>
        {
            Kind::Other
        }
        None => Kind::Quiet,
    }
}

/// A route's path in the tables' words, and whether it is the platform team's collection.
fn canonical(matched: &str) -> (String, bool) {
    for (prefix, platform) in [("/v1/admin/capsules", true), ("/v1/capsules", false)] {
        if let Some(rest) = matched.strip_prefix(prefix)
            && (rest.is_empty() || rest.starts_with('/'))
        {
            // A nested root may be matched with a slash at its end.
            return (
                format!("/v1/sandboxes{}", rest.strip_suffix('/').unwrap_or(rest)),
                platform,
            );
        }
    }
    let matched = matched.strip_suffix('/').unwrap_or(matched);
    (matched.to_owned(), false)
}

/// Whether a route takes an `Idempotency-Key`.
pub(super) fn takes_key(method: &Method, matched: &str) -> bool {
    matches!(kind(method, &canonical(matched).0), Kind::Known(route) if route.once)
}

/// Whether a route is one of the platform team's collection.
pub(super) fn of_platform(matched: &str) -> bool {
    canonical(matched).1
}

/// Records requests that change something.
pub(super) async fn record(
    State(services): State<Services>,
    matched: Option<MatchedPath>,
    request: Request,
    next: Next,
) -> Response {
    let Some(matched) = matched else {
        return next.run(request).await;
    };
    let (path, platform) = canonical(matched.as_str());
    let route = match kind(request.method(), &path) {
        Kind::Known(route) => Some(route),
        Kind::Other => None,
        Kind::Quiet => return next.run(request).await,
    };
    let (mut parts, body) = request.into_parts();
    let params: Vec<(String, String)> = RawPathParams::from_request_parts(&mut parts, &())
        .await
        .map(|params| {
            params
                .iter()
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .collect()
        })
        .unwrap_or_default();
    let notes = AuditNotes::default();
    parts.extensions.insert(notes.clone());
    let source = ClientAddress::of(&parts.extensions, &parts.headers, &services).0;
    let record = Record {
        services,
        route,
        action: match route {
            Some(route) => route.action.to_owned(),
            None => format!("{} {path}", parts.method),
        },
        team: platform
            .then_some(TeamId::PLATFORM)
            .or_else(|| team_of(&path, &params)),
        resource_id: match route.map(|route| route.id) {
            Some(Path(name)) => params
                .into_iter()
                .find(|(param, _)| param == name)
                .map(|(_, value)| value),
            _ => None,
        },
        notes,
        source,
        done: false,
    };
    let request = Request::from_parts(parts, body);
    if !route.is_some_and(Route::tells_at_its_end) {
        return record.run(request, next).await;
    }
    // In a task of its own, which a client that goes away does not end.
    let (tell, told) = tokio::sync::oneshot::channel();
    let tasks = record.services.tasks.clone();
    tasks.spawn(TaskKind::Request, async move {
        let _ = tell.send(record.run(request, next).await);
    });
    told.await
        .unwrap_or_else(|_| ApiError(Error::internal("a request ended without an answer")).into_response())
}

/// The team that a path names, where it names one.
fn team_of(path: &str, params: &[(String, String)]) -> Option<TeamId> {
    let named = path.starts_with("/v1/teams/{id}") || path.starts_with("/v1/admin/teams/{id}");
    params
        .iter()
        .find(|(name, _)| named && name == "id")
        .and_then(|(_, value)| value.parse().ok())
}

/// An entry in the making. Dropped before it is written (the client went away), it writes itself.
struct Record {
    services: Services,
    route: Option<&'static Route>,
    action: String,
    /// The team that is acted on, if the path says so.
    team: Option<TeamId>,
    resource_id: Option<String>,
    notes: AuditNotes,
    source: Option<IpAddr>,
    done: bool,
}

impl Record {
    /// Answers the request, and writes what came of it.
    async fn run(mut self, request: Request, next: Next) -> Response {
        let response = next.run(request).await;
        if response.extensions().get::<Replayed>().is_some() {
            // It happened, and was recorded, when it was first asked for.
            self.done = true;
            return response;
        }
        let response = self.learn(response).await;
        self.write(Some(response.status()));
        response
    }

    /// Reads from a successful answer what only it knows.
    async fn learn(&mut self, response: Response) -> Response {
        let Some(route) = self.route else {
            return response;
        };
        let small = response
            .body()
            .size_hint()
            .upper()
            .is_some_and(|size| size <= MAX_ANSWER);
        let json = response
            .headers()
            .get(header::CONTENT_TYPE)
            .is_some_and(|value| value.as_bytes().starts_with(b"application/json"));
        if !(response.status().is_success() && small && route.tells_at_its_end() && json) {
            return response;
        }
        let (parts, body) = response.into_parts();
        let Ok(bytes) = axum::body::to_bytes(body, MAX_ANSWER as usize).await else {
            // Cannot be: the size was known.
            let mut lost = Response::from_parts(parts, Body::empty());
            *lost.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
            return lost;
        };
        let answer: Value = serde_json::from_slice(&bytes).unwrap_or_default();
        let text = |pointer: &str| answer.pointer(pointer).and_then(Value::as_str);
        if let Answer(pointer) = route.id {
            self.resource_id = text(pointer).map(str::to_owned);
        }
        let id = |pointer: &str| text(pointer).map(str::to_owned);
        let proved = match route.identifies {
            Identifies::Nobody | Identifies::Noted => None,
            Identifies::User => id("/user_id").map(|user| (ActorType::User, Some(user))),
            Identifies::Host => Some((ActorType::System, id("/host_id"))),
        };
        if let Some((kind, id)) = proved {
            let team = text("/team_id").and_then(|team| team.parse().ok());
            self.notes.actor(AuditActor { kind, id }, team);
        }
        Response::from_parts(parts, Body::from(bytes))
    }

    fn write(&mut self, status: Option<StatusCode>) {
        self.done = true;
        let known = self.notes.noted_actor();
        let noted = self.notes.noted_outcome();
        let success = noted.is_none() && status.is_none_or(|status| status.as_u16() < 400);
        let outcome = noted.unwrap_or(match status {
            None => AuditOutcome::Unknown,

            Some(_) if success => AuditOutcome::Success,
            Some(StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::TOO_MANY_REQUESTS) => {
                AuditOutcome::Denied
            }
            Some(_) => AuditOutcome::Failure,
        });
        // Of callers who are not known, only what they achieved and what they were denied counts.
        let counts = match outcome {
            _ if known.is_some() => true,
            AuditOutcome::Success | AuditOutcome::Denied => true,
            AuditOutcome::Failure | AuditOutcome::Unknown => false,
        };
        if !counts {
            return;
        }
        // The caller of a WebSocket may yet say who it is.
        let late = success && known.is_none() && self.route.is_some_and(|route| route.socket);
        let (actor, own) = known.unwrap_or((AuditActor::ANONYMOUS, None));
        let mut resource_id = self.resource_id.take();
        if self.route.is_some_and(|route| route.id == Caller) {
            resource_id.clone_from(&actor.id);
        }
        let resource_id = self.notes.noted_resource().or(resource_id);
        let action = std::mem::take(&mut self.action);
        let action = self.notes.noted_action().map_or(action, str::to_owned);
        let entry = AuditEntry {
            id: AuditId::new(),
            // What failed must not appear in the log of a team that is not the caller's.
            team: self.team.filter(|_| success).or(own),
            actor,
            action,
            resource_type: self.route.map_or("route", |route| route.resource).to_owned(),
            resource_id,
            status: status.map(|status| status.as_u16()),
            outcome,
            source: self.source,
            at: now(),
        };
        if late {
            self.notes.wait(self.services.clone(), entry);
        } else {
            self.services.audit(entry);
        }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        if !self.done {
            self.write(None);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Every operation of the API's document, as method and path.
    fn operations() -> Vec<(Method, String)> {
        let document = serde_json::to_value(crate::api::openapi::document()).expect("JSON");
        let paths = document["paths"].as_object().expect("paths");
        paths
            .iter()
            .flat_map(|(path, item)| {
                item.as_object()
                    .expect("operations")
                    .keys()
                    .filter_map(|method| Method::from_bytes(method.to_uppercase().as_bytes()).ok())
                    .map(|method| (method, path.clone()))
                    .collect::<Vec<_>>()
            })
            .collect()
    }

    #[test]
    fn every_route_that_changes_something_has_an_action() {
        let missing: Vec<_> = operations()
            .into_iter()
            .filter(|(method, path)| matches!(kind(method, &canonical(path).0), Kind::Other))
            .collect();
        assert!(missing.is_empty(), "not in ROUTES or QUIET: {missing:?}");
    }

    #[test]
    fn no_row_is_about_a_route_that_is_not_there() {
        let there: BTreeSet<(String, String)> = operations()
            .into_iter()
            .flat_map(|(method, path)| {
                let canonical = canonical(&path).0;
                [(method.to_string(), path), (method.to_string(), canonical)]
            })
            .collect();
        let rows = ROUTES.iter().map(|route| (route.method, route.path));
        let gone: Vec<_> = rows
            .chain(QUIET.iter().map(|(method, path, _)| (*method, *path)))
            .filter(|(method, path)| !there.contains(&((*method).to_owned(), (*path).to_owned())))
            .collect();
        assert!(gone.is_empty(), "{gone:?}");
    }

    #[test]
    fn the_tables_are_consistent() {
        let mut seen = BTreeSet::new();
        for (method, path) in ROUTES
            .iter()
            .map(|route| (route.method, route.path))
            .chain(QUIET.iter().map(|(method, path, _)| (*method, *path)))
        {
            assert!(seen.insert((method, path)), "{method} {path} is there twice");
        }
        for route in ROUTES {
            if let Path(name) = route.id {
                assert!(route.path.contains(&format!("{{{name}}}")), "{route:?}");
            }
            let (area, verb) = route.action.split_once('.').expect("area.verb");
            assert!(!area.is_empty() && !verb.is_empty());
        }
        for (_, path, reason) in QUIET {
            assert!(!reason.is_empty(), "{path}");
        }
    }

    #[test]
    fn other_names_of_a_route_are_the_same_route() {
        assert_eq!(
            canonical("/v1/capsules/{id}"),
            ("/v1/sandboxes/{id}".to_owned(), false)
        );
        assert_eq!(canonical("/v1/capsules/"), ("/v1/sandboxes".to_owned(), false));
        assert_eq!(
            canonical("/v1/admin/capsules"),
            ("/v1/sandboxes".to_owned(), true)
        );
        assert_eq!(
            canonical("/v1/capsulesque"),
            ("/v1/capsulesque".to_owned(), false)
        );
        assert!(takes_key(&Method::POST, "/v1/capsules"));
        assert!(takes_key(&Method::POST, "/v1/admin/capsules"));
        assert!(!takes_key(&Method::GET, "/v1/capsules"));
        assert!(of_platform("/v1/admin/capsules/") && !of_platform("/v1/capsules"));
    }
}
