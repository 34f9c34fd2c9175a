//! S3 calls whose response is wrong: the broker trusts only the state that S3 holds.

use futures_util::future::join_all;
use lfs_broker::app::Settings;
use serde_json::json;

use crate::harness::fault_proxy::{Call, Fault, FaultyS3};
use crate::harness::servers::servers;
use crate::harness::uploads::PART_BYTES;
use crate::harness::{TestBroker, bytes, sha256};

pub(crate) async fn start_broker_on(s3: &FaultyS3) -> TestBroker {
    let endpoint = s3.endpoint();
    TestBroker::start_with(|settings: &mut Settings| {
        settings.objects.public_endpoint = settings.objects.endpoint.replace(endpoint);
    })
    .await
}

pub(crate) async fn start_faulty_s3() -> FaultyS3 {
    FaultyS3::in_front_of(&servers().s3.endpoint).await
}

/// Uploads in parts with these faults. `first_status` is the status of the first complete.
async fn completes_despite(faults: &[(Call, Fault)], first_status: u16) {
    let s3 = start_faulty_s3().await;
    let broker = start_broker_on(&s3).await;
    let content = bytes(PART_BYTES + 9, 1);
    let opened = broker.open_multipart_with_hashes(&content, json!({})).await.expect(201);
    broker.put_parts(&opened.json["parts"], &content).await;
    for (call, fault) in faults {
        s3.fail_next(*call, *fault);
    }
    let response = broker.complete(&opened.id()).await;
    assert_eq!(response.status, first_status, "{faults:?}: {}", response.text);
    if first_status == 503 {
        response.expect_problem(503, "completion-unknown");
    }
    let done = broker.complete_with_retries(&opened.id()).await;
    assert!(s3.all_faults_happened(), "{faults:?} did not happen");
    let (_, downloaded) = broker.only_record().await;
    assert!(downloaded == content, "{faults:?}");
    assert_eq!(done.json["integrity"], "parts-sha256");
    assert!(!broker.has_open_multipart(opened.json["object_key"].as_str().unwrap()).await, "{faults:?}");
}

#[tokio::test]
async fn a_join_that_s3_executed_is_found_whatever_its_response_was() {
    let faults = [
        Fault::ExecutedThenError(200, "InternalError"),
        Fault::ExecutedThenError(500, "InternalError"),
        Fault::ExecutedThenError(503, "SlowDown"),
        Fault::ExecutedThenError(404, "NoSuchUpload"),
        Fault::ExecutedThenError(409, "ConditionalRequestConflict"),
        Fault::ExecutedThenCut,
    ];
    join_all(faults.map(|fault| async move { completes_despite(&[(Call::CompleteMultipart, fault)], 200).await })).await;
}

#[tokio::test]
async fn a_join_that_s3_did_not_execute_is_unknown_and_done_by_the_next_complete() {
    let faults =
        [Fault::NotExecuted(200, "InternalError"), Fault::NotExecuted(500, "InternalError"), Fault::NotExecuted(503, "SlowDown")];
    join_all(faults.map(|fault| async move { completes_despite(&[(Call::CompleteMultipart, fault)], 503).await })).await;
    // Before the join 403 is no final answer either: S3 also answers 403 when the broker's clock is wrong.
    completes_despite(&[(Call::ListParts, Fault::NotExecuted(403, "AccessDenied"))], 503).await;
    let slow = (Call::ListParts, Fault::NotExecuted(503, "SlowDown"));
    completes_despite(&[slow, slow], 503).await;
}

#[tokio::test]
async fn an_upload_whose_joined_object_is_not_visible_yet_is_not_rejected() {
    let not_visible = (Call::Head, Fault::NotExecuted(404, "NoSuchKey"));
    completes_despite(&[not_visible], 503).await;
    let response_lost = (Call::CompleteMultipart, Fault::ExecutedThenCut);
    completes_despite(&[response_lost, not_visible], 503).await;
    // Not even if every later call finds neither the object nor the parts.
    completes_despite(
        &[not_visible, (Call::Head, Fault::NotExecuted(503, "SlowDown")), (Call::Head, Fault::NotExecuted(503, "SlowDown"))],
        503,
    )
    .await;
}

