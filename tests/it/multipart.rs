//! Uploads in parts: with hashes at open, with hashes on demand, and without.

use serde_json::{Value, json};

use crate::harness::uploads::{PART, part_hashes};
use crate::harness::{House, bytes, sha256};

/// Three parts, the last smaller.
const SIZE: usize = 12 << 20;

fn numbers(parts: &Value) -> Vec<u64> {
    parts.as_array().expect("parts").iter().map(|part| part["part_number"].as_u64().unwrap()).collect()
}

fn object_key(opened: &Value) -> &str {
    opened["object_key"].as_str().expect("an object key")
}

#[tokio::test]
async fn parts_whose_hashes_come_at_open_are_proved_by_s3_alone() {
    let house = House::new().await;
    let content = bytes(SIZE, 1);
    let opened = house.open_hashed_parts(&content, json!({"key": "k"})).await.expect(201);
    assert_eq!(opened.json["mode"], "multipart");
    assert_eq!((opened.json["part_size"].as_u64(), opened.json["part_count"].as_u64()), (Some(PART as u64), Some(3)));
    assert_eq!(numbers(&opened.json["parts"]), [1, 2, 3]);
    assert_eq!(opened.json["parts"][2]["size"], SIZE - 2 * PART);
    house.put_parts(&opened.json["parts"], &content).await;
    let done = house.complete(&opened.id()).await.expect(200);
    assert_eq!(done.json["integrity"], "parts-sha256");
    let (record, got) = house.only_record().await;
    assert_eq!((record.json(), record.header("lfs-integrity")), (done.json["pointer"].clone(), Some("parts-sha256")));
    assert_eq!(record.json()["sha256"], sha256(&content));
    assert!(got == content);
    assert!(!house.has_open_multipart(object_key(&opened.json)).await);
}

#[tokio::test]
async fn part_hashes_may_come_with_each_call_for_urls() {
    let house = House::new().await;
    let content = bytes(SIZE, 2);
    let opened = house.open_parts(&content, json!({"part_hashes": "deferred"})).await.expect(201);
    let id = opened.id();
    assert_eq!(opened.json["parts"], json!([]));
    let hashes = part_hashes(&content, PART);
    house.sign(&id, json!({"part_numbers": [1]})).await.expect_problem(422, "validation-failed");
    for (index, hash) in hashes.iter().enumerate() {
        let signed = house.sign(&id, json!({"parts": [{"part_number": index + 1, "sha256": hash}]})).await.expect(200);
        house.put_parts(&signed.json["parts"], &content).await;
    }
    // The promise of a part stands: its hash is not changed after it was signed.
    let other = json!({"parts": [{"part_number": 1, "sha256": sha256(b"other")}]});
    house.sign(&id, other).await.expect_problem(409, "state-conflict");
    let done = house.complete(&id).await.expect(200);
    assert_eq!(done.json["integrity"], "parts-sha256");
    assert!(house.only_record().await.1 == content);
}

#[tokio::test]
async fn parts_without_hashes_are_read_back_before_the_pointer_is_published() {
    let house = House::with(|settings| settings.broker.complete_wait = std::time::Duration::ZERO).await;
    let content = bytes(SIZE, 3);
    let opened = house.open_parts(&content, json!({})).await.expect(201);
    house.put_parts(&opened.json["parts"], &content).await;
    let answer = house.complete(&opened.id()).await.expect(202);
    assert!(answer.headers.contains_key("retry-after"));
    assert!(["completing", "verified"].contains(&answer.state()), "{}", answer.text);
    assert_eq!(answer.json.get("pointer").is_some(), answer.state() == "verified");
    let published = house.until(&opened.id(), "published").await;
    assert_eq!(published.json["integrity"], "sha256");
    house.complete(&opened.id()).await.expect(200);
    let (record, got) = house.only_record().await;
    assert_eq!(record.header("lfs-integrity"), Some("sha256"));
    assert!(got == content);
}

