//! A VMM process: started by this agent, or by an earlier one and found again. It outlives the agent on purpose.

use std::os::fd::OwnedFd;
use std::process::{Child, Command};
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;

use crate::error::{HostError, Result};

/// Identifies a process beyond the reuse of its pid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct ProcessId {
    pub(crate) pid: u32,
    /// Start time in clock ticks since boot, from `/proc/{pid}/stat`.
    pub(crate) start_ticks: u64,
    /// Boot of the host, since both numbers repeat after one.
    pub(crate) boot_id: uuid::Uuid,
}

/// How a process ended, as far as is known (an adopted one's code is not ours to read).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Exit {
    Code(i32),
    Signal(i32),
    Unknown,
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit code {code}"),
            Self::Signal(signal) => write!(f, "signal {signal}"),
            Self::Unknown => f.write_str("unknown cause"),
        }
    }
}

/// A live (or just ended) VMM process, held through a pidfd.
#[derive(Debug)]
pub(crate) struct VmmProcess {
    id: ProcessId,
    pidfd: AsyncFd<OwnedFd>,
    /// Present when this agent started it and so must reap it.
    child: Option<Child>,
    /// Whether it goes on when nobody holds it any more.
    outlives: bool,
}

impl VmmProcess {
    /// Starts `command` in a process group of its own, so that a terminal's Ctrl-C does not reach it.
    pub(crate) fn spawn(command: &mut Command) -> Result<Self> {
        use std::os::unix::process::CommandExt as _;
        let child = command
            .process_group(0)
            .spawn()
            .map_err(|error| HostError::Program {
                program: "qemu-system-x86_64",
                detail: format!("cannot start it: {error}; install the package qemu-system-x86"),
            })?;
        let pid = child.id();
        let held = Self::hold(pid, Some(child))?;
        Ok(held)
    }

    /// Finds a process again that an earlier agent started. `None` when it is gone.
    pub(crate) fn adopt(id: ProcessId) -> Option<Self> {
        let held = Self::hold(id.pid, None).ok()?;
        (held.id == id).then_some(held)
    }

    /// Takes hold of a process by its pid, whoever started it.
    pub(crate) fn find(pid: u32) -> Option<Self> {
        Self::hold(pid, None).ok()
    }

    fn hold(pid: u32, child: Option<Child>) -> Result<Self> {
        let fail = |what: String| HostError::Vmm(format!("cannot watch process {pid}: {what}"));
        let raw = i32::try_from(pid)
            .ok()
            .and_then(Pid::from_raw)
            .ok_or_else(|| fail("bad pid".to_owned()))?;
        // The pidfd comes first: it pins the process, so that what is read of the pid after it is of this process
        // or the process has ended.
        let pidfd = pidfd_open(raw, PidfdFlags::NONBLOCK).map_err(|error| fail(error.to_string()))?;
        let id = identify(pid).ok_or_else(|| fail("it is gone".to_owned()))?;
        #[expect(
            deprecated,
            reason = "an OwnedFd keeps the promise that the safe constructor cannot check; the other is unsafe"
        )]
        let pidfd = AsyncFd::with_interest(pidfd, tokio::io::Interest::READABLE)
            .map_err(|error| fail(error.to_string()))?;
        Ok(Self {
            id,
            pidfd,
            outlives: child.is_none(),
            child,
        })
    }

    pub(crate) fn id(&self) -> ProcessId {
        self.id
    }

    pub(crate) fn pid(&self) -> u32 {
        self.id.pid
    }

    /// Waits until it has ended. Safe to drop and call again.
    pub(crate) async fn exited(&mut self) -> Exit {
        // The descriptor becomes readable once and stays so; an error means that there is nothing left to wait for.
        let _ = self.pidfd.readable().await;
        match self.child.as_mut().map(Child::wait) {
            Some(Ok(status)) => {
                use std::os::unix::process::ExitStatusExt as _;
                match (status.code(), status.signal()) {
                    (Some(code), _) => Exit::Code(code),
                    (None, Some(signal)) => Exit::Signal(signal),
                    (None, None) => Exit::Unknown,
                }
            }
            Some(Err(_)) | None => Exit::Unknown,
        }
    }

    /// From now on it goes on when this is dropped, for the next agent to find.
    pub(crate) fn outlive_agent(&mut self) {
        self.outlives = true;
    }

    /// Kills it and waits for its end.
    pub(crate) async fn kill(&mut self) {
        let _ = pidfd_send_signal(self.pidfd.get_ref(), Signal::KILL);
        if tokio::time::timeout(Duration::from_secs(20), self.exited())
            .await
            .is_err()
        {
            tracing::error!(pid = self.id.pid, "a killed VMM process did not end within 20 s");
        }
    }
}

impl Drop for VmmProcess {
    /// Work that is cancelled half-way must not leave a process behind that nobody knows.
    fn drop(&mut self) {
        if self.outlives {
            return;
        }
        let _ = pidfd_send_signal(self.pidfd.get_ref(), Signal::KILL);
        if let Some(child) = self.child.as_mut() {
            // A killed process takes a moment, not longer.
            let _ = child.wait();
        }
    }
}

/// The folders under `/proc` of all processes, with their pids.
pub(crate) fn processes() -> impl Iterator<Item = (u32, std::path::PathBuf)> {
    std::fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path())))
}

fn identify(pid: u32) -> Option<ProcessId> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command name may hold spaces and brackets: fields are counted after the last bracket. Start time is field 22.
    let start_ticks = stat
        .rsplit_once(')')?
        .1
        .split_ascii_whitespace()
        .nth(19)?
        .parse()
        .ok()?;
    let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .ok()?
        .trim()
        .parse()
        .ok()?;
    Some(ProcessId {
        pid,
        start_ticks,
        boot_id,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_child_is_watched_adopted_and_killed() {
        let mut process = VmmProcess::spawn(Command::new("sleep").arg("1000")).unwrap();
        let id = process.id();
        let adopted = VmmProcess::adopt(id).unwrap();
        assert!(
            VmmProcess::adopt(ProcessId {
                start_ticks: id.start_ticks + 1,
                ..id
            })
            .is_none()
        );
        drop(adopted);
        process.kill().await;
        assert_eq!(process.exited().await, Exit::Signal(9));
        assert!(VmmProcess::adopt(id).is_none());
    }
}
