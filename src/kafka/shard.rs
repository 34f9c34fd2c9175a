//! The producer of one shard: fences the previous producer, publishes batches, and reports the outcome of each batch.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use rdkafka::error::{KafkaError, RDKafkaError, RDKafkaErrorCode};
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{BaseProducer, FutureRecord, Producer};
use uuid::Uuid;

use crate::failpoint::{self, InjectedError};

use super::client::Context;
use super::delivery::{commit, delivered, delivery_report};
use super::producer::{self, Acknowledgement, PolledProducer, send};
use super::{Delivery, Error, Kafka, MARKER_TOPIC, Marker, Record, RecordMetadata, drop_blocking, run_blocking};

/// The limit for one call of a transaction step. librdkafka continues in the background, so the call can be repeated.
const STEP_TIMEOUT: Duration = Duration::from_secs(10);

/// The limit for all calls of one step. It is shorter than the time after which Kafka itself aborts a transaction.
const TOTAL_STEP_TIMEOUT: Duration = Duration::from_secs(30);

/// A record that Kafka did not accept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordRejection {
    /// The session of the pointer.
    pub upload_id: Uuid,
    /// A retry helps only after a change in Kafka: the topic is missing, the record is too large, … If `false`, the record
    /// may not be the cause: the relay sends it again alone.
    pub permanent: bool,
    /// Kafka rejects every record of the topic.
    pub whole_topic: bool,
    /// The reason, for the operator.
    pub reason: String,
}

/// Why a batch was not published completely.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// Kafka rejected some records. The producer stays usable.
    ///
    /// With exactly-once delivery nothing of the batch is published, and `delivered` is empty. With at-least-once delivery
    /// the `delivered` records are published, and a record in neither list was not sent.
    #[error("kafka rejected {} records, the first: {}", rejected.len(), rejected.first().map_or("", |r| r.reason.as_str()))]
    Rejected {
        /// The records that Kafka did not accept.
        rejected: Vec<RecordRejection>,
        /// The records that were published.
        delivered: Vec<RecordMetadata>,
    },
    /// Nothing of the batch is published, and no record is known to be the cause. The producer stays usable. With
    /// at-least-once delivery, a record may still have been published without an acknowledgement.
    #[error("nothing was published: {0}")]
    Retry(String),
    /// Nothing of the batch is published, because Kafka did not accept its marker. No record is the cause. The producer is
    /// usable again when the marker topic is.
    #[error("nothing was published, because the marker could not be written: {0}")]
    MarkerNotWritten(String),
    /// Another relay has taken over the shard. The caller drops this producer. The new owner finds out whether the batch is
    /// published.
    #[error("kafka fenced the producer of this shard: {0}")]
    Fenced(String),
    /// The batch may or may not be published. The caller drops this producer, opens a new one and reads the last marker.
    #[error("it is not known whether the batch was published: {0}")]
    OutcomeUnknown(String),
}

impl From<InjectedError> for PublishError {
    /// An injected error stands for a commit whose response is lost.
    fn from(error: InjectedError) -> Self {
        Self::OutcomeUnknown(error.to_string())
    }
}

/// Publishes the pointers of one shard, until another producer fences it.
pub struct ShardProducer {
    kafka: Kafka,
    /// `None` only during drop.
    producer: Option<PolledProducer>,
    transactional_id: String,
    marker_partition: i32,
    /// Set while a batch is running. It stays set if the batch was not awaited or its outcome is unknown.
    has_unknown_outcome: AtomicBool,
    /// Set when the producer failed permanently before a commit was sent. Nothing of that batch is published.
    needs_replacement: AtomicBool,
}

impl ShardProducer {
    pub(super) async fn open(kafka: Kafka, transactional_id: &str, marker_partition: i32) -> Result<Self, Error> {
        let settings = kafka.settings().clone();
        let id = (kafka.delivery() == Delivery::ExactlyOnce).then(|| transactional_id.to_owned());
        let producer = run_blocking(move || {
            let producer = producer::connect(&settings, id.as_deref())?;
            if id.is_some() {
                producer.init_transactions(STEP_TIMEOUT).map_err(|error| Error::from_kafka(&error))?;
            }
            Ok(producer)
        });
        Ok(Self {
            producer: Some(producer.await?),
            transactional_id: transactional_id.to_owned(),
            marker_partition,
            has_unknown_outcome: AtomicBool::new(false),
            needs_replacement: AtomicBool::new(false),
            kafka,
        })
    }

