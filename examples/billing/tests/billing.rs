//! The extension in a running control plane, over HTTP.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use wrenn_control::domain::{self, Millis, TeamId, UserId};
use wrenn_control::extension::Extension as _;
use wrenn_control::sea_orm::{ConnectionTrait as _, DatabaseConnection, Statement};
use wrenn_control::{Bootstrap, ControlConfig, ControlPlane, MasterSecret};
use wrenn_example_billing::{Billing, close};
use wrenn_testkit::servers::Postgres;
use wrenn_testkit::simhost::SimHost;

const DEADLINE: Duration = Duration::from_secs(100);
const DAY: Millis = 24 * 3600 * 1000;

fn config(dir: &std::path::Path, postgres: Option<&Postgres>) -> ControlConfig {
    let mut config = ControlConfig::new(dir);
    config.database_url = postgres.map(Postgres::url);
    config.secret = Some(MasterSecret::generate().expect("randomness"));
    config.timings.shutdown_grace = Duration::from_millis(200);
    // The tests move usage by hand.
    config.around.usage_interval = Duration::from_secs(3600);
    config
}

struct World {
    control: ControlPlane,
    url: String,
    http: reqwest::Client,
    bootstrap: Bootstrap,
    _host: SimHost,
    stop: Option<oneshot::Sender<()>>,
    served: JoinHandle<wrenn_control::Result<()>>,
    _dir: tempfile::TempDir,
}

struct Person {
    token: String,
    team: String,
}

