//! The RPC over the model.
//!
//! Programs of the simulated guest: `echo ARGS`, `bytes HEX`, `exit N`, `cat` (until end of input or
//! kill), `sleep` (until killed), `flood N` (N chunks of 64 KiB, made as they are asked for), `drip HEX`
//! (its bytes one by one to whoever follows it by pid or tag, until killed).
//!
//! Its users are `user`, whose home is `/home/user` and who is the default, and `root`.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use connectrpc::{
    ConnectError, InboundStream, RequestContext, Response, ServiceRequest, ServiceResult, ServiceStream,
};
use futures::StreamExt;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use wrenn_proto::hostagent::__buffa::oneof::process_event::Event;
use wrenn_proto::hostagent::__buffa::oneof::process_selector::Selector;
use wrenn_proto::hostagent::__buffa::oneof::write_file_stream_request::Part;
use wrenn_proto::hostagent::*;
use wrenn_proto::id::SandboxId;

use super::model::{SimProcess, SimSandbox, SimState, ToProcess};
use super::{Call, Shared};

pub(crate) struct Agent {
    pub(crate) shared: Arc<Shared>,
}

const CHUNK: usize = 64 * 1024;

fn id(text: &str) -> Result<SandboxId, ConnectError> {
    text.parse()
        .map_err(|_| ConnectError::not_found("no such sandbox"))
}

impl Agent {
    fn sandbox<T>(
        &self,
        name: &str,
        act: impl FnOnce(SandboxId, &mut SimSandbox) -> Result<T, ConnectError>,
    ) -> Result<T, ConnectError> {
        let id = id(name)?;
        let mut model = self.shared.model();
        let sandbox = model
            .sandboxes
            .get_mut(&id)
            .ok_or_else(|| ConnectError::not_found("no such sandbox"))?;
        act(id, sandbox)
    }

    fn running<T>(
        &self,
        name: &str,
        act: impl FnOnce(&mut SimSandbox) -> Result<T, ConnectError>,
    ) -> Result<T, ConnectError> {
        self.sandbox(name, |_, sandbox| {
            if sandbox.state != SimState::Running {
                return Err(ConnectError::failed_precondition(format!(
                    "the sandbox is {:?}",
                    sandbox.state
                )));
            }
            act(sandbox)
        })
    }

    fn decide(
        &self,
        name: &str,
        generation: u64,
        from: SimState,
        to: SimState,
    ) -> ServiceResult<SandboxResponse> {
        self.sandbox(name, |id, sandbox| {
            if generation < sandbox.generation {
                return Err(ConnectError::failed_precondition("a newer decision is known"));
            }
            if sandbox.state != from && sandbox.state != to {
                return Err(ConnectError::failed_precondition(format!(
                    "the sandbox is {:?}",
                    sandbox.state
                )));
            }
            sandbox.generation = generation;
            sandbox.state = to;
            Response::ok(response(id, sandbox))
        })
    }

    fn ears(
        &self,
        sandbox: &str,
        selector: Option<&Selector>,
    ) -> Result<(u32, mpsc::UnboundedSender<ToProcess>), ConnectError> {
        let model = self.shared.model();
        model
            .processes
            .iter()
            .find(|(pid, process)| {
                process.sandbox == sandbox
                    && match selector {
                        Some(Selector::Pid(wanted)) => *pid == wanted,
                        Some(Selector::Tag(tag)) => process.tag == *tag,
                        None => false,
                    }
            })
            .map(|(pid, process)| (*pid, process.ears.clone()))
            .ok_or_else(|| ConnectError::not_found("no such process"))
    }

