//! The database: one store over SQLite and PostgreSQL, one file per resource.
//!
//! Guards are in the SQL: a change of status is an `UPDATE … WHERE id = ? AND status IN (…) AND
//! generation = ?`, and the caller has to look at its [`Outcome`]. Nothing above this module writes a
//! query, and nothing in it knows about HTTP or RPC.
//!
//! On SQLite a transaction that reads before it writes can fail when another writer comes between, so
//! transactions here begin with a write (which waits its turn) or consist of writes alone.

mod accounts;
pub(crate) mod admin;
mod audit;
mod channels;
mod db;
pub(crate) mod deletion;
mod entity;
mod events;
mod host_management;
mod hosts;
mod idempotency;
pub(crate) mod keys;
mod leases;
mod migration;
mod migrations;
mod rate_limits;
mod sandbox_metrics;
mod sandboxes;
pub(crate) mod teams;
mod templates;
mod usage;
mod users;

use std::path::Path;
use std::time::Duration;

use sea_orm::sqlx::Connection as _;
use sea_orm::sqlx::sqlite::{SqliteJournalMode, SqliteSynchronous};
use sea_orm::{ConnectOptions, ConnectionTrait, Database, DatabaseConnection, DbErr, SqlErr};

use crate::config::DatabaseLimits;
use crate::extension::Extensions;
use db::{DatabaseTransaction, Db};

pub(crate) use accounts::NewKey;
pub use audit::AuditFilter;
pub(crate) use channels::{Delivery, DeliveryEnd};
pub(crate) use host_management::{MAX_TAGS, NewHost, Tagged};
pub(crate) use hosts::{HostFacts, HostRefresh, HostRegistration, OnHost};
pub(crate) use idempotency::ClaimTimes;
pub(crate) use sandboxes::{Change, Guard, Inserted, SandboxFilter};
pub(crate) use templates::{Finish, Made};
pub(crate) use usage::DAY;
pub use usage::Held;
pub(crate) use users::{NewAccount, NewIdentity, SignUpOutcome};

pub(crate) use migrations::Schema;

/// The SQLite database in the data directory.
const FILE: &str = "control.db";

/// What became of a conditional update.
#[must_use = "a stale or missing record has to be handled"]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Done.
    Updated,
    /// The record is there, but no longer as the caller believed.
    Stale,
    /// There is no such record.
    Missing,
}

/// The database.
#[derive(Debug, Clone)]
pub(crate) struct Store {
    db: Db,
}

impl Store {
    /// Opens the database, creates it if need be, and brings its schema up to date.
    pub(crate) async fn open(
        url: Option<&str>,
        data_dir: &Path,
        limits: DatabaseLimits,
        extensions: &Extensions,
    ) -> Result<Self, DbErr> {
        let (options, limit) = match url {
            Some(url) => (server(url, limits), Some(limits.statement)),
            // Without a network in between, waiting for another writer is all that can take time, and has its limit.
            None => (file(data_dir)?, None),
        };
        let db = Database::connect(options).await?;
        // A migration takes as long as it takes.
        migrations::up(&db, extensions).await?;
        Ok(Self {
            db: Db::new(db, limit),
        })
    }

    /// The connections themselves, for extensions' own tables.
    pub(crate) fn database(&self) -> &DatabaseConnection {
        self.db.unbounded()
    }

    /// Where the schema of a database stands; changes nothing in it.
    pub(crate) async fn schema(url: Option<&str>, data_dir: &Path) -> Result<migrations::Schema, DbErr> {
        let options = match url {
            Some(url) => server(url, DatabaseLimits::default()),
            None if data_dir.join(FILE).exists() => file(data_dir)?,
            None => return Ok(migrations::Schema::empty()),
        };
        let db = Database::connect(options).await?;
        let schema = migrations::schema(&db).await;
        db.close().await?;
        schema
    }

    /// Whether the database answers.
    pub(crate) async fn ping(&self) -> Result<(), DbErr> {
        self.db.execute_unprepared("SELECT 1").await.map(drop)
    }

    /// Closes all connections.
    pub(crate) async fn close(self) -> Result<(), DbErr> {
        self.db.close().await
    }
}

#[cfg(test)]
impl Store {
    /// A store in a folder of its own, with a user whose team has this slug.
    pub(crate) async fn scratch(slug: &str) -> (tempfile::TempDir, Self, crate::domain::UserId) {
        let dir = tempfile::tempdir().expect("a directory");
        let store = Self::open(
            None,
            dir.path(),
            DatabaseLimits::default(),
            &Extensions::default(),
        )
        .await
        .expect("a store");
        let new = NewAccount {
            email: "a@b.c",
            name: "A",
            password_hash: None,
            status: crate::domain::account::UserStatus::Active,
            email_verified: false,
            platform_admin: false,
            team_name: "A",
            slug,
            identity: None,
        };
        match store.sign_up(new).await.expect("a database") {
            SignUpOutcome::Created(owner, _) => (dir, store, owner),
            outcome => panic!("{outcome:?}"),
        }
    }
}

