//! The HTTP contract: requests, answers and problems, exactly as they travel.
//!
//! Times are RFC 3339 in UTC, `*_in` and `*_seconds` whole seconds, sizes bytes, hashes lower-case hex.
//! Requests refuse members they do not know; answers may grow new ones.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{MapAccess, Visitor};
use serde::ser::SerializeMap as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::checksum::{Algorithm, Sha256};
use crate::pointer::Pointer;

#[cfg(feature = "openapi")]
use utoipa::{IntoParams, ToSchema};

/// Most part numbers in one `/parts` call, and most part URLs in one answer.
pub const PARTS_PER_CALL: usize = 100;

/// Opens an upload: `POST /lfs/uploads`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[cfg_attr(feature = "openapi", schema(example = json!({"topic": "videos", "key": "order-17", "size": 5,
    "sha256": "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824", "content_type": "video/mp4"})))]
#[serde(deny_unknown_fields)]
pub struct OpenUpload {
    /// The Kafka topic that gets the pointer.
    #[cfg_attr(feature = "openapi", schema(pattern = "^[A-Za-z0-9._-]{1,249}$"))]
    pub topic: String,
    /// The size of the bytes; 0 is legal.
    #[cfg_attr(feature = "openapi", schema(maximum = 5497558138880u64))]
    pub size: u64,
    /// The record's key as text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(max_length = 4096))]
    pub key: Option<String>,
    /// The record's key as base64, for keys that are not text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_base64: Option<String>,
    /// SHA-256 of the whole; where it is not known yet (a stream), it comes with complete.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<Sha256>,
    /// A checksum that stands for sha256 where the topic's policy allows it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checksum_alg: Option<Algorithm>,
    /// The digest of `checksum_alg`, hex.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checksum: Option<String>,
    /// Media type of the bytes; `application/octet-stream` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content_type: Option<String>,
    /// The name that a download is offered under.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(min_length = 1, max_length = 255, pattern = r"^[^/\\\x00-\x1f\x7f-\x9f]*$"))]
    pub filename: Option<String>,
    /// Headers of the record in Kafka, in order; names that begin with `lfs-` are refused.
    #[serde(default, skip_serializing_if = "Headers::is_empty")]
    #[cfg_attr(feature = "openapi", schema(value_type = BTreeMap<String, String>))]
    pub headers: Headers,
    /// The partition of the record; the key decides when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(minimum = 0))]
    pub partition: Option<i32>,
    /// The size of a part in bytes, at least 5 MiB; required with `part_sha256`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(minimum = 5242880, maximum = 5368709120u64))]
    pub part_size: Option<u64>,
    /// SHA-256 of each part, in order.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(min_items = 1, max_items = 10000))]
    pub part_sha256: Option<Vec<Sha256>>,
    /// `deferred` promises that each `/parts` call brings the hashes of its parts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub part_hashes: Option<PartHashes>,
}

/// When the hashes of the parts come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum PartHashes {
    /// With each call to `/parts`.
    Deferred,
}

/// Record headers: names and values in the order they were written, each name once.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Headers(pub Vec<(String, String)>);

impl Headers {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Serialize for Headers {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (name, value) in &self.0 {
            map.serialize_entry(name, value)?;
        }
        map.end()
    }
}

impl<'de> Deserialize<'de> for Headers {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder;
        impl<'de> Visitor<'de> for InOrder {
            type Value = Headers;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object whose values are strings")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Headers, A::Error> {
                let mut headers: Vec<(String, String)> = Vec::new();
                while let Some((name, value)) = map.next_entry::<String, String>()? {
                    headers.push((name, value));
                }
                Ok(Headers(headers))
            }
        }
        deserializer.deserialize_map(InOrder)
    }
}

/// Where an upload stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum UploadState {
    /// Bytes may be put.
    Open,
    /// The broker looks at what S3 holds.
    Completing,
    /// The bytes are proved; the pointer will reach Kafka.
    Verified,
    /// The pointer is in Kafka. Final.
    Published,
    /// Taken back by the client. Final.
    Aborted,
    /// Not completed in time. Final.
    Expired,
    /// The bytes are not what was promised. Final.
    Rejected,
}

impl UploadState {
    /// Every state in the order an upload may meet them.
    pub const ALL: [Self; 7] =
        [Self::Open, Self::Completing, Self::Verified, Self::Published, Self::Aborted, Self::Expired, Self::Rejected];

