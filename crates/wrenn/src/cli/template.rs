//! `wrenn template …`: what sandboxes can be made from.

use std::process::ExitCode;

use clap::Subcommand;
use wrenn_client::{TemplateKind, TemplateStatus};

use super::error::CliError;
use super::{Context, output};

#[derive(Debug, Subcommand)]
pub(crate) enum TemplateCommand {
    /// List templates, snapshots included
    #[command(visible_alias = "list")]
    Ls,
}

pub(super) async fn main(context: &Context, command: TemplateCommand) -> Result<ExitCode, CliError> {
    match command {
        TemplateCommand::Ls => list(context, None).await,
    }
}

/// Lists templates of a kind, or all.
pub(super) async fn list(context: &Context, kind: Option<TemplateKind>) -> Result<ExitCode, CliError> {
    let templates = context.client.snapshots().list(kind).await?;
    if context.json {
        output::json(&templates)?;
    } else if templates.is_empty() {
        eprintln!("none yet; `wrenn snapshot create` makes one from a sandbox");
    } else {
        output::table(
            ["name", "type", "status", "vcpus", "memory", "disk", "size", "age"],
            templates.iter().map(|template| {
                [
                    template.name.clone(),
                    match template.kind {
                        TemplateKind::Base => "base".to_owned(),
                        TemplateKind::Snapshot => "snapshot".to_owned(),
                    },
                    match template.status {
                        TemplateStatus::Building => "building".to_owned(),
                        TemplateStatus::Ready => "ready".to_owned(),
                        TemplateStatus::Failed => "failed".to_owned(),
                    },
                    template.vcpus.to_string(),
                    format!("{} MiB", template.memory_mb),
                    format!("{} MiB", template.disk_size_mb),
                    output::bytes(template.size_bytes),
                    output::age(template.created_at),
                ]
            }),
        )?;
    }
    Ok(ExitCode::SUCCESS)
}
