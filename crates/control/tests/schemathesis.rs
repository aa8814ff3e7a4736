//! Schemathesis, an independent reader of OpenAPI documents, throws generated requests, good and bad, at a running
//! server: no answer may be a server error, or one that the document does not describe.

mod common;

use std::path::PathBuf;
use std::process::Command;

use common::World;
use wrenn_testkit::servers::Postgres;

/// A release that is known; a newer one may check more than this server was looked at with.
const VERSION: &str = "4.32.5";
const SEED: &str = "20261122";

/// The program, installed once per machine into an environment of its own outside the checkout.
fn schemathesis() -> PathBuf {
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")))
        .expect("a home")
        .join("wrenn");
    std::fs::create_dir_all(&cache).expect("a cache");
    let environment = cache.join(format!("schemathesis-{VERSION}"));
    let lock = std::fs::File::create(cache.join("schemathesis.lock")).expect("a lock");
    lock.lock().expect("locked");
    let done = environment.join("complete");
    if !done.exists() {
        let _ = std::fs::remove_dir_all(&environment);
        run(Command::new("python3").args(["-m", "venv"]).arg(&environment));
        run(Command::new(environment.join("bin/pip")).args([
            "install",
            "--quiet",
            "--disable-pip-version-check",
            &format!("schemathesis=={VERSION}"),
        ]));
        std::fs::write(&done, "").expect("written");
    }
    environment.join("bin/schemathesis")
}

fn run(command: &mut Command) {
    let output = command.output().expect("the program starts");
    assert!(
        output.status.success(),
        "{command:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Sends requests that are made from the document, and fails for each answer that should not be.
async fn find_faults(world: &World, arguments: &[&str]) {
    let program = tokio::task::spawn_blocking(schemathesis).await.expect("no panic");
    let output = tokio::process::Command::new(program)
        .arg("run")
        .arg(world.url("/openapi.yaml"))
        .args([
            "--checks",
            "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance",
        ])
        .args(["--phases", "examples,coverage,fuzzing"])
        .args([
            "--max-examples",
            "15",
            "--seed",
            SEED,
            "--generation-database",
            "none",
        ])
        .args(["--request-timeout", "20", "--no-color", "--continue-on-failure"])
        .args(arguments)
        .current_dir(world.dir())
        .output()
        .await
        .expect("the program starts");
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// WebSockets are no plain requests, the other name of the sandboxes has the same handlers, and agents' calls have a
/// token of their own.
const NOT_FOR_PEOPLE: &str =
    "/(stream|pty)$|^/v1/capsules|^/v1/hosts/(register|auth/|sandbox-events)|/heartbeat$";

async fn a_platform_admin_finds_no_fault(world: World) {
    // A platform admin who owns a team may call everything.
    let session = world.session(world.bootstrap.user_id, None).await;
    let key = format!("X-API-Key: {}", world.key);
    let bearer = format!("Authorization: Bearer {session}");
    find_faults(
        &world,
        &[
            "--header",
            &key,
            "--header",
            &bearer,
            // These end the session, or take away the host, that the rest needs.
            "--exclude-operation-id",
            "delete_host",
            "--exclude-operation-id",
            "delete_account",
            "--exclude-operation-id",
            "change_password",
            "--exclude-path-regex",
            NOT_FOR_PEOPLE,
        ],
    )
    .await;
    world.running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn generated_requests_find_no_fault() {
    a_platform_admin_finds_no_fault(World::new().await).await;
}

/// PostgreSQL refuses text and numbers that SQLite takes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn generated_requests_find_no_fault_on_postgres() {
    a_platform_admin_finds_no_fault(World::on(Postgres::start(), None).await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_find_no_fault() {
    let world = World::on(Postgres::start(), None).await;
    find_faults(&world, &["--exclude-path-regex", "/(stream|pty)$|^/v1/capsules"]).await;
    world.running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_finds_no_fault() {
    let world = World::on(Postgres::start(), None).await;
    let bearer = format!("Authorization: Bearer {}", world.host.tokens().token);
    find_faults(
        &world,
        &["--header", &bearer, "--include-path-regex", "^/v1/hosts"],
    )
    .await;
    world.running.stop().await;
}
