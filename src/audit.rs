//! The audit: do PostgreSQL, S3 and Kafka agree?
//!
//! Kafka decides which pointers are published, PostgreSQL which uploads are verified, and S3 which bytes exist. The audit
//! reads all three in pages and with bounded memory, while brokers continue to work, and reports where they disagree. It
//! does not report a difference that can disappear by itself within a minute.
//!
//! With `fix` it repairs only what is safe. It deletes no object. It hands objects of failed uploads to the sweeper. It
//! only reports objects without a session, because after a loss of the database such an object may be the only copy of
//! published data. A parked pointer needs an operator (`redrive`). A missing object cannot be repaired.
//!
//! After a restore of PostgreSQL from a backup, Kafka holds more than the database knows, and the relay refuses the shard.
//! The audit finds each record by its `lfs-upload-id`. It saves the publication if the session is not published yet, or if
//! the old database let it fail. At the end, if all records of unpublished uploads were verified, it lets the relay and the
//! sweeper continue. It can find only the records that the topic still retains.

mod object_checks;
mod record_checks;
mod record_verification;
mod report;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Mutex;

use time::OffsetDateTime;
use uuid::Uuid;

pub use report::{Finding, FindingKind, Report};
use report::{NewFinding, ReportBuilder};

use crate::kafka::{self, Kafka};
use crate::objects::{self, Objects};
use crate::policy;
use crate::restore_check::{self, KafkaAhead, RestoreCheck};
use crate::session::RecordMetadata;
use crate::store::{self, Store};

/// Concurrent calls to S3.
const S3_CONCURRENCY: usize = 16;
/// A verified pointer reaches Kafka within this time. A longer delay is a finding.
const PUBLISH_GRACE: time::Duration = time::Duration::seconds(60);

/// Why the audit could not run to its end.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// PostgreSQL.
    #[error("{0}")]
    Store(#[from] store::Error),
    /// S3.
    #[error("{0}")]
    Objects(#[from] objects::Error),
    /// Kafka.
    #[error("{0}")]
    Kafka(#[from] kafka::Error),
}

impl From<restore_check::Error> for Error {
    fn from(error: restore_check::Error) -> Self {
        match error {
            restore_check::Error::Store(error) => Self::Store(error),
            restore_check::Error::Kafka(error) => Self::Kafka(error),
            other => Self::Kafka(kafka::Error::Unreachable(other.to_string())),
        }
    }
}

/// The three systems to compare, and whether to repair.
#[derive(Clone)]
pub struct Audit {
    /// PostgreSQL.
    pub store: Store,
    /// S3.
    pub objects: Objects,
    /// Kafka.
    pub kafka: Kafka,
    /// Repair what is safe.
    pub fix: bool,
}

/// The shards for which Kafka holds a later batch than the database. Without a marker topic the batches cannot be compared,
/// but the audit still reads the records.
async fn shards_ahead(restore_check: &RestoreCheck) -> Result<Vec<KafkaAhead>, Error> {
    match restore_check.shards_ahead().await {
        Err(restore_check::Error::NoMarkerTopic { .. }) => Ok(Vec::new()),
        ahead => Ok(ahead?),
    }
}

/// The state of one audit run.
struct Run<'a> {
    audit: &'a Audit,
    started_at: OffsetDateTime,
    /// The key prefixes that may contain objects of uploads, by bucket. An empty prefix means the whole bucket.
    prefixes_by_bucket: BTreeMap<String, BTreeSet<String>>,
    /// Whether the database was older than Kafka at the start of the run.
    database_is_older: bool,
    /// The partition and offset of each record that the last marker of a shard lists with its offset, by upload. Without the
    /// offset a marker proves no record: another record may have the same upload id.
    marker_records: HashMap<Uuid, (i32, i64)>,
    /// The digests of the objects that this run has read, by upload and ETag.
    digest_cache: Mutex<HashMap<(Uuid, Option<String>), record_verification::Digests>>,
}

impl std::ops::Deref for Run<'_> {
    type Target = Audit;

    fn deref(&self) -> &Audit {
        self.audit
    }
}

