//! What the control plane costs on one core, with 10,000 sandboxes of 1,000 teams in PostgreSQL.
//!
//! The control plane runs in a process of its own, which has one core for itself. The clients, a simulated host and
//! PostgreSQL (with the settings that it has by itself, so that each commit reaches the disk) share another one. Beside
//! each row stands its floor of the same run and the same process: a bare route of the same web framework, which does
//! nothing, one query, or one commit. All rows are taken in turns, several times over, so that a machine that slows
//! down slows all of them.
//!
//! ```text
//! cargo bench -p wrenn-control --bench control_plane -- [--quick] [--json-out FILE]
//! ```

use std::error::Error;
use std::io::{BufRead as _, Write as _};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use axum::extract::{Path, State};
use axum::routing::{get, post};
use axum::{Json, Router};
use bytes::Bytes;
use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use sea_orm::{ConnectOptions, ConnectionTrait, Database, DatabaseConnection, Statement};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use uuid::Uuid;
use wrenn_control::{ControlConfig, ControlPlane, MasterSecret};
use wrenn_proto::id::SandboxId;
use wrenn_proto::rest::TemplateStatus;
use wrenn_testkit::servers::Postgres;
use wrenn_testkit::simhost::SimHost;

type Result<T, E = Box<dyn Error + Send + Sync>> = std::result::Result<T, E>;

/// Teams beside the one whose requests are measured.
const TEAMS: usize = 1000;
/// Sandboxes of the measured team; each other one has nine.
const OWN: usize = 1000;
/// Hosts on which all of these are: a database guesses by how they spread what one more host holds.
const HOSTS: usize = 100;
/// More keys than can be asked with before the first of them is forgotten again.
const KEYS: usize = 10_000;
/// Clients at once, where many are measured.
const CLIENTS: usize = 16;
/// Until the memory of an idle control plane is read.
const IDLE: Duration = Duration::from_secs(10);
/// Longest wait for accepted creates to run.
const DRAIN: Duration = Duration::from_secs(120);

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if let [role, core, database, data_dir] = words.as_slice()
        && role == "serve"
    {
        return serve(core.parse()?, database, data_dir);
    }
    let mut quick = false;
    let mut json_out = PathBuf::from("control-bench-results.json");
    let mut words = words.into_iter();
    while let Some(word) = words.next() {
        match word.as_str() {
            // Cargo says this.
            "--bench" => {}
            "--quick" => quick = true,
            "--json-out" => json_out = words.next().ok_or("--json-out needs a file")?.into(),
            other => {
                return Err(
                    format!("unknown argument {other}; there are --quick and --json-out FILE").into(),
                );
            }
        }
    }
    if cfg!(debug_assertions) {
        eprintln!(
            "control bench: this is a debug build; its figures mean nothing (use `make bench-control`)"
        );
    }
    let cores = cores()?;
    let (first, last) = (
        *cores.first().ok_or("no processor")?,
        *cores.last().ok_or("no processor")?,
    );
    // Whatever is started from here on inherits it.
    pin(last)?;
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?
        .block_on(measure(first, cores.len(), quick, &json_out))
}

/// The processors that this process may use.
fn cores() -> Result<Vec<usize>> {
    let allowed = sched_getaffinity(None)?;
    Ok((0..CpuSet::MAX_CPU)
        .filter(|core| allowed.is_set(*core))
        .collect())
}

fn pin(core: usize) -> Result<()> {
    let mut only = CpuSet::new();
    only.set(core);
    Ok(sched_setaffinity(None, &only)?)
}

// ---------------------------------------------------------------------------------------- the measured process

/// What the measured process tells when it is ready.
#[derive(Debug, Serialize, Deserialize)]
struct Ready {
    api: SocketAddr,
    floor: SocketAddr,
    key: String,
    host_token: String,
    team: Uuid,
}

