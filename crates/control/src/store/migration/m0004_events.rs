//! State events on their way to whoever listens, and the leases of what one instance does at a time.

use sea_orm_migration::prelude::*;
use sea_orm_migration::schema::{big_integer, big_integer_null, integer, string, string_null, text, uuid};

use super::{index, reference, table};

pub(super) struct Events;

impl MigrationName for Events {
    fn name(&self) -> &'static str {
        "m0004_events"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Events {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for statement in [
            // Written in the transaction of the change that they tell of.
            table("events")
                .col(
                    ColumnDef::new("id")
                        .big_integer()
                        .not_null()
                        .auto_increment()
                        .primary_key(),
                )
                // The place in the order of events. Given after the commit, because ids become visible in another
                // order than they are given in, and a reader that remembers the last id would miss some.
                .col(big_integer_null("seq").unique_key())
                .col(uuid("team_id"))
                .col(string("kind"))
                .col(string_null("outcome"))
                .col(string("resource_type"))
                .col(string("resource_id"))
                .col(text("payload"))
                .col(big_integer("created_at"))
                .col(big_integer_null("published_at"))
                .col(big_integer_null("consumed_at"))
                .col(integer("attempts").default(0))
                .foreign_key(&mut reference(
                    ("events", "team_id"),
                    "teams",
                    ForeignKeyAction::Cascade,
                ))
                .to_owned(),
            // One row: the last place given.
            table("event_cursor")
                .col(integer("id").primary_key())
                .col(big_integer("value"))
                .to_owned(),
            table("leases")
                .col(string("name").primary_key())
                .col(uuid("holder"))
                // By the database's clock: those of the instances may differ.
                .col(big_integer("expires_at"))
                .to_owned(),
        ] {
            manager.create_table(statement).await?;
        }
        for statement in [
            index("idx_events_team_seq", "events", &["team_id", "seq"], false),
            index("idx_events_created", "events", &["created_at"], false),
        ] {
            manager.create_index(statement).await?;
        }
        // Few rows are waiting at a time; only those are in these indexes. Both databases take the same words.
        for sql in [
            "CREATE INDEX idx_events_unnumbered ON events (id) WHERE seq IS NULL",
            "CREATE INDEX idx_events_unconsumed ON events (seq) WHERE consumed_at IS NULL",
        ] {
            manager.get_connection().execute_unprepared(sql).await?;
        }
        manager
            .execute(
                Query::insert()
                    .into_table("event_cursor")
                    .columns(["id", "value"])
                    .values_panic([1.into(), 0i64.into()])
                    .to_owned(),
            )
            .await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for name in ["leases", "event_cursor", "events"] {
            manager.drop_table(Table::drop().table(name).to_owned()).await?;
        }
        Ok(())
    }
}
