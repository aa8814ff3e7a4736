//! Hosts, their tokens and heartbeats.

use std::collections::HashSet;

use sea_orm::ActiveValue::Set;
use sea_orm::sea_query::{Expr, Query, SelectStatement};
use sea_orm::{
    ActiveModelTrait, ColumnTrait, Condition, DbErr, EntityTrait, FromQueryResult, QueryFilter, QueryOrder,
    QuerySelect, TransactionTrait,
};

use super::entity::{host, host_refresh_token, host_token, sandbox, template_host};
use super::events::record;
use super::host_management::{revoke_one_time, revoke_refresh, wanted};
use super::templates::status_word;
use super::{Store, big, corrupt, int, unsigned};
use crate::domain::event::{EventKind, EventPayload, NewEvent};
use crate::domain::{
    Host, HostDeletion, HostId, HostOwner, HostStatus, Millis, SandboxStatus, TeamId, TemplateId,
    TemplateStatus, now,
};

/// What an agent tells about its machine, with the tokens it gets (hashed, but for the one that the
/// control plane has to present, which is sealed).
pub(crate) struct HostRegistration<'a> {
    pub(crate) arch: &'a str,
    pub(crate) cpu_cores: u32,
    pub(crate) memory_mb: u64,
    pub(crate) disk_gb: u64,
    pub(crate) address: &'a str,
    /// Seals it for the host that the one-time token turns out to stand for.
    pub(crate) rpc_token: &'a (dyn Fn(HostId) -> crate::Result<String> + Sync),
    pub(crate) token_hash: &'a str,
    pub(crate) token_expires_at: Millis,
    pub(crate) refresh_hash: &'a str,
    pub(crate) refresh_expires_at: Millis,
}

/// The pair that a refresh token is exchanged for.
pub(crate) struct HostRefresh<'a> {
    /// How long the old one counts on while the new pair is not used, milliseconds.
    pub(crate) grace: Millis,
    pub(crate) token_hash: &'a str,
    pub(crate) token_expires_at: Millis,
    pub(crate) refresh_hash: &'a str,
    pub(crate) refresh_expires_at: Millis,
}

