//! A pointer resolved.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{Integrity, SignedRequest};
use crate::checksum::Sha256;

#[cfg(feature = "openapi")]
use utoipa::{IntoParams, ToSchema};

/// What `POST /lfs/resolve` may be asked.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(IntoParams))]
#[cfg_attr(feature = "openapi", into_params(parameter_in = Query))]
#[serde(deny_unknown_fields)]
pub struct ResolveOptions {
    /// The `lfs-version-id` of the record, for versioned buckets; without it the version that was proved, where that is known.
    pub version_id: Option<String>,
    /// The topic that the pointer was read from: the object must belong to it. A pointer copied into another topic is
    /// refused then, as 403 `pointer-forbidden`.
    pub topic: Option<String>,
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
    /// How far the broker proved the bytes; null where it knows no such upload, or where the pointer or the object is not
    /// the one that was proved.
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
    /// How far the broker proved the bytes; null where it knows no such upload, or where the pointer or the object is not
    /// the one that was proved.
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
