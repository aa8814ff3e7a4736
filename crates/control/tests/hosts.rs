//! Hosts as people manage them: whose sandboxes they take, and how they go.

mod common;

use common::{Person, World, code, message};
use sea_orm::ConnectionTrait as _;
use serde_json::{Value, json};
use wrenn_testkit::simhost::{Call, SimHost};

/// A world with a team that may bring hosts, and has brought one.
struct Fixture {
    world: World,
    platform: String,
    owner: Person,
    key: String,
    own: SimHost,
}

impl Fixture {
    async fn new() -> Self {
        let world = World::new().await;
        let platform = world.session(world.bootstrap.user_id, None).await;
        let owner = world.person("owner").await;
        let path = format!("/v1/admin/teams/{}/byoc", owner.team);
        let (status, body) = world
            .call_as(&owner.token, "POST", "/v1/hosts", Some(json!({"type": "byoc"})))
            .await;
        assert_eq!((status, code(&body)), (403, "forbidden"), "{body}");
        assert!(message(&body).contains("a platform admin can let it"), "{body}");
        let (status, body) = world
            .call_as(&platform, "PUT", &path, Some(json!({"byoc": true})))
            .await;
        assert_eq!(status, 204, "{body}");
        let (status, key) = world
            .call_as(&owner.token, "POST", "/v1/api-keys", Some(json!({"name": "k"})))
            .await;
        assert_eq!(status, 201, "{key}");
        let body = json!({"type": "byoc", "provider": "hetzner", "availability_zone": "fsn1"});
        let (status, made) = world.call_as(&owner.token, "POST", "/v1/hosts", Some(body)).await;
        assert_eq!(status, 201, "{made}");
        let shown = &made["host"];
        assert_eq!(
            (
                shown["type"].as_str(),
                shown["status"].as_str(),
                shown["team_id"].as_str()
            ),
            (Some("byoc"), Some("pending"), Some(owner.team.as_str())),
            "{made}"
        );
        let mut own = SimHost::start(&world.running.url).await;
        own.register(made["registration_token"].as_str().expect("a token"))
            .await;
        own.heartbeat().await;
        Self {
            key: key["key"].as_str().expect("a key").to_owned(),
            world,
            platform,
            owner,
            own,
        }
    }

    /// A request of the team.
    async fn own(&self, method: &str, path: &str, body: Option<Value>) -> (u16, Value) {
        self.world.call_as(&self.owner.token, method, path, body).await
    }

    /// The platform's host says that it is full, so that sandboxes of the team come to its own.
    async fn fill_the_platforms_host(&self) {
        self.world
            .host
            .heartbeat_with(0, wrenn_proto::rest::TemplateStatus::Ready)
            .await;
    }

    /// A sandbox of the team, when it is there or has failed.
    async fn create(&self) -> (u16, Value) {
        let request = self
            .world
            .http
            .post(self.world.url("/v1/sandboxes?wait=20"))
            .header("x-api-key", &self.key)
            .json(&json!({}))
            .timeout(common::DEADLINE);
        common::answer(request).await
    }

    fn host_path(&self) -> String {
        format!("/v1/hosts/{}", self.own.tokens().host_id)
    }

    async fn sql(&self, sql: &str) {
        let database = self.world.database().await;
        database
            .execute_unprepared(sql)
            .await
            .expect("the statement runs");
    }

    /// Housekeeping, until nothing is left to delete.
    async fn until_gone(&self) {
        let deadline = tokio::time::Instant::now() + common::DEADLINE;
        while self.world.running.control.deletion_pass().await.expect("a pass") > 0 {
            assert!(tokio::time::Instant::now() < deadline, "never gone");
            tokio::task::yield_now().await;
        }
    }

    async fn hosts_in_database(&self) -> usize {
        let database = self.world.database().await;
        let sql = "SELECT id FROM hosts";
        let backend = database.get_database_backend();
        let rows = database
            .query_all_raw(sea_orm::Statement::from_string(backend, sql))
            .await
            .expect("rows");
        rows.len()
    }
}

