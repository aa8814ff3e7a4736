//! Settings of the server roles: flags, environment variables and a `.env` file, in this order of precedence.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::Context as _;
use clap::{Args, ValueEnum};
use wrenn_control::config::Placement;
use wrenn_control::{ControlConfig, MasterSecret, Secret};
use wrenn_host::net::EgressPolicy;
use wrenn_host::vmm::Accelerator;
use wrenn_host::{Capacity, DebianMirror, OnExit};

/// What becomes of running sandboxes when the server ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ExitChoice {
    /// Save them with their memory; resume later.
    Pause,
    /// Let them run on; the next start finds them.
    Keep,
}

impl From<ExitChoice> for OnExit {
    fn from(choice: ExitChoice) -> Self {
        match choice {
            ExitChoice::Pause => Self::Pause,
            ExitChoice::Keep => Self::Keep,
        }
    }
}

/// How guests run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum AcceleratorChoice {
    /// Probe: hardware virtualisation where it works, emulation where it does not.
    Auto,
    /// Hardware virtualisation.
    Kvm,
    /// Software emulation.
    Tcg,
}

impl AcceleratorChoice {
    /// What was chosen, unless that is left to the probe.
    pub(crate) fn fixed(self) -> Option<Accelerator> {
        match self {
            Self::Auto => None,
            Self::Kvm => Some(Accelerator::Kvm),
            Self::Tcg => Some(Accelerator::Tcg),
        }
    }
}

/// Where things are.
#[derive(Debug, Clone, Args)]
pub(crate) struct DirArgs {
    /// Holds everything that must last [default: /var/lib/wrenn, or ~/.local/share/wrenn for an ordinary user]
    #[arg(long, env = "WRENN_DIR", value_name = "DIR", help_heading = "Server")]
    pub(crate) data_dir: Option<PathBuf>,
    /// Holds what can be made again [default: /var/cache/wrenn, or ~/.cache/wrenn for an ordinary user]
    #[arg(long, env = "WRENN_CACHE_DIR", value_name = "DIR", help_heading = "Server")]
    pub(crate) cache_dir: Option<PathBuf>,
}

impl DirArgs {
    /// What holds when nothing is said.
    pub(crate) fn defaults() -> Self {
        Self {
            data_dir: None,
            cache_dir: None,
        }
    }

    pub(crate) fn data_dir(&self) -> PathBuf {
        self.data_dir
            .clone()
            .unwrap_or_else(|| home("/var/lib/wrenn", "XDG_DATA_HOME", ".local/share"))
    }

    pub(crate) fn cache_dir(&self) -> PathBuf {
        self.cache_dir
            .clone()
            .unwrap_or_else(|| home("/var/cache/wrenn", "XDG_CACHE_HOME", ".cache"))
    }
}

/// The system's folder for root, the user's own otherwise.
fn home(system: &str, variable: &str, below_home: &str) -> PathBuf {
    if rustix::process::geteuid().is_root() {
        return system.into();
    }
    let base = std::env::var_os(variable)
        .filter(|value| !value.is_empty())
        .map(PathBuf::from);
    base.unwrap_or_else(|| {
        PathBuf::from(std::env::var_os("HOME").unwrap_or_else(|| "/".into())).join(below_home)
    })
    .join("wrenn")
}

