//! Multipart uploads: create, presign parts, complete and abort, as the broker does it.

use aws_sdk_s3::operation::complete_multipart_upload::builders::CompleteMultipartUploadFluentBuilder;
use aws_sdk_s3::operation::create_multipart_upload::builders::CreateMultipartUploadFluentBuilder;
use aws_sdk_s3::types::{ChecksumAlgorithm, ChecksumType, CompletedMultipartUpload, CompletedPart};
use lfs_broker_client::checksum::{Algorithm, Sha256, composite};

use super::{
    Case, OK, PART_BYTES, PresignedCall, S3Response, assert_outcome, base64, bytes, expected, get, head, md5_hex, minutes,
    outcome,
};
use crate::s3_server::{Flavour, TestBucket};

/// An open multipart upload.
struct Upload {
    s3: TestBucket,
    key: &'static str,
    id: String,
}

impl Upload {
    /// Creates a multipart upload of `key`; `configure` may add to the request.
    async fn create(configure: impl FnOnce(CreateMultipartUploadFluentBuilder) -> CreateMultipartUploadFluentBuilder) -> Self {
        let s3 = TestBucket::for_tests().await;
        let key = "acme/key";
        // A test may need no checksum algorithm, but the SDK would declare one by default.
        let request = plain(&s3).create_multipart_upload().bucket(&s3.bucket).key(key);
        let request = request.content_type("text/plain").metadata("lfs-upload-id", "write-token");
        let id = configure(request).send().await.unwrap().upload_id.unwrap();
        Self { s3, key, id }
    }

    async fn sha256() -> Self {
        Self::create(|request| request.checksum_algorithm(ChecksumAlgorithm::Sha256)).await
    }

    /// Puts a part with a presigned URL that has the part's SHA-256 as a signed header.
    async fn put(&self, number: i32, body: &[u8]) -> String {
        let response = self.part(number, body, Some(Sha256::of(body).base64())).await;
        assert_eq!(response.outcome(), (200, String::new()));
        response.header("etag").unwrap().to_owned()
    }

    async fn part(&self, number: i32, body: &[u8], sha256: Option<String>) -> S3Response {
        let client = &self.s3.client;
        let request = client.upload_part().bucket(&self.s3.bucket).key(self.key).upload_id(&self.id).part_number(number);
        let request = request.content_length(body.len() as i64).set_checksum_sha256(sha256);
        PresignedCall::of(&request.presigned(minutes(10)).await.unwrap()).send(body.to_vec()).await
    }

    fn complete(&self, parts: &[CompletedPart]) -> CompleteMultipartUploadFluentBuilder {
        let list = CompletedMultipartUpload::builder().set_parts(Some(parts.to_vec())).build();
        let request = self.s3.client.complete_multipart_upload().bucket(&self.s3.bucket).key(self.key);
        request.upload_id(&self.id).multipart_upload(list)
    }

    async fn numbers(&self) -> Vec<i32> {
        let request = self.s3.client.list_parts().bucket(&self.s3.bucket).key(self.key).upload_id(&self.id);
        request.send().await.unwrap().parts().iter().map(|part| part.part_number().unwrap()).collect()
    }

    async fn abort(&self) -> (u16, String) {
        let client = &self.s3.client;
        let result = client.abort_multipart_upload().bucket(&self.s3.bucket).key(self.key).upload_id(&self.id).send().await;
        match outcome(&result) {
            (200, code) => (204, code),
            refused => refused,
        }
    }

    /// Puts two parts and returns their bodies and their entries for Complete.
    async fn two_parts(&self) -> ([Vec<u8>; 2], [CompletedPart; 2]) {
        let bodies = [bytes(PART_BYTES, 1), bytes(1000, 2)];
        let etags = [self.put(1, &bodies[0]).await, self.put(2, &bodies[1]).await];
        let parts = [listed(1, &etags[0], &bodies[0]), listed(2, &etags[1], &bodies[1])];
        (bodies, parts)
    }
}

/// A client that adds no checksum of its own.
fn plain(s3: &TestBucket) -> aws_sdk_s3::Client {
    let config = s3.client.config().to_builder();
    let only_required = aws_sdk_s3::config::RequestChecksumCalculation::WhenRequired;
    aws_sdk_s3::Client::from_conf(config.request_checksum_calculation(only_required).build())
}

