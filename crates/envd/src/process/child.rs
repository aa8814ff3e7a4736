//! The way from the agent to a running program.
//!
//! `fork` copies the agent's page tables, and afterwards every page that either side touches: in an emulated guest
//! half of what a start costs. So the child borrows the agent's memory until it has become its program, as in the C
//! library's `posix_spawn`, which itself can neither change users nor give a terminal away. The thread that made the child
//! stands still meanwhile, and the child makes nothing but system calls on memory that was prepared before.
#![expect(
    unsafe_code,
    reason = "the child shares the agent's memory until it becomes its program"
)]

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ffi::{CString, c_char, c_int, c_void};
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::path::Path;
use std::ptr;
use std::sync::atomic::AtomicU32;

use rustix::process::{Gid, Pid, Uid, WaitOptions};

use super::oom::Lent;
use crate::unsafe_calls::{Share, schedule};
use crate::users::Credentials;

/// The child's own stack. What it runs needs a fraction of that.
const STACK: usize = 64 * 1024;

thread_local! {
    /// One for all children of a thread, which waits until each has left it.
    static CHILD_STACK: RefCell<Vec<u8>> = RefCell::new(Vec::with_capacity(STACK));
}

/// Runs programs that are neither in a known format nor begin with `#!`.
const SHELL: &std::ffi::CStr = c"/bin/sh";

/// A program to be started.
pub(super) struct Program<'a> {
    pub(super) cmd: &'a str,
    pub(super) args: &'a [String],
    /// All of its environment. Its `PATH` says where `cmd` is looked for.
    pub(super) env: &'a BTreeMap<&'a str, &'a str>,
    pub(super) cwd: &'a Path,
    /// Standard input is a terminal, which is to be the program's.
    pub(super) terminal: bool,
    /// Whom the program runs as, when that is somebody else than the agent.
    pub(super) credentials: Option<Credentials>,
}

impl Program<'_> {
    /// Lays it out for the child.
    ///
    /// # Errors
    /// A zero byte where a string would end with it.
    pub(super) fn image(&self) -> io::Result<Image> {
        let candidates = self.candidates()?;
        let mut argv = Strings::default();
        for arg in std::iter::once(self.cmd).chain(self.args.iter().map(String::as_str)) {
            argv.push([arg.as_bytes()])?;
        }
        let mut env = Strings::default();
        for (name, value) in self.env {
            env.push([name.as_bytes(), b"=", value.as_bytes()])?;
        }
        let credentials = self.credentials.as_ref().map(|wanted| {
            let groups: Vec<Gid> = wanted.groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
            (Uid::from_raw(wanted.uid), Gid::from_raw(wanted.gid), groups)
        });
        // `/bin/sh FILE ARGS…`; the file's name is put in when it is known.
        let pointers = argv.pointers();
        let script = [SHELL.as_ptr(), ptr::null()]
            .into_iter()
            .chain(pointers[1..].iter().copied());
        Ok(Image {
            candidates: candidates.pointers(),
            script: script.map(Cell::new).collect(),
            argv: pointers,
            env: env.pointers(),
            cwd: CString::new(self.cwd.as_os_str().as_encoded_bytes())?,
            terminal: self.terminal,
            credentials,
            failure: Cell::new(0),
            _strings: [candidates, argv, env],
        })
    }

    /// Where the program may be, the likeliest place first.
    fn candidates(&self) -> io::Result<Strings> {
        let mut candidates = Strings::default();
        if self.cmd.contains('/') {
            candidates.push([self.cmd.as_bytes()])?;
            return Ok(candidates);
        }
        let places = self.env.get("PATH").copied().unwrap_or("/usr/bin:/bin");
        for place in places.split(':') {
            let separator: &[u8] = if place.is_empty() { b"" } else { b"/" };
            candidates.push([place.as_bytes(), separator, self.cmd.as_bytes()])?;
        }
        Ok(candidates)
    }
}

/// Strings as the kernel takes them, all in one piece of memory.
#[derive(Default)]
struct Strings {
    bytes: Vec<u8>,
    starts: Vec<usize>,
}

