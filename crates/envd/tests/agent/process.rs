//! Starting, listing, connecting to and ending processes.

use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::json;

use crate::harness::{Agent, bash, by_pid, current_user, is_alive, is_root, kill_group, until};

#[tokio::test]
async fn output_and_exit_code_are_reported() {
    let agent = Agent::start().await;
    let outcome = agent
        .shell("echo out; echo err >&2; printf '\\377\\000'; exit 3")
        .await
        .finish()
        .await;
    assert_eq!(outcome.stdout, b"out\n\xff\x00");
    assert_eq!(outcome.stderr, b"err\n");
    assert_eq!(outcome.exit_code(), 3);
    assert_eq!(outcome.end["exited"], true);
    assert_eq!(outcome.end["status"], "exit status 3");
    assert_eq!(outcome.error, None);

    let outcome = agent.shell("true").await.finish().await;
    assert_eq!(outcome.exit_code(), 0);
    assert_eq!(outcome.end.get("error"), None);
}

#[tokio::test]
async fn the_environment_is_the_sandbox_s_then_the_request_s() {
    let agent = Agent::start().await;
    let envs = json!({ "envVars": { "ONE": "sandbox", "TWO": "sandbox", "HOME": "/elsewhere" } });
    assert_eq!(
        agent
            .post("/init")
            .json(&envs)
            .send()
            .await
            .expect("init")
            .status(),
        204
    );
    let mut process =
        bash("echo $ONE $TWO $HOME; echo $USER $LOGNAME; pwd; umask; cat /proc/self/oom_score_adj");
    process["envs"] = json!({ "TWO": "request" });
    let outcome = agent
        .start_process(json!({ "process": process, "stdin": false }), &[])
        .await
        .finish()
        .await;
    let user = current_user();
    let dir = agent.dir.path().canonicalize().expect("the directory exists");
    let expected = format!(
        "sandbox request /elsewhere\n{user} {user}\n{}\n0022\n100\n",
        dir.display()
    );
    assert_eq!(outcome.stdout(), expected);
}

#[tokio::test]
async fn the_working_directory_must_exist() {
    let agent = Agent::start().await;
    std::fs::create_dir(agent.path("sub")).expect("created");
    std::fs::write(agent.path("file"), "").expect("written");
    let mut process = bash("basename $PWD");
    process["cwd"] = json!("sub");
    let outcome = agent
        .start_process(json!({ "process": process }), &[])
        .await
        .finish()
        .await;
    assert_eq!(outcome.stdout(), "sub\n");
    process["cwd"] = json!("/no/such/dir");
    let (code, message) = agent
        .start_process(json!({ "process": process }), &[])
        .await
        .error()
        .await;
    assert_eq!(
        (code.as_str(), message.as_str()),
        ("invalid_argument", "cwd '/no/such/dir' does not exist")
    );
    process["cwd"] = json!(agent.path("file"));
    let (code, _) = agent
        .start_process(json!({ "process": process }), &[])
        .await
        .error()
        .await;
    assert_eq!(code, "invalid_argument");
}

#[tokio::test]
async fn the_user_comes_from_the_authorization_header() {
    let agent = Agent::start().await;
    let basic = |user: &str| format!("Basic {}", STANDARD.encode(format!("{user}:")));
    let request = json!({ "process": bash("id -un; id -gn; echo $HOME; grep Groups /proc/self/status"), "stdin": false });
    let unknown = basic("no-such-user");
    let mut stream = agent
        .start_process(request.clone(), &[("Authorization", &unknown)])
        .await;
    let (code, message) = stream.error().await;
    assert_eq!(
        (code.as_str(), message.as_str()),
        ("unauthenticated", "invalid username: 'no-such-user'")
    );

    // Becoming somebody else takes root; everyone can become themselves.
    let user = if is_root() {
        "nobody".to_owned()
    } else {
        current_user()
    };
    let mut request = request;
    request["process"]["cwd"] = json!("/");
    let outcome = agent
        .start_process(request, &[("Authorization", &basic(&user))])
        .await
        .finish()
        .await;
    let lines: Vec<&str> = outcome.stdout().lines().collect();
    assert_eq!(lines[0], user);
    if is_root() {
        assert_eq!(lines[2], "/nonexistent");
        assert_eq!(
            lines[3].split_ascii_whitespace().collect::<Vec<_>>(),
            ["Groups:", "65534"]
        );
    }
}

#[tokio::test]
async fn a_program_that_does_not_start_is_the_caller_s_mistake() {
    let agent = Agent::start().await;
    std::fs::write(agent.path("plain"), "no program").expect("written");
    for cmd in [json!("no-such-program"), json!(agent.path("plain")), json!("")] {
        let (code, _) = agent
            .start_process(json!({ "process": { "cmd": cmd } }), &[])
            .await
            .error()
            .await;
        assert_eq!(code, "invalid_argument", "{cmd}");
    }
    let (code, _) = agent.start_process(json!({}), &[]).await.error().await;
    assert_eq!(code, "invalid_argument");
    let process = json!({ "cmd": "true", "envs": { "A=B": "c" } });
    let (code, _) = agent
        .start_process(json!({ "process": process }), &[])
        .await
        .error()
        .await;
    assert_eq!(code, "invalid_argument");
}

