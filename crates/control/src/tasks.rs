//! Background work: every task has a kind, and the kind says how it ends.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// What a task is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TaskKind {
    /// Carries one decision about a sandbox to its host. At shutdown it may finish within the grace;
    /// cut short, the record is still in its transient status and the next process takes it up.
    Drive,
    /// Answers a request that is not to be left half done when its client leaves. At shutdown it may finish within
    /// the grace.
    Request,
    /// Looks after hosts and records. At shutdown it ends at its next wait.
    Monitor,
    /// An extension's worker. At shutdown it ends at its next wait.
    Extension,
    /// Finishes deletions and writes down what was collected. At shutdown it ends at its next wait; what is left is
    /// marked in the database, and the next process takes it up.
    Housekeeping,
    /// Sends a mail. At shutdown it may finish within the grace; cut short, the mail is lost and its reader asks
    /// for another one.
    Mail,
    /// Repeats a pass until it sees that shutdown has begun; the pass under way may finish within the grace.
    Worker,
}

impl TaskKind {
    fn name(self) -> &'static str {
        match self {
            Self::Drive => "drive",
            Self::Request => "request",
            Self::Monitor => "monitor",
            Self::Worker => "worker",
            Self::Extension => "extension",
            Self::Housekeeping => "housekeeping",
            Self::Mail => "mail",
        }
    }

    /// Whether cancellation drops the task at its next await, or lets it finish.
    fn stops_at_once(self) -> bool {
        match self {
            Self::Monitor | Self::Extension | Self::Housekeeping => true,
            Self::Drive | Self::Request | Self::Mail | Self::Worker => false,
        }
    }
}

/// Starts tasks and ends them.
#[derive(Debug, Clone)]
pub struct Tasks {
    tracker: TaskTracker,
    closing: CancellationToken,
    abandon: CancellationToken,
    running: Arc<AtomicUsize>,
}

impl Default for Tasks {
    fn default() -> Self {
        Self {
            tracker: TaskTracker::new(),
            closing: CancellationToken::new(),
            abandon: CancellationToken::new(),
            running: Arc::default(),
        }
    }
}

impl Tasks {
    /// Starts a task. A panic in it is logged and ends that task alone.
    pub fn spawn<F>(&self, kind: TaskKind, work: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let stop = if kind.stops_at_once() {
            self.closing.clone()
        } else {
            self.abandon.clone()
        };
        let running = Arc::clone(&self.running);
        self.tracker.spawn(async move {
            running.fetch_add(1, Ordering::Relaxed);
            let work = futures::FutureExt::catch_unwind(std::panic::AssertUnwindSafe(work));
            let outcome = stop.run_until_cancelled(work).await;
            running.fetch_sub(1, Ordering::Relaxed);
            if let Some(Err(_)) = outcome {
                // The panic hook has printed message and place.
                tracing::error!(task = kind.name(), "a background task panicked");
                metrics::counter!("wrenn_task_panics_total", "task" => kind.name()).increment(1);
            }
        });
    }

    /// Fires when shutdown begins.
    #[must_use]
    pub fn closing(&self) -> &CancellationToken {
        &self.closing
    }

    /// Ends everything: what may finish gets the grace, the rest is dropped.
    pub async fn shut_down(&self, grace: Duration) {
        self.closing.cancel();
        self.tracker.close();
        if tokio::time::timeout(grace, self.tracker.wait()).await.is_err() {
            tracing::warn!(
                tasks = self.running.load(Ordering::Relaxed),
                "background tasks did not end in time; the next start takes their work up"
            );
            self.abandon.cancel();
            self.tracker.wait().await;
        }
    }
}
