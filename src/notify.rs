//! Notifications inside one replica: they wake the workers, and the requests that wait for a session to change.
//!
//! A lost notification only costs time, because every worker and every waiting request also polls. For changes that
//! other replicas make, one poller asks the database on behalf of all waiting requests.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, watch};
use uuid::Uuid;

/// How long a subscriber waits before it reads the session again. A lease or a session that expires changes no version,
/// so no notification reports it.
const POLL_INTERVAL: Duration = Duration::from_secs(2);

/// The notifications of one replica.
#[derive(Default)]
pub(crate) struct ChangeNotifier {
    /// The outbox has a pointer to publish.
    pub(crate) relay: Notify,
    /// An object must be read for verification, or a lease expired.
    pub(crate) verifier: Notify,
    /// S3 holds an object or a multipart upload that is no longer needed.
    pub(crate) sweeper: Notify,
    subscriptions: Mutex<HashMap<Uuid, Subscription>>,
}

/// A session that at least one subscriber waits for.
struct Subscription {
    changes: watch::Sender<()>,
    /// The lowest version that a waiting subscriber has seen; `i64::MAX` while no subscriber waits.
    lowest_seen_version: i64,
}

impl ChangeNotifier {
    /// Wakes all subscribers of this session.
    pub(crate) fn notify(&self, id: Uuid) {
        if let Some(subscription) = self.subscriptions().get(&id) {
            subscription.changes.send_replace(());
        }
    }

    /// Subscribes to a session. The subscriber receives every notification from now on.
    pub(crate) fn subscribe(self: &Arc<Self>, id: Uuid) -> Subscriber {
        let mut subscriptions = self.subscriptions();
        let subscription = subscriptions
            .entry(id)
            .or_insert_with(|| Subscription { changes: watch::Sender::new(()), lowest_seen_version: i64::MAX });
        Subscriber { notifier: Arc::clone(self), id, changes: Some(subscription.changes.subscribe()) }
    }

    /// The sessions that at least one subscriber waits for.
    pub(crate) fn subscribed_ids(&self) -> Vec<Uuid> {
        let subscriptions = self.subscriptions();
        let waiting = subscriptions.iter().filter(|(_, subscription)| subscription.lowest_seen_version < i64::MAX);
        waiting.map(|(id, _)| *id).collect()
    }

    /// Wakes the subscribers of each session whose version is newer than the version that they have seen.
    pub(crate) fn notify_if_newer(&self, versions: &[(Uuid, i64)]) {
        let mut subscriptions = self.subscriptions();
        for (id, version) in versions {
            let subscription = subscriptions.get_mut(id).filter(|subscription| subscription.lowest_seen_version < *version);
            if let Some(subscription) = subscription {
                // A subscriber that waits again sets the version that it has seen again.
                subscription.lowest_seen_version = i64::MAX;
                subscription.changes.send_replace(());
            }
        }
    }

    fn subscriptions(&self) -> MutexGuard<'_, HashMap<Uuid, Subscription>> {
        self.subscriptions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits for changes of one session.
pub(crate) struct Subscriber {
    notifier: Arc<ChangeNotifier>,
    id: Uuid,
    /// `None` only during drop.
    changes: Option<watch::Receiver<()>>,
}

impl Subscriber {
    /// Waits until the session has another version than `seen_version`, until [`POLL_INTERVAL`] has passed, or until
    /// `deadline`. The caller then reads the session again.
    pub(crate) async fn wait_for_change(&mut self, seen_version: i64, deadline: Instant) {
        if let Some(subscription) = self.notifier.subscriptions().get_mut(&self.id) {
            subscription.lowest_seen_version = subscription.lowest_seen_version.min(seen_version);
        }
        let max_wait = POLL_INTERVAL.min(deadline.saturating_duration_since(Instant::now()));
        if let Some(changes) = &mut self.changes {
            let _ = tokio::time::timeout(max_wait, changes.changed()).await;
        }
    }
}

impl Drop for Subscriber {
    fn drop(&mut self) {
        let mut subscriptions = self.notifier.subscriptions();
        self.changes = None;
        if subscriptions.get(&self.id).is_some_and(|subscription| subscription.changes.receiver_count() == 0) {
            subscriptions.remove(&self.id);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    /// Whether a wait that begins now ends at once. Every notification here comes before it.
    fn is_notified(subscriber: &mut Subscriber, seen_version: i64) -> bool {
        subscriber.wait_for_change(seen_version, Instant::now() + POLL_INTERVAL).now_or_never().is_some()
    }

    #[tokio::test]
    async fn a_subscriber_is_notified_of_its_own_session_only() {
        let notifier = Arc::new(ChangeNotifier::default());
        let (id, other) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let mut subscriber = notifier.subscribe(id);
        // Also of a change between the subscription and the wait.
        notifier.notify(id);
        assert!(is_notified(&mut subscriber, 1));
        notifier.notify(other);
        notifier.notify_if_newer(&[(id, 1), (other, 9)]);
        assert!(!is_notified(&mut subscriber, 1));
        assert_eq!(notifier.subscribed_ids(), [id]);
        notifier.notify_if_newer(&[(id, 2)]);
        assert!(is_notified(&mut subscriber, 1));
        drop(subscriber);
        assert!(notifier.subscriptions().is_empty(), "no subscription is left");
    }

    #[tokio::test]
    async fn a_subscriber_that_has_seen_an_older_version_is_notified_beside_one_that_is_up_to_date() {
        let notifier = Arc::new(ChangeNotifier::default());
        let id = Uuid::from_u128(1);
        let (mut behind, mut up_to_date) = (notifier.subscribe(id), notifier.subscribe(id));
        let deadline = Instant::now() + POLL_INTERVAL * 2;
        let notified = async {
            while !notifier.subscribed_ids().is_empty() {
                notifier.notify_if_newer(&[(id, 2)]);
                tokio::task::yield_now().await;
            }
        };
        let started = Instant::now();
        tokio::join!(up_to_date.wait_for_change(2, deadline), behind.wait_for_change(1, deadline), notified);
        // Without a notification each waits for this interval.
        assert!(started.elapsed() < POLL_INTERVAL);
        drop(behind);
        assert_eq!(notifier.subscriptions().len(), 1);
    }
}
