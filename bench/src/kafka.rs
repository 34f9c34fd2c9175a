//! Kafka beside the broker: the topic, a transaction of one record as the limit of a complete, and the requests that Kafka
//! counts.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::producer::{FutureProducer, FutureRecord, Producer as _};
use tokio::process::Command;

use crate::Failure;
use crate::servers::output;

/// The limit of one call to Kafka.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// The `client.id` of the broker. Kafka's request log names it.
const BROKER_CLIENT_ID: &str = "lfs-broker";
/// The logger of Kafka that writes a line for each request.
const REQUEST_LOGGER: &str = "kafka.request.logger";
/// How long the log must not grow before its requests are counted. An idle broker sends a request less often.
const LOG_QUIET_TIME: Duration = Duration::from_millis(500);
const MAX_LOG_READS: usize = 20;

fn config(bootstrap: &str) -> ClientConfig {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", bootstrap).set("client.id", "bench").set("linger.ms", "0");
    config
}

/// Creates a topic.
pub(crate) async fn create_topic(bootstrap: &str, topic: &str, partitions: i32) -> Result<(), Failure> {
    let admin: AdminClient<DefaultClientContext> = config(bootstrap).create()?;
    let options = AdminOptions::new().request_timeout(Some(CALL_TIMEOUT));
    let topic = NewTopic::new(topic, partitions, TopicReplication::Fixed(1));
    for created in admin.create_topics([&topic], &options).await? {
        created.map_err(|(topic, code)| Failure(format!("cannot create the topic {topic}: {code}")))?;
    }
    Ok(())
}

