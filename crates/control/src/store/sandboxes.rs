//! Sandboxes: records, and the conditional updates that move them.

use std::collections::{BTreeMap, BTreeSet};

use sea_orm::ActiveValue::Set;
use sea_orm::sea_query::{Expr, ExprTrait};
use sea_orm::{
    ColumnTrait, Condition, ConnectionTrait as _, DbErr, EntityTrait, JoinType, PaginatorTrait, QueryFilter,
    QueryOrder, QuerySelect, RelationDef, TransactionTrait,
};

use super::entity::sandbox::{ActiveModel, Column, Entity, Model};
use super::entity::{Hidden, host};
use super::events::{record, record_placed};
use super::hosts::{self, takes_new};
use super::teams::team_held;
use super::{Outcome, Store, big, corrupt, int, unsigned};
use crate::domain::around::AuditActor;
use crate::domain::event::NewEvent;
use crate::domain::{
    Actor, Failure, Host, HostId, Millis, Sandbox, SandboxId, SandboxStatus, TeamId, TemplateId, now,
};

/// What the caller believes about a record; the update happens only if it is so.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Guard {
    pub(crate) status: SandboxStatus,
    pub(crate) generation: u64,
    /// Whose it is; that never changes.
    team: TeamId,
    /// Who made the newest decision; that changes only with the generation.
    decided: Option<Actor>,
}

impl From<&Sandbox> for Guard {
    fn from(sandbox: &Sandbox) -> Self {
        Self {
            status: sandbox.status,
            generation: sandbox.generation,
            team: sandbox.team,
            decided: sandbox.actor,
        }
    }
}

/// What an update changes.
#[derive(Debug, Clone)]
pub(crate) struct Change {
    to: SandboxStatus,
    /// Set by a new decision: who makes it.
    decision: Option<Option<Actor>>,
    previous: Option<SandboxStatus>,
    snapshot: Option<TemplateId>,
    host: Option<HostId>,
    failure: Option<Failure>,
    active: bool,
    started: bool,
    envs: bool,
}

impl Change {
    /// The same decision goes on: the generation stays.
    pub(crate) fn to(status: SandboxStatus) -> Self {
        Self {
            to: status,
            decision: None,
            previous: None,
            snapshot: None,
            host: None,
            failure: None,
            active: false,
            started: false,
            envs: false,
        }
    }

    /// A new decision, and who makes it: nobody, when the platform does so by itself.
    pub(crate) fn decide(status: SandboxStatus, actor: Option<Actor>) -> Self {
        Self {
            decision: Some(actor),
            ..Self::to(status)
        }
    }

    /// Remembers what to return to.
    pub(crate) fn previous(mut self, previous: Option<SandboxStatus>) -> Self {
        self.previous = previous;
        self
    }

    /// Names the template in the making.
    pub(crate) fn snapshot(mut self, template: TemplateId) -> Self {
        self.snapshot = Some(template);
        self
    }

    /// Moves it to a host.
    pub(crate) fn host(mut self, host: HostId) -> Self {
        self.host = Some(host);
        self
    }

    /// Notes why the operation failed.
    pub(crate) fn failure(mut self, failure: Option<Failure>) -> Self {
        self.failure = failure;
        self
    }

    /// It runs (again): sets the times, and forgets the environment that only a repeated start needs.
    pub(crate) fn running(mut self) -> Self {
        self.active = true;
        self.started = true;
        self.envs = true;
        self
    }
}

/// What a listing shows.
#[derive(Debug, Clone)]
pub(crate) struct SandboxFilter {
    /// Only these; empty means all but stopped ones.
    pub(crate) statuses: Vec<SandboxStatus>,
    /// Stopped ones too.
    pub(crate) all: bool,
    /// At most this many.
    pub(crate) limit: u64,
    /// Older than this one.
    pub(crate) before: Option<SandboxId>,
}

/// What became of a new record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Inserted {
    /// It is there.
    Yes,
    /// Its team has been deleted.
    TeamGone,
    /// Its host takes no sandboxes of its template any more.
    HostGone,
}

