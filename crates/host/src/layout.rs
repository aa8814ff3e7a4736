//! Every path the host agent uses, in one place.
//!
//! ```text
//! $WRENN_DIR/
//!   images/base/{rootfs}.ext4                     root filesystems, read-only backing files
//!   images/teams/{team}/{template}/{image}/       memory, device state, disk and manifest of a template
//!   sandboxes/{sandbox}/                          journal, saved memory and device state, log of a sandbox (root alone)
//!   sandboxes/{sandbox}/vm/                       its disk overlay and sockets: where its VM process works
//!   pool/{vm}/                                    the same, of a VM that no sandbox has claimed yet
//!   tmp/                                          unfinished work; emptied at start
//!   host.json                                     the host's registration (0600)
//! $WRENN_CACHE_DIR/
//!   kernel/{version}/                             unpacked guest kernels
//!   rootfs/{recipe}.ext4                          built root filesystems
//! ```
//!
//! Work in progress is written under `tmp/` and renamed into place, so a path that exists is whole.

use std::io;
use std::path::{Path, PathBuf};

use wrenn_proto::id::{TeamId, TemplateId};

use crate::error::{HostError, IoContext as _, Result};

/// The file that holds the host's registration.
pub(crate) const REGISTRATION: &str = "host.json";

/// Replaces a file that only the agent reads, whole or not at all.
pub(crate) fn write_private(path: &Path, value: &impl serde::Serialize) -> Result<()> {
    let bytes = serde_json::to_vec_pretty(value)
        .map_err(|error| HostError::Vmm(format!("cannot write {}: {error}", path.display())))?;
    let partial = path.with_extension("json.new");
    write_secret(&partial, &bytes)?;
    std::fs::rename(&partial, path).at("write", path)
}

/// Writes a file that only this user may read.
pub(crate) fn write_secret(path: &Path, bytes: &[u8]) -> Result<()> {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    let mut file = std::fs::File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .at("write", path)?;
    file.write_all(bytes).at("write", path)
}

/// Paths below the data directory and the cache directory.
#[derive(Debug, Clone)]
pub struct Layout {
    data: PathBuf,
    cache: PathBuf,
}

impl Layout {
    /// Takes the two roots and creates the folders below them.
    ///
    /// # Errors
    /// When a folder cannot be created.
    pub fn create(data: &Path, cache: &Path) -> io::Result<Self> {
        let layout = Self {
            data: std::path::absolute(data)?,
            cache: std::path::absolute(cache)?,
        };
        for dir in [
            layout.base_images(),
            layout.data.join("images/teams"),
            layout.sandboxes(),
            layout.pool(),
            layout.tmp(),
            layout.kernels(),
            layout.rootfs_cache(),
        ] {
            std::fs::create_dir_all(dir)?;
        }
        // The kernel tells where a process works without links and dots; so strays are found by that.
        Ok(Self {
            data: layout.data.canonicalize()?,
            cache: layout.cache.canonicalize()?,
        })
    }

    /// The data directory itself.
    #[must_use]
    pub fn data(&self) -> &Path {
        &self.data
    }

    pub(crate) fn images(&self) -> PathBuf {
        self.data.join("images")
    }

    pub(crate) fn base_images(&self) -> PathBuf {
        self.data.join("images/base")
    }

    pub(crate) fn team_images(&self) -> PathBuf {
        self.data.join("images/teams")
    }

    /// All images of one template.
    pub(crate) fn template(&self, team: TeamId, template: TemplateId) -> PathBuf {
        self.data.join(format!("images/teams/{}/{}", team.0, template.0))
    }

    pub(crate) fn sandboxes(&self) -> PathBuf {
        self.data.join("sandboxes")
    }

    pub(crate) fn pool(&self) -> PathBuf {
        self.data.join("pool")
    }

    pub(crate) fn tmp(&self) -> PathBuf {
        self.data.join("tmp")
    }

    pub(crate) fn registration(&self) -> PathBuf {
        self.data.join(REGISTRATION)
    }

    pub(crate) fn kernels(&self) -> PathBuf {
        self.cache.join("kernel")
    }

    pub(crate) fn rootfs_cache(&self) -> PathBuf {
        self.cache.join("rootfs")
    }
}

