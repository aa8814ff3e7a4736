//! Teams and their members.
//!
//! Whatever changes a team's members begins with a write to the team's row ([`lock_members`]): such changes come one
//! after the other, so the rules that are checked then (an owner remains, say) still hold when the change is
//! written. An account's deletion takes the same locks.

use sea_orm::ActiveValue::Set;
use sea_orm::sea_query::{Alias, Condition, Expr, ExprTrait, JoinType, Query, SelectStatement};
use sea_orm::{
    ActiveModelTrait, ColumnTrait, ConnectionTrait, DbErr, EntityTrait, FromQueryResult, PaginatorTrait,
    QueryFilter, QuerySelect, TransactionTrait,
};

use super::entity::{membership, team, user};
use super::{DatabaseTransaction, Outcome, Store, corrupt};
use crate::domain::membership::{MemberChange, Refused, Situation, decide_member_change};
use crate::domain::team::{Member, Team};
use crate::domain::{Millis, Role, TeamId, UserId, now};

/// A team as one of its members sees it.
#[derive(Debug, Clone, FromQueryResult)]
struct TeamRow {
    id: uuid::Uuid,
    name: String,
    slug: String,
    created_at: Millis,
    role: String,
}

/// A member.
#[derive(Debug, Clone, FromQueryResult)]
struct MemberRow {
    user_id: uuid::Uuid,
    name: String,
    email: String,
    role: String,
    joined_at: Millis,
}

impl TryFrom<TeamRow> for Team {
    type Error = DbErr;

    fn try_from(row: TeamRow) -> Result<Self, DbErr> {
        Ok(Self {
            id: TeamId(row.id),
            name: row.name,
            slug: row.slug,
            role: role(&row.role)?,
            created_at: row.created_at,
        })
    }
}

impl TryFrom<MemberRow> for Member {
    type Error = DbErr;

    fn try_from(row: MemberRow) -> Result<Self, DbErr> {
        Ok(Self {
            user: UserId(row.user_id),
            name: row.name,
            email: row.email,
            role: role(&row.role)?,
            joined_at: row.joined_at,
        })
    }
}

/// The rows of a query that spans tables.
pub(super) async fn rows<T: FromQueryResult>(
    db: &impl ConnectionTrait,
    query: &SelectStatement,
) -> Result<Vec<T>, DbErr> {
    db.query_all_raw(db.get_database_backend().build(query))
        .await?
        .iter()
        .map(|row| T::from_query_result(row, ""))
        .collect()
}

/// A stored role.
pub(crate) fn role(word: &str) -> Result<Role, DbErr> {
    Role::parse(word).ok_or_else(|| corrupt("users_teams", "role"))
}

/// Whether a team lives, and does so until the transaction ends: a deletion waits for it, or is seen by it.
///
/// To be called after the transaction's write (a reference to the team's row does not keep it from being marked).
pub(super) async fn team_held(transaction: &DatabaseTransaction, id: TeamId) -> Result<bool, DbErr> {
    let held = team::Entity::find_by_id(id.0)
        .filter(team::Column::DeletedAt.is_null())
        .lock_shared()
        .one(transaction)
        .await?;
    Ok(held.is_some())
}

/// Whether an account lives, and does so until the transaction ends: its deletion either comes after and sees what the
/// transaction wrote, or has come before.
async fn user_held(transaction: &DatabaseTransaction, id: UserId) -> Result<bool, DbErr> {
    let held = user::Entity::find_by_id(id.0)
        .filter(user::Column::DeletedAt.is_null())
        .lock_shared()
        .one(transaction)
        .await?;
    Ok(held.is_some())
}

/// Begins a change of a live team's members; `false` when it does not live.
pub(super) async fn lock_members(transaction: &DatabaseTransaction, id: TeamId) -> Result<bool, DbErr> {
    let locked = team::Entity::update_many()
        .col_expr(
            team::Column::MembersVersion,
            Expr::col(team::Column::MembersVersion).add(1),
        )
        .filter(team::Column::Id.eq(id.0))
        .filter(team::Column::DeletedAt.is_null())
        .exec(transaction)
        .await?;
    Ok(locked.rows_affected == 1)
}

