//! The agent's side of being a host: it registers once with a one-time token, then keeps telling that it lives and
//! what happened by itself. The control plane calls back over RPC.

use std::collections::VecDeque;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use wrenn_proto::rest;

use crate::error::{HostError, IoContext as _, Result};
use crate::layout::write_private;
use crate::manager::journal::Phase;
use crate::manager::{Event, Manager};
use crate::template::BuildState;

const HEARTBEAT_EVERY: Duration = Duration::from_secs(20);
const CALL_LIMIT: Duration = Duration::from_secs(15);
/// Events in one call.
const MAX_BATCH: usize = 500;
/// Bytes of failure texts in one call, well below what the control plane takes as one body.
const MAX_BATCH_TEXT: usize = 128 * 1024;

/// What a registered host knows of itself; kept in a file that only the agent reads.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Registration {
    pub(crate) host_id: String,
    pub(crate) control_plane: String,
    pub(crate) token: String,
    pub(crate) refresh_token: String,
    pub(crate) rpc_token: String,
}

impl Registration {
    /// `None` when the host has never been registered.
    fn read(path: &Path) -> Result<Option<Self>> {
        let bytes = match std::fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).at("read the registration", path),
        };
        serde_json::from_slice(&bytes).map(Some).map_err(|error| {
            HostError::Vmm(format!(
                "the registration in {} is damaged ({error}); restore the file, or remove it and register again with a \
                 token made for this host (wrenn control-plane --issue-host-token --host ID)",
                path.display()
            ))
        })
    }

    fn write(&self, path: &Path) -> Result<()> {
        write_private(path, self)
    }
}

/// The id under which the agent of this data directory is registered, if it is.
///
/// # Errors
/// The registration is there and cannot be read.
pub fn registered_host(data_dir: &Path) -> Result<Option<String>> {
    let registration = Registration::read(&data_dir.join(crate::layout::REGISTRATION))?;
    Ok(registration.map(|registration| registration.host_id))
}

/// Speaks to the control plane.
pub(crate) struct Reporter {
    http: reqwest::Client,
    registration: Registration,
    manager: Manager,
    address: String,
    /// Whether the control plane has heard that the built-in template is ready.
    ready_told: watch::Sender<bool>,
    /// The most events that go into one call.
    batch: usize,
}

/// Why a call to the control plane failed, by what to do about it.
#[derive(Debug)]
enum CallError {
    /// The token is not, or no longer, good.
    Unauthorized,
    /// The control plane does not take this body, now or later.
    Refused(String),
    /// Try again later.
    Later(String),
}

impl Reporter {
    /// Finds the host's registration, or registers with `token` at `control_plane`; `address` is where the control
    /// plane reaches this agent.
    pub(crate) async fn connect(
        manager: Manager,
        control_plane: &str,
        token: Option<&str>,
        address: &str,
    ) -> Result<Self> {
        let http = reqwest::Client::builder()
            .timeout(CALL_LIMIT)
            .no_proxy()
            .build()
            .map_err(|error| HostError::Vmm(format!("cannot make an HTTP client: {error}")))?;
        let path = manager.shared.layout.registration();
        let mut host = None;
        if let Some(mut registration) = Registration::read(&path)? {
            host = Some(registration.host_id.clone());
            // The control plane may have moved: a host is known by its id and its token, not by where it asks.
            let moved = registration.control_plane != control_plane;
            control_plane.clone_into(&mut registration.control_plane);
            let mut reporter = Self {
                http: http.clone(),
                registration,
                manager: manager.clone(),
                address: address.to_owned(),
                ready_told: watch::Sender::new(false),
                batch: MAX_BATCH,
            };
            let refused = match reporter.heartbeat().await {
                Err(CallError::Unauthorized) => reporter.refresh().await.is_err(),
                Ok(()) if moved => {
                    reporter.registration.write(&path)?;
                    false
                }
                _ => false,
            };
            if !refused {
                return Ok(reporter);
            }
            if token.is_some() {
                tracing::warn!("the control plane does not know this host any more; registering anew");
            } else if !moved {
                // It may be known again later; until then it serves what it has.
                return Ok(reporter);
            }
        }
        let Some(token) = token else {
            return Err(HostError::InvalidArgument {
                field: "registration token",
                message: match host {
                    Some(host) => format!(
                        "{control_plane} does not know this host: pass a one-time token made there for it (--token; \
                         wrenn control-plane --issue-host-token --host {host})"
                    ),
                    None => format!(
                        "this host is not registered with {control_plane}: pass a one-time token made there (--token)"
                    ),
                },
            });
        };
        let registration = register(&http, &manager, control_plane, token, address).await?;
        registration.write(&path)?;
        tracing::info!(host = registration.host_id, control_plane, "registered");
        Ok(Self {
            http,
            registration,
            manager,
            address: address.to_owned(),
            ready_told: watch::Sender::new(false),
            batch: MAX_BATCH,
        })
    }

