//! An object in parts: begin, list, finish.

use aws_sdk_s3::error::SdkError;
use aws_sdk_s3::operation::complete_multipart_upload::CompleteMultipartUploadError;
use aws_sdk_s3::types::{
    ChecksumAlgorithm, ChecksumType, CompletedMultipartUpload, CompletedPart, Part as S3Part, ServerSideEncryption,
};
use lfs_broker_client::checksum::{Algorithm, Sha256, composite};

use crate::failpoint;

use super::connect::{FINISHING, patient};
use super::{Error, Objects, Place, Put, TOKEN, code, digest, failed, status, words};

/// S3 lists 1,000 parts a page and takes 10,000; one more for a store that ends with an empty page.
const MAX_PAGES: usize = 11;

/// A part that S3 holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// 1 to 10,000.
    pub number: u32,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// The entity tag that finishing names it by.
    pub etag: String,
    /// Its SHA-256, checked by S3 when it came.
    pub sha256: Option<Sha256>,
}

/// How finishing went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finish {
    /// S3 says that the object is there; a HEAD proves it.
    Done,
    /// S3 will not make an object of these parts, or one exists already; the multipart upload is still alive.
    ///
    /// Where the object exists it may be ours: MinIO answers a repeated finish so. A HEAD tells.
    Refused(String),
    /// S3 knows no such multipart upload: it was finished or aborted before.
    Gone,
}

impl Objects {
    /// Begins a multipart upload; says S3's id for it.
    ///
    /// With part hashes S3 demands a signed SHA-256 of each part, without them it takes any bytes.
    ///
    /// # Errors
    /// Where S3 does not answer (an upload without a known id may be left) or refuses.
    pub async fn begin_multipart(&self, put: &Put<'_>, part_hashes: bool) -> Result<String, Error> {
        let id = self.create_multipart(put, part_hashes).await?;
        failpoint::reach("s3.begun").await?;
        Ok(id)
    }

    /// The same for the probe, whose uploads are nobody's.
    pub(super) async fn create_multipart(&self, put: &Put<'_>, part_hashes: bool) -> Result<String, Error> {
        let answer = self
            .0
            .calls
            .create_multipart_upload()
            .bucket(&put.place.bucket)
            .key(&put.place.key)
            .content_type(put.content_type)
            .metadata(TOKEN, put.token)
            .set_server_side_encryption(put.kms_key_id.map(|_| ServerSideEncryption::AwsKms))
            .set_ssekms_key_id(put.kms_key_id.map(str::to_owned))
            .set_checksum_algorithm(part_hashes.then_some(ChecksumAlgorithm::Sha256))
            .set_checksum_type(part_hashes.then_some(ChecksumType::Composite))
            .send()
            .await
            .map_err(|error| failed("CreateMultipartUpload", &error))?;
        let unnamed = || Error::Unavailable("CreateMultipartUpload: an answer without an upload id".to_owned());
        answer.upload_id.ok_or_else(unnamed)
    }

    /// The parts that S3 holds, by number; none where it knows no such multipart upload.
    ///
    /// # Errors
    /// Where S3 does not answer or refuses.
    pub async fn list_parts(&self, place: &Place, s3_upload_id: &str) -> Result<Option<Vec<Part>>, Error> {
        let mut parts = Vec::new();
        let mut marker = None;
        for _ in 0..MAX_PAGES {
            let call = self.0.calls.list_parts().bucket(&place.bucket).key(&place.key).upload_id(s3_upload_id);
            let page = match call.set_part_number_marker(marker).send().await {
                Ok(page) => page,
                Err(error) if code(&error) == "NoSuchUpload" => return Ok(None),
                Err(error) => return Err(failed("ListParts", &error)),
            };
            parts.extend(page.parts().iter().filter_map(part));
            marker = page.next_part_number_marker().map(str::to_owned);
            if page.is_truncated() != Some(true) || marker.is_none() {
                parts.sort_by_key(|part| part.number);
                return Ok(Some(parts));
            }
        }
        Err(Error::Unavailable(format!("ListParts: more than {MAX_PAGES} pages")))
    }

    /// Makes the object of its parts, which are those that [`Objects::list_parts`] gave.
    ///
    /// # Errors
    /// [`Error::Unavailable`] where the outcome is unknown: the object may exist, ask with [`Objects::head`].
    pub async fn finish(
        &self,
        place: &Place,
        s3_upload_id: &str,
        parts: &[Part],
        part_hashes: bool,
        size_bytes: u64,
    ) -> Result<Finish, Error> {
        if let Some(flaw) = flaw(parts, part_hashes, size_bytes) {
            return Ok(Finish::Refused(flaw));
        }
        let hashes: Vec<Sha256> = parts.iter().filter_map(|part| part.sha256).collect();
        let named = parts.iter().map(|part| {
            CompletedPart::builder()
                .part_number(i32::try_from(part.number).unwrap_or(i32::MAX))
                .e_tag(&part.etag)
                .set_checksum_sha256(part.sha256.filter(|_| part_hashes).map(|sha256| sha256.base64()))
                .build()
        });
        let answer = self
            .0
            .calls
            .complete_multipart_upload()
            .bucket(&place.bucket)
            .key(&place.key)
            .upload_id(s3_upload_id)
            .if_none_match("*")
            .mpu_object_size(i64::try_from(size_bytes).unwrap_or(i64::MAX))
            .set_checksum_sha256(part_hashes.then(|| composite(&hashes)))
            .set_checksum_type(part_hashes.then_some(ChecksumType::Composite))
            .multipart_upload(CompletedMultipartUpload::builder().set_parts(Some(named.collect())).build())
            .customize()
            .config_override(patient(FINISHING))
            .send()
            .await;
        failpoint::reach("s3.joined").await?;
        match answer {
            Ok(_) => Ok(Finish::Done),
            Err(error) => refusal(&error),
        }
    }
}

