//! Numbers for VMs: each running one has a number that no other has, from which its user id follows.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::{HostError, Result};

/// The numbers 0 to `max` - 1.
#[derive(Debug)]
pub(crate) struct Slots {
    max: u32,
    taken: Mutex<BTreeSet<u32>>,
}

/// A number that is its holder's until it is dropped.
#[derive(Debug)]
pub(crate) struct Slot {
    number: u32,
    slots: Arc<Slots>,
}

impl Slots {
    pub(crate) fn new(max: u32) -> Arc<Self> {
        Arc::new(Self {
            max,
            taken: Mutex::new(BTreeSet::new()),
        })
    }

    /// The lowest free number.
    pub(crate) fn take(self: &Arc<Self>) -> Result<Slot> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let number = (0..self.max)
            .find(|number| !taken.contains(number))
            .ok_or_else(|| {
                HostError::NoCapacity(format!(
                    "all {} places for virtual machines are taken (WRENN_MAX_VMS)",
                    self.max
                ))
            })?;
        taken.insert(number);
        Ok(Slot {
            number,
            slots: Arc::clone(self),
        })
    }

    /// The number that a VM found at start has already.
    pub(crate) fn take_exactly(self: &Arc<Self>, number: u32) -> Option<Slot> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        taken.insert(number).then(|| Slot {
            number,
            slots: Arc::clone(self),
        })
    }
}

impl Slot {
    pub(crate) fn number(&self) -> u32 {
        self.number
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.slots
            .taken
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_unique_and_come_back() {
        let slots = Slots::new(3);
        let first = slots.take().unwrap();
        let found = slots.take_exactly(1).unwrap();
        assert!(slots.take_exactly(1).is_none());
        let third = slots.take().unwrap();
        assert_eq!((first.number(), found.number(), third.number()), (0, 1, 2));
        assert!(matches!(slots.take(), Err(HostError::NoCapacity(_))));
        drop(found);
        assert_eq!(slots.take().unwrap().number(), 1);
        drop((first, third));
    }
}
