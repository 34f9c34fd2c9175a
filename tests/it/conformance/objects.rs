//! What the broker does with objects itself.

use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::{ChecksumAlgorithm, ChecksumType, Delete, MetadataDirective, ObjectIdentifier};
use lfs_broker_client::checksum::{Algorithm, Sha256};

use super::{base64, bytes, get, head, holder, outcome, put};
use crate::stores::{Flavour, Store};

const BODY: &[u8] = b"0123456789";

async fn stored(store: &Store, key: &str) {
    assert_eq!(holder(put(store, key, BODY)).await.send(BODY).await.status, 200, "{key}");
}

#[tokio::test]
async fn what_is_not_there_is_not_found() {
    let store = Store::for_tests().await;
    assert!(head(&store, "nothing").await.is_none());
    let missing = store.client.get_object().bucket(&store.bucket).key("nothing").send().await;
    assert_eq!(outcome(&missing), (404, "NoSuchKey".to_owned()));
    let missing = store.client.get_object().bucket("there-is-no-such-bucket").key("nothing").send().await;
    assert_eq!(outcome(&missing), (404, "NoSuchBucket".to_owned()));
    let missing = store.client.head_bucket().bucket("there-is-no-such-bucket").send().await;
    assert!(missing.unwrap_err().as_service_error().unwrap().is_not_found());
    let lost = store.client.put_object().bucket("there-is-no-such-bucket").key("key").body(BODY.to_vec().into()).send().await;
    assert_eq!(outcome(&lost), (404, "NoSuchBucket".to_owned()));
}

#[tokio::test]
async fn a_bucket_is_there_once_and_is_not_versioned() {
    let store = Store::for_tests().await;
    store.client.head_bucket().bucket(&store.bucket).send().await.unwrap();
    let again = store.client.create_bucket().bucket(&store.bucket).send().await;
    assert_eq!(outcome(&again), (409, "BucketAlreadyOwnedByYou".to_owned()));
    let listed = store.client.list_buckets().send().await.unwrap();
    assert_eq!(listed.buckets().iter().filter(|bucket| bucket.name() == Some(&store.bucket)).count(), 1);
    let versioning = store.client.get_bucket_versioning().bucket(&store.bucket).send().await.unwrap();
    assert_eq!(versioning.status, None);
}

#[tokio::test]
async fn the_checksum_is_shown_only_where_it_is_asked_for() {
    let store = Store::for_tests().await;
    stored(&store, "key").await;
    let plain = store.client.head_object().bucket(&store.bucket).key("key").send().await.unwrap();
    assert_eq!((plain.checksum_sha256, plain.checksum_type), (None, None));
    assert_eq!(head(&store, "key").await.unwrap().checksum_sha256, Some(Sha256::of(BODY).base64()));
}

#[tokio::test]
async fn an_object_without_a_named_checksum_has_crc64nvme_where_the_store_computes_one() {
    let store = Store::for_tests().await;
    let request = store.client.put_object().bucket(&store.bucket).key("key");
    assert_eq!(holder(request).await.send(BODY).await.status, 200);
    let found = head(&store, "key").await.unwrap();
    let computed = match store.place.flavour {
        Flavour::Embedded | Flavour::Versitygw => Some(base64(Algorithm::Crc64nvme, BODY)),
        Flavour::Minio => None,
    };
    assert_eq!(found.checksum_crc64_nvme, computed);
    assert_eq!((found.checksum_sha256, found.checksum_crc32), (None, None));
}

#[tokio::test]
async fn an_empty_object_is_an_object() {
    let store = Store::for_tests().await;
    assert_eq!(holder(put(&store, "empty", b"")).await.send("").await.status, 200);
    let found = head(&store, "empty").await.unwrap();
    assert_eq!(found.content_length, Some(0));
    assert_eq!(found.checksum_sha256, Some(Sha256::of(b"").base64()));
    assert_eq!(get(&store, "empty").await, b"");
}

