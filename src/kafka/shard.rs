//! One shard's producer: takes the shard over, publishes batches, and says what is known about each of them.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use rdkafka::Timestamp;
use rdkafka::error::{KafkaError, RDKafkaError, RDKafkaErrorCode};
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::future_producer::Delivery as Acknowledged;
use rdkafka::producer::{DeliveryFuture, FutureProducer, FutureRecord, Producer};
use uuid::Uuid;

use crate::failpoint::{self, Struck};

use super::client::{self, Context};
use super::{Delivered, Delivery, Error, Kafka, MARKER_TOPIC, Marker, Record, blocking, drop_aside};

/// One blocking step of a transaction. librdkafka goes on in the background, so a step that is late is asked again.
const STEP: Duration = Duration::from_secs(10);

/// All attempts at one step: within the time after which Kafka aborts a transaction itself.
const STEPS: Duration = Duration::from_secs(30);

/// A record that Kafka did not take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The session whose pointer it is.
    pub upload_id: Uuid,
    /// Sending it again cannot help until somebody changes something: its topic is gone, it is too large, … When
    /// false, the record is to blame only perhaps: send it again alone.
    pub permanent: bool,
    /// The same holds for every record of its topic.
    pub whole_topic: bool,
    /// Why, for the operator.
    pub reason: String,
}

/// A batch that was not published as a whole.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// Some records were refused; the shard stays usable.
    ///
    /// With exactly-once delivery nothing of the batch is published, and `delivered` is empty. With at-least-once
    /// delivery `delivered` is published, and what is neither there nor in `refused` was not sent.
    #[error("kafka refused {} records, the first: {}", refused.len(), refused.first().map_or("", |r| r.reason.as_str()))]
    Refused {
        /// What Kafka did not take.
        refused: Vec<Refusal>,
        /// What Kafka took all the same.
        delivered: Vec<Delivered>,
    },
    /// Nothing of the batch is published, no record is known to be at fault, and the shard stays usable. Also with
    /// at-least-once delivery, where a record may still have arrived unseen.
    #[error("nothing was published: {0}")]
    Retry(String),
    /// Nothing of the batch is published, because Kafka did not take its marker: no record is at fault. The shard stays
    /// usable once the marker topic is.
    #[error("nothing was published: {0}")]
    NoMarker(String),
    /// Another owner has taken the shard. Drop it; whether the batch is published, the new owner knows.
    #[error("another owner has taken the shard: {0}")]
    Fenced(String),
    /// Whether the batch is published is not known. Drop the shard, open it again and read its last marker.
    #[error("whether the batch is published is not known: {0}")]
    Lost(String),
}

impl From<Struck> for PublishError {
    /// As when the answer of a commit is lost.
    fn from(struck: Struck) -> Self {
        Self::Lost(struck.to_string())
    }
}

/// The right to publish a shard's pointers, until somebody else takes it.
pub struct Shard {
    kafka: Kafka,
    /// Always there, except while dropping.
    producer: Option<FutureProducer<Context>>,
    transactional_id: String,
    marker_partition: i32,
    /// Set while a batch is under way and for ever after one whose end is not known, or not awaited.
    unsettled: AtomicBool,
    /// Set when the producer failed for good before it was told to commit: nothing of that batch is published.
    is_spent: AtomicBool,
}

impl Shard {
    pub(super) async fn open(kafka: Kafka, transactional_id: &str, marker_partition: i32) -> Result<Self, Error> {
        let settings = kafka.settings().clone();
        let id = (kafka.delivery() == Delivery::ExactlyOnce).then(|| transactional_id.to_owned());
        let producer = blocking(move || {
            let producer = client::producer(&settings, id.as_deref())?;
            if id.is_some() {
                producer.init_transactions(STEP).map_err(|error| Error::from_kafka(&error))?;
            }
            Ok(producer)
        });
        Ok(Self {
            producer: Some(producer.await?),
            transactional_id: transactional_id.to_owned(),
            marker_partition,
            unsettled: AtomicBool::new(false),
            is_spent: AtomicBool::new(false),
            kafka,
        })
    }

    /// What this shard's last committed batch published. Fails rather than answer from a part of the log.
    pub async fn last_marker(&self) -> Result<Option<Marker>, Error> {
        self.kafka.last_marker(&self.transactional_id, self.marker_partition).await
    }

