//! A running control plane with a simulated host, for tests over real HTTP.
#![allow(dead_code, reason = "each test binary uses its part")]

use std::time::Duration;

use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use wrenn_control::config::PasswordCost;
use wrenn_control::{Bootstrap, ControlConfig, ControlPlane, MasterSecret};
use wrenn_proto::id::SandboxId;
use wrenn_testkit::servers::Postgres;
use wrenn_testkit::simhost::SimHost;

/// Longest that anything in these tests may take.
pub const DEADLINE: Duration = Duration::from_secs(100);

/// All suites run a second time, in the binary of this name: there on PostgreSQL.
const ON_POSTGRES: bool = matches!(env!("CARGO_CRATE_NAME").as_bytes(), b"postgres");

/// A server of this test's own, where tests run on PostgreSQL.
pub fn postgres() -> Option<Postgres> {
    ON_POSTGRES.then(Postgres::start)
}

/// Passwords that are hashed at once.
pub const CHEAP: PasswordCost = PasswordCost {
    memory_kib: 64,
    passes: 1,
};

/// One running control plane.
pub struct Running {
    pub control: ControlPlane,
    pub url: String,
    stop: Option<oneshot::Sender<()>>,
    served: JoinHandle<wrenn_control::Result<()>>,
}

/// A control plane, a host and a team.
pub struct World {
    pub running: Running,
    pub host: SimHost,
    pub key: String,
    pub bootstrap: Bootstrap,
    pub http: reqwest::Client,
    pub config: ControlConfig,
    // Last, so that they outlive what uses them.
    pub postgres: Option<Postgres>,
    _dir: tempfile::TempDir,
}

pub async fn start(config: ControlConfig) -> Running {
    let control = ControlPlane::builder(config)
        .build()
        .await
        .expect("the control plane builds");
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let url = format!("http://{}", listener.local_addr().expect("bound"));
    let (stop, stopped) = oneshot::channel();
    let served = tokio::spawn(control.clone().run(vec![listener], async move {
        let _ = stopped.await;
    }));
    Running {
        control,
        url,
        stop: Some(stop),
        served,
    }
}

impl Running {
    pub async fn stop(mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
        tokio::time::timeout(DEADLINE, self.served)
            .await
            .expect("shutdown ends")
            .expect("no panic")
            .expect("a clean end");
    }
}

impl World {
    /// With the template ready on the host.
    pub async fn new() -> Self {
        let world = Self::cold().await;
        world.host.heartbeat().await;
        world
    }

    /// With a registered host that has not sent a heartbeat yet.
    pub async fn cold() -> Self {
        Self::cold_on(postgres(), None).await
    }

    /// With the template ready, on these servers.
    pub async fn on(postgres: Postgres, redis_url: Option<String>) -> Self {
        let world = Self::cold_on(Some(postgres), redis_url).await;
        world.host.heartbeat().await;
        world
    }

