//! Users, teams, memberships and API keys.

use sea_orm::ActiveValue::Set;
use sea_orm::{ActiveModelTrait, DbErr, EntityTrait, FromQueryResult, PaginatorTrait, TransactionTrait};

use super::Store;
use super::entity::{api_key, membership, team, user};
use crate::domain::{KeyId, Millis, TeamId, UserId, now};

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

/// What the first start creates.
pub(crate) struct NewTeamKey<'a> {
    pub(crate) email: &'a str,
    pub(crate) user_name: &'a str,
    pub(crate) team_name: &'a str,
    pub(crate) slug: &'a str,
    pub(crate) key_name: &'a str,
    pub(crate) key_hash: &'a str,
    pub(crate) key_prefix: &'a str,
}

impl Store {
    /// Whether there is no account yet.
    pub(crate) async fn has_no_users(&self) -> Result<bool, DbErr> {
        Ok(user::Entity::find().count(&self.db).await? == 0)
    }

    /// Creates an admin with a team and a key, all or nothing.
    pub(crate) async fn create_admin(&self, new: NewTeamKey<'_>) -> Result<(UserId, TeamId, KeyId), DbErr> {
        let (user, team, key) = (UserId::new(), TeamId::new(), KeyId::new());
        let now = now();
        let transaction = self.db.begin().await?;
        user::ActiveModel {
            id: Set(user.0),
            email: Set(new.email.to_owned()),
            name: Set(new.user_name.to_owned()),
            password_hash: Set(None),
            is_admin: Set(true),
            status: Set("active".to_owned()),
            created_at: Set(now),
            updated_at: Set(now),
            session_version: Set(0),
            deleted_at: Set(None),
            last_login_at: Set(None),
            email_verified_at: Set(None),
        }
        .insert(&transaction)
        .await?;
        team::ActiveModel {
            id: Set(team.0),
            name: Set(new.team_name.to_owned()),
            slug: Set(new.slug.to_owned()),
            created_at: Set(now),
            deleted_at: Set(None),
            ..Default::default()
        }
        .insert(&transaction)
        .await?;
        membership::ActiveModel {
            user_id: Set(user.0),
            team_id: Set(team.0),
            role: Set("owner".to_owned()),
            is_default: Set(true),
            created_at: Set(now),
        }
        .insert(&transaction)
        .await?;
        key_row(key, team, Some(user), &new, now)
            .insert(&transaction)
            .await?;
        transaction.commit().await?;
        Ok((user, team, key))
    }

    /// Creates a further team with a key and nobody in it; operators and tests use it.
    pub(crate) async fn create_team(&self, new: NewTeamKey<'_>) -> Result<(TeamId, KeyId), DbErr> {
        let (team, key) = (TeamId::new(), KeyId::new());
        let now = now();
        let transaction = self.db.begin().await?;
        team::ActiveModel {
            id: Set(team.0),
            name: Set(new.team_name.to_owned()),
            slug: Set(new.slug.to_owned()),
            created_at: Set(now),
            deleted_at: Set(None),
            ..Default::default()
        }
        .insert(&transaction)
        .await?;
        key_row(key, team, None, &new, now).insert(&transaction).await?;
        transaction.commit().await?;
        Ok((team, key))
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
    new: &NewTeamKey<'_>,
    now: Millis,
) -> api_key::ActiveModel {
    api_key::ActiveModel {
        id: Set(key.0),
        team_id: Set(team.0),
        name: Set(new.key_name.to_owned()),
        key_hash: Set(new.key_hash.to_owned()),
        key_prefix: Set(new.key_prefix.to_owned()),
        created_by: Set(creator.map(|creator| creator.0)),
        created_at: Set(now),
        last_used: Set(None),
    }
}
