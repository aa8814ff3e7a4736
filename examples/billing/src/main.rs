//! A control plane with billing: what `wrenn control-plane` serves, and the routes of this crate.
#![forbid(unsafe_code)]

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::Context as _;
use clap::Parser;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use wrenn_control::{ControlConfig, ControlPlane, MasterSecret};
use wrenn_example_billing::Billing;

/// Settings, named as those of `wrenn control-plane` are.
#[derive(Debug, Parser)]
struct Args {
    /// Where to serve
    #[arg(long, env = "WRENN_LISTEN", default_value = "127.0.0.1:8000")]
    listen: SocketAddr,
    /// Holds the database and the secret, where they are not given
    #[arg(long, env = "WRENN_DIR", default_value = "wrenn-data")]
    dir: PathBuf,
    /// `postgres://…`; SQLite in the directory when absent
    #[arg(long, env = "DATABASE_URL", hide_env_values = true)]
    database_url: Option<String>,
    /// `redis://…`, for several control planes
    #[arg(long, env = "REDIS_URL", hide_env_values = true)]
    redis_url: Option<String>,
    /// The installation's secret, 64 hex digits
    #[arg(long, env = "WRENN_SECRET_KEY", hide_env_values = true)]
    secret_key: Option<String>,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let Args {
        listen,
        dir,
        database_url,
        redis_url,
        secret_key,
    } = Args::parse();
    let mut config = ControlConfig::new(dir);
    config.database_url = database_url;
    config.redis_url = redis_url;
    config.secret = secret_key.as_deref().map(MasterSecret::parse).transpose()?;
    // Migrates the control plane's tables and then the extension's, under one lock.
    let control = ControlPlane::builder(config).extension(Billing).build().await?;
    if let Some(first) = control.bootstrap().await? {
        println!("API key (shown this once): {}", first.api_key);
    }
    let listener = TcpListener::bind(listen)
        .await
        .with_context(|| format!("cannot listen on {listen}"))?;
    println!("http://{}", listener.local_addr()?);
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    control
        .run(vec![listener], async move {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        })
        .await?;
    Ok(())
}