    fn spawn(
        &self,
        sandbox: &str,
        spec: &ProcessSpec,
        pty: bool,
    ) -> (u32, mpsc::Receiver<Result<ProcessEvent, ConnectError>>) {
        let (ears, mut hears) = mpsc::unbounded_channel();
        let (say, said) = mpsc::channel(1);
        let pid = {
            let mut model = self.shared.model();
            model.next_pid += 1;
            let pid = 100 + model.next_pid;
            let process = SimProcess {
                sandbox: sandbox.to_owned(),
                tag: spec.tag.clone().unwrap_or_else(|| format!("proc-{pid}")),
                cmd: spec.cmd.clone(),
                args: spec.args.clone(),
                ears,
            };
            model.processes.insert(pid, process);
            pid
        };
        let shared = Arc::clone(&self.shared);
        let (cmd, args, tag) = (
            spec.cmd.clone(),
            spec.args.clone(),
            spec.tag.clone().unwrap_or_default(),
        );
        tokio::spawn(async move {
            let start = process_event::Start {
                pid,
                tag,
                ..Default::default()
            };
            let _ = say.send(Ok(event(Event::from(start)))).await;
            let out = |data: Vec<u8>| {
                event(if pty {
                    Event::Pty(data)
                } else {
                    Event::Stdout(data)
                })
            };
            let mut exit_code = 0;
            match cmd.as_str() {
                "cat" | "sleep" | "drip" => loop {
                    match hears.recv().await {
                        Some(ToProcess::Input(data)) if cmd == "cat" => {
                            let _ = say.send(Ok(out(data))).await;
                        }
                        Some(ToProcess::Input(_)) => {}
                        Some(ToProcess::Resize(cols, rows)) => {
                            let _ = say.send(Ok(out(format!("[{cols}x{rows}]").into_bytes()))).await;
                        }
                        Some(ToProcess::Eof) => break,
                        Some(ToProcess::Kill) | None => {
                            exit_code = -1;
                            break;
                        }
                    }
                },
                "flood" => {
                    let chunks = args.first().and_then(|count| count.parse().ok()).unwrap_or(1u64);
                    let produced = Arc::clone(&shared.model().produced);
                    for _ in 0..chunks {
                        // A follower that has gone does not stop a program.
                        if say.send(Ok(out(vec![b'x'; CHUNK]))).await.is_err() {
                            break;
                        }
                        produced.fetch_add(1, Ordering::SeqCst);
                    }
                }
                _ => {
                    let (stdout, stderr, code) = run(&cmd, &args);
                    if !stdout.is_empty() {
                        let _ = say.send(Ok(out(stdout))).await;
                    }
                    if !stderr.is_empty() {
                        let _ = say.send(Ok(event(Event::Stderr(stderr)))).await;
                    }
                    exit_code = code;
                }
            }
            shared.model().processes.remove(&pid);
            let exit = process_event::Exit {
                exit_code,
                status: "exited".to_owned(),
                ..Default::default()
            };
            let _ = say.send(Ok(event(Event::from(exit)))).await;
        });
        (pid, said)
    }
}

fn run(cmd: &str, args: &[String]) -> (Vec<u8>, Vec<u8>, i32) {
    match cmd {
        "echo" => (format!("{}\n", args.join(" ")).into_bytes(), Vec::new(), 0),
        "bytes" => (bytes(args), Vec::new(), 0),
        "exit" => (
            Vec::new(),
            b"bye\n".to_vec(),
            args.first().and_then(|code| code.parse().ok()).unwrap_or(0),
        ),
        other => (Vec::new(), format!("{other}: not found\n").into_bytes(), 127),
    }
}

fn bytes(args: &[String]) -> Vec<u8> {
    let hex = args.first().map(String::as_bytes).unwrap_or_default();
    hex.chunks(2)
        .filter_map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok())
        .collect()
}

/// A path as this user means it, and the user.
fn place(path: &str, user: Option<&str>) -> Result<(String, String), ConnectError> {
    let (user, home) = match user {
        None | Some("user") => ("user", "/home/user"),
        Some("root") => ("root", "/root"),
        Some(other) => {
            return Err(ConnectError::invalid_argument(format!(
                "user: invalid username: '{other}'"
            )));
        }
    };
    let path = if path.starts_with('/') {
        path.to_owned()
    } else {
        format!("{home}/{path}")
    };
    Ok((path, user.to_owned()))
}

