//! Creates librdkafka clients: the properties that this broker sets, the properties of the operator, and the log.

use std::collections::BTreeMap;

use rdkafka::ClientConfig;
use rdkafka::client::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::consumer::{BaseConsumer, ConsumerContext};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::statistics::Statistics;
use tracing::{debug, warn};

use super::{Error, Settings};

/// Properties that this broker sets, because delivery depends on them. `connect` rejects settings that contain one.
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

/// A transaction of a crashed owner hides later records from consumers for at most this time.
const MAX_TRANSACTION_MS: u64 = 60_000;

/// Defaults that an operator may change: name, alias in librdkafka, value. Connections time out and reconnect within
/// seconds, because requests wait for Kafka no longer than that.
const DEFAULTS: [(&str, &str, &str); 8] = [
    ("client.id", "", "lfs-broker"),
    ("group.id", "", "lfs-broker"),
    ("reconnect.backoff.ms", "", "50"),
    ("reconnect.backoff.max.ms", "", "1000"),
    ("socket.connection.setup.timeout.ms", "", "3000"),
    ("socket.timeout.ms", "", "10000"),
    ("socket.keepalive.enable", "", "true"),
    // A new partition is used within ten seconds. `partition_count` has the same delay.
    ("topic.metadata.refresh.interval.ms", "", "10000"),
];

/// Sends librdkafka's logs to `tracing`. Without it, librdkafka writes to stderr.
#[derive(Clone)]
pub(super) struct Context;

impl ClientContext for Context {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        // The caller that needs a connection logs its loss. librdkafka would repeat it at every attempt of every client.
        let is_expected = matches!(facility, "FAIL" | "ERROR" | "CONFWARN" | "TXNERR" | "ADDPARTS" | "MAXPOLL");
        match level {
            RDKafkaLogLevel::Emerg | RDKafkaLogLevel::Alert | RDKafkaLogLevel::Critical | RDKafkaLogLevel::Error
                if !is_expected =>
            {
                warn!(facility, "librdkafka: {message}");
            }
            _ => debug!(facility, "librdkafka: {message}"),
        }
    }

    fn error(&self, error: KafkaError, reason: &str) {
        use RDKafkaErrorCode::{AllBrokersDown, BrokerTransportFailure, OperationTimedOut, PartitionEOF, Resolve};
        match error.rdkafka_error_code() {
            // Readers also receive the end of a partition as an event, so it needs no warning.
            Some(AllBrokersDown | BrokerTransportFailure | OperationTimedOut | PartitionEOF | Resolve) => {
                debug!("kafka connection: {error}: {reason}");
            }
            _ => warn!("kafka client error: {error}: {reason}"),
        }
    }

    fn stats(&self, _: Statistics) {}

    fn stats_raw(&self, _: &[u8]) {}
}

impl ConsumerContext for Context {}

/// Rejects properties that this broker sets itself, and timeouts that are too long.
pub(super) fn check(properties: &BTreeMap<String, String>) -> Result<(), Error> {
    for (key, value) in properties {
        if RESERVED.contains(&key.as_str()) {
            return Err(Error::Reserved(key.clone()));
        }
        let limited = ["transaction.timeout.ms", "message.timeout.ms", "delivery.timeout.ms"];
        if limited.contains(&key.as_str()) && !value.parse().is_ok_and(|value: u64| (1..=MAX_TRANSACTION_MS).contains(&value)) {
            return Err(Error::Limit { key: key.clone(), value: value.clone(), limit: MAX_TRANSACTION_MS });
        }
    }
    Ok(())
}

/// Whether librdkafka can connect to these addresses: `HOST` or `HOST:PORT`, separated by commas. It also accepts a security
/// protocol such as `SSL://` before an address, but no URL.
pub(crate) fn are_bootstrap_servers(text: &str) -> bool {
    text.split(',').map(str::trim).all(|address| {
        let (protocol, address) = address.split_once("://").unwrap_or(("plaintext", address));
        let is_protocol = ["plaintext", "ssl", "sasl_plaintext", "sasl_ssl"].contains(&protocol.to_ascii_lowercase().as_str());
        is_protocol && !address.is_empty() && !address.contains('/')
    })
}

/// The addresses without their security protocols.
pub(super) fn bootstrap_addresses(text: &str) -> Vec<String> {
    let without_protocol = |address: &str| address.trim().rsplit("://").next().unwrap_or_default().to_owned();
    text.split(',').map(without_protocol).collect()
}

pub(super) fn config(settings: &Settings, defaults: &[(&str, &str, &str)]) -> ClientConfig {
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

/// A client for queries only. It is a consumer, because only consumers can ask for a topic without creating it.
pub(super) fn metadata_client(settings: &Settings, create_topics: bool) -> Result<BaseConsumer<Context>, Error> {
    let mut config = config(settings, &[]);
    // A consumer without a group needs no coordinator and leaves no state in Kafka.
    config.remove("group.id");
    config
        .set("allow.auto.create.topics", create_topics.to_string())
        // `marker` needs the end of the log including open transactions.
        .set("isolation.level", "read_uncommitted");
    config.create_with_context(Context).map_err(Error::settings)
}

/// A consumer of committed records for assigned partitions. It never joins its group.
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

/// The consumer of `lfs-broker consume`. A member may take hours to save a file and stays in the group meanwhile.
/// The group drops a dead member within seconds.
pub(super) fn topic_consumer(
    settings: &Settings,
    group: Option<&str>,
    from_beginning: bool,
) -> Result<BaseConsumer<Context>, Error> {
    let mut config = config(settings, &[("max.poll.interval.ms", "", "86400000"), ("session.timeout.ms", "", "10000")]);
    config
        .set("allow.auto.create.topics", "false")
        .set("auto.offset.reset", if from_beginning { "earliest" } else { "latest" })
        .set("enable.auto.commit", "false")
        .set("enable.auto.offset.store", "false")
        .set("isolation.level", "read_committed");
    if let Some(group) = group {
        config.set("group.id", group);
    }
    config.create_with_context(Context).map_err(Error::settings)
}

/// An admin client, to create topics and to read their configuration.
pub(super) fn admin(settings: &Settings) -> Result<rdkafka::admin::AdminClient<Context>, Error> {
    let mut config = config(settings, &[]);
    config.remove("group.id");
    config.create_with_context(Context).map_err(Error::settings)
}
