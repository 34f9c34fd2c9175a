//! The record of a pointer: its position in Kafka, and which records keep their order.

use lfs_broker_client::checksum::Sha256;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use uuid::Uuid;

/// The position of a pointer's record in Kafka. The markers in Kafka hold it as JSON, so its members keep their names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordMetadata {
    /// The session of the pointer.
    pub upload_id: Uuid,
    /// The record's partition, or [`Self::UNKNOWN_PARTITION`].
    pub partition: i32,
    /// The record's offset in the partition, or [`Self::UNKNOWN_OFFSET`].
    pub offset: i64,
    /// The record's timestamp in milliseconds since 1970, as Kafka stores it.
    pub timestamp_ms: i64,
}

impl RecordMetadata {
    /// The partition of a record that was published, but whose partition is not known. Java's producer uses the same value:
    /// `RecordMetadata.UNKNOWN_PARTITION` of `org.apache.kafka.clients.producer`.
    pub const UNKNOWN_PARTITION: i32 = -1;

    /// The offset of a record that was published, but whose offset is not known. Java's `RecordMetadata.offset()` returns the
    /// same value if `hasOffset()` is false.
    pub const UNKNOWN_OFFSET: i64 = -1;

    /// Whether the record's position is known.
    pub fn has_offset(&self) -> bool {
        self.offset >= 0
    }

    /// The position of a record whose timestamp is known as a time.
    pub(crate) fn new(upload_id: Uuid, partition: i32, offset: i64, timestamp: OffsetDateTime) -> Self {
        let timestamp_ms = i64::try_from(timestamp.unix_timestamp_nanos() / 1_000_000).expect("every time fits");
        Self { upload_id, partition, offset, timestamp_ms }
    }

    /// The record's timestamp. A timestamp beyond the year 9999 counts as 1970.
    pub(crate) fn timestamp(&self) -> OffsetDateTime {
        OffsetDateTime::from_unix_timestamp_nanos(i128::from(self.timestamp_ms) * 1_000_000).unwrap_or(OffsetDateTime::UNIX_EPOCH)
    }
}

/// The outbox shard of a record. Records of one topic and key share a shard; records without a key are spread by
/// session id.
pub(crate) fn shard(topic: &str, key: Option<&[u8]>, id: Uuid, shards: i32) -> i32 {
    let hash = ordering_key(topic, key).unwrap_or_else(|| first_eight_bytes(Sha256::of(id.as_bytes())));
    i32::try_from(hash.rem_euclid(i64::from(shards))).expect("a remainder is smaller than the shard count")
}

/// A hash of topic and key: records with the same hash keep their order. `None` for records without a key, which have
/// no order.
pub(crate) fn ordering_key(topic: &str, key: Option<&[u8]>) -> Option<i64> {
    // A topic cannot contain a NUL, so two different pairs never concatenate to the same bytes.
    key.map(|key| first_eight_bytes(Sha256::of(&[topic.as_bytes(), b"\0", key].concat())))
}

fn first_eight_bytes(digest: Sha256) -> i64 {
    i64::from_be_bytes(digest.0[..8].try_into().expect("a SHA-256 has more than eight bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_json_of_a_position_is_that_of_the_markers_that_kafka_already_holds() {
        let at = OffsetDateTime::from_unix_timestamp(1_763_706_959).unwrap();
        let metadata = RecordMetadata::new(Uuid::nil(), 3, 42, at);
        let json =
            r#"{"upload_id":"00000000-0000-0000-0000-000000000000","partition":3,"offset":42,"timestamp_ms":1763706959000}"#;
        assert_eq!(serde_json::to_string(&metadata).unwrap(), json);
        assert_eq!(serde_json::from_str::<RecordMetadata>(json).unwrap(), metadata);
        assert_eq!(metadata.timestamp(), at);
    }
}
