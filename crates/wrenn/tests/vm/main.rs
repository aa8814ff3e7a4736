//! The platform as it is used: the program itself, its public API, and real virtual machines.
//!
//! Every test starts a platform of its own (`wrenn_testkit::platform`) and ends it with `finish`, which asserts that
//! nothing of it is left: no process, no memory group, no file, no mount.

mod capacity;
mod cli;
mod clock;
mod confinement;
mod egress;
mod exec;
mod faults;
mod files;
mod fleet;
mod hostile;
mod life;
mod restart;

/// The program under test.
const WRENN: &str = env!("CARGO_BIN_EXE_wrenn");
