//! Two control planes on one PostgreSQL and one Redis.

mod common;

use std::time::Duration;

use common::{DEADLINE, World, answer};
use serde_json::{Value, json};
use wrenn_control::{ControlConfig, ControlPlane};
use wrenn_testkit::servers::{Postgres, Redis};
use wrenn_testkit::simhost::Call;

/// A control plane that can be killed: it has a runtime of its own.
struct Instance {
    runtime: Option<tokio::runtime::Runtime>,
    running: common::Running,
}

impl Instance {
    async fn start(config: &ControlConfig) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        let running = runtime
            .spawn(common::start(config.clone()))
            .await
            .expect("it starts");
        Self {
            runtime: Some(runtime),
            running,
        }
    }

    /// Everything it does ends where it is.
    fn kill(mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }

    fn control(&self) -> &ControlPlane {
        &self.running.control
    }

    async fn call(&self, world: &World, method: &str, path: &str) -> (u16, Value) {
        let method = reqwest::Method::from_bytes(method.as_bytes()).expect("a method");
        let request = world
            .http
            .request(method, format!("{}{path}", self.running.url))
            .header("x-api-key", &world.key)
            .timeout(DEADLINE)
            .json(&json!({}));
        answer(request).await
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

async fn eventually(what: &str, mut done: impl AsyncFnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + DEADLINE;
    while !done().await {
        assert!(tokio::time::Instant::now() < deadline, "never: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn untold(world: &World) -> String {
    let postgres = world.postgres.as_ref().expect("PostgreSQL");
    postgres.execute("SELECT count(*) FROM events WHERE consumed_at IS NULL")
}

#[tokio::test]
async fn any_instance_serves_any_request() {
    let redis = Redis::start();
    let world = World::on(Postgres::start(), Some(redis.url())).await;
    let other = Instance::start(&world.config).await;
    world.host.hold(Call::Create);
    let (status, body) = world.post("/v1/sandboxes", json!({})).await;
    assert_eq!(status, 202, "{body}");
    let sandbox = body["id"].as_str().expect("an id").to_owned();
    world.host.wait_arrived(Call::Create, 1).await;
    // One instance waits for what the other does.
    let path = format!("/v1/sandboxes/{sandbox}?wait=20");
    let waiting = other.call(&world, "GET", &path);
    let release = async { world.host.release(Call::Create) };
    let ((status, body), ()) = tokio::join!(waiting, release);
    assert_eq!(
        (status, body["status"].as_str()),
        (200, Some("running")),
        "{body}"
    );
    // Decisions on both at once: one wins.
    world.host.hold(Call::Pause);
    let path = format!("/v1/sandboxes/{sandbox}/pause");
    let (here, there) = tokio::join!(world.post(&path, json!({})), other.call(&world, "POST", &path));
    let mut statuses = [here.0, there.0];
    statuses.sort_unstable();
    assert_eq!(statuses, [202, 409], "{here:?} {there:?}");
    world.host.release(Call::Pause);
    world.until(&sandbox, "paused").await;
    let (status, _) = other
        .call(&world, "DELETE", &format!("/v1/sandboxes/{sandbox}?wait=20"))
        .await;
    assert_eq!(status, 200);
    eventually("all events are taken in", async || untold(&world) == "0").await;
}

#[tokio::test]
async fn what_another_instance_did_to_a_sandbox_is_found_though_its_place_is_remembered() {
    // Without Redis, so that this instance does not hear of it.
    let world = World::on(Postgres::start(), None).await;
    let other = Instance::start(&world.config).await;
    let sandbox = world.sandbox().await;
    let exec = format!("/v1/sandboxes/{sandbox}/exec");
    let run = async || {
        let (status, body) = world.post(&exec, json!({"cmd": "echo"})).await;
        let message = body["error"]["message"].as_str().unwrap_or_default().to_owned();
        (status, message)
    };
    let decide = async |method: &str, verb: &str| {
        let path = format!("/v1/sandboxes/{sandbox}{verb}?wait=20");
        let (status, body) = other.call(&world, method, &path).await;
        assert_eq!(status, 200, "{body}");
    };
    assert_eq!(run().await.0, 200);
    decide("POST", "/pause").await;
    let (status, message) = run().await;
    assert_eq!(status, 409);
    assert!(message.contains("paused"), "{message}");
    decide("POST", "/resume").await;
    assert_eq!(run().await.0, 200);
    decide("DELETE", "").await;
    let (status, message) = run().await;
    assert_eq!(status, 409);
    assert!(message.contains("stopped"), "{message}");
}

#[tokio::test]
async fn one_leads_and_the_other_takes_over() {
    let redis = Redis::start();
    let world = World::on(Postgres::start(), Some(redis.url())).await;
    let leader = &world.running.control;
    eventually("one leads", async || {
        leader.renew_leases().await.expect("an answer")
    })
    .await;
    let other = Instance::start(&world.config).await;
    for _ in 0..5 {
        let leads = (
            leader.renew_leases().await.expect("an answer"),
            other.control().renew_leases().await.expect("an answer"),
        );
        assert_eq!(leads, (true, false));
    }
    // One that ends in order gives its lease back.
    let World {
        running,
        postgres: _postgres,
        ..
    } = world;
    running.stop().await;
    assert!(other.control().renew_leases().await.expect("an answer"));
}

/// Passes that are the same work everywhere are done by the leader, and by nobody else.
#[tokio::test]
async fn who_does_not_lead_neither_samples_nor_cleans_up() {
    let world = World::on(Postgres::start(), None).await;
    world.sandbox().await;
    let postgres = world.postgres.as_ref().expect("PostgreSQL");
    // Somebody else leads, who does nothing.
    let ghost = "INSERT INTO leases (name, holder, expires_at) \
         VALUES ('leader', gen_random_uuid(), 9999999999999) \
         ON CONFLICT (name) DO UPDATE SET holder = excluded.holder, expires_at = excluded.expires_at";
    postgres.execute(ghost);
    let world = world
        .restart_with(|config| {
            config.timings.housekeeping_interval = Duration::from_millis(20);
            config.around.sample_interval = Duration::from_millis(20);
            config.around.usage_interval = Duration::from_millis(20);
        })
        .await;
    let postgres = world.postgres.as_ref().expect("PostgreSQL");
    let team = postgres.execute("SELECT gen_random_uuid()");
    postgres.execute(&format!(
        "DELETE FROM metric_snapshots; DELETE FROM usage_days; \
         INSERT INTO teams (id, name, slug, created_at, deleted_at, deletion) \
         VALUES ('{team}', 'gone', 'gone', 0, 0, 'purging')"
    ));
    // Writing down the use of keys is everybody's own, and the last part of the housekeeping: it has been through.
    let used = "SELECT count(*) FROM team_api_keys WHERE last_used IS NOT NULL";
    for _ in 0..2 {
        postgres.execute("UPDATE team_api_keys SET last_used = NULL");
        eventually("a use of the key is written down", async || {
            // Uses are collected when the key is looked up, which is not each time.
            world.get("/v1/sandboxes").await;
            postgres.execute(used) == "1"
        })
        .await;
    }
    let samples = || postgres.execute("SELECT count(*) FROM metric_snapshots");
    let days = || postgres.execute("SELECT count(*) FROM usage_days");
    let deletion = || postgres.execute(&format!("SELECT deletion FROM teams WHERE id = '{team}'"));
    assert_eq!((samples().as_str(), days().as_str()), ("0", "0"));
    assert_eq!(deletion(), "purging");
    assert!(!world.running.control.renew_leases().await.expect("an answer"));
    postgres.execute("DELETE FROM leases WHERE name = 'leader'");
    eventually("the leader samples", async || samples() != "0").await;
    eventually("the leader adds usage up", async || days() != "0").await;
    eventually("the leader empties the team", async || deletion() == "purged").await;
}

#[tokio::test]
async fn one_killed_in_the_middle_loses_nothing() {
    let redis = Redis::start();
    // Not by growing old: what is under way is taken up because its instance is gone.
    let world = World::on(Postgres::start(), Some(redis.url()))
        .await
        .restart_with(|config| config.timings.transient_age = Duration::from_secs(3600))
        .await;
    let doomed = Instance::start(&world.config).await;
    let sandbox = world.sandbox().await;
    world.host.hold(Call::Pause);
    let (status, body) = doomed
        .call(&world, "POST", &format!("/v1/sandboxes/{sandbox}/pause"))
        .await;
    assert_eq!(status, 202, "{body}");
    world.host.wait_arrived(Call::Pause, 1).await;
    doomed.kill();
    world.host.wait_arrived(Call::Pause, 2).await;
    world.host.release(Call::Pause);
    world.until(&sandbox, "paused").await;

    // The leader too.
    let heir = Instance::start(&world.config).await;
    world.host.hold(Call::Resume);
    let leader = Instance::start(&world.config).await;
    let (status, _) = leader
        .call(&world, "POST", &format!("/v1/sandboxes/{sandbox}/resume"))
        .await;
    assert_eq!(status, 202);
    world.host.wait_arrived(Call::Resume, 1).await;
    leader.kill();
    world.host.wait_arrived(Call::Resume, 2).await;
    world.host.release(Call::Resume);
    let (_, body) = heir
        .call(&world, "GET", &format!("/v1/sandboxes/{sandbox}?wait=20"))
        .await;
    assert_eq!(body["status"], "running", "{body}");
    eventually("all events are taken in", async || untold(&world) == "0").await;
}

#[tokio::test]
async fn without_redis_operations_go_on_and_events_catch_up() {
    let mut redis = Redis::start();
    let world = World::on(Postgres::start(), Some(redis.url())).await;
    let other = Instance::start(&world.config).await;
    let sandbox = world.sandbox().await;
    eventually("events go out", async || untold(&world) == "0").await;
    redis.stop();
    world
        .post(&format!("/v1/sandboxes/{sandbox}/pause?wait=20"), json!({}))
        .await;
    // The other instance's readers look by themselves.
    let (_, body) = other
        .call(&world, "GET", &format!("/v1/sandboxes/{sandbox}"))
        .await;
    assert_eq!(body["status"], "paused", "{body}");
    let (status, body) = other
        .call(&world, "POST", &format!("/v1/sandboxes/{sandbox}/resume?wait=20"))
        .await;
    assert_eq!(
        (status, body["status"].as_str()),
        (200, Some("running")),
        "{body}"
    );
    assert_eq!(untold(&world), "4");
    redis.resume();
    eventually("events catch up", async || untold(&world) == "0").await;
    world
        .call("DELETE", &format!("/v1/sandboxes/{sandbox}?wait=20"), None)
        .await;
    eventually("events go out again", async || untold(&world) == "0").await;
}

#[tokio::test]
async fn what_a_dead_consumer_had_is_claimed_and_what_redis_forgot_is_told_again() {
    let mut redis = Redis::start();
    let mut world = World::on(Postgres::start(), None).await;
    // Without the stream so far; from here on nobody else reads it.
    world.sandbox().await;
    eventually("events go out", async || untold(&world) == "0").await;
    let World {
        running, postgres, ..
    } = &mut world;
    let postgres = postgres.take().expect("PostgreSQL");
    let stopped = std::mem::replace(
        running,
        common::start(ControlConfig::new(
            tempfile::tempdir().expect("a directory").path(),
        ))
        .await,
    );
    stopped.stop().await;
    postgres.execute("UPDATE events SET consumed_at = NULL, published_at = NULL");
    let told = postgres.execute("SELECT count(*) FROM events");
    let mut config = world.config.clone();
    config.redis_url = Some(redis.url());
    config.timings.event_repeat = Duration::from_millis(500);
    config.timings.event_claim = Duration::from_millis(100);
    let build = || ControlPlane::builder(config.clone()).build();
    let open = || postgres.execute("SELECT count(*) FROM events WHERE consumed_at IS NULL");

    let publisher = build().await.expect("it builds");
    let pass = publisher.relay().await.expect("a pass");
    assert_eq!(pass.told.to_string(), told);
    publisher.stop().await;
    let stream = redis.command(&["KEYS", "wrenn:*:events"]);
    redis.command(&["XGROUP", "CREATE", &stream, "control", "0"]);
    redis.command(&["XREADGROUP", "GROUP", "control", "ghost", "STREAMS", &stream, ">"]);
    let summary = redis.command(&["XPENDING", &stream, "control"]);
    assert!(summary.starts_with(&told), "{summary}");
    let consumer = Instance::start(&config).await;
    eventually("the ghost's are claimed", async || open() == "0").await;
    eventually("and acknowledged", async || {
        redis.command(&["XPENDING", &stream, "control"]).starts_with('0')
    })
    .await;
    eventually("the ghost leaves the group", async || {
        !redis
            .command(&["XINFO", "CONSUMERS", &stream, "control"])
            .contains("ghost")
    })
    .await;
    consumer.kill();

    postgres.execute("UPDATE events SET consumed_at = NULL, published_at = NULL");
    let publisher = build().await.expect("it builds");
    publisher.relay().await.expect("a pass");
    publisher.stop().await;
    redis.stop();
    redis.resume();
    let consumer = Instance::start(&config).await;
    eventually("what Redis forgot comes again", async || open() == "0").await;
    consumer.kill();
}

/// The Redis that the second half of the next test is to use.
const TLS_REDIS: &str = "WRENN_TEST_TLS_REDIS";

/// Whom a program trusts is said in its environment, which a test may not change under the feet of others; so the test
/// runs itself again, as a program that trusts this Redis.
#[tokio::test]
async fn redis_can_be_reached_through_tls() {
    let Ok(url) = std::env::var(TLS_REDIS) else {
        let redis = Redis::start_tls();
        let output = tokio::process::Command::new(std::env::current_exe().expect("this program"))
            .args(["--exact", "redis_can_be_reached_through_tls", "--nocapture"])
            .env(TLS_REDIS, redis.tls_url())
            .env("SSL_CERT_FILE", redis.certificate())
            .env_remove("SSL_CERT_DIR")
            .kill_on_drop(true)
            .output()
            .await
            .expect("it runs");
        assert!(
            output.status.success(),
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        // Where all events were taken in, and no other way leads into this Redis.
        assert_ne!(
            redis.command(&["KEYS", "wrenn:*:events"]),
            "",
            "nothing was ever told"
        );
        return;
    };
    let world = World::on(Postgres::start(), Some(url)).await;
    world.sandbox().await;
    // With Redis, the relay consumes nothing by itself: whatever is taken in came out of the stream.
    eventually("all events are taken in", async || untold(&world) == "0").await;
}