impl Strings {
    /// Adds the string that consists of these parts.
    ///
    /// # Errors
    /// A part contains a zero byte, where the string would end.
    fn push<const N: usize>(&mut self, parts: [&[u8]; N]) -> io::Result<()> {
        if parts.iter().any(|part| part.contains(&0)) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "a zero byte in a command, its arguments or its environment",
            ));
        }
        self.starts.push(self.bytes.len());
        for part in parts {
            self.bytes.extend_from_slice(part);
        }
        self.bytes.push(0);
        Ok(())
    }

    /// Pointers to all of them, ended by a null: valid as long as nothing is added.
    fn pointers(&self) -> Vec<*const c_char> {
        self.starts
            .iter()
            .map(|start| self.bytes[*start..].as_ptr().cast())
            .chain(std::iter::once(ptr::null()))
            .collect()
    }
}

/// A program as the kernel takes it: all that the child reads to become it, and the one number it writes.
pub(super) struct Image {
    candidates: Vec<*const c_char>,
    argv: Vec<*const c_char>,
    script: Vec<Cell<*const c_char>>,
    env: Vec<*const c_char>,
    cwd: CString,
    terminal: bool,
    credentials: Option<(Uid, Gid, Vec<Gid>)>,
    /// Why the child did not become its program; 0 when it did.
    failure: Cell<c_int>,
    /// What the pointers point into.
    _strings: [Strings; 3],
}

impl Image {
    /// Starts it as the leader of its own session, so that it can be signalled as a whole. Standard input, output and error
    /// are these.
    ///
    /// # Errors
    /// No such program or working directory, no permission, or no processes or memory left; nothing is left of the attempt.
    pub(super) fn start(&self, stdio: [BorrowedFd<'_>; 3]) -> io::Result<(Pid, OwnedFd)> {
        // Above the three, so that putting one in place cannot close another.
        let mut copies: [Option<OwnedFd>; 3] = [None, None, None];
        for (fd, copy) in stdio.iter().zip(&mut copies) {
            if fd.as_raw_fd() <= 2 {
                *copy = Some(rustix::io::fcntl_dupfd_cloexec(fd, 3)?);
            }
        }
        let plan = Plan {
            birth: Birth {
                stdio: std::array::from_fn(|i| copies[i].as_ref().map_or(stdio[i], |copy| copy.as_fd())),
                lent: super::oom::lend(),
            },
            image: self,
        };
        let mut pidfd: c_int = -1;
        // SAFETY: `become_program` is made for a plan, which is on this stack until the call returns.
        let pid = unsafe { clone(become_program, ptr::from_ref(&plan).cast(), &raw mut pidfd, None) }?;
        // SAFETY: the kernel has just made it for this call, which succeeded.
        let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
        self.outcome(pid)?;
        Ok((pid, pidfd))
    }

    /// Whether the child, which has left the agent's memory, became the program.
    pub(super) fn outcome(&self, pid: Pid) -> io::Result<()> {
        match self.failure.get() {
            0 => Ok(()),
            failure => {
                let _ = rustix::process::waitpid(Some(pid), WaitOptions::empty());
                Err(io::Error::from_raw_os_error(failure))
            }
        }
    }

    /// In the child: from its birth to the program. Returns when that is not to be had.
    pub(super) fn take_over(&self) {
        let Err(failure) = self.try_to_take_over();
        self.failure.set(failure.raw_os_error());
    }

    fn try_to_take_over(&self) -> rustix::io::Result<std::convert::Infallible> {
        if self.terminal {
            rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
        }
        rustix::process::chdir(self.cwd.as_c_str())?;
        if let Some((uid, gid, groups)) = &self.credentials {
            // These act on the calling thread, the child's only one.
            rustix::thread::set_thread_groups(groups)?;
            rustix::thread::set_thread_res_gid(*gid, *gid, *gid)?;
            rustix::thread::set_thread_res_uid(*uid, *uid, *uid)?;
        }
        restore_signals();
        Err(self.execute())
    }

    /// Tries each place. As in a shell, a file that may not be run is remembered while others are tried.
    fn execute(&self) -> rustix::io::Errno {
        use rustix::io::Errno;
        let mut answer = Errno::NOENT;
        let candidates = || {
            self.candidates
                .iter()
                .take_while(|candidate| !candidate.is_null())
        };
        // An `execve` makes a new address space before it looks for the file: too much for each wrong place.
        let several = candidates().nth(1).is_some();
        for &candidate in candidates() {
            if several && let Err(error) = may_execute(candidate) {
                if error == Errno::ACCESS {
                    answer = Errno::ACCESS;
                }
                continue;
            }
            match execve(candidate, self.argv.as_ptr(), self.env.as_ptr()) {
                Errno::NOENT | Errno::NOTDIR => {}
                Errno::ACCESS => answer = Errno::ACCESS,
                Errno::NOEXEC => {
                    self.script[1].set(candidate);
                    // A cell has the layout of what is in it.
                    return execve(SHELL.as_ptr(), self.script.as_ptr().cast(), self.env.as_ptr());
                }
                other => return other,
            }
        }
        answer
    }
}

/// What a child is born with, whatever it becomes.
pub(super) struct Birth<'a> {
    /// Standard input, output and error, none of which is in the place of another.
    pub(super) stdio: [BorrowedFd<'a>; 3],
    /// The child takes its own place before the kernel's out-of-memory killer with it, and gives the agent's back.
    pub(super) lent: Lent,
}

impl Birth<'_> {
    /// In the child.
    pub(super) fn settle(&self) -> rustix::io::Result<()> {
        // Before anything that may take its time: the agent stands unprotected until then.
        self.lent.give_back();
        rustix::stdio::dup2_stdin(self.stdio[0])?;
        rustix::stdio::dup2_stdout(self.stdio[1])?;
        rustix::stdio::dup2_stderr(self.stdio[2])?;
        close_the_rest();
        // The agent's threads give way to programs, and children inherit that.
        let _ = schedule(None, Share::Usual);
        rustix::process::setsid().map(drop)
    }
}

