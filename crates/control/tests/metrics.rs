//! What sandboxes use over time: kept in the database, with the newest part from the host.

mod common;

use common::{World, id};
use sea_orm::{ConnectionTrait as _, Statement};
use serde_json::{Value, json};
use wrenn_control::domain::{Millis, now};
use wrenn_proto::hostagent::MetricsPoint;
use wrenn_testkit::simhost::{Call, SimHost, SimSandbox};

const MINUTE: Millis = 60_000;

/// The host has a further sample of a sandbox.
fn sample(host: &SimHost, sandbox: &str, at: Millis, cpu_pct: f64, mem_bytes: u64) {
    let point = MetricsPoint {
        timestamp_ms: at,
        cpu_pct,
        mem_bytes,
        disk_bytes: 2,
        ..Default::default()
    };
    host.with(|model| {
        let sandbox = model.sandboxes.get_mut(&id(sandbox)).expect("a sandbox");
        sandbox.samples.push(point);
    });
}

/// The leader's pass, as of a moment.
async fn collect(world: &World, at: Millis) {
    let control = &world.running.control;
    control.collect_sandbox_metrics(at).await.expect("a pass");
}

/// A sandbox's points: when, CPU and memory.
async fn points(world: &World, sandbox: &str, range: &str) -> Vec<(i64, f64, u64)> {
    let path = format!("/v1/sandboxes/{sandbox}/metrics?range={range}");
    let (status, body) = world.get(&path).await;
    assert_eq!((status, &body["range"]), (200, &json!(range)), "{body}");
    let number = |point: &Value, name: &str| point[name].as_u64().expect("a number");
    body["points"]
        .as_array()
        .expect("points")
        .iter()
        .map(|point| {
            (
                point["timestamp_unix"].as_i64().expect("a time"),
                point["cpu_pct"].as_f64().expect("a number"),
                number(point, "mem_bytes"),
            )
        })
        .collect()
}

async fn rows(world: &World) -> i64 {
    counted(world, "SELECT COUNT(*) AS n FROM sandbox_metrics").await
}

/// How many points came from hosts. When wide ones are made of them depends on the clock.
async fn narrow(world: &World) -> i64 {
    counted(
        world,
        "SELECT COUNT(*) AS n FROM sandbox_metrics WHERE width_ms = 15000",
    )
    .await
}

async fn counted(world: &World, sql: &str) -> i64 {
    let db = world.database().await;
    let row = db
        .query_one_raw(Statement::from_string(db.get_database_backend(), sql))
        .await
        .expect("a query")
        .expect("a row");
    row.try_get("", "n").expect("a count")
}

fn step(at: Millis, width: Millis) -> i64 {
    at.div_euclid(width) * width / 1000
}

#[tokio::test]
async fn history_is_the_database_s_and_the_newest_part_the_host_s() {
    let world = World::new().await;
    let sandbox = world.sandbox().await;
    let now = now();
    sample(&world.host, &sandbox, now - 1, 30.0, 100);
    let then = now - 5 * MINUTE;
    collect(&world, then).await;
    // Repeated within the step, it is the same point.
    collect(&world, then).await;
    assert_eq!(narrow(&world).await, 1);
    sample(&world.host, &sandbox, now - 3 * MINUTE, f64::NAN, 7);
    sample(&world.host, &sandbox, now - 2 * MINUTE, 20.0, 8);
    let seen = points(&world, &sandbox, "10m").await;
    assert_eq!(
        seen,
        [
            (step(then - 1, 15_000), 30.0, 100),
            (step(now - 3 * MINUTE, 15_000), 0.0, 7),
            (step(now - 2 * MINUTE, 15_000), 20.0, 8),
            (step(now - 1, 15_000), 30.0, 100),
        ]
    );

    // A host that says nothing hides the newest part alone.
    world
        .host
        .fail(Call::Metrics, connectrpc::ConnectError::unavailable("away"));
    assert_eq!(points(&world, &sandbox, "10m").await, seen[..1]);

    // A paused sandbox has a history, and its host is not asked.
    let asked = world.host.arrived(Call::Metrics);
    let path = format!("/v1/sandboxes/{sandbox}/pause?wait=20");
    assert_eq!(world.post(&path, json!({})).await.0, 200);
    assert_eq!(points(&world, &sandbox, "10m").await, seen[..1]);
    assert_eq!(world.host.arrived(Call::Metrics), asked);
    collect(&world, now).await;
    assert_eq!(narrow(&world).await, 1, "it did not run");

    // With a sandbox go its points.
    let path = format!("/v1/sandboxes/{sandbox}?wait=20");
    assert_eq!(world.call("DELETE", &path, None).await.0, 200);
    assert_eq!(rows(&world).await, 0);
    let path = format!("/v1/sandboxes/{sandbox}/metrics");
    assert_eq!(world.get(&path).await.0, 404);
}

