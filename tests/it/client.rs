//! The client crate against the real broker, S3 and Kafka.

use std::sync::{Arc, OnceLock};

use lfs_broker_client::api::{Integrity, UploadState};
use lfs_broker_client::{Error, UploadOptions, Value};
use serde_json::json;
use tokio::sync::Notify;

use crate::harness::faults::clients_behind_s3;
use crate::harness::uploads::PART;
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
    let first = Arc::new(OnceLock::new());
    let told = Arc::clone(&first);
    let uploading = house.client().upload(options(&house)).on_progress(move |at| {
        let _ = told.set(at);
    });
    let done = uploading.resume(id, file.path()).await.unwrap();
    assert_eq!((done.id, done.state), (id, UploadState::Published));
    let first = first.get().unwrap();
    assert_eq!((first.bytes_done, first.parts_done, first.parts_total), (5 << 20, 1, 4), "what is there is not sent again");
    assert_eq!(house.records(&house.topic).await.len(), 1);
}

#[tokio::test]
async fn what_the_broker_refuses_reaches_the_caller_as_a_problem() {
    let house = House::with(|settings| settings.policy.default_enabled = false).await;
    let refused = house.client().upload(options(&house)).bytes("x").await.unwrap_err();
    assert!(matches!(&refused, Error::Refused(problem) if problem.code == "topic-not-enabled"), "{refused}");
}

#[tokio::test]
async fn another_file_of_the_same_size_publishes_nothing_when_it_is_resumed() {
    let house = House::new().await;
    let content = bytes(PART + 1, 3);
    let opened = house.put_up(&content, json!({"part_size": PART})).await;
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes(PART + 1, 4)).unwrap();
    let id = opened.id().parse().unwrap();
    let refused = house.client().upload(options(&house)).resume(id, file.path()).await.unwrap_err();
    assert!(matches!(refused, Error::Corrupt { .. }), "{refused}");
    assert_eq!(house.upload(&opened.id()).await.state(), "open");
    // The file of before still finishes it.
    std::fs::write(file.path(), &content).unwrap();
    house.client().upload(options(&house)).resume(id, file.path()).await.unwrap();
    assert!(house.only_record().await.1 == content);
}

#[tokio::test]
async fn a_cancelled_upload_is_aborted() {
    let (house, wire) = clients_behind_s3(|_| {}).await;
    // The bytes are on their way when it is cancelled.
    wire.silence();
    let opened = Arc::new(Notify::new());
    let told = Arc::clone(&opened);
    let uploading = house.client().upload(options(&house)).on_open(move |_| told.notify_one());
    let cancelled = uploading.cancelled_by(async move { opened.notified().await }).bytes(bytes(1 << 20, 4)).await.unwrap_err();
    let Error::Cancelled { id: Some(id), aborted: true } = cancelled else { panic!("{cancelled:?}") };
    assert_eq!(house.upload(&id.to_string()).await.state(), "aborted");
}

#[tokio::test]
async fn a_single_put_whose_file_changed_under_it_leaves_no_session_open() {
    let house = House::new().await;
    let file = tempfile::NamedTempFile::new().unwrap();
    // Shorter, and other bytes of the same size: the first the client finds out, the second storage.
    for changed in [bytes(10, 6), bytes(1 << 20, 7)] {
        std::fs::write(file.path(), bytes(1 << 20, 5)).unwrap();
        let (path, told) = (file.path().to_owned(), Arc::new(OnceLock::new()));
        let opened = Arc::clone(&told);
        let uploading = house.client().upload(UploadOptions::to(house.topic.as_str())).on_open(move |upload| {
            std::fs::write(&path, &changed).unwrap();
            opened.set(upload.id).unwrap();
        });
        let failed = uploading.file(file.path()).await.unwrap_err();
        assert!(matches!(failed, Error::Io(_)) || failed.is_corrupt(), "{failed:?}");
        let id = told.get().unwrap().to_string();
        assert_eq!(house.upload(&id).await.state(), "aborted", "{failed}");
    }
}
