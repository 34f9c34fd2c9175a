//! Problems: the only module that knows HTTP status codes.
//!
//! Every error becomes an error code, and [`code_info`] describes each code. The response is an `application/problem+json`
//! document (RFC 9457). It never contains internal details: no address, no stack trace, no credential.

use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use lfs_broker_client::api::{ErrorCode, FieldError, UploadState};

use crate::broker::Error;
use crate::policy::PolicyViolation;
use crate::session::Failure;
use crate::store;

/// The description of an error code.
pub(crate) struct CodeInfo {
    pub(crate) status: u16,
    pub(crate) retryable: bool,
    pub(crate) title: &'static str,
    pub(crate) meaning: &'static str,
}

/// The description of every code. A code without a row does not compile.
#[expect(clippy::too_many_lines, reason = "one row for each code")]
pub(crate) fn code_info(code: ErrorCode) -> CodeInfo {
    let info = |status, retryable, title, meaning| CodeInfo { status, retryable, title, meaning };
    match code {
        ErrorCode::MalformedJson => {
            info(400, false, "Malformed JSON", "The body is not JSON, repeats a member, or is nested too deeply.")
        }
        ErrorCode::MalformedRequest => {
            info(400, false, "Malformed request", "The input is not an HTTP/1.1 request. The connection is closed.")
        }
        ErrorCode::IdempotencyKeyInvalid => info(
            400,
            false,
            "Invalid Idempotency-Key",
            "An Idempotency-Key has 1 to 255 visible ASCII characters, bare or quoted. The header may appear only once.",
        ),
        ErrorCode::Unauthenticated => info(401, false, "Not authenticated", "The request needs a bearer token."),
        ErrorCode::InvalidToken => info(
            401,
            false,
            "Invalid token",
            "The token is expired, is not for this broker, or is not signed by a key that the broker trusts.",
        ),
        ErrorCode::InsufficientScope => {
            info(403, false, "Insufficient scope", "The token does not have the scope that this route needs.")
        }
        ErrorCode::TopicForbidden => info(
            403,
            false,
            "Topic forbidden",
            "The token does not allow this topic, or the topic belongs to Kafka or to the broker itself.",
        ),
        ErrorCode::TopicNotEnabled => info(
            403,
            false,
            "Topic not enabled",
            "The topic accepts no uploads. An administrator can enable it with PUT /lfs/topics/{topic}.",
        ),
        ErrorCode::PointerForbidden => {
            info(403, false, "Pointer forbidden", "The pointer names an object that the caller may not read.")
        }
        ErrorCode::HostForbidden => info(
            403,
            false,
            "Host forbidden",
            "A broker without tokens accepts only local or configured hosts (Host) and page origins (Origin).",
        ),
        ErrorCode::NotFound => info(404, false, "Not found", "There is no such route."),
        ErrorCode::UploadNotFound => {
            info(404, false, "Upload not found", "There is no such upload, or it belongs to another tenant.")
        }
        ErrorCode::TopicNotFound => {
            info(404, false, "Topic not found", "Kafka has no such topic, or no policy is stored for it.")
        }
        ErrorCode::MethodNotAllowed => info(
            405,
            false,
            "Method not allowed",
            "The route does not support this method. The Allow header lists the supported ones.",
        ),
        ErrorCode::RequestTimeout => info(408, true, "Request time-out", "The request head or the body did not arrive in time."),
        ErrorCode::ObjectMissing => info(
            409,
            true,
            "Object missing",
            "The object is not in S3. Send the bytes, then complete again. The upload is still open.",
        ),
        ErrorCode::PartsIncomplete => info(
            409,
            true,
            "Parts incomplete",
            "Some parts are not in S3. Send them, then complete again. The upload is still open.",
        ),
        ErrorCode::StateConflict => info(409, false, "State conflict", "The upload's state does not allow this operation."),
        ErrorCode::IdempotencyInFlight => info(
            409,
            true,
            "Request in flight",
            "Another request with this Idempotency-Key is being stored at the moment. Retry.",
        ),
        ErrorCode::CompletionInProgress => {
            info(409, true, "Completion in progress", "The upload is being completed. Retry when the completion has ended.")
        }
        ErrorCode::UploadExpired => {
            info(410, false, "Upload expired", "The upload was not completed in time. Open a new upload.")
        }
        ErrorCode::UploadAborted => info(410, false, "Upload aborted", "The upload was aborted. Open a new upload."),
        ErrorCode::ObjectGone => info(410, false, "Object gone", "The object that the pointer names no longer exists."),
        ErrorCode::RequestTooLarge => info(413, false, "Request too large", "The body is larger than this route allows."),
        ErrorCode::UnsupportedMediaType => {
            info(415, false, "Unsupported media type", "The body must be JSON, with a JSON Content-Type.")
        }
        ErrorCode::ValidationFailed => {
            info(422, false, "Validation failed", "Some fields of the request are not valid. The member errors lists them.")
        }
        ErrorCode::ObjectTooLarge => info(422, false, "Object too large", "The upload is larger than the topic allows."),
        ErrorCode::SizeMismatch => info(422, false, "Size mismatch", "The object in S3 does not have the declared size."),
        ErrorCode::ChecksumMismatch => info(
            422,
            false,
            "Checksum mismatch",
            "The object in S3 does not have the checksum that the client declared or that the pointer names.",
        ),
        ErrorCode::ObjectForeign => {
            info(422, false, "Foreign object", "The object in S3 was not written through this upload's URLs.")
        }
        ErrorCode::ChecksumNotAllowed => {
            info(422, false, "Checksum not allowed", "The topic does not allow this checksum algorithm.")
        }
        ErrorCode::ContentTypeNotAllowed => {
            info(422, false, "Content type not allowed", "The topic does not allow this media type.")
        }
        ErrorCode::IdempotencyKeyReused => {
            info(422, false, "Idempotency-Key reused", "The key was already used for a different request.")
        }
        ErrorCode::RecordTooLarge => info(
            422,
            false,
            "Record too large",
            "The record's headers have more than 8 KiB, or the whole record has more than the topic's max.message.bytes.",
        ),
        ErrorCode::Unpublishable => info(
            422,
            false,
            "Unpublishable",
            "Kafka refuses the upload's pointer permanently, and an administrator discarded the upload. Open a new upload.",
        ),
        ErrorCode::PointerInvalid => info(422, false, "Invalid pointer", "The body is not a valid pointer."),
        ErrorCode::RateLimited => info(
            429,
            true,
            "Rate limited",
            "Too many requests or waiting reads of this tenant, or too many invalid tokens or connections from this address. Retry later.",
        ),
        ErrorCode::QuotaBytesExceeded => {
            info(429, true, "Byte quota exceeded", "The open uploads of the tenant have reserved the maximum number of bytes.")
        }
        ErrorCode::QuotaSessionsExceeded => {
            info(429, true, "Session quota exceeded", "The tenant has the maximum number of open uploads.")
        }
        ErrorCode::HeadersTooLarge => {
            info(431, false, "Headers too large", "The request has more than 100 headers, or more than 16 KiB of headers.")
        }
        ErrorCode::Internal => info(500, false, "Internal error", "A bug in the broker. Search its log for the request id."),
        ErrorCode::DependencyUnavailable => info(
            503,
            true,
            "Dependency unavailable",
            "The database, S3 or Kafka did not answer or refused the request, or the broker is overloaded. Retry. If it was refused, an operator must act.",
        ),
        ErrorCode::CompletionUnknown => {
            info(503, true, "Completion unknown", "It is not known yet whether S3 completed the upload. Retry to find out.")
        }
    }
}

