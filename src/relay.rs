//! The relay: carries pointers from the outbox to Kafka, exactly once and in order.
//!
//! A shard's owner fences whoever owned it before (Kafka's word, not ours), settles what that one left behind by
//! the last committed marker, and only then sends. A batch is stamped and committed before anything of it is sent,
//! and its marker is part of its own Kafka transaction: so a stamped row is published if the marker lists it, and
//! is sent again if not. With `at_least_once` there is no transaction, and the marker goes first and lists nothing: what
//! was stamped is sent again.
//!
//! PostgreSQL may lose commits at any moment: a backup is restored, or a standby is promoted that lacks the last ones.
//! Connections come back by themselves and the lease row may be as it was, so nothing else tells. Therefore a batch is
//! claimed only if the shard is as its holder left it: the last batch number, and no row stamped. If it is not, or the
//! database fails in any way, the holder drops its shards, and takes them anew: fence, marker, comparison, settling.

mod isolation;
mod look_up;
mod settlement;
mod stall;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::convert::Infallible;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::task::{Id, JoinError, JoinSet};
use tracing::{error, info, warn};
use uuid::Uuid;

use crate::kafka::{self, Kafka, Record, Refusal, Shard};
use crate::restore_check::{Ahead, RestoreCheck};
use crate::store::{self, Claim, Deployment, Ownership, Store, Waiting};
use crate::wakes::Wakes;
use isolation::Isolation;

/// Most pointers a transaction: 500 cost 7 ms at the median, more only adds to the loss when one aborts.
const BATCH: i64 = 500;

/// How long a crashed owner's shards stay its own. Kafka's fence is what makes a takeover safe, so this may be short:
/// a broker that comes back publishes within five seconds.
const LEASE: Duration = Duration::from_secs(3);
/// How long a tick waits for the shards that it has begun. A batch takes some ten milliseconds; one that takes longer, for
/// Kafka keeps it waiting, must cost neither the other shards their next batch nor this replica its leases.
const PATIENT_FOR: Duration = Duration::from_millis(100);

/// Keeps the shards it owns going, each by itself.
pub(crate) struct Relay {
    carrier: Arc<Carrier>,
    restore_check: RestoreCheck,
    owner: Uuid,
    owned: Vec<Ownership>,
    /// What is at rest.
    held: HashMap<i32, Held>,
    /// The shards whose batch is under way, and its task.
    under_way: HashMap<i32, Id>,
    /// A batch of each shard that is under way; dropped, it drops them.
    work: JoinSet<Ended>,
    renewed_at: Option<Instant>,
    /// When the database was last in doubt: a shard that was taken before is used no more.
    doubted_at: Option<Instant>,
    has_markers: bool,
}

/// How a shard's batch ended, and the shard, if it may be used again.
type Ended = (Ownership, Option<Held>, Result<usize, Error>);

/// Carries a shard's pointers.
struct Carrier {
    store: Store,
    kafka: Kafka,
    wakes: Arc<Wakes>,
    deployment: Deployment,
    /// For which topic and reason refused records were told of, and when.
    told: Mutex<HashMap<(String, String), Instant>>,
    isolation: Isolation,
    /// Kafka did not take a marker, or could not say which was the last: perhaps the marker topic is gone.
    markers_in_doubt: AtomicBool,
}

/// A shard that is fenced and settled under one epoch.
struct Held {
    epoch: i64,
    shard: Shard,
    /// When it began to be taken.
    taken_at: Instant,
    /// The last batch number, as this relay read or wrote it.
    last_batch: i64,
}

