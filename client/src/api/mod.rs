//! The HTTP API: requests, responses and problems, exactly as in JSON.
//!
//! Times are RFC 3339 in UTC, `*_in` and `*_seconds` are whole seconds, sizes are bytes, hashes are lower-case hex.
//! Requests with unknown members are refused; responses may get new members.

mod admin;
mod error_code;
mod limits;
mod pointers;
mod requests;
mod topics;
mod upload;

pub use admin::{Dependencies, Dependency, FieldError, OutboxDepth, Problem, Redrive, Stats};
pub use error_code::ErrorCode;
pub use limits::{
    DEFAULT_PART_BYTES, MAX_OBJECT_BYTES, MAX_PART_BYTES, MAX_PARTS, MAX_PUT_BYTES, MIN_PART_BYTES, PARTS_PER_CALL,
    is_valid_filename, part_bytes,
};
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
