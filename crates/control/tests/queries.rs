//! What requests cost the database: how many statements, and whether an index serves each of them.
//!
//! Both are asked of PostgreSQL itself while the real routes and passes run: its log counts the statements, and its
//! statistics count how often it read a table from one end to the other.

mod common;

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use common::{CHEAP, DEADLINE, answer};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use wrenn_control::{Bootstrap, ControlConfig, ControlPlane, MasterSecret};
use wrenn_testkit::servers::Postgres;
use wrenn_testkit::simhost::{Call, SimHost, SimSandbox};

/// Marks a test's own statements in the log.
const OWN: &str = "/* the test's */";

/// In the statement that authenticates a key.
const KEY_LOOKUP: &str = "\"key_hash\" = ";

/// Tables that grow with use; reading one of them from end to end is never right.
const LARGE: [&str; 6] = [
    "sandbox_metrics",
    "sandboxes",
    "events",
    "audit_logs",
    "team_api_keys",
    "channel_deliveries",
];

/// A control plane that does only what it is asked to: no background passes.
struct Plane {
    control: ControlPlane,
    url: String,
    server: JoinHandle<()>,
}

impl Plane {
    async fn start(config: &ControlConfig) -> Self {
        let control = ControlPlane::builder(config.clone())
            .build()
            .await
            .expect("the control plane builds");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let url = format!("http://{}", listener.local_addr().expect("bound"));
        let router = control.router();
        let server = tokio::spawn(async move { axum::serve(listener, router).await.expect("it serves") });
        Self { control, url, server }
    }

    fn request(&self, auth: (&str, &str), method: &str, path: &str) -> reqwest::RequestBuilder {
        let method = reqwest::Method::from_bytes(method.as_bytes()).expect("a method");
        // A client of its own: no connection outlives the control plane.
        reqwest::Client::new()
            .request(method, format!("{}{path}", self.url))
            .header(auth.0, auth.1)
            .timeout(DEADLINE)
    }

    async fn call(&self, auth: (&str, &str), method: &str, path: &str, body: Option<Value>) -> Value {
        let mut request = self.request(auth, method, path);
        if let Some(body) = body {
            request = request.json(&body);
        }
        let (status, body) = answer(request).await;
        assert!((200..300).contains(&status), "{path}: {status} {body}");
        body
    }

    async fn stop(self) {
        self.server.abort();
        self.control.stop().await;
    }
}

struct Setup {
    plane: Plane,
    bootstrap: Bootstrap,
    host: SimHost,
    config: ControlConfig,
    postgres: Postgres,
    _dir: tempfile::TempDir,
}

impl Setup {
    /// With a host that has the template; `prepare` comes before the first connection.
    async fn new(prepare: impl FnOnce(&Postgres)) -> Self {
        let postgres = Postgres::start();
        prepare(&postgres);
        let dir = tempfile::tempdir().expect("a directory");
        let mut config = ControlConfig::new(dir.path());
        config.database_url = Some(postgres.url());
        config.secret = Some(MasterSecret::generate().expect("randomness"));
        config.password_cost = CHEAP;
        config.timings.transient_age = Duration::ZERO;
        config.timings.orphan_grace = Duration::ZERO;
        config.timings.stranger_grace = Duration::ZERO;
        config.timings.shutdown_grace = DEADLINE;
        let plane = Plane::start(&config).await;
        let bootstrap = plane
            .control
            .bootstrap()
            .await
            .expect("bootstrap")
            .expect("the first start");
        let token = plane.control.issue_host_token(None).await.expect("a token");
        let mut host = SimHost::start(&plane.url).await;
        host.register(&token.token).await;
        host.heartbeat().await;
        Self {
            plane,
            bootstrap,
            host,
            config,
            postgres,
            _dir: dir,
        }
    }

    fn key(&self) -> (&str, &str) {
        ("x-api-key", &self.bootstrap.api_key)
    }

