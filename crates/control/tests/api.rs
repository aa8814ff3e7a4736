//! The API's contract over real HTTP: every route, and what it refuses.

mod common;

use std::time::Duration;

use common::{DEADLINE, World, answer, code, message};
use connectrpc::ConnectError;
use sea_orm::ConnectionTrait as _;
use serde_json::{Value, json};
use wrenn_testkit::platform::eventually;
use wrenn_testkit::simhost::Call;

#[tokio::test]
async fn keys_and_teams_are_kept_apart() {
    let world = World::new().await;
    let sandbox = world.sandbox().await;
    let path = format!("/v1/sandboxes/{sandbox}");
    let bare = |path: &str| world.http.get(world.url(path));
    for request in [
        bare(&path),
        bare(&path).header("x-api-key", "wrn_no"),
        bare(&path).bearer_auth("wrn_no"),
    ] {
        let (status, body) = answer(request).await;
        assert_eq!((status, code(&body)), (401, "unauthorized"));
    }
    assert_eq!(answer(bare(&path).bearer_auth(&world.key)).await.0, 200);

    let (_, other) = world.running.control.create_team("Other").await.expect("a team");
    for (method, path) in [
        ("GET", path.clone()),
        ("DELETE", path.clone()),
        ("POST", format!("{path}/exec")),
        ("POST", format!("{path}/pause")),
        ("POST", format!("{path}/files/read")),
        ("GET", format!("{path}/processes")),
        ("GET", format!("{path}/metrics")),
        ("POST", "/v1/snapshots".to_owned()),
    ] {
        let body = json!({"cmd": "echo", "path": "/tmp", "sandbox_id": sandbox});
        let request = world
            .http
            .request(method.parse().expect("a method"), world.url(&path));
        let request = request.header("x-api-key", &other);
        let (status, body) = answer(if method == "POST" {
            request.json(&body)
        } else {
            request
        })
        .await;
        assert_eq!(
            (status, code(&body)),
            (404, "not_found"),
            "{method} {path}: {body}"
        );
    }
    let (_, list) = answer(bare("/v1/sandboxes").header("x-api-key", &other)).await;
    assert_eq!(list, json!([]));
    assert_eq!(world.settled(&sandbox).await, "running");
    // A host's token is no key, and a key is no host's token.
    let token = &world.host.tokens().token;
    assert_eq!(answer(bare(&path).header("x-api-key", token)).await.0, 401);
    let beat = world
        .http
        .post(world.url(&format!("/v1/hosts/{}/heartbeat", world.host.tokens().host_id)));
    assert_eq!(answer(beat.bearer_auth(&world.key).json(&json!({}))).await.0, 401);
}

#[tokio::test]
async fn malformed_and_unknown_ids_are_not_found() {
    let world = World::new().await;
    let unknown = wrenn_proto::id::SandboxId::new().to_string();
    for id in [
        unknown.as_str(),
        "sb-",
        "nonsense",
        "..%2F..%2Fetc",
        "%ff",
        "sb-00000000-0000-0000-0000-00000000000g",
    ] {
        for (method, rest) in [
            ("GET", ""),
            ("DELETE", ""),
            ("POST", "/pause"),
            ("GET", "/processes"),
            ("POST", "/ping"),
        ] {
            let (status, body) = world
                .call(method, &format!("/v1/sandboxes/{id}{rest}"), None)
                .await;
            assert_eq!(
                (status, code(&body)),
                (404, "not_found"),
                "{method} {id}{rest}: {body}"
            );
        }
    }
    for path in ["/nothing", "/v1/", "/v1/sandboxes/a/b/c/d", "/v2/sandboxes"] {
        let (status, body) = world.get(path).await;
        assert_eq!((status, code(&body)), (404, "not_found"), "{path}: {body}");
    }
    for (method, path) in [
        ("PUT", "/v1/sandboxes"),
        ("DELETE", "/health"),
        ("GET", "/v1/hosts/register"),
    ] {
        let (status, body) = world.call(method, path, None).await;
        assert_eq!(
            (status, code(&body)),
            (405, "method_not_allowed"),
            "{method} {path}: {body}"
        );
    }
}

#[tokio::test]
async fn what_is_out_of_range_is_refused_with_field_and_bounds() {
    let world = World::new().await;
    let pairs: serde_json::Map<String, Value> = (0..65).map(|n| (n.to_string(), json!(""))).collect();
    for (body, parts) in [
        (json!({"vcpus": 0}), ["vcpus", "32"]),
        (json!({"vcpus": 33}), ["vcpus", "32"]),
        (json!({"memory_mb": 127}), ["memory_mb", "128"]),
        (json!({"memory_mb": 131_073}), ["memory_mb", "131072"]),
        (json!({"disk_size_mb": 20_479}), ["disk_size_mb", "20480"]),
        (json!({"disk_size_mb": 1_048_577}), ["disk_size_mb", "1048576"]),
        (json!({"timeout_sec": 2_592_001}), ["timeout_sec", "2592000"]),
        (json!({"metadata": pairs}), ["metadata", "64"]),
        (
            json!({"metadata": {"a": "x".repeat(17_000)}}),
            ["metadata", "16384"],
        ),
        (json!({"envs": {"1A": "x"}}), ["envs", "1A"]),
        (json!({"vcpus": "two"}), ["vcpus", "invalid type"]),
        (json!({"memory_mb": -1}), ["memory_mb", "-1"]),
        (json!([1, 2]), ["invalid", ""]),
    ] {
        let (status, answer) = world.post("/v1/sandboxes", body.clone()).await;
        assert_eq!(
            (status, code(&answer)),
            (400, "invalid_request"),
            "{body}: {answer}"
        );
        assert!(
            parts.iter().all(|part| message(&answer).contains(part)),
            "{body}: {answer}"
        );
    }
    let (status, body) = world.post("/v1/sandboxes?wait=301", json!({})).await;
    assert_eq!((status, code(&body)), (400, "invalid_request"), "{body}");
    let (status, body) = world.post("/v1/sandboxes", json!({"template": "nope"})).await;
    assert_eq!((status, code(&body)), (404, "not_found"), "{body}");
    for query in ["status=odd", "limit=0", "limit=1001", "before=x", "limit=x"] {
        let (status, body) = world.get(&format!("/v1/sandboxes?{query}")).await;
        assert_eq!((status, code(&body)), (400, "invalid_request"), "{query}: {body}");
    }
    let (status, body) = answer(world.request("POST", "/v1/sandboxes").body("{broken")).await;
    assert_eq!((status, code(&body)), (400, "invalid_request"), "{body}");
    assert_eq!(
        world.get("/v1/sandboxes?all=true").await.1,
        json!([]),
        "nothing was stored"
    );
}