#[tokio::test]
async fn narrow_points_become_wide_ones_and_both_are_forgotten() {
    let world = World::new().await;
    let sandbox = world.sandbox().await;
    let now = now();
    // Two points in a step of five minutes long ago, one in the step under way.
    let old = (now - 90 * MINUTE).div_euclid(5 * MINUTE) * 5 * MINUTE;
    for (at, cpu_pct, mem_bytes) in [
        (old + MINUTE, 10.0, 50),
        (old + 2 * MINUTE, 30.0, 40),
        (now, 80.0, 60),
    ] {
        let sampled = wrenn_control::domain::now();
        sample(&world.host, &sandbox, sampled, cpu_pct, mem_bytes);
        collect(&world, at).await;
    }
    assert_eq!(narrow(&world).await, 3);
    world.host.with(|model| {
        model
            .sandboxes
            .get_mut(&id(&sandbox))
            .expect("there")
            .samples
            .clear()
    });
    let wide = points(&world, &sandbox, "24h").await;
    assert_eq!(wide[0], (old / 1000, 20.0, 50));
    let (last, cpu, memory) = wide[wide.len() - 1];
    assert_eq!((cpu, memory), (80.0, 60), "the step under way");
    assert!(last >= step(now, 5 * MINUTE) - 300, "{wide:?}");
    assert_eq!(points(&world, &sandbox, "2h").await.len(), 3);

    // Another leader puts nothing together twice.
    let world = world.restart().await;
    collect(&world, now).await;
    assert_eq!(points(&world, &sandbox, "24h").await, wide);

    let control = &world.running.control;
    control.prune(now + 2 * 60 * MINUTE).await.expect("a pass");
    assert_eq!(points(&world, &sandbox, "2h").await.len(), 1);
    assert_eq!(
        points(&world, &sandbox, "24h").await.len(),
        2,
        "wide points are kept longer"
    );
    control.prune(now + 26 * 60 * MINUTE).await.expect("a pass");
    assert_eq!(rows(&world).await, 0);
}

#[tokio::test]
async fn a_host_speaks_for_its_own_and_does_not_hold_up_the_others() {
    let world = World::new().await;
    let sandbox = world.sandbox().await;
    let token = world
        .running
        .control
        .issue_host_token(None)
        .await
        .expect("a token");
    let mut other = SimHost::start(&world.running.url).await;
    other.register(&token.token).await;
    other.heartbeat().await;
    other.with(|model| model.sandboxes.insert(id(&sandbox), SimSandbox::stray(0)));
    sample(&world.host, &sandbox, now(), 10.0, 1);
    sample(&other, &sandbox, now(), 99.0, 99);
    collect(&world, now()).await;
    world.host.with(|model| {
        model
            .sandboxes
            .get_mut(&id(&sandbox))
            .expect("there")
            .samples
            .clear()
    });
    let seen = points(&world, &sandbox, "5m").await;
    assert_eq!(seen.len(), 1, "{seen:?}");
    assert_eq!((seen[0].1, seen[0].2), (10.0, 1));

    other.disconnect();
    sample(&world.host, &sandbox, now(), 20.0, 2);
    collect(&world, now() + MINUTE).await;
    assert_eq!(narrow(&world).await, 2);
    // An older agent does not know the question; what it said of long ago is not of now.
    world.host.fail(
        Call::ListMetrics,
        connectrpc::ConnectError::unimplemented("what?"),
    );
    collect(&world, now() + 2 * MINUTE).await;
    sample(&world.host, &sandbox, now() - 2 * MINUTE, 20.0, 2);
    collect(&world, now() + 3 * MINUTE).await;
    assert_eq!(narrow(&world).await, 2);
}

#[tokio::test]
async fn a_deleted_team_leaves_no_points() {
    let world = World::new().await;
    let ada = world.person("ada").await;
    let (status, body) = world
        .call_as(&ada.token, "POST", "/v1/sandboxes?wait=20", Some(json!({})))
        .await;
    assert_eq!(status, 201, "{body}");
    let sandbox = body["id"].as_str().expect("an id").to_owned();
    sample(&world.host, &sandbox, now(), 1.0, 1);
    collect(&world, now()).await;
    assert_eq!(narrow(&world).await, 1);
    let path = format!("/v1/teams/{}", ada.team);
    assert_eq!(world.call_as(&ada.token, "DELETE", &path, None).await.0, 204);
    let deadline = tokio::time::Instant::now() + common::DEADLINE;
    while world.running.control.deletion_pass().await.expect("a pass") > 0 {
        assert!(
            tokio::time::Instant::now() < deadline,
            "something of a team remains"
        );
        tokio::task::yield_now().await;
    }
    assert_eq!(rows(&world).await, 0);
}