    /// The name in JSON and SQL.
    pub fn name(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Completing => "completing",
            Self::Verified => "verified",
            Self::Published => "published",
            Self::Aborted => "aborted",
            Self::Expired => "expired",
            Self::Rejected => "rejected",
        }
    }

    /// Whether nothing can follow.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Published | Self::Aborted | Self::Expired | Self::Rejected)
    }
}

impl fmt::Display for UploadState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Whether the bytes go up in one PUT or in parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// One PUT.
    Single,
    /// One PUT a part.
    Multipart,
}

/// How far the bytes are proved, weakest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Integrity {
    /// The size only.
    Size,
    /// A non-cryptographic checksum of the whole, or MD5: proof against accidents.
    Checksum,
    /// Every byte against part hashes promised before signing; the whole-file hash is the client's word.
    PartsSha256,
    /// SHA-256 of the whole, checked by S3 at a single PUT or by the broker re-reading.
    Sha256,
}

impl Integrity {
    /// Every level, weakest first.
    pub const ALL: [Self; 4] = [Self::Size, Self::Checksum, Self::PartsSha256, Self::Sha256];

    /// The name in JSON, SQL and the record's header.
    pub fn name(self) -> &'static str {
        match self {
            Self::Size => "size",
            Self::Checksum => "checksum",
            Self::PartsSha256 => "parts-sha256",
            Self::Sha256 => "sha256",
        }
    }
}

/// What the client does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum Next {
    /// PUT the bytes.
    Put,
    /// PUT the missing parts.
    Parts,
    /// POST complete.
    Complete,
    /// Wait: the broker is at work.
    Wait,
    /// Nothing.
    None,
}

/// A request that the holder may send to S3 as it stands.
#[derive(Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct SignedRequest {
    /// `PUT` or `GET`.
    pub method: String,
    /// The presigned URL: a secret for as long as it lives.
    pub url: String,
    /// Exactly the headers that must be sent (a browser leaves out `content-length`: it follows from the body).
    pub headers: BTreeMap<String, String>,
    /// When S3 stops to accept it.
    #[serde(with = "time::serde::rfc3339")]
    pub expires_at: OffsetDateTime,
    /// The same as seconds from now, for clients whose clock is off.
    pub expires_in: u64,
}

impl fmt::Debug for SignedRequest {
    /// Leaves out the URL: whoever reads a log must not be able to use it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SignedRequest")
            .field("method", &self.method)
            .field("expires_in", &self.expires_in)
            .finish_non_exhaustive()
    }
}

/// One part and the request that puts it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct SignedPart {
    /// 1 to `part_count`.
    pub part_number: u32,
    /// Where the part begins in the whole, in bytes.
    pub offset: u64,
    /// The part's size in bytes.
    pub size: u64,
    /// The request.
    #[serde(flatten)]
    pub request: SignedRequest,
}

/// A part that S3 holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct UploadedPart {
    /// 1 to `part_count`.
    pub part_number: u32,
    /// Its size in bytes.
    pub size: u64,
}

/// Where the pointer is in Kafka.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[cfg_attr(feature = "openapi", schema(as = KafkaRecord))]
pub struct Record {
    /// The topic.
    pub topic: String,
    /// The partition.
    pub partition: i32,
    /// The offset.
    pub offset: i64,
    /// The record's timestamp.
    #[serde(with = "time::serde::rfc3339")]
    pub timestamp: OffsetDateTime,
}

/// Why an upload was rejected, went back to open, or is not published yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct UploadError {
    /// A code of the error table.
    pub code: String,
    /// What happened, with the numbers.
    pub detail: String,
}

