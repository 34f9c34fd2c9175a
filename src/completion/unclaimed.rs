//! Verifies a single PUT without a claim.

use std::time::Duration;

use tracing::info;

use super::CompletionWorker;
use crate::failpoint;
use crate::objects::ObjectLocation;
use crate::session::{Layout, Session, State};
use crate::store::{self, VerifiedPut};

/// How long the HEAD may take. A store that takes longer is asked again under a claim, which other requests and replicas see.
const HEAD_TIMEOUT: Duration = Duration::from_millis(250);

impl CompletionWorker {
    /// Verifies the object of an open single PUT, and saves the session as verified. `None`: the object is not as declared,
    /// must be read, or S3 did not answer in time, so the session is claimed: only a claim ends or reopens it.
    pub(super) async fn verify_unclaimed(&self, session: &Session, by: &str) -> Option<Result<Session, store::Error>> {
        if session.state != State::Open || session.spec.layout != Layout::Single {
            return None;
        }
        let claimed_at = self.store.now().await.ok()?;
        let location = ObjectLocation::of(session);
        let found = tokio::time::timeout(HEAD_TIMEOUT, self.objects.head(&location, None)).await.ok()?.ok()??;
        let now = self.store.now().await.ok()?;
        let claimed = session.clone().claim(self.owner, claimed_at, claimed_at).ok()?;
        let session = claimed.verify(&found, &[], now).ok()?;
        let State::Verified(verification) = &session.state else { return None };
        let reason = format!("verified with integrity {}", verification.integrity.name());
        if let Err(failed) = failpoint::reach("complete.checked").await {
            return Some(Err(failed.into()));
        }
        let (id, shard) = (session.id, self.store.deployment().await.map(|deployment| deployment.shard_of(&session)));
        let saved =
            self.store.save_verified(VerifiedPut { session, claimed_at, by: by.to_owned(), reason: reason.clone() }).await;
        if saved.is_ok() {
            info!(session.id = %id, reason, "completion moved upload {id} to verified");
        }
        // Also after an error: the response to the commit may be lost.
        if let Ok(shard) = shard {
            self.notifier.pointer_queued(shard);
        }
        Some(saved)
    }
}