fn listed(number: i32, etag: &str, body: &[u8]) -> CompletedPart {
    CompletedPart::builder().part_number(number).e_tag(etag).checksum_sha256(Sha256::of(body).base64()).build()
}

fn without_checksum(number: i32, etag: &str) -> CompletedPart {
    CompletedPart::builder().part_number(number).e_tag(etag).build()
}

fn etag_of(parts: &[Vec<u8>]) -> String {
    let digests: Vec<u8> = parts.iter().flat_map(|part| hex::decode(md5_hex(part)).unwrap()).collect();
    format!("\"{}-{}\"", md5_hex(&digests), parts.len())
}

#[tokio::test]
async fn an_upload_with_part_hashes_becomes_an_object_with_a_composite_checksum() {
    let upload = Upload::sha256().await;
    let (bodies, parts) = upload.two_parts().await;
    let sum = composite(&[Sha256::of(&bodies[0]), Sha256::of(&bodies[1])]);
    let size = (PART_BYTES + 1000) as i64;
    let request = upload.complete(&parts).checksum_sha256(&sum).mpu_object_size(size).if_none_match("*");
    let done = request.send().await.unwrap();
    assert_eq!(done.e_tag, Some(etag_of(&bodies)));
    let found = head(&upload.s3, upload.key).await.unwrap();
    assert_eq!(found.content_length, Some(size));
    assert_eq!(found.checksum_sha256, Some(sum));
    assert_eq!(found.checksum_type, Some(ChecksumType::Composite));
    assert_eq!(found.e_tag, Some(etag_of(&bodies)));
    assert_eq!(found.content_type.as_deref(), Some("text/plain"));
    assert_eq!(found.metadata.unwrap()["lfs-upload-id"], "write-token");
    assert!(get(&upload.s3, upload.key).await == bodies.concat());
}

#[tokio::test]
async fn a_range_can_span_two_parts() {
    let upload = Upload::sha256().await;
    let (bodies, parts) = upload.two_parts().await;
    upload.complete(&parts).send().await.unwrap();
    let whole = bodies.concat();
    let read = upload.s3.client.get_object().bucket(&upload.s3.bucket).key(upload.key);
    let range = format!("bytes={}-{}", PART_BYTES - 300_000, PART_BYTES + 499);
    let found = read.range(range).send().await.unwrap().body.collect().await.unwrap().to_vec();
    assert!(found == whole[PART_BYTES - 300_000..PART_BYTES + 500]);
}

#[tokio::test]
async fn an_upload_without_an_algorithm_takes_parts_without_checksums() {
    let upload = Upload::create(|request| request).await;
    let bodies = [bytes(PART_BYTES, 3), bytes(10, 4)];
    let mut parts = Vec::new();
    for (number, body) in (1..).zip(&bodies) {
        let response = upload.part(number, body, None).await;
        assert_eq!(response.outcome(), (200, String::new()));
        parts.push(without_checksum(number, response.header("etag").unwrap()));
    }
    upload.complete(&parts).if_none_match("*").send().await.unwrap();
    let found = head(&upload.s3, upload.key).await.unwrap();
    assert_eq!((found.checksum_sha256, found.e_tag), (None, Some(etag_of(&bodies))));
    let computed = match upload.s3.server.flavour {
        Flavour::Embedded | Flavour::Versitygw => Some(base64(Algorithm::Crc64nvme, &bodies.concat())),
        Flavour::Minio => None,
    };
    assert_eq!(found.checksum_crc64_nvme, computed);
    assert!(get(&upload.s3, upload.key).await == bodies.concat());
}

