//! Virtual machine monitors. An enum rather than a trait: whatever is asked of a VM has to be answered for each
//! VMM here, or be refused before anything is done. QEMU is the first.
//!
//! A VM goes through phases that are consumed by value, each knowing how to unwind: a directory with a disk
//! (prepared by the manager) → `qemu::Launched` (process up, memory mapped, nothing runs) → `qemu::Vm` (guest runs).

pub(crate) mod folder;
pub(crate) mod limits;
pub mod probe;
pub(crate) mod process;
pub(crate) mod qemu;
mod qmp;

pub use limits::MemoryCgroup;
pub use probe::{ProbeReport, probe_cached, probe_fresh, probe_in_child};
pub use qemu::{Qemu, VmIds};

use serde::{Deserialize, Serialize};

/// Which VMM, version and processor model a memory image belongs to. It can be restored only by the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    /// `qemu`.
    pub vmm: String,
    /// For example `10.0.2`.
    pub version: String,
    /// `kvm` or `tcg`.
    pub accelerator: Accelerator,
    /// CPU model given to the guest; with `kvm` it includes the host's model name.
    pub cpu: String,
    /// Machine type.
    pub machine: String,
}

/// How guest instructions are executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    /// Hardware virtualisation.
    Kvm,
    /// Software emulation.
    Tcg,
}

impl Accelerator {
    /// As in QEMU's options and in reports.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// Size of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Shape {
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory in MiB.
    pub memory_mb: u32,
}