    async fn cold_on(postgres: Option<Postgres>, redis_url: Option<String>) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let mut config = ControlConfig::new(dir.path());
        config.database_url = postgres.as_ref().map(Postgres::url);
        config.redis_url = redis_url;
        config.secret = Some(MasterSecret::generate().expect("randomness"));
        // The tests step the monitor by hand.
        config.timings.monitor_interval = Duration::from_secs(3600);
        config.timings.housekeeping_interval = Duration::from_secs(3600);
        config.around.sandbox_metrics_interval = Duration::from_secs(1_000_000_000);
        config.password_cost = CHEAP;
        config.timings.transient_age = Duration::ZERO;
        config.timings.orphan_grace = Duration::ZERO;
        config.timings.stranger_grace = Duration::ZERO;
        config.timings.shutdown_grace = Duration::from_millis(200);
        config.timings.pty_ping = Duration::from_millis(300);
        config.timings.stream_keepalive = Duration::from_millis(300);
        config.timings.recheck = Duration::from_millis(200);
        config.log_links = true;
        // Simulated hosts are on this machine, those that teams bring too.
        config.allow_private_byoc = true;
        config.timings.lease = Duration::from_millis(1500);
        // What a killed instance had taken is somebody else's soon.
        config.timings.event_claim = Duration::from_secs(1);
        config.timings.event_repeat = Duration::from_secs(5);
        let running = start(config.clone()).await;
        let bootstrap = running
            .control
            .bootstrap()
            .await
            .expect("bootstrap")
            .expect("the first start");
        let token = running.control.issue_host_token(None).await.expect("a token");
        let mut host = SimHost::start(&running.url).await;
        host.register(&token.token).await;
        Self {
            running,
            host,
            key: bootstrap.api_key.clone(),
            bootstrap,
            http: reqwest::Client::new(),
            config,
            postgres,
            _dir: dir,
        }
    }

    /// Stops the control plane as a crash would: operations under way are dropped where they are.
    pub async fn restart(self) -> Self {
        self.restart_with(|_| {}).await
    }

    pub async fn restart_with(self, change: impl FnOnce(&mut ControlConfig)) -> Self {
        let Self {
            running,
            mut host,
            key,
            bootstrap,
            http,
            mut config,
            postgres,
            _dir,
        } = self;
        running.stop().await;
        change(&mut config);
        let running = start(config.clone()).await;
        host.set_control(&running.url);
        Self {
            running,
            host,
            key,
            bootstrap,
            http,
            config,
            postgres,
            _dir,
        }
    }

    /// A folder that goes with the world.
    pub fn dir(&self) -> &std::path::Path {
        self._dir.path()
    }

    /// The settings, for a second control plane on the same database.
    pub fn config(&self) -> ControlConfig {
        self.config.clone()
    }

    /// The database, to look at what the API does not show.
    pub async fn database(&self) -> sea_orm::DatabaseConnection {
        let file = || format!("sqlite://{}", self.config.data_dir.join("control.db").display());
        let url = self.config.database_url.clone().unwrap_or_else(file);
        sea_orm::Database::connect(url).await.expect("the database")
    }

    pub fn url(&self, path: &str) -> String {
        format!("{}{path}", self.running.url)
    }

    pub fn request(&self, method: &str, path: &str) -> reqwest::RequestBuilder {
        let method = reqwest::Method::from_bytes(method.as_bytes()).expect("a method");
        self.http
            .request(method, self.url(path))
            .header("x-api-key", &self.key)
            .timeout(DEADLINE)
    }

    /// Sends a request; returns the status and the JSON body (or null).
    pub async fn call(&self, method: &str, path: &str, body: Option<Value>) -> (u16, Value) {
        let mut request = self.request(method, path);
        if let Some(body) = body {
            request = request.json(&body);
        }
        answer(request).await
    }

    pub async fn get(&self, path: &str) -> (u16, Value) {
        self.call("GET", path, None).await
    }

    pub async fn post(&self, path: &str, body: Value) -> (u16, Value) {
        self.call("POST", path, Some(body)).await
    }

    /// A sandbox that runs.
    pub async fn sandbox(&self) -> String {
        let (status, body) = self.post("/v1/sandboxes?wait=20", json!({})).await;
        assert_eq!(
            (status, body["status"].as_str()),
            (201, Some("running")),
            "{body}"
        );
        body["id"].as_str().expect("an id").to_owned()
    }

    /// Waits until a sandbox settles and returns its status.
    pub async fn settled(&self, id: &str) -> String {
        let (status, body) = self.get(&format!("/v1/sandboxes/{id}?wait=20")).await;
        assert_eq!(status, 200, "{body}");
        body["status"].as_str().expect("a status").to_owned()
    }

    /// Waits until a sandbox has a status, whatever it goes through before.
    pub async fn until(&self, id: &str, status: &str) -> Value {
        let deadline = tokio::time::Instant::now() + DEADLINE;
        loop {
            let (_, body) = self.get(&format!("/v1/sandboxes/{id}?wait=1")).await;
            if body["status"] == status {
                return body;
            }
            assert!(tokio::time::Instant::now() < deadline, "never {status}: {body}");
            tokio::task::yield_now().await;
        }
    }
}