/// An upload: the answer to open, and to every reading of it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[cfg_attr(feature = "openapi", schema(example = json!({"id": "01934d2e-7c00-7000-8000-5f2b8c1d9e3a", "state": "open", "version": 1, "mode": "single",
    "topic": "videos", "key": "order-17", "bucket": "lfs", "object_key": "acme/videos/lfs/2026/11/21/01934d2e-7c00-7000-8000-5f2b8c1d9e3a", "size": 5,
    "upload": {"method": "PUT",
    "url": "https://s3.example.com/lfs/acme/videos/lfs/2026/11/21/01934d2e-7c00-7000-8000-5f2b8c1d9e3a?X-Amz-Signature=0a1b",
        "headers": {"content-length": "5", "content-type": "video/mp4", "if-none-match": "*",
            "x-amz-checksum-sha256": "LPJNul+wow4m6DsqxbninhsWHlwfp0JecwQzYpOLmCQ=",
            "x-amz-meta-lfs-upload-id": "01934d2e-7c00-7000-8000-5f2b8c1d9e3a"},
        "expires_at": "2026-11-21T06:50:00Z", "expires_in": 900},
    "created_at": "2026-11-21T06:35:00.5Z", "updated_at": "2026-11-21T06:35:00.5Z",
    "expires_at": "2026-11-21T07:35:00.5Z", "expires_in": 3600})))]
pub struct Upload {
    /// The upload's id, a UUID of version 7.
    pub id: Uuid,
    /// Where it stands.
    pub state: UploadState,
    /// Grows by one with every change.
    pub version: i64,
    /// One PUT or parts.
    pub mode: Mode,
    /// The Kafka topic.
    pub topic: String,
    /// The record's key, where it is text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// The record's key, where it is not text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_base64: Option<String>,
    /// The bucket of the object.
    pub bucket: String,
    /// The key of the object.
    pub object_key: String,
    /// The promised size in bytes.
    pub size: u64,
    /// The request that puts the bytes; only in the answer to open, and for a single PUT.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upload: Option<SignedRequest>,
    /// The size of every part but the last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub part_size: Option<u64>,
    /// How many parts there are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub part_count: Option<u32>,
    /// The first window of signed parts; only in the answer to open.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parts: Option<Vec<SignedPart>>,
    /// The parts that S3 holds, while open.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uploaded_parts: Option<Vec<UploadedPart>>,
    /// The parts that S3 lacks as inclusive ranges `[from, to]`, while open.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub missing_parts: Option<Vec<[u32; 2]>>,
    /// What to do next; absent where S3 was not asked: in the answer to open, and in lists while open.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<Next>,
    /// The pointer, once the bytes are verified.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pointer: Option<Pointer>,
    /// How far the bytes are proved, once they are verified.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub integrity: Option<Integrity>,
    /// Where the pointer is in Kafka, once it is there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub record: Option<Record>,
    /// Why it was rejected, went back to open, or is not published yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<UploadError>,
    /// When it was opened.
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
    /// When it last changed.
    #[serde(with = "time::serde::rfc3339")]
    pub updated_at: OffsetDateTime,
    /// When an open upload ends.
    #[serde(with = "time::serde::rfc3339")]
    pub expires_at: OffsetDateTime,
    /// The same as seconds from now; 0 once it has passed.
    pub expires_in: u64,
}

/// A page of uploads, newest first.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct UploadPage {
    /// The uploads.
    pub items: Vec<Upload>,
    /// Give it as `cursor` for the next page; null at the end.
    #[cfg_attr(feature = "openapi", schema(required = true))]
    pub next_cursor: Option<String>,
}

/// What `GET /lfs/uploads/{id}` may be asked.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(IntoParams))]
#[cfg_attr(feature = "openapi", into_params(parameter_in = Query))]
#[serde(deny_unknown_fields)]
pub struct ReadUpload {
    /// Wait up to this many seconds (at most 30) for a change.
    #[cfg_attr(feature = "openapi", param(maximum = 30))]
    pub wait: Option<u64>,
    /// Answer as soon as the version is not this one; the one at arrival when absent.
    pub version: Option<i64>,
}

/// The filters of `GET /lfs/uploads`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[cfg_attr(feature = "openapi", derive(IntoParams))]
#[cfg_attr(feature = "openapi", into_params(parameter_in = Query))]
pub struct ListUploads {
    /// Only this topic.
    pub topic: Option<String>,
    /// Only these states; may repeat.
    #[cfg_attr(feature = "openapi", param(required = false))]
    pub state: Vec<UploadState>,
    /// Only keys that begin so.
    pub key_prefix: Option<String>,
    /// Only uploads created at this time or later.
    pub created_after: Option<OffsetDateTime>,
    /// Only uploads created before this time.
    pub created_before: Option<OffsetDateTime>,
    /// Only this tenant; for administrators.
    pub tenant: Option<String>,
    /// Items a page: 1 to 200, 50 when absent.
    #[cfg_attr(feature = "openapi", param(minimum = 1, maximum = 200))]
    pub limit: Option<u32>,
    /// The `next_cursor` of the page before, with the same filters.
    pub cursor: Option<String>,
}

