//! The control plane's own vocabulary: what services and the store pass between them.
//!
//! Wire types (`wrenn_proto::rest`), these, and the database's rows are three things that are joined
//! at the edges, so that neither a public field nor a column can change the meaning of the logic in
//! the middle by accident.

pub mod account;
pub mod around;
pub(crate) mod event;
pub mod lifecycle;
pub mod membership;
pub mod metrics;
pub mod team;

use std::collections::BTreeMap;

pub use wrenn_proto::id::{AuditId, ChannelId, HostId, KeyId, SandboxId, TeamId, TemplateId, UserId};
pub use wrenn_proto::rest::{SandboxStatus, TemplateKind, TemplateStatus};

/// Milliseconds since the Unix epoch.
///
/// Times are stored as integers rather than in a database's own type: SQLite has none, its text
/// forms do not compare as PostgreSQL's do, and one integer behaves alike in both.
pub type Millis = i64;

/// Now, in the store's form.
#[must_use]
pub fn now() -> Millis {
    jiff::Timestamp::now().as_millisecond()
}

/// A stored time as the API's type. A value outside the calendar (a corrupted row) becomes the epoch.
#[must_use]
pub fn timestamp(millis: Millis) -> jiff::Timestamp {
    jiff::Timestamp::from_millisecond(millis).unwrap_or(jiff::Timestamp::UNIX_EPOCH)
}

/// Who is asking, after authentication.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Principal {
    /// The team whose things the caller may touch.
    pub team: TeamId,
    /// Who they are.
    pub actor: Actor,
}

/// Who does something; the audit log and events name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Actor {
    /// A person with a session.
    User(UserId),
    /// A program with a team's key.
    Key(KeyId),
}

/// A user's place in a team.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Uses the team's things.
    Member,
    /// Also manages members, keys and channels.
    Admin,
    /// Also deletes the team; there is always one.
    Owner,
}

impl Role {
    /// All, weakest first.
    pub const ALL: [Self; 3] = [Self::Member, Self::Admin, Self::Owner];

    /// The word in the database and on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Member => "member",
            Self::Admin => "admin",
            Self::Owner => "owner",
        }
    }

    /// The role of a word.
    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|role| role.as_str() == word)
    }
}

/// A person's session, with what the database says of them at the moment: a token's own words are hints only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Session {
    /// Who.
    pub user: UserId,
    /// Their address.
    pub email: String,
    /// Their name.
    pub name: String,
    /// Whether they administer the platform.
    pub platform_admin: bool,
    /// The generation of the user's sessions that this one belongs to.
    pub version: i32,
    /// The team they work in, and as what; `None` when it is gone, or they left it.
    pub team: Option<(TeamId, Role)>,
}

/// The newest failed operation of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// A stable error code, as in the API's error bodies.
    pub code: String,
    /// What happened, for the caller.
    pub message: String,
    /// The guest console's last lines.
    pub console: Option<String>,
    /// The decision that failed.
    pub generation: u64,
}

/// A sandbox as the control plane knows it.
#[derive(Debug, Clone, PartialEq)]
pub struct Sandbox {
    /// Its id.
    pub id: SandboxId,
    /// The owner.
    pub team: TeamId,
    /// Where it lives, once chosen.
    pub host: Option<HostId>,
    /// The template it came from; its row may be gone.
    pub template: TemplateId,
    /// The owner of that template.
    pub template_team: TeamId,
    /// That template's name at the time.
    pub template_name: String,
    /// Where it is in its life.
    pub status: SandboxStatus,
    /// In status `snapshotting` and `missing`: what it was before.
    pub previous: Option<SandboxStatus>,
    /// Number of the newest decision about it.
    pub generation: u64,
    /// In status `snapshotting`: the template in the making.
    pub snapshot: Option<TemplateId>,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// MiB.
    pub memory_mb: u32,
    /// MiB.
    pub disk_size_mb: u32,
    /// Inactivity before auto-pause; 0 is never.
    pub timeout_sec: u32,
    /// Labels.
    pub metadata: BTreeMap<String, String>,
    /// Environment of its processes; kept until it runs, so that a lost start can be repeated.
    pub envs: BTreeMap<String, String>,
    /// The newest failed operation.
    pub failure: Option<Failure>,
    /// When it was asked for.
    pub created_at: Millis,
    /// When it first ran.
    pub started_at: Option<Millis>,
    /// When it was last used.
    pub last_active_at: Option<Millis>,
    /// When the record last changed.
    pub updated_at: Millis,
    /// When the status last changed.
    pub status_at: Millis,
    /// Who made the newest decision about it; the platform by itself when absent.
    pub actor: Option<Actor>,
}

/// A template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    /// Its id.
    pub id: TemplateId,
    /// The owner.
    pub team: TeamId,
    /// Unique within the team.
    pub name: String,
    /// Built or made from a sandbox.
    pub kind: TemplateKind,
    /// Whether it can be used.
    pub status: TemplateStatus,
    /// Progress or the reason of a failure.
    pub detail: String,
    /// 0 to 100.
    pub progress_pct: u32,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// MiB.
    pub memory_mb: u32,
    /// MiB.
    pub disk_size_mb: u32,
    /// Bytes on disk.
    pub size_bytes: u64,
    /// When it was made.
    pub created_at: Millis,
}

/// Whether a host can be given work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostStatus {
    /// Created, never registered.
    Pending,
    /// Heartbeats arrive.
    Online,
    /// Signed off.
    Offline,
    /// Keeps what it has, takes nothing new.
    Draining,
    /// Heartbeats stopped.
    Unreachable,
}

impl HostStatus {
    /// All, in the order of the documentation.
    pub const ALL: [Self; 5] = [
        Self::Pending,
        Self::Online,
        Self::Offline,
        Self::Draining,
        Self::Unreachable,
    ];

    /// The word in the database and on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Online => "online",
            Self::Offline => "offline",
            Self::Draining => "draining",
            Self::Unreachable => "unreachable",
        }
    }
}

/// A host.
#[derive(Clone, PartialEq, Eq)]
pub struct Host {
    /// Its id.
    pub id: HostId,
    /// Whether it can be given work.
    pub status: HostStatus,
    /// Where the agent serves.
    pub address: String,
    /// What the control plane presents to the agent.
    pub(crate) rpc_token: String,
    /// The agent's version.
    pub version: String,
    /// Its processors.
    pub cpu_cores: u32,
    /// MiB of memory that its sandboxes may be promised together.
    pub memory_mb: u64,
    /// GiB of disk that were free when it registered.
    pub disk_gb: u64,
    /// Free MiB of memory at the last heartbeat.
    pub memory_available_mb: u64,
    /// Free MiB of disk at the last heartbeat.
    pub disk_available_mb: u64,
    /// When the last heartbeat came.
    pub last_heartbeat_at: Option<Millis>,
}

impl std::fmt::Debug for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The RPC token stays out of logs.
        f.debug_struct("Host")
            .field("id", &self.id)
            .field("status", &self.status)
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}
