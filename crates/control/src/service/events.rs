//! Telling what happened: from the outbox to whoever has to know, at least once and in order.
//!
//! ```text
//!  change + event ──one transaction──▶ events (no place yet)
//!                                         │ relay (leader): gives places, publishes
//!                       ┌─────────────────┴──────────────────┐
//!                 no Redis: at once                 Redis stream, group of all instances
//!                       └────────────▶ consume ◀─────────────┘
//!                                         │
//!                              marked consumed in the outbox; pruned a day later
//! ```
//!
//! An event that was published and not consumed is published again after a while, whatever became of Redis or of the
//! instance that had it. So consumers hear an event more than once at times: `seq` tells them.

use std::collections::BTreeMap;
use std::time::Duration;

use redis::aio::MultiplexedConnection;

use super::Services;
use super::drive::millis;
use crate::domain::event::StateEvent;
use crate::domain::{Principal, Sandbox, SandboxId, now};
use crate::events::Event;
use crate::events::redis::{Entry, Link};
use crate::tasks::TaskKind;
use crate::{Error, Result};

/// Events in one step of the relay, and on one page of a stream.
const PAGE: u64 = 200;
/// How often an event is told before it is given up.
const MAX_ATTEMPTS: i32 = 20;
/// A connection to Redis that lasted this long was one: its end begins a new outage.
const OUTAGE: Duration = Duration::from_secs(10);
/// How often readers look by themselves, whatever wakes them between.
pub(crate) const POLL: Duration = Duration::from_secs(1);

/// What a pass of the relay did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RelayPass {
    /// Events that went out.
    pub told: usize,
    /// Events on which everybody failed too often.
    pub given_up: u64,
}

impl Services {
    /// What has to happen because of an event. It may come again, and on any instance: every handler has to bear that.
    /// A failure brings the event back later.
    pub(crate) async fn consume(&self, event: &StateEvent) -> Result<()> {
        // Whoever waits in this process looks again.
        if let Ok(sandbox) = event.resource.parse::<SandboxId>() {
            self.bus.publish_here(Event::Sandbox(sandbox));
        }
        self.take_up_forsaken(event).await?;
        if let Some(told) = event.notification() {
            self.channels_on_event(&told).await?;
        }
        self.extensions.tell(self, event).await?;
        metrics::counter!("wrenn_events_consumed_total", "kind" => event.kind.as_str()).increment(1);
        Ok(())
    }

    /// The fallback writer: an operation that was decided long ago and still stands there has nobody any more.
    async fn take_up_forsaken(&self, event: &StateEvent) -> Result<()> {
        let (Some(to), Ok(id)) = (event.payload.to, event.resource.parse::<SandboxId>()) else {
            return Ok(());
        };
        if !to.is_transient() || now().saturating_sub(event.at) < millis(self.config.timings.transient_age) {
            return Ok(());
        }
        let current = self.store.sandbox(id).await?;
        if current.is_some_and(|sandbox| sandbox.status == to && sandbox.status_at <= event.at) {
            self.drive(id);
        }
        Ok(())
    }

    /// Starts the relay, and with Redis the consumer and the carriers of wake-ups.
    pub(crate) fn start_events(&self) {
        let services = self.clone();
        self.tasks.spawn(TaskKind::Monitor, async move {
            let mut changes = services.bus.subscribe();
            loop {
                if services.leads()
                    && let Err(error) = services.relay_pass().await
                {
                    tracing::warn!(
                        error = &error as &dyn std::error::Error,
                        "events wait in the outbox"
                    );
                    tokio::time::sleep(POLL).await;
                }
                tokio::select! {
                    () = changes.outbox_filled() => {}
                    () = tokio::time::sleep(POLL) => {}
                }
            }
        });
        let Some(link) = &self.link else { return };
        self.tasks
            .spawn(TaskKind::Monitor, link.clone().bring_in(self.bus.clone()));
        let carry = self
            .carry
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .take();
        if let Some(carry) = carry {
            self.tasks.spawn(TaskKind::Monitor, link.clone().carry_out(carry));
        }
        let (services, link) = (self.clone(), link.clone());
        self.tasks.spawn(TaskKind::Monitor, async move {
            // Of an outage, the beginning is told: a refused certificate or password would be found nowhere otherwise.
            let mut told = false;
            loop {
                let since = tokio::time::Instant::now();
                if let Err(error) = services.consume_stream(&link).await {
                    told &= since.elapsed() < OUTAGE;
                    let error = &error as &dyn std::error::Error;
                    if told {
                        tracing::debug!(error, "the stream of events is away for now");
                    } else {
                        tracing::warn!(
                            error,
                            "Redis cannot be used for now; events go on through the database"
                        );
                        told = true;
                    }
                }
                tokio::time::sleep(POLL).await;
            }
        });
    }

