//! The errors of uploads, downloads and calls, grouped by what the caller can do about them.
//!
//! No message contains a token or a presigned URL, because a reader of logs must not be able to use them.

use std::io;

use uuid::Uuid;

use crate::api::{ErrorCode, Problem};
use crate::pointer::NotAPointer;
use crate::transport::{Failure, error_chain};

/// The most characters of a server's text that an error message quotes.
const MAX_QUOTED_CHARACTERS: usize = 200;

/// An error of an upload, a download or a call.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The broker answered with a problem. Handle it by the problem's `code`.
    #[error("the broker refused: {0}")]
    Refused(Box<Problem>),
    /// The pointer is valid, but its object no longer exists (410 `object-gone`).
    #[error("the pointer's object is gone: {0}")]
    Gone(Box<Problem>),
    /// This token, or this access to S3, may not read the pointer's object.
    #[error("access to the pointer's object is forbidden: {reason}")]
    Forbidden {
        /// The reason, and whether the broker or the caller's own [`Access`](crate::Access) forbids it.
        reason: String,
        /// The broker's problem (403 `pointer-forbidden`), if the broker forbids it.
        problem: Option<Box<Problem>>,
    },
    /// S3 has no object at this location. It was deleted after the broker checked it, or no broker checked it.
    #[error("storage has no object at the pointer's bucket and key")]
    Missing,
    /// The connection failed, broke or stalled, and every retry failed too.
    #[error("{peer} cannot be reached: {reason}")]
    Unreachable {
        /// `the broker` or `storage`.
        peer: &'static str,
        /// Why the connection failed, with the server's host and port but without the rest of the URL.
        reason: String,
        /// Whether a retry may succeed. It does not help against a wrong scheme or an invalid certificate.
        is_retryable: bool,
    },
    /// S3 answered a PUT or a GET with an error.
    #[error("storage answered {status} {code}: {message}")]
    Storage {
        /// The HTTP status.
        status: u16,
        /// S3's error code, or empty if the response has none.
        code: String,
        /// S3's message.
        message: String,
    },
    /// The bytes do not match the declared size or digest.
    #[error("the bytes are corrupt: expected {expected}, found {found}")]
    Corrupt {
        /// The declared value.
        expected: String,
        /// The value found.
        found: String,
    },
    /// The object does not have the size that its pointer declares, or the file does not have the size of its upload.
    #[error("{0}")]
    WrongSize(String),
    /// The object is larger than the caller allows.
    #[error("the object has {size} bytes, but the limit is {limit} bytes")]
    TooLarge {
        /// The size in bytes.
        size: u64,
        /// The caller's limit in bytes.
        limit: u64,
    },
    /// The record's value is not a pointer of a known version.
    #[error(transparent)]
    NotAPointer(#[from] NotAPointer),
    /// The response does not follow the API, for example because a proxy sent it.
    #[error("unexpected response, status {status}: {detail}")]
    Unexpected {
        /// The HTTP status.
        status: u16,
        /// What is wrong with the response.
        detail: String,
    },
    /// The caller's request is invalid and was not sent.
    #[error("{0}")]
    Invalid(String),
    /// The record refers to this object only by its name, and no bucket is configured for references.
    #[error("the record refers to the object {0:?}, but no bucket is configured for references")]
    NoReferenceBucket(String),
    /// The caller's access to S3 could not sign the request.
    #[error("the request cannot be signed: {0}")]
    Signing(String),
    /// The caller's signal cancelled the upload.
    #[error("the upload was cancelled")]
    Cancelled {
        /// The upload, if it was already open.
        id: Option<Uuid>,
        /// Whether the broker confirmed the abort. If not, the upload expires by itself. If complete was already
        /// requested, its pointer may still be published.
        aborted: bool,
    },
    /// The broker still verifies the upload after the longest wait. Its pointer is not queued yet. Completing the upload
    /// again continues it.
    #[error("upload {id} is still being verified after {seconds} s")]
    WaitTimedOut {
        /// The upload.
        id: Uuid,
        /// How long the client waited.
        seconds: u64,
    },
    /// Reading the local source or writing the local target failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl Error {
    /// The broker's problem, if it caused this error.
    pub fn problem(&self) -> Option<&Problem> {
        match self {
            Self::Refused(problem) | Self::Gone(problem) => Some(problem),
            Self::Forbidden { problem, .. } => problem.as_deref(),
            _ => None,
        }
    }

    /// An error of the caller's signing function, with its causes.
    pub fn signing(error: impl std::error::Error) -> Self {
        Self::Signing(error_chain(&error))
    }

    /// Whether this is a problem of the broker with this code.
    pub fn is_problem(&self, code: ErrorCode) -> bool {
        self.problem().is_some_and(|problem| problem.known_code() == Some(code))
    }

    /// Whether a retry of the same request may succeed.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unreachable { is_retryable, .. } => *is_retryable,
            // `retryable` alone is not enough: it is also set when another step must come first, such as a missing part.
            Self::Refused(problem) => {
                problem.retryable
                    && (is_temporary_status(problem.status) || problem.known_code() == Some(ErrorCode::IdempotencyInFlight))
            }
            Self::Unexpected { status, .. } => is_temporary_status(*status),
            // 409: S3 sends it for two concurrent conditional writes, VersityGW for a PUT beside a DELETE.
            Self::Storage { status, code, .. } => {
                is_temporary_status(*status) || matches!(status, 409 | 500) || code == "RequestTimeout"
            }
            _ => false,
        }
    }

    /// Whether a new signature may help, because the URL or the credentials that signed it expired.
    pub(crate) fn needs_new_signature(&self) -> bool {
        match self {
            Self::Storage { status: 403, .. } => true,
            Self::Storage { status: 400, code, message } => code == "ExpiredToken" || message.contains("expired"),
            _ => false,
        }
    }

    /// Whether the bytes do not match their declaration. The client, the broker or S3 may have found it.
    pub fn is_corrupt(&self) -> bool {
        matches!(self, Self::Corrupt { .. } | Self::WrongSize(_))
            || self.is_problem(ErrorCode::SizeMismatch)
            || self.is_problem(ErrorCode::ChecksumMismatch)
            || self.is_bad_digest()
    }

    /// Whether S3 reports that the bytes do not match the signed checksum.
    pub(crate) fn is_bad_digest(&self) -> bool {
        matches!(self, Self::Storage { status: 400, code, .. }
            if matches!(code.as_str(), "BadDigest" | "XAmzContentChecksumMismatch" | "XAmzContentSHA256Mismatch"))
    }

    pub(crate) fn from_problem(problem: Problem) -> Self {
        match problem.known_code() {
            Some(ErrorCode::ObjectGone) => Self::Gone(Box::new(problem)),
            Some(ErrorCode::PointerForbidden) => {
                Self::Forbidden { reason: problem.to_string(), problem: Some(Box::new(problem)) }
            }
            _ => Self::Refused(Box::new(problem)),
        }
    }

    /// A failed connection.
    pub(crate) fn from_transport(peer: &'static str, error: reqwest::Error) -> Self {
        let Failure { reason, is_retryable } = Failure::of(error);
        Self::Unreachable { peer, reason, is_retryable }
    }

    pub(crate) fn stalled(peer: &'static str, seconds: u64) -> Self {
        let reason = format!("no byte was transferred for {seconds} s");
        Self::Unreachable { peer, reason, is_retryable: true }
    }

    /// Parses S3's error document. Only the code and the message are kept.
    pub(crate) fn from_storage(status: u16, body: &[u8]) -> Self {
        let text = String::from_utf8_lossy(body);
        let message = xml_text(&text, "Message").unwrap_or_default();
        // A message that quotes a URL could contain a signature.
        let secret = message.contains("://") || message.to_ascii_lowercase().contains("x-amz-");
        let message = if secret { String::new() } else { quote(message) };
        Self::Storage { status, code: quote(xml_text(&text, "Code").unwrap_or_default()), message }
    }
}

