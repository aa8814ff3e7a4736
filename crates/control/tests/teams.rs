//! Teams, members, API keys, user search, and the platform admin's view, over real HTTP.

mod common;

use common::{DEADLINE, Person, World, answer, code, message};
use sea_orm::ConnectionTrait as _;
use serde_json::{Value, json};
use wrenn_control::config::Allowance;

async fn add(world: &World, by: &Person, whom: &Person, role: &str) {
    let path = format!("/v1/teams/{}/members", by.team);
    let (status, body) = world
        .call_as(&by.token, "POST", &path, Some(json!({"email": whom.email})))
        .await;
    assert_eq!((status, &body["role"]), (201, &json!("member")), "{body}");
    if role != "member" {
        let (status, body) = world
            .call_as(
                &by.token,
                "PATCH",
                &format!("{path}/{}", whom.id),
                Some(json!({"role": role})),
            )
            .await;
        assert_eq!((status, &body["role"]), (200, &json!(role)), "{body}");
    }
}

async fn roles(world: &World, person: &Person, team: &str) -> Vec<(String, String)> {
    let (status, body) = world
        .call_as(&person.token, "GET", &format!("/v1/teams/{team}/members"), None)
        .await;
    assert_eq!(status, 200, "{body}");
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    body.as_array()
        .expect("a list")
        .iter()
        .map(|member| (text(&member["email"]), text(&member["role"])))
        .collect()
}

/// Makes somebody a platform admin behind the API's back.
async fn make_admin(world: &World, person: &Person) {
    let db = world.database().await;
    let mut update = sea_orm::sea_query::Query::update();
    update
        .table("users")
        .value("is_admin", true)
        .and_where(sea_orm::sea_query::ExprTrait::eq(
            sea_orm::sea_query::Expr::col("id"),
            person.id.0,
        ));
    let statement = db.get_database_backend().build(&update);
    db.execute_raw(statement).await.expect("updated");
}

#[tokio::test]
async fn a_key_is_shown_once_used_and_revoked() {
    let world = World::new().await;
    let ada = world.person("ada").await;
    let (status, made) = world
        .call_as(&ada.token, "POST", "/v1/api-keys", Some(json!({"name": " CI "})))
        .await;
    assert_eq!(status, 201, "{made}");
    let key = made["key"].as_str().expect("the secret").to_owned();
    assert!(key.starts_with(made["key_prefix"].as_str().expect("a prefix")));
    assert_eq!(
        (&made["name"], &made["team_id"], &made["creator_email"]),
        (&json!("CI"), &json!(ada.team), &json!("ada@example.com"))
    );
    assert!(made.get("last_used").is_none(), "{made}");

    let with_key = || {
        world
            .http
            .get(world.url("/v1/sandboxes"))
            .header("x-api-key", &key)
    };
    for _ in 0..3 {
        assert_eq!(answer(with_key()).await.0, 200);
    }
    world.running.control.write_key_uses().await.expect("written");
    let (status, list) = world.call_as(&ada.token, "GET", "/v1/api-keys", None).await;
    assert_eq!((status, list.as_array().map(Vec::len)), (200, Some(1)), "{list}");
    assert!(list[0].get("key").is_none(), "{list}");
    assert!(
        list[0]["last_used"].as_str().is_some_and(|at| at.ends_with('Z')),
        "{list}"
    );

    // A key manages no keys, and another team does not know this one.
    for (method, path) in [
        ("GET", "/v1/api-keys"),
        ("POST", "/v1/teams"),
        ("DELETE", "/v1/me"),
    ] {
        let (status, body) = world.call(method, path, None).await;
        assert_eq!((status, code(&body)), (401, "unauthorized"), "{body}");
    }
    let path = format!("/v1/api-keys/{}", made["id"].as_str().expect("an id"));
    let eve = world.person("eve").await;
    let (status, body) = world.call_as(&eve.token, "DELETE", &path, None).await;
    assert_eq!((status, code(&body)), (404, "not_found"), "{body}");

    let (status, _) = world.call_as(&ada.token, "DELETE", &path, None).await;
    assert_eq!(status, 204);
    // At once, though it was known a moment ago.
    assert_eq!(answer(with_key()).await.0, 401);
    let (status, _) = world.call_as(&ada.token, "DELETE", &path, None).await;
    assert_eq!(status, 404);
    for name in ["", "  ", "a\nb", &"x".repeat(101)] {
        let (status, body) = world
            .call_as(&ada.token, "POST", "/v1/api-keys", Some(json!({"name": name})))
            .await;
        assert_eq!(
            (status, code(&body)),
            (400, "invalid_request"),
            "{name:?}: {body}"
        );
    }
}

