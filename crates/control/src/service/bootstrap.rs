//! The first start, and what an operator may do without logging in.

use super::Services;
use crate::auth;
use crate::domain::{HostId, KeyId, TeamId, UserId, now};
use crate::store::NewTeamKey;
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
        let (user_id, team_id, key_id) = self
            .store
            .create_admin(NewTeamKey {
                email: &email,
                user_name: "Admin",
                team_name: "Default",
                slug: &new_slug()?,
                key_name: "First key",
                key_hash: &auth::hash(&key),
                key_prefix: visible(&key),
            })
            .await?;
        Ok(Some(Bootstrap {
            user_id,
            email,
            team_id,
            key_id,
            api_key: key,
        }))
    }

    /// Creates a team with a key of its own.
    pub(crate) async fn create_team(&self, name: &str) -> Result<(TeamId, String)> {
        let key = auth::new_api_key()?;
        let (team, _) = self
            .store
            .create_team(NewTeamKey {
                email: "",
                user_name: "",
                team_name: name,
                slug: &new_slug()?,
                key_name: "First key",
                key_hash: &auth::hash(&key),
                key_prefix: visible(&key),
            })
            .await?;
        Ok((team, key))
    }

    /// A registration token: for a new host, or for one that exists and lost its tokens.
    pub(crate) async fn issue_host_token(&self, host: Option<HostId>) -> Result<HostToken> {
        let token = auth::random_secret("wrh_", 32)?;
        let expires_at = now() + HOST_TOKEN_LIFE;
        let host_id = match host {
            Some(host) => {
                if self.store.host(host).await?.is_none() {
                    return Err(Error::not_found("host", host));
                }
                self.store
                    .host_token_add(host, &auth::hash(&token), expires_at)
                    .await?;
                host
            }
            None => {
                self.store
                    .host_create(None, &auth::hash(&token), expires_at)
                    .await?
            }
        };
        Ok(HostToken { host_id, token })
    }
}

/// The part of a key that people may see later.
fn visible(key: &str) -> &str {
    key.get(..auth::VISIBLE_KEY_CHARS).unwrap_or_default()
}

/// A team's immutable short name: `xxxxxx-xxxxxx`, hex.
pub(super) fn new_slug() -> Result<String> {
    let mut slug = auth::random_secret("", 6)?;
    slug.insert(6, '-');
    Ok(slug)
}
