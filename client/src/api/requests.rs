//! The requests for an upload: open, sign, complete, read, list.

use std::fmt;

use serde::de::{MapAccess, Visitor};
use serde::ser::SerializeMap as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use time::OffsetDateTime;
use uuid::Uuid;

use super::{Integrity, Record, SignedPart, UploadState};
use crate::checksum::{Algorithm, Sha256};
use crate::pointer::Pointer;

#[cfg(feature = "openapi")]
use utoipa::{IntoParams, ToSchema};

/// Opens an upload: `POST /lfs/uploads`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[cfg_attr(feature = "openapi", schema(example = json!({"topic": "videos", "key": "order-17", "size": 5,
    "sha256": "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824", "content_type": "video/mp4"})))]
#[serde(deny_unknown_fields)]
pub struct OpenUpload {
    /// The Kafka topic that receives the pointer.
    #[cfg_attr(feature = "openapi", schema(pattern = "^[A-Za-z0-9._-]{1,249}$"))]
    pub topic: String,
    /// The size in bytes; 0 is allowed.
    #[cfg_attr(feature = "openapi", schema(maximum = 5497558138880u64))]
    pub size: u64,
    /// The record's key as text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(max_length = 4096))]
    pub key: Option<String>,
    /// The record's key as base64, for keys that are not text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_base64: Option<String>,
    /// SHA-256 of the whole. If it is not known yet (a stream), send it with complete.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<Sha256>,
    /// The algorithm of a checksum that replaces `sha256`, if the topic's policy allows it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checksum_alg: Option<Algorithm>,
    /// The digest of `checksum_alg` in hex.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checksum: Option<String>,
    /// Media type of the bytes; `application/octet-stream` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content_type: Option<String>,
    /// The file name that a download gets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(min_length = 1, max_length = 255, pattern = r"^[^/\\\x00-\x1f\x7f-\x9f]*$"))]
    pub filename: Option<String>,
    /// Headers of the record in Kafka, in order. Names that begin with `lfs-` are refused.
    #[serde(default, skip_serializing_if = "Headers::is_empty")]
    #[cfg_attr(feature = "openapi", schema(value_type = BTreeMap<String, String>))]
    pub headers: Headers,
    /// The partition of the record. When absent, the partitioner chooses it by the key.
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
    /// With `deferred`, the client sends the hashes of the parts with each `/parts` call.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub part_hashes: Option<PartHashes>,
}

/// When the client sends the hashes of the parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum PartHashes {
    /// With each call to `/parts`.
    Deferred,
}

/// Record headers: names and values in the order of the JSON object. Each name occurs once.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Headers(pub Vec<(String, String)>);

impl Headers {
    /// Whether there are no headers.
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

/// Requests part URLs: part numbers, or parts with their hashes if the hashes are deferred.
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
    /// In the order of the request.
    pub parts: Vec<SignedPart>,
}

/// Completes an upload.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[cfg_attr(feature = "openapi", schema(example = json!({"sha256": "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"})))]
#[serde(deny_unknown_fields)]
pub struct CompleteUpload {
    /// SHA-256 of the whole. Required if open had no checksum.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<Sha256>,
    /// Accepted from clients that send part lists, and ignored: the broker lists the parts in S3.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(ignore))]
    pub parts: Option<serde_json::Value>,
}

// The broker's OpenAPI document has one schema for each state, made from this type and its example.
/// The response of complete. Its members depend on the state: `published` (200) has all, `verified` (202: the pointer is
/// durable and will be published) has no `record`, `completing` (202: verification continues) has only the id.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[cfg_attr(feature = "openapi", schema(example = json!({"id": "01934d2e-7c00-7000-8000-5f2b8c1d9e3a", "state": "published",
    "pointer": {"kfs_lfs": 1, "bucket": "lfs", "key": "acme/videos/lfs/2026/11/21/01934d2e-7c00-7000-8000-5f2b8c1d9e3a", "size": 5,
        "sha256": "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824", "content_type": "video/mp4",
        "created_at": "2026-11-21T06:35:59Z"},
    "integrity": "sha256", "record": {"topic": "videos", "partition": 3, "offset": 42, "timestamp": "2026-11-21T06:35:59.2Z"}})))]
pub struct Completed {
    /// The upload's id.
    pub id: Uuid,
    /// The state.
    pub state: UploadState,
    /// The record's value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pointer: Option<Pointer>,
    /// How far the bytes were verified.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub integrity: Option<Integrity>,
    /// Where the pointer is in Kafka.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub record: Option<Record>,
}

/// The query of `GET /lfs/uploads/{id}`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(IntoParams))]
#[cfg_attr(feature = "openapi", into_params(parameter_in = Query))]
#[serde(deny_unknown_fields)]
pub struct ReadUpload {
    /// Wait up to this many seconds (at most 30) for a change.
    #[cfg_attr(feature = "openapi", param(maximum = 30))]
    pub wait: Option<u64>,
    /// Answer as soon as the version differs from this one. When absent, from the version at the start of the request.
    pub version: Option<i64>,
}

/// The page of an upload's history.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(IntoParams))]
#[cfg_attr(feature = "openapi", into_params(parameter_in = Query))]
#[serde(deny_unknown_fields)]
pub struct ReadHistory {
    /// Items per page: 1 to 1,000; 200 when absent.
    #[cfg_attr(feature = "openapi", param(minimum = 1, maximum = 1000))]
    pub limit: Option<u32>,
    /// The `next_cursor` of the page before.
    pub cursor: Option<String>,
}

/// The filters of `GET /lfs/uploads`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[cfg_attr(feature = "openapi", derive(IntoParams))]
#[cfg_attr(feature = "openapi", into_params(parameter_in = Query))]
pub struct ListUploads {
    /// Only this topic.
    pub topic: Option<String>,
    /// Only these states. The parameter may be repeated.
    #[cfg_attr(feature = "openapi", param(required = false))]
    pub state: Vec<UploadState>,
    /// Only records whose key begins with this text.
    pub key_prefix: Option<String>,
    /// Only uploads created at this time or later.
    pub created_after: Option<OffsetDateTime>,
    /// Only uploads created before this time.
    pub created_before: Option<OffsetDateTime>,
    /// Only this tenant. For administrators.
    pub tenant: Option<String>,
    /// Items per page: 1 to 200; 50 when absent.
    #[cfg_attr(feature = "openapi", param(minimum = 1, maximum = 200))]
    pub limit: Option<u32>,
    /// The `next_cursor` of the page before, with the same filters.
    pub cursor: Option<String>,
}
