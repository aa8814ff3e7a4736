//! The host agent as a whole: what it is configured with, how it starts, serves and ends.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use axum::http::{HeaderMap, StatusCode, header};
use axum::response::IntoResponse as _;
use tokio_util::sync::CancellationToken;
use wrenn_proto::hostagent::HostAgentExt as _;

use crate::error::{HostError, IoContext as _, Result};
use crate::layout::Layout;
use crate::manager::slots::Slots;
use crate::manager::{Capacity, FaultHook, Manager, Parts};
use crate::net::EgressPolicy;
use crate::register::Reporter;
use crate::rpc::Service;
use crate::template::{BuildState, DebianMirror, TemplateStore};
use crate::vmm::{Accelerator, MemoryCgroup, Qemu, VmIds};

/// What a host agent is started with.
#[derive(Clone)]
pub struct HostConfig {
    /// Holds everything that must last.
    pub data_dir: PathBuf,
    /// Holds what can be made again.
    pub cache_dir: PathBuf,
    /// Address of the RPC server; port 0 lets the system choose.
    pub listen: SocketAddr,
    /// Where the control plane reaches the RPC server, when that differs from `listen`.
    pub advertise: Option<String>,
    /// Base URL of the control plane.
    pub control_plane: String,
    /// One-time token for a host that is not registered yet.
    pub registration_token: Option<String>,
    /// How guests run: the verdict of a probe.
    pub accelerator: Accelerator,
    /// What the guests may reach.
    pub egress: EgressPolicy,
    /// What the host may use.
    pub capacity: Capacity,
    /// PEM bundle that guests of the built-in template trust instead of Debian's.
    pub guest_ca_bundle: Option<PathBuf>,
    /// Where the built-in template's packages come from, other than the machine's own settings say.
    pub debian_mirror: Option<DebianMirror>,
    /// When running as root: the ids of VM processes.
    pub vm_ids: VmIds,
    /// Virtual machines of the built-in template that wait, restored and warm, for the next creates.
    pub pool: usize,
    /// Breaks operations at a step. Tests only.
    pub fault: Option<FaultHook>,
}

/// What becomes of running sandboxes when the agent ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnExit {
    /// They are saved with their memory.
    Pause,
    /// They run on; the next agent finds them.
    Keep,
}

/// A running host agent.
pub struct HostAgent {
    manager: Manager,
    address: SocketAddr,
    stop_reporting: CancellationToken,
    reporting: tokio::task::JoinHandle<()>,
    serving: tokio::task::JoinHandle<()>,
    preparing: tokio::task::JoinHandle<()>,
    ready_told: tokio::sync::watch::Receiver<bool>,
    _lock: std::fs::File,
}

impl HostAgent {
    /// Takes over what an earlier agent left, serves, registers, and begins to make the built-in template.
    ///
    /// # Errors
    /// When QEMU is unusable, the data directory is not, or another agent holds it, or the host cannot register.
    pub async fn start(config: HostConfig) -> Result<Self> {
        let layout = Layout::create(&config.data_dir, &config.cache_dir).at("prepare", &config.data_dir)?;
        let lock = lock(&layout)?;
        let root = rustix::process::geteuid().is_root();
        let vm_ids = root.then_some(config.vm_ids);
        let qemu = Arc::new(Qemu::find(config.accelerator, MemoryCgroup::detect(), vm_ids)?);
        let slots = Slots::new(config.capacity.max_vms);
        let templates = Arc::new(TemplateStore::new(
            layout.clone(),
            Arc::clone(&qemu),
            Arc::clone(&slots),
            config.guest_ca_bundle.clone(),
            config.debian_mirror.clone(),
        )?);
        let (manager, events) = Manager::new(Parts {
            layout,
            qemu,
            templates,
            slots,
            policy: config.egress.clone(),
            capacity: config.capacity,
            pool: config.pool,
            fault: config.fault.clone(),
        });
        manager.recover().await?;

        // The control plane calls back as soon as the host is registered, so the port comes first.
        let listener = tokio::net::TcpListener::bind(config.listen)
            .await
            .map_err(|error| HostError::InvalidArgument {
                field: "host agent address",
                message: format!(
                    "cannot listen on {}: {error}; choose another with --agent-listen",
                    config.listen
                ),
            })?;
        let address = listener
            .local_addr()
            .map_err(|error| HostError::Vmm(error.to_string()))?;
        let advertised = config
            .advertise
            .clone()
            .unwrap_or_else(|| format!("http://{address}"));
        let reporter = Reporter::connect(
            manager.clone(),
            config.control_plane.trim_end_matches('/'),
            config.registration_token.as_deref(),
            &advertised,
        )
        .await?;
        let app = router(manager.clone(), reporter.rpc_token());
        let serving = tokio::spawn(async move {
            if let Err(error) = axum::serve(listener, app).await {
                tracing::error!(%error, "the host agent's server ended");
            }
        });
        let ready_told = reporter.ready_told();
        let stop_reporting = CancellationToken::new();
        let reporting = tokio::spawn(reporter.run(events, stop_reporting.clone()));
        let preparing = tokio::spawn({
            let manager = manager.clone();
            async move { manager.prepare().await }
        });
        Ok(Self {
            manager,
            address,
            stop_reporting,
            reporting,
            serving,
            preparing,
            ready_told,
            _lock: lock,
        })
    }