impl Audit {
    /// Compares PostgreSQL, S3 and Kafka, and repairs if `fix` is set.
    ///
    /// # Errors
    /// If one of the three does not answer. An incomplete comparison gives no report.
    pub async fn run(&self) -> Result<Report, Error> {
        self.store.check_schema().await?;
        let deployment = self.store.deployment().await?;
        let started_at = self.store.now().await?;
        let restore_check = RestoreCheck::new(self.store.clone(), self.kafka.clone(), deployment);
        let markers = restore_check.markers().await?.unwrap_or_default();
        let published = markers.into_iter().flat_map(|(_, marker)| marker.published).filter(RecordMetadata::has_offset);
        // Read the markers before the records, so that a shard continues only from a batch whose records were read. If a
        // broker commits a later batch meanwhile, the relay still refuses the shard until the next audit.
        let ahead = shards_ahead(&restore_check).await?;
        let mut run = Run {
            audit: self,
            started_at,
            prefixes_by_bucket: self.prefixes_by_bucket().await?,
            database_is_older: !ahead.is_empty(),
            marker_records: published.map(|record| (record.upload_id, (record.partition, record.offset))).collect(),
            digest_cache: Mutex::default(),
        };
        let mut report = ReportBuilder::default();
        // Kafka comes first, because an upload whose record Kafka holds needs no other repair.
        run.check_records(&mut report).await?;
        run.check_markers(ahead, &mut report).await?;
        run.check_unpublished(&mut report).await?;
        run.check_orphaned_outbox_rows(&mut report).await?;
        let buckets = run.check_sessions(&mut report).await?;
        run.add_session_buckets(buckets).await?;
        run.check_buckets(&mut report).await?;
        run.check_quotas(&mut report).await?;
        Ok(report.build())
    }

    /// The buckets and prefixes of all policies. A policy without a prefix, or a topic without a policy, means the whole
    /// bucket.
    async fn prefixes_by_bucket(&self) -> Result<BTreeMap<String, BTreeSet<String>>, Error> {
        let mut prefixes_by_bucket: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        let default = self.objects.default_bucket();
        prefixes_by_bucket.extend(default.map(|bucket| (bucket.to_owned(), BTreeSet::from([String::new()]))));
        let mut after = String::new();
        loop {
            let page = self.store.policies(&after, store::PAGE_SIZE).await?;
            let Some((last, _)) = page.last() else { break };
            after.clone_from(last);
            for (_, policy) in page {
                let Some(bucket) = policy.bucket.as_deref().or(default) else { continue };
                let prefix = policy.prefix.map(|prefix| format!("{prefix}/")).unwrap_or_default();
                prefixes_by_bucket.entry(bucket.to_owned()).or_default().insert(prefix);
            }
        }
        for prefixes in prefixes_by_bucket.values_mut() {
            // A list of a shorter prefix includes every longer prefix that starts with it. The set is sorted, so the shorter
            // prefix comes first.
            let mut shortest: Vec<String> = Vec::new();
            for prefix in std::mem::take(prefixes) {
                if !shortest.iter().any(|shorter| prefix.starts_with(shorter.as_str())) {
                    shortest.push(prefix);
                }
            }
            prefixes.extend(shortest);
        }
        Ok(prefixes_by_bucket)
    }
}

