//! User processes.
//!
//! ```text
//!            stdout ─ pump ─┐                 ┌─ bounded queue ─ Start stream
//!  process ─ stderr ─ pump ─┼─ hub (per process) ─ bounded queue ─ Connect stream
//!            pidfd ─ supervisor ──────────────┘   (no subscriber: output is dropped)
//! ```
//!
//! - A process leads its own session. A signal goes to everything in that session, so that nothing it started
//!   outlives a kill.
//! - A pump hands each chunk to every subscriber before it reads the next one. A client that stops reading
//!   therefore fills its queue, then the pipe, and finally stops the process: nothing grows without bound.
//! - A client that disconnects is only a subscriber less. What ends a process is its own exit, a signal, or the
//!   deadline of the request that started it.
//! - The supervisor reaps the process the moment it ends. The end is announced after its output; what
//!   grandchildren still write afterwards is waited for only as long as it keeps coming ([`pump`]).
//! - A command whose caller wants its whole output at once has a thread instead of these tasks ([`run`]), and becomes of a
//!   child that was made ahead of time ([`spare`]).
//! - An ended process leaves the table; its exit is kept for late subscribers ([`table`]).

mod child;
mod oom;
mod pump;
pub(crate) mod run;
pub(crate) mod service;
mod session;
mod spare;
pub(crate) mod spawn;
pub(crate) mod stream;
pub(crate) mod table;
