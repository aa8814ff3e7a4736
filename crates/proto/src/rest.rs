//! Bodies of the public REST API (`/v1`), shared by the control plane that serves them and the client.
//!
//! Field names are a published contract (the Wrenn SDKs parse them strictly); optional fields are
//! left out rather than sent as `null` where the SDKs allow both. Times are RFC 3339 in UTC.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

#[cfg(feature = "openapi")]
use utoipa::ToSchema;

/// Implements `Debug` for a struct that holds secrets: the fields of the first list are shown, those of the second are
/// not. A field that is in neither list does not compile, so that nobody adds one without a thought.
#[macro_export]
macro_rules! discreet_debug {
    ($name:ident shows($($shown:ident),* $(,)?) hides($($hidden:ident),+ $(,)?)) => {
        impl ::std::fmt::Debug for $name {
            fn fmt(&self, f: &mut ::std::fmt::Formatter<'_>) -> ::std::fmt::Result {
                let Self { $($shown,)* $($hidden: _),+ } = self;
                f.debug_struct(stringify!($name))
                    $(.field(stringify!($shown), $shown))*
                    .finish_non_exhaustive()
            }
        }
    };
}

/// Bodies. One that holds secrets says which fields its `Debug` shows, and which it hides.
macro_rules! body {
    ($($(#[$meta:meta])* pub struct $name:ident $(shows($($shown:ident),*) hides($($hidden:ident),+))? {
        $($fields:tt)*
    })*) => {$(
        body!(@one ($(shows($($shown),*) hides($($hidden),+))?) $(#[$meta])* pub struct $name { $($fields)* });
    )*};
    (@one () $(#[$meta:meta])* pub struct $name:ident { $($fields:tt)* }) => {
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        #[cfg_attr(feature = "openapi", derive(ToSchema))]
        $(#[$meta])*
        pub struct $name { $($fields)* }
    };
    (@one ($($lists:tt)+) $(#[$meta:meta])* pub struct $name:ident { $($fields:tt)* }) => {
        #[derive(Clone, PartialEq, Serialize, Deserialize)]
        #[cfg_attr(feature = "openapi", derive(ToSchema))]
        $(#[$meta])*
        pub struct $name { $($fields)* }

        $crate::discreet_debug!($name $($lists)+);
    };
}

mod accounts;
mod around;
mod events;
mod hosts;
mod teams;

pub use accounts::*;
pub use around::*;
pub use events::*;
pub use hosts::*;
pub use teams::*;

/// A sandbox's status as clients see it. Exactly these words: the Wrenn SDK rejects others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum SandboxStatus {
    /// Accepted, no host chosen yet.
    Pending,
    /// Being restored on its host.
    Starting,
    /// Ready for work.
    Running,
    /// Its memory and disk are being saved.
    Pausing,
    /// Saved; uses disk only.
    Paused,
    /// A template is being made from it.
    Snapshotting,
    /// Being brought back from its saved state.
    Resuming,
    /// Paused for long and moved to colder storage.
    Hibernated,
    /// Being destroyed.
    Stopping,
    /// Destroyed; final.
    Stopped,
    /// Its host cannot be reached; may come back.
    Missing,
    /// Its VM died or could not start; see `error`.
    Error,
}

impl SandboxStatus {
    /// All statuses, in the order of the documentation.
    pub const ALL: [Self; 12] = [
        Self::Pending,
        Self::Starting,
        Self::Running,
        Self::Pausing,
        Self::Paused,
        Self::Snapshotting,
        Self::Resuming,
        Self::Hibernated,
        Self::Stopping,
        Self::Stopped,
        Self::Missing,
        Self::Error,
    ];

    /// The word on the wire and in the database.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Pausing => "pausing",
            Self::Paused => "paused",
            Self::Snapshotting => "snapshotting",
            Self::Resuming => "resuming",
            Self::Hibernated => "hibernated",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::Missing => "missing",
            Self::Error => "error",
        }
    }

    /// Whether an operation is under way that will end by itself.
    #[must_use]
    pub fn is_transient(self) -> bool {
        match self {
            Self::Pending
            | Self::Starting
            | Self::Pausing
            | Self::Snapshotting
            | Self::Resuming
            | Self::Stopping => true,
            Self::Running | Self::Paused | Self::Hibernated | Self::Stopped | Self::Missing | Self::Error => {
                false
            }
        }
    }
}

impl std::fmt::Display for SandboxStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl std::str::FromStr for SandboxStatus {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|status| status.as_str() == text)
            .ok_or_else(|| format!("unknown sandbox status '{text}'"))
    }
}

body! {
    /// Request body of `POST /v1/sandboxes`. Every field may be left out.
    #[derive(Default)]
    #[serde(default)]
    pub struct CreateSandbox
        shows(template, vcpus, memory_mb, timeout_sec, disk_size_mb, metadata) hides(envs)
    {
        /// Template name or id; `minimal` when absent.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub template: Option<String>,
        /// Virtual CPUs; the template's own number when absent (1 for `minimal`).
        #[serde(skip_serializing_if = "Option::is_none")]
        pub vcpus: Option<u32>,
        /// Memory in MiB; the template's own size when absent (512 for `minimal`).
        #[serde(skip_serializing_if = "Option::is_none")]
        pub memory_mb: Option<u32>,
        /// Pause after this many seconds without exec or ping; 0 means never.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub timeout_sec: Option<u32>,
        /// Size of the root disk in MiB; the template's own size when absent (20480 for `minimal`).
        #[serde(skip_serializing_if = "Option::is_none")]
        pub disk_size_mb: Option<u32>,
        /// Free-form labels.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub metadata: Option<BTreeMap<String, String>>,
        /// Environment of every process in the sandbox.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub envs: Option<BTreeMap<String, String>>,
    }

    /// A sandbox.
    pub struct Sandbox {
        /// `sb-{uuid}`.
        pub id: String,
        /// Where it is in its life.
        pub status: SandboxStatus,
        /// Name of the template it came from.
        pub template: String,
        /// Virtual CPUs.
        pub vcpus: u32,
        /// Memory in MiB.
        pub memory_mb: u32,
        /// Root disk in MiB.
        pub disk_size_mb: u32,
        /// Seconds of inactivity before it is paused; 0 means never.
        pub timeout_sec: u32,
        /// The host it lives on.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub host_id: Option<String>,
        /// When it was asked for.
        #[cfg_attr(feature = "openapi", schema(value_type = String, format = DateTime))]
        pub created_at: Timestamp,
        /// When it first ran.
        #[cfg_attr(feature = "openapi", schema(value_type = Option<String>, format = DateTime))]
        pub started_at: Option<Timestamp>,
        /// When it was last used.
        #[cfg_attr(feature = "openapi", schema(value_type = Option<String>, format = DateTime))]
        pub last_active_at: Option<Timestamp>,
        /// When this record last changed.
        #[cfg_attr(feature = "openapi", schema(value_type = String, format = DateTime))]
        pub last_updated: Timestamp,
        /// The labels given at creation.
        pub metadata: BTreeMap<String, String>,
        /// In status `error`: what happened.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub error: Option<SandboxFailure>,
    }

    /// Why a sandbox is in status `error`.
    pub struct SandboxFailure {
        /// What happened, in one sentence.
        pub message: String,
        /// The last lines of the guest's console.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub console: Option<String>,
    }

    /// Request body of `POST /v1/sandboxes/{id}/exec`.
    #[derive(Default)]
    #[serde(default)]
    pub struct Exec shows(cmd, args, background, timeout_sec, cwd, tag, user) hides(envs) {
        /// Program to run; looked up in the user's `PATH`.
        pub cmd: String,
        /// Its arguments.
        pub args: Vec<String>,
        /// Answer at once with the pid and leave it running.
        pub background: bool,
        /// Kill it after this many seconds; 0 or absent means 30 in the foreground, no limit in the background.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub timeout_sec: Option<u32>,
        /// Added to the sandbox's environment.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub envs: Option<BTreeMap<String, String>>,
        /// Working directory.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub cwd: Option<String>,
        /// Name by which to find the process later.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub tag: Option<String>,
        /// User to run as.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub user: Option<String>,
    }

    /// Answer to a foreground exec.
    pub struct ExecResult {
        /// The sandbox.
        pub sandbox_id: String,
        /// The program that ran.
        pub cmd: String,
        /// Collected standard output.
        pub stdout: String,
        /// Collected standard error.
        pub stderr: String,
        /// Exit code; -1 when a signal ended it.
        pub exit_code: i32,
        /// How long it ran, in milliseconds.
        pub duration_ms: u64,
        /// `utf-8`, or `base64` when either stream is not valid UTF-8 (then both are base64).
        pub encoding: String,
        /// Whether output was cut at the limit of 16 MiB a stream.
        #[serde(default)]
        pub truncated: bool,
    }

    /// Answer to a background exec.
    pub struct ExecStarted {
        /// The sandbox.
        pub sandbox_id: String,
        /// The program that runs.
        pub cmd: String,
        /// Its pid in the guest.
        pub pid: u32,
        /// Its tag: the one asked for, or `proc-{hex}`.
        pub tag: String,
    }

    /// A process in a sandbox.
    pub struct Process {
        /// Its pid in the guest.
        pub pid: u32,
        /// Its tag.
        pub tag: String,
        /// The program.
        pub cmd: String,
        /// Its arguments.
        pub args: Vec<String>,
    }

    /// Answer to `GET /v1/sandboxes/{id}/processes`.
    pub struct ProcessList {
        /// Processes that were started through the API and still run.
        pub processes: Vec<Process>,
    }

    /// Request body of the file routes that take a path.
    #[derive(Default)]
    pub struct FilePath {
        /// Absolute, or relative to the user's home.
        pub path: String,
        /// How deep to list; 0 and 1 mean the directory's own entries. Only for `files/list`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub depth: Option<u32>,
        /// User whose home relative paths start from, and who owns what is made; the template's default user
        /// when absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub user: Option<String>,
    }

    /// A file, directory or symbolic link.
    pub struct FileEntry {
        /// Last part of the path.
        pub name: String,
        /// Absolute path.
        pub path: String,
        /// `file`, `directory` or `symlink`.
        #[serde(rename = "type")]
        pub kind: FileKind,
        /// Bytes.
        pub size: i64,
        /// Permission bits.
        pub mode: u32,
        /// As `ls -l` prints them.
        pub permissions: String,
        /// Owner's name.
        pub owner: String,
        /// Group's name.
        pub group: String,
        /// Unix seconds.
        pub modified_at: i64,
        /// Where a symbolic link points.
        pub symlink_target: Option<String>,
    }

    /// Answer to `files/list`.
    pub struct FileList {
        /// The entries, depth first, in lexical order.
        pub entries: Vec<FileEntry>,
    }

    /// Answer to `files/mkdir`.
    pub struct MadeDir {
        /// The directory.
        pub entry: FileEntry,
    }

    /// Request body of `POST /v1/snapshots`.
    pub struct CreateSnapshot {
        /// The sandbox to take it from: running or paused.
        pub sandbox_id: String,
        /// Its name: lower-case letters, digits, `-`, `_`, `.`; made up when absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub name: Option<String>,
    }

    /// A template: built from a recipe (`base`) or made from a sandbox (`snapshot`).
    pub struct Template {
        /// `tpl-{uuid}`.
        pub id: String,
        /// Unique within its team.
        pub name: String,
        /// `base` or `snapshot`.
        #[serde(rename = "type")]
        pub kind: TemplateKind,
        /// `ready`, `building` or `failed`.
        pub status: TemplateStatus,
        /// Virtual CPUs of a sandbox made from it.
        pub vcpus: u32,
        /// Memory in MiB of a sandbox made from it.
        pub memory_mb: u32,
        /// Root disk in MiB.
        pub disk_size_mb: u32,
        /// Bytes on disk.
        pub size_bytes: u64,
        /// Whether it belongs to the platform and is visible to every team.
        pub platform: bool,
        /// When it was made.
        #[cfg_attr(feature = "openapi", schema(value_type = String, format = DateTime))]
        pub created_at: Timestamp,
    }

    /// Answer to `GET /v1/sandboxes/{id}/console`.
    pub struct Console {
        /// The last lines, as text; empty when nothing was written to it.
        pub console: String,
    }

    /// Answer to `GET /v1/sandboxes/{id}/metrics`.
    pub struct Metrics {
        /// The sandbox.
        pub sandbox_id: String,
        /// The range asked for.
        pub range: String,
        /// Oldest first.
        pub points: Vec<MetricsPoint>,
    }

    /// One sample.
    pub struct MetricsPoint {
        /// Unix seconds.
        pub timestamp_unix: i64,
        /// 0 to 100 over all vCPUs.
        pub cpu_pct: f64,
        /// Memory in use in the guest, bytes.
        pub mem_bytes: u64,
        /// Root disk in use, bytes.
        pub disk_bytes: u64,
    }

    /// Every error's body.
    pub struct ErrorBody {
        /// What went wrong.
        pub error: ErrorDetail,
        /// With `host_has_sandboxes`: those that are in the way.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        pub sandbox_ids: Vec<String>,
    }

    /// What went wrong.
    pub struct ErrorDetail {
        /// A stable code to branch on.
        pub code: String,
        /// For people: field or resource, cause and remedy.
        pub message: String,
    }

    /// Answer to `GET /health`.
    pub struct Health {
        /// `ok`.
        pub status: String,
        /// The server's version.
        pub version: String,
    }

    /// Request body of `POST /v1/hosts/register`.
    pub struct RegisterHost shows(arch, cpu_cores, memory_mb, disk_gb, address) hides(token) {
        /// The one-time registration token.
        pub token: String,
        /// For example `x86_64`.
        pub arch: String,
        /// Processors.
        pub cpu_cores: u32,
        /// Memory in MiB.
        pub memory_mb: u64,
        /// Disk in GiB under the data directory.
        pub disk_gb: u64,
        /// Where the control plane reaches the agent, for example `http://10.0.0.7:8001`. Of a host that a team brings it has
        /// to be a public address, unless the operator allows others.
        pub address: String,
    }

    /// Answer to `POST /v1/hosts/register`; the secrets are shown once.
    pub struct RegisteredHost shows(host_id) hides(token, refresh_token, rpc_token) {
        /// The host's id.
        pub host_id: String,
        /// Bearer token of the agent's calls to the control plane.
        pub token: String,
        /// Exchanged for a new pair before the token ends.
        pub refresh_token: String,
        /// Bearer token that the control plane's calls to the agent carry.
        pub rpc_token: String,
    }

    /// Request body of `POST /v1/hosts/auth/refresh`.
    pub struct RefreshHostToken shows() hides(refresh_token) {
        /// The refresh token; used up by the call.
        pub refresh_token: String,
    }

    /// Answer to `POST /v1/hosts/auth/refresh`.
    pub struct HostTokens shows() hides(token, refresh_token) {
        /// New bearer token.
        pub token: String,
        /// New refresh token.
        pub refresh_token: String,
    }

    /// Request body of `POST /v1/hosts/{id}/heartbeat`.
    #[derive(Default)]
    #[serde(default)]
    pub struct Heartbeat {
        /// The agent's version.
        pub version: String,
        /// The agent's address now: it may have changed since the host registered.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub address: Option<String>,
        /// Processors now; as registered when absent.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub cpu_cores: Option<u32>,
        /// Memory in MiB that sandboxes may be promised together now; as registered when absent.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub memory_mb: Option<u64>,
        /// Free memory in MiB that new sandboxes may use.
        pub memory_available_mb: u64,
        /// Free disk in MiB that new sandboxes may use.
        pub disk_available_mb: u64,
        /// State of the platform templates on this host.
        pub templates: Vec<HostTemplate>,
    }

    /// A platform template on a host.
    pub struct HostTemplate {
        /// `tpl-{uuid}`.
        pub id: String,
        /// Its state there.
        pub status: TemplateStatus,
        /// What is being done, or why it failed.
        pub detail: String,
        /// 0 to 100.
        pub progress_pct: u32,
        /// Bytes on disk.
        pub size_bytes: u64,
    }

    /// Request body of `POST /v1/hosts/sandbox-events`: changes that happened on the host by themselves.
    pub struct SandboxEvents {
        /// In the order in which they happened.
        pub events: Vec<SandboxEvent>,
    }

    /// One change.
    pub struct SandboxEvent {
        /// The sandbox.
        pub sandbox_id: String,
        /// Generation of the decision under which the host acted; older than the record's means stale.
        pub generation: u64,
        /// The status it has now on its host.
        pub status: SandboxStatus,
        /// What happened: `ttl_expired`, `vmm_exited`, `adopted`, `shutdown`.
        pub reason: String,
        /// In status `error`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub error: Option<SandboxFailure>,
        /// Milliseconds since the Unix epoch, by the host's clock.
        pub at_ms: i64,
    }
}

/// What a directory entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum FileKind {
    /// A regular file, or anything that is neither of the others.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
}