pub fn id(text: &str) -> SandboxId {
    text.parse().expect("a sandbox id")
}

/// Sends a request; returns the status and the JSON body (or null). An answer that the document does not describe fails
/// the test.
pub async fn answer(request: reqwest::RequestBuilder) -> (u16, Value) {
    let (client, request) = request.build_split();
    let request = request.expect("a request");
    let (method, url) = (request.method().clone(), request.url().clone());
    let response = client.execute(request).await.expect("an answer");
    let status = response.status().as_u16();
    described(&method, url.path(), status);
    let text = response.text().await.expect("a body");
    (status, serde_json::from_str(&text).unwrap_or(Value::Null))
}

/// Fails for a status that the document does not have for this request.
pub fn described(method: &reqwest::Method, path: &str, status: u16) {
    static DOCUMENT: std::sync::LazyLock<Value> = std::sync::LazyLock::new(|| {
        let text = wrenn_control::openapi_json().expect("a document");
        serde_json::from_str(&text).expect("JSON")
    });
    let segments: Vec<&str> = path.split('/').collect();
    let paths = DOCUMENT["paths"].as_object().expect("paths");
    let fits = |route: &&String| {
        let route: Vec<&str> = route.split('/').collect();
        route.len() == segments.len()
            && route
                .iter()
                .zip(&segments)
                .all(|(wanted, given)| wanted == given || wanted.starts_with('{') && !given.is_empty())
    };
    // A word in a path is meant before a parameter.
    let route = paths
        .keys()
        .filter(fits)
        .min_by_key(|route| route.matches('{').count());
    let Some(route) = route else { return };
    let operation = &paths[route][method.as_str().to_lowercase()];
    if operation.is_null() {
        assert_eq!(
            status, 405,
            "{method} {route} is not described, and did something"
        );
        return;
    }
    assert!(
        !operation["responses"][status.to_string()].is_null(),
        "{method} {route} answered {status}, which the document does not have"
    );
}

/// A person with a session and a team of their own.
pub struct Person {
    pub id: wrenn_proto::id::UserId,
    pub email: String,
    pub token: String,
    pub team: String,
}

impl World {
    /// Somebody new.
    pub async fn person(&self, name: &str) -> Person {
        let email = format!("{name}@example.com");
        let id = self
            .running
            .control
            .create_user(&email, name, None)
            .await
            .expect("a user");
        let token = self.session(id, None).await;
        let (status, teams) = self.call_as(&token, "GET", "/v1/teams", None).await;
        assert_eq!(status, 200, "{teams}");
        let team = teams[0]["id"].as_str().expect("a team").to_owned();
        Person {
            id,
            email,
            token,
            team,
        }
    }

    /// A session of a user, in a team or their default one.
    pub async fn session(&self, user: wrenn_proto::id::UserId, team: Option<&str>) -> String {
        let team = team.map(|team| team.parse().expect("a team id"));
        self.running
            .control
            .issue_session(user, team)
            .await
            .expect("a session")
    }

    /// Sends a request with a session.
    pub async fn call_as(&self, token: &str, method: &str, path: &str, body: Option<Value>) -> (u16, Value) {
        let method = reqwest::Method::from_bytes(method.as_bytes()).expect("a method");
        let mut request = self
            .http
            .request(method, self.url(path))
            .bearer_auth(token)
            .timeout(DEADLINE);
        if let Some(body) = body {
            request = request.json(&body);
        }
        answer(request).await
    }
}

/// The code of an error body.
pub fn code(body: &Value) -> &str {
    body["error"]["code"].as_str().unwrap_or_default()
}

/// The text of an error body.
pub fn message(body: &Value) -> &str {
    body["error"]["message"].as_str().unwrap_or_default()
}
