//! Resolving a pointer.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{Integrity, SignedRequest};
use crate::checksum::Sha256;

#[cfg(feature = "openapi")]
use utoipa::{IntoParams, ToSchema};

/// The query of `POST /lfs/resolve`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(IntoParams))]
#[cfg_attr(feature = "openapi", into_params(parameter_in = Query))]
#[serde(deny_unknown_fields)]
pub struct ResolveOptions {
    /// The `lfs-version-id` of the record, for versioned buckets. When absent, the verified version if the broker knows
    /// it.
    pub version_id: Option<String>,
    /// The topic of the record. The object must belong to it: a pointer that was copied into another topic is refused as
    /// 403 `pointer-forbidden`.
    pub topic: Option<String>,
    /// Only check the pointer and the object. No GET is signed.
    #[serde(default)]
    pub validate: bool,
}

/// A resolved pointer: a signed GET of the bytes.
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
    /// The size in bytes, compared with the object in S3.
    pub size: u64,
    // openapi-generator's Go client cannot check the pattern of `Sha256` on a value that may be null.
    /// The SHA-256 that the bytes must have, in lower-case hex; null if the pointer has none.
    #[cfg_attr(feature = "openapi", schema(value_type = Option<String>, required = true))]
    pub sha256: Option<Sha256>,
    /// The media type that the producer declared.
    #[cfg_attr(feature = "openapi", schema(required = true))]
    pub content_type: Option<String>,
    /// The file name that the producer declared.
    #[cfg_attr(feature = "openapi", schema(required = true))]
    pub filename: Option<String>,
    /// How far the broker verified the bytes. Null if it does not know the upload, or if the pointer or the object
    /// differs from the verified one.
    #[cfg_attr(feature = "openapi", schema(required = true))]
    pub integrity: Option<Integrity>,
    /// The upload's id; null if the broker does not know the upload.
    #[cfg_attr(feature = "openapi", schema(required = true))]
    pub upload_id: Option<Uuid>,
}

/// A valid pointer.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[cfg_attr(feature = "openapi", schema(example = json!({"valid": true, "size": 5, "integrity": "sha256"})))]
pub struct Validated {
    /// Always true. An invalid pointer is a problem response.
    pub valid: bool,
    /// The size in bytes.
    pub size: u64,
    /// How far the broker verified the bytes. Null if it does not know the upload, or if the pointer or the object
    /// differs from the verified one.
    #[cfg_attr(feature = "openapi", schema(required = true))]
    pub integrity: Option<Integrity>,
}

/// The response of `POST /lfs/resolve`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[serde(untagged)]
pub enum ResolveAnswer {
    /// The signed GET.
    Resolved(Resolved),
    /// The response with `?validate=true`.
    Validated(Validated),
}
