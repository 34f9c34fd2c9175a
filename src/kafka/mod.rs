//! The Kafka client: topic metadata, and one producer for each shard that publishes batches.
//!
//! This module hides librdkafka's settings, its blocking calls, its error codes, and the marker topic. From the marker
//! topic, a new owner of a shard sees which pointers the previous owner published.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rdkafka::consumer::BaseConsumer;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use tokio::sync::{Semaphore, oneshot};
use uuid::Uuid;

mod check;
mod client;
mod configs;
mod consumer;
mod delivery;
mod marker;
mod partitioner;
mod producer;
#[cfg(test)]
mod real_kafka_tests;
mod scan;
mod shard;
#[cfg(test)]
mod tests;
mod topics;

pub use check::CheckError;
use client::Context;
pub(crate) use client::are_bootstrap_servers;
use configs::ConfigCache;
pub use configs::RecordLimits;
pub use consumer::{ConsumerRecord, StartOffset, TopicConsumer};
pub use marker::{Marker, transactional_id};
pub use partitioner::PartitionedBatch;
pub use scan::{Scan, ScannedRange, ScannedRecord};
pub use shard::{PublishError, RecordRejection, ShardProducer};
use topics::TopicCache;

pub use crate::session::RecordMetadata;

/// The compacted topic to which each shard writes what it published, in the same transaction. With at-least-once delivery,
/// a shard writes the number of each batch there, before it sends any record of the batch.
pub const MARKER_TOPIC: &str = "lfs-broker-markers";

/// Whether a topic is internal to Kafka or to this broker. No pointer is published to an internal topic.
pub fn is_internal(topic: &str) -> bool {
    topic == MARKER_TOPIC || topic.starts_with("__")
}

/// The limit for one request to Kafka. An HTTP request may wait for it and must be answered within two seconds.
const REQUEST_TIMEOUT: Duration = Duration::from_millis(1500);

/// While Kafka does not answer, the metadata client is replaced at most once in this time.
const REPLACE_INTERVAL: Duration = Duration::from_secs(2);

/// Blocking queries at the same time. They share one connection, so more threads would only wait.
const MAX_CONCURRENT_QUERIES: usize = 16;

/// Where Kafka is and how pointers are delivered to it.
#[derive(Clone, Default)]
pub struct Settings {
    /// `host:port` of one or more brokers, separated by commas.
    pub bootstrap_servers: String,
    /// Any librdkafka property (TLS, SASL, …), except those that the delivery guarantees depend on.
    pub properties: BTreeMap<String, String>,
    /// Whether a pointer may be published twice.
    pub delivery: Delivery,
    /// Creates a missing topic on first use. For `dev` only: otherwise a topic that Kafka lacks is an error.
    pub create_topics: bool,
}

/// How often a pointer may appear in its topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Delivery {
    /// Each pointer once, by transactions. Consumers need `isolation.level=read_committed`.
    #[default]
    ExactlyOnce,
    /// Each pointer at least once: for Kafka clusters without transactions, and for `dev`.
    AtLeastOnce,
}

/// One pointer to publish.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The session of the pointer.
    pub upload_id: Uuid,
    /// The topic to publish to.
    pub topic: String,
    /// The partition that the client asked for. Without it the key decides, as in Java; without a key, it is random.
    pub partition: Option<i32>,
    /// The record's key. An empty key is a key, and `None` is a record without a key.
    pub key: Option<Vec<u8>>,
    /// The pointer, in its final bytes.
    pub value: Vec<u8>,
    /// The record's headers, in this order.
    pub headers: Vec<(String, Vec<u8>)>,
}

/// Why a call to Kafka failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Kafka did not answer in time. The caller should retry later.
    #[error("kafka is unreachable: {0}")]
    Unreachable(String),
    /// Kafka answered with an error. A retry helps only after a change to Kafka or to the settings.
    #[error("kafka refused the request: {0}")]
    Refused(String),
    /// A property that this broker sets itself.
    #[error("kafka property `{0}` is set by lfs-broker and cannot be changed")]
    Reserved(String),
    /// A property whose value would let this broker wait too long.
    #[error("kafka property `{key}` is {value}, but must be a number from 1 to {limit}")]
    Limit {
        /// The property.
        key: String,
        /// The configured value.
        value: String,
        /// The largest allowed value.
        limit: u64,
    },
    /// librdkafka does not accept the settings.
    #[error("kafka settings: {0}")]
    Settings(String),
    /// The marker topic has too few partitions, so this broker did not create it.
    #[error("topic {MARKER_TOPIC} has {found} partitions, but {wanted} shards need one each")]
    MarkerPartitions {
        /// The partitions that the topic has.
        found: i32,
        /// The partitions that this deployment needs.
        wanted: i32,
    },
    /// The marker topic deletes records by age or size. A deleted marker could cause a second publish.
    #[error(
        "topic {MARKER_TOPIC} has cleanup.policy={found}, which deletes markers; set it to compact: \
         kafka-configs.sh --alter --entity-type topics --entity-name {MARKER_TOPIC} --add-config cleanup.policy=compact"
    )]
    MarkerPolicy {
        /// The policy that the topic has.
        found: String,
    },
}

