//! Deletions: teams with everything that is theirs, and accounts.
//!
//! A team is marked first (from then on it is nowhere to be seen, and nothing can be added to it), then emptied, then
//! marked as emptied. Each step can be repeated, so whoever finds a team that is marked and not emptied goes on.

use std::collections::BTreeSet;

use sea_orm::sea_query::{Expr, ExprTrait, Query};
use sea_orm::{
    ColumnTrait, ConnectionTrait, DbErr, EntityTrait, QueryFilter, QueryOrder, QuerySelect, TransactionTrait,
};

use super::admin::another_admin;
use super::entity::{api_key, membership, sandbox, team, template, user};
use super::teams::{lock_members, other_owners};
use super::templates::DELETING;
use super::{DatabaseTransaction, Store};
use crate::domain::membership::Refused;
use crate::domain::{KeyId, Millis, Role, SandboxId, SandboxStatus, TeamId, TemplateId, UserId, now};

/// A team that is marked and not emptied yet.
const PURGING: &str = "purging";
/// A team that is gone but for its row, which keeps its slug taken.
const PURGED: &str = "purged";

/// Rows that a step takes at once.
const PAGE: u64 = 500;

/// Tables whose rows go with their team, besides keys and memberships. What teams used stays: it may still have to be
/// paid.
const TEAM_TABLES: [&str; 3] = ["channels", "metric_snapshots", "sandbox_metrics"];
/// Those of them in which something may still arrive for a team that is gone, and stay. Points of sandboxes go with these,
/// and by their age within a day; they are too many to look through.
const LATE_TABLES: [&str; 2] = ["channels", "metric_snapshots"];

/// What became of an account's deletion.
#[must_use = "teams that went with the account have to be emptied"]
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum AccountDeletion {
    /// Done; these teams went with it and have to be emptied.
    Deleted(Vec<TeamId>),
    /// There is no such account.
    Missing,
    /// The platform would be without an admin.
    LastAdmin,
    /// The user's teams kept changing.
    Busy,
}

/// Marks a team, under its lock.
async fn mark(transaction: &DatabaseTransaction, id: TeamId) -> Result<(), DbErr> {
    team::Entity::update_many()
        .col_expr(team::Column::DeletedAt, now().into())
        .col_expr(team::Column::Deletion, PURGING.into())
        .filter(team::Column::Id.eq(id.0))
        .filter(team::Column::DeletedAt.is_null())
        .exec(transaction)
        .await
        .map(drop)
}

/// The live teams that a user is in, in the order in which they are locked.
async fn teams_to_lock(db: &impl ConnectionTrait, user: UserId) -> Result<BTreeSet<uuid::Uuid>, DbErr> {
    let live = Query::select()
        .column(team::Column::Id)
        .from(team::Entity)
        .and_where(team::Column::DeletedAt.is_null())
        .to_owned();
    let ids: Vec<uuid::Uuid> = membership::Entity::find()
        .select_only()
        .column(membership::Column::TeamId)
        .filter(membership::Column::UserId.eq(user.0))
        .filter(membership::Column::TeamId.in_subquery(live))
        .into_tuple()
        .all(db)
        .await?;
    Ok(ids.into_iter().collect())
}

impl Store {
    /// Marks a team as deleted; with `owner`, only if that user owns it at the moment.
    pub(crate) async fn team_mark_deleted(
        &self,
        id: TeamId,
        owner: Option<UserId>,
    ) -> Result<Result<(), Refused>, DbErr> {
        let transaction = self.db.begin().await?;
        if !lock_members(&transaction, id).await? {
            transaction.rollback().await?;
            return Ok(Err(Refused::NotInTeam));
        }
        if let Some(owner) = owner {
            let row = membership::Entity::find_by_id((owner.0, id.0))
                .one(&transaction)
                .await?;
            let refused = match row {
                None => Some(Refused::NotInTeam),
                Some(row) if row.role != Role::Owner.as_str() => Some(Refused::NeedsOwner),
                Some(_) => None,
            };
            if let Some(refused) = refused {
                transaction.rollback().await?;
                return Ok(Err(refused));
            }
        }
        mark(&transaction, id).await?;
        transaction.commit().await?;
        Ok(Ok(()))
    }

    /// Teams that are marked and not emptied yet.
    pub(crate) async fn teams_purging(&self) -> Result<Vec<TeamId>, DbErr> {
        let ids: Vec<uuid::Uuid> = team::Entity::find()
            .select_only()
            .column(team::Column::Id)
            .filter(team::Column::Deletion.eq(PURGING))
            .limit(PAGE)
            .into_tuple()
            .all(&self.db)
            .await?;
        Ok(ids.into_iter().map(TeamId).collect())
    }

