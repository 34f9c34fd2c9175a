//! The operations on one object: put, get, head, copy, delete.

use std::sync::Arc;

use futures_util::StreamExt as _;
use s3s::dto::*;
use s3s::{S3ErrorCode, S3Request, S3Result, StdError, s3_error};
use time::OffsetDateTime;

use super::api::{Api, check_null_version, reject_unsupported_headers};
use super::checksum::{Algorithm, ExpectedDigest, Kind, declared, set_checksum};
use super::conditions::{self, conditions};
use super::content::{self, ReceivedBody};
use super::record::{Object, ObjectFacts, ObjectHeaders, object_headers, set_object_headers};

/// AWS's limit on the bytes of one PUT, one part, and the source of one copy.
const MAX_PUT_BYTES: u64 = 5 << 30;

/// AWS's limit on the size of user metadata.
const MAX_METADATA_BYTES: usize = 2048;

impl Api {
    pub(super) async fn put(&self, request: S3Request<PutObjectInput>) -> S3Result<PutObjectOutput> {
        let S3Request { input, headers, trailing_headers, .. } = request;
        reject_unsupported_headers(&headers)?;
        let condition = conditions::Write::read(input.if_match, input.if_none_match.as_ref())?;
        let object_headers = check_metadata_size(object_headers!(input))?;
        let size_bytes = content_length(input.content_length)?;
        self.store.with_bucket(&input.bucket, |_| Ok(()))?;
        let expected = ExpectedDigest::read(declared!(input)?, input.content_md5.as_deref(), &headers, trailing_headers)?;
        let body = input.body.ok_or_else(|| s3_error!(IncompleteBody, "the request has no body"))?;
        let algorithm = expected.algorithm.unwrap_or(Algorithm::Crc64nvme);
        let received = content::receive(&self.store.content(), body, size_bytes, &expected, algorithm).await?;
        let object = single_part_object(input.key, received, object_headers);
        let bucket = input.bucket;
        let object = self.blocking(move |store| store.put(&bucket, object, &condition)).await?;
        let mut output = PutObjectOutput { e_tag: Some(etag(&object)), checksum_type: Some(kind(&object)), ..Default::default() };
        set_checksum!(output, &object.facts.checksum);
        Ok(output)
    }

    pub(super) fn get(&self, input: &GetObjectInput) -> S3Result<GetObjectOutput> {
        if input.part_number.is_some() {
            return Err(s3_error!(NotImplemented, "Reading a part by its number is not implemented."));
        }
        let object = self.find_object(&input.bucket, &input.key, input.version_id.as_deref())?;
        conditions!(input).check(&object)?;
        let facts = &object.facts;
        let (range, content_range) = match &input.range {
            Some(range) => {
                let bytes = range.check(facts.size_bytes)?;
                if bytes.is_empty() {
                    return Err(S3ErrorCode::InvalidRange.into());
                }
                let shown = format!("bytes {}-{}/{}", bytes.start, bytes.end - 1, facts.size_bytes);
                (bytes, Some(shown))
            }
            None => (0..facts.size_bytes, None),
        };
        let mut output = GetObjectOutput {
            accept_ranges: Some("bytes".to_owned()),
            content_length: Some(length(range.end - range.start)),
            body: Some(StreamingBlob::wrap(content::read(&object.content, range))),
            e_tag: Some(etag(&object)),
            last_modified: Some(facts.modified.into()),
            ..Default::default()
        };
        set_object_headers!(output, &facts.headers);
        // The checksum of the whole object cannot verify a range.
        if wants_checksum(input.checksum_mode.as_ref()) && content_range.is_none() {
            output.checksum_type = Some(kind(&object));
            set_checksum!(output, &facts.checksum);
        }
        output.content_range = content_range;
        Ok(output)
    }