#[tokio::test]
async fn bodies_are_limited_and_may_be_chunked_or_absent() {
    let world = World::new().await;
    let large = json!({"metadata": {"a": "x".repeat(1 << 20)}}).to_string();
    let chunks = |text: &str| {
        let chunks: Vec<_> = text
            .as_bytes()
            .chunks(1000)
            .map(|chunk| Ok::<_, std::io::Error>(chunk.to_vec()))
            .collect();
        reqwest::Body::wrap_stream(futures::stream::iter(chunks))
    };
    for request in [
        world.request("POST", "/v1/sandboxes").body(large.clone()),
        world.request("POST", "/v1/sandboxes").body(chunks(&large)),
    ] {
        let (status, body) = answer(request).await;
        assert_eq!((status, code(&body)), (413, "payload_too_large"), "{body}");
    }
    let (status, body) = answer(
        world
            .request("POST", "/v1/sandboxes")
            .body(chunks(r#"{"vcpus":2}"#)),
    )
    .await;
    assert_eq!((status, &body["vcpus"]), (202, &json!(2)), "{body}");
    assert_eq!(answer(world.request("POST", "/v1/sandboxes")).await.0, 202);
}

#[tokio::test]
async fn listing_is_newest_first_and_paged() {
    let world = World::new().await;
    let mut ids = Vec::new();
    for _ in 0..5 {
        ids.insert(0, world.sandbox().await);
    }
    let listed = |body: &Value| -> Vec<String> {
        body.as_array()
            .into_iter()
            .flatten()
            .filter_map(|one| one["id"].as_str().map(str::to_owned))
            .collect()
    };
    assert_eq!(listed(&world.get("/v1/sandboxes").await.1), ids);
    assert_eq!(listed(&world.get("/v1/capsules").await.1), ids);
    let first = listed(&world.get("/v1/sandboxes?limit=2").await.1);
    assert_eq!(first, ids[..2]);
    assert_eq!(
        listed(
            &world
                .get(&format!("/v1/sandboxes?limit=9&before={}", first[1]))
                .await
                .1
        ),
        ids[2..]
    );
    world
        .post(&format!("/v1/sandboxes/{}/pause?wait=20", ids[0]), json!({}))
        .await;
    assert_eq!(
        listed(&world.get("/v1/sandboxes?status=paused").await.1),
        ids[..1]
    );
}

#[tokio::test]
async fn the_older_word_waits_for_the_final_status() {
    let world = World::new().await;
    let sandbox = world.sandbox().await;
    for (operation, status) in [("pause", "paused"), ("resume", "running")] {
        let (code, body) = world
            .post(&format!("/v1/capsules/{sandbox}/{operation}"), json!({}))
            .await;
        assert_eq!((code, body["status"].as_str()), (200, Some(status)), "{body}");
    }
    assert_eq!(
        world
            .post(&format!("/v1/capsules/{sandbox}/ping"), json!({}))
            .await
            .0,
        204
    );
    assert_eq!(
        world
            .call("DELETE", &format!("/v1/capsules/{sandbox}"), None)
            .await
            .0,
        202
    );
}

#[tokio::test]
async fn programs_run() {
    let world = World::new().await;
    let sandbox = world.sandbox().await;
    let exec = format!("/v1/sandboxes/{sandbox}/exec");
    let (status, body) = world
        .post(&exec, json!({"cmd": "echo", "args": ["hi", "there"]}))
        .await;
    assert_eq!(status, 200, "{body}");
    assert_eq!(
        (
            &body["stdout"],
            &body["exit_code"],
            &body["encoding"],
            &body["sandbox_id"]
        ),
        (&json!("hi there\n"), &json!(0), &json!("utf-8"), &json!(sandbox))
    );
    let (_, body) = world.post(&exec, json!({"cmd": "bytes", "args": ["ff00"]})).await;
    assert_eq!(
        (&body["stdout"], &body["encoding"]),
        (&json!("/wA="), &json!("base64"))
    );
    let (_, body) = world.post(&exec, json!({"cmd": "exit", "args": ["3"]})).await;
    assert_eq!(
        (&body["stderr"], &body["exit_code"]),
        (&json!("bye\n"), &json!(3))
    );

    let (status, body) = world
        .post(&exec, json!({"cmd": "sleep", "background": true}))
        .await;
    assert_eq!(status, 202, "{body}");
    let tag = body["tag"].as_str().expect("a tag").to_owned();
    assert!(tag.starts_with("proc-"), "{tag}");
    let processes = format!("/v1/sandboxes/{sandbox}/processes");
    let (_, list) = world.get(&processes).await;
    assert_eq!(
        (&list["processes"][0]["tag"], &list["processes"][0]["cmd"]),
        (&json!(tag), &json!("sleep"))
    );
    assert_eq!(
        world.call("DELETE", &format!("{processes}/{tag}"), None).await.0,
        204
    );
    let (status, body) = world.call("DELETE", &format!("{processes}/4242"), None).await;
    assert_eq!((status, code(&body)), (404, "not_found"));

    for (body, part) in [
        (json!({}), "cmd"),
        (json!({"cmd": "a\u{0}b"}), "NUL"),
        (json!({"cmd": "x", "cwd": "\u{0}"}), "cwd"),
        (json!({"cmd": "x", "user": "../root"}), "user"),
        (json!({"cmd": "x", "tag": "12"}), "tag"),
        (json!({"cmd": "x", "timeout_sec": 90_000}), "timeout_sec"),
    ] {
        let (status, answer) = world.post(&exec, body.clone()).await;
        assert_eq!((status, code(&answer)), (400, "invalid_request"), "{body}");
        assert!(message(&answer).contains(part), "{body}: {answer}");
    }
    for (error, expected) in [
        (
            ConnectError::deadline_exceeded("killed after 30 s"),
            (504, "timeout"),
        ),
        (ConnectError::unavailable("going down"), (503, "host_unavailable")),
        (ConnectError::internal("odd"), (502, "agent_error")),
        (
            ConnectError::invalid_argument("cwd '/x' does not exist"),
            (400, "invalid_request"),
        ),
    ] {
        world.host.fail(Call::Exec, error);
        let (status, body) = world.post(&exec, json!({"cmd": "echo"})).await;
        assert_eq!((status, code(&body)), expected, "{body}");
    }
}

#[tokio::test]
async fn a_decision_about_a_sandbox_is_felt_by_the_very_next_call() {
    let world = World::new().await;
    let sandbox = world.sandbox().await;
    let exec = format!("/v1/sandboxes/{sandbox}/exec");
    let (status, body) = world.post(&exec, json!({"cmd": "echo"})).await;
    assert_eq!(status, 200, "{body}");
    // The host does not know yet, and would still serve it.
    world.host.hold(Call::Pause);
    let (status, body) = world
        .post(&format!("/v1/sandboxes/{sandbox}/pause"), json!({}))
        .await;
    assert_eq!(status, 202, "{body}");
    let (status, body) = world.post(&exec, json!({"cmd": "echo"})).await;
    assert_eq!((status, code(&body)), (409, "invalid_state"), "{body}");
    world.host.release(Call::Pause);
    world.until(&sandbox, "paused").await;
}

#[tokio::test]
async fn a_host_that_is_away_is_unavailable() {
    let mut world = World::new().await;
    let sandbox = world.sandbox().await;
    world.host.disconnect();
    let (status, body) = world
        .post(&format!("/v1/sandboxes/{sandbox}/exec"), json!({"cmd": "echo"}))
        .await;
    assert_eq!((status, code(&body)), (503, "host_unavailable"), "{body}");
    world.host.reconnect().await;
    assert_eq!(
        world
            .post(&format!("/v1/sandboxes/{sandbox}/exec"), json!({"cmd": "echo"}))
            .await
            .0,
        200
    );
}

#[tokio::test]
async fn files_go_in_and_out() {
    let world = World::new().await;
    let sandbox = world.sandbox().await;
    let files = format!("/v1/sandboxes/{sandbox}/files");
    let content: Vec<u8> = (0..3_000_000u32).map(|n| (n % 251) as u8).collect();
    for (write, read, path) in [
        ("write", "read", "/tmp/a"),
        ("stream/write", "stream/read", "/tmp/b"),
    ] {
        let form = reqwest::multipart::Form::new().text("path", path).part(
            "file",
            reqwest::multipart::Part::bytes(content.clone()).file_name("a.bin"),
        );
        let (status, body) = answer(world.request("POST", &format!("{files}/{write}")).multipart(form)).await;
        assert_eq!(status, 204, "{body}");
        let response = world
            .request("POST", &format!("{files}/{read}"))
            .json(&json!({"path": path}))
            .send()
            .await;
        let response = response.expect("an answer");
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "application/octet-stream");
        assert!(
            response.bytes().await.expect("the bytes") == content,
            "{path} came back changed"
        );
    }
    let (status, body) = world
        .post(&format!("{files}/list"), json!({"path": "/tmp", "depth": 1}))
        .await;
    assert_eq!(
        (status, body["entries"][0]["path"].as_str()),
        (200, Some("/tmp/a")),
        "{body}"
    );
    assert_eq!(body["entries"][0]["type"], "file");
    let (status, body) = world
        .post(&format!("{files}/mkdir"), json!({"path": "/tmp/d"}))
        .await;
    assert_eq!((status, &body["entry"]["type"]), (200, &json!("directory")));
    let (status, body) = world
        .post(&format!("{files}/mkdir"), json!({"path": "/tmp/d"}))
        .await;
    assert_eq!((status, code(&body)), (409, "conflict"));
    assert_eq!(
        world
            .post(&format!("{files}/remove"), json!({"path": "/tmp/a"}))
            .await
            .0,
        204
    );
    for (route, path) in [("read", "/tmp/a"), ("list", "/none")] {
        let (status, body) = world
            .post(&format!("{files}/{route}"), json!({"path": path}))
            .await;
        assert_eq!((status, code(&body)), (404, "not_found"), "{route}: {body}");
    }
    for body in [
        json!({"path": ""}),
        json!({"path": "a\u{0}b"}),
        json!({"path": "x".repeat(5000)}),
        json!({}),
    ] {
        let (status, answer) = world.post(&format!("{files}/read"), body).await;
        assert_eq!((status, code(&answer)), (400, "invalid_request"), "{answer}");
    }
    // Refused while the upload is on its way: the refusal arrives.
    let form = reqwest::multipart::Form::new()
        .text("path", "/none/x")
        .part("file", reqwest::multipart::Part::bytes(content.clone()));
    let (status, body) = answer(world.request("POST", &format!("{files}/write")).multipart(form)).await;
    assert_eq!((status, code(&body)), (404, "not_found"), "{body}");
    // Parts in the wrong order, missing, or no form at all.
    let form = reqwest::multipart::Form::new()
        .text("file", "x")
        .text("path", "/tmp/x");
    assert_eq!(
        answer(world.request("POST", &format!("{files}/write")).multipart(form))
            .await
            .0,
        400
    );
    let form = reqwest::multipart::Form::new().text("path", "/tmp/x");
    assert_eq!(
        answer(world.request("POST", &format!("{files}/write")).multipart(form))
            .await
            .0,
        400
    );
    assert_eq!(world.post(&format!("{files}/write"), json!({})).await.0, 400);
}

#[tokio::test]
async fn files_are_those_of_the_user_that_was_named() {
    let world = World::new().await;
    let sandbox = world.sandbox().await;
    let files = format!("/v1/sandboxes/{sandbox}/files");
    let upload = |user: Option<&str>| {
        let mut form = reqwest::multipart::Form::new().text("path", "note");
        if let Some(user) = user {
            form = form.text("user", user.to_owned());
        }
        let form = form.part("file", reqwest::multipart::Part::bytes(b"hi".to_vec()));
        answer(world.request("POST", &format!("{files}/write")).multipart(form))
    };
    for (user, home, owner) in [
        (None, "/home/user", "user"),
        // As for exec, an empty one is none.
        (Some(""), "/home/user", "user"),
        (Some("root"), "/root", "root"),
    ] {
        assert_eq!(upload(user).await.0, 204);
        let ask = |path: &str| match user {
            Some(user) => json!({"path": path, "user": user}),
            None => json!({"path": path}),
        };
        let (_, listed) = world.post(&format!("{files}/list"), ask(home)).await;
        let entry = &listed["entries"][0];
        assert_eq!(
            (&entry["path"], &entry["owner"]),
            (&json!(format!("{home}/note")), &json!(owner)),
            "{listed}"
        );
        let read = world.request("POST", &format!("{files}/read")).json(&ask("note"));
        let read = read.send().await.expect("an answer");
        assert_eq!(read.bytes().await.expect("the bytes"), "hi");
        let (status, made) = world.post(&format!("{files}/mkdir"), ask("d")).await;
        assert_eq!(
            (status, &made["entry"]["path"], &made["entry"]["owner"]),
            (200, &json!(format!("{home}/d")), &json!(owner)),
            "{made}"
        );
        for path in ["note", "d"] {
            let (status, body) = world.post(&format!("{files}/remove"), ask(path)).await;
            assert_eq!(status, 204, "{body}");
        }
        let (_, listed) = world.post(&format!("{files}/list"), ask(home)).await;
        assert_eq!(listed["entries"], json!([]));
    }
    // Unknown in the sandbox, or no name at all: the field is named.
    for user in ["ghost", "a/b", "a\nb"] {
        let (status, body) = upload(Some(user)).await;
        assert_eq!((status, code(&body)), (400, "invalid_request"), "{user}: {body}");
        assert!(message(&body).contains("user"), "{body}");
        for route in ["read", "stream/read", "list", "mkdir", "remove"] {
            let ask = json!({"path": "note", "user": user});
            let (status, body) = world.post(&format!("{files}/{route}"), ask).await;
            assert_eq!((status, code(&body)), (400, "invalid_request"), "{route}: {body}");
            assert!(message(&body).contains("user"), "{route}: {body}");
        }
    }
}

#[tokio::test]
async fn what_a_guest_has_used_up_is_not_the_platforms_room() {
    let world = World::new().await;
    let sandbox = world.sandbox().await;
    let full = || ConnectError::resource_exhausted("no space left in the sandbox");
    let files = format!("/v1/sandboxes/{sandbox}/files");
    world.host.fail(Call::Write, full());
    let form = reqwest::multipart::Form::new()
        .text("path", "/tmp/x")
        .part("file", reqwest::multipart::Part::bytes(b"hi".to_vec()));
    let write = world.request("POST", &format!("{files}/write")).multipart(form);
    world.host.fail(Call::Exec, full());
    let exec = world
        .request("POST", &format!("/v1/sandboxes/{sandbox}/exec"))
        .json(&json!({"cmd": "echo"}));
    world.host.fail(Call::Other, full());
    let mkdir = world
        .request("POST", &format!("{files}/mkdir"))
        .json(&json!({"path": "/tmp/d"}));
    for request in [write, exec, mkdir] {
        let response = request.send().await.expect("an answer");
        let (status, later) = (response.status(), response.headers().contains_key("retry-after"));
        let body: Value = response.json().await.expect("a body");
        assert_eq!(
            (status.as_u16(), later, code(&body), message(&body)),
            (502, false, "agent_error", "no space left in the sandbox")
        );
    }
}

#[tokio::test]
async fn half_an_upload_is_not_a_file() {
    let world = World::new().await;
    let sandbox = world.sandbox().await;
    let head = "--b\r\ncontent-disposition: form-data; name=\"path\"\r\n\r\n/tmp/half\r\n\
                --b\r\ncontent-disposition: form-data; name=\"file\"\r\n\r\nhalf of";
    let request = world
        .request("POST", &format!("/v1/sandboxes/{sandbox}/files/write"))
        .header("content-type", "multipart/form-data; boundary=b")
        .body(head);
    let (status, body) = answer(request).await;
    assert_eq!((status, code(&body)), (400, "invalid_request"), "{body}");
    // The host has taken the call by now and saw it cut, not ended.
    world.running.control.reconcile().await.expect("a pass");
    let (_, body) = world
        .post(
            &format!("/v1/sandboxes/{sandbox}/files/list"),
            json!({"path": "/tmp"}),
        )
        .await;
    assert_eq!(body["entries"], json!([]), "{body}");
}

#[tokio::test]
async fn a_download_that_nobody_reads_stops_the_producer() {
    let world = World::new().await;
    let sandbox = world.sandbox().await;
    let request = world.request("POST", &format!("/v1/sandboxes/{sandbox}/files/read"));
    let response = request
        .json(&json!({"path": "/dev/zero"}))
        .send()
        .await
        .expect("an answer");
    assert_eq!(response.status(), 200);
    // Unread, the producer comes to a halt; the file itself has no end.
    let produced = || {
        world
            .host
            .with(|model| model.produced.load(std::sync::atomic::Ordering::SeqCst))
    };
    let mut last = u64::MAX;
    let deadline = tokio::time::Instant::now() + common::DEADLINE;
    while last != produced() {
        last = produced();
        assert!(
            tokio::time::Instant::now() < deadline,
            "it never stops: {last} chunks"
        );
        // Other requests go through the same server meanwhile, which gives the producer its chances.
        for _ in 0..20 {
            assert_eq!(world.get("/health").await.0, 200);
        }
    }
    assert!(last < 2000, "{last} chunks of 64 KiB are in buffers");
}

#[tokio::test]
async fn snapshots_become_templates() {
    let world = World::new().await;
    let sandbox = world.sandbox().await;
    let (status, body) = world
        .post("/v1/snapshots", json!({"sandbox_id": sandbox, "name": "mine"}))
        .await;
    assert_eq!(status, 201, "{body}");
    assert_eq!(
        (
            &body["name"],
            &body["type"],
            &body["status"],
            &body["size_bytes"],
            &body["platform"]
        ),
        (
            &json!("mine"),
            &json!("snapshot"),
            &json!("ready"),
            &json!(4096),
            &json!(false)
        )
    );
    let first = body["id"].clone();
    assert_eq!(world.settled(&sandbox).await, "running");

    let (status, body) = world
        .post("/v1/sandboxes?wait=20", json!({"template": "mine"}))
        .await;
    assert_eq!(
        (status, &body["status"], &body["template"]),
        (201, &json!("running"), &json!("mine")),
        "{body}"
    );
    let (status, body) = world
        .post("/v1/sandboxes?wait=20", json!({"template": first}))
        .await;
    assert_eq!((status, &body["status"]), (201, &json!("running")), "{body}");
    let (status, body) = world
        .post("/v1/sandboxes", json!({"template": "mine", "memory_mb": 1024}))
        .await;
    assert_eq!((status, code(&body)), (400, "invalid_request"));
    assert!(
        message(&body).contains("memory_mb") && message(&body).contains("512"),
        "{body}"
    );

    let (status, body) = world
        .post("/v1/snapshots", json!({"sandbox_id": sandbox, "name": "mine"}))
        .await;
    assert_eq!((status, code(&body)), (409, "conflict"), "{body}");
    // Overwriting from a paused sandbox; it stays paused.
    world
        .post(&format!("/v1/sandboxes/{sandbox}/pause?wait=20"), json!({}))
        .await;
    let (status, body) = world
        .post(
            "/v1/snapshots?overwrite=true",
            json!({"sandbox_id": sandbox, "name": "mine"}),
        )
        .await;
    assert_eq!((status, &body["name"]), (201, &json!("mine")), "{body}");
    assert_ne!(body["id"], first);
    assert_eq!(world.settled(&sandbox).await, "paused");
    world.running.control.reconcile().await.expect("a pass");
    assert_eq!(
        world.host.with(|model| model.snapshots.len()),
        1,
        "what was replaced is gone"
    );

    for path in ["/v1/snapshots", "/v1/templates"] {
        let (_, list) = world.get(path).await;
        let names: Vec<_> = list
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|one| one["name"].as_str())
            .collect();
        assert_eq!(names, ["mine", "minimal"], "{path}");
    }
    assert_eq!(
        world
            .get("/v1/snapshots?type=base")
            .await
            .1
            .as_array()
            .map(Vec::len),
        Some(1)
    );
    assert_eq!(world.get("/v1/snapshots?type=odd").await.0, 400);

    let id = body["id"].as_str().expect("an id").to_owned();
    world.host.with(|model| model.used_snapshots.insert(id.clone()));
    let (status, refusal) = world.call("DELETE", "/v1/snapshots/mine", None).await;
    assert_eq!((status, code(&refusal)), (409, "conflict"), "{refusal}");
    world.host.with(|model| model.used_snapshots.clear());
    assert_eq!(world.call("DELETE", "/v1/snapshots/mine", None).await.0, 204);
    assert_eq!(world.call("DELETE", "/v1/snapshots/mine", None).await.0, 404);
    let (status, refusal) = world.call("DELETE", "/v1/snapshots/minimal", None).await;
    assert_eq!((status, code(&refusal)), (403, "forbidden"), "{refusal}");
    for name in ["Upper", "-a", "tpl-x", "a/b", &"x".repeat(200)] {
        let (status, _) = world
            .post("/v1/snapshots", json!({"sandbox_id": sandbox, "name": name}))
            .await;
        assert_eq!(status, 400, "{name}");
    }
}

