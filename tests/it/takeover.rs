//! A new owner of a shard finds a pointer in the last marker that the database does not know as published: it marks the
//! upload published, looks up the offset if the marker lacks it, and never sends the pointer again.
//!
//! The embedded Kafka cannot find a record by its timestamp, so tests that find one need a real Kafka.

use std::time::Duration;

use lfs_broker::kafka::{MARKER_TOPIC, Marker, RecordMetadata};
use rdkafka::producer::FutureRecord;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::audit::{assert_clean, forge, producer};
use crate::harness::{ApiResponse, TestBroker};

/// Publishes an upload, then goes back to the moment after its transaction was committed: the row is claimed, and the shard's
/// last marker lists the upload as `list` says. Returns the upload as it was published.
async fn stop_before_marking(broker: &mut TestBroker, list: impl FnOnce(RecordMetadata) -> RecordMetadata) -> ApiResponse {
    broker.log_outbox_inserts().await;
    let done = broker.publish(b"hello", json!({"key": "k"})).await;
    broker.stop().await;
    let back = "with back as (
             update upload_sessions set state = 'verified', published_partition = null, published_offset = null, published_at = null
             where state = 'published' returning id),
         unwritten as (delete from upload_history using back where session_id = back.id and to_state = 'published')
         insert into outbox (session_id, shard, topic, ordering, partition, key, value, headers, created_at, next_try_at, batch, attempts)
             select session_id, shard, topic, ordering, partition, key, value, headers, created_at, next_try_at, 1, 1
             from outbox_log where session_id in (select id from back)
         returning shard";
    let (shard,): (i32,) = sqlx::query_as(back).fetch_one(&broker.db).await.unwrap();
    let (deployment,): (Uuid,) = sqlx::query_as("select id from deployment").fetch_one(&broker.db).await.unwrap();
    let record = &done.json["record"];
    let number = |name: &str| record[name].as_i64().unwrap();
    let published = RecordMetadata {
        upload_id: done.id().parse().unwrap(),
        partition: i32::try_from(number("partition")).unwrap(),
        offset: number("offset"),
        timestamp_ms: i64::try_from(crate::harness::time(&record["timestamp"]).unix_timestamp_nanos() / 1_000_000).unwrap(),
    };
    let marker = serde_json::to_vec(&Marker { batch: 1, published: vec![list(published)] }).unwrap();
    let key = format!("lfs-broker.{deployment}.{shard}");
    let record = FutureRecord::to(MARKER_TOPIC).partition(shard).key(&key).payload(&marker);
    producer().send(record, Duration::from_secs(10)).await.unwrap();
    done
}

/// Starts the broker and returns the upload's `record` once it is published, in the view and in the answer to `complete`.
async fn record_after_takeover(broker: &mut TestBroker, id: &str) -> Value {
    broker.start_again(|_| {}).await;
    let found = broker.wait_for_state(id, "published").await;
    let completed = broker.complete(id).await.expect(200);
    assert_eq!(found.json["record"], completed.json["record"]);
    broker.eventually("the outbox is empty", || async { broker.outbox_rows().await == 0 }).await;
    found.json["record"].clone()
}

#[tokio::test]
#[ignore = "needs a real Kafka: .ci/run runs it"]
async fn a_listed_pointer_gets_the_offset_of_its_record() {
    let without_partition = |record: RecordMetadata| RecordMetadata { partition: -1, ..unknown_offset(record) };
    for list in [unknown_offset, without_partition] {
        let mut broker = TestBroker::start().await;
        let done = stop_before_marking(&mut broker, list).await;
        // A record with the same header, but with another value, is another program's.
        forge(&broker.topic, 0, b"{}", &done.id()).await;
        assert_eq!(record_after_takeover(&mut broker, &done.id()).await, done.json["record"]);
        assert_eq!(broker.records(&broker.topic).await.len(), 2, "the pointer is not sent again");
    }
}

fn unknown_offset(record: RecordMetadata) -> RecordMetadata {
    RecordMetadata { offset: RecordMetadata::UNKNOWN_OFFSET, ..record }
}

#[tokio::test]
#[ignore = "needs a real Kafka: .ci/run runs it"]
async fn a_listed_pointer_gets_the_offset_of_a_record_that_kafkas_clock_dates_earlier() {
    let mut broker = TestBroker::start().await;
    let later = |record: RecordMetadata| RecordMetadata { timestamp_ms: record.timestamp_ms + 60_000, ..unknown_offset(record) };
    let done = stop_before_marking(&mut broker, later).await;
    assert_eq!(record_after_takeover(&mut broker, &done.id()).await, done.json["record"]);
}

#[tokio::test]
async fn the_offset_in_a_marker_of_an_earlier_version_is_used_without_a_lookup() {
    let mut broker = TestBroker::start().await;
    let done = stop_before_marking(&mut broker, |record| RecordMetadata { offset: 4242, ..record }).await;
    assert_eq!(record_after_takeover(&mut broker, &done.id()).await["offset"], 4242);
    assert_eq!(broker.records(&broker.topic).await.len(), 1, "the pointer is not sent again");
}

#[tokio::test]
async fn a_listed_pointer_whose_record_is_gone_is_published_without_a_record() {
    let mut broker = TestBroker::start().await;
    // No record is as new as the marker says. So the lookup finds none, as after a deletion by retention.
    let much_later =
        |record: RecordMetadata| RecordMetadata { timestamp_ms: record.timestamp_ms + 2 * 3_600_000, ..unknown_offset(record) };
    let done = stop_before_marking(&mut broker, much_later).await;
    assert_eq!(record_after_takeover(&mut broker, &done.id()).await, Value::Null);
    assert_eq!(broker.records(&broker.topic).await.len(), 1, "the pointer is not sent again");
    assert_clean(&broker).await;
}
