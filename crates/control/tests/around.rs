//! What goes on around the sandboxes: audit log, channels, usage, and creates that are repeated.

mod common;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{DEADLINE, Running, World, answer, code, message, start};
use hkdf::hmac::{Hmac, KeyInit, Mac};
use sea_orm::{ConnectionTrait, Database, DatabaseConnection, Statement};
use serde_json::{Value, json};
use sha2::Sha256;
use wrenn_control::domain::around::{ChannelEvent, ChannelEventKind};
use wrenn_control::domain::{TeamId, UserId, now};
use wrenn_control::{ControlConfig, MasterSecret};
use wrenn_testkit::simhost::SimHost;

/// Milliseconds of a day.
const DAY: i64 = 86_400_000;

/// A control plane with a host, the first team's key, and sessions.
struct Fixture {
    running: Running,
    host: SimHost,
    key: String,
    owner: UserId,
    team: TeamId,
    db: DatabaseConnection,
    http: reqwest::Client,
    config: ControlConfig,
    // Last, so that they outlive what uses them.
    _postgres: Option<wrenn_testkit::servers::Postgres>,
    _dir: tempfile::TempDir,
}

impl Fixture {
    async fn new() -> Self {
        Self::with(|_| {}).await
    }

    async fn with(change: impl FnOnce(&mut ControlConfig)) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let mut config = ControlConfig::new(dir.path());
        config.secret = Some(MasterSecret::generate().expect("randomness"));
        config.timings.monitor_interval = Duration::from_secs(3600);
        config.timings.transient_age = Duration::ZERO;
        config.timings.shutdown_grace = Duration::from_millis(500);
        // The tests step these by hand; samples come by the clock, so that an hour could just be ending.
        config.around.sample_interval = Duration::from_secs(1_000_000_000);
        config.around.sandbox_metrics_interval = Duration::from_secs(1_000_000_000);
        config.around.usage_interval = Duration::from_secs(3600);
        config.around.delivery_backoff = Duration::ZERO;
        config.around.allow_private_webhooks = true;
        let postgres = common::postgres();
        config.database_url = postgres.as_ref().map(wrenn_testkit::servers::Postgres::url);
        change(&mut config);
        let url = match &config.database_url {
            Some(url) => url.clone(),
            None => format!("sqlite://{}", dir.path().join("control.db").display()),
        };
        let running = start(config.clone()).await;
        let first = running
            .control
            .bootstrap()
            .await
            .expect("bootstrap")
            .expect("the first start");
        let token = running.control.issue_host_token(None).await.expect("a token");
        let mut host = SimHost::start(&running.url).await;
        host.register(&token.token).await;
        host.heartbeat().await;
        let db = Database::connect(url).await.expect("the same database");
        Self {
            running,
            host,
            key: first.api_key,
            owner: first.user_id,
            team: first.team_id,
            db,
            http: reqwest::Client::new(),
            config,
            _postgres: postgres,
            _dir: dir,
        }
    }

    async fn token(&self, user: UserId, team: TeamId) -> String {
        let session = self.running.control.issue_session(user, Some(team)).await;
        session.expect("a session")
    }

    async fn sql(&self, sql: &str, values: Vec<sea_orm::Value>) {
        self.db
            .execute_raw(Statement::from_sql_and_values(
                self.db.get_database_backend(),
                sql,
                values,
            ))
            .await
            .expect("the statement runs");
    }

    async fn rows(&self, table: &str) -> i64 {
        self.db
            .query_one_raw(Statement::from_string(
                self.db.get_database_backend(),
                format!("SELECT COUNT(*) AS n FROM {table}"),
            ))
            .await
            .expect("a query")
            .expect("a row")
            .try_get("", "n")
            .expect("a count")
    }

    /// A further user, in the first team.
    async fn user(&self, role: &str) -> UserId {
        let user = UserId::new();
        self.sql(
            "INSERT INTO users (id, email, name, is_admin, status, created_at, updated_at) \
             VALUES ($1, $2, 'x', FALSE, 'active', 0, 0)",
            vec![user.0.into(), format!("{user}@example.com").into()],
        )
        .await;
        self.sql(
            "INSERT INTO users_teams (user_id, team_id, role, created_at) VALUES ($1, $2, $3, 0)",
            vec![user.0.into(), self.team.0.into(), role.into()],
        )
        .await;
        user
    }

    fn request(&self, method: &str, path: &str) -> reqwest::RequestBuilder {
        let method = reqwest::Method::from_bytes(method.as_bytes()).expect("a method");
        self.http
            .request(method, format!("{}{path}", self.running.url))
            .timeout(DEADLINE)
    }

    /// A request by API key.
    async fn keyed(&self, method: &str, path: &str, body: Option<Value>) -> (u16, Value) {
        let mut request = self.request(method, path).header("x-api-key", &self.key);
        if let Some(body) = body {
            request = request.json(&body);
        }
        answer(request).await
    }

    /// A request by the owner's session.
    async fn owned(&self, method: &str, path: &str, body: Option<Value>) -> (u16, Value) {
        self.by(self.owner, method, path, body).await
    }

    async fn by(&self, user: UserId, method: &str, path: &str, body: Option<Value>) -> (u16, Value) {
        let mut request = self
            .request(method, path)
            .bearer_auth(self.token(user, self.team).await);
        if let Some(body) = body {
            request = request.json(&body);
        }
        answer(request).await
    }

    async fn sandbox(&self) -> String {
        let (status, body) = self.keyed("POST", "/v1/sandboxes?wait=20", Some(json!({}))).await;
        assert_eq!(
            (status, body["status"].as_str()),
            (201, Some("running")),
            "{body}"
        );
        body["id"].as_str().expect("an id").to_owned()
    }

    async fn log(&self, query: &str) -> Vec<Value> {
        let (status, body) = self.owned("GET", &format!("/v1/audit-logs{query}"), None).await;
        assert_eq!(status, 200, "{body}");
        body["entries"].as_array().expect("entries").clone()
    }

    fn event(&self, kind: ChannelEventKind) -> ChannelEvent {
        ChannelEvent {
            id: UserId::new().0,
            team: self.team,
            kind,
            resource_type: "sandbox".to_owned(),
            resource_id: "sb-1".to_owned(),
            at: now(),
            details: json!({ "template": "minimal" }),
        }
    }

    async fn end(self) {
        self.db.close().await.expect("closed");
        self.running.stop().await;
    }
}

fn actions(entries: &[Value]) -> Vec<&str> {
    entries
        .iter()
        .map(|entry| entry["action"].as_str().expect("an action"))
        .collect()
}

/// What an HTTP sink saw.
#[derive(Debug, Clone)]
struct Seen {
    path: String,
    headers: axum::http::HeaderMap,
    body: String,
}

/// An HTTP server that answers with the given statuses, then with 200, and remembers what it saw.
struct Sink {
    url: String,
    seen: Arc<Mutex<Vec<Seen>>>,
    served: tokio::task::JoinHandle<()>,
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.served.abort();
    }
}

