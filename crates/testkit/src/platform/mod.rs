//! Whole platforms with real VMs: the program `wrenn up` in a data directory of its own.
//!
//! The kernel and the root filesystem come from the cache directory that all tests of a machine share, so that they
//! are built once; each platform boots its own template from them. [`Platform::finish`] ends the platform
//! in order and asserts that nothing of it is left; a platform that is dropped in a failing test shows the end of
//! its log, and takes its processes and files along.

mod leaks;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use wrenn_client::{Client, CreateSandbox, Exec, ExecResult, SandboxHandle, TemplateStatus};

pub use leaks::{EmptyGroups, assert_no_vm_below, names};

/// The first build on a machine downloads packages.
const TEMPLATE_LIMIT: Duration = Duration::from_secs(600);
/// How long an orderly end may take: it saves the memory of what still runs.
const END_LIMIT: Duration = Duration::from_secs(60);
/// What a control plane on its own says before its address.
const SERVING: &str = "Serving ";
/// Lines of the log that a failing test shows.
const LOG_TAIL: usize = 60;

/// Waits until `probe` gives something.
///
/// # Panics
/// After `limit`, naming what was waited for.
pub async fn eventually<T>(what: &str, limit: Duration, mut probe: impl AsyncFnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = probe().await {
            return found;
        }
        assert!(start.elapsed() < limit, "not within {limit:?}: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// The cache directory that all tests of this user share on this machine.
#[must_use]
pub fn cache_dir() -> PathBuf {
    let set = |name| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    let home = || set("HOME").unwrap_or_else(|| "/".into());
    set("XDG_CACHE_HOME")
        .unwrap_or_else(|| home().join(".cache"))
        .join("wrenn")
}

/// While the shared cache is empty, lets one platform at a time through, so that the first fills it for all.
async fn first_build() -> Option<std::fs::File> {
    let full = || {
        names(&cache_dir().join("rootfs"))
            .iter()
            .any(|name| name.ends_with(".ext4"))
    };
    if full() {
        return None;
    }
    let locked = tokio::task::spawn_blocking(|| {
        std::fs::create_dir_all(cache_dir()).expect("the cache directory can be made");
        let file = std::fs::File::create(cache_dir().join("tests.lock")).expect("a lock file");
        file.lock().expect("a lock");
        file
    })
    .await
    .expect("no panic");
    // Whoever waited finds the work done, and need not keep the others waiting.
    (!full()).then_some(locked)
}

/// A new folder for one platform, short enough for socket paths, through which VM processes can pass.
///
/// # Panics
/// When it cannot be made.
#[must_use]
pub fn scratch() -> tempfile::TempDir {
    use std::os::unix::fs::PermissionsExt as _;
    tempfile::Builder::new()
        .prefix("wrenn-vm-")
        .permissions(std::fs::Permissions::from_mode(0o711))
        .tempdir_in("/tmp")
        .expect("a temporary folder can be made")
}

/// Pids of VM processes that work below a folder.
#[must_use]
pub fn vm_processes(dir: &Path) -> Vec<u32> {
    let Ok(processes) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    processes
        .flatten()
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let cwd = std::fs::read_link(entry.path().join("cwd")).ok()?;
            let comm = std::fs::read_to_string(entry.path().join("comm")).ok()?;
            (cwd.starts_with(dir) && comm.starts_with("qemu")).then_some(pid)
        })
        .collect()
}

/// Sends a signal to a process.
pub fn signal(pid: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        // It may have ended by itself.
        let _ = kill_process(pid, signal);
    }
}

/// A platform that serves.
#[derive(Debug)]
pub struct Platform {
    scratch: tempfile::TempDir,
    binary: PathBuf,
    envs: Vec<(String, String)>,
    listen: String,
    /// The whole platform, or its control plane.
    child: Option<Child>,
    /// The host agent, where it is a process of its own.
    agent: Option<Child>,
    apart: bool,
    client: Client,
    groups: EmptyGroups,
}

impl Platform {
    fn new(binary: impl Into<PathBuf>, envs: &[(&str, &str)]) -> Self {
        Self {
            scratch: scratch(),
            binary: binary.into(),
            envs: envs
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                .collect(),
            listen: "127.0.0.1:0".to_owned(),
            child: None,
            agent: None,
            apart: false,
            client: Client::new("http://127.0.0.1:1", "wrn_none").expect("a client"),
            groups: EmptyGroups::now(),
        }
    }

