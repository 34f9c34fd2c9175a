//! Operator requests: redrive a pointer, discard it, verify an object again, and read the statistics.

use std::time::Duration;

use lfs_broker_client::api::Redrive;
use serde_json::json;
use uuid::Uuid;

use crate::harness::tokens::token;
use crate::harness::uploads::{PART_BYTES, digest};
use crate::harness::{ApiResponse, TestBroker, bytes};

async fn start_with_short_wait() -> TestBroker {
    TestBroker::start_with(|settings| settings.broker.complete_wait = Duration::from_secs(1)).await
}

/// Completes an upload whose pointer Kafka refuses, because its partition does not exist.
async fn complete_refused(broker: &TestBroker, content: &[u8]) -> String {
    let opened = broker.open(content, json!({"partition": 2, "key": "k"})).await.expect(201);
    let id = opened.id();
    let missing_partition = sqlx::query("update upload_sessions set record_partition = 77 where id = $1");
    missing_partition.bind(id.parse::<Uuid>().unwrap()).execute(&broker.db).await.unwrap();
    broker.put(&opened.json["upload"], content).await.expect(200);
    assert_eq!(broker.complete_until_verified(&id).await.expect(202).state(), "verified");
    broker.eventually("the pointer is refused", || async { !broker.upload(&id).await.json["error"].is_null() }).await;
    id
}

async fn redrive(broker: &TestBroker, id: &str, body: &serde_json::Value) -> ApiResponse {
    broker.post(&format!("/lfs/uploads/{id}/redrive"), body).await
}

async fn reverify(broker: &TestBroker, id: &str) -> ApiResponse {
    broker.send(broker.request("POST", &format!("/lfs/uploads/{id}/reverify"))).await
}

#[tokio::test]
async fn a_pointer_for_a_missing_partition_is_redriven_to_another_partition() {
    let broker = start_with_short_wait().await;
    let id = complete_refused(&broker, b"hello").await;
    // A redrive that keeps the partition is refused again.
    let attempts = || async { sqlx::query_scalar::<_, i32>("select attempts from outbox").fetch_one(&broker.db).await.unwrap() };
    let before = attempts().await;
    let again = broker.send(broker.request("POST", &format!("/lfs/uploads/{id}/redrive"))).await.expect(200);
    assert_eq!((again.id(), again.state()), (id.clone(), "verified"));
    // A redrive resets the number of attempts.
    broker.eventually("the pointer is sent again", || async { attempts().await != before }).await;
    broker.eventually("the pointer is refused again", || async { !broker.upload(&id).await.json["error"].is_null() }).await;
    assert!(broker.records(&broker.topic).await.is_empty());

    let cleared = redrive(&broker, &id, &json!({"clear_partition": true})).await.expect(200);
    assert!(["verified", "published"].contains(&cleared.state()), "{}", cleared.text);
    let published = broker.wait_for_state(&id, "published").await;
    assert!(published.json["error"].is_null(), "{}", published.text);
    let records = broker.records(&broker.topic).await;
    assert_eq!(records.len(), 1);
    assert_eq!(json!(records[0].partition), published.json["record"]["partition"]);
    let history = broker.get(&format!("/lfs/uploads/{id}/history")).await.expect(200);
    let reasons: Vec<&str> =
        history.json["items"].as_array().unwrap().iter().filter_map(|item| item["reason"].as_str()).collect();
    assert!(reasons.contains(&"redrive was asked for"), "{reasons:?}");
    assert!(reasons.contains(&"redrive to any partition was asked for"), "{reasons:?}");

    let same = redrive(&broker, &id, &json!({"clear_partition": true})).await.expect(200);
    assert_eq!(same.json["version"], published.json["version"]);
}

#[tokio::test]
async fn a_pointer_behind_a_refused_one_of_its_key_follows_it_after_a_redrive() {
    let broker = start_with_short_wait().await;
    let first = complete_refused(&broker, b"first").await;
    let opened = broker.open(b"second", json!({"key": "k"})).await.expect(201);
    broker.put(&opened.json["upload"], b"second").await.expect(200);
    assert_eq!(broker.complete_until_verified(&opened.id()).await.expect(202).state(), "verified");
    broker.client().redrive(first.parse().unwrap(), &Redrive { clear_partition: true }).await.unwrap();
    let (first, second) =
        (broker.wait_for_state(&first, "published").await, broker.wait_for_state(&opened.id(), "published").await);
    assert_eq!(first.json["record"]["partition"], second.json["record"]["partition"]);
    assert!(first.json["record"]["offset"].as_i64() < second.json["record"]["offset"].as_i64());
}

