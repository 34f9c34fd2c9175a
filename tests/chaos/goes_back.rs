//! PostgreSQL goes back: a copy of its data is put in place of what came after, while the replicas live on and clients
//! upload. Until `audit --fix` has told the database what Kafka holds, the replicas send nothing of the shards concerned.
//!
//! What such a loss takes away, and no broker can give back, is forgiven: what was told between the copy and its return
//! and is not in Kafka. Whatever is in Kafka is there once, in order, and its bytes are in S3.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use futures_util::future::join_all;
use serde_json::Value;
use uuid::Uuid;

use crate::Failure;
use crate::facts::{Facts, Record};
use crate::journal::Journal;
use crate::plan::Target;
use crate::stage::Stage;

/// Nothing is stopped here, so everything may end sooner than in a run with kills. But no upload that PostgreSQL has
/// forgotten to be published may expire before the audit.
pub(crate) const SETTINGS: &[(&str, &str)] = &[
    ("LFS_BROKER_SESSION_SECONDS", "18"),
    ("LFS_BROKER_SESSION_MAX_SECONDS", "20"),
    ("LFS_BROKER_URL_SECONDS", "6"),
    ("LFS_BROKER_LONGEST_PUT_SECONDS", "4"),
];

/// What the audit finds of uploads whose rows are gone, and only tells.
const UNKNOWN: [&str; 3] = ["record-unknown", "object-unknown", "upload-unknown"];
/// An answer that was on its way when the database was stopped is heard within this.
const ON_ITS_WAY: Duration = Duration::from_secs(1);
/// Audits until all shards may go on: a batch that was under way is found by the next one.
const AUDITS: usize = 20;

/// Longer than a relay's leases: after it the shards are taken anew, under an epoch that the copy may give out again.
const LEASE_OVER: Duration = Duration::from_millis(3500);

/// What was lost, and what came of it.
#[derive(Debug, Default)]
pub(crate) struct Lost {
    /// From each copy to its return.
    pub(crate) between: Vec<(Duration, Duration)>,
    /// Shards that had to wait for an audit.
    pub(crate) shards: u64,
    /// Records that the database had forgotten, or whose uploads it had.
    pub(crate) records: u64,
}

/// Has PostgreSQL go back so many times.
pub(crate) async fn play(stage: &Stage, journal: &Journal, seed: u64, times: usize) -> Result<Lost, Failure> {
    let mut random = fastrand::Rng::with_seed(seed);
    let (data, copy) = (stage.dir.join("postgres/data"), stage.dir.join("postgres/copy"));
    let mut lost = Lost::default();
    for number in 0..times {
        tokio::time::sleep(Duration::from_millis(random.u64(1000..3000))).await;
        let from = journal.now();
        stage.postgres.kill().await?;
        shell("cp", &["-a".as_ref(), data.as_os_str(), copy.as_os_str()]).await?;
        let is_unseen = number % 2 == 0;
        if is_unseen {
            tokio::time::sleep(LEASE_OVER).await;
        }
        stage.postgres.up().await?;
        tokio::time::sleep(Duration::from_millis(random.u64(1000..3000))).await;
        // Replicas that are stopped meanwhile ask for nothing, so no error tells them.
        let replicas = if is_unseen { stage.parts(Target::Replicas) } else { Vec::new() };
        join_all(replicas.iter().map(|replica| replica.signal("STOP"))).await;
        stage.postgres.kill().await?;
        tokio::fs::remove_dir_all(&data).await?;
        tokio::fs::rename(&copy, &data).await?;
        stage.postgres.up().await?;
        join_all(replicas.iter().map(|replica| replica.signal("CONT"))).await;
        lost.between.push((from, journal.now()));
        // The replicas try to go on.
        tokio::time::sleep(Duration::from_millis(random.u64(500..2500))).await;
        lost.audit(stage).await?;
        eprintln!("PostgreSQL has gone back {} of {times} times", number + 1);
    }
    Ok(lost)
}

async fn shell(program: &str, arguments: &[&std::ffi::OsStr]) -> Result<(), Failure> {
    let ran = tokio::process::Command::new(program).args(arguments).output().await?;
    ran.status.success().then_some(()).ok_or_else(|| Failure(format!("{program}: {}", String::from_utf8_lossy(&ran.stderr))))
}

