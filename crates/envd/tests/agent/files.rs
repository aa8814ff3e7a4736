//! `/files`: up and down.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use bytes::Bytes;
use reqwest::multipart::{Form, Part};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::harness::{Agent, current_user, text};

const TOKEN: &str = "0tQG31xiMp0IOQfaz9dcwi72L1CPo8e0";
const SIGNATURE: &str = "v1_gUtH/s9YCJWgCizjfUxuWfhFE4QSydOWEIIvfLwDr6E";

async fn download(agent: &Agent, path: &str) -> (u16, Vec<u8>) {
    let answer = agent
        .get("/files")
        .query(&[("path", path)])
        .send()
        .await
        .expect("an answer");
    (
        answer.status().as_u16(),
        answer.bytes().await.expect("a body").to_vec(),
    )
}

async fn upload(agent: &Agent, path: &str, body: impl Into<reqwest::Body>) -> (u16, Value) {
    let request = agent
        .post("/files")
        .query(&[("path", path)])
        .header("Content-Type", "application/octet-stream");
    let answer = request.body(body).send().await.expect("an answer");
    (answer.status().as_u16(), answer.json().await.expect("JSON"))
}

#[tokio::test]
async fn a_file_comes_back_as_it_went() {
    let agent = Agent::start().await;
    for content in [&b""[..], b"hello", &[0xff; 300_000]] {
        let (status, answer) = upload(&agent, "deep/er/file", Bytes::copy_from_slice(content)).await;
        let path = text(&agent.path("deep/er/file"));
        assert_eq!(
            (status, answer),
            (200, json!([{ "name": "file", "path": path, "type": "file" }]))
        );
        assert_eq!(download(&agent, "deep/er/file").await, (200, content.to_vec()));
    }
    let found = fs::metadata(agent.path("deep/er/file")).expect("it is there");
    assert_eq!(found.mode() & 0o777, 0o644);
    assert_eq!(
        fs::metadata(agent.path("deep")).expect("it is there").mode() & 0o777,
        0o755
    );
}

#[tokio::test]
async fn a_hundred_megabytes_keep_their_hash() {
    let agent = Agent::start().await;
    let pieces: Vec<Bytes> = (0..100u8).map(|i| Bytes::from(vec![i ^ 0x5a; 1 << 20])).collect();
    let mut hash = Sha256::new();
    pieces.iter().for_each(|piece| hash.update(piece));
    let expected = hash.finalize();
    let body = reqwest::Body::wrap_stream(futures::stream::iter(pieces.into_iter().map(std::io::Result::Ok)));
    let (status, _) = upload(&agent, "big", body).await;
    assert_eq!(status, 200);
    let mut answer = agent.get("/files?path=big").send().await.expect("an answer");
    assert_eq!(answer.content_length(), Some(100 << 20));
    let mut hash = Sha256::new();
    while let Some(chunk) = answer.chunk().await.expect("the stream is not cut") {
        hash.update(&chunk);
    }
    assert_eq!(hash.finalize(), expected);
    let status = fs::read_to_string(format!("/proc/{}/status", agent.pid())).expect("the agent runs");
    let peak = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .expect("a size");
    let peak: u64 = peak
        .split_ascii_whitespace()
        .next()
        .and_then(|n| n.parse().ok())
        .expect("a number");
    assert!(
        peak < 64 * 1024,
        "the agent took {peak} KiB, so it held the file in memory"
    );
}

