//! The outbox: events wait here until they are told, and a while longer for streams that come back.

use std::collections::BTreeSet;

use sea_orm::sea_query::{Expr, ExprTrait as _};
use sea_orm::{
    ColumnTrait, Condition, ConnectionTrait, DbErr, EntityTrait, QueryFilter, QueryOrder, QuerySelect,
    Statement, TransactionTrait,
};

use super::entity::{event, event_cursor};
use super::{Store, big, corrupt};
use crate::domain::event::{EventKind, EventOutcome, NewEvent, StateEvent};
use crate::domain::{Millis, TeamId, now};

/// Writes an event in the transaction of the change that it tells of.
pub(super) async fn record(db: &impl ConnectionTrait, new: NewEvent) -> Result<(), DbErr> {
    use sea_orm::ActiveValue::Set;
    let NewEvent {
        team,
        kind,
        outcome,
        resource,
        payload,
    } = new;
    let payload = serde_json::to_string(&payload).map_err(|error| DbErr::Json(error.to_string()))?;
    event::Entity::insert(event::ActiveModel {
        team_id: Set(team.0),
        kind: Set(kind.as_str().to_owned()),
        outcome: Set(outcome.map(|outcome| outcome.as_str().to_owned())),
        resource_type: Set(kind.resource_type().to_owned()),
        resource_id: Set(resource),
        payload: Set(payload),
        created_at: Set(now()),
        ..Default::default()
    })
    .exec_without_returning(db)
    .await
    .map(drop)
}

/// Kinds that this version knows. Those of a newer one wait for a leader that does, and hold up nothing.
fn known() -> Condition {
    Condition::all().add(event::Column::Kind.is_in(EventKind::ALL.map(EventKind::as_str)))
}

impl Store {
    /// Gives events that have none yet their place in the order, at most `limit` of them; returns the teams that have
    /// something new, and whether there may be more.
    pub(crate) async fn events_number(&self, limit: u64) -> Result<(BTreeSet<TeamId>, bool), DbErr> {
        let waiting: Option<i64> = event::Entity::find()
            .select_only()
            .column(event::Column::Id)
            .filter(event::Column::Seq.is_null())
            .order_by_asc(event::Column::Id)
            .into_tuple()
            .one(&self.db)
            .await?;
        if waiting.is_none() {
            return Ok((BTreeSet::new(), false));
        }
        let transaction = self.db.begin().await?;
        // Locks out whoever else does this, so that places are given in the order in which they become visible.
        event_cursor::Entity::update_many()
            .col_expr(
                event_cursor::Column::Value,
                Expr::col(event_cursor::Column::Value),
            )
            .exec(&transaction)
            .await?;
        let cursor = event_cursor::Entity::find_by_id(1)
            .one(&transaction)
            .await?
            .ok_or_else(|| corrupt("event_cursor", "value"))?;
        // One statement for all of them. Only who holds the cursor gives places, so the rows stay these.
        let numbered = transaction
            .query_all_raw(Statement::from_sql_and_values(
                transaction.get_database_backend(),
                "UPDATE events SET seq = CAST($1 AS BIGINT) + waiting.place FROM \
                 (SELECT id AS event, ROW_NUMBER() OVER (ORDER BY id) AS place FROM \
                 (SELECT id FROM events WHERE seq IS NULL ORDER BY id LIMIT $2) AS first) AS waiting \
                 WHERE events.id = waiting.event RETURNING team_id",
                [cursor.value.into(), big(limit).into()],
            ))
            .await?;
        let count = numbered.len() as u64;
        let teams = numbered
            .iter()
            .map(|row| row.try_get_by_index::<uuid::Uuid>(0).map(TeamId))
            .collect::<Result<BTreeSet<_>, _>>()?;
        let seq = cursor.value.saturating_add(big(count));
        event_cursor::Entity::update_many()
            .col_expr(event_cursor::Column::Value, seq.into())
            .exec(&transaction)
            .await?;
        transaction.commit().await?;
        Ok((teams, count == limit))
    }

    /// Events in order that are still to be told: never published, or so long ago that whoever had them is gone.
    pub(crate) async fn events_untold(
        &self,
        published_before: Millis,
        limit: u64,
    ) -> Result<Vec<StateEvent>, DbErr> {
        event::Entity::find()
            .filter(event::Column::Seq.is_not_null())
            .filter(event::Column::ConsumedAt.is_null())
            .filter(known())
            .filter(
                Condition::any()
                    .add(event::Column::PublishedAt.is_null())
                    .add(event::Column::PublishedAt.lt(published_before)),
            )
            .order_by_asc(event::Column::Seq)
            .limit(limit)
            .all(&self.db)
            .await?
            .into_iter()
            .map(domain)
            .collect()
    }

