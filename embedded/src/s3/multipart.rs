//! The operations on multipart uploads: create, upload a part, list parts, complete.

use std::sync::Arc;

use s3s::dto::*;
use s3s::{S3Request, S3Result, s3_error};
use time::OffsetDateTime;
use uuid::Uuid;

use super::api::{Api, reject_unsupported_headers};
use super::checksum::{self, Algorithm, Checksum, ExpectedDigest, Kind, declared, set_checksum};
use super::conditions;
use super::content;
use super::objects::{check_metadata_size, content_length, etag, kind, length};
use super::record::{Object, ObjectFacts, Part, Upload, UploadFacts, object_headers};

/// AWS's minimum size of a part that is not the last.
const MIN_PART_BYTES: u64 = 5 << 20;

/// AWS's highest part number. It is also the limit on the number of parts.
const MAX_PART_NUMBER: i32 = 10_000;

/// The most parts in one page of a listing.
const MAX_PAGE_PARTS: i32 = 1000;

impl Api {
    pub(super) async fn create_upload(
        &self,
        request: S3Request<CreateMultipartUploadInput>,
    ) -> S3Result<CreateMultipartUploadOutput> {
        let S3Request { input, headers, .. } = request;
        reject_unsupported_headers(&headers)?;
        let algorithm = input.checksum_algorithm.as_ref().map(|name| Algorithm::parse(name.as_str())).transpose()?;
        let wanted = input.checksum_type.as_ref().map(|name| Kind::parse(name.as_str())).transpose()?;
        let declared = match (algorithm, wanted) {
            (Some(algorithm), wanted) => Some((algorithm, algorithm.kind(wanted)?)),
            (None, Some(_)) => return Err(s3_error!(InvalidRequest, "a checksum type needs a checksum algorithm")),
            (None, None) => None,
        };
        let facts = UploadFacts {
            upload_id: Uuid::new_v4().simple().to_string(),
            bucket: input.bucket.clone(),
            key: input.key.clone(),
            declared,
            initiated: OffsetDateTime::now_utc(),
            headers: check_metadata_size(object_headers!(input))?,
        };
        let upload_id = facts.upload_id.clone();
        self.blocking(move |store| store.create_upload(facts)).await?;
        Ok(CreateMultipartUploadOutput {
            bucket: Some(input.bucket),
            key: Some(input.key),
            upload_id: Some(upload_id),
            checksum_algorithm: declared.map(|(algorithm, _)| ChecksumAlgorithm::from_static(algorithm.name())),
            checksum_type: declared.map(|(_, kind)| ChecksumType::from_static(kind.name())),
            ..Default::default()
        })
    }

    pub(super) async fn put_part(&self, request: S3Request<UploadPartInput>) -> S3Result<UploadPartOutput> {
        let S3Request { input, headers, trailing_headers, .. } = request;
        reject_unsupported_headers(&headers)?;
        let number = input.part_number;
        if !(1..=MAX_PART_NUMBER).contains(&number) {
            return Err(s3_error!(InvalidArgument, "Part number must be an integer between 1 and {MAX_PART_NUMBER}, inclusive"));
        }
        let size_bytes = content_length(input.content_length)?;
        let facts = self.store.with_upload(&input.bucket, &input.key, &input.upload_id, |upload| Arc::clone(&upload.facts))?;
        let expected_digest = ExpectedDigest::read(declared!(input)?, input.content_md5.as_deref(), &headers, trailing_headers)?;
        check_part_checksum(facts.declared, expected_digest.algorithm)?;
        let body = input.body.ok_or_else(|| s3_error!(IncompleteBody, "the request has no body"))?;
        let (algorithm, _) = facts.checksum();
        let received = content::receive(&self.store.content(), body, size_bytes, &expected_digest, algorithm).await?;
        let (part_etag, checksum) = (received.etag.clone(), received.checksum.clone());
        let modified = OffsetDateTime::now_utc();
        let part = Part { etag: received.etag, checksum: received.checksum, modified, segment: received.segment };
        let is_declared = facts.declared.is_some();
        self.blocking(move |store| store.put_part(&facts, number, part)).await?;
        let mut output = UploadPartOutput { e_tag: Some(ETag::Strong(part_etag)), ..Default::default() };
        if is_declared {
            set_checksum!(output, &checksum);
        }
        Ok(output)
    }

