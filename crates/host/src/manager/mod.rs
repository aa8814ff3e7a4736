//! All sandboxes of this host. One task per sandbox owns it ([`driver`]); this module creates them, finds them again
//! after a restart, and answers for what they have in common: capacity, templates, events.

pub(crate) mod activity;
pub(crate) mod console;
mod driver;
pub(crate) mod journal;
mod metrics;
mod pool;
mod recover;
pub(crate) mod slots;
mod vm;

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use wrenn_proto::id::{SandboxId, TeamId, TemplateId};
use wrenn_proto::rest::SandboxStatus;

use crate::error::{HostError, IoContext as _, Result};
use crate::guest::GuestClient;
use crate::layout::{Layout, VmDir};
use crate::net::EgressPolicy;
use crate::offload::remove_folder;
use crate::template::TemplateStore;
use crate::vmm::Shape;
use crate::vmm::qemu::Qemu;
use activity::{UnderWay, now_ms};
pub(crate) use driver::View;
use driver::{Driver, Handle, Origin, Request};
use journal::{Phase, Record};
use slots::Slots;
pub(crate) use vm::{link, random};

/// A step at which a test can make an operation fail, to see that nothing is left behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Step {
    /// Writing the journal for the first time.
    Journal,
    /// Taking a place for the VM.
    Slot,
    /// Making the disk overlay.
    Disk,
    /// Starting the VMM's process.
    Launch,
    /// Loading memory and device state.
    Restore,
    /// Connecting the guest's network.
    Network,
    /// Letting the guest run.
    Run,
    /// Making the guest a sandbox of its own.
    Greet,
    /// Telling the world that it runs.
    Finish,
    /// Writing memory and device state.
    Save,
    /// Telling the world that it is paused.
    SaveFinish,
    /// Putting a snapshot's files together.
    SnapshotFinish,
}

impl Step {
    /// The steps of a create, in order.
    pub const CREATE: [Self; 9] = [
        Self::Journal,
        Self::Slot,
        Self::Disk,
        Self::Launch,
        Self::Restore,
        Self::Network,
        Self::Run,
        Self::Greet,
        Self::Finish,
    ];
}

/// Decides whether a step fails. Tests only.
pub type FaultHook = Arc<dyn Fn(Step) -> std::result::Result<(), String> + Send + Sync>;

/// A change that nobody asked for, on its way to the control plane.
#[derive(Debug, Clone)]
pub(crate) struct Event {
    pub(crate) view: View,
    /// `ttl_expired`, `vmm_exited`, `adopted` or `shutdown`.
    pub(crate) reason: &'static str,
}

/// What this host may use.
#[derive(Debug, Clone, Copy)]
pub struct Capacity {
    /// Sum of the guests' memory in MiB that may be promised; memory is shared, so this may exceed what there is.
    pub memory_mb: u64,
    /// A create is refused when less than this is free, in MiB.
    pub min_free_memory_mb: u64,
    /// A create is refused when less than this is free on the data directory's disk, in MiB.
    pub min_free_disk_mb: u64,
    /// Virtual machines at one time.
    pub max_vms: u32,
}

/// What the tasks of all sandboxes share.
pub(crate) struct Shared {
    pub(crate) layout: Layout,
    pub(crate) qemu: Arc<Qemu>,
    pub(crate) templates: Arc<TemplateStore>,
    pub(crate) slots: Arc<Slots>,
    pub(crate) policy: EgressPolicy,
    pub(crate) capacity: Capacity,
    pub(crate) tasks: TaskTracker,
    /// Cancelled when the agent ends: what only waits for guests ends with it.
    pub(crate) ending: CancellationToken,
    /// Creates under way; closed when the agent ends.
    creates: TaskTracker,
    pool: pool::Pool,
    fault: Option<FaultHook>,
    events: mpsc::UnboundedSender<Event>,
    sandboxes: Mutex<HashMap<SandboxId, Entry>>,
}