#[tokio::test]
async fn a_console_is_read_where_it_is() {
    let mut world = World::new().await;
    let sandbox = world.sandbox().await;
    let path = format!("/v1/sandboxes/{sandbox}/console");
    let (status, body) = world.get(&path).await;
    assert_eq!((status, &body["console"]), (200, &json!("a guest's last words")));
    let (status, body) = world.get(&path.replace("sandboxes", "capsules")).await;
    assert_eq!((status, &body["console"]), (200, &json!("a guest's last words")));
    // Its host forgot it: there is nothing to read, and the monitor will say so.
    world.host.with(|model| model.sandboxes.clear());
    assert_eq!(world.get(&path).await, (200, json!({"console": ""})));
    world.host.disconnect();
    let (status, body) = world.get(&path).await;
    assert_eq!((status, code(&body)), (503, "host_unavailable"), "{body}");
}

/// What has lost its name is removed by whichever pass comes first: one that was woken, or the one asked for here.
async fn one_snapshot_is_left(world: &World) {
    eventually("the one without a name is gone", DEADLINE, async || {
        world.running.control.reconcile().await.expect("a pass");
        (world.host.with(|model| model.snapshots.len()) == 1).then_some(())
    })
    .await;
}

/// Snapshots over a name whose holder changes while they are made.
#[tokio::test]
async fn snapshots_over_one_name_at_once_all_end() {
    // With no patience at all the monitor could give up a snapshot that its sandbox is just about to begin.
    let world = World::new()
        .await
        .restart_with(|config| config.timings.transient_age = Duration::from_secs(30))
        .await;
    let (one, other) = (world.sandbox().await, world.sandbox().await);
    let (status, body) = world
        .post("/v1/snapshots", json!({"sandbox_id": one, "name": "mine"}))
        .await;
    assert_eq!(status, 201, "{body}");
    let first = body["id"].clone();
    world.host.hold(Call::CreateSnapshot);
    let mut made = Vec::new();
    for sandbox in [&one, &other] {
        let (status, body) = world
            .post(
                "/v1/snapshots?overwrite=true&wait=0",
                json!({"sandbox_id": sandbox, "name": "mine"}),
            )
            .await;
        assert_eq!(status, 202, "{body}");
        made.push(body["id"].clone());
    }
    world.host.wait_arrived(Call::CreateSnapshot, 3).await;
    world.host.release(Call::CreateSnapshot);
    for sandbox in [&one, &other] {
        assert_eq!(world.settled(sandbox).await, "running");
        let (_, body) = world.get(&format!("/v1/sandboxes/{sandbox}")).await;
        assert_eq!(body["error"], json!(null), "{body}");
    }
    let (_, list) = world.get("/v1/snapshots?type=snapshot").await;
    let list = list.as_array().expect("a list").clone();
    assert_eq!(list.len(), 1, "{list:?}");
    assert!(
        list[0]["name"] == "mine" && list[0]["id"] != first && made.contains(&list[0]["id"]),
        "{list:?}"
    );
    one_snapshot_is_left(&world).await;

    // One that is being made has the name when another one ends.
    world.host.hold(Call::CreateSnapshot);
    let overwriting = world.post(
        "/v1/snapshots?overwrite=true&wait=20",
        json!({"sandbox_id": one, "name": "mine"}),
    );
    let meanwhile = async {
        world.host.wait_arrived(Call::CreateSnapshot, 4).await;
        // Not a snapshot: the monitor would give up one that no sandbox makes.
        let building = "UPDATE templates SET status = 'building', kind = 'base' WHERE name = 'mine'";
        world
            .database()
            .await
            .execute_unprepared(building)
            .await
            .expect("changed");
        world.host.release(Call::CreateSnapshot);
    };
    let ((status, body), ()) = tokio::join!(overwriting, meanwhile);
    assert_eq!((status, code(&body)), (409, "conflict"), "{body}");
    assert_eq!(world.settled(&one).await, "running");
    one_snapshot_is_left(&world).await;
}

