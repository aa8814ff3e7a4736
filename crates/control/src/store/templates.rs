//! Templates, their aliases, and which host holds their files.

use sea_orm::ActiveValue::Set;
use sea_orm::sea_query::{Expr, OnConflict};
use sea_orm::{
    ActiveModelTrait, ColumnTrait, Condition, DbErr, EntityTrait, QueryFilter, QueryOrder, QuerySelect,
    TransactionTrait,
};

use super::entity::template::{ActiveModel, Column, Entity, Model};
use super::entity::{template_alias, template_host};
use super::events::record;
use super::{Store, big, corrupt, int, unsigned};
use crate::domain::event::{EventKind, EventOutcome, EventPayload, NewEvent};
use crate::domain::{Actor, Host, HostId, TeamId, Template, TemplateId, TemplateKind, TemplateStatus, now};

/// Why a snapshot failed whose sandbox is not making it any more.
const ABANDONED: &str = "its sandbox ended or changed before the snapshot was made";

/// Marks a template whose files are being removed; clients do not see it any more.
pub(super) const DELETING: &str = "deleting";

pub(crate) fn status_word(status: TemplateStatus) -> &'static str {
    match status {
        TemplateStatus::Building => "building",
        TemplateStatus::Ready => "ready",
        TemplateStatus::Failed => "failed",
    }
}

pub(super) fn kind_word(kind: TemplateKind) -> &'static str {
    match kind {
        TemplateKind::Base => "base",
        TemplateKind::Snapshot => "snapshot",
    }
}

/// What a host says of a snapshot that it made.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Made {
    pub(crate) size_bytes: u64,
    pub(crate) vcpus: u32,
    pub(crate) memory_mb: u32,
    pub(crate) disk_size_mb: u32,
}

/// What became of a snapshot that its host finished.
#[must_use = "a snapshot without a name has to go"]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Finish {
    /// It is ready under its name.
    Done,
    /// Another one that is being made has the name.
    Taken,
    /// Nobody wants it any more.
    Gone,
}

impl Store {
    /// A template that a team may use, by id: its own or the platform's.
    pub(crate) async fn template_visible(
        &self,
        team: TeamId,
        id: TemplateId,
    ) -> Result<Option<Template>, DbErr> {
        Entity::find_by_id(id.0)
            .filter(Column::TeamId.is_in([team.0, TeamId::PLATFORM.0]))
            .filter(Column::Status.ne(DELETING))
            .one(&self.db)
            .await?
            .map(domain)
            .transpose()
    }

    /// A template by id, whoever owns it and whatever becomes of it.
    pub(crate) async fn template(&self, id: TemplateId) -> Result<Option<Template>, DbErr> {
        Entity::find_by_id(id.0)
            .filter(Column::Status.ne(DELETING))
            .one(&self.db)
            .await?
            .map(domain)
            .transpose()
    }

    /// A team's own template by name.
    pub(crate) async fn template_by_name(&self, team: TeamId, name: &str) -> Result<Option<Template>, DbErr> {
        Entity::find()
            .filter(Column::TeamId.eq(team.0))
            .filter(Column::Name.eq(name))
            .filter(Column::Status.ne(DELETING))
            .one(&self.db)
            .await?
            .map(domain)
            .transpose()
    }

    /// The template that a team means by a name: its own before the platform's.
    pub(crate) async fn template_meant(&self, team: TeamId, name: &str) -> Result<Option<Template>, DbErr> {
        let mut found = Entity::find()
            .filter(Column::TeamId.is_in([team.0, TeamId::PLATFORM.0]))
            .filter(Column::Name.eq(name))
            .filter(Column::Status.ne(DELETING))
            .all(&self.db)
            .await?;
        found.sort_by_key(|row| row.team_id != team.0);
        found.into_iter().next().map(domain).transpose()
    }

    /// The template name behind an alias.
    pub(crate) async fn template_alias(&self, alias: &str) -> Result<Option<String>, DbErr> {
        Ok(template_alias::Entity::find_by_id(alias.to_owned())
            .one(&self.db)
            .await?
            .map(|row| row.template_name))
    }