/// Waits until a partition of the topic has a leader again.
pub(crate) async fn wait_until_available(bootstrap: &str, topic: &'static str, limit: Duration) -> Result<(), Failure> {
    let consumer: BaseConsumer = config(bootstrap).set("reconnect.backoff.max.ms", "100").create()?;
    let began = Instant::now();
    let waited = tokio::task::spawn_blocking(move || {
        while began.elapsed() < limit {
            let metadata = consumer.fetch_metadata(Some(topic), Duration::from_millis(500));
            let has_leader = |found: rdkafka::metadata::Metadata| {
                found.topics().iter().any(|topic| topic.partitions().iter().any(|partition| partition.leader() >= 0))
            };
            if metadata.is_ok_and(has_leader) {
                return true;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        false
    });
    match waited.await {
        Ok(true) => Ok(()),
        Ok(false) => Err(Failure(format!("Kafka did not serve the topic {topic} within {} s", limit.as_secs()))),
        Err(error) => Err(Failure(format!("waiting for Kafka failed: {error}"))),
    }
}

/// A producer whose transactions have one record each.
pub(crate) struct Transactions {
    producer: FutureProducer,
}

impl Transactions {
    /// Initialises a producer with its own `transactional.id`.
    pub(crate) async fn start(bootstrap: &str, id: String) -> Result<Self, Failure> {
        let mut config = config(bootstrap);
        config.set("transactional.id", id).set("acks", "all").set("enable.idempotence", "true");
        let producer: FutureProducer = config.create()?;
        let transactions = Self { producer };
        transactions.blocking(|producer| producer.init_transactions(CALL_TIMEOUT)).await?;
        Ok(transactions)
    }

    /// One transaction of one record.
    pub(crate) async fn run(&self, topic: &str, value: &[u8]) -> Result<(), Failure> {
        // Beginning only changes the local state.
        self.producer.begin_transaction()?;
        let record = FutureRecord::<(), [u8]>::to(topic).payload(value);
        // A commit that has to wait for an acknowledgement takes 100 ms longer, so await it first.
        let sent = self.producer.send_result(record).map_err(|(error, _)| error)?;
        let delivered = sent.await.map_err(|_| Failure("the producer was closed before it sent the record".into()))?;
        delivered.map_err(|(error, _)| error)?;
        self.blocking(|producer| producer.commit_transaction(CALL_TIMEOUT)).await
    }

    async fn blocking(
        &self,
        call: impl FnOnce(&FutureProducer) -> rdkafka::error::KafkaResult<()> + Send + 'static,
    ) -> Result<(), Failure> {
        let producer = self.producer.clone();
        let called = tokio::task::spawn_blocking(move || call(&producer)).await;
        Ok(called.map_err(|error| Failure(format!("a call to Kafka failed: {error}")))??)
    }
}

/// Counts the broker's requests in Kafka's log. Kafka writes the log to standard output, which `.ci/bench` sends to a file.
pub(crate) struct RequestLog {
    pub(crate) bootstrap: String,
    /// The log of Kafka.
    pub(crate) path: PathBuf,
    /// The class path of Kafka.
    pub(crate) class_path: String,
}

impl RequestLog {
    /// Switches the log of requests on or off.
    pub(crate) async fn set(&self, level: &str) -> Result<(), Failure> {
        let mut command = Command::new("java");
        command.args(["-Xmx128m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-cp", &self.class_path]);
        command.args(["kafka.admin.ConfigCommand", "--bootstrap-server", &self.bootstrap, "--alter"]);
        command.args(["--entity-type", "broker-loggers", "--entity-name", "1"]);
        command.arg("--add-config").arg(format!("{REQUEST_LOGGER}={level}"));
        output(&mut command).await.map(drop)
    }

    /// The length of the log. [`Self::settled_since`] counts from there.
    pub(crate) fn position(&self) -> Result<usize, Failure> {
        Ok(std::fs::read(&self.path)?.len())
    }

    /// The requests that the broker has sent since the position. Kafka logs a request after its response was sent, so this waits
    /// until the log no longer grows.
    pub(crate) async fn settled_since(&self, position: usize) -> Result<Requests, Failure> {
        let mut length = 0;
        for _ in 0..MAX_LOG_READS {
            let log = std::fs::read(&self.path)?;
            if log.len() == length {
                let text = String::from_utf8_lossy(log.get(position..).unwrap_or_default()).into_owned();
                return Ok(Requests::parse(&text));
            }
            length = log.len();
            tokio::time::sleep(LOG_QUIET_TIME).await;
        }
        Err(Failure("Kafka's log of requests did not stop growing".into()))
    }
}

/// Requests of the broker.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Requests(BTreeMap<String, usize>);

impl Requests {
    fn parse(log: &str) -> Self {
        let of_broker = format!("\"clientId\":\"{BROKER_CLIENT_ID}\"");
        let mut counts = BTreeMap::new();
        for line in log.lines().filter(|line| line.contains("Completed request") && line.contains(&of_broker)) {
            let name = line.split_once("\"requestApiKeyName\":\"").and_then(|(_, rest)| rest.split_once('"'));
            if let Some((name, _)) = name {
                *counts.entry(name.to_owned()).or_default() += 1;
            }
        }
        Self(counts)
    }

    /// How many there were.
    pub(crate) fn total(&self) -> usize {
        self.0.values().sum()
    }

    /// How many there were of this kind.
    pub(crate) fn of(&self, name: &str) -> usize {
        self.0.get(name).copied().unwrap_or_default()
    }

    /// How many there were of each kind.
    pub(crate) fn by_name(&self) -> impl Iterator<Item = (&str, usize)> {
        self.0.iter().map(|(name, count)| (name.as_str(), *count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_requests_of_the_broker_are_counted() {
        let line = |client: &str, name: &str| {
            let header = format!(r#"{{"requestApiKeyName":"{name}","clientId":"{client}"}}"#);
            format!("12:00:00 DEBUG kafka.request.logger - Completed request:{{\"requestHeader\":{header}}}\n")
        };
        let log = [
            line("lfs-broker", "PRODUCE"),
            line("bench", "PRODUCE"),
            line("lfs-broker", "END_TXN"),
            line("lfs-broker", "PRODUCE"),
        ];
        let requests = Requests::parse(&log.concat());
        assert_eq!(requests.by_name().collect::<Vec<_>>(), [("END_TXN", 1), ("PRODUCE", 2)]);
        assert_eq!((requests.total(), requests.of("PRODUCE"), requests.of("FETCH")), (3, 2, 0));
    }
}
