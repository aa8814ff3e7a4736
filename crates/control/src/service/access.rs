//! Who is asking.

use super::Services;
use crate::auth;
use crate::domain::{Host, Principal};
use crate::{Error, ErrorCode, Result};

/// Longest credential that is looked at.
const MAX_CREDENTIAL: usize = 512;

impl Services {
    /// The team behind an API key.
    pub(crate) async fn authenticate_key(&self, key: Option<&str>) -> Result<Principal> {
        let denied = |message: &str| Error::new(ErrorCode::Unauthorized, message);
        let key = key.ok_or_else(|| denied("an API key is required in the header X-API-Key"))?;
        if key.len() > MAX_CREDENTIAL {
            return Err(denied("the API key is not valid"));
        }
        let (principal, last_used) = self
            .store
            .principal_by_key_hash(&auth::hash(key))
            .await?
            .ok_or_else(|| denied("the API key is not valid"))?;
        self.store.touch_key(principal.key, last_used).await?;
        Ok(principal)
    }

    /// The host behind a bearer token.
    pub(crate) async fn authenticate_host(&self, token: Option<&str>) -> Result<Host> {
        let denied = || Error::new(ErrorCode::Unauthorized, "a valid host token is required");
        let token = token
            .filter(|token| token.len() <= MAX_CREDENTIAL)
            .ok_or_else(denied)?;
        self.store
            .host_by_token_hash(&auth::hash(token))
            .await?
            .ok_or_else(denied)
    }
}