    pub(super) fn head(&self, input: &HeadObjectInput) -> S3Result<HeadObjectOutput> {
        if input.part_number.is_some() || input.range.is_some() {
            return Err(s3_error!(NotImplemented, "HEAD of a part or a range is not implemented."));
        }
        let object = self.find_object(&input.bucket, &input.key, input.version_id.as_deref())?;
        conditions!(input).check(&object)?;
        let mut output = HeadObjectOutput {
            accept_ranges: Some("bytes".to_owned()),
            content_length: Some(length(object.facts.size_bytes)),
            e_tag: Some(etag(&object)),
            last_modified: Some(object.facts.modified.into()),
            ..Default::default()
        };
        set_object_headers!(output, &object.facts.headers);
        if wants_checksum(input.checksum_mode.as_ref()) {
            output.checksum_type = Some(kind(&object));
            set_checksum!(output, &object.facts.checksum);
        }
        Ok(output)
    }

    pub(super) async fn copy(&self, request: S3Request<CopyObjectInput>) -> S3Result<CopyObjectOutput> {
        let S3Request { input, headers, .. } = request;
        reject_unsupported_headers(&headers)?;
        let CopySource::Bucket { bucket, key, version_id } = &input.copy_source else {
            return Err(s3_error!(NotImplemented, "Only objects can be copied, by bucket and key."));
        };
        let source = self.find_object(bucket, key, version_id.as_deref())?;
        let condition = conditions::Read {
            if_match: &input.copy_source_if_match,
            if_none_match: &input.copy_source_if_none_match,
            if_modified_since: &input.copy_source_if_modified_since,
            if_unmodified_since: &input.copy_source_if_unmodified_since,
        };
        // Where a read answers 304, a copy answers 412.
        condition.check(&source).map_err(|_| conditions::precondition_failed())?;
        if source.facts.size_bytes > MAX_PUT_BYTES {
            return Err(s3_error!(InvalidRequest, "The specified copy source is larger than {MAX_PUT_BYTES} bytes"));
        }
        let replaces_metadata =
            input.metadata_directive.as_ref().is_some_and(|directive| directive.as_str() == MetadataDirective::REPLACE);
        if !replaces_metadata && input.bucket == **bucket && input.key == **key {
            return Err(s3_error!(InvalidRequest, "This copy request is illegal because it changes nothing."));
        }
        let object_headers =
            if replaces_metadata { check_metadata_size(object_headers!(input))? } else { source.facts.headers.clone() };
        self.store.with_bucket(&input.bucket, |_| Ok(()))?;
        let algorithm = match &input.checksum_algorithm {
            Some(name) => Algorithm::parse(name.as_str())?,
            None => source.facts.checksum.algorithm,
        };
        let size_bytes = source.facts.size_bytes;
        let body = content::read(&source.content, 0..size_bytes).map(|chunk| chunk.map_err(StdError::from)).boxed();
        let received = content::receive(&self.store.content(), body, size_bytes, &ExpectedDigest::none(), algorithm).await?;
        let object = single_part_object(input.key, received, object_headers);
        let bucket = input.bucket;
        let object = self.blocking(move |store| store.put(&bucket, object, &conditions::Write::none())).await?;
        let modified = Some(object.facts.modified.into());
        let mut result = CopyObjectResult { e_tag: Some(etag(&object)), last_modified: modified, ..Default::default() };
        result.checksum_type = Some(kind(&object));
        set_checksum!(result, &object.facts.checksum);
        Ok(CopyObjectOutput { copy_object_result: Some(result), ..Default::default() })
    }

    pub(super) async fn delete(&self, input: DeleteObjectInput) -> S3Result<DeleteObjectOutput> {
        check_null_version(input.version_id.as_deref())?;
        if input.if_match.is_some() || input.if_match_size.is_some() || input.if_match_last_modified_time.is_some() {
            return Err(s3_error!(NotImplemented, "Conditional deletes are not implemented."));
        }
        let DeleteObjectInput { bucket, key, .. } = input;
        self.blocking(move |store| store.remove(&bucket, &key)).await?;
        Ok(DeleteObjectOutput::default())
    }