/// A control plane and the floors, until the standard input ends.
fn serve(core: usize, database: &str, data_dir: &str) -> Result<()> {
    pin(core)?;
    // As many threads as there are processors: one.
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?
        .block_on(async {
            let mut config = ControlConfig::new(data_dir);
            // The one simulated host takes all that is created, however many that is.
            config.placement.vcpu_overcommit = u32::MAX;
            config.database_url = Some(database.to_owned());
            config.secret = Some(MasterSecret::generate()?);
            // The simulated host sends one heartbeat.
            config.timings.host_silence = Duration::from_secs(24 * 3600);
            let control = ControlPlane::builder(config).build().await?;
            let bootstrap = control.bootstrap().await?.ok_or("the database is not empty")?;
            let host_token = control.issue_host_token(None).await?.token;
            let api = TcpListener::bind("127.0.0.1:0").await?;
            let floor = TcpListener::bind("127.0.0.1:0").await?;
            let ready = Ready {
                api: api.local_addr()?,
                floor: floor.local_addr()?,
                key: bootstrap.api_key,
                host_token,
                team: bootstrap.team_id.0,
            };
            let floors = floors(database).await?;
            tokio::spawn(async move { axum::serve(floor, floors).await });
            println!("{}", serde_json::to_string(&ready)?);
            control
                .run(vec![api], async {
                    let ended = tokio::task::spawn_blocking(|| {
                        std::io::copy(&mut std::io::stdin(), &mut std::io::sink())
                    });
                    let _ = ended.await;
                })
                .await?;
            Ok(())
        })
}

/// The least that an answer, a query, a page and a commit can cost.
async fn floors(database: &str) -> Result<Router> {
    let mut options = ConnectOptions::new(database);
    options.max_connections(20).sqlx_logging(false);
    let database = Database::connect(options).await?;
    database
        .execute_unprepared("CREATE TABLE bench_floor (id uuid PRIMARY KEY)")
        .await?;
    async fn rows(database: &DatabaseConnection, sql: &str, id: Option<Uuid>) -> Json<Value> {
        let values = id.map(sea_orm::Value::from);
        let statement = Statement::from_sql_and_values(database.get_database_backend(), sql, values);
        let found = database
            .query_all_raw(statement)
            .await
            .map_or(0, |rows| rows.len());
        Json(json!({ "rows": found }))
    }
    Ok(Router::new()
        .route("/bare", get(|| async { Json(json!({ "status": "ok" })) }))
        .route(
            "/row/{id}",
            get(
                |State(database): State<DatabaseConnection>, Path(id): Path<Uuid>| async move {
                    rows(&database, "SELECT * FROM sandboxes WHERE id = $1", Some(id)).await
                },
            ),
        )
        .route(
            "/page/{team}",
            get(
                |State(database): State<DatabaseConnection>, Path(id): Path<Uuid>| async move {
                    // The team is part of the text: with it as a parameter, the query takes twice as long.
                    let sql = format!(
                        "SELECT * FROM sandboxes WHERE team_id = '{id}' AND status IN ('pending', 'starting', 'running', \
                         'pausing', 'paused', 'snapshotting', 'resuming', 'hibernated', 'stopping', 'missing', 'error') \
                         ORDER BY created_at DESC, id DESC LIMIT 50"
                    );
                    rows(&database, &sql, None).await
                },
            ),
        )
        .route(
            "/commit",
            post(|State(database): State<DatabaseConnection>| async move {
                let id = Some(Uuid::now_v7());
                rows(&database, "INSERT INTO bench_floor VALUES ($1)", id).await
            }),
        )
        .with_state(database))
}

/// The measured process.
struct Server {
    child: Child,
    stdin: Option<ChildStdin>,
    ready: Ready,
}

impl Server {
    fn start(core: usize, database: &str, data_dir: &std::path::Path) -> Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["serve", &core.to_string(), database])
            .arg(data_dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut line = String::new();
        let stdout = child.stdout.take().ok_or("no output")?;
        std::io::BufReader::new(stdout).read_line(&mut line)?;
        let ready = serde_json::from_str(&line).map_err(|_| "the control plane did not start")?;
        Ok(Self {
            stdin: child.stdin.take(),
            child,
            ready,
        })
    }

    /// Memory in MiB, shared pages counted in parts.
    fn pss_mib(&self) -> Result<f64> {
        let text = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", self.child.id()))?;
        let kib = text
            .lines()
            .find_map(|line| {
                line.strip_prefix("Pss:")?
                    .trim()
                    .strip_suffix("kB")?
                    .trim()
                    .parse::<u32>()
                    .ok()
            })
            .ok_or("no Pss line in smaps_rollup")?;
        Ok(f64::from(kib) / 1024.0)
    }

    /// Processor time used so far, in milliseconds; the clock ticks every ten.
    fn cpu_ms(&self) -> Result<f64> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
        // The command's name may hold spaces; fields are counted after its closing bracket.
        let (_, fields) = stat.rsplit_once(')').ok_or("no fields in stat")?;
        let mut fields = fields.split_ascii_whitespace().skip(11);
        let mut next = || -> Result<u32> { Ok(fields.next().ok_or("too few fields in stat")?.parse()?) };
        Ok(f64::from(next()? + next()?) * 10.0)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stdin = None;
        let _ = self.child.wait();
    }
}