    /// The marker of this shard's last committed batch. It fails if it cannot read the complete log.
    pub async fn last_marker(&self) -> Result<Option<Marker>, Error> {
        self.kafka.last_marker(&self.transactional_id, self.marker_partition).await
    }

    /// Whether this producer must be replaced before the next batch. The outcome is known: its last batch was not committed,
    /// and the next producer's fence aborts the transaction.
    pub fn needs_replacement(&self) -> bool {
        self.needs_replacement.load(Ordering::Acquire)
    }

    /// Publishes `records` and the marker of `batch`. With exactly-once delivery all are in one transaction; otherwise the
    /// marker is sent first.
    ///
    /// The records come from [`Kafka::assign_partitions`], and the returned metadata is in their order. Only one batch runs
    /// at a time. A caller that drops this future cannot know the outcome. Every later batch then fails with
    /// [`PublishError::OutcomeUnknown`].
    pub async fn publish(&self, batch: i64, records: &[Record]) -> Result<Vec<RecordMetadata>, PublishError> {
        if self.has_unknown_outcome.swap(true, Ordering::AcqRel) {
            return Err(PublishError::OutcomeUnknown("the outcome of an earlier batch of this producer is not known".into()));
        }
        let published = match self.kafka.delivery() {
            Delivery::ExactlyOnce => self.publish_exactly_once(batch, records).await,
            Delivery::AtLeastOnce => self.publish_at_least_once(batch, records).await,
        };
        if !matches!(published, Err(PublishError::OutcomeUnknown(_) | PublishError::Fenced(_))) {
            self.has_unknown_outcome.store(false, Ordering::Release);
        }
        published
    }

    async fn publish_exactly_once(&self, batch: i64, records: &[Record]) -> Result<Vec<RecordMetadata>, PublishError> {
        if let Err(error) = self.step(|producer| producer.begin_transaction()).await {
            let failed = self.step_failure(&error);
            return Err(self.without_commit(failed));
        }
        // librdkafka registers the partitions of a transaction with Kafka, and collects them for some milliseconds first. So
        // the marker is sent together with the records: a second round of sends would wait for a second registration.
        let now_ms = now_ms();
        let enqueued: Vec<_> = records.iter().map(|record| self.enqueue(record, now_ms)).collect();
        let marker = self.enqueue_marker(&Marker::of(batch, records, now_ms), now_ms);
        let sent = delivered(records.iter(), enqueued, now_ms).await;
        let marker_sent = delivery_report(marker).await.map(drop);
        if let Some(failed) = self.transaction_failure(records, &sent, marker_sent).await {
            return Err(self.abort(failed).await);
        }
        if let Err(error) = failpoint::reach("relay.sent").await {
            return Err(self.abort(PublishError::Retry(error.to_string())).await);
        }
        // After a commit attempt, a successful abort proves nothing: librdkafka may have sent the commit, lost the response
        // and started a new epoch. Only the marker shows whether the transaction was committed.
        self.step(|producer| commit(producer, STEP_TIMEOUT)).await.map_err(|error| self.step_failure(&error))?;
        failpoint::reach("relay.committed").await?;
        Ok(sent.into_iter().flatten().collect())
    }

    async fn publish_at_least_once(&self, batch: i64, records: &[Record]) -> Result<Vec<RecordMetadata>, PublishError> {
        // The marker goes first. So Kafka always has the number of every batch of which a record was sent, and a restored
        // database is detected. This marker cannot list the published records.
        let marker = self.enqueue_marker(&Marker { batch, published: Vec::new() }, now_ms());
        if let Err(error) = delivery_report(marker).await {
            let failed = self.marker_failure(error).await;
            // After an outage of Kafka, leaders may have moved. `assign_partitions` then needs fresh metadata.
            records.iter().for_each(|record| self.kafka.invalidate_topic(&record.topic));
            return Err(failed);
        }
        let sent = self.send_in_order(records).await;
        failpoint::reach("relay.sent").await?;
        let any_delivered = sent.iter().any(Result::is_ok);
        match self.batch_failure(records, &sent).await {
            None => Ok(sent.into_iter().flatten().collect()),
            Some(PublishError::Retry(reason)) if !any_delivered => Err(PublishError::Retry(reason)),
            // Records that were canceled are in neither list: an earlier record of their key failed.
            Some(PublishError::Rejected { rejected, .. }) => {
                Err(PublishError::Rejected { rejected, delivered: sent.into_iter().flatten().collect() })
            }
            Some(PublishError::Retry(_)) => {
                let failed = records.iter().zip(&sent).filter_map(|(record, sent)| Some((record, sent.as_ref().err()?)));
                let rejected = failed.map(|(record, error)| self.rejection(record, records, error)).collect();
                Err(PublishError::Rejected { rejected, delivered: sent.into_iter().flatten().collect() })
            }
            Some(failed) => Err(failed),
        }
    }

