//! Logging in with a provider (OAuth 2 with PKCE).
//!
//! ```text
//!  start ──▶ state (sealed: provider, end, what for, hash of the cookie)   in the provider's URL
//!        └─▶ cookie (32 random bytes)                                      in this browser alone
//!  callback: state opens, has not ended, and its hash is the cookie's ──▶ code + verifier ──▶ identity
//! ```
//!
//! Nothing is stored between the two steps, so any control plane of the installation can take the second. A state
//! without its cookie is worth nothing: nobody can be made to finish a login, or a connection, that another has
//! begun. PKCE's verifier is computed from the cookie, so a stolen code is worth nothing either.
//!
//! ## Which account a provider's user gets
//! The identity (the provider's own id of the user) decides where it is known. Else the address does, if the provider
//! has verified it:
//! - no account has it: a new account;
//! - an account has it that *we* know to be its owner's (a link in a mail was followed, or another provider verified
//!   it): the two are linked, since both belong to whoever has the mailbox. Platform admins are left out: the
//!   installation must not be as weak as a provider's way to recover an account;
//! - an account has it that was never activated: the provider's word is the proof that was missing. The account goes
//!   to the address's owner, without the password, which a stranger may have chosen while waiting for just this;
//! - an account has it that is in use but unproved (without a mail server nothing is ever proved): refused. Anybody
//!   may have signed up with the address; its owner logs in by password and connects the provider in the settings.

use std::net::IpAddr;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use url::Url;
use wrenn_proto::rest::{LoggedIn, Secret};

use super::{MAX_NAME, Person, closed, ended, new_email, person_name};
use crate::auth;
use crate::domain::account::{Account, UserStatus};
use crate::domain::{Millis, Session, TeamId, UserId, now};
use crate::service::Services;
use crate::store::{NewIdentity, Outcome};
use crate::{Error, ErrorCode, Result};

/// How long a person may take at the provider: 10 minutes.
pub(crate) const STATE_LIFE: Millis = 600_000;
/// Ties a sealed state to its purpose.
const STATE_CONTEXT: &str = "oauth-state";
/// Longest state, code and cookie that are looked at.
const MAX_PARAMETER: usize = 4096;

/// A provider's user.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Identity {
    /// The provider's own id of the user.
    pub(crate) subject: String,
    /// What the user is called there.
    pub(crate) name: String,
    /// An address that the provider has verified.
    pub(crate) verified_email: Option<String>,
}

/// A way to log in elsewhere.
pub(crate) trait Provider: Send + Sync {
    /// The name in routes.
    fn name(&self) -> &str;

    /// The page on which people consent.
    fn authorize_url(&self, state: &str, challenge: &str, redirect: &str) -> Result<Url>;

    /// Who has consented, by the code that the browser brought back.
    fn identify<'a>(
        &'a self,
        code: &'a str,
        verifier: &'a str,
        redirect: &'a str,
    ) -> BoxFuture<'a, Result<Identity>>;
}

/// Where a browser is sent, and the cookie that it has to bring back.
pub(crate) struct Departure {
    pub(crate) url: Secret,
    pub(crate) cookie: Secret,
    /// Path of the callback, as the browser sees it.
    pub(crate) cookie_path: String,
    /// Whether the browser must keep the cookie from unencrypted connections.
    pub(crate) secure: bool,
}

/// What a callback came to.
pub(crate) enum Arrival {
    LoggedIn {
        user: UserId,
        team: Option<TeamId>,
        session: LoggedIn,
    },
    Connected {
        user: UserId,
        provider: String,
    },
}

/// What is sealed into a state.
#[derive(Serialize, Deserialize)]
struct State {
    provider: String,
    ends_at: Millis,
    /// Hash of the cookie.
    cookie: String,
    intent: Intent,
}

#[derive(Serialize, Deserialize)]
enum Intent {
    LogIn,
    Connect { user: UserId, version: i32 },
}

impl Services {
    /// Begins a login with a provider.
    pub(crate) fn oauth_start(&self, provider: &str) -> Result<Departure> {
        self.depart(provider, Intent::LogIn)
    }