#[tokio::test]
async fn another_control_plane_refuses_a_revoked_key_soon() {
    let world = World::new().await;
    let second = common::start(world.config()).await;
    let ada = world.person("ada").await;
    let (_, made) = world
        .call_as(&ada.token, "POST", "/v1/api-keys", Some(json!({"name": "k"})))
        .await;
    let key = made["key"].as_str().expect("the secret").to_owned();
    let there = async || {
        let request = world.http.get(format!("{}/v1/sandboxes", second.url));
        answer(request.header("x-api-key", &key)).await.0
    };
    assert_eq!(there().await, 200);
    let path = format!("/v1/api-keys/{}", made["id"].as_str().expect("an id"));
    world.call_as(&ada.token, "DELETE", &path, None).await;
    let deadline = tokio::time::Instant::now() + DEADLINE;
    while there().await != 401 {
        assert!(tokio::time::Instant::now() < deadline, "the key is still good");
    }
    second.stop().await;
}

#[tokio::test]
async fn members_revoke_their_own_keys_and_admins_all() {
    let world = World::new().await;
    let (ada, bob, eve) = (
        world.person("ada").await,
        world.person("bob").await,
        world.person("eve").await,
    );
    add(&world, &ada, &bob, "member").await;
    add(&world, &ada, &eve, "admin").await;
    let bobs = world.session(bob.id, Some(&ada.team)).await;
    let eves = world.session(eve.id, Some(&ada.team)).await;
    let mut ids = Vec::new();
    for token in [&ada.token, &bobs, &bobs] {
        let (status, body) = world
            .call_as(token, "POST", "/v1/api-keys", Some(json!({"name": "k"})))
            .await;
        assert_eq!((status, &body["team_id"]), (201, &json!(ada.team)), "{body}");
        ids.push(format!("/v1/api-keys/{}", body["id"].as_str().expect("an id")));
    }
    let (status, body) = world.call_as(&bobs, "DELETE", &ids[0], None).await;
    assert_eq!((status, code(&body)), (403, "forbidden"), "{body}");
    assert_eq!(world.call_as(&bobs, "DELETE", &ids[1], None).await.0, 204);
    // The listing is paged, and goes on when a creator has gone.
    let (_, first) = world.call_as(&eves, "GET", "/v1/api-keys?limit=1", None).await;
    assert_eq!(first.as_array().map(Vec::len), Some(1));
    assert_eq!(first[0]["creator_email"], "bob@example.com");
    let next = format!(
        "/v1/api-keys?limit=1&before={}",
        first[0]["id"].as_str().expect("an id")
    );
    let (_, second) = world.call_as(&eves, "GET", &next, None).await;
    assert_eq!(second[0]["creator_email"], "ada@example.com", "{second}");
    assert_eq!(world.call_as(&bob.token, "DELETE", "/v1/me", None).await.0, 204);
    let (_, list) = world.call_as(&eves, "GET", "/v1/api-keys", None).await;
    assert_eq!(list.as_array().map(Vec::len), Some(2), "{list}");
    assert!(list[0].get("creator_email").is_none(), "{list}");
    assert_eq!(world.call_as(&eves, "DELETE", &ids[2], None).await.0, 204);
    assert_eq!(world.call_as(&eves, "DELETE", &ids[0], None).await.0, 204);
}