#[tokio::test]
async fn a_snapshot_that_fails_or_takes_long_leaves_order() {
    let world = World::new().await;
    let sandbox = world.sandbox().await;
    world.host.fail(
        Call::CreateSnapshot,
        ConnectError::resource_exhausted("the disk is full"),
    );
    let (status, body) = world
        .post("/v1/snapshots", json!({"sandbox_id": sandbox, "name": "s"}))
        .await;
    assert_eq!((status, code(&body)), (503, "no_capacity"), "{body}");
    assert_eq!(world.settled(&sandbox).await, "running");
    assert_eq!(world.get("/v1/snapshots?type=snapshot").await.1, json!([]));

    world.host.hold(Call::CreateSnapshot);
    let (status, body) = world
        .post(
            "/v1/snapshots?wait=0",
            json!({"sandbox_id": sandbox, "name": "s"}),
        )
        .await;
    assert_eq!((status, &body["status"]), (202, &json!("building")), "{body}");
    let (_, body) = world.get(&format!("/v1/sandboxes/{sandbox}")).await;
    assert_eq!(body["status"], "snapshotting");
    let (status, body) = world.post("/v1/sandboxes", json!({"template": "s"})).await;
    assert_eq!((status, code(&body)), (409, "invalid_state"), "{body}");
    // Cut off in the middle, it goes on after a restart.
    let world = world.restart().await;
    world.host.release(Call::CreateSnapshot);
    assert_eq!(world.settled(&sandbox).await, "running");
    let (_, list) = world.get("/v1/snapshots?type=snapshot").await;
    assert_eq!(
        (&list[0]["name"], &list[0]["status"]),
        (&json!("s"), &json!("ready")),
        "{list}"
    );
}

