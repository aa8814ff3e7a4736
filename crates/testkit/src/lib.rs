//! Test support.
//!
//! [`simhost`] is a host agent without VMs: it serves the real RPC over a model in memory, registers
//! like a real agent, and lets a test hold, release and fail each call. [`platform`] is the real thing: the
//! program itself with real VMs, and checks that nothing of it is left at the end. [`servers`] are PostgreSQL and Redis,
//! one for a test.
#![forbid(unsafe_code)]

pub mod platform;
pub mod servers;
pub mod simhost;