impl Store {
    /// Adds a record, if its team lives and its host takes sandboxes of its template. A deletion of the team waits for it,
    /// or is seen by it, so no sandbox outlives its team.
    pub(crate) async fn sandbox_insert(&self, sandbox: &Sandbox) -> Result<Inserted, DbErr> {
        let Some(host) = sandbox.host else {
            return Ok(Inserted::HostGone);
        };
        let created = NewEvent::sandbox(
            sandbox.team,
            sandbox.id,
            sandbox.actor,
            None,
            sandbox.status,
            None,
        );
        let transaction = self.db.begin().await?;
        match Entity::insert(row(sandbox)?)
            .exec_without_returning(&transaction)
            .await
        {
            Ok(_) => {}
            // Rows of teams stay when teams are deleted.
            Err(error) if super::is_missing_reference(&error) => return Ok(Inserted::HostGone),
            Err(error) => return Err(error),
        }
        if record_placed(&transaction, created, takes_new(host, sandbox.template)).await? {
            transaction.commit().await?;
            return Ok(Inserted::Yes);
        }
        let team_lives = team_held(&transaction, sandbox.team).await?;
        transaction.rollback().await?;
        Ok(if team_lives {
            Inserted::HostGone
        } else {
            Inserted::TeamGone
        })
    }

    /// One record, whoever owns it.
    pub(crate) async fn sandbox(&self, id: SandboxId) -> Result<Option<Sandbox>, DbErr> {
        Entity::find_by_id(id.0)
            .one(&self.db)
            .await?
            .map(domain)
            .transpose()
    }

    /// One record of a team.
    pub(crate) async fn sandbox_of_team(
        &self,
        team: TeamId,
        id: SandboxId,
    ) -> Result<Option<Sandbox>, DbErr> {
        Entity::find_by_id(id.0)
            .filter(Column::TeamId.eq(team.0))
            .one(&self.db)
            .await?
            .map(domain)
            .transpose()
    }

    /// One record of a team, and the host that it is on.
    pub(crate) async fn sandbox_of_team_with_host(
        &self,
        team: TeamId,
        id: SandboxId,
    ) -> Result<Option<(Sandbox, Option<Host>)>, DbErr> {
        let on_host: RelationDef = Entity::belongs_to(host::Entity)
            .from(Column::HostId)
            .to(host::Column::Id)
            .into();
        Entity::find_by_id(id.0)
            .filter(Column::TeamId.eq(team.0))
            .join(JoinType::LeftJoin, on_host)
            .select_also(host::Entity)
            .one(&self.db)
            .await?
            .map(|(sandbox, host)| Ok((domain(sandbox)?, host.map(hosts::domain).transpose()?)))
            .transpose()
    }

    /// Those of a team's sandboxes that these ids name.
    pub(crate) async fn sandboxes_by_id(
        &self,
        team: TeamId,
        ids: &BTreeSet<SandboxId>,
    ) -> Result<Vec<Sandbox>, DbErr> {
        Entity::find()
            .filter(Column::TeamId.eq(team.0))
            .filter(Column::Id.is_in(ids.iter().map(|id| id.0)))
            .all(&self.db)
            .await?
            .into_iter()
            .map(domain)
            .collect()
    }

    /// A team's sandboxes, newest first.
    pub(crate) async fn sandboxes_of_team(
        &self,
        team: TeamId,
        filter: SandboxFilter,
    ) -> Result<Vec<Sandbox>, DbErr> {
        let SandboxFilter {
            statuses,
            all,
            limit,
            before,
        } = filter;
        let mut query = Entity::find().filter(Column::TeamId.eq(team.0));
        if !statuses.is_empty() {
            query = query.filter(Column::Status.is_in(words(&statuses)));
        } else if !all {
            // Named one by one, an index finds them among all that the team ever had.
            let shown = SandboxStatus::ALL
                .into_iter()
                .filter(|status| *status != SandboxStatus::Stopped);
            query = query.filter(Column::Status.is_in(shown.map(SandboxStatus::as_str)));
        }
        if let Some(before) = before {
            let Some(edge) = self.sandbox_of_team(team, before).await? else {
                return Ok(Vec::new());
            };
            query = query.filter(
                Condition::any().add(Column::CreatedAt.lt(edge.created_at)).add(
                    Condition::all()
                        .add(Column::CreatedAt.eq(edge.created_at))
                        .add(Column::Id.lt(before.0)),
                ),
            );
        }
        query
            .order_by_desc(Column::CreatedAt)
            .order_by_desc(Column::Id)
            .limit(limit)
            .all(&self.db)
            .await?
            .into_iter()
            .map(domain)
            .collect()
    }

