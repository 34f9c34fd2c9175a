//! The object of a session in S3: joins its parts, and checks the object or reads it back.

use std::time::Duration;

use lfs_broker_client::checksum::Sha256;
use tracing::{info, warn};

use super::CompletionWorker;
use super::parts::{missing_part_numbers, valid_parts};
use crate::objects::{self, CompleteOutcome, ObjectLocation};
use crate::session::{Layout, Object, Session, SessionError};
use crate::store;

/// The time limit for removing stray multipart uploads: a slow store must not delay the completion.
const ABORT_STRAY_TIMEOUT: Duration = Duration::from_secs(2);
/// After this many attempts, a store that does not list multipart uploads no longer blocks the completion. `audit` finds
/// the stray uploads later.
const ABORT_STRAY_MAX_ATTEMPTS: i32 = 5;

/// Why a completion failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum CompletionError {
    #[error("{0}")]
    Session(#[from] SessionError),
    #[error("{0}")]
    Objects(#[from] objects::Error),
    #[error("{0}")]
    Store(#[from] store::Error),
}

impl CompletionWorker {
    /// Checks the object with a HEAD, after joining its parts. For a single PUT, `found` is the answer to that HEAD if it was
    /// sent before the claim.
    pub(super) async fn check_object(
        &self,
        session: Session,
        attempt: i32,
        found: Option<Result<Option<Object>, objects::Error>>,
    ) -> Result<Session, CompletionError> {
        let hashes: Vec<(u32, Sha256)> = match session.spec.layout.has_part_hashes() {
            true => self.store.part_hashes(session.id).await?,
            false => Vec::new(),
        };
        let found = match session.spec.layout {
            Layout::Single => {
                let found = match found {
                    Some(found) => found,
                    None => self.objects.head(&ObjectLocation::of(&session), None).await,
                };
                found?.ok_or(SessionError::ObjectMissing)?
            }
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
                Ok(self.objects.head(&ObjectLocation::of(session), None).await?.ok_or(SessionError::ObjectMissing)?)
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
        let location = ObjectLocation::of(session);
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
        // The response may be lost or misleading, so a HEAD of the object decides.
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

    /// Aborts other multipart uploads of this object: S3's response to their creation was lost. The sweeper never cleans up
    /// after a successful session. So if S3 does not answer, this attempt fails, and the next attempt lists them again.
    async fn abort_stray_uploads(&self, session: &Session, attempt: i32) -> Result<(), objects::Error> {
        let id = session.id;
        let aborted =
            tokio::time::timeout(ABORT_STRAY_TIMEOUT, self.objects.abort_multipart_uploads(&ObjectLocation::of(session), None))
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
    pub(super) async fn read_back(&self, session: Session) -> Result<Session, CompletionError> {
        let location = ObjectLocation::of(&session);
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
}
