//! The sweeper: ends what is overdue, and removes what failed uploads left in S3.
//!
//! It decides in PostgreSQL first and destroys in S3 after, and it sweeps every failed session once more when the
//! last URL has ended and the longest PUT begun under it has landed.
//!
//! It destroys nothing because of a database that may be older than Kafka. Each pass reads its list from PostgreSQL, then
//! makes the [`RestoreCheck`], then deletes. So a list that an old database gave is stopped by the check after it, and a
//! list of failed sessions that the current database gave stays true whatever happens to the database later.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{self, StreamExt as _};
use time::OffsetDateTime;
use tracing::{info, warn};
use uuid::Uuid;

use crate::failpoint;
use crate::finish::{expire, place};
use crate::objects::{self, Objects};
use crate::restore_check::{self, RestoreCheck};
use crate::session::Session;
use crate::store::{self, Store};
use crate::wakes::Wakes;

/// Sessions a pass; the next pass takes the next ones.
const BATCH: i64 = 100;
/// Sessions at a time: each costs a few calls of S3, one after another.
const AT_ONCE: usize = 16;
/// Idempotency keys a pass: a second's work.
const KEYS: i64 = 1000;
/// How long an idempotency key outlives its session's last change.
const KEEP_KEYS: time::Duration = time::Duration::hours(24);
/// What S3 refuses now it refuses in a minute: a permission that is given meanwhile is noticed within this.
const REFUSED_AGAIN: time::Duration = time::Duration::hours(1);
/// How soon an object is tried again that Object Lock keeps: a legal hold has no end, and a clock may be a little wrong.
const LOCKED_AGAIN: time::Duration = time::Duration::hours(1);
/// How long S3 may still work on a request whose sender has given up.
const S3_TIME_OUT: time::Duration = time::Duration::seconds(60);

/// How often it sweeps, and how long a PUT may take.
#[derive(Debug, Clone)]
pub struct Settings {
    /// `LFS_BROKER_SWEEP_SECONDS`.
    pub every: Duration,
    /// `LFS_BROKER_LONGEST_PUT_SECONDS`: a PUT begun before its URL ended may land this much later.
    pub longest_put: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self { every: Duration::from_secs(60), longest_put: Duration::from_secs(3600) }
    }
}

/// Ends and removes.
pub(crate) struct Sweeper {
    pub(crate) store: Store,
    pub(crate) objects: Objects,
    pub(crate) wakes: Arc<Wakes>,
    pub(crate) settings: Settings,
    pub(crate) restore_check: RestoreCheck,
    /// The longest a lease can outlive the move that ended it.
    pub(crate) lease: Duration,
    pub(crate) shards: i32,
}

impl Sweeper {
    /// Ends open uploads whose time is over; says how many.
    pub(crate) async fn end_overdue(&self) -> Result<usize, store::Error> {
        let now = self.store.now().await?;
        let overdue = sound(self.store.overdue(now, BATCH).await?);
        if overdue.is_empty() {
            return Ok(0);
        }
        // An old database would end what is published. Where the markers cannot be read, uploads end all the same: a Kafka
        // that is away must not keep quotas taken, nothing is deleted before the check passes, and `audit --fix` can take
        // the end back.
        if let Err(error @ restore_check::Error::Older(_)) = self.restore_check.check().await {
            warn!(overdue = overdue.len(), %error, "did not expire {} overdue uploads: {error}", overdue.len());
            return Ok(0);
        }
        let ending = stream::iter(overdue).map(|session| expire(&self.store, session, now, self.shards));
        let ended: Vec<_> = ending.buffer_unordered(AT_ONCE).collect().await;
        if ended.iter().any(|ended| matches!(ended, Ok(true))) {
            self.wakes.sweeper.notify_one();
        }
        count(ended)
    }

    /// Gives the bytes of failed uploads back to the quota, once no URL can bring them any more; says of how many.
    pub(crate) async fn free_held(&self) -> Result<usize, store::Error> {
        let now = self.store.now().await?;
        let held = self.store.held(now, BATCH).await?;
        for id in &held {
            self.store.free_held(*id).await?;
        }
        Ok(held.len())
    }

