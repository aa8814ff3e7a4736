//! The stream of state changes, over real HTTP.

mod common;

use std::time::Duration;

use common::{DEADLINE, World, code};
use futures::StreamExt as _;
use sea_orm::ConnectionTrait as _;
use serde_json::{Value, json};
use wrenn_testkit::simhost::Call;

/// A client that follows the stream.
struct Follower {
    body: futures::stream::BoxStream<'static, reqwest::Result<Vec<u8>>>,
    text: String,
}

/// A message: its id, its name and its data.
type Message = (i64, String, Value);

impl Follower {
    async fn new(world: &World, last: Option<i64>) -> Self {
        let mut request = world
            .http
            .get(world.url("/v1/events/stream"))
            .header("x-api-key", &world.key);
        if let Some(last) = last {
            request = request.header("last-event-id", last.to_string());
        }
        let response = request.send().await.expect("an answer");
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        let body = response
            .bytes_stream()
            .map(|chunk| chunk.map(|bytes| bytes.to_vec()));
        Self {
            body: body.boxed(),
            text: String::new(),
        }
    }

    /// The next block of lines, a message or a comment; `None` at the end.
    async fn block(&mut self) -> Option<String> {
        loop {
            if let Some((block, rest)) = self.text.split_once("\n\n") {
                let (block, rest) = (block.to_owned(), rest.to_owned());
                self.text = rest;
                return Some(block);
            }
            let chunk = tokio::time::timeout(DEADLINE, self.body.next())
                .await
                .expect("news in time")?;
            self.text.push_str(&String::from_utf8_lossy(&chunk.ok()?));
        }
    }

    async fn message(&mut self) -> Option<Message> {
        loop {
            let block = self.block().await?;
            let field = |name: &str| {
                block
                    .lines()
                    .find_map(|line| line.strip_prefix(&format!("{name}: ")))
                    .map(str::to_owned)
            };
            if let (Some(id), Some(name), Some(data)) = (field("id"), field("event"), field("data")) {
                let data: Value = serde_json::from_str(&data).expect("JSON");
                assert_eq!(data["event"], json!(name));
                return Some((id.parse().expect("a number"), name, data));
            }
        }
    }

    /// Messages until one has this name.
    async fn until(&mut self, name: &str) -> Vec<Message> {
        let mut seen = Vec::new();
        loop {
            let message = self.message().await.expect("the stream goes on");
            let done = message.1 == name;
            seen.push(message);
            if done {
                return seen;
            }
        }
    }
}

#[tokio::test]
async fn a_life_is_told_in_order() {
    let world = World::new().await;
    let mut follower = Follower::new(&world, None).await;
    let (_, first, data) = follower.message().await.expect("a first message");
    assert_eq!(first, "connected", "{data}");
    let sandbox = world.sandbox().await;
    for operation in ["pause", "resume"] {
        world
            .post(&format!("/v1/sandboxes/{sandbox}/{operation}?wait=20"), json!({}))
            .await;
    }
    world
        .call("DELETE", &format!("/v1/sandboxes/{sandbox}?wait=20"), None)
        .await;
    let seen = follower.until("capsule.destroy").await;
    let told: Vec<_> = seen
        .iter()
        .map(|(_, name, data)| (name.as_str(), data["metadata"]["to"].as_str().unwrap_or_default()))
        .collect();
    assert_eq!(
        told,
        [
            ("capsule.state.changed", "pending"),
            ("capsule.state.changed", "starting"),
            ("capsule.create", "running"),
            ("capsule.state.changed", "pausing"),
            ("capsule.pause", "paused"),
            ("capsule.state.changed", "resuming"),
            ("capsule.resume", "running"),
            ("capsule.state.changed", "stopping"),
            ("capsule.destroy", "stopped"),
        ]
    );
    assert!(seen.windows(2).all(|pair| pair[0].0 < pair[1].0), "{seen:?}");
    let (_, _, last) = seen.last().expect("messages");
    assert_eq!(last["outcome"], "success");
    assert_eq!(last["resource"], json!({"id": sandbox, "type": "sandbox"}));
    assert_eq!(last["sandbox"]["status"], "stopped");
    assert!(
        last["timestamp"].as_str().is_some_and(|at| at.ends_with('Z')),
        "{last}"
    );

    // Whoever comes back hears what came after the last that was heard, and nothing twice.
    let (half, ..) = seen[4];
    let mut again = Follower::new(&world, Some(half)).await;
    let (connected, ..) = again.message().await.expect("a first message");
    assert_eq!(connected, half);
    let rest = again.until("capsule.destroy").await;
    let ids = |messages: &[Message]| messages.iter().map(|(id, ..)| *id).collect::<Vec<_>>();
    assert_eq!(ids(&rest), ids(&seen[5..]));
}

