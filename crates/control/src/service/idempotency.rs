//! Creates that are repeated under an `Idempotency-Key` happen once.
//!
//! The first request claims its scope and executes; the same request again gets the stored answer, or waits
//! for it. A claim is renewed while its request runs, so only a process that died loses it. Only successes
//! are stored: whatever came to nothing may be tried again under the same key.

use std::time::Duration;

use uuid::Uuid;
use wrenn_proto::rest::Secret;

use super::Services;
use super::drive::millis;
use crate::domain::around::AuditActor;
use crate::domain::{Principal, Realm, now};
use crate::store::{ClaimTimes, Outcome};
use crate::{Error, ErrorCode, Result, auth};

/// Longest key.
const MAX_KEY: usize = 255;

/// An answer as it was given.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct KeptAnswer {
    pub(crate) status: u16,
    pub(crate) content_type: Option<String>,
    pub(crate) body: Secret,
}

/// What to do with a request.
#[derive(Debug)]
pub(crate) enum Begun {
    /// Execute it, then tell what came of it.
    Execute(Execution),
    /// It was made before; this was the answer.
    Answered(KeptAnswer),
    /// Another executes it, and took longer than this one could wait.
    UnderWay,
}

/// The right to execute a request.
#[derive(Debug, Clone)]
pub(crate) struct Execution {
    scope: String,
    claim: Uuid,
}

impl Services {
    /// The scope of a key: the caller, in their team, on one route. `None` for callers who are not known:
    /// their request goes on, to be refused with the right words.
    pub(crate) async fn idempotency_scope(
        &self,
        realm: Realm,
        api_key: Option<&str>,
        bearer: Option<&str>,
        route: &str,
        key: &str,
    ) -> Result<Option<String>> {
        let good =
            (1..=MAX_KEY).contains(&key.len()) && key.bytes().all(|byte| (0x20..=0x7e).contains(&byte));
        if !good {
            return Err(Error::invalid(format!(
                "Idempotency-Key must be 1 to {MAX_KEY} printable ASCII characters"
            )));
        }
        let session = bearer.filter(|token| !token.starts_with(auth::API_KEY_PREFIX));
        let known = match (api_key, session) {
            // Who is no platform admin any more gets no answer from when they were.
            _ if realm == Realm::Platform => self
                .authenticate_platform(bearer)
                .await
                .map(|principal| (Some(principal.team), actor_id(principal))),
            // A session may be in no team, and create one.
            (None, Some(token)) => self.authenticate_session(Some(token)).await.map(|session| {
                let team = session.team.map(|(team, _)| team);
                (team, format!("{}", session.user))
            }),
            (api_key, _) => self
                .authenticate_key(api_key.or(bearer))
                .await
                .map(|principal| (Some(principal.team), actor_id(principal))),
        };
        let (team, actor) = match known {
            Ok(known) => known,
            // The request itself will be refused for this.
            Err(error) if matches!(error.code, ErrorCode::Unauthorized | ErrorCode::Forbidden) => {
                return Ok(None);
            }
            // Without a claim it would be done again when it is sent again.
            Err(error) => return Err(error),
        };
        Ok(Some(auth::hash(&format!("{team:?}\n{actor}\n{route}\n{key}"))))
    }

    /// Claims a request, or finds what came of it; waits while another executes it.
    pub(crate) async fn idempotency_begin(&self, scope: &str, request_hash: &str) -> Result<Begun> {
        let deadline = tokio::time::Instant::now() + self.config.around.idempotency_wait;
        let mut pause = Duration::from_millis(20);
        loop {
            let claim = Uuid::new_v4();
            let now = now();
            let times = ClaimTimes {
                claim_ends_at: now + millis(self.config.around.idempotency_claim),
                expires_at: now + millis(self.config.around.idempotency_keep),
            };
            let execute = || {
                Begun::Execute(Execution {
                    scope: scope.to_owned(),
                    claim,
                })
            };
            if self
                .store
                .idempotency_claim(scope, request_hash, claim, times)
                .await?
            {
                return Ok(execute());
            }
            // Gone again: whoever had it came to nothing.
            let Some(seen) = self.store.idempotency_find(scope).await? else {
                continue;
            };
            if seen.is_free(now) {
                if self
                    .store
                    .idempotency_take_over(scope, &seen, request_hash, claim, times)
                    .await?
                {
                    return Ok(execute());
                }
                continue;
            }
            if seen.request_hash != request_hash {
                return Err(Error::new(
                    ErrorCode::Conflict,
                    "this Idempotency-Key was used with another request; use a new key for a new request",
                ));
            }
            if let Some((status, sealed)) = seen.answer {
                let plain = self.secret.open(scope, &sealed.0)?;
                let mut answer: KeptAnswer = serde_json::from_slice(&plain).map_err(Error::internal)?;
                answer.status = status;
                return Ok(Begun::Answered(answer));
            }
            if tokio::time::Instant::now() >= deadline {
                return Ok(Begun::UnderWay);
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(500));
        }
    }

    /// How often a claim is to be renewed.
    pub(crate) fn idempotency_renewal(&self) -> Duration {
        (self.config.around.idempotency_claim / 3).max(Duration::from_millis(10))
    }

    /// Keeps a claim while its request runs.
    pub(crate) async fn idempotency_renew(&self, execution: &Execution) {
        let until = now() + millis(self.config.around.idempotency_claim);
        let renewed = self
            .store
            .idempotency_renew(&execution.scope, execution.claim, until)
            .await;
        note("renewed", renewed);
    }

    /// Keeps a success's answer, or forgets the request, so that it can be made again.
    pub(crate) async fn idempotency_end(&self, execution: &Execution, answer: Option<KeptAnswer>) {
        let Execution { scope, claim } = execution;
        let Some(answer) = answer else {
            note("released", self.store.idempotency_release(scope, *claim).await);
            return;
        };
        let sealed = serde_json::to_vec(&answer)
            .map_err(Error::internal)
            .and_then(|plain| self.secret.seal(scope, &plain));
        match sealed {
            Ok(sealed) => {
                let stored = self
                    .store
                    .idempotency_answer(scope, *claim, answer.status, sealed)
                    .await;
                note("answered", stored);
            }
            Err(error) => tracing::error!(
                error = &error as &dyn std::error::Error,
                "an answer could not be kept"
            ),
        }
    }
}

fn actor_id(principal: Principal) -> String {
    AuditActor::from(principal.actor).id.unwrap_or_default()
}

/// The request itself is done either way; a repetition may then execute it again.
fn note(what: &str, outcome: std::result::Result<Outcome, sea_orm::DbErr>) {
    match outcome {
        Ok(Outcome::Updated) => {}
        Ok(Outcome::Stale | Outcome::Missing) => {
            metrics::counter!("wrenn_stale_updates_total", "source" => "idempotency").increment(1);
            tracing::warn!("a claim could not be {what}: another process took it over");
        }
        Err(error) => tracing::error!(
            error = &error as &dyn std::error::Error,
            "a claim could not be {what}"
        ),
    }
}
