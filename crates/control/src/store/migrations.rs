//! Bringing a database's schema up to date: under a lock, all or nothing, and never backwards.

use std::collections::BTreeSet;

use sea_orm::{
    ConnectionTrait, DatabaseConnection, DbBackend, DbErr, IntoDatabaseExecutor, SqliteTransactionMode,
    TransactionOptions, TransactionTrait,
};
use sea_orm_migration::MigratorTrait as _;

use super::migration::{self, Migrator};
use crate::extension::Extensions;

/// The advisory lock of whoever migrates: `wrenn` in ASCII.
const LOCK: i64 = 0x77_72_65_6e_6e;

/// Where a schema stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Schema {
    /// Migrations that this program knows, in order, and whether they were applied.
    pub(crate) known: Vec<(String, bool)>,
    /// Migrations of a newer program.
    pub(crate) unknown: Vec<String>,
}

impl Schema {
    /// That of a database that is not there yet.
    pub(crate) fn empty() -> Self {
        let known = Migrator::get_migration_files();
        Self {
            known: known.iter().map(|file| (file.name().to_owned(), false)).collect(),
            unknown: Vec::new(),
        }
    }
}

/// Applies what is missing. Of several programs that start at once, one does it, and the others wait.
pub(super) async fn up(db: &DatabaseConnection, extensions: &Extensions) -> Result<(), DbErr> {
    // One transaction around everything: a program that dies in the middle leaves the schema as it was.
    let transaction = db
        .begin_with_options(TransactionOptions {
            // On SQLite this is the lock.
            sqlite_transaction_mode: Some(SqliteTransactionMode::Immediate),
            ..TransactionOptions::default()
        })
        .await?;
    if transaction.get_database_backend() == DbBackend::Postgres {
        transaction
            .execute_unprepared(&format!("SELECT pg_advisory_xact_lock({LOCK})"))
            .await?;
    }
    let found = schema(&transaction).await?;
    if let Some(newest) = found.unknown.last() {
        return Err(DbErr::Migration(format!(
            "the database's schema is newer than this program: it has the migration {newest}, which this version of \
             Wrenn does not know. Run the version of Wrenn that made it, or a newer one"
        )));
    }
    Migrator::up(&transaction, None).await?;
    for extension in extensions.iter() {
        migration::of_extension(&transaction, extension).await?;
    }
    transaction.commit().await
}

/// Where the schema stands; changes nothing.
pub(super) async fn schema<'c, C>(db: &'c C) -> Result<Schema, DbErr>
where
    C: ConnectionTrait,
    &'c C: IntoDatabaseExecutor<'c>,
{
    let names: Vec<String> = Migrator::get_migration_files()
        .iter()
        .map(|file| file.name().to_owned())
        .collect();
    let applied = applied(db).await?;
    Ok(Schema {
        unknown: applied
            .iter()
            .filter(|name| !names.contains(name))
            .cloned()
            .collect(),
        known: names
            .into_iter()
            .map(|name| {
                let done = applied.contains(&name);
                (name, done)
            })
            .collect(),
    })
}

async fn applied<'c, C>(db: &'c C) -> Result<BTreeSet<String>, DbErr>
where
    C: ConnectionTrait,
    &'c C: IntoDatabaseExecutor<'c>,
{
    use sea_orm::sea_query::Query;
    let table = Migrator::migration_table_name();
    let manager = sea_orm_migration::SchemaManager::new(db);
    if !manager.has_table(table.to_string()).await? {
        return Ok(BTreeSet::new());
    }
    let query = Query::select().column("version").from(table).to_owned();
    db.query_all(&query)
        .await?
        .into_iter()
        .map(|row| row.try_get_by_index(0))
        .collect()
}
