//! Collected runs: commands whose caller wants their whole output, on a connection of the host's own.
//!
//! The platform's most frequent call. After each change of address space an emulator looks up every piece of code anew,
//! so what such a call costs is how much different code it passes, and HTTP, RPC, tasks and timers are much. Here the
//! connection is upgraded once, and a thread of its own then reads a request, starts the program, waits for its end
//! and answers, with plain system calls. The messages are in `run.proto`.
//!
//! Everything else is as with `process.Process`: the process is in the table, can be listed, followed and killed, and
//! outlives a caller that leaves.

use std::io::{self, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::{Request, State};
use axum::response::{IntoResponse as _, Response};
use buffa::Message as _;
use bytes::Bytes;
use connectrpc::ConnectError;
use http::header::{CONNECTION, UPGRADE};
use http::{HeaderValue, StatusCode};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use hyper_util::server::conn::auto::upgrade::downcast;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::Signal;
use tokio::runtime::Handle;
use wrenn_proto::guest::{MAX_RUN_MESSAGE, RUN_PROTOCOL};
use wrenn_proto::run::{RunEvent, RunRequest, run_event::Refused};

use super::pump::{self, CHUNK, LINGER, QUIET};
use super::service::{Wanted, start_error, user_named};
use super::spare;
use super::spawn::{self, Collected, nonblocking};
use super::stream::{deadline_error, encode};
use super::table::{Event, Exit, Source};
use crate::http::Failure;
use crate::logging::log;
use crate::state::{Agent, Settings};
use crate::unsafe_calls::yield_to_programs;

/// Stack of a connection's thread.
const STACK: usize = 256 * 1024;
/// So long, and up to [`CHUNK`] of output, events wait for one another.
const GATHER: Duration = Duration::from_millis(100);
/// How long the host may take to read what was sent before it counts as gone.
const PATIENCE: Duration = Duration::from_secs(60);

/// `GET /run` with `Upgrade: wrenn-run`.
pub(crate) async fn upgrade(State(agent): State<Arc<Agent>>, mut request: Request) -> Response {
    let asked = request
        .headers()
        .get(UPGRADE)
        .is_some_and(|protocol| protocol == RUN_PROTOCOL);
    let upgrade = request.extensions_mut().remove::<OnUpgrade>();
    let (true, Some(upgrade)) = (asked, upgrade) else {
        let message = format!("this is for connections that are upgraded to {RUN_PROTOCOL}");
        return Failure::new(StatusCode::UPGRADE_REQUIRED, message).into_response();
    };
    // What the request was let in with just now; by the time the connection is there it may be another.
    let settings = agent.settings();
    tokio::spawn(async move {
        let handed_over = match upgrade.await {
            Ok(upgraded) => hand_over(agent, settings, upgraded),
            Err(error) => Err(io::Error::other(error)),
        };
        if let Err(error) = handed_over {
            log!("a connection for runs: {error}");
        }
    });
    let mut response = StatusCode::SWITCHING_PROTOCOLS.into_response();
    let headers = response.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static(RUN_PROTOCOL));
    response
}

/// Gives the connection to a thread.
fn hand_over(agent: Arc<Agent>, settings: Arc<Settings>, upgraded: Upgraded) -> io::Result<()> {
    let parts = downcast::<TokioIo<tokio::net::TcpStream>>(upgraded)
        .map_err(|_| io::Error::other("not a plain connection"))?;
    let stream = parts.io.into_inner().into_std()?;
    stream.set_nonblocking(false)?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let runtime = Handle::current();
    std::thread::Builder::new()
        .name("run".to_owned())
        .stack_size(STACK)
        .spawn(move || {
            yield_to_programs();
            let mut connection = Connection {
                agent: &agent,
                runtime: &runtime,
                token: settings.access_token.as_deref(),
                reader: BufReader::new(io::Cursor::new(parts.read_buf).chain(&stream)),
                answer: Answer {
                    stream: &stream,
                    events: Vec::new(),
                    lost: None,
                },
                buffer: vec![0; CHUNK],
            };
            if let Err(error) = connection.serve() {
                log!("a connection for runs: {error}");
            }
        })
        .map(drop)
}

struct Connection<'a, R> {
    agent: &'a Arc<Agent>,
    runtime: &'a Handle,
    /// What the connection was let in with.
    token: Option<&'a str>,
    reader: R,
    answer: Answer<'a>,
    buffer: Vec<u8>,
}

