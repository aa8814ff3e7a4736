//! The user's command line, a client of the public API like any other.
//!
//! Data goes to standard output, everything else (progress, notes, errors) to standard error. Every
//! command ends with one of the codes of [`EXIT_CODES`], which scripts may rely on.

use std::io::Write as _;
use std::process::ExitCode;

use clap::{Args, Subcommand};
use wrenn_client::{Client, Settings};

mod command;
mod cp;
mod error;
mod exec;
mod output;
mod progress;
mod resolve;
mod run;
mod sandbox;
mod shell;
mod signals;
mod snapshot;
mod stdin;
mod template;
mod terminal;
pub(crate) mod told;
mod values;

use error::CliError;

/// The exit codes, as `--help` shows them.
pub(crate) const EXIT_CODES: &str = "\
Exit codes of the commands that talk to a platform:
  0    success
  1    a local failure (a file cannot be read, the terminal cannot be used)
  2    wrong usage
  124  the command was stopped by --timeout
  125  the platform refused, failed, or cannot be reached
  130, 143, 129  ended by Ctrl-C, SIGTERM, SIGHUP
  any other of run, exec and shell: the command's own (255 when a signal ended it)";

/// Options that every command takes.
#[derive(Debug, Args)]
pub(crate) struct GlobalArgs {
    /// The platform's address [default: that of the platform on this machine]
    #[arg(
        long,
        global = true,
        env = "WRENN_BASE_URL",
        value_name = "URL",
        help_heading = "Connection"
    )]
    url: Option<String>,
    /// API key [default: that of the platform on this machine]
    #[arg(
        long,
        global = true,
        env = "WRENN_API_KEY",
        value_name = "KEY",
        hide_env_values = true,
        value_parser = crate::server::secret,
        help_heading = "Connection"
    )]
    api_key: Option<wrenn_control::Secret>,
    /// Print results as JSON, and errors and warnings as lines of JSON on standard error
    #[arg(long, global = true, help_heading = "Output")]
    pub(crate) json: bool,
    /// Show no progress bars (they are shown only on a terminal anyway)
    #[arg(long, global = true, help_heading = "Output")]
    no_progress: bool,
}

/// The user's commands.
#[derive(Debug, Subcommand)]
pub(crate) enum UserCommand {
    /// Run a command in a new sandbox, and destroy the sandbox afterwards
    Run(run::RunArgs),
    /// Create, use and manage sandboxes
    #[command(subcommand, visible_alias = "sb")]
    Sandbox(sandbox::SandboxCommand),
    /// Make templates from sandboxes
    #[command(subcommand)]
    Snapshot(snapshot::SnapshotCommand),
    /// See what sandboxes can be made from
    #[command(subcommand)]
    Template(template::TemplateCommand),
}

/// What a command works with.
struct Context {
    client: Client,
    json: bool,
    progress: bool,
}

/// Runs a user's command to its end.
pub(crate) fn main(global: GlobalArgs, command: UserCommand) -> ExitCode {
    let json = global.json;
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(source) => return CliError::local("cannot start", source).report(json),
    };
    let code = match runtime.block_on(dispatch(global, command)) {
        Ok(code) => code,
        Err(error) => error.report(json),
    };
    // A thread may still wait for input that never comes; nothing that matters is left to do.
    runtime.shutdown_background();
    code
}

async fn dispatch(global: GlobalArgs, command: UserCommand) -> Result<ExitCode, CliError> {
    let settings = Settings::discover(global.url, global.api_key.map(|key| key.reveal().to_owned()))?;
    let client = Client::builder(settings.base_url, settings.api_key)
        .user_agent(concat!("wrenn-cli/", env!("CARGO_PKG_VERSION")))
        .build()?;
    let context = Context {
        client,
        json: global.json,
        progress: !global.no_progress,
    };
    match command {
        UserCommand::Run(args) => run::main(&context, args).await,
        UserCommand::Sandbox(command) => sandbox::main(&context, command).await,
        UserCommand::Snapshot(command) => snapshot::main(&context, command).await,
        UserCommand::Template(command) => template::main(&context, command).await,
    }
}

/// Prints a result of a server's command as JSON.
pub(crate) fn print_json(value: &serde_json::Value) -> ExitCode {
    print_bytes(format!("{value:#}\n").as_bytes())
}

/// Prints data that was made whole. A reader that has gone away is no failure.
pub(crate) fn print_bytes(data: &[u8]) -> ExitCode {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(data).and_then(|()| stdout.flush()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(source) => CliError::output(source).report(false),
    }
}
