//! What is done to a session under a lease: finish the object in S3, look at it, and write the outcome; and how a
//! session ends whose time is over.
//!
//! The broker does it when a client completes, the verifier when bytes must be read or a lease ran out. Any of it
//! may be done twice: a takeover looks before it touches, and the outcome is written under the version that was read.

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
use crate::objects::{self, Finish, Objects, Place};
use crate::session::{Layout, Object, Proof, Refusal, Session, State};
use crate::store::{self, Move, Store};
use crate::wakes::Wakes;
use parts::sound_parts;
pub(crate) use parts::{missing, present};

/// What is left over in S3 is removed if it can be removed at once.
const TIDY_WITHIN: Duration = Duration::from_secs(2);
/// After so many leases a store that will not list keeps nobody from completing; `audit` finds what is left.
const TIDY_ATTEMPTS: i32 = 5;
/// The longest pause between two tries to write an outcome down.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// How long a lease lasts that nobody renews.
#[derive(Debug, Clone)]
pub struct Settings {
    /// `LFS_BROKER_LEASE_SECONDS`: renewed every third of it.
    pub lease: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self { lease: Duration::from_secs(30) }
    }
}

/// Whoever holds leases: one a replica.
#[derive(Clone)]
pub(crate) struct Finisher {
    pub(crate) store: Store,
    pub(crate) objects: Objects,
    pub(crate) wakes: Arc<Wakes>,
    pub(crate) settings: Settings,
    pub(crate) shards: i32,
    /// This replica.
    pub(crate) owner: Uuid,
    pub(crate) tasks: Tasks,
}

/// The work under way in this replica.
#[derive(Clone, Default)]
pub(crate) struct Tasks(Arc<Mutex<JoinSet<()>>>);

impl Tasks {
    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut tasks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // A set keeps what has ended until somebody looks.
        while tasks.try_join_next().is_some() {}
        tasks.spawn(task);
    }

    /// Waits until all of it has ended; what begins meanwhile is not waited for.
    pub(crate) async fn ended(&self) {
        let mut tasks = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        while tasks.join_next().await.is_some() {}
    }

    /// Drops all of it where it stands.
    pub(crate) fn abort(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).abort_all();
    }
}

/// What came of a claim.
enum Claimed {
    Ours(Box<Session>),
    Refused(Refusal),
    /// The session as it is if the claim was stored.
    Unknown(Box<Session>, store::Error),
    Failed(store::Error),
}

/// Why an examination ended without a verdict on the bytes, or with a bad one.
enum Stop {
    Refused(Refusal),
    Objects(objects::Error),
    Store(store::Error),
}

impl From<Refusal> for Stop {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl From<objects::Error> for Stop {
    fn from(error: objects::Error) -> Self {
        Self::Objects(error)
    }
}

impl From<store::Error> for Stop {
    fn from(error: store::Error) -> Self {
        Self::Store(error)
    }
}

/// Where a session's object is.
pub(crate) fn place(session: &Session) -> Place {
    Place { bucket: session.bucket.clone(), key: session.object_key.clone() }
}

impl Finisher {
    /// Takes a session and does all that is to be done, as a task of its own: whoever asked may go away. Answers as
    /// soon as the session is taken. `by` is who wants it, `until` is kept as long as the work lasts.
    pub(crate) async fn begin(
        &self,
        session: Session,
        by: &str,
        until: impl Send + 'static,
    ) -> Result<Result<(), Refusal>, store::Error> {
        let (told, taken) = oneshot::channel();
        let (finisher, by) = (self.clone(), by.to_owned());
        self.tasks.spawn(async move {
            // Nobody listening is no reason to stop: what is taken must be worked on.
            match finisher.claim(session, &by).await {
                Claimed::Ours(session) => {
                    let _ = told.send(Ok(Ok(())));
                    finisher.run(*session).await;
                }
                Claimed::Refused(refusal) => drop(told.send(Ok(Err(refusal)))),
                Claimed::Unknown(session, error) => {
                    let _ = told.send(Err(error));
                    finisher.look_again(*session).await;
                }
                Claimed::Failed(error) => drop(told.send(Err(error))),
            }
            drop(until);
        });
        taken.await.unwrap_or(Err(store::Error::Ending))
    }

