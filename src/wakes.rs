//! Who wakes whom inside one replica. Losing a wake-up costs time only: every worker, and everyone who waits for a
//! session, also looks by itself. What other replicas did is looked for once for all who wait.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, watch};
use uuid::Uuid;

/// How soon one who waits looks for itself: a lease that runs out, or a session that ends, changes no version.
const LOOK_ANYWAY: Duration = Duration::from_secs(2);

/// The bells of one replica.
#[derive(Default)]
pub(crate) struct Wakes {
    /// A pointer waits in the outbox.
    pub(crate) relay: Notify,
    /// Bytes wait to be read, or a lease ran out.
    pub(crate) verifier: Notify,
    /// S3 holds something that nobody wants.
    pub(crate) sweeper: Notify,
    awaited: Mutex<HashMap<Uuid, Awaited>>,
}

/// A session that somebody waits for.
struct Awaited {
    bell: watch::Sender<()>,
    /// The least version that one of them has seen.
    seen: i64,
}

impl Wakes {
    /// Tells everyone who waits for this session.
    pub(crate) fn changed(&self, id: Uuid) {
        if let Some(awaited) = self.awaited().get(&id) {
            awaited.bell.send_replace(());
        }
    }

    /// Begins to listen; what changes from now on is heard.
    pub(crate) fn listen(self: &Arc<Self>, id: Uuid) -> Listener {
        let mut awaited = self.awaited();
        let bell = &awaited.entry(id).or_insert_with(|| Awaited { bell: watch::Sender::new(()), seen: i64::MAX }).bell;
        Listener { wakes: Arc::clone(self), id, bell: Some(bell.subscribe()) }
    }

    /// The sessions that somebody waits for.
    pub(crate) fn all_awaited(&self) -> Vec<Uuid> {
        self.awaited().iter().filter(|(_, awaited)| awaited.seen < i64::MAX).map(|(id, _)| *id).collect()
    }

    /// Tells who waits for one of these sessions and has not seen this version.
    pub(crate) fn are_now(&self, versions: &[(Uuid, i64)]) {
        let mut awaited = self.awaited();
        for (id, version) in versions {
            if let Some(awaited) = awaited.get_mut(id).filter(|awaited| awaited.seen < *version) {
                // Whoever goes on waiting says anew what it has seen.
                awaited.seen = i64::MAX;
                awaited.bell.send_replace(());
            }
        }
    }

    fn awaited(&self) -> MutexGuard<'_, HashMap<Uuid, Awaited>> {
        self.awaited.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Somebody who waits for a session.
pub(crate) struct Listener {
    wakes: Arc<Wakes>,
    id: Uuid,
    /// Gone only once it is dropped.
    bell: Option<watch::Receiver<()>>,
}

impl Listener {
    /// Returns when the session is no more of the version that was `seen`, when it is time to look for oneself, and at
    /// `deadline` at the latest.
    pub(crate) async fn wait(&mut self, seen: i64, deadline: Instant) {
        if let Some(awaited) = self.wakes.awaited().get_mut(&self.id) {
            awaited.seen = awaited.seen.min(seen);
        }
        let longest = LOOK_ANYWAY.min(deadline.saturating_duration_since(Instant::now()));
        if let Some(bell) = &mut self.bell {
            let _ = tokio::time::timeout(longest, bell.changed()).await;
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let mut awaited = self.wakes.awaited();
        self.bell = None;
        if awaited.get(&self.id).is_some_and(|awaited| awaited.bell.receiver_count() == 0) {
            awaited.remove(&self.id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_millis(200);

    async fn is_rung(listener: &mut Listener, seen: i64) -> bool {
        let begun = Instant::now();
        listener.wait(seen, begun + SOON).await;
        begun.elapsed() < SOON
    }

    #[tokio::test]
    async fn who_waits_hears_of_its_session_and_of_no_other() {
        let wakes = Arc::new(Wakes::default());
        let (id, other) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let mut listener = wakes.listen(id);
        // Also of what changed before it began to wait.
        wakes.changed(id);
        assert!(is_rung(&mut listener, 1).await);
        wakes.changed(other);
        wakes.are_now(&[(id, 1), (other, 9)]);
        assert!(!is_rung(&mut listener, 1).await);
        assert_eq!(wakes.all_awaited(), [id]);
        wakes.are_now(&[(id, 2)]);
        assert!(is_rung(&mut listener, 1).await);
        drop(listener);
        assert!(wakes.awaited().is_empty(), "nobody waits any more");
    }

    #[tokio::test]
    async fn of_two_who_wait_the_one_that_has_seen_less_is_told() {
        let wakes = Arc::new(Wakes::default());
        let id = Uuid::from_u128(1);
        let (mut behind, mut ahead) = (wakes.listen(id), wakes.listen(id));
        let until = Instant::now() + SOON;
        let told = async {
            while !wakes.all_awaited().is_empty() {
                wakes.are_now(&[(id, 2)]);
                tokio::task::yield_now().await;
            }
        };
        let begun = Instant::now();
        tokio::join!(ahead.wait(2, until), behind.wait(1, until), told);
        assert!(begun.elapsed() < SOON);
        drop(behind);
        assert_eq!(wakes.awaited().len(), 1);
    }
}