#[tokio::test]
async fn processes_are_listed_while_they_run() {
    let agent = Agent::start().await;
    let request = json!({ "process": bash("read line"), "tag": "reader" });
    let mut stream = agent.start_process(request, &[]).await;
    let pid = stream.pid().await;
    let list = agent.ok("process.Process/List", json!({})).await;
    let process = &list["processes"][0];
    assert_eq!(process["pid"], pid);
    assert_eq!(process["tag"], "reader");
    assert_eq!(process["config"]["args"], json!(["-c", "read line"]));
    agent
        .ok(
            "process.Process/CloseStdin",
            json!({ "process": { "tag": "reader" } }),
        )
        .await;
    assert_eq!(stream.finish().await.exit_code(), 1);
    assert_eq!(agent.ok("process.Process/List", json!({})).await, json!({}));
}

#[tokio::test]
async fn a_kill_takes_the_whole_session_and_is_answered_when_it_is_gone() {
    let agent = Agent::start().await;
    // An interactive shell gives each of its jobs a process group of its own.
    let script = "set -m; sleep 600 & echo $!; (sleep 600 & echo $!; wait) & wait";
    let mut stream = agent.shell(script).await;
    let pid = stream.pid().await;
    let output = stream
        .output_until("both pids", |out| {
            out.iter().filter(|b| **b == b'\n').count() == 2
        })
        .await;
    let children: Vec<u64> = String::from_utf8(output)
        .expect("pids")
        .lines()
        .map(|line| line.parse().expect("a pid"))
        .collect();
    assert!(children.iter().all(|pid| is_alive(*pid)));
    agent
        .ok(
            "process.Process/SendSignal",
            json!({ "process": by_pid(pid), "signal": "SIGNAL_SIGKILL" }),
        )
        .await;
    assert!(
        !std::path::Path::new(&format!("/proc/{pid}")).exists(),
        "the process has been reaped"
    );
    let outcome = stream.finish().await;
    assert_eq!(outcome.exit_code(), -1);
    assert_eq!(outcome.end["status"], "signal: killed");
    until("the children are gone", async || {
        (!children.iter().any(|pid| is_alive(*pid))).then_some(())
    })
    .await;
    let again = json!({ "process": by_pid(pid), "signal": "SIGNAL_SIGKILL" });
    assert_eq!(
        agent.error("process.Process/SendSignal", again).await,
        "not_found"
    );
}

#[tokio::test]
async fn a_process_may_catch_sigterm() {
    let agent = Agent::start().await;
    let mut stream = agent
        .shell("trap 'echo caught; exit 7' TERM; echo ready; while :; do sleep 0.05; done")
        .await;
    let pid = stream.pid().await;
    stream
        .output_until("ready", |out| out.starts_with(b"ready"))
        .await;
    agent
        .ok(
            "process.Process/SendSignal",
            json!({ "process": by_pid(pid), "signal": "SIGNAL_SIGTERM" }),
        )
        .await;
    let outcome = stream.finish().await;
    assert_eq!((outcome.stdout(), outcome.exit_code()), ("caught\n", 7));
}

#[tokio::test]
async fn the_deadline_kills_the_process_and_ends_the_stream() {
    let agent = Agent::start().await;
    let started = Instant::now();
    let request = json!({ "process": bash("echo first; sleep 600"), "stdin": false });
    let mut stream = agent
        .start_process(request, &[("Connect-Timeout-Ms", "400")])
        .await;
    let pid = stream.pid().await;
    let outcome = stream.finish().await;
    assert_eq!(outcome.stdout(), "first\n");
    assert_eq!(outcome.error.as_deref(), Some("deadline_exceeded"));
    assert!(started.elapsed() >= Duration::from_millis(400));
    until("the process is gone", async || (!is_alive(pid)).then_some(())).await;
}

#[tokio::test]
async fn the_deadline_holds_for_a_client_that_has_left() {
    let agent = Agent::start().await;
    let request = json!({ "process": bash("sleep 600"), "stdin": false });
    let mut stream = agent
        .start_process(request, &[("Connect-Timeout-Ms", "700")])
        .await;
    let pid = stream.pid().await;
    drop(stream);
    assert!(is_alive(pid));
    until("the process is gone", async || (!is_alive(pid)).then_some(())).await;
}

#[tokio::test]
async fn a_deadline_of_a_connect_stream_leaves_the_process_alone() {
    let agent = Agent::start().await;
    let mut stream = agent.shell("sleep 600").await;
    let pid = stream.pid().await;
    let request = json!({ "process": by_pid(pid) });
    let mut second = agent
        .stream(
            "process.Process/Connect",
            request,
            &[("Connect-Timeout-Ms", "200")],
        )
        .await;
    assert_eq!(second.pid().await, pid);
    assert_eq!(second.finish().await.error.as_deref(), Some("deadline_exceeded"));
    assert!(is_alive(pid));
}

