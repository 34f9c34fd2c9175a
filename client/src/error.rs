//! What can go wrong between a client, the broker and storage, told apart by what the caller can do about it.
//!
//! No message ever holds a token or a presigned URL: whoever reads a log must not be able to use one.

use std::io;

use uuid::Uuid;

use crate::api::{ErrorCode, Problem};
use crate::pointer::NotAPointer;

/// Longest piece of a foreign answer that a message repeats, in characters.
const QUOTED_CHARACTERS: usize = 200;

/// Why an upload, a download or a call did not succeed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The broker refused, and says why. Decide by the problem's `code`.
    #[error("the broker refused: {0}")]
    Refused(Box<Problem>),
    /// The pointer is sound, its object is not there any more (410 `object-gone`).
    #[error("the pointer's object is gone: {0}")]
    Gone(Box<Problem>),
    /// The pointer leads to where this token, or this access to S3, may not go.
    #[error("the pointer is not for this reader: {reason}")]
    Forbidden {
        /// Who says so, and why.
        reason: String,
        /// The broker's problem (403 `pointer-forbidden`), where it is the broker that says so.
        problem: Option<Box<Problem>>,
    },
    /// Storage has no object there: it went away after the broker looked, or nobody looked.
    #[error("storage has no object where the pointer says")]
    Missing,
    /// No connection, or one that broke or stood still, and every retry met the same.
    #[error("{peer} cannot be reached: {reason}")]
    Unreachable {
        /// `the broker` or `storage`.
        peer: &'static str,
        /// What the connection died of, without the URL.
        reason: String,
    },
    /// Storage answered a PUT or a GET with an error.
    #[error("storage answered {status} {code}: {message}")]
    Storage {
        /// The HTTP status.
        status: u16,
        /// S3's error code; empty where the answer had none.
        code: String,
        /// S3's message.
        message: String,
    },
    /// The bytes are not the promised ones.
    #[error("the bytes are corrupt: expected {expected}, found {found}")]
    Corrupt {
        /// What was promised.
        expected: String,
        /// What was there.
        found: String,
    },
    /// More bytes than the caller allowed.
    #[error("the object has {size} bytes, more than the {limit} allowed")]
    TooLarge {
        /// The size in bytes.
        size: u64,
        /// The caller's limit in bytes.
        limit: u64,
    },
    /// The record's value is not a pointer that this client can read.
    #[error(transparent)]
    NotAPointer(#[from] NotAPointer),
    /// Something answered that does not speak the contract, such as a proxy in between.
    #[error("unexpected answer, status {status}: {detail}")]
    Unexpected {
        /// The HTTP status.
        status: u16,
        /// What does not fit.
        detail: String,
    },
    /// The caller asked for something that cannot be sent.
    #[error("{0}")]
    Invalid(String),
    /// The record refers to this object by name alone, and no bucket is set for such references.
    #[error("the record refers to {0:?}, and no bucket is set for references")]
    NoReferenceBucket(String),
    /// Own access to S3 gave no signature.
    #[error("the request cannot be signed: {0}")]
    Signing(String),
    /// The caller's signal ended the upload.
    #[error("the upload was cancelled")]
    Cancelled {
        /// The upload, if it was open by then.
        id: Option<Uuid>,
        /// Whether the broker confirmed the abort. Where not, the upload expires by itself, unless complete was asked for
        /// already: then its pointer may still be published.
        aborted: bool,
    },
    /// The broker is still at work on the upload after the longest wait; nothing is promised yet, and completing again goes on.
    #[error("upload {id} is still being verified after {seconds} seconds")]
    Unfinished {
        /// The upload.
        id: Uuid,
        /// How long it was waited for.
        seconds: u64,
    },
    /// The local source or target failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl Error {
    /// The broker's problem, where it is the reason.
    pub fn problem(&self) -> Option<&Problem> {
        match self {
            Self::Refused(problem) | Self::Gone(problem) => Some(problem),
            Self::Forbidden { problem, .. } => problem.as_deref(),
            _ => None,
        }
    }

    /// What a signer of the caller's failed with, its causes included.
    pub fn signing(error: impl std::error::Error) -> Self {
        Self::Signing(chain(&error))
    }

    /// Whether this is the broker's problem with that code.
    pub fn is_problem(&self, code: &str) -> bool {
        self.problem().is_some_and(|problem| problem.code == code)
    }

    /// Whether the same request may succeed a moment later.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unreachable { .. } => true,
            // `retryable` alone would also repeat what first needs another step, such as a missing part.
            Self::Refused(problem) => {
                problem.retryable && (passing(problem.status) || problem.known_code() == Some(ErrorCode::IdempotencyInFlight))
            }
            Self::Unexpected { status, .. } => passing(*status),
            // 409 is S3's answer to two conditional writes that meet, and VersityGW's to a PUT that meets a DELETE beside it.
            Self::Storage { status, code, .. } => passing(*status) || matches!(status, 409 | 500) || code == "RequestTimeout",
            _ => false,
        }
    }

    /// Whether a fresh signature may help: the URL expired, or the credentials behind it did.
    pub(crate) fn wants_signature(&self) -> bool {
        match self {
            Self::Storage { status: 403, .. } => true,
            Self::Storage { status: 400, code, message } => code == "ExpiredToken" || message.contains("expired"),
            _ => false,
        }
    }

    /// Whether bytes are not those that were promised, whoever found it: this client, the broker or storage.
    pub fn is_corrupt(&self) -> bool {
        matches!(self, Self::Corrupt { .. })
            || self.is_problem(ErrorCode::SizeMismatch.as_str())
            || self.is_problem(ErrorCode::ChecksumMismatch.as_str())
            || self.is_bad_digest()
    }

    /// Whether storage says that the bytes do not have the signed checksum.
    pub(crate) fn is_bad_digest(&self) -> bool {
        matches!(self, Self::Storage { status: 400, code, .. }
            if matches!(code.as_str(), "BadDigest" | "XAmzContentChecksumMismatch" | "XAmzContentSHA256Mismatch"))
    }

    pub(crate) fn of_problem(problem: Problem) -> Self {
        match problem.known_code() {
            Some(ErrorCode::ObjectGone) => Self::Gone(Box::new(problem)),
            Some(ErrorCode::PointerForbidden) => {
                Self::Forbidden { reason: problem.to_string(), problem: Some(Box::new(problem)) }
            }
            _ => Self::Refused(Box::new(problem)),
        }
    }

    /// A broken connection, with its whole chain of causes but without the URL.
    pub(crate) fn of_transport(peer: &'static str, error: reqwest::Error) -> Self {
        Self::Unreachable { peer, reason: chain(&error.without_url()) }
    }

    pub(crate) fn stalled(peer: &'static str, seconds: u64) -> Self {
        Self::Unreachable { peer, reason: format!("no byte moved for {seconds} seconds") }
    }

    /// S3's error document, of which only the code and the message are kept.
    pub(crate) fn of_storage(status: u16, body: &[u8]) -> Self {
        let text = String::from_utf8_lossy(body);
        let message = element(&text, "Message").unwrap_or_default();
        // A message that quotes a URL could quote the signature.
        let secret = message.contains("://") || message.to_ascii_lowercase().contains("x-amz-");
        let message = if secret { String::new() } else { quote(message) };
        Self::Storage { status, code: quote(element(&text, "Code").unwrap_or_default()), message }
    }
}

