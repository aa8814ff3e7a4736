//! The RPC edge: turns the wire's messages into the manager's calls and back. Nothing is decided here.

use std::str::FromStr;
use std::time::Duration;

use connectrpc::{
    ConnectError, Encodable, InboundStream, RequestContext, Response, ServiceRequest, ServiceResult,
    ServiceStream,
};
use futures::{StreamExt as _, TryStreamExt as _};
use wrenn_proto::hostagent::__buffa::oneof::process_event::Event as WireEvent;
use wrenn_proto::hostagent::__buffa::oneof::write_file_stream_request::Part;
use wrenn_proto::hostagent::*;
use wrenn_proto::id::{InvalidId, SandboxId};
use wrenn_proto::rest::SandboxStatus;

use crate::error::HostError;
use crate::guest::{Chunks, Events, sync_stream};
use crate::manager::activity::{Activity, Followed};
use crate::manager::{CreateSpec, Manager, View, random};
use crate::template::BuildState;
use crate::vmm::Shape;

/// A plain read is for small files; larger ones have a stream.
const MAX_PLAIN_READ: usize = 16 << 20;

pub(crate) struct Service {
    pub(crate) manager: Manager,
}

fn id<T: FromStr<Err = InvalidId>>(text: &str, field: &'static str) -> Result<T, HostError> {
    text.parse()
        .map_err(|error: InvalidId| HostError::InvalidArgument {
            field,
            message: error.to_string(),
        })
}

fn seconds(limit: u32) -> Option<Duration> {
    (limit > 0).then(|| Duration::from_secs(u64::from(limit)))
}

fn sandbox(view: &View) -> Sandbox {
    let record = &view.record;
    let (error, console_tail) = match &record.phase {
        crate::manager::journal::Phase::Error { message, console } => {
            (crate::error::public(message), console.clone())
        }
        _ => Default::default(),
    };
    Sandbox {
        sandbox_id: record.id.to_string(),
        team_id: record.team.to_string(),
        state: state(view.state).into(),
        generation: record.generation,
        template_id: record.template.to_string(),
        vcpus: record.shape.vcpus,
        memory_mb: record.shape.memory_mb,
        disk_size_mb: record.disk_mb,
        timeout_sec: record.timeout_sec,
        created_at_ms: record.created_at_ms,
        last_active_at_ms: record.last_active_at_ms,
        error,
        console_tail,
        ..Default::default()
    }
}

fn state(status: SandboxStatus) -> SandboxState {
    match status {
        SandboxStatus::Pending | SandboxStatus::Starting => SandboxState::SANDBOX_STATE_STARTING,
        SandboxStatus::Running => SandboxState::SANDBOX_STATE_RUNNING,
        SandboxStatus::Pausing => SandboxState::SANDBOX_STATE_PAUSING,
        SandboxStatus::Paused | SandboxStatus::Hibernated => SandboxState::SANDBOX_STATE_PAUSED,
        SandboxStatus::Snapshotting => SandboxState::SANDBOX_STATE_SNAPSHOTTING,
        SandboxStatus::Resuming => SandboxState::SANDBOX_STATE_RESUMING,
        SandboxStatus::Stopping | SandboxStatus::Stopped => SandboxState::SANDBOX_STATE_STOPPING,
        SandboxStatus::Missing | SandboxStatus::Error => SandboxState::SANDBOX_STATE_ERROR,
    }
}

fn answer(view: &View) -> ServiceResult<SandboxResponse> {
    Response::ok(SandboxResponse {
        sandbox: sandbox(view).into(),
        ..Default::default()
    })
}

fn required<T>(field: Option<T>, name: &'static str) -> Result<T, HostError> {
    field.ok_or_else(|| HostError::InvalidArgument {
        field: name,
        message: "missing".to_owned(),
    })
}

fn default_tag(prefix: &str) -> Result<String, HostError> {
    Ok(format!("{prefix}-{}", hex::encode(random::<6>()?)))
}