    pub(super) fn parts(&self, input: ListPartsInput) -> S3Result<ListPartsOutput> {
        let max_parts = input.max_parts.unwrap_or(MAX_PAGE_PARTS).clamp(0, MAX_PAGE_PARTS);
        let marker = input.part_number_marker.unwrap_or(0);
        let (facts, mut page) = self.store.with_upload(&input.bucket, &input.key, &input.upload_id, |upload| {
            // One more part than requested shows whether there is a next page.
            let after = upload.parts.range(marker.saturating_add(1)..);
            let page: Vec<_> =
                after.take(max_parts.unsigned_abs() as usize + 1).map(|(number, part)| (*number, part.clone())).collect();
            (Arc::clone(&upload.facts), page)
        })?;
        let truncated = page.len() > max_parts.unsigned_abs() as usize;
        page.truncate(max_parts.unsigned_abs() as usize);
        let last = page.last().map_or(marker, |(number, _)| *number);
        let listed = |(number, part): (i32, Part)| {
            let mut listed = s3s::dto::Part {
                part_number: Some(number),
                size: Some(length(part.segment.size_bytes)),
                e_tag: Some(ETag::Strong(part.etag)),
                last_modified: Some(part.modified.into()),
                ..Default::default()
            };
            if facts.declared.is_some() {
                set_checksum!(listed, &part.checksum);
            }
            listed
        };
        Ok(ListPartsOutput {
            parts: (!page.is_empty()).then(|| page.into_iter().map(listed).collect()),
            is_truncated: Some(truncated),
            next_part_number_marker: Some(last),
            part_number_marker: Some(marker),
            max_parts: Some(max_parts),
            checksum_algorithm: facts.declared.map(|(algorithm, _)| ChecksumAlgorithm::from_static(algorithm.name())),
            checksum_type: facts.declared.map(|(_, kind)| ChecksumType::from_static(kind.name())),
            bucket: Some(input.bucket),
            key: Some(input.key),
            upload_id: Some(input.upload_id),
            ..Default::default()
        })
    }

    pub(super) async fn complete(&self, input: CompleteMultipartUploadInput) -> S3Result<CompleteMultipartUploadOutput> {
        let condition = conditions::Write::read(input.if_match.clone(), input.if_none_match.as_ref())?;
        let (bucket, key) = (Some(input.bucket.clone()), Some(input.key.clone()));
        let location = Some(format!("/{}/{}", input.bucket, input.key));
        let work = move |store: &super::store::Store| {
            let upload_key = (input.bucket.as_str(), input.key.as_str(), input.upload_id.as_str());
            store.complete(upload_key, &condition, |upload| assemble(upload, &input))
        };
        let object = self.blocking(work).await?;
        let checksum_type = Some(kind(&object));
        let e_tag = Some(etag(&object));
        let mut output = CompleteMultipartUploadOutput { bucket, key, location, e_tag, checksum_type, ..Default::default() };
        set_checksum!(output, &object.facts.checksum);
        Ok(output)
    }
}

/// Whether a part has the checksum algorithm of its upload. An upload without a declared algorithm accepts any, because
/// SDKs add one by themselves.
fn check_part_checksum(declared: Option<(Algorithm, Kind)>, sent: Option<Algorithm>) -> S3Result<()> {
    let Some((expected, kind)) = declared else { return Ok(()) };
    match sent {
        Some(sent) if sent == expected => Ok(()),
        // A CRC of the whole can be computed from the bytes. Only composite checksums need the checksum of every part.
        None if kind == Kind::FullObject => Ok(()),
        sent => {
            let (expected, sent) = (expected.name(), sent.map_or("null", Algorithm::name));
            let what = "Checksum Type mismatch occurred";
            Err(s3_error!(InvalidRequest, "{what}, expected checksum Type: {expected}, actual checksum Type: {sent}"))
        }
    }
}

