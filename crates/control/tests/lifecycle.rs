//! A sandbox's life through the API, with a simulated host that the test steps.

mod common;

use common::{World, code, id, message};
use connectrpc::ConnectError;
use sea_orm::ConnectionTrait as _;
use serde_json::{Value, json};
use wrenn_proto::rest::SandboxStatus;
use wrenn_testkit::simhost::{Call, SimSandbox, SimState};

#[tokio::test]
async fn a_sandbox_lives_and_ends() {
    let world = World::new().await;
    world.host.hold(Call::Create);
    let (status, body) = world
        .post(
            "/v1/sandboxes",
            json!({"metadata": {"job": "7"}, "envs": {"A": "b"}, "timeout_sec": 60}),
        )
        .await;
    assert_eq!(status, 202, "{body}");
    assert_eq!(body["status"], "pending");
    assert_eq!(
        (
            &body["template"],
            &body["vcpus"],
            &body["memory_mb"],
            &body["disk_size_mb"]
        ),
        (&json!("minimal"), &json!(1), &json!(512), &json!(20480))
    );
    assert!(
        body["created_at"].as_str().is_some_and(|at| at.ends_with('Z')),
        "{body}"
    );
    let sandbox = body["id"].as_str().expect("an id").to_owned();
    world.host.wait_arrived(Call::Create, 1).await;
    let (_, body) = world.get(&format!("/v1/sandboxes/{sandbox}")).await;
    assert_eq!(body["status"], "starting");
    // A short wait ends with the operation still under way.
    let (status, body) = world
        .call("GET", &format!("/v1/sandboxes/{sandbox}?wait=0"), None)
        .await;
    assert_eq!((status, &body["status"]), (200, &json!("starting")));
    world.host.release(Call::Create);
    assert_eq!(world.settled(&sandbox).await, "running");
    world.host.with(|model| {
        let made = &model.sandboxes[&id(&sandbox)];
        assert_eq!(made.request.envs.get("A").map(String::as_str), Some("b"));
        assert_eq!(made.request.timeout_sec, 60);
        assert!(made.generation > 0);
    });

    for (operation, settled) in [("pause", "paused"), ("resume", "running")] {
        let (status, body) = world
            .post(&format!("/v1/sandboxes/{sandbox}/{operation}?wait=20"), json!({}))
            .await;
        assert_eq!((status, body["status"].as_str()), (200, Some(settled)), "{body}");
    }
    let (status, body) = world
        .call("DELETE", &format!("/v1/sandboxes/{sandbox}?wait=20"), None)
        .await;
    assert_eq!(
        (status, body["status"].as_str()),
        (200, Some("stopped")),
        "{body}"
    );
    assert!(world.host.with(|model| model.sandboxes.is_empty()));

    // It is still found, listed only when asked for, and has no metrics any more.
    let (status, body) = world.get(&format!("/v1/sandboxes/{sandbox}")).await;
    assert_eq!((status, body["status"].as_str()), (200, Some("stopped")));
    assert_eq!(body["metadata"], json!({"job": "7"}));
    assert_eq!(world.get("/v1/sandboxes").await.1, json!([]));
    for query in ["all=true", "status=stopped", "status=running,stopped"] {
        let (_, body) = world.get(&format!("/v1/sandboxes?{query}")).await;
        assert_eq!(body[0]["id"], json!(sandbox), "{query}");
    }
    assert_eq!(
        world.get(&format!("/v1/sandboxes/{sandbox}/metrics")).await.0,
        404
    );
    // Destroying twice is harmless.
    assert_eq!(
        world
            .call("DELETE", &format!("/v1/sandboxes/{sandbox}"), None)
            .await
            .0,
        202
    );
}