impl<R: io::BufRead> Connection<'_, R> {
    /// Until the host closes the connection.
    fn serve(&mut self) -> io::Result<()> {
        while !self.reader.fill_buf()?.is_empty() {
            let mut length = [0; 4];
            self.reader.read_exact(&mut length)?;
            let length = u32::from_le_bytes(length) as usize;
            if length > MAX_RUN_MESSAGE {
                return Err(io::Error::other(format!("a message of {length} bytes")));
            }
            let mut message = vec![0; length];
            self.reader.read_exact(&mut message)?;
            if self.agent.settings().access_token.as_deref() != self.token {
                return Ok(());
            }
            let request = RunRequest::decode_from_slice(&message).map_err(io::Error::other)?;
            match self.start(request) {
                Ok((collected, deadline)) => self.follow(collected, deadline),
                Err(error) => {
                    self.answer.push(&refusal(error));
                    self.answer.flush();
                }
            }
            if let Some(lost) = self.answer.lost.take() {
                return Err(lost);
            }
            // What follows is done while the host works on the answer.
            self.answer.events.shrink_to(2 * CHUNK);
            spare::make();
        }
        Ok(())
    }

    fn start(&mut self, request: RunRequest) -> Result<(Collected, Option<Instant>), ConnectError> {
        let deadline = match request.limit_ms {
            0 => None,
            limit => Instant::now().checked_add(Duration::from_millis(limit)),
        };
        let wanted = Wanted {
            user: user_named(self.agent, request.user.as_deref())?,
            config: request
                .process
                .into_option()
                .ok_or_else(|| ConnectError::invalid_argument("process is missing"))?,
            tag: Some(request.tag).filter(|tag| !tag.is_empty()),
            stdin: false,
            terminal: None,
            // Kept here.
            deadline: None,
        };
        let plan = wanted.plan(self.agent)?;
        let (cmd, cwd) = (plan.config.cmd.clone(), plan.cwd.clone());
        let collected = spawn::start_collected(&self.agent.processes, plan)
            .map_err(|error| start_error(&cmd, &cwd, &error))?;
        Ok((collected, deadline))
    }

    /// Sends what the process writes, and its end, or the error that takes the end's place.
    fn follow(&mut self, collected: Collected, deadline: Option<Instant>) {
        let Collected {
            process,
            pidfd,
            stdout,
            stderr,
        } = collected;
        let mut outputs = [
            Some(Output::new(stdout, Source::Stdout)),
            Some(Output::new(stderr, Source::Stderr)),
        ];
        let (mut killed, mut end) = (false, None::<End>);
        let mut gathered = Some(Instant::now() + GATHER);
        self.answer.push(&event(Event::Start(process.id())));
        let exit = loop {
            let until = match &end {
                Some(end) => Some(end.until(&outputs)),
                None if killed => gathered,
                None => [gathered, deadline].into_iter().flatten().min(),
            };
            let ready = wait(&outputs, end.is_none().then_some(pidfd.as_fd()), until);
            for (slot, ready) in outputs.iter_mut().zip(ready.outputs) {
                let Some(output) = slot.as_mut().filter(|_| !ready.is_empty()) else {
                    continue;
                };
                // Of a stream that is closed at its other end the rest is there to be read; else one read does not wait.
                let closed = loop {
                    let count = output.read(&mut self.buffer);
                    if count == 0 {
                        break true;
                    }
                    if let Some(end) = &mut end {
                        end.quiet = Instant::now() + QUIET;
                    }
                    let data = Event::Data(output.source, Bytes::copy_from_slice(&self.buffer[..count]));
                    process.publish_from_outside(&data, self.runtime, deadline.map(Into::into));
                    self.answer.push(&event(data));
                    if self.answer.events.len() > CHUNK || gathered.is_none() {
                        self.answer.flush();
                    }
                    if !ready.contains(PollFlags::HUP) {
                        break false;
                    }
                };
                if closed {
                    *slot = None;
                }
            }
            if ready.ended
                && let Some(exit) = process.reap()
            {
                let now = Instant::now();
                for output in outputs.iter_mut().flatten() {
                    output.owed = rustix::io::ioctl_fionread(&output.pipe).unwrap_or(0);
                }
                end = Some(End {
                    exit,
                    quiet: now + QUIET,
                    linger: now + LINGER,
                });
            }
            let now = Instant::now();
            if let Some(end) = &end {
                if outputs.iter().all(Option::is_none) || now >= end.until(&outputs) {
                    break end.exit;
                }
                continue;
            }
            if !killed && deadline.is_some_and(|deadline| now >= deadline) {
                killed = true;
                process.signal(Signal::KILL);
            }
            if gathered.is_some_and(|gathered| now >= gathered) {
                gathered = None;
                self.answer.flush();
            }
        };
        self.answer.push(&if killed {
            refusal(deadline_error())
        } else {
            event(Event::End(exit))
        });
        // Before what the caller need not wait for: the process is over already for whoever asks.
        self.answer.flush();
        let _runtime = self.runtime.enter();
        self.agent.processes.finish_elsewhere(&process, exit);
        for output in outputs.into_iter().flatten() {
            drain(output.pipe);
        }
    }
}