    pub(crate) fn rpc_token(&self) -> &str {
        &self.registration.rpc_token
    }

    pub(crate) fn ready_told(&self) -> watch::Receiver<bool> {
        self.ready_told.subscribe()
    }

    async fn call(&self, path: &str, body: &impl Serialize) -> std::result::Result<(), CallError> {
        let answer = self
            .http
            .post(format!("{}{path}", self.registration.control_plane))
            .bearer_auth(&self.registration.token)
            .json(body)
            .send()
            .await
            .map_err(|error| CallError::Later(error.to_string()))?;
        match answer.status() {
            status if status.is_success() => Ok(()),
            reqwest::StatusCode::UNAUTHORIZED
            | reqwest::StatusCode::FORBIDDEN
            | reqwest::StatusCode::NOT_FOUND => Err(CallError::Unauthorized),
            status @ (reqwest::StatusCode::BAD_REQUEST
            | reqwest::StatusCode::PAYLOAD_TOO_LARGE
            | reqwest::StatusCode::UNPROCESSABLE_ENTITY) => {
                Err(CallError::Refused(format!("answered {status}")))
            }
            status => Err(CallError::Later(format!("answered {status}"))),
        }
    }

    async fn heartbeat(&self) -> std::result::Result<(), CallError> {
        let shared = &self.manager.shared;
        let build = shared.templates.minimal.subscribe().borrow().clone();
        let (status, detail, progress_pct, size_bytes) = match build {
            BuildState::Building { percent, step } => (rest::TemplateStatus::Building, step, percent, 0),
            BuildState::Ready { size_bytes } => (rest::TemplateStatus::Ready, String::new(), 100, size_bytes),
            BuildState::Failed(why) => (rest::TemplateStatus::Failed, why, 0, 0),
        };
        let body = rest::Heartbeat {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            address: Some(self.address.clone()),
            cpu_cores: Some(cpu_cores()),
            memory_mb: Some(shared.capacity.memory_mb),
            memory_available_mb: crate::manager::available_memory_mb(),
            disk_available_mb: crate::manager::available_disk_mb(&shared.layout),
            templates: vec![rest::HostTemplate {
                id: wrenn_proto::id::TemplateId::MINIMAL.to_string(),
                status,
                detail,
                progress_pct,
                size_bytes,
            }],
        };
        self.call(
            &format!("/v1/hosts/{}/heartbeat", self.registration.host_id),
            &body,
        )
        .await?;
        if status == rest::TemplateStatus::Ready {
            self.ready_told.send_replace(true);
        }
        Ok(())
    }

    async fn refresh(&mut self) -> Result<()> {
        let body = rest::RefreshHostToken {
            refresh_token: self.registration.refresh_token.clone(),
        };
        let refused = |what: String| HostError::Vmm(format!("cannot renew the host's token: {what}"));
        let answer = self
            .http
            .post(format!(
                "{}/v1/hosts/auth/refresh",
                self.registration.control_plane
            ))
            .json(&body)
            .send()
            .await
            .map_err(|error| refused(error.to_string()))?
            .error_for_status()
            .map_err(|error| refused(error.to_string()))?;
        let tokens: rest::HostTokens = answer.json().await.map_err(|error| refused(error.to_string()))?;
        self.registration.token = tokens.token;
        self.registration.refresh_token = tokens.refresh_token;
        self.registration
            .write(&self.manager.shared.layout.registration())
    }