#[tokio::test]
async fn a_team_is_made_renamed_and_known_to_its_members_only() {
    let world = World::new().await;
    let (ada, bob) = (world.person("ada").await, world.person("bob").await);
    let (status, made) = world
        .call_as(
            &ada.token,
            "POST",
            "/v1/teams",
            Some(json!({"name": " Ada's team-1 "})),
        )
        .await;
    assert_eq!(
        (status, &made["name"], &made["role"]),
        (201, &json!("Ada's team-1"), &json!("owner"))
    );
    let slug = made["slug"].as_str().expect("a slug").to_owned();
    assert!(slug.len() == 13 && slug.as_bytes()[6] == b'-', "{slug}");
    let path = format!("/v1/teams/{}", made["id"].as_str().expect("an id"));
    let (status, body) = world
        .call_as(&ada.token, "PATCH", &path, Some(json!({"name": "Ops @home_2"})))
        .await;
    assert_eq!(
        (status, &body["name"], &body["slug"]),
        (200, &json!("Ops @home_2"), &json!(slug)),
        "{body}"
    );
    for name in ["", "a/b", "<b>", &"x".repeat(65)] {
        for (method, path) in [("POST", "/v1/teams"), ("PATCH", path.as_str())] {
            let (status, body) = world
                .call_as(&ada.token, method, path, Some(json!({"name": name})))
                .await;
            assert_eq!((status, code(&body)), (400, "invalid_request"), "{name}: {body}");
        }
    }
    for (method, rest, body) in [
        ("GET", "", None),
        ("PATCH", "", Some(json!({"name": "x"}))),
        ("DELETE", "", None),
        ("GET", "/members", None),
        ("POST", "/members", Some(json!({"email": "ada@example.com"}))),
        ("POST", "/leave", None),
    ] {
        let (status, body) = world
            .call_as(&bob.token, method, &format!("{path}{rest}"), body)
            .await;
        assert_eq!(
            (status, code(&body)),
            (404, "not_found"),
            "{method} {rest}: {body}"
        );
    }
    let (_, teams) = world.call_as(&ada.token, "GET", "/v1/teams?limit=1", None).await;
    assert_eq!(
        (teams.as_array().map(Vec::len), &teams[0]["slug"]),
        (Some(1), &json!(slug))
    );
    let next = format!("/v1/teams?before={}", teams[0]["id"].as_str().expect("an id"));
    let (_, teams) = world.call_as(&ada.token, "GET", &next, None).await;
    assert_eq!(
        (teams.as_array().map(Vec::len), &teams[0]["id"]),
        (Some(1), &json!(ada.team))
    );
}

#[tokio::test]
async fn owners_are_protected() {
    let world = World::new().await;
    let (ada, bob, eve, mia) = (
        world.person("ada").await,
        world.person("bob").await,
        world.person("eve").await,
        world.person("mia").await,
    );
    add(&world, &ada, &bob, "admin").await;
    add(&world, &ada, &eve, "member").await;
    let base = format!("/v1/teams/{}", ada.team);
    let at = |person: &Person| format!("{base}/members/{}", person.id);
    let role = |role: &str| Some(json!({"role": role}));
    let email = Some(json!({"email": mia.email}));
    let nobody = Some(json!({"email": "nobody@example.com"}));
    for (who, method, path, body, expected) in [
        // The last owner stays one.
        (&ada, "PATCH", at(&ada), role("admin"), 409),
        (&ada, "DELETE", at(&ada), None, 409),
        (&ada, "POST", format!("{base}/leave"), None, 409),
        // An admin does not touch an owner, nor makes one, nor deletes the team.
        (&bob, "PATCH", at(&ada), role("member"), 403),
        (&bob, "DELETE", at(&ada), None, 403),
        (&bob, "PATCH", at(&bob), role("owner"), 403),
        (&bob, "PATCH", at(&eve), role("owner"), 403),
        (&bob, "DELETE", base.clone(), None, 403),
        // A member manages nobody.
        (&eve, "PATCH", at(&eve), role("admin"), 403),
        (&eve, "DELETE", at(&bob), None, 403),
        (&eve, "POST", format!("{base}/members"), email.clone(), 403),
        (&eve, "POST", format!("{base}/members"), nobody.clone(), 403),
        (&eve, "PATCH", base.clone(), Some(json!({"name": "x"})), 403),
        // An admin manages members and admins.
        (&bob, "PATCH", base.clone(), Some(json!({"name": "Renamed"})), 200),
        (&bob, "POST", format!("{base}/members"), nobody, 404),
        (&bob, "POST", format!("{base}/members"), email.clone(), 201),
        (&bob, "POST", format!("{base}/members"), email, 409),
        (&bob, "PATCH", at(&mia), role("admin"), 200),
        (&bob, "PATCH", at(&mia), role("emperor"), 400),
        (
            &bob,
            "PATCH",
            format!("{base}/members/nonsense"),
            role("admin"),
            404,
        ),
        (&bob, "PATCH", at(&bob), role("member"), 200),
        (&mia, "DELETE", at(&bob), None, 204),
        (&mia, "DELETE", at(&bob), None, 404),
        // Everybody may go, but for the last owner; another owner changes that.
        (&eve, "POST", format!("{base}/leave"), None, 204),
        (&eve, "GET", base.clone(), None, 404),
        (&ada, "PATCH", at(&mia), role("owner"), 200),
        (&ada, "POST", format!("{base}/leave"), None, 204),
        (&mia, "POST", format!("{base}/leave"), None, 409),
    ] {
        let (status, body) = world.call_as(&who.token, method, &path, body.clone()).await;
        assert_eq!(status, expected, "{} {method} {path} {body:?}: {body}", who.email);
    }
    assert_eq!(
        roles(&world, &mia, &ada.team).await,
        [("mia@example.com".to_owned(), "owner".to_owned())]
    );
}

