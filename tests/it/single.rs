//! One PUT, from open to the bytes again.

use serde_json::json;

use crate::harness::uploads::PART;
use crate::harness::{House, sha256};

#[tokio::test]
async fn bytes_come_back_through_the_pointer_in_kafka() {
    let house = House::new().await;
    let content = b"hello, claim check";
    let opened = house
        .open(
            content,
            json!({"key": "order-17", "content_type": "text/plain", "filename": "a.txt", "headers": {"trace": "abc", "a": "1"}}),
        )
        .await
        .expect(201);
    assert_eq!(opened.json["mode"], "single");
    assert_eq!(opened.headers["location"], format!("/lfs/uploads/{}", opened.id()));
    house.put(&opened.json["upload"], content).await.expect(200);
    let done = house.complete(&opened.id()).await.expect(200);
    assert_eq!((done.state(), done.json["integrity"].as_str()), ("published", Some("sha256")));

    let records = house.records(&house.topic).await;
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

    let resolved = house
        .send(
            house
                .http
                .post(format!("{}/lfs/resolve", house.url()))
                .header("content-type", "application/json")
                .body(record.value.clone()),
        )
        .await
        .expect(200);
    assert_eq!(resolved.json["filename"], "a.txt");
    let got = house.http.get(resolved.json["url"].as_str().unwrap()).send().await.unwrap();
    assert!(got.headers()["content-disposition"].to_str().unwrap().starts_with("attachment"));
    assert_eq!(sha256(&got.bytes().await.unwrap()), sha256(content));
}

#[tokio::test]
async fn an_empty_upload_is_one_put_and_a_pointer_to_nothing() {
    let house = House::new().await;
    let opened = house.open(b"", json!({"part_size": PART})).await.expect(201);
    assert_eq!((opened.json["mode"].as_str(), opened.json["size"].as_u64()), (Some("single"), Some(0)));
    house.put(&opened.json["upload"], b"").await.expect(200);
    let done = house.complete(&opened.id()).await.expect(200);
    assert_eq!((done.json["integrity"].as_str(), done.json["pointer"]["size"].as_u64()), (Some("sha256"), Some(0)));
    let (record, content) = house.only_record().await;
    assert_eq!((record.json()["sha256"].as_str(), content.len()), (Some(sha256(b"").as_str()), 0));
}

#[tokio::test]
async fn completing_before_anything_was_put_leaves_the_upload_open() {
    let house = House::new().await;
    let opened = house.open(b"hello", json!({})).await.expect(201);
    let id = opened.id();
    for _ in 0..2 {
        let refused = house.complete(&id).await.expect_problem(409, "object-missing");
        assert_eq!((refused.json["upload_state"].as_str(), refused.json["retryable"].as_bool()), (Some("open"), Some(true)));
    }
    let read = house.upload(&id).await.expect(200);
    assert_eq!((read.state(), read.json["next"].as_str()), ("open", Some("put")));
    assert_eq!(read.json["error"]["code"], "object-missing");

    house.put(&opened.json["upload"], b"hello").await.expect(200);
    assert_eq!(house.upload(&id).await.json["next"], "complete");
    let done = house.complete(&id).await.expect(200);
    assert_eq!(done.state(), "published");
    let read = house.upload(&id).await.expect(200);
    assert_eq!((read.json["next"].as_str(), read.json.get("error")), (Some("none"), None));
    assert_eq!(house.records(&house.topic).await.len(), 1);
}

#[tokio::test]
async fn wrong_bytes_are_refused_by_s3_and_the_right_ones_still_go_up() {
    let house = House::new().await;
    let opened = house.open(b"right", json!({})).await.expect(201);
    house.put(&opened.json["upload"], b"wrong").await.expect(400);
    house.complete(&opened.id()).await.expect_problem(409, "object-missing");
    assert_eq!(house.objects().await, Vec::<String>::new());
    house.put(&opened.json["upload"], b"right").await.expect(200);
    house.complete(&opened.id()).await.expect(200);
    assert_eq!(house.only_record().await.1, b"right");
}

