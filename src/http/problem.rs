//! Problems: the one place that knows status codes.
//!
//! Every error becomes a code, [`kind`] says what each code means, and the answer is RFC 9457's
//! `application/problem+json`. Nothing internal is told: no address, no stack, no credential.

use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use lfs_broker_client::api::{ErrorCode, FieldError, UploadState};

use crate::broker::Error;
use crate::{policy, store};

/// What a code means.
pub(crate) struct Kind {
    pub(crate) status: u16,
    pub(crate) retryable: bool,
    pub(crate) title: &'static str,
    pub(crate) meaning: &'static str,
}

/// Every code of the contract. A code without a row does not compile.
#[expect(clippy::too_many_lines, reason = "one row a code")]
pub(crate) fn kind(code: ErrorCode) -> Kind {
    let kind = |status, retryable, title, meaning| Kind { status, retryable, title, meaning };
    match code {
        ErrorCode::MalformedJson => {
            kind(400, false, "Malformed JSON", "The body is not JSON, repeats a member, or is nested too deeply.")
        }
        ErrorCode::MalformedRequest => {
            kind(400, false, "Malformed request", "What came is not a request of HTTP/1.1; the connection is closed.")
        }
        ErrorCode::IdempotencyKeyInvalid => kind(
            400,
            false,
            "Invalid Idempotency-Key",
            "An Idempotency-Key has 1 to 255 visible ASCII characters, bare or quoted, and comes once.",
        ),
        ErrorCode::Unauthenticated => kind(401, false, "Not authenticated", "The request needs a bearer token."),
        ErrorCode::InvalidToken => {
            kind(401, false, "Invalid token", "The token is expired, not for this broker, or not signed by a key it trusts.")
        }
        ErrorCode::InsufficientScope => {
            kind(403, false, "Insufficient scope", "The token lacks the scope that this route needs.")
        }
        ErrorCode::TopicForbidden => kind(
            403,
            false,
            "Topic forbidden",
            "The token does not name this topic, or it is one of Kafka's or the broker's own.",
        ),
        ErrorCode::TopicNotEnabled => kind(
            403,
            false,
            "Topic not enabled",
            "The topic takes no uploads: an administrator enables it with PUT /lfs/topics/{topic}.",
        ),
        ErrorCode::PointerForbidden => {
            kind(403, false, "Pointer forbidden", "The pointer names an object outside what the caller may read.")
        }
        ErrorCode::HostForbidden => kind(
            403,
            false,
            "Host forbidden",
            "A broker without tokens answers under names of this machine only (Host), and no pages of elsewhere (Origin).",
        ),
        ErrorCode::NotFound => kind(404, false, "Not found", "There is no such route."),
        ErrorCode::UploadNotFound => kind(404, false, "Upload not found", "There is no such upload, or it is not yours."),
        ErrorCode::TopicNotFound => {
            kind(404, false, "Topic not found", "Kafka has no such topic, or no policy is stored for it.")
        }
        ErrorCode::MethodNotAllowed => {
            kind(405, false, "Method not allowed", "The route does not take this method; Allow names those it takes.")
        }
        ErrorCode::RequestTimeout => {
            kind(408, true, "Request time-out", "The request's head or its body did not arrive in time.")
        }
        ErrorCode::ObjectMissing => {
            kind(409, true, "Object missing", "Nothing was put in S3: send the bytes, then complete again. The upload is open.")
        }
        ErrorCode::PartsIncomplete => {
            kind(409, true, "Parts incomplete", "Some parts are not in S3: send them, then complete again. The upload is open.")
        }
        ErrorCode::StateConflict => kind(409, false, "State conflict", "The upload's state does not allow this."),
        ErrorCode::IdempotencyInFlight => {
            kind(409, true, "Request in flight", "The first request with this Idempotency-Key is being stored at this moment.")
        }
        ErrorCode::CompletionInProgress => {
            kind(409, true, "Completion in progress", "The upload is being completed; ask again when that has ended.")
        }
        ErrorCode::UploadExpired => kind(410, false, "Upload expired", "The upload was not completed in time: open another."),
        ErrorCode::UploadAborted => kind(410, false, "Upload aborted", "The upload was taken back: open another."),
        ErrorCode::ObjectGone => kind(410, false, "Object gone", "The object that the pointer names does not exist any more."),
        ErrorCode::RequestTooLarge => kind(413, false, "Request too large", "The body is larger than this route takes."),
        ErrorCode::UnsupportedMediaType => {
            kind(415, false, "Unsupported media type", "The body must be JSON, and Content-Type must say so.")
        }
        ErrorCode::ValidationFailed => {
            kind(422, false, "Validation failed", "The request has a wrong shape; errors names the places.")
        }
        ErrorCode::ObjectTooLarge => kind(422, false, "Object too large", "The upload is larger than the topic allows."),
        ErrorCode::SizeMismatch => kind(422, false, "Size mismatch", "S3 holds another number of bytes than was promised."),
        ErrorCode::ChecksumMismatch => {
            kind(422, false, "Checksum mismatch", "S3 holds other bytes than were promised, or than the pointer says.")
        }
        ErrorCode::ObjectForeign => {
            kind(422, false, "Foreign object", "The object in S3 was not written through this upload's URLs.")
        }
        ErrorCode::ChecksumNotAllowed => kind(422, false, "Checksum not allowed", "The topic does not take this checksum."),
        ErrorCode::ContentTypeNotAllowed => {
            kind(422, false, "Content type not allowed", "The topic does not take this media type.")
        }
        ErrorCode::IdempotencyKeyReused => kind(422, false, "Idempotency-Key reused", "The key was used for another request."),
        ErrorCode::RecordTooLarge => kind(
            422,
            false,
            "Record too large",
            "The record's headers have more than 8 KiB, or the whole record more than the topic's max.message.bytes.",
        ),
        ErrorCode::Unpublishable => kind(
            422,
            false,
            "Unpublishable",
            "Kafka refuses the upload's pointer for good, and an administrator gave it up: open another.",
        ),
        ErrorCode::PointerInvalid => kind(422, false, "Invalid pointer", "The body is not a pointer."),
        ErrorCode::RateLimited => kind(
            429,
            true,
            "Rate limited",
            "The tenant sends too many requests, or the address too many tokens that are not valid: slow down.",
        ),
        ErrorCode::QuotaBytesExceeded => {
            kind(429, true, "Byte quota exceeded", "The tenant's open uploads reserve as many bytes as they may.")
        }
        ErrorCode::QuotaSessionsExceeded => {
            kind(429, true, "Session quota exceeded", "The tenant has as many open uploads as it may.")
        }
        ErrorCode::HeadersTooLarge => {
            kind(431, false, "Headers too large", "The request's headers are more than 100, or have more than 16 KiB.")
        }
        ErrorCode::Internal => kind(500, false, "Internal error", "A bug in the broker; its log has the request id."),
        ErrorCode::DependencyUnavailable => kind(
            503,
            true,
            "Dependency unavailable",
            "The database, S3 or Kafka did not answer or refused, or the broker has too much to do; ask again. A refusal needs an operator.",
        ),
        ErrorCode::CompletionUnknown => {
            kind(503, true, "Completion unknown", "Whether S3 completed the upload is not known yet; asking again resolves it.")
        }
    }
}

