//! Saves the outcome of a completion: verified, to be read back, open again, or rejected.

use lfs_broker_client::api::UploadState;
use tracing::{info, warn};

use super::CompletionWorker;
use crate::session::{Session, SessionError, State};
use crate::store::{self, Transition};

impl CompletionWorker {
    /// Reopens the session if the client can still fix the cause, else rejects it.
    pub(super) async fn save_session_error(&self, session: Session, cause: &SessionError, by: &str) {
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

    /// Saves an outcome. If the response to COMMIT is lost, the next reader of the row sees whether the outcome was saved.
    pub(super) async fn save_outcome(&self, next: Session, by: &str) {
        let id = next.id;
        let (reason, wake) = match &next.state {
            State::Verified(verification) => (format!("verified with integrity {}", verification.integrity.name()), None),
            State::Completing { .. } => {
                ("the broker must read the bytes to verify them".to_owned(), Some(&self.notifier.verifier))
            }
            State::Rejected(failure) => (failure.detail.clone(), Some(&self.notifier.sweeper)),
            State::Expired => ("the upload was not verified before its latest expiry".to_owned(), Some(&self.notifier.sweeper)),
            _ => (next.last_failure.as_ref().map(|failure| failure.detail.clone()).unwrap_or_default(), None),
        };
        let saved = self.retry_until_lease_ends(|| async {
            let now = self.store.now().await?;
            self.store.save(&Transition { from: UploadState::Completing, to: &next, reason: &reason, by, now }).await
        });
        match saved.await {
            Ok(saved) => {
                let state = saved.state.name();
                info!(session.id = %id, reason, "completion moved upload {id} to {state}");
            }
            // This replica may have saved the outcome itself, if the response to the first attempt was lost.
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
        if let (State::Verified(_), Ok(deployment)) = (&next.state, self.store.deployment().await) {
            self.notifier.pointer_queued(deployment.shard_of(&next));
        }
    }
}
