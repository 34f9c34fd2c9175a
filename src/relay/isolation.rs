//! Finds the records of a batch that Kafka rejects and sets them aside, so that the other records of the shard continue.
//!
//! A transaction fails as a whole, and Kafka often does not say which record caused this. A batch that fails is therefore
//! halved until one topic, and then one record, is left. This takes about `log2(batch)` transactions for each bad record.
//! The isolation stores each topic that Kafka rejects. Records of these topics are deferred without being sent, and one of
//! them is retried later.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::kafka::RecordRejection;
use crate::store::OutboxRow;

/// A rejected topic is retried after 1, 2, 4, ... seconds, and at most this many.
const MAX_RETRY_SECONDS: u64 = 60;
/// How many rejected topics are stored. Records of any other topic are isolated one by one.
const MAX_REJECTED_TOPICS: usize = 10_000;
/// How many batches of a shard may fail in a row without a known cause before the next batch is halved.
const FAILURES_BEFORE_HALVING: u32 = 2;
/// The pause after a batch that failed without a known cause. It doubles with each failure.
const MIN_PAUSE: Duration = Duration::from_millis(100);
const MAX_PAUSE: Duration = Duration::from_millis(1600);
/// A shard that publishes nothing for this long writes the reason to the uploads that wait for it.
const STALLED_AFTER: Duration = Duration::from_secs(3);
/// How often the reason is written to further uploads.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);

/// The rejected topics, and how each shard's batches are halved.
#[derive(Default)]
pub(super) struct Isolation(Mutex<Inner>);

#[derive(Default)]
struct Inner {
    topics: HashMap<String, RejectedTopic>,
    shards: HashMap<i32, ShardState>,
}

/// A topic for which Kafka rejects every record.
struct RejectedTopic {
    reason: String,
    retry_at: Instant,
    /// How often Kafka rejected it in a row.
    rejections: u32,
}

/// How a shard's batches are halved and delayed.
#[derive(Default)]
struct ShardState {
    /// How often the next batch is halved before it is sent.
    halvings: u32,
    /// How many batches in a row failed without a known cause.
    failures: u32,
    /// How many of these failed while Kafka answered, since the batch was last halved.
    failures_while_reachable: u32,
    paused_until: Option<Instant>,
    /// The last batch was the retry of a rejected topic, so the next batch is for the other topics.
    retried_topic: bool,
    /// A record that failed alone, and the reason. The next batch defers it instead of sending it again.
    defer_next: Option<(Uuid, String)>,
    stall: Option<Stall>,
}

/// Why and since when a shard publishes nothing.
struct Stall {
    since: Instant,
    reason: String,
    reported_at: Option<Instant>,
    /// The outbox row number up to which the reason is written to the uploads.
    reported_up_to: i64,
}

/// The rows of a batch that are sent now. All other rows wait for the next batch.
#[derive(Debug, Default)]
pub(super) struct Selection {
    /// The sessions of the rows to send.
    pub(super) send: Vec<Uuid>,
    /// The rows to defer without sending them.
    pub(super) rejected: Vec<RecordRejection>,
}

impl Isolation {
    /// Whether a shard pauses after a failure.
    pub(super) fn is_paused(&self, shard: i32) -> bool {
        let inner = self.inner();
        inner.shards.get(&shard).and_then(|state| state.paused_until).is_some_and(|until| Instant::now() < until)
    }