impl Error {
    /// Whether Kafka answered with an error. Then a retry helps only after a change to Kafka or to the settings.
    pub(crate) fn is_refusal(&self) -> bool {
        !matches!(self, Self::Unreachable(_))
    }

    fn settings(error: KafkaError) -> Self {
        Self::Settings(error.to_string())
    }

    /// Classifies a librdkafka error: a retry may help (`Unreachable`), or it does not (`Refused`).
    fn from_kafka(error: &KafkaError) -> Self {
        match (error.rdkafka_error_code(), error) {
            (Some(code), _) => Self::from_code(code, error.to_string()),
            (None, KafkaError::AdminOp(code)) => Self::from_code(*code, error.to_string()),
            (None, KafkaError::Canceled) => Self::Unreachable(error.to_string()),
            (None, _) => Self::Refused(error.to_string()),
        }
    }

    fn from_code(code: RDKafkaErrorCode, reason: String) -> Self {
        use RDKafkaErrorCode as Code;
        match code {
            Code::TopicAuthorizationFailed
            | Code::GroupAuthorizationFailed
            | Code::ClusterAuthorizationFailed
            | Code::TransactionalIdAuthorizationFailed
            | Code::SaslAuthenticationFailed
            | Code::Authentication
            | Code::InvalidTransactionTimeout
            | Code::InvalidReplicationFactor
            | Code::InvalidConfig
            | Code::InvalidTopic
            | Code::PolicyViolation
            | Code::UnsupportedVersion
            | Code::UnsupportedFeature
            | Code::UnknownTopic
            | Code::UnknownPartition
            | Code::UnknownTopicOrPartition => Self::Refused(reason),
            _ => Self::Unreachable(reason),
        }
    }
}

/// The client for queries: metadata, watermarks, offsets.
type MetadataClient = Arc<BaseConsumer<Context>>;

struct Inner {
    settings: Settings,
    /// The client, and when it was created.
    metadata_client: Mutex<(MetadataClient, Instant)>,
    topic_cache: Mutex<TopicCache>,
    config_cache: Mutex<ConfigCache>,
    /// The id of the cluster that answered when the marker topic was last checked.
    cluster_id: Mutex<Option<String>>,
    query_permits: Semaphore,
}

/// A client of one Kafka cluster. Cheap to clone.
#[derive(Clone)]
pub struct Kafka(Arc<Inner>);

impl Kafka {
    /// Checks the settings and returns at once. The first query connects to Kafka.
    pub fn connect(settings: &Settings) -> Result<Self, Error> {
        client::check(&settings.properties)?;
        // Creating a producer checks its settings now, and not only at the first publish.
        drop(producer::create(settings, None)?);
        let metadata_client = metadata_client(settings)?;
        Ok(Self(Arc::new(Inner {
            settings: settings.clone(),
            metadata_client: Mutex::new((metadata_client, Instant::now())),
            topic_cache: Mutex::new(TopicCache::default()),
            config_cache: Mutex::new(ConfigCache::default()),
            cluster_id: Mutex::new(None),
            query_permits: Semaphore::new(MAX_CONCURRENT_QUERIES),
        })))
    }

    /// The configured delivery guarantee.
    pub fn delivery(&self) -> Delivery {
        self.0.settings.delivery
    }