    /// Begins to connect the caller's account with a provider.
    pub(crate) fn oauth_connect(&self, session: &Session, provider: &str) -> Result<Departure> {
        let intent = Intent::Connect {
            user: session.user,
            version: session.version,
        };
        self.depart(provider, intent)
    }

    /// Ends what [`Services::oauth_start`] or [`Services::oauth_connect`] began.
    pub(crate) async fn oauth_finish(
        &self,
        from: Option<IpAddr>,
        provider: &str,
        state: &str,
        code: &str,
        cookie: Option<&str>,
    ) -> Result<Arrival> {
        let provider = self.provider(provider)?;
        let again = || Error::invalid("this login has expired or was begun in another browser; begin again");
        let cookie = cookie.ok_or_else(again)?;
        if [state, code, cookie]
            .iter()
            .any(|part| part.len() > MAX_PARAMETER)
        {
            return Err(again());
        }
        let opened = self
            .secret
            .open(STATE_CONTEXT, state)
            .ok()
            .and_then(|bytes| serde_json::from_slice::<State>(&bytes).ok())
            .ok_or_else(again)?;
        if opened.provider != provider.name()
            || opened.ends_at <= now()
            || opened.cookie != auth::hash(cookie)
        {
            return Err(again());
        }
        self.admit_oauth(from).await?;
        let redirect = self.redirect_of(provider.name());
        let identity = provider.identify(code, &verifier(cookie), &redirect).await?;
        match opened.intent {
            Intent::LogIn => {
                let account = self.account_of(from, provider.name(), &identity).await?;
                let session = self.begin_session(&account).await?;
                Ok(Arrival::LoggedIn {
                    user: account.id,
                    team: session.team_id.as_deref().and_then(|team| team.parse().ok()),
                    session,
                })
            }
            Intent::Connect { user, version } => {
                let account = self.store.account(user).await?;
                let account = account
                    .filter(|account| {
                        account.session_version == version && account.status == UserStatus::Active
                    })
                    .ok_or_else(ended)?;
                self.connect(&account, provider.name(), &identity).await?;
                Ok(Arrival::Connected {
                    user,
                    provider: provider.name().to_owned(),
                })
            }
        }
    }

    /// Disconnects the caller's account from a provider.
    pub(crate) async fn oauth_disconnect(&self, session: &Session, provider: &str) -> Result<()> {
        match self.store.identity_remove(session.user, provider).await? {
            Outcome::Updated => Ok(()),
            Outcome::Missing => Err(Error::not_found("connected provider", provider)),
            Outcome::Stale => Err(Error::new(
                ErrorCode::Conflict,
                format!("'{provider}' is the only way to log in to this account; set a password first"),
            )),
        }
    }

    /// The ways to log in elsewhere, as routes name them.
    pub(crate) fn provider_names(&self) -> Vec<&str> {
        let providers = self.accounts.providers.iter();
        providers.map(|provider| provider.name()).collect()
    }

    /// Where the dashboard takes over after a login in the browser.
    pub(crate) fn dashboard_url(&self, page: &str) -> String {
        format!("{}/{page}", self.public_url())
    }

    fn provider(&self, name: &str) -> Result<&Arc<dyn Provider>> {
        self.accounts
            .providers
            .iter()
            .find(|provider| provider.name() == name)
            .ok_or_else(|| Error::not_found("login provider", name))
    }

    fn redirect_of(&self, provider: &str) -> String {
        format!("{}/v1/auth/oauth/{provider}/callback", self.public_url())
    }

    fn depart(&self, provider: &str, intent: Intent) -> Result<Departure> {
        let provider = self.provider(provider)?;
        let cookie = auth::random_secret("", 32)?;
        let state = State {
            provider: provider.name().to_owned(),
            ends_at: now() + STATE_LIFE,
            cookie: auth::hash(&cookie),
            intent,
        };
        let state = serde_json::to_vec(&state).map_err(Error::internal)?;
        let state = self.secret.seal(STATE_CONTEXT, &state)?;
        let challenge = URL_SAFE_NO_PAD.encode(Sha256::digest(verifier(&cookie)));
        let redirect = self.redirect_of(provider.name());
        let url = provider.authorize_url(&state, &challenge, &redirect)?;
        let prefix = Url::parse(self.public_url()).map_or_else(
            |_| String::new(),
            |url| url.path().trim_end_matches('/').to_owned(),
        );
        Ok(Departure {
            url: Secret::new(url),
            cookie: Secret::new(cookie),
            cookie_path: format!("{prefix}/v1/auth/oauth/{}", provider.name()),
            secure: self.public_url().starts_with("https:"),
        })
    }