#[tokio::test]
async fn records_of_what_ended_are_kept_for_a_while() {
    let world = World::new()
        .await
        .restart_with(|config| config.around.stopped_keep = std::time::Duration::from_secs(3600))
        .await;
    let (ended, paused) = (world.sandbox().await, world.sandbox().await);
    let path = format!("/v1/sandboxes/{ended}?wait=20");
    assert_eq!(world.call("DELETE", &path, None).await.0, 200);
    let path = format!("/v1/sandboxes/{paused}/pause?wait=20");
    assert_eq!(world.post(&path, json!({})).await.0, 200);
    let now = wrenn_control::domain::now();
    let status = async |sandbox: &str| world.get(&format!("/v1/sandboxes/{sandbox}")).await.0;
    for (later, found) in [(0, 200), (3_500_000, 200), (3_700_000, 404)] {
        world.running.control.prune(now + later).await.expect("a pass");
        assert_eq!(status(&ended).await, found, "{later} ms later");
        assert_eq!(status(&paused).await, 200);
    }
    assert_eq!(
        world.get("/v1/sandboxes?all=true").await.1[0]["id"],
        json!(paused)
    );
}

#[tokio::test]
async fn a_heartbeat_without_news_writes_nothing() {
    let world = World::new().await;
    let db = world.database().await;
    let noted = async || {
        let sql = "SELECT updated_at, memory_available_mb FROM hosts";
        let statement = sea_orm::Statement::from_string(db.get_database_backend(), sql);
        let row = db
            .query_one_raw(statement)
            .await
            .expect("a query")
            .expect("a host");
        let number = |name: &str| row.try_get::<i64>("", name).expect("a number");
        (number("updated_at"), number("memory_available_mb"))
    };
    let write = async |sql: &str| {
        db.execute_unprepared(sql).await.expect("written");
    };
    let ready = wrenn_proto::rest::TemplateStatus::Ready;
    world.host.heartbeat_with(8000, ready).await;
    write("UPDATE hosts SET updated_at = 1").await;
    world.host.heartbeat_with(8000, ready).await;
    world.host.heartbeat_with(7990, ready).await;
    assert_eq!(noted().await, (1, 8000));
    // Room that matters, and the sign of life after a while.
    world.host.heartbeat_with(4000, ready).await;
    let (at, memory) = noted().await;
    assert!(at > 1 && memory == 4000);
    write("UPDATE hosts SET updated_at = 1, last_heartbeat_at = last_heartbeat_at - 30000").await;
    world.host.heartbeat_with(4000, ready).await;
    assert!(noted().await.0 > 1);
    // Out of reach, it is back at once.
    write("UPDATE hosts SET status = 'unreachable'").await;
    world.host.heartbeat_with(4000, ready).await;
    assert_eq!(world.post("/v1/sandboxes?wait=20", json!({})).await.0, 201);
}

#[tokio::test]
async fn wrong_states_are_named() {
    let world = World::new().await;
    let sandbox = world.sandbox().await;
    let (status, body) = world
        .post(&format!("/v1/sandboxes/{sandbox}/resume"), json!({}))
        .await;
    assert_eq!((status, code(&body)), (409, "invalid_state"));
    assert!(message(&body).contains("running"), "{body}");
    world
        .post(&format!("/v1/sandboxes/{sandbox}/pause?wait=20"), json!({}))
        .await;
    for (path, body) in [
        ("exec", json!({"cmd": "echo"})),
        ("ping", json!({})),
        ("pause", json!({})),
        ("files/list", json!({"path": "/tmp"})),
        ("files/read", json!({"path": "/tmp/x"})),
    ] {
        let (status, body) = world.post(&format!("/v1/sandboxes/{sandbox}/{path}"), body).await;
        assert_eq!((status, code(&body)), (409, "invalid_state"), "{path}: {body}");
        assert!(message(&body).contains("paused"), "{path}: {body}");
    }
}

#[tokio::test]
async fn of_many_pauses_at_once_one_wins() {
    let world = World::new().await;
    let sandbox = world.sandbox().await;
    world.host.hold(Call::Pause);
    let path = format!("/v1/sandboxes/{sandbox}/pause");
    let answers = futures::future::join_all((0..8).map(|_| world.post(&path, json!({})))).await;
    let accepted = answers.iter().filter(|(status, _)| *status == 202).count();
    let refused = answers
        .iter()
        .filter(|(status, body)| *status == 409 && code(body) == "invalid_state")
        .count();
    assert_eq!((accepted, refused), (1, 7), "{answers:?}");
    world.host.release(Call::Pause);
    assert_eq!(world.settled(&sandbox).await, "paused");
    assert_eq!(world.host.arrived(Call::Pause), 1);
}

