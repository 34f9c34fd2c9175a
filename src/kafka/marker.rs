//! The marker: what a shard's last committed transaction published, read back by whoever owns the shard next.

use std::time::{Duration, Instant};

use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::{Message, Offset, TopicPartitionList};
use tracing::warn;

use super::client::{self, Context};
use super::{Delivered, Error, MARKER_TOPIC, Settings};

/// Reading takes milliseconds. It takes longer while a transaction of another deployment is open in the partition.
const READ_WITHIN: Duration = Duration::from_secs(10);

/// The first look goes this far back from the end, later looks 16 times as far: the last marker is nearly always
/// among the last records, but a topic that was never compacted is long.
const FIRST_LOOK: i64 = 256;

/// What one batch published. Its key in the marker topic is the shard's transactional id.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Marker {
    /// The number that the batch's rows were stamped with.
    pub batch: i64,
    /// Where each of the batch's pointers is.
    pub published: Vec<Delivered>,
}

/// The name under which a shard's pointers are published: its markers' key, and what Kafka fences by.
pub fn transactional_id(deployment_id: uuid::Uuid, shard: i32) -> String {
    format!("lfs-broker.{deployment_id}.{shard}")
}

/// Reads the last committed marker of `transactional_id`. Blocks.
///
/// Everything below the end of the log, as it is now, is looked at. A reader of committed records sees only up to the
/// first open transaction, so this waits until no transaction older than now is open: a marker behind one would be
/// missed, and its pointers sent twice.
pub(super) fn last(
    settings: &Settings,
    observer: &BaseConsumer<Context>,
    transactional_id: &str,
    partition: i32,
) -> Result<Option<Marker>, Error> {
    let deadline = Instant::now() + READ_WITHIN;
    let (start, end) = watermarks(observer, partition, deadline)?;
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
            // Kafka ends what a dead owner left open when the new one comes. Where it does not, it has lost the end.
            return Err(Error::Unreachable(format!(
                "a transaction is open at {MARKER_TOPIC}-{partition}, offset {stable} of {end}: if it stays so, Kafka lost its end"
            )));
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    let mut look = FIRST_LOOK;
    loop {
        let from = start.max(stable.saturating_sub(look));
        let found = look_from(&reader, transactional_id, partition, from, deadline)?;
        if found.is_some() || from == start {
            return Ok(found);
        }
        look = look.saturating_mul(16);
    }
}

fn watermarks(client: &BaseConsumer<Context>, partition: i32, deadline: Instant) -> Result<(i64, i64), Error> {
    let time_left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
    client.fetch_watermarks(MARKER_TOPIC, partition, time_left).map_err(|error| Error::from_kafka(&error))
}

/// The last marker with this key from `from` to the end of what is committed. What is no marker was written by somebody
/// else, who has no business there: it is passed over.
fn look_from(
    reader: &BaseConsumer<Context>,
    transactional_id: &str,
    partition: i32,
    from: i64,
    deadline: Instant,
) -> Result<Option<Marker>, Error> {
    let mut place = TopicPartitionList::new();
    place
        .add_partition_offset(MARKER_TOPIC, partition, Offset::Offset(from))
        .and_then(|()| reader.assign(&place))
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
                        "passed over the record at {MARKER_TOPIC}-{partition}, offset {}: it is no marker of {transactional_id} \
                         ({error}); only lfs-broker may write to this topic",
                        record.offset()
                    ),
                }
            }
            Some(Err(KafkaError::PartitionEOF(_))) => return Ok(last),
            Some(Err(error)) if !is_passing(&error) => return Err(Error::from_kafka(&error)),
            // Another shard's record, nothing yet, or a lost connection that librdkafka restores.
            _ => {}
        }
    }
    Err(Error::Unreachable(format!("the markers could not be read within {} s", READ_WITHIN.as_secs())))
}

fn is_passing(error: &KafkaError) -> bool {
    match Error::from_kafka(error) {
        // The reader has a group's name but is no member, so what a coordinator says about it does not matter.
        Error::Refused(_) => error.rdkafka_error_code() == Some(RDKafkaErrorCode::GroupAuthorizationFailed),
        _ => true,
    }
}