/// A transition of an upload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct Transition {
    /// When.
    #[serde(with = "time::serde::rfc3339")]
    pub at: OffsetDateTime,
    /// The state before; null when it was opened.
    #[cfg_attr(feature = "openapi", schema(required = true))]
    pub from: Option<UploadState>,
    /// The state after.
    pub to: UploadState,
    /// Why.
    pub reason: String,
    /// Who: `client:<sub>`, `broker`, `verifier`, `relay` or `sweeper`.
    pub by: String,
}

/// Every transition of an upload, oldest first.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[cfg_attr(feature = "openapi", schema(example = json!({"items": [
    {"at": "2026-11-21T06:35:00.5Z", "from": null, "to": "open", "reason": "opened", "by": "client:producer-1"},
    {"at": "2026-11-21T06:35:58Z", "from": "open", "to": "completing", "reason": "complete was asked for", "by": "client:producer-1"}]})))]
pub struct History {
    /// The transitions.
    pub items: Vec<Transition>,
}

/// Asks for part URLs: numbers alone, or numbers with hashes where they were deferred.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[cfg_attr(feature = "openapi", schema(example = json!({"part_numbers": [1, 2]})))]
#[serde(deny_unknown_fields)]
pub struct SignParts {
    /// The parts to sign, at most 100.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(min_items = 1, max_items = 100))]
    pub part_numbers: Option<Vec<u32>>,
    /// The parts to sign with their hashes, at most 100.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(min_items = 1, max_items = 100))]
    pub parts: Option<Vec<PartRequest>>,
}

/// A part to sign.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[serde(deny_unknown_fields)]
pub struct PartRequest {
    /// 1 to `part_count`.
    #[cfg_attr(feature = "openapi", schema(minimum = 1, maximum = 10000))]
    pub part_number: u32,
    /// SHA-256 of the part's bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<Sha256>,
}

/// Signed parts.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[cfg_attr(feature = "openapi", schema(example = json!({"parts": [{"part_number": 1, "offset": 0, "size": 16777216, "method": "PUT",
    "url": "https://s3.example.com/lfs/acme/videos/lfs/2026/11/21/01934d2e-7c00-7000-8000-5f2b8c1d9e3a?partNumber=1&X-Amz-Signature=0a1b",
    "headers": {"content-length": "16777216"}, "expires_at": "2026-11-21T06:50:00Z", "expires_in": 900}]})))]
pub struct SignedParts {
    /// In the order they were asked for.
    pub parts: Vec<SignedPart>,
}

/// Completes an upload.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[cfg_attr(feature = "openapi", schema(example = json!({"sha256": "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"})))]
#[serde(deny_unknown_fields)]
pub struct CompleteUpload {
    /// SHA-256 of the whole, required where open did not bring a checksum.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<Sha256>,
    /// Accepted for clients that send part lists, and ignored: the broker asks S3.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(ignore))]
    pub parts: Option<serde_json::Value>,
}

/// The answer to complete: 200 with `record`, or 202 without.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[cfg_attr(feature = "openapi", schema(example = json!({"id": "01934d2e-7c00-7000-8000-5f2b8c1d9e3a", "state": "published",
    "pointer": {"kfs_lfs": 1, "bucket": "lfs",
    "key": "acme/videos/lfs/2026/11/21/01934d2e-7c00-7000-8000-5f2b8c1d9e3a", "size": 5,
    "sha256": "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824", "content_type": "video/mp4", "created_at": "2026-11-21T06:35:59Z"},
    "integrity": "sha256",
    "record": {"topic": "videos", "partition": 3, "offset": 42, "timestamp": "2026-11-21T06:35:59.2Z"}})))]
pub struct Completed {
    /// The upload.
    pub id: Uuid,
    /// `published` (200), `verified` (202: promised, it will reach Kafka) or `completing` (202: nothing promised yet).
    pub state: UploadState,
    /// The record's value; absent while completing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pointer: Option<Pointer>,
    /// How far the bytes are proved; absent while completing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub integrity: Option<Integrity>,
    /// Where the pointer is; only when published.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub record: Option<Record>,
}

