//! A child that was made ahead of time and waits for the program that it is to become.
//!
//! In an emulated guest making a process is a sixth of what a short command takes, and nobody has to know the command
//! for it. So a thread keeps one child: it has the pipes for its output in place and everything else of the agent's
//! closed, and waits, in the agent's memory, for an order. Whoever is quick enough takes it, everybody else makes a child
//! of their own.
//!
//! Making it with `CLONE_VFORK` (the thread stands in that call until the child has gone its way) is what keeps the two
//! apart before the kernel's out-of-memory killer: it gives processes that merely share their memory one place together.
//! A thread that stands there counts in the guest's load, so a child that nobody wants for a while leaves.
#![expect(
    unsafe_code,
    reason = "the child shares the agent's memory until it becomes its program"
)]

use std::ffi::{c_int, c_void};
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::ptr;
use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, Once, PoisonError};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions, pidfd_send_signal};
use rustix::thread::futex;

use super::child::{self, Birth, Image};
use super::oom;
use super::spawn::{Pipes, no_input};
use crate::logging::log;
use crate::state::lock;
use crate::unsafe_calls::{Share, schedule, yield_to_programs};

/// So long a program's first sign of life is waited for before it is listed; most give one sooner.
const SOON: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 10_000_000,
};
/// So long a child is waited for that somebody has stopped.
const STOPPED: Timespec = Timespec {
    tv_sec: 1,
    tv_nsec: 0,
};
/// So long a child waits for an order.
const PATIENCE: Timespec = Timespec {
    tv_sec: 2,
    tv_nsec: 0,
};
/// Stack of the thread that keeps the child; the child has its own.
const STACK: usize = 64 * 1024;

/// A started program: its number, what tells of its end, and the agent's ends of its output and its errors.
pub(super) type Started = (Pid, OwnedFd, OwnedFd, OwnedFd);

/// The spare child, for whoever takes it first.
struct Spare {
    child: Arc<Child>,
    pipes: Pipes,
}

/// What the child, the thread that made it, and who takes it share.
struct Child {
    /// Tells of its end; -1 before it is there and after it was taken.
    pidfd: AtomicI32,
    /// Its number while it is in the agent's memory; the kernel sees to that.
    here: AtomicU32,
    /// How far it is.
    state: AtomicU32,
    order: AtomicPtr<Image>,
}

/// States of a child: it is being made, …
const MAKING: u32 = 0;
/// … waits for an order, …
const WAITING: u32 = 1;
/// … has one, …
const CALLED: u32 = 2;
/// … obeys it, …
const OBEYING: u32 = 3;
/// … or does not any more.
const LOST: u32 = 4;

struct Keeping {
    wanted: bool,
    spare: Option<Spare>,
}

static KEEPING: Mutex<Keeping> = Mutex::new(Keeping {
    wanted: false,
    spare: None,
});
static WANTED: Condvar = Condvar::new();

/// Makes the spare child this program, if there is one, or soon will be; `None` if there is none that obeys.
///
/// # Errors
/// As of [`Image::start`].
pub(super) fn start(image: &Image) -> io::Result<Option<Started>> {
    let spare = lock(&KEEPING).spare.take();
    spare.map_or(Ok(None), |spare| spare.become_program(image))
}

/// Sees to it that there is one for the next who asks. Returns at once.
pub(super) fn make() {
    static KEEPER: Once = Once::new();
    KEEPER.call_once(|| {
        let keeper = std::thread::Builder::new().name("spare".to_owned());
        if let Err(error) = keeper.stack_size(STACK).spawn(keep) {
            log!("no children are made ahead: {error}");
        }
    });
    let mut keeping = lock(&KEEPING);
    if keeping.spare.is_none() && !keeping.wanted {
        keeping.wanted = true;
        WANTED.notify_one();
    }
}

fn keep() {
    yield_to_programs();
    loop {
        let mut keeping = WANTED
            .wait_while(lock(&KEEPING), |keeping| !keeping.wanted)
            .unwrap_or_else(PoisonError::into_inner);
        keeping.wanted = false;
        drop(keeping);
        if let Err(error) = keep_one() {
            log!("no child is made ahead: {error}");
        }
    }
}

/// Makes a child; returns when it has become a program, or ended.
fn keep_one() -> io::Result<()> {
    let (stdin, pipes) = (no_input()?, Pipes::new()?);
    let theirs = [&*stdin, &pipes.stdout.1, &pipes.stderr.1].map(|fd| fd.as_raw_fd());
    let child = Arc::new(Child {
        pidfd: AtomicI32::new(-1),
        here: AtomicU32::new(0),
        state: AtomicU32::new(MAKING),
        order: AtomicPtr::new(ptr::null_mut()),
    });
    lock(&KEEPING).spare = Some(Spare {
        child: child.clone(),
        pipes,
    });
    let life = Life {
        child: &child,
        // Nobody else is let work again.
        keeper: rustix::process::geteuid().is_root().then(rustix::thread::gettid),
        birth: Birth {
            // SAFETY: they are open until the child has copies of them: whoever takes it keeps them until it has a pidfd, which
            // it gets after those.
            stdio: theirs.map(|fd| unsafe { BorrowedFd::borrow_raw(fd) }),
            lent: oom::lend(),
        },
    };
    let (pidfd, here) = (child.pidfd.as_ptr(), Some(&child.here));
    // SAFETY: `live` is made for a life, which is on this stack until the call returns; the descriptor goes to an integer.
    let made = unsafe { child::clone(live, ptr::from_ref(&life).cast(), pidfd, here) };
    yield_to_programs();
    child.pass(MAKING, LOST);
    lock(&KEEPING)
        .spare
        .take_if(|spare| Arc::ptr_eq(&spare.child, &child));
    // It failed, nobody wanted it, or somebody ended it.
    if let Ok(pid) = &made
        && child.state.load(Ordering::Acquire) != OBEYING
    {
        let _ = rustix::process::waitpid(Some(*pid), WaitOptions::empty());
        drop(child.pidfd());
    }
    made.map(drop)
}