/// What keeps a shard from going on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("{0}")]
    Store(#[from] store::Error),
    #[error("{0}")]
    Kafka(#[from] kafka::Error),
    #[error("another owner has taken the shard")]
    Taken,
    /// Sending would be a second time for whatever Kafka has and the database does not know of.
    #[error(
        "kafka holds batch {marker} of shard {shard}, the database knows {last_batch}: it was restored from a backup; \
         nothing of the shard is sent until `lfs-broker audit --fix` has reconciled them"
    )]
    Ahead { shard: i32, marker: i64, last_batch: i64 },
    /// As `Ahead`, under the same number.
    #[error(
        "kafka holds {unfinished} pointers of batch {batch} of shard {shard} whose uploads the database takes for unfinished: \
         it was restored from a backup; nothing of the shard is sent until `lfs-broker audit --fix` has reconciled them"
    )]
    Forgotten { shard: i32, batch: i64, unfinished: i64 },
    /// A batch was claimed of a shard that is not as this relay left it.
    #[error(
        "the database says that batch {found} of shard {shard} was the last one{}, this relay knows {known} and left nothing \
         unsettled: PostgreSQL lost commits (a restore, a failover), or somebody else wrote",
        if *is_unsettled { " and is unsettled" } else { "" }
    )]
    Changed { shard: i32, known: i64, found: i64, is_unsettled: bool },
    /// Kafka holds records of sessions that are not verified in the database any more.
    #[error(
        "kafka holds {published} pointers of batch {batch} of shard {shard}, the database took note of {written}: \
         PostgreSQL lost commits (a restore, a failover)"
    )]
    Unwritten { shard: i32, batch: i64, published: usize, written: usize },
}

impl Relay {
    pub(crate) fn new(
        store: Store,
        kafka: Kafka,
        wakes: Arc<Wakes>,
        deployment: Deployment,
        restore_check: RestoreCheck,
        owner: Uuid,
    ) -> Self {
        Self {
            carrier: Arc::new(Carrier {
                store,
                kafka,
                wakes,
                deployment,
                told: Mutex::default(),
                isolation: Isolation::default(),
                markers_in_doubt: AtomicBool::new(false),
            }),
            restore_check,
            owner,
            owned: Vec::new(),
            held: HashMap::new(),
            under_way: HashMap::new(),
            work: JoinSet::new(),
            renewed_at: None,
            doubted_at: None,
            has_markers: false,
        }
    }

    /// One batch of every owned shard that is at rest, side by side; says how many pointers reached Kafka. A shard that
    /// takes long holds up no other: it goes on by itself, and the first tick after its end tells of it.
    pub(crate) async fn tick(&mut self) -> Result<usize, Error> {
        if let Err(error) = self.own().await {
            match &error {
                Error::Store(_) => self.doubt(),
                Error::Kafka(_) => self.carrier.tell_stalled(0..self.carrier.deployment.shards, &error).await,
                _ => {}
            }
            return Err(error);
        }
        let mut begun = Vec::with_capacity(self.owned.len());
        for owned in &self.owned {
            if let Entry::Vacant(free) = self.under_way.entry(owned.shard) {
                begun.push(owned.shard);
                let held = self.held.remove(&owned.shard);
                free.insert(self.work.spawn(Arc::clone(&self.carrier).carry(*owned, held)).id());
            }
        }
        let patience = tokio::time::Instant::now() + PATIENT_FOR;
        let mut sent = 0;
        let mut failed = None;
        loop {
            let ended = if begun.iter().any(|shard| self.under_way.contains_key(shard)) {
                tokio::time::timeout_at(patience, self.work.join_next()).await.ok().flatten()
            } else {
                self.work.try_join_next()
            };
            match ended.map(|ended| self.ended(ended)) {
                Some(Ok(count)) => sent += count,
                Some(Err(error)) => failed = Some(error),
                None => break,
            }
        }
        match failed {
            Some(error) if sent == 0 => Err(error),
            _ => Ok(sent),
        }
    }

