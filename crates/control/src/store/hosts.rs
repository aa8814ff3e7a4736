//! Hosts, their tokens and heartbeats.

use sea_orm::ActiveValue::Set;
use sea_orm::{
    ActiveModelTrait, ColumnTrait, Condition, DbErr, EntityTrait, QueryFilter, QueryOrder, TransactionTrait,
};

use super::entity::{host, host_refresh_token, host_token, template_host};
use super::events::record;
use super::{Store, big, corrupt, int, unsigned};
use crate::domain::event::{EventKind, EventPayload, NewEvent};
use crate::domain::{Host, HostId, HostStatus, Millis, TeamId, TemplateId, UserId, now};

/// What an agent tells about its machine, with the tokens it gets (hashed, but for the one that the
/// control plane has to present).
pub(crate) struct HostRegistration<'a> {
    pub(crate) arch: &'a str,
    pub(crate) cpu_cores: u32,
    pub(crate) memory_mb: u64,
    pub(crate) disk_gb: u64,
    pub(crate) address: &'a str,
    pub(crate) rpc_token: &'a str,
    pub(crate) token_hash: &'a str,
    pub(crate) token_expires_at: Millis,
    pub(crate) refresh_hash: &'a str,
    pub(crate) refresh_expires_at: Millis,
}

/// What an agent tells regularly.
pub(crate) struct HostFacts<'a> {
    pub(crate) version: &'a str,
    /// As registered when absent.
    pub(crate) cpu_cores: Option<u32>,
    /// As registered when absent.
    pub(crate) memory_mb: Option<u64>,
    pub(crate) memory_available_mb: u64,
    pub(crate) disk_available_mb: u64,
}

impl HostFacts<'_> {
    /// Whether they say something new. What is free changes with every breath: where there is plenty, a difference of less
    /// than a 64th of the whole decides nothing, and is noted with the next one that is due anyway. Where room is scarce,
    /// each MiB may.
    fn differ_from(&self, known: &Host) -> bool {
        let differs = |one: u64, other: u64, whole: u64| {
            let plenty = one.min(other) > whole / 4;
            one.abs_diff(other) > if plenty { whole / 64 } else { 0 }
        };
        self.version != known.version
            || self.cpu_cores.is_some_and(|cores| cores != known.cpu_cores)
            || self.memory_mb.is_some_and(|memory| memory != known.memory_mb)
            || differs(
                self.memory_available_mb,
                known.memory_available_mb,
                known.memory_mb,
            )
            || differs(
                self.disk_available_mb,
                known.disk_available_mb,
                known.disk_gb.saturating_mul(1024),
            )
    }
}

impl Store {
    /// Creates a host that waits for its registration, with the one-time token's hash.
    pub(crate) async fn host_create(
        &self,
        creator: Option<UserId>,
        token_hash: &str,
        expires_at: Millis,
    ) -> Result<HostId, DbErr> {
        let id = HostId::new();
        let now = now();
        let transaction = self.db.begin().await?;
        host::ActiveModel {
            id: Set(id.0),
            status: Set(HostStatus::Pending.as_str().to_owned()),
            arch: Set(String::new()),
            address: Set(String::new()),
            rpc_token: Set(String::new()),
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
        }
        .insert(&transaction)
        .await?;
        host_token::ActiveModel {
            id: Set(HostId::new().0),
            host_id: Set(id.0),
            token_hash: Set(token_hash.to_owned()),
            created_by: Set(creator.map(|creator| creator.0)),
            created_at: Set(now),
            expires_at: Set(expires_at),
            used_at: Set(None),
        }
        .insert(&transaction)
        .await?;
        transaction.commit().await?;
        Ok(id)
    }

    /// A further one-time token for a host that exists.
    pub(crate) async fn host_token_add(
        &self,
        id: HostId,
        token_hash: &str,
        expires_at: Millis,
    ) -> Result<(), DbErr> {
        host_token::ActiveModel {
            id: Set(HostId::new().0),
            host_id: Set(id.0),
            token_hash: Set(token_hash.to_owned()),
            created_by: Set(None),
            created_at: Set(now()),
            expires_at: Set(expires_at),
            used_at: Set(None),
        }
        .insert(&self.db)
        .await
        .map(drop)
    }

