//! What teams use: samples for charts, and exact intervals for the daily usage.

use sea_orm_migration::prelude::*;
use sea_orm_migration::schema::{big_integer, big_integer_null, integer, pk_uuid, uuid};

use super::{index, reference, table};

pub(super) struct Metrics;

impl MigrationName for Metrics {
    fn name(&self) -> &'static str {
        "m0006_metrics"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Metrics {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for statement in tables() {
            manager.create_table(statement).await?;
        }
        for statement in [
            index(
                "idx_metric_snapshots_age",
                "metric_snapshots",
                &["width_ms", "at"],
                false,
            ),
            index(
                "idx_usage_intervals_sandbox",
                "usage_intervals",
                &["sandbox_id", "ended_at"],
                false,
            ),
            index(
                "idx_usage_intervals_accrued",
                "usage_intervals",
                &["accrued_until"],
                false,
            ),
            // What a team holds now, among all that it ever had.
            index(
                "idx_sandboxes_team_status",
                "sandboxes",
                &["team_id", "status"],
                false,
            ),
        ] {
            manager.create_index(statement).await?;
        }
        // Sandboxes that run while the schema changes are counted from now on.
        manager
            .get_connection()
            .execute_raw(sea_orm::Statement::from_sql_and_values(
                manager.get_database_backend(),
                "INSERT INTO usage_intervals \
                 (id, sandbox_id, team_id, vcpus, memory_mb, started_at, accrued_until, accruing_to) \
                 SELECT id, id, team_id, vcpus, memory_mb, CAST($1 AS BIGINT), CAST($1 AS BIGINT), \
                 CAST($1 AS BIGINT) FROM sandboxes WHERE status IN ('running', 'pausing') \
                 OR (status = 'snapshotting' AND previous_status = 'running')",
                [crate::domain::now().into()],
            ))
            .await
            .map(drop)
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager
            .drop_index(
                Index::drop()
                    .name("idx_sandboxes_team_status")
                    .table("sandboxes")
                    .to_owned(),
            )
            .await?;
        for name in ["usage_days", "usage_intervals", "metric_snapshots"] {
            manager.drop_table(Table::drop().table(name).to_owned()).await?;
        }
        Ok(())
    }
}

fn tables() -> Vec<TableCreateStatement> {
    vec![
        // The largest values within each `width_ms`; wide ones are kept longer than narrow ones.
        table("metric_snapshots")
            .col(uuid("team_id"))
            .col(integer("width_ms"))
            .col(big_integer("at"))
            .col(big_integer("running_count"))
            .col(big_integer("vcpus"))
            .col(big_integer("memory_mb"))
            .primary_key(Index::create().col("team_id").col("width_ms").col("at"))
            .foreign_key(&mut reference(
                ("metric_snapshots", "team_id"),
                "teams",
                ForeignKeyAction::Cascade,
            ))
            .to_owned(),
        // A time in which a sandbox ran, until the roll-up has counted all of it.
        table("usage_intervals")
            .col(pk_uuid("id"))
            .col(uuid("sandbox_id"))
            .col(uuid("team_id"))
            .col(integer("vcpus"))
            .col(integer("memory_mb"))
            .col(big_integer("started_at"))
            .col(big_integer_null("ended_at"))
            .col(big_integer("accrued_until"))
            .col(big_integer("accruing_to"))
            .foreign_key(&mut reference(
                ("usage_intervals", "team_id"),
                "teams",
                ForeignKeyAction::Cascade,
            ))
            .to_owned(),
        table("usage_days")
            .col(uuid("team_id"))
            // Days since the epoch, UTC.
            .col(big_integer("day"))
            .col(big_integer("cpu_ms"))
            .col(big_integer("ram_mb_ms"))
            .primary_key(Index::create().col("team_id").col("day"))
            .foreign_key(&mut reference(
                ("usage_days", "team_id"),
                "teams",
                ForeignKeyAction::Cascade,
            ))
            .to_owned(),
    ]
}
