//! What is in the audit log beyond the requests that say all by themselves: frames, workers, hosts.

mod common;

use std::time::Duration;

use common::{DEADLINE, World};
use futures::{SinkExt as _, StreamExt as _};
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use wrenn_testkit::simhost::Call;

impl World {
    /// The platform's whole log, newest first.
    async fn log(&self, query: &str) -> Vec<Value> {
        let admin = self.session(self.bootstrap.user_id, None).await;
        let path = format!("/v1/admin/audit-logs?limit=500&{query}");
        let (status, mut body) = self.call_as(&admin, "GET", &path, None).await;
        assert_eq!(status, 200, "{body}");
        serde_json::from_value(body["entries"].take()).expect("entries")
    }

    /// Waits for an entry about something.
    async fn noted(&self, action: &str, resource: &str) -> Value {
        let deadline = tokio::time::Instant::now() + DEADLINE;
        loop {
            let mut entries = self.log(&format!("action={action}&resource={resource}")).await;
            assert!(entries.len() < 2, "{entries:?}");
            if let Some(entry) = entries.pop() {
                return entry;
            }
            assert!(tokio::time::Instant::now() < deadline, "{action} is never noted");
            tokio::task::yield_now().await;
        }
    }
}

type Socket = tokio_tungstenite::WebSocketStream<tokio_tungstenite::MaybeTlsStream<tokio::net::TcpStream>>;

/// Opens a WebSocket, sends a frame and waits for the first answer.
async fn open(world: &World, path: &str, first: Option<Value>) -> (Socket, Value) {
    let mut request = world
        .url(path)
        .replacen("http", "ws", 1)
        .into_client_request()
        .expect("a request");
    request
        .headers_mut()
        .insert("x-api-key", world.key.parse().expect("a header"));
    let (mut socket, _) = tokio_tungstenite::connect_async(request)
        .await
        .expect("connected");
    if let Some(first) = first {
        socket.send(Message::text(first.to_string())).await.expect("sent");
    }
    let Some(Ok(Message::Text(text))) = socket.next().await else {
        panic!("no frame")
    };
    (socket, serde_json::from_str(&text).expect("JSON"))
}

#[tokio::test]
async fn a_kill_by_a_frame_is_noted_with_its_caller() {
    let world = World::new().await;
    let sleep = json!({"type": "start", "cmd": "sleep"});
    for (way, frame) in [("exec/stream", "stop"), ("pty", "kill"), ("follow", "stop")] {
        let id = world.sandbox().await;
        let path = |way: &str| format!("/v1/sandboxes/{id}/{way}");
        let (mut socket, mut started) = match way {
            "follow" => open(&world, &path("exec/stream"), Some(sleep.clone())).await,
            way => open(&world, &path(way), Some(sleep.clone())).await,
        };
        if way == "follow" {
            let pid = started["pid"].take();
            drop(socket);
            (socket, started) = open(&world, &path(&format!("processes/{pid}/stream")), None).await;
        }
        assert!(started["pid"].is_number(), "{started}");
        let kill = json!({"type": frame}).to_string();
        socket.send(Message::text(kill)).await.expect("sent");
        let entry = world.noted("sandbox.kill", &id).await;
        assert_eq!(entry["actor_type"], "api_key", "{entry}");
        assert_eq!(entry["actor_id"], world.bootstrap.key_id.to_string());
        assert_eq!(entry["team_id"], world.bootstrap.team_id.to_string());
        assert_eq!(entry["outcome"], "success");
        assert_eq!(entry["source_address"], "127.0.0.1");
    }
}

