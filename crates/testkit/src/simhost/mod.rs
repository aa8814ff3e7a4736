//! A simulated host: the real Connect RPC over a model in memory, stepped by the test.
//!
//! Every call of a [`Call`] kind passes a gate first. A test can hold the gate (calls wait in front of
//! it), wait until a call has arrived, make the next call fail with a chosen error, and cut the host off
//! the network. Nothing here sleeps.

mod model;
mod rpc;

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use connectrpc::{ConnectError, ConnectRpcService, Limits, Router};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use wrenn_proto::id::{SandboxId, TemplateId};
use wrenn_proto::rest;

pub use model::{Model, SimSandbox, SimState};

/// Longest wait for a call: far more than any takes on a busy machine.
const ARRIVAL_LIMIT: Duration = Duration::from_secs(120);

/// The calls that pass a gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "named like the RPCs")]
pub enum Call {
    Create,
    Destroy,
    Pause,
    Resume,
    Get,
    List,
    Ping,
    Exec,
    Start,
    Write,
    Read,
    CreateSnapshot,
    DeleteSnapshot,
    Metrics,
    ListMetrics,
    Other,
}

#[derive(Debug, Default)]
struct Gate {
    held: bool,
    arrived: usize,
    failures: VecDeque<ConnectError>,
}

pub(crate) struct Shared {
    pub(crate) model: Mutex<Model>,
    gates: watch::Sender<HashMap<Call, Gate>>,
    rpc_token: Mutex<Option<String>>,
}

impl Shared {
    pub(crate) fn model(&self) -> std::sync::MutexGuard<'_, Model> {
        self.model.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Checks the caller's token, counts the call, waits while the gate is held, and fails if told so.
    pub(crate) async fn pass(
        &self,
        call: Call,
        ctx: &connectrpc::RequestContext,
    ) -> Result<(), ConnectError> {
        let expected = self
            .rpc_token
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let given = ctx
            .header("authorization")
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default();
        if expected.is_none_or(|token| given != format!("Bearer {token}")) {
            return Err(ConnectError::unauthenticated("wrong token"));
        }
        self.gates
            .send_modify(|gates| gates.entry(call).or_default().arrived += 1);
        let mut gates = self.gates.subscribe();
        let held = |gates: &HashMap<Call, Gate>| gates.get(&call).is_some_and(|gate| gate.held);
        let _ = gates.wait_for(|gates| !held(gates)).await;
        drop(gates);
        let mut failure = None;
        self.gates
            .send_modify(|gates| failure = gates.entry(call).or_default().failures.pop_front());
        failure.map_or(Ok(()), Err)
    }
}

/// A simulated host.
pub struct SimHost {
    shared: Arc<Shared>,
    address: std::net::SocketAddr,
    server: Option<JoinHandle<()>>,
    http: reqwest::Client,
    control: String,
    tokens: Option<rest::RegisteredHost>,
}

impl std::fmt::Debug for SimHost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SimHost")
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

impl Drop for SimHost {
    fn drop(&mut self) {
        self.disconnect();
    }
}

impl SimHost {
    /// Starts to serve on a free loopback port, for a control plane at this URL.
    ///
    /// # Panics
    /// No port can be bound.
    pub async fn start(control: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let shared = Arc::new(Shared {
            model: Mutex::default(),
            gates: watch::channel(HashMap::new()).0,
            rpc_token: Mutex::new(None),
        });
        let server = Some(tokio::spawn(serve(listener, Arc::clone(&shared))));
        let http = reqwest::Client::new();
        Self {
            shared,
            address,
            server,
            http,
            control: control.to_owned(),
            tokens: None,
        }
    }

    /// Where it serves.
    #[must_use]
    pub fn address(&self) -> std::net::SocketAddr {
        self.address
    }

    /// Where the control plane is; changes when a test restarts it.
    pub fn set_control(&mut self, control: &str) {
        control.clone_into(&mut self.control);
    }

    /// Registers with a one-time token, as a real agent does.
    ///
    /// # Panics
    /// The control plane refuses.
    pub async fn register(&mut self, token: &str) {
        let body = rest::RegisterHost {
            token: token.to_owned(),
            arch: "x86_64".to_owned(),
            cpu_cores: 64,
            memory_mb: 8192,
            disk_gb: 100,
            address: format!("http://{}", self.address),
        };
        let response = self
            .http
            .post(format!("{}/v1/hosts/register", self.control))
            .json(&body)
            .send()
            .await;
        let response = response.expect("the control plane answers");
        assert_eq!(response.status(), 201, "registration");
        let tokens: rest::RegisteredHost = response.json().await.expect("tokens");
        *self
            .shared
            .rpc_token
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(tokens.rpc_token.clone());
        self.tokens = Some(tokens);
    }

    /// The host's id and secrets.
    ///
    /// # Panics
    /// Not registered.
    #[must_use]
    pub fn tokens(&self) -> &rest::RegisteredHost {
        self.tokens.as_ref().expect("registered")
    }

    /// Sends a heartbeat with the `minimal` template ready and plenty of room.
    pub async fn heartbeat(&self) {
        self.heartbeat_with(8192, rest::TemplateStatus::Ready).await;
    }

