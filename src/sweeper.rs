//! The sweeper: expires overdue uploads, and deletes what failed uploads left in S3.
//!
//! It decides in PostgreSQL first and deletes in S3 afterwards. It cleans up after every failed session once more when the
//! last URL has expired and the longest PUT that started before can have ended.
//!
//! It deletes nothing because of a database that may be older than Kafka. Each pass reads its list from PostgreSQL, then
//! runs the [`RestoreCheck`], then deletes. So the check stops a list from an old database. A list of failed sessions from
//! the current database stays true, whatever happens to the database later.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{self, StreamExt as _};
use time::OffsetDateTime;
use tracing::{info, warn};
use uuid::Uuid;

use crate::failpoint;
use crate::notify::ChangeNotifier;
use crate::objects::{self, ObjectLocation, Objects};
use crate::restore_check::{self, RestoreCheck};
use crate::session::Session;
use crate::store::{self, Store};

/// The most sessions that one pass handles; the next pass handles more.
const MAX_SESSIONS_PER_PASS: i64 = 100;
/// Sessions handled at the same time: each makes a few S3 requests one after another.
const CONCURRENT_SESSIONS: usize = 16;
/// The most idempotency keys that one pass deletes: about one second of work.
const MAX_KEYS_PER_PASS: i64 = 1000;
/// How long an idempotency key is kept after its session's last change.
const KEY_LIFETIME: time::Duration = time::Duration::hours(24);
/// When a cleanup that S3 refused is retried. S3 usually refuses again until an operator grants the permission.
const RETRY_AFTER_REFUSAL: time::Duration = time::Duration::hours(1);
/// The shortest pause before the next attempt to delete an object under Object Lock: a legal hold has no end date, and clocks
/// differ.
const RETRY_AFTER_OBJECT_LOCK: time::Duration = time::Duration::hours(1);
/// How long S3 may still process a request after its sender has given up.
const MAX_S3_REQUEST_TIME: time::Duration = time::Duration::seconds(60);

/// How often the sweeper runs, and how long a PUT may take.
#[derive(Debug, Clone)]
pub struct Settings {
    /// `LFS_BROKER_SWEEP_SECONDS`: the time between two passes.
    pub interval: Duration,
    /// `LFS_BROKER_LONGEST_PUT_SECONDS`: a PUT that starts before its URL expires may end this much later.
    pub max_put_duration: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self { interval: Duration::from_secs(60), max_put_duration: Duration::from_secs(3600) }
    }
}

/// Expires overdue uploads, and cleans up after failed ones.
pub(crate) struct Sweeper {
    pub(crate) store: Store,
    pub(crate) objects: Objects,
    pub(crate) notifier: Arc<ChangeNotifier>,
    pub(crate) settings: Settings,
    pub(crate) restore_check: RestoreCheck,
    /// How long a completion may still run after its session has ended: the length of a lease.
    pub(crate) lease: Duration,
}

impl Sweeper {
    /// Expires overdue open uploads, and returns how many.
    pub(crate) async fn expire_overdue(&self) -> Result<usize, store::Error> {
        let now = self.store.now().await?;
        let overdue = valid_sessions(self.store.overdue(now, MAX_SESSIONS_PER_PASS).await?);
        if overdue.is_empty() {
            return Ok(0);
        }
        // An old database would expire published uploads. If the markers cannot be read, uploads expire all the same: an
        // unreachable Kafka must not block quotas. Nothing is deleted before the check passes, and `audit --fix` can undo
        // an expiry.
        if let Err(error @ restore_check::Error::KafkaAhead(_)) = self.restore_check.check().await {
            let seconds = self.settings.interval.as_secs_f32();
            warn!(
                overdue = overdue.len(), %error,
                "did not expire {} overdue uploads: {error}; retrying in {seconds} s", overdue.len()
            );
            return Ok(0);
        }
        let expiring = stream::iter(overdue).map(|session| self.store.expire(session, now));
        let expired: Vec<_> = expiring.buffer_unordered(CONCURRENT_SESSIONS).collect().await;
        if expired.iter().any(|expired| matches!(expired, Ok(true))) {
            self.notifier.sweeper.notify_one();
        }
        count(expired)
    }

    /// Releases the reserved bytes of failed uploads once no URL can bring those bytes; returns how many uploads.
    pub(crate) async fn release_held_bytes(&self) -> Result<usize, store::Error> {
        let now = self.store.now().await?;
        let held = self.store.sessions_with_releasable_bytes(now, MAX_SESSIONS_PER_PASS).await?;
        for id in &held {
            self.store.release_held_bytes(*id).await?;
        }
        Ok(held.len())
    }

    /// Deletes what failed uploads left in S3, where a cleanup is due; returns how many were cleaned up.
    pub(crate) async fn clean_up(&self) -> Result<usize, store::Error> {
        let now = self.store.now().await?;
        // The cleanups are claimed before any S3 request, so replicas share the work. A cleanup that fails, or whose replica
        // dies, is due again in the next pass.
        let due = valid_sessions(self.store.claim_cleanups(now, now + self.settings.interval, MAX_SESSIONS_PER_PASS).await?);
        if due.is_empty() {
            return Ok(0);
        }
        if let Err(error) = self.restore_check.check().await {
            let seconds = self.settings.interval.as_secs_f32();
            warn!(
                waiting = due.len(), %error,
                "did not delete the objects of {} failed uploads: {error}; retrying in {seconds} s", due.len()
            );
            return Ok(0);
        }
        let due = self.retain_failed(due).await?;
        let cleaning = stream::iter(due).map(|session| self.clean_up_session(session, now));
        let cleaned: Vec<_> = cleaning.buffer_unordered(CONCURRENT_SESSIONS).collect().await;
        count(cleaned)
    }