    /// Deletes the rows of a marked team that need nothing but deletion. Returns the keys that went.
    pub(crate) async fn team_purge_rows(&self, id: TeamId) -> Result<Vec<KeyId>, DbErr> {
        let keys: Vec<uuid::Uuid> = api_key::Entity::find()
            .select_only()
            .column(api_key::Column::Id)
            .filter(api_key::Column::TeamId.eq(id.0))
            .into_tuple()
            .all(&self.db)
            .await?;
        api_key::Entity::delete_many()
            .filter(api_key::Column::TeamId.eq(id.0))
            .exec(&self.db)
            .await?;
        for table in TEAM_TABLES {
            self.purge_table(table, Expr::col("team_id").eq(id.0)).await?;
        }
        membership::Entity::delete_many()
            .filter(membership::Column::TeamId.eq(id.0))
            .exec(&self.db)
            .await?;
        Ok(keys.into_iter().map(KeyId).collect())
    }

    async fn purge_table(&self, table: &'static str, rows: Expr) -> Result<(), DbErr> {
        let delete = Query::delete().from_table(table).and_where(rows).to_owned();
        let statement = self.db.get_database_backend().build(&delete);
        self.db.execute_raw(statement).await.map(drop)
    }

    /// Removes what was written for a team after it had been emptied: a sample that was under way, say. That happens
    /// within moments, so only teams that were deleted after `since` are looked at.
    pub(crate) async fn deleted_teams_forget(&self, since: Millis) -> Result<(), DbErr> {
        for table in LATE_TABLES {
            let deleted = Query::select()
                .column(team::Column::Id)
                .from(team::Entity)
                .and_where(team::Column::DeletedAt.gte(since))
                .to_owned();
            self.purge_table(table, Expr::col("team_id").in_subquery(deleted))
                .await?;
        }
        Ok(())
    }

    /// A team's sandboxes that are not stopped, oldest first, up to a page after the given one.
    pub(crate) async fn sandboxes_left(
        &self,
        id: TeamId,
        after: Option<SandboxId>,
    ) -> Result<Vec<SandboxId>, DbErr> {
        let mut query = sandbox::Entity::find()
            .select_only()
            .column(sandbox::Column::Id)
            .filter(sandbox::Column::TeamId.eq(id.0))
            .filter(sandbox::Column::Status.ne(SandboxStatus::Stopped.as_str()));
        if let Some(after) = after {
            query = query.filter(sandbox::Column::Id.gt(after.0));
        }
        let ids: Vec<uuid::Uuid> = query
            .order_by_asc(sandbox::Column::Id)
            .limit(PAGE)
            .into_tuple()
            .all(&self.db)
            .await?;
        Ok(ids.into_iter().map(SandboxId).collect())
    }

    /// Hides a team's templates and frees their names; those in the making only with `building`. Returns those that
    /// were not hidden before.
    pub(crate) async fn team_templates_hide(
        &self,
        id: TeamId,
        building: bool,
    ) -> Result<Vec<TemplateId>, DbErr> {
        let mut query = template::Entity::find()
            .filter(template::Column::TeamId.eq(id.0))
            .filter(template::Column::Status.ne(DELETING));
        if !building {
            query = query.filter(template::Column::Status.ne("building"));
        }
        let mut hidden = Vec::new();
        for row in query.all(&self.db).await? {
            let template = TemplateId(row.id);
            if self
                .template_mark_deleting(template, &row.name, None, None)
                .await?
            {
                hidden.push(template);
            }
        }
        Ok(hidden)
    }

    /// A team's templates whose files are to be removed.
    pub(crate) async fn team_templates_hidden(&self, id: TeamId) -> Result<Vec<TemplateId>, DbErr> {
        let ids: Vec<uuid::Uuid> = template::Entity::find()
            .select_only()
            .column(template::Column::Id)
            .filter(template::Column::TeamId.eq(id.0))
            .filter(template::Column::Status.eq(DELETING))
            .into_tuple()
            .all(&self.db)
            .await?;
        Ok(ids.into_iter().map(TemplateId).collect())
    }

    /// Notes that a marked team is empty, if it is. Returns whether it is.
    pub(crate) async fn team_purged(&self, id: TeamId) -> Result<bool, DbErr> {
        let sandboxes = Query::select()
            .column(sandbox::Column::Id)
            .from(sandbox::Entity)
            .and_where(sandbox::Column::TeamId.eq(id.0))
            .and_where(sandbox::Column::Status.ne(SandboxStatus::Stopped.as_str()))
            .to_owned();
        let templates = Query::select()
            .column(template::Column::Id)
            .from(template::Entity)
            .and_where(template::Column::TeamId.eq(id.0))
            .to_owned();
        let updated = team::Entity::update_many()
            .col_expr(team::Column::Deletion, PURGED.into())
            .filter(team::Column::Id.eq(id.0))
            .filter(team::Column::Deletion.eq(PURGING))
            .filter(Expr::exists(sandboxes).not())
            .filter(Expr::exists(templates).not())
            .exec(&self.db)
            .await?;
        Ok(updated.rows_affected == 1)
    }

