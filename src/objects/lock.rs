//! Object Lock: buckets that keep each new object until its retention ends.

use aws_sdk_s3::primitives::DateTime;
use aws_sdk_s3::types::ObjectLockLegalHoldStatus;
use time::OffsetDateTime;

use super::{Error, Objects, Place, failed, status};

impl Objects {
    /// Whether the bucket keeps every new object by a default retention. Where the broker may not read the bucket's
    /// configuration, the object that an earlier probe could not delete tells.
    pub(super) async fn is_locked(&self, bucket: &str, kept: &Place) -> Result<bool, Error> {
        match self.0.calls.get_object_lock_configuration().bucket(bucket).send().await {
            Ok(output) => {
                let rule = output.object_lock_configuration().and_then(|configuration| configuration.rule());
                Ok(rule.is_some_and(|rule| rule.default_retention().is_some()))
            }
            Err(error) if status(&error).is_some_and(|status| status < 500 || status == 501) => {
                Ok(self.lock_of(kept, None).await?.is_some())
            }
            Err(error) => Err(failed("GetObjectLockConfiguration", &error)),
        }
    }

    /// The lock that keeps this version of an object; none where nothing keeps it, or it is not there.
    pub(super) async fn lock_of(&self, place: &Place, version_id: Option<&str>) -> Result<Option<Lock>, Error> {
        let call = self.0.calls.head_object().bucket(&place.bucket).key(&place.key);
        match call.set_version_id(version_id.map(str::to_owned)).send().await {
            Ok(output) => {
                let until = output.object_lock_retain_until_date().and_then(to_time);
                let is_held = output.object_lock_legal_hold_status() == Some(&ObjectLockLegalHoldStatus::On);
                let is_kept = is_held || output.object_lock_mode().is_some();
                Ok(is_kept.then_some(Lock { until: until.filter(|_| !is_held) }))
            }
            Err(error) if status(&error).is_some_and(|status| status < 500) => Ok(None),
            Err(error) => Err(failed("HeadObject", &error)),
        }
    }
}

/// Why an object cannot be deleted yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Lock {
    /// The end of its retention; none where a legal hold has no end.
    pub(super) until: Option<OffsetDateTime>,
}

impl Lock {
    /// The lock that lasts longer: one without an end, or the later end.
    pub(super) fn or_longer(self, other: Option<Self>) -> Self {
        match other {
            Some(other) => Self { until: self.until.zip(other.until).map(|(one, other)| one.max(other)) },
            None => self,
        }
    }
}

fn to_time(at: &DateTime) -> Option<OffsetDateTime> {
    OffsetDateTime::from_unix_timestamp(at.secs()).ok()
}
