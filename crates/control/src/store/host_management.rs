//! Hosts as people manage them: created, listed, tagged, and deleted in steps that can be taken up again.

use sea_orm::ActiveValue::Set;
use sea_orm::sea_query::{Expr, ExprTrait as _, OnConflict, Query};
use sea_orm::{
    ActiveModelTrait, ColumnTrait, Condition, DbErr, EntityTrait, PaginatorTrait as _, QueryFilter,
    QueryOrder, QuerySelect, TransactionTrait,
};

use super::Store;
use super::entity::{host, host_refresh_token, host_tag, host_token, sandbox, template, template_host};
use super::events::record;
use super::hosts::{domain, host_event};
use crate::domain::event::EventKind;
use crate::domain::{
    Host, HostDeletion, HostId, HostOwner, HostStatus, Millis, SandboxId, SandboxStatus, TeamId, TemplateId,
    TemplateKind, UserId, now,
};

/// Sandboxes of a host that are read at once.
const PAGE: u64 = 1000;
/// Most tags of a host.
pub(crate) const MAX_TAGS: u64 = 64;

/// A host in the making.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NewHost<'a> {
    pub(crate) owner: HostOwner,
    pub(crate) provider: Option<&'a str>,
    pub(crate) availability_zone: Option<&'a str>,
    pub(crate) creator: Option<UserId>,
    /// The hash of its one-time registration token.
    pub(crate) token_hash: &'a str,
    pub(crate) token_expires_at: Millis,
}

/// What became of a tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tagged {
    /// It is there now, or was before.
    Done,
    /// The host has as many as it may.
    TooMany,
    /// There is no such host.
    Missing,
}

/// Hosts that nobody has asked to delete.
pub(super) fn wanted() -> Condition {
    Condition::all().add(host::Column::Deletion.is_null())
}

impl Store {
    /// Creates a host that waits for its registration. `None` when its team has been deleted.
    pub(crate) async fn host_create(&self, new: NewHost<'_>) -> Result<Option<HostId>, DbErr> {
        let NewHost {
            owner,
            provider,
            availability_zone,
            creator,
            token_hash,
            token_expires_at,
        } = new;
        let id = HostId::new();
        let now = now();
        let transaction = self.db.begin().await?;
        host::ActiveModel {
            id: Set(id.0),
            status: Set(HostStatus::Pending.as_str().to_owned()),
            arch: Set(String::new()),
            address: Set(String::new()),
            rpc_token: Set("".into()),
            token_hash: Set(None),
            token_expires_at: Set(None),
            previous_token_hash: Set(None),
            cpu_cores: Set(0),
            memory_mb: Set(0),
            disk_gb: Set(0),
            memory_available_mb: Set(0),
            disk_available_mb: Set(0),
            version: Set(String::new()),
            created_by: Set(creator.map(|creator| creator.0)),
            last_heartbeat_at: Set(None),
            created_at: Set(now),
            updated_at: Set(now),
            kind: Set(owner.kind().to_owned()),
            team_id: Set(owner.team().map(|team| team.0)),
            provider: Set(provider.map(str::to_owned)),
            availability_zone: Set(availability_zone.map(str::to_owned)),
            deletion: Set(None),
        }
        .insert(&transaction)
        .await?;
        if let Some(team) = owner.team()
            && !super::teams::team_held(&transaction, team).await?
        {
            transaction.rollback().await?;
            return Ok(None);
        }
        one_time(id, creator, token_hash, now, token_expires_at)
            .insert(&transaction)
            .await?;
        transaction.commit().await?;
        Ok(Some(id))
    }

