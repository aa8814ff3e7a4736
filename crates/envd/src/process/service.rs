//! The `process.Process` service.

use std::io;
use std::path::Path;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use connectrpc::{
    ConnectError, Encodable, InboundStream, RequestContext, Response, ServiceRequest, ServiceResult,
    ServiceStream,
};
use futures::StreamExt;
use http::HeaderMap;
use http::header::AUTHORIZATION;
use rustix::io::Errno;
use rustix::process::Signal;
use std::time::Duration;
use tokio::time::Instant;
use wrenn_proto::process::__buffa::oneof::process_input::Input as InputData;
use wrenn_proto::process::__buffa::oneof::process_selector::Selector as WireSelector;
use wrenn_proto::process::__buffa::oneof::stream_input_request::Event as InputEvent;
use wrenn_proto::process::{
    self as wire, CloseStdinRequest, CloseStdinResponse, ConnectRequest, ConnectResponse, ListRequest,
    ListResponse, PTY, ProcessConfig, ProcessInput, ProcessSelector, SendInputRequest, SendInputResponse,
    SendSignalRequest, SendSignalResponse, StartRequest, StartResponse, StreamInputRequest,
    StreamInputResponse, UpdateRequest, UpdateResponse,
};

use super::spawn::{self, AsyncPipe, Input, Plan, TerminalSize, check_environment};
use super::stream::event_stream;
use super::table::{Process, Selector};
use crate::files::paths;
use crate::state::Agent;
use crate::users::User;

/// A kill is answered when the process is gone, so that the caller finds it gone; a process that the kernel
/// cannot end (stuck in a disk wait) is not waited for longer than this.
const KILL_WAIT: Duration = Duration::from_secs(2);

pub(crate) struct ProcessService {
    agent: Arc<Agent>,
}

impl ProcessService {
    pub(crate) fn new(agent: Arc<Agent>) -> Self {
        Self { agent }
    }

    fn find(&self, selector: Option<ProcessSelector>) -> Result<Arc<Process>, ConnectError> {
        let selector = parse_selector(selector)?;
        self.agent
            .processes
            .find(&selector)
            .ok_or_else(|| no_such_process(&selector))
    }

    fn plan(&self, ctx: &RequestContext, request: StartRequest) -> Result<Plan, ConnectError> {
        let wanted = Wanted {
            user: request_user(&self.agent, ctx.headers())?,
            config: request
                .process
                .into_option()
                .ok_or_else(|| ConnectError::invalid_argument("process is missing"))?,
            tag: request.tag,
            stdin: request.stdin.unwrap_or(true),
            terminal: request.pty.into_option().map(parse_size).transpose()?,
            deadline: deadline(ctx),
        };
        wanted.plan(&self.agent)
    }
}

/// A process as a request wants it.
pub(super) struct Wanted {
    pub(super) user: User,
    pub(super) config: ProcessConfig,
    pub(super) tag: Option<String>,
    pub(super) stdin: bool,
    pub(super) terminal: Option<TerminalSize>,
    pub(super) deadline: Option<Instant>,
}

impl Wanted {
    /// Completes it with what the sandbox sets.
    ///
    /// # Errors
    /// Something about it makes no sense; the text says what.
    pub(super) fn plan(self, agent: &Agent) -> Result<Plan, ConnectError> {
        let Self {
            user,
            config,
            tag,
            stdin,
            terminal,
            deadline,
        } = self;
        if config.cmd.is_empty() {
            return Err(ConnectError::invalid_argument("process.cmd is empty"));
        }
        check_environment(config.envs.iter()).map_err(ConnectError::invalid_argument)?;
        let settings = agent.settings();
        let cwd = paths::resolve(
            config.cwd.as_deref().unwrap_or_default(),
            &user,
            settings.default_workdir.as_deref(),
        )
        .map_err(ConnectError::invalid_argument)?;
        Ok(Plan {
            config,
            tag,
            user,
            cwd,
            settings,
            stdin,
            terminal,
            deadline,
        })
    }
}