#[tokio::test]
async fn who_was_away_too_long_is_told_that_something_was_missed() {
    let world = World::new()
        .await
        .restart_with(|config| config.timings.event_retention = Duration::ZERO)
        .await;
    let first = async |last: i64| {
        let mut follower = Follower::new(&world, Some(last)).await;
        let (id, name, data) = follower.message().await.expect("a first message");
        assert_eq!(name, "connected");
        (id, data["metadata"]["missed"] == json!("true"))
    };
    let mut follower = Follower::new(&world, None).await;
    let (start, _, data) = follower.message().await.expect("a first message");
    assert_eq!(data.get("metadata"), None, "{data}");
    world.sandbox().await;
    let seen = follower.until("capsule.create").await;
    let (end, ..) = seen[seen.len() - 1];
    assert_eq!(first(start).await, (start, false), "all is still there");
    // Until all were taken in, some stay.
    let deadline = tokio::time::Instant::now() + DEADLINE;
    loop {
        world.running.control.prune_events().await.expect("a pass");
        let (id, missed) = first(end - 1).await;
        assert_eq!(id, end - 1);
        if missed {
            break;
        }
        assert!(tokio::time::Instant::now() < deadline, "the events stay");
    }
    assert_eq!(first(start).await, (start, true));
    assert_eq!(first(end).await, (end, false), "nothing came after it");
    // From another life of the database: it goes on from here.
    assert_eq!(first(end + 1000).await, (end, true));
    let mut ahead = Follower::new(&world, Some(end + 1000)).await;
    ahead.message().await.expect("a first message");
    world.sandbox().await;
    ahead.until("capsule.create").await;
}

