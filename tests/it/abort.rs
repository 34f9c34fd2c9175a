//! Taking an upload back.

use std::time::Duration;

use serde_json::json;

use crate::harness::{Answer, House, bytes};

async fn abort(house: &House, id: &str) -> Answer {
    house.delete(&format!("/lfs/uploads/{id}")).await
}

/// Makes it look as if another replica completes this upload at this moment.
async fn completed_elsewhere(house: &House, id: &str, must_read: bool) {
    let taken = sqlx::query(
        "update upload_sessions set state = 'completing', version = version + 1, must_read = $2, lease_attempt = 1,
             lease_owner = gen_random_uuid(), lease_until = clock_timestamp() + interval '1 hour' where id = $1",
    );
    let id: uuid::Uuid = id.parse().unwrap();
    taken.bind(id).bind(must_read).execute(&house.db).await.unwrap();
}

#[tokio::test]
async fn an_open_upload_is_taken_back_once_and_for_all() {
    let house = House::new().await;
    let id = house.open(b"hello", json!({})).await.expect(201).id();
    let gone = abort(&house, &id).await.expect(204);
    assert!(gone.text.is_empty());
    abort(&house, &id).await.expect(204);
    let refused = house.complete(&id).await.expect_problem(410, "upload-aborted");
    assert_eq!(refused.json["upload_state"], "aborted");
    assert_eq!(house.get(&format!("/lfs/uploads/{id}/history")).await.json["items"].as_array().unwrap().len(), 2);
    assert!(house.records(&house.topic).await.is_empty());
}

#[tokio::test]
async fn what_was_put_vanishes_from_s3() {
    let house = House::new().await;
    let single = house.open(b"hello", json!({})).await.expect(201);
    house.put(&single.json["upload"], b"hello").await.expect(200);
    let content = bytes(6 << 20, 1);
    let multipart = house.open(&content, json!({"part_size": 5 << 20})).await.expect(201);
    house.put(&multipart.json["parts"][0], &content[..5 << 20]).await.expect(200);
    let key = multipart.json["object_key"].as_str().unwrap();
    assert_eq!(house.objects().await.len(), 1);
    assert!(house.has_open_multipart(key).await);
    abort(&house, &single.id()).await.expect(204);
    abort(&house, &multipart.id()).await.expect(204);
    house.eventually("the object is gone", || async { house.objects().await.is_empty() }).await;
    house.eventually("the multipart upload is gone", || async { !house.has_open_multipart(key).await }).await;
    // The parts' URLs are good for nothing now.
    assert_eq!(house.put(&multipart.json["parts"][1], &content[5 << 20..]).await.status, 404);
}

#[tokio::test]
async fn an_expired_upload_is_over_already() {
    let house = House::new().await;
    let id = house.open(b"hello", json!({})).await.expect(201).id();
    house.push_clock(Duration::from_secs(3600));
    abort(&house, &id).await.expect(204);
    assert_eq!(house.upload(&id).await.state(), "expired");
    house.complete(&id).await.expect_problem(410, "upload-expired");
}

#[tokio::test]
async fn a_rejected_upload_is_over_already_and_leaves_nothing() {
    let house = House::new().await;
    let opened = house.open(b"hello", json!({})).await.expect(201);
    let key = opened.json["object_key"].as_str().unwrap();
    house.put_object(key, b"olleh", None).await;
    house.complete(&opened.id()).await.expect_problem(422, "object-foreign");
    abort(&house, &opened.id()).await.expect(204);
    assert_eq!(house.upload(&opened.id()).await.state(), "rejected");
    house.eventually("the object is gone", || async { house.objects().await.is_empty() }).await;
}

#[tokio::test]
async fn a_published_upload_cannot_be_taken_back() {
    let house = House::new().await;
    let done = house.publish(b"hello", json!({})).await;
    let refused = abort(&house, &done.id()).await.expect_problem(409, "state-conflict");
    assert_eq!(refused.json["upload_state"], "published");
    assert_eq!(house.objects().await.len(), 1);
    let again = house.complete(&done.id()).await.expect(200);
    assert_eq!(again.json, done.json);
}

#[tokio::test]
async fn an_upload_that_is_being_completed_cannot_be_taken_back_unless_it_is_only_read() {
    let house = House::new().await;
    let finishing = house.open(b"hello", json!({})).await.expect(201).id();
    completed_elsewhere(&house, &finishing, false).await;
    let refused = abort(&house, &finishing).await.expect_problem(409, "completion-in-progress");
    assert_eq!((&refused.json["upload_state"], &refused.json["retryable"]), (&json!("completing"), &json!(true)));
    let read = house.upload(&finishing).await.expect(200);
    assert_eq!((read.state(), read.json["next"].as_str()), ("completing", Some("wait")));

    let opened = house.open(b"hello", json!({})).await.expect(201);
    house.put(&opened.json["upload"], b"hello").await.expect(200);
    completed_elsewhere(&house, &opened.id(), true).await;
    abort(&house, &opened.id()).await.expect(204);
    assert_eq!(house.upload(&opened.id()).await.state(), "aborted");
    house.eventually("the object is gone", || async { house.objects().await.is_empty() }).await;
}

#[tokio::test]
async fn aborts_and_completes_at_once_agree_on_one_outcome() {
    let house = House::new().await;
    for _ in 0..5 {
        let opened = house.open(b"hello", json!({})).await.expect(201);
        house.put(&opened.json["upload"], b"hello").await.expect(200);
        let id = opened.id();
        let (aborted, completed) = tokio::join!(abort(&house, &id), house.complete(&id));
        match (aborted.status, completed.status) {
            (204, 410) => assert_eq!(house.upload(&id).await.state(), "aborted"),
            (409, 200) => assert_eq!(house.upload(&id).await.state(), "published"),
            other => panic!("{other:?}: {} {}", aborted.text, completed.text),
        }
    }
}
