//! PostgreSQL was restored from a backup: Kafka is ahead of it, and no pointer may be sent twice.

use std::time::Duration;

use lfs_broker::app;
use lfs_broker::audit::FindingKind;
use serde_json::json;
use uuid::Uuid;

use super::{assert_clean, assert_kinds, audit, figures, id, sql};
use crate::harness::{ApiResponse, TestBroker};

/// Moves one published upload back to `verified` with an outbox row, and its shard to the previous batch.
async fn restore(broker: &TestBroker, upload: Uuid) {
    let mut tx = broker.db.begin().await.unwrap();
    let shard: i32 = sqlx::query_scalar("select shard from relay_shards where last_batch > 0").fetch_one(&mut *tx).await.unwrap();
    let back = "with back as (
             update upload_sessions set state = 'verified', published_partition = null, published_offset = null, published_at = null
             where id = $1 returning *)
         insert into outbox (session_id, shard, topic, partition, key, value, headers, created_at, next_try_at)
         select id, $2, topic, record_partition, record_key, pointer,
                jsonb_build_array(jsonb_build_array('lfs-upload-id', id::text), jsonb_build_array('lfs-integrity', integrity)),
                verified_at, verified_at from back";
    let moved = sqlx::query(back).bind(upload).bind(shard).execute(&mut *tx).await.unwrap();
    assert_eq!(moved.rows_affected(), 1);
    sqlx::query("update relay_shards set last_batch = last_batch - 1 where shard = $1")
        .bind(shard)
        .execute(&mut *tx)
        .await
        .unwrap();
    tx.commit().await.unwrap();
}

/// Moves a published upload back to `open`.
pub(super) async fn reopen(broker: &TestBroker, upload: Uuid) {
    let back = "with back as (
             update upload_sessions set state = 'open', verified_at = null, integrity = null, pointer = null, object_etag = null,
                    object_version_id = null, published_partition = null, published_offset = null, published_at = null
             where id = $1 returning tenant, size_bytes)
         update tenants set open_sessions = open_sessions + 1, reserved_bytes = reserved_bytes + back.size_bytes
         from back where tenants.tenant = back.tenant";
    assert_eq!(sql(broker, back, upload).await, 1);
}

async fn outbox_rows(broker: &TestBroker) -> i64 {
    sqlx::query_scalar("select count(*) from outbox").fetch_one(&broker.db).await.unwrap()
}

/// What the API shows of a published upload, without the members that a second publication would change.
fn published_state(upload: &ApiResponse) -> (&str, serde_json::Value, serde_json::Value) {
    (upload.state(), upload.json["record"].clone(), upload.json["pointer"].clone())
}

#[tokio::test]
async fn a_broker_on_a_restored_database_starts_only_after_the_audit_and_sends_nothing_twice() {
    let mut broker = TestBroker::start().await;
    let done = broker.publish(b"hello", json!({"key": "k"})).await;
    let before = broker.upload(&done.id()).await;
    broker.stop().await;
    restore(&broker, id(&done)).await;

    let report = audit(&broker, false).await.unwrap();
    assert_kinds(&report, &[FindingKind::KafkaAhead, FindingKind::MarkerAhead]);
    // The start fails at once.
    let refused = app::start(broker.settings.clone()).await.err();
    assert!(matches!(refused, Some(app::Error::DatabaseRestored(_))), "{refused:?}");
    assert!(refused.unwrap().to_string().contains("restored from a backup"));
    assert_eq!(outbox_rows(&broker).await, 1);

    let fixed = audit(&broker, true).await.unwrap();
    assert_eq!(figures(&fixed, FindingKind::KafkaAhead), (1, 5, 1));
    assert_eq!(figures(&fixed, FindingKind::MarkerAhead), (1, 0, 1));
    assert_eq!(outbox_rows(&broker).await, 0);
    broker.start_again(|_| {}).await;
    assert_eq!(published_state(&broker.upload(&done.id()).await), published_state(&before));
    // The shard continues with a batch number that Kafka has not seen.
    broker.publish(b"next", json!({"key": "k"})).await;
    assert_eq!(broker.records(&broker.topic).await.len(), 2);
    assert_clean(&broker).await;
}

