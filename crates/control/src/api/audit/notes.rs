//! What handlers say of a request, for the log that is around them: the log itself sees the route and the answer, and
//! neither always tells who it was, what it was about or what came of it.

use std::fmt::Display;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{Extensions, StatusCode};

use crate::ErrorCode;
use crate::domain::around::{AuditActor, AuditEntry, AuditOutcome};
use crate::domain::{Actor, TeamId, UserId};
use crate::service::Services;

/// A request's notes. All clones are the same ones; of each kind, the first note stays.
#[derive(Debug, Clone, Default)]
pub(crate) struct AuditNotes(Arc<Notes>);

#[derive(Default)]
struct Notes {
    actor: OnceLock<(AuditActor, Option<TeamId>)>,
    action: OnceLock<&'static str>,
    resource: OnceLock<String>,
    outcome: OnceLock<AuditOutcome>,
    /// The entry of a WebSocket whose caller is not known when it is answered.
    waiting: Mutex<Option<(Services, AuditEntry)>>,
}

impl std::fmt::Debug for Notes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Notes")
            .field("actor", &self.actor)
            .field("action", &self.action)
            .field("resource", &self.resource)
            .field("outcome", &self.outcome)
            .finish_non_exhaustive()
    }
}

impl FromRequestParts<Services> for AuditNotes {
    type Rejection = std::convert::Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &Services) -> Result<Self, Self::Rejection> {
        // A route that is in no log is noted for nobody.
        Ok(parts.extensions.get().cloned().unwrap_or_default())
    }
}

impl AuditNotes {
    /// Notes the caller that an extractor found.
    pub(crate) fn caller(extensions: &Extensions, actor: AuditActor, team: Option<TeamId>) {
        if let Some(notes) = extensions.get::<Self>() {
            notes.actor(actor, team);
        }
    }

    /// Notes who acts.
    pub(crate) fn actor(&self, actor: AuditActor, team: Option<TeamId>) {
        let _ = self.0.actor.set((actor, team));
    }

    /// Notes that the caller has proved to be this user.
    pub(crate) fn proved(&self, user: UserId, team: Option<TeamId>) {
        self.actor(Actor::User(user).into(), team);
    }

    /// Notes what the request turned out to be, where its route does not say.
    pub(crate) fn action(&self, action: &'static str) {
        let _ = self.0.action.set(action);
    }

    /// Notes what the request is about, where neither its path nor its answer says.
    pub(crate) fn resource(&self, id: impl Display) {
        let _ = self.0.resource.set(id.to_string());
    }

    /// Notes that the request failed, where the answer's status does not say.
    pub(crate) fn failed(&self, code: ErrorCode) {
        let _ = self.0.outcome.set(match code {
            ErrorCode::Unauthorized | ErrorCode::Forbidden | ErrorCode::RateLimited => AuditOutcome::Denied,
            _ => AuditOutcome::Failure,
        });
    }

    /// The caller of a WebSocket became known after the answer, or was refused: the entry that waited is complete.
    pub(crate) fn late(&self, known: Option<(AuditActor, TeamId)>) {
        let waiting = &self.0.waiting;
        let waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some((services, mut entry)) = waiting else {
            return;
        };
        match known {
            Some((actor, team)) => {
                entry.actor = actor;
                entry.team = Some(team);
            }
            None => {
                entry.status = Some(StatusCode::UNAUTHORIZED.as_u16());
                entry.outcome = AuditOutcome::Denied;
            }
        }
        services.audit(entry);
    }

    /// Keeps an entry until [`AuditNotes::late`].
    pub(super) fn wait(&self, services: Services, entry: AuditEntry) {
        let waiting = &self.0.waiting;
        *waiting.lock().unwrap_or_else(PoisonError::into_inner) = Some((services, entry));
    }

    pub(super) fn noted_actor(&self) -> Option<(AuditActor, Option<TeamId>)> {
        self.0.actor.get().cloned()
    }

    pub(super) fn noted_action(&self) -> Option<&'static str> {
        self.0.action.get().copied()
    }

    pub(super) fn noted_resource(&self) -> Option<String> {
        self.0.resource.get().cloned()
    }

    pub(super) fn noted_outcome(&self) -> Option<AuditOutcome> {
        self.0.outcome.get().copied()
    }
}
