//! The filesystem service.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use serde_json::{Value, json};

use crate::harness::{Agent, current_user, text};

async fn stat(agent: &Agent, path: &str) -> Value {
    agent
        .ok("filesystem.Filesystem/Stat", json!({ "path": path }))
        .await["entry"]
        .clone()
}

#[tokio::test]
async fn entries_are_described() {
    let agent = Agent::start().await;
    let file = agent.path("file.txt");
    fs::write(&file, "hello").expect("written");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).expect("changed");
    let entry = stat(&agent, "file.txt").await;
    assert_eq!(entry["name"], "file.txt");
    assert_eq!(entry["path"], text(&file));
    assert_eq!(entry["type"], "FILE_TYPE_FILE");
    assert_eq!(entry["size"], "5");
    assert_eq!(entry["mode"], 0o640);
    assert_eq!(entry["permissions"], "-rw-r-----");
    assert_eq!(entry["owner"], current_user());
    assert!(
        entry["modifiedTime"]
            .as_str()
            .is_some_and(|time| time.ends_with('Z'))
    );
    assert_eq!(entry.get("isSymlink"), None);
    let entry = stat(&agent, "/").await;
    assert_eq!(
        (entry["type"].as_str(), entry["path"].as_str()),
        (Some("FILE_TYPE_DIRECTORY"), Some("/"))
    );
    assert_eq!(
        agent
            .error("filesystem.Filesystem/Stat", json!({ "path": "none" }))
            .await,
        "not_found"
    );
    let below = json!({ "path": "file.txt/x" });
    assert_eq!(
        agent.error("filesystem.Filesystem/Stat", below).await,
        "invalid_argument"
    );
}

#[tokio::test]
async fn a_link_is_described_by_its_target() {
    let agent = Agent::start().await;
    let root = agent.dir.path().canonicalize().expect("the directory exists");
    fs::create_dir(agent.path("dir")).expect("created");
    symlink("dir", agent.path("link")).expect("linked");
    symlink("nowhere", agent.path("dangling")).expect("linked");
    let entry = stat(&agent, "link").await;
    assert_eq!(entry["type"], "FILE_TYPE_DIRECTORY");
    assert_eq!(entry["symlinkTarget"], text(&root.join("dir")));
    assert_eq!(entry["isSymlink"], true);
    let entry = stat(&agent, "dangling").await;
    assert_eq!(entry.get("type"), None);
    assert_eq!(entry["isSymlink"], true);
}

#[tokio::test]
async fn directories_are_made_with_their_parents() {
    let agent = Agent::start().await;
    let make = |path: &str| json!({ "path": path });
    let answer = agent.ok("filesystem.Filesystem/MakeDir", make("a/b/c")).await;
    assert_eq!(answer["entry"]["path"], text(&agent.path("a/b/c")));
    assert_eq!(
        fs::metadata(agent.path("a/b")).expect("it is there").mode() & 0o777,
        0o755
    );
    assert_eq!(
        agent.error("filesystem.Filesystem/MakeDir", make("a/b")).await,
        "already_exists"
    );
    fs::write(agent.path("file"), "").expect("written");
    assert_eq!(
        agent.error("filesystem.Filesystem/MakeDir", make("file")).await,
        "invalid_argument"
    );
    assert_eq!(
        agent.error("filesystem.Filesystem/MakeDir", make("file/x")).await,
        "invalid_argument"
    );
}

#[tokio::test]
async fn things_move_and_vanish() {
    let agent = Agent::start().await;
    fs::create_dir(agent.path("from")).expect("created");
    fs::write(agent.path("from/file"), "x").expect("written");
    let rename = |source: &str, destination: &str| json!({ "source": source, "destination": destination });
    let answer = agent
        .ok("filesystem.Filesystem/Move", rename("from", "new/place"))
        .await;
    assert_eq!(answer["entry"]["name"], "place");
    assert_eq!(
        fs::read_to_string(agent.path("new/place/file")).expect("it moved"),
        "x"
    );
    assert_eq!(
        agent
            .error("filesystem.Filesystem/Move", rename("from", "to"))
            .await,
        "not_found"
    );

    for _ in 0..2 {
        agent
            .ok("filesystem.Filesystem/Remove", json!({ "path": "new" }))
            .await;
        assert!(!agent.path("new").exists());
    }
    symlink("/", agent.path("link")).expect("linked");
    agent
        .ok("filesystem.Filesystem/Remove", json!({ "path": "link" }))
        .await;
    assert_eq!(
        agent
            .error("filesystem.Filesystem/Remove", json!({ "path": "/" }))
            .await,
        "invalid_argument"
    );
}

#[tokio::test]
async fn lists_go_depth_first_in_order_of_names() {
    let agent = Agent::start().await;
    for dir in ["l/b/deep/er", "l/a"] {
        fs::create_dir_all(agent.path(dir)).expect("created");
    }
    for file in ["l/b/1", "l/c", "l/a.txt", "l/b/deep/x"] {
        fs::write(agent.path(file), "").expect("written");
    }
    // A circle that must not be walked.
    symlink("..", agent.path("l/a/up")).expect("linked");
    let names = async |body: Value| -> Vec<String> {
        let answer = agent.ok("filesystem.Filesystem/ListDir", body).await;
        let prefix = text(&agent.path("l")) + "/";
        let entries = answer["entries"].as_array().cloned().unwrap_or_default();
        let path = |entry: &Value| {
            entry["path"]
                .as_str()
                .and_then(|path| path.strip_prefix(&prefix))
                .map(str::to_owned)
        };
        entries
            .iter()
            .map(|entry| path(entry).expect("the prefix that was asked for"))
            .collect()
    };
    let first = ["a", "a.txt", "b", "c"];
    assert_eq!(names(json!({ "path": "l" })).await, first);
    assert_eq!(names(json!({ "path": "l", "depth": 1 })).await, first);
    let second = ["a", "a/up", "a.txt", "b", "b/1", "b/deep", "c"];
    assert_eq!(names(json!({ "path": "./l/", "depth": 2 })).await, second);
    let all = [
        "a",
        "a/up",
        "a.txt",
        "b",
        "b/1",
        "b/deep",
        "b/deep/er",
        "b/deep/x",
        "c",
    ];
    assert_eq!(names(json!({ "path": "l", "depth": 100 })).await, all);
    let list = |path: &str| json!({ "path": path });
    assert_eq!(
        agent.error("filesystem.Filesystem/ListDir", list("none")).await,
        "not_found"
    );
    assert_eq!(
        agent.error("filesystem.Filesystem/ListDir", list("l/c")).await,
        "invalid_argument"
    );
}
