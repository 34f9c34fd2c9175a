//! Forged records of uploads: `audit --fix` adopts only what it can verify.

use std::time::Duration;

use lfs_broker::audit::FindingKind;
use lfs_broker::kafka::{MARKER_TOPIC, Marker, RecordMetadata};
use lfs_broker_client::checksum::Algorithm;
use lfs_broker_client::pointer::Pointer;
use rdkafka::producer::FutureRecord;
use serde_json::{Value, json};
use time::OffsetDateTime;
use uuid::Uuid;

use super::restored::reopen;
use super::{assert_kinds, audit, figures, forge, id, producer};
use crate::harness::uploads::PART_BYTES;
use crate::harness::{ApiResponse, TestBroker, bytes};

/// The pointer that the broker would publish for an upload. Any reader of the bytes can write the same pointer.
fn pointer_of(opened: &ApiResponse, sha256: &str, broker: &TestBroker, size: usize) -> String {
    let key = opened.json["object_key"].as_str().unwrap();
    format!(
        r#"{{"kfs_lfs":1,"bucket":"{}","key":"{key}","size":{size},"sha256":"{sha256}","content_type":"application/octet-stream","created_at":"2026-11-21T06:35:59Z"}}"#,
        broker.bucket
    )
}

async fn integrity_and_etag(broker: &TestBroker, id: Uuid) -> (Option<String>, Option<String>) {
    let saved = sqlx::query_as("select integrity, object_etag from upload_sessions where id = $1").bind(id);
    saved.fetch_one(&broker.db).await.unwrap()
}

#[tokio::test]
async fn the_audit_does_not_adopt_a_forged_record_of_an_open_upload() {
    let broker = TestBroker::start().await;
    let opened = broker.open_and_put(b"hello", json!({})).await;
    let zeros = "0".repeat(64);
    for sha256 in [zeros.as_str(), &crate::harness::sha256(b"other")] {
        let value = pointer_of(&opened, sha256, &broker, 5);
        forge(&broker.topic, 0, value.as_bytes(), &opened.id()).await;
    }
    // The right hash, but a pointer with a member that the broker never writes.
    let right = pointer_of(&opened, &crate::harness::sha256(b"hello"), &broker, 5);
    let extended = right.replace(r#","content_type""#, r#","extra":1,"content_type""#);
    forge(&broker.topic, 0, extended.as_bytes(), &opened.id()).await;
    for fix in [false, true] {
        let report = audit(&broker, fix).await.unwrap();
        assert_kinds(&report, &[FindingKind::RecordUnpromised]);
        assert_eq!(figures(&report, FindingKind::RecordUnpromised), (3, 15, 0));
        assert!(report.findings[0].examples.iter().all(|example| example.contains("not verified")), "{report:#?}");
    }
    assert_eq!(broker.upload(&opened.id()).await.state(), "open");
    // The client can still complete the upload.
    broker.complete(&opened.id()).await.expect(200);
}

#[tokio::test]
async fn the_audit_does_not_revive_an_aborted_upload_while_the_database_is_current() {
    let broker = TestBroker::start().await;
    let opened = broker.open_and_put(b"hello", json!({})).await;
    let value = pointer_of(&opened, &crate::harness::sha256(b"hello"), &broker, 5);
    forge(&broker.topic, 0, value.as_bytes(), &opened.id()).await;
    broker.delete(&format!("/lfs/uploads/{}", opened.id())).await.expect(204);
    let report = audit(&broker, true).await.unwrap();
    assert_kinds(&report, &[FindingKind::RecordUnpromised]);
    assert_eq!(broker.upload(&opened.id()).await.state(), "aborted");
    broker.wait_until_s3_is_empty(opened.json["object_key"].as_str().unwrap()).await;
}

#[tokio::test]
async fn an_adopted_upload_gets_its_etag_and_only_the_integrity_that_was_verified() {
    let broker = TestBroker::start().await;
    broker.put_policy(&broker.topic, &json!({"checksums": ["sha256", "crc32"], "min_integrity": "checksum"})).await.expect(200);
    let content = bytes(PART_BYTES + 9, 3);
    let parts = broker.open_multipart(&content, json!({})).await.expect(201);
    broker.put_parts(&parts.json["parts"], &content).await;
    broker.complete_and_wait(&parts.id(), json!({})).await;
    let (_, etag) = integrity_and_etag(&broker, id(&parts)).await;
    reopen(&broker, id(&parts)).await;
    // The record of this upload overstates its integrity: a CRC is no SHA-256.
    let crc =
        broker.open_and_put(b"hello", json!({"sha256": Value::Null, "checksum_alg": "crc32", "checksum": "3610a686"})).await;
    let key = crc.json["object_key"].as_str().unwrap();
    let digest = Algorithm::Crc32.digest("3610a686").unwrap();
    let pointer = Pointer::new(&broker.bucket, key, 5, &digest, "application/octet-stream", OffsetDateTime::now_utc());
    forge(&broker.topic, 0, pointer.to_json().as_bytes(), &crc.id()).await;

    assert_eq!(figures(&audit(&broker, true).await.unwrap(), FindingKind::KafkaAhead).2, 2);
    assert_eq!(integrity_and_etag(&broker, id(&parts)).await, (Some("sha256".to_owned()), etag));
    let (integrity, crc_etag) = integrity_and_etag(&broker, id(&crc)).await;
    assert_eq!((integrity.as_deref(), crc_etag.is_some()), (Some("checksum"), true));
    for upload in [&parts, &crc] {
        broker.post(&format!("/lfs/uploads/{}/reverify", upload.id()), &json!({})).await.expect(200);
    }
}

#[tokio::test]
async fn the_audit_adopts_the_record_in_the_shards_marker_and_not_an_earlier_copy() {
    let broker = TestBroker::start().await;
    let opened = broker.open_and_put(b"hello", json!({"partition": 1})).await;
    let copy = pointer_of(&opened, &crate::harness::sha256(b"hello"), &broker, 5);
    forge(&broker.topic, 0, copy.as_bytes(), &opened.id()).await;
    broker.complete(&opened.id()).await.expect(200);
    let before = broker.upload(&opened.id()).await;
    let (partition, offset) =
        (before.json["record"]["partition"].as_i64().unwrap(), before.json["record"]["offset"].as_i64().unwrap());
    reopen(&broker, id(&opened)).await;
    // A marker like those of the relay's transactions.
    let shard: (Uuid, i32, i64) =
        sqlx::query_as("select id, shard, last_batch from deployment, relay_shards where last_batch > 0")
            .fetch_one(&broker.db)
            .await
            .unwrap();
    let published =
        vec![RecordMetadata { upload_id: id(&opened), partition: i32::try_from(partition).unwrap(), offset, timestamp_ms: 1 }];
    let marker = serde_json::to_vec(&Marker { batch: shard.2, published }).unwrap();
    let key = format!("lfs-broker.{}.{}", shard.0, shard.1);
    let record = FutureRecord::to(MARKER_TOPIC).partition(shard.1).key(&key).payload(&marker);
    producer().send(record, Duration::from_secs(10)).await.unwrap();

    let fixed = audit(&broker, true).await.unwrap();
    assert_eq!(figures(&fixed, FindingKind::KafkaAhead), (1, 5, 1));
    assert!(
        fixed.finding(FindingKind::RecordUnpromised).unwrap().examples[0].contains("the shard's last marker lists its record")
    );
    let after = broker.upload(&opened.id()).await;
    assert_eq!((after.state(), &after.json["record"]), ("published", &before.json["record"]));
}
