//! Completion under a lease: completes the object in S3, verifies it, and saves the outcome. Also expires overdue sessions.
//!
//! The broker runs it when a client completes, the verifier when bytes must be read or a lease has expired. Every step may
//! run twice: a takeover checks S3 before it changes anything, and the outcome is saved only for the version that was read.

mod parts;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use lfs_broker_client::api::{Integrity, UploadState};
use lfs_broker_client::checksum::Sha256;
use time::OffsetDateTime;
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tracing::{info, warn};
use uuid::Uuid;

use crate::failpoint;
use crate::notify::ChangeNotifier;
use crate::objects::{self, CompleteOutcome, ObjectLocation, Objects};
use crate::session::{Layout, Object, Session, SessionError, State, Verification};
use crate::store::{self, Store, Transition};
use parts::valid_parts;
pub(crate) use parts::{missing_part_numbers, uploaded_parts};

/// The time limit for removing stray multipart uploads: a slow store must not delay the completion.
const ABORT_STRAY_TIMEOUT: Duration = Duration::from_secs(2);
/// After this many attempts, a store that does not list multipart uploads no longer blocks the completion. `audit` finds
/// the stray uploads later.
const ABORT_STRAY_MAX_ATTEMPTS: i32 = 5;
/// The longest pause between two attempts to save an outcome.
const MAX_RETRY_PAUSE: Duration = Duration::from_secs(2);

/// How long a lease lasts without renewal.
#[derive(Debug, Clone)]
pub struct Settings {
    /// `LFS_BROKER_LEASE_SECONDS`: the lease is renewed after every third of this time.
    pub lease: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self { lease: Duration::from_secs(30) }
    }
}

/// Completes sessions under leases; one for each replica.
#[derive(Clone)]
pub(crate) struct CompletionWorker {
    pub(crate) store: Store,
    pub(crate) objects: Objects,
    pub(crate) notifier: Arc<ChangeNotifier>,
    pub(crate) settings: Settings,
    pub(crate) shards: i32,
    /// The id of this replica, which owns the leases.
    pub(crate) owner: Uuid,
    pub(crate) tasks: Tasks,
}

/// The completions that run in this replica.
#[derive(Clone, Default)]
pub(crate) struct Tasks(Arc<Mutex<JoinSet<()>>>);

impl Tasks {
    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut tasks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // A `JoinSet` keeps ended tasks until they are joined.
        while tasks.try_join_next().is_some() {}
        tasks.spawn(task);
    }

    /// Waits until all current tasks have ended, but not for tasks that start meanwhile.
    pub(crate) async fn wait(&self) {
        let mut tasks = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        while tasks.join_next().await.is_some() {}
    }

    /// Cancels all tasks at once.
    pub(crate) fn abort(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).abort_all();
    }
}

/// The outcome of a claim.
enum ClaimOutcome {
    Claimed(Box<Session>),
    Refused(SessionError),
    /// The database did not confirm the claim. The session is as it is if the claim was stored.
    Unknown(Box<Session>, store::Error),
    Failed(store::Error),
}

/// Why a completion failed.
enum CompletionError {
    Session(SessionError),
    Objects(objects::Error),
    Store(store::Error),
}

impl From<SessionError> for CompletionError {
    fn from(error: SessionError) -> Self {
        Self::Session(error)
    }
}

impl From<objects::Error> for CompletionError {
    fn from(error: objects::Error) -> Self {
        Self::Objects(error)
    }
}

impl From<store::Error> for CompletionError {
    fn from(error: store::Error) -> Self {
        Self::Store(error)
    }
}

/// The location of a session's object.
pub(crate) fn object_location(session: &Session) -> ObjectLocation {
    ObjectLocation { bucket: session.bucket.clone(), key: session.object_key.clone() }
}

