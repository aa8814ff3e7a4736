//! What an operator does at the command line, on the database itself. The audit log has it as the command line's.

use wrenn_proto::rest::Secret;

use super::{Person, UserStatus, acceptable, known_form, new_email, person_name};
use crate::domain::around::AuditEntry;
use crate::domain::{TeamId, UserId};
use crate::service::Services;
use crate::store::Outcome;
use crate::{Error, Result};

impl Services {
    /// Makes an account that exists a platform admin; `None` when there is none.
    pub async fn grant_platform_admin(&self, email: &str) -> Result<Option<UserId>> {
        let Some(account) = self.store.account_by_email(&known_form(email)).await? else {
            return Ok(None);
        };
        match self.store.grant_platform_admin(account.id).await? {
            Outcome::Updated => {
                self.audit(AuditEntry::cli("admin.user_promote", "user", account.id));
                Ok(Some(account.id))
            }
            Outcome::Stale | Outcome::Missing => Ok(None),
        }
    }

    /// Creates a platform admin with a team of their own.
    pub async fn create_platform_admin(
        &self,
        email: &str,
        name: Option<&str>,
        password: &Secret,
    ) -> Result<UserId> {
        let email = new_email(email)?;
        let name = person_name(name.unwrap_or(email.split('@').next().unwrap_or_default()))?;
        acceptable("password", password)?;
        let hash = self.accounts.passwords.hash(password).await?;
        let person = Person {
            email: &email,
            name: &name,
            password_hash: Some(&hash),
            // An operator vouches for the person; their mailbox is not proved by that.
            status: UserStatus::Active,
            email_verified: false,
            platform_admin: true,
        };
        let (user, _) = self.create_account(person, None).await?;
        self.audit(AuditEntry::cli("admin.user_create", "user", user));
        Ok(user)
    }

    /// Creates an active user with a team of their own and of their name, for operators and tests; people sign up.
    pub async fn create_user(&self, email: &str, name: &str, password_hash: Option<&str>) -> Result<UserId> {
        let email = new_email(email)?;
        let person = Person {
            email: &email,
            name,
            password_hash,
            status: UserStatus::Active,
            email_verified: false,
            platform_admin: false,
        };
        let (user, _) = self.create_account_with_team(person, name, None).await?;
        Ok(user)
    }

    /// A session for a user in a team, or in the one that they start in, for operators and tests; people log in.
    pub async fn issue_session(&self, user: UserId, team: Option<TeamId>) -> Result<String> {
        let account = self
            .store
            .account(user)
            .await?
            .ok_or_else(|| Error::not_found("user", user))?;
        let team = match team {
            None => self.store.first_team(user).await?,
            Some(team) => {
                let row = self
                    .store
                    .team_of_user(team, user)
                    .await?
                    .ok_or_else(|| Error::not_found("team", team))?;
                Some((team, row.role))
            }
        };
        self.sessions
            .issue(user, &account.name, account.session_version, team)
    }

    /// Sets an account's password and ends its sessions.
    pub async fn set_password(&self, email: &str, password: &Secret) -> Result<UserId> {
        acceptable("password", password)?;
        let missing = || Error::not_found("account", email);
        let account = self
            .store
            .account_by_email(&known_form(email))
            .await?
            .ok_or_else(missing)?;
        if account.status == UserStatus::Disabled {
            return Err(super::closed());
        }
        let hash = self.accounts.passwords.hash(password).await?;
        match self.store.set_password(account.id, &hash).await? {
            Outcome::Updated => {}
            Outcome::Stale | Outcome::Missing => return Err(missing()),
        }
        self.audit(AuditEntry::cli("admin.user_password", "user", account.id));
        self.forgive_account(None, &account.email).await?;
        Ok(account.id)
    }
}
