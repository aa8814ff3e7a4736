//! `wrenn sandbox …`: the life of sandboxes.

use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand};
use wrenn_client::{CreateSandbox, Sandbox, SandboxHandle, SandboxStatus};

use super::command::{self, Output};
use super::error::CliError;
use super::signals::Signals;
use super::{Context, cp, exec, output, shell, values};

/// How long a change of status may take.
const SETTLE_LIMIT: Duration = Duration::from_secs(600);

#[derive(Debug, Subcommand)]
pub(crate) enum SandboxCommand {
    /// Create a sandbox, wait until it runs, and print its id
    Create(CreateArgs),
    /// List sandboxes
    #[command(visible_alias = "list")]
    Ls(LsArgs),
    /// Show a sandbox
    Get(OneArg),
    /// Run a command in a sandbox
    Exec(exec::ExecArgs),
    /// Open a terminal in a sandbox; `~.` at the beginning of a line leaves it running
    Shell(shell::ShellArgs),
    /// Save sandboxes with their memory, and free what they use of the host's
    Pause(SomeArgs),
    /// Bring paused sandboxes back as they were
    Resume(SomeArgs),
    /// Destroy sandboxes
    #[command(visible_alias = "destroy")]
    Rm(SomeArgs),
    /// Copy files or directories into or out of a sandbox
    Cp(cp::CpArgs),
    /// Show a sandbox's last console lines, or follow a process in it
    Logs(LogsArgs),
}

#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    /// Template to start from [default: minimal]
    #[arg(short, long, value_name = "NAME")]
    template: Option<String>,
    /// Virtual CPUs [default: the template's]
    #[arg(long, value_name = "N")]
    vcpus: Option<u32>,
    /// Memory, for example 512M or 2G [default: the template's]
    #[arg(short, long, value_name = "SIZE", value_parser = values::mebibytes)]
    memory: Option<u32>,
    /// Root disk, for example 20G [default: the template's]
    #[arg(long, value_name = "SIZE", value_parser = values::mebibytes)]
    disk: Option<u32>,
    /// Pause after this long without use: 300, 5m, 2h; 0 for never [default: 0]
    #[arg(long, value_name = "TIME", value_parser = values::duration)]
    timeout: Option<Duration>,
    /// Set an environment variable of every process; NAME alone takes its value from here
    #[arg(short, long = "env", value_name = "NAME[=VALUE]", value_parser = values::env)]
    envs: Vec<(String, String)>,
    /// Label it
    #[arg(short = 'l', long = "label", value_name = "NAME=VALUE", value_parser = values::assignment)]
    labels: Vec<(String, String)>,
    /// Return at once, while it still starts
    #[arg(long)]
    no_wait: bool,
}

#[derive(Debug, Args)]
pub(crate) struct LsArgs {
    /// Show destroyed ones too, as long as they are remembered
    #[arg(short, long)]
    all: bool,
    /// Print ids only
    #[arg(short, long)]
    quiet: bool,
}

#[derive(Debug, Args)]
pub(crate) struct OneArg {
    /// The sandbox: its id, or a unique beginning or end of it
    sandbox: String,
}

#[derive(Debug, Args)]
pub(crate) struct SomeArgs {
    /// The sandboxes: ids, or unique beginnings or ends of them
    #[arg(required = true, value_name = "SANDBOX")]
    sandboxes: Vec<String>,
    /// Return at once, while it is still being done
    #[arg(long)]
    no_wait: bool,
}

#[derive(Debug, Args)]
pub(crate) struct LogsArgs {
    /// The sandbox: its id, or a unique beginning or end of it
    sandbox: String,
    /// Follow the output of this process (tag or pid) until it ends; with --json as lines, each an object
    #[arg(short, long, value_name = "TAG")]
    process: Option<String>,
}