/// A folder of unfinished work. It goes when this is dropped, unless it was moved to where it belongs.
#[derive(Debug)]
pub(crate) struct WorkDir(Option<PathBuf>);

impl WorkDir {
    pub(crate) fn create(path: PathBuf) -> Result<Self> {
        std::fs::create_dir(&path).at("create", &path)?;
        Ok(Self(Some(path)))
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.as_deref().unwrap_or(Path::new(""))
    }

    /// Moves it into place, whole or not at all.
    pub(crate) fn persist(mut self, to: &Path) -> Result<()> {
        std::fs::rename(self.path(), to).at("move into place", to)?;
        self.0 = None;
        Ok(())
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        if let Some(path) = &self.0
            && let Err(error) = std::fs::remove_dir_all(path)
        {
            tracing::warn!(path = %path.display(), %error, "unfinished work is left to the next start");
        }
    }
}

/// Files inside the directory of one VM (a sandbox's, or a pooled one's).
///
/// The directory may be renamed while the VM runs: QEMU works in the folder `vm` in it by relative names, and the agent
/// reaches the sockets through whatever name the directory has at the moment. That folder belongs to the VM's user while
/// the VM runs, and nothing in it is believed: an escape from the guest ends there, and finds no file by which to
/// mislead an agent that runs as root.
#[derive(Debug, Clone)]
pub(crate) struct VmDir(PathBuf);

impl VmDir {
    pub(crate) const DISK: &'static str = "disk.qcow2";
    pub(crate) const QMP: &'static str = "qmp.sock";
    pub(crate) const NET: &'static str = "net.sock";
    pub(crate) const CONSOLE: &'static str = "console.sock";
    pub(crate) const INCOMING: &'static str = "incoming.sock";
    pub(crate) const PARTIAL_STATE: &'static str = "state.bin.new";
    pub(crate) const STATE: &'static str = "state.bin";

    pub(crate) fn new(path: PathBuf) -> Self {
        Self(path)
    }

    /// Makes the two folders.
    pub(crate) fn create(path: PathBuf) -> Result<Self> {
        use std::os::unix::fs::DirBuilderExt as _;
        let dir = Self(path);
        for path in [dir.path().to_path_buf(), dir.work()] {
            std::fs::DirBuilder::new()
                .mode(0o700)
                .create(&path)
                .at("create", &path)?;
        }
        Ok(dir)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// Where the VM's process works.
    pub(crate) fn work(&self) -> PathBuf {
        self.0.join("vm")
    }

    pub(crate) fn disk(&self) -> PathBuf {
        self.work().join(Self::DISK)
    }

    pub(crate) fn journal(&self) -> PathBuf {
        self.0.join("sandbox.json")
    }

    /// Device state of a paused sandbox.
    pub(crate) fn state(&self) -> PathBuf {
        self.0.join(Self::STATE)
    }

    /// Device state that is being written.
    pub(crate) fn partial_state(&self) -> PathBuf {
        self.work().join(Self::PARTIAL_STATE)
    }

    /// Memory that is being written.
    pub(crate) fn partial_memory(&self) -> PathBuf {
        self.0.join("memory.diff.new")
    }

    /// Pages of a paused sandbox that differ from its template's.
    pub(crate) fn memory_diff(&self) -> PathBuf {
        self.0.join("memory.diff")
    }

    /// What QEMU itself says on stderr.
    pub(crate) fn vmm_log(&self) -> PathBuf {
        self.0.join("vmm.log")
    }
}

/// Files inside the directory of one template image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ImageDir(PathBuf);

impl ImageDir {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    pub(crate) fn manifest(&self) -> PathBuf {
        self.0.join("manifest.json")
    }

    /// The guest's memory, a flat file that clones map copy-on-write.
    pub(crate) fn memory(&self) -> PathBuf {
        self.0.join("memory.img")
    }

    pub(crate) fn state(&self) -> PathBuf {
        self.0.join(VmDir::STATE)
    }

    pub(crate) fn disk(&self) -> PathBuf {
        self.0.join(VmDir::DISK)
    }

    /// Present once the template was deleted while something still depended on its files.
    pub(crate) fn deleted_marker(&self) -> PathBuf {
        self.0.join("deleted")
    }
}
