//! What the metrics page counts in the database, so seldom that it does not matter how often somebody scrapes.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::Instant;

use super::Services;
use crate::Result;
use crate::domain::{Host, SandboxStatus};

/// How old counts of hosts and of sandboxes that are there may be.
const LIVE: Duration = Duration::from_secs(5);
/// How old the count of those that ended may be: nearly all records are such, and nobody acts on their number.
const ENDED: Duration = Duration::from_secs(300);

/// The last counts. Each instance has its own; the lock makes scrapes at the same time count once.
#[derive(Debug, Default)]
pub(super) struct Counted(Mutex<(Option<Live>, Option<Ended>)>);

#[derive(Debug)]
struct Live {
    at: Instant,
    sandboxes: BTreeMap<String, i64>,
    hosts: Vec<Host>,
}

#[derive(Debug)]
struct Ended {
    at: Instant,
    sandboxes: BTreeMap<String, i64>,
}

impl Services {
    /// How many sandboxes are in each status, and the hosts.
    pub(crate) async fn gauges(&self) -> Result<(BTreeMap<String, i64>, Vec<Host>)> {
        let mut counted = self.gauges.0.lock().await;
        let (live, ended) = &mut *counted;
        if live.as_ref().is_none_or(|live| live.at.elapsed() >= LIVE) {
            let there: Vec<_> = SandboxStatus::ALL
                .into_iter()
                .filter(|status| *status != SandboxStatus::Stopped)
                .collect();
            *live = Some(Live {
                at: Instant::now(),
                sandboxes: self.store.sandbox_counts(&there).await?,
                hosts: self.store.hosts().await?,
            });
        }
        if ended.as_ref().is_none_or(|ended| ended.at.elapsed() >= ENDED) {
            *ended = Some(Ended {
                at: Instant::now(),
                sandboxes: self.store.sandbox_counts(&[SandboxStatus::Stopped]).await?,
            });
        }
        let mut sandboxes = BTreeMap::new();
        let mut hosts = Vec::new();
        if let Some(live) = live {
            sandboxes.extend(live.sandboxes.clone());
            hosts.clone_from(&live.hosts);
        }
        if let Some(ended) = ended {
            sandboxes.extend(ended.sandboxes.clone());
        }
        Ok((sandboxes, hosts))
    }
}
