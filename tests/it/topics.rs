//! Topic policies: stored whole, deleted, listed, and applied to every open.

use serde_json::{Value, json};

use crate::harness::{TestBroker, bytes};

fn defaults() -> Value {
    json!({"enabled": true, "min_bytes": 8_388_608, "max_bytes": 5_497_558_138_880_u64, "bucket": null, "prefix": null,
        "checksums": ["sha256"], "min_integrity": "parts-sha256", "content_types": ["*/*"], "session_seconds": 3600,
        "session_max_seconds": 86_400, "url_seconds": 900, "kms_key_id": null, "retention": "keep"})
}

fn topic(broker: &TestBroker, name: &str) -> String {
    format!("/lfs/topics/{name}-{}", broker.topic)
}

#[tokio::test]
async fn an_absent_member_gets_its_default_and_a_put_replaces_the_whole_policy() {
    let broker = TestBroker::start().await;
    let path = format!("/lfs/topics/{}", broker.topic);
    assert_eq!(broker.put_policy(&broker.topic, &json!({})).await.expect(200).json, defaults());
    assert_eq!(broker.get(&path).await.expect(200).json, defaults());
    let mut changed = defaults();
    changed["max_bytes"] = json!(10);
    changed["prefix"] = json!("a/b");
    assert_eq!(broker.put_policy(&broker.topic, &json!({"max_bytes": 10, "prefix": "a/b"})).await.expect(200).json, changed);
    assert_eq!(broker.get(&path).await.expect(200).json, changed);
    let disabled = broker.put_policy(&broker.topic, &json!({"enabled": false})).await.expect(200).json;
    assert_eq!((&disabled["max_bytes"], &disabled["prefix"]), (&defaults()["max_bytes"], &Value::Null));
    assert_eq!(broker.put_policy(&broker.topic, &changed).await.expect(200).json, changed);
}

#[tokio::test]
async fn the_defaults_come_from_the_brokers_settings() {
    let broker = TestBroker::start_with(|settings| {
        settings.policy.session_seconds = 60;
        settings.policy.url_seconds = 5;
    })
    .await;
    let stored = broker.put_policy(&broker.topic, &json!({})).await.expect(200).json;
    assert_eq!((&stored["session_seconds"], &stored["url_seconds"]), (&json!(60), &json!(5)));
}

#[tokio::test]
async fn an_invalid_policy_is_refused_and_changes_nothing() {
    let broker = TestBroker::start().await;
    broker.put_policy(&broker.topic, &json!({"max_bytes": 7})).await.expect(200);
    for (policy, pointer) in [
        (json!({"enable": true}), "/enable"),
        (json!({"enabled": "yes"}), "/enabled"),
        (json!({"enabled": null}), "/enabled"),
        (json!({"max_bytes": -1}), "/max_bytes"),
        (json!({"max_bytes": (5u64 << 40) + 1}), "/max_bytes"),
        (json!({"checksums": []}), "/checksums"),
        (json!({"checksums": ["sha1"]}), "/checksums/0"),
        (json!({"checksums": ["crc32"]}), "/min_integrity"),
        (json!({"min_integrity": "best"}), "/min_integrity"),
        (json!({"content_types": ["video"]}), "/content_types"),
        (json!({"session_seconds": 0}), "/session_seconds"),
        (json!({"session_max_seconds": 0}), "/session_max_seconds"),
        (json!({"url_seconds": 0}), "/url_seconds"),
        (json!({"url_seconds": 604_801}), "/url_seconds"),
        (json!({"bucket": "No"}), "/bucket"),
        (json!({"prefix": "/a"}), "/prefix"),
        (json!({"prefix": "a/../b"}), "/prefix"),
        (json!({"kms_key_id": ""}), "/kms_key_id"),
        (json!({"retention": "delete"}), "/retention"),
        (json!([]), ""),
    ] {
        let response = broker.put_policy(&broker.topic, &policy).await.expect_problem(422, "validation-failed");
        assert_eq!(response.json["errors"][0]["pointer"], pointer, "{policy}: {}", response.text);
    }
    broker.put_policy("a%20b", &json!({})).await.expect_problem(422, "validation-failed");
    broker.put_policy("a%2Fb", &json!({})).await.expect_problem(422, "validation-failed");
    broker.put_policy(&"t".repeat(250), &json!({})).await.expect_problem(422, "validation-failed");
    assert_eq!(broker.get(&format!("/lfs/topics/{}", broker.topic)).await.json["max_bytes"], 7);
}

