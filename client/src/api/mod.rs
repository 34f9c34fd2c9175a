//! The HTTP contract: requests, answers and problems, exactly as they travel.
//!
//! Times are RFC 3339 in UTC, `*_in` and `*_seconds` whole seconds, sizes bytes, hashes lower-case hex.
//! Requests refuse members they do not know; answers may grow new ones.

mod error_code;
mod operate;
mod pointers;
mod requests;
mod topics;
mod upload;

pub use error_code::ErrorCode;
pub use operate::{Dependencies, Dependency, FieldError, OutboxDepth, Problem, Redrive, Stats};
pub use pointers::{ResolveAnswer, ResolveOptions, Resolved, Validated};
pub use requests::{
    CompleteUpload, Completed, Headers, ListUploads, OpenUpload, PartHashes, PartRequest, ReadHistory, ReadUpload, SignParts,
    SignedParts,
};
pub use topics::{ListTopics, Policy, Retention, TopicPage, TopicPolicy};
pub use upload::{
    History, Integrity, Mode, Next, Record, SignedPart, SignedRequest, Transition, Upload, UploadError, UploadPage, UploadState,
    UploadedPart,
};

/// Most part numbers in one `/parts` call, and most part URLs in one answer.
pub const PARTS_PER_CALL: usize = 100;