    /// Reports until cancelled. Events are delivered in order, each until it has arrived: what happened
    /// while the control plane was away is told when it is back.
    pub(crate) async fn run(mut self, mut events: mpsc::UnboundedReceiver<Event>, stop: CancellationToken) {
        let mut beat = tokio::time::interval(HEARTBEAT_EVERY);
        beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut build = self.manager.shared.templates.minimal.subscribe();
        let mut undelivered: VecDeque<Event> = VecDeque::new();
        let mut pause = Duration::ZERO;
        let mut last_told = tokio::time::Instant::now();
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                _ = beat.tick() => self.beat().await,
                // Progress is told as it comes, but not more often than anybody looks.
                Ok(()) = build.changed() => {
                    let settled = !matches!(*build.borrow_and_update(), BuildState::Building { .. });
                    if settled || last_told.elapsed() > Duration::from_secs(1) {
                        last_told = tokio::time::Instant::now();
                        self.beat().await;
                    }
                }
                Some(event) = events.recv() => undelivered.push_back(event),
                () = tokio::time::sleep(pause), if !undelivered.is_empty() => {
                    pause = self.deliver(&mut undelivered, pause).await;
                }
            }
        }
        // What the shutdown itself caused.
        while let Ok(event) = events.try_recv() {
            undelivered.push_back(event);
        }
        if !undelivered.is_empty() {
            self.deliver(&mut undelivered, Duration::ZERO).await;
        }
    }

    async fn beat(&mut self) {
        match self.heartbeat().await {
            Ok(()) => {}
            Err(CallError::Unauthorized) => {
                if let Err(error) = self.refresh().await {
                    tracing::warn!(%error, "the control plane does not accept this host");
                }
            }
            Err(CallError::Later(why) | CallError::Refused(why)) => {
                tracing::warn!(why, "the control plane does not hear this host")
            }
        }
    }

    /// Sends waiting events in one call; returns how long to wait before the next attempt.
    async fn deliver(&mut self, waiting: &mut VecDeque<Event>, pause: Duration) -> Duration {
        let mut body = rest::SandboxEvents { events: Vec::new() };
        let mut bytes = 0;
        for event in waiting.iter().take(self.batch).map(wire) {
            // A console's last lines make an event large, and a guest chooses them.
            bytes += event.error.as_ref().map_or(0, |error| {
                error.message.len() + error.console.as_ref().map_or(0, String::len)
            });
            if bytes > MAX_BATCH_TEXT && !body.events.is_empty() {
                break;
            }
            body.events.push(event);
        }
        let count = body.events.len();
        let wait = (pause * 2).clamp(Duration::from_millis(200), Duration::from_secs(10));
        match self.call("/v1/hosts/sandbox-events", &body).await {
            Ok(()) => {
                waiting.drain(..count);
                self.batch = MAX_BATCH;
                Duration::ZERO
            }
            // What nobody takes must not keep back what comes behind it: it is found, and told alone.
            Err(CallError::Refused(why)) if count > 1 => {
                tracing::warn!(
                    why,
                    count,
                    "the control plane refused events; sending fewer at a time"
                );
                self.batch = (count / 2).max(1);
                Duration::ZERO
            }
            Err(CallError::Refused(why)) => {
                let event = waiting.pop_front();
                let sandbox = event.map(|event| event.view.record.id.to_string());
                tracing::error!(why, sandbox, "the control plane refused an event; it is dropped");
                wait
            }
            Err(error) => {
                if matches!(error, CallError::Unauthorized) {
                    let _ = self.refresh().await;
                }
                tracing::debug!(?error, count, "events wait for the control plane");
                wait
            }
        }
    }
}

fn cpu_cores() -> u32 {
    std::thread::available_parallelism().map_or(1, |cores| u32::try_from(cores.get()).unwrap_or(u32::MAX))
}

async fn register(
    http: &reqwest::Client,
    manager: &Manager,
    control_plane: &str,
    token: &str,
    address: &str,
) -> Result<Registration> {
    let shared = &manager.shared;
    let body = rest::RegisterHost {
        token: token.to_owned(),
        arch: std::env::consts::ARCH.to_owned(),
        cpu_cores: cpu_cores(),
        memory_mb: shared.capacity.memory_mb,
        disk_gb: crate::manager::available_disk_mb(&shared.layout) / 1024,
        address: address.to_owned(),
    };
    let answer = http
        .post(format!("{control_plane}/v1/hosts/register"))
        .json(&body)
        .send()
        .await
        .map_err(|error| {
            HostError::Vmm(format!(
                "cannot reach the control plane at {control_plane}: {error}"
            ))
        })?;
    if !answer.status().is_success() {
        let status = answer.status();
        let said = answer
            .json::<rest::ErrorBody>()
            .await
            .map(|body| body.error.message)
            .unwrap_or_default();
        return Err(HostError::InvalidArgument {
            field: "registration token",
            message: format!("the control plane refused it ({status}): {said}"),
        });
    }
    let registered: rest::RegisteredHost = answer
        .json()
        .await
        .map_err(|error| HostError::Vmm(format!("the control plane's answer makes no sense: {error}")))?;
    Ok(Registration {
        host_id: registered.host_id,
        control_plane: control_plane.to_owned(),
        token: registered.token,
        refresh_token: registered.refresh_token,
        rpc_token: registered.rpc_token,
    })
}

fn wire(event: &Event) -> rest::SandboxEvent {
    let record = &event.view.record;
    let error = match &record.phase {
        Phase::Error { message, console } => Some(rest::SandboxFailure {
            message: message.clone(),
            console: (!console.is_empty()).then(|| console.clone()),
        }),
        _ => None,
    };
    rest::SandboxEvent {
        sandbox_id: record.id.to_string(),
        generation: record.generation,
        status: event.view.state,
        reason: event.reason.to_owned(),
        error,
        at_ms: crate::manager::activity::now_ms(),
    }
}
