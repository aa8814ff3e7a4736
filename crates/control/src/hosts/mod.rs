//! The control plane's side of its hosts: clients, placement, and what their answers mean.

pub(crate) mod pool;
pub(crate) mod rpc;
mod scheduler;

pub(crate) use pool::{Client, Pool};
pub(crate) use scheduler::{Needs, Scheduler};