    /// Marks an account as deleted, ends its sessions, and marks the teams that it alone owned.
    ///
    /// All its teams are locked first, in one order: nobody can leave one of them to this user meanwhile. Should they have
    /// joined another in between, it is begun again.
    pub(crate) async fn account_mark_deleted(&self, id: UserId) -> Result<AccountDeletion, DbErr> {
        for _ in 0..8 {
            let teams = teams_to_lock(&self.db, id).await?;
            let transaction = self.db.begin().await?;
            // The platform's lock protects the last admin; its id is the smallest, so the order holds.
            lock_members(&transaction, TeamId::PLATFORM).await?;
            for team in &teams {
                lock_members(&transaction, TeamId(*team)).await?;
            }
            let now = now();
            let marked = user::Entity::update_many()
                .col_expr(user::Column::DeletedAt, now.into())
                .col_expr(user::Column::UpdatedAt, now.into())
                .col_expr(
                    user::Column::SessionVersion,
                    Expr::col(user::Column::SessionVersion).add(1),
                )
                .filter(user::Column::Id.eq(id.0))
                .filter(user::Column::DeletedAt.is_null())
                .exec(&transaction)
                .await?;
            if marked.rows_affected == 0 {
                transaction.rollback().await?;
                return Ok(AccountDeletion::Missing);
            }
            // Read after the account's row is held: whoever adds it to a team waits for that row.
            let current = teams_to_lock(&transaction, id).await?;
            if !current.is_subset(&teams) {
                transaction.rollback().await?;
                continue;
            }
            if self.is_admin(&transaction, id).await? && !another_admin(&transaction, id).await? {
                transaction.rollback().await?;
                return Ok(AccountDeletion::LastAdmin);
            }
            let mut gone = Vec::new();
            for team in current.into_iter().map(TeamId) {
                let owns = membership::Entity::find_by_id((id.0, team.0))
                    .one(&transaction)
                    .await?
                    .is_some_and(|row| row.role == Role::Owner.as_str());
                if owns && other_owners(&transaction, team, id).await? == 0 {
                    mark(&transaction, team).await?;
                    gone.push(team);
                }
            }
            transaction.commit().await?;
            return Ok(AccountDeletion::Deleted(gone));
        }
        Ok(AccountDeletion::Busy)
    }

    /// Deletes rows of accounts that were marked before, a page of them; memberships, identities and permissions go
    /// along, and what they made remains without a creator. Returns whose: where several processes do this at once,
    /// each names those that it deleted itself. None means that nothing was left for this one.
    pub(crate) async fn accounts_hard_delete(&self, marked_before: Millis) -> Result<Vec<UserId>, DbErr> {
        let page = Query::select()
            .column(user::Column::Id)
            .from(user::Entity)
            .and_where(user::Column::DeletedAt.lte(marked_before))
            .limit(PAGE)
            .to_owned();
        let deletion = Query::delete()
            .from_table(user::Entity)
            .and_where(user::Column::Id.in_subquery(page))
            .and_where(user::Column::DeletedAt.lte(marked_before))
            .returning_col(user::Column::Id)
            .to_owned();
        let statement = self.db.get_database_backend().build(&deletion);
        let rows = self.db.query_all_raw(statement).await?;
        rows.iter()
            .map(|row| row.try_get_by_index(0).map(UserId))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_the_team_s_own_rows_go() {
        let (_dir, store, owner) = Store::scratch("aaaaaa-aaaaaa").await;
        let mut teams = Vec::new();
        for slug in ["bbbbbb-bbbbbb", "cccccc-cccccc"] {
            let (team, _) = store
                .team_create("T", slug, owner)
                .await
                .expect("a database")
                .expect("a team");
            for sql in [
                "INSERT INTO channels (id, team_id, name, provider, config, events, created_at, updated_at) \
                 VALUES (?, ?, 'c', 'slack', '', '[]', 0, 0)",
                "INSERT INTO metric_snapshots (team_id, width_ms, at, running_count, vcpus, memory_mb) \
                 VALUES (?2, 10000, 0, 1, 1, 1)",
                "INSERT INTO sandbox_metrics (sandbox_id, team_id, width_ms, at, cpu_pct, mem_bytes, disk_bytes) \
                 VALUES (?1, ?2, 15000, 0, 1.0, 1, 1)",
            ] {
                let values = [uuid::Uuid::now_v7().into(), team.0.into()];
                let statement =
                    sea_orm::Statement::from_sql_and_values(store.db.get_database_backend(), sql, values);
                store.db.execute_raw(statement).await.expect("a row");
            }
            teams.push(team);
        }
        store.team_purge_rows(teams[0]).await.expect("purged");
        for table in TEAM_TABLES {
            let query = Query::select().column("team_id").from(table).to_owned();
            let statement = store.db.get_database_backend().build(&query);
            let left = store.db.query_all_raw(statement).await.expect("rows");
            let left: Vec<uuid::Uuid> = left
                .iter()
                .map(|row| row.try_get("", "team_id").expect("an id"))
                .collect();
            assert_eq!(left, [teams[1].0], "{table}");
        }
        store.close().await.expect("closed");
    }
}