// ---------------------------------------------------------------------------------------- what is measured

/// One kind of request.
struct Operation {
    name: &'static str,
    /// The least that it could cost.
    floor: Option<&'static str>,
    /// Statements that it sends to the database; `tests/queries.rs` counts them.
    statements: &'static str,
    address: SocketAddr,
    method: Method,
    expect: StatusCode,
    path: Box<dyn Fn(usize) -> String + Send + Sync>,
    key: Box<dyn Fn(usize) -> String + Send + Sync>,
    body: &'static str,
    /// Numbers its requests, so that no two phases ask for the same at once.
    next: AtomicUsize,
    /// What it begins has to end before something else is measured.
    drains: bool,
    one: Vec<f64>,
    many: Vec<f64>,
    many_took: Duration,
    many_cpu_ms: f64,
}

impl Operation {
    fn new(
        name: &'static str,
        address: SocketAddr,
        path: impl Fn(usize) -> String + Send + Sync + 'static,
    ) -> Self {
        Self {
            name,
            floor: None,
            statements: "",
            address,
            method: Method::GET,
            expect: StatusCode::OK,
            path: Box::new(path),
            key: Box::new(|_| String::new()),
            body: "",
            next: AtomicUsize::new(0),
            drains: false,
            one: Vec::new(),
            many: Vec::new(),
            many_took: Duration::ZERO,
            many_cpu_ms: 0.0,
        }
    }

    fn request(&self) -> Result<Request<Full<Bytes>>> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        Ok(Request::builder()
            .method(self.method.clone())
            .uri((self.path)(number))
            .header("host", self.address.to_string())
            .header("x-api-key", (self.key)(number))
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from_static(self.body.as_bytes())))?)
    }
}

fn operations(ready: &Ready, sandboxes: Vec<SandboxId>) -> Vec<Operation> {
    let (api, floor) = (ready.api, ready.floor);
    let team = ready.team;
    let own = || {
        let key = ready.key.clone();
        Box::new(move |_| key.clone())
    };
    let sandboxes = Arc::new(sandboxes);
    let pick = |sandboxes: &Arc<Vec<SandboxId>>| {
        let sandboxes = Arc::clone(sandboxes);
        // A stride that is no divisor of their number visits all of them.
        move |number: usize| sandboxes[number * 37 % sandboxes.len()]
    };
    let (row, got) = (pick(&sandboxes), pick(&sandboxes));
    vec![
        Operation::new("floor: bare route", floor, |_| "/bare".to_owned()),
        Operation {
            statements: "1",
            ..Operation::new("floor: one row by its key", floor, move |number| {
                format!("/row/{}", row(number).0)
            })
        },
        Operation {
            statements: "1",
            ..Operation::new("floor: 50 rows of a team", floor, move |_| {
                format!("/page/{team}")
            })
        },
        Operation {
            statements: "1",
            method: Method::POST,
            ..Operation::new("floor: one row inserted and committed", floor, |_| {
                "/commit".to_owned()
            })
        },
        // Authenticated, then refused without a query: such an id cannot be.
        Operation {
            floor: Some("floor: bare route"),
            statements: "0",
            expect: StatusCode::NOT_FOUND,
            key: own(),
            ..Operation::new("key authentication, known key", api, |_| {
                "/v1/sandboxes/x".to_owned()
            })
        },
        Operation {
            floor: Some("floor: one row by its key"),
            statements: "1",
            expect: StatusCode::NOT_FOUND,
            key: Box::new(|number| key(number % KEYS)),
            ..Operation::new("key authentication, unknown key", api, |_| {
                "/v1/sandboxes/x".to_owned()
            })
        },
        Operation {
            floor: Some("floor: one row by its key"),
            statements: "1",
            key: own(),
            ..Operation::new("get", api, move |number| format!("/v1/sandboxes/{}", got(number)))
        },
        Operation {
            floor: Some("floor: 50 rows of a team"),
            statements: "1",
            key: own(),
            ..Operation::new("list, 50 a page", api, |_| "/v1/sandboxes?limit=50".to_owned())
        },
        Operation {
            floor: Some("floor: one row inserted and committed"),
            statements: "5",
            method: Method::POST,
            expect: StatusCode::ACCEPTED,
            key: own(),
            body: "{}",
            drains: true,
            ..Operation::new("create, accepted", api, |_| "/v1/sandboxes".to_owned())
        },
    ]
}