    /// Uses up a one-time token and stores what the agent told, all or nothing. `None`: no such token,
    /// or used, or too old.
    pub(crate) async fn host_register(
        &self,
        one_time_hash: &str,
        registration: HostRegistration<'_>,
    ) -> Result<Option<HostId>, DbErr> {
        let now = now();
        let transaction = self.db.begin().await?;
        let used = host_token::Entity::update_many()
            .col_expr(host_token::Column::UsedAt, now.into())
            .filter(host_token::Column::TokenHash.eq(one_time_hash))
            .filter(host_token::Column::UsedAt.is_null())
            .filter(host_token::Column::ExpiresAt.gt(now))
            .exec(&transaction)
            .await?;
        if used.rows_affected == 0 {
            transaction.rollback().await?;
            return Ok(None);
        }
        let Some(token) = host_token::Entity::find()
            .filter(host_token::Column::TokenHash.eq(one_time_hash))
            .one(&transaction)
            .await?
        else {
            transaction.rollback().await?;
            return Ok(None);
        };
        let HostRegistration {
            arch,
            cpu_cores,
            memory_mb,
            disk_gb,
            address,
            rpc_token,
            token_hash,
            token_expires_at,
            refresh_hash,
            refresh_expires_at,
        } = registration;
        host::Entity::update_many()
            .col_expr(host::Column::Status, HostStatus::Online.as_str().into())
            .col_expr(host::Column::Arch, arch.into())
            .col_expr(host::Column::Address, address.into())
            .col_expr(host::Column::RpcToken, rpc_token.into())
            .col_expr(host::Column::TokenHash, token_hash.into())
            .col_expr(host::Column::TokenExpiresAt, token_expires_at.into())
            .col_expr(host::Column::CpuCores, int(cpu_cores).into())
            .col_expr(host::Column::MemoryMb, big(memory_mb).into())
            .col_expr(host::Column::DiskGb, big(disk_gb).into())
            .col_expr(host::Column::MemoryAvailableMb, big(memory_mb).into())
            .col_expr(
                host::Column::DiskAvailableMb,
                big(disk_gb.saturating_mul(1024)).into(),
            )
            .col_expr(host::Column::LastHeartbeatAt, now.into())
            .col_expr(host::Column::UpdatedAt, now.into())
            .filter(host::Column::Id.eq(token.host_id))
            .exec(&transaction)
            .await?;
        refresh_row(HostId(token.host_id), refresh_hash, refresh_expires_at, now)
            .insert(&transaction)
            .await?;
        record(&transaction, host_event(EventKind::HostUp, HostId(token.host_id))).await?;
        transaction.commit().await?;
        Ok(Some(HostId(token.host_id)))
    }

    /// The host that a bearer token names. The token before the newest one still counts: an agent that
    /// died between a refresh and writing it down is not locked out.
    pub(crate) async fn host_by_token_hash(&self, token_hash: &str) -> Result<Option<Host>, DbErr> {
        let row = host::Entity::find()
            .filter(
                Condition::any()
                    .add(host::Column::TokenHash.eq(token_hash))
                    .add(host::Column::PreviousTokenHash.eq(token_hash)),
            )
            .filter(host::Column::TokenExpiresAt.gt(now()))
            .one(&self.db)
            .await?;
        row.map(domain).transpose()
    }

