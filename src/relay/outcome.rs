//! Takes over a shard, and writes the outcome of its batches to the database.

use std::collections::{BTreeMap, HashMap};
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use time::OffsetDateTime;
use tracing::{info, warn};
use uuid::Uuid;

use super::{Error, FencedShard, MAX_BATCH_RECORDS, ShardPublisher};
use crate::failpoint;
use crate::kafka::{self, Delivery, PublishError, RecordRejection};
use crate::session::RecordMetadata;
use crate::store::{self, Deferred, OutboxRow, ShardLease, Unrecorded};

/// A rejected record is sent again after 1, 2, 4, ... seconds, and at most this many.
const MAX_DEFER_SECONDS: i64 = 60;
/// The same reason for the same topic or shard is logged again after this time.
const LOG_EVERY: Duration = Duration::from_secs(60);

impl ShardPublisher {
    /// Fences the shard's previous owner and applies the outcome of the rows that it had claimed. Returns how many of these
    /// rows were published.
    pub(super) async fn take_over(&self, lease: ShardLease) -> Result<(FencedShard, usize), Error> {
        let takeover_started_at = Instant::now();
        let transactional_id = kafka::transactional_id(self.deployment.id, lease.shard);
        let producer = self.kafka.open_producer(&transactional_id, lease.shard).await?;
        failpoint::reach("relay.fenced").await.map_err(store::Error::from)?;
        let marker = producer.last_marker().await?;
        // A batch is claimed and committed before any of its records is sent, so Kafka cannot know a later batch.
        let last_batch = self.store.last_batch(lease.shard).await?;
        if let Some(marker) = marker.as_ref().map(|marker| marker.batch).filter(|batch| *batch > last_batch) {
            return Err(Error::KafkaAhead { shard: lease.shard, marker, last_batch });
        }
        // Everything that the marker lists counts, claimed or not. After a restore, a relay that kept running may have
        // claimed a different batch under the same number.
        let claimed = self.store.claimed(lease.shard).await?;
        let mut listed: Vec<RecordMetadata> = match &marker {
            Some(marker) => marker.published.clone(),
            // No batch was ever committed, or the marker was deleted: the topics themselves must be read.
            None if !claimed.is_empty() && self.kafka.delivery() == Delivery::ExactlyOnce => {
                self.find_published(&claimed).await?
            }
            None => Vec::new(),
        };
        let ids: Vec<Uuid> = listed.iter().map(|record| record.upload_id).collect();
        let Unrecorded { verified, unfinished } = self.store.unrecorded(&ids).await?;
        if unfinished > 0 {
            let batch = marker.map_or(0, |marker| marker.batch);
            return Err(Error::UnfinishedInDatabase { shard: lease.shard, batch, unfinished });
        }
        self.add_offsets(lease.shard, &mut listed, &verified).await?;
        if !listed.is_empty() {
            self.store.mark_published(&listed, self.store.now().await?).await?;
            listed.iter().for_each(|record| self.notifier.notify(record.upload_id));
        }
        let published = listed.iter().filter(|record| claimed.iter().any(|row| row.session_id == record.upload_id)).count();
        if !claimed.is_empty() {
            failpoint::reach("relay.recovered").await.map_err(store::Error::from)?;
            let mut batches: Vec<i64> = claimed.iter().filter_map(|row| row.batch).collect();
            batches.sort_unstable();
            batches.dedup();
            self.release_batch(lease, &batches, &listed).await?;
            info!(
                shard = lease.shard,
                claimed = claimed.len(),
                published,
                "took over shard {}: {published} of {} claimed pointers were published, the others are sent again",
                lease.shard,
                claimed.len()
            );
        }
        Ok((FencedShard { epoch: lease.epoch, producer, takeover_started_at, last_batch }, published))
    }