    /// A thousand teams with what they have left over time; more of it is the first team's.
    fn fill(&self) {
        let team = self.bootstrap.team_id.0;
        let host = self.postgres.execute("SELECT id FROM hosts");
        let now = millis();
        for sql in [
            "INSERT INTO teams (id, name, slug, created_at) \
             SELECT gen_random_uuid(), 'team', 'team-' || n, 0 FROM generate_series(1, 1000) AS n"
                .to_owned(),
            "INSERT INTO hosts SELECT (jsonb_populate_record(hosts, jsonb_build_object('id', gen_random_uuid(), \
             'token_hash', NULL, 'status', 'offline'))).* FROM hosts"
                .to_owned(),
            // What every team has ten of, the first one has a thousand of.
            format!(
                "CREATE TEMPORARY TABLE owned AS \
                 SELECT id AS team, n FROM teams, generate_series(1, 10) AS n UNION ALL \
                 SELECT '{team}', n FROM generate_series(11, 1000) AS n; \
                 INSERT INTO sandboxes (id, team_id, host_id, template_id, template_team_id, template_name, \
                 status, generation, vcpus, memory_mb, disk_size_mb, timeout_sec, metadata, envs, created_at, \
                 updated_at, status_at) \
                 SELECT gen_random_uuid(), team, CASE WHEN team = '{team}' THEN '{host}' ELSE other.id END, template.id, template.team_id, 'minimal', \
                 CASE WHEN n % 10 = 1 THEN 'running' WHEN n % 10 = 2 THEN 'paused' ELSE 'stopped' END, \
                 2, 1, 256, 1024, 0, '{{}}', '{{}}', {now} - n, {now}, {now} \
                 FROM owned, (SELECT id, team_id FROM templates WHERE name = 'minimal') AS template, \
                 (SELECT id FROM hosts WHERE id <> '{host}') AS other; \
                 INSERT INTO events (seq, team_id, kind, resource_type, resource_id, payload, created_at, \
                 published_at, consumed_at) \
                 SELECT row_number() OVER (), team, 'capsule.pause', 'capsule', 'x', '{{}}', {now}, {now}, {now} \
                 FROM owned; \
                 UPDATE event_cursor SET value = (SELECT max(seq) FROM events); \
                 INSERT INTO audit_logs (id, team_id, actor_type, action, resource_type, outcome, created_at) \
                 SELECT gen_random_uuid(), team, 'api_key', 'sandbox.create', 'sandbox', 'success', {now} - n \
                 FROM owned; \
                 INSERT INTO team_api_keys (id, team_id, name, key_hash, key_prefix, created_at) \
                 SELECT gen_random_uuid(), team, 'key', gen_random_uuid(), 'wrn_', {now} FROM owned; \
                 INSERT INTO channels (id, team_id, name, provider, config, events, created_at, updated_at) \
                 SELECT gen_random_uuid(), id, 'hook', 'webhook', 'none', '[]', 0, 0 FROM teams WHERE id <> '{team}'; \
                 INSERT INTO channel_deliveries (id, channel_id, event_id, event, status, attempts, next_at, created_at) \
                 SELECT gen_random_uuid(), id, gen_random_uuid(), '{{}}', 'delivered', 1, {now}, {now} \
                 FROM channels, generate_series(1, 10)"
            ),
            // Every sandbox that runs or pauses has points of the last hour, and wide ones of the day.
            format!(
                "INSERT INTO sandbox_metrics (sandbox_id, team_id, width_ms, at, cpu_pct, mem_bytes, disk_bytes) \
                 SELECT id, team_id, 15000, ({now} / 15000 - n * 4) * 15000, 1, 1, 1 \
                 FROM sandboxes, generate_series(0, 19) AS n WHERE status <> 'stopped' UNION ALL \
                 SELECT id, team_id, 300000, ({now} / 300000 - n) * 300000, 1, 1, 1 \
                 FROM sandboxes, generate_series(1, 20) AS n WHERE status <> 'stopped'"
            ),
            // A snapshot that nobody makes any more, so that the monitor has to look for its sandbox.
            format!(
                "INSERT INTO templates (id, team_id, name, kind, status, detail, progress_pct, vcpus, memory_mb, \
                 disk_size_mb, size_bytes, created_at, updated_at) VALUES (gen_random_uuid(), '{team}', 'half', \
                 'snapshot', 'building', '', 0, 1, 256, 1024, 0, 0, 0)"
            ),
            "VACUUM ANALYZE".to_owned(),
        ] {
            self.postgres.execute(&sql);
        }
    }

