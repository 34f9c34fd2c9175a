//! Everything that talks Kafka: which topics exist, and one producer a shard that publishes batches.
//!
//! Hidden here are librdkafka's settings, its blocking calls, its error codes and the marker topic by which a new owner
//! of a shard finds out what its predecessor published.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use rdkafka::consumer::BaseConsumer;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use tokio::sync::Semaphore;
use uuid::Uuid;

mod check;
mod client;
mod configs;
mod follow;
mod marker;
mod place;
#[cfg(test)]
mod real;
mod scan;
mod shard;
#[cfg(test)]
mod tests;
mod topics;

pub use check::CheckError;
use client::Context;
use configs::Configs;
pub use configs::RecordLimits;
pub use follow::{Follower, Incoming, Start};
pub use marker::{Marker, transactional_id};
pub use place::Placing;
pub use scan::{Batch, Scan, Seen};
pub use shard::{PublishError, Refusal, Shard};
use topics::Topics;

/// The compacted topic in which each shard writes what it published, inside the same transaction; with at-least-once
/// delivery, the number of each batch before anything of it is sent.
pub const MARKER_TOPIC: &str = "lfs-broker-markers";

/// Whether a topic is Kafka's own or the broker's own: no upload's pointer is written there.
pub fn is_internal(topic: &str) -> bool {
    topic == MARKER_TOPIC || topic.starts_with("__")
}

/// One request to Kafka may hold an HTTP request no longer than this: the answer is due within two seconds.
const ANSWER_WITHIN: Duration = Duration::from_millis(1500);

/// While Kafka does not answer, a client that asks is made anew no more often than this.
const GIVEN_UP_AFTER: Duration = Duration::from_secs(2);

/// Blocking questions at the same time. They share one connection, so more threads would only wait.
const QUESTIONS: usize = 16;

/// Where Kafka is and how pointers are delivered to it.
#[derive(Clone)]
pub struct Settings {
    /// `host:port` of one or more brokers, separated by commas.
    pub bootstrap_servers: String,
    /// Any librdkafka property (TLS, SASL, …), except those that the promises rest on.
    pub properties: BTreeMap<String, String>,
    /// Whether a pointer may be published twice.
    pub delivery: Delivery,
    /// A missing topic is made on first use. For `dev` only: elsewhere a topic that Kafka lacks is an error.
    pub create_topics: bool,
}

/// How often a pointer may appear in its topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Delivery {
    /// Each pointer once, by transactions. Readers need `isolation.level=read_committed`.
    #[default]
    ExactlyOnce,
    /// Each pointer at least once: for Kafka clusters without transactions, and for `dev`.
    AtLeastOnce,
}

/// One pointer on its way to Kafka.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The session whose pointer this is.
    pub upload_id: Uuid,
    /// Where it goes.
    pub topic: String,
    /// The partition the client asked for; otherwise the key decides, as in Java, or chance.
    pub partition: Option<i32>,
    /// Without a key the record has none; an empty key is a key.
    pub key: Option<Vec<u8>>,
    /// The pointer, in its final bytes.
    pub value: Vec<u8>,
    /// In this order.
    pub headers: Vec<(String, Vec<u8>)>,
}

/// Where a pointer has been written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Delivered {
    /// The session whose pointer this is.
    pub upload_id: Uuid,
    /// The partition it is in.
    pub partition: i32,
    /// Its place in the partition.
    pub offset: i64,
    /// The record's time in milliseconds since 1970.
    pub timestamp_ms: i64,
}

/// Why Kafka could not be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No answer in time. Asking again later is right.
    #[error("kafka is unreachable: {0}")]
    Unreachable(String),
    /// An answer, and it was no. Somebody has to change something.
    #[error("kafka refused: {0}")]
    Refused(String),
    /// A property that this broker sets itself.
    #[error("kafka property `{0}` is set by lfs-broker and cannot be changed")]
    Reserved(String),
    /// A property whose value would let this broker wait too long.
    #[error("kafka property `{key}` is {value}, but must be a number from 1 to {limit}")]
    Limit {
        /// The property.
        key: String,
        /// What it was set to.
        value: String,
        /// The largest value allowed.
        limit: u64,
    },
    /// librdkafka does not accept the settings.
    #[error("kafka settings: {0}")]
    Settings(String),
    /// The marker topic was made by somebody else, with too few partitions.
    #[error("topic {MARKER_TOPIC} has {found} partitions, but {wanted} shards need one each")]
    MarkerPartitions {
        /// What Kafka has.
        found: i32,
        /// What this deployment needs.
        wanted: i32,
    },
    /// The marker topic drops records by age or size: a marker that is gone would mean a second publish.
    #[error(
        "topic {MARKER_TOPIC} has cleanup.policy={found}, which deletes markers; set it to compact: \
         kafka-configs.sh --alter --entity-type topics --entity-name {MARKER_TOPIC} --add-config cleanup.policy=compact"
    )]
    MarkerPolicy {
        /// What Kafka has.
        found: String,
    },
}

impl Error {
    /// Whether Kafka answered, and the answer was no: asking again helps once somebody has changed something.
    pub(crate) fn is_refusal(&self) -> bool {
        !matches!(self, Self::Unreachable(_))
    }

    fn settings(error: KafkaError) -> Self {
        Self::Settings(error.to_string())
    }

