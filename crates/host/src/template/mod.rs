//! Templates: what sandboxes start from.
//!
//! A template has one or more *images*. An image is a VM frozen after its boot: memory, device state, disk, and a
//! manifest that says what can restore it. The built-in template has an image per shape (vCPUs, memory), made
//! when first asked for; a template made from a sandbox has one, of the sandbox's shape.
//!
//! ```text
//! packages ──mmdebstrap──▶ root filesystem ─┐
//! kernel package ──unpack──▶ vmlinux ───────┼──boot once──▶ agent answers ──▶ image
//! envd + modules ──cpio──▶ initramfs ───────┘
//! ```

mod boot;
mod groups;
mod initramfs;
mod kernel;
mod mirror;
mod rootfs;
pub(crate) mod store;

pub(crate) use kernel::run;
pub use kernel::{Kernel, tool_path};
pub use mirror::DebianMirror;
pub(crate) use store::{Image, TemplateStore};

use std::sync::Arc;

use tokio::sync::watch;

/// How far a template's making is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BuildState {
    /// Under way.
    Building {
        /// 0 to 100.
        percent: u32,
        /// What is being done.
        step: String,
    },
    /// Sandboxes can start from it.
    Ready {
        /// Bytes on disk.
        size_bytes: u64,
    },
    /// It could not be made; why, and what to do.
    Failed(String),
}

/// Tells the world how far a build is. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Progress(Arc<watch::Sender<BuildState>>);

impl Progress {
    pub(crate) fn new() -> Self {
        Self(Arc::new(watch::Sender::new(BuildState::Building {
            percent: 0,
            step: "waiting to start".to_owned(),
        })))
    }

    pub(crate) fn set(&self, state: BuildState) {
        self.0.send_replace(state);
    }

    pub(crate) fn step(&self, percent: u32, step: impl Into<String>) {
        let step = step.into();
        tracing::debug!(percent, step, "template build");
        self.set(BuildState::Building { percent, step });
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<BuildState> {
        self.0.subscribe()
    }
}

/// The guest agent, as embedded in this binary.
pub(crate) static ENVD: &[u8] = include_bytes!(env!("WRENN_ENVD"));

/// First 16 hex digits of the SHA-256 of the parts, each ended by a zero byte.
fn fingerprint(parts: &[&[u8]]) -> String {
    use sha2::Digest as _;
    let mut hasher = sha2::Sha256::new();
    for part in parts {
        hasher.update(part);
        hasher.update([0]);
    }
    hex::encode(&hasher.finalize()[..8])
}
