//! Operations on directories, as blocking functions.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, fchown};
use std::path::{Path, PathBuf};

use connectrpc::ConnectError;
use wrenn_proto::filesystem::EntryInfo;

use super::entry::describe;
use crate::users::{Names, User};

/// One answer cannot hold more entries; a client that has more asks level by level.
const MAX_ENTRIES: usize = 100_000;

/// Creates the directory and what is missing above it, owned by the user. `Ok(false)` when it is there already.
pub(crate) fn make_dirs(path: &Path, user: &User) -> io::Result<bool> {
    let mut missing: Vec<&Path> = Vec::new();
    for ancestor in path.ancestors() {
        match fs::metadata(ancestor) {
            Ok(found) if found.is_dir() => break,
            Ok(_) => {
                return Err(io::Error::new(
                    io::ErrorKind::NotADirectory,
                    format!("'{}' is a file", ancestor.display()),
                ));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => missing.push(ancestor),
            Err(error) => return Err(error),
        }
    }
    let created = !missing.is_empty();
    for dir in missing.into_iter().rev() {
        match fs::DirBuilder::new().mode(0o755).create(dir) {
            Ok(()) => own(dir, user)?,
            // A parallel request was faster, or a dangling link is in the way.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && dir.is_dir() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(created)
}

/// Gives a directory just made to the user, through a handle so that nothing swapped into its place is hit.
fn own(dir: &Path, user: &User) -> io::Result<()> {
    if user.credentials().is_some() {
        let handle = fs::File::open(dir)?;
        fchown(&handle, Some(user.uid), Some(user.gid))?;
    }
    Ok(())
}

/// The entries below the directory, each directory before its contents, in the order of their names.
pub(super) fn list(path: &Path, depth: u32) -> Result<Vec<EntryInfo>, ConnectError> {
    let found = fs::metadata(path).map_err(|error| from_io(path, &error))?;
    if !found.is_dir() {
        return Err(ConnectError::invalid_argument(format!(
            "'{}' is not a directory",
            path.display()
        )));
    }
    let names = Names::load();
    let mut entries = Vec::new();
    // Directories still to be read; the last one is next.
    let mut open: Vec<std::vec::IntoIter<PathBuf>> =
        vec![children(path).map_err(|error| from_io(path, &error))?];
    while let Some(level) = open.last_mut() {
        let Some(child) = level.next() else {
            open.pop();
            continue;
        };
        // What has vanished since the directory was read is not there.
        let Ok(entry) = describe(&child, &names) else {
            continue;
        };
        if entries.len() >= MAX_ENTRIES {
            let message = format!(
                "'{}' has more than {MAX_ENTRIES} entries at this depth",
                path.display()
            );
            return Err(ConnectError::resource_exhausted(message));
        }
        let is_dir =
            !entry.is_symlink && entry.r#type == wrenn_proto::filesystem::FileType::FILE_TYPE_DIRECTORY;
        entries.push(entry);
        if is_dir
            && open.len() < depth as usize
            && let Ok(level) = children(&child)
        {
            open.push(level);
        }
    }
    Ok(entries)
}

fn children(dir: &Path) -> io::Result<std::vec::IntoIter<PathBuf>> {
    let mut children: Vec<PathBuf> = fs::read_dir(dir)?.flatten().map(|entry| entry.path()).collect();
    children.sort();
    Ok(children.into_iter())
}

/// Removes whatever is there; nothing there is fine.
pub(super) fn remove(path: &Path) -> Result<(), ConnectError> {
    if path == Path::new("/") {
        return Err(ConnectError::invalid_argument(
            "the root directory cannot be removed",
        ));
    }
    let result = match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result.map_err(|error| from_io(path, &error)),
    }
}

/// Renames, with the directories above the destination created.
pub(super) fn rename(source: &Path, destination: &Path, user: &User) -> Result<EntryInfo, ConnectError> {
    fs::symlink_metadata(source).map_err(|error| from_io(source, &error))?;
    if let Some(parent) = destination.parent() {
        make_dirs(parent, user).map_err(|error| from_io(parent, &error))?;
    }
    fs::rename(source, destination).map_err(|error| from_io(destination, &error))?;
    describe(destination, &Names::load()).map_err(|error| from_io(destination, &error))
}

/// The code a client decides by, from what the file system said.
pub(super) fn from_io(path: &Path, error: &io::Error) -> ConnectError {
    let message = format!("'{}': {error}", path.display());
    match error.kind() {
        io::ErrorKind::NotFound => ConnectError::not_found(format!("path not found: '{}'", path.display())),
        io::ErrorKind::AlreadyExists => ConnectError::already_exists(message),
        io::ErrorKind::NotADirectory
        | io::ErrorKind::IsADirectory
        | io::ErrorKind::DirectoryNotEmpty
        | io::ErrorKind::InvalidInput
        | io::ErrorKind::InvalidFilename => ConnectError::invalid_argument(message),
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            ConnectError::permission_denied(message)
        }
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            ConnectError::resource_exhausted(message)
        }
        io::ErrorKind::CrossesDevices => {
            ConnectError::failed_precondition(format!("{message} (copy it, then remove the source)"))
        }
        _ => ConnectError::internal(message),
    }
}
