//! What was proved is what is said, and what was proved stays so.

use serde_json::{Value, json};

use crate::harness::uploads::{PART, digest};
use crate::harness::{House, bytes};

/// A topic that takes this checksum and asks for no more proof than it can give.
async fn house_of(checksum: &str, min_integrity: &str) -> House {
    let house = House::new().await;
    let policy = json!({"checksums": [checksum], "min_integrity": min_integrity});
    house.put_policy(&house.topic, &policy).await.expect(200);
    house
}

fn promise(algorithm: &str, content: &[u8]) -> Value {
    match algorithm {
        "none" => json!({"sha256": null, "checksum_alg": "none"}),
        _ => json!({"sha256": null, "checksum_alg": algorithm, "checksum": digest(algorithm, content)}),
    }
}

/// Asserts that complete, GET, the record's header and the pointer all say the same level, and no more.
async fn assert_told(house: &House, id: &str, algorithm: &str, level: &str, content: &[u8]) {
    let published = house.complete_and_wait(id, json!({})).await;
    let done = house.complete(id).await.expect(200);
    assert_eq!((published.json["integrity"].as_str(), done.json["integrity"].as_str()), (Some(level), Some(level)));
    let (record, got) = house.only_record().await;
    assert!(got == content);
    assert_eq!(record.header("lfs-integrity"), Some(level));
    let mut expected = format!(r#"{{"kfs_lfs":1,"bucket":"{}","key":{},"#, house.bucket, done.json["pointer"]["key"]);
    expected += &match algorithm {
        "none" => format!(r#""size":{},"checksum_alg":"none","#, content.len()),
        _ => format!(r#""size":{},"checksum":"{}","checksum_alg":"{algorithm}","#, content.len(), digest(algorithm, content)),
    };
    expected += &format!(r#""content_type":"application/octet-stream","created_at":{}}}"#, done.json["pointer"]["created_at"]);
    assert_eq!(String::from_utf8(record.value.clone()).unwrap(), expected);
    let resolved = house.resolve(&record.value, "").await.expect(200);
    assert_eq!((&resolved.json["sha256"], resolved.json["integrity"].as_str()), (&Value::Null, Some(level)));
}

async fn single(algorithm: &str, level: &str) {
    let house = house_of(algorithm, level).await;
    let content = b"hello, checksum";
    let opened = house.open(content, promise(algorithm, content)).await.expect(201);
    if algorithm != "none" {
        house.put(&opened.json["upload"], b"HELLO, CHECKSUM").await.expect(400);
        assert_eq!(house.objects().await, Vec::<String>::new());
    }
    house.put(&opened.json["upload"], content).await.expect(200);
    assert_told(&house, &opened.id(), algorithm, level, content).await;
}

async fn multipart(algorithm: &str, level: &str) {
    let house = house_of(algorithm, level).await;
    let content = bytes(PART + 7, 21);
    let opened = house.open_parts(&content, promise(algorithm, &content)).await.expect(201);
    assert_eq!(opened.json["mode"], "multipart");
    house.put_parts(&opened.json["parts"], &content).await;
    assert_told(&house, &opened.id(), algorithm, level, &content).await;
}

#[tokio::test]
async fn a_crc64nvme_proves_one_put() {
    single("crc64nvme", "checksum").await;
}

#[tokio::test]
async fn a_crc32c_proves_one_put() {
    single("crc32c", "checksum").await;
}

#[tokio::test]
async fn a_crc32_proves_one_put() {
    single("crc32", "checksum").await;
}

#[tokio::test]
async fn an_md5_proves_one_put() {
    single("md5", "checksum").await;
}

#[tokio::test]
async fn without_a_checksum_one_put_is_proved_by_its_size_alone() {
    single("none", "size").await;
}

#[tokio::test]
async fn a_crc64nvme_proves_parts() {
    multipart("crc64nvme", "checksum").await;
}

#[tokio::test]
async fn a_crc32c_proves_parts() {
    multipart("crc32c", "checksum").await;
}

#[tokio::test]
async fn a_crc32_proves_parts() {
    multipart("crc32", "checksum").await;
}

#[tokio::test]
async fn without_a_checksum_parts_are_proved_by_their_sizes_alone() {
    multipart("none", "size").await;
}

#[tokio::test]
async fn an_md5_cannot_stand_for_parts() {
    let house = house_of("md5", "checksum").await;
    let content = bytes(PART + 1, 22);
    house.open_parts(&content, promise("md5", &content)).await.expect_problem(422, "checksum-not-allowed");
}

#[tokio::test]
async fn parts_with_another_crc_than_promised_are_rejected() {
    let house = house_of("crc32c", "checksum").await;
    let content = bytes(PART + 7, 23);
    let opened = house.open_parts(&content, promise("crc32c", b"other")).await.expect(201);
    house.put_parts(&opened.json["parts"], &content).await;
    house.complete(&opened.id()).await.expect_problem(422, "checksum-mismatch");
    house.until_nothing_is_left(opened.json["object_key"].as_str().unwrap()).await;
    assert_eq!(house.records(&house.topic).await.len(), 0);
}

#[tokio::test]
async fn a_checksum_is_refused_where_the_topic_wants_more_proof() {
    let house = House::new().await;
    house.open(b"x", promise("crc32c", b"x")).await.expect_problem(422, "checksum-not-allowed");
    let policy = json!({"checksums": ["sha256", "crc32c"], "min_integrity": "parts-sha256"});
    house.put_policy(&house.topic, &policy).await.expect(200);
    house.open(b"x", promise("crc32c", b"x")).await.expect_problem(422, "checksum-not-allowed");
    let policy = json!({"checksums": ["crc32c"], "min_integrity": "sha256"});
    house.put_policy(&house.topic, &policy).await.expect_problem(422, "validation-failed");
}

#[tokio::test]
async fn a_url_that_is_still_valid_cannot_change_what_was_published() {
    let house = House::new().await;
    let opened = house.open(b"first", json!({})).await.expect(201);
    house.put(&opened.json["upload"], b"first").await.expect(200);
    house.put(&opened.json["upload"], b"first").await.expect(412);
    house.complete(&opened.id()).await.expect(200);
    house.put(&opened.json["upload"], b"first").await.expect(412);

    // A URL that signs no checksum would take any bytes of this size.
    let stream = house.open(b"other", json!({"sha256": null})).await.expect(201);
    house.put(&stream.json["upload"], b"other").await.expect(200);
    house.put(&stream.json["upload"], b"OTHER").await.expect(412);
    house.complete_and_wait(&stream.id(), json!({"sha256": digest("sha256", b"other")})).await;
    house.put(&stream.json["upload"], b"OTHER").await.expect(412);
    for (id, content) in [(opened.id(), b"first"), (stream.id(), b"other")] {
        let pointer = house.upload(&id).await.json["pointer"].clone();
        let resolved = house.resolve(&serde_json::to_vec(&in_order(&pointer)).unwrap(), "").await.expect(200);
        assert_eq!(house.download(&resolved.json).await, content);
    }
}

/// JSON maps sort their members, but a pointer begins with its marker.
fn in_order(pointer: &Value) -> lfs_broker_client::pointer::Pointer {
    serde_json::from_value(pointer.clone()).unwrap()
}

#[tokio::test]
async fn a_part_url_that_is_still_valid_cannot_change_what_was_published() {
    let house = House::new().await;
    let content = bytes(PART + 7, 24);
    let opened = house.open_parts(&content, json!({})).await.expect(201);
    house.put_parts(&opened.json["parts"], &content).await;
    house.complete_and_wait(&opened.id(), json!({})).await;
    let late = house.put(&opened.json["parts"][1], &bytes(7, 99)).await;
    assert_eq!(late.status, 404, "{}", late.text);
    assert!(house.only_record().await.1 == content);
}

#[tokio::test]
async fn an_object_that_somebody_else_wrote_is_foreign() {
    let house = House::new().await;
    for token in [None, Some("0192aaaa-0000-7000-8000-000000000000")] {
        let opened = house.open(b"hello", json!({})).await.expect(201);
        let key = opened.json["object_key"].as_str().unwrap();
        house.put_object(key, b"hello", token).await;
        let refused = house.complete(&opened.id()).await.expect_problem(422, "object-foreign");
        assert_eq!(refused.json["upload_state"], "rejected");
        house.complete(&opened.id()).await.expect_problem(422, "object-foreign");
        house.until_nothing_is_left(key).await;
    }
    assert_eq!(house.records(&house.topic).await.len(), 0);
}

#[tokio::test]
async fn an_object_of_another_size_is_rejected() {
    let house = House::new().await;
    let opened = house.open(b"hello", json!({})).await.expect(201);
    let (id, key) = (opened.id(), opened.json["object_key"].as_str().unwrap());
    house.put_object(key, b"hello!", Some(&id)).await;
    let refused = house.complete(&id).await.expect_problem(422, "size-mismatch");
    assert_eq!(refused.json["detail"], "promised 5 bytes, found 6");
    assert_eq!(house.upload(&id).await.json["error"]["code"], "size-mismatch");
    house.until_nothing_is_left(key).await;
}

#[tokio::test]
async fn an_object_without_a_checksum_is_read_before_it_is_believed() {
    let house = House::new().await;
    let lie = house.open(b"hello", json!({})).await.expect(201);
    house.put_object(lie.json["object_key"].as_str().unwrap(), b"HELLO", Some(&lie.id())).await;
    house.complete(&lie.id()).await.expect_problem(422, "checksum-mismatch");

    let truth = house.open(b"hello", json!({})).await.expect(201);
    house.put_object(truth.json["object_key"].as_str().unwrap(), b"hello", Some(&truth.id())).await;
    let published = house.complete_and_wait(&truth.id(), json!({})).await;
    assert_eq!(published.json["integrity"], "sha256");
    assert_eq!(house.records(&house.topic).await.len(), 1);
}

/// Asserts that a request signs exactly the headers that it asks for, each as a header and none in the query.
fn assert_signs(request: &Value, wanted: &[&str]) {
    let url = request["url"].as_str().unwrap();
    let query = url.split_once('?').unwrap().1;
    let signed = query.split('&').find_map(|pair| pair.strip_prefix("X-Amz-SignedHeaders=")).expect("signed headers");
    let signed = signed.replace("%3B", ";");
    let mut signed: Vec<&str> = signed.split(';').filter(|name| *name != "host").collect();
    let mut asked: Vec<&str> = request["headers"].as_object().unwrap().keys().map(String::as_str).collect();
    signed.sort_unstable();
    asked.sort_unstable();
    assert_eq!((&signed, &asked), (&asked, &wanted.to_vec()));
    let hoisted = query.split('&').find(|pair| pair.starts_with("x-amz-checksum") || pair.starts_with("Content-MD5"));
    assert_eq!(hoisted, None, "a checksum in the query protects nothing");
}

#[tokio::test]
async fn every_header_that_is_asked_for_is_signed() {
    let house = House::new().await;
    let policy = json!({"checksums": ["sha256", "crc64nvme", "md5", "none"], "min_integrity": "size"});
    house.put_policy(&house.topic, &policy).await.expect(200);
    let common = ["content-length", "content-type", "if-none-match", "x-amz-meta-lfs-upload-id"];
    for (algorithm, header) in [("none", None), ("crc64nvme", Some("x-amz-checksum-crc64nvme")), ("md5", Some("content-md5"))] {
        let opened = house.open(b"hello", promise(algorithm, b"hello")).await.expect(201);
        let mut wanted: Vec<&str> = common.iter().copied().chain(header).collect();
        wanted.sort_unstable();
        assert_signs(&opened.json["upload"], &wanted);
    }
    let opened = house.open(b"hello", json!({"content_type": "text/plain"})).await.expect(201);
    let mut wanted = [common.as_slice(), &["x-amz-checksum-sha256"]].concat();
    wanted.sort_unstable();
    assert_signs(&opened.json["upload"], &wanted);
    let headers = &opened.json["upload"]["headers"];
    assert_eq!((&headers["content-length"], &headers["if-none-match"]), (&json!("5"), &json!("*")));
    assert_eq!((&headers["content-type"], &headers["x-amz-meta-lfs-upload-id"]), (&json!("text/plain"), &opened.json["id"]));
    assert_eq!(headers["x-amz-checksum-sha256"], "LPJNul+wow4m6DsqxbninhsWHlwfp0JecwQzYpOLmCQ=");

    let content = bytes(PART + 7, 25);
    let hashed = house.open_hashed_parts(&content, json!({})).await.expect(201);
    let bare = house.open_parts(&content, json!({})).await.expect(201);
    for (answer, wanted) in [(hashed, ["content-length", "x-amz-checksum-sha256"].as_slice()), (bare, &["content-length"])] {
        let again = house.sign(&answer.id(), json!({"part_numbers": [2]})).await.expect(200);
        for part in answer.json["parts"].as_array().unwrap().iter().chain(again.json["parts"].as_array().unwrap()) {
            assert_signs(part, wanted);
            assert_eq!(part["headers"]["content-length"], part["size"].to_string());
        }
    }
}
