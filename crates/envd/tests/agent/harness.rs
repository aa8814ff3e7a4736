//! Starts the agent and speaks its protocols, as small as that can be.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use reqwest::{Client, RequestBuilder, Response};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Long enough for a machine that does ten other things, short enough to fail within a test run.
pub const PATIENCE: Duration = Duration::from_secs(100);

/// A running agent; it is killed, and its processes with it, when this is dropped.
pub struct Agent {
    child: Child,
    pub dir: TempDir,
    pub port: u16,
    pub http: Client,
    pub token: Option<String>,
}

impl Agent {
    /// Starts an agent whose default user is the current one and whose working directory is `self.dir`.
    pub async fn start() -> Self {
        let agent = Self::start_bare(tempfile::tempdir().expect("a temporary directory")).await;
        agent.set_defaults().await;
        agent
    }

    /// Starts an agent that nobody has initialised; its state is kept in `dir`.
    pub async fn start_bare(dir: TempDir) -> Self {
        Self::launch(dir, Command::new(env!("CARGO_BIN_EXE_envd"))).await
    }

    /// Starts an agent that sees a file system of 1 MiB on `small`, in a mount namespace of its own, so that
    /// nothing remains of it however the test ends. `None` where that is not permitted.
    pub async fn start_with_small_disk() -> Option<Self> {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let small = dir.path().join("small");
        std::fs::create_dir(&small).expect("created");
        let wrapped = |program: &str| {
            let mut command = Command::new("unshare");
            let script = r#"mount -t tmpfs -o size=1m tmpfs "$0" && exec "$@""#;
            command
                .args(["--mount", "sh", "-c", script])
                .arg(&small)
                .arg(program);
            command
        };
        if !is_root() || !wrapped("true").status().is_ok_and(|status| status.success()) {
            return None;
        }
        let agent = Self::launch(dir, wrapped(env!("CARGO_BIN_EXE_envd"))).await;
        agent.set_defaults().await;
        Some(agent)
    }

    async fn launch(dir: TempDir, mut command: Command) -> Self {
        let port_file = dir.path().join(".port");
        let _ = std::fs::remove_file(&port_file);
        let child = command
            .args(["serve", "--listen", "127.0.0.1:0", "--port-file"])
            .arg(&port_file)
            .arg("--state-dir")
            .arg(dir.path().join(".state"))
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("the agent starts");
        let port = until("the agent listens", async || {
            std::fs::read_to_string(&port_file).ok()
        })
        .await;
        let http = Client::builder().no_proxy().build().expect("a client");
        Self {
            child,
            dir,
            port: port.parse().expect("a port"),
            http,
            token: None,
        }
    }

    async fn set_defaults(&self) {
        let settings = json!({ "defaultUser": current_user(), "defaultWorkdir": self.dir.path() });
        let answer = self
            .http
            .post(self.url("/init"))
            .json(&settings)
            .send()
            .await
            .expect("init");
        assert_eq!(answer.status(), 204);
    }