enum Entry {
    /// Being created: the id is taken, there is nothing to talk to yet.
    Starting(Starting),
    Live(Handle),
}

/// A create under way, as others see it.
#[derive(Clone)]
struct Starting {
    record: Box<Record>,
    /// Ends it, with all that it has made so far.
    cancel: CancellationToken,
    /// Cancelled when it has ended, one way or the other.
    ended: CancellationToken,
}

/// Belongs to the task of a create. However that ends, a panic included, its entry does not stay.
struct CreateEnds {
    shared: Arc<Shared>,
    id: SandboxId,
    ended: CancellationToken,
}

impl Drop for CreateEnds {
    fn drop(&mut self) {
        let mut sandboxes = self.shared.sandboxes();
        if let Some(Entry::Starting(_)) = sandboxes.get(&self.id) {
            sandboxes.remove(&self.id);
        }
        drop(sandboxes);
        self.ended.cancel();
    }
}

impl Shared {
    /// A place where a test can break an operation.
    pub(crate) fn step(&self, step: Step) -> Result<()> {
        match &self.fault {
            Some(fault) => fault(step).map_err(|what| HostError::Vmm(format!("fault at {step:?}: {what}"))),
            None => Ok(()),
        }
    }

    pub(crate) fn emit(&self, event: Event) {
        // Nobody listens only while the agent ends.
        let _ = self.events.send(event);
    }

    fn sandboxes(&self) -> std::sync::MutexGuard<'_, HashMap<SandboxId, Entry>> {
        self.sandboxes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn forget(&self, id: SandboxId) {
        self.sandboxes().remove(&id);
    }

    /// Removes images that were deleted while sandboxes stood on them.
    pub(crate) fn collect_images(self: &Arc<Self>) {
        let shared = Arc::clone(self);
        self.tasks
            .spawn_blocking(move || shared.templates.collect(&shared.images_in_use()));
    }

    fn images_in_use(&self) -> Vec<PathBuf> {
        let waiting = self.pool.images();
        let waiting = waiting.iter().map(|image| self.templates.relative(image));
        self.sandboxes()
            .values()
            .map(|entry| match entry {
                Entry::Starting(starting) => starting.record.image.clone(),
                Entry::Live(handle) => handle.view.borrow().record.image.clone(),
            })
            .chain(waiting)
            .collect()
    }

    /// Refuses before anything starts what would not fit beside all others than `own`.
    pub(crate) fn check_memory(&self, shape: Shape, own: Option<SandboxId>) -> Result<()> {
        self.check_promised(&self.sandboxes(), shape, own)?;
        let free = available_memory_mb();
        if free < self.capacity.min_free_memory_mb {
            return Err(HostError::NoCapacity(format!(
                "only {free} MiB of memory are free on the host"
            )));
        }
        Ok(())
    }

    /// The memory that running and arriving sandboxes may come to use, against what may be promised.
    fn check_promised(
        &self,
        sandboxes: &HashMap<SandboxId, Entry>,
        shape: Shape,
        own: Option<SandboxId>,
    ) -> Result<()> {
        let promised: u64 = sandboxes
            .iter()
            .filter(|(id, _)| Some(**id) != own)
            .map(|(_, entry)| {
                let view = entry.view();
                match view.state {
                    SandboxStatus::Paused | SandboxStatus::Error | SandboxStatus::Stopped => 0,
                    _ => u64::from(view.record.shape.memory_mb),
                }
            })
            .sum();
        if promised + u64::from(shape.memory_mb) > self.capacity.memory_mb {
            return Err(HostError::NoCapacity(format!(
                "{} MiB asked for, {promised} of {} MiB promised to running sandboxes",
                shape.memory_mb, self.capacity.memory_mb
            )));
        }
        Ok(())
    }

    fn check_disk(&self) -> Result<()> {
        let free = available_disk_mb(&self.layout);
        if free < self.capacity.min_free_disk_mb {
            return Err(HostError::NoCapacity(format!(
                "only {free} MiB of disk are free on the host"
            )));
        }
        Ok(())
    }
}

