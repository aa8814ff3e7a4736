//! The real binary against a stand-in of the platform: exit codes, streams, signals, copies, terminals.

#[path = "../../client/tests/stub/mod.rs"]
mod stub;

use std::io::{Read as _, Write as _};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::Value;
use stub::{KEY, Stub};

/// The platform on a thread of its own, as the tests block on processes.
struct Platform {
    stub: Stub,
    _runtime: tokio::runtime::Runtime,
    /// The data directory, working directory and home of every command.
    dir: tempfile::TempDir,
}

impl Platform {
    fn start() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let stub = runtime.block_on(Stub::start());
        Self {
            stub,
            _runtime: runtime,
            dir: tempfile::tempdir().unwrap(),
        }
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_wrenn"));
        command
            .args(args)
            .current_dir(self.dir.path())
            .env("WRENN_BASE_URL", &self.stub.url)
            .env("WRENN_API_KEY", KEY)
            .env("WRENN_DIR", self.dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// Runs with input.
    fn feed(&self, args: &[&str], input: &[u8]) -> Output {
        let mut child = self.command(args).stdin(Stdio::piped()).spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let input = input.to_vec();
        let writer = std::thread::spawn(move || stdin.write_all(&input));
        let output = child.wait_with_output().unwrap();
        let _ = writer.join();
        output
    }

    /// What a command that has to succeed prints.
    fn out(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert_eq!(code(&output), 0, "{args:?}: {}", err(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    fn write(&self, path: &str, content: &str) {
        let path = self.dir.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }

    fn read(&self, path: &str) -> String {
        std::fs::read_to_string(self.dir.path().join(path)).unwrap()
    }
}

fn code(output: &Output) -> i32 {
    output.status.code().expect("an exit, not a signal")
}

fn err(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn run_passes_everything_through_and_cleans_up() {
    let platform = Platform::start();
    let output = platform.run(&[
        "run",
        "--env",
        "A=b c",
        "--",
        "sh",
        "-c",
        "printf \"$A\\377\"; echo oops >&2; exit 7",
    ]);
    assert_eq!(
        (code(&output), output.stdout.as_slice(), err(&output).as_str()),
        (7, &b"b c\xff"[..], "oops\n")
    );
    assert_eq!(platform.stub.statuses(), ["stopped"]);
    // Every byte there is, as many programs write them.
    let bytes: Vec<u8> = (0..200_000u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 11) as u8)
        .collect();
    let file = platform.dir.path().join("bytes");
    std::fs::write(&file, &bytes).unwrap();
    let output = platform.run(&["run", "--", "cat", file.to_str().unwrap()]);
    assert_eq!(code(&output), 0, "{}", err(&output));
    assert!(output.stdout == bytes, "{} bytes came", output.stdout.len());
}

#[test]
fn run_takes_a_command_without_dashes_and_leaves_its_options_alone() {
    let platform = Platform::start();
    assert_eq!(platform.out(&["run", "echo", "-n", "--json", "x"]), "--json x");
    assert_eq!(code(&platform.run(&["run", "--no-such-option", "echo"])), 2);
    assert_eq!(code(&platform.run(&["run"])), 2);
}

#[test]
fn run_forwards_piped_input() {
    let platform = Platform::start();
    let input: Vec<u8> = (0..500_000u32).map(|i| (i % 251) as u8).collect();
    let output = platform.feed(&["run", "-i", "--", "cat"], &input);
    assert_eq!(code(&output), 0, "{}", err(&output));
    assert!(
        output.stdout == input,
        "{} of {} bytes",
        output.stdout.len(),
        input.len()
    );
    // A command need not take all of it.
    let output = platform.feed(&["run", "-i", "--", "head", "-c", "3"], &input);
    assert_eq!(
        (code(&output), output.stdout.as_slice()),
        (0, &input[..3]),
        "{}",
        err(&output)
    );
    // Without -i, the command has no input, whatever is piped in.
    assert_eq!(platform.feed(&["run", "--", "cat"], b"x").stdout, b"");
}

#[test]
fn run_reports_as_json() {
    let platform = Platform::start();
    let output = platform.run(&[
        "run",
        "--json",
        "--",
        "sh",
        "-c",
        "echo out; echo err >&2; exit 3",
    ]);
    assert_eq!(code(&output), 3);
    let result: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (&result["stdout"], &result["stderr"], &result["exit_code"]),
        (&"out\n".into(), &"err\n".into(), &3.into())
    );
}

#[test]
fn run_keeps_the_sandbox_when_asked() {
    let platform = Platform::start();
    let output = platform.run(&["run", "--keep", "--", "true"]);
    assert_eq!(code(&output), 0);
    assert_eq!(platform.stub.statuses(), ["running"]);
    assert!(err(&output).contains("sb-"));
}

#[test]
fn run_stops_at_its_time_limit() {
    let platform = Platform::start();
    let output = platform.run(&["run", "--timeout", "1s", "--", "sleep", "600"]);
    assert_eq!(code(&output), 124, "{}", err(&output));
    assert_eq!(platform.stub.statuses(), ["stopped"]);
}

#[test]
fn run_cleans_up_when_it_is_interrupted() {
    for (signal, expected) in [("INT", 130), ("TERM", 143), ("HUP", 129)] {
        let platform = Platform::start();
        let mut child = platform
            .command(&["run", "--", "sh", "-c", "echo ready; exec sleep 600"])
            .spawn()
            .unwrap();
        let mut ready = [0; 6];
        child.stdout.as_mut().unwrap().read_exact(&mut ready).unwrap();
        let kill = Command::new("kill")
            .args(["-s", signal, &child.id().to_string()])
            .status()
            .unwrap();
        assert!(kill.success());
        let output = child.wait_with_output().unwrap();
        assert_eq!(code(&output), expected, "{}", err(&output));
        assert_eq!(platform.stub.statuses(), ["stopped"]);
        assert_eq!(platform.stub.count("FRAME stop"), 1);
    }
}

#[test]
fn run_cleans_up_when_nobody_reads_its_output() {
    let platform = Platform::start();
    let mut child = platform.command(&["run", "--", "yes"]).spawn().unwrap();
    let mut some = [0; 100];
    child.stdout.as_mut().unwrap().read_exact(&mut some).unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!((code(&output), err(&output).as_str()), (141, ""));
    assert_eq!(platform.stub.statuses(), ["stopped"]);
}

#[test]
fn failures_of_the_platform_have_code_125_and_a_remedy() {
    let platform = Platform::start();
    let output = platform.run(&["run", "--template", "full", "--", "true"]);
    assert_eq!(code(&output), 125);
    assert!(err(&output).contains("no host has 512 MiB free") && err(&output).contains("help: "));

    let output = platform.run(&["run", "--template", "broken", "--", "true"]);
    assert_eq!(code(&output), 125);
    assert!(
        err(&output).contains("Kernel panic") && !err(&output).contains('\u{1b}'),
        "{}",
        err(&output)
    );
    assert_eq!(platform.stub.statuses(), ["stopped"]);

    let output = platform.run(&["run", "--", "/no/such/program"]);
    assert_eq!(code(&output), 125);

    let output = platform.run(&[
        "--json",
        "sandbox",
        "get",
        "sb-0198c0de-0000-7000-8000-00000000dead",
    ]);
    assert_eq!((code(&output), output.stdout.len()), (125, 0));
    let error: Value = serde_json::from_slice(&output.stderr).unwrap();
    assert_eq!(error["error"]["code"], "not_found");

    let output = platform
        .command(&["sandbox", "ls"])
        .env("WRENN_API_KEY", "wrn_wrong")
        .output()
        .unwrap();
    assert_eq!(code(&output), 125);
    assert!(err(&output).contains("WRENN_API_KEY"));
}

/// The lines of standard error, each a JSON object.
fn told(output: &Output) -> Vec<Value> {
    err(output)
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("no JSON: {line}")))
        .collect()
}

#[test]
fn every_result_can_be_json() {
    let platform = Platform::start();
    let id = platform.stub.sandbox();
    platform.write("data.csv", "a,b");
    let there = format!("{id}:/data.csv");
    let json = |args: &[&str]| -> Value {
        let output = platform.run(&[&["--json"], args].concat());
        assert_eq!((code(&output), err(&output).as_str()), (0, ""), "{args:?}");
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{args:?}: {error}"))
    };
    assert_eq!(json(&["run", "--keep", "--", "true"])["exit_code"], 0);
    assert_eq!(json(&["sandbox", "create"])["status"], "running");
    assert_eq!(json(&["sandbox", "ls"]).as_array().map(Vec::len), Some(3));
    assert_eq!(json(&["sandbox", "get", &id])["id"], *id);
    assert_eq!(
        json(&["sandbox", "exec", &id, "--", "echo", "hi"])["stdout"],
        "hi\n"
    );
    assert!(json(&["sandbox", "exec", "-d", &id, "sleep", "1"])["tag"].is_string());
    assert_eq!(json(&["sandbox", "cp", "data.csv", &there])["bytes"], 3);
    assert_eq!(json(&["sandbox", "cp", &there, "back.csv"])["files"], 1);
    let broken = json(&["sandbox", "create", "--template", "broken", "--no-wait"]);
    let broken = broken["id"].as_str().unwrap();
    assert!(json(&["sandbox", "logs", broken])["console"].is_string());
    assert_eq!(
        json(&["snapshot", "create", &id, "--name", "mine"])["name"],
        "mine"
    );
    assert_eq!(json(&["snapshot", "ls"])[0]["name"], "mine");
    assert!(json(&["template", "ls"]).is_array());
    assert_eq!(json(&["snapshot", "rm", "mine"])[0], "mine");
    for change in ["pause", "resume", "rm"] {
        assert_eq!(json(&["sandbox", change, &id])[0], *id);
    }
    // Of the servers' commands, which write a log to standard error.
    let json = |args: &[&str]| -> Value {
        serde_json::from_str(&platform.out(&[&["--json"], args].concat())).unwrap()
    };
    assert_eq!(json(&["openapi"])["openapi"], "3.1.0");
    assert!(json(&["config"])["WRENN_LISTEN"].is_string());
    assert!(json(&["migrate", "up"])[0]["applied"].as_bool().unwrap());
    assert!(json(&["migrate", "status"])[0]["known"].as_bool().unwrap());
    let token = json(&["control-plane", "--issue-host-token"]);
    assert!(token["token"].is_string() && token["host_id"].is_string() && token["api_key"].is_string());
    let admin = ["--json", "admin", "create", "--email", "a@example.com"];
    let admin = platform.feed(&admin, b"a long enough password\n");
    let admin: Value = serde_json::from_slice(&admin.stdout).unwrap();
    assert!(
        admin["id"].is_string() && admin["email"] == "a@example.com",
        "{admin}"
    );
}

#[test]
fn followed_output_is_lines_of_json() {
    let platform = Platform::start();
    let id = platform.stub.sandbox();
    let output = platform.run(&["--json", "sandbox", "logs", &id, "--process", "web"]);
    assert_eq!((code(&output), err(&output).as_str()), (0, ""));
    let lines: Vec<Value> = String::from_utf8(output.stdout)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    // What is no text is told as base64: "listening\xff\n".
    let said: Vec<&Value> = lines.iter().filter(|line| line["type"] == "stdout").collect();
    assert!(
        said.iter()
            .any(|line| line["encoding"] == "base64" && line["data"] == "bGlzdGVuaW5n/wo="),
        "{lines:?}"
    );
    assert_eq!(
        lines.last().unwrap(),
        &serde_json::json!({"type": "exit", "exit_code": 3})
    );
}

#[test]
fn every_failure_can_be_json() {
    let platform = Platform::start();
    let id = platform.stub.sandbox();
    let gone = "sb-0198c0de-0000-7000-8000-00000000dead";
    let cases: [(&[&str], i32, &str); 10] = [
        (&["sandbox", "get", gone], 125, "not_found"),
        (&["snapshot", "rm", "none"], 125, "not_found"),
        (
            &["run", "--template", "broken", "--", "true"],
            125,
            "sandbox_failed",
        ),
        (
            &["sandbox", "cp", "no-such-file", &format!("{id}:/x")],
            1,
            "local",
        ),
        (&["sandbox", "cp", "one", "other"], 2, "usage"),
        (&["sandbox", "shell", &id], 2, "usage"),
        (&["sandbox", "exec", "--tty", &id, "sh"], 2, "usage"),
        (&["sandbox", "gett", &id], 2, "usage"),
        (&["sandbox"], 2, "usage"),
        (
            &["migrate", "status", "--database-url", "mysql://there"],
            1,
            "failed",
        ),
    ];
    for (args, expected, kind) in cases {
        let output = platform.run(&[&["--json"], args].concat());
        let lines = told(&output);
        assert_eq!(code(&output), expected, "{args:?}");
        // Nothing, or of several things those that were done.
        assert!(matches!(output.stdout.as_slice(), b"" | b"[]\n"), "{args:?}");
        let error = &lines.last().expect("an error")["error"];
        assert_eq!(error["code"], kind, "{args:?}: {error}");
        assert!(error["message"].as_str().is_some_and(|text| !text.is_empty()));
    }
    // The last lines of a console, and what was not copied.
    let output = platform.run(&["--json", "run", "--template", "broken", "--", "true"]);
    let console = told(&output)[0]["error"]["console"].to_string();
    assert!(console.contains("Kernel panic"), "{console}");
    std::fs::create_dir(platform.stub.root.join("hostile")).unwrap();
    let output = platform.run(&["--json", "sandbox", "cp", &format!("{id}:/hostile"), "out"]);
    let warnings = told(&output);
    assert!(
        !warnings.is_empty() && warnings.iter().all(|line| line["warning"]["message"].is_string()),
        "{warnings:?}"
    );
    // Of several, those that can be deleted are.
    platform.out(&["snapshot", "create", &id, "--name", "mine"]);
    let output = platform.run(&["--json", "snapshot", "rm", "none", "mine"]);
    assert_eq!((code(&output), told(&output).len()), (125, 1));
    assert_eq!(
        serde_json::from_slice::<Value>(&output.stdout).unwrap(),
        serde_json::json!(["mine"])
    );
}

#[test]
fn a_debian_mirror_is_checked_and_shown_without_its_password() {
    let platform = Platform::start();
    let shown = |mirror: &str| {
        let mut command = platform.command(&["--json", "config"]);
        command.env("WRENN_DEBIAN_MIRROR", mirror).output().unwrap()
    };
    let output = shown("https://me:secret@mirror.example/debian/");
    let settings: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        settings["WRENN_DEBIAN_MIRROR"],
        "https://me:****@mirror.example/debian"
    );
    let output = shown("mirror.example/debian");
    assert_eq!(code(&output), 2);
    let error = &told(&output)[0]["error"];
    assert!(
        error["message"]
            .as_str()
            .unwrap()
            .contains("https://deb.debian.org/debian"),
        "{error}"
    );
    for mistyped in ["htps://me:secret@mirror.example", "me:secret@mirror.example"] {
        let output = shown(mistyped);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(
            error.contains("****@mirror.example") && !error.contains("secret"),
            "{error}"
        );
    }
    let default: Value = serde_json::from_str(&platform.out(&["config", "--json"])).unwrap();
    assert!(
        default["WRENN_DEBIAN_MIRROR"]
            .as_str()
            .unwrap()
            .contains("machine")
    );
}