    /// Exchanges a refresh token: the new pair is stored before the old one is revoked, in one
    /// transaction. `None`: unknown, used or too old.
    pub(crate) async fn host_refresh(
        &self,
        old_refresh_hash: &str,
        token_hash: &str,
        token_expires_at: Millis,
        refresh_hash: &str,
        refresh_expires_at: Millis,
    ) -> Result<Option<HostId>, DbErr> {
        let now = now();
        let transaction = self.db.begin().await?;
        let revoked = host_refresh_token::Entity::update_many()
            .col_expr(host_refresh_token::Column::RevokedAt, now.into())
            .filter(host_refresh_token::Column::TokenHash.eq(old_refresh_hash))
            .filter(host_refresh_token::Column::RevokedAt.is_null())
            .filter(host_refresh_token::Column::ExpiresAt.gt(now))
            .exec(&transaction)
            .await?;
        let row = host_refresh_token::Entity::find()
            .filter(host_refresh_token::Column::TokenHash.eq(old_refresh_hash))
            .one(&transaction)
            .await?;
        let (1, Some(row)) = (revoked.rows_affected, row) else {
            transaction.rollback().await?;
            return Ok(None);
        };
        refresh_row(HostId(row.host_id), refresh_hash, refresh_expires_at, now)
            .insert(&transaction)
            .await?;
        use sea_orm::sea_query::Expr;
        host::Entity::update_many()
            .col_expr(
                host::Column::PreviousTokenHash,
                Expr::col(host::Column::TokenHash),
            )
            .col_expr(host::Column::TokenHash, token_hash.into())
            .col_expr(host::Column::TokenExpiresAt, token_expires_at.into())
            .col_expr(host::Column::UpdatedAt, now.into())
            .filter(host::Column::Id.eq(row.host_id))
            .exec(&transaction)
            .await?;
        transaction.commit().await?;
        Ok(Some(HostId(row.host_id)))
    }

    /// Notes a heartbeat of a host as it was read a moment ago, if there is something to note: a fact that is another, or
    /// that the last note is older than `fresh`. Returns whether the host was not online before.
    pub(crate) async fn host_heartbeat(
        &self,
        known: &Host,
        facts: HostFacts<'_>,
        fresh: Millis,
    ) -> Result<bool, DbErr> {
        let id = known.id;
        let away = matches!(known.status, HostStatus::Unreachable | HostStatus::Offline);
        let heard = known.last_heartbeat_at.is_some_and(|at| now() - at < fresh);
        if heard && !away && !facts.differ_from(known) {
            return Ok(false);
        }
        let HostFacts {
            version,
            cpu_cores,
            memory_mb,
            memory_available_mb,
            disk_available_mb,
        } = facts;
        let now = now();
        let mut update = host::Entity::update_many();
        if let Some(cores) = cpu_cores {
            update = update.col_expr(host::Column::CpuCores, int(cores).into());
        }
        if let Some(memory_mb) = memory_mb {
            update = update.col_expr(host::Column::MemoryMb, big(memory_mb).into());
        }
        update
            .col_expr(host::Column::LastHeartbeatAt, now.into())
            .col_expr(host::Column::MemoryAvailableMb, big(memory_available_mb).into())
            .col_expr(host::Column::DiskAvailableMb, big(disk_available_mb).into())
            .col_expr(host::Column::Version, version.into())
            .col_expr(host::Column::UpdatedAt, now.into())
            .filter(host::Column::Id.eq(id.0))
            .exec(&self.db)
            .await?;
        // One that falls silent in this moment comes back with its next heartbeat.
        if !away {
            return Ok(false);
        }
        let transaction = self.db.begin().await?;
        let back = host::Entity::update_many()
            .col_expr(host::Column::Status, HostStatus::Online.as_str().into())
            .filter(host::Column::Id.eq(id.0))
            .filter(
                host::Column::Status.is_in([HostStatus::Unreachable.as_str(), HostStatus::Offline.as_str()]),
            )
            .exec(&transaction)
            .await?;
        if back.rows_affected > 0 {
            record(&transaction, host_event(EventKind::HostUp, id)).await?;
        }
        transaction.commit().await?;
        Ok(back.rows_affected > 0)
    }

    /// The agent listens elsewhere now.
    pub(crate) async fn host_moved(&self, id: HostId, address: &str) -> Result<(), DbErr> {
        host::Entity::update_many()
            .col_expr(host::Column::Address, address.into())
            .col_expr(host::Column::UpdatedAt, now().into())
            .filter(host::Column::Id.eq(id.0))
            .exec(&self.db)
            .await
            .map(drop)
    }

