//! Presigning parts: at open and on demand.

use std::time::Duration;

use serde_json::{Value, json};

use crate::harness::{ApiResponse, TestBroker, bytes, sha256, time};

const MIB: usize = 1 << 20;

/// Opens a multipart upload with parts of 5 MiB that are never put.
async fn open(broker: &TestBroker, parts: usize, more: Value) -> ApiResponse {
    let mut body = json!({"topic": broker.topic, "size": parts * 5 * MIB, "sha256": sha256(b"x"), "part_size": 5 * MIB});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    broker.post("/lfs/uploads", &body).await.expect(201)
}

async fn presign(broker: &TestBroker, id: &str, body: Value) -> ApiResponse {
    broker.post(&format!("/lfs/uploads/{id}/parts"), &body).await
}

fn numbers(response: &Value) -> Vec<u64> {
    response["parts"].as_array().unwrap().iter().map(|part| part["part_number"].as_u64().unwrap()).collect()
}

#[tokio::test]
async fn open_presigns_the_first_hundred_parts_and_the_others_are_presigned_on_demand() {
    let broker = TestBroker::start().await;
    let opened = open(&broker, 250, json!({"size": 249 * 5 * MIB + 7})).await;
    assert_eq!(numbers(&opened.json), (1..=100).collect::<Vec<u64>>());
    assert_eq!(opened.json["part_count"], 250);
    let requested: Vec<u64> = (151..=250).rev().collect();
    let presigned = presign(&broker, &opened.id(), json!({"part_numbers": requested})).await.expect(200);
    assert_eq!(numbers(&presigned.json), requested, "in the requested order");
    let (last, first) = (&presigned.json["parts"][0], &presigned.json["parts"][99]);
    assert_eq!((&last["offset"], &last["size"]), (&json!(249 * 5 * MIB), &json!(7)));
    assert_eq!((&first["offset"], &first["size"]), (&json!(150 * 5 * MIB), &json!(5 * MIB)));
    for part in [last, first, &opened.json["parts"][0]] {
        assert_eq!(part["method"], "PUT");
        assert_eq!(part["headers"]["content-length"], part["size"].to_string());
        assert!(part["expires_in"].as_u64().unwrap() <= 900 && part["expires_at"].is_string());
        assert_eq!(part.as_object().unwrap().len(), 8, "{part}");
    }
}

#[tokio::test]
async fn a_call_names_1_to_100_existing_parts_each_once() {
    let broker = TestBroker::start().await;
    let id = open(&broker, 120, json!({})).await.id();
    for (body, pointer) in [
        (json!({}), ""),
        (json!({"part_numbers": [1], "parts": [{"part_number": 1}]}), ""),
        (json!({"part_numbers": []}), "/part_numbers"),
        (json!({"parts": []}), "/parts"),
        (json!({"part_numbers": (1..=101).collect::<Vec<u32>>()}), "/part_numbers"),
        (json!({"part_numbers": [1, 0]}), "/part_numbers/1"),
        (json!({"part_numbers": [121]}), "/part_numbers/0"),
        (json!({"part_numbers": [5, 6, 5]}), "/part_numbers/2"),
        (json!({"part_numbers": ["1"]}), "/part_numbers/0"),
        (json!({"parts": [{"part_number": 1, "md5": "x"}]}), "/parts/0/md5"),
        (json!({"part_numbers": [1], "all": true}), "/all"),
    ] {
        let response = presign(&broker, &id, body.clone()).await.expect_problem(422, "validation-failed");
        assert_eq!(response.json["errors"][0]["pointer"], pointer, "{body}: {}", response.text);
    }
    presign(&broker, &id, json!({"part_numbers": (1..=100).collect::<Vec<u32>>()})).await.expect(200);
    presign(&broker, &id, json!({"parts": [{"part_number": 120}]})).await.expect(200);
}

#[tokio::test]
async fn an_unexpected_part_hash_is_refused() {
    let broker = TestBroker::start().await;
    let id = open(&broker, 2, json!({})).await.id();
    let body = json!({"parts": [{"part_number": 1, "sha256": sha256(b"a")}]});
    presign(&broker, &id, body).await.expect_problem(422, "validation-failed");
}

#[tokio::test]
async fn deferred_part_hashes_come_with_each_call_and_cannot_change_later() {
    let broker = TestBroker::start().await;
    let opened = open(&broker, 3, json!({"part_hashes": "deferred"})).await;
    assert_eq!(opened.json["parts"], json!([]));
    let id = opened.id();
    let part = |number: u32, content: &[u8]| json!({"part_number": number, "sha256": sha256(content)});
    presign(&broker, &id, json!({"part_numbers": [1]})).await.expect_problem(422, "validation-failed");
    presign(&broker, &id, json!({"parts": [part(1, b"a"), {"part_number": 2}]})).await.expect_problem(422, "validation-failed");
    let presigned = presign(&broker, &id, json!({"parts": [part(1, b"a")]})).await.expect(200);
    assert!(presigned.json["parts"][0]["headers"]["x-amz-checksum-sha256"].is_string());
    let upper = json!({"part_number": 1, "sha256": sha256(b"a").to_uppercase()});
    presign(&broker, &id, json!({"parts": [upper]})).await.expect(200);
    // The call is refused as a whole: it does not declare the hash of the second part.
    let conflict = presign(&broker, &id, json!({"parts": [part(2, b"b"), part(1, b"other")]})).await;
    assert_eq!(conflict.expect_problem(409, "state-conflict").json["upload_state"], "open");
    presign(&broker, &id, json!({"parts": [part(2, b"c")]})).await.expect(200);
}

