//! Detects a database that is older than Kafka: it was restored from a backup, or a failover lost its last commits.
//!
//! The relay commits the number of a batch to PostgreSQL before it sends the batch. Each batch also writes its number to
//! the marker topic. If a marker has a higher number than the database, the database has lost commits. The state of an
//! upload may then be out of date, so the broker must not delete or send anything because of it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use tracing::{error, info};

use crate::kafka::{self, Kafka, MARKER_TOPIC, Marker};
use crate::store::{self, Deployment, Store};

/// How many markers are read at the same time.
const MAX_CONCURRENT_READS: usize = 16;
/// The limit for one comparison. 4 shards take about ten milliseconds, 1,024 shards a few seconds. An open transaction in
/// a marker's partition delays the read of this marker until the transaction ends.
const CHECK_TIMEOUT: Duration = Duration::from_secs(10);

/// The instruction for the operator. It contains no address, so it may also go to clients.
pub(crate) const ADVICE: &str = "the database is older than Kafka: run `lfs-broker audit --fix`";

/// A shard for which Kafka holds a later batch than the database ever claimed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "kafka holds batch {marker} of shard {shard}, but the last batch in the database is {last_batch}: \
     the database was restored from a backup"
)]
pub struct KafkaAhead {
    /// The shard.
    pub shard: i32,
    /// The batch number in the shard's last marker in Kafka.
    pub marker: i64,
    /// The last batch number in the database.
    pub last_batch: i64,
}

/// Why the database cannot be trusted now.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// An operator must reconcile the database with Kafka.
    #[error("{0}; {ADVICE}")]
    KafkaAhead(KafkaAhead),
    #[error("cannot read the markers: {0}")]
    Kafka(#[from] kafka::Error),
    #[error("{0}")]
    Store(#[from] store::Error),
    /// The topic was not created yet, it was deleted, or a Kafka that has just restarted does not list it yet.
    #[error("kafka has no topic {MARKER_TOPIC}, but the database has claimed batch {last_batch} of shard {shard}")]
    NoMarkerTopic { shard: i32, last_batch: i64 },
    #[error("could not read the markers within {} s", CHECK_TIMEOUT.as_secs())]
    TimedOut,
}

/// Compares the database with Kafka. Clones share the last outcome.
#[derive(Clone)]
pub(crate) struct RestoreCheck {
    store: Store,
    kafka: Kafka,
    deployment: Deployment,
    last_outcome: Arc<Mutex<Outcome>>,
}

/// The last outcome. A comparison that failed does not change it.
#[derive(Default)]
struct Outcome {
    was_compared: bool,
    kafka_ahead: Option<KafkaAhead>,
}

impl RestoreCheck {
    pub(crate) fn new(store: Store, kafka: Kafka, deployment: Deployment) -> Self {
        Self { store, kafka, deployment, last_outcome: Arc::default() }
    }

    /// Compares now. If this returns `Ok`, the caller can act on data that it read from the database before this call:
    /// the comparison would have detected a database that is older than Kafka.
    ///
    /// # Errors
    /// If the database is older than Kafka, or if the comparison failed.
    pub(crate) async fn check(&self) -> Result<(), Error> {
        let checked = self.compare().await;
        if let Err(Error::KafkaAhead(ahead)) = checked {
            self.report_kafka_ahead(ahead);
        }
        checked
    }

    /// Compares like [`Self::check`], but does not log or record that the database is older.
    pub(crate) async fn compare(&self) -> Result<(), Error> {
        let ahead = tokio::time::timeout(CHECK_TIMEOUT, self.shards_ahead()).await.unwrap_or(Err(Error::TimedOut))?;
        if let Some(first) = ahead.first() {
            return Err(Error::KafkaAhead(*first));
        }
        let mut outcome = self.last_outcome();
        if outcome.kafka_ahead.is_some() {
            info!("the database is no longer older than Kafka: deleting and publishing continue");
        }
        *outcome = Outcome { was_compared: true, kafka_ahead: None };
        Ok(())
    }

    /// Records that the database is older. It is logged once, until a comparison finds the database reconciled.
    pub(crate) fn report_kafka_ahead(&self, ahead: KafkaAhead) {
        let mut outcome = self.last_outcome();
        if outcome.kafka_ahead.is_none() {
            error!(shard = ahead.shard, marker = ahead.marker, last_batch = ahead.last_batch, "{}", Error::KafkaAhead(ahead));
        }
        *outcome = Outcome { was_compared: true, kafka_ahead: Some(ahead) };
    }

    /// Whether the last comparison found the database to be older than Kafka.
    pub(crate) fn is_kafka_ahead(&self) -> bool {
        self.last_outcome().kafka_ahead.is_some()
    }

    /// Whether the last comparison found that the database is not older than Kafka.
    pub(crate) fn is_passed(&self) -> bool {
        let outcome = self.last_outcome();
        outcome.was_compared && outcome.kafka_ahead.is_none()
    }

    /// The shards for which Kafka has more than the database.
    pub(crate) async fn shards_ahead(&self) -> Result<Vec<KafkaAhead>, Error> {
        let markers = self.markers().await?;
        // The markers are read before the batch numbers, because a running relay claims a batch before it sends it.
        let last_batches = self.store.last_batches().await?;
        if markers.is_none()
            && let Some((shard, last_batch)) = last_batches.iter().copied().find(|(_, last_batch)| *last_batch > 0)
        {
            return Err(Error::NoMarkerTopic { shard, last_batch });
        }
        let known = |shard: i32| last_batches.iter().find(|(known, _)| *known == shard).map_or(0, |(_, last_batch)| *last_batch);
        let mut ahead = Vec::new();
        for (shard, marker) in markers.into_iter().flatten() {
            let last_batch = known(shard);
            // An equal number is no proof: a relay that kept running can claim this number again in a restored database.
            let published: Vec<_> = marker.published.iter().map(|record| record.upload_id).collect();
            if marker.batch > last_batch || self.store.count_unverified(&published).await? > 0 {
                ahead.push(KafkaAhead { shard, marker: marker.batch, last_batch });
            }
        }
        Ok(ahead)
    }

    /// The last marker of each shard that has one; `None` if the marker topic does not exist.
    pub(crate) async fn markers(&self) -> Result<Option<Vec<(i32, Marker)>>, Error> {
        let Some(partitions) = self.kafka.marker_partition_count().await? else { return Ok(None) };
        let read = stream::iter(0..self.deployment.shards.min(partitions)).map(|shard| async move {
            let marker = self.kafka.last_marker(&kafka::transactional_id(self.deployment.id, shard), shard).await?;
            Ok::<_, Error>(marker.map(|marker| (shard, marker)))
        });
        let markers: Vec<Option<(i32, Marker)>> = read.buffered(MAX_CONCURRENT_READS).try_collect().await?;
        Ok(Some(markers.into_iter().flatten().collect()))
    }

    fn last_outcome(&self) -> MutexGuard<'_, Outcome> {
        // Each statement leaves the value complete, so it is still valid after a panic elsewhere.
        self.last_outcome.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
