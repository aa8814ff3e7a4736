//! The schema, as migrations embedded in the program and run at every start.
//!
//! Ids are UUID columns; text stays for names and for words with few values. Times are milliseconds
//! since the epoch (see `domain::Millis`). Foreign keys say what a deletion means: memberships and
//! keys go with their team or user, creators become unknown.
//!
//! A migration that has been released is never changed; a later one mends it.

mod m0001_initial;
mod m0002_accounts;
mod m0003_teams;
mod m0004_events;
mod m0005_audit_channels;
mod m0006_metrics;
mod m0007_verified_addresses;
mod m0008_usage_by_day;
mod m0009_snapshot_index;
mod m0010_event_actors;
mod m0011_host_management;
mod m0012_sandbox_metrics;
mod m0014_sandbox_indexes;
mod of_extension;

use sea_orm_migration::prelude::*;

pub(super) use of_extension::up as of_extension;

/// All migrations, oldest first.
pub(crate) struct Migrator;

impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        vec![
            Box::new(m0001_initial::Initial),
            Box::new(m0002_accounts::Accounts),
            Box::new(m0003_teams::Teams),
            Box::new(m0004_events::Events),
            Box::new(m0005_audit_channels::AuditChannels),
            Box::new(m0006_metrics::Metrics),
            Box::new(m0007_verified_addresses::VerifiedAddresses),
            Box::new(m0008_usage_by_day::UsageByDay),
            Box::new(m0009_snapshot_index::SnapshotIndex),
            Box::new(m0010_event_actors::EventActors),
            Box::new(m0011_host_management::HostManagement),
            Box::new(m0012_sandbox_metrics::SandboxMetrics),
            Box::new(m0014_sandbox_indexes::SandboxIndexes),
        ]
    }
}

fn table(name: &'static str) -> TableCreateStatement {
    Table::create().table(name).to_owned()
}

fn reference(
    from: (&'static str, &'static str),
    to: &'static str,
    on_delete: ForeignKeyAction,
) -> ForeignKeyCreateStatement {
    ForeignKey::create()
        .from(from.0, from.1)
        .to(to, "id")
        .on_delete(on_delete)
        .to_owned()
}

fn index(
    name: &'static str,
    table: &'static str,
    columns: &[&'static str],
    unique: bool,
) -> IndexCreateStatement {
    let mut index = Index::create().name(name).table(table).to_owned();
    for &column in columns {
        index.col(column);
    }
    if unique {
        index.unique();
    }
    index
}

/// Adds columns one statement each: SQLite takes no more at once.
async fn add_columns(
    manager: &SchemaManager<'_>,
    table: &'static str,
    columns: Vec<ColumnDef>,
) -> Result<(), DbErr> {
    for mut column in columns {
        manager
            .alter_table(Table::alter().table(table).add_column(&mut column).to_owned())
            .await?;
    }
    Ok(())
}
