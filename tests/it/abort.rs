//! Aborting an upload with `DELETE /lfs/uploads/{id}`.

use std::time::Duration;

use serde_json::json;

use crate::harness::{ApiResponse, TestBroker, bytes};

async fn abort(broker: &TestBroker, id: &str) -> ApiResponse {
    broker.delete(&format!("/lfs/uploads/{id}")).await
}

/// Makes the session look as if another replica completes it now.
async fn lease_to_another_replica(broker: &TestBroker, id: &str, must_read: bool) {
    let lease = sqlx::query(
        "update upload_sessions set state = 'completing', version = version + 1, must_read = $2, lease_attempt = 1,
             lease_owner = gen_random_uuid(), lease_until = clock_timestamp() + interval '1 hour' where id = $1",
    );
    let id: uuid::Uuid = id.parse().unwrap();
    lease.bind(id).bind(must_read).execute(&broker.db).await.unwrap();
}

#[tokio::test]
async fn an_open_upload_can_be_aborted_and_stays_aborted() {
    let broker = TestBroker::start().await;
    let id = broker.open(b"hello", json!({})).await.expect(201).id();
    let aborted = abort(&broker, &id).await.expect(204);
    assert!(aborted.text.is_empty());
    abort(&broker, &id).await.expect(204);
    let refused = broker.complete(&id).await.expect_problem(410, "upload-aborted");
    assert_eq!(refused.json["upload_state"], "aborted");
    assert_eq!(broker.get(&format!("/lfs/uploads/{id}/history")).await.json["items"].as_array().unwrap().len(), 2);
    assert!(broker.records(&broker.topic).await.is_empty());
}

#[tokio::test]
async fn aborting_removes_the_uploaded_bytes_from_s3() {
    let broker = TestBroker::start().await;
    let single = broker.open(b"hello", json!({})).await.expect(201);
    broker.put(&single.json["upload"], b"hello").await.expect(200);
    let content = bytes(6 << 20, 1);
    let multipart = broker.open(&content, json!({"part_size": 5 << 20})).await.expect(201);
    broker.put(&multipart.json["parts"][0], &content[..5 << 20]).await.expect(200);
    let key = multipart.json["object_key"].as_str().unwrap();
    assert_eq!(broker.objects().await.len(), 1);
    assert!(broker.has_open_multipart(key).await);
    abort(&broker, &single.id()).await.expect(204);
    abort(&broker, &multipart.id()).await.expect(204);
    broker.eventually("the object is gone", || async { broker.objects().await.is_empty() }).await;
    broker.eventually("the multipart upload is gone", || async { !broker.has_open_multipart(key).await }).await;
    // The part URLs fail now, because their multipart upload is gone.
    assert_eq!(broker.put(&multipart.json["parts"][1], &content[5 << 20..]).await.status, 404);
}

#[tokio::test]
async fn aborting_an_expired_upload_changes_nothing() {
    let broker = TestBroker::start().await;
    let id = broker.open(b"hello", json!({})).await.expect(201).id();
    broker.advance_clock(Duration::from_secs(3600));
    abort(&broker, &id).await.expect(204);
    assert_eq!(broker.upload(&id).await.state(), "expired");
    broker.complete(&id).await.expect_problem(410, "upload-expired");
}

#[tokio::test]
async fn aborting_a_rejected_upload_changes_nothing_and_its_object_is_removed() {
    let broker = TestBroker::start().await;
    let opened = broker.open(b"hello", json!({})).await.expect(201);
    let key = opened.json["object_key"].as_str().unwrap();
    broker.put_object(key, b"olleh", None).await;
    broker.complete(&opened.id()).await.expect_problem(422, "object-foreign");
    abort(&broker, &opened.id()).await.expect(204);
    assert_eq!(broker.upload(&opened.id()).await.state(), "rejected");
    broker.eventually("the object is gone", || async { broker.objects().await.is_empty() }).await;
}

#[tokio::test]
async fn a_published_upload_cannot_be_aborted() {
    let broker = TestBroker::start().await;
    let done = broker.publish(b"hello", json!({})).await;
    let refused = abort(&broker, &done.id()).await.expect_problem(409, "state-conflict");
    assert_eq!(refused.json["upload_state"], "published");
    assert_eq!(broker.objects().await.len(), 1);
    let again = broker.complete(&done.id()).await.expect(200);
    assert_eq!(again.json, done.json);
}

#[tokio::test]
async fn an_upload_can_be_aborted_during_completion_only_while_the_broker_reads_it_back() {
    let broker = TestBroker::start().await;
    let completing = broker.open(b"hello", json!({})).await.expect(201).id();
    lease_to_another_replica(&broker, &completing, false).await;
    let refused = abort(&broker, &completing).await.expect_problem(409, "completion-in-progress");
    assert_eq!((&refused.json["upload_state"], &refused.json["retryable"]), (&json!("completing"), &json!(true)));
    let read = broker.upload(&completing).await.expect(200);
    assert_eq!((read.state(), read.json["next"].as_str()), ("completing", Some("wait")));

    let opened = broker.open(b"hello", json!({})).await.expect(201);
    broker.put(&opened.json["upload"], b"hello").await.expect(200);
    lease_to_another_replica(&broker, &opened.id(), true).await;
    abort(&broker, &opened.id()).await.expect(204);
    assert_eq!(broker.upload(&opened.id()).await.state(), "aborted");
    broker.eventually("the object is gone", || async { broker.objects().await.is_empty() }).await;
}

#[tokio::test]
async fn concurrent_aborts_and_completes_agree_on_one_outcome() {
    let broker = TestBroker::start().await;
    for _ in 0..5 {
        let opened = broker.open(b"hello", json!({})).await.expect(201);
        broker.put(&opened.json["upload"], b"hello").await.expect(200);
        let id = opened.id();
        let (aborted, completed) = tokio::join!(abort(&broker, &id), broker.complete(&id));
        match (aborted.status, completed.status) {
            (204, 410) => assert_eq!(broker.upload(&id).await.state(), "aborted"),
            (409, 200) => assert_eq!(broker.upload(&id).await.state(), "published"),
            other => panic!("{other:?}: {} {}", aborted.text, completed.text),
        }
    }
}
