//! What the control plane can be told.

mod accounts;

use std::path::PathBuf;
use std::time::Duration;

pub use accounts::{Allowance, AttemptLimits, OAuthProvider, PasswordCost, SmtpConfig};

use crate::auth::secrets::MasterSecret;

/// Settings of a control plane. [`ControlConfig::new`] has sensible values for everything.
#[derive(Clone)]
pub struct ControlConfig {
    /// `postgres://…`; when absent, SQLite in the data directory.
    pub database_url: Option<String>,
    /// `redis://…` or `rediss://…` (TLS), for several control planes on one database; when absent, events stay in this
    /// process.
    pub redis_url: Option<String>,
    /// Signs sessions and seals stored secrets; the same for all control planes of an installation. When absent, one
    /// is made and kept in the data directory.
    pub secret: Option<MasterSecret>,
    /// Where people reach this installation, for links in mails: `https://wrenn.example.com`.
    pub public_url: Option<String>,
    /// Holds the SQLite file and the secret.
    pub data_dir: PathBuf,
    /// Sends activation and reset links. When absent, accounts are active at once.
    pub smtp: Option<SmtpConfig>,
    /// Without a mail server, write links to the log: for a machine whose log only its owner reads.
    pub log_links: bool,
    /// Other ways to log in.
    pub oauth: Vec<OAuthProvider>,
    /// Networks of reverse proxies whose `X-Forwarded-For` is believed.
    pub trusted_proxies: Vec<ipnet::IpNet>,
    /// How much work a password is.
    pub password_cost: PasswordCost,
    /// What slows guessing down.
    pub attempts: AttemptLimits,
    /// What clients may ask for.
    pub limits: Limits,
    /// How PostgreSQL is used.
    pub database: DatabaseLimits,
    /// How full hosts may become.
    pub placement: Placement,
    /// Teams' own hosts may have private addresses, which the control plane then calls.
    pub allow_private_byoc: bool,
    /// How patient the background work is.
    pub timings: Timings,
    /// Audit log, channels, usage, and repeated creates.
    pub around: Around,
}

impl std::fmt::Debug for ControlConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // A database URL holds a password.
        f.debug_struct("ControlConfig")
            .field(
                "database",
                if self.database_url.is_some() {
                    &"postgres"
                } else {
                    &"sqlite"
                },
            )
            .field("redis", &self.redis_url.is_some())
            .field("public_url", &self.public_url)
            .field("data_dir", &self.data_dir)
            .field("smtp", &self.smtp)
            .field("log_links", &self.log_links)
            .field("oauth", &self.oauth)
            .field("trusted_proxies", &self.trusted_proxies)
            .field("limits", &self.limits)
            .field("database", &self.database)
            .field("placement", &self.placement)
            .field("allow_private_byoc", &self.allow_private_byoc)
            .field("timings", &self.timings)
            .field("around", &self.around)
            .finish()
    }
}

impl ControlConfig {
    /// Defaults around a data directory.
    pub fn new(data_dir: impl Into<PathBuf>) -> Self {
        Self {
            database_url: None,
            redis_url: None,
            secret: None,
            public_url: None,
            data_dir: data_dir.into(),
            smtp: None,
            log_links: false,
            oauth: Vec::new(),
            trusted_proxies: Vec::new(),
            password_cost: PasswordCost::default(),
            attempts: AttemptLimits::default(),
            limits: Limits::default(),
            database: DatabaseLimits::default(),
            placement: Placement::default(),
            allow_private_byoc: false,
            timings: Timings::default(),
            around: Around::default(),
        }
    }
}

/// What clients may ask for.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Largest number of vCPUs of a sandbox.
    pub max_vcpus: u32,
    /// Largest memory of a sandbox, MiB.
    pub max_memory_mb: u32,
    /// Largest root disk of a sandbox, MiB.
    pub max_disk_size_mb: u32,
    /// Largest JSON body, bytes.
    pub max_json_bytes: usize,
    /// Most connections of clients at a time, WebSockets included; further ones wait.
    pub max_connections: usize,
    /// Largest file upload, bytes; absent means the guest's disk is the limit.
    pub max_upload_bytes: Option<u64>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_vcpus: 32,
            max_memory_mb: 131_072,
            max_disk_size_mb: 1_048_576,
            max_json_bytes: 1 << 20,
            max_connections: 10_000,
            max_upload_bytes: None,
        }
    }
}