#[tokio::test]
async fn part_hashes_given_at_open_are_signed_and_cannot_be_changed() {
    let broker = TestBroker::start().await;
    let hashes = json!([sha256(b"a"), sha256(b"b")]);
    let opened = open(&broker, 2, json!({"part_sha256": hashes})).await;
    let id = opened.id();
    let header = |response: &Value, index: usize| response["parts"][index]["headers"]["x-amz-checksum-sha256"].clone();
    let again = presign(&broker, &id, json!({"part_numbers": [2, 1]})).await.expect(200).json;
    assert_eq!((header(&again, 0), header(&again, 1)), (header(&opened.json, 1), header(&opened.json, 0)));
    assert!(header(&again, 0).is_string());
    presign(&broker, &id, json!({"parts": [{"part_number": 1, "sha256": sha256(b"a")}]})).await.expect(200);
    let other = json!({"parts": [{"part_number": 1, "sha256": sha256(b"b")}]});
    presign(&broker, &id, other).await.expect_problem(409, "state-conflict");
}

#[tokio::test]
async fn a_presigned_part_url_puts_that_part() {
    let broker = TestBroker::start().await;
    let content = bytes(6 * MIB, 1);
    let opened = broker.open(&content, json!({"part_size": 5 * MIB})).await.expect(201);
    let presigned = presign(&broker, &opened.id(), json!({"part_numbers": [2, 1]})).await.expect(200);
    broker.put_parts(&presigned.json["parts"], &content).await;
    assert_eq!(broker.upload(&opened.id()).await.json["next"], "complete");
    broker.complete(&opened.id()).await;
    broker.wait_for_state(&opened.id(), "published").await;
    presign(&broker, &opened.id(), json!({"part_numbers": [1]})).await.expect_problem(409, "state-conflict");
}

#[tokio::test]
async fn only_open_multipart_uploads_have_parts_to_presign() {
    let broker = TestBroker::start().await;
    let one_part = json!({"part_numbers": [1]});
    let single = broker.open(b"hello", json!({})).await.expect(201).id();
    let refused = presign(&broker, &single, one_part.clone()).await.expect_problem(409, "state-conflict");
    assert_eq!(refused.json["upload_state"], "open");
    let aborted = open(&broker, 2, json!({})).await.id();
    broker.delete(&format!("/lfs/uploads/{aborted}")).await.expect(204);
    presign(&broker, &aborted, one_part.clone()).await.expect_problem(410, "upload-aborted");
    let expired = open(&broker, 2, json!({})).await.id();
    broker.advance_clock(Duration::from_secs(3600));
    presign(&broker, &expired, one_part.clone()).await.expect_problem(410, "upload-expired");
    // The end of the session is reported before invalid part numbers.
    presign(&broker, &expired, json!({"part_numbers": [99]})).await.expect_problem(410, "upload-expired");
}

#[tokio::test]
async fn presigning_extends_the_session_up_to_its_maximum_and_no_url_outlives_it() {
    let broker = TestBroker::start().await;
    let policy = json!({"session_seconds": 100, "session_max_seconds": 250, "url_seconds": 80});
    broker.put_policy(&broker.topic, &policy).await.expect(200);
    let id = open(&broker, 2, json!({})).await.id();
    let mut left = Vec::new();
    for _ in 0..3 {
        broker.advance_clock(Duration::from_secs(60));
        let presigned = presign(&broker, &id, json!({"part_numbers": [1]})).await.expect(200);
        let ends_in = broker.upload(&id).await.json["expires_in"].as_u64().unwrap();
        let url_ends_in = presigned.json["parts"][0]["expires_in"].as_u64().unwrap();
        assert!(url_ends_in <= 80 && url_ends_in <= ends_in + 1, "{url_ends_in} {ends_in}");
        left.push(ends_in);
    }
    // 60 s and 120 s after the open it is extended by the whole 100 s; 180 s after, only 70 s of 250 s are left.
    assert!((95..=100).contains(&left[0]) && (95..=100).contains(&left[1]) && (60..=70).contains(&left[2]), "{left:?}");
    broker.advance_clock(Duration::from_secs(71));
    presign(&broker, &id, json!({"part_numbers": [1]})).await.expect_problem(410, "upload-expired");
}

#[tokio::test]
async fn urls_given_at_open_expire_with_their_session() {
    let broker = TestBroker::start().await;
    let policy = json!({"session_seconds": 30, "session_max_seconds": 30, "url_seconds": 900});
    broker.put_policy(&broker.topic, &policy).await.expect(200);
    let single = broker.open(b"hello", json!({})).await.expect(201).json;
    let multipart = open(&broker, 2, json!({})).await.json;
    let requests = [(&single, &single["upload"]), (&multipart, &multipart["parts"][0]), (&multipart, &multipart["parts"][1])];
    for (session, request) in requests {
        assert!(request["expires_in"].as_u64().unwrap() <= 30, "{request}");
        assert!(time(&request["expires_at"]) <= time(&session["expires_at"]), "{request}");
        let url = request["url"].as_str().unwrap();
        let url_lifetime = url.split("X-Amz-Expires=").nth(1).unwrap().split('&').next().unwrap();
        assert!(url_lifetime.parse::<u64>().unwrap() <= 30);
    }
}
