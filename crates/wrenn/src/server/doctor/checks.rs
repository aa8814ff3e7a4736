//! The checks: each judges one prerequisite and names the remedy. `None` means that it does not apply here.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use wrenn_host::meminfo_mb;
use wrenn_host::vmm::{Accelerator, MemoryCgroup, ProbeReport, Qemu};

use super::Check;
use super::machine::{Host, Made, Program, existing, find_program, names};

/// Space below which the host agent starts nothing.
const MIN_DISK_MB: u64 = 1024;
/// What building the built-in template takes, with its packages and the room to work in.
const BUILD_DISK_MB: u64 = 3072;
const GOOD_DISK_MB: u64 = 10 * 1024;
const GOOD_MEMORY_MB: u64 = 1536;
const SYSTEM_BUNDLE: &str = "/etc/ssl/certs/ca-certificates.crt";
const ADDED_AUTHORITIES: &str = "/usr/local/share/ca-certificates";
/// How long a server on our port may take to say who it is.
const HEALTH_PATIENCE: Duration = Duration::from_millis(200);

/// The verdict as a check, and how guests will run.
pub(super) fn accelerator(report: ProbeReport, wanted: Option<Accelerator>) -> (Check, Accelerator) {
    let name = "accelerator";
    let ProbeReport {
        verdict,
        detail,
        remedy,
        millis: _,
    } = report;
    let chosen = wanted.unwrap_or(verdict);
    let check = match (wanted, verdict) {
        (Some(Accelerator::Kvm), Accelerator::Tcg) => {
            let remedy = remedy.map_or_else(String::new, |remedy| format!(", or: {remedy}"));
            Check::blocking(
                name,
                format!("kvm was asked for, but {detail}"),
                format!("use --accel auto{remedy}"),
            )
        }
        (Some(Accelerator::Tcg), Accelerator::Kvm) => Check::warn(
            name,
            format!("tcg was asked for, though {detail}"),
            "use --accel auto for far faster sandboxes",
        ),
        (_, Accelerator::Kvm) => Check::ok(name, format!("kvm: {detail}")),
        (_, Accelerator::Tcg) => {
            let remedy =
                remedy.unwrap_or_else(|| "nothing to do: sandboxes run in software, more slowly".to_owned());
            Check::warn(name, format!("tcg (software): {detail}"), remedy)
        }
    };
    (check, chosen)
}

/// QEMU's version and its firmware.
pub(super) fn qemu() -> Vec<Check> {
    let install =
        "sudo apt-get install qemu-system-x86 (on Debian 12: add -t bookworm-backports for version 10)";
    let found = match Qemu::find(Accelerator::Tcg, MemoryCgroup::Unavailable, None) {
        Err(error) => return vec![Check::blocking("qemu", error.to_string(), install)],
        Ok(found) => found,
    };
    let (major, minor, micro) = found.version;
    let version = format!("{major}.{minor}.{micro}");
    let version = match major {
        10.. => Check::ok("qemu", version),
        _ => Check::warn(
            "qemu",
            format!("{version} works; 10 runs and restores sandboxes several times faster"),
            install,
        ),
    };
    vec![version, firmware(&found.binary)]
}

fn firmware(binary: &Path) -> Check {
    // Each QEMU knows its own folders, one a line.
    let told = Command::new(binary)
        .args(["-L", "help"])
        .output()
        .map(|output| output.stdout)
        .unwrap_or_default();
    let folders = String::from_utf8_lossy(&told).into_owned();
    let file = folders
        .lines()
        .map(|folder| PathBuf::from(folder).join("qboot.rom"))
        .find(|file| file.is_file());
    match file {
        Some(file) => Check::ok("firmware", file.display().to_string()),
        None => Check::blocking(
            "firmware",
            "QEMU's folders have no qboot.rom",
            "sudo apt-get install --reinstall qemu-system-data",
        ),
    }
}

pub(super) fn cgroup(root: bool) -> Vec<Check> {
    let check = match MemoryCgroup::detect() {
        MemoryCgroup::V2(path) => Check::ok(
            "cgroup",
            format!("each VM's memory is bounded below {} (v2)", path.display()),
        ),
        MemoryCgroup::V1(path) => Check::ok(
            "cgroup",
            format!("each VM's memory is bounded below {} (v1)", path.display()),
        ),
        MemoryCgroup::Unavailable => Check::warn(
            "cgroup",
            "no memory controller that this user may use: VMs are bounded by their address space instead",
            if root {
                "make the memory controller of cgroups writable for this system"
            } else {
                "start as root for exact bounds"
            },
        ),
    };
    vec![check]
}

