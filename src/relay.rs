//! The relay: publishes pointers from the outbox to Kafka, exactly once and in order.
//!
//! A relay that acquires a shard first fences the shard's previous owner in Kafka. Then it reads the last committed marker
//! to find out which claimed rows were published. Only then does it send. A batch is claimed and this claim committed
//! before any record is sent, and the batch's marker is part of the same Kafka transaction. So a claimed row is published
//! if the marker lists it; otherwise it is sent again. The marker is sent together with the records, so it does not list
//! their offsets: the new owner looks these up in the topics, for rows that the database does not know as published. A
//! listed row is published even if its topic no longer has the record. With `at_least_once` there is no transaction: the marker is sent
//! first and lists nothing, so all claimed rows are sent again.
//!
//! PostgreSQL may lose commits at any moment: a backup is restored, or the promoted standby lacks the last commits.
//! The pool reconnects by itself and the lease row may look the same, so nothing else reports this. Therefore a batch is
//! claimed only if the shard is as its owner left it: the same last batch number, and no claimed row. If it is not, or
//! if the database fails in any way, the owner drops its shards and takes them over again: fence, read the marker,
//! compare it with the database, apply the outcome.

mod error;
mod isolation;
mod outcome;
mod stall;
mod topic_lookup;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::task::{Id, JoinError, JoinSet};
use tracing::{error, info, warn};
use uuid::Uuid;

use crate::failpoint;
use crate::kafka::{self, Kafka, Record, RecordRejection, ShardProducer};
use crate::notify::{ChangeNotifier, Others};
use crate::restore_check::{KafkaAhead, RestoreCheck};
use crate::store::{self, Claim, ClaimRequest, Deployment, OutboxRow, Renewal, RenewalRequest, ShardLease, Store};
pub(crate) use error::Error;
use isolation::Isolation;

/// The most pointers in one transaction. 500 take 7 ms (median); more would only lose more work when one aborts.
const MAX_BATCH_RECORDS: i64 = 500;

/// About how many pointers one statement claims over all shards. Its rows are in memory at the same time.
const MAX_CLAIMED_RECORDS: usize = 4000;

/// The pointers that each shard may claim even if there are very many shards.
const MIN_BATCH_RECORDS: i64 = 20;

/// The pause before a shard is claimed again whose row another transaction has locked. Such a lock takes milliseconds.
const BUSY_PAUSE: Duration = Duration::from_millis(20);

/// The shortest pause between two ticks of a relay that waits for the lease of a dead replica to end.
const MIN_PAUSE: Duration = Duration::from_millis(100);
/// How long a tick waits for the batches that it started. A batch takes some ten milliseconds. A slow Kafka must not delay
/// the next batch of the other shards or the renewal of the leases.
const TICK_WAIT: Duration = Duration::from_millis(100);

/// Publishes the shards that this replica owns, each independently of the others.
pub(crate) struct Relay {
    publisher: Arc<ShardPublisher>,
    restore_check: RestoreCheck,
    owner: Uuid,
    leases: Vec<ShardLease>,
    /// The shards that are taken over and have no batch running.
    fenced_shards: HashMap<i32, FencedShard>,
    /// The shards that have a batch running, and the id of its task.
    running: HashMap<i32, Id>,
    /// The tasks of the running batches. Dropping the set aborts them.
    tasks: JoinSet<BatchOutcome>,
    renewed_at: Option<Instant>,
    /// When the membership or a lease of another replica ends, unless that replica renews it.
    next_end: Option<Instant>,
    /// The renewal of this tick found no rows in the outbox.
    is_idle: bool,
    /// When the relay last stopped trusting the database. A shard whose takeover began before is dropped.
    invalidated_at: Option<Instant>,
    has_marker_topic: bool,
}

/// The result of a shard's batch, with the shard if it can be used again.
type BatchOutcome = (ShardLease, Option<FencedShard>, Result<usize, Error>);

/// Publishes the batches of a shard.
struct ShardPublisher {
    store: Store,
    kafka: Kafka,
    notifier: Arc<ChangeNotifier>,
    deployment: Deployment,
    /// When a failure was last logged, by topic (or shard) and reason.
    log_throttle: Mutex<HashMap<(String, String), Instant>>,
    isolation: Isolation,
    /// Since when the offsets of a shard's published pointers cannot be looked up.
    failed_lookups: Mutex<HashMap<i32, Instant>>,
    /// Kafka did not accept a marker, or could not return the last one: the marker topic may be missing.
    recheck_marker_topic: AtomicBool,
}

