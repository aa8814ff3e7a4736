//! The bus of state changes inside the control plane.
//!
//! An event says *that* something changed, never *what*: whoever listens reads the store afresh, so
//! a lost or repeated event costs time at most. In one process it is a broadcast channel; a fleet's
//! bus (Redis Streams) becomes another variant of [`Bus`].

use tokio::sync::broadcast;

use crate::domain::SandboxId;

/// Something changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A sandbox's record.
    Sandbox(SandboxId),
}

/// Where events travel.
#[derive(Debug, Clone)]
pub enum Bus {
    /// Inside this process.
    InProcess(broadcast::Sender<Event>),
}

impl Bus {
    /// A bus for one process.
    #[must_use]
    pub fn in_process() -> Self {
        Self::InProcess(broadcast::channel(1024).0)
    }

    /// Tells everybody. Nobody listening is fine.
    pub fn publish(&self, event: Event) {
        match self {
            Self::InProcess(sender) => {
                let _ = sender.send(event);
            }
        }
    }

    /// Listens from now on.
    #[must_use]
    pub fn subscribe(&self) -> Subscription {
        match self {
            Self::InProcess(sender) => Subscription(sender.subscribe()),
        }
    }
}

/// A listener's end.
#[derive(Debug)]
pub struct Subscription(broadcast::Receiver<Event>);

impl Subscription {
    /// Returns when the sandbox may have changed: also when events were lost, and also when the bus
    /// is gone, since reading once more is always right.
    pub async fn sandbox_changed(&mut self, id: SandboxId) {
        loop {
            match self.0.recv().await {
                Ok(Event::Sandbox(changed)) if changed != id => {}
                Ok(Event::Sandbox(_)) | Err(broadcast::error::RecvError::Lagged(_)) => return,
                Err(broadcast::error::RecvError::Closed) => std::future::pending().await,
            }
        }
    }
}
