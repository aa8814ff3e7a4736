//! `wrenn migrate`: the database's schema, apart from serving.

use anyhow::Context as _;
use clap::{Args, Subcommand};
use wrenn_control::{ControlPlane, MigrationState};

use super::config::{ControlArgs, DirArgs};

/// `wrenn migrate`.
#[derive(Debug, Clone, Args)]
pub(crate) struct MigrateArgs {
    #[command(subcommand)]
    what: What,
}

/// Which database.
#[derive(Debug, Clone, Args)]
struct Target {
    #[command(flatten)]
    dirs: DirArgs,
    #[command(flatten)]
    control: ControlArgs,
}

#[derive(Debug, Clone, Subcommand)]
enum What {
    /// Bring the schema up to date; of several at once, one does it and the others wait
    Up(Box<Target>),
    /// Show which migrations the database has; changes nothing
    Status(Box<Target>),
}

pub(super) async fn main(args: MigrateArgs, json: bool) -> anyhow::Result<()> {
    let MigrateArgs { what } = args;
    let (What::Up(target) | What::Status(target)) = &what;
    let data_dir = target.dirs.data_dir();
    let config = target.control.control_config(&data_dir)?;
    let states = match what {
        What::Up(_) => {
            super::up::prepare(&data_dir)?;
            ControlPlane::migrate(&config)
                .await
                .context("the schema was not changed")?
        }
        What::Status(_) => ControlPlane::migration_status(&config).await?,
    };
    print!("{}", shown(&states, json)?);
    Ok(())
}

fn shown(states: &[MigrationState], json: bool) -> anyhow::Result<String> {
    if json {
        let rows: Vec<serde_json::Value> = states
            .iter()
            .map(|MigrationState { name, applied, known }| {
                serde_json::json!({"name": name, "applied": applied, "known": known})
            })
            .collect();
        return Ok(format!("{:#}\n", serde_json::Value::Array(rows)));
    }
    let width = states
        .iter()
        .map(|state| state.name.len())
        .max()
        .unwrap_or(0)
        .max(9);
    let mut text = format!("{:width$}  STATUS\n", "MIGRATION");
    for MigrationState { name, applied, known } in states {
        let status = match (applied, known) {
            (true, true) => "applied",
            (true, false) => "applied by a newer version",
            (false, _) => "pending",
        };
        text.push_str(&format!("{name:width$}  {status}\n"));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_names_what_is_pending_and_what_is_too_new() {
        let state = |name: &str, applied, known| MigrationState {
            name: name.to_owned(),
            applied,
            known,
        };
        let states = [
            state("m1", true, true),
            state("m2", false, true),
            state("m3", true, false),
        ];
        assert_eq!(
            shown(&states, false).expect("text"),
            "MIGRATION  STATUS\nm1         applied\nm2         pending\nm3         applied by a newer version\n"
        );
        let json: serde_json::Value =
            serde_json::from_str(&shown(&states, true).expect("text")).expect("JSON");
        assert_eq!(
            json[1],
            serde_json::json!({"name": "m2", "applied": false, "known": true})
        );
    }
}
