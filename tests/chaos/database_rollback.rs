//! PostgreSQL is restored: its data is replaced by a copy of some seconds ago while the replicas run and clients upload.
//! Until `audit --fix` has compared the database with Kafka, the replicas publish nothing of the affected shards.
//!
//! No broker can recover commits that such a restore removes. So the checker ignores uploads that were acknowledged between
//! the copy and its restore and are not in Kafka. Each record in Kafka must still exist once, in order, with its bytes in S3.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use futures_util::future::join_all;
use serde_json::Value;
use uuid::Uuid;

use crate::Failure;
use crate::cluster::Cluster;
use crate::journal::Journal;
use crate::observed::{Observed, Record, upload_id};
use crate::plan::Target;

/// No server is stopped for long here, so sessions may expire sooner than in a run with kills. But an upload whose
/// publication PostgreSQL has lost must not expire before the audit.
pub(crate) const SETTINGS: &[(&str, &str)] = &[
    ("LFS_BROKER_SESSION_SECONDS", "18"),
    ("LFS_BROKER_SESSION_MAX_SECONDS", "20"),
    ("LFS_BROKER_URL_SECONDS", "6"),
    ("LFS_BROKER_LONGEST_PUT_SECONDS", "4"),
];

/// The findings of the audit about uploads whose rows are lost. The audit does not repair them.
const UNKNOWN: [&str; 3] = ["record-unknown", "object-unknown", "upload-unknown"];
/// How long after the stop of the database a response may still arrive that was sent before.
const IN_FLIGHT: Duration = Duration::from_secs(1);
/// The longest time from an upload's id to its row. The broker opens an upload again where the database was unreachable.
const MAX_OPEN: Duration = Duration::from_secs(10);
/// The most audits until every shard may publish again. Each later audit finds batches that were in flight before.
const MAX_AUDITS: usize = 20;

/// Longer than a relay's leases: then the shards are acquired again, under an epoch that the copy may give out again.
const AFTER_LEASE: Duration = Duration::from_millis(3500);

/// The lost commits, and the results of the audits.
#[derive(Debug, Default)]
pub(crate) struct LostCommits {
    /// When the run started, since 1970.
    pub(crate) run_started: Duration,
    /// The times of each copy and of its restore, since the start of the run.
    pub(crate) intervals: Vec<(Duration, Duration)>,
    /// How many shards had to wait for an audit.
    pub(crate) shards: u64,
    /// How many records the audit wrote to the database again.
    pub(crate) records: u64,
}

/// Replaces PostgreSQL's data by a copy this many times.
pub(crate) async fn run(cluster: &Cluster, journal: &Journal, seed: u64, times: usize) -> Result<LostCommits, Failure> {
    let mut random = fastrand::Rng::with_seed(seed);
    let (data, copy) = (cluster.dir.join("postgres/data"), cluster.dir.join("postgres/copy"));
    let mut lost = LostCommits { run_started: journal.started(), ..LostCommits::default() };
    for number in 0..times {
        tokio::time::sleep(Duration::from_millis(random.u64(1000..3000))).await;
        let from = journal.now();
        cluster.postgres.kill().await?;
        run_command("cp", &["-a".as_ref(), data.as_os_str(), copy.as_os_str()]).await?;
        let replicas_stopped = number % 2 == 0;
        if replicas_stopped {
            tokio::time::sleep(AFTER_LEASE).await;
        }
        cluster.postgres.start_until_ready().await?;
        tokio::time::sleep(Duration::from_millis(random.u64(1000..3000))).await;
        // Stopped replicas get no error from the database, so they do not notice that it was replaced.
        let replicas = if replicas_stopped { cluster.servers(Target::Replicas) } else { Vec::new() };
        join_all(replicas.iter().map(|replica| replica.signal("STOP"))).await;
        cluster.postgres.kill().await?;
        tokio::fs::remove_dir_all(&data).await?;
        tokio::fs::rename(&copy, &data).await?;
        cluster.postgres.start_until_ready().await?;
        join_all(replicas.iter().map(|replica| replica.signal("CONT"))).await;
        lost.intervals.push((from, journal.now()));
        // Now the replicas try to publish.
        tokio::time::sleep(Duration::from_millis(random.u64(500..2500))).await;
        lost.audit(cluster).await?;
        eprintln!("restored PostgreSQL {} of {times} times", number + 1);
    }
    Ok(lost)
}

async fn run_command(program: &str, arguments: &[&std::ffi::OsStr]) -> Result<(), Failure> {
    let output = tokio::process::Command::new(program).args(arguments).output().await?;
    output
        .status
        .success()
        .then_some(())
        .ok_or_else(|| Failure(format!("{program}: {}", String::from_utf8_lossy(&output.stderr))))
}

impl LostCommits {
    /// Runs `audit --fix` until no shard waits for it any more.
    async fn audit(&mut self, cluster: &Cluster) -> Result<(), Failure> {
        let mut last = Value::Null;
        for _ in 0..MAX_AUDITS {
            // While clients upload, an audit may fail on a busy server.
            let Ok(report) = cluster.audit(&["--fix"]).await else { continue };
            let count = |kind: &str| {
                let findings = report["findings"].as_array().into_iter().flatten();
                findings.filter(|finding| finding["kind"] == kind).filter_map(|finding| finding["count"].as_u64()).sum::<u64>()
            };
            let waiting_shards = count("marker-ahead");
            self.shards += waiting_shards;
            self.records += count("kafka-ahead");
            if waiting_shards == 0 {
                return Ok(());
            }
            last = report;
        }
        Err(Failure(format!("after {MAX_AUDITS} audits shards still cannot publish: {last}")))
    }

