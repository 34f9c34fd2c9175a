//! One PUT, from open to the bytes again.

use serde_json::json;

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