impl CompletionWorker {
    /// Claims a session and completes it in its own task, which continues if the caller goes away. Returns once the
    /// session is claimed. `by` goes into the history, and `permit` is held until the task ends.
    pub(crate) async fn start(
        &self,
        session: Session,
        by: &str,
        permit: impl Send + 'static,
    ) -> Result<Result<(), SessionError>, store::Error> {
        let (sender, receiver) = oneshot::channel();
        let (worker, by) = (self.clone(), by.to_owned());
        self.tasks.spawn(async move {
            // A claimed session is completed even if the caller no longer listens.
            match worker.claim(session, &by).await {
                ClaimOutcome::Claimed(session) => {
                    let _ = sender.send(Ok(Ok(())));
                    worker.process(*session).await;
                }
                ClaimOutcome::Refused(error) => drop(sender.send(Ok(Err(error)))),
                ClaimOutcome::Unknown(session, error) => {
                    let _ = sender.send(Err(error));
                    worker.recover_claim(*session).await;
                }
                ClaimOutcome::Failed(error) => drop(sender.send(Err(error))),
            }
            drop(permit);
        });
        receiver.await.unwrap_or(Err(store::Error::ShuttingDown))
    }

    async fn claim(&self, session: Session, by: &str) -> ClaimOutcome {
        let now = match self.store.now().await {
            Ok(now) => now,
            Err(error) => return ClaimOutcome::Failed(error),
        };
        let from = session.state.name();
        let claimed = match session.claim(self.owner, now, now + self.settings.lease) {
            Ok(claimed) => claimed,
            Err(error) => return ClaimOutcome::Refused(error),
        };
        let reason = if from == UploadState::Open { "the client requested completion" } else { "the previous lease has ended" };
        match self.store.save(&Transition { from, to: &claimed, reason, by, now }, self.shards).await {
            Ok(saved) => ClaimOutcome::Claimed(Box::new(saved)),
            Err(error @ store::Error::Database(_)) => ClaimOutcome::Unknown(Box::new(claimed), error),
            Err(error) => ClaimOutcome::Failed(error),
        }
    }

    /// The database did not confirm the claim, but may have stored it. If it did, the session is completed.
    async fn recover_claim(&self, claimed: Session) {
        match self.retry_until_lease_ends(|| self.store.session(claimed.id)).await {
            Ok(Some(session)) if session.state == claimed.state => self.process(session).await,
            Ok(_) => {}
            Err(error) => {
                let id = claimed.id;
                warn!(session.id = %id, %error, "checking the claim of upload {id} failed: {error}; its lease will expire");
            }
        }
    }

    /// Retries while the database does not answer, for at most the length of a lease.
    async fn retry_until_lease_ends<T, F>(&self, attempt: impl Fn() -> F) -> Result<T, store::Error>
    where
        F: Future<Output = Result<T, store::Error>>,
    {
        let deadline = Instant::now() + self.settings.lease;
        let mut pause = Duration::from_millis(100);
        loop {
            match attempt().await {
                Err(store::Error::Database(_) | store::Error::LockTimeout) if Instant::now() + pause < deadline => {
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(MAX_RETRY_PAUSE);
                }
                result => return result,
            }
        }
    }

    /// Completes a session that was just claimed, and renews its lease meanwhile.
    async fn process(&self, session: Session) {
        let State::Completing { lease, must_read } = session.state.clone() else { return };
        let id = session.id;
        let by = if must_read { "verifier" } else { "broker" };
        let result = async {
            match must_read {
                true => self.read_back(session.clone()).await,
                false => self.check_object(session.clone(), lease.attempt).await,
            }
        };
        let result = tokio::select! {
            result = result => result,
            () = self.renew_lease_until_lost(id, lease.attempt) => {
                return warn!(session.id = %id, "lost the lease on upload {id}: stopped completing it; its new owner continues");
            }
        };
        let result = match failpoint::reach("complete.proved").await {
            Ok(()) => result,
            Err(failed) => Err(CompletionError::Store(failed.into())),
        };
        match result {
            Ok(next) => self.save_outcome(next, by).await,
            Err(CompletionError::Session(error)) => self.save_session_error(session, &error, by).await,
            // S3 would refuse a retry too, so the client decides: complete later, abort, or let the upload expire.
            Err(CompletionError::Objects(objects::Error::Refused { code: s3_code, message })) => {
                warn!(
                    session.id = %id, code = %s3_code, message,
                    "S3 refused to complete upload {id}: {s3_code}; the upload is open again"
                );
                let error = SessionError::StorageRefused { code: no_answer_code(session.spec.layout), s3_code };
                self.save_session_error(session, &error, by).await;
            }
            Err(CompletionError::Objects(error)) => {
                let seconds = retry_wait(lease.attempt).as_secs();
                warn!(
                    session.id = %id, %error,
                    "S3 failed while completing upload {id}: {error}; the verifier retries in {seconds} s"
                );
                self.release_lease(session, lease.attempt, "object storage", by).await;
            }
            Err(CompletionError::Store(error)) => {
                let seconds = retry_wait(lease.attempt).as_secs();
                warn!(
                    session.id = %id, %error,
                    "the database failed while completing upload {id}: {error}; the verifier retries in {seconds} s"
                );
                self.release_lease(session, lease.attempt, "the database", by).await;
            }
        }
        self.notifier.notify(id);
    }