/// Why a program could not be started there. Looked into afterwards, since nearly all are started.
pub(super) fn start_error(cmd: &str, cwd: &Path, error: &io::Error) -> ConnectError {
    match std::fs::metadata(cwd) {
        Ok(found) if found.is_dir() => {}
        Ok(_) => {
            let message = format!("cwd '{}' is not a directory", cwd.display());
            return ConnectError::invalid_argument(message);
        }
        Err(_) => {
            let message = format!("cwd '{}' does not exist", cwd.display());
            return ConnectError::invalid_argument(message);
        }
    }
    let message = format!("error starting process '{cmd}': {error}");
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied | io::ErrorKind::InvalidInput => {
            ConnectError::invalid_argument(message)
        }
        // No processes, memory or descriptors left.
        _ => ConnectError::resource_exhausted(message),
    }
}

/// The account of this name, or the default one.
pub(super) fn user_named(agent: &Agent, name: Option<&str>) -> Result<User, ConnectError> {
    agent
        .resolve_user(name)
        .map_err(|name| ConnectError::unauthenticated(format!("invalid username: '{name}'")))
}

/// The deadline that the client set with its timeout header.
pub(crate) fn deadline(ctx: &RequestContext) -> Option<Instant> {
    ctx.deadline().map(Instant::from_std)
}

/// The account named in `Authorization: Basic base64("user:")`, or the default one.
pub(crate) fn request_user(agent: &Agent, headers: &HeaderMap) -> Result<User, ConnectError> {
    let name = match headers.get(AUTHORIZATION) {
        None => None,
        Some(value) => basic_user(value.as_bytes())
            .map_err(|()| ConnectError::unauthenticated("malformed basic authorization header"))?,
    };
    user_named(agent, name.as_deref())
}

/// Other schemes than Basic are somebody else's (a proxy's) and say nothing about the user.
fn basic_user(header: &[u8]) -> Result<Option<String>, ()> {
    let Some((scheme, credentials)) = std::str::from_utf8(header).map_err(|_| ())?.split_once(' ') else {
        return Ok(None);
    };
    if !scheme.eq_ignore_ascii_case("basic") {
        return Ok(None);
    }
    let decoded = STANDARD.decode(credentials.trim()).map_err(|_| ())?;
    let decoded = String::from_utf8(decoded).map_err(|_| ())?;
    let user = decoded.split_once(':').map_or(decoded.as_str(), |(user, _)| user);
    Ok((!user.is_empty()).then(|| user.to_owned()))
}

fn parse_selector(selector: Option<ProcessSelector>) -> Result<Selector, ConnectError> {
    match selector.and_then(|selector| selector.selector) {
        Some(WireSelector::Pid(pid)) => Ok(Selector::Pid(pid)),
        Some(WireSelector::Tag(tag)) => Ok(Selector::Tag(tag)),
        None => Err(ConnectError::invalid_argument(
            "the process selector names neither pid nor tag",
        )),
    }
}

fn no_such_process(selector: &Selector) -> ConnectError {
    ConnectError::not_found(match selector {
        Selector::Pid(pid) => format!("process with pid {pid} not found"),
        Selector::Tag(tag) => format!("process with tag {tag} not found"),
    })
}

fn parse_size(pty: PTY) -> Result<TerminalSize, ConnectError> {
    let size = pty
        .size
        .into_option()
        .ok_or_else(|| ConnectError::invalid_argument("pty.size is missing"))?;
    let cell = |name, value: u32| match u16::try_from(value) {
        Ok(value) if value > 0 => Ok(value),
        _ => Err(ConnectError::invalid_argument(format!(
            "pty.size.{name} must be 1 to 65535"
        ))),
    };
    Ok(TerminalSize {
        cols: cell("cols", size.cols)?,
        rows: cell("rows", size.rows)?,
    })
}

