//! What the driver, the flows and the handles of one link share.

use std::cmp::Reverse;
use std::collections::hash_map::Entry;
use std::collections::{BinaryHeap, HashMap};
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Instant;

use tokio::sync::{Notify, Semaphore};
use tokio_util::sync::CancellationToken;

use super::UserNetConfig;
use super::flow::{Flow, FlowKey};
use super::link::FrameSink;
use super::stats::{Counters, bump};
use crate::net::policy::{self, DenyReason, EgressPolicy, HostAddrs, Verdict};

pub(super) struct Shared {
    pub(super) config: UserNetConfig,
    pub(super) sink: FrameSink,
    pub(super) timers: Timers,
    pub(super) counters: Counters,
    pub(super) cancel: CancellationToken,
    /// Places for TCP connections that the guest opens, and for those opened into it. They are apart so
    /// that a guest cannot lock the host out.
    pub(super) outbound_places: Arc<Semaphore>,
    pub(super) inbound_places: Arc<Semaphore>,
    /// Told when the policy was changed.
    pub(super) policy_changed: Notify,
    policy: RwLock<Arc<EgressPolicy>>,
    table: Mutex<FlowTable>,
    /// Flows that wait for room in the sink, in the order in which they came.
    blocked: Mutex<Vec<FlowKey>>,
    epoch: Instant,
}

impl Shared {
    pub(super) fn new(config: UserNetConfig) -> Self {
        Self {
            sink: FrameSink::new(),
            timers: Timers::default(),
            counters: Counters::default(),
            cancel: CancellationToken::new(),
            outbound_places: Arc::new(Semaphore::new(config.limits.tcp_from_guest)),
            inbound_places: Arc::new(Semaphore::new(config.limits.tcp_to_guest)),
            policy_changed: Notify::new(),
            policy: RwLock::new(Arc::new(config.policy.clone())),
            table: Mutex::default(),
            blocked: Mutex::default(),
            epoch: Instant::now(),
            config,
        }
    }

    /// The time as the stack counts it. Zero is in its past, where it keeps things that are overdue.
    pub(super) fn now(&self) -> smoltcp::time::Instant {
        let micros = i64::try_from(self.epoch.elapsed().as_micros()).unwrap_or(i64::MAX - 1_000_000);
        smoltcp::time::Instant::from_micros(micros + 1_000_000)
    }

