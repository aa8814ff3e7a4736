//! The command line as people use it: a script over a table, brought in, run, and its result fetched.

use std::process::Output;

use wrenn_testkit::platform::Platform;

use crate::WRENN;

const SCRIPT: &str = r#"
import csv, json, sys

totals = {}
with open(sys.argv[1], newline="", encoding="utf-8") as table:
    for row in csv.DictReader(table):
        totals[row["city"]] = totals.get(row["city"], 0) + int(row["amount"])
with open(sys.argv[2], "w", encoding="utf-8") as result:
    json.dump(dict(sorted(totals.items())), result, ensure_ascii=False)
print(f"{len(totals)} cities")
"#;

/// Runs the command line with the key that the platform wrote for this machine.
fn wrenn(platform: &Platform, args: &[&str]) -> Output {
    platform
        .command()
        .args(args)
        .output()
        .expect("the command line starts")
}

fn ok(platform: &Platform, args: &[&str]) -> String {
    let output = wrenn(platform, args);
    assert!(output.status.success(), "{args:?}: {output:?}");
    String::from_utf8(output.stdout)
        .expect("text")
        .trim_end()
        .to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_script_over_a_table_through_the_command_line() {
    let platform = Platform::start(WRENN).await;
    let dir = platform.scratch_dir();
    let cities = ["Zürich", "Oslo", "Kraków", "São Paulo, Centro"];
    let mut table = String::from("city,amount\n");
    let mut expected = std::collections::BTreeMap::new();
    for row in 0..5000_u64 {
        let city = cities[usize::try_from(row * 7 % 4).expect("small")];
        table.push_str(&format!("\"{city}\",{}\n", row * row % 1000));
        *expected.entry(city.to_owned()).or_insert(0) += row * row % 1000;
    }
    std::fs::write(dir.join("sales.csv"), table).expect("a table");
    std::fs::write(dir.join("sum.py"), SCRIPT).expect("a script");

    // From the platform's own folder, with nothing but what it left there.
    let id = ok(&platform, &["sandbox", "create", "--timeout", "10m"]);
    assert!(id.starts_with("sb-"), "{id}");
    let there = |path: &str| format!("{id}:{path}");
    ok(
        &platform,
        &["sandbox", "cp", "sales.csv", &there("/root/sales.csv")],
    );
    ok(&platform, &["sandbox", "cp", "sum.py", &there("/root/sum.py")]);
    let said = ok(
        &platform,
        &[
            "sandbox",
            "exec",
            &id,
            "--",
            "python3",
            "/root/sum.py",
            "/root/sales.csv",
            "/root/result.json",
        ],
    );
    assert_eq!(said, "4 cities");
    ok(
        &platform,
        &["sandbox", "cp", &there("/root/result.json"), "result.json"],
    );
    let result: std::collections::BTreeMap<String, u64> =
        serde_json::from_slice(&std::fs::read(dir.join("result.json")).expect("the result")).expect("JSON");
    assert_eq!(result, expected);

    // Exit codes and streams pass through.
    let failed = wrenn(
        &platform,
        &[
            "sandbox",
            "exec",
            &id,
            "--",
            "sh",
            "-c",
            "echo out; echo err >&2; exit 42",
        ],
    );
    assert_eq!(failed.status.code(), Some(42), "{failed:?}");
    assert_eq!(
        (failed.stdout.as_slice(), failed.stderr.as_slice()),
        (b"out\n".as_slice(), b"err\n".as_slice())
    );
    // A program's bytes are what they were, and a file copied in as a user is that user's.
    let program = wrenn(&platform, &["sandbox", "exec", &id, "--", "cat", "/bin/true"]);
    ok(&platform, &["sandbox", "cp", &there("/bin/true"), "true"]);
    assert!(
        program.stdout == std::fs::read(dir.join("true")).expect("the program"),
        "{} bytes came",
        program.stdout.len()
    );
    ok(
        &platform,
        &["sandbox", "cp", "--user", "user", "sum.py", &there("new/sum.py")],
    );
    let stat = ["stat", "-c", "%U %n", "/home/user/new", "/home/user/new/sum.py"];
    assert_eq!(
        ok(&platform, &[&["sandbox", "exec", &id, "--"], &stat[..]].concat()),
        "user /home/user/new\nuser /home/user/new/sum.py"
    );
    for copy in [["sum.py", &there("x")], [&there("/etc/passwd"), "passwd"]] {
        let refused = wrenn(
            &platform,
            &[&["sandbox", "cp", "--user", "no-one"], &copy[..]].concat(),
        );
        assert_eq!(refused.status.code(), Some(125), "{refused:?}");
        let told = String::from_utf8_lossy(&refused.stderr);
        assert!(told.contains("user") && told.contains("no-one"), "{told}");
    }
    let listed = ok(&platform, &["--json", "sandbox", "ls"]);
    let listed: serde_json::Value = serde_json::from_str(&listed).expect("JSON");
    assert_eq!(listed[0]["id"], id.as_str());
    ok(&platform, &["sandbox", "pause", &id]);
    assert_eq!(
        wrenn(&platform, &["sandbox", "exec", &id, "--", "true"])
            .status
            .code(),
        Some(125)
    );
    ok(&platform, &["sandbox", "resume", &id]);

    // A template of it, and a sandbox for one command, which is gone afterwards.
    ok(&platform, &["snapshot", "create", &id, "--name", "with-data"]);
    let ran = wrenn(
        &platform,
        &[
            "run",
            "--template",
            "with-data",
            "--",
            "sh",
            "-c",
            "wc -l < /root/sales.csv; exit 3",
        ],
    );
    assert_eq!(
        (String::from_utf8_lossy(&ran.stdout).trim(), ran.status.code()),
        ("5001", Some(3)),
        "{ran:?}"
    );
    ok(&platform, &["sandbox", "rm", &id]);
    assert_eq!(ok(&platform, &["sandbox", "ls", "--quiet"]), "");
    ok(&platform, &["snapshot", "rm", "with-data"]);
    platform.finish().await;
}

/// What the first start prints is what a newcomer pastes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_lines_that_the_first_start_prints_work_as_printed() {
    let platform = Platform::start(WRENN).await;
    let log = platform.log();
    let printed = log
        .split_once("Try it once the template is ready:\n")
        .expect("the lines")
        .1;
    let lines: Vec<&str> = printed.lines().take(3).map(str::trim).collect();
    for (line, says) in lines
        .iter()
        .zip(["\"status\":\"running\"", "42", "Linux sandbox-"])
    {
        let mut shell = std::process::Command::new("bash");
        // A shell of somebody's own: it has nothing of this test's environment that could help.
        shell.args(["-c", line]);
        for name in ["WRENN_API_KEY", "WRENN_BASE_URL", "WRENN_DIR"] {
            shell.env_remove(name);
        }
        let output = shell.output().expect("bash");
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success() && said.contains(says),
            "{line}: {output:?}"
        );
    }
    for sandbox in platform.client().sandboxes().list().await.expect("a list") {
        let sandbox = platform.client().sandbox(sandbox.id);
        sandbox.destroy_and_wait().await.expect("destroyed");
    }
    platform.finish().await;
}
