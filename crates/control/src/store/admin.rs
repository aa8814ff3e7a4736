//! What platform admins see and change across teams.

use std::collections::HashMap;

use sea_orm::sea_query::{Expr, ExprTrait};
use sea_orm::{
    ColumnTrait, DbErr, EntityTrait, PaginatorTrait, QueryFilter, QueryOrder, QuerySelect, TransactionTrait,
};

use super::entity::{membership, team, template, user};
use super::teams::lock_members;
use super::templates;
use super::{DatabaseTransaction, Store};
use crate::domain::account::UserStatus;
use crate::domain::{Millis, TeamId, Template, TemplateId, UserId, now};

/// The status of users who may log in.
pub(crate) const ACTIVE: &str = UserStatus::Active.as_str();
/// The status of users whom an admin keeps out.
pub(crate) const DEACTIVATED: &str = UserStatus::Disabled.as_str();

/// A team.
#[derive(Debug, Clone)]
pub(crate) struct AdminTeamRow {
    pub(crate) id: TeamId,
    pub(crate) name: String,
    pub(crate) slug: String,
    pub(crate) byoc: bool,
    pub(crate) members: u64,
    pub(crate) created_at: Millis,
}

/// A user.
#[derive(Debug, Clone)]
pub(crate) struct AdminUserRow {
    pub(crate) id: UserId,
    pub(crate) email: String,
    pub(crate) name: String,
    pub(crate) active: bool,
    pub(crate) platform_admin: bool,
    pub(crate) created_at: Millis,
    pub(crate) last_login_at: Option<Millis>,
}

/// What became of a change of a user's standing.
#[must_use = "the last admin's protection has to be told"]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Standing {
    /// Done.
    Changed,
    /// There is no such user.
    Missing,
    /// The platform would be without an admin.
    LastAdmin,
}

/// Whether another admin of the platform is active. To be asked under the platform team's lock, which every change of
/// an admin's standing takes.
pub(super) async fn another_admin(transaction: &DatabaseTransaction, besides: UserId) -> Result<bool, DbErr> {
    let others = user::Entity::find()
        .filter(user::Column::IsAdmin.eq(true))
        .filter(user::Column::Status.eq(ACTIVE))
        .filter(user::Column::DeletedAt.is_null())
        .filter(user::Column::Id.ne(besides.0))
        .count(transaction)
        .await?;
    Ok(others > 0)
}

impl Store {
    /// The live teams, newest first, and how many there are in all.
    pub(crate) async fn admin_teams(
        &self,
        limit: u64,
        before: Option<TeamId>,
    ) -> Result<(Vec<AdminTeamRow>, u64), DbErr> {
        let live = || team::Entity::find().filter(team::Column::DeletedAt.is_null());
        let mut query = live();
        if let Some(before) = before {
            query = query.filter(team::Column::Id.lt(before.0));
        }
        let teams = query
            .order_by_desc(team::Column::Id)
            .limit(limit)
            .all(&self.db)
            .await?;
        let counts: Vec<(uuid::Uuid, i64)> = membership::Entity::find()
            .select_only()
            .column(membership::Column::TeamId)
            .column_as(membership::Column::UserId.count(), "count")
            .filter(membership::Column::TeamId.is_in(teams.iter().map(|team| team.id)))
            .filter(
                membership::Column::UserId.in_subquery(
                    sea_orm::sea_query::Query::select()
                        .column(user::Column::Id)
                        .from(user::Entity)
                        .and_where(user::Column::DeletedAt.is_null())
                        .to_owned(),
                ),
            )
            .group_by(membership::Column::TeamId)
            .into_tuple()
            .all(&self.db)
            .await?;
        let counts: HashMap<_, _> = counts.into_iter().collect();
        let total = live().count(&self.db).await?;
        let teams = teams
            .into_iter()
            .map(|row| AdminTeamRow {
                id: TeamId(row.id),
                members: super::unsigned(counts.get(&row.id).copied().unwrap_or_default()),
                name: row.name,
                slug: row.slug,
                byoc: row.byoc,
                created_at: row.created_at,
            })
            .collect();
        Ok((teams, total))
    }

    /// Lets a live team bring hosts, or not. Returns whether it lives.
    pub(crate) async fn team_set_byoc(&self, id: TeamId, byoc: bool) -> Result<bool, DbErr> {
        let updated = team::Entity::update_many()
            .col_expr(team::Column::Byoc, byoc.into())
            .filter(team::Column::Id.eq(id.0))
            .filter(team::Column::DeletedAt.is_null())
            .exec(&self.db)
            .await?;
        Ok(updated.rows_affected == 1)
    }

    /// Whether a live team may bring hosts of its own.
    pub(crate) async fn team_byoc(&self, id: TeamId) -> Result<Option<bool>, DbErr> {
        let team = team::Entity::find_by_id(id.0)
            .filter(team::Column::DeletedAt.is_null())
            .one(&self.db)
            .await?;
        Ok(team.map(|team| team.byoc))
    }