#[tokio::test]
async fn multipart_uploads_name_their_files_in_three_ways() {
    let agent = Agent::start().await;
    let send = async |path: &str, form: Form| {
        let answer = agent
            .post(&format!("/files{path}"))
            .multipart(form)
            .send()
            .await
            .expect("an answer");
        (
            answer.status().as_u16(),
            answer.json::<Value>().await.expect("JSON"),
        )
    };
    let form = Form::new()
        .part("file", Part::text("one").file_name("a/1"))
        .text("other", "ignored")
        .part("file", Part::text("two").file_name(text(&agent.path("b/2"))));
    let (status, answer) = send("", form).await;
    assert_eq!(status, 200);
    assert_eq!(answer[0]["path"], text(&agent.path("a/1")));
    assert_eq!(answer[1]["path"], text(&agent.path("b/2")));
    assert_eq!(fs::read_to_string(agent.path("b/2")).expect("written"), "two");
    // The query wins, and a part may have no file name.
    let (status, answer) = send(
        "?path=c",
        Form::new().part("file", Part::text("three").file_name("elsewhere")),
    )
    .await;
    assert_eq!((status, answer[0]["name"].as_str()), (200, Some("c")));
    let (status, _) = send("?path=d", Form::new().part("file", Part::text("four"))).await;
    assert_eq!(status, 200);
    assert_eq!(fs::read_to_string(agent.path("d")).expect("written"), "four");

    let (status, _) = send("", Form::new().part("file", Part::text("nameless"))).await;
    assert_eq!(status, 400);
    let (status, _) = send("?path=e", Form::new().text("other", "x")).await;
    assert_eq!(status, 400);
    let twice = Form::new()
        .part("file", Part::text("1"))
        .part("file", Part::text("2"));
    let (status, _) = send("?path=f", twice).await;
    assert_eq!(status, 400);
    assert_eq!(
        fs::read_to_string(agent.path("f")).expect("the first one is written"),
        "1"
    );
}

#[tokio::test]
async fn compressed_bodies_are_unpacked() {
    let agent = Agent::start().await;
    let mut gzip = std::process::Command::new("gzip")
        .arg("-c")
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("gzip runs");
    gzip.stdin
        .take()
        .expect("a pipe")
        .write_all(b"packed")
        .expect("written");
    let packed = gzip.wait_with_output().expect("gzip ends").stdout;
    let request = agent
        .post("/files?path=unpacked")
        .header("Content-Type", "application/octet-stream")
        .header("Content-Encoding", "gzip")
        .body(packed);
    assert_eq!(request.send().await.expect("an answer").status(), 200);
    assert_eq!(
        fs::read_to_string(agent.path("unpacked")).expect("written"),
        "packed"
    );
    let request = agent
        .post("/files?path=broken")
        .header("Content-Type", "application/octet-stream")
        .header("Content-Encoding", "gzip")
        .body("this is no gzip");
    assert_eq!(request.send().await.expect("an answer").status(), 400);
    assert!(!agent.path("broken").exists(), "half a new file is no file");
}

#[tokio::test]
async fn files_that_claim_to_be_empty_are_read() {
    let agent = Agent::start().await;
    let (status, body) = download(&agent, "/proc/self/status").await;
    assert_eq!(status, 200);
    assert!(String::from_utf8_lossy(&body).contains("Name:\tenvd"));
}

#[tokio::test]
async fn what_cannot_be_read_or_written() {
    let agent = Agent::start().await;
    fs::create_dir(agent.path("dir")).expect("created");
    fs::write(agent.path("file"), "x").expect("written");
    let fifo = agent.path("fifo");
    assert!(
        std::process::Command::new("mkfifo")
            .arg(&fifo)
            .status()
            .expect("mkfifo runs")
            .success()
    );
    for (path, status) in [
        ("dir", 400),
        ("fifo", 400),
        ("/dev/null", 400),
        ("none", 404),
        ("", 400),
        ("a\0b", 400),
    ] {
        let (found, body) = download(&agent, path).await;
        let body: Value = serde_json::from_slice(&body).expect("JSON");
        assert_eq!(
            (found, body["code"].as_u64()),
            (status, Some(u64::from(status))),
            "{path:?}"
        );
        assert!(body["message"].is_string());
    }
    for path in ["dir", "fifo", "file/below", "", "a\0b"] {
        assert_eq!(upload(&agent, path, "x").await.0, 400, "{path:?}");
    }
    let answer = agent
        .post("/files?path=x")
        .header("Content-Type", "text/plain")
        .body("x")
        .send()
        .await;
    assert_eq!(answer.expect("an answer").status(), 415);
    for encodings in ["identity;q=0", "gzip, *;q=0"] {
        let answer = agent
            .get("/files?path=file")
            .header("Accept-Encoding", encodings)
            .send()
            .await;
        assert_eq!(answer.expect("an answer").status(), 406);
    }
    let answer = agent
        .get("/files?path=file&username=no-such-user")
        .send()
        .await
        .expect("an answer");
    assert_eq!(answer.status(), 401);
}

