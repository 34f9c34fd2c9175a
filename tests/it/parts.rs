//! Signing parts, again and on demand.

use std::time::Duration;

use serde_json::{Value, json};

use crate::harness::{Answer, House, bytes, sha256, time};

const MIB: usize = 1 << 20;

/// Opens a multipart upload of 5 MiB parts that nobody will put.
async fn open(house: &House, parts: usize, more: Value) -> Answer {
    let mut body = json!({"topic": house.topic, "size": parts * 5 * MIB, "sha256": sha256(b"x"), "part_size": 5 * MIB});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    house.post("/lfs/uploads", &body).await.expect(201)
}

async fn sign(house: &House, id: &str, body: Value) -> Answer {
    house.post(&format!("/lfs/uploads/{id}/parts"), &body).await
}

fn numbers(answer: &Value) -> Vec<u64> {
    answer["parts"].as_array().unwrap().iter().map(|part| part["part_number"].as_u64().unwrap()).collect()
}

#[tokio::test]
async fn open_signs_the_first_hundred_parts_and_the_others_are_signed_on_demand() {
    let house = House::new().await;
    let opened = open(&house, 250, json!({"size": 249 * 5 * MIB + 7})).await;
    assert_eq!(numbers(&opened.json), (1..=100).collect::<Vec<u64>>());
    assert_eq!(opened.json["part_count"], 250);
    let wanted: Vec<u64> = (151..=250).rev().collect();
    let signed = sign(&house, &opened.id(), json!({"part_numbers": wanted})).await.expect(200);
    assert_eq!(numbers(&signed.json), wanted, "in the order they were asked for");
    let (last, first) = (&signed.json["parts"][0], &signed.json["parts"][99]);
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
async fn a_call_asks_for_1_to_100_parts_that_exist_each_once() {
    let house = House::new().await;
    let id = open(&house, 120, json!({})).await.id();
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
        let answer = sign(&house, &id, body.clone()).await.expect_problem(422, "validation-failed");
        assert_eq!(answer.json["errors"][0]["pointer"], pointer, "{body}: {}", answer.text);
    }
    sign(&house, &id, json!({"part_numbers": (1..=100).collect::<Vec<u32>>()})).await.expect(200);
    sign(&house, &id, json!({"parts": [{"part_number": 120}]})).await.expect(200);
}

#[tokio::test]
async fn a_hash_that_nobody_expects_is_refused() {
    let house = House::new().await;
    let id = open(&house, 2, json!({})).await.id();
    let body = json!({"parts": [{"part_number": 1, "sha256": sha256(b"a")}]});
    sign(&house, &id, body).await.expect_problem(422, "validation-failed");
}

#[tokio::test]
async fn deferred_hashes_come_with_each_call_and_stand_from_then_on() {
    let house = House::new().await;
    let opened = open(&house, 3, json!({"part_hashes": "deferred"})).await;
    assert_eq!(opened.json["parts"], json!([]));
    let id = opened.id();
    let part = |number: u32, content: &[u8]| json!({"part_number": number, "sha256": sha256(content)});
    sign(&house, &id, json!({"part_numbers": [1]})).await.expect_problem(422, "validation-failed");
    sign(&house, &id, json!({"parts": [part(1, b"a"), {"part_number": 2}]})).await.expect_problem(422, "validation-failed");
    let signed = sign(&house, &id, json!({"parts": [part(1, b"a")]})).await.expect(200);
    assert!(signed.json["parts"][0]["headers"]["x-amz-checksum-sha256"].is_string());
    let upper = json!({"part_number": 1, "sha256": sha256(b"a").to_uppercase()});
    sign(&house, &id, json!({"parts": [upper]})).await.expect(200);
    // Refused as a whole: the second part is not promised by it.
    let conflict = sign(&house, &id, json!({"parts": [part(2, b"b"), part(1, b"other")]})).await;
    assert_eq!(conflict.expect_problem(409, "state-conflict").json["upload_state"], "open");
    sign(&house, &id, json!({"parts": [part(2, b"c")]})).await.expect(200);
}