    /// Sorts what librdkafka says into "not now" and "not like this".
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

/// The client that asks questions.
type Observer = Arc<BaseConsumer<Context>>;

struct Inner {
    settings: Settings,
    /// And when it was made.
    observer: Mutex<(Observer, Instant)>,
    topics: Mutex<Topics>,
    configs: Mutex<Configs>,
    /// Which cluster answered when the marker topic was last looked at.
    cluster_id: Mutex<Option<String>>,
    questions: Semaphore,
}

/// A connection to Kafka. Cheap to clone.
#[derive(Clone)]
pub struct Kafka(Arc<Inner>);

impl Kafka {
    /// Checks the settings and returns at once; Kafka is spoken to when something is asked.
    pub fn connect(settings: &Settings) -> Result<Self, Error> {
        client::check(&settings.properties)?;
        // A producer is never made here, but its settings are checked at start rather than at the first publish.
        drop(client::producer(settings, None)?);
        let observer = observer(settings)?;
        Ok(Self(Arc::new(Inner {
            settings: settings.clone(),
            observer: Mutex::new((observer, Instant::now())),
            topics: Mutex::new(Topics::default()),
            configs: Mutex::new(Configs::default()),
            cluster_id: Mutex::new(None),
            questions: Semaphore::new(QUESTIONS),
        })))
    }

    /// Whether records are delivered exactly once.
    pub fn delivery(&self) -> Delivery {
        self.0.settings.delivery
    }

    /// Whether Kafka answers now, within 1.5 seconds.
    pub async fn reachable(&self) -> Result<(), Error> {
        // One topic's metadata costs the same on a cluster of any size; whether the topic exists does not matter here.
        match self.ask_layout(MARKER_TOPIC).await {
            Ok(_) | Err(Error::Refused(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Takes over a shard. With exactly-once delivery this fences whoever published under `transactional_id` before:
    /// nothing of theirs can appear afterwards, and [`Shard::last_marker`] says what did.
    pub async fn shard(&self, transactional_id: &str, marker_partition: i32) -> Result<Shard, Error> {
        Shard::open(self.clone(), transactional_id, marker_partition).await
    }

    /// The last marker that was committed under `transactional_id`. Only the answer to the owner of the shard stays
    /// true: another owner may commit meanwhile.
    pub async fn last_marker(&self, transactional_id: &str, marker_partition: i32) -> Result<Option<Marker>, Error> {
        let settings = self.0.settings.clone();
        let id = transactional_id.to_owned();
        self.observe(|observer| blocking(move || marker::last(&settings, &observer, &id, marker_partition))).await
    }

    /// Asks a question with the observer, and gives that up where it finds no answer.
    ///
    /// librdkafka (2.12) lets go of every broker that an answer does not list, and when a Kafka that was stopped comes
    /// back and lists none for a moment, of all of them: such a client asks nobody for ever after.
    async fn observe<T, Q>(&self, question: impl FnOnce(Observer) -> Q) -> Result<T, Error>
    where
        Q: Future<Output = Result<T, Error>>,
    {
        let observer = Arc::clone(&self.observer().0);
        let answer = question(Arc::clone(&observer)).await;
        if answer.is_err() {
            self.replace(&observer);
        }
        let is_current = Arc::ptr_eq(&self.observer().0, &observer);
        if !is_current {
            // We may be the last to let go of it.
            drop_aside(observer);
        }
        answer
    }

    fn observer(&self) -> MutexGuard<'_, (Observer, Instant)> {
        // It is whole after every statement, so a panic elsewhere does not spoil it.
        self.0.observer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a new observer in the place of one that failed, unless somebody else has, or it was given no time.
    fn replace(&self, failed: &Observer) {
        let mut current = self.observer();
        if !Arc::ptr_eq(&current.0, failed) || current.1.elapsed() < GIVEN_UP_AFTER {
            return;
        }
        // Settings that made one make another.
        if let Ok(fresh) = observer(&self.0.settings) {
            drop_aside(std::mem::replace(&mut *current, (fresh, Instant::now())));
        }
    }

    fn settings(&self) -> &Settings {
        &self.0.settings
    }

    /// Runs a blocking question within [`ANSWER_WITHIN`], the wait for a free thread included.
    async fn ask<T, F>(&self, question: F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: FnOnce(Duration) -> Result<T, Error> + Send + 'static,
    {
        let started = Instant::now();
        let inner = Arc::clone(&self.0);
        let asked = async move {
            let _permit = inner.questions.acquire().await.expect("the semaphore is never closed");
            let time_left = ANSWER_WITHIN.saturating_sub(started.elapsed());
            blocking(move || question(time_left)).await
        };
        let late = || Error::Unreachable(format!("no answer within {} ms", ANSWER_WITHIN.as_millis()));
        tokio::time::timeout(ANSWER_WITHIN, asked).await.unwrap_or_else(|_| Err(late()))
    }
}

fn observer(settings: &Settings) -> Result<Observer, Error> {
    let observer = Arc::new(client::observer(settings, false)?);
    spawn_events_thread(Arc::downgrade(&observer));
    Ok(observer)
}

/// librdkafka queues logs and errors for somebody to fetch; without this thread they would pile up while Kafka is down.
fn spawn_events_thread(observer: Weak<BaseConsumer<Context>>) {
    std::thread::spawn(move || {
        while let Some(observer) = observer.upgrade() {
            if let Some(Err(error)) = observer.poll(Duration::from_millis(200)) {
                tracing::debug!("kafka connection: {error}");
            }
        }
    });
}

/// Runs a call that blocks on Kafka where blocking is allowed.
async fn blocking<T, F>(call: F) -> Result<T, Error>
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

/// Lets go of a client where blocking is allowed: librdkafka joins its threads when one is destroyed.
fn drop_aside<T: Send + 'static>(client: T) {
    std::thread::spawn(move || drop(client));
}
