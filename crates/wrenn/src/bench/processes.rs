//! What `/proc` tells of the processes that are measured.

use std::path::{Path, PathBuf};

/// A virtual machine's process, known by the folder in which it works.
#[derive(Debug, Clone)]
pub(super) struct Vmm {
    pub(super) pid: u32,
    pub(super) dir: PathBuf,
}

impl Vmm {
    /// The words of its command line.
    pub(super) fn command_line(&self) -> Option<Vec<String>> {
        let bytes = std::fs::read(format!("/proc/{}/cmdline", self.pid)).ok()?;
        let text = String::from_utf8(bytes).ok()?;
        Some(
            text.trim_end_matches('\0')
                .split('\0')
                .map(str::to_owned)
                .collect(),
        )
    }
}

/// Every virtual machine that works somewhere below `root`.
pub(super) fn vmms_below(root: &Path) -> Vec<Vmm> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| {
            let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
            let dir = std::fs::read_link(entry.path().join("cwd")).ok()?;
            if !dir.starts_with(root) {
                return None;
            }
            let name = std::fs::read_to_string(entry.path().join("comm")).ok()?;
            name.starts_with("qemu").then_some(Vmm { pid, dir })
        })
        .collect()
}

/// Processor time that a process has used, in clock ticks of a hundredth of a second.
pub(super) fn cpu_ticks(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command's name may hold spaces; fields are counted after its closing bracket.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace().skip(11);
    Some(fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?)
}

/// Memory of a process in MiB, shared pages counted in parts.
pub(super) fn pss_mib(pid: u32) -> std::io::Result<f64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let kib = text
        .lines()
        .find_map(|line| {
            line.strip_prefix("Pss:")?
                .trim()
                .strip_suffix("kB")?
                .trim()
                .parse::<u32>()
                .ok()
        })
        .ok_or_else(|| std::io::Error::other("no Pss line in smaps_rollup"))?;
    Ok(f64::from(kib) / 1024.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_memory_and_used_the_processor() {
        let pid = std::process::id();
        assert!(pss_mib(pid).unwrap() > 0.1);
        assert!(cpu_ticks(pid).is_some());
        assert!(vmms_below(Path::new("/nonexistent")).is_empty());
    }
}