fn event(event: Event) -> ProcessEvent {
    ProcessEvent {
        event: Some(event),
        ..Default::default()
    }
}

fn response(id: SandboxId, sandbox: &SimSandbox) -> SandboxResponse {
    SandboxResponse {
        sandbox: sandbox.wire(id).into(),
        ..Default::default()
    }
}

fn entry(path: &str, owner: Option<&String>, size: Option<usize>) -> FileEntry {
    FileEntry {
        name: path.rsplit('/').next().unwrap_or_default().to_owned(),
        path: path.to_owned(),
        r#type: if size.is_some() {
            EntryType::ENTRY_TYPE_FILE
        } else {
            EntryType::ENTRY_TYPE_DIRECTORY
        }
        .into(),
        size: i64::try_from(size.unwrap_or(4096)).unwrap_or(i64::MAX),
        mode: 0o644,
        permissions: "-rw-r--r--".to_owned(),
        owner: owner.map_or("user", String::as_str).to_owned(),
        group: owner.map_or("user", String::as_str).to_owned(),
        modified_at: 1,
        ..Default::default()
    }
}

#[expect(
    refining_impl_trait_internal,
    reason = "the concrete types are nobody else's business"
)]
impl HostAgent for Agent {
    async fn create_sandbox(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, CreateSandboxRequest>,
    ) -> ServiceResult<SandboxResponse> {
        let request = request.to_owned_message();
        self.shared.pass(Call::Create, &ctx).await?;
        let id = id(&request.sandbox_id)?;
        let mut model = self.shared.model();
        // As a real agent: asked again, it says what came of it, unless that is no longer how a create ends.
        match model.sandboxes.get(&id) {
            Some(sandbox) if sandbox.state == SimState::Running => {
                return Response::ok(response(id, sandbox));
            }
            Some(_) => return Err(ConnectError::already_exists("the sandbox exists")),
            None => {}
        }
        let mut sandbox = SimSandbox::stray(0);
        sandbox.generation = request.generation;
        sandbox.request = request;
        let answer = response(id, &sandbox);
        model.sandboxes.insert(id, sandbox);
        Response::ok(answer)
    }

    async fn destroy_sandbox(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, DestroySandboxRequest>,
    ) -> ServiceResult<DestroySandboxResponse> {
        let request = request.to_owned_message();
        self.shared.pass(Call::Destroy, &ctx).await?;
        let id = id(&request.sandbox_id)?;
        match self.shared.model().sandboxes.remove(&id) {
            Some(_) => Response::ok(DestroySandboxResponse::default()),
            None => Err(ConnectError::not_found("no such sandbox")),
        }
    }

    async fn pause_sandbox(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, PauseSandboxRequest>,
    ) -> ServiceResult<SandboxResponse> {
        let request = request.to_owned_message();
        self.shared.pass(Call::Pause, &ctx).await?;
        self.decide(
            &request.sandbox_id,
            request.generation,
            SimState::Running,
            SimState::Paused,
        )
    }

    async fn resume_sandbox(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, ResumeSandboxRequest>,
    ) -> ServiceResult<SandboxResponse> {
        let request = request.to_owned_message();
        self.shared.pass(Call::Resume, &ctx).await?;
        self.decide(
            &request.sandbox_id,
            request.generation,
            SimState::Paused,
            SimState::Running,
        )
    }

    async fn get_sandbox(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, GetSandboxRequest>,
    ) -> ServiceResult<SandboxResponse> {
        let name = request.sandbox_id.to_owned();
        self.shared.pass(Call::Get, &ctx).await?;
        self.sandbox(&name, |id, sandbox| Response::ok(response(id, sandbox)))
    }

