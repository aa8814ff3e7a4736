//! Who may call what: every route of the OpenAPI document against every kind of caller.
//!
//! [`TABLE`] has a row for each route; the test fails for a route without a row, and for a row without a route. Who is
//! refused is asked about things that exist and with a fitting method, so the refusal is about the caller alone. Who
//! is let in sends a body of the wrong form, so that most of what is allowed changes nothing: what counts is that the
//! answer is neither a refusal nor a fault.

mod common;

use std::collections::BTreeSet;

use common::{World, answer, code};
use futures::{SinkExt as _, StreamExt as _};
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;

/// What a route asks of its caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rule {
    /// Nothing; what it needs is in the body.
    Open,
    /// A key or a session; the answer is about the caller's own team.
    Team,
    /// The same, about a thing in the path: another team's is not found.
    TeamThing,
    /// The same for a WebSocket: without credentials in a header it waits for the first message.
    Socket,
    /// A session.
    Session,
    /// A session, and this role in the team that it works in.
    Own(Role),
    /// The same, about a thing in the path.
    OwnThing(Role),
    /// A session, and this role in the team of the path.
    Path(Role),
    /// The same, or a platform admin.
    HostThing(Role),
    /// A session of a platform admin.
    Platform,
    /// The same for a WebSocket.
    PlatformSocket,
    /// A host's token.
    Host,
}
use Role::{Admin, Member, Owner};
use Rule::{
    Host, HostThing, Open, Own, OwnThing, Path, Platform, PlatformSocket, Session, Socket, Team, TeamThing,
};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Role {
    Member,
    Admin,
    Owner,
}

