//! Consumes a topic: committed records, from the group's committed offset, or from the beginning or the end.

use std::sync::Arc;
use std::time::Duration;

use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer as _};
use rdkafka::error::KafkaError;
use rdkafka::message::{BorrowedMessage, Headers as _, Message as _};
use rdkafka::{Offset, TopicPartitionList};

use super::client::{self, Context};
use super::{Error, Settings, drop_blocking, run_blocking};

/// How long one poll waits for the next record.
const POLL_TIMEOUT: Duration = Duration::from_millis(500);
/// The limit for the query that tests whether Kafka answers.
const HEALTH_TIMEOUT: Duration = Duration::from_secs(2);
/// The limit for topic metadata, watermarks and committed offsets.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// How long leaving the group may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(10);

/// Where to start if the group has no committed offset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StartOffset {
    /// The oldest record that the topic retains.
    Earliest,
    /// The next record that is published.
    Latest,
}

/// A record that was consumed.
#[derive(Debug, Clone)]
pub struct ConsumerRecord {
    /// The record's partition.
    pub partition: i32,
    /// The record's offset in the partition.
    pub offset: i64,
    /// The record's key.
    pub key: Option<Vec<u8>>,
    /// The record's value; `None` is a tombstone.
    pub value: Option<Vec<u8>>,
    /// The record's headers, in order.
    pub headers: Vec<(String, Vec<u8>)>,
}

/// A consumer of one topic.
pub struct TopicConsumer {
    /// `None` only during close and drop.
    consumer: Option<Arc<BaseConsumer<Context>>>,
    topic: String,
    /// Whether offsets are committed.
    has_group: bool,
}

impl TopicConsumer {
    /// Starts to consume `topic`. With a group, Kafka stores the offsets, and the members share the partitions.
    ///
    /// # Errors
    /// If Kafka does not answer, or lacks the topic.
    pub async fn start(settings: &Settings, topic: &str, group: Option<&str>, start_offset: StartOffset) -> Result<Self, Error> {
        let (settings, topic, group) = (settings.clone(), topic.to_owned(), group.map(str::to_owned));
        run_blocking(move || {
            let consumer = client::topic_consumer(&settings, group.as_deref(), start_offset == StartOffset::Earliest)?;
            let metadata = consumer.fetch_metadata(Some(&topic), REQUEST_TIMEOUT).map_err(|error| Error::from_kafka(&error))?;
            let partitions = metadata.topics().first().map(|topic| topic.partitions()).unwrap_or_default();
            if partitions.is_empty() {
                return Err(Error::Refused(format!("kafka has no topic {topic}")));
            }
            let partitions: Vec<i32> = partitions.iter().map(|partition| partition.id()).collect();
            if group.is_some() && start_offset == StartOffset::Latest {
                commit_end_offsets(&consumer, &topic, &partitions)?;
            }
            match group.is_some() {
                true => consumer.subscribe(&[&topic]),
                false => {
                    let offset = if start_offset == StartOffset::Earliest { Offset::Beginning } else { Offset::End };
                    let mut all = TopicPartitionList::new();
                    for partition in partitions {
                        all.add_partition_offset(&topic, partition, offset).map_err(|error| Error::from_kafka(&error))?;
                    }
                    consumer.assign(&all)
                }
            }
            .map_err(|error| Error::from_kafka(&error))?;
            Ok(Self { consumer: Some(Arc::new(consumer)), topic, has_group: group.is_some() })
        })
        .await
    }

    /// The next record, if one arrives within 500 ms.
    ///
    /// # Errors
    /// [`Error::Unreachable`] while Kafka does not answer: the next poll continues at the same offset. For any other error, a
    /// retry does not help.
    pub async fn poll(&self) -> Result<Option<ConsumerRecord>, Error> {
        let consumer = self.consumer();
        run_blocking(move || match consumer.poll(POLL_TIMEOUT) {
            None => Ok(None),
            Some(Ok(message)) => Ok(Some(consumer_record(&message))),
            Some(Err(KafkaError::PartitionEOF(_))) => Ok(None),
            Some(Err(error)) => Err(Error::from_kafka(&error)),
        })
        .await
    }

