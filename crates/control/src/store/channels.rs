//! Notification channels and their deliveries.

use std::collections::BTreeSet;

use sea_orm::ActiveValue::Set;
use sea_orm::sea_query::{Expr, OnConflict, Query};
use sea_orm::{
    ActiveModelTrait, ColumnTrait, ConnectionTrait as _, DbErr, EntityTrait, PaginatorTrait, QueryFilter,
    QueryOrder, QuerySelect, Statement,
};
use uuid::Uuid;

use super::entity::{Hidden, channel, channel_delivery as delivery};
use super::{Outcome, Store, corrupt};
use crate::domain::around::{Channel, ChannelEventKind, ChannelProvider};
use crate::domain::{ChannelId, Millis, TeamId, UserId};

/// A message on its way to a channel.
#[derive(Debug, Clone)]
pub(crate) struct Delivery {
    pub(crate) id: Uuid,
    pub(crate) channel: ChannelId,
    pub(crate) event_id: Uuid,
    /// The event as JSON.
    pub(crate) event: String,
    /// Attempts so far; with the one under way, once claimed.
    pub(crate) attempts: i32,
    next_at: Millis,
}

/// How an attempt ended.
#[derive(Debug, Clone)]
pub(crate) enum DeliveryEnd {
    /// It arrived.
    Delivered,
    /// Try again at this time.
    Again(Millis, String),
    /// It is given up.
    GivenUp(String),
}

const PENDING: &str = "pending";
const DELIVERED: &str = "delivered";
const GIVEN_UP: &str = "given_up";

impl Store {
    /// Adds a channel. A duplicate name fails as such.
    pub(crate) async fn channel_insert(&self, channel: &Channel) -> Result<(), DbErr> {
        row(channel)?.insert(&self.db).await.map(drop)
    }

    /// How many channels a team has.
    pub(crate) async fn channel_count(&self, team: TeamId) -> Result<u64, DbErr> {
        channel::Entity::find()
            .filter(channel::Column::TeamId.eq(team.0))
            .count(&self.db)
            .await
    }

    /// A channel of a team.
    pub(crate) async fn channel_of_team(
        &self,
        team: TeamId,
        id: ChannelId,
    ) -> Result<Option<Channel>, DbErr> {
        channel::Entity::find_by_id(id.0)
            .filter(channel::Column::TeamId.eq(team.0))
            .one(&self.db)
            .await?
            .map(domain)
            .transpose()
    }

    /// A team's channels by name; at most `limit`, after the given name.
    /// A row that this version does not understand is left out, with a word in the log: it must take neither the others
    /// out of a listing nor their events from them.
    pub(crate) async fn channels_of_team(
        &self,
        team: TeamId,
        after: Option<&str>,
        limit: u64,
    ) -> Result<Vec<Channel>, DbErr> {
        let mut found = Vec::new();
        let mut after = after.map(str::to_owned);
        // Whoever pages takes a page that is not full for the last one: what was left out is made up for.
        loop {
            let left = limit.saturating_sub(found.len() as u64);
            let mut query = channel::Entity::find().filter(channel::Column::TeamId.eq(team.0));
            if let Some(after) = &after {
                query = query.filter(channel::Column::Name.gt(after));
            }
            let rows = query
                .order_by_asc(channel::Column::Name)
                .limit(left)
                .all(&self.db)
                .await?;
            let whole = (rows.len() as u64) < left;
            after = rows.last().map(|row| row.name.clone());
            found.extend(rows.into_iter().filter_map(|row| {
                let id = ChannelId(row.id);
                domain(row)
                    .inspect_err(|error| {
                        metrics::counter!("wrenn_channels_unreadable_total").increment(1);
                        tracing::error!(channel = %id, %error, "a channel cannot be read");
                    })
                    .ok()
            }));
            if whole || found.len() as u64 >= limit {
                return Ok(found);
            }
        }
    }

    /// Changes name and events, if the channel is still as it was read.
    pub(crate) async fn channel_update(
        &self,
        read: &Channel,
        name: &str,
        events: &[ChannelEventKind],
        now: Millis,
    ) -> Result<Outcome, DbErr> {
        let result = channel::Entity::update_many()
            .col_expr(channel::Column::Name, name.into())
            .col_expr(channel::Column::Events, event_words(events)?.into())
            .col_expr(channel::Column::UpdatedAt, now.max(read.updated_at + 1).into())
            .filter(channel::Column::Id.eq(read.id.0))
            .filter(channel::Column::UpdatedAt.eq(read.updated_at))
            .exec(&self.db)
            .await?;
        self.changed(read.id, result.rows_affected).await
    }

    /// Replaces the configuration.
    pub(crate) async fn channel_reconfigure(
        &self,
        read: &Channel,
        sealed: &str,
        now: Millis,
    ) -> Result<Outcome, DbErr> {
        let result = channel::Entity::update_many()
            .col_expr(channel::Column::Config, sealed.into())
            .col_expr(channel::Column::UpdatedAt, now.max(read.updated_at + 1).into())
            .col_expr(channel::Column::LastError, Expr::value(None::<String>))
            .filter(channel::Column::Id.eq(read.id.0))
            .filter(channel::Column::UpdatedAt.eq(read.updated_at))
            .exec(&self.db)
            .await?;
        self.changed(read.id, result.rows_affected).await
    }

