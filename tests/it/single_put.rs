//! A single PUT, from open to the download.

use serde_json::json;

use crate::harness::uploads::PART_BYTES;
use crate::harness::{TestBroker, sha256};

#[tokio::test]
async fn an_upload_is_downloaded_unchanged_with_the_pointer_from_kafka() {
    let broker = TestBroker::start().await;
    let content = b"hello, claim check";
    let opened = broker
        .open(
            content,
            json!({"key": "order-17", "content_type": "text/plain", "filename": "a.txt", "headers": {"trace": "abc", "a": "1"}}),
        )
        .await
        .expect(201);
    assert_eq!(opened.json["mode"], "single");
    assert_eq!(opened.headers["location"], format!("/lfs/uploads/{}", opened.id()));
    broker.put(&opened.json["upload"], content).await.expect(200);
    let done = broker.complete(&opened.id()).await.expect(200);
    assert_eq!((done.state(), done.json["integrity"].as_str()), ("published", Some("sha256")));

    let records = broker.records(&broker.topic).await;
    assert_eq!(records.len(), 1);
    let record = &records[0];
    assert_eq!(record.key.as_deref(), Some(b"order-17".as_slice()));
    assert_eq!(serde_json::from_slice::<serde_json::Value>(&record.value).unwrap(), done.json["pointer"]);
    assert_eq!(
        (json!(record.partition), json!(record.offset)),
        (done.json["record"]["partition"].clone(), done.json["record"]["offset"].clone())
    );
    let headers: Vec<(&str, &str)> = record.headers.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    let id = opened.id();
    assert_eq!(headers, [("lfs-upload-id", id.as_str()), ("lfs-integrity", "sha256"), ("a", "1"), ("trace", "abc")]);

    let resolved = broker
        .send(
            broker
                .http
                .post(format!("{}/lfs/resolve", broker.url()))
                .header("content-type", "application/json")
                .body(record.value.clone()),
        )
        .await
        .expect(200);
    assert_eq!(resolved.json["filename"], "a.txt");
    let got = broker.http.get(resolved.json["url"].as_str().unwrap()).send().await.unwrap();
    assert!(got.headers()["content-disposition"].to_str().unwrap().starts_with("attachment"));
    assert_eq!(sha256(&got.bytes().await.unwrap()), sha256(content));
}

#[tokio::test]
async fn an_empty_upload_is_a_single_put_and_a_pointer_to_an_empty_object() {
    let broker = TestBroker::start().await;
    let opened = broker.open(b"", json!({"part_size": PART_BYTES})).await.expect(201);
    assert_eq!((opened.json["mode"].as_str(), opened.json["size"].as_u64()), (Some("single"), Some(0)));
    broker.put(&opened.json["upload"], b"").await.expect(200);
    let done = broker.complete(&opened.id()).await.expect(200);
    assert_eq!((done.json["integrity"].as_str(), done.json["pointer"]["size"].as_u64()), (Some("sha256"), Some(0)));
    let (record, content) = broker.only_record().await;
    assert_eq!((record.json()["sha256"].as_str(), content.len()), (Some(sha256(b"").as_str()), 0));
}

#[tokio::test]
async fn completing_before_the_put_leaves_the_upload_open() {
    let broker = TestBroker::start().await;
    let opened = broker.open(b"hello", json!({})).await.expect(201);
    let id = opened.id();
    for _ in 0..2 {
        let refused = broker.complete(&id).await.expect_problem(409, "object-missing");
        assert_eq!((refused.json["upload_state"].as_str(), refused.json["retryable"].as_bool()), (Some("open"), Some(true)));
    }
    let read = broker.upload(&id).await.expect(200);
    assert_eq!((read.state(), read.json["next"].as_str()), ("open", Some("put")));
    assert_eq!(read.json["error"]["code"], "object-missing");

    broker.put(&opened.json["upload"], b"hello").await.expect(200);
    assert_eq!(broker.upload(&id).await.json["next"], "complete");
    let done = broker.complete(&id).await.expect(200);
    assert_eq!(done.state(), "published");
    let read = broker.upload(&id).await.expect(200);
    assert_eq!((read.json["next"].as_str(), read.json.get("error")), (Some("none"), None));
    assert_eq!(broker.records(&broker.topic).await.len(), 1);
}