#[tokio::test]
async fn a_relay_that_meets_a_restored_database_publishes_nothing_of_the_shard_until_the_audit() {
    let mut broker = TestBroker::start_with(|settings| settings.broker.complete_wait = Duration::from_secs(10)).await;
    let first = broker.publish(b"first", json!({"key": "k"})).await;
    // The database is restored under a running broker that holds no shard yet, as when Kafka was away at its start.
    // The relay checks when it acquires the shard.
    broker.restart(|settings| settings.broker.complete_wait = Duration::from_secs(4)).await;
    restore(&broker, id(&first)).await;
    let opened = broker.open(b"second", json!({"key": "k"})).await.expect(201);
    broker.put(&opened.json["upload"], b"second").await.expect(200);
    // The relay publishes within milliseconds if it may; in four seconds it tries several times.
    assert_eq!(broker.complete_until_verified(&opened.id()).await.expect(202).state(), "verified");
    assert_eq!(broker.records(&broker.topic).await.len(), 1);
    assert_eq!(broker.upload(&first.id()).await.state(), "verified");

    let fixed = audit(&broker, true).await.unwrap();
    assert_kinds(&fixed, &[FindingKind::KafkaAhead, FindingKind::MarkerAhead]);
    assert_eq!(figures(&fixed, FindingKind::MarkerAhead), (1, 0, 1));
    broker.wait_for_state(&opened.id(), "published").await;
    assert_eq!(broker.upload(&first.id()).await.json["record"], first.json["record"]);
    assert_eq!(broker.records(&broker.topic).await.len(), 2);
    assert_clean(&broker).await;
}

#[tokio::test]
async fn an_upload_that_was_open_in_the_backup_is_published_where_its_record_is() {
    let broker = TestBroker::start().await;
    let opened = broker.open(b"hello", json!({"key": "k", "filename": "a.txt"})).await.expect(201);
    broker.put(&opened.json["upload"], b"hello").await.expect(200);
    broker.complete(&opened.id()).await.expect(200);
    let before = broker.upload(&opened.id()).await;
    reopen(&broker, id(&opened)).await;
    assert_eq!(broker.upload(&opened.id()).await.state(), "open");

    assert_eq!(figures(&audit(&broker, false).await.unwrap(), FindingKind::KafkaAhead), (1, 5, 0));
    assert_eq!(figures(&audit(&broker, true).await.unwrap(), FindingKind::KafkaAhead), (1, 5, 1));
    let after = broker.upload(&opened.id()).await;
    assert_eq!(published_state(&after), published_state(&before));
    assert_eq!(after.json["integrity"], "sha256");
    assert_eq!(broker.records(&broker.topic).await.len(), 1);
    assert_clean(&broker).await;
    let history = broker.get(&format!("/lfs/uploads/{}/history", opened.id())).await.expect(200);
    let last = history.json["items"].as_array().unwrap().last().unwrap().clone();
    assert_eq!((&last["to"], &last["by"]), (&json!("published"), &json!("audit")));
}

#[tokio::test]
async fn the_audit_marks_an_in_flight_pointer_published_by_its_record_and_does_not_send_it_again() {
    let mut broker = TestBroker::start().await;
    let first = broker.publish(b"hello", json!({"key": "k"})).await;
    let before = broker.upload(&first.id()).await;
    // A later batch of the same shard: its marker does not list the first upload.
    broker.publish(b"later", json!({"key": "k"})).await;
    broker.stop().await;
    restore(&broker, id(&first)).await;
    // The backup was made after the relay claimed the batch and before it marked the pointer published.
    assert_eq!(sql(&broker, "update outbox set batch = 1, attempts = 1 where session_id = $1", id(&first)).await, 1);
    let fixed = audit(&broker, true).await.unwrap();
    assert_kinds(&fixed, &[FindingKind::KafkaAhead, FindingKind::MarkerAhead]);
    assert_eq!(figures(&fixed, FindingKind::MarkerAhead), (1, 0, 1));
    broker.start_again(|_| {}).await;
    broker.publish(b"last", json!({"key": "k"})).await;
    assert_eq!(published_state(&broker.upload(&first.id()).await), published_state(&before));
    assert_eq!(broker.records(&broker.topic).await.len(), 3);
    assert_clean(&broker).await;
}