#[tokio::test]
async fn a_call_that_s3_throttles_is_retried_at_once() {
    completes_despite(&[(Call::ListParts, Fault::NotExecuted(503, "SlowDown"))], 200).await;
    completes_despite(&[(Call::ListParts, Fault::ExecutedThenCut)], 200).await;
    completes_despite(&[(Call::Head, Fault::NotExecuted(500, "InternalError"))], 200).await;
    completes_despite(
        &[
            (Call::Head, Fault::NotExecuted(403, "RequestTimeTooSkewed")),
            (Call::ListParts, Fault::NotExecuted(403, "RequestTimeTooSkewed")),
        ],
        503,
    )
    .await;
}

#[tokio::test]
async fn a_put_that_is_not_visible_yet_can_be_completed_later() {
    let s3 = start_faulty_s3().await;
    let broker = start_broker_on(&s3).await;
    let opened = broker.open_and_put(b"hello", json!({})).await;
    s3.fail_next(Call::Head, Fault::NotExecuted(404, "NoSuchKey"));
    let missing = broker.complete(&opened.id()).await.expect_problem(409, "object-missing");
    assert_eq!((&missing.json["upload_state"], &missing.json["retryable"]), (&json!("open"), &json!(true)));
    broker.complete(&opened.id()).await.expect(200);
    assert_eq!(broker.records(&broker.topic).await.len(), 1);
}

#[tokio::test]
async fn a_stray_multipart_upload_that_could_not_be_listed_is_looked_for_again() {
    let s3 = start_faulty_s3().await;
    let broker = start_broker_on(&s3).await;
    let content = bytes(PART_BYTES + 9, 3);
    s3.fail_next(Call::CreateMultipart, Fault::ExecutedThenCut);
    let body = json!({"topic": broker.topic, "size": content.len(), "sha256": sha256(&content), "part_size": PART_BYTES});
    let open = || broker.send(broker.request("POST", "/lfs/uploads").header("idempotency-key", "one").json(&body));
    let mut opened = open().await;
    if opened.status == 503 {
        opened = open().await.expect(200);
    }
    broker.put_parts(&opened.json["parts"], &content).await;
    // As many failures as one listing has attempts.
    s3.fail_next(Call::ListUploads, Fault::NotExecuted(503, "SlowDown"));
    s3.fail_next(Call::ListUploads, Fault::NotExecuted(503, "SlowDown"));
    broker.complete(&opened.id()).await.expect_problem(503, "completion-unknown");
    broker.complete_with_retries(&opened.id()).await;
    assert!(s3.all_faults_happened(), "the broker did not list uploads again");
    assert!(!broker.has_open_multipart(opened.json["object_key"].as_str().unwrap()).await);
    assert_eq!(broker.records(&broker.topic).await.len(), 1);
}

#[tokio::test]
async fn a_multipart_upload_whose_creation_was_not_answered_is_aborted() {
    for fault in [Fault::ExecutedThenError(500, "InternalError"), Fault::ExecutedThenCut] {
        let s3 = start_faulty_s3().await;
        let broker = start_broker_on(&s3).await;
        let content = bytes(PART_BYTES + 9, 2);
        // The probe at the start creates multipart uploads too.
        let before = s3.count(Call::CreateMultipart);
        s3.fail_next(Call::CreateMultipart, fault);
        let body = json!({"topic": broker.topic, "size": content.len(), "sha256": sha256(&content), "part_size": PART_BYTES});
        let open = || broker.send(broker.request("POST", "/lfs/uploads").header("idempotency-key", "one").json(&body));
        let mut opened = open().await;
        if opened.status == 503 {
            opened = open().await.expect(200);
        }
        assert_eq!(s3.count(Call::CreateMultipart) - before, 2, "{fault:?}");
        let key = opened.json["object_key"].as_str().unwrap();
        broker.put_parts(&opened.json["parts"], &content).await;
        broker.complete_with_retries(&opened.id()).await;
        assert!(!broker.has_open_multipart(key).await, "{fault:?}");
        let (_, downloaded) = broker.only_record().await;
        assert!(downloaded == content);
    }
}