#[tokio::test]
async fn a_discarded_upload_no_longer_blocks_its_key() {
    let broker = start_with_short_wait().await;
    let id = complete_refused(&broker, b"hello").await;
    let behind = broker.open(b"behind", json!({"key": "k"})).await.expect(201);
    broker.put(&behind.json["upload"], b"behind").await.expect(200);
    broker.complete_until_verified(&behind.id()).await.expect(202);
    let reason = broker.upload(&id).await.json["error"]["detail"].clone();

    let discarded = broker.send(broker.request("POST", &format!("/lfs/uploads/{id}/discard"))).await.expect(200);
    assert_eq!((discarded.state(), discarded.json["error"]["code"].as_str()), ("rejected", Some("unpublishable")));
    assert_eq!(discarded.json["error"]["detail"], reason, "Kafka's last error");
    assert!(reason.as_str().unwrap().contains("none with number 77"), "{reason}");
    broker.wait_for_state(&behind.id(), "published").await;
    for _ in 0..2 {
        let response = broker.complete(&id).await.expect_problem(422, "unpublishable");
        assert_eq!((response.json["detail"].clone(), response.json["upload_state"].as_str()), (reason.clone(), Some("rejected")));
    }
    broker.client().discard(id.parse().unwrap()).await.unwrap_err();
    let again = broker.send(broker.request("POST", &format!("/lfs/uploads/{id}/discard"))).await;
    assert_eq!(again.expect_problem(409, "state-conflict").json["upload_state"], "rejected");
    let key = discarded.json["object_key"].as_str().unwrap().to_owned();
    let missing_partition = || async { broker.s3.head_object().bucket(&broker.bucket).key(&key).send().await.is_err() };
    broker.eventually("the object is removed", missing_partition).await;
    let history = broker.get(&format!("/lfs/uploads/{id}/history")).await.expect(200);
    let last = history.json["items"].as_array().unwrap().last().unwrap().clone();
    assert_eq!((last["from"].as_str(), last["to"].as_str()), (Some("verified"), Some("rejected")));
    assert!(last["by"].as_str().unwrap().starts_with("client:"), "{last}");
    assert_eq!(broker.records(&broker.topic).await.len(), 1);
    assert_eq!(broker.client().stats().await.unwrap().uploads["rejected"], 1);
}

#[tokio::test]
async fn only_a_pointer_that_kafka_has_refused_can_be_discarded() {
    let broker = start_with_short_wait().await;
    let open = broker.open(b"hello", json!({})).await.expect(201).id();
    let published = broker.open_and_put(b"hello", json!({})).await.id();
    broker.complete(&published).await;
    broker.wait_for_state(&published, "published").await;
    // This pointer waits behind a refused one of its key, but was not refused itself.
    let first = complete_refused(&broker, b"first").await;
    let behind = broker.open(b"behind", json!({"key": "k"})).await.expect(201);
    broker.put(&behind.json["upload"], b"behind").await.expect(200);
    broker.complete_until_verified(&behind.id()).await.expect(202);
    // The refused pointer is being sent again at this moment.
    sqlx::query("update outbox set batch = 77 where error is not null").execute(&broker.db).await.unwrap();
    for (id, state) in [(open, "open"), (published, "published"), (behind.id(), "verified"), (first, "verified")] {
        let refused = broker.send(broker.request("POST", &format!("/lfs/uploads/{id}/discard"))).await;
        assert_eq!(refused.expect_problem(409, "state-conflict").json["upload_state"], state);
        assert_eq!(broker.upload(&id).await.state(), state);
    }
}

#[tokio::test]
async fn only_a_verified_or_published_upload_can_be_redriven_or_reverified() {
    let broker = TestBroker::start().await;
    let open = broker.open(b"hello", json!({})).await.expect(201).id();
    let aborted = broker.open(b"hello", json!({})).await.expect(201).id();
    broker.delete(&format!("/lfs/uploads/{aborted}")).await.expect(204);
    for (id, state) in [(open, "open"), (aborted, "aborted")] {
        let refused = redrive(&broker, &id, &json!({})).await.expect_problem(409, "state-conflict");
        assert_eq!(refused.json["upload_state"], state);
        reverify(&broker, &id).await.expect_problem(409, "state-conflict");
    }
    let unknown = Uuid::now_v7().to_string();
    redrive(&broker, &unknown, &json!({})).await.expect_problem(404, "upload-not-found");
    reverify(&broker, &unknown).await.expect_problem(404, "upload-not-found");
    redrive(&broker, &unknown, &json!({"clear": true})).await.expect_problem(422, "validation-failed");
}

#[tokio::test]
async fn reverify_compares_the_object_with_its_session_again() {
    let broker = TestBroker::start().await;
    let mut uploads = Vec::new();
    for content in [b"sound", b"other", b"empty", b"alien"] {
        let id = broker.publish(content, json!({})).await.id();
        let key = broker.upload(&id).await.json["object_key"].as_str().unwrap().to_owned();
        let valid = reverify(&broker, &id).await.expect(200);
        assert_eq!(valid.json, json!({"valid": true, "size": 5, "integrity": "sha256"}));
        uploads.push((id, key));
    }
    broker.put_object(&uploads[1].1, b"other than it was", Some(&uploads[1].0)).await;
    reverify(&broker, &uploads[1].0).await.expect_problem(422, "size-mismatch");
    broker.s3.delete_object().bucket(&broker.bucket).key(&uploads[2].1).send().await.unwrap();
    reverify(&broker, &uploads[2].0).await.expect_problem(410, "object-gone");
    broker.put_object(&uploads[3].1, b"alien", Some("somebody")).await;
    reverify(&broker, &uploads[3].0).await.expect_problem(422, "object-foreign");
    let valid = broker.client().reverify(uploads[0].0.parse().unwrap()).await.unwrap();
    assert_eq!((valid.valid, valid.size), (true, 5));
}

