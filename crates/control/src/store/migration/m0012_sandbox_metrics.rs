//! What each sandbox used of its machine over time.

use sea_orm_migration::prelude::*;
use sea_orm_migration::schema::{big_integer, double, integer, uuid};

use super::{index, table};

pub(super) struct SandboxMetrics;

impl MigrationName for SandboxMetrics {
    fn name(&self) -> &'static str {
        "m0012_sandbox_metrics"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for SandboxMetrics {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        // A point for each `width_ms`, which begins at `at`; wide ones are kept longer than narrow ones. Without foreign
        // keys: each of the many inserts would look at its sandbox and its team, and lock them. What is written in the
        // moment in which one of them goes is pruned by its age.
        manager
            .create_table(
                table("sandbox_metrics")
                    .col(uuid("sandbox_id"))
                    .col(integer("width_ms"))
                    .col(big_integer("at"))
                    .col(uuid("team_id"))
                    .col(double("cpu_pct"))
                    .col(big_integer("mem_bytes"))
                    .col(big_integer("disk_bytes"))
                    .primary_key(Index::create().col("sandbox_id").col("width_ms").col("at"))
                    .to_owned(),
            )
            .await?;
        // For the roll-up and the removal of what is too old, and for a team's deletion.
        for statement in [
            index(
                "idx_sandbox_metrics_age",
                "sandbox_metrics",
                &["width_ms", "at"],
                false,
            ),
            index("idx_sandbox_metrics_team", "sandbox_metrics", &["team_id"], false),
        ] {
            manager.create_index(statement).await?;
        }
        Ok(())
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager
            .drop_table(Table::drop().table("sandbox_metrics").to_owned())
            .await
    }
}
