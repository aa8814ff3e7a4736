//! Deletions of teams and accounts, with a simulated host that the test steps: nothing of a deleted team remains,
//! whatever happens meanwhile.

mod common;

use common::{DEADLINE, Person, World, answer, code, id};
use sea_orm::sea_query::{Expr, ExprTrait as _, Query};
use sea_orm::{ConnectionTrait as _, DatabaseConnection};
use serde_json::{Value, json};
use wrenn_testkit::simhost::{Call, SimHost};

/// A sandbox of a person's team that runs.
async fn sandbox(world: &World, person: &Person) -> String {
    let (status, body) = world
        .call_as(&person.token, "POST", "/v1/sandboxes?wait=20", Some(json!({})))
        .await;
    assert_eq!((status, &body["status"]), (201, &json!("running")), "{body}");
    body["id"].as_str().expect("an id").to_owned()
}

async fn snapshot(world: &World, person: &Person, sandbox: &str, name: &str) {
    let body = json!({"sandbox_id": sandbox, "name": name});
    let (status, body) = world
        .call_as(&person.token, "POST", "/v1/snapshots", Some(body))
        .await;
    assert_eq!(status, 201, "{body}");
}

async fn delete_team(world: &World, person: &Person) {
    let path = format!("/v1/teams/{}", person.team);
    let (status, body) = world.call_as(&person.token, "DELETE", &path, None).await;
    assert_eq!(status, 204, "{body}");
}

/// Takes the deletions up until none is left.
async fn emptied(world: &World) {
    let deadline = tokio::time::Instant::now() + DEADLINE;
    while world.running.control.deletion_pass().await.expect("a pass") > 0 {
        assert!(
            tokio::time::Instant::now() < deadline,
            "something of a team remains"
        );
        tokio::task::yield_now().await;
    }
}

/// How many rows of a table match.
async fn count(db: &DatabaseConnection, table: &'static str, matching: Expr) -> usize {
    let mut query = Query::select();
    query.expr(Expr::val(1)).from(table).and_where(matching);
    let statement = db.get_database_backend().build(&query);
    db.query_all_raw(statement).await.expect("rows").len()
}

fn team(person: &Person) -> uuid::Uuid {
    person
        .team
        .parse::<wrenn_proto::id::TeamId>()
        .expect("a team id")
        .0
}

/// Nothing of a team is left but its row.
async fn assert_gone(world: &World, person: &Person) {
    let db = world.database().await;
    let of_team = || Expr::col("team_id").eq(team(person));
    for table in ["team_api_keys", "templates", "users_teams"] {
        assert_eq!(count(&db, table, of_team()).await, 0, "{table}");
    }
    let alive = of_team().and(Expr::col("status").ne("stopped"));
    assert_eq!(count(&db, "sandboxes", alive).await, 0);
    let row = Expr::col("id")
        .eq(team(person))
        .and(Expr::col("deletion").eq("purged"))
        .and(Expr::col("deleted_at").is_not_null());
    assert_eq!(count(&db, "teams", row).await, 1, "the slug is not reserved");
    db.close().await.expect("closed");
}

