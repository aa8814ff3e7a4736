//! Holds the guest's programs still while the host copies or keeps the guest.
//!
//! A guest that is restored from a copy goes on with the very next instruction: with the clock, the names, and the
//! random numbers of the guest that it was copied from. The host tells it its own by `/init`, and until then no program
//! of a user must run. So the host asks for stillness before it stops the guest, and `/init`, which follows every stop,
//! ends it.
//!
//! All programs run in one control group, in which the agent itself lives too, so that what it starts is born there at
//! no cost. For the time of the stillness it steps into a group of its own.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::time::Instant;

use crate::logging::log;
use crate::state::lock;

const ROOT: &str = "/sys/fs/cgroup";
/// Programs that the kernel cannot hold (stuck in a wait for a disk) are not waited for longer than this.
const LIMIT: Duration = Duration::from_secs(1);
/// How long programs are held for a host that does not come back, in the guest's own time, which stands with it.
const LONGEST: Duration = Duration::from_secs(10);

/// The two groups.
pub(crate) struct Freezer {
    programs: PathBuf,
    agent: PathBuf,
    held: Mutex<Held>,
}

#[derive(Default)]
struct Held {
    now: bool,
    /// Which stillness it is, so that the end of an earlier one's time does not end a later one.
    turn: u64,
}

impl Freezer {
    /// Makes the group and takes the agent into it. Programs that an agent before this one held go on.
    ///
    /// # Errors
    /// The guest has no control groups, or not where they belong.
    pub(crate) fn join() -> io::Result<Self> {
        let root = Path::new(ROOT);
        let freezer = Self {
            programs: root.join("programs"),
            agent: root.join("agent"),
            held: Mutex::default(),
        };
        for group in [&freezer.programs, &freezer.agent] {
            if let Err(error) = fs::create_dir(group)
                && error.kind() != io::ErrorKind::AlreadyExists
            {
                return Err(error);
            }
        }
        fs::write(freezer.programs.join("cgroup.freeze"), "0")?;
        move_into(&freezer.programs, "0")?;
        Ok(freezer)
    }

    /// Returns when no program runs any more.
    ///
    /// # Errors
    /// Some do not stand still, or the groups were taken apart by a user; none is held then.
    pub(crate) async fn freeze(self: &Arc<Self>) -> io::Result<()> {
        let turn = {
            let mut held = lock(&self.held);
            held.now = true;
            held.turn += 1;
            held.turn
        };
        // Before anything is held: whoever asked may be gone at any moment, and this goes with the request.
        let freezer = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(LONGEST).await;
            if lock(&freezer.held).turn == turn {
                freezer.thaw();
            }
        });
        let still = async {
            move_into(&self.agent, "0")?;
            fs::write(self.programs.join("cgroup.freeze"), "1")?;
            let until = Instant::now() + LIMIT;
            while !is_frozen(&fs::read_to_string(self.programs.join("cgroup.events"))?) {
                if Instant::now() >= until {
                    return Err(io::Error::new(
                        io::ErrorKind::TimedOut,
                        "some programs do not stand still",
                    ));
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            Ok(())
        };
        let outcome = still.await;
        if outcome.is_err() {
            self.thaw();
        }
        outcome
    }

    /// Lets the programs go on, if they are held.
    pub(crate) fn thaw(&self) {
        let mut held = lock(&self.held);
        if !std::mem::take(&mut held.now) {
            return;
        }
        if let Err(error) = fs::write(self.programs.join("cgroup.freeze"), "0") {
            log!("freezer: programs may stand still for ever: {error}");
        }
        // The agent, and what it started meanwhile.
        let members = fs::read_to_string(self.agent.join("cgroup.procs")).unwrap_or_default();
        for member in members.lines() {
            if let Err(error) = move_into(&self.programs, member)
                && fs::exists(format!("/proc/{member}")).unwrap_or(true)
            {
                log!("freezer: process {member}: {error}");
            }
        }
    }
}

/// Moves a process, `0` for this one, with all its threads.
fn move_into(group: &Path, pid: &str) -> io::Result<()> {
    fs::write(group.join("cgroup.procs"), pid)
}

fn is_frozen(events: &str) -> bool {
    events.lines().any(|line| line == "frozen 1")
}

#[cfg(test)]
mod tests {
    use super::is_frozen;

    #[test]
    fn the_kernel_says_when_all_stand_still() {
        assert!(is_frozen("populated 1\nfrozen 1\n"));
        assert!(!is_frozen("populated 1\nfrozen 0\n"));
        assert!(!is_frozen(""));
    }
}
