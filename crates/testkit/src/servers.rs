//! PostgreSQL and Redis for one test each, from the system's packages.
//!
//! Each server listens on a Unix socket in a directory of its own, so that there is no port to collide on and nothing
//! that others could reach (Redis with TLS excepted, which there is on TCP only). A server ends with its value, and with the test's thread when that dies first. PostgreSQL
//! is not set up anew each time: `initdb` runs once per machine, and its result is copied, which takes a tenth of it.

use std::fs::{self, File};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, geteuid, kill_process};
use tempfile::TempDir;

/// Longest that a server may take to start or end.
const DEADLINE: Duration = Duration::from_secs(30);
/// `nobody` and `nogroup` of Debian: PostgreSQL refuses to run as root.
const NOBODY: u32 = 65_534;

/// A server that the test can end and start again on the same data.
#[derive(Debug)]
struct Server {
    start: Command,
    stop: Signal,
    child: Option<Child>,
}

impl Server {
    fn start(&mut self, ready: impl Fn() -> bool) {
        assert!(self.child.is_none(), "the server runs already");
        let mut child = self.start.spawn().expect("the server starts");
        let deadline = Instant::now() + DEADLINE;
        while !ready() {
            if let Some(status) = child.try_wait().expect("a child") {
                panic!("{:?} ended at its start: {status}", self.start.get_program());
            }
            assert!(Instant::now() < deadline, "the server never became ready");
            std::thread::sleep(Duration::from_millis(5));
        }
        self.child = Some(child);
    }