/// Settings of the API server.
#[derive(Debug, Clone, Args)]
pub(crate) struct ControlArgs {
    /// Address of the API; on 127.0.0.1 it is served on ::1 too
    #[arg(
        long,
        env = "WRENN_LISTEN",
        value_name = "ADDR:PORT",
        default_value = "127.0.0.1:8000",
        help_heading = "Server"
    )]
    pub(crate) listen: SocketAddr,
    /// Most connections of clients at a time, WebSockets included; further ones wait
    #[arg(
        long,
        env = "WRENN_MAX_CONNECTIONS",
        value_name = "COUNT",
        default_value_t = 10_000,
        value_parser = clap::value_parser!(u32).range(1..),
        help_heading = "Server"
    )]
    pub(crate) max_connections: u32,
    /// `postgres://…`; when absent, an SQLite file in the data directory
    #[arg(
        long,
        env = "DATABASE_URL",
        value_name = "URL",
        hide_env_values = true,
        value_parser = super::accounts::secret,
        help_heading = "Server"
    )]
    pub(crate) database_url: Option<Secret>,
    /// Most connections of this control plane to PostgreSQL
    #[arg(
        long,
        env = "WRENN_DATABASE_CONNECTIONS",
        value_name = "COUNT",
        default_value_t = 20,
        value_parser = clap::value_parser!(u32).range(1..),
        help_heading = "Server"
    )]
    pub(crate) database_connections: u32,
    /// `redis://…` or `rediss://…` (TLS), through which several control planes on one PostgreSQL hear of each other's
    /// changes at once
    #[arg(
        long,
        env = "REDIS_URL",
        value_name = "URL",
        hide_env_values = true,
        value_parser = super::accounts::secret,
        help_heading = "Server"
    )]
    pub(crate) redis_url: Option<Secret>,
    /// 64 hex digits that sign sessions and encrypt stored secrets, the same for all control planes; needed with
    /// PostgreSQL [default: made at the first start and kept in the data directory]
    #[arg(
        long,
        env = "WRENN_SECRET_KEY",
        value_name = "HEX",
        hide_env_values = true,
        value_parser = super::accounts::secret,
        help_heading = "Server"
    )]
    pub(crate) secret_key: Option<Secret>,
    /// URL at which people reach this installation, for links in mails
    #[arg(long, env = "WRENN_PUBLIC_URL", value_name = "URL", help_heading = "Server")]
    pub(crate) public_url: Option<String>,
    /// vCPUs that a host's sandboxes may have for each of its processors
    #[arg(long, env = "WRENN_VCPU_OVERCOMMIT", value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=1000), help_heading = "Server")]
    pub(crate) vcpu_overcommit: u32,
    /// Disk in MiB that new sandboxes leave free on a host, for those that are there to grow into
    #[arg(
        long,
        env = "WRENN_DISK_RESERVE_MB",
        value_name = "MIB",
        default_value_t = 2048,
        help_heading = "Server"
    )]
    pub(crate) disk_reserve_mb: u64,
    /// Days for which the records of sandboxes that ended are kept
    #[arg(
        long,
        env = "WRENN_STOPPED_RETENTION_DAYS",
        value_name = "DAYS",
        default_value_t = 30,
        value_parser = clap::value_parser!(u32).range(1..=36_500),
        help_heading = "Server"
    )]
    pub(crate) stopped_retention_days: u32,
    /// Let notification channels send to private addresses, and over plain HTTP
    #[arg(long, env = "WRENN_WEBHOOKS_ALLOW_PRIVATE", help_heading = "Server")]
    pub(crate) webhooks_allow_private: bool,
    /// Let teams' own hosts have private addresses, which the control plane then calls on their word
    #[arg(long, env = "WRENN_BYOC_ALLOW_PRIVATE", help_heading = "Server")]
    pub(crate) byoc_allow_private: bool,
    #[command(flatten)]
    pub(crate) accounts: super::accounts::AccountArgs,
}

impl ControlArgs {
    /// The control plane's configuration.
    pub(crate) fn control_config(&self, data_dir: &std::path::Path) -> anyhow::Result<ControlConfig> {
        let Self {
            listen,
            max_connections,
            database_url,
            database_connections,
            redis_url,
            secret_key,
            public_url,
            vcpu_overcommit,
            disk_reserve_mb,
            stopped_retention_days,
            webhooks_allow_private,
            byoc_allow_private,
            accounts,
        } = self;
        let mut config = ControlConfig::new(data_dir);
        config.database_url = database_url.as_ref().map(|url| url.reveal().to_owned());
        config.limits.max_connections = *max_connections as usize;
        config.database.connections = *database_connections;
        config.redis_url = redis_url.as_ref().map(|url| url.reveal().to_owned());
        config.secret = secret_key
            .as_ref()
            .map(|key| MasterSecret::parse(key.reveal()))
            .transpose()
            .context("WRENN_SECRET_KEY cannot be used")?;
        if let Some(url) = public_url {
            if !url.starts_with("https://") && !url.starts_with("http://") {
                anyhow::bail!("WRENN_PUBLIC_URL must be a URL such as https://wrenn.example.com");
            }
            config.public_url = Some(url.trim_end_matches('/').to_owned());
        } else {
            config.public_url = Some(format!("http://{listen}"));
        }
        config.placement = Placement {
            vcpu_overcommit: *vcpu_overcommit,
            disk_reserve_mb: *disk_reserve_mb,
        };
        config.around.stopped_keep =
            std::time::Duration::from_secs(u64::from(*stopped_retention_days) * 24 * 3600);
        config.around.allow_private_webhooks = *webhooks_allow_private;
        config.allow_private_byoc = *byoc_allow_private;
        accounts.apply(&mut config);
        Ok(config)
    }
}

