//! `envd`, the agent inside every guest.
//!
//! One static binary, three roles:
//!
//! 1. **initramfs** (pid 1, started by the kernel as `/init`): loads drivers, mounts the root disk and
//!    switches to it ([`boot::initramfs`]);
//! 2. **init** (pid 1 in the real root): mounts, network, supervision of the agent, reaping ([`boot::init`]);
//! 3. **serve**: the agent itself, an ordinary process that serves HTTP and Connect RPC ([`serve`]).
//!
//! Only the third role runs an async runtime. The first two are single-threaded and do as little as they can,
//! because the kernel panics when pid 1 dies.
#![deny(unsafe_code)]

mod boot;
mod files;
mod freezer;
mod http;
mod logging;
mod process;
mod serve;
mod state;
mod unsafe_calls;
mod users;

use std::ffi::OsString;
use std::process::ExitCode;

use crate::logging::log;

const USAGE: &str = "usage:
  envd init                     run as pid 1 of a guest's root filesystem
  envd serve [options]          run the agent
      --port PORT               TCP port on all addresses (default 49983; 0 picks a free one)
      --listen ADDR:PORT        listen on this address only
      --port-file FILE          write the chosen port to FILE once the agent listens
      --state-dir DIR           keep the agent's settings in DIR, so that a restarted agent has them
  envd --version";

fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().collect();
    let role = args.get(1).and_then(|arg| arg.to_str());
    let as_kernel_init = args.first().is_some_and(|name| name == "/init");
    match role {
        Some("init") => boot::init::run(),
        Some("serve") => match serve::Options::parse(args.get(2..).unwrap_or_default()) {
            Ok(options) => serve::run(options),
            Err(message) => {
                eprintln!("envd: {message}\n{USAGE}");
                ExitCode::from(2)
            }
        },
        Some("--version") => {
            println!(
                "envd {} (contract {})",
                env!("CARGO_PKG_VERSION"),
                wrenn_proto::guest::ENVD_VERSION
            );
            ExitCode::SUCCESS
        }
        // The kernel passes its unknown command line words on as arguments, so the name decides.
        _ if as_kernel_init && rustix::process::getpid().is_init() => boot::initramfs::run(),
        _ => {
            log!("no role given");
            eprintln!("{USAGE}");
            ExitCode::from(2)
        }
    }
}
