//! People's accounts: how they come to be, how they are let in, and the tokens in their mails.

use sea_orm::ActiveValue::Set;
use sea_orm::sea_query::{Condition, Expr, ExprTrait as _, Order, Query};
use sea_orm::{
    ActiveModelTrait, ColumnTrait, ConnectionTrait, DbErr, EntityTrait, QueryFilter, TransactionTrait,
};

use super::entity::{email_token, membership, oauth_identity, team, user};
use super::teams::{member, team_row};
use super::{DatabaseTransaction, Outcome, Store, is_duplicate};
use crate::domain::account::{Account, MailPurpose, UserStatus};
use crate::domain::{Millis, Role, TeamId, UserId, now};

/// An account in the making, with its first team.
pub(crate) struct NewAccount<'a> {
    /// Lower case.
    pub(crate) email: &'a str,
    pub(crate) name: &'a str,
    pub(crate) password_hash: Option<&'a str>,
    pub(crate) status: UserStatus,
    pub(crate) email_verified: bool,
    pub(crate) platform_admin: bool,
    pub(crate) team_name: &'a str,
    pub(crate) slug: &'a str,
    pub(crate) identity: Option<NewIdentity<'a>>,
}

/// A user at a provider.
#[derive(Clone, Copy)]
pub(crate) struct NewIdentity<'a> {
    pub(crate) provider: &'a str,
    /// The provider's own id of the user; addresses and names change hands there.
    pub(crate) subject: &'a str,
    pub(crate) email: &'a str,
}

/// What became of a sign-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SignUpOutcome {
    Created(UserId, TeamId),
    /// There is an account of this address.
    EmailTaken,
    /// The slug is another team's; a new one helps.
    SlugTaken,
    /// The identity is another account's.
    IdentityTaken,
}

impl From<user::Model> for Account {
    fn from(row: user::Model) -> Self {
        let user::Model {
            id,
            email,
            name,
            password_hash,
            is_admin,
            status,
            created_at: _,
            updated_at: _,
            session_version,
            deleted_at: _,
            last_login_at: _,
            email_verified_at,
        } = row;
        Self {
            id: UserId(id),
            email,
            name,
            status: UserStatus::parse(&status),
            password_hash: password_hash.map(|hash| hash.0),
            session_version,
            email_verified: email_verified_at.is_some(),
            platform_admin: is_admin,
        }
    }
}

pub(super) fn user_row(id: UserId, new: &NewAccount<'_>, now: Millis) -> user::ActiveModel {
    user::ActiveModel {
        id: Set(id.0),
        email: Set(new.email.to_owned()),
        name: Set(new.name.to_owned()),
        password_hash: Set(new.password_hash.map(Into::into)),
        is_admin: Set(new.platform_admin),
        status: Set(new.status.as_str().to_owned()),
        created_at: Set(now),
        updated_at: Set(now),
        session_version: Set(0),
        deleted_at: Set(None),
        last_login_at: Set(None),
        email_verified_at: Set(new.email_verified.then_some(now)),
    }
}

impl Store {
    /// The account of an address (lower case), unless it is deleted.
    pub(crate) async fn account_by_email(&self, email: &str) -> Result<Option<Account>, DbErr> {
        let row = user::Entity::find()
            .filter(user::Column::Email.eq(email))
            .filter(user::Column::DeletedAt.is_null())
            .one(&self.db)
            .await?;
        Ok(row.map(Account::from))
    }

    /// An account, unless it is deleted.
    pub(crate) async fn account(&self, id: UserId) -> Result<Option<Account>, DbErr> {
        let row = user::Entity::find_by_id(id.0)
            .filter(user::Column::DeletedAt.is_null())
            .one(&self.db)
            .await?;
        Ok(row.map(Account::from))
    }

