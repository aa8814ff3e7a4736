//! Leases: what one instance does at a time.

use sea_orm::sea_query::{Expr, ExprTrait as _, OnConflict, SimpleExpr};
use sea_orm::{ColumnTrait, Condition, DbBackend, DbErr, EntityTrait, QueryFilter};
use uuid::Uuid;

use super::Store;
use super::entity::lease::{ActiveModel, Column, Entity};

impl Store {
    /// Whether other processes may work on this database.
    pub(crate) fn is_shared(&self) -> bool {
        self.db.get_database_backend() == DbBackend::Postgres
    }

    /// Takes or renews a lease for `life` milliseconds; whether the holder has it now.
    pub(crate) async fn lease_take(&self, name: &str, holder: Uuid, life: i64) -> Result<bool, DbErr> {
        let renewed = Entity::update_many()
            .col_expr(Column::Holder, holder.into())
            .col_expr(Column::ExpiresAt, self.database_now().add(life))
            .filter(Column::Name.eq(name))
            .filter(
                Condition::any()
                    .add(Column::Holder.eq(holder))
                    .add(Expr::col(Column::ExpiresAt).lt(self.database_now())),
            )
            .exec(&self.db)
            .await?;
        if renewed.rows_affected == 1 {
            return Ok(true);
        }
        // The first time ever; of several one is first. It is over already, and so the next renewal's affair.
        let inserted = Entity::insert(ActiveModel {
            name: sea_orm::ActiveValue::Set(name.to_owned()),
            holder: sea_orm::ActiveValue::Set(holder),
            expires_at: sea_orm::ActiveValue::Set(0),
        })
        .on_conflict(OnConflict::column(Column::Name).do_nothing().to_owned())
        .exec_without_returning(&self.db)
        .await?;
        if inserted == 0 {
            return Ok(false);
        }
        Box::pin(self.lease_take(name, holder, life)).await
    }

    /// Gives a lease back, if the holder has it.
    pub(crate) async fn lease_release(&self, name: &str, holder: Uuid) -> Result<(), DbErr> {
        Entity::delete_many()
            .filter(Column::Name.eq(name))
            .filter(Column::Holder.eq(holder))
            .exec(&self.db)
            .await
            .map(drop)
    }

    /// Removes leases of this kind that ended without being given back; returns how many.
    pub(crate) async fn leases_bury(&self, prefix: &str) -> Result<u64, DbErr> {
        let buried = Entity::delete_many()
            .filter(Column::Name.starts_with(prefix))
            .filter(Expr::col(Column::ExpiresAt).lt(self.database_now()))
            .exec(&self.db)
            .await?;
        Ok(buried.rows_affected)
    }

    /// Milliseconds since the epoch by the database's clock.
    fn database_now(&self) -> SimpleExpr {
        Expr::cust(match self.db.get_database_backend() {
            DbBackend::Postgres => "(extract(epoch FROM clock_timestamp()) * 1000)::bigint",
            _ => "CAST(unixepoch('subsec') * 1000 AS INTEGER)",
        })
    }
}