    /// Marks online and draining hosts unreachable whose last heartbeat is older; returns them.
    pub(crate) async fn hosts_fall_silent(&self, heard_before: Millis) -> Result<Vec<HostId>, DbErr> {
        let alive = [HostStatus::Online.as_str(), HostStatus::Draining.as_str()];
        let silent = host::Entity::find()
            .filter(host::Column::Status.is_in(alive))
            .filter(host::Column::LastHeartbeatAt.lt(heard_before))
            .all(&self.db)
            .await?;
        let mut fallen = Vec::new();
        for row in silent {
            let transaction = self.db.begin().await?;
            let updated = host::Entity::update_many()
                .col_expr(host::Column::Status, HostStatus::Unreachable.as_str().into())
                .filter(host::Column::Id.eq(row.id))
                .filter(host::Column::Status.is_in(alive))
                .filter(host::Column::LastHeartbeatAt.lt(heard_before))
                .exec(&transaction)
                .await?;
            if updated.rows_affected == 1 {
                record(&transaction, host_event(EventKind::HostDown, HostId(row.id))).await?;
                fallen.push(HostId(row.id));
            }
            transaction.commit().await?;
        }
        Ok(fallen)
    }

    /// One host.
    pub(crate) async fn host(&self, id: HostId) -> Result<Option<Host>, DbErr> {
        host::Entity::find_by_id(id.0)
            .one(&self.db)
            .await?
            .map(domain)
            .transpose()
    }

    /// All hosts in a status.
    pub(crate) async fn hosts_in(&self, status: HostStatus) -> Result<Vec<Host>, DbErr> {
        host::Entity::find()
            .filter(host::Column::Status.eq(status.as_str()))
            .order_by_asc(host::Column::Id)
            .all(&self.db)
            .await?
            .into_iter()
            .map(domain)
            .collect()
    }

    /// All hosts.
    pub(crate) async fn hosts(&self) -> Result<Vec<Host>, DbErr> {
        host::Entity::find()
            .order_by_asc(host::Column::Id)
            .all(&self.db)
            .await?
            .into_iter()
            .map(domain)
            .collect()
    }

    /// Online hosts on which a template is ready, in a stable order.
    pub(crate) async fn hosts_with_template(&self, template: TemplateId) -> Result<Vec<Host>, DbErr> {
        use sea_orm::sea_query::Query;
        let holders = Query::select()
            .column(template_host::Column::HostId)
            .from(template_host::Entity)
            .and_where(template_host::Column::TemplateId.eq(template.0))
            .and_where(template_host::Column::Status.eq("ready"))
            .to_owned();
        let rows = host::Entity::find()
            .filter(host::Column::Status.eq(HostStatus::Online.as_str()))
            .filter(host::Column::Id.in_subquery(holders))
            .order_by_asc(host::Column::Id)
            .all(&self.db)
            .await?;
        rows.into_iter().map(domain).collect()
    }
}

/// Hosts serve all teams, so that their events are the platform's.
fn host_event(kind: EventKind, id: HostId) -> NewEvent {
    NewEvent {
        team: TeamId::PLATFORM,
        kind,
        outcome: None,
        resource: id.to_string(),
        payload: EventPayload::default(),
        actor: None,
    }
}

fn refresh_row(
    host: HostId,
    token_hash: &str,
    expires_at: Millis,
    now: Millis,
) -> host_refresh_token::ActiveModel {
    host_refresh_token::ActiveModel {
        id: Set(HostId::new().0),
        host_id: Set(host.0),
        token_hash: Set(token_hash.to_owned()),
        created_at: Set(now),
        expires_at: Set(expires_at),
        revoked_at: Set(None),
    }
}

fn domain(row: host::Model) -> Result<Host, DbErr> {
    let status = HostStatus::ALL
        .into_iter()
        .find(|status| status.as_str() == row.status)
        .ok_or_else(|| corrupt("hosts", "status"))?;
    Ok(Host {
        id: HostId(row.id),
        status,
        address: row.address,
        rpc_token: row.rpc_token,
        version: row.version,
        cpu_cores: unsigned(row.cpu_cores),
        memory_mb: unsigned(row.memory_mb),
        disk_gb: unsigned(row.disk_gb),
        memory_available_mb: unsigned(row.memory_available_mb),
        disk_available_mb: unsigned(row.disk_available_mb),
        last_heartbeat_at: row.last_heartbeat_at,
    })
}