/// How PostgreSQL is used. An SQLite database needs none of this.
#[derive(Debug, Clone, Copy)]
pub struct DatabaseLimits {
    /// Most connections of one control plane.
    pub connections: u32,
    /// How long the answer to one statement is waited for; then the database counts as away.
    pub statement: Duration,
}

impl Default for DatabaseLimits {
    fn default() -> Self {
        Self {
            connections: 20,
            statement: Duration::from_secs(15),
        }
    }
}

/// How full hosts may become before new sandboxes go elsewhere. A resume is not held up by these: a paused
/// sandbox has nowhere else to go.
#[derive(Debug, Clone)]
pub struct Placement {
    /// vCPUs that a host's sandboxes may have for each of its processors.
    pub vcpu_overcommit: u32,
    /// MiB of disk that stay free on a host, for the disks that its sandboxes have and have not filled yet.
    pub disk_reserve_mb: u64,
}

impl Default for Placement {
    fn default() -> Self {
        Self {
            vcpu_overcommit: 16,
            disk_reserve_mb: 2048,
        }
    }
}

/// How patient the background work is. Tests shorten these and step the passes by hand.
#[derive(Debug, Clone)]
pub struct Timings {
    /// Between two passes of the monitor; a poke starts one at once.
    pub monitor_interval: Duration,
    /// Silence after which a host counts as unreachable.
    pub host_silence: Duration,
    /// Age after which an operation that nobody in this process drives is taken up by the monitor.
    pub transient_age: Duration,
    /// Age after which a start that its host never confirmed is given up.
    pub start_deadline: Duration,
    /// How long a sandbox whose record says that it ended or moved on is left alone on its host.
    pub orphan_grace: Duration,
    /// How long one that no record knows is: a database restored from a backup has forgotten what came since.
    pub stranger_grace: Duration,
    /// Limit of one lifecycle RPC.
    pub lifecycle_rpc: Duration,
    /// Limit of one short RPC (ping, list, stat …).
    pub short_rpc: Duration,
    /// How long `POST /v1/snapshots` waits for the template when the client names no `wait`.
    pub snapshot_wait: Duration,
    /// Between two `ping` frames of a terminal.
    pub pty_ping: Duration,
    /// How long an instance that runs the background passes may be silent before another takes over.
    pub lease: Duration,
    /// After this long an event that nobody took in is told again.
    pub event_repeat: Duration,
    /// After this long an event that an instance took from the stream is somebody else's.
    pub event_claim: Duration,
    /// How long events are kept for streams that come back.
    pub event_retention: Duration,
    /// Between two signs of life on a stream of events.
    pub stream_keepalive: Duration,
    /// How often a connection that stays open is asked again whether its key or session still counts.
    pub recheck: Duration,
    /// Before a mail that the server did not take is tried again; doubles with every attempt.
    pub mail_retry: Duration,
    /// After this long without a request, or with half of one's header, a client's connection is closed. Clients that
    /// keep connections do so for about a minute.
    pub connection_idle: Duration,
    /// What is left of background work at shutdown.
    pub shutdown_grace: Duration,
    /// Between two passes of the housekeeping: unfinished deletions, accounts whose grace is over, last uses of keys.
    pub housekeeping_interval: Duration,
    /// How long a deleted account is kept before its row goes; its address stays taken as long.
    pub account_grace: Duration,
}

impl Default for Timings {
    fn default() -> Self {
        Self {
            monitor_interval: Duration::from_secs(60),
            host_silence: Duration::from_secs(90),
            transient_age: Duration::from_secs(30),
            start_deadline: Duration::from_secs(600),
            orphan_grace: Duration::from_secs(120),
            stranger_grace: Duration::from_secs(24 * 3600),
            lifecycle_rpc: Duration::from_secs(300),
            short_rpc: Duration::from_secs(30),
            snapshot_wait: Duration::from_secs(60),
            pty_ping: Duration::from_secs(30),
            lease: Duration::from_secs(15),
            event_repeat: Duration::from_secs(60),
            event_claim: Duration::from_secs(30),
            event_retention: Duration::from_secs(24 * 3600),
            stream_keepalive: Duration::from_secs(15),
            recheck: Duration::from_secs(5),
            mail_retry: Duration::from_secs(5),
            connection_idle: Duration::from_secs(75),
            shutdown_grace: Duration::from_secs(10),
            housekeeping_interval: Duration::from_secs(10),
            account_grace: Duration::from_secs(15 * 24 * 3600),
        }
    }
}