fn server(url: &str, limits: DatabaseLimits) -> ConnectOptions {
    let DatabaseLimits {
        connections,
        statement,
    } = limits;
    let mut options = ConnectOptions::new(url);
    options
        .max_connections(connections.max(1))
        // A request rather fails than hangs: without the database it can do nothing, and the client can come back.
        .acquire_timeout(Duration::from_secs(3))
        .connect_timeout(Duration::from_secs(3))
        // One that was used a moment ago is there still; asking it each time would cost every statement a round trip.
        .test_before_acquire_if_idle_for(Duration::from_secs(1))
        .map_sqlx_postgres_pool_opts(move |pool| {
            // A connection that comes back is asked whether it still answers. Without a limit, one whose answer never
            // comes would take its place in the pool with it.
            pool.after_release(move |connection, _| {
                Box::pin(async move {
                    match tokio::time::timeout(statement, connection.ping()).await {
                        Ok(answer) => answer.map(|()| true),
                        Err(late) => Err(sea_orm::sqlx::Error::Io(std::io::Error::other(late))),
                    }
                })
            })
        })
        .sqlx_logging(false);
    options
}

fn file(data_dir: &Path) -> Result<ConnectOptions, DbErr> {
    std::fs::create_dir_all(data_dir)
        .map_err(|error| DbErr::Custom(format!("cannot create {}: {error}", data_dir.display())))?;
    let path = data_dir.join(FILE);
    for name in [FILE, "control.db-wal", "control.db-shm"] {
        let path = data_dir.join(name);
        keep_private(&path, name == FILE)
            .map_err(|error| DbErr::Custom(format!("cannot protect {}: {error}", path.display())))?;
    }
    let mut options = ConnectOptions::new("sqlite://control.db?mode=rwc");
    options
        .max_connections(8)
        .acquire_timeout(Duration::from_secs(30))
        .sqlx_logging(false)
        .map_sqlx_sqlite_opts(move |sqlite| {
            sqlite
                .filename(&path)
                .create_if_missing(true)
                .foreign_keys(true)
                .journal_mode(SqliteJournalMode::Wal)
                // In WAL mode this survives a crash of the process; only a power cut can lose the last commits.
                .synchronous(SqliteSynchronous::Normal)
                .busy_timeout(Duration::from_secs(15))
        });
    Ok(options)
}

/// Hashes of passwords and keys are in the database, and others may pass through its folder. SQLite makes its other
/// files with the mode of the first.
fn keep_private(path: &Path, make: bool) -> std::io::Result<()> {
    use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
    let opened = std::fs::File::options()
        .read(true)
        .append(true)
        .create(make)
        .mode(0o600)
        .open(path);
    match opened {
        Ok(file) => file.set_permissions(std::fs::Permissions::from_mode(0o600)),
        Err(error) if !make && error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// Whether a write failed because what it refers to is gone.
fn is_missing_reference(error: &DbErr) -> bool {
    matches!(error.sql_err(), Some(SqlErr::ForeignKeyConstraintViolation(_)))
}

/// Whether a write failed because a unique value is taken.
pub(crate) fn is_duplicate(error: &DbErr) -> bool {
    matches!(error.sql_err(), Some(SqlErr::UniqueConstraintViolation(_)))
}

/// Whether a statement failed because the database cannot be reached or takes nothing at the moment, rather than
/// because of what it says.
pub(crate) fn is_unavailable(error: &DbErr) -> bool {
    use sea_orm::RuntimeErr;
    use sea_orm::sqlx::Error as Sqlx;
    let (DbErr::Conn(RuntimeErr::SqlxError(error))
    | DbErr::Exec(RuntimeErr::SqlxError(error))
    | DbErr::Query(RuntimeErr::SqlxError(error))) = error
    else {
        return matches!(error, DbErr::ConnectionAcquire(_) | DbErr::Conn(_));
    };
    match &**error {
        Sqlx::Io(_) | Sqlx::Tls(_) | Sqlx::PoolTimedOut | Sqlx::PoolClosed | Sqlx::WorkerCrashed => true,
        Sqlx::Database(refusal) => refusal.code().is_some_and(|code| {
            // PostgreSQL: connection lost, too many of them, shutting down or starting, a standby, a lock not got.
            let classes = ["08", "53", "57P", "25006", "55P03"];
            // SQLite: another process writes for too long.
            classes.iter().any(|class| code.starts_with(class)) || code == "5" || code == "517"
        }),
        _ => false,
    }
}

/// A stored word or document that this version does not understand.
fn corrupt(table: &str, column: &str) -> DbErr {
    DbErr::Custom(format!(
        "{table}.{column} holds a value that this version does not know"
    ))
}

/// A count or size from a signed column; negative ones (a corrupted row) become zero.
fn unsigned<T: TryFrom<i64> + Default>(value: impl Into<i64>) -> T {
    T::try_from(value.into()).unwrap_or_default()
}

/// A count or size for a signed column; too large ones stop at the column's end.
fn int(value: u32) -> i32 {
    i32::try_from(value).unwrap_or(i32::MAX)
}

/// The same for wide columns.
fn big(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn the_database_is_its_owners_alone() {
        let folder = tempfile::tempdir().expect("a folder");
        let log = folder.path().join("control.db-wal");
        std::fs::write(&log, "").expect("written");
        std::fs::set_permissions(&log, std::fs::Permissions::from_mode(0o644)).expect("as before");
        file(folder.path()).expect("options");
        for name in [FILE, "control.db-wal"] {
            let mode = std::fs::metadata(folder.path().join(name))
                .expect("there")
                .permissions()
                .mode();
            assert_eq!(mode & 0o777, 0o600, "{name}");
        }
    }
}