/// What `POST /lfs/resolve` may be asked.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(IntoParams))]
#[cfg_attr(feature = "openapi", into_params(parameter_in = Query))]
#[serde(deny_unknown_fields)]
pub struct ResolveOptions {
    /// The `lfs-version-id` of the record, for versioned buckets.
    pub version_id: Option<String>,
    /// Check the pointer and the object, sign nothing.
    #[serde(default)]
    pub validate: bool,
}

/// A pointer resolved: a GET that yields the bytes.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[cfg_attr(feature = "openapi", schema(example = json!({"method": "GET",
    "url": "https://s3.example.com/lfs/acme/videos/lfs/2026/11/21/01934d2e-7c00-7000-8000-5f2b8c1d9e3a?X-Amz-Signature=0a1b", "headers": {},
    "expires_at": "2026-11-21T06:50:00Z", "expires_in": 900, "size": 5, "sha256": "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824",
    "content_type": "video/mp4", "filename": "a.mp4", "integrity": "sha256", "upload_id": "01934d2e-7c00-7000-8000-5f2b8c1d9e3a"})))]
pub struct Resolved {
    /// The request.
    #[serde(flatten)]
    pub request: SignedRequest,
    /// The size in bytes, checked against S3.
    pub size: u64,
    /// SHA-256 that the bytes must have.
    #[cfg_attr(feature = "openapi", schema(required = true))]
    pub sha256: Option<Sha256>,
    /// The media type that the producer named.
    #[cfg_attr(feature = "openapi", schema(required = true))]
    pub content_type: Option<String>,
    /// The name that the producer gave.
    #[cfg_attr(feature = "openapi", schema(required = true))]
    pub filename: Option<String>,
    /// How far the broker proved the bytes; null where it knows no such upload.
    #[cfg_attr(feature = "openapi", schema(required = true))]
    pub integrity: Option<Integrity>,
    /// The upload; null where the broker knows none.
    #[cfg_attr(feature = "openapi", schema(required = true))]
    pub upload_id: Option<Uuid>,
}

/// A pointer that is sound.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[cfg_attr(feature = "openapi", schema(example = json!({"valid": true, "size": 5, "integrity": "sha256"})))]
pub struct Validated {
    /// Always true; what is not valid is a problem.
    pub valid: bool,
    /// The size in bytes.
    pub size: u64,
    /// How far the broker proved the bytes; null where it knows no such upload.
    #[cfg_attr(feature = "openapi", schema(required = true))]
    pub integrity: Option<Integrity>,
}

/// The answer of `POST /lfs/resolve`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[serde(untagged)]
pub enum ResolveAnswer {
    /// With a signed GET.
    Resolved(Resolved),
    /// With `?validate=true`.
    Validated(Validated),
}

/// What is allowed on a topic.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[cfg_attr(feature = "openapi", schema(example = json!({"enabled": true, "min_bytes": 8388608, "max_bytes": 1073741824_u64,
    "bucket": null, "prefix": "lake", "checksums": ["sha256"], "min_integrity": "parts-sha256", "content_types": ["video/*"],
    "session_seconds": 3600, "session_max_seconds": 86400, "url_seconds": 900, "kms_key_id": null, "retention": "keep"})))]
#[serde(deny_unknown_fields, default)]
pub struct Policy {
    /// Whether uploads may be opened.
    pub enabled: bool,
    /// Advice to clients: below it, send the bytes inline.
    #[cfg_attr(feature = "openapi", schema(maximum = 5497558138880u64))]
    pub min_bytes: u64,
    /// The largest upload in bytes.
    #[cfg_attr(feature = "openapi", schema(maximum = 5497558138880u64))]
    pub max_bytes: u64,
    /// The bucket; the broker's default when null.
    pub bucket: Option<String>,
    /// What the object keys begin with.
    pub prefix: Option<String>,
    /// The checksums that a client may promise by.
    pub checksums: Vec<Algorithm>,
    /// The least proof that a pointer is published with.
    pub min_integrity: Integrity,
    /// Media types that are allowed: `type/subtype`, `type/*` or `*/*`.
    pub content_types: Vec<String>,
    /// How long an upload stays open.
    pub session_seconds: u64,
    /// How long it stays open at most, however often parts are signed.
    pub session_max_seconds: u64,
    /// How long a URL lives.
    pub url_seconds: u64,
    /// The KMS key that S3 encrypts with; the bucket's own rule when null.
    #[cfg_attr(feature = "openapi", schema(min_length = 1, max_length = 2048, pattern = "^[!-~]*$"))]
    pub kms_key_id: Option<String>,
    /// What becomes of the objects: they are kept.
    pub retention: Retention,
}

