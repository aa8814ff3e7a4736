//! From this machine into a sandbox.

use std::fs::Metadata;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use futures::{TryStreamExt as _, stream};
use tokio::io::AsyncReadExt as _;
use wrenn_client::{Error, Exec};

use super::place::{base_name, join, says_contents, says_directory};
use super::{AT_ONCE, Copied, Remote, There, look};
use crate::cli::Context;
use crate::cli::error::CliError;
use crate::cli::progress::Progress;

/// Most paths given to one `chmod`.
const CHMOD_BATCH: usize = 200;
/// Deeper trees than this are a loop, or a mistake.
const MAX_DEPTH: usize = 256;

/// What is to be made in the sandbox, parents first.
#[derive(Debug, Default)]
struct Tree {
    directories: Vec<String>,
    files: Vec<Upload>,
    /// What cannot be copied, with the reason.
    skipped: Vec<String>,
}

#[derive(Debug)]
struct Upload {
    from: PathBuf,
    to: String,
    size: u64,
    executable: bool,
}

pub(super) async fn from_path(
    context: &Context,
    remote: &Remote,
    source: &Path,
    target: &str,
) -> Result<Copied, CliError> {
    let metadata = std::fs::metadata(source)
        .map_err(|error| CliError::local(format!("cannot read {}", source.display()), error))?;
    let text = source.to_string_lossy();
    let there = if says_directory(target) && !metadata.is_dir() {
        There::Directory
    } else {
        look(remote, target).await?
    };
    let name = match base_name(&text) {
        Some(name) => Some(name.to_owned()),
        // `.` and `..` have a name all the same.
        None => source
            .canonicalize()
            .ok()
            .and_then(|path| Some(path.file_name()?.to_str()?.to_owned())),
    };
    let into = |name: Option<String>| {
        name.map(|name| join(target, &name))
            .ok_or_else(|| CliError::Usage(format!("{} has no name to copy it under", source.display())))
    };
    let mut tree = Tree::default();
    if metadata.is_dir() {
        let root = match there {
            There::Directory if says_contents(&text) => target.to_owned(),
            There::Directory => into(name)?,
            There::Other => {
                return Err(CliError::Usage(format!(
                    "{} is a directory, but {target} in the sandbox is not",
                    source.display()
                )));
            }
            There::Nothing => target.to_owned(),
        };
        walk(source, root, &mut tree, 0)?;
    } else {
        let to = if there == There::Directory {
            into(name)?
        } else {
            target.to_owned()
        };
        tree.add(source.to_owned(), to, &metadata);
    }
    send(context, remote, tree).await
}

pub(super) async fn from_stdin(context: &Context, remote: &Remote, target: &str) -> Result<Copied, CliError> {
    if says_directory(target) {
        return Err(CliError::Usage(format!(
            "{target} is a directory; name the file that the input becomes"
        )));
    }
    let progress = context.transfer(None, target);
    let (source, counted) = counted(tokio::io::stdin(), &progress);
    remote.files().upload_from(target, source, None).await?;
    Ok(Copied {
        files: 1,
        bytes: counted.load(Ordering::Relaxed),
    })
}

impl Tree {
    fn add(&mut self, from: PathBuf, to: String, metadata: &Metadata) {
        if metadata.is_file() {
            let executable = metadata.permissions().mode() & 0o111 != 0;
            self.files.push(Upload {
                from,
                to,
                size: metadata.len(),
                executable,
            });
        } else {
            self.skipped
                .push(format!("{}: neither a file nor a directory", from.display()));
        }
    }
}

/// Gathers a directory. Links to files are followed; links to directories are not, as they may lead
/// in circles or out of the tree.
fn walk(directory: &Path, to: String, tree: &mut Tree, depth: usize) -> Result<(), CliError> {
    let failed = |error| CliError::local(format!("cannot read {}", directory.display()), error);
    if depth > MAX_DEPTH {
        return Err(CliError::Usage(format!(
            "{} is more than {MAX_DEPTH} directories deep",
            directory.display()
        )));
    }
    let mut entries: Vec<_> = std::fs::read_dir(directory)
        .map_err(failed)?
        .collect::<Result<_, _>>()
        .map_err(failed)?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    tree.directories.push(to.clone());
    for entry in entries {
        let path = entry.path();
        let name = entry.file_name();
        let Some(name) = name.to_str() else {
            tree.skipped
                .push(format!("{}: its name is not UTF-8", path.display()));
            continue;
        };
        let there = join(&to, name);
        match (entry.file_type().map_err(failed)?, std::fs::metadata(&path)) {
            (kind, _) if kind.is_dir() => walk(&path, there, tree, depth + 1)?,
            (_, Ok(metadata)) if metadata.is_dir() => {
                tree.skipped
                    .push(format!("{}: a link to a directory", path.display()));
            }
            (_, Ok(metadata)) => tree.add(path, there, &metadata),
            (_, Err(error)) => tree.skipped.push(format!("{}: {error}", path.display())),
        }
    }
    Ok(())
}

