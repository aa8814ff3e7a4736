//! The tables. Their record is `extension_billing_migrations`, apart from the control plane's own.

use wrenn_control::sea_orm_migration::prelude::*;
use wrenn_control::sea_orm_migration::schema::{big_integer, boolean, string, uuid};

/// All migrations, oldest first.
#[must_use]
pub fn all() -> Vec<Box<dyn MigrationTrait>> {
    vec![Box::new(Plans), Box::new(Charges), Box::new(Starts)]
}

/// A reference to a team, which takes the row along when the team goes for good.
fn of_team(table: &'static str) -> ForeignKeyCreateStatement {
    ForeignKey::create()
        .from(table, "team_id")
        .to("teams", "id")
        .on_delete(ForeignKeyAction::Cascade)
        .to_owned()
}

struct Plans;

impl MigrationName for Plans {
    fn name(&self) -> &'static str {
        "m0001_plans"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Plans {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let plans = Table::create()
            .table("billing_plans")
            .col(uuid("team_id").primary_key())
            .col(string("plan"))
            .col(boolean("suspended"))
            .col(big_integer("updated_at"))
            .foreign_key(&mut of_team("billing_plans"))
            .to_owned();
        manager.create_table(plans).await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager
            .drop_table(Table::drop().table("billing_plans").to_owned())
            .await
    }
}

struct Charges;

impl MigrationName for Charges {
    fn name(&self) -> &'static str {
        "m0002_charges"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Charges {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let charges = Table::create()
            .table("billing_charges")
            .col(uuid("team_id"))
            // Days since the epoch, UTC.
            .col(big_integer("day"))
            .col(string("plan"))
            .col(big_integer("cpu_ms"))
            .col(big_integer("ram_mb_ms"))
            .col(big_integer("cpu_micros"))
            .col(big_integer("ram_micros"))
            .primary_key(Index::create().col("team_id").col("day"))
            .foreign_key(&mut of_team("billing_charges"))
            .to_owned();
        manager.create_table(charges).await?;
        let days = Table::create()
            .table("billing_days")
            .col(big_integer("day").primary_key())
            .col(big_integer("closed_at"))
            .to_owned();
        manager.create_table(days).await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for table in ["billing_days", "billing_charges"] {
            manager.drop_table(Table::drop().table(table).to_owned()).await?;
        }
        Ok(())
    }
}

struct Starts;

impl MigrationName for Starts {
    fn name(&self) -> &'static str {
        "m0003_starts"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Starts {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let starts = Table::create()
            .table("billing_starts")
            // The event's place in the order: told again, it is the same row.
            .col(big_integer("seq").primary_key())
            .col(uuid("team_id"))
            .col(big_integer("at"))
            .foreign_key(&mut of_team("billing_starts"))
            .to_owned();
        manager.create_table(starts).await?;
        let index = Index::create()
            .name("idx_billing_starts_team")
            .table("billing_starts")
            .col("team_id")
            .col("at")
            .to_owned();
        manager.create_index(index).await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager
            .drop_table(Table::drop().table("billing_starts").to_owned())
            .await
    }
}