#[tokio::test]
async fn destroy_overtakes_a_pause_and_a_create() {
    let world = World::new().await;
    let sandbox = world.sandbox().await;
    world.host.hold(Call::Pause);
    world
        .post(&format!("/v1/sandboxes/{sandbox}/pause"), json!({}))
        .await;
    world.host.wait_arrived(Call::Pause, 1).await;
    let (status, body) = world
        .call("DELETE", &format!("/v1/sandboxes/{sandbox}?wait=20"), None)
        .await;
    assert_eq!(
        (status, body["status"].as_str()),
        (200, Some("stopped")),
        "{body}"
    );
    world.host.release(Call::Pause);

    // The destroy finds nothing on the host yet; the create that comes after it is undone.
    world.host.hold(Call::Create);
    let (_, body) = world.post("/v1/sandboxes", json!({})).await;
    let sandbox = body["id"].as_str().expect("an id").to_owned();
    world.host.wait_arrived(Call::Create, 2).await;
    let (status, body) = world
        .call("DELETE", &format!("/v1/sandboxes/{sandbox}?wait=20"), None)
        .await;
    assert_eq!(
        (status, body["status"].as_str()),
        (200, Some("stopped")),
        "{body}"
    );
    let destroys = world.host.arrived(Call::Destroy);
    world.host.release(Call::Create);
    world.host.wait_arrived(Call::Destroy, destroys + 1).await;
    // The call has arrived; the monitor's pass comes behind it on the same host and finds nothing left.
    world.running.control.reconcile().await.expect("a pass");
    assert!(world.host.with(|model| model.sandboxes.is_empty()));
    assert_eq!(world.settled(&sandbox).await, "stopped");
}

#[tokio::test]
async fn failures_are_told_and_leave_a_true_status() {
    let world = World::new().await;
    // A create that fails for good.
    world
        .host
        .fail(Call::Create, ConnectError::internal("the disk is broken"));
    let (status, body) = world.post("/v1/sandboxes?wait=20", json!({})).await;
    assert_eq!((status, body["status"].as_str()), (201, Some("error")), "{body}");
    assert_eq!(body["error"]["message"], "the disk is broken");

    // A resume without room: told to who waits, and the sandbox stays paused.
    let sandbox = world.sandbox().await;
    world
        .post(&format!("/v1/sandboxes/{sandbox}/pause?wait=20"), json!({}))
        .await;
    world
        .host
        .fail(Call::Resume, ConnectError::resource_exhausted("no memory left"));
    let (status, body) = world
        .post(&format!("/v1/sandboxes/{sandbox}/resume?wait=20"), json!({}))
        .await;
    assert_eq!(
        (status, code(&body), message(&body)),
        (503, "no_capacity", "no memory left")
    );
    assert_eq!(world.settled(&sandbox).await, "paused");
    let (status, body) = world
        .post(&format!("/v1/sandboxes/{sandbox}/resume?wait=20"), json!({}))
        .await;
    assert_eq!(
        (status, body["status"].as_str()),
        (200, Some("running")),
        "{body}"
    );

    // A pause that fails leaves it running.
    world
        .host
        .fail(Call::Pause, ConnectError::internal("cannot save"));
    let (status, body) = world
        .post(&format!("/v1/sandboxes/{sandbox}/pause?wait=20"), json!({}))
        .await;
    assert_eq!((status, code(&body)), (502, "agent_error"), "{body}");
    assert_eq!(world.settled(&sandbox).await, "running");
}

