//! Processes in a sandbox: run, start, follow, feed, kill.

use std::collections::BTreeMap;
use std::time::Duration;

use connectrpc::client::{CallOptions, ServerStream};
use connectrpc::{ConnectError, StreamMessage};
use wrenn_proto::hostagent;
use wrenn_proto::hostagent::__buffa::oneof::process_event::Event as WireEvent;
use wrenn_proto::hostagent::__buffa::oneof::process_selector::Selector as WireSelector;
use wrenn_proto::hostagent::__buffa::view::ProcessEventView;
use wrenn_proto::rest::Exec;

use super::{Services, validate};
use crate::auth;
use crate::domain::{Principal, SandboxId};
use crate::hosts::{Client, rpc};
use crate::{Error, Result};

/// Collected output is cut here, for each stream.
pub(crate) const MAX_OUTPUT: u64 = 16 << 20;
/// Time limit of a foreground exec that names none.
const DEFAULT_EXEC_SEC: u32 = 30;
/// Longest time limit: a day.
const MAX_EXEC_SEC: u32 = 24 * 3600;
/// Program and arguments together.
const MAX_COMMAND: usize = 512 * 1024;

/// A process by its pid or its tag.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Selector {
    /// By number.
    Pid(u32),
    /// By the tag that it was started with.
    Tag(String),
}

impl Selector {
    /// Reads a path segment: digits are a pid, everything else is a tag.
    ///
    /// # Errors
    /// The text can name no process.
    pub fn parse(text: &str) -> Result<Self> {
        if text.is_empty() || text.len() > 256 || text.contains('\0') {
            return Err(Error::not_found("process", text));
        }
        Ok(match text.parse() {
            Ok(pid) => Self::Pid(pid),
            Err(_) => Self::Tag(text.to_owned()),
        })
    }

    fn wire(&self) -> hostagent::ProcessSelector {
        let selector = match self {
            Self::Pid(pid) => WireSelector::Pid(*pid),
            Self::Tag(tag) => WireSelector::Tag(tag.clone()),
        };
        hostagent::ProcessSelector {
            selector: Some(selector),
            ..Default::default()
        }
    }
}

/// What to start.
#[derive(Clone, Default)]
pub struct Spec {
    /// Program to run; looked up in the user's `PATH`.
    pub cmd: String,
    /// Its arguments.
    pub args: Vec<String>,
    /// Added to the sandbox's environment.
    pub envs: BTreeMap<String, String>,
    /// Where it starts.
    pub cwd: Option<String>,
    /// User to run as.
    pub user: Option<String>,
    /// Name by which to find it later.
    pub tag: Option<String>,
}

wrenn_proto::discreet_debug!(Spec shows(cmd, args, cwd, user, tag) hides(envs));

impl Spec {
    fn wire(self) -> Result<hostagent::ProcessSpec> {
        let Self {
            cmd,
            args,
            envs,
            cwd,
            user,
            tag,
        } = self;
        if cmd.is_empty() {
            return Err(Error::invalid("cmd must not be empty"));
        }
        if cmd.len() + args.iter().map(String::len).sum::<usize>() > MAX_COMMAND {
            return Err(Error::invalid(format!(
                "cmd and args must be at most {MAX_COMMAND} bytes together"
            )));
        }
        if cmd.contains('\0') || args.iter().any(|arg| arg.contains('\0')) {
            return Err(Error::invalid("cmd and args must not contain a NUL character"));
        }
        validate::envs(&envs)?;
        let cwd = cwd.filter(|cwd| !cwd.is_empty());
        if let Some(cwd) = &cwd {
            validate::path(cwd).map_err(|error| Error::invalid(format!("cwd: {}", error.message)))?;
        }
        let tag = validate::word("tag", tag)?;
        if tag.as_ref().is_some_and(|tag| tag.parse::<u32>().is_ok()) {
            return Err(Error::invalid(
                "tag must not be a number, since numbers select by pid",
            ));
        }
        Ok(hostagent::ProcessSpec {
            cmd,
            args,
            envs: envs.into_iter().collect(),
            cwd,
            user: validate::word("user", user)?,
            tag,
            ..Default::default()
        })
    }
}