    /// Renews the lease after every third of its length; returns when it is lost.
    async fn renew_lease_until_lost(&self, id: Uuid, attempt: i32) {
        loop {
            tokio::time::sleep(self.settings.lease / 3).await;
            let renewed = async {
                let until = self.store.now().await? + self.settings.lease;
                self.store.renew_lease(id, self.owner, attempt, until).await
            };
            // If the database does not answer, the lease may still be valid: the next round tries again.
            if let Ok(false) = renewed.await {
                return;
            }
        }
    }

    async fn check_object(&self, session: Session, attempt: i32) -> Result<Session, CompletionError> {
        let hashes: Vec<(u32, Sha256)> = match session.spec.layout.has_part_hashes() {
            true => self.store.part_hashes(session.id).await?,
            false => Vec::new(),
        };
        let found = match session.spec.layout {
            Layout::Single => self.objects.head(&object_location(&session), None).await?.ok_or(SessionError::ObjectMissing)?,
            Layout::Multipart { part_count, .. } => {
                let found = self.complete_multipart(&session, attempt, part_count, &hashes).await?;
                self.abort_stray_uploads(&session, attempt).await?;
                found
            }
        };
        let found = self.with_bucket_defaults(&session, found).await?;
        let now = self.store.now().await?;
        let hashes: Vec<Sha256> = hashes.into_iter().map(|(_, sha256)| sha256).collect();
        Ok(session.verify(&found, &hashes, now)?)
    }

    /// Learns the headers that the bucket sets on every object, if such a default may explain an undeclared header. The
    /// defaults are unknown before the first check, and may have changed since the last one.
    async fn with_bucket_defaults(&self, session: &Session, found: Object) -> Result<Object, CompletionError> {
        match session.first_undeclared_header(&found) {
            Some((name, _)) if objects::is_bucket_default_header(name) => {
                self.objects.probe_put(&session.bucket, None).await?;
                Ok(self.objects.head(&object_location(session), None).await?.ok_or(SessionError::ObjectMissing)?)
            }
            _ => Ok(found),
        }
    }

    /// Joins the parts to the object, unless that has already happened.
    async fn complete_multipart(
        &self,
        session: &Session,
        attempt: i32,
        part_count: u32,
        hashes: &[(u32, Sha256)],
    ) -> Result<Object, CompletionError> {
        let location = object_location(session);
        let all_missing = || SessionError::PartsIncomplete { missing: (1..=part_count).collect(), parts: part_count };
        // The previous owner of the lease may have joined the parts.
        if attempt > 1
            && let Some(found) = self.objects.head(&location, None).await?
        {
            return Ok(found);
        }
        let Some(upload_id) = session.s3_upload_id.as_deref() else { return Err(all_missing().into()) };
        let Some(listed) = self.objects.list_parts(&location, upload_id).await? else {
            // Another replica has joined the parts, or a lifecycle rule has removed the upload: a HEAD shows which.
            if let Some(found) = self.objects.head(&location, None).await? {
                return Ok(found);
            }
            self.store.clear_s3_upload(session.id, upload_id).await?;
            return Err(all_missing().into());
        };
        let usable = valid_parts(session, listed, hashes);
        let missing: Vec<u32> = missing_part_numbers(part_count, usable.iter().map(|part| part.number)).collect();
        if !missing.is_empty() {
            return Err(SessionError::PartsIncomplete { missing, parts: part_count }.into());
        }
        let with_hashes = session.spec.layout.has_part_hashes();
        let finished =
            self.objects.complete_multipart_upload(&location, upload_id, &usable, with_hashes, session.spec.size_bytes).await;
        // The answer may be lost or misleading, so a HEAD of the object decides.
        match (finished, self.objects.head(&location, None).await?) {
            (Ok(CompleteOutcome::Refused(_)), Some(found)) => {
                self.objects.abort_multipart_uploads(&location, Some(upload_id)).await?;
                Ok(found)
            }
            (_, Some(found)) => Ok(found),
            (Ok(CompleteOutcome::Refused(why)), None) => {
                let id = session.id;
                warn!(session.id = %id, why, "S3 refused to join the parts of upload {id}: {why}; all parts count as missing");
                Err(all_missing().into())
            }
            (Ok(_), None) => Err(objects::Error::Unavailable("S3 does not show the joined object yet".to_owned()).into()),
            (Err(error), None) => Err(error.into()),
        }
    }

