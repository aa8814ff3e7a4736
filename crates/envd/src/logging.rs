//! Log lines of the agent: short, to standard error, which is the console in a guest.
//!
//! A guest's console is read by the host, and each byte costs an exit from the VM. There is no level to
//! configure: what is logged is worth reading.

use std::fmt::Arguments;
use std::io::Write;

/// Writes one line; never fails and never panics, because pid 1 logs too.
pub(crate) fn write_line(message: Arguments<'_>) {
    let mut line = format!("envd: {message}");
    line.push('\n');
    let _ = std::io::stderr().write_all(line.as_bytes());
}

macro_rules! log {
    ($($arg:tt)*) => { $crate::logging::write_line(format_args!($($arg)*)) };
}
pub(crate) use log;
