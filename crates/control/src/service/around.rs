//! The background work around the sandboxes: the audit log's writer, deliveries, samples and usage.
//!
//! Every pass may run on several control planes at once: claims and upserts make that harmless, so none of
//! them needs a leader.

use std::future::Future;
use std::sync::OnceLock;
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
        self.repeat(
            "metrics",
            timings.sample_interval,
            |_| None,
            |services| async move { services.sample_pass(now()).await },
        );
        self.repeat(
            "usage",
            timings.usage_interval,
            |_| None,
            |services| async move {
                services.usage_pass(now()).await?;
                services.prune_pass(now()).await
            },
        );
        self.repeat(
            "deliveries",
            timings.delivery_interval,
            |around| Some(&around.deliver),
            |services| async move {
                while !services.tasks.closing().is_cancelled() && services.deliver_pass().await? > 0 {}
                Ok(())
            },
        );
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
        self.store.deliveries_prune(now - DELIVERIES_KEEP).await?;
        self.store.idempotency_prune(now).await?;
        self.store.deleted_teams_forget().await?;
        self.metrics_prune(now).await
    }
}