    /// Replaces the one-time tokens of a host by a new one. `false` when there is no such host.
    pub(crate) async fn host_token_replace(
        &self,
        id: HostId,
        creator: Option<UserId>,
        token_hash: &str,
        expires_at: Millis,
    ) -> Result<bool, DbErr> {
        let now = now();
        let transaction = self.db.begin().await?;
        // Tokens first and their host last, as in a registration, so that neither waits for the other.
        revoke_one_time(&transaction, id).await?;
        let held = host::Entity::update_many()
            .col_expr(host::Column::UpdatedAt, now.into())
            .filter(host::Column::Id.eq(id.0))
            .filter(wanted())
            .exec(&transaction)
            .await?;
        if held.rows_affected == 0 {
            transaction.rollback().await?;
            return Ok(false);
        }
        one_time(id, creator, token_hash, now, expires_at)
            .insert(&transaction)
            .await?;
        transaction.commit().await?;
        Ok(true)
    }

    /// A page of hosts, newest first: a team's own, or all.
    pub(crate) async fn hosts_page(
        &self,
        team: Option<TeamId>,
        limit: u64,
        before: Option<HostId>,
    ) -> Result<Vec<Host>, DbErr> {
        host::Entity::find()
            .filter(wanted())
            .filter(
                Condition::all()
                    .add_option(team.map(|team| host::Column::TeamId.eq(team.0)))
                    .add_option(before.map(|before| host::Column::Id.lt(before.0))),
            )
            .order_by_desc(host::Column::Id)
            .limit(limit)
            .all(&self.db)
            .await?
            .into_iter()
            .map(domain)
            .collect()
    }

    /// Sandboxes of a host that are not stopped, by id, a page at a time.
    pub(crate) async fn sandboxes_left_on(
        &self,
        host: HostId,
        after: Option<SandboxId>,
    ) -> Result<Vec<SandboxId>, DbErr> {
        let ids: Vec<uuid::Uuid> = sandbox::Entity::find()
            .select_only()
            .column(sandbox::Column::Id)
            .filter(sandbox::Column::HostId.eq(host.0))
            .filter(sandbox::Column::Status.ne(SandboxStatus::Stopped.as_str()))
            .filter(Condition::all().add_option(after.map(|after| sandbox::Column::Id.gt(after.0))))
            .order_by_asc(sandbox::Column::Id)
            .limit(PAGE)
            .into_tuple()
            .all(&self.db)
            .await?;
        Ok(ids.into_iter().map(SandboxId).collect())
    }

    /// Names of the snapshots that are on this host alone.
    pub(crate) async fn snapshots_only_on(&self, host: HostId) -> Result<Vec<String>, DbErr> {
        template::Entity::find()
            .select_only()
            .column(template::Column::Name)
            .filter(only_on(host))
            .order_by_asc(template::Column::Name)
            .into_tuple()
            .all(&self.db)
            .await
    }

    /// Marks a host: from now on it is given nothing, shown to nobody and not listened to. `false` when there is no such
    /// host, or it is marked already. A mark that spares sandboxes becomes one that does not.
    pub(crate) async fn host_mark_deleted(&self, id: HostId, deletion: HostDeletion) -> Result<bool, DbErr> {
        let markable = match deletion {
            HostDeletion::Emptying => wanted(),
            HostDeletion::Destroying => Condition::any()
                .add(host::Column::Deletion.is_null())
                .add(host::Column::Deletion.eq(HostDeletion::Emptying.as_str())),
        };
        let marked = host::Entity::update_many()
            .col_expr(host::Column::Deletion, deletion.as_str().into())
            .col_expr(host::Column::UpdatedAt, now().into())
            .filter(host::Column::Id.eq(id.0))
            .filter(markable)
            .exec(&self.db)
            .await?;
        Ok(marked.rows_affected == 1)
    }

    /// Takes a mark that spares sandboxes back, since there are some after all.
    pub(crate) async fn host_unmark(&self, id: HostId) -> Result<(), DbErr> {
        host::Entity::update_many()
            .col_expr(host::Column::Deletion, Expr::value(None::<String>))
            .filter(host::Column::Id.eq(id.0))
            .filter(host::Column::Deletion.eq(HostDeletion::Emptying.as_str()))
            .exec(&self.db)
            .await
            .map(drop)
    }