    /// Starts the program with its defaults and waits until its template is ready.
    ///
    /// # Panics
    /// When it does not start, or its template cannot be made.
    pub async fn start(binary: impl Into<PathBuf>) -> Self {
        Self::start_with(binary, &[]).await
    }

    /// The same, with further environment variables.
    ///
    /// # Panics
    /// As [`Self::start`].
    pub async fn start_with(binary: impl Into<PathBuf>, envs: &[(&str, &str)]) -> Self {
        let mut platform = Self::new(binary, envs);
        let _first = first_build().await;
        platform.spawn();
        let file = platform.data_dir().join("local.env");
        let text = eventually("local.env is written", Duration::from_secs(60), async || {
            platform.assert_alive();
            std::fs::read_to_string(&file)
                .ok()
                .filter(|text| text.contains("WRENN_BASE_URL=http"))
        })
        .await;
        let value = |name: &str| {
            let line = text
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
            line.unwrap_or_else(|| panic!("{name} is missing in local.env"))
                .to_owned()
        };
        let url = value("WRENN_BASE_URL");
        platform.client = Client::new(&url, value("WRENN_API_KEY")).expect("a client");
        platform.listen = url.trim_start_matches("http://").to_owned();
        platform.wait_ready().await;
        platform
    }

    /// Starts a control plane and a host agent as two processes, as in a fleet, and waits until the template is ready.
    ///
    /// # Panics
    /// As [`Self::start`].
    pub async fn start_apart(binary: impl Into<PathBuf>) -> Self {
        let mut platform = Self::new(binary, &[]);
        platform.apart = true;
        let _first = first_build().await;
        let issued = platform
            .command()
            .args(["control-plane", "--issue-host-token"])
            .output()
            .expect("the program starts");
        assert!(issued.status.success(), "{issued:?}");
        let token = String::from_utf8(issued.stdout).expect("a token");
        platform.spawn();
        let url = eventually("the control plane serves", Duration::from_secs(60), async || {
            platform.assert_alive();
            let log = platform.log();
            let (_, from) = log.rsplit_once(SERVING)?;
            Some(from.split_once('\n')?.0.to_owned())
        })
        .await;
        let env = std::fs::read_to_string(platform.data_dir().join("local.env")).expect("local.env");
        let key = env
            .lines()
            .find_map(|line| line.strip_prefix("WRENN_API_KEY="))
            .expect("a key");
        platform.client = Client::new(&url, key).expect("a client");
        platform.listen = url.trim_start_matches("http://").to_owned();
        platform.spawn_agent(Some(token.trim()));
        platform.wait_ready().await;
        platform
    }

    fn spawn_agent(&mut self, token: Option<&str>) {
        let url = format!("http://{}", self.listen);
        let mut args = vec!["host-agent", "--control-plane", &url];
        args.extend(["--agent-listen", "127.0.0.1:0", "--on-exit", "pause"]);
        if let Some(token) = token {
            args.extend(["--token", token]);
        }
        self.agent = Some(self.run(&args));
    }

    /// Ends the host agent of a platform that was started apart without a chance to do anything, and starts it again.
    ///
    /// # Panics
    /// When there is none.
    pub fn crash_agent(&mut self) {
        let mut agent = self.agent.take().expect("a host agent of its own");
        agent.kill().expect("it can be killed");
        agent.wait().expect("it ends");
        self.spawn_agent(None);
    }

