//! Problems, and the types of the operators' routes: redrive and statistics.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{ErrorCode, UploadState};

#[cfg(feature = "openapi")]
use utoipa::ToSchema;

/// An error in the format of RFC 9457 (`application/problem+json`).
#[derive(Debug, Clone, Serialize, Deserialize, thiserror::Error)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[cfg_attr(feature = "openapi", schema(example = json!({"type": "/problems/size-mismatch", "title": "Size mismatch", "status": 422,
    "detail": "declared 5 bytes, found 4", "code": "size-mismatch", "request_id": "9a0f3c52-6b1e-4a3e-9d55-2f0e4f7f5c11",
    "retryable": false, "upload_state": "rejected"})))]
#[error("{status} {code}: {detail}")]
pub struct Problem {
    /// `/problems/<code>`, the description of this kind of error.
    #[serde(rename = "type")]
    pub kind: String,
    /// A short title of the kind of error.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// A description of the error in this request.
    pub detail: String,
    // A string, because a newer broker may send a code that `ErrorCode` does not have.
    /// The error code. Clients should decide by it.
    #[cfg_attr(feature = "openapi", schema(value_type = ErrorCode))]
    pub code: String,
    /// The request's id, which the broker's logs contain.
    pub request_id: String,
    /// Whether the same request may succeed later.
    pub retryable: bool,
    /// The upload's state, if the state caused the error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upload_state: Option<UploadState>,
    /// The members of the request, or the parts, that are wrong.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<FieldError>,
}

impl Problem {
    /// The error code. None if this version of the client does not know it.
    pub fn known_code(&self) -> Option<ErrorCode> {
        ErrorCode::named(&self.code)
    }
}

/// One wrong member of a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct FieldError {
    /// A JSON pointer (RFC 6901) to the member.
    pub pointer: String,
    /// The error in this member.
    pub detail: String,
}

impl FieldError {
    /// An error at a JSON pointer (RFC 6901).
    pub fn new(pointer: &str, detail: impl Into<String>) -> Self {
        Self { pointer: pointer.to_owned(), detail: detail.into() }
    }
}

/// Requests that a verified upload's pointer is published now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[cfg_attr(feature = "openapi", schema(example = json!({"clear_partition": true})))]
#[serde(deny_unknown_fields, default)]
pub struct Redrive {
    /// Ignore the partition of the open request. The partitioner chooses one by the key, or at random without a key.
    pub clear_partition: bool,
}

/// The broker's statistics.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[cfg_attr(feature = "openapi", schema(example = json!({"uploads": {"open": 3, "verified": 1, "published": 1042}, "oldest_verified_seconds": 2,
    "outbox": {"waiting": 1, "parked": 0},
    "dependencies": {"database": {"ok": true}, "storage": {"ok": true}, "kafka": {"ok": false, "reason": "no broker answers"}}})))]
pub struct Stats {
    /// The number of uploads in each state.
    pub uploads: BTreeMap<String, u64>,
    /// The age in seconds of the oldest verified upload that is not published yet; null if there is none.
    #[cfg_attr(feature = "openapi", schema(required = true))]
    pub oldest_verified_seconds: Option<u64>,
    /// Pointers that are not in Kafka yet.
    pub outbox: OutboxDepth,
    /// Whether the broker's dependencies answer.
    pub dependencies: Dependencies,
}

/// Pointers that are not in Kafka yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct OutboxDepth {
    /// Not sent yet, or being sent.
    pub waiting: u64,
    /// Refused by Kafka. The broker retries later.
    pub parked: u64,
}

/// The broker's dependencies.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct Dependencies {
    /// PostgreSQL.
    pub database: Dependency,
    /// S3.
    pub storage: Dependency,
    /// Kafka. While it is down, complete answers 202 and pointers stay in the outbox.
    pub kafka: Dependency,
}

/// One dependency of the broker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
pub struct Dependency {
    /// Whether it answers.
    pub ok: bool,
    /// The reason, if the dependency does not answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}