    /// Whether this shard must be taken anew before the next batch. Nothing is in doubt: whatever its last batch sent was
    /// not committed, and the next owner's fence ends it.
    pub fn is_spent(&self) -> bool {
        self.is_spent.load(Ordering::Acquire)
    }

    /// Publishes `records` and the marker of `batch`: with exactly-once delivery all in one transaction, else the marker
    /// first.
    ///
    /// The records are those that [`Kafka::place`] found a place for, and the deliveries are in their order. One batch at
    /// a time. Whoever stops awaiting this cannot know how it ended, and gets [`PublishError::Lost`] for every later batch.
    pub async fn publish(&self, batch: i64, records: &[Record]) -> Result<Vec<Delivered>, PublishError> {
        if self.unsettled.swap(true, Ordering::AcqRel) {
            return Err(PublishError::Lost("an earlier batch of this shard has not been settled".into()));
        }
        let published = match self.kafka.delivery() {
            Delivery::ExactlyOnce => self.publish_once(batch, records).await,
            Delivery::AtLeastOnce => self.publish_some(batch, records).await,
        };
        if !matches!(published, Err(PublishError::Lost(_) | PublishError::Fenced(_))) {
            self.unsettled.store(false, Ordering::Release);
        }
        published
    }

    async fn publish_once(&self, batch: i64, records: &[Record]) -> Result<Vec<Delivered>, PublishError> {
        if let Err(error) = self.step(|producer| producer.begin_transaction()).await {
            let broken = self.broken(&error);
            return Err(self.unsent(broken));
        }
        let sent = self.send(&records.iter().collect::<Vec<_>>()).await;
        if let Some(failed) = self.failure(records, &sent).await {
            return Err(self.abort(failed).await);
        }
        if let Err(struck) = failpoint::reach("relay.sent").await {
            return Err(self.abort(PublishError::Retry(struck.to_string())).await);
        }
        let published: Vec<Delivered> = sent.into_iter().flatten().collect();
        if let Err(failed) = self.send_marker(Marker { batch, published: published.clone() }).await {
            return Err(self.abort(failed).await);
        }
        if let Err(struck) = failpoint::reach("relay.listed").await {
            return Err(self.abort(PublishError::Retry(struck.to_string())).await);
        }
        // Once a commit was tried, an abort that succeeds proves nothing: librdkafka may have sent the commit, missed
        // the answer and begun a new epoch instead. Only the marker tells.
        self.step(|producer| producer.commit_transaction(STEP)).await.map_err(|error| self.broken(&error))?;
        failpoint::reach("relay.committed").await?;
        Ok(published)
    }

    async fn publish_some(&self, batch: i64, records: &[Record]) -> Result<Vec<Delivered>, PublishError> {
        // Before any record: so Kafka always knows of a number at least as high as that of any batch of which a record
        // was sent, and a database that was restored from a backup is noticed. What was published the marker cannot tell.
        if let Err(failed) = self.send_marker(Marker { batch, published: Vec::new() }).await {
            // Where the whole of Kafka was away, leaders may have moved: `place` finds out.
            records.iter().for_each(|record| self.kafka.doubt(&record.topic));
            return Err(failed);
        }
        let sent = self.send_in_order(records).await;
        failpoint::reach("relay.sent").await?;
        let in_part = sent.iter().any(Result::is_ok);
        match self.failure(records, &sent).await {
            None => Ok(sent.into_iter().flatten().collect()),
            Some(PublishError::Retry(reason)) if !in_part => Err(PublishError::Retry(reason)),
            // Those that failed without a reason of their own come after one of their key that did.
            Some(PublishError::Refused { refused, .. }) => {
                Err(PublishError::Refused { refused, delivered: sent.into_iter().flatten().collect() })
            }
            Some(PublishError::Retry(_)) => {
                let failed = records.iter().zip(&sent).filter_map(|(record, sent)| Some((record, sent.as_ref().err()?)));
                let refused = failed.map(|(record, error)| self.refusal(record, records, error)).collect();
                Err(PublishError::Refused { refused, delivered: sent.into_iter().flatten().collect() })
            }
            Some(failed) => Err(failed),
        }
    }

