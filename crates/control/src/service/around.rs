//! The background work around the sandboxes: the audit log's writer, deliveries, samples and usage.
//!
//! Every pass may run on several control planes at once: claims and upserts make that harmless. What is the same work
//! wherever it is done (samples, usage, removals) is the leader's all the same, since doing it once is enough.

use std::future::Future;
use std::sync::OnceLock;
use std::sync::atomic::AtomicI64;
use std::time::Duration;

use tokio::sync::Notify;

use super::Services;
use super::drive::millis;
use crate::Result;
use crate::domain::{Millis, now};
use crate::tasks::TaskKind;

/// Messages that ended are kept for a week, for whoever looks into a channel's troubles.
const DELIVERIES_KEEP: Millis = 7 * crate::store::DAY;

/// What the background work shares.
#[derive(Default)]
pub(crate) struct Around {
    pub(super) audit: super::audit::Buffer,
    /// Made at the first delivery: a machine without root certificates can run everything else.
    pub(super) sender: OnceLock<std::result::Result<super::deliver::Sender, String>>,
    /// Starts the next look for messages.
    pub(super) deliver: Notify,
    /// Until when this instance has put sandboxes' points together.
    pub(super) rolled_up: AtomicI64,
}

impl Services {
    /// Starts the background work around the sandboxes.
    pub(crate) fn start_around(&self) {
        let timings = &self.config.around;
        self.repeat(
            "audit",
            Duration::from_secs(1),
            |around| Some(around.audit.filling()),
            |services| async move { services.audit_flush().await },
        );
        self.sample("metrics", timings.sample_interval, |services, at| async move {
            services.sample_pass(at).await
        });
        self.sample(
            "sandbox metrics",
            timings.sandbox_metrics_interval,
            |services, at| async move { services.sandbox_metrics_pass(at).await },
        );
        self.repeat(
            "usage",
            timings.usage_interval,
            |_| None,
            |services| async move {
                if !services.leads() {
                    return Ok(());
                }
                services.usage_pass(now()).await?;
                services.prune_pass(now()).await
            },
        );
        self.repeat(
            "deliveries",
            timings.delivery_interval,
            |around| Some(&around.deliver),
            |services| async move { services.deliver_on().await },
        );
    }

    /// Samples once in every interval of the clock, where the leader is: waiting an interval after each sample would miss
    /// one now and then.
    fn sample<F>(
        &self,
        name: &'static str,
        interval: Duration,
        pass: impl Fn(Self, Millis) -> F + Send + 'static,
    ) where
        F: Future<Output = Result<()>> + Send,
    {
        let services = self.clone();
        self.tasks.spawn(TaskKind::Monitor, async move {
            loop {
                tokio::time::sleep(until_next(now(), interval)).await;
                if services.leads()
                    && let Err(error) = pass(services.clone(), now()).await
                {
                    metrics::counter!("wrenn_pass_failures_total", "pass" => name).increment(1);
                    tracing::error!(
                        pass = name,
                        error = &error as &dyn std::error::Error,
                        "taking samples failed"
                    );
                }
            }
        });
    }

    /// Repeats a pass: after every interval, and whenever something says that there is work.
    fn repeat<F>(
        &self,
        name: &'static str,
        interval: Duration,
        work: fn(&Around) -> Option<&Notify>,
        pass: fn(Self) -> F,
    ) where
        F: Future<Output = Result<()>> + Send + 'static,
    {
        let services = self.clone();
        self.tasks.spawn(TaskKind::Worker, async move {
            let closing = services.tasks.closing().clone();
            let work = async |services: &Self| match work(&services.around) {
                Some(work) => work.notified().await,
                None => std::future::pending().await,
            };
            loop {
                tokio::select! {
                    () = closing.cancelled() => return,
                    () = tokio::time::sleep(interval) => {}
                    () = work(&services) => {}
                }
                if let Err(error) = pass(services.clone()).await {
                    metrics::counter!("wrenn_pass_failures_total", "pass" => name).increment(1);
                    tracing::error!(
                        pass = name,
                        error = &error as &dyn std::error::Error,
                        "a background pass failed"
                    );
                    // A database that is away is not asked in a tight loop.
                    tokio::select! {
                        () = closing.cancelled() => return,
                        () = tokio::time::sleep(Duration::from_secs(1)) => {}
                    }
                }
            }
        });
    }

    /// Removes what is too old, and what deleted teams left.
    pub(crate) async fn prune_pass(&self, now: Millis) -> Result<()> {
        self.store
            .audit_prune(now - millis(self.config.around.audit_keep))
            .await?;
        let excess = self
            .store
            .deliveries_cap(self.config.around.delivery_pending)
            .await?;
        if excess > 0 {
            tracing::warn!(
                messages = excess,
                "messages to channels that have too many waiting were given up"
            );
        }
        self.store.deliveries_prune(now - DELIVERIES_KEEP).await?;
        self.store.idempotency_prune(now).await?;
        self.store.deleted_teams_forget(now - crate::store::DAY).await?;
        self.store
            .sandboxes_prune(now - millis(self.config.around.stopped_keep))
            .await?;
        self.sandbox_metrics_prune(now).await?;
        self.metrics_prune(now).await
    }
}

/// How long it is until the next interval of the clock begins.
fn until_next(now: Millis, interval: Duration) -> Duration {
    let interval = millis(interval).max(1);
    Duration::from_millis(u64::try_from(interval - now.rem_euclid(interval)).unwrap_or(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_come_in_every_interval_however_long_each_takes() {
        let interval = Duration::from_secs(10);
        let mut now = 1_700_000_003_217;
        for took in [1, 9_000, 40, 3_000, 9_999, 7] {
            let bucket = now / 10_000;
            now += millis(until_next(now, interval));
            assert_eq!((now / 10_000, now % 10_000), (bucket + 1, 0));
            now += took;
        }
    }
}