#[tokio::test]
async fn of_two_owners_who_undo_each_other_one_remains() {
    let world = World::new().await;
    let (ada, bob) = (world.person("ada").await, world.person("bob").await);
    add(&world, &ada, &bob, "owner").await;
    let base = format!("/v1/teams/{}", ada.team);
    let mut rounds = 0;
    // Whoever remains an owner makes the other one again, for another round.
    for (method, rest) in [("PATCH", "members"), ("DELETE", "members"), ("POST", "leave")].repeat(6) {
        let act = |who: &Person, whom: &Person| {
            let path = if rest == "leave" {
                format!("{base}/leave")
            } else {
                format!("{base}/members/{}", whom.id)
            };
            let body = (method == "PATCH").then(|| json!({"role": "member"}));
            let (world, token) = (&world, who.token.clone());
            async move { world.call_as(&token, method, &path, body).await }
        };
        let (first, second) = tokio::join!(act(&ada, &bob), act(&bob, &ada));
        let done = [&first, &second]
            .iter()
            .filter(|(status, _)| matches!(status, 200 | 204))
            .count();
        assert_eq!(done, 1, "{method} {rest}: {first:?} {second:?}");
        let mut owner = None;
        for person in [&ada, &bob] {
            let (status, team) = world.call_as(&person.token, "GET", &base, None).await;
            if status == 200 && team["role"] == "owner" {
                assert!(owner.is_none(), "both are owners still");
                owner = Some(person);
            }
        }
        let owner = owner.expect("an owner remains");
        let other = if owner.id == ada.id { &bob } else { &ada };
        if method == "PATCH" {
            world
                .call_as(
                    &owner.token,
                    "DELETE",
                    &format!("{base}/members/{}", other.id),
                    None,
                )
                .await;
        }
        let path = format!("{base}/members");
        world
            .call_as(&owner.token, "POST", &path, Some(json!({"email": other.email})))
            .await;
        let (status, _) = world
            .call_as(
                &owner.token,
                "PATCH",
                &format!("{path}/{}", other.id),
                Some(json!({"role": "owner"})),
            )
            .await;
        assert_eq!(status, 200);
        rounds += 1;
    }
    assert_eq!(rounds, 18);
}