    async fn list_sandboxes(
        &self,
        ctx: RequestContext,
        _: ServiceRequest<'_, ListSandboxesRequest>,
    ) -> ServiceResult<ListSandboxesResponse> {
        self.shared.pass(Call::List, &ctx).await?;
        let sandboxes = self
            .shared
            .model()
            .sandboxes
            .iter()
            .map(|(id, sandbox)| sandbox.wire(*id))
            .collect();
        Response::ok(ListSandboxesResponse {
            sandboxes,
            ..Default::default()
        })
    }

    async fn ping_sandbox(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, PingSandboxRequest>,
    ) -> ServiceResult<SandboxResponse> {
        let name = request.sandbox_id.to_owned();
        self.shared.pass(Call::Ping, &ctx).await?;
        self.sandbox(&name, |id, sandbox| Response::ok(response(id, sandbox)))
    }

    async fn exec(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, ExecRequest>,
    ) -> ServiceResult<ExecResponse> {
        let request = request.to_owned_message();
        self.shared.pass(Call::Exec, &ctx).await?;
        self.running(&request.sandbox_id, |_| Ok(()))?;
        let spec = request.process.into_option().unwrap_or_default();
        if request.background {
            let (pid, mut said) = self.spawn(&request.sandbox_id, &spec, false);
            tokio::spawn(async move { while said.recv().await.is_some() {} });
            return Response::ok(ExecResponse {
                pid,
                tag: spec.tag.unwrap_or_default(),
                ..Default::default()
            });
        }
        let (stdout, stderr, exit_code) = run(&spec.cmd, &spec.args);
        Response::ok(ExecResponse {
            pid: 1,
            stdout,
            stderr,
            exit_code,
            duration_ms: 5,
            ..Default::default()
        })
    }

    async fn start_process(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, StartProcessRequest>,
    ) -> ServiceResult<ServiceStream<ProcessEvent>> {
        let request = request.to_owned_message();
        self.shared.pass(Call::Start, &ctx).await?;
        self.running(&request.sandbox_id, |_| Ok(()))?;
        let spec = request.process.into_option().unwrap_or_default();
        let (_, said) = self.spawn(&request.sandbox_id, &spec, request.pty.as_option().is_some());
        Ok(Response::stream(ReceiverStream::new(said)))
    }

    async fn connect_process(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, ConnectProcessRequest>,
    ) -> ServiceResult<ServiceStream<ProcessEvent>> {
        let request = request.to_owned_message();
        self.shared.pass(Call::Other, &ctx).await?;
        let selector = request.process.into_option().and_then(|process| process.selector);
        let (pid, ears) = self.ears(&request.sandbox_id, selector.as_ref())?;
        let (tag, drops) = self
            .shared
            .model()
            .processes
            .get(&pid)
            .map(|process| {
                let drops = (process.cmd == "drip").then(|| bytes(&process.args));
                (process.tag.clone(), drops.unwrap_or_default())
            })
            .unwrap_or_default();
        let start = process_event::Start {
            pid,
            tag,
            ..Default::default()
        };
        let shared = Arc::clone(&self.shared);
        let end = async move {
            ears.closed().await;
            drop(shared);
            let exit = process_event::Exit {
                exit_code: -1,
                ..Default::default()
            };
            Ok(event(Event::from(exit)))
        };
        let mut now: Vec<Result<ProcessEvent, ConnectError>> = vec![Ok(event(Event::from(start)))];
        now.extend(drops.into_iter().map(|byte| Ok(event(Event::Stdout(vec![byte])))));
        Ok(Response::stream(
            futures::stream::iter(now).chain(futures::stream::once(end)),
        ))
    }

    async fn list_processes(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, ListProcessesRequest>,
    ) -> ServiceResult<ListProcessesResponse> {
        let name = request.sandbox_id.to_owned();
        self.shared.pass(Call::Other, &ctx).await?;
        let model = self.shared.model();
        let processes = model
            .processes
            .iter()
            .filter(|(_, process)| process.sandbox == name)
            .map(|(pid, process)| {
                let (tag, cmd, args) = (process.tag.clone(), process.cmd.clone(), process.args.clone());
                ProcessInfo {
                    pid: *pid,
                    tag,
                    cmd,
                    args,
                    ..Default::default()
                }
            });
        Response::ok(ListProcessesResponse {
            processes: processes.collect(),
            ..Default::default()
        })
    }