    /// The account of a provider's user, by the rule at the head of this module.
    async fn account_of(&self, from: Option<IpAddr>, provider: &str, identity: &Identity) -> Result<Account> {
        // Twice, since another callback of the same person may come between the look-up and the write.
        let mut lost = None;
        for _ in 0..2 {
            if let Some(account) = self
                .store
                .account_by_identity(provider, &identity.subject)
                .await?
            {
                return usable(account);
            }
            let email = identity
                .verified_email
                .as_deref()
                .ok_or_else(|| {
                    Error::new(
                        ErrorCode::Forbidden,
                        format!(
                            "{provider} knows no verified address of yours; verify one there and try again"
                        ),
                    )
                })
                .and_then(new_email)?;
            let new = NewIdentity {
                provider,
                subject: &identity.subject,
                email: &email,
            };
            let Some(account) = self.store.account_by_email(&email).await? else {
                self.admit_sign_up(from).await?;
                match self.sign_up_by(identity, new).await {
                    Err(error) if error.code == ErrorCode::Conflict => lost = Some(error),
                    created => return created,
                }
                continue;
            };
            match account.status {
                UserStatus::Disabled => return Err(closed()),
                UserStatus::Inactive => match self.store.claim_unproven(account.id, new).await? {
                    Outcome::Updated => {
                        return self.store.account(account.id).await?.ok_or_else(ended);
                    }
                    Outcome::Stale | Outcome::Missing => {}
                },
                UserStatus::Active if account.email_verified && !account.platform_admin => {
                    if self.store.identity_add(account.id, new).await? {
                        return Ok(account);
                    }
                }
                UserStatus::Active => {
                    return Err(Error::new(
                        ErrorCode::Conflict,
                        format!(
                            "there is an account with this address; log in with its password and connect {provider} \
                             in the settings"
                        ),
                    ));
                }
            }
        }
        Err(lost.unwrap_or_else(|| taken(provider)))
    }

    async fn sign_up_by(&self, identity: &Identity, new: NewIdentity<'_>) -> Result<Account> {
        let fallback = new.email.split('@').next().unwrap_or_default();
        let name: String = identity
            .name
            .chars()
            .filter(|c| !c.is_control())
            .take(MAX_NAME)
            .collect();
        let name = person_name(&name).or_else(|_| person_name(fallback))?;
        let person = Person {
            email: new.email,
            name: &name,
            password_hash: None,
            status: UserStatus::Active,
            email_verified: true,
            platform_admin: false,
        };
        let (user, _) = self.create_account(person, Some(new)).await?;
        tracing::info!(user = %user, provider = new.provider, "an account was created");
        self.store.account(user).await?.ok_or_else(ended)
    }

    async fn connect(&self, account: &Account, provider: &str, identity: &Identity) -> Result<()> {
        let new = NewIdentity {
            provider,
            subject: &identity.subject,
            email: identity.verified_email.as_deref().unwrap_or_default(),
        };
        if self.store.identity_add(account.id, new).await? {
            return Ok(());
        }
        // The same connection again is no failure.
        let owner = self
            .store
            .account_by_identity(provider, &identity.subject)
            .await?;
        match owner {
            Some(owner) if owner.id == account.id => Ok(()),
            _ => Err(taken(provider)),
        }
    }
}

fn usable(account: Account) -> Result<Account> {
    match account.status {
        UserStatus::Active => Ok(account),
        UserStatus::Inactive | UserStatus::Disabled => Err(closed()),
    }
}

fn taken(provider: &str) -> Error {
    Error::new(
        ErrorCode::Conflict,
        format!("this account, or this user of {provider}, is connected otherwise; disconnect that first"),
    )
}

/// PKCE's secret of a login.
fn verifier(cookie: &str) -> String {
    URL_SAFE_NO_PAD.encode(Sha256::digest(format!("pkce:{cookie}")))
}