    /// All sandboxes of a host in these statuses.
    pub(crate) async fn sandboxes_on_host(
        &self,
        host: HostId,
        statuses: &[SandboxStatus],
    ) -> Result<Vec<Sandbox>, DbErr> {
        Entity::find()
            .filter(Column::HostId.eq(host.0))
            .filter(Column::Status.is_in(words(statuses)))
            .all(&self.db)
            .await?
            .into_iter()
            .map(domain)
            .collect()
    }

    /// Sandboxes with an operation under way since before `older_than`, oldest first.
    pub(crate) async fn sandboxes_in_transit(&self, older_than: Millis) -> Result<Vec<Sandbox>, DbErr> {
        let transient: Vec<_> = SandboxStatus::ALL
            .into_iter()
            .filter(|status| status.is_transient())
            .collect();
        Entity::find()
            .filter(Column::Status.is_in(words(&transient)))
            .filter(Column::StatusAt.lte(older_than))
            .order_by_asc(Column::StatusAt)
            .all(&self.db)
            .await?
            .into_iter()
            .map(domain)
            .collect()
    }

    /// How many sandboxes are in each of these statuses; an index alone tells. Statuses without any are left out.
    pub(crate) async fn sandbox_counts(
        &self,
        statuses: &[SandboxStatus],
    ) -> Result<BTreeMap<String, i64>, DbErr> {
        let rows: Vec<(String, i64)> = Entity::find()
            .select_only()
            .column(Column::Status)
            .column_as(Expr::cust("COUNT(*)"), "count")
            .filter(Column::Status.is_in(words(statuses)))
            .group_by(Column::Status)
            .into_tuple()
            .all(&self.db)
            .await?;
        Ok(rows.into_iter().collect())
    }

    /// Removes the records of sandboxes that ended before a time; returns how many. What they used stays counted.
    pub(crate) async fn sandboxes_prune(&self, before: Millis) -> Result<u64, DbErr> {
        let mut pruned = 0;
        loop {
            let page = self
                .db
                .execute_raw(self.raw(
                    "DELETE FROM sandboxes WHERE status = 'stopped' AND id IN (SELECT id FROM sandboxes \
                     WHERE status = 'stopped' AND status_at < $1 ORDER BY status_at LIMIT $2)",
                    vec![before.into(), big(PRUNED_AT_ONCE).into()],
                ))
                .await?
                .rows_affected();
            pruned += page;
            if page < PRUNED_AT_ONCE {
                return Ok(pruned);
            }
        }
    }

    /// How many sandboxes that are not stopped came from a template.
    pub(crate) async fn sandboxes_from_template(&self, template: TemplateId) -> Result<u64, DbErr> {
        Entity::find()
            .filter(Column::TemplateId.eq(template.0))
            // In the index's words, not as a parameter.
            .filter(Expr::cust("status <> 'stopped'"))
            .count(&self.db)
            .await
    }

