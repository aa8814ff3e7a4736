//! What teams use: sampled for charts, and counted exactly for the daily usage.
//!
//! A sandbox's running time is an interval that opens and closes in the transaction of the status change
//! itself, so no crash can lose or double it. A pass adds the intervals' new parts to the days and moves
//! their mark, also in one transaction: repeated, it adds nothing twice, and several control planes may
//! run it at once, since a row's lock puts them in order.

use sea_orm::{ConnectionTrait, DbErr, FromQueryResult, Statement, TransactionTrait, Value};

use super::{DatabaseTransaction, Store};
use crate::domain::{Millis, SandboxId, SandboxStatus, TeamId};

/// Milliseconds of a day.
pub(crate) const DAY: Millis = 86_400_000;

/// What running sandboxes hold.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromQueryResult)]
pub struct Held {
    /// Sandboxes that run.
    pub running_count: i64,
    /// Their virtual CPUs.
    pub vcpus: i64,
    /// Their memory, MiB.
    pub memory_mb: i64,
}

/// The largest values within a step of a chart.
#[derive(Debug, Clone, Copy, FromQueryResult)]
pub(crate) struct HeldStep {
    /// Number of the step since the first.
    pub(crate) step: i64,
    pub(crate) running_count: i64,
    pub(crate) vcpus: i64,
    pub(crate) memory_mb: i64,
}

/// A day's use.
#[derive(Debug, Clone, Copy, FromQueryResult)]
pub(crate) struct UsageDay {
    /// Days since the epoch.
    pub(crate) day: i64,
    pub(crate) cpu_ms: i64,
    pub(crate) ram_mb_ms: i64,
}

/// A team's use on a day.
#[derive(Debug, Clone, Copy, FromQueryResult)]
pub(crate) struct TeamDay {
    pub(crate) team_id: uuid::Uuid,
    pub(crate) cpu_ms: i64,
    pub(crate) ram_mb_ms: i64,
}

/// Statuses in which a sandbox holds CPUs and memory. (`snapshotting` from a pause holds neither, but lasts
/// seconds and does not open an interval.)
const HOLDING: &str = "('running', 'pausing', 'snapshotting')";

/// What a change of status means for the running time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum UsageStep {
    Opens,
    Closes,
    Nothing,
}

/// Decides what a change of status means for the running time.
pub(super) fn usage_step(from: SandboxStatus, to: SandboxStatus) -> UsageStep {
    use SandboxStatus as S;
    let may_be_open = matches!(from, S::Running | S::Pausing | S::Snapshotting);
    match to {
        S::Running => UsageStep::Opens,
        S::Pausing | S::Snapshotting => UsageStep::Nothing,
        S::Pending
        | S::Starting
        | S::Paused
        | S::Resuming
        | S::Hibernated
        | S::Stopping
        | S::Stopped
        | S::Missing
        | S::Error => {
            if may_be_open {
                UsageStep::Closes
            } else {
                UsageStep::Nothing
            }
        }
    }
}

/// Opens or closes a sandbox's interval within the transaction that changed its status; the changed row's
/// lock keeps others away.
pub(super) async fn apply(
    transaction: &DatabaseTransaction,
    id: SandboxId,
    step: UsageStep,
    now: Millis,
) -> Result<(), DbErr> {
    let (sql, values): (_, Vec<Value>) = match step {
        UsageStep::Nothing => return Ok(()),
        UsageStep::Opens => (
            "INSERT INTO usage_intervals \
             (id, sandbox_id, team_id, vcpus, memory_mb, started_at, accrued_until, accruing_to) \
             SELECT $1, id, team_id, vcpus, memory_mb, CAST($2 AS BIGINT), CAST($2 AS BIGINT), \
             CAST($2 AS BIGINT) FROM sandboxes WHERE id = $3 AND NOT EXISTS \
             (SELECT 1 FROM usage_intervals WHERE sandbox_id = $3 AND ended_at IS NULL)",
            vec![uuid::Uuid::now_v7().into(), now.into(), id.0.into()],
        ),
        // Clocks of two control planes may differ: what has been counted stays counted.
        UsageStep::Closes => (
            "UPDATE usage_intervals SET ended_at = \
             CASE WHEN accrued_until > $1 THEN accrued_until ELSE $1 END \
             WHERE sandbox_id = $2 AND ended_at IS NULL",
            vec![now.into(), id.0.into()],
        ),
    };
    transaction
        .execute_raw(Statement::from_sql_and_values(
            transaction.get_database_backend(),
            sql,
            values,
        ))
        .await
        .map(drop)
}