#[tokio::test]
async fn bytes_replaced_under_the_write_token_are_not_reported_as_verified() {
    let broker = TestBroker::start().await;
    let policy = json!({"checksums": ["sha256", "crc32"], "min_integrity": "checksum"});
    broker.put_policy(&broker.topic, &policy).await.expect(200);
    let crc32 = json!({"sha256": null, "checksum_alg": "crc32", "checksum": digest("crc32", b"hello")});
    for declared in [json!({}), crc32] {
        let id = broker.publish(b"hello", declared).await.id();
        let key = broker.upload(&id).await.json["object_key"].as_str().unwrap().to_owned();
        broker.put_object(&key, b"olleh", Some(&id)).await;
        let refused = reverify(&broker, &id).await.expect_problem(422, "checksum-mismatch");
        assert!(refused.json["detail"].as_str().unwrap().starts_with("declared "), "{}", refused.text);
    }

    let content = bytes(PART_BYTES + 7, 3);
    let opened = broker.open_multipart_with_hashes(&content, json!({})).await.expect(201);
    broker.put_parts(&opened.json["parts"], &content).await;
    let done = broker.complete_and_wait(&opened.id(), json!({})).await;
    assert_eq!(done.json["integrity"], "parts-sha256");
    reverify(&broker, &opened.id()).await.expect(200);
    broker.put_object(opened.json["object_key"].as_str().unwrap(), &bytes(PART_BYTES + 7, 4), Some(&opened.id())).await;
    reverify(&broker, &opened.id()).await.expect_problem(422, "checksum-mismatch");
}

#[tokio::test]
async fn the_statistics_match_the_uploads() {
    let broker = start_with_short_wait().await;
    let fresh = broker.client().stats().await.unwrap();
    assert_eq!(fresh.uploads.len(), 7);
    assert_eq!((fresh.uploads.values().sum::<u64>(), fresh.oldest_verified_seconds), (0, None));
    let refused_id = complete_refused(&broker, b"parked").await;
    // This pointer waits behind the refused one of its key.
    let behind = broker.open(b"behind", json!({"key": "k"})).await.expect(201);
    broker.put(&behind.json["upload"], b"behind").await.expect(200);
    broker.complete_until_verified(&behind.id()).await.expect(202);
    broker.publish(b"through", json!({"key": "another"})).await;
    broker.open(b"open", json!({})).await.expect(201);
    // The states are counted before a redrive changes them.
    let stats = broker.get("/lfs/stats").await.expect(200).json;
    let uploads = json!({"open": 1, "completing": 0, "verified": 2, "published": 1, "aborted": 0, "expired": 0, "rejected": 0});
    assert_eq!(stats["uploads"], uploads);
    assert_eq!(stats["outbox"]["waiting"].as_u64().unwrap() + stats["outbox"]["parked"].as_u64().unwrap(), 2);
    assert!(stats["oldest_verified_seconds"].as_u64().unwrap() < 60);
    broker.advance_clock(Duration::from_secs(1000));
    let later = broker.client().stats().await.unwrap();
    assert!(later.oldest_verified_seconds.unwrap() >= 1000);
    assert!(later.dependencies.database.ok && later.dependencies.storage.ok && later.dependencies.kafka.ok);
    redrive(&broker, &refused_id, &json!({"clear_partition": true})).await.expect(200);
    broker.wait_for_state(&behind.id(), "published").await;
    let outbox = broker.client().stats().await.unwrap().outbox;
    assert_eq!((outbox.waiting, outbox.parked), (0, 0));
}

#[tokio::test]
async fn operator_requests_need_the_admin_scope() {
    let broker = TestBroker::start_with_tokens(|_| {}).await;
    let id = Uuid::now_v7();
    for (method, path) in [
        ("POST", format!("/lfs/uploads/{id}/redrive")),
        ("POST", format!("/lfs/uploads/{id}/reverify")),
        ("GET", "/lfs/stats".into()),
    ] {
        broker.send(broker.request(method, &path)).await.expect_problem(401, "unauthenticated");
        let user = broker.request(method, &path).bearer_auth(token("acme", "lfs:read lfs:write", &["*"]));
        broker.send(user).await.expect_problem(403, "insufficient-scope");
        let admin = broker.send(broker.request(method, &path).bearer_auth(token("acme", "lfs:admin", &["*"]))).await;
        assert_eq!(admin.status, if method == "GET" { 200 } else { 404 }, "{}", admin.text);
    }
}