#[tokio::test]
async fn aliases_are_data() {
    let world = World::new().await;
    assert_eq!(
        world.post("/v1/sandboxes", json!({"template": "base"})).await.0,
        404
    );
    world
        .running
        .control
        .set_template_alias("base", "minimal")
        .await
        .expect("an alias");
    let (status, body) = world
        .post("/v1/sandboxes?wait=20", json!({"template": "base"}))
        .await;
    assert_eq!((status, &body["template"]), (201, &json!("minimal")), "{body}");
}

#[tokio::test]
async fn metrics_and_documents_are_served() {
    let world = World::new().await;
    let sandbox = world.sandbox().await;
    let at = wrenn_control::domain::now();
    let sample = wrenn_proto::hostagent::MetricsPoint {
        timestamp_ms: at,
        cpu_pct: f64::NAN,
        mem_bytes: 1,
        disk_bytes: 2,
        ..Default::default()
    };
    world.host.with(|model| {
        let sandbox = model.sandboxes.get_mut(&common::id(&sandbox)).expect("a sandbox");
        sandbox.samples.push(sample);
    });
    let (status, body) = world
        .get(&format!("/v1/sandboxes/{sandbox}/metrics?range=1h"))
        .await;
    assert_eq!((status, &body["range"]), (200, &json!("1h")), "{body}");
    assert_eq!(
        body["points"],
        json!([{"timestamp_unix": at / 15_000 * 15, "cpu_pct": 0.0, "mem_bytes": 1, "disk_bytes": 2}])
    );
    assert_eq!(
        world
            .get(&format!("/v1/sandboxes/{sandbox}/metrics?range=1y"))
            .await
            .0,
        400
    );
    assert_eq!(world.get("/health").await.1["status"], "ok");
    for (path, part) in [
        ("/metrics", "wrenn_sandboxes{status=\"running\"} 1"),
        ("/openapi.yaml", "openapi: 3.1"),
        ("/docs/", "swagger"),
        ("/docs/swagger-initializer.js", "/openapi.json"),
        ("/test", "<html"),
    ] {
        let response = world.http.get(world.url(path)).send().await.expect("an answer");
        assert_eq!(response.status(), 200, "{path}");
        let text = response.text().await.expect("text");
        assert!(
            text.contains(part),
            "{path}: {}",
            text.chars().take(300).collect::<String>()
        );
    }
    // What is served is the document as it is generated and committed.
    for (path, document) in [
        ("/openapi.yaml", wrenn_control::openapi_yaml()),
        ("/openapi.json", wrenn_control::openapi_json()),
    ] {
        let response = world.http.get(world.url(path)).send().await.expect("an answer");
        let text = response.text().await.expect("text");
        assert!(
            text == document.expect("a document"),
            "{path} is another document"
        );
    }
}