    /// Notes that events are on their way.
    pub(crate) async fn events_published(&self, seqs: &[i64]) -> Result<(), DbErr> {
        event::Entity::update_many()
            .col_expr(event::Column::PublishedAt, now().into())
            .col_expr(event::Column::Attempts, Expr::col(event::Column::Attempts).add(1))
            .filter(event::Column::Seq.is_in(seqs.iter().copied()))
            .exec(&self.db)
            .await
            .map(drop)
    }

    /// Notes that events were taken in by all who had to.
    pub(crate) async fn events_consumed(&self, seqs: &[i64]) -> Result<(), DbErr> {
        event::Entity::update_many()
            .col_expr(event::Column::ConsumedAt, now().into())
            .filter(event::Column::Seq.is_in(seqs.iter().copied()))
            .filter(event::Column::ConsumedAt.is_null())
            .exec(&self.db)
            .await
            .map(drop)
    }

    /// Of these, the ones that nobody has taken in yet.
    pub(crate) async fn events_unconsumed(&self, seqs: &[i64]) -> Result<BTreeSet<i64>, DbErr> {
        let rows: Vec<i64> = event::Entity::find()
            .select_only()
            .column(event::Column::Seq)
            .filter(event::Column::Seq.is_in(seqs.iter().copied()))
            .filter(event::Column::ConsumedAt.is_null())
            .into_tuple()
            .all(&self.db)
            .await?;
        Ok(rows.into_iter().collect())
    }

    /// Gives up on events that were told this often without anybody taking them in; returns how many.
    pub(crate) async fn events_give_up(&self, attempts: i32) -> Result<u64, DbErr> {
        let given_up = event::Entity::update_many()
            .col_expr(event::Column::ConsumedAt, now().into())
            .filter(event::Column::ConsumedAt.is_null())
            .filter(event::Column::Seq.is_not_null())
            .filter(event::Column::Attempts.gte(attempts))
            .exec(&self.db)
            .await?;
        Ok(given_up.rows_affected)
    }

    /// A team's events after a place in the order.
    pub(crate) async fn events_of_team(
        &self,
        team: TeamId,
        after: i64,
        limit: u64,
    ) -> Result<Vec<StateEvent>, DbErr> {
        event::Entity::find()
            .filter(event::Column::TeamId.eq(team.0))
            .filter(event::Column::Seq.gt(after))
            .filter(known())
            .order_by_asc(event::Column::Seq)
            .limit(limit)
            .all(&self.db)
            .await?
            .into_iter()
            .map(domain)
            .collect()
    }

    /// The last place given.
    pub(crate) async fn events_end(&self) -> Result<i64, DbErr> {
        let cursor = event_cursor::Entity::find_by_id(1).one(&self.db).await?;
        cursor
            .map(|cursor| cursor.value)
            .ok_or_else(|| corrupt("event_cursor", "value"))
    }

    /// Removes old events that were told; returns how many.
    pub(crate) async fn events_prune(&self, before: Millis) -> Result<u64, DbErr> {
        let pruned = event::Entity::delete_many()
            .filter(event::Column::CreatedAt.lt(before))
            .filter(event::Column::ConsumedAt.is_not_null())
            .exec(&self.db)
            .await?;
        Ok(pruned.rows_affected)
    }
}

fn domain(row: event::Model) -> Result<StateEvent, DbErr> {
    let event::Model {
        id: _,
        seq,
        team_id,
        kind,
        outcome,
        resource_type: _,
        resource_id,
        payload,
        created_at,
        published_at: _,
        consumed_at: _,
        attempts: _,
    } = row;
    Ok(StateEvent {
        seq: seq.ok_or_else(|| corrupt("events", "seq"))?,
        team: TeamId(team_id),
        kind: EventKind::parse(&kind).ok_or_else(|| corrupt("events", "kind"))?,
        outcome: outcome
            .map(|word| EventOutcome::parse(&word).ok_or_else(|| corrupt("events", "outcome")))
            .transpose()?,
        resource: resource_id,
        payload: serde_json::from_str(&payload).map_err(|_| corrupt("events", "payload"))?,
        at: created_at,
    })
}