/// Routes and rules, in the order of the document; those that would end the fixture are asked by the refused only.
const TABLE: &[(&str, &str, Rule)] = &[
    ("get", "/health", Open),
    ("get", "/metrics", Open),
    ("get", "/v1/admin/audit-logs", Platform),
    ("get", "/v1/admin/capsules", Platform),
    ("post", "/v1/admin/capsules", Platform),
    ("get", "/v1/admin/capsules/stats", Platform),
    ("get", "/v1/admin/capsules/usage", Platform),
    ("get", "/v1/admin/capsules/{id}", Platform),
    ("delete", "/v1/admin/capsules/{id}", Platform),
    ("post", "/v1/admin/capsules/{id}/exec", Platform),
    ("get", "/v1/admin/capsules/{id}/exec/stream", PlatformSocket),
    ("post", "/v1/admin/capsules/{id}/files/list", Platform),
    ("post", "/v1/admin/capsules/{id}/files/mkdir", Platform),
    ("post", "/v1/admin/capsules/{id}/files/read", Platform),
    ("post", "/v1/admin/capsules/{id}/files/remove", Platform),
    ("post", "/v1/admin/capsules/{id}/files/stream/read", Platform),
    ("post", "/v1/admin/capsules/{id}/files/stream/write", Platform),
    ("post", "/v1/admin/capsules/{id}/files/write", Platform),
    ("get", "/v1/admin/capsules/{id}/console", Platform),
    ("get", "/v1/admin/capsules/{id}/metrics", Platform),
    ("post", "/v1/admin/capsules/{id}/pause", Platform),
    ("post", "/v1/admin/capsules/{id}/ping", Platform),
    ("get", "/v1/admin/capsules/{id}/processes", Platform),
    ("delete", "/v1/admin/capsules/{id}/processes/{selector}", Platform),
    (
        "get",
        "/v1/admin/capsules/{id}/processes/{selector}/stream",
        PlatformSocket,
    ),
    ("get", "/v1/admin/capsules/{id}/pty", PlatformSocket),
    ("post", "/v1/admin/capsules/{id}/resume", Platform),
    ("post", "/v1/admin/capsules/{id}/snapshot", Platform),
    ("get", "/v1/admin/teams", Platform),
    ("put", "/v1/admin/teams/{id}/byoc", Platform),
    ("get", "/v1/admin/templates", Platform),
    ("delete", "/v1/admin/templates/{name}", Platform),
    ("get", "/v1/admin/users", Platform),
    ("put", "/v1/admin/users/{id}/active", Platform),
    ("get", "/v1/api-keys", Own(Member)),
    ("post", "/v1/api-keys", Own(Member)),
    ("get", "/v1/audit-logs", Own(Member)),
    ("post", "/v1/auth/activate", Open),
    ("post", "/v1/auth/login", Open),
    ("get", "/v1/auth/oauth/{provider}", Open),
    ("get", "/v1/auth/oauth/{provider}/callback", Open),
    ("post", "/v1/auth/signup", Open),
    ("post", "/v1/auth/switch-team", Session),
    ("get", "/v1/channels", Own(Member)),
    ("post", "/v1/channels", Own(Admin)),
    ("post", "/v1/channels/test", Own(Admin)),
    ("get", "/v1/channels/{id}", OwnThing(Member)),
    ("patch", "/v1/channels/{id}", OwnThing(Admin)),
    ("put", "/v1/channels/{id}/config", OwnThing(Admin)),
    ("get", "/v1/events/stream", Team),
    ("get", "/v1/hosts", Own(Member)),
    ("post", "/v1/hosts", HostThing(Admin)),
    ("post", "/v1/hosts/auth/refresh", Open),
    ("post", "/v1/hosts/register", Open),
    ("post", "/v1/hosts/sandbox-events", Host),
    ("get", "/v1/hosts/{id}", HostThing(Member)),
    ("get", "/v1/hosts/{id}/delete-preview", HostThing(Member)),
    ("post", "/v1/hosts/{id}/heartbeat", Host),
    ("get", "/v1/hosts/{id}/tags", HostThing(Member)),
    ("post", "/v1/hosts/{id}/tags", HostThing(Admin)),
    ("delete", "/v1/hosts/{id}/tags/{tag}", HostThing(Admin)),
    ("post", "/v1/hosts/{id}/token", HostThing(Admin)),
    ("get", "/v1/me", Session),
    ("patch", "/v1/me", Session),
    ("post", "/v1/me/password", Session),
    ("post", "/v1/me/password/reset", Open),
    ("post", "/v1/me/password/reset/confirm", Open),
    ("delete", "/v1/me/providers/{provider}", Session),
    ("get", "/v1/me/providers/{provider}/connect", Session),
    ("get", "/v1/sandboxes", Team),
    ("post", "/v1/sandboxes", Team),
    ("get", "/v1/sandboxes/stats", Team),
    ("get", "/v1/sandboxes/usage", Team),
    ("get", "/v1/sandboxes/{id}", TeamThing),
    ("post", "/v1/sandboxes/{id}/exec", TeamThing),
    ("get", "/v1/sandboxes/{id}/exec/stream", Socket),
    ("post", "/v1/sandboxes/{id}/files/list", TeamThing),
    ("post", "/v1/sandboxes/{id}/files/mkdir", TeamThing),
    ("post", "/v1/sandboxes/{id}/files/read", TeamThing),
    ("post", "/v1/sandboxes/{id}/files/remove", TeamThing),
    ("post", "/v1/sandboxes/{id}/files/stream/read", TeamThing),
    ("post", "/v1/sandboxes/{id}/files/stream/write", TeamThing),
    ("post", "/v1/sandboxes/{id}/files/write", TeamThing),
    ("get", "/v1/sandboxes/{id}/console", TeamThing),
    ("get", "/v1/sandboxes/{id}/metrics", TeamThing),
    ("post", "/v1/sandboxes/{id}/ping", TeamThing),
    ("get", "/v1/sandboxes/{id}/processes", TeamThing),
    ("delete", "/v1/sandboxes/{id}/processes/{selector}", TeamThing),
    ("get", "/v1/sandboxes/{id}/processes/{selector}/stream", Socket),
    ("get", "/v1/sandboxes/{id}/pty", Socket),
    ("post", "/v1/sandboxes/{id}/pause", TeamThing),
    ("post", "/v1/sandboxes/{id}/resume", TeamThing),
    ("get", "/v1/snapshots", Team),
    ("post", "/v1/snapshots", Team),
    ("get", "/v1/teams", Session),
    ("post", "/v1/teams", Session),
    ("get", "/v1/teams/{id}", Path(Member)),
    ("patch", "/v1/teams/{id}", Path(Admin)),
    ("get", "/v1/teams/{id}/members", Path(Member)),
    ("post", "/v1/teams/{id}/members", Path(Admin)),
    ("patch", "/v1/teams/{id}/members/{uid}", Path(Admin)),
    ("get", "/v1/templates", Team),
    ("get", "/v1/users/search", Session),
    // What ends things comes last: the strongest caller takes the thing away.
    ("delete", "/v1/sandboxes/{id}", TeamThing),
    ("delete", "/v1/snapshots/{name}", TeamThing),
    ("delete", "/v1/api-keys/{id}", OwnThing(Admin)),
    ("delete", "/v1/hosts/{id}", HostThing(Admin)),
    ("delete", "/v1/channels/{id}", OwnThing(Admin)),
    ("delete", "/v1/teams/{id}/members/{uid}", Path(Admin)),
    ("post", "/v1/teams/{id}/leave", Path(Member)),
    ("delete", "/v1/me", Session),
    ("delete", "/v1/teams/{id}", Path(Owner)),
    ("delete", "/v1/admin/teams/{id}", Platform),
];

