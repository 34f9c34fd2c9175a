//! The readiness check: can this deployment publish to Kafka, and if not, why?
//!
//! It writes as a shard does, under its own transactional id. With exactly-once delivery it sends one record to the marker
//! topic in a transaction and aborts the transaction. Otherwise it sends one tombstone, which compaction removes.

use std::time::Duration;

use rdkafka::consumer::Consumer as _;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::producer::{FutureRecord, Producer as _};
use tokio::net::TcpStream;
use uuid::Uuid;

use super::producer::{self, send};
use super::{Delivery, Error, Kafka, MARKER_TOPIC, Settings, client, drop_blocking, run_blocking};

/// The limit for one step of the check. A Kafka that takes longer would delay every upload.
const STEP_TIMEOUT: Duration = Duration::from_secs(5);
/// [`STEP_TIMEOUT`] for librdkafka. If the broker dies during a check, the open transaction hides later markers this long.
const STEP_TIMEOUT_MS: &str = "5000";
/// A connection takes about a millisecond in a data centre.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// The most broker addresses that the check connects to and lists.
const MAX_ADDRESSES: usize = 10;

/// Why publishing would fail.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// The Kafka user of this broker lacks a right.
    #[error("missing ACL {operation} on {resource}")]
    MissingAcl {
        /// The operation that is not allowed.
        operation: &'static str,
        /// The resource of the operation.
        resource: &'static str,
    },
    /// Kafka answers, but there is no connection to these addresses, which it advertises.
    #[error("these addresses that Kafka advertises cannot be reached from here: {}", .0.join(", "))]
    AdvertisedUnreachable(Vec<String>),
    /// Kafka does not answer, and there is no connection to these addresses of the settings.
    #[error("these addresses in KAFKA_BOOTSTRAP_SERVERS cannot be reached from here: {}", .0.join(", "))]
    ConfiguredUnreachable(Vec<String>),
    /// Any other failure.
    #[error("{0}")]
    Kafka(#[from] Error),
}

