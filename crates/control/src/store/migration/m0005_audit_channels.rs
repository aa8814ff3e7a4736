//! Who did what, where state changes are told, and answers kept for repeated creates.

use sea_orm_migration::prelude::*;
use sea_orm_migration::schema::{
    big_integer, big_integer_null, integer, integer_null, pk_uuid, string, string_null, text, text_null,
    uuid, uuid_null,
};

use super::{index, reference, table};

pub(super) struct AuditChannels;

impl MigrationName for AuditChannels {
    fn name(&self) -> &'static str {
        "m0005_audit_channels"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for AuditChannels {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for statement in tables() {
            manager.create_table(statement).await?;
        }
        for statement in [
            index(
                "idx_audit_logs_team_time",
                "audit_logs",
                &["team_id", "created_at", "id"],
                false,
            ),
            index("idx_audit_logs_time", "audit_logs", &["created_at", "id"], false),
            index("idx_channels_team_name", "channels", &["team_id", "name"], true),
            index(
                "idx_channel_deliveries_event",
                "channel_deliveries",
                &["channel_id", "event_id"],
                true,
            ),
            index(
                "idx_channel_deliveries_due",
                "channel_deliveries",
                &["status", "next_at"],
                false,
            ),
            index(
                "idx_idempotency_keys_end",
                "idempotency_keys",
                &["expires_at"],
                false,
            ),
        ] {
            manager.create_index(statement).await?;
        }
        Ok(())
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for name in ["idempotency_keys", "channel_deliveries", "channels", "audit_logs"] {
            manager.drop_table(Table::drop().table(name).to_owned()).await?;
        }
        Ok(())
    }
}

fn tables() -> Vec<TableCreateStatement> {
    vec![
        // No foreign keys: history outlives whoever and whatever it names, so actor and resource are text.
        table("audit_logs")
            .col(pk_uuid("id"))
            .col(uuid_null("team_id"))
            .col(string("actor_type"))
            .col(string_null("actor_id"))
            .col(string("action"))
            .col(string("resource_type"))
            .col(string_null("resource_id"))
            .col(integer_null("status"))
            .col(string("outcome"))
            .col(string_null("source_address"))
            .col(big_integer("created_at"))
            .to_owned(),
        table("channels")
            .col(pk_uuid("id"))
            .col(uuid("team_id"))
            .col(string("name"))
            .col(string("provider"))
            // Sealed: tokens and secret addresses are in it.
            .col(text("config"))
            .col(text("events"))
            .col(uuid_null("created_by"))
            .col(big_integer("created_at"))
            .col(big_integer("updated_at"))
            .col(big_integer_null("delivered_at"))
            .col(big_integer_null("failed_at"))
            .col(text_null("last_error"))
            .foreign_key(&mut reference(
                ("channels", "team_id"),
                "teams",
                ForeignKeyAction::Cascade,
            ))
            .foreign_key(&mut reference(
                ("channels", "created_by"),
                "users",
                ForeignKeyAction::SetNull,
            ))
            .to_owned(),
        // One row for a channel and an event, however often the event arrives.
        table("channel_deliveries")
            .col(pk_uuid("id"))
            .col(uuid("channel_id"))
            .col(uuid("event_id"))
            .col(text("event"))
            .col(string("status"))
            .col(integer("attempts"))
            // Due at this time; while an attempt is under way, the end of its lease.
            .col(big_integer("next_at"))
            .col(text_null("last_error"))
            .col(big_integer("created_at"))
            .foreign_key(&mut reference(
                ("channel_deliveries", "channel_id"),
                "channels",
                ForeignKeyAction::Cascade,
            ))
            .to_owned(),
        table("idempotency_keys")
            .col(string("scope").primary_key())
            .col(string("request_hash"))
            // Who executes the request; a takeover of a dead claim changes it.
            .col(uuid("claim"))
            .col(big_integer("claim_ends_at"))
            .col(integer_null("status"))
            // Sealed: some answers show a secret once.
            .col(text_null("body"))
            .col(big_integer("expires_at"))
            .to_owned(),
    ]
}
