//! Rust SDK for Wrenn: sandboxes for untrusted code, each in its own microVM.
//!
//! ```no_run
//! use wrenn_client::{Client, CreateSandbox, Exec};
//!
//! # async fn example() -> Result<(), wrenn_client::Error> {
//! let client = Client::from_env()?;
//! let sandbox = client.sandboxes().create_running(&CreateSandbox::default()).await?;
//! let result = sandbox.exec(&Exec { cmd: "uname".into(), args: vec!["-a".into()], ..Exec::default() }).await?;
//! println!("{}", result.stdout);
//! sandbox.destroy().await?;
//! # Ok(())
//! # }
//! ```
//!
//! # Where to look
//! - [`Client`]: the connection, its settings ([`Settings`]) and what is retried.
//! - [`Sandboxes`] (the collection) and [`SandboxHandle`] (one sandbox): life cycle and processes.
//! - [`ExecStream`]: a command with live output and standard input; [`Pty`]: a terminal.
//! - [`Files`]: whole files, streams and directories.
//! - [`Snapshots`]: templates and snapshots.
//! - [`Error`]: one variant for each decision that a caller can take.
//!
//! # Retries
//! Reading calls (`GET`) are tried again, up to three times in all, when the connection fails or the
//! server answers 429, 502, 503 or 504. Every other call is tried again only when the connection
//! could not be opened at all, so that no request is ever carried out twice.
#![forbid(unsafe_code)]

mod client;
mod error;
mod exec;
mod files;
mod pty;
mod sandboxes;
mod settings;
mod snapshots;
mod socket;

pub use client::{Client, ClientBuilder};
pub use error::{Error, Refusal, Result};
pub use exec::{ExecControl, ExecEvent, ExecOptions, ExecStdin, ExecStream};
pub use files::{Download, Files};
pub use pty::{Pty, PtyEvent, PtyOptions, PtyWriter};
pub use sandboxes::{SandboxHandle, Sandboxes};
pub use settings::{DEFAULT_BASE_URL, Settings, data_dir};
pub use snapshots::Snapshots;
pub use wrenn_proto::rest::{
    CreateSandbox, CreateSnapshot, Exec, ExecResult, ExecStarted, FileEntry, FileKind, Health, Metrics,
    MetricsPoint, Process, Sandbox, SandboxFailure, SandboxStatus, Template, TemplateKind, TemplateStatus,
};
