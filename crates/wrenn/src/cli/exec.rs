//! `wrenn sandbox exec`: a command in a sandbox that runs already.

use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use wrenn_client::{Exec, ExecOptions};

use super::command::{self, Output};
use super::error::CliError;
use super::signals::Signals;
use super::{Context, output, shell, values};

#[derive(Debug, Args)]
pub(crate) struct ExecArgs {
    /// The sandbox: its id, or a unique beginning or end of it
    sandbox: String,
    /// Set an environment variable; NAME alone takes its value from here
    #[arg(short, long = "env", value_name = "NAME[=VALUE]", value_parser = values::env)]
    envs: Vec<(String, String)>,
    /// Stop the command after this long, with exit code 124: 30, 5m, 2h
    #[arg(long, value_name = "TIME", value_parser = values::duration)]
    timeout: Option<Duration>,
    /// User to run the command as
    #[arg(short, long)]
    user: Option<String>,
    /// Working directory in the sandbox
    #[arg(short = 'w', long, value_name = "DIR")]
    cwd: Option<String>,
    /// Pass standard input on to the command
    #[arg(short, long)]
    interactive: bool,
    /// Give the command a terminal, which takes the input too
    #[arg(short, long, conflicts_with_all = ["detach", "timeout"])]
    tty: bool,
    /// Leave the command running in the background, and print its tag
    #[arg(short, long, conflicts_with = "interactive")]
    detach: bool,
    /// Name by which to find a background command again
    #[arg(long, requires = "detach")]
    tag: Option<String>,
    /// The command and its arguments
    #[arg(trailing_var_arg = true, required = true, value_name = "CMD")]
    command: Vec<String>,
}

pub(super) async fn main(context: &Context, args: ExecArgs) -> Result<ExitCode, CliError> {
    let Some((cmd, rest)) = args.command.split_first() else {
        return Err(CliError::Usage("the command is missing".to_owned()));
    };
    if args.tty {
        shell::refuse_json(context)?;
    }
    let mut signals = Signals::listen()?;
    let sandbox = context.sandbox(&args.sandbox).await?;
    if args.detach {
        let wanted = Exec {
            cmd: cmd.clone(),
            args: rest.to_vec(),
            timeout_sec: args
                .timeout
                .map(|limit| u32::try_from(limit.as_secs()).unwrap_or(u32::MAX)),
            envs: Some(args.envs.into_iter().collect()),
            cwd: args.cwd,
            tag: args.tag,
            user: args.user,
            ..Exec::default()
        };
        let started = sandbox.exec_background(&wanted).await?;
        if context.json {
            output::json(&started)?;
        } else {
            output::line(&started.tag)?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    let options = ExecOptions {
        cmd: cmd.clone(),
        args: rest.to_vec(),
        envs: args.envs.into_iter().collect(),
        cwd: args.cwd,
        user: args.user,
        stdin: args.interactive,
    };
    if args.tty {
        return shell::start(&sandbox, options, &mut signals).await;
    }
    let mut output = Output::new(context.json);
    let (ending, took) = command::follow(&sandbox, &options, args.timeout, &mut output, &mut signals).await?;
    if let Some(result) = output.result(sandbox.id(), &options.cmd, ending, took) {
        output::json(&result)?;
    }
    Ok(ExitCode::from(ending.exit_code()))
}
