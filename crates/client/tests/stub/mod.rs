//! A stand-in for the platform: the public API over plain processes and a temporary directory.
//!
//! It behaves as the API is documented, records what it is asked, and can be told to misbehave
//! through template names (`broken`, `full`) and through [`Stub::fail_next`]. Commands run on this
//! machine, in a temporary directory that also holds the "sandbox's" files: absolute paths of the API
//! lie below it.

#![expect(dead_code, reason = "each test binary uses its own part")]
#![expect(clippy::result_large_err, reason = "handlers answer with `?`")]

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use axum::extract::{Path, Query, Request, State};
use axum::http::{HeaderMap, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use serde_json::{Value, json};

use files::{list_files, mkdir, read, remove, write};
use sockets::{exec_stream, process_stream, pty};

mod files;
mod sockets;

pub const KEY: &str = "wrn_test";

#[derive(Clone)]
pub struct Stub {
    pub url: String,
    pub root: PathBuf,
    state: Arc<Mutex<Shared>>,
    _directory: Arc<tempfile::TempDir>,
}

#[derive(Default)]
struct Shared {
    sandboxes: BTreeMap<String, Value>,
    templates: Vec<Value>,
    log: Vec<String>,
    failures: VecDeque<(u16, String)>,
    next: u32,
}

type Answer = Result<Response, Response>;

fn refuse(status: u16, code: &str, message: &str) -> Response {
    let status = StatusCode::from_u16(status).unwrap();
    (status, Json(json!({"error": {"code": code, "message": message}}))).into_response()
}

impl Stub {
    pub async fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = tokio::net::TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0)))
            .await
            .unwrap();
        let stub = Self {
            url: format!("http://{}", listener.local_addr().unwrap()),
            root: directory.path().canonicalize().unwrap(),
            state: Arc::default(),
            _directory: Arc::new(directory),
        };
        stub.state.lock().unwrap().templates = vec![json!({
            "id": "tpl-00000000-0000-0000-0000-000000000000", "name": "minimal", "type": "base", "status": "ready",
            "vcpus": 1, "memory_mb": 512, "disk_size_mb": 20480, "size_bytes": 123456789, "platform": true,
            "created_at": "2026-01-02T03:04:05Z"
        })];
        let sandbox = Router::new()
            .route("/", get(get_one).delete(destroy))
            .route("/pause", post(|s, p| change(s, p, "paused")))
            .route("/resume", post(|s, p| change(s, p, "running")))
            .route("/ping", post(async || StatusCode::NO_CONTENT))
            .route("/exec", post(exec))
            .route("/exec/stream", get(exec_stream))
            .route("/pty", get(pty))
            .route(
                "/processes",
                get(async || Json(json!({"processes": [{"pid": 7, "tag": "web", "cmd": "x", "args": []}]}))),
            )
            .route("/processes/{selector}", delete(async || StatusCode::NO_CONTENT))
            .route("/processes/{selector}/stream", get(process_stream))
            .route("/files/stream/write", post(write))
            .route("/files/stream/read", post(read))
            .route("/files/list", post(list_files))
            .route("/files/mkdir", post(mkdir))
            .route("/files/remove", post(remove));
        let router = Router::new()
            .route(
                "/health",
                get(async || Json(json!({"status": "ok", "version": "9.9.9"}))),
            )
            .route("/v1/sandboxes", get(list).post(create))
            .nest("/v1/sandboxes/{id}", sandbox)
            .route("/v1/snapshots", get(snapshots).post(snapshot))
            .route("/v1/snapshots/{name}", delete(delete_snapshot))
            .layer(axum::middleware::from_fn_with_state(stub.clone(), guard))
            .layer(axum::extract::DefaultBodyLimit::disable())
            .with_state(stub.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        stub
    }

    /// What was asked so far: `METHOD /path?query`.
    pub fn log(&self) -> Vec<String> {
        self.state.lock().unwrap().log.clone()
    }

    /// How many requests began with this.
    pub fn count(&self, start: &str) -> usize {
        self.log().iter().filter(|line| line.starts_with(start)).count()
    }

    /// Answers the next request with this status, and the code `code`.
    pub fn fail_next(&self, status: u16, code: &str) {
        self.state
            .lock()
            .unwrap()
            .failures
            .push_back((status, code.to_owned()));
    }

    /// Puts a running sandbox there.
    pub fn sandbox(&self) -> String {
        let record = self.state.lock().unwrap().add("minimal", "running");
        record["id"].as_str().unwrap().to_owned()
    }

    pub fn status(&self, id: &str) -> String {
        self.state.lock().unwrap().sandboxes[id]["status"]
            .as_str()
            .unwrap()
            .to_owned()
    }

    /// The statuses of all sandboxes there ever were.
    pub fn statuses(&self) -> Vec<String> {
        let state = self.state.lock().unwrap();
        state
            .sandboxes
            .values()
            .map(|record| record["status"].as_str().unwrap().to_owned())
            .collect()
    }

    fn path(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    /// Where a file of a request is: relative paths of a named user start below their home.
    fn file(&self, path: &str, user: Option<&str>) -> Result<PathBuf, Response> {
        let Some(user) = user else {
            return Ok(self.path(path));
        };
        self.state.lock().unwrap().log.push(format!("AS {user} {path}"));
        match user {
            _ if user != "root" && user != "user" => Err(refuse(
                400,
                "invalid_request",
                &format!("user: invalid username: '{user}'"),
            )),
            _ if path.starts_with('/') => Ok(self.path(path)),
            _ => Ok(self.root.join("home").join(user).join(path)),
        }
    }

    fn known(&self, id: &str) -> Result<(), Response> {
        if self.state.lock().unwrap().sandboxes.contains_key(id) {
            Ok(())
        } else {
            Err(refuse(404, "not_found", &format!("sandbox '{id}' was not found")))
        }
    }
}