    /// Selects which rows of a shard's batch are sent now: all rows that are not rejected already, or the part that is left
    /// after halving. Records of one key are never sent out of order: if a row is selected, so are all earlier rows of its
    /// topic and key.
    pub(super) fn select(&self, shard: i32, rows: &[OutboxRow]) -> Selection {
        let now = Instant::now();
        let inner = &mut *self.inner();
        let state = inner.shards.entry(shard).or_default();
        let mut selection = Selection::default();
        let (mut others, mut retried): (Vec<&OutboxRow>, Option<&OutboxRow>) = (Vec::new(), None);
        let to_defer = state.defer_next.take();
        // Later rows of the deferred row's topic and key are not sent before it.
        let order = |row: &OutboxRow| row.key.clone().map(|key| (row.topic.clone(), key));
        let is_deferred = |row: &&OutboxRow| to_defer.as_ref().is_some_and(|(id, _)| *id == row.session_id);
        let blocked_order = rows.iter().find(is_deferred).and_then(order);
        // An operator asked to retry these rows now.
        let redriven: Vec<&str> = rows.iter().filter(|row| row.attempts <= 0).map(|row| row.topic.as_str()).collect();
        for row in rows {
            let reject = |reason: &str| RecordRejection {
                upload_id: row.session_id,
                permanent: true,
                whole_topic: false,
                reason: reason.to_owned(),
            };
            match (inner.topics.get(&row.topic), &to_defer) {
                (_, Some((id, reason))) if *id == row.session_id => selection.rejected.push(reject(reason)),
                _ if blocked_order.is_some() && order(row) == blocked_order => {}
                (Some(topic), _) if now < topic.retry_at && !redriven.contains(&row.topic.as_str()) => {
                    selection.rejected.push(reject(&topic.reason))
                }
                (Some(_), _) => retried = retried.or(Some(row)),
                (None, _) => others.push(row),
            }
        }
        // At most every second batch is a retry, so many rejected topics leave half of the time to the others.
        state.retried_topic = retried.is_some() && (others.is_empty() || !state.retried_topic);
        let selected = if state.retried_topic { retried.into_iter().collect() } else { halved(others, state.halvings) };
        selection.send = selected.into_iter().map(|row| row.session_id).collect();
        selection
    }

    /// Whether the batch was one record of a topic that Kafka rejected before.
    pub(super) fn is_retry(&self, sent: &[Uuid], rows: &[OutboxRow]) -> bool {
        let [id] = sent else { return false };
        let row = rows.iter().find(|row| row.session_id == *id);
        row.is_some_and(|row| self.inner().topics.contains_key(&row.topic))
    }

    /// Drops the state of a shard, because none of its rows is due.
    pub(super) fn clear_shard(&self, shard: i32) {
        self.inner().shards.remove(&shard);
    }