#[tokio::test]
async fn a_full_object_crc_is_computed_and_checked() {
    let configure = |request: CreateMultipartUploadFluentBuilder| {
        request.checksum_algorithm(ChecksumAlgorithm::Crc64Nvme).checksum_type(ChecksumType::FullObject)
    };
    let upload = Upload::create(configure).await;
    let bodies = [bytes(PART_BYTES, 5), bytes(70_000, 6)];
    let mut parts = Vec::new();
    for (number, body) in (1..).zip(&bodies) {
        let sum = base64(Algorithm::Crc64nvme, body);
        let request = upload.s3.client.upload_part().bucket(&upload.s3.bucket).key(upload.key).upload_id(&upload.id);
        let request = request.part_number(number).checksum_crc64_nvme(&sum);
        let response = PresignedCall::of(&request.presigned(minutes(10)).await.unwrap()).send(body.clone()).await;
        let part = CompletedPart::builder().part_number(number).e_tag(response.header("etag").unwrap());
        parts.push(part.checksum_crc64_nvme(sum).build());
    }
    let whole = base64(Algorithm::Crc64nvme, &bodies.concat());
    let complete = |sum: &str| upload.complete(&parts).checksum_crc64_nvme(sum).checksum_type(ChecksumType::FullObject);
    let wrong = complete(&base64(Algorithm::Crc64nvme, b"something else")).send().await;
    assert_outcome(&upload.s3, Case::WrongChecksum, outcome(&wrong));
    complete(&whole).send().await.unwrap();
    let found = head(&upload.s3, upload.key).await.unwrap();
    assert_eq!((found.checksum_crc64_nvme, found.checksum_type), (Some(whole), Some(ChecksumType::FullObject)));
}

#[tokio::test]
async fn a_full_object_crc_is_derived_from_parts_without_checksums() {
    let configure = |request: CreateMultipartUploadFluentBuilder| {
        request.checksum_algorithm(ChecksumAlgorithm::Crc32C).checksum_type(ChecksumType::FullObject)
    };
    let upload = Upload::create(configure).await;
    let response = upload.part(1, b"part", None).await;
    assert_outcome(&upload.s3, Case::CrcPartWithoutChecksum, response.outcome());
    if let Some(etag) = response.header("etag") {
        let done = upload.complete(&[without_checksum(1, etag)]).send().await;
        assert_outcome(&upload.s3, Case::CrcListedWithoutChecksum, outcome(&done));
    }
    if let Some(found) = head(&upload.s3, upload.key).await {
        assert_eq!(found.checksum_crc32_c, Some(base64(Algorithm::Crc32c, b"part")));
        assert_eq!(found.checksum_type, Some(ChecksumType::FullObject));
    }
}

#[tokio::test]
async fn a_full_object_sha256_cannot_be_requested() {
    let s3 = TestBucket::for_tests().await;
    let request = s3.client.create_multipart_upload().bucket(&s3.bucket).key("key");
    let request = request.checksum_algorithm(ChecksumAlgorithm::Sha256).checksum_type(ChecksumType::FullObject);
    assert_outcome(&s3, Case::RefusedChecksumType, outcome(&request.send().await));
}

#[tokio::test]
async fn a_part_must_bring_the_declared_checksum() {
    let upload = Upload::sha256().await;
    let response = upload.part(1, b"part", None).await;
    assert_outcome(&upload.s3, Case::PartWithoutChecksum, response.outcome());
    assert_eq!(upload.numbers().await, [0; 0]);
}

#[tokio::test]
async fn a_part_may_bring_an_undeclared_checksum_and_it_is_checked() {
    let upload = Upload::create(|request| request).await;
    let response = upload.part(1, b"part", Some(Sha256::of(b"trap").base64())).await;
    assert_outcome(&upload.s3, Case::WrongChecksum, response.outcome());
    let response = upload.part(1, b"part", Some(Sha256::of(b"part").base64())).await;
    assert_outcome(&upload.s3, Case::UndeclaredChecksum, response.outcome());
}

#[tokio::test]
async fn a_part_whose_bytes_differ_from_its_hash_is_refused() {
    let upload = Upload::sha256().await;
    let response = upload.part(1, b"part", Some(Sha256::of(b"trap").base64())).await;
    assert_outcome(&upload.s3, Case::WrongChecksum, response.outcome());
    assert_eq!(upload.numbers().await, [0; 0]);
}

#[tokio::test]
async fn a_part_can_be_replaced_until_complete() {
    let upload = Upload::sha256().await;
    let stale = upload.put(1, b"first").await;
    let fresh = upload.put(1, b"second").await;
    let refused = upload.complete(&[listed(1, &stale, b"first")]).send().await;
    assert_eq!(outcome(&refused), (400, "InvalidPart".to_owned()));
    upload.complete(&[listed(1, &fresh, b"second")]).send().await.unwrap();
    assert_eq!(get(&upload.s3, upload.key).await, b"second");
}

