//! An S3 that does a thing and says that it did not, or the other way round: what it holds decides.

use futures_util::future::join_all;
use lfs_broker::app::Settings;
use serde_json::json;

use crate::harness::proxy::{Call, Fault, FaultyS3};
use crate::harness::servers::servers;
use crate::harness::uploads::PART;
use crate::harness::{House, bytes};

pub(crate) async fn house_on(s3: &FaultyS3) -> House {
    let endpoint = s3.endpoint();
    House::with(|settings: &mut Settings| {
        settings.objects.public_endpoint = settings.objects.endpoint.replace(endpoint);
    })
    .await
}

pub(crate) async fn faulty() -> FaultyS3 {
    FaultyS3::before(&servers().s3.endpoint).await
}

/// Uploads in parts with these faults under way; `at_once` is the status of the first complete.
async fn completes(faults: &[(Call, Fault)], at_once: u16) {
    let s3 = faulty().await;
    let house = house_on(&s3).await;
    let content = bytes(PART + 9, 1);
    let opened = house.open_hashed_parts(&content, json!({})).await.expect(201);
    house.put_parts(&opened.json["parts"], &content).await;
    for (call, fault) in faults {
        s3.next(*call, *fault);
    }
    let answer = house.complete(&opened.id()).await;
    assert_eq!(answer.status, at_once, "{faults:?}: {}", answer.text);
    if at_once == 503 {
        answer.expect_problem(503, "completion-unknown");
    }
    let done = house.insist(&opened.id()).await;
    assert!(s3.is_done(), "{faults:?} did not happen");
    let (_, got) = house.only_record().await;
    assert!(got == content, "{faults:?}");
    assert_eq!(done.json["integrity"], "parts-sha256");
    assert!(!house.has_open_multipart(opened.json["object_key"].as_str().unwrap()).await, "{faults:?}");
}

#[tokio::test]
async fn a_join_that_was_done_is_found_whatever_its_answer_was() {
    let faults = [
        Fault::After(200, "InternalError"),
        Fault::After(500, "InternalError"),
        Fault::After(503, "SlowDown"),
        Fault::After(404, "NoSuchUpload"),
        Fault::After(409, "ConditionalRequestConflict"),
        Fault::Cut,
    ];
    join_all(faults.map(|fault| async move { completes(&[(Call::Finish, fault)], 200).await })).await;
}

#[tokio::test]
async fn a_join_that_was_not_done_is_in_doubt_and_done_by_the_next_complete() {
    let faults = [Fault::Instead(200, "InternalError"), Fault::Instead(500, "InternalError"), Fault::Instead(503, "SlowDown")];
    join_all(faults.map(|fault| async move { completes(&[(Call::Finish, fault)], 503).await })).await;
    // No verdict before the join either: 403 is also what S3 says to a clock that is wrong.
    completes(&[(Call::ListParts, Fault::Instead(403, "AccessDenied"))], 503).await;
    let slow = (Call::ListParts, Fault::Instead(503, "SlowDown"));
    completes(&[slow, slow], 503).await;
}

#[tokio::test]
async fn a_joined_object_that_cannot_be_seen_yet_is_not_given_up() {
    let absent = (Call::Head, Fault::Instead(404, "NoSuchKey"));
    completes(&[absent], 503).await;
    let lost = (Call::Finish, Fault::Cut);
    completes(&[lost, absent], 503).await;
    // Not even when everyone who comes next is told that there is neither object nor parts.
    completes(&[absent, (Call::Head, Fault::Instead(503, "SlowDown")), (Call::Head, Fault::Instead(503, "SlowDown"))], 503).await;
}

#[tokio::test]
async fn a_call_that_s3_slows_down_is_made_again_at_once() {
    completes(&[(Call::ListParts, Fault::Instead(503, "SlowDown"))], 200).await;
    completes(&[(Call::ListParts, Fault::Cut)], 200).await;
    completes(&[(Call::Head, Fault::Instead(500, "InternalError"))], 200).await;
    completes(
        &[
            (Call::Head, Fault::Instead(403, "RequestTimeTooSkewed")),
            (Call::ListParts, Fault::Instead(403, "RequestTimeTooSkewed")),
        ],
        503,
    )
    .await;
}

#[tokio::test]
async fn a_put_that_cannot_be_seen_yet_is_asked_for_again() {
    let s3 = faulty().await;
    let house = house_on(&s3).await;
    let opened = house.put_up(b"hello", json!({})).await;
    s3.next(Call::Head, Fault::Instead(404, "NoSuchKey"));
    let missing = house.complete(&opened.id()).await.expect_problem(409, "object-missing");
    assert_eq!((&missing.json["upload_state"], &missing.json["retryable"]), (&json!("open"), &json!(true)));
    house.complete(&opened.id()).await.expect(200);
    assert_eq!(house.records(&house.topic).await.len(), 1);
}

#[tokio::test]
async fn a_multipart_upload_that_could_not_be_looked_for_is_looked_for_again() {
    let s3 = faulty().await;
    let house = house_on(&s3).await;
    let content = bytes(PART + 9, 3);
    s3.next(Call::Begin, Fault::Cut);
    let body =
        json!({"topic": house.topic, "size": content.len(), "sha256": crate::harness::sha256(&content), "part_size": PART});
    let open = || house.send(house.request("POST", "/lfs/uploads").header("idempotency-key", "one").json(&body));
    let mut opened = open().await;
    if opened.status == 503 {
        opened = open().await.expect(200);
    }
    house.put_parts(&opened.json["parts"], &content).await;
    // As often as one look tries.
    s3.next(Call::ListUploads, Fault::Instead(503, "SlowDown"));
    s3.next(Call::ListUploads, Fault::Instead(503, "SlowDown"));
    house.complete(&opened.id()).await.expect_problem(503, "completion-unknown");
    house.insist(&opened.id()).await;
    assert!(s3.is_done(), "nobody looked");
    assert!(!house.has_open_multipart(opened.json["object_key"].as_str().unwrap()).await);
    assert_eq!(house.records(&house.topic).await.len(), 1);
}

#[tokio::test]
async fn a_multipart_upload_whose_begin_was_not_answered_is_left_to_nobody() {
    for fault in [Fault::After(500, "InternalError"), Fault::Cut] {
        let s3 = faulty().await;
        let house = house_on(&s3).await;
        let content = bytes(PART + 9, 2);
        // The start tries the store out.
        let before = s3.count(Call::Begin);
        s3.next(Call::Begin, fault);
        let body =
            json!({"topic": house.topic, "size": content.len(), "sha256": crate::harness::sha256(&content), "part_size": PART});
        let open = || house.send(house.request("POST", "/lfs/uploads").header("idempotency-key", "one").json(&body));
        let mut opened = open().await;
        if opened.status == 503 {
            opened = open().await.expect(200);
        }
        assert_eq!(s3.count(Call::Begin) - before, 2, "{fault:?}");
        let key = opened.json["object_key"].as_str().unwrap();
        house.put_parts(&opened.json["parts"], &content).await;
        house.insist(&opened.id()).await;
        assert!(!house.has_open_multipart(key).await, "{fault:?}");
        let (_, got) = house.only_record().await;
        assert!(got == content);
    }
}