#[tokio::test]
async fn five_parts_and_a_byte_come_back_identical_through_kafka() {
    let house = House::new().await;
    let content = bytes(41_943_041, 4);
    let more = json!({"part_size": 8 << 20, "part_sha256": part_hashes(&content, 8 << 20)});
    let opened = house.open(&content, more).await.expect(201);
    assert_eq!(opened.json["part_count"], 6);
    assert_eq!(opened.json["parts"][5]["size"], 1);
    house.put_parts(&opened.json["parts"], &content).await;
    house.complete(&opened.id()).await.expect(200);
    let (record, got) = house.only_record().await;
    assert_eq!((got.len(), sha256(&got)), (content.len(), sha256(&content)));
    assert_eq!(record.json()["sha256"], sha256(&got));
}

#[tokio::test]
async fn a_part_may_be_sent_again_until_complete_and_the_last_one_counts() {
    let house = House::new().await;
    let content = bytes(SIZE, 5);
    let opened = house.open_parts(&content, json!({})).await.expect(201);
    // Without a hash of its own S3 takes any bytes of the right number.
    let second = &opened.json["parts"][1];
    house.put(second, &bytes(PART, 99)).await.expect(200);
    house.put_parts(&opened.json["parts"], &content).await;
    let signed = house.sign(&opened.id(), json!({"part_numbers": [1]})).await.expect(200);
    house.put_parts(&signed.json["parts"], &content).await;
    let published = house.complete_and_wait(&opened.id(), json!({})).await;
    assert_eq!(published.json["integrity"], "sha256");
    assert!(house.only_record().await.1 == content);
}

#[tokio::test]
async fn urls_are_signed_again_on_demand_and_slide_the_end() {
    let house = House::new().await;
    let content = bytes(SIZE, 6);
    let opened = house.open_hashed_parts(&content, json!({})).await.expect(201);
    house.push_clock(std::time::Duration::from_secs(3000));
    let signed = house.sign(&opened.id(), json!({"part_numbers": [3, 1]})).await.expect(200);
    assert_eq!(numbers(&signed.json["parts"]), [3, 1]);
    let (first, third) = (&signed.json["parts"][1], &signed.json["parts"][0]);
    assert_eq!(first["headers"], opened.json["parts"][0]["headers"]);
    assert_eq!((third["offset"].as_u64(), third["size"].as_u64()), (Some(2 * PART as u64), Some((SIZE - 2 * PART) as u64)));
    house.put_parts(&signed.json["parts"], &content).await;
    let read = house.upload(&opened.id()).await.expect(200);
    assert!(read.json["expires_in"].as_u64().unwrap() > 3000, "{}", read.text);
    assert_eq!((read.json["next"].as_str(), &read.json["missing_parts"]), (Some("parts"), &json!([[2, 2]])));
    house.put(&opened.json["parts"][1], &content[PART..2 * PART]).await.expect(200);
    house.complete(&opened.id()).await.expect(200);
}

#[tokio::test]
async fn missing_parts_are_named_and_the_upload_goes_on() {
    let house = House::new().await;
    let content = bytes(SIZE, 7);
    for hashed in [true, false] {
        let opened = match hashed {
            true => house.open_hashed_parts(&content, json!({})).await.expect(201),
            false => house.open_parts(&content, json!({})).await.expect(201),
        };
        let id = opened.id();
        let none = house.complete(&id).await.expect_problem(409, "parts-incomplete");
        assert_eq!(none.json["errors"].as_array().unwrap().len(), 3);
        house.put(&opened.json["parts"][1], &content[PART..2 * PART]).await.expect(200);
        let some = house.complete(&id).await.expect_problem(409, "parts-incomplete");
        let named: Vec<&str> = some.json["errors"].as_array().unwrap().iter().filter_map(|e| e["pointer"].as_str()).collect();
        assert_eq!(named, ["/parts/0", "/parts/2"]);
        assert_eq!((some.json["upload_state"].as_str(), some.json["retryable"].as_bool()), (Some("open"), Some(true)));
        let read = house.upload(&id).await.expect(200);
        assert_eq!((read.state(), &read.json["missing_parts"]), ("open", &json!([[1, 1], [3, 3]])));
        assert_eq!(read.json["uploaded_parts"], json!([{"part_number": 2, "size": PART}]));

        house.put_parts(&opened.json["parts"], &content).await;
        assert_eq!(house.upload(&id).await.json["next"], "complete");
        house.complete_and_wait(&id, json!({})).await;
    }
    assert_eq!(house.records(&house.topic).await.len(), 2);
}

