//! Processes in the guest.

use std::time::Duration;

use connectrpc::ConnectError;
use connectrpc::client::CallOptions;
use futures::{Stream, StreamExt as _};
use wrenn_proto::{hostagent as host, process as envd};

use super::{GuestClient, MAX_EVENT, begins, rpc_error, user_header};
use crate::error::{HostError, Result};

use envd::__buffa::oneof::process_event::Event as EnvdEvent;
use envd::__buffa::oneof::process_event::data_event::Output;
use host::__buffa::oneof::process_event::Event as HostEvent;

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
        let options = user_header(spec.user.as_deref()).with_max_message_size(MAX_EVENT);
        let options = match limit {
            Some(limit) => options.with_timeout(limit),
            None => options,
        };
        let tag = spec.tag.clone();
        let request = envd::StartRequest {
            tag: tag.clone(),
            process: process_config(spec).into(),
            pty: pty
                .map(|size| envd::PTY {
                    size: pty_size(&size).into(),
                    ..Default::default()
                })
                .into(),
            stdin: Some(stdin),
            ..Default::default()
        };
        let stream = begins(self.inner.process.start_with_options(request, options)).await?;
        let events = futures::stream::unfold(stream, |mut stream| async move {
            let message = stream.message::<envd::StartResponse>().await.transpose()?;
            Some((
                message.map(|message| message.to_owned_message().event.into_option()),
                stream,
            ))
        });
        Ok(translate(events, tag.unwrap_or_default()))
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

/// What of a process goes to the agent as it is.
pub(super) fn process_config(spec: host::ProcessSpec) -> envd::ProcessConfig {
    envd::ProcessConfig {
        cmd: spec.cmd,
        args: spec.args,
        envs: spec.envs,
        cwd: spec.cwd,
        ..Default::default()
    }
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

pub(super) fn translate_event(event: EnvdEvent, tag: &str) -> Option<HostEvent> {
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