impl Sink {
    async fn new(statuses: &[u16]) -> Self {
        let seen = Arc::<Mutex<Vec<Seen>>>::default();
        let statuses = Arc::new(Mutex::new(statuses.to_vec()));
        let kept = Arc::clone(&seen);
        let app = axum::Router::new().fallback(move |request: axum::extract::Request| {
            let (seen, statuses) = (Arc::clone(&kept), Arc::clone(&statuses));
            async move {
                let (parts, body) = request.into_parts();
                let body = axum::body::to_bytes(body, 1 << 20).await.expect("a body");
                seen.lock().expect("no panic").push(Seen {
                    path: parts.uri.path().to_owned(),
                    headers: parts.headers,
                    body: String::from_utf8_lossy(&body).into_owned(),
                });
                let mut statuses = statuses.lock().expect("no panic");
                let status = if statuses.is_empty() {
                    200
                } else {
                    statuses.remove(0)
                };
                let status = axum::http::StatusCode::from_u16(status).expect("a status");
                (status, [("location", "http://127.0.0.1:1/elsewhere")])
            }
        });
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
            .await
            .expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("bound"));
        let served = tokio::spawn(async move { axum::serve(listener, app).await.expect("served") });
        Self { url, seen, served }
    }

    fn seen(&self) -> Vec<Seen> {
        self.seen.lock().expect("no panic").clone()
    }

    /// Steps deliveries until as many requests were seen.
    async fn until(&self, world: &Fixture, count: usize) -> Vec<Seen> {
        let deadline = tokio::time::Instant::now() + DEADLINE;
        loop {
            world
                .running
                .control
                .deliver_notifications()
                .await
                .expect("a pass");
            let seen = self.seen();
            if seen.len() >= count {
                return seen;
            }
            assert!(
                tokio::time::Instant::now() < deadline,
                "saw {} of {count}",
                seen.len()
            );
            tokio::task::yield_now().await;
        }
    }
}

// ---- Audit log ----

#[tokio::test]
async fn what_changes_something_is_in_the_log_and_what_reads_is_not() {
    let world = Fixture::new().await;
    let id = world.sandbox().await;
    world.keyed("GET", "/v1/sandboxes", None).await;
    world
        .keyed(
            "POST",
            &format!("/v1/sandboxes/{id}/files/list"),
            Some(json!({"path": "/"})),
        )
        .await;
    world
        .keyed("POST", &format!("/v1/sandboxes/{id}/ping"), None)
        .await;
    let (status, _) = world
        .keyed("POST", &format!("/v1/capsules/{id}/pause"), None)
        .await;
    assert_eq!(status, 200);
    let (status, _) = world
        .owned("DELETE", &format!("/v1/sandboxes/{id}?wait=20"), None)
        .await;
    assert_eq!(status, 200);
    let (status, _) = world
        .keyed("POST", "/v1/sandboxes", Some(json!({"template": "no-such"})))
        .await;
    assert_eq!(status, 404);

    let entries = world.log("").await;
    assert_eq!(
        actions(&entries),
        [
            "sandbox.create",
            "sandbox.destroy",
            "sandbox.pause",
            "sandbox.create"
        ]
    );
    let [failed, destroyed, paused, created] = entries.as_slice() else {
        panic!("{entries:?}")
    };
    assert_eq!(created["resource_id"], id.as_str());
    assert_eq!(created["resource_type"], "sandbox");
    assert_eq!(created["actor_type"], "api_key");
    assert!(
        created["actor_id"]
            .as_str()
            .is_some_and(|id| id.starts_with("key-"))
    );
    assert_eq!(created["status"], 201);
    assert_eq!(created["outcome"], "success");
    assert_eq!(created["team_id"], world.team.to_string());
    assert_eq!(paused["resource_id"], id.as_str());
    assert_eq!(destroyed["actor_type"], "user");
    assert_eq!(destroyed["actor_id"], world.owner.to_string());
    assert_eq!(
        (failed["status"].as_u64(), failed["outcome"].as_str()),
        (Some(404), Some("failure"))
    );
    assert!(failed.get("resource_id").is_none());

    assert_eq!(world.log("?action=sandbox.create").await.len(), 2);
    assert_eq!(world.log("?status=404").await.len(), 1);
    assert_eq!(world.log(&format!("?resource={id}")).await.len(), 3);
    assert_eq!(world.log(&format!("?actor={}", world.owner)).await.len(), 1);
    assert_eq!(world.log("?actor_type=api_key").await.len(), 3);
    assert_eq!(world.log("?until=2020-01-01T00:00:00Z").await.len(), 0);
    assert_eq!(world.log("?since=2020-01-01T00:00:00Z").await.len(), 4);
    for bad in [
        "?since=yesterday",
        "?cursor=x",
        "?limit=0",
        "?limit=501",
        "?actor_type=robot",
    ] {
        let (status, body) = world.owned("GET", &format!("/v1/audit-logs{bad}"), None).await;
        assert_eq!((status, code(&body)), (400, "invalid_request"), "{bad}");
    }
    world.end().await;
}

#[tokio::test]
async fn pages_of_the_log_hold_every_entry_once() {
    let world = Fixture::new().await;
    for index in 0..7 {
        world
            .keyed("DELETE", &format!("/v1/snapshots/none-{index}"), None)
            .await;
    }
    let mut seen = BTreeSet::new();
    let mut cursor = String::new();
    let mut pages = 0;
    loop {
        let (status, page) = world
            .owned("GET", &format!("/v1/audit-logs?limit=3{cursor}"), None)
            .await;
        assert_eq!(status, 200, "{page}");
        for entry in page["entries"].as_array().expect("entries") {
            assert!(seen.insert(entry["id"].as_str().expect("an id").to_owned()));
        }
        pages += 1;
        match page["next_cursor"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => break,
        }
    }
    assert_eq!((seen.len(), pages), (7, 3));
    world.end().await;
}

#[tokio::test]
async fn refused_callers_are_noted_for_admins_and_other_teams_see_nothing() {
    let world = Fixture::new().await;
    let (status, _) = answer(
        world
            .request("POST", "/v1/sandboxes")
            .header("x-api-key", "wrn_wrong_secret_value")
            .json(&json!({"metadata": {"password": "hunter2"}})),
    )
    .await;
    assert_eq!(status, 401);
    // Another team's failed reach into this one stays in its own log.
    let (other, other_key) = world.running.control.create_team("other").await.expect("a team");
    let id = world.sandbox().await;
    let (status, _) = answer(
        world
            .request("DELETE", &format!("/v1/sandboxes/{id}"))
            .header("x-api-key", &other_key),
    )
    .await;
    assert_eq!(status, 404);
    assert_eq!(actions(&world.log("").await), ["sandbox.create"]);

    let (status, all) = world.owned("GET", "/v1/admin/audit-logs", None).await;
    assert_eq!(status, 200, "{all}");
    let entries = all["entries"].as_array().expect("entries");
    let anonymous: Vec<_> = entries
        .iter()
        .filter(|entry| entry["actor_type"] == "anonymous")
        .collect();
    assert_eq!(anonymous.len(), 1, "{all}");
    assert_eq!(anonymous[0]["status"], 401);
    assert_eq!(anonymous[0]["outcome"], "denied");
    assert!(anonymous[0].get("team_id").is_none());
    let text = all.to_string();
    assert!(
        !text.contains("hunter2") && !text.contains("wrong_secret"),
        "{text}"
    );
    let (_, others) = world
        .owned("GET", &format!("/v1/admin/audit-logs?team={other}"), None)
        .await;
    assert_eq!(others["entries"].as_array().map(Vec::len), Some(1), "{others}");
    assert_eq!(others["entries"][0]["resource_id"], id.as_str());
    // Registration is known by the host that it made.
    assert!(entries.iter().any(|entry| {
        entry["action"] == "host.register"
            && entry["resource_id"]
                .as_str()
                .is_some_and(|id| id.starts_with("host-"))
    }));

    let member = world.user("member").await;
    let (status, _) = world.by(member, "GET", "/v1/admin/audit-logs", None).await;
    assert_eq!(status, 403);
    let (status, _) = world.by(member, "GET", "/v1/audit-logs", None).await;
    assert_eq!(status, 200);
    let (status, _) = world.keyed("GET", "/v1/audit-logs", None).await;
    assert_eq!(status, 401, "a key is no session");
    world.end().await;
}