    /// Sends a record only after all earlier records of its topic and key are acknowledged. Without a transaction, a later
    /// record cannot be taken back if an earlier record is rejected.
    async fn send_in_order(&self, records: &[Record]) -> Vec<Result<RecordMetadata, KafkaError>> {
        let order = |record: &Record| record.key.clone().map(|key| (record.topic.clone(), key));
        let mut outcomes: Vec<Option<Result<RecordMetadata, KafkaError>>> = records.iter().map(|_| None).collect();
        let mut waiting: Vec<usize> = (0..records.len()).collect();
        let mut failed = HashSet::new();
        while !waiting.is_empty() {
            let mut seen = HashSet::new();
            let (first_of_key, later): (Vec<usize>, Vec<usize>) =
                waiting.into_iter().partition(|index| order(&records[*index]).is_none_or(|order| seen.insert(order)));
            let (blocked, ready): (Vec<usize>, Vec<usize>) =
                first_of_key.into_iter().partition(|index| order(&records[*index]).is_some_and(|order| failed.contains(&order)));
            let now_ms = now_ms();
            let enqueued = ready.iter().map(|index| self.enqueue(&records[*index], now_ms)).collect();
            let sent = delivered(ready.iter().map(|index| &records[*index]), enqueued, now_ms).await;
            for (index, outcome) in ready.into_iter().zip(sent) {
                failed.extend(order(&records[index]).filter(|_| outcome.is_err()));
                outcomes[index] = Some(outcome);
            }
            for index in blocked {
                outcomes[index] = Some(Err(KafkaError::Canceled));
            }
            waiting = later;
        }
        outcomes.into_iter().map(|outcome| outcome.expect("the loop handles every record")).collect()
    }

    fn enqueue(&self, record: &Record, timestamp_ms: i64) -> Result<Acknowledgement, KafkaError> {
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
        send(self.producer(), message)
    }

    fn enqueue_marker(&self, marker: &Marker, timestamp_ms: i64) -> Result<Acknowledgement, KafkaError> {
        let value = serde_json::to_vec(marker).expect("a marker has no map and no float, so it always serializes");
        let record = FutureRecord::to(MARKER_TOPIC)
            .partition(self.marker_partition)
            .key(&self.transactional_id)
            .payload(&value)
            .timestamp(timestamp_ms);
        send(self.producer(), record)
    }

    /// The failure of a batch whose marker was not written, although no record is the cause.
    async fn marker_failure(&self, error: KafkaError) -> PublishError {
        let cause = self.transaction_error().await.unwrap_or(error);
        let failed = || PublishError::MarkerNotWritten(format!("{MARKER_TOPIC}: {}", reason(&cause)));
        self.fatal_error().unwrap_or_else(failed)
    }

    /// The failure of a transaction, from the outcomes of its records and its marker; `None` if all were delivered. If a
    /// record failed on its own, the record is the cause.
    async fn transaction_failure(
        &self,
        records: &[Record],
        sent: &[Result<RecordMetadata, KafkaError>],
        marker: Result<(), KafkaError>,
    ) -> Option<PublishError> {
        let Err(error) = marker else { return self.batch_failure(records, sent).await };
        let has_own_failure = sent.iter().any(|sent| sent.as_ref().is_err_and(is_own_failure));
        if !has_own_failure && (is_own_failure(&error) || sent.iter().all(Result::is_ok)) {
            return Some(self.marker_failure(error).await);
        }
        let failed = self.batch_failure(records, sent).await;
        // Kafka rejected a topic of the transaction, and librdkafka does not say which. It may be the marker topic.
        if !has_own_failure && matches!(failed, Some(PublishError::Rejected { .. })) {
            return self.marker_topic_failure().await.map(PublishError::MarkerNotWritten).or(failed);
        }
        failed
    }

    /// Why the marker topic cannot be written, if a transaction with only a record of this topic fails too.
    async fn marker_topic_failure(&self) -> Option<String> {
        if let Ok(None) = self.kafka.marker_partition_count().await {
            return Some(format!("kafka has no topic {MARKER_TOPIC}"));
        }
        let written = self.kafka.write_probe(&format!("{}.check", self.transactional_id)).await;
        written.err().map(|error| error.to_string())
    }