    /// Points an alias at a template name.
    pub(crate) async fn template_alias_set(&self, alias: &str, template_name: &str) -> Result<(), DbErr> {
        template_alias::Entity::insert(template_alias::ActiveModel {
            alias: Set(alias.to_owned()),
            template_name: Set(template_name.to_owned()),
        })
        .on_conflict(
            OnConflict::column(template_alias::Column::Alias)
                .update_column(template_alias::Column::TemplateName)
                .to_owned(),
        )
        .exec_without_returning(&self.db)
        .await
        .map(drop)
    }

    /// What a team sees: its own templates and the platform's, newest first.
    pub(crate) async fn templates_visible(
        &self,
        team: TeamId,
        kind: Option<TemplateKind>,
    ) -> Result<Vec<Template>, DbErr> {
        let mut query = Entity::find()
            .filter(Column::TeamId.is_in([team.0, TeamId::PLATFORM.0]))
            .filter(Column::Status.ne(DELETING))
            // A replacement in the making is not listed beside what it replaces.
            .filter(Condition::any().add(Column::FinalName.is_null()));
        if let Some(kind) = kind {
            query = query.filter(Column::Kind.eq(kind_word(kind)));
        }
        query
            .order_by_desc(Column::CreatedAt)
            .order_by_desc(Column::Id)
            .limit(1000)
            .all(&self.db)
            .await?
            .into_iter()
            .map(domain)
            .collect()
    }

    /// Adds a template in the making. With `replaces`, it gets a provisional name until it is ready.
    /// Fails with a duplicate error when the name is taken; `false` when the team does not live.
    pub(crate) async fn template_insert(
        &self,
        template: &Template,
        replaces: Option<TemplateId>,
    ) -> Result<bool, DbErr> {
        let transaction = self.db.begin().await?;
        let (name, final_name) = match replaces {
            Some(_) => (
                format!("{}@{}", template.name, template.id),
                Some(template.name.clone()),
            ),
            None => (template.name.clone(), None),
        };
        ActiveModel {
            id: Set(template.id.0),
            team_id: Set(template.team.0),
            name: Set(name),
            final_name: Set(final_name),
            replaces: Set(replaces.map(|id| id.0)),
            kind: Set(kind_word(template.kind).to_owned()),
            status: Set(status_word(template.status).to_owned()),
            detail: Set(template.detail.clone()),
            progress_pct: Set(int(template.progress_pct)),
            vcpus: Set(int(template.vcpus)),
            memory_mb: Set(int(template.memory_mb)),
            disk_size_mb: Set(int(template.disk_size_mb)),
            size_bytes: Set(big(template.size_bytes)),
            created_at: Set(template.created_at),
            updated_at: Set(template.created_at),
        }
        .insert(&transaction)
        .await?;
        if !super::teams::team_held(&transaction, template.team).await? {
            transaction.rollback().await?;
            return Ok(false);
        }
        transaction.commit().await?;
        Ok(true)
    }

    /// A snapshot is done: stores its sizes and its host, and puts it in the place of what holds its name by now.
    pub(crate) async fn template_finish(
        &self,
        id: TemplateId,
        host: HostId,
        made: Made,
        actor: Option<Actor>,
    ) -> Result<Finish, DbErr> {
        let mut refused = None;
        // Another snapshot can take the name between the look at its holder and the renaming; looking again finds it.
        for _ in 0..4 {
            match self.template_try_finish(id, host, made, actor).await {
                Err(error) if super::is_duplicate(&error) => refused = Some(error),
                other => return other,
            }
        }
        tracing::warn!(template = %id, error = ?refused, "a snapshot's name is taken again and again");
        Ok(Finish::Taken)
    }

