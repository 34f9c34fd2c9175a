//! Lists: what S3 holds in a bucket, page by page. Only the audit asks; everybody else works from rows.

use time::OffsetDateTime;

use super::connect::{REMOVING, patient};
use super::remove::is_lacking;
use super::{Error, Objects, Place, failed};

/// A key of ours has one multipart upload, or a few after a race.
const MAX_PAGES: usize = 10;

/// A page of a list, and what to give for the next one; none at the end.
#[derive(Debug)]
pub struct Page<T, N> {
    /// At most 1,000 entries.
    pub items: Vec<T>,
    /// Where the next page begins.
    pub next: Option<N>,
}

/// An object in a list.
#[derive(Debug, Clone)]
pub struct Listed {
    /// Its key.
    pub key: String,
    /// Its size in bytes.
    pub size_bytes: u64,
}

/// A multipart upload that was begun and neither completed nor aborted.
#[derive(Debug, Clone)]
pub struct OpenUpload {
    /// The key of the object that it would become.
    pub key: String,
    /// S3's name for it.
    pub s3_upload_id: String,
    /// When it was begun, where S3 says so.
    pub begun_at: Option<OffsetDateTime>,
}

/// Where a list of multipart uploads goes on: behind this key and upload.
#[derive(Debug, Clone, Default)]
pub struct Behind {
    key: Option<String>,
    s3_upload_id: Option<String>,
}

impl Objects {
    /// A page of the objects whose keys begin with `prefix`: current versions only.
    ///
    /// # Errors
    /// Where S3 does not answer or does not let us.
    pub async fn list(&self, bucket: &str, prefix: &str, next: Option<String>) -> Result<Page<Listed, String>, Error> {
        let call = self.0.calls.list_objects_v2().bucket(bucket).prefix(prefix).set_continuation_token(next);
        let page =
            call.customize().config_override(patient(REMOVING)).send().await.map_err(|error| failed("ListObjectsV2", &error))?;
        let items = page.contents().iter().filter_map(|object| {
            let size_bytes = object.size().and_then(|bytes| u64::try_from(bytes).ok()).unwrap_or(0);
            Some(Listed { key: object.key()?.to_owned(), size_bytes })
        });
        let next = page.next_continuation_token().filter(|_| page.is_truncated() == Some(true));
        Ok(Page { items: items.collect(), next: next.map(str::to_owned) })
    }

    /// A page of the open multipart uploads whose keys begin with `prefix`. MinIO answers for an exact key
    /// or a whole bucket only, and a store that lacks the call lists none.
    ///
    /// # Errors
    /// Where S3 does not answer or does not let us.
    pub async fn list_uploads(&self, bucket: &str, prefix: &str, behind: Behind) -> Result<Page<OpenUpload, Behind>, Error> {
        let call = self.0.calls.list_multipart_uploads().bucket(bucket).prefix(prefix);
        let call = call.set_key_marker(behind.key).set_upload_id_marker(behind.s3_upload_id);
        let page = match call.customize().config_override(patient(REMOVING)).send().await {
            Ok(page) => page,
            Err(error) if is_lacking(&error) => return Ok(Page { items: Vec::new(), next: None }),
            Err(error) => return Err(failed("ListMultipartUploads", &error)),
        };
        let items = page.uploads().iter().filter_map(|upload| {
            let begun_at = upload.initiated().and_then(|at| OffsetDateTime::from_unix_timestamp(at.secs()).ok());
            Some(OpenUpload { key: upload.key()?.to_owned(), s3_upload_id: upload.upload_id()?.to_owned(), begun_at })
        });
        let behind = || Behind {
            key: page.next_key_marker().map(str::to_owned),
            s3_upload_id: page.next_upload_id_marker().map(str::to_owned),
        };
        // Some stores say that there is more and not where: asking again would begin anew.
        let next = (page.is_truncated() == Some(true)).then(behind).filter(|behind| behind.key.is_some());
        Ok(Page { items: items.collect(), next })
    }

    /// The open multipart uploads of exactly this key.
    ///
    /// # Errors
    /// Where S3 does not answer or does not let us.
    pub async fn uploads_of(&self, place: &Place) -> Result<Vec<OpenUpload>, Error> {
        let (mut uploads, mut behind) = (Vec::new(), Behind::default());
        for _ in 0..MAX_PAGES {
            let page = self.list_uploads(&place.bucket, &place.key, behind).await?;
            uploads.extend(page.items.into_iter().filter(|upload| upload.key == place.key));
            match page.next {
                Some(next) => behind = next,
                None => return Ok(uploads),
            }
        }
        Err(Error::Unavailable(format!("ListMultipartUploads: more than {MAX_PAGES} pages for one key")))
    }
}