    async fn signal_process(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, SignalProcessRequest>,
    ) -> ServiceResult<SignalProcessResponse> {
        let request = request.to_owned_message();
        self.shared.pass(Call::Other, &ctx).await?;
        let selector = request.process.into_option().and_then(|process| process.selector);
        let (_, ears) = self.ears(&request.sandbox_id, selector.as_ref())?;
        let _ = ears.send(ToProcess::Kill);
        Response::ok(SignalProcessResponse::default())
    }

    async fn send_input(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, SendInputRequest>,
    ) -> ServiceResult<SendInputResponse> {
        let request = request.to_owned_message();
        self.shared.pass(Call::Other, &ctx).await?;
        let selector = request.process.into_option().and_then(|process| process.selector);
        let (_, ears) = self.ears(&request.sandbox_id, selector.as_ref())?;
        if !request.data.is_empty() {
            let _ = ears.send(ToProcess::Input(request.data));
        }
        if request.close {
            let _ = ears.send(ToProcess::Eof);
        }
        Response::ok(SendInputResponse::default())
    }

    async fn resize_pty(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, ResizePtyRequest>,
    ) -> ServiceResult<ResizePtyResponse> {
        let request = request.to_owned_message();
        self.shared.pass(Call::Other, &ctx).await?;
        let selector = request.process.into_option().and_then(|process| process.selector);
        let (_, ears) = self.ears(&request.sandbox_id, selector.as_ref())?;
        let size = request.size.into_option().unwrap_or_default();
        let _ = ears.send(ToProcess::Resize(size.cols, size.rows));
        Response::ok(ResizePtyResponse::default())
    }

    async fn write_file(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, WriteFileRequest>,
    ) -> ServiceResult<WriteFileResponse> {
        let request = request.to_owned_message();
        self.shared.pass(Call::Write, &ctx).await?;
        let (path, user) = place(&request.path, request.user.as_deref())?;
        let size = request.content.len() as u64;
        self.running(&request.sandbox_id, |sandbox| {
            sandbox.files.insert(path.clone(), request.content);
            sandbox.owners.insert(path.clone(), user);
            Ok(())
        })?;
        Response::ok(WriteFileResponse {
            path,
            size,
            ..Default::default()
        })
    }

    async fn read_file(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, ReadFileRequest>,
    ) -> ServiceResult<ReadFileResponse> {
        let request = request.to_owned_message();
        self.shared.pass(Call::Read, &ctx).await?;
        let (path, _) = place(&request.path, request.user.as_deref())?;
        let content = self.running(&request.sandbox_id, |sandbox| {
            sandbox
                .files
                .get(&path)
                .cloned()
                .ok_or_else(|| ConnectError::not_found("no such file"))
        })?;
        Response::ok(ReadFileResponse {
            content,
            ..Default::default()
        })
    }

    async fn write_file_stream(
        &self,
        ctx: RequestContext,
        mut requests: InboundStream<WriteFileStreamRequest>,
    ) -> ServiceResult<WriteFileResponse> {
        self.shared.pass(Call::Write, &ctx).await?;
        let first = requests
            .next()
            .await
            .transpose()?
            .and_then(|message| message.to_owned_message().part);
        let Some(Part::Target(target)) = first else {
            return Err(ConnectError::invalid_argument(
                "the first message must name the file",
            ));
        };
        let (path, user) = place(&target.path, target.user.as_deref())?;
        self.running(&target.sandbox_id, |sandbox| {
            let parent = path.rsplit_once('/').map_or("", |(parent, _)| parent);
            if parent.is_empty() || sandbox.dirs.contains(parent) {
                Ok(())
            } else {
                Err(ConnectError::not_found(format!("{parent}: no such directory")))
            }
        })?;
        let mut content = Vec::new();
        while let Some(message) = requests.next().await {
            if let Some(Part::Data(data)) = message?.to_owned_message().part {
                content.extend_from_slice(&data);
            }
        }
        let size = content.len() as u64;
        self.running(&target.sandbox_id, |sandbox| {
            sandbox.files.insert(path.clone(), content);
            sandbox.owners.insert(path.clone(), user);
            Ok(())
        })?;
        Response::ok(WriteFileResponse {
            path,
            size,
            ..Default::default()
        })
    }