#[tokio::test]
async fn an_owner_who_leaves_and_one_whose_account_goes_do_not_orphan_the_team() {
    let world = World::new().await;
    for round in 0..8 {
        let (ada, bob) = (
            world.person(&format!("ada{round}")).await,
            world.person(&format!("bob{round}")).await,
        );
        add(&world, &ada, &bob, "owner").await;
        let leave = format!("/v1/teams/{}/leave", ada.team);
        let ((left, _), (gone, body)) = tokio::join!(
            world.call_as(&ada.token, "POST", &leave, None),
            world.call_as(&bob.token, "DELETE", "/v1/me", None),
        );
        assert_eq!(gone, 204, "{body}");
        // Either Ada left first, and the team went with Bob's account; or she is its last owner and stays.
        let (status, team) = world
            .call_as(&ada.token, "GET", &format!("/v1/teams/{}", ada.team), None)
            .await;
        match left {
            204 => assert_eq!(status, 404, "{team}"),
            409 => assert_eq!((status, &team["role"]), (200, &json!("owner"))),
            other => panic!("{other}"),
        }
        let (_, all) = world
            .call_as(&admin(&world).await, "GET", "/v1/admin/teams?limit=1000", None)
            .await;
        let lives = all["teams"]
            .as_array()
            .expect("a list")
            .iter()
            .any(|listed| listed["id"] == json!(ada.team));
        assert_eq!(lives, left == 409, "{all}");
    }
}

async fn admin(world: &World) -> String {
    world.session(world.bootstrap.user_id, None).await
}

#[tokio::test]
async fn people_are_found_by_the_beginning_of_their_address() {
    let world = World::new().await;
    let ada = world.person("ada").await;
    world.person("adam").await;
    world.person("a_b").await;
    let gone = world.person("adagone").await;
    world.call_as(&gone.token, "DELETE", "/v1/me", None).await;
    let search = async |query: &str| {
        world
            .call_as(
                &ada.token,
                "GET",
                &format!("/v1/users/search?email={query}"),
                None,
            )
            .await
    };
    let (status, found) = search("ADA").await;
    assert_eq!(status, 200, "{found}");
    assert_eq!(
        found,
        json!([
            {"user_id": ada.id.to_string(), "email": "ada@example.com"},
            {"user_id": found[1]["user_id"], "email": "adam@example.com"},
        ])
    );
    // No character is a wildcard.
    for query in ["a%25a", "%25%25%25", "___", "ad_"] {
        assert_eq!(search(query).await, (200, json!([])), "{query}");
    }
    assert_eq!(search("a_b").await.1.as_array().map(Vec::len), Some(1));
    for query in ["", "ad", "%20a%20"] {
        let (status, body) = search(query).await;
        assert_eq!((status, code(&body)), (400, "invalid_request"), "{query}: {body}");
    }
    for number in 0..12 {
        world.person(&format!("many{number}")).await;
    }
    assert_eq!(search("many").await.1.as_array().map(Vec::len), Some(10));
}

#[tokio::test]
async fn who_searches_for_everybody_is_slowed_down() {
    let world = World::new()
        .await
        .restart_with(|config| config.attempts.search_user = Allowance::per_minutes(2, 15))
        .await;
    let (ada, bob) = (world.person("ada").await, world.person("bob").await);
    let search = async |token: &str| {
        world
            .call_as(token, "GET", "/v1/users/search?email=ada", None)
            .await
    };
    for _ in 0..2 {
        assert_eq!(search(&ada.token).await.0, 200);
    }
    let (status, body) = search(&ada.token).await;
    assert_eq!((status, code(&body)), (429, "rate_limited"), "{body}");
    // Each for themselves; and what is no search counts nothing.
    for _ in 0..3 {
        let (status, _) = world
            .call_as(&bob.token, "GET", "/v1/users/search?email=a", None)
            .await;
        assert_eq!(status, 400);
    }
    assert_eq!(search(&bob.token).await.0, 200);
}

#[tokio::test]
async fn without_an_active_team_there_are_no_sandboxes() {
    let world = World::new().await;
    let ada = world.person("ada").await;
    let path = format!("/v1/teams/{}", ada.team);
    assert_eq!(world.call_as(&ada.token, "DELETE", &path, None).await.0, 204);
    let fresh = world.session(ada.id, None).await;
    for token in [&ada.token, &fresh] {
        let (status, teams) = world.call_as(token, "GET", "/v1/teams", None).await;
        assert_eq!((status, &teams), (200, &json!([])));
        for path in ["/v1/sandboxes", "/v1/api-keys"] {
            let (status, body) = world
                .call_as(token, "POST", path, Some(json!({"name": "x"})))
                .await;
            assert_eq!((status, code(&body)), (403, "forbidden"), "{body}");
            assert!(message(&body).contains("no active team"), "{body}");
        }
    }
    // A new team, and a session in it.
    let (_, team) = world
        .call_as(&ada.token, "POST", "/v1/teams", Some(json!({"name": "New"})))
        .await;
    let there = world.session(ada.id, team["id"].as_str()).await;
    assert_eq!(
        world
            .call_as(&there, "POST", "/v1/sandboxes", Some(json!({})))
            .await
            .0,
        202
    );
}