#[tokio::test]
async fn wrong_bytes_are_refused_by_s3_and_the_right_ones_can_still_be_put() {
    let broker = TestBroker::start().await;
    let opened = broker.open(b"right", json!({})).await.expect(201);
    broker.put(&opened.json["upload"], b"wrong").await.expect(400);
    broker.complete(&opened.id()).await.expect_problem(409, "object-missing");
    assert_eq!(broker.objects().await, Vec::<String>::new());
    broker.put(&opened.json["upload"], b"right").await.expect(200);
    broker.complete(&opened.id()).await.expect(200);
    assert_eq!(broker.only_record().await.1, b"right");
}

#[tokio::test]
async fn another_number_of_bytes_than_declared_is_refused_by_s3() {
    let broker = TestBroker::start().await;
    // The URL has no checksum, so only the signed length protects it.
    let opened = broker.open(b"hello", json!({"sha256": null})).await.expect(201);
    for wrong in [b"hell".as_slice(), b"hello!"] {
        broker.put(&opened.json["upload"], wrong).await.expect(403);
    }
    assert_eq!(broker.objects().await, Vec::<String>::new());
}

#[tokio::test]
async fn a_sha256_that_comes_with_complete_is_verified_by_reading_the_bytes_back() {
    let broker = TestBroker::start().await;
    let opened = broker.open(b"a stream", json!({"sha256": null})).await.expect(201);
    assert_eq!(opened.json["upload"]["headers"].get("x-amz-checksum-sha256"), None);
    broker.put(&opened.json["upload"], b"a stream").await.expect(200);
    let published = broker.complete_and_wait(&opened.id(), json!({"sha256": sha256(b"a stream").to_uppercase()})).await;
    assert_eq!(published.json["integrity"], "sha256");
    let (record, content) = broker.only_record().await;
    assert_eq!((record.json()["sha256"].as_str(), content), (Some(sha256(b"a stream").as_str()), b"a stream".to_vec()));
    assert_eq!(record.header("lfs-integrity"), Some("sha256"));
}

#[tokio::test]
async fn a_wrong_sha256_that_comes_with_complete_rejects_the_upload() {
    let broker = TestBroker::start().await;
    let opened = broker.open(b"a stream", json!({"sha256": null})).await.expect(201);
    broker.put(&opened.json["upload"], b"a stream").await.expect(200);
    let wrong = json!({"sha256": sha256(b"another")});
    let first = broker.complete_with(&opened.id(), wrong.clone()).await.expect_problem(422, "checksum-mismatch");
    assert_eq!(first.json["upload_state"], "rejected");
    let again = broker.complete_with(&opened.id(), wrong).await.expect_problem(422, "checksum-mismatch");
    assert_eq!(first.json["detail"], again.json["detail"]);
    // The rejection is final: a right hash does not change the response.
    let right = json!({"sha256": sha256(b"a stream")});
    let again = broker.complete_with(&opened.id(), right).await.expect_problem(422, "checksum-mismatch");
    assert_eq!(first.json["detail"], again.json["detail"]);
    broker.wait_until_s3_is_empty(opened.json["object_key"].as_str().unwrap()).await;
    assert_eq!(broker.records(&broker.topic).await.len(), 0);
}

#[tokio::test]
async fn a_sha256_is_required_once_and_cannot_be_changed() {
    let broker = TestBroker::start().await;
    let stream = broker.open(b"stream", json!({"sha256": null})).await.expect(201);
    broker.put(&stream.json["upload"], b"stream").await.expect(200);
    let refused = broker.complete(&stream.id()).await.expect_problem(422, "validation-failed");
    assert_eq!(refused.json["upload_state"], "open");
    assert_eq!(broker.upload(&stream.id()).await.state(), "open");
    broker.complete_and_wait(&stream.id(), json!({"sha256": sha256(b"stream")})).await;

    let known = broker.open(b"known", json!({})).await.expect(201);
    broker.put(&known.json["upload"], b"known").await.expect(200);
    let other = json!({"sha256": sha256(b"other")});
    broker.complete_with(&known.id(), other.clone()).await.expect_problem(422, "validation-failed");
    assert_eq!(broker.upload(&known.id()).await.state(), "open");
    broker.complete_with(&known.id(), json!({"sha256": sha256(b"known")})).await.expect(200);
    broker.complete_with(&known.id(), other).await.expect_problem(422, "validation-failed");
    broker.complete(&known.id()).await.expect(200);
    assert_eq!(broker.records(&broker.topic).await.len(), 2);
}
