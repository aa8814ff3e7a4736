//! API keys: who they belong to, and when they were last used.

use sea_orm::ActiveValue::Set;
use sea_orm::sea_query::{CaseStatement, Condition, Expr, ExprTrait, JoinType, Query, SelectStatement};
use sea_orm::{
    ActiveModelTrait, ColumnTrait, DbErr, EntityTrait, FromQueryResult, QueryFilter, TransactionTrait,
};

use super::Store;
use super::entity::{api_key, membership, team, user};
use super::teams::{rows, team_held};
use crate::domain::account::UserStatus;
use crate::domain::team::ApiKey;
use crate::domain::{Actor, KeyId, Millis, Principal, Role, TeamId, UserId, now};

/// Keys whose last use one statement writes; PostgreSQL and SQLite both take more parameters than this needs.
const USES_PER_STATEMENT: usize = 500;

/// A key as people see it.
#[derive(Debug, Clone, FromQueryResult)]
struct KeyRow {
    id: uuid::Uuid,
    team_id: uuid::Uuid,
    name: String,
    key_prefix: String,
    created_at: Millis,
    last_used: Option<Millis>,
    /// Absent when the creator's account is gone.
    creator_email: Option<String>,
}

impl From<KeyRow> for ApiKey {
    fn from(row: KeyRow) -> Self {
        Self {
            id: KeyId(row.id),
            team: TeamId(row.team_id),
            name: row.name,
            prefix: row.key_prefix,
            created_at: row.created_at,
            last_used: row.last_used,
            creator_email: row.creator_email,
        }
    }
}

/// The owners of a key's team, in a query on keys; those whose account is in use only, or all.
fn owners(in_use: bool) -> SelectStatement {
    let mut query = Query::select();
    query
        .expr(Expr::value(1))
        .from(membership::Entity)
        .and_where(
            Expr::col((membership::Entity, membership::Column::TeamId))
                .equals((api_key::Entity, api_key::Column::TeamId)),
        )
        .and_where(Expr::col((membership::Entity, membership::Column::Role)).eq(Role::Owner.as_str()));
    if in_use {
        query
            .inner_join(
                user::Entity,
                Expr::col((user::Entity, user::Column::Id))
                    .equals((membership::Entity, membership::Column::UserId)),
            )
            .and_where(Expr::col((user::Entity, user::Column::DeletedAt)).is_null())
            .and_where(Expr::col((user::Entity, user::Column::Status)).ne(UserStatus::Disabled.as_str()));
    }
    query
}

impl Store {
    /// Who a key belongs to, by its hash; one query. Keys of deleted teams count as unknown, and so do those of teams
    /// all of whose owners are deactivated or deleted: such a team has nobody who answers for it. A team without owners
    /// is an operator's.
    pub(crate) async fn principal_by_key_hash(&self, key_hash: &str) -> Result<Option<Principal>, DbErr> {
        let live_teams = Query::select()
            .column(team::Column::Id)
            .from(team::Entity)
            .and_where(team::Column::DeletedAt.is_null())
            .to_owned();
        let row = api_key::Entity::find()
            .filter(api_key::Column::KeyHash.eq(key_hash))
            .filter(api_key::Column::TeamId.in_subquery(live_teams))
            .filter(
                Condition::any()
                    .add(Expr::exists(owners(true)))
                    .add(Expr::exists(owners(false)).not()),
            )
            .one(&self.db)
            .await?;
        Ok(row.map(|row| Principal {
            team: TeamId(row.team_id),
            actor: Actor::Key(KeyId(row.id)),
        }))
    }

    /// Adds a key to a live team; `None` when the team does not live.
    pub(crate) async fn key_create(
        &self,
        team: TeamId,
        creator: UserId,
        name: &str,
        key_hash: &str,
        key_prefix: &str,
    ) -> Result<Option<(KeyId, Millis)>, DbErr> {
        let (id, now) = (KeyId::new(), now());
        let transaction = self.db.begin().await?;
        api_key::ActiveModel {
            id: Set(id.0),
            team_id: Set(team.0),
            name: Set(name.to_owned()),
            key_hash: Set(key_hash.into()),
            key_prefix: Set(key_prefix.to_owned()),
            created_by: Set(Some(creator.0)),
            created_at: Set(now),
            last_used: Set(None),
        }
        .insert(&transaction)
        .await?;
        if !team_held(&transaction, team).await? {
            transaction.rollback().await?;
            return Ok(None);
        }
        transaction.commit().await?;
        Ok(Some((id, now)))
    }

