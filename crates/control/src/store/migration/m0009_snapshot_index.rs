//! An index for a query that read a large table from end to end.

use sea_orm_migration::prelude::*;

pub(super) struct SnapshotIndex;

impl MigrationName for SnapshotIndex {
    fn name(&self) -> &'static str {
        "m0009_snapshot_index"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for SnapshotIndex {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        // The monitor looks for snapshots that no sandbox is making any more; few sandboxes make one at a time, and only
        // those are in the index. Both databases take the same words.
        manager
            .get_connection()
            .execute_unprepared(
                "CREATE INDEX idx_sandboxes_snapshot ON sandboxes (snapshot_template_id) \
                 WHERE snapshot_template_id IS NOT NULL",
            )
            .await
            .map(drop)
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager
            .drop_index(
                Index::drop()
                    .name("idx_sandboxes_snapshot")
                    .table("sandboxes")
                    .to_owned(),
            )
            .await
    }
}