#[test]
fn the_local_platform_is_found_by_its_file() {
    let platform = Platform::start();
    let bare = |args: &[&str]| {
        let mut command = platform.command(args);
        command
            .env_remove("WRENN_BASE_URL")
            .env_remove("WRENN_API_KEY")
            .output()
            .unwrap()
    };
    let output = bare(&["sandbox", "ls"]);
    assert_eq!(code(&output), 125);
    assert!(err(&output).contains("make up"), "{}", err(&output));
    platform.write(
        "local.env",
        &format!("WRENN_BASE_URL={}\nWRENN_API_KEY={KEY}\n", platform.stub.url),
    );
    assert_eq!(code(&bare(&["sandbox", "ls"])), 0);
    // Its key is not sent elsewhere.
    let output = bare(&["--url", "http://127.0.0.1:9", "sandbox", "ls"]);
    assert!(err(&output).contains("belongs to"), "{}", err(&output));
}

#[test]
fn sandboxes_are_managed() {
    let platform = Platform::start();
    let id = platform.out(&[
        "sandbox",
        "create",
        "--memory",
        "1G",
        "--label",
        "team=red",
        "--timeout",
        "5m",
    ]);
    let id = id.trim();
    let record: Value = serde_json::from_str(&platform.out(&["sandbox", "get", "--json", id])).unwrap();
    assert_eq!(
        (&record["memory_mb"], &record["timeout_sec"]),
        (&1024.into(), &300.into())
    );
    assert_eq!(record["metadata"]["team"], "red");
    let shown = platform.out(&["sandbox", "get", id]);
    assert!(
        shown.contains("auto-pause:") && shown.contains("after 300 s") && shown.contains("team=red"),
        "{shown}"
    );

    // The end of an id will do.
    let short = &id[id.len() - 6..];
    assert_eq!(platform.out(&["sandbox", "pause", short]).trim(), id);
    assert_eq!(platform.stub.status(id), "paused");
    let listed = platform.out(&["sandbox", "ls"]);
    let rows: Vec<&str> = listed.lines().collect();
    assert!(
        rows.len() == 2 && rows[0].starts_with("ID") && rows[1].starts_with(id),
        "{listed}"
    );
    assert!(rows[1].contains("paused"));
    assert_eq!(platform.out(&["sandbox", "ls", "-q"]).trim(), id);
    platform.out(&["sandbox", "resume", id]);

    // What can be done is done, and the rest is told.
    let output = platform.run(&["sandbox", "rm", id, "sb-0198c0de-0000-7000-8000-00000000dead"]);
    assert_eq!(code(&output), 125);
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), id);
    assert!(err(&output).contains("dead"));
    assert_eq!(platform.stub.status(id), "stopped");
}

