//! Committed contracts: the OpenAPI document and the list of error codes.

use wrenn_control::{ErrorCode, openapi_yaml};

fn root() -> std::path::PathBuf {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Run with `UPDATE=1` to write the document anew.
#[test]
fn the_committed_openapi_document_is_the_generated_one() {
    let generated = openapi_yaml().expect("a document");
    let path = root().join("openapi.yaml");
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&path, &generated).expect("written");
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        committed == generated,
        "openapi.yaml differs from the code; run `UPDATE=1 cargo test -p wrenn-control --test contract`"
    );
}

#[test]
fn the_document_is_complete() {
    let document = openapi_yaml().expect("a document");
    assert!(
        document.starts_with("openapi: 3.1"),
        "{}",
        document.lines().next().unwrap_or_default()
    );
    for route in [
        "/v1/sandboxes:",
        "/v1/sandboxes/{id}:",
        "/v1/sandboxes/{id}/exec:",
        "/v1/sandboxes/{id}/exec/stream:",
        "/v1/sandboxes/{id}/pty:",
        "/v1/sandboxes/{id}/processes/{selector}/stream:",
        "/v1/sandboxes/{id}/files/stream/write:",
        "/v1/sandboxes/{id}/metrics:",
        "/v1/snapshots/{name}:",
        "/v1/hosts/{id}/heartbeat:",
        "/health:",
    ] {
        assert!(
            document.contains(&format!("\n  {route}\n")),
            "{route} is not described"
        );
    }
}

#[test]
fn every_operation_has_a_name_of_its_own() {
    let document = openapi_yaml().expect("a document");
    let mut names = std::collections::BTreeSet::new();
    for line in document.lines() {
        if let Some(name) = line.trim().strip_prefix("operationId: ") {
            assert!(names.insert(name.to_owned()), "two operations are called {name}");
        }
    }
    assert!(names.len() > 50, "{names:?}");
}

#[test]
fn every_error_code_is_explained() {
    let page = std::fs::read_to_string(root().join("docs/errors.md")).expect("the page");
    for code in ErrorCode::ALL {
        let row = page
            .lines()
            .find(|line| line.starts_with(&format!("| `{}` |", code.as_str())));
        let row = row.unwrap_or_else(|| panic!("{} is not explained", code.as_str()));
        let advice = row.trim_end_matches('|').rsplit('|').next().unwrap_or_default();
        assert!(advice.trim().len() > 10, "{} has no advice", code.as_str());
    }
    let rows = page.lines().filter(|line| line.starts_with("| `")).count();
    assert_eq!(
        rows,
        ErrorCode::ALL.len(),
        "the page explains codes that do not exist"
    );
}

/// Suites that need no database, or bring their own.
const ONE_DATABASE: [&str; 6] = [
    "contract",
    "postgres",
    "database",
    "fleet",
    "queries",
    "schemathesis",
];

#[test]
fn every_suite_runs_on_postgres_too() {
    let folder = root().join("crates/control/tests");
    let listed = std::fs::read_to_string(folder.join("postgres.rs")).expect("the list");
    for entry in std::fs::read_dir(&folder).expect("the suites") {
        let path = entry.expect("an entry").path();
        let Some(suite) = path
            .file_name()
            .and_then(|name| name.to_str()?.strip_suffix(".rs"))
        else {
            continue;
        };
        assert!(
            ONE_DATABASE.contains(&suite) || listed.contains(&format!("#[path = \"{suite}.rs\"]")),
            "tests/{suite}.rs is not in tests/postgres.rs"
        );
    }
}