/// `MemAvailable` in MiB.
pub(crate) fn available_memory_mb() -> u64 {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    meminfo_mb(&meminfo, "MemAvailable").unwrap_or(0)
}

/// A value of `/proc/meminfo`, whose text is given, in MiB.
#[must_use]
pub fn meminfo_mb(meminfo: &str, field: &str) -> Option<u64> {
    meminfo.lines().find_map(|line| {
        let rest = line.strip_prefix(field)?.strip_prefix(':')?;
        let kib: u64 = rest.trim().strip_suffix("kB")?.trim().parse().ok()?;
        Some(kib / 1024)
    })
}

/// Free space for the agent's user below the data directory, in MiB.
pub(crate) fn available_disk_mb(layout: &Layout) -> u64 {
    rustix::fs::statvfs(layout.data()).map_or(0, |stat| stat.f_bavail.saturating_mul(stat.f_frsize) >> 20)
}

/// A create request in the manager's terms.
pub(crate) struct CreateSpec {
    pub(crate) id: SandboxId,
    pub(crate) team: TeamId,
    pub(crate) generation: u64,
    pub(crate) template_team: TeamId,
    pub(crate) template: TemplateId,
    pub(crate) shape: Shape,
    pub(crate) disk_mb: u32,
    pub(crate) timeout_sec: u32,
    pub(crate) envs: BTreeMap<String, String>,
}

/// What a manager is made of.
pub(crate) struct Parts {
    pub(crate) layout: Layout,
    pub(crate) qemu: Arc<Qemu>,
    pub(crate) templates: Arc<TemplateStore>,
    pub(crate) slots: Arc<Slots>,
    pub(crate) policy: EgressPolicy,
    pub(crate) capacity: Capacity,
    pub(crate) pool: usize,
    pub(crate) fault: Option<FaultHook>,
}

/// The sandboxes of this host. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Manager {
    pub(crate) shared: Arc<Shared>,
}

