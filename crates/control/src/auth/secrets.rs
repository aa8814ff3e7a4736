//! The installation's master secret, and what is derived from it: the key that signs sessions, and the one that seals
//! secrets which have to be read again (a channel's tokens). All control planes of an installation share it.

use chacha20poly1305::aead::{Aead as _, KeyInit as _, Payload};
use chacha20poly1305::{XChaCha20Poly1305, XNonce};
use hkdf::Hkdf;
use sha2::Sha256;

use crate::{Error, Result};

const NONCE: usize = 24;

/// The master secret: 32 random bytes.
#[derive(Clone)]
pub struct MasterSecret([u8; 32]);

impl std::fmt::Debug for MasterSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("MasterSecret(…)")
    }
}

impl MasterSecret {
    /// From 64 hex digits.
    ///
    /// # Errors
    /// It has another form.
    pub fn parse(text: &str) -> Result<Self> {
        let mut bytes = [0; 32];
        hex::decode_to_slice(text.trim(), &mut bytes).map_err(|_| {
            Error::invalid("the secret key must be 64 hex digits, as from `openssl rand -hex 32`")
        })?;
        Ok(Self(bytes))
    }

    /// A new one.
    ///
    /// # Errors
    /// The system's random source failed.
    pub fn generate() -> Result<Self> {
        let mut bytes = [0; 32];
        getrandom::fill(&mut bytes).map_err(|error| Error::internal(format!("no randomness: {error}")))?;
        Ok(Self(bytes))
    }

    /// As 64 hex digits, to be kept in a file that only its owner reads.
    #[must_use]
    pub fn reveal(&self) -> String {
        hex::encode(self.0)
    }

    /// A key for one purpose; purposes cannot be computed from each other.
    pub(crate) fn derive(&self, purpose: &str) -> [u8; 32] {
        let mut key = [0; 32];
        // Fails only for outputs beyond 8160 bytes.
        if Hkdf::<Sha256>::new(Some(b"wrenn"), &self.0)
            .expand(purpose.as_bytes(), &mut key)
            .is_err()
        {
            unreachable!("32 bytes are within HKDF's bound");
        }
        key
    }

    /// Encrypts what has to be read again. `context` (a row's id, say) ties the text to its place.
    pub(crate) fn seal(&self, context: &str, plain: &[u8]) -> Result<String> {
        let mut nonce = [0; NONCE];
        getrandom::fill(&mut nonce).map_err(|error| Error::internal(format!("no randomness: {error}")))?;
        let sealed = self
            .cipher()
            .encrypt(
                &XNonce::from(nonce),
                Payload {
                    msg: plain,
                    aad: context.as_bytes(),
                },
            )
            .map_err(|_| Error::internal("sealing failed"))?;
        Ok(format!("v1:{}{}", hex::encode(nonce), hex::encode(sealed)))
    }

    /// Reads what [`MasterSecret::seal`] wrote in the same context.
    pub(crate) fn open(&self, context: &str, sealed: &str) -> Result<Vec<u8>> {
        let unreadable =
            || Error::internal("a stored secret cannot be read; was the installation's secret key changed?");
        let bytes = sealed
            .strip_prefix("v1:")
            .and_then(|text| hex::decode(text).ok())
            .ok_or_else(unreadable)?;
        let (nonce, body) = bytes.split_first_chunk::<NONCE>().ok_or_else(unreadable)?;
        self.cipher()
            .decrypt(
                &XNonce::from(*nonce),
                Payload {
                    msg: body,
                    aad: context.as_bytes(),
                },
            )
            .map_err(|_| unreadable())
    }

    fn cipher(&self) -> XChaCha20Poly1305 {
        XChaCha20Poly1305::new(&self.derive("seal").into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sealed_opens_in_its_place_only() {
        let secret = MasterSecret::generate().expect("randomness");
        let sealed = secret.seal("channel-1", b"token").expect("sealed");
        assert!(!sealed.contains("token") && !sealed.contains(&hex::encode("token")));
        assert_eq!(secret.open("channel-1", &sealed).expect("opened"), b"token");
        assert!(secret.open("channel-2", &sealed).is_err());
        let other = MasterSecret::generate().expect("randomness");
        assert!(other.open("channel-1", &sealed).is_err());
        assert_eq!(format!("{secret:?}"), "MasterSecret(…)");
        let again = MasterSecret::parse(&secret.reveal()).expect("its own form");
        assert_eq!(again.open("channel-1", &sealed).expect("opened"), b"token");
    }

    #[test]
    fn keys_of_two_purposes_differ() {
        let secret = MasterSecret::generate().expect("randomness");
        assert_ne!(secret.derive("seal"), secret.derive("session"));
    }
}
