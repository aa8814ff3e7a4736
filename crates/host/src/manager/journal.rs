//! What the agent must know of a sandbox after it was killed: one small file in the sandbox's folder, replaced whole.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use wrenn_proto::id::{SandboxId, TeamId, TemplateId};

use crate::error::{HostError, IoContext as _, Result};
use crate::layout::{VmDir, write_private};
use crate::vmm::Shape;
use crate::vmm::process::ProcessId;

/// The form of the record and its folder that this agent writes, and the newest that it reads. Before 2 the disk was
/// beside the record.
const VERSION: u32 = 2;

/// A sandbox's record.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Record {
    /// Absent in the first records, which had this form already.
    #[serde(default = "first_version")]
    pub(crate) version: u32,
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
    /// What can be said of a sandbox whose journal cannot be read: that it is there. Never written.
    pub(crate) fn unreadable(id: SandboxId, message: String) -> Self {
        Self {
            version: VERSION,
            id,
            team: TeamId(uuid::Uuid::nil()),
            template: TemplateId(uuid::Uuid::nil()),
            generation: 0,
            image: PathBuf::new(),
            shape: Shape {
                vcpus: 0,
                memory_mb: 0,
            },
            disk_mb: 0,
            timeout_sec: 0,
            created_at_ms: 0,
            last_active_at_ms: 0,
            token: String::new(),
            envs: BTreeMap::new(),
            phase: Phase::Error {
                message,
                console: String::new(),
            },
        }
    }

    pub(crate) fn write(&self, dir: &VmDir) -> Result<()> {
        write_private(&dir.journal(), self)
    }

    /// The record in a sandbox's folder; `None` when there is no journal.
    pub(crate) fn read(dir: &VmDir) -> Result<Option<Self>> {
        let path = dir.journal();
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).at("read the journal", &path),
        };
        let damaged = |why: String| HostError::Vmm(format!("its journal is damaged: {why}"));
        let record: Self = serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
        if record.version > VERSION {
            return Err(damaged(format!(
                "version {} is newer than this host agent's {VERSION}",
                record.version
            )));
        }
        if dir.path().file_name() != Some(record.id.to_string().as_ref()) {
            return Err(damaged(format!("it is of {}", record.id)));
        }
        Ok(Some(record))
    }

    /// Brings a folder of an earlier version into today's form. Its VM, if it has one, works where it did.
    pub(crate) fn upgrade(&mut self, dir: &VmDir) -> Result<()> {
        if self.version == VERSION || !matches!(self.phase, Phase::Paused | Phase::Error { .. }) {
            return Ok(());
        }
        let disk = dir.path().join(VmDir::DISK);
        if disk.exists() {
            let work = dir.work();
            std::fs::create_dir_all(&work).at("create", &work)?;
            std::fs::rename(&disk, dir.disk()).at("move", &disk)?;
        }
        self.version = VERSION;
        self.write(dir)
    }
}

fn first_version() -> u32 {
    1
}

pub(crate) fn current_version() -> u32 {
    VERSION
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "sb-01a21789-42b3-73a0-b5b3-ab909ef7cc3c";
    /// As the first agents wrote it.
    const FIRST: &str = r#"{"id":"sb-01a21789-42b3-73a0-b5b3-ab909ef7cc3c",
        "team":"team-00000000-0000-0000-0000-000000000001","template":"tpl-00000000-0000-0000-0000-000000000000",
        "generation":3,"image":"teams/x/y","shape":{"vcpus":1,"memory_mb":512},"disk_mb":20480,"timeout_sec":0,
        "created_at_ms":1,"last_active_at_ms":2,"token":"00","envs":{},"phase":{"phase":"paused"}}"#;

    fn folder(name: &str, journal: &str) -> (tempfile::TempDir, VmDir) {
        let root = tempfile::tempdir().expect("a folder");
        let dir = VmDir::new(root.path().join(name));
        std::fs::create_dir(dir.path()).expect("a folder");
        std::fs::write(dir.journal(), journal).expect("written");
        (root, dir)
    }

    #[test]
    fn a_first_record_is_still_read() {
        let (_root, dir) = folder(ID, FIRST);
        let record = Record::read(&dir).expect("readable").expect("there");
        assert_eq!((record.generation, &record.phase), (3, &Phase::Paused));
        std::fs::write(dir.path().join(VmDir::DISK), "disk").expect("written");
        let mut record = record;
        for _ in 0..2 {
            record.upgrade(&dir).expect("upgraded");
            assert_eq!(std::fs::read_to_string(dir.disk()).expect("moved"), "disk");
        }
        let again = Record::read(&dir).expect("readable").expect("there");
        assert_eq!(again.version, VERSION);
    }

    #[test]
    fn what_is_not_understood_is_said_so() {
        for (name, journal) in [
            (ID, "{"),
            (ID, ""),
            (ID, &FIRST.replace("\"paused\"", "\"dreaming\"")),
            (ID, &FIRST.replacen('{', "{\"version\":3,", 1)),
            ("sb-01a21789-42b3-73a0-b5b3-ab909ef7cc3d", FIRST),
        ] {
            let (_root, dir) = folder(name, journal);
            assert!(Record::read(&dir).is_err(), "{name}: {journal}");
        }
        let (_root, dir) = folder(ID, FIRST);
        std::fs::remove_file(dir.journal()).expect("removed");
        assert!(Record::read(&dir).expect("nothing there").is_none());
    }
}
