//! The platform under test: `wrenn up` of this very executable, in a process and a folder of its own.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::Notify;
use wrenn_client::{Client, CreateSandbox, SandboxHandle, TemplateKind, TemplateStatus};

use super::processes::{self, Vmm};

/// With a full fetch and build of the root file system.
const START_LIMIT: Duration = Duration::from_secs(1800);
const STOP_LIMIT: Duration = Duration::from_secs(60);
/// A platform that uses less than this share of one processor is at rest.
const REST_TICKS: u64 = 3;
const REST_WINDOW: Duration = Duration::from_millis(200);
const REST_LIMIT: Duration = Duration::from_secs(20);

/// Where one platform keeps its things.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub(super) data: PathBuf,
    pub(super) cache: Option<PathBuf>,
    pub(super) log: PathBuf,
}

/// The lines that the server printed, and when.
#[derive(Debug, Default)]
struct Said {
    lines: Mutex<Vec<(Instant, String)>>,
    changed: Notify,
}

/// A running platform.
#[derive(Debug)]
pub(super) struct Platform {
    child: Child,
    place: Place,
    url: String,
    started: Instant,
    said: Arc<Said>,
}

impl Platform {
    /// Starts the server process. `pool` is the number of machines that it keeps ready; `None` leaves its default.
    pub(super) fn spawn(place: &Place, pool: Option<u32>) -> anyhow::Result<Self> {
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("up").arg("--data-dir").arg(&place.data);
        command.args(["--listen", &format!("127.0.0.1:{port}"), "--on-exit", "pause"]);
        if let Some(cache) = &place.cache {
            command.arg("--cache-dir").arg(cache);
        }
        if let Some(pool) = pool {
            command.args(["--pool", &pool.to_string()]);
        }
        // What a person set for a platform of their own is none of this one's.
        for variable in ["DATABASE_URL", "WRENN_AGENT_LISTEN", "WRENN_AGENT_URL"] {
            command.env_remove(variable);
        }
        let started = Instant::now();
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            // A terminal's Ctrl-C is for the bench, which then ends this process in order.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .context("cannot start the platform")?;
        let said = Arc::new(Said::default());
        let stderr = child
            .stderr
            .take()
            .context("the platform has no standard error")?;
        let (log, heard) = (place.log.clone(), Arc::clone(&said));
        tokio::spawn(async move {
            let mut log = tokio::fs::File::options()
                .create(true)
                .append(true)
                .open(log)
                .await?;
            let mut lines = BufReader::new(stderr).lines();
            while let Some(line) = lines.next_line().await? {
                log.write_all(format!("{line}\n").as_bytes()).await?;
                heard
                    .lines
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push((Instant::now(), line));
                heard.changed.notify_waiters();
            }
            std::io::Result::Ok(())
        });
        Ok(Self {
            child,
            place: place.clone(),
            url: format!("http://127.0.0.1:{port}"),
            started,
            said,
        })
    }

    pub(super) fn started(&self) -> Instant {
        self.started
    }

    pub(super) fn pid(&self) -> anyhow::Result<u32> {
        self.child.id().context("the platform has ended")
    }

    /// When the server first printed a line that holds `part`.
    pub(super) async fn heard(&mut self, part: &str) -> anyhow::Result<Instant> {
        let deadline = Instant::now() + START_LIMIT;
        let said = Arc::clone(&self.said);
        loop {
            let changed = said.changed.notified();
            let found = said
                .lines
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .iter()
                .find_map(|(at, line)| line.contains(part).then_some(*at));
            if let Some(at) = found {
                return Ok(at);
            }
            self.check_alive()?;
            if Instant::now() > deadline {
                bail!("the platform did not print '{part}' in time");
            }
            let _ = tokio::time::timeout(Duration::from_millis(500), changed).await;
        }
    }

    fn check_alive(&mut self) -> anyhow::Result<()> {
        let Some(status) = self.child.try_wait()? else {
            return Ok(());
        };
        bail!(
            "the platform ended ({status}). Its last words:\n{}",
            self.last_words()
        )
    }