    /// Takes note of how a shard's batch ended.
    fn ended(&mut self, ended: Result<Ended, JoinError>) -> Result<usize, Error> {
        let (owned, held, outcome) = match ended {
            Ok(ended) => ended,
            // A bug, which is told as such; the shard is taken anew.
            Err(error) => {
                self.under_way.retain(|_, task| *task != error.id());
                match error.try_into_panic() {
                    Ok(panic) => std::panic::resume_unwind(panic),
                    // Nobody aborts a batch but who drops the relay.
                    Err(_) => return Ok(0),
                }
            }
        };
        self.under_way.remove(&owned.shard);
        match outcome {
            Ok(count) => {
                // It may have been taken from us meanwhile, and be ours again: that is another epoch.
                let held = held.filter(|held| self.owned.contains(&owned) && self.doubted_at < Some(held.taken_at));
                self.held.extend(held.map(|held| (owned.shard, held)));
                Ok(count)
            }
            // Before anything else, find out what is still ours: taking it back would fence its new owner.
            Err(Error::Taken) => {
                info!(shard = owned.shard, "shard {} has another owner", owned.shard);
                self.renewed_at = None;
                Ok(0)
            }
            // Waiting does not help, only an operator does: it is logged once, and the shard is looked at again.
            Err(Error::Ahead { shard, marker, last_batch }) => {
                self.restore_check.note(Ahead { shard, marker, last_batch });
                Ok(0)
            }
            // The same, under the marker's own number.
            Err(Error::Forgotten { shard, batch, unfinished }) => {
                if self.carrier.is_news(&format!("shard {shard}"), "forgotten") {
                    let error = Error::Forgotten { shard, batch, unfinished };
                    error!(shard, %error, "shard {shard} is refused: {error}");
                }
                self.restore_check.note(Ahead { shard, marker: batch, last_batch: batch });
                Ok(0)
            }
            // It costs milliseconds to take the shards anew, which is done at once.
            Err(error @ (Error::Changed { .. } | Error::Unwritten { .. })) => {
                error!(shard = owned.shard, %error, "shard {} is compared with Kafka before it goes on: {error}", owned.shard);
                self.doubt();
                self.carrier.wakes.relay.notify_one();
                Ok(0)
            }
            // The shard is dropped: whoever takes it, perhaps we, fences and settles first.
            Err(error) => {
                if matches!(error, Error::Store(_)) {
                    self.doubt();
                }
                if self.carrier.is_news(&format!("shard {}", owned.shard), &error.to_string()) {
                    warn!(shard = owned.shard, %error, "shard {} publishes nothing until this is solved: {error}", owned.shard);
                }
                Err(error)
            }
        }
    }

    /// Drops every shard that is held, those under way when their batch has ended: the database may be another than the
    /// one in which they were settled.
    fn doubt(&mut self) {
        self.held.clear();
        self.doubted_at = Some(Instant::now());
    }

    /// Takes free shards and renews the leases of ours, every third of a lease.
    async fn own(&mut self) -> Result<(), Error> {
        let Carrier { kafka, deployment, markers_in_doubt, .. } = &*self.carrier;
        let in_doubt = markers_in_doubt.load(Ordering::Acquire);
        if !self.has_markers || in_doubt {
            let was_missing = kafka.ensure_marker_topic(deployment.shards).await?;
            if self.has_markers && was_missing {
                warn!(
                    "topic {} was gone, and has been made again: somebody deleted it, or another Kafka answers at the same \
                     address; `lfs-broker audit` finds published pointers that Kafka lacks",
                    kafka::MARKER_TOPIC
                );
            }
            self.has_markers = true;
            markers_in_doubt.store(false, Ordering::Release);
        }
        if self.renewed_at.is_some_and(|at| at.elapsed() < LEASE / 3) {
            return Ok(());
        }
        self.owned = self.carrier.renew(self.owner).await?;
        self.renewed_at = Some(Instant::now());
        let owned = &self.owned;
        self.held.retain(|shard, held| owned.iter().any(|owned| owned.shard == *shard && owned.epoch == held.epoch));
        Ok(())
    }

    /// Ends what is under way, and gives the shards back, so that another replica takes them at once.
    pub(crate) async fn stop(&mut self) {
        let (carrier, owner) = (Arc::clone(&self.carrier), self.owner);
        let ended = async {
            while let Some(ended) = self.work.join_next().await {
                // Who comes next is told by what it left behind.
                let _ = self.ended(ended);
            }
        };
        tokio::select! {
            () = ended => {}
            never = carrier.keep(owner) => match never {},
        }
        self.held.clear();
        self.owned.clear();
        if let Err(error) = carrier.store.disown_shards(owner).await {
            info!(%error, "could not give the shards back; their leases will run out");
        }
    }
}

impl Carrier {
    async fn renew(&self, owner: Uuid) -> Result<Vec<Ownership>, store::Error> {
        let now = self.store.now().await?;
        self.store.own_shards(owner, now, now + LEASE).await
    }