impl Manager {
    pub(crate) fn new(parts: Parts) -> (Self, mpsc::UnboundedReceiver<Event>) {
        let Parts {
            layout,
            qemu,
            templates,
            slots,
            policy,
            capacity,
            pool,
            fault,
        } = parts;
        let (events, receiver) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared {
            layout,
            qemu,
            templates,
            slots,
            policy,
            capacity,
            tasks: TaskTracker::new(),
            ending: CancellationToken::new(),
            creates: TaskTracker::new(),
            pool: pool::Pool::new(pool),
            fault,
            events,
            sandboxes: Mutex::new(HashMap::new()),
        });
        (Self { shared }, receiver)
    }

    /// Creates a sandbox. After an error nothing of it is left.
    ///
    /// Asked for again while it is under way, as a control plane does whose first call lost its answer, it gives that
    /// one's outcome: both callers learn the same of one sandbox.
    pub(crate) async fn create(&self, spec: CreateSpec) -> Result<View> {
        loop {
            if let Some(view) = self.known(spec.id).await? {
                return Ok(view);
            }
            if let Some(view) = self.create_new(&spec).await? {
                return Ok(view);
            }
        }
    }

    /// A sandbox that is there already, once its create has ended; `None` when there is none (any more).
    async fn known(&self, id: SandboxId) -> Result<Option<View>> {
        let starting = match self.shared.sandboxes().get(&id) {
            None => return Ok(None),
            Some(Entry::Live(handle)) => {
                let view = handle.view.borrow().clone();
                return match view.state {
                    SandboxStatus::Running => Ok(Some(view)),
                    // It has a life of its own by now, which the caller should look at.
                    _ => Err(HostError::Exists { id: id.to_string() }),
                };
            }
            Some(Entry::Starting(starting)) => starting.clone(),
        };
        starting.ended.cancelled().await;
        if starting.cancel.is_cancelled() {
            return Err(HostError::WrongState {
                state: "stopping",
                wanted: "starting",
            });
        }
        Ok(self.shared.sandboxes().get(&id).map(Entry::view))
    }

    /// Creates a sandbox that is not there; `None` when another call has begun it meanwhile.
    async fn create_new(&self, spec: &CreateSpec) -> Result<Option<View>> {
        let shared = &self.shared;
        shared.check_memory(spec.shape, None)?;
        shared.check_disk()?;
        let image = shared
            .templates
            .image(spec.template_team, spec.template, spec.shape)
            .await?;
        if spec.disk_mb < image.manifest.disk_mb {
            return Err(HostError::InvalidArgument {
                field: "disk_size_mb",
                message: format!(
                    "the template's disk has {} MiB and cannot shrink",
                    image.manifest.disk_mb
                ),
            });
        }
        let now = now_ms();
        let mut record = Record {
            version: journal::current_version(),
            id: spec.id,
            team: spec.team,
            template: spec.template,
            generation: spec.generation,
            image: shared.templates.relative(&image),
            shape: spec.shape,
            disk_mb: spec.disk_mb,
            timeout_sec: spec.timeout_sec,
            created_at_ms: now,
            last_active_at_ms: now,
            token: hex::encode(vm::random::<32>()?),
            envs: spec.envs.clone(),
            phase: Phase::Starting,
        };
        let starting = Starting {
            record: Box::new(record.clone()),
            cancel: CancellationToken::new(),
            ended: CancellationToken::new(),
        };
        let under_way = {
            let mut sandboxes = shared.sandboxes();
            // Counted before the look, so that an agent that ends either waits for this create or refuses it.
            let under_way = shared.creates.token();
            if shared.creates.is_closed() {
                return Err(HostError::ShuttingDown);
            }
            if sandboxes.contains_key(&spec.id) {
                return Ok(None);
            }
            // Again, and with the place taken at once: many creates at a time all found room above.
            shared.check_promised(&sandboxes, spec.shape, None)?;
            sandboxes.insert(spec.id, Entry::Starting(starting.clone()));
            under_way
        };
        // A task of its own: a caller that hangs up half-way must not leave half a sandbox.
        let manager = self.clone();
        let ends = CreateEnds {
            shared: Arc::clone(shared),
            id: spec.id,
            ended: starting.ended,
        };
        let work = shared.tasks.spawn(async move {
            let _counted = (under_way, manager.shared.pool.begin_create(), ends);
            let dir = VmDir::new(manager.shared.layout.sandboxes().join(record.id.to_string()));
            let outcome = tokio::select! {
                outcome = manager.build(&dir, &mut record, image) => outcome,
                // What was made so far ends with the work that is dropped.
                () = starting.cancel.cancelled() => Err(HostError::WrongState {
                    state: "stopping",
                    wanted: "starting",
                }),
            };
            match outcome {
                Ok(running) => {
                    let origin = Origin::Running(Box::new(running));
                    let id = record.id;
                    let handle = Driver::start(Arc::clone(&manager.shared), dir, record, origin);
                    let view = handle.view.borrow().clone();
                    manager.shared.sandboxes().insert(id, Entry::Live(handle));
                    Ok(Some(view))
                }
                Err(error) => {
                    if let Err(error) = remove_folder(dir.path()).await {
                        tracing::error!(dir = %dir.path().display(), %error, "cannot remove a failed sandbox's files");
                    }
                    Err(error)
                }
            }
        });
        work.await
            .map_err(|error| HostError::Vmm(format!("creating it failed: {error}")))?
    }

    async fn build(
        &self,
        dir: &VmDir,
        record: &mut Record,
        image: crate::template::Image,
    ) -> Result<vm::Running> {
        if let Some(warm) = self.shared.pool.claim(&image, record.disk_mb) {
            // QEMU works in the folder itself, whatever its name.
            std::fs::rename(warm.dir.path(), dir.path()).at("move into place", dir.path())?;
            record.write(dir)?;
            match vm::greet(&self.shared, dir, record, warm.restored).await {
                Ok(running) => return Ok(running),
                Err(error) => {
                    tracing::warn!(%error, "a prepared virtual machine was no good; starting another");
                    remove_folder(dir.path()).await.at("remove", dir.path())?;
                    record.phase = Phase::Starting;
                }
            }
        }
        let dir = &VmDir::create(dir.path().to_path_buf())?;
        vm::create(&self.shared, dir, record, image).await
    }

    /// Makes the built-in template if it is missing, then keeps virtual machines of it ready.
    pub(crate) async fn prepare(&self) {
        // What was missing may be there later: a mirror that was away, room on the disk.
        let mut pause = Duration::from_secs(30);
        while self.shared.templates.prepare_minimal().await.is_err() {
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(600));
        }
        self.shared.collect_images();
        let shared = Arc::clone(&self.shared);
        self.shared
            .tasks
            .spawn(async move { shared.pool.keep_full(Arc::clone(&shared)).await });
    }

    fn handle(&self, id: SandboxId) -> Result<Handle> {
        match self.shared.sandboxes().get(&id) {
            Some(Entry::Live(handle)) => Ok(handle.clone()),
            Some(Entry::Starting(_)) => Err(HostError::WrongState {
                state: "starting",
                wanted: "running",
            }),
            None => Err(HostError::NotFound {
                what: "sandbox",
                id: id.to_string(),
            }),
        }
    }

    async fn ask<T>(
        &self,
        id: SandboxId,
        request: impl FnOnce(oneshot::Sender<Result<T>>) -> Request,
    ) -> Result<T> {
        let handle = self.handle(id)?;
        let (reply, answer) = oneshot::channel();
        // Its task has ended: it was destroyed, or the agent is about to end and it will be found again.
        let gone = || match self.shared.sandboxes().contains_key(&id) {
            true => HostError::ShuttingDown,
            false => HostError::NotFound {
                what: "sandbox",
                id: id.to_string(),
            },
        };
        handle.requests.send(request(reply)).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    pub(crate) async fn pause(&self, id: SandboxId, generation: u64) -> Result<View> {
        self.ask(id, |reply| Request::Pause { generation, reply }).await
    }

    pub(crate) async fn resume(&self, id: SandboxId, generation: u64, timeout_sec: u32) -> Result<View> {
        self.ask(id, |reply| Request::Resume {
            generation,
            timeout_sec,
            reply,
        })
        .await
    }

    pub(crate) async fn ping(&self, id: SandboxId) -> Result<View> {
        self.ask(id, |reply| Request::Ping { reply }).await
    }

    /// Destroys a sandbox in whatever state it is. Absent is as wanted.
    pub(crate) async fn destroy(&self, id: SandboxId, generation: u64) -> Result<()> {
        let starting = match self.shared.sandboxes().get(&id) {
            Some(Entry::Starting(starting)) => Some(starting.clone()),
            _ => None,
        };
        if let Some(Starting {
            record,
            cancel,
            ended,
        }) = starting
        {
            if generation < record.generation {
                return Err(HostError::Stale {
                    got: generation,
                    seen: record.generation,
                });
            }
            cancel.cancel();
            // It may have come to run right before.
            ended.cancelled().await;
        }
        match self.ask(id, |reply| Request::Destroy { generation, reply }).await {
            Ok(_) | Err(HostError::NotFound { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    pub(crate) async fn snapshot(
        &self,
        id: SandboxId,
        generation: u64,
        team: TeamId,
        template: TemplateId,
    ) -> Result<(u64, View)> {
        self.shared.check_disk()?;
        let size = self
            .ask(id, |reply| Request::Snapshot {
                generation,
                team,
                template,
                reply,
            })
            .await?;
        Ok((size, self.get(id)?))
    }

    pub(crate) fn delete_template(&self, team: TeamId, template: TemplateId) -> Result<()> {
        self.shared.templates.delete(team, template)?;
        self.shared.collect_images();
        Ok(())
    }

    pub(crate) fn get(&self, id: SandboxId) -> Result<View> {
        match self.shared.sandboxes().get(&id) {
            Some(entry) => Ok(entry.view()),
            None => Err(HostError::NotFound {
                what: "sandbox",
                id: id.to_string(),
            }),
        }
    }

    /// The last lines of a sandbox's console, also of one that is paused; of one that died they are in its record.
    pub(crate) fn console(&self, id: SandboxId) -> String {
        match self.handle(id) {
            Ok(handle) => handle.console.borrow().text(),
            Err(_) => String::new(),
        }
    }

    pub(crate) fn list(&self) -> Vec<View> {
        self.shared.sandboxes().values().map(Entry::view).collect()
    }

    pub(crate) fn samples(
        &self,
        id: SandboxId,
        since_ms: i64,
    ) -> Result<Vec<wrenn_proto::hostagent::MetricsPoint>> {
        Ok(self.handle(id)?.samples.since(since_ms))
    }

    /// The newest sample of each sandbox that runs. One that has just been resumed may have none but from before.
    pub(crate) fn newest_samples(&self) -> Vec<(SandboxId, wrenn_proto::hostagent::MetricsPoint)> {
        let newest = |(id, entry): (&SandboxId, &Entry)| match entry {
            Entry::Live(handle) if handle.view.borrow().state == SandboxStatus::Running => {
                handle.samples.newest().map(|point| (*id, point))
            }
            Entry::Live(_) | Entry::Starting(_) => None,
        };
        self.shared.sandboxes().iter().filter_map(newest).collect()
    }

    /// The way into a running guest, and a token that keeps the sandbox from counting as idle.
    pub(crate) fn guest(&self, id: SandboxId) -> Result<(GuestClient, UnderWay, Handle)> {
        let handle = self.handle(id)?;
        let under_way = handle.activity.begin();
        let guest = handle
            .guest
            .borrow()
            .clone()
            .ok_or_else(|| HostError::WrongState {
                state: handle.view.borrow().state.as_str(),
                wanted: "running",
            })?;
        Ok((guest, under_way, handle))
    }

    /// Ends all tasks; running sandboxes are paused first, or left running to be found by the next agent.
    pub(crate) async fn retire(&self, pause: bool, told: impl Fn(usize, usize)) {
        self.shared.pool.close();
        self.shared.templates.close().await;
        // Those under way become sandboxes to be retired like the others; none begins from here on.
        self.shared.creates.close();
        self.shared.creates.wait().await;
        let handles: Vec<Handle> = self
            .shared
            .sandboxes()
            .values()
            .filter_map(|entry| match entry {
                Entry::Live(handle) => Some(handle.clone()),
                Entry::Starting(_) => None,
            })
            .collect();
        let running = handles
            .iter()
            .filter(|handle| handle.view.borrow().state == SandboxStatus::Running)
            .count();
        told(0, running);
        let mut done = 0;
        // A few at a time: each writes its memory to the same disk.
        let mut waiting = tokio::task::JoinSet::new();
        for handle in handles {
            if waiting.len() >= 2 && waiting.join_next().await.is_some_and(|was| was.unwrap_or(false)) {
                done += 1;
                told(done, running);
            }
            let was_running = handle.view.borrow().state == SandboxStatus::Running;
            waiting.spawn(async move {
                let (reply, answer) = oneshot::channel();
                if handle
                    .requests
                    .send(Request::Retire { pause, reply })
                    .await
                    .is_ok()
                {
                    let _ = answer.await;
                }
                was_running
            });
        }
        while let Some(was) = waiting.join_next().await {
            if was.unwrap_or(false) {
                done += 1;
                told(done, running);
            }
        }
        self.shared.ending.cancel();
        self.shared.tasks.close();
        self.shared.tasks.wait().await;
        self.shared.pool.drain();
        self.end_work().await;
    }
}

impl Entry {
    fn view(&self) -> View {
        match self {
            Self::Starting(starting) => View {
                record: (*starting.record).clone(),
                state: SandboxStatus::Starting,
            },
            Self::Live(handle) => handle.view.borrow().clone(),
        }
    }
}
