//! Indexes for two looks at few of many sandboxes: those that stand on a template, and those that ended long ago.

use sea_orm_migration::prelude::*;

pub(super) struct SandboxIndexes;

impl MigrationName for SandboxIndexes {
    fn name(&self) -> &'static str {
        "m0014_sandbox_indexes"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for SandboxIndexes {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        // Both databases take the same words. SQLite uses such an index only for a query that says the same words too.
        for sql in [
            "CREATE INDEX idx_sandboxes_template ON sandboxes (template_id) WHERE status <> 'stopped'",
            "CREATE INDEX idx_sandboxes_stopped ON sandboxes (status_at) WHERE status = 'stopped'",
        ] {
            manager.get_connection().execute_unprepared(sql).await?;
        }
        Ok(())
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for name in ["idx_sandboxes_stopped", "idx_sandboxes_template"] {
            manager
                .drop_index(Index::drop().name(name).table("sandboxes").to_owned())
                .await?;
        }
        Ok(())
    }
}
