//! Finds out from the topics themselves what was published, where no marker tells.
//!
//! The marker topic may be deleted or emptied while a batch is unsettled. What is not in the topics either was not
//! published, or is gone with its topic: it is sent again.

use std::collections::{BTreeMap, HashMap};

use tracing::warn;
use uuid::Uuid;

use super::settlement::placed;
use super::{Carrier, Error};
use crate::kafka::{self, Delivered};
use crate::store::{Placed, Waiting};

/// How far the clocks of Kafka's brokers, of PostgreSQL and of this machine may differ.
const CLOCKS_DIFFER_SECONDS: u64 = 3600;

impl Carrier {
    /// Finds the records of stamped rows in their topics, where no marker says whether they were published.
    pub(super) async fn look_up(&self, stamped: &[Waiting]) -> Result<Vec<Placed>, Error> {
        let mut topics: BTreeMap<&str, HashMap<Uuid, &Waiting>> = BTreeMap::new();
        for row in stamped {
            topics.entry(&row.topic).or_default().insert(row.session_id, row);
        }
        let mut found = Vec::new();
        for (topic, rows) in topics {
            // A record is younger than its session, whose id tells the time; clocks may differ.
            let opened = rows.keys().map(|id| id.get_timestamp().map_or(0, |at| at.to_unix().0)).min().unwrap_or(0);
            let since_ms = i64::try_from(opened.saturating_sub(CLOCKS_DIFFER_SECONDS) * 1000).unwrap_or(0);
            // What a topic that is gone held is gone too.
            let partitions = self.kafka.partitions(topic).await?.unwrap_or(0);
            for partition in 0..partitions {
                let scan = self.kafka.scan_since(topic, partition, since_ms).await;
                let mut scan = scan.map_err(|error| unreadable(topic, error))?;
                while let Some(batch) = scan.next().await.map_err(|error| unreadable(topic, error))? {
                    let ours = batch
                        .records
                        .iter()
                        .filter(|seen| rows.get(&seen.upload_id).is_some_and(|row| row.value.as_bytes() == seen.value));
                    found.extend(ours.map(|seen| {
                        let (upload_id, offset, timestamp_ms) = (seen.upload_id, seen.offset, seen.timestamp_ms);
                        placed(&Delivered { upload_id, partition, offset, timestamp_ms })
                    }));
                }
            }
        }
        let (stamped, found_count) = (stamped.len(), found.len());
        warn!("no marker says which of {stamped} pointers were published; their topics hold {found_count} of them");
        Ok(found)
    }
}

/// Names the topic: the broker needs to read it once, which publishing never does.
fn unreadable(topic: &str, error: kafka::Error) -> kafka::Error {
    let words = |reason: &str| format!("topic {topic} cannot be read to find out what was published there (ACL Read): {reason}");
    match error {
        kafka::Error::Refused(reason) => kafka::Error::Refused(words(&reason)),
        kafka::Error::Unreachable(reason) => kafka::Error::Unreachable(words(&reason)),
        other => other,
    }
}
