//! Attempts within a window, counted in the database: any control plane of the installation may be asked.

use sea_orm::sea_query::{CaseStatement, Expr, ExprTrait as _, OnConflict, Query};
use sea_orm::{ColumnTrait, ConnectionTrait, DbErr, EntityTrait, QueryFilter};

use super::Store;
use super::entity::rate_limit;
use crate::domain::{Millis, now};

/// Where counting stops, far beyond every limit and far from the column's end.
const MAX_HITS: i32 = 1_000_000;

/// A bucket after an attempt was counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Hits {
    /// Attempts in this window, this one included.
    pub(crate) count: u32,
    /// When the window ends.
    pub(crate) ends_at: Millis,
}

impl Store {
    /// Counts an attempt, in one statement: attempts at the same time are counted one after the other.
    pub(crate) async fn rate_limit_hit(&self, bucket: &str, window: Millis) -> Result<Hits, DbErr> {
        use rate_limit::Column;
        let now = now();
        let column = |column: Column| Expr::col((rate_limit::Entity, column));
        let over = || column(Column::WindowEndsAt).lte(now);
        let hits = CaseStatement::new()
            .case(over(), 1)
            .case(column(Column::Hits).gte(MAX_HITS), MAX_HITS)
            .finally(column(Column::Hits).add(1));
        let ends = CaseStatement::new()
            .case(over(), now + window)
            .finally(column(Column::WindowEndsAt));
        let upsert = Query::insert()
            .into_table(rate_limit::Entity)
            .columns([Column::Bucket, Column::Hits, Column::WindowEndsAt])
            .values_panic([bucket.into(), 1.into(), (now + window).into()])
            .on_conflict(
                OnConflict::column(Column::Bucket)
                    .value(Column::Hits, hits)
                    .value(Column::WindowEndsAt, ends)
                    .to_owned(),
            )
            .returning(Query::returning().columns([Column::Hits, Column::WindowEndsAt]))
            .to_owned();
        let statement = self.db.get_database_backend().build(&upsert);
        let row = self
            .db
            .query_one_raw(statement)
            .await?
            .ok_or_else(|| DbErr::RecordNotFound("the bucket that was just written".to_owned()))?;
        let count: i32 = row.try_get("", "hits")?;
        Ok(Hits {
            count: super::unsigned(count),
            ends_at: row.try_get("", "window_ends_at")?,
        })
    }

    /// Forgets the attempts of a bucket.
    pub(crate) async fn rate_limit_clear(&self, bucket: &str) -> Result<(), DbErr> {
        rate_limit::Entity::delete_by_id(bucket)
            .exec(&self.db)
            .await
            .map(drop)
    }

    /// Removes the buckets whose window is over.
    pub(crate) async fn rate_limits_sweep(&self) -> Result<u64, DbErr> {
        let swept = rate_limit::Entity::delete_many()
            .filter(rate_limit::Column::WindowEndsAt.lte(now()))
            .exec(&self.db)
            .await?;
        Ok(swept.rows_affected)
    }
}
