//! Multipart uploads: create, list the parts, complete.

use aws_sdk_s3::error::SdkError;
use aws_sdk_s3::operation::complete_multipart_upload::CompleteMultipartUploadError;
use aws_sdk_s3::types::{
    ChecksumAlgorithm, ChecksumType, CompletedMultipartUpload, CompletedPart, Part as S3Part, ServerSideEncryption,
};
use lfs_broker_client::checksum::{Algorithm, Sha256, composite};

use crate::failpoint;

use super::connect::{CallTimeouts, timeout_override};
use super::{
    Error, NewObject, ObjectLocation, Objects, TOKEN_KEY, call_error, code_and_message, error_code, http_status, parse_digest,
};

/// S3 lists 1,000 parts per page and allows 10,000 parts. The extra page is for a store that ends with an empty page.
const MAX_PAGES: usize = 11;

/// A part that S3 holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// The part number, 1 to 10,000.
    pub number: u32,
    /// The size in bytes.
    pub size_bytes: u64,
    /// The ETag, which identifies the part when the upload is completed.
    pub etag: String,
    /// The SHA-256 that S3 verified when it received the part.
    pub sha256: Option<Sha256>,
}

/// The outcome of completing a multipart upload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CompleteOutcome {
    /// S3 reports that it created the object; the caller verifies this with a HEAD.
    Done,
    /// S3 rejects the parts, or an object already exists under the key. The multipart upload stays open.
    ///
    /// The existing object may come from this upload, because MinIO answers a repeated completion this way. A HEAD decides.
    Refused(String),
    /// S3 knows no such multipart upload: it was already completed or aborted.
    NoSuchUpload,
}

impl Objects {
    /// Creates a multipart upload and returns the upload id that S3 assigned.
    ///
    /// With `part_hashes` S3 requires a signed SHA-256 for each part; without them S3 accepts any bytes.
    ///
    /// # Errors
    /// If S3 refuses or does not answer. A lost response may leave a multipart upload whose id the broker does not know.
    pub async fn create_multipart_upload(&self, object: &NewObject<'_>, part_hashes: bool) -> Result<String, Error> {
        let id = self.create_multipart_upload_for_probe(object, part_hashes).await?;
        failpoint::reach("s3.begun").await?;
        Ok(id)
    }

    /// As [`Self::create_multipart_upload`], but without the failpoint, so that the probe cannot trigger it.
    pub(super) async fn create_multipart_upload_for_probe(
        &self,
        object: &NewObject<'_>,
        part_hashes: bool,
    ) -> Result<String, Error> {
        let output = self
            .0
            .client
            .create_multipart_upload()
            .bucket(&object.location.bucket)
            .key(&object.location.key)
            .content_type(object.content_type)
            .metadata(TOKEN_KEY, object.token)
            .set_server_side_encryption(object.kms_key_id.map(|_| ServerSideEncryption::AwsKms))
            .set_ssekms_key_id(object.kms_key_id.map(str::to_owned))
            .set_checksum_algorithm(part_hashes.then_some(ChecksumAlgorithm::Sha256))
            .set_checksum_type(part_hashes.then_some(ChecksumType::Composite))
            .send()
            .await
            .map_err(|error| call_error("CreateMultipartUpload", &error))?;
        let no_id = || Error::Unavailable("CreateMultipartUpload: the answer contains no upload id".to_owned());
        output.upload_id.ok_or_else(no_id)
    }

    /// The parts that S3 holds, sorted by number; `None` if S3 knows no such multipart upload.
    ///
    /// # Errors
    /// If S3 does not answer or refuses.
    pub async fn list_parts(&self, location: &ObjectLocation, s3_upload_id: &str) -> Result<Option<Vec<Part>>, Error> {
        let mut parts = Vec::new();
        let mut marker = None;
        for _ in 0..MAX_PAGES {
            let request = self.0.client.list_parts().bucket(&location.bucket).key(&location.key).upload_id(s3_upload_id);
            let page = match request.set_part_number_marker(marker).send().await {
                Ok(page) => page,
                Err(error) if error_code(&error) == "NoSuchUpload" => return Ok(None),
                Err(error) => return Err(call_error("ListParts", &error)),
            };
            parts.extend(page.parts().iter().filter_map(part_from_s3));
            marker = page.next_part_number_marker().map(str::to_owned);
            if page.is_truncated() != Some(true) || marker.is_none() {
                parts.sort_by_key(|part| part.number);
                return Ok(Some(parts));
            }
        }
        Err(Error::Unavailable(format!("ListParts: more than {MAX_PAGES} pages")))
    }

    /// Completes a multipart upload: S3 joins the parts, as [`Objects::list_parts`] returned them, into the object.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if the outcome is unknown: the object may exist, so the caller must use [`Objects::head`].
    pub async fn complete_multipart_upload(
        &self,
        location: &ObjectLocation,
        s3_upload_id: &str,
        parts: &[Part],
        part_hashes: bool,
        size_bytes: u64,
    ) -> Result<CompleteOutcome, Error> {
        if let Some(problem) = parts_problem(parts, part_hashes, size_bytes) {
            return Ok(CompleteOutcome::Refused(problem));
        }
        let hashes: Vec<Sha256> = parts.iter().filter_map(|part| part.sha256).collect();
        let completed_parts = parts.iter().map(|part| {
            CompletedPart::builder()
                .part_number(i32::try_from(part.number).unwrap_or(i32::MAX))
                .e_tag(&part.etag)
                .set_checksum_sha256(part.sha256.filter(|_| part_hashes).map(|sha256| sha256.base64()))
                .build()
        });
        let result = self
            .0
            .client
            .complete_multipart_upload()
            .bucket(&location.bucket)
            .key(&location.key)
            .upload_id(s3_upload_id)
            .if_none_match("*")
            .mpu_object_size(i64::try_from(size_bytes).unwrap_or(i64::MAX))
            .set_checksum_sha256(part_hashes.then(|| composite(&hashes)))
            .set_checksum_type(part_hashes.then_some(ChecksumType::Composite))
            .multipart_upload(CompletedMultipartUpload::builder().set_parts(Some(completed_parts.collect())).build())
            .customize()
            .config_override(timeout_override(CallTimeouts::COMPLETE))
            .send()
            .await;
        failpoint::reach("s3.joined").await?;
        match result {
            Ok(_) => Ok(CompleteOutcome::Done),
            Err(error) => classify_complete_error(&error),
        }
    }
}

