//! Passwords: Argon2id in PHC form, so that each hash carries its own parameters and older ones stay good.
//!
//! A hash costs memory and a core for some tens of milliseconds. Strangers can ask for any number of them, so few
//! run at one time, on threads for blocking work, and who waits too long is sent away: a flood of logins makes
//! logins slow and nothing else. A login to an account that does not exist, or has no password, does the same work
//! against a decoy, so that its time does not tell.

use std::sync::Arc;
use std::time::Duration;

use argon2::password_hash::phc::PasswordHash;
use argon2::password_hash::{PasswordHasher as _, PasswordVerifier as _};
use argon2::{Algorithm, Argon2, Params, Version};
use tokio::sync::{OnceCell, Semaphore};
use wrenn_proto::rest::Secret;

use crate::config::PasswordCost;
use crate::{Error, Result};

/// Fewest characters of a password.
const MIN_CHARS: usize = 8;
/// Longest password, bytes.
const MAX_BYTES: usize = 1024;
/// Longest wait for a place among the hashes that run.
const PATIENCE: Duration = Duration::from_secs(10);

/// Hashes and checks passwords.
#[derive(Clone)]
pub(crate) struct Passwords {
    inner: Arc<Inner>,
}

struct Inner {
    params: Params,
    places: Arc<Semaphore>,
    /// The hash of a password that nobody has.
    decoy: OnceCell<String>,
}

/// What a check found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Wrong,
    Right,
    /// Right, and the hash was made with other parameters than today's.
    RightButOld,
}

/// Refuses passwords that are too short or too long; `field` is how the request calls it.
pub(crate) fn acceptable(field: &str, password: &Secret) -> Result<()> {
    let text = password.reveal();
    if text.chars().count() < MIN_CHARS {
        return Err(Error::invalid(format!(
            "{field} must have at least {MIN_CHARS} characters"
        )));
    }
    if text.len() > MAX_BYTES {
        return Err(Error::invalid(format!(
            "{field} must be at most {MAX_BYTES} bytes"
        )));
    }
    Ok(())
}

impl Passwords {
    /// With the work that a hash shall be.
    pub(crate) fn new(cost: PasswordCost) -> Result<Self> {
        let params = Params::new(cost.memory_kib, cost.passes, 1, None).map_err(|error| {
            Error::invalid(format!(
                "password cost of {} KiB and {} passes: {error}",
                cost.memory_kib, cost.passes
            ))
        })?;
        // A hash keeps one core busy; half of the cores stay for everything else.
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Self {
            inner: Arc::new(Inner {
                params,
                places: Arc::new(Semaphore::new((cores / 2).clamp(1, 16))),
                decoy: OnceCell::new(),
            }),
        })
    }

    /// A new password's hash, with a salt of its own.
    pub(crate) async fn hash(&self, password: &Secret) -> Result<String> {
        let (password, params) = (password.clone(), self.inner.params.clone());
        self.run(move || {
            hasher(params)
                .hash_password(password.reveal().as_bytes())
                .map(|hash: PasswordHash| hash.to_string())
                .map_err(|error| Error::internal(format!("a password cannot be hashed: {error}")))
        })
        .await
    }

    /// Whether a password is the one of a hash. Without a hash it is wrong, after as much work.
    pub(crate) async fn check(&self, stored: Option<&str>, password: &Secret) -> Result<Verdict> {
        let decoy;
        let hash = match stored {
            Some(hash) => hash,
            None => {
                decoy = self
                    .inner
                    .decoy
                    .get_or_try_init(|| async {
                        self.hash(&Secret::new(super::random_secret("", 32)?)).await
                    })
                    .await?;
                decoy
            }
        };
        let (hash, password, params) = (hash.to_owned(), password.clone(), self.inner.params.clone());
        let known = stored.is_some();
        self.run(move || {
            let parsed = PasswordHash::new(&hash)
                .map_err(|error| Error::internal(format!("a stored password hash is unreadable: {error}")))?;
            let current = Params::try_from(&parsed).is_ok_and(|of| {
                (of.m_cost(), of.t_cost(), of.p_cost()) == (params.m_cost(), params.t_cost(), params.p_cost())
            });
            // Longer ones were never accepted; the work stays bounded.
            let text = password.reveal().as_bytes();
            let text = text.get(..MAX_BYTES + 1).unwrap_or(text);
            match hasher(params).verify_password(text, &parsed) {
                Err(argon2::password_hash::Error::PasswordInvalid) => Ok(Verdict::Wrong),
                Err(error) => Err(Error::internal(format!("a password cannot be checked: {error}"))),
                Ok(()) if !known => Ok(Verdict::Wrong),
                Ok(()) if current => Ok(Verdict::Right),
                Ok(()) => Ok(Verdict::RightButOld),
            }
        })
        .await
    }

    /// Runs work on a thread for blocking work, with few at one time.
    async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
        let place = tokio::time::timeout(PATIENCE, Arc::clone(&self.inner.places).acquire_owned())
            .await
            .map_err(|_| Error::rate_limited("logins at this moment", Duration::from_secs(5)))?
            .map_err(Error::internal)?;
        tokio::task::spawn_blocking(move || {
            // The place is held until the work ends, also when the caller has gone away.
            let _place = place;
            work()
        })
        .await
        .map_err(Error::internal)?
    }
}

fn hasher(params: Params) -> Argon2<'static> {
    Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passwords(memory_kib: u32) -> Passwords {
        Passwords::new(PasswordCost {
            memory_kib,
            passes: 1,
        })
        .expect("parameters")
    }

    #[tokio::test]
    async fn hashes_are_salted_and_carry_their_parameters() {
        let (weak, strong) = (passwords(64), passwords(128));
        let password = Secret::new("correct horse");
        let hash = weak.hash(&password).await.expect("a hash");
        assert!(hash.starts_with("$argon2id$v=19$m=64,t=1,p=1$"), "{hash}");
        assert_ne!(hash, weak.hash(&password).await.expect("a hash"));
        for (by, given, verdict) in [
            (&weak, "correct horse", Verdict::Right),
            (&weak, "correct horsf", Verdict::Wrong),
            (&weak, "", Verdict::Wrong),
            (&strong, "correct horse", Verdict::RightButOld),
            (&strong, "battery staple", Verdict::Wrong),
        ] {
            let got = by.check(Some(&hash), &Secret::new(given)).await.expect("checked");
            assert_eq!(got, verdict, "{given}");
        }
        assert_eq!(
            weak.check(None, &password).await.expect("checked"),
            Verdict::Wrong
        );
    }

    #[tokio::test]
    async fn a_damaged_hash_lets_nobody_in() {
        let passwords = passwords(64);
        let error = passwords
            .check(Some("plain text"), &Secret::new("plain text"))
            .await
            .expect_err("refused");
        assert_eq!(error.code, crate::ErrorCode::InternalError);
    }

    #[test]
    fn lengths_are_bounded() {
        assert!(acceptable("password", &Secret::new("1234567")).is_err());
        assert!(acceptable("password", &Secret::new("пароль12")).is_ok());
        assert!(acceptable("password", &Secret::new("x".repeat(1024))).is_ok());
        assert!(acceptable("password", &Secret::new("x".repeat(1025))).is_err());
    }
}