#[tokio::test]
async fn a_deleted_team_takes_everything_with_it_and_nothing_of_others() {
    let world = World::new().await;
    let (ada, bob) = (world.person("ada").await, world.person("bob").await);
    let (_, key) = world
        .call_as(&ada.token, "POST", "/v1/api-keys", Some(json!({"name": "k"})))
        .await;
    let key = key["key"].as_str().expect("the secret").to_owned();
    let [running, paused, dead] = [
        sandbox(&world, &ada).await,
        sandbox(&world, &ada).await,
        sandbox(&world, &ada).await,
    ];
    let (status, _) = world
        .call_as(
            &ada.token,
            "POST",
            &format!("/v1/sandboxes/{paused}/pause?wait=20"),
            None,
        )
        .await;
    assert_eq!(status, 200);
    let generation = world.host.with(|model| model.sandboxes[&id(&dead)].generation);
    world
        .host
        .event(
            id(&dead),
            generation,
            wrenn_proto::rest::SandboxStatus::Error,
            "vmm_exited",
        )
        .await;
    snapshot(&world, &ada, &running, "mine").await;
    let others = sandbox(&world, &bob).await;
    snapshot(&world, &bob, &others, "theirs").await;
    let with_key = || {
        world
            .http
            .get(world.url("/v1/sandboxes"))
            .header("x-api-key", &key)
    };
    assert_eq!(answer(with_key()).await.0, 200);

    delete_team(&world, &ada).await;
    // At once: neither key nor session act for it, and it is nowhere to be seen.
    assert_eq!(answer(with_key()).await.0, 401);
    for path in [
        "/v1/sandboxes".to_owned(),
        format!("/v1/sandboxes/{running}"),
        "/v1/snapshots".to_owned(),
    ] {
        let (status, body) = world.call_as(&ada.token, "GET", &path, None).await;
        assert_eq!((status, code(&body)), (403, "forbidden"), "{path}: {body}");
    }
    for (method, rest) in [
        ("GET", ""),
        ("GET", "/members"),
        ("DELETE", ""),
        ("POST", "/leave"),
    ] {
        let path = format!("/v1/teams/{}{rest}", ada.team);
        assert_eq!(
            world.call_as(&ada.token, method, &path, None).await.0,
            404,
            "{path}"
        );
    }
    let admin = world.session(world.bootstrap.user_id, None).await;
    let (_, page) = world.call_as(&admin, "GET", "/v1/admin/templates", None).await;
    assert!(!page.to_string().contains("\"mine\""), "{page}");

    emptied(&world).await;
    assert_gone(&world, &ada).await;
    world.host.with(|model| {
        let left: Vec<_> = model.sandboxes.keys().map(ToString::to_string).collect();
        assert_eq!(left, std::slice::from_ref(&others));
        assert_eq!(model.snapshots.len(), 1);
    });
    let (_, body) = world
        .call_as(&bob.token, "GET", &format!("/v1/sandboxes/{others}"), None)
        .await;
    assert_eq!(body["status"], "running", "{body}");
    // Again changes nothing.
    assert_eq!(world.running.control.deletion_pass().await.expect("a pass"), 0);
}

#[tokio::test]
async fn what_is_on_a_host_that_is_away_goes_when_it_is_back() {
    let world = World::new().await;
    let ada = world.person("ada").await;
    let (running, missing) = (sandbox(&world, &ada).await, sandbox(&world, &ada).await);
    snapshot(&world, &ada, &running, "mine").await;
    let mut world = world
        .restart_with(|config| config.timings.host_silence = std::time::Duration::ZERO)
        .await;
    world.host.disconnect();
    world.running.control.reconcile().await.expect("a pass");
    let (_, body) = world
        .call_as(&ada.token, "GET", &format!("/v1/sandboxes/{missing}"), None)
        .await;
    assert_eq!(body["status"], "missing", "{body}");
    delete_team(&world, &ada).await;
    for _ in 0..3 {
        assert_eq!(world.running.control.deletion_pass().await.expect("a pass"), 1);
    }
    // A restart with the deletion half done.
    let mut world = world
        .restart_with(|config| config.timings.host_silence = std::time::Duration::from_secs(90))
        .await;
    assert_eq!(world.host.with(|model| model.sandboxes.len()), 2);
    world.host.reconnect().await;
    world.host.heartbeat().await;
    emptied(&world).await;
    assert_gone(&world, &ada).await;
    world
        .host
        .with(|model| assert!(model.sandboxes.is_empty() && model.snapshots.is_empty()));
}