    /// Runs something on a control plane of its own; returns how often it read each large table from end to end.
    async fn scans(&mut self, what: impl AsyncFnOnce(&Self)) -> BTreeMap<String, i64> {
        let before = self.seq_scans();
        self.plane = Plane::start(&self.config).await;
        self.host.set_control(&self.plane.url);
        what(self).await;
        self.rest().await;
        let after = self.seq_scans();
        after
            .into_iter()
            .map(|(table, scans)| {
                let before = before.get(&table).copied().unwrap_or_default();
                (table, scans - before)
            })
            .filter(|(_, scans)| *scans > 0)
            .collect()
    }

    /// Ends the control plane and waits until its connections are gone: they tell their statistics when they end.
    async fn rest(&mut self) {
        let control = self.plane.control.clone();
        self.plane.server.abort();
        control.stop().await;
        let others = "SELECT count(*) FROM pg_stat_activity \
             WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()";
        let deadline = tokio::time::Instant::now() + DEADLINE;
        while self.postgres.execute(others) != "0" {
            assert!(tokio::time::Instant::now() < deadline, "connections stay open");
            tokio::task::yield_now().await;
        }
    }

    fn seq_scans(&self) -> BTreeMap<String, i64> {
        let tables = LARGE.map(|table| format!("'{table}'")).join(", ");
        let rows = self.postgres.execute(&format!(
            "SELECT relname, seq_scan FROM pg_stat_user_tables WHERE relname IN ({tables})"
        ));
        let rows: BTreeMap<_, _> = rows
            .lines()
            .filter_map(|row| row.split_once('|'))
            .map(|(table, scans)| (table.to_owned(), scans.parse().expect("a number")))
            .collect();
        assert_eq!(rows.len(), LARGE.len(), "{rows:?}");
        rows
    }

    /// The statements that the control plane has sent so far.
    fn statements(&self) -> Vec<String> {
        self.postgres
            .log()
            .lines()
            .filter(|line| !line.contains(OWN))
            .filter_map(|line| {
                let (_, told) = line.split_once("LOG:  ")?;
                let sent = told.strip_prefix("statement: ");
                let sent = sent.or_else(|| Some(told.strip_prefix("execute ")?.split_once(": ")?.1));
                sent.map(str::to_owned)
            })
            .collect()
    }

    /// The statements of one request.
    async fn during(&self, request: impl AsyncFnOnce(&Plane)) -> Vec<String> {
        let before = self.statements().len();
        request(&self.plane).await;
        self.statements().split_off(before)
    }
}

fn millis() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    i64::try_from(now.as_millis()).expect("before the end of time")
}

fn logged(postgres: &Postgres) {
    postgres.execute("ALTER ROLE wrenn SET log_statement = 'all'");
}

