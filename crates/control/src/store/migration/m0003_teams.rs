//! What teams need beyond a row and its members: a deletion that can be taken up again, a lock for changes of their
//! members, whether they may bring hosts, and indexes for the listings.

use sea_orm::DbBackend;
use sea_orm_migration::prelude::*;
use sea_orm_migration::schema::{boolean, integer, string_null};

use super::{add_columns, index};

pub(super) struct Teams;

impl MigrationName for Teams {
    fn name(&self) -> &'static str {
        "m0003_teams"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Teams {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        add_columns(
            manager,
            "teams",
            vec![
                boolean("byoc").default(false).to_owned(),
                // Absent while the team lives; `purging` until everything it had is gone; then `purged`. The row stays
                // for ever, so that its slug is never used again.
                string_null("deletion").to_owned(),
                // Raised first in every change of members, so that such changes of one team come one after the other.
                integer("members_version").default(0).to_owned(),
            ],
        )
        .await?;
        for statement in [
            index("idx_teams_deletion", "teams", &["deletion"], false),
            // These serve the listings in the order of ids, and what the shorter ones served.
            index(
                "idx_users_teams_team_user",
                "users_teams",
                &["team_id", "user_id"],
                false,
            ),
            index(
                "idx_team_api_keys_team_id",
                "team_api_keys",
                &["team_id", "id"],
                false,
            ),
            // Creators become unknown with their account; without these, that would read the whole tables.
            index(
                "idx_team_api_keys_creator",
                "team_api_keys",
                &["created_by"],
                false,
            ),
            index("idx_hosts_creator", "hosts", &["created_by"], false),
            index("idx_host_tokens_creator", "host_tokens", &["created_by"], false),
        ] {
            manager.create_index(statement).await?;
        }
        for (name, table) in [
            ("idx_users_teams_team", "users_teams"),
            ("idx_team_api_keys_team", "team_api_keys"),
        ] {
            manager
                .drop_index(Index::drop().name(name).table(table).to_owned())
                .await?;
        }
        // The search by prefix is a range of bytes. SQLite's unique index has that order, PostgreSQL's has the locale's.
        if manager.get_database_backend() == DbBackend::Postgres {
            manager
                .get_connection()
                .execute_unprepared(r#"CREATE INDEX idx_users_email_bytes ON users (email COLLATE "C")"#)
                .await?;
        }
        Ok(())
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        if manager.get_database_backend() == DbBackend::Postgres {
            manager
                .drop_index(
                    Index::drop()
                        .name("idx_users_email_bytes")
                        .table("users")
                        .to_owned(),
                )
                .await?;
        }
        for statement in [
            index("idx_users_teams_team", "users_teams", &["team_id"], false),
            index("idx_team_api_keys_team", "team_api_keys", &["team_id"], false),
        ] {
            manager.create_index(statement).await?;
        }
        for (name, table) in [
            ("idx_teams_deletion", "teams"),
            ("idx_users_teams_team_user", "users_teams"),
            ("idx_team_api_keys_team_id", "team_api_keys"),
            ("idx_team_api_keys_creator", "team_api_keys"),
            ("idx_hosts_creator", "hosts"),
            ("idx_host_tokens_creator", "host_tokens"),
        ] {
            manager
                .drop_index(Index::drop().name(name).table(table).to_owned())
                .await?;
        }
        for column in ["byoc", "deletion", "members_version"] {
            manager
                .alter_table(Table::alter().table("teams").drop_column(column).to_owned())
                .await?;
        }
        Ok(())
    }
}
