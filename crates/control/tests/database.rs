//! The database as an operator meets it: migrations, versions, and its absence.

mod common;

use std::time::{Duration, Instant};

use common::{DEADLINE, World, code};
use serde_json::json;
use wrenn_control::{ControlConfig, ControlPlane, ErrorCode, MasterSecret};
use wrenn_testkit::servers::Postgres;

fn config(postgres: &Postgres, dir: &std::path::Path) -> ControlConfig {
    let mut config = ControlConfig::new(dir);
    config.database_url = Some(postgres.url());
    config.secret = Some(MasterSecret::generate().expect("randomness"));
    config
}

#[tokio::test]
async fn of_several_that_start_on_an_empty_database_one_migrates() {
    let postgres = Postgres::start();
    let dir = tempfile::tempdir().expect("a directory");
    let config = config(&postgres, dir.path());
    let status = ControlPlane::migration_status(&config).await.expect("a status");
    assert!(
        status
            .iter()
            .all(|migration| !migration.applied && migration.known)
    );
    // Asking changes nothing.
    assert_eq!(
        postgres.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'"),
        "0"
    );
    let builds = (0..5).map(|_| ControlPlane::builder(config.clone()).build());
    for built in futures::future::join_all(builds).await {
        built.expect("each starts").stop().await;
    }
    let status = ControlPlane::migration_status(&config).await.expect("a status");
    assert!(
        status
            .iter()
            .all(|migration| migration.applied && migration.known)
    );
    assert_eq!(
        postgres.execute("SELECT count(*) FROM seaql_migrations"),
        status.len().to_string()
    );
    // Again is harmless.
    assert_eq!(
        ControlPlane::migrate(&config).await.expect("nothing to do"),
        status
    );
}

#[tokio::test]
async fn ids_are_uuids_and_what_refers_to_a_row_goes_with_it_or_stays_or_holds_it() {
    let postgres = Postgres::start();
    let dir = tempfile::tempdir().expect("a directory");
    ControlPlane::migrate(&config(&postgres, dir.path()))
        .await
        .expect("migrated");
    let lines = |sql: &str| -> Vec<String> { postgres.execute(sql).lines().map(str::to_owned).collect() };
    // Actors and resources are of several kinds. Events are numbered, since their order counts.
    assert_eq!(
        lines(
            "SELECT table_name || '.' || column_name FROM information_schema.columns \
             WHERE table_schema = 'public' AND data_type <> 'uuid' \
             AND (column_name = 'id' OR column_name LIKE '%\\_id') ORDER BY 1"
        ),
        [
            "audit_logs.actor_id",
            "audit_logs.resource_id",
            "event_cursor.id",
            "events.actor_id",
            "events.id",
            "events.resource_id",
            "sandboxes.actor_id"
        ]
    );
    let rules = lines(
        "SELECT conrelid::regclass::text || '.' || attname || ' ' || confdeltype::text FROM pg_constraint \
         JOIN pg_attribute ON attrelid = conrelid AND attnum = conkey[1] \
         WHERE contype = 'f' AND connamespace = 'public'::regnamespace ORDER BY 1",
    );
    for (refers, rule) in [
        ("users_teams.user_id", "c"),
        ("users_teams.team_id", "c"),
        ("oauth_identities.user_id", "c"),
        ("admin_permissions.user_id", "c"),
        ("team_api_keys.created_by", "n"),
        ("hosts.created_by", "n"),
        ("host_tokens.created_by", "n"),
        // A sandbox has to be destroyed before its team or host goes.
        ("sandboxes.team_id", "r"),
        ("sandboxes.host_id", "r"),
    ] {
        let wanted = format!("{refers} {rule}");
        assert!(rules.contains(&wanted), "{wanted}: {rules:#?}");
    }
}

#[tokio::test]
async fn a_newer_schema_is_refused() {
    let postgres = Postgres::start();
    let dir = tempfile::tempdir().expect("a directory");
    let config = config(&postgres, dir.path());
    ControlPlane::migrate(&config).await.expect("migrated");
    postgres.execute("INSERT INTO seaql_migrations VALUES ('m9999_tomorrow', 0)");
    for refused in [
        ControlPlane::migrate(&config).await.map(drop),
        ControlPlane::builder(config.clone()).build().await.map(drop),
    ] {
        let error = refused.expect_err("too new");
        assert!(
            error.message.contains("m9999_tomorrow") && error.message.contains("newer"),
            "{error}"
        );
    }
    let status = ControlPlane::migration_status(&config).await.expect("a status");
    let newest = status.last().expect("migrations");
    assert!(newest.name == "m9999_tomorrow" && newest.applied && !newest.known);
}