#[tokio::test]
async fn hosts_are_seen_by_those_whose_they_are() {
    let fixture = Fixture::new().await;
    let (world, platform) = (&fixture.world, &fixture.platform);
    let (status, body) = world
        .call_as(platform, "POST", "/v1/hosts", Some(json!({"type": "regular"})))
        .await;
    assert_eq!(status, 201, "{body}");
    let regular = body["host"]["id"].as_str().expect("an id").to_owned();
    let (_, all) = world.call_as(platform, "GET", "/v1/hosts", None).await;
    assert_eq!(all.as_array().map(Vec::len), Some(3), "{all}");
    let (_, page) = world
        .call_as(
            platform,
            "GET",
            "/v1/hosts?limit=1&before=host-ffffffff-ffff-ffff-ffff-ffffffffffff",
            None,
        )
        .await;
    assert_eq!(page[0]["id"], all[0]["id"]);
    let (_, own) = fixture.own("GET", "/v1/hosts", None).await;
    assert_eq!(own.as_array().map(Vec::len), Some(1), "{own}");
    assert_eq!(
        (
            own[0]["status"].as_str(),
            own[0]["provider"].as_str(),
            own[0]["cpu_cores"].as_u64()
        ),
        (Some("online"), Some("hetzner"), Some(64)),
        "{own}"
    );
    // What is not theirs is not there for them; what they may not do is said.
    let (status, body) = fixture.own("GET", &format!("/v1/hosts/{regular}"), None).await;
    assert_eq!((status, code(&body)), (404, "not_found"));
    for (body, wanted) in [
        (json!({"type": "regular"}), (403, "forbidden")),
        (
            json!({"type": "byoc", "team_id": "team-00000000-0000-0000-0000-00000000000f"}),
            (404, "not_found"),
        ),
        (
            json!({"type": "byoc", "provider": "x".repeat(65)}),
            (400, "invalid_request"),
        ),
        (
            json!({"type": "byoc", "provider": "a\0b"}),
            (400, "invalid_request"),
        ),
        (json!({"type": "other"}), (400, "invalid_request")),
    ] {
        let (status, answer) = fixture.own("POST", "/v1/hosts", Some(body)).await;
        assert_eq!((status, code(&answer)), wanted, "{answer}");
    }
    let body = json!({"type": "regular", "team_id": fixture.owner.team});
    let (status, answer) = world.call_as(platform, "POST", "/v1/hosts", Some(body)).await;
    assert_eq!((status, code(&answer)), (400, "invalid_request"), "{answer}");
    fixture.world.running.stop().await;
}

#[tokio::test]
async fn a_new_registration_token_ends_those_before() {
    let fixture = Fixture::new().await;
    let path = format!("{}/token", fixture.host_path());
    let mut tokens = Vec::new();
    for _ in 0..2 {
        let (status, body) = fixture.own("POST", &path, None).await;
        assert_eq!(status, 201, "{body}");
        tokens.push(body["registration_token"].as_str().expect("a token").to_owned());
    }
    let register = async |token: &str| {
        let body = json!({
            "token": token, "arch": "x86_64", "cpu_cores": 1, "memory_mb": 1, "disk_gb": 1,
            "address": "http://127.0.0.1:9",
        });
        let request = fixture.world.http.post(fixture.world.url("/v1/hosts/register"));
        common::answer(request.json(&body)).await
    };
    let (status, body) = register(&tokens[0]).await;
    assert_eq!((status, code(&body)), (401, "unauthorized"));
    let (status, body) = register(&tokens[1]).await;
    assert_eq!(status, 201, "{body}");
    assert_eq!(body["host_id"], fixture.own.tokens().host_id.as_str());
    fixture.world.running.stop().await;
}

