//! PostgreSQL against S3: a HEAD for the object of each verified session, and lists of the buckets.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use uuid::Uuid;

use super::report::{FindingKind, NewFinding, ReportBuilder};
use super::{Error, Run, S3_CONCURRENCY, parse_object_key};
use crate::completion::still_verified;
use crate::objects::{ListedObject, ObjectLocation, OpenMultipartUpload, UploadMarker};
use crate::policy;
use crate::session::{Layout, Session, State};
use crate::store::{self, ObjectOwner};

/// No policy allows a longer session, so no multipart upload of a session lasts longer either.
const MAX_SESSION_LIFETIME: Duration = Duration::from_secs(policy::MAX_LIFETIME_SECONDS);

impl Run<'_> {
    /// Checks every session: its row, its verified object, and its open multipart uploads. Returns the sessions' buckets.
    pub(super) async fn check_sessions(&self, report: &mut ReportBuilder) -> Result<BTreeSet<String>, Error> {
        let mut after = Uuid::nil();
        let mut buckets = BTreeSet::new();
        loop {
            let page = self.store.scan(after, store::PAGE_SIZE).await?;
            let Some(last) = page.last() else { return Ok(buckets) };
            after = last.id;
            report.sessions += page.len() as u64;
            let mut checks = Vec::with_capacity(page.len());
            for scanned in page {
                match scanned.session {
                    Ok(session) => {
                        buckets.insert(session.bucket.clone());
                        checks.push(self.check_session(session, scanned.cleanup_due));
                    }
                    Err(error @ store::Error::Corrupt { .. }) => {
                        let (kind, bytes) = (FindingKind::Corrupt, scanned.size_bytes.unsigned_abs());
                        report.add(NewFinding { kind, bytes, fixed: false, example: error.to_string() });
                    }
                    Err(error) => return Err(error.into()),
                }
            }
            let found: Vec<Vec<NewFinding>> = stream::iter(checks).buffer_unordered(S3_CONCURRENCY).try_collect().await?;
            found.into_iter().flatten().for_each(|finding| report.add(finding));
        }
    }

    async fn check_session(&self, session: Session, cleanup_due: bool) -> Result<Vec<NewFinding>, Error> {
        let mut findings = Vec::new();
        if let Some(verification) = session.state.verification() {
            let problem = match self.objects.head(&ObjectLocation::of(&session), verification.version_id.as_deref()).await? {
                None => Some((FindingKind::ObjectMissing, "S3 does not hold it".to_owned())),
                Some(found) => match still_verified(&self.store, &session, verification, &found).await? {
                    Ok(integrity) if integrity == verification.integrity => None,
                    Ok(integrity) => {
                        let (now, before) = (integrity.name(), verification.integrity.name());
                        let reason = format!("it was written again, and only level {now} is verified instead of {before}");
                        Some((FindingKind::ObjectMismatch, reason))
                    }
                    Err(error) => Some((FindingKind::ObjectMismatch, error.to_string())),
                },
            };
            findings.extend(problem.map(|(kind, reason)| {
                let example = format!("upload {}, object {}: {reason}", session.id, ObjectLocation::of(&session));
                NewFinding { kind, bytes: session.spec.size_bytes, fixed: false, example }
            }));
        }
        let is_active = matches!(session.state, State::Open | State::Completing { .. });
        if is_active || cleanup_due || session.spec.layout == Layout::Single {
            return Ok(findings);
        }
        for upload in self.objects.multipart_uploads_of_key(&ObjectLocation::of(&session)).await? {
            let location = ObjectLocation::of(&session);
            findings.push(self.open_multipart_finding(&location, &upload, FindingKind::UploadOrphan, true).await?);
        }
        Ok(findings)
    }

    /// The finding of a multipart upload that no client will complete. With `fix` the upload is aborted if `may_abort`.
    async fn open_multipart_finding(
        &self,
        location: &ObjectLocation,
        upload: &OpenMultipartUpload,
        kind: FindingKind,
        may_abort: bool,
    ) -> Result<NewFinding, Error> {
        let parts = self.objects.list_parts(location, &upload.s3_upload_id).await?.unwrap_or_default();
        let bytes = parts.iter().map(|part| part.size_bytes).sum();
        let fixed = self.fix && may_abort;
        if fixed {
            self.objects.abort_multipart_upload(location, &upload.s3_upload_id).await?;
        }
        Ok(NewFinding { kind, bytes, fixed, example: format!("{location}, multipart upload {}", upload.s3_upload_id) })
    }

    /// Lists the objects and multipart uploads under every prefix that may contain objects of uploads.
    pub(super) async fn check_buckets(&self, report: &mut ReportBuilder) -> Result<(), Error> {
        for (bucket, prefixes) in &self.prefixes_by_bucket {
            for prefix in prefixes {
                self.check_objects(bucket, prefix, report).await?;
                self.check_multipart_uploads(bucket, prefix, report).await?;
            }
        }
        Ok(())
    }

    async fn check_objects(&self, bucket: &str, prefix: &str, report: &mut ReportBuilder) -> Result<(), Error> {
        let mut next = None;
        loop {
            let page = self.objects.list(bucket, prefix, next).await?;
            report.objects += page.items.len() as u64;
            let ours: Vec<ListedObject> =
                page.items.into_iter().filter(|object| parse_object_key(&object.key).is_some()).collect();
            let owners = self.owners(bucket, ours.iter().map(|object| object.key.clone()).collect()).await?;
            let orphans = ours.into_iter().filter_map(|object| match owners.get(&object.key) {
                Some(owner) if !is_failed(&owner.state) || owner.cleanup_due => None,
                owner => Some(self.orphan_finding(bucket, object, owner.cloned())),
            });
            let found: Vec<Option<NewFinding>> =
                stream::iter(orphans.collect::<Vec<_>>()).buffer_unordered(S3_CONCURRENCY).try_collect().await?;
            found.into_iter().flatten().for_each(|finding| report.add(finding));
            next = page.next;
            if next.is_none() {
                return Ok(());
            }
        }
    }

    /// The finding of an object without a live session. `None` if the object no longer exists, because the sweeper may
    /// have removed it after the list.
    async fn orphan_finding(
        &self,
        bucket: &str,
        object: ListedObject,
        owner: Option<ObjectOwner>,
    ) -> Result<Option<NewFinding>, Error> {
        let location = ObjectLocation { bucket: bucket.to_owned(), key: object.key };
        let Some(found) = self.objects.head(&location, None).await? else { return Ok(None) };
        let bytes = found.size_bytes;
        match owner {
            Some(owner) => {
                if self.fix {
                    self.store.schedule_cleanup(owner.id, Some(self.started_at)).await?;
                }
                let example = format!("{location}, upload {} is {}", owner.id, owner.state);
                Ok(Some(NewFinding { kind: FindingKind::ObjectOrphan, bytes, fixed: self.fix, example }))
            }
            // An object without the write token of its key was not written through a URL of the broker.
            None => {
                let is_ours = parse_object_key(&location.key).is_some_and(|(_, _, id)| found.token == Some(id.to_string()));
                let kind = FindingKind::ObjectUnknown;
                Ok(is_ours.then(|| NewFinding { kind, bytes, fixed: false, example: location.to_string() }))
            }
        }
    }

    /// Reports multipart uploads without a session. [`Self::check_sessions`] finds those of sessions by their keys.
    async fn check_multipart_uploads(&self, bucket: &str, prefix: &str, report: &mut ReportBuilder) -> Result<(), Error> {
        let mut marker = UploadMarker::default();
        loop {
            let page = self.objects.list_multipart_uploads(bucket, prefix, marker).await?;
            let ours: Vec<OpenMultipartUpload> =
                page.items.into_iter().filter(|upload| parse_object_key(&upload.key).is_some()).collect();
            let owners = self.owners(bucket, ours.iter().map(|upload| upload.key.clone()).collect()).await?;
            for upload in ours.iter().filter(|upload| !owners.contains_key(&upload.key)) {
                let location = ObjectLocation { bucket: bucket.to_owned(), key: upload.key.clone() };
                let is_old = upload.initiated_at.is_some_and(|at| at < self.started_at - MAX_SESSION_LIFETIME);
                report.add(self.open_multipart_finding(&location, upload, FindingKind::UploadUnknown, is_old).await?);
            }
            match page.next {
                Some(next) => marker = next,
                None => return Ok(()),
            }
        }
    }

    async fn owners(&self, bucket: &str, object_keys: Vec<String>) -> Result<HashMap<String, ObjectOwner>, Error> {
        if object_keys.is_empty() {
            return Ok(HashMap::new());
        }
        let owners = self.store.object_owners(bucket, &object_keys).await?;
        Ok(owners.into_iter().map(|owner| (owner.object_key.clone(), owner)).collect())
    }
}

pub(super) fn is_failed(state: &str) -> bool {
    matches!(state, "aborted" | "expired" | "rejected")
}