impl From<Error> for io::Error {
    /// Keeps the error inside, so that [`io::Error::downcast`] finds it behind an `AsyncRead`.
    fn from(error: Error) -> Self {
        match error {
            Error::Io(error) => error,
            Error::Corrupt { .. } => io::Error::new(io::ErrorKind::InvalidData, error),
            Error::Missing | Error::Gone(_) => io::Error::new(io::ErrorKind::NotFound, error),
            Error::Forbidden { .. } => io::Error::new(io::ErrorKind::PermissionDenied, error),
            other => io::Error::other(other),
        }
    }
}

/// An error and its causes in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut reason = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        reason = format!("{reason}: {next}");
        cause = next.source();
    }
    reason
}

/// The statuses that a proxy, a rate limit or a restart gives, and that pass.
fn passing(status: u16) -> bool {
    matches!(status, 408 | 429 | 502 | 503 | 504)
}

/// The text of the first `<name>` in an XML document as flat as S3's errors.
fn element<'a>(xml: &'a str, name: &str) -> Option<&'a str> {
    let (_, after) = xml.split_once(&format!("<{name}>"))?;
    let (text, _) = after.split_once(&format!("</{name}>"))?;
    Some(text)
}

/// A foreign text cut to one bounded line.
pub(crate) fn quote(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(QUOTED_CHARACTERS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn storage_errors_keep_code_and_message_but_never_a_url() {
        let xml = br#"<?xml version="1.0"?><Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message><Resource>/b/k</Resource></Error>"#;
        let error = Error::of_storage(400, xml);
        assert_eq!(error.to_string(), "storage answered 400 ExpiredToken: The provided token has expired.");
        assert!(error.wants_signature());

        let leaky = b"<Error><Code>X</Code><Message>bad http://s3/b/k?X-Amz-Signature=secret</Message></Error>";
        assert!(!Error::of_storage(400, leaky).to_string().contains("secret"));
        assert_eq!(Error::of_storage(502, b"<html>").to_string(), "storage answered 502 : ");
    }

    #[test]
    fn only_what_may_pass_is_tried_again() {
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
            Error::of_problem(Problem {
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