#[tokio::test]
async fn tags_are_added_listed_and_removed() {
    let fixture = Fixture::new().await;
    let path = format!("{}/tags", fixture.host_path());
    for tag in ["zone:a", "gpu=1", "gpu=1"] {
        let (status, body) = fixture.own("POST", &path, Some(json!({"tag": tag}))).await;
        assert_eq!(status, 204, "{body}");
    }
    for tag in ["", "a b", "a/b", &"x".repeat(65)] {
        let (status, body) = fixture.own("POST", &path, Some(json!({"tag": tag}))).await;
        assert_eq!((status, code(&body)), (400, "invalid_request"), "{body}");
    }
    assert_eq!(
        fixture.own("GET", &path, None).await.1,
        json!(["gpu=1", "zone:a"])
    );
    let one = format!("{path}/gpu=1");
    assert_eq!(fixture.own("DELETE", &one, None).await.0, 204);
    assert_eq!(fixture.own("DELETE", &one, None).await.0, 404);
    for number in 1..64 {
        let (status, _) = fixture
            .own("POST", &path, Some(json!({"tag": format!("t{number}")})))
            .await;
        assert_eq!(status, 204, "{number}");
    }
    let (status, body) = fixture.own("POST", &path, Some(json!({"tag": "more"}))).await;
    assert_eq!((status, code(&body)), (409, "conflict"), "{body}");
    fixture.world.running.stop().await;
}

#[tokio::test]
async fn a_teams_own_host_takes_its_sandboxes_alone() {
    let fixture = Fixture::new().await;
    let world = &fixture.world;
    // The team has its own, and another team has nothing.
    fixture.fill_the_platforms_host().await;
    for _ in 0..3 {
        let (status, body) = fixture.create().await;
        assert_eq!(
            (status, body["host_id"].as_str()),
            (201, Some(fixture.own.tokens().host_id.as_str())),
            "{body}"
        );
        let (status, body) = world.post("/v1/sandboxes?wait=20", json!({})).await;
        assert_eq!((status, code(&body)), (503, "no_capacity"), "{body}");
    }
    // Nor does it get another team's by saying that it has them.
    world.host.heartbeat().await;
    let sandbox = world.sandbox().await;
    let there = world
        .host
        .with(|model| model.sandboxes.remove(&common::id(&sandbox)))
        .expect("there");
    fixture
        .own
        .with(|model| model.sandboxes.insert(common::id(&sandbox), there));
    fixture
        .sql(
            "UPDATE sandboxes SET status = 'missing', previous_status = 'running' WHERE host_id IN \
              (SELECT id FROM hosts WHERE kind = 'regular')",
        )
        .await;
    fixture
        .sql("UPDATE hosts SET status = 'unreachable' WHERE kind = 'regular'")
        .await;
    world.running.control.reconcile().await.expect("a pass");
    let (_, body) = world.get(&format!("/v1/sandboxes/{sandbox}")).await;
    assert_eq!(
        (body["status"].as_str(), body["host_id"].as_str()),
        (Some("missing"), Some(world.host.tokens().host_id.as_str())),
        "{body}"
    );
    fixture.world.running.stop().await;
}