impl Spare {
    fn become_program(self, image: &Image) -> io::Result<Option<Started>> {
        match self.child.wait_past(MAKING, Some(&STOPPED)) {
            WAITING => {}
            MAKING => {
                match self.child.pidfd() {
                    Some(pidfd) => end(&pidfd),
                    // It is still to get copies of its pipes.
                    None => lock(&KEEPING).spare = Some(self),
                }
                return Ok(None);
            }
            _ => return Ok(None),
        }
        let Self { child, pipes } = self;
        let (Some(pid), Some(pidfd)) = (child.number(), child.pidfd()) else {
            return Ok(None);
        };
        if !child.obey(image, [&pipes.stdout.0, &pipes.stderr.0], &pidfd) {
            return Ok(None);
        }
        image.outcome(pid)?;
        Ok(Some((pid, pidfd, pipes.stdout.0, pipes.stderr.0)))
    }
}

impl Child {
    /// Its number, while it is there.
    fn number(&self) -> Option<Pid> {
        i32::try_from(self.here.load(Ordering::Acquire))
            .ok()
            .and_then(Pid::from_raw)
    }

    /// Moves it on, if it is that far; who waits for that is told.
    fn pass(&self, from: u32, to: u32) -> bool {
        let passed = self.claim(from, to);
        if passed {
            let _ = futex::wake(&self.state, futex::Flags::PRIVATE, 1);
        }
        passed
    }

    /// The same without telling.
    fn claim(&self, from: u32, to: u32) -> bool {
        self.state
            .compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
    }

    /// Waits until it is past that, or for so long; returns how far it is.
    fn wait_past(&self, state: u32, limit: Option<&Timespec>) -> u32 {
        loop {
            match self.state.load(Ordering::Acquire) {
                now if now == state => {}
                now => return now,
            }
            // Woken or interrupted, it is looked at again.
            let waited = futex::wait(&self.state, futex::Flags::PRIVATE, state, limit);
            if waited == Err(Errno::TIMEDOUT) {
                return self.state.load(Ordering::Acquire);
            }
        }
    }

    /// What tells of its end, for the first who asks.
    fn pidfd(&self) -> Option<OwnedFd> {
        let fd = self.pidfd.swap(-1, Ordering::AcqRel);
        // SAFETY: the kernel made it for this child, and nobody else has it.
        (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// Gives the order, and waits until the child has left the agent's memory with it. False if it does not obey.
    fn obey(&self, image: &Image, outputs: [&OwnedFd; 2], pidfd: &OwnedFd) -> bool {
        self.order
            .store(ptr::from_ref(image).cast_mut(), Ordering::Release);
        if !self.pass(WAITING, CALLED) {
            return false;
        }
        // To be woken twice is much of what a start costs: the program's first sign of life is what its caller will wait for
        // next, and soon comes from most.
        let mut signs = [outputs[0], outputs[1], pidfd].map(|fd| PollFd::new(fd, PollFlags::IN));
        let _ = poll(&mut signs, Some(&SOON));
        while let number @ 1.. = self.here.load(Ordering::Acquire) {
            // The kernel's wake is for waiters of any process. Woken or interrupted, it is looked at again.
            let waited = futex::wait(&self.here, futex::Flags::empty(), number, Some(&STOPPED));
            if waited == Err(Errno::TIMEDOUT) && self.claim(CALLED, LOST) {
                end(pidfd);
                return false;
            }
        }
        self.state.load(Ordering::Acquire) == OBEYING
    }
}

/// Ends a child that somebody has stopped; its keeper reaps it.
fn end(pidfd: &OwnedFd) {
    let _ = pidfd_send_signal(pidfd, Signal::KILL);
}

/// All that the child reads.
struct Life<'a> {
    child: &'a Child,
    /// The thread that stands in `clone` for it.
    keeper: Option<Pid>,
    birth: Birth<'a>,
}

impl Life<'_> {
    /// In the child: until there is an order. `None` when nobody gives one.
    fn await_order(&self) -> Option<*const Image> {
        self.birth.settle().ok()?;
        // When this has become a program, its keeper has to be woken, but not at that program's cost.
        if let Some(keeper) = self.keeper {
            let _ = schedule(Some(keeper), Share::Rest);
        }
        self.child.pass(MAKING, WAITING);
        self.child.wait_past(WAITING, Some(&PATIENCE));
        // A signal that came meanwhile would end the program.
        let obeys = !self.child.claim(WAITING, LOST) && !signals_wait() && self.child.claim(CALLED, OBEYING);
        if !obeys {
            return None;
        }
        Some(self.child.order.load(Ordering::Acquire))
    }
}

/// Whether there are signals for the child, which has all of them blocked.
fn signals_wait() -> bool {
    // SAFETY: plain calls on a set that lives here; all-zero is a valid set.
    unsafe {
        let mut waiting = std::mem::zeroed();
        libc::sigpending(&raw mut waiting);
        (1..=libc::SIGRTMAX()).any(|signal| libc::sigismember(&raw const waiting, signal) == 1)
    }
}

/// What the child does.
extern "C" fn live(life: *mut c_void) -> c_int {
    // SAFETY: the pointer is the life of `keep_one`, which waits in `clone` as long as this runs.
    let life = unsafe { &*life.cast::<Life<'_>>() };
    if let Some(image) = life.await_order() {
        // SAFETY: who gave the order waits, and keeps the image, until this has left the memory that it is in.
        unsafe { &*image }.take_over();
    }
    child::exit()
}