pub(super) fn data_dir(dir: &Path) -> Vec<Check> {
    let name = "data";
    let place = existing(dir);
    let check = if !place.is_dir() {
        Check::blocking(
            name,
            format!("{} is no folder", place.display()),
            "choose another with --data-dir",
        )
    } else if let Err(error) =
        rustix::fs::access(&place, rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK)
    {
        let value = format!("{} may not be written to: {error}", place.display());
        Check::blocking(
            name,
            value,
            "choose another with --data-dir, or give this user the folder",
        )
    } else {
        let later = if place == dir {
            ""
        } else {
            " (made at the first start)"
        };
        Check::ok(name, format!("{}{later}", dir.display()))
    };
    vec![check]
}

pub(super) fn disk(dir: &Path, template: bool) -> Vec<Check> {
    let check = match rustix::fs::statvfs(existing(dir)) {
        Ok(stat) => judge_disk(stat.f_bavail.saturating_mul(stat.f_frsize) >> 20, template),
        Err(error) => Check::warn(
            "disk",
            format!("free space is not known: {error}"),
            "check the data directory's file system",
        ),
    };
    vec![check]
}

pub(super) fn judge_disk(free_mb: u64, template: bool) -> Check {
    let name = "disk";
    let value = format!("{:.1} GiB free", free_mb as f64 / 1024.0);
    let needed = if template { MIN_DISK_MB } else { BUILD_DISK_MB };
    let remedy = "free some space, or choose another file system with --data-dir";
    if free_mb < needed {
        Check::blocking(
            name,
            format!("{value}; at least {:.0} GiB are needed", needed as f64 / 1024.0),
            remedy,
        )
    } else if free_mb < GOOD_DISK_MB {
        Check::warn(
            name,
            format!("{value}; each sandbox keeps its changes there"),
            remedy,
        )
    } else {
        Check::ok(name, value)
    }
}

pub(super) fn memory(meminfo: &str) -> Vec<Check> {
    let (total, available) = (
        meminfo_mb(meminfo, "MemTotal"),
        meminfo_mb(meminfo, "MemAvailable"),
    );
    let (Some(total), Some(available)) = (total, available) else {
        return Vec::new();
    };
    let value = format!(
        "{:.1} GiB available of {:.1}",
        available as f64 / 1024.0,
        total as f64 / 1024.0
    );
    // Not blocking: what is available can change at any moment, and each start of a sandbox is checked.
    vec![if available < GOOD_MEMORY_MB {
        Check::warn(
            "memory",
            format!("{value}; few sandboxes fit"),
            "end other programs, or use a larger machine",
        )
    } else {
        Check::ok("memory", value)
    }]
}

/// Certificates: the host's, for downloads, and what guests get.
pub(super) fn authorities(guest_bundle: Option<&Path>) -> Vec<Check> {
    let name = "authorities";
    let count = |path: &Path| {
        std::fs::read_to_string(path).map(|text| text.matches("-----BEGIN CERTIFICATE-----").count())
    };
    let bundle = Path::new(SYSTEM_BUNDLE);
    if let Some(path) = guest_bundle
        && path != bundle
        && let problem @ (Ok(0) | Err(_)) = count(path)
    {
        let why = problem.map_or_else(
            |error| error.to_string(),
            |_| "it holds no certificate".to_owned(),
        );
        let value = format!("the guests' bundle {} is unusable: {why}", path.display());
        return vec![Check::blocking(
            name,
            value,
            "name a readable PEM file with --guest-ca-bundle, or use 'auto'",
        )];
    }
    let known = count(bundle).unwrap_or(0);
    if known == 0 {
        let value = format!("{SYSTEM_BUNDLE} is missing or empty: downloads over TLS will fail");
        return vec![Check::fail(
            name,
            value,
            "sudo apt-get install --reinstall ca-certificates",
        )];
    }
    let added = names(Path::new(ADDED_AUTHORITIES))
        .iter()
        .filter(|name| name.ends_with(".crt"))
        .count();
    let of_those = if added == 0 {
        String::new()
    } else {
        format!(", {added} added on this machine")
    };
    let guests = match guest_bundle {
        Some(path) if path == bundle => "guests get them too".to_owned(),
        Some(path) => format!("guests get {}", path.display()),
        None => "guests get Debian's own".to_owned(),
    };
    let value = format!("{known} certificates{of_those}; {guests}");
    vec![if added > 0 && guest_bundle.is_none() {
        Check::warn(
            name,
            value,
            "use --guest-ca-bundle auto, so that TLS works in guests behind those authorities",
        )
    } else {
        Check::ok(name, value)
    }]
}

