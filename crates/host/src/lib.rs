//! The host agent: owns the virtual machines of one machine.
//!
//! Start reading at [`HostAgent`]; a sandbox's life is in `manager`, its VM in `vmm`, its template in `template`.
// Denied rather than forbidden for the sake of one module: `vmm::probe::kvm` hands memory to the kernel as a guest's.
#![deny(unsafe_code)]

mod agent;
mod disk;
mod error;
mod guest;
mod layout;
mod manager;
mod memory;
pub mod net;
mod offload;
mod register;
mod rpc;
mod template;
pub mod vmm;

pub use agent::{HostAgent, HostConfig, OnExit};
pub use error::HostError;
pub use layout::Layout;
pub use manager::{Capacity, FaultHook, Step, meminfo_mb};
pub use register::registered_host;
pub use template::{BuildState, DebianMirror, tool_path};
