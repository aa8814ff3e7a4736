//! What keeps a VMM process within its means: a memory cgroup where the agent may make one, resource limits everywhere.

use std::io;
use std::path::PathBuf;

/// Memory that QEMU needs beside its guest's: code, device state, I/O buffers and the translation cache.
const OVERHEAD_BYTES: u64 = 320 << 20;

/// Limits of one VM.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) memory_mb: u32,
    pub(crate) disk_mb: u32,
}

/// Where per-VM memory groups are made on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MemoryCgroup {
    /// cgroup v2 below this folder, whose `memory` controller is delegated to the agent.
    V2(PathBuf),
    /// cgroup v1 memory hierarchy below this folder.
    V1(PathBuf),
    /// None that the agent may use: address-space limits stand in.
    Unavailable,
}

impl MemoryCgroup {
    /// Looks for a hierarchy in which a group can be made, and tries it.
    #[must_use]
    pub fn detect() -> Self {
        for root in ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"] {
            let root = PathBuf::from(root);
            let delegated = std::fs::read_to_string(root.join("cgroup.subtree_control"))
                .is_ok_and(|controllers| controllers.split_ascii_whitespace().any(|name| name == "memory"));
            if delegated && let Some(group) = usable(root.join("wrenn"), "memory.max") {
                // Without this the group's children have no memory controller.
                if std::fs::write(group.join("cgroup.subtree_control"), "+memory").is_ok() {
                    return Self::V2(group);
                }
            }
        }
        match usable(
            PathBuf::from("/sys/fs/cgroup/memory/wrenn"),
            "memory.limit_in_bytes",
        ) {
            Some(group) => Self::V1(group),
            None => Self::Unavailable,
        }
    }

    fn group(&self, name: &str) -> Option<PathBuf> {
        match self {
            Self::V2(root) | Self::V1(root) => Some(root.join(name)),
            Self::Unavailable => None,
        }
    }

    /// The resource limits with which a VMM process starts, in the words of util-linux's `prlimit`, which sets them on
    /// itself and becomes the program behind it. From outside they could be set only with a capability
    /// (`CAP_SYS_RESOURCE`) that an agent in a container may lack.
    pub(crate) fn resource_limits(&self, limits: Limits) -> Vec<String> {
        // A full disk image with its tables, and nothing else of that size.
        let file_size = (u64::from(limits.disk_mb) << 20) / 16 * 17 + (64 << 20);
        let mut arguments = vec![
            "--core=0".to_owned(),
            "--nofile=1024".to_owned(),
            format!("--fsize={file_size}"),
        ];
        if matches!(self, Self::Unavailable) {
            // Address space is not memory: QEMU maps far more than it uses (thread stacks, the translation cache).
            arguments.push(format!("--as={}", memory_bytes(limits) + (4 << 30)));
        }
        arguments
    }

    /// Puts process `pid` under `limits` in a group called `name`.
    pub(crate) fn confine(&self, name: &str, pid: u32, limits: Limits) -> io::Result<()> {
        let memory = memory_bytes(limits);
        let Some(group) = self.group(name) else {
            return Ok(());
        };
        let file = match self {
            Self::V2(_) => "memory.max",
            Self::V1(_) | Self::Unavailable => "memory.limit_in_bytes",
        };
        // Another agent of this machine may sweep the group away while it is empty: then it is made again.
        let mut attempts = 0;
        loop {
            let entered = make_dir(&group)
                .and_then(|()| std::fs::write(group.join(file), memory.to_string()))
                .and_then(|()| std::fs::write(group.join("cgroup.procs"), pid.to_string()));
            match entered {
                Err(error) if error.kind() == io::ErrorKind::NotFound && attempts < 5 => attempts += 1,
                outcome => return outcome,
            }
        }
    }

    /// Removes the groups that no process is in, which is what killed agents leave.
    pub(crate) fn sweep(&self) {
        let (Self::V1(root) | Self::V2(root)) = self else {
            return;
        };
        for entry in std::fs::read_dir(root).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                // The kernel refuses while a process is in it, of this agent or another.
                let _ = std::fs::remove_dir(entry.path());
            }
        }
    }

    /// Removes the group of a VM whose process has ended.
    pub(crate) fn remove(&self, name: &str) {
        if let Some(group) = self.group(name)
            && let Err(error) = std::fs::remove_dir(&group)
            && !matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::ResourceBusy
            )
        {
            tracing::warn!(group = %group.display(), %error, "cannot remove a VM's memory group");
        }
    }
}

fn make_dir(path: &std::path::Path) -> io::Result<()> {
    match std::fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

fn memory_bytes(limits: Limits) -> u64 {
    (u64::from(limits.memory_mb) << 20) + OVERHEAD_BYTES
}

fn usable(group: PathBuf, control: &str) -> Option<PathBuf> {
    make_dir(&group).ok()?;
    // A folder can be made in places where its controller is missing.
    std::fs::File::options()
        .write(true)
        .open(group.join(control))
        .is_ok()
        .then_some(group)
}
