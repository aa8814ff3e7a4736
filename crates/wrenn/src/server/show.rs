//! `wrenn config`: what the servers would run with.

use std::process::ExitCode;

use super::UpArgs;
use super::config::masked;

pub(super) fn config(args: &UpArgs, json: bool) -> ExitCode {
    let capacity = args.host.capacity();
    let egress = args.host.egress();
    let bundle = args
        .host
        .ca_bundle()
        .map_or_else(|| "Debian's own".to_owned(), |path| path.display().to_string());
    let mut rows: Vec<(&str, String)> = vec![
        ("WRENN_DIR", args.dirs.data_dir().display().to_string()),
        ("WRENN_CACHE_DIR", args.dirs.cache_dir().display().to_string()),
        ("WRENN_LISTEN", args.control.listen.to_string()),
        ("WRENN_MAX_CONNECTIONS", args.control.max_connections.to_string()),
        (
            "DATABASE_URL",
            args.control
                .database_url
                .as_ref()
                .map_or_else(|| "sqlite in WRENN_DIR".to_owned(), |url| masked(url.reveal())),
        ),
        (
            "WRENN_DATABASE_CONNECTIONS",
            args.control.database_connections.to_string(),
        ),
        (
            "REDIS_URL",
            args.control.redis_url.as_ref().map_or_else(
                || "none: one control plane".to_owned(),
                |url| masked(url.reveal()),
            ),
        ),
        (
            "WRENN_SECRET_KEY",
            match args.control.secret_key {
                Some(_) => "****".to_owned(),
                None => "kept in WRENN_DIR".to_owned(),
            },
        ),
        (
            "WRENN_PUBLIC_URL",
            args.control
                .public_url
                .clone()
                .unwrap_or_else(|| "as it listens".to_owned()),
        ),
        ("WRENN_VCPU_OVERCOMMIT", args.control.vcpu_overcommit.to_string()),
        ("WRENN_DISK_RESERVE_MB", args.control.disk_reserve_mb.to_string()),
        (
            "WRENN_STOPPED_RETENTION_DAYS",
            args.control.stopped_retention_days.to_string(),
        ),
        (
            "WRENN_WEBHOOKS_ALLOW_PRIVATE",
            args.control.webhooks_allow_private.to_string(),
        ),
        (
            "WRENN_BYOC_ALLOW_PRIVATE",
            args.control.byoc_allow_private.to_string(),
        ),
        ("WRENN_AGENT_LISTEN", args.host.agent_listen.to_string()),
        (
            "WRENN_AGENT_URL",
            args.host
                .agent_url
                .clone()
                .unwrap_or_else(|| "as it listens".to_owned()),
        ),
        ("WRENN_ACCEL", format!("{:?}", args.host.accel).to_lowercase()),
        ("WRENN_MEMORY_MB", capacity.memory_mb.to_string()),
        ("WRENN_MAX_VMS", capacity.max_vms.to_string()),
        ("WRENN_POOL", args.host.pool.to_string()),
        ("WRENN_GUEST_CA_BUNDLE", bundle),
        (
            "WRENN_DEBIAN_MIRROR",
            args.host.debian_mirror.as_ref().map_or_else(
                || "as the machine's programs have it".to_owned(),
                |mirror| masked(mirror.reveal()),
            ),
        ),
        ("WRENN_EGRESS_OFF", (!egress.allow_internet).to_string()),
        ("WRENN_EGRESS_ALLOW_PRIVATE", egress.allow_private.to_string()),
        ("WRENN_ON_EXIT", format!("{:?}", args.on_exit).to_lowercase()),
        (
            "WRENN_LOG",
            std::env::var("WRENN_LOG").unwrap_or_else(|_| "info".to_owned()),
        ),
    ];
    rows.extend(args.control.accounts.rows());
    let text = if json {
        let map: serde_json::Map<String, serde_json::Value> = rows
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value.into()))
            .collect();
        format!("{:#}\n", serde_json::Value::Object(map))
    } else {
        rows.iter()
            .map(|(name, value)| format!("{name}={value}\n"))
            .collect()
    };
    crate::cli::print_bytes(text.as_bytes())
}