impl Shared {
    fn add(&mut self, template: &str, status: &str) -> Value {
        self.next += 1;
        let id = format!("sb-0198c0de-0000-7000-8000-{:012x}", 0xbeef_0000 + self.next);
        let mut record = json!({
            "id": id, "status": status, "template": template, "vcpus": 1, "memory_mb": 512, "disk_size_mb": 20480,
            "timeout_sec": 0, "created_at": "2026-01-02T03:04:05Z", "started_at": null, "last_active_at": null,
            "last_updated": "2026-01-02T03:04:05Z", "metadata": {}
        });
        if status == "error" {
            record["error"] =
                json!({"message": "the VM died", "console": "Kernel panic - not syncing\n\u{1b}[31mred"});
        }
        self.sandboxes.insert(id, record.clone());
        record
    }
}

async fn guard(State(stub): State<Stub>, request: Request, next: Next) -> Response {
    let failure = {
        let mut state = stub.state.lock().unwrap();
        state.log.push(format!("{} {}", request.method(), request.uri()));
        state.failures.pop_front()
    };
    if let Some((status, code)) = failure {
        return refuse(status, &code, "as the test wanted it");
    }
    if request.uri().path() != "/health" && request.headers().get("x-api-key").is_none_or(|key| key != KEY) {
        return refuse(401, "unauthorized", "the API key is unknown");
    }
    next.run(request).await
}

async fn create(State(stub): State<Stub>, Json(body): Json<Value>) -> Answer {
    let template = body["template"].as_str().unwrap_or("minimal").to_owned();
    let status = match template.as_str() {
        "full" => return Err(refuse(503, "no_capacity", "no host has 512 MiB free")),
        "missing" => return Err(refuse(404, "not_found", "template 'missing' was not found")),
        "broken" => "error",
        _ => "running",
    };
    let mut state = stub.state.lock().unwrap();
    let mut record = state.add(&template, status);
    for field in ["vcpus", "memory_mb", "timeout_sec", "metadata"] {
        if !body[field].is_null() {
            record[field] = body[field].clone();
        }
    }
    let id = record["id"].as_str().unwrap().to_owned();
    state.sandboxes.insert(id, record.clone());
    // As the platform does: it is not there yet when it is promised.
    record["status"] = json!("starting");
    Ok((StatusCode::ACCEPTED, Json(record)).into_response())
}

async fn list(State(stub): State<Stub>) -> Json<Vec<Value>> {
    let state = stub.state.lock().unwrap();
    Json(
        state
            .sandboxes
            .values()
            .filter(|record| record["status"] != "stopped")
            .cloned()
            .collect(),
    )
}

async fn get_one(State(stub): State<Stub>, Path(id): Path<String>) -> Answer {
    stub.known(&id)?;
    Ok(Json(stub.state.lock().unwrap().sandboxes[&id].clone()).into_response())
}