#[tokio::test]
async fn another_number_of_bytes_than_promised_is_refused_by_s3() {
    let house = House::new().await;
    // No checksum is known yet: the signed length alone holds.
    let opened = house.open(b"hello", json!({"sha256": null})).await.expect(201);
    for wrong in [b"hell".as_slice(), b"hello!"] {
        house.put(&opened.json["upload"], wrong).await.expect(403);
    }
    assert_eq!(house.objects().await, Vec::<String>::new());
}

#[tokio::test]
async fn a_sha256_that_comes_with_complete_is_proved_by_reading_the_bytes() {
    let house = House::new().await;
    let opened = house.open(b"a stream", json!({"sha256": null})).await.expect(201);
    assert_eq!(opened.json["upload"]["headers"].get("x-amz-checksum-sha256"), None);
    house.put(&opened.json["upload"], b"a stream").await.expect(200);
    let published = house.complete_and_wait(&opened.id(), json!({"sha256": sha256(b"a stream").to_uppercase()})).await;
    assert_eq!(published.json["integrity"], "sha256");
    let (record, content) = house.only_record().await;
    assert_eq!((record.json()["sha256"].as_str(), content), (Some(sha256(b"a stream").as_str()), b"a stream".to_vec()));
    assert_eq!(record.header("lfs-integrity"), Some("sha256"));
}

#[tokio::test]
async fn a_wrong_sha256_that_comes_with_complete_rejects_the_bytes() {
    let house = House::new().await;
    let opened = house.open(b"a stream", json!({"sha256": null})).await.expect(201);
    house.put(&opened.json["upload"], b"a stream").await.expect(200);
    let told = json!({"sha256": sha256(b"another")});
    let first = house.complete_with(&opened.id(), told.clone()).await.expect_problem(422, "checksum-mismatch");
    assert_eq!(first.json["upload_state"], "rejected");
    let again = house.complete_with(&opened.id(), told).await.expect_problem(422, "checksum-mismatch");
    assert_eq!(first.json["detail"], again.json["detail"]);
    // Final: nothing that is brought later changes the answer.
    let right = json!({"sha256": sha256(b"a stream")});
    let again = house.complete_with(&opened.id(), right).await.expect_problem(422, "checksum-mismatch");
    assert_eq!(first.json["detail"], again.json["detail"]);
    house.until_nothing_is_left(opened.json["object_key"].as_str().unwrap()).await;
    assert_eq!(house.records(&house.topic).await.len(), 0);
}

#[tokio::test]
async fn a_sha256_is_needed_once_and_cannot_be_changed() {
    let house = House::new().await;
    let stream = house.open(b"stream", json!({"sha256": null})).await.expect(201);
    house.put(&stream.json["upload"], b"stream").await.expect(200);
    let refused = house.complete(&stream.id()).await.expect_problem(422, "validation-failed");
    assert_eq!(refused.json["upload_state"], "open");
    assert_eq!(house.upload(&stream.id()).await.state(), "open");
    house.complete_and_wait(&stream.id(), json!({"sha256": sha256(b"stream")})).await;

    let known = house.open(b"known", json!({})).await.expect(201);
    house.put(&known.json["upload"], b"known").await.expect(200);
    let other = json!({"sha256": sha256(b"other")});
    house.complete_with(&known.id(), other.clone()).await.expect_problem(422, "validation-failed");
    assert_eq!(house.upload(&known.id()).await.state(), "open");
    house.complete_with(&known.id(), json!({"sha256": sha256(b"known")})).await.expect(200);
    house.complete_with(&known.id(), other).await.expect_problem(422, "validation-failed");
    house.complete(&known.id()).await.expect(200);
    assert_eq!(house.records(&house.topic).await.len(), 2);
}
