//! What managing hosts needs: whose a host is, where it stands, its tags, deletions that can be taken up again, and
//! refresh tokens that count until their successor is used.

use sea_orm_migration::prelude::*;
use sea_orm_migration::schema::{big_integer, big_integer_null, string, string_null, uuid, uuid_null};

use super::{add_columns, index, reference, table};

pub(super) struct HostManagement;

impl MigrationName for HostManagement {
    fn name(&self) -> &'static str {
        "m0011_host_management"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for HostManagement {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        add_columns(
            manager,
            "hosts",
            vec![
                string("kind").default("regular").to_owned(),
                // Of a `byoc` host. No reference: SQLite cannot add one, and teams' rows stay for ever.
                uuid_null("team_id").to_owned(),
                string_null("provider").to_owned(),
                string_null("availability_zone").to_owned(),
                // Absent while the host is wanted; `emptying` or `destroying` until its row goes.
                string_null("deletion").to_owned(),
            ],
        )
        .await?;
        // When its successor was issued; it counts for a while longer, in case that answer was lost.
        let superseded = big_integer_null("superseded_at").to_owned();
        add_columns(manager, "host_refresh_tokens", vec![superseded]).await?;
        manager
            .create_table(
                table("host_tags")
                    .col(uuid("host_id"))
                    .col(string("tag"))
                    .col(big_integer("created_at"))
                    .primary_key(Index::create().col("host_id").col("tag"))
                    .foreign_key(&mut reference(
                        ("host_tags", "host_id"),
                        "hosts",
                        ForeignKeyAction::Cascade,
                    ))
                    .to_owned(),
            )
            .await?;
        for statement in [
            index("idx_hosts_team", "hosts", &["team_id"], false),
            index("idx_hosts_deletion", "hosts", &["deletion"], false),
            // A host's tokens are revoked together.
            index("idx_host_tokens_host", "host_tokens", &["host_id"], false),
            index(
                "idx_host_refresh_tokens_host",
                "host_refresh_tokens",
                &["host_id"],
                false,
            ),
        ] {
            manager.create_index(statement).await?;
        }
        Ok(())
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for (name, table) in [
            ("idx_hosts_team", "hosts"),
            ("idx_hosts_deletion", "hosts"),
            ("idx_host_tokens_host", "host_tokens"),
            ("idx_host_refresh_tokens_host", "host_refresh_tokens"),
        ] {
            manager
                .drop_index(Index::drop().name(name).table(table).to_owned())
                .await?;
        }
        manager
            .drop_table(Table::drop().table("host_tags").to_owned())
            .await?;
        for (table, column) in [
            ("host_refresh_tokens", "superseded_at"),
            ("hosts", "deletion"),
            ("hosts", "availability_zone"),
            ("hosts", "provider"),
            ("hosts", "team_id"),
            ("hosts", "kind"),
        ] {
            manager
                .alter_table(Table::alter().table(table).drop_column(column).to_owned())
                .await?;
        }
        Ok(())
    }
}