/// How a template came to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum TemplateKind {
    /// Built from a recipe.
    Base,
    /// Made from a sandbox.
    Snapshot,
}

/// Whether a template can be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum TemplateStatus {
    /// Being made.
    Building,
    /// Sandboxes can start from it.
    Ready,
    /// It could not be made.
    Failed,
}

/// Text frames of the exec, process and PTY WebSockets. Data of a PTY may also travel in binary frames.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum ClientFrame {
    /// First frame: what to start. `cols` and `rows` only on `/pty`.
    Start {
        /// Program.
        #[serde(default)]
        cmd: String,
        /// Arguments.
        #[serde(default)]
        args: Vec<String>,
        /// Terminal width.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        cols: Option<u32>,
        /// Terminal height.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        rows: Option<u32>,
        /// Added to the environment.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        envs: Option<BTreeMap<String, String>>,
        /// Working directory.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        cwd: Option<String>,
        /// User to run as.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        user: Option<String>,
        /// Only on `/exec/stream`: the process's standard input is a pipe fed by `input` frames and closed
        /// by `eof`. When false, it is `/dev/null`.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        stdin: bool,
        /// The client takes bytes as they are. On `/exec/stream`: the same as `?encoding=base64`. On `/pty`:
        /// output in binary frames.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        binary: bool,
    },
    /// First frame on `/pty`: attach to a terminal that runs already.
    Connect {
        /// The tag from `started`.
        tag: String,
    },
    /// Terminal input, or (on `/exec/stream` started with `stdin`) standard input; base64.
    Input {
        /// Base64 of the bytes.
        data: String,
    },
    /// End of standard input (`/exec/stream` started with `stdin`); no `input` frame may follow.
    Eof {},
    /// New terminal size.
    Resize {
        /// Width.
        cols: u32,
        /// Height.
        rows: u32,
    },
    /// Kill the terminal's process group.
    Kill {},
    /// Kill the streamed process (exec and process streams).
    Stop {},
    /// Answer to `ping`.
    Pong {},
}

