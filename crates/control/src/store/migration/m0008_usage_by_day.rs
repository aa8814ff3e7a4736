//! Usage of all teams on a day, for billing.

use sea_orm_migration::prelude::*;

use super::index;

pub(super) struct UsageByDay;

impl MigrationName for UsageByDay {
    fn name(&self) -> &'static str {
        "m0008_usage_by_day"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for UsageByDay {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager
            .create_index(index(
                "idx_usage_days_day",
                "usage_days",
                &["day", "team_id"],
                true,
            ))
            .await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager
            .drop_index(
                Index::drop()
                    .name("idx_usage_days_day")
                    .table("usage_days")
                    .to_owned(),
            )
            .await
    }
}
