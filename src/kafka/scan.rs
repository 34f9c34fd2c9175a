//! Scans a partition: reads its committed records in order, up to its current end.
//!
//! Each scan has its own reader on its own thread, and delivers ranges of records through a channel. The channel holds one
//! range, so the reader waits for a slow caller, and memory does not grow with the partition.

use std::time::{Duration, Instant};

use rdkafka::admin::{AdminOptions, ResourceSpecifier};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::{BorrowedMessage, Headers as _};
use rdkafka::{Message, Offset, TopicPartitionList};
use tokio::sync::mpsc;
use uuid::Uuid;

use super::client::{self, Context};
use super::{Error, Kafka, MetadataClient, Settings, drop_blocking, run_blocking};

/// The most records of this broker in one range.
const MAX_RANGE_RECORDS: usize = 1000;
/// The most offsets in one range. So a caller also sees progress through many records of other programs.
const MAX_RANGE_OFFSETS: i64 = 100_000;
/// How many bytes of a value are kept. A pointer has less than 8 KiB, so a longer value is not a pointer anyway.
const MAX_VALUE_BYTES: usize = 64 << 10;
/// Kafka aborts the transaction of a crashed owner after 60 s. Until then, later records are hidden.
const OPEN_TRANSACTION_TIMEOUT: Duration = Duration::from_secs(75);
/// A fetch takes milliseconds. If no record and no end arrives within this time, Kafka does not answer.
const PROGRESS_TIMEOUT: Duration = Duration::from_secs(20);
/// The limit for the query whether a topic is compacted. The answer is not worth a longer wait.
const CONFIG_TIMEOUT: Duration = Duration::from_secs(3);

/// A record with an upload id in its headers.
#[derive(Debug, Clone)]
pub struct ScannedRecord {
    /// The record's offset in the partition.
    pub offset: i64,
    /// The record's timestamp in milliseconds since 1970.
    pub timestamp_ms: i64,
    /// The header `lfs-upload-id`.
    pub upload_id: Uuid,
    /// The header `lfs-integrity`.
    pub integrity: Option<String>,
    /// The header `lfs-version-id`.
    pub version_id: Option<String>,
    /// The record's value, cut off after 64 KiB, which is longer than any pointer.
    pub value: Vec<u8>,
}

/// A range of a partition: every offset from `from` to `to` (exclusive) was read.
#[derive(Debug)]
pub struct ScannedRange {
    /// The first offset.
    pub from: i64,
    /// The offset after the last offset.
    pub to: i64,
    /// The records in the range that have an upload id.
    pub records: Vec<ScannedRecord>,
    /// The number of all records in the range.
    pub record_count: u64,
}

/// A running scan of a partition.
#[derive(Debug)]
pub struct Scan {
    ranges: mpsc::Receiver<Result<ScannedRange, Error>>,
    /// The partition's end offset when the scan started.
    pub end_offset: i64,
}

impl Scan {
    /// The next range; `None` at the end.
    ///
    /// # Errors
    /// If Kafka does not answer, or an earlier transaction stays open.
    pub async fn next(&mut self) -> Result<Option<ScannedRange>, Error> {
        self.ranges.recv().await.transpose()
    }
}

impl Kafka {
    /// Scans a partition's committed records from its beginning to its current end.
    ///
    /// # Errors
    /// If Kafka does not answer.
    pub async fn scan(&self, topic: &str, partition: i32) -> Result<Scan, Error> {
        let (start, end) = self.watermarks(topic, partition).await?;
        Ok(self.spawn_scan(topic, partition, (start, end)))
    }

    /// Scans from the first record whose timestamp is not before `since_ms`, in milliseconds since 1970.
    ///
    /// # Errors
    /// If Kafka does not answer.
    pub async fn scan_since(&self, topic: &str, partition: i32, since_ms: i64) -> Result<Scan, Error> {
        let (start, end) = self.watermarks(topic, partition).await?;
        let name = topic.to_owned();
        let find_offset = move |client: MetadataClient, time_left| {
            let mut times = TopicPartitionList::new();
            let added = times.add_partition_offset(&name, partition, Offset::Offset(since_ms));
            let found = added.and_then(|()| client.offsets_for_times(times, time_left));
            let found = found.map_err(|error| Error::from_kafka(&error))?;
            Ok(found.elements().first().map(|element| element.offset()))
        };
        let since = self.with_metadata_client(|client| self.query(move |time_left| find_offset(client, time_left))).await?;
        let from = match since {
            Some(Offset::Offset(offset)) => start.max(offset),
            Some(Offset::End) => end,
            _ => start,
        };
        Ok(self.spawn_scan(topic, partition, (from, end)))
    }

    fn spawn_scan(&self, topic: &str, partition: i32, (start, end): (i64, i64)) -> Scan {
        let (sender, ranges) = mpsc::channel(1);
        if start < end {
            let (settings, topic) = (self.settings().clone(), topic.to_owned());
            tokio::task::spawn_blocking(move || {
                let task = ScanTask { topic: &topic, partition, end };
                if let Err(error) = task.run(&settings, start, &sender) {
                    // This fails if the caller dropped the scan. Then the error is not needed.
                    let _ = sender.blocking_send(Err(error));
                }
            });
        }
        Scan { ranges, end_offset: end }
    }