/// The object of a completed upload, if the request matches its parts.
fn assemble(upload: &Upload, input: &CompleteMultipartUploadInput) -> S3Result<Object> {
    let listed = input.multipart_upload.as_ref().and_then(|list| list.parts.as_deref()).unwrap_or_default();
    let parts = select_parts(upload, listed)?;
    let size_bytes = parts.iter().map(|part| part.segment.size_bytes).sum();
    if let Some(declared_size) = input.mpu_object_size.filter(|declared_size| *declared_size != length(size_bytes)) {
        return Err(s3_error!(
            InvalidRequest,
            "x-amz-mp-object-size is {declared_size} bytes, but the parts have {size_bytes} bytes"
        ));
    }
    let (algorithm, kind) = upload.facts.checksum();
    if input.checksum_type.as_ref().is_some_and(|wanted| wanted.as_str() != kind.name()) {
        return Err(s3_error!(InvalidRequest, "the upload was created with checksum type {}", kind.name()));
    }
    let checksum = whole_checksum(algorithm, kind, &parts)?;
    if let Some(sent) = declared!(input)? {
        if sent.algorithm != algorithm {
            return Err(s3_error!(InvalidRequest, "the upload has a checksum of type {}", algorithm.name()));
        }
        if sent != checksum {
            return Err(checksum::mismatch(algorithm));
        }
    }
    let facts = ObjectFacts {
        key: upload.facts.key.clone(),
        size_bytes,
        etag: checksum::multipart_etag(parts.iter().map(|part| part.etag.as_str())),
        checksum,
        kind,
        modified: OffsetDateTime::now_utc(),
        headers: upload.facts.headers.clone(),
        upload_id: Some(upload.facts.upload_id.clone()),
    };
    Ok(Object { facts, content: parts.iter().map(|part| Arc::clone(&part.segment)).collect() })
}

/// The listed parts, in the order of the list.
fn select_parts<'a>(upload: &'a Upload, listed: &[CompletedPart]) -> S3Result<Vec<&'a Part>> {
    if listed.is_empty() {
        return Err(s3_error!(MalformedXML, "You must specify at least one part"));
    }
    if !listed.is_sorted_by(|left, right| left.part_number < right.part_number) {
        return Err(s3_error!(InvalidPartOrder, "The list of parts was not in ascending order."));
    }
    let mut parts = Vec::with_capacity(listed.len());
    for wanted in listed {
        let number = wanted.part_number.unwrap_or_default();
        let found = upload.parts.get(&number).filter(|part| wanted.e_tag.as_ref().is_some_and(|etag| etag.value() == part.etag));
        let part = found.ok_or_else(|| s3_error!(InvalidPart, "Part {number} does not exist, or its ETag differs."))?;
        match (declared!(wanted)?, upload.facts.declared) {
            (Some(sent), _) if sent != part.checksum => {
                return Err(s3_error!(InvalidPart, "The checksum of part {number} differs."));
            }
            (None, Some((algorithm, Kind::Composite))) => {
                let name = algorithm.name().to_ascii_lowercase();
                let why = "The complete request must include the checksum for each part.";
                return Err(s3_error!(
                    InvalidRequest,
                    "The upload was created using a {name} checksum. {why} It was missing for part {number} in the request."
                ));
            }
            _ => parts.push(part),
        }
    }
    let small = parts.iter().rev().skip(1).find(|part| part.segment.size_bytes < MIN_PART_BYTES);
    if let Some(part) = small {
        let size = part.segment.size_bytes;
        return Err(s3_error!(
            EntityTooSmall,
            "a part that is not the last has {size} bytes, less than the minimum of {MIN_PART_BYTES} bytes"
        ));
    }
    Ok(parts)
}

fn whole_checksum(algorithm: Algorithm, kind: Kind, parts: &[&Part]) -> S3Result<Checksum> {
    let combine_crcs = || checksum::combine_crcs(algorithm, parts.iter().map(|part| (&part.checksum, part.segment.size_bytes)));
    match kind {
        Kind::Composite => Ok(checksum::composite(algorithm, parts.iter().map(|part| &part.checksum))),
        Kind::FullObject => {
            combine_crcs().ok_or_else(|| s3_error!(InvalidRequest, "{} has no full-object type", algorithm.name()))
        }
    }
}