/// Writes all of it, waiting while the process does not read. Ends early when the process does.
async fn write_input(process: &Process, data: InputData) -> Result<(), ConnectError> {
    let mut ended = process.ended();
    let write = async {
        let input = process.input.lock().await;
        match (&*input, data) {
            (Input::Pipe(pipe), InputData::Stdin(bytes)) => write_all(pipe, &bytes).await,
            (Input::Terminal(pipe), InputData::Pty(bytes)) => write_all(pipe, &bytes).await,
            (Input::Closed, InputData::Stdin(_)) => {
                return Err(ConnectError::failed_precondition(
                    "stdin is not enabled or has been closed",
                ));
            }
            (Input::Terminal(_), InputData::Stdin(_)) => {
                return Err(ConnectError::failed_precondition(
                    "the process has a terminal: send pty input",
                ));
            }
            (_, InputData::Pty(_)) => {
                return Err(ConnectError::failed_precondition(
                    "the process has no terminal: send stdin input",
                ));
            }
        }
        .map_err(|error| {
            ConnectError::failed_precondition(format!("the process does not take input: {error}"))
        })
    };
    tokio::select! {
        biased;
        written = write => written,
        _ = ended.wait_for(|ended| *ended) => {
            Err(ConnectError::not_found(format!("process with pid {} has ended", process.id())))
        }
    }
}

async fn write_all(pipe: &AsyncPipe, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let mut guard = pipe.writable().await?;
        let written = guard.try_io(|pipe| match rustix::io::write(pipe.get_ref(), bytes) {
            Err(Errno::INTR) => Ok(0),
            result => Ok(result?),
        });
        if let Ok(written) = written {
            bytes = bytes.get(written?..).unwrap_or_default();
        }
    }
    Ok(())
}

fn parse_input(input: Option<ProcessInput>) -> Result<InputData, ConnectError> {
    input
        .and_then(|input| input.input)
        .ok_or_else(|| ConnectError::invalid_argument("input is missing"))
}

