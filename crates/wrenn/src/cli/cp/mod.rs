//! `wrenn sandbox cp`: files and directories between this machine and a sandbox.
//!
//! As with `cp`, a source goes *into* a destination that is a directory (or ends with `/`), and takes
//! the destination's name otherwise; a directory source that ends with `/.` means its contents. What a
//! sandbox says about its files is not trusted: nothing it answers makes this side write outside the
//! destination.

use std::process::ExitCode;

use clap::Args;
use wrenn_client::{Error, Files, SandboxHandle};

use super::error::CliError;
use super::signals::Signals;
use super::{Context, output};

mod download;
mod place;
mod upload;

use place::Place;

/// Files on their way at the same time.
const AT_ONCE: usize = 6;

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  wrenn sandbox cp data.csv sb-…:/home/user/        into a directory
  wrenn sandbox cp sb-…:/home/user/out ./results    a file or a whole directory
  wrenn sandbox cp ./src/. sb-…:app                 a directory's contents
  tar c . | wrenn sandbox cp - sb-…:/tmp/all.tar    from standard input")]
pub(crate) struct CpArgs {
    /// What to copy: PATH, SANDBOX:PATH, or - for standard input
    source: Place,
    /// Where to: PATH, SANDBOX:PATH, or - for standard output
    destination: Place,
    /// User in the sandbox whose home relative paths start from, and who owns what is copied in
    #[arg(short, long)]
    user: Option<String>,
    /// Directories are always copied whole; accepted out of habit
    #[arg(short, long, hide = true)]
    recursive: bool,
}

/// The side that is in a sandbox, as the user of the copy sees it.
struct Remote {
    sandbox: SandboxHandle,
    user: Option<String>,
}

impl Remote {
    fn files(&self) -> Files {
        match &self.user {
            Some(user) => self.sandbox.files().as_user(user),
            None => self.sandbox.files(),
        }
    }
}

/// What was copied.
#[derive(Debug, Default, Clone, Copy, serde::Serialize)]
struct Copied {
    files: u64,
    bytes: u64,
}

pub(super) async fn main(context: &Context, args: CpArgs) -> Result<ExitCode, CliError> {
    let mut signals = Signals::listen()?;
    let to_stdout = matches!(args.destination, Place::Standard);
    let user = args.user;
    let remote = async |sandbox: &str| {
        Ok::<Remote, CliError>(Remote {
            sandbox: context.sandbox(sandbox).await?,
            user: user.clone(),
        })
    };
    let copy = async {
        match (args.source, args.destination) {
            (Place::Remote { sandbox, path }, Place::Local(target)) => {
                download::to_path(context, &remote(&sandbox).await?, &path, &target).await
            }
            (Place::Remote { sandbox, path }, Place::Standard) => {
                download::to_stdout(context, &remote(&sandbox).await?, &path).await
            }
            (Place::Local(source), Place::Remote { sandbox, path }) => {
                upload::from_path(context, &remote(&sandbox).await?, &source, &path).await
            }
            (Place::Standard, Place::Remote { sandbox, path }) => {
                upload::from_stdin(context, &remote(&sandbox).await?, &path).await
            }
            (Place::Remote { .. }, Place::Remote { .. }) => Err(CliError::Usage(
                "both are in sandboxes: copy out of the one first, then into the other".to_owned(),
            )),
            (Place::Local(_) | Place::Standard, Place::Local(_) | Place::Standard) => Err(CliError::Usage(
                "neither is in a sandbox: write one of them as SANDBOX:PATH".to_owned(),
            )),
        }
    };
    let copied = tokio::select! {
        copied = copy => copied?,
        interrupt = signals.recv() => return Err(CliError::Interrupted(interrupt)),
    };
    if context.json && !to_stdout {
        output::json(&copied)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// What a path in a sandbox is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum There {
    Directory,
    /// Something that cannot be listed.
    Other,
    Nothing,
}

/// Finds out by listing: the API has no question of its own for it.
async fn look(remote: &Remote, path: &str) -> Result<There, CliError> {
    match remote.files().list(path, 1).await {
        Ok(_) => Ok(There::Directory),
        Err(Error::NotFound(_)) => Ok(There::Nothing),
        Err(Error::InvalidRequest(_) | Error::Conflict(_)) => Ok(There::Other),
        Err(error) => Err(error.into()),
    }
}
