//! Problems, and how the broker stands.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{ErrorCode, UploadState};

#[cfg(feature = "openapi")]
use utoipa::ToSchema;

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
    // Kept as it came: a newer broker may send one that `ErrorCode` lacks.
    /// The code to decide by.
    #[cfg_attr(feature = "openapi", schema(value_type = ErrorCode))]
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

impl Problem {
    /// The code to decide by; none where this version does not know it.
    pub fn known_code(&self) -> Option<ErrorCode> {
        ErrorCode::named(&self.code)
    }
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
#[cfg_attr(feature = "openapi", schema(example = json!({"clear_partition": true})))]
#[serde(deny_unknown_fields, default)]
pub struct Redrive {
    /// Forget the partition that was asked for at open: the key, or chance, decides.
    pub clear_partition: bool,
}

/// How things stand.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[cfg_attr(feature = "openapi", schema(example = json!({"uploads": {"open": 3, "verified": 1, "published": 1042}, "oldest_verified_seconds": 2,
    "outbox": {"waiting": 1, "parked": 0},
    "dependencies": {"database": {"ok": true}, "storage": {"ok": true}, "kafka": {"ok": false, "reason": "no broker answers"}}})))]
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