pub(super) async fn main(context: &Context, command: SandboxCommand) -> Result<ExitCode, CliError> {
    match command {
        SandboxCommand::Create(args) => create(context, args).await,
        SandboxCommand::Ls(args) => ls(context, args).await,
        SandboxCommand::Get(OneArg { sandbox }) => get(context, &sandbox).await,
        SandboxCommand::Exec(args) => exec::main(context, args).await,
        SandboxCommand::Shell(args) => shell::main(context, args).await,
        SandboxCommand::Pause(args) => change(context, args, Change::Pause).await,
        SandboxCommand::Resume(args) => change(context, args, Change::Resume).await,
        SandboxCommand::Rm(args) => change(context, args, Change::Destroy).await,
        SandboxCommand::Cp(args) => cp::main(context, args).await,
        SandboxCommand::Logs(args) => logs(context, args).await,
    }
}

async fn create(context: &Context, args: CreateArgs) -> Result<ExitCode, CliError> {
    let some = |pairs: Vec<(String, String)>| (!pairs.is_empty()).then(|| pairs.into_iter().collect());
    let wanted = CreateSandbox {
        template: args.template,
        vcpus: args.vcpus,
        memory_mb: args.memory,
        timeout_sec: args.timeout.map(seconds),
        disk_size_mb: args.disk,
        metadata: some(args.labels),
        envs: some(args.envs),
    };
    let mut record = context.client.sandboxes().create(&wanted).await?;
    if !args.no_wait {
        let spinner = context.spinner(format!("starting sandbox {}", record.id));
        let started = context
            .client
            .sandbox(&record.id)
            .wait_for(SandboxStatus::Running, SETTLE_LIMIT)
            .await;
        drop(spinner);
        record = started?;
    }
    if context.json {
        output::json(&record)?
    } else {
        output::line(&record.id)?
    }
    Ok(ExitCode::SUCCESS)
}

/// Whole seconds; the parser of durations keeps them within `u32`.
fn seconds(duration: Duration) -> u32 {
    u32::try_from(duration.as_secs()).unwrap_or(u32::MAX)
}