impl Store {
    pub(super) fn raw(&self, sql: &str, values: Vec<Value>) -> Statement {
        Statement::from_sql_and_values(self.db.get_database_backend(), sql, values)
    }

    /// Samples all teams at once into one width's row. A later sample within the width raises the values.
    /// Teams come in order, so that two control planes that sample at once wait for each other, not both.
    pub(crate) async fn metrics_sample(&self, at: Millis, width: Millis) -> Result<u64, DbErr> {
        let sql = format!(
            "INSERT INTO metric_snapshots (team_id, width_ms, at, running_count, vcpus, memory_mb) \
             SELECT team_id, CAST($1 AS INTEGER), CAST($2 AS BIGINT), COUNT(*), \
             CAST(SUM(vcpus) AS BIGINT), CAST(SUM(memory_mb) AS BIGINT) \
             FROM sandboxes WHERE status IN {HOLDING} GROUP BY team_id ORDER BY team_id \
             ON CONFLICT (team_id, width_ms, at) DO UPDATE SET \
             running_count = CASE WHEN excluded.running_count > metric_snapshots.running_count \
             THEN excluded.running_count ELSE metric_snapshots.running_count END, \
             vcpus = CASE WHEN excluded.vcpus > metric_snapshots.vcpus \
             THEN excluded.vcpus ELSE metric_snapshots.vcpus END, \
             memory_mb = CASE WHEN excluded.memory_mb > metric_snapshots.memory_mb \
             THEN excluded.memory_mb ELSE metric_snapshots.memory_mb END"
        );
        let at = at - at.rem_euclid(width);
        let result = self
            .db
            .execute_raw(self.raw(&sql, vec![width.into(), at.into()]))
            .await?;
        Ok(result.rows_affected())
    }

    /// Forgets samples of a width that are older.
    pub(crate) async fn metrics_prune(&self, width: Millis, before: Millis) -> Result<u64, DbErr> {
        let result = self
            .db
            .execute_raw(self.raw(
                "DELETE FROM metric_snapshots WHERE width_ms = CAST($1 AS INTEGER) AND at < $2",
                vec![width.into(), before.into()],
            ))
            .await?;
        Ok(result.rows_affected())
    }

    /// What a team holds at the moment.
    pub(crate) async fn held_now(&self, team: TeamId) -> Result<Held, DbErr> {
        let sql = format!(
            "SELECT COUNT(*) AS running_count, CAST(COALESCE(SUM(vcpus), 0) AS BIGINT) AS vcpus, \
             CAST(COALESCE(SUM(memory_mb), 0) AS BIGINT) AS memory_mb \
             FROM sandboxes WHERE team_id = $1 AND status IN {HOLDING}"
        );
        let held = Held::find_by_statement(self.raw(&sql, vec![team.0.into()]))
            .one(&self.db)
            .await?;
        Ok(held.unwrap_or_default())
    }

    /// A team's samples of a width as steps of a chart; steps without samples are left out.
    pub(crate) async fn held_steps(
        &self,
        team: TeamId,
        width: Millis,
        from: Millis,
        step: Millis,
    ) -> Result<Vec<HeldStep>, DbErr> {
        HeldStep::find_by_statement(self.raw(
            "SELECT (at - CAST($3 AS BIGINT)) / CAST($4 AS BIGINT) AS step, \
             MAX(running_count) AS running_count, MAX(vcpus) AS vcpus, MAX(memory_mb) AS memory_mb \
             FROM metric_snapshots WHERE team_id = $1 AND width_ms = CAST($2 AS INTEGER) AND at >= $3 \
             GROUP BY 1 ORDER BY 1",
            vec![team.0.into(), width.into(), from.into(), step.into()],
        ))
        .all(&self.db)
        .await
    }