impl Lost {
    /// Has the audit repair the database, until no shard waits for it any more.
    async fn audit(&mut self, stage: &Stage) -> Result<(), Failure> {
        let mut last = Value::Null;
        for _ in 0..AUDITS {
            // While clients upload, one of the three may be busy.
            let Ok(report) = stage.audit(&["--fix"]).await else { continue };
            let count = |kind: &str| {
                let findings = report["findings"].as_array().into_iter().flatten();
                findings.filter(|finding| finding["kind"] == kind).filter_map(|finding| finding["count"].as_u64()).sum::<u64>()
            };
            let waits = count("marker-ahead");
            self.shards += waits;
            self.records += count("kafka-ahead");
            if waits == 0 {
                return Ok(());
            }
            last = report;
        }
        Err(Failure(format!("{AUDITS} audits did not let the shards go on: {last}")))
    }

    pub(crate) fn words(&self) -> String {
        let Self { between, shards, records } = self;
        format!(
            "PostgreSQL went back {} times: {shards} shards waited for the audit, {records} records were written down by it",
            between.len()
        )
    }

    /// A run that lost nothing shows nothing.
    pub(crate) fn too_little(&self) -> Option<String> {
        let is_little = !self.between.is_empty() && (self.shards == 0 || self.records == 0);
        is_little.then(|| format!("{}: that shows nothing", self.words()))
    }

    fn takes(&self, asked_at: Duration, heard_at: Duration) -> bool {
        self.between.iter().any(|(from, until)| heard_at >= *from && asked_at < *until + ON_ITS_WAY)
    }
}

/// Takes out of the facts what the loss explains.
pub(crate) fn forgive(facts: &mut Facts, lost: &Lost) {
    // A client that asks for an upload that is gone, or that is open again, is answered as it should be; only a bug is one.
    facts.known.unexpected.retain(|what| what.contains("was answered with 500"));
    facts.complaints.retain(|what| !UNKNOWN.iter().any(|kind| what.starts_with(&format!("audit: {kind}:"))));
    // A promise that was told with its place is in Kafka, which loses nothing.
    facts.known.promises.retain(|promise| promise.place.is_some() || !lost.takes(promise.asked_at, promise.heard_at));
    let failed_at = std::mem::take(&mut facts.known.failed_at);
    facts.known.failed.retain(|id, _| failed_at.get(id).is_none_or(|at| !lost.takes(*at, *at)));
    let opened_at = std::mem::take(&mut facts.known.opened_at);
    let gone: HashSet<Uuid> = opened_at
        .into_iter()
        .filter(|(id, at)| !facts.sessions.contains_key(id) && lost.takes(*at, *at))
        .map(|(id, _)| id)
        .collect();
    forget(facts, &gone);
}

/// Takes out uploads whose rows are gone. Their records stay true all the same: one each, where it was told to be, and its bytes in S3.
fn forget(facts: &mut Facts, gone: &HashSet<Uuid>) {
    let mut records: HashMap<Uuid, Vec<Record>> = HashMap::new();
    for record in &facts.records {
        if let Some(id) = record.upload_id.filter(|id| gone.contains(id)) {
            records.entry(id).or_default().push(record.clone());
        }
    }
    let places: HashMap<Uuid, (i32, i64)> =
        facts.known.promises.iter().filter_map(|promise| Some((promise.id, promise.place?))).collect();
    let is_true = |id: &Uuid| match (records.get(id).map(Vec::as_slice), places.get(id)) {
        (None, place) => place.is_none(),
        (Some([only]), place) => place.is_none_or(|place| *place == (only.partition, only.offset)) && is_whole(facts, id, only),
        (Some(_), _) => false,
    };
    let gone: HashSet<Uuid> = gone.iter().copied().filter(is_true).collect();
    facts.known.intents.retain(|id, _| !gone.contains(id));
    facts.known.promises.retain(|promise| !gone.contains(&promise.id));
    facts.records.retain(|record| !record.upload_id.is_some_and(|id| gone.contains(&id)));
    let names = |text: &str| gone.iter().any(|id| text.contains(&id.to_string()));
    facts.objects.retain(|key, _| !names(key));
    facts.uploads.retain(|upload| !names(upload));
}

/// Whether a record's object is in S3, with the bytes that the record names and the client meant.
fn is_whole(facts: &Facts, id: &Uuid, record: &Record) -> bool {
    let pointer: Value = serde_json::from_str(&record.value).unwrap_or_default();
    let object = pointer["key"].as_str().and_then(|key| facts.objects.get(key));
    let holds = object.map(|object| (Some(object.size_bytes), object.sha256.as_deref()));
    let meant = facts.known.intents.get(id).map(|intent| (Some(intent.size_bytes), Some(intent.sha256.as_str())));
    let says = (pointer["size"].as_u64(), pointer["sha256"].as_str());
    holds == Some(says) && meant.is_none_or(|meant| meant == says)
}