    /// Sends every record, then awaits every acknowledgement: a commit that has to wait for one costs 100 ms.
    async fn send(&self, records: &[&Record]) -> Vec<Result<Delivered, KafkaError>> {
        let now_ms = now_ms();
        let sent: Vec<_> = records.iter().map(|record| self.enqueue(record, now_ms)).collect();
        let mut results = Vec::with_capacity(records.len());
        for (record, sent) in records.iter().zip(sent) {
            results.push(match sent {
                Ok(delivery) => acknowledged(delivery).await.map(|delivery| Delivered {
                    upload_id: record.upload_id,
                    partition: delivery.partition,
                    offset: delivery.offset,
                    timestamp_ms: timestamp(delivery.timestamp, now_ms),
                }),
                Err(error) => Err(error),
            });
        }
        results
    }

    /// Sends a record only once those of its topic and key before it have arrived: there is no transaction to take a
    /// later one back when an earlier one is refused.
    async fn send_in_order(&self, records: &[Record]) -> Vec<Result<Delivered, KafkaError>> {
        let order = |record: &Record| record.key.clone().map(|key| (record.topic.clone(), key));
        let mut outcomes: Vec<Option<Result<Delivered, KafkaError>>> = records.iter().map(|_| None).collect();
        let mut waiting: Vec<usize> = (0..records.len()).collect();
        let mut failed = HashSet::new();
        while !waiting.is_empty() {
            let mut seen = HashSet::new();
            let (wave, later): (Vec<usize>, Vec<usize>) =
                waiting.into_iter().partition(|index| order(&records[*index]).is_none_or(|order| seen.insert(order)));
            let (held_up, wave): (Vec<usize>, Vec<usize>) =
                wave.into_iter().partition(|index| order(&records[*index]).is_some_and(|order| failed.contains(&order)));
            let sent = self.send(&wave.iter().map(|index| &records[*index]).collect::<Vec<_>>()).await;
            for (index, outcome) in wave.into_iter().zip(sent) {
                failed.extend(order(&records[index]).filter(|_| outcome.is_err()));
                outcomes[index] = Some(outcome);
            }
            for index in held_up {
                outcomes[index] = Some(Err(KafkaError::Canceled));
            }
            waiting = later;
        }
        outcomes.into_iter().map(|outcome| outcome.expect("every record was in a wave")).collect()
    }

    fn enqueue(&self, record: &Record, timestamp_ms: i64) -> Result<DeliveryFuture, KafkaError> {
        let headers = OwnedHeaders::new_with_capacity(record.headers.len());
        let headers =
            record.headers.iter().fold(headers, |headers, (key, value)| headers.insert(Header { key, value: Some(value) }));
        let message = FutureRecord {
            topic: &record.topic,
            partition: record.partition,
            payload: Some(&record.value),
            key: record.key.as_ref(),
            timestamp: Some(timestamp_ms),
            headers: Some(headers),
        };
        self.producer().send_result(message).map_err(|(error, _)| error)
    }

    async fn send_marker(&self, marker: Marker) -> Result<(), PublishError> {
        let value = serde_json::to_vec(&marker).expect("a marker has no map and no float, so it is always JSON");
        let record = FutureRecord::to(MARKER_TOPIC)
            .partition(self.marker_partition)
            .key(&self.transactional_id)
            .payload(&value)
            .timestamp(now_ms());
        let sent = match self.producer().send_result(record) {
            Ok(delivery) => acknowledged(delivery).await,
            Err((error, _)) => Err(error),
        };
        match sent {
            Ok(_) => Ok(()),
            Err(error) => {
                let cause = self.transaction_error().await.unwrap_or(error);
                Err(self.fatal().unwrap_or_else(|| PublishError::NoMarker(format!("{MARKER_TOPIC}: {}", reason(&cause)))))
            }
        }
    }

