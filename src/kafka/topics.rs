//! Topic metadata, cached for a while, and the creation of the topics that this broker may create.

use std::collections::HashMap;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use rdkafka::admin::{AdminOptions, NewTopic, TopicReplication};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::metadata::MetadataPartition;
use rdkafka::types::RDKafkaRespErr;

use super::client::{self, Context};
use super::{Error, Kafka, MARKER_TOPIC, MetadataClient, drop_blocking, run_blocking};

/// The partitions of a topic that is created on first use: as many as in librdkafka's mock cluster.
const NEW_TOPIC_PARTITIONS: i32 = 4;

/// Topics are created only at start and in `dev`. A controller under load takes seconds.
const CREATE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long it may take until a new topic is visible in the metadata.
const APPEAR_TIMEOUT: Duration = Duration::from_secs(2);

/// How long the metadata of a complete topic is fresh.
pub(super) const CACHE_TTL: Duration = Duration::from_secs(10);
/// The same for a topic that is missing or has a partition without a leader.
const MISSING_TTL: Duration = Duration::from_secs(1);
/// How long the metadata of an existing topic is used while Kafka does not answer.
const STALE_TTL: Duration = Duration::from_secs(600);

/// While Kafka does not answer, one request in this time queries it, and all others use the cache.
const UNANSWERED_PAUSE: Duration = Duration::from_secs(1);

/// The cache is limited, because topic names come from requests.
const MAX_CACHED_TOPICS: usize = 10_000;

/// The metadata of a topic.
#[derive(Debug, Clone)]
pub(super) struct TopicMetadata {
    pub(super) partitions: i32,
    /// The partitions that cannot be written now, because the brokers that hold them are down.
    pub(super) leaderless: Vec<i32>,
}

/// The cached metadata of a topic; `None` if Kafka lacks the topic.
#[derive(Clone)]
struct CachedTopic {
    metadata: Option<TopicMetadata>,
    at: Instant,
}

impl CachedTopic {
    fn is_fresh(&self) -> bool {
        let is_complete = self.metadata.as_ref().is_some_and(|metadata| metadata.leaderless.is_empty());
        self.at.elapsed() < if is_complete { CACHE_TTL } else { MISSING_TTL }
    }
}

#[derive(Default)]
pub(super) struct TopicCache {
    topics: HashMap<String, CachedTopic>,
    /// When Kafka last did not answer a query.
    unanswered_at: Option<Instant>,
}

impl Kafka {
    /// The number of partitions of `topic`; `None` if Kafka lacks the topic. The query never creates it, except in `dev`.
    ///
    /// While Kafka does not answer, cached metadata is used for up to ten minutes: uploads continue, and their pointers
    /// wait in the outbox.
    pub async fn partition_count(&self, topic: &str) -> Result<Option<i32>, Error> {
        Ok(self.topic_metadata(topic).await?.map(|metadata| metadata.partitions))
    }

    /// The metadata of `topic`, from the cache if it is fresh.
    pub(super) async fn topic_metadata(&self, topic: &str) -> Result<Option<TopicMetadata>, Error> {
        let (cached, is_unanswered) = {
            let cache = self.topic_cache();
            let is_unanswered = cache.unanswered_at.is_some_and(|at| at.elapsed() < UNANSWERED_PAUSE);
            (cache.topics.get(topic).cloned(), is_unanswered)
        };
        let is_fresh = cached.as_ref().is_some_and(CachedTopic::is_fresh);
        let cached = cached.and_then(|cached| cached.metadata.filter(|_| cached.at.elapsed() < STALE_TTL));
        if is_fresh || (is_unanswered && cached.is_some()) {
            return Ok(cached);
        }
        match self.query_topic_metadata(topic).await {
            Ok(None) if self.0.settings.create_topics => {
                let metadata = self.create_on_first_use(topic).await?;
                self.cache_topic(topic, Some(metadata.clone()));
                Ok(Some(metadata))
            }
            Ok(metadata) => {
                self.cache_topic(topic, metadata.clone());
                Ok(metadata)
            }
            Err(Error::Unreachable(reason)) => {
                self.topic_cache().unanswered_at = Some(Instant::now());
                cached.map(Some).ok_or(Error::Unreachable(reason))
            }
            Err(error) => Err(error),
        }
    }

