//! Crashes: another replica continues the work, and nothing is lost or done twice.

use std::time::Duration;

use aws_sdk_s3::types::{CompletedMultipartUpload, CompletedPart};
use serde_json::{Value, json};

use crate::harness::faults::upload_id_of;
use crate::harness::uploads::PART_BYTES;
use crate::harness::{TestBroker, bytes, sha256};

/// A port on which no server listens.
const NO_SERVER: &str = "127.0.0.1:9";

/// Longer than the lease of a dead replica.
const AFTER_LEASE: Duration = Duration::from_secs(31);

/// Joins an upload's parts in S3 like a broker that is killed before it stores the result.
async fn join_parts(broker: &TestBroker, opened: &Value) {
    let (key, id) = (opened["object_key"].as_str().unwrap(), opened["id"].as_str().unwrap());
    let s3_id: (String,) = sqlx::query_as("select s3_upload_id from upload_sessions where id = $1::uuid")
        .bind(id)
        .fetch_one(&broker.db)
        .await
        .unwrap();
    let listed = broker.s3.list_parts().bucket(&broker.bucket).key(key).upload_id(&s3_id.0).send().await.unwrap();
    let parts = listed.parts().iter().map(|part| {
        CompletedPart::builder()
            .set_part_number(part.part_number())
            .set_e_tag(part.e_tag().map(str::to_owned))
            .set_checksum_sha256(part.checksum_sha256().map(str::to_owned))
            .build()
    });
    let parts = CompletedMultipartUpload::builder().set_parts(Some(parts.collect())).build();
    let complete = broker.s3.complete_multipart_upload().bucket(&broker.bucket).key(key).upload_id(&s3_id.0);
    complete.multipart_upload(parts).send().await.unwrap_or_else(|error| panic!("{error:?}"));
}

#[tokio::test]
async fn an_upload_survives_crashes_at_every_step() {
    let mut broker = TestBroker::start().await;
    let content = bytes(2 * PART_BYTES + 9, 1);
    let single = broker.open(b"hello", json!({"key": "k"})).await.expect(201);
    let parts = broker.open_multipart_with_hashes(&content, json!({"key": "k"})).await.expect(201);
    broker.crash(|_| {}).await;
    broker.put(&single.json["upload"], b"hello").await.expect(200);
    broker.put(&parts.json["parts"][0], &content[..PART_BYTES]).await.expect(200);
    broker.crash(|_| {}).await;
    assert_eq!(broker.upload(&single.id()).await.json["next"], "complete");
    assert_eq!(broker.upload(&parts.id()).await.json["missing_parts"], json!([[2, 3]]));
    broker.put(&parts.json["parts"][1], &content[PART_BYTES..2 * PART_BYTES]).await.expect(200);
    broker.put(&parts.json["parts"][2], &content[2 * PART_BYTES..]).await.expect(200);
    broker.crash(|_| {}).await;
    let first = broker.complete(&single.id()).await.expect(200);
    let second = broker.complete(&parts.id()).await.expect(200);
    broker.crash(|_| {}).await;
    assert_eq!(broker.complete(&single.id()).await.expect(200).json, first.json);
    assert_eq!(broker.complete(&parts.id()).await.expect(200).json, second.json);
    assert_eq!(broker.distinct_records().await.len(), 2);
    assert_eq!(broker.tenant_usage().await, (0, 0));
}

#[tokio::test]
async fn an_open_whose_response_was_lost_in_a_crash_can_be_repeated() {
    let mut broker = TestBroker::start().await;
    let content = bytes(PART_BYTES + 9, 2);
    let body = json!({"topic": broker.topic, "size": content.len(), "sha256": sha256(&content), "part_size": PART_BYTES});
    let open = async |broker: &TestBroker| {
        broker.send(broker.request("POST", "/lfs/uploads").header("idempotency-key", "one").json(&body)).await
    };
    let first = open(&broker).await.expect(201);
    // As if the broker was killed before it stored S3's upload id.
    let without_s3_id = sqlx::query("update upload_sessions set s3_upload_id = null");
    without_s3_id.execute(&broker.db).await.unwrap();
    broker.crash(|_| {}).await;
    let again = open(&broker).await.expect(200);
    assert_eq!(again.id(), first.id());
    broker.put_parts(&again.json["parts"], &content).await;
    broker.complete(&again.id()).await.expect(200);
    assert_eq!(broker.distinct_records().await.len(), 1);
    // The first multipart upload has no session, and it is aborted too.
    assert!(!broker.has_open_multipart(again.json["object_key"].as_str().unwrap()).await);
}

#[tokio::test]
async fn a_completion_of_a_dead_replica_is_taken_over_without_a_further_request() {
    let mut broker = TestBroker::start().await;
    let content = bytes(PART_BYTES + 9, 3);
    let hashed = json!({"part_size": PART_BYTES, "part_sha256": crate::harness::uploads::part_hashes(&content, PART_BYTES)});
    let single = broker.open_and_put(b"hello", json!({})).await;
    let not_joined = broker.open_and_put(&content, hashed.clone()).await;
    let joined = broker.open_and_put(&content, hashed.clone()).await;
    join_parts(&broker, &joined.json).await;
    let unhashed = broker.open_and_put(&content, json!({"part_size": PART_BYTES})).await;
    let all = [&single, &not_joined, &joined, &unhashed];
    for opened in all {
        broker.lease_to_dead_replica(&opened.id()).await;
    }
    broker.crash(|_| {}).await;
    for opened in all {
        assert_eq!(broker.upload(&opened.id()).await.state(), "completing", "its owner may still run");
    }
    broker.advance_clock(AFTER_LEASE);
    for opened in all {
        broker.wait_for_state(&opened.id(), "published").await;
    }
    assert_eq!(broker.distinct_records().await.len(), all.len());
    for opened in all {
        assert!(!broker.has_open_multipart(opened.json["object_key"].as_str().unwrap()).await);
    }
}