#[tokio::test]
async fn no_capacity_is_known_before_anything_starts() {
    let world = World::cold().await;
    world
        .host
        .heartbeat_with(8192, wrenn_proto::rest::TemplateStatus::Building)
        .await;
    let (status, body) = world.post("/v1/sandboxes", json!({})).await;
    assert_eq!((status, code(&body)), (409, "invalid_state"), "{body}");
    assert!(
        message(&body).contains("42") && message(&body).contains("installing packages"),
        "{body}"
    );

    world
        .host
        .heartbeat_with(600, wrenn_proto::rest::TemplateStatus::Ready)
        .await;
    let (status, body) = world.post("/v1/sandboxes", json!({"memory_mb": 1024})).await;
    assert_eq!((status, code(&body)), (503, "no_capacity"), "{body}");
    // What is on its way counts.
    world.host.hold(Call::Create);
    assert_eq!(world.post("/v1/sandboxes", json!({})).await.0, 202);
    let (status, body) = world.post("/v1/sandboxes", json!({})).await;
    assert_eq!((status, code(&body)), (503, "no_capacity"), "{body}");
    assert_eq!(
        world
            .get("/v1/sandboxes?all=true")
            .await
            .1
            .as_array()
            .map(Vec::len),
        Some(1)
    );
    world.host.release(Call::Create);
}

#[tokio::test]
async fn vcpus_and_disk_count_when_a_host_is_chosen() {
    let world = World::new().await;
    let world = world
        .restart_with(|config| {
            config.placement.vcpu_overcommit = 2;
            config.placement.disk_reserve_mb = 3000;
        })
        .await;
    // Three vCPUs are not there, since two processors make four, of which two are taken.
    world.host.tell(|beat| beat.cpu_cores = Some(2)).await;
    let create = async |body: serde_json::Value| world.post("/v1/sandboxes?wait=20", body).await;
    let refused = async |body: serde_json::Value, words: &[&str]| {
        let (status, answer) = create(body).await;
        assert_eq!((status, code(&answer)), (503, "no_capacity"), "{answer}");
        for word in words {
            assert!(message(&answer).contains(word), "{word}: {answer}");
        }
    };
    let (status, first) = create(json!({"vcpus": 2})).await;
    assert_eq!((status, &first["status"]), (201, &json!("running")), "{first}");
    refused(
        json!({"vcpus": 3}),
        &["3 vCPUs (the most on one host is 2)", "destroy or pause"],
    )
    .await;
    refused(
        json!({"vcpus": 5}),
        &["5 vCPUs (the most on one host is 4)", "large enough"],
    )
    .await;
    // A paused one holds none.
    let first = first["id"].as_str().expect("an id");
    let (status, body) = world
        .post(&format!("/v1/sandboxes/{first}/pause?wait=20"), json!({}))
        .await;
    assert_eq!(status, 200, "{body}");
    let (status, body) = create(json!({"vcpus": 3})).await;
    assert_eq!((status, &body["status"]), (201, &json!("running")), "{body}");

    // Beyond the reserve there has to be room for the memory that a pause saves.
    world.host.tell(|beat| beat.disk_available_mb = 3000).await;
    refused(json!({}), &["512 MiB of disk", "reserve of 3000 MiB", "is 0)"]).await;
    world.host.tell(|beat| beat.disk_available_mb = 3511).await;
    refused(json!({}), &["is 511)"]).await;
    world.host.tell(|beat| beat.disk_available_mb = 3512).await;
    let (status, body) = create(json!({})).await;
    assert_eq!((status, &body["status"]), (201, &json!("running")), "{body}");

    // Nothing is left behind of what was refused, and another host takes what this one cannot.
    let (_, all) = world.get("/v1/sandboxes?all=true").await;
    assert_eq!(all.as_array().map(Vec::len), Some(3));
    let token = world
        .running
        .control
        .issue_host_token(None)
        .await
        .expect("a token");
    let mut larger = wrenn_testkit::simhost::SimHost::start(&world.running.url).await;
    larger.register(&token.token).await;
    larger.heartbeat().await;
    for _ in 0..2 {
        let (status, body) = create(json!({"vcpus": 5})).await;
        assert_eq!(
            (status, body["host_id"].as_str()),
            (201, Some(larger.tokens().host_id.as_str())),
            "{body}"
        );
    }
}

