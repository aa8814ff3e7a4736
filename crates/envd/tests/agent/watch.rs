//! Watching directories, by stream and by polling.

use std::fs;

use serde_json::{Value, json};

use crate::harness::{Agent, until};

async fn watcher(agent: &Agent, options: Value) -> String {
    let mut request = json!({ "path": "watched" });
    for (key, value) in options.as_object().expect("an object") {
        request[key] = value.clone();
    }
    let answer = agent.ok("filesystem.Filesystem/CreateWatcher", request).await;
    answer["watcherId"].as_str().expect("an id").to_owned()
}

async fn poll(agent: &Agent, id: &str) -> Vec<(String, String)> {
    let answer = agent
        .ok(
            "filesystem.Filesystem/GetWatcherEvents",
            json!({ "watcherId": id }),
        )
        .await;
    let events = answer["events"].as_array().cloned().unwrap_or_default();
    events
        .iter()
        .map(|event| (kind(event), event["name"].as_str().expect("a name").to_owned()))
        .collect()
}

fn kind(event: &Value) -> String {
    let kind = event["type"].as_str().expect("a type");
    kind.strip_prefix("EVENT_TYPE_")
        .expect("the enum's prefix")
        .to_owned()
}

fn pairs(events: &[(&str, &str)]) -> Vec<(String, String)> {
    events
        .iter()
        .map(|(kind, name)| ((*kind).to_owned(), (*name).to_owned()))
        .collect()
}

async fn start() -> Agent {
    let agent = Agent::start().await;
    fs::create_dir(agent.path("watched")).expect("created");
    agent
}

async fn upload(agent: &Agent, path: &str, body: &'static str) {
    let request = agent
        .post(&format!("/files?path={path}"))
        .header("Content-Type", "application/octet-stream");
    assert_eq!(request.body(body).send().await.expect("an answer").status(), 200);
}

#[tokio::test]
async fn an_upload_is_three_events_at_once() {
    let agent = start().await;
    let id = watcher(&agent, json!({})).await;
    upload(&agent, "watched/new.txt", "content").await;
    let three = [("CREATE", "new.txt"), ("CHMOD", "new.txt"), ("WRITE", "new.txt")];
    assert_eq!(poll(&agent, &id).await, pairs(&three));
    assert_eq!(poll(&agent, &id).await, []);
}

#[tokio::test]
async fn new_directories_are_covered_before_the_next_write() {
    let agent = start().await;
    let id = watcher(&agent, json!({ "recursive": true })).await;
    agent
        .ok("filesystem.Filesystem/MakeDir", json!({ "path": "watched/a/b" }))
        .await;
    upload(&agent, "watched/a/b/f", "1").await;
    upload(&agent, "watched/x/y/g", "2").await;
    let events = poll(&agent, &id).await;
    let about = |name: &str| -> Vec<&str> {
        events
            .iter()
            .filter(|(_, found)| found == name)
            .map(|(kind, _)| kind.as_str())
            .collect()
    };
    for file in ["a/b/f", "x/y/g"] {
        assert_eq!(about(file), ["CREATE", "CHMOD", "WRITE"], "{file}: {events:?}");
    }
    for dir in ["a", "a/b", "x", "x/y"] {
        assert_eq!(
            about(dir).iter().filter(|kind| **kind == "CREATE").count(),
            1,
            "{dir}: {events:?}"
        );
    }
}

#[tokio::test]
async fn a_tree_made_by_somebody_else_is_reported_whole_and_once() {
    let agent = start().await;
    let id = watcher(&agent, json!({ "recursive": true })).await;
    for round in 0..20 {
        let dir = agent.path(&format!("watched/{round}/one/two"));
        fs::create_dir_all(&dir).expect("created");
        fs::write(dir.join("file"), "x").expect("written");
    }
    let mut seen: Vec<String> = Vec::new();
    until("all have been reported", async || {
        let events = poll(&agent, &id).await;
        seen.extend(
            events
                .into_iter()
                .filter(|(kind, _)| kind == "CREATE")
                .map(|(_, name)| name),
        );
        (seen.len() >= 80).then_some(())
    })
    .await;
    seen.sort();
    let mut expected: Vec<String> = (0..20)
        .flat_map(|i| ["", "/one", "/one/two", "/one/two/file"].map(|rest| format!("{i}{rest}")))
        .collect();
    expected.sort();
    assert_eq!(seen, expected);
}

#[tokio::test]
async fn renames_and_removals() {
    let agent = start().await;
    fs::write(agent.path("watched/old"), "x").expect("written");
    fs::create_dir_all(agent.path("watched/dir/sub")).expect("created");
    let id = watcher(&agent, json!({ "recursive": true })).await;
    fs::rename(agent.path("watched/old"), agent.path("watched/new")).expect("renamed");
    fs::remove_file(agent.path("watched/new")).expect("removed");
    let expected = pairs(&[("RENAME", "old"), ("CREATE", "new"), ("REMOVE", "new")]);
    assert_eq!(poll(&agent, &id).await, expected);

    // What happens in a directory is reported under its new name, and not at all once it has left.
    fs::rename(agent.path("watched/dir"), agent.path("watched/moved")).expect("renamed");
    assert_eq!(
        poll(&agent, &id).await,
        pairs(&[("RENAME", "dir"), ("CREATE", "moved")])
    );
    fs::write(agent.path("watched/moved/sub/f"), "").expect("written");
    assert_eq!(poll(&agent, &id).await, pairs(&[("CREATE", "moved/sub/f")]));
    fs::rename(agent.path("watched/moved"), agent.path("outside")).expect("renamed");
    fs::write(agent.path("outside/sub/g"), "").expect("written");
    assert_eq!(poll(&agent, &id).await, pairs(&[("RENAME", "moved")]));
}