    async fn template_try_finish(
        &self,
        id: TemplateId,
        host: HostId,
        made: Made,
        actor: Option<Actor>,
    ) -> Result<Finish, DbErr> {
        let Some(row) = Entity::find_by_id(id.0)
            .filter(Column::Status.ne(DELETING))
            .one(&self.db)
            .await?
        else {
            return Ok(Finish::Gone);
        };
        let Made {
            size_bytes,
            vcpus,
            memory_mb,
            disk_size_mb,
        } = made;
        let now = now();
        let transaction = self.db.begin().await?;
        let updated = Entity::update_many()
            .col_expr(Column::Status, status_word(TemplateStatus::Ready).into())
            .col_expr(Column::ProgressPct, 100.into())
            .col_expr(Column::Detail, "".into())
            .col_expr(Column::SizeBytes, big(size_bytes).into())
            .col_expr(Column::Vcpus, int(vcpus).into())
            .col_expr(Column::MemoryMb, int(memory_mb).into())
            .col_expr(Column::DiskSizeMb, int(disk_size_mb).into())
            .col_expr(Column::UpdatedAt, now.into())
            .filter(Column::Id.eq(id.0))
            .filter(Column::Status.ne(DELETING))
            .exec(&transaction)
            .await?;
        if updated.rows_affected == 0 {
            transaction.rollback().await?;
            return Ok(Finish::Gone);
        }
        if let Some(name) = &row.final_name {
            // Not what held the name when this began: it may have been deleted, replaced or made anew since.
            let holder = Entity::find()
                .filter(Column::TeamId.eq(row.team_id))
                .filter(Column::Name.eq(name))
                .one(&transaction)
                .await?;
            if let Some(holder) = holder {
                if holder.status == status_word(TemplateStatus::Building) {
                    transaction.rollback().await?;
                    return Ok(Finish::Taken);
                }
                Entity::update_many()
                    .col_expr(Column::Status, DELETING.into())
                    .col_expr(Column::Name, format!("{name}~{}", TemplateId(holder.id)).into())
                    .col_expr(Column::UpdatedAt, now.into())
                    .filter(Column::Id.eq(holder.id))
                    .filter(Column::Status.eq(holder.status))
                    .exec(&transaction)
                    .await?;
            }
            Entity::update_many()
                .col_expr(Column::Name, name.into())
                .col_expr(Column::FinalName, Expr::value(None::<String>))
                .col_expr(Column::Replaces, Expr::value(None::<sea_orm::prelude::Uuid>))
                .filter(Column::Id.eq(id.0))
                .exec(&transaction)
                .await?;
        }
        template_host::Entity::insert(holder(id, host, TemplateStatus::Ready, "", 100, size_bytes))
            .on_conflict(holder_conflict())
            .exec_without_returning(&transaction)
            .await?;
        // Repeated after a crash, it is no news any more.
        if row.kind == kind_word(TemplateKind::Snapshot) && row.status != status_word(TemplateStatus::Ready) {
            let name = row.final_name.as_deref().unwrap_or(&row.name);
            record(
                &transaction,
                snapshot_event(EventKind::SnapshotCreate, id, TeamId(row.team_id), name, actor),
            )
            .await?;
        }
        transaction.commit().await?;
        Ok(Finish::Done)
    }

    /// Forgets a template's row; its holders' rows go with it. A snapshot that clients could see until now is told of
    /// as deleted, one that was still being made as failed, if `failure` says why.
    pub(crate) async fn template_forget(
        &self,
        id: TemplateId,
        actor: Option<Actor>,
        failure: Option<&str>,
    ) -> Result<(), DbErr> {
        let Some(row) = Entity::find_by_id(id.0).one(&self.db).await? else {
            return Ok(());
        };
        let transaction = self.db.begin().await?;
        let deleted = Entity::delete_by_id(id.0).exec(&transaction).await?;
        // One that is being deleted was told of when that began.
        let told = (deleted.rows_affected == 1 && row.status != DELETING)
            .then(|| farewell(&row, &row.name, actor, failure))
            .flatten();
        if let Some(event) = told {
            record(&transaction, event).await?;
        }
        transaction.commit().await
    }

    /// Hides a template from clients and frees its name, before its files are removed. Told of as in
    /// [`Store::template_forget`].
    pub(crate) async fn template_mark_deleting(
        &self,
        id: TemplateId,
        name: &str,
        actor: Option<Actor>,
        failure: Option<&str>,
    ) -> Result<bool, DbErr> {
        let transaction = self.db.begin().await?;
        let updated = Entity::update_many()
            .col_expr(Column::Status, DELETING.into())
            .col_expr(Column::Name, format!("{name}~{id}").into())
            .col_expr(Column::UpdatedAt, now().into())
            .filter(Column::Id.eq(id.0))
            .filter(Column::Status.ne(DELETING))
            .exec(&transaction)
            .await?;
        let done = updated.rows_affected == 1;
        if done
            && let Some(row) = Entity::find_by_id(id.0).one(&transaction).await?
            && let Some(event) = farewell(&row, name, actor, failure)
        {
            record(&transaction, event).await?;
        }
        transaction.commit().await?;
        Ok(done)
    }

