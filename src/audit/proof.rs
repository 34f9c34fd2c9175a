//! Whether a record of a session that is not published may be written down as its publication.
//!
//! Whoever may write to a topic can forge a record with the header of any upload. So a record is believed only where it is
//! the pointer that the session already stored, where the shard's last marker lists it, or where the bytes were read in
//! this run and are what the pointer and the upload's declaration say. Its `lfs-integrity` header alone proves nothing.

use std::sync::PoisonError;

use lfs_broker_client::api::Integrity;
use lfs_broker_client::checksum::{Algorithm, Digest};
use lfs_broker_client::pointer::Pointer;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

use super::records::Log;
use super::{Error, Run};
use crate::finish::{place, still_proved};
use crate::kafka::Seen;
use crate::objects;
use crate::session::{Object, Proof, Session, reachable};
use crate::store::{Found, Standing};

/// Objects of which this run remembers the digests: one whose upload has many forged records is read once.
const MOST_REMEMBERED: usize = 10_000;

/// The digests of an object that was read: its SHA-256, and by the algorithm that the upload declared.
pub(super) type Digests = Vec<Digest>;

/// What was proved, or why nothing was.
type Outcome = Result<Found, String>;

impl Run<'_> {
    /// What a record proves of its session; `Err` says in words why it proves nothing.
    pub(super) async fn prove(&self, log: &Log<'_>, seen: &Seen, standing: &Standing) -> Result<Outcome, Error> {
        let Ok(pointer) = Pointer::parse(&seen.value) else { return Ok(Err("its value is no pointer".to_owned())) };
        let at = OffsetDateTime::from_unix_timestamp_nanos(i128::from(seen.timestamp_ms) * 1_000_000).unwrap_or(self.now);
        let found = Found {
            id: standing.id,
            partition: log.partition,
            offset: seen.offset,
            at,
            verified_at: verified_at(&pointer).unwrap_or(at),
            integrity: Integrity::Size.name().to_owned(),
            etag: None,
            version_id: seen.version_id.clone(),
            pointer: String::from_utf8_lossy(&seen.value).into_owned(),
            sha256: pointer.sha256.map(|sha256| sha256.0.to_vec()),
            may_have_failed: self.is_older,
        };
        if let Some(stored) = &standing.pointer {
            let is_same = stored.as_bytes() == seen.value
                || (self.is_older && is_same_but_older(stored, &pointer) && pointer.to_json().as_bytes() == seen.value);
            // What was proved is stored with the pointer, and stays.
            return Ok(if is_same { Ok(found) } else { Err("its value is not the pointer that was promised".to_owned()) });
        }
        let Some(session) = self.store.session(standing.id).await? else { return Ok(Err("its session is gone".to_owned())) };
        let here = (log.partition, seen.offset);
        let listed = self.listed.get(&session.id);
        if let Some((partition, offset)) = listed.filter(|listed| **listed != here) {
            return Ok(Err(format!("the shard's last marker lists its record in partition {partition} at {offset}")));
        }
        if (&pointer.bucket, &pointer.key, pointer.size) != (&session.bucket, &session.object_key, session.promise.size_bytes) {
            return Ok(Err("its pointer names another object or size".to_owned()));
        }
        let object = self.objects.head(&place(&session), seen.version_id.as_deref()).await?;
        let is_ours =
            |object: &Object| object.size_bytes == session.promise.size_bytes && object.token == Some(session.id.to_string());
        let object = object.filter(is_ours);
        let of_object =
            |found: Found, object: &Object| Found { etag: object.etag.clone(), version_id: object.version_id.clone(), ..found };
        match object {
            // Our own transaction wrote this very record.
            Some(object) if listed.is_some() => Ok(Ok(Found { integrity: said(seen), ..of_object(found, &object) })),
            // It was published, whatever became of its object; but a failed upload without one is better left as it is.
            None if listed.is_some() && !super::bytes::is_failed(&standing.state) => {
                Ok(Ok(Found { integrity: said(seen), ..found }))
            }
            None => Ok(Err("S3 does not hold its object with the declared size and write token".to_owned())),
            Some(object) => {
                let proved = self.read_proves(&session, &pointer, &seen.value, &object).await?;
                Ok(proved.map(|integrity| Found { integrity: integrity.name().to_owned(), ..of_object(found, &object) }))
            }
        }
    }

    /// Reads the object, and says how far its bytes prove the pointer.
    async fn read_proves(
        &self,
        session: &Session,
        pointer: &Pointer,
        value: &[u8],
        object: &Object,
    ) -> Result<Result<Integrity, String>, Error> {
        let promise = &session.promise;
        let digests = match self.digests(session, object).await {
            Ok(digests) => digests,
            Err(objects::Error::Changed(why)) => return Ok(Err(format!("its object changed while it was read: {why}"))),
            Err(error) => return Err(error.into()),
        };
        let none = Digest { algorithm: Algorithm::None, value: Vec::new() };
        let read = digests.iter().find(|digest| digest.algorithm == promise.algorithm).unwrap_or(&none);
        if promise.digest.as_ref().is_some_and(|declared| declared != read) {
            return Ok(Err("the bytes in S3 are not what the upload declared".to_owned()));
        }
        // Exactly what this broker writes: nothing of the value is somebody else's word.
        let written = verified_at(pointer).map(|at| {
            Pointer::new(&session.bucket, &session.object_key, promise.size_bytes, read, &promise.content_type, at).to_json()
        });
        if written.is_none_or(|written| written.as_bytes() != value) {
            return Ok(Err("its pointer is not what the bytes in S3 and the upload's declaration make".to_owned()));
        }
        // Part hashes are proved by S3's own word, as when an upload is completed.
        let proof =
            Proof { verified_at: self.now, integrity: Integrity::Sha256, etag: None, version_id: None, pointer: String::new() };
        let by_s3 = still_proved(&self.store, session, &proof, object).await?.ok();
        let integrity = by_s3.map_or(reachable(promise.algorithm), |by_s3| by_s3.max(reachable(promise.algorithm)));
        match integrity >= promise.min_integrity {
            true => Ok(Ok(integrity)),
            false => {
                let (proved, needed) = (integrity.name(), promise.min_integrity.name());
                Ok(Err(format!("its bytes are proved to level {proved} only, the topic needed {needed}")))
            }
        }
    }

    /// Streams an object through the hashers, one piece at a time, unless this run has read it before.
    async fn digests(&self, session: &Session, object: &Object) -> Result<Digests, objects::Error> {
        let key: (Uuid, Option<String>) = (session.id, object.etag.clone());
        // It is whole after every statement, so a panic elsewhere does not spoil it.
        if let Some(digests) = self.read.lock().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return Ok(digests.clone());
        }
        let mut hashers = vec![Algorithm::Sha256.hasher()];
        if !matches!(session.promise.algorithm, Algorithm::Sha256 | Algorithm::None) {
            hashers.push(session.promise.algorithm.hasher());
        }
        let mut reading = self.objects.read(&place(session), object.etag.as_deref(), object.version_id.as_deref()).await?;
        let mut read_bytes = 0u64;
        while let Some(piece) = reading.next().await? {
            read_bytes += piece.len() as u64;
            hashers.iter_mut().for_each(|hasher| hasher.update(&piece));
        }
        if read_bytes != object.size_bytes {
            return Err(objects::Error::Changed(format!("{read_bytes} of {} bytes came", object.size_bytes)));
        }
        let digests: Digests = hashers.into_iter().map(|hasher| hasher.finish()).collect();
        let mut remembered = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        if remembered.len() >= MOST_REMEMBERED {
            remembered.clear();
        }
        remembered.insert(key, digests.clone());
        Ok(digests)
    }
}

/// When the broker verified the bytes, as its pointer says.
fn verified_at(pointer: &Pointer) -> Option<OffsetDateTime> {
    pointer.created_at.as_deref().and_then(|at| OffsetDateTime::parse(at, &Rfc3339).ok())
}

/// The level in a record's header: to be asked only of a record that our own transaction wrote.
fn said(seen: &Seen) -> String {
    let said = seen.integrity.as_deref();
    let integrity = Integrity::ALL.into_iter().find(|level| Some(level.name()) == said).unwrap_or(Integrity::Size);
    integrity.name().to_owned()
}

/// Whether a record says of an object what was declared of it, at another time: a database that went back to before the
/// proof has the upload verified a second time, with a later time in its pointer.
fn is_same_but_older(promised: &str, found: &Pointer) -> bool {
    Pointer::parse(promised.as_bytes())
        .is_ok_and(|promised| Pointer { created_at: None, ..promised } == Pointer { created_at: None, ..found.clone() })
}