#[tokio::test]
async fn a_policy_that_is_not_stored_is_not_found_and_can_be_deleted_without_an_error() {
    let broker = TestBroker::start().await;
    let path = topic(&broker, "some");
    broker.get(&path).await.expect_problem(404, "topic-not-found");
    broker.delete(&path).await.expect(204);
    broker.send_json("PUT", &path, "{}").await.expect(200);
    broker.get(&path).await.expect(200);
    broker.delete(&path).await.expect(204);
    broker.delete(&path).await.expect(204);
    broker.get(&path).await.expect_problem(404, "topic-not-found");
}

#[tokio::test]
async fn policies_are_listed_by_name_in_pages() {
    let broker = TestBroker::start().await;
    assert_eq!(broker.get("/lfs/topics").await.expect(200).json, json!({"items": [], "next_cursor": null}));
    for name in ["c", "a", "e", "b", "d"] {
        broker.put_policy(name, &json!({"max_bytes": 1})).await.expect(200);
    }
    let mut expected = defaults();
    expected["max_bytes"] = json!(1);
    let (mut path, mut topics) = ("/lfs/topics?limit=2".to_owned(), Vec::new());
    for _ in 0..3 {
        let page = broker.get(&path).await.expect(200).json;
        for item in page["items"].as_array().unwrap() {
            assert_eq!(item, &json!({"topic": item["topic"], "policy": expected}));
            topics.push(item["topic"].as_str().unwrap().to_owned());
        }
        path = format!("/lfs/topics?limit=2&cursor={}", page["next_cursor"].as_str().unwrap_or("the end"));
    }
    assert_eq!(topics, ["a", "b", "c", "d", "e"]);
    assert!(path.ends_with("the end"));
    for bad in ["limit=0", "limit=201", "cursor=%25", "topic=a"] {
        broker.get(&format!("/lfs/topics?{bad}")).await.expect_problem(422, "validation-failed");
    }
}

#[tokio::test]
async fn a_topic_must_be_enabled_and_then_is_enabled_at_once_on_every_replica() {
    let mut broker = TestBroker::start_with(|settings| settings.policy.default_enabled = false).await;
    let other = broker.replica().await;
    broker.open(b"x", json!({})).await.expect_problem(403, "topic-not-enabled");
    let put = broker.http.put(format!("http://{}/lfs/topics/{}", other.address(), broker.topic)).json(&json!({}));
    broker.send(put).await.expect(200);
    broker.publish(b"x", json!({})).await;
    broker.restart(|_| {}).await;
    broker.open(b"x", json!({})).await.expect(201);
    broker.delete(&format!("/lfs/topics/{}", broker.topic)).await.expect(204);
    broker.open(b"x", json!({})).await.expect_problem(403, "topic-not-enabled");
    other.stop().await;
}

