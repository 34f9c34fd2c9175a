//! Maps a row of `upload_sessions` to a session and back. A row that breaks the rules of its state is an error with its id.

use lfs_broker_client::api::{ErrorCode, FieldError, Integrity};
use lfs_broker_client::checksum::{Algorithm, Digest};
use sqlx::types::Json;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::session::{Failure, Layout, Lease, PartHashMode, RecordMetadata, Session, State, UploadSpec, Verification};
use crate::store::Error;

/// A statement that returns whole sessions: the SQL before their columns, the SQL after them, and the arguments.
///
/// It names every column. A prepared `select *` fails once a migration adds a column ("cached plan must not change result
/// type"), and replicas of the previous version still run at that time.
macro_rules! session_rows {
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
    ($before:tt, $after:literal $($arguments:tt)*) => { session_rows!($before, [$after] $($arguments)*) };
}
pub(super) use session_rows;

/// The columns of a session, in the order that [`session_rows`] names them.
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
    fn corrupt(&self, reason: &str) -> Error {
        Error::Corrupt { id: self.id, reason: reason.to_owned() }
    }

    fn state(&self) -> Result<State, Error> {
        let missing = |reason: &str| self.corrupt(reason);
        let lease = || -> Result<Lease, Error> {
            Ok(Lease {
                owner: self.lease_owner.ok_or_else(|| missing("completing without a lease owner"))?,
                until: self.lease_until.ok_or_else(|| missing("completing without an end of its lease"))?,
                attempt: self.lease_attempt,
            })
        };
        let verification = || -> Result<Verification, Error> {
            Ok(Verification {
                verified_at: self.verified_at.ok_or_else(|| missing("verified without a time"))?,
                integrity: self
                    .integrity
                    .as_deref()
                    .and_then(integrity)
                    .ok_or_else(|| missing("verified without a known integrity level"))?,
                etag: self.object_etag.clone(),
                version_id: self.object_version_id.clone(),
                pointer: self.pointer.clone().ok_or_else(|| missing("verified without a pointer"))?,
            })
        };
        let metadata = || -> Result<RecordMetadata, Error> {
            let partition = self.published_partition.ok_or_else(|| missing("published without a partition"))?;
            let offset = self.published_offset.ok_or_else(|| missing("published without an offset"))?;
            let at = self.published_at.ok_or_else(|| missing("published without a time"))?;
            Ok(RecordMetadata::new(self.id, partition, offset, at))
        };
        Ok(match self.state.as_str() {
            "open" => State::Open,
            "completing" => State::Completing { lease: lease()?, must_read: self.must_read },
            "verified" => State::Verified(verification()?),
            "published" => State::Published(verification()?, metadata()?),
            "aborted" => State::Aborted,
            "expired" => State::Expired,
            "rejected" => State::Rejected(self.failure().ok_or_else(|| missing("rejected without an error code"))?),
            other => return Err(self.corrupt(&format!("unknown state {other}"))),
        })
    }

    fn failure(&self) -> Option<Failure> {
        let items = |value: &serde_json::Value| serde_json::from_value::<Vec<FieldError>>(value.clone()).ok();
        Some(Failure {
            // A newer broker may have stored a code that this one does not know.
            code: ErrorCode::named(self.error_code.as_deref()?).unwrap_or(ErrorCode::StateConflict),
            detail: self.error_detail.clone().unwrap_or_default(),
            items: self.error_items.as_ref().and_then(items).unwrap_or_default(),
        })
    }

    fn layout(&self) -> Result<Layout, Error> {
        let hashes = match self.part_hashes.as_str() {
            "none" => PartHashMode::None,
            "given" => PartHashMode::Given,
            "deferred" => PartHashMode::Deferred,
            other => return Err(self.corrupt(&format!("unknown part_hashes {other}"))),
        };
        match (self.mode.as_str(), self.part_size_bytes, self.part_count) {
            ("single", None, None) => Ok(Layout::Single),
            ("multipart", Some(part_bytes), Some(parts)) => Ok(Layout::Multipart {
                part_bytes: part_bytes.unsigned_abs(),
                part_count: parts.unsigned_abs(),
                part_hashes: hashes,
            }),
            _ => Err(self.corrupt("mode and part columns contradict each other")),
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
        let failure = match state {
            State::Rejected(_) => None,
            _ => row.failure(),
        };
        let longest = row.expires_latest_at - row.created_at;
        Ok(Self {
            spec: UploadSpec {
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
                session_max_seconds: u32::try_from(longest.whole_seconds()).unwrap_or(u32::MAX),
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
            last_failure: failure,
            digest_by_complete: row.checksum_by_complete,
        })
    }
}

fn integrity(name: &str) -> Option<Integrity> {
    Integrity::ALL.into_iter().find(|level| level.name() == name)
}

/// The values that a state change writes, by column.
#[derive(Default)]
pub(super) struct StateColumns<'a> {
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

impl<'a> StateColumns<'a> {
    pub(super) fn of(session: &'a Session, now: OffsetDateTime) -> Self {
        let mut columns =
            Self { checksum: session.spec.digest.as_ref().map(|digest| digest.value.as_slice()), ..Self::default() };
        match &session.state {
            State::Open | State::Published(..) => {}
            State::Completing { lease, must_read } => {
                columns.lease_owner = Some(lease.owner);
                columns.lease_until = Some(lease.until);
                columns.lease_attempt = lease.attempt;
                columns.must_read = *must_read;
            }
            State::Verified(verification) => {
                columns.verified_at = Some(verification.verified_at);
                columns.integrity = Some(verification.integrity.name());
                columns.etag = verification.etag.as_deref();
                columns.version_id = verification.version_id.as_deref();
                columns.pointer = Some(&verification.pointer);
            }
            // The sweeper cleans up S3 from now on. A single PUT may still store the object until its URL expires. Part uploads
            // fail, because the multipart upload is aborted.
            State::Aborted | State::Expired | State::Rejected(_) => {
                columns.cleanup_due_at = Some(now);
                let urls_expire_at = session.urls_expire_at(now);
                let is_single = session.spec.layout == Layout::Single;
                columns.bytes_held_until = Some(urls_expire_at).filter(|until| is_single && *until > now);
            }
        }
        let failure = match &session.state {
            State::Rejected(failure) => Some(failure),
            _ => session.last_failure.as_ref(),
        };
        if let Some(failure) = failure {
            columns.error_code = Some(failure.code.as_str());
            columns.error_detail = Some(&failure.detail);
            columns.error_items = Some(Json(&failure.items));
        }
        columns
    }
}

/// The values of `mode`, `part_size_bytes`, `part_count` and `part_hashes`.
pub(super) fn layout_columns(layout: Layout) -> (&'static str, Option<i64>, Option<i32>, &'static str) {
    match layout {
        Layout::Single => ("single", None, None, "none"),
        Layout::Multipart { part_bytes, part_count, part_hashes } => {
            let part_hashes = match part_hashes {
                PartHashMode::None => "none",
                PartHashMode::Given => "given",
                PartHashMode::Deferred => "deferred",
            };
            let part_bytes = i64::try_from(part_bytes).expect("a part has 5 GiB at most");
            ("multipart", Some(part_bytes), Some(i32::try_from(part_count).expect("at most 10,000 parts")), part_hashes)
        }
    }
}

/// The headers of a record, in the documented order: the broker's, `traceparent`, then the client's.
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
