//! What the agent must know of a sandbox after it was killed: one small file in the sandbox's folder, replaced whole.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use wrenn_proto::id::{SandboxId, TeamId, TemplateId};

use crate::error::{HostError, IoContext as _, Result};
use crate::layout::{VmDir, write_private};
use crate::vmm::Shape;
use crate::vmm::process::ProcessId;

/// A sandbox's record.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) id: SandboxId,
    pub(crate) team: TeamId,
    pub(crate) template: TemplateId,
    pub(crate) generation: u64,
    /// The image it was restored from, relative to the images folder: its memory is saved as a difference to it.
    pub(crate) image: PathBuf,
    pub(crate) shape: Shape,
    pub(crate) disk_mb: u32,
    /// 0: never.
    pub(crate) timeout_sec: u32,
    pub(crate) created_at_ms: i64,
    pub(crate) last_active_at_ms: i64,
    pub(crate) token: String,
    pub(crate) envs: BTreeMap<String, String>,
    pub(crate) phase: Phase,
}

/// Where it stands, in the terms of what to do after the agent was killed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "phase", rename_all = "lowercase")]
pub(crate) enum Phase {
    /// Nobody has been told that it runs: remove it.
    Starting,
    /// Its VM runs, or is being paused: find it again and let it go on.
    Running {
        process: ProcessId,
        slot: u32,
        /// Name of its memory group.
        vm: String,
    },
    /// Its saved state is complete: any VM of it that is found has not run a single instruction yet.
    Paused,
    /// Its VM is lost.
    Error { message: String, console: String },
}

impl std::fmt::Debug for Record {
    /// The token and the environment are secrets.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Record")
            .field("id", &self.id)
            .field("generation", &self.generation)
            .field("phase", &self.phase)
            .finish_non_exhaustive()
    }
}

impl Record {
    pub(crate) fn write(&self, dir: &VmDir) -> Result<()> {
        write_private(&dir.journal(), self)
    }

    pub(crate) fn read(dir: &VmDir) -> Result<Self> {
        let path = dir.journal();
        let bytes = std::fs::read(&path).at("read the journal", &path)?;
        serde_json::from_slice(&bytes)
            .map_err(|error| HostError::Vmm(format!("its journal is damaged: {error}")))
    }
}
