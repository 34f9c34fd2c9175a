//! The verifier: finishes what waits for a reader, and what somebody left half done.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::finish::Finisher;
use crate::session::Session;
use crate::store;
use crate::wakes::Wakes;

/// Most sessions that one replica reads at a time: each costs one CPU-second a GiB and one S3 stream.
const AT_ONCE: usize = 4;
/// Rows that break the rules of their state stay due; with so many of them the others are still seen.
const PASSED_OVER: i64 = 20;

/// Takes over completing sessions that nobody attends to.
pub(crate) struct Verifier {
    finisher: Finisher,
    seats: Arc<Semaphore>,
}

impl Verifier {
    pub(crate) fn new(finisher: Finisher) -> Self {
        Self { finisher, seats: Arc::new(Semaphore::new(AT_ONCE)) }
    }

    /// Takes as many sessions as there are free seats, and lets them run: a long read holds no other up.
    /// Says how many it took.
    pub(crate) async fn tick(&self) -> Result<usize, store::Error> {
        let free = self.seats.available_permits();
        if free == 0 {
            return Ok(0);
        }
        let now = self.finisher.store.now().await?;
        let limit = i64::try_from(free).expect("a few seats") + PASSED_OVER;
        let (mut taken, mut failed) = (0, None);
        for session in self.finisher.store.unattended(now, limit).await? {
            match self.take(session).await {
                Ok(Taken::Ours) => taken += 1,
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

    async fn take(&self, session: Result<Session, store::Error>) -> Result<Taken, store::Error> {
        let session = session?;
        let Ok(permit) = Arc::clone(&self.seats).try_acquire_owned() else { return Ok(Taken::Full) };
        let is_used = Arc::new(AtomicBool::new(false));
        let wakes = Arc::clone(&self.finisher.wakes);
        let seat = Seat { permit: Some(permit), is_used: Arc::clone(&is_used), wakes };
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
    Others,
    /// There is no seat left.
    Full,
}

/// The right to read one session.
struct Seat {
    permit: Option<OwnedSemaphorePermit>,
    /// Somebody read under it. One that nobody used has kept nothing waiting.
    is_used: Arc<AtomicBool>,
    wakes: Arc<Wakes>,
}

impl Drop for Seat {
    /// Frees the seat first: whoever is woken finds it.
    fn drop(&mut self) {
        drop(self.permit.take());
        if self.is_used.load(Ordering::Acquire) {
            self.wakes.verifier.notify_one();
        }
    }
}
