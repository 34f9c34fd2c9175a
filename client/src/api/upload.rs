//! An upload: its state, its parts, its integrity and its history.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::pointer::Pointer;

#[cfg(feature = "openapi")]
use utoipa::ToSchema;

/// The state of an upload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum UploadState {
    /// The client may send bytes.
    Open,
    /// The broker verifies the object in S3.
    Completing,
    /// The bytes are verified. The pointer will be published.
    Verified,
    /// The pointer is in Kafka. Final.
    Published,
    /// Aborted by the client. Final.
    Aborted,
    /// Not completed in time. Final.
    Expired,
    /// The bytes do not match their declaration. Final.
    Rejected,
}

impl UploadState {
    /// Every state, in the order in which an upload may reach them.
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

    /// Whether no other state can follow.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Published | Self::Aborted | Self::Expired | Self::Rejected)
    }
}

impl fmt::Display for UploadState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Whether the bytes are sent in one PUT or in parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// One PUT.
    Single,
    /// One PUT per part.
    Multipart,
}

/// How far the bytes were verified, weakest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Integrity {
    /// The size only.
    Size,
    /// A non-cryptographic checksum of the whole, or MD5. It detects accidental damage only.
    Checksum,
    /// Every byte, against part hashes that were declared before signing. The hash of the whole is only the client's
    /// claim.
    PartsSha256,
    /// SHA-256 of the whole, verified by S3 in a single PUT or by the broker, which reads the object again.
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

/// The next step of the client.
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
    /// Wait: the broker is verifying or publishing.
    Wait,
    /// Nothing.
    None,
}

/// A presigned request, to be sent to S3 without changes.
#[derive(Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct SignedRequest {
    /// `PUT` or `GET`.
    pub method: String,
    /// The presigned URL. It is a secret until it expires.
    pub url: String,
    /// Exactly the headers that must be sent. A browser omits `content-length`, because it sets this header itself.
    pub headers: BTreeMap<String, String>,
    /// When S3 stops accepting the request.
    #[serde(with = "time::serde::rfc3339")]
    pub expires_at: OffsetDateTime,
    /// The same as seconds from now, for clients with a wrong clock.
    pub expires_in: u64,
}

impl SignedRequest {
    /// A GET that was signed just now with this lifetime, for [`Access`](crate::Access).
    pub fn get(url: impl Into<String>, lifetime: Duration) -> Self {
        Self {
            method: "GET".to_owned(),
            url: url.into(),
            headers: BTreeMap::new(),
            expires_at: OffsetDateTime::now_utc() + lifetime,
            expires_in: lifetime.as_secs(),
        }
    }
}

impl fmt::Debug for SignedRequest {
    /// Omits the URL, because a reader of logs must not be able to use it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SignedRequest")
            .field("method", &self.method)
            .field("expires_in", &self.expires_in)
            .finish_non_exhaustive()
    }
}

/// One part and its presigned PUT.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct SignedPart {
    /// 1 to `part_count`.
    pub part_number: u32,
    /// The offset of the part in the whole, in bytes.
    pub offset: u64,
    /// The part's size in bytes.
    pub size: u64,
    /// The request.
    #[serde(flatten)]
    pub request: SignedRequest,
}

/// A part that is stored in S3.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct UploadedPart {
    /// 1 to `part_count`.
    pub part_number: u32,
    /// Its size in bytes.
    pub size: u64,
}

/// The position of the pointer in Kafka: Kafka's record metadata.
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

/// Why an upload was rejected, was set back to open, or is not published yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct UploadError {
    /// A code of the error table.
    pub code: String,
    /// A description of the error.
    pub detail: String,
}