    /// The number of partitions of the marker topic, without the cache; `None` if Kafka lacks the topic. The query never
    /// creates it.
    pub async fn marker_partition_count(&self) -> Result<Option<i32>, Error> {
        Ok(self.query_topic_metadata(MARKER_TOPIC).await?.map(|metadata| metadata.partitions))
    }

    /// Creates the marker topic with a partition for each shard, if it is missing. Returns whether it was missing.
    ///
    /// # Errors
    /// Also if the topic exists, but has too few partitions or deletes markers.
    pub async fn ensure_marker_topic(&self, shards: i32) -> Result<bool, Error> {
        let is_missing = self.query_topic_metadata(MARKER_TOPIC).await?.is_none();
        self.warn_if_cluster_changed().await;
        if is_missing {
            let replicas = self.broker_count().await?.clamp(1, 3);
            // With three replicas a marker survives the loss of a broker. A lost marker could cause a second publish.
            let in_sync = if replicas == 3 { "2" } else { "1" };
            let topic = NewTopic::new(MARKER_TOPIC, shards, TopicReplication::Fixed(replicas))
                .set("cleanup.policy", "compact")
                .set("min.insync.replicas", in_sync)
                // Compaction skips the open segment, so with small segments it starts early.
                .set("segment.bytes", "16777216")
                .set("segment.ms", "3600000");
            match self.create_topic(topic).await {
                Ok(()) | Err(RDKafkaErrorCode::TopicAlreadyExists) => {}
                Err(code) => return Err(Error::from_code(code, format!("cannot create topic {MARKER_TOPIC}: {code}"))),
            }
        }
        match self.await_topic(MARKER_TOPIC, APPEAR_TIMEOUT).await?.partitions {
            found if found < shards => Err(Error::MarkerPartitions { found, wanted: shards }),
            _ => self.check_marker_policy().await.map(|()| is_missing),
        }
    }

    /// Checks that the marker topic keeps markers. If Kafka does not report its policy, the check passes.
    ///
    /// # Errors
    /// [`Error::MarkerPolicy`] if the topic deletes records by age or size.
    pub async fn check_marker_policy(&self) -> Result<(), Error> {
        self.check_policy(MARKER_TOPIC).await
    }

    pub(super) async fn check_policy(&self, marker_topic: &str) -> Result<(), Error> {
        match self.cleanup_policy(marker_topic).await {
            Some(found) if found != "compact" => Err(Error::MarkerPolicy { found }),
            _ => Ok(()),
        }
    }

    /// Logs a warning if another Kafka cluster answers than before.
    async fn warn_if_cluster_changed(&self) {
        let fetch = |client: MetadataClient, time_left| Ok(client.client().fetch_cluster_id(time_left));
        let answer = self.with_metadata_client(|client| self.query(move |time_left| fetch(client, time_left)));
        let Ok(Some(found)) = answer.await else { return };
        let known = self.0.cluster_id.lock().unwrap_or_else(PoisonError::into_inner).replace(found.clone());
        if let Some(known) = known.filter(|known| *known != found) {
            tracing::warn!(
                "another Kafka cluster answers: the cluster id was {known} and is now {found}; pointers that were published \
                 before are not in this cluster"
            );
        }
    }

    fn topic_cache(&self) -> std::sync::MutexGuard<'_, TopicCache> {
        // Each statement leaves the cache complete, so it is still valid after a panic elsewhere.
        self.0.topic_cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn cache_topic(&self, topic: &str, metadata: Option<TopicMetadata>) {
        let mut cache = self.topic_cache();
        cache.unanswered_at = None;
        if cache.topics.len() >= MAX_CACHED_TOPICS {
            cache.topics.retain(|_, cached| cached.is_fresh());
        }
        if cache.topics.len() < MAX_CACHED_TOPICS {
            cache.topics.insert(topic.to_owned(), CachedTopic { metadata, at: Instant::now() });
        }
    }

    /// Makes the next [`Kafka::topic_metadata`] query Kafka again, because an error contradicted the cache.
    pub(super) fn invalidate_topic(&self, topic: &str) {
        if let Some(cached) = self.topic_cache().topics.get_mut(topic) {
            cached.at = cached.at.checked_sub(CACHE_TTL).unwrap_or(cached.at);
        }
    }

    pub(super) async fn query_topic_metadata(&self, topic: &str) -> Result<Option<TopicMetadata>, Error> {
        let topic = topic.to_owned();
        self.with_metadata_client(|client| self.query(move |time_left| fetch_topic_metadata(&client, &topic, time_left))).await
    }