#[tokio::test]
async fn platform_admins_see_and_steer_all_teams_and_users() {
    let world = World::new().await;
    let (ada, bob) = (world.person("ada").await, world.person("bob").await);
    let admin = admin(&world).await;
    for (method, path) in [
        ("GET", "/v1/admin/teams"),
        ("GET", "/v1/admin/users"),
        ("GET", "/v1/admin/templates"),
        ("GET", "/v1/admin/capsules"),
        ("POST", "/v1/admin/capsules"),
    ] {
        let (status, body) = world.call_as(&ada.token, method, path, None).await;
        assert_eq!((status, code(&body)), (403, "forbidden"), "{path}: {body}");
        let (status, body) = world.call(method, path, None).await;
        assert_eq!((status, code(&body)), (401, "unauthorized"), "{path}: {body}");
    }
    let mut seen = Vec::new();
    let mut path = "/v1/admin/teams?limit=2".to_owned();
    loop {
        let (status, page) = world.call_as(&admin, "GET", &path, None).await;
        assert_eq!((status, &page["total"]), (200, &json!(4)), "{page}");
        for team in page["teams"].as_array().expect("a list") {
            seen.push(team["id"].as_str().expect("an id").to_owned());
            let members = if team["name"] == "platform" { 0 } else { 1 };
            assert_eq!(
                (&team["byoc"], &team["member_count"]),
                (&json!(false), &json!(members)),
                "{team}"
            );
        }
        let Some(next) = page["next"].as_str() else { break };
        path = format!("/v1/admin/teams?limit=2&before={next}");
    }
    assert_eq!(seen.len(), 4, "{seen:?}");
    assert_eq!((&seen[0], &seen[1]), (&bob.team, &ada.team));

    let byoc = format!("/v1/admin/teams/{}/byoc", ada.team);
    assert_eq!(
        world
            .call_as(&admin, "PUT", &byoc, Some(json!({"byoc": true})))
            .await
            .0,
        204
    );
    let (_, page) = world.call_as(&admin, "GET", "/v1/admin/teams", None).await;
    assert_eq!(page["teams"][1]["byoc"], true, "{page}");

    let platform = format!("/v1/admin/teams/{}", wrenn_proto::id::TeamId::PLATFORM);
    assert_eq!(world.call_as(&admin, "DELETE", &platform, None).await.0, 403);
    let adas = format!("/v1/admin/teams/{}", ada.team);
    assert_eq!(world.call_as(&admin, "DELETE", &adas, None).await.0, 204);
    assert_eq!(world.call_as(&admin, "DELETE", &adas, None).await.0, 404);
    assert_eq!(
        world
            .call_as(&admin, "PUT", &byoc, Some(json!({"byoc": true})))
            .await
            .0,
        404
    );

    // Deactivation ends sessions, and leads back.
    let (_, page) = world.call_as(&admin, "GET", "/v1/admin/users", None).await;
    assert_eq!(
        (&page["total"], &page["users"][0]["email"]),
        (&json!(3), &json!(bob.email)),
        "{page}"
    );
    let active = format!("/v1/admin/users/{}/active", bob.id);
    assert_eq!(
        world
            .call_as(&admin, "PUT", &active, Some(json!({"active": false})))
            .await
            .0,
        204
    );
    assert_eq!(world.call_as(&bob.token, "GET", "/v1/teams", None).await.0, 401);
    let (_, found) = world
        .call_as(&admin, "GET", "/v1/users/search?email=bob", None)
        .await;
    assert_eq!(found, json!([]));
    assert_eq!(
        world
            .call_as(&admin, "PUT", &active, Some(json!({"active": true})))
            .await
            .0,
        204
    );
    assert_eq!(
        world.call_as(&bob.token, "GET", "/v1/teams", None).await.0,
        401,
        "an old session"
    );
    let fresh = world.session(bob.id, None).await;
    assert_eq!(world.call_as(&fresh, "GET", "/v1/teams", None).await.0, 200);
    let nobody = format!("/v1/admin/users/{}/active", wrenn_proto::id::UserId::new());
    assert_eq!(
        world
            .call_as(&admin, "PUT", &nobody, Some(json!({"active": true})))
            .await
            .0,
        404
    );
}

