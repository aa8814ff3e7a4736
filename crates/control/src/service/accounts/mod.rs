//! Accounts: how people come in, and their own data.
//!
//! Whether an address has an account must not be learned from a login or a reset: both say the same in either case
//! and take the same time. A sign-up does tell, since it has to be refused.

mod admin;
mod github;
mod limits;
mod oauth;

use std::net::IpAddr;
use std::sync::Arc;

use wrenn_proto::rest::{
    Activate, ChangePassword, ConfirmReset, LogIn, LoggedIn, Me, ResetPassword, Secret, SignUp, SignedUp,
    SwitchTeam, UpdateMe,
};

use super::Services;
use crate::auth;
use crate::auth::password::{Passwords, Verdict, acceptable};
use crate::config::ControlConfig;
use crate::domain::account::{Account, MailPurpose, UserStatus};
use crate::domain::around::AuditEntry;
use crate::domain::{Role, Session, TeamId, UserId, now};
use crate::mail::{Mail, Mailer};
use crate::store::{NewAccount, NewIdentity, Outcome, SignUpOutcome};
use crate::tasks::{TaskKind, Tasks};
use crate::{Error, ErrorCode, Result};

pub(crate) use oauth::{Arrival, Departure, STATE_LIFE};

/// Longest address that mail servers carry, bytes.
const MAX_EMAIL: usize = 254;
/// Longest name, characters.
const MAX_NAME: usize = 100;
/// Longest default team name, characters.
const MAX_TEAM_NAME: usize = 60;
/// Life of an activation link: a day.
const ACTIVATION_LIFE: i64 = 24 * 3_600_000;
/// Life of a reset link: an hour.
const RESET_LIFE: i64 = 3_600_000;
/// How often a taken slug is replaced by another; with 48 random bits the second is taken only if something is wrong.
const SLUG_ATTEMPTS: usize = 5;

/// What accounts need beside the store.
pub(crate) struct Accounts {
    passwords: Passwords,
    mailer: Mailer,
    providers: Vec<Arc<dyn oauth::Provider>>,
}

impl Accounts {
    pub(crate) fn new(config: &ControlConfig, tasks: &Tasks) -> Result<Self> {
        let mut providers: Vec<Arc<dyn oauth::Provider>> = Vec::new();
        for provider in &config.oauth {
            providers.push(Arc::new(github::GitHub::new(provider)?));
        }
        Ok(Self {
            passwords: Passwords::new(config.password_cost)?,
            mailer: Mailer::new(
                config.smtp.as_ref(),
                config.log_links,
                tasks.clone(),
                config.timings.mail_retry,
            )?,
            providers,
        })
    }
}

impl Services {
    /// Creates an account with its first team.
    pub(crate) async fn sign_up(&self, from: Option<IpAddr>, body: SignUp) -> Result<SignedUp> {
        let SignUp {
            email,
            password,
            name,
        } = body;
        let email = new_email(&email)?;
        let name = person_name(&name)?;
        acceptable("password", &password)?;
        self.admit_sign_up(from).await?;
        let hash = self.accounts.passwords.hash(&password).await?;
        let proves = self.accounts.mailer.reaches_people();
        let status = if proves {
            UserStatus::Inactive
        } else {
            UserStatus::Active
        };
        let person = Person {
            email: &email,
            name: &name,
            password_hash: Some(&hash),
            status,
            email_verified: false,
            platform_admin: false,
        };
        let (user, team) = self.create_account(person, None).await?;
        let token = if proves {
            self.mail_link(user, email.clone(), MailPurpose::Activate);
            None
        } else {
            let token = self.sessions.issue(user, &name, 0, Some((team, Role::Owner)))?;
            Some(Secret::new(token))
        };
        tracing::info!(user = %user, "an account was created");
        Ok(SignedUp {
            token,
            user_id: user.to_string(),
            team_id: team.to_string(),
            email,
            name,
            status: status.as_str().to_owned(),
        })
    }

