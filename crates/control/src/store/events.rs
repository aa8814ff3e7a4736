//! The outbox: events wait here until they are told, and a while longer for streams that come back.

use std::collections::BTreeSet;

use sea_orm::sea_query::{Expr, ExprTrait as _, Func, LockType, Query, SelectStatement};
use sea_orm::{
    ColumnTrait, Condition, ConnectionTrait, DbErr, EntityTrait, QueryFilter, QueryOrder, QuerySelect,
    Statement, TransactionTrait,
};

use super::entity::{api_key, event, event_cursor, team, user};
use super::{DatabaseTransaction, Store, big, corrupt};
use crate::domain::around::{ActorType, AuditActor};
use crate::domain::event::{EventActor, EventKind, EventOutcome, NewEvent, StateEvent};
use crate::domain::{Actor, Millis, TeamId, now};

/// Writes an event in the transaction of the change that it tells of.
pub(super) async fn record(db: &impl ConnectionTrait, new: NewEvent) -> Result<(), DbErr> {
    let (columns, values) = row(new)?;
    let mut insert = Query::insert();
    insert
        .into_table(event::Entity)
        .columns(columns)
        .values(values)
        .map_err(|error| DbErr::Custom(error.to_string()))?;
    db.execute(&insert).await.map(drop)
}

/// The same for a new sandbox, if its team lives and there is a place for it, which `place` selects; returns whether both
/// is true. The team lives until the transaction ends: as [`team_held`](super::teams::team_held), and after the
/// transaction's write like it, without a round trip of its own. The place is not held: a deletion of the host that does
/// not see the sandbox leaves it to the driver, which finds another, and the host's row stays as long as it is referred to.
pub(super) async fn record_placed(
    transaction: &DatabaseTransaction,
    new: NewEvent,
    place: SelectStatement,
) -> Result<bool, DbErr> {
    let id = new.team.0;
    let (columns, values) = row(new)?;
    let mut live = Query::select();
    live.exprs(values)
        .from(team::Entity)
        .and_where(team::Column::Id.eq(id))
        .and_where(team::Column::DeletedAt.is_null())
        .and_where(Expr::exists(place))
        .lock(LockType::Share);
    let mut insert = Query::insert();
    insert
        .into_table(event::Entity)
        .columns(columns)
        .select_from(live)
        .map_err(|error| DbErr::Custom(error.to_string()))?;
    Ok(transaction.execute(&insert).await?.rows_affected() == 1)
}

/// An event's columns and what goes into them.
fn row(new: NewEvent) -> Result<(Vec<event::Column>, Vec<Expr>), DbErr> {
    use event::Column;
    let NewEvent {
        team,
        kind,
        outcome,
        resource,
        payload,
        actor,
    } = new;
    let payload = serde_json::to_string(&payload).map_err(|error| DbErr::Json(error.to_string()))?;
    // The name is read by the same statement: a round trip of its own would be one more for every change.
    let name = actor.map_or_else(|| Expr::value(None::<String>), |actor| Expr::from(name_of(actor)));
    let AuditActor {
        kind: actor_type,
        id: actor_id,
    } = actor.into();
    let columns: [(Column, Expr); 10] = [
        (Column::TeamId, team.0.into()),
        (Column::Kind, kind.as_str().into()),
        (
            Column::Outcome,
            Expr::value(outcome.map(|outcome| outcome.as_str())),
        ),
        (Column::ResourceType, kind.resource_type().into()),
        (Column::ResourceId, resource.into()),
        (Column::Payload, payload.into()),
        (Column::CreatedAt, now().into()),
        (Column::ActorType, actor_type.as_str().into()),
        (Column::ActorId, Expr::value(actor_id)),
        (Column::ActorName, name),
    ];
    Ok(columns.into_iter().unzip())
}

/// What an actor is called at the moment; nothing when it is gone.
fn name_of(actor: Actor) -> SelectStatement {
    let mut name = Query::select();
    match actor {
        Actor::User(id) => name
            .expr(Func::coalesce([
                Func::cust("NULLIF")
                    .arg(Expr::col(user::Column::Name))
                    .arg("")
                    .into(),
                Expr::col(user::Column::Email),
            ]))
            .from(user::Entity)
            .and_where(user::Column::Id.eq(id.0)),
        Actor::Key(id) => name
            .column(api_key::Column::Name)
            .from(api_key::Entity)
            .and_where(api_key::Column::Id.eq(id.0)),
    };
    name
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
            // What a newer version wrote waits for one that knows what it means.
            .filter(event::Column::Kind.is_in(EventKind::words()))
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
            .filter(event::Column::Kind.is_in(EventKind::words()))
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

    /// Removes old events that were told, or that nobody here knows how to tell; returns how many.
    pub(crate) async fn events_prune(&self, before: Millis) -> Result<u64, DbErr> {
        let old = || {
            Condition::all()
                .add(event::Column::CreatedAt.lt(before))
                .add(event::Column::Seq.is_not_null())
                .add(
                    Condition::any()
                        .add(event::Column::ConsumedAt.is_not_null())
                        .add(event::Column::Kind.is_not_in(EventKind::words())),
                )
        };
        let last: Option<(Option<i64>,)> = event::Entity::find()
            .select_only()
            .column_as(event::Column::Seq.max(), "last")
            .filter(old())
            .into_tuple()
            .one(&self.db)
            .await?;
        let Some((Some(last),)) = last else { return Ok(0) };
        // Noted before they go, so that no stream takes for whole what has a gap. Two leaders for a moment agree on the
        // later one.
        self.db
            .execute_raw(self.raw(
                "INSERT INTO settings (name, value, updated_at) VALUES ('events_pruned', $1, $2) \
                 ON CONFLICT (name) DO UPDATE SET value = excluded.value, updated_at = excluded.updated_at \
                 WHERE CAST(settings.value AS BIGINT) < CAST(excluded.value AS BIGINT)",
                vec![last.to_string().into(), now().into()],
            ))
            .await?;
        let pruned = event::Entity::delete_many()
            .filter(old())
            .filter(event::Column::Seq.lte(last))
            .exec(&self.db)
            .await?;
        Ok(pruned.rows_affected)
    }

    /// The last place of an event that was removed; zero when none was.
    pub(crate) async fn events_pruned(&self) -> Result<i64, DbErr> {
        let row = self
            .db
            .query_one_raw(self.raw(
                "SELECT CAST(value AS BIGINT) FROM settings WHERE name = 'events_pruned'",
                Vec::new(),
            ))
            .await?;
        row.map_or(Ok(0), |row| row.try_get_by_index(0))
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
        actor_type,
        actor_id,
        actor_name,
    } = row;
    Ok(StateEvent {
        seq: seq.ok_or_else(|| corrupt("events", "seq"))?,
        team: TeamId(team_id),
        kind: EventKind::parse(&kind).ok_or_else(|| corrupt("events", "kind"))?,
        outcome: outcome.and_then(|word| EventOutcome::parse(&word)),
        resource: resource_id,
        payload: serde_json::from_str(&payload).map_err(|_| corrupt("events", "payload"))?,
        // Words of a newer version are left out, here as in the payload.
        actor: actor_type
            .and_then(|word| ActorType::parse(&word))
            .map(|kind| EventActor {
                kind,
                id: actor_id,
                name: actor_name,
            }),
        at: created_at,
    })
}