    /// Writes the outcome of a batch to the database. `sent` are the rows that were sent, or selected to be sent.
    pub(super) async fn apply_outcome(
        &self,
        lease: ShardLease,
        slot: &mut Option<FencedShard>,
        (batch, sent): (i64, &[Uuid]),
        mut rows: Vec<OutboxRow>,
        result: Result<Vec<RecordMetadata>, PublishError>,
    ) -> Result<usize, Error> {
        let Some(fenced) = slot.as_mut() else { return Ok(0) };
        let shard = lease.shard;
        // The rows that `assign_partitions` rejected are deferred already.
        let sent: Vec<Uuid> = sent.iter().copied().filter(|id| rows.iter().any(|row| row.session_id == *id)).collect();
        let mut needs_takeover = false;
        let (marked, published) = match result {
            Ok(delivered) => {
                let now = self.store.now().await?;
                let marked = self.mark_published(lease, batch, &delivered, now).await?;
                self.isolation.record_published(shard, topics_of(&rows, &delivered));
                // The other rows were not sent: an earlier record of their key has no partition, or the batch was halved.
                if marked < rows.len() {
                    self.release_batch(lease, &[batch], &delivered).await?;
                    self.notifier.relay.notify_one();
                }
                return Ok(marked);
            }
            Err(PublishError::Rejected { rejected, delivered }) => {
                let now = self.store.now().await?;
                let marked = self.mark_published(lease, batch, &delivered, now).await?;
                let deferred = self.rows_to_defer(&rejected, &sent, &rows);
                self.defer(lease, batch, &deferred, &mut rows).await?;
                self.isolation.record_rejected(shard, sent.len(), deferred.len(), marked);
                self.notifier.relay.notify_one();
                (marked, delivered)
            }
            Err(PublishError::Retry(why)) => {
                // If Kafka answers, the cause is in the batch, for example a partition without a leader.
                let is_reachable = self.kafka.reachable().await.is_ok();
                self.log_failure(shard, &why);
                // A failed retry of a rejected topic defers the topic again, as a rejection does.
                let is_retry = is_reachable && self.isolation.is_retry(&sent, &rows);
                if self.isolation.record_failure(shard, &sent, is_reachable, &why) || is_retry {
                    let rejection = RecordRejection { upload_id: sent[0], permanent: true, whole_topic: is_retry, reason: why };
                    let deferred = self.rows_to_defer(&[rejection], &sent, &rows);
                    self.defer(lease, batch, &deferred, &mut rows).await?;
                    self.isolation.record_rejected(shard, sent.len(), deferred.len(), 0);
                }
                self.release_batch(lease, &[batch], &[]).await?;
                // The cause may also be the producer: after an outage of Kafka, librdkafka may know no broker any more.
                if is_reachable {
                    *fenced = self.take_over(lease).await?.0;
                }
                return Ok(0);
            }
            Err(PublishError::MarkerNotWritten(why)) => {
                self.log_failure(shard, &why);
                self.isolation.record_failure(shard, &sent, false, &why);
                self.recheck_marker_topic.store(true, Ordering::Release);
                // As above, the cause may be the producer.
                needs_takeover = self.kafka.reachable().await.is_ok();
                (0, Vec::new())
            }
            // The rows stay claimed: the next owner reads the marker first.
            Err(error @ PublishError::Fenced(_)) => {
                warn!(shard, %error, "shard {shard} was taken over by another relay, which publishes it from now on: {error}");
                return Err(Error::ShardLost);
            }
            // The rows stay claimed here too. The next owner may be this relay again.
            Err(PublishError::OutcomeUnknown(why)) => {
                self.log_failure(shard, &why);
                if self.isolation.record_failure(shard, &sent, true, &why) {
                    self.isolation.defer_in_next_batch(shard, sent[0], &why);
                }
                *slot = None;
                return Ok(0);
            }
        };
        self.release_batch(lease, &[batch], &published).await?;
        if needs_takeover || fenced.producer.needs_replacement() {
            *fenced = self.take_over(lease).await?.0;
        }
        Ok(marked)
    }

