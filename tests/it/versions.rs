//! Buckets that keep versions: a pointer means the version that was proved, and nothing of a failed upload stays.
//!
//! The embedded store keeps none, so these run where a store does: `.ci/run` names them on MinIO and VersityGW.

use aws_sdk_s3::types::{BucketVersioningStatus, VersioningConfiguration};
use serde_json::json;

use crate::harness::uploads::PART;
use crate::harness::{Answer, House, bytes, sha256};

async fn versioned_house() -> House {
    let house = House::new().await;
    let enabled = VersioningConfiguration::builder().status(BucketVersioningStatus::Enabled).build();
    house.s3.put_bucket_versioning().bucket(&house.bucket).versioning_configuration(enabled).send().await.unwrap();
    house
}

async fn publish_parts(house: &House, content: &[u8]) -> Answer {
    let opened = house.open_hashed_parts(content, json!({})).await.expect(201);
    house.put_parts(&opened.json["parts"], content).await;
    house.complete_and_wait(&opened.id(), json!({})).await
}

/// How many versions and delete markers there are of all objects.
async fn versions(house: &House) -> usize {
    let listed = house.s3.list_object_versions().bucket(&house.bucket).send().await.unwrap();
    listed.versions().len() + listed.delete_markers().len()
}

#[tokio::test]
#[ignore = "the embedded store keeps no versions: .ci/run names it on MinIO and VersityGW"]
async fn a_pointer_means_the_version_that_was_proved() {
    let house = versioned_house().await;
    let large = bytes(PART + 7, 5);
    for content in [b"hello".as_slice(), &large] {
        let done =
            if content.len() > PART { publish_parts(&house, content).await } else { house.publish(content, json!({})).await };
        let key = house.upload(&done.id()).await.json["object_key"].as_str().unwrap().to_owned();
        let records = house.records(&house.topic).await;
        let record = records.iter().find(|record| record.header("lfs-upload-id") == Some(done.id().as_str())).unwrap();
        let proved = record.header("lfs-version-id").expect("the record names its version").to_owned();

        house.put_object(&key, &vec![b'x'; content.len()], Some(&done.id())).await;
        let resolved = house.resolve(&record.value, "").await.expect(200).json;
        assert_eq!(resolved["integrity"], done.json["integrity"]);
        assert!(house.download(&resolved).await == content, "{key}");
        house.send(house.request("POST", &format!("/lfs/uploads/{}/reverify", done.id()))).await.expect(200);

        let newest = house.s3.head_object().bucket(&house.bucket).key(&key).send().await.unwrap();
        let other = house.resolve(&record.value, &format!("?version_id={}", newest.version_id().unwrap())).await.expect(200).json;
        assert_eq!(other["integrity"], json!(null), "nobody proved that version");
        house.s3.delete_object().bucket(&house.bucket).key(&key).version_id(&proved).send().await.unwrap();
        house.resolve(&record.value, "").await.expect_problem(410, "object-gone");
    }
}

#[tokio::test]
#[ignore = "the embedded store keeps no versions: .ci/run names it on MinIO and VersityGW"]
async fn of_a_failed_upload_no_version_stays() {
    let house = versioned_house().await;
    let rejected = house.open(b"hello", json!({})).await.expect(201);
    let key = rejected.json["object_key"].as_str().unwrap();
    for content in [b"first", b"other"] {
        house.put_object(key, content, Some(&rejected.id())).await;
    }
    house.complete(&rejected.id()).await.expect_problem(422, "checksum-mismatch");

    let stream = house.open(b"a stream", json!({"sha256": null})).await.expect(201);
    house.put(&stream.json["upload"], b"a stream").await.expect(200);
    house.complete_with(&stream.id(), json!({"sha256": sha256(b"another")})).await.expect_problem(422, "checksum-mismatch");

    let aborted = house.open(b"taken back", json!({})).await.expect(201);
    house.put(&aborted.json["upload"], b"taken back").await.expect(200);
    house.delete(&format!("/lfs/uploads/{}", aborted.id())).await.expect(204);
    house.eventually("no version is left", || async { versions(&house).await == 0 }).await;
}