    /// The users whose accounts live, newest first, and how many there are in all.
    pub(crate) async fn admin_users(
        &self,
        limit: u64,
        before: Option<UserId>,
    ) -> Result<(Vec<AdminUserRow>, u64), DbErr> {
        let live = || user::Entity::find().filter(user::Column::DeletedAt.is_null());
        let mut query = live();
        if let Some(before) = before {
            query = query.filter(user::Column::Id.lt(before.0));
        }
        let users = query
            .order_by_desc(user::Column::Id)
            .limit(limit)
            .all(&self.db)
            .await?;
        let total = live().count(&self.db).await?;
        let users = users
            .into_iter()
            .map(|row| AdminUserRow {
                id: UserId(row.id),
                email: row.email,
                name: row.name,
                active: row.status == ACTIVE,
                platform_admin: row.is_admin,
                created_at: row.created_at,
                last_login_at: row.last_login_at,
            })
            .collect();
        Ok((users, total))
    }

    /// Lets a user log in, or ends their sessions and keeps them out.
    pub(crate) async fn user_set_active(&self, id: UserId, active: bool) -> Result<Standing, DbErr> {
        let transaction = self.db.begin().await?;
        lock_members(&transaction, TeamId::PLATFORM).await?;
        let mut update = user::Entity::update_many()
            .col_expr(
                user::Column::Status,
                if active { ACTIVE } else { DEACTIVATED }.into(),
            )
            .col_expr(user::Column::UpdatedAt, now().into())
            .filter(user::Column::Id.eq(id.0))
            .filter(user::Column::DeletedAt.is_null());
        if !active {
            update = update.col_expr(
                user::Column::SessionVersion,
                Expr::col(user::Column::SessionVersion).add(1),
            );
        }
        if update.exec(&transaction).await?.rows_affected == 0 {
            transaction.rollback().await?;
            return Ok(Standing::Missing);
        }
        if !active && self.is_admin(&transaction, id).await? && !another_admin(&transaction, id).await? {
            transaction.rollback().await?;
            return Ok(Standing::LastAdmin);
        }
        transaction.commit().await?;
        Ok(Standing::Changed)
    }

    /// Whether a user administers the platform, in a transaction.
    pub(super) async fn is_admin(
        &self,
        transaction: &DatabaseTransaction,
        id: UserId,
    ) -> Result<bool, DbErr> {
        let row = user::Entity::find_by_id(id.0).one(transaction).await?;
        Ok(row.is_some_and(|row| row.is_admin))
    }

    /// The templates of all live teams with their teams' names, newest first, and how many there are in all.
    pub(crate) async fn admin_templates(
        &self,
        limit: u64,
        before: Option<TemplateId>,
    ) -> Result<(Vec<(Template, String)>, u64), DbErr> {
        let shown = || {
            template::Entity::find()
                .filter(template::Column::Status.ne(templates::DELETING))
                .filter(template::Column::FinalName.is_null())
                .filter(template::Column::TeamId.in_subquery(live_teams()))
        };
        let mut query = shown();
        if let Some(before) = before {
            query = query.filter(template::Column::Id.lt(before.0));
        }
        let rows = query
            .order_by_desc(template::Column::Id)
            .limit(limit)
            .all(&self.db)
            .await?;
        let total = shown().count(&self.db).await?;
        let names: Vec<(uuid::Uuid, String)> = team::Entity::find()
            .select_only()
            .columns([team::Column::Id, team::Column::Name])
            .filter(team::Column::Id.is_in(rows.iter().map(|row| row.team_id)))
            .into_tuple()
            .all(&self.db)
            .await?;
        let names: HashMap<_, _> = names.into_iter().collect();
        let rows = rows
            .into_iter()
            .map(|row| {
                let name = names.get(&row.team_id).cloned().unwrap_or_default();
                Ok((templates::domain(row)?, name))
            })
            .collect::<Result<_, DbErr>>()?;
        Ok((rows, total))
    }

    /// Up to this many templates of live teams with a name, the platform's first.
    pub(crate) async fn templates_named(&self, name: &str, limit: u64) -> Result<Vec<Template>, DbErr> {
        template::Entity::find()
            .filter(template::Column::Name.eq(name))
            .filter(template::Column::Status.ne(templates::DELETING))
            .filter(template::Column::TeamId.in_subquery(live_teams()))
            // The platform's id is the smallest.
            .order_by_asc(template::Column::TeamId)
            .limit(limit)
            .all(&self.db)
            .await?
            .into_iter()
            .map(templates::domain)
            .collect()
    }
}

fn live_teams() -> sea_orm::sea_query::SelectStatement {
    sea_orm::sea_query::Query::select()
        .column(team::Column::Id)
        .from(team::Entity)
        .and_where(team::Column::DeletedAt.is_null())
        .to_owned()
}