#[tokio::test]
async fn wrong_bytes_for_a_hashed_part_are_refused_by_s3() {
    let house = House::new().await;
    let content = bytes(SIZE, 8);
    let opened = house.open_hashed_parts(&content, json!({})).await.expect(201);
    house.put_parts(&opened.json["parts"], &content).await;
    // The right number of other bytes, over a part that was there: the good one stays.
    house.put(&opened.json["parts"][0], &bytes(PART, 99)).await.expect(400);
    house.complete(&opened.id()).await.expect(200);
    assert!(house.only_record().await.1 == content);

    let opened = house.open_hashed_parts(&content, json!({})).await.expect(201);
    house.put(&opened.json["parts"][0], &bytes(PART, 99)).await.expect(400);
    assert_eq!(house.upload(&opened.id()).await.json["uploaded_parts"], json!([]));
    house.complete(&opened.id()).await.expect_problem(409, "parts-incomplete");
}

#[tokio::test]
async fn parts_that_are_not_what_the_whole_sha256_says_are_rejected_and_removed() {
    let house = House::new().await;
    let content = bytes(SIZE, 9);
    let opened = house.open_parts(&content, json!({"sha256": sha256(b"something else")})).await.expect(201);
    house.put_parts(&opened.json["parts"], &content).await;
    let refused = house.complete(&opened.id()).await.expect_problem(422, "checksum-mismatch");
    assert_eq!((refused.json["upload_state"].as_str(), refused.json["retryable"].as_bool()), (Some("rejected"), Some(false)));
    assert!(refused.json["detail"].as_str().unwrap().contains(&sha256(&content)), "{}", refused.text);
    house.until_nothing_is_left(object_key(&opened.json)).await;
    let again = house.complete(&opened.id()).await.expect_problem(422, "checksum-mismatch");
    assert_eq!(again.json["detail"], refused.json["detail"]);
    assert_eq!(house.upload(&opened.id()).await.json["error"]["code"], "checksum-mismatch");
    assert_eq!(house.records(&house.topic).await.len(), 0);
}

#[tokio::test]
async fn a_topic_that_demands_sha256_reads_parts_whatever_their_hashes_proved() {
    let house = House::new().await;
    house.put_policy(&house.topic, &json!({"min_integrity": "sha256"})).await.expect(200);
    let content = bytes(SIZE, 10);
    let opened = house.open_hashed_parts(&content, json!({})).await.expect(201);
    house.put_parts(&opened.json["parts"], &content).await;
    let published = house.complete_and_wait(&opened.id(), json!({})).await;
    assert_eq!(published.json["integrity"], "sha256");

    // Every part is what its hash says, the whole is not what it was said to be.
    let lie = house.open_hashed_parts(&content, json!({"sha256": sha256(b"lie")})).await.expect(201);
    house.put_parts(&lie.json["parts"], &content).await;
    house.complete(&lie.id()).await.expect_problem(422, "checksum-mismatch");
    assert_eq!(house.records(&house.topic).await.len(), 1);
}

#[tokio::test]
async fn a_stream_in_parts_brings_its_sha256_with_complete() {
    let house = House::new().await;
    let content = bytes(SIZE, 11);
    let whole = json!({"sha256": sha256(&content)});
    let bare = house.open_parts(&content, json!({"sha256": null})).await.expect(201);
    house.complete(&bare.id()).await.expect_problem(422, "validation-failed");
    // What comes with a complete that comes too early does not bind.
    house.complete_with(&bare.id(), json!({"sha256": sha256(b"x")})).await.expect_problem(409, "parts-incomplete");
    house.put_parts(&bare.json["parts"], &content).await;
    let published = house.complete_and_wait(&bare.id(), whole.clone()).await;
    assert_eq!((&published.json["integrity"], &published.json["pointer"]["sha256"]), (&json!("sha256"), &whole["sha256"]));

    let hashed = house.open_hashed_parts(&content, json!({"sha256": null})).await.expect(201);
    house.put_parts(&hashed.json["parts"], &content).await;
    let done = house.complete_with(&hashed.id(), whole.clone()).await.expect(200);
    assert_eq!((&done.json["integrity"], &done.json["pointer"]["sha256"]), (&json!("parts-sha256"), &whole["sha256"]));
}
