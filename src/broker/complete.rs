//! Complete or abort an upload.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use lfs_broker_client::api::{CompleteUpload, Completed, UploadState};
use lfs_broker_client::checksum::Digest;
use time::OffsetDateTime;
use uuid::Uuid;

use super::view::{pointer, record};
use super::{Broker, Error, session_error};
use crate::auth::Caller;
use crate::completion::Started;
use crate::session::{Failure, Session, SessionError, State, Verification};
use crate::store::{self, Transition};

/// How much longer complete waits for the verification than for Kafka. So even with a wait of 0 most responses have the state
/// `verified`.
const VERIFICATION_GRACE: Duration = Duration::from_millis(600);
/// Complete answers within its wait and one second, also if a dependency does not respond. The remaining 150 ms are for a
/// busy machine and the network.
const ANSWER_GRACE: Duration = Duration::from_millis(850);
const _: () = assert!(VERIFICATION_GRACE.as_millis() < ANSWER_GRACE.as_millis() && ANSWER_GRACE.as_millis() < 1000);
/// How long a request waits for a free completion permit.
const PERMIT_WAIT: Duration = Duration::from_secs(1);

/// What a complete request has joined.
enum Joined {
    /// A completion is running.
    InProgress,
    /// This request verified the upload.
    Verified(Box<Session>),
    /// Another writer changed the session: it must be read again.
    Changed,
}

impl Broker {
    /// Completes an upload: verifies the object, queues the pointer in the outbox, and waits for Kafka.
    ///
    /// The work runs in its own task, under a lease, so a client that disconnects does not stop it. A repeated request
    /// joins the running completion, or gets the same response.
    pub(crate) async fn complete(
        &self,
        caller: &Caller,
        id: Uuid,
        request: CompleteUpload,
        traceparent: Option<String>,
    ) -> Result<Completed, Error> {
        let deadline = Instant::now() + self.settings.complete_wait;
        let is_in_progress = AtomicBool::new(false);
        let response = self.wait_for_completion(caller, id, &request, traceparent, deadline, &is_in_progress);
        match tokio::time::timeout_at((deadline + ANSWER_GRACE).into(), response).await {
            Ok(response) => response,
            // Only this request ends; the completion task continues.
            Err(_) if is_in_progress.load(Ordering::Relaxed) => Ok(still_completing(id)),
            Err(_) => Err(Error::OutcomeUnknown),
        }
    }

    /// Waits until the completion has a result for the client. Sets `is_in_progress` once a completion is known to run.
    async fn wait_for_completion(
        &self,
        caller: &Caller,
        id: Uuid,
        request: &CompleteUpload,
        traceparent: Option<String>,
        deadline: Instant,
        is_in_progress: &AtomicBool,
    ) -> Result<Completed, Error> {
        let verification_deadline = deadline + VERIFICATION_GRACE;
        let mut changes = self.notifier.subscribe(id);
        let mut joined = false;
        let mut verified_here = None;
        loop {
            let (session, now) = match verified_here.take() {
                Some(session) => (session, self.store.now().await?),
                None => self.current_session(caller, id).await?,
            };
            check_sha256(&session, request)?;
            let is_past_deadline = Instant::now() >= deadline;
            match &session.state {
                State::Open if joined && session.last_failure.is_some() => {
                    return Err(stored_failure(&session, session.last_failure.clone()));
                }
                State::Completing { must_read: false, .. } if joined && session.is_released() => {
                    return Err(stored_failure(&session, session.last_failure.clone()));
                }
                State::Open | State::Completing { must_read: false, .. } => {
                    match self.join_or_start(session.clone(), now, request, traceparent.clone(), verification_deadline).await? {
                        Joined::Verified(session) => {
                            verified_here = Some(*session);
                            continue;
                        }
                        Joined::InProgress => joined = true,
                        Joined::Changed => {}
                    }
                    is_in_progress.store(joined, Ordering::Relaxed);
                    if Instant::now() >= verification_deadline {
                        return if joined { Ok(still_completing(id)) } else { Err(Error::OutcomeUnknown) };
                    }
                }
                State::Completing { must_read: true, .. } if is_past_deadline => return Ok(still_completing(id)),
                State::Completing { must_read: true, .. } => {
                    joined = true;
                    is_in_progress.store(true, Ordering::Relaxed);
                }
                State::Verified(_) if !is_past_deadline => {}
                State::Verified(verification) => return verified(&session, verification),
                State::Published(verification, metadata) => {
                    let record = record(&session, metadata);
                    return Ok(Completed { record, ..verified(&session, verification)? });
                }
                State::Aborted => return Err(session_error(SessionError::Aborted, &session)),
                State::Expired => return Err(session_error(SessionError::Expired(session.expires_at), &session)),
                State::Rejected(failure) => return Err(stored_failure(&session, Some(failure.clone()))),
            }
            changes.wait_for_change(session.version, if is_past_deadline { verification_deadline } else { deadline }).await;
        }
    }

