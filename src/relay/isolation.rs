//! Finds what Kafka refuses in a batch and keeps it apart, so that the rest of the shard goes on.
//!
//! A transaction fails as a whole, and Kafka often does not say for which record. A batch that fails is therefore halved
//! until one topic, and then one record, is left: about `log2(batch)` transactions for each culprit. A topic that Kafka
//! refuses is remembered: its records are parked without being sent, and one of them alone is tried again later.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::kafka::Refusal;
use crate::store::Waiting;

/// A refused topic is tried again after 1, 2, 4, ... seconds, and at most this many.
const LONGEST_RETRY_SECONDS: u64 = 60;
/// Refused topics that are remembered. Of any other topic each record is found out by itself.
const MOST_TOPICS: usize = 10_000;
/// So many batches of a shard may fail without a cause in them before they are halved.
const FAILURES_BEFORE_HALVING: u32 = 2;
/// The pause after a batch that failed without a known cause doubles from the first of these to the second.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_millis(1600);
/// A shard that publishes nothing for so long says why on the uploads that wait for it.
const STALLED_AFTER: Duration = Duration::from_secs(3);
/// How often it says so of further uploads.
const TELL_EVERY: Duration = Duration::from_secs(1);

/// What is known about refused topics, and how each shard's batches are narrowed.
#[derive(Default)]
pub(super) struct Isolation(Mutex<Inner>);

#[derive(Default)]
struct Inner {
    topics: HashMap<String, RefusedTopic>,
    shards: HashMap<i32, Narrowing>,
}

/// A topic for which Kafka refuses every record.
struct RefusedTopic {
    reason: String,
    retry_at: Instant,
    /// How often Kafka refused it in a row.
    refusals: u32,
}

/// How a shard's batches are narrowed.
#[derive(Default)]
struct Narrowing {
    /// How often the next batch is halved before it is sent.
    halvings: u32,
    /// Batches in a row that failed without a known cause.
    failures: u32,
    /// Those of them that failed while Kafka answered, since the batches were last narrowed.
    blamed: u32,
    paused_until: Option<Instant>,
    /// The last batch was the retry of a refused topic: the next one is for the others.
    retried_topic: bool,
    /// A record that failed alone, and why: it is parked instead of being sent again at once.
    condemned: Option<(Uuid, String)>,
    stall: Option<Stall>,
}

/// A shard that publishes nothing.
struct Stall {
    since: Instant,
    reason: String,
    told_at: Option<Instant>,
    /// The number of the outbox row up to which uploads say so.
    told_to: i64,
}

/// What of a batch is sent now; the other rows wait for the next batch.
#[derive(Debug, Default)]
pub(super) struct Selection {
    /// The sessions of the rows to send.
    pub(super) send: Vec<Uuid>,
    /// Rows to park without sending them.
    pub(super) refused: Vec<Refusal>,
}

impl Isolation {
    /// Whether a shard rests after a failure.
    pub(super) fn is_paused(&self, shard: i32) -> bool {
        let inner = self.inner();
        inner.shards.get(&shard).and_then(|narrowing| narrowing.paused_until).is_some_and(|until| Instant::now() < until)
    }

    /// Chooses which rows of a shard's batch are sent now: all that are not refused already, or the part that halving
    /// leaves. Records of one key are never sent out of order: a selection that has a row has all earlier ones of its
    /// topic and key.
    pub(super) fn select(&self, shard: i32, rows: &[Waiting]) -> Selection {
        let now = Instant::now();
        let inner = &mut *self.inner();
        let narrowing = inner.shards.entry(shard).or_default();
        let mut selection = Selection::default();
        let (mut others, mut retried): (Vec<&Waiting>, Option<&Waiting>) = (Vec::new(), None);
        let condemned = narrowing.condemned.take();
        // What comes after a condemned record in its topic and key is not sent before it.
        let order = |row: &Waiting| row.key.clone().map(|key| (row.topic.clone(), key));
        let of_condemned = |row: &&Waiting| condemned.as_ref().is_some_and(|(id, _)| *id == row.session_id);
        let behind = rows.iter().find(of_condemned).and_then(order);
        // An operator wants it tried now.
        let redriven: Vec<&str> = rows.iter().filter(|row| row.attempts <= 0).map(|row| row.topic.as_str()).collect();
        for row in rows {
            let refuse = |reason: &str| Refusal {
                upload_id: row.session_id,
                permanent: true,
                whole_topic: false,
                reason: reason.to_owned(),
            };
            match (inner.topics.get(&row.topic), &condemned) {
                (_, Some((id, reason))) if *id == row.session_id => selection.refused.push(refuse(reason)),
                _ if behind.is_some() && order(row) == behind => {}
                (Some(topic), _) if now < topic.retry_at && !redriven.contains(&row.topic.as_str()) => {
                    selection.refused.push(refuse(&topic.reason))
                }
                (Some(_), _) => retried = retried.or(Some(row)),
                (None, _) => others.push(row),
            }
        }
        // Every second batch at most is a retry, so that many refused topics leave the others half of the time.
        narrowing.retried_topic = retried.is_some() && (others.is_empty() || !narrowing.retried_topic);
        let chosen = if narrowing.retried_topic { retried.into_iter().collect() } else { halved(others, narrowing.halvings) };
        selection.send = chosen.into_iter().map(|row| row.session_id).collect();
        selection
    }