/// Where a program's standard input comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Input {
    /// Nowhere: `/dev/null`.
    Nothing,
    /// The client, through a pipe.
    Pipe,
    /// The client, through a terminal.
    Terminal {
        /// Width in characters.
        cols: u32,
        /// Height in lines.
        rows: u32,
    },
}

/// What an exec came to.
#[derive(Debug, Clone)]
pub enum ExecOutcome {
    /// It runs in the background.
    Started {
        /// Its number.
        pid: u32,
        /// Its name.
        tag: String,
    },
    /// It ended.
    Ended {
        /// What it wrote, 16 MiB at most.
        stdout: Vec<u8>,
        /// What it wrote as errors, 16 MiB at most.
        stderr: Vec<u8>,
        /// Its exit code.
        exit_code: i32,
        /// How long it ran, in milliseconds.
        duration_ms: u64,
        /// Whether it wrote more than is here.
        truncated: bool,
    },
}

/// What a followed process does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProcessEvent {
    /// It runs.
    Start {
        /// Its number.
        pid: u32,
        /// Its name.
        tag: String,
    },
    /// It wrote to its standard output.
    Stdout(Vec<u8>),
    /// It wrote to its standard error.
    Stderr(Vec<u8>),
    /// It wrote to its terminal.
    Pty(Vec<u8>),
    /// It ended.
    Exit {
        /// Its exit code.
        exit_code: i32,
    },
    /// Nothing; the connection lives.
    KeepAlive,
}

/// A followed process.
pub struct ProcessStream {
    events: ServerStream<hyper::body::Incoming, ProcessEventView<'static>>,
}

/// A running sandbox's process, to be fed and killed.
#[derive(Clone)]
pub struct ProcessHandle {
    client: Client,
    sandbox: SandboxId,
    selector: Selector,
    timeout: Duration,
}

impl Services {
    /// Runs a program, or starts it in the background.
    pub async fn exec(&self, principal: Principal, id: &str, body: Exec) -> Result<(SandboxId, ExecOutcome)> {
        let Exec {
            cmd,
            args,
            background,
            timeout_sec,
            envs,
            cwd,
            tag,
            user,
        } = body;
        let asked = timeout_sec.unwrap_or_default();
        validate::within("timeout_sec", asked, 0, MAX_EXEC_SEC)?;
        let tag = tag.filter(|tag| !tag.is_empty());
        let tag = if background && tag.is_none() {
            Some(auth::random_secret("proc-", 6)?)
        } else {
            tag
        };
        let spec = Spec {
            cmd,
            args,
            envs: envs.unwrap_or_default(),
            cwd,
            user,
            tag: tag.clone(),
        }
        .wire()?;
        let limit = if asked == 0 && !background {
            DEFAULT_EXEC_SEC
        } else {
            asked
        };
        // The agent keeps the program's time; this limit only catches an agent that does not.
        let patience = if background {
            Duration::ZERO
        } else {
            Duration::from_secs(limit.into())
        };
        let options = CallOptions::default().with_timeout(patience + self.config.timings.short_rpc);
        let call = |sandbox: SandboxId, client: Client| {
            let request = hostagent::ExecRequest {
                sandbox_id: sandbox.to_string(),
                process: spec.clone().into(),
                timeout_sec: limit,
                background,
                max_output_bytes: MAX_OUTPUT,
                ..Default::default()
            };
            let options = options.clone();
            async move { client.exec_with_options(request, options).await }
        };
        let (place, answer) = self.call_guest(principal, id, "exec in", call).await?;
        let answer = answer.map_err(rpc::guest_error)?.into_owned();
        self.used(place.sandbox, place.last_active_at).await?;
        let outcome = if background {
            let tag = if answer.tag.is_empty() {
                tag.unwrap_or_default()
            } else {
                answer.tag
            };
            ExecOutcome::Started { pid: answer.pid, tag }
        } else {
            ExecOutcome::Ended {
                stdout: answer.stdout,
                stderr: answer.stderr,
                exit_code: answer.exit_code,
                duration_ms: answer.duration_ms,
                truncated: answer.stdout_truncated || answer.stderr_truncated,
            }
        };
        Ok((place.sandbox, outcome))
    }

