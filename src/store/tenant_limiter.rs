//! Limits how many calls of one tenant run at once in this replica: one semaphore per tenant.
//!
//! All calls that open or end an upload of one tenant wait for the same row of `tenants`. Without a limit, the waiting calls
//! could hold every connection of the pool, and other tenants would wait too.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Once the map has this many tenants, those without a running call are removed from it.
const PRUNE_AT_TENANTS: usize = 1000;

pub(crate) struct TenantLimiter {
    max_calls: usize,
    tenants: Mutex<HashMap<String, Arc<Semaphore>>>,
}

impl TenantLimiter {
    /// Allows each tenant `max_calls` at once; 0 means no limit.
    pub(crate) fn new(max_calls: u32) -> Self {
        let max_calls = if max_calls == 0 { Semaphore::MAX_PERMITS } else { max_calls as usize };
        Self { max_calls, tenants: Mutex::default() }
    }

    /// Waits for one of the tenant's permits. Dropping the permit returns it.
    pub(crate) async fn acquire(&self, tenant: &str) -> OwnedSemaphorePermit {
        let semaphore = {
            let mut tenants = self.tenants.lock().unwrap_or_else(PoisonError::into_inner);
            if tenants.len() >= PRUNE_AT_TENANTS {
                tenants.retain(|_, semaphore| Arc::strong_count(semaphore) > 1 || semaphore.available_permits() < self.max_calls);
            }
            Arc::clone(tenants.entry(tenant.to_owned()).or_insert_with(|| Arc::new(Semaphore::new(self.max_calls))))
        };
        semaphore.acquire_owned().await.expect("the semaphore is never closed")
    }
}