    /// Creates an account with its first team, all or nothing.
    pub(crate) async fn sign_up(&self, new: NewAccount<'_>) -> Result<SignUpOutcome, DbErr> {
        let (user, team, now) = (UserId::new(), TeamId::new(), now());
        // Dropped without a commit, a transaction is rolled back.
        let transaction = self.db.begin().await?;
        let inserted = user_row(user, &new, now).insert(&transaction).await;
        match inserted {
            Ok(_) => {}
            Err(error) if is_duplicate(&error) => return Ok(SignUpOutcome::EmailTaken),
            Err(error) => return Err(error),
        }
        let inserted = team_row(team, new.team_name, new.slug, now)
            .insert(&transaction)
            .await;
        match inserted {
            Ok(_) => {}
            Err(error) if is_duplicate(&error) => return Ok(SignUpOutcome::SlugTaken),
            Err(error) => return Err(error),
        }
        member(user, team, Role::Owner, true, now)
            .insert(&transaction)
            .await?;
        if let Some(identity) = new.identity
            && !insert_identity(&transaction, user, identity, now).await?
        {
            return Ok(SignUpOutcome::IdentityTaken);
        }
        transaction.commit().await?;
        Ok(SignUpOutcome::Created(user, team))
    }

    /// The team that a user starts in: the default one, else the first that is active. Deleted teams do not count.
    pub(crate) async fn first_team(&self, user: UserId) -> Result<Option<(TeamId, Role)>, DbErr> {
        let query = Query::select()
            .column((membership::Entity, membership::Column::TeamId))
            .column((membership::Entity, membership::Column::Role))
            .from(membership::Entity)
            .join(
                sea_orm::JoinType::InnerJoin,
                team::Entity,
                Condition::all()
                    .add(
                        Expr::col((team::Entity, team::Column::Id))
                            .equals((membership::Entity, membership::Column::TeamId)),
                    )
                    .add(Expr::col((team::Entity, team::Column::DeletedAt)).is_null()),
            )
            .and_where(Expr::col((membership::Entity, membership::Column::UserId)).eq(user.0))
            .order_by((membership::Entity, membership::Column::IsDefault), Order::Desc)
            .order_by((membership::Entity, membership::Column::CreatedAt), Order::Asc)
            .order_by((membership::Entity, membership::Column::TeamId), Order::Asc)
            .limit(1)
            .to_owned();
        let statement = self.db.get_database_backend().build(&query);
        let Some(row) = self.db.query_one_raw(statement).await? else {
            return Ok(None);
        };
        let team: uuid::Uuid = row.try_get("", "team_id")?;
        let role: String = row.try_get("", "role")?;
        let role = Role::parse(&role).ok_or_else(|| super::corrupt("users_teams", "role"))?;
        Ok(Some((TeamId(team), role)))
    }

    /// Notes a login.
    pub(crate) async fn note_login(&self, user: UserId) -> Result<(), DbErr> {
        user::Entity::update_many()
            .col_expr(user::Column::LastLoginAt, now().into())
            .filter(user::Column::Id.eq(user.0))
            .exec(&self.db)
            .await
            .map(drop)
    }

    /// Replaces a password's hash by one of the same password; nothing happens when it was changed meanwhile.
    pub(crate) async fn rehash_password(&self, user: UserId, old: &str, new: &str) -> Result<(), DbErr> {
        user::Entity::update_many()
            .col_expr(user::Column::PasswordHash, new.into())
            .filter(user::Column::Id.eq(user.0))
            .filter(user::Column::PasswordHash.eq(old))
            .exec(&self.db)
            .await
            .map(drop)
    }

    /// Sets a password, ends all sessions and voids the links that are under way, if the account's sessions are still
    /// those that the caller saw.
    pub(crate) async fn change_password(
        &self,
        user: UserId,
        session_version: i32,
        hash: &str,
    ) -> Result<Outcome, DbErr> {
        let transaction = self.db.begin().await?;
        let changed = user::Entity::update_many()
            .col_expr(user::Column::PasswordHash, hash.into())
            .col_expr(
                user::Column::SessionVersion,
                (session_version.wrapping_add(1)).into(),
            )
            .col_expr(user::Column::UpdatedAt, now().into())
            .filter(user::Column::Id.eq(user.0))
            .filter(user::Column::SessionVersion.eq(session_version))
            .filter(user::Column::DeletedAt.is_null())
            .exec(&transaction)
            .await?;
        if changed.rows_affected > 0 {
            void_tokens(&transaction, user).await?;
            transaction.commit().await?;
            return Ok(Outcome::Updated);
        }
        drop(transaction);
        Ok(match self.account(user).await? {
            Some(_) => Outcome::Stale,
            None => Outcome::Missing,
        })
    }

