//! Following a topic as its consumers do: committed records, from where the group left off or from an end.

use std::sync::Arc;
use std::time::Duration;

use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer as _};
use rdkafka::error::KafkaError;
use rdkafka::message::{BorrowedMessage, Headers as _, Message as _};
use rdkafka::{Offset, TopicPartitionList};

use super::client::{self, Context};
use super::{Error, Settings, blocking, drop_aside};

/// One look for the next record.
const LOOK: Duration = Duration::from_millis(500);
/// How long Kafka may take to show that it is there.
const PULSE: Duration = Duration::from_secs(2);
/// How long Kafka may take to say where a topic is, and to note a place.
const ANSWER: Duration = Duration::from_secs(10);

/// Where to begin without a place that was noted before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// With the oldest record that the topic retains.
    Earliest,
    /// With the next one that comes.
    Latest,
}

/// A record as it came.
#[derive(Debug, Clone)]
pub struct Incoming {
    /// Where it is.
    pub partition: i32,
    /// Where it is.
    pub offset: i64,
    /// Its key.
    pub key: Option<Vec<u8>>,
    /// Its value; none is a tombstone.
    pub value: Option<Vec<u8>>,
    /// Its headers, in order.
    pub headers: Vec<(String, Vec<u8>)>,
}

/// A consumer of one topic.
pub struct Follower {
    /// Always there, except while dropping.
    consumer: Option<Arc<BaseConsumer<Context>>>,
    topic: String,
    /// Whether places are noted.
    grouped: bool,
}

impl Follower {
    /// Begins to follow `topic`; with a group its places are Kafka's to keep, and its members share the partitions.
    ///
    /// # Errors
    /// Where Kafka does not answer, or has no such topic.
    pub async fn begin(settings: &Settings, topic: &str, group: Option<&str>, start: Start) -> Result<Self, Error> {
        let (settings, topic, group) = (settings.clone(), topic.to_owned(), group.map(str::to_owned));
        blocking(move || {
            let consumer = client::follower(&settings, group.as_deref(), start == Start::Earliest)?;
            let metadata = consumer.fetch_metadata(Some(&topic), ANSWER).map_err(|error| Error::from_kafka(&error))?;
            let partitions = metadata.topics().first().map(|topic| topic.partitions()).unwrap_or_default();
            if partitions.is_empty() {
                return Err(Error::Refused(format!("kafka has no topic {topic}")));
            }
            let partitions: Vec<i32> = partitions.iter().map(|partition| partition.id()).collect();
            if group.is_some() && start == Start::Latest {
                hold(&consumer, &topic, &partitions)?;
            }
            match group.is_some() {
                true => consumer.subscribe(&[&topic]),
                false => {
                    let offset = if start == Start::Earliest { Offset::Beginning } else { Offset::End };
                    let mut all = TopicPartitionList::new();
                    for partition in partitions {
                        all.add_partition_offset(&topic, partition, offset).map_err(|error| Error::from_kafka(&error))?;
                    }
                    consumer.assign(&all)
                }
            }
            .map_err(|error| Error::from_kafka(&error))?;
            Ok(Self { consumer: Some(Arc::new(consumer)), topic, grouped: group.is_some() })
        })
        .await
    }

    /// The next record, if one came within a moment.
    ///
    /// # Errors
    /// [`Error::Unreachable`] while Kafka is away: asking again goes on where it was. Else what does not pass by itself.
    pub async fn next(&self) -> Result<Option<Incoming>, Error> {
        let consumer = self.consumer();
        blocking(move || match consumer.poll(LOOK) {
            None => Ok(None),
            Some(Ok(message)) => Ok(Some(incoming(&message))),
            Some(Err(KafkaError::PartitionEOF(_))) => Ok(None),
            Some(Err(error)) => Err(Error::from_kafka(&error)),
        })
        .await
    }

    /// Whether Kafka answers.
    pub async fn is_reached(&self) -> bool {
        let (consumer, topic) = (self.consumer(), self.topic.clone());
        let asked = blocking(move || consumer.fetch_metadata(Some(&topic), PULSE).map_err(|error| Error::from_kafka(&error)));
        asked.await.is_ok()
    }

    /// Notes that everything up to this record is done. Without a group there is no place to note it.
    ///
    /// # Errors
    /// Where Kafka does not take it, for instance because the partition is another member's now.
    pub async fn done(&self, record: &Incoming) -> Result<(), Error> {
        if !self.grouped {
            return Ok(());
        }
        let (consumer, topic, partition, offset) = (self.consumer(), self.topic.clone(), record.partition, record.offset);
        blocking(move || {
            let mut place = TopicPartitionList::new();
            let noted = place.add_partition_offset(&topic, partition, Offset::Offset(offset + 1));
            noted.and_then(|()| consumer.commit(&place, CommitMode::Sync)).map_err(|error| Error::from_kafka(&error))
        })
        .await
    }

    /// Leaves the group, so that its other members, or the next one, need not wait until this one is given up.
    pub async fn end(mut self) {
        if let Some(consumer) = self.consumer.take() {
            // Dropping says goodbye, and waits for the answer.
            let _ = tokio::task::spawn_blocking(move || drop(consumer)).await;
        }
    }

    fn consumer(&self) -> Arc<BaseConsumer<Context>> {
        Arc::clone(self.consumer.as_ref().expect("the consumer is there until the follower is dropped"))
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        if let Some(consumer) = self.consumer.take() {
            drop_aside(consumer);
        }
    }
}

/// Notes the end as the group's place wherever it has none: without a place it would begin at the end again when it comes
/// back, behind what it has not done.
fn hold(consumer: &BaseConsumer<Context>, topic: &str, partitions: &[i32]) -> Result<(), Error> {
    let mut all = TopicPartitionList::new();
    for partition in partitions {
        all.add_partition(topic, *partition);
    }
    let noted = consumer.committed_offsets(all, ANSWER).map_err(|error| Error::from_kafka(&error))?;
    let mut places = TopicPartitionList::new();
    for place in noted.elements().iter().filter(|place| place.offset() == Offset::Invalid) {
        let ends = consumer.fetch_watermarks(topic, place.partition(), ANSWER);
        let added = ends.and_then(|(_, end)| places.add_partition_offset(topic, place.partition(), Offset::Offset(end)));
        added.map_err(|error| Error::from_kafka(&error))?;
    }
    match places.count() {
        0 => Ok(()),
        _ => consumer.commit(&places, CommitMode::Sync).map_err(|error| Error::from_kafka(&error)),
    }
}

fn incoming(message: &BorrowedMessage<'_>) -> Incoming {
    let headers = message.headers().map_or_else(Vec::new, |headers| {
        headers.iter().map(|header| (header.key.to_owned(), header.value.unwrap_or_default().to_vec())).collect()
    });
    Incoming {
        partition: message.partition(),
        offset: message.offset(),
        key: message.key().map(<[u8]>::to_vec),
        value: message.payload().map(<[u8]>::to_vec),
        headers,
    }
}
