//! Builds the root filesystem of the built-in template from Debian packages, as root or as an ordinary user.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::Command;

use super::mirror::{self, Apt, DebianMirror};
use super::{Progress, fingerprint};
use crate::error::{HostError, IoContext as _, Result};
use crate::layout::Layout;
use crate::offload::{blocking, remove_folder};

/// What the root filesystem is made of.
#[derive(Debug, Clone)]
pub(crate) struct Recipe {
    pub(crate) suite: &'static str,
    pub(crate) packages: &'static [&'static str],
    pub(crate) disk_mb: u32,
    /// PEM bundle to trust instead of the release's own, for machines behind a private authority.
    pub(crate) ca_bundle: Option<PathBuf>,
    /// Differs when anything of the above, the bundle's content included, or the way of building does.
    pub(crate) key: String,
}

impl Recipe {
    /// The `minimal` template.
    pub(crate) fn minimal(ca_bundle: Option<PathBuf>) -> Result<Self> {
        let mut recipe = Self {
            suite: "bookworm",
            packages: &[
                "bash",
                "ca-certificates",
                "coreutils",
                "curl",
                "git",
                "iproute2",
                "ncurses-bin",
                "ncurses-term",
                "procps",
                "python3",
                "sudo",
            ],
            disk_mb: 20480,
            ca_bundle,
            key: String::new(),
        };
        let bundle = match &recipe.ca_bundle {
            Some(path) => std::fs::read(path).at("read the certificate bundle", path)?,
            None => Vec::new(),
        };
        recipe.key = fingerprint(&[
            recipe.suite.as_bytes(),
            recipe.packages.join(" ").as_bytes(),
            CUSTOMIZE.as_bytes(),
            IMAGE.as_bytes(),
            recipe.disk_mb.to_string().as_bytes(),
            &bundle,
        ]);
        Ok(recipe)
    }
}

/// Begin of the name of a builder's folder in the cache; the lock beside it has an extension.
const WORK: &str = ".work-";
const LOCK: &str = "lock";

/// Runs in the shell outside the tree, whose path is `$1`; `$2` is a certificate bundle or empty.
const CUSTOMIZE: &str = r#"
set -eu
root="$1"
chroot "$root" useradd --create-home --uid 1000 --user-group --shell /bin/bash user
printf 'user ALL=(ALL:ALL) NOPASSWD: ALL\n' > "$root/etc/sudoers.d/user"
chmod 0440 "$root/etc/sudoers.d/user"
ln -sf python3 "$root/usr/bin/python"
printf '127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n' > "$root/etc/hosts"
printf 'sandbox\n' > "$root/etc/hostname"
: > "$root/etc/machine-id"
printf 'LANG=C.UTF-8\n' > "$root/etc/default/locale"
rm -f "$root/etc/resolv.conf"
printf 'nameserver 10.0.2.3\n' > "$root/etc/resolv.conf"
if [ -n "${2:-}" ]; then
  cp "$2" "$root/etc/ssl/certs/ca-certificates.crt"
fi
rm -rf "$root/var/cache/apt/archives/"*.deb "$root/var/log/"*.log "$root/var/log/apt"
"#;

/// Turns the archive `$1` into the ext4 image `$2` of `$3` MiB with the folder `$4` to work in. Lazy tables keep the file sparse.
/// Device nodes stay out: an ordinary user cannot make them, and the guest mounts its own.
const IMAGE: &str = r#"
set -eu
mkdir "$4"
tar --extract --numeric-owner --xattrs --exclude='./dev/*' --file "$1" --directory "$4"
truncate --size "$3M" "$2"
mke2fs -q -t ext4 -d "$4" -m 0 -i 32768 -J size=32 -L root \
  -E lazy_itable_init=1,lazy_journal_init=1,root_owner=0:0 -F "$2"
rm -rf "$4"
"#;

/// Returns the image, from the cache when the same recipe was built before on this machine.
pub(super) async fn ensure(
    layout: &Layout,
    recipe: &Recipe,
    mirror: Option<&DebianMirror>,
    progress: &Progress,
) -> Result<PathBuf> {
    let key = &recipe.key;
    let image = layout.base_images().join(format!("{key}.ext4"));
    if image.is_file() {
        return Ok(image);
    }
    let cached = layout.rootfs_cache().join(format!("{key}.ext4"));
    if !cached.is_file() {
        build(layout, recipe, mirror, &cached, progress).await?;
    }
    // The data directory keeps a file of its own: it must survive a cache that is emptied.
    progress.step(70, "taking the root filesystem");
    if std::fs::hard_link(&cached, &image).is_err() && !image.is_file() {
        let partial = layout.tmp().join(format!("{key}.ext4"));
        let (from, to) = (cached.clone(), partial.clone());
        blocking(move || crate::disk::copy_sparse(&from, &to)).await?;
        std::fs::rename(&partial, &image).at("move into place", &image)?;
    }
    Ok(image)
}

async fn build(
    layout: &Layout,
    recipe: &Recipe,
    mirror: Option<&DebianMirror>,
    cached: &Path,
    progress: &Progress,
) -> Result<()> {
    let cache = layout.rootfs_cache();
    sweep(&cache).await;
    let work = cache.join(format!("{WORK}{}", uuid::Uuid::new_v4().simple()));
    // Held as long as this process builds, so that others know whose folder this is.
    let lock_path = work.with_extension(LOCK);
    let lock = std::fs::File::create(&lock_path).at("create", &lock_path)?;
    lock.lock().at("lock", &lock_path)?;
    std::fs::create_dir_all(&work).at("create", &work)?;
    let outcome = build_in(&work, recipe, mirror, cached, progress).await;
    clear(&work).await;
    let _ = std::fs::remove_file(&lock_path);
    outcome
}

