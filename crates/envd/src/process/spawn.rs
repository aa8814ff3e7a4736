//! Starting a process.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use futures::future::join_all;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Signal, WaitOptions, waitpid};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use tokio::time::Instant;
use wrenn_proto::process::ProcessConfig;

use super::child::{Image, Program};
use super::pump;
use super::spare;
use super::table::{Event, Process, ProcessTable, Source};
use crate::logging::log;
use crate::state::Settings;
use crate::unsafe_calls::watch_fd;
use crate::users::User;

/// A pipe's or terminal's end on the agent's side.
pub(crate) type AsyncPipe = AsyncFd<OwnedFd>;

/// Where a process reads from.
pub(crate) enum Input {
    /// `/dev/null`, or a pipe that has been closed.
    Closed,
    Pipe(AsyncPipe),
    Terminal(Arc<AsyncPipe>),
}

/// A terminal's size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TerminalSize {
    pub(crate) cols: u16,
    pub(crate) rows: u16,
}

impl TerminalSize {
    /// Applies it to either end of the terminal; the foreground job learns of it.
    pub(crate) fn set(self, terminal: impl AsFd) -> io::Result<()> {
        Ok(tcsetwinsize(
            terminal,
            Winsize {
                ws_col: self.cols,
                ws_row: self.rows,
                ws_xpixel: 0,
                ws_ypixel: 0,
            },
        )?)
    }
}

/// A process to be started.
pub(crate) struct Plan {
    pub(crate) config: ProcessConfig,
    pub(crate) tag: Option<String>,
    pub(crate) user: User,
    pub(crate) cwd: PathBuf,
    /// Environment of every process of the sandbox is among them; the request's own goes before it.
    pub(crate) settings: Arc<Settings>,
    pub(crate) stdin: bool,
    pub(crate) terminal: Option<TerminalSize>,
    /// When the process is killed if it still runs.
    pub(crate) deadline: Option<Instant>,
}

/// Refuses what no environment can hold.
pub(crate) fn check_environment<'a>(
    variables: impl Iterator<Item = (&'a String, &'a String)>,
) -> Result<(), String> {
    for (name, value) in variables {
        if name.is_empty() || name.contains(['=', '\0']) {
            return Err(format!("invalid name of an environment variable: {name:?}"));
        }
        if value.contains('\0') {
            return Err(format!(
                "the value of environment variable {name:?} contains a zero byte"
            ));
        }
    }
    Ok(())
}

/// The agent's side of a started process's streams.
struct Streams {
    input: Input,
    outputs: Vec<(Arc<AsyncPipe>, Source)>,
}

/// Starts the process and everything that looks after it; returns the first subscription to its events.
pub(crate) fn start(table: &Arc<ProcessTable>, plan: Plan) -> io::Result<mpsc::Receiver<Event>> {
    let (theirs, streams) = match plan.terminal {
        Some(size) => terminal(size, &plan.user)?,
        None => pipes(plan.stdin)?,
    };
    let deadline = plan.deadline;
    let (pid, pidfd) = image(&plan)?.start(theirs.each_ref().map(|fd| fd.as_fd()))?;
    let process = Arc::new(Process::new(pid, plan.config, plan.tag, streams.input));
    // Held by the process alone from here on, so that its streams end with it.
    drop(theirs);
    let pidfd = watch_fd(pidfd).inspect_err(|_| {
        // Nobody would ever learn of its end, so it must not live. SIGKILL makes this wait short.
        super::session::signal(process.pid, Signal::KILL);
        let _ = waitpid(Some(process.pid), WaitOptions::empty());
    })?;
    let events = process.subscribe();
    table.insert(&process);
    tokio::spawn(supervise(
        table.clone(),
        process,
        pidfd,
        streams.outputs,
        deadline,
    ));
    Ok(events)
}

/// A process whose output is collected by a thread of its own ([`super::run`]).
pub(super) struct Collected {
    pub(super) process: Arc<Process>,
    pub(super) pidfd: OwnedFd,
    pub(super) stdout: OwnedFd,
    pub(super) stderr: OwnedFd,
}

/// What a process without a terminal writes to: of each pipe the agent's end, then the process's.
pub(super) struct Pipes {
    pub(super) stdout: (OwnedFd, OwnedFd),
    pub(super) stderr: (OwnedFd, OwnedFd),
}

impl Pipes {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            stdout: pipe_with(PipeFlags::CLOEXEC)?,
            stderr: pipe_with(PipeFlags::CLOEXEC)?,
        })
    }
}

/// Starts a process without input that nobody looks after yet.
pub(super) fn start_collected(table: &Arc<ProcessTable>, plan: Plan) -> io::Result<Collected> {
    let image = image(&plan)?;
    let (pid, pidfd, stdout, stderr) = match spare::start(&image)? {
        Some(started) => started,
        None => {
            let Pipes { stdout, stderr } = Pipes::new()?;
            let (pid, pidfd) = image.start([no_input()?.as_fd(), stdout.1.as_fd(), stderr.1.as_fd()])?;
            (pid, pidfd, stdout.0, stderr.0)
        }
    };
    let process = Arc::new(Process::new(pid, plan.config, plan.tag, Input::Closed));
    table.insert(&process);
    Ok(Collected {
        process,
        pidfd,
        stdout,
        stderr,
    })
}