#[tokio::test]
async fn parts_are_listed_in_pages_with_size_etag_and_checksum() {
    let upload = Upload::sha256().await;
    for number in [3, 1, 2] {
        upload.put(number, format!("part {number}").as_bytes()).await;
    }
    let mut marker = None;
    for (number, more) in [(1, true), (2, true), (3, false)] {
        let request = upload.s3.client.list_parts().bucket(&upload.s3.bucket).key(upload.key).upload_id(&upload.id);
        let page = request.max_parts(1).set_part_number_marker(marker).send().await.unwrap();
        let body = format!("part {number}");
        let [part] = page.parts() else { panic!("{page:?}") };
        assert_eq!((part.part_number, part.size), (Some(number), Some(6)));
        assert_eq!(part.e_tag, Some(format!("\"{}\"", md5_hex(body.as_bytes()))));
        assert_eq!(part.checksum_sha256, Some(Sha256::of(body.as_bytes()).base64()));
        assert_eq!(page.is_truncated, Some(more));
        marker = page.next_part_number_marker;
    }
}

#[tokio::test]
async fn the_object_size_given_at_complete_is_checked() {
    let upload = Upload::sha256().await;
    let etag = upload.put(1, b"part").await;
    let result = upload.complete(&[listed(1, &etag, b"part")]).mpu_object_size(5).send().await;
    assert_outcome(&upload.s3, Case::WrongObjectSize, outcome(&result));
    assert_eq!(head(&upload.s3, upload.key).await.is_some(), expected(upload.s3.server.flavour, Case::WrongObjectSize) == OK);
}

#[tokio::test]
async fn a_wrong_composite_checksum_is_refused_and_the_upload_stays_open() {
    let upload = Upload::sha256().await;
    let etag = upload.put(1, b"part").await;
    let sum = composite(&[Sha256::of(b"trap")]);
    let result = upload.complete(&[listed(1, &etag, b"part")]).checksum_sha256(sum).send().await;
    assert_outcome(&upload.s3, Case::WrongChecksum, outcome(&result));
    assert!(head(&upload.s3, upload.key).await.is_none());
    assert_eq!(upload.numbers().await, [1]);
}

#[tokio::test]
async fn complete_refuses_a_part_list_with_any_mistake() {
    let upload = Upload::sha256().await;
    let (bodies, [first, second]) = upload.two_parts().await;
    let etag = second.e_tag().unwrap();
    let refused = async |parts: &[CompletedPart]| outcome(&upload.complete(parts).send().await);
    assert_outcome(&upload.s3, Case::WrongOrder, refused(&[second.clone(), first.clone()]).await);
    let third = listed(3, etag, &bodies[1]);
    assert_eq!(refused(&[first.clone(), third]).await, (400, "InvalidPart".to_owned()));
    let other_hash = listed(2, etag, b"other bytes");
    assert_eq!(refused(&[first.clone(), other_hash]).await, (400, "InvalidPart".to_owned()));
    let bare = refused(&[first.clone(), without_checksum(2, etag)]).await;
    assert_outcome(&upload.s3, Case::ListedWithoutChecksum, bare);
    assert!(head(&upload.s3, upload.key).await.is_none());
    assert_eq!(refused(&[first, second]).await, (200, String::new()));
}

#[tokio::test]
async fn only_the_last_part_may_be_small() {
    let upload = Upload::sha256().await;
    let etags = [upload.put(1, b"small").await, upload.put(2, b"last").await];
    let result = upload.complete(&[listed(1, &etags[0], b"small"), listed(2, &etags[1], b"last")]).send().await;
    assert_eq!(outcome(&result), (400, "EntityTooSmall".to_owned()));
    assert_eq!(upload.numbers().await, [1, 2]);
}

#[tokio::test]
async fn complete_leaves_out_parts_that_it_does_not_list() {
    let upload = Upload::sha256().await;
    let (bodies, [first, _]) = upload.two_parts().await;
    upload.complete(&[first]).send().await.unwrap();
    assert!(get(&upload.s3, upload.key).await == bodies[0]);
}

