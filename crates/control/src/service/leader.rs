//! Which instance does what is done once: the background passes.
//!
//! On a shared database the leader holds a lease; another instance takes it over when it is not renewed, because the
//! leader died or lost the database. On SQLite there is one process, which leads. Leadership is a saving, not a lock:
//! two leaders for a moment (a pass that began before its lease ended) do harmless work twice, since every pass is
//! made of conditional updates and idempotent calls.
//!
//! Each instance also holds a lease of its own, before it serves. Where one ends without being given back, an instance
//! died, and the leader takes up what is under way at once rather than when it has become old; and again for a while,
//! since one that was merely slow may still die with what it took on meanwhile.

use std::sync::Mutex;
use std::time::Duration;

use tokio::time::Instant;
use uuid::Uuid;

use super::Services;
use super::drive::millis;
use crate::Result;
use crate::tasks::TaskKind;

/// The leader's lease.
const LEADER: &str = "leader";
/// An instance's own lease is this and its id.
const INSTANCE: &str = "instance/";
/// Between two removals of what is too old.
const PRUNE_INTERVAL: Duration = Duration::from_secs(600);

/// This instance's place among the others.
#[derive(Debug)]
pub(crate) struct Leadership {
    pub(crate) instance: Uuid,
    /// Until when this instance leads, by its own clock; `None` when it does not.
    until: Mutex<Option<Instant>>,
    /// Until when what is under way is taken up with each pass.
    wary: Mutex<Option<Instant>>,
    /// This instance leads from now on.
    pub(super) gained: tokio::sync::Notify,
}

impl Leadership {
    pub(crate) fn new(instance: Uuid) -> Self {
        Self {
            instance,
            until: Mutex::default(),
            wary: Mutex::default(),
            gained: tokio::sync::Notify::new(),
        }
    }

    fn set(&self, until: Option<Instant>) -> bool {
        let mut held = self
            .until
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let led = held.is_some_and(|until| until > Instant::now());
        *held = until;
        led
    }

    fn beware(&self, time: Duration) {
        *self
            .wary
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner) = Some(Instant::now() + time);
    }

    fn is_wary(&self) -> bool {
        let wary = self
            .wary
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        wary.is_some_and(|until| until > Instant::now())
    }

    fn get(&self) -> bool {
        let held = self
            .until
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        held.is_some_and(|until| until > Instant::now())
    }
}

impl Services {
    /// Whether the background passes are this instance's at the moment.
    pub fn leads(&self) -> bool {
        !self.store.is_shared() || self.leadership.get()
    }

    /// Takes this instance's leases, and keeps them until shutdown.
    pub(crate) async fn start_leadership(&self) {
        if !self.store.is_shared() {
            return;
        }
        // What it takes on from here on is taken up by the others when it dies. A database that is away is the loop's.
        if let Err(error) = self.lease_pass().await {
            tracing::debug!(error = &error as &dyn std::error::Error, "no lease yet");
        }
        let services = self.clone();
        self.tasks.spawn(TaskKind::Monitor, async move {
            let mut lost = false;
            loop {
                match services.lease_pass().await {
                    Ok(_) if !lost => {}
                    // What this instance could not write while the database was away, it does again.
                    Ok(_) => {
                        tracing::info!("the database is back");
                        lost = services.take_up_unfinished().await.is_err();
                        services.poke();
                    }
                    Err(error) => {
                        lost = true;
                        tracing::warn!(
                            error = &error as &dyn std::error::Error,
                            "the leases could not be renewed"
                        );
                    }
                }
                tokio::time::sleep(services.config.timings.lease / 3).await;
            }
        });
    }

    /// Renews the leases once, and takes over from whoever is gone; returns whether this instance leads.
    pub(crate) async fn lease_pass(&self) -> Result<bool> {
        let life = self.config.timings.lease;
        let instance = self.leadership.instance;
        self.store
            .lease_take(&format!("{INSTANCE}{instance}"), instance, millis(life))
            .await?;
        // Counted from before the question: the lease cannot end earlier in the database than here.
        let asked = Instant::now();
        let leads = self.store.lease_take(LEADER, instance, millis(life)).await?;
        let led = self.leadership.set(leads.then(|| asked + life));
        if leads && !led {
            tracing::info!(%instance, "this instance runs the background passes now");
            self.leadership.gained.notify_one();
            self.poke();
        }
        if leads {
            let died = self.store.leases_bury(INSTANCE).await?;
            if died > 0 {
                tracing::warn!(instances = died, "instances died; their operations are taken up");
                self.leadership.beware(life * 2);
            }
            if self.leadership.is_wary() {
                self.take_up_unfinished().await?;
                self.poke();
            }
        }
        Ok(leads)
    }

    /// Gives the leases back, so that others need not wait for their end.
    pub(crate) async fn resign(&self) {
        if !self.store.is_shared() {
            return;
        }
        self.leadership.set(None);
        let instance = self.leadership.instance;
        for name in [LEADER.to_owned(), format!("{INSTANCE}{instance}")] {
            if let Err(error) = self.store.lease_release(&name, instance).await {
                tracing::debug!(%error, "a lease was not given back; it ends by itself");
            }
        }
    }

    /// Runs a pass at intervals, on whichever instance leads.
    pub(crate) fn start_pass<F>(
        &self,
        name: &'static str,
        every: Duration,
        pass: impl Fn(Self) -> F + Send + 'static,
    ) where
        F: Future<Output = Result<()>> + Send + 'static,
    {
        let services = self.clone();
        self.tasks.spawn(TaskKind::Monitor, async move {
            loop {
                tokio::time::sleep(every).await;
                if services.leads()
                    && let Err(error) = pass(services.clone()).await
                {
                    tracing::error!(
                        pass = name,
                        error = &error as &dyn std::error::Error,
                        "a pass failed"
                    );
                }
            }
        });
    }

    /// Starts the removal of what is too old.
    pub(crate) fn start_pruning(&self) {
        self.start_pass("prune events", PRUNE_INTERVAL, |services| async move {
            services.prune_events().await.map(drop)
        });
    }
}