#[tokio::test]
async fn a_range_of_an_object_can_be_read() {
    let store = Store::for_tests().await;
    stored(&store, "key").await;
    for (range, wanted) in
        [("bytes=0-0", "0"), ("bytes=3-5", "345"), ("bytes=7-", "789"), ("bytes=-2", "89"), ("bytes=8-99", "89")]
    {
        let found = store.client.get_object().bucket(&store.bucket).key("key").range(range).send().await.unwrap();
        assert_eq!(found.content_length, Some(wanted.len() as i64), "{range}");
        assert!(found.content_range.as_ref().unwrap().ends_with("/10"), "{range}");
        assert_eq!(found.body.collect().await.unwrap().to_vec(), wanted.as_bytes(), "{range}");
    }
    let beyond = store.client.get_object().bucket(&store.bucket).key("key").range("bytes=10-").send().await;
    assert_eq!(outcome(&beyond), (416, "InvalidRange".to_owned()));
}

#[tokio::test]
async fn a_read_can_insist_on_the_object_it_has_seen() {
    let store = Store::for_tests().await;
    stored(&store, "key").await;
    let etag = head(&store, "key").await.unwrap().e_tag.unwrap();
    let read = || store.client.get_object().bucket(&store.bucket).key("key");
    assert_eq!(outcome(&read().if_match(&etag).send().await), (200, String::new()));
    let other = read().if_match("\"00000000000000000000000000000000\"").send().await;
    assert_eq!(outcome(&other), (412, "PreconditionFailed".to_owned()));
    assert_eq!(outcome(&read().if_none_match(&etag).send().await).0, 304);
}

#[tokio::test]
async fn a_put_of_the_sdk_is_stored_with_the_checksum_that_it_adds() {
    let store = Store::for_tests().await;
    let body = bytes(300_000, 1);
    let request = store.client.put_object().bucket(&store.bucket).key("memory").body(ByteStream::from(body.clone()));
    request.send().await.unwrap();
    assert_eq!(head(&store, "memory").await.unwrap().checksum_crc32, Some(base64(Algorithm::Crc32, &body)));
    assert_eq!(get(&store, "memory").await, body);
}

#[tokio::test]
async fn a_streamed_put_of_the_sdk_has_its_checksum_behind_the_body() {
    let store = Store::for_tests().await;
    let body = bytes(1_500_000, 2);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("body");
    std::fs::write(&path, &body).unwrap();
    for (key, algorithm) in [("crc32", ChecksumAlgorithm::Crc32), ("sha256", ChecksumAlgorithm::Sha256)] {
        let stream = ByteStream::from_path(&path).await.unwrap();
        let request = store.client.put_object().bucket(&store.bucket).key(key).checksum_algorithm(algorithm);
        request.content_encoding("identity").body(stream).send().await.unwrap();
        assert_eq!(get(&store, key).await, body);
    }
    let found = head(&store, "crc32").await.unwrap();
    assert_eq!(found.checksum_crc32, Some(base64(Algorithm::Crc32, &body)));
    // How the body travelled is no property of the object.
    assert_eq!(found.content_encoding.as_deref(), Some("identity"));
    assert_eq!(head(&store, "sha256").await.unwrap().checksum_sha256, Some(Sha256::of(&body).base64()));
}

#[tokio::test]
async fn a_put_replaces_the_object_under_its_key() {
    let store = Store::for_tests().await;
    stored(&store, "key").await;
    let later = store.client.put_object().bucket(&store.bucket).key("key").body(ByteStream::from_static(b"later"));
    later.send().await.unwrap();
    assert_eq!(get(&store, "key").await, b"later");
    let found = head(&store, "key").await.unwrap();
    assert_eq!((found.content_length, found.checksum_sha256), (Some(5), None));
}

#[tokio::test]
async fn deleting_twice_is_deleting_once() {
    let store = Store::for_tests().await;
    for key in ["one", "two", "three"] {
        stored(&store, key).await;
    }
    for _ in 0..2 {
        store.client.delete_object().bucket(&store.bucket).key("one").send().await.unwrap();
        assert!(head(&store, "one").await.is_none());
    }
    let keys = ["one", "two", "three"].map(|key| ObjectIdentifier::builder().key(key).build().unwrap());
    let delete = Delete::builder().set_objects(Some(keys.to_vec())).build().unwrap();
    let done = store.client.delete_objects().bucket(&store.bucket).delete(delete).send().await.unwrap();
    assert_eq!((done.deleted().len(), done.errors().len()), (3, 0));
    assert!(head(&store, "two").await.is_none());
    assert!(head(&store, "three").await.is_none());
}