    /// Whether Kafka answers now, within 1.5 seconds.
    pub async fn reachable(&self) -> Result<(), Error> {
        // The metadata of one topic costs the same on a cluster of any size. Whether the topic exists does not matter here.
        match self.query_topic_metadata(MARKER_TOPIC).await {
            Ok(_) | Err(Error::Refused(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Opens the producer of a shard. With exactly-once delivery this fences the previous producer of `transactional_id`:
    /// none of its records can appear afterwards, and [`ShardProducer::last_marker`] lists those that did.
    pub async fn open_producer(&self, transactional_id: &str, marker_partition: i32) -> Result<ShardProducer, Error> {
        ShardProducer::open(self.clone(), transactional_id, marker_partition).await
    }

    /// The last marker that was committed under `transactional_id`. Only for the owner of the shard does the result stay
    /// true: another owner may commit a new marker at any time.
    pub async fn last_marker(&self, transactional_id: &str, marker_partition: i32) -> Result<Option<Marker>, Error> {
        let settings = self.0.settings.clone();
        let id = transactional_id.to_owned();
        self.with_metadata_client(|client| run_blocking(move || marker::read_last(&settings, &client, &id, marker_partition)))
            .await
    }

    /// Runs a call with the metadata client, and replaces the client if the call fails.
    ///
    /// librdkafka (2.12) drops every broker that a metadata response does not list. A Kafka that has just restarted may
    /// list no broker for a moment. Then the client has no broker left to ask and never recovers.
    async fn with_metadata_client<T, Q>(&self, call: impl FnOnce(MetadataClient) -> Q) -> Result<T, Error>
    where
        Q: Future<Output = Result<T, Error>>,
    {
        let client = Arc::clone(&self.metadata_client().0);
        let result = call(Arc::clone(&client)).await;
        if result.is_err() {
            self.replace_metadata_client(&client);
        }
        let is_current = Arc::ptr_eq(&self.metadata_client().0, &client);
        if !is_current {
            // This may be the last reference, and destroying the client blocks.
            drop_blocking(client);
        }
        result
    }

    fn metadata_client(&self) -> MutexGuard<'_, (MetadataClient, Instant)> {
        // Each statement leaves the value complete, so it is still valid after a panic elsewhere.
        self.0.metadata_client.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Replaces a metadata client that failed, unless it was replaced already or is newer than [`REPLACE_INTERVAL`].
    fn replace_metadata_client(&self, failed: &MetadataClient) {
        let mut current = self.metadata_client();
        if !Arc::ptr_eq(&current.0, failed) || current.1.elapsed() < REPLACE_INTERVAL {
            return;
        }
        // The settings worked for the first client, so they work for this one.
        if let Ok(fresh) = metadata_client(&self.0.settings) {
            drop_blocking(std::mem::replace(&mut *current, (fresh, Instant::now())));
        }
    }

    fn settings(&self) -> &Settings {
        &self.0.settings
    }

    /// Runs a blocking query within [`REQUEST_TIMEOUT`], including the wait for a free thread.
    async fn query<T, F>(&self, query: F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: FnOnce(Duration) -> Result<T, Error> + Send + 'static,
    {
        let started = Instant::now();
        let inner = Arc::clone(&self.0);
        let result = async move {
            let _permit = inner.query_permits.acquire().await.expect("the semaphore is never closed");
            let time_left = REQUEST_TIMEOUT.saturating_sub(started.elapsed());
            run_blocking(move || query(time_left)).await
        };
        let timed_out = || Error::Unreachable(format!("no answer within {} ms", REQUEST_TIMEOUT.as_millis()));
        tokio::time::timeout(REQUEST_TIMEOUT, result).await.unwrap_or_else(|_| Err(timed_out()))
    }
}

fn metadata_client(settings: &Settings) -> Result<MetadataClient, Error> {
    let client = client::metadata_client(settings, false)?;
    Ok(producer::poll_on_a_thread(client, |client, timeout| {
        if let Some(Err(error)) = client.poll(timeout) {
            tracing::debug!("kafka connection: {error}");
        }
    }))
}

/// Runs a call that blocks on Kafka, on a thread where blocking is allowed.
async fn run_blocking<T, F>(call: F) -> Result<T, Error>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T, Error> + Send + 'static,
{
    match tokio::task::spawn_blocking(call).await {
        Ok(result) => result,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_) => Err(Error::Unreachable("the broker is shutting down".into())),
    }
}

/// Drops a client on a thread of its own: librdkafka joins its threads when a client is destroyed, which blocks. A caller may
/// wait for the end. A thread of the runtime would delay the end of the process if Kafka does not answer.
fn drop_blocking<T: Send + 'static>(client: T) -> oneshot::Receiver<()> {
    let (dropped, is_dropped) = oneshot::channel();
    std::thread::spawn(move || {
        drop(client);
        // An error means that no caller waits.
        let _ = dropped.send(());
    });
    is_dropped
}
