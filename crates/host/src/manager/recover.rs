//! What a starting agent does about what an earlier one left: running VMs are taken over, saved ones remembered,
//! half-made ones removed, and processes that belong to none of these are ended.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures::StreamExt as _;
use wrenn_proto::id::SandboxId;
use wrenn_proto::rest::SandboxStatus;

use super::driver::{Driver, Origin};
use super::journal::{Phase, Record};
use super::{Entry, Event, Manager, vm};
use crate::error::{HostError, IoContext as _, Result};
use crate::layout::VmDir;
use crate::offload::blocking;
use crate::vmm::folder;
use crate::vmm::process::{ProcessId, VmmProcess, processes};

/// Sandboxes taken up at a time.
const TAKEN_UP_AT_ONCE: usize = 8;

impl Manager {
    /// Brings the sandboxes of an earlier agent back under care. Call once, before serving.
    pub(crate) async fn recover(&self) -> Result<()> {
        let shared = &self.shared;
        let sandboxes = shared.layout.sandboxes();
        let (mut found, mut unreadable) = (Vec::new(), Vec::new());
        for entry in std::fs::read_dir(&sandboxes).at("list", &sandboxes)? {
            let dir = VmDir::new(entry.at("list", &sandboxes)?.path());
            match Record::read(&dir) {
                Ok(Some(record)) if record.phase != Phase::Starting => found.push((dir, record)),
                // Nobody was told that it runs.
                Ok(Some(_)) => self.sweep(&dir),
                // It was killed before its first journal: only a finished pause leaves this file.
                Ok(None) if !dir.memory_diff().exists() => self.sweep(&dir),
                Ok(None) => unreadable.push((dir, "its journal is gone".to_owned())),
                Err(error) => unreadable.push((dir, error.to_string())),
            }
        }
        // Somebody's work is in there, and the next start may be able to read it: nothing of it is touched.
        let spared: Vec<PathBuf> = unreadable
            .iter()
            .map(|(dir, _)| dir.path().to_path_buf())
            .collect();
        for (dir, why) in unreadable {
            tracing::error!(dir = %dir.path().display(), why, "a sandbox's journal cannot be used; its files are kept");
            let id = dir
                .path()
                .file_name()
                .and_then(|name| name.to_str()?.parse().ok());
            let Some(id) = id else { continue };
            let message = format!("{why}. Its files are kept in {}", dir.path().display());
            let record = Record::unreadable(id, message);
            let handle = Driver::start(Arc::clone(shared), dir, record, Origin::Error);
            shared.sandboxes().insert(id, Entry::Live(handle));
        }
        let keep: HashSet<ProcessId> = found
            .iter()
            .filter_map(|(_, record)| match record.phase {
                Phase::Running { process, .. } => Some(process),
                _ => None,
            })
            .collect();
        end_strays(shared.layout.data(), &keep, &spared).await;
        let mut counts = (0, 0, 0);
        // Several at a time: one whose process hangs takes its time to be given up.
        let mut taken_up = futures::stream::iter(found)
            .map(|(dir, record)| self.take_up(dir, record))
            .buffer_unordered(TAKEN_UP_AT_ONCE);
        while let Some(state) = taken_up.next().await {
            match state {
                SandboxStatus::Running => counts.0 += 1,
                SandboxStatus::Paused => counts.1 += 1,
                _ => counts.2 += 1,
            }
        }
        drop(taken_up);
        self.clear_work().await?;
        shared.collect_images();
        if counts != (0, 0, 0) {
            tracing::info!(
                running = counts.0,
                paused = counts.1,
                lost = counts.2,
                "found the sandboxes of an earlier run"
            );
        }
        Ok(())
    }

