//! The lease on a session: renewed while the session is completed, and released early if a dependency failed.

use std::time::{Duration, Instant};

use lfs_broker_client::api::ErrorCode;
use tracing::warn;
use uuid::Uuid;

use super::CompletionWorker;
use crate::session::{Layout, Session};
use crate::store;

/// The longest pause between two attempts to save an outcome.
const MAX_RETRY_PAUSE: Duration = Duration::from_secs(2);

impl CompletionWorker {
    /// Retries while the database does not answer, for at most the length of a lease.
    pub(super) async fn retry_until_lease_ends<T, F>(&self, attempt: impl Fn() -> F) -> Result<T, store::Error>
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

    /// Renews the lease after every third of its length; returns when it is lost.
    pub(super) async fn renew_lease_until_lost(&self, id: Uuid, attempt: i32) {
        loop {
            tokio::time::sleep(self.settings.lease / 3).await;
            let renewed = async {
                let until = self.store.now().await? + self.settings.lease;
                self.store.renew_lease(id, self.owner, attempt, until).await
            };
            // If the database does not answer, the lease may still be valid, so the loop retries.
            if let Ok(false) = renewed.await {
                return;
            }
        }
    }

    /// Releases the lease and stores the failure. A client that retries takes over at once, the verifier after a pause. A
    /// session past its latest expiry is expired instead, because no attempt could complete it.
    pub(super) async fn release_lease(
        &self,
        session: Session,
        attempt: i32,
        (dependency, error): (&str, &(dyn std::fmt::Display + Sync)),
        by: &str,
    ) {
        let (id, wait) = (session.id, retry_wait(attempt));
        let seconds = wait.as_secs();
        warn!(
            session.id = %id, %error,
            "{dependency} failed while completing upload {id}: {error}; the verifier retries in {seconds} s"
        );
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
pub(super) fn no_answer_code(layout: Layout) -> ErrorCode {
    match layout {
        Layout::Single => ErrorCode::DependencyUnavailable,
        Layout::Multipart { .. } => ErrorCode::CompletionUnknown,
    }
}