    /// The end of what the server wrote.
    pub(super) fn last_words(&self) -> String {
        let log = std::fs::read_to_string(&self.place.log).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(15)..].join("\n")
    }

    /// Waits until the API answers, and tells when it did.
    pub(super) async fn healthy(&mut self) -> anyhow::Result<Instant> {
        let client = Client::new(self.url.as_str(), "none")?;
        let deadline = Instant::now() + START_LIMIT;
        loop {
            match client.health().await {
                Ok(_) => return Ok(Instant::now()),
                Err(error) if Instant::now() > deadline => return Err(error.into()),
                Err(_) => {}
            }
            self.check_alive()?;
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Waits until the built-in template can be used, and tells when it could.
    pub(super) async fn ready(&mut self) -> anyhow::Result<Instant> {
        let deadline = Instant::now() + START_LIMIT;
        self.healthy().await?;
        let client = self.client().await?;
        loop {
            let templates = client.snapshots().list(Some(TemplateKind::Base)).await?;
            if templates
                .iter()
                .any(|template| template.status == TemplateStatus::Failed)
            {
                bail!(
                    "the built-in template could not be made; see {}",
                    self.place.log.display()
                );
            }
            if templates
                .iter()
                .any(|template| template.status == TemplateStatus::Ready)
            {
                return Ok(Instant::now());
            }
            self.check_alive()?;
            if Instant::now() > deadline {
                bail!("the built-in template is not ready in time");
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// A client with the platform's first key.
    pub(super) async fn client(&mut self) -> anyhow::Result<Client> {
        let path = self.place.data.join("local.env");
        let deadline = Instant::now() + Duration::from_secs(60);
        let key = loop {
            let text = std::fs::read_to_string(&path).unwrap_or_default();
            let key = text.lines().find_map(|line| line.strip_prefix("WRENN_API_KEY="));
            if let Some(key) = key {
                break key.to_owned();
            }
            self.check_alive()?;
            if Instant::now() > deadline {
                bail!("{} does not appear", path.display());
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        };
        Ok(Client::new(self.url.as_str(), key)?)
    }

    /// The platform's virtual machines that belong to sandboxes.
    pub(super) fn sandbox_vmms(&self) -> Vec<Vmm> {
        processes::vmms_below(&self.place.data.join("sandboxes"))
    }

    /// Waits until the platform and all its machines use hardly any processor time, so that what it does behind the
    /// scenes (getting machines ready, removing old ones) disturbs no sample. Nor may what one sample left to be
    /// written to disk slow down the next, which would always be the other side's.
    pub(super) async fn rest(&self) {
        let _ = tokio::task::spawn_blocking(rustix::fs::sync).await;
        let deadline = Instant::now() + REST_LIMIT;
        // What starts only after a quiet time has started after this.
        tokio::time::sleep(Duration::from_millis(450)).await;
        while Instant::now() < deadline {
            let before = self.used();
            tokio::time::sleep(REST_WINDOW).await;
            let after = self.used();
            let grown = after.1.saturating_sub(before.1);
            if before.0 == after.0 && grown <= REST_TICKS + after.0 as u64 / 4 {
                return;
            }
        }
    }

    fn used(&self) -> (usize, u64) {
        let vmms = processes::vmms_below(&self.place.data);
        let ticks = vmms
            .iter()
            .map(|vmm| vmm.pid)
            .chain(self.child.id())
            .filter_map(processes::cpu_ticks)
            .sum();
        (vmms.len(), ticks)
    }

    /// Destroys every sandbox.
    pub(super) async fn clear(&mut self) -> anyhow::Result<()> {
        let client = self.client().await?;
        let sandboxes = client.sandboxes().list().await?;
        let handles = sandboxes.iter().map(|record| client.sandbox(record.id.as_str()));
        destroy(handles.collect()).await
    }

    /// Ends the server in order, or else without.
    pub(super) async fn stop(mut self) -> anyhow::Result<()> {
        // Destroyed rather than paused: nothing of them is needed any more.
        if let Ok(None) = self.child.try_wait()
            && let Ok(Err(error)) = tokio::time::timeout(STOP_LIMIT, self.clear()).await
        {
            eprintln!("wrenn bench: cannot destroy the sandboxes: {error:#}");
        }
        if let Some(pid) = self
            .child
            .id()
            .and_then(|pid| rustix::process::Pid::from_raw(pid.cast_signed()))
        {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        let ended = tokio::time::timeout(STOP_LIMIT, self.child.wait()).await;
        if ended.is_err() {
            self.child.kill().await?;
        }
        kill_stray(&self.place.data);
        Ok(())
    }
}

/// Ends machines that a server left behind, known by their folder.
fn kill_stray(data: &Path) {
    for vmm in processes::vmms_below(data) {
        if let Some(pid) = rustix::process::Pid::from_raw(vmm.pid.cast_signed()) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
}

/// What every sandbox of the bench is created with.
pub(super) fn usual_sandbox() -> CreateSandbox {
    CreateSandbox {
        timeout_sec: Some(1800),
        ..CreateSandbox::default()
    }
}

/// Destroys sandboxes, all at once, and waits until they are gone.
pub(super) async fn destroy(sandboxes: Vec<SandboxHandle>) -> anyhow::Result<()> {
    futures::future::try_join_all(sandboxes.iter().map(SandboxHandle::destroy_and_wait)).await?;
    Ok(())
}