/// Programs that build what is not there yet.
pub(super) fn tools(made: &Made) -> Vec<Check> {
    let path = wrenn_host::tool_path();
    judge_tools(made, rustix::process::geteuid().is_root(), |name| {
        find_program(name, Some(&path))
    })
}

pub(super) fn judge_tools(made: &Made, root: bool, find: impl Fn(&str) -> Program) -> Vec<Check> {
    // Program, package, and whether something that is not made yet needs it.
    let kernel = made.kernel.is_none() && !made.template;
    let rootfs = !made.rootfs && !made.template;
    let mut wanted = vec![
        ("prlimit", "util-linux", true),
        ("apt-get", "apt", kernel || rootfs),
        ("apt-cache", "apt", kernel),
        ("dpkg-deb", "dpkg", kernel),
        ("mmdebstrap", "mmdebstrap", rootfs),
        ("mke2fs", "e2fsprogs", rootfs),
        ("tar", "tar", rootfs),
    ];
    if !root {
        wanted.push(("newuidmap", "uidmap", rootfs));
    }
    let (mut missing, mut packages, mut hidden) = (Vec::new(), Vec::new(), Vec::new());
    let mut needed_now = false;
    for (program, package, needed) in &wanted {
        match find(program) {
            Program::Found => continue,
            Program::OutsidePath(dir) => hidden.push(dir.display().to_string()),
            Program::Missing => packages.push(*package),
        }
        missing.push(*program);
        needed_now |= needed;
    }
    if missing.is_empty() {
        return vec![Check::ok(
            "tools",
            wanted
                .iter()
                .map(|(program, ..)| *program)
                .collect::<Vec<_>>()
                .join(", "),
        )];
    }
    let mut remedies = Vec::new();
    packages.dedup();
    hidden.dedup();
    if !packages.is_empty() {
        remedies.push(format!("sudo apt-get install {}", packages.join(" ")));
    }
    if !hidden.is_empty() {
        remedies.push(format!("export PATH=\"$PATH:{}\"", hidden.join(":")));
    }
    let remedy = remedies.join("; ");
    let value = format!("not found: {}", missing.join(", "));
    vec![match needed_now {
        true => Check::blocking("tools", value, remedy),
        false => Check::warn(
            "tools",
            format!("{value} (not needed until the next build of a template)"),
            remedy,
        ),
    }]
}

/// Without root, the root filesystem is built in a user namespace.
pub(super) fn user_namespaces(host: &Host, made: &Made) -> Vec<Check> {
    let name = "namespaces";
    if host.root {
        return Vec::new();
    }
    let problem = if host.max_user_namespaces == Some(0) {
        Some((
            "this system allows no user namespaces",
            "sudo sysctl user.max_user_namespaces=10000",
        ))
    } else if host.unprivileged_userns == Some(0) {
        let remedy = "sudo sysctl kernel.unprivileged_userns_clone=1";
        Some(("this system closes user namespaces to ordinary users", remedy))
    } else if !host.subordinate_ids {
        let remedy = "sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 \"$USER\"";
        Some((
            "this user has no range of ids in /etc/subuid and /etc/subgid",
            remedy,
        ))
    } else {
        None
    };
    vec![match problem {
        Some((value, remedy)) if !made.rootfs && !made.template => Check::blocking(
            name,
            format!("{value}, so no root filesystem can be built without root"),
            remedy,
        ),
        Some((value, remedy)) => Check::warn(
            name,
            format!("{value} (not needed until the next build of a template)"),
            remedy,
        ),
        // A profile may let the program at hand through, so that only the attempt would tell.
        None if host.restricted_userns == Some(1) => Check::warn(
            name,
            "this system restricts user namespaces to chosen programs; building a template may fail",
            "sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0, should it fail",
        ),
        None => Check::ok(name, "user namespaces are open to this user"),
    }]
}

pub(super) fn kernel(made: &Made) -> Vec<Check> {
    let name = "kernel";
    vec![match &made.kernel {
        Some(version) => Check::ok(name, format!("{version}, unpacked for guests")),
        None if made.template => Check::ok(name, "none unpacked; the template is complete without it"),
        None if !names(Path::new("/var/lib/apt/lists"))
            .iter()
            .any(|name| name.contains("_Packages")) =>
        {
            Check::warn(
                name,
                "none yet, and apt has no package lists to fetch it by",
                "sudo apt-get update",
            )
        }
        None => Check::ok(name, "none yet: the first start fetches Debian's (30 MiB)"),
    }]
}

