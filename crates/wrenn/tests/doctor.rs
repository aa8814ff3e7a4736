//! `wrenn doctor` and the accelerator's probe, as a person and the servers start them.

use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use serde_json::Value;
use wrenn_host::vmm::{Accelerator, probe_cached, probe_in_child};

const WRENN: &str = env!("CARGO_BIN_EXE_wrenn");

fn doctor(dir: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(WRENN);
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("WRENN_")) {
        command.env_remove(name);
    }
    command
        .current_dir(dir)
        .args(["doctor", "--listen", "127.0.0.1:0"])
        .arg("--data-dir")
        .arg(dir.join("data"))
        .arg("--cache-dir")
        .arg(dir.join("cache"))
        .args(args)
        .output()
        .unwrap()
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

/// Whatever this machine's device is: an answer in time, the same when it is remembered, and one that hangs together.
#[test]
fn the_real_device_is_judged_consistently_and_in_time() {
    let dir = tempfile::tempdir().unwrap();
    let begun = Instant::now();
    let report = probe_in_child(Path::new(WRENN));
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert!(!report.detail.contains("no answer"), "{report:?}");
    match report.verdict {
        Accelerator::Kvm => assert!(report.millis.is_some_and(|millis| millis < 100.0), "{report:?}"),
        Accelerator::Tcg => assert!(report.detail.contains("/dev/kvm"), "{report:?}"),
    }
    // The same verdict again; the figure is another, unless it is remembered.
    let first = probe_cached(dir.path(), Path::new(WRENN));
    assert_eq!(first.verdict, report.verdict, "{first:?} {report:?}");
    // A program that cannot run proves that a remembered verdict asks no guest again.
    let again = probe_cached(dir.path(), Path::new("/nonexistent/wrenn"));
    assert_eq!(again, first);
}

#[test]
fn the_report_covers_every_prerequisite() {
    let dir = tempfile::tempdir().unwrap();
    let output = doctor(dir.path(), &["--json"]);
    let report = json(&output);
    let checks = report["checks"].as_array().unwrap();
    let named = |name: &str| checks.iter().find(|check| check["name"] == name);
    for name in [
        "accelerator",
        "qemu",
        "cgroup",
        "data",
        "disk",
        "memory",
        "authorities",
        "tools",
        "kernel",
        "port",
        "clock",
    ] {
        assert!(named(name).is_some(), "{name} is missing: {report:#}");
    }
    let blocking = checks.iter().any(|check| check["blocking"] == true);
    assert_eq!(report["ok"], !blocking);
    assert_eq!(output.status.code(), Some(i32::from(blocking)), "{output:?}");
    for check in checks {
        assert_eq!(check["status"] == "ok", check["remedy"].is_null(), "{check:#}");
        assert!(!check["value"].as_str().unwrap().is_empty(), "{check:#}");
    }
    // It only looks: no data directory is made.
    assert!(!dir.path().join("data").exists());
}

#[test]
fn what_cannot_work_is_an_exit_code_of_one_and_named() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("data"), "a file").unwrap();
    let output = doctor(dir.path(), &[]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.lines().any(|line| line.starts_with("FAIL  data ")), "{text}");
    assert!(text.contains("--data-dir") && !text.contains('\u{1b}'), "{text}");
}

/// The hidden command is for the probe alone: help does not show it.
#[test]
fn help_does_not_show_the_probes_command() {
    let output = Command::new(WRENN).arg("--help").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("doctor") && !text.contains("__probe"), "{text}");
}
