//! First stage: the kernel runs the binary as `/init` from the initramfs.
//!
//! ```text
//! /proc /sys /dev → drivers in lexical order → wait for the root disk → mount it on /newroot
//!   → tmpfs on /newroot/run, own binary copied there → move the mounts → switch root → exec `envd init`
//! ```
//!
//! A step that cannot be survived ends in [`halt`], which keeps pid 1 alive so that the reason stays readable
//! on the console instead of being pushed out by a kernel panic.

use std::convert::Infallible;
use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::mount::{MountFlags, mount, mount_move};
use wrenn_proto::guest::{GUEST_ENVD_PATH, INITRAMFS_MODULES_DIR};

use super::{Cmdline, mount_at, mount_kernel_filesystems};
use crate::logging::log;

const NEW_ROOT: &str = "/newroot";
/// A virtio disk appears within milliseconds of its driver; this allows for a badly overloaded host.
const ROOT_DEADLINE: Duration = Duration::from_secs(60);

#[derive(Debug, thiserror::Error)]
enum BootError {
    #[error(
        "the kernel command line names no root device ({})",
        wrenn_proto::guest::cmdline::ROOT
    )]
    NoRootNamed,
    #[error("{device} did not appear within {} s", ROOT_DEADLINE.as_secs())]
    NoRootDevice { device: String },
    #[error("{step}")]
    Step { step: &'static str, source: io::Error },
}

/// Names the step in which a system call failed.
fn step<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> BootError {
    move |error| BootError::Step {
        step,
        source: error.into(),
    }
}

/// Runs the stage; returns only by way of [`halt`].
pub(crate) fn run() -> ExitCode {
    mount_kernel_filesystems();
    load_modules(Path::new(INITRAMFS_MODULES_DIR));
    let Err(error) = switch_to_root();
    match std::error::Error::source(&error) {
        Some(cause) => log!("boot failed: {error}: {cause}"),
        None => log!("boot failed: {error}"),
    }
    halt()
}

/// Waits forever: pid 1 may not end.
pub(super) fn halt() -> ! {
    loop {
        std::thread::park();
    }
}

fn load_modules(dir: &Path) {
    let Ok(entries) = fs::read_dir(dir) else {
        log!("no modules in {}", dir.display());
        return;
    };
    let mut modules: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    modules.sort();
    let cmdline = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    for module in modules {
        let parameters = CString::new(parameters(&cmdline, &module)).unwrap_or_default();
        let loaded = File::open(&module)
            .and_then(|file| rustix::system::finit_module(&file, &parameters, 0).map_err(io::Error::from));
        match loaded {
            Ok(()) => {}
            // Built into the kernel, or loaded already.
            Err(error) if error.raw_os_error() == Some(Errno::EXIST.raw_os_error()) => {}
            Err(error) => log!("module {}: {error}", module.display()),
        }
    }
}

/// What the command line says to a module: `virtio_net.napi_tx=0` is `napi_tx=0` to `01-virtio_net.ko`. The kernel itself
/// reads such words only for drivers that are built in.
fn parameters(cmdline: &str, module: &Path) -> String {
    let name = module
        .file_stem()
        .and_then(|name| name.to_str())
        .unwrap_or_default();
    let name = name.trim_start_matches(|c: char| c.is_ascii_digit() || c == '-');
    cmdline
        .split_ascii_whitespace()
        .filter_map(|word| word.strip_prefix(name)?.strip_prefix('.'))
        .collect::<Vec<_>>()
        .join(" ")
}

fn switch_to_root() -> Result<Infallible, BootError> {
    let device = Cmdline::load().root.ok_or(BootError::NoRootNamed)?;
    wait_for_device(&device)?;
    fs::create_dir_all(NEW_ROOT).map_err(step("mkdir /newroot"))?;
    // A lazily initialised inode table would be written in the background, dirtying the disk of every guest.
    mount(
        &device,
        NEW_ROOT,
        "ext4",
        MountFlags::NOATIME,
        Some(c"noinit_itable"),
    )
    .map_err(step("mount the root file system"))?;

    let run = format!("{NEW_ROOT}/run");
    mount_at(
        "tmpfs",
        &run,
        "tmpfs",
        MountFlags::NOSUID | MountFlags::NODEV,
        Some(c"mode=0755,size=20%"),
    );
    copy_self(&PathBuf::from(format!("{NEW_ROOT}{GUEST_ENVD_PATH}"))).map_err(step("copy the agent"))?;
    for point in ["/proc", "/sys", "/dev"] {
        let target = format!("{NEW_ROOT}{point}");
        let _ = fs::create_dir(&target);
        mount_move(point, &target).map_err(step("move a mount into the new root"))?;
    }

    // What stays in the initramfs stays in memory for the guest's whole life.
    let _ = fs::remove_dir_all(INITRAMFS_MODULES_DIR);
    let _ = fs::remove_file("/init");
    std::env::set_current_dir(NEW_ROOT).map_err(step("chdir to the new root"))?;
    mount_move(".", "/").map_err(step("move the new root"))?;
    rustix::process::chroot(".").map_err(step("chroot"))?;
    std::env::set_current_dir("/").map_err(step("chdir to /"))?;
    let error = Command::new(GUEST_ENVD_PATH).arg("init").env_clear().exec();
    Err(step("exec the second stage")(error))
}

fn wait_for_device(device: &str) -> Result<(), BootError> {
    let deadline = Instant::now() + ROOT_DEADLINE;
    let mut pause = Duration::from_millis(1);
    while !Path::new(device).exists() {
        if Instant::now() > deadline {
            return Err(BootError::NoRootDevice {
                device: device.to_owned(),
            });
        }
        // devtmpfs sends no notification that could be waited for without a socket and a parser.
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
    Ok(())
}

fn copy_self(target: &Path) -> io::Result<()> {
    if let Some(dir) = target.parent() {
        fs::create_dir_all(dir)?;
        fs::set_permissions(dir, fs::Permissions::from_mode(0o700))?;
    }
    fs::copy("/proc/self/exe", target)?;
    fs::set_permissions(target, fs::Permissions::from_mode(0o700))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_gets_its_own_parameters() {
        let of = |module: &str| {
            let cmdline = "quiet virtio_net.napi_tx=0 virtio_net.csum=1 virtio_blk.queue_depth=8 virtio.x=1";
            parameters(cmdline, Path::new(module))
        };
        assert_eq!(of("/modules/01-virtio_net.ko"), "napi_tx=0 csum=1");
        assert_eq!(of("/modules/00-virtio.ko"), "x=1");
        assert_eq!(of("/modules/02-ext4.ko"), "");
    }
}
