//! The verifier: reads back objects whose bytes must be verified, and takes over completions whose lease has expired.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::completion::CompletionWorker;
use crate::notify::ChangeNotifier;
use crate::session::Session;
use crate::store;

/// The most sessions that one replica reads at the same time. Each costs one CPU-second per GiB and one S3 stream. One
/// tenant has at most half of them, and fewer if other tenants read too, so the next tenant always finds a permit.
const MAX_CONCURRENT_READS: usize = 8;
/// Invalid rows are never completed and stay due. A query reads this many more rows, so up to as many invalid rows do not
/// hide the valid ones.
const MAX_INVALID_ROWS: i64 = 20;

/// Takes over completing sessions that have no valid lease.
pub(crate) struct Verifier {
    completion_worker: CompletionWorker,
    permits: Arc<Semaphore>,
    tenant_reads: TenantReads,
    /// The tenant whose session was taken last. The next tick starts with the next tenant by name.
    last_tenant: Mutex<String>,
}

/// How many sessions are read for each tenant. Tenants without a read are not in the map.
#[derive(Clone, Default)]
struct TenantReads(Arc<Mutex<HashMap<String, usize>>>);

impl TenantReads {
    fn counts(&self) -> MutexGuard<'_, HashMap<String, usize>> {
        // The map is consistent after every statement, so a panic elsewhere does not corrupt it.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The tenants that have reached their limit.
    fn tenants_at_limit(&self) -> Vec<String> {
        let counts = self.counts();
        counts.iter().filter(|(_, count)| **count >= tenant_limit(counts.len())).map(|(tenant, _)| tenant.clone()).collect()
    }

    /// Counts one more read for a tenant, unless the tenant has reached its limit.
    fn try_start(&self, tenant: &str) -> bool {
        let mut counts = self.counts();
        let tenants = counts.len() + usize::from(!counts.contains_key(tenant));
        let count = counts.entry(tenant.to_owned()).or_default();
        let has_room = *count < tenant_limit(tenants);
        *count += usize::from(has_room);
        has_room
    }

    fn end(&self, tenant: &str) {
        let mut counts = self.counts();
        if let Some(count) = counts.get_mut(tenant) {
            *count -= 1;
        }
        counts.retain(|_, count| *count > 0);
    }
}

/// How many permits one of `tenants` reading tenants may have: an equal share, with one more share left for a new tenant.
fn tenant_limit(tenants: usize) -> usize {
    (MAX_CONCURRENT_READS / (tenants + 1)).max(1)
}

/// Orders the sessions: the first of every tenant, then the second of every tenant, and so on.
fn round_robin<T>(waiting: Vec<(String, T)>) -> Vec<(String, T)> {
    let mut tenants: Vec<(String, VecDeque<T>)> = Vec::new();
    for (tenant, session) in waiting {
        match tenants.iter_mut().find(|(known, _)| *known == tenant) {
            Some((_, sessions)) => sessions.push_back(session),
            None => tenants.push((tenant, VecDeque::from([session]))),
        }
    }
    let mut ordered = Vec::new();
    while !tenants.is_empty() {
        for (tenant, sessions) in &mut tenants {
            ordered.extend(sessions.pop_front().map(|session| (tenant.clone(), session)));
        }
        tenants.retain(|(_, sessions)| !sessions.is_empty());
    }
    ordered
}

impl Verifier {
    pub(crate) fn new(completion_worker: CompletionWorker) -> Self {
        Self {
            completion_worker,
            permits: Arc::new(Semaphore::new(MAX_CONCURRENT_READS)),
            tenant_reads: TenantReads::default(),
            last_tenant: Mutex::default(),
        }
    }

