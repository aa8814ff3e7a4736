//! The `filesystem.Filesystem` service.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use connectrpc::{
    ConnectError, Encodable, RequestContext, Response, ServiceRequest, ServiceResult, ServiceStream,
};
use tokio::time::Instant;
use wrenn_proto::filesystem::watch_dir_response::{KeepAlive, StartEvent};
use wrenn_proto::filesystem::{
    CreateWatcherRequest, CreateWatcherResponse, EntryInfo, Filesystem, FilesystemEvent,
    GetWatcherEventsRequest, GetWatcherEventsResponse, ListDirRequest, ListDirResponse, MakeDirRequest,
    MakeDirResponse, MoveRequest, MoveResponse, RemoveRequest, RemoveResponse, RemoveWatcherRequest,
    RemoveWatcherResponse, StatRequest, StatResponse, WatchDirRequest, WatchDirResponse,
};

use super::entry::describe;
use super::watch::{WatchError, WatchOptions, Watcher};
use super::{paths, tree};
use crate::process::service::{deadline, request_user};
use crate::process::stream::{deadline_error, keepalive_interval};
use crate::state::Agent;
use crate::users::{Names, User};

pub(crate) struct FilesystemService {
    agent: Arc<Agent>,
}

impl FilesystemService {
    pub(crate) fn new(agent: Arc<Agent>) -> Self {
        Self { agent }
    }

    fn user(&self, ctx: &RequestContext) -> Result<User, ConnectError> {
        request_user(&self.agent, ctx.headers())
    }

    fn resolve(&self, path: &str, user: &User) -> Result<PathBuf, ConnectError> {
        paths::resolve(path, user, self.agent.settings().default_workdir.as_deref())
            .map_err(ConnectError::invalid_argument)
    }

    async fn watch(&self, path: PathBuf, options: WatchOptions) -> Result<Arc<Watcher>, ConnectError> {
        let path = path.as_path();
        let found = tokio::fs::metadata(path)
            .await
            .map_err(|error| tree::from_io(path, &error))?;
        if !found.is_dir() {
            return Err(ConnectError::invalid_argument(format!(
                "'{}' is not a directory",
                path.display()
            )));
        }
        let watching = self.agent.watchers.watch(path.to_owned(), options);
        watching.await.map_err(|error| match error {
            WatchError::TooMany => ConnectError::resource_exhausted(error.to_string()),
            // The kernel's bounds of instances and watches.
            WatchError::Io(error)
                if matches!(error.raw_os_error(), Some(code) if code == rustix::io::Errno::MFILE.raw_os_error() || code == rustix::io::Errno::NOSPC.raw_os_error()) =>
            {
                ConnectError::resource_exhausted(format!("cannot watch '{}': {error}", path.display()))
            }
            WatchError::Io(error) => tree::from_io(path, &error),
        })
    }
}

/// Runs file system work off the thread that serves.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ConnectError> + Send + 'static,
) -> Result<T, ConnectError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|_| ConnectError::internal("the operation failed"))?
}

fn describe_or_error(path: &Path) -> Result<EntryInfo, ConnectError> {
    describe(path, &Names::load()).map_err(|error| tree::from_io(path, &error))
}