#[tokio::test]
async fn a_full_disk_is_reported_as_such() {
    let Some(agent) = Agent::start_with_small_disk().await else {
        eprintln!("skipped: mounting is not permitted here");
        return;
    };
    // With its length known, the file is refused at once; without, when the disk is full.
    let pieces = || (0..64).map(|_| std::io::Result::Ok(Bytes::from(vec![1u8; 64 << 10])));
    let unknown = reqwest::Body::wrap_stream(futures::stream::iter(pieces()));
    for body in [vec![1u8; 4 << 20].into(), unknown] {
        let (status, answer) = upload(&agent, "small/file", body).await;
        assert_eq!((status, answer["code"].as_u64()), (507, Some(507)), "{answer}");
    }
    assert_eq!(
        download(&agent, "small/file").await.0,
        404,
        "the half-written file is gone"
    );
    assert_eq!(upload(&agent, "small/file", "fits").await.0, 200);
}

#[tokio::test]
async fn metadata_is_replaced_as_a_set() {
    let agent = Agent::start().await;
    let send = async |headers: &[(&str, &str)]| {
        let mut request = agent
            .post("/files?path=f")
            .header("Content-Type", "application/octet-stream")
            .body("x");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let answer = request.send().await.expect("an answer");
        (
            answer.status().as_u16(),
            answer.json::<Value>().await.expect("JSON"),
        )
    };
    let stat = async || {
        let answer = agent
            .ok("filesystem.Filesystem/Stat", json!({ "path": "f" }))
            .await;
        answer["entry"].get("metadata").cloned()
    };
    let (status, answer) = send(&[("X-Metadata-Author", "me"), ("X-Metadata-b", "2")]).await;
    if status != 200 {
        eprintln!("skipped: no extended attributes on this file system: {answer}");
        return;
    }
    assert_eq!(answer[0]["metadata"], json!({ "author": "me", "b": "2" }));
    assert_eq!(stat().await, Some(json!({ "author": "me", "b": "2" })));
    send(&[("X-Metadata-b", "3")]).await;
    assert_eq!(stat().await, Some(json!({ "b": "3" })));
    let (_, answer) = send(&[]).await;
    assert_eq!(answer[0].get("metadata"), None);
    assert_eq!(stat().await, None);
}

#[tokio::test]
async fn metadata_that_cannot_be_set_leaves_everything_as_it_was() {
    let agent = Agent::start().await;
    // No file system takes an attribute of more than 64 KiB.
    let long = "x".repeat(70_000);
    let send = async |path: &str, headers: &[(&str, &str)]| {
        let mut request = agent
            .post(&format!("/files?path={path}"))
            .header("Content-Type", "application/octet-stream")
            .body("new");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.send().await.expect("an answer").status().as_u16()
    };
    let refused = [("X-Metadata-a", "9"), ("X-Metadata-z", long.as_str())];
    assert_eq!(send("made/fresh", &refused).await, 400);
    assert!(!agent.path("made/fresh").exists(), "half a file is left");
    if send("f", &[("X-Metadata-a", "1"), ("X-Metadata-b", "2")]).await != 200 {
        eprintln!("skipped: no extended attributes on this file system");
        return;
    }
    fs::write(agent.path("f"), "what was there").expect("written");
    assert_eq!(send("f", &refused).await, 400);
    assert_eq!(
        fs::read_to_string(agent.path("f")).expect("readable"),
        "what was there"
    );
    let answer = agent
        .ok("filesystem.Filesystem/Stat", json!({ "path": "f" }))
        .await;
    assert_eq!(answer["entry"]["metadata"], json!({ "a": "1", "b": "2" }));
    assert_eq!(send("f", &[("X-Metadata-a", "3")]).await, 200);
    assert_eq!(fs::read_to_string(agent.path("f")).expect("readable"), "new");
}

#[tokio::test]
async fn an_existing_file_keeps_its_mode() {
    let agent = Agent::start().await;
    fs::write(agent.path("script"), "a longer content than the new one").expect("written");
    fs::set_permissions(agent.path("script"), fs::Permissions::from_mode(0o755)).expect("changed");
    assert_eq!(upload(&agent, "script", "short").await.0, 200);
    assert_eq!(
        fs::read_to_string(agent.path("script")).expect("readable"),
        "short"
    );
    assert_eq!(
        fs::metadata(agent.path("script")).expect("it is there").mode() & 0o777,
        0o755
    );
}

