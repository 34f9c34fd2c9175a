//! The error codes of problems: one list for the broker, its clients and the OpenAPI document.

use std::fmt;

use serde::{Deserialize, Serialize};

#[cfg(feature = "openapi")]
use utoipa::ToSchema;

macro_rules! error_codes {
    ($($name:ident = $text:literal,)+) => {
        /// The code of an error. Clients should decide by it. A newer broker may send codes that are not in this list.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[cfg_attr(feature = "openapi", derive(ToSchema))]
        #[serde(rename_all = "kebab-case")]
        pub enum ErrorCode {
            $(#[doc = concat!("`", $text, "`")] $name,)+
        }

        impl ErrorCode {
            /// Every code.
            pub const ALL: &[Self] = &[$(Self::$name,)+];

            /// The code in JSON.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)+
                }
            }
        }
    };
}

// The broker's `http/problem.rs` defines the status and the description of each code.
error_codes! {
    MalformedJson = "malformed-json",
    MalformedRequest = "malformed-request",
    IdempotencyKeyInvalid = "idempotency-key-invalid",
    Unauthenticated = "unauthenticated",
    InvalidToken = "invalid-token",
    InsufficientScope = "insufficient-scope",
    TopicForbidden = "topic-forbidden",
    TopicNotEnabled = "topic-not-enabled",
    PointerForbidden = "pointer-forbidden",
    HostForbidden = "host-forbidden",
    NotFound = "not-found",
    UploadNotFound = "upload-not-found",
    TopicNotFound = "topic-not-found",
    MethodNotAllowed = "method-not-allowed",
    RequestTimeout = "request-timeout",
    ObjectMissing = "object-missing",
    PartsIncomplete = "parts-incomplete",
    StateConflict = "state-conflict",
    IdempotencyInFlight = "idempotency-in-flight",
    CompletionInProgress = "completion-in-progress",
    UploadExpired = "upload-expired",
    UploadAborted = "upload-aborted",
    ObjectGone = "object-gone",
    RequestTooLarge = "request-too-large",
    UnsupportedMediaType = "unsupported-media-type",
    ValidationFailed = "validation-failed",
    ObjectTooLarge = "object-too-large",
    SizeMismatch = "size-mismatch",
    ChecksumMismatch = "checksum-mismatch",
    ObjectForeign = "object-foreign",
    ChecksumNotAllowed = "checksum-not-allowed",
    ContentTypeNotAllowed = "content-type-not-allowed",
    IdempotencyKeyReused = "idempotency-key-reused",
    RecordTooLarge = "record-too-large",
    Unpublishable = "unpublishable",
    PointerInvalid = "pointer-invalid",
    RateLimited = "rate-limited",
    QuotaBytesExceeded = "quota-bytes-exceeded",
    QuotaSessionsExceeded = "quota-sessions-exceeded",
    HeadersTooLarge = "headers-too-large",
    Internal = "internal",
    DependencyUnavailable = "dependency-unavailable",
    CompletionUnknown = "completion-unknown",
}

impl ErrorCode {
    /// The code of this name. None if this version of the client does not know it.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|code| code.as_str() == name)
    }
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_json_of_a_code_is_its_name() {
        for code in ErrorCode::ALL {
            assert_eq!(serde_json::to_value(code).unwrap(), code.as_str());
            assert_eq!(ErrorCode::named(code.as_str()), Some(*code));
        }
        assert_eq!(ErrorCode::named("a-code-of-tomorrow"), None);
    }
}
