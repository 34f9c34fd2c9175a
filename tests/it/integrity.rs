//! Integrity: the broker reports exactly what it verified, and a verified object cannot be replaced later.

use serde_json::{Value, json};

use crate::harness::uploads::{PART_BYTES, digest};
use crate::harness::{TestBroker, bytes};

/// A broker whose topic accepts this checksum and requires no more integrity than the checksum can reach.
async fn start_broker_for(checksum: &str, min_integrity: &str) -> TestBroker {
    let broker = TestBroker::start().await;
    let policy = json!({"checksums": [checksum], "min_integrity": min_integrity});
    broker.put_policy(&broker.topic, &policy).await.expect(200);
    broker
}

fn declared(algorithm: &str, content: &[u8]) -> Value {
    match algorithm {
        "none" => json!({"sha256": null, "checksum_alg": "none"}),
        _ => json!({"sha256": null, "checksum_alg": algorithm, "checksum": digest(algorithm, content)}),
    }
}

/// Asserts that complete, GET, the record's header and the pointer report exactly this integrity.
async fn assert_integrity(broker: &TestBroker, id: &str, algorithm: &str, level: &str, content: &[u8]) {
    let published = broker.complete_and_wait(id, json!({})).await;
    let done = broker.complete(id).await.expect(200);
    assert_eq!((published.json["integrity"].as_str(), done.json["integrity"].as_str()), (Some(level), Some(level)));
    let (record, downloaded) = broker.only_record().await;
    assert!(downloaded == content);
    assert_eq!(record.header("lfs-integrity"), Some(level));
    let mut expected = format!(r#"{{"kfs_lfs":1,"bucket":"{}","key":{},"#, broker.bucket, done.json["pointer"]["key"]);
    expected += &match algorithm {
        "none" => format!(r#""size":{},"checksum_alg":"none","#, content.len()),
        _ => format!(r#""size":{},"checksum":"{}","checksum_alg":"{algorithm}","#, content.len(), digest(algorithm, content)),
    };
    expected += &format!(r#""content_type":"application/octet-stream","created_at":{}}}"#, done.json["pointer"]["created_at"]);
    assert_eq!(String::from_utf8(record.value.clone()).unwrap(), expected);
    let resolved = broker.resolve(&record.value, "").await.expect(200);
    assert_eq!((&resolved.json["sha256"], resolved.json["integrity"].as_str()), (&Value::Null, Some(level)));
}

async fn verify_single_put(algorithm: &str, level: &str) {
    let broker = start_broker_for(algorithm, level).await;
    let content = b"hello, checksum";
    let opened = broker.open(content, declared(algorithm, content)).await.expect(201);
    if algorithm != "none" {
        broker.put(&opened.json["upload"], b"HELLO, CHECKSUM").await.expect(400);
        assert_eq!(broker.objects().await, Vec::<String>::new());
    }
    broker.put(&opened.json["upload"], content).await.expect(200);
    assert_integrity(&broker, &opened.id(), algorithm, level, content).await;
}

async fn verify_multipart(algorithm: &str, level: &str) {
    let broker = start_broker_for(algorithm, level).await;
    let content = bytes(PART_BYTES + 7, 21);
    let opened = broker.open_multipart(&content, declared(algorithm, &content)).await.expect(201);
    assert_eq!(opened.json["mode"], "multipart");
    broker.put_parts(&opened.json["parts"], &content).await;
    assert_integrity(&broker, &opened.id(), algorithm, level, &content).await;
}

#[tokio::test]
async fn a_single_put_is_verified_by_its_crc64nvme() {
    verify_single_put("crc64nvme", "checksum").await;
}

#[tokio::test]
async fn a_single_put_is_verified_by_its_crc32c() {
    verify_single_put("crc32c", "checksum").await;
}

#[tokio::test]
async fn a_single_put_is_verified_by_its_crc32() {
    verify_single_put("crc32", "checksum").await;
}

#[tokio::test]
async fn a_single_put_is_verified_by_its_md5() {
    verify_single_put("md5", "checksum").await;
}

#[tokio::test]
async fn a_single_put_without_a_checksum_is_verified_by_its_size_only() {
    verify_single_put("none", "size").await;
}

#[tokio::test]
async fn parts_are_verified_by_their_crc64nvme() {
    verify_multipart("crc64nvme", "checksum").await;
}

#[tokio::test]
async fn parts_are_verified_by_their_crc32c() {
    verify_multipart("crc32c", "checksum").await;
}

#[tokio::test]
async fn parts_are_verified_by_their_crc32() {
    verify_multipart("crc32", "checksum").await;
}

#[tokio::test]
async fn parts_without_a_checksum_are_verified_by_their_sizes_only() {
    verify_multipart("none", "size").await;
}

#[tokio::test]
async fn an_md5_is_not_allowed_for_a_multipart_upload() {
    let broker = start_broker_for("md5", "checksum").await;
    let content = bytes(PART_BYTES + 1, 22);
    broker.open_multipart(&content, declared("md5", &content)).await.expect_problem(422, "checksum-not-allowed");
}

#[tokio::test]
async fn parts_with_another_crc_than_declared_are_rejected() {
    let broker = start_broker_for("crc32c", "checksum").await;
    let content = bytes(PART_BYTES + 7, 23);
    let opened = broker.open_multipart(&content, declared("crc32c", b"other")).await.expect(201);
    broker.put_parts(&opened.json["parts"], &content).await;
    broker.complete(&opened.id()).await.expect_problem(422, "checksum-mismatch");
    broker.wait_until_s3_is_empty(opened.json["object_key"].as_str().unwrap()).await;
    assert_eq!(broker.records(&broker.topic).await.len(), 0);
}

#[tokio::test]
async fn a_checksum_is_refused_if_the_topic_requires_more_integrity() {
    let broker = TestBroker::start().await;
    broker.open(b"x", declared("crc32c", b"x")).await.expect_problem(422, "checksum-not-allowed");
    let policy = json!({"checksums": ["sha256", "crc32c"], "min_integrity": "parts-sha256"});
    broker.put_policy(&broker.topic, &policy).await.expect(200);
    broker.open(b"x", declared("crc32c", b"x")).await.expect_problem(422, "checksum-not-allowed");
    let policy = json!({"checksums": ["crc32c"], "min_integrity": "sha256"});
    broker.put_policy(&broker.topic, &policy).await.expect_problem(422, "validation-failed");
}

#[tokio::test]
async fn a_valid_url_cannot_replace_a_published_object() {
    let broker = TestBroker::start().await;
    let opened = broker.open(b"first", json!({})).await.expect(201);
    broker.put(&opened.json["upload"], b"first").await.expect(200);
    broker.put(&opened.json["upload"], b"first").await.expect(412);
    broker.complete(&opened.id()).await.expect(200);
    broker.put(&opened.json["upload"], b"first").await.expect(412);

    // A URL without a signed checksum would accept any bytes of this size.
    let stream = broker.open(b"other", json!({"sha256": null})).await.expect(201);
    broker.put(&stream.json["upload"], b"other").await.expect(200);
    broker.put(&stream.json["upload"], b"OTHER").await.expect(412);
    broker.complete_and_wait(&stream.id(), json!({"sha256": digest("sha256", b"other")})).await;
    broker.put(&stream.json["upload"], b"OTHER").await.expect(412);
    for (id, content) in [(opened.id(), b"first"), (stream.id(), b"other")] {
        let pointer = broker.upload(&id).await.json["pointer"].clone();
        let resolved = broker.resolve(&serde_json::to_vec(&in_order(&pointer)).unwrap(), "").await.expect(200);
        assert_eq!(broker.download(&resolved.json).await, content);
    }
}

/// Orders the pointer's members: JSON maps sort them, but a pointer begins with its marker.
fn in_order(pointer: &Value) -> lfs_broker_client::pointer::Pointer {
    serde_json::from_value(pointer.clone()).unwrap()
}

#[tokio::test]
async fn a_valid_part_url_cannot_change_a_published_object() {
    let broker = TestBroker::start().await;
    let content = bytes(PART_BYTES + 7, 24);
    let opened = broker.open_multipart(&content, json!({})).await.expect(201);
    broker.put_parts(&opened.json["parts"], &content).await;
    broker.complete_and_wait(&opened.id(), json!({})).await;
    let late = broker.put(&opened.json["parts"][1], &bytes(7, 99)).await;
    assert_eq!(late.status, 404, "{}", late.text);
    assert!(broker.only_record().await.1 == content);
}

#[tokio::test]
async fn an_object_of_another_writer_is_rejected_as_foreign() {
    let broker = TestBroker::start().await;
    for token in [None, Some("0192aaaa-0000-7000-8000-000000000000")] {
        let opened = broker.open(b"hello", json!({})).await.expect(201);
        let key = opened.json["object_key"].as_str().unwrap();
        broker.put_object(key, b"hello", token).await;
        let refused = broker.complete(&opened.id()).await.expect_problem(422, "object-foreign");
        assert_eq!(refused.json["upload_state"], "rejected");
        broker.complete(&opened.id()).await.expect_problem(422, "object-foreign");
        broker.wait_until_s3_is_empty(key).await;
    }
    assert_eq!(broker.records(&broker.topic).await.len(), 0);
}

#[tokio::test]
async fn an_object_of_another_size_is_rejected() {
    let broker = TestBroker::start().await;
    let opened = broker.open(b"hello", json!({})).await.expect(201);
    let (id, key) = (opened.id(), opened.json["object_key"].as_str().unwrap());
    broker.put_object(key, b"hello!", Some(&id)).await;
    let refused = broker.complete(&id).await.expect_problem(422, "size-mismatch");
    assert_eq!(refused.json["detail"], "declared 5 bytes, found 6");
    assert_eq!(broker.upload(&id).await.json["error"]["code"], "size-mismatch");
    broker.wait_until_s3_is_empty(key).await;
}

#[tokio::test]
async fn an_object_without_a_checksum_is_read_back_before_it_is_verified() {
    let broker = TestBroker::start().await;
    let wrong = broker.open(b"hello", json!({})).await.expect(201);
    broker.put_object(wrong.json["object_key"].as_str().unwrap(), b"HELLO", Some(&wrong.id())).await;
    broker.complete(&wrong.id()).await.expect_problem(422, "checksum-mismatch");

    let right = broker.open(b"hello", json!({})).await.expect(201);
    broker.put_object(right.json["object_key"].as_str().unwrap(), b"hello", Some(&right.id())).await;
    let published = broker.complete_and_wait(&right.id(), json!({})).await;
    assert_eq!(published.json["integrity"], "sha256");
    assert_eq!(broker.records(&broker.topic).await.len(), 1);
    let history = broker.get(&format!("/lfs/uploads/{}/history", right.id())).await.expect(200).json;
    let reasons: Vec<&str> =
        history["items"].as_array().unwrap().iter().filter_map(|transition| transition["reason"].as_str()).collect();
    assert!(reasons.contains(&"the verifier reads the bytes"), "{reasons:?}");
    assert!(!reasons.contains(&"the previous lease has ended"), "{reasons:?}");
}

/// Asserts that a request signs exactly the headers that it requires, each as a header and none in the query.
fn assert_signed_headers(request: &Value, expected: &[&str]) {
    let url = request["url"].as_str().unwrap();
    let query = url.split_once('?').unwrap().1;
    let signed = query.split('&').find_map(|pair| pair.strip_prefix("X-Amz-SignedHeaders=")).expect("signed headers");
    let signed = signed.replace("%3B", ";");
    let mut signed: Vec<&str> = signed.split(';').filter(|name| *name != "host").collect();
    let mut required: Vec<&str> = request["headers"].as_object().unwrap().keys().map(String::as_str).collect();
    signed.sort_unstable();
    required.sort_unstable();
    assert_eq!((&signed, &required), (&required, &expected.to_vec()));
    let in_query = query.split('&').find(|pair| pair.starts_with("x-amz-checksum") || pair.starts_with("Content-MD5"));
    assert_eq!(in_query, None, "S3 does not check a checksum in the query");
}

#[tokio::test]
async fn every_required_header_is_signed() {
    let broker = TestBroker::start().await;
    let policy = json!({"checksums": ["sha256", "crc64nvme", "md5", "none"], "min_integrity": "size"});
    broker.put_policy(&broker.topic, &policy).await.expect(200);
    let common = ["content-length", "content-type", "if-none-match", "x-amz-meta-lfs-upload-id"];
    for (algorithm, header) in [("none", None), ("crc64nvme", Some("x-amz-checksum-crc64nvme")), ("md5", Some("content-md5"))] {
        let opened = broker.open(b"hello", declared(algorithm, b"hello")).await.expect(201);
        let mut expected: Vec<&str> = common.iter().copied().chain(header).collect();
        expected.sort_unstable();
        assert_signed_headers(&opened.json["upload"], &expected);
    }
    let opened = broker.open(b"hello", json!({"content_type": "text/plain"})).await.expect(201);
    let mut expected = [common.as_slice(), &["x-amz-checksum-sha256"]].concat();
    expected.sort_unstable();
    assert_signed_headers(&opened.json["upload"], &expected);
    let headers = &opened.json["upload"]["headers"];
    assert_eq!((&headers["content-length"], &headers["if-none-match"]), (&json!("5"), &json!("*")));
    assert_eq!((&headers["content-type"], &headers["x-amz-meta-lfs-upload-id"]), (&json!("text/plain"), &opened.json["id"]));
    assert_eq!(headers["x-amz-checksum-sha256"], "LPJNul+wow4m6DsqxbninhsWHlwfp0JecwQzYpOLmCQ=");

    let content = bytes(PART_BYTES + 7, 25);
    let hashed = broker.open_multipart_with_hashes(&content, json!({})).await.expect(201);
    let bare = broker.open_multipart(&content, json!({})).await.expect(201);
    for (response, expected) in [(hashed, ["content-length", "x-amz-checksum-sha256"].as_slice()), (bare, &["content-length"])] {
        let again = broker.presign_parts(&response.id(), json!({"part_numbers": [2]})).await.expect(200);
        for part in response.json["parts"].as_array().unwrap().iter().chain(again.json["parts"].as_array().unwrap()) {
            assert_signed_headers(part, expected);
            assert_eq!(part["headers"]["content-length"], part["size"].to_string());
        }
    }
}
