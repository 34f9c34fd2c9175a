//! The check: does Kafka let this deployment publish, and if not, why?
//!
//! It does what a shard does, under a transactional id of its own: with exactly-once delivery a transaction with one
//! record for the marker topic, which is aborted; else one tombstone there, which compaction removes.

use std::time::Duration;

use rdkafka::consumer::Consumer as _;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::producer::{FutureRecord, Producer as _};
use tokio::net::TcpStream;
use uuid::Uuid;

use super::{Delivery, Error, Kafka, MARKER_TOPIC, Settings, blocking, client, drop_aside};

/// One step of the check. A Kafka that takes longer holds every upload up.
const STEP: Duration = Duration::from_secs(5);
/// The same as librdkafka takes it. Also how long a check whose broker died may hide later markers from readers.
const STEP_MS: &str = "5000";
/// Connecting takes a millisecond in a data centre.
const CONNECT: Duration = Duration::from_secs(2);
/// So many addresses are tried, and named, at most.
const ADDRESSES: usize = 10;

/// Why pointers would not be published.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// The broker's principal lacks a right.
    #[error("missing ACL {operation} on {resource}")]
    MissingAcl {
        /// What it may not do.
        operation: &'static str,
        /// With what.
        resource: &'static str,
    },
    /// Addresses that Kafka advertises, or that the settings name, cannot be connected to.
    #[error("these Kafka addresses cannot be reached from here: {}", .0.join(", "))]
    Unreachable(Vec<String>),
    /// Anything else.
    #[error("{0}")]
    Kafka(#[from] Error),
}

impl CheckError {
    /// What may be shown to anybody: no address, and no words of Kafka's, which can hold one.
    pub(crate) fn public_reason(&self) -> String {
        match self {
            Self::MissingAcl { .. } => self.to_string(),
            Self::Unreachable(_) => "an address that Kafka advertises cannot be reached; the log names it".to_owned(),
            Self::Kafka(Error::Unreachable(_)) => "a record could not be written in time; the log has more".to_owned(),
            Self::Kafka(_) => "Kafka refused what publishing needs; the log has more".to_owned(),
        }
    }

    fn from_kafka(error: &KafkaError) -> Self {
        use RDKafkaErrorCode as Code;
        let code = match error {
            KafkaError::Transaction(error) => Some(error.code()),
            other => other.rdkafka_error_code(),
        };
        let missing = |operation, resource| Self::MissingAcl { operation, resource };
        match code {
            Some(Code::TransactionalIdAuthorizationFailed) => missing("Write", "TransactionalId lfs-broker.*"),
            Some(Code::TopicAuthorizationFailed) => missing("Write", "Topic lfs-broker-markers"),
            Some(Code::ClusterAuthorizationFailed) => missing("IdempotentWrite", "Cluster"),
            Some(code) => Self::Kafka(Error::from_code(code, error.to_string())),
            None => Self::Kafka(Error::from_kafka(error)),
        }
    }
}

impl Kafka {
    /// Tries what publishing needs, in one of the marker topic's partitions; each time in another.
    ///
    /// # Errors
    /// What keeps pointers from being published, by its cause where that can be found out.
    pub async fn check(&self, deployment: Uuid) -> Result<(), CheckError> {
        match self.try_to_write(deployment).await {
            Err(CheckError::Kafka(Error::Unreachable(reason))) => {
                let unreachable = self.unreachable().await;
                match unreachable.is_empty() {
                    true => Err(CheckError::Kafka(Error::Unreachable(reason))),
                    false => Err(CheckError::Unreachable(unreachable)),
                }
            }
            tried => tried,
        }
    }