    /// Templates whose files are still to be removed.
    pub(crate) async fn templates_deleting(&self) -> Result<Vec<(TemplateId, TeamId)>, DbErr> {
        let rows = Entity::find()
            .filter(Column::Status.eq(DELETING))
            .all(&self.db)
            .await?;
        Ok(rows
            .into_iter()
            .map(|row| (TemplateId(row.id), TeamId(row.team_id)))
            .collect())
    }

    /// The hosts that hold a template's files.
    pub(crate) async fn template_holders(&self, id: TemplateId) -> Result<Vec<HostId>, DbErr> {
        let rows = template_host::Entity::find()
            .filter(template_host::Column::TemplateId.eq(id.0))
            .all(&self.db)
            .await?;
        Ok(rows.into_iter().map(|row| HostId(row.host_id)).collect())
    }

    /// A host may hold files of a template from now on.
    pub(crate) async fn template_holder_add(&self, id: TemplateId, host: HostId) -> Result<(), DbErr> {
        template_host::Entity::insert(holder(id, host, TemplateStatus::Building, "", 0, 0))
            .on_conflict(holder_conflict())
            .exec_without_returning(&self.db)
            .await
            .map(drop)
    }

    /// Gives up snapshots in the making that no sandbox is making any more; their files are to go. Returns
    /// which, and whose.
    pub(crate) async fn templates_abandon(
        &self,
        older_than: i64,
    ) -> Result<Vec<(TemplateId, TeamId)>, DbErr> {
        use super::entity::sandbox;
        use sea_orm::sea_query::Query;
        let in_the_making = Query::select()
            .column(sandbox::Column::SnapshotTemplateId)
            .from(sandbox::Entity)
            .and_where(sandbox::Column::SnapshotTemplateId.is_not_null())
            .to_owned();
        let abandoned = Entity::find()
            .filter(Column::Kind.eq(kind_word(TemplateKind::Snapshot)))
            .filter(Column::Status.eq(status_word(TemplateStatus::Building)))
            .filter(Column::CreatedAt.lte(older_than))
            .filter(Column::Id.not_in_subquery(in_the_making))
            .all(&self.db)
            .await?;
        let mut given_up = Vec::new();
        for row in abandoned {
            let id = TemplateId(row.id);
            let marked = self
                .template_mark_deleting(id, &row.name, None, Some(ABANDONED))
                .await?;
            if marked {
                given_up.push((id, TeamId(row.team_id)));
            }
        }
        Ok(given_up)
    }

    /// A host no longer holds a template.
    pub(crate) async fn template_holder_remove(&self, id: TemplateId, host: HostId) -> Result<(), DbErr> {
        template_host::Entity::delete_by_id((id.0, host.0))
            .exec(&self.db)
            .await
            .map(drop)
    }

    /// Stores what a host says about a platform template, and derives the template's own state:
    /// ready as soon as any host has it. A team's own host says nothing about how the platform fares with it.
    pub(crate) async fn template_on_host(
        &self,
        id: TemplateId,
        host: &Host,
        status: TemplateStatus,
        detail: &str,
        progress_pct: u32,
        size_bytes: u64,
    ) -> Result<(), DbErr> {
        // Only the platform's templates live on hosts by themselves.
        let platform = Entity::find_by_id(id.0)
            .filter(Column::TeamId.eq(TeamId::PLATFORM.0))
            .one(&self.db)
            .await?;
        let Some(known) = platform else { return Ok(()) };
        let held = template_host::Entity::find_by_id((id.0, host.id.0))
            .one(&self.db)
            .await?;
        // Heartbeats mostly repeat what the last one said, and reading is cheaper than writing.
        let repeated = held.is_some_and(|held| {
            held.status == status_word(status)
                && held.detail == detail
                && held.progress_pct == int(progress_pct.min(100))
                && held.size_bytes == big(size_bytes)
        });
        if !repeated {
            template_host::Entity::insert(holder(id, host.id, status, detail, progress_pct, size_bytes))
                .on_conflict(holder_conflict())
                .exec_without_returning(&self.db)
                .await?;
        }
        let ready = |word: &str| word == status_word(TemplateStatus::Ready);
        if host.owner.team().is_some() && (status != TemplateStatus::Ready || ready(&known.status)) {
            return Ok(());
        }
        let mut update = Entity::update_many()
            .col_expr(Column::Status, status_word(status).into())
            .col_expr(Column::Detail, detail.into())
            .col_expr(Column::ProgressPct, int(progress_pct.min(100)).into())
            .col_expr(Column::UpdatedAt, now().into())
            .filter(Column::Id.eq(id.0));
        if status == TemplateStatus::Ready {
            update = update.col_expr(Column::SizeBytes, big(size_bytes).into());
        } else {
            update = update.filter(Column::Status.ne(status_word(TemplateStatus::Ready)));
        }
        let same = known.status == status_word(status)
            && known.detail == detail
            && known.progress_pct == int(progress_pct.min(100))
            && (status != TemplateStatus::Ready || known.size_bytes == big(size_bytes));
        if !same {
            update.exec(&self.db).await?;
        }
        Ok(())
    }
}

