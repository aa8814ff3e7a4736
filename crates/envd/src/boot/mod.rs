//! The two roles of pid 1, and what they share.

pub(crate) mod init;
pub(crate) mod initramfs;
mod network;

use std::ffi::CStr;
use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;

use rustix::mount::{MountFlags, mount};
use wrenn_proto::guest::cmdline as keys;

use crate::logging::log;

/// What the host tells the guest on the kernel command line.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Cmdline {
    pub(crate) root: Option<String>,
    pub(crate) address: Option<(Ipv4Addr, u8)>,
    pub(crate) gateway: Option<Ipv4Addr>,
    pub(crate) dns: Option<Ipv4Addr>,
}

impl Cmdline {
    /// Reads `/proc/cmdline`; what is missing or malformed is `None`.
    pub(crate) fn load() -> Self {
        Self::parse(&fs::read_to_string("/proc/cmdline").unwrap_or_default())
    }

    fn parse(text: &str) -> Self {
        let mut parsed = Self::default();
        for word in text.split_ascii_whitespace() {
            let Some((key, value)) = word.split_once('=') else {
                continue;
            };
            match key {
                keys::ROOT => parsed.root = Some(value.to_owned()),
                keys::IP => parsed.address = parse_address(value),
                keys::GATEWAY => parsed.gateway = value.parse().ok(),
                keys::DNS => parsed.dns = value.parse().ok(),
                _ => {}
            }
        }
        parsed
    }
}

fn parse_address(text: &str) -> Option<(Ipv4Addr, u8)> {
    let (address, prefix) = text.split_once('/')?;
    let prefix = prefix.parse().ok().filter(|prefix| *prefix <= 32)?;
    Some((address.parse().ok()?, prefix))
}

/// One mount, with its mount point created when missing. A failure is logged and survived: a guest without,
/// say, cgroups is still worth more than a kernel panic.
fn mount_at(source: &str, target: &str, kind: &str, flags: MountFlags, data: Option<&CStr>) -> bool {
    if let Err(error) = fs::create_dir_all(target) {
        log!("mkdir {target}: {error}");
    }
    match mount(source, target, kind, flags, data) {
        Ok(()) => true,
        // Already mounted, by the previous stage or by the kernel (`CONFIG_DEVTMPFS_MOUNT`).
        Err(rustix::io::Errno::BUSY) => true,
        Err(error) => {
            log!("mount {kind} on {target}: {error}");
            false
        }
    }
}

/// Whether this is root in a guest, whose pid 1 is this very program, and not an agent on a developer's machine.
pub(crate) fn in_guest() -> bool {
    rustix::process::geteuid().is_root()
        && fs::read_link("/proc/1/exe")
            .is_ok_and(|exe| exe.as_os_str() == wrenn_proto::guest::GUEST_ENVD_PATH)
}

/// Mounts what both stages need; the second one finds it there unless it was started without the first.
fn mount_kernel_filesystems() {
    if is_mounted("/proc") && is_mounted("/sys") && is_mounted("/dev") {
        return;
    }
    let strict = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount_at("proc", "/proc", "proc", strict, None);
    mount_at("sysfs", "/sys", "sysfs", strict, None);
    mount_at(
        "devtmpfs",
        "/dev",
        "devtmpfs",
        MountFlags::NOSUID,
        Some(c"mode=0755"),
    );
}

/// Whether something is mounted on the path already.
fn is_mounted(path: &str) -> bool {
    fs::read_to_string("/proc/self/mounts")
        .is_ok_and(|mounts| mounts.lines().any(|line| line.split(' ').nth(1) == Some(path)))
}

/// Where a block device's size is found, in sectors of 512 bytes.
pub(crate) fn block_device_sysfs(device: &str) -> Option<std::path::PathBuf> {
    let name = Path::new(device).file_name()?;
    Some(Path::new("/sys/class/block").join(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_read_key_by_key() {
        let parsed = Cmdline::parse(
            "console=ttyS0 quiet wrenn.root=/dev/vda wrenn.ip=10.0.2.15/24 wrenn.gw=10.0.2.2 wrenn.dns=10.0.2.3\n",
        );
        assert_eq!(
            parsed,
            Cmdline {
                root: Some("/dev/vda".into()),
                address: Some((Ipv4Addr::new(10, 0, 2, 15), 24)),
                gateway: Some(Ipv4Addr::new(10, 0, 2, 2)),
                dns: Some(Ipv4Addr::new(10, 0, 2, 3)),
            }
        );
    }

    #[test]
    fn malformed_values_are_absent() {
        let parsed = Cmdline::parse("wrenn.ip=10.0.2.15 wrenn.gw=here wrenn.dns= wrenn.root");
        assert_eq!(parsed, Cmdline::default());
        assert_eq!(parse_address("10.0.0.1/33"), None);
    }
}
