//! The first root filesystem of a booting guest: the agent as `/init`, and the modules its devices need.
//! Format: "newc" cpio, uncompressed (source: the kernel's `Documentation/driver-api/early-userspace/buffer-format.rst`).

use std::path::{Path, PathBuf};

use wrenn_proto::guest::INITRAMFS_MODULES_DIR;

use crate::error::{HostError, IoContext as _, Result};

/// Drivers that Debian's cloud kernel has as modules, in the order in which they can be loaded.
pub(super) const MODULES: [&str; 9] = [
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "failover",
    "net_failover",
    "virtio_net",
    "virtio_blk",
];

/// Assembles the archive.
pub(super) fn build(envd: &[u8], modules: &[(String, Vec<u8>)]) -> Vec<u8> {
    let mut archive = Archive::default();
    for dir in [
        "dev",
        "proc",
        "sys",
        INITRAMFS_MODULES_DIR.trim_start_matches('/'),
    ] {
        archive.entry(dir, 0o040_755, &[]);
    }
    // Before devtmpfs is mounted the kernel opens this for the init's output.
    archive.device("dev/console", 0o020_600, 5, 1);
    archive.entry("init", 0o100_755, envd);
    for (index, (name, bytes)) in modules.iter().enumerate() {
        let path = format!(
            "{}/{index:02}-{name}.ko",
            INITRAMFS_MODULES_DIR.trim_start_matches('/')
        );
        archive.entry(&path, 0o100_644, bytes);
    }
    archive.entry("TRAILER!!!", 0, &[]);
    archive.0
}

#[derive(Default)]
struct Archive(Vec<u8>);

impl Archive {
    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.raw(name, mode, content, (0, 0));
    }

    fn device(&mut self, name: &str, mode: u32, major: u32, minor: u32) {
        self.raw(name, mode, &[], (major, minor));
    }

    fn raw(&mut self, name: &str, mode: u32, content: &[u8], device: (u32, u32)) {
        let inode = self.0.len() as u32 + 1;
        let fields = [
            inode,
            mode,
            0,
            0,
            1,
            0,
            content.len() as u32,
            0,
            0,
            device.0,
            device.1,
            name.len() as u32 + 1,
            0,
        ];
        self.0.extend_from_slice(b"070701");
        for field in fields {
            self.0.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.0.extend_from_slice(name.as_bytes());
        self.0.push(0);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }
}

/// Reads the needed modules from an unpacked kernel package, decompressed. One that is built in is left out.
pub(super) fn read_modules(modules_root: &Path) -> Result<Vec<(String, Vec<u8>)>> {
    let mut found = Vec::new();
    walk(modules_root, &mut found)?;
    let builtin = std::fs::read_to_string(modules_root.join("modules.builtin")).unwrap_or_default();
    let mut modules = Vec::new();
    for name in MODULES {
        let file = found.iter().find(|path| {
            path.file_name()
                .and_then(|file| file.to_str())
                .and_then(|file| file.split_once(".ko"))
                .is_some_and(|(stem, _)| stem == name)
        });
        let Some(path) = file else {
            if builtin.lines().any(|line| line.ends_with(&format!("/{name}.ko"))) {
                continue;
            }
            return Err(HostError::Program {
                program: "kernel package",
                detail: format!(
                    "it has no module '{name}'; another kernel can be named with WRENN_KERNEL_PACKAGE"
                ),
            });
        };
        let bytes = std::fs::read(path).at("read", path)?;
        modules.push((
            name.to_owned(),
            super::kernel::decompress(&bytes).map_err(|detail| HostError::Program {
                program: "kernel package",
                detail: format!("module {name}: {detail}"),
            })?,
        ));
    }
    Ok(modules)
}

fn walk(dir: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in std::fs::read_dir(dir).at("list", dir)? {
        let entry = entry.at("list", dir)?;
        let kind = entry.file_type().at("list", dir)?;
        if kind.is_dir() {
            walk(&entry.path(), files)?;
        } else if kind.is_file() {
            files.push(entry.path());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_aligned_and_the_archive_is_closed() {
        let archive = build(b"elf", &[("virtio".to_owned(), b"ko".to_vec())]);
        assert_eq!(archive.len() % 4, 0);
        let text = String::from_utf8_lossy(&archive);
        assert!(text.contains("modules/00-virtio.ko") && text.contains("TRAILER!!!"));
        // Each header must begin at a multiple of four.
        for (at, _) in text.match_indices("070701") {
            assert_eq!(at % 4, 0);
        }
    }
}