    /// Adds to the days what intervals have grown since the last pass, up to a time.
    pub(crate) async fn usage_accrue(&self, until: Millis) -> Result<u64, DbErr> {
        let transaction = self.db.begin().await?;
        let run = async |sql: &str, values: Vec<Value>| {
            transaction
                .execute_raw(Statement::from_sql_and_values(
                    transaction.get_database_backend(),
                    sql,
                    values,
                ))
                .await
        };
        // One pass at a time, on whatever control plane: this row's lock is the queue.
        run(
            "INSERT INTO settings (name, value, updated_at) VALUES ('usage_accrual', NULL, $1) \
             ON CONFLICT (name) DO UPDATE SET updated_at = excluded.updated_at",
            vec![until.into()],
        )
        .await?;
        // Locks what will be counted: nothing closes while it is being counted.
        let grown = run(
            "UPDATE usage_intervals SET accruing_to = \
             CASE WHEN ended_at IS NOT NULL AND ended_at < $1 THEN ended_at ELSE $1 END \
             WHERE accrued_until < $1",
            vec![until.into()],
        )
        .await?
        .rows_affected();
        #[derive(FromQueryResult)]
        struct Oldest {
            oldest: Option<i64>,
        }
        let oldest = Oldest::find_by_statement(self.raw(
            "SELECT MIN(accrued_until) AS oldest FROM usage_intervals WHERE accrued_until < accruing_to",
            Vec::new(),
        ))
        .one(&transaction)
        .await?
        .and_then(|row| row.oldest);
        if let Some(oldest) = oldest {
            for day in oldest.div_euclid(DAY)..=until.div_euclid(DAY) {
                run(
                    "INSERT INTO usage_days (team_id, day, cpu_ms, ram_mb_ms) \
                     SELECT team_id, CAST($1 AS BIGINT), CAST(SUM(vcpus * part) AS BIGINT), \
                     CAST(SUM(memory_mb * part) AS BIGINT) FROM ( \
                       SELECT team_id, vcpus, memory_mb, \
                       CASE WHEN accruing_to < $3 THEN accruing_to ELSE CAST($3 AS BIGINT) END - \
                       CASE WHEN accrued_until > $2 THEN accrued_until ELSE CAST($2 AS BIGINT) END AS part \
                       FROM usage_intervals \
                       WHERE accrued_until < accruing_to AND accrued_until < $3 AND accruing_to > $2 \
                     ) AS parts GROUP BY team_id \
                     ON CONFLICT (team_id, day) DO UPDATE SET cpu_ms = usage_days.cpu_ms + excluded.cpu_ms, \
                     ram_mb_ms = usage_days.ram_mb_ms + excluded.ram_mb_ms",
                    vec![day.into(), (day * DAY).into(), ((day + 1) * DAY).into()],
                )
                .await?;
            }
        }
        run(
            "UPDATE usage_intervals SET accrued_until = accruing_to WHERE accrued_until < accruing_to",
            Vec::new(),
        )
        .await?;
        run(
            "DELETE FROM usage_intervals WHERE ended_at IS NOT NULL AND ended_at <= accrued_until",
            Vec::new(),
        )
        .await?;
        transaction.commit().await?;
        Ok(grown)
    }

    /// A team's days, oldest first; days without use are left out.
    pub(crate) async fn usage_days(&self, team: TeamId, from: i64, to: i64) -> Result<Vec<UsageDay>, DbErr> {
        UsageDay::find_by_statement(self.raw(
            "SELECT day, cpu_ms, ram_mb_ms FROM usage_days \
             WHERE team_id = $1 AND day >= $2 AND day <= $3 ORDER BY day",
            vec![team.0.into(), from.into(), to.into()],
        ))
        .all(&self.db)
        .await
    }

    /// The teams that used something on a day, by id; also those that were deleted since.
    pub(crate) async fn usage_of_day(
        &self,
        day: i64,
        after: Option<TeamId>,
        limit: u64,
    ) -> Result<Vec<TeamDay>, DbErr> {
        TeamDay::find_by_statement(self.raw(
            "SELECT team_id, cpu_ms, ram_mb_ms FROM usage_days \
             WHERE day = $1 AND team_id > $2 ORDER BY team_id LIMIT $3",
            vec![
                day.into(),
                after.map_or(uuid::Uuid::nil(), |team| team.0).into(),
                super::big(limit).into(),
            ],
        ))
        .all(&self.db)
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interval_opens_when_it_runs_and_closes_when_it_no_longer_holds_anything() {
        use SandboxStatus as S;
        assert_eq!(usage_step(S::Starting, S::Running), UsageStep::Opens);
        assert_eq!(usage_step(S::Running, S::Pausing), UsageStep::Nothing);
        assert_eq!(usage_step(S::Pausing, S::Paused), UsageStep::Closes);
        assert_eq!(usage_step(S::Running, S::Stopping), UsageStep::Closes);
        assert_eq!(usage_step(S::Running, S::Missing), UsageStep::Closes);
        for from in S::ALL {
            for to in S::ALL {
                // Whatever may have an interval and ends up without CPUs closes it.
                let holds = |status| matches!(status, S::Running | S::Pausing | S::Snapshotting);
                let closes = usage_step(from, to) == UsageStep::Closes;
                assert_eq!(closes, holds(from) && !holds(to), "{from} to {to}");
            }
        }
    }
}