    /// One pass of the relay: gives places, and tells what is untold.
    pub(crate) async fn relay_pass(&self) -> Result<RelayPass> {
        let mut pass = RelayPass::default();
        loop {
            let (teams, more) = self.store.events_number(PAGE).await?;
            for team in teams {
                self.bus.publish(Event::Ordered(team));
            }
            if !more {
                break;
            }
        }
        let repeat = millis(self.config.timings.event_repeat);
        loop {
            let events = self.store.events_untold(now() - repeat, PAGE).await?;
            if events.is_empty() {
                break;
            }
            let seqs: Vec<i64> = events.iter().map(|event| event.seq).collect();
            match &self.link {
                Some(link) => {
                    link.append(&events).await.map_err(Error::internal)?;
                    self.store.events_published(&seqs).await?;
                }
                None => {
                    // Noted before: what fails comes back after the others had their turn.
                    self.store.events_published(&seqs).await?;
                    let done = self.consume_all(&events).await;
                    self.store.events_consumed(&done).await?;
                }
            }
            pass.told += events.len();
            if (events.len() as u64) < PAGE {
                break;
            }
        }
        pass.given_up = self.store.events_give_up(MAX_ATTEMPTS).await?;
        if pass.given_up > 0 {
            tracing::error!(
                events = pass.given_up,
                "events were given up after {MAX_ATTEMPTS} attempts"
            );
        }
        Ok(pass)
    }

    /// Consumes events in order; returns the places of those that were taken in.
    async fn consume_all(&self, events: &[StateEvent]) -> Vec<i64> {
        let mut done = Vec::with_capacity(events.len());
        for event in events {
            match self.consume(event).await {
                Ok(()) => done.push(event.seq),
                Err(error) => tracing::warn!(
                    seq = event.seq,
                    kind = event.kind.as_str(),
                    error = &error as &dyn std::error::Error,
                    "an event was not taken in; it comes again"
                ),
            }
        }
        done
    }

    /// Takes events from the stream until Redis or the database fails.
    async fn consume_stream(&self, link: &Link) -> Result<()> {
        let mut connection = link.reader().await.map_err(Error::internal)?;
        let mut claimed_at: Option<tokio::time::Instant> = None;
        loop {
            let idle = self.config.timings.event_claim;
            if claimed_at.is_none_or(|at| at.elapsed() >= idle) {
                let entries = link.claim(&mut connection, idle).await.map_err(Error::internal)?;
                self.consume_entries(link, &mut connection, entries).await?;
                // What they had open is claimed first.
                let buried = link
                    .bury(&mut connection, idle * 10)
                    .await
                    .map_err(Error::internal)?;
                if buried > 0 {
                    tracing::info!(
                        consumers = buried,
                        "instances that died left the stream of events"
                    );
                }
                claimed_at = Some(tokio::time::Instant::now());
            }
            let entries = link.read(&mut connection).await.map_err(Error::internal)?;
            self.consume_entries(link, &mut connection, entries).await?;
        }
    }

    async fn consume_entries(
        &self,
        link: &Link,
        connection: &mut MultiplexedConnection,
        entries: Vec<Entry>,
    ) -> Result<()> {
        if entries.is_empty() {
            return Ok(());
        }
        let seqs: Vec<i64> = entries
            .iter()
            .filter_map(|entry| entry.event.as_ref().map(|event| event.seq))
            .collect();
        // What was told again meanwhile, and taken in, is done.
        let open = self.store.events_unconsumed(&seqs).await?;
        let events: Vec<StateEvent> = entries
            .iter()
            .filter_map(|entry| entry.event.clone())
            .filter(|event| open.contains(&event.seq))
            .collect();
        let done = self.consume_all(&events).await;
        self.store.events_consumed(&done).await?;
        let finished: Vec<String> = entries
            .into_iter()
            .filter(|entry| {
                entry
                    .event
                    .as_ref()
                    .is_none_or(|event| !open.contains(&event.seq) || done.contains(&event.seq))
            })
            .map(|entry| entry.id)
            .collect();
        if !finished.is_empty() {
            link.acknowledge(connection, &finished)
                .await
                .map_err(Error::internal)?;
        }
        Ok(())
    }

    /// The other instances need not wait for what this one took and did not finish.
    pub(crate) async fn leave_stream(&self) {
        if let Some(link) = &self.link {
            link.leave().await;
        }
    }

    /// Removes events that streams need not come back to any more.
    pub(crate) async fn prune_events(&self) -> Result<u64> {
        let kept = millis(self.config.timings.event_retention);
        Ok(self.store.events_prune(now() - kept).await?)
    }

    /// Where a stream begins, and whether it may have missed something: at the end, or after what its reader saw last.
    pub(crate) async fn events_from(&self, last: Option<i64>) -> Result<(i64, bool)> {
        let end = self.store.events_end().await?;
        match last {
            None => Ok((end, false)),
            // Of another life of this database, restored from a backup: nothing would come for as long as it lags behind.
            Some(last) if last > end => Ok((end, true)),
            Some(last) => Ok((last, last < self.store.events_pruned().await?)),
        }
    }

    /// The next page of a team's events, with the sandboxes as they are now.
    pub(crate) async fn events_after(
        &self,
        principal: Principal,
        after: i64,
    ) -> Result<Vec<(StateEvent, Option<Sandbox>)>> {
        let events = self.store.events_of_team(principal.team, after, PAGE).await?;
        let ids: std::collections::BTreeSet<SandboxId> = events
            .iter()
            .filter_map(|event| event.resource.parse().ok())
            .collect();
        let mut sandboxes = BTreeMap::new();
        if !ids.is_empty() {
            for sandbox in self.store.sandboxes_by_id(principal.team, &ids).await? {
                sandboxes.insert(sandbox.id, sandbox);
            }
        }
        Ok(events
            .into_iter()
            .map(|event| {
                let sandbox = event
                    .resource
                    .parse::<SandboxId>()
                    .ok()
                    .and_then(|id| sandboxes.get(&id).cloned());
                (event, sandbox)
            })
            .collect())
    }
}