#[tokio::test]
async fn an_upload_that_breaks_off_leaves_no_new_file() {
    let agent = Agent::start().await;
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", agent.port)).expect("connected");
    let head = "POST /files?path=partial HTTP/1.1\r\nHost: x\r\nContent-Type: application/octet-stream\r\nContent-Length: 1000000\r\n\r\n";
    stream
        .write_all(head.as_bytes())
        .and_then(|()| stream.write_all(&[1; 400_000]))
        .expect("sent");
    crate::harness::until("the file is begun", async || {
        agent.path("partial").exists().then_some(())
    })
    .await;
    drop(stream);
    crate::harness::until("the file is gone", async || {
        (!agent.path("partial").exists()).then_some(())
    })
    .await;
}

#[tokio::test]
async fn signatures_open_files_without_the_token() {
    let mut agent = Agent::start().await;
    fs::write(agent.path("hello.txt"), "signed").expect("written");
    let set = json!({ "accessToken": TOKEN });
    assert_eq!(
        agent
            .post("/init")
            .json(&set)
            .send()
            .await
            .expect("an answer")
            .status(),
        204
    );
    let get = async |query: &[(&str, &str)]| {
        let answer = agent.get("/files").query(query).send().await.expect("an answer");
        (
            answer.status().as_u16(),
            answer.bytes().await.expect("a body").to_vec(),
        )
    };
    assert_eq!(get(&[("path", "hello.txt")]).await.0, 401);
    // The published example names the user `user`, which this machine need not have: what matters is that it
    // gets past the signature.
    let vector = [
        ("path", "hello.txt"),
        ("username", "user"),
        ("signature", SIGNATURE),
    ];
    let (status, body) = get(&vector).await;
    assert!(status != 401 || String::from_utf8_lossy(&body).contains("invalid username"));
    let wrong = [
        ("path", "other.txt"),
        ("username", "user"),
        ("signature", SIGNATURE),
    ];
    let (status, body) = get(&wrong).await;
    assert_eq!(
        (status, &body[..]),
        (401, &br#"{"code":401,"message":"invalid signature"}"#[..])
    );

    let user = current_user();
    let sign = |operation: &str, expiry: u64| {
        use base64::Engine as _;
        let hash = Sha256::digest(format!("hello.txt:{operation}:{user}:{TOKEN}:{expiry}"));
        format!(
            "v1_{}",
            base64::engine::general_purpose::STANDARD_NO_PAD.encode(hash)
        )
    };
    let query = |signature: &str, expiry: &str| {
        [
            ("path", "hello.txt"),
            ("username", user.as_str()),
            ("signature", signature),
            ("signature_expiration", expiry),
        ]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
    };
    let get = async |query: &[(String, String)]| {
        let answer = agent.get("/files").query(query).send().await.expect("an answer");
        (
            answer.status().as_u16(),
            answer.bytes().await.expect("a body").to_vec(),
        )
    };
    let future = 99_999_999_999;
    let valid = query(&sign("read", future), "99999999999");
    assert_eq!(get(&valid).await, (200, b"signed".to_vec()));
    let expired = query(&sign("read", 1), "1");
    let body = br#"{"code":401,"message":"signature is already expired"}"#;
    assert_eq!(get(&expired).await, (401, body.to_vec()));
    let for_writing = query(&sign("write", future), "99999999999");
    assert_eq!(get(&for_writing).await.0, 401);

    let put = agent
        .post("/files")
        .query(&for_writing)
        .multipart(Form::new().part("file", Part::text("new")));
    assert_eq!(put.send().await.expect("an answer").status(), 200);
    assert_eq!(
        fs::read_to_string(agent.path("hello.txt")).expect("readable"),
        "new"
    );
    let put = agent
        .post("/files")
        .query(&valid)
        .multipart(Form::new().part("file", Part::text("x")));
    assert_eq!(put.send().await.expect("an answer").status(), 401);
    agent.token = Some(TOKEN.into());
    assert_eq!(download(&agent, "hello.txt").await.0, 200);
}