#[tokio::test]
async fn what_the_platform_does_is_noted_and_nothing_is_lost_at_shutdown() {
    let world = Fixture::new().await;
    let id = world.sandbox().await;
    world
        .host
        .event(
            common::id(&id),
            1,
            wrenn_proto::rest::SandboxStatus::Paused,
            "ttl_expired",
        )
        .await;
    let deadline = tokio::time::Instant::now() + DEADLINE;
    while world.log("?actor_type=system").await.is_empty() {
        assert!(tokio::time::Instant::now() < deadline, "never noted");
        tokio::task::yield_now().await;
    }
    let entries = world.log("?actor_type=system").await;
    assert_eq!(actions(&entries), ["sandbox.auto_pause"]);
    assert_eq!(entries[0]["resource_id"], id.as_str());
    assert!(entries[0].get("status").is_none());

    // Nobody reads before the end; the entries are written all the same.
    for _ in 0..20 {
        world.keyed("DELETE", "/v1/snapshots/none", None).await;
    }
    let Fixture {
        running, db, _dir, ..
    } = world;
    running.stop().await;
    let row = db
        .query_one_raw(Statement::from_string(
            db.get_database_backend(),
            "SELECT COUNT(*) AS n FROM audit_logs WHERE action = 'template.delete'",
        ))
        .await
        .expect("a query")
        .expect("a row");
    assert_eq!(row.try_get::<i64>("", "n").expect("a count"), 20);
    db.close().await.expect("closed");
}

#[tokio::test]
async fn a_socket_is_noted_once_its_caller_is_known() {
    use futures::{SinkExt as _, StreamExt as _};
    use tokio_tungstenite::tungstenite::Message;
    let world = Fixture::new().await;
    let id = world.sandbox().await;
    let url = format!(
        "{}/v1/sandboxes/{id}/exec/stream",
        world.running.url.replacen("http", "ws", 1)
    );
    for key in [world.key.as_str(), "wrn_wrong"] {
        let (mut socket, _) = tokio_tungstenite::connect_async(&url).await.expect("connected");
        let auth = json!({"type": "auth", "api_key": key}).to_string();
        socket.send(Message::Text(auth.into())).await.expect("sent");
        let start = json!({"type": "start", "cmd": "true"}).to_string();
        let _ = socket.send(Message::Text(start.into())).await;
        while let Some(Ok(_)) = socket.next().await {}
    }
    let entries = world.log("?action=sandbox.exec").await;
    assert_eq!(entries.len(), 1, "{entries:?}");
    assert_eq!(entries[0]["actor_type"], "api_key");
    assert_eq!(entries[0]["resource_id"], id.as_str());
    let (_, all) = world
        .owned(
            "GET",
            "/v1/admin/audit-logs?action=sandbox.exec&actor_type=anonymous",
            None,
        )
        .await;
    assert_eq!(all["entries"][0]["status"], 401, "{all}");
    assert_eq!(all["entries"].as_array().map(Vec::len), Some(1));
    world.end().await;
}

#[tokio::test]
async fn a_keyed_create_is_finished_though_its_client_has_gone() {
    let world = Fixture::new().await;
    // The host does not answer, so that `wait` keeps the request open.
    world.host.hold(wrenn_testkit::simhost::Call::Create);
    let keyed = world
        .request("POST", "/v1/sandboxes?wait=20")
        .header("x-api-key", &world.key)
        .header("idempotency-key", "k")
        .json(&json!({}));
    let keyed = tokio::spawn(keyed.send());
    world
        .host
        .wait_arrived(wrenn_testkit::simhost::Call::Create, 1)
        .await;
    keyed.abort();
    world.host.release(wrenn_testkit::simhost::Call::Create);
    let response = world
        .request("POST", "/v1/sandboxes?wait=20")
        .header("x-api-key", &world.key)
        .header("idempotency-key", "k")
        .json(&json!({}))
        .send()
        .await
        .expect("an answer");
    assert!(response.headers().contains_key("idempotent-replayed"));
    assert_eq!(response.status().as_u16(), 201);
    assert_eq!(world.count().await, 1);
    world.end().await;
}

// ---- Stats and usage ----

#[tokio::test]
async fn stats_show_now_the_peak_and_a_bounded_series() {
    let world = Fixture::new().await;
    let first = world.sandbox().await;
    world.sandbox().await;
    world.running.control.sample_metrics(now()).await.expect("a pass");
    // Repeated within the same step, it changes nothing.
    world.running.control.sample_metrics(now()).await.expect("a pass");
    world
        .keyed("DELETE", &format!("/v1/sandboxes/{first}?wait=20"), None)
        .await;
    world.running.control.sample_metrics(now()).await.expect("a pass");
    for (range, steps) in [("5m", 30), ("1h", 60), ("6h", 72), ("24h", 96), ("30d", 120)] {
        let (status, stats) = world
            .keyed("GET", &format!("/v1/sandboxes/stats?range={range}"), None)
            .await;
        assert_eq!(status, 200, "{stats}");
        assert_eq!(stats["range"], range);
        assert_eq!(stats["current"]["running_count"], 1);
        assert_eq!(stats["current"]["vcpus_reserved"], 1);
        assert_eq!(stats["current"]["memory_mb_reserved"], 512);
        assert_eq!(
            stats["peaks"],
            json!({"running_count": 2, "vcpus": 2, "memory_mb": 1024})
        );
        for list in ["labels", "running", "vcpus", "memory_mb"] {
            let list = stats["series"][list].as_array().expect("a list");
            assert_eq!(list.len(), steps, "{range}");
        }
        let most = |list: &str| {
            let list = stats["series"][list].as_array().expect("a list");
            list.iter().filter_map(Value::as_u64).max()
        };
        assert_eq!(
            (most("running"), most("memory_mb")),
            (Some(2), Some(1024)),
            "{range}"
        );
    }
    let (status, _) = world.keyed("GET", "/v1/capsules/stats", None).await;
    assert_eq!(status, 200);
    let (status, body) = world.keyed("GET", "/v1/sandboxes/stats?range=2h", None).await;
    assert_eq!((status, code(&body)), (400, "invalid_request"));
    // Another team has nothing.
    let (_, other) = world.running.control.create_team("other").await.expect("a team");
    let request = world
        .request("GET", "/v1/sandboxes/stats")
        .header("x-api-key", other);
    let (_, stats) = answer(request).await;
    assert_eq!(stats["peaks"]["running_count"], 0);
    // Old samples go, the hourly ones last.
    world
        .running
        .control
        .prune(now() + 3 * DAY)
        .await
        .expect("a pass");
    let (_, stats) = world.keyed("GET", "/v1/sandboxes/stats", None).await;
    assert_eq!(stats["peaks"]["running_count"], 2);
    world
        .running
        .control
        .prune(now() + 40 * DAY)
        .await
        .expect("a pass");
    let (_, stats) = world.keyed("GET", "/v1/sandboxes/stats", None).await;
    assert_eq!(stats["peaks"]["running_count"], 1);
    world.end().await;
}

/// Sum of a field over a usage answer.
fn sum(usage: &Value, field: &str) -> f64 {
    let points = usage["points"].as_array().expect("points");
    points.iter().filter_map(|point| point[field].as_f64()).sum()
}

