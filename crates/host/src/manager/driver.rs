//! The one task that owns a sandbox. Requests, the inactivity clock and the VM's end all arrive here, one after
//! the other; nobody else touches the VM or writes the journal. Readers hold a [`View`].

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use wrenn_proto::id::{TeamId, TemplateId};
use wrenn_proto::rest::SandboxStatus;

use super::activity::Activity;
use super::console::Tail;
use super::journal::{Phase, Record};
use super::metrics::Samples;
use super::vm::{self, Running};
use super::{Event, Shared};
use crate::error::{HostError, IoContext as _, Result};
use crate::guest::GuestClient;
use crate::layout::VmDir;
use crate::offload::remove_folder;

/// How long a pause waits for requests under way in the guest.
const DRAIN: Duration = Duration::from_secs(2);
/// How often the guest's use of its machine is sampled.
const SAMPLE_EVERY: Duration = Duration::from_secs(15);

/// What a sandbox is asked to do. Every answer is the sandbox's view after it.
#[derive(Debug)]
pub(crate) enum Request {
    Pause {
        generation: u64,
        reply: Reply,
    },
    Resume {
        generation: u64,
        timeout_sec: u32,
        reply: Reply,
    },
    Destroy {
        generation: u64,
        reply: Reply,
    },
    Snapshot {
        generation: u64,
        team: TeamId,
        template: TemplateId,
        reply: oneshot::Sender<Result<u64>>,
    },
    Ping {
        reply: Reply,
    },
    /// The agent ends: pause (or leave running), then end the task without touching anything further.
    Retire {
        pause: bool,
        reply: oneshot::Sender<()>,
    },
}

pub(crate) type Reply = oneshot::Sender<Result<View>>;

/// What readers see of a sandbox.
#[derive(Debug, Clone)]
pub(crate) struct View {
    pub(crate) record: Record,
    pub(crate) state: SandboxStatus,
}

/// The way to a sandbox's task. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Handle {
    pub(crate) requests: mpsc::Sender<Request>,
    pub(crate) view: watch::Receiver<View>,
    pub(crate) guest: watch::Receiver<Option<GuestClient>>,
    pub(crate) activity: Arc<Activity>,
    pub(crate) samples: Arc<Samples>,
    pub(crate) console: watch::Receiver<Tail>,
}

enum Life {
    Running(Box<Running>),
    Paused,
    Error,
}

pub(crate) struct Driver {
    shared: Arc<Shared>,
    dir: VmDir,
    record: Record,
    life: Life,
    view: watch::Sender<View>,
    guest: watch::Sender<Option<GuestClient>>,
    activity: Arc<Activity>,
    samples: Arc<Samples>,
    console: watch::Sender<Tail>,
    requests: mpsc::Receiver<Request>,
}

/// How a sandbox comes under the care of a task.
pub(crate) enum Origin {
    /// Just created, or found running.
    Running(Box<Running>),
    /// Found paused.
    Paused,
    /// Found with its VM lost.
    Error,
}

impl Driver {
    /// Starts the task of a sandbox.
    pub(crate) fn start(shared: Arc<Shared>, dir: VmDir, record: Record, origin: Origin) -> Handle {
        let mut console = Tail::default();
        let (life, guest, state) = match origin {
            Origin::Running(running) => {
                let guest = running.guest.clone();
                console = running.console.kept();
                (Life::Running(running), Some(guest), SandboxStatus::Running)
            }
            Origin::Paused => (Life::Paused, None, SandboxStatus::Paused),
            Origin::Error => (Life::Error, None, SandboxStatus::Error),
        };
        let console = watch::Sender::new(console);
        let (requests_tx, requests) = mpsc::channel(64);
        let view = watch::Sender::new(View {
            record: record.clone(),
            state,
        });
        let guest = watch::Sender::new(guest);
        let activity = Arc::new(Activity::new(record.last_active_at_ms));
        let samples = Arc::new(Samples::default());
        let handle = Handle {
            requests: requests_tx,
            view: view.subscribe(),
            guest: guest.subscribe(),
            activity: Arc::clone(&activity),
            samples: Arc::clone(&samples),
            console: console.subscribe(),
        };
        let driver = Self {
            shared: Arc::clone(&shared),
            dir,
            record,
            life,
            view,
            guest,
            activity,
            samples,
            console,
            requests,
        };
        shared.tasks.spawn(driver.run());
        handle
    }

