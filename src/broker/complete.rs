//! Complete an upload, or take it back.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use lfs_broker_client::api::{CompleteUpload, Completed, UploadState};
use lfs_broker_client::checksum::Digest;
use lfs_broker_client::pointer::Pointer;
use time::OffsetDateTime;
use uuid::Uuid;

use super::read::record;
use super::{Broker, Error, refused};
use crate::auth::Caller;
use crate::session::{Proof, Refusal, Session, State, Trouble};
use crate::store::{self, Move};

/// Past the wait for Kafka, S3's verdict is waited for so much longer: with a wait of 0 most uploads are answered `verified`.
const VERDICT_GRACE: Duration = Duration::from_millis(600);
/// A complete is answered within its wait and one second, whatever does not answer the broker. The rest of the second
/// is for a busy machine and the way back.
const ANSWER_GRACE: Duration = Duration::from_millis(850);
/// Where as many uploads are being completed as may be, who asks waits this long for one to end.
const SEAT_WAIT: Duration = Duration::from_secs(1);

impl Broker {
    /// Completes an upload: the object is held against the promise, the pointer promised, and Kafka waited for.
    ///
    /// The work is a task of its own, under a lease: who asks only waits for it, and may go away. Asking again
    /// joins what is under way, or gives the same answer.
    pub(crate) async fn complete(
        &self,
        caller: &Caller,
        id: Uuid,
        request: CompleteUpload,
        traceparent: Option<String>,
    ) -> Result<Completed, Error> {
        let deadline = Instant::now() + self.settings.complete_wait;
        let is_under_way = AtomicBool::new(false);
        let answer = self.completed(caller, id, &request, traceparent, deadline, &is_under_way);
        match tokio::time::timeout_at((deadline + ANSWER_GRACE).into(), answer).await {
            Ok(answer) => answer,
            // Only the answer is given up; the work goes on.
            Err(_) if is_under_way.load(Ordering::Relaxed) => Ok(completing(id)),
            Err(_) => Err(Error::Unknown),
        }
    }

    /// The answer to complete; `is_under_way` is set once a completion is known to be.
    async fn completed(
        &self,
        caller: &Caller,
        id: Uuid,
        request: &CompleteUpload,
        traceparent: Option<String>,
        deadline: Instant,
        is_under_way: &AtomicBool,
    ) -> Result<Completed, Error> {
        let verdict_by = deadline + VERDICT_GRACE;
        let mut changes = self.wakes.listen(id);
        let mut joined = false;
        loop {
            let (session, now) = self.current(caller, id).await?;
            check_sha256(&session, request)?;
            let over = Instant::now() >= deadline;
            match &session.state {
                State::Open if joined && session.trouble.is_some() => return Err(stored(&session, session.trouble.clone())),
                State::Completing { must_read: false, .. } if joined && session.is_released() => {
                    return Err(stored(&session, session.trouble.clone()));
                }
                State::Open | State::Completing { must_read: false, .. } => {
                    joined |= self.begin(session.clone(), now, request, traceparent.clone(), verdict_by).await?;
                    is_under_way.store(joined, Ordering::Relaxed);
                    if Instant::now() >= verdict_by {
                        return if joined { Ok(completing(id)) } else { Err(Error::Unknown) };
                    }
                }
                State::Completing { must_read: true, .. } if over => return Ok(completing(id)),
                State::Completing { must_read: true, .. } => {
                    joined = true;
                    is_under_way.store(true, Ordering::Relaxed);
                }
                State::Verified(_) if !over => {}
                State::Verified(proof) => return proved(&session, proof),
                State::Published(proof, place) => {
                    let record = Some(record(&session, place));
                    return Ok(Completed { record, ..proved(&session, proof)? });
                }
                State::Aborted => return Err(refused(Refusal::Aborted, &session)),
                State::Expired => return Err(refused(Refusal::Expired(session.expires_at), &session)),
                State::Rejected(trouble) => return Err(stored(&session, Some(trouble.clone()))),
            }
            changes.wait(session.version, if over { verdict_by } else { deadline }).await;
        }
    }