/// Removes what builders left that were killed: their folders in the cache, which agents share, and programs of theirs
/// that still run.
async fn sweep(cache: &Path) {
    let Ok(entries) = std::fs::read_dir(cache) else {
        return;
    };
    for path in entries.flatten().map(|entry| entry.path()) {
        let named = |name: &std::ffi::OsStr| name.to_string_lossy().starts_with(WORK);
        if path.extension().is_none_or(|extension| extension != LOCK) || !path.file_name().is_some_and(named)
        {
            continue;
        }
        let abandoned = std::fs::File::open(&path).is_ok_and(|lock| lock.try_lock().is_ok());
        if !abandoned {
            continue;
        }
        let work = path.with_extension("");
        tracing::info!(folder = %work.display(), "removing a build that was cut short");
        end_programs(&work);
        clear(&work).await;
        let _ = std::fs::remove_file(&path);
    }
}

/// Kills the programs that were told to work in `work`; its name is unique.
fn end_programs(work: &Path) {
    let Some(name) = work.file_name().and_then(|name| name.to_str()) else {
        return;
    };
    for (pid, process) in crate::vmm::process::processes() {
        let ours = std::fs::read(process.join("cmdline"))
            .is_ok_and(|line| String::from_utf8_lossy(&line).contains(name));
        let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw);
        if let (true, Some(pid)) = (ours, pid) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
}

/// Removes a builder's folder. An ordinary user's holds files of mapped users, which only their namespace can remove.
async fn clear(work: &Path) {
    if remove_folder(work).await.is_ok() || rustix::process::geteuid().is_root() {
        return;
    }
    if let Err(error) = super::kernel::run("rm", mapped("rm").arg("-rf").arg(work)).await {
        tracing::warn!(folder = %work.display(), %error, "cannot remove a build's folder");
    }
}

/// A program that runs with mapped users: files keep their owners, and this user is root among them, so that the work
/// folder is in reach.
fn mapped(program: &str) -> Command {
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-auto", "--map-root-user", program]);
    command
}

async fn build_in(
    work: &Path,
    recipe: &Recipe,
    mirror: Option<&DebianMirror>,
    cached: &Path,
    progress: &Progress,
) -> Result<()> {
    let apt = Apt::prepare(mirror, recipe.suite, work).await?;
    let root = rustix::process::geteuid().is_root();
    let archive = work.join("rootfs.tar");
    let bundle = recipe
        .ca_bundle
        .as_deref()
        .map(|path| path.to_string_lossy().into_owned())
        .unwrap_or_default();
    // mmdebstrap hands a hook to the shell with the tree's path as its argument.
    let hook = format!("sh -c {} sh \"$1\" {}", quote(CUSTOMIZE), quote(&bundle));
    let mut command = Command::new("mmdebstrap");
    command
        .arg(if root { "--mode=root" } else { "--mode=unshare" })
        .args(["--variant=minbase", "--format=tar", "--skip=check/empty"])
        .arg(format!("--include={}", recipe.packages.join(",")))
        .arg(format!("--customize-hook={hook}"))
        .arg(recipe.suite)
        .arg(&archive);
    if let Some(sources) = &apt.sources {
        // The hooks run in order, and come before the mirror.
        command.arg(format!("--customize-hook={}", mirror::forget(recipe.suite)));
        command.arg(sources);
    }
    progress.step(10, "installing Debian packages (about a minute)");
    follow(&mut command, progress).await?;

    progress.step(60, "making the root filesystem's image");
    let image = work.join("rootfs.ext4");
    let mut command = if root { Command::new("sh") } else { mapped("sh") };
    command
        .args(["-c", IMAGE, "sh"])
        .arg(&archive)
        .arg(&image)
        .arg(recipe.disk_mb.to_string())
        .arg(work.join("tree"));
    super::kernel::run("mke2fs", &mut command).await?;
    std::fs::rename(&image, cached).at("move into place", cached)
}

/// Runs mmdebstrap, showing its own progress lines; on failure its last lines are the error.
async fn follow(command: &mut Command, progress: &Progress) -> Result<()> {
    let program = "mmdebstrap";
    let mut child = super::kernel::Group::spawn(
        program,
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped()),
    )?;
    let mut last: std::collections::VecDeque<String> = std::collections::VecDeque::new();
    if let Some(stderr) = child.inner.stderr.take() {
        let mut lines = BufReader::new(stderr).lines();
        let mut percent = 10;
        while let Ok(Some(line)) = lines.next_line().await {
            if let Some(step) = line.strip_prefix("I: ") {
                // The number of stages is fixed; there is no finer measure.
                percent = (percent + 4).min(58);
                progress.step(percent, format!("Debian packages: {step}"));
            }
            if last.len() == 12 {
                last.pop_front();
            }
            last.push_back(line);
        }
    }
    if child.wait().await?.success() {
        return Ok(());
    }
    let said = last.into_iter().collect::<Vec<_>>().join("\n");
    Err(HostError::Program {
        program,
        detail: format!(
            "{said}\nIs a Debian mirror reachable (apt-get update)? As an ordinary user it also needs the package uidmap"
        ),
    })
}

fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}