    async fn read_file_stream(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, ReadFileRequest>,
    ) -> ServiceResult<ServiceStream<ReadFileChunk>> {
        let request = request.to_owned_message();
        self.shared.pass(Call::Read, &ctx).await?;
        let chunk = |data: Vec<u8>| ReadFileChunk {
            data,
            ..Default::default()
        };
        if request.path == "/dev/zero" {
            let produced = Arc::clone(&self.shared.model().produced);
            let chunks = futures::stream::repeat_with(move || {
                produced.fetch_add(1, Ordering::SeqCst);
                Ok(ReadFileChunk {
                    data: vec![0; CHUNK],
                    ..Default::default()
                })
            });
            return Ok(Response::stream(chunks));
        }
        let (path, _) = place(&request.path, request.user.as_deref())?;
        let content = self.running(&request.sandbox_id, |sandbox| {
            sandbox
                .files
                .get(&path)
                .cloned()
                .ok_or_else(|| ConnectError::not_found("no such file"))
        })?;
        let chunks: Vec<_> = content
            .chunks(CHUNK)
            .map(|data| Ok(chunk(data.to_vec())))
            .collect();
        Ok(Response::stream(futures::stream::iter(chunks)))
    }

    async fn stat_path(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, StatPathRequest>,
    ) -> ServiceResult<StatPathResponse> {
        let request = request.to_owned_message();
        self.shared.pass(Call::Other, &ctx).await?;
        let (path, _) = place(&request.path, request.user.as_deref())?;
        let found = self.running(&request.sandbox_id, |sandbox| {
            let content = sandbox
                .files
                .get(&path)
                .ok_or_else(|| ConnectError::not_found("no such file"))?;
            Ok(entry(&path, sandbox.owners.get(&path), Some(content.len())))
        })?;
        Response::ok(StatPathResponse {
            entry: found.into(),
            ..Default::default()
        })
    }

    async fn list_dir(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, ListDirRequest>,
    ) -> ServiceResult<ListDirResponse> {
        let request = request.to_owned_message();
        self.shared.pass(Call::Other, &ctx).await?;
        let (path, _) = place(&request.path, request.user.as_deref())?;
        let entries = self.running(&request.sandbox_id, |sandbox| {
            if !sandbox.dirs.contains(&path) {
                return Err(ConnectError::not_found(format!("{path}: no such directory")));
            }
            let inside = format!("{}/", path.trim_end_matches('/'));
            let files = sandbox.files.iter().filter(|(path, _)| path.starts_with(&inside));
            Ok(files
                .map(|(path, content)| entry(path, sandbox.owners.get(path), Some(content.len())))
                .collect())
        })?;
        Response::ok(ListDirResponse {
            entries,
            ..Default::default()
        })
    }

    async fn make_dir(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, MakeDirRequest>,
    ) -> ServiceResult<MakeDirResponse> {
        let request = request.to_owned_message();
        self.shared.pass(Call::Other, &ctx).await?;
        let (path, user) = place(&request.path, request.user.as_deref())?;
        self.running(&request.sandbox_id, |sandbox| {
            if sandbox.dirs.insert(path.clone()) {
                sandbox.owners.insert(path.clone(), user.clone());
                Ok(())
            } else {
                Err(ConnectError::already_exists(format!("{path} exists")))
            }
        })?;
        Response::ok(MakeDirResponse {
            entry: entry(&path, Some(&user), None).into(),
            ..Default::default()
        })
    }