impl Run<'_> {
    /// Adds the buckets that only sessions name, because an earlier policy or setting chose them.
    async fn add_session_buckets(&mut self, buckets: BTreeSet<String>) -> Result<(), Error> {
        for bucket in buckets {
            if self.prefixes_by_bucket.contains_key(&bucket) {
                continue;
            }
            match self.objects.list(&bucket, "", None).await {
                // A deleted bucket contains nothing to list. The audit reports its missing objects session by session.
                Err(objects::Error::Refused { code, .. }) if code == "NoSuchBucket" => {}
                Err(error) => return Err(error.into()),
                Ok(_) => drop(self.prefixes_by_bucket.insert(bucket, BTreeSet::from([String::new()]))),
            }
        }
        Ok(())
    }

    /// Reports the shards for which Kafka is ahead. With `fix` the relay may continue if all records were verified.
    async fn check_markers(&self, ahead: Vec<KafkaAhead>, report: &mut ReportBuilder) -> Result<(), Error> {
        for ahead in ahead {
            let fixed = self.fix && !report.has_unverified_records();
            if fixed {
                self.store.raise_last_batch(ahead.shard, ahead.marker).await?;
            }
            report.add(NewFinding { kind: FindingKind::MarkerAhead, bytes: 0, fixed, example: ahead.to_string() });
        }
        Ok(())
    }

    /// Reports verified uploads whose pointer should be in Kafka by now, and those whose pointer is not in the outbox.
    async fn check_unpublished(&self, report: &mut ReportBuilder) -> Result<(), Error> {
        let mut after = Uuid::nil();
        loop {
            let page = self.store.stuck(self.started_at - PUBLISH_GRACE, after).await?;
            let Some(last) = page.last() else { return Ok(()) };
            after = last.id;
            for stuck in page {
                let kind = if stuck.is_in_outbox { FindingKind::Unpublished } else { FindingKind::OutboxMissing };
                let age_seconds = (self.started_at - stuck.verified_at).whole_seconds();
                let reason = stuck.error.map(|error| format!(": {error}")).unwrap_or_default();
                let fixed = self.fix
                    && !stuck.is_in_outbox
                    && !report.has_unverified_records()
                    && self.store.requeue_pointer(stuck.id, self.started_at).await?;
                let example = format!("upload {} to topic {}, verified {age_seconds} s ago{reason}", stuck.id, stuck.topic);
                report.add(NewFinding { kind, bytes: stuck.size_bytes.unsigned_abs(), fixed, example });
            }
        }
    }

    async fn check_orphaned_outbox_rows(&self, report: &mut ReportBuilder) -> Result<(), Error> {
        let mut after = Uuid::nil();
        loop {
            let page = self.store.orphaned_outbox_rows(after).await?;
            let Some(last) = page.last() else { return Ok(()) };
            after = last.id;
            for row in page {
                let fixed = self.fix && self.store.delete_orphaned_outbox_row(row.id).await?;
                let example = format!("upload {} is {}", row.id, row.state);
                let bytes = row.size_bytes.unsigned_abs();
                report.add(NewFinding { kind: FindingKind::OutboxStray, bytes, fixed, example });
            }
        }
    }

    async fn check_quotas(&self, report: &mut ReportBuilder) -> Result<(), Error> {
        let mismatches = self.store.quota_mismatches().await?;
        let fixed = self.fix && !mismatches.is_empty() && self.store.recount_quotas().await? > 0;
        for mismatch in mismatches {
            let example = format!(
                "tenant {}: its row counts {} sessions, {} bytes and {} held bytes, but its sessions add up to {}, {} and {}",
                mismatch.tenant,
                mismatch.stored_sessions,
                mismatch.stored_bytes,
                mismatch.stored_held_bytes,
                mismatch.sessions,
                mismatch.bytes,
                mismatch.held_bytes
            );
            let bytes = mismatch.stored_bytes.abs_diff(mismatch.bytes) + mismatch.stored_held_bytes.abs_diff(mismatch.held_bytes);
            report.add(NewFinding { kind: FindingKind::Quota, bytes, fixed, example });
        }
        Ok(())
    }
}

/// The tenant, topic and upload id in an object key, after an optional prefix; `None` if no broker creates such a key.
fn parse_object_key(object_key: &str) -> Option<(&str, &str, Uuid)> {
    let mut segments = object_key.rsplit('/');
    let id = segments.next().filter(|id| id.len() == 36).and_then(|id| Uuid::try_parse(id).ok())?;
    let mut next_is_number = |digits: usize| {
        segments.next().filter(|text| text.len() == digits && text.bytes().all(|byte| byte.is_ascii_digit())).is_some()
    };
    if !(next_is_number(2) && next_is_number(2) && next_is_number(4)) || segments.next() != Some("lfs") {
        return None;
    }
    let (topic, tenant) = (segments.next()?, segments.next()?);
    (policy::is_topic(topic) && !tenant.is_empty()).then_some((tenant, topic, id))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_object_keys_that_a_broker_creates_are_parsed() {
        let id = Uuid::now_v7();
        let at = OffsetDateTime::UNIX_EPOCH;
        for prefix in [None, Some("a"), Some("a/b")] {
            let key = policy::object_key(prefix, "acme", "videos", id, at);
            assert_eq!(parse_object_key(&key), Some(("acme", "videos", id)), "{key}");
        }
        for key in [
            "acme/videos/lfs/2026/11/21/x".to_owned(),
            format!("acme/videos/lfs/2026/11/{id}"),
            format!("acme/videos/raw/2026/11/21/{id}"),
            format!("videos/lfs/2026/11/21/{id}"),
            format!("acme/vid eos/lfs/2026/11/21/{id}"),
            format!("acme/videos/lfs/2026/11/2x/{id}"),
            format!("acme/videos/lfs/2026/11/21/{}", id.simple()),
            format!("acme/videos/lfs/2026/11/21/{id}/"),
        ] {
            assert_eq!(parse_object_key(&key), None, "{key}");
        }
    }
}