    async fn changed(&self, id: ChannelId, rows: u64) -> Result<Outcome, DbErr> {
        if rows == 1 {
            return Ok(Outcome::Updated);
        }
        let exists = channel::Entity::find_by_id(id.0).count(&self.db).await? > 0;
        Ok(if exists { Outcome::Stale } else { Outcome::Missing })
    }

    /// Removes a channel and what was on its way to it.
    pub(crate) async fn channel_delete(&self, team: TeamId, id: ChannelId) -> Result<Outcome, DbErr> {
        let result = channel::Entity::delete_many()
            .filter(channel::Column::Id.eq(id.0))
            .filter(channel::Column::TeamId.eq(team.0))
            .exec(&self.db)
            .await?;
        Ok(if result.rows_affected == 1 {
            Outcome::Updated
        } else {
            Outcome::Missing
        })
    }

    /// Puts an event on its way to channels; those that have it already are left alone.
    pub(crate) async fn deliveries_insert(
        &self,
        channels: &[ChannelId],
        event_id: Uuid,
        event: &str,
        now: Millis,
    ) -> Result<(), DbErr> {
        if channels.is_empty() {
            return Ok(());
        }
        let rows = channels.iter().map(|channel| delivery::ActiveModel {
            id: Set(Uuid::now_v7()),
            channel_id: Set(channel.0),
            event_id: Set(event_id),
            event: Set(event.to_owned()),
            status: Set(PENDING.to_owned()),
            attempts: Set(0),
            next_at: Set(now),
            last_error: Set(None),
            created_at: Set(now),
        });
        delivery::Entity::insert_many(rows)
            .on_conflict(
                OnConflict::columns([delivery::Column::ChannelId, delivery::Column::EventId])
                    .do_nothing()
                    .to_owned(),
            )
            .exec_without_returning(&self.db)
            .await
            .map(drop)
    }

    /// Messages that are due, with their channels, oldest first; none of these channels and teams, which have enough
    /// under way.
    pub(crate) async fn deliveries_due(
        &self,
        now: Millis,
        busy: &BTreeSet<ChannelId>,
        busy_teams: &BTreeSet<TeamId>,
        limit: u64,
    ) -> Result<Vec<(Delivery, Channel)>, DbErr> {
        let mut query = delivery::Entity::find()
            .filter(delivery::Column::Status.eq(PENDING))
            .filter(delivery::Column::NextAt.lte(now));
        if !busy.is_empty() {
            query = query.filter(delivery::Column::ChannelId.is_not_in(busy.iter().map(|id| id.0)));
        }
        if !busy_teams.is_empty() {
            let theirs = Query::select()
                .column(channel::Column::Id)
                .from(channel::Entity)
                .and_where(channel::Column::TeamId.is_in(busy_teams.iter().map(|id| id.0)))
                .to_owned();
            query = query.filter(delivery::Column::ChannelId.not_in_subquery(theirs));
        }
        let rows = query
            .order_by_asc(delivery::Column::NextAt)
            .limit(limit)
            .all(&self.db)
            .await?;
        let ids: BTreeSet<Uuid> = rows.iter().map(|row| row.channel_id).collect();
        let channels: std::collections::HashMap<Uuid, Channel> = if ids.is_empty() {
            std::collections::HashMap::new()
        } else {
            channel::Entity::find()
                .filter(channel::Column::Id.is_in(ids))
                .all(&self.db)
                .await?
                .into_iter()
                .map(|row| Ok((row.id, domain(row)?)))
                .collect::<Result<_, DbErr>>()?
        };
        // A channel that was deleted between the two reads took its messages with it.
        Ok(rows
            .into_iter()
            .filter_map(|row| {
                let channel = channels.get(&row.channel_id)?.clone();
                let delivery = Delivery {
                    id: row.id,
                    channel: ChannelId(row.channel_id),
                    event_id: row.event_id,
                    event: row.event,
                    attempts: row.attempts,
                    next_at: row.next_at,
                };
                Some((delivery, channel))
            })
            .collect())
    }

    /// Claims a message for an attempt: until the lease ends, nobody else tries. Of several that try to
    /// claim it, one succeeds.
    pub(crate) async fn delivery_claim(
        &self,
        due: &Delivery,
        lease_ends_at: Millis,
    ) -> Result<Option<Delivery>, DbErr> {
        let attempts = due.attempts.saturating_add(1);
        let result = delivery::Entity::update_many()
            .col_expr(delivery::Column::Attempts, attempts.into())
            .col_expr(delivery::Column::NextAt, lease_ends_at.into())
            .filter(delivery::Column::Id.eq(due.id))
            .filter(delivery::Column::Status.eq(PENDING))
            .filter(delivery::Column::Attempts.eq(due.attempts))
            .filter(delivery::Column::NextAt.eq(due.next_at))
            .exec(&self.db)
            .await?;
        Ok((result.rows_affected == 1).then(|| Delivery {
            attempts,
            next_at: lease_ends_at,
            ..due.clone()
        }))
    }