/// The secret of one of the keys that only the database's rows know.
fn key(number: usize) -> String {
    format!("wrn_{number:040}")
}

// ---------------------------------------------------------------------------------------- measuring

async fn measure(core: usize, cores: usize, quick: bool, json_out: &PathBuf) -> Result<()> {
    let started = Instant::now();
    let (rounds, alone, crowd) = if quick {
        (1, Duration::from_millis(200), Duration::from_millis(300))
    } else {
        (3, Duration::from_millis(1500), Duration::from_secs(2))
    };
    say("starting PostgreSQL and the control plane");
    let postgres = Postgres::start_durable();
    let dir = tempfile::tempdir()?;
    let server = Server::start(core, &postgres.url(), dir.path())?;
    let mut host = SimHost::start(&format!("http://{}", server.ready.api)).await;
    host.register(&server.ready.host_token).await;
    host.heartbeat_with(1 << 30, TemplateStatus::Ready).await;
    say("10,000 sandboxes, 1,000 teams, 10,000 keys");
    let team = server.ready.team;
    fill(&postgres, team);
    let rows = |table: &str| postgres.execute(&format!("SELECT count(*) FROM {table}"));
    eprintln!(
        "control bench: {} sandboxes, {} teams",
        rows("sandboxes"),
        rows("teams")
    );
    tokio::time::sleep(IDLE).await;
    let idle_mib = server.pss_mib()?;

    let ids = postgres.execute(&format!(
        "SELECT id FROM sandboxes WHERE team_id = '{team}' ORDER BY id"
    ));
    let ids = ids
        .lines()
        .map(|id| Uuid::parse_str(id).map(SandboxId))
        .collect::<Result<Vec<_>, _>>()?;
    let mut operations = operations(&server.ready, ids);
    let mut drained = (0_usize, Duration::ZERO);
    for round in 1..=rounds {
        say(&format!("round {round} of {rounds}"));
        for operation in &mut operations {
            let before = Instant::now();
            // The first moments warm up, and do not count.
            load(operation, 1, alone / 4).await?;
            let (mut samples, _) = load(operation, 1, alone).await?;
            operation.one.append(&mut samples);
            load(operation, CLIENTS, crowd / 4).await?;
            let cpu = server.cpu_ms()?;
            let (mut samples, took) = load(operation, CLIENTS, crowd).await?;
            operation.many_cpu_ms += server.cpu_ms()? - cpu;
            operation.many_took += took;
            operation.many.append(&mut samples);
            if operation.drains {
                drain(&postgres, before).await?;
            }
        }
        // How fast creates come to run, when they come faster than that: all at once, and until the last one runs.
        let create = operations.last().ok_or("no operation")?;
        let before = Instant::now();
        let (samples, _) = load(create, CLIENTS, crowd).await?;
        drain(&postgres, before).await?;
        drained = (drained.0 + samples.len(), drained.1 + before.elapsed());
    }
    let loaded_mib = server.pss_mib()?;
    let failed = postgres
        .execute("SELECT count(*) FROM sandboxes WHERE status NOT IN ('running', 'paused', 'stopped')");
    if failed != "0" {
        return Err(format!("{failed} creates came to nothing").into());
    }
    drop(server);

    let running_per_second = per_second(drained.0, drained.1);
    println!("{}", table(&operations));
    println!(
        "\ncreates that came to run, {CLIENTS} clients, the last one awaited: {running_per_second:.0} a second"
    );
    println!("memory (PSS) of the control plane: {idle_mib:.1} MiB idle, {loaded_mib:.1} MiB after the load");
    let results = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "taken_at": jiff::Timestamp::now().to_string(),
        "took_s": started.elapsed().as_secs_f64(),
        "quick": quick,
        "machine": {
            "cpus": cores,
            "cpu": cpu_model(),
            "postgres": postgres.execute("SHOW server_version"),
        },
        "clients": CLIENTS,
        "creates_running_per_s": running_per_second,
        "memory_mib": { "idle": idle_mib, "after_load": loaded_mib },
        "rows": operations.iter().map(row_json).collect::<Vec<_>>(),
    });
    let mut file = std::fs::File::create(json_out)?;
    serde_json::to_writer(&mut file, &results)?;
    file.flush()?;
    eprintln!(
        "{:.0} s. Raw samples: {}",
        started.elapsed().as_secs_f32(),
        json_out.display()
    );
    Ok(())
}

