//! Problems: the one place that knows status codes.
//!
//! Every error becomes a code, every code has one row in [`CATALOG`], and the answer is RFC 9457's
//! `application/problem+json`. Nothing internal is told: no address, no stack, no credential.

use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use lfs_broker_client::api::{FieldError, UploadState};

use crate::broker::Error;
use crate::{policy, store};

/// What a code means.
pub(crate) struct Kind {
    pub(crate) code: &'static str,
    pub(crate) status: u16,
    pub(crate) retryable: bool,
    pub(crate) title: &'static str,
    pub(crate) meaning: &'static str,
}

const fn kind(status: u16, code: &'static str, retryable: bool, title: &'static str, meaning: &'static str) -> Kind {
    Kind { code, status, retryable, title, meaning }
}

/// Every code of the contract.
pub(crate) const CATALOG: &[Kind] = &[
    kind(400, "malformed-json", false, "Malformed JSON", "The body is not JSON, repeats a member, or is nested too deeply."),
    kind(
        400,
        "malformed-request",
        false,
        "Malformed request",
        "What came is not a request of HTTP/1.1; the connection is closed.",
    ),
    kind(
        400,
        "idempotency-key-invalid",
        false,
        "Invalid Idempotency-Key",
        "An Idempotency-Key has 1 to 255 visible ASCII characters, bare or quoted, and comes once.",
    ),
    kind(401, "unauthenticated", false, "Not authenticated", "The request needs a bearer token."),
    kind(
        401,
        "invalid-token",
        false,
        "Invalid token",
        "The token is expired, not for this broker, or not signed by a key it trusts.",
    ),
    kind(403, "insufficient-scope", false, "Insufficient scope", "The token lacks the scope that this route needs."),
    kind(403, "topic-forbidden", false, "Topic forbidden", "The token does not name this topic."),
    kind(
        403,
        "topic-not-enabled",
        false,
        "Topic not enabled",
        "The topic takes no uploads: an administrator enables it with PUT /lfs/topics/{topic}.",
    ),
    kind(403, "pointer-forbidden", false, "Pointer forbidden", "The pointer names an object outside what the caller may read."),
    kind(404, "not-found", false, "Not found", "There is no such route."),
    kind(404, "upload-not-found", false, "Upload not found", "There is no such upload, or it is not yours."),
    kind(404, "topic-not-found", false, "Topic not found", "Kafka has no such topic, or no policy is stored for it."),
    kind(
        405,
        "method-not-allowed",
        false,
        "Method not allowed",
        "The route does not take this method; Allow names those it takes.",
    ),
    kind(408, "request-timeout", true, "Request time-out", "The request's head or its body did not arrive in time."),
    kind(
        409,
        "object-missing",
        true,
        "Object missing",
        "Nothing was put in S3: send the bytes, then complete again. The upload is open.",
    ),
    kind(
        409,
        "parts-incomplete",
        true,
        "Parts incomplete",
        "Some parts are not in S3: send them, then complete again. The upload is open.",
    ),
    kind(409, "state-conflict", false, "State conflict", "The upload's state does not allow this."),
    kind(
        409,
        "idempotency-in-flight",
        true,
        "Request in flight",
        "The first request with this Idempotency-Key is being stored at this moment.",
    ),
    kind(
        409,
        "completion-in-progress",
        true,
        "Completion in progress",
        "The upload is being completed; ask again when that has ended.",
    ),
    kind(410, "upload-expired", false, "Upload expired", "The upload was not completed in time: open another."),
    kind(410, "upload-aborted", false, "Upload aborted", "The upload was taken back: open another."),
    kind(410, "object-gone", false, "Object gone", "The object that the pointer names does not exist any more."),
    kind(413, "request-too-large", false, "Request too large", "The body is larger than this route takes."),
    kind(415, "unsupported-media-type", false, "Unsupported media type", "The body must be JSON, and Content-Type must say so."),
    kind(422, "validation-failed", false, "Validation failed", "The request has a wrong shape; errors names the places."),
    kind(422, "object-too-large", false, "Object too large", "The upload is larger than the topic allows."),
    kind(422, "size-mismatch", false, "Size mismatch", "S3 holds another number of bytes than was promised."),
    kind(422, "checksum-mismatch", false, "Checksum mismatch", "S3 holds other bytes than were promised."),
    kind(422, "object-foreign", false, "Foreign object", "The object in S3 was not written through this upload's URLs."),
    kind(422, "checksum-not-allowed", false, "Checksum not allowed", "The topic does not take this checksum."),
    kind(422, "content-type-not-allowed", false, "Content type not allowed", "The topic does not take this media type."),
    kind(422, "idempotency-key-reused", false, "Idempotency-Key reused", "The key was used for another request."),
    kind(422, "record-too-large", false, "Record too large", "The record's headers have more than 8 KiB."),
    kind(422, "pointer-invalid", false, "Invalid pointer", "The body is not a pointer."),
    kind(
        429,
        "rate-limited",
        true,
        "Rate limited",
        "The tenant sends too many requests, or the address too many tokens that are not valid: slow down.",
    ),
    kind(
        429,
        "quota-bytes-exceeded",
        true,
        "Byte quota exceeded",
        "The tenant's open uploads reserve as many bytes as they may.",
    ),
    kind(429, "quota-sessions-exceeded", true, "Session quota exceeded", "The tenant has as many open uploads as it may."),
    kind(
        431,
        "headers-too-large",
        false,
        "Headers too large",
        "The request's headers are more than 100, or have more than 16 KiB.",
    ),
    kind(500, "internal", false, "Internal error", "A bug in the broker; its log has the request id."),
    kind(
        503,
        "dependency-unavailable",
        true,
        "Dependency unavailable",
        "The database, S3 or Kafka did not answer, or the broker has too much to do; ask again.",
    ),
    kind(
        503,
        "completion-unknown",
        true,
        "Completion unknown",
        "Whether S3 completed the upload is not known yet; asking again resolves it.",
    ),
];

