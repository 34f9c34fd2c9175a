//! Reading a partition from end to end: what Kafka holds, in the order in which it holds it.
//!
//! A reader of committed records of its own walks on a thread of its own and hands over batches; whoever is slow to
//! take them makes it wait, so memory stays flat whatever the partition's length.

use std::time::{Duration, Instant};

use rdkafka::admin::{AdminOptions, ResourceSpecifier};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::{BorrowedMessage, Headers as _};
use rdkafka::{Message, Offset, TopicPartitionList};
use tokio::sync::mpsc;
use uuid::Uuid;

use super::client::{self, Context};
use super::{Error, Kafka, Observer, Settings, blocking, drop_aside};

/// Records of ours in one batch.
const BATCH: usize = 1000;
/// Offsets that one batch covers at most, so that a long run of others' records is told as progress too.
const SPAN: i64 = 100_000;
/// A pointer has less than 8 KiB; of a longer value the rest cannot make it equal.
const VALUE_BYTES: usize = 64 << 10;
/// Kafka ends a crashed owner's transaction after 60 s; until then what follows it is hidden.
const SETTLED_WITHIN: Duration = Duration::from_secs(75);
/// A fetch takes milliseconds; so long without a record and without the end means that Kafka does not answer.
const PROGRESS_WITHIN: Duration = Duration::from_secs(20);
/// Whether a topic is compacted is worth no longer a wait.
const CONFIG_WITHIN: Duration = Duration::from_secs(3);

/// A record that names an upload in its headers.
#[derive(Debug, Clone)]
pub struct Seen {
    /// Its place in the partition.
    pub offset: i64,
    /// Its time in milliseconds since 1970.
    pub timestamp_ms: i64,
    /// `lfs-upload-id`.
    pub upload_id: Uuid,
    /// `lfs-integrity`.
    pub integrity: Option<String>,
    /// `lfs-version-id`.
    pub version_id: Option<String>,
    /// Its value; cut where it is longer than any pointer.
    pub value: Vec<u8>,
}

/// A stretch of a partition: every offset from `from` up to, without, `to` was looked at.
#[derive(Debug)]
pub struct Batch {
    /// The first offset.
    pub from: i64,
    /// The offset after the last.
    pub to: i64,
    /// The records in it that name an upload.
    pub records: Vec<Seen>,
    /// How many records there are, the others among them.
    pub looked_at: u64,
}

/// A partition on its way past.
#[derive(Debug)]
pub struct Scan {
    batches: mpsc::Receiver<Result<Batch, Error>>,
    /// The offset after the last at the start.
    pub end: i64,
}

impl Scan {
    /// The next stretch; none at the end.
    ///
    /// # Errors
    /// Where Kafka does not answer, or a transaction in the way stays open.
    pub async fn next(&mut self) -> Result<Option<Batch>, Error> {
        self.batches.recv().await.transpose()
    }
}

impl Kafka {
    /// Reads a partition's committed records from its beginning to its end as it is now.
    ///
    /// # Errors
    /// Where Kafka does not answer.
    pub async fn scan(&self, topic: &str, partition: i32) -> Result<Scan, Error> {
        let (start, end) = self.range(topic, partition).await?;
        Ok(self.walk(topic, partition, (start, end)))
    }

    /// The same from the first record that is not older than `since_ms`, in milliseconds since 1970.
    ///
    /// # Errors
    /// Where Kafka does not answer.
    pub async fn scan_since(&self, topic: &str, partition: i32, since_ms: i64) -> Result<Scan, Error> {
        let (start, end) = self.range(topic, partition).await?;
        let name = topic.to_owned();
        let ask = move |observer: Observer, time_left| {
            let mut times = TopicPartitionList::new();
            let asked = times.add_partition_offset(&name, partition, Offset::Offset(since_ms));
            let found = asked.and_then(|()| observer.offsets_for_times(times, time_left));
            let found = found.map_err(|error| Error::from_kafka(&error))?;
            Ok(found.elements().first().map(|element| element.offset()))
        };
        let since = self.observe(|observer| self.ask(move |time_left| ask(observer, time_left))).await?;
        let from = match since {
            Some(Offset::Offset(offset)) => start.max(offset),
            Some(Offset::End) => end,
            _ => start,
        };
        Ok(self.walk(topic, partition, (from, end)))
    }

    fn walk(&self, topic: &str, partition: i32, (start, end): (i64, i64)) -> Scan {
        let (give, batches) = mpsc::channel(1);
        if start < end {
            let (settings, topic) = (self.settings().clone(), topic.to_owned());
            tokio::task::spawn_blocking(move || {
                let walk = Walk { topic: &topic, partition, end };
                if let Err(error) = walk.run(&settings, start, &give) {
                    // Nobody left to hear it: then nobody needs it.
                    let _ = give.blocking_send(Err(error));
                }
            });
        }
        Scan { batches, end }
    }

