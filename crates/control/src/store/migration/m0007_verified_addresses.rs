//! Which addresses are proved: by a link that was followed, or by a provider that has verified them.

use sea_orm_migration::prelude::*;
use sea_orm_migration::schema::big_integer_null;

use super::{add_columns, index};

pub(super) struct VerifiedAddresses;

impl MigrationName for VerifiedAddresses {
    fn name(&self) -> &'static str {
        "m0007_verified_addresses"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for VerifiedAddresses {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let verified = big_integer_null("email_verified_at").to_owned();
        add_columns(manager, "users", vec![verified]).await?;
        // For the sweep of tokens that have run out.
        manager
            .create_index(index(
                "idx_email_tokens_end",
                "email_tokens",
                &["expires_at"],
                false,
            ))
            .await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager
            .drop_index(
                Index::drop()
                    .name("idx_email_tokens_end")
                    .table("email_tokens")
                    .to_owned(),
            )
            .await?;
        manager
            .alter_table(
                Table::alter()
                    .table("users")
                    .drop_column("email_verified_at")
                    .to_owned(),
            )
            .await
    }
}
