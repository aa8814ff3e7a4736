//! Remembers the probe's verdict for as long as nothing changes that it depends on.
//!
//! Only verdicts of a guest that had its chance are kept: what an `open` tells is asked each time, so that joining
//! the group `kvm` takes effect at once.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::{Deserialize, Serialize};

use super::{CHILD_COMMAND, DEVICE, Outcome, ProbeReport, run_child, without_a_guest};
use crate::vmm::{Accelerator, MemoryCgroup, Qemu};

/// Largest cache file that is read.
const LIMIT: u64 = 16 << 10;

/// What a verdict holds for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Key {
    /// The rules by which the verdict was found.
    program: String,
    boot_id: String,
    cpu: String,
    /// Empty when there is none that can be used.
    qemu: String,
    /// File system, device number, inode and mode of the device.
    device: (u64, u64, u64, u32),
}

impl Key {
    fn here() -> Option<Self> {
        let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
            .ok()?
            .trim()
            .to_owned();
        let device = std::fs::metadata(DEVICE).ok()?;
        let (qemu, cpu) = match Qemu::find(Accelerator::Tcg, MemoryCgroup::Unavailable, None) {
            Ok(qemu) => (qemu.platform().version, qemu.host_cpu),
            Err(_) => (String::new(), String::new()),
        };
        let device = (
            device.dev(),
            device.rdev(),
            device.ino(),
            device.permissions().mode(),
        );
        Some(Self {
            program: env!("CARGO_PKG_VERSION").to_owned(),
            boot_id,
            cpu,
            qemu,
            device,
        })
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    key: Key,
    report: ProbeReport,
}

fn path(cache_dir: &Path) -> PathBuf {
    cache_dir.join("accelerator.json")
}

fn read(cache_dir: &Path, key: &Key) -> Option<ProbeReport> {
    use std::io::Read as _;
    let mut bytes = Vec::new();
    std::fs::File::open(path(cache_dir))
        .ok()?
        .take(LIMIT)
        .read_to_end(&mut bytes)
        .ok()?;
    let entry: Entry = serde_json::from_slice(&bytes).ok()?;
    (entry.key == *key).then_some(entry.report)
}

/// Written beside its place and renamed into it, so that a reader finds a whole one. Failing costs time alone.
fn write(cache_dir: &Path, entry: &Entry) {
    let attempt = || -> std::io::Result<()> {
        std::fs::create_dir_all(cache_dir)?;
        let partial = cache_dir.join(format!(".accelerator.{}", uuid::Uuid::new_v4().simple()));
        let text = serde_json::to_vec_pretty(entry).map_err(std::io::Error::other)?;
        let written =
            std::fs::write(&partial, text).and_then(|()| std::fs::rename(&partial, path(cache_dir)));
        if written.is_err() {
            let _ = std::fs::remove_file(&partial);
        }
        written
    };
    if let Err(error) = attempt() {
        tracing::debug!(%error, dir = %cache_dir.display(), "cannot remember the accelerator's verdict");
    }
}

/// The remembered verdict, or else a new one as of [`probe_fresh`].
#[must_use]
pub fn probe_cached(cache_dir: &Path, program: &Path) -> ProbeReport {
    if let Some(report) = without_a_guest(Path::new(DEVICE)) {
        return report;
    }
    let key = Key::here();
    match key.as_ref().and_then(|key| read(cache_dir, key)) {
        Some(report) => report,
        None => probe_and_keep(cache_dir, program, key),
    }
}

/// A new verdict as of [`super::probe_in_child`], remembered for the next [`probe_cached`].
#[must_use]
pub fn probe_fresh(cache_dir: &Path, program: &Path) -> ProbeReport {
    match without_a_guest(Path::new(DEVICE)) {
        Some(report) => report,
        None => probe_and_keep(cache_dir, program, Key::here()),
    }
}

fn probe_and_keep(cache_dir: &Path, program: &Path, key: Option<Key>) -> ProbeReport {
    let Outcome { report, lasting } = run_child(Command::new(program).arg(CHILD_COMMAND));
    if lasting && let Some(key) = key {
        write(
            cache_dir,
            &Entry {
                key,
                report: report.clone(),
            },
        );
    }
    report
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> Key {
        Key {
            program: "1".to_owned(),
            boot_id: "b".to_owned(),
            cpu: "c".to_owned(),
            qemu: "10.0.2".to_owned(),
            device: (1, 2, 3, 0o600),
        }
    }

    #[test]
    fn a_verdict_is_found_again_only_by_its_own_key() {
        let dir = tempfile::tempdir().unwrap();
        let cache = dir.path().join("not/yet");
        assert_eq!(read(&cache, &key()), None);
        let report = ProbeReport::unusable("slow", Some(400.0), None);
        write(
            &cache,
            &Entry {
                key: key(),
                report: report.clone(),
            },
        );
        assert_eq!(read(&cache, &key()), Some(report));
        for other in [
            Key {
                program: "2".to_owned(),
                ..key()
            },
            Key {
                boot_id: "x".to_owned(),
                ..key()
            },
            Key {
                cpu: "x".to_owned(),
                ..key()
            },
            Key {
                qemu: "10.0.3".to_owned(),
                ..key()
            },
            Key {
                device: (1, 2, 4, 0o600),
                ..key()
            },
            Key {
                device: (1, 2, 3, 0o660),
                ..key()
            },
        ] {
            assert_eq!(read(&cache, &other), None, "{other:?}");
        }
        // Nothing but the entry is left behind, and a damaged one counts as none.
        assert_eq!(std::fs::read_dir(&cache).unwrap().count(), 1);
        std::fs::write(path(&cache), "{\"key\":").unwrap();
        assert_eq!(read(&cache, &key()), None);
    }
}
