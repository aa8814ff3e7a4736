//! Where sandboxes run, for the calls into a guest that come in quick succession.
//!
//! A place that was looked up is known for a moment ([`Lately`]), or until this process hears that the sandbox's record
//! changed. The host has the last word on whether a sandbox runs there: who is sent away with a place that was remembered
//! looks it up and asks again.

use std::collections::HashSet;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use connectrpc::{ConnectError, ErrorCode as Rpc};

use super::lately::{Asked, Lately};
use super::{Services, parse_id};
use crate::Result;
use crate::domain::{Millis, Principal, SandboxId, TeamId};
use crate::events::{Bus, Event, Subscription};
use crate::hosts::Client;

/// A running sandbox, and its host's client.
#[derive(Clone)]
pub(super) struct Place {
    pub(super) sandbox: SandboxId,
    pub(super) last_active_at: Option<Millis>,
    pub(super) client: Client,
}

/// The places that were looked up lately.
pub(crate) struct Places(Mutex<Known>);

struct Known {
    places: Lately<(TeamId, SandboxId), Place>,
    changes: Subscription,
}

impl Places {
    pub(super) fn new(bus: &Bus) -> Self {
        Self(Mutex::new(Known {
            places: Lately::default(),
            changes: bus.subscribe(),
        }))
    }

    /// What is known after all that has been heard by now.
    fn lock(&self) -> MutexGuard<'_, Known> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut changed, mut lost) = (HashSet::new(), false);
        while let Some(heard) = known.changes.heard_already() {
            match heard {
                Ok(Event::Sandbox(id)) => drop(changed.insert(id)),
                Ok(_) => {}
                // Too many to have been kept.
                Err(_) => lost = true,
            }
        }
        if lost || !changed.is_empty() {
            known
                .places
                .forget(|(_, sandbox), _| lost || changed.contains(sandbox));
        }
        known
    }

    fn recall(&self, team: TeamId, id: SandboxId) -> std::result::Result<Place, Asked> {
        self.lock().places.recall(&(team, id), Instant::now())
    }

    fn learn(&self, team: TeamId, place: Place, asked: Asked) {
        let key = (team, place.sandbox);
        self.lock().places.learn(key, place, asked);
    }

    pub(super) fn forget(&self, id: SandboxId) {
        self.lock().places.forget(|(_, other), _| *other == id);
    }
}

impl Services {
    /// Makes a call to a running sandbox's host. A call that was refused because the sandbox is not there, or does not run
    /// there, is made a second time, after a look into the database, if its place had been remembered; it must not have
    /// done anything then.
    pub(super) async fn call_guest<T, F>(
        &self,
        principal: Principal,
        id: &str,
        verb: &str,
        call: impl Fn(SandboxId, Client) -> F,
    ) -> Result<(Place, std::result::Result<T, ConnectError>)>
    where
        F: Future<Output = std::result::Result<T, ConnectError>>,
    {
        let asked = match self.places.recall(principal.team, parse_id(id)?) {
            Ok(place) => match call(place.sandbox, place.client.clone()).await {
                Err(error) if matches!(error.code, Rpc::NotFound | Rpc::FailedPrecondition) => {
                    self.places.forget(place.sandbox);
                    None
                }
                answer => return Ok((place, answer)),
            },
            Err(asked) => Some(asked),
        };
        let (sandbox, client) = self.running(principal, id, verb).await?;
        let place = Place {
            sandbox: sandbox.id,
            last_active_at: sandbox.last_active_at,
            client,
        };
        if let Some(asked) = asked {
            self.places.learn(principal.team, place.clone(), asked);
        }
        let answer = call(place.sandbox, place.client.clone()).await;
        Ok((place, answer))
    }
}
