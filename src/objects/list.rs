//! Lists of objects and multipart uploads, page by page. Only the audit lists buckets; other modules read the database.

use time::OffsetDateTime;

use super::connect::{CallTimeouts, timeout_override};
use super::{Error, ObjectLocation, Objects, call_error, is_unsupported};

/// A key of the broker has one version and one multipart upload, or a few after a race. More than ten pages of 1,000 mean a
/// fault of the store.
pub(super) const MAX_PAGES_OF_KEY: usize = 10;

/// A page of a list and the marker of the next page.
#[derive(Debug)]
pub struct Page<T, N> {
    /// At most 1,000 entries.
    pub items: Vec<T>,
    /// The marker to pass for the next page; `None` on the last page.
    pub next: Option<N>,
}

/// An object in a list.
#[derive(Debug, Clone)]
pub struct ListedObject {
    /// The key of the object.
    pub key: String,
    /// The size in bytes.
    pub size_bytes: u64,
}

/// A multipart upload that was created and neither completed nor aborted.
#[derive(Debug, Clone)]
pub struct OpenMultipartUpload {
    /// The key of the future object.
    pub key: String,
    /// The upload id that S3 assigned.
    pub s3_upload_id: String,
    /// The time of its creation, if S3 reports it.
    pub initiated_at: Option<OffsetDateTime>,
}

/// The position in a list of multipart uploads: the next page starts after this key and upload.
#[derive(Debug, Clone, Default)]
pub struct UploadMarker {
    key: Option<String>,
    s3_upload_id: Option<String>,
}

impl Objects {
    /// A page of the objects whose keys start with `prefix`, without older versions.
    ///
    /// # Errors
    /// If S3 does not answer or denies access.
    pub async fn list(&self, bucket: &str, prefix: &str, next: Option<String>) -> Result<Page<ListedObject, String>, Error> {
        let request = self.0.client.list_objects_v2().bucket(bucket).prefix(prefix).set_continuation_token(next);
        let result = request.customize().config_override(timeout_override(CallTimeouts::DELETE)).send().await;
        let page = result.map_err(|error| call_error("ListObjectsV2", &error))?;
        let items = page.contents().iter().filter_map(|object| {
            let size_bytes = object.size().and_then(|bytes| u64::try_from(bytes).ok()).unwrap_or(0);
            Some(ListedObject { key: object.key()?.to_owned(), size_bytes })
        });
        let next = page.next_continuation_token().filter(|_| page.is_truncated() == Some(true));
        Ok(Page { items: items.collect(), next: next.map(str::to_owned) })
    }

    /// A page of the open multipart uploads whose keys start with `prefix`. MinIO supports only an exact key or a whole
    /// bucket. The page is empty if the store does not implement the operation.
    ///
    /// # Errors
    /// If S3 does not answer or denies access.
    pub async fn list_multipart_uploads(
        &self,
        bucket: &str,
        prefix: &str,
        marker: UploadMarker,
    ) -> Result<Page<OpenMultipartUpload, UploadMarker>, Error> {
        let request = self.0.client.list_multipart_uploads().bucket(bucket).prefix(prefix);
        let request = request.set_key_marker(marker.key).set_upload_id_marker(marker.s3_upload_id);
        let page = match request.customize().config_override(timeout_override(CallTimeouts::DELETE)).send().await {
            Ok(page) => page,
            Err(error) if is_unsupported(&error) => return Ok(Page { items: Vec::new(), next: None }),
            Err(error) => return Err(call_error("ListMultipartUploads", &error)),
        };
        let items = page.uploads().iter().filter_map(|upload| {
            let initiated_at = upload.initiated().and_then(|at| OffsetDateTime::from_unix_timestamp(at.secs()).ok());
            let s3_upload_id = upload.upload_id()?.to_owned();
            Some(OpenMultipartUpload { key: upload.key()?.to_owned(), s3_upload_id, initiated_at })
        });
        let next_marker = || UploadMarker {
            key: page.next_key_marker().map(str::to_owned),
            s3_upload_id: page.next_upload_id_marker().map(str::to_owned),
        };
        // Some stores report a truncated list without a marker. A call without a marker would return the first page again.
        let next = (page.is_truncated() == Some(true)).then(next_marker).filter(|marker| marker.key.is_some());
        Ok(Page { items: items.collect(), next })
    }

    /// The open multipart uploads of exactly this key.
    ///
    /// # Errors
    /// If S3 does not answer or denies access.
    pub async fn multipart_uploads_of_key(&self, location: &ObjectLocation) -> Result<Vec<OpenMultipartUpload>, Error> {
        let (mut uploads, mut marker) = (Vec::new(), UploadMarker::default());
        for _ in 0..MAX_PAGES_OF_KEY {
            let page = self.list_multipart_uploads(&location.bucket, &location.key, marker).await?;
            uploads.extend(page.items.into_iter().filter(|upload| upload.key == location.key));
            match page.next {
                Some(next) => marker = next,
                None => return Ok(uploads),
            }
        }
        Err(too_many_pages("ListMultipartUploads"))
    }
}

pub(super) fn too_many_pages(operation: &str) -> Error {
    Error::Unavailable(format!("{operation}: more than {MAX_PAGES_OF_KEY} pages for one key"))
}
