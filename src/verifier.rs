//! The verifier: finishes what waits for a reader, and what somebody left half done.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::finish::Finisher;
use crate::session::Session;
use crate::store;
use crate::wakes::Wakes;

/// Most sessions that one replica reads at a time: each costs one CPU-second a GiB and one S3 stream. One tenant never
/// has more than half of them, and less where others read too: who comes next finds a seat, however long the reads are.
const AT_ONCE: usize = 8;
/// Rows that break the rules of their state stay due; with so many of them the others are still seen.
const PASSED_OVER: i64 = 20;

/// Takes over completing sessions that nobody attends to.
pub(crate) struct Verifier {
    finisher: Finisher,
    seats: Arc<Semaphore>,
    readers: Readers,
    /// The tenant that was served last: the next one by name comes first.
    last: Mutex<String>,
}

/// How many sessions are read for each tenant; those without any are not in it.
#[derive(Clone, Default)]
struct Readers(Arc<Mutex<HashMap<String, usize>>>);

impl Readers {
    fn counts(&self) -> MutexGuard<'_, HashMap<String, usize>> {
        // It is whole after every statement, so a panic elsewhere does not spoil it.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The tenants that have their share: of the seats one part for each that reads, and one for who comes next.
    fn busy(&self) -> Vec<String> {
        let counts = self.counts();
        counts.iter().filter(|(_, count)| **count >= share(counts.len())).map(|(tenant, _)| tenant.clone()).collect()
    }

    /// Counts one more for a tenant that has not got its share yet.
    fn try_add(&self, tenant: &str) -> bool {
        let mut counts = self.counts();
        let tenants = counts.len() + usize::from(!counts.contains_key(tenant));
        let count = counts.entry(tenant.to_owned()).or_default();
        let has_room = *count < share(tenants);
        *count += usize::from(has_room);
        has_room
    }

    fn remove(&self, tenant: &str) {
        let mut counts = self.counts();
        if let Some(count) = counts.get_mut(tenant) {
            *count -= 1;
        }
        counts.retain(|_, count| *count > 0);
    }
}

/// How many seats a tenant may have where so many read.
fn share(tenants: usize) -> usize {
    (AT_ONCE / (tenants + 1)).max(1)
}

/// One of every tenant, then the next of every tenant, and so on.
fn in_turn<T>(waiting: Vec<(String, T)>) -> Vec<(String, T)> {
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
    pub(crate) fn new(finisher: Finisher) -> Self {
        Self { finisher, seats: Arc::new(Semaphore::new(AT_ONCE)), readers: Readers::default(), last: Mutex::default() }
    }

    /// Takes as many sessions as there are free seats, of one tenant after the other, and lets them run: a long read
    /// holds no other up. Says how many it took.
    pub(crate) async fn tick(&self) -> Result<usize, store::Error> {
        let free = self.seats.available_permits();
        if free == 0 {
            return Ok(0);
        }
        let now = self.finisher.store.now().await?;
        let each = i64::try_from(free).expect("a few seats") + PASSED_OVER;
        let busy = self.readers.busy();
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut waiting = self.finisher.store.unattended(now, &last, &busy, each).await?;
        if !last.is_empty() {
            // From the first name on again, up to where it began.
            let first = self.finisher.store.unattended(now, "", &busy, each).await?;
            waiting.extend(first.into_iter().filter(|(tenant, _)| *tenant <= last));
        }
        let (mut taken, mut failed) = (0, None);
        for (tenant, session) in in_turn(waiting) {
            match self.take(&tenant, session).await {
                Ok(Taken::Ours) => {
                    taken += 1;
                    *self.last.lock().unwrap_or_else(PoisonError::into_inner) = tenant;
                }
                Ok(Taken::Others) => {}
                Ok(Taken::Full) => break,
                Err(error) => failed = Some(error),
            }
        }
        match failed {
            // What fails now fails again at once: a database that is only read answers in no time.
            Some(error) if taken == 0 => Err(error),
            _ => Ok(taken),
        }
    }

    async fn take(&self, tenant: &str, session: Result<Session, store::Error>) -> Result<Taken, store::Error> {
        let session = session?;
        let Ok(permit) = Arc::clone(&self.seats).try_acquire_owned() else { return Ok(Taken::Full) };
        if !self.readers.try_add(tenant) {
            return Ok(Taken::Others);
        }
        let is_used = Arc::new(AtomicBool::new(false));
        let wakes = Arc::clone(&self.finisher.wakes);
        let reader = (self.readers.clone(), tenant.to_owned());
        let seat = Seat { permit: Some(permit), reader, is_used: Arc::clone(&is_used), wakes };
        match self.finisher.begin(session, "verifier", seat).await {
            Ok(Ok(())) => {
                // Should the work have ended by now, nobody is woken: whoever took something looks again at once.
                is_used.store(true, Ordering::Release);
                Ok(Taken::Ours)
            }
            // Another replica was quicker.
            Ok(Err(_)) | Err(store::Error::Moved(_)) => Ok(Taken::Others),
            Err(error) => Err(error),
        }
    }
}

/// What came of taking a session.
enum Taken {
    Ours,
    /// Another replica's, or of a tenant that has its share.
    Others,
    /// There is no seat left.
    Full,
}

/// The right to read one session.
struct Seat {
    permit: Option<OwnedSemaphorePermit>,
    /// Where it is counted, and for whom.
    reader: (Readers, String),
    /// Somebody read under it. One that nobody used has kept nothing waiting.
    is_used: Arc<AtomicBool>,
    wakes: Arc<Wakes>,
}

impl Drop for Seat {
    /// Frees the seat first: whoever is woken finds it.
    fn drop(&mut self) {
        drop(self.permit.take());
        self.reader.0.remove(&self.reader.1);
        if self.is_used.load(Ordering::Acquire) {
            self.wakes.verifier.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tenants_take_turns_however_many_sessions_one_of_them_has() {
        let mut waiting: Vec<(String, usize)> = (0..64).map(|number| ("noisy".to_owned(), number)).collect();
        waiting.push(("quiet".to_owned(), 64));
        let turns: Vec<(String, usize)> = in_turn(waiting);
        assert_eq!(turns[..3], [("noisy".to_owned(), 0), ("quiet".to_owned(), 64), ("noisy".to_owned(), 1)]);
        assert_eq!(turns.len(), 65);
    }

    #[test]
    fn a_tenant_never_has_more_than_half_of_the_seats() {
        let readers = Readers::default();
        let taken = |tenant: &str| (0..64).filter(|_| readers.try_add(tenant)).count();
        assert_eq!(taken("noisy"), AT_ONCE / 2);
        assert_eq!(readers.busy(), ["noisy"]);
        assert!(taken("another") >= 1);
        // However many read much, who comes next finds a seat.
        assert!(readers.counts().values().sum::<usize>() < AT_ONCE);
        assert_eq!(taken("quiet"), 2);
        for _ in 0..4 {
            readers.remove("noisy");
        }
        assert!(!readers.counts().contains_key("noisy"));
    }
}
