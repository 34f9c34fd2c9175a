//! Why a session transition fails, as the client sees it and as it is stored.

use lfs_broker_client::api::{ErrorCode, FieldError, UploadState};
use time::OffsetDateTime;

/// The most missing parts that an error response lists one by one. A client can continue with these; `missing_parts` of GET
/// has all of them.
const MAX_LISTED_PARTS: usize = 100;

/// The most characters of a header's value that an error shows: enough to recognise the value.
const MAX_SHOWN_CHARACTERS: usize = 100;

/// Why an upload failed. The response to the client and the stored row have this form.
#[derive(Debug, Clone, PartialEq)]
pub struct Failure {
    /// The error code.
    pub code: ErrorCode,
    /// What happened.
    pub detail: String,
    /// The request members or parts that it concerns.
    pub items: Vec<FieldError>,
}

/// Why a transition fails. The client caused it, and the client sees it.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SessionError {
    /// S3 has no object under the session's key.
    #[error("no object was put: send the bytes, then complete again")]
    ObjectMissing,
    /// Some parts are not in S3.
    #[error("{} of {parts} parts are missing", missing.len())]
    PartsIncomplete {
        /// The numbers of the missing parts.
        missing: Vec<u32>,
        /// How many parts the upload has.
        parts: u32,
    },
    /// The object has another size than declared.
    #[error("declared {declared} bytes, found {found}")]
    SizeMismatch {
        /// The declared size in bytes.
        declared: u64,
        /// The found size in bytes.
        found: u64,
    },
    /// The object has another checksum than declared.
    #[error("declared {declared}, found {found}")]
    ChecksumMismatch {
        /// The declared digest.
        declared: String,
        /// The found digest.
        found: String,
    },
    /// The object does not have the session's write token: another writer stored it.
    #[error("the object does not have this upload's write token")]
    ForeignObject,
    /// S3 refuses the completion, and would refuse a retry: the bucket does not exist, or a permission is missing.
    #[error("object storage refused the completion: {s3_code}")]
    StorageRefused {
        /// The error code of the response.
        code: ErrorCode,
        /// S3's error code.
        s3_code: String,
    },
    /// The object was stored with a header that the upload did not declare.
    #[error("the object was stored with {header}: {}, which this upload did not declare", shown(value))]
    UndeclaredHeader {
        /// The header's name.
        header: String,
        /// Its value.
        value: String,
    },
    /// The sha256 is missing, or differs from the declared one.
    #[error("{0}")]
    InvalidSha256(&'static str),
    /// Another completion of this upload is running.
    #[error("a completion of this upload is in progress; retry when it has ended")]
    CompletionInProgress,
    /// The upload expired before it was completed.
    #[error("the upload expired at {0}")]
    Expired(OffsetDateTime),
    /// The upload was aborted.
    #[error("the upload was aborted")]
    Aborted,
    /// The upload was rejected before; the response is the same as then.
    #[error("{}", .0.detail)]
    Rejected(Box<Failure>),
    /// Kafka refuses the pointer permanently, and an operator discarded the upload.
    #[error("Kafka refuses the pointer: {0}")]
    Unpublishable(String),
    /// The session's state does not allow the request.
    #[error("the upload is {0}")]
    WrongState(UploadState),
    /// The state allows the request, but the request conflicts with the upload.
    #[error("{0}")]
    Conflict(String),
}

impl SessionError {
    /// The error code of the HTTP interface.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::ObjectMissing => ErrorCode::ObjectMissing,
            Self::PartsIncomplete { .. } => ErrorCode::PartsIncomplete,
            Self::SizeMismatch { .. } => ErrorCode::SizeMismatch,
            Self::ChecksumMismatch { .. } => ErrorCode::ChecksumMismatch,
            Self::ForeignObject | Self::UndeclaredHeader { .. } => ErrorCode::ObjectForeign,
            Self::StorageRefused { code, .. } => *code,
            Self::InvalidSha256(_) => ErrorCode::ValidationFailed,
            Self::CompletionInProgress => ErrorCode::CompletionInProgress,
            Self::Expired(_) => ErrorCode::UploadExpired,
            Self::Aborted => ErrorCode::UploadAborted,
            Self::Rejected(failure) => failure.code,
            Self::Unpublishable(_) => ErrorCode::Unpublishable,
            Self::WrongState(_) | Self::Conflict(_) => ErrorCode::StateConflict,
        }
    }

    fn items(&self) -> Vec<FieldError> {
        match self {
            Self::PartsIncomplete { missing, .. } => {
                let (listed, rest) = missing.split_at(missing.len().min(MAX_LISTED_PARTS));
                let item = |pointer: String, detail: String| FieldError { pointer, detail };
                let listed =
                    listed.iter().map(|number| item(format!("/parts/{}", number - 1), format!("part {number} is missing")));
                let rest = rest
                    .first()
                    .map(|from| item("/parts".into(), format!("{} more are missing, from part {from} on", rest.len())));
                listed.chain(rest).collect()
            }
            Self::InvalidSha256(detail) => vec![FieldError { pointer: "/sha256".to_owned(), detail: (*detail).to_owned() }],
            _ => Vec::new(),
        }
    }

    /// The form that is stored, and that the client sees.
    pub(crate) fn failure(&self) -> Failure {
        match self {
            Self::Rejected(failure) => (**failure).clone(),
            _ => Failure { code: self.code(), detail: self.to_string(), items: self.items() },
        }
    }
}

/// The part of a header's value that an error shows: its beginning, without control characters. The writer of the object
/// chose the value, so it is not trusted.
fn shown(value: &str) -> String {
    value.chars().filter(|c| !c.is_control()).take(MAX_SHOWN_CHARACTERS).collect()
}