/// What is told of a template that goes, if anything: base templates come and go with their hosts, and one in the making
/// without a `failure` had not begun, or goes with its team.
fn farewell(row: &Model, name: &str, actor: Option<Actor>, failure: Option<&str>) -> Option<NewEvent> {
    if row.kind != kind_word(TemplateKind::Snapshot) {
        return None;
    }
    // The status may have been overwritten by now; the progress stays.
    let made = row.progress_pct == 100;
    let kind = if made {
        EventKind::SnapshotDelete
    } else {
        EventKind::SnapshotCreate
    };
    let error = failure.filter(|_| !made);
    if !made && error.is_none() {
        return None;
    }
    // The name that it was to have, rather than the provisional one of a replacement.
    let name = row.final_name.as_deref().unwrap_or(name);
    let mut event = snapshot_event(kind, TemplateId(row.id), TeamId(row.team_id), name, actor);
    if let Some(error) = error {
        event.outcome = Some(EventOutcome::Error);
        event.payload.error = Some(error.to_owned());
    }
    Some(event)
}

fn snapshot_event(
    kind: EventKind,
    id: TemplateId,
    team: TeamId,
    name: &str,
    actor: Option<Actor>,
) -> NewEvent {
    NewEvent {
        team,
        kind,
        outcome: Some(EventOutcome::Success),
        resource: id.to_string(),
        payload: EventPayload {
            name: Some(name.to_owned()),
            ..EventPayload::default()
        },
        actor,
    }
}

fn holder(
    id: TemplateId,
    host: HostId,
    status: TemplateStatus,
    detail: &str,
    progress_pct: u32,
    size_bytes: u64,
) -> template_host::ActiveModel {
    template_host::ActiveModel {
        template_id: Set(id.0),
        host_id: Set(host.0),
        status: Set(status_word(status).to_owned()),
        detail: Set(detail.to_owned()),
        progress_pct: Set(int(progress_pct.min(100))),
        size_bytes: Set(big(size_bytes)),
        updated_at: Set(now()),
    }
}

fn holder_conflict() -> OnConflict {
    use template_host::Column;
    OnConflict::columns([Column::TemplateId, Column::HostId])
        .update_columns([
            Column::Status,
            Column::Detail,
            Column::ProgressPct,
            Column::SizeBytes,
            Column::UpdatedAt,
        ])
        .to_owned()
}

pub(super) fn domain(row: Model) -> Result<Template, DbErr> {
    let kind = match row.kind.as_str() {
        "base" => TemplateKind::Base,
        "snapshot" => TemplateKind::Snapshot,
        _ => return Err(corrupt("templates", "kind")),
    };
    let status = match row.status.as_str() {
        "building" => TemplateStatus::Building,
        "ready" => TemplateStatus::Ready,
        "failed" => TemplateStatus::Failed,
        _ => return Err(corrupt("templates", "status")),
    };
    Ok(Template {
        id: TemplateId(row.id),
        team: TeamId(row.team_id),
        name: row.final_name.unwrap_or(row.name),
        kind,
        status,
        detail: row.detail,
        progress_pct: unsigned(row.progress_pct),
        vcpus: unsigned(row.vcpus),
        memory_mb: unsigned(row.memory_mb),
        disk_size_mb: unsigned(row.disk_size_mb),
        size_bytes: unsigned(row.size_bytes),
        created_at: row.created_at,
    })
}
