//! Second stage: pid 1 of the guest's own root file system.
//!
//! It brings the guest up, starts `envd serve` as its child, and then does three things for ever: reaps what
//! is orphaned, restarts the agent when it dies, and shuts the guest down when asked. It is single-threaded
//! and allocates next to nothing in that loop, because the kernel panics when pid 1 dies.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, UnmountFlags, mount_remount, unmount};
use rustix::process::{Pid, Resource, Rlimit, Signal, WaitOptions, kill_process, setrlimit, wait};
use rustix::system::{RebootCommand, reboot};
use signal_hook::consts::{SIGCHLD, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use wrenn_proto::guest::GUEST_ENVD_PATH;

use super::initramfs::halt;
use super::{Cmdline, is_mounted, mount_at, mount_kernel_filesystems, network};
use crate::logging::log;

/// Where the agent keeps what must outlive it: readable by root alone, gone when the guest is.
pub(crate) const STATE_DIR: &str = "/run/wrenn";
/// Time that processes get to end by themselves when the guest shuts down.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(2);
/// Commands run once when the guest boots, so that their files are in the page cache of the memory snapshot
/// that every sandbox starts from.
const WARM_UP: [&[&str]; 3] = [
    &["/bin/bash", "-l", "-c", "true"],
    &["/bin/sh", "-c", "ls / | cat"],
    &["/usr/bin/python3", "-c", "import json, subprocess"],
];
const WARM_UP_LIMIT: Duration = Duration::from_secs(10);

/// Runs the stage; never returns while the guest lives.
pub(crate) fn run() -> ExitCode {
    if !rustix::process::getpid().is_init() {
        log!("`envd init` runs as pid 1 only");
        return ExitCode::from(2);
    }
    if catch_unwind(AssertUnwindSafe(bring_up)).is_err() {
        log!("bring-up panicked, going on");
    }
    loop {
        // A panic ends neither the guest nor its agent: supervision starts over with what there is.
        if catch_unwind(AssertUnwindSafe(supervise)).is_err() {
            log!("supervision panicked, going on");
        }
        std::thread::sleep(Duration::from_secs(1));
    }
}

fn bring_up() {
    // Ctrl-alt-del becomes a signal to this process instead of an immediate reset.
    if let Err(error) = reboot(RebootCommand::CadOff) {
        log!("ctrl-alt-del: {error}");
    }
    mount_everything();
    network::bring_up(&Cmdline::load());
    if let Ok(name) = fs::read_to_string("/etc/hostname")
        && let Err(error) = rustix::system::sethostname(name.trim().as_bytes())
    {
        log!("hostname: {error}");
    }
    // The kernel's own default kills the biggest process, which may well be the user's work; the agent and
    // pid 1 are protected instead (children reset this for themselves).
    let _ = fs::write("/proc/self/oom_score_adj", "-999");
    // The kernel's own bound for pid 1, and so for all of its descendants, is too low for servers.
    let files = Rlimit {
        current: Some(65_536),
        maximum: Some(524_288),
    };
    if let Err(error) = setrlimit(Resource::Nofile, files) {
        log!("file limit: {error}");
    }
    for command in WARM_UP {
        warm_up(command);
    }
}

fn mount_everything() {
    mount_kernel_filesystems();
    let strict = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount_at(
        "devpts",
        "/dev/pts",
        "devpts",
        MountFlags::NOSUID | MountFlags::NOEXEC,
        Some(c"mode=0620,gid=5,ptmxmode=0666"),
    );
    mount_at(
        "tmpfs",
        "/dev/shm",
        "tmpfs",
        MountFlags::NOSUID | MountFlags::NODEV,
        Some(c"mode=1777"),
    );
    if !is_mounted("/run") {
        mount_at(
            "tmpfs",
            "/run",
            "tmpfs",
            MountFlags::NOSUID | MountFlags::NODEV,
            Some(c"mode=0755,size=20%"),
        );
    }
    // The agent changes its group at each pause and snapshot ([`crate::freezer`]), which the kernel makes cheap only on
    // demand: without it, each change waits for all processors to have passed a quiet moment.
    if !mount_at(
        "cgroup2",
        "/sys/fs/cgroup",
        "cgroup2",
        strict,
        Some(c"favordynmods"),
    ) {
        mount_at("cgroup2", "/sys/fs/cgroup", "cgroup2", strict, None);
    }
    for (target, link) in [
        ("/proc/self/fd", "/dev/fd"),
        ("fd/0", "/dev/stdin"),
        ("fd/1", "/dev/stdout"),
        ("fd/2", "/dev/stderr"),
    ] {
        let _ = symlink(
            if target.starts_with('/') {
                target.to_owned()
            } else {
                format!("/proc/self/{target}")
            },
            link,
        );
    }
    // Kept on the disk: what users put there may be larger than their memory.
    for (dir, mode) in [("/tmp", 0o1777), ("/run/lock", 0o1777), (STATE_DIR, 0o700)] {
        let _ = fs::create_dir_all(dir);
        let _ = fs::set_permissions(dir, fs::Permissions::from_mode(mode));
    }
}

fn warm_up(command: &[&str]) {
    let Some((program, args)) = command.split_first() else {
        return;
    };
    let child = Command::new(program)
        .args(args)
        .env_clear()
        .env(
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        )
        .env("HOME", "/root")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn();
    // A template without this program has nothing to warm.
    let Ok(mut child) = child else { return };
    let deadline = Instant::now() + WARM_UP_LIMIT;
    while let Ok(None) = child.try_wait() {
        if Instant::now() > deadline {
            log!("{program} hangs, killed");
            if let Some(group) = pid_of(child.id()) {
                let _ = rustix::process::kill_process_group(group, Signal::KILL);
            }
            let _ = child.wait();
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn pid_of(raw: u32) -> Option<Pid> {
    i32::try_from(raw).ok().and_then(Pid::from_raw)
}

/// The agent as pid 1 sees it.
struct Agent {
    pid: Option<Pid>,
    started: Instant,
    backoff: Duration,
}

impl Agent {
    const FIRST_BACKOFF: Duration = Duration::from_millis(50);

    fn start(&mut self) {
        self.started = Instant::now();
        let child = Command::new(GUEST_ENVD_PATH)
            .args(["serve", "--state-dir", STATE_DIR])
            .env_clear()
            .env(
                "PATH",
                "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            )
            .stdin(Stdio::null())
            .current_dir("/")
            .spawn();
        match child {
            Ok(child) => self.pid = pid_of(child.id()),
            Err(error) => log!("the agent does not start: {error}"),
        }
    }

    /// An agent that lived for a while is restarted at once, one that keeps dying ever more slowly.
    fn restart_pause(&mut self) -> Duration {
        if self.started.elapsed() > Duration::from_secs(10) {
            self.backoff = Self::FIRST_BACKOFF;
        }
        let pause = self.backoff;
        self.backoff = (self.backoff * 2).min(Duration::from_secs(5));
        pause
    }
}

fn supervise() {
    let mut signals = match Signals::new([SIGCHLD, SIGTERM, SIGINT]) {
        Ok(signals) => signals,
        Err(error) => {
            log!("signals: {error}");
            return;
        }
    };
    let mut agent = Agent {
        pid: None,
        started: Instant::now(),
        backoff: Agent::FIRST_BACKOFF,
    };
    agent.start();
    loop {
        for signal in signals.wait() {
            if signal == SIGTERM || signal == SIGINT {
                shut_down();
            }
        }
        // Several ends may share one signal, and a signal may have come before the last sweep.
        reap(&mut agent);
        while agent.pid.is_none() {
            std::thread::sleep(agent.restart_pause());
            agent.start();
            reap(&mut agent);
        }
    }
}

/// Collects everything that has ended: the agent and all processes whose parents are gone.
fn reap(agent: &mut Agent) {
    while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
        if Some(pid) == agent.pid {
            agent.pid = None;
            match status.terminating_signal() {
                Some(signal) => log!("the agent was killed by signal {signal}, restarting it"),
                None => log!(
                    "the agent ended with status {:?}, restarting it",
                    status.exit_status()
                ),
            }
        }
    }
}

/// Ends the guest: asks everything to stop, kills the rest, makes the disk consistent, powers off.
fn shut_down() -> ! {
    log!("shutting down");
    rustix::fs::sync();
    let everything = |signal| {
        let own = std::process::id();
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let pid = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse::<u32>().ok());
            if let Some(pid) = pid.filter(|pid| *pid != own).and_then(pid_of) {
                // Kernel threads ignore it.
                let _ = kill_process(pid, signal);
            }
        }
    };
    everything(Signal::TERM);
    let deadline = Instant::now() + SHUTDOWN_GRACE;
    loop {
        match wait(WaitOptions::NOHANG) {
            Ok(Some(_)) => continue,
            Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(10)),
            // No children left, or out of patience.
            _ => break,
        }
    }
    everything(Signal::KILL);
    rustix::fs::sync();
    for point in ["/dev/shm", "/sys/fs/cgroup"] {
        let _ = unmount(point, UnmountFlags::DETACH);
    }
    if let Err(error) = mount_remount("/", MountFlags::RDONLY, c"") {
        log!("remount /: {error}");
    }
    rustix::fs::sync();
    // Without ACPI a machine cannot switch itself off, and the kernel would only stop its processor; a reset
    // is what ends the virtual machine then.
    let last = if fs::metadata("/sys/firmware/acpi").is_ok() {
        RebootCommand::PowerOff
    } else {
        RebootCommand::Restart
    };
    if let Err(error) = reboot(last) {
        log!("power off: {error}");
    }
    halt()
}