    /// Starts a program and follows it.
    pub async fn start_process(
        &self,
        principal: Principal,
        id: &str,
        mut spec: Spec,
        input: Input,
    ) -> Result<(ProcessStream, ProcessHandle)> {
        let (prefix, size, stdin) = match input {
            Input::Nothing => ("proc-", None, false),
            Input::Pipe => ("proc-", None, true),
            Input::Terminal { cols, rows } => ("pty-", Some(pty_size(cols, rows)?), false),
        };
        let tag = match spec.tag.take().filter(|tag| !tag.is_empty()) {
            Some(tag) => tag,
            None => auth::random_secret(prefix, 6)?,
        };
        spec.tag = Some(tag.clone());
        let spec = spec.wire()?;
        let (sandbox, client) = self.running(principal, id, "exec in").await?;
        let request = hostagent::StartProcessRequest {
            sandbox_id: sandbox.id.to_string(),
            process: spec.into(),
            pty: size.into(),
            stdin,
            timeout_sec: 0,
            ..Default::default()
        };
        let events = self.first_answer(client.start_process(request)).await?;
        self.used(sandbox.id, sandbox.last_active_at).await?;
        let timeout = self.config.timings.short_rpc;
        Ok((
            ProcessStream { events },
            ProcessHandle {
                client,
                sandbox: sandbox.id,
                selector: Selector::Tag(tag),
                timeout,
            },
        ))
    }

    /// Follows a process that runs already.
    pub async fn connect_process(
        &self,
        principal: Principal,
        id: &str,
        selector: Selector,
    ) -> Result<(ProcessStream, ProcessHandle)> {
        let (sandbox, client) = self.running(principal, id, "exec in").await?;
        let request = hostagent::ConnectProcessRequest {
            sandbox_id: sandbox.id.to_string(),
            process: selector.wire().into(),
            ..Default::default()
        };
        let events = self.first_answer(client.connect_process(request)).await?;
        self.used(sandbox.id, sandbox.last_active_at).await?;
        let timeout = self.config.timings.short_rpc;
        Ok((
            ProcessStream { events },
            ProcessHandle {
                client,
                sandbox: sandbox.id,
                selector,
                timeout,
            },
        ))
    }

    /// The first answer of a call that goes on for as long as it takes: a host that is there has one soon, and a connection
    /// over which nothing comes back would hold the caller for ever.
    pub(super) async fn first_answer<T>(
        &self,
        call: impl Future<Output = std::result::Result<T, ConnectError>>,
    ) -> Result<T> {
        tokio::time::timeout(self.config.timings.short_rpc, call)
            .await
            .unwrap_or_else(|_| {
                Err(ConnectError::deadline_exceeded(
                    "the sandbox's host did not answer in time",
                ))
            })
            .map_err(rpc::guest_error)
    }

    /// Processes that were started through the API and still run.
    pub async fn list_processes(
        &self,
        principal: Principal,
        id: &str,
    ) -> Result<Vec<hostagent::ProcessInfo>> {
        let (sandbox, client) = self.running(principal, id, "list the processes of").await?;
        let request = hostagent::ListProcessesRequest {
            sandbox_id: sandbox.id.to_string(),
            ..Default::default()
        };
        let answer = client
            .list_processes_with_options(request, self.short())
            .await
            .map_err(rpc::guest_error)?;
        Ok(answer.into_owned().processes)
    }

    /// Kills a process and its group.
    pub async fn kill_process(&self, principal: Principal, id: &str, selector: Selector) -> Result<()> {
        let (sandbox, client) = self.running(principal, id, "kill a process of").await?;
        let timeout = self.config.timings.short_rpc;
        ProcessHandle {
            client,
            sandbox: sandbox.id,
            selector,
            timeout,
        }
        .kill()
        .await
    }
}