    /// Aborts other multipart uploads of this object: S3's answer to their creation was lost. The sweeper never cleans up
    /// after a successful session. So if S3 does not answer, this attempt fails, and the next one tries again.
    async fn abort_stray_uploads(&self, session: &Session, attempt: i32) -> Result<(), objects::Error> {
        let id = session.id;
        let aborted =
            tokio::time::timeout(ABORT_STRAY_TIMEOUT, self.objects.abort_multipart_uploads(&object_location(session), None))
                .await;
        let seconds = ABORT_STRAY_TIMEOUT.as_secs();
        let timed_out = || objects::Error::Unavailable(format!("S3 did not list multipart uploads within {seconds} s"));
        match aborted.unwrap_or_else(|_| Err(timed_out())) {
            Ok(0) => Ok(()),
            Ok(uploads) => {
                info!(session.id = %id, uploads, "aborted {uploads} stray multipart uploads of upload {id}");
                Ok(())
            }
            Err(error @ objects::Error::Unavailable(_)) if attempt < ABORT_STRAY_MAX_ATTEMPTS => Err(error),
            Err(error) => {
                warn!(
                    session.id = %id, %error,
                    "looking for stray multipart uploads of upload {id} failed: {error}; `lfs-broker audit` finds them"
                );
                Ok(())
            }
        }
    }

    /// Streams the object through the hasher, one chunk at a time, and reads the version that the HEAD named.
    async fn read_back(&self, session: Session) -> Result<Session, CompletionError> {
        let location = object_location(&session);
        let found = self.objects.head(&location, None).await?.ok_or(SessionError::ObjectMissing)?;
        let found = self.with_bucket_defaults(&session, found).await?;
        let mut hasher = session.spec.algorithm.hasher();
        let mut read_bytes = 0u64;
        let mut stream = self.objects.read(&location, found.etag.as_deref(), found.version_id.as_deref()).await?;
        while let Some(chunk) = stream.next().await? {
            read_bytes += chunk.len() as u64;
            hasher.update(&chunk);
        }
        let now = self.store.now().await?;
        Ok(session.verify_read_back(&found, &hasher.finish(), read_bytes, now)?)
    }

    /// Reopens the session if the client can still fix the cause, else rejects it.
    async fn save_session_error(&self, session: Session, cause: &SessionError, by: &str) {
        let id = session.id;
        let next = match cause {
            SessionError::ObjectMissing | SessionError::PartsIncomplete { .. } | SessionError::StorageRefused { .. } => {
                session.reopen(cause)
            }
            _ => session.reject(cause),
        };
        match next {
            Ok(next) => self.save_outcome(next, by).await,
            Err(error) => {
                warn!(session.id = %id, %error, "saving the failure of upload {id} failed: {error}; its lease will expire")
            }
        }
    }

