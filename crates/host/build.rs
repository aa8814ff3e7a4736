//! Builds the guest agent as a static binary, to be embedded: the product is one file.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    let env = |name: &str| std::env::var_os(name).unwrap_or_else(|| panic!("cargo sets {name}"));
    let workspace = Path::new(&env("CARGO_MANIFEST_DIR")).join("../..");
    for input in [
        "crates/envd/src",
        "crates/envd/Cargo.toml",
        "crates/proto/src",
        "crates/proto/proto",
        "Cargo.toml",
        "Cargo.lock",
    ] {
        println!("cargo:rerun-if-changed={}", workspace.join(input).display());
    }
    let arch = std::env::var("CARGO_CFG_TARGET_ARCH").expect("cargo sets it");
    let target = format!("{arch}-unknown-linux-gnu");
    // A folder of its own: this cargo runs while the outer one holds the lock of the usual folder.
    let target_dir = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| workspace.join("target"), PathBuf::from)
        .join("guest");
    let status = Command::new(env("CARGO"))
        .current_dir(&workspace)
        .args([
            "build",
            "--quiet",
            "--locked",
            "--package",
            "envd",
            "--profile",
            "guest",
            "--target",
            &target,
        ])
        .arg("--target-dir")
        .arg(&target_dir)
        // The guest holds any Debian or none at all: no shared library can be counted on.
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .status()
        .expect("cargo runs");
    assert!(status.success(), "building the guest agent failed");
    let binary = target_dir.join(target).join("guest/envd");
    println!("cargo:rustc-env=WRENN_ENVD={}", binary.display());
}
