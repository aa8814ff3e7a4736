//! `wrenn snapshot …`: templates made from sandboxes.

use std::process::ExitCode;

use clap::{Args, Subcommand};
use wrenn_client::TemplateKind;

use super::error::CliError;
use super::{Context, output, template};

#[derive(Debug, Subcommand)]
pub(crate) enum SnapshotCommand {
    /// Make a template from a running or paused sandbox, memory included, and print its name
    Create(CreateArgs),
    /// List snapshots
    #[command(visible_alias = "list")]
    Ls,
    /// Delete snapshots that no sandbox uses
    #[command(visible_alias = "delete")]
    Rm(RmArgs),
}

#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    /// The sandbox: its id, or a unique beginning or end of it
    sandbox: String,
    /// Its name, for `--template` [default: one that is made up]
    #[arg(short, long)]
    name: Option<String>,
    /// Replace a snapshot of that name
    #[arg(long, requires = "name")]
    overwrite: bool,
}

#[derive(Debug, Args)]
pub(crate) struct RmArgs {
    /// Names
    #[arg(required = true, value_name = "NAME")]
    names: Vec<String>,
}

pub(super) async fn main(context: &Context, command: SnapshotCommand) -> Result<ExitCode, CliError> {
    match command {
        SnapshotCommand::Create(args) => create(context, args).await,
        SnapshotCommand::Ls => template::list(context, Some(TemplateKind::Snapshot)).await,
        SnapshotCommand::Rm(RmArgs { names }) => {
            let snapshots = context.client.snapshots();
            let outcomes = futures::future::join_all(names.into_iter().map(async |name| {
                snapshots.delete(&name).await?;
                Ok::<String, CliError>(name)
            }));
            output::done(context, outcomes.await)
        }
    }
}

async fn create(context: &Context, args: CreateArgs) -> Result<ExitCode, CliError> {
    let sandbox = context.sandbox(&args.sandbox).await?;
    let spinner = context.spinner(format!("saving sandbox {}", sandbox.id()));
    let made = context
        .client
        .snapshots()
        .create_ready(sandbox.id(), args.name.as_deref(), args.overwrite)
        .await;
    drop(spinner);
    let template = made?;
    if context.json {
        output::json(&template)?
    } else {
        output::line(&template.name)?
    }
    Ok(ExitCode::SUCCESS)
}
