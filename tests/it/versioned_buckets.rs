//! Versioned buckets: a pointer refers to the verified version, and no version of a failed upload is left.
//!
//! The embedded store does not support versions. `.ci/run` runs these tests on MinIO and VersityGW.

use aws_sdk_s3::types::{BucketVersioningStatus, VersioningConfiguration};
use serde_json::json;

use crate::harness::uploads::PART_BYTES;
use crate::harness::{ApiResponse, TestBroker, bytes, sha256};

async fn start_with_versioned_bucket() -> TestBroker {
    let broker = TestBroker::start().await;
    let enabled = VersioningConfiguration::builder().status(BucketVersioningStatus::Enabled).build();
    broker.s3.put_bucket_versioning().bucket(&broker.bucket).versioning_configuration(enabled).send().await.unwrap();
    broker
}

async fn publish_parts(broker: &TestBroker, content: &[u8]) -> ApiResponse {
    let opened = broker.open_multipart_with_hashes(content, json!({})).await.expect(201);
    broker.put_parts(&opened.json["parts"], content).await;
    broker.complete_and_wait(&opened.id(), json!({})).await
}

/// The number of versions and delete markers of all objects.
async fn versions(broker: &TestBroker) -> usize {
    let listed = broker.s3.list_object_versions().bucket(&broker.bucket).send().await.unwrap();
    listed.versions().len() + listed.delete_markers().len()
}

#[tokio::test]
#[ignore = "the embedded store has no versions: .ci/run runs it on MinIO and VersityGW"]
async fn a_pointer_refers_to_the_version_that_was_verified() {
    let broker = start_with_versioned_bucket().await;
    let large = bytes(PART_BYTES + 7, 5);
    for content in [b"hello".as_slice(), &large] {
        let done = if content.len() > PART_BYTES {
            publish_parts(&broker, content).await
        } else {
            broker.publish(content, json!({})).await
        };
        let key = broker.upload(&done.id()).await.json["object_key"].as_str().unwrap().to_owned();
        let records = broker.records(&broker.topic).await;
        let record = records.iter().find(|record| record.header("lfs-upload-id") == Some(done.id().as_str())).unwrap();
        let verified = record.header("lfs-version-id").expect("the record names its version").to_owned();

        broker.put_object(&key, &vec![b'x'; content.len()], Some(&done.id())).await;
        let resolved = broker.resolve(&record.value, "").await.expect(200).json;
        assert_eq!(resolved["integrity"], done.json["integrity"]);
        assert!(broker.download(&resolved).await == content, "{key}");
        broker.send(broker.request("POST", &format!("/lfs/uploads/{}/reverify", done.id()))).await.expect(200);

        let newest = broker.s3.head_object().bucket(&broker.bucket).key(&key).send().await.unwrap();
        let other =
            broker.resolve(&record.value, &format!("?version_id={}", newest.version_id().unwrap())).await.expect(200).json;
        assert_eq!(other["integrity"], json!(null), "that version was not verified");
        broker.s3.delete_object().bucket(&broker.bucket).key(&key).version_id(&verified).send().await.unwrap();
        broker.resolve(&record.value, "").await.expect_problem(410, "object-gone");
    }
}

#[tokio::test]
#[ignore = "the embedded store has no versions: .ci/run runs it on MinIO and VersityGW"]
async fn no_version_of_a_failed_upload_is_left() {
    let broker = start_with_versioned_bucket().await;
    let rejected = broker.open(b"hello", json!({})).await.expect(201);
    let key = rejected.json["object_key"].as_str().unwrap();
    for content in [b"first", b"other"] {
        broker.put_object(key, content, Some(&rejected.id())).await;
    }
    broker.complete(&rejected.id()).await.expect_problem(422, "checksum-mismatch");

    let stream = broker.open(b"a stream", json!({"sha256": null})).await.expect(201);
    broker.put(&stream.json["upload"], b"a stream").await.expect(200);
    broker.complete_with(&stream.id(), json!({"sha256": sha256(b"another")})).await.expect_problem(422, "checksum-mismatch");

    let aborted = broker.open(b"taken back", json!({})).await.expect(201);
    broker.put(&aborted.json["upload"], b"taken back").await.expect(200);
    broker.delete(&format!("/lfs/uploads/{}", aborted.id())).await.expect(204);
    broker.eventually("no version is left", || async { versions(&broker).await == 0 }).await;
}