    /// Drops the sessions that `audit --fix` has published since the list was read: the check passes again after that.
    async fn retain_failed(&self, mut due: Vec<Session>) -> Result<Vec<Session>, store::Error> {
        let ids: Vec<Uuid> = due.iter().map(|session| session.id).collect();
        let failed: HashSet<Uuid> = self.store.filter_failed(&ids).await?.into_iter().collect();
        due.retain(|session| failed.contains(&session.id));
        Ok(due)
    }

    async fn clean_up_session(&self, session: Session, now: OffsetDateTime) -> Result<bool, store::Error> {
        if session.spec.layout.has_part_hashes() {
            self.store.delete_part_hashes(session.id).await?;
        }
        match self.delete_objects(&session).await {
            Ok(()) => {}
            // The bucket was deleted, and its objects with it.
            Err(objects::Error::Refused { code, .. }) if code == "NoSuchBucket" => {}
            // An earlier retry cannot succeed, and a warning in each pass would hide other warnings.
            Err(objects::Error::Locked { until }) => {
                let next = until.unwrap_or(now).max(now + RETRY_AFTER_OBJECT_LOCK);
                let id = session.id;
                info!(session.id = %id, "Object Lock keeps the objects of failed upload {id} in S3; retrying at {next}");
                self.store.schedule_cleanup(id, Some(next)).await?;
                return Ok(true);
            }
            Err(error @ objects::Error::Refused { .. }) => {
                let id = session.id;
                let seconds = RETRY_AFTER_REFUSAL.whole_seconds();
                warn!(
                    session.id = %id, %error,
                    "S3 refused to delete the objects of failed upload {id}: {error}; retrying in {seconds} s"
                );
                self.store.schedule_cleanup(id, Some(now + RETRY_AFTER_REFUSAL)).await?;
                return Ok(false);
            }
            Err(error) => {
                let (id, seconds) = (session.id, self.settings.interval.as_secs_f32());
                warn!(
                    session.id = %id, %error,
                    "deleting the objects of failed upload {id} failed: {error}; retrying in {seconds} s"
                );
                return Ok(false);
            }
        }
        self.store.schedule_cleanup(session.id, self.next_cleanup(&session, now)).await?;
        Ok(true)
    }

    /// Deletes idempotency keys older than a day, and returns how many. A failure is only logged: a key that is kept longer
    /// does no harm.
    pub(crate) async fn delete_expired_keys(&self) -> Result<usize, store::Error> {
        let before = self.store.now().await? - KEY_LIFETIME;
        Ok(match self.store.delete_idempotency_keys(before, MAX_KEYS_PER_PASS).await {
            Ok(deleted) => usize::try_from(deleted).expect("a pass deletes at most 1000 keys"),
            Err(error) => {
                let seconds = self.settings.interval.as_secs_f32();
                warn!(%error, "deleting expired idempotency keys failed: {error}; retrying in {seconds} s");
                0
            }
        })
    }

    async fn delete_objects(&self, session: &Session) -> Result<(), objects::Error> {
        let location = ObjectLocation::of(session);
        let uploads = self.objects.abort_multipart_uploads(&location, session.s3_upload_id.as_deref()).await?;
        let versions = self.objects.delete_versions(&location).await?;
        failpoint::reach("sweep.removed").await?;
        let id = session.id;
        info!(
            session.id = %id, uploads, versions,
            "cleaned up after failed upload {id}: aborted {uploads} multipart uploads, deleted {versions} object versions"
        );
        Ok(())
    }

    /// When S3 must be cleaned up again: when the last URL has expired, and once more when a running PUT or completion can
    /// have ended.
    fn next_cleanup(&self, session: &Session, now: OffsetDateTime) -> Option<OffsetDateTime> {
        let urls_expire_at = session.urls_expire_at(session.updated_at);
        let last_put = urls_expire_at + self.settings.max_put_duration;
        let last_completion = session.updated_at + self.lease + MAX_S3_REQUEST_TIME;
        [urls_expire_at, last_put.max(last_completion)].into_iter().find(|due| now < *due)
    }
}

/// The valid sessions among these rows. An invalid row is logged and does not block the others.
fn valid_sessions(found: Vec<Result<Session, store::Error>>) -> Vec<Session> {
    let log_invalid = |found: Result<Session, store::Error>| {
        found.inspect_err(|error| warn!(%error, "the sweeper skips an invalid row: {error}")).ok()
    };
    found.into_iter().filter_map(log_invalid).collect()
}

/// How many sessions were handled, or the first database error.
fn count(done: Vec<Result<bool, store::Error>>) -> Result<usize, store::Error> {
    done.into_iter().try_fold(0, |sum, done| Ok(sum + usize::from(done?)))
}
