//! The audit log: written in batches, read in pages.

use sea_orm::ActiveValue::Set;
use sea_orm::sea_query::{ExprTrait as _, OnConflict};
use sea_orm::{ColumnTrait, Condition, DbErr, EntityTrait, QueryFilter, QueryOrder, QuerySelect};

use super::entity::audit_log::{ActiveModel, Column, Entity, Model};
use super::{Store, corrupt};
use crate::domain::around::{ActorType, AuditActor, AuditEntry, AuditOutcome};
use crate::domain::{AuditId, Millis, TeamId};

/// Which entries to read.
#[derive(Debug, Clone, Default)]
pub struct AuditFilter {
    /// Only this team's; `None` reads all, also those of no team.
    pub team: Option<TeamId>,
    /// Only what this kind of actor did.
    pub actor_type: Option<ActorType>,
    /// Only what this actor did, with its prefix.
    pub actor_id: Option<String>,
    /// Only this action.
    pub action: Option<String>,
    /// Only what was done to this kind of thing.
    pub resource_type: Option<String>,
    /// Only what was done to this thing.
    pub resource_id: Option<String>,
    /// Only what was answered with this HTTP status.
    pub status: Option<u16>,
    /// From this time on.
    pub since: Option<Millis>,
    /// Before this time.
    pub until: Option<Millis>,
    /// Older than this entry.
    pub(crate) before: Option<(Millis, AuditId)>,
    pub(crate) limit: u64,
}

impl Store {
    /// Adds entries, all or none; those that are there already are left alone.
    pub(crate) async fn audit_insert(&self, entries: &[AuditEntry]) -> Result<(), DbErr> {
        if entries.is_empty() {
            return Ok(());
        }
        Entity::insert_many(entries.iter().cloned().map(row))
            .on_conflict(OnConflict::column(Column::Id).do_nothing().to_owned())
            .exec_without_returning(&self.db)
            .await
            .map(drop)
    }

    /// Entries, newest first.
    pub(crate) async fn audit_page(&self, filter: AuditFilter) -> Result<Vec<AuditEntry>, DbErr> {
        let AuditFilter {
            team,
            actor_type,
            actor_id,
            action,
            resource_type,
            resource_id,
            status,
            since,
            until,
            before,
            limit,
        } = filter;
        let mut wanted = Condition::all()
            .add_option(team.map(|team| Column::TeamId.eq(team.0)))
            .add_option(actor_type.map(|kind| Column::ActorType.eq(kind.as_str())))
            .add_option(actor_id.map(|id| Column::ActorId.eq(id)))
            .add_option(action.map(|action| Column::Action.eq(action)))
            .add_option(resource_type.map(|kind| Column::ResourceType.eq(kind)))
            .add_option(resource_id.map(|id| Column::ResourceId.eq(id)))
            .add_option(status.map(|status| Column::Status.eq(i32::from(status))))
            .add_option(since.map(|since| Column::CreatedAt.gte(since)))
            .add_option(until.map(|until| Column::CreatedAt.lt(until)));
        if let Some((at, id)) = before {
            // The bound by itself lets a deep page start in the middle of the index.
            wanted = wanted.add(Column::CreatedAt.lte(at)).add(
                Condition::any()
                    .add(Column::CreatedAt.lt(at))
                    .add(Column::CreatedAt.eq(at).and(Column::Id.lt(id.0))),
            );
        }
        Entity::find()
            .filter(wanted)
            .order_by_desc(Column::CreatedAt)
            .order_by_desc(Column::Id)
            .limit(limit)
            .all(&self.db)
            .await?
            .into_iter()
            .map(domain)
            .collect()
    }

    /// Forgets entries that are older.
    pub(crate) async fn audit_prune(&self, before: Millis) -> Result<u64, DbErr> {
        let result = Entity::delete_many()
            .filter(Column::CreatedAt.lt(before))
            .exec(&self.db)
            .await?;
        Ok(result.rows_affected)
    }
}

fn row(entry: AuditEntry) -> ActiveModel {
    let AuditEntry {
        id,
        team,
        actor,
        action,
        resource_type,
        resource_id,
        status,
        outcome,
        source,
        at,
    } = entry;
    ActiveModel {
        id: Set(id.0),
        team_id: Set(team.map(|team| team.0)),
        actor_type: Set(actor.kind.as_str().to_owned()),
        actor_id: Set(actor.id),
        action: Set(action),
        resource_type: Set(resource_type),
        resource_id: Set(resource_id),
        status: Set(status.map(i32::from)),
        outcome: Set(outcome.as_str().to_owned()),
        source_address: Set(source.map(|source| source.to_string())),
        created_at: Set(at),
    }
}

fn domain(row: Model) -> Result<AuditEntry, DbErr> {
    let Model {
        id,
        team_id,
        actor_type,
        actor_id,
        action,
        resource_type,
        resource_id,
        status,
        outcome,
        source_address,
        created_at,
    } = row;
    Ok(AuditEntry {
        id: AuditId(id),
        team: team_id.map(TeamId),
        actor: AuditActor {
            kind: ActorType::parse(&actor_type).ok_or_else(|| corrupt("audit_logs", "actor_type"))?,
            id: actor_id,
        },
        action,
        resource_type,
        resource_id,
        status: status.and_then(|status| u16::try_from(status).ok()),
        outcome: AuditOutcome::parse(&outcome).ok_or_else(|| corrupt("audit_logs", "outcome"))?,
        source: source_address.and_then(|source| source.parse().ok()),
        at: created_at,
    })
}