    /// The failure of a batch, from the outcomes of its records; `None` if no record failed.
    async fn batch_failure(&self, records: &[Record], sent: &[Result<RecordMetadata, KafkaError>]) -> Option<PublishError> {
        let first = sent.iter().find_map(|sent| sent.as_ref().err())?;
        if let Some(fatal) = self.fatal_error() {
            return Some(fatal);
        }
        let failed: Vec<(&Record, &KafkaError)> =
            records.iter().zip(sent).filter_map(|(record, sent)| Some((record, sent.as_ref().err()?))).collect();
        let reject = |rejected: Vec<RecordRejection>| Some(PublishError::Rejected { rejected, delivered: Vec::new() });
        if failed.iter().any(|(_, error)| rejection_cause(error).is_some()) {
            let at_fault = failed.iter().filter(|(_, error)| rejection_cause(error).is_some());
            return reject(at_fault.map(|(record, error)| self.rejection(record, records, error)).collect());
        }
        // A leader may have moved. `assign_partitions` then needs fresh metadata.
        failed.iter().for_each(|(record, _)| self.kafka.invalidate_topic(&record.topic));
        // If the whole transaction fails, librdkafka purges its records, and only the transaction has the cause. Kafka names
        // the topic to librdkafka, but librdkafka does not pass it on, so any record may be the cause.
        let cause = self.transaction_error().await.unwrap_or_else(|| first.clone());
        if rejection_cause(&cause).is_some() {
            return reject(records.iter().map(|record| self.rejection(record, records, &cause)).collect());
        }
        // If all records of some topics failed on their own and no record of another topic did, these topics are the cause.
        let (own, others): (Vec<_>, Vec<_>) =
            records.iter().zip(sent).partition(|(_, sent)| sent.as_ref().is_err_and(is_own_failure));
        if !own.is_empty() && !others.iter().any(|(record, _)| own.iter().any(|(failed, _)| failed.topic == record.topic)) {
            let rejected = own.into_iter().filter_map(|(record, sent)| Some((record, sent.as_ref().err()?)));
            let rejected =
                rejected.map(|(record, error)| RecordRejection { whole_topic: true, ..self.rejection(record, records, error) });
            return if others.is_empty() { Some(PublishError::Retry(reason(&cause))) } else { reject(rejected.collect()) };
        }
        Some(PublishError::Retry(reason(&cause)))
    }

    fn rejection(&self, record: &Record, batch: &[Record], error: &KafkaError) -> RecordRejection {
        if rejection_cause(error) == Some(RejectionCause::UnknownPartition) {
            // The partition existed a moment ago. `assign_partitions` then needs fresh metadata.
            self.kafka.invalidate_topic(&record.topic);
        }
        // Kafka validates the records of a partition together, so only a record that was sent alone is certainly at fault.
        let of_topic = batch.iter().filter(|other| other.topic == record.topic).count();
        // The error of a transaction does not say which of its topics is the cause.
        let is_known = !matches!(error, KafkaError::Transaction(_)) || of_topic == batch.len();
        let cause = rejection_cause(error);
        RecordRejection {
            upload_id: record.upload_id,
            permanent: is_known && of_topic == 1 && matches!(cause, Some(RejectionCause::Record | RejectionCause::Topic)),
            whole_topic: is_known && cause == Some(RejectionCause::Topic),
            reason: reason(error),
        }
    }

    /// Aborts a transaction for which no commit was sent, so that the producer is usable again.
    ///
    /// If the abort fails too, the outcome is still known, because Kafka commits nothing without a commit request. The
    /// producer must be replaced, and the next producer's fence aborts the transaction. Kafka rejects the abort if it
    /// rejected the first topic of the transaction: then it has no record of the transaction.
    async fn abort(&self, failed: PublishError) -> PublishError {
        let failed = self.without_commit(failed);
        if self.needs_replacement() || matches!(failed, PublishError::Fenced(_)) {
            return failed;
        }
        match self.step(|producer| producer.abort_transaction(STEP_TIMEOUT)).await {
            Ok(()) => failed,
            Err(error) => match self.step_failure(&error) {
                fenced @ PublishError::Fenced(_) => fenced,
                _ => {
                    self.needs_replacement.store(true, Ordering::Release);
                    failed
                }
            },
        }
    }

    /// The meaning of an error before a commit was sent: the outcome is known, but the producer may be unusable.
    fn without_commit(&self, failed: PublishError) -> PublishError {
        match failed {
            PublishError::OutcomeUnknown(reason) => {
                self.needs_replacement.store(true, Ordering::Release);
                PublishError::Retry(reason)
            }
            failed => failed,
        }
    }