    /// Where the RPC server listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// How far the built-in template is.
    #[must_use]
    pub fn template_progress(&self) -> tokio::sync::watch::Receiver<BuildState> {
        self.manager.shared.templates.minimal.subscribe()
    }

    /// Whether the control plane knows that the built-in template is ready, so that it accepts creates.
    #[must_use]
    pub fn template_ready_told(&self) -> tokio::sync::watch::Receiver<bool> {
        self.ready_told.clone()
    }

    /// Ends the agent. `told` hears how many of how many running sandboxes have been dealt with.
    pub async fn shutdown(self, on_exit: OnExit, told: impl Fn(usize, usize)) {
        self.preparing.abort();
        let _ = self.preparing.await;
        // Streams into guests would keep a graceful end waiting for ever.
        self.serving.abort();
        self.manager.retire(on_exit == OnExit::Pause, told).await;
        // Last, so that what the shutdown did is still told.
        self.stop_reporting.cancel();
        let _ = tokio::time::timeout(std::time::Duration::from_secs(5), self.reporting).await;
    }
}

/// One agent per data directory: two would fight over the same VMs.
fn lock(layout: &Layout) -> Result<std::fs::File> {
    let path = layout.data().join("host.lock");
    let file = std::fs::File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .at("open", &path)?;
    file.try_lock().map_err(|_| HostError::InvalidArgument {
        field: "data_dir",
        message: format!(
            "another host agent uses {} already; stop it, or choose another --data-dir",
            layout.data().display()
        ),
    })?;
    Ok(file)
}

fn router(manager: Manager, token: &str) -> axum::Router {
    let service = std::sync::Arc::new(Service { manager }).register(connectrpc::Router::new());
    let limits = connectrpc::Limits::unlimited().with_max_message_size(64 << 20);
    let expected = format!("Bearer {token}");
    let service = connectrpc::ConnectRpcService::new(service).with_limits(limits);
    axum::Router::new().fallback_service(service).layer(axum::middleware::from_fn(
        move |headers: HeaderMap, request: axum::extract::Request, next: axum::middleware::Next| {
            let given = headers.get(header::AUTHORIZATION).map(|value| value.as_bytes().to_vec()).unwrap_or_default();
            let allowed = constant_time_eq(&given, expected.as_bytes());
            async move {
                if allowed {
                    return next.run(request).await;
                }
                let body =
                    r#"{"code":"unauthenticated","message":"the host agent takes calls of its control plane only"}"#;
                (StatusCode::UNAUTHORIZED, [(header::CONTENT_TYPE, "application/json")], body).into_response()
            }
        },
    ))
}

/// Compares without telling by its time where two secrets differ.
fn constant_time_eq(a: &[u8], b: &[u8]) -> bool {
    use sha2::Digest as _;
    // Digests have one length, so nothing depends on the inputs' lengths.
    let (a, b) = (sha2::Sha256::digest(a), sha2::Sha256::digest(b));
    a.iter()
        .zip(b.iter())
        .fold(0, |difference, (x, y)| difference | (x ^ y))
        == 0
}