    /// Writes an attempt's end, if the claim is still ours.
    pub(crate) async fn delivery_end(
        &self,
        claimed: &Delivery,
        end: DeliveryEnd,
        now: Millis,
    ) -> Result<Outcome, DbErr> {
        let (status, next_at, error) = match end {
            DeliveryEnd::Delivered => (DELIVERED, now, None),
            DeliveryEnd::Again(at, error) => (PENDING, at, Some(error)),
            DeliveryEnd::GivenUp(error) => (GIVEN_UP, now, Some(error)),
        };
        let result = delivery::Entity::update_many()
            .col_expr(delivery::Column::Status, status.into())
            .col_expr(delivery::Column::NextAt, next_at.into())
            .col_expr(delivery::Column::LastError, Expr::value(error.clone()))
            .filter(delivery::Column::Id.eq(claimed.id))
            .filter(delivery::Column::Status.eq(PENDING))
            .filter(delivery::Column::Attempts.eq(claimed.attempts))
            .exec(&self.db)
            .await?;
        if result.rows_affected != 1 {
            return Ok(Outcome::Stale);
        }
        let mut update = channel::Entity::update_many();
        update = match error {
            None => update.col_expr(channel::Column::DeliveredAt, now.into()),
            Some(error) => update
                .col_expr(channel::Column::FailedAt, now.into())
                .col_expr(channel::Column::LastError, error.into()),
        };
        update
            .filter(channel::Column::Id.eq(claimed.channel.0))
            .exec(&self.db)
            .await?;
        Ok(Outcome::Updated)
    }

    /// Gives up what waits for a channel beyond the newest `keep` messages; returns how many that were.
    pub(crate) async fn deliveries_cap(&self, keep: u32) -> Result<u64, DbErr> {
        let result = self
            .db
            .execute_raw(Statement::from_sql_and_values(
                self.db.get_database_backend(),
                "UPDATE channel_deliveries SET status = $1, last_error = $2 WHERE status = $3 AND id IN \
                 (SELECT id FROM (SELECT id, ROW_NUMBER() OVER (PARTITION BY channel_id ORDER BY created_at DESC, \
                 id DESC) AS place FROM channel_deliveries WHERE status = $3) AS waiting \
                 WHERE place > CAST($4 AS BIGINT))",
                [
                    GIVEN_UP.into(),
                    "too many messages were waiting".into(),
                    PENDING.into(),
                    i64::from(keep).into(),
                ],
            ))
            .await?;
        Ok(result.rows_affected())
    }

    /// Forgets messages that ended before a time.
    pub(crate) async fn deliveries_prune(&self, before: Millis) -> Result<u64, DbErr> {
        let result = delivery::Entity::delete_many()
            .filter(delivery::Column::Status.is_in([DELIVERED, GIVEN_UP]))
            .filter(delivery::Column::NextAt.lt(before))
            .exec(&self.db)
            .await?;
        Ok(result.rows_affected)
    }
}

fn event_words(events: &[ChannelEventKind]) -> Result<String, DbErr> {
    serde_json::to_string(events).map_err(|error| DbErr::Json(error.to_string()))
}

fn row(channel: &Channel) -> Result<channel::ActiveModel, DbErr> {
    let Channel {
        id,
        team,
        name,
        provider,
        sealed,
        events,
        created_by,
        created_at,
        updated_at,
        delivered_at,
        failed_at,
        last_error,
    } = channel.clone();
    Ok(channel::ActiveModel {
        id: Set(id.0),
        team_id: Set(team.0),
        name: Set(name),
        provider: Set(provider.as_str().to_owned()),
        config: Set(Hidden(sealed)),
        events: Set(event_words(&events)?),
        created_by: Set(created_by.map(|user| user.0)),
        created_at: Set(created_at),
        updated_at: Set(updated_at),
        delivered_at: Set(delivered_at),
        failed_at: Set(failed_at),
        last_error: Set(last_error),
    })
}

fn domain(row: channel::Model) -> Result<Channel, DbErr> {
    let channel::Model {
        id,
        team_id,
        name,
        provider,
        config,
        events,
        created_by,
        created_at,
        updated_at,
        delivered_at,
        failed_at,
        last_error,
    } = row;
    Ok(Channel {
        id: ChannelId(id),
        team: TeamId(team_id),
        name,
        provider: ChannelProvider::parse(&provider).ok_or_else(|| corrupt("channels", "provider"))?,
        sealed: config.0,
        // One that only a newer version knows is left out.
        events: serde_json::from_str::<Vec<String>>(&events)
            .map_err(|_| corrupt("channels", "events"))?
            .iter()
            .filter_map(|word| ChannelEventKind::parse(word))
            .collect(),
        created_by: created_by.map(UserId),
        created_at,
        updated_at,
        delivered_at,
        failed_at,
        last_error,
    })
}