#[test]
fn exec_runs_in_a_sandbox_that_is_there() {
    let platform = Platform::start();
    let id = platform.stub.sandbox();
    let output = platform.run(&["sandbox", "exec", &id, "--", "sh", "-c", "echo hi; exit 9"]);
    assert_eq!((code(&output), output.stdout.as_slice()), (9, &b"hi\n"[..]));
    assert_eq!(platform.stub.status(&id), "running");
    assert_eq!(
        platform.out(&["sandbox", "exec", "-d", "--tag", "srv", &id, "sleep", "1"]),
        "srv\n"
    );

    let output = platform.run(&["sandbox", "logs", &id, "--process", "web"]);
    assert_eq!(
        (code(&output), output.stdout.as_slice()),
        (0, &b"listening\xff\n"[..])
    );
    assert!(err(&output).contains("exit code 3"));
    assert_eq!(
        code(&platform.run(&["sandbox", "logs", &id, "--process", "gone"])),
        125
    );
}

#[test]
fn logs_show_the_console_of_one_that_failed() {
    let platform = Platform::start();
    let id = platform.out(&["sandbox", "create", "--template", "broken", "--no-wait"]);
    let output = platform.run(&["sandbox", "logs", id.trim()]);
    assert_eq!(code(&output), 0);
    let console = String::from_utf8_lossy(&output.stdout);
    assert!(console.starts_with("Kernel panic") && !console.contains('\u{1b}'));
    assert!(err(&output).contains("the VM died"));
}

