//! Notifications: they wake the workers, and the requests that wait for a session to change, in this replica and in others.
//!
//! A lost notification only costs time, because every worker and every waiting request also polls. Messages to other replicas
//! are queued here; the replica link sends them. While such messages may be missing, one poller asks the database on behalf of
//! all waiting requests.

mod replicas;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, watch};
use uuid::Uuid;

use replicas::Messages;
pub(crate) use replicas::{Others, Replicas, empty_payload};

/// How long replicas keep shards, and how often they look for what no notification reported.
#[derive(Debug, Clone)]
pub struct Settings {
    /// How long a crashed replica keeps its shards. The lease may be short, because the fence in Kafka makes a takeover safe:
    /// a broker that restarts publishes within five seconds.
    pub shard_lease: Duration,
    /// How often the relay looks for pointers while it has some, or while other replicas may not have told it of theirs. A
    /// request that waits for a session reads it again after four times this long.
    pub poll_interval: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self { shard_lease: Duration::from_secs(4), poll_interval: Duration::from_millis(500) }
    }
}

/// The notifications of one replica.
pub(crate) struct ChangeNotifier {
    pub(crate) settings: Settings,
    /// The outbox has a pointer to publish in a shard of this replica.
    pub(crate) relay: Notify,
    /// An object must be read for verification, or a lease expired.
    pub(crate) verifier: Notify,
    /// S3 holds an object or a multipart upload that is no longer needed.
    pub(crate) sweeper: Notify,
    pub(crate) replicas: Replicas,
    subscriptions: Mutex<HashMap<Uuid, Subscription>>,
}

/// A session that at least one subscriber waits for.
struct Subscription {
    changes: watch::Sender<()>,
    /// The lowest version that a waiting subscriber has seen; `i64::MAX` while no subscriber waits.
    lowest_seen_version: i64,
}

impl ChangeNotifier {
    pub(crate) fn new(settings: Settings) -> Self {
        let [relay, verifier, sweeper] = [(); 3].map(|()| Notify::new());
        Self { settings, relay, verifier, sweeper, replicas: Replicas::default(), subscriptions: Mutex::default() }
    }

    /// Reports a change of this session that this replica has made: wakes its subscribers here and in other replicas.
    pub(crate) fn notify(&self, id: Uuid) {
        self.wake_subscribers(id);
        self.replicas.queue_session(id);
    }

    /// Reports a pointer that this replica has queued, or that is no longer deferred: wakes the relay of the replica that owns the shard.
    pub(crate) fn pointer_queued(&self, shard: i32) {
        if self.replicas.owns(shard) {
            self.relay.notify_one();
        } else {
            self.replicas.queue_shard(shard);
        }
    }

    /// Renews the leases of the shards at the next opportunity.
    pub(crate) fn request_renewal(&self) {
        self.replicas.request_renewal();
        self.relay.notify_one();
    }

    /// Acts on a payload. Returns whether this replica, `owner`, has sent it itself.
    pub(crate) fn receive(&self, payload: &str, owner: Uuid) -> bool {
        let Some((sender, messages)) = Messages::parse(payload) else { return false };
        if sender == owner {
            return true;
        }
        self.replicas.record_other();
        if messages.must_renew {
            self.request_renewal();
        }
        if messages.shards.iter().any(|shard| self.replicas.owns(*shard)) {
            self.relay.notify_one();
        }
        messages.sessions.into_iter().for_each(|id| self.wake_subscribers(id));
        false
    }

    /// Wakes the relay and every subscriber: messages of other replicas may have been lost.
    pub(crate) fn wake_all(&self) {
        self.relay.notify_one();
        for subscription in self.subscriptions().values() {
            subscription.changes.send_replace(());
        }
    }

    fn wake_subscribers(&self, id: Uuid) {
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
    /// Waits until the session has another version than `seen_version`, until four poll intervals have passed, or until
    /// `deadline`. The caller then reads the session again. A lease or a session that expires changes no version, so no
    /// notification reports it.
    pub(crate) async fn wait_for_change(&mut self, seen_version: i64, deadline: Instant) {
        if let Some(subscription) = self.notifier.subscriptions().get_mut(&self.id) {
            subscription.lowest_seen_version = subscription.lowest_seen_version.min(seen_version);
        }
        let max_wait =
            self.notifier.settings.poll_interval.saturating_mul(4).min(deadline.saturating_duration_since(Instant::now()));
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
        subscriber.wait_for_change(seen_version, Instant::now() + Duration::from_secs(2)).now_or_never().is_some()
    }

    #[tokio::test]
    async fn a_subscriber_is_notified_of_its_own_session_only() {
        let notifier = Arc::new(ChangeNotifier::new(Settings::default()));
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
    async fn messages_of_other_replicas_wake_subscribers_and_the_relay_that_owns_the_shard() {
        let (me, other, id) = (Uuid::from_u128(1), Uuid::from_u128(2), Uuid::from_u128(3));
        let (here, there) = (Arc::new(ChangeNotifier::new(Settings::default())), ChangeNotifier::new(Settings::default()));
        here.replicas.record_renewal(vec![0, 1], Others { has_replicas: true, has_silent: false });
        there.replicas.record_renewal(vec![2, 3], Others { has_replicas: true, has_silent: false });
        let mut subscriber = here.subscribe(id);
        let is_relay_woken = || here.relay.notified().now_or_never().is_some();
        let deliver = |there: &ChangeNotifier| {
            let payload = there.replicas.next_payload(other, 7_900).expect("a message is queued");
            assert!(!here.receive(&payload, me));
            assert!(there.receive(&payload, other), "a replica knows its own messages");
        };
        there.notify(id);
        deliver(&there);
        assert!(is_notified(&mut subscriber, 1));
        assert!(!is_relay_woken());
        there.pointer_queued(1);
        deliver(&there);
        assert!(is_relay_woken());
        // A shard of its own needs no message, and a foreign one wakes no other replica.
        there.pointer_queued(2);
        assert_eq!(there.replicas.next_payload(other, 7_900), None);
        there.pointer_queued(9);
        deliver(&there);
        assert!(!is_relay_woken() && !here.replicas.take_renewal_request());
        there.replicas.announce_change();
        deliver(&there);
        assert!(is_relay_woken() && here.replicas.take_renewal_request());
    }

    #[tokio::test]
    async fn a_subscriber_that_has_seen_an_older_version_is_notified_beside_one_that_is_up_to_date() {
        let notifier = Arc::new(ChangeNotifier::new(Settings::default()));
        let id = Uuid::from_u128(1);
        let (mut behind, mut up_to_date) = (notifier.subscribe(id), notifier.subscribe(id));
        let deadline = Instant::now() + Duration::from_secs(60);
        let notified = async {
            while !notifier.subscribed_ids().is_empty() {
                notifier.notify_if_newer(&[(id, 2)]);
                tokio::task::yield_now().await;
            }
        };
        let started = Instant::now();
        tokio::join!(up_to_date.wait_for_change(2, deadline), behind.wait_for_change(1, deadline), notified);
        // Without a notification each waits for two seconds.
        assert!(started.elapsed() < Duration::from_secs(2));
        drop(behind);
        assert_eq!(notifier.subscriptions().len(), 1);
    }
}