struct Plan<'a> {
    birth: Birth<'a>,
    image: &'a Image,
}

/// What a child does that is started for a program at once.
extern "C" fn become_program(plan: *mut c_void) -> c_int {
    // SAFETY: the pointer is the plan of `Image::start`, which waits in `clone` as long as this runs.
    let plan = unsafe { &*plan.cast::<Plan<'_>>() };
    match plan.birth.settle() {
        Ok(()) => plan.image.take_over(),
        Err(failure) => plan.image.failure.set(failure.raw_os_error()),
    }
    exit()
}

/// Ends a child that became no program.
pub(super) fn exit() -> ! {
    // SAFETY: ends the child without running anything of the agent's.
    unsafe { libc::_exit(127) }
}

/// Makes a child that borrows the agent's memory; returns when it has left that, by `execve` or its end.
///
/// `here` holds its number as long as it has not: the kernel then writes a zero and wakes one who waits for that.
///
/// # Safety
/// `run` must be made for `argument`, make nothing but system calls, neither allocate, lock, nor unwind, and end in
/// [`Image::take_over`] or [`exit`]. `pidfd` must be valid for a write during the call.
pub(super) unsafe fn clone(
    run: extern "C" fn(*mut c_void) -> c_int,
    argument: *const c_void,
    pidfd: *mut c_int,
    here: Option<&AtomicU32>,
) -> io::Result<Pid> {
    // A handler that ran in the child would run on the agent's memory.
    let _blocked = SignalsBlocked::new();
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD | libc::SIGCHLD;
    let (flags, here) = match here {
        Some(here) => (
            flags | libc::CLONE_CHILD_SETTID | libc::CLONE_CHILD_CLEARTID,
            here.as_ptr(),
        ),
        None => (flags, ptr::null_mut()),
    };
    CHILD_STACK.with_borrow_mut(|stack| {
        // SAFETY: `CLONE_VFORK` keeps this thread in the call, and thus the stack and whatever the caller lends alive and
        // unwatched, until the child has left this memory. What the child runs is the caller's promise. The stack's top is
        // within its allocation, and `clone` aligns it. The kernel writes one descriptor to `pidfd`, and the child's number
        // to `here`.
        let pid = unsafe {
            let top = stack.as_mut_ptr().add(STACK).cast();
            let no_tls = ptr::null_mut::<c_void>();
            libc::clone(run, top, flags, argument.cast_mut(), pidfd, no_tls, here)
        };
        let failure = io::Error::last_os_error();
        Pid::from_raw(pid).filter(|_| pid > 0).ok_or(failure)
    })
}

/// Returns only with an error.
fn execve(
    program: *const c_char,
    argv: *const *const c_char,
    env: *const *const c_char,
) -> rustix::io::Errno {
    // SAFETY: a string and two null-ended arrays of strings, all of which whoever starts the program keeps. The C
    // library's error number is that of the thread that made the child, which does not use it while it waits.
    unsafe {
        libc::execve(program, argv, env);
        rustix::io::Errno::from_raw_os_error(*libc::__errno_location())
    }
}

/// Whether there is a file that the child may run, as whom it runs by now.
fn may_execute(program: *const c_char) -> rustix::io::Result<()> {
    // SAFETY: as in `execve`.
    unsafe {
        match libc::access(program, libc::X_OK) {
            0 => Ok(()),
            _ => Err(rustix::io::Errno::from_raw_os_error(*libc::__errno_location())),
        }
    }
}

/// A child has copies of all that the agent had open. As long as one waits for its program, nobody else would see an end
/// of those; and what the agent was itself started with is no program's business.
fn close_the_rest() {
    // SAFETY: a system call on the child's own table of descriptors; the child uses none of these.
    unsafe { libc::close_range(3, libc::c_uint::MAX, 0) };
}

/// Programs begin with no signal blocked, and with a broken pipe ending them (the agent ignores it).
fn restore_signals() {
    // SAFETY: plain system calls with initialised arguments; the child's handlers and mask are its own.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        let mut none = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut());
    }
}