    /// Begins a session by password. `tried` hears whose account it is about, also when it comes to nothing: that is
    /// for the audit log, and nothing that the caller may learn.
    pub(crate) async fn log_in(
        &self,
        from: Option<IpAddr>,
        body: LogIn,
        tried: impl FnOnce(UserId) + Send,
    ) -> Result<LoggedIn> {
        let LogIn { email, password } = body;
        let email = known_form(&email);
        self.admit_login(from, &email).await?;
        let account = self.store.account_by_email(&email).await?;
        if let Some(account) = &account {
            tried(account.id);
        }
        let stored = account
            .as_ref()
            .and_then(|account| account.password_hash.as_deref());
        let verdict = self.accounts.passwords.check(stored, &password).await?;
        let account = match (account, verdict) {
            (Some(account), Verdict::Right | Verdict::RightButOld) => account,
            (_, Verdict::Wrong) | (None, _) => {
                return Err(Error::new(
                    ErrorCode::Unauthorized,
                    "the email or the password is wrong",
                ));
            }
        };
        match account.status {
            UserStatus::Active => {}
            UserStatus::Inactive => {
                // Whoever lost the first mail gets another one; the limit is shared with resets.
                let message = match self.admit_mail(&account.email).await {
                    Ok(()) => {
                        self.mail_link(account.id, account.email.clone(), MailPurpose::Activate);
                        "this account is not active yet: follow the link in the mail that was just sent"
                    }
                    Err(error) if error.code == ErrorCode::RateLimited => {
                        "this account is not active yet: follow the link in the mail that was sent"
                    }
                    Err(error) => return Err(error),
                };
                return Err(Error::new(ErrorCode::Forbidden, message));
            }
            UserStatus::Disabled => return Err(closed()),
        }
        if verdict == Verdict::RightButOld
            && let Some(old) = &account.password_hash
        {
            let fresh = self.accounts.passwords.hash(&password).await?;
            self.store.rehash_password(account.id, old, &fresh).await?;
        }
        self.forgive_login(from, &email).await?;
        self.begin_session(&account).await
    }

    /// Activates an account by the token of its mail, and begins a session.
    pub(crate) async fn activate(&self, body: Activate) -> Result<LoggedIn> {
        let user = self
            .store
            .activate(&auth::hash(body.token.reveal()))
            .await?
            .ok_or_else(bad_link)?;
        let account = self.store.account(user).await?.ok_or_else(bad_link)?;
        self.begin_session(&account).await
    }

    /// A session of the same person in another of their teams.
    pub(crate) async fn switch_team(&self, session: &Session, body: SwitchTeam) -> Result<LoggedIn> {
        let missing = || Error::not_found("team", &body.team_id);
        let team: TeamId = body.team_id.parse().map_err(|_| missing())?;
        let row = self
            .store
            .session(session.user, Some(team))
            .await?
            .ok_or_else(missing)?;
        let role = row
            .team_id
            .and(row.role.as_deref())
            .and_then(Role::parse)
            .ok_or_else(missing)?;
        // The old session's generation, not the row's: a session that a new password is ending at this moment must
        // not turn into one that outlives it.
        let token = self
            .sessions
            .issue(session.user, &row.name, session.version, Some((team, role)))?;
        Ok(LoggedIn {
            token: Secret::new(token),
            user_id: session.user.to_string(),
            team_id: Some(team.to_string()),
            email: row.email,
            name: row.name,
        })
    }

    /// The caller's own account.
    pub async fn me(&self, session: &Session) -> Result<Me> {
        let account = self.own_account(session).await?;
        Ok(Me {
            providers: self.store.providers_of(account.id).await?,
            name: account.name,
            email: account.email,
            has_password: account.password_hash.is_some(),
        })
    }

