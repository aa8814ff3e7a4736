//! The commands with which operators work on the database itself, as they type them.

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};

const WRENN: &str = env!("CARGO_BIN_EXE_wrenn");

/// Runs a command on a data directory, with this on its standard input.
fn wrenn(dir: &Path, args: &[&str], input: &str) -> Output {
    let mut command = Command::new(WRENN);
    let settings = ["DATABASE_URL", "REDIS_URL"];
    for (name, _) in std::env::vars_os().filter(|(name, _)| {
        let name = name.to_string_lossy();
        name.starts_with("WRENN_") || settings.contains(&&*name)
    }) {
        command.env_remove(name);
    }
    let mut child = command
        .current_dir(dir)
        .args(args)
        .arg("--data-dir")
        .arg(dir.join("data"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A command that reads nothing may have ended.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    child.wait_with_output().unwrap()
}

fn said(output: &Output) -> (bool, String) {
    (
        output.status.success(),
        String::from_utf8_lossy(&output.stdout).into_owned(),
    )
}

#[test]
fn the_schema_is_shown_and_brought_up_to_date() {
    let dir = tempfile::tempdir().unwrap();
    let (good, before) = said(&wrenn(dir.path(), &["migrate", "status"], ""));
    assert!(good, "{before}");
    assert!(
        before.contains("m0001_initial") && before.contains("pending"),
        "{before}"
    );
    assert!(!before.contains("applied"), "{before}");
    // Asking has made nothing.
    assert!(!dir.path().join("data").exists());
    for _ in 0..2 {
        let (good, after) = said(&wrenn(dir.path(), &["migrate", "up"], ""));
        assert!(good, "{after}");
        let (good, status) = said(&wrenn(dir.path(), &["migrate", "status"], ""));
        assert!(good, "{status}");
        assert!(
            status.contains("applied") && !status.contains("pending"),
            "{status}"
        );
        assert_eq!(status.lines().count(), before.lines().count(), "{status}");
    }
}

#[test]
fn an_admin_is_made_and_given_a_password_that_nobody_sees() {
    let dir = tempfile::tempdir().unwrap();
    let create = ["admin", "create", "--email", "root@example.com"];
    let refused = wrenn(dir.path(), &create, "short\n");
    assert!(!refused.status.success(), "{refused:?}");
    assert!(
        String::from_utf8_lossy(&refused.stderr).contains("password must have at least 8"),
        "{refused:?}"
    );
    let password = "a-secret-of-the-operator";
    let made = wrenn(dir.path(), &create, &format!("{password}\n"));
    let (good, id) = said(&made);
    assert!(good && id.starts_with("usr-"), "{made:?}");
    // Once more: the same account, an admin already.
    let again = wrenn(dir.path(), &create, &format!("{password}\n"));
    assert_eq!(said(&again), (true, id), "{again:?}");
    let set = ["admin", "set-password", "--email", "root@example.com"];
    let set = wrenn(dir.path(), &set, &format!("{password}-2\n"));
    assert!(set.status.success(), "{set:?}");
    let unknown = ["admin", "set-password", "--email", "nobody@example.com"];
    let unknown = wrenn(dir.path(), &unknown, &format!("{password}\n"));
    assert!(!unknown.status.success(), "{unknown:?}");
    for output in [&made, &again, &set, &unknown] {
        assert!(!format!("{output:?}").contains(password), "{output:?}");
    }
}
