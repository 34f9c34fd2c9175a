//! The row of a session: read into the state it tells of, or refused with the row's name.

use lfs_broker_client::api::{FieldError, Integrity};
use lfs_broker_client::checksum::{Algorithm, Digest};
use sqlx::types::Json;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::session::{Hashes, Layout, Lease, Place, Promise, Proof, Session, State, Trouble};
use crate::store::Error;

/// A statement that gives whole sessions: what stands before their columns, what stands after, and the arguments.
///
/// It names the columns one by one. A prepared `select *` fails once a migration adds a column ("cached plan must not
/// change result type"), and replicas of the version before still run then.
macro_rules! rows {
    ($before:tt, [$($after:tt)+] $($arguments:tt)*) => {
        sqlx::query_as!(
            Row,
            $before
                + "id, tenant, subject, state, version, topic, record_key, record_partition, record_headers, \
             traceparent, content_type, filename, size_bytes, checksum_alg, checksum, min_integrity, bucket, \
             object_key, kms_key_id, mode, part_size_bytes, part_count, part_hashes, s3_upload_id, url_seconds, \
             session_seconds, created_at, updated_at, expires_at, expires_latest_at, lease_owner, lease_until, \
             lease_attempt, must_read, verified_at, integrity, object_etag, object_version_id, pointer, \
             published_partition, published_offset, published_at, error_code, error_detail, error_items, \
             cleanup_due_at, checksum_by_complete"
                + $($after)+
            $($arguments)*
        )
    };
    ($before:tt, $after:literal $($arguments:tt)*) => { rows!($before, [$after] $($arguments)*) };
}
pub(super) use rows;

/// A session's columns, all that [`rows`] names.
pub(super) struct Row {
    pub(super) id: Uuid,
    pub(super) tenant: String,
    pub(super) subject: String,
    pub(super) state: String,
    pub(super) version: i64,
    pub(super) topic: String,
    pub(super) record_key: Option<Vec<u8>>,
    pub(super) record_partition: Option<i32>,
    pub(super) record_headers: serde_json::Value,
    pub(super) traceparent: Option<String>,
    pub(super) content_type: String,
    pub(super) filename: Option<String>,
    pub(super) size_bytes: i64,
    pub(super) checksum_alg: String,
    pub(super) checksum: Option<Vec<u8>>,
    pub(super) min_integrity: String,
    pub(super) bucket: String,
    pub(super) object_key: String,
    pub(super) kms_key_id: Option<String>,
    pub(super) mode: String,
    pub(super) part_size_bytes: Option<i64>,
    pub(super) part_count: Option<i32>,
    pub(super) part_hashes: String,
    pub(super) s3_upload_id: Option<String>,
    pub(super) url_seconds: i32,
    pub(super) session_seconds: i32,
    pub(super) created_at: OffsetDateTime,
    pub(super) updated_at: OffsetDateTime,
    pub(super) expires_at: OffsetDateTime,
    pub(super) expires_latest_at: OffsetDateTime,
    pub(super) lease_owner: Option<Uuid>,
    pub(super) lease_until: Option<OffsetDateTime>,
    pub(super) lease_attempt: i32,
    pub(super) must_read: bool,
    pub(super) verified_at: Option<OffsetDateTime>,
    pub(super) integrity: Option<String>,
    pub(super) object_etag: Option<String>,
    pub(super) object_version_id: Option<String>,
    pub(super) pointer: Option<String>,
    pub(super) published_partition: Option<i32>,
    pub(super) published_offset: Option<i64>,
    pub(super) published_at: Option<OffsetDateTime>,
    pub(super) error_code: Option<String>,
    pub(super) error_detail: Option<String>,
    pub(super) error_items: Option<serde_json::Value>,
    pub(super) cleanup_due_at: Option<OffsetDateTime>,
    pub(super) checksum_by_complete: bool,
}

impl Row {
    fn corrupt(&self, what: &str) -> Error {
        Error::Corrupt { id: self.id, what: what.to_owned() }
    }