#[tokio::test]
async fn usage_is_the_running_time_exactly_however_often_it_is_added_up() {
    let world = Fixture::new().await;
    let (_, body) = world
        .keyed(
            "POST",
            "/v1/sandboxes?wait=20",
            Some(json!({"vcpus": 2, "memory_mb": 1024})),
        )
        .await;
    let id = body["id"].as_str().expect("an id").to_owned();
    // As if it had begun two days ago, at noon.
    let noon = (now().div_euclid(DAY) - 2) * DAY + DAY / 2;
    world
        .sql(
            "UPDATE usage_intervals SET started_at = $1, accrued_until = $1, accruing_to = $1",
            vec![noon.into()],
        )
        .await;
    let control = &world.running.control;
    let end = noon + DAY;
    // Passes that come twice, at the same time, or with a clock that lags behind.
    control.accrue_usage(noon + 3_600_000).await.expect("a pass");
    control.accrue_usage(noon + 3_600_000).await.expect("a pass");
    let (one, two) = tokio::join!(control.accrue_usage(end), control.accrue_usage(end));
    one.expect("a pass");
    two.expect("a pass");
    control.accrue_usage(noon).await.expect("a pass");
    let (status, usage) = world.keyed("GET", "/v1/sandboxes/usage", None).await;
    assert_eq!(status, 200, "{usage}");
    assert_eq!(usage["points"].as_array().map(Vec::len), Some(30));
    let by_day: Vec<f64> = usage["points"]
        .as_array()
        .expect("points")
        .iter()
        .rev()
        .take(3)
        .filter_map(|point| point["cpu_minutes"].as_f64())
        .collect();
    // Half a day each, two CPUs.
    assert_eq!(by_day, [0.0, 1440.0, 1440.0], "{usage}");
    assert!((sum(&usage, "ram_mb_minutes") - 1440.0 * 1024.0).abs() < 1e-6);

    // A pause ends the interval; what came after the last pass is added, and then no more.
    world
        .keyed("POST", &format!("/v1/sandboxes/{id}/pause?wait=20"), None)
        .await;
    let (_, paused) = world.keyed("GET", &format!("/v1/sandboxes/{id}"), None).await;
    assert_eq!(paused["status"], "paused");
    let until: jiff::Timestamp = paused["last_updated"]
        .as_str()
        .expect("a time")
        .parse()
        .expect("RFC 3339");
    control.accrue_usage(now() + 1000).await.expect("a pass");
    control.accrue_usage(now() + DAY).await.expect("a pass");
    let (_, usage) = world.keyed("GET", "/v1/capsules/usage", None).await;
    let minutes = (until.as_millisecond() - noon) as f64 / 60_000.0;
    assert!(
        (sum(&usage, "cpu_minutes") - 2.0 * minutes).abs() < 1e-6,
        "{usage} {minutes}"
    );

    for bad in [
        "?from=x",
        "?from=2026-02-01&to=2026-01-01",
        "?from=2020-01-01&to=2026-01-01",
    ] {
        let (status, body) = world
            .keyed("GET", &format!("/v1/sandboxes/usage{bad}"), None)
            .await;
        assert_eq!((status, code(&body)), (400, "invalid_request"), "{bad}");
    }
    world.end().await;
}

#[tokio::test]
async fn usage_is_counted_once_while_sandboxes_come_and_go() {
    let world = Fixture::new().await;
    let control = &world.running.control;
    let lives = (0..6).map(|_| async {
        let id = world.sandbox().await;
        world
            .keyed("POST", &format!("/v1/sandboxes/{id}/pause?wait=20"), None)
            .await;
        world
            .keyed("POST", &format!("/v1/sandboxes/{id}/resume?wait=20"), None)
            .await;
        world
            .keyed("DELETE", &format!("/v1/sandboxes/{id}?wait=20"), None)
            .await;
    });
    let passes = (0..30).map(|_| control.accrue_usage(now()));
    let begun = now();
    let (_, passes) = tokio::join!(
        futures::future::join_all(lives),
        futures::future::join_all(passes)
    );
    for pass in passes {
        pass.expect("a pass");
    }
    let most = (now() - begun) as f64 / 60_000.0 * 6.0;
    control.accrue_usage(now() + 1000).await.expect("a pass");
    assert_eq!(
        world.rows("usage_intervals").await,
        0,
        "all have ended and are counted"
    );
    let (_, usage) = world.keyed("GET", "/v1/sandboxes/usage", None).await;
    let used = sum(&usage, "cpu_minutes");
    assert!(used > 0.0 && used <= most, "{used} of at most {most}");
    assert!(
        (sum(&usage, "ram_mb_minutes") - used * 512.0).abs() < 1e-6,
        "{usage}"
    );
    world.end().await;
}

#[tokio::test]
async fn what_a_deleted_team_left_is_removed() {
    let world = Fixture::new().await;
    world.sandbox().await;
    world.running.control.sample_metrics(now()).await.expect("a pass");
    world
        .owned(
            "POST",
            "/v1/channels",
            Some(webhook("ops", "http://hooks.example.com/")),
        )
        .await;
    world.running.control.prune(now()).await.expect("a pass");
    assert_eq!(
        (world.rows("metric_snapshots").await, world.rows("channels").await),
        (3, 1)
    );
    world
        .sql(
            "UPDATE teams SET deleted_at = $2 WHERE id = $1",
            vec![world.team.0.into(), now().into()],
        )
        .await;
    world.running.control.prune(now()).await.expect("a pass");
    assert_eq!(
        (world.rows("metric_snapshots").await, world.rows("channels").await),
        (0, 0)
    );
    world.end().await;
}

// ---- Channels ----

fn webhook(name: &str, url: &str) -> Value {
    json!({
        "name": name, "provider": "webhook", "config": {"url": url},
        "events": ["capsule.running", "capsule.paused"],
    })
}

/// A newer version's words, or a secret that was replaced.
#[tokio::test]
async fn a_channel_that_cannot_be_read_takes_no_other_with_it() {
    let world = Fixture::new().await;
    let mut ids = Vec::new();
    for name in ["damaged", "fine", "sealed"] {
        let (status, made) = world
            .owned(
                "POST",
                "/v1/channels",
                Some(webhook(name, "http://hooks.example.com/")),
            )
            .await;
        assert_eq!(status, 201, "{made}");
        ids.push(made["id"].as_str().expect("an id").to_owned());
    }
    world
        .sql(
            "UPDATE channels SET provider = 'pigeon' WHERE name = 'damaged'",
            Vec::new(),
        )
        .await;
    world
        .sql(
            "UPDATE channels SET config = 'x' WHERE name = 'sealed'",
            Vec::new(),
        )
        .await;
    let (status, list) = world.owned("GET", "/v1/channels", None).await;
    assert_eq!(status, 200, "{list}");
    let list = list.as_array().expect("a list");
    let names: Vec<_> = list.iter().map(|channel| channel["name"].as_str()).collect();
    assert_eq!(names, [Some("fine"), Some("sealed")]);
    // A page that is shorter than its limit would be taken for the last one.
    let (_, page) = world.owned("GET", "/v1/channels?limit=2", None).await;
    assert_eq!(page.as_array().map(Vec::len), Some(2), "{page}");
    let (_, page) = world.owned("GET", "/v1/channels?limit=1", None).await;
    assert_eq!(page[0]["name"], "fine", "{page}");
    // The events of the others go on, and what cannot be opened can be given anew.
    let event = world.event(ChannelEventKind::CapsuleRunning);
    world.running.control.notify(&event).await.expect("told");
    assert_eq!(world.rows("channel_deliveries").await, 2);
    let path = format!("/v1/channels/{}", ids[2]);
    assert_eq!(world.owned("GET", &path, None).await.1["config"], json!({}));
    let config = json!({"config": {"url": "http://hooks.example.com/new"}});
    let (status, shown) = world.owned("PUT", &format!("{path}/config"), Some(config)).await;
    assert_eq!(
        (status, shown["config"]["url"].is_string()),
        (200, true),
        "{shown}"
    );
    let damaged = format!("/v1/channels/{}", ids[0]);
    assert_eq!(world.owned("DELETE", &damaged, None).await.0, 204);
    world.end().await;
}