/// Events on their way to the host. Nothing is sent any more once the host is gone.
struct Answer<'a> {
    stream: &'a TcpStream,
    events: Vec<u8>,
    lost: Option<io::Error>,
}

impl Answer<'_> {
    fn push(&mut self, event: &RunEvent) {
        if self.lost.is_some() {
            return;
        }
        let start = self.events.len();
        self.events.extend_from_slice(&[0; 4]);
        event.encode(&mut self.events);
        // Events hold at most a chunk of output.
        let length = u32::try_from(self.events.len() - start - 4).unwrap_or(u32::MAX);
        self.events[start..start + 4].copy_from_slice(&length.to_le_bytes());
    }

    fn flush(&mut self) {
        if self.lost.is_none() {
            self.lost = self.stream.write_all(&self.events).err();
        }
        self.events.clear();
    }
}

/// Reads and drops what programs that outlive their starter still write, so that a closed pipe does not end them.
fn drain(pipe: OwnedFd) {
    match nonblocking(pipe) {
        Ok(pipe) => pump::drain(Arc::new(pipe)),
        Err(error) => log!("an output that stays open: {error}"),
    }
}

/// One output of a process, until it is closed.
struct Output {
    pipe: OwnedFd,
    source: Source,
    /// What the process itself had written when it ended and is not read yet.
    owed: u64,
}

impl Output {
    fn new(pipe: OwnedFd, source: Source) -> Self {
        Self {
            pipe,
            source,
            owed: 0,
        }
    }

    /// The length of what was read; 0 at the end.
    fn read(&mut self, buffer: &mut [u8]) -> usize {
        let count = rustix::io::retry_on_intr(|| rustix::io::read(&self.pipe, &mut *buffer)).unwrap_or(0);
        self.owed = self.owed.saturating_sub(count as u64);
        count
    }
}

/// A process has ended, but something holds its output open.
struct End {
    exit: Exit,
    quiet: Instant,
    linger: Instant,
}

impl End {
    /// How long output is waited for.
    fn until(&self, outputs: &[Option<Output>; 2]) -> Instant {
        if outputs.iter().flatten().any(|output| output.owed > 0) {
            return self.quiet;
        }
        self.quiet.min(self.linger)
    }
}

struct Ready {
    outputs: [PollFlags; 2],
    ended: bool,
}

/// Waits for output, for the end of the process where that is still to come, or for the time.
fn wait(outputs: &[Option<Output>; 2], pidfd: Option<BorrowedFd<'_>>, until: Option<Instant>) -> Ready {
    let time = until.map(|until| {
        let left = until.saturating_duration_since(Instant::now());
        // Not beyond what the kernel's clock holds.
        Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX).min(1 << 31),
            tv_nsec: i64::from(left.subsec_nanos()),
        }
    });
    let mut fds = Vec::with_capacity(3);
    for output in outputs.iter().flatten() {
        fds.push(PollFd::new(&output.pipe, PollFlags::IN));
    }
    if let Some(pidfd) = &pidfd {
        fds.push(PollFd::new(pidfd, PollFlags::IN));
    }
    match poll(&mut fds, time.as_ref()) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        // No memory: the process is still to be looked after.
        Err(error) => {
            log!("a process is not watched for a moment: {error}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }
    let mut events = fds.iter().map(PollFd::revents);
    let outputs = outputs.each_ref().map(|output| match output {
        Some(_) => events.next().unwrap_or(PollFlags::empty()),
        None => PollFlags::empty(),
    });
    Ready {
        outputs,
        ended: pidfd.is_some() && events.next().is_some_and(|events| !events.is_empty()),
    }
}

fn event(event: Event) -> RunEvent {
    RunEvent {
        event: Some(encode(event).into()),
        ..Default::default()
    }
}

fn refusal(error: ConnectError) -> RunEvent {
    RunEvent {
        event: Some(
            Refused {
                code: error.code.as_str().to_owned(),
                message: error.message.unwrap_or_default(),
                ..Default::default()
            }
            .into(),
        ),
        ..Default::default()
    }
}