    /// Brings one sandbox with a journal back under care.
    async fn take_up(&self, dir: VmDir, mut record: Record) -> SandboxStatus {
        let shared = &self.shared;
        let complain = |error: &HostError, id: SandboxId, what: &str| {
            tracing::error!(sandbox = %id, error = error as &dyn std::error::Error, "{what}");
        };
        if let Err(error) = record.upgrade(&dir) {
            complain(&error, record.id, "cannot renew a sandbox's folder");
        }
        let (origin, reason) = match record.phase.clone() {
            Phase::Running { process, slot, vm } => {
                match self.adopt(&dir, &record, process, slot, &vm).await {
                    Ok(running) => (Origin::Running(Box::new(running)), Some("adopted")),
                    Err(error) => {
                        record.phase = Phase::Error {
                            message: error.to_string(),
                            console: String::new(),
                        };
                        // Of one sandbox; the others are to be served.
                        if let Err(error) = record.write(&dir) {
                            complain(&error, record.id, "cannot write a journal");
                        }
                        (Origin::Error, Some("vmm_exited"))
                    }
                }
            }
            Phase::Error { .. } => (Origin::Error, None),
            Phase::Paused | Phase::Starting => (Origin::Paused, None),
        };
        if !matches!(origin, Origin::Running(_))
            && let Err(error) = folder::take_back(&dir.work())
        {
            complain(&error, record.id, "cannot take a folder back");
        }
        let id = record.id;
        let handle = Driver::start(Arc::clone(shared), dir, record, origin);
        let view = handle.view.borrow().clone();
        let state = view.state;
        if let Some(reason) = reason {
            shared.emit(Event { view, reason });
        }
        shared.sandboxes().insert(id, Entry::Live(handle));
        state
    }

    /// Removes what was cut off in the middle: files of template builds and of the pool. Call when no task is left.
    pub(super) async fn end_work(&self) {
        if let Err(error) = self.clear_work().await {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "unfinished work is left to the next start"
            );
        }
    }

    /// Removes files of unfinished work, after the processes that worked there.
    async fn clear_work(&self) -> Result<()> {
        let shared = Arc::clone(&self.shared);
        blocking(move || {
            for folder in [shared.layout.tmp(), shared.layout.pool()] {
                for entry in std::fs::read_dir(&folder).at("list", &folder)?.flatten() {
                    let path = entry.path();
                    let removed = if path.is_dir() {
                        std::fs::remove_dir_all(&path)
                    } else {
                        std::fs::remove_file(&path)
                    };
                    if let Err(error) = removed {
                        tracing::warn!(path = %path.display(), %error, "cannot remove unfinished work");
                    }
                }
            }
            shared.qemu.cgroup.sweep();
            Ok(())
        })
        .await
    }

    async fn adopt(
        &self,
        dir: &VmDir,
        record: &Record,
        process: ProcessId,
        slot: u32,
        name: &str,
    ) -> Result<vm::Running> {
        let slot = self
            .shared
            .slots
            .take_exactly(slot)
            .ok_or_else(|| HostError::Vmm("its place is another sandbox's".to_owned()))?;
        vm::adopt(&self.shared, dir, record, process, name, slot).await
    }

    fn sweep(&self, dir: &VmDir) {
        let grave = self
            .shared
            .layout
            .tmp()
            .join(format!("swept-{}", uuid::Uuid::new_v4().simple()));
        if let Err(error) = std::fs::rename(dir.path(), &grave) {
            tracing::warn!(dir = %dir.path().display(), %error, "cannot remove a half-made sandbox");
        }
    }
}

/// Kills VMM processes that work in this agent's folders without a journal that names them: those started
/// right before an earlier agent was killed.
async fn end_strays(data: &Path, keep: &HashSet<ProcessId>, spared: &[PathBuf]) {
    let folders = ["sandboxes", "pool", "tmp"].map(|folder| data.join(folder));
    end_vmms(|pid, cwd| {
        folders.iter().any(|folder| cwd.starts_with(folder))
            && !spared.iter().any(|folder| cwd.starts_with(folder))
            && !keep.iter().any(|process| process.pid == pid)
    })
    .await;
}

/// Ends the VMM processes that work in one sandbox's folder.
pub(super) async fn end_vmms_in(dir: &VmDir) {
    end_vmms(|_, cwd| cwd.starts_with(dir.path())).await;
}

async fn end_vmms(ours: impl Fn(u32, &Path) -> bool) {
    for (pid, process) in processes() {
        let Ok(cwd) = std::fs::read_link(process.join("cwd")) else {
            continue;
        };
        // Or on the way to become one: the programs that set limits and drop privileges before QEMU starts.
        let is_vmm = std::fs::read_to_string(process.join("comm")).is_ok_and(|comm| {
            comm.starts_with("qemu-system") || matches!(comm.trim_end(), "prlimit" | "setpriv")
        });
        if !is_vmm || !ours(pid, &cwd) {
            continue;
        }
        if let Some(mut process) = VmmProcess::find(pid) {
            tracing::warn!(pid, cwd = %cwd.display(), "ending a VM that no sandbox claims");
            process.kill().await;
        }
    }
}