#[tokio::test]
async fn hashes_given_at_open_are_signed_and_cannot_be_changed() {
    let house = House::new().await;
    let hashes = json!([sha256(b"a"), sha256(b"b")]);
    let opened = open(&house, 2, json!({"part_sha256": hashes})).await;
    let id = opened.id();
    let header = |answer: &Value, index: usize| answer["parts"][index]["headers"]["x-amz-checksum-sha256"].clone();
    let again = sign(&house, &id, json!({"part_numbers": [2, 1]})).await.expect(200).json;
    assert_eq!((header(&again, 0), header(&again, 1)), (header(&opened.json, 1), header(&opened.json, 0)));
    assert!(header(&again, 0).is_string());
    sign(&house, &id, json!({"parts": [{"part_number": 1, "sha256": sha256(b"a")}]})).await.expect(200);
    let other = json!({"parts": [{"part_number": 1, "sha256": sha256(b"b")}]});
    sign(&house, &id, other).await.expect_problem(409, "state-conflict");
}

#[tokio::test]
async fn a_url_for_a_part_puts_that_part() {
    let house = House::new().await;
    let content = bytes(6 * MIB, 1);
    let opened = house.open(&content, json!({"part_size": 5 * MIB})).await.expect(201);
    let signed = sign(&house, &opened.id(), json!({"part_numbers": [2, 1]})).await.expect(200);
    house.put_parts(&signed.json["parts"], &content).await;
    assert_eq!(house.upload(&opened.id()).await.json["next"], "complete");
    house.complete(&opened.id()).await;
    house.until(&opened.id(), "published").await;
    sign(&house, &opened.id(), json!({"part_numbers": [1]})).await.expect_problem(409, "state-conflict");
}

#[tokio::test]
async fn only_open_multipart_uploads_have_parts_to_sign() {
    let house = House::new().await;
    let ask = json!({"part_numbers": [1]});
    let single = house.open(b"hello", json!({})).await.expect(201).id();
    let refused = sign(&house, &single, ask.clone()).await.expect_problem(409, "state-conflict");
    assert_eq!(refused.json["upload_state"], "open");
    let aborted = open(&house, 2, json!({})).await.id();
    house.delete(&format!("/lfs/uploads/{aborted}")).await.expect(204);
    sign(&house, &aborted, ask.clone()).await.expect_problem(410, "upload-aborted");
    let expired = open(&house, 2, json!({})).await.id();
    house.push_clock(Duration::from_secs(3600));
    sign(&house, &expired, ask.clone()).await.expect_problem(410, "upload-expired");
    // However the question is put: the end comes first.
    sign(&house, &expired, json!({"part_numbers": [99]})).await.expect_problem(410, "upload-expired");
}

#[tokio::test]
async fn signing_slides_the_end_up_to_the_hard_maximum_and_no_url_outlives_it() {
    let house = House::new().await;
    let policy = json!({"session_seconds": 100, "session_max_seconds": 250, "url_seconds": 80});
    house.put_policy(&house.topic, &policy).await.expect(200);
    let id = open(&house, 2, json!({})).await.id();
    let mut left = Vec::new();
    for _ in 0..3 {
        house.push_clock(Duration::from_secs(60));
        let signed = sign(&house, &id, json!({"part_numbers": [1]})).await.expect(200);
        let ends_in = house.upload(&id).await.json["expires_in"].as_u64().unwrap();
        let url_ends_in = signed.json["parts"][0]["expires_in"].as_u64().unwrap();
        assert!(url_ends_in <= 80 && url_ends_in <= ends_in + 1, "{url_ends_in} {ends_in}");
        left.push(ends_in);
    }
    // 60 s and 120 s after the open it slides by the whole 100 s; 180 s after, only 70 s are left of 250.
    assert!((95..=100).contains(&left[0]) && (95..=100).contains(&left[1]) && (60..=70).contains(&left[2]), "{left:?}");
    house.push_clock(Duration::from_secs(71));
    sign(&house, &id, json!({"part_numbers": [1]})).await.expect_problem(410, "upload-expired");
}

#[tokio::test]
async fn urls_given_at_open_end_with_their_session() {
    let house = House::new().await;
    let policy = json!({"session_seconds": 30, "session_max_seconds": 30, "url_seconds": 900});
    house.put_policy(&house.topic, &policy).await.expect(200);
    let single = house.open(b"hello", json!({})).await.expect(201).json;
    let multipart = open(&house, 2, json!({})).await.json;
    let requests = [(&single, &single["upload"]), (&multipart, &multipart["parts"][0]), (&multipart, &multipart["parts"][1])];
    for (session, request) in requests {
        assert!(request["expires_in"].as_u64().unwrap() <= 30, "{request}");
        assert!(time(&request["expires_at"]) <= time(&session["expires_at"]), "{request}");
        let url = request["url"].as_str().unwrap();
        let signed_life = url.split("X-Amz-Expires=").nth(1).unwrap().split('&').next().unwrap();
        assert!(signed_life.parse::<u64>().unwrap() <= 30);
    }
}
