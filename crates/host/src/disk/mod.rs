//! Disks: a template's disk is a qcow2 file that is never written again; every sandbox has an overlay on it.

mod qcow2;

use std::path::Path;

use crate::error::{IoContext as _, Result};

pub(crate) use qcow2::{BackingFormat, create_overlay};

/// Copies a file, sharing its blocks where the file system can, keeping its holes where it cannot.
pub(crate) fn copy_sparse(from: &Path, to: &Path) -> Result<()> {
    let source = std::fs::File::open(from).at("open for copying", from)?;
    copy_open(&source, to)
}

/// The same of a file that is open.
pub(crate) fn copy_open(source: &std::fs::File, to: &Path) -> Result<()> {
    let target = std::fs::File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .open(to)
        .at("create a copy", to)?;
    if rustix::fs::ioctl_ficlone(&target, source).is_ok() {
        return Ok(());
    }
    copy_data_extents(source, &target).at("copy to", to)
}

/// Has the system write to the disk what is only in its memory, of the files and folders that are still there. A loss
/// of power then loses nothing of them. May take long.
pub(crate) fn sync(paths: &[std::path::PathBuf]) {
    for path in paths {
        let synced = std::fs::File::open(path).and_then(|file| file.sync_all());
        match synced {
            Ok(()) => {}
            // It has gone on to its next state meanwhile.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => tracing::warn!(path = %path.display(), %error, "cannot write through to the disk"),
        }
    }
}

fn copy_data_extents(source: &std::fs::File, target: &std::fs::File) -> std::io::Result<()> {
    use rustix::fs::SeekFrom;
    let length = source.metadata()?.len();
    target.set_len(length)?;
    let mut position = 0;
    while position < length {
        let start = match rustix::fs::seek(source, SeekFrom::Data(position)) {
            Ok(start) => start,
            // No data after this point.
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = rustix::fs::seek(source, SeekFrom::Hole(start))?;
        let (mut from, mut to) = (start, start);
        while from < end {
            let want = usize::try_from((end - from).min(1 << 30)).unwrap_or(1 << 30);
            let copied = rustix::fs::copy_file_range(source, Some(&mut from), target, Some(&mut to), want)?;
            if copied == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
        }
        position = end;
    }
    Ok(())
}

/// Bytes that a file really occupies.
pub(crate) fn allocated_bytes(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    std::fs::metadata(path).map_or(0, |meta| meta.blocks() * 512)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Seek as _, SeekFrom, Write as _};

    #[test]
    fn a_copy_has_the_same_bytes_and_keeps_its_holes() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        let mut file = std::fs::File::create(&from).unwrap();
        file.write_all(b"head").unwrap();
        file.seek(SeekFrom::Start(32 << 20)).unwrap();
        file.write_all(b"middle").unwrap();
        file.set_len(64 << 20).unwrap();
        copy_sparse(&from, &to).unwrap();
        assert!(std::fs::read(&from).unwrap() == std::fs::read(&to).unwrap());
        assert!(allocated_bytes(&to) < 1 << 20, "the holes were filled");
    }
}