/// Whoever asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Caller {
    Nobody,
    BadKey,
    BadSession,
    /// A session of somebody who has been deactivated since.
    Deactivated,
    /// A host's own token.
    HostAgent,
    /// A session of somebody in no team.
    Teamless,
    OtherKey,
    OtherOwner,
    Key,
    Member,
    Admin,
    Owner,
    PlatformAdmin,
}

/// The refused first, then from the weakest to the strongest.
const CALLERS: [Caller; 13] = [
    Caller::Nobody,
    Caller::BadKey,
    Caller::BadSession,
    Caller::Deactivated,
    Caller::HostAgent,
    Caller::Teamless,
    Caller::OtherKey,
    Caller::OtherOwner,
    Caller::Key,
    Caller::Member,
    Caller::Admin,
    Caller::Owner,
    Caller::PlatformAdmin,
];

/// What must come of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expected {
    /// Not asked who they are.
    NotAsked,
    Unauthorized,
    Forbidden,
    NotFound,
    /// A WebSocket asks who it is in its first message; without an upgrade it goes no further than this.
    NoSocket,
    LetIn,
}

fn expected(rule: Rule, caller: Caller) -> Expected {
    use Expected::{Forbidden, LetIn, NoSocket, NotAsked, NotFound, Unauthorized};
    let unknown = matches!(
        caller,
        Caller::Nobody | Caller::BadKey | Caller::BadSession | Caller::Deactivated | Caller::HostAgent
    );
    let teamless = caller == Caller::Teamless;
    let key = matches!(caller, Caller::Key | Caller::OtherKey);
    let outsider = matches!(
        caller,
        Caller::OtherKey | Caller::OtherOwner | Caller::PlatformAdmin
    );
    let role = match caller {
        Caller::Member => Member,
        Caller::Admin => Admin,
        _ => Owner,
    };
    match rule {
        Open => NotAsked,
        Host if caller == Caller::HostAgent => LetIn,
        Host => Unauthorized,
        Socket | PlatformSocket if caller == Caller::Nobody => NoSocket,
        PlatformSocket | Platform if key => Unauthorized,
        PlatformSocket | Platform if caller == Caller::PlatformAdmin => LetIn,
        _ if unknown => Unauthorized,
        PlatformSocket | Platform => Forbidden,
        Team | TeamThing | Socket | Own(_) | OwnThing(_) if teamless => Forbidden,
        Team => LetIn,
        TeamThing | Socket if outsider => NotFound,
        Socket => NoSocket,
        TeamThing => LetIn,
        Session | Own(_) | OwnThing(_) | Path(_) | HostThing(_) if key => Unauthorized,
        HostThing(_) if caller == Caller::PlatformAdmin => LetIn,
        Session => LetIn,
        // Outsiders ask about their own team, in which they are owners.
        Own(least) if outsider || role >= least => LetIn,
        Own(_) => Forbidden,
        OwnThing(_) | Path(_) | HostThing(_) if outsider || teamless => NotFound,
        OwnThing(least) | Path(least) | HostThing(least) if role >= least => LetIn,
        OwnThing(_) | Path(_) | HostThing(_) => Forbidden,
    }
}