    /// Takes as many sessions as there are free permits, one tenant after the other, and starts their tasks. A long read
    /// does not delay other sessions. Returns how many sessions were taken.
    pub(crate) async fn tick(&self) -> Result<usize, store::Error> {
        let free = self.permits.available_permits();
        if free == 0 {
            return Ok(0);
        }
        let now = self.completion_worker.store.now().await?;
        let limit = i64::try_from(free).expect("there are few permits") + MAX_INVALID_ROWS;
        let excluded = self.tenant_reads.tenants_at_limit();
        let last = self.last_tenant.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut waiting = self.completion_worker.store.sessions_with_expired_lease(now, &last, &excluded, limit).await?;
        if !last.is_empty() {
            // Wrap around: the tenants from the first name up to the last served one.
            let first = self.completion_worker.store.sessions_with_expired_lease(now, "", &excluded, limit).await?;
            waiting.extend(first.into_iter().filter(|(tenant, _)| *tenant <= last));
        }
        let (mut taken, mut failed) = (0, None);
        for (tenant, session) in round_robin(waiting) {
            match self.take(&tenant, session).await {
                Ok(TakeOutcome::Taken) => {
                    taken += 1;
                    *self.last_tenant.lock().unwrap_or_else(PoisonError::into_inner) = tenant;
                }
                Ok(TakeOutcome::Skipped) => {}
                Ok(TakeOutcome::NoPermit) => break,
                Err(error) => failed = Some(error),
            }
        }
        match failed {
            // Nothing was taken, so report the error: the worker loop then pauses before it retries.
            Some(error) if taken == 0 => Err(error),
            _ => Ok(taken),
        }
    }

    async fn take(&self, tenant: &str, session: Result<Session, store::Error>) -> Result<TakeOutcome, store::Error> {
        let session = session?;
        let Ok(permit) = Arc::clone(&self.permits).try_acquire_owned() else { return Ok(TakeOutcome::NoPermit) };
        if !self.tenant_reads.try_start(tenant) {
            return Ok(TakeOutcome::Skipped);
        }
        let is_used = Arc::new(AtomicBool::new(false));
        let notifier = Arc::clone(&self.completion_worker.notifier);
        let counted = (self.tenant_reads.clone(), tenant.to_owned());
        let read_permit = ReadPermit { permit: Some(permit), counted, is_used: Arc::clone(&is_used), notifier };
        match self.completion_worker.start(session, "verifier", read_permit).await {
            Ok(Ok(_)) => {
                // If the task has already ended, it notified no one. That is safe: after a taken session the verifier ticks
                // again at once.
                is_used.store(true, Ordering::Release);
                Ok(TakeOutcome::Taken)
            }
            // Another replica claimed the session first.
            Ok(Err(_)) | Err(store::Error::VersionConflict(_)) => Ok(TakeOutcome::Skipped),
            Err(error) => Err(error),
        }
    }
}

/// The outcome of taking a session.
enum TakeOutcome {
    Taken,
    /// Another replica has it, or its tenant has reached its limit.
    Skipped,
    NoPermit,
}

/// The permit to read one session.
struct ReadPermit {
    permit: Option<OwnedSemaphorePermit>,
    /// The counter and the tenant it counts for.
    counted: (TenantReads, String),
    /// Whether a session was claimed with this permit. An unused permit blocked no other session, so its end notifies
    /// no worker.
    is_used: Arc<AtomicBool>,
    notifier: Arc<ChangeNotifier>,
}

impl Drop for ReadPermit {
    /// Releases the permit before the notification, so that the notified verifier finds it free.
    fn drop(&mut self) {
        drop(self.permit.take());
        self.counted.0.end(&self.counted.1);
        if self.is_used.load(Ordering::Acquire) {
            self.notifier.verifier.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tenants_take_turns_even_if_one_has_many_sessions() {
        let mut waiting: Vec<(String, usize)> = (0..64).map(|number| ("noisy".to_owned(), number)).collect();
        waiting.push(("quiet".to_owned(), 64));
        let turns: Vec<(String, usize)> = round_robin(waiting);
        assert_eq!(turns[..3], [("noisy".to_owned(), 0), ("quiet".to_owned(), 64), ("noisy".to_owned(), 1)]);
        assert_eq!(turns.len(), 65);
    }

    #[test]
    fn a_tenant_never_has_more_than_half_of_the_permits() {
        let tenant_reads = TenantReads::default();
        let taken = |tenant: &str| (0..64).filter(|_| tenant_reads.try_start(tenant)).count();
        assert_eq!(taken("noisy"), MAX_CONCURRENT_READS / 2);
        assert_eq!(tenant_reads.tenants_at_limit(), ["noisy"]);
        assert!(taken("another") >= 1);
        // Permits remain for the next tenant.
        assert!(tenant_reads.counts().values().sum::<usize>() < MAX_CONCURRENT_READS);
        assert_eq!(taken("quiet"), 2);
        for _ in 0..4 {
            tenant_reads.end("noisy");
        }
        assert!(!tenant_reads.counts().contains_key("noisy"));
    }
}