    async fn broker_count(&self) -> Result<i32, Error> {
        let count = |client: MetadataClient, time_left| {
            let metadata = client.fetch_metadata(Some(MARKER_TOPIC), time_left).map_err(|e| Error::from_kafka(&e))?;
            Ok(i32::try_from(metadata.brokers().len()).unwrap_or(i32::MAX))
        };
        self.with_metadata_client(|client| self.query(move |time_left| count(client, time_left))).await
    }

    /// Creates a topic on first use, for `dev`.
    async fn create_on_first_use(&self, topic: &str) -> Result<TopicMetadata, Error> {
        // librdkafka's mock cluster and most Kafka clusters create a topic when a client asks for it and allows this.
        // The mock cluster has no other way.
        let (settings, name) = (self.0.settings.clone(), topic.to_owned());
        let answer =
            self.query(move |time_left| fetch_topic_metadata(&client::metadata_client(&settings, true)?, &name, time_left));
        if let Ok(Some(metadata)) = answer.await {
            return Ok(metadata);
        }
        if let Ok(metadata) = self.await_topic(topic, APPEAR_TIMEOUT / 4).await {
            return Ok(metadata);
        }
        match self.create_topic(NewTopic::new(topic, NEW_TOPIC_PARTITIONS, TopicReplication::Fixed(-1))).await {
            Ok(()) | Err(RDKafkaErrorCode::TopicAlreadyExists) => self.await_topic(topic, APPEAR_TIMEOUT).await,
            Err(code) => Err(Error::from_code(code, format!("cannot create topic {topic}: {code}"))),
        }
    }

    pub(super) async fn create_topic(&self, topic: NewTopic<'_>) -> Result<(), RDKafkaErrorCode> {
        let settings = self.0.settings.clone();
        let admin = run_blocking(move || client::admin(&settings)).await.map_err(|_| RDKafkaErrorCode::InvalidConfig)?;
        let options = AdminOptions::new().request_timeout(Some(CREATE_TIMEOUT)).operation_timeout(Some(CREATE_TIMEOUT));
        let created = admin.create_topics([&topic], &options).await;
        drop_blocking(admin);
        match created {
            Ok(results) => results.into_iter().try_for_each(|result| result.map(drop).map_err(|(_, code)| code)),
            Err(error) => Err(match error {
                KafkaError::AdminOp(code) => code,
                other => other.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Fail),
            }),
        }
    }

    /// Waits until a new topic is visible: the Kafka brokers learn of the topic and of its leaders one after the other.
    async fn await_topic(&self, topic: &str, timeout: Duration) -> Result<TopicMetadata, Error> {
        let deadline = Instant::now() + timeout;
        loop {
            match self.query_topic_metadata(topic).await {
                Ok(Some(metadata)) => return Ok(metadata),
                Err(Error::Refused(reason)) => return Err(Error::Refused(reason)),
                Ok(None) if Instant::now() > deadline => {
                    let waited_ms = timeout.as_millis();
                    return Err(Error::Unreachable(format!("topic {topic} was created but is not visible after {waited_ms} ms")));
                }
                Err(error) if Instant::now() > deadline => return Err(error),
                _ => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }
}

fn fetch_topic_metadata(
    client: &BaseConsumer<Context>,
    topic: &str,
    time_left: Duration,
) -> Result<Option<TopicMetadata>, Error> {
    use RDKafkaRespErr as Code;
    let metadata = client.fetch_metadata(Some(topic), time_left).map_err(|error| Error::from_kafka(&error))?;
    let Some(found) = metadata.topics().iter().find(|found| found.name() == topic) else {
        return Ok(None);
    };
    match found.error() {
        // A topic whose name Kafka does not allow cannot exist.
        Some(Code::RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART | Code::RD_KAFKA_RESP_ERR_TOPIC_EXCEPTION) => Ok(None),
        Some(code) if found.partitions().is_empty() => {
            Err(Error::from_kafka(&KafkaError::MetadataFetch(RDKafkaErrorCode::from(code))))
        }
        _ => {
            let leaderless = found.partitions().iter().filter(|partition| partition.leader() < 0);
            let leaderless = leaderless.map(MetadataPartition::id).collect();
            Ok(i32::try_from(found.partitions().len()).ok().map(|partitions| TopicMetadata { partitions, leaderless }))
        }
    }
}
