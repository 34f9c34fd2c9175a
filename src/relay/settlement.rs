//! Takes a shard, and writes down how its batches ended.

use std::collections::{BTreeMap, HashMap};
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use time::OffsetDateTime;
use tracing::{info, warn};
use uuid::Uuid;

use super::{BATCH, Carrier, Error, Held};
use crate::failpoint;
use crate::kafka::{self, Delivered, Delivery, PublishError, Refusal};
use crate::store::{self, Ownership, Parked, Placed, Waiting};

/// A refused record is tried again after 1, 2, 4, ... seconds, and at most this many.
const LONGEST_PARK_SECONDS: i64 = 60;
/// As long as a topic's records are refused for the same reason, it is told again no sooner.
const TOLD_AGAIN: Duration = Duration::from_secs(60);

impl Carrier {
    /// Fences the shard's last owner, and settles what that one had stamped. Says how much of it was published.
    pub(super) async fn take(&self, owned: Ownership) -> Result<(Held, usize), Error> {
        let taken_at = Instant::now();
        let transactional_id = kafka::transactional_id(self.deployment.id, owned.shard);
        let shard = self.kafka.shard(&transactional_id, owned.shard).await?;
        failpoint::reach("relay.fenced").await.map_err(store::Error::from)?;
        let marker = shard.last_marker().await?;
        // A batch is stamped, and that committed, before anything of it is sent: Kafka cannot know of a later one.
        let last_batch = self.store.last_batch(owned.shard).await?;
        if let Some(marker) = marker.as_ref().map(|marker| marker.batch).filter(|batch| *batch > last_batch) {
            return Err(Error::Ahead { shard: owned.shard, marker, last_batch });
        }
        // All that the marker lists, stamped or not: where the database went back and a relay that lived on has stamped
        // once more, that batch may have the marker's number and be another.
        let stamped = self.store.stamped(owned.shard).await?;
        let listed: Vec<Placed> = match &marker {
            Some(marker) => marker.published.iter().map(placed).collect(),
            // Nothing was ever committed, or the marker that knew is gone: the topics tell.
            None if !stamped.is_empty() && self.kafka.delivery() == Delivery::ExactlyOnce => self.look_up(&stamped).await?,
            None => Vec::new(),
        };
        let unfinished = self.store.unfinished(&listed.iter().map(|placed| placed.session_id).collect::<Vec<_>>()).await?;
        if unfinished > 0 {
            let batch = marker.map_or(0, |marker| marker.batch);
            return Err(Error::Forgotten { shard: owned.shard, batch, unfinished });
        }
        if !listed.is_empty() {
            self.store.published(&listed, self.store.now().await?).await?;
            listed.iter().for_each(|placed| self.wakes.changed(placed.session_id));
        }
        let published = listed.iter().filter(|placed| stamped.iter().any(|row| row.session_id == placed.session_id)).count();
        if !stamped.is_empty() {
            failpoint::reach("relay.settled").await.map_err(store::Error::from)?;
            let mut batches: Vec<i64> = stamped.iter().filter_map(|row| row.batch).collect();
            batches.sort_unstable();
            batches.dedup();
            self.unstamp(owned, &batches, &listed).await?;
            info!(shard = owned.shard, stamped = stamped.len(), published, "settled shard {}", owned.shard);
        }
        Ok((Held { epoch: owned.epoch, shard, taken_at, last_batch }, published))
    }

    /// Writes down how a batch ended of which the rows of `sent` were sent, or were to be.
    pub(super) async fn settle(
        &self,
        owned: Ownership,
        slot: &mut Option<Held>,
        (batch, sent): (i64, &[Uuid]),
        mut rows: Vec<Waiting>,
        outcome: Result<Vec<Delivered>, PublishError>,
    ) -> Result<usize, Error> {
        let Some(held) = slot.as_mut() else { return Ok(0) };
        // Those that `place` refused are parked already.
        let sent: Vec<Uuid> = sent.iter().copied().filter(|id| rows.iter().any(|row| row.session_id == *id)).collect();
        let mut is_doubtful = false;
        let (marked, published) = match outcome {
            Ok(delivered) => {
                let now = self.store.now().await?;
                let placed: Vec<Placed> = delivered.iter().map(placed).collect();
                let marked = self.mark(owned, batch, &placed, now).await?;
                self.isolation.published(owned.shard, topics_of(&rows, &delivered));
                // The others were not sent: an earlier one of their key has no place, or the batch was narrowed.
                if marked < rows.len() {
                    self.unstamp(owned, &[batch], &placed).await?;
                    self.wakes.relay.notify_one();
                }
                return Ok(marked);
            }
            Err(PublishError::Refused { refused, delivered }) => {
                let now = self.store.now().await?;
                let placed: Vec<Placed> = delivered.iter().map(placed).collect();
                let marked = self.mark(owned, batch, &placed, now).await?;
                let parked = self.blamed(&refused, &sent, &rows);
                self.park(owned, batch, &parked, &mut rows).await?;
                self.isolation.refused(owned.shard, sent.len(), parked.len(), marked);
                self.wakes.relay.notify_one();
                (marked, placed)
            }
            Err(PublishError::Retry(why)) => {
                // Where Kafka answers, it is something in the batch: a partition without a leader, for one.
                let answers = self.kafka.reachable().await.is_ok();
                self.tell_failure(owned.shard, &why);
                // The retry of a refused topic puts its topic off again, as a refusal does.
                let is_retry = answers && self.isolation.is_retry(&sent, &rows);
                if self.isolation.failed(owned.shard, &sent, answers, &why) || is_retry {
                    let refused = Refusal { upload_id: sent[0], permanent: true, whole_topic: is_retry, reason: why };
                    let parked = self.blamed(&[refused], &sent, &rows);
                    self.park(owned, batch, &parked, &mut rows).await?;
                    self.isolation.refused(owned.shard, sent.len(), parked.len(), 0);
                }
                self.unstamp(owned, &[batch], &[]).await?;
                // Or it is the producer, which a Kafka that was away can leave without anybody to send to.
                if answers {
                    *held = self.take(owned).await?.0;
                }
                return Ok(0);
            }
            Err(PublishError::NoMarker(why)) => {
                self.tell_failure(owned.shard, &why);
                self.isolation.failed(owned.shard, &sent, false, &why);
                self.markers_in_doubt.store(true, Ordering::Release);
                // As above: perhaps it is the producer.
                is_doubtful = self.kafka.reachable().await.is_ok();
                (0, Vec::new())
            }
            // The stamp stays: the next owner reads the marker first.
            Err(error @ PublishError::Fenced(_)) => {
                warn!(shard = owned.shard, %error, "shard {} was taken", owned.shard);
                return Err(Error::Taken);
            }
            // The same, and the next owner may be we.
            Err(PublishError::Lost(why)) => {
                self.tell_failure(owned.shard, &why);
                if self.isolation.failed(owned.shard, &sent, true, &why) {
                    self.isolation.condemn(owned.shard, sent[0], &why);
                }
                *slot = None;
                return Ok(0);
            }
        };
        self.unstamp(owned, &[batch], &published).await?;
        if is_doubtful || held.shard.is_spent() {
            *held = self.take(owned).await?.0;
        }
        Ok(marked)
    }