    /// Runs one blocking step of a transaction, and repeats it while the error is retriable.
    async fn step<F>(&self, call: F) -> Result<(), KafkaError>
    where
        F: Fn(&BaseProducer<Context>) -> Result<(), KafkaError> + Send + 'static,
    {
        let producer = self.producer().clone();
        let deadline = Instant::now() + TOTAL_STEP_TIMEOUT;
        let steps = tokio::task::spawn_blocking(move || {
            loop {
                match call(&producer) {
                    Err(KafkaError::Transaction(error)) if error.is_retriable() && Instant::now() < deadline => {
                        // Kafka may return the error at once, so pause to avoid a busy loop.
                        std::thread::sleep(Duration::from_millis(20));
                    }
                    result => return result,
                }
            }
        });
        steps.await.unwrap_or(Err(KafkaError::Canceled))
    }

    /// Why the transaction must be aborted. The call to begin a second transaction always fails, with this reason.
    async fn transaction_error(&self) -> Option<KafkaError> {
        if self.kafka.delivery() == Delivery::AtLeastOnce {
            return None;
        }
        match self.step(|producer| producer.begin_transaction()).await {
            Err(KafkaError::Transaction(error)) if error.txn_requires_abort() => Some(KafkaError::Transaction(error)),
            _ => None,
        }
    }

    /// The fatal error of librdkafka's producer, after which it accepts no more calls.
    fn fatal_error(&self) -> Option<PublishError> {
        let (code, reason) = self.producer().client().fatal_error()?;
        Some(if is_fencing_code(code) { PublishError::Fenced(reason) } else { PublishError::OutcomeUnknown(reason) })
    }

    /// The meaning of a failed step of a transaction.
    fn step_failure(&self, error: &KafkaError) -> PublishError {
        self.fatal_error().unwrap_or_else(|| match error {
            KafkaError::Transaction(error) if is_fencing_code(RDKafkaError::code(error)) => {
                PublishError::Fenced(error.to_string())
            }
            _ => PublishError::OutcomeUnknown(error.to_string()),
        })
    }

    fn producer(&self) -> &PolledProducer {
        self.producer.as_ref().expect("only drop takes the producer")
    }
}

impl Drop for ShardProducer {
    fn drop(&mut self) {
        if let Some(producer) = self.producer.take() {
            drop_blocking(producer);
        }
    }
}

/// The part of a record that makes Kafka reject it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RejectionCause {
    /// librdkafka's metadata lacks the topic or the partition.
    UnknownPartition,
    /// Kafka rejects every record of the topic.
    Topic,
    /// Kafka rejects this record.
    Record,
}

fn rejection_cause(error: &KafkaError) -> Option<RejectionCause> {
    use RDKafkaErrorCode as Code;
    match error.rdkafka_error_code()? {
        Code::UnknownTopic | Code::UnknownPartition | Code::UnknownTopicOrPartition => Some(RejectionCause::UnknownPartition),
        Code::MessageSizeTooLarge
        | Code::MessageBatchTooLarge
        | Code::InvalidMessageSize
        | Code::InvalidMessage
        | Code::InvalidRecord
        | Code::InvalidTimestamp
        | Code::InvalidRequiredAcks
        | Code::PolicyViolation
        | Code::UnsupportedForMessageFormat => Some(RejectionCause::Record),
        Code::InvalidTopic | Code::TopicAuthorizationFailed => Some(RejectionCause::Topic),
        _ => None,
    }
}

/// Whether a record failed on its own, and not because another record of its transaction or key failed.
fn is_own_failure(error: &KafkaError) -> bool {
    use RDKafkaErrorCode as Code;
    !matches!(error.rdkafka_error_code(), None | Some(Code::PurgeQueue | Code::PurgeInflight))
}

/// The text of an error, equal for equal errors: librdkafka adds addresses and durations to transaction errors.
fn reason(error: &KafkaError) -> String {
    match error {
        KafkaError::Transaction(error) => format!("Transaction error: {:?} ({})", error.code(), error.code()),
        error => error.to_string(),
    }
}

fn is_fencing_code(code: RDKafkaErrorCode) -> bool {
    use RDKafkaErrorCode as Code;
    matches!(code, Code::Fenced | Code::ProducerFenced | Code::InvalidProducerEpoch)
}

pub(super) fn now_ms() -> i64 {
    let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since_1970.as_millis()).unwrap_or(i64::MAX)
}