#[tokio::test]
async fn a_host_with_sandboxes_goes_only_by_force() {
    let fixture = Fixture::new().await;
    let path = fixture.host_path();
    fixture.fill_the_platforms_host().await;
    let mut sandboxes = Vec::new();
    for _ in 0..2 {
        let (status, body) = fixture.create().await;
        assert_eq!(status, 201, "{body}");
        sandboxes.push(body["id"].as_str().expect("an id").to_owned());
    }
    sandboxes.sort();
    let (status, body) = fixture.own("GET", &format!("{path}/delete-preview"), None).await;
    assert_eq!((status, &body["sandbox_ids"]), (200, &json!(sandboxes)), "{body}");
    let (status, body) = fixture.own("DELETE", &path, None).await;
    assert_eq!((status, code(&body)), (409, "host_has_sandboxes"), "{body}");
    assert_eq!(body["sandbox_ids"], json!(sandboxes), "{body}");
    // The refusal has changed nothing.
    fixture.own.heartbeat().await;
    let (status, _) = fixture.create().await;
    assert_eq!(status, 201);

    let (status, body) = fixture.own("DELETE", &format!("{path}?force=true"), None).await;
    assert_eq!(status, 204, "{body}");
    for (method, path) in [
        ("GET", path.clone()),
        ("DELETE", path.clone()),
        ("POST", format!("{path}/token")),
    ] {
        let (status, body) = fixture.own(method, &path, None).await;
        assert_eq!((status, code(&body)), (404, "not_found"), "{body}");
    }
    assert_eq!(fixture.own("GET", "/v1/hosts", None).await.1, json!([]));
    fixture.until_gone().await;
    assert_eq!(fixture.own.with(|model| model.sandboxes.len()), 0);
    assert_eq!(fixture.hosts_in_database().await, 1);
    let (_, body) = fixture
        .own("GET", &format!("/v1/sandboxes/{}", sandboxes[0]), None)
        .await;
    assert_eq!(body["status"], "stopped", "{body}");
    // Its agent is nobody now.
    let tokens = fixture.own.tokens();
    let refresh = fixture
        .world
        .http
        .post(fixture.world.url("/v1/hosts/auth/refresh"))
        .json(&json!({"refresh_token": tokens.refresh_token}));
    assert_eq!(common::answer(refresh).await.0, 401);
    let beat = fixture
        .world
        .http
        .post(fixture.world.url(&format!("{path}/heartbeat")))
        .bearer_auth(&tokens.token)
        .json(&json!({}));
    assert_eq!(common::answer(beat).await.0, 401);
    let (_, log) = fixture
        .own("GET", "/v1/audit-logs?action=host.delete", None)
        .await;
    let outcomes: Vec<_> = log["entries"]
        .as_array()
        .expect("entries")
        .iter()
        .map(|entry| entry["status"].as_u64())
        .collect();
    assert_eq!(outcomes, [Some(404), Some(204), Some(409)], "{log}");
    fixture.world.running.stop().await;
}

#[tokio::test]
async fn a_host_that_does_not_answer_goes_with_its_sandboxes() {
    let mut fixture = Fixture::new().await;
    fixture.fill_the_platforms_host().await;
    let (status, body) = fixture.create().await;
    assert_eq!(status, 201, "{body}");
    let sandbox = format!("/v1/sandboxes/{}", body["id"].as_str().expect("an id"));
    fixture.own.disconnect();
    let path = format!("{}?force=true", fixture.host_path());
    assert_eq!(fixture.own("DELETE", &path, None).await.0, 204);
    // As long as it may still be there, it is asked; then nobody waits for it.
    fixture
        .world
        .running
        .control
        .deletion_pass()
        .await
        .expect("a pass");
    assert_eq!(fixture.own("GET", &sandbox, None).await.1["status"], "stopping");
    fixture
        .sql("UPDATE hosts SET last_heartbeat_at = 0 WHERE kind = 'byoc'")
        .await;
    fixture.world.running.control.reconcile().await.expect("a pass");
    fixture.until_gone().await;
    assert_eq!(fixture.own("GET", &sandbox, None).await.1["status"], "stopped");
    assert_eq!(fixture.hosts_in_database().await, 1);
    fixture.world.running.stop().await;
}

#[tokio::test]
async fn a_snapshot_that_is_nowhere_else_is_not_lost_by_accident() {
    let fixture = Fixture::new().await;
    let path = fixture.host_path();
    fixture.fill_the_platforms_host().await;
    let (_, body) = fixture.create().await;
    let sandbox = body["id"].as_str().expect("an id").to_owned();
    let body = json!({"sandbox_id": sandbox, "name": "golden"});
    let (status, body) = fixture.own("POST", "/v1/snapshots", Some(body)).await;
    assert_eq!(status, 201, "{body}");
    let (status, body) = fixture
        .own("DELETE", &format!("/v1/sandboxes/{sandbox}?wait=20"), None)
        .await;
    assert!(status < 300, "{body}");
    let (status, body) = fixture.own("DELETE", &path, None).await;
    assert_eq!((status, code(&body)), (409, "conflict"), "{body}");
    assert!(message(&body).contains("golden"), "{body}");
    assert_eq!(
        fixture.own("DELETE", &format!("{path}?force=true"), None).await.0,
        204
    );
    fixture.until_gone().await;
    let (_, snapshots) = fixture.own("GET", "/v1/snapshots?type=snapshot", None).await;
    assert_eq!(snapshots, json!([]));
    fixture.world.running.stop().await;
}