/// A user's role in a team; accounts that are deleted have none.
async fn role_in(db: &impl ConnectionTrait, team: TeamId, user: UserId) -> Result<Option<Role>, DbErr> {
    membership::Entity::find_by_id((user.0, team.0))
        .filter(membership::Column::UserId.in_subquery(live_users()))
        .one(db)
        .await?
        .map(|row| role(&row.role))
        .transpose()
}

/// Owners of a team whose accounts live, besides one.
pub(super) async fn other_owners(
    db: &impl ConnectionTrait,
    team: TeamId,
    besides: UserId,
) -> Result<u64, DbErr> {
    membership::Entity::find()
        .filter(membership::Column::TeamId.eq(team.0))
        .filter(membership::Column::Role.eq(Role::Owner.as_str()))
        .filter(membership::Column::UserId.ne(besides.0))
        .filter(membership::Column::UserId.in_subquery(live_users()))
        .count(db)
        .await
}

fn live_users() -> SelectStatement {
    Query::select()
        .column(user::Column::Id)
        .from(user::Entity)
        .and_where(user::Column::DeletedAt.is_null())
        .to_owned()
}

pub(super) fn member(
    user: UserId,
    team: TeamId,
    role: Role,
    is_default: bool,
    now: Millis,
) -> membership::ActiveModel {
    membership::ActiveModel {
        user_id: Set(user.0),
        team_id: Set(team.0),
        role: Set(role.as_str().to_owned()),
        is_default: Set(is_default),
        created_at: Set(now),
    }
}

impl Store {
    /// Creates a team and its owner's membership. Fails with a duplicate error when the slug was ever used; `None`
    /// when the owner's account has been deleted.
    pub(crate) async fn team_create(
        &self,
        name: &str,
        slug: &str,
        owner: UserId,
    ) -> Result<Option<(TeamId, Millis)>, DbErr> {
        let (id, now) = (TeamId::new(), now());
        let transaction = self.db.begin().await?;
        team_row(id, name, slug, now).insert(&transaction).await?;
        member(owner, id, Role::Owner, false, now)
            .insert(&transaction)
            .await?;
        if !user_held(&transaction, owner).await? {
            transaction.rollback().await?;
            return Ok(None);
        }
        transaction.commit().await?;
        Ok(Some((id, now)))
    }

    /// One team, if it lives and the user is in it.
    pub(crate) async fn team_of_user(&self, id: TeamId, user: UserId) -> Result<Option<Team>, DbErr> {
        let mut query = teams_of(user);
        query.and_where(Expr::col((team::Entity, team::Column::Id)).eq(id.0));
        rows::<TeamRow>(&self.db, &query)
            .await?
            .into_iter()
            .next()
            .map(Team::try_from)
            .transpose()
    }

    /// The live teams that a user is in, newest first.
    pub(crate) async fn teams_of_user(
        &self,
        user: UserId,
        limit: u64,
        before: Option<TeamId>,
    ) -> Result<Vec<Team>, DbErr> {
        let mut query = teams_of(user);
        if let Some(before) = before {
            query.and_where(Expr::col((team::Entity, team::Column::Id)).lt(before.0));
        }
        query
            .order_by((team::Entity, team::Column::Id), sea_orm::Order::Desc)
            .limit(limit);
        let rows: Vec<TeamRow> = rows(&self.db, &query).await?;
        rows.into_iter().map(Team::try_from).collect()
    }

