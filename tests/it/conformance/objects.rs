//! What the broker itself does with objects.

use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::{ChecksumAlgorithm, ChecksumType, Delete, MetadataDirective, ObjectIdentifier};
use lfs_broker_client::checksum::{Algorithm, Sha256};

use super::{base64, bytes, get, head, outcome, presign, put};
use crate::s3_server::{Flavour, TestBucket};

const BODY: &[u8] = b"0123456789";

async fn put_body(s3: &TestBucket, key: &str) {
    assert_eq!(presign(put(s3, key, BODY)).await.send(BODY).await.status, 200, "{key}");
}

#[tokio::test]
async fn a_missing_object_or_bucket_is_not_found() {
    let s3 = TestBucket::for_tests().await;
    assert!(head(&s3, "nothing").await.is_none());
    let missing = s3.client.get_object().bucket(&s3.bucket).key("nothing").send().await;
    assert_eq!(outcome(&missing), (404, "NoSuchKey".to_owned()));
    let missing = s3.client.get_object().bucket("there-is-no-such-bucket").key("nothing").send().await;
    assert_eq!(outcome(&missing), (404, "NoSuchBucket".to_owned()));
    let missing = s3.client.head_bucket().bucket("there-is-no-such-bucket").send().await;
    assert!(missing.unwrap_err().as_service_error().unwrap().is_not_found());
    let lost = s3.client.put_object().bucket("there-is-no-such-bucket").key("key").body(BODY.to_vec().into()).send().await;
    assert_eq!(outcome(&lost), (404, "NoSuchBucket".to_owned()));
}

#[tokio::test]
async fn a_bucket_can_be_created_once_and_is_not_versioned() {
    let s3 = TestBucket::for_tests().await;
    s3.client.head_bucket().bucket(&s3.bucket).send().await.unwrap();
    let again = s3.client.create_bucket().bucket(&s3.bucket).send().await;
    assert_eq!(outcome(&again), (409, "BucketAlreadyOwnedByYou".to_owned()));
    let listed = s3.client.list_buckets().send().await.unwrap();
    assert_eq!(listed.buckets().iter().filter(|bucket| bucket.name() == Some(&s3.bucket)).count(), 1);
    let versioning = s3.client.get_bucket_versioning().bucket(&s3.bucket).send().await.unwrap();
    assert_eq!(versioning.status, None);
}

#[tokio::test]
async fn head_shows_the_checksum_only_on_request() {
    let s3 = TestBucket::for_tests().await;
    put_body(&s3, "key").await;
    let plain = s3.client.head_object().bucket(&s3.bucket).key("key").send().await.unwrap();
    assert_eq!((plain.checksum_sha256, plain.checksum_type), (None, None));
    assert_eq!(head(&s3, "key").await.unwrap().checksum_sha256, Some(Sha256::of(BODY).base64()));
}

#[tokio::test]
async fn an_object_without_a_declared_checksum_has_crc64nvme_if_the_store_computes_one() {
    let s3 = TestBucket::for_tests().await;
    let request = s3.client.put_object().bucket(&s3.bucket).key("key");
    assert_eq!(presign(request).await.send(BODY).await.status, 200);
    let found = head(&s3, "key").await.unwrap();
    let computed = match s3.server.flavour {
        Flavour::Embedded | Flavour::Versitygw => Some(base64(Algorithm::Crc64nvme, BODY)),
        Flavour::Minio => None,
    };
    assert_eq!(found.checksum_crc64_nvme, computed);
    assert_eq!((found.checksum_sha256, found.checksum_crc32), (None, None));
}

#[tokio::test]
async fn an_empty_object_can_be_stored_and_read() {
    let s3 = TestBucket::for_tests().await;
    assert_eq!(presign(put(&s3, "empty", b"")).await.send("").await.status, 200);
    let found = head(&s3, "empty").await.unwrap();
    assert_eq!(found.content_length, Some(0));
    assert_eq!(found.checksum_sha256, Some(Sha256::of(b"").base64()));
    assert_eq!(get(&s3, "empty").await, b"");
}