#[tokio::test]
async fn a_deletion_that_was_cut_off_is_finished_by_the_next_process() {
    let world = World::new().await;
    let ada = world.person("ada").await;
    let first = sandbox(&world, &ada).await;
    sandbox(&world, &ada).await;
    snapshot(&world, &ada, &first, "mine").await;
    for call in [Call::Destroy, Call::DeleteSnapshot] {
        world.host.hold(call);
    }
    delete_team(&world, &ada).await;
    world.host.wait_arrived(Call::Destroy, 2).await;
    let world = world.restart().await;
    for call in [Call::Destroy, Call::DeleteSnapshot] {
        world.host.release(call);
    }
    emptied(&world).await;
    assert_gone(&world, &ada).await;
    world
        .host
        .with(|model| assert!(model.sandboxes.is_empty() && model.snapshots.is_empty()));
}

#[tokio::test]
async fn a_hibernated_sandbox_goes_with_its_team() {
    let world = World::new().await;
    let (ada, bob) = (world.person("ada").await, world.person("bob").await);
    let db = world.database().await;
    for person in [&ada, &bob] {
        let asleep = sandbox(&world, person).await;
        let path = format!("/v1/sandboxes/{asleep}/pause?wait=20");
        assert_eq!(
            world
                .call_as(&person.token, "POST", &path, Some(json!({})))
                .await
                .0,
            200
        );
        let mut hibernate = Query::update();
        hibernate
            .table("sandboxes")
            .value("status", "hibernated")
            .and_where(Expr::col("id").eq(id(&asleep).0));
        db.execute(&hibernate).await.expect("it hibernates");
    }
    delete_team(&world, &ada).await;
    emptied(&world).await;
    assert_gone(&world, &ada).await;
    // Its files were on the host; the other team's are still there.
    assert_eq!(world.host.arrived(Call::Destroy), 1);
    assert_eq!(world.host.with(|model| model.sandboxes.len()), 1);
    let kept = Expr::col("team_id")
        .eq(team(&bob))
        .and(Expr::col("status").eq("hibernated"));
    assert_eq!(count(&db, "sandboxes", kept).await, 1);
}

#[tokio::test]
async fn a_snapshot_under_way_leaves_no_files() {
    let world = World::new().await;
    let ada = world.person("ada").await;
    let made_from = sandbox(&world, &ada).await;
    world.host.hold(Call::CreateSnapshot);
    let body = json!({"sandbox_id": made_from, "name": "late"});
    let (status, body) = world
        .call_as(&ada.token, "POST", "/v1/snapshots?wait=0", Some(body))
        .await;
    assert_eq!(status, 202, "{body}");
    world.host.wait_arrived(Call::CreateSnapshot, 1).await;
    // The host ends the snapshot before it destroys the sandbox.
    world.host.hold(Call::Destroy);
    delete_team(&world, &ada).await;
    world.host.wait_arrived(Call::Destroy, 1).await;
    world.host.release(Call::CreateSnapshot);
    let deadline = tokio::time::Instant::now() + DEADLINE;
    while world.host.with(|model| model.snapshots.is_empty()) {
        assert!(tokio::time::Instant::now() < deadline, "the snapshot never came");
        tokio::task::yield_now().await;
    }
    world.host.release(Call::Destroy);
    emptied(&world).await;
    assert_gone(&world, &ada).await;
    world
        .host
        .with(|model| assert!(model.sandboxes.is_empty() && model.snapshots.is_empty()));
}

