//! API keys: making and revoking them, and telling quickly whose a key is.
//!
//! A key that was looked up is known for a moment ([`Lately`]). A revocation is felt at once by the process that makes
//! it, and by every other when its moment is over. When a key was used is collected in memory and written in batches.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::lately::{Asked, Lately};
use super::{Services, validate};
use crate::auth;
use crate::domain::team::ApiKey;
use crate::domain::{Actor, KeyId, Millis, Principal, Role, Session, TeamId, now};
use crate::{Error, Result};

/// Longest name of a key, characters.
const MAX_NAME: usize = 100;

/// The keys that were looked up lately, by their hash.
#[derive(Debug, Default)]
pub(crate) struct KnownKeys(Mutex<Known>);

#[derive(Default)]
struct Known {
    keys: Lately<String, Principal>,
    used: HashMap<KeyId, Millis>,
}

wrenn_proto::discreet_debug!(Known shows(used) hides(keys));

impl KnownKeys {
    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whose a key is, if that is known; else what [`KnownKeys::learn`] needs.
    fn recall(&self, hash: &str) -> std::result::Result<Principal, Asked> {
        let mut known = self.lock();
        let principal = known.keys.recall(hash, Instant::now())?;
        known.note_use(principal);
        Ok(principal)
    }

    /// Keeps an answer, unless a revocation came between.
    fn learn(&self, hash: String, principal: Principal, asked: Asked) {
        let mut known = self.lock();
        known.note_use(principal);
        known.keys.learn(hash, principal, asked);
    }

    /// Forgets keys that were revoked.
    fn forget(&self, revoked: impl Fn(&Principal) -> bool) {
        self.lock().keys.forget(|_, principal| revoked(principal));
    }

    /// Forgets all keys: those that count no more cannot be told apart here.
    pub(crate) fn forget_all(&self) {
        self.forget(|_| true);
    }

    /// Forgets a team's keys.
    pub(crate) fn forget_team(&self, team: TeamId) {
        self.forget(|principal| principal.team == team);
    }
}

impl Known {
    fn note_use(&mut self, principal: Principal) {
        if let Actor::Key(key) = principal.actor {
            self.used.insert(key, now());
        }
    }
}

impl Services {
    /// Whose a key is. A known key costs no query.
    pub(super) async fn principal_of_key(&self, key: &str) -> Result<Option<Principal>> {
        let hash = auth::hash(key);
        let asked = match self.known_keys.recall(&hash) {
            Ok(principal) => return Ok(Some(principal)),
            Err(asked) => asked,
        };
        let principal = self.store.principal_by_key_hash(&hash).await?;
        if let Some(principal) = principal {
            self.known_keys.learn(hash, principal, asked);
        }
        Ok(principal)
    }

    /// Writes down when keys were last used. Interrupted, it is written again.
    pub(crate) async fn write_key_uses(&self) -> Result<()> {
        let uses: Vec<_> = self
            .known_keys
            .lock()
            .used
            .iter()
            .map(|(key, at)| (*key, *at))
            .collect();
        if uses.is_empty() {
            return Ok(());
        }
        self.store.keys_used(&uses).await?;
        let mut known = self.known_keys.lock();
        for (key, at) in uses {
            if known.used.get(&key) == Some(&at) {
                known.used.remove(&key);
            }
        }
        Ok(())
    }

    /// Makes a key for the session's team; every member may. Returns its record and, this once, the secret.
    pub async fn create_key(&self, session: &Session, name: &str) -> Result<(ApiKey, String)> {
        let (team, _) = session.in_team()?;
        let name = name.trim();
        if !(1..=MAX_NAME).contains(&name.chars().count()) || name.chars().any(char::is_control) {
            return Err(Error::invalid(format!(
                "name must be 1 to {MAX_NAME} characters without control characters"
            )));
        }
        let key = auth::new_api_key()?;
        let prefix = key.get(..auth::VISIBLE_KEY_CHARS).unwrap_or_default();
        let (id, created_at) = self
            .store
            .key_create(team, session.user, name, &auth::hash(&key), prefix)
            .await?
            .ok_or_else(super::teams::team_gone)?;
        let row = ApiKey {
            id,
            team,
            name: name.to_owned(),
            prefix: prefix.to_owned(),
            created_at,
            last_used: None,
            creator_email: Some(session.email.clone()),
        };
        Ok((row, key))
    }

    /// The keys of the session's team, newest first.
    pub async fn list_keys(
        &self,
        session: &Session,
        limit: Option<u32>,
        before: Option<&str>,
    ) -> Result<Vec<ApiKey>> {
        let (team, _) = session.in_team()?;
        let page = validate::page(limit, before)?;
        Ok(self.store.keys_of_team(team, page.limit, page.before).await?)
    }

    /// Revokes a key of the session's team: any as an admin or owner, one's own as a member.
    pub async fn delete_key(&self, session: &Session, id: &str) -> Result<()> {
        let missing = || Error::not_found("API key", id);
        let (team, role) = session.in_team()?;
        let key: KeyId = id.parse().map_err(|_| missing())?;
        let creator = (role < Role::Admin).then_some(session.user);
        if self.store.key_delete(team, key, creator).await? {
            self.known_keys
                .forget(|principal| principal.actor == Actor::Key(key));
            return Ok(());
        }
        if creator.is_some() && self.store.key_exists(team, key).await? {
            return Err(Error::new(
                crate::ErrorCode::Forbidden,
                "members may delete only the keys that they made; ask an admin or owner of the team",
            ));
        }
        Err(missing())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_keys_of_a_team_are_forgotten_and_others_are_not() {
        let known = KnownKeys::default();
        let keys = [(); 2].map(|()| Principal {
            team: TeamId::new(),
            actor: Actor::Key(KeyId::new()),
        });
        for (hash, key) in ["a", "b"].into_iter().zip(keys) {
            let asked = known.recall(hash).expect_err("unknown");
            known.learn(hash.to_owned(), key, asked);
        }
        known.forget_team(keys[0].team);
        assert!(known.recall("a").is_err());
        assert_eq!(known.recall("b").ok(), Some(keys[1]));
    }
}