    async fn run(mut self) {
        let mut sample = tokio::time::interval(SAMPLE_EVERY);
        sample.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let expiry = self.expiry();
            tokio::select! {
                request = self.requests.recv() => match request {
                    Some(request) => if self.serve(request).await.is_break() { return },
                    None => return,
                },
                news = vm_news(&mut self.life) => match news {
                    News::Exit(exit) => self.vm_died(&exit),
                    News::NetworkBroken => self.reconnect().await,
                },
                () = sleep_until(expiry) => self.expire().await,
                _ = sample.tick() => self.sample(),
            }
        }
    }

    fn publish(&self, state: SandboxStatus) {
        self.view.send_replace(View {
            record: self.record.clone(),
            state,
        });
    }

    fn settled(&self) -> SandboxStatus {
        match self.life {
            Life::Running(_) => SandboxStatus::Running,
            Life::Paused => SandboxStatus::Paused,
            Life::Error => SandboxStatus::Error,
        }
    }

    fn current(&self) -> View {
        View {
            record: self.record.clone(),
            state: self.settled(),
        }
    }

    /// Refuses a decision older than one already acted on; otherwise remembers it.
    fn accept(&mut self, generation: u64) -> Result<()> {
        if generation < self.record.generation {
            return Err(HostError::Stale {
                got: generation,
                seen: self.record.generation,
            });
        }
        self.record.generation = generation;
        Ok(())
    }

    async fn serve(&mut self, request: Request) -> std::ops::ControlFlow<()> {
        match request {
            Request::Ping { reply } => {
                self.activity.touch();
                self.record.last_active_at_ms = self.activity.last_ms();
                self.publish(self.settled());
                let _ = reply.send(Ok(self.current()));
            }
            Request::Pause { generation, reply } => {
                let outcome = match self.accept(generation) {
                    Ok(()) => self.pause().await,
                    Err(error) => Err(error),
                };
                let _ = reply.send(outcome.map(|()| self.current()));
            }
            Request::Resume {
                generation,
                timeout_sec,
                reply,
            } => {
                let outcome = match self.accept(generation) {
                    Ok(()) => self.resume(timeout_sec).await,
                    Err(error) => Err(error),
                };
                let _ = reply.send(outcome.map(|()| self.current()));
            }
            Request::Snapshot {
                generation,
                team,
                template,
                reply,
            } => {
                let outcome = match self.accept(generation) {
                    Ok(()) => self.snapshot(team, template).await,
                    Err(error) => Err(error),
                };
                let _ = reply.send(outcome);
            }
            Request::Destroy { generation, reply } => match self.accept(generation) {
                Err(error) => {
                    let _ = reply.send(Err(error));
                }
                Ok(()) => {
                    let outcome = self.destroy().await;
                    let gone = outcome.is_ok();
                    let _ = reply.send(outcome.map(|()| self.current()));
                    if gone {
                        return std::ops::ControlFlow::Break(());
                    }
                }
            },
            Request::Retire { pause, reply } => {
                if pause && matches!(self.life, Life::Running(_)) {
                    match self.pause().await {
                        Ok(()) => self.tell("shutdown"),
                        Err(error) => tracing::error!(
                            sandbox = %self.record.id,
                            error = &error as &dyn std::error::Error,
                            "cannot pause at shutdown; it is left running"
                        ),
                    }
                }
                // Requests under way in the guest end with the way to it, rather than hold up the end of the agent.
                self.guest.send_replace(None);
                let _ = reply.send(());
                return std::ops::ControlFlow::Break(());
            }
        }
        std::ops::ControlFlow::Continue(())
    }

    async fn pause(&mut self) -> Result<()> {
        let Life::Running(running) = &mut self.life else {
            return match self.life {
                // Asked for twice: it is as wanted.
                Life::Paused => Ok(()),
                _ => Err(HostError::WrongState {
                    state: "error",
                    wanted: "running",
                }),
            };
        };
        self.view.send_replace(View {
            record: self.record.clone(),
            state: SandboxStatus::Pausing,
        });
        // No new requests reach the guest; those under way get a moment.
        let guest = self.guest.send_replace(None);
        let _ = tokio::time::timeout(DRAIN, self.activity.drained()).await;
        self.record.last_active_at_ms = self.activity.last_ms();
        let started = std::time::Instant::now();
        let outcome = vm::save(&self.shared, &self.dir, &mut self.record, running).await;
        match outcome {
            Ok(saved) => {
                self.end_vm().await;
                self.take_back();
                let kept = vm::kept_files(&self.dir);
                self.shared.tasks.spawn_blocking(move || crate::disk::sync(&kept));
                tracing::info!(
                    sandbox = %self.record.id,
                    pages = saved.pages,
                    bytes = saved.bytes,
                    millis = started.elapsed().as_millis() as u64,
                    "paused"
                );
                self.publish(SandboxStatus::Paused);
                Ok(())
            }
            Err(error) => {
                if self.lose_if_stuck().await {
                    return Err(error);
                }
                // The undo inside let the guest go on.
                self.guest.send_replace(guest);
                self.publish(SandboxStatus::Running);
                Err(error)
            }
        }
    }

    async fn resume(&mut self, timeout_sec: u32) -> Result<()> {
        match self.life {
            Life::Running(_) => return Ok(()),
            Life::Error => {
                return Err(HostError::WrongState {
                    state: "error",
                    wanted: "paused",
                });
            }
            Life::Paused => {}
        }
        self.publish(SandboxStatus::Resuming);
        self.record.timeout_sec = timeout_sec;
        match vm::resume(&self.shared, &self.dir, &mut self.record).await {
            Ok(running) => {
                self.activity.touch();
                self.record.last_active_at_ms = self.activity.last_ms();
                self.guest.send_replace(Some(running.guest.clone()));
                self.console.send_replace(running.console.kept());
                self.life = Life::Running(Box::new(running));
                self.publish(SandboxStatus::Running);
                Ok(())
            }
            Err(error) => {
                if let Phase::Error { .. } = self.record.phase {
                    self.life = Life::Error;
                }
                self.publish(self.settled());
                Err(error)
            }
        }
    }

    async fn snapshot(&mut self, team: TeamId, template: TemplateId) -> Result<u64> {
        let running = match &mut self.life {
            Life::Running(running) => Some(running.as_mut()),
            Life::Paused => None,
            Life::Error => {
                return Err(HostError::WrongState {
                    state: "error",
                    wanted: "running or paused",
                });
            }
        };
        self.view.send_replace(View {
            record: self.record.clone(),
            state: SandboxStatus::Snapshotting,
        });
        let outcome = vm::snapshot(&self.shared, &self.dir, &self.record, running, team, template).await;
        if !self.lose_if_stuck().await {
            self.publish(self.settled());
        }
        outcome
    }

    /// A VM whose guest cannot be let go on is ended: it would be shown as running, and stand still for ever.
    async fn lose_if_stuck(&mut self) -> bool {
        let Life::Running(running) = &mut self.life else {
            return false;
        };
        let Some(why) = running.stuck.take() else {
            return false;
        };
        let console = running.console.tail();
        self.end_vm().await;
        self.lost(
            format!("it was stopped for a moment and could not be let go on: {why}"),
            console,
        );
        true
    }

    /// After the VM's process has ended: its folder is no longer its user's.
    fn take_back(&self) {
        if let Err(error) = crate::vmm::folder::take_back(&self.dir.work()) {
            tracing::error!(sandbox = %self.record.id, error = &error as &dyn std::error::Error, "cannot take a folder back");
        }
    }

    /// Connects a broken network again, as often as it takes: memory and disk are well without it.
    async fn reconnect(&mut self) {
        let Life::Running(running) = &mut self.life else {
            return;
        };
        match vm::reconnect(&self.shared, &self.dir, &self.record, running).await {
            Ok(()) => {
                tracing::info!(sandbox = %self.record.id, "a guest's network is connected again");
                self.guest.send_replace(Some(running.guest.clone()));
            }
            Err(error) => {
                tracing::debug!(sandbox = %self.record.id, %error, "cannot connect a guest's network");
                self.guest.send_replace(None);
            }
        }
    }

    async fn end_vm(&mut self) {
        if let Life::Running(running) = std::mem::replace(&mut self.life, Life::Paused) {
            running.end().await;
        }
    }

    async fn destroy(&mut self) -> Result<()> {
        self.publish(SandboxStatus::Stopping);
        self.guest.send_replace(None);
        if matches!(self.life, Life::Error) {
            // One whose journal could not be read may have a VM that nobody knows.
            super::recover::end_vmms_in(&self.dir).await;
        }
        self.end_vm().await;
        // Moved first, so that a folder is either whole or not there.
        let grave = self
            .shared
            .layout
            .tmp()
            .join(format!("destroyed-{}", uuid::Uuid::new_v4().simple()));
        std::fs::rename(self.dir.path(), &grave).at("remove", self.dir.path())?;
        self.publish(SandboxStatus::Stopped);
        self.shared.forget(self.record.id);
        if let Err(error) = remove_folder(&grave).await {
            tracing::warn!(path = %grave.display(), %error, "cannot remove a destroyed sandbox's files; the next start will");
        }
        self.shared.collect_images();
        Ok(())
    }

    fn vm_died(&mut self, exit: &crate::vmm::process::Exit) {
        let Life::Running(running) = &mut self.life else {
            return;
        };
        let said = crate::vmm::qemu::last_words(&self.dir);
        let message = if said.is_empty() {
            format!("the virtual machine ended unexpectedly ({exit})")
        } else {
            format!("the virtual machine ended unexpectedly ({exit}): {said}")
        };
        let console = running.console.tail();
        tracing::warn!(sandbox = %self.record.id, %exit, "a VM died");
        self.lost(message, console);
    }

    /// The VM is gone, and with it the sandbox's memory.
    fn lost(&mut self, message: String, console: String) {
        self.guest.send_replace(None);
        self.take_back();
        self.record.phase = Phase::Error { message, console };
        self.life = Life::Error;
        if let Err(error) = self.record.write(&self.dir) {
            tracing::error!(sandbox = %self.record.id, error = &error as &dyn std::error::Error, "journal");
        }
        self.publish(SandboxStatus::Error);
        self.tell("vmm_exited");
    }

    /// Tells the control plane what happened by itself.
    fn tell(&self, reason: &'static str) {
        self.shared.emit(Event {
            view: self.current(),
            reason,
        });
    }

    /// When the sandbox has been idle long enough.
    fn expiry(&self) -> Option<tokio::time::Instant> {
        let Life::Running(_) = self.life else { return None };
        if self.record.timeout_sec == 0 {
            return None;
        }
        Some(self.activity.idle_since() + Duration::from_secs(u64::from(self.record.timeout_sec)))
    }

    async fn expire(&mut self) {
        // It may have been used since the clock was set.
        if self
            .expiry()
            .is_none_or(|expiry| expiry > tokio::time::Instant::now())
        {
            return;
        }
        if self.activity.busy() {
            self.activity.touch();
            return;
        }
        tracing::info!(sandbox = %self.record.id, timeout_sec = self.record.timeout_sec, "idle; pausing");
        match self.pause().await {
            Ok(()) => self.tell("ttl_expired"),
            Err(error) => {
                tracing::error!(
                    sandbox = %self.record.id,
                    error = &error as &dyn std::error::Error,
                    "cannot pause an idle sandbox; trying again after another idle time"
                );
                self.activity.touch();
            }
        }
    }

    fn sample(&self) {
        let Life::Running(running) = &self.life else {
            return;
        };
        let (guest, samples) = (running.guest.clone(), Arc::clone(&self.samples));
        self.shared.tasks.spawn(async move {
            if let Ok(Ok(metrics)) = tokio::time::timeout(Duration::from_secs(5), guest.metrics()).await {
                samples.push(&metrics);
            }
        });
    }
}

/// What a VM does that nobody asked for.
enum News {
    Exit(crate::vmm::process::Exit),
    NetworkBroken,
}

async fn vm_news(life: &mut Life) -> News {
    let Life::Running(running) = life else {
        return std::future::pending().await;
    };
    let Running { vm, wire, .. } = running.as_mut();
    tokio::select! {
        biased;
        exit = vm.exited() => News::Exit(exit),
        () = wire.broken() => News::NetworkBroken,
    }
}

async fn sleep_until(instant: Option<tokio::time::Instant>) {
    match instant {
        Some(instant) => tokio::time::sleep_until(instant).await,
        None => std::future::pending().await,
    }
}