    /// The first offset of a partition and the one after its last, open transactions counted in.
    ///
    /// # Errors
    /// Where Kafka does not answer.
    pub async fn range(&self, topic: &str, partition: i32) -> Result<(i64, i64), Error> {
        let topic = topic.to_owned();
        let range = move |observer: Observer, time_left| {
            observer.fetch_watermarks(&topic, partition, time_left).map_err(|error| Error::from_kafka(&error))
        };
        self.observe(|observer| self.ask(move |time_left| range(observer, time_left))).await
    }

    /// Whether a topic drops older records of a key. Where Kafka does not say, it does not.
    pub async fn is_compacted(&self, topic: &str) -> bool {
        let settings = self.settings().clone();
        let Ok(admin) = blocking(move || client::admin(&settings)).await else { return false };
        let options = AdminOptions::new().request_timeout(Some(CONFIG_WITHIN));
        let asked = [ResourceSpecifier::Topic(topic)];
        let answer = tokio::time::timeout(CONFIG_WITHIN, admin.describe_configs(&asked, &options)).await;
        drop_aside(admin);
        let Ok(Ok(resources)) = answer else { return false };
        let policy = resources.into_iter().flatten().find_map(|resource| resource.get("cleanup.policy")?.value.clone());
        policy.is_some_and(|policy| policy.contains("compact"))
    }
}

/// One walk through a partition, up to where it ended at the start.
struct Walk<'a> {
    topic: &'a str,
    partition: i32,
    end: i64,
}

impl Walk<'_> {
    fn run(&self, settings: &Settings, start: i64, give: &mpsc::Sender<Result<Batch, Error>>) -> Result<(), Error> {
        let reader = client::reader(settings)?;
        self.settled(&reader)?;
        let mut place = TopicPartitionList::new();
        place
            .add_partition_offset(self.topic, self.partition, Offset::Offset(start))
            .and_then(|()| reader.assign(&place))
            .map_err(|error| Error::from_kafka(&error))?;
        let empty = |from| Batch { from, to: from, records: Vec::new(), looked_at: 0 };
        let mut batch = empty(start);
        let mut moved_at = Instant::now();
        while moved_at.elapsed() < PROGRESS_WITHIN {
            match reader.poll(Duration::from_millis(100)) {
                Some(Ok(record)) if record.offset() < self.end => {
                    moved_at = Instant::now();
                    batch.to = record.offset() + 1;
                    batch.looked_at += 1;
                    batch.records.extend(seen(&record));
                    if batch.records.len() >= BATCH || batch.to - batch.from >= SPAN {
                        let next = empty(batch.to);
                        if give.blocking_send(Ok(std::mem::replace(&mut batch, next))).is_err() {
                            return Ok(());
                        }
                        // The one who takes batches may have been slow; that is not Kafka's silence.
                        moved_at = Instant::now();
                    }
                }
                // Everything below the end was committed or aborted before the reader was sent off, so this end is it.
                Some(Ok(_) | Err(KafkaError::PartitionEOF(_))) => {
                    batch.to = self.end;
                    let _ = give.blocking_send(Ok(batch));
                    return Ok(());
                }
                Some(Err(error)) if matches!(Error::from_kafka(&error), Error::Refused(_)) && !is_about_group(&error) => {
                    return Err(Error::from_kafka(&error));
                }
                _ => {}
            }
        }
        let (topic, partition, end) = (self.topic, self.partition, self.end);
        Err(Error::Unreachable(format!("{topic}/{partition} could not be read beyond {} of {end}", batch.to)))
    }

    /// Waits until no transaction that began before the end is open: a record behind it would be passed over.
    fn settled(&self, reader: &BaseConsumer<Context>) -> Result<(), Error> {
        let deadline = Instant::now() + SETTLED_WITHIN;
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
                let words = format!("a transaction stays open in {topic}/{partition}: {stable} of {end} can be read");
                return Err(Error::Unreachable(words));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// The reader has a group's name but is no member, so what a coordinator says about it does not matter.
fn is_about_group(error: &KafkaError) -> bool {
    error.rdkafka_error_code() == Some(rdkafka::error::RDKafkaErrorCode::GroupAuthorizationFailed)
}

fn seen(record: &BorrowedMessage<'_>) -> Option<Seen> {
    let headers = record.headers()?;
    let text = |name: &str| {
        let value = headers.iter().find(|header| header.key == name)?.value?;
        std::str::from_utf8(value).ok().map(str::to_owned)
    };
    let value = record.payload().unwrap_or_default();
    Some(Seen {
        offset: record.offset(),
        timestamp_ms: record.timestamp().to_millis().unwrap_or(0),
        upload_id: Uuid::try_parse(&text("lfs-upload-id")?).ok()?,
        integrity: text("lfs-integrity"),
        version_id: text("lfs-version-id"),
        value: value[..value.len().min(VALUE_BYTES)].to_vec(),
    })
}