#[tokio::test]
async fn hosts_register_once_and_rotate_their_tokens() {
    let world = World::new().await;
    let token = world
        .running
        .control
        .issue_host_token(None)
        .await
        .expect("a token")
        .token;
    let register = |token: &str, address: &str| {
        let body = json!({"token": token, "arch": "x86_64", "cpu_cores": 1, "memory_mb": 1, "disk_gb": 1, "address": address});
        world.http.post(world.url("/v1/hosts/register")).json(&body)
    };
    for address in ["ftp://a:1", "http://a", "http://a:1/x", "nonsense", ""] {
        assert_eq!(answer(register(&token, address)).await.0, 400, "{address}");
    }
    assert_eq!(answer(register("wrong", "http://127.0.0.1:9")).await.0, 401);
    let (status, tokens) = answer(register(&token, "http://127.0.0.1:9")).await;
    assert_eq!(status, 201, "{tokens}");
    assert_eq!(
        answer(register(&token, "http://127.0.0.1:9")).await.0,
        401,
        "used up"
    );

    let host = tokens["host_id"].as_str().expect("an id").to_owned();
    let beat = |token: &Value, host: &str| {
        let url = world.url(&format!("/v1/hosts/{host}/heartbeat"));
        world
            .http
            .post(url)
            .bearer_auth(token.as_str().unwrap_or_default())
            .json(&json!({}))
    };
    assert_eq!(answer(beat(&tokens["token"], &host)).await.0, 204);
    assert_eq!(
        answer(beat(&tokens["token"], &world.host.tokens().host_id))
            .await
            .0,
        404,
        "another host's"
    );
    let refresh = |token: &Value| {
        world
            .http
            .post(world.url("/v1/hosts/auth/refresh"))
            .json(&json!({"refresh_token": token}))
    };
    let (status, fresh) = answer(refresh(&tokens["refresh_token"])).await;
    assert_eq!(status, 200, "{fresh}");
    // The answer may have been lost: until the new pair is used, the old one counts, and brings another.
    assert_eq!(answer(beat(&tokens["token"], &host)).await.0, 204);
    let (status, again) = answer(refresh(&tokens["refresh_token"])).await;
    assert_eq!(status, 200, "{again}");
    assert_eq!(
        answer(refresh(&fresh["refresh_token"])).await.0,
        401,
        "the pair that was lost is nobody's"
    );
    assert_eq!(answer(beat(&fresh["token"], &host)).await.0, 401);
    assert_eq!(answer(beat(&tokens["token"], &host)).await.0, 204);
    assert_eq!(answer(beat(&again["token"], &host)).await.0, 204);
    // Now it is used, and what was before it ends.
    assert_eq!(answer(beat(&tokens["token"], &host)).await.0, 401);
    assert_eq!(answer(refresh(&tokens["refresh_token"])).await.0, 401);
    // A refresh token proves the arrival of its pair as well.
    let (_, third) = answer(refresh(&again["refresh_token"])).await;
    let (status, fourth) = answer(refresh(&third["refresh_token"])).await;
    assert_eq!(status, 200, "{fourth}");
    assert_eq!(answer(refresh(&again["refresh_token"])).await.0, 401);
    assert_eq!(answer(beat(&again["token"], &host)).await.0, 401);
    // Nothing is for ever: when the grace is over, the old one is, too.
    world
        .database()
        .await
        .execute_unprepared(
            "UPDATE host_refresh_tokens SET superseded_at = 1 WHERE superseded_at IS NOT NULL",
        )
        .await
        .expect("changed");
    assert_eq!(answer(refresh(&third["refresh_token"])).await.0, 401);
    // Whoever registers as this host takes it over from all who did before.
    let token = world
        .running
        .control
        .issue_host_token(Some(host.parse().expect("an id")))
        .await
        .expect("a token")
        .token;
    let (status, anew) = answer(register(&token, "http://127.0.0.1:9")).await;
    assert_eq!((status, anew["host_id"].as_str()), (201, Some(host.as_str())));
    assert_eq!(answer(refresh(&fourth["refresh_token"])).await.0, 401);
    for old in [&third, &fourth] {
        assert_eq!(answer(beat(&old["token"], &host)).await.0, 401);
    }
    assert_eq!(answer(beat(&anew["token"], &host)).await.0, 204);
}