#[test]
fn snapshots_and_templates() {
    let platform = Platform::start();
    let id = platform.stub.sandbox();
    assert_eq!(
        platform.out(&["snapshot", "create", &id, "--name", "mine"]),
        "mine\n"
    );
    let listed = platform.out(&["template", "ls"]);
    assert!(listed.contains("minimal") && listed.contains("mine"), "{listed}");
    assert!(!platform.out(&["snapshot", "ls"]).contains("minimal"));
    let listed: Value = serde_json::from_str(&platform.out(&["snapshot", "ls", "--json"])).unwrap();
    assert_eq!(listed[0]["name"], "mine");
    assert_eq!(
        code(&platform.run(&["snapshot", "create", &id, "--name", "mine"])),
        125
    );
    platform.out(&["snapshot", "create", &id, "--name", "mine", "--overwrite"]);
    platform.out(&["snapshot", "rm", "mine"]);
}

#[test]
fn files_are_copied_both_ways() {
    let platform = Platform::start();
    let id = platform.stub.sandbox();
    let there = |path: &str| format!("{id}:{path}");
    platform.write("data.csv", "a,b\n1,2\n");
    // To a name, into a directory, under a new directory's name.
    platform.out(&["sandbox", "cp", "data.csv", &there("/in.csv")]);
    assert_eq!(
        std::fs::read(platform.stub.root.join("in.csv")).unwrap(),
        b"a,b\n1,2\n"
    );
    platform.out(&["sandbox", "cp", "data.csv", &there("/new/")]);
    assert!(platform.stub.root.join("new/data.csv").is_file());
    platform.out(&["sandbox", "cp", "data.csv", &there("/new")]);

    platform.out(&["sandbox", "cp", &there("/in.csv"), "back.csv"]);
    assert_eq!(platform.read("back.csv"), "a,b\n1,2\n");
    platform.out(&["sandbox", "cp", &there("/in.csv"), "."]);
    assert_eq!(platform.read("in.csv"), "a,b\n1,2\n");
    let output = platform.run(&["sandbox", "cp", &there("/none"), "x"]);
    assert_eq!(code(&output), 125);
    assert!(!platform.dir.path().join("x").exists());
    assert_eq!(
        code(&platform.run(&["sandbox", "cp", "no-such-file", &there("/x")])),
        1
    );
    assert_eq!(
        code(&platform.run(&["sandbox", "cp", "data.csv", "other.csv"])),
        2
    );
}

