//! How a librdkafka client is set up: which properties are ours, which are the operator's, and where its log goes.

use std::collections::BTreeMap;

use rdkafka::ClientConfig;
use rdkafka::client::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::consumer::{BaseConsumer, ConsumerContext};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::producer::FutureProducer;
use rdkafka::statistics::Statistics;
use tracing::{debug, warn};

use super::{Error, Settings};

/// Set by this broker for the promises to hold; a property that changes one of them is refused at start.
const RESERVED: [&str; 17] = [
    "acks",
    "allow.auto.create.topics",
    "auto.offset.reset",
    "bootstrap.servers",
    "enable.auto.commit",
    "enable.auto.offset.store",
    "enable.idempotence",
    "enable.partition.eof",
    "isolation.level",
    "log.queue",
    "max.in.flight",
    "max.in.flight.requests.per.connection",
    "metadata.broker.list",
    "partitioner",
    "produce.offset.report",
    "request.required.acks",
    "transactional.id",
];

/// A crashed owner's transaction hides what others wrote after it for at most this long.
const LONGEST_TRANSACTION_MS: u64 = 60_000;

/// Defaults an operator may change, each with its other name in librdkafka. Connections give up and come back
/// within seconds, because requests wait for Kafka no longer than that.
const DEFAULTS: [(&str, &str, &str); 8] = [
    ("client.id", "", "lfs-broker"),
    ("group.id", "", "lfs-broker"),
    ("reconnect.backoff.ms", "", "50"),
    ("reconnect.backoff.max.ms", "", "1000"),
    ("socket.connection.setup.timeout.ms", "", "3000"),
    ("socket.timeout.ms", "", "10000"),
    ("socket.keepalive.enable", "", "true"),
    // A partition that was added is in use soon: `partitions` knows it within ten seconds too.
    ("topic.metadata.refresh.interval.ms", "", "10000"),
];

/// The same for producers. Waiting for more records only adds latency: the relay sends whole batches.
const PRODUCER_DEFAULTS: [(&str, &str, &str); 5] = [
    ("linger.ms", "queue.buffering.max.ms", "0"),
    ("message.timeout.ms", "delivery.timeout.ms", "10000"),
    ("request.timeout.ms", "", "10000"),
    ("topic.metadata.propagation.max.ms", "", "2000"),
    ("transaction.timeout.ms", "", "60000"),
];

/// Routes what librdkafka says to `tracing`; otherwise it writes to stderr.
#[derive(Clone)]
pub(super) struct Context;

impl ClientContext for Context {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        // A lost connection is logged by whoever needed it; librdkafka repeats it at every attempt of every client.
        let expected = matches!(facility, "FAIL" | "ERROR" | "CONFWARN" | "TXNERR" | "ADDPARTS" | "MAXPOLL");
        match level {
            RDKafkaLogLevel::Emerg | RDKafkaLogLevel::Alert | RDKafkaLogLevel::Critical | RDKafkaLogLevel::Error if !expected => {
                warn!(facility, "librdkafka: {message}");
            }
            _ => debug!(facility, "librdkafka: {message}"),
        }
    }

    fn error(&self, error: KafkaError, reason: &str) {
        use RDKafkaErrorCode::{AllBrokersDown, BrokerTransportFailure, OperationTimedOut, PartitionEOF, Resolve};
        match error.rdkafka_error_code() {
            // The end of a partition is told to the reader too, which waits for it.
            Some(AllBrokersDown | BrokerTransportFailure | OperationTimedOut | PartitionEOF | Resolve) => {
                debug!("kafka connection: {error}: {reason}");
            }
            _ => warn!("kafka client: {error}: {reason}"),
        }
    }

    fn stats(&self, _: Statistics) {}

    fn stats_raw(&self, _: &[u8]) {}
}

impl ConsumerContext for Context {}