    /// Lets the refused ones of a batch's rows wait, each with what comes after it in its topic and key, and takes them
    /// out of `rows`.
    pub(super) async fn park(
        &self,
        owned: Ownership,
        batch: i64,
        refused: &[Refusal],
        rows: &mut Vec<Waiting>,
    ) -> Result<(), Error> {
        if refused.is_empty() {
            return Ok(());
        }
        let is_full = i64::try_from(rows.len()).is_ok_and(|rows| rows >= BATCH);
        let now = self.store.now().await?;
        let reasons: HashMap<Uuid, &str> = refused.iter().map(|refusal| (refusal.upload_id, refusal.reason.as_str())).collect();
        let mut parked = Vec::with_capacity(refused.len());
        let mut told: BTreeMap<(&str, &str), usize> = BTreeMap::new();
        for row in rows.iter() {
            let Some(reason) = reasons.get(&row.session_id) else { continue };
            let wait = time::Duration::seconds((1i64 << (row.attempts.clamp(1, 7) - 1)).min(LONGEST_PARK_SECONDS));
            parked.push(Parked { session_id: row.session_id, error: (*reason).to_owned(), next_try_at: now + wait });
            *told.entry((&row.topic, reason)).or_default() += 1;
        }
        self.store.park(owned, batch, &parked, now).await?;
        for ((topic, reason), count) in told {
            if self.is_news(topic, reason) {
                warn!(topic, reason, count, "Kafka refused {count} pointers for topic {topic}: {reason}");
            }
        }
        rows.retain(|row| !reasons.contains_key(&row.session_id));
        reasons.into_keys().for_each(|id| self.wakes.changed(id));
        // What is behind them has room now.
        if is_full {
            self.wakes.relay.notify_one();
        }
        Ok(())
    }

    /// Whether to tell of refused records: once a topic and reason, and from time to time again.
    pub(super) fn is_news(&self, topic: &str, reason: &str) -> bool {
        // It is whole after every statement, so a panic elsewhere does not spoil it.
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        told.retain(|_, at| at.elapsed() < TOLD_AGAIN);
        let key = (topic.to_owned(), reason.to_owned());
        let is_news = !told.contains_key(&key);
        if is_news {
            told.insert(key, Instant::now());
        }
        is_news
    }

    pub(super) async fn unstamp(&self, owned: Ownership, batches: &[i64], placed: &[Placed]) -> Result<(), Error> {
        if self.store.unstamp(owned, batches, placed).await? { Ok(()) } else { Err(Error::Taken) }
    }

    /// Writes down what Kafka holds. Where the database cannot, for it does not know of it any more, the stamps of the
    /// batch's other rows stay: whoever takes the shard next settles them by the marker.
    pub(super) async fn mark(
        &self,
        owned: Ownership,
        batch: i64,
        placed: &[Placed],
        now: OffsetDateTime,
    ) -> Result<usize, Error> {
        if placed.is_empty() {
            return Ok(0);
        }
        let mut written = self.store.published(placed, now).await?;
        // Somebody else may have written it between this statement's snapshot and its turn.
        if written < placed.len() {
            written = self.store.published(placed, now).await?;
        }
        placed.iter().for_each(|placed| self.wakes.changed(placed.session_id));
        if written < placed.len() {
            return Err(Error::Unwritten { shard: owned.shard, batch, published: placed.len(), written });
        }
        Ok(written)
    }
}

pub(super) fn placed(delivered: &Delivered) -> Placed {
    let at = OffsetDateTime::from_unix_timestamp_nanos(i128::from(delivered.timestamp_ms) * 1_000_000);
    Placed {
        session_id: delivered.upload_id,
        partition: delivered.partition,
        offset: delivered.offset,
        at: at.unwrap_or(OffsetDateTime::UNIX_EPOCH),
    }
}

/// The topics of the rows that were delivered.
fn topics_of<'a>(rows: &'a [Waiting], delivered: &'a [Delivered]) -> impl Iterator<Item = &'a str> {
    let ids: std::collections::HashSet<Uuid> = delivered.iter().map(|delivered| delivered.upload_id).collect();
    rows.iter().filter(move |row| ids.contains(&row.session_id)).map(|row| row.topic.as_str())
}