#[tokio::test]
async fn sqlite_migrates_the_same_way_and_asking_makes_no_file() {
    let dir = tempfile::tempdir().expect("a directory");
    let config = ControlConfig::new(dir.path());
    let status = ControlPlane::migration_status(&config).await.expect("a status");
    assert!(status.iter().all(|migration| !migration.applied));
    assert!(!dir.path().join("control.db").exists());
    let status = ControlPlane::migrate(&config).await.expect("migrated");
    assert!(status.iter().all(|migration| migration.applied));
    assert_eq!(
        ControlPlane::migration_status(&config).await.expect("a status"),
        status
    );
}

#[tokio::test]
async fn what_makes_a_start_impossible_is_said() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut config = ControlConfig::new(dir.path());
    config.database_url = Some("postgres://wrenn:hunter2@localhost/wrenn?host=/nowhere".to_owned());
    let error = ControlPlane::builder(config.clone())
        .build()
        .await
        .expect_err("no secret");
    assert!(
        error.message.contains("WRENN_SECRET_KEY") && error.message.contains("openssl"),
        "{error}"
    );
    config.secret = Some(MasterSecret::generate().expect("randomness"));
    let error = ControlPlane::builder(config.clone())
        .build()
        .await
        .expect_err("no database");
    assert_eq!(error.code, ErrorCode::DatabaseUnavailable, "{error:?}");
    assert!(!format!("{error:?} {config:?}").contains("hunter2"), "{error:?}");
    config.database_url = None;
    let refused = [
        ("http://:hunter2@localhost", "rediss://"),
        // An unchecked certificate would be refused at each connection, in the log only.
        ("rediss://:hunter2@localhost/#insecure", "SSL_CERT_FILE"),
    ];
    for (url, remedy) in refused {
        config.redis_url = Some(url.to_owned());
        let error = ControlPlane::builder(config.clone())
            .build()
            .await
            .expect_err("no usable URL of Redis");
        assert!(
            error.message.contains("REDIS_URL") && error.message.contains(remedy),
            "{error}"
        );
        assert!(!format!("{error:?}").contains("hunter2"), "{error:?}");
    }
}

#[tokio::test]
async fn without_its_database_it_answers_503_and_recovers_by_itself() {
    let mut world = World::on(Postgres::start(), None).await;
    let sandbox = world.sandbox().await;
    let paths = [
        ("GET", format!("/v1/sandboxes/{sandbox}")),
        ("GET", "/v1/sandboxes".to_owned()),
        ("POST", "/v1/sandboxes".to_owned()),
        ("POST", format!("/v1/sandboxes/{sandbox}/pause")),
        ("DELETE", format!("/v1/sandboxes/{sandbox}")),
        ("GET", "/v1/events/stream".to_owned()),
    ];
    world.postgres.as_mut().expect("PostgreSQL").stop();
    let since = Instant::now();
    for (method, path) in &paths {
        let response = world
            .request(method, path)
            .json(&json!({}))
            .send()
            .await
            .expect("an answer");
        assert_eq!(response.status(), 503, "{method} {path}");
        assert_eq!(response.headers()["retry-after"], "5", "{method} {path}");
        let body = response.json().await.expect("a body");
        assert_eq!(code(&body), "database_unavailable", "{method} {path}: {body}");
    }
    // Nobody hangs: the clients' deadline is far.
    assert!(since.elapsed() < DEADLINE, "{:?}", since.elapsed());
    world.postgres.as_mut().expect("PostgreSQL").resume();
    world.until(&sandbox, "running").await;
    let (status, body) = world
        .post(&format!("/v1/sandboxes/{sandbox}/pause?wait=20"), json!({}))
        .await;
    assert_eq!((status, body["status"].as_str()), (200, Some("paused")), "{body}");
}

