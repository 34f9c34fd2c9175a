//! What this replica knows about the other replicas, and the messages that it has for them.
//!
//! A lost message only costs time. A replica that receives no messages polls faster while other replicas exist.

use std::collections::{BTreeSet, HashSet};
use std::fmt::Write as _;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use uuid::Uuid;

/// The first word of a payload. A payload with another first word is ignored: it comes from another version.
const VERSION: &str = "1";
/// The most sessions that wait to be sent. More gather only while no connection is open.
const MAX_QUEUED_SESSIONS: usize = 10_000;

/// What this replica knows about the other replicas, and what it wants to tell them.
#[derive(Default)]
pub(crate) struct Replicas {
    state: Mutex<State>,
    /// A message was queued.
    pub(crate) queued: Notify,
}

#[derive(Default)]
struct State {
    own_shards: Vec<i32>,
    others: Others,
    /// The other replicas have changed, so the shards may have to be balanced again.
    must_renew: bool,
    /// Whether this replica receives the messages that it sends.
    is_receiving: bool,
    outgoing: Messages,
}

/// Which other programs publish.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Others {
    /// Other replicas, which send and receive messages.
    pub(crate) has_replicas: bool,
    /// Replicas of an older version, which send none.
    pub(crate) has_silent: bool,
}

/// The messages of one payload.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Messages {
    /// A replica has joined or left, or has given shards back: the others renew their leases now.
    pub(super) must_renew: bool,
    /// Shards with a pointer that was queued.
    pub(super) shards: BTreeSet<i32>,
    /// Sessions that have changed.
    pub(super) sessions: HashSet<Uuid>,
}

impl Replicas {
    /// Records the outcome of a renewal.
    pub(crate) fn record_renewal(&self, own_shards: Vec<i32>, others: Others) {
        let mut state = self.state();
        (state.own_shards, state.others) = (own_shards, others);
    }

    pub(crate) fn owns(&self, shard: i32) -> bool {
        self.state().own_shards.contains(&shard)
    }

    /// Whether changes by other replicas may happen without a message to this one.
    pub(crate) fn must_poll(&self) -> bool {
        let state = self.state();
        state.others.has_silent || (state.others.has_replicas && !state.is_receiving)
    }

    /// Whether a renewal was requested since the last call.
    pub(crate) fn take_renewal_request(&self) -> bool {
        std::mem::take(&mut self.state().must_renew)
    }

    pub(super) fn request_renewal(&self) {
        self.state().must_renew = true;
    }

    /// Records whether this replica receives the messages that it sends. Returns what was known before.
    pub(crate) fn set_receiving(&self, is_receiving: bool) -> bool {
        std::mem::replace(&mut self.state().is_receiving, is_receiving)
    }

    /// Records that another replica has sent a message. The next renewal counts the replicas again.
    pub(super) fn record_other(&self) {
        self.state().others.has_replicas = true;
    }

    /// Tells the other replicas that a session has changed.
    pub(super) fn queue_session(&self, id: Uuid) {
        self.queue(|messages| {
            messages.sessions.insert(id);
        });
    }

    /// Tells the owner of a shard that a pointer was queued in it.
    pub(super) fn queue_shard(&self, shard: i32) {
        self.queue(|messages| {
            messages.shards.insert(shard);
        });
    }

    /// Queues a message, if another replica exists.
    fn queue(&self, add: impl FnOnce(&mut Messages)) {
        let mut state = self.state();
        if state.others.has_replicas {
            add(&mut state.outgoing);
            if state.outgoing.sessions.len() > MAX_QUEUED_SESSIONS {
                state.outgoing.sessions.clear();
            }
            drop(state);
            self.queued.notify_one();
        }
    }

    /// Tells the other replicas to renew their leases now.
    pub(crate) fn announce_change(&self) {
        self.queue(|messages| messages.must_renew = true);
    }