impl std::fmt::Debug for ClientFrame {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            // Neither the environment's values nor what somebody types (a password, say) belong into logs.
            Self::Start { cmd, args, .. } => f
                .debug_struct("Start")
                .field("cmd", cmd)
                .field("args", args)
                .finish_non_exhaustive(),
            Self::Connect { tag } => f.debug_struct("Connect").field("tag", tag).finish(),
            Self::Input { .. } => f.debug_struct("Input").finish_non_exhaustive(),
            Self::Eof {} => f.write_str("Eof"),
            Self::Resize { cols, rows } => write!(f, "Resize({cols}x{rows})"),
            Self::Kill {} => f.write_str("Kill"),
            Self::Stop {} => f.write_str("Stop"),
            Self::Pong {} => f.write_str("Pong"),
        }
    }
}

/// Text frames that the server sends.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum ServerFrame {
    /// A process started.
    Start {
        /// Its pid in the guest.
        pid: u32,
    },
    /// A terminal started, or was attached to.
    Started {
        /// Its tag, `pty-{hex}`.
        tag: String,
        /// Its pid in the guest.
        pid: u32,
    },
    /// Standard output: text, or base64 of the bytes where `encoding` says so.
    Stdout {
        /// The text (invalid UTF-8 replaced), or base64.
        data: String,
        /// `base64` when the client asked for it (`?encoding=base64`); absent for text.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        encoding: Option<String>,
    },
    /// Standard error: text, or base64 of the bytes where `encoding` says so.
    Stderr {
        /// The text (invalid UTF-8 replaced), or base64.
        data: String,
        /// `base64` when the client asked for it (`?encoding=base64`); absent for text.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        encoding: Option<String>,
    },
    /// Terminal output for clients that speak base64.
    Output {
        /// Base64 of the bytes.
        data: String,
    },
    /// It ended; the last frame.
    Exit {
        /// Exit code; -1 when a signal ended it.
        exit_code: i32,
    },
    /// Something went wrong.
    Error {
        /// What.
        data: String,
        /// A stable code as in error bodies, where there is one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        code: Option<String>,
        /// Whether the connection ends with it.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        fatal: bool,
    },
    /// Sent about every 30 s; answered with `pong`.
    Ping {},
}