#[tokio::test]
async fn a_policy_that_another_replica_changes_or_deletes_applies_to_the_next_open() {
    let broker = TestBroker::start().await;
    let replica = broker.replica().await;
    let body = json!({"topic": broker.topic, "size": 5, "sha256": crate::harness::sha256(b"hello")});
    let open_through_replica = async || {
        let url = format!("http://{}/lfs/uploads", replica.address());
        broker.send(broker.http.post(url).json(&body)).await
    };
    // The replica remembers a policy from its last open, also that there is none.
    for round in 0..2 {
        broker.put_policy(&broker.topic, &json!({"url_seconds": 100 + round})).await.expect(200);
        let opened = open_through_replica().await.expect(201);
        assert_eq!(opened.json["upload"]["expires_in"], 100 + round);
        broker.put_policy(&broker.topic, &json!({"max_bytes": 4})).await.expect(200);
        open_through_replica().await.expect_problem(422, "object-too-large");
        broker.put_policy(&broker.topic, &json!({"prefix": "b"})).await.expect(200);
        let opened = open_through_replica().await.expect(201);
        assert!(opened.json["object_key"].as_str().unwrap().starts_with("b/"), "{}", opened.text);
        broker.delete(&format!("/lfs/topics/{}", broker.topic)).await.expect(204);
        let opened = open_through_replica().await.expect(201);
        assert!(!opened.json["object_key"].as_str().unwrap().starts_with("b/"), "{}", opened.text);
    }
    replica.stop().await;
}

#[tokio::test]
async fn many_opens_of_one_tenant_together_keep_each_tenants_quota_exactly() {
    let broker = TestBroker::start_with(|settings| settings.broker.quota.open_sessions = 20).await;
    let opened = futures_util::future::join_all((0..60).map(|_| broker.open(b"hello", json!({})))).await;
    let count = |status: u16| opened.iter().filter(|response| response.status == status).count();
    assert_eq!((count(201), count(429)), (20, 40));
    assert_eq!(broker.tenant_usage().await, (20, 100));
    let ids: std::collections::HashSet<String> =
        opened.iter().filter(|response| response.status == 201).map(|response| response.id()).collect();
    assert_eq!(ids.len(), 20);
}

#[tokio::test]
async fn size_content_type_and_checksum_are_checked_against_the_policy() {
    let broker = TestBroker::start().await;
    let policy = json!({"max_bytes": 5, "content_types": ["image/*", "Text/plain"], "checksums": ["sha256", "crc32"], "min_integrity": "checksum"});
    broker.put_policy(&broker.topic, &policy).await.expect(200);
    let image = |more: Value| {
        let mut whole = json!({"content_type": "image/png"});
        whole.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        broker.open(b"hello", whole)
    };
    image(json!({})).await.expect(201);
    broker.open(b"hello!", json!({"content_type": "image/png"})).await.expect_problem(422, "object-too-large");
    for allowed in ["text/plain; charset=utf-8", "TEXT/PLAIN", "IMAGE/jpeg"] {
        broker.open(b"hello", json!({"content_type": allowed})).await.expect(201);
    }
    for refused in [json!("text/html"), json!("imagery/png"), Value::Null] {
        broker.open(b"hello", json!({"content_type": refused})).await.expect_problem(422, "content-type-not-allowed");
    }
    image(json!({"sha256": null, "checksum_alg": "crc32", "checksum": "3610a686"})).await.expect(201);
    let md5 = json!({"sha256": null, "checksum_alg": "md5", "checksum": "5d41402abc4b2a76b9719d911017c592"});
    image(md5).await.expect_problem(422, "checksum-not-allowed");
    image(json!({"sha256": null, "checksum_alg": "none"})).await.expect_problem(422, "checksum-not-allowed");
}

#[tokio::test]
async fn a_checksum_that_cannot_reach_the_minimum_integrity_is_not_allowed() {
    let broker = TestBroker::start().await;
    let policy = json!({"checksums": ["sha256", "crc32", "md5"], "min_integrity": "sha256"});
    broker.put_policy(&broker.topic, &policy).await.expect(200);
    let weak = json!({"sha256": null, "checksum_alg": "crc32", "checksum": "3610a686"});
    broker.open(b"hello", weak).await.expect_problem(422, "checksum-not-allowed");
    broker.put_policy(&broker.topic, &json!({"checksums": ["md5"], "min_integrity": "checksum"})).await.expect(200);
    let md5 =
        json!({"sha256": null, "checksum_alg": "md5", "checksum": "5d41402abc4b2a76b9719d911017c592", "part_size": 5 << 20});
    broker.open(&bytes(6 << 20, 1), md5).await.expect_problem(422, "checksum-not-allowed");
}

