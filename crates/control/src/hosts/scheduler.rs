//! Chooses a host: round robin over the online hosts that have the template and the room.

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::domain::{Host, HostId, TemplateId};
use crate::store::Store;
use crate::{Error, ErrorCode, Result};

/// What a sandbox needs of its host.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Needs {
    pub(crate) template: TemplateId,
    pub(crate) memory_mb: u32,
}

/// The scheduler.
#[derive(Debug, Default)]
pub(crate) struct Scheduler {
    next: AtomicUsize,
}

impl Scheduler {
    /// A host for a new sandbox, other than those that just refused it.
    ///
    /// The last heartbeat's free memory, less what is on its way to that host, has to hold the sandbox.
    /// The agent has the last word when it reserves: this only avoids asking in vain.
    pub(crate) async fn place(&self, store: &Store, needs: Needs, refused: &[HostId]) -> Result<Host> {
        let candidates = store.hosts_with_template(needs.template).await?;
        if candidates.is_empty() {
            return Err(Error::new(
                ErrorCode::NoCapacity,
                "no host that has the template is online; try again shortly",
            ));
        }
        let ids: Vec<HostId> = candidates.iter().map(|host| host.id).collect();
        let promised = store.memory_on_its_way(&ids).await?;
        let start = self.next.fetch_add(1, Ordering::Relaxed);
        let mut largest = 0;
        for offset in 0..candidates.len() {
            let Some(host) = candidates.get(start.wrapping_add(offset) % candidates.len()) else {
                continue;
            };
            if refused.contains(&host.id) {
                continue;
            }
            let promised = promised.get(&host.id).copied().unwrap_or_default();
            let free = host.memory_available_mb.saturating_sub(promised);
            if free >= u64::from(needs.memory_mb) {
                return Ok(host.clone());
            }
            largest = largest.max(free);
        }
        Err(Error::new(
            ErrorCode::NoCapacity,
            format!(
                "no host has {} MiB of memory free (the most on one host is {largest} MiB); \
                 destroy or pause sandboxes, ask for less, or add a host",
                needs.memory_mb
            ),
        ))
    }
}
