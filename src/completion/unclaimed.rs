//! Verifies a single PUT without a claim.

use std::time::Duration;

use time::OffsetDateTime;
use tracing::info;

use super::CompletionWorker;
use crate::failpoint;
use crate::objects::{self, ObjectLocation};
use crate::session::{Layout, Object, Session, State};
use crate::store::{self, VerifiedPut};

/// How long the HEAD may take. A store that takes longer is asked again under a claim, which other requests and replicas see.
const HEAD_TIMEOUT: Duration = Duration::from_millis(250);

/// What a HEAD without a claim has led to.
pub(super) enum Unclaimed {
    /// The object is as declared, and this is the result of saving that.
    Saved(Result<Box<Session>, store::Error>),
    /// Only a claim may act on this answer of S3: the object is missing or not as declared, or must be read.
    Found(Result<Option<Object>, objects::Error>),
    /// S3 was not asked, or did not answer in time.
    Unknown,
}

impl CompletionWorker {
    /// Looks at the object of an open single PUT, and saves the session as verified if the object is as declared.
    pub(super) async fn verify_unclaimed(&self, session: &Session, by: &str) -> Unclaimed {
        if session.state != State::Open || session.spec.layout != Layout::Single {
            return Unclaimed::Unknown;
        }
        let Ok(claimed_at) = self.store.now().await else { return Unclaimed::Unknown };
        let location = ObjectLocation::of(session);
        let found = match tokio::time::timeout(HEAD_TIMEOUT, self.objects.head(&location, None)).await {
            Ok(Ok(Some(found))) => found,
            Ok(other) => return Unclaimed::Found(other),
            Err(_) => return Unclaimed::Unknown,
        };
        let Ok(now) = self.store.now().await else { return Unclaimed::Unknown };
        let claimed = session.clone().claim(self.owner, claimed_at, claimed_at);
        match claimed.and_then(|claimed| claimed.verify(&found, &[], now)) {
            Ok(verified) if matches!(verified.state, State::Verified(_)) => {
                Unclaimed::Saved(self.save_unclaimed(verified, claimed_at, by).await.map(Box::new))
            }
            _ => Unclaimed::Found(Ok(Some(found))),
        }
    }

    async fn save_unclaimed(&self, session: Session, claimed_at: OffsetDateTime, by: &str) -> Result<Session, store::Error> {
        failpoint::reach("complete.checked").await?;
        let (id, shard) = (session.id, self.store.deployment().await?.shard_of(&session));
        let integrity = session.state.verification().map_or("none", |verification| verification.integrity.name());
        let reason = format!("verified with integrity {integrity}");
        let saved =
            self.store.save_verified(VerifiedPut { session, claimed_at, by: by.to_owned(), reason: reason.clone() }).await;
        if saved.is_ok() {
            info!(session.id = %id, reason, "completion moved upload {id} to verified");
        }
        // Also after an error: the response to the commit may be lost.
        self.notifier.pointer_queued(shard);
        saved
    }
}
