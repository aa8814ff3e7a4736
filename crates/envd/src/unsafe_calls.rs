//! Every call of this crate that the compiler cannot check, each behind a safe function.
#![expect(
    unsafe_code,
    reason = "the hook between fork and exec, registration of descriptors, and an ioctl without a safe wrapper"
)]

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::fs::{Mode, OFlags};
use rustix::ioctl;
use rustix::process::{Gid, Uid};
use tokio::io::unix::AsyncFd;

/// Whom a child process becomes.
#[derive(Debug, Clone)]
pub(crate) struct Credentials {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: Vec<u32>,
}

/// Makes the command, once started, the leader of its own session (so that it can be signalled as a whole),
/// gives it the terminal on its standard input when `terminal` is set, and drops to `credentials`.
pub(crate) fn prepare_child(command: &mut Command, credentials: Option<&Credentials>, terminal: bool) {
    let credentials = credentials.map(|wanted| {
        let groups: Vec<Gid> = wanted.groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
        (Uid::from_raw(wanted.uid), Gid::from_raw(wanted.gid), groups)
    });
    let in_child = move || -> io::Result<()> {
        rustix::process::setsid()?;
        if terminal {
            rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
        }
        rustix::process::umask(Mode::from_raw_mode(0o022));
        // The agent is protected from the kernel's out-of-memory killer; what it starts must not be.
        if let Ok(file) = rustix::fs::open(
            c"/proc/self/oom_score_adj",
            OFlags::WRONLY | OFlags::CLOEXEC,
            Mode::empty(),
        ) {
            let _ = rustix::io::write(&file, b"100");
        }
        if let Some((uid, gid, groups)) = &credentials {
            // These act on the calling thread, which is the only one between fork and exec.
            rustix::thread::set_thread_groups(groups)?;
            rustix::thread::set_thread_res_gid(*gid, *gid, *gid)?;
            rustix::thread::set_thread_res_uid(*uid, *uid, *uid)?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec only async-signal-safe operations are allowed. The closure makes bare
    // system calls through rustix's raw backend with arguments prepared before the fork; it neither allocates
    // nor takes locks.
    unsafe {
        command.pre_exec(in_child);
    }
}

/// Registers a descriptor with the runtime, to be told when it can be read or written.
pub(crate) fn watch_fd(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the descriptor must stay the same and stay open while it is registered; an `OwnedFd` does both.
    unsafe { AsyncFd::register(fd) }.map_err(io::Error::from)
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