#[tokio::test]
async fn without_recursion_what_is_below_stays_unseen() {
    let agent = start().await;
    fs::create_dir(agent.path("watched/sub")).expect("created");
    let id = watcher(&agent, json!({})).await;
    fs::write(agent.path("watched/sub/deep"), "x").expect("written");
    fs::create_dir(agent.path("watched/other")).expect("created");
    assert_eq!(poll(&agent, &id).await, pairs(&[("CREATE", "other")]));
}

#[tokio::test]
async fn a_stream_starts_with_its_start_and_carries_entries() {
    let agent = start().await;
    let request = json!({ "path": "watched", "includeEntry": true });
    let mut stream = agent
        .stream(
            "filesystem.Filesystem/WatchDir",
            request,
            &[("Connect-Timeout-Ms", "3000")],
        )
        .await;
    assert_eq!(stream.next().await, Some(json!({ "start": {} })));
    upload(&agent, "watched/f", "12345").await;
    for expected in ["CREATE", "CHMOD", "WRITE"] {
        let message = stream.next().await.expect("an event");
        let event = &message["filesystem"];
        assert_eq!(
            (kind(event).as_str(), event["name"].as_str()),
            (expected, Some("f"))
        );
        assert_eq!(event["entry"]["type"], "FILE_TYPE_FILE");
    }
    fs::remove_file(agent.path("watched/f")).expect("removed");
    let message = stream.next().await.expect("an event");
    assert_eq!(kind(&message["filesystem"]), "REMOVE");
    assert_eq!(message["filesystem"].get("entry"), None);
    assert_eq!(stream.error().await.0, "deadline_exceeded");
}

#[tokio::test]
async fn only_directories_can_be_watched() {
    let agent = start().await;
    fs::write(agent.path("file"), "").expect("written");
    for (path, code) in [("file", "invalid_argument"), ("none", "not_found")] {
        let request = json!({ "path": path });
        assert_eq!(
            agent
                .error("filesystem.Filesystem/CreateWatcher", request.clone())
                .await,
            code
        );
        let mut stream = agent.stream("filesystem.Filesystem/WatchDir", request, &[]).await;
        assert_eq!(stream.error().await.0, code);
    }
}

#[tokio::test]
async fn a_removed_watcher_is_gone_and_frees_what_it_held() {
    let agent = start().await;
    let inotify_handles = || {
        let links = fs::read_dir(format!("/proc/{}/fd", agent.pid())).expect("the agent runs");
        let targets = links.flatten().filter_map(|link| fs::read_link(link.path()).ok());
        targets
            .filter(|target| target.to_string_lossy().contains("inotify"))
            .count()
    };
    let mut ids = Vec::new();
    for _ in 0..10 {
        ids.push(watcher(&agent, json!({})).await);
    }
    assert!(inotify_handles() >= 10);
    for id in &ids {
        agent
            .ok("filesystem.Filesystem/RemoveWatcher", json!({ "watcherId": id }))
            .await;
        let gone = agent
            .error(
                "filesystem.Filesystem/GetWatcherEvents",
                json!({ "watcherId": id }),
            )
            .await;
        assert_eq!(gone, "not_found");
    }
    until("the handles are closed", async || {
        (inotify_handles() == 0).then_some(())
    })
    .await;
}

#[tokio::test]
async fn the_end_of_the_directory_itself_is_an_event() {
    let agent = start().await;
    let id = watcher(&agent, json!({})).await;
    fs::remove_dir(agent.path("watched")).expect("removed");
    assert_eq!(poll(&agent, &id).await, pairs(&[("REMOVE", ".")]));
}

#[tokio::test]
async fn a_flood_of_events_neither_stops_nor_fills_the_agent() {
    let agent = start().await;
    let id = watcher(&agent, json!({ "recursive": true, "includeEntry": true })).await;
    let script = "cd watched; for i in $(seq 30000); do echo x > f$((i % 500)); done";
    let mut flood = agent.shell(script).await;
    flood.pid().await;
    // Served all the while; events that nobody fetches are dropped in the end.
    assert_eq!(agent.shell("echo fine").await.finish().await.stdout(), "fine\n");
    assert_eq!(flood.finish().await.exit_code(), 0);
    let kept = poll(&agent, &id).await.len();
    assert!((500..=16_384).contains(&kept), "{kept}");
    fs::write(agent.path("watched/last"), "").expect("written");
    assert_eq!(poll(&agent, &id).await, pairs(&[("CREATE", "last")]));
}
