//! Processes in the guest.

use std::time::{Duration, Instant};

use connectrpc::ConnectError;
use connectrpc::client::CallOptions;
use futures::{Stream, StreamExt as _};
use wrenn_proto::guest::GATHER_HEADER;
use wrenn_proto::{hostagent as host, process as envd};

use super::{GuestClient, MAX_EVENT, begins, rpc_error, user_header};
use crate::error::{HostError, Result};

use envd::__buffa::oneof::process_event::Event as EnvdEvent;
use envd::__buffa::oneof::process_event::data_event::Output;
use host::__buffa::oneof::process_event::Event as HostEvent;

/// Output of a collected exec is cut at this many bytes a stream unless the request says otherwise.
const DEFAULT_MAX_OUTPUT: u64 = 16 << 20;

/// How long the first events of a collected exec may wait for one another.
const GATHER_MILLIS: u32 = 100;

/// How long a stream may take to end after a process's exit, which was its last event.
const STREAM_END: Duration = Duration::from_secs(1);

/// What a collected exec left behind.
pub(crate) struct Collected {
    pub(crate) pid: u32,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
    pub(crate) exit_code: i32,
    pub(crate) duration: Duration,
    pub(crate) truncated: (bool, bool),
}

pub(crate) type Events = std::pin::Pin<Box<dyn Stream<Item = Result<host::ProcessEvent>> + Send>>;

impl GuestClient {
    /// Starts a process and follows it. The process outlives a dropped stream, unless it has a time limit.
    pub(crate) async fn start(
        &self,
        spec: host::ProcessSpec,
        pty: Option<host::PtySize>,
        stdin: bool,
        limit: Option<Duration>,
    ) -> Result<Events> {
        let options = start_options(&spec, limit);
        self.start_with(spec, pty, stdin, options).await
    }

    async fn start_with(
        &self,
        spec: host::ProcessSpec,
        pty: Option<host::PtySize>,
        stdin: bool,
        options: CallOptions,
    ) -> Result<Events> {
        let tag = spec.tag.clone().unwrap_or_default();
        let request = envd::StartRequest {
            process: envd::ProcessConfig {
                cmd: spec.cmd,
                args: spec.args,
                envs: spec.envs,
                cwd: spec.cwd,
                ..Default::default()
            }
            .into(),
            pty: pty
                .map(|size| envd::PTY {
                    size: pty_size(&size).into(),
                    ..Default::default()
                })
                .into(),
            tag: spec.tag,
            stdin: Some(stdin),
            ..Default::default()
        };
        let options = options.with_max_message_size(MAX_EVENT);
        let stream = begins(self.inner.process.start_with_options(request, options)).await?;
        let events = futures::stream::unfold(stream, |mut stream| async move {
            let message = stream.message::<envd::StartResponse>().await.transpose()?;
            Some((
                message.map(|message| message.to_owned_message().event.into_option()),
                stream,
            ))
        });
        Ok(translate(events, tag))
    }

    /// Follows a process that runs already.
    pub(crate) async fn follow(&self, selector: &host::ProcessSelector) -> Result<Events> {
        let request = envd::ConnectRequest {
            process: select(selector)?.into(),
            ..Default::default()
        };
        let tag = match &selector.selector {
            Some(host::__buffa::oneof::process_selector::Selector::Tag(tag)) => tag.clone(),
            _ => String::new(),
        };
        let options = CallOptions::default().with_max_message_size(MAX_EVENT);
        let stream = begins(self.inner.process.connect_with_options(request, options)).await?;
        let events = futures::stream::unfold(stream, |mut stream| async move {
            let message = stream.message::<envd::ConnectResponse>().await.transpose()?;
            Some((
                message.map(|message| message.to_owned_message().event.into_option()),
                stream,
            ))
        });
        Ok(translate(events, tag))
    }

    /// Runs a process to its end and collects what it wrote.
    pub(crate) async fn collect(
        &self,
        spec: host::ProcessSpec,
        limit: Option<Duration>,
        max: u64,
    ) -> Result<Collected> {
        let max = usize::try_from(if max == 0 {
            DEFAULT_MAX_OUTPUT
        } else {
            max.min(DEFAULT_MAX_OUTPUT)
        })
        .unwrap_or(usize::MAX);
        let started = Instant::now();
        let options = start_options(&spec, limit).with_header(
            http::HeaderName::from_static(GATHER_HEADER),
            GATHER_MILLIS.to_string(),
        );
        let mut events = self.start_with(spec, None, false, options).await?;
        let mut out = Collected {
            pid: 0,
            stdout: Vec::new(),
            stderr: Vec::new(),
            exit_code: 0,
            duration: Duration::ZERO,
            truncated: (false, false),
        };
        while let Some(event) = events.next().await {
            match event?.event {
                Some(HostEvent::Start(start)) => out.pid = start.pid,
                Some(HostEvent::Stdout(bytes)) => out.truncated.0 |= keep(&mut out.stdout, &bytes, max),
                Some(HostEvent::Stderr(bytes)) => out.truncated.1 |= keep(&mut out.stderr, &bytes, max),
                Some(HostEvent::Exit(exit)) => {
                    out.exit_code = exit.exit_code;
                    out.duration = started.elapsed();
                    // Only a stream that was read to its end leaves its connection for the next request.
                    let _ = tokio::time::timeout(STREAM_END, events.next()).await;
                    return Ok(out);
                }
                Some(HostEvent::Pty(_) | HostEvent::Keepalive(_)) | None => {}
            }
        }
        Err(HostError::Guest(
            "the process's stream ended before the process".to_owned(),
        ))
    }