/// What an agent tells regularly.
#[derive(Clone, Copy)]
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
    /// Whose the host is that a one-time token stands for, if there is one and it counts.
    pub(crate) async fn host_token_owner(&self, one_time_hash: &str) -> Result<Option<HostOwner>, DbErr> {
        let found = host_token::Entity::find()
            .filter(host_token::Column::TokenHash.eq(one_time_hash))
            .filter(host_token::Column::UsedAt.is_null())
            .filter(host_token::Column::ExpiresAt.gt(now()))
            .one(&self.db)
            .await?;
        let Some(token) = found else { return Ok(None) };
        let host = host::Entity::find_by_id(token.host_id).one(&self.db).await?;
        host.map(|host| owner(&host)).transpose()
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
        let id = HostId(token.host_id);
        // Whoever registered before, with another token, is this host no more.
        revoke_one_time(&transaction, id).await?;
        revoke_refresh(&transaction, id, None).await?;
        let rpc_token = rpc_token(id).map_err(|error| DbErr::Custom(error.to_string()))?;
        let updated = host::Entity::update_many()
            .col_expr(host::Column::Status, HostStatus::Online.as_str().into())
            .col_expr(host::Column::PreviousTokenHash, Expr::value(None::<String>))
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
            .filter(host::Column::Id.eq(id.0))
            .filter(wanted())
            .exec(&transaction)
            .await?;
        let registered = host::Entity::find_by_id(id.0).one(&transaction).await?;
        let (1, Some(registered)) = (updated.rows_affected, registered) else {
            transaction.rollback().await?;
            return Ok(None);
        };
        refresh_row(id, refresh_hash, refresh_expires_at, now)
            .insert(&transaction)
            .await?;
        record(
            &transaction,
            host_event(EventKind::HostUp, id, owner(&registered)?),
        )
        .await?;
        transaction.commit().await?;
        Ok(Some(id))
    }

    /// The host that a bearer token names. The token before the newest one counts until that has been used: an agent to
    /// which the answer of a refresh got lost, or which died before writing it down, is not locked out.
    pub(crate) async fn host_by_token_hash(&self, token_hash: &str) -> Result<Option<Host>, DbErr> {
        let now = now();
        let row = host::Entity::find()
            .filter(
                Condition::any()
                    .add(host::Column::TokenHash.eq(token_hash))
                    .add(host::Column::PreviousTokenHash.eq(token_hash)),
            )
            .filter(host::Column::TokenExpiresAt.gt(now))
            .one(&self.db)
            .await?;
        let Some(row) = row else { return Ok(None) };
        if row.previous_token_hash.is_some()
            && row.token_hash.as_ref().is_some_and(|hash| hash.0 == token_hash)
        {
            self.host_has_new_tokens(HostId(row.id), token_hash, now).await?;
        }
        domain(row).map(Some)
    }

    /// The agent has its new tokens: those before them end. Two statements, in no transaction: a refresh takes the same
    /// rows the other way round, and what is not revoked here ends with its grace.
    async fn host_has_new_tokens(&self, id: HostId, token_hash: &str, seen: Millis) -> Result<(), DbErr> {
        let confirmed = host::Entity::update_many()
            .col_expr(host::Column::PreviousTokenHash, Expr::value(None::<String>))
            .filter(host::Column::Id.eq(id.0))
            .filter(host::Column::TokenHash.eq(token_hash))
            .exec(&self.db)
            .await?;
        if confirmed.rows_affected == 0 {
            return Ok(());
        }
        host_refresh_token::Entity::update_many()
            .col_expr(host_refresh_token::Column::RevokedAt, now().into())
            .filter(host_refresh_token::Column::HostId.eq(id.0))
            .filter(host_refresh_token::Column::RevokedAt.is_null())
            .filter(host_refresh_token::Column::SupersededAt.lte(seen))
            .exec(&self.db)
            .await
            .map(drop)
    }

    /// Exchanges a refresh token for a new pair. It counts on until the new pair is used, or for a grace, and a repetition
    /// within that time replaces the pair that did not arrive. `None`: unknown, revoked or too old.
    pub(crate) async fn host_refresh(
        &self,
        old_refresh_hash: &str,
        fresh: HostRefresh<'_>,
    ) -> Result<Option<HostId>, DbErr> {
        use host_refresh_token::Column;
        let HostRefresh {
            grace,
            token_hash,
            token_expires_at,
            refresh_hash,
            refresh_expires_at,
        } = fresh;
        let now = now();
        let transaction = self.db.begin().await?;
        let superseded: Expr = Expr::case(Column::SupersededAt.is_null(), now)
            .finally(Expr::col(Column::SupersededAt))
            .into();
        let counts = host_refresh_token::Entity::update_many()
            .col_expr(Column::SupersededAt, superseded)
            .filter(Column::TokenHash.eq(old_refresh_hash))
            .filter(Column::RevokedAt.is_null())
            .filter(Column::ExpiresAt.gt(now))
            .filter(
                Condition::any()
                    .add(Column::SupersededAt.is_null())
                    .add(Column::SupersededAt.gt(now - grace)),
            )
            .exec(&transaction)
            .await?;
        let row = host_refresh_token::Entity::find()
            .filter(Column::TokenHash.eq(old_refresh_hash))
            .one(&transaction)
            .await?;
        let (1, Some(row)) = (counts.rows_affected, row) else {
            transaction.rollback().await?;
            return Ok(None);
        };
        let id = HostId(row.host_id);
        // Those before it, since whoever has this one needs them no more; or those that came of it and did not arrive.
        revoke_refresh(&transaction, id, Some(row.id)).await?;
        refresh_row(id, refresh_hash, refresh_expires_at, now)
            .insert(&transaction)
            .await?;
        let repeated = row.superseded_at.is_some_and(|at| at < now);
        let arrived: Expr = if repeated {
            // The newest did not arrive: what the agent has is the one before.
            Expr::case(
                host::Column::PreviousTokenHash.is_null(),
                Expr::col(host::Column::TokenHash),
            )
            .finally(Expr::col(host::Column::PreviousTokenHash))
            .into()
        } else {
            Expr::col(host::Column::TokenHash)
        };
        host::Entity::update_many()
            .col_expr(host::Column::PreviousTokenHash, arrived)
            .col_expr(host::Column::TokenHash, token_hash.into())
            .col_expr(host::Column::TokenExpiresAt, token_expires_at.into())
            .col_expr(host::Column::UpdatedAt, now.into())
            .filter(host::Column::Id.eq(id.0))
            .exec(&transaction)
            .await?;
        transaction.commit().await?;
        Ok(Some(id))
    }

    /// Puts another form of the same RPC token in the place of the one that was read.
    pub(crate) async fn host_reseal(&self, id: HostId, read: &str, sealed: &str) -> Result<bool, DbErr> {
        let updated = host::Entity::update_many()
            .col_expr(host::Column::RpcToken, sealed.into())
            .filter(host::Column::Id.eq(id.0))
            .filter(host::Column::RpcToken.eq(read))
            .exec(&self.db)
            .await?;
        Ok(updated.rows_affected == 1)
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
            record(&transaction, host_event(EventKind::HostUp, id, known.owner)).await?;
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
                let down = host_event(EventKind::HostDown, HostId(row.id), owner(&row)?);
                record(&transaction, down).await?;
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

    /// Online hosts that nobody wants to delete, and what sandboxes hold of each.
    pub(crate) async fn hosts_for_placement(&self) -> Result<Vec<(Host, OnHost)>, DbErr> {
        use sea_orm::sea_query::ExprTrait as _;
        const ARRIVING: &[SandboxStatus] = &[SandboxStatus::Pending, SandboxStatus::Starting];
        const HOLDING: &[SandboxStatus] = &[
            SandboxStatus::Pending,
            SandboxStatus::Starting,
            SandboxStatus::Running,
            SandboxStatus::Pausing,
            SandboxStatus::Snapshotting,
            SandboxStatus::Resuming,
        ];
        // A query for each host rather than a join, which a planner may well begin with the sandboxes of hosts that are
        // away.
        let held = |amount: sandbox::Column, statuses: &[SandboxStatus]| {
            let of = |column: sandbox::Column| (sandbox::Entity, column);
            let sum = Query::select()
                .expr(Expr::col(of(amount)).sum().cast_as("BIGINT"))
                .from(sandbox::Entity)
                .and_where(Expr::col(of(sandbox::Column::HostId)).equals((host::Entity, host::Column::Id)))
                .and_where(Expr::col(of(sandbox::Column::Status)).is_in(statuses.iter().map(|s| s.as_str())))
                .to_owned();
            Expr::SubQuery(None, Box::new(sum.into()))
        };
        let found = host::Entity::find()
            .column_as(held(sandbox::Column::Vcpus, HOLDING), "held_vcpus")
            .column_as(held(sandbox::Column::MemoryMb, ARRIVING), "arriving_mb")
            .filter(host::Column::Status.eq(HostStatus::Online.as_str()))
            .filter(wanted())
            .into_model::<Candidate>()
            .all(&self.db)
            .await?;
        found
            .into_iter()
            .map(|found| {
                let held = OnHost {
                    vcpus: unsigned(found.held_vcpus.unwrap_or_default()),
                    arriving_mb: unsigned(found.arriving_mb.unwrap_or_default()),
                };
                Ok((domain(found.host)?, held))
            })
            .collect()
    }

    /// Hosts on which a template is ready, whatever else is true of them.
    pub(crate) async fn hosts_with_template(&self, template: TemplateId) -> Result<HashSet<HostId>, DbErr> {
        let found: Vec<uuid::Uuid> = template_host::Entity::find()
            .select_only()
            .column(template_host::Column::HostId)
            .filter(ready(template))
            .into_tuple()
            .all(&self.db)
            .await?;
        Ok(found.into_iter().map(HostId).collect())
    }
}