    /// Saves an outcome. If the answer to COMMIT is lost, the next reader of the row sees whether it was saved.
    async fn save_outcome(&self, next: Session, by: &str) {
        let id = next.id;
        let (reason, wake) = match &next.state {
            State::Verified(verification) => {
                (format!("verified with integrity {}", verification.integrity.name()), Some(&self.notifier.relay))
            }
            State::Completing { .. } => {
                ("the broker must read the bytes to verify them".to_owned(), Some(&self.notifier.verifier))
            }
            State::Rejected(failure) => (failure.detail.clone(), Some(&self.notifier.sweeper)),
            State::Expired => ("the upload was not verified before its latest expiry".to_owned(), Some(&self.notifier.sweeper)),
            _ => (next.last_failure.as_ref().map(|failure| failure.detail.clone()).unwrap_or_default(), None),
        };
        let saved = self.retry_until_lease_ends(|| async {
            let now = self.store.now().await?;
            self.store.save(&Transition { from: UploadState::Completing, to: &next, reason: &reason, by, now }, self.shards).await
        });
        match saved.await {
            Ok(saved) => {
                let state = saved.state.name();
                info!(session.id = %id, state = %state, reason, "completion moved upload {id} to {state}: {reason}");
            }
            // This replica may have saved it itself, if the answer to the first attempt was lost.
            Err(store::Error::VersionConflict(_)) => {
                info!(session.id = %id, "upload {id} was changed meanwhile: its outcome is not saved again");
            }
            Err(error) => {
                warn!(session.id = %id, %error, "saving the outcome of upload {id} failed: {error}; its lease will expire")
            }
        }
        if let Some(wake) = wake {
            wake.notify_one();
        }
    }

    /// Releases the lease and stores the failure. A client that retries takes over at once, the verifier after a pause. A
    /// session past its latest expiry is expired instead, because no attempt could complete it.
    async fn release_lease(&self, session: Session, attempt: i32, dependency: &str, by: &str) {
        let id = session.id;
        let code = no_answer_code(session.spec.layout);
        let detail = match session.spec.layout {
            Layout::Single => format!("{dependency} did not answer"),
            Layout::Multipart { .. } => format!("{dependency} did not confirm that the parts were joined"),
        };
        if let Ok(now) = self.store.now().await
            && let Some(expired) = session.expire_completing(now)
        {
            return self.save_outcome(expired, by).await;
        }
        let wait = retry_wait(attempt);
        let released = self.retry_until_lease_ends(|| async {
            let now = self.store.now().await?;
            self.store.release_lease(id, self.owner, attempt, (code, &detail), now, now + wait).await
        });
        if let Err(error) = released.await {
            warn!(session.id = %id, %error, "releasing the lease on upload {id} failed: {error}; it will expire");
        }
    }
}

/// How long the verifier waits before it retries a completion that a dependency did not answer: 1 to 32 s.
fn retry_wait(attempt: i32) -> Duration {
    Duration::from_secs(1 << attempt.clamp(0, 5))
}

/// The error code of a completion that a dependency did not answer.
fn no_answer_code(layout: Layout) -> &'static str {
    match layout {
        Layout::Single => "dependency-unavailable",
        Layout::Multipart { .. } => "completion-unknown",
    }
}

/// Expires an overdue session. `false`: it is not overdue, or another writer changed it first.
pub(crate) async fn expire_session(
    store: &Store,
    session: Session,
    now: OffsetDateTime,
    shards: i32,
) -> Result<bool, store::Error> {
    let Some(expired) = session.expire(now) else { return Ok(false) };
    let transition = Transition {
        from: UploadState::Open,
        to: &expired,
        reason: "the upload was not completed before its expiry",
        by: "sweeper",
        now,
    };
    match store.save(&transition, shards).await {
        Ok(_) => Ok(true),
        Err(store::Error::VersionConflict(_)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Rechecks the object of a verified upload ([`Session::recheck`]). The part hashes are loaded only if the object's ETag
/// has changed.
pub(crate) async fn still_verified(
    store: &Store,
    session: &Session,
    verification: &Verification,
    found: &Object,
) -> Result<Result<Integrity, SessionError>, store::Error> {
    let parts = match session.spec.layout.has_part_hashes() && verification.etag != found.etag {
        true => store.part_hashes(session.id).await?.into_iter().map(|(_, sha256)| sha256).collect(),
        false => Vec::new(),
    };
    Ok(session.recheck(verification, found, &parts))
}