    /// Whether Kafka answers.
    pub async fn is_reachable(&self) -> bool {
        let (consumer, topic) = (self.consumer(), self.topic.clone());
        let answer = run_blocking(move || {
            consumer.fetch_metadata(Some(&topic), HEALTH_TIMEOUT).map_err(|error| Error::from_kafka(&error))
        });
        answer.await.is_ok()
    }

    /// Commits the offset after this record. Without a group it does nothing.
    ///
    /// # Errors
    /// If Kafka rejects the commit, for example because another member has the partition now.
    pub async fn commit(&self, record: &ConsumerRecord) -> Result<(), Error> {
        if !self.has_group {
            return Ok(());
        }
        let (consumer, topic, partition, offset) = (self.consumer(), self.topic.clone(), record.partition, record.offset);
        run_blocking(move || {
            let mut offsets = TopicPartitionList::new();
            let added = offsets.add_partition_offset(&topic, partition, Offset::Offset(offset + 1));
            added.and_then(|()| consumer.commit(&offsets, CommitMode::Sync)).map_err(|error| Error::from_kafka(&error))
        })
        .await
    }

    /// Leaves the group, so that other members get the partitions at once, without waiting for the session timeout. If Kafka does
    /// not answer within 10 s, the group waits for that timeout.
    pub async fn close(mut self) {
        if let Some(consumer) = self.consumer.take() {
            // Dropping the consumer leaves the group, and waits for Kafka's response without a limit.
            let _ = tokio::time::timeout(CLOSE_TIMEOUT, drop_blocking(consumer)).await;
        }
    }

    fn consumer(&self) -> Arc<BaseConsumer<Context>> {
        Arc::clone(self.consumer.as_ref().expect("only close and drop take the consumer"))
    }
}

impl Drop for TopicConsumer {
    fn drop(&mut self) {
        if let Some(consumer) = self.consumer.take() {
            drop_blocking(consumer);
        }
    }
}

/// Commits the end offset of every partition for which the group has no committed offset. Otherwise the group would start at
/// the end again after a restart, and skip records that it has not processed.
fn commit_end_offsets(consumer: &BaseConsumer<Context>, topic: &str, partitions: &[i32]) -> Result<(), Error> {
    let mut all = TopicPartitionList::new();
    for partition in partitions {
        all.add_partition(topic, *partition);
    }
    let committed = consumer.committed_offsets(all, REQUEST_TIMEOUT).map_err(|error| Error::from_kafka(&error))?;
    let mut ends = TopicPartitionList::new();
    for missing in committed.elements().iter().filter(|element| element.offset() == Offset::Invalid) {
        let watermarks = consumer.fetch_watermarks(topic, missing.partition(), REQUEST_TIMEOUT);
        let added = watermarks.and_then(|(_, end)| ends.add_partition_offset(topic, missing.partition(), Offset::Offset(end)));
        added.map_err(|error| Error::from_kafka(&error))?;
    }
    match ends.count() {
        0 => Ok(()),
        _ => consumer.commit(&ends, CommitMode::Sync).map_err(|error| Error::from_kafka(&error)),
    }
}

fn consumer_record(message: &BorrowedMessage<'_>) -> ConsumerRecord {
    let headers = message.headers().map_or_else(Vec::new, |headers| {
        headers.iter().map(|header| (header.key.to_owned(), header.value.unwrap_or_default().to_vec())).collect()
    });
    ConsumerRecord {
        partition: message.partition(),
        offset: message.offset(),
        key: message.key().map(<[u8]>::to_vec),
        value: message.payload().map(<[u8]>::to_vec),
        headers,
    }
}