    /// Removes what failed uploads have left in S3, as far as it is due; says of how many.
    pub(crate) async fn clean_up(&self) -> Result<usize, store::Error> {
        let now = self.store.now().await?;
        // Taken before S3 is asked: replicas share the work, and what fails, or whose sweeper dies, is due in the next period.
        let due = sound(self.store.take_cleanups(now, now + self.settings.every, BATCH).await?);
        if due.is_empty() {
            return Ok(0);
        }
        if let Err(error) = self.restore_check.check().await {
            let seconds = self.settings.every.as_secs_f32();
            warn!(
                waiting = due.len(), %error,
                "did not delete the objects of {} failed uploads: {error}; next try in {seconds} s", due.len()
            );
            return Ok(0);
        }
        let due = self.still_failed(due).await?;
        let cleaning = stream::iter(due).map(|session| self.clean_up_after(session, now));
        let cleaned: Vec<_> = cleaning.buffer_unordered(AT_ONCE).collect().await;
        count(cleaned)
    }

    /// Without those that `audit --fix` has published since the list was read: the check passes again after it.
    async fn still_failed(&self, mut due: Vec<Session>) -> Result<Vec<Session>, store::Error> {
        let ids: Vec<Uuid> = due.iter().map(|session| session.id).collect();
        let failed: HashSet<Uuid> = self.store.failed(&ids).await?.into_iter().collect();
        due.retain(|session| failed.contains(&session.id));
        Ok(due)
    }

    async fn clean_up_after(&self, session: Session, now: OffsetDateTime) -> Result<bool, store::Error> {
        if session.promise.layout.has_part_hashes() {
            self.store.forget_parts(session.id).await?;
        }
        match self.remove(&session).await {
            Ok(()) => {}
            // Everything went with the bucket.
            Err(objects::Error::Refused { code, .. }) if code == "NoSuchBucket" => {}
            // Trying sooner cannot help, and a warning in each pass would hide others.
            Err(objects::Error::Locked { until }) => {
                let next = until.unwrap_or(now).max(now + LOCKED_AGAIN);
                info!(session.id = %session.id, "object lock keeps what {} left in S3; the next try is at {next}", session.id);
                self.store.set_cleanup(session.id, Some(next)).await?;
                return Ok(true);
            }
            Err(error @ objects::Error::Refused { .. }) => {
                let id = session.id;
                warn!(session.id = %id, %error, "S3 does not let the broker clean up after {id}; it tries again in an hour");
                self.store.set_cleanup(id, Some(now + REFUSED_AGAIN)).await?;
                return Ok(false);
            }
            Err(error) => {
                warn!(session.id = %session.id, %error, "could not clean up after {}", session.id);
                return Ok(false);
            }
        }
        self.store.set_cleanup(session.id, self.next_pass(&session, now)).await?;
        Ok(true)
    }

    /// Forgets idempotency keys whose day is over; says how many. A failure waits for the next time: a key that is kept
    /// longer harms nobody.
    pub(crate) async fn forget_keys(&self) -> Result<usize, store::Error> {
        let before = self.store.now().await? - KEEP_KEYS;
        Ok(match self.store.forget_keys(before, KEYS).await {
            Ok(gone) => usize::try_from(gone).expect("a batch"),
            Err(error) => {
                warn!(%error, "could not forget idempotency keys: {error}");
                0
            }
        })
    }

    async fn remove(&self, session: &Session) -> Result<(), objects::Error> {
        let place = place(session);
        let uploads = self.objects.abort_uploads(&place, session.s3_upload_id.as_deref()).await?;
        let versions = self.objects.delete_versions(&place).await?;
        failpoint::reach("sweep.removed").await?;
        info!(session.id = %session.id, uploads, versions, "cleaned up after {}", session.id);
        Ok(())
    }

    /// When S3 must be swept again: after the last URL's end, and once more when a PUT or a completion that was under way
    /// has landed.
    fn next_pass(&self, session: &Session, now: OffsetDateTime) -> Option<OffsetDateTime> {
        let urls_end_at = session.urls_end_at(session.updated_at);
        let last_put = urls_end_at + self.settings.longest_put;
        let last_completion = session.updated_at + self.lease + S3_TIME_OUT;
        [urls_end_at, last_put.max(last_completion)].into_iter().find(|pass| now < *pass)
    }
}

/// The sessions among these rows. One that breaks its rules is told of, and holds no other up.
fn sound(found: Vec<Result<Session, store::Error>>) -> Vec<Session> {
    let tell = |found: Result<Session, store::Error>| found.inspect_err(|error| warn!(%error, "passed over: {error}")).ok();
    found.into_iter().filter_map(tell).collect()
}

/// How many were done; or why one was not, where the database failed.
fn count(done: Vec<Result<bool, store::Error>>) -> Result<usize, store::Error> {
    done.into_iter().try_fold(0, |sum, done| Ok(sum + usize::from(done?)))
}