#[tokio::test]
async fn what_is_just_being_placed_on_a_host_that_goes_starts_elsewhere() {
    let mut fixture = Fixture::new().await;
    fixture.fill_the_platforms_host().await;
    fixture.own.hold(Call::Create);
    let request = fixture
        .world
        .http
        .post(fixture.world.url("/v1/sandboxes"))
        .header("x-api-key", &fixture.key)
        .json(&json!({}));
    let (status, body) = common::answer(request).await;
    assert_eq!(status, 202, "{body}");
    let sandbox = format!("/v1/sandboxes/{}", body["id"].as_str().expect("an id"));
    fixture.own.wait_arrived(Call::Create, 1).await;
    fixture.world.host.heartbeat().await;
    // As if it had been placed at the moment of the deletion, and nobody had carried it further.
    fixture
        .sql("UPDATE hosts SET deletion = 'emptying' WHERE kind = 'byoc'")
        .await;
    fixture.world = fixture.world.restart().await;
    let (_, body) = fixture.own("GET", &format!("{sandbox}?wait=20"), None).await;
    assert_eq!(
        (body["status"].as_str(), body["host_id"].as_str()),
        (
            Some("running"),
            Some(fixture.world.host.tokens().host_id.as_str())
        ),
        "{body}"
    );
    fixture.until_gone().await;
    assert_eq!(fixture.hosts_in_database().await, 1);
    fixture.world.running.stop().await;
}

#[tokio::test]
async fn nothing_is_placed_on_a_host_that_went_a_moment_ago() {
    for change in [
        "UPDATE hosts SET deletion = 'emptying' WHERE kind = 'byoc'",
        "UPDATE hosts SET status = 'unreachable' WHERE kind = 'byoc'",
        "UPDATE template_hosts SET status = 'failed' WHERE host_id IN (SELECT id FROM hosts WHERE kind = 'byoc')",
    ] {
        let fixture = Fixture::new().await;
        fixture.fill_the_platforms_host().await;
        let (status, body) = fixture.create().await;
        assert_eq!(status, 201, "{body}");
        // By another control plane: this one has just read that the host is there.
        fixture.sql(change).await;
        let (status, body) = fixture.create().await;
        assert_eq!((status, code(&body)), (503, "no_capacity"), "{change}: {body}");
        fixture.world.host.heartbeat().await;
        let (status, body) = fixture.create().await;
        assert_eq!(
            (status, body["host_id"].as_str()),
            (201, Some(fixture.world.host.tokens().host_id.as_str())),
            "{change}: {body}"
        );
        // The refusal has left no record.
        let (_, all) = fixture.own("GET", "/v1/sandboxes?all=true", None).await;
        assert_eq!(all.as_array().map(Vec::len), Some(2), "{change}: {all}");
        fixture.world.running.stop().await;
    }
}

#[tokio::test]
async fn a_deletion_that_was_not_finished_is_taken_back_or_taken_up() {
    let fixture = Fixture::new().await;
    fixture.fill_the_platforms_host().await;
    let (status, body) = fixture.create().await;
    assert_eq!(status, 201, "{body}");
    // Marked by a process that died before it looked again: the sandbox was there, so the host stays.
    fixture
        .sql("UPDATE hosts SET deletion = 'emptying' WHERE kind = 'byoc'")
        .await;
    assert_eq!(fixture.own("GET", &fixture.host_path(), None).await.0, 404);
    fixture.until_gone().await;
    assert_eq!(fixture.own("GET", &fixture.host_path(), None).await.0, 200);
    fixture.own.heartbeat().await;
    // Marked to go with everything: the next one does it.
    fixture
        .sql("UPDATE hosts SET deletion = 'destroying' WHERE kind = 'byoc'")
        .await;
    fixture.until_gone().await;
    assert_eq!(fixture.hosts_in_database().await, 1);
    assert_eq!(fixture.own.with(|model| model.sandboxes.len()), 0);
    fixture.world.running.stop().await;
}

