//! Work with files that may take long, off the threads that serve everybody.

use std::io;
use std::path::Path;

use crate::error::{HostError, Result};

/// Does it on a thread that may wait.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| HostError::Vmm(format!("a worker ended: {error}")))?
}

/// Removes a folder with all that is in it; none there is as wanted.
pub(crate) async fn remove_folder(path: &Path) -> io::Result<()> {
    match tokio::fs::remove_dir_all(path).await {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        outcome => outcome,
    }
}