    /// Whether what was sent is one record of a topic that Kafka refused before.
    pub(super) fn is_retry(&self, sent: &[Uuid], rows: &[Waiting]) -> bool {
        let [id] = sent else { return false };
        let row = rows.iter().find(|row| row.session_id == *id);
        row.is_some_and(|row| self.inner().topics.contains_key(&row.topic))
    }

    /// Nothing of a shard is due.
    pub(super) fn idle(&self, shard: i32) {
        self.inner().shards.remove(&shard);
    }

    /// Records of these topics were published.
    pub(super) fn published<'a>(&self, shard: i32, topics: impl Iterator<Item = &'a str>) {
        let mut inner = self.inner();
        if !inner.topics.is_empty() {
            for topic in topics {
                inner.topics.remove(topic);
            }
        }
        let narrowing = inner.shards.entry(shard).or_default();
        narrowing.halvings = narrowing.halvings.saturating_sub(1);
        narrowing.went_on();
    }

    /// Kafka refuses every record of a topic.
    pub(super) fn refused_topic(&self, topic: &str, reason: &str) {
        let topics = &mut self.inner().topics;
        if topics.len() >= MOST_TOPICS && !topics.contains_key(topic) {
            let now = Instant::now();
            topics.retain(|_, refused| now < refused.retry_at);
        }
        if topics.len() < MOST_TOPICS || topics.contains_key(topic) {
            let refusals = topics.get(topic).map_or(0, |refused| refused.refusals) + 1;
            let wait = (1u64 << (refusals - 1).min(6)).min(LONGEST_RETRY_SECONDS);
            let retry_at = Instant::now() + Duration::from_secs(wait);
            topics.insert(topic.to_owned(), RefusedTopic { reason: reason.to_owned(), retry_at, refusals });
        }
    }

    /// Kafka refused some of a batch of `sent` rows, of which `parked` are known to be at fault and `published` arrived.
    pub(super) fn refused(&self, shard: i32, sent: usize, parked: usize, published: usize) {
        let mut inner = self.inner();
        let narrowing = inner.shards.entry(shard).or_default();
        if parked > 0 {
            narrowing.halvings = narrowing.halvings.saturating_sub(1);
        } else if sent > 1 {
            narrowing.halvings += 1;
        }
        if parked + published > 0 {
            narrowing.went_on();
        }
    }

    /// A batch failed, and nothing says which record is at fault; `attributable` when Kafka answers, so that it may be one
    /// of them. Says whether the only record of the batch is to be parked for it.
    pub(super) fn failed(&self, shard: i32, sent: &[Uuid], attributable: bool, reason: &str) -> bool {
        self.stalled_by(shard, reason);
        let mut inner = self.inner();
        let narrowing = inner.shards.entry(shard).or_default();
        narrowing.failures += 1;
        let pause = FIRST_PAUSE.saturating_mul(1 << narrowing.failures.min(5)).min(LONGEST_PAUSE);
        narrowing.paused_until = Some(Instant::now() + pause);
        narrowing.blamed = if attributable { narrowing.blamed + 1 } else { 0 };
        if narrowing.blamed < FAILURES_BEFORE_HALVING {
            return false;
        }
        narrowing.blamed = 0;
        match sent {
            [_] => true,
            _ => {
                narrowing.halvings += 1;
                false
            }
        }
    }

    /// Lets the next batch park this row: whether this one published it is not known yet.
    pub(super) fn condemn(&self, shard: i32, id: Uuid, reason: &str) {
        self.inner().shards.entry(shard).or_default().condemned = Some((id, reason.to_owned()));
    }

    /// Notes why a shard publishes nothing.
    pub(super) fn stalled_by(&self, shard: i32, reason: &str) {
        let mut inner = self.inner();
        let stall = &mut inner.shards.entry(shard).or_default().stall;
        let stall =
            stall.get_or_insert_with(|| Stall { since: Instant::now(), reason: String::new(), told_at: None, told_to: 0 });
        reason.clone_into(&mut stall.reason);
    }

    /// Why a shard has published nothing for a while, now and then, and behind which outbox row that is to be said.
    pub(super) fn stall_to_tell(&self, shard: i32) -> Option<(String, i64)> {
        let mut inner = self.inner();
        let stall = inner.shards.get_mut(&shard)?.stall.as_mut()?;
        if stall.since.elapsed() < STALLED_AFTER || stall.told_at.is_some_and(|at| at.elapsed() < TELL_EVERY) {
            return None;
        }
        stall.told_at = Some(Instant::now());
        Some((stall.reason.clone(), stall.told_to))
    }

    /// Notes up to which outbox row a shard's uploads say why they wait.
    pub(super) fn told_to(&self, shard: i32, number: i64) {
        if let Some(stall) = self.inner().shards.get_mut(&shard).and_then(|narrowing| narrowing.stall.as_mut()) {
            stall.told_to = number;
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // It is whole after every statement, so a panic elsewhere does not spoil it.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Narrowing {
    fn went_on(&mut self) {
        self.failures = 0;
        self.blamed = 0;
        self.paused_until = None;
        self.stall = None;
    }
}

/// Keeps the rows of the first half of the topics, or of a single topic the first half of the rows, `halvings` times.
fn halved(mut rows: Vec<&Waiting>, halvings: u32) -> Vec<&Waiting> {
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

    fn rows(topics: &[(&str, usize)]) -> Vec<Waiting> {
        let row = |topic: &str| Waiting {
            number: 0,
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

    /// Publishes rows until none is left that is not parked, as the relay does. `refuses` is Kafka. Says how many
    /// transactions failed.
    fn publish(mut rows: Vec<Waiting>, refuses: impl Fn(&Waiting) -> bool) -> (usize, Vec<Uuid>) {
        let (isolation, mut failed, mut parked) = (Isolation::default(), 0, Vec::new());
        while !rows.is_empty() {
            let selection = isolation.select(0, &rows);
            let sent: Vec<&Waiting> = rows.iter().filter(|row| selection.send.contains(&row.session_id)).collect();
            assert!(!sent.is_empty());
            let mut gone = selection.send.clone();
            if !sent.iter().any(|row| refuses(row)) {
                isolation.published(0, sent.iter().map(|row| row.topic.as_str()));
            } else {
                failed += 1;
                gone.truncate(usize::from(sent.len() == 1));
                isolation.refused(0, sent.len(), gone.len(), 0);
                parked.extend(&gone);
            }
            rows.retain(|row| !gone.contains(&row.session_id));
        }
        (failed, parked)
    }

    #[test]
    fn one_record_that_kafka_refuses_among_500_is_found_in_few_transactions() {
        for at in [0, 1, 250, 499] {
            let rows = rows(&[("a", 500)]);
            let culprit = rows[at].session_id;
            let (failed, parked) = publish(rows, |row| row.session_id == culprit);
            assert_eq!(parked, [culprit]);
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
    fn a_refused_topic_is_not_sent_with_others_until_its_retry_and_then_one_record_alone() {
        let isolation = Isolation::default();
        isolation.refused_topic("a", "TopicAuthorizationFailed");
        let rows = rows(&[("a", 3), ("b", 2)]);
        let selection = isolation.select(0, &rows);
        assert_eq!(selection.send, [rows[3].session_id, rows[4].session_id]);
        let refused: Vec<Uuid> = selection.refused.iter().map(|refusal| refusal.upload_id).collect();
        assert_eq!(refused, [rows[0].session_id, rows[1].session_id, rows[2].session_id]);
        isolation.inner().topics.get_mut("a").unwrap().retry_at = Instant::now();
        let (first, second) = (isolation.select(0, &rows), isolation.select(0, &rows));
        assert_eq!((first.send, first.refused.len()), (vec![rows[0].session_id], 0));
        assert_eq!(second.send, [rows[3].session_id, rows[4].session_id], "the others have every second batch");
        isolation.published(0, ["a"].into_iter());
        assert_eq!(isolation.select(0, &rows).send.len(), 5);
    }

    #[test]
    fn a_record_that_fails_alone_without_a_cause_is_blamed_for_it_in_the_end() {
        let isolation = Isolation::default();
        let rows = rows(&[("a", 1)]);
        assert!(!isolation.failed(0, &[rows[0].session_id], true, "why"));
        assert!(isolation.is_paused(0));
        assert!(!isolation.failed(1, &[rows[0].session_id], false, "kafka is away"));
        assert!(isolation.failed(0, &[rows[0].session_id], true, "why"));
        assert!(!isolation.failed(1, &[rows[0].session_id], false, "kafka is away"), "a Kafka that is away blames nobody");
    }

    #[test]
    fn what_comes_after_a_condemned_record_of_its_key_is_not_sent_before_it() {
        let isolation = Isolation::default();
        let mut rows = rows(&[("a", 4)]);
        rows[0].key = Some(b"k".to_vec());
        rows[1].key = Some(b"k".to_vec());
        rows[2].key = Some(b"other".to_vec());
        isolation.condemn(0, rows[0].session_id, "why");
        let selection = isolation.select(0, &rows);
        assert_eq!(selection.refused.iter().map(|refusal| refusal.upload_id).collect::<Vec<_>>(), [rows[0].session_id]);
        assert_eq!(selection.send, [rows[2].session_id, rows[3].session_id]);
    }

    #[test]
    fn a_refused_topics_retry_is_known_for_one() {
        let isolation = Isolation::default();
        let rows = rows(&[("a", 1), ("b", 1)]);
        isolation.refused_topic("a", "why");
        assert!(isolation.is_retry(&[rows[0].session_id], &rows));
        assert!(!isolation.is_retry(&[rows[1].session_id], &rows));
        assert!(!isolation.is_retry(&[rows[0].session_id, rows[1].session_id], &rows));
        assert!(!isolation.is_retry(&[], &rows));
    }
}
