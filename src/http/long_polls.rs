//! Long polls (`?wait=`): limits how many reads of one tenant wait at once, because each occupies a connection.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The number of waiting reads of each tenant.
#[derive(Clone)]
pub(super) struct LongPolls {
    /// How many reads of one tenant may wait; 0: no limit.
    pub(super) max_per_tenant: usize,
    waiting: Arc<Mutex<HashMap<String, usize>>>,
}

/// A waiting read. Dropping it releases its count.
pub(super) struct LongPollPermit {
    polls: LongPolls,
    tenant: String,
}

impl LongPolls {
    pub(super) fn new(max_per_tenant: usize) -> Self {
        Self { max_per_tenant, waiting: Arc::default() }
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<String, usize>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a waiting read until the permit is dropped. `None` if the tenant is at its limit.
    pub(super) fn try_acquire(&self, tenant: &str) -> Option<LongPollPermit> {
        let mut waiting = self.waiting();
        let count = waiting.entry(tenant.to_owned()).or_default();
        // A refused tenant has other waiting reads, so the map keeps no empty entry.
        if self.max_per_tenant > 0 && *count >= self.max_per_tenant {
            return None;
        }
        *count += 1;
        Some(LongPollPermit { polls: self.clone(), tenant: tenant.to_owned() })
    }
}

impl Drop for LongPollPermit {
    fn drop(&mut self) {
        let mut waiting = self.polls.waiting();
        if let Some(count) = waiting.get_mut(&self.tenant) {
            *count -= 1;
            if *count == 0 {
                waiting.remove(&self.tenant);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_polls_of_a_tenant_are_limited_and_counted_until_they_end() {
        let polls = LongPolls::new(2);
        let held = [polls.try_acquire("a"), polls.try_acquire("a"), polls.try_acquire("a"), polls.try_acquire("b")];
        assert_eq!(held.iter().map(Option::is_some).collect::<Vec<_>>(), [true, true, false, true]);
        drop(held);
        assert!(polls.try_acquire("a").is_some() && polls.waiting().is_empty());
        let unlimited = LongPolls::new(0);
        assert_eq!((0..100).map(|_| unlimited.try_acquire("a")).collect::<Vec<_>>().iter().flatten().count(), 100);
    }
}