#[tokio::test]
async fn complete_with_if_none_match_does_not_replace_an_object_and_the_upload_stays_open() {
    let upload = Upload::sha256().await;
    let etag = upload.put(1, b"part").await;
    let request = upload.s3.client.put_object().bucket(&upload.s3.bucket).key(upload.key);
    request.body(b"first".to_vec().into()).send().await.unwrap();
    let result = upload.complete(&[listed(1, &etag, b"part")]).if_none_match("*").send().await;
    assert_eq!(outcome(&result), (412, "PreconditionFailed".to_owned()));
    assert_eq!(get(&upload.s3, upload.key).await, b"first");
    assert_eq!(upload.numbers().await, [1]);
    assert_eq!(upload.abort().await, (204, String::new()));
}

#[tokio::test]
async fn a_second_complete_finds_no_upload_or_succeeds_again() {
    let upload = Upload::sha256().await;
    let etag = upload.put(1, b"part").await;
    let parts = [listed(1, &etag, b"part")];
    upload.complete(&parts).send().await.unwrap();
    assert_outcome(&upload.s3, Case::SecondComplete, outcome(&upload.complete(&parts).send().await));
    assert_eq!(get(&upload.s3, upload.key).await, b"part");
}

#[tokio::test]
async fn one_of_several_concurrent_completes_succeeds_and_the_object_is_whole() {
    let upload = Upload::sha256().await;
    let (bodies, parts) = upload.two_parts().await;
    let race = (0..4).map(|_| upload.complete(&parts).if_none_match("*").send());
    let outcomes: Vec<_> = futures_util::future::join_all(race).await.iter().map(outcome).collect();
    let winners = outcomes.iter().filter(|(status, _)| *status == 200).count();
    match upload.s3.server.flavour {
        Flavour::Versitygw => assert!(winners >= 1, "{outcomes:?}"),
        Flavour::Embedded | Flavour::Minio => assert_eq!(winners, 1, "{outcomes:?}"),
    }
    assert!(get(&upload.s3, upload.key).await == bodies.concat());
}

#[tokio::test]
async fn an_aborted_upload_is_gone() {
    let upload = Upload::sha256().await;
    let etag = upload.put(1, b"part").await;
    assert_eq!(upload.abort().await, (204, String::new()));
    assert_outcome(&upload.s3, Case::SecondAbort, upload.abort().await);
    let gone = (404, "NoSuchUpload".to_owned());
    assert_eq!(upload.part(2, b"late", Some(Sha256::of(b"late").base64())).await.outcome(), gone);
    let request = upload.s3.client.list_parts().bucket(&upload.s3.bucket).key(upload.key).upload_id(&upload.id);
    assert_eq!(outcome(&request.send().await), gone);
    assert_eq!(outcome(&upload.complete(&[listed(1, &etag, b"part")]).send().await), gone);
    assert!(head(&upload.s3, upload.key).await.is_none());
}

#[tokio::test]
async fn open_uploads_of_a_key_are_listed_until_they_end() {
    let upload = Upload::sha256().await;
    let list = async || {
        let request = upload.s3.client.list_multipart_uploads().bucket(&upload.s3.bucket).prefix(upload.key);
        let page = request.send().await.unwrap();
        page.uploads().iter().map(|upload| (upload.key().unwrap().to_owned(), upload.upload_id().unwrap().to_owned())).collect()
    };
    let here: Vec<_> = list().await;
    assert_eq!(here, [(upload.key.to_owned(), upload.id.clone())]);
    upload.abort().await;
    let gone: Vec<_> = list().await;
    assert_eq!(gone, []);
}

#[tokio::test]
async fn a_copy_of_a_multipart_object_has_a_full_object_checksum() {
    let upload = Upload::sha256().await;
    let (bodies, parts) = upload.two_parts().await;
    upload.complete(&parts).send().await.unwrap();
    let source = format!("{}/{}", upload.s3.bucket, upload.key);
    let request = upload.s3.client.copy_object().bucket(&upload.s3.bucket).key("copy").copy_source(source);
    request.checksum_algorithm(ChecksumAlgorithm::Sha256).send().await.unwrap();
    let found = head(&upload.s3, "copy").await.unwrap();
    assert_eq!(found.checksum_sha256, Some(Sha256::of(&bodies.concat()).base64()));
    assert_eq!(found.checksum_type, Some(ChecksumType::FullObject));
}