    /// What the failed records of a batch add up to; `None` when none failed.
    async fn failure(&self, records: &[Record], sent: &[Result<Delivered, KafkaError>]) -> Option<PublishError> {
        let first = sent.iter().find_map(|sent| sent.as_ref().err())?;
        if let Some(fatal) = self.fatal() {
            return Some(fatal);
        }
        let failed: Vec<(&Record, &KafkaError)> =
            records.iter().zip(sent).filter_map(|(record, sent)| Some((record, sent.as_ref().err()?))).collect();
        let refuse = |refused: Vec<Refusal>| Some(PublishError::Refused { refused, delivered: Vec::new() });
        if failed.iter().any(|(_, error)| blame(error).is_some()) {
            let blamed = failed.iter().filter(|(_, error)| blame(error).is_some());
            return refuse(blamed.map(|(record, error)| self.refusal(record, records, error)).collect());
        }
        // Perhaps a leader is gone: `place` finds out.
        failed.iter().for_each(|(record, _)| self.kafka.doubt(&record.topic));
        // A transaction that fails as a whole purges its records; why, only the transaction knows. For which topic, Kafka
        // told librdkafka, which does not tell us: every record may be to blame.
        let cause = self.transaction_error().await.unwrap_or_else(|| first.clone());
        if blame(&cause).is_some() {
            return refuse(records.iter().map(|record| self.refusal(record, records, &cause)).collect());
        }
        // Records of some topics failed by themselves, those of others did not: it is those topics.
        let (own, others): (Vec<_>, Vec<_>) = records.iter().zip(sent).partition(|(_, sent)| sent.as_ref().is_err_and(is_own));
        if !own.is_empty() && !others.iter().any(|(record, _)| own.iter().any(|(failed, _)| failed.topic == record.topic)) {
            let refused = own.into_iter().filter_map(|(record, sent)| Some((record, sent.as_ref().err()?)));
            let refused = refused.map(|(record, error)| Refusal { whole_topic: true, ..self.refusal(record, records, error) });
            return if others.is_empty() { Some(PublishError::Retry(reason(&cause))) } else { refuse(refused.collect()) };
        }
        Some(PublishError::Retry(reason(&cause)))
    }

    fn refusal(&self, record: &Record, batch: &[Record], error: &KafkaError) -> Refusal {
        if blame(error) == Some(Blame::Place) {
            // It was there a moment ago: `place` finds out whether it is gone.
            self.kafka.doubt(&record.topic);
        }
        // A broker judges the records of a partition together, so only a record that was alone is surely at fault.
        let of_topic = batch.iter().filter(|other| other.topic == record.topic).count();
        // What a transaction was refused for is said of all its topics.
        let is_known = !matches!(error, KafkaError::Transaction(_)) || of_topic == batch.len();
        Refusal {
            upload_id: record.upload_id,
            permanent: is_known && of_topic == 1 && matches!(blame(error), Some(Blame::Record | Blame::Topic)),
            whole_topic: is_known && blame(error) == Some(Blame::Topic),
            reason: reason(error),
        }
    }

    /// Gives up a transaction that was not told to commit, so that the shard is usable again.
    ///
    /// Where that fails too, nothing is in doubt: Kafka commits nothing without being told. The producer is spent, and the
    /// next one's fence aborts what is left. Kafka refuses even the abort where it refused the transaction's first topic:
    /// it knows of no transaction then.
    async fn abort(&self, failed: PublishError) -> PublishError {
        let failed = self.unsent(failed);
        if self.is_spent() || matches!(failed, PublishError::Fenced(_)) {
            return failed;
        }
        match self.step(|producer| producer.abort_transaction(STEP)).await {
            Ok(()) => failed,
            Err(error) => match self.broken(&error) {
                fenced @ PublishError::Fenced(_) => fenced,
                _ => {
                    self.is_spent.store(true, Ordering::Release);
                    failed
                }
            },
        }
    }

    /// What an error means of a transaction that was not told to commit: nothing is lost, but perhaps the producer.
    fn unsent(&self, failed: PublishError) -> PublishError {
        match failed {
            PublishError::Lost(reason) => {
                self.is_spent.store(true, Ordering::Release);
                PublishError::Retry(reason)
            }
            failed => failed,
        }
    }

    /// Runs one blocking step of a transaction, again while it is only late.
    async fn step<F>(&self, call: F) -> Result<(), KafkaError>
    where
        F: Fn(&FutureProducer<Context>) -> Result<(), KafkaError> + Send + 'static,
    {
        let producer = self.producer().clone();
        let deadline = Instant::now() + STEPS;
        let steps = tokio::task::spawn_blocking(move || {
            loop {
                match call(&producer) {
                    Err(KafkaError::Transaction(error)) if error.is_retriable() && Instant::now() < deadline => {
                        // An answer, not a time-out, may come at once; do not ask in a tight loop.
                        std::thread::sleep(Duration::from_millis(20));
                    }
                    ended => return ended,
                }
            }
        });
        steps.await.unwrap_or(Err(KafkaError::Canceled))
    }