/// Settings of the host agent.
#[derive(Debug, Clone, Args)]
pub(crate) struct HostArgs {
    /// Address on which the host agent takes the control plane's calls; port 0 takes any free one
    #[arg(
        long,
        env = "WRENN_AGENT_LISTEN",
        value_name = "ADDR:PORT",
        default_value = "127.0.0.1:0",
        help_heading = "Host"
    )]
    pub(crate) agent_listen: SocketAddr,
    /// URL at which the control plane reaches the host agent, when that differs from where it listens
    #[arg(long, env = "WRENN_AGENT_URL", value_name = "URL", help_heading = "Host")]
    pub(crate) agent_url: Option<String>,
    /// How guests run
    #[arg(
        long,
        env = "WRENN_ACCEL",
        value_name = "HOW",
        default_value = "auto",
        help_heading = "Host"
    )]
    pub(crate) accel: AcceleratorChoice,
    /// Memory in MiB that running sandboxes may be promised together [default: one and a half times the host's,
    /// since they share most of theirs]
    #[arg(long, env = "WRENN_MEMORY_MB", value_name = "MIB", help_heading = "Host")]
    pub(crate) memory_mb: Option<u64>,
    /// Virtual machines at one time
    #[arg(long, env = "WRENN_MAX_VMS", value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=50_000), help_heading = "Host")]
    pub(crate) max_vms: u32,
    /// Virtual machines of the template `minimal` that wait, restored and warm, for the next creates; each holds
    /// some 60 MiB
    #[arg(
        long,
        env = "WRENN_POOL",
        value_name = "N",
        default_value_t = 2,
        help_heading = "Host"
    )]
    pub(crate) pool: usize,
    /// PEM certificates that guests trust: a file, `none` for Debian's own, or `auto` for the host's when an
    /// authority was added to them
    #[arg(
        long,
        env = "WRENN_GUEST_CA_BUNDLE",
        value_name = "FILE",
        default_value = "auto",
        help_heading = "Host"
    )]
    pub(crate) guest_ca_bundle: String,
    /// Debian archive from which the template's packages and kernel come, such as https://deb.debian.org/debian; guests
    /// keep Debian's own [default: mmdebstrap's, and the machine's own package sources for the kernel]
    #[arg(
        long,
        env = "WRENN_DEBIAN_MIRROR",
        value_name = "URL",
        hide_env_values = true,
        help_heading = "Host"
    )]
    pub(crate) debian_mirror: Option<DebianMirror>,
    /// Let guests reach private networks (never the host itself)
    #[arg(long, env = "WRENN_EGRESS_ALLOW_PRIVATE", help_heading = "Host")]
    pub(crate) egress_allow_private: bool,
    /// Keep guests from reaching anything outside
    #[arg(long, env = "WRENN_EGRESS_OFF", help_heading = "Host")]
    pub(crate) egress_off: bool,
}

impl HostArgs {
    pub(crate) fn egress(&self) -> EgressPolicy {
        EgressPolicy {
            allow_internet: !self.egress_off,
            allow_private: self.egress_allow_private,
            ..EgressPolicy::default()
        }
    }

    pub(crate) fn capacity(&self) -> Capacity {
        Capacity {
            memory_mb: self.memory_mb.unwrap_or_else(|| total_memory_mb() / 2 * 3),
            min_free_memory_mb: 256,
            min_free_disk_mb: 1024,
            max_vms: self.max_vms,
        }
    }

    /// The bundle that guests get, if it is not Debian's own.
    pub(crate) fn ca_bundle(&self) -> Option<PathBuf> {
        match self.guest_ca_bundle.as_str() {
            "none" => None,
            "auto" => {
                let added = std::fs::read_dir("/usr/local/share/ca-certificates").is_ok_and(|mut entries| {
                    entries.any(|entry| {
                        entry.is_ok_and(|entry| {
                            entry
                                .path()
                                .extension()
                                .is_some_and(|extension| extension == "crt")
                        })
                    })
                });
                let bundle = PathBuf::from("/etc/ssl/certs/ca-certificates.crt");
                (added && bundle.is_file()).then_some(bundle)
            }
            file => Some(file.into()),
        }
    }
}

fn total_memory_mb() -> u64 {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    wrenn_host::meminfo_mb(&meminfo, "MemTotal").unwrap_or(1024)
}

/// A URL with its password replaced, for people to see.
pub(crate) fn masked(url: &str) -> String {
    match url.split_once("://") {
        Some((scheme, rest)) => match rest.rsplit_once('@') {
            Some((login, place)) => {
                let user = login.split(':').next().unwrap_or_default();
                format!("{scheme}://{user}:****@{place}")
            }
            None => url.to_owned(),
        },
        None => "****".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_are_not_shown() {
        assert_eq!(
            masked("postgres://wrenn:s3cr@t@db:5432/wrenn"),
            "postgres://wrenn:****@db:5432/wrenn"
        );
        assert_eq!(masked("sqlite:wrenn.db"), "****");
        assert_eq!(masked("redis://cache:6379"), "redis://cache:6379");
    }
}