    /// The program with this platform's settings and none of the surroundings'.
    #[must_use]
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.binary);
        for (name, _) in std::env::vars_os() {
            if name
                .to_str()
                .is_some_and(|name| name.starts_with("WRENN_") || name == "DATABASE_URL")
            {
                command.env_remove(name);
            }
        }
        command
            .env("WRENN_DIR", self.data_dir())
            .env("WRENN_CACHE_DIR", cache_dir())
            .envs(self.envs.iter().map(|(name, value)| (name, value)))
            // A `.env` of the checkout is nothing to a test.
            .current_dir(self.scratch.path())
            .stdin(Stdio::null());
        command
    }

    fn spawn(&mut self) {
        let role = if self.apart { "control-plane" } else { "up" };
        self.child = Some(self.run(&[role, "--listen", &self.listen]));
    }

    fn run(&self, args: &[&str]) -> Child {
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.log_path())
            .expect("a log");
        let mut command = self.command();
        command.args(args);
        command.stdout(log.try_clone().expect("a log")).stderr(log);
        command.spawn().expect("the program starts")
    }

    /// Starts the program and ends it as soon as its log shows a text, and asserts that nothing is left of what it was
    /// doing.
    ///
    /// # Panics
    /// When the text does not come, or something is left.
    pub async fn interrupted_at(binary: impl Into<PathBuf>, text: &str) {
        let mut platform = Self::new(binary, &[]);
        let _first = first_build().await;
        platform.spawn();
        eventually(&format!("the log shows '{text}'"), TEMPLATE_LIMIT, async || {
            platform.assert_alive();
            platform.log().contains(text).then_some(())
        })
        .await;
        let status = platform.terminate().await;
        assert!(
            status.success(),
            "the platform ended with {status}:\n{}",
            platform.log_tail()
        );
        platform.assert_nothing_left().await;
    }

    async fn wait_ready(&mut self) {
        let client = self.client.clone();
        eventually("the template 'minimal' is ready", TEMPLATE_LIMIT, async || {
            self.assert_alive();
            let templates = client.snapshots().list(None).await.ok()?;
            let minimal = templates
                .into_iter()
                .find(|template| template.name == "minimal")?;
            match minimal.status {
                TemplateStatus::Ready => Some(()),
                TemplateStatus::Building => None,
                TemplateStatus::Failed => panic!("the template failed:\n{}", self.log_tail()),
            }
        })
        .await;
    }

    fn assert_alive(&mut self) {
        if let Some(child) = &mut self.child
            && let Ok(Some(status)) = child.try_wait()
        {
            self.child = None;
            panic!("the platform ended by itself ({status}):\n{}", self.log_tail());
        }
    }

    /// Starts the program again on the same data directory and port, after [`Self::kill`] or [`Self::terminate`].
    ///
    /// # Panics
    /// As [`Self::start`].
    pub async fn restart(&mut self) {
        assert!(self.child.is_none(), "the platform runs");
        let text = if self.apart { SERVING } else { "Wrenn serves" };
        let starts = |log: &str| log.matches(text).count();
        let before = starts(&self.log());
        self.spawn();
        // The database remembers a ready template, so that alone does not tell that the host is back.
        eventually("the platform serves again", Duration::from_secs(60), async || {
            self.assert_alive();
            (starts(&self.log()) > before).then_some(())
        })
        .await;
        self.wait_ready().await;
    }

    /// Ends the program without a chance to do anything, as a crash would.
    ///
    /// # Panics
    /// When it does not run.
    pub fn kill(&mut self) {
        let mut child = self.child.take().expect("the platform runs");
        child.kill().expect("it can be killed");
        child.wait().expect("it ends");
    }

    /// Asks the program to end, and waits for it.
    ///
    /// # Panics
    /// When it does not run, or does not end in time.
    pub async fn terminate(&mut self) -> ExitStatus {
        // It tells the control plane what its end does.
        if let Some(agent) = self.agent.take() {
            let status = self.end(agent).await;
            assert!(
                status.success(),
                "the host agent ended with {status}:\n{}",
                self.log_tail()
            );
        }
        let child = self.child.take().expect("the platform runs");
        self.end(child).await
    }

    async fn end(&self, mut child: Child) -> ExitStatus {
        signal(child.id(), Signal::TERM);
        let start = Instant::now();
        loop {
            if let Some(status) = child.try_wait().expect("it can be waited for") {
                return status;
            }
            if start.elapsed() > END_LIMIT {
                let _ = child.kill();
                let _ = child.wait();
                panic!(
                    "the platform did not end within {END_LIMIT:?}:\n{}",
                    self.log_tail()
                );
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Ends the platform, asserts that it left nothing but what it should, and removes it.
    ///
    /// # Panics
    /// When something is left.
    pub async fn finish(mut self) {
        let data = self.data_dir();
        let kept: std::collections::BTreeSet<String> = self
            .client
            .sandboxes()
            .list()
            .await
            .expect("the platform answers to its end")
            .into_iter()
            .map(|sandbox| sandbox.id)
            .collect();
        let status = self.terminate().await;
        assert!(
            status.success(),
            "the platform ended with {status}:\n{}",
            self.log_tail()
        );
        let on_disk = names(&data.join("sandboxes"));
        assert!(
            on_disk.is_subset(&kept),
            "files of destroyed sandboxes are left: {on_disk:?}, known: {kept:?}"
        );
        self.assert_nothing_left().await;
    }

    /// No VM, memory group, mount or unfinished work, and no panic on the way.
    async fn assert_nothing_left(&self) {
        let data = self.data_dir();
        assert_no_vm_below(&data).await;
        EmptyGroups::none_since(&self.groups).await;
        for folder in ["tmp", "pool"] {
            assert!(
                names(&data.join(folder)).is_empty(),
                "{folder} is not empty: {:?}",
                names(&data.join(folder))
            );
        }
        let panics = self
            .log()
            .lines()
            .filter(|line| line.contains("panicked at"))
            .count();
        assert_eq!(panics, 0, "the platform panicked:\n{}", self.log_tail());
    }

    /// A client with the platform's first key.
    #[must_use]
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// The data directory.
    #[must_use]
    pub fn data_dir(&self) -> PathBuf {
        self.scratch.path().join("data")
    }

    /// A place for a test's own files.
    #[must_use]
    pub fn scratch_dir(&self) -> &Path {
        self.scratch.path()
    }

    /// The server's process.
    ///
    /// # Panics
    /// When it does not run.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("the platform runs").id()
    }

    /// The most memory that the server's process has used so far, in bytes.
    ///
    /// # Panics
    /// When it does not run.
    #[must_use]
    pub fn peak_memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("its status");
        let kib = status.lines().find_map(|line| {
            line.strip_prefix("VmHWM:")?
                .trim()
                .strip_suffix(" kB")?
                .parse::<u64>()
                .ok()
        });
        kib.expect("VmHWM") << 10
    }

    /// The VM process of a sandbox, if it runs.
    #[must_use]
    pub fn vm_of(&self, sandbox: &str) -> Option<u32> {
        vm_processes(&self.data_dir().join("sandboxes").join(sandbox))
            .first()
            .copied()
    }

    /// All that the server has logged.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    fn log_path(&self) -> PathBuf {
        self.scratch.path().join("log")
    }

    fn log_tail(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(LOG_TAIL)..].join("\n")
    }

    /// A running sandbox of the usual kind.
    ///
    /// # Panics
    /// When it does not start.
    pub async fn sandbox(&self) -> SandboxHandle {
        self.sandbox_from(&CreateSandbox::default()).await
    }

    /// A running sandbox.
    ///
    /// # Panics
    /// When it does not start.
    pub async fn sandbox_from(&self, wanted: &CreateSandbox) -> SandboxHandle {
        match self.client.sandboxes().create_running(wanted).await {
            Ok(sandbox) => sandbox,
            Err(error) => panic!("a sandbox did not start: {error}: {error:?}"),
        }
    }
}

impl Drop for Platform {
    fn drop(&mut self) {
        let data = self.data_dir();
        for mut child in self.agent.take().into_iter().chain(self.child.take()) {
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            eprintln!("--- the platform's log ends with:\n{}", self.log_tail());
        }
        for pid in vm_processes(&data) {
            signal(pid, Signal::KILL);
        }
    }
}

/// Runs a shell script in a sandbox.
///
/// # Panics
/// When it cannot be run at all.
pub async fn shell(sandbox: &SandboxHandle, script: &str) -> ExecResult {
    let command = Exec {
        cmd: "/bin/bash".to_owned(),
        args: vec!["-c".to_owned(), script.to_owned()],
        timeout_sec: Some(120),
        ..Exec::default()
    };
    match sandbox.exec(&command).await {
        Ok(result) => result,
        Err(error) => panic!("exec of '{script}' failed: {error}: {error:?}"),
    }
}

/// What a shell script in a sandbox prints, without the last line end.
///
/// # Panics
/// When it does not end with 0.
pub async fn output(sandbox: &SandboxHandle, script: &str) -> String {
    let result = shell(sandbox, script).await;
    assert_eq!(result.exit_code, 0, "'{script}': {result:?}");
    result.stdout.trim_end().to_owned()
}