pub(super) fn rootfs(made: &Made) -> Vec<Check> {
    vec![Check::ok(
        "template",
        match (made.template, made.rootfs) {
            (true, _) => "'minimal' is ready",
            (false, true) => "'minimal' is made at the first start, from the root filesystem that is there",
            (false, false) => "'minimal' is made at the first start (about two minutes)",
        },
    )]
}

/// A clock that is wrong makes certificates invalid, here and in guests.
pub(super) fn clock() -> Vec<Check> {
    let made = std::env::current_exe()
        .and_then(std::fs::metadata)
        .and_then(|metadata| metadata.modified())
        .ok();
    let synchronised = Path::new("/run/systemd/timesync/synchronized").exists();
    vec![judge_clock(SystemTime::now(), made, synchronised)]
}

pub(super) fn judge_clock(now: SystemTime, program_made: Option<SystemTime>, synchronised: bool) -> Check {
    let shown =
        jiff::Timestamp::try_from(now).map_or_else(|_| "out of range".to_owned(), |now| format!("{now:.0}"));
    // Time zones of file systems and of copies explain a day, not more.
    let behind = program_made.is_some_and(|made| made > now + Duration::from_secs(24 * 3600));
    if behind {
        Check::fail(
            "clock",
            format!("{shown}, before this program was made"),
            "sudo timedatectl set-ntp true, or set the time",
        )
    } else {
        Check::ok(
            "clock",
            format!("{shown}{}", if synchronised { ", synchronised" } else { "" }),
        )
    }
}

/// Whether the API's port is free, or used by a server of ours.
pub(super) fn port(listen: SocketAddr, starting: bool) -> Check {
    let name = "port";
    let error = match TcpListener::bind(listen) {
        Ok(_) if listen.port() == 0 => return Check::ok(name, format!("{}, any free port", listen.ip())),
        Ok(_) => return Check::ok(name, format!("{listen} is free")),
        Err(error) => error,
    };
    if error.kind() != std::io::ErrorKind::AddrInUse {
        return Check::blocking(
            name,
            format!("{listen} cannot be used: {error}"),
            "choose another address with --listen",
        );
    }
    match (is_wrenn(listen), starting) {
        (true, false) => Check::ok(name, format!("{listen}: Wrenn serves there")),
        (true, true) => Check::blocking(
            name,
            format!("Wrenn serves {listen} already"),
            "use that one, end it first, or choose another address with --listen",
        ),
        (false, _) => Check::blocking(
            name,
            format!("another program uses {listen}"),
            "end it, or choose another address with --listen",
        ),
    }
}

/// Whether what listens there answers as our servers do. It may be anything, so it gets little time and room.
fn is_wrenn(address: SocketAddr) -> bool {
    let reachable = match address.ip() {
        ip if !ip.is_unspecified() => address,
        ip if ip.is_ipv4() => SocketAddr::from(([127, 0, 0, 1], address.port())),
        _ => SocketAddr::from((std::net::Ipv6Addr::LOCALHOST, address.port())),
    };
    let ask = || -> std::io::Result<Vec<u8>> {
        let mut stream = TcpStream::connect_timeout(&reachable, HEALTH_PATIENCE)?;
        let deadline = std::time::Instant::now() + HEALTH_PATIENCE;
        stream.set_write_timeout(Some(HEALTH_PATIENCE))?;
        // In one piece: a server that answers after the first piece and closes would cut its own answer off.
        let request = format!("GET /health HTTP/1.1\r\nHost: {reachable}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes())?;
        let mut answer = Vec::new();
        let mut buffer = [0; 1024];
        // One that trickles must not hold us longer than one that is silent.
        while answer.len() < 8192
            && let Some(left) = deadline
                .checked_duration_since(std::time::Instant::now())
                .filter(|left| !left.is_zero())
        {
            stream.set_read_timeout(Some(left))?;
            match stream.read(&mut buffer) {
                Ok(0) | Err(_) => break,
                Ok(length) => answer.extend_from_slice(&buffer[..length]),
            }
        }
        Ok(answer)
    };
    ask().is_ok_and(|answer| says_health(&answer))
}

pub(super) fn says_health(answer: &[u8]) -> bool {
    let text = String::from_utf8_lossy(answer);
    let Some((head, body)) = text.split_once("\r\n\r\n") else {
        return false;
    };
    // A body in chunks has its length before it and an end behind it.
    let json = body
        .find('{')
        .zip(body.rfind('}'))
        .and_then(|(from, to)| body.get(from..=to));
    head.starts_with("HTTP/1.1 200")
        && json
            .and_then(|json| serde_json::from_str::<serde_json::Value>(json).ok())
            .is_some_and(|health| health["status"] == "ok" && health["version"].is_string())
}
