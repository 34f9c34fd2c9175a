//! The marker: it lists the pointers that a shard's last committed transaction published. The next owner of the shard reads it.
//!
//! The marker is sent together with the records that it lists, so it does not know their offsets. The next owner looks an
//! offset up in the topic if the database does not have it. Markers of earlier versions contain the offsets.

use std::time::{Duration, Instant};

use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::{Message, Offset, TopicPartitionList};
use tracing::warn;

use super::client::{self, Context};
use super::{Error, MARKER_TOPIC, Record, RecordMetadata, Settings};

/// Reading takes milliseconds, or longer while another deployment has an open transaction in the partition.
const READ_TIMEOUT: Duration = Duration::from_secs(10);

/// The first scan starts this many offsets before the end, and each later scan 16 times as many. The last marker is
/// nearly always among the last records, but a topic that was never compacted is long.
const FIRST_SCAN_OFFSETS: i64 = 256;

/// The pointers that one batch published. Its key in the marker topic is the shard's transactional id.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Marker {
    /// The number under which the batch's rows were claimed.
    pub batch: i64,
    /// The records that the batch published. A position that was not known when the marker was sent is -1, as in Java's
    /// `RecordMetadata`: see [`RecordMetadata::UNKNOWN_OFFSET`].
    pub published: Vec<RecordMetadata>,
}

impl Marker {
    /// The marker of a batch that is sent at `timestamp_ms`. A partition is known if the client asked for it, or if the
    /// partitioner chose it; otherwise librdkafka chooses one later.
    pub(super) fn of(batch: i64, records: &[Record], timestamp_ms: i64) -> Self {
        let listed = |record: &Record| RecordMetadata {
            upload_id: record.upload_id,
            partition: record.partition.unwrap_or(RecordMetadata::UNKNOWN_PARTITION),
            offset: RecordMetadata::UNKNOWN_OFFSET,
            timestamp_ms,
        };
        Self { batch, published: records.iter().map(listed).collect() }
    }
}

/// The transactional id of a shard. Kafka fences producers by it, and it is the key of the shard's markers.
pub fn transactional_id(deployment_id: uuid::Uuid, shard: i32) -> String {
    format!("lfs-broker.{deployment_id}.{shard}")
}

/// Reads the last committed marker of `transactional_id`. Blocks.
///
/// It scans up to the current end of the log. A reader of committed records sees only the records before the first open
/// transaction. So this waits until the transactions that are open now have ended. Otherwise it could miss a marker, and
/// the marker's pointers would be sent twice.
pub(super) fn read_last(
    settings: &Settings,
    metadata_client: &BaseConsumer<Context>,
    transactional_id: &str,
    partition: i32,
) -> Result<Option<Marker>, Error> {
    let deadline = Instant::now() + READ_TIMEOUT;
    let (start, end) = watermarks(metadata_client, partition, deadline)?;
    if start >= end {
        return Ok(None);
    }
    let reader = client::reader(settings)?;
    let (start, stable) = loop {
        let (start, stable) = watermarks(&reader, partition, deadline)?;
        if stable >= end {
            break (start, stable);
        }
        if Instant::now() > deadline {
            // Kafka aborts the open transaction of a dead owner when the new owner starts. If one stays open, Kafka lost its end.
            return Err(Error::Unreachable(format!(
                "a transaction is open in {MARKER_TOPIC}-{partition} at offset {stable} (end {end}) for more than {} s; \
                 if it stays open, Kafka lost the transaction's commit or abort marker",
                READ_TIMEOUT.as_secs()
            )));
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    let mut scan_offsets = FIRST_SCAN_OFFSETS;
    loop {
        let from = start.max(stable.saturating_sub(scan_offsets));
        let found = scan_from(&reader, transactional_id, partition, from, deadline)?;
        if found.is_some() || from == start {
            return Ok(found);
        }
        scan_offsets = scan_offsets.saturating_mul(16);
    }
}

fn watermarks(client: &BaseConsumer<Context>, partition: i32, deadline: Instant) -> Result<(i64, i64), Error> {
    let time_left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
    client.fetch_watermarks(MARKER_TOPIC, partition, time_left).map_err(|error| Error::from_kafka(&error))
}

/// The last marker with this key, from `from` to the end of the committed records. A record that is not a marker was
/// written by another program. It is skipped with a warning.
fn scan_from(
    reader: &BaseConsumer<Context>,
    transactional_id: &str,
    partition: i32,
    from: i64,
    deadline: Instant,
) -> Result<Option<Marker>, Error> {
    let mut assignment = TopicPartitionList::new();
    assignment
        .add_partition_offset(MARKER_TOPIC, partition, Offset::Offset(from))
        .and_then(|()| reader.assign(&assignment))
        .map_err(|error| Error::from_kafka(&error))?;
    let mut last = None;
    while Instant::now() < deadline {
        match reader.poll(Duration::from_millis(100)) {
            Some(Ok(record)) if record.key() == Some(transactional_id.as_bytes()) => {
                match serde_json::from_slice(record.payload().unwrap_or_default()) {
                    Ok(marker) => last = Some(marker),
                    Err(error) => warn!(
                        transactional_id,
                        partition,
                        offset = record.offset(),
                        "skipped the record at {MARKER_TOPIC}-{partition}, offset {}: it is not a marker of {transactional_id} \
                         ({error}); only lfs-broker may write to this topic",
                        record.offset()
                    ),
                }
            }
            Some(Err(KafkaError::PartitionEOF(_))) => return Ok(last),
            Some(Err(error)) if !is_transient(&error) => return Err(Error::from_kafka(&error)),
            // Another shard's record, no record yet, or a lost connection that librdkafka restores.
            _ => {}
        }
    }
    Err(Error::Unreachable(format!("could not read {MARKER_TOPIC}-{partition} within {} s", READ_TIMEOUT.as_secs())))
}

fn is_transient(error: &KafkaError) -> bool {
    match Error::from_kafka(error) {
        // The reader has a group id but never joins the group, so an error of the group does not matter.
        Error::Refused(_) => error.rdkafka_error_code() == Some(RDKafkaErrorCode::GroupAuthorizationFailed),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_json_of_a_marker_is_read_with_and_without_offsets() {
        let id = uuid::Uuid::nil();
        let record = |offset| RecordMetadata { upload_id: id, partition: 2, offset, timestamp_ms: 7 };
        let json = |offset| {
            format!(r#"{{"batch":3,"published":[{{"upload_id":"{id}","partition":2,"offset":{offset},"timestamp_ms":7}}]}}"#)
        };
        for offset in [-1, 42] {
            let marker = Marker { batch: 3, published: vec![record(offset)] };
            assert_eq!(serde_json::to_string(&marker).unwrap(), json(offset));
            assert_eq!(serde_json::from_str::<Marker>(&json(offset)).unwrap(), marker);
            assert_eq!(marker.published[0].has_offset(), offset == 42);
        }
    }
}