#[tokio::test]
async fn a_full_host_passes_a_start_on() {
    // With no patience at all a second driver could ask those again that have just refused.
    let world = World::new()
        .await
        .restart_with(|config| config.timings.transient_age = std::time::Duration::from_secs(30))
        .await;
    let token = world
        .running
        .control
        .issue_host_token(None)
        .await
        .expect("a token");
    let mut second = wrenn_testkit::simhost::SimHost::start(&world.running.url).await;
    second.register(&token.token).await;
    second.heartbeat().await;
    for host in [&world.host, &second] {
        host.fail(Call::Create, ConnectError::resource_exhausted("full"));
    }
    // Whichever is asked first refuses; the other refuses too, and then there is nobody left.
    let (_, body) = world.post("/v1/sandboxes?wait=20", json!({})).await;
    assert_eq!(
        (body["status"].as_str(), body["error"]["message"].as_str()),
        (Some("error"), Some("full")),
        "{body}"
    );
    // One refusal is not the end.
    world
        .host
        .fail(Call::Create, ConnectError::resource_exhausted("full"));
    for _ in 0..2 {
        let (_, body) = world.post("/v1/sandboxes?wait=20", json!({})).await;
        assert_eq!(body["status"], "running", "{body}");
    }
    assert_eq!(
        second.with(|model| model.sandboxes.len()) + world.host.with(|model| model.sandboxes.len()),
        2
    );
}

#[tokio::test]
async fn a_restart_in_the_middle_loses_nothing() {
    for call in [Call::Create, Call::Pause, Call::Resume, Call::Destroy] {
        let world = World::new().await;
        let sandbox = if call == Call::Create {
            world.host.hold(call);
            let (_, body) = world.post("/v1/sandboxes", json!({"envs": {"A": "b"}})).await;
            body["id"].as_str().expect("an id").to_owned()
        } else {
            let sandbox = world.sandbox().await;
            if call == Call::Resume {
                world
                    .post(&format!("/v1/sandboxes/{sandbox}/pause?wait=20"), json!({}))
                    .await;
            }
            world.host.hold(call);
            let accepted = match call {
                Call::Pause => {
                    world
                        .post(&format!("/v1/sandboxes/{sandbox}/pause"), json!({}))
                        .await
                }
                Call::Resume => {
                    world
                        .post(&format!("/v1/sandboxes/{sandbox}/resume"), json!({}))
                        .await
                }
                _ => {
                    world
                        .call("DELETE", &format!("/v1/sandboxes/{sandbox}"), None)
                        .await
                }
            };
            assert_eq!(accepted.0, 202);
            sandbox
        };
        world.host.wait_arrived(call, 1).await;
        let world = world.restart().await;
        world.host.release(call);
        let expected = match call {
            Call::Create | Call::Resume => "running",
            Call::Pause => "paused",
            _ => "stopped",
        };
        assert_eq!(world.settled(&sandbox).await, expected, "{call:?}");
        assert_eq!(
            world.host.with(|model| model.sandboxes.len()),
            usize::from(call != Call::Destroy),
            "{call:?}"
        );
    }
}

#[tokio::test]
async fn what_happens_on_the_host_is_taken_over_and_stale_news_are_not() {
    let world = World::new().await;
    let sandbox = world.sandbox().await;
    let generation = world.host.with(|model| model.sandboxes[&id(&sandbox)].generation);
    // Its time ran out: paused on the host.
    world
        .host
        .with(|model| model.sandboxes.get_mut(&id(&sandbox)).expect("there").state = SimState::Paused);
    world
        .host
        .event(id(&sandbox), generation, SandboxStatus::Paused, "ttl_expired")
        .await;
    assert_eq!(world.settled(&sandbox).await, "paused");
    // Resumed since: the same news again are stale.
    world
        .post(&format!("/v1/sandboxes/{sandbox}/resume?wait=20"), json!({}))
        .await;
    world
        .host
        .event(id(&sandbox), generation, SandboxStatus::Paused, "ttl_expired")
        .await;
    assert_eq!(world.settled(&sandbox).await, "running");
    // Its VM dies.
    world
        .host
        .event(id(&sandbox), generation + 2, SandboxStatus::Error, "vmm_exited")
        .await;
    let (_, body) = world.get(&format!("/v1/sandboxes/{sandbox}")).await;
    assert_eq!(body["status"], "error", "{body}");
    assert_eq!(
        body["error"],
        json!({"message": "the VM died", "console": "kernel panic"})
    );
    // Only destroy leads out.
    let (status, body) = world
        .post(&format!("/v1/sandboxes/{sandbox}/resume"), json!({}))
        .await;
    assert_eq!((status, code(&body)), (409, "invalid_state"));
    assert!(message(&body).contains("error"), "{body}");
    let (_, body) = world
        .call("DELETE", &format!("/v1/sandboxes/{sandbox}?wait=20"), None)
        .await;
    assert_eq!(body["status"], "stopped");
    // News of unknown sandboxes and odd ids are dropped, not refused.
    world
        .host
        .event(
            wrenn_proto::id::SandboxId::new(),
            1,
            SandboxStatus::Paused,
            "ttl_expired",
        )
        .await;
}