#[tokio::test]
async fn bucket_prefix_encryption_key_and_lifetimes_come_from_the_policy() {
    let broker = TestBroker::start().await;
    let bucket = format!("{}-b", broker.bucket);
    broker.s3.create_bucket().bucket(&bucket).send().await.unwrap();
    let policy =
        json!({"bucket": bucket, "prefix": "some/where", "session_seconds": 50, "session_max_seconds": 60, "url_seconds": 40});
    broker.put_policy(&broker.topic, &policy).await.expect(200);
    let opened = broker.open(b"hello", json!({})).await.expect(201);
    assert_eq!(opened.json["bucket"], bucket);
    assert!(opened.json["object_key"].as_str().unwrap().starts_with(&format!("some/where/default/{}/lfs/", broker.topic)));
    assert!((45..=50).contains(&opened.json["expires_in"].as_u64().unwrap()));
    assert!((30..=40).contains(&opened.json["upload"]["expires_in"].as_u64().unwrap()));
    broker.put(&opened.json["upload"], b"hello").await.expect(200);
    let done = broker.complete(&opened.id()).await.expect(200);
    assert_eq!(done.json["pointer"]["bucket"], bucket);
    broker.post("/lfs/resolve", &done.json["pointer"]).await;

    broker.put_policy(&broker.topic, &json!({"kms_key_id": "alias/lfs"})).await.expect(200);
    let signed = broker.open(b"hello", json!({})).await.expect(201).json["upload"]["headers"].clone();
    assert_eq!(signed["x-amz-server-side-encryption"], "aws:kms");
    assert_eq!(signed["x-amz-server-side-encryption-aws-kms-key-id"], "alias/lfs");
}

#[tokio::test]
async fn a_session_keeps_the_limits_of_its_open() {
    let broker = TestBroker::start().await;
    let policy = json!({"session_seconds": 100, "session_max_seconds": 1000, "url_seconds": 50});
    broker.put_policy(&broker.topic, &policy).await.expect(200);
    let content = bytes(6 << 20, 1);
    let opened = broker.open(&content, json!({"part_size": 5 << 20, "content_type": "image/png"})).await.expect(201);
    let tight = json!({"enabled": false, "max_bytes": 1, "content_types": ["a/b"], "session_seconds": 1, "session_max_seconds": 1,
        "url_seconds": 1, "bucket": "elsewhere", "min_integrity": "sha256"});
    broker.put_policy(&broker.topic, &tight).await.expect(200);
    broker.open(b"x", json!({})).await.expect_problem(403, "topic-not-enabled");
    let signed = broker.post(&format!("/lfs/uploads/{}/parts", opened.id()), &json!({"part_numbers": [1, 2]})).await.expect(200);
    assert!(signed.json["parts"][0]["expires_in"].as_u64().unwrap() > 30);
    broker.put_parts(&signed.json["parts"], &content).await;
    assert!(broker.upload(&opened.id()).await.json["expires_in"].as_u64().unwrap() > 90);
    broker.complete(&opened.id()).await;
    assert_eq!(broker.wait_for_state(&opened.id(), "published").await.json["pointer"]["bucket"], broker.bucket);
}

#[tokio::test]
async fn internal_topics_of_kafka_and_the_broker_take_no_uploads_and_no_policy() {
    let broker = TestBroker::start().await;
    for topic in ["lfs-broker-markers", "__consumer_offsets", "__transaction_state", "__anything"] {
        let opened = broker.open(b"hello", json!({"topic": topic})).await.expect_problem(403, "topic-forbidden");
        assert!(opened.json["detail"].as_str().unwrap().contains(topic), "{}", opened.text);
        broker.put_policy(topic, &json!({})).await.expect_problem(403, "topic-forbidden");
        broker.get(&format!("/lfs/topics/{topic}")).await.expect_problem(404, "topic-not-found");
    }
}