#[tokio::test]
async fn an_operation_that_loses_the_database_is_taken_up_when_it_is_back() {
    let mut world = World::on(Postgres::start(), None).await;
    let sandbox = world.sandbox().await;
    world.host.hold(wrenn_testkit::simhost::Call::Pause);
    let (status, _) = world
        .post(&format!("/v1/sandboxes/{sandbox}/pause"), json!({}))
        .await;
    assert_eq!(status, 202);
    world
        .host
        .wait_arrived(wrenn_testkit::simhost::Call::Pause, 1)
        .await;
    world.postgres.as_mut().expect("PostgreSQL").stop();
    world.host.release(wrenn_testkit::simhost::Call::Pause);
    // The host is done, and the record cannot be written.
    tokio::time::timeout(DEADLINE, async {
        while world.running.control.reconcile().await.is_ok() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .expect("the database is missed");
    world.postgres.as_mut().expect("PostgreSQL").resume();
    world.until(&sandbox, "paused").await;
}

#[tokio::test]
async fn of_several_first_starts_one_makes_the_admin() {
    let postgres = Postgres::start();
    let dir = tempfile::tempdir().expect("a directory");
    let config = config(&postgres, dir.path());
    let one = ControlPlane::builder(config.clone())
        .build()
        .await
        .expect("it builds");
    let other = ControlPlane::builder(config).build().await.expect("it builds");
    let (one, other) = tokio::join!(one.bootstrap(), other.bootstrap());
    let made = [one.expect("no failure"), other.expect("no failure")];
    assert_eq!(made.iter().flatten().count(), 1);
    assert_eq!(postgres.execute("SELECT count(*) FROM users"), "1");
}

/// The way to a PostgreSQL, which can begin to swallow what passes.
struct Proxy {
    url: String,
    silent: tokio::sync::watch::Sender<bool>,
    served: tokio::task::JoinHandle<()>,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.served.abort();
    }
}

impl Proxy {
    async fn new(postgres: &Postgres) -> Self {
        let url = postgres.url();
        let (_, dir) = url.split_once("host=").expect("a folder");
        let socket = std::path::Path::new(dir).join(".s.PGSQL.5432");
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
            .await
            .expect("a port");
        let port = listener.local_addr().expect("bound").port();
        let silent = tokio::sync::watch::Sender::new(false);
        let told = silent.subscribe();
        let served = tokio::spawn(async move {
            let mut pumps = tokio::task::JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                let (socket, told) = (socket.clone(), told.clone());
                pumps.spawn(async move {
                    let Ok(server) = tokio::net::UnixStream::connect(&socket).await else {
                        return;
                    };
                    let ((from_client, to_client), (from_server, to_server)) =
                        (client.into_split(), server.into_split());
                    tokio::join!(
                        pump(from_client, to_server, told.clone()),
                        pump(from_server, to_client, told)
                    );
                });
            }
        });
        Self {
            url: format!("postgres://wrenn@127.0.0.1:{port}/postgres?sslmode=disable"),
            silent,
            served,
        }
    }
}

async fn pump(
    mut from: impl tokio::io::AsyncRead + Unpin,
    mut to: impl tokio::io::AsyncWrite + Unpin,
    mut silent: tokio::sync::watch::Receiver<bool>,
) {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut buffer = [0; 8192];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        if silent.wait_for(|silent| !silent).await.is_err() || to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
}

#[tokio::test]
async fn a_database_that_says_nothing_counts_as_away_until_it_answers() {
    let world = World::on(Postgres::start(), None).await;
    let sandbox = world.sandbox().await;
    let proxy = Proxy::new(world.postgres.as_ref().expect("PostgreSQL")).await;
    let url = proxy.url.clone();
    let world = world
        .restart_with(|config| {
            config.database_url = Some(url);
            config.database.statement = Duration::from_secs(1);
        })
        .await;
    let path = format!("/v1/sandboxes/{sandbox}");
    world.until(&sandbox, "running").await;
    proxy.silent.send_replace(true);
    // Often enough that each connection of the pool is met.
    let requests = (0..60).map(|number| {
        let (method, path) = match number % 3 {
            0 => ("GET", path.clone()),
            1 => ("POST", format!("{path}/pause")),
            _ => ("POST", "/v1/sandboxes".to_owned()),
        };
        world.request(method, &path).json(&json!({})).send()
    });
    let answers = tokio::time::timeout(DEADLINE / 2, futures::future::join_all(requests))
        .await
        .expect("nobody hangs");
    for answer in answers {
        let answer = answer.expect("an answer");
        assert_eq!(answer.status(), 503);
        assert!(answer.headers().contains_key("retry-after"));
        let body = answer.json().await.expect("a body");
        assert_eq!(code(&body), "database_unavailable", "{body}");
    }
    proxy.silent.send_replace(false);
    world.until(&sandbox, "running").await;
    world.running.stop().await;
}
