//! The client crate against the real broker, S3 and Kafka.

use std::time::Duration;

use lfs_broker_client::api::{Integrity, UploadState};
use lfs_broker_client::{Error, UploadOptions, Value};
use serde_json::json;

use crate::harness::{House, bytes};

fn options(house: &House) -> UploadOptions {
    UploadOptions { part_size: Some(5 << 20), wait_published: true, ..UploadOptions::to(house.topic.as_str()) }
}

#[tokio::test]
async fn a_file_goes_up_in_parts_and_comes_back_verified() {
    let house = House::new().await;
    let content = bytes((11 << 20) + 1, 1);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &content).unwrap();
    let done = house.client().upload(options(&house)).file(file.path()).await.unwrap();
    assert_eq!((done.state, done.integrity), (UploadState::Published, Some(Integrity::PartsSha256)));

    let records = house.records(&house.topic).await;
    assert!(matches!(Value::of(&records[0].value), Ok(Value::Pointer(_))));
    let back = house.client().fetch(&records[0].value).await.unwrap().to_vec(1 << 30).await.unwrap();
    assert!(back == content, "the bytes came back changed");
}

#[tokio::test]
async fn a_stream_goes_up_without_being_known_before() {
    let house = House::new().await;
    for length in [0, 3, (6 << 20) + 1] {
        let content = bytes(length, 2);
        let reader = std::io::Cursor::new(content.clone());
        let done = house.client().upload(options(&house)).stream(reader, length as u64).await.unwrap();
        assert_eq!(done.state, UploadState::Published, "{length} bytes");
        let value = done.pointer.unwrap().to_json();
        let back = house.client().fetch(value.as_bytes()).await.unwrap().to_vec(1 << 30).await.unwrap();
        assert!(back == content, "{length} bytes came back changed");
    }
}

#[tokio::test]
async fn an_upload_cut_in_the_middle_is_resumed_with_the_missing_parts_only() {
    let mut house = House::new().await;
    let content = bytes(16 << 20, 3);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &content).unwrap();
    let opened = house.open(&content, json!({"part_size": 5 << 20})).await.expect(201);
    house.put(&opened.json["parts"][1], &content[5 << 20..10 << 20]).await.expect(200);
    house.crash(|_| {}).await;
    let id = opened.id().parse().unwrap();
    let done = house.client().upload(options(&house)).resume(id, file.path()).await.unwrap();
    assert_eq!((done.id, done.state), (id, UploadState::Published));
    assert_eq!(house.records(&house.topic).await.len(), 1);
}

#[tokio::test]
async fn what_the_broker_refuses_reaches_the_caller_as_a_problem() {
    let house = House::with(|settings| settings.policy.default_enabled = false).await;
    let refused = house.client().upload(options(&house)).bytes("x").await.unwrap_err();
    assert!(matches!(&refused, Error::Refused(problem) if problem.code == "topic-not-enabled"), "{refused}");
}

#[tokio::test]
async fn a_cancelled_upload_is_aborted() {
    let house = House::new().await;
    let now = async {};
    let refused = house.client().upload(options(&house)).cancelled_by(now).bytes(bytes(1 << 20, 4)).await.unwrap_err();
    assert!(matches!(refused, Error::Cancelled { .. }), "{refused}");
    tokio::time::timeout(Duration::from_secs(10), async {
        while sqlx::query_scalar::<_, i64>("select count(*) from upload_sessions where state in ('open', 'completing')")
            .fetch_one(&house.db)
            .await
            .unwrap()
            > 0
        {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await
    .expect("no upload stays open");
}
