//! The tables that extensions bring.

use sea_orm::DatabaseTransaction;
use sea_orm_migration::MigratorTraitSelf;
use sea_orm_migration::prelude::{Alias, DbErr, DynIden, IntoIden as _, MigrationTrait};

use crate::extension::Extension;

/// An extension's migrations, recorded in a table of their own.
struct Guest<'a>(&'a dyn Extension);

impl MigratorTraitSelf for Guest<'_> {
    fn migrations(&self) -> Vec<Box<dyn MigrationTrait>> {
        self.0.migrations()
    }

    fn migration_table_name(&self) -> DynIden {
        Alias::new(format!("extension_{}_migrations", self.0.name())).into_iden()
    }
}

/// Brings an extension's tables up to date.
pub(crate) async fn up(transaction: &DatabaseTransaction, extension: &dyn Extension) -> Result<(), DbErr> {
    if extension.migrations().is_empty() {
        return Ok(());
    }
    Guest(extension).up(transaction, None).await
}