#[tokio::test]
async fn a_range_of_an_object_can_be_read() {
    let s3 = TestBucket::for_tests().await;
    put_body(&s3, "key").await;
    for (range, expected) in
        [("bytes=0-0", "0"), ("bytes=3-5", "345"), ("bytes=7-", "789"), ("bytes=-2", "89"), ("bytes=8-99", "89")]
    {
        let found = s3.client.get_object().bucket(&s3.bucket).key("key").range(range).send().await.unwrap();
        assert_eq!(found.content_length, Some(expected.len() as i64), "{range}");
        assert!(found.content_range.as_ref().unwrap().ends_with("/10"), "{range}");
        assert_eq!(found.body.collect().await.unwrap().to_vec(), expected.as_bytes(), "{range}");
    }
    let beyond = s3.client.get_object().bucket(&s3.bucket).key("key").range("bytes=10-").send().await;
    assert_eq!(outcome(&beyond), (416, "InvalidRange".to_owned()));
}

#[tokio::test]
async fn a_read_can_be_conditional_on_the_etag() {
    let s3 = TestBucket::for_tests().await;
    put_body(&s3, "key").await;
    let etag = head(&s3, "key").await.unwrap().e_tag.unwrap();
    let read = || s3.client.get_object().bucket(&s3.bucket).key("key");
    assert_eq!(outcome(&read().if_match(&etag).send().await), (200, String::new()));
    let other = read().if_match("\"00000000000000000000000000000000\"").send().await;
    assert_eq!(outcome(&other), (412, "PreconditionFailed".to_owned()));
    assert_eq!(outcome(&read().if_none_match(&etag).send().await).0, 304);
}

#[tokio::test]
async fn an_sdk_put_is_stored_with_the_checksum_that_the_sdk_adds() {
    let s3 = TestBucket::for_tests().await;
    let body = bytes(300_000, 1);
    let request = s3.client.put_object().bucket(&s3.bucket).key("memory").body(ByteStream::from(body.clone()));
    request.send().await.unwrap();
    assert_eq!(head(&s3, "memory").await.unwrap().checksum_crc32, Some(base64(Algorithm::Crc32, &body)));
    assert_eq!(get(&s3, "memory").await, body);
}

#[tokio::test]
async fn a_streamed_sdk_put_sends_its_checksum_as_a_trailer() {
    let s3 = TestBucket::for_tests().await;
    let body = bytes(1_500_000, 2);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("body");
    std::fs::write(&path, &body).unwrap();
    for (key, algorithm) in [("crc32", ChecksumAlgorithm::Crc32), ("sha256", ChecksumAlgorithm::Sha256)] {
        let stream = ByteStream::from_path(&path).await.unwrap();
        let request = s3.client.put_object().bucket(&s3.bucket).key(key).checksum_algorithm(algorithm);
        request.content_encoding("identity").body(stream).send().await.unwrap();
        assert_eq!(get(&s3, key).await, body);
    }
    let found = head(&s3, "crc32").await.unwrap();
    assert_eq!(found.checksum_crc32, Some(base64(Algorithm::Crc32, &body)));
    // The encoding of the transfer is no property of the object.
    assert_eq!(found.content_encoding.as_deref(), Some("identity"));
    assert_eq!(head(&s3, "sha256").await.unwrap().checksum_sha256, Some(Sha256::of(&body).base64()));
}

#[tokio::test]
async fn a_put_replaces_the_object_under_its_key() {
    let s3 = TestBucket::for_tests().await;
    put_body(&s3, "key").await;
    let later = s3.client.put_object().bucket(&s3.bucket).key("key").body(ByteStream::from_static(b"later"));
    later.send().await.unwrap();
    assert_eq!(get(&s3, "key").await, b"later");
    let found = head(&s3, "key").await.unwrap();
    assert_eq!((found.content_length, found.checksum_sha256), (Some(5), None));
}

#[tokio::test]
async fn deleting_an_object_twice_succeeds() {
    let s3 = TestBucket::for_tests().await;
    for key in ["one", "two", "three"] {
        put_body(&s3, key).await;
    }
    for _ in 0..2 {
        s3.client.delete_object().bucket(&s3.bucket).key("one").send().await.unwrap();
        assert!(head(&s3, "one").await.is_none());
    }
    let keys = ["one", "two", "three"].map(|key| ObjectIdentifier::builder().key(key).build().unwrap());
    let delete = Delete::builder().set_objects(Some(keys.to_vec())).build().unwrap();
    let done = s3.client.delete_objects().bucket(&s3.bucket).delete(delete).send().await.unwrap();
    assert_eq!((done.deleted().len(), done.errors().len()), (3, 0));
    assert!(head(&s3, "two").await.is_none());
    assert!(head(&s3, "three").await.is_none());
}

