//! PostgreSQL was restored from a backup: Kafka is ahead, and nothing may be sent a second time.

use std::time::Duration;

use lfs_broker::app;
use lfs_broker::audit::Kind;
use serde_json::json;
use uuid::Uuid;

use super::{audit, figures, found, id, is_clean, sql};
use crate::harness::{Answer, House};

/// Sets one published upload back to where it waited for the relay, and its shard to the batch before.
async fn restore(house: &House, upload: Uuid) {
    let mut tx = house.db.begin().await.unwrap();
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

/// Sets a published upload back to where it was open.
pub(super) async fn open_again(house: &House, upload: Uuid) {
    let back = "with back as (
             update upload_sessions set state = 'open', verified_at = null, integrity = null, pointer = null, object_etag = null,
                    object_version_id = null, published_partition = null, published_offset = null, published_at = null
             where id = $1 returning tenant, size_bytes)
         update tenants set open_sessions = open_sessions + 1, reserved_bytes = reserved_bytes + back.size_bytes
         from back where tenants.tenant = back.tenant";
    assert_eq!(sql(house, back, upload).await, 1);
}

async fn in_outbox(house: &House) -> i64 {
    sqlx::query_scalar("select count(*) from outbox").fetch_one(&house.db).await.unwrap()
}

/// What the API says of a published upload, without what a second publishing would change anyway.
fn story(upload: &Answer) -> (&str, serde_json::Value, serde_json::Value) {
    (upload.state(), upload.json["record"].clone(), upload.json["pointer"].clone())
}

#[tokio::test]
async fn a_broker_on_a_restored_database_starts_only_after_the_audit_and_sends_nothing_twice() {
    let mut house = House::new().await;
    let done = house.publish(b"hello", json!({"key": "k"})).await;
    let before = house.upload(&done.id()).await;
    house.stop().await;
    restore(&house, id(&done)).await;

    let told = audit(&house, false).await.unwrap();
    found(&told, &[Kind::KafkaAhead, Kind::MarkerAhead]);
    // It says so at once.
    let refused = app::start(house.settings.clone()).await.err();
    assert!(matches!(refused, Some(app::Error::Restored(_))), "{refused:?}");
    assert!(refused.unwrap().to_string().contains("restored from a backup"));
    assert_eq!(in_outbox(&house).await, 1);

    let fixed = audit(&house, true).await.unwrap();
    assert_eq!(figures(&fixed, Kind::KafkaAhead), (1, 5, 1));
    assert_eq!(figures(&fixed, Kind::MarkerAhead), (1, 0, 1));
    assert_eq!(in_outbox(&house).await, 0);
    house.start(|_| {}).await;
    assert_eq!(story(&house.upload(&done.id()).await), story(&before));
    // The shard goes on, with a batch that Kafka has not seen.
    house.publish(b"next", json!({"key": "k"})).await;
    assert_eq!(house.records(&house.topic).await.len(), 2);
    is_clean(&house).await;
}

#[tokio::test]
async fn a_relay_that_meets_a_restored_database_sends_nothing_of_the_shard_until_the_audit() {
    let mut house = House::with(|settings| settings.broker.complete_wait = Duration::from_secs(10)).await;
    let first = house.publish(b"first", json!({"key": "k"})).await;
    // The database is put back under a broker that has started and holds no shard yet, as where Kafka was away at the
    // start: the relay asks when it takes the shard.
    house.restart(|settings| settings.broker.complete_wait = Duration::from_secs(4)).await;
    restore(&house, id(&first)).await;
    let opened = house.open(b"second", json!({"key": "k"})).await.expect(201);
    house.put(&opened.json["upload"], b"second").await.expect(200);
    // Four seconds are several turns of the relay, which publishes in milliseconds where it may.
    assert_eq!(house.complete(&opened.id()).await.expect(202).state(), "verified");
    assert_eq!(house.records(&house.topic).await.len(), 1);
    assert_eq!(house.upload(&first.id()).await.state(), "verified");

    let fixed = audit(&house, true).await.unwrap();
    found(&fixed, &[Kind::KafkaAhead, Kind::MarkerAhead]);
    assert_eq!(figures(&fixed, Kind::MarkerAhead), (1, 0, 1));
    house.until(&opened.id(), "published").await;
    assert_eq!(house.upload(&first.id()).await.json["record"], first.json["record"]);
    assert_eq!(house.records(&house.topic).await.len(), 2);
    is_clean(&house).await;
}

#[tokio::test]
async fn an_upload_that_was_open_in_the_backup_is_published_where_its_record_is() {
    let house = House::new().await;
    let opened = house.open(b"hello", json!({"key": "k", "filename": "a.txt"})).await.expect(201);
    house.put(&opened.json["upload"], b"hello").await.expect(200);
    house.complete(&opened.id()).await.expect(200);
    let before = house.upload(&opened.id()).await;
    open_again(&house, id(&opened)).await;
    assert_eq!(house.upload(&opened.id()).await.state(), "open");

    assert_eq!(figures(&audit(&house, false).await.unwrap(), Kind::KafkaAhead), (1, 5, 0));
    assert_eq!(figures(&audit(&house, true).await.unwrap(), Kind::KafkaAhead), (1, 5, 1));
    let after = house.upload(&opened.id()).await;
    assert_eq!(story(&after), story(&before));
    assert_eq!(after.json["integrity"], "sha256");
    assert_eq!(house.records(&house.topic).await.len(), 1);
    is_clean(&house).await;
    let history = house.get(&format!("/lfs/uploads/{}/history", opened.id())).await.expect(200);
    let last = history.json["items"].as_array().unwrap().last().unwrap().clone();
    assert_eq!((&last["to"], &last["by"]), (&json!("published"), &json!("audit")));
}

#[tokio::test]
async fn a_pointer_that_was_on_its_way_in_the_backup_is_settled_by_its_record_and_not_sent_again() {
    let mut house = House::new().await;
    let first = house.publish(b"hello", json!({"key": "k"})).await;
    let before = house.upload(&first.id()).await;
    // A later batch of the same shard: the last marker does not list the first.
    house.publish(b"later", json!({"key": "k"})).await;
    house.stop().await;
    restore(&house, id(&first)).await;
    // The backup was made between the stamp and the mark.
    assert_eq!(sql(&house, "update outbox set batch = 1, attempts = 1 where session_id = $1", id(&first)).await, 1);
    let fixed = audit(&house, true).await.unwrap();
    found(&fixed, &[Kind::KafkaAhead, Kind::MarkerAhead]);
    assert_eq!(figures(&fixed, Kind::MarkerAhead), (1, 0, 1));
    house.start(|_| {}).await;
    house.publish(b"last", json!({"key": "k"})).await;
    assert_eq!(story(&house.upload(&first.id()).await), story(&before));
    assert_eq!(house.records(&house.topic).await.len(), 3);
    is_clean(&house).await;
}