    /// Ends what a marked host calls with: its agent's tokens, and those with which it could register.
    pub(crate) async fn host_disown(&self, id: HostId) -> Result<(), DbErr> {
        let now = now();
        let none = || Expr::value(None::<String>);
        let transaction = self.db.begin().await?;
        revoke_one_time(&transaction, id).await?;
        revoke_refresh(&transaction, id, None).await?;
        host::Entity::update_many()
            .col_expr(host::Column::TokenHash, none())
            .col_expr(host::Column::PreviousTokenHash, none())
            .col_expr(host::Column::UpdatedAt, now.into())
            .filter(host::Column::Id.eq(id.0))
            .filter(host::Column::Deletion.is_not_null())
            .exec(&transaction)
            .await?;
        transaction.commit().await
    }

    /// Hosts that are marked and still there.
    pub(crate) async fn hosts_deleting(&self) -> Result<Vec<Host>, DbErr> {
        host::Entity::find()
            .filter(host::Column::Deletion.is_not_null())
            .order_by_asc(host::Column::Id)
            .all(&self.db)
            .await?
            .into_iter()
            .map(domain)
            .collect()
    }

    /// A team's own hosts, marked or not.
    pub(crate) async fn hosts_of_team(&self, team: TeamId) -> Result<Vec<HostId>, DbErr> {
        let ids: Vec<uuid::Uuid> = host::Entity::find()
            .select_only()
            .column(host::Column::Id)
            .filter(host::Column::TeamId.eq(team.0))
            .into_tuple()
            .all(&self.db)
            .await?;
        Ok(ids.into_iter().map(HostId).collect())
    }

    /// Snapshots that go with a marked host, since nobody else has them.
    pub(crate) async fn snapshots_lost_with(&self, host: HostId) -> Result<Vec<TemplateId>, DbErr> {
        let ids: Vec<uuid::Uuid> = template::Entity::find()
            .select_only()
            .column(template::Column::Id)
            .filter(only_on(host))
            .into_tuple()
            .all(&self.db)
            .await?;
        Ok(ids.into_iter().map(TemplateId).collect())
    }

    /// Removes a marked host that has no sandboxes any more; the records of those that it had stay, without it. Returns
    /// whether it is gone.
    pub(crate) async fn host_remove(&self, host: &Host) -> Result<bool, DbErr> {
        let transaction = self.db.begin().await?;
        sandbox::Entity::update_many()
            .col_expr(sandbox::Column::HostId, Expr::value(None::<uuid::Uuid>))
            .filter(sandbox::Column::HostId.eq(host.id.0))
            .filter(sandbox::Column::Status.eq(SandboxStatus::Stopped.as_str()))
            .exec(&transaction)
            .await?;
        let left = Query::select()
            .column(sandbox::Column::Id)
            .from(sandbox::Entity)
            .and_where(sandbox::Column::HostId.eq(host.id.0))
            .to_owned();
        let removed = host::Entity::delete_many()
            .filter(host::Column::Id.eq(host.id.0))
            .filter(host::Column::Deletion.is_not_null())
            .filter(Expr::exists(left).not())
            .exec(&transaction)
            .await?;
        if removed.rows_affected == 0 {
            transaction.rollback().await?;
            return Ok(false);
        }
        if matches!(host.status, HostStatus::Online | HostStatus::Draining) {
            record(&transaction, host_event(EventKind::HostDown, host.id, host.owner)).await?;
        }
        transaction.commit().await?;
        Ok(true)
    }

    /// A host's tags, in order.
    pub(crate) async fn host_tags(&self, id: HostId) -> Result<Vec<String>, DbErr> {
        host_tag::Entity::find()
            .select_only()
            .column(host_tag::Column::Tag)
            .filter(host_tag::Column::HostId.eq(id.0))
            .order_by_asc(host_tag::Column::Tag)
            .into_tuple()
            .all(&self.db)
            .await
    }