    fn state(&self) -> Result<State, Error> {
        let need = |what: &str| self.corrupt(what);
        let lease = || -> Result<Lease, Error> {
            Ok(Lease {
                owner: self.lease_owner.ok_or_else(|| need("completing without an owner"))?,
                until: self.lease_until.ok_or_else(|| need("completing without an end of lease"))?,
                attempt: self.lease_attempt,
            })
        };
        let proof = || -> Result<Proof, Error> {
            Ok(Proof {
                verified_at: self.verified_at.ok_or_else(|| need("verified at no time"))?,
                integrity: self.integrity.as_deref().and_then(integrity).ok_or_else(|| need("verified without a level"))?,
                etag: self.object_etag.clone(),
                version_id: self.object_version_id.clone(),
                pointer: self.pointer.clone().ok_or_else(|| need("verified without a pointer"))?,
            })
        };
        let place = || -> Result<Place, Error> {
            Ok(Place {
                partition: self.published_partition.ok_or_else(|| need("published in no partition"))?,
                offset: self.published_offset.ok_or_else(|| need("published at no offset"))?,
                at: self.published_at.ok_or_else(|| need("published at no time"))?,
            })
        };
        Ok(match self.state.as_str() {
            "open" => State::Open,
            "completing" => State::Completing { lease: lease()?, must_read: self.must_read },
            "verified" => State::Verified(proof()?),
            "published" => State::Published(proof()?, place()?),
            "aborted" => State::Aborted,
            "expired" => State::Expired,
            "rejected" => State::Rejected(self.trouble().ok_or_else(|| need("rejected without a reason"))?),
            other => return Err(self.corrupt(&format!("unknown state {other}"))),
        })
    }

    fn trouble(&self) -> Option<Trouble> {
        let items = |value: &serde_json::Value| serde_json::from_value::<Vec<FieldError>>(value.clone()).ok();
        Some(Trouble {
            code: self.error_code.clone()?,
            detail: self.error_detail.clone().unwrap_or_default(),
            items: self.error_items.as_ref().and_then(items).unwrap_or_default(),
        })
    }

    fn layout(&self) -> Result<Layout, Error> {
        let hashes = match self.part_hashes.as_str() {
            "none" => Hashes::None,
            "given" => Hashes::Given,
            "deferred" => Hashes::Deferred,
            other => return Err(self.corrupt(&format!("unknown part_hashes {other}"))),
        };
        match (self.mode.as_str(), self.part_size_bytes, self.part_count) {
            ("single", None, None) => Ok(Layout::Single),
            ("multipart", Some(part_bytes), Some(parts)) => {
                Ok(Layout::Multipart { part_bytes: part_bytes.unsigned_abs(), parts: parts.unsigned_abs(), hashes })
            }
            _ => Err(self.corrupt("its mode and its parts disagree")),
        }
    }
}

impl TryFrom<Row> for Session {
    type Error = Error;

    fn try_from(row: Row) -> Result<Self, Error> {
        let state = row.state()?;
        let layout = row.layout()?;
        let algorithm: Algorithm = row.checksum_alg.parse().map_err(|error: String| row.corrupt(&error))?;
        let headers = serde_json::from_value(row.record_headers.clone()).map_err(|error| row.corrupt(&error.to_string()))?;
        let min_integrity = integrity(&row.min_integrity).ok_or_else(|| row.corrupt("unknown min_integrity"))?;
        let trouble = match state {
            State::Rejected(_) => None,
            _ => row.trouble(),
        };
        let seconds = row.expires_latest_at - row.created_at;
        Ok(Self {
            promise: Promise {
                topic: row.topic,
                key: row.record_key,
                partition: row.record_partition,
                headers,
                traceparent: row.traceparent,
                content_type: row.content_type,
                filename: row.filename,
                size_bytes: row.size_bytes.unsigned_abs(),
                algorithm,
                digest: row.checksum.map(|value| Digest { algorithm, value }),
                min_integrity,
                layout,
                kms_key_id: row.kms_key_id,
                url_seconds: row.url_seconds.unsigned_abs(),
                session_seconds: row.session_seconds.unsigned_abs(),
                session_max_seconds: u32::try_from(seconds.whole_seconds()).unwrap_or(u32::MAX),
            },
            id: row.id,
            tenant: row.tenant,
            subject: row.subject,
            version: row.version,
            bucket: row.bucket,
            object_key: row.object_key,
            s3_upload_id: row.s3_upload_id,
            state,
            created_at: row.created_at,
            updated_at: row.updated_at,
            expires_at: row.expires_at,
            expires_latest_at: row.expires_latest_at,
            trouble,
            digest_by_complete: row.checksum_by_complete,
        })
    }
}