    /// Takes the next payload of the queued messages, of at most `max_bytes`.
    pub(crate) fn next_payload(&self, sender: Uuid, max_bytes: usize) -> Option<String> {
        let mut state = self.state();
        (state.outgoing != Messages::default()).then(|| state.outgoing.take_payload(sender, max_bytes))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Each statement leaves the state complete, so it is still valid after a panic elsewhere.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A payload without messages: it shows its sender that it receives what it sends.
pub(crate) fn empty_payload(sender: Uuid) -> String {
    format!("{VERSION} {}", sender.simple())
}

impl Messages {
    /// Moves messages into a payload, as many as `max_bytes` allow: the version, the sender, then one word for each message.
    fn take_payload(&mut self, sender: Uuid, max_bytes: usize) -> String {
        let mut payload = empty_payload(sender);
        if std::mem::take(&mut self.must_renew) {
            payload.push_str(" r");
        }
        // The longest word has 34 bytes with its space.
        while payload.len() + 34 <= max_bytes
            && let Some(shard) = self.shards.pop_first()
        {
            let _ = write!(payload, " p{shard}");
        }
        let room = max_bytes.saturating_sub(payload.len()) / 34;
        let sent: Vec<Uuid> = self.sessions.iter().copied().take(room).collect();
        for id in sent {
            self.sessions.remove(&id);
            let _ = write!(payload, " u{}", id.simple());
        }
        payload
    }

    /// Reads a payload: its sender and its messages. `None` if another program wrote it; unknown words are ignored.
    pub(super) fn parse(payload: &str) -> Option<(Uuid, Self)> {
        let mut words = payload.split(' ');
        if words.next() != Some(VERSION) {
            return None;
        }
        let sender = words.next()?.parse().ok()?;
        let mut messages = Self::default();
        for word in words {
            match (word.get(..1), word.get(1..)) {
                (Some("r"), Some("")) => messages.must_renew = true,
                (Some("p"), Some(shard)) => messages.shards.extend(shard.parse::<i32>()),
                (Some("u"), Some(id)) => messages.sessions.extend(id.parse::<Uuid>()),
                _ => {}
            }
        }
        Some((sender, messages))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ME: Uuid = Uuid::from_u128(7);

    fn with_others() -> Replicas {
        let replicas = Replicas::default();
        replicas.record_renewal(vec![0], Others { has_replicas: true, has_silent: false });
        replicas
    }

    #[test]
    fn messages_gather_until_they_are_sent_and_survive_the_transport() {
        let replicas = with_others();
        assert_eq!(replicas.next_payload(ME, 7_900), None);
        for number in [3, 1, 3] {
            replicas.queue_shard(number);
            replicas.queue_session(Uuid::from_u128(42));
        }
        replicas.announce_change();
        let payload = replicas.next_payload(ME, 7_900).unwrap();
        let (sender, messages) = Messages::parse(&payload).unwrap();
        assert_eq!(sender, ME);
        assert!(messages.must_renew);
        assert_eq!(messages.shards.into_iter().collect::<Vec<_>>(), [1, 3]);
        assert_eq!(messages.sessions.into_iter().collect::<Vec<_>>(), [Uuid::from_u128(42)]);
        assert_eq!(replicas.next_payload(ME, 7_900), None);
    }

    #[test]
    fn many_messages_are_split_into_payloads_of_the_allowed_size() {
        let replicas = with_others();
        replicas.queue(|messages| messages.sessions.extend((0..1000).map(Uuid::from_u128)));
        replicas.queue(|messages| messages.shards.extend(0..1024));
        let (mut sessions, mut shards, mut payloads) = (HashSet::new(), BTreeSet::new(), 0);
        while let Some(payload) = replicas.next_payload(ME, 7_900) {
            assert!(payload.len() <= 7_900, "{} bytes", payload.len());
            let messages = Messages::parse(&payload).unwrap().1;
            sessions.extend(messages.sessions);
            shards.extend(messages.shards);
            payloads += 1;
        }
        assert_eq!((sessions.len(), shards.len(), payloads), (1000, 1024, 5));
    }

    #[test]
    fn a_payload_of_another_program_is_ignored_and_so_is_an_unknown_word() {
        for payload in ["", "2 00000000000000000000000000000007 r", "1", "1 me r", "{\"version\":1}", "ü"] {
            assert_eq!(Messages::parse(payload), None, "{payload}");
        }
        let (_, messages) = Messages::parse(&format!("{} x9 é rr p-1x ux p2  u", empty_payload(ME))).unwrap();
        assert_eq!(messages, Messages { shards: BTreeSet::from([2]), ..Messages::default() });
    }

    #[test]
    fn nothing_is_queued_without_another_replica_and_not_too_much_without_a_connection() {
        let alone = Replicas::default();
        alone.announce_change();
        assert_eq!(alone.next_payload(ME, 7_900), None);
        let replicas = with_others();
        for number in 0..25_000 {
            replicas.queue_session(Uuid::from_u128(number));
        }
        assert!(replicas.state().outgoing.sessions.len() <= MAX_QUEUED_SESSIONS);
    }

    #[test]
    fn a_replica_polls_while_others_exist_that_it_does_not_hear() {
        let replicas = Replicas::default();
        assert!(!replicas.must_poll(), "it is alone");
        replicas.record_other();
        assert!(replicas.must_poll());
        replicas.set_receiving(true);
        assert!(!replicas.must_poll());
        replicas.record_renewal(Vec::new(), Others { has_replicas: false, has_silent: true });
        assert!(replicas.must_poll(), "a replica of an older version sends nothing");
    }
}