/// The figures in ARCHITECTURE.md.
#[tokio::test]
async fn a_request_takes_as_many_statements_as_the_documentation_says() {
    let setup = Setup::new(logged).await;
    let key = setup.key();
    // A key that was looked up a moment ago is known; the moment may end in between, so each is tried until it does not.
    let known = async |path: &str| {
        for _ in 0..50 {
            setup.plane.call(key, "GET", "/v1/sandboxes", None).await;
            let sent = setup
                .during(async |plane| drop(plane.call(key, "GET", path, None).await))
                .await;
            if !sent.iter().any(|sql| sql.contains(KEY_LOOKUP)) {
                return sent;
            }
        }
        panic!("the key is looked up each time");
    };
    let first = setup
        .during(async |plane| drop(plane.call(key, "GET", "/v1/sandboxes", None).await))
        .await;
    assert_eq!(first.len(), 2, "an unknown key and the list: {first:#?}");
    assert!(first[0].contains(KEY_LOOKUP), "{first:#?}");

    // A view of the hosts counts for a second; again, that second may end in between.
    let mut created = Value::Null;
    let mut accepted = Vec::new();
    for tried in 1..=50 {
        let sent = setup
            .during(async |plane| {
                created = plane.call(key, "POST", "/v1/sandboxes", Some(json!({}))).await;
                setup.host.wait_arrived(Call::Create, tried).await;
            })
            .await;
        let path = format!("/v1/sandboxes/{}?wait=20", created["id"].as_str().expect("an id"));
        setup.plane.call(key, "GET", &path, None).await;
        // The request has one transaction, and the operation in the background begins after it.
        let own = sent
            .iter()
            .position(|sql| sql.starts_with("INSERT INTO \"sandboxes\""))
            .expect("a record");
        let end = sent[own..]
            .iter()
            .position(|sql| sql == "COMMIT")
            .expect("a commit");
        accepted = sent[..=own + end].to_vec();
        if accepted.len() == 5 {
            break;
        }
    }
    let beginnings = [
        "SELECT \"templates\"",
        "BEGIN",
        "INSERT INTO \"sandboxes\"",
        "INSERT INTO \"events\"",
        "COMMIT",
    ];
    assert_eq!(accepted.len(), beginnings.len(), "{accepted:#?}");
    for (sql, beginning) in accepted.iter().zip(beginnings) {
        assert!(sql.starts_with(beginning), "{accepted:#?}");
    }

    // A heartbeat that says what the last one said writes neither the host's row nor the templates'.
    let sent = setup.during(async |_| setup.host.heartbeat().await).await;
    assert!(sent.iter().any(|sql| sql.contains("FROM \"hosts\"")), "{sent:#?}");
    assert!(
        !sent.iter().any(|sql| sql.starts_with("UPDATE \"hosts\"")),
        "{sent:#?}"
    );
    let written = |sql: &&String| sql.starts_with("INSERT INTO \"template_hosts\"");
    assert_eq!(sent.iter().find(written), None);

    let id = created["id"].as_str().expect("an id").to_owned();
    let got = known(&format!("/v1/sandboxes/{id}")).await;
    assert_eq!(got.len(), 1, "{got:#?}");
    // What goes on into a guest reads the sandbox and its host at once.
    let reached = known(&format!("/v1/sandboxes/{id}/processes")).await;
    assert_eq!(reached.len(), 1, "{reached:#?}");
    assert!(reached[0].contains("JOIN \"hosts\""), "{reached:#?}");
    // An exec that follows another knows the place; that moment may end in between too.
    let exec = format!("/v1/sandboxes/{id}/exec");
    let mut reads = Vec::new();
    for _ in 0..50 {
        let body = Some(json!({"cmd": "echo"}));
        let sent = setup
            .during(async |plane| drop(plane.call(key, "POST", &exec, body).await))
            .await;
        reads = sent
            .into_iter()
            .filter(|sql| {
                sql.starts_with("SELECT") && (sql.contains("sandboxes") || sql.contains(KEY_LOOKUP))
            })
            .collect();
        if reads.is_empty() {
            break;
        }
    }
    assert!(reads.is_empty(), "{reads:#?}");
    let listed = known("/v1/sandboxes?limit=50").await;
    assert_eq!(listed.len(), 1, "{listed:#?}");
    let next = known(&format!("/v1/sandboxes?limit=50&before={id}")).await;
    assert_eq!(next.len(), 2, "{next:#?}");
    setup.plane.stop().await;
}

#[tokio::test]
async fn a_listing_takes_as_many_statements_for_many_rows_as_for_one() {
    let setup = Setup::new(logged).await;
    let key = setup.key();
    let team = setup.bootstrap.team_id.0;
    setup
        .plane
        .call(key, "POST", "/v1/sandboxes?wait=20", Some(json!({})))
        .await;
    let session = setup
        .plane
        .control
        .issue_session(setup.bootstrap.user_id, None)
        .await
        .expect("a session");
    let bearer = format!("Bearer {session}");
    let session = ("authorization", bearer.as_str());
    let lists = [
        (key, "/v1/sandboxes?limit=1000"),
        (key, "/v1/snapshots"),
        (session, "/v1/api-keys"),
        (session, "/v1/channels"),
        (session, "/v1/audit-logs"),
        (session, "/v1/teams"),
    ];
    let counts = async || {
        let mut counts = BTreeMap::new();
        for (auth, path) in lists {
            let sent = setup
                .during(async |plane| drop(plane.call(auth, "GET", path, None).await))
                .await;
            // Whether the key was known is not the listing's.
            let of_list = sent.iter().filter(|sql| !sql.contains(KEY_LOOKUP));
            counts.insert(path, of_list.count());
        }
        counts
    };
    // What the create left for the audit log is written before the log is read.
    counts().await;
    let few = counts().await;
    assert!(few.values().all(|count| (1..=3).contains(count)), "{few:?}");
    setup.postgres.execute(&format!(
        "{OWN} INSERT INTO sandboxes SELECT (jsonb_populate_record(sandboxes, \
         jsonb_build_object('id', gen_random_uuid()))).* FROM sandboxes, generate_series(1, 300)"
    ));
    setup.postgres.execute(&format!(
        "{OWN} INSERT INTO team_api_keys SELECT (jsonb_populate_record(team_api_keys, \
         jsonb_build_object('id', gen_random_uuid(), 'key_hash', n))).* FROM team_api_keys, generate_series(1, 80) AS n"
    ));
    setup.postgres.execute(&format!(
        "{OWN} INSERT INTO audit_logs (id, team_id, actor_type, action, resource_type, outcome, created_at) \
         SELECT gen_random_uuid(), '{team}', 'api_key', 'sandbox.create', 'sandbox', 'success', n \
         FROM generate_series(1, 90) AS n"
    ));
    setup.postgres.execute(&format!(
        "{OWN} INSERT INTO templates (id, team_id, name, kind, status, detail, progress_pct, vcpus, memory_mb, \
         disk_size_mb, size_bytes, created_at, updated_at) SELECT gen_random_uuid(), '{team}', 'snap-' || n, \
         'snapshot', 'ready', '', 100, 1, 256, 1024, 0, n, n FROM generate_series(1, 90) AS n"
    ));
    let rows = setup
        .plane
        .call(key, "GET", "/v1/sandboxes?limit=1000", None)
        .await;
    assert_eq!(rows.as_array().map(Vec::len), Some(301));
    assert_eq!(counts().await, few);
    setup.plane.stop().await;
}