#[test]
fn files_are_copied_as_a_user() {
    use std::os::unix::fs::PermissionsExt as _;
    let platform = Platform::start();
    let id = platform.stub.sandbox();
    platform.write("app/tool", "#!/bin/sh");
    let tool = platform.dir.path().join("app/tool");
    std::fs::set_permissions(&tool, std::fs::Permissions::from_mode(0o755)).unwrap();
    platform.out(&["sandbox", "cp", "--user", "root", "app", &format!("{id}:app")]);
    assert!(platform.stub.root.join("home/root/app/tool").is_file());
    platform.out(&["sandbox", "cp", "-u", "root", &format!("{id}:app/tool"), "back"]);
    assert_eq!(platform.read("back"), "#!/bin/sh");
    // What makes it executable runs as the same user: a file of root's is not another's to change.
    assert_eq!(platform.stub.count("EXEC root chmod"), 1);
    let output = platform.run(&["sandbox", "cp", "--user", "no-one", "back", &format!("{id}:back")]);
    assert_eq!(code(&output), 125);
    assert!(err(&output).contains("user"), "{}", err(&output));
}

#[test]
fn standard_streams_are_copied() {
    let platform = Platform::start();
    let id = platform.stub.sandbox();
    let bytes: Vec<u8> = (0..2_000_000u32).map(|i| (i % 253) as u8).collect();
    let output = platform.feed(&["sandbox", "cp", "--json", "-", &format!("{id}:/blob")], &bytes);
    assert_eq!(code(&output), 0, "{}", err(&output));
    let told: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(told["bytes"], bytes.len());
    let output = platform.run(&["sandbox", "cp", "--json", &format!("{id}:/blob"), "-"]);
    assert_eq!(code(&output), 0);
    assert!(output.stdout == bytes);
    // A download that breaks off must not pass for a whole one.
    let output = platform.run(&["sandbox", "cp", &format!("{id}:/cut"), "cut"]);
    assert_eq!(code(&output), 125);
    assert_eq!(std::fs::read_dir(platform.dir.path()).unwrap().count(), 0);
}