/// The reason why the parts are not the declared object. S3 would join any parts, and some stores ignore the declared size.
fn parts_problem(parts: &[Part], part_hashes: bool, size_bytes: u64) -> Option<String> {
    let total: u64 = parts.iter().map(|part| part.size_bytes).sum();
    if let Some((part, number)) = parts.iter().zip(1..).find(|(part, number)| part.number != *number) {
        return Some(format!("part {number} is missing: part {} follows instead", part.number));
    }
    if total != size_bytes {
        return Some(format!("declared {size_bytes} bytes, but the {} parts have {total}", parts.len()));
    }
    let unhashed = parts.iter().find(|part| part_hashes && part.sha256.is_none())?;
    Some(format!("part {} has no sha256", unhashed.number))
}

/// Classifies a failed completion: S3 rejects the parts, S3 knows no such upload, or the outcome is unknown.
fn classify_complete_error(error: &SdkError<CompleteMultipartUploadError>) -> Result<CompleteOutcome, Error> {
    match call_error("CompleteMultipartUpload", error) {
        Error::Refused { code, .. } if code == "NoSuchUpload" => Ok(CompleteOutcome::NoSuchUpload),
        // Status 200 is in the list, because S3 can send an error in the body of a 200 response.
        Error::Refused { .. } if matches!(http_status(error), Some(200 | 400 | 409 | 412 | 416 | 422)) => {
            Ok(CompleteOutcome::Refused(code_and_message(error)))
        }
        other => Err(other),
    }
}

fn part_from_s3(part: &S3Part) -> Option<Part> {
    Some(Part {
        number: u32::try_from(part.part_number()?).ok()?,
        size_bytes: u64::try_from(part.size().unwrap_or(0)).ok()?,
        etag: part.e_tag()?.to_owned(),
        sha256: part.checksum_sha256().and_then(|text| parse_digest(text, Algorithm::Sha256)).and_then(|digest| digest.sha256()),
    })
}

#[cfg(test)]
mod tests {
    use aws_sdk_s3::config::http::HttpResponse;
    use aws_sdk_s3::error::ErrorMetadata;
    use aws_sdk_s3::primitives::SdkBody;

    use super::*;

    fn outcome(status: u16, code: &str) -> Result<CompleteOutcome, Error> {
        let error = CompleteMultipartUploadError::generic(ErrorMetadata::builder().code(code).build());
        let response = HttpResponse::new(status.try_into().unwrap(), SdkBody::empty());
        classify_complete_error(&SdkError::service_error(error, response))
    }

    #[test]
    fn an_upload_is_completed_only_if_it_has_all_parts_and_the_declared_size() {
        let part = |number, sha256| Part { number, size_bytes: 5, etag: "e".to_owned(), sha256 };
        let hashed = |number| part(number, Some(Sha256::of(b"hello")));
        assert_eq!(parts_problem(&[hashed(1), hashed(2)], true, 10), None);
        assert_eq!(parts_problem(&[part(1, None)], false, 5), None);
        for (parts, size_bytes, expected) in [
            (vec![hashed(2)], 5, "part 1 is missing: part 2 follows instead"),
            (vec![hashed(1), hashed(3)], 10, "part 2 is missing: part 3 follows instead"),
            (vec![hashed(1)], 10, "declared 10 bytes, but the 1 parts have 5"),
            (vec![], 5, "declared 5 bytes, but the 0 parts have 0"),
            (vec![hashed(1), part(2, None)], 10, "part 2 has no sha256"),
        ] {
            assert_eq!(parts_problem(&parts, true, size_bytes).as_deref(), Some(expected));
        }
    }

    #[test]
    fn a_failed_completion_means_rejected_parts_or_no_such_upload_or_an_unknown_outcome() {
        for (status, code) in [(400, "InvalidPart"), (400, "EntityTooSmall"), (412, "PreconditionFailed"), (200, "InvalidPart")] {
            assert_eq!(outcome(status, code), Ok(CompleteOutcome::Refused(code.to_owned())));
        }
        assert_eq!(outcome(404, "NoSuchUpload"), Ok(CompleteOutcome::NoSuchUpload));
        // In the third case S3 fails after it has sent status 200.
        for (status, code) in
            [(500, "InternalError"), (503, "SlowDown"), (200, "InternalError"), (409, "ConditionalRequestConflict")]
        {
            assert!(matches!(outcome(status, code), Err(Error::Unavailable(_))), "{status} {code}");
        }
        for (status, code) in [(403, "AccessDenied"), (404, "NoSuchBucket"), (501, "NotImplemented")] {
            assert!(matches!(outcome(status, code), Err(Error::Refused { code: found, .. }) if found == code), "{status} {code}");
        }
    }
}