    /// Renews the leases while the last batches are under way: a shard must not be taken in the middle of one.
    async fn keep(&self, owner: Uuid) -> Infallible {
        loop {
            tokio::time::sleep(LEASE / 3).await;
            if let Err(error) = self.renew(owner).await {
                warn!(%error, "could not renew the leases of the shards");
            }
        }
    }

    /// One batch of a shard.
    async fn carry(self: Arc<Self>, owned: Ownership, mut held: Option<Held>) -> Ended {
        let begun = Instant::now();
        let outcome = self.relay(owned, &mut held).await;
        match &outcome {
            Err(Error::Taken) => self.isolation.idle(owned.shard),
            Err(Error::Store(_)) => {}
            Err(error) => {
                // Where a marker cannot be read, the topic may be gone.
                let is_refused = matches!(error, Error::Kafka(kafka::Error::Refused(_)));
                self.markers_in_doubt.fetch_or(is_refused, Ordering::AcqRel);
                self.tell_stalled(owned.shard..owned.shard + 1, error).await;
                // A take that failed rests as a batch that failed does: it has cost two clients of Kafka.
                if !matches!(error, Error::Changed { .. } | Error::Unwritten { .. }) {
                    self.isolation.failed(owned.shard, &[], false, &error.to_string());
                }
            }
            Ok(_) => self.tell_stall(owned.shard).await,
        }
        // Then no tick waits for it, or soon none.
        if outcome.is_ok() && begun.elapsed() > PATIENT_FOR / 2 {
            self.wakes.relay.notify_one();
        }
        (owned, held, outcome)
    }

    async fn relay(&self, owned: Ownership, slot: &mut Option<Held>) -> Result<usize, Error> {
        if self.isolation.is_paused(owned.shard) {
            return Ok(0);
        }
        let mut settled = 0;
        let held = match slot {
            Some(held) => held,
            // A shard that has nothing to send costs no producer.
            None if !self.store.has_waiting(owned.shard).await? => {
                self.isolation.idle(owned.shard);
                return Ok(0);
            }
            None => {
                let (held, count) = self.take(owned).await?;
                settled = count;
                slot.insert(held)
            }
        };
        let now = self.store.now().await?;
        let (batch, mut rows) = match self.store.stamp(owned, held.last_batch, BATCH, now).await? {
            Claim::Stamped { batch, rows } => (batch, rows),
            Claim::Idle => {
                self.isolation.idle(owned.shard);
                return Ok(settled);
            }
            Claim::Taken => return Err(Error::Taken),
            Claim::Changed { last_batch: found, is_unsettled } => {
                return Err(Error::Changed { shard: owned.shard, known: held.last_batch, found, is_unsettled });
            }
        };
        held.last_batch = batch;
        let selection = self.isolation.select(owned.shard, &rows);
        self.park(owned, batch, &selection.refused, &mut rows).await?;
        let selected = rows.iter().filter(|row| selection.send.contains(&row.session_id));
        let outcome = match self.kafka.place(selected.map(record).collect()).await {
            Ok(placing) => {
                // A topic that was refused before is put off as a whole.
                let refused = placing.refused.into_iter().map(|refusal| {
                    let whole_topic = refusal.whole_topic || self.isolation.is_retry(&[refusal.upload_id], &rows);
                    Refusal { whole_topic, ..refusal }
                });
                let refused = self.blamed(&refused.collect::<Vec<_>>(), &[], &rows);
                self.park(owned, batch, &refused, &mut rows).await?;
                if placing.records.is_empty() { Ok(Vec::new()) } else { held.shard.publish(batch, &placing.records).await }
            }
            Err(failed) => Err(failed),
        };
        Ok(settled + self.settle(owned, slot, (batch, &selection.send), rows, outcome).await?)
    }
}

pub(crate) fn record(row: &Waiting) -> Record {
    Record {
        upload_id: row.session_id,
        topic: row.topic.clone(),
        partition: row.partition,
        key: row.key.clone(),
        value: row.value.clone().into_bytes(),
        headers: row.headers.iter().map(|(name, value)| (name.clone(), value.clone().into_bytes())).collect(),
    }
}