/// A shard that this relay has taken over: its previous owner is fenced, and no claimed row is left.
struct FencedShard {
    epoch: i64,
    producer: ShardProducer,
    takeover_started_at: Instant,
    /// The last batch number that this relay read or wrote.
    last_batch: i64,
}

impl Relay {
    pub(crate) fn new(
        store: Store,
        kafka: Kafka,
        notifier: Arc<ChangeNotifier>,
        deployment: Deployment,
        restore_check: RestoreCheck,
        owner: Uuid,
    ) -> Self {
        Self {
            publisher: Arc::new(ShardPublisher {
                store,
                kafka,
                notifier,
                deployment,
                log_throttle: Mutex::default(),
                isolation: Isolation::default(),
                failed_lookups: Mutex::default(),
                recheck_marker_topic: AtomicBool::new(false),
            }),
            restore_check,
            owner,
            leases: Vec::new(),
            fenced_shards: HashMap::new(),
            running: HashMap::new(),
            tasks: JoinSet::new(),
            renewed_at: None,
            next_end: None,
            is_idle: false,
            invalidated_at: None,
            has_marker_topic: false,
        }
    }

    /// Starts one batch of every owned shard that has none running, and returns how many pointers were published. A slow
    /// shard does not delay the others: its batch continues, and the first tick after its end reports the result.
    pub(crate) async fn tick(&mut self) -> Result<usize, Error> {
        if let Err(error) = self.renew_leases().await {
            match &error {
                Error::Store(_) => self.drop_fenced_shards(),
                Error::Kafka(_) => self.publisher.report_stalled(0..self.publisher.deployment.shards, &error).await,
                _ => {}
            }
            return Err(error);
        }
        if self.is_idle && self.running.is_empty() {
            return Ok(0);
        }
        let started = match self.start_batches().await {
            Ok(started) => started,
            Err(error) => {
                self.drop_fenced_shards();
                return Err(error.into());
            }
        };
        let deadline = tokio::time::Instant::now() + TICK_WAIT;
        let mut sent = 0;
        let mut failed = None;
        loop {
            let ended = if started.iter().any(|shard| self.running.contains_key(shard)) {
                tokio::time::timeout_at(deadline, self.tasks.join_next()).await.ok().flatten()
            } else {
                self.tasks.try_join_next()
            };
            match ended.map(|ended| self.handle_outcome(ended)) {
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

    /// Claims the next batch of every owned shard that has none running, in one statement, and starts a task for each shard
    /// that has something to do. Returns these shards.
    async fn start_batches(&mut self) -> Result<Vec<i32>, store::Error> {
        let idle = self.leases.iter().copied().filter(|lease| !self.running.contains_key(&lease.shard));
        let (paused, ready): (Vec<ShardLease>, Vec<ShardLease>) =
            idle.partition(|lease| self.publisher.isolation.is_paused(lease.shard));
        let requests = ready.into_iter().map(|lease| {
            let last_batch = self.fenced_shards.get(&lease.shard).map(|fenced| fenced.last_batch);
            ClaimRequest { lease, last_batch }
        });
        let requests: Vec<ClaimRequest> = requests.collect();
        let claims = self.publisher.claim_batches(&requests).await?;
        let ready = requests.into_iter().map(|request| request.lease).zip(claims.into_iter().map(Some));
        let mut started = Vec::new();
        for (lease, claim) in ready.chain(paused.into_iter().map(|lease| (lease, None))) {
            if matches!(claim, Some(Claim::Idle)) {
                self.publisher.isolation.clear_shard(lease.shard);
                continue;
            }
            started.push(lease.shard);
            let fenced = self.fenced_shards.remove(&lease.shard);
            let task = self.tasks.spawn(Arc::clone(&self.publisher).run_batch(lease, fenced, claim));
            self.running.insert(lease.shard, task.id());
        }
        Ok(started)
    }

    /// Handles the result of a shard's batch.
    fn handle_outcome(&mut self, ended: Result<BatchOutcome, JoinError>) -> Result<usize, Error> {
        let (lease, fenced, result) = match ended {
            Ok(outcome) => outcome,
            // A panic is a bug and is passed on. The shard is taken over again.
            Err(error) => {
                self.running.retain(|_, task| *task != error.id());
                match error.try_into_panic() {
                    Ok(panic) => std::panic::resume_unwind(panic),
                    // Only dropping the relay aborts a batch.
                    Err(_) => return Ok(0),
                }
            }
        };
        let shard = lease.shard;
        self.running.remove(&shard);
        match result {
            Ok(count) => {
                // The shard may have been lost and acquired again meanwhile. Then its lease has another epoch.
                let is_owned = self.leases.contains(&lease);
                if !is_owned {
                    // If the shard is above this replica's share, it can be given back now.
                    self.publisher.notifier.request_renewal();
                }
                let fenced = fenced.filter(|fenced| is_owned && self.invalidated_at < Some(fenced.takeover_started_at));
                self.fenced_shards.extend(fenced.map(|fenced| (shard, fenced)));
                Ok(count)
            }
            // Read first which shards this relay still owns: taking this shard over again would fence its new owner.
            Err(Error::ShardLost) => {
                info!(shard, "another relay has taken over shard {shard}; reading the leases again");
                self.renewed_at = None;
                Ok(0)
            }
            // Only an operator can solve this. The error is logged once, and the next ticks check the shard again.
            Err(Error::KafkaAhead { shard, marker, last_batch }) => {
                self.restore_check.report_kafka_ahead(KafkaAhead { shard, marker, last_batch });
                Ok(0)
            }
            // As for `KafkaAhead`, with the batch number of the marker itself.
            Err(Error::UnfinishedInDatabase { shard, batch, unfinished }) => {
                if self.publisher.should_log(&format!("shard {shard}"), "unfinished in the database") {
                    let error = Error::UnfinishedInDatabase { shard, batch, unfinished };
                    error!(shard, %error, "publishing shard {shard} stopped: {error}");
                }
                self.restore_check.report_kafka_ahead(KafkaAhead { shard, marker: batch, last_batch: batch });
                Ok(0)
            }
            // Taking the shards over again costs milliseconds, so the relay does this at once.
            Err(error @ (Error::ShardChanged { .. } | Error::PublishedNotRecorded { .. })) => {
                error!(shard, %error, "publishing shard {shard} is paused until it is compared with Kafka: {error}");
                self.drop_fenced_shards();
                self.publisher.notifier.relay.notify_one();
                Ok(0)
            }
            // The shard is dropped. Its next owner, possibly this relay, fences it and reads its marker first.
            Err(error) => {
                if matches!(error, Error::Store(_)) {
                    self.drop_fenced_shards();
                }
                if self.publisher.should_log(&format!("shard {shard}"), &error.to_string()) {
                    warn!(shard, %error, "publishing shard {shard} failed: {error}; retrying until it succeeds");
                }
                Err(error)
            }
        }
    }

    /// Drops every shard that was taken over; shards with a running batch are dropped when the batch ends. The database may
    /// no longer be in the state in which they were taken over.
    fn drop_fenced_shards(&mut self) {
        self.fenced_shards.clear();
        self.invalidated_at = Some(Instant::now());
    }

    /// How long the next tick may wait if nothing wakes the relay. An idle relay only renews its leases; the renewal also
    /// finds pointers of which no notification arrived.
    pub(crate) fn pause(&self) -> Duration {
        let notifier = &self.publisher.notifier;
        if !self.is_idle || notifier.replicas.must_poll() {
            return notifier.settings.poll_interval.min(self.renewal_interval());
        }
        // When another replica dies, its shards are taken over as soon as its leases have ended.
        let until_next_end = self.next_end.map(|end| end.saturating_duration_since(Instant::now()));
        self.renewal_interval().min(until_next_end.unwrap_or(Duration::MAX)).max(MIN_PAUSE)
    }

    /// How often an idle relay renews its leases: with jitter and one lost renewal, the lease is still valid.
    fn renewal_interval(&self) -> Duration {
        self.publisher.notifier.settings.shard_lease * 3 / 8
    }

    fn is_renewal_due(&self) -> bool {
        let lease = self.publisher.notifier.settings.shard_lease;
        let is_requested = self.publisher.notifier.replicas.take_renewal_request();
        let has_ended = self.next_end.is_some_and(|end| end <= Instant::now());
        is_requested || has_ended || self.renewed_at.is_none_or(|at| at.elapsed() >= lease / 4)
    }

    /// Renews this relay's leases and balances the shards with the other replicas, if it is time to.
    async fn renew_leases(&mut self) -> Result<(), Error> {
        self.is_idle = false;
        let ShardPublisher { kafka, deployment, recheck_marker_topic, .. } = &*self.publisher;
        let must_recheck = recheck_marker_topic.load(Ordering::Acquire);
        if !self.has_marker_topic || must_recheck {
            let was_missing = kafka.ensure_marker_topic(deployment.shards).await?;
            if self.has_marker_topic && was_missing {
                warn!(
                    "topic {} was missing and was created again: it was deleted, or another Kafka cluster answers at the same \
                     address; run `lfs-broker audit` to find published pointers that Kafka lacks",
                    kafka::MARKER_TOPIC
                );
            }
            self.has_marker_topic = true;
            recheck_marker_topic.store(false, Ordering::Release);
        }
        if !self.is_renewal_due() {
            return Ok(());
        }
        let running: Vec<i32> = self.running.keys().copied().collect();
        let (renewal, next_end) = self.publisher.renew(self.owner, &running, false).await?;
        (self.renewed_at, self.next_end) = (Some(Instant::now()), next_end);
        // A shard that was just acquired is read after its previous owner can no longer be told of its pointers.
        self.is_idle = !renewal.has_outbox_rows && !renewal.has_acquired;
        self.leases = renewal.leases(self.owner);
        let leases = &self.leases;
        self.fenced_shards
            .retain(|shard, fenced| leases.iter().any(|lease| lease.shard == *shard && lease.epoch == fenced.epoch));
        if self.is_idle {
            leases.iter().for_each(|lease| self.publisher.isolation.clear_shard(lease.shard));
        }
        Ok(())
    }

    /// Waits for the running batches and releases the shards, so that another replica can acquire them at once.
    pub(crate) async fn stop(&mut self) {
        let (publisher, owner) = (Arc::clone(&self.publisher), self.owner);
        while !self.tasks.is_empty() {
            // No other relay may take over a shard in the middle of a batch. The other shards are given back now.
            let running: Vec<i32> = self.running.keys().copied().collect();
            if let Err(error) = publisher.renew(owner, &running, true).await {
                warn!(%error, "could not renew the leases of the shards: {error}; retrying");
            }
            // The result is not needed: the next owner finds out from the marker and the claimed rows.
            let ended = tokio::time::timeout(self.renewal_interval(), self.tasks.join_next()).await;
            ended.ok().flatten().map(|ended| self.handle_outcome(ended));
        }
        self.fenced_shards.clear();
        self.leases.clear();
        match publisher.store.remove_replica(owner).await {
            Ok(()) => publisher.notifier.replicas.announce_change(),
            Err(error) => {
                let seconds = publisher.notifier.settings.shard_lease.as_secs_f32();
                info!(%error, "could not release the shards: {error}; their leases expire within {seconds} s");
            }
        }
    }
}

impl ShardPublisher {
    /// Renews the leases of a replica, and tells the workers and the other replicas what follows. Also returns when the
    /// membership or a lease of another replica ends.
    async fn renew(&self, owner: Uuid, running: &[i32], is_leaving: bool) -> Result<(Renewal, Option<Instant>), store::Error> {
        let (asked_at, now) = (Instant::now(), self.store.now().await?);
        let until = now + self.notifier.settings.shard_lease;
        let renewal = self.store.renew_replica(RenewalRequest { owner, now, until, running, is_leaving }).await?;
        let replicas = &self.notifier.replicas;
        let others = Others { has_replicas: renewal.has_other_replicas, has_silent: renewal.has_unlisted_owner };
        replicas.record_renewal(renewal.leases(owner).iter().map(|lease| lease.shard).collect(), others);
        if renewal.has_joined || renewal.has_given_back {
            replicas.announce_change();
        }
        if renewal.has_expired_lease {
            self.notifier.verifier.notify_one();
        }
        let next_end = renewal.next_end.and_then(|end| Duration::try_from(end - now).ok()).map(|wait| asked_at + wait);
        Ok((renewal, next_end))
    }

    /// Claims the next batch of each of these shards.
    async fn claim_batches(&self, requests: &[ClaimRequest]) -> Result<Vec<Claim>, store::Error> {
        if requests.is_empty() {
            return Ok(Vec::new());
        }
        let limit = i64::try_from(MAX_CLAIMED_RECORDS / requests.len()).unwrap_or(MAX_BATCH_RECORDS);
        self.store.claim_batches(requests, limit.clamp(MIN_BATCH_RECORDS, MAX_BATCH_RECORDS), self.store.now().await?).await
    }

    /// Runs one batch of a shard. Without a claim, the shard pauses.
    async fn run_batch(
        self: Arc<Self>,
        lease: ShardLease,
        mut fenced: Option<FencedShard>,
        claim: Option<Claim>,
    ) -> BatchOutcome {
        let started = Instant::now();
        let result = match claim {
            Some(claim) => self.publish_batch(lease, &mut fenced, claim).await,
            None => Ok(0),
        };
        match &result {
            Err(Error::ShardLost) => self.isolation.clear_shard(lease.shard),
            Err(Error::Store(_)) => {}
            Err(error) => {
                // If a marker cannot be read, the marker topic may be missing.
                let is_refused = matches!(error, Error::Kafka(kafka::Error::Refused(_)));
                self.recheck_marker_topic.fetch_or(is_refused, Ordering::AcqRel);
                self.report_stalled(lease.shard..lease.shard + 1, error).await;
                // A takeover that failed pauses like a batch that failed, because it needs two new Kafka clients.
                if !matches!(error, Error::ShardChanged { .. } | Error::PublishedNotRecorded { .. }) {
                    self.isolation.record_failure(lease.shard, &[], false, &error.to_string());
                }
            }
            Ok(_) => self.report_stall(lease.shard).await,
        }
        // The tick no longer waits for this shard, or soon stops, so wake the relay to collect the result.
        if result.is_ok() && started.elapsed() > TICK_WAIT / 2 {
            self.notifier.relay.notify_one();
        }
        (lease, fenced, result)
    }

    /// Publishes the batch that was claimed. If the shard is not taken over yet, takes it over and claims its first batch.
    async fn publish_batch(&self, lease: ShardLease, slot: &mut Option<FencedShard>, claim: Claim) -> Result<usize, Error> {
        let (mut recovered, mut claim) = (0, claim);
        if matches!(claim, Claim::NotTakenOver) {
            let (fenced, count) = self.take_over(lease).await?;
            let request = ClaimRequest { lease, last_batch: Some(fenced.last_batch) };
            (recovered, *slot) = (count, Some(fenced));
            claim = self.claim_batches(&[request]).await?.pop().unwrap_or(Claim::Idle);
        }
        let known = slot.as_ref().map_or(0, |fenced| fenced.last_batch);
        let (batch, rows) = match claim {
            Claim::Claimed { batch, rows } => (batch, rows),
            Claim::Idle | Claim::NotTakenOver => {
                self.isolation.clear_shard(lease.shard);
                return Ok(recovered);
            }
            Claim::Busy => {
                tokio::time::sleep(BUSY_PAUSE).await;
                self.notifier.relay.notify_one();
                return Ok(recovered);
            }
            Claim::ShardLost => return Err(Error::ShardLost),
            Claim::Changed { last_batch: found, has_claimed_rows } => {
                return Err(Error::ShardChanged { shard: lease.shard, known, found, has_claimed_rows });
            }
        };
        Ok(recovered + self.send_batch(lease, slot, batch, rows).await?)
    }

    /// Sends the rows of a batch to Kafka, and writes the outcome to the database.
    async fn send_batch(
        &self,
        lease: ShardLease,
        slot: &mut Option<FencedShard>,
        batch: i64,
        mut rows: Vec<OutboxRow>,
    ) -> Result<usize, Error> {
        let Some(fenced) = slot.as_mut() else { return Ok(0) };
        fenced.last_batch = batch;
        failpoint::reach("relay.claimed").await.map_err(store::Error::from)?;
        let selection = self.isolation.select(lease.shard, &rows);
        self.defer(lease, batch, &selection.rejected, &mut rows).await?;
        let selected = rows.iter().filter(|row| selection.send.contains(&row.session_id));
        let result = match self.kafka.assign_partitions(selected.map(to_kafka_record).collect()).await {
            Ok(partitioned) => {
                // A topic that Kafka rejected before is deferred as a whole.
                let rejected = partitioned.rejected.into_iter().map(|rejection| {
                    let whole_topic = rejection.whole_topic || self.isolation.is_retry(&[rejection.upload_id], &rows);
                    RecordRejection { whole_topic, ..rejection }
                });
                let rejected = self.rows_to_defer(&rejected.collect::<Vec<_>>(), &[], &rows);
                self.defer(lease, batch, &rejected, &mut rows).await?;
                if partitioned.records.is_empty() {
                    Ok(Vec::new())
                } else {
                    fenced.producer.publish(batch, &partitioned.records).await
                }
            }
            Err(failed) => Err(failed),
        };
        self.apply_outcome(lease, slot, (batch, &selection.send), rows, result).await
    }
}

/// The Kafka record of an outbox row.
pub(crate) fn to_kafka_record(row: &OutboxRow) -> Record {
    Record {
        upload_id: row.session_id,
        topic: row.topic.clone(),
        partition: row.partition,
        key: row.key.clone(),
        value: row.value.clone().into_bytes(),
        headers: row.headers.iter().map(|(name, value)| (name.clone(), value.clone().into_bytes())).collect(),
    }
}
