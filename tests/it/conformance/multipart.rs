//! Multipart uploads, as the broker opens, signs, completes and gives them up.

use aws_sdk_s3::operation::complete_multipart_upload::builders::CompleteMultipartUploadFluentBuilder;
use aws_sdk_s3::operation::create_multipart_upload::builders::CreateMultipartUploadFluentBuilder;
use aws_sdk_s3::types::{ChecksumAlgorithm, ChecksumType, CompletedMultipartUpload, CompletedPart};
use lfs_broker_client::checksum::{Algorithm, Sha256, composite};

use super::{
    Answer, Case, Holder, OK, PART_BYTES, assert_outcome, base64, bytes, expected, get, head, md5_hex, minutes, outcome,
};
use crate::stores::{Flavour, Store};

/// An upload that is under way.
struct Upload {
    store: Store,
    key: &'static str,
    id: String,
}

impl Upload {
    /// Begins an upload of `key`, as `wish` has it.
    async fn begin(wish: impl FnOnce(CreateMultipartUploadFluentBuilder) -> CreateMultipartUploadFluentBuilder) -> Self {
        let store = Store::for_tests().await;
        let key = "acme/key";
        // Without a wish no algorithm may be declared, and the SDK would add its own.
        let request = plain(&store).create_multipart_upload().bucket(&store.bucket).key(key);
        let request = request.content_type("text/plain").metadata("lfs-upload-id", "write-token");
        let id = wish(request).send().await.unwrap().upload_id.unwrap();
        Self { store, key, id }
    }

    async fn sha256() -> Self {
        Self::begin(|request| request.checksum_algorithm(ChecksumAlgorithm::Sha256)).await
    }

    /// Puts a part through a presigned URL that has its SHA-256 signed in.
    async fn put(&self, number: i32, body: &[u8]) -> String {
        let answer = self.part(number, body, Some(Sha256::of(body).base64())).await;
        assert_eq!(answer.outcome(), (200, String::new()));
        answer.header("etag").unwrap().to_owned()
    }

    async fn part(&self, number: i32, body: &[u8], sha256: Option<String>) -> Answer {
        let client = &self.store.client;
        let request = client.upload_part().bucket(&self.store.bucket).key(self.key).upload_id(&self.id).part_number(number);
        let request = request.content_length(body.len() as i64).set_checksum_sha256(sha256);
        Holder::of(&request.presigned(minutes(10)).await.unwrap()).send(body.to_vec()).await
    }

    fn complete(&self, parts: &[CompletedPart]) -> CompleteMultipartUploadFluentBuilder {
        let list = CompletedMultipartUpload::builder().set_parts(Some(parts.to_vec())).build();
        let request = self.store.client.complete_multipart_upload().bucket(&self.store.bucket).key(self.key);
        request.upload_id(&self.id).multipart_upload(list)
    }

    async fn numbers(&self) -> Vec<i32> {
        let request = self.store.client.list_parts().bucket(&self.store.bucket).key(self.key).upload_id(&self.id);
        request.send().await.unwrap().parts().iter().map(|part| part.part_number().unwrap()).collect()
    }

    async fn abort(&self) -> (u16, String) {
        let client = &self.store.client;
        let result = client.abort_multipart_upload().bucket(&self.store.bucket).key(self.key).upload_id(&self.id).send().await;
        match outcome(&result) {
            (200, code) => (204, code),
            refused => refused,
        }
    }

    /// Two parts, in place, as a list for Complete has them.
    async fn two_parts(&self) -> ([Vec<u8>; 2], [CompletedPart; 2]) {
        let bodies = [bytes(PART_BYTES, 1), bytes(1000, 2)];
        let etags = [self.put(1, &bodies[0]).await, self.put(2, &bodies[1]).await];
        let parts = [listed(1, &etags[0], &bodies[0]), listed(2, &etags[1], &bodies[1])];
        (bodies, parts)
    }
}

