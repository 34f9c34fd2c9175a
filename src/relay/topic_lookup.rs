//! Reads the topics themselves to find records of this broker by their upload id.
//!
//! A new owner does this in two cases. A marker lists pointers that the database does not know as published: they are
//! published for certain, and only their offsets are looked up. Or no marker exists, because an operator deleted or emptied
//! the marker topic: then a claimed row without a record in its topic was not published, or was deleted with the topic, and
//! the row is sent again.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use tracing::warn;
use uuid::Uuid;

use super::{Error, ShardPublisher};
use crate::kafka;
use crate::session::RecordMetadata;
use crate::store::{OutboxRow, UnrecordedSession};

/// How far the clocks of Kafka's brokers, of PostgreSQL and of this machine may differ.
const MAX_CLOCK_DIFFERENCE: Duration = Duration::from_secs(3600);

/// How long one attempt to look up offsets may take. Reading the records since the batch takes milliseconds.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a shard waits for topics that Kafka cannot read now. Afterwards the pointers are recorded without an offset,
/// because the other topics of the shard must not wait longer.
const GIVE_UP_AFTER: Duration = Duration::from_secs(60);

/// A record to look for: its topic, its value, and where to start.
struct Wanted<'a> {
    topic: &'a str,
    value: &'a str,
    partition: Option<i32>,
    since_ms: i64,
}

impl ShardPublisher {
    /// Adds the offsets to what a marker lists, for the sessions that the database does not know as published. A record that
    /// is no longer in its topic keeps an unknown offset.
    ///
    /// # Errors
    /// If Kafka does not answer, for the first [`GIVE_UP_AFTER`].
    pub(super) async fn add_offsets(
        &self,
        shard: i32,
        listed: &mut [RecordMetadata],
        sessions: &[UnrecordedSession],
    ) -> Result<(), Error> {
        let sessions: HashMap<Uuid, &UnrecordedSession> = sessions.iter().map(|session| (session.id, session)).collect();
        let is_wanted = |record: &RecordMetadata| !record.has_offset() && sessions.contains_key(&record.upload_id);
        // Most records have the timestamp that the marker contains. Kafka's own clock may have set an earlier one.
        for margin in [Duration::ZERO, MAX_CLOCK_DIFFERENCE] {
            let margin_ms = i64::try_from(margin.as_millis()).unwrap_or(i64::MAX);
            let wanted = listed.iter().filter(|record| is_wanted(record)).map(|record| {
                let UnrecordedSession { topic, pointer, .. } = sessions[&record.upload_id];
                let partition = Some(record.partition).filter(|partition| *partition >= 0);
                let since_ms = record.timestamp_ms.saturating_sub(margin_ms).max(0);
                (record.upload_id, Wanted { topic, value: pointer, partition, since_ms })
            });
            let wanted: HashMap<Uuid, Wanted<'_>> = wanted.collect();
            if wanted.is_empty() {
                break;
            }
            let looked_up = tokio::time::timeout(LOOKUP_TIMEOUT, self.find_records(&wanted)).await;
            let timed_out = |_| Err(kafka::Error::Unreachable(format!("no answer within {} s", LOOKUP_TIMEOUT.as_secs())).into());
            match looked_up.unwrap_or_else(timed_out) {
                Ok(found) => {
                    for record in listed.iter_mut() {
                        *record = found.iter().find(|found| found.upload_id == record.upload_id).copied().unwrap_or(*record);
                    }
                }
                Err(error) if self.may_retry_lookup(shard, &error) => return Err(error),
                Err(error) => {
                    warn!(shard, %error, "could not look up the offsets of pointers that shard {shard} has published: {error}");
                    break;
                }
            }
        }
        self.failed_lookups.lock().unwrap_or_else(PoisonError::into_inner).remove(&shard);
        for record in listed.iter().filter(|record| is_wanted(record)) {
            let (id, topic) = (record.upload_id, &sessions[&record.upload_id].topic);
            warn!(
                session.id = %id,
                topic,
                "the pointer of upload {id} was published to topic {topic}, but its record was not found there (deleted or \
                 compacted, or the topic cannot be read); the upload is marked published without an offset"
            );
        }
        Ok(())
    }