#[tokio::test]
async fn the_platform_keeps_an_admin() {
    let world = World::new().await;
    let first = world.bootstrap.user_id;
    let admin = admin(&world).await;
    let path = |id| format!("/v1/admin/users/{id}/active");
    let off = Some(json!({"active": false}));
    let (status, body) = world.call_as(&admin, "PUT", &path(first), off.clone()).await;
    assert_eq!((status, code(&body)), (409, "conflict"), "{body}");
    let (status, body) = world.call_as(&admin, "DELETE", "/v1/me", None).await;
    assert_eq!((status, code(&body)), (409, "conflict"), "{body}");
    // Two who deactivate each other.
    let ada = world.person("ada").await;
    make_admin(&world, &ada).await;
    let (hers, mine) = (path(ada.id), path(first));
    let (one, two) = tokio::join!(
        world.call_as(&admin, "PUT", &hers, off.clone()),
        world.call_as(&ada.token, "PUT", &mine, off.clone()),
    );
    let done = [&one, &two].iter().filter(|(status, _)| *status == 204).count();
    assert_eq!(done, 1, "{one:?} {two:?}");
}

#[tokio::test]
async fn the_platforms_sandboxes_are_its_admins_and_their_templates_are_everybodys() {
    let world = World::new().await;
    let ada = world.person("ada").await;
    let admin = admin(&world).await;
    let (status, body) = world
        .call_as(&admin, "POST", "/v1/admin/capsules?wait=20", Some(json!({})))
        .await;
    assert_eq!((status, &body["status"]), (201, &json!("running")), "{body}");
    let id = body["id"].as_str().expect("an id").to_owned();
    let path = format!("/v1/admin/capsules/{id}");
    let (_, list) = world.call_as(&admin, "GET", "/v1/admin/capsules", None).await;
    assert_eq!(list.as_array().map(Vec::len), Some(1), "{list}");
    let exec = Some(json!({"cmd": "echo", "args": ["hi"]}));
    let (status, body) = world.call_as(&admin, "POST", &format!("{path}/exec"), exec).await;
    assert_eq!((status, &body["stdout"]), (200, &json!("hi\n")), "{body}");
    for rest in ["", "/metrics", "/processes"] {
        let (status, body) = world.call_as(&admin, "GET", &format!("{path}{rest}"), None).await;
        assert_eq!(status, 200, "{rest}: {body}");
    }
    let (status, body) = world
        .call_as(
            &admin,
            "POST",
            &format!("{path}/files/list"),
            Some(json!({"path": "/tmp"})),
        )
        .await;
    assert_eq!(status, 200, "{body}");
    // An admin's own team has none of them, and the platform has none of a team's.
    let (_, list) = world.call_as(&admin, "GET", "/v1/sandboxes", None).await;
    assert_eq!(list, json!([]));
    let (_, own) = world
        .call_as(&ada.token, "POST", "/v1/sandboxes?wait=20", Some(json!({})))
        .await;
    let own = own["id"].as_str().expect("an id");
    let (status, _) = world
        .call_as(&admin, "GET", &format!("/v1/admin/capsules/{own}"), None)
        .await;
    assert_eq!(status, 404);

    let (status, body) = world
        .call_as(
            &admin,
            "POST",
            &format!("{path}/snapshot"),
            Some(json!({"name": "shared"})),
        )
        .await;
    assert_eq!((status, &body["name"]), (201, &json!("shared")), "{body}");
    let (status, body) = world
        .call_as(
            &ada.token,
            "POST",
            "/v1/sandboxes?wait=20",
            Some(json!({"template": "shared"})),
        )
        .await;
    assert_eq!((status, &body["status"]), (201, &json!("running")), "{body}");
    let (status, body) = world
        .call_as(&ada.token, "DELETE", "/v1/snapshots/shared", None)
        .await;
    assert_eq!((status, code(&body)), (403, "forbidden"), "{body}");

    // A team's template, as admins see it.
    let (status, body) = world
        .call_as(
            &ada.token,
            "POST",
            "/v1/snapshots",
            Some(json!({"sandbox_id": own, "name": "own"})),
        )
        .await;
    assert_eq!(status, 201, "{body}");
    let (_, page) = world
        .call_as(&admin, "GET", "/v1/admin/templates?limit=2", None)
        .await;
    assert_eq!(page["total"], 3, "{page}");
    assert_eq!(
        (
            &page["templates"][0]["name"],
            &page["templates"][0]["team_id"],
            &page["templates"][0]["team_name"]
        ),
        (&json!("own"), &json!(ada.team), &json!("ada"))
    );
    assert_eq!(page["templates"][1]["platform"], true, "{page}");
    let rest = format!(
        "/v1/admin/templates?before={}",
        page["next"].as_str().expect("more")
    );
    let (_, page) = world.call_as(&admin, "GET", &rest, None).await;
    assert_eq!(page["templates"][0]["name"], "minimal", "{page}");
    for (name, expected) in [("minimal", 403), ("none", 404), ("own", 204), ("shared", 204)] {
        let (status, body) = world
            .call_as(&admin, "DELETE", &format!("/v1/admin/templates/{name}"), None)
            .await;
        assert_eq!(status, expected, "{name}: {body}");
    }
    assert!(world.host.with(|model| model.snapshots.is_empty()));
    let (status, body) = world
        .call_as(&admin, "DELETE", &format!("{path}?wait=20"), None)
        .await;
    assert_eq!((status, &body["status"]), (200, &json!("stopped")), "{body}");
}

