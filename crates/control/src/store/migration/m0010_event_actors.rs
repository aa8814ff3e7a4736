//! Who decided what becomes of a sandbox, and who caused an event.

use sea_orm_migration::prelude::*;

use super::add_columns;

pub(super) struct EventActors;

impl MigrationName for EventActors {
    fn name(&self) -> &'static str {
        "m0010_event_actors"
    }
}

fn text(name: &'static str) -> ColumnDef {
    ColumnDef::new(name).text().null().to_owned()
}

#[async_trait::async_trait]
impl MigrationTrait for EventActors {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        // Text, as in the audit log: users, keys and whatever comes, also when they are gone. A sandbox keeps who made
        // its newest decision, so that whoever ends the operation, after a restart too, can say whose it was.
        add_columns(manager, "sandboxes", vec![text("actor_type"), text("actor_id")]).await?;
        // The name is the one of that time. Events from before have no actor.
        add_columns(
            manager,
            "events",
            vec![text("actor_type"), text("actor_id"), text("actor_name")],
        )
        .await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for (table, column) in [
            ("events", "actor_name"),
            ("events", "actor_id"),
            ("events", "actor_type"),
            ("sandboxes", "actor_id"),
            ("sandboxes", "actor_type"),
        ] {
            manager
                .alter_table(Table::alter().table(table).drop_column(column).to_owned())
                .await?;
        }
        Ok(())
    }
}
