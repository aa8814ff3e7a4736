//! The guest agent's plain HTTP contract and the addresses both sides agree on.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The TCP port on which the guest agent serves (as in E2B's guests).
pub const ENVD_PORT: u16 = 49983;

/// The version of the guest agent's contract, reported to SDKs as `envdVersion`; it gates their features.
pub const ENVD_VERSION: &str = "0.6.13";

/// Header that carries the sandbox's access token.
pub const ACCESS_TOKEN_HEADER: &str = "x-access-token";

/// Where the host has a connection upgraded to [`RUN_PROTOCOL`].
pub const RUN_PATH: &str = "/run";

/// The protocol of collected runs ([`crate::run`]), as `Upgrade` names it.
pub const RUN_PROTOCOL: &str = "wrenn-run";

/// The largest message of [`RUN_PROTOCOL`], in bytes.
pub const MAX_RUN_MESSAGE: usize = 4 << 20;

/// Kernel command line keys that the guest's init reads.
pub mod cmdline {
    /// Block device of the root filesystem, for example `/dev/vda`.
    pub const ROOT: &str = "wrenn.root";
    /// Guest address with prefix length, for example `10.0.2.15/24`.
    pub const IP: &str = "wrenn.ip";
    /// Default gateway.
    pub const GATEWAY: &str = "wrenn.gw";
    /// Name server written to `/etc/resolv.conf`.
    pub const DNS: &str = "wrenn.dns";
}

/// Where the init finds its kernel modules inside the initramfs; loaded in lexical order.
pub const INITRAMFS_MODULES_DIR: &str = "/modules";

/// Where the guest agent lives in a running guest (a tmpfs, so that a root filesystem never holds a stale one).
pub const GUEST_ENVD_PATH: &str = "/run/wrenn/envd";

/// Body of `POST /init`, sent by the host alone: makes a restored guest a sandbox of its own
/// before its first user process runs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct InitRequest {
    /// Wall-clock time, RFC 3339; the guest steps its clock to it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timestamp: Option<String>,
    /// Environment of every process started from now on; replaces the previous set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub env_vars: Option<BTreeMap<String, String>>,
    /// Required from now on in [`ACCESS_TOKEN_HEADER`]. A change needs the old one in that header.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub access_token: Option<String>,
    /// The guest's new host name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    /// 32 lower-case hex digits for `/etc/machine-id`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub machine_id: Option<String>,
    /// Base64 of fresh random bytes (at least 64), fed to the kernel and followed by a forced reseed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub entropy: Option<String>,
    /// User of processes and files when a request names none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub default_user: Option<String>,
    /// Directory that relative paths and processes start from when it is not the user's home.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub default_workdir: Option<String>,
    /// PEM certificates to trust in addition to the guest's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_bundle: Option<String>,
    /// Grow the root filesystem to the size its block device has now.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub grow_root: bool,
}

/// Body of `GET /metrics`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    /// Unix seconds.
    pub ts: i64,
    /// Number of vCPUs.
    pub cpu_count: u32,
    /// 0 to 100 over all vCPUs, since the previous call.
    pub cpu_used_pct: f64,
    /// Bytes.
    pub mem_total: u64,
    /// Bytes in use, caches not counted.
    pub mem_used: u64,
    /// Bytes of page cache.
    pub mem_cache: u64,
    /// Bytes in use on the root filesystem.
    pub disk_used: u64,
    /// Bytes of the root filesystem.
    pub disk_total: u64,
}

/// One item of the answer to `POST /files`; also the error body's sibling, so no extra keys.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WrittenFile {
    /// File name.
    pub name: String,
    /// Absolute path.
    pub path: String,
    /// Always `file`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Metadata sent in `X-Metadata-…` headers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metadata: Option<BTreeMap<String, String>>,
}

/// Error body of the plain HTTP endpoints.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HttpError {
    /// The HTTP status again.
    pub code: u16,
    /// What went wrong, for the caller.
    pub message: String,
}