/// What goes on around the sandboxes: audit log, channels, usage, and repeated creates.
#[derive(Debug, Clone)]
pub struct Around {
    /// Channels may lead to private addresses and over plain HTTP.
    pub allow_private_webhooks: bool,
    /// Where Telegram's bot API is.
    pub telegram_url: String,
    /// Age at which entries of the audit log are removed.
    pub audit_keep: Duration,
    /// Age at which the records of sandboxes that ended are removed.
    pub stopped_keep: Duration,
    /// Between two samples of what teams hold.
    pub sample_interval: Duration,
    /// Between two questions to all hosts what their sandboxes use.
    pub sandbox_metrics_interval: Duration,
    /// Between two roll-ups of usage; also between two removals of what is too old.
    pub usage_interval: Duration,
    /// Between two looks for messages that are due; a new event starts one at once.
    pub delivery_interval: Duration,
    /// Limit of one attempt to deliver a message.
    pub delivery_timeout: Duration,
    /// Attempts after which a message is given up.
    pub delivery_attempts: u32,
    /// Messages that may wait for one channel; the oldest beyond that are given up.
    pub delivery_pending: u32,
    /// Wait after the first failed attempt; doubles with each further one, up to an hour.
    pub delivery_backoff: Duration,
    /// How long the answer to a create with an `Idempotency-Key` is kept.
    pub idempotency_keep: Duration,
    /// How long a process may fall silent before another may execute the create that it had begun.
    pub idempotency_claim: Duration,
    /// How long a repeated create waits for the first one's answer.
    pub idempotency_wait: Duration,
}

impl Default for Around {
    fn default() -> Self {
        const DAY: Duration = Duration::from_secs(24 * 3600);
        Self {
            allow_private_webhooks: false,
            telegram_url: "https://api.telegram.org".to_owned(),
            audit_keep: DAY * 400,
            stopped_keep: DAY * 30,
            sample_interval: Duration::from_secs(10),
            sandbox_metrics_interval: Duration::from_secs(15),
            usage_interval: Duration::from_secs(60),
            delivery_interval: Duration::from_secs(5),
            delivery_timeout: Duration::from_secs(10),
            delivery_attempts: 10,
            delivery_pending: 1000,
            delivery_backoff: Duration::from_secs(5),
            idempotency_keep: DAY,
            idempotency_claim: Duration::from_secs(60),
            idempotency_wait: Duration::from_secs(30),
        }
    }
}

/// The secret in the data directory; made at the first start.
pub(crate) fn kept_secret(data_dir: &std::path::Path) -> crate::Result<MasterSecret> {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    let path = data_dir.join("secret.key");
    let read = || std::fs::read_to_string(&path);
    match read() {
        Ok(text) => return MasterSecret::parse(&text),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(unusable(&path, &error)),
    }
    let secret = MasterSecret::generate()?;
    // Written whole beside its place, so that no crash leaves half a secret.
    let draft = data_dir.join(format!("secret.key.{}", uuid::Uuid::new_v4().simple()));
    let written = std::fs::File::options()
        .create_new(true)
        .write(true)
        .mode(0o600)
        .open(&draft)
        .and_then(|mut file| {
            file.write_all(secret.reveal().as_bytes())?;
            file.sync_all()
        })
        // Fails when another process was faster; then theirs is the secret.
        .and_then(|()| match std::fs::hard_link(&draft, &path) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => Err(error),
            _ => std::fs::remove_file(&draft),
        });
    written.map_err(|error| unusable(&path, &error))?;
    MasterSecret::parse(&read().map_err(|error| unusable(&path, &error))?)
}

fn unusable(path: &std::path::Path, error: &std::io::Error) -> crate::Error {
    crate::Error::internal(format!(
        "cannot keep the installation's secret in {}: {error}",
        path.display()
    ))
}
