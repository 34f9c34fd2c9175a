//! The audit: do PostgreSQL, S3 and Kafka tell the same story?
//!
//! Each is the authority on something: Kafka on what was published, PostgreSQL on what was promised, S3 on what the
//! bytes are. The audit walks all three in pages and in bounded memory, while brokers go on working, and tells where
//! they disagree. What can pass by itself within a minute is not told.
//!
//! With `fix` it repairs what is safe, and no more. It deletes no object: what a failed session left is handed to the
//! sweeper, and what no session knows is only told, because a payload whose row was lost with a database may be the
//! only copy of something published. A parked pointer is the operator's (`redrive`), a missing object nobody's.
//!
//! After PostgreSQL was restored from a backup Kafka holds more than the database knows. The relay then refuses the
//! shard; the audit finds each record by its `lfs-upload-id`, and writes it down where the session still waits, or was
//! let fail by the old database. At the end, if nothing is left in doubt, it lets the relay and the sweeper go on. It can
//! only find what the topic still retains.

mod bytes;
mod proof;
mod records;
mod report;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Mutex;

use time::OffsetDateTime;
use uuid::Uuid;

pub use report::{Finding, Kind, Report};
use report::{Tally, Told};

use crate::kafka::{self, Kafka};
use crate::objects::{self, Objects};
use crate::policy;
use crate::restore_check::{self, Ahead, RestoreCheck};
use crate::store::{self, Deployment, Store};

/// Questions to S3 at the same time.
const AT_ONCE: usize = 16;
/// Within so long a pointer reaches Kafka, or somebody should know that it does not.
const PROMPT: time::Duration = time::Duration::seconds(60);

/// Why the audit could not be brought to its end.
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

/// What is compared, and whether it is repaired.
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

/// The shards of which Kafka knows more than the database. Without a marker topic nothing can be compared, and the
/// records tell all the same.
async fn ahead(restore_check: &RestoreCheck) -> Result<Vec<Ahead>, Error> {
    match restore_check.ahead().await {
        Err(restore_check::Error::NoMarkerTopic { .. }) => Ok(Vec::new()),
        ahead => Ok(ahead?),
    }
}

/// What every part of one run goes by.
struct Run<'a> {
    audit: &'a Audit,
    deployment: Deployment,
    /// When it began.
    now: OffsetDateTime,
    /// Where objects of ours may be: prefixes by bucket, the empty one for the whole of it.
    places: BTreeMap<String, BTreeSet<String>>,
    /// Whether the database was older than Kafka when the run began.
    is_older: bool,
    /// The partition and offset of each upload's record that a last marker lists.
    listed: HashMap<Uuid, (i32, i64)>,
    /// The digests of objects that were read, by upload and ETag.
    read: Mutex<HashMap<(Uuid, Option<String>), proof::Digests>>,
}

impl std::ops::Deref for Run<'_> {
    type Target = Audit;

    fn deref(&self) -> &Audit {
        self.audit
    }
}

impl Audit {
    /// Compares the three, and repairs if asked to.
    ///
    /// # Errors
    /// Where one of them does not answer: then nothing is known, however much was compared before.
    pub async fn run(&self) -> Result<Report, Error> {
        self.store.check_schema().await?;
        let deployment = self.store.deployment().await?;
        let now = self.store.now().await?;
        let restore_check = RestoreCheck::new(self.store.clone(), self.kafka.clone(), deployment);
        let markers = restore_check.markers().await?.unwrap_or_default();
        let listed = markers.into_iter().flat_map(|(_, marker)| marker.published);
        // The markers before the records: a shard is let go on up to a batch whose records were read. One that a broker
        // committed later is not among them, and keeps the shard refused until the next audit.
        let ahead = ahead(&restore_check).await?;
        let mut run = Run {
            audit: self,
            deployment,
            now,
            places: self.places().await?,
            is_older: !ahead.is_empty(),
            listed: listed.map(|record| (record.upload_id, (record.partition, record.offset))).collect(),
            read: Mutex::default(),
        };
        let mut tally = Tally::default();
        // Kafka first: what it holds needs no other repair.
        run.records(&mut tally).await?;
        run.markers(ahead, &mut tally).await?;
        run.promises(&mut tally).await?;
        run.strays(&mut tally).await?;
        let buckets = run.walk(&mut tally).await?;
        run.look_into(buckets).await?;
        run.lists(&mut tally).await?;
        run.quota(&mut tally).await?;
        Ok(tally.report())
    }

    /// The buckets and prefixes of the policies; without a prefix, and for topics without a policy, it is all of the bucket.
    async fn places(&self) -> Result<BTreeMap<String, BTreeSet<String>>, Error> {
        let mut places: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        let default = self.objects.default_bucket();
        places.extend(default.map(|bucket| (bucket.to_owned(), BTreeSet::from([String::new()]))));
        let mut after = String::new();
        loop {
            let page = self.store.policies(&after, store::PAGE).await?;
            let Some((last, _)) = page.last() else { break };
            after.clone_from(last);
            for (_, policy) in page {
                let Some(bucket) = policy.bucket.as_deref().or(default) else { continue };
                let prefix = policy.prefix.map(|prefix| format!("{prefix}/")).unwrap_or_default();
                places.entry(bucket.to_owned()).or_default().insert(prefix);
            }
        }
        for prefixes in places.values_mut() {
            // In order, a prefix comes right after those that it begins with, which list it too.
            let mut kept: Vec<String> = Vec::new();
            for prefix in std::mem::take(prefixes) {
                if !kept.iter().any(|shorter| prefix.starts_with(shorter.as_str())) {
                    kept.push(prefix);
                }
            }
            prefixes.extend(kept);
        }
        Ok(places)
    }
}