    /// Sets a password for whoever operates the installation: ends all sessions, opens an account that waits for its
    /// mail, and voids what mails are under way.
    pub(crate) async fn set_password(&self, user: UserId, hash: &str) -> Result<Outcome, DbErr> {
        let transaction = self.db.begin().await?;
        if !overwrite_password(&transaction, user, Some(hash), false).await? {
            return Ok(Outcome::Missing);
        }
        void_tokens(&transaction, user).await?;
        transaction.commit().await?;
        Ok(Outcome::Updated)
    }

    /// Makes a user a platform admin.
    pub(crate) async fn grant_platform_admin(&self, user: UserId) -> Result<Outcome, DbErr> {
        let changed = user::Entity::update_many()
            .col_expr(user::Column::IsAdmin, true.into())
            .col_expr(user::Column::UpdatedAt, now().into())
            .filter(user::Column::Id.eq(user.0))
            .filter(user::Column::DeletedAt.is_null())
            .exec(&self.db)
            .await?;
        Ok(match changed.rows_affected {
            0 => Outcome::Missing,
            _ => Outcome::Updated,
        })
    }

    /// Changes a user's name.
    pub(crate) async fn rename_user(&self, user: UserId, name: &str) -> Result<Outcome, DbErr> {
        let changed = user::Entity::update_many()
            .col_expr(user::Column::Name, name.into())
            .col_expr(user::Column::UpdatedAt, now().into())
            .filter(user::Column::Id.eq(user.0))
            .filter(user::Column::DeletedAt.is_null())
            .exec(&self.db)
            .await?;
        Ok(match changed.rows_affected {
            0 => Outcome::Missing,
            _ => Outcome::Updated,
        })
    }

    /// Keeps a mail's token, as its hash.
    pub(crate) async fn email_token_add(
        &self,
        user: UserId,
        purpose: MailPurpose,
        hash: &str,
        expires_at: Millis,
    ) -> Result<(), DbErr> {
        email_token::ActiveModel {
            id: Set(UserId::new().0),
            user_id: Set(user.0),
            purpose: Set(purpose.as_str().to_owned()),
            token_hash: Set(hash.into()),
            created_at: Set(now()),
            expires_at: Set(expires_at),
            used_at: Set(None),
        }
        .insert(&self.db)
        .await
        .map(drop)
    }

    /// Whether a mail's token could be used now; to spare the work when it could not.
    pub(crate) async fn email_token_good(&self, purpose: MailPurpose, hash: &str) -> Result<bool, DbErr> {
        let row = email_token::Entity::find()
            .filter(email_token::Column::TokenHash.eq(hash))
            .filter(email_token::Column::Purpose.eq(purpose.as_str()))
            .filter(email_token::Column::UsedAt.is_null())
            .filter(email_token::Column::ExpiresAt.gt(now()))
            .one(&self.db)
            .await?;
        Ok(row.is_some())
    }

    /// Uses an activation token up and activates its account, all or nothing. `None`: the token is no good, or the
    /// account waits for nothing.
    pub(crate) async fn activate(&self, hash: &str) -> Result<Option<UserId>, DbErr> {
        let transaction = self.db.begin().await?;
        let Some(user) = use_token(&transaction, MailPurpose::Activate, hash).await? else {
            return Ok(None);
        };
        let now = now();
        let activated = user::Entity::update_many()
            .col_expr(user::Column::Status, UserStatus::Active.as_str().into())
            .col_expr(user::Column::EmailVerifiedAt, now.into())
            .col_expr(user::Column::UpdatedAt, now.into())
            .filter(user::Column::Id.eq(user.0))
            .filter(user::Column::Status.eq(UserStatus::Inactive.as_str()))
            .filter(user::Column::DeletedAt.is_null())
            .exec(&transaction)
            .await?;
        if activated.rows_affected == 0 {
            return Ok(None);
        }
        void_tokens(&transaction, user).await?;
        transaction.commit().await?;
        Ok(Some(user))
    }

    /// Uses a reset token up and sets the password, all or nothing. All sessions end, and the other links that are
    /// under way are void. `None`: the token is no good, or the account is closed.
    ///
    /// The token came to the account's address, so it proves as much as an activation does.
    pub(crate) async fn reset_password(
        &self,
        token_hash: &str,
        password_hash: &str,
    ) -> Result<Option<UserId>, DbErr> {
        let transaction = self.db.begin().await?;
        let Some(user) = use_token(&transaction, MailPurpose::Reset, token_hash).await? else {
            return Ok(None);
        };
        if !overwrite_password(&transaction, user, Some(password_hash), true).await? {
            return Ok(None);
        }
        void_tokens(&transaction, user).await?;
        transaction.commit().await?;
        Ok(Some(user))
    }

