//! Secrets: how they are made, and how they are kept (as SHA-256 of a random value, never as text).
//!
//! Keys and tokens carry at least 160 random bits, so a plain hash is enough: there is nothing to
//! guess that a slow hash would protect. The hash is also the lookup key, so no comparison of
//! secrets happens in this process.

pub(crate) mod jwt;
pub(crate) mod password;
pub(crate) mod secrets;

use sha2::{Digest, Sha256};

/// Prefix of team API keys.
pub const API_KEY_PREFIX: &str = "wrn_";

/// How much of a key is kept readable, for people to tell their keys apart.
pub const VISIBLE_KEY_CHARS: usize = 12;

/// A random secret of `bytes` bytes, in hex after a prefix.
///
/// # Errors
/// The system's random source failed.
pub(crate) fn random_secret(prefix: &str, bytes: usize) -> crate::Result<String> {
    let mut raw = vec![0; bytes];
    getrandom::fill(&mut raw).map_err(|error| crate::Error::internal(format!("no randomness: {error}")))?;
    Ok(format!("{prefix}{}", hex::encode(raw)))
}

/// A new team API key: `wrn_` and 40 hex digits.
pub(crate) fn new_api_key() -> crate::Result<String> {
    random_secret(API_KEY_PREFIX, 20)
}

/// The form in which a secret is stored and looked up.
#[must_use]
pub(crate) fn hash(secret: &str) -> String {
    hex::encode(Sha256::digest(secret.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_have_the_published_form() {
        let key = new_api_key().expect("randomness");
        assert_eq!(key.len(), 44);
        assert!(
            key.strip_prefix("wrn_")
                .is_some_and(|rest| rest.bytes().all(|byte| byte.is_ascii_hexdigit()))
        );
        assert_ne!(key, new_api_key().expect("randomness"));
        assert_eq!(
            hash("abc"),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }
}
