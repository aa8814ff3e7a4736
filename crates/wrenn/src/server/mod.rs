//! The server roles of the binary: everything in one (`up`), or a control plane and host agents apart.

mod accounts;
mod admin;
pub(crate) mod config;
mod doctor;
mod migrate;
mod show;
mod up;

use std::process::ExitCode;

pub(crate) use accounts::secret;
use clap::{Args, Subcommand};
use config::{ControlArgs, DirArgs, ExitChoice, HostArgs};
use wrenn_control::Secret;

/// The server's commands.
#[derive(Debug, Subcommand)]
pub(crate) enum ServerCommand {
    /// Serve the whole platform from this machine: control plane and host agent in one process
    Up(UpArgs),
    /// Serve the control plane alone
    ControlPlane(ControlPlaneArgs),
    /// Serve as a host of a control plane elsewhere
    HostAgent(HostAgentArgs),
    /// Bring the database's schema up to date, or show where it stands
    Migrate(migrate::MigrateArgs),
    /// Create platform admins and set passwords, on the database itself
    Admin(admin::AdminArgs),
    /// Show the effective settings, secrets masked
    Config(UpArgs),
    /// Check what the platform needs of this machine, and tell what to do where it is missing
    Doctor(UpArgs),
    /// Print the OpenAPI document of the API, as YAML or with --json as JSON
    Openapi,
    /// The accelerator's probe starts this program again with this command
    #[command(name = wrenn_host::vmm::probe::CHILD_COMMAND, hide = true)]
    ProbeKvm,
}

/// `wrenn up`.
#[derive(Debug, Clone, Args)]
pub(crate) struct UpArgs {
    #[command(flatten)]
    pub(crate) dirs: DirArgs,
    #[command(flatten)]
    pub(crate) control: ControlArgs,
    #[command(flatten)]
    pub(crate) host: HostArgs,
    /// What becomes of running sandboxes at the end
    #[arg(long, env = "WRENN_ON_EXIT", value_name = "WHAT", default_value = "pause")]
    pub(crate) on_exit: ExitChoice,
}

/// `wrenn control-plane`.
#[derive(Debug, Clone, Args)]
pub(crate) struct ControlPlaneArgs {
    #[command(flatten)]
    pub(crate) dirs: DirArgs,
    #[command(flatten)]
    pub(crate) control: ControlArgs,
    /// Print a one-time token for a new host, and end
    #[arg(long)]
    pub(crate) issue_host_token: bool,
    /// Give the token to a host that exists and lost its registration: it stays the same host, with its sandboxes
    #[arg(long, value_name = "HOST", requires = "issue_host_token")]
    pub(crate) host: Option<wrenn_proto::id::HostId>,
}

/// `wrenn host-agent`.
#[derive(Debug, Clone, Args)]
pub(crate) struct HostAgentArgs {
    #[command(flatten)]
    pub(crate) dirs: DirArgs,
    #[command(flatten)]
    pub(crate) host: HostArgs,
    /// Base URL of the control plane
    #[arg(long, env = "WRENN_CONTROL_PLANE", value_name = "URL")]
    pub(crate) control_plane: String,
    /// One-time registration token; needed once
    #[arg(long, env = "WRENN_HOST_TOKEN", value_name = "TOKEN", hide_env_values = true, value_parser = accounts::secret)]
    pub(crate) token: Option<Secret>,
    /// What becomes of running sandboxes at the end
    #[arg(long, env = "WRENN_ON_EXIT", value_name = "WHAT", default_value = "keep")]
    pub(crate) on_exit: ExitChoice,
}

/// Runs a server command to its end.
pub(crate) fn main(command: ServerCommand, json: bool) -> ExitCode {
    let outcome = match command {
        ServerCommand::Config(args) => return show::config(&args, json),
        ServerCommand::Doctor(args) => return doctor::main(&doctor::DoctorInput::new(&args), json),
        ServerCommand::ProbeKvm => {
            wrenn_host::vmm::probe::probe_here(&mut std::io::stdout().lock()).map_err(anyhow::Error::from)
        }
        ServerCommand::Openapi => {
            let text = if json {
                wrenn_control::openapi_json()
            } else {
                wrenn_control::openapi_yaml()
            };
            match text {
                Ok(text) => return crate::cli::print_bytes(text.as_bytes()),
                Err(error) => Err(error.into()),
            }
        }
        ServerCommand::Migrate(args) => in_runtime(migrate::main(args, json)),
        ServerCommand::Admin(args) => in_runtime(admin::main(args, json)),
        ServerCommand::Up(args) => in_runtime(up::up(args, json)),
        ServerCommand::ControlPlane(args) => in_runtime(up::control_plane(args, json)),
        ServerCommand::HostAgent(args) => in_runtime(up::host_agent(args)),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            report(json, &error);
            ExitCode::FAILURE
        }
    }
}

/// Tells of the failure of a server's command.
pub(crate) fn report(json: bool, error: &anyhow::Error) {
    if json {
        eprintln!(
            "{}",
            crate::cli::told::error_line("failed", &format!("{error:#}"))
        );
    } else {
        eprintln!("wrenn: {error:#}");
    }
}

fn in_runtime(work: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    start_logging();
    // Each sandbox uses a handful of descriptors; the usual soft limit of 1024 ends at some two hundred of them.
    raise_open_files();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let outcome = runtime.block_on(work);
    runtime.shutdown_timeout(std::time::Duration::from_secs(2));
    outcome
}

fn raise_open_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limits = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limits.maximum,
        maximum: limits.maximum,
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
}

fn start_logging() {
    use std::io::IsTerminal as _;
    let filter = tracing_subscriber::EnvFilter::try_from_env("WRENN_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info,sqlx=warn,sea_orm=warn,hyper=warn"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    // People read a terminal, machines read the rest.
    if std::io::stderr().is_terminal() {
        builder.with_target(false).init();
    } else {
        builder.json().init();
    }
}
