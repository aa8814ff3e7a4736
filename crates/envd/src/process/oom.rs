//! The place of the agent and of what it starts before the kernel's out-of-memory killer.
//!
//! The agent is protected (pid 1 saw to that), and what it starts must not be. A process cannot be given another
//! value when it is made, and looking for its own file below `/proc` afterwards makes the kernel build all of that
//! process's folder: in an emulated guest one of the larger parts of a start. So the agent takes the child's value for
//! the moment of the start, through a file that it keeps open, and the child's first act is to give the agent its own
//! back through the same file.

use std::cell::Cell;
use std::os::fd::OwnedFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::{Mode, OFlags};
use rustix::thread::futex;

/// Above the usual 0: what a user started goes before what keeps the guest alive.
const CHILD: &[u8] = b"100";

struct Own {
    /// `/proc/self/oom_score_adj` of the agent, whoever writes to it.
    file: OwnedFd,
    value: Vec<u8>,
}

static OWN: OnceLock<Option<Own>> = OnceLock::new();
/// The loan under way, by its number: one at a time, so that none sees another's value as the agent's. No mutex, for it is
/// the child that ends a loan, unless somebody ends the child first.
static LENT: AtomicU32 = AtomicU32::new(FREE);
const FREE: u32 = 0;
/// Somebody may be waiting for the end of the loan.
const WANTED: u32 = 1;

/// The agent's place while it has the child's. Ends with the agent in its own.
pub(super) struct Lent {
    own: Option<&'static Own>,
    number: u32,
    over: Cell<bool>,
}

/// Takes the child's place for the agent. Where the kernel does not let it, both keep the one they have.
pub(super) fn lend() -> Lent {
    static LOANS: AtomicU32 = AtomicU32::new(0);
    let number = (LOANS.fetch_add(2, Ordering::Relaxed) & !WANTED).max(2);
    let mut taken = number;
    while let Err(now) = LENT.compare_exchange(FREE, taken, Ordering::Acquire, Ordering::Relaxed) {
        let wanted = now | WANTED;
        let marked = LENT.compare_exchange(now, wanted, Ordering::Relaxed, Ordering::Relaxed);
        if now == wanted || marked.is_ok() {
            // Interrupted, or free by now: looked at again.
            let _ = futex::wait(&LENT, futex::Flags::PRIVATE, wanted, None);
            // One is woken; others may be waiting.
            taken = number | WANTED;
        }
    }
    let own = OWN.get_or_init(open).as_ref();
    Lent {
        own: own.filter(|own| rustix::io::pwrite(&own.file, CHILD, 0).is_ok()),
        number,
        over: Cell::new(false),
    }
}

fn open() -> Option<Own> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let file = rustix::fs::open(c"/proc/self/oom_score_adj", flags, Mode::empty()).ok()?;
    let mut value = vec![0; 16];
    let length = rustix::io::pread(&file, &mut value, 0).ok()?;
    value.truncate(length);
    Some(Own { file, value })
}

impl Lent {
    /// Called by the child, which may make system calls only.
    pub(super) fn give_back(&self) {
        if self.end() {
            wake_one();
        }
        self.over.set(true);
    }

    /// Ends the loan, if it is not over; true if somebody may be waiting.
    fn end(&self) -> bool {
        let mut now = LENT.load(Ordering::Acquire);
        if now & !WANTED != self.number {
            return false;
        }
        if let Some(own) = self.own {
            let _ = rustix::io::pwrite(&own.file, &own.value, 0);
        }
        // Meanwhile it can become wanted, and nothing else.
        while let Err(other) = LENT.compare_exchange(now, FREE, Ordering::Release, Ordering::Relaxed) {
            now = other;
        }
        now & WANTED != 0
    }
}

fn wake_one() {
    let _ = futex::wake(&LENT, futex::Flags::PRIVATE, 1);
}

impl Drop for Lent {
    /// For a child that never came to be, or that somebody ended while it gave back.
    fn drop(&mut self) {
        if !self.over.get() {
            self.end();
            wake_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn now() -> String {
        std::fs::read_to_string("/proc/self/oom_score_adj").expect("readable")
    }

    #[test]
    fn the_agent_has_its_own_place_again() {
        let before = now();
        let lent = lend();
        assert_eq!(now(), "100\n");
        lent.give_back();
        assert_eq!(now(), before);
        drop(lent);
        drop(lend());
        assert_eq!(now(), before);
        // Many at once: each waits for the end of the one before, whoever ends it.
        std::thread::scope(|scope| {
            for turn in 0..8 {
                scope.spawn(move || {
                    for _ in 0..200 {
                        let lent = lend();
                        assert_eq!(now(), "100\n");
                        if turn % 2 == 0 {
                            lent.give_back();
                        }
                    }
                });
            }
        });
        assert_eq!(now(), before);
    }
}