    async fn claim(&self, session: Session, by: &str) -> Claimed {
        let now = match self.store.now().await {
            Ok(now) => now,
            Err(error) => return Claimed::Failed(error),
        };
        let from = session.state.name();
        let claimed = match session.claim(self.owner, now, now + self.settings.lease) {
            Ok(claimed) => claimed,
            Err(refusal) => return Claimed::Refused(refusal),
        };
        let reason = if from == UploadState::Open { "complete was asked for" } else { "the lease had run out" };
        match self.store.save(&Move { from, to: &claimed, reason, by, now }, self.shards).await {
            Ok(saved) => Claimed::Ours(Box::new(saved)),
            Err(error @ store::Error::Database(_)) => Claimed::Unknown(Box::new(claimed), error),
            Err(error) => Claimed::Failed(error),
        }
    }

    /// The answer to a claim was lost, perhaps not the claim: if the session turns out to be ours, it is worked on.
    async fn look_again(&self, claimed: Session) {
        match self.insist(|| self.store.session(claimed.id)).await {
            Ok(Some(session)) if session.state == claimed.state => self.run(session).await,
            Ok(_) => {}
            Err(error) => warn!(session.id = %claimed.id, %error, "could not find out whether {} was taken", claimed.id),
        }
    }

    /// Tries again while the database does not answer, for as long as a lease lasts.
    async fn insist<T, F>(&self, attempt: impl Fn() -> F) -> Result<T, store::Error>
    where
        F: Future<Output = Result<T, store::Error>>,
    {
        let deadline = Instant::now() + self.settings.lease;
        let mut pause = Duration::from_millis(100);
        loop {
            match attempt().await {
                Err(store::Error::Database(_) | store::Error::Busy) if Instant::now() + pause < deadline => {
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
                ended => return ended,
            }
        }
    }

    /// Does all that is to be done under a lease just taken, and keeps the lease meanwhile.
    async fn run(&self, session: Session) {
        let State::Completing { lease, must_read } = session.state.clone() else { return };
        let id = session.id;
        let by = if must_read { "verifier" } else { "broker" };
        let verdict = async {
            match must_read {
                true => self.read(session.clone()).await,
                false => self.examine(session.clone(), lease.attempt).await,
            }
        };
        let verdict = tokio::select! {
            verdict = verdict => verdict,
            () = self.keep_lease(id, lease.attempt) => return warn!(session.id = %id, "lost the lease on {id}"),
        };
        let verdict = match failpoint::reach("complete.proved").await {
            Ok(()) => verdict,
            Err(struck) => Err(Stop::Store(struck.into())),
        };
        match verdict {
            Ok(next) => self.write(next, by).await,
            Err(Stop::Refused(refusal)) => self.refuse(session, &refusal, by).await,
            // Asking again would be refused again: the client may abort it, complete it later, or let it expire.
            Err(Stop::Objects(objects::Error::Refused { code: said, message })) => {
                warn!(session.id = %id, code = %said, message, "S3 refused to complete {id}; it is open again");
                let refusal = Refusal::Storage { code: silence_code(session.promise.layout), said };
                self.refuse(session, &refusal, by).await;
            }
            Err(Stop::Objects(error)) => {
                warn!(session.id = %id, %error, "S3 gave no verdict on {id}");
                self.release(session, lease.attempt, "object storage", by).await;
            }
            Err(Stop::Store(error)) => {
                warn!(session.id = %id, %error, "the database broke off the completion of {id}");
                self.release(session, lease.attempt, "the database", by).await;
            }
        }
        self.wakes.changed(id);
    }

    /// Renews the lease every third of its length; returns when it is lost.
    async fn keep_lease(&self, id: Uuid, attempt: i32) {
        loop {
            tokio::time::sleep(self.settings.lease / 3).await;
            let renewed = async {
                let until = self.store.now().await? + self.settings.lease;
                self.store.renew_lease(id, self.owner, attempt, until).await
            };
            // A database that does not answer decides nothing: the next round asks again.
            if let Ok(false) = renewed.await {
                return;
            }
        }
    }

    async fn examine(&self, session: Session, attempt: i32) -> Result<Session, Stop> {
        let hashes: Vec<(u32, Sha256)> = match session.promise.layout.has_part_hashes() {
            true => self.store.part_hashes(session.id).await?,
            false => Vec::new(),
        };
        let found = match session.promise.layout {
            Layout::Single => self.objects.head(&place(&session), None).await?.ok_or(Refusal::ObjectMissing)?,
            Layout::Multipart { parts, .. } => {
                let found = self.assemble(&session, attempt, parts, &hashes).await?;
                self.tidy(&session, attempt).await?;
                found
            }
        };
        let found = self.with_defaults(&session, found).await?;
        let now = self.store.now().await?;
        let hashes: Vec<Sha256> = hashes.into_iter().map(|(_, sha256)| sha256).collect();
        Ok(session.verify(&found, &hashes, now)?)
    }

    /// Looks what the bucket sets on every object, where that may explain a header that the upload did not declare: it was
    /// never looked at, or has changed since.
    async fn with_defaults(&self, session: &Session, found: Object) -> Result<Object, Stop> {
        match session.undeclared(&found) {
            Some((name, _)) if objects::is_set_by_buckets(name) => {
                self.objects.try_put(&session.bucket, None).await?;
                Ok(self.objects.head(&place(session), None).await?.ok_or(Refusal::ObjectMissing)?)
            }
            _ => Ok(found),
        }
    }

    /// Makes the object of its parts, unless it is made already.
    async fn assemble(&self, session: &Session, attempt: i32, parts: u32, hashes: &[(u32, Sha256)]) -> Result<Object, Stop> {
        let place = place(session);
        let none = || Refusal::PartsIncomplete { missing: (1..=parts).collect(), parts };
        // Whoever held the lease before may have finished it.
        if attempt > 1
            && let Some(found) = self.objects.head(&place, None).await?
        {
            return Ok(found);
        }
        let Some(upload_id) = session.s3_upload_id.as_deref() else { return Err(none().into()) };
        let Some(listed) = self.objects.list_parts(&place, upload_id).await? else {
            // Finished by somebody, or swept away by a rule of the bucket: only S3 can say which.
            if let Some(found) = self.objects.head(&place, None).await? {
                return Ok(found);
            }
            self.store.forget_s3_upload(session.id, upload_id).await?;
            return Err(none().into());
        };
        let usable = sound_parts(session, listed, hashes);
        let missing: Vec<u32> = missing(parts, usable.iter().map(|part| part.number)).collect();
        if !missing.is_empty() {
            return Err(Refusal::PartsIncomplete { missing, parts }.into());
        }
        let with_hashes = session.promise.layout.has_part_hashes();
        let finished = self.objects.finish(&place, upload_id, &usable, with_hashes, session.promise.size_bytes).await;
        // Whatever the answer was, or if there was none: what S3 holds decides.
        match (finished, self.objects.head(&place, None).await?) {
            (Ok(Finish::Refused(_)), Some(found)) => {
                self.objects.abort_uploads(&place, Some(upload_id)).await?;
                Ok(found)
            }
            (_, Some(found)) => Ok(found),
            (Ok(Finish::Refused(why)), None) => {
                warn!(session.id = %session.id, why, "S3 refused the parts of {}", session.id);
                Err(none().into())
            }
            (Ok(_), None) => Err(objects::Error::Unavailable("the finished object is not to be seen yet".to_owned()).into()),
            (Err(error), None) => Err(error.into()),
        }
    }

    /// Removes multipart uploads that were begun for this object besides the one that was finished: S3's answer to
    /// their begin was lost. Nobody sweeps a session that ends well, so where S3 is away this attempt ends here, and
    /// the next one, which finds the object whole, looks again.
    async fn tidy(&self, session: &Session, attempt: i32) -> Result<(), objects::Error> {
        let id = session.id;
        let aborted = tokio::time::timeout(TIDY_WITHIN, self.objects.abort_uploads(&place(session), None)).await;
        let late = || objects::Error::Unavailable(format!("no list of multipart uploads within {} s", TIDY_WITHIN.as_secs()));
        match aborted.unwrap_or_else(|_| Err(late())) {
            Ok(0) => Ok(()),
            Ok(uploads) => {
                info!(session.id = %id, uploads, "removed multipart uploads that {id} did not use");
                Ok(())
            }
            Err(error @ objects::Error::Unavailable(_)) if attempt < TIDY_ATTEMPTS => Err(error),
            Err(error) => {
                warn!(session.id = %id, %error, "could not look for multipart uploads that {id} did not use");
                Ok(())
            }
        }
    }

    /// Streams the object through the hasher: one piece at a time, of the version that was looked at.
    async fn read(&self, session: Session) -> Result<Session, Stop> {
        let place = place(&session);
        let found = self.objects.head(&place, None).await?.ok_or(Refusal::ObjectMissing)?;
        let found = self.with_defaults(&session, found).await?;
        let mut hasher = session.promise.algorithm.hasher();
        let mut read_bytes = 0u64;
        let mut reading = self.objects.read(&place, found.etag.as_deref(), found.version_id.as_deref()).await?;
        while let Some(piece) = reading.next().await? {
            read_bytes += piece.len() as u64;
            hasher.update(&piece);
        }
        let now = self.store.now().await?;
        Ok(session.verify_read(&found, &hasher.finish(), read_bytes, now)?)
    }

    async fn refuse(&self, session: Session, refusal: &Refusal, by: &str) {
        let id = session.id;
        let next = match refusal {
            Refusal::ObjectMissing | Refusal::PartsIncomplete { .. } | Refusal::Storage { .. } => session.reopen(refusal),
            _ => session.reject(refusal),
        };
        match next {
            Ok(next) => self.write(next, by).await,
            Err(error) => warn!(session.id = %id, %error, "could not refuse {id}"),
        }
    }

    /// Writes an outcome; a lost answer to COMMIT is settled by whoever reads the row next.
    async fn write(&self, next: Session, by: &str) {
        let id = next.id;
        let (reason, wake) = match &next.state {
            State::Verified(proof) => (format!("proved to level {}", proof.integrity.name()), Some(&self.wakes.relay)),
            State::Completing { .. } => ("its bytes must be read".to_owned(), Some(&self.wakes.verifier)),
            State::Rejected(trouble) => (trouble.detail.clone(), Some(&self.wakes.sweeper)),
            State::Expired => ("its bytes could not be proved before its last end".to_owned(), Some(&self.wakes.sweeper)),
            _ => (next.trouble.as_ref().map(|trouble| trouble.detail.clone()).unwrap_or_default(), None),
        };
        let saved = self.insist(|| async {
            let now = self.store.now().await?;
            self.store.save(&Move { from: UploadState::Completing, to: &next, reason: &reason, by, now }, self.shards).await
        });
        match saved.await {
            Ok(saved) => info!(session.id = %id, state = %saved.state.name(), reason, "completed a step of {id}"),
            // Perhaps by ourselves, and the answer was lost.
            Err(store::Error::Moved(_)) => info!(session.id = %id, "{id} was moved meanwhile"),
            Err(error) => warn!(session.id = %id, %error, "could not write the outcome of {id}; its lease will run out"),
        }
        if let Some(wake) = wake {
            wake.notify_one();
        }
    }

    /// Gives the lease back with what went wrong. A client who asks again takes over at once, the verifier later. A session
    /// whose last end is over is ended instead: nobody could go on with it.
    async fn release(&self, session: Session, attempt: i32, silent: &str, by: &str) {
        let id = session.id;
        let code = silence_code(session.promise.layout);
        let detail = match session.promise.layout {
            Layout::Single => format!("{silent} did not answer"),
            Layout::Multipart { .. } => format!("{silent} did not say whether the parts were joined"),
        };
        if let Ok(now) = self.store.now().await
            && let Some(expired) = session.give_up(now)
        {
            return self.write(expired, by).await;
        }
        let wait = Duration::from_secs(1 << attempt.clamp(0, 5));
        let released = self.insist(|| async {
            let now = self.store.now().await?;
            self.store.release_lease(id, self.owner, attempt, (code, &detail), now, now + wait).await
        });
        if let Err(error) = released.await {
            warn!(session.id = %id, %error, "could not give back the lease on {id}; it will run out");
        }
    }
}

/// The code for a completion without a verdict.
fn silence_code(layout: Layout) -> &'static str {
    match layout {
        Layout::Single => "dependency-unavailable",
        Layout::Multipart { .. } => "completion-unknown",
    }
}

/// Ends a session whose time is over; `false` when it is not, or when somebody moved it first.
pub(crate) async fn expire(store: &Store, session: Session, now: OffsetDateTime, shards: i32) -> Result<bool, store::Error> {
    let Some(expired) = session.expire(now) else { return Ok(false) };
    let step = Move { from: UploadState::Open, to: &expired, reason: "it was not completed in time", by: "sweeper", now };
    match store.save(&step, shards).await {
        Ok(_) => Ok(true),
        Err(store::Error::Moved(_)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// What is proved today of a promised upload's object ([`Session::holds`]). The part hashes are asked for only where S3
/// has another object than the one that was proved.
pub(crate) async fn still_proved(
    store: &Store,
    session: &Session,
    proof: &Proof,
    found: &Object,
) -> Result<Result<Integrity, Refusal>, store::Error> {
    let parts = match session.promise.layout.has_part_hashes() && proof.etag != found.etag {
        true => store.part_hashes(session.id).await?.into_iter().map(|(_, sha256)| sha256).collect(),
        false => Vec::new(),
    };
    Ok(session.holds(proof, found, &parts))
}