#[tokio::test]
async fn the_first_start_is_only_the_first() {
    let world = World::new().await;
    assert!(
        world
            .running
            .control
            .bootstrap()
            .await
            .expect("no failure")
            .is_none()
    );
    assert!(world.key.starts_with("wrn_") && world.key.len() == 44);
    let world = world.restart().await;
    assert!(
        world
            .running
            .control
            .bootstrap()
            .await
            .expect("no failure")
            .is_none()
    );
    assert_eq!(
        world.get("/v1/sandboxes").await.0,
        200,
        "the key outlives a restart"
    );
}

/// A connection on which everything is said by hand.
struct Raw(tokio::net::TcpStream);

impl Raw {
    async fn open(world: &World, said: &str) -> Self {
        use tokio::io::AsyncWriteExt as _;
        let address = world.running.url.strip_prefix("http://").expect("an address");
        let mut stream = tokio::net::TcpStream::connect(address)
            .await
            .expect("a connection");
        stream.write_all(said.as_bytes()).await.expect("written");
        Self(stream)
    }

    async fn say(&mut self, said: &str) {
        use tokio::io::AsyncWriteExt as _;
        self.0.write_all(said.as_bytes()).await.expect("written");
    }

    /// The next answer, or nothing when the connection was closed.
    async fn hear(&mut self) -> String {
        use tokio::io::AsyncReadExt as _;
        let mut buffer = [0; 4096];
        let count = tokio::time::timeout(DEADLINE, self.0.read(&mut buffer))
            .await
            .expect("neither an answer nor an end")
            .unwrap_or_default();
        String::from_utf8_lossy(&buffer[..count]).into_owned()
    }
}

