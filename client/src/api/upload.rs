//! An upload: its state, its parts, its proof and its history.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::pointer::Pointer;

#[cfg(feature = "openapi")]
use utoipa::ToSchema;

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

impl SignedRequest {
    /// A GET that somebody signed just now for so long, as [`Access`](crate::Access) gives it out.
    pub fn get(url: impl Into<String>, life: Duration) -> Self {
        Self {
            method: "GET".to_owned(),
            url: url.into(),
            headers: BTreeMap::new(),
            expires_at: OffsetDateTime::now_utc() + life,
            expires_in: life.as_secs(),
        }
    }
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
    /// Give it as `cursor` for the next page; null at the end. With filters that match little a page may be short or empty
    /// and not be the last one.
    #[cfg_attr(feature = "openapi", schema(required = true))]
    pub next_cursor: Option<String>,
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

/// A page of an upload's transitions, oldest first.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[cfg_attr(feature = "openapi", schema(example = json!({"items": [
    {"at": "2026-11-21T06:35:00.5Z", "from": null, "to": "open", "reason": "opened", "by": "client:producer-1"},
    {"at": "2026-11-21T06:35:58Z", "from": "open", "to": "completing", "reason": "complete was asked for", "by": "client:producer-1"}], "next_cursor": null})))]
pub struct History {
    /// The transitions.
    pub items: Vec<Transition>,
    /// Give it as `cursor` for the next page; null at the end.
    #[cfg_attr(feature = "openapi", schema(required = true))]
    pub next_cursor: Option<String>,
}