    /// Adds a tag. The host's row is written first, so that two at once do not both find the last place.
    pub(crate) async fn host_tag_add(&self, id: HostId, tag: &str) -> Result<Tagged, DbErr> {
        let now = now();
        let transaction = self.db.begin().await?;
        let held = host::Entity::update_many()
            .col_expr(host::Column::UpdatedAt, now.into())
            .filter(host::Column::Id.eq(id.0))
            .filter(wanted())
            .exec(&transaction)
            .await?;
        if held.rows_affected == 0 {
            transaction.rollback().await?;
            return Ok(Tagged::Missing);
        }
        host_tag::Entity::insert(host_tag::ActiveModel {
            host_id: Set(id.0),
            tag: Set(tag.to_owned()),
            created_at: Set(now),
        })
        .on_conflict(
            OnConflict::columns([host_tag::Column::HostId, host_tag::Column::Tag])
                .do_nothing()
                .to_owned(),
        )
        .exec_without_returning(&transaction)
        .await?;
        let count = host_tag::Entity::find()
            .filter(host_tag::Column::HostId.eq(id.0))
            .count(&transaction)
            .await?;
        if count > MAX_TAGS {
            transaction.rollback().await?;
            return Ok(Tagged::TooMany);
        }
        transaction.commit().await?;
        Ok(Tagged::Done)
    }

    /// Takes a tag away. `false` when the host has none of this name.
    pub(crate) async fn host_tag_remove(&self, id: HostId, tag: &str) -> Result<bool, DbErr> {
        let removed = host_tag::Entity::delete_many()
            .filter(host_tag::Column::HostId.eq(id.0))
            .filter(host_tag::Column::Tag.eq(tag))
            .exec(&self.db)
            .await?;
        Ok(removed.rows_affected == 1)
    }
}

/// Snapshots that no other host has.
fn only_on(host: HostId) -> Condition {
    let on = |here: bool| {
        let this = template_host::Column::HostId;
        Query::select()
            .column(template_host::Column::TemplateId)
            .from(template_host::Entity)
            .and_where(if here { this.eq(host.0) } else { this.ne(host.0) })
            .to_owned()
    };
    Condition::all()
        .add(template::Column::Kind.eq(super::templates::kind_word(TemplateKind::Snapshot)))
        .add(template::Column::Id.in_subquery(on(true)))
        .add(template::Column::Id.not_in_subquery(on(false)))
}

/// One-time tokens that nobody has used yet are used up.
pub(super) async fn revoke_one_time(
    transaction: &super::DatabaseTransaction,
    id: HostId,
) -> Result<(), DbErr> {
    host_token::Entity::update_many()
        .col_expr(host_token::Column::UsedAt, now().into())
        .filter(host_token::Column::HostId.eq(id.0))
        .filter(host_token::Column::UsedAt.is_null())
        .exec(transaction)
        .await
        .map(drop)
}

/// A host's refresh tokens count no more, but for one.
pub(super) async fn revoke_refresh(
    transaction: &super::DatabaseTransaction,
    id: HostId,
    besides: Option<uuid::Uuid>,
) -> Result<(), DbErr> {
    use host_refresh_token::Column;
    host_refresh_token::Entity::update_many()
        .col_expr(Column::RevokedAt, now().into())
        .filter(Column::HostId.eq(id.0))
        .filter(Column::RevokedAt.is_null())
        .filter(Condition::all().add_option(besides.map(|besides| Column::Id.ne(besides))))
        .exec(transaction)
        .await
        .map(drop)
}

fn one_time(
    host: HostId,
    creator: Option<UserId>,
    token_hash: &str,
    now: Millis,
    expires_at: Millis,
) -> host_token::ActiveModel {
    host_token::ActiveModel {
        id: Set(HostId::new().0),
        host_id: Set(host.0),
        token_hash: Set(token_hash.into()),
        created_by: Set(creator.map(|creator| creator.0)),
        created_at: Set(now),
        expires_at: Set(expires_at),
        used_at: Set(None),
    }
}
