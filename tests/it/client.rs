//! The client crate with the real broker, S3 and Kafka.

use std::sync::{Arc, OnceLock};

use lfs_broker_client::api::{Integrity, UploadState};
use lfs_broker_client::{Error, UploadOptions, Value};
use serde_json::json;
use tokio::sync::Notify;

use crate::harness::faults::start_with_client_s3_proxy;
use crate::harness::uploads::PART_BYTES;
use crate::harness::{TestBroker, bytes};

fn options(broker: &TestBroker) -> UploadOptions {
    UploadOptions { part_size: Some(5 << 20), wait_published: true, ..UploadOptions::to(broker.topic.as_str()) }
}

#[tokio::test]
async fn a_file_is_uploaded_in_parts_and_downloaded_verified() {
    let broker = TestBroker::start().await;
    let content = bytes((11 << 20) + 1, 1);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &content).unwrap();
    let done = broker.client().upload(options(&broker)).file(file.path()).await.unwrap();
    assert_eq!((done.state, done.integrity), (UploadState::Published, Some(Integrity::PartsSha256)));

    let records = broker.records(&broker.topic).await;
    assert!(matches!(Value::of(&records[0].value), Ok(Value::Pointer(_))));
    let downloaded = broker.client().fetch(&records[0].value).await.unwrap().to_vec(1 << 30).await.unwrap();
    assert!(downloaded == content, "the bytes came back changed");
}

#[tokio::test]
async fn a_stream_is_uploaded_without_a_known_checksum() {
    let broker = TestBroker::start().await;
    for length in [0, 3, (6 << 20) + 1] {
        let content = bytes(length, 2);
        let reader = std::io::Cursor::new(content.clone());
        let done = broker.client().upload(options(&broker)).stream(reader, length as u64).await.unwrap();
        assert_eq!(done.state, UploadState::Published, "{length} bytes");
        let value = done.pointer.unwrap().to_json();
        let downloaded = broker.client().fetch(value.as_bytes()).await.unwrap().to_vec(1 << 30).await.unwrap();
        assert!(downloaded == content, "{length} bytes came back changed");
    }
}

#[tokio::test]
async fn resuming_an_interrupted_upload_sends_only_the_missing_parts() {
    let mut broker = TestBroker::start().await;
    let content = bytes(16 << 20, 3);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &content).unwrap();
    let opened = broker.open(&content, json!({"part_size": 5 << 20})).await.expect(201);
    broker.put(&opened.json["parts"][1], &content[5 << 20..10 << 20]).await.expect(200);
    broker.crash(|_| {}).await;
    let id = opened.id().parse().unwrap();
    let first = Arc::new(OnceLock::new());
    let progress = Arc::clone(&first);
    let uploading = broker.client().upload(options(&broker)).on_progress(move |at| {
        let _ = progress.set(at);
    });
    let done = uploading.resume(id, file.path()).await.unwrap();
    assert_eq!((done.id, done.state), (id, UploadState::Published));
    let first = first.get().unwrap();
    assert_eq!((first.bytes_done, first.parts_done, first.parts_total), (5 << 20, 1, 4), "a stored part is not sent again");
    assert_eq!(broker.records(&broker.topic).await.len(), 1);
}

#[tokio::test]
async fn a_refusal_of_the_broker_reaches_the_caller_as_a_problem() {
    let broker = TestBroker::start_with(|settings| settings.policy.default_enabled = false).await;
    let refused = broker.client().upload(options(&broker)).bytes("x").await.unwrap_err();
    assert!(matches!(&refused, Error::Refused(problem) if problem.code == "topic-not-enabled"), "{refused}");
}

#[tokio::test]
async fn resuming_with_another_file_of_the_same_size_publishes_nothing() {
    let broker = TestBroker::start().await;
    let content = bytes(PART_BYTES + 1, 3);
    let opened = broker.open_and_put(&content, json!({"part_size": PART_BYTES})).await;
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes(PART_BYTES + 1, 4)).unwrap();
    let id = opened.id().parse().unwrap();
    let refused = broker.client().upload(options(&broker)).resume(id, file.path()).await.unwrap_err();
    assert!(matches!(refused, Error::Corrupt { .. }), "{refused}");
    assert_eq!(broker.upload(&opened.id()).await.state(), "open");
    // The original file still completes the upload.
    std::fs::write(file.path(), &content).unwrap();
    broker.client().upload(options(&broker)).resume(id, file.path()).await.unwrap();
    assert!(broker.only_record().await.1 == content);
}

#[tokio::test]
async fn a_cancelled_upload_is_aborted() {
    let (broker, proxy) = start_with_client_s3_proxy(|_| {}).await;
    // The upload is cancelled while its bytes are in flight.
    proxy.stall();
    let opened = Arc::new(Notify::new());
    let notify = Arc::clone(&opened);
    let uploading = broker.client().upload(options(&broker)).on_open(move |_| notify.notify_one());
    let cancelled = uploading.cancelled_by(async move { opened.notified().await }).bytes(bytes(1 << 20, 4)).await.unwrap_err();
    let Error::Cancelled { id: Some(id), aborted: true } = cancelled else { panic!("{cancelled:?}") };
    assert_eq!(broker.upload(&id.to_string()).await.state(), "aborted");
}

#[tokio::test]
async fn a_single_put_whose_file_changes_meanwhile_leaves_no_session_open() {
    let broker = TestBroker::start().await;
    let file = tempfile::NamedTempFile::new().unwrap();
    // The client detects a shorter file; S3 detects other bytes of the same size.
    for changed in [bytes(10, 6), bytes(1 << 20, 7)] {
        std::fs::write(file.path(), bytes(1 << 20, 5)).unwrap();
        let (path, opened_id) = (file.path().to_owned(), Arc::new(OnceLock::new()));
        let opened = Arc::clone(&opened_id);
        let uploading = broker.client().upload(UploadOptions::to(broker.topic.as_str())).on_open(move |upload| {
            std::fs::write(&path, &changed).unwrap();
            opened.set(upload.id).unwrap();
        });
        let failed = uploading.file(file.path()).await.unwrap_err();
        assert!(matches!(failed, Error::Io(_)) || failed.is_corrupt(), "{failed:?}");
        let id = opened_id.get().unwrap().to_string();
        assert_eq!(broker.upload(&id).await.state(), "aborted", "{failed}");
    }
}