/// A problem to send. [`super::middleware`] adds the request id and writes the response.
#[derive(Debug, Clone)]
pub(crate) struct Problem {
    pub(crate) code: ErrorCode,
    pub(crate) detail: String,
    pub(crate) state: Option<UploadState>,
    pub(crate) errors: Vec<FieldError>,
    /// How long the client should wait before it retries.
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

    /// The description of the code.
    pub(crate) fn code_info(&self) -> CodeInfo {
        code_info(self.code)
    }
}

impl From<Error> for Problem {
    fn from(error: Error) -> Self {
        let code = match &error {
            Error::Session { failure, state } => {
                let Failure { code, detail, items } = failure.clone();
                return Self { state: Some(*state), errors: items, ..Self::new(code, detail) };
            }
            Error::Policy(PolicyViolation::Invalid(errors)) => return Self::invalid(errors.clone()),
            Error::Policy(PolicyViolation::RecordTooLarge(_)) => ErrorCode::RecordTooLarge,
            Error::Policy(PolicyViolation::TopicNotEnabled(_) | PolicyViolation::NoBucket(_)) => ErrorCode::TopicNotEnabled,
            Error::Policy(PolicyViolation::TooLarge { .. }) => ErrorCode::ObjectTooLarge,
            Error::Policy(PolicyViolation::ChecksumNotAllowed(_)) => ErrorCode::ChecksumNotAllowed,
            Error::Policy(PolicyViolation::ContentTypeNotAllowed(_)) => ErrorCode::ContentTypeNotAllowed,
            Error::NotFound => ErrorCode::UploadNotFound,
            Error::TopicNotFound(_) | Error::PolicyNotFound(_) => ErrorCode::TopicNotFound,
            Error::RecordTooLarge { .. } => ErrorCode::RecordTooLarge,
            Error::TopicForbidden(_) | Error::TopicInternal(_) => ErrorCode::TopicForbidden,
            Error::IdempotencyKeyInvalid => ErrorCode::IdempotencyKeyInvalid,
            Error::IdempotencyKeyReused => ErrorCode::IdempotencyKeyReused,
            Error::IdempotencyKeyInFlight => ErrorCode::IdempotencyInFlight,
            Error::TooManySessions(_) => ErrorCode::QuotaSessionsExceeded,
            Error::TooManyBytes { .. } => ErrorCode::QuotaBytesExceeded,
            Error::PointerInvalid(_) => ErrorCode::PointerInvalid,
            Error::PointerForbidden(_) => ErrorCode::PointerForbidden,
            Error::ObjectGone => ErrorCode::ObjectGone,
            Error::PointerSize { .. } => ErrorCode::SizeMismatch,
            Error::PointerChecksum { .. } => ErrorCode::ChecksumMismatch,
            Error::OutcomeUnknown => ErrorCode::CompletionUnknown,
            Error::TooManyCompletions(_) => ErrorCode::DependencyUnavailable,
            Error::Store(store::Error::Corrupt { .. }) => {
                return Self::internal(ErrorCode::Internal, &error, "a row in the database is not valid");
            }
            Error::Store(cause) => {
                let detail = if cause.is_refusal() { "the database refused the request" } else { "the database did not answer" };
                return Self::internal(ErrorCode::DependencyUnavailable, &error, detail);
            }
            Error::Objects(cause) => {
                let detail =
                    if cause.is_refusal() { "object storage refused the request" } else { "object storage did not answer" };
                return Self::internal(ErrorCode::DependencyUnavailable, &error, detail);
            }
            Error::Kafka(cause) => {
                let detail = if cause.is_refusal() { "Kafka refused the request" } else { "Kafka did not answer" };
                return Self::internal(ErrorCode::DependencyUnavailable, &error, detail);
            }
        };
        Self::new(code, error.to_string())
    }
}

impl Problem {
    /// Logs the whole error. The caller gets only the code and a short detail.
    fn internal(code: ErrorCode, error: &Error, detail: &str) -> Self {
        tracing::error!(%error, %code, "answered {code}: {error}");
        Self::new(code, detail)
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.code_info().status).expect("every code has a valid status");
        let mut response = status.into_response();
        response.extensions_mut().insert(self);
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_has_an_error_status_and_503_is_retryable() {
        for code in ErrorCode::ALL {
            let info = code_info(*code);
            assert!(StatusCode::from_u16(info.status).is_ok_and(|status| status.is_client_error() || status.is_server_error()));
            assert!(info.status != 503 || info.retryable, "{code}");
        }
    }
}