    pub(crate) fn summary(&self) -> String {
        let Self { intervals, shards, records, .. } = self;
        format!(
            "PostgreSQL was restored {} times: {shards} shards waited for the audit, which saved {records} records again",
            intervals.len()
        )
    }

    /// A run that lost nothing proves nothing, so it counts as a failure.
    pub(crate) fn covers_too_little(&self) -> Option<String> {
        let is_too_little = !self.intervals.is_empty() && (self.shards == 0 || self.records == 0);
        is_too_little.then(|| format!("{}: too little to prove anything", self.summary()))
    }

    fn explains(&self, requested_at: Duration, received_at: Duration) -> bool {
        self.intervals.iter().any(|(from, until)| received_at >= *from && requested_at < *until + IN_FLIGHT)
    }

    /// Whether an upload's row can be lost, by the time in its id (UUIDv7, RFC 9562 section 5.7).
    fn explains_id(&self, id: Uuid) -> bool {
        let Some(timestamp) = id.get_timestamp() else { return false };
        let (seconds, nanoseconds) = timestamp.to_unix();
        let requested_at = Duration::new(seconds, nanoseconds).checked_sub(self.run_started);
        requested_at.is_some_and(|requested_at| self.explains(requested_at, requested_at + MAX_OPEN))
    }
}

/// Removes from the observations what the loss explains.
pub(crate) fn remove_explained(observed: &mut Observed, lost: &LostCommits) {
    // After a loss other responses than 500 are expected: the upload may be gone or open again.
    observed.clients.unexpected.retain(|description| description.contains("was answered with 500"));
    observed.errors.retain(|description| !UNKNOWN.iter().any(|kind| description.starts_with(&format!("audit: {kind}:"))));
    // An acknowledgement with a record position must be in Kafka, which loses nothing.
    observed.clients.acknowledged.retain(|acknowledgement| {
        acknowledgement.position.is_some() || !lost.explains(acknowledgement.requested_at, acknowledgement.received_at)
    });
    let failed_at = std::mem::take(&mut observed.clients.failed_at);
    observed.clients.failed.retain(|id, _| failed_at.get(id).is_none_or(|at| !lost.explains(*at, *at)));
    let opened_at = std::mem::take(&mut observed.clients.opened_at);
    let lost_uploads: HashSet<Uuid> = opened_at
        .into_iter()
        .filter(|(id, at)| !observed.sessions.contains_key(id) && lost.explains(*at, *at))
        .map(|(id, _)| id)
        .collect();
    remove_uploads(observed, &lost_uploads);
    // The response to an open can be lost together with the row. Then no client knows the id, and S3 may already hold the
    // multipart upload. It has no parts, because no client got a URL.
    let Observed { uploads, sessions, clients, .. } = observed;
    uploads.retain(|upload| match upload_id(upload) {
        Some(id) => sessions.contains_key(&id) || clients.declared.contains_key(&id) || !lost.explains_id(id),
        None => true,
    });
}

/// Removes uploads whose rows are lost. But each must have at most one record, at the acknowledged position, with its
/// bytes in S3.
fn remove_uploads(observed: &mut Observed, lost_uploads: &HashSet<Uuid>) {
    let mut records: HashMap<Uuid, Vec<Record>> = HashMap::new();
    for record in &observed.records {
        if let Some(id) = record.upload_id.filter(|id| lost_uploads.contains(id)) {
            records.entry(id).or_default().push(record.clone());
        }
    }
    let positions: HashMap<Uuid, (i32, i64)> = observed
        .clients
        .acknowledged
        .iter()
        .filter_map(|acknowledgement| Some((acknowledgement.id, acknowledgement.position?)))
        .collect();
    let is_consistent = |id: &Uuid| match (records.get(id).map(Vec::as_slice), positions.get(id)) {
        (None, position) => position.is_none(),
        (Some([only]), position) => {
            position.is_none_or(|position| *position == (only.partition, only.offset)) && has_right_bytes(observed, id, only)
        }
        (Some(_), _) => false,
    };
    let lost_uploads: HashSet<Uuid> = lost_uploads.iter().copied().filter(is_consistent).collect();
    observed.clients.declared.retain(|id, _| !lost_uploads.contains(id));
    observed.clients.acknowledged.retain(|acknowledgement| !lost_uploads.contains(&acknowledgement.id));
    observed.records.retain(|record| !record.upload_id.is_some_and(|id| lost_uploads.contains(&id)));
    let names = |text: &str| lost_uploads.iter().any(|id| text.contains(&id.to_string()));
    observed.objects.retain(|key, _| !names(key));
    observed.uploads.retain(|upload| !names(upload));
}

/// Whether a record's object is in S3, with the bytes that the pointer names and the client declared.
fn has_right_bytes(observed: &Observed, id: &Uuid, record: &Record) -> bool {
    let pointer: Value = serde_json::from_str(&record.value).unwrap_or_default();
    let object = pointer["key"].as_str().and_then(|key| observed.objects.get(key));
    let s3_holds = object.map(|object| (Some(object.size_bytes), object.sha256.as_deref()));
    let declared = observed.clients.declared.get(id).map(|upload| (Some(upload.size_bytes), Some(upload.sha256.as_str())));
    let pointer_says = (pointer["size"].as_u64(), pointer["sha256"].as_str());
    s3_holds == Some(pointer_says) && declared.is_none_or(|declared| declared == pointer_says)
}