#[tokio::test]
async fn objects_are_listed_in_order_and_in_pages() {
    let store = Store::for_tests().await;
    let keys = ["acme/1", "acme/2", "acme/3", "acme/4", "acme/5"];
    for key in ["abc", "acme/1", "acme/2", "acme/3", "acme/4", "acme/5", "b"] {
        stored(&store, key).await;
    }
    let (mut found, mut token) = (Vec::new(), None);
    for page in 0..3 {
        let request = store.client.list_objects_v2().bucket(&store.bucket).prefix("acme/").max_keys(2);
        let listed = request.set_continuation_token(token).send().await.unwrap();
        assert_eq!(listed.is_truncated, Some(page < 2));
        assert!(listed.contents().iter().all(|object| object.size == Some(10)));
        found.extend(listed.contents().iter().map(|object| object.key().unwrap().to_owned()));
        token = listed.next_continuation_token;
    }
    assert_eq!((found, token), (keys.map(str::to_owned).to_vec(), None));
    let rolled = store.client.list_objects_v2().bucket(&store.bucket).delimiter("/").send().await.unwrap();
    assert_eq!(rolled.contents().iter().map(|object| object.key().unwrap()).collect::<Vec<_>>(), ["abc", "b"]);
    assert_eq!(rolled.common_prefixes().iter().map(|prefix| prefix.prefix().unwrap()).collect::<Vec<_>>(), ["acme/"]);
}

#[tokio::test]
async fn every_object_of_an_unversioned_bucket_has_one_version() {
    let store = Store::for_tests().await;
    stored(&store, "acme/key").await;
    stored(&store, "acme/key-of-another").await;
    let listed = store.client.list_object_versions().bucket(&store.bucket).prefix("acme/key").send().await.unwrap();
    let found: Vec<_> = listed.versions().iter().map(|version| (version.key().unwrap(), version.version_id().unwrap())).collect();
    assert_eq!(found, [("acme/key", "null"), ("acme/key-of-another", "null")]);
    assert_eq!(listed.delete_markers().len(), 0);
    let request = store.client.delete_object().bucket(&store.bucket).key("acme/key").version_id("null");
    request.send().await.unwrap();
    assert!(head(&store, "acme/key").await.is_none());
    assert!(head(&store, "acme/key-of-another").await.is_some());
}

#[tokio::test]
async fn a_copy_has_the_bytes_and_the_labels_of_its_source() {
    let store = Store::for_tests().await;
    stored(&store, "source").await;
    let source = format!("{}/source", store.bucket);
    let request = store.client.copy_object().bucket(&store.bucket).key("copy").copy_source(&source);
    request.checksum_algorithm(ChecksumAlgorithm::Sha256).send().await.unwrap();
    let found = head(&store, "copy").await.unwrap();
    assert_eq!(found.checksum_sha256, Some(Sha256::of(BODY).base64()));
    assert_eq!(found.checksum_type, Some(ChecksumType::FullObject));
    assert_eq!(found.metadata.as_ref().unwrap()["lfs-upload-id"], "write-token");
    assert_eq!(get(&store, "copy").await, BODY);
    let request = store.client.copy_object().bucket(&store.bucket).key("copy").copy_source(&source);
    let request = request.metadata_directive(MetadataDirective::Replace).metadata("other", "label");
    request.send().await.unwrap();
    let found = head(&store, "copy").await.unwrap().metadata.unwrap();
    assert_eq!((found.get("other").map(String::as_str), found.get("lfs-upload-id")), (Some("label"), None));
}

#[tokio::test]
async fn awkward_keys_are_kept_apart() {
    let store = Store::for_tests().await;
    let keys = ["with space", "plus+sign", "per%cent", "umlaut-ä", "a&b=c?d#e", "quote\"'<tag>", "dot.", "a/b/c"];
    for key in keys {
        let request = store.client.put_object().bucket(&store.bucket).key(key);
        assert_eq!(holder(request).await.send(key.to_owned()).await.status, 200, "{key}");
    }
    for key in keys {
        assert_eq!(get(&store, key).await, key.as_bytes());
    }
    let listed = store.client.list_objects_v2().bucket(&store.bucket).send().await.unwrap();
    let mut sorted = keys;
    sorted.sort_unstable();
    assert_eq!(listed.contents().iter().map(|object| object.key().unwrap()).collect::<Vec<_>>(), sorted);
}