    fn stop(&mut self) {
        let Some(mut child) = self.child.take() else {
            return;
        };
        let _ = kill_process(Pid::from_child(&child), self.stop);
        let deadline = Instant::now() + DEADLINE;
        while matches!(child.try_wait(), Ok(None)) {
            if Instant::now() >= deadline {
                let _ = child.kill();
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A PostgreSQL server with one empty database.
#[derive(Debug)]
pub struct Postgres {
    server: Server,
    programs: PathBuf,
    dir: TempDir,
}

impl Postgres {
    /// Starts one for tests: its data outlives the server's end, not the machine's, which makes it fast.
    ///
    /// # Panics
    /// PostgreSQL is not installed (`scripts/setup.sh --for test` does it), or does not start.
    #[must_use]
    pub fn start() -> Self {
        Self::start_with(&[
            "fsync=off",
            "full_page_writes=off",
            "autovacuum=off",
            "shared_buffers=16MB",
            "max_wal_senders=0",
            "wal_level=minimal",
            "jit=off",
        ])
    }

    /// Starts one with the settings that PostgreSQL has by itself: a commit is on the disk when it is answered.
    ///
    /// # Panics
    /// PostgreSQL is not installed (`scripts/setup.sh --for bench` does it), or does not start.
    #[must_use]
    pub fn start_durable() -> Self {
        Self::start_with(&[])
    }

    fn start_with(settings: &[&str]) -> Self {
        let programs = postgres_programs();
        let template = template(&programs);
        let dir = private_dir("wrenn-postgres-");
        let data = dir.path().join("data");
        run(Command::new("cp")
            .args(["-a", "--reflink=auto"])
            .arg(&template)
            .arg(&data));
        give_to_nobody(dir.path());
        let mut start = unprivileged("QUIT");
        start
            .arg(programs.join("postgres"))
            .arg("-D")
            .arg(&data)
            .arg("-k")
            .arg(dir.path());
        let always = [
            "listen_addresses=",
            "max_connections=100",
            // In the data directory rather than in /dev/shm, where a killed server would leave it.
            "dynamic_shared_memory_type=mmap",
        ];
        for setting in always.iter().chain(settings) {
            start.args(["-c", setting]);
        }
        start
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(dir.path().join("log")).map_or_else(|_| Stdio::null(), Stdio::from));
        let mut started = Self {
            server: Server {
                start,
                // Ends at once, without a checkpoint.
                stop: Signal::QUIT,
                child: None,
            },
            programs,
            dir,
        };
        started.resume();
        started
    }

    /// `postgres://…`.
    #[must_use]
    pub fn url(&self) -> String {
        format!(
            "postgres://wrenn@localhost/postgres?host={}",
            self.dir.path().display()
        )
    }

    /// What it has logged since its start.
    ///
    /// # Panics
    /// The log cannot be read.
    #[must_use]
    pub fn log(&self) -> String {
        let bytes = fs::read(self.dir.path().join("log")).expect("the log");
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Ends it as a crash would; its data stays.
    pub fn stop(&mut self) {
        self.server.stop();
    }

    /// Starts it again.
    ///
    /// # Panics
    /// It does not start.
    pub fn resume(&mut self) {
        let (programs, dir) = (self.programs.clone(), self.dir.path().to_owned());
        self.server.start(|| {
            Command::new(programs.join("pg_isready"))
                .args(["-q", "-U", "wrenn", "-h"])
                .arg(&dir)
                .status()
                .is_ok_and(|status| status.success())
        });
    }

    /// Runs a statement, past the program under test.
    ///
    /// # Panics
    /// It failed.
    pub fn execute(&self, sql: &str) -> String {
        let output = Command::new(self.programs.join("psql"))
            .args([
                "-X",
                "-q",
                "-t",
                "-A",
                "-v",
                "ON_ERROR_STOP=1",
                "-U",
                "wrenn",
                "-h",
            ])
            .arg(self.dir.path())
            .args(["-d", "postgres", "-c", sql])
            .output()
            .expect("psql runs");
        assert!(
            output.status.success(),
            "{sql}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }
}

/// A Redis server that keeps nothing on disk.
#[derive(Debug)]
pub struct Redis {
    server: Server,
    dir: TempDir,
    /// Where it takes TLS, which it does on TCP only.
    tls: Option<u16>,
}

impl Redis {
    /// Starts one.
    ///
    /// # Panics
    /// Redis is not installed (`scripts/setup.sh --for test` does it), or does not start.
    #[must_use]
    pub fn start() -> Self {
        Self::start_in(private_dir("wrenn-redis-"), None)
    }

    /// Starts one that takes TLS too, with a certificate of its own for `localhost` that nothing on this machine
    /// trusts.
    ///
    /// # Panics
    /// As [`Self::start`], or `openssl` is not installed.
    #[must_use]
    pub fn start_tls() -> Self {
        let dir = private_dir("wrenn-redis-");
        run(Command::new("openssl")
            .args([
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:P-256",
            ])
            .args(["-nodes", "-days", "2", "-subj", "/CN=localhost"])
            .args(["-addext", "subjectAltName=DNS:localhost"])
            // Else it is an authority's certificate, which no server may show as its own.
            .args(["-addext", "basicConstraints=critical,CA:FALSE"])
            .arg("-keyout")
            .arg(dir.path().join("key.pem"))
            .arg("-out")
            .arg(dir.path().join("cert.pem")));
        give_to_nobody(&dir.path().join("key.pem"));
        // Free a moment ago; that another program takes it in between is what a fixed one would risk every time.
        let free = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
        let port = free.local_addr().expect("bound").port();
        drop(free);
        Self::start_in(dir, Some(port))
    }

    fn start_in(dir: TempDir, tls: Option<u16>) -> Self {
        give_to_nobody(dir.path());
        let mut start = unprivileged("TERM");
        start
            .args(["redis-server", "--port", "0", "--unixsocket"])
            .arg(dir.path().join("socket"))
            .args([
                "--unixsocketperm",
                "777",
                "--save",
                "",
                "--appendonly",
                "no",
                "--dir",
            ])
            .arg(dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        if let Some(port) = tls {
            start
                .args(["--bind", "127.0.0.1", "--tls-auth-clients", "no", "--tls-port"])
                .arg(port.to_string())
                .arg("--tls-cert-file")
                .arg(dir.path().join("cert.pem"))
                .arg("--tls-key-file")
                .arg(dir.path().join("key.pem"));
        }
        let mut started = Self {
            server: Server {
                start,
                stop: Signal::TERM,
                child: None,
            },
            dir,
            tls,
        };
        started.resume();
        started
    }

    /// `redis+unix:…`.
    #[must_use]
    pub fn url(&self) -> String {
        format!("redis+unix://{}", self.socket().display())
    }

    /// `rediss:…`.
    ///
    /// # Panics
    /// It was started without TLS.
    #[must_use]
    pub fn tls_url(&self) -> String {
        format!("rediss://localhost:{}", self.tls.expect("started with TLS"))
    }

    /// The certificate that it shows, for those who are to trust it.
    #[must_use]
    pub fn certificate(&self) -> PathBuf {
        self.dir.path().join("cert.pem")
    }

    /// Ends it; what it held is gone.
    pub fn stop(&mut self) {
        self.server.stop();
    }

    /// Starts it again, empty.
    ///
    /// # Panics
    /// It does not start.
    pub fn resume(&mut self) {
        let socket = self.socket();
        self.server.start(|| UnixStream::connect(&socket).is_ok());
    }

    /// Runs a command of `redis-cli`, past the program under test.
    ///
    /// # Panics
    /// It failed.
    pub fn command(&self, words: &[&str]) -> String {
        let output = Command::new("redis-cli")
            .arg("-s")
            .arg(self.socket())
            .args(words)
            .output()
            .expect("redis-cli runs");
        assert!(output.status.success(), "{words:?}");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }
}

/// A command line that the server's own is appended to: without root's powers, and ended with the thread that
/// started it.
fn unprivileged(signal: &str) -> Command {
    let mut command = Command::new("setpriv");
    if geteuid().is_root() {
        command.args([
            format!("--reuid={NOBODY}"),
            format!("--regid={NOBODY}"),
            "--clear-groups".to_owned(),
        ]);
    }
    command.args(["--pdeathsig", signal]);
    command
}

/// Short enough for a socket's path, and passable for `nobody`, unlike root's home.
fn private_dir(prefix: &str) -> TempDir {
    tempfile::Builder::new()
        .prefix(prefix)
        .tempdir_in("/tmp")
        .expect("a directory")
}

fn give_to_nobody(path: &Path) {
    if geteuid().is_root() {
        std::os::unix::fs::chown(path, Some(NOBODY), Some(NOBODY)).expect("chown");
    }
}

/// Debian keeps the server's programs out of the PATH.
fn postgres_programs() -> PathBuf {
    let mut found: Vec<(u32, PathBuf)> = fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let version = entry.file_name().to_str()?.parse().ok()?;
            Some((version, entry.path().join("bin")))
        })
        .filter(|(_, programs)| programs.join("initdb").exists())
        .collect();
    found.sort();
    if let Some((_, programs)) = found.pop() {
        return programs;
    }
    std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())
        .find(|folder| folder.join("initdb").exists())
        .expect("PostgreSQL is installed: run scripts/setup.sh --for test")
}

/// The data directory that `initdb` made, once per machine, user and version.
fn template(programs: &Path) -> PathBuf {
    let cache = PathBuf::from(format!("/tmp/wrenn-test-cache-{}", geteuid().as_raw()));
    let _ = fs::DirBuilder::new().mode(0o700).create(&cache);
    let found = fs::symlink_metadata(&cache).expect("the cache's folder");
    assert!(
        found.is_dir()
            && found.uid() == geteuid().as_raw()
            && found.permissions().mode().trailing_zeros() >= 6,
        "{} is not a private folder of this user",
        cache.display()
    );
    let version = Command::new(programs.join("postgres"))
        .arg("--version")
        .output()
        .expect("postgres runs");
    let version: String = String::from_utf8_lossy(&version.stdout)
        .chars()
        .filter(|char| char.is_ascii_alphanumeric() || *char == '.')
        .collect();
    let template = cache.join(version);
    let lock = File::create(cache.join("lock")).expect("the lock");
    lock.lock().expect("the lock");
    if !template.exists() {
        let dir = private_dir("wrenn-initdb-");
        give_to_nobody(dir.path());
        let data = dir.path().join("data");
        run(unprivileged("KILL")
            .arg(programs.join("initdb"))
            .arg("-D")
            .arg(&data)
            .args(["-U", "wrenn", "--auth=trust", "--no-sync", "--wal-segsize=1"])
            .args(["--no-locale", "-E", "UTF8"])
            .current_dir(dir.path()));
        // Copied beside its place and renamed: what is there is whole.
        let draft = tempfile::Builder::new().tempdir_in(&cache).expect("a directory");
        run(Command::new("cp")
            .arg("-a")
            .arg(&data)
            .arg(draft.path().join("data")));
        fs::rename(draft.path().join("data"), &template).expect("renamed");
    }
    template
}

fn run(command: &mut Command) {
    let output = command.stdin(Stdio::null()).output().expect("a program");
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}
