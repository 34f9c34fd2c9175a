//! The verifier: finishes what waits for a reader, and what somebody left half done.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tracing::warn;

use crate::finish::Finisher;
use crate::store;
use crate::wakes::Wakes;

/// Most sessions that one replica reads at a time: each costs one CPU-second a GiB and one S3 stream.
const AT_ONCE: usize = 4;

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
        let limit = i64::try_from(free).expect("a few seats");
        let mut taken = 0;
        for session in self.finisher.store.unattended(now, limit).await? {
            let id = session.id;
            let Ok(seat) = Arc::clone(&self.seats).try_acquire_owned() else { break };
            let seat = Seat { permit: Some(seat), wakes: Arc::clone(&self.finisher.wakes) };
            match self.finisher.begin(session, "verifier", seat).await {
                Ok(Ok(())) => taken += 1,
                // Another replica was quicker.
                Ok(Err(_)) | Err(store::Error::Moved(_)) => {}
                Err(error) => warn!(session.id = %id, %error, "could not take over {id}"),
            }
        }
        Ok(taken)
    }
}

/// The right to read one session.
struct Seat {
    permit: Option<OwnedSemaphorePermit>,
    wakes: Arc<Wakes>,
}

impl Drop for Seat {
    /// Frees the seat first: whoever is woken finds it.
    fn drop(&mut self) {
        drop(self.permit.take());
        self.wakes.verifier.notify_one();
    }
}