    /// The one way a status changes; the event that tells of it is written with it.
    pub(crate) async fn sandbox_change(
        &self,
        id: SandboxId,
        guard: Guard,
        change: Change,
    ) -> Result<Outcome, DbErr> {
        let Change {
            to,
            decision,
            previous,
            snapshot,
            host,
            failure,
            active,
            started,
            envs,
        } = change;
        let now = now();
        let told = NewEvent::sandbox(
            guard.team,
            id,
            decision.unwrap_or(guard.decided),
            Some(guard.status),
            to,
            failure.as_ref().map(|failure| failure.message.as_str()),
        );
        let mut update = Entity::update_many()
            .col_expr(Column::Status, to.as_str().into())
            .col_expr(
                Column::PreviousStatus,
                Expr::value(previous.map(SandboxStatus::as_str)),
            )
            .col_expr(
                Column::SnapshotTemplateId,
                Expr::value(snapshot.map(|template| template.0)),
            )
            .col_expr(Column::UpdatedAt, now.into())
            .col_expr(Column::StatusAt, now.into());
        if let Some(actor) = decision {
            let (kind, actor) = actor_words(actor);
            update = update
                .col_expr(Column::Generation, Expr::col(Column::Generation).add(1))
                .col_expr(Column::ActorType, Expr::value(kind))
                .col_expr(Column::ActorId, Expr::value(actor));
        }
        if let Some(host) = host {
            update = update.col_expr(Column::HostId, host.0.into());
        }
        if let Some(Failure {
            code,
            message,
            console,
            generation,
        }) = failure
        {
            update = update
                .col_expr(Column::ErrorCode, code.into())
                .col_expr(Column::ErrorMessage, message.into())
                .col_expr(Column::ErrorConsole, Expr::value(console))
                .col_expr(Column::ErrorGeneration, big(generation).into());
        }
        if active {
            update = update.col_expr(Column::LastActiveAt, now.into());
        }
        if started {
            let first = Expr::col(Column::StartedAt).if_null(now);
            update = update.col_expr(Column::StartedAt, first);
        }
        if envs {
            update = update.col_expr(Column::Envs, "{}".into());
        }
        let transaction = self.db.begin().await?;
        let result = update
            .filter(Column::Id.eq(id.0))
            .filter(Column::Status.eq(guard.status.as_str()))
            .filter(Column::Generation.eq(big(guard.generation)))
            .exec(&transaction)
            .await?;
        if result.rows_affected == 1 {
            super::usage::apply(&transaction, id, super::usage::usage_step(guard.status, to), now).await?;
            if to == SandboxStatus::Stopped {
                super::sandbox_metrics::forget(&transaction, id).await?;
            }
            // Another generation in the same status (a start on another host) is no change that anybody follows.
            if guard.status != to {
                record(&transaction, told).await?;
            }
            transaction.commit().await?;
            return Ok(Outcome::Updated);
        }
        transaction.rollback().await?;
        let exists = Entity::find_by_id(id.0).count(&self.db).await? > 0;
        Ok(if exists { Outcome::Stale } else { Outcome::Missing })
    }

    /// A host fell silent: whatever lived there is out of reach. Returns which, and whose.
    pub(crate) async fn sandboxes_go_missing(
        &self,
        host: HostId,
        from: &[SandboxStatus],
    ) -> Result<Vec<(SandboxId, TeamId)>, DbErr> {
        let mut gone = Vec::new();
        for sandbox in self.sandboxes_on_host(host, from).await? {
            let change = Change::to(SandboxStatus::Missing).previous(Some(sandbox.status));
            if self
                .sandbox_change(sandbox.id, Guard::from(&sandbox), change)
                .await?
                == Outcome::Updated
            {
                gone.push((sandbox.id, sandbox.team));
            }
        }
        Ok(gone)
    }

    /// Records that a missing sandbox is on another host than was thought, if nothing was decided about it since.
    pub(crate) async fn sandbox_rehome(&self, sandbox: &Sandbox, host: HostId) -> Result<Outcome, DbErr> {
        let changed = Entity::update_many()
            .col_expr(Column::HostId, host.0.into())
            .filter(Column::Id.eq(sandbox.id.0))
            .filter(Column::HostId.eq(sandbox.host.map(|host| host.0)))
            .filter(Column::Status.eq(SandboxStatus::Missing.as_str()))
            .filter(Column::Generation.eq(super::big(sandbox.generation)))
            .exec(&self.db)
            .await?;
        Ok(if changed.rows_affected > 0 {
            Outcome::Updated
        } else {
            Outcome::Stale
        })
    }

    /// Notes that a sandbox was used.
    pub(crate) async fn sandbox_touch(&self, id: SandboxId) -> Result<(), DbErr> {
        let now = now();
        Entity::update_many()
            .col_expr(Column::LastActiveAt, now.into())
            .filter(Column::Id.eq(id.0))
            .exec(&self.db)
            .await
            .map(drop)
    }
}

/// An actor as a row keeps it.
fn actor_words(actor: Option<Actor>) -> (Option<String>, Option<String>) {
    let AuditActor { kind, id } = actor.into();
    (Some(kind.as_str().to_owned()), id)
}

