//! Virtual machines that are restored and warmed before anybody asks: under emulation the first run of any code
//! is slow, and this moves it off the path of a create. A pooled VM stands still, so it costs memory but no processor.
//! It is nobody's yet: identity, token, entropy and clock are given to it when a sandbox claims it.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use wrenn_proto::id::{TeamId, TemplateId};

use super::Shared;
use super::vm::{Restored, restore};
use crate::error::Result;
use crate::layout::VmDir;
use crate::offload::remove_folder;
use crate::template::{BuildState, Image, TemplateStore};

/// A refill waits until creates have been quiet for this long, so as not to take their processor.
const QUIET: Duration = Duration::from_millis(400);
/// After a failure.
const RETRY: Duration = Duration::from_secs(30);

/// A VM that waits to be claimed.
pub(crate) struct Warm {
    pub(crate) dir: VmDir,
    pub(crate) image: Image,
    pub(crate) restored: Restored,
}

/// The waiting VMs of the built-in template's usual shape.
pub(crate) struct Pool {
    size: usize,
    ready: Mutex<VecDeque<Warm>>,
    changed: Notify,
    creates: AtomicUsize,
    stop: CancellationToken,
}

/// A create under way; the pool is not refilled meanwhile.
pub(crate) struct CreateUnderWay<'a>(&'a Pool);

impl Pool {
    pub(crate) fn new(size: usize) -> Self {
        Self {
            size,
            ready: Mutex::new(VecDeque::new()),
            changed: Notify::new(),
            creates: AtomicUsize::new(0),
            stop: CancellationToken::new(),
        }
    }

    fn ready(&self) -> std::sync::MutexGuard<'_, VecDeque<Warm>> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a waiting VM made from `image`, if there is one that fits: its process may not write more than the
    /// image's disk can hold, so a larger one needs a process of its own.
    pub(crate) fn claim(&self, image: &Image, disk_mb: u32) -> Option<Warm> {
        if disk_mb != image.manifest.disk_mb {
            return None;
        }
        let mut ready = self.ready();
        let at = ready.iter().position(|warm| warm.image.dir == image.dir)?;
        ready.remove(at)
    }

    pub(crate) fn begin_create(&self) -> CreateUnderWay<'_> {
        self.creates.fetch_add(1, Ordering::AcqRel);
        CreateUnderWay(self)
    }

    /// Keeps the pool full until it is closed.
    pub(crate) async fn keep_full(&self, shared: Arc<Shared>) {
        if self.size == 0 {
            return;
        }
        tokio::select! {
            () = self.stop.cancelled() => {}
            () = self.refill(&shared) => {}
        }
    }

    async fn refill(&self, shared: &Arc<Shared>) {
        // A template that could not be made is its maker's to report; here it would be tried again and again unseen.
        let mut template = shared.templates.minimal.subscribe();
        let ready = |state: &BuildState| matches!(state, BuildState::Ready { .. });
        if template.wait_for(ready).await.is_err() {
            return;
        }
        drop(template);
        loop {
            let changed = self.changed.notified();
            if self.ready().len() >= self.size || self.creates.load(Ordering::Acquire) > 0 {
                changed.await;
                continue;
            }
            // Another create within the quiet time starts it again.
            if tokio::time::timeout(QUIET, changed).await.is_ok() {
                continue;
            }
            let room =
                shared.check_memory(TemplateStore::USUAL_SHAPE, None).is_ok() && shared.check_disk().is_ok();
            let outcome = if room { self.add(shared).await } else { Ok(false) };
            match outcome {
                Ok(true) => {}
                Ok(false) => tokio::time::sleep(RETRY).await,
                Err(error) => {
                    tracing::warn!(
                        error = &error as &dyn std::error::Error,
                        "cannot prepare a virtual machine ahead"
                    );
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }

    async fn add(&self, shared: &Arc<Shared>) -> Result<bool> {
        let image = shared
            .templates
            .image(TeamId::PLATFORM, TemplateId::MINIMAL, TemplateStore::USUAL_SHAPE)
            .await?;
        let name = uuid::Uuid::new_v4().simple().to_string();
        let dir = VmDir::create(shared.layout.pool().join(name))?;
        let made = async {
            let mut restored = restore(shared, &dir, image.clone(), image.manifest.disk_mb).await?;
            restored.warm_up().await?;
            Ok(restored)
        }
        .await;
        match made {
            Ok(restored) => {
                self.ready().push_back(Warm { dir, image, restored });
                Ok(true)
            }
            Err(error) => {
                let _ = remove_folder(dir.path()).await;
                Err(error)
            }
        }
    }

    /// The images on which the waiting VMs stand.
    pub(crate) fn images(&self) -> Vec<Image> {
        self.ready().iter().map(|warm| warm.image.clone()).collect()
    }

    /// Stops refilling.
    pub(crate) fn close(&self) {
        self.stop.cancel();
    }

    /// Ends the waiting VMs; their folders go with the other unfinished work. Call when no task is left.
    pub(crate) fn drain(&self) {
        self.ready().clear();
    }
}

impl Drop for CreateUnderWay<'_> {
    fn drop(&mut self) {
        self.0.creates.fetch_sub(1, Ordering::AcqRel);
        self.0.changed.notify_waiters();
    }
}
