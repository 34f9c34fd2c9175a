//! The partitioner: checks the topic and partition of each record against Kafka's metadata before a batch is sent.
//!
//! librdkafka checks this too, but later. It cannot distinguish a deleted topic from a topic that it does not know yet,
//! it waits long for a leader, and one bad record fails the whole transaction.

use std::collections::{HashMap, HashSet};

use super::topics::TopicMetadata;
use super::{Error, Kafka, PublishError, Record, RecordRejection, is_internal};

/// A batch, divided into records that can be sent now and records that cannot.
#[derive(Debug, Default)]
pub struct PartitionedBatch {
    /// The records to send, in the given order. If some partitions have no leader, a record without a key gets a partition
    /// that has one. A record after a rejected record of the same topic and key is left out, because it would overtake it.
    pub records: Vec<Record>,
    /// The records whose topic or partition cannot be written now. A retry helps only after a change in Kafka.
    pub rejected: Vec<RecordRejection>,
}

impl Kafka {
    /// Rejects the records for a topic or partition that Kafka lacks, or that has no leader now.
    ///
    /// # Errors
    /// [`PublishError::Retry`] if Kafka does not answer.
    pub async fn assign_partitions(&self, records: Vec<Record>) -> Result<PartitionedBatch, PublishError> {
        let mut topics: HashMap<String, Result<Option<TopicMetadata>, Error>> = HashMap::new();
        let mut blocked_keys: HashSet<(String, Vec<u8>)> = HashSet::new();
        let mut batch = PartitionedBatch::default();
        for mut record in records {
            if !topics.contains_key(&record.topic) {
                let found = match self.topic_metadata(&record.topic).await {
                    Err(Error::Unreachable(reason)) => return Err(PublishError::Retry(reason)),
                    found => found,
                };
                topics.insert(record.topic.clone(), found);
            }
            let order = record.key.clone().map(|key| (record.topic.clone(), key));
            if order.as_ref().is_some_and(|order| blocked_keys.contains(order)) {
                continue;
            }
            match choose_partition(&record, &topics[&record.topic]) {
                Ok(partition) => {
                    record.partition = partition;
                    batch.records.push(record);
                }
                Err(reason) => {
                    blocked_keys.extend(order);
                    let upload_id = record.upload_id;
                    batch.rejected.push(RecordRejection { upload_id, permanent: true, whole_topic: false, reason });
                }
            }
        }
        Ok(batch)
    }
}

/// The partition for a record, or `None` to let librdkafka choose it. Fails with the reason why the record cannot be sent.
fn choose_partition(record: &Record, topic: &Result<Option<TopicMetadata>, Error>) -> Result<Option<i32>, String> {
    let name = &record.topic;
    if is_internal(name) {
        return Err(format!("topic {name} is internal to Kafka or to lfs-broker: no pointer is published there"));
    }
    let TopicMetadata { partitions, leaderless } = match topic {
        Err(error) => return Err(error.to_string()),
        Ok(None) => return Err(format!("kafka has no topic {name}")),
        Ok(Some(metadata)) => metadata,
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
        // librdkafka might choose a partition without a leader.
        None => {
            let with_leader: Vec<i32> = (0..*partitions).filter(|partition| !leaderless.contains(partition)).collect();
            let chosen = fastrand::choice(with_leader).ok_or_else(|| format!("no partition of topic {name} has a leader"));
            chosen.map(Some)
        }
    }
}

/// The partition of a key, as Java's default partitioner and librdkafka's `murmur2_random` choose it.
pub(super) fn partition_of(key: &[u8], partitions: i32) -> i32 {
    let hash = murmur2(key) & 0x7fff_ffff;
    hash.cast_signed() % partitions
}

/// Java's `Utils.murmur2`.
fn murmur2(key: &[u8]) -> u32 {
    const M: u32 = 0x5bd1_e995;
    const SEED: u32 = 0x9747_b28c;
    // A key is far shorter than 4 GiB, so the cast loses nothing.
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
