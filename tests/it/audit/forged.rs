//! Records that claim to be an upload's: `audit --fix` writes down only what it can prove.

use std::time::Duration;

use lfs_broker::audit::Kind;
use lfs_broker::kafka::{Delivered, MARKER_TOPIC, Marker};
use lfs_broker_client::checksum::Algorithm;
use lfs_broker_client::pointer::Pointer;
use rdkafka::producer::FutureRecord;
use serde_json::{Value, json};
use time::OffsetDateTime;
use uuid::Uuid;

use super::restored::open_again;
use super::{audit, figures, forge, found, id, producer};
use crate::harness::uploads::PART;
use crate::harness::{Answer, House, bytes};

/// The pointer that the broker would publish of an upload, as whoever read the bytes can write it.
fn as_the_broker_writes(opened: &Answer, sha256: &str, house: &House, size: usize) -> String {
    let key = opened.json["object_key"].as_str().unwrap();
    format!(
        r#"{{"kfs_lfs":1,"bucket":"{}","key":"{key}","size":{size},"sha256":"{sha256}","content_type":"application/octet-stream","created_at":"2026-11-21T06:35:59Z"}}"#,
        house.bucket
    )
}

async fn proof_of(house: &House, id: Uuid) -> (Option<String>, Option<String>) {
    let proof = sqlx::query_as("select integrity, object_etag from upload_sessions where id = $1").bind(id);
    proof.fetch_one(&house.db).await.unwrap()
}

#[tokio::test]
async fn a_forged_record_of_an_open_upload_is_not_adopted() {
    let house = House::new().await;
    let opened = house.put_up(b"hello", json!({})).await;
    let zeros = "0".repeat(64);
    for sha256 in [zeros.as_str(), &crate::harness::sha256(b"other")] {
        let value = as_the_broker_writes(&opened, sha256, &house, 5);
        forge(&house.topic, 0, value.as_bytes(), &opened.id()).await;
    }
    // The right bytes under a pointer with a member that is not ours.
    let right = as_the_broker_writes(&opened, &crate::harness::sha256(b"hello"), &house, 5);
    let embellished = right.replace(r#","content_type""#, r#","extra":1,"content_type""#);
    forge(&house.topic, 0, embellished.as_bytes(), &opened.id()).await;
    for fix in [false, true] {
        let report = audit(&house, fix).await.unwrap();
        found(&report, &[Kind::RecordUnpromised]);
        assert_eq!(figures(&report, Kind::RecordUnpromised), (3, 15, 0));
        assert!(report.findings[0].examples.iter().all(|example| example.contains("not proved")), "{report:#?}");
    }
    assert_eq!(house.upload(&opened.id()).await.state(), "open");
    // It is the client's, as before.
    house.complete(&opened.id()).await.expect(200);
}

#[tokio::test]
async fn a_failed_upload_is_not_taken_back_where_the_database_is_current() {
    let house = House::new().await;
    let opened = house.put_up(b"hello", json!({})).await;
    let value = as_the_broker_writes(&opened, &crate::harness::sha256(b"hello"), &house, 5);
    forge(&house.topic, 0, value.as_bytes(), &opened.id()).await;
    house.delete(&format!("/lfs/uploads/{}", opened.id())).await.expect(204);
    let report = audit(&house, true).await.unwrap();
    found(&report, &[Kind::RecordUnpromised]);
    assert_eq!(house.upload(&opened.id()).await.state(), "aborted");
    house.until_nothing_is_left(opened.json["object_key"].as_str().unwrap()).await;
}

#[tokio::test]
async fn an_adopted_upload_gets_its_etag_back_and_no_more_than_was_proved() {
    let house = House::new().await;
    house.put_policy(&house.topic, &json!({"checksums": ["sha256", "crc32"], "min_integrity": "checksum"})).await.expect(200);
    let content = bytes(PART + 9, 3);
    let parts = house.open_parts(&content, json!({})).await.expect(201);
    house.put_parts(&parts.json["parts"], &content).await;
    house.complete_and_wait(&parts.id(), json!({})).await;
    let (_, etag) = proof_of(&house, id(&parts)).await;
    open_again(&house, id(&parts)).await;
    // One whose record overstates: a CRC is no SHA-256.
    let crc = house.put_up(b"hello", json!({"sha256": Value::Null, "checksum_alg": "crc32", "checksum": "3610a686"})).await;
    let key = crc.json["object_key"].as_str().unwrap();
    let digest = Algorithm::Crc32.digest("3610a686").unwrap();
    let pointer = Pointer::new(&house.bucket, key, 5, &digest, "application/octet-stream", OffsetDateTime::now_utc());
    forge(&house.topic, 0, pointer.to_json().as_bytes(), &crc.id()).await;

    assert_eq!(figures(&audit(&house, true).await.unwrap(), Kind::KafkaAhead).2, 2);
    assert_eq!(proof_of(&house, id(&parts)).await, (Some("sha256".to_owned()), etag));
    let (integrity, crc_etag) = proof_of(&house, id(&crc)).await;
    assert_eq!((integrity.as_deref(), crc_etag.is_some()), (Some("checksum"), true));
    for upload in [&parts, &crc] {
        house.post(&format!("/lfs/uploads/{}/reverify", upload.id()), &json!({})).await.expect(200);
    }
}

#[tokio::test]
async fn a_copy_that_comes_before_the_record_that_the_marker_lists_is_not_adopted() {
    let house = House::new().await;
    let opened = house.put_up(b"hello", json!({"partition": 1})).await;
    let copy = as_the_broker_writes(&opened, &crate::harness::sha256(b"hello"), &house, 5);
    forge(&house.topic, 0, copy.as_bytes(), &opened.id()).await;
    house.complete(&opened.id()).await.expect(200);
    let before = house.upload(&opened.id()).await;
    let (partition, offset) =
        (before.json["record"]["partition"].as_i64().unwrap(), before.json["record"]["offset"].as_i64().unwrap());
    open_again(&house, id(&opened)).await;
    // As a transaction of ours lists it.
    let place: (Uuid, i32, i64) =
        sqlx::query_as("select id, shard, last_batch from deployment, relay_shards where last_batch > 0")
            .fetch_one(&house.db)
            .await
            .unwrap();
    let published =
        vec![Delivered { upload_id: id(&opened), partition: i32::try_from(partition).unwrap(), offset, timestamp_ms: 1 }];
    let marker = serde_json::to_vec(&Marker { batch: place.2, published }).unwrap();
    let key = format!("lfs-broker.{}.{}", place.0, place.1);
    let record = FutureRecord::to(MARKER_TOPIC).partition(place.1).key(&key).payload(&marker);
    producer().send(record, Duration::from_secs(10)).await.unwrap();

    let fixed = audit(&house, true).await.unwrap();
    assert_eq!(figures(&fixed, Kind::KafkaAhead), (1, 5, 1));
    assert!(fixed.finding(Kind::RecordUnpromised).unwrap().examples[0].contains("the shard's last marker lists its record"));
    let after = house.upload(&opened.id()).await;
    assert_eq!((after.state(), &after.json["record"]), ("published", &before.json["record"]));
}
