//! From a sandbox to this machine.
//!
//! Everything the sandbox answers is a stranger's word. Entries are joined by plain names only;
//! directories on the way are never entered through a link; a file appears under its name only when
//! it is whole, by a rename that replaces a link instead of following it; and a link is made only
//! when it stays inside what was copied.

use std::fs::Permissions;
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Component, Path, PathBuf};

use futures::{StreamExt as _, TryStreamExt as _, stream};
use tokio::io::AsyncWriteExt as _;
use wrenn_client::{Download, FileEntry, FileKind};

use super::place::{base_name, is_name, join, says_contents};
use super::{AT_ONCE, Copied, Remote, There, look};
use crate::cli::Context;
use crate::cli::error::CliError;
use crate::cli::progress::Progress;

/// Deeper trees than this are a sandbox's joke.
const MAX_DEPTH: usize = 256;
/// So are trees of more entries.
const MAX_ENTRIES: usize = 1_000_000;

/// A file to fetch.
#[derive(Debug)]
struct Fetch {
    from: String,
    to: PathBuf,
    size: u64,
    mode: Option<u32>,
}

pub(super) async fn to_stdout(context: &Context, remote: &Remote, path: &str) -> Result<Copied, CliError> {
    let download = remote.files().read_stream(path).await?;
    let progress = context.transfer(download.size(), path);
    let mut stdout = tokio::io::stdout();
    let mut chunks = std::pin::pin!(download.into_stream());
    let mut bytes = 0;
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk?;
        stdout.write_all(&chunk).await.map_err(CliError::output)?;
        bytes += chunk.len() as u64;
        progress.bar().set_position(bytes);
    }
    stdout.flush().await.map_err(CliError::output)?;
    Ok(Copied { files: 1, bytes })
}

pub(super) async fn to_path(
    context: &Context,
    remote: &Remote,
    path: &str,
    target: &Path,
) -> Result<Copied, CliError> {
    let into = target.is_dir();
    let place = |otherwise: PathBuf| match base_name(path) {
        Some(name) if into => Ok(target.join(name)),
        None if into => Err(CliError::Usage(format!(
            "{path} has no name to copy it under; name the destination"
        ))),
        _ => Ok(otherwise),
    };
    if look(remote, path).await? == There::Directory {
        let root = if says_contents(path) {
            target.to_owned()
        } else {
            place(target.to_owned())?
        };
        return fetch_tree(context, remote, path, root).await;
    }
    if !into && target.as_os_str().to_string_lossy().ends_with('/') {
        return Err(CliError::Usage(format!(
            "there is no directory {}",
            target.display()
        )));
    }
    let to = place(target.to_owned())?;
    let download = remote.files().read_stream(path).await?;
    let progress = context.transfer(download.size(), path);
    let bytes = save(download, &to, None, &progress).await?;
    Ok(Copied { files: 1, bytes })
}

async fn fetch_tree(
    context: &Context,
    remote: &Remote,
    path: &str,
    root: PathBuf,
) -> Result<Copied, CliError> {
    let listing = context.spinner(format!("listing {path}"));
    let mut files = Vec::new();
    let mut links = Vec::new();
    let mut pending = vec![(path.to_owned(), root.clone(), 0)];
    while let Some((from, to, depth)) = pending.pop() {
        make_directory(&to, depth == 0)?;
        for entry in remote.files().list(&from, 1).await? {
            if !is_name(&entry.name) {
                listing.warn(&format!("not copied: {from}: an entry without a usable name"));
                continue;
            }
            let (there, here) = (join(&from, &entry.name), to.join(&entry.name));
            match entry.kind {
                FileKind::Directory if depth < MAX_DEPTH => pending.push((there, here, depth + 1)),
                FileKind::Directory => listing.warn(&format!("not copied: {there}: too deep")),
                FileKind::Symlink => links.push((there, here, entry)),
                FileKind::File => files.push(Fetch {
                    from: there,
                    to: here,
                    size: u64::try_from(entry.size).unwrap_or(0),
                    mode: Some(entry.mode & 0o777),
                }),
            }
            if files.len() + links.len() + pending.len() > MAX_ENTRIES {
                return Err(CliError::Usage(format!(
                    "{path} has more than {MAX_ENTRIES} entries"
                )));
            }
        }
    }
    drop(listing);
    let progress = context.transfer(
        Some(files.iter().map(|file| file.size).sum()),
        format!("{} files", files.len()),
    );
    let bytes = stream::iter(&files)
        .map(async |file| {
            let download = remote.files().read_stream(&file.from).await?;
            save(download, &file.to, file.mode, &progress).await
        })
        .buffer_unordered(AT_ONCE)
        .try_fold(0, async |total, bytes| Ok(total + bytes))
        .await?;
    // Last, so that no file is ever written through one of them.
    for (from, to, entry) in links {
        if let Err(reason) = make_link(&root, &to, &entry) {
            progress.warn(&format!("not copied: {from}: {reason}"));
        }
    }
    Ok(Copied {
        files: files.len() as u64,
        bytes,
    })
}