    /// Changes the caller's name.
    pub(crate) async fn update_me(&self, session: &Session, body: UpdateMe) -> Result<Me> {
        if let Some(name) = body.name {
            match self.store.rename_user(session.user, &person_name(&name)?).await? {
                Outcome::Updated => {}
                Outcome::Stale | Outcome::Missing => return Err(ended()),
            }
        }
        self.me(session).await
    }

    /// Changes the caller's password. All other sessions end; the answer carries this one's successor.
    pub(crate) async fn change_own_password(
        &self,
        session: &Session,
        from: Option<IpAddr>,
        body: ChangePassword,
    ) -> Result<LoggedIn> {
        let ChangePassword {
            current_password,
            new_password,
            confirm_password,
        } = body;
        acceptable("new_password", &new_password)?;
        if confirm_password.is_some_and(|again| again != new_password) {
            return Err(Error::invalid("confirm_password differs from new_password"));
        }
        let account = self.own_account(session).await?;
        if let Some(stored) = &account.password_hash {
            let current = current_password
                .ok_or_else(|| Error::invalid("current_password is needed: the account has a password"))?;
            // A stolen session must not serve to find the password out.
            self.admit_login(from, &account.email).await?;
            if self.accounts.passwords.check(Some(stored), &current).await? == Verdict::Wrong {
                return Err(Error::new(ErrorCode::Forbidden, "current_password is wrong"));
            }
            self.forgive_login(from, &account.email).await?;
        }
        let hash = self.accounts.passwords.hash(&new_password).await?;
        match self
            .store
            .change_password(account.id, session.version, &hash)
            .await?
        {
            Outcome::Updated => {}
            // Another change was faster, and has ended this session.
            Outcome::Stale | Outcome::Missing => return Err(ended()),
        }
        tracing::info!(user = %account.id, "a password was changed");
        let version = session.version.wrapping_add(1);
        let token = self
            .sessions
            .issue(account.id, &account.name, version, session.team)?;
        Ok(LoggedIn {
            token: Secret::new(token),
            user_id: account.id.to_string(),
            team_id: session.team.map(|(team, _)| team.to_string()),
            email: account.email,
            name: account.name,
        })
    }

    /// Sends a link that sets a new password, if there is such an account. Nothing tells whether there is.
    pub(crate) async fn request_reset(&self, from: Option<IpAddr>, body: ResetPassword) -> Result<()> {
        let email = known_form(&body.email);
        self.admit_reset(from).await?;
        self.admit_mail(&email).await?;
        let services = self.clone();
        // Also the look-up happens behind the answer, whose time would tell otherwise.
        self.tasks.spawn(TaskKind::Mail, async move {
            match services.store.account_by_email(&email).await {
                Ok(Some(account)) if account.status != UserStatus::Disabled => {
                    services.mail_link(account.id, account.email, MailPurpose::Reset);
                }
                Ok(_) => {}
                Err(error) => tracing::error!(%error, "a password reset could not be prepared"),
            }
        });
        Ok(())
    }

    /// Sets a password by the token of a mail, and ends all sessions. Returns whose password it is.
    pub(crate) async fn confirm_reset(&self, from: Option<IpAddr>, body: ConfirmReset) -> Result<UserId> {
        let ConfirmReset { token, new_password } = body;
        acceptable("new_password", &new_password)?;
        self.admit_reset(from).await?;
        let token = auth::hash(token.reveal());
        if !self.store.email_token_good(MailPurpose::Reset, &token).await? {
            return Err(bad_link());
        }
        let hash = self.accounts.passwords.hash(&new_password).await?;
        let user = self
            .store
            .reset_password(&token, &hash)
            .await?
            .ok_or_else(bad_link)?;
        tracing::info!(user = %user, "a password was reset");
        // Whoever was locked out by a stranger's guesses gets in again.
        if let Some(account) = self.store.account(user).await? {
            self.forgive_account(from, &account.email).await?;
        }
        Ok(user)
    }

    /// Removes what has run out: tokens of mails, and counters of attempts.
    pub(crate) async fn accounts_pass(&self) -> Result<()> {
        let tokens = self.store.email_tokens_sweep(now()).await?;
        let counters = self.store.rate_limits_sweep().await?;
        tracing::debug!(tokens, counters, "what had run out was removed");
        Ok(())
    }