    /// Removes tokens that ran out before a time.
    pub(crate) async fn email_tokens_sweep(&self, before: Millis) -> Result<u64, DbErr> {
        let swept = email_token::Entity::delete_many()
            .filter(email_token::Column::ExpiresAt.lt(before))
            .exec(&self.db)
            .await?;
        Ok(swept.rows_affected)
    }

    /// The account behind a provider's user, unless it is deleted.
    pub(crate) async fn account_by_identity(
        &self,
        provider: &str,
        subject: &str,
    ) -> Result<Option<Account>, DbErr> {
        let owner = Query::select()
            .column(oauth_identity::Column::UserId)
            .from(oauth_identity::Entity)
            .and_where(oauth_identity::Column::Provider.eq(provider))
            .and_where(oauth_identity::Column::Subject.eq(subject))
            .to_owned();
        let row = user::Entity::find()
            .filter(user::Column::Id.in_subquery(owner))
            .filter(user::Column::DeletedAt.is_null())
            .one(&self.db)
            .await?;
        Ok(row.map(Account::from))
    }

    /// The providers that an account is connected with.
    pub(crate) async fn providers_of(&self, user: UserId) -> Result<Vec<String>, DbErr> {
        use sea_orm::QueryOrder as _;
        // One row per provider that the installation knows: a handful.
        let rows = oauth_identity::Entity::find()
            .filter(oauth_identity::Column::UserId.eq(user.0))
            .order_by_asc(oauth_identity::Column::Provider)
            .all(&self.db)
            .await?;
        Ok(rows.into_iter().map(|row| row.provider).collect())
    }

    /// Connects an account with a provider's user. `false`: one of the two is connected already.
    pub(crate) async fn identity_add(&self, user: UserId, identity: NewIdentity<'_>) -> Result<bool, DbErr> {
        insert_identity(&self.db, user, identity, now()).await
    }

    /// Hands an account that nobody ever proved to own to whoever a provider says owns its address: the password,
    /// which a stranger may have chosen, goes. `Stale`: it is no longer in that state, or the identity is taken.
    pub(crate) async fn claim_unproven(
        &self,
        user: UserId,
        identity: NewIdentity<'_>,
    ) -> Result<Outcome, DbErr> {
        let transaction = self.db.begin().await?;
        let now = now();
        let claimed = user::Entity::update_many()
            .col_expr(user::Column::Status, UserStatus::Active.as_str().into())
            .col_expr(user::Column::PasswordHash, Expr::value(Option::<String>::None))
            .col_expr(
                user::Column::SessionVersion,
                Expr::col(user::Column::SessionVersion).add(1),
            )
            .col_expr(user::Column::EmailVerifiedAt, now.into())
            .col_expr(user::Column::UpdatedAt, now.into())
            .filter(user::Column::Id.eq(user.0))
            .filter(user::Column::Status.eq(UserStatus::Inactive.as_str()))
            .filter(user::Column::EmailVerifiedAt.is_null())
            .filter(user::Column::DeletedAt.is_null())
            .exec(&transaction)
            .await?;
        if claimed.rows_affected == 0 || !insert_identity(&transaction, user, identity, now).await? {
            return Ok(Outcome::Stale);
        }
        void_tokens(&transaction, user).await?;
        transaction.commit().await?;
        Ok(Outcome::Updated)
    }

