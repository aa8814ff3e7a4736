//! What a platform may leave behind, and does not.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{eventually, vm_processes};

/// Where the memory groups of VM processes can be; the host agent uses one of these.
const GROUP_ROOTS: [&str; 3] = [
    "/sys/fs/cgroup/memory/wrenn",
    "/sys/fs/cgroup/wrenn",
    "/sys/fs/cgroup/unified/wrenn",
];

/// Memory groups without a process.
///
/// Platforms of other tests run at the same time, and the groups of one machine are in one place. What is
/// certain of a group that outlives its VM: no process is in it, and it was not there before.
#[derive(Debug, Clone, Default)]
pub struct EmptyGroups(BTreeSet<PathBuf>);

impl EmptyGroups {
    /// Those that are there now.
    #[must_use]
    pub fn now() -> Self {
        let mut found = BTreeSet::new();
        for root in GROUP_ROOTS {
            let Ok(entries) = std::fs::read_dir(root) else {
                continue;
            };
            for entry in entries.flatten() {
                let path = entry.path();
                // One that goes away meanwhile cannot be read, and is no leak.
                if std::fs::read_to_string(path.join("cgroup.procs")).is_ok_and(|pids| pids.trim().is_empty())
                {
                    found.insert(path);
                }
            }
        }
        Self(found)
    }

    /// Waits until none is left but those of `before`. The group of a VM that just starts or ends is empty
    /// for a moment too.
    ///
    /// # Panics
    /// When some stay.
    pub async fn none_since(before: &Self) {
        let suspects: BTreeSet<PathBuf> = Self::now().0.difference(&before.0).cloned().collect();
        eventually(
            &format!("memory groups {suspects:?} are removed"),
            Duration::from_secs(20),
            async || suspects.is_disjoint(&Self::now().0).then_some(()),
        )
        .await;
    }
}

/// Asserts that no VM process and no mount is left below a folder.
///
/// # Panics
/// When there is one.
pub async fn assert_no_vm_below(dir: &Path) {
    let start = std::time::Instant::now();
    loop {
        let left = vm_processes(dir);
        if left.is_empty() {
            break;
        }
        if start.elapsed() > Duration::from_secs(10) {
            let places: Vec<_> = left
                .iter()
                .map(|pid| (pid, std::fs::read_link(format!("/proc/{pid}/cwd")).ok()))
                .collect();
            panic!("VMs are left: {places:?}");
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let below: Vec<&str> = mounts
        .lines()
        .filter(|line| line.contains(&*dir.to_string_lossy()))
        .collect();
    assert!(below.is_empty(), "mounts are left: {below:?}");
}

/// Names of the entries of a folder; none when it is missing.
#[must_use]
pub fn names(dir: &Path) -> BTreeSet<String> {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return BTreeSet::new();
    };
    entries
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}