    /// A session in the user's first team.
    async fn begin_session(&self, account: &Account) -> Result<LoggedIn> {
        let team = self.store.first_team(account.id).await?;
        self.store.note_login(account.id).await?;
        let token = self
            .sessions
            .issue(account.id, &account.name, account.session_version, team)?;
        Ok(LoggedIn {
            token: Secret::new(token),
            user_id: account.id.to_string(),
            team_id: team.map(|(team, _)| team.to_string()),
            email: account.email.clone(),
            name: account.name.clone(),
        })
    }

    /// Creates an account with a team named after it.
    async fn create_account(
        &self,
        person: Person<'_>,
        identity: Option<NewIdentity<'_>>,
    ) -> Result<(UserId, TeamId)> {
        self.create_account_with_team(person, &team_name(person.name), identity)
            .await
    }

    async fn create_account_with_team(
        &self,
        person: Person<'_>,
        team_name: &str,
        identity: Option<NewIdentity<'_>>,
    ) -> Result<(UserId, TeamId)> {
        for _ in 0..SLUG_ATTEMPTS {
            let slug = super::bootstrap::new_slug()?;
            let Person {
                email,
                name,
                password_hash,
                status,
                email_verified,
                platform_admin,
            } = person;
            let new = NewAccount {
                email,
                name,
                password_hash,
                status,
                email_verified,
                platform_admin,
                team_name,
                slug: &slug,
                identity,
            };
            match self.store.sign_up(new).await? {
                SignUpOutcome::Created(user, team) => return Ok((user, team)),
                SignUpOutcome::SlugTaken => {}
                SignUpOutcome::EmailTaken => {
                    return Err(Error::new(
                        ErrorCode::Conflict,
                        "there is an account with this email; log in, or reset its password",
                    ));
                }
                SignUpOutcome::IdentityTaken => {
                    return Err(Error::new(
                        ErrorCode::Conflict,
                        "another account is connected with this user of the provider",
                    ));
                }
            }
        }
        Err(Error::internal("no free team slug was found"))
    }

    /// Makes a token and mails its link, in the background.
    fn mail_link(&self, user: UserId, to: String, purpose: MailPurpose) {
        let services = self.clone();
        self.tasks.spawn(TaskKind::Mail, async move {
            if let Err(error) = services.write_link(user, to, purpose).await {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "a mail could not be prepared"
                );
            }
        });
    }

    async fn write_link(&self, user: UserId, to: String, purpose: MailPurpose) -> Result<()> {
        let token = auth::random_secret("", 32)?;
        let (life, action, page, subject, text) = match purpose {
            MailPurpose::Activate => (
                ACTIVATION_LIFE,
                "account.activation_mail",
                "activate",
                "Activate your Wrenn account",
                "Welcome. This link, good for a day, activates your account:",
            ),
            MailPurpose::Reset => (
                RESET_LIFE,
                "account.reset_mail",
                "reset-password",
                "Set a new Wrenn password",
                "This link, good for an hour, lets you set a new password:",
            ),
        };
        self.store
            .email_token_add(user, purpose, &auth::hash(&token), now() + life)
            .await?;
        // Who asked for it is an entry of its own, which cannot say whether there is such an account.
        self.audit(AuditEntry::system(None, action, "user", user));
        // Browsers send nothing of a fragment, so the token is in no server's or proxy's log.
        let link = format!("{}/{page}#token={token}", self.public_url());
        self.accounts.mailer.send(Mail {
            to,
            subject: subject.to_owned(),
            text: text.to_owned(),
            link: Secret::new(link),
        });
        Ok(())
    }

    /// Where people reach this installation, without a slash at the end.
    pub fn public_url(&self) -> &str {
        let url = self.config.public_url.as_deref();
        url.unwrap_or("http://localhost:8000").trim_end_matches('/')
    }

    async fn own_account(&self, session: &Session) -> Result<Account> {
        self.store.account(session.user).await?.ok_or_else(ended)
    }
}

