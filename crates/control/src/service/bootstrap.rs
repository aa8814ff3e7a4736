//! The first start, and what an operator may do without logging in.

use super::Services;
use crate::auth;
use crate::domain::account::UserStatus;
use crate::domain::around::AuditEntry;
use crate::domain::{HostId, HostOwner, KeyId, TeamId, UserId, now};
use crate::store::{NewAccount, NewHost, NewKey};
use crate::{Error, Result};

/// What the first start created. The key is shown this once; the store has its hash only.
#[derive(Clone)]
pub struct Bootstrap {
    /// The admin.
    pub user_id: UserId,
    /// The admin's address.
    pub email: String,
    /// The first team.
    pub team_id: TeamId,
    /// The key's row.
    pub key_id: KeyId,
    /// The secret.
    pub api_key: String,
}

impl std::fmt::Debug for Bootstrap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bootstrap")
            .field("email", &self.email)
            .field("team_id", &self.team_id)
            .finish_non_exhaustive()
    }
}

/// A one-time token with which a host agent registers.
#[derive(Clone)]
pub struct HostToken {
    /// The host that the token stands for.
    pub host_id: HostId,
    /// The secret; used up by the registration.
    pub token: String,
}

impl std::fmt::Debug for HostToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HostToken")
            .field("host_id", &self.host_id)
            .finish_non_exhaustive()
    }
}

/// For which host a registration token is.
#[derive(Debug, Clone, Copy)]
pub(super) enum HostTokenFor<'a> {
    /// One that exists.
    Known(HostId),
    /// One that is created with it.
    New {
        owner: HostOwner,
        provider: Option<&'a str>,
        availability_zone: Option<&'a str>,
    },
}

/// How long a registration token can be used: an hour.
const HOST_TOKEN_LIFE: i64 = 3_600_000;

impl Services {
    /// Creates an admin, a team and a key when there is no account yet.
    pub(crate) async fn bootstrap(&self) -> Result<Option<Bootstrap>> {
        if !self.store.has_no_users().await? {
            return Ok(None);
        }
        let key = auth::new_api_key()?;
        let email = "admin@localhost".to_owned();
        let admin = NewAccount {
            email: &email,
            name: "Admin",
            password_hash: None,
            status: UserStatus::Active,
            email_verified: false,
            platform_admin: true,
            team_name: "Default",
            slug: &new_slug()?,
            identity: None,
        };
        let created = self
            .store
            .account_with_key(admin, first_key(&key, &auth::hash(&key)))
            .await;
        let (user_id, team_id, key_id) = match created {
            Ok(ids) => ids,
            // Another control plane starts at the same time, and was faster.
            Err(error) if crate::store::is_duplicate(&error) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        self.audit(AuditEntry::system(None, "admin.user_create", "user", user_id));
        Ok(Some(Bootstrap {
            user_id,
            email,
            team_id,
            key_id,
            api_key: key,
        }))
    }

    /// Creates a team with a key of its own.
    pub async fn create_team(&self, name: &str) -> Result<(TeamId, String)> {
        let key = auth::new_api_key()?;
        let hash = auth::hash(&key);
        let first_key = first_key(&key, &hash);
        let team = self.store.team_with_key(name, &new_slug()?, first_key).await?;
        self.audit(AuditEntry::cli("team.create", "team", team));
        Ok((team, key))
    }

    /// A registration token, as an operator asks for one: for a new host of the platform, or for one that exists and
    /// lost its tokens.
    pub async fn issue_host_token(&self, host: Option<HostId>) -> Result<HostToken> {
        let whose = host.map_or(
            HostTokenFor::New {
                owner: HostOwner::Platform,
                provider: None,
                availability_zone: None,
            },
            HostTokenFor::Known,
        );
        self.registration_token(whose, None).await
    }

    /// A registration token. Those that the host had before and that nobody used end.
    pub(super) async fn registration_token(
        &self,
        whose: HostTokenFor<'_>,
        creator: Option<UserId>,
    ) -> Result<HostToken> {
        let token = auth::random_secret("wrh_", 32)?;
        let expires_at = now() + HOST_TOKEN_LIFE;
        let token_hash = auth::hash(&token);
        let host_id = match whose {
            HostTokenFor::Known(host) => {
                let replaced = self
                    .store
                    .host_token_replace(host, creator, &token_hash, expires_at)
                    .await?;
                if !replaced {
                    return Err(Error::not_found("host", host));
                }
                host
            }
            HostTokenFor::New {
                owner,
                provider,
                availability_zone,
            } => {
                let new = NewHost {
                    owner,
                    provider,
                    availability_zone,
                    creator,
                    token_hash: &token_hash,
                    token_expires_at: expires_at,
                };
                self.store
                    .host_create(new)
                    .await?
                    .ok_or_else(super::teams::team_gone)?
            }
        };
        self.audit(AuditEntry::cli("host.issue_token", "host", host_id));
        Ok(HostToken { host_id, token })
    }
}

fn first_key<'a>(key: &'a str, hash: &'a str) -> NewKey<'a> {
    NewKey {
        name: "First key",
        hash,
        prefix: key.get(..auth::VISIBLE_KEY_CHARS).unwrap_or_default(),
    }
}

/// A team's immutable short name: `xxxxxx-xxxxxx`, hex.
pub(super) fn new_slug() -> Result<String> {
    let mut slug = auth::random_secret("", 6)?;
    slug.insert(6, '-');
    Ok(slug)
}