    /// Whether a takeover should fail and be repeated, because Kafka may answer soon.
    fn may_retry_lookup(&self, shard: i32, error: &Error) -> bool {
        if !matches!(error, Error::Kafka(kafka::Error::Unreachable(_))) {
            return false;
        }
        let mut failed = self.failed_lookups.lock().unwrap_or_else(PoisonError::into_inner);
        failed.entry(shard).or_insert_with(Instant::now).elapsed() < GIVE_UP_AFTER
    }

    /// Finds the records of claimed rows in their topics, when no marker says whether they were published.
    pub(super) async fn find_published(&self, claimed: &[OutboxRow]) -> Result<Vec<RecordMetadata>, Error> {
        let wanted = claimed.iter().map(|row| {
            // A record is newer than its session. The session id contains its time, but clocks may differ.
            let opened = row.session_id.get_timestamp().map_or(0, |at| at.to_unix().0);
            let since_ms = i64::try_from(opened.saturating_sub(MAX_CLOCK_DIFFERENCE.as_secs()) * 1000).unwrap_or(0);
            (row.session_id, Wanted { topic: &row.topic, value: &row.value, partition: None, since_ms })
        });
        let found = self.find_records(&wanted.collect()).await?;
        let (claimed, found_count) = (claimed.len(), found.len());
        warn!(
            "no marker says which of {claimed} claimed pointers were published; their topics hold {found_count} of them, the \
             others are sent again"
        );
        Ok(found)
    }

    /// Reads the topics of the wanted records until each is found or the topics end. A record counts only with the pointer's
    /// exact bytes: any producer can write the header of any upload.
    async fn find_records(&self, wanted: &HashMap<Uuid, Wanted<'_>>) -> Result<Vec<RecordMetadata>, Error> {
        let mut topics: BTreeMap<&str, HashSet<Uuid>> = BTreeMap::new();
        for (id, record) in wanted {
            topics.entry(record.topic).or_default().insert(*id);
        }
        let mut found = Vec::new();
        for (topic, mut missing) in topics {
            // A topic that Kafka lacks was deleted with its records, so it has no partition to read.
            let partitions = self.kafka.partition_count(topic).await?.unwrap_or(0);
            for partition in 0..partitions {
                let may_hold = |id: &&Uuid| wanted[*id].partition.is_none_or(|known| known == partition);
                let Some(since_ms) = missing.iter().filter(may_hold).map(|id| wanted[id].since_ms).min() else { continue };
                let scan = self.kafka.scan_since(topic, partition, since_ms).await;
                let mut scan = scan.map_err(|error| unreadable(topic, error))?;
                while let Some(range) = scan.next().await.map_err(|error| unreadable(topic, error))? {
                    for record in range.records {
                        let upload_id = record.upload_id;
                        if wanted.get(&upload_id).is_some_and(|wanted| wanted.value.as_bytes() == record.value)
                            && missing.remove(&upload_id)
                        {
                            let (offset, timestamp_ms) = (record.offset, record.timestamp_ms);
                            found.push(RecordMetadata { upload_id, partition, offset, timestamp_ms });
                        }
                    }
                    if missing.is_empty() {
                        break;
                    }
                }
            }
        }
        Ok(found)
    }
}

/// Adds the topic and the required permission to the error: only a takeover reads a topic, publishing never does.
fn unreadable(topic: &str, error: kafka::Error) -> kafka::Error {
    let explain = |reason: &str| {
        format!("cannot read topic {topic} to find out which pointers were published there (needs ACL Read): {reason}")
    };
    match error {
        kafka::Error::Refused(reason) => kafka::Error::Refused(explain(&reason)),
        kafka::Error::Unreachable(reason) => kafka::Error::Unreachable(explain(&reason)),
        other => other,
    }
}
