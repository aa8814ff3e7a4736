//! What each sandbox used of its machine: narrow points for the last hours, wide ones for a day.

use std::collections::BTreeMap;

use sea_orm::sea_query::{OnConflict, Query};
use sea_orm::{
    ColumnTrait, ConnectionTrait, DbErr, EntityTrait, FromQueryResult, QueryFilter, QueryOrder, QuerySelect,
    Statement,
};
use uuid::Uuid;

use super::entity::sandbox;
use super::{DatabaseTransaction, Store, big, unsigned};
use crate::domain::metrics::MetricPoint;
use crate::domain::{HostId, Millis, SandboxId, SandboxStatus};

const TABLE: &str = "sandbox_metrics";
/// Rows of one insert.
const ROWS: usize = 500;

#[derive(FromQueryResult)]
struct Row {
    at: i64,
    cpu_pct: f64,
    mem_bytes: i64,
    disk_bytes: i64,
}

/// Removes the points of a sandbox that ended, in the transaction that says so.
pub(super) async fn forget(transaction: &DatabaseTransaction, id: SandboxId) -> Result<(), DbErr> {
    let statement = Statement::from_sql_and_values(
        transaction.get_database_backend(),
        "DELETE FROM sandbox_metrics WHERE sandbox_id = $1",
        [id.0.into()],
    );
    transaction.execute_raw(statement).await.map(drop)
}

impl Store {
    /// Adds a point of a width for each of these sandboxes that, as the records say, runs on this host: a host speaks for
    /// its own. A later point of the same step replaces an earlier one.
    pub(crate) async fn sandbox_metrics_add(
        &self,
        host: HostId,
        width: Millis,
        points: &BTreeMap<SandboxId, MetricPoint>,
    ) -> Result<(), DbErr> {
        if points.is_empty() {
            return Ok(());
        }
        // In one order, so that two leaders for a moment wait for each other, not both.
        let known: Vec<(Uuid, Uuid)> = sandbox::Entity::find()
            .select_only()
            .columns([sandbox::Column::Id, sandbox::Column::TeamId])
            .filter(sandbox::Column::HostId.eq(host.0))
            .filter(sandbox::Column::Status.is_in([
                SandboxStatus::Running.as_str(),
                SandboxStatus::Pausing.as_str(),
                SandboxStatus::Snapshotting.as_str(),
            ]))
            .order_by_asc(sandbox::Column::Id)
            .into_tuple()
            .all(&self.db)
            .await?;
        let rows: Vec<_> = known
            .into_iter()
            .filter_map(|(id, team)| Some((id, team, points.get(&SandboxId(id))?)))
            .collect();
        for page in rows.chunks(ROWS) {
            let mut insert = Query::insert();
            insert.into_table(TABLE).columns([
                "sandbox_id",
                "team_id",
                "width_ms",
                "at",
                "cpu_pct",
                "mem_bytes",
                "disk_bytes",
            ]);
            for (id, team, point) in page {
                insert
                    .values([
                        (*id).into(),
                        (*team).into(),
                        width.into(),
                        point.at.into(),
                        point.cpu_pct.into(),
                        big(point.mem_bytes).into(),
                        big(point.disk_bytes).into(),
                    ])
                    .map_err(|error| DbErr::Custom(error.to_string()))?;
            }
            insert.on_conflict(
                OnConflict::columns(["sandbox_id", "width_ms", "at"])
                    .update_columns(["cpu_pct", "mem_bytes", "disk_bytes"])
                    .to_owned(),
            );
            self.db.execute(&insert).await?;
        }
        Ok(())
    }

    /// A sandbox's points of a width that begin at a moment or later, oldest first.
    pub(crate) async fn sandbox_metrics(
        &self,
        id: SandboxId,
        width: Millis,
        since: Millis,
    ) -> Result<Vec<MetricPoint>, DbErr> {
        let rows = Row::find_by_statement(self.raw(
            "SELECT at, cpu_pct, mem_bytes, disk_bytes FROM sandbox_metrics \
             WHERE sandbox_id = $1 AND width_ms = CAST($2 AS INTEGER) AND at >= $3 ORDER BY at",
            vec![id.0.into(), width.into(), since.into()],
        ))
        .all(&self.db)
        .await?;
        let point = |row: Row| {
            MetricPoint::new(
                row.at,
                row.cpu_pct,
                unsigned(row.mem_bytes),
                unsigned(row.disk_bytes),
            )
        };
        Ok(rows.into_iter().map(point).collect())
    }

    /// When the newest point of a width begins.
    pub(crate) async fn sandbox_metrics_newest(&self, width: Millis) -> Result<Option<Millis>, DbErr> {
        #[derive(FromQueryResult)]
        struct Newest {
            at: i64,
        }
        let newest = Newest::find_by_statement(self.raw(
            "SELECT at FROM sandbox_metrics WHERE width_ms = CAST($1 AS INTEGER) ORDER BY at DESC LIMIT 1",
            vec![width.into()],
        ))
        .one(&self.db)
        .await?;
        Ok(newest.map(|row| row.at))
    }

    /// Puts the narrow points of a time together to wide ones. Repeating it gives the same.
    pub(crate) async fn sandbox_metrics_roll_up(
        &self,
        (narrow, wide): (Millis, Millis),
        from: Millis,
        until: Millis,
    ) -> Result<(), DbErr> {
        self.db
            .execute_raw(self.raw(
                "INSERT INTO sandbox_metrics \
                 (sandbox_id, team_id, width_ms, at, cpu_pct, mem_bytes, disk_bytes) \
                 SELECT sandbox_id, team_id, CAST($1 AS INTEGER), at - at % CAST($2 AS BIGINT), AVG(cpu_pct), \
                 MAX(mem_bytes), MAX(disk_bytes) FROM sandbox_metrics \
                 WHERE width_ms = CAST($3 AS INTEGER) AND at >= $4 AND at < $5 \
                 GROUP BY 1, 2, 4 ORDER BY 1, 4 \
                 ON CONFLICT (sandbox_id, width_ms, at) DO UPDATE SET cpu_pct = excluded.cpu_pct, \
                 mem_bytes = excluded.mem_bytes, disk_bytes = excluded.disk_bytes",
                vec![
                    wide.into(),
                    wide.into(),
                    narrow.into(),
                    from.into(),
                    until.into(),
                ],
            ))
            .await
            .map(drop)
    }

    /// Forgets points of a width that are older.
    pub(crate) async fn sandbox_metrics_prune(&self, width: Millis, before: Millis) -> Result<u64, DbErr> {
        let result = self
            .db
            .execute_raw(self.raw(
                "DELETE FROM sandbox_metrics WHERE width_ms = CAST($1 AS INTEGER) AND at < $2",
                vec![width.into(), before.into()],
            ))
            .await?;
        Ok(result.rows_affected())
    }
}
