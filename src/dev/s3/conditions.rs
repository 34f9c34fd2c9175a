//! What a request demands of the object it meets: `If-Match` and its kin.

use s3s::dto::{ETag, ETagCondition, Timestamp};
use s3s::{S3Error, S3ErrorCode, S3Result, s3_error};
use time::OffsetDateTime;

use super::record::Object;

/// What a write demands of the object that is there.
pub(super) struct Write {
    if_match: Option<ETagCondition>,
    absent: bool,
}

impl Write {
    /// Reads `If-Match` and `If-None-Match`; of the latter S3 knows only `*` where something is written.
    pub(super) fn read(if_match: Option<ETagCondition>, if_none_match: Option<&ETagCondition>) -> S3Result<Self> {
        match if_none_match {
            Some(ETagCondition::ETag(_)) => Err(s3_error!(NotImplemented, "If-None-Match of a write can only be *")),
            wanted => Ok(Self { if_match, absent: wanted.is_some() }),
        }
    }

    /// A write that demands nothing.
    pub(super) fn always() -> Self {
        Self { if_match: None, absent: false }
    }

    pub(super) fn check(&self, found: Option<&Object>) -> S3Result<()> {
        if self.absent && found.is_some() {
            return Err(failed());
        }
        match (&self.if_match, found) {
            (Some(wanted), Some(found)) if !matches(wanted, found) => Err(failed()),
            (Some(_), None) => Err(s3_error!(NoSuchKey, "The specified key does not exist.")),
            _ => Ok(()),
        }
    }
}

/// What a read demands of the object it finds.
pub(super) struct Read<'a> {
    pub(super) if_match: &'a Option<ETagCondition>,
    pub(super) if_none_match: &'a Option<ETagCondition>,
    pub(super) if_modified_since: &'a Option<Timestamp>,
    pub(super) if_unmodified_since: &'a Option<Timestamp>,
}

/// Reads the conditions of one of s3s's inputs.
macro_rules! conditions {
    ($input:expr) => {
        $crate::dev::s3::conditions::Read {
            if_match: &$input.if_match,
            if_none_match: &$input.if_none_match,
            if_modified_since: &$input.if_modified_since,
            if_unmodified_since: &$input.if_unmodified_since,
        }
    };
}
pub(super) use conditions;

impl Read<'_> {
    /// An ETag decides where one is given, a time where none is: RFC 9110, section 13.2.2.
    pub(super) fn check(&self, object: &Object) -> S3Result<()> {
        // Headers know whole seconds only.
        let modified = object.facts.modified.unix_timestamp();
        let later = |time: &Timestamp| modified > OffsetDateTime::from(time.clone()).unix_timestamp();
        let kept = match (self.if_match, self.if_unmodified_since) {
            (Some(wanted), _) => matches(wanted, object),
            (None, Some(time)) => !later(time),
            (None, None) => true,
        };
        let changed = match (self.if_none_match, self.if_modified_since) {
            (Some(known), _) => !matches(known, object),
            (None, Some(time)) => later(time),
            (None, None) => true,
        };
        match (kept, changed) {
            (false, _) => Err(failed()),
            (true, false) => Err(S3Error::new(S3ErrorCode::NotModified)),
            (true, true) => Ok(()),
        }
    }
}

/// The answer to a condition that does not hold.
pub(super) fn failed() -> S3Error {
    s3_error!(PreconditionFailed, "At least one of the pre-conditions you specified did not hold")
}

fn matches(wanted: &ETagCondition, object: &Object) -> bool {
    match wanted {
        ETagCondition::Any => true,
        ETagCondition::ETag(ETag::Strong(wanted) | ETag::Weak(wanted)) => *wanted == object.facts.etag,
    }
}