fn say(what: &str) {
    eprintln!("control bench: {what}");
}

/// What an installation has gathered after a while. The simulated host knows nothing of these, so they are on another.
fn fill(postgres: &Postgres, team: Uuid) {
    for sql in [
        format!(
            "INSERT INTO teams (id, name, slug, created_at) \
             SELECT gen_random_uuid(), 'team', 'team-' || n, 0 FROM generate_series(1, {TEAMS}) AS n"
        ),
        format!(
            "INSERT INTO hosts SELECT (jsonb_populate_record(hosts, jsonb_build_object('id', gen_random_uuid(), \
             'token_hash', NULL, 'status', 'offline'))).* FROM hosts, generate_series(1, {HOSTS})"
        ),
        format!(
            "INSERT INTO sandboxes (id, team_id, host_id, template_id, template_team_id, template_name, status, \
             generation, vcpus, memory_mb, disk_size_mb, timeout_sec, metadata, envs, created_at, updated_at, \
             status_at) \
             SELECT gen_random_uuid(), team, other.id, template.id, template.team_id, 'minimal', \
             (ARRAY['running', 'paused', 'stopped'])[1 + n % 3], 2, 1, 256, 1024, 0, \
             '{{\"purpose\":\"bench\"}}', '{{}}', today + n, today + n, today + n \
             FROM (SELECT team, n, row_number() OVER () AS place FROM \
             (SELECT id AS team, n FROM teams, generate_series(1, 9) AS n WHERE slug LIKE 'team-%' \
             UNION ALL SELECT '{team}', n FROM generate_series(1, {OWN}) AS n) AS every) AS owned JOIN \
             (SELECT id, row_number() OVER () AS place FROM hosts WHERE status = 'offline') AS other \
             ON other.place = 1 + owned.place % {HOSTS}, \
             (SELECT id, team_id FROM templates WHERE name = 'minimal') AS template, \
             (SELECT (extract(epoch FROM now()) * 1000)::bigint AS today) AS clock ORDER BY random()"
        ),
        format!(
            "INSERT INTO team_api_keys (id, team_id, name, key_hash, key_prefix, created_at) \
             SELECT gen_random_uuid(), owner.id, 'key', \
             encode(sha256(('wrn_' || lpad(n::text, 40, '0'))::bytea), 'hex'), 'wrn_', 0 \
             FROM generate_series(0, {KEYS} - 1) AS n JOIN \
             (SELECT id, row_number() OVER () AS place FROM teams WHERE slug LIKE 'team-%') AS owner \
             ON owner.place = 1 + n % {TEAMS}"
        ),
        "VACUUM ANALYZE".to_owned(),
        "CHECKPOINT".to_owned(),
    ] {
        postgres.execute(&sql);
    }
}

