//! PostgreSQL against S3: promised objects by a HEAD each, and what lies in the buckets by lists.

use std::collections::{BTreeSet, HashMap};

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use time::Duration;
use uuid::Uuid;

use super::report::{Kind, Tally, Told};
use super::{AT_ONCE, Error, Run, shape};
use crate::finish::{place, still_proved};
use crate::objects::{Behind, Listed, OpenUpload, Place};
use crate::session::{Layout, Session, State};
use crate::store::{self, Owner};

/// No policy lets a session live longer, so neither can a multipart upload that was begun for one.
const LONGEST_SESSION: Duration = Duration::days(7);

impl Run<'_> {
    /// Every session: its row, the object that it promises, and multipart uploads that it left open. Gives their buckets.
    pub(super) async fn walk(&self, tally: &mut Tally) -> Result<BTreeSet<String>, Error> {
        let mut after = Uuid::nil();
        let mut buckets = BTreeSet::new();
        loop {
            let page = self.store.walk(after, store::PAGE).await?;
            let Some(last) = page.last() else { return Ok(buckets) };
            after = last.id;
            tally.sessions += page.len() as u64;
            let mut looks = Vec::with_capacity(page.len());
            for walked in page {
                match walked.session {
                    Ok(session) => {
                        buckets.insert(session.bucket.clone());
                        looks.push(self.look(session, walked.cleanup_due));
                    }
                    Err(error @ store::Error::Corrupt { .. }) => {
                        let bytes = walked.size_bytes.unsigned_abs();
                        tally.tell(Told { kind: Kind::Corrupt, bytes, fixed: false, example: error.to_string() });
                    }
                    Err(error) => return Err(error.into()),
                }
            }
            let told: Vec<Vec<Told>> = stream::iter(looks).buffer_unordered(AT_ONCE).try_collect().await?;
            told.into_iter().flatten().for_each(|told| tally.tell(told));
        }
    }

    async fn look(&self, session: Session, cleanup_due: bool) -> Result<Vec<Told>, Error> {
        let mut told = Vec::new();
        if let Some(proof) = session.state.proof() {
            let wrong = match self.objects.head(&place(&session), proof.version_id.as_deref()).await? {
                None => Some((Kind::ObjectMissing, "is not there".to_owned())),
                Some(found) => match still_proved(&self.store, &session, proof, &found).await? {
                    Ok(integrity) if integrity == proof.integrity => None,
                    Ok(integrity) => {
                        Some((Kind::ObjectMismatch, format!("was written again, and is proved to {} only", integrity.name())))
                    }
                    Err(refusal) => Some((Kind::ObjectMismatch, refusal.to_string())),
                },
            };
            told.extend(wrong.map(|(kind, why)| {
                let example = format!("{} at {}: {why}", session.id, place(&session));
                Told { kind, bytes: session.promise.size_bytes, fixed: false, example }
            }));
        }
        let at_work = matches!(session.state, State::Open | State::Completing { .. });
        if at_work || cleanup_due || session.promise.layout == Layout::Single {
            return Ok(told);
        }
        for upload in self.objects.uploads_of(&place(&session)).await? {
            told.push(self.left_open(&place(&session), &upload, Kind::UploadOrphan, true).await?);
        }
        Ok(told)
    }

    /// A multipart upload that nobody will complete.
    async fn left_open(&self, place: &Place, upload: &OpenUpload, kind: Kind, may_abort: bool) -> Result<Told, Error> {
        let parts = self.objects.list_parts(place, &upload.s3_upload_id).await?.unwrap_or_default();
        let bytes = parts.iter().map(|part| part.size_bytes).sum();
        let fixed = self.fix && may_abort;
        if fixed {
            self.objects.abort_upload(place, &upload.s3_upload_id).await?;
        }
        Ok(Told { kind, bytes, fixed, example: format!("{place}, multipart upload {}", upload.s3_upload_id) })
    }

    /// What lies where objects of ours may be.
    pub(super) async fn lists(&self, tally: &mut Tally) -> Result<(), Error> {
        for (bucket, prefixes) in &self.places {
            for prefix in prefixes {
                self.list_objects(bucket, prefix, tally).await?;
                self.list_uploads(bucket, prefix, tally).await?;
            }
        }
        Ok(())
    }

    async fn list_objects(&self, bucket: &str, prefix: &str, tally: &mut Tally) -> Result<(), Error> {
        let mut next = None;
        loop {
            let page = self.objects.list(bucket, prefix, next).await?;
            tally.objects += page.items.len() as u64;
            let ours: Vec<Listed> = page.items.into_iter().filter(|listed| shape(&listed.key).is_some()).collect();
            let owners = self.owners(bucket, ours.iter().map(|listed| listed.key.clone()).collect()).await?;
            let suspects = ours.into_iter().filter_map(|listed| match owners.get(&listed.key) {
                Some(owner) if !is_failed(&owner.state) || owner.cleanup_due => None,
                owner => Some(self.suspect(bucket, listed, owner.cloned())),
            });
            let told: Vec<Option<Told>> =
                stream::iter(suspects.collect::<Vec<_>>()).buffer_unordered(AT_ONCE).try_collect().await?;
            told.into_iter().flatten().for_each(|told| tally.tell(told));
            next = page.next;
            if next.is_none() {
                return Ok(());
            }
        }
    }

    /// An object that is nobody's, if it is still there: the sweeper may have been on its way.
    async fn suspect(&self, bucket: &str, listed: Listed, owner: Option<Owner>) -> Result<Option<Told>, Error> {
        let place = Place { bucket: bucket.to_owned(), key: listed.key };
        let Some(found) = self.objects.head(&place, None).await? else { return Ok(None) };
        let bytes = found.size_bytes;
        match owner {
            Some(owner) => {
                if self.fix {
                    self.store.set_cleanup(owner.id, Some(self.now)).await?;
                }
                let example = format!("{place}, upload {} is {}", owner.id, owner.state);
                Ok(Some(Told { kind: Kind::ObjectOrphan, bytes, fixed: self.fix, example }))
            }
            // Without the write token of its own key it was not written through our URLs.
            None => {
                let is_ours = shape(&place.key).is_some_and(|(_, _, id)| found.token == Some(id.to_string()));
                Ok(is_ours.then(|| Told { kind: Kind::ObjectUnknown, bytes, fixed: false, example: place.to_string() }))
            }
        }
    }

    /// Multipart uploads of no session; those of sessions are found on the walk, by their keys.
    async fn list_uploads(&self, bucket: &str, prefix: &str, tally: &mut Tally) -> Result<(), Error> {
        let mut behind = Behind::default();
        loop {
            let page = self.objects.list_uploads(bucket, prefix, behind).await?;
            let ours: Vec<OpenUpload> = page.items.into_iter().filter(|upload| shape(&upload.key).is_some()).collect();
            let owners = self.owners(bucket, ours.iter().map(|upload| upload.key.clone()).collect()).await?;
            for upload in ours.iter().filter(|upload| !owners.contains_key(&upload.key)) {
                let place = Place { bucket: bucket.to_owned(), key: upload.key.clone() };
                let is_old = upload.begun_at.is_some_and(|at| at < self.now - LONGEST_SESSION);
                tally.tell(self.left_open(&place, upload, Kind::UploadUnknown, is_old).await?);
            }
            match page.next {
                Some(next) => behind = next,
                None => return Ok(()),
            }
        }
    }

    async fn owners(&self, bucket: &str, object_keys: Vec<String>) -> Result<HashMap<String, Owner>, Error> {
        if object_keys.is_empty() {
            return Ok(HashMap::new());
        }
        let owners = self.store.owners(bucket, &object_keys).await?;
        Ok(owners.into_iter().map(|owner| (owner.object_key.clone(), owner)).collect())
    }
}

pub(super) fn is_failed(state: &str) -> bool {
    matches!(state, "aborted" | "expired" | "rejected")
}