    pub(super) fn table(&self) -> MutexGuard<'_, FlowTable> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn policy(&self) -> Arc<EgressPolicy> {
        Arc::clone(&self.policy.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn set_policy(&self, policy: EgressPolicy) {
        *self.policy.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(policy);
        self.policy_changed.notify_one();
    }

    /// Decides about a destination under the present policy, and counts a refusal.
    pub(super) fn verdict(&self, dst: Ipv4Addr) -> Verdict {
        let verdict = match HostAddrs::recent() {
            Ok(host) => policy::decide(dst, &self.policy(), &host),
            Err(error) => {
                tracing::warn!(%error, "the host's addresses are unknown, so nothing may leave the guest");
                Verdict::Deny(DenyReason::HostUnknown)
            }
        };
        if let Verdict::Deny(reason) = verdict {
            tracing::debug!(%dst, ?reason, "the guest may not go there");
            bump(&self.counters.denied);
        }
        verdict
    }

    /// Puts a flow on the list of those to serve when the sink has room.
    pub(super) fn wait_for_room(&self, key: FlowKey) {
        self.blocked
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(key);
        // The sink may have been emptied since the flow found it full.
        if self.sink.has_room() {
            self.sink.drained.notify_one();
        }
    }

    pub(super) fn take_blocked(&self) -> Vec<FlowKey> {
        std::mem::take(&mut *self.blocked.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// What the table knows of a connection.
#[derive(Clone)]
pub(super) enum Slot {
    /// The guest asked for it and its destination has not answered yet. The number tells this attempt
    /// from an earlier one with the same key.
    Dialing(u64),
    /// It is open, or at least has a socket.
    Open(Arc<Flow>),
}

/// All connections of a link.
#[derive(Default)]
pub(super) struct FlowTable {
    slots: HashMap<FlowKey, Slot>,
    open: u64,
    attempts: u64,
    closed: bool,
}

impl FlowTable {
    pub(super) fn get(&self, key: &FlowKey) -> Option<&Slot> {
        self.slots.get(key)
    }

    pub(super) fn open_count(&self) -> u64 {
        self.open
    }

    /// Marks a connection as being dialled; `None` when the key is taken or the link closed.
    pub(super) fn begin_dial(&mut self, key: FlowKey) -> Option<u64> {
        if self.closed {
            return None;
        }
        let Entry::Vacant(slot) = self.slots.entry(key) else {
            return None;
        };
        self.attempts += 1;
        slot.insert(Slot::Dialing(self.attempts));
        Some(self.attempts)
    }

    /// Forgets a dial, by its attempt or, when the guest gave up, whatever attempt it is.
    pub(super) fn end_dial(&mut self, key: &FlowKey, attempt: Option<u64>) -> bool {
        match self.slots.get(key) {
            Some(Slot::Dialing(at)) if attempt.is_none_or(|attempt| attempt == *at) => {
                self.slots.remove(key);
                true
            }
            _ => false,
        }
    }

    /// Enters a flow, in the place of its dial if it had one. False when its place is not its own.
    pub(super) fn insert(&mut self, flow: &Arc<Flow>, attempt: Option<u64>) -> bool {
        if self.closed {
            return false;
        }
        let free = match (self.slots.get(&flow.key), attempt) {
            (None, None) => true,
            (Some(Slot::Dialing(at)), Some(attempt)) => *at == attempt,
            _ => false,
        };
        if free {
            self.slots.insert(flow.key, Slot::Open(Arc::clone(flow)));
            self.open += 1;
        }
        free
    }

    pub(super) fn contains(&self, key: &FlowKey) -> bool {
        self.slots.contains_key(key)
    }

    /// Takes exactly this flow out.
    pub(super) fn remove(&mut self, flow: &Flow) {
        if let Some(Slot::Open(found)) = self.slots.get(&flow.key)
            && std::ptr::eq(Arc::as_ptr(found), flow)
        {
            self.slots.remove(&flow.key);
            self.open -= 1;
        }
    }

    pub(super) fn flows(&self) -> Vec<Arc<Flow>> {
        self.slots
            .values()
            .filter_map(|slot| match slot {
                Slot::Open(flow) => Some(Arc::clone(flow)),
                Slot::Dialing(_) => None,
            })
            .collect()
    }

    /// Lets nothing in any more and hands out what is left.
    pub(super) fn close(&mut self) -> Vec<Arc<Flow>> {
        self.closed = true;
        self.flows()
    }
}

/// When which flow wants to be looked at. Entries that have been overtaken stay until their time; the flow
/// then knows that they are not its own.
#[derive(Default)]
pub(super) struct Timers {
    heap: Mutex<BinaryHeap<Reverse<(Instant, FlowKey)>>>,
    /// Told when the earliest time has become earlier.
    pub(super) sooner: Notify,
}

impl Timers {
    pub(super) fn arm(&self, at: Instant, key: FlowKey) {
        let mut heap = self.heap.lock().unwrap_or_else(PoisonError::into_inner);
        let sooner = heap.peek().is_none_or(|Reverse((first, _))| at < *first);
        heap.push(Reverse((at, key)));
        drop(heap);
        if sooner {
            self.sooner.notify_one();
        }
    }

    pub(super) fn next(&self) -> Option<Instant> {
        self.heap
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .peek()
            .map(|Reverse((at, _))| *at)
    }

    /// Takes out one entry that is due.
    pub(super) fn pop_due(&self, now: Instant) -> Option<(Instant, FlowKey)> {
        let mut heap = self.heap.lock().unwrap_or_else(PoisonError::into_inner);
        match heap.peek() {
            Some(Reverse((at, _))) if *at <= now => heap.pop().map(|Reverse(entry)| entry),
            _ => None,
        }
    }
}