    pub(crate) async fn list_processes(&self) -> Result<Vec<host::ProcessInfo>> {
        let list = begins(self.inner.process.list(envd::ListRequest::default()))
            .await?
            .into_owned();
        Ok(list
            .processes
            .into_iter()
            .map(|process| {
                let config = process.config.into_option().unwrap_or_default();
                host::ProcessInfo {
                    pid: process.pid,
                    tag: process.tag.unwrap_or_default(),
                    cmd: config.cmd,
                    args: config.args,
                    ..Default::default()
                }
            })
            .collect())
    }

    pub(crate) async fn signal(&self, selector: &host::ProcessSelector, signal: u32) -> Result<()> {
        let signal = match signal {
            15 => envd::Signal::SIGNAL_SIGTERM,
            9 => envd::Signal::SIGNAL_SIGKILL,
            other => {
                return Err(HostError::InvalidArgument {
                    field: "signal",
                    message: format!("{other} is not one of 9 (kill) and 15 (ask to end)"),
                });
            }
        };
        let request = envd::SendSignalRequest {
            process: select(selector)?.into(),
            signal: signal.into(),
            ..Default::default()
        };
        begins(self.inner.process.send_signal(request)).await.map(drop)
    }

    pub(crate) async fn input(
        &self,
        selector: &host::ProcessSelector,
        data: Vec<u8>,
        pty: bool,
        close: bool,
    ) -> Result<()> {
        use envd::__buffa::oneof::process_input::Input;
        if !data.is_empty() {
            let input = if pty { Input::Pty(data) } else { Input::Stdin(data) };
            let request = envd::SendInputRequest {
                process: select(selector)?.into(),
                input: envd::ProcessInput {
                    input: Some(input),
                    ..Default::default()
                }
                .into(),
                ..Default::default()
            };
            self.inner.process.send_input(request).await.map_err(rpc_error)?;
        }
        if close {
            let request = envd::CloseStdinRequest {
                process: select(selector)?.into(),
                ..Default::default()
            };
            self.inner.process.close_stdin(request).await.map_err(rpc_error)?;
        }
        Ok(())
    }

    pub(crate) async fn resize(&self, selector: &host::ProcessSelector, size: &host::PtySize) -> Result<()> {
        let request = envd::UpdateRequest {
            process: select(selector)?.into(),
            pty: envd::PTY {
                size: pty_size(size).into(),
                ..Default::default()
            }
            .into(),
            ..Default::default()
        };
        begins(self.inner.process.update(request)).await.map(drop)
    }
}

/// The user and the time limit of a process.
fn start_options(spec: &host::ProcessSpec, limit: Option<Duration>) -> CallOptions {
    let options = user_header(spec.user.as_deref());
    match limit {
        Some(limit) => options.with_timeout(limit),
        None => options,
    }
}

/// Appends what fits; true when something did not.
fn keep(kept: &mut Vec<u8>, bytes: &[u8], max: usize) -> bool {
    let room = max - kept.len().min(max);
    kept.extend_from_slice(&bytes[..bytes.len().min(room)]);
    bytes.len() > room
}

fn pty_size(size: &host::PtySize) -> envd::pty::Size {
    envd::pty::Size {
        cols: size.cols,
        rows: size.rows,
        ..Default::default()
    }
}

fn select(selector: &host::ProcessSelector) -> Result<envd::ProcessSelector> {
    use envd::__buffa::oneof::process_selector::Selector as To;
    use host::__buffa::oneof::process_selector::Selector as From;
    let selector = match &selector.selector {
        Some(From::Pid(pid)) => To::Pid(*pid),
        Some(From::Tag(tag)) => To::Tag(tag.clone()),
        None => {
            return Err(HostError::InvalidArgument {
                field: "process",
                message: "neither pid nor tag".to_owned(),
            });
        }
    };
    Ok(envd::ProcessSelector {
        selector: Some(selector),
        ..Default::default()
    })
}

/// The agent's events in the host's terms. An error is the last of them.
fn translate(
    events: impl Stream<Item = Result<Option<envd::ProcessEvent>, ConnectError>> + Send + 'static,
    tag: String,
) -> Events {
    let mut failed = false;
    Box::pin(
        events
            .take_while(move |event| std::future::ready(!std::mem::replace(&mut failed, event.is_err())))
            .filter_map(move |event| {
                let translated = match event {
                    Err(error) => Some(Err(rpc_error(error))),
                    Ok(event) => event
                        .and_then(|event| event.event)
                        .and_then(|event| translate_event(event, &tag))
                        .map(|event| {
                            Ok(host::ProcessEvent {
                                event: Some(event),
                                ..Default::default()
                            })
                        }),
                };
                std::future::ready(translated)
            }),
    )
}

fn translate_event(event: EnvdEvent, tag: &str) -> Option<HostEvent> {
    Some(match event {
        EnvdEvent::Start(start) => HostEvent::Start(Box::new(host::process_event::Start {
            pid: start.pid,
            tag: tag.to_owned(),
            ..Default::default()
        })),
        EnvdEvent::Data(data) => match data.output? {
            Output::Stdout(bytes) => HostEvent::Stdout(bytes),
            Output::Stderr(bytes) => HostEvent::Stderr(bytes),
            Output::Pty(bytes) => HostEvent::Pty(bytes),
        },
        EnvdEvent::End(end) => HostEvent::Exit(Box::new(host::process_event::Exit {
            exit_code: end.exit_code,
            status: end.status,
            error: end.error,
            ..Default::default()
        })),
        EnvdEvent::Keepalive(_) => HostEvent::Keepalive(Box::default()),
    })
}
