//! Test support.
//!
//! [`simhost`] is a host agent without VMs: it serves the real RPC over a model in memory, registers
//! like a real agent, and lets a test hold, release and fail each call.
#![forbid(unsafe_code)]

pub mod simhost;
