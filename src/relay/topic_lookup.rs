//! Reads the topics themselves to find out which claimed rows were published, if no marker says so.
//!
//! An operator may delete or empty the marker topic while a batch is claimed. If a claimed row has no record in its topic
//! either, the record was not published, or was deleted with the topic. The row is sent again.

use std::collections::{BTreeMap, HashMap};

use tracing::warn;
use uuid::Uuid;

use super::{Error, ShardPublisher};
use crate::kafka;
use crate::session::RecordMetadata;
use crate::store::OutboxRow;

/// How far the clocks of Kafka's brokers, of PostgreSQL and of this machine may differ.
const MAX_CLOCK_DIFFERENCE_SECONDS: u64 = 3600;

impl ShardPublisher {
    /// Finds the records of claimed rows in their topics, when no marker says whether they were published.
    pub(super) async fn find_published(&self, claimed: &[OutboxRow]) -> Result<Vec<RecordMetadata>, Error> {
        let mut topics: BTreeMap<&str, HashMap<Uuid, &OutboxRow>> = BTreeMap::new();
        for row in claimed {
            topics.entry(&row.topic).or_default().insert(row.session_id, row);
        }
        let mut found = Vec::new();
        for (topic, rows) in topics {
            // A record is newer than its session. The session id contains its time, but clocks may differ.
            let opened = rows.keys().map(|id| id.get_timestamp().map_or(0, |at| at.to_unix().0)).min().unwrap_or(0);
            let since_ms = i64::try_from(opened.saturating_sub(MAX_CLOCK_DIFFERENCE_SECONDS) * 1000).unwrap_or(0);
            // A topic that Kafka lacks was deleted with its records, so it has no partition to read.
            let partitions = self.kafka.partition_count(topic).await?.unwrap_or(0);
            for partition in 0..partitions {
                let scan = self.kafka.scan_since(topic, partition, since_ms).await;
                let mut scan = scan.map_err(|error| unreadable(topic, error))?;
                while let Some(range) = scan.next().await.map_err(|error| unreadable(topic, error))? {
                    let ours = range
                        .records
                        .iter()
                        .filter(|record| rows.get(&record.upload_id).is_some_and(|row| row.value.as_bytes() == record.value));
                    found.extend(ours.map(|record| {
                        let (upload_id, offset, timestamp_ms) = (record.upload_id, record.offset, record.timestamp_ms);
                        RecordMetadata { upload_id, partition, offset, timestamp_ms }
                    }));
                }
            }
        }
        let (claimed, found_count) = (claimed.len(), found.len());
        warn!(
            "no marker says which of {claimed} claimed pointers were published; their topics hold {found_count} of them, the \
             others are sent again"
        );
        Ok(found)
    }
}

/// Adds the topic and the required permission to the error: only this recovery reads a topic, publishing never does.
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