const HEALTH: &str = "GET /health HTTP/1.1\r\nhost: wrenn\r\n\r\n";

#[tokio::test]
async fn a_connection_that_asks_for_nothing_is_closed() {
    let world = World::new()
        .await
        .restart_with(|config| config.timings.connection_idle = Duration::from_millis(300))
        .await;
    world.host.hold(Call::Create);
    let waiting = world.post("/v1/sandboxes?wait=20", json!({}));
    let meanwhile = async {
        world.host.wait_arrived(Call::Create, 1).await;
        for half in ["", "GET /health HTTP/1.1\r\nhost: wr", "PRI * HTTP/2.0\r\n"] {
            let mut raw = Raw::open(&world, half).await;
            let heard = raw.hear().await;
            assert!(heard.is_empty() || heard.contains(" 408 "), "{half:?}: {heard}");
        }
        let mut kept = Raw::open(&world, HEALTH).await;
        assert!(kept.hear().await.starts_with("HTTP/1.1 200"));
        assert_eq!(kept.hear().await, "", "after a rest");
        world.host.release(Call::Create);
    };
    let ((status, body), ()) = tokio::join!(waiting, meanwhile);
    // This took longer, and something was under way.
    assert_eq!(
        (status, body["status"].as_str()),
        (201, Some("running")),
        "{body}"
    );
    world.running.stop().await;
}

#[tokio::test]
async fn connections_beyond_the_limit_wait() {
    let world = World::new()
        .await
        .restart_with(|config| config.limits.max_connections = 2)
        .await;
    let mut first = Raw::open(&world, HEALTH).await;
    let mut second = Raw::open(&world, HEALTH).await;
    assert!(first.hear().await.starts_with("HTTP/1.1 200"));
    assert!(second.hear().await.starts_with("HTTP/1.1 200"));
    let mut third = Raw::open(&world, HEALTH).await;
    for _ in 0..20 {
        first.say(HEALTH).await;
        assert!(first.hear().await.starts_with("HTTP/1.1 200"));
    }
    let early = third.0.try_read(&mut [0; 16]);
    assert!(early.is_err(), "{early:?}");
    drop(second);
    assert!(third.hear().await.starts_with("HTTP/1.1 200"));
    world.running.stop().await;
}
