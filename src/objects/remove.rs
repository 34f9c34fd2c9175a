//! Removing what must not stay. Every verb here may be repeated, and finds nothing the second time.

use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};

use super::connect::{REMOVING, patient};
use super::lock::Lock;
use super::{Error, Objects, Place, code, failed, status};

/// A key of ours has one version, or a few after a race; ten pages of 1,000 are a store gone wrong.
const MAX_PAGES: usize = 10;

type DeleteError = SdkError<aws_sdk_s3::operation::delete_object::DeleteObjectError, HttpResponse>;

impl Objects {
    /// Aborts every multipart upload of exactly this key, and the one that is known; says how many S3 let go
    /// (MinIO counts a known one that is gone already).
    ///
    /// The parts of a PUT that is still in flight may appear afterwards: the caller comes again.
    ///
    /// # Errors
    /// Where S3 does not answer or does not let us.
    pub async fn abort_uploads(&self, place: &Place, known: Option<&str>) -> Result<u32, Error> {
        let mut aborted = 0;
        if let Some(s3_upload_id) = known {
            aborted += self.abort_upload(place, s3_upload_id).await?;
        }
        let (mut key_marker, mut id_marker) = (None, None);
        for _ in 0..MAX_PAGES {
            let answer = self
                .0
                .calls
                .list_multipart_uploads()
                .bucket(&place.bucket)
                .prefix(&place.key)
                .set_key_marker(key_marker)
                .set_upload_id_marker(id_marker)
                .customize()
                .config_override(patient(REMOVING))
                .send()
                .await;
            let page = match answer {
                Ok(page) => page,
                Err(error) if is_lacking(&error) => return Ok(aborted),
                Err(error) => return Err(failed("ListMultipartUploads", &error)),
            };
            for upload in page.uploads().iter().filter(|upload| upload.key() == Some(&place.key)) {
                if let Some(s3_upload_id) = upload.upload_id() {
                    aborted += self.abort_upload(place, s3_upload_id).await?;
                }
            }
            if page.is_truncated() != Some(true) {
                return Ok(aborted);
            }
            key_marker = page.next_key_marker().map(str::to_owned);
            id_marker = page.next_upload_id_marker().map(str::to_owned);
        }
        Err(Error::Unavailable(format!("ListMultipartUploads: more than {MAX_PAGES} pages for one key")))
    }

    /// Aborts one multipart upload; 0 when S3 knows none of that id.
    ///
    /// # Errors
    /// Where S3 does not answer or does not let us.
    pub async fn abort_upload(&self, place: &Place, s3_upload_id: &str) -> Result<u32, Error> {
        let call = self.0.calls.abort_multipart_upload().bucket(&place.bucket).key(&place.key).upload_id(s3_upload_id);
        match call.customize().config_override(patient(REMOVING)).send().await {
            Ok(_) => Ok(1),
            Err(error) if code(&error) == "NoSuchUpload" => Ok(0),
            Err(error) => Err(failed("AbortMultipartUpload", &error)),
        }
    }

    /// Deletes every version and delete marker of exactly this key; says how many there were.
    ///
    /// # Errors
    /// Where S3 does not answer or does not let us: a bucket that keeps versions needs `s3:ListBucketVersions`
    /// and `s3:DeleteObjectVersion`. [`Error::Locked`] where Object Lock keeps a version; the others are deleted.
    pub async fn delete_versions(&self, place: &Place) -> Result<u32, Error> {
        let (mut deleted, mut kept) = (0, None);
        let (mut key_marker, mut version_marker) = (None, None);
        for _ in 0..MAX_PAGES {
            let answer = self
                .0
                .calls
                .list_object_versions()
                .bucket(&place.bucket)
                .prefix(&place.key)
                .set_key_marker(key_marker)
                .set_version_id_marker(version_marker)
                .customize()
                .config_override(patient(REMOVING))
                .send()
                .await;
            let page = match answer {
                Ok(page) => page,
                Err(error) if is_lacking(&error) || code(&error) == "AccessDenied" => return self.delete_plainly(place).await,
                Err(error) => return Err(failed("ListObjectVersions", &error)),
            };
            let versions = page.versions().iter().map(|version| (version.key(), version.version_id()));
            let markers = page.delete_markers().iter().map(|marker| (marker.key(), marker.version_id()));
            for (key, version_id) in versions.chain(markers) {
                if key == Some(&place.key) {
                    match self.delete_version(place, version_id).await {
                        Ok(count) => deleted += count,
                        Err(Error::Locked { until }) => kept = Some(Lock { until }.or_longer(kept)),
                        Err(error) => return Err(error),
                    }
                }
            }
            if page.is_truncated() != Some(true) {
                return kept.map_or(Ok(deleted), |Lock { until }| Err(Error::Locked { until }));
            }
            key_marker = page.next_key_marker().map(str::to_owned);
            version_marker = page.next_version_id_marker().map(str::to_owned);
        }
        Err(Error::Unavailable(format!("ListObjectVersions: more than {MAX_PAGES} pages for one key")))
    }

    async fn delete_version(&self, place: &Place, version_id: Option<&str>) -> Result<u32, Error> {
        let call = self.0.calls.delete_object().bucket(&place.bucket).key(&place.key);
        let call = call.set_version_id(version_id.filter(|id| !id.is_empty()).map(str::to_owned));
        match call.customize().config_override(patient(REMOVING)).send().await {
            Ok(_) => Ok(1),
            Err(error) if matches!(code(&error).as_str(), "NoSuchKey" | "NoSuchVersion" | "NotFound") => Ok(0),
            // A store without versions may list a "null" one and yet know no such id.
            Err(error) if version_id == Some("null") && (is_lacking(&error) || status(&error) == Some(400)) => {
                self.delete_plainly(place).await
            }
            Err(error) => Err(self.not_deleted(place, version_id, &error).await),
        }
    }

    /// Why an object was not deleted. Stores refuse what is locked with various codes; HEAD says whether a lock is the
    /// reason.
    async fn not_deleted(&self, place: &Place, version_id: Option<&str>, error: &DeleteError) -> Error {
        if status(error).is_none_or(|status| status >= 500) {
            return failed("DeleteObject", error);
        }
        let version_id = version_id.filter(|id| !id.is_empty() && *id != "null");
        match self.lock_of(place, version_id).await {
            Ok(Some(Lock { until })) => Error::Locked { until },
            Ok(None) => failed("DeleteObject", error),
            Err(unknown) => unknown,
        }
    }

    /// Deletes without naming a version. Where that only hides the object behind a marker it is an error, for the
    /// bytes are still there.
    async fn delete_plainly(&self, place: &Place) -> Result<u32, Error> {
        let call = self.0.calls.delete_object().bucket(&place.bucket).key(&place.key);
        match call.customize().config_override(patient(REMOVING)).send().await {
            Ok(answer) if answer.delete_marker() == Some(true) => Err(Error::Refused {
                code: "AccessDenied".to_owned(),
                message: "ListObjectVersions: the bucket keeps versions, but we may not list them".to_owned(),
            }),
            Ok(_) => Ok(1),
            Err(error) if matches!(code(&error).as_str(), "NoSuchKey" | "NotFound") => Ok(0),
            Err(error) => Err(self.not_deleted(place, None, &error).await),
        }
    }
}

/// Whether the store does not have this call at all.
pub(super) fn is_lacking<E: ProvideErrorMetadata>(error: &SdkError<E, HttpResponse>) -> bool {
    matches!(status(error), Some(405 | 501)) || matches!(code(error).as_str(), "NotImplemented" | "MethodNotAllowed")
}