#[tokio::test]
async fn keys_of_teams_without_an_owner_in_use_stop_working() {
    let world = World::new().await;
    let admin = world.session(world.bootstrap.user_id, None).await;
    let (ada, bob, eve) = (
        world.person("ada").await,
        world.person("bob").await,
        world.person("eve").await,
    );
    // Ada owns hers alone, though Eve is in it; Bob's has Ada as another owner.
    for (by, whom, role) in [(&ada, &eve, "admin"), (&bob, &ada, "owner")] {
        let members = format!("/v1/teams/{}/members", by.team);
        let body = Some(json!({"email": whom.email}));
        assert_eq!(world.call_as(&by.token, "POST", &members, body).await.0, 201);
        let body = Some(json!({"role": role}));
        let path = format!("{members}/{}", whom.id);
        assert_eq!(world.call_as(&by.token, "PATCH", &path, body).await.0, 200);
    }
    let mut keys = Vec::new();
    for person in [&ada, &bob] {
        let body = Some(json!({"name": "k"}));
        let (status, key) = world.call_as(&person.token, "POST", "/v1/api-keys", body).await;
        assert_eq!(status, 201, "{key}");
        keys.push(key["key"].as_str().expect("a key").to_owned());
    }
    let (_, operators) = world.running.control.create_team("ops").await.expect("a team");
    keys.push(operators);
    // A key that is known is forgotten at once here; others ask again within a second.
    let works = async |world: &World| {
        let mut statuses = Vec::new();
        for key in &keys {
            let request = world
                .http
                .get(world.url("/v1/sandboxes"))
                .header("x-api-key", key);
            statuses.push(answer(request).await.0);
        }
        statuses
    };
    assert_eq!(works(&world).await, [200, 200, 200]);
    let set = async |id: wrenn_proto::id::UserId, active: bool| {
        let path = format!("/v1/admin/users/{id}/active");
        let body = Some(json!({"active": active}));
        assert_eq!(world.call_as(&admin, "PUT", &path, body).await.0, 204);
    };
    set(ada.id, false).await;
    assert_eq!(works(&world).await, [401, 200, 200]);
    set(bob.id, false).await;
    assert_eq!(works(&world).await, [401, 401, 200]);
    set(ada.id, true).await;
    assert_eq!(works(&world).await, [200, 200, 200]);
}
