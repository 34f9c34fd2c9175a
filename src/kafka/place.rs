//! Where records can go, found out from Kafka's metadata before anything of a batch is sent.
//!
//! librdkafka would find out too, but later: it cannot tell a topic that is gone from one that it has not heard of yet,
//! it waits long for a leader, and it fails a whole transaction for one record.

use std::collections::{HashMap, HashSet};

use super::topics::Layout;
use super::{Error, Kafka, PublishError, Record, Refusal, is_internal};

/// A batch, sorted by what can be sent now.
#[derive(Debug, Default)]
pub struct Placing {
    /// What has a place, in the order it was given; one without a key is told which where not every partition has a
    /// leader. A record that comes after a refused one of its topic and key is not among them: it would arrive before it.
    pub records: Vec<Record>,
    /// What has none. Nothing helps until Kafka is changed, or whole again.
    pub refused: Vec<Refusal>,
}

impl Kafka {
    /// Finds the records for a topic or partition that Kafka lacks, or that has no leader now.
    ///
    /// # Errors
    /// [`PublishError::Retry`] when Kafka does not answer.
    pub async fn place(&self, records: Vec<Record>) -> Result<Placing, PublishError> {
        let mut topics: HashMap<String, Result<Option<Layout>, Error>> = HashMap::new();
        let mut waiting: HashSet<(String, Vec<u8>)> = HashSet::new();
        let mut placing = Placing::default();
        for mut record in records {
            if !topics.contains_key(&record.topic) {
                let found = match self.layout(&record.topic).await {
                    Err(Error::Unreachable(reason)) => return Err(PublishError::Retry(reason)),
                    found => found,
                };
                topics.insert(record.topic.clone(), found);
            }
            let order = record.key.clone().map(|key| (record.topic.clone(), key));
            if order.as_ref().is_some_and(|order| waiting.contains(order)) {
                continue;
            }
            match partition(&record, &topics[&record.topic]) {
                Ok(partition) => {
                    record.partition = partition;
                    placing.records.push(record);
                }
                Err(reason) => {
                    waiting.extend(order);
                    placing.refused.push(Refusal { upload_id: record.upload_id, permanent: true, whole_topic: false, reason });
                }
            }
        }
        Ok(placing)
    }
}

/// The partition to ask for, `None` to leave that to librdkafka; or why a record has no place in its topic.
fn partition(record: &Record, topic: &Result<Option<Layout>, Error>) -> Result<Option<i32>, String> {
    let name = &record.topic;
    if is_internal(name) {
        return Err(format!("topic {name} is Kafka's or the broker's own: no pointer is written there"));
    }
    let Layout { partitions, leaderless } = match topic {
        Err(error) => return Err(error.to_string()),
        Ok(None) => return Err(format!("kafka has no topic {name}")),
        Ok(Some(layout)) => layout,
    };
    if let Some(missing) = record.partition.filter(|partition| !(0..*partitions).contains(partition)) {
        return Err(format!("topic {name} has {partitions} partitions, none with number {missing}"));
    }
    if leaderless.is_empty() {
        return Ok(record.partition);
    }
    match record.partition.or_else(|| record.key.as_deref().map(|key| partition_of(key, *partitions))) {
        Some(partition) if leaderless.contains(&partition) => Err(format!("partition {partition} of topic {name} has no leader")),
        Some(partition) => Ok(Some(partition)),
        // librdkafka would take any.
        None => {
            let led: Vec<i32> = (0..*partitions).filter(|partition| !leaderless.contains(partition)).collect();
            let chosen = fastrand::choice(led).ok_or_else(|| format!("no partition of topic {name} has a leader"));
            chosen.map(Some)
        }
    }
}

/// The partition of a key, as Java's default partitioner and librdkafka's `murmur2_random` have it.
pub(super) fn partition_of(key: &[u8], partitions: i32) -> i32 {
    let hash = murmur2(key) & 0x7fff_ffff;
    hash.cast_signed() % partitions
}

/// Java's `Utils.murmur2`.
fn murmur2(key: &[u8]) -> u32 {
    const M: u32 = 0x5bd1_e995;
    const SEED: u32 = 0x9747_b28c;
    // Keys are far shorter than what would be cut off.
    #[allow(clippy::cast_possible_truncation)]
    let mut hash = SEED ^ key.len() as u32;
    let (words, rest) = key.as_chunks::<4>();
    for word in words {
        let mixed = u32::from_le_bytes(*word).wrapping_mul(M);
        hash = hash.wrapping_mul(M) ^ (mixed ^ (mixed >> 24)).wrapping_mul(M);
    }
    if !rest.is_empty() {
        let mixed = rest.iter().rev().fold(0, |mixed, byte| (mixed << 8) | u32::from(*byte));
        hash = (hash ^ mixed).wrapping_mul(M);
    }
    hash = (hash ^ (hash >> 13)).wrapping_mul(M);
    hash ^ (hash >> 15)
}