    /// Joins the running completion, or starts one.
    async fn join_or_start(
        &self,
        session: Session,
        now: OffsetDateTime,
        request: &CompleteUpload,
        traceparent: Option<String>,
        verification_deadline: Instant,
    ) -> Result<Joined, Error> {
        let before = session.clone();
        let mut session = match session.state {
            State::Open => session.declare_sha256(request.sha256).map_err(|error| session_error(error, &before))?,
            _ => session,
        };
        session.spec.traceparent = session.spec.traceparent.or(traceparent);
        // A request that only joins a running completion needs no permit.
        if let Err(SessionError::CompletionInProgress) = session.clone().claim(self.completion_worker.owner, now, now) {
            return Ok(Joined::InProgress);
        }
        let permit_by = verification_deadline.min(Instant::now() + PERMIT_WAIT);
        let permits = async {
            // The tenant's permit first: a request that waits for it must not hold a permit of the replica.
            let tenant_permit = self.tenant_permits.acquire(&session.tenant).await;
            let permit = Arc::clone(&self.completion_permits).acquire_owned().await.expect("the semaphore is never closed");
            (tenant_permit, permit)
        };
        let too_many = || Error::TooManyCompletions(self.settings.max_concurrent_completes);
        let permits = tokio::time::timeout_at(permit_by.into(), permits).await.map_err(|_| too_many())?;
        let by = format!("client:{}", session.subject);
        match self.completion_worker.start(session, &by, permits).await {
            Ok(Ok(Started::Verified(session))) => Ok(Joined::Verified(session)),
            Ok(Ok(Started::Claimed) | Err(SessionError::CompletionInProgress)) => Ok(Joined::InProgress),
            Ok(Err(error)) => Err(session_error(error, &before)),
            Err(store::Error::VersionConflict(_)) => Ok(Joined::Changed),
            Err(error) => Err(error.into()),
        }
    }

    /// Aborts an upload. The sweeper removes its data from S3 afterwards.
    pub(crate) async fn abort(&self, caller: &Caller, id: Uuid) -> Result<(), Error> {
        loop {
            let (session, now) = self.current_session(caller, id).await?;
            let from = session.state.name();
            let before = session.clone();
            let Some(aborted) = session.abort().map_err(|error| session_error(error, &before))? else { return Ok(()) };
            let by = format!("client:{}", caller.subject);
            let transition = Transition { from, to: &aborted, reason: "the client requested the abort", by: &by, now };
            match self.store.save(&transition).await {
                Ok(_) => {
                    self.notifier.notify(id);
                    self.notifier.sweeper.notify_one();
                    return Ok(());
                }
                Err(store::Error::VersionConflict(_)) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Checks that a sha256 in the request equals the declared one. The response for a failed upload is its failure, so
/// its sha256 is not checked.
fn check_sha256(session: &Session, request: &CompleteUpload) -> Result<(), Error> {
    let has_failed = matches!(session.state, State::Aborted | State::Expired | State::Rejected(_));
    let declared = session.spec.digest.as_ref().and_then(Digest::sha256).filter(|_| !has_failed);
    match (declared, request.sha256) {
        (Some(declared), Some(requested)) if declared != requested => {
            Err(session_error(SessionError::InvalidSha256("sha256 differs from the declared one"), session))
        }
        _ => Ok(()),
    }
}

fn stored_failure(session: &Session, failure: Option<Failure>) -> Error {
    match failure {
        Some(failure) => Error::Session { failure, state: session.state.name() },
        None => Error::OutcomeUnknown,
    }
}

fn still_completing(id: Uuid) -> Completed {
    Completed { id, state: UploadState::Completing, pointer: None, integrity: None, record: None }
}

fn verified(session: &Session, verification: &Verification) -> Result<Completed, Error> {
    Ok(Completed {
        id: session.id,
        state: session.state.name(),
        pointer: Some(pointer(session, verification)?),
        integrity: Some(verification.integrity),
        record: None,
    })
}
