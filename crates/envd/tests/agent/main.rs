//! The agent as its clients see it: the real binary, over real HTTP.
//!
//! The tests run as whoever starts them, root or not: processes and files belong to the current user.

mod errors;
mod files;
mod filesystem;
mod harness;
mod init;
mod process;
mod process_io;
mod run;
mod spare;
mod watch;