/// A problem on its way out; [`super::edge`] adds the request's id and writes it.
#[derive(Debug, Clone)]
pub(crate) struct Problem {
    pub(crate) code: ErrorCode,
    pub(crate) detail: String,
    pub(crate) state: Option<UploadState>,
    pub(crate) errors: Vec<FieldError>,
    /// How soon asking again makes sense, where it does.
    pub(crate) retry_after_seconds: u64,
}

impl Problem {
    pub(crate) fn new(code: ErrorCode, detail: impl Into<String>) -> Self {
        Self { code, detail: detail.into(), state: None, errors: Vec::new(), retry_after_seconds: 1 }
    }

    pub(crate) fn invalid(errors: Vec<FieldError>) -> Self {
        let detail = errors.first().map_or("the request is not valid", |error| error.detail.as_str()).to_owned();
        Self { errors, ..Self::new(ErrorCode::ValidationFailed, detail) }
    }

    /// What its code means.
    pub(crate) fn kind(&self) -> Kind {
        kind(self.code)
    }
}

impl From<Error> for Problem {
    fn from(error: Error) -> Self {
        let code = match &error {
            Error::Session { refusal, state, items } => {
                let code = ErrorCode::named(refusal.code()).unwrap_or(ErrorCode::StateConflict);
                return Self { state: Some(*state), errors: items.clone(), ..Self::new(code, refusal.to_string()) };
            }
            Error::Policy(policy::Refusal::Invalid(errors)) => return Self::invalid(errors.clone()),
            Error::Policy(policy::Refusal::RecordTooLarge(_)) => ErrorCode::RecordTooLarge,
            Error::Policy(policy::Refusal::TopicNotEnabled(_) | policy::Refusal::NoBucket(_)) => ErrorCode::TopicNotEnabled,
            Error::Policy(policy::Refusal::TooLarge { .. }) => ErrorCode::ObjectTooLarge,
            Error::Policy(policy::Refusal::ChecksumNotAllowed(_)) => ErrorCode::ChecksumNotAllowed,
            Error::Policy(policy::Refusal::ContentTypeNotAllowed(_)) => ErrorCode::ContentTypeNotAllowed,
            Error::NotFound => ErrorCode::UploadNotFound,
            Error::TopicNotFound(_) | Error::PolicyNotFound(_) => ErrorCode::TopicNotFound,
            Error::RecordTooLarge { .. } => ErrorCode::RecordTooLarge,
            Error::TopicForbidden(_) | Error::TopicInternal(_) => ErrorCode::TopicForbidden,
            Error::KeyInvalid => ErrorCode::IdempotencyKeyInvalid,
            Error::KeyReused => ErrorCode::IdempotencyKeyReused,
            Error::KeyInFlight => ErrorCode::IdempotencyInFlight,
            Error::TooManySessions => ErrorCode::QuotaSessionsExceeded,
            Error::TooManyBytes => ErrorCode::QuotaBytesExceeded,
            Error::PointerInvalid(_) => ErrorCode::PointerInvalid,
            Error::PointerForbidden(_) => ErrorCode::PointerForbidden,
            Error::ObjectGone => ErrorCode::ObjectGone,
            Error::PointerSize { .. } => ErrorCode::SizeMismatch,
            Error::PointerChecksum { .. } => ErrorCode::ChecksumMismatch,
            Error::Unknown => ErrorCode::CompletionUnknown,
            Error::Full => ErrorCode::DependencyUnavailable,
            Error::Store(store::Error::Corrupt { .. }) => {
                return Self::ours(ErrorCode::Internal, &error, "a row of the database is not as it should be");
            }
            Error::Store(cause) => {
                let told = if cause.is_refusal() { "the database refused it" } else { "the database did not answer" };
                return Self::ours(ErrorCode::DependencyUnavailable, &error, told);
            }
            Error::Objects(cause) => {
                let told = if cause.is_refusal() { "object storage refused it" } else { "object storage did not answer" };
                return Self::ours(ErrorCode::DependencyUnavailable, &error, told);
            }
            Error::Kafka(cause) => {
                let told = if cause.is_refusal() { "Kafka refused it" } else { "Kafka did not answer" };
                return Self::ours(ErrorCode::DependencyUnavailable, &error, told);
            }
        };
        Self::new(code, error.to_string())
    }
}

impl Problem {
    /// Logs the whole error and tells the caller the little that helps.
    fn ours(code: ErrorCode, error: &Error, told: &str) -> Self {
        tracing::error!(%error, %code, "answered {code}: {error}");
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
    fn every_code_has_a_real_status_and_comes_again_where_the_broker_is_at_fault() {
        for code in ErrorCode::ALL {
            let kind = kind(*code);
            assert!(StatusCode::from_u16(kind.status).is_ok_and(|status| status.is_client_error() || status.is_server_error()));
            assert!(kind.status != 503 || kind.retryable, "{code}");
        }
    }
}