    pub(super) async fn delete_many(&self, input: DeleteObjectsInput) -> S3Result<DeleteObjectsOutput> {
        let DeleteObjectsInput { bucket, delete, .. } = input;
        if delete.objects.len() > 1000 {
            return Err(s3_error!(MalformedXML, "the request has {} keys, more than the limit of 1000", delete.objects.len()));
        }
        self.store.with_bucket(&bucket, |_| Ok(()))?;
        let (mut deleted, mut errors) = (Vec::new(), Vec::new());
        for ObjectIdentifier { key, version_id, e_tag, last_modified_time, size } in delete.objects {
            let outcome = if e_tag.is_some() || last_modified_time.is_some() || size.is_some() {
                Err(s3_error!(NotImplemented, "Conditional deletes are not implemented."))
            } else if let Err(error) = check_null_version(version_id.as_deref()) {
                Err(error)
            } else {
                let (bucket, key) = (bucket.clone(), key.clone());
                self.blocking(move |store| store.remove(&bucket, &key)).await
            };
            let (key, version_id) = (Some(key), version_id);
            match outcome {
                Ok(()) => deleted.push(DeletedObject { key, version_id, ..Default::default() }),
                Err(error) => {
                    let (code, message) = (Some(error.code().as_str().to_owned()), error.message().map(str::to_owned));
                    errors.push(s3s::dto::Error { code, key, message, version_id });
                }
            }
        }
        let quiet = delete.quiet.unwrap_or_default();
        let deleted = (!quiet && !deleted.is_empty()).then_some(deleted);
        Ok(DeleteObjectsOutput { deleted, errors: (!errors.is_empty()).then_some(errors), ..Default::default() })
    }

    fn find_object(&self, bucket: &str, key: &str, version: Option<&str>) -> S3Result<Arc<Object>> {
        check_null_version(version)?;
        let found = self.store.find(bucket, key)?;
        found.ok_or_else(|| s3_error!(NoSuchKey, "The specified key does not exist."))
    }
}

/// An object that was sent in one PUT.
fn single_part_object(key: String, received: ReceivedBody, object_headers: ObjectHeaders) -> Object {
    let ReceivedBody { segment, etag, checksum } = received;
    let modified = OffsetDateTime::now_utc();
    let size_bytes = segment.size_bytes;
    let facts = ObjectFacts {
        key,
        size_bytes,
        etag,
        checksum,
        kind: Kind::FullObject,
        modified,
        headers: object_headers,
        upload_id: None,
    };
    Object { facts, content: vec![segment] }
}

/// The length of the body. S3 requires the header `Content-Length`.
pub(super) fn content_length(content_length: Option<i64>) -> S3Result<u64> {
    let length =
        content_length.ok_or_else(|| s3_error!(MissingContentLength, "You must provide the Content-Length HTTP header."))?;
    match u64::try_from(length) {
        Ok(length) if length <= MAX_PUT_BYTES => Ok(length),
        _ => Err(s3_error!(EntityTooLarge, "the body has {length} bytes, more than the limit of {MAX_PUT_BYTES} bytes")),
    }
}

/// The headers of a write, if the user metadata is within the limit.
pub(super) fn check_metadata_size(object_headers: ObjectHeaders) -> S3Result<ObjectHeaders> {
    let metadata_bytes: usize = object_headers.metadata.iter().map(|(name, value)| name.len() + value.len()).sum();
    if metadata_bytes > MAX_METADATA_BYTES {
        return Err(s3_error!(
            MetadataTooLarge,
            "the metadata has {metadata_bytes} bytes, more than the limit of {MAX_METADATA_BYTES} bytes"
        ));
    }
    Ok(object_headers)
}

pub(super) fn etag(object: &Object) -> ETag {
    ETag::Strong(object.facts.etag.clone())
}

pub(super) fn kind(object: &Object) -> ChecksumType {
    ChecksumType::from_static(object.facts.kind.name())
}

/// A size as the integer type of the protocol layer.
pub(super) fn length(size_bytes: u64) -> i64 {
    i64::try_from(size_bytes).expect("no disk holds 8 EiB")
}

fn wants_checksum(mode: Option<&ChecksumMode>) -> bool {
    mode.is_some_and(|mode| mode.as_str() == ChecksumMode::ENABLED)
}
