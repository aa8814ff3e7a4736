//! What the machine says of itself; `checks` judges it.

use std::ffi::OsStr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use wrenn_host::vmm::{ProbeReport, probe_cached, probe_fresh};

use super::DoctorInput;

/// The accelerator's verdict, remembered or new.
pub(super) fn probe(input: &DoctorInput) -> ProbeReport {
    let program = std::env::current_exe().unwrap_or_else(|_| "wrenn".into());
    match input.fresh_probe {
        true => probe_fresh(&input.cache_dir, &program),
        false => probe_cached(&input.cache_dir, &program),
    }
}

/// What earlier starts have made already, and hence needs no tools any more.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Made {
    /// Version of the newest unpacked kernel.
    pub(super) kernel: Option<String>,
    /// A root filesystem is there.
    pub(super) rootfs: bool,
    /// The built-in template can be used.
    pub(super) template: bool,
}

impl Made {
    pub(super) fn look(input: &DoctorInput) -> Self {
        let mut kernels: Vec<String> = names(&input.cache_dir.join("kernel"))
            .into_iter()
            .filter(|name| !name.starts_with('.'))
            .filter(|name| {
                input
                    .cache_dir
                    .join("kernel")
                    .join(name)
                    .join("vmlinux")
                    .is_file()
            })
            .collect();
        kernels.sort_by_key(|name| {
            name.split(|c: char| !c.is_ascii_digit())
                .filter_map(|part| part.parse::<u64>().ok())
                .collect::<Vec<_>>()
        });
        let has_image = |dir: PathBuf| {
            names(&dir)
                .iter()
                .any(|name| name.ends_with(".ext4") && !name.starts_with('.'))
        };
        // The platform's own team and its `minimal` template have the zero id.
        let zero = "00000000-0000-0000-0000-000000000000";
        let minimal = input.data_dir.join("images/teams").join(zero).join(zero);
        Self {
            kernel: kernels.pop(),
            rootfs: has_image(input.cache_dir.join("rootfs"))
                || has_image(input.data_dir.join("images/base")),
            template: names(&minimal)
                .iter()
                .any(|image| minimal.join(image).join("manifest.json").is_file()),
        }
    }
}

/// The host's state and its user's.
#[derive(Debug, Clone, Default)]
pub(super) struct Host {
    pub(super) root: bool,
    pub(super) meminfo: String,
    /// User namespaces that users may make, where the kernel says so.
    pub(super) max_user_namespaces: Option<u64>,
    /// Debian's switch: 0 closes user namespaces to ordinary users.
    pub(super) unprivileged_userns: Option<u64>,
    /// Ubuntu's switch: 1 closes them to programs without a profile.
    pub(super) restricted_userns: Option<u64>,
    /// The user has a range of ids of its own.
    pub(super) subordinate_ids: bool,
}

impl Host {
    pub(super) fn look() -> Self {
        let uid = rustix::process::geteuid();
        let number = |path: &str| std::fs::read_to_string(path).ok()?.trim().parse().ok();
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let user = user_name(&read("/etc/passwd"), uid.as_raw());
        Self {
            root: uid.is_root(),
            meminfo: read("/proc/meminfo"),
            max_user_namespaces: number("/proc/sys/user/max_user_namespaces"),
            unprivileged_userns: number("/proc/sys/kernel/unprivileged_userns_clone"),
            restricted_userns: number("/proc/sys/kernel/apparmor_restrict_unprivileged_userns"),
            subordinate_ids: ["/etc/subuid", "/etc/subgid"]
                .iter()
                .all(|path| has_range(&read(path), user.as_deref(), uid.as_raw())),
        }
    }
}

pub(super) fn user_name(passwd: &str, uid: u32) -> Option<String> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(uid)).then(|| name.to_owned())
    })
}

/// Whether a file like `/etc/subuid` gives the user ids; it may name the user by name or number.
pub(super) fn has_range(text: &str, user: Option<&str>, uid: u32) -> bool {
    text.lines().any(|line| {
        let mut fields = line.trim().split(':');
        let owner = fields.next().unwrap_or_default();
        let count = fields.nth(1).and_then(|count| count.parse::<u64>().ok());
        (Some(owner) == user || owner.parse() == Ok(uid)) && count.is_some_and(|count| count >= 65_536)
    })
}

pub(super) fn names(dir: &Path) -> Vec<String> {
    std::fs::read_dir(dir)
        .map(|entries| {
            entries
                .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
                .collect()
        })
        .unwrap_or_default()
}

/// Where a program is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Program {
    Found,
    /// Installed in a folder that `PATH` lacks.
    OutsidePath(PathBuf),
    Missing,
}

/// Looks for a program as a start of it would, and then where system tools are.
pub(super) fn find_program(name: &str, path: Option<&OsStr>) -> Program {
    let runnable = |file: &Path| {
        std::fs::metadata(file).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
    };
    if path.is_some_and(|path| std::env::split_paths(path).any(|dir| runnable(&dir.join(name)))) {
        return Program::Found;
    }
    ["/usr/sbin", "/sbin", "/usr/local/sbin"]
        .map(PathBuf::from)
        .into_iter()
        .find(|dir| runnable(&dir.join(name)))
        .map_or(Program::Missing, Program::OutsidePath)
}

/// The nearest folder that exists: where a folder that is to be made will be.
pub(super) fn existing(dir: &Path) -> PathBuf {
    let absolute = std::path::absolute(dir).unwrap_or_else(|_| dir.to_path_buf());
    absolute
        .ancestors()
        .find(|dir| dir.exists())
        .unwrap_or(Path::new("/"))
        .to_path_buf()
}