#[tokio::test]
async fn a_silent_host_makes_its_sandboxes_missing_until_it_is_back() {
    let world = World::new().await;
    let sandbox = world.sandbox().await;
    let paused = world.sandbox().await;
    world
        .post(&format!("/v1/sandboxes/{paused}/pause?wait=20"), json!({}))
        .await;
    let mut world = world
        .restart_with(|config| config.timings.host_silence = std::time::Duration::ZERO)
        .await;
    world.host.disconnect();
    // A pass of the instance's own may come between and do a part of it.
    world.running.control.reconcile().await.expect("a pass");
    for id in [&sandbox, &paused] {
        world.until(id, "missing").await;
    }
    let (status, body) = world
        .post(&format!("/v1/sandboxes/{sandbox}/exec"), json!({"cmd": "echo"}))
        .await;
    assert_eq!((status, code(&body)), (409, "invalid_state"), "{body}");
    let (status, body) = world.post("/v1/sandboxes", json!({})).await;
    assert_eq!((status, code(&body)), (503, "no_capacity"), "{body}");

    let mut world = world
        .restart_with(|config| config.timings.host_silence = std::time::Duration::from_secs(90))
        .await;
    world.host.reconnect().await;
    world.host.heartbeat().await;
    // The heartbeat poked the monitor.
    world.until(&sandbox, "running").await;
    world.until(&paused, "paused").await;
}

#[tokio::test]
async fn a_start_whose_host_dies_is_tried_again_when_it_is_back() {
    let mut world = World::new().await;
    world.host.hold(Call::Create);
    let (_, body) = world.post("/v1/sandboxes", json!({})).await;
    let sandbox = body["id"].as_str().expect("an id").to_owned();
    world.host.wait_arrived(Call::Create, 1).await;
    world.host.disconnect();
    let world = world
        .restart_with(|config| config.timings.host_silence = std::time::Duration::ZERO)
        .await;
    world.running.control.reconcile().await.expect("a pass");
    let (_, body) = world.get(&format!("/v1/sandboxes/{sandbox}")).await;
    assert_eq!(body["status"], "starting", "{body}");
    // With no patience at all the monitor would lose the host again right after its heartbeat.
    let mut world = world
        .restart_with(|config| config.timings.host_silence = std::time::Duration::from_secs(90))
        .await;
    world.host.release(Call::Create);
    world.host.reconnect().await;
    world.host.heartbeat().await;
    world.until(&sandbox, "running").await;
    assert_eq!(world.host.with(|model| model.sandboxes.len()), 1);
}

#[tokio::test]
async fn the_monitor_heals_what_the_host_knows_better() {
    let world = World::new().await;
    let (lost, died, slept) = (
        world.sandbox().await,
        world.sandbox().await,
        world.sandbox().await,
    );
    let orphan = wrenn_proto::id::SandboxId::new();
    world.host.with(|model| {
        model.sandboxes.remove(&id(&lost));
        model.sandboxes.get_mut(&id(&died)).expect("there").state = SimState::Error;
        model.sandboxes.get_mut(&id(&slept)).expect("there").state = SimState::Paused;
        model.sandboxes.insert(orphan, SimSandbox::stray(0));
    });
    let pass = world.running.control.reconcile().await.expect("a pass");
    assert_eq!(
        (pass.sandboxes_corrected, pass.orphans_destroyed),
        (3, 1),
        "{pass:?}"
    );
    assert_eq!(world.settled(&lost).await, "error");
    assert_eq!(world.settled(&died).await, "error");
    assert_eq!(world.settled(&slept).await, "paused");
    assert!(!world.host.with(|model| model.sandboxes.contains_key(&orphan)));
    // A second pass finds nothing to do.
    let pass = world.running.control.reconcile().await.expect("a pass");
    assert_eq!(
        (pass.sandboxes_corrected, pass.orphans_destroyed),
        (0, 0),
        "{pass:?}"
    );
}