/// What becomes of published objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum Retention {
    /// They are kept.
    #[default]
    Keep,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            enabled: true,
            min_bytes: 8 << 20,
            max_bytes: 5 << 40,
            bucket: None,
            prefix: None,
            checksums: vec![Algorithm::Sha256],
            min_integrity: Integrity::PartsSha256,
            content_types: vec!["*/*".to_owned()],
            session_seconds: 3600,
            session_max_seconds: 86_400,
            url_seconds: 900,
            kms_key_id: None,
            retention: Retention::Keep,
        }
    }
}

/// A topic and its policy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct TopicPolicy {
    /// The topic.
    pub topic: String,
    /// Its policy.
    pub policy: Policy,
}

/// A page of topic policies, by name.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct TopicPage {
    /// The policies.
    pub items: Vec<TopicPolicy>,
    /// Give it as `cursor` for the next page; null at the end.
    #[cfg_attr(feature = "openapi", schema(required = true))]
    pub next_cursor: Option<String>,
}

/// What `GET /lfs/topics` may be asked.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(IntoParams))]
#[cfg_attr(feature = "openapi", into_params(parameter_in = Query))]
#[serde(deny_unknown_fields)]
pub struct ListTopics {
    /// Items a page: 1 to 200, 50 when absent.
    #[cfg_attr(feature = "openapi", param(minimum = 1, maximum = 200))]
    pub limit: Option<u32>,
    /// The `next_cursor` of the page before.
    pub cursor: Option<String>,
}

/// An error, as RFC 9457 writes it (`application/problem+json`).
#[derive(Debug, Clone, Serialize, Deserialize, thiserror::Error)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[cfg_attr(feature = "openapi", schema(example = json!({"type": "/problems/size-mismatch", "title": "Size mismatch", "status": 422,
    "detail": "promised 5 bytes, found 4", "code": "size-mismatch", "request_id": "9a0f3c52-6b1e-4a3e-9d55-2f0e4f7f5c11",
    "retryable": false, "upload_state": "rejected"})))]
#[error("{status} {code}: {detail}")]
pub struct Problem {
    /// `/problems/<code>`: what the error means.
    #[serde(rename = "type")]
    pub kind: String,
    /// A short title of the kind of error.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// What happened this time.
    pub detail: String,
    /// The code to decide by.
    pub code: String,
    /// The request's id, for the operator's logs.
    pub request_id: String,
    /// Whether the same request may succeed later.
    pub retryable: bool,
    /// Where the upload stands, where that is the reason.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upload_state: Option<UploadState>,
    /// The places in the request, or the parts, that are wrong.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<FieldError>,
}

/// One place in a request that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct FieldError {
    /// A JSON pointer (RFC 6901) into the request.
    pub pointer: String,
    /// What is wrong there.
    pub detail: String,
}

/// Asks to publish a verified upload's pointer now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[serde(deny_unknown_fields, default)]
pub struct Redrive {
    /// Forget the partition that was asked for at open: the key, or chance, decides.
    pub clear_partition: bool,
}

/// How things stand.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct Stats {
    /// How many uploads there are, by state.
    pub uploads: BTreeMap<String, u64>,
    /// How old the oldest verified upload is that is not published yet; null where there is none.
    #[cfg_attr(feature = "openapi", schema(required = true))]
    pub oldest_verified_seconds: Option<u64>,
    /// Pointers that Kafka has not yet.
    pub outbox: OutboxDepth,
    /// Whether what the broker stands on answers.
    pub dependencies: Dependencies,
}

/// Pointers that Kafka has not yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct OutboxDepth {
    /// Not tried yet, or on their way.
    pub waiting: u64,
    /// Refused by Kafka, and tried again later.
    pub parked: u64,
}

/// What the broker stands on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct Dependencies {
    /// PostgreSQL.
    pub database: Dependency,
    /// S3.
    pub storage: Dependency,
    /// Kafka; without it complete answers 202 and pointers wait.
    pub kafka: Dependency,
}

/// One thing that the broker stands on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct Dependency {
    /// Whether it answers.
    pub ok: bool,
    /// What is wrong, where something is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}
