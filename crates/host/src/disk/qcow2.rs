//! Writes the header of an empty qcow2 overlay, which costs a few file writes where `qemu-img create` costs a process.
//!
//! Layout (version 3, 64 KiB clusters): cluster 0 header, 1 refcount table, 2 refcount block, 3… the L1 table.
//! Source: QEMU's `docs/interop/qcow2.txt`.

use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use crate::error::{HostError, IoContext as _, Result};

const CLUSTER_BITS: u32 = 16;
const CLUSTER: u64 = 1 << CLUSTER_BITS;
const HEADER_LENGTH: u32 = 104;
/// Header extension that names the backing file's format.
const EXTENSION_BACKING_FORMAT: u32 = 0xE279_2ACA;

/// What the file below an overlay is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BackingFormat {
    Raw,
    Qcow2,
}

/// Creates the empty overlay `path` of `size` bytes over `backing` (an absolute path).
pub(crate) fn create_overlay(path: &Path, size: u64, backing: &Path, format: BackingFormat) -> Result<()> {
    let backing = backing.as_os_str().as_bytes();
    // The limit is the format's own.
    if backing.len() > 1023 {
        return Err(HostError::InvalidArgument {
            field: "data_dir",
            message: "its path is too long for a disk image's header (1023 bytes)".to_owned(),
        });
    }
    // One L2 table maps as many clusters as 8-byte entries fit into a cluster.
    let l1_entries = size.div_ceil(CLUSTER * (CLUSTER / 8));
    let l1_clusters = (l1_entries * 8).div_ceil(CLUSTER).max(1);
    let used_clusters = 3 + l1_clusters;

    let mut header = Vec::with_capacity(1024);
    let format: &[u8] = match format {
        BackingFormat::Raw => b"raw",
        BackingFormat::Qcow2 => b"qcow2",
    };
    // Extension: type, length, data padded to 8; then the end mark; then the backing file's name.
    let extension_length = 8 + format.len().next_multiple_of(8) + 8;
    let backing_offset = u64::from(HEADER_LENGTH) + extension_length as u64;
    header.extend_from_slice(b"QFI\xfb");
    header.extend_from_slice(&3u32.to_be_bytes());
    header.extend_from_slice(&backing_offset.to_be_bytes());
    header.extend_from_slice(&(backing.len() as u32).to_be_bytes());
    header.extend_from_slice(&CLUSTER_BITS.to_be_bytes());
    header.extend_from_slice(&size.to_be_bytes());
    header.extend_from_slice(&0u32.to_be_bytes()); // No encryption.
    header.extend_from_slice(&(l1_entries as u32).to_be_bytes());
    header.extend_from_slice(&(3 * CLUSTER).to_be_bytes()); // L1 table.
    header.extend_from_slice(&CLUSTER.to_be_bytes()); // Refcount table.
    header.extend_from_slice(&1u32.to_be_bytes()); // Its clusters.
    header.extend_from_slice(&0u32.to_be_bytes()); // No internal snapshots.
    header.extend_from_slice(&0u64.to_be_bytes());
    header.extend_from_slice(&[0; 24]); // Feature bits.
    header.extend_from_slice(&4u32.to_be_bytes()); // Refcounts of 16 bits.
    header.extend_from_slice(&HEADER_LENGTH.to_be_bytes());
    header.extend_from_slice(&EXTENSION_BACKING_FORMAT.to_be_bytes());
    header.extend_from_slice(&(format.len() as u32).to_be_bytes());
    header.extend_from_slice(format);
    header.resize(header.len().next_multiple_of(8), 0);
    header.extend_from_slice(&[0; 8]);
    header.extend_from_slice(backing);

    let refcounts: Vec<u8> = (0..used_clusters).flat_map(|_| 1u16.to_be_bytes()).collect();
    let file = std::fs::File::options()
        .write(true)
        .create_new(true)
        .open(path)
        .at("create a disk overlay", path)?;
    file.write_all_at(&header, 0)
        .and_then(|()| file.write_all_at(&(2 * CLUSTER).to_be_bytes(), CLUSTER))
        .and_then(|()| file.write_all_at(&refcounts, 2 * CLUSTER))
        .and_then(|()| file.set_len(used_clusters * CLUSTER))
        .at("write a disk overlay", path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::process::Command;

    fn qemu_img(args: &[&str], path: &Path) -> serde_json::Value {
        let output = Command::new("qemu-img").args(args).arg(path).output().unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        serde_json::from_slice(&output.stdout).unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(12))]
        #[test]
        fn qemu_takes_overlays_of_any_size_as_whole(mib in 1u64..(4 << 20), raw: bool) {
            let dir = tempfile::tempdir().unwrap();
            let (overlay, base) = (dir.path().join("overlay"), dir.path().join("base"));
            let size = mib << 20;
            let format = if raw { BackingFormat::Raw } else { BackingFormat::Qcow2 };
            if raw {
                std::fs::File::create(&base).unwrap().set_len(1 << 20).unwrap();
            } else {
                let made = Command::new("qemu-img")
                    .args(["create", "-q", "-f", "qcow2"]).arg(&base).arg("1M").status().unwrap();
                prop_assert!(made.success());
            }
            create_overlay(&overlay, size, &base, format).unwrap();
            let info = qemu_img(&["info", "--output=json"], &overlay);
            prop_assert_eq!(&info["virtual-size"], size);
            prop_assert_eq!(&info["full-backing-filename"], base.to_str().unwrap());
            prop_assert_eq!(&info["backing-filename-format"], if raw { "raw" } else { "qcow2" });
            let check = qemu_img(&["check", "--output=json"], &overlay);
            prop_assert_eq!(&check["check-errors"], 0);
            prop_assert!(check.get("leaks").is_none() && check.get("corruptions").is_none(), "{}", check);
        }
    }
}