#[tokio::test]
async fn no_hot_query_reads_a_large_table_from_end_to_end() {
    let mut setup = Setup::new(|_| {}).await;
    setup.rest().await;
    setup.fill();
    let team = setup.bootstrap.team_id;
    let user = setup.bootstrap.user_id;
    let mut guilty = BTreeMap::new();
    let mut note = |what: &str, scans: BTreeMap<String, i64>| {
        if !scans.is_empty() {
            guilty.insert(what.to_owned(), scans);
        }
    };
    let some = setup
        .postgres
        .execute("SELECT id FROM sandboxes WHERE status = 'running' LIMIT 1");
    assert!(!some.is_empty());
    // The counter counts: this reads the table.
    setup
        .postgres
        .execute("SELECT count(*) FROM sandboxes WHERE metadata <> ''");
    let counted = setup
        .scans(async |setup| {
            setup
                .postgres
                .execute("SELECT count(*) FROM sandboxes WHERE metadata <> ''");
        })
        .await;
    assert_eq!(counted, BTreeMap::from([("sandboxes".to_owned(), 1)]));

    for path in [
        "/v1/sandboxes?limit=50",
        "/v1/sandboxes?limit=50&all=true",
        "/v1/sandboxes?limit=50&status=running,paused",
        "/v1/sandboxes/stats",
        "/v1/snapshots",
    ] {
        let scans = setup
            .scans(async |setup| drop(setup.plane.call(setup.key(), "GET", path, None).await))
            .await;
        note(path, scans);
    }
    let scans = setup
        .scans(async |setup| {
            let page = setup
                .plane
                .call(setup.key(), "GET", "/v1/sandboxes?limit=50", None)
                .await;
            let last = page[49]["id"].as_str().expect("a full page").to_owned();
            for path in [
                format!("/v1/sandboxes?limit=50&before={last}"),
                format!("/v1/sandboxes/{last}"),
            ] {
                setup.plane.call(setup.key(), "GET", &path, None).await;
            }
        })
        .await;
    note("the next page, and one of it", scans);
    // The hosts and the template's, the insert, and the operation's own changes.
    let scans = setup
        .scans(async |setup| {
            let made = setup
                .plane
                .call(setup.key(), "POST", "/v1/sandboxes?wait=60", Some(json!({})))
                .await;
            assert_eq!(made["status"], "running", "{made}");
            let path = format!("/v1/sandboxes/{}?wait=60", made["id"].as_str().expect("an id"));
            setup.plane.call(setup.key(), "DELETE", &path, None).await;
        })
        .await;
    note("create and destroy", scans);
    let scans = setup
        .scans(async |setup| {
            let told = setup.plane.control.relay().await.expect("a pass");
            assert!(told.told > 0, "there was nothing to tell");
        })
        .await;
    note("events relay", scans);
    for path in [
        "/v1/audit-logs",
        "/v1/audit-logs?limit=500",
        "/v1/admin/audit-logs",
        "/v1/api-keys",
        "/v1/channels",
    ] {
        let scans = setup
            .scans(async |setup| {
                let session = setup
                    .plane
                    .control
                    .issue_session(user, Some(team))
                    .await
                    .expect("a session");
                let bearer = format!("Bearer {session}");
                setup
                    .plane
                    .call(("authorization", &bearer), "GET", path, None)
                    .await;
            })
            .await;
        note(path, scans);
    }
    let sampled = setup.postgres.execute(&format!(
        "SELECT id FROM sandboxes WHERE status = 'running' AND team_id = '{}' LIMIT 1",
        team.0
    ));
    let sampled: wrenn_proto::id::SandboxId = format!("sb-{sampled}").parse().expect("an id");
    let scans = setup
        .scans(async |setup| {
            let mut stray = SimSandbox::stray(0);
            stray.samples.push(wrenn_proto::hostagent::MetricsPoint {
                timestamp_ms: millis(),
                ..Default::default()
            });
            setup.host.with(|model| model.sandboxes.insert(sampled, stray));
            let control = &setup.plane.control;
            control.collect_sandbox_metrics(millis()).await.expect("a pass");
            for range in ["10m", "24h"] {
                let path = format!("/v1/sandboxes/{sampled}/metrics?range={range}");
                let told = setup.plane.call(setup.key(), "GET", &path, None).await;
                assert!(!told["points"].as_array().expect("points").is_empty(), "{told}");
            }
            setup.host.with(|model| model.sandboxes.remove(&sampled));
        })
        .await;
    note("metrics of sandboxes", scans);
    // A template that sandboxes stand on cannot be deleted; how many these are is told.
    let scans = setup
        .scans(async |setup| {
            let made = setup
                .plane
                .call(setup.key(), "POST", "/v1/sandboxes?wait=60", Some(json!({})))
                .await;
            let body = json!({"sandbox_id": made["id"], "name": "base"});
            let template = setup
                .plane
                .call(setup.key(), "POST", "/v1/snapshots?wait=60", Some(body))
                .await;
            let template = template["id"].as_str().expect("an id");
            setup
                .host
                .with(|model| model.used_snapshots.insert(template.to_owned()));
            let refused = setup.plane.request(setup.key(), "DELETE", "/v1/snapshots/base");
            let (status, body) = answer(refused).await;
            assert_eq!(status, 409, "{body}");
        })
        .await;
    note("sandboxes on a template", scans);
    setup.postgres.execute(
        "UPDATE channel_deliveries SET status = 'pending', next_at = 0 \
         WHERE id IN (SELECT id FROM channel_deliveries ORDER BY id LIMIT 20)",
    );
    let scans = setup
        .scans(async |setup| {
            // Their channels' settings cannot be opened, so nothing is sent anywhere.
            let tried = setup.plane.control.deliver_notifications().await.expect("a pass");
            assert!(tried > 0, "there was nothing to deliver");
        })
        .await;
    note("due deliveries", scans);
    let scans = setup
        .scans(async |setup| {
            let control = &setup.plane.control;
            control.accrue_usage(millis()).await.expect("a pass");
            control.sample_metrics(millis()).await.expect("a pass");
        })
        .await;
    note("usage and samples", scans);
    let scans = setup
        .scans(async |setup| {
            let scrape = setup.plane.request(setup.key(), "GET", "/metrics");
            let text = scrape.send().await.expect("an answer").text().await;
            let text = text.expect("text");
            assert!(text.contains("wrenn_sandboxes{status=\"stopped\"} "), "{text}");
        })
        .await;
    note("the metrics page", scans);
    let scans = setup
        .scans(async |setup| {
            setup
                .plane
                .call(setup.key(), "GET", "/v1/sandboxes/stats", None)
                .await;
            setup.plane.control.write_key_uses().await.expect("written");
            setup.plane.control.prune(millis()).await.expect("a pass");
        })
        .await;
    note("uses of keys, and what is too old", scans);
    let scans = setup
        .scans(async |setup| {
            setup.host.heartbeat().await;
            setup.plane.control.reconcile().await.expect("a pass");
            setup.plane.control.deletion_pass().await.expect("a pass");
            setup.plane.control.hard_delete_pass().await.expect("a pass");
        })
        .await;
    note("heartbeat and the monitor", scans);
    assert!(guilty.is_empty(), "read from end to end: {guilty:#?}");
}