/// Waits until nothing is on its way to running any more.
async fn drain(postgres: &Postgres, began: Instant) -> Result<()> {
    while postgres.execute("SELECT count(*) FROM sandboxes WHERE status IN ('pending', 'starting')") != "0" {
        if began.elapsed() > DRAIN {
            return Err("accepted creates do not come to run".into());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// So many clients, each with a connection and the next request as soon as the last one is answered. Returns how long
/// each answer took, in milliseconds, and how long all of it did.
async fn load(operation: &Operation, clients: usize, time: Duration) -> Result<(Vec<f64>, Duration)> {
    let began = Instant::now();
    let mut running = Vec::new();
    for _ in 0..clients {
        running.push(async move {
            let socket = TcpStream::connect(operation.address).await?;
            socket.set_nodelay(true)?;
            let (mut send, connection) = http1::handshake(TokioIo::new(socket)).await?;
            let connection = tokio::spawn(connection);
            let mut samples = Vec::new();
            while began.elapsed() < time {
                let request = operation.request()?;
                send.ready().await?;
                let asked = Instant::now();
                let answer = send.send_request(request).await?;
                let status = answer.status();
                let body = answer.into_body().collect().await?;
                samples.push(asked.elapsed().as_secs_f64() * 1000.0);
                if status != operation.expect {
                    let body = String::from_utf8_lossy(&body.to_bytes()).into_owned();
                    return Err(format!("{}: {status} {body}", operation.name).into());
                }
            }
            drop(send);
            connection.await??;
            Ok::<_, Box<dyn Error + Send + Sync>>(samples)
        });
    }
    let samples = futures::future::try_join_all(running).await?;
    Ok((samples.concat(), began.elapsed()))
}

// ---------------------------------------------------------------------------------------- telling

#[expect(
    clippy::cast_precision_loss,
    reason = "sample counts are far below what a float counts exactly"
)]
fn per_second(count: usize, took: Duration) -> f64 {
    count as f64 / took.as_secs_f64()
}

/// The value at a place of the sorted samples, between neighbours in proportion.
fn quantile(samples: &[f64], q: f64) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else {
        return f64::NAN;
    };
    #[expect(
        clippy::cast_precision_loss,
        reason = "sample counts are far below what a float counts exactly"
    )]
    let place = q * last as f64;
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "between 0 and the last index"
    )]
    let (low, high) = (place.floor() as usize, place.ceil() as usize);
    sorted[low] + (sorted[high] - sorted[low]) * place.fract()
}

fn table(operations: &[Operation]) -> String {
    let mut table = Table::new();
    table
        .load_style(presets::ASCII_MARKDOWN)
        .set_content_arrangement(ContentArrangement::Disabled)
        .set_header([
            "what",
            "statements",
            "1 client: p50 ms",
            "p99 ms",
            "16 clients: requests/s",
            "p50 ms",
            "p99 ms",
            "CPU ms/request",
            "floor",
            "ratio (p50, 1 client)",
        ]);
    for column in [1, 2, 3, 4, 5, 6, 7, 9] {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    for operation in operations {
        let floor = operation
            .floor
            .and_then(|name| operations.iter().find(|other| other.name == name));
        let ratio = floor.map(|floor| quantile(&operation.one, 0.5) / quantile(&floor.one, 0.5));
        let short = |name: &str| name.strip_prefix("floor: ").unwrap_or(name).to_owned();
        table.add_row([
            operation.name.to_owned(),
            operation.statements.to_owned(),
            format!("{:.2}", quantile(&operation.one, 0.5)),
            format!("{:.2}", quantile(&operation.one, 0.99)),
            format!("{:.0}", per_second(operation.many.len(), operation.many_took)),
            format!("{:.2}", quantile(&operation.many, 0.5)),
            format!("{:.2}", quantile(&operation.many, 0.99)),
            format!("{:.2}", cpu_per_request(operation)),
            operation.floor.map(short).unwrap_or_default(),
            ratio.map(|ratio| format!("{ratio:.2}")).unwrap_or_default(),
        ]);
    }
    table.to_string()
}

#[expect(
    clippy::cast_precision_loss,
    reason = "sample counts are far below what a float counts exactly"
)]
fn cpu_per_request(operation: &Operation) -> f64 {
    operation.many_cpu_ms / operation.many.len() as f64
}

fn row_json(operation: &Operation) -> Value {
    let series = |samples: &[f64]| {
        json!({
            "unit": "ms",
            "p50": quantile(samples, 0.5),
            "p99": quantile(samples, 0.99),
            // To the microsecond.
            "samples": samples.iter().map(|sample| (sample * 1000.0).round() / 1000.0).collect::<Vec<_>>(),
        })
    };
    json!({
        "name": operation.name,
        "floor": operation.floor,
        "statements": operation.statements,
        "one_client": series(&operation.one),
        "many_clients": series(&operation.many),
        "requests_per_s": per_second(operation.many.len(), operation.many_took),
        "cpu_ms_per_request": cpu_per_request(operation),
    })
}

fn cpu_model() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    text.lines()
        .find(|line| line.starts_with("model name"))
        .and_then(|line| line.split_once(':'))
        .map(|(_, model)| model.trim().to_owned())
        .unwrap_or_default()
}
