//! Which topics exist, remembered for a while, and making the ones that this broker may make.

use std::collections::HashMap;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use rdkafka::admin::{AdminOptions, NewTopic, TopicReplication};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::metadata::MetadataPartition;
use rdkafka::types::RDKafkaRespErr;

use super::client::{self, Context};
use super::{Error, Kafka, MARKER_TOPIC, Observer, blocking, drop_aside};

/// A topic that is made on first use gets as many partitions as librdkafka's mock cluster would give it.
const NEW_TOPIC_PARTITIONS: i32 = 4;

/// Creating topics happens at start and in `dev` only; a controller under load takes seconds.
const CREATE_WITHIN: Duration = Duration::from_secs(10);

/// How long a topic that was just made may stay out of sight.
const APPEARS_WITHIN: Duration = Duration::from_secs(2);

/// How long a topic counts as known, counts as missing or in part without a leader, and stays known while Kafka does
/// not answer.
const KNOWN_FOR: Duration = Duration::from_secs(10);
const MISSING_FOR: Duration = Duration::from_secs(1);
const REMEMBERED_FOR: Duration = Duration::from_secs(600);

/// While Kafka does not answer, one request a second finds out and the others use what is remembered.
const SILENT_FOR: Duration = Duration::from_secs(1);

/// Topic names come from requests, so what is remembered of them is bounded.
const MOST_TOPICS: usize = 10_000;

/// What Kafka says of a topic.
#[derive(Debug, Clone)]
pub(super) struct Layout {
    pub(super) partitions: i32,
    /// Those to which nothing can be written now: the brokers that hold them are away.
    pub(super) leaderless: Vec<i32>,
}

/// What is remembered of a topic; no layout when Kafka lacks it.
#[derive(Clone)]
struct Known {
    layout: Option<Layout>,
    at: Instant,
}

impl Known {
    fn is_fresh(&self) -> bool {
        let is_whole = self.layout.as_ref().is_some_and(|layout| layout.leaderless.is_empty());
        self.at.elapsed() < if is_whole { KNOWN_FOR } else { MISSING_FOR }
    }
}

#[derive(Default)]
pub(super) struct Topics {
    known: HashMap<String, Known>,
    /// When Kafka last left a question without an answer.
    silent_since: Option<Instant>,
}

impl Kafka {
    /// How many partitions `topic` has; `None` when Kafka lacks it. Asking never creates it, except in `dev`.
    ///
    /// A topic that was seen within ten minutes stays known while Kafka does not answer: uploads go on, and their
    /// pointers wait.
    pub async fn partitions(&self, topic: &str) -> Result<Option<i32>, Error> {
        Ok(self.layout(topic).await?.map(|layout| layout.partitions))
    }

    /// The same with what the relay looks at.
    pub(super) async fn layout(&self, topic: &str) -> Result<Option<Layout>, Error> {
        let (known, silent) = {
            let topics = self.topics();
            let silent = topics.silent_since.is_some_and(|since| since.elapsed() < SILENT_FOR);
            (topics.known.get(topic).cloned(), silent)
        };
        let is_fresh = known.as_ref().is_some_and(Known::is_fresh);
        let remembered = known.and_then(|known| known.layout.filter(|_| known.at.elapsed() < REMEMBERED_FOR));
        if is_fresh || (silent && remembered.is_some()) {
            return Ok(remembered);
        }
        match self.ask_layout(topic).await {
            Ok(None) if self.0.settings.create_topics => {
                let layout = self.create(topic).await?;
                self.remember(topic, Some(layout.clone()));
                Ok(Some(layout))
            }
            Ok(layout) => {
                self.remember(topic, layout.clone());
                Ok(layout)
            }
            Err(Error::Unreachable(reason)) => {
                self.topics().silent_since = Some(Instant::now());
                remembered.map(Some).ok_or(Error::Unreachable(reason))
            }
            Err(error) => Err(error),
        }
    }

