//! Whether the database is older than Kafka: it was restored from a backup, or a failover lost its last commits.
//!
//! The relay commits a batch's number to PostgreSQL before it sends anything, and each batch leaves its number in the
//! marker topic. So a marker with a higher number than the database knows means that the database has lost commits:
//! whatever it says of an upload may be out of date, and nothing may be deleted or sent because of it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use tracing::{error, info};

use crate::kafka::{self, Kafka, MARKER_TOPIC, Marker};
use crate::store::{self, Deployment, Store};

/// Markers read at the same time.
const AT_ONCE: usize = 16;
/// One comparison. Four shards take some ten milliseconds, 1,024 a few seconds; one marker takes as long as a
/// transaction is open in its partition.
const CHECK_WITHIN: Duration = Duration::from_secs(10);

/// What an operator is told, without addresses.
pub(crate) const ADVICE: &str = "the database is older than Kafka: run `lfs-broker audit --fix`";

/// A shard of which Kafka holds a later batch than the database ever stamped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("kafka holds batch {marker} of shard {shard}, the database knows {last_batch}: the database was restored from a backup")]
pub struct Ahead {
    /// The shard.
    pub shard: i32,
    /// The batch of its last marker in Kafka.
    pub marker: i64,
    /// The last batch that the database stamped.
    pub last_batch: i64,
}

/// Why the database cannot be trusted now.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// Only an operator can help.
    #[error("{0}; {ADVICE}")]
    Older(Ahead),
    #[error("the markers cannot be read: {0}")]
    Kafka(#[from] kafka::Error),
    #[error("{0}")]
    Store(#[from] store::Error),
    /// It was not made yet, was deleted, or a Kafka that has just come back does not list it yet.
    #[error("kafka has no topic {MARKER_TOPIC}, but the database has stamped batch {last_batch} of shard {shard}")]
    NoMarkerTopic { shard: i32, last_batch: i64 },
    #[error("the markers were not read within {} s", CHECK_WITHIN.as_secs())]
    Late,
}

/// Compares the database with Kafka; clones share what was found last.
#[derive(Clone)]
pub(crate) struct RestoreCheck {
    store: Store,
    kafka: Kafka,
    deployment: Deployment,
    found: Arc<Mutex<Found>>,
}

/// The last outcome. A comparison that could not be made leaves it as it was.
#[derive(Default)]
struct Found {
    was_compared: bool,
    older: Option<Ahead>,
}

impl RestoreCheck {
    pub(crate) fn new(store: Store, kafka: Kafka, deployment: Deployment) -> Self {
        Self { store, kafka, deployment, found: Arc::default() }
    }

    /// Compares now. What was read from the database before this call is safe to act on where this returns `Ok`: a
    /// database that is older than Kafka would have been noticed.
    ///
    /// # Errors
    /// Where the database is older, and where that could not be found out.
    pub(crate) async fn check(&self) -> Result<(), Error> {
        let checked = self.compare().await;
        if let Err(Error::Older(ahead)) = checked {
            self.note(ahead);
        }
        checked
    }

    /// The same without a log line for a database that is older.
    pub(crate) async fn compare(&self) -> Result<(), Error> {
        let ahead = tokio::time::timeout(CHECK_WITHIN, self.ahead()).await.unwrap_or(Err(Error::Late))?;
        if let Some(first) = ahead.first() {
            return Err(Error::Older(*first));
        }
        let mut found = self.found();
        if found.older.is_some() {
            info!("the database is not older than Kafka any more: deleting and publishing go on");
        }
        *found = Found { was_compared: true, older: None };
        Ok(())
    }

    /// Notes that the database is older, whoever noticed it. Logged once until a comparison finds it reconciled.
    pub(crate) fn note(&self, ahead: Ahead) {
        let mut found = self.found();
        if found.older.is_none() {
            error!(shard = ahead.shard, marker = ahead.marker, last_batch = ahead.last_batch, "{}", Error::Older(ahead));
        }
        *found = Found { was_compared: true, older: Some(ahead) };
    }

    /// Whether the database was found to be older, by the last comparison.
    pub(crate) fn is_older(&self) -> bool {
        self.found().older.is_some()
    }

    /// Whether a comparison was made and found nothing.
    pub(crate) fn is_passed(&self) -> bool {
        let found = self.found();
        found.was_compared && found.older.is_none()
    }

    /// The shards of which Kafka knows more than the database.
    pub(crate) async fn ahead(&self) -> Result<Vec<Ahead>, Error> {
        let markers = self.markers().await?;
        // In this order: a relay at work stamps first and sends after.
        let stamped = self.store.last_batches().await?;
        if markers.is_none()
            && let Some((shard, last_batch)) = stamped.iter().copied().find(|(_, last_batch)| *last_batch > 0)
        {
            return Err(Error::NoMarkerTopic { shard, last_batch });
        }
        let known = |shard: i32| stamped.iter().find(|(known, _)| *known == shard).map_or(0, |(_, last_batch)| *last_batch);
        let mut ahead = Vec::new();
        for (shard, marker) in markers.into_iter().flatten() {
            let last_batch = known(shard);
            // Under the same number too: a relay that lived on may have claimed once more in a database that went back.
            let published: Vec<_> = marker.published.iter().map(|record| record.upload_id).collect();
            if marker.batch > last_batch || self.store.unfinished(&published).await? > 0 {
                ahead.push(Ahead { shard, marker: marker.batch, last_batch });
            }
        }
        Ok(ahead)
    }

    /// The last marker of each shard that has one; `None` where there is no marker topic.
    pub(crate) async fn markers(&self) -> Result<Option<Vec<(i32, Marker)>>, Error> {
        let Some(partitions) = self.kafka.marker_partitions().await? else { return Ok(None) };
        let read = stream::iter(0..self.deployment.shards.min(partitions)).map(|shard| async move {
            let marker = self.kafka.last_marker(&kafka::transactional_id(self.deployment.id, shard), shard).await?;
            Ok::<_, Error>(marker.map(|marker| (shard, marker)))
        });
        let markers: Vec<Option<(i32, Marker)>> = read.buffered(AT_ONCE).try_collect().await?;
        Ok(Some(markers.into_iter().flatten().collect()))
    }

    fn found(&self) -> MutexGuard<'_, Found> {
        // It is whole after every statement, so a panic elsewhere does not spoil it.
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