    /// Defers the rejected rows of a batch, each with the later rows of its topic and key, and removes the rejected rows
    /// from `rows`.
    pub(super) async fn defer(
        &self,
        lease: ShardLease,
        batch: i64,
        rejected: &[RecordRejection],
        rows: &mut Vec<OutboxRow>,
    ) -> Result<(), Error> {
        if rejected.is_empty() {
            return Ok(());
        }
        let is_full = i64::try_from(rows.len()).is_ok_and(|rows| rows >= MAX_BATCH_RECORDS);
        let now = self.store.now().await?;
        let reasons: HashMap<Uuid, &str> =
            rejected.iter().map(|rejection| (rejection.upload_id, rejection.reason.as_str())).collect();
        let mut deferred = Vec::with_capacity(rejected.len());
        let mut counts: BTreeMap<(&str, &str), usize> = BTreeMap::new();
        for row in rows.iter() {
            let Some(reason) = reasons.get(&row.session_id) else { continue };
            let wait = time::Duration::seconds((1i64 << (row.attempts.clamp(1, 7) - 1)).min(MAX_DEFER_SECONDS));
            deferred.push(Deferred { session_id: row.session_id, error: (*reason).to_owned(), next_try_at: now + wait });
            *counts.entry((&row.topic, reason)).or_default() += 1;
        }
        self.store.defer(lease, batch, &deferred, now).await?;
        for ((topic, reason), count) in counts {
            if self.should_log(topic, reason) {
                warn!(
                    topic,
                    reason,
                    count,
                    "Kafka rejected {count} pointers for topic {topic}: {reason}; retrying each within {MAX_DEFER_SECONDS} s"
                );
            }
        }
        rows.retain(|row| !reasons.contains_key(&row.session_id));
        reasons.into_keys().for_each(|id| self.notifier.notify(id));
        // The batch was full, so more rows may be due, and the next batch now has room for them.
        if is_full {
            self.notifier.relay.notify_one();
        }
        Ok(())
    }

    /// Whether to log this failure now: the first time for a topic and reason, and again after [`LOG_EVERY`].
    pub(super) fn should_log(&self, topic: &str, reason: &str) -> bool {
        // Each statement leaves the map complete, so it is still valid after a panic elsewhere.
        let mut logged = self.log_throttle.lock().unwrap_or_else(PoisonError::into_inner);
        logged.retain(|_, at| at.elapsed() < LOG_EVERY);
        let key = (topic.to_owned(), reason.to_owned());
        let should_log = !logged.contains_key(&key);
        if should_log {
            logged.insert(key, Instant::now());
        }
        should_log
    }

    pub(super) async fn release_batch(
        &self,
        lease: ShardLease,
        batches: &[i64],
        published: &[RecordMetadata],
    ) -> Result<(), Error> {
        if self.store.release_batch(lease, batches, published).await? { Ok(()) } else { Err(Error::ShardLost) }
    }

    /// Marks the sessions published whose records Kafka holds. If the database no longer knows some of the sessions, this fails and the
    /// batch's other rows stay claimed: the next owner of the shard applies the marker.
    pub(super) async fn mark_published(
        &self,
        lease: ShardLease,
        batch: i64,
        published: &[RecordMetadata],
        now: OffsetDateTime,
    ) -> Result<usize, Error> {
        if published.is_empty() {
            return Ok(0);
        }
        let mut written = self.store.mark_published(published, now).await?;
        // Another writer may have published a session between this statement's snapshot and its row lock.
        if written < published.len() {
            written = self.store.mark_published(published, now).await?;
        }
        published.iter().for_each(|record| self.notifier.notify(record.upload_id));
        if written < published.len() {
            return Err(Error::PublishedNotRecorded { shard: lease.shard, batch, published: published.len(), written });
        }
        Ok(written)
    }
}

/// The topics of the delivered rows.
fn topics_of<'a>(rows: &'a [OutboxRow], delivered: &'a [RecordMetadata]) -> impl Iterator<Item = &'a str> {
    let ids: std::collections::HashSet<Uuid> = delivered.iter().map(|delivered| delivered.upload_id).collect();
    rows.iter().filter(move |row| ids.contains(&row.session_id)).map(|row| row.topic.as_str())
}