impl wire::Process for ProcessService {
    async fn list<'a>(
        &'a self,
        _ctx: RequestContext,
        _request: ServiceRequest<'_, ListRequest>,
    ) -> ServiceResult<impl Encodable<ListResponse> + Send + use<'a>> {
        Response::ok(ListResponse {
            processes: self.agent.processes.list(),
            ..Default::default()
        })
    }

    async fn connect(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, ConnectRequest>,
    ) -> ServiceResult<ServiceStream<impl Encodable<ConnectResponse> + Send + use<>>> {
        let selector = parse_selector(request.to_owned_message().process.into_option())?;
        let events = self
            .agent
            .processes
            .connect(&selector)
            .ok_or_else(|| no_such_process(&selector))?;
        let events = event_stream(events, ctx.headers(), deadline(&ctx), |event| ConnectResponse {
            event: event.into(),
            ..Default::default()
        });
        Response::ok(events)
    }

    async fn start(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, StartRequest>,
    ) -> ServiceResult<ServiceStream<impl Encodable<StartResponse> + Send + use<>>> {
        let plan = self.plan(&ctx, request.to_owned_message())?;
        let (cmd, cwd) = (plan.config.cmd.clone(), plan.cwd.clone());
        let events =
            spawn::start(&self.agent.processes, plan).map_err(|error| start_error(&cmd, &cwd, &error))?;
        let events = event_stream(events, ctx.headers(), deadline(&ctx), |event| StartResponse {
            event: event.into(),
            ..Default::default()
        });
        Response::ok(events)
    }

    async fn update<'a>(
        &'a self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, UpdateRequest>,
    ) -> ServiceResult<impl Encodable<UpdateResponse> + Send + use<'a>> {
        let request = request.to_owned_message();
        let process = self.find(request.process.into_option())?;
        if let Some(pty) = request.pty.into_option() {
            let size = parse_size(pty)?;
            match &process.terminal {
                Some(terminal) => size.set(terminal.get_ref()).map_err(|error| {
                    ConnectError::internal(format!("the terminal cannot be resized: {error}"))
                })?,
                None => return Err(ConnectError::failed_precondition("the process has no terminal")),
            }
        }
        Response::ok(UpdateResponse::default())
    }

    async fn stream_input<'a>(
        &'a self,
        _ctx: RequestContext,
        mut requests: InboundStream<StreamInputRequest>,
    ) -> ServiceResult<impl Encodable<StreamInputResponse> + Send + use<'a>> {
        let mut process = None;
        while let Some(message) = requests.next().await {
            match message?.to_owned_message().event {
                Some(InputEvent::Start(start)) if process.is_none() => {
                    process = Some(self.find(start.process.into_option())?);
                }
                Some(InputEvent::Start(_)) => {
                    return Err(ConnectError::invalid_argument(
                        "the stream has been started already",
                    ));
                }
                Some(InputEvent::Data(data)) => {
                    let Some(process) = &process else {
                        return Err(ConnectError::invalid_argument(
                            "the stream must begin with a start event",
                        ));
                    };
                    write_input(process, parse_input(data.input.into_option())?).await?;
                }
                Some(InputEvent::Keepalive(_)) | None => {}
            }
        }
        Response::ok(StreamInputResponse::default())
    }

    async fn send_input<'a>(
        &'a self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, SendInputRequest>,
    ) -> ServiceResult<impl Encodable<SendInputResponse> + Send + use<'a>> {
        let request = request.to_owned_message();
        let process = self.find(request.process.into_option())?;
        write_input(&process, parse_input(request.input.into_option())?).await?;
        Response::ok(SendInputResponse::default())
    }

    async fn send_signal<'a>(
        &'a self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, SendSignalRequest>,
    ) -> ServiceResult<impl Encodable<SendSignalResponse> + Send + use<'a>> {
        let request = request.to_owned_message();
        let process = self.find(request.process.into_option())?;
        let signal = match request.signal.as_known() {
            Some(wire::Signal::SIGNAL_SIGKILL) => Signal::KILL,
            Some(wire::Signal::SIGNAL_SIGTERM) => Signal::TERM,
            Some(wire::Signal::SIGNAL_UNSPECIFIED) | None => {
                return Err(ConnectError::invalid_argument(
                    "signal must be SIGNAL_SIGTERM or SIGNAL_SIGKILL",
                ));
            }
        };
        if !process.signal(signal) {
            return Err(no_such_process(&Selector::Pid(process.id())));
        }
        if signal == Signal::KILL {
            let mut ended = process.ended();
            let _ = tokio::time::timeout(KILL_WAIT, ended.wait_for(|ended| *ended)).await;
        }
        Response::ok(SendSignalResponse::default())
    }

    async fn close_stdin<'a>(
        &'a self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, CloseStdinRequest>,
    ) -> ServiceResult<impl Encodable<CloseStdinResponse> + Send + use<'a>> {
        let process = self.find(request.to_owned_message().process.into_option())?;
        if process.terminal.is_some() {
            let message = "a terminal's input cannot be closed: send Ctrl+D (0x04) instead";
            return Err(ConnectError::failed_precondition(message));
        }
        // Waits for input that is being written, so that none of it is lost.
        let mut ended = process.ended();
        tokio::select! {
            mut input = process.input.lock() => *input = Input::Closed,
            _ = ended.wait_for(|ended| *ended) => {}
        }
        Response::ok(CloseStdinResponse::default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_user_is_in_the_authorization_header() {
        let basic = |text: &str| basic_user(format!("Basic {}", STANDARD.encode(text)).as_bytes());
        assert_eq!(basic("root:"), Ok(Some("root".into())));
        assert_eq!(basic("root:password"), Ok(Some("root".into())));
        assert_eq!(basic("root"), Ok(Some("root".into())));
        assert_eq!(basic(":"), Ok(None));
        assert_eq!(basic_user(b"Bearer something"), Ok(None));
        assert_eq!(basic_user(b"Basic ***"), Err(()));
        assert_eq!(basic_user(b"\xff\xfe"), Err(()));
    }
}