impl Run<'_> {
    /// Adds the buckets of sessions that nothing else names: a policy or a setting of before has led there.
    async fn look_into(&mut self, buckets: BTreeSet<String>) -> Result<(), Error> {
        for bucket in buckets {
            if self.places.contains_key(&bucket) {
                continue;
            }
            match self.objects.list(&bucket, "", None).await {
                // Nothing is in a bucket that was removed; what was promised there is told session by session.
                Err(objects::Error::Refused { code, .. }) if code == "NoSuchBucket" => {}
                Err(error) => return Err(error.into()),
                Ok(_) => drop(self.places.insert(bucket, BTreeSet::from([String::new()]))),
            }
        }
        Ok(())
    }

    /// Whether Kafka is ahead of the stamps. The relay is let go on only when no record is left in doubt.
    async fn markers(&self, ahead: Vec<Ahead>, tally: &mut Tally) -> Result<(), Error> {
        for ahead in ahead {
            let settled = self.fix && !tally.in_doubt();
            if settled {
                self.store.raise_batch(ahead.shard, ahead.marker).await?;
            }
            tally.tell(Told { kind: Kind::MarkerAhead, bytes: 0, fixed: settled, example: ahead.to_string() });
        }
        Ok(())
    }

    /// Promises that should have been kept by now, and those that nobody would keep.
    async fn promises(&self, tally: &mut Tally) -> Result<(), Error> {
        let mut after = Uuid::nil();
        loop {
            let page = self.store.stuck(self.now - PROMPT, after).await?;
            let Some(last) = page.last() else { return Ok(()) };
            after = last.id;
            for stuck in page {
                let kind = if stuck.waits { Kind::Unpublished } else { Kind::OutboxMissing };
                let age = (self.now - stuck.verified_at).whole_seconds();
                let why = stuck.error.map(|error| format!(": {error}")).unwrap_or_default();
                let fixed = self.fix
                    && !stuck.waits
                    && !tally.in_doubt()
                    && self.store.promise_again(stuck.id, self.deployment.shards, self.now).await?;
                let example = format!("{} to {}, verified {age} s ago{why}", stuck.id, stuck.topic);
                tally.tell(Told { kind, bytes: stuck.size_bytes.unsigned_abs(), fixed, example });
            }
        }
    }

    async fn strays(&self, tally: &mut Tally) -> Result<(), Error> {
        let mut after = Uuid::nil();
        loop {
            let page = self.store.strays(after).await?;
            let Some(last) = page.last() else { return Ok(()) };
            after = last.id;
            for stray in page {
                let fixed = self.fix && self.store.forget_stray(stray.id).await?;
                let example = format!("{} is {}", stray.id, stray.state);
                tally.tell(Told { kind: Kind::OutboxStray, bytes: stray.size_bytes.unsigned_abs(), fixed, example });
            }
        }
    }

    async fn quota(&self, tally: &mut Tally) -> Result<(), Error> {
        let miscounts = self.store.miscounts().await?;
        let fixed = self.fix && !miscounts.is_empty() && self.store.recount().await? > 0;
        for wrong in miscounts {
            let example = format!(
                "{}: the row says {} sessions, {} bytes and {} held, there are {}, {} and {}",
                wrong.tenant,
                wrong.told_sessions,
                wrong.told_bytes,
                wrong.told_held_bytes,
                wrong.sessions,
                wrong.bytes,
                wrong.held_bytes
            );
            let bytes = wrong.told_bytes.abs_diff(wrong.bytes) + wrong.told_held_bytes.abs_diff(wrong.held_bytes);
            tally.tell(Told { kind: Kind::Quota, bytes, fixed, example });
        }
        Ok(())
    }
}

/// The tenant, topic and upload that an object's key names, whatever prefix stands before them; `None` for a key that
/// no broker made.
fn shape(object_key: &str) -> Option<(&str, &str, Uuid)> {
    let mut segments = object_key.rsplit('/');
    let id = segments.next().filter(|id| id.len() == 36).and_then(|id| Uuid::try_parse(id).ok())?;
    let mut number = |digits: usize| {
        segments.next().filter(|text| text.len() == digits && text.bytes().all(|byte| byte.is_ascii_digit())).is_some()
    };
    if !(number(2) && number(2) && number(4)) || segments.next() != Some("lfs") {
        return None;
    }
    let (topic, tenant) = (segments.next()?, segments.next()?);
    (policy::is_topic(topic) && !tenant.is_empty()).then_some((tenant, topic, id))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_keys_that_a_broker_makes_are_ours() {
        let id = Uuid::now_v7();
        let at = OffsetDateTime::UNIX_EPOCH;
        for prefix in [None, Some("a"), Some("a/b")] {
            let key = policy::object_key(prefix, "acme", "videos", id, at);
            assert_eq!(shape(&key), Some(("acme", "videos", id)), "{key}");
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
            assert_eq!(shape(&key), None, "{key}");
        }
    }
}
