//! Turns of tenants: how many connections one tenant's writing and listing holds at once in this replica.
//!
//! All that opens and ends uploads of one tenant waits for the tenant's row. Without a bound, those that wait there would
//! hold every connection of the pool, and other tenants would wait with them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Tenants that nothing is done for are forgotten once so many are known.
const KNOWN: usize = 1000;

pub(crate) struct Turns {
    most: usize,
    tenants: Mutex<HashMap<String, Arc<Semaphore>>>,
}

impl Turns {
    /// `most` at once a tenant; 0 is no limit.
    pub(crate) fn new(most: u32) -> Self {
        let most = if most == 0 { Semaphore::MAX_PERMITS } else { most as usize };
        Self { most, tenants: Mutex::default() }
    }

    /// Waits until it is the tenant's turn, which lasts until the permit is dropped.
    pub(crate) async fn wait(&self, tenant: &str) -> OwnedSemaphorePermit {
        let turns = {
            let mut tenants = self.tenants.lock().unwrap_or_else(PoisonError::into_inner);
            if tenants.len() >= KNOWN {
                tenants.retain(|_, turns| Arc::strong_count(turns) > 1 || turns.available_permits() < self.most);
            }
            Arc::clone(tenants.entry(tenant.to_owned()).or_insert_with(|| Arc::new(Semaphore::new(self.most))))
        };
        turns.acquire_owned().await.expect("nobody closes the semaphore")
    }
}
