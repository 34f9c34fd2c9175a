//! Multipart uploads: with hashes at open, with deferred hashes, and without.

use serde_json::{Value, json};

use crate::harness::faults::retry_while_unavailable;
use crate::harness::uploads::{PART_BYTES, part_hashes};
use crate::harness::{TestBroker, bytes, sha256};

/// The size of an upload with three parts, of which the last is smaller.
const SIZE: usize = 12 << 20;

fn numbers(parts: &Value) -> Vec<u64> {
    parts.as_array().expect("parts").iter().map(|part| part["part_number"].as_u64().unwrap()).collect()
}

fn object_key(opened: &Value) -> &str {
    opened["object_key"].as_str().expect("an object key")
}

#[tokio::test]
async fn parts_with_hashes_at_open_are_verified_by_s3_without_reading_them_back() {
    let broker = TestBroker::start().await;
    let content = bytes(SIZE, 1);
    let opened = broker.open_multipart_with_hashes(&content, json!({"key": "k"})).await.expect(201);
    assert_eq!(opened.json["mode"], "multipart");
    assert_eq!((opened.json["part_size"].as_u64(), opened.json["part_count"].as_u64()), (Some(PART_BYTES as u64), Some(3)));
    assert_eq!(numbers(&opened.json["parts"]), [1, 2, 3]);
    assert_eq!(opened.json["parts"][2]["size"], SIZE - 2 * PART_BYTES);
    broker.put_parts(&opened.json["parts"], &content).await;
    let done = broker.complete(&opened.id()).await.expect(200);
    assert_eq!(done.json["integrity"], "parts-sha256");
    let (record, downloaded) = broker.only_record().await;
    assert_eq!((record.json(), record.header("lfs-integrity")), (done.json["pointer"].clone(), Some("parts-sha256")));
    assert_eq!(record.json()["sha256"], sha256(&content));
    assert!(downloaded == content);
    assert!(!broker.has_open_multipart(object_key(&opened.json)).await);
}

#[tokio::test]
async fn deferred_part_hashes_come_with_each_call_for_urls() {
    let broker = TestBroker::start().await;
    let content = bytes(SIZE, 2);
    let opened = broker.open_multipart(&content, json!({"part_hashes": "deferred"})).await.expect(201);
    let id = opened.id();
    assert_eq!(opened.json["parts"], json!([]));
    let hashes = part_hashes(&content, PART_BYTES);
    broker.presign_parts(&id, json!({"part_numbers": [1]})).await.expect_problem(422, "validation-failed");
    for (index, hash) in hashes.iter().enumerate() {
        let signed = broker.presign_parts(&id, json!({"parts": [{"part_number": index + 1, "sha256": hash}]})).await.expect(200);
        broker.put_parts(&signed.json["parts"], &content).await;
    }
    // The declared hash of a part cannot be changed after its URL was presigned.
    let other = json!({"parts": [{"part_number": 1, "sha256": sha256(b"other")}]});
    broker.presign_parts(&id, other).await.expect_problem(409, "state-conflict");
    let done = broker.complete(&id).await.expect(200);
    assert_eq!(done.json["integrity"], "parts-sha256");
    assert!(broker.only_record().await.1 == content);
}

#[tokio::test]
async fn parts_without_hashes_are_read_back_before_the_pointer_is_published() {
    let broker = TestBroker::start_with(|settings| settings.broker.complete_wait = std::time::Duration::ZERO).await;
    let content = bytes(SIZE, 3);
    let opened = broker.open_multipart(&content, json!({})).await.expect(201);
    broker.put_parts(&opened.json["parts"], &content).await;
    let response = retry_while_unavailable(async || broker.complete(&opened.id()).await).await.expect(202);
    assert!(response.headers.contains_key("retry-after"));
    assert!(["completing", "verified"].contains(&response.state()), "{}", response.text);
    assert_eq!(response.json.get("pointer").is_some(), response.state() == "verified");
    let published = broker.wait_for_state(&opened.id(), "published").await;
    assert_eq!(published.json["integrity"], "sha256");
    broker.complete(&opened.id()).await.expect(200);
    let (record, downloaded) = broker.only_record().await;
    assert_eq!(record.header("lfs-integrity"), Some("sha256"));
    assert!(downloaded == content);
}