fn image(plan: &Plan) -> io::Result<Image> {
    Program {
        cmd: &plan.config.cmd,
        args: &plan.config.args,
        env: &environment(plan),
        cwd: &plan.cwd,
        terminal: plan.terminal.is_some(),
        credentials: plan.user.credentials(),
    }
    .image()
}

/// The agent's own search path and the user's account, then what the sandbox and the request say: later ones win.
fn environment(plan: &Plan) -> BTreeMap<&str, &str> {
    let user = &plan.user;
    let mut variables = BTreeMap::from([
        ("PATH", search_path()),
        // Read from a text file, so it is text.
        ("HOME", user.home.to_str().unwrap_or("/")),
        ("USER", &user.name),
        ("LOGNAME", &user.name),
        ("SHELL", &user.shell),
    ]);
    if plan.terminal.is_some() {
        variables.insert("TERM", "xterm-256color");
    }
    for (name, value) in plan.settings.env_vars.iter().chain(&plan.config.envs) {
        variables.insert(name, value);
    }
    variables
}

/// Where the agent looks for programs.
fn search_path() -> &'static str {
    static PATH: OnceLock<String> = OnceLock::new();
    PATH.get_or_init(|| {
        std::env::var("PATH")
            .ok()
            .filter(|path| !path.is_empty())
            .unwrap_or_else(|| "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".into())
    })
}

/// What a process reads from and writes to, and the agent's ends of that.
type Stdio = ([Arc<OwnedFd>; 3], Streams);

/// `/dev/null`, opened once for all processes without input.
pub(super) fn no_input() -> io::Result<Arc<OwnedFd>> {
    static NULL: OnceLock<Arc<OwnedFd>> = OnceLock::new();
    if let Some(null) = NULL.get() {
        return Ok(null.clone());
    }
    let null = Arc::new(File::open("/dev/null")?.into());
    Ok(NULL.get_or_init(|| null).clone())
}

fn pipes(stdin: bool) -> io::Result<Stdio> {
    let (theirs_in, input) = if stdin {
        let (theirs, ours) = pipe_with(PipeFlags::CLOEXEC)?;
        (Arc::new(theirs), Input::Pipe(nonblocking(ours)?))
    } else {
        (no_input()?, Input::Closed)
    };
    let Pipes { stdout, stderr } = Pipes::new()?;
    let outputs = vec![
        (Arc::new(nonblocking(stdout.0)?), Source::Stdout),
        (Arc::new(nonblocking(stderr.0)?), Source::Stderr),
    ];
    let theirs = [theirs_in, Arc::new(stdout.1), Arc::new(stderr.1)];
    Ok((theirs, Streams { input, outputs }))
}

fn terminal(size: TerminalSize, user: &User) -> io::Result<Stdio> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags)?;
    unlockpt(&master)?;
    let slave = ioctl_tiocgptpeer(&master, flags)?;
    size.set(&slave)?;
    if user.credentials().is_some() {
        // The terminal is the user's: programs such as tmux open it again by its name.
        let owner = rustix::process::Uid::from_raw(user.uid);
        rustix::fs::fchown(&slave, Some(owner), None)?;
    }
    let slave = Arc::new(slave);
    let master = Arc::new(nonblocking(master)?);
    Ok((
        [slave.clone(), slave.clone(), slave],
        Streams {
            input: Input::Terminal(master.clone()),
            outputs: vec![(master, Source::Terminal)],
        },
    ))
}

pub(super) fn nonblocking(fd: OwnedFd) -> io::Result<AsyncPipe> {
    rustix::io::ioctl_fionbio(&fd, true)?;
    watch_fd(fd)
}

/// Carries the output of the process, waits for its end, or for its deadline, and announces the end after the last
/// output.
async fn supervise(
    table: Arc<ProcessTable>,
    process: Arc<Process>,
    pidfd: AsyncPipe,
    outputs: Vec<(Arc<AsyncPipe>, Source)>,
    deadline: Option<Instant>,
) {
    let deadline = async move {
        match deadline {
            Some(deadline) => tokio::time::sleep_until(deadline).await,
            None => std::future::pending().await,
        }
    };
    let pumps = outputs
        .into_iter()
        .map(|(pipe, source)| pump::run(&process, pipe, source));
    let end = async {
        tokio::pin!(deadline);
        let mut armed = true;
        let exit = loop {
            tokio::select! {
                readable = pidfd.readable() => {
                    if let Err(error) = readable {
                        log!("process {}: {error}", process.id());
                        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                    }
                    if let Some(exit) = process.reap() {
                        break exit;
                    }
                }
                () = &mut deadline, if armed => {
                    armed = false;
                    process.signal(Signal::KILL);
                }
            }
        };
        *process.input.lock().await = Input::Closed;
        exit
    };
    let (exit, _) = tokio::join!(end, join_all(pumps));
    table.finish(&process, exit).await;
}