/// A journal that could not be read is mended by hand, and the agent started again.
#[tokio::test]
async fn what_a_host_could_not_read_comes_back_when_it_can() {
    let world = World::new().await;
    let (saved, lost) = (world.sandbox().await, world.sandbox().await);
    let set = |state, generation: Option<u64>| {
        world.host.with(|model| {
            let there = model.sandboxes.get_mut(&id(&saved)).expect("there");
            there.state = state;
            let before = there.generation;
            there.generation = generation.unwrap_or(before);
            before
        })
    };
    let gone = world.host.with(|model| model.sandboxes.remove(&id(&lost)));
    // The host knows nothing of it but that its folder is there.
    let generation = set(SimState::Error, Some(0));
    for corrected in [2, 0] {
        let pass = world.running.control.reconcile().await.expect("a pass");
        assert_eq!(pass.sandboxes_corrected, corrected, "{pass:?}");
    }
    assert_eq!(world.settled(&saved).await, "error");
    assert_eq!(world.settled(&lost).await, "error");
    set(SimState::Paused, Some(generation));
    let pass = world.running.control.reconcile().await.expect("a pass");
    assert_eq!(pass.sandboxes_corrected, 1, "{pass:?}");
    let record = world.get(&format!("/v1/sandboxes/{saved}")).await.1;
    assert_eq!(
        (&record["status"], &record["error"]),
        (&"paused".into(), &Value::Null)
    );
    // So does one that was away with its disk, and both can be used and ended.
    world
        .host
        .with(|model| model.sandboxes.insert(id(&lost), gone.expect("it was there")));
    world.running.control.reconcile().await.expect("a pass");
    assert_eq!(world.settled(&lost).await, "running");
    world
        .post(&format!("/v1/sandboxes/{saved}/resume"), json!({}))
        .await;
    world.until(&saved, "running").await;
    for one in [&saved, &lost] {
        world.call("DELETE", &format!("/v1/sandboxes/{one}"), None).await;
        world.until(one, "stopped").await;
    }
}

/// Its control plane moved, its registration was lost, or an old backup of the database was restored.
#[tokio::test]
async fn a_host_that_comes_back_as_another_keeps_its_sandboxes() {
    let world = World::new().await;
    let (running, paused) = (world.sandbox().await, world.sandbox().await);
    world
        .post(&format!("/v1/sandboxes/{paused}/pause"), json!({}))
        .await;
    world.until(&paused, "paused").await;
    let mut world = world
        .restart_with(|config| config.timings.host_silence = std::time::Duration::ZERO)
        .await;
    world.running.control.reconcile().await.expect("a pass");
    for id in [&running, &paused] {
        world.until(id, "missing").await;
    }
    let before = world.get(&format!("/v1/sandboxes/{running}")).await.1["host_id"].clone();

    world = world
        .restart_with(|config| {
            config.timings.host_silence = std::time::Duration::from_secs(90);
            config.timings.stranger_grace = std::time::Duration::from_secs(24 * 3600);
        })
        .await;
    let token = world
        .running
        .control
        .issue_host_token(None)
        .await
        .expect("a token")
        .token;
    world.host.register(&token).await;
    world.host.heartbeat().await;
    // One that the database has forgotten is left alone for long.
    let forgotten = wrenn_proto::id::SandboxId::new();
    world
        .host
        .with(|model| model.sandboxes.insert(forgotten, SimSandbox::stray(0)));
    let pass = world.running.control.reconcile().await.expect("a pass");
    assert_eq!(pass.orphans_destroyed, 0, "{pass:?}");
    world.until(&running, "running").await;
    world.until(&paused, "paused").await;
    let after = world.get(&format!("/v1/sandboxes/{running}")).await.1["host_id"].clone();
    assert_ne!(before, after);
    assert_eq!(world.host.with(|model| model.sandboxes.len()), 3);
    let (status, body) = world
        .post(&format!("/v1/sandboxes/{running}/exec"), json!({"cmd": "echo"}))
        .await;
    assert_eq!(status, 200, "{body}");
}