#[tokio::test]
async fn a_channel_is_made_shown_changed_and_deleted_without_its_secrets() {
    let world = Fixture::new().await;
    let (status, made) = world
        .owned(
            "POST",
            "/v1/channels",
            Some(webhook("ops", "http://hooks.example.com/very/secret")),
        )
        .await;
    assert_eq!(status, 201, "{made}");
    let secret = made["secret"].as_str().expect("shown once").to_owned();
    assert!(secret.starts_with("whsec_"));
    let id = made["id"].as_str().expect("an id").to_owned();
    let path = format!("/v1/channels/{id}");
    let (status, shown) = world.owned("GET", &path, None).await;
    assert_eq!(status, 200);
    assert!(shown.get("secret").is_none());
    let text = shown.to_string();
    assert!(!text.contains(&secret) && !text.contains("very"), "{text}");
    assert_eq!(shown["config"]["url"], "http://hooks.example.com/••••");
    let row = world
        .db
        .query_one_raw(Statement::from_string(
            world.db.get_database_backend(),
            "SELECT config FROM channels",
        ))
        .await
        .expect("a query")
        .expect("a row");
    let stored: String = row.try_get("", "config").expect("text");
    assert!(!stored.contains("very") && !stored.contains(&secret), "{stored}");

    let (status, body) = world
        .owned(
            "POST",
            "/v1/channels",
            Some(webhook("ops", "http://other.example.com/")),
        )
        .await;
    assert_eq!((status, code(&body)), (409, "conflict"));
    let (status, body) = world
        .owned(
            "PATCH",
            &path,
            Some(json!({"name": "new", "events": ["host.up", "host.up"]})),
        )
        .await;
    assert_eq!(
        (status, &body["name"], &body["events"]),
        (200, &json!("new"), &json!(["host.up"]))
    );
    let (status, body) = world
        .owned(
            "PUT",
            &format!("{path}/config"),
            Some(json!({"config": {"url": "http://b.example.com/"}})),
        )
        .await;
    assert_eq!(status, 200, "{body}");
    assert!(
        body["secret"].as_str().is_some_and(|new| new != secret),
        "rotated"
    );
    let (_, list) = world.owned("GET", "/v1/channels", None).await;
    assert_eq!(list.as_array().map(Vec::len), Some(1));

    // Members look, others see nothing.
    let member = world.user("member").await;
    let (status, _) = world.by(member, "GET", &path, None).await;
    assert_eq!(status, 200);
    for (method, path, body) in [
        ("POST", "/v1/channels", Some(webhook("x", "http://x.example.com"))),
        ("PATCH", path.as_str(), Some(json!({"name": "y"}))),
        ("DELETE", path.as_str(), None),
        ("POST", "/v1/channels/test", Some(json!({"channel_id": id}))),
    ] {
        let (status, body) = world.by(member, method, path, body).await;
        assert_eq!((status, code(&body)), (403, "forbidden"), "{method} {path}");
    }
    let (status, _) = world.keyed("GET", &path, None).await;
    assert_eq!(status, 401);
    let admin = world.user("admin").await;
    let (status, _) = world.by(admin, "DELETE", &path, None).await;
    assert_eq!(status, 204);
    let (status, _) = world.owned("GET", &path, None).await;
    assert_eq!(status, 404);
    let log = world.log("?resource_type=channel").await;
    assert!(!json!(log).to_string().contains("secret"), "{log:?}");
    world.end().await;
}

#[tokio::test]
async fn configurations_are_checked_per_provider() {
    let world = Fixture::new().await;
    for (provider, config, part) in [
        ("slack", json!({}), "webhook_url"),
        (
            "slack",
            json!({"webhook_url": "http://x.example", "url": "y"}),
            "'url'",
        ),
        ("slack", json!({"webhook_url": "ftp://x.example"}), "https"),
        (
            "slack",
            json!({"webhook_url": "http://me:pw@x.example"}),
            "password",
        ),
        (
            "telegram",
            json!({"bot_token": "a/b", "chat_id": "1"}),
            "bot_token",
        ),
        ("telegram", json!({"bot_token": "1:a"}), "chat_id"),
        (
            "matrix",
            json!({"homeserver_url": "nonsense", "access_token": "t", "room_id": "!r"}),
            "URL",
        ),
        (
            "webhook",
            json!({"url": "http://x.example", "secret": "a b"}),
            "secret",
        ),
    ] {
        let body = json!({"name": "n", "provider": provider, "config": config, "events": ["host.up"]});
        let (status, body) = world.owned("POST", "/v1/channels", Some(body)).await;
        assert_eq!(status, 400, "{provider} {config}");
        assert!(message(&body).contains(part), "{body}");
    }
    for body in [
        json!({"name": "n", "provider": "pager", "config": {}, "events": ["host.up"]}),
        json!({"name": "n", "provider": "slack", "config": {"webhook_url": "http://x.example"}, "events": []}),
        json!({"name": "n", "provider": "slack", "config": {"webhook_url": "http://x.example"}, "events": ["x"]}),
        json!({"name": " ", "provider": "slack", "config": {"webhook_url": "http://x.example"}, "events": ["host.up"]}),
    ] {
        let (status, answer) = world.owned("POST", "/v1/channels", Some(body.clone())).await;
        assert_eq!(status, 400, "{body} {answer}");
    }
    world.end().await;
}

#[tokio::test]
async fn private_addresses_are_refused_unless_allowed() {
    let sink = Sink::new(&[]).await;
    let world = Fixture::with(|config| config.around.allow_private_webhooks = false).await;
    let port = sink.url.rsplit(':').next().expect("a port").to_owned();
    for url in [
        sink.url.clone(),
        format!("https://127.0.0.1:{port}/"),
        "https://169.254.169.254/latest".to_owned(),
        "https://[::1]/".to_owned(),
        "https://[::ffff:10.0.0.1]/".to_owned(),
        "https://0x7f.1/".to_owned(),
        "https://2130706433/".to_owned(),
        "http://example.com/".to_owned(),
    ] {
        let (status, body) = world
            .owned("POST", "/v1/channels", Some(webhook("x", &url)))
            .await;
        assert_eq!((status, code(&body)), (400, "invalid_request"), "{url}");
    }
    // A name is resolved when a message is sent, and its private address is not connected to.
    let (status, body) = world
        .owned(
            "POST",
            "/v1/channels/test",
            Some(json!({"provider": "webhook", "config": {"url": format!("https://localhost:{port}/")}})),
        )
        .await;
    assert_eq!(status, 200, "{body}");
    assert_eq!(body["delivered"], false);
    assert!(
        body["error"]
            .as_str()
            .is_some_and(|error| error.contains("private")),
        "{body}"
    );
    assert!(sink.seen().is_empty());
    world.end().await;
}

#[tokio::test]
async fn a_webhook_is_signed_sent_once_and_tried_again_after_failures() {
    let sink = Sink::new(&[503, 302]).await;
    let world = Fixture::new().await;
    let (_, made) = world
        .owned(
            "POST",
            "/v1/channels",
            Some(webhook("ops", &format!("{}/hook", sink.url))),
        )
        .await;
    let secret = made["secret"].as_str().expect("shown once");
    let event = world.event(ChannelEventKind::CapsuleRunning);
    // Told by three consumers at the same time, and one that nobody wants.
    let control = &world.running.control;
    let other = world.event(ChannelEventKind::HostUp);
    let (a, b, c, d) = tokio::join!(
        control.notify(&event),
        control.notify(&event),
        control.notify(&event),
        control.notify(&other),
    );
    for told in [a, b, c, d] {
        told.expect("told");
    }
    let seen = sink.until(&world, 3).await;
    for _ in 0..5 {
        control.deliver_notifications().await.expect("a pass");
    }
    assert_eq!(
        sink.seen().len(),
        3,
        "twice refused, once taken, and the redirect not followed"
    );
    for seen in &seen {
        let header = |name: &str| seen.headers[name].to_str().expect("text").to_owned();
        assert_eq!(seen.path, "/hook");
        assert_eq!(header("wrenn-event-id"), event.id.to_string());
        let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).expect("a key");
        mac.update(format!("{}.{}", header("wrenn-timestamp"), seen.body).as_bytes());
        let wanted = format!("v1={}", hex::encode(mac.finalize().into_bytes()));
        assert_eq!(header("wrenn-signature"), wanted);
        let body: Value = serde_json::from_str(&seen.body).expect("JSON");
        assert_eq!(body["event"], "capsule.running");
        assert_eq!(body["resource"], json!({"id": "sb-1", "type": "sandbox"}));
        assert_eq!(body["details"]["template"], "minimal");
    }
    let path = format!("/v1/channels/{}", made["id"].as_str().expect("an id"));
    let (_, shown) = world.owned("GET", &path, None).await;
    assert!(shown["delivered_at"].is_string(), "{shown}");
    assert!(
        shown["last_error"]
            .as_str()
            .is_some_and(|error| error.contains("302")),
        "{shown}"
    );
    world.end().await;
}