#[test]
fn directories_are_copied_whole() {
    use std::os::unix::fs::PermissionsExt as _;
    let platform = Platform::start();
    let id = platform.stub.sandbox();
    platform.write("app/main.py", "print(1)");
    platform.write("app/bin/tool", "#!/bin/sh");
    platform.write("app/empty/.keep", "");
    let tool = platform.dir.path().join("app/bin/tool");
    std::fs::set_permissions(&tool, std::fs::Permissions::from_mode(0o755)).unwrap();
    platform.out(&["sandbox", "cp", "app", &format!("{id}:/srv")]);
    let mode = std::fs::metadata(platform.stub.root.join("srv/bin/tool"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o111, 0o111);
    // Now that it is there, the next one goes into it; `/.` means the contents.
    platform.out(&["sandbox", "cp", "app", &format!("{id}:/srv")]);
    assert!(platform.stub.root.join("srv/app/main.py").is_file());
    platform.out(&["sandbox", "cp", "app/.", &format!("{id}:/flat")]);
    assert!(platform.stub.root.join("flat/main.py").is_file());

    std::os::unix::fs::symlink("bin/tool", platform.stub.root.join("flat/good")).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", platform.stub.root.join("flat/bad")).unwrap();
    let output = platform.run(&["sandbox", "cp", &format!("{id}:/flat"), "out"]);
    assert_eq!(code(&output), 0, "{}", err(&output));
    assert_eq!(platform.read("out/bin/tool"), "#!/bin/sh");
    assert_eq!(platform.read("out/good"), "#!/bin/sh");
    assert!(!platform.dir.path().join("out/bad").is_symlink() && err(&output).contains("bad"));
    let mode = std::fs::metadata(platform.dir.path().join("out/bin/tool"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o111, 0o111);
    assert!(platform.dir.path().join("out/empty/.keep").is_file());
}

#[test]
fn a_hostile_sandbox_does_not_write_outside_of_the_destination() {
    let platform = Platform::start();
    let id = platform.stub.sandbox();
    std::fs::create_dir(platform.stub.root.join("hostile")).unwrap();
    let output = platform.run(&["sandbox", "cp", &format!("{id}:/hostile"), "out"]);
    assert_eq!(code(&output), 0, "{}", err(&output));
    assert!(!platform.dir.path().join("escaped").exists());
    assert_eq!(
        std::fs::read_dir(platform.dir.path().join("out"))
            .unwrap()
            .count(),
        0
    );
}

#[test]
fn a_shell_without_a_terminal_takes_piped_input() {
    let platform = Platform::start();
    let id = platform.stub.sandbox();
    let output = platform.feed(&["sandbox", "shell", &id], b"hello\nexit 6\n");
    assert_eq!(code(&output), 6, "{}", err(&output));
    let screen = String::from_utf8_lossy(&output.stdout);
    assert!(screen.contains("80x24") && screen.contains("HELLO"), "{screen}");
}

/// A script in a terminal of its own.
struct Terminal {
    child: std::process::Child,
    keys: std::process::ChildStdin,
    screen: Arc<Mutex<Vec<u8>>>,
    reader: Option<std::thread::JoinHandle<()>>,
}

impl Terminal {
    fn start(platform: &Platform, script: &str) -> Self {
        let mut command = Command::new("script");
        for (name, value) in platform.command(&[]).get_envs() {
            command.env(name, value.unwrap());
        }
        let mut child = command
            .args(["-qefc", script, "/dev/null"])
            .env("WRENN", env!("CARGO_BIN_EXE_wrenn"))
            .current_dir(platform.dir.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let screen = Arc::<Mutex<Vec<u8>>>::default();
        let (mut output, shown) = (child.stdout.take().unwrap(), Arc::clone(&screen));
        let reader = std::thread::spawn(move || {
            let mut buffer = [0; 1024];
            while let Ok(read @ 1..) = output.read(&mut buffer) {
                shown.lock().unwrap().extend_from_slice(&buffer[..read]);
            }
        });
        Self {
            keys: child.stdin.take().unwrap(),
            child,
            screen,
            reader: Some(reader),
        }
    }

    fn screen(&self) -> String {
        String::from_utf8_lossy(&self.screen.lock().unwrap()).into_owned()
    }

    fn wait_for(&self, text: &str) {
        wait_until(&format!("{text:?} on the screen"), || {
            self.screen().contains(text)
        });
    }

    fn press(&mut self, keys: &[u8]) {
        self.keys.write_all(keys).unwrap();
    }

    /// The whole screen and the exit code.
    fn end(mut self) -> (String, i32) {
        let mut code = None;
        wait_until("the end of the script", || {
            code = self.child.try_wait().unwrap();
            code.is_some()
        });
        self.reader.take().unwrap().join().unwrap();
        (self.screen(), code.and_then(|status| status.code()).unwrap())
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // Only when the test fails: it has ended otherwise.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The terminal's settings before and after, as the script prints them.
fn assert_restored(screen: &str) {
    let settings: Vec<&str> = screen
        .lines()
        .filter_map(|line| line.trim().strip_prefix("STTY "))
        .collect();
    assert_eq!(settings.len(), 2, "{screen}");
    assert_eq!(settings[0], settings[1], "{screen}");
}

/// A script that shows the terminal's settings around a shell in a sandbox.
fn around(shell: &str) -> String {
    format!(
        "stty rows 33 cols 99; echo STTY $(stty -g); {shell}; code=$?; echo; echo STTY $(stty -g); exit $code"
    )
}

#[test]
fn a_shell_uses_the_terminal_raw_and_restores_it() {
    let platform = Platform::start();
    let id = platform.stub.sandbox();
    let mut terminal = Terminal::start(&platform, &around(&format!("\"$WRENN\" sandbox shell {id}")));
    terminal.wait_for("99x33");
    // Ctrl-C is a key like any other there.
    terminal.press(b"\x03\rexit 4\r");
    let (screen, code) = terminal.end();
    assert_eq!(code, 4, "{screen}");
    assert_restored(&screen);
}

#[test]
fn a_shell_can_be_left_and_found_again() {
    let platform = Platform::start();
    let id = platform.stub.sandbox();
    let mut terminal = Terminal::start(&platform, &around(&format!("\"$WRENN\" sandbox shell {id}")));
    terminal.wait_for("99x33");
    terminal.press(b"~.");
    let (screen, code) = terminal.end();
    assert_eq!(code, 0, "{screen}");
    assert!(screen.contains("--connect pty-1"), "{screen}");
    assert_restored(&screen);

    let script = around(&format!("\"$WRENN\" sandbox shell {id} --connect pty-1"));
    let mut terminal = Terminal::start(&platform, &script);
    terminal.wait_for("back at \"pty-1\"");
    // It may have had another size before.
    terminal.wait_for("\"cols\":99");
    terminal.press(b"exit 0\r");
    assert_restored(&terminal.end().0);
}

#[test]
fn a_shell_that_is_killed_restores_the_terminal() {
    let platform = Platform::start();
    let id = platform.stub.sandbox();
    // A background command of a script has no input unless it is given.
    let script = around(&format!(
        "exec 3<&0; \"$WRENN\" sandbox shell {id} <&3 & echo $! > pid; wait $!"
    ));
    let terminal = Terminal::start(&platform, &script);
    terminal.wait_for("99x33");
    assert!(
        Command::new("kill")
            .arg(platform.read("pid").trim())
            .status()
            .unwrap()
            .success()
    );
    let (screen, code) = terminal.end();
    assert_eq!(code, 143, "{screen}");
    assert_restored(&screen);
    assert_eq!(platform.stub.count("FRAME {\"type\":\"kill\"}"), 1);
}

#[test]
fn a_changed_window_reaches_the_sandbox() {
    let platform = Platform::start();
    let id = platform.stub.sandbox();
    let resize = "(while ! [ -e resize ]; do sleep 0.02; done; stty rows 50 cols 132 <&3) &";
    let mut terminal = Terminal::start(
        &platform,
        &format!("exec 3<&0; {resize} \"$WRENN\" sandbox shell {id}"),
    );
    // Once a key has been passed on, changes are listened for.
    terminal.press(b"q");
    terminal.wait_for("Q");
    platform.write("resize", "");
    terminal.wait_for("\"cols\":132,\"rows\":50");
    terminal.press(b"\rexit 0\r");
    let (screen, code) = terminal.end();
    assert_eq!(code, 0, "{screen}");
}

#[test]
fn completions_know_the_commands() {
    let platform = Platform::start();
    for shell in ["bash", "zsh", "fish"] {
        assert!(platform.out(&["completions", shell]).contains("snapshot"));
    }
}

#[test]
fn settings_come_from_flags_then_the_environment_then_the_file() {
    let platform = Platform::start();
    platform.write(".env", "WRENN_POOL=5\nWRENN_MAX_VMS=55\nWRENN_MEMORY_MB=4096\n");
    let mut command = platform.command(&["config", "--json", "--pool", "7"]);
    let output = command.env("WRENN_MAX_VMS", "66").output().unwrap();
    let settings: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        ["WRENN_POOL", "WRENN_MAX_VMS", "WRENN_MEMORY_MB"].map(|name| settings[name].as_str().unwrap()),
        ["7", "66", "4096"]
    );
}

#[test]
fn a_server_on_the_loopback_address_is_on_both() {
    let platform = Platform::start();
    let mut server = platform
        .command(&["control-plane", "--json", "--listen", "127.0.0.1:0"])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let stdout = server.stdout.take().unwrap();
    let place: Value = serde_json::Deserializer::from_reader(stdout)
        .into_iter()
        .next()
        .unwrap()
        .unwrap();
    let url = place["url"].as_str().unwrap();
    let port: u16 = url.rsplit(':').next().unwrap().parse().unwrap();
    let answers = [
        std::net::TcpStream::connect(("127.0.0.1", port)),
        std::net::TcpStream::connect(("::1", port)),
    ];
    let no_ipv6 = std::net::TcpListener::bind(("::1", 0)).is_err();
    let _ = Command::new("kill").arg(server.id().to_string()).status();
    server.wait().unwrap();
    assert!(
        answers[0].is_ok() && (answers[1].is_ok() || no_ipv6),
        "{answers:?}"
    );
    assert!(place["api_key"].as_str().unwrap().starts_with("wrn_"), "{place}");
    assert!(platform.read("local.env").contains(url));
}
