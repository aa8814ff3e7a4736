//! How the parts of the control plane hear of changes.
//!
//! Two things travel, on two ways:
//!
//! - A **wake-up** ([`Event`], over the [`Bus`]) says *that* something changed, never *what*: whoever listens reads
//!   the store afresh, so that a lost or repeated one costs time at most (those who wait read again every second
//!   anyway). It reaches this process at once, and through Redis the others.
//! - A **state event** (`domain::event`) says what happened, and must not be lost. It is written in the transaction of
//!   its change, and told from there at least once (`service::events`), through a Redis stream ([`redis`]) when there
//!   are several instances.

pub(crate) mod redis;

use tokio::sync::{broadcast, mpsc};

use crate::domain::{SandboxId, TeamId};

/// Something changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A sandbox's record.
    Sandbox(SandboxId),
    /// Something else that a state event tells of.
    Outbox,
    /// The monitor has something to do, wherever it runs.
    Poke,
    /// A team's state events got their places in the order, and can be read.
    Ordered(TeamId),
}

impl Event {
    /// As other instances read it.
    fn word(self) -> String {
        match self {
            Self::Sandbox(id) => id.to_string(),
            Self::Outbox => "outbox".to_owned(),
            Self::Poke => "poke".to_owned(),
            Self::Ordered(team) => team.to_string(),
        }
    }

    /// `None`: a newer instance says something that this one does not know.
    fn parse(word: &str) -> Option<Self> {
        match word {
            "outbox" => Some(Self::Outbox),
            "poke" => Some(Self::Poke),
            id => {
                let sandbox = id.parse().map(Self::Sandbox);
                sandbox.or_else(|_| id.parse().map(Self::Ordered)).ok()
            }
        }
    }
}

/// Where wake-ups travel: inside this process always, and to the other instances if there are any.
#[derive(Debug, Clone)]
pub struct Bus {
    local: broadcast::Sender<Event>,
    others: Option<mpsc::Sender<Event>>,
}

impl Bus {
    /// A bus for one process.
    #[must_use]
    pub fn in_process() -> Self {
        Self {
            local: broadcast::channel(1024).0,
            others: None,
        }
    }

    /// A bus whose wake-ups somebody carries to other instances.
    pub(crate) fn carried() -> (Self, mpsc::Receiver<Event>) {
        let (others, carry) = mpsc::channel(1024);
        let bus = Self {
            others: Some(others),
            ..Self::in_process()
        };
        (bus, carry)
    }

    /// Tells everybody. Nobody listening is fine.
    pub fn publish(&self, event: Event) {
        self.publish_here(event);
        if let Some(others) = &self.others {
            // Full while Redis is away: those who wait read again by themselves.
            let _ = others.try_send(event);
        }
    }

    /// Tells this process alone.
    pub(crate) fn publish_here(&self, event: Event) {
        let _ = self.local.send(event);
    }

    /// Listens from now on.
    #[must_use]
    pub fn subscribe(&self) -> Subscription {
        Subscription(self.local.subscribe())
    }
}

/// A listener's end.
#[derive(Debug)]
pub struct Subscription(broadcast::Receiver<Event>);

impl Subscription {
    /// Returns when the sandbox may have changed: also when events were lost, and also when the bus
    /// is gone, since reading once more is always right.
    pub async fn sandbox_changed(&mut self, id: SandboxId) {
        self.heard(|event| event == Event::Sandbox(id)).await;
    }

    /// Returns when a team may have new state events to read.
    pub(crate) async fn team_told(&mut self, team: TeamId) {
        self.heard(|event| event == Event::Ordered(team)).await;
    }

    /// Returns when another instance pokes the monitor.
    pub(crate) async fn poked(&mut self) {
        self.heard(|event| event == Event::Poke).await;
    }

    /// Returns when there may be state events without a place in the order.
    pub(crate) async fn outbox_filled(&mut self) {
        self.heard(|event| matches!(event, Event::Sandbox(_) | Event::Outbox))
            .await;
        // What else is there already is covered by the same look.
        while let Some(Ok(_)) = self.heard_already() {}
    }

    /// What has been heard since, without waiting: an error when more was said than is kept, `None` when that was all.
    pub(crate) fn heard_already(&mut self) -> Option<Result<Event, broadcast::error::TryRecvError>> {
        use broadcast::error::TryRecvError;
        match self.0.try_recv() {
            Err(TryRecvError::Empty | TryRecvError::Closed) => None,
            heard => Some(heard),
        }
    }

    async fn heard(&mut self, wanted: impl Fn(Event) -> bool) {
        loop {
            match self.0.recv().await {
                Ok(event) if !wanted(event) => {}
                Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => return,
                Err(broadcast::error::RecvError::Closed) => std::future::pending().await,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wake_ups_survive_the_way_to_another_instance() {
        for event in [
            Event::Sandbox(SandboxId::new()),
            Event::Outbox,
            Event::Poke,
            Event::Ordered(TeamId::new()),
        ] {
            assert_eq!(Event::parse(&event.word()), Some(event));
        }
        assert_eq!(Event::parse("tomorrow"), None);
    }
}