impl HostAgent for Service {
    async fn create_sandbox<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, CreateSandboxRequest>,
    ) -> ServiceResult<impl Encodable<SandboxResponse> + Send + use<'a>> {
        let request = request.to_owned_message();
        let bad = |field, message: &str| HostError::InvalidArgument {
            field,
            message: message.to_owned(),
        };
        if request.vcpus == 0 || request.vcpus > 64 {
            return Err(bad("vcpus", "must be between 1 and 64").into());
        }
        if !(128..=1 << 20).contains(&request.memory_mb) {
            return Err(bad("memory_mb", "must be between 128 and 1048576").into());
        }
        if !(1..=4 << 20).contains(&request.disk_size_mb) {
            return Err(bad("disk_size_mb", "must be between 1 and 4194304").into());
        }
        let view = self
            .manager
            .create(CreateSpec {
                id: id(&request.sandbox_id, "sandbox_id")?,
                team: id(&request.team_id, "team_id")?,
                generation: request.generation,
                template_team: id(&request.template_team_id, "template_team_id")?,
                template: id(&request.template_id, "template_id")?,
                shape: Shape {
                    vcpus: request.vcpus,
                    memory_mb: request.memory_mb,
                },
                disk_mb: request.disk_size_mb,
                timeout_sec: request.timeout_sec,
                envs: request.envs.into_iter().collect(),
            })
            .await?;
        answer(&view)
    }

    async fn destroy_sandbox<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, DestroySandboxRequest>,
    ) -> ServiceResult<impl Encodable<DestroySandboxResponse> + Send + use<'a>> {
        self.manager
            .destroy(id(request.sandbox_id, "sandbox_id")?, request.generation)
            .await?;
        Response::ok(DestroySandboxResponse::default())
    }

    async fn pause_sandbox<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, PauseSandboxRequest>,
    ) -> ServiceResult<impl Encodable<SandboxResponse> + Send + use<'a>> {
        answer(
            &self
                .manager
                .pause(id(request.sandbox_id, "sandbox_id")?, request.generation)
                .await?,
        )
    }

    async fn resume_sandbox<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, ResumeSandboxRequest>,
    ) -> ServiceResult<impl Encodable<SandboxResponse> + Send + use<'a>> {
        let sandbox_id = id(request.sandbox_id, "sandbox_id")?;
        answer(
            &self
                .manager
                .resume(sandbox_id, request.generation, request.timeout_sec)
                .await?,
        )
    }

    async fn get_sandbox<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, GetSandboxRequest>,
    ) -> ServiceResult<impl Encodable<SandboxResponse> + Send + use<'a>> {
        let id = id(request.sandbox_id, "sandbox_id")?;
        let mut sandbox = sandbox(&self.manager.get(id)?);
        if sandbox.console_tail.is_empty() {
            sandbox.console_tail = self.manager.console(id);
        }
        Response::ok(SandboxResponse {
            sandbox: sandbox.into(),
            ..Default::default()
        })
    }

    async fn list_sandboxes<'a>(
        &'a self,
        _: RequestContext,
        _: ServiceRequest<'_, ListSandboxesRequest>,
    ) -> ServiceResult<impl Encodable<ListSandboxesResponse> + Send + use<'a>> {
        let sandboxes = self.manager.list().iter().map(sandbox).collect();
        Response::ok(ListSandboxesResponse {
            sandboxes,
            ..Default::default()
        })
    }

    async fn ping_sandbox<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, PingSandboxRequest>,
    ) -> ServiceResult<impl Encodable<SandboxResponse> + Send + use<'a>> {
        answer(&self.manager.ping(id(request.sandbox_id, "sandbox_id")?).await?)
    }

    async fn exec<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, ExecRequest>,
    ) -> ServiceResult<impl Encodable<ExecResponse> + Send + use<'a>> {
        let request = request.to_owned_message();
        let (guest, _under_way, _) = self.manager.guest(id(&request.sandbox_id, "sandbox_id")?)?;
        let mut spec = required(request.process.into_option(), "process")?;
        let tag = match spec.tag.take() {
            Some(tag) if !tag.is_empty() => tag,
            _ => default_tag("proc")?,
        };
        spec.tag = Some(tag.clone());
        let limit = seconds(request.timeout_sec);
        if request.background {
            let mut events = guest.start(spec, None, false, limit).await?;
            let pid = loop {
                match events.next().await {
                    Some(Ok(ProcessEvent {
                        event: Some(WireEvent::Start(start)),
                        ..
                    })) => break start.pid,
                    Some(Ok(_)) => {}
                    Some(Err(error)) => return Err(error.into()),
                    None => return Err(HostError::Guest("the process did not start".to_owned()).into()),
                }
            };
            if limit.is_some() {
                // The guest's time limit ends with the stream that carries it: keep that open, but not the agent's end up.
                let ending = self.manager.shared.ending.clone();
                self.manager.shared.tasks.spawn(async move {
                    let followed = async { while events.next().await.is_some_and(|event| event.is_ok()) {} };
                    ending.run_until_cancelled(followed).await;
                });
            }
            return Response::ok(ExecResponse {
                pid,
                tag,
                ..Default::default()
            });
        }
        let collected = guest.collect(spec, limit, request.max_output_bytes).await?;
        Response::ok(ExecResponse {
            pid: collected.pid,
            tag,
            stdout: collected.stdout,
            stderr: collected.stderr,
            exit_code: collected.exit_code,
            duration_ms: u64::try_from(collected.duration.as_millis()).unwrap_or(u64::MAX),
            stdout_truncated: collected.truncated.0,
            stderr_truncated: collected.truncated.1,
            ..Default::default()
        })
    }

    async fn start_process(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, StartProcessRequest>,
    ) -> ServiceResult<ServiceStream<impl Encodable<ProcessEvent> + Send + use<>>> {
        let request = request.to_owned_message();
        let (guest, _under_way, handle) = self.manager.guest(id(&request.sandbox_id, "sandbox_id")?)?;
        let mut spec = required(request.process.into_option(), "process")?;
        if spec.tag.as_deref().is_none_or(str::is_empty) {
            spec.tag = Some(default_tag(if request.pty.is_set() { "pty" } else { "proc" })?);
        }
        let limit = seconds(request.timeout_sec);
        let followed = handle.activity.follow();
        let events = guest
            .start(spec, request.pty.into_option(), request.stdin, limit)
            .await?;
        Response::ok(streamed(events, handle.activity, followed))
    }

    async fn connect_process(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, ConnectProcessRequest>,
    ) -> ServiceResult<ServiceStream<impl Encodable<ProcessEvent> + Send + use<>>> {
        let request = request.to_owned_message();
        let (guest, _under_way, handle) = self.manager.guest(id(&request.sandbox_id, "sandbox_id")?)?;
        let events = guest
            .follow(&required(request.process.into_option(), "process")?)
            .await?;
        let followed = handle.activity.follow();
        Response::ok(streamed(events, handle.activity, followed))
    }

    async fn list_processes<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, ListProcessesRequest>,
    ) -> ServiceResult<impl Encodable<ListProcessesResponse> + Send + use<'a>> {
        let (guest, _under_way, _) = self.manager.guest(id(request.sandbox_id, "sandbox_id")?)?;
        Response::ok(ListProcessesResponse {
            processes: guest.list_processes().await?,
            ..Default::default()
        })
    }

    async fn signal_process<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, SignalProcessRequest>,
    ) -> ServiceResult<impl Encodable<SignalProcessResponse> + Send + use<'a>> {
        let request = request.to_owned_message();
        let (guest, _under_way, _) = self.manager.guest(id(&request.sandbox_id, "sandbox_id")?)?;
        guest
            .signal(
                &required(request.process.into_option(), "process")?,
                request.signal,
            )
            .await?;
        Response::ok(SignalProcessResponse::default())
    }

    async fn send_input<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, SendInputRequest>,
    ) -> ServiceResult<impl Encodable<SendInputResponse> + Send + use<'a>> {
        let request = request.to_owned_message();
        let (guest, _under_way, _) = self.manager.guest(id(&request.sandbox_id, "sandbox_id")?)?;
        guest
            .input(
                &required(request.process.into_option(), "process")?,
                request.data,
                request.pty,
                request.close,
            )
            .await?;
        Response::ok(SendInputResponse::default())
    }

    async fn resize_pty<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, ResizePtyRequest>,
    ) -> ServiceResult<impl Encodable<ResizePtyResponse> + Send + use<'a>> {
        let request = request.to_owned_message();
        let (guest, _under_way, _) = self.manager.guest(id(&request.sandbox_id, "sandbox_id")?)?;
        guest
            .resize(
                &required(request.process.into_option(), "process")?,
                &required(request.size.into_option(), "size")?,
            )
            .await?;
        Response::ok(ResizePtyResponse::default())
    }

    async fn write_file<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, WriteFileRequest>,
    ) -> ServiceResult<impl Encodable<WriteFileResponse> + Send + use<'a>> {
        let request = request.to_owned_message();
        let (guest, _under_way, _) = self.manager.guest(id(&request.sandbox_id, "sandbox_id")?)?;
        let size = request.content.len() as u64;
        let content = futures::stream::iter([Ok(bytes::Bytes::from(request.content))]);
        let path = guest
            .write_file(&request.path, request.user.as_deref(), content)
            .await?;
        Response::ok(WriteFileResponse {
            path,
            size,
            ..Default::default()
        })
    }

    async fn read_file<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, ReadFileRequest>,
    ) -> ServiceResult<impl Encodable<ReadFileResponse> + Send + use<'a>> {
        let (guest, _under_way, _) = self.manager.guest(id(request.sandbox_id, "sandbox_id")?)?;
        let mut chunks = guest.read_file(request.path, request.user).await?;
        let mut content = Vec::new();
        while let Some(chunk) = chunks.try_next().await? {
            if content.len() + chunk.len() > MAX_PLAIN_READ {
                return Err(ConnectError::out_of_range(
                    "the file is larger than 16 MiB; read it as a stream",
                ));
            }
            content.extend_from_slice(&chunk);
        }
        Response::ok(ReadFileResponse {
            content,
            ..Default::default()
        })
    }

    async fn write_file_stream<'a>(
        &'a self,
        _: RequestContext,
        mut requests: InboundStream<WriteFileStreamRequest>,
    ) -> ServiceResult<impl Encodable<WriteFileResponse> + Send + use<'a>> {
        let first = requests
            .try_next()
            .await?
            .and_then(|message| message.to_owned_message().part);
        let Some(Part::Target(target)) = first else {
            return Err(ConnectError::invalid_argument(
                "the first message must name the file",
            ));
        };
        let (guest, _under_way, _) = self.manager.guest(id(&target.sandbox_id, "sandbox_id")?)?;
        let size = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(0));
        let counted = std::sync::Arc::clone(&size);
        let content = requests.map(move |message| match message {
            Ok(message) => match message.to_owned_message().part {
                Some(Part::Data(data)) => {
                    counted.fetch_add(data.len() as u64, std::sync::atomic::Ordering::Relaxed);
                    Ok(bytes::Bytes::from(data))
                }
                Some(Part::Target(_)) => Err(std::io::Error::other("a second target in one upload")),
                None => Ok(bytes::Bytes::new()),
            },
            Err(error) => Err(std::io::Error::other(error)),
        });
        let path = guest
            .write_file(&target.path, target.user.as_deref(), sync_stream(content))
            .await?;
        let size = size.load(std::sync::atomic::Ordering::Relaxed);
        Response::ok(WriteFileResponse {
            path,
            size,
            ..Default::default()
        })
    }

    async fn read_file_stream(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, ReadFileRequest>,
    ) -> ServiceResult<ServiceStream<impl Encodable<ReadFileChunk> + Send + use<>>> {
        let (guest, under_way, _) = self.manager.guest(id(request.sandbox_id, "sandbox_id")?)?;
        let chunks: Chunks = guest.read_file(request.path, request.user).await?;
        let chunks = chunks.map(move |chunk| {
            let _held_while_the_stream_lives = &under_way;
            chunk
                .map(|data| ReadFileChunk {
                    data: data.to_vec(),
                    ..Default::default()
                })
                .map_err(ConnectError::from)
        });
        let chunks: ServiceStream<ReadFileChunk> = Box::pin(chunks);
        Response::ok(chunks)
    }

    async fn stat_path<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, StatPathRequest>,
    ) -> ServiceResult<impl Encodable<StatPathResponse> + Send + use<'a>> {
        let (guest, _under_way, _) = self.manager.guest(id(request.sandbox_id, "sandbox_id")?)?;
        let entry = guest.stat(request.path.to_owned(), request.user).await?;
        Response::ok(StatPathResponse {
            entry: entry.into(),
            ..Default::default()
        })
    }

    async fn list_dir<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, ListDirRequest>,
    ) -> ServiceResult<impl Encodable<ListDirResponse> + Send + use<'a>> {
        let (guest, _under_way, _) = self.manager.guest(id(request.sandbox_id, "sandbox_id")?)?;
        let entries = guest
            .list_dir(request.path.to_owned(), request.depth, request.user)
            .await?;
        Response::ok(ListDirResponse {
            entries,
            ..Default::default()
        })
    }

    async fn make_dir<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, MakeDirRequest>,
    ) -> ServiceResult<impl Encodable<MakeDirResponse> + Send + use<'a>> {
        let (guest, _under_way, _) = self.manager.guest(id(request.sandbox_id, "sandbox_id")?)?;
        let entry = guest.make_dir(request.path.to_owned(), request.user).await?;
        Response::ok(MakeDirResponse {
            entry: entry.into(),
            ..Default::default()
        })
    }

    async fn remove_path<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, RemovePathRequest>,
    ) -> ServiceResult<impl Encodable<RemovePathResponse> + Send + use<'a>> {
        let (guest, _under_way, _) = self.manager.guest(id(request.sandbox_id, "sandbox_id")?)?;
        guest.remove(request.path.to_owned(), request.user).await?;
        Response::ok(RemovePathResponse::default())
    }

    async fn create_snapshot<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, CreateSnapshotRequest>,
    ) -> ServiceResult<impl Encodable<CreateSnapshotResponse> + Send + use<'a>> {
        let sandbox_id: SandboxId = id(request.sandbox_id, "sandbox_id")?;
        let (team, template) = (
            id(request.team_id, "team_id")?,
            id(request.template_id, "template_id")?,
        );
        let (size_bytes, view) = self
            .manager
            .snapshot(sandbox_id, request.generation, team, template)
            .await?;
        Response::ok(CreateSnapshotResponse {
            size_bytes,
            vcpus: view.record.shape.vcpus,
            memory_mb: view.record.shape.memory_mb,
            disk_size_mb: view.record.disk_mb,
            ..Default::default()
        })
    }

    async fn delete_snapshot<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, DeleteSnapshotRequest>,
    ) -> ServiceResult<impl Encodable<DeleteSnapshotResponse> + Send + use<'a>> {
        self.manager.delete_template(
            id(request.team_id, "team_id")?,
            id(request.template_id, "template_id")?,
        )?;
        Response::ok(DeleteSnapshotResponse::default())
    }

    async fn get_metrics<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, GetMetricsRequest>,
    ) -> ServiceResult<impl Encodable<GetMetricsResponse> + Send + use<'a>> {
        let points = self
            .manager
            .samples(id(request.sandbox_id, "sandbox_id")?, request.since_ms)?;
        Response::ok(GetMetricsResponse {
            points,
            ..Default::default()
        })
    }

    async fn list_metrics<'a>(
        &'a self,
        _: RequestContext,
        _: ServiceRequest<'_, ListMetricsRequest>,
    ) -> ServiceResult<impl Encodable<ListMetricsResponse> + Send + use<'a>> {
        let sandboxes = self
            .manager
            .newest_samples()
            .into_iter()
            .map(|(id, newest)| SandboxMetrics {
                sandbox_id: id.to_string(),
                newest: newest.into(),
                ..Default::default()
            })
            .collect();
        Response::ok(ListMetricsResponse {
            now_ms: crate::manager::activity::now_ms(),
            sandboxes,
            ..Default::default()
        })
    }

    async fn get_host_status<'a>(
        &'a self,
        _: RequestContext,
        _: ServiceRequest<'_, GetHostStatusRequest>,
    ) -> ServiceResult<impl Encodable<GetHostStatusResponse> + Send + use<'a>> {
        let shared = &self.manager.shared;
        let views = self.manager.list();
        let count = |status| views.iter().filter(|view| view.state == status).count() as u32;
        let platform = shared.qemu.platform();
        let minimal = minimal_status(&shared.templates.minimal.subscribe().borrow());
        Response::ok(GetHostStatusResponse {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            vmm: format!(
                "{} {}, {}",
                platform.vmm,
                platform.version,
                platform.accelerator.as_str()
            ),
            cpu_cores: std::thread::available_parallelism().map_or(1, |cores| cores.get() as u32),
            memory_mb: shared.capacity.memory_mb,
            memory_available_mb: crate::manager::available_memory_mb(),
            disk_available_mb: crate::manager::available_disk_mb(&shared.layout),
            sandboxes_running: count(SandboxStatus::Running),
            sandboxes_paused: count(SandboxStatus::Paused),
            templates: vec![minimal],
            ..Default::default()
        })
    }
}