/// A client that adds no checksum of its own.
fn plain(store: &Store) -> aws_sdk_s3::Client {
    let config = store.client.config().to_builder();
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
async fn an_upload_with_part_hashes_becomes_an_object_with_their_composite() {
    let upload = Upload::sha256().await;
    let (bodies, parts) = upload.two_parts().await;
    let sum = composite(&[Sha256::of(&bodies[0]), Sha256::of(&bodies[1])]);
    let size = (PART_BYTES + 1000) as i64;
    let request = upload.complete(&parts).checksum_sha256(&sum).mpu_object_size(size).if_none_match("*");
    let done = request.send().await.unwrap();
    assert_eq!(done.e_tag, Some(etag_of(&bodies)));
    let found = head(&upload.store, upload.key).await.unwrap();
    assert_eq!(found.content_length, Some(size));
    assert_eq!(found.checksum_sha256, Some(sum));
    assert_eq!(found.checksum_type, Some(ChecksumType::Composite));
    assert_eq!(found.e_tag, Some(etag_of(&bodies)));
    assert_eq!(found.content_type.as_deref(), Some("text/plain"));
    assert_eq!(found.metadata.unwrap()["lfs-upload-id"], "write-token");
    assert!(get(&upload.store, upload.key).await == bodies.concat());
}

#[tokio::test]
async fn a_range_may_cross_from_part_to_part() {
    let upload = Upload::sha256().await;
    let (bodies, parts) = upload.two_parts().await;
    upload.complete(&parts).send().await.unwrap();
    let whole = bodies.concat();
    let read = upload.store.client.get_object().bucket(&upload.store.bucket).key(upload.key);
    let range = format!("bytes={}-{}", PART_BYTES - 300_000, PART_BYTES + 499);
    let found = read.range(range).send().await.unwrap().body.collect().await.unwrap().to_vec();
    assert!(found == whole[PART_BYTES - 300_000..PART_BYTES + 500]);
}

#[tokio::test]
async fn an_upload_without_an_algorithm_takes_parts_without_checksums() {
    let upload = Upload::begin(|request| request).await;
    let bodies = [bytes(PART_BYTES, 3), bytes(10, 4)];
    let mut parts = Vec::new();
    for (number, body) in (1..).zip(&bodies) {
        let answer = upload.part(number, body, None).await;
        assert_eq!(answer.outcome(), (200, String::new()));
        parts.push(without_checksum(number, answer.header("etag").unwrap()));
    }
    upload.complete(&parts).if_none_match("*").send().await.unwrap();
    let found = head(&upload.store, upload.key).await.unwrap();
    assert_eq!((found.checksum_sha256, found.e_tag), (None, Some(etag_of(&bodies))));
    let computed = match upload.store.place.flavour {
        Flavour::Embedded | Flavour::Versitygw => Some(base64(Algorithm::Crc64nvme, &bodies.concat())),
        Flavour::Minio => None,
    };
    assert_eq!(found.checksum_crc64_nvme, computed);
    assert!(get(&upload.store, upload.key).await == bodies.concat());
}

#[tokio::test]
async fn a_crc_of_the_whole_object_is_computed_and_checked() {
    let wish = |request: CreateMultipartUploadFluentBuilder| {
        request.checksum_algorithm(ChecksumAlgorithm::Crc64Nvme).checksum_type(ChecksumType::FullObject)
    };
    let upload = Upload::begin(wish).await;
    let bodies = [bytes(PART_BYTES, 5), bytes(70_000, 6)];
    let mut parts = Vec::new();
    for (number, body) in (1..).zip(&bodies) {
        let sum = base64(Algorithm::Crc64nvme, body);
        let request = upload.store.client.upload_part().bucket(&upload.store.bucket).key(upload.key).upload_id(&upload.id);
        let request = request.part_number(number).checksum_crc64_nvme(&sum);
        let answer = Holder::of(&request.presigned(minutes(10)).await.unwrap()).send(body.clone()).await;
        let part = CompletedPart::builder().part_number(number).e_tag(answer.header("etag").unwrap());
        parts.push(part.checksum_crc64_nvme(sum).build());
    }
    let whole = base64(Algorithm::Crc64nvme, &bodies.concat());
    let complete = |sum: &str| upload.complete(&parts).checksum_crc64_nvme(sum).checksum_type(ChecksumType::FullObject);
    let wrong = complete(&base64(Algorithm::Crc64nvme, b"something else")).send().await;
    assert_outcome(&upload.store, Case::WrongChecksum, outcome(&wrong));
    complete(&whole).send().await.unwrap();
    let found = head(&upload.store, upload.key).await.unwrap();
    assert_eq!((found.checksum_crc64_nvme, found.checksum_type), (Some(whole), Some(ChecksumType::FullObject)));
}

#[tokio::test]
async fn a_crc_of_the_whole_object_follows_from_its_bytes() {
    let wish = |request: CreateMultipartUploadFluentBuilder| {
        request.checksum_algorithm(ChecksumAlgorithm::Crc32C).checksum_type(ChecksumType::FullObject)
    };
    let upload = Upload::begin(wish).await;
    let answer = upload.part(1, b"part", None).await;
    assert_outcome(&upload.store, Case::CrcPartWithoutChecksum, answer.outcome());
    if let Some(etag) = answer.header("etag") {
        let done = upload.complete(&[without_checksum(1, etag)]).send().await;
        assert_outcome(&upload.store, Case::CrcListedWithoutChecksum, outcome(&done));
    }
    if let Some(found) = head(&upload.store, upload.key).await {
        assert_eq!(found.checksum_crc32_c, Some(base64(Algorithm::Crc32c, b"part")));
        assert_eq!(found.checksum_type, Some(ChecksumType::FullObject));
    }
}

#[tokio::test]
async fn sha256_of_the_whole_object_cannot_be_asked_for() {
    let store = Store::for_tests().await;
    let request = store.client.create_multipart_upload().bucket(&store.bucket).key("key");
    let request = request.checksum_algorithm(ChecksumAlgorithm::Sha256).checksum_type(ChecksumType::FullObject);
    assert_outcome(&store, Case::RefusedChecksumType, outcome(&request.send().await));
}

#[tokio::test]
async fn a_part_must_bring_the_checksum_that_was_declared() {
    let upload = Upload::sha256().await;
    let answer = upload.part(1, b"part", None).await;
    assert_outcome(&upload.store, Case::PartWithoutChecksum, answer.outcome());
    assert_eq!(upload.numbers().await, [0; 0]);
}

#[tokio::test]
async fn a_part_may_bring_a_checksum_that_was_not_declared_and_it_is_checked() {
    let upload = Upload::begin(|request| request).await;
    let answer = upload.part(1, b"part", Some(Sha256::of(b"trap").base64())).await;
    assert_outcome(&upload.store, Case::WrongChecksum, answer.outcome());
    let answer = upload.part(1, b"part", Some(Sha256::of(b"part").base64())).await;
    assert_outcome(&upload.store, Case::UndeclaredChecksum, answer.outcome());
}

#[tokio::test]
async fn a_part_with_other_bytes_than_hashed_is_refused() {
    let upload = Upload::sha256().await;
    let answer = upload.part(1, b"part", Some(Sha256::of(b"trap").base64())).await;
    assert_outcome(&upload.store, Case::WrongChecksum, answer.outcome());
    assert_eq!(upload.numbers().await, [0; 0]);
}

#[tokio::test]
async fn a_part_can_be_sent_again_until_complete() {
    let upload = Upload::sha256().await;
    let stale = upload.put(1, b"first").await;
    let fresh = upload.put(1, b"second").await;
    let refused = upload.complete(&[listed(1, &stale, b"first")]).send().await;
    assert_eq!(outcome(&refused), (400, "InvalidPart".to_owned()));
    upload.complete(&[listed(1, &fresh, b"second")]).send().await.unwrap();
    assert_eq!(get(&upload.store, upload.key).await, b"second");
}

#[tokio::test]
async fn parts_are_listed_in_pages_with_what_is_known_of_them() {
    let upload = Upload::sha256().await;
    for number in [3, 1, 2] {
        upload.put(number, format!("part {number}").as_bytes()).await;
    }
    let mut marker = None;
    for (number, more) in [(1, true), (2, true), (3, false)] {
        let request = upload.store.client.list_parts().bucket(&upload.store.bucket).key(upload.key).upload_id(&upload.id);
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
async fn the_size_that_is_given_at_complete_is_checked() {
    let upload = Upload::sha256().await;
    let etag = upload.put(1, b"part").await;
    let result = upload.complete(&[listed(1, &etag, b"part")]).mpu_object_size(5).send().await;
    assert_outcome(&upload.store, Case::WrongObjectSize, outcome(&result));
    assert_eq!(
        head(&upload.store, upload.key).await.is_some(),
        expected(upload.store.place.flavour, Case::WrongObjectSize) == OK
    );
}

#[tokio::test]
async fn a_wrong_composite_is_refused_and_the_upload_stays() {
    let upload = Upload::sha256().await;
    let etag = upload.put(1, b"part").await;
    let sum = composite(&[Sha256::of(b"trap")]);
    let result = upload.complete(&[listed(1, &etag, b"part")]).checksum_sha256(sum).send().await;
    assert_outcome(&upload.store, Case::WrongChecksum, outcome(&result));
    assert!(head(&upload.store, upload.key).await.is_none());
    assert_eq!(upload.numbers().await, [1]);
}

#[tokio::test]
async fn a_list_of_parts_must_be_right_in_every_point() {
    let upload = Upload::sha256().await;
    let (bodies, [first, second]) = upload.two_parts().await;
    let etag = second.e_tag().unwrap();
    let refused = async |parts: &[CompletedPart]| outcome(&upload.complete(parts).send().await);
    assert_outcome(&upload.store, Case::WrongOrder, refused(&[second.clone(), first.clone()]).await);
    let third = listed(3, etag, &bodies[1]);
    assert_eq!(refused(&[first.clone(), third]).await, (400, "InvalidPart".to_owned()));
    let other_hash = listed(2, etag, b"other bytes");
    assert_eq!(refused(&[first.clone(), other_hash]).await, (400, "InvalidPart".to_owned()));
    let bare = refused(&[first.clone(), without_checksum(2, etag)]).await;
    assert_outcome(&upload.store, Case::ListedWithoutChecksum, bare);
    assert!(head(&upload.store, upload.key).await.is_none());
    assert_eq!(refused(&[first, second]).await, (200, String::new()));
}

#[tokio::test]
async fn a_small_part_can_only_be_the_last() {
    let upload = Upload::sha256().await;
    let etags = [upload.put(1, b"small").await, upload.put(2, b"last").await];
    let result = upload.complete(&[listed(1, &etags[0], b"small"), listed(2, &etags[1], b"last")]).send().await;
    assert_eq!(outcome(&result), (400, "EntityTooSmall".to_owned()));
    assert_eq!(upload.numbers().await, [1, 2]);
}

#[tokio::test]
async fn parts_that_complete_does_not_list_are_left_out() {
    let upload = Upload::sha256().await;
    let (bodies, [first, _]) = upload.two_parts().await;
    upload.complete(&[first]).send().await.unwrap();
    assert!(get(&upload.store, upload.key).await == bodies[0]);
}

#[tokio::test]
async fn complete_does_not_replace_an_object_under_if_none_match_and_the_upload_stays() {
    let upload = Upload::sha256().await;
    let etag = upload.put(1, b"part").await;
    let request = upload.store.client.put_object().bucket(&upload.store.bucket).key(upload.key);
    request.body(b"first".to_vec().into()).send().await.unwrap();
    let result = upload.complete(&[listed(1, &etag, b"part")]).if_none_match("*").send().await;
    assert_eq!(outcome(&result), (412, "PreconditionFailed".to_owned()));
    assert_eq!(get(&upload.store, upload.key).await, b"first");
    assert_eq!(upload.numbers().await, [1]);
    assert_eq!(upload.abort().await, (204, String::new()));
}

#[tokio::test]
async fn a_second_complete_finds_the_upload_gone_or_answers_alike() {
    let upload = Upload::sha256().await;
    let etag = upload.put(1, b"part").await;
    let parts = [listed(1, &etag, b"part")];
    upload.complete(&parts).send().await.unwrap();
    assert_outcome(&upload.store, Case::SecondComplete, outcome(&upload.complete(&parts).send().await));
    assert_eq!(get(&upload.store, upload.key).await, b"part");
}

#[tokio::test]
async fn of_racing_completes_one_wins_and_none_does_harm() {
    let upload = Upload::sha256().await;
    let (bodies, parts) = upload.two_parts().await;
    let race = (0..4).map(|_| upload.complete(&parts).if_none_match("*").send());
    let outcomes: Vec<_> = futures_util::future::join_all(race).await.iter().map(outcome).collect();
    let winners = outcomes.iter().filter(|(status, _)| *status == 200).count();
    match upload.store.place.flavour {
        Flavour::Versitygw => assert!(winners >= 1, "{outcomes:?}"),
        Flavour::Embedded | Flavour::Minio => assert_eq!(winners, 1, "{outcomes:?}"),
    }
    assert!(get(&upload.store, upload.key).await == bodies.concat());
}

#[tokio::test]
async fn an_aborted_upload_is_gone() {
    let upload = Upload::sha256().await;
    let etag = upload.put(1, b"part").await;
    assert_eq!(upload.abort().await, (204, String::new()));
    assert_outcome(&upload.store, Case::AbortAgain, upload.abort().await);
    let gone = (404, "NoSuchUpload".to_owned());
    assert_eq!(upload.part(2, b"late", Some(Sha256::of(b"late").base64())).await.outcome(), gone);
    let request = upload.store.client.list_parts().bucket(&upload.store.bucket).key(upload.key).upload_id(&upload.id);
    assert_eq!(outcome(&request.send().await), gone);
    assert_eq!(outcome(&upload.complete(&[listed(1, &etag, b"part")]).send().await), gone);
    assert!(head(&upload.store, upload.key).await.is_none());
}

#[tokio::test]
async fn uploads_of_an_exact_key_are_listed_until_they_end() {
    let upload = Upload::sha256().await;
    let list = async || {
        let request = upload.store.client.list_multipart_uploads().bucket(&upload.store.bucket).prefix(upload.key);
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
async fn a_copy_of_a_multipart_object_has_the_checksum_of_the_whole() {
    let upload = Upload::sha256().await;
    let (bodies, parts) = upload.two_parts().await;
    upload.complete(&parts).send().await.unwrap();
    let source = format!("{}/{}", upload.store.bucket, upload.key);
    let request = upload.store.client.copy_object().bucket(&upload.store.bucket).key("copy").copy_source(source);
    request.checksum_algorithm(ChecksumAlgorithm::Sha256).send().await.unwrap();
    let found = head(&upload.store, "copy").await.unwrap();
    assert_eq!(found.checksum_sha256, Some(Sha256::of(&bodies.concat()).base64()));
    assert_eq!(found.checksum_type, Some(ChecksumType::FullObject));
}
