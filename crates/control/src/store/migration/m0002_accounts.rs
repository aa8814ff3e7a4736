//! What real accounts need beyond the first user: sessions that can be ended, identities elsewhere, tokens sent by
//! mail, permissions of platform admins, and counters against guessing.

use sea_orm_migration::prelude::*;
use sea_orm_migration::schema::{
    big_integer, big_integer_null, integer, pk_uuid, string, string_null, uuid, uuid_null,
};

use super::{add_columns, index, reference, table};

pub(super) struct Accounts;

impl MigrationName for Accounts {
    fn name(&self) -> &'static str {
        "m0002_accounts"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Accounts {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        add_columns(
            manager,
            "users",
            vec![
                // Raised by whatever has to end all sessions: a new password, a deactivation, a deletion.
                integer("session_version").default(0).to_owned(),
                big_integer_null("deleted_at").to_owned(),
                big_integer_null("last_login_at").to_owned(),
            ],
        )
        .await?;
        for statement in [
            table("oauth_identities")
                .col(pk_uuid("id"))
                .col(uuid("user_id"))
                .col(string("provider"))
                .col(string("subject"))
                .col(string("email"))
                .col(big_integer("created_at"))
                .foreign_key(&mut reference(
                    ("oauth_identities", "user_id"),
                    "users",
                    ForeignKeyAction::Cascade,
                ))
                .to_owned(),
            // One-time tokens that travel by mail; only their hash is here.
            table("email_tokens")
                .col(pk_uuid("id"))
                .col(uuid("user_id"))
                .col(string("purpose"))
                .col(string("token_hash").unique_key())
                .col(big_integer("created_at"))
                .col(big_integer("expires_at"))
                .col(big_integer_null("used_at"))
                .foreign_key(&mut reference(
                    ("email_tokens", "user_id"),
                    "users",
                    ForeignKeyAction::Cascade,
                ))
                .to_owned(),
            table("admin_permissions")
                .col(uuid("user_id"))
                .col(string("permission"))
                .col(uuid_null("granted_by"))
                .col(big_integer("created_at"))
                .primary_key(Index::create().col("user_id").col("permission"))
                .foreign_key(&mut reference(
                    ("admin_permissions", "user_id"),
                    "users",
                    ForeignKeyAction::Cascade,
                ))
                .foreign_key(&mut reference(
                    ("admin_permissions", "granted_by"),
                    "users",
                    ForeignKeyAction::SetNull,
                ))
                .to_owned(),
            // Attempts within a window, by account and by address; in the database, since any instance may be asked.
            table("rate_limits")
                .col(string("bucket").primary_key())
                .col(integer("hits"))
                .col(big_integer("window_ends_at"))
                .to_owned(),
            // Values that belong to the installation rather than to a row of something.
            table("settings")
                .col(string("name").primary_key())
                .col(string_null("value"))
                .col(big_integer("updated_at"))
                .to_owned(),
        ] {
            manager.create_table(statement).await?;
        }
        for statement in [
            index(
                "idx_oauth_identities_subject",
                "oauth_identities",
                &["provider", "subject"],
                true,
            ),
            index(
                "idx_oauth_identities_user",
                "oauth_identities",
                &["user_id", "provider"],
                true,
            ),
            index(
                "idx_email_tokens_user",
                "email_tokens",
                &["user_id", "purpose"],
                false,
            ),
            index("idx_rate_limits_end", "rate_limits", &["window_ends_at"], false),
            index("idx_users_deleted", "users", &["deleted_at"], false),
        ] {
            manager.create_index(statement).await?;
        }
        Ok(())
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for name in [
            "settings",
            "rate_limits",
            "admin_permissions",
            "email_tokens",
            "oauth_identities",
        ] {
            manager.drop_table(Table::drop().table(name).to_owned()).await?;
        }
        manager
            .drop_index(Index::drop().name("idx_users_deleted").table("users").to_owned())
            .await?;
        for column in ["session_version", "deleted_at", "last_login_at"] {
            manager
                .alter_table(Table::alter().table("users").drop_column(column).to_owned())
                .await?;
        }
        Ok(())
    }
}