/// A row if a host takes new sandboxes of a template.
pub(super) fn takes_new(host: HostId, template: TemplateId) -> SelectStatement {
    let holders = Query::select()
        .column(template_host::Column::HostId)
        .from(template_host::Entity)
        .cond_where(ready(template))
        .to_owned();
    Query::select()
        .expr(Expr::val(1))
        .from(host::Entity)
        .and_where(host::Column::Id.eq(host.0))
        .and_where(host::Column::Status.eq(HostStatus::Online.as_str()))
        .cond_where(wanted())
        .and_where(host::Column::Id.in_subquery(holders))
        .to_owned()
}

/// A template's places where it is ready.
fn ready(template: TemplateId) -> Condition {
    Condition::all()
        .add(template_host::Column::TemplateId.eq(template.0))
        .add(template_host::Column::Status.eq(status_word(TemplateStatus::Ready)))
}

/// What sandboxes hold of a host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct OnHost {
    /// vCPUs of those that have a VM, or are about to.
    pub(crate) vcpus: u64,
    /// MiB of memory promised to those that the host does not count yet.
    pub(crate) arriving_mb: u64,
}

/// A host that may take a sandbox; no sandbox, no sums.
#[derive(FromQueryResult)]
struct Candidate {
    #[sea_orm(nested)]
    host: host::Model,
    held_vcpus: Option<i64>,
    arriving_mb: Option<i64>,
}

/// What happens to a host concerns whose it is.
pub(super) fn host_event(kind: EventKind, id: HostId, owner: HostOwner) -> NewEvent {
    NewEvent {
        team: owner.team().unwrap_or(TeamId::PLATFORM),
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
        token_hash: Set(token_hash.into()),
        created_at: Set(now),
        expires_at: Set(expires_at),
        revoked_at: Set(None),
        superseded_at: Set(None),
    }
}

fn owner(row: &host::Model) -> Result<HostOwner, DbErr> {
    match (row.kind.as_str(), row.team_id) {
        ("regular", None) => Ok(HostOwner::Platform),
        ("byoc", Some(team)) => Ok(HostOwner::Team(TeamId(team))),
        _ => Err(corrupt("hosts", "kind")),
    }
}

pub(super) fn domain(row: host::Model) -> Result<Host, DbErr> {
    let owner = owner(&row)?;
    let deletion = row
        .deletion
        .as_deref()
        .map(|word| HostDeletion::parse(word).ok_or_else(|| corrupt("hosts", "deletion")))
        .transpose()?;
    let status = HostStatus::ALL
        .into_iter()
        .find(|status| status.as_str() == row.status)
        .ok_or_else(|| corrupt("hosts", "status"))?;
    Ok(Host {
        id: HostId(row.id),
        owner,
        provider: row.provider,
        availability_zone: row.availability_zone,
        status,
        deletion,
        arch: row.arch,
        version: row.version,
        address: row.address,
        rpc_token: row.rpc_token.0,
        cpu_cores: unsigned(row.cpu_cores),
        memory_mb: unsigned(row.memory_mb),
        disk_gb: unsigned(row.disk_gb),
        memory_available_mb: unsigned(row.memory_available_mb),
        disk_available_mb: unsigned(row.disk_available_mb),
        last_heartbeat_at: row.last_heartbeat_at,
        created_at: row.created_at,
    })
}