    async fn remove_path(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, RemovePathRequest>,
    ) -> ServiceResult<RemovePathResponse> {
        let request = request.to_owned_message();
        self.shared.pass(Call::Other, &ctx).await?;
        let (path, _) = place(&request.path, request.user.as_deref())?;
        self.running(&request.sandbox_id, |sandbox| {
            let inside = format!("{path}/");
            sandbox
                .files
                .retain(|file, _| *file != path && !file.starts_with(&inside));
            sandbox.dirs.remove(&path);
            Ok(())
        })?;
        Response::ok(RemovePathResponse::default())
    }

    async fn create_snapshot(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, CreateSnapshotRequest>,
    ) -> ServiceResult<CreateSnapshotResponse> {
        let request = request.to_owned_message();
        self.shared.pass(Call::CreateSnapshot, &ctx).await?;
        let sizes = self.sandbox(&request.sandbox_id, |_, sandbox| {
            sandbox.generation = request.generation;
            Ok((
                sandbox.request.vcpus,
                sandbox.request.memory_mb,
                sandbox.request.disk_size_mb,
            ))
        })?;
        self.shared.model().snapshots.insert(request.template_id);
        Response::ok(CreateSnapshotResponse {
            size_bytes: 4096,
            vcpus: sizes.0,
            memory_mb: sizes.1,
            disk_size_mb: sizes.2,
            ..Default::default()
        })
    }

    async fn delete_snapshot(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, DeleteSnapshotRequest>,
    ) -> ServiceResult<DeleteSnapshotResponse> {
        let request = request.to_owned_message();
        self.shared.pass(Call::DeleteSnapshot, &ctx).await?;
        let mut model = self.shared.model();
        if model.used_snapshots.contains(&request.template_id) {
            return Err(ConnectError::failed_precondition("sandboxes use the template"));
        }
        model.snapshots.remove(&request.template_id);
        Response::ok(DeleteSnapshotResponse::default())
    }

    async fn get_metrics(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, GetMetricsRequest>,
    ) -> ServiceResult<GetMetricsResponse> {
        let (name, since) = (request.sandbox_id.to_owned(), request.since_ms);
        self.shared.pass(Call::Metrics, &ctx).await?;
        let points = self.sandbox(&name, |_, sandbox| {
            let samples = sandbox.samples.iter();
            Ok(samples
                .filter(|point| point.timestamp_ms >= since)
                .cloned()
                .collect())
        })?;
        Response::ok(GetMetricsResponse {
            points,
            ..Default::default()
        })
    }

    async fn list_metrics(
        &self,
        ctx: RequestContext,
        _: ServiceRequest<'_, ListMetricsRequest>,
    ) -> ServiceResult<ListMetricsResponse> {
        self.shared.pass(Call::ListMetrics, &ctx).await?;
        let model = self.shared.model();
        let running = model
            .sandboxes
            .iter()
            .filter(|(_, sandbox)| sandbox.state == SimState::Running);
        let sandboxes = running
            .filter_map(|(id, sandbox)| {
                Some(SandboxMetrics {
                    sandbox_id: id.to_string(),
                    newest: sandbox.samples.last()?.clone().into(),
                    ..Default::default()
                })
            })
            .collect();
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let now = now.map_or(0, |since| since.as_millis());
        Response::ok(ListMetricsResponse {
            now_ms: i64::try_from(now).unwrap_or(i64::MAX),
            sandboxes,
            ..Default::default()
        })
    }

    async fn get_host_status(
        &self,
        ctx: RequestContext,
        _: ServiceRequest<'_, GetHostStatusRequest>,
    ) -> ServiceResult<GetHostStatusResponse> {
        self.shared.pass(Call::Other, &ctx).await?;
        Response::ok(GetHostStatusResponse {
            version: "sim".to_owned(),
            ..Default::default()
        })
    }
}