#[tokio::test]
async fn five_parts_and_a_byte_are_downloaded_unchanged_with_the_pointer_from_kafka() {
    let broker = TestBroker::start().await;
    let content = bytes(41_943_041, 4);
    let more = json!({"part_size": 8 << 20, "part_sha256": part_hashes(&content, 8 << 20)});
    let opened = broker.open(&content, more).await.expect(201);
    assert_eq!(opened.json["part_count"], 6);
    assert_eq!(opened.json["parts"][5]["size"], 1);
    broker.put_parts(&opened.json["parts"], &content).await;
    broker.complete(&opened.id()).await.expect(200);
    let (record, downloaded) = broker.only_record().await;
    assert_eq!((downloaded.len(), sha256(&downloaded)), (content.len(), sha256(&content)));
    assert_eq!(record.json()["sha256"], sha256(&downloaded));
}

#[tokio::test]
async fn a_part_can_be_replaced_until_complete_and_the_last_put_counts() {
    let broker = TestBroker::start().await;
    let content = bytes(SIZE, 5);
    let opened = broker.open_multipart(&content, json!({})).await.expect(201);
    // Without a part hash S3 accepts any bytes of the right size.
    let second = &opened.json["parts"][1];
    broker.put(second, &bytes(PART_BYTES, 99)).await.expect(200);
    broker.put_parts(&opened.json["parts"], &content).await;
    let signed = broker.presign_parts(&opened.id(), json!({"part_numbers": [1]})).await.expect(200);
    broker.put_parts(&signed.json["parts"], &content).await;
    let published = broker.complete_and_wait(&opened.id(), json!({})).await;
    assert_eq!(published.json["integrity"], "sha256");
    assert!(broker.only_record().await.1 == content);
}

#[tokio::test]
async fn part_urls_are_presigned_again_on_demand_and_extend_the_session() {
    let broker = TestBroker::start().await;
    let content = bytes(SIZE, 6);
    let opened = broker.open_multipart_with_hashes(&content, json!({})).await.expect(201);
    broker.advance_clock(std::time::Duration::from_secs(3000));
    let signed = broker.presign_parts(&opened.id(), json!({"part_numbers": [3, 1]})).await.expect(200);
    assert_eq!(numbers(&signed.json["parts"]), [3, 1]);
    let (first, third) = (&signed.json["parts"][1], &signed.json["parts"][0]);
    assert_eq!(first["headers"], opened.json["parts"][0]["headers"]);
    assert_eq!(
        (third["offset"].as_u64(), third["size"].as_u64()),
        (Some(2 * PART_BYTES as u64), Some((SIZE - 2 * PART_BYTES) as u64))
    );
    broker.put_parts(&signed.json["parts"], &content).await;
    let read = broker.upload(&opened.id()).await.expect(200);
    assert!(read.json["expires_in"].as_u64().unwrap() > 3000, "{}", read.text);
    assert_eq!((read.json["next"].as_str(), &read.json["missing_parts"]), (Some("parts"), &json!([[2, 2]])));
    broker.put(&opened.json["parts"][1], &content[PART_BYTES..2 * PART_BYTES]).await.expect(200);
    broker.complete(&opened.id()).await.expect(200);
}

#[tokio::test]
async fn missing_parts_are_named_and_the_upload_stays_open() {
    let broker = TestBroker::start().await;
    let content = bytes(SIZE, 7);
    for has_hashes in [true, false] {
        let opened = match has_hashes {
            true => broker.open_multipart_with_hashes(&content, json!({})).await.expect(201),
            false => broker.open_multipart(&content, json!({})).await.expect(201),
        };
        let id = opened.id();
        let none = broker.complete(&id).await.expect_problem(409, "parts-incomplete");
        assert_eq!(none.json["errors"].as_array().unwrap().len(), 3);
        broker.put(&opened.json["parts"][1], &content[PART_BYTES..2 * PART_BYTES]).await.expect(200);
        let some = broker.complete(&id).await.expect_problem(409, "parts-incomplete");
        let named: Vec<&str> = some.json["errors"].as_array().unwrap().iter().filter_map(|e| e["pointer"].as_str()).collect();
        assert_eq!(named, ["/parts/0", "/parts/2"]);
        assert_eq!((some.json["upload_state"].as_str(), some.json["retryable"].as_bool()), (Some("open"), Some(true)));
        let read = broker.upload(&id).await.expect(200);
        assert_eq!((read.state(), &read.json["missing_parts"]), ("open", &json!([[1, 1], [3, 3]])));
        assert_eq!(read.json["uploaded_parts"], json!([{"part_number": 2, "size": PART_BYTES}]));

        broker.put_parts(&opened.json["parts"], &content).await;
        assert_eq!(broker.upload(&id).await.json["next"], "complete");
        broker.complete_and_wait(&id, json!({})).await;
    }
    assert_eq!(broker.records(&broker.topic).await.len(), 2);
}

