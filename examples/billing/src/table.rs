//! The tables as rows, and what is asked of them.

use std::collections::HashMap;

use wrenn_control::domain::{Millis, TeamId, now};
use wrenn_control::sea_orm::ActiveValue::Set;
use wrenn_control::sea_orm::sea_query::OnConflict;
use wrenn_control::sea_orm::{
    ColumnTrait as _, DatabaseConnection, DbErr, EntityTrait as _, PaginatorTrait as _, QueryFilter as _,
    QueryOrder as _, QuerySelect as _, SqlErr,
};
use wrenn_control::services::DayUse;
use wrenn_control::{Error, Result};

use crate::price::{Charge, Plan};

mod plans {
    use wrenn_control::sea_orm;
    use wrenn_control::sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "billing_plans")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub team_id: Uuid,
        pub plan: String,
        pub suspended: bool,
        pub updated_at: i64,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

mod charges {
    use wrenn_control::sea_orm;
    use wrenn_control::sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "billing_charges")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub team_id: Uuid,
        #[sea_orm(primary_key, auto_increment = false)]
        pub day: i64,
        pub plan: String,
        pub cpu_ms: i64,
        pub ram_mb_ms: i64,
        pub cpu_micros: i64,
        pub ram_micros: i64,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

mod days {
    use wrenn_control::sea_orm;
    use wrenn_control::sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "billing_days")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub day: i64,
        pub closed_at: i64,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

mod starts {
    use wrenn_control::sea_orm;
    use wrenn_control::sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "billing_starts")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub seq: i64,
        pub team_id: Uuid,
        pub at: i64,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// What is agreed with a team.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Agreement {
    pub(crate) plan: Plan,
    /// Whether it may start nothing, for example because it has not paid.
    pub(crate) suspended: bool,
}

impl TryFrom<plans::Model> for Agreement {
    type Error = Error;

    fn try_from(row: plans::Model) -> Result<Self> {
        let plan = Plan::parse(&row.plan)
            .ok_or_else(|| Error::internal(format!("billing_plans.plan holds '{}'", row.plan)))?;
        Ok(Self {
            plan,
            suspended: row.suspended,
        })
    }
}

/// A team's agreement; teams that never chose have the default one.
pub(crate) async fn agreement(db: &DatabaseConnection, team: TeamId) -> Result<Agreement> {
    let row = plans::Entity::find_by_id(team.0).one(db).await?;
    row.map_or_else(|| Ok(Agreement::default()), Agreement::try_from)
}

/// The same for many teams, in one query.
async fn agreements(db: &DatabaseConnection, teams: &[TeamId]) -> Result<HashMap<TeamId, Agreement>> {
    plans::Entity::find()
        .filter(plans::Column::TeamId.is_in(teams.iter().map(|team| team.0)))
        .all(db)
        .await?
        .into_iter()
        .map(|row| Ok((TeamId(row.team_id), row.try_into()?)))
        .collect()
}

/// Sets a team's plan.
pub(crate) async fn set_plan(db: &DatabaseConnection, team: TeamId, plan: Plan) -> Result<()> {
    let agreement = Agreement {
        plan,
        ..Agreement::default()
    };
    store(db, team, agreement, plans::Column::Plan).await
}

/// Suspends a team, or ends that.
pub(crate) async fn set_suspended(db: &DatabaseConnection, team: TeamId, suspended: bool) -> Result<()> {
    let agreement = Agreement {
        suspended,
        ..Agreement::default()
    };
    store(db, team, agreement, plans::Column::Suspended).await
}

/// Writes one column of a team's row, and leaves the other as it is. One statement: two writers do not undo each
/// other's work.
async fn store(
    db: &DatabaseConnection,
    team: TeamId,
    Agreement { plan, suspended }: Agreement,
    column: plans::Column,
) -> Result<()> {
    let row = plans::ActiveModel {
        team_id: Set(team.0),
        plan: Set(plan.as_str().to_owned()),
        suspended: Set(suspended),
        updated_at: Set(now()),
    };
    let conflict = OnConflict::column(plans::Column::TeamId)
        .update_columns([column, plans::Column::UpdatedAt])
        .to_owned();
    match plans::Entity::insert(row)
        .on_conflict(conflict)
        .exec_without_returning(db)
        .await
    {
        Err(error) if refers_to_nothing(&error) => Err(Error::not_found("team", team)),
        stored => Ok(stored.map(drop)?),
    }
}

