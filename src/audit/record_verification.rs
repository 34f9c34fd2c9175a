//! Whether the audit may save a record as the publication of a session that is not published.
//!
//! Any producer with write access to a topic can forge a record with the header of any upload. So the audit accepts a
//! record only in three cases: its value is the pointer that the session already stored, the last marker of the shard lists
//! it, or this run has read the bytes and they match the pointer and the declaration of the upload. The header
//! `lfs-integrity` alone proves nothing.

use std::sync::PoisonError;

use lfs_broker_client::api::Integrity;
use lfs_broker_client::checksum::{Algorithm, Digest};
use lfs_broker_client::pointer::Pointer;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

use super::object_checks::is_failed;
use super::record_checks::PartitionLog;
use super::{Error, Run};
use crate::completion::still_verified;
use crate::kafka::ScannedRecord;
use crate::objects::{self, ObjectLocation};
use crate::session::{Object, Session, Verification, max_integrity};
use crate::store::{ObservedRecord, SessionStatus};

/// Objects whose digests a run keeps, so that it reads an object only once, however many forged records name its upload.
const MAX_CACHED_OBJECTS: usize = 10_000;

/// The digests of an object that was read: its SHA-256, and a second one if the upload declared another algorithm.
pub(super) type Digests = Vec<Digest>;

/// The publication that a record proves, or the reason why it proves none.
type Verdict = Result<ObservedRecord, String>;