    /// Kills the agent and gives its directory back for another one.
    pub fn kill(mut self) -> TempDir {
        let _ = self.child.kill();
        let _ = self.child.wait();
        std::mem::replace(&mut self.dir, tempfile::tempdir().expect("a temporary directory"))
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn get(&self, path: &str) -> RequestBuilder {
        self.with_token(self.http.get(self.url(path)))
    }

    pub fn post(&self, path: &str) -> RequestBuilder {
        self.with_token(self.http.post(self.url(path)))
    }

    fn with_token(&self, request: RequestBuilder) -> RequestBuilder {
        match &self.token {
            Some(token) => request.header("X-Access-Token", token),
            None => request,
        }
    }

    /// A unary call, with its HTTP status.
    pub async fn call(&self, method: &str, body: Value) -> (u16, Value) {
        let request = self
            .post(&format!("/{method}"))
            .header("Connect-Protocol-Version", "1")
            .header("Content-Encoding", "identity")
            .json(&body);
        let answer = request.send().await.expect("an answer");
        let status = answer.status().as_u16();
        (status, answer.json().await.expect("a JSON body"))
    }

    /// A unary call that must succeed.
    pub async fn ok(&self, method: &str, body: Value) -> Value {
        let (status, answer) = self.call(method, body).await;
        assert_eq!(status, 200, "{method}: {answer}");
        answer
    }

    /// A unary call that must fail; returns the error code.
    pub async fn error(&self, method: &str, body: Value) -> String {
        let (status, answer) = self.call(method, body).await;
        assert_ne!(status, 200, "{method}: {answer}");
        answer["code"].as_str().expect("an error code").to_owned()
    }

    /// A server stream, with extra headers.
    pub async fn stream(&self, method: &str, body: Value, headers: &[(&str, &str)]) -> Stream {
        let mut request = self
            .post(&format!("/{method}"))
            .header("Connect-Protocol-Version", "1")
            .header("Content-Type", "application/connect+json")
            .body(envelope(&body));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = request.send().await.expect("an answer");
        assert_eq!(response.status(), 200);
        Stream {
            response,
            buffer: Vec::new(),
            end: None,
        }
    }

    /// Starts a shell command without input.
    pub async fn shell(&self, script: &str) -> Stream {
        self.start_process(json!({ "process": bash(script), "stdin": false }), &[])
            .await
    }

    pub async fn start_process(&self, request: Value, headers: &[(&str, &str)]) -> Stream {
        self.stream("process.Process/Start", request, headers).await
    }

    /// The pids of the running processes.
    pub async fn pids(&self) -> Vec<u64> {
        let list = self.ok("process.Process/List", json!({})).await;
        let list = list["processes"].as_array().cloned().unwrap_or_default();
        list.iter()
            .map(|process| process["pid"].as_u64().expect("a pid"))
            .collect()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // Its processes lead sessions of their own, so each is killed by its pid while the agent knows it.
        for pid in children(self.child.id()) {
            kill_group(u64::from(pid));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Of all threads of a process, since each has its own.
pub fn children(parent: u32) -> Vec<u32> {
    let threads = std::fs::read_dir(format!("/proc/{parent}/task"));
    threads
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok())
        .flat_map(|children| {
            let pids = children.split_ascii_whitespace().map(str::parse);
            pids.flatten().collect::<Vec<u32>>()
        })
        .collect()
}

/// A process configuration that runs a script.
pub fn bash(script: &str) -> Value {
    json!({ "cmd": "/bin/bash", "args": ["-c", script] })
}

pub fn by_pid(pid: u64) -> Value {
    json!({ "pid": pid })
}

/// One message with its five bytes of header.
pub fn envelope(message: &Value) -> Vec<u8> {
    let message = message.to_string().into_bytes();
    let mut bytes = vec![0];
    bytes.extend(
        u32::try_from(message.len())
            .expect("a short message")
            .to_be_bytes(),
    );
    bytes.extend(message);
    bytes
}

/// The messages of a server stream.
pub struct Stream {
    response: Response,
    buffer: Vec<u8>,
    /// The body of the end-of-stream message, once read.
    pub end: Option<Value>,
}

impl Stream {
    /// The next message, or `None` after the last one.
    pub async fn next(&mut self) -> Option<Value> {
        if self.end.is_some() {
            return None;
        }
        let (flags, message) = tokio::time::timeout(PATIENCE, self.frame())
            .await
            .expect("a message in time")?;
        let message: Value = serde_json::from_slice(&message).expect("JSON");
        if flags & 2 != 0 {
            self.end = Some(message);
            return None;
        }
        Some(message)
    }

    async fn frame(&mut self) -> Option<(u8, Vec<u8>)> {
        loop {
            if let Some(header) = self.buffer.get(..5) {
                let length = u32::from_be_bytes([header[1], header[2], header[3], header[4]]) as usize;
                if self.buffer.len() >= 5 + length {
                    let flags = header[0];
                    let message = self.buffer[5..5 + length].to_vec();
                    self.buffer.drain(..5 + length);
                    return Some((flags, message));
                }
            }
            let chunk = self.response.chunk().await.expect("the stream is not cut")?;
            self.buffer.extend_from_slice(&chunk);
        }
    }

    /// Reads the start event of a process.
    pub async fn pid(&mut self) -> u64 {
        let first = self.next().await.expect("a first event");
        first["event"]["start"]["pid"]
            .as_u64()
            .unwrap_or_else(|| panic!("no start event: {first}"))
    }

    /// Reads until the output so far satisfies the condition; returns it.
    pub async fn output_until(&mut self, what: &str, done: impl Fn(&[u8]) -> bool) -> Vec<u8> {
        let mut output = Vec::new();
        while !done(&output) {
            let event = self
                .next()
                .await
                .unwrap_or_else(|| panic!("the stream ended before {what}"));
            for source in ["stdout", "stderr", "pty"] {
                if let Some(data) = event["event"]["data"][source].as_str() {
                    output.extend(STANDARD.decode(data).expect("base64"));
                }
            }
        }
        output
    }

    /// Reads everything.
    pub async fn finish(&mut self) -> Outcome {
        let mut outcome = Outcome::default();
        while let Some(message) = self.next().await {
            let event = &message["event"];
            for (source, output) in [
                ("stdout", &mut outcome.stdout),
                ("stderr", &mut outcome.stderr),
                ("pty", &mut outcome.pty),
            ] {
                if let Some(data) = event["data"][source].as_str() {
                    output.extend(STANDARD.decode(data).expect("base64"));
                }
            }
            if !event["end"].is_null() {
                outcome.end = event["end"].clone();
            }
            outcome.keepalives += usize::from(!event["keepalive"].is_null());
        }
        outcome.error = self
            .end
            .as_ref()
            .and_then(|end| end["error"]["code"].as_str())
            .map(str::to_owned);
        outcome
    }

    /// The error that the stream consists of.
    pub async fn error(&mut self) -> (String, String) {
        assert_eq!(self.next().await, None);
        let error = &self.end.as_ref().expect("an end of stream")["error"];
        let text = |key: &str| {
            error[key]
                .as_str()
                .unwrap_or_else(|| panic!("no error: {error}"))
                .to_owned()
        };
        (text("code"), text("message"))
    }
}

/// What a process did.
#[derive(Debug, Default)]
pub struct Outcome {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub pty: Vec<u8>,
    pub end: Value,
    pub keepalives: usize,
    pub error: Option<String>,
}

impl Outcome {
    pub fn stdout(&self) -> &str {
        std::str::from_utf8(&self.stdout).expect("UTF-8")
    }

    /// Proto3 leaves zero out.
    pub fn exit_code(&self) -> i64 {
        assert!(self.end.is_object(), "no end event: {self:?}");
        self.end["exitCode"].as_i64().unwrap_or(0)
    }
}

/// Waits for a condition.
pub async fn until<T>(what: &str, mut probe: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = probe().await {
            return found;
        }
        assert!(Instant::now() < deadline, "timed out waiting until {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Whether a process exists and is no zombie.
pub fn is_alive(pid: u64) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ")
        .is_some_and(|(_, rest)| !rest.starts_with('Z') && !rest.starts_with('X'))
}

/// Kills a process group. By system call: what the `kill` program makes of a negative pid differs between its
/// versions, and one of them takes it for all processes of the machine.
pub fn kill_group(leader: u64) {
    let leader = i32::try_from(leader)
        .ok()
        .filter(|pid| *pid > 1)
        .and_then(rustix::process::Pid::from_raw);
    let leader = leader.expect("the pid of a process that was started here");
    let _ = rustix::process::kill_process_group(leader, rustix::process::Signal::KILL);
}

pub fn current_user() -> String {
    let output = Command::new("id").arg("-un").output().expect("id runs");
    String::from_utf8(output.stdout)
        .expect("a name")
        .trim()
        .to_owned()
}

pub fn is_root() -> bool {
    current_user() == "root"
}

pub fn text(path: &Path) -> String {
    path.to_str().expect("a path in UTF-8").to_owned()
}
