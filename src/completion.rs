//! Completion under a lease: claims a session, completes and verifies its object in S3, and saves the outcome.
//!
//! The broker runs it when a client completes, the verifier when bytes must be read or a lease has expired. Every step may
//! run twice: a takeover checks S3 before it changes anything, and the outcome is saved only for the version that was read.
//!
//! A single PUT whose object is as declared needs no claim: a HEAD only reads, so two replicas may both look, and the version
//! decides which of them saves (`unclaimed`).
//!
//! This file has the order of the steps. `lease` keeps and releases the lease, `object` talks to S3, `outcome` saves.

mod lease;
mod object;
mod outcome;
mod parts;
mod recheck;
mod tasks;
mod unclaimed;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use tracing::warn;
use uuid::Uuid;

use crate::failpoint;
use crate::notify::ChangeNotifier;
use crate::objects::{self, Objects};
use crate::session::{Object, Session, SessionError, State};
use crate::store::{self, Store, Transition};
use object::CompletionError;
pub(crate) use parts::{missing_part_numbers, uploaded_parts};
pub(crate) use recheck::still_verified;
pub(crate) use tasks::Tasks;
use unclaimed::Unclaimed;

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
    /// The id of this replica, which owns the leases.
    pub(crate) owner: Uuid,
    pub(crate) tasks: Tasks,
}

/// What a started completion has reached.
pub(crate) enum Started {
    /// The session is claimed, and its completion runs.
    Claimed,
    /// The object was verified without a claim, and the session is saved as this one.
    Verified(Box<Session>),
}

/// The outcome of a claim.
enum ClaimOutcome {
    Claimed(Box<Session>),
    Refused(SessionError),
    /// The database did not confirm the claim. The value is the session in the state that it has if the claim was stored.
    Unknown(Box<Session>, store::Error),
    Failed(store::Error),
}

impl CompletionWorker {
    /// Completes a session in its own task, which continues if the caller goes away. Returns once the session is verified or
    /// claimed. `by` goes into the history, and `permit` is held until the task ends.
    pub(crate) async fn start(
        &self,
        session: Session,
        by: &str,
        permit: impl Send + 'static,
    ) -> Result<Result<Started, SessionError>, store::Error> {
        let (sender, receiver) = oneshot::channel();
        let (worker, by) = (self.clone(), by.to_owned());
        self.tasks.spawn(async move {
            let found = match worker.verify_unclaimed(&session, &by).await {
                Unclaimed::Saved(saved) => {
                    let _ = sender.send(saved.map(|session| Ok(Started::Verified(session))));
                    drop(permit);
                    return;
                }
                Unclaimed::Found(found) => Some(found),
                Unclaimed::Unknown => None,
            };
            // A claimed session is completed even if the caller no longer listens.
            match worker.claim(session, &by).await {
                ClaimOutcome::Claimed(session) => {
                    let _ = sender.send(Ok(Ok(Started::Claimed)));
                    worker.process(*session, found).await;
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
        let (from, reason) = (session.state.name(), claim_reason(&session));
        let claimed = match session.claim(self.owner, now, now + self.settings.lease) {
            Ok(claimed) => claimed,
            Err(error) => return ClaimOutcome::Refused(error),
        };
        match self.store.save(&Transition { from, to: &claimed, reason, by, now }).await {
            Ok(saved) => ClaimOutcome::Claimed(Box::new(saved)),
            Err(error @ store::Error::Database(_)) => ClaimOutcome::Unknown(Box::new(claimed), error),
            Err(error) => ClaimOutcome::Failed(error),
        }
    }

    /// The database did not confirm the claim, but may have stored it. If it did, the session is completed.
    async fn recover_claim(&self, claimed: Session) {
        match self.retry_until_lease_ends(|| self.store.session(claimed.id)).await {
            Ok(Some(session)) if session.state == claimed.state => self.process(session, None).await,
            Ok(_) => {}
            Err(error) => {
                let id = claimed.id;
                warn!(session.id = %id, %error, "checking the claim of upload {id} failed: {error}; its lease will expire");
            }
        }
    }

    /// Completes a session that was just claimed, and renews its lease meanwhile. `found` is what a HEAD of the object found
    /// just before the claim.
    async fn process(&self, session: Session, found: Option<Result<Option<Object>, objects::Error>>) {
        let State::Completing { lease, must_read } = session.state.clone() else { return };
        let id = session.id;
        let by = if must_read { "verifier" } else { "broker" };
        let result = async {
            match must_read {
                true => self.read_back(session.clone()).await,
                false => self.check_object(session.clone(), lease.attempt, found).await,
            }
        };
        let result = tokio::select! {
            result = result => result,
            () = self.renew_lease_until_lost(id, lease.attempt) => {
                return warn!(session.id = %id, "lost the lease on upload {id}: stopped completing it; its new owner continues");
            }
        };
        let result = match failpoint::reach("complete.checked").await {
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
                let error = SessionError::StorageRefused { code: lease::no_answer_code(session.spec.layout), s3_code };
                self.save_session_error(session, &error, by).await;
            }
            Err(CompletionError::Objects(error)) => {
                self.release_lease(session, lease.attempt, ("object storage", &error), by).await;
            }
            Err(CompletionError::Store(error)) => {
                self.release_lease(session, lease.attempt, ("the database", &error), by).await;
            }
        }
        self.notifier.notify(id);
    }
}

/// Why a session is claimed, for its history.
fn claim_reason(session: &Session) -> &'static str {
    match &session.state {
        State::Open => "the client requested completion",
        // The check that asked for the bytes ended its own lease at once. Later leases end after the last change of the session.
        State::Completing { lease, must_read: true } if lease.until <= session.updated_at => "the verifier reads the bytes",
        _ => "the previous lease has ended",
    }
}