#[tokio::test]
async fn no_sandbox_that_is_created_meanwhile_outlives_its_team() {
    let world = World::new().await;
    for round in 0..6 {
        let ada = world.person(&format!("ada{round}")).await;
        let key_of = async |name: &str| {
            let (_, key) = world
                .call_as(&ada.token, "POST", "/v1/api-keys", Some(json!({"name": name})))
                .await;
            key["key"].as_str().expect("the secret").to_owned()
        };
        let key = key_of("k").await;
        let creates = futures::future::join_all((0..12).map(|_| {
            let create = world
                .http
                .post(world.url("/v1/sandboxes"))
                .header("x-api-key", &key);
            answer(create.json(&json!({})).timeout(DEADLINE))
        }));
        let deletion = async {
            for _ in 0..round {
                tokio::task::yield_now().await;
            }
            delete_team(&world, &ada).await;
        };
        let (answers, ()) = tokio::join!(creates, deletion);
        for (status, body) in &answers {
            assert!(matches!(status, 202 | 401 | 404), "{status}: {body}");
        }
        emptied(&world).await;
        assert_gone(&world, &ada).await;
        // A start that was overtaken is undone behind it.
        let deadline = tokio::time::Instant::now() + DEADLINE;
        while !world.host.with(|model| model.sandboxes.is_empty()) {
            assert!(
                tokio::time::Instant::now() < deadline,
                "a sandbox survived its team"
            );
            world.running.control.reconcile().await.expect("a pass");
        }
    }
}

#[tokio::test]
async fn templates_go_from_every_host_that_has_them() {
    let world = World::new().await;
    let token = world
        .running
        .control
        .issue_host_token(None)
        .await
        .expect("a token");
    let mut second = SimHost::start(&world.running.url).await;
    second.register(&token.token).await;
    second.heartbeat().await;
    let ada = world.person("ada").await;
    for name in ["one", "two"] {
        let made_from = sandbox(&world, &ada).await;
        snapshot(&world, &ada, &made_from, name).await;
    }
    let held = |host: &SimHost| host.with(|model| model.snapshots.len());
    assert_eq!((held(&world.host), held(&second)), (1, 1), "round robin");
    delete_team(&world, &ada).await;
    emptied(&world).await;
    assert_gone(&world, &ada).await;
    assert_eq!((held(&world.host), held(&second)), (0, 0));
}

#[tokio::test]
async fn an_account_goes_with_the_teams_that_it_alone_owns() {
    let world = World::new().await;
    let (ada, bob) = (world.person("ada").await, world.person("bob").await);
    // Bob's team has a second owner; Ada's team has a member.
    for (by, whom, role) in [(&bob, &ada, Some("owner")), (&ada, &bob, None)] {
        let path = format!("/v1/teams/{}/members", by.team);
        let email = Some(json!({"email": whom.email}));
        assert_eq!(world.call_as(&by.token, "POST", &path, email).await.0, 201);
        if let Some(role) = role {
            let path = format!("{path}/{}", whom.id);
            let role = Some(json!({"role": role}));
            assert_eq!(world.call_as(&by.token, "PATCH", &path, role).await.0, 200);
        }
    }
    let (own, shared) = (sandbox(&world, &ada).await, sandbox(&world, &bob).await);
    let (status, body) = world.call_as(&ada.token, "DELETE", "/v1/me", None).await;
    assert_eq!(status, 204, "{body}");
    for (method, path) in [("GET", "/v1/teams"), ("DELETE", "/v1/me")] {
        assert_eq!(world.call_as(&ada.token, method, path, None).await.0, 401);
    }
    emptied(&world).await;
    assert_gone(&world, &ada).await;
    world.host.with(|model| {
        assert!(!model.sandboxes.contains_key(&id(&own)) && model.sandboxes.contains_key(&id(&shared)));
    });
    let (_, teams) = world.call_as(&bob.token, "GET", "/v1/teams", None).await;
    assert_eq!(
        (teams.as_array().map(Vec::len), &teams[0]["id"]),
        (Some(1), &json!(bob.team)),
        "{teams}"
    );
    let members = format!("/v1/teams/{}/members", bob.team);
    let (_, list) = world.call_as(&bob.token, "GET", &members, None).await;
    assert_eq!(list.as_array().map(Vec::len), Some(1), "{list}");
    // Bob is the last owner now, though the row of the other one is still there.
    let leave = format!("/v1/teams/{}/leave", bob.team);
    assert_eq!(world.call_as(&bob.token, "POST", &leave, None).await.0, 409);
    let add = Some(json!({"email": ada.email}));
    assert_eq!(world.call_as(&bob.token, "POST", &members, add).await.0, 404);
}