    /// How many partitions the marker topic has, asked of Kafka now; `None` when Kafka lacks it. Asking never creates it.
    pub async fn marker_partitions(&self) -> Result<Option<i32>, Error> {
        Ok(self.ask_layout(MARKER_TOPIC).await?.map(|layout| layout.partitions))
    }

    /// Makes the marker topic with a partition for each shard, unless it is there. Says whether it was missing.
    ///
    /// # Errors
    /// Also where it is there, and markers would not be safe in it.
    pub async fn ensure_marker_topic(&self, shards: i32) -> Result<bool, Error> {
        let is_missing = self.ask_layout(MARKER_TOPIC).await?.is_none();
        self.note_cluster().await;
        if is_missing {
            let replicas = self.brokers().await?.clamp(1, 3);
            // With three copies a marker survives the loss of a broker; losing one would mean a second publish.
            let in_sync = if replicas == 3 { "2" } else { "1" };
            let topic = NewTopic::new(MARKER_TOPIC, shards, TopicReplication::Fixed(replicas))
                .set("cleanup.policy", "compact")
                .set("min.insync.replicas", in_sync)
                // Small segments, so that compaction starts early: it leaves the open segment alone.
                .set("segment.bytes", "16777216")
                .set("segment.ms", "3600000");
            match self.create_topic(topic).await {
                Ok(()) | Err(RDKafkaErrorCode::TopicAlreadyExists) => {}
                Err(code) => return Err(Error::from_code(code, format!("cannot make topic {MARKER_TOPIC}: {code}"))),
            }
        }
        match self.appearing(MARKER_TOPIC, APPEARS_WITHIN).await?.partitions {
            found if found < shards => Err(Error::MarkerPartitions { found, wanted: shards }),
            _ => self.check_marker_policy().await.map(|()| is_missing),
        }
    }

    /// Whether the marker topic keeps markers, as far as Kafka tells.
    ///
    /// # Errors
    /// [`Error::MarkerPolicy`] where it drops them by age or size.
    pub async fn check_marker_policy(&self) -> Result<(), Error> {
        self.check_policy(MARKER_TOPIC).await
    }

    pub(super) async fn check_policy(&self, marker_topic: &str) -> Result<(), Error> {
        match self.cleanup_policy(marker_topic).await {
            Some(found) if found != "compact" => Err(Error::MarkerPolicy { found }),
            _ => Ok(()),
        }
    }

    /// Warns when another cluster answers than before.
    async fn note_cluster(&self) {
        let asked = |observer: Observer, time_left| Ok(observer.client().fetch_cluster_id(time_left));
        let Ok(Some(found)) = self.observe(|observer| self.ask(move |time_left| asked(observer, time_left))).await else {
            return;
        };
        let known = self.0.cluster_id.lock().unwrap_or_else(PoisonError::into_inner).replace(found.clone());
        if let Some(known) = known.filter(|known| *known != found) {
            tracing::warn!(
                "the Kafka cluster is another one: its id was {known} and is {found} now; what was published before is not in it"
            );
        }
    }

    fn topics(&self) -> std::sync::MutexGuard<'_, Topics> {
        // The map is whole after every statement, so a panic elsewhere does not spoil it.
        self.0.topics.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn remember(&self, topic: &str, layout: Option<Layout>) {
        let mut topics = self.topics();
        topics.silent_since = None;
        if topics.known.len() >= MOST_TOPICS {
            topics.known.retain(|_, known| known.is_fresh());
        }
        if topics.known.len() < MOST_TOPICS {
            topics.known.insert(topic.to_owned(), Known { layout, at: Instant::now() });
        }
    }

    /// Makes the next [`Kafka::partitions`] ask again, after Kafka contradicted what is remembered.
    pub(super) fn doubt(&self, topic: &str) {
        if let Some(known) = self.topics().known.get_mut(topic) {
            known.at = known.at.checked_sub(KNOWN_FOR).unwrap_or(known.at);
        }
    }

    pub(super) async fn ask_layout(&self, topic: &str) -> Result<Option<Layout>, Error> {
        let topic = topic.to_owned();
        self.observe(|observer| self.ask(move |time_left| ask_layout(&observer, &topic, time_left))).await
    }

