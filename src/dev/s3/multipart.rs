//! Multipart uploads: begin, put a part, list, complete.

use std::sync::Arc;

use s3s::dto::*;
use s3s::{S3Request, S3Result, s3_error};
use time::OffsetDateTime;
use uuid::Uuid;

use super::api::{Api, refuse_unknown};
use super::checksum::{self, Algorithm, Checksum, Claim, Kind, declared, show};
use super::conditions;
use super::content;
use super::objects::{announced, checked, etag, kind, length};
use super::record::{Object, ObjectFacts, Part, Upload, UploadFacts, labels};

/// AWS's least size of a part that is not the last.
const LEAST_PART_BYTES: u64 = 5 << 20;

/// AWS's highest part number, which is also the most parts an upload has.
const LAST_PART: i32 = 10_000;

/// The most parts that one answer lists.
const PAGE: i32 = 1000;

impl Api {
    pub(super) async fn begin(&self, request: S3Request<CreateMultipartUploadInput>) -> S3Result<CreateMultipartUploadOutput> {
        let S3Request { input, headers, .. } = request;
        refuse_unknown(&headers)?;
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
            labels: checked(labels!(input))?,
        };
        let upload_id = facts.upload_id.clone();
        self.blocking(move |store| store.begin(facts)).await?;
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
        refuse_unknown(&headers)?;
        let number = input.part_number;
        if !(1..=LAST_PART).contains(&number) {
            return Err(s3_error!(InvalidArgument, "Part number must be an integer between 1 and {LAST_PART}, inclusive"));
        }
        let size_bytes = announced(input.content_length)?;
        let facts = self.store.upload(&input.bucket, &input.key, &input.upload_id, |upload| Arc::clone(&upload.facts))?;
        let claim = Claim::read(declared!(input)?, input.content_md5.as_deref(), &headers, trailing_headers)?;
        agree(facts.declared, claim.algorithm)?;
        let body = input.body.ok_or_else(|| s3_error!(IncompleteBody, "there is no body"))?;
        let (algorithm, _) = facts.checksum();
        let received = content::receive(&self.store.content(), body, size_bytes, &claim, algorithm).await?;
        let (part_etag, checksum) = (received.etag.clone(), received.checksum.clone());
        let modified = OffsetDateTime::now_utc();
        let part = Part { etag: received.etag, checksum: received.checksum, modified, segment: received.segment };
        let shown = facts.declared.is_some();
        self.blocking(move |store| store.put_part(&facts, number, part)).await?;
        let mut output = UploadPartOutput { e_tag: Some(ETag::Strong(part_etag)), ..Default::default() };
        if shown {
            show!(output, &checksum);
        }
        Ok(output)
    }

    pub(super) fn parts(&self, input: ListPartsInput) -> S3Result<ListPartsOutput> {
        let most = input.max_parts.unwrap_or(PAGE).clamp(0, PAGE);
        let marker = input.part_number_marker.unwrap_or(0);
        let (facts, mut page) = self.store.upload(&input.bucket, &input.key, &input.upload_id, |upload| {
            // One more than asked for tells whether there are more.
            let after = upload.parts.range(marker.saturating_add(1)..);
            let page: Vec<_> =
                after.take(most.unsigned_abs() as usize + 1).map(|(number, part)| (*number, part.clone())).collect();
            (Arc::clone(&upload.facts), page)
        })?;
        let truncated = page.len() > most.unsigned_abs() as usize;
        page.truncate(most.unsigned_abs() as usize);
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
                show!(listed, &part.checksum);
            }
            listed
        };
        Ok(ListPartsOutput {
            parts: (!page.is_empty()).then(|| page.into_iter().map(listed).collect()),
            is_truncated: Some(truncated),
            next_part_number_marker: Some(last),
            part_number_marker: Some(marker),
            max_parts: Some(most),
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
            let place = (input.bucket.as_str(), input.key.as_str(), input.upload_id.as_str());
            store.complete(place, &condition, |upload| assemble(upload, &input))
        };
        let object = self.blocking(work).await?;
        let checksum_type = Some(kind(&object));
        let e_tag = Some(etag(&object));
        let mut output = CompleteMultipartUploadOutput { bucket, key, location, e_tag, checksum_type, ..Default::default() };
        show!(output, &object.facts.checksum);
        Ok(output)
    }
}

/// Whether a part brings the checksum that its upload was begun with. Where none was declared it may bring any, for the
/// SDKs add one by themselves.
fn agree(declared: Option<(Algorithm, Kind)>, sent: Option<Algorithm>) -> S3Result<()> {
    let Some((expected, kind)) = declared else { return Ok(()) };
    match sent {
        Some(sent) if sent == expected => Ok(()),
        // A CRC of the whole follows from the bytes; only hashes of hashes need every part's.
        None if kind == Kind::FullObject => Ok(()),
        sent => {
            let (expected, sent) = (expected.name(), sent.map_or("null", Algorithm::name));
            let what = "Checksum Type mismatch occurred";
            Err(s3_error!(InvalidRequest, "{what}, expected checksum Type: {expected}, actual checksum Type: {sent}"))
        }
    }
}

/// The object that an upload becomes, if everything that is said of it is so.
fn assemble(upload: &Upload, input: &CompleteMultipartUploadInput) -> S3Result<Object> {
    let listed = input.multipart_upload.as_ref().and_then(|list| list.parts.as_deref()).unwrap_or_default();
    let parts = select(upload, listed)?;
    let size_bytes = parts.iter().map(|part| part.segment.size_bytes).sum();
    if let Some(promised) = input.mpu_object_size.filter(|promised| *promised != length(size_bytes)) {
        return Err(s3_error!(InvalidRequest, "x-amz-mp-object-size is {promised}, the parts have {size_bytes} bytes"));
    }
    let (algorithm, kind) = upload.facts.checksum();
    if input.checksum_type.as_ref().is_some_and(|wanted| wanted.as_str() != kind.name()) {
        return Err(s3_error!(InvalidRequest, "the upload was begun with checksum type {}", kind.name()));
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
        labels: upload.facts.labels.clone(),
        upload_id: Some(upload.facts.upload_id.clone()),
    };
    Ok(Object { facts, content: parts.iter().map(|part| Arc::clone(&part.segment)).collect() })
}

/// The parts that a list names, in its order.
fn select<'a>(upload: &'a Upload, listed: &[CompletedPart]) -> S3Result<Vec<&'a Part>> {
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
        let part = found.ok_or_else(|| s3_error!(InvalidPart, "Part {number} is not there, or its ETag is another."))?;
        match (declared!(wanted)?, upload.facts.declared) {
            (Some(sent), _) if sent != part.checksum => {
                return Err(s3_error!(InvalidPart, "The checksum of part {number} is another."));
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
    let small = parts.iter().rev().skip(1).find(|part| part.segment.size_bytes < LEAST_PART_BYTES);
    if let Some(part) = small {
        let size = part.segment.size_bytes;
        return Err(s3_error!(EntityTooSmall, "a part of {size} bytes is not the last and has less than {LEAST_PART_BYTES}"));
    }
    Ok(parts)
}

fn whole_checksum(algorithm: Algorithm, kind: Kind, parts: &[&Part]) -> S3Result<Checksum> {
    let combined = || checksum::combined(algorithm, parts.iter().map(|part| (&part.checksum, part.segment.size_bytes)));
    match kind {
        Kind::Composite => Ok(checksum::composite(algorithm, parts.iter().map(|part| &part.checksum))),
        Kind::FullObject => combined().ok_or_else(|| s3_error!(InvalidRequest, "{} has no full-object type", algorithm.name())),
    }
}