#[tokio::test]
async fn what_a_newer_version_wrote_holds_up_nobody() {
    let world = World::new().await;
    let db = world.database().await;
    let mut follower = Follower::new(&world, None).await;
    follower.message().await.expect("a first message");
    for (kind, payload) in [
        ("capsule.teleported", r#"{"to": "elsewhere"}"#),
        (
            "capsule.state.changed",
            r#"{"from": "running", "to": "elsewhere"}"#,
        ),
    ] {
        let mut insert = sea_orm::sea_query::Query::insert();
        insert
            .into_table("events")
            .columns([
                "team_id",
                "kind",
                "outcome",
                "resource_type",
                "resource_id",
                "payload",
                "created_at",
                "actor_type",
            ])
            .values_panic([
                world.bootstrap.team_id.0.into(),
                kind.into(),
                "undecided".into(),
                "sandbox".into(),
                "x".into(),
                payload.into(),
                1i64.into(),
                "robot".into(),
            ]);
        db.execute(&insert).await.expect("an event");
    }
    world.sandbox().await;
    let seen = follower.until("capsule.create").await;
    let names: Vec<_> = seen.iter().map(|(_, name, _)| name.as_str()).collect();
    let changed = "capsule.state.changed";
    assert_eq!(names, [changed, changed, changed, "capsule.create"]);
    let (_, _, strange) = &seen[0];
    assert_eq!(strange["metadata"], json!({"from": "running"}), "{strange}");
    assert_eq!(
        (strange.get("actor"), strange.get("outcome")),
        (None, None),
        "{strange}"
    );
    // It waits for a version that knows it until it is too old; the others are taken in.
    let open = async || {
        let sql = "SELECT kind FROM events WHERE consumed_at IS NULL";
        let statement = sea_orm::Statement::from_string(db.get_database_backend(), sql);
        let rows = db.query_all_raw(statement).await.expect("rows");
        let kind = |row: sea_orm::QueryResult| row.try_get::<String>("", "kind").expect("a word");
        rows.into_iter().map(kind).collect::<Vec<_>>()
    };
    let deadline = tokio::time::Instant::now() + DEADLINE;
    while open().await != ["capsule.teleported"] {
        assert!(tokio::time::Instant::now() < deadline, "{:?}", open().await);
        tokio::task::yield_now().await;
    }
    world.running.control.prune_events().await.expect("a pass");
    assert!(open().await.is_empty());
}

/// Who caused each of these messages: the type of actor and its name.
fn actors(messages: &[Message]) -> Vec<(&str, &str, &str)> {
    messages
        .iter()
        .map(|(_, name, data)| {
            let actor = &data["actor"];
            assert_eq!(actor.get("id").is_some(), actor["type"] != "system", "{data}");
            (
                name.as_str(),
                data["actor"]["type"].as_str().unwrap_or_default(),
                data["actor"]["name"].as_str().unwrap_or_default(),
            )
        })
        .collect()
}

#[tokio::test]
async fn an_event_tells_whose_doing_it_is() {
    let world = World::new().await;
    let admin = world.session(world.bootstrap.user_id, None).await;
    let (_, me) = world.call_as(&admin, "GET", "/v1/me", None).await;
    let me = me["name"].as_str().expect("a name");
    let (_, keys) = world.call_as(&admin, "GET", "/v1/api-keys", None).await;
    let (key, key_id) = (
        keys[0]["name"].as_str().expect("a name"),
        keys[0]["id"].as_str().expect("an id"),
    );
    let mut follower = Follower::new(&world, None).await;
    follower.message().await.expect("a first message");
    let sandbox = world.sandbox().await;
    let seen = follower.until("capsule.create").await;
    assert_eq!(
        actors(&seen),
        [
            ("capsule.state.changed", "api_key", key),
            ("capsule.state.changed", "api_key", key),
            ("capsule.create", "api_key", key),
        ]
    );
    let (_, _, created) = seen.last().expect("messages");
    assert_eq!(created["actor"]["id"], key_id, "{created}");

    // Paused by a person; the end comes from a process that never saw the request.
    world.host.hold(Call::Pause);
    let path = format!("/v1/sandboxes/{sandbox}/pause");
    assert_eq!(world.call_as(&admin, "POST", &path, Some(json!({}))).await.0, 202);
    world.host.wait_arrived(Call::Pause, 1).await;
    let mut heard = follower.until("capsule.state.changed").await;
    let (last, ..) = heard[0];
    drop(follower);
    let world = world.restart().await;
    world.host.release(Call::Pause);
    let mut follower = Follower::new(&world, Some(last)).await;
    follower.message().await.expect("a first message");
    heard.extend(follower.until("capsule.pause").await);
    assert_eq!(
        actors(&heard),
        [
            ("capsule.state.changed", "user", me),
            ("capsule.pause", "user", me)
        ]
    );

    // What its host does by itself is nobody's; what is made of it then is the caller's again.
    let path = format!("/v1/sandboxes/{sandbox}/resume?wait=20");
    assert_eq!(world.post(&path, json!({})).await.0, 200);
    follower.until("capsule.resume").await;
    let generation = world
        .host
        .with(|model| model.sandboxes[&common::id(&sandbox)].generation);
    let paused = wrenn_proto::rest::SandboxStatus::Paused;
    world
        .host
        .event(common::id(&sandbox), generation, paused, "ttl_expired")
        .await;
    let seen = follower.until("capsule.pause").await;
    assert_eq!(actors(&seen), [("capsule.pause", "system", "")]);
    let body = json!({"sandbox_id": sandbox, "name": "kept"});
    assert_eq!(world.post("/v1/snapshots?wait=20", body).await.0, 201);
    assert_eq!(
        actors(&follower.until("template.snapshot.create").await).last(),
        Some(&("template.snapshot.create", "api_key", key))
    );
    assert_eq!(
        world
            .call_as(&admin, "DELETE", "/v1/snapshots/kept", None)
            .await
            .0,
        204
    );
    assert_eq!(
        actors(&follower.until("template.snapshot.delete").await).last(),
        Some(&("template.snapshot.delete", "user", me))
    );
}

#[tokio::test]
async fn failures_and_snapshots_are_told_to_their_team_alone() {
    let world = World::new().await;
    let (_, other) = world.running.control.create_team("Others").await.expect("a team");
    let mut follower = Follower::new(&world, None).await;
    let sandbox = world.sandbox().await;
    world.host.fail(
        Call::Pause,
        connectrpc::ConnectError::internal("the disk is full"),
    );
    world
        .post(&format!("/v1/sandboxes/{sandbox}/pause?wait=20"), json!({}))
        .await;
    let seen = follower.until("capsule.pause").await;
    let (_, _, failed) = seen.last().expect("messages");
    assert_eq!(failed["outcome"], "error", "{failed}");
    assert!(
        failed["error"]
            .as_str()
            .is_some_and(|why| why.contains("disk is full")),
        "{failed}"
    );
    let (status, body) = world
        .post(
            "/v1/snapshots?wait=20",
            json!({"sandbox_id": sandbox, "name": "kept"}),
        )
        .await;
    assert_eq!(status, 201, "{body}");
    let seen = follower.until("template.snapshot.create").await;
    let (_, _, made) = seen.last().expect("messages");
    assert_eq!(made["metadata"]["name"], "kept");
    assert_eq!(made["resource"], json!({"id": body["id"], "type": "snapshot"}));
    assert_eq!(world.call("DELETE", "/v1/snapshots/kept", None).await.0, 204);
    follower.until("template.snapshot.delete").await;

    // One that its host cannot make, and one whose sandbox is destroyed meanwhile.
    world.host.fail(
        Call::CreateSnapshot,
        connectrpc::ConnectError::internal("no room for the memory"),
    );
    let body = json!({"sandbox_id": sandbox, "name": "half"});
    let (status, body) = world.post("/v1/snapshots?wait=20", body).await;
    assert!(status >= 400, "{body}");
    let seen = follower.until("template.snapshot.create").await;
    let (_, _, failed) = seen.last().expect("messages");
    assert_eq!(failed["outcome"], "error", "{failed}");
    assert_eq!(failed["metadata"]["name"], "half", "{failed}");
    assert_eq!(failed["actor"]["type"], "api_key", "{failed}");
    assert!(
        failed["error"]
            .as_str()
            .is_some_and(|why| why.contains("no room for the memory")),
        "{failed}"
    );
    let doomed = world.sandbox().await;
    world.host.hold(Call::CreateSnapshot);
    let body = json!({"sandbox_id": doomed, "name": "never"});
    assert_eq!(world.post("/v1/snapshots?wait=0", body).await.0, 202);
    world.host.wait_arrived(Call::CreateSnapshot, 3).await;
    let path = format!("/v1/sandboxes/{doomed}");
    world.call("DELETE", &path, None).await;
    let gone = format!("/v1/sandboxes/{doomed}?wait=20");
    assert_eq!(world.get(&gone).await.1["status"], "stopped");
    world.running.control.reconcile().await.expect("a pass");
    // What the host says of it now is no news.
    world.host.release(Call::CreateSnapshot);
    let seen = follower.until("template.snapshot.create").await;
    let (_, _, failed) = seen.last().expect("messages");
    assert_eq!(
        (&failed["outcome"], &failed["metadata"]["name"]),
        (&json!("error"), &json!("never")),
        "{failed}"
    );
    assert!(failed["error"].is_string(), "{failed}");

    // The other team hears of its own only.
    let response = world
        .http
        .get(world.url("/v1/events/stream"))
        .header("x-api-key", other)
        .header("last-event-id", "0")
        .send()
        .await
        .expect("an answer");
    let mut body = response.bytes_stream();
    let mut text = String::new();
    while !text.contains("keepalive") {
        let chunk = tokio::time::timeout(DEADLINE, body.next())
            .await
            .expect("a sign of life")
            .expect("the stream goes on")
            .expect("bytes");
        text.push_str(&String::from_utf8_lossy(&chunk));
    }
    assert!(
        text.contains("event: connected") && text.contains(": keepalive"),
        "{text}"
    );
    assert!(!text.contains("capsule"), "{text}");
}

#[tokio::test]
async fn strangers_and_nonsense_are_refused_and_the_end_is_orderly() {
    let world = World::new().await;
    let request = world.http.get(world.url("/v1/events/stream")).timeout(DEADLINE);
    let (status, body) = common::answer(request).await;
    assert_eq!((status, code(&body)), (401, "unauthorized"));
    for last in ["x", "-1", "1.5", "99999999999999999999"] {
        let request = world
            .request("GET", "/v1/events/stream")
            .header("last-event-id", last);
        let (status, body) = common::answer(request).await;
        assert_eq!((status, code(&body)), (400, "invalid_request"), "{last}: {body}");
    }
    let mut follower = Follower::new(&world, None).await;
    follower.message().await.expect("a first message");
    let world = world
        .restart_with(|config| config.timings.shutdown_grace = Duration::from_secs(20))
        .await;
    assert_eq!(follower.message().await, None);
    drop(world);
}

/// A newer version at work on the same database, in the middle of an upgrade.
#[tokio::test]
async fn an_event_of_a_kind_that_is_not_known_yet_holds_up_nothing() {
    let world = World::new().await;
    let sandbox = world.sandbox().await;
    let mut follower = Follower::new(&world, None).await;
    world
        .database()
        .await
        .execute_unprepared(
            "INSERT INTO events (team_id, kind, resource_type, resource_id, payload, created_at) \
             SELECT team_id, 'moon.landed', 'moon', 'm', '{}', 0 FROM sandboxes",
        )
        .await
        .expect("inserted");
    world.running.control.relay().await.expect("a pass");
    world
        .post(&format!("/v1/sandboxes/{sandbox}/pause?wait=20"), json!({}))
        .await;
    world.running.control.relay().await.expect("a pass");
    let seen = follower.until("capsule.pause").await;
    assert!(seen.iter().all(|(_, name, _)| name != "moon.landed"), "{seen:?}");
}
