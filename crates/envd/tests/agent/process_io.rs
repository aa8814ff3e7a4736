//! Standard input, terminals and back-pressure.

use std::io::Write;
use std::net::TcpStream;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use crate::harness::{Agent, bash, by_pid, envelope, until};

fn stdin(pid: u64, data: impl AsRef<[u8]>) -> Value {
    json!({ "process": by_pid(pid), "input": { "stdin": STANDARD.encode(data) } })
}

fn keys(pid: u64, data: &str) -> Value {
    json!({ "process": by_pid(pid), "input": { "pty": STANDARD.encode(data) } })
}

#[tokio::test]
async fn input_reaches_the_process_until_it_is_closed() {
    let agent = Agent::start().await;
    let mut stream = agent
        .start_process(json!({ "process": { "cmd": "cat" } }), &[])
        .await;
    let pid = stream.pid().await;
    agent
        .ok("process.Process/SendInput", stdin(pid, b"\xff one\n"))
        .await;
    assert_eq!(
        stream.output_until("the echo", |out| out.len() >= 6).await,
        b"\xff one\n"
    );
    agent.ok("process.Process/SendInput", stdin(pid, "two")).await;
    agent
        .ok("process.Process/CloseStdin", json!({ "process": by_pid(pid) }))
        .await;
    let outcome = stream.finish().await;
    assert_eq!((outcome.stdout(), outcome.exit_code()), ("two", 0));
    assert_eq!(
        agent.error("process.Process/SendInput", stdin(pid, "late")).await,
        "not_found"
    );
}

#[tokio::test]
async fn without_input_a_process_reads_the_end_at_once() {
    let agent = Agent::start().await;
    let request = json!({ "process": { "cmd": "cat" }, "stdin": false });
    assert_eq!(
        agent.start_process(request, &[]).await.finish().await.exit_code(),
        0
    );
    let mut stream = agent.shell("sleep 600").await;
    let pid = stream.pid().await;
    assert_eq!(
        agent.error("process.Process/SendInput", stdin(pid, "x")).await,
        "failed_precondition"
    );
    assert_eq!(
        agent.error("process.Process/SendInput", keys(pid, "x")).await,
        "failed_precondition"
    );
    let no_input = json!({ "process": by_pid(pid) });
    assert_eq!(
        agent.error("process.Process/SendInput", no_input).await,
        "invalid_argument"
    );
}

#[tokio::test]
async fn input_larger_than_a_pipe_arrives_whole() {
    let agent = Agent::start().await;
    let mut stream = agent
        .start_process(json!({ "process": { "cmd": "sha256sum" } }), &[])
        .await;
    let pid = stream.pid().await;
    let data: Vec<u8> = (0..3_000_000u32).map(|i| (i % 251) as u8).collect();
    agent.ok("process.Process/SendInput", stdin(pid, &data)).await;
    agent
        .ok("process.Process/CloseStdin", json!({ "process": by_pid(pid) }))
        .await;
    let hash = <sha2::Sha256 as sha2::Digest>::digest(&data);
    let hash: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
    assert!(stream.finish().await.stdout().starts_with(&hash));
}

#[tokio::test]
async fn input_that_nobody_reads_waits_only_as_long_as_the_process_lives() {
    let agent = Agent::start().await;
    let mut stream = agent
        .start_process(json!({ "process": bash("sleep 1") }), &[])
        .await;
    let pid = stream.pid().await;
    let code = agent
        .error("process.Process/SendInput", stdin(pid, vec![0; 1_000_000]))
        .await;
    assert!(code == "not_found" || code == "failed_precondition", "{code}");
    assert_eq!(stream.finish().await.exit_code(), 0);
}

#[tokio::test]
async fn input_can_be_streamed() {
    let agent = Agent::start().await;
    let mut stream = agent
        .start_process(json!({ "process": { "cmd": "cat" }, "tag": "cat" }), &[])
        .await;
    let pid = stream.pid().await;
    let data = |text: &str| json!({ "data": { "input": { "stdin": STANDARD.encode(text) } } });
    let mut body = envelope(&json!({ "start": { "process": { "tag": "cat" } } }));
    for message in [json!({ "keepalive": {} }), data("one "), data("two")] {
        body.extend(envelope(&message));
    }
    let send = |body: Vec<u8>| {
        agent
            .post("/process.Process/StreamInput")
            .header("Content-Type", "application/connect+json")
            .header("Connect-Protocol-Version", "1")
            .body(body)
            .send()
    };
    let answer = send(body).await.expect("an answer");
    assert_eq!(answer.status(), 200);
    let answer = answer.bytes().await.expect("a body");
    assert_eq!(&answer[..7], b"\0\0\0\0\x02{}", "an empty message, then the end");
    assert_eq!(
        stream.output_until("all of it", |out| out.len() >= 7).await,
        b"one two"
    );

    let answer = send(envelope(&data("no start")))
        .await
        .expect("an answer")
        .bytes()
        .await
        .expect("a body");
    assert!(String::from_utf8_lossy(&answer).contains("invalid_argument"));
    agent
        .ok("process.Process/CloseStdin", json!({ "process": by_pid(pid) }))
        .await;
    assert_eq!(stream.finish().await.exit_code(), 0);
}