/// Records that one statement removes.
const PRUNED_AT_ONCE: u64 = 500;

fn words(statuses: &[SandboxStatus]) -> Vec<&'static str> {
    statuses.iter().map(|status| status.as_str()).collect()
}

fn row(sandbox: &Sandbox) -> Result<ActiveModel, DbErr> {
    let Sandbox {
        id,
        team,
        host,
        template,
        template_team,
        template_name,
        status,
        previous,
        generation,
        snapshot,
        vcpus,
        memory_mb,
        disk_size_mb,
        timeout_sec,
        metadata,
        envs,
        failure,
        created_at,
        started_at,
        last_active_at,
        updated_at,
        status_at,
        actor,
    } = sandbox.clone();
    let (actor_type, actor_id) = actor_words(actor);
    let json = |map: &BTreeMap<String, String>| {
        serde_json::to_string(map).map_err(|error| DbErr::Json(error.to_string()))
    };
    Ok(ActiveModel {
        id: Set(id.0),
        team_id: Set(team.0),
        host_id: Set(host.map(|host| host.0)),
        template_id: Set(template.0),
        template_team_id: Set(template_team.0),
        template_name: Set(template_name),
        status: Set(status.as_str().to_owned()),
        previous_status: Set(previous.map(|status| status.as_str().to_owned())),
        generation: Set(big(generation)),
        snapshot_template_id: Set(snapshot.map(|template| template.0)),
        vcpus: Set(int(vcpus)),
        memory_mb: Set(int(memory_mb)),
        disk_size_mb: Set(int(disk_size_mb)),
        timeout_sec: Set(int(timeout_sec)),
        metadata: Set(json(&metadata)?),
        envs: Set(Hidden(json(&envs)?)),
        error_code: Set(failure.as_ref().map(|failure| failure.code.clone())),
        error_message: Set(failure.as_ref().map(|failure| failure.message.clone())),
        error_console: Set(failure.as_ref().and_then(|failure| failure.console.clone())),
        error_generation: Set(failure.as_ref().map(|failure| big(failure.generation))),
        created_at: Set(created_at),
        started_at: Set(started_at),
        last_active_at: Set(last_active_at),
        updated_at: Set(updated_at),
        status_at: Set(status_at),
        actor_type: Set(actor_type),
        actor_id: Set(actor_id),
    })
}

fn domain(row: Model) -> Result<Sandbox, DbErr> {
    let Model {
        id,
        team_id,
        host_id,
        template_id,
        template_team_id,
        template_name,
        status,
        previous_status,
        generation,
        snapshot_template_id,
        vcpus,
        memory_mb,
        disk_size_mb,
        timeout_sec,
        metadata,
        envs,
        error_code,
        error_message,
        error_console,
        error_generation,
        created_at,
        started_at,
        last_active_at,
        updated_at,
        status_at,
        actor_type,
        actor_id,
    } = row;
    let word = |word: String| {
        word.parse::<SandboxStatus>()
            .map_err(|_| corrupt("sandboxes", "status"))
    };
    let json = |text: &str| serde_json::from_str(text).map_err(|_| corrupt("sandboxes", "metadata"));
    Ok(Sandbox {
        id: SandboxId(id),
        team: TeamId(team_id),
        host: host_id.map(HostId),
        template: TemplateId(template_id),
        template_team: TeamId(template_team_id),
        template_name,
        status: word(status)?,
        previous: previous_status.map(word).transpose()?,
        generation: unsigned(generation),
        snapshot: snapshot_template_id.map(TemplateId),
        vcpus: unsigned(vcpus),
        memory_mb: unsigned(memory_mb),
        disk_size_mb: unsigned(disk_size_mb),
        timeout_sec: unsigned(timeout_sec),
        metadata: json(&metadata)?,
        envs: json(&envs.0)?,
        failure: error_code.map(|code| Failure {
            code,
            message: error_message.unwrap_or_default(),
            console: error_console,
            generation: unsigned(error_generation.unwrap_or_default()),
        }),
        created_at,
        started_at,
        last_active_at,
        updated_at,
        status_at,
        actor: actor_type
            .zip(actor_id)
            .and_then(|(kind, id)| Actor::parse(&kind, &id)),
    })
}
