//! The folder in which a VM's process works. While the process runs the folder is its user's, and whoever has escaped
//! from the guest may do there what that user may: an agent that runs as root takes nothing in it for what its name says.

use std::fs::File;
use std::os::unix::fs::{MetadataExt as _, fchown};
use std::path::Path;

use rustix::fs::{Mode, OFlags};

use crate::error::{HostError, IoContext as _, Result};

/// A VM's device state is some 60 KB; one that was tampered with must not fill the agent's memory.
const MAX_STATE: u64 = 64 << 20;

/// Gives a VM's folder and the files in it to the VM's user. What is no plain file is of an earlier life of the VM, such
/// as its sockets, and is removed.
pub(crate) fn hand_over(folder: &Path, uid: u32, gid: u32) -> Result<()> {
    let directory = open_directory(folder)?;
    for entry in std::fs::read_dir(folder).at("list", folder)? {
        let path = entry.at("list", folder)?.path();
        let kind = std::fs::symlink_metadata(&path).at("look at", &path)?;
        if !kind.is_file() {
            std::fs::remove_file(&path).at("remove", &path)?;
            continue;
        }
        let file = open_file(&path)?;
        fchown(&file, Some(uid), Some(gid)).at("hand over to the VM's user", &path)?;
        rustix::fs::fchmod(&file, Mode::from_raw_mode(0o600))
            .map_err(std::io::Error::from)
            .at("protect", &path)?;
    }
    fchown(&directory, Some(uid), Some(gid)).at("hand over to the VM's user", folder)
}

/// Takes a VM's folder back after the end of its process: the user's number is the next VM's.
pub(crate) fn take_back(folder: &Path) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    let directory = open_directory(folder)?;
    fchown(&directory, Some(0), Some(0)).at("take back from the VM's user", folder)
}

/// Opens a file in a VM's folder for reading: a plain file, and no other name of one elsewhere.
pub(crate) fn open_file(path: &Path) -> Result<File> {
    // Not blocking, lest it is a pipe that nobody writes to.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = rustix::fs::open(path, flags, Mode::empty())
        .map(File::from)
        .map_err(std::io::Error::from)
        .at("open", path)?;
    let meta = file.metadata().at("look at", path)?;
    if !meta.is_file() || meta.nlink() != 1 {
        return Err(HostError::Vmm(format!(
            "{} is not a file of the virtual machine's own",
            path.file_name().unwrap_or_default().to_string_lossy()
        )));
    }
    Ok(file)
}

/// Copies a device state that a VM's process has written to a new file of the agent's own.
pub(crate) fn take_state(from: &Path, to: &Path) -> Result<()> {
    use std::io::Read as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    let mut bytes = Vec::new();
    open_file(from)?
        .take(MAX_STATE + 1)
        .read_to_end(&mut bytes)
        .at("read", from)?;
    if bytes.len() as u64 > MAX_STATE {
        return Err(HostError::Vmm("its device state is too large".to_owned()));
    }
    let mut file = File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(to)
        .at("create", to)?;
    std::io::Write::write_all(&mut file, &bytes).at("write", to)?;
    std::fs::remove_file(from).at("remove", from)
}

fn open_directory(folder: &Path) -> Result<File> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::open(folder, flags, Mode::empty())
        .map(File::from)
        .map_err(std::io::Error::from)
        .at("open", folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_lead_elsewhere_are_not_followed() {
        let root = tempfile::tempdir().unwrap();
        let (secret, folder) = (root.path().join("secret"), root.path().join("vm"));
        std::fs::write(&secret, "root's").unwrap();
        std::fs::create_dir(&folder).unwrap();
        let link = |name: &str| folder.join(name);
        std::os::unix::fs::symlink(&secret, link("state.bin.new")).unwrap();
        assert!(take_state(&link("state.bin.new"), &root.path().join("state.bin")).is_err());
        std::fs::hard_link(&secret, link("disk.qcow2")).unwrap();
        assert!(open_file(&link("disk.qcow2")).is_err());
        let (uid, gid) = (
            rustix::process::geteuid().as_raw(),
            rustix::process::getegid().as_raw(),
        );
        // A second name of somebody else's file is not given away; a link is removed, not what it leads to.
        assert!(hand_over(&folder, uid, gid).is_err());
        std::fs::remove_file(link("disk.qcow2")).unwrap();
        std::os::unix::net::UnixListener::bind(link("qmp.sock")).unwrap();
        std::fs::write(link("disk.qcow2"), "disk").unwrap();
        hand_over(&folder, uid, gid).unwrap();
        let left: Vec<_> = std::fs::read_dir(&folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(left, ["disk.qcow2"]);
        assert_eq!(std::fs::read_to_string(&secret).unwrap(), "root's");
        // The folder itself can be no link either.
        let other = root.path().join("other");
        std::os::unix::fs::symlink(&folder, &other).unwrap();
        assert!(hand_over(&other, uid, gid).is_err() && open_directory(&other).is_err());
    }

    #[test]
    fn a_state_becomes_the_agents_own_file() {
        let root = tempfile::tempdir().unwrap();
        let (from, to) = (root.path().join("from"), root.path().join("to"));
        std::fs::write(&from, "state").unwrap();
        let held = File::options().write(true).open(&from).unwrap();
        take_state(&from, &to).unwrap();
        std::os::unix::fs::FileExt::write_at(&held, b"evil!", 0).unwrap();
        assert_eq!(std::fs::read_to_string(&to).unwrap(), "state");
        assert!(!from.exists());
    }
}