    /// Renames a live team, if the user is in it with at least this role.
    pub(crate) async fn team_rename(
        &self,
        id: TeamId,
        name: &str,
        user: UserId,
        least: Role,
    ) -> Result<Outcome, DbErr> {
        let roles = Role::ALL.into_iter().filter(|role| *role >= least);
        let allowed = Query::select()
            .column(membership::Column::TeamId)
            .from(membership::Entity)
            .and_where(membership::Column::UserId.eq(user.0))
            .and_where(membership::Column::TeamId.eq(id.0))
            .and_where(membership::Column::Role.is_in(roles.map(Role::as_str)))
            .to_owned();
        let updated = team::Entity::update_many()
            .col_expr(team::Column::Name, name.into())
            .filter(team::Column::Id.in_subquery(allowed))
            .filter(team::Column::DeletedAt.is_null())
            .exec(&self.db)
            .await?;
        if updated.rows_affected == 1 {
            return Ok(Outcome::Updated);
        }
        Ok(match self.team_of_user(id, user).await? {
            Some(_) => Outcome::Stale,
            None => Outcome::Missing,
        })
    }

    /// The members of a team, newest accounts first.
    pub(crate) async fn team_members(
        &self,
        id: TeamId,
        limit: u64,
        before: Option<UserId>,
    ) -> Result<Vec<Member>, DbErr> {
        let mut query = Query::select();
        query
            .column((membership::Entity, membership::Column::UserId))
            .column((membership::Entity, membership::Column::Role))
            .expr_as(
                Expr::col((membership::Entity, membership::Column::CreatedAt)),
                Alias::new("joined_at"),
            )
            .column((user::Entity, user::Column::Name))
            .column((user::Entity, user::Column::Email))
            .from(membership::Entity)
            .join(
                JoinType::InnerJoin,
                user::Entity,
                Expr::col((user::Entity, user::Column::Id))
                    .equals((membership::Entity, membership::Column::UserId)),
            )
            .and_where(Expr::col((membership::Entity, membership::Column::TeamId)).eq(id.0))
            .and_where(Expr::col((user::Entity, user::Column::DeletedAt)).is_null())
            .order_by(
                (membership::Entity, membership::Column::UserId),
                sea_orm::Order::Desc,
            )
            .limit(limit);
        if let Some(before) = before {
            query.and_where(Expr::col((membership::Entity, membership::Column::UserId)).lt(before.0));
        }
        let rows: Vec<MemberRow> = rows(&self.db, &query).await?;
        rows.into_iter().map(Member::try_from).collect()
    }

    /// A member of a team.
    pub(crate) async fn team_member(&self, id: TeamId, user: UserId) -> Result<Option<Member>, DbErr> {
        let Some(membership) = membership::Entity::find_by_id((user.0, id.0))
            .one(&self.db)
            .await?
        else {
            return Ok(None);
        };
        let user = user::Entity::find_by_id(user.0)
            .filter(user::Column::DeletedAt.is_null())
            .one(&self.db)
            .await?;
        user.map(|user| {
            Ok(Member {
                user: UserId(user.id),
                name: user.name,
                email: user.email,
                role: role(&membership.role)?,
                joined_at: membership.created_at,
            })
        })
        .transpose()
    }

    /// The live and active user with an address.
    pub(crate) async fn active_user_by_email(&self, email: &str) -> Result<Option<UserId>, DbErr> {
        Ok(user::Entity::find()
            .filter(user::Column::Email.eq(email))
            .filter(user::Column::Status.eq(super::admin::ACTIVE))
            .filter(user::Column::DeletedAt.is_null())
            .one(&self.db)
            .await?
            .map(|row| UserId(row.id)))
    }