impl From<Error> for io::Error {
    /// Keeps the error as the source, so that [`io::Error::downcast`] finds it behind an `AsyncRead`.
    fn from(error: Error) -> Self {
        match error {
            Error::Io(error) => error,
            Error::Corrupt { .. } | Error::WrongSize(_) => io::Error::new(io::ErrorKind::InvalidData, error),
            Error::Missing | Error::Gone(_) => io::Error::new(io::ErrorKind::NotFound, error),
            Error::Forbidden { .. } => io::Error::new(io::ErrorKind::PermissionDenied, error),
            other => io::Error::other(other),
        }
    }
}

/// Whether the status is temporary: a proxy, a rate limit or a restart sends it.
fn is_temporary_status(status: u16) -> bool {
    matches!(status, 408 | 429 | 502 | 503 | 504)
}

/// The text of the first `<name>` element. It is enough for S3's errors, which have no nesting.
fn xml_text<'a>(xml: &'a str, name: &str) -> Option<&'a str> {
    let (_, after) = xml.split_once(&format!("<{name}>"))?;
    let (text, _) = after.split_once(&format!("</{name}>"))?;
    Some(text)
}

/// A server's text as one line of bounded length.
pub(crate) fn quote(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX_QUOTED_CHARACTERS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn storage_errors_keep_code_and_message_but_no_url() {
        let xml = br#"<?xml version="1.0"?><Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message><Resource>/b/k</Resource></Error>"#;
        let error = Error::from_storage(400, xml);
        assert_eq!(error.to_string(), "storage answered 400 ExpiredToken: The provided token has expired.");
        assert!(error.needs_new_signature());

        let leaky = b"<Error><Code>X</Code><Message>bad http://s3/b/k?X-Amz-Signature=secret</Message></Error>";
        assert!(!Error::from_storage(400, leaky).to_string().contains("secret"));
        assert_eq!(Error::from_storage(502, b"<html>").to_string(), "storage answered 502 : ");
    }

    #[test]
    fn only_temporary_errors_are_retried() {
        let storage = |status, code: &str| Error::Storage { status, code: code.to_owned(), message: String::new() };
        for (error, transient) in [
            (storage(503, "SlowDown"), true),
            (storage(500, "InternalError"), true),
            (storage(409, "ConditionalRequestConflict"), true),
            (storage(409, "ExistingObjectIsDirectory"), true),
            (storage(400, "RequestTimeout"), true),
            (storage(400, "BadDigest"), false),
            (storage(403, "SignatureDoesNotMatch"), false),
            (storage(412, "PreconditionFailed"), false),
            (Error::Missing, false),
        ] {
            assert_eq!(error.is_transient(), transient, "{error}");
        }
        let problem = |status, code: &str, retryable| {
            Error::from_problem(Problem {
                kind: format!("/problems/{code}"),
                title: String::new(),
                status,
                detail: String::new(),
                code: code.to_owned(),
                request_id: String::new(),
                retryable,
                upload_state: None,
                errors: Vec::new(),
            })
        };
        assert!(problem(409, "idempotency-in-flight", true).is_transient());
        assert!(!problem(409, "object-missing", true).is_transient());
        assert!(problem(429, "rate-limited", true).is_transient());
        assert!(!problem(503, "dependency-unavailable", false).is_transient());
        assert!(matches!(problem(410, "object-gone", false), Error::Gone(_)));
        assert!(matches!(problem(403, "pointer-forbidden", false), Error::Forbidden { problem: Some(_), .. }));
    }
}