impl Filesystem for FilesystemService {
    async fn stat<'a>(
        &'a self,
        ctx: RequestContext,
        request: ServiceRequest<'_, StatRequest>,
    ) -> ServiceResult<impl Encodable<StatResponse> + Send + use<'a>> {
        let path = self.resolve(request.path, &self.user(&ctx)?)?;
        let entry = blocking(move || describe_or_error(&path)).await?;
        Response::ok(StatResponse {
            entry: entry.into(),
            ..Default::default()
        })
    }

    async fn make_dir<'a>(
        &'a self,
        ctx: RequestContext,
        request: ServiceRequest<'_, MakeDirRequest>,
    ) -> ServiceResult<impl Encodable<MakeDirResponse> + Send + use<'a>> {
        let user = self.user(&ctx)?;
        let path = self.resolve(request.path, &user)?;
        let entry = blocking(move || {
            if !tree::make_dirs(&path, &user).map_err(|error| tree::from_io(&path, &error))? {
                return Err(ConnectError::already_exists(format!(
                    "directory already exists: '{}'",
                    path.display()
                )));
            }
            describe_or_error(&path)
        })
        .await?;
        self.agent.watchers.sync().await;
        Response::ok(MakeDirResponse {
            entry: entry.into(),
            ..Default::default()
        })
    }

    async fn r#move<'a>(
        &'a self,
        ctx: RequestContext,
        request: ServiceRequest<'_, MoveRequest>,
    ) -> ServiceResult<impl Encodable<MoveResponse> + Send + use<'a>> {
        let user = self.user(&ctx)?;
        let source = self.resolve(request.source, &user)?;
        let destination = self.resolve(request.destination, &user)?;
        let entry = blocking(move || tree::rename(&source, &destination, &user)).await?;
        self.agent.watchers.sync().await;
        Response::ok(MoveResponse {
            entry: entry.into(),
            ..Default::default()
        })
    }

    async fn list_dir<'a>(
        &'a self,
        ctx: RequestContext,
        request: ServiceRequest<'_, ListDirRequest>,
    ) -> ServiceResult<impl Encodable<ListDirResponse> + Send + use<'a>> {
        let path = self.resolve(request.path, &self.user(&ctx)?)?;
        // Older clients send no depth and mean the directory itself.
        let depth = request.depth.max(1);
        let entries = blocking(move || tree::list(&path, depth)).await?;
        Response::ok(ListDirResponse {
            entries,
            ..Default::default()
        })
    }

    async fn remove<'a>(
        &'a self,
        ctx: RequestContext,
        request: ServiceRequest<'_, RemoveRequest>,
    ) -> ServiceResult<impl Encodable<RemoveResponse> + Send + use<'a>> {
        let path = self.resolve(request.path, &self.user(&ctx)?)?;
        blocking(move || tree::remove(&path)).await?;
        self.agent.watchers.sync().await;
        Response::ok(RemoveResponse::default())
    }

    async fn watch_dir(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, WatchDirRequest>,
    ) -> ServiceResult<ServiceStream<impl Encodable<WatchDirResponse> + Send + use<>>> {
        let path = self.resolve(request.path, &self.user(&ctx)?)?;
        let options = WatchOptions {
            recursive: request.recursive,
            include_entry: request.include_entry,
        };
        let watcher = self.watch(path, options).await?;
        Response::ok(watch_stream(
            watcher,
            keepalive_interval(ctx.headers()),
            deadline(&ctx),
        ))
    }

    async fn create_watcher<'a>(
        &'a self,
        ctx: RequestContext,
        request: ServiceRequest<'_, CreateWatcherRequest>,
    ) -> ServiceResult<impl Encodable<CreateWatcherResponse> + Send + use<'a>> {
        let path = self.resolve(request.path, &self.user(&ctx)?)?;
        let options = WatchOptions {
            recursive: request.recursive,
            include_entry: request.include_entry,
        };
        let watcher = self.watch(path, options).await?;
        let watcher_id = self
            .agent
            .watchers
            .keep(watcher)
            .map_err(|error| ConnectError::internal(format!("no id for the watcher: {error}")))?;
        Response::ok(CreateWatcherResponse {
            watcher_id,
            ..Default::default()
        })
    }

    async fn get_watcher_events<'a>(
        &'a self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, GetWatcherEventsRequest>,
    ) -> ServiceResult<impl Encodable<GetWatcherEventsResponse> + Send + use<'a>> {
        let watcher = self.agent.watchers.polled(request.watcher_id).ok_or_else(|| {
            ConnectError::not_found(format!("watcher with id {} not found", request.watcher_id))
        })?;
        Response::ok(GetWatcherEventsResponse {
            events: watcher.take().await,
            ..Default::default()
        })
    }

    async fn remove_watcher<'a>(
        &'a self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, RemoveWatcherRequest>,
    ) -> ServiceResult<impl Encodable<RemoveWatcherResponse> + Send + use<'a>> {
        if !self.agent.watchers.remove(request.watcher_id) {
            return Err(ConnectError::not_found(format!(
                "watcher with id {} not found",
                request.watcher_id
            )));
        }
        Response::ok(RemoveWatcherResponse::default())
    }
}

struct WatchStream {
    watcher: Arc<Watcher>,
    /// Taken from the watcher and not sent yet.
    ready: VecDeque<FilesystemEvent>,
    keepalive: Duration,
    deadline: Option<Instant>,
    started: bool,
    done: bool,
}

fn watch_stream(
    watcher: Arc<Watcher>,
    keepalive: Duration,
    deadline: Option<Instant>,
) -> ServiceStream<WatchDirResponse> {
    let stream = WatchStream {
        watcher,
        ready: VecDeque::new(),
        keepalive,
        deadline,
        started: false,
        done: false,
    };
    Box::pin(futures::stream::unfold(stream, async |mut stream| {
        let item = stream.next().await?;
        Some((item, stream))
    }))
}

impl WatchStream {
    async fn next(&mut self) -> Option<Result<WatchDirResponse, ConnectError>> {
        if self.done {
            return None;
        }
        if !self.started {
            self.started = true;
            return Some(Ok(WatchDirResponse {
                event: StartEvent::default().into(),
                ..Default::default()
            }));
        }
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(Ok(WatchDirResponse {
                    event: event.into(),
                    ..Default::default()
                }));
            }
            self.ready.extend(self.watcher.take().await);
            if !self.ready.is_empty() {
                continue;
            }
            let deadline = async {
                match self.deadline {
                    Some(deadline) => tokio::time::sleep_until(deadline).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = deadline => {
                    self.done = true;
                    return Some(Err(deadline_error()));
                }
                () = self.watcher.arrived() => {}
                () = tokio::time::sleep(self.keepalive) => {
                    return Some(Ok(WatchDirResponse { event: KeepAlive::default().into(), ..Default::default() }));
                }
            }
        }
    }
}