    /// Sends a heartbeat with this much free memory and the `minimal` template in this state.
    pub async fn heartbeat_with(&self, memory_available_mb: u64, minimal: rest::TemplateStatus) {
        let ready = minimal == rest::TemplateStatus::Ready;
        let template = rest::HostTemplate {
            id: TemplateId::MINIMAL.to_string(),
            status: minimal,
            detail: if ready {
                String::new()
            } else {
                "installing packages".to_owned()
            },
            progress_pct: if ready { 100 } else { 42 },
            size_bytes: 1 << 20,
        };
        self.tell(|beat| {
            beat.memory_available_mb = memory_available_mb;
            beat.templates = vec![template];
        })
        .await;
    }

    /// Sends a heartbeat that says nothing of templates and of plenty of room, as the test changes it.
    ///
    /// # Panics
    /// The control plane refuses.
    pub async fn tell(&self, change: impl FnOnce(&mut rest::Heartbeat)) {
        let mut body = rest::Heartbeat {
            version: "sim".to_owned(),
            memory_available_mb: 8192,
            disk_available_mb: 100_000,
            ..rest::Heartbeat::default()
        };
        change(&mut body);
        let url = format!("{}/v1/hosts/{}/heartbeat", self.control, self.tokens().host_id);
        let response = self
            .http
            .post(url)
            .bearer_auth(&self.tokens().token)
            .json(&body)
            .send()
            .await;
        assert_eq!(
            response.expect("the control plane answers").status(),
            204,
            "heartbeat"
        );
    }

    /// Reports a change that happened by itself.
    ///
    /// # Panics
    /// The control plane refuses.
    pub async fn event(&self, id: SandboxId, generation: u64, status: rest::SandboxStatus, reason: &str) {
        let error = (status == rest::SandboxStatus::Error).then(|| rest::SandboxFailure {
            message: "the VM died".to_owned(),
            console: Some("kernel panic".to_owned()),
        });
        let event = rest::SandboxEvent {
            sandbox_id: id.to_string(),
            generation,
            status,
            reason: reason.to_owned(),
            error,
            at_ms: 0,
        };
        let body = rest::SandboxEvents { events: vec![event] };
        let url = format!("{}/v1/hosts/sandbox-events", self.control);
        let response = self
            .http
            .post(url)
            .bearer_auth(&self.tokens().token)
            .json(&body)
            .send()
            .await;
        assert_eq!(
            response.expect("the control plane answers").status(),
            204,
            "events"
        );
    }

    /// Looks at the model, or changes it.
    pub fn with<T>(&self, look: impl FnOnce(&mut Model) -> T) -> T {
        look(&mut self.shared.model())
    }

    /// Lets calls of this kind wait.
    pub fn hold(&self, call: Call) {
        self.shared
            .gates
            .send_modify(|gates| gates.entry(call).or_default().held = true);
    }

    /// Lets them go on.
    pub fn release(&self, call: Call) {
        self.shared
            .gates
            .send_modify(|gates| gates.entry(call).or_default().held = false);
    }

    /// Makes the next call of this kind fail, before it does anything.
    pub fn fail(&self, call: Call, error: ConnectError) {
        self.shared
            .gates
            .send_modify(|gates| gates.entry(call).or_default().failures.push_back(error));
    }

    /// How many calls of this kind have arrived.
    #[must_use]
    pub fn arrived(&self, call: Call) -> usize {
        self.shared
            .gates
            .borrow()
            .get(&call)
            .map_or(0, |gate| gate.arrived)
    }

    /// Waits until this many calls of a kind have arrived.
    ///
    /// # Panics
    /// When they do not.
    pub async fn wait_arrived(&self, call: Call, count: usize) {
        let mut gates = self.shared.gates.subscribe();
        let enough = |gates: &HashMap<Call, Gate>| gates.get(&call).is_some_and(|gate| gate.arrived >= count);
        let enough = gates.wait_for(enough);
        assert!(
            tokio::time::timeout(ARRIVAL_LIMIT, enough).await.is_ok(),
            "{call:?} did not arrive {count} times within {ARRIVAL_LIMIT:?}"
        );
    }

    /// Cuts the host off: the port is closed, open connections break.
    pub fn disconnect(&mut self) {
        if let Some(server) = self.server.take() {
            server.abort();
        }
    }

    /// Brings it back at the same address.
    ///
    /// # Panics
    /// The port is taken.
    pub async fn reconnect(&mut self) {
        self.disconnect();
        // The aborted server's socket closes when its task is dropped, which is about now.
        let listener = loop {
            match TcpListener::bind(self.address).await {
                Ok(listener) => break listener,
                Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => tokio::task::yield_now().await,
                Err(error) => panic!("cannot bind {}: {error}", self.address),
            }
        };
        self.server = Some(tokio::spawn(serve(listener, Arc::clone(&self.shared))));
    }
}

async fn serve(listener: TcpListener, shared: Arc<Shared>) {
    let agent = rpc::Agent { shared };
    let limits = Limits::default().with_max_request_body_size(usize::MAX);
    let service = ConnectRpcService::new(Router::new().add_service(Arc::new(agent))).with_limits(limits);
    let app = axum::Router::new().fallback_service(service);
    // Dropped with this task, and the connections with it.
    let mut connections = JoinSet::new();
    while let Ok((socket, _)) = listener.accept().await {
        let service = TowerToHyperService::new(app.clone());
        connections.spawn(async move {
            let server = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
            let _ = server.serve_connection(TokioIo::new(socket), service).await;
        });
        while connections.try_join_next().is_some() {}
    }
}
