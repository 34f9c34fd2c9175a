//! Long polls: how many reads of one tenant wait at once (`?wait=`), each on a connection of its own.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The reads that wait, by tenant.
#[derive(Clone)]
pub(super) struct Polls {
    /// How many a tenant may have; 0: no limit.
    pub(super) most: usize,
    waiting: Arc<Mutex<HashMap<String, usize>>>,
}

/// A read that waits.
pub(super) struct Poll {
    polls: Polls,
    tenant: String,
}

impl Polls {
    pub(super) fn new(most: usize) -> Self {
        Self { most, waiting: Arc::default() }
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<String, usize>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a read until what comes back is dropped; none where the tenant has as many as it may.
    pub(super) fn begin(&self, tenant: &str) -> Option<Poll> {
        let mut waiting = self.waiting();
        let count = waiting.entry(tenant.to_owned()).or_default();
        // A tenant that is refused has others that wait, so nothing is left behind here.
        if self.most > 0 && *count >= self.most {
            return None;
        }
        *count += 1;
        Some(Poll { polls: self.clone(), tenant: tenant.to_owned() })
    }
}

impl Drop for Poll {
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
    fn a_tenant_waits_as_often_as_it_may_and_leaves_nothing_behind() {
        let polls = Polls::new(2);
        let held = [polls.begin("a"), polls.begin("a"), polls.begin("a"), polls.begin("b")];
        assert_eq!(held.iter().map(Option::is_some).collect::<Vec<_>>(), [true, true, false, true]);
        drop(held);
        assert!(polls.begin("a").is_some() && polls.waiting().is_empty());
        let endless = Polls::new(0);
        assert_eq!((0..100).map(|_| endless.begin("a")).collect::<Vec<_>>().iter().flatten().count(), 100);
    }
}