/// Refuses properties that would break a promise, and numbers that would wait for ever.
pub(super) fn check(properties: &BTreeMap<String, String>) -> Result<(), Error> {
    for (key, value) in properties {
        if RESERVED.contains(&key.as_str()) {
            return Err(Error::Reserved(key.clone()));
        }
        let bounded = ["transaction.timeout.ms", "message.timeout.ms", "delivery.timeout.ms"];
        if bounded.contains(&key.as_str()) && !value.parse().is_ok_and(|value: u64| (1..=LONGEST_TRANSACTION_MS).contains(&value))
        {
            return Err(Error::Limit { key: key.clone(), value: value.clone(), limit: LONGEST_TRANSACTION_MS });
        }
    }
    Ok(())
}

fn config(settings: &Settings, defaults: &[(&str, &str, &str)]) -> ClientConfig {
    let mut config = ClientConfig::new();
    for (key, alias, value) in DEFAULTS.iter().chain(defaults) {
        if !settings.properties.contains_key(*alias) {
            config.set(*key, *value);
        }
    }
    for (key, value) in &settings.properties {
        config.set(key, value);
    }
    config.set("bootstrap.servers", &settings.bootstrap_servers);
    config
}

/// A producer that is idempotent and, with an id, transactional.
pub(super) fn producer(settings: &Settings, transactional_id: Option<&str>) -> Result<FutureProducer<Context>, Error> {
    let mut config = config(settings, &PRODUCER_DEFAULTS);
    config.remove("group.id");
    config
        .set("acks", "all")
        .set("enable.idempotence", "true")
        // What Java's default partitioner does, so a key keeps its partition whoever produces it.
        .set("partitioner", "murmur2_random")
        // A topic that was deleted stays deleted, also where brokers make topics on first use.
        .set("allow.auto.create.topics", "false");
    if let Some(id) = transactional_id {
        config.set("transactional.id", id);
    }
    config.create_with_context(Context).map_err(Error::settings)
}

/// A client that only asks questions. Of the client types, consumers alone can promise not to create what they ask for.
pub(super) fn observer(settings: &Settings, create_topics: bool) -> Result<BaseConsumer<Context>, Error> {
    let mut config = config(settings, &[]);
    // Without a group it needs no coordinator and leaves nothing behind.
    config.remove("group.id");
    config
        .set("allow.auto.create.topics", create_topics.to_string())
        // The end of a log is asked with open transactions counted in; see `marker`.
        .set("isolation.level", "read_uncommitted");
    config.create_with_context(Context).map_err(Error::settings)
}

/// Reads committed records of partitions that it is told; it never joins its group.
pub(super) fn reader(settings: &Settings) -> Result<BaseConsumer<Context>, Error> {
    let mut config = config(settings, &[]);
    config
        .set("allow.auto.create.topics", "false")
        .set("auto.offset.reset", "earliest")
        .set("enable.auto.commit", "false")
        .set("enable.auto.offset.store", "false")
        .set("enable.partition.eof", "true")
        .set("isolation.level", "read_committed")
        .set("fetch.wait.max.ms", "50");
    config.create_with_context(Context).map_err(Error::settings)
}

/// A consumer that follows a topic, for `consume`. A file may take hours to save, and the group waits for it;
/// a member that died is given up within seconds.
pub(super) fn follower(
    settings: &Settings,
    group: Option<&str>,
    from_the_beginning: bool,
) -> Result<BaseConsumer<Context>, Error> {
    let mut config = config(settings, &[("max.poll.interval.ms", "", "86400000"), ("session.timeout.ms", "", "10000")]);
    config
        .set("allow.auto.create.topics", "false")
        .set("auto.offset.reset", if from_the_beginning { "earliest" } else { "latest" })
        .set("enable.auto.commit", "false")
        .set("enable.auto.offset.store", "false")
        .set("isolation.level", "read_committed");
    if let Some(group) = group {
        config.set("group.id", group);
    }
    config.create_with_context(Context).map_err(Error::settings)
}

/// For what only an administrator's client can do: creating topics.
pub(super) fn admin(settings: &Settings) -> Result<rdkafka::admin::AdminClient<Context>, Error> {
    let mut config = config(settings, &[]);
    config.remove("group.id");
    config.create_with_context(Context).map_err(Error::settings)
}