impl World {
    async fn new(postgres: Option<&Postgres>) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let control = ControlPlane::builder(config(dir.path(), postgres))
            .extension(Billing)
            .build()
            .await
            .expect("the control plane builds");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let url = format!("http://{}", listener.local_addr().expect("bound"));
        let (stop, stopped) = oneshot::channel();
        let served = tokio::spawn(control.clone().run(vec![listener], async move {
            let _ = stopped.await;
        }));
        let bootstrap = control
            .bootstrap()
            .await
            .expect("bootstrap")
            .expect("the first start");
        let token = control.issue_host_token(None).await.expect("a token");
        let mut host = SimHost::start(&url).await;
        host.register(&token.token).await;
        host.heartbeat().await;
        Self {
            control,
            url,
            http: reqwest::Client::new(),
            bootstrap,
            _host: host,
            stop: Some(stop),
            served,
            _dir: dir,
        }
    }

    async fn end(mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
        tokio::time::timeout(DEADLINE, self.served)
            .await
            .expect("shutdown ends")
            .expect("no panic")
            .expect("a clean end");
    }

    async fn send(&self, request: reqwest::RequestBuilder) -> (u16, Value) {
        let response = request.timeout(DEADLINE).send().await.expect("an answer");
        let status = response.status().as_u16();
        let text = response.text().await.expect("a body");
        (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    /// With the first team's key.
    async fn key(&self, method: &str, path: &str, body: Option<Value>) -> (u16, Value) {
        let request = self
            .request(method, path, body)
            .header("x-api-key", &self.bootstrap.api_key);
        self.send(request).await
    }

    /// With a session.
    async fn session(&self, token: &str, method: &str, path: &str, body: Option<Value>) -> (u16, Value) {
        let request = self.request(method, path, body).bearer_auth(token);
        self.send(request).await
    }

    fn request(&self, method: &str, path: &str, body: Option<Value>) -> reqwest::RequestBuilder {
        let method = reqwest::Method::from_bytes(method.as_bytes()).expect("a method");
        let request = self.http.request(method, format!("{}{path}", self.url));
        match body {
            Some(body) => request.json(&body),
            None => request,
        }
    }

    async fn user(&self, name: &str) -> UserId {
        let email = format!("{name}@example.com");
        self.control
            .create_user(&email, name, None)
            .await
            .expect("a user")
    }

    /// Somebody with a team of their own.
    async fn person(&self, name: &str) -> Person {
        let user = self.user(name).await;
        let token = self.control.issue_session(user, None).await.expect("a session");
        let (_, teams) = self.session(&token, "GET", "/v1/teams", None).await;
        let team = teams[0]["id"].as_str().expect("a team").to_owned();
        Person { token, team }
    }

    /// A session of a platform admin.
    async fn admin(&self) -> String {
        let user = self.user("admin").await;
        self.control
            .grant_platform_admin("admin@example.com")
            .await
            .expect("granted");
        self.control.issue_session(user, None).await.expect("a session")
    }

    fn database(&self) -> &DatabaseConnection {
        self.control.services().database()
    }

    async fn rows(&self, sql: &str) -> Vec<i64> {
        let db = self.database();
        let statement = Statement::from_string(db.get_database_backend(), sql);
        db.query_all_raw(statement)
            .await
            .expect("rows")
            .into_iter()
            .map(|row| row.try_get_by_index(0).expect("a number"))
            .collect()
    }

    async fn names(&self, table: &str) -> Vec<String> {
        let db = self.database();
        let sql = format!("SELECT version FROM {table} ORDER BY version");
        db.query_all_raw(Statement::from_string(db.get_database_backend(), sql))
            .await
            .expect("rows")
            .into_iter()
            .map(|row| row.try_get_by_index(0).expect("a name"))
            .collect()
    }
}

fn month(at: Millis) -> String {
    let date = domain::timestamp(at).to_string();
    date[..7].to_owned()
}

/// What must hold on either database.
async fn everything_works(postgres: Option<&Postgres>) {
    let world = World::new(postgres).await;

    // The migrations have a record of their own.
    let own = world.names("extension_billing_migrations").await;
    assert_eq!(own, ["m0001_plans", "m0002_charges", "m0003_starts"]);
    let core = world.names("seaql_migrations").await;
    assert!(core.iter().any(|name| name == "m0001_initial"), "{core:?}");
    assert!(own.iter().all(|name| !core.contains(name)), "{core:?}");

    // The routes are described where the others are, with their errors and who may call them.
    let (status, document) = world.key("GET", "/openapi.yaml", None).await;
    let document = document.as_str().expect("text");
    assert_eq!(status, 200);
    for route in [
        "/v1/billing/invoice:",
        "/v1/billing/plan:",
        "/v1/admin/billing/{team}/suspension:",
    ] {
        assert!(document.contains(route), "{route}");
    }
    let described = document.split_once("/v1/billing/plan:").expect("the route").1;
    let described = described.split_once("operationId").expect("an operation").1;
    let described = &described[..described.find("\n  /").unwrap_or(described.len())];
    for part in ["'503'", "'500'", "session: []"] {
        assert!(described.replace('"', "'").contains(part), "{part}: {described}");
    }

    // Whoever is nobody sees nothing; keys and sessions see their team's.
    let this_month = month(domain::now());
    let path = format!("/v1/billing/invoice?month={this_month}");
    let (status, _) = world.send(world.request("GET", &path, None)).await;
    assert_eq!(status, 401);
    let (status, empty) = world.key("GET", &path, None).await;
    assert_eq!((status, &empty["total_micros"]), (200, &json!(0)), "{empty}");
    for bad in [
        "",
        "?month=2026",
        "?month=2026-13",
        "?month=26-001",
        "?month=2026-1%C3%A9",
    ] {
        let (status, body) = world.key("GET", &format!("/v1/billing/invoice{bad}"), None).await;
        assert_eq!(
            (status, &body["error"]["code"]),
            (400, &json!("invalid_request")),
            "{bad}: {body}"
        );
    }
    let (status, body) = world.key("GET", "/v1/billing/invoice?month=9999-12", None).await;
    assert_eq!((status, &body["lines"]), (200, &json!([])), "{body}");

    // Plans: owners choose, members do not, keys are no persons.
    let ada = world.person("ada").await;
    let bob = world.user("bob").await;
    let members = format!("/v1/teams/{}/members", ada.team);
    let (status, body) = world
        .session(
            &ada.token,
            "POST",
            &members,
            Some(json!({"email": "bob@example.com"})),
        )
        .await;
    assert_eq!(status, 201, "{body}");
    let team: TeamId = ada.team.parse().expect("a team id");
    let bob = world
        .control
        .issue_session(bob, Some(team))
        .await
        .expect("a session");
    let committed = || Some(json!({"plan": "committed"}));
    let (status, body) = world.session(&bob, "PUT", "/v1/billing/plan", committed()).await;
    assert_eq!(
        (status, &body["error"]["code"]),
        (403, &json!("forbidden")),
        "{body}"
    );
    let (status, _) = world.key("PUT", "/v1/billing/plan", committed()).await;
    assert_eq!(status, 401);
    let (status, body) = world
        .session(
            &ada.token,
            "PUT",
            "/v1/billing/plan",
            Some(json!({"plan": "gold"})),
        )
        .await;
    assert_eq!(
        (status, &body["error"]["code"]),
        (400, &json!("invalid_request")),
        "{body}"
    );
    let (status, body) = world
        .session(&ada.token, "PUT", "/v1/billing/plan", committed())
        .await;
    assert_eq!((status, &body["plan"]), (200, &json!("committed")), "{body}");
    let (_, body) = world.session(&bob, "GET", &path, None).await;
    assert_eq!(
        (&body["plan"], &body["team_id"]),
        (&json!("committed"), &json!(ada.team))
    );
    let (_, body) = world.key("GET", &path, None).await;
    assert_eq!(body["plan"], "standard", "another team's plan is its own");

    // It is in the audit log, under its method and path.
    let (_, log) = world
        .session(&ada.token, "GET", "/v1/audit-logs?status=200", None)
        .await;
    let entry = log["entries"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|entry| entry["action"] == "PUT /v1/billing/plan")
        .unwrap_or_else(|| panic!("no entry: {log}"));
    assert_eq!(entry["actor_type"], "user", "{entry}");

    // A day's use, closed by the worker's own step, again and again.
    let (status, sandbox) = world
        .key(
            "POST",
            "/v1/sandboxes?wait=20",
            Some(json!({"vcpus": 1, "memory_mb": 512})),
        )
        .await;
    assert_eq!(
        (status, &sandbox["status"]),
        (201, &json!("running")),
        "{sandbox}"
    );
    let started = domain::now();
    let services = world.control.services();
    let tomorrow = (started / DAY + 1) * DAY;
    close::days_before(services, tomorrow + DAY)
        .await
        .expect("closed");
    let charges = "SELECT cpu_micros + ram_micros FROM billing_charges ORDER BY day";
    let charged = world.rows(charges).await;
    // Today's rest, and tomorrow: a whole day of one vCPU and half a GiB.
    assert_eq!(
        (charged.len(), charged.last()),
        (2, Some(&1_392_000)),
        "{charged:?}"
    );
    for _ in 0..3 {
        close::days_before(services, tomorrow + DAY)
            .await
            .expect("closed");
    }
    // A pass that was cut short before it noted the day does the day again.
    world
        .database()
        .execute_unprepared("DELETE FROM billing_days")
        .await
        .expect("forgotten");
    let both = tokio::join!(
        close::days_before(services, tomorrow + DAY),
        close::days_before(services, tomorrow + DAY),
    );
    assert!(both.0.is_ok() && both.1.is_ok(), "{both:?}");
    assert_eq!(world.rows(charges).await, charged);
    assert!(world.rows("SELECT day FROM billing_days").await.len() > 30);
    // The extension's own worker has nothing to add.
    let [worker] = &Billing.workers()[..] else {
        panic!("one worker")
    };
    worker.run_once(services).await.expect("a pass");
    assert_eq!(world.rows(charges).await, charged);

    // The invoice has it, and nobody else's does.
    let mut total = 0;
    let mut months = vec![month(started), month(tomorrow)];
    months.dedup();
    for month in months {
        let path = format!("/v1/billing/invoice?month={month}");
        let (_, invoice) = world.key("GET", &path, None).await;
        let lines = invoice["lines"].as_array().expect("lines").clone();
        assert!(lines.iter().filter(|line| line["closed"] == true).count() > 0 || month > this_month);
        total += lines
            .iter()
            .filter(|line| line["closed"] == true)
            .map(|line| line["total_micros"].as_i64().expect("whole"))
            .sum::<i64>();
        let sum: i64 = lines
            .iter()
            .filter_map(|line| line["total_micros"].as_i64())
            .sum();
        assert_eq!(invoice["total_micros"], sum);
        let (_, other) = world.session(&ada.token, "GET", &path, None).await;
        assert_eq!(other["lines"], json!([]), "{other}");
    }
    if month(tomorrow) == this_month {
        assert_eq!(total, charged.iter().sum::<i64>());
    }

    // A suspended team starts nothing, under neither name of the route; the rest goes on.
    let admin = world.admin().await;
    let team = world.bootstrap.team_id.to_string();
    let suspension = |team: &str| format!("/v1/admin/billing/{team}/suspension");
    let suspended = |suspended: bool| Some(json!({"suspended": suspended}));
    let (status, _) = world
        .session(&ada.token, "PUT", &suspension(&team), suspended(true))
        .await;
    assert_eq!(status, 403, "owners do not suspend");
    for nobody in [TeamId::new().to_string(), "nonsense".to_owned()] {
        let (status, body) = world
            .session(&admin, "PUT", &suspension(&nobody), suspended(true))
            .await;
        assert_eq!(
            (status, &body["error"]["code"]),
            (404, &json!("not_found")),
            "{body}"
        );
    }
    let (status, body) = world
        .session(&admin, "PUT", &suspension(&team), suspended(true))
        .await;
    assert_eq!((status, &body["suspended"]), (200, &json!(true)), "{body}");
    let id = sandbox["id"].as_str().expect("an id");
    let (status, _) = world
        .key("POST", &format!("/v1/sandboxes/{id}/pause?wait=20"), None)
        .await;
    assert_eq!(status, 200, "what it has can be paused");
    for start in [
        "/v1/sandboxes",
        "/v1/capsules",
        &format!("/v1/sandboxes/{id}/resume"),
        &format!("/v1/capsules/{id}/resume"),
    ] {
        let (status, body) = world.key("POST", start, Some(json!({}))).await;
        assert_eq!(
            (status, &body["error"]["code"]),
            (403, &json!("forbidden")),
            "{start}: {body}"
        );
    }
    let (status, _) = world
        .send(world.request("POST", "/v1/sandboxes", Some(json!({}))))
        .await;
    assert_eq!(status, 401, "who is unknown is told so");
    let (status, _) = world
        .session(&ada.token, "POST", "/v1/sandboxes", Some(json!({})))
        .await;
    assert_eq!(status, 202, "another team starts what it likes");
    let (_, log) = world
        .session(
            &admin,
            "GET",
            &format!("/v1/admin/audit-logs?team={team}&status=403"),
            None,
        )
        .await;
    let refused = log["entries"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|entry| entry["action"] == "sandbox.create" && entry["actor_type"] == "api_key")
        .count();
    assert_eq!(refused, 2, "what the middleware refused is recorded: {log}");
    world
        .session(&admin, "PUT", &suspension(&team), suspended(false))
        .await;
    let (status, _) = world
        .key("POST", &format!("/v1/sandboxes/{id}/resume?wait=20"), None)
        .await;
    assert_eq!(status, 200);

    // The start is counted from its event, once however often that is told; the resume is none.
    let path = format!("/v1/billing/invoice?month={}", month(domain::now()));
    let deadline = tokio::time::Instant::now() + DEADLINE;
    loop {
        world.control.relay().await.expect("a pass");
        let (_, invoice) = world.key("GET", &path, None).await;
        if invoice["sandboxes_started"] == 1 {
            break;
        }
        assert!(tokio::time::Instant::now() < deadline, "{invoice}");
        tokio::task::yield_now().await;
    }
    let event = wrenn_control::extension::Event {
        seq: world.rows("SELECT seq FROM billing_starts ORDER BY seq").await[0],
        team: team.parse().expect("a team"),
        kind: "capsule.create",
        outcome: Some("success"),
        resource_type: "sandbox",
        resource_id: id.to_owned(),
        from: None,
        to: None,
        at: domain::now(),
    };
    Billing
        .on_event(world.control.services(), &event)
        .await
        .expect("taken in");
    let (_, invoice) = world.key("GET", &path, None).await;
    assert_eq!(invoice["sandboxes_started"], 1, "{invoice}");

    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_works_on_sqlite() {
    everything_works(None).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_works_on_postgres() {
    let postgres = Postgres::start();
    everything_works(Some(&postgres)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn starts_at_once_migrate_once_and_a_start_without_the_extension_goes_on() {
    let postgres = Postgres::start();
    let dir = tempfile::tempdir().expect("a directory");
    let config = config(dir.path(), Some(&postgres));
    let start = || ControlPlane::builder(config.clone()).extension(Billing).build();
    let (one, two, three) = tokio::join!(start(), start(), start());
    for control in [one, two, three] {
        let control = control.expect("each starts");
        let db = control.services().database();
        let sql = "SELECT count(*) FROM extension_billing_migrations";
        let row = db
            .query_one_raw(Statement::from_string(db.get_database_backend(), sql))
            .await
            .expect("a row")
            .expect("a row");
        assert_eq!(row.try_get_by_index::<i64>(0).expect("a count"), 3);
        control.stop().await;
    }
    // The record apart is none of the control plane's business: neither a start without the extension nor `migrate`
    // takes the database for a newer version's.
    let plain = ControlPlane::builder(config.clone())
        .build()
        .await
        .expect("it starts");
    plain.stop().await;
    let states = ControlPlane::migrate(&config).await.expect("migrated");
    assert!(
        states.iter().all(|state| state.applied && state.known),
        "{states:?}"
    );
}

#[tokio::test]
async fn two_extensions_of_one_name_are_refused_before_anything_is_made() {
    let dir = tempfile::tempdir().expect("a directory");
    let refused = ControlPlane::builder(config(dir.path(), None))
        .extension(Billing)
        .extension(Billing)
        .build()
        .await
        .expect_err("refused");
    assert!(
        refused.message.contains("two extensions are named 'billing'"),
        "{refused}"
    );
    assert!(!dir.path().join("control.db").exists());
}