#[tokio::test]
async fn wrong_bytes_for_a_hashed_part_are_refused_by_s3() {
    let broker = TestBroker::start().await;
    let content = bytes(SIZE, 8);
    let opened = broker.open_multipart_with_hashes(&content, json!({})).await.expect(201);
    broker.put_parts(&opened.json["parts"], &content).await;
    // Other bytes of the right size for a stored part: the stored part stays.
    broker.put(&opened.json["parts"][0], &bytes(PART_BYTES, 99)).await.expect(400);
    broker.complete(&opened.id()).await.expect(200);
    assert!(broker.only_record().await.1 == content);

    let opened = broker.open_multipart_with_hashes(&content, json!({})).await.expect(201);
    broker.put(&opened.json["parts"][0], &bytes(PART_BYTES, 99)).await.expect(400);
    assert_eq!(broker.upload(&opened.id()).await.json["uploaded_parts"], json!([]));
    broker.complete(&opened.id()).await.expect_problem(409, "parts-incomplete");
}

#[tokio::test]
async fn parts_that_do_not_match_the_sha256_of_the_whole_are_rejected_and_removed() {
    let broker = TestBroker::start().await;
    let content = bytes(SIZE, 9);
    let opened = broker.open_multipart(&content, json!({"sha256": sha256(b"something else")})).await.expect(201);
    broker.put_parts(&opened.json["parts"], &content).await;
    let refused = broker.complete(&opened.id()).await.expect_problem(422, "checksum-mismatch");
    assert_eq!((refused.json["upload_state"].as_str(), refused.json["retryable"].as_bool()), (Some("rejected"), Some(false)));
    assert!(refused.json["detail"].as_str().unwrap().contains(&sha256(&content)), "{}", refused.text);
    broker.wait_until_s3_is_empty(object_key(&opened.json)).await;
    let again = broker.complete(&opened.id()).await.expect_problem(422, "checksum-mismatch");
    assert_eq!(again.json["detail"], refused.json["detail"]);
    assert_eq!(broker.upload(&opened.id()).await.json["error"]["code"], "checksum-mismatch");
    assert_eq!(broker.records(&broker.topic).await.len(), 0);
}

#[tokio::test]
async fn a_topic_that_requires_sha256_reads_parts_back_even_with_part_hashes() {
    let broker = TestBroker::start().await;
    broker.put_policy(&broker.topic, &json!({"min_integrity": "sha256"})).await.expect(200);
    let content = bytes(SIZE, 10);
    let opened = broker.open_multipart_with_hashes(&content, json!({})).await.expect(201);
    broker.put_parts(&opened.json["parts"], &content).await;
    let published = broker.complete_and_wait(&opened.id(), json!({})).await;
    assert_eq!(published.json["integrity"], "sha256");

    // Every part matches its hash, but the whole does not match its SHA-256.
    let wrong = broker.open_multipart_with_hashes(&content, json!({"sha256": sha256(b"lie")})).await.expect(201);
    broker.put_parts(&wrong.json["parts"], &content).await;
    broker.complete(&wrong.id()).await.expect_problem(422, "checksum-mismatch");
    assert_eq!(broker.records(&broker.topic).await.len(), 1);
}

#[tokio::test]
async fn a_multipart_stream_sends_its_sha256_with_complete() {
    let broker = TestBroker::start().await;
    let content = bytes(SIZE, 11);
    let whole = json!({"sha256": sha256(&content)});
    let bare = broker.open_multipart(&content, json!({"sha256": null})).await.expect(201);
    broker.complete(&bare.id()).await.expect_problem(422, "validation-failed");
    // A hash that comes with a too early complete is not kept.
    broker.complete_with(&bare.id(), json!({"sha256": sha256(b"x")})).await.expect_problem(409, "parts-incomplete");
    broker.put_parts(&bare.json["parts"], &content).await;
    let published = broker.complete_and_wait(&bare.id(), whole.clone()).await;
    assert_eq!((&published.json["integrity"], &published.json["pointer"]["sha256"]), (&json!("sha256"), &whole["sha256"]));

    let has_hashes = broker.open_multipart_with_hashes(&content, json!({"sha256": null})).await.expect(201);
    broker.put_parts(&has_hashes.json["parts"], &content).await;
    let done = broker.complete_with(&has_hashes.id(), whole.clone()).await.expect(200);
    assert_eq!((&done.json["integrity"], &done.json["pointer"]["sha256"]), (&json!("parts-sha256"), &whole["sha256"]));
}