async fn ls(context: &Context, args: LsArgs) -> Result<ExitCode, CliError> {
    let sandboxes = context.client.sandboxes();
    let records = if args.all {
        sandboxes.list_all().await?
    } else {
        sandboxes.list().await?
    };
    if context.json {
        output::json(&records)?;
    } else if args.quiet {
        for record in &records {
            output::line(&record.id)?;
        }
    } else if records.is_empty() {
        eprintln!("no sandboxes; `wrenn sandbox create` makes one");
    } else {
        output::table(
            ["id", "status", "template", "vcpus", "memory", "age"],
            records.iter().map(|record| {
                [
                    record.id.clone(),
                    record.status.to_string(),
                    record.template.clone(),
                    record.vcpus.to_string(),
                    format!("{} MiB", record.memory_mb),
                    output::age(record.created_at),
                ]
            }),
        )?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn get(context: &Context, sandbox: &str) -> Result<ExitCode, CliError> {
    let record = context.sandbox(sandbox).await?.get().await?;
    if context.json {
        output::json(&record)?;
    } else {
        show(&record)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn show(record: &Sandbox) -> Result<(), CliError> {
    let mut rows = vec![
        ("id", record.id.clone()),
        ("status", record.status.to_string()),
        ("template", record.template.clone()),
        ("vcpus", record.vcpus.to_string()),
        ("memory", format!("{} MiB", record.memory_mb)),
        ("disk", format!("{} MiB", record.disk_size_mb)),
        (
            "auto-pause",
            match record.timeout_sec {
                0 => "never".to_owned(),
                after => format!("after {after} s without use"),
            },
        ),
        ("created", record.created_at.to_string()),
    ];
    let optional = [
        ("started", record.started_at.map(|at| at.to_string())),
        ("last active", record.last_active_at.map(|at| at.to_string())),
        ("host", record.host_id.clone()),
        ("error", record.error.as_ref().map(|error| error.message.clone())),
    ];
    rows.extend(
        optional
            .into_iter()
            .filter_map(|(name, value)| Some((name, value?))),
    );
    rows.extend(
        record
            .metadata
            .iter()
            .map(|(name, value)| ("label", format!("{name}={value}"))),
    );
    output::record(rows)?;
    if record.error.as_ref().is_some_and(|error| error.console.is_some()) {
        eprintln!("`wrenn sandbox logs {}` shows its last console lines", record.id);
    }
    Ok(())
}

/// Changes of status that several sandboxes can undergo at once.
#[derive(Clone, Copy)]
enum Change {
    Pause,
    Resume,
    Destroy,
}

impl Change {
    fn doing(self) -> &'static str {
        match self {
            Self::Pause => "pausing",
            Self::Resume => "resuming",
            Self::Destroy => "destroying",
        }
    }

    async fn apply(self, sandbox: &SandboxHandle, wait: bool) -> Result<(), wrenn_client::Error> {
        match (self, wait) {
            (Self::Pause, true) => sandbox.pause_and_wait(SETTLE_LIMIT).await.map(drop),
            (Self::Pause, false) => sandbox.pause().await.map(drop),
            (Self::Resume, true) => sandbox.resume_and_wait(SETTLE_LIMIT).await.map(drop),
            (Self::Resume, false) => sandbox.resume().await.map(drop),
            (Self::Destroy, true) => sandbox.destroy_and_wait().await,
            (Self::Destroy, false) => sandbox.destroy().await,
        }
    }
}

/// Applies a change to each, all at once.
async fn change(context: &Context, args: SomeArgs, change: Change) -> Result<ExitCode, CliError> {
    let progress = context.spinner(match args.sandboxes.as_slice() {
        [one] => format!("{} {one}", change.doing()),
        many => format!("{} {} sandboxes", change.doing(), many.len()),
    });
    let outcomes = futures::future::join_all(args.sandboxes.iter().map(async |text| {
        let sandbox = context.sandbox(text).await?;
        change.apply(&sandbox, !args.no_wait).await?;
        Ok::<String, CliError>(sandbox.id().to_owned())
    }))
    .await;
    drop(progress);
    output::done(context, outcomes)
}

async fn logs(context: &Context, args: LogsArgs) -> Result<ExitCode, CliError> {
    let sandbox = context.sandbox(&args.sandbox).await?;
    if let Some(process) = &args.process {
        let mut signals = Signals::listen()?;
        let mut stream = sandbox.process_stream(process).await?;
        // Only the watching ends with a signal, not the process.
        let mut output = if context.json { Output::Lines } else { Output::Live };
        let code = tokio::select! {
            code = command::pump(&mut stream, &mut output) => code?,
            interrupt = signals.recv() => return Err(CliError::Interrupted(interrupt)),
        };
        if context.json {
            output::line(&serde_json::json!({ "type": "exit", "exit_code": code }).to_string())?;
        } else {
            eprintln!("process {process} ended with exit code {code}");
        }
        return Ok(ExitCode::SUCCESS);
    }
    let record = sandbox.get().await?;
    let kept = record.error.as_ref().and_then(|error| error.console.clone());
    let console = match kept {
        Some(console) => console,
        None => sandbox.console().await?,
    };
    if context.json {
        output::json(&serde_json::json!({
            "id": record.id, "status": record.status, "error": record.error, "console": console,
        }))?;
        return Ok(ExitCode::SUCCESS);
    }
    let id = &record.id;
    match &record.error {
        Some(error) => eprintln!("sandbox {id}: {}", output::printable(&error.message)),
        None => eprintln!("sandbox {id} is {}; its console:", record.status),
    }
    match console.trim_end() {
        "" => eprintln!(
            "nothing was written to it. `--process TAG` follows a process \
             (`wrenn sandbox exec {id} --detach -- CMD` prints its tag)"
        ),
        console => output::line(&output::printable(console))?,
    }
    Ok(ExitCode::SUCCESS)
}