/// A problem on its way out; [`super::edge`] adds the request's id and writes it.
#[derive(Debug, Clone)]
pub(crate) struct Problem {
    pub(crate) code: &'static str,
    pub(crate) detail: String,
    pub(crate) state: Option<UploadState>,
    pub(crate) errors: Vec<FieldError>,
    /// How soon asking again makes sense, where it does.
    pub(crate) retry_after_seconds: u64,
}

impl Problem {
    pub(crate) fn new(code: &'static str, detail: impl Into<String>) -> Self {
        Self { code, detail: detail.into(), state: None, errors: Vec::new(), retry_after_seconds: 1 }
    }

    pub(crate) fn invalid(errors: Vec<FieldError>) -> Self {
        let detail = errors.first().map_or("the request is not valid", |error| error.detail.as_str()).to_owned();
        Self { errors, ..Self::new("validation-failed", detail) }
    }

    /// The row of the catalog.
    pub(crate) fn kind(&self) -> &'static Kind {
        kind_of(self.code).expect("a test looks every code up")
    }
}

/// A code's row.
pub(crate) fn kind_of(code: &str) -> Option<&'static Kind> {
    CATALOG.iter().find(|kind| kind.code == code)
}

impl From<Error> for Problem {
    fn from(error: Error) -> Self {
        let code = match &error {
            Error::Session { refusal, state, items } => {
                let code = kind_of(refusal.code()).map_or("state-conflict", |kind| kind.code);
                return Self { state: Some(*state), errors: items.clone(), ..Self::new(code, refusal.to_string()) };
            }
            Error::Policy(policy::Refusal::Invalid(errors)) => return Self::invalid(errors.clone()),
            Error::Policy(policy::Refusal::RecordTooLarge(_)) => "record-too-large",
            Error::Policy(policy::Refusal::TopicNotEnabled(_) | policy::Refusal::NoBucket(_)) => "topic-not-enabled",
            Error::Policy(policy::Refusal::TooLarge { .. }) => "object-too-large",
            Error::Policy(policy::Refusal::ChecksumNotAllowed(_)) => "checksum-not-allowed",
            Error::Policy(policy::Refusal::ContentTypeNotAllowed(_)) => "content-type-not-allowed",
            Error::NotFound => "upload-not-found",
            Error::TopicNotFound(_) | Error::PolicyNotFound(_) => "topic-not-found",
            Error::TopicForbidden(_) => "topic-forbidden",
            Error::KeyInvalid => "idempotency-key-invalid",
            Error::KeyReused => "idempotency-key-reused",
            Error::KeyInFlight => "idempotency-in-flight",
            Error::TooManySessions => "quota-sessions-exceeded",
            Error::TooManyBytes => "quota-bytes-exceeded",
            Error::PointerInvalid(_) => "pointer-invalid",
            Error::PointerForbidden(_) => "pointer-forbidden",
            Error::ObjectGone => "object-gone",
            Error::PointerSize { .. } => "size-mismatch",
            Error::Unknown => "completion-unknown",
            Error::Full => "dependency-unavailable",
            Error::Store(store::Error::Corrupt { .. }) => {
                return Self::ours("internal", &error, "a row of the database is not as it should be");
            }
            Error::Store(_) => return Self::ours("dependency-unavailable", &error, "the database did not answer"),
            Error::Objects(_) => return Self::ours("dependency-unavailable", &error, "object storage did not answer"),
            Error::Kafka(_) => return Self::ours("dependency-unavailable", &error, "Kafka did not answer"),
        };
        Self::new(code, error.to_string())
    }
}

impl Problem {
    /// Logs the whole error and tells the caller the little that helps.
    fn ours(code: &'static str, error: &Error, told: &str) -> Self {
        tracing::error!(%error, code, "answered {code}: {error}");
        Self::new(code, told)
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.kind().status).expect("the catalog has real codes");
        let mut response = status.into_response();
        response.extensions_mut().insert(self);
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_catalog_is_the_contracts_error_table() {
        assert_eq!(CATALOG.len(), 41);
        for kind in CATALOG {
            assert!(StatusCode::from_u16(kind.status).is_ok());
            assert_eq!(CATALOG.iter().filter(|other| other.code == kind.code).count(), 1, "{}", kind.code);
            assert!(kind.status != 503 || kind.retryable);
        }
    }
}