fn refers_to_nothing(error: &DbErr) -> bool {
    matches!(error.sql_err(), Some(SqlErr::ForeignKeyConstraintViolation(_)))
}

/// A team's charges within days, both included.
pub(crate) async fn charges(
    db: &DatabaseConnection,
    team: TeamId,
    from: i64,
    to: i64,
) -> Result<HashMap<i64, Charge>> {
    let rows = charges::Entity::find()
        .filter(charges::Column::TeamId.eq(team.0))
        .filter(charges::Column::Day.between(from, to))
        .all(db)
        .await?;
    let charge = |row: charges::Model| {
        let charge = Charge {
            cpu_micros: row.cpu_micros,
            ram_micros: row.ram_micros,
        };
        (row.day, charge)
    };
    Ok(rows.into_iter().map(charge).collect())
}

/// Writes a day's charges of many teams. Repeated, it writes the same again.
pub(crate) async fn charge(db: &DatabaseConnection, day: i64, used: &[(TeamId, DayUse)]) -> Result<()> {
    if used.is_empty() {
        return Ok(());
    }
    let teams: Vec<TeamId> = used.iter().map(|(team, _)| *team).collect();
    let agreements = agreements(db, &teams).await?;
    let rows = used.iter().map(|(team, used)| {
        let Agreement { plan, .. } = agreements.get(team).copied().unwrap_or_default();
        let Charge {
            cpu_micros,
            ram_micros,
        } = plan.charge(used.cpu_ms, used.ram_mb_ms);
        charges::ActiveModel {
            team_id: Set(team.0),
            day: Set(day),
            plan: Set(plan.as_str().to_owned()),
            cpu_ms: Set(used.cpu_ms),
            ram_mb_ms: Set(used.ram_mb_ms),
            cpu_micros: Set(cpu_micros),
            ram_micros: Set(ram_micros),
        }
    });
    let conflict = OnConflict::columns([charges::Column::TeamId, charges::Column::Day])
        .update_columns([
            charges::Column::Plan,
            charges::Column::CpuMs,
            charges::Column::RamMbMs,
            charges::Column::CpuMicros,
            charges::Column::RamMicros,
        ])
        .to_owned();
    charges::Entity::insert_many(rows)
        .on_conflict(conflict)
        .exec_without_returning(db)
        .await?;
    Ok(())
}

/// The newest day that was closed.
pub(crate) async fn last_closed(db: &DatabaseConnection) -> Result<Option<i64>> {
    Ok(days::Entity::find()
        .select_only()
        .column(days::Column::Day)
        .order_by_desc(days::Column::Day)
        .into_tuple()
        .one(db)
        .await?)
}

/// Notes that a day's charges are complete.
pub(crate) async fn closed(db: &DatabaseConnection, day: i64, at: Millis) -> Result<()> {
    let row = days::ActiveModel {
        day: Set(day),
        closed_at: Set(at),
    };
    let conflict = OnConflict::column(days::Column::Day).do_nothing().to_owned();
    days::Entity::insert(row)
        .on_conflict(conflict)
        .exec_without_returning(db)
        .await?;
    Ok(())
}

/// Notes that a sandbox of a team came to run, once for every event. A team that is gone for good needs no note.
pub(crate) async fn started(db: &DatabaseConnection, seq: i64, team: TeamId, at: Millis) -> Result<()> {
    let row = starts::ActiveModel {
        seq: Set(seq),
        team_id: Set(team.0),
        at: Set(at),
    };
    let conflict = OnConflict::column(starts::Column::Seq).do_nothing().to_owned();
    match starts::Entity::insert(row)
        .on_conflict(conflict)
        .exec_without_returning(db)
        .await
    {
        Err(error) if refers_to_nothing(&error) => Ok(()),
        stored => Ok(stored.map(drop)?),
    }
}

/// How many sandboxes of a team came to run from one moment until before another.
pub(crate) async fn starts(
    db: &DatabaseConnection,
    team: TeamId,
    from: Millis,
    until: Millis,
) -> Result<u64> {
    Ok(starts::Entity::find()
        .filter(starts::Column::TeamId.eq(team.0))
        .filter(starts::Column::At.gte(from))
        .filter(starts::Column::At.lt(until))
        .count(db)
        .await?)
}