impl ProcessStream {
    /// The next event; `None` at the end.
    pub async fn next(&mut self) -> Result<Option<ProcessEvent>> {
        loop {
            let message: Option<StreamMessage<hostagent::ProcessEvent>> =
                self.events.message().await.map_err(rpc::guest_error)?;
            let Some(message) = message else { return Ok(None) };
            // An event of a newer agent that this version does not know is skipped.
            let Some(event) = message.to_owned_message().event else {
                continue;
            };
            return Ok(Some(match event {
                WireEvent::Start(start) => ProcessEvent::Start {
                    pid: start.pid,
                    tag: start.tag,
                },
                WireEvent::Stdout(data) => ProcessEvent::Stdout(data),
                WireEvent::Stderr(data) => ProcessEvent::Stderr(data),
                WireEvent::Pty(data) => ProcessEvent::Pty(data),
                WireEvent::Exit(exit) => ProcessEvent::Exit {
                    exit_code: exit.exit_code,
                },
                WireEvent::Keepalive(_) => ProcessEvent::KeepAlive,
            }));
        }
    }
}

impl ProcessHandle {
    fn options(&self) -> CallOptions {
        CallOptions::default().with_timeout(self.timeout)
    }

    /// Kills it and its group.
    pub async fn kill(&self) -> Result<()> {
        let request = hostagent::SignalProcessRequest {
            sandbox_id: self.sandbox.to_string(),
            process: self.selector.wire().into(),
            signal: 9,
            ..Default::default()
        };
        self.client
            .signal_process_with_options(request, self.options())
            .await
            .map_err(rpc::guest_error)
            .map(drop)
    }

    fn send_input(&self, data: Vec<u8>, pty: bool, close: bool) -> hostagent::SendInputRequest {
        hostagent::SendInputRequest {
            sandbox_id: self.sandbox.to_string(),
            process: self.selector.wire().into(),
            data,
            pty,
            close,
            ..Default::default()
        }
    }

    /// Types into its terminal.
    pub async fn input(&self, data: Vec<u8>) -> Result<()> {
        let request = self.send_input(data, true, false);
        self.client
            .send_input_with_options(request, self.options())
            .await
            .map_err(rpc::guest_error)
            .map(drop)
    }

    /// Writes to its standard input, for as long as it takes the program to read it.
    pub async fn feed(&self, data: Vec<u8>) -> Result<()> {
        self.client
            .send_input(self.send_input(data, false, false))
            .await
            .map_err(rpc::guest_error)
            .map(drop)
    }

    /// Ends its standard input.
    pub async fn end_input(&self) -> Result<()> {
        let request = self.send_input(Vec::new(), false, true);
        self.client
            .send_input_with_options(request, self.options())
            .await
            .map_err(rpc::guest_error)
            .map(drop)
    }

    /// Changes its terminal's size.
    pub async fn resize(&self, cols: u32, rows: u32) -> Result<()> {
        let request = hostagent::ResizePtyRequest {
            sandbox_id: self.sandbox.to_string(),
            process: self.selector.wire().into(),
            size: pty_size(cols, rows)?.into(),
            ..Default::default()
        };
        self.client
            .resize_pty_with_options(request, self.options())
            .await
            .map_err(rpc::guest_error)
            .map(drop)
    }

    /// Resets the sandbox's inactivity clock, while somebody is at the terminal.
    pub async fn ping(&self) -> Result<()> {
        let request = hostagent::PingSandboxRequest {
            sandbox_id: self.sandbox.to_string(),
            ..Default::default()
        };
        self.client
            .ping_sandbox_with_options(request, self.options())
            .await
            .map_err(rpc::guest_error)
            .map(drop)
    }
}

fn pty_size(cols: u32, rows: u32) -> Result<hostagent::PtySize> {
    validate::within("cols", cols, 1, 10_000)?;
    validate::within("rows", rows, 1, 10_000)?;
    Ok(hostagent::PtySize {
        cols,
        rows,
        ..Default::default()
    })
}