#[tokio::test]
async fn a_deleted_team_takes_its_hosts_with_it() {
    let fixture = Fixture::new().await;
    fixture.fill_the_platforms_host().await;
    let (status, body) = fixture.create().await;
    assert_eq!(status, 201, "{body}");
    let path = format!("/v1/teams/{}", fixture.owner.team);
    assert_eq!(fixture.own("DELETE", &path, None).await.0, 204);
    fixture.until_gone().await;
    assert_eq!(fixture.hosts_in_database().await, 1);
    assert_eq!(fixture.own.with(|model| model.sandboxes.len()), 0);
    fixture.world.running.stop().await;
}

#[tokio::test]
async fn a_teams_own_host_is_called_at_public_addresses_only() {
    let mut fixture = Fixture::new().await;
    fixture.fill_the_platforms_host().await;
    let (status, body) = fixture.create().await;
    assert_eq!(status, 201, "{body}");
    let exec = format!("/v1/sandboxes/{}/exec", body["id"].as_str().expect("an id"));
    let (status, made) = fixture
        .own("POST", &format!("{}/token", fixture.host_path()), None)
        .await;
    assert_eq!(status, 201, "{made}");
    fixture.world = fixture
        .world
        .restart_with(|config| config.allow_private_byoc = false)
        .await;
    let world = &fixture.world;

    let register = async |address: &str| {
        let body = json!({
            "token": made["registration_token"], "arch": "x86_64", "cpu_cores": 1, "memory_mb": 1, "disk_gb": 1,
            "address": address,
        });
        let request = world.http.post(world.url("/v1/hosts/register")).json(&body);
        common::answer(request).await
    };
    let private = [
        "http://169.254.169.254:80",
        "http://127.0.0.1:5432",
        "http://10.0.0.1:8001",
        "http://0.0.0.0:8001",
        "http://[::1]:8001",
        "http://[::ffff:127.0.0.1]:8001",
        "http://[fd00:ec2::254]:80",
        "http://2130706433:8001",
        "http://0x7f.1:8001",
        "http://localhost:8001",
        "http://somebody@127.0.0.1:8001",
    ];
    for address in private {
        let (status, body) = register(address).await;
        assert_eq!(
            (status, code(&body)),
            (400, "invalid_request"),
            "{address} {body}"
        );
        assert!(
            message(&body).contains("address") && message(&body).contains("WRENN_BYOC_ALLOW_PRIVATE"),
            "{address} {body}"
        );
    }

    // One that was there before is not heard, and nothing is asked of it: by its address, by a name that leads there,
    // or over a connection that is open to the platform's host at the same address.
    let beat = async |address: &str| {
        let request = world
            .http
            .post(world.url(&format!("{}/heartbeat", fixture.host_path())))
            .bearer_auth(&fixture.own.tokens().token)
            .json(&json!({"version": "1", "address": address, "memory_available_mb": 1, "disk_available_mb": 1}));
        common::answer(request).await
    };
    for address in private {
        assert_eq!(beat(address).await.0, 400, "{address}");
    }
    world.host.heartbeat().await;
    world.sandbox().await;
    let own = fixture.own.address().port();
    let platforms = world.host.address();
    let calls = || {
        let asked = |host: &SimHost| host.arrived(Call::Exec) + host.arrived(Call::Start);
        asked(&fixture.own) + asked(&world.host)
    };
    let before = calls();
    for address in [
        format!("http://127.0.0.1:{own}"),
        format!("http://localhost:{own}"),
        format!("http://[::ffff:127.0.0.1]:{own}"),
        format!("http://{platforms}"),
    ] {
        fixture
            .sql(&format!(
                "UPDATE hosts SET address = '{address}' WHERE kind = 'byoc'"
            ))
            .await;
        let (status, body) = fixture.own("POST", &exec, Some(json!({"cmd": "true"}))).await;
        assert_eq!(
            (status, code(&body)),
            (503, "host_unavailable"),
            "{address} {body}"
        );
        assert!(message(&body).contains("private address"), "{address} {body}");
        assert_eq!(calls(), before, "{address}");
    }

    // The refusals have not used up the token; a name that is not found yet may be later.
    let (status, body) = register("http://agent.invalid:8001").await;
    assert_eq!(status, 201, "{body}");
    fixture.world.running.stop().await;
}