/// What is wrong with the parts. S3 would make an object of any of them, and some stores do not add up their sizes.
fn flaw(parts: &[Part], part_hashes: bool, size_bytes: u64) -> Option<String> {
    let total: u64 = parts.iter().map(|part| part.size_bytes).sum();
    if let Some((part, number)) = parts.iter().zip(1..).find(|(part, number)| part.number != *number) {
        return Some(format!("part {number} is missing: part {} is in its place", part.number));
    }
    if total != size_bytes {
        return Some(format!("promised {size_bytes} bytes, the {} parts have {total}", parts.len()));
    }
    let bare = parts.iter().find(|part| part_hashes && part.sha256.is_none())?;
    Some(format!("part {} has no sha256", bare.number))
}

/// Sorts a failed finish: the parts' fault, nothing left to finish, or unknown.
fn refusal(error: &SdkError<CompleteMultipartUploadError>) -> Result<Finish, Error> {
    match failed("CompleteMultipartUpload", error) {
        Error::Refused { code, .. } if code == "NoSuchUpload" => Ok(Finish::Gone),
        // A 200 with an error in its body comes as one of these too.
        Error::Refused { .. } if matches!(status(error), Some(200 | 400 | 409 | 412 | 416 | 422)) => {
            Ok(Finish::Refused(words(error)))
        }
        other => Err(other),
    }
}

fn part(part: &S3Part) -> Option<Part> {
    Some(Part {
        number: u32::try_from(part.part_number()?).ok()?,
        size_bytes: u64::try_from(part.size().unwrap_or(0)).ok()?,
        etag: part.e_tag()?.to_owned(),
        sha256: part.checksum_sha256().and_then(|text| digest(text, Algorithm::Sha256)).and_then(|digest| digest.sha256()),
    })
}

#[cfg(test)]
mod tests {
    use aws_sdk_s3::config::http::HttpResponse;
    use aws_sdk_s3::error::ErrorMetadata;
    use aws_sdk_s3::primitives::SdkBody;

    use super::*;

    fn answered(status: u16, code: &str) -> Result<Finish, Error> {
        let error = CompleteMultipartUploadError::generic(ErrorMetadata::builder().code(code).build());
        let response = HttpResponse::new(status.try_into().unwrap(), SdkBody::empty());
        refusal(&SdkError::service_error(error, response))
    }

    #[test]
    fn only_all_parts_of_the_promised_size_make_an_object() {
        let part = |number, sha256| Part { number, size_bytes: 5, etag: "e".to_owned(), sha256 };
        let hashed = |number| part(number, Some(Sha256::of(b"hello")));
        assert_eq!(flaw(&[hashed(1), hashed(2)], true, 10), None);
        assert_eq!(flaw(&[part(1, None)], false, 5), None);
        for (parts, size_bytes, expected) in [
            (vec![hashed(2)], 5, "part 1 is missing: part 2 is in its place"),
            (vec![hashed(1), hashed(3)], 10, "part 2 is missing: part 3 is in its place"),
            (vec![hashed(1)], 10, "promised 10 bytes, the 1 parts have 5"),
            (vec![], 5, "promised 5 bytes, the 0 parts have 0"),
            (vec![hashed(1), part(2, None)], 10, "part 2 has no sha256"),
        ] {
            assert_eq!(flaw(&parts, true, size_bytes).as_deref(), Some(expected));
        }
    }

    #[test]
    fn a_failed_finish_is_the_parts_fault_or_final_or_unknown() {
        for (status, code) in [(400, "InvalidPart"), (400, "EntityTooSmall"), (412, "PreconditionFailed"), (200, "InvalidPart")] {
            assert_eq!(answered(status, code), Ok(Finish::Refused(code.to_owned())));
        }
        assert_eq!(answered(404, "NoSuchUpload"), Ok(Finish::Gone));
        // The third is how S3 fails after it has said 200.
        for (status, code) in
            [(500, "InternalError"), (503, "SlowDown"), (200, "InternalError"), (409, "ConditionalRequestConflict")]
        {
            assert!(matches!(answered(status, code), Err(Error::Unavailable(_))), "{status} {code}");
        }
        for (status, code) in [(403, "AccessDenied"), (404, "NoSuchBucket"), (501, "NotImplemented")] {
            assert!(matches!(answered(status, code), Err(Error::Refused { code: said, .. }) if said == code), "{status} {code}");
        }
    }
}