async fn destroy(State(stub): State<Stub>, Path(id): Path<String>) -> Answer {
    change(State(stub), Path(id), "stopped").await
}

async fn change(State(stub): State<Stub>, Path(id): Path<String>, status: &str) -> Answer {
    stub.known(&id)?;
    let mut state = stub.state.lock().unwrap();
    let record = state.sandboxes.get_mut(&id).unwrap();
    if record["status"] == status && status != "stopped" {
        return Err(refuse(
            409,
            "invalid_state",
            &format!("sandbox {id} is {status} already"),
        ));
    }
    record["status"] = json!(status);
    Ok((StatusCode::ACCEPTED, Json(record.clone())).into_response())
}

async fn exec(State(stub): State<Stub>, Path(id): Path<String>, Json(body): Json<Value>) -> Answer {
    stub.known(&id)?;
    let cmd = body["cmd"].as_str().unwrap().to_owned();
    if body["background"] == true {
        let tag = body["tag"].as_str().unwrap_or("proc-1");
        let started = json!({"sandbox_id": id, "cmd": cmd, "pid": 7, "tag": tag});
        return Ok((StatusCode::ACCEPTED, Json(started)).into_response());
    }
    let user = body["user"].as_str();
    let line = format!("EXEC {} {cmd}", user.unwrap_or("-"));
    stub.state.lock().unwrap().log.push(line);
    // Paths of the sandbox that are given to `chmod` mean the directory.
    let args: Vec<String> = strings(&body["args"])
        .into_iter()
        .map(|arg| {
            if cmd == "chmod" && arg.starts_with('/') {
                stub.path(&arg).display().to_string()
            } else {
                arg
            }
        })
        .collect();
    let output = tokio::process::Command::new(&cmd)
        .args(args)
        .current_dir(user.map_or(stub.root.clone(), |user| stub.root.join("home").join(user)))
        .output()
        .await
        .unwrap();
    Ok(Json(json!({
        "sandbox_id": id, "cmd": cmd, "stdout": String::from_utf8_lossy(&output.stdout),
        "stderr": String::from_utf8_lossy(&output.stderr), "exit_code": output.status.code().unwrap_or(-1),
        "duration_ms": 1, "encoding": "utf-8"
    }))
    .into_response())
}

fn strings(value: &Value) -> Vec<String> {
    value
        .as_array()
        .into_iter()
        .flatten()
        .map(|item| item.as_str().unwrap().to_owned())
        .collect()
}

async fn snapshots(
    State(stub): State<Stub>,
    Query(query): Query<BTreeMap<String, String>>,
    _: HeaderMap,
) -> Json<Vec<Value>> {
    let mut state = stub.state.lock().unwrap();
    let found = state
        .templates
        .iter()
        .filter(|template| query.get("type").is_none_or(|kind| template["type"] == *kind))
        .cloned()
        .collect();
    // What is being made when it is looked at is ready at the next look.
    for template in &mut state.templates {
        template["status"] = json!("ready");
    }
    Json(found)
}

async fn snapshot(
    State(stub): State<Stub>,
    Query(query): Query<BTreeMap<String, String>>,
    Json(body): Json<Value>,
) -> Answer {
    stub.known(body["sandbox_id"].as_str().unwrap())?;
    let name = body["name"].as_str().unwrap_or("made-up").to_owned();
    let mut state = stub.state.lock().unwrap();
    if !query.contains_key("overwrite") && state.templates.iter().any(|template| template["name"] == *name) {
        return Err(refuse(409, "conflict", &format!("the name {name} is taken")));
    }
    let mut template = state.templates[0].clone();
    template["id"] = json!(format!("tpl-{name}"));
    template["name"] = json!(name);
    template["type"] = json!("snapshot");
    template["status"] = json!("building");
    state.templates.push(template.clone());
    Ok((StatusCode::ACCEPTED, Json(template)).into_response())
}

async fn delete_snapshot(State(stub): State<Stub>, Path(name): Path<String>) -> Answer {
    let mut state = stub.state.lock().unwrap();
    let before = state.templates.len();
    state.templates.retain(|template| template["name"] != *name);
    if state.templates.len() == before {
        return Err(refuse(
            404,
            "not_found",
            &format!("template '{name}' was not found"),
        ));
    }
    Ok(StatusCode::NO_CONTENT.into_response())
}
