//! Hosts as people manage them.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
#[cfg(feature = "openapi")]
use utoipa::ToSchema;

/// Whose sandboxes a host takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum HostType {
    /// The platform's: those of all teams.
    Regular,
    /// A team's own: that team's alone.
    Byoc,
}

/// Whether a host can be given work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[serde(rename_all = "lowercase")]
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

body! {
    /// Request body of `POST /v1/hosts`.
    pub struct CreateHost {
        /// Whose sandboxes it will take.
        #[serde(rename = "type")]
        pub kind: HostType,
        /// The team of a `byoc` host; the session's when absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub team_id: Option<String>,
        /// Who runs the machine, at most 64 characters: `hetzner`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub provider: Option<String>,
        /// Where it stands, at most 64 characters: `eu-central-1a`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub availability_zone: Option<String>,
    }

    /// A machine on which sandboxes run.
    pub struct Host {
        /// `host-{uuid}`.
        pub id: String,
        /// Whose sandboxes it takes.
        #[serde(rename = "type")]
        pub kind: HostType,
        /// The team of a `byoc` host.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub team_id: Option<String>,
        /// Who runs the machine.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub provider: Option<String>,
        /// Where it stands.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub availability_zone: Option<String>,
        /// Whether it can be given work.
        pub status: HostStatus,
        /// For example `x86_64`; empty until it registers, like what follows.
        pub arch: String,
        /// Where its agent serves.
        pub address: String,
        /// The agent's version.
        pub version: String,
        /// Processors.
        pub cpu_cores: u32,
        /// Memory in MiB that its sandboxes may be promised together.
        pub memory_mb: u64,
        /// Free memory in MiB at the last heartbeat.
        pub memory_available_mb: u64,
        /// Disk in GiB that was free when it registered.
        pub disk_gb: u64,
        /// Free disk in MiB at the last heartbeat.
        pub disk_available_mb: u64,
        /// When the last heartbeat came; absent before the first.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        #[cfg_attr(feature = "openapi", schema(value_type = Option<String>, format = DateTime))]
        pub last_heartbeat_at: Option<Timestamp>,
        /// When it was created.
        #[cfg_attr(feature = "openapi", schema(value_type = String, format = DateTime))]
        pub created_at: Timestamp,
    }

    /// A host, and the token with which its agent registers: `wrenn host-agent --token`.
    pub struct HostRegistrationToken {
        /// The host.
        pub host: Host,
        /// Shown this once; good for one registration within an hour.
        pub registration_token: String,
    }

    /// What would go with a host.
    pub struct HostDeletePreview {
        /// The host.
        pub host: Host,
        /// Its sandboxes, which a deletion with `force` destroys.
        pub sandbox_ids: Vec<String>,
    }

    /// Request body of `POST /v1/hosts/{id}/tags`.
    pub struct AddHostTag {
        /// 1 to 64 letters, digits, `-`, `_`, `.`, `:` and `=`.
        pub tag: String,
    }
}
