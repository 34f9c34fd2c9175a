//! Removal of objects and multipart uploads. Every function is idempotent: a repeated call finds nothing to remove.

use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::error::SdkError;

use super::connect::{CallTimeouts, timeout_override};
use super::list::{MAX_PAGES_OF_KEY, UploadMarker, too_many_pages};
use super::lock::ObjectLock;
use super::{Error, ObjectLocation, Objects, call_error, error_code, http_status, is_unsupported};

type DeleteError = SdkError<aws_sdk_s3::operation::delete_object::DeleteObjectError, HttpResponse>;

impl Objects {
    /// Aborts every multipart upload of exactly this key, and the upload with the known id. Returns how many S3 aborted;
    /// MinIO also counts a known upload that no longer exists.
    ///
    /// The parts of a PUT that is in flight may appear afterwards, so the caller must call again later.
    ///
    /// # Errors
    /// If S3 does not answer or denies access.
    pub async fn abort_multipart_uploads(
        &self,
        location: &ObjectLocation,
        known_s3_upload_id: Option<&str>,
    ) -> Result<u32, Error> {
        let mut aborted = 0;
        if let Some(s3_upload_id) = known_s3_upload_id {
            aborted += self.abort_multipart_upload(location, s3_upload_id).await?;
        }
        let mut marker = UploadMarker::default();
        for _ in 0..MAX_PAGES_OF_KEY {
            let page = self.list_multipart_uploads(&location.bucket, &location.key, marker).await?;
            for upload in page.items.iter().filter(|upload| upload.key == location.key) {
                aborted += self.abort_multipart_upload(location, &upload.s3_upload_id).await?;
            }
            match page.next {
                Some(next) => marker = next,
                None => return Ok(aborted),
            }
        }
        Err(too_many_pages("ListMultipartUploads"))
    }

    /// Aborts one multipart upload. Returns 0 if S3 knows no upload with this id.
    ///
    /// # Errors
    /// If S3 does not answer or denies access.
    pub async fn abort_multipart_upload(&self, location: &ObjectLocation, s3_upload_id: &str) -> Result<u32, Error> {
        let request = self.0.client.abort_multipart_upload().bucket(&location.bucket).key(&location.key).upload_id(s3_upload_id);
        match request.customize().config_override(timeout_override(CallTimeouts::DELETE)).send().await {
            Ok(_) => Ok(1),
            Err(error) if error_code(&error) == "NoSuchUpload" => Ok(0),
            Err(error) => Err(call_error("AbortMultipartUpload", &error)),
        }
    }

    /// Deletes every version and delete marker of exactly this key. Returns how many were deleted.
    ///
    /// # Errors
    /// If S3 does not answer or denies access: a versioned bucket needs `s3:ListBucketVersions` and
    /// `s3:DeleteObjectVersion`. [`Error::Locked`] if Object Lock retains a version; the other versions are deleted.
    pub async fn delete_versions(&self, location: &ObjectLocation) -> Result<u32, Error> {
        let (mut deleted, mut lock) = (0, None);
        let (mut key_marker, mut version_marker) = (None, None);
        for _ in 0..MAX_PAGES_OF_KEY {
            let result = self
                .0
                .client
                .list_object_versions()
                .bucket(&location.bucket)
                .prefix(&location.key)
                .set_key_marker(key_marker)
                .set_version_id_marker(version_marker)
                .customize()
                .config_override(timeout_override(CallTimeouts::DELETE))
                .send()
                .await;
            let page = match result {
                Ok(page) => page,
                Err(error) if is_unsupported(&error) || error_code(&error) == "AccessDenied" => {
                    return self.delete_without_version(location).await;
                }
                Err(error) => return Err(call_error("ListObjectVersions", &error)),
            };
            let versions = page.versions().iter().map(|version| (version.key(), version.version_id()));
            let markers = page.delete_markers().iter().map(|marker| (marker.key(), marker.version_id()));
            for (key, version_id) in versions.chain(markers) {
                if key == Some(&location.key) {
                    match self.delete_version(location, version_id).await {
                        Ok(count) => deleted += count,
                        Err(Error::Locked { until }) => lock = Some(ObjectLock { until }.longest(lock)),
                        Err(error) => return Err(error),
                    }
                }
            }
            if page.is_truncated() != Some(true) {
                return lock.map_or(Ok(deleted), |ObjectLock { until }| Err(Error::Locked { until }));
            }
            key_marker = page.next_key_marker().map(str::to_owned);
            version_marker = page.next_version_id_marker().map(str::to_owned);
        }
        Err(too_many_pages("ListObjectVersions"))
    }

    async fn delete_version(&self, location: &ObjectLocation, version_id: Option<&str>) -> Result<u32, Error> {
        let request = self.0.client.delete_object().bucket(&location.bucket).key(&location.key);
        let request = request.set_version_id(version_id.filter(|id| !id.is_empty()).map(str::to_owned));
        match request.customize().config_override(timeout_override(CallTimeouts::DELETE)).send().await {
            Ok(_) => Ok(1),
            Err(error) if matches!(error_code(&error).as_str(), "NoSuchKey" | "NoSuchVersion" | "NotFound") => Ok(0),
            // A store without versioning may list a version "null" and then reject that id in a DELETE.
            Err(error) if version_id == Some("null") && (is_unsupported(&error) || http_status(&error) == Some(400)) => {
                self.delete_without_version(location).await
            }
            Err(error) => Err(self.delete_error(location, version_id, &error).await),
        }
    }

    /// The reason why an object was not deleted. Stores answer with different codes for a locked object, so a HEAD decides
    /// whether a lock is the reason.
    async fn delete_error(&self, location: &ObjectLocation, version_id: Option<&str>, error: &DeleteError) -> Error {
        if http_status(error).is_none_or(|status| status >= 500) {
            return call_error("DeleteObject", error);
        }
        let version_id = version_id.filter(|id| !id.is_empty() && *id != "null");
        match self.object_lock(location, version_id).await {
            Ok(Some(ObjectLock { until })) => Error::Locked { until },
            Ok(None) => call_error("DeleteObject", error),
            Err(head_error) => head_error,
        }
    }

    /// Deletes the object without a version id. A delete marker is an error, because it only hides the object and the bytes
    /// remain.
    async fn delete_without_version(&self, location: &ObjectLocation) -> Result<u32, Error> {
        let request = self.0.client.delete_object().bucket(&location.bucket).key(&location.key);
        match request.customize().config_override(timeout_override(CallTimeouts::DELETE)).send().await {
            Ok(output) if output.delete_marker() == Some(true) => Err(Error::Refused {
                code: "AccessDenied".to_owned(),
                message: "ListObjectVersions: the bucket is versioned, but the broker may not list its versions".to_owned(),
            }),
            Ok(_) => Ok(1),
            Err(error) if matches!(error_code(&error).as_str(), "NoSuchKey" | "NotFound") => Ok(0),
            Err(error) => Err(self.delete_error(location, None, &error).await),
        }
    }
}
