//! Conditional requests: `If-Match` and related headers.

use s3s::dto::{ETag, ETagCondition, Timestamp};
use s3s::{S3Error, S3ErrorCode, S3Result, s3_error};
use time::OffsetDateTime;

use super::record::Object;

/// The conditions of a write on the existing object.
pub(super) struct Write {
    if_match: Option<ETagCondition>,
    must_be_absent: bool,
}

impl Write {
    /// Reads `If-Match` and `If-None-Match`. For writes, S3 supports only `If-None-Match: *`.
    pub(super) fn read(if_match: Option<ETagCondition>, if_none_match: Option<&ETagCondition>) -> S3Result<Self> {
        match if_none_match {
            Some(ETagCondition::ETag(_)) => Err(s3_error!(NotImplemented, "If-None-Match of a write can only be *")),
            wanted => Ok(Self { if_match, must_be_absent: wanted.is_some() }),
        }
    }

    /// A write without conditions.
    pub(super) fn none() -> Self {
        Self { if_match: None, must_be_absent: false }
    }

    pub(super) fn check(&self, found: Option<&Object>) -> S3Result<()> {
        if self.must_be_absent && found.is_some() {
            return Err(precondition_failed());
        }
        match (&self.if_match, found) {
            (Some(wanted), Some(found)) if !matches(wanted, found) => Err(precondition_failed()),
            (Some(_), None) => Err(s3_error!(NoSuchKey, "The specified key does not exist.")),
            _ => Ok(()),
        }
    }
}

/// The conditions of a read on the object.
pub(super) struct Read<'a> {
    pub(super) if_match: &'a Option<ETagCondition>,
    pub(super) if_none_match: &'a Option<ETagCondition>,
    pub(super) if_modified_since: &'a Option<Timestamp>,
    pub(super) if_unmodified_since: &'a Option<Timestamp>,
}

/// Reads the conditions of an s3s input.
macro_rules! conditions {
    ($input:expr) => {
        $crate::s3::conditions::Read {
            if_match: &$input.if_match,
            if_none_match: &$input.if_none_match,
            if_modified_since: &$input.if_modified_since,
            if_unmodified_since: &$input.if_unmodified_since,
        }
    };
}
pub(super) use conditions;

impl Read<'_> {
    /// A time condition applies only without the matching ETag condition: RFC 9110, section 13.2.2.
    pub(super) fn check(&self, object: &Object) -> S3Result<()> {
        // HTTP dates have whole seconds.
        let modified = object.facts.modified.unix_timestamp();
        let is_newer_than = |time: &Timestamp| modified > OffsetDateTime::from(time.clone()).unix_timestamp();
        let is_unchanged = match (self.if_match, self.if_unmodified_since) {
            (Some(wanted), _) => matches(wanted, object),
            (None, Some(time)) => !is_newer_than(time),
            (None, None) => true,
        };
        let is_modified = match (self.if_none_match, self.if_modified_since) {
            (Some(known), _) => !matches(known, object),
            (None, Some(time)) => is_newer_than(time),
            (None, None) => true,
        };
        match (is_unchanged, is_modified) {
            (false, _) => Err(precondition_failed()),
            (true, false) => Err(S3Error::new(S3ErrorCode::NotModified)),
            (true, true) => Ok(()),
        }
    }
}

/// The error for a condition that does not hold.
pub(super) fn precondition_failed() -> S3Error {
    s3_error!(PreconditionFailed, "At least one of the pre-conditions you specified did not hold")
}

fn matches(wanted: &ETagCondition, object: &Object) -> bool {
    match wanted {
        ETagCondition::Any => true,
        ETagCondition::ETag(ETag::Strong(wanted) | ETag::Weak(wanted)) => *wanted == object.facts.etag,
    }
}