/// The built-in template's state in the wire's terms.
fn minimal_status(build: &BuildState) -> TemplateStatus {
    let (state, detail, progress_pct, size_bytes) = match build {
        BuildState::Building { percent, step } => ("building", step.clone(), *percent, 0),
        BuildState::Ready { size_bytes } => ("ready", String::new(), 100, *size_bytes),
        BuildState::Failed(why) => ("failed", why.clone(), 0, 0),
    };
    TemplateStatus {
        template_id: wrenn_proto::id::TemplateId::MINIMAL.to_string(),
        name: "minimal".to_owned(),
        state: state.to_owned(),
        detail,
        progress_pct,
        size_bytes,
        ..Default::default()
    }
}

/// A process's events for the wire. What the process writes counts as use of the sandbox, and so does its silence while
/// somebody follows it.
fn streamed(
    events: Events,
    activity: std::sync::Arc<Activity>,
    followed: Followed,
) -> ServiceStream<ProcessEvent> {
    Box::pin(events.map(move |event| {
        let _held_while_the_stream_lives = &followed;
        if !matches!(
            &event,
            Ok(ProcessEvent {
                event: Some(WireEvent::Keepalive(_)),
                ..
            })
        ) {
            activity.touch();
        }
        event.map_err(ConnectError::from)
    }))
}
