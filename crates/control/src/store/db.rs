//! Connections whose statements end: with an answer, or as unanswered.
//!
//! A server that is gone closes its connections, or the network says that it cannot be reached. One behind a network
//! that swallows packets says nothing at all, and a statement that was sent to it would wait until TCP gives up, which
//! takes a quarter of an hour. So every statement has a limit here, on this side. Whether an unanswered one was carried
//! out is unknown, as with any lost connection.

use std::pin::Pin;
use std::time::Duration;

use sea_orm::{
    AccessMode, ConnectionTrait, DatabaseConnection, DbBackend, DbErr, ExecResult, IsolationLevel,
    QueryResult, RuntimeErr, Statement, TransactionError, TransactionOptions, TransactionSession,
    TransactionTrait,
};
use sea_orm_migration::async_trait;

/// The connections of a store.
#[derive(Debug, Clone)]
pub(super) struct Db {
    inner: DatabaseConnection,
    limit: Option<Duration>,
}

/// A transaction of it.
#[derive(Debug)]
pub(super) struct DatabaseTransaction {
    inner: sea_orm::DatabaseTransaction,
    limit: Option<Duration>,
}

/// Waits for an answer as long as the limit says.
async fn bounded<T>(
    limit: Option<Duration>,
    answer: impl Future<Output = Result<T, DbErr>> + Send,
) -> Result<T, DbErr> {
    let Some(limit) = limit else { return answer.await };
    tokio::time::timeout(limit, answer).await.unwrap_or_else(|_| {
        Err(DbErr::Conn(RuntimeErr::Internal(format!(
            "no answer within {} s",
            limit.as_secs_f32()
        ))))
    })
}

impl Db {
    /// Bounds a connection's statements.
    pub(super) fn new(inner: DatabaseConnection, limit: Option<Duration>) -> Self {
        Self { inner, limit }
    }

    /// The connection itself, without limits.
    pub(super) fn unbounded(&self) -> &DatabaseConnection {
        &self.inner
    }

    pub(super) fn get_database_backend(&self) -> DbBackend {
        self.inner.get_database_backend()
    }

    /// Closes all connections; one that does not answer is left.
    pub(super) async fn close(self) -> Result<(), DbErr> {
        bounded(self.limit, self.inner.close()).await
    }
}

impl DatabaseTransaction {
    pub(super) async fn commit(self) -> Result<(), DbErr> {
        bounded(self.limit, self.inner.commit()).await
    }

    pub(super) async fn rollback(self) -> Result<(), DbErr> {
        bounded(self.limit, self.inner.rollback()).await
    }
}

/// The same for both: the inner one's statements, bounded.
macro_rules! bounded {
    ($kind:ty) => {
        #[async_trait::async_trait]
        impl ConnectionTrait for $kind {
            fn get_database_backend(&self) -> DbBackend {
                self.inner.get_database_backend()
            }

            async fn execute_raw(&self, statement: Statement) -> Result<ExecResult, DbErr> {
                bounded(self.limit, self.inner.execute_raw(statement)).await
            }

            async fn execute_unprepared(&self, sql: &str) -> Result<ExecResult, DbErr> {
                bounded(self.limit, self.inner.execute_unprepared(sql)).await
            }

            async fn query_one_raw(&self, statement: Statement) -> Result<Option<QueryResult>, DbErr> {
                bounded(self.limit, self.inner.query_one_raw(statement)).await
            }

            async fn query_all_raw(&self, statement: Statement) -> Result<Vec<QueryResult>, DbErr> {
                bounded(self.limit, self.inner.query_all_raw(statement)).await
            }
        }

        #[async_trait::async_trait]
        impl TransactionTrait for $kind {
            type Transaction = DatabaseTransaction;

            async fn begin(&self) -> Result<DatabaseTransaction, DbErr> {
                self.begin_with_config(None, None).await
            }

            async fn begin_with_config(
                &self,
                isolation_level: Option<IsolationLevel>,
                access_mode: Option<AccessMode>,
            ) -> Result<DatabaseTransaction, DbErr> {
                let begun = self.inner.begin_with_config(isolation_level, access_mode);
                Ok(DatabaseTransaction {
                    inner: bounded(self.limit, begun).await?,
                    limit: self.limit,
                })
            }

            async fn begin_with_options(
                &self,
                options: TransactionOptions,
            ) -> Result<DatabaseTransaction, DbErr> {
                Ok(DatabaseTransaction {
                    inner: bounded(self.limit, self.inner.begin_with_options(options)).await?,
                    limit: self.limit,
                })
            }

            async fn transaction<F, T, E>(&self, callback: F) -> Result<T, TransactionError<E>>
            where
                F: for<'c> FnOnce(
                        &'c DatabaseTransaction,
                    ) -> Pin<Box<dyn Future<Output = Result<T, E>> + Send + 'c>>
                    + Send,
                T: Send,
                E: std::fmt::Display + std::fmt::Debug + Send,
            {
                self.transaction_with_config(callback, None, None).await
            }

            async fn transaction_with_config<F, T, E>(
                &self,
                callback: F,
                isolation_level: Option<IsolationLevel>,
                access_mode: Option<AccessMode>,
            ) -> Result<T, TransactionError<E>>
            where
                F: for<'c> FnOnce(
                        &'c DatabaseTransaction,
                    ) -> Pin<Box<dyn Future<Output = Result<T, E>> + Send + 'c>>
                    + Send,
                T: Send,
                E: std::fmt::Display + std::fmt::Debug + Send,
            {
                let begun = self.begin_with_config(isolation_level, access_mode).await;
                let transaction = begun.map_err(TransactionError::Connection)?;
                // An error drops the transaction, which rolls it back.
                let done = callback(&transaction)
                    .await
                    .map_err(TransactionError::Transaction)?;
                transaction
                    .commit()
                    .await
                    .map_err(TransactionError::Connection)?;
                Ok(done)
            }
        }
    };
}

bounded!(Db);
bounded!(DatabaseTransaction);

#[async_trait::async_trait]
impl TransactionSession for DatabaseTransaction {
    async fn commit(self) -> Result<(), DbErr> {
        Self::commit(self).await
    }

    async fn rollback(self) -> Result<(), DbErr> {
        Self::rollback(self).await
    }
}