fn integrity(name: &str) -> Option<Integrity> {
    Integrity::ALL.into_iter().find(|level| level.name() == name)
}

/// What a move writes, by column.
#[derive(Default)]
pub(super) struct Columns<'a> {
    pub(super) checksum: Option<&'a [u8]>,
    pub(super) lease_owner: Option<Uuid>,
    pub(super) lease_until: Option<OffsetDateTime>,
    pub(super) lease_attempt: i32,
    pub(super) must_read: bool,
    pub(super) verified_at: Option<OffsetDateTime>,
    pub(super) integrity: Option<&'static str>,
    pub(super) etag: Option<&'a str>,
    pub(super) version_id: Option<&'a str>,
    pub(super) pointer: Option<&'a str>,
    pub(super) error_code: Option<&'a str>,
    pub(super) error_detail: Option<&'a str>,
    pub(super) error_items: Option<Json<&'a [FieldError]>>,
    pub(super) cleanup_due_at: Option<OffsetDateTime>,
    pub(super) bytes_held_until: Option<OffsetDateTime>,
}

impl<'a> Columns<'a> {
    pub(super) fn of(session: &'a Session, now: OffsetDateTime) -> Self {
        let mut columns =
            Self { checksum: session.promise.digest.as_ref().map(|digest| digest.value.as_slice()), ..Self::default() };
        match &session.state {
            State::Open | State::Published(..) => {}
            State::Completing { lease, must_read } => {
                columns.lease_owner = Some(lease.owner);
                columns.lease_until = Some(lease.until);
                columns.lease_attempt = lease.attempt;
                columns.must_read = *must_read;
            }
            State::Verified(proof) => {
                columns.verified_at = Some(proof.verified_at);
                columns.integrity = Some(proof.integrity.name());
                columns.etag = proof.etag.as_deref();
                columns.version_id = proof.version_id.as_deref();
                columns.pointer = Some(&proof.pointer);
            }
            // What S3 may still hold is removed from now on. One PUT may still bring the bytes until its URL ends; parts
            // find no multipart upload any more.
            State::Aborted | State::Expired | State::Rejected(_) => {
                columns.cleanup_due_at = Some(now);
                let urls_end_at = session.urls_end_at(now);
                let is_single = session.promise.layout == Layout::Single;
                columns.bytes_held_until = Some(urls_end_at).filter(|until| is_single && *until > now);
            }
        }
        let trouble = match &session.state {
            State::Rejected(trouble) => Some(trouble),
            _ => session.trouble.as_ref(),
        };
        if let Some(trouble) = trouble {
            columns.error_code = Some(&trouble.code);
            columns.error_detail = Some(&trouble.detail);
            columns.error_items = Some(Json(&trouble.items));
        }
        columns
    }
}

/// `mode`, `part_size_bytes`, `part_count` and `part_hashes`.
pub(super) fn layout_columns(layout: Layout) -> (&'static str, Option<i64>, Option<i32>, &'static str) {
    match layout {
        Layout::Single => ("single", None, None, "none"),
        Layout::Multipart { part_bytes, parts, hashes } => {
            let hashes = match hashes {
                Hashes::None => "none",
                Hashes::Given => "given",
                Hashes::Deferred => "deferred",
            };
            let part_bytes = i64::try_from(part_bytes).expect("a part has 5 GiB at most");
            ("multipart", Some(part_bytes), Some(i32::try_from(parts).expect("at most 10,000 parts")), hashes)
        }
    }
}

/// Seconds as a column holds them.
pub(super) fn int(seconds: u32) -> i32 {
    i32::try_from(seconds).expect("a policy allows seven days at most")
}

/// The headers of a record, in API.md's order: the broker's, the trace's, then the client's.
pub(in crate::store) fn record_headers(
    id: Uuid,
    integrity: &str,
    version_id: Option<String>,
    traceparent: Option<String>,
    client: Vec<(String, String)>,
) -> Vec<(String, String)> {
    let mut headers = vec![("lfs-upload-id".to_owned(), id.to_string()), ("lfs-integrity".to_owned(), integrity.to_owned())];
    headers.extend(version_id.map(|version_id| ("lfs-version-id".to_owned(), version_id)));
    headers.extend(traceparent.map(|traceparent| ("traceparent".to_owned(), traceparent)));
    headers.extend(client);
    headers
}