#[tokio::test]
async fn after_the_grace_an_account_is_gone_and_what_it_made_has_no_creator() {
    let world = World::new().await;
    let (ada, bob) = (world.person("ada").await, world.person("bob").await);
    let members = format!("/v1/teams/{}/members", bob.team);
    let email = Some(json!({"email": ada.email}));
    assert_eq!(world.call_as(&bob.token, "POST", &members, email).await.0, 201);
    let there = world.session(ada.id, Some(&bob.team)).await;
    let (status, key) = world
        .call_as(&there, "POST", "/v1/api-keys", Some(json!({"name": "k"})))
        .await;
    assert_eq!(status, 201, "{key}");
    let db = world.database().await;
    let run =
        async |statement: sea_orm::Statement| db.execute_raw(statement).await.expect("run").rows_affected();
    let backend = db.get_database_backend();
    for table in ["hosts", "host_tokens"] {
        let mut update = Query::update();
        update.table(table).value("created_by", ada.id.0);
        assert!(run(backend.build(&update)).await > 0, "{table}");
    }
    let mut identity = Query::insert();
    identity
        .into_table("oauth_identities")
        .columns(["id", "user_id", "provider", "subject", "email", "created_at"])
        .values_panic([
            uuid::Uuid::new_v4().into(),
            ada.id.0.into(),
            "github".into(),
            "1".into(),
            ada.email.clone().into(),
            0i64.into(),
        ]);
    run(backend.build(&identity)).await;
    let mut permission = Query::insert();
    permission
        .into_table("admin_permissions")
        .columns(["user_id", "permission", "granted_by", "created_at"])
        .values_panic([ada.id.0.into(), "teams".into(), bob.id.0.into(), 0i64.into()]);
    run(backend.build(&permission)).await;

    assert_eq!(world.call_as(&ada.token, "DELETE", "/v1/me", None).await.0, 204);
    // Within the grace the row, and with it the address, stays.
    assert_eq!(world.running.control.hard_delete_pass().await.expect("a pass"), 0);
    assert_eq!(count(&db, "users", Expr::col("id").eq(ada.id.0)).await, 1);
    let again = world.running.control.create_user(&ada.email, "Ada", None).await;
    assert_eq!(again.expect_err("taken").code, wrenn_control::ErrorCode::Conflict);

    let world = world
        .restart_with(|config| config.timings.account_grace = std::time::Duration::ZERO)
        .await;
    let deadline = tokio::time::Instant::now() + DEADLINE;
    // The housekeeping of the start may have been faster than this pass.
    while count(&db, "users", Expr::col("id").eq(ada.id.0)).await > 0 {
        world.running.control.hard_delete_pass().await.expect("a pass");
        assert!(tokio::time::Instant::now() < deadline, "the account stays");
    }
    for table in ["oauth_identities", "admin_permissions", "users_teams"] {
        assert_eq!(
            count(&db, table, Expr::col("user_id").eq(ada.id.0)).await,
            0,
            "{table}"
        );
    }
    for table in ["hosts", "host_tokens", "team_api_keys"] {
        assert_eq!(
            count(&db, table, Expr::col("created_by").eq(ada.id.0)).await,
            0,
            "{table}"
        );
        assert!(
            count(&db, table, Expr::col("created_by").is_null()).await > 0,
            "{table}"
        );
    }
    let (status, keys) = world.call_as(&bob.token, "GET", "/v1/api-keys", None).await;
    assert_eq!((status, keys.as_array().map(Vec::len)), (200, Some(1)), "{keys}");
    assert_eq!(keys[0].get("creator_email"), None::<&Value>);
    // The address is free again.
    world
        .running
        .control
        .create_user(&ada.email, "Ada", None)
        .await
        .expect("a new account");
    db.close().await.expect("closed");
}