impl Run<'_> {
    /// Verifies a record of a session that is not published. `Err` is the reason why the record cannot be verified.
    pub(super) async fn verify_record(
        &self,
        log: &PartitionLog<'_>,
        record: &ScannedRecord,
        status: &SessionStatus,
    ) -> Result<Verdict, Error> {
        let Ok(pointer) = Pointer::parse(&record.value) else { return Ok(Err("its value is not a pointer".to_owned())) };
        let timestamp = OffsetDateTime::from_unix_timestamp_nanos(i128::from(record.timestamp_ms) * 1_000_000);
        let at = timestamp.unwrap_or(self.started_at);
        let found = ObservedRecord {
            id: status.id,
            partition: log.partition,
            offset: record.offset,
            at,
            verified_at: verified_at(&pointer).unwrap_or(at),
            integrity: Integrity::Size.name().to_owned(),
            etag: None,
            version_id: record.version_id.clone(),
            pointer: String::from_utf8_lossy(&record.value).into_owned(),
            sha256: pointer.sha256.map(|sha256| sha256.0.to_vec()),
            may_have_failed: self.database_is_older,
        };
        if let Some(stored) = &status.pointer {
            let is_same = stored.as_bytes() == record.value
                || (self.database_is_older
                    && differs_only_in_time(stored, &pointer)
                    && pointer.to_json().as_bytes() == record.value);
            // The session keeps the integrity that is stored beside its pointer.
            return Ok(if is_same { Ok(found) } else { Err("its value is not the stored pointer of the upload".to_owned()) });
        }
        let Some(session) = self.store.session(status.id).await? else {
            return Ok(Err("its session no longer exists".to_owned()));
        };
        let here = (log.partition, record.offset);
        let listed = self.marker_records.get(&session.id);
        if let Some((partition, offset)) = listed.filter(|listed| **listed != here) {
            return Ok(Err(format!("the shard's last marker lists its record in partition {partition} at offset {offset}")));
        }
        if (&pointer.bucket, &pointer.key, pointer.size) != (&session.bucket, &session.object_key, session.spec.size_bytes) {
            return Ok(Err("its pointer names another object or size".to_owned()));
        }
        let object = self.objects.head(&ObjectLocation::of(&session), record.version_id.as_deref()).await?;
        let is_ours =
            |object: &Object| object.size_bytes == session.spec.size_bytes && object.token == Some(session.id.to_string());
        let object = object.filter(is_ours);
        let of_object = |found: ObservedRecord, object: &Object| ObservedRecord {
            etag: object.etag.clone(),
            version_id: object.version_id.clone(),
            ..found
        };
        match object {
            // A transaction of this broker wrote exactly this record.
            Some(object) if listed.is_some() => {
                Ok(Ok(ObservedRecord { integrity: header_integrity(record), ..of_object(found, &object) }))
            }
            // The record is published even if its object is missing. A failed upload without an object stays as it is.
            None if listed.is_some() && !is_failed(&status.state) => {
                Ok(Ok(ObservedRecord { integrity: header_integrity(record), ..found }))
            }
            None => Ok(Err("S3 does not hold its object with the declared size and write token".to_owned())),
            Some(object) => {
                let verified = self.verify_bytes(&session, &pointer, &record.value, &object).await?;
                Ok(verified
                    .map(|integrity| ObservedRecord { integrity: integrity.name().to_owned(), ..of_object(found, &object) }))
            }
        }
    }

    /// Reads the object and returns the integrity level to which its bytes verify the pointer.
    async fn verify_bytes(
        &self,
        session: &Session,
        pointer: &Pointer,
        value: &[u8],
        object: &Object,
    ) -> Result<Result<Integrity, String>, Error> {
        let spec = &session.spec;
        let digests = match self.digests(session, object).await {
            Ok(digests) => digests,
            Err(objects::Error::Changed(reason)) => return Ok(Err(format!("its object changed during the read: {reason}"))),
            Err(error) => return Err(error.into()),
        };
        let none = Digest { algorithm: Algorithm::None, value: Vec::new() };
        let read = digests.iter().find(|digest| digest.algorithm == spec.algorithm).unwrap_or(&none);
        if spec.digest.as_ref().is_some_and(|declared| declared != read) {
            return Ok(Err("the bytes in S3 differ from the digest that the upload declared".to_owned()));
        }
        // The value must be exactly what this broker writes, so that no part of it comes from another producer.
        let expected = verified_at(pointer).map(|at| {
            Pointer::new(&session.bucket, &session.object_key, spec.size_bytes, read, &spec.content_type, at).to_json()
        });
        if expected.is_none_or(|expected| expected.as_bytes() != value) {
            return Ok(Err("its pointer does not match the bytes in S3 and the upload's declaration".to_owned()));
        }
        // S3's checksums verify part hashes, as in a completion.
        let verification = Verification {
            verified_at: self.started_at,
            integrity: Integrity::Sha256,
            etag: None,
            version_id: None,
            pointer: String::new(),
        };
        let by_s3 = still_verified(&self.store, session, &verification, object).await?.ok();
        let by_read = max_integrity(spec.algorithm);
        let integrity = by_s3.map_or(by_read, |by_s3| by_s3.max(by_read));
        match integrity >= spec.min_integrity {
            true => Ok(Ok(integrity)),
            false => {
                let (verified, required) = (integrity.name(), spec.min_integrity.name());
                Ok(Err(format!("its bytes are verified to level {verified} only, but the topic required {required}")))
            }
        }
    }

    /// The digests of an object, read in chunks unless this run has already read it.
    async fn digests(&self, session: &Session, object: &Object) -> Result<Digests, objects::Error> {
        let key: (Uuid, Option<String>) = (session.id, object.etag.clone());
        // The map is consistent after every statement, so a panic of another task does not corrupt it.
        if let Some(digests) = self.digest_cache.lock().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return Ok(digests.clone());
        }
        let mut hashers = vec![Algorithm::Sha256.hasher()];
        if !matches!(session.spec.algorithm, Algorithm::Sha256 | Algorithm::None) {
            hashers.push(session.spec.algorithm.hasher());
        }
        let mut reader =
            self.objects.read(&ObjectLocation::of(session), object.etag.as_deref(), object.version_id.as_deref()).await?;
        let mut read_bytes = 0u64;
        while let Some(chunk) = reader.next().await? {
            read_bytes += chunk.len() as u64;
            hashers.iter_mut().for_each(|hasher| hasher.update(&chunk));
        }
        if read_bytes != object.size_bytes {
            return Err(objects::Error::Changed(format!("read {read_bytes} of {} bytes", object.size_bytes)));
        }
        let digests: Digests = hashers.into_iter().map(|hasher| hasher.finish()).collect();
        let mut cache = self.digest_cache.lock().unwrap_or_else(PoisonError::into_inner);
        if cache.len() >= MAX_CACHED_OBJECTS {
            cache.clear();
        }
        cache.insert(key, digests.clone());
        Ok(digests)
    }
}

/// The time of the verification that a pointer contains.
fn verified_at(pointer: &Pointer) -> Option<OffsetDateTime> {
    pointer.created_at.as_deref().and_then(|at| OffsetDateTime::parse(at, &Rfc3339).ok())
}

/// The level in the header of a record. Call it only for a record that a transaction of this broker wrote.
fn header_integrity(record: &ScannedRecord) -> String {
    let header = record.integrity.as_deref();
    let integrity = Integrity::ALL.into_iter().find(|level| Some(level.name()) == header).unwrap_or(Integrity::Size);
    integrity.name().to_owned()
}

/// Whether two pointers differ only in their time. After a restore to a point before the verification, the broker verifies
/// the upload again, and the new pointer has a later time.
fn differs_only_in_time(stored: &str, found: &Pointer) -> bool {
    Pointer::parse(stored.as_bytes())
        .is_ok_and(|stored| Pointer { created_at: None, ..stored } == Pointer { created_at: None, ..found.clone() })
}