#[tokio::test]
async fn a_message_is_given_up_after_its_attempts_and_dropped_with_its_channel() {
    let sink = Sink::new(&[500; 50]).await;
    let world = Fixture::with(|config| config.around.delivery_attempts = 3).await;
    let (_, made) = world
        .owned("POST", "/v1/channels", Some(webhook("ops", &sink.url)))
        .await;
    let control = &world.running.control;
    control
        .notify(&world.event(ChannelEventKind::CapsulePaused))
        .await
        .expect("told");
    sink.until(&world, 3).await;
    for _ in 0..5 {
        control.deliver_notifications().await.expect("a pass");
    }
    assert_eq!(sink.seen().len(), 3);
    let path = format!("/v1/channels/{}", made["id"].as_str().expect("an id"));
    let (_, shown) = world.owned("GET", &path, None).await;
    assert!(
        shown["last_error"]
            .as_str()
            .is_some_and(|error| error.contains("500")),
        "{shown}"
    );
    let (status, _) = world.owned("DELETE", &path, None).await;
    assert_eq!(status, 204);
    assert_eq!(world.rows("channel_deliveries").await, 0);
    world.end().await;
}

#[tokio::test]
async fn several_workers_send_each_message_once() {
    let sink = Sink::new(&[]).await;
    let world = Fixture::new().await;
    world
        .owned("POST", "/v1/channels", Some(webhook("ops", &sink.url)))
        .await;
    let control = &world.running.control;
    let mut wanted = BTreeSet::new();
    for _ in 0..20 {
        let event = world.event(ChannelEventKind::CapsuleRunning);
        wanted.insert(event.id.to_string());
        control.notify(&event).await.expect("told");
    }
    let passes = (0..6).map(|_| control.deliver_notifications());
    for pass in futures::future::join_all(passes).await {
        pass.expect("a pass");
    }
    let seen = sink.until(&world, 20).await;
    let got: Vec<String> = seen
        .iter()
        .map(|seen| seen.headers["wrenn-event-id"].to_str().expect("text").to_owned())
        .collect();
    assert_eq!(got.len(), 20);
    assert_eq!(got.into_iter().collect::<BTreeSet<_>>(), wanted);
    world.end().await;
}

/// A server that takes connections, and what is said on them, and never answers.
struct Mute {
    url: String,
    accepted: tokio::sync::watch::Receiver<usize>,
    served: tokio::task::JoinHandle<()>,
}

impl Drop for Mute {
    fn drop(&mut self) {
        self.served.abort();
    }
}

impl Mute {
    async fn new() -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
            .await
            .expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("bound"));
        let (count, accepted) = tokio::sync::watch::channel(0);
        let served = tokio::spawn(async move {
            let mut open = Vec::new();
            while let Ok((connection, _)) = listener.accept().await {
                open.push(connection);
                count.send_replace(open.len());
            }
        });
        Self {
            url,
            accepted,
            served,
        }
    }
}

