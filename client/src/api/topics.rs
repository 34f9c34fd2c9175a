//! The policy of a topic: the rules for its uploads.

use serde::{Deserialize, Serialize};

use super::{Integrity, MAX_OBJECT_BYTES};
use crate::checksum::Algorithm;

#[cfg(feature = "openapi")]
use utoipa::{IntoParams, ToSchema};

/// The policy of a topic: the rules for its uploads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[cfg_attr(feature = "openapi", schema(example = json!({"enabled": true, "min_bytes": 8388608, "max_bytes": 1073741824_u64,
    "bucket": null, "prefix": "lake", "checksums": ["sha256"], "min_integrity": "parts-sha256", "content_types": ["video/*"],
    "session_seconds": 3600, "session_max_seconds": 86400, "url_seconds": 900, "kms_key_id": null, "retention": "keep"})))]
#[serde(deny_unknown_fields, default)]
pub struct Policy {
    /// Whether uploads may be opened.
    pub enabled: bool,
    /// Advice to clients: send fewer bytes than this inline, as the record's value.
    #[cfg_attr(feature = "openapi", schema(maximum = 5497558138880u64))]
    pub min_bytes: u64,
    /// The largest upload in bytes.
    #[cfg_attr(feature = "openapi", schema(maximum = 5497558138880u64))]
    pub max_bytes: u64,
    /// The bucket of the objects. When null, the broker's default bucket.
    pub bucket: Option<String>,
    /// The prefix of the object keys.
    pub prefix: Option<String>,
    /// The checksum algorithms that a client may declare.
    pub checksums: Vec<Algorithm>,
    /// The lowest integrity level at which a pointer is published.
    pub min_integrity: Integrity,
    // No line may contain an asterisk before a slash: it would end the comment in generated code.
    /// The allowed media types, each a type and a subtype. The subtype `*` allows every subtype of the type, and `*` for
    /// both allows every media type.
    pub content_types: Vec<String>,
    /// How long an upload stays open without further signing, in seconds.
    pub session_seconds: u64,
    /// How long an upload stays open at most, in seconds, even if parts are signed again.
    pub session_max_seconds: u64,
    /// The lifetime of a presigned URL in seconds.
    pub url_seconds: u64,
    /// The KMS key that S3 encrypts with. When null, the bucket's default encryption applies.
    #[cfg_attr(feature = "openapi", schema(min_length = 1, max_length = 2048, pattern = "^[!-~]*$"))]
    pub kms_key_id: Option<String>,
    /// The retention of published objects: they are kept.
    pub retention: Retention,
}

/// The retention of published objects.
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
            max_bytes: MAX_OBJECT_BYTES,
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

/// A page of topic policies, ordered by topic name.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[cfg_attr(feature = "openapi", schema(example = json!({"items": [{"topic": "videos", "policy": {"enabled": true, "min_bytes": 8388608, "max_bytes": 1073741824_u64,
    "bucket": null, "prefix": null, "checksums": ["sha256"], "min_integrity": "parts-sha256", "content_types": ["video/*"],
    "session_seconds": 3600, "session_max_seconds": 86400, "url_seconds": 900, "kms_key_id": null, "retention": "keep"}}],
    "next_cursor": null})))]
pub struct TopicPage {
    /// The policies.
    pub items: Vec<TopicPolicy>,
    /// The `cursor` of the next page; null on the last page.
    #[cfg_attr(feature = "openapi", schema(required = true))]
    pub next_cursor: Option<String>,
}

/// The query of `GET /lfs/topics`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(IntoParams))]
#[cfg_attr(feature = "openapi", into_params(parameter_in = Query))]
#[serde(deny_unknown_fields)]
pub struct ListTopics {
    /// Items per page: 1 to 200; 50 when absent.
    #[cfg_attr(feature = "openapi", param(minimum = 1, maximum = 200))]
    pub limit: Option<u32>,
    /// The `next_cursor` of the page before.
    pub cursor: Option<String>,
}