/// With what somebody asks.
enum Credential<'a> {
    Key(&'a str),
    Bearer(&'a str),
}

struct Fixture {
    world: World,
    key: String,
    other_key: String,
    member: String,
    admin: String,
    owner: String,
    other: String,
    platform: String,
    bad_session: String,
    deactivated: String,
    teamless: String,
    team: String,
    sandbox: String,
    snapshot: String,
    key_id: String,
    channel: String,
    /// A host of the team's own.
    host: String,
    spare_user: String,
}

impl Fixture {
    async fn new() -> Self {
        let world = World::new().await;
        let owner = world.person("owner").await;
        let other = world.person("other").await;
        let mut sessions = Vec::new();
        for (name, role) in [("member", "member"), ("admin", "admin"), ("spare", "member")] {
            let person = world.person(name).await;
            let members = format!("/v1/teams/{}/members", owner.team);
            let (status, body) = world
                .call_as(
                    &owner.token,
                    "POST",
                    &members,
                    Some(json!({ "email": person.email })),
                )
                .await;
            assert_eq!(status, 201, "{body}");
            let path = format!("{members}/{}", person.id);
            let (status, body) = world
                .call_as(&owner.token, "PATCH", &path, Some(json!({ "role": role })))
                .await;
            assert_eq!(status, 200, "{body}");
            sessions.push((
                world.session(person.id, Some(&owner.team)).await,
                person.id.to_string(),
            ));
        }
        let key_of = async |token: &str| {
            let (status, body) = world
                .call_as(token, "POST", "/v1/api-keys", Some(json!({ "name": "k" })))
                .await;
            assert_eq!(status, 201, "{body}");
            let text = |field: &str| body[field].as_str().expect("text").to_owned();
            (text("id"), text("key"))
        };
        let (key_id, key) = key_of(&owner.token).await;
        let (_, other_key) = key_of(&other.token).await;
        let keyed = |method: &str, path: &str, body: Value| {
            let request = world
                .http
                .request(method.parse().expect("a method"), world.url(path));
            answer(
                request
                    .header("x-api-key", &key)
                    .json(&body)
                    .timeout(common::DEADLINE),
            )
        };
        let (status, body) = keyed("POST", "/v1/sandboxes?wait=20", json!({})).await;
        assert_eq!(status, 201, "{body}");
        let sandbox = body["id"].as_str().expect("an id").to_owned();
        let (status, body) = keyed(
            "POST",
            "/v1/snapshots",
            json!({ "sandbox_id": sandbox, "name": "mine" }),
        )
        .await;
        assert_eq!(status, 201, "{body}");
        let channel = json!({
            "name": "ops", "provider": "webhook", "events": ["capsule.running"],
            "config": { "url": "https://hooks.example.com/x" },
        });
        let (status, body) = world
            .call_as(&owner.token, "POST", "/v1/channels", Some(channel))
            .await;
        assert_eq!(status, 201, "{body}");
        let channel = body["id"].as_str().expect("an id").to_owned();
        let platform = world.session(world.bootstrap.user_id, None).await;
        let path = format!("/v1/admin/teams/{}/byoc", owner.team);
        let (status, body) = world
            .call_as(&platform, "PUT", &path, Some(json!({ "byoc": true })))
            .await;
        assert_eq!(status, 204, "{body}");
        let (status, body) = world
            .call_as(&owner.token, "POST", "/v1/hosts", Some(json!({ "type": "byoc" })))
            .await;
        assert_eq!(status, 201, "{body}");
        let host = body["host"]["id"].as_str().expect("an id").to_owned();
        let gone = world.person("gone").await;
        let path = format!("/v1/admin/users/{}/active", gone.id);
        let (status, body) = world
            .call_as(&platform, "PUT", &path, Some(json!({ "active": false })))
            .await;
        assert_eq!(status, 204, "{body}");
        let loner = world.person("loner").await;
        let path = format!("/v1/teams/{}", loner.team);
        let (status, body) = world.call_as(&loner.token, "DELETE", &path, None).await;
        assert_eq!(status, 204, "{body}");
        let (spare_user, admin, member) = (
            sessions[2].1.clone(),
            sessions[1].0.clone(),
            sessions[0].0.clone(),
        );
        Self {
            key,
            other_key,
            member,
            admin,
            bad_session: format!("{}x", owner.token),
            owner: owner.token,
            other: other.token,
            platform,
            deactivated: gone.token,
            teamless: loner.token,
            team: owner.team,
            sandbox,
            snapshot: "mine".to_owned(),
            key_id,
            channel,
            host,
            spare_user,
            world,
        }
    }

    /// The path with things of the fixture's team in it.
    fn path(&self, route: &str) -> String {
        let id = match route {
            _ if route.contains("/sandboxes/") || route.contains("/capsules/") => &self.sandbox,
            _ if route.contains("/teams/") => &self.team,
            _ if route.contains("/api-keys/") => &self.key_id,
            _ if route.contains("/channels/") => &self.channel,
            _ if route.contains("/users/") => &self.spare_user,
            _ if route.contains("/heartbeat") => &self.world.host.tokens().host_id,
            _ if route.contains("/hosts/") => &self.host,
            _ => "host-00000000-0000-0000-0000-000000000000",
        };
        route
            .replace("{id}", id)
            .replace("{uid}", &self.spare_user)
            .replace("{name}", &self.snapshot)
            .replace("{selector}", "1")
            .replace("{tag}", "gpu")
            .replace("{provider}", "github")
    }

    /// A body that would do, so that a refusal is about the caller.
    fn fitting(&self, route: &str) -> Value {
        let end = route.rsplit('/').next().unwrap_or_default();
        match (route, end) {
            ("/v1/channels" | "/v1/channels/{id}", _) => json!({
                "name": "other", "provider": "slack", "events": ["capsule.paused"],
                "config": { "webhook_url": "https://hooks.example.com/y" },
            }),
            (_, "config") => json!({ "config": { "url": "https://hooks.example.com/z" } }),
            ("/v1/channels/test", _) => json!({ "id": self.channel }),
            ("/v1/teams" | "/v1/teams/{id}" | "/v1/api-keys", _) => json!({ "name": "other" }),
            (_, "members") => json!({ "email": "other@example.com" }),
            ("/v1/hosts", _) => json!({ "type": "byoc", "team_id": self.team }),
            (_, "tags") => json!({ "tag": "gpu" }),
            (_, "{uid}") => json!({ "role": "admin" }),
            (_, "exec") => json!({ "cmd": "true" }),
            (_, "byoc") => json!({ "byoc": true }),
            (_, "active") => json!({ "active": false }),
            _ if route.contains("/files/") => json!({ "path": "/tmp/x" }),
            _ => json!({}),
        }
    }

    fn credential(&self, caller: Caller) -> Option<Credential<'_>> {
        use Credential::{Bearer, Key};
        Some(match caller {
            Caller::Nobody => return None,
            Caller::BadKey => Key("wrn_0000000000000000000000000000000000000000"),
            Caller::BadSession => Bearer(&self.bad_session),
            Caller::Deactivated => Bearer(&self.deactivated),
            Caller::HostAgent => Bearer(&self.world.host.tokens().token),
            Caller::Teamless => Bearer(&self.teamless),
            Caller::OtherKey => Key(&self.other_key),
            Caller::Key => Key(&self.key),
            Caller::OtherOwner => Bearer(&self.other),
            Caller::Member => Bearer(&self.member),
            Caller::Admin => Bearer(&self.admin),
            Caller::Owner => Bearer(&self.owner),
            Caller::PlatformAdmin => Bearer(&self.platform),
        })
    }

    async fn ask(&self, method: &str, route: &str, caller: Caller, body: &Value) -> (u16, Value) {
        let mut path = self.path(route);
        if route == "/v1/users/search" {
            path.push_str("?email=owner");
        }
        let method = method.to_uppercase().parse().expect("a method");
        let request = self.world.http.request(method, self.world.url(&path));
        let request = if route.ends_with("/write") && body.is_object() {
            let part = reqwest::multipart::Part::bytes(&b"x"[..]).file_name("x");
            request.multipart(
                reqwest::multipart::Form::new()
                    .text("path", "/tmp/x")
                    .part("file", part),
            )
        } else {
            request.json(body)
        };
        let request = match self.credential(caller) {
            None => request,
            Some(Credential::Key(key)) => request.header("x-api-key", key),
            Some(Credential::Bearer(token)) => request.bearer_auth(token),
        };
        // The stream of events does not end by itself: its head is the answer.
        let response = request.timeout(common::DEADLINE).send().await.expect("an answer");
        let status = response.status().as_u16();
        if route == "/v1/events/stream" && status == 200 {
            return (status, Value::Null);
        }
        let text = response.text().await.expect("a body");
        (status, serde_json::from_str(&text).unwrap_or(Value::Null))
    }
}

