//! The calls of this crate that the compiler cannot check, each behind a safe function; those between the agent and a
//! program that it starts are in [`crate::process`].
#![expect(
    unsafe_code,
    reason = "registration of descriptors, and system calls without a safe wrapper"
)]

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use rustix::ioctl;
use rustix::process::Pid;
use tokio::io::unix::AsyncFd;

use crate::logging::log;

/// Registers a descriptor with the runtime, to be told when it can be read or written.
pub(crate) fn watch_fd(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the descriptor must stay the same and stay open while it is registered; an `OwnedFd` does both.
    unsafe { AsyncFd::register(fd) }.map_err(io::Error::from)
}

/// What a thread gets of a processor that others want too.
#[derive(Debug, Clone, Copy)]
#[repr(i32)]
pub(crate) enum Share {
    /// What programs have.
    Usual = libc::SCHED_OTHER,
    /// An idle processor is taken at once, a busy one with the next tick.
    AfterOthers = libc::SCHED_BATCH,
    /// What nobody else wants.
    Rest = libc::SCHED_IDLE,
}

/// Sets the share of a thread, of this one when none is named. What that thread starts inherits it. A child that shares the
/// agent's memory may call this.
pub(crate) fn schedule(thread: Option<Pid>, share: Share) -> io::Result<()> {
    let parameters = libc::sched_param { sched_priority: 0 };
    let thread = thread.map_or(0, |thread| thread.as_raw_nonzero().get());
    // SAFETY: the call reads the parameters, which live here, and changes a thread's scheduling only.
    match unsafe { libc::sched_setscheduler(thread, share as libc::c_int, &raw const parameters) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Lets running programs finish what they are at before this thread takes their processor, for output that they
/// write bit by bit would otherwise cost two switches a piece.
pub(crate) fn yield_to_programs() {
    if let Err(error) = schedule(None, Share::AfterOthers) {
        log!("scheduling: {error}");
    }
}

/// Size of the buffer of [`RandPoolInfo`]; what is left over goes into the next call.
const ENTROPY_CHUNK: usize = 512;

/// The kernel's `struct rand_pool_info`.
#[repr(C)]
struct RandPoolInfo {
    entropy_count: i32,
    buf_size: i32,
    buf: [u8; ENTROPY_CHUNK],
}

/// `RNDADDENTROPY`: `_IOW('R', 0x03, int[2])`.
const RNDADDENTROPY: ioctl::Opcode = ioctl::opcode::write::<[i32; 2]>(b'R', 0x03);
/// `RNDRESEEDCRNG`: `_IO('R', 0x07)`.
const RNDRESEEDCRNG: ioctl::Opcode = ioctl::opcode::none(b'R', 0x07);

/// Mixes `bytes` into the kernel's entropy pool, credited in full, and makes every generator reseed from it.
pub(crate) fn add_entropy(random: &File, bytes: &[u8]) -> io::Result<()> {
    for chunk in bytes.chunks(ENTROPY_CHUNK) {
        let mut info = RandPoolInfo {
            entropy_count: 0,
            buf_size: 0,
            buf: [0; ENTROPY_CHUNK],
        };
        info.buf[..chunk.len()].copy_from_slice(chunk);
        // A chunk holds at most 512 bytes, so neither number overflows.
        info.entropy_count = i32::try_from(chunk.len() * 8).unwrap_or(0);
        info.buf_size = i32::try_from(chunk.len()).unwrap_or(0);
        // SAFETY: the opcode takes a pointer to `struct rand_pool_info` and reads `buf_size` bytes behind its
        // header; `RandPoolInfo` has that layout and `buf_size` is at most the length of `buf`.
        let setter = unsafe { ioctl::Setter::<RNDADDENTROPY, RandPoolInfo>::new(info) };
        // SAFETY: as above; the kernel only reads the memory during the call.
        unsafe { ioctl::ioctl(random, setter) }?;
    }
    // SAFETY: the opcode takes no argument.
    let reseed = unsafe { ioctl::NoArg::<RNDRESEEDCRNG>::new() };
    // SAFETY: as above.
    unsafe { ioctl::ioctl(random, reseed) }?;
    Ok(())
}
