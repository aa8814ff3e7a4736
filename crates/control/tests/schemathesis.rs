//! Schemathesis, an independent reader of OpenAPI documents, throws generated requests, good and bad, at a running
//! server: no answer may be a server error, or one that the document does not describe.

mod common;

use std::path::PathBuf;
use std::process::Command;

use common::World;

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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn generated_requests_find_no_fault() {
    let program = tokio::task::spawn_blocking(schemathesis).await.expect("no panic");
    let world = World::new().await;
    // A platform admin who owns a team may call everything.
    let session = world.session(world.bootstrap.user_id, None).await;
    let output = tokio::process::Command::new(program)
        .arg("run")
        .arg(world.url("/openapi.yaml"))
        .args(["--header", &format!("X-API-Key: {}", world.key)])
        .args(["--header", &format!("Authorization: Bearer {session}")])
        .args([
            "--checks",
            "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance",
        ])
        .args(["--phases", "examples,coverage,fuzzing"])
        // These end the session that the rest needs.
        .args([
            "--exclude-operation-id",
            "delete_account",
            "--exclude-operation-id",
            "change_password",
        ])
        // WebSockets are no plain requests; agents' calls have a token of their own.
        .args(["--exclude-path-regex", "/(stream|pty)$|^/v1/hosts/"])
        .args([
            "--max-examples",
            "15",
            "--seed",
            SEED,
            "--generation-database",
            "none",
        ])
        .args(["--request-timeout", "20", "--no-color", "--continue-on-failure"])
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
    world.running.stop().await;
}