#[tokio::test]
async fn a_completion_of_a_dead_replica_without_bytes_is_open_again() {
    let broker = TestBroker::start().await;
    let content = bytes(PART_BYTES + 9, 4);
    let single = broker.open(b"hello", json!({})).await.expect(201);
    let parts = broker.open_multipart_with_hashes(&content, json!({})).await.expect(201);
    for opened in [&single, &parts] {
        broker.lease_to_dead_replica(&opened.id()).await;
    }
    broker.advance_clock(AFTER_LEASE);
    broker.complete(&single.id()).await.expect_problem(409, "object-missing");
    broker.complete(&parts.id()).await.expect_problem(409, "parts-incomplete");
    broker.put(&single.json["upload"], b"hello").await.expect(200);
    broker.put_parts(&parts.json["parts"], &content).await;
    broker.complete(&single.id()).await.expect(200);
    broker.complete(&parts.id()).await.expect(200);
    assert_eq!(broker.records(&broker.topic).await.len(), 2);
}

#[tokio::test]
async fn pointers_that_were_queued_before_two_crashes_are_published_once() {
    let mut broker = TestBroker::start_with(|settings| settings.broker.complete_wait = Duration::from_millis(300)).await;
    let mut ids = Vec::new();
    for number in 0..8 {
        ids.push(broker.open_and_put(b"hello", json!({"key": format!("k{}", number % 3)})).await.id());
    }
    let kafka = broker.settings.kafka.bootstrap_servers.clone();
    broker.crash(|settings| settings.kafka.bootstrap_servers = NO_SERVER.to_owned()).await;
    broker.log_outbox_inserts().await;
    for id in &ids {
        assert_eq!(broker.complete_until_verified(id).await.expect(202).state(), "verified");
    }
    broker.crash(|_| {}).await;
    broker.crash(|settings| settings.kafka.bootstrap_servers = kafka).await;
    for id in &ids {
        broker.wait_for_state(id, "published").await;
    }
    let records = broker.distinct_records().await;
    assert_eq!(records.len(), ids.len());
    TestBroker::assert_key_order(&records, &broker.outbox_numbers().await);
}

#[tokio::test]
async fn crashes_during_completions_lose_nothing() {
    let mut broker = TestBroker::start_with(|settings| settings.completion.lease = Duration::from_secs(3)).await;
    let mut ids = Vec::new();
    for number in 0..24 {
        ids.push(broker.open_and_put(b"hello", json!({"key": format!("k{}", number % 4)})).await.id());
    }
    for (round, ids) in ids.chunks(8).enumerate() {
        let requests: Vec<_> = ids
            .iter()
            .map(|id| tokio::spawn(broker.http.post(format!("{}/lfs/uploads/{id}/complete", broker.url())).send()))
            .collect();
        tokio::time::sleep(Duration::from_millis(5 + 15 * round as u64)).await;
        broker.crash(|_| {}).await;
        for requests in requests {
            drop(requests.await.unwrap());
        }
    }
    for id in &ids {
        broker.complete_with_retries(id).await;
    }
    let records = broker.distinct_records().await;
    let mut found: Vec<String> = records.iter().map(upload_id_of).collect();
    found.sort();
    ids.sort();
    assert_eq!(found, ids);
    assert_eq!(broker.tenant_usage().await, (0, 0));
}

#[tokio::test]
async fn a_killed_broker_publishes_again_when_the_short_lease_of_its_relay_has_expired() {
    let mut broker = TestBroker::start().await;
    broker.publish(b"first", json!({})).await;
    let opened = broker.open_and_put(b"second", json!({})).await;
    broker.crash(|_| {}).await;
    // The lease of a relay lasts 4 s, that of a completion 30 s. Complete answers 202 if it waits for Kafka longer than this.
    assert_eq!(broker.settings.broker.complete_wait, Duration::from_secs(20));
    broker.complete(&opened.id()).await.expect(200);
}

#[tokio::test]
async fn twenty_concurrent_completes_on_two_replicas_publish_once() {
    let broker = TestBroker::start().await;
    let replica = broker.replica().await;
    let content = bytes(PART_BYTES + 9, 5);
    for opened in
        [broker.open_and_put(b"hello", json!({})).await, broker.open_and_put(&content, json!({"part_size": PART_BYTES})).await]
    {
        let bases = [broker.url(), format!("http://{}", replica.address())];
        let completes = (0..20).map(|number| {
            let url = format!("{}/lfs/uploads/{}/complete", bases[number % 2], opened.id());
            broker.send(broker.http.post(url))
        });
        let responses = futures_util::future::join_all(completes).await;
        for response in &responses {
            assert_eq!((response.status, &response.json), (200, &responses[0].json), "{}", response.text);
        }
    }
    assert_eq!(broker.records(&broker.topic).await.len(), 2);
    replica.stop().await;
}