    /// Disconnects an account from a provider, unless no way to log in would be left (`Stale`).
    pub(crate) async fn identity_remove(&self, user: UserId, provider: &str) -> Result<Outcome, DbErr> {
        let transaction = self.db.begin().await?;
        // Takes the user's row, so that two removals of the last two ways come one after the other.
        user::Entity::update_many()
            .col_expr(user::Column::UpdatedAt, now().into())
            .filter(user::Column::Id.eq(user.0))
            .exec(&transaction)
            .await?;
        let with_password = Query::select()
            .column(user::Column::Id)
            .from(user::Entity)
            .and_where(user::Column::Id.eq(user.0))
            .and_where(user::Column::PasswordHash.is_not_null())
            .to_owned();
        let elsewhere = Query::select()
            .column(oauth_identity::Column::UserId)
            .from(oauth_identity::Entity)
            .and_where(oauth_identity::Column::UserId.eq(user.0))
            .and_where(oauth_identity::Column::Provider.ne(provider))
            .to_owned();
        let of_user = Condition::all()
            .add(oauth_identity::Column::UserId.eq(user.0))
            .add(oauth_identity::Column::Provider.eq(provider));
        let removed = oauth_identity::Entity::delete_many()
            .filter(of_user.clone())
            .filter(
                Condition::any()
                    .add(oauth_identity::Column::UserId.in_subquery(with_password))
                    .add(oauth_identity::Column::UserId.in_subquery(elsewhere)),
            )
            .exec(&transaction)
            .await?;
        if removed.rows_affected > 0 {
            transaction.commit().await?;
            return Ok(Outcome::Updated);
        }
        let connected = oauth_identity::Entity::find()
            .filter(of_user)
            .one(&transaction)
            .await?;
        Ok(match connected {
            Some(_) => Outcome::Stale,
            None => Outcome::Missing,
        })
    }
}

/// `false`: the identity, or the user's place at that provider, is taken.
async fn insert_identity(
    db: &impl ConnectionTrait,
    user: UserId,
    identity: NewIdentity<'_>,
    now: Millis,
) -> Result<bool, DbErr> {
    let inserted = oauth_identity::ActiveModel {
        id: Set(UserId::new().0),
        user_id: Set(user.0),
        provider: Set(identity.provider.to_owned()),
        subject: Set(identity.subject.to_owned()),
        email: Set(identity.email.to_owned()),
        created_at: Set(now),
    }
    .insert(db)
    .await;
    match inserted {
        Ok(_) => Ok(true),
        Err(error) if is_duplicate(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Sets a password, ends all sessions and opens an account that waits for its mail. `false`: it is closed or gone.
async fn overwrite_password(
    transaction: &DatabaseTransaction,
    user: UserId,
    hash: Option<&str>,
    proves_address: bool,
) -> Result<bool, DbErr> {
    let now = now();
    let mut update = user::Entity::update_many()
        .col_expr(user::Column::PasswordHash, Expr::value(hash.map(str::to_owned)))
        .col_expr(
            user::Column::SessionVersion,
            Expr::col(user::Column::SessionVersion).add(1),
        )
        .col_expr(user::Column::Status, UserStatus::Active.as_str().into())
        .col_expr(user::Column::UpdatedAt, now.into());
    if proves_address {
        update = update.col_expr(user::Column::EmailVerifiedAt, now.into());
    }
    let changed = update
        .filter(user::Column::Id.eq(user.0))
        .filter(user::Column::Status.is_in([UserStatus::Active.as_str(), UserStatus::Inactive.as_str()]))
        .filter(user::Column::DeletedAt.is_null())
        .exec(transaction)
        .await?;
    Ok(changed.rows_affected > 0)
}

/// Uses a token up; of several at once, one succeeds.
async fn use_token(
    transaction: &DatabaseTransaction,
    purpose: MailPurpose,
    hash: &str,
) -> Result<Option<UserId>, DbErr> {
    let now = now();
    let used = email_token::Entity::update_many()
        .col_expr(email_token::Column::UsedAt, now.into())
        .filter(email_token::Column::TokenHash.eq(hash))
        .filter(email_token::Column::Purpose.eq(purpose.as_str()))
        .filter(email_token::Column::UsedAt.is_null())
        .filter(email_token::Column::ExpiresAt.gt(now))
        .exec(transaction)
        .await?;
    if used.rows_affected == 0 {
        return Ok(None);
    }
    let row = email_token::Entity::find()
        .filter(email_token::Column::TokenHash.eq(hash))
        .one(transaction)
        .await?;
    Ok(row.map(|row| UserId(row.user_id)))
}

/// Makes all tokens of an account that are under way useless.
async fn void_tokens(transaction: &DatabaseTransaction, user: UserId) -> Result<(), DbErr> {
    email_token::Entity::update_many()
        .col_expr(email_token::Column::UsedAt, now().into())
        .filter(email_token::Column::UserId.eq(user.0))
        .filter(email_token::Column::UsedAt.is_null())
        .exec(transaction)
        .await
        .map(drop)
}