    /// A team's keys, newest first.
    pub(crate) async fn keys_of_team(
        &self,
        team: TeamId,
        limit: u64,
        before: Option<KeyId>,
    ) -> Result<Vec<ApiKey>, DbErr> {
        let mut query = Query::select();
        for column in [
            api_key::Column::Id,
            api_key::Column::TeamId,
            api_key::Column::Name,
            api_key::Column::KeyPrefix,
            api_key::Column::CreatedAt,
            api_key::Column::LastUsed,
        ] {
            query.column((api_key::Entity, column));
        }
        query
            .expr_as(Expr::col((user::Entity, user::Column::Email)), "creator_email")
            .from(api_key::Entity)
            // The creator may be gone, or be going: then nobody is named.
            .join(
                JoinType::LeftJoin,
                user::Entity,
                Condition::all()
                    .add(
                        Expr::col((user::Entity, user::Column::Id))
                            .equals((api_key::Entity, api_key::Column::CreatedBy)),
                    )
                    .add(Expr::col((user::Entity, user::Column::DeletedAt)).is_null()),
            )
            .and_where(Expr::col((api_key::Entity, api_key::Column::TeamId)).eq(team.0))
            .order_by((api_key::Entity, api_key::Column::Id), sea_orm::Order::Desc)
            .limit(limit);
        if let Some(before) = before {
            query.and_where(Expr::col((api_key::Entity, api_key::Column::Id)).lt(before.0));
        }
        let rows: Vec<KeyRow> = rows(&self.db, &query).await?;
        Ok(rows.into_iter().map(ApiKey::from).collect())
    }

    /// Deletes a team's key; with `creator`, only if that user made it. Returns whether it was there.
    pub(crate) async fn key_delete(
        &self,
        team: TeamId,
        id: KeyId,
        creator: Option<UserId>,
    ) -> Result<bool, DbErr> {
        let mut query = api_key::Entity::delete_many()
            .filter(api_key::Column::Id.eq(id.0))
            .filter(api_key::Column::TeamId.eq(team.0));
        if let Some(creator) = creator {
            query = query.filter(api_key::Column::CreatedBy.eq(creator.0));
        }
        Ok(query.exec(&self.db).await?.rows_affected == 1)
    }

    /// Whether a team has a key.
    pub(crate) async fn key_exists(&self, team: TeamId, id: KeyId) -> Result<bool, DbErr> {
        Ok(api_key::Entity::find_by_id(id.0)
            .filter(api_key::Column::TeamId.eq(team.0))
            .one(&self.db)
            .await?
            .is_some())
    }

    /// Writes down when keys were last used; a later time that another process has written stays.
    pub(crate) async fn keys_used(&self, uses: &[(KeyId, Millis)]) -> Result<(), DbErr> {
        for uses in uses.chunks(USES_PER_STATEMENT) {
            let mut last_used = CaseStatement::new();
            for (id, at) in uses {
                let newer = Condition::all().add(api_key::Column::Id.eq(id.0)).add(
                    Condition::any()
                        .add(api_key::Column::LastUsed.is_null())
                        .add(api_key::Column::LastUsed.lt(*at)),
                );
                last_used = last_used.case(newer, Expr::val(*at));
            }
            let last_used = last_used.finally(Expr::col(api_key::Column::LastUsed));
            api_key::Entity::update_many()
                .col_expr(api_key::Column::LastUsed, last_used.into())
                .filter(api_key::Column::Id.is_in(uses.iter().map(|(id, _)| id.0)))
                .exec(&self.db)
                .await?;
        }
        Ok(())
    }
}
