//! Answers kept for repeated requests, and the claims of those that execute them.

use sea_orm::ActiveValue::Set;
use sea_orm::sea_query::{Expr, OnConflict};
use sea_orm::{ColumnTrait, Condition, DbErr, EntityTrait, QueryFilter};
use uuid::Uuid;

use super::entity::Hidden;
use super::entity::idempotency_key::{ActiveModel, Column, Entity, Model};
use super::{Outcome, Store};
use crate::domain::Millis;

/// A request as it was seen before.
#[derive(Debug, Clone)]
pub(crate) struct SeenRequest {
    pub(crate) request_hash: String,
    claim: Uuid,
    claim_ends_at: Millis,
    /// The stored answer: status and sealed body.
    pub(crate) answer: Option<(u16, Hidden)>,
    expires_at: Millis,
}

impl SeenRequest {
    /// Whether nobody stands behind it any more: it is too old, or whoever executed it is gone.
    pub(crate) fn is_free(&self, now: Millis) -> bool {
        self.expires_at <= now || (self.answer.is_none() && self.claim_ends_at <= now)
    }
}

/// Times of a claim.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ClaimTimes {
    pub(crate) claim_ends_at: Millis,
    pub(crate) expires_at: Millis,
}

impl Store {
    /// Claims a request that nobody has made yet. `false` when there is one under this scope.
    pub(crate) async fn idempotency_claim(
        &self,
        scope: &str,
        request_hash: &str,
        claim: Uuid,
        times: ClaimTimes,
    ) -> Result<bool, DbErr> {
        let row = ActiveModel {
            scope: Set(scope.to_owned()),
            request_hash: Set(request_hash.to_owned()),
            claim: Set(claim),
            claim_ends_at: Set(times.claim_ends_at),
            status: Set(None),
            body: Set(None),
            expires_at: Set(times.expires_at),
        };
        let inserted = Entity::insert(row)
            .on_conflict(OnConflict::column(Column::Scope).do_nothing().to_owned())
            .exec_without_returning(&self.db)
            .await?;
        Ok(inserted == 1)
    }

    /// The request under a scope.
    pub(crate) async fn idempotency_find(&self, scope: &str) -> Result<Option<SeenRequest>, DbErr> {
        let row = Entity::find_by_id(scope.to_owned()).one(&self.db).await?;
        Ok(row.map(
            |Model {
                 scope: _,
                 request_hash,
                 claim,
                 claim_ends_at,
                 status,
                 body,
                 expires_at,
             }| SeenRequest {
                request_hash,
                claim,
                claim_ends_at,
                answer: status.and_then(|status| u16::try_from(status).ok()).zip(body),
                expires_at,
            },
        ))
    }

    /// Takes over a request behind which nobody stands any more; of several that try, one succeeds.
    pub(crate) async fn idempotency_take_over(
        &self,
        scope: &str,
        seen: &SeenRequest,
        request_hash: &str,
        claim: Uuid,
        times: ClaimTimes,
    ) -> Result<bool, DbErr> {
        let result = Entity::update_many()
            .col_expr(Column::RequestHash, request_hash.into())
            .col_expr(Column::Claim, claim.into())
            .col_expr(Column::ClaimEndsAt, times.claim_ends_at.into())
            .col_expr(Column::Status, Expr::value(None::<i32>))
            .col_expr(Column::Body, Expr::value(None::<String>))
            .col_expr(Column::ExpiresAt, times.expires_at.into())
            .filter(Column::Scope.eq(scope))
            .filter(Column::Claim.eq(seen.claim))
            // A claim that was renewed, or answered, in the meantime is alive.
            .filter(Column::ClaimEndsAt.eq(seen.claim_ends_at))
            .filter(
                Condition::any()
                    .add(Column::Status.is_null())
                    .add(Column::ExpiresAt.eq(seen.expires_at)),
            )
            .exec(&self.db)
            .await?;
        Ok(result.rows_affected == 1)
    }

    /// Keeps a claim alive while its request runs.
    pub(crate) async fn idempotency_renew(
        &self,
        scope: &str,
        claim: Uuid,
        claim_ends_at: Millis,
    ) -> Result<Outcome, DbErr> {
        let result = Entity::update_many()
            .col_expr(Column::ClaimEndsAt, claim_ends_at.into())
            .filter(Column::Scope.eq(scope))
            .filter(Column::Claim.eq(claim))
            .exec(&self.db)
            .await?;
        Ok(held(result.rows_affected))
    }

    /// Stores the answer.
    pub(crate) async fn idempotency_answer(
        &self,
        scope: &str,
        claim: Uuid,
        status: u16,
        body: String,
    ) -> Result<Outcome, DbErr> {
        let result = Entity::update_many()
            .col_expr(Column::Status, i32::from(status).into())
            .col_expr(Column::Body, body.into())
            .filter(Column::Scope.eq(scope))
            .filter(Column::Claim.eq(claim))
            .exec(&self.db)
            .await?;
        Ok(held(result.rows_affected))
    }

    /// Forgets a request that came to nothing, so that it can be made again.
    pub(crate) async fn idempotency_release(&self, scope: &str, claim: Uuid) -> Result<Outcome, DbErr> {
        let result = Entity::delete_many()
            .filter(Column::Scope.eq(scope))
            .filter(Column::Claim.eq(claim))
            .filter(Column::Status.is_null())
            .exec(&self.db)
            .await?;
        Ok(held(result.rows_affected))
    }

    /// Forgets answers that are too old.
    pub(crate) async fn idempotency_prune(&self, now: Millis) -> Result<u64, DbErr> {
        let result = Entity::delete_many()
            .filter(Column::ExpiresAt.lte(now))
            .exec(&self.db)
            .await?;
        Ok(result.rows_affected)
    }
}

/// A claim that another took over looks the same as one that is gone: not ours any more.
fn held(rows: u64) -> Outcome {
    if rows == 1 {
        Outcome::Updated
    } else {
        Outcome::Stale
    }
}