/// A person in the making.
#[derive(Clone, Copy)]
struct Person<'a> {
    email: &'a str,
    name: &'a str,
    password_hash: Option<&'a str>,
    status: UserStatus,
    email_verified: bool,
    platform_admin: bool,
}

fn bad_link() -> Error {
    Error::invalid("the token is not valid, was used, or is too old; ask for a new mail")
}

fn ended() -> Error {
    Error::new(ErrorCode::Unauthorized, "the session has ended; log in again")
}

fn closed() -> Error {
    Error::new(
        ErrorCode::Forbidden,
        "this account is deactivated; a platform admin can activate it again",
    )
}

/// The form in which addresses are stored and compared.
fn known_form(email: &str) -> String {
    // What cannot be stored cannot be known either, and looks up nothing.
    let email = email.trim();
    if email.len() > MAX_EMAIL || email.contains(char::is_control) {
        return String::new();
    }
    email.to_lowercase()
}

/// An address that can get mail, in its stored form.
fn new_email(email: &str) -> Result<String> {
    let email = known_form(email);
    if email.len() > MAX_EMAIL || email.parse::<lettre::Address>().is_err() {
        return Err(Error::invalid(format!(
            "email must be an address like ada@example.com, of at most {MAX_EMAIL} bytes"
        )));
    }
    Ok(email)
}

/// A name that people can have.
fn person_name(name: &str) -> Result<String> {
    let name = name.trim();
    if !(1..=MAX_NAME).contains(&name.chars().count()) || name.contains(char::is_control) {
        return Err(Error::invalid(format!(
            "name must have 1 to {MAX_NAME} characters, none of them a control character"
        )));
    }
    Ok(name.to_owned())
}

/// A first team's name: what of the person's name a team's may hold.
fn team_name(person: &str) -> String {
    let allowed = |c: &char| c.is_alphanumeric() || " -_@'".contains(*c);
    let kept: String = person.chars().filter(allowed).take(MAX_TEAM_NAME - 7).collect();
    match kept.trim() {
        "" => "My team".to_owned(),
        kept => format!("{kept}'s team"),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn addresses_have_one_form() {
        assert_eq!(new_email(" Ada@Example.COM ").expect("good"), "ada@example.com");
        assert_eq!(new_email("admin@localhost").expect("good"), "admin@localhost");
        let long = format!("{}@example.com", "a".repeat(250));
        for bad in [
            "",
            "ada",
            "a@",
            "@b",
            "a b@c.d",
            "a@b\0.c",
            "a@b.c\r\nBcc: x@y.z",
            &long,
        ] {
            assert!(new_email(bad).is_err(), "{bad:?}");
        }
        assert_eq!(known_form("a\0b@c.d"), "");
    }

    #[test]
    fn names_are_readable() {
        assert_eq!(person_name("  Ada Lovelace ").expect("good"), "Ada Lovelace");
        for bad in ["", "   ", "a\nb", "a\0b", &"x".repeat(101)] {
            assert!(person_name(bad).is_err(), "{bad:?}");
        }
        assert_eq!(team_name("Ada"), "Ada's team");
        assert_eq!(team_name("(✨)"), "My team");
    }

    proptest! {
        #[test]
        fn a_first_team_has_a_name_that_teams_may_have(person in "\\PC{1,100}") {
            let name = team_name(&person);
            prop_assert!((1..=MAX_TEAM_NAME).contains(&name.chars().count()));
            prop_assert!(name.chars().all(|c| c.is_alphanumeric() || " -_@'".contains(c)));
        }

        #[test]
        fn the_stored_form_is_a_fixed_point(email in "\\PC{0,40}") {
            let form = known_form(&email);
            prop_assert_eq!(&known_form(&form), &form);
        }
    }
}