    /// Why the transaction has to be aborted. Beginning a second one never succeeds; it gives the reason away.
    async fn transaction_error(&self) -> Option<KafkaError> {
        if self.kafka.delivery() == Delivery::AtLeastOnce {
            return None;
        }
        match self.step(|producer| producer.begin_transaction()).await {
            Err(KafkaError::Transaction(error)) if error.txn_requires_abort() => Some(KafkaError::Transaction(error)),
            _ => None,
        }
    }

    /// The error after which this producer does nothing any more.
    fn fatal(&self) -> Option<PublishError> {
        let (code, reason) = self.producer().client().fatal_error()?;
        Some(if is_fence(code) { PublishError::Fenced(reason) } else { PublishError::Lost(reason) })
    }

    /// What a failed step of a transaction means.
    fn broken(&self, error: &KafkaError) -> PublishError {
        self.fatal().unwrap_or_else(|| match error {
            KafkaError::Transaction(error) if is_fence(RDKafkaError::code(error)) => PublishError::Fenced(error.to_string()),
            _ => PublishError::Lost(error.to_string()),
        })
    }

    fn producer(&self) -> &FutureProducer<Context> {
        self.producer.as_ref().expect("the producer is there until the shard is dropped")
    }
}

impl Drop for Shard {
    fn drop(&mut self) {
        if let Some(producer) = self.producer.take() {
            drop_aside(producer);
        }
    }
}

/// What about a record is to blame for an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Blame {
    /// Its topic or partition, as far as librdkafka has heard.
    Place,
    /// Its topic, whatever the record is.
    Topic,
    /// The record, or what the broker may do with it.
    Record,
}

fn blame(error: &KafkaError) -> Option<Blame> {
    use RDKafkaErrorCode as Code;
    match error.rdkafka_error_code()? {
        Code::UnknownTopic | Code::UnknownPartition | Code::UnknownTopicOrPartition => Some(Blame::Place),
        Code::MessageSizeTooLarge
        | Code::MessageBatchTooLarge
        | Code::InvalidMessageSize
        | Code::InvalidMessage
        | Code::InvalidRecord
        | Code::InvalidTimestamp
        | Code::InvalidRequiredAcks
        | Code::PolicyViolation
        | Code::UnsupportedForMessageFormat => Some(Blame::Record),
        Code::InvalidTopic | Code::TopicAuthorizationFailed => Some(Blame::Topic),
        _ => None,
    }
}

/// Whether a record failed by itself, not because the rest of its transaction or of its key did.
fn is_own(error: &KafkaError) -> bool {
    use RDKafkaErrorCode as Code;
    !matches!(error.rdkafka_error_code(), None | Some(Code::PurgeQueue | Code::PurgeInflight))
}

/// An error in words that are the same each time: librdkafka adds addresses and durations to those of a transaction.
fn reason(error: &KafkaError) -> String {
    match error {
        KafkaError::Transaction(error) => format!("Transaction error: {:?} ({})", error.code(), error.code()),
        error => error.to_string(),
    }
}

fn is_fence(code: RDKafkaErrorCode) -> bool {
    use RDKafkaErrorCode as Code;
    matches!(code, Code::Fenced | Code::ProducerFenced | Code::InvalidProducerEpoch)
}

async fn acknowledged(delivery: DeliveryFuture) -> Result<Acknowledged, KafkaError> {
    match delivery.await {
        Ok(Ok(delivery)) => Ok(delivery),
        Ok(Err((error, _))) => Err(error),
        Err(_) => Err(KafkaError::Canceled),
    }
}

pub(super) fn now_ms() -> i64 {
    let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since_1970.as_millis()).unwrap_or(i64::MAX)
}

/// The time a consumer will see: the broker's where the topic is set up so, else the one that was sent.
fn timestamp(acknowledged: Timestamp, sent_ms: i64) -> i64 {
    const DAY_MS: i64 = 86_400_000;
    match acknowledged {
        // librdkafka's mock cluster answers the time 1234 but keeps the one that was sent.
        Timestamp::LogAppendTime(at_ms) if at_ms >= sent_ms - DAY_MS => at_ms,
        _ => sent_ms,
    }
}
