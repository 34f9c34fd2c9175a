//! Why a move of a session is refused, as it is told and as it is stored.

use lfs_broker_client::api::{FieldError, UploadState};
use time::OffsetDateTime;

use super::Trouble;

/// An answer names so many missing parts singly; it is enough to go on with, and GET's `missing_parts` has all.
const NAMED_PARTS: usize = 100;

/// So much of a header's value is enough to recognise it.
const SHOWN_CHARACTERS: usize = 100;

/// Why a move is refused: the caller's doing, told to the caller.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Refusal {
    /// Nothing is in S3 under the session's key.
    #[error("no object was put: send the bytes, then complete again")]
    ObjectMissing,
    /// Some parts are not in S3.
    #[error("{} of {parts} parts are missing", missing.len())]
    PartsIncomplete {
        /// The numbers that are missing.
        missing: Vec<u32>,
        /// How many there should be.
        parts: u32,
    },
    /// The object has another size.
    #[error("promised {promised} bytes, found {found}")]
    Size {
        /// Bytes promised.
        promised: u64,
        /// Bytes found.
        found: u64,
    },
    /// The object has other bytes.
    #[error("promised {promised}, found {found}")]
    Checksum {
        /// The digest promised.
        promised: String,
        /// The digest found.
        found: String,
    },
    /// The object does not bear our write token: somebody else wrote it.
    #[error("the object does not bear this upload's write token")]
    Foreign,
    /// S3 refuses what completing needs, and will refuse it again: a bucket that is gone, a missing permission.
    #[error("object storage refused the completion: {said}")]
    Storage {
        /// The code to answer with.
        code: &'static str,
        /// S3's error code.
        said: String,
    },
    /// The object was stored with a header that the upload did not declare.
    #[error("the object was stored with {header}: {}, which this upload did not declare", shown(value))]
    Undeclared {
        /// The header's name.
        header: String,
        /// Its value.
        value: String,
    },
    /// The sha256 is missing, or is another one than promised.
    #[error("{0}")]
    Sha256(&'static str),
    /// Somebody completes it at this moment.
    #[error("a completion is at work")]
    InProgress,
    /// The time to complete is over.
    #[error("the upload expired at {0}")]
    Expired(OffsetDateTime),
    /// It was taken back.
    #[error("the upload was aborted")]
    Aborted,
    /// It was rejected before; the same answer again.
    #[error("{}", .0.detail)]
    Rejected(Box<Rejection>),
    /// Kafka will never take its pointer, an operator says.
    #[error("Kafka refuses the pointer: {0}")]
    Unpublishable(String),
    /// The state does not allow it.
    #[error("the upload is {0}")]
    State(UploadState),
    /// The state would allow it, the parts asked for do not.
    #[error("{0}")]
    Conflict(String),
}

/// A stored rejection.
#[derive(Debug, Clone, PartialEq)]
pub struct Rejection {
    /// The code of the first answer.
    pub code: String,
    /// Its detail.
    pub detail: String,
}

impl Refusal {
    /// The code of API.md's error table.
    pub fn code(&self) -> &str {
        match self {
            Self::ObjectMissing => "object-missing",
            Self::PartsIncomplete { .. } => "parts-incomplete",
            Self::Size { .. } => "size-mismatch",
            Self::Checksum { .. } => "checksum-mismatch",
            Self::Foreign | Self::Undeclared { .. } => "object-foreign",
            Self::Storage { code, .. } => code,
            Self::Sha256(_) => "validation-failed",
            Self::InProgress => "completion-in-progress",
            Self::Expired(_) => "upload-expired",
            Self::Aborted => "upload-aborted",
            Self::Rejected(rejection) => &rejection.code,
            Self::Unpublishable(_) => "unpublishable",
            Self::State(_) | Self::Conflict(_) => "state-conflict",
        }
    }

    fn items(&self) -> Vec<FieldError> {
        match self {
            Self::PartsIncomplete { missing, .. } => {
                let (named, more) = missing.split_at(missing.len().min(NAMED_PARTS));
                let item = |pointer: String, detail: String| FieldError { pointer, detail };
                let named =
                    named.iter().map(|number| item(format!("/parts/{}", number - 1), format!("part {number} is missing")));
                let more = more
                    .first()
                    .map(|from| item("/parts".into(), format!("{} more are missing, from part {from} on", more.len())));
                named.chain(more).collect()
            }
            Self::Sha256(detail) => vec![FieldError { pointer: "/sha256".to_owned(), detail: (*detail).to_owned() }],
            _ => Vec::new(),
        }
    }

    /// The form that is stored.
    pub(crate) fn trouble(&self) -> Trouble {
        Trouble { code: self.code().to_owned(), detail: self.to_string(), items: self.items() }
    }
}

/// What is shown of a header's value, which its sender chose: the beginning, without control characters.
fn shown(value: &str) -> String {
    value.chars().filter(|c| !c.is_control()).take(SHOWN_CHARACTERS).collect()
}

impl From<Trouble> for Rejection {
    fn from(trouble: Trouble) -> Self {
        Self { code: trouble.code, detail: trouble.detail }
    }
}
