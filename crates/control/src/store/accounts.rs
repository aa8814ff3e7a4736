//! Users, teams, memberships and API keys.

use sea_orm::ActiveValue::Set;
use sea_orm::{ActiveModelTrait, DbErr, EntityTrait, FromQueryResult, PaginatorTrait, TransactionTrait};

use super::Store;
use super::entity::{api_key, membership, team, user};
use super::teams::{member, team_row};
use super::users::{NewAccount, user_row};
use crate::domain::{KeyId, Millis, Role, TeamId, UserId, now};

/// A user as a session sees them.
#[derive(Debug, FromQueryResult)]
pub(crate) struct SessionRow {
    pub(crate) email: String,
    pub(crate) name: String,
    pub(crate) status: String,
    pub(crate) is_admin: bool,
    pub(crate) session_version: i32,
    /// The session's team, unless it is gone or the user is.
    pub(crate) team_id: Option<uuid::Uuid>,
    pub(crate) role: Option<String>,
}

/// A team's first key.
pub(crate) struct NewKey<'a> {
    pub(crate) name: &'a str,
    pub(crate) hash: &'a str,
    pub(crate) prefix: &'a str,
}

impl Store {
    /// Whether there is no account yet.
    pub(crate) async fn has_no_users(&self) -> Result<bool, DbErr> {
        Ok(user::Entity::find().count(&self.db).await? == 0)
    }

    /// Creates an account with its first team and a key of that, all or nothing. Fails with a duplicate error when the
    /// address is taken.
    pub(crate) async fn account_with_key(
        &self,
        new: NewAccount<'_>,
        first_key: NewKey<'_>,
    ) -> Result<(UserId, TeamId, KeyId), DbErr> {
        let (user, team, key, now) = (UserId::new(), TeamId::new(), KeyId::new(), now());
        let transaction = self.db.begin().await?;
        user_row(user, &new, now).insert(&transaction).await?;
        team_row(team, new.team_name, new.slug, now)
            .insert(&transaction)
            .await?;
        member(user, team, Role::Owner, true, now)
            .insert(&transaction)
            .await?;
        key_row(key, team, Some(user), &first_key, now)
            .insert(&transaction)
            .await?;
        transaction.commit().await?;
        Ok((user, team, key))
    }

    /// Creates a further team with a key and nobody in it; operators and tests use it.
    pub(crate) async fn team_with_key(
        &self,
        name: &str,
        slug: &str,
        first_key: NewKey<'_>,
    ) -> Result<TeamId, DbErr> {
        let (team, now) = (TeamId::new(), now());
        let transaction = self.db.begin().await?;
        team_row(team, name, slug, now).insert(&transaction).await?;
        key_row(KeyId::new(), team, None, &first_key, now)
            .insert(&transaction)
            .await?;
        transaction.commit().await?;
        Ok(team)
    }

    /// The user of a session and their place in its team, as of now; one query. `None` when there is no such user.
    pub(crate) async fn session(
        &self,
        user: UserId,
        team: Option<TeamId>,
    ) -> Result<Option<SessionRow>, DbErr> {
        use sea_orm::ConnectionTrait as _;
        use sea_orm::sea_query::{Condition, Expr, ExprTrait as _, Query};
        let query = Query::select()
            .column((user::Entity, user::Column::Email))
            .column((user::Entity, user::Column::Name))
            .column((user::Entity, user::Column::Status))
            .column((user::Entity, user::Column::IsAdmin))
            .column((user::Entity, user::Column::SessionVersion))
            .expr_as(Expr::col((team::Entity, team::Column::Id)), "team_id")
            .column((membership::Entity, membership::Column::Role))
            .from(user::Entity)
            .join(
                sea_orm::JoinType::LeftJoin,
                membership::Entity,
                Condition::all()
                    .add(
                        Expr::col((membership::Entity, membership::Column::UserId))
                            .equals((user::Entity, user::Column::Id)),
                    )
                    .add(
                        Expr::col((membership::Entity, membership::Column::TeamId))
                            .eq(team.unwrap_or(TeamId::PLATFORM).0),
                    ),
            )
            .join(
                sea_orm::JoinType::LeftJoin,
                team::Entity,
                Condition::all()
                    .add(
                        Expr::col((team::Entity, team::Column::Id))
                            .equals((membership::Entity, membership::Column::TeamId)),
                    )
                    .add(Expr::col((team::Entity, team::Column::DeletedAt)).is_null()),
            )
            .and_where(Expr::col((user::Entity, user::Column::Id)).eq(user.0))
            .and_where(Expr::col((user::Entity, user::Column::DeletedAt)).is_null())
            .to_owned();
        let statement = self.db.get_database_backend().build(&query);
        self.db
            .query_one_raw(statement)
            .await?
            .map(|row| SessionRow::from_query_result(&row, ""))
            .transpose()
    }
}

fn key_row(
    key: KeyId,
    team: TeamId,
    creator: Option<UserId>,
    new: &NewKey<'_>,
    now: Millis,
) -> api_key::ActiveModel {
    api_key::ActiveModel {
        id: Set(key.0),
        team_id: Set(team.0),
        name: Set(new.name.to_owned()),
        key_hash: Set(new.hash.into()),
        key_prefix: Set(new.prefix.to_owned()),
        created_by: Set(creator.map(|creator| creator.0)),
        created_at: Set(now),
        last_used: Set(None),
    }
}