    async fn brokers(&self) -> Result<i32, Error> {
        let count = |observer: Observer, time_left| {
            let metadata = observer.fetch_metadata(Some(MARKER_TOPIC), time_left).map_err(|e| Error::from_kafka(&e))?;
            Ok(i32::try_from(metadata.brokers().len()).unwrap_or(i32::MAX))
        };
        self.observe(|observer| self.ask(move |time_left| count(observer, time_left))).await
    }

    /// Makes a topic on first use, for `dev`.
    async fn create(&self, topic: &str) -> Result<Layout, Error> {
        // librdkafka's mock cluster and most real ones make a topic when a client that allows it asks for it; the
        // mock cluster knows no other way.
        let (settings, name) = (self.0.settings.clone(), topic.to_owned());
        let asked = self.ask(move |time_left| ask_layout(&client::observer(&settings, true)?, &name, time_left));
        if let Ok(Some(layout)) = asked.await {
            return Ok(layout);
        }
        if let Ok(layout) = self.appearing(topic, APPEARS_WITHIN / 4).await {
            return Ok(layout);
        }
        match self.create_topic(NewTopic::new(topic, NEW_TOPIC_PARTITIONS, TopicReplication::Fixed(-1))).await {
            Ok(()) | Err(RDKafkaErrorCode::TopicAlreadyExists) => self.appearing(topic, APPEARS_WITHIN).await,
            Err(code) => Err(Error::from_code(code, format!("cannot make topic {topic}: {code}"))),
        }
    }

    pub(super) async fn create_topic(&self, topic: NewTopic<'_>) -> Result<(), RDKafkaErrorCode> {
        let settings = self.0.settings.clone();
        let admin = blocking(move || client::admin(&settings)).await.map_err(|_| RDKafkaErrorCode::InvalidConfig)?;
        let options = AdminOptions::new().request_timeout(Some(CREATE_WITHIN)).operation_timeout(Some(CREATE_WITHIN));
        let created = admin.create_topics([&topic], &options).await;
        drop_aside(admin);
        match created {
            Ok(results) => results.into_iter().try_for_each(|result| result.map(drop).map_err(|(_, code)| code)),
            Err(error) => Err(match error {
                KafkaError::AdminOp(code) => code,
                other => other.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Fail),
            }),
        }
    }

    /// Waits until a topic that was just made can be seen: brokers learn of it, and of its leader, one after the other.
    async fn appearing(&self, topic: &str, within: Duration) -> Result<Layout, Error> {
        let deadline = Instant::now() + within;
        loop {
            match self.ask_layout(topic).await {
                Ok(Some(layout)) => return Ok(layout),
                Err(Error::Refused(reason)) => return Err(Error::Refused(reason)),
                Ok(None) if Instant::now() > deadline => {
                    return Err(Error::Unreachable(format!("topic {topic} was made but does not appear")));
                }
                Err(error) if Instant::now() > deadline => return Err(error),
                _ => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }
}

fn ask_layout(observer: &BaseConsumer<Context>, topic: &str, time_left: Duration) -> Result<Option<Layout>, Error> {
    use RDKafkaRespErr as Code;
    let metadata = observer.fetch_metadata(Some(topic), time_left).map_err(|error| Error::from_kafka(&error))?;
    let Some(found) = metadata.topics().iter().find(|found| found.name() == topic) else {
        return Ok(None);
    };
    match found.error() {
        // A name that Kafka does not allow is a topic that it lacks.
        Some(Code::RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART | Code::RD_KAFKA_RESP_ERR_TOPIC_EXCEPTION) => Ok(None),
        Some(code) if found.partitions().is_empty() => {
            Err(Error::from_kafka(&KafkaError::MetadataFetch(RDKafkaErrorCode::from(code))))
        }
        _ => {
            let leaderless = found.partitions().iter().filter(|partition| partition.leader() < 0);
            let leaderless = leaderless.map(MetadataPartition::id).collect();
            Ok(i32::try_from(found.partitions().len()).ok().map(|partitions| Layout { partitions, leaderless }))
        }
    }
}