async fn send(context: &Context, remote: &Remote, tree: Tree) -> Result<Copied, CliError> {
    for skipped in &tree.skipped {
        crate::cli::told::warn(context.json, &format!("not copied: {skipped}"), None);
    }
    let total = tree.files.iter().map(|file| file.size).sum();
    let label = match tree.files.as_slice() {
        [one] => one.to.clone(),
        many => format!("{} files", many.len()),
    };
    let progress = context.transfer(Some(total), label);
    for directory in &tree.directories {
        match remote.files().mkdir(directory).await {
            Ok(_) | Err(Error::Conflict(_)) => {}
            Err(error) => return Err(error.into()),
        }
    }
    stream::iter(tree.files.iter().map(Ok::<_, CliError>))
        .try_for_each_concurrent(AT_ONCE, |file| send_file(remote, file, &progress))
        .await?;
    let executables: Vec<&str> = tree
        .files
        .iter()
        .filter(|file| file.executable)
        .map(|file| file.to.as_str())
        .collect();
    make_executable(remote, &executables, &progress).await;
    Ok(Copied {
        files: tree.files.len() as u64,
        bytes: total,
    })
}

async fn send_file(remote: &Remote, file: &Upload, progress: &Progress) -> Result<(), CliError> {
    let source = tokio::fs::File::open(&file.from)
        .await
        .map_err(|error| CliError::local(format!("cannot read {}", file.from.display()), error))?;
    // A file that grows meanwhile is cut where it ended; one that shrinks fails the transfer.
    let (source, _) = counted(source.take(file.size), progress);
    Ok(remote
        .files()
        .upload_from(&file.to, source, Some(file.size))
        .await?)
}

/// The API writes files without execute permission.
async fn make_executable(remote: &Remote, paths: &[&str], progress: &Progress) {
    for batch in paths.chunks(CHMOD_BATCH) {
        let mut args = vec!["a+x".to_owned(), "--".to_owned()];
        args.extend(batch.iter().map(|path| (*path).to_owned()));
        let outcome = remote
            .sandbox
            .exec(&Exec {
                cmd: "chmod".to_owned(),
                args,
                user: remote.user.clone(),
                ..Exec::default()
            })
            .await;
        let problem = match outcome {
            Ok(result) if result.exit_code == 0 => continue,
            Ok(result) => crate::cli::output::printable(result.stderr.trim()),
            Err(error) => error.to_string(),
        };
        progress.warn(&format!(
            "{} copied, but not made executable: {problem}",
            batch.join(", ")
        ));
    }
}

/// A reader that moves the bar, and a count of what went through it.
fn counted<R>(source: R, progress: &Progress) -> (Counted<R>, std::sync::Arc<AtomicU64>) {
    let count = std::sync::Arc::<AtomicU64>::default();
    (
        Counted {
            source,
            bar: progress.bar().clone(),
            count: count.clone(),
        },
        count,
    )
}

struct Counted<R> {
    source: R,
    bar: indicatif::ProgressBar,
    count: std::sync::Arc<AtomicU64>,
}

impl<R: tokio::io::AsyncRead + Unpin> tokio::io::AsyncRead for Counted<R> {
    fn poll_read(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
        buffer: &mut tokio::io::ReadBuf<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        let before = buffer.filled().len();
        let polled = std::pin::Pin::new(&mut self.source).poll_read(context, buffer);
        let read = (buffer.filled().len() - before) as u64;
        self.bar.inc(read);
        self.count.fetch_add(read, Ordering::Relaxed);
        polled
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_is_gathered_parents_first_and_links_do_not_lead_astray() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        std::fs::create_dir_all(root.join("a/b")).unwrap();
        std::fs::write(root.join("a/b/x.sh"), "12345").unwrap();
        std::fs::set_permissions(root.join("a/b/x.sh"), std::fs::Permissions::from_mode(0o755)).unwrap();
        std::os::unix::fs::symlink("..", root.join("a/loop")).unwrap();
        std::os::unix::fs::symlink("b/x.sh", root.join("a/link")).unwrap();
        std::os::unix::fs::symlink("nowhere", root.join("a/dangling")).unwrap();
        let mut tree = Tree::default();
        walk(&root.join("a"), "/t".to_owned(), &mut tree, 0).unwrap();
        assert_eq!(tree.directories, ["/t", "/t/b"]);
        let files: Vec<_> = tree
            .files
            .iter()
            .map(|file| (file.to.as_str(), file.size, file.executable))
            .collect();
        assert_eq!(files, [("/t/b/x.sh", 5, true), ("/t/link", 5, true)]);
        assert_eq!(tree.skipped.len(), 2);
    }
}