/// Asked only by those who are refused: who is let in would end the fixture for the rest of the row or table.
const ENDS_FIXTURE: [(&str, &str); 3] = [
    ("delete", "/v1/me"),
    ("post", "/v1/teams/{id}/leave"),
    ("delete", "/v1/capsules/{id}"),
];

/// The rows of the table, after those of the sandboxes' other name.
fn rows() -> Vec<(&'static str, String, Rule)> {
    let twins = TABLE.iter().filter_map(|&(method, route, rule)| {
        let rest = route.strip_prefix("/v1/sandboxes")?;
        Some((method, format!("/v1/capsules{rest}"), rule))
    });
    let table = TABLE
        .iter()
        .map(|&(method, route, rule)| (method, route.to_owned(), rule));
    twins.chain(table).collect()
}

fn documented(document: &Value) -> BTreeSet<(String, String)> {
    let methods = ["get", "put", "post", "delete", "patch"];
    let paths = document["paths"].as_object().expect("paths");
    paths
        .iter()
        .flat_map(|(path, item)| {
            methods
                .into_iter()
                .filter(|method| item.get(method).is_some())
                .map(|method| (method.to_owned(), path.clone()))
        })
        .collect()
}

#[tokio::test]
async fn every_route_lets_in_whom_it_should_and_nobody_else() {
    let fixture = Fixture::new().await;
    let (status, document) = answer(fixture.world.http.get(fixture.world.url("/openapi.json"))).await;
    assert_eq!(status, 200);
    let rows = rows();
    let listed: BTreeSet<(String, String)> = rows
        .iter()
        .map(|(method, path, _)| ((*method).to_owned(), path.clone()))
        .collect();
    assert_eq!(listed.len(), rows.len(), "a route has two rows");
    let documented = documented(&document);
    let without: Vec<_> = documented.difference(&listed).collect();
    assert!(without.is_empty(), "routes without a row: {without:?}");
    let gone: Vec<_> = listed.difference(&documented).collect();
    assert!(gone.is_empty(), "rows without a route: {gone:?}");

    let mut wrong = Vec::new();
    for (method, route, rule) in &rows {
        let (method, route, rule) = (*method, route.as_str(), *rule);
        for caller in CALLERS {
            let expected = expected(rule, caller);
            if expected == Expected::LetIn && ENDS_FIXTURE.contains(&(method, route)) {
                continue;
            }
            let body = match expected {
                // Nothing that is let in should do more than look at this.
                Expected::LetIn | Expected::NotAsked => json!("neither a list nor an object"),
                _ => fixture.fitting(route),
            };
            let (status, answer) = fixture.ask(method, route, caller, &body).await;
            let fits = match expected {
                Expected::NotAsked => !matches!(status, 401 | 403) && status < 500,
                Expected::Unauthorized => (status, code(&answer)) == (401, "unauthorized"),
                Expected::Forbidden => (status, code(&answer)) == (403, "forbidden"),
                Expected::NotFound => (status, code(&answer)) == (404, "not_found"),
                Expected::NoSocket => status == 400 || status == 426,
                Expected::LetIn => !matches!(status, 401 | 403) && status < 500,
            };
            if !fits {
                wrong.push(format!(
                    "{method} {route} by {caller:?}: {status} {answer}, not {expected:?}"
                ));
            }
            // Also the document has to know the answer.
            let described = &document["paths"][route][method]["responses"];
            if described.get(status.to_string()).is_none() {
                wrong.push(format!("{method} {route}: {status} is not in the document"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    fixture.world.running.stop().await;
}

/// The same for real upgrades: who is refused is told before there is a WebSocket, or, where the credentials come in
/// the first message, in it.
#[tokio::test]
async fn sockets_open_for_whom_they_should_and_nobody_else() {
    let fixture = Fixture::new().await;
    let document: Value =
        serde_json::from_str(&wrenn_control::openapi_json().expect("a document")).expect("JSON");
    let mut wrong = Vec::new();
    let sockets = rows()
        .into_iter()
        .filter(|(_, _, rule)| matches!(rule, Socket | PlatformSocket));
    for (_, route, rule) in sockets {
        for caller in CALLERS {
            let expected = expected(rule, caller);
            let status = fixture.upgrade(&route, caller).await;
            let fits = match expected {
                Expected::NotAsked => false,
                Expected::Unauthorized => status == 401,
                Expected::Forbidden => status == 403,
                Expected::NotFound => status == 404,
                Expected::NoSocket => status == 101,
                // The fixture's sandbox is no platform's.
                Expected::LetIn => status == 404,
            };
            if !fits {
                wrong.push(format!("{route} by {caller:?}: {status}, not {expected:?}"));
            }
            if document["paths"][&route]["get"]["responses"][status.to_string()].is_null() {
                wrong.push(format!("{route}: {status} is not in the document"));
            }
            let refusal = match expected {
                Expected::Unauthorized => "unauthorized",
                Expected::Forbidden => "forbidden",
                Expected::NotFound => "not_found",
                Expected::NotAsked | Expected::NoSocket | Expected::LetIn => continue,
            };
            let told = fixture.first_message(&route, caller).await;
            if told["code"] != refusal {
                wrong.push(format!(
                    "{route} by {caller:?} in a message: {told}, not {refusal}"
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    fixture.world.running.stop().await;
}

impl Fixture {
    /// The status with which an upgrade is answered, with the caller's credentials in the head.
    async fn upgrade(&self, route: &str, caller: Caller) -> u16 {
        let request = self
            .world
            .http
            .get(self.world.url(&self.path(route)))
            .header("connection", "upgrade")
            .header("upgrade", "websocket")
            .header("sec-websocket-version", "13")
            .header("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==")
            .timeout(common::DEADLINE);
        let request = match self.credential(caller) {
            None => request,
            Some(Credential::Key(key)) => request.header("x-api-key", key),
            Some(Credential::Bearer(token)) => request.bearer_auth(token),
        };
        request.send().await.expect("an answer").status().as_u16()
    }

    /// What a WebSocket says to a caller who comes with their credentials in the first message.
    async fn first_message(&self, route: &str, caller: Caller) -> Value {
        let url = self.world.url(&self.path(route)).replacen("http", "ws", 1);
        let (mut socket, _) = tokio_tungstenite::connect_async(url).await.expect("a WebSocket");
        let auth = match self.credential(caller) {
            None => json!({ "type": "auth" }),
            Some(Credential::Key(key)) => json!({ "type": "auth", "api_key": key }),
            Some(Credential::Bearer(token)) => json!({ "type": "auth", "token": token }),
        };
        for frame in [auth, json!({ "type": "start", "cmd": "true" })] {
            // The other side may have hung up already; what it said is still to be read.
            let _ = socket.send(Message::text(frame.to_string())).await;
        }
        while let Ok(Some(Ok(message))) = tokio::time::timeout(common::DEADLINE, socket.next()).await {
            if let Message::Text(text) = message {
                return serde_json::from_str(&text).expect("JSON");
            }
        }
        Value::Null
    }
}