/// An upload: the response of open and of read.
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
    /// The state.
    pub state: UploadState,
    /// The version. Each change increases it by one.
    pub version: i64,
    /// One PUT, or parts.
    pub mode: Mode,
    /// The Kafka topic.
    pub topic: String,
    /// The record's key, if it is text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// The record's key in base64, if it is not text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_base64: Option<String>,
    /// The bucket of the object.
    pub bucket: String,
    /// The key of the object.
    pub object_key: String,
    /// The declared size in bytes.
    pub size: u64,
    /// The presigned PUT of a single PUT. Only in the response of open.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upload: Option<SignedRequest>,
    /// The size of every part except the last, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub part_size: Option<u64>,
    /// The number of parts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub part_count: Option<u32>,
    /// The first signed parts. Only in the response of open.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parts: Option<Vec<SignedPart>>,
    /// The parts that are stored in S3, while open.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uploaded_parts: Option<Vec<UploadedPart>>,
    /// The parts that S3 lacks, as inclusive ranges `[from, to]`, while open.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub missing_parts: Option<Vec<[u32; 2]>>,
    /// The next step. Absent if S3 was not queried: in the response of open, and in lists while open.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<Next>,
    /// The pointer, once the bytes are verified.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pointer: Option<Pointer>,
    /// How far the bytes were verified, once they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub integrity: Option<Integrity>,
    /// Where the pointer is in Kafka, once it is published.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub record: Option<Record>,
    /// Why the upload was rejected, was set back to open, or is not published yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<UploadError>,
    /// When the upload was opened.
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
    /// When the upload last changed.
    #[serde(with = "time::serde::rfc3339")]
    pub updated_at: OffsetDateTime,
    /// When an open upload expires.
    #[serde(with = "time::serde::rfc3339")]
    pub expires_at: OffsetDateTime,
    /// The same as seconds from now; 0 after it has passed.
    pub expires_in: u64,
}

/// A page of uploads, newest first.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[cfg_attr(feature = "openapi", schema(example = json!({"items": [{"id": "01934d2e-7c00-7000-8000-5f2b8c1d9e3a", "state": "published", "version": 4,
    "mode": "single", "topic": "videos", "bucket": "lfs", "object_key": "acme/videos/lfs/2026/11/21/01934d2e-7c00-7000-8000-5f2b8c1d9e3a",
    "size": 5, "key": "order-17", "created_at": "2026-11-21T06:35:00.5Z", "updated_at": "2026-11-21T06:35:59.2Z", "next": "none",
    "expires_at": "2026-11-21T07:35:00.5Z", "expires_in": 0, "integrity": "sha256",
    "pointer": {"kfs_lfs": 1, "bucket": "lfs", "key": "acme/videos/lfs/2026/11/21/01934d2e-7c00-7000-8000-5f2b8c1d9e3a", "size": 5,
        "sha256": "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824", "content_type": "video/mp4",
        "created_at": "2026-11-21T06:35:59Z"},
    "record": {"topic": "videos", "partition": 3, "offset": 42, "timestamp": "2026-11-21T06:35:59.2Z"}}], "next_cursor": null})))]
pub struct UploadPage {
    /// The uploads.
    pub items: Vec<Upload>,
    /// The `cursor` of the next page; null on the last page. With filters that match few uploads, a page may be short or
    /// empty without being the last.
    #[cfg_attr(feature = "openapi", schema(required = true))]
    pub next_cursor: Option<String>,
}

/// A transition of an upload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct Transition {
    /// When the transition happened.
    #[serde(with = "time::serde::rfc3339")]
    pub at: OffsetDateTime,
    /// The state before; null for the opening.
    #[cfg_attr(feature = "openapi", schema(required = true))]
    pub from: Option<UploadState>,
    /// The state after.
    pub to: UploadState,
    /// The reason.
    pub reason: String,
    /// The actor: `client:<sub>`, `broker`, `verifier`, `relay` or `sweeper`.
    pub by: String,
}

/// A page of an upload's transitions, oldest first.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[cfg_attr(feature = "openapi", schema(example = json!({"items": [
    {"at": "2026-11-21T06:35:00.5Z", "from": null, "to": "open", "reason": "opened", "by": "client:producer-1"},
    {"at": "2026-11-21T06:35:58Z", "from": "open", "to": "completing", "reason": "complete was asked for", "by": "client:producer-1"}], "next_cursor": null})))]
pub struct History {
    /// The transitions.
    pub items: Vec<Transition>,
    /// The `cursor` of the next page; null on the last page.
    #[cfg_attr(feature = "openapi", schema(required = true))]
    pub next_cursor: Option<String>,
}