    /// Takes the session if it is free, and sets the work off. `true`: a completion is under way, ours or another's.
    async fn begin(
        &self,
        session: Session,
        now: OffsetDateTime,
        request: &CompleteUpload,
        traceparent: Option<String>,
        verdict_by: Instant,
    ) -> Result<bool, Error> {
        let copy = session.clone();
        let mut session = match session.state {
            State::Open => session.promise_sha256(request.sha256).map_err(|refusal| refused(refusal, &copy))?,
            _ => session,
        };
        session.promise.traceparent = session.promise.traceparent.or(traceparent);
        // Whoever only joins what is under way takes no seat.
        if let Err(Refusal::InProgress) = session.clone().claim(self.finisher.owner, now, now) {
            return Ok(true);
        }
        let seat_by = verdict_by.min(Instant::now() + SEAT_WAIT);
        let seats = async {
            // The tenant's own share first: whoever waits for it holds no seat of all.
            let share = self.completing.wait(&session.tenant).await;
            (share, Arc::clone(&self.seats).acquire_owned().await.expect("nobody closes the seats"))
        };
        let seats = tokio::time::timeout_at(seat_by.into(), seats).await.map_err(|_| Error::Full)?;
        let by = format!("client:{}", session.subject);
        match self.finisher.begin(session, &by, seats).await {
            Ok(Ok(())) => Ok(true),
            Ok(Err(Refusal::InProgress)) => Ok(true),
            Ok(Err(refusal)) => Err(refused(refusal, &copy)),
            // Somebody moved it: look again before saying anything.
            Err(store::Error::Moved(_)) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Takes an upload back; what S3 holds of it is removed after.
    pub(crate) async fn abort(&self, caller: &Caller, id: Uuid) -> Result<(), Error> {
        loop {
            let (session, now) = self.current(caller, id).await?;
            let from = session.state.name();
            let copy = session.clone();
            let Some(aborted) = session.abort().map_err(|refusal| refused(refusal, &copy))? else { return Ok(()) };
            let by = format!("client:{}", caller.subject);
            let step = Move { from, to: &aborted, reason: "abort was asked for", by: &by, now };
            match self.store.save(&step, self.deployment.shards).await {
                Ok(_) => {
                    self.wakes.changed(id);
                    self.wakes.sweeper.notify_one();
                    return Ok(());
                }
                Err(store::Error::Moved(_)) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// A sha256 that is brought must be the one that stands. An upload that failed gives its own answer, whatever is brought.
fn check_sha256(session: &Session, request: &CompleteUpload) -> Result<(), Error> {
    let has_failed = matches!(session.state, State::Aborted | State::Expired | State::Rejected(_));
    let standing = session.promise.digest.as_ref().and_then(Digest::sha256).filter(|_| !has_failed);
    match (standing, request.sha256) {
        (Some(standing), Some(brought)) if standing != brought => {
            Err(refused(Refusal::Sha256("sha256 is not the one that was promised"), session))
        }
        _ => Ok(()),
    }
}

fn stored(session: &Session, trouble: Option<Trouble>) -> Error {
    let Some(trouble) = trouble else { return Error::Unknown };
    let items = trouble.items.clone();
    Error::Session { refusal: Refusal::Rejected(Box::new(trouble.into())), state: session.state.name(), items }
}

fn completing(id: Uuid) -> Completed {
    Completed { id, state: UploadState::Completing, pointer: None, integrity: None, record: None }
}

fn proved(session: &Session, proof: &Proof) -> Result<Completed, Error> {
    Ok(Completed {
        id: session.id,
        state: session.state.name(),
        pointer: Some(pointer(session, proof)?),
        integrity: Some(proof.integrity),
        record: None,
    })
}

/// The pointer as it was stored.
pub(super) fn pointer(session: &Session, proof: &Proof) -> Result<Pointer, Error> {
    Pointer::parse(proof.pointer.as_bytes())
        .map_err(|error| Error::Store(store::Error::Corrupt { id: session.id, what: error.to_string() }))
}