    /// Records that records of these topics were published.
    pub(super) fn record_published<'a>(&self, shard: i32, topics: impl Iterator<Item = &'a str>) {
        let mut inner = self.inner();
        if !inner.topics.is_empty() {
            for topic in topics {
                inner.topics.remove(topic);
            }
        }
        let state = inner.shards.entry(shard).or_default();
        state.halvings = state.halvings.saturating_sub(1);
        state.reset_failures();
    }

    /// Records that Kafka rejects every record of a topic.
    pub(super) fn record_rejected_topic(&self, topic: &str, reason: &str) {
        let topics = &mut self.inner().topics;
        if topics.len() >= MAX_REJECTED_TOPICS && !topics.contains_key(topic) {
            let now = Instant::now();
            topics.retain(|_, rejected| now < rejected.retry_at);
        }
        if topics.len() < MAX_REJECTED_TOPICS || topics.contains_key(topic) {
            let rejections = topics.get(topic).map_or(0, |rejected| rejected.rejections) + 1;
            let wait_seconds = (1u64 << (rejections - 1).min(6)).min(MAX_RETRY_SECONDS);
            let retry_at = Instant::now() + Duration::from_secs(wait_seconds);
            topics.insert(topic.to_owned(), RejectedTopic { reason: reason.to_owned(), retry_at, rejections });
        }
    }

    /// Records that Kafka rejected some of the `sent` rows of a batch. `deferred` of them are certainly at fault, and
    /// `published` were published.
    pub(super) fn record_rejected(&self, shard: i32, sent: usize, deferred: usize, published: usize) {
        let mut inner = self.inner();
        let state = inner.shards.entry(shard).or_default();
        if deferred > 0 {
            state.halvings = state.halvings.saturating_sub(1);
        } else if sent > 1 {
            state.halvings += 1;
        }
        if deferred + published > 0 {
            state.reset_failures();
        }
    }

    /// Records that a batch failed and that no record is known to be at fault. With `is_reachable`, Kafka answers, so a
    /// record of the batch may be the cause. Returns whether to defer the batch's only record.
    pub(super) fn record_failure(&self, shard: i32, sent: &[Uuid], is_reachable: bool, reason: &str) -> bool {
        self.record_stall(shard, reason);
        let mut inner = self.inner();
        let state = inner.shards.entry(shard).or_default();
        state.failures += 1;
        let pause = MIN_PAUSE.saturating_mul(1 << state.failures.min(5)).min(MAX_PAUSE);
        state.paused_until = Some(Instant::now() + pause);
        state.failures_while_reachable = if is_reachable { state.failures_while_reachable + 1 } else { 0 };
        if state.failures_while_reachable < FAILURES_BEFORE_HALVING {
            return false;
        }
        state.failures_while_reachable = 0;
        match sent {
            [_] => true,
            _ => {
                state.halvings += 1;
                false
            }
        }
    }

    /// Lets the next batch defer this row. This batch cannot, because whether it published the row is not known yet.
    pub(super) fn defer_in_next_batch(&self, shard: i32, id: Uuid, reason: &str) {
        self.inner().shards.entry(shard).or_default().defer_next = Some((id, reason.to_owned()));
    }

    /// Records why a shard publishes nothing.
    pub(super) fn record_stall(&self, shard: i32, reason: &str) {
        let mut inner = self.inner();
        let stall = &mut inner.shards.entry(shard).or_default().stall;
        let stall = stall.get_or_insert_with(|| Stall {
            since: Instant::now(),
            reason: String::new(),
            reported_at: None,
            reported_up_to: 0,
        });
        reason.clone_into(&mut stall.reason);
    }

    /// If it is time to report why a shard has published nothing for a while: the reason, and the outbox row number after
    /// which to report it.
    pub(super) fn stall_to_report(&self, shard: i32) -> Option<(String, i64)> {
        let mut inner = self.inner();
        let stall = inner.shards.get_mut(&shard)?.stall.as_mut()?;
        if stall.since.elapsed() < STALLED_AFTER || stall.reported_at.is_some_and(|at| at.elapsed() < REPORT_INTERVAL) {
            return None;
        }
        stall.reported_at = Some(Instant::now());
        Some((stall.reason.clone(), stall.reported_up_to))
    }

    /// Records up to which outbox row number the reason is written to a shard's uploads.
    pub(super) fn set_reported_up_to(&self, shard: i32, number: i64) {
        if let Some(stall) = self.inner().shards.get_mut(&shard).and_then(|state| state.stall.as_mut()) {
            stall.reported_up_to = number;
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // Each statement leaves the value complete, so it is still valid after a panic elsewhere.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ShardState {
    fn reset_failures(&mut self) {
        self.failures = 0;
        self.failures_while_reachable = 0;
        self.paused_until = None;
        self.stall = None;
    }
}

/// Keeps the rows of the first half of the topics, `halvings` times. If one topic is left, keeps the first half of the rows.
fn halved(mut rows: Vec<&OutboxRow>, halvings: u32) -> Vec<&OutboxRow> {
    for _ in 0..halvings {
        let mut topics: Vec<&str> = Vec::new();
        for row in &rows {
            if !topics.contains(&row.topic.as_str()) {
                topics.push(&row.topic);
            }
        }
        match (topics.len(), rows.len()) {
            (0 | 1, 0 | 1) => break,
            (0 | 1, count) => rows.truncate(count.div_ceil(2)),
            (count, _) => {
                topics.truncate(count.div_ceil(2));
                let kept: Vec<String> = topics.into_iter().map(str::to_owned).collect();
                rows.retain(|row| kept.contains(&row.topic));
            }
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(topics: &[(&str, usize)]) -> Vec<OutboxRow> {
        let row = |topic: &str| OutboxRow {
            session_id: Uuid::now_v7(),
            topic: topic.to_owned(),
            partition: None,
            key: None,
            value: String::new(),
            headers: Vec::new(),
            attempts: 1,
            batch: None,
        };
        topics.iter().flat_map(|(topic, count)| (0..*count).map(|_| row(topic))).collect()
    }

    /// Publishes rows as the relay does, until only deferred rows are left. `is_rejected` stands for Kafka. Returns how
    /// many transactions failed, and the deferred rows.
    fn publish(mut rows: Vec<OutboxRow>, is_rejected: impl Fn(&OutboxRow) -> bool) -> (usize, Vec<Uuid>) {
        let (isolation, mut failed, mut deferred) = (Isolation::default(), 0, Vec::new());
        while !rows.is_empty() {
            let selection = isolation.select(0, &rows);
            let sent: Vec<&OutboxRow> = rows.iter().filter(|row| selection.send.contains(&row.session_id)).collect();
            assert!(!sent.is_empty());
            let mut done = selection.send.clone();
            if !sent.iter().any(|row| is_rejected(row)) {
                isolation.record_published(0, sent.iter().map(|row| row.topic.as_str()));
            } else {
                failed += 1;
                done.truncate(usize::from(sent.len() == 1));
                isolation.record_rejected(0, sent.len(), done.len(), 0);
                deferred.extend(&done);
            }
            rows.retain(|row| !done.contains(&row.session_id));
        }
        (failed, deferred)
    }

    #[test]
    fn one_rejected_record_among_500_is_found_in_at_most_20_failed_transactions() {
        for at in [0, 1, 250, 499] {
            let rows = rows(&[("a", 500)]);
            let bad = rows[at].session_id;
            let (failed, deferred) = publish(rows, |row| row.session_id == bad);
            assert_eq!(deferred, [bad]);
            assert!(failed <= 20, "{failed} transactions failed");
        }
    }

    #[test]
    fn a_batch_is_halved_by_topic_first() {
        let rows = rows(&[("a", 100), ("b", 100), ("c", 100)]);
        let topics = |halvings| {
            let mut topics: Vec<&str> = halved(rows.iter().collect(), halvings).iter().map(|row| row.topic.as_str()).collect();
            topics.dedup();
            topics
        };
        assert_eq!((topics(1), topics(2)), (vec!["a", "b"], vec!["a"]));
        assert_eq!(halved(rows.iter().collect(), 3).len(), 50);
        assert_eq!(halved(rows.iter().collect(), 99).len(), 1);
    }

    #[test]
    fn a_rejected_topic_is_deferred_until_its_retry_which_sends_one_record_alone() {
        let isolation = Isolation::default();
        isolation.record_rejected_topic("a", "TopicAuthorizationFailed");
        let rows = rows(&[("a", 3), ("b", 2)]);
        let selection = isolation.select(0, &rows);
        assert_eq!(selection.send, [rows[3].session_id, rows[4].session_id]);
        let rejected: Vec<Uuid> = selection.rejected.iter().map(|rejection| rejection.upload_id).collect();
        assert_eq!(rejected, [rows[0].session_id, rows[1].session_id, rows[2].session_id]);
        isolation.inner().topics.get_mut("a").unwrap().retry_at = Instant::now();
        let (first, second) = (isolation.select(0, &rows), isolation.select(0, &rows));
        assert_eq!((first.send, first.rejected.len()), (vec![rows[0].session_id], 0));
        assert_eq!(second.send, [rows[3].session_id, rows[4].session_id], "the other topics get every second batch");
        isolation.record_published(0, ["a"].into_iter());
        assert_eq!(isolation.select(0, &rows).send.len(), 5);
    }

    #[test]
    fn a_record_that_fails_alone_twice_without_a_known_cause_is_deferred() {
        let isolation = Isolation::default();
        let rows = rows(&[("a", 1)]);
        assert!(!isolation.record_failure(0, &[rows[0].session_id], true, "why"));
        assert!(isolation.is_paused(0));
        assert!(!isolation.record_failure(1, &[rows[0].session_id], false, "kafka is unreachable"));
        assert!(isolation.record_failure(0, &[rows[0].session_id], true, "why"));
        assert!(
            !isolation.record_failure(1, &[rows[0].session_id], false, "kafka is unreachable"),
            "no record is deferred while Kafka is unreachable"
        );
    }

    #[test]
    fn later_records_of_a_deferred_records_key_are_not_sent_before_it() {
        let isolation = Isolation::default();
        let mut rows = rows(&[("a", 4)]);
        rows[0].key = Some(b"k".to_vec());
        rows[1].key = Some(b"k".to_vec());
        rows[2].key = Some(b"other".to_vec());
        isolation.defer_in_next_batch(0, rows[0].session_id, "why");
        let selection = isolation.select(0, &rows);
        assert_eq!(selection.rejected.iter().map(|rejection| rejection.upload_id).collect::<Vec<_>>(), [rows[0].session_id]);
        assert_eq!(selection.send, [rows[2].session_id, rows[3].session_id]);
    }

    #[test]
    fn a_batch_with_one_record_of_a_rejected_topic_counts_as_its_retry() {
        let isolation = Isolation::default();
        let rows = rows(&[("a", 1), ("b", 1)]);
        isolation.record_rejected_topic("a", "why");
        assert!(isolation.is_retry(&[rows[0].session_id], &rows));
        assert!(!isolation.is_retry(&[rows[1].session_id], &rows));
        assert!(!isolation.is_retry(&[rows[0].session_id, rows[1].session_id], &rows));
        assert!(!isolation.is_retry(&[], &rows));
    }
}