    /// Changes a team's members, if the rules allow it to this actor at the moment of the change.
    pub(crate) async fn member_change(
        &self,
        team: TeamId,
        actor: UserId,
        target: UserId,
        change: MemberChange,
    ) -> Result<Result<(), Refused>, DbErr> {
        let transaction = self.db.begin().await?;
        if !lock_members(&transaction, team).await? {
            transaction.rollback().await?;
            return Ok(Err(Refused::NotInTeam));
        }
        let same = actor == target;
        let acting = role_in(&transaction, team, actor).await?;
        let situation = Situation {
            actor: acting,
            target: if same {
                acting
            } else {
                role_in(&transaction, team, target).await?
            },
            same,
            other_owners: other_owners(&transaction, team, target).await?,
        };
        if let Err(refused) = decide_member_change(situation, change) {
            transaction.rollback().await?;
            return Ok(Err(refused));
        }
        match change {
            MemberChange::Add => {
                if !user_held(&transaction, target).await? {
                    transaction.rollback().await?;
                    return Ok(Err(Refused::NoSuchMember));
                }
                member(target, team, Role::Member, false, now())
                    .insert(&transaction)
                    .await?;
            }
            MemberChange::SetRole(role) => {
                membership::Entity::update_many()
                    .col_expr(membership::Column::Role, role.as_str().into())
                    .filter(membership::Column::TeamId.eq(team.0))
                    .filter(membership::Column::UserId.eq(target.0))
                    .exec(&transaction)
                    .await?;
            }
            MemberChange::Remove | MemberChange::Leave => {
                membership::Entity::delete_by_id((target.0, team.0))
                    .exec(&transaction)
                    .await?;
            }
        }
        transaction.commit().await?;
        Ok(Ok(()))
    }

    /// Active users whose address begins so, in the order of addresses: a range of bytes, which an index serves, and
    /// in which no character is a wildcard.
    pub(crate) async fn users_by_email_prefix(
        &self,
        prefix: &str,
        limit: u64,
    ) -> Result<Vec<(UserId, String)>, DbErr> {
        #[derive(FromQueryResult)]
        struct Row {
            id: uuid::Uuid,
            email: String,
        }
        let sql = match self.db.get_database_backend() {
            sea_orm::DbBackend::Postgres => {
                r#"SELECT id, email FROM users WHERE email COLLATE "C" >= $1 AND email COLLATE "C" < $2
                   AND status = $3 AND deleted_at IS NULL ORDER BY email COLLATE "C" LIMIT $4"#
            }
            _ => {
                "SELECT id, email FROM users WHERE email >= ? AND email < ?
                 AND status = ? AND deleted_at IS NULL ORDER BY email LIMIT ?"
            }
        };
        // No character comes after this one.
        let end = format!("{prefix}{}", char::MAX);
        let values = [
            prefix.into(),
            end.into(),
            super::admin::ACTIVE.into(),
            super::big(limit).into(),
        ];
        let statement = sea_orm::Statement::from_sql_and_values(self.db.get_database_backend(), sql, values);
        self.db
            .query_all_raw(statement)
            .await?
            .iter()
            .map(|row| Row::from_query_result(row, "").map(|Row { id, email }| (UserId(id), email)))
            .collect()
    }
}

pub(super) fn team_row(id: TeamId, name: &str, slug: &str, now: Millis) -> team::ActiveModel {
    team::ActiveModel {
        id: Set(id.0),
        name: Set(name.to_owned()),
        slug: Set(slug.to_owned()),
        created_at: Set(now),
        ..Default::default()
    }
}

/// The live teams that a user is in, with their role.
fn teams_of(user: UserId) -> SelectStatement {
    Query::select()
        .column((team::Entity, team::Column::Id))
        .column((team::Entity, team::Column::Name))
        .column((team::Entity, team::Column::Slug))
        .column((team::Entity, team::Column::CreatedAt))
        .column((membership::Entity, membership::Column::Role))
        .from(membership::Entity)
        .join(
            JoinType::InnerJoin,
            team::Entity,
            Condition::all()
                .add(
                    Expr::col((team::Entity, team::Column::Id))
                        .equals((membership::Entity, membership::Column::TeamId)),
                )
                .add(Expr::col((team::Entity, team::Column::DeletedAt)).is_null()),
        )
        .and_where(Expr::col((membership::Entity, membership::Column::UserId)).eq(user.0))
        .to_owned()
}