#[tokio::test]
async fn objects_are_listed_in_key_order_and_in_pages() {
    let s3 = TestBucket::for_tests().await;
    let keys = ["acme/1", "acme/2", "acme/3", "acme/4", "acme/5"];
    for key in ["abc", "acme/1", "acme/2", "acme/3", "acme/4", "acme/5", "b"] {
        put_body(&s3, key).await;
    }
    let (mut found, mut token) = (Vec::new(), None);
    for page in 0..3 {
        let request = s3.client.list_objects_v2().bucket(&s3.bucket).prefix("acme/").max_keys(2);
        let listed = request.set_continuation_token(token).send().await.unwrap();
        assert_eq!(listed.is_truncated, Some(page < 2));
        assert!(listed.contents().iter().all(|object| object.size == Some(10)));
        found.extend(listed.contents().iter().map(|object| object.key().unwrap().to_owned()));
        token = listed.next_continuation_token;
    }
    assert_eq!((found, token), (keys.map(str::to_owned).to_vec(), None));
    let grouped = s3.client.list_objects_v2().bucket(&s3.bucket).delimiter("/").send().await.unwrap();
    assert_eq!(grouped.contents().iter().map(|object| object.key().unwrap()).collect::<Vec<_>>(), ["abc", "b"]);
    assert_eq!(grouped.common_prefixes().iter().map(|prefix| prefix.prefix().unwrap()).collect::<Vec<_>>(), ["acme/"]);
}

#[tokio::test]
async fn every_object_of_an_unversioned_bucket_has_one_null_version() {
    let s3 = TestBucket::for_tests().await;
    put_body(&s3, "acme/key").await;
    put_body(&s3, "acme/key-of-another").await;
    let listed = s3.client.list_object_versions().bucket(&s3.bucket).prefix("acme/key").send().await.unwrap();
    let found: Vec<_> = listed.versions().iter().map(|version| (version.key().unwrap(), version.version_id().unwrap())).collect();
    assert_eq!(found, [("acme/key", "null"), ("acme/key-of-another", "null")]);
    assert_eq!(listed.delete_markers().len(), 0);
    let request = s3.client.delete_object().bucket(&s3.bucket).key("acme/key").version_id("null");
    request.send().await.unwrap();
    assert!(head(&s3, "acme/key").await.is_none());
    assert!(head(&s3, "acme/key-of-another").await.is_some());
}

#[tokio::test]
async fn a_copy_has_the_bytes_and_the_metadata_of_its_source() {
    let s3 = TestBucket::for_tests().await;
    put_body(&s3, "source").await;
    let source = format!("{}/source", s3.bucket);
    let request = s3.client.copy_object().bucket(&s3.bucket).key("copy").copy_source(&source);
    request.checksum_algorithm(ChecksumAlgorithm::Sha256).send().await.unwrap();
    let found = head(&s3, "copy").await.unwrap();
    assert_eq!(found.checksum_sha256, Some(Sha256::of(BODY).base64()));
    assert_eq!(found.checksum_type, Some(ChecksumType::FullObject));
    assert_eq!(found.metadata.as_ref().unwrap()["lfs-upload-id"], "write-token");
    assert_eq!(get(&s3, "copy").await, BODY);
    let request = s3.client.copy_object().bucket(&s3.bucket).key("copy").copy_source(&source);
    let request = request.metadata_directive(MetadataDirective::Replace).metadata("other", "label");
    request.send().await.unwrap();
    let found = head(&s3, "copy").await.unwrap().metadata.unwrap();
    assert_eq!((found.get("other").map(String::as_str), found.get("lfs-upload-id")), (Some("label"), None));
}

#[tokio::test]
async fn keys_with_special_characters_are_kept_apart() {
    let s3 = TestBucket::for_tests().await;
    let keys = ["with space", "plus+sign", "per%cent", "umlaut-ä", "a&b=c?d#e", "quote\"'<tag>", "dot.", "a/b/c"];
    for key in keys {
        let request = s3.client.put_object().bucket(&s3.bucket).key(key);
        assert_eq!(presign(request).await.send(key.to_owned()).await.status, 200, "{key}");
    }
    for key in keys {
        assert_eq!(get(&s3, key).await, key.as_bytes());
    }
    let listed = s3.client.list_objects_v2().bucket(&s3.bucket).send().await.unwrap();
    let mut sorted = keys;
    sorted.sort_unstable();
    assert_eq!(listed.contents().iter().map(|object| object.key().unwrap()).collect::<Vec<_>>(), sorted);
}