    /// The first offset of a partition and its end offset, including open transactions.
    ///
    /// # Errors
    /// If Kafka does not answer.
    pub async fn watermarks(&self, topic: &str, partition: i32) -> Result<(i64, i64), Error> {
        let topic = topic.to_owned();
        let fetch = move |client: MetadataClient, time_left| {
            client.fetch_watermarks(&topic, partition, time_left).map_err(|error| Error::from_kafka(&error))
        };
        self.with_metadata_client(|client| self.query(move |time_left| fetch(client, time_left))).await
    }

    /// Whether a topic is compacted: it drops older records of a key. `false` if Kafka does not report it.
    pub async fn is_compacted(&self, topic: &str) -> bool {
        let settings = self.settings().clone();
        let Ok(admin) = run_blocking(move || client::admin(&settings)).await else { return false };
        let options = AdminOptions::new().request_timeout(Some(CONFIG_TIMEOUT));
        let query = [ResourceSpecifier::Topic(topic)];
        let described = tokio::time::timeout(CONFIG_TIMEOUT, admin.describe_configs(&query, &options)).await;
        drop_blocking(admin);
        let Ok(Ok(resources)) = described else { return false };
        let policy = resources.into_iter().flatten().find_map(|resource| resource.get("cleanup.policy")?.value.clone());
        policy.is_some_and(|policy| policy.contains("compact"))
    }
}

/// Reads a partition up to the end offset that it had when the scan started.
struct ScanTask<'a> {
    topic: &'a str,
    partition: i32,
    end: i64,
}

impl ScanTask<'_> {
    fn run(&self, settings: &Settings, start: i64, sender: &mpsc::Sender<Result<ScannedRange, Error>>) -> Result<(), Error> {
        let reader = client::reader(settings)?;
        self.wait_for_open_transactions(&reader)?;
        let mut assignment = TopicPartitionList::new();
        assignment
            .add_partition_offset(self.topic, self.partition, Offset::Offset(start))
            .and_then(|()| reader.assign(&assignment))
            .map_err(|error| Error::from_kafka(&error))?;
        let empty = |from| ScannedRange { from, to: from, records: Vec::new(), record_count: 0 };
        let mut range = empty(start);
        let mut progress_at = Instant::now();
        while progress_at.elapsed() < PROGRESS_TIMEOUT {
            match reader.poll(Duration::from_millis(100)) {
                Some(Ok(record)) if record.offset() < self.end => {
                    progress_at = Instant::now();
                    range.to = record.offset() + 1;
                    range.record_count += 1;
                    range.records.extend(scanned_record(&record));
                    if range.records.len() >= MAX_RANGE_RECORDS || range.to - range.from >= MAX_RANGE_OFFSETS {
                        let next = empty(range.to);
                        if sender.blocking_send(Ok(std::mem::replace(&mut range, next))).is_err() {
                            return Ok(());
                        }
                        // A slow caller does not mean that Kafka makes no progress.
                        progress_at = Instant::now();
                    }
                }
                // All transactions below the end had ended before the reader started, so the reader saw all records.
                Some(Ok(_) | Err(KafkaError::PartitionEOF(_))) => {
                    range.to = self.end;
                    let _ = sender.blocking_send(Ok(range));
                    return Ok(());
                }
                Some(Err(error)) if matches!(Error::from_kafka(&error), Error::Refused(_)) && !is_group_error(&error) => {
                    return Err(Error::from_kafka(&error));
                }
                _ => {}
            }
        }
        let (topic, partition, end) = (self.topic, self.partition, self.end);
        let (offset, seconds) = (range.to, PROGRESS_TIMEOUT.as_secs());
        Err(Error::Unreachable(format!("no record of {topic}/{partition} after offset {offset} (end {end}) within {seconds} s")))
    }

    /// Waits until no transaction is open below the end. Otherwise the reader would miss the records after it.
    fn wait_for_open_transactions(&self, reader: &BaseConsumer<Context>) -> Result<(), Error> {
        let deadline = Instant::now() + OPEN_TRANSACTION_TIMEOUT;
        loop {
            let stable = reader
                .fetch_watermarks(self.topic, self.partition, Duration::from_secs(10))
                .map_err(|error| Error::from_kafka(&error))?
                .1;
            if stable >= self.end {
                return Ok(());
            }
            if Instant::now() > deadline {
                let (topic, partition, end) = (self.topic, self.partition, self.end);
                return Err(Error::Unreachable(format!(
                    "a transaction is open in {topic}/{partition} at offset {stable} (end {end}) for more than {} s",
                    OPEN_TRANSACTION_TIMEOUT.as_secs()
                )));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Whether an error concerns the consumer group. The reader has a group id but never joins, so such an error does not matter.
fn is_group_error(error: &KafkaError) -> bool {
    error.rdkafka_error_code() == Some(rdkafka::error::RDKafkaErrorCode::GroupAuthorizationFailed)
}

fn scanned_record(record: &BorrowedMessage<'_>) -> Option<ScannedRecord> {
    let headers = record.headers()?;
    let text = |name: &str| {
        let value = headers.iter().find(|header| header.key == name)?.value?;
        std::str::from_utf8(value).ok().map(str::to_owned)
    };
    let value = record.payload().unwrap_or_default();
    Some(ScannedRecord {
        offset: record.offset(),
        timestamp_ms: record.timestamp().to_millis().unwrap_or(0),
        upload_id: Uuid::try_parse(&text("lfs-upload-id")?).ok()?,
        integrity: text("lfs-integrity"),
        version_id: text("lfs-version-id"),
        value: value[..value.len().min(MAX_VALUE_BYTES)].to_vec(),
    })
}