/// Makes a directory unless it is there. Only the one that the user named may be a link to one.
fn make_directory(path: &Path, named: bool) -> Result<(), CliError> {
    let failed = |error| CliError::local(format!("cannot make the directory {}", path.display()), error);
    let made = if named {
        std::fs::create_dir_all(path)
    } else {
        std::fs::create_dir(path)
    };
    match made {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            let found = std::fs::symlink_metadata(path).map_err(failed)?;
            if found.is_dir() || (named && path.is_dir()) {
                Ok(())
            } else {
                Err(failed(error))
            }
        }
        made => made.map_err(failed),
    }
}

/// Makes a link, if it is relative and stays below the root.
fn make_link(root: &Path, at: &Path, entry: &FileEntry) -> Result<(), String> {
    let target = entry.symlink_target.as_deref().unwrap_or_default();
    let from = at
        .parent()
        .and_then(|parent| parent.strip_prefix(root).ok())
        .unwrap_or(Path::new(""));
    if !stays_inside(from, Path::new(target)) {
        return Err(format!(
            "a link to {}, outside of what is copied",
            crate::cli::output::printable(target)
        ));
    }
    std::os::unix::fs::symlink(target, at).map_err(|error| error.to_string())
}

/// Whether a link in a directory (relative to the root) leads to something below the root.
///
/// `..` may stand at the beginning only, where it is counted against a real directory: after a name,
/// which may itself be a link, nobody can tell where it leads.
fn stays_inside(directory: &Path, target: &Path) -> bool {
    let mut above = directory.components().count();
    let mut named = false;
    !target.as_os_str().is_empty()
        && target.components().all(|part| match part {
            Component::Normal(_) => {
                named = true;
                true
            }
            Component::CurDir => true,
            Component::ParentDir if !named && above > 0 => {
                above -= 1;
                true
            }
            Component::ParentDir | Component::RootDir | Component::Prefix(_) => false,
        })
}

/// Writes a download to a file, whole or not at all.
async fn save(
    download: Download,
    to: &Path,
    mode: Option<u32>,
    progress: &Progress,
) -> Result<u64, CliError> {
    let failed = |error| CliError::local(format!("cannot write {}", to.display()), error);
    // Devices and pipes are written to as they are: a rename would replace them.
    let special = std::fs::metadata(to).is_ok_and(|found| !found.is_file());
    let (mut file, part) = if special {
        (
            tokio::fs::OpenOptions::new()
                .write(true)
                .open(to)
                .await
                .map_err(failed)?,
            None,
        )
    } else {
        let part = Part::beside(to)?;
        let file = tokio::fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&part.path)
            .await
            .map_err(failed)?;
        (file, Some(part))
    };
    let mut chunks = std::pin::pin!(download.into_stream());
    let mut bytes = 0;
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk?;
        file.write_all(&chunk).await.map_err(failed)?;
        bytes += chunk.len() as u64;
        progress.bar().inc(chunk.len() as u64);
    }
    file.flush().await.map_err(failed)?;
    if let Some(part) = part {
        if let Some(mode) = mode {
            file.set_permissions(Permissions::from_mode(mode))
                .await
                .map_err(failed)?;
        }
        part.become_file(to).map_err(failed)?;
    }
    Ok(bytes)
}

/// A file that is not whole yet; removed unless it becomes so.
struct Part {
    path: PathBuf,
}

impl Part {
    fn beside(target: &Path) -> Result<Self, CliError> {
        let name = target
            .file_name()
            .ok_or_else(|| CliError::Usage(format!("{} cannot be a file", target.display())))?;
        // Short and unlike the target's name, which may be as long as names can be.
        let mut hash = std::hash::DefaultHasher::new();
        std::hash::Hash::hash(name, &mut hash);
        let hash = std::hash::Hasher::finish(&hash);
        Ok(Self {
            path: target.with_file_name(format!(".wrenn-{}-{hash:016x}.part", std::process::id())),
        })
    }

    fn become_file(mut self, target: &Path) -> std::io::Result<()> {
        std::fs::rename(&self.path, target)?;
        self.path = PathBuf::new();
        Ok(())
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        if !self.path.as_os_str().is_empty() {
            // It may never have been made.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_out_of_the_tree_are_refused() {
        let inside = |directory: &str, target: &str| stays_inside(Path::new(directory), Path::new(target));
        assert!(inside("", "a") && inside("a", "../b") && inside("a/b", "./../../c"));
        assert!(
            !inside("", "..") && !inside("a", "../../x") && !inside("", "/etc/passwd") && !inside("", "")
        );
        assert!(!inside("a", "b/../../../x") && !inside("", "link/.."));
    }

    #[test]
    fn a_directory_is_not_entered_through_a_link() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("/", &link).unwrap();
        assert!(make_directory(&link, false).is_err());
        assert!(make_directory(&link, true).is_ok());
        assert!(make_directory(&dir.path().join("new"), false).is_ok());
    }
}