#[tokio::test]
async fn what_follows_from_a_deletion_is_the_systems() {
    let world = World::new().await;
    let (ada, bob) = (world.person("ada").await, world.person("bob").await);
    let mut left = Vec::new();
    for person in [&ada, &bob] {
        let body = Some(json!({}));
        let (status, body) = world
            .call_as(&person.token, "POST", "/v1/sandboxes?wait=20", body)
            .await;
        assert_eq!(status, 201, "{body}");
        let sandbox = body["id"].as_str().expect("an id").to_owned();
        let body = Some(json!({"sandbox_id": sandbox, "name": "s"}));
        let (status, body) = world.call_as(&person.token, "POST", "/v1/snapshots", body).await;
        assert_eq!(status, 201, "{body}");
        let template = body["id"].as_str().expect("an id").to_owned();
        left.push((person.team.clone(), sandbox, template));
    }
    // One team by its owner, one with its owner's account.
    let path = format!("/v1/teams/{}", ada.team);
    assert_eq!(world.call_as(&ada.token, "DELETE", &path, None).await.0, 204);
    assert_eq!(world.call_as(&bob.token, "DELETE", "/v1/me", None).await.0, 204);
    for (team, sandbox, template) in &left {
        for (action, resource) in [("sandbox.destroy", sandbox), ("template.delete", template)] {
            let entry = world.noted(action, resource).await;
            assert_eq!(entry["actor_type"], "system", "{entry}");
            assert_eq!(&entry["team_id"], team.as_str(), "{entry}");
        }
    }
    let asked = world.noted("team.delete", &ada.team).await;
    assert_eq!(asked["actor_id"], ada.id.to_string(), "{asked}");
    let followed = world.noted("team.delete", &bob.team).await;
    assert_eq!(followed["actor_type"], "system", "{followed}");

    let world = world
        .restart_with(|config| config.timings.account_grace = Duration::ZERO)
        .await;
    world.running.control.hard_delete_pass().await.expect("a pass");
    let entry = world.noted("account.hard_delete", &bob.id.to_string()).await;
    assert_eq!(entry["actor_type"], "system", "{entry}");
}

#[tokio::test]
async fn a_host_that_is_lost_and_back_is_noted_with_what_it_took_along() {
    let world = World::new().await;
    let sandbox = world.sandbox().await;
    let host = world.get(&format!("/v1/sandboxes/{sandbox}")).await.1["host_id"]
        .as_str()
        .expect("a host")
        .to_owned();
    let mut world = world
        .restart_with(|config| config.timings.host_silence = Duration::ZERO)
        .await;
    world.host.disconnect();
    world.running.control.reconcile().await.expect("a pass");
    let lost = world.noted("host.unreachable", &host).await;
    assert_eq!(lost["actor_type"], "system", "{lost}");
    let missing = world.noted("sandbox.missing", &sandbox).await;
    assert_eq!(missing["actor_type"], "system", "{missing}");
    assert_eq!(missing["team_id"], world.bootstrap.team_id.to_string());

    let mut world = world
        .restart_with(|config| config.timings.host_silence = Duration::from_secs(90))
        .await;
    world.host.reconnect().await;
    world.host.heartbeat().await;
    let back = world.noted("host.online", &host).await;
    assert_eq!(back["actor_type"], "system", "{back}");
}

#[tokio::test]
async fn a_create_is_noted_whole_though_its_client_has_gone() {
    let world = World::new().await;
    let id = world.sandbox().await;
    world.host.hold(Call::Create);
    world.host.hold(Call::Pause);
    let mut requests = Vec::new();
    for keyed in [false, true] {
        let mut request = world.request("POST", "/v1/sandboxes?wait=20").json(&json!({}));
        if keyed {
            request = request.header("idempotency-key", "k");
        }
        requests.push(tokio::spawn(request.send()));
    }
    world.host.wait_arrived(Call::Create, 2).await;
    let pause = world.request("POST", &format!("/v1/sandboxes/{id}/pause?wait=20"));
    requests.push(tokio::spawn(pause.send()));
    world.host.wait_arrived(Call::Pause, 1).await;
    for request in requests {
        request.abort();
    }
    // What a pause is about stands in its path, so nobody waits for how it ends.
    let entry = world.noted("sandbox.pause", &id).await;
    assert_eq!(entry["outcome"], "unknown", "{entry}");
    world.host.release(Call::Create);
    world.host.release(Call::Pause);
    let (_, listed) = world.get("/v1/sandboxes").await;
    let made: Vec<_> = listed
        .as_array()
        .or_else(|| listed["sandboxes"].as_array())
        .expect("sandboxes")
        .iter()
        .map(|sandbox| sandbox["id"].as_str().expect("an id"))
        .filter(|made| *made != id)
        .collect();
    assert_eq!(made.len(), 2, "{listed}");
    for made in made {
        let entry = world.noted("sandbox.create", made).await;
        assert_eq!(entry["outcome"], "success", "{entry}");
        assert_eq!(entry["status"], 201, "{entry}");
        assert_eq!(entry["actor_id"], world.bootstrap.key_id.to_string());
    }
}