#[tokio::test]
async fn a_process_survives_its_client_and_can_be_joined_again() {
    let agent = Agent::start().await;
    let go = agent.path("go");
    // Far more than all buffers hold, so that it would hang if nobody drained it.
    let script = format!(
        "head -c 3000000 /dev/zero; until [ -e {} ]; do sleep 0.02; done; echo done",
        go.display()
    );
    let mut stream = agent
        .start_process(json!({ "process": bash(&script), "tag": "job" }), &[])
        .await;
    let pid = stream.pid().await;
    drop(stream);
    let mut second = agent
        .stream(
            "process.Process/Connect",
            json!({ "process": { "tag": "job" } }),
            &[],
        )
        .await;
    assert_eq!(second.pid().await, pid);
    let mut third = agent
        .stream("process.Process/Connect", json!({ "process": by_pid(pid) }), &[])
        .await;
    assert_eq!(third.pid().await, pid);
    std::fs::write(&go, "").expect("written");
    let (second, third) = tokio::join!(second.finish(), third.finish());
    for outcome in [second, third] {
        assert!(outcome.stdout.ends_with(b"done\n"));
        assert_eq!(outcome.exit_code(), 0);
    }
    // Its end is still known to those who come late.
    let mut late = agent
        .stream("process.Process/Connect", json!({ "process": by_pid(pid) }), &[])
        .await;
    assert_eq!(late.pid().await, pid);
    let outcome = late.finish().await;
    assert_eq!((outcome.exit_code(), outcome.stdout.len()), (0, 0));
}

#[tokio::test]
async fn only_the_latest_exits_are_kept() {
    let agent = Agent::start().await;
    let mut first = agent.shell("exit 5").await;
    let pid = first.pid().await;
    first.finish().await;
    for _ in 0..64 {
        agent
            .start_process(json!({ "process": { "cmd": "true" } }), &[])
            .await
            .finish()
            .await;
    }
    let mut late = agent
        .stream("process.Process/Connect", json!({ "process": by_pid(pid) }), &[])
        .await;
    assert_eq!(late.error().await.0, "not_found");
}

#[tokio::test]
async fn a_background_child_does_not_hold_the_end_back() {
    let agent = Agent::start().await;
    let mut stream = agent.shell("sleep 600 & echo $!").await;
    let session = stream.pid().await;
    let started = Instant::now();
    let outcome = stream.finish().await;
    assert_eq!(outcome.exit_code(), 0);
    assert!(started.elapsed() < Duration::from_secs(20));
    let child = outcome.stdout().trim().parse().expect("a pid");
    assert!(is_alive(child), "the end of its parent is not its own");
    kill_group(session);
}

#[tokio::test]
async fn late_output_of_a_child_still_counts() {
    let agent = Agent::start().await;
    let outcome = agent
        .shell("(for i in 1 2 3; do sleep 0.1; echo $i; done) & exit 4")
        .await
        .finish()
        .await;
    assert_eq!((outcome.stdout(), outcome.exit_code()), ("1\n2\n3\n", 4));
}

#[tokio::test]
async fn a_silent_stream_gives_signs_of_life() {
    let agent = Agent::start().await;
    let request = json!({ "process": bash("sleep 2.5"), "stdin": false });
    let outcome = agent
        .start_process(request, &[("Keepalive-Ping-Interval", "1")])
        .await
        .finish()
        .await;
    assert_eq!(outcome.keepalives, 2);
    assert_eq!(outcome.exit_code(), 0);
}

#[tokio::test]
async fn an_agent_that_dies_leaves_its_processes_alone() {
    let agent = Agent::start().await;
    let done = agent.path("done");
    let mut stream = agent
        .shell(&format!("echo up; sleep 0.3; : > {}", done.display()))
        .await;
    stream.output_until("up", |out| out == b"up\n").await;
    let dir = agent.kill();
    until("the process has finished its work", async || {
        dir.path().join("done").exists().then_some(())
    })
    .await;
}

#[tokio::test]
async fn many_processes_at_once() {
    let agent = Agent::start().await;
    // The place before the kernel's out-of-memory killer, which the agent lends to each.
    let place = || std::fs::read_to_string(format!("/proc/{}/oom_score_adj", agent.pid())).expect("it runs");
    let before = place();
    let outcomes = futures::future::join_all((0..40).map(|i| {
        let agent = &agent;
        async move {
            (
                i,
                agent
                    .shell(&format!(
                        "sleep 0.1; echo {i} $(cat /proc/$$/oom_score_adj); exit {i}"
                    ))
                    .await
                    .finish()
                    .await,
            )
        }
    }))
    .await;
    for (i, outcome) in outcomes {
        assert_eq!(
            (outcome.stdout().trim(), outcome.exit_code()),
            (format!("{i} 100").as_str(), i)
        );
    }
    assert_eq!(place(), before);
    assert!(agent.pids().await.is_empty());
}
