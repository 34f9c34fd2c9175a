//! Object Lock: buckets that retain each new object until its retention ends.

use aws_sdk_s3::primitives::DateTime;
use aws_sdk_s3::types::ObjectLockLegalHoldStatus;
use time::OffsetDateTime;

use super::{Error, ObjectLocation, Objects, call_error, http_status};

impl Objects {
    /// Whether the bucket has a default retention. If the broker may not read the bucket's configuration, the lock of
    /// `undeleted`, an object that an earlier probe could not delete, shows it.
    pub(super) async fn has_default_retention(&self, bucket: &str, undeleted: &ObjectLocation) -> Result<bool, Error> {
        match self.0.client.get_object_lock_configuration().bucket(bucket).send().await {
            Ok(output) => {
                let rule = output.object_lock_configuration().and_then(|configuration| configuration.rule());
                Ok(rule.is_some_and(|rule| rule.default_retention().is_some()))
            }
            Err(error) if http_status(&error).is_some_and(|status| status < 500 || status == 501) => {
                Ok(self.object_lock(undeleted, None).await?.is_some())
            }
            Err(error) => Err(call_error("GetObjectLockConfiguration", &error)),
        }
    }

    /// The lock on this version of an object; `None` if it has no lock or does not exist.
    pub(super) async fn object_lock(
        &self,
        location: &ObjectLocation,
        version_id: Option<&str>,
    ) -> Result<Option<ObjectLock>, Error> {
        let request = self.0.client.head_object().bucket(&location.bucket).key(&location.key);
        match request.set_version_id(version_id.map(str::to_owned)).send().await {
            Ok(output) => {
                let until = output.object_lock_retain_until_date().and_then(to_offset_date_time);
                let has_legal_hold = output.object_lock_legal_hold_status() == Some(&ObjectLockLegalHoldStatus::On);
                let is_locked = has_legal_hold || output.object_lock_mode().is_some();
                Ok(is_locked.then_some(ObjectLock { until: until.filter(|_| !has_legal_hold) }))
            }
            Err(error) if http_status(&error).is_some_and(|status| status < 500) => Ok(None),
            Err(error) => Err(call_error("HeadObject", &error)),
        }
    }
}

/// The reason why an object cannot be deleted yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ObjectLock {
    /// The end of the retention; `None` for a legal hold, which has no end.
    pub(super) until: Option<OffsetDateTime>,
}

impl ObjectLock {
    /// The lock that lasts longer: the lock without an end, or the lock with the later end.
    pub(super) fn longest(self, other: Option<Self>) -> Self {
        match other {
            Some(other) => Self { until: self.until.zip(other.until).map(|(one, other)| one.max(other)) },
            None => self,
        }
    }
}

fn to_offset_date_time(at: &DateTime) -> Option<OffsetDateTime> {
    OffsetDateTime::from_unix_timestamp(at.secs()).ok()
}