#[tokio::test]
async fn a_terminal_echoes_resizes_and_hangs_up() {
    let agent = Agent::start().await;
    let process = json!({ "cmd": "/bin/bash", "args": ["--norc", "-i"], "envs": { "PS1": "> " } });
    let request = json!({ "process": process, "pty": { "size": { "cols": 80, "rows": 24 } } });
    let mut stream = agent.start_process(request, &[]).await;
    let pid = stream.pid().await;
    agent
        .ok(
            "process.Process/SendInput",
            keys(pid, "stty size; tty; echo $TERM\n"),
        )
        .await;
    let contains = |needle: &'static str| move |out: &[u8]| String::from_utf8_lossy(out).contains(needle);
    let output = stream
        .output_until("the terminal's type", contains("\r\nxterm-256color\r\n"))
        .await;
    let output = String::from_utf8_lossy(&output).into_owned();
    assert!(
        output.contains("24 80\r\n") && output.contains("/dev/pts/"),
        "{output:?}"
    );

    let resize = json!({ "process": by_pid(pid), "pty": { "size": { "cols": 100, "rows": 40 } } });
    agent.ok("process.Process/Update", resize).await;
    agent
        .ok("process.Process/SendInput", keys(pid, "stty size\n"))
        .await;
    stream.output_until("the new size", contains("40 100\r\n")).await;

    assert_eq!(
        agent.error("process.Process/SendInput", stdin(pid, "x")).await,
        "failed_precondition"
    );
    let close = json!({ "process": by_pid(pid) });
    assert_eq!(
        agent.error("process.Process/CloseStdin", close).await,
        "failed_precondition"
    );
    for size in [
        json!({ "cols": 0, "rows": 1 }),
        json!({ "cols": 70000, "rows": 1 }),
    ] {
        let bad = json!({ "process": by_pid(pid), "pty": { "size": size } });
        assert_eq!(
            agent.error("process.Process/Update", bad).await,
            "invalid_argument"
        );
    }
    agent.ok("process.Process/SendInput", keys(pid, "exit 9\n")).await;
    assert_eq!(stream.finish().await.exit_code(), 9);
}

#[tokio::test]
async fn killing_a_terminal_s_shell_ends_its_jobs() {
    let agent = Agent::start().await;
    let process = json!({ "cmd": "/bin/bash", "args": ["--norc", "-i"] });
    let request = json!({ "process": process, "pty": { "size": { "cols": 80, "rows": 24 } } });
    let mut stream = agent.start_process(request, &[]).await;
    let pid = stream.pid().await;
    agent
        .ok(
            "process.Process/SendInput",
            keys(pid, "nohup sleep 600 & echo job-$!-\n"),
        )
        .await;
    let found = |out: &[u8]| {
        let text = String::from_utf8_lossy(out).into_owned();
        text.split("job-")
            .skip(1)
            .find_map(|rest| rest.split('-').next()?.parse::<u64>().ok())
    };
    let output = stream
        .output_until("the job's pid", |out| found(out).is_some())
        .await;
    let job = found(&output).expect("just seen");
    agent
        .ok(
            "process.Process/SendSignal",
            json!({ "process": by_pid(pid), "signal": "SIGNAL_SIGKILL" }),
        )
        .await;
    until("the job is gone", async || {
        (!crate::harness::is_alive(job)).then_some(())
    })
    .await;
    assert_eq!(stream.finish().await.exit_code(), -1);
}

/// Resident memory of a process, in bytes.
fn resident(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the process runs");
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .expect("a size");
    line.split_ascii_whitespace()
        .next()
        .and_then(|n| n.parse::<u64>().ok())
        .expect("a number")
        * 1024
}

#[tokio::test]
async fn ten_megabytes_of_output_arrive_whole() {
    let agent = Agent::start().await;
    let outcome = agent
        .shell("yes 0123456789abcde | head -c 10000000; echo end >&2")
        .await
        .finish()
        .await;
    assert_eq!(outcome.stdout.len(), 10_000_000);
    assert!(outcome.stdout.chunks(16).all(|line| line == b"0123456789abcde\n"));
    assert_eq!(outcome.stderr, b"end\n");
    assert_eq!(outcome.exit_code(), 0);
}

#[tokio::test]
async fn a_client_that_does_not_read_stops_the_producer() {
    let agent = Agent::start().await;
    let before = resident(agent.pid());
    let counter = agent.path("written");
    // Writes for ever, and notes how many pieces of 64 KiB it got rid of.
    let script = format!(
        "i=0; while head -c 65536 /dev/zero; do i=$((i+1)); echo $i > {0}.new; mv {0}.new {0}; done",
        counter.display()
    );
    let body = envelope(&json!({ "process": bash(&script), "stdin": false, "tag": "flood" }));
    let mut silent = TcpStream::connect(("127.0.0.1", agent.port)).expect("connected");
    let head = format!(
        "POST /process.Process/Start HTTP/1.1\r\nHost: x\r\nContent-Type: application/connect+json\r\n\
         Connect-Protocol-Version: 1\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    silent
        .write_all(head.as_bytes())
        .and_then(|()| silent.write_all(&body))
        .expect("sent");

    let written = || {
        std::fs::read_to_string(&counter)
            .ok()
            .and_then(|text| text.trim().parse::<u64>().ok())
    };
    let mut last = (0, std::time::Instant::now());
    let stopped = until("the producer stands still", async || {
        let now = written().unwrap_or(0);
        if now != last.0 {
            last = (now, std::time::Instant::now());
        }
        (now > 0 && last.1.elapsed() > Duration::from_secs(1)).then_some(now)
    })
    .await;
    assert!(stopped * 65536 < 64 << 20, "{stopped} pieces went somewhere");
    let grown = resident(agent.pid()).saturating_sub(before);
    assert!(grown < 16 << 20, "the agent grew by {grown} bytes");
    // Others are served all the while.
    assert_eq!(agent.shell("echo fine").await.finish().await.stdout(), "fine\n");

    // With the client gone, the process goes on.
    drop(silent);
    until("the producer goes on", async || {
        (written() > Some(stopped + 100)).then_some(())
    })
    .await;
    let kill = json!({ "process": { "tag": "flood" }, "signal": "SIGNAL_SIGKILL" });
    agent.ok("process.Process/SendSignal", kill).await;
}