    async fn try_to_write(&self, deployment: Uuid) -> Result<(), CheckError> {
        // The relay makes the topic when it takes its first shard; until then there is nothing to write to.
        let layout = match self.ask_layout(MARKER_TOPIC).await {
            Err(Error::Refused(reason)) if reason.contains("authoriz") => {
                return Err(CheckError::MissingAcl { operation: "Describe", resource: "Topic lfs-broker-markers" });
            }
            asked => asked?,
        };
        if layout.is_some() {
            self.check_marker_policy().await?;
        }
        let partition = layout.map(|layout| fastrand::i32(0..layout.partitions.max(1)));
        let mut settings = self.settings().clone();
        settings.properties.remove("delivery.timeout.ms");
        // librdkafka wants a transaction to outlast a request.
        for name in ["transaction.timeout.ms", "message.timeout.ms", "socket.timeout.ms"] {
            settings.properties.insert(name.to_owned(), STEP_MS.to_owned());
        }
        let id = format!("lfs-broker.{deployment}.check");
        blocking(move || Ok(write(&settings, &id, partition))).await?
    }

    /// The addresses of Kafka that cannot be connected to: those that it advertises, else those of the settings.
    async fn unreachable(&self) -> Vec<String> {
        let advertised = self.observe(|observer| {
            self.ask(move |time_left| {
                let metadata = observer.fetch_metadata(Some(MARKER_TOPIC), time_left).map_err(|e| Error::from_kafka(&e))?;
                Ok(metadata.brokers().iter().map(|broker| format!("{}:{}", broker.host(), broker.port())).collect())
            })
        });
        let addresses: Vec<String> = match advertised.await {
            Ok(advertised) => advertised,
            Err(_) => self.settings().bootstrap_servers.split(',').map(|address| address.trim().to_owned()).collect(),
        };
        let tries = addresses.into_iter().take(ADDRESSES).map(|address| async move {
            let is_reached = matches!(tokio::time::timeout(CONNECT, TcpStream::connect(&address)).await, Ok(Ok(_)));
            (!is_reached).then_some(address)
        });
        futures_util::future::join_all(tries).await.into_iter().flatten().collect()
    }
}

/// Blocks.
fn write(settings: &Settings, id: &str, partition: Option<i32>) -> Result<(), CheckError> {
    let transactional_id = (settings.delivery == Delivery::ExactlyOnce).then_some(id);
    let producer = client::producer(settings, transactional_id)?;
    let record = || {
        let Some(partition) = partition else { return Ok(()) };
        // No value: a tombstone.
        let record = FutureRecord::<str, [u8]>::to(MARKER_TOPIC).partition(partition).key(id);
        let sent = producer.send_result(record).map_err(|(error, _)| error)?;
        match tokio::runtime::Handle::current().block_on(sent) {
            Ok(Ok(_)) => Ok(()),
            Ok(Err((error, _))) => Err(error),
            Err(_) => Err(KafkaError::Canceled),
        }
    };
    let written = match transactional_id {
        Some(_) => producer
            .init_transactions(STEP)
            .and_then(|()| producer.begin_transaction())
            .and_then(|()| record())
            .and_then(|()| producer.abort_transaction(STEP)),
        None => record(),
    };
    // Another replica that checks at the same moment fences this one: it could write, so this one could.
    let is_fenced = written.is_err() && producer.client().fatal_error().is_some_and(|(code, _)| is_fence(code));
    drop_aside(producer);
    match written {
        Err(error) if !is_fenced => Err(CheckError::from_kafka(&error)),
        _ => Ok(()),
    }
}

fn is_fence(code: RDKafkaErrorCode) -> bool {
    use RDKafkaErrorCode as Code;
    matches!(code, Code::Fenced | Code::ProducerFenced | Code::InvalidProducerEpoch)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_right_that_is_missing_is_named_with_its_resource() {
        use RDKafkaErrorCode as Code;
        let named = |code| CheckError::from_kafka(&KafkaError::MessageProduction(code)).to_string();
        let ids = "missing ACL Write on TransactionalId lfs-broker.*";
        assert_eq!(named(Code::TransactionalIdAuthorizationFailed), ids);
        assert_eq!(named(Code::TopicAuthorizationFailed), "missing ACL Write on Topic lfs-broker-markers");
        assert_eq!(named(Code::ClusterAuthorizationFailed), "missing ACL IdempotentWrite on Cluster");
    }
}
