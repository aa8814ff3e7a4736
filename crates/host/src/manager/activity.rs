//! Who uses a sandbox, and when it was last used.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};

use tokio::sync::Notify;
use tokio::time::Instant;

/// Requests under way in a guest, and the time of the last one.
#[derive(Debug)]
pub(crate) struct Activity {
    last_ms: AtomicI64,
    /// The same on the clock that does not jump, in milliseconds since `origin`.
    idle_since_ms: AtomicI64,
    origin: Instant,
    under_way: AtomicUsize,
    /// Streams that somebody follows, which a pause does not wait for.
    followed: AtomicUsize,
    changed: Notify,
}

/// A request under way. Dropping it ends the request.
#[derive(Debug)]
pub(crate) struct UnderWay(Arc<Activity>);

/// A stream that somebody follows. Dropping it ends that.
#[derive(Debug)]
pub(crate) struct Followed(Arc<Activity>);

impl Activity {
    pub(crate) fn new(last_ms: i64) -> Self {
        Self {
            last_ms: AtomicI64::new(last_ms),
            idle_since_ms: AtomicI64::new(0),
            origin: Instant::now(),
            under_way: AtomicUsize::new(0),
            followed: AtomicUsize::new(0),
            changed: Notify::new(),
        }
    }

    /// It is being used now.
    pub(crate) fn touch(&self) {
        self.last_ms.store(now_ms(), Ordering::Relaxed);
        let idle = i64::try_from(self.origin.elapsed().as_millis()).unwrap_or(i64::MAX);
        self.idle_since_ms.store(idle, Ordering::Relaxed);
    }

    /// Begins a request. A pause waits a moment for it, and inactivity does not begin before its end.
    pub(crate) fn begin(self: &Arc<Self>) -> UnderWay {
        self.touch();
        self.under_way.fetch_add(1, Ordering::AcqRel);
        UnderWay(Arc::clone(self))
    }

    /// Begins to follow a stream: somebody waits for a command, however silent it is.
    pub(crate) fn follow(self: &Arc<Self>) -> Followed {
        self.followed.fetch_add(1, Ordering::AcqRel);
        Followed(Arc::clone(self))
    }

    /// Whether somebody waits for the sandbox, so that it is not idle.
    pub(crate) fn busy(&self) -> bool {
        self.under_way() || self.followed.load(Ordering::Acquire) > 0
    }

    fn under_way(&self) -> bool {
        self.under_way.load(Ordering::Acquire) > 0
    }

    /// Waits until no request is under way.
    pub(crate) async fn drained(&self) {
        loop {
            let changed = self.changed.notified();
            if !self.under_way() {
                return;
            }
            changed.await;
        }
    }

    /// Milliseconds since the Unix epoch.
    pub(crate) fn last_ms(&self) -> i64 {
        self.last_ms.load(Ordering::Relaxed)
    }

    pub(crate) fn idle_since(&self) -> Instant {
        let millis = u64::try_from(self.idle_since_ms.load(Ordering::Relaxed)).unwrap_or(0);
        self.origin + std::time::Duration::from_millis(millis)
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.touch();
        self.0.under_way.fetch_sub(1, Ordering::AcqRel);
        self.0.changed.notify_waiters();
    }
}

impl Drop for Followed {
    fn drop(&mut self) {
        self.0.touch();
        self.0.followed.fetch_sub(1, Ordering::AcqRel);
    }
}

/// The wall clock in milliseconds since the Unix epoch.
pub(crate) fn now_ms() -> i64 {
    jiff::Timestamp::now().as_millisecond()
}
