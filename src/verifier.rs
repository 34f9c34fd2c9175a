//! The verifier: finishes what waits for a reader, and what somebody left half done.

use std::sync::Arc;

use tokio::sync::Semaphore;
use tracing::warn;

use crate::finish::Finisher;
use crate::store;

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
            match self.finisher.claim(session, "verifier").await {
                Ok(Ok(session)) => {
                    let finisher = self.finisher.clone();
                    tokio::spawn(async move {
                        finisher.run(session).await;
                        drop(seat);
                        // The seat is free: whoever waits for one is next.
                        finisher.wakes.verifier.notify_one();
                    });
                    taken += 1;
                }
                // Another replica was quicker.
                Ok(Err(_)) | Err(store::Error::Moved(_)) => {}
                Err(error) => warn!(session.id = %id, %error, "could not take over {id}"),
            }
        }
        Ok(taken)
    }
}