impl CheckError {
    /// The reason for unauthenticated clients. It contains no address and no text from Kafka, which may contain one.
    pub(crate) fn public_reason(&self) -> String {
        match self {
            Self::MissingAcl { .. } => self.to_string(),
            Self::AdvertisedUnreachable(_) => {
                "an address that Kafka advertises cannot be reached; the log contains it".to_owned()
            }
            Self::ConfiguredUnreachable(_) => {
                "an address in KAFKA_BOOTSTRAP_SERVERS cannot be reached; the log contains it".to_owned()
            }
            Self::Kafka(Error::Unreachable(_)) => {
                format!("a record could not be written within {} s; the log contains the error", STEP_TIMEOUT.as_secs())
            }
            Self::Kafka(_) => "Kafka refused a request that publishing needs; the log contains the error".to_owned(),
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
    /// Writes as publishing does, to a random partition of the marker topic.
    ///
    /// # Errors
    /// The reason why publishing would fail, with its cause if that is known.
    pub async fn check(&self, deployment: Uuid) -> Result<(), CheckError> {
        match self.write_probe(&format!("lfs-broker.{deployment}.check")).await {
            Err(CheckError::Kafka(Error::Unreachable(reason))) => {
                Err(self.unreachable_addresses().await.unwrap_or(CheckError::Kafka(Error::Unreachable(reason))))
            }
            result => result,
        }
    }

    /// Writes a record to the marker topic, in a transaction of `transactional_id` that it aborts.
    pub(super) async fn write_probe(&self, transactional_id: &str) -> Result<(), CheckError> {
        // The relay creates the topic before it takes over its first shard. Until then there is no partition to write to.
        let metadata = match self.query_topic_metadata(MARKER_TOPIC).await {
            Err(Error::Refused(reason)) if reason.contains("authoriz") => {
                return Err(CheckError::MissingAcl { operation: "Describe", resource: "Topic lfs-broker-markers" });
            }
            answer => answer?,
        };
        if metadata.is_some() {
            self.check_marker_policy().await?;
        }
        let partition = metadata.map(|metadata| fastrand::i32(0..metadata.partitions.max(1)));
        let mut settings = self.settings().clone();
        settings.properties.remove("delivery.timeout.ms");
        // librdkafka requires that a transaction's timeout is not shorter than a request's.
        for name in ["transaction.timeout.ms", "message.timeout.ms", "socket.timeout.ms"] {
            settings.properties.insert(name.to_owned(), STEP_TIMEOUT_MS.to_owned());
        }
        let id = transactional_id.to_owned();
        run_blocking(move || Ok(write_probe_record(&settings, &id, partition))).await?
    }

    /// The Kafka addresses without a connection, among those that Kafka advertises, or else those in the settings. `None` if
    /// each of them can be reached.
    async fn unreachable_addresses(&self) -> Option<CheckError> {
        let advertised = self.with_metadata_client(|client| {
            self.query(move |time_left| {
                let metadata = client.fetch_metadata(Some(MARKER_TOPIC), time_left).map_err(|e| Error::from_kafka(&e))?;
                Ok(metadata.brokers().iter().map(|broker| format!("{}:{}", broker.host(), broker.port())).collect())
            })
        });
        let advertised: Result<Vec<String>, Error> = advertised.await;
        let is_advertised = advertised.is_ok();
        let addresses = advertised.unwrap_or_else(|_| client::bootstrap_addresses(&self.settings().bootstrap_servers));
        let attempts = addresses.into_iter().take(MAX_ADDRESSES).map(|address| async move {
            let is_reachable = matches!(tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(&address)).await, Ok(Ok(_)));
            (!is_reachable).then_some(address)
        });
        let unreachable: Vec<String> = futures_util::future::join_all(attempts).await.into_iter().flatten().collect();
        match unreachable.is_empty() {
            true => None,
            false if is_advertised => Some(CheckError::AdvertisedUnreachable(unreachable)),
            false => Some(CheckError::ConfiguredUnreachable(unreachable)),
        }
    }
}

/// Writes the record of the check. Blocks.
fn write_probe_record(settings: &Settings, id: &str, partition: Option<i32>) -> Result<(), CheckError> {
    let transactional_id = (settings.delivery == Delivery::ExactlyOnce).then_some(id);
    let producer = producer::connect(settings, transactional_id)?;
    let record = || {
        let Some(partition) = partition else { return Ok(()) };
        // A record without a value is a tombstone.
        let record = FutureRecord::<str, [u8]>::to(MARKER_TOPIC).partition(partition).key(id);
        send(&producer, record)?.blocking_recv().unwrap_or(Err(KafkaError::Canceled)).map(drop)
    };
    let written = match transactional_id {
        Some(_) => producer
            .init_transactions(STEP_TIMEOUT)
            .and_then(|()| producer.begin_transaction())
            .and_then(|()| record())
            .and_then(|()| producer.abort_transaction(STEP_TIMEOUT)),
        None => record(),
    };
    // Another replica that checks at the same moment fences this producer. That replica can write, so this one can too.
    let is_fenced = written.is_err() && producer.client().fatal_error().is_some_and(|(code, _)| is_fencing_code(code));
    drop_blocking(producer);
    match written {
        Err(error) if !is_fenced => Err(CheckError::from_kafka(&error)),
        _ => Ok(()),
    }
}

fn is_fencing_code(code: RDKafkaErrorCode) -> bool {
    use RDKafkaErrorCode as Code;
    matches!(code, Code::Fenced | Code::ProducerFenced | Code::InvalidProducerEpoch)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_acl_is_reported_with_its_operation_and_resource() {
        use RDKafkaErrorCode as Code;
        let text = |code| CheckError::from_kafka(&KafkaError::MessageProduction(code)).to_string();
        let ids = "missing ACL Write on TransactionalId lfs-broker.*";
        assert_eq!(text(Code::TransactionalIdAuthorizationFailed), ids);
        assert_eq!(text(Code::TopicAuthorizationFailed), "missing ACL Write on Topic lfs-broker-markers");
        assert_eq!(text(Code::ClusterAuthorizationFailed), "missing ACL IdempotentWrite on Cluster");
    }
}