#[tokio::test]
async fn a_teams_mute_webhooks_do_not_hold_up_anothers() {
    let mut mute = Mute::new().await;
    let sink = Sink::new(&[]).await;
    let world = Fixture::with(|config| {
        // Longer than the test may take.
        config.around.delivery_timeout = DEADLINE * 10;
        config.around.delivery_interval = DEADLINE * 10;
    })
    .await;
    for name in ["one", "two", "three"] {
        let (status, body) = world
            .owned("POST", "/v1/channels", Some(webhook(name, &mute.url)))
            .await;
        assert_eq!(status, 201, "{body}");
    }
    let control = &world.running.control;
    for _ in 0..150 {
        let event = world.event(ChannelEventKind::CapsuleRunning);
        control.notify(&event).await.expect("told");
    }
    // As many as one team may have under way: at most two to a channel.
    tokio::time::timeout(DEADLINE, mute.accepted.wait_for(|accepted| *accepted == 4))
        .await
        .expect("not as many")
        .expect("it listens");

    let other = control
        .create_user("other@example.com", "other", None)
        .await
        .expect("a user");
    let session = control.issue_session(other, None).await.expect("a session");
    let call = |method: &str, path: &str| world.request(method, path).bearer_auth(&session);
    let (_, teams) = answer(call("GET", "/v1/teams")).await;
    let team: TeamId = teams[0]["id"].as_str().expect("an id").parse().expect("an id");
    let (status, body) = answer(call("POST", "/v1/channels").json(&webhook("ops", &sink.url))).await;
    assert_eq!(status, 201, "{body}");
    for _ in 0..5 {
        let event = ChannelEvent {
            team,
            ..world.event(ChannelEventKind::CapsuleRunning)
        };
        control.notify(&event).await.expect("told");
    }
    let arrived = async {
        while sink.seen().len() < 5 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(DEADLINE, arrived)
        .await
        .expect("they arrive");
    assert_eq!(*mute.accepted.borrow(), 4, "no more than their share");
    world.end().await;
}

#[tokio::test]
async fn a_channel_keeps_so_many_messages_waiting_and_no_more() {
    let world = Fixture::with(|config| {
        config.around.delivery_pending = 3;
        config.around.delivery_backoff = Duration::from_secs(3600);
    })
    .await;
    let sink = Sink::new(&[500; 20]).await;
    let control = &world.running.control;
    for name in ["ops", "dev"] {
        world
            .owned("POST", "/v1/channels", Some(webhook(name, &sink.url)))
            .await;
    }
    for _ in 0..5 {
        let event = world.event(ChannelEventKind::CapsuleRunning);
        control.notify(&event).await.expect("told");
    }
    sink.until(&world, 10).await;
    control.prune(now()).await.expect("a pass");
    assert_eq!(world.rows("channel_deliveries WHERE status = 'pending'").await, 6);
    assert_eq!(
        world
            .rows("channel_deliveries WHERE status = 'given_up' AND last_error LIKE 'too many%'")
            .await,
        4
    );
    world.end().await;
}

#[tokio::test]
async fn every_provider_gets_its_own_form() {
    let sink = Sink::new(&[]).await;
    let url = sink.url.clone();
    let world = Fixture::with(|config| config.around.telegram_url = url).await;
    let hook = json!({"webhook_url": format!("{}/hook", sink.url)});
    for (provider, config, path, pointer) in [
        ("slack", hook.clone(), "/hook", "/text"),
        ("discord", hook.clone(), "/hook", "/content"),
        (
            "teams",
            hook.clone(),
            "/hook",
            "/attachments/0/content/body/0/text",
        ),
        ("googlechat", hook, "/hook", "/text"),
        (
            "telegram",
            json!({"bot_token": "12:ab", "chat_id": "-5"}),
            "/bot12:ab/sendMessage",
            "/text",
        ),
        (
            "matrix",
            json!({"homeserver_url": sink.url, "access_token": "tok", "room_id": "!r:x/y"}),
            "/_matrix/client/v3/rooms/!r:x%2Fy/send/m.room.message/",
            "/body",
        ),
    ] {
        let before = sink.seen().len();
        let body = json!({"provider": provider, "config": config});
        let (status, answer) = world.owned("POST", "/v1/channels/test", Some(body)).await;
        assert_eq!(
            (status, &answer["delivered"]),
            (200, &json!(true)),
            "{provider} {answer}"
        );
        let seen = sink.seen();
        let last = seen.last().expect("a request");
        assert_eq!(seen.len(), before + 1);
        assert!(last.path.starts_with(path), "{provider}: {}", last.path);
        let body: Value = serde_json::from_str(&last.body).expect("JSON");
        let text = body.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
        assert!(text.contains("channel.test"), "{provider}: {body}");
        if provider == "matrix" {
            assert_eq!(last.headers["authorization"], "Bearer tok");
        }
    }
    world.end().await;
}

// ---- Creates that are repeated ----

impl Fixture {
    async fn create_once(&self, key: &str, body: &Value) -> (u16, Value, bool) {
        let response = self
            .request("POST", "/v1/sandboxes")
            .header("x-api-key", &self.key)
            .header("idempotency-key", key)
            .json(body)
            .send()
            .await
            .expect("an answer");
        let replayed = response.headers().contains_key("idempotent-replayed");
        let status = response.status().as_u16();
        (status, response.json().await.expect("JSON"), replayed)
    }

    async fn count(&self) -> usize {
        let (_, list) = self.keyed("GET", "/v1/sandboxes?all=true", None).await;
        list.as_array().expect("a list").len()
    }
}

#[tokio::test]
async fn a_repeated_create_is_answered_as_before() {
    let world = Fixture::new().await;
    let body = json!({"metadata": {"a": "1"}});
    let (status, first, replayed) = world.create_once("k1", &body).await;
    assert_eq!((status, replayed), (202, false), "{first}");
    let (status, again, replayed) = world.create_once("k1", &body).await;
    assert_eq!((status, replayed), (202, true));
    assert_eq!(first, again);
    let (status, other, _) = world.create_once("k1", &json!({})).await;
    assert_eq!((status, code(&other)), (409, "conflict"));
    let (status, _, replayed) = world.create_once("k2", &body).await;
    assert_eq!((status, replayed), (202, false));
    assert_eq!(world.count().await, 2);
    // The other name of the route is the same route.
    let request = world
        .request("POST", "/v1/capsules")
        .header("x-api-key", &world.key)
        .header("idempotency-key", "k1")
        .json(&body);
    let (_, capsule) = answer(request).await;
    assert_eq!(capsule["id"], first["id"]);
    // What came to nothing may be tried again.
    let wrong = json!({"template": "no-such"});
    for _ in 0..2 {
        let (status, _, replayed) = world.create_once("k3", &wrong).await;
        assert_eq!((status, replayed), (404, false));
    }
    let (status, _, _) = world.create_once("k3", &body).await;
    assert_eq!(status, 202);
    // Another team's same key is another key; a wrong key is refused as ever.
    let (_, other) = world.running.control.create_team("other").await.expect("a team");
    for (key, wanted) in [(other.as_str(), 202), ("wrn_wrong", 401)] {
        let request = world
            .request("POST", "/v1/sandboxes")
            .header("x-api-key", key)
            .header("idempotency-key", "k1")
            .json(&body);
        let (status, made) = answer(request).await;
        assert_eq!(status, wanted, "{made}");
        assert_ne!(made["id"], first["id"]);
    }
    let (status, body, _) = world.create_once(&"x".repeat(256), &body).await;
    assert_eq!((status, code(&body)), (400, "invalid_request"));
    // Repetitions are no further actions.
    let created = world.log("?action=sandbox.create&status=202").await;
    assert_eq!(created.len(), 3, "{created:?}");
    assert!(created.iter().all(|entry| entry["resource_id"].is_string()));
    world.end().await;
}

#[tokio::test]
async fn a_platform_admins_creates_happen_once_and_are_theirs_alone() {
    let world = World::new().await;
    let admin = world.session(world.bootstrap.user_id, None).await;
    let ask = async |path: &str, body: Value| {
        let request = world
            .http
            .post(world.url(path))
            .bearer_auth(&admin)
            .header("idempotency-key", "k")
            .json(&body);
        answer(request).await
    };
    let create = "/v1/admin/capsules?wait=20";
    let (status, first) = ask(create, json!({})).await;
    assert_eq!(status, 201, "{first}");
    let (status, again) = ask(create, json!({})).await;
    assert_eq!((status, &again["id"]), (201, &first["id"]));
    // Under the same key in the team's collection it is another create.
    let (status, own) = ask("/v1/sandboxes?wait=20", json!({})).await;
    assert_eq!(status, 201, "{own}");
    assert_ne!(own["id"], first["id"]);
    let snapshot = async |id: &Value, name: &str| {
        let id = id.as_str().expect("an id");
        let path = format!("/v1/admin/capsules/{id}/snapshot");
        ask(&path, json!({ "name": name })).await
    };
    let (status, made) = snapshot(&first["id"], "golden").await;
    assert_eq!(status, 201, "{made}");
    let (status, again) = snapshot(&first["id"], "golden").await;
    assert_eq!((status, &again["id"]), (201, &made["id"]));
    // Another sandbox is another request, though key and body are the same.
    let (status, refused) = snapshot(&json!("sb-00000000-0000-0000-0000-000000000000"), "golden").await;
    assert_eq!((status, code(&refused)), (409, "conflict"), "{refused}");
    // What an admin was told is nothing for somebody who is none any more.
    let changed = world
        .database()
        .await
        .execute_unprepared("UPDATE users SET is_admin = FALSE")
        .await
        .expect("changed");
    assert_eq!(changed.rows_affected(), 1);
    let (status, refused) = ask(create, json!({})).await;
    assert_eq!((status, code(&refused)), (403, "forbidden"), "{refused}");
    world.running.stop().await;
}

#[tokio::test]
async fn of_concurrent_duplicates_one_executes() {
    let world = Fixture::new().await;
    let body = json!({});
    let calls = (0..12).map(|_| world.create_once("same", &body));
    let answers = futures::future::join_all(calls).await;
    let ids: BTreeSet<_> = answers
        .iter()
        .map(|(status, body, _)| {
            assert_eq!(*status, 202, "{body}");
            body["id"].as_str().expect("an id").to_owned()
        })
        .collect();
    assert_eq!(ids.len(), 1);
    assert_eq!(answers.iter().filter(|(_, _, replayed)| !replayed).count(), 1);
    assert_eq!(world.count().await, 1);
    world.end().await;
}

#[tokio::test]
async fn a_claim_whose_process_died_is_taken_over_by_one() {
    let world = Fixture::with(|config| config.around.idempotency_wait = Duration::ZERO).await;
    let body = json!({});
    let (_, first, _) = world.create_once("k", &body).await;
    // As if the process had died before it could store the answer.
    let far = now() + DAY;
    world
        .sql(
            "UPDATE idempotency_keys SET status = NULL, body = NULL, claim_ends_at = $1",
            vec![far.into()],
        )
        .await;
    let (status, waiting, _) = world.create_once("k", &body).await;
    assert_eq!((status, code(&waiting)), (409, "conflict"));
    assert!(message(&waiting).contains("under way"), "{waiting}");
    world
        .sql("UPDATE idempotency_keys SET claim_ends_at = 0", Vec::new())
        .await;
    let calls = (0..8).map(|_| world.create_once("k", &body));
    let answers = futures::future::join_all(calls).await;
    let executed: Vec<_> = answers
        .iter()
        .filter(|(status, _, replayed)| *status == 202 && !replayed)
        .collect();
    assert_eq!(executed.len(), 1, "{answers:?}");
    assert_ne!(executed[0].1["id"], first["id"]);
    // Kept for a day.
    world
        .running
        .control
        .prune(now() + DAY / 2)
        .await
        .expect("a pass");
    assert!(world.create_once("k", &body).await.2);
    world
        .running
        .control
        .prune(now() + 2 * DAY)
        .await
        .expect("a pass");
    assert!(!world.create_once("k", &body).await.2);
    world.end().await;
}

#[tokio::test]
async fn a_claim_is_kept_as_long_as_its_request_runs() {
    let world = Fixture::with(|config| {
        config.around.idempotency_claim = Duration::from_millis(100);
        config.around.idempotency_wait = Duration::ZERO;
    })
    .await;
    world.host.hold(wrenn_testkit::simhost::Call::Create);
    let create = || {
        world
            .request("POST", "/v1/sandboxes?wait=20")
            .header("x-api-key", &world.key)
            .header("idempotency-key", "k")
            .json(&json!({}))
    };
    let first = tokio::spawn(create().send());
    world
        .host
        .wait_arrived(wrenn_testkit::simhost::Call::Create, 1)
        .await;
    let end = || async {
        world
            .db
            .query_one_raw(Statement::from_string(
                world.db.get_database_backend(),
                "SELECT claim_ends_at FROM idempotency_keys",
            ))
            .await
            .expect("a query")
            .expect("a row")
            .try_get::<i64>("", "claim_ends_at")
            .expect("a time")
    };
    let claimed = end().await;
    let deadline = tokio::time::Instant::now() + DEADLINE;
    while end().await <= claimed + 100 {
        assert!(tokio::time::Instant::now() < deadline, "never renewed");
        tokio::task::yield_now().await;
    }
    let busy = create().send().await.expect("an answer");
    assert_eq!(busy.status().as_u16(), 409);
    assert!(busy.headers().contains_key("retry-after"));
    world.host.release(wrenn_testkit::simhost::Call::Create);
    let first = first.await.expect("no panic").expect("an answer");
    assert_eq!(first.status().as_u16(), 201);
    assert_eq!(world.count().await, 1);
    world.end().await;
}

#[tokio::test]
async fn a_sandbox_s_life_is_told_to_its_team_s_channels() {
    let sink = Sink::new(&[]).await;
    let world = Fixture::new().await;
    let mut channel = webhook("ops", &sink.url);
    channel["events"] = json!([
        "capsule.created",
        "capsule.running",
        "capsule.paused",
        "capsule.destroyed",
        "template.snapshot.failed"
    ]);
    world.owned("POST", "/v1/channels", Some(channel)).await;
    let keyed = |method: &str, path: String, body: Value| {
        let method = reqwest::Method::from_bytes(method.as_bytes()).expect("a method");
        let request = world.http.request(method, format!("{}{path}", world.running.url));
        answer(
            request
                .header("x-api-key", &world.key)
                .timeout(DEADLINE)
                .json(&body),
        )
    };
    let (status, body) = keyed("POST", "/v1/sandboxes?wait=20".to_owned(), json!({})).await;
    assert_eq!(status, 201, "{body}");
    let id = body["id"].as_str().expect("an id").to_owned();
    world.host.fail(
        wrenn_testkit::simhost::Call::CreateSnapshot,
        connectrpc::ConnectError::internal("the disk is full"),
    );
    let snapshot = json!({"sandbox_id": id, "name": "half"});
    let (status, body) = keyed("POST", "/v1/snapshots?wait=20".to_owned(), snapshot).await;
    assert!(status >= 400, "{body}");
    keyed("POST", format!("/v1/sandboxes/{id}/pause?wait=20"), json!({})).await;
    keyed("DELETE", format!("/v1/sandboxes/{id}?wait=20"), json!({})).await;
    let mut told: Vec<String> = sink
        .until(&world, 5)
        .await
        .iter()
        .map(|seen| {
            let body: Value = serde_json::from_str(&seen.body).expect("JSON");
            if body["event"] == "template.snapshot.failed" {
                assert_eq!(body["details"]["name"], "half", "{body}");
                let why = body["details"]["error"].as_str().unwrap_or_default();
                assert!(why.contains("the disk is full"), "{body}");
            } else {
                assert_eq!(body["resource"]["id"].as_str(), Some(&*id), "{body}");
            }
            let actor = &body["details"]["actor"];
            assert_eq!(actor["type"], "api_key", "{body}");
            assert!(
                actor["id"].as_str().is_some_and(|id| id.starts_with("key-")) && actor["name"].is_string(),
                "{body}"
            );
            body["event"].as_str().expect("an event").to_owned()
        })
        .collect();
    told.sort();
    assert_eq!(
        told,
        [
            "capsule.created",
            "capsule.destroyed",
            "capsule.paused",
            "capsule.running",
            "template.snapshot.failed"
        ]
    );
    world.end().await;
}

#[tokio::test]
async fn two_control_planes_share_creates_messages_and_usage() {
    let sink = Sink::new(&[]).await;
    let world = Fixture::new().await;
    let second = start(world.config.clone()).await;
    let mut channel = webhook("ops", &sink.url);
    // Of a kind that nothing here causes by itself.
    channel["events"] = json!(["template.snapshot.deleted"]);
    world.owned("POST", "/v1/channels", Some(channel)).await;
    // The same create at both.
    let calls = (0..10).map(|index| {
        let url = if index % 2 == 0 {
            &world.running.url
        } else {
            &second.url
        };
        let request = world
            .http
            .post(format!("{url}/v1/sandboxes?wait=20"))
            .timeout(DEADLINE)
            .header("x-api-key", &world.key)
            .header("idempotency-key", "k")
            .json(&json!({}));
        answer(request)
    });
    let ids: BTreeSet<String> = futures::future::join_all(calls)
        .await
        .into_iter()
        .map(|(status, body)| {
            assert_eq!(status, 201, "{body}");
            body["id"].as_str().expect("an id").to_owned()
        })
        .collect();
    assert_eq!(ids.len(), 1);
    // The same events told by both, delivered by both.
    let (one, two) = (&world.running.control, &second.control);
    let events: Vec<_> = (0..10)
        .map(|_| world.event(ChannelEventKind::SnapshotDeleted))
        .collect();
    for event in &events {
        let (a, b) = tokio::join!(one.notify(event), two.notify(event));
        a.expect("told");
        b.expect("told");
    }
    let (a, b) = tokio::join!(one.deliver_notifications(), two.deliver_notifications());
    a.expect("a pass");
    b.expect("a pass");
    assert_eq!(sink.until(&world, 10).await.len(), 10);
    // The same samples and the same roll-up.
    let at = now();
    let (a, b) = tokio::join!(one.sample_metrics(at), two.sample_metrics(at));
    a.expect("a pass");
    b.expect("a pass");
    assert_eq!(world.rows("metric_snapshots").await, 3);
    let noon = (now().div_euclid(DAY) - 2) * DAY + DAY / 2;
    world
        .sql(
            "UPDATE usage_intervals SET accrued_until = $1, accruing_to = $1",
            vec![noon.into()],
        )
        .await;
    let passes = (0..8).map(|index| {
        let control = if index % 2 == 0 { one } else { two };
        control.accrue_usage(noon + DAY)
    });
    for pass in futures::future::join_all(passes).await {
        pass.expect("a pass");
    }
    let (_, usage) = world.keyed("GET", "/v1/sandboxes/usage", None).await;
    assert!((sum(&usage, "cpu_minutes") - 1440.0).abs() < 1e-6, "{usage}");
    second.stop().await;
    world.end().await;
}

#[tokio::test]
async fn a_kept_answer_with_a_secret_is_sealed() {
    let world = Fixture::new().await;
    let body = webhook("ops", "http://hooks.example.com/");
    let mut secrets = BTreeSet::new();
    for _ in 0..2 {
        let request = world
            .request("POST", "/v1/channels")
            .bearer_auth(world.token(world.owner, world.team).await)
            .header("idempotency-key", "c1")
            .json(&body);
        let (status, made) = answer(request).await;
        assert_eq!(status, 201, "{made}");
        secrets.insert(made["secret"].as_str().expect("shown").to_owned());
    }
    assert_eq!(secrets.len(), 1);
    let row = world
        .db
        .query_one_raw(Statement::from_string(
            world.db.get_database_backend(),
            "SELECT body FROM idempotency_keys",
        ))
        .await
        .expect("a query")
        .expect("a row");
    let stored: String = row.try_get("", "body").expect("text");
    assert!(
        stored.starts_with("v1:") && !stored.contains("whsec_"),
        "{stored}"
    );
    // Another user of the same team does not get what was shown once.
    let admin = world.user("admin").await;
    let request = world
        .request("POST", "/v1/channels")
        .bearer_auth(world.token(admin, world.team).await)
        .header("idempotency-key", "c1")
        .json(&body);
    let (status, refused) = answer(request).await;
    assert_eq!(
        (status, code(&refused)),
        (409, "conflict"),
        "the name is taken: {refused}"
    );
    world.end().await;
}
