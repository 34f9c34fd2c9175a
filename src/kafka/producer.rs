//! A producer whose acknowledgements can be awaited.
//!
//! `FutureProducer` of the crate does the same, but its thread polls for 100 ms each, and the last part of a millisecond of each
//! poll is a busy loop. With a producer for each shard, an idle broker used 2 to 4 % of a core for that.

use std::sync::Arc;
use std::time::Duration;

use rdkafka::Message as _;
use rdkafka::error::KafkaError;
use rdkafka::message::{DeliveryResult, ToBytes};
use rdkafka::producer::future_producer::Delivery as DeliveryReport;
use rdkafka::producer::{BaseProducer, BaseRecord, FutureRecord, ProducerContext};
use tokio::sync::oneshot;

use super::client::{self, Context};
use super::{Error, Settings};

/// Defaults that an operator may change, beside those of all clients. Waiting for more records would only add latency, because
/// the relay sends whole batches.
const DEFAULTS: [(&str, &str, &str); 5] = [
    ("linger.ms", "queue.buffering.max.ms", "0"),
    ("message.timeout.ms", "delivery.timeout.ms", "10000"),
    ("request.timeout.ms", "", "10000"),
    ("topic.metadata.propagation.max.ms", "", "2000"),
    ("transaction.timeout.ms", "", "60000"),
];

/// How long one call polls for events. An event is handled at once. A client that was dropped is destroyed after at most this
/// time.
const POLL_TIMEOUT: Duration = Duration::from_secs(5);

/// A producer that is polled by a thread of its own until its last owner drops it.
pub(super) type PolledProducer = Arc<BaseProducer<Context>>;

/// The outcome of a record that was enqueued. It is an error of the receiver if the producer is destroyed first.
pub(super) type Acknowledgement = oneshot::Receiver<Result<DeliveryReport, KafkaError>>;

impl ProducerContext for Context {
    type DeliveryOpaque = Box<oneshot::Sender<Result<DeliveryReport, KafkaError>>>;

    fn delivery(&self, result: &DeliveryResult<'_>, acknowledge: Self::DeliveryOpaque) {
        let report = match result {
            Ok(message) => {
                Ok(DeliveryReport { partition: message.partition(), offset: message.offset(), timestamp: message.timestamp() })
            }
            Err((error, _)) => Err(error.clone()),
        };
        // An error means that the receiver was dropped.
        let _ = acknowledge.send(report);
    }
}

/// An idempotent producer, polled by a thread of its own. With an id it is transactional.
pub(super) fn connect(settings: &Settings, transactional_id: Option<&str>) -> Result<PolledProducer, Error> {
    Ok(poll_on_a_thread(create(settings, transactional_id)?, |producer, timeout| producer.poll(timeout)))
}

/// The producer of [`connect`] before it is polled. Creating it checks its settings.
pub(super) fn create(settings: &Settings, transactional_id: Option<&str>) -> Result<BaseProducer<Context>, Error> {
    let mut config = client::config(settings, &DEFAULTS);
    config.remove("group.id");
    config
        .set("acks", "all")
        .set("enable.idempotence", "true")
        // The same as Java's default partitioner, so a key gets the same partition from every producer.
        .set("partitioner", "murmur2_random")
        // A deleted topic stays deleted, even if the Kafka cluster creates topics on first use.
        .set("allow.auto.create.topics", "false");
    if let Some(id) = transactional_id {
        config.set("transactional.id", id);
    }
    config.create_with_context(Context).map_err(Error::settings)
}

/// Starts the thread that polls a client until its last owner drops it. Without the thread, no acknowledgement is passed on, and
/// the logs and errors of librdkafka pile up while Kafka is down.
pub(super) fn poll_on_a_thread<T: Send + Sync + 'static>(client: T, poll: impl Fn(&T, Duration) + Send + 'static) -> Arc<T> {
    let client = Arc::new(client);
    let polled = Arc::downgrade(&client);
    std::thread::spawn(move || {
        while let Some(client) = polled.upgrade() {
            poll(&client, POLL_TIMEOUT);
        }
    });
    client
}

/// Enqueues a record. It does not block.
pub(super) fn send<K: ToBytes + ?Sized, P: ToBytes + ?Sized>(
    producer: &BaseProducer<Context>,
    record: FutureRecord<'_, K, P>,
) -> Result<Acknowledgement, KafkaError> {
    let (acknowledge, acknowledgement) = oneshot::channel();
    let FutureRecord { topic, partition, payload, key, timestamp, headers } = record;
    let delivery_opaque = Box::new(acknowledge);
    let record = BaseRecord { topic, partition, payload, key, timestamp, headers, delivery_opaque };
    producer.send(record).map_err(|(error, _)| error)?;
    Ok(acknowledgement)
}
