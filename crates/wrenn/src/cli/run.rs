//! `wrenn run`: a sandbox for one command.
//!
//! The sandbox is destroyed however the command ends: by itself, by a signal to this process, or
//! because the connection broke. A sandbox is created with a short inactivity limit that this process
//! keeps putting off, so that one whose creator was killed outright is paused before long.

use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use wrenn_client::{CreateSandbox, ExecOptions, SandboxHandle, SandboxStatus};

use super::command::{self, Ending, Output};
use super::error::CliError;
use super::signals::Signals;
use super::{Context, output, told, values};

/// How long a sandbox may take to start.
const START_LIMIT: Duration = Duration::from_secs(300);
/// Inactivity after which an abandoned sandbox pauses.
const ABANDONED_AFTER: u32 = 300;
/// How often that is put off.
const PING_EVERY: Duration = Duration::from_secs(60);
/// How long an interrupted request for a sandbox is waited for, to learn what to destroy.
const LAST_ANSWER: Duration = Duration::from_secs(10);

#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// Template to start from [default: minimal]
    #[arg(short, long, value_name = "NAME")]
    template: Option<String>,
    /// Virtual CPUs [default: the template's]
    #[arg(long, value_name = "N")]
    vcpus: Option<u32>,
    /// Memory, for example 512M or 2G [default: the template's]
    #[arg(short, long, value_name = "SIZE", value_parser = values::mebibytes)]
    memory: Option<u32>,
    /// Set an environment variable; NAME alone takes its value from here
    #[arg(short, long = "env", value_name = "NAME[=VALUE]", value_parser = values::env)]
    envs: Vec<(String, String)>,
    /// Stop the command after this long, with exit code 124: 30, 5m, 2h
    #[arg(long, value_name = "TIME", value_parser = values::duration)]
    timeout: Option<Duration>,
    /// Keep the sandbox afterwards; its id is printed on standard error
    #[arg(long)]
    keep: bool,
    /// User to run the command as
    #[arg(short, long)]
    user: Option<String>,
    /// Working directory in the sandbox
    #[arg(short = 'w', long, value_name = "DIR")]
    cwd: Option<String>,
    /// Pass standard input on to the command
    #[arg(short, long)]
    interactive: bool,
    /// The command and its arguments
    #[arg(trailing_var_arg = true, required = true, value_name = "CMD")]
    command: Vec<String>,
}

pub(super) async fn main(context: &Context, args: RunArgs) -> Result<ExitCode, CliError> {
    let mut signals = Signals::listen()?;
    let wanted = CreateSandbox {
        template: args.template.clone(),
        vcpus: args.vcpus,
        memory_mb: args.memory,
        timeout_sec: (!args.keep).then_some(ABANDONED_AFTER),
        ..CreateSandbox::default()
    };
    let sandbox = create(context, &wanted, &mut signals).await?;
    let outcome = work(context, &sandbox, args.options(), args.timeout, &mut signals).await;
    if args.keep {
        let id = sandbox.id();
        told::hint(
            context.json,
            &format!("kept sandbox {id}; `wrenn sandbox shell {id}` opens it"),
        );
    } else {
        clean_up(context, &sandbox, &mut signals).await;
    }
    let (ending, result) = outcome?;
    if let Some(result) = result {
        output::json(&result)?;
    }
    Ok(ExitCode::from(ending.exit_code()))
}

impl RunArgs {
    fn options(&self) -> ExecOptions {
        let (cmd, rest) = self
            .command
            .split_first()
            .map(|(cmd, rest)| (cmd.clone(), rest.to_vec()))
            .unwrap_or_default();
        ExecOptions {
            cmd,
            args: rest,
            envs: self.envs.iter().cloned().collect(),
            cwd: self.cwd.clone(),
            user: self.user.clone(),
            stdin: self.interactive,
        }
    }
}

/// Asks for the sandbox. A signal meanwhile must not lose a sandbox that was made already: its id is
/// known only from the answer.
async fn create(
    context: &Context,
    wanted: &CreateSandbox,
    signals: &mut Signals,
) -> Result<SandboxHandle, CliError> {
    let sandboxes = context.client.sandboxes();
    let mut request = std::pin::pin!(sandboxes.create(wanted));
    let interrupt = tokio::select! {
        record = &mut request => return Ok(context.client.sandbox(record?.id)),
        interrupt = signals.recv() => interrupt,
    };
    if let Ok(Ok(record)) = tokio::time::timeout(LAST_ANSWER, request).await {
        clean_up(context, &context.client.sandbox(record.id), signals).await;
    }
    Err(CliError::Interrupted(interrupt))
}

/// Waits for the sandbox and runs the command in it.
async fn work(
    context: &Context,
    sandbox: &SandboxHandle,
    options: ExecOptions,
    limit: Option<Duration>,
    signals: &mut Signals,
) -> Result<(Ending, Option<wrenn_client::ExecResult>), CliError> {
    {
        let _spinner = context.spinner(format!("starting sandbox {}", sandbox.id()));
        tokio::select! {
            record = sandbox.wait_for(SandboxStatus::Running, START_LIMIT) => record?,
            interrupt = signals.recv() => return Ok((Ending::Interrupted(interrupt), None)),
        };
    }
    let mut output = Output::new(context.json);
    let (ending, took) = tokio::select! {
        done = command::follow(sandbox, &options, limit, &mut output, signals) => done?,
        never = keep_active(sandbox) => match never {},
    };
    Ok((ending, output.result(sandbox.id(), &options.cmd, ending, took)))
}

async fn keep_active(sandbox: &SandboxHandle) -> std::convert::Infallible {
    loop {
        tokio::time::sleep(PING_EVERY).await;
        // The next one may work, and the command's own stream tells when nothing does.
        let _ = sandbox.ping().await;
    }
}

/// Destroys the sandbox; a second signal leaves at once.
async fn clean_up(context: &Context, sandbox: &SandboxHandle, signals: &mut Signals) {
    let problem = tokio::select! {
        outcome = sandbox.destroy() => match outcome {
            Ok(()) => return,
            Err(error) if error.is_not_found() => return,
            Err(error) => error.to_string(),
        },
        interrupt = signals.recv() => format!("interrupted by {interrupt}"),
    };
    let id = sandbox.id();
    told::warn(
        context.json,
        &format!("sandbox {id} was not destroyed: {problem}"),
        Some(&format!("`wrenn sandbox rm {id}` destroys it")),
    );
}
