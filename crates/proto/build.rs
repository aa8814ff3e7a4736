//! Generates the RPC code from the `.proto` files, with a compiler written in Rust so that no `protoc` has to be installed.
#![forbid(unsafe_code)]

use std::path::PathBuf;

use protox::Compiler;

const FILES: [&str; 4] = [
    "wrenn/hostagent/v1/hostagent.proto",
    "wrenn/guest/v1/run.proto",
    "process/process.proto",
    "filesystem/filesystem.proto",
];

fn main() {
    println!("cargo:rerun-if-changed=proto");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let mut compiler = Compiler::new(["proto"]).expect("the proto folder is readable");
    compiler.include_source_info(true).include_imports(true);
    for file in FILES {
        compiler
            .open_file(file)
            .unwrap_or_else(|error| panic!("{file}: {error:?}"));
    }
    let descriptors = out.join("descriptors.bin");
    std::fs::write(&descriptors, compiler.encode_file_descriptor_set()).expect("OUT_DIR is writable");
    // The generator makes cargo watch this file, which is newer than the start of the build that wrote it: with its own
    // time everything that depends on the protos would be built again each time.
    std::fs::File::options()
        .write(true)
        .open(&descriptors)
        .and_then(|file| file.set_modified(std::time::SystemTime::UNIX_EPOCH))
        .expect("OUT_DIR is writable");
    connectrpc_build::Config::new()
        .files(&FILES)
        .includes(&["proto"])
        .descriptor_set(descriptors)
        .gate_client_feature(true)
        .include_file("_wrenn.rs")
        .compile()
        .expect("the protos are valid");
}