/// PostgreSQL keeps no zero characters, and a guest's words can hold them.
#[tokio::test]
async fn a_failure_in_words_that_no_database_keeps_still_settles() {
    let world = World::new().await;
    world.host.fail(
        Call::Create,
        ConnectError::invalid_argument("guest agent: \0 said"),
    );
    let (_, body) = world.post("/v1/sandboxes", json!({})).await;
    let sandbox = body["id"].as_str().expect("an id").to_owned();
    let record = world.until(&sandbox, "error").await;
    assert_eq!(record["error"]["message"], "guest agent:  said", "{record}");
}

#[tokio::test]
async fn an_operation_without_an_answer_is_taken_up_again() {
    let world = World::new().await;
    let sandbox = world.sandbox().await;
    world
        .host
        .fail(Call::Pause, ConnectError::unavailable("going down"));
    world
        .post(&format!("/v1/sandboxes/{sandbox}/pause"), json!({}))
        .await;
    world.host.wait_arrived(Call::Pause, 1).await;
    // The monitor takes it up, unless the news of the decision was faster.
    let deadline = tokio::time::Instant::now() + common::DEADLINE;
    while world.get(&format!("/v1/sandboxes/{sandbox}")).await.1["status"] != "paused" {
        world.running.control.reconcile().await.expect("a pass");
        assert!(tokio::time::Instant::now() < deadline, "never taken up");
    }
    world.host.wait_arrived(Call::Pause, 2).await;
}

#[tokio::test]
async fn an_agents_token_is_sealed_in_the_database_and_older_rows_are_read() {
    use sea_orm::ConnectionTrait as _;
    use sea_orm::sea_query::Query;
    let mut world = World::new().await;
    let token = world.host.tokens().rpc_token.clone();
    let db = world.database().await;
    let backend = db.get_database_backend();
    let stored = async || {
        let query = Query::select().column("rpc_token").from("hosts").to_owned();
        let row = db.query_one_raw(backend.build(&query)).await;
        let row = row.expect("a query").expect("a host");
        row.try_get::<String>("", "rpc_token").expect("a token")
    };
    let sealed = stored().await;
    assert!(sealed.starts_with("v1:") && !sealed.contains(&token), "{sealed}");
    world.sandbox().await;

    // As an earlier version wrote it.
    let mut update = Query::update();
    update.table("hosts").value("rpc_token", token.clone());
    db.execute_raw(backend.build(&update)).await.expect("an update");
    world = world.restart().await;
    world.host.heartbeat().await;
    world.sandbox().await;
    assert_eq!(stored().await, token);
    // The agent's next exchange of tokens seals it; the token itself stays.
    let body = json!({"refresh_token": world.host.tokens().refresh_token});
    let (status, body) = world.post("/v1/hosts/auth/refresh", body).await;
    assert_eq!(status, 200, "{body}");
    let again = stored().await;
    assert!(again.starts_with("v1:") && again != sealed, "{again}");
    world.sandbox().await;
    db.close().await.expect("closed");
}

#[tokio::test]
async fn a_host_that_is_slow_to_answer_holds_up_no_other() {
    let world = World::new().await;
    let mut hosts = vec![];
    for _ in 0..2 {
        let token = world
            .running
            .control
            .issue_host_token(None)
            .await
            .expect("a token");
        let mut host = wrenn_testkit::simhost::SimHost::start(&world.running.url).await;
        host.register(&token.token).await;
        hosts.push(host);
    }
    for host in &hosts {
        host.hold(Call::List);
    }
    world.host.hold(Call::List);
    let control = world.running.control.clone();
    let pass = tokio::spawn(async move { control.reconcile().await });
    // All are asked before any has answered.
    for host in hosts.iter().chain([&world.host]) {
        host.wait_arrived(Call::List, 1).await;
        assert!(!pass.is_finished());
    }
    for host in hosts.iter().chain([&world.host]) {
        host.release(Call::List);
    }
    let pass = pass.await.expect("no panic").expect("a pass");
    assert_eq!(pass.hosts_unanswered, 0);
}