/// No signal reaches this thread while this lives.
struct SignalsBlocked(libc::sigset_t);

impl SignalsBlocked {
    fn new() -> Self {
        // SAFETY: plain system calls on sets that live here; all-zero is a valid set.
        unsafe {
            let (mut all, mut before) = (std::mem::zeroed(), std::mem::zeroed());
            libc::sigfillset(&raw mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
            Self(before)
        }
    }
}

impl Drop for SignalsBlocked {
    fn drop(&mut self) {
        // SAFETY: restores what was in force.
        unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, ptr::null_mut());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::pipe::{PipeFlags, pipe_with};
    use std::io::Read as _;

    fn run(cmd: &str, args: &[&str], env: &[(&str, &str)]) -> io::Result<(String, i32)> {
        let null = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/null")?;
        let (ours, theirs) = pipe_with(PipeFlags::CLOEXEC)?;
        let args: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).collect();
        let (pid, _) = Program {
            cmd,
            args: &args,
            env: &env.iter().copied().collect(),
            cwd: Path::new("/"),
            terminal: false,
            credentials: None,
        }
        .image()?
        .start([null.as_fd(), theirs.as_fd(), null.as_fd()])?;
        drop(theirs);
        let mut output = String::new();
        std::fs::File::from(ours).read_to_string(&mut output)?;
        let status = rustix::process::waitpid(Some(pid), WaitOptions::empty())?
            .expect("it ended")
            .1;
        Ok((output, status.exit_status().expect("it exited")))
    }

    #[test]
    fn a_program_is_found_in_its_own_path_and_gets_its_environment() {
        let (output, code) = run(
            "sh",
            &["-c", "printf '%s %s' \"$A\" \"$1\"; exit 7", "sh", "two"],
            &[("PATH", "/nowhere::/bin"), ("A", "one")],
        )
        .expect("started");
        assert_eq!((output.as_str(), code), ("one two", 7));
    }

    #[test]
    fn what_cannot_be_started_says_why() {
        let kind = |cmd: &str, path: &str| {
            run(cmd, &[], &[("PATH", path)])
                .expect_err("not a program")
                .kind()
        };
        assert_eq!(kind("no-such-program", "/bin:/usr/bin"), io::ErrorKind::NotFound);
        assert_eq!(kind("/no/such/program", "/bin"), io::ErrorKind::NotFound);
        let plain = tempfile::NamedTempFile::new().expect("a file");
        let plain = plain.path().to_str().expect("a plain path");
        assert_eq!(kind(plain, "/bin"), io::ErrorKind::PermissionDenied);
        assert_eq!(kind("a\0b", "/bin"), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn a_script_without_a_first_line_is_a_shells() {
        use std::os::unix::fs::PermissionsExt as _;
        let folder = tempfile::tempdir().expect("a folder");
        let script = folder.path().join("script");
        std::fs::write(&script, "echo \"$0 $1\"\n").expect("written");
        std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).expect("executable");
        let name = script.to_str().expect("a plain path");
        let (output, code) = run(name, &["x"], &[("PATH", "/bin")]).expect("started");
        assert_eq!((output, code), (format!("{name} x\n"), 0));
    }
}
