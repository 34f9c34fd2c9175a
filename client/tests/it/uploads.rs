//! Uploads: which requests the client sends, and how it handles errors.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lfs_broker_client::api::UploadState;
use lfs_broker_client::checksum::Sha256;
use lfs_broker_client::{Client, Error, Progress, UploadOptions};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;
use tokio::sync::Notify;
use uuid::Uuid;

use crate::mock_server::{ID, MockServer, ReceivedRequest, json_response, problem, response, s3_error};

pub(crate) const BYTES: &[u8] = b"the quick brown fox jumps over the lazy dog";

/// With parts of 20 bytes, there are two full parts and a last one of 3 bytes.
const PART: usize = 20;

pub(crate) fn options() -> UploadOptions {
    UploadOptions { part_size: Some(PART as u64), concurrency: 1, ..UploadOptions::to("videos") }
}

pub(crate) fn a_file(bytes: &[u8]) -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("fox.txt");
    std::fs::write(&path, bytes).unwrap();
    (directory, path)
}

pub(crate) fn single(server: &MockServer) -> Vec<u8> {
    let put = server.signed("PUT", "/b/k", json!({"if-none-match": "*", "x-amz-meta-lfs-upload-id": ID}));
    json_response("201 Created", &server.upload("open", BYTES.len(), json!({"upload": put})))
}

fn part(server: &MockServer, number: usize) -> Value {
    let mut part = server.signed("PUT", &format!("/part/{number}"), json!({}));
    part["part_number"] = json!(number);
    part["offset"] = json!((number - 1) * PART);
    part["size"] = json!(PART.min(BYTES.len() - (number - 1) * PART));
    part
}

pub(crate) fn multipart(server: &MockServer, more: Value) -> Value {
    let mut upload = server.upload("open", BYTES.len(), json!({"mode": "multipart", "part_size": PART, "part_count": 3}));
    upload.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    upload
}

fn parts(server: &MockServer, numbers: &[usize]) -> Vec<u8> {
    let parts: Vec<_> = numbers.iter().map(|&number| part(server, number)).collect();
    json_response("200 OK", &json!({"parts": parts}))
}

fn completed(status: &str, state: &str, sha256: Sha256) -> Vec<u8> {
    let pointer = json!({"kfs_lfs": 1, "bucket": "b", "key": "k", "size": BYTES.len(), "sha256": sha256});
    json_response(status, &json!({"id": ID, "state": state, "pointer": pointer, "integrity": "sha256"}))
}

pub(crate) fn verified() -> Vec<u8> {
    completed("202 Accepted", "verified", Sha256::of(BYTES))
}

pub(crate) fn ok() -> Vec<u8> {
    response("200 OK", b"")
}

pub(crate) fn request_lines(requests: &[ReceivedRequest]) -> Vec<&str> {
    requests.iter().map(|request| request.line.split('?').next().unwrap_or_default()).collect()
}

pub(crate) const OPEN: &str = "POST /lfs/uploads";

pub(crate) fn of_upload(method: &str, rest: &str) -> String {
    format!("{method} /lfs/uploads/{ID}{rest}")
}

#[tokio::test]
async fn a_small_file_is_opened_put_and_completed() {
    let server = MockServer::new().await;
    let client = server.client();
    let responses = vec![single(&server), ok(), verified()];
    let exchange = server.respond(responses);
    let (_directory, path) = a_file(BYTES);
    let reports: Arc<Mutex<Vec<Progress>>> = Arc::default();
    let sink = Arc::clone(&reports);
    let done = client
        .upload(UploadOptions { key: Some(b"order-17".to_vec()), part_size: None, ..options() })
        .on_progress(move |progress| sink.lock().unwrap().push(progress))
        .file(&path)
        .await
        .unwrap();
    assert_eq!(done.state, UploadState::Verified);

    let requests = exchange.requests().await;
    assert_eq!(request_lines(&requests), [OPEN, "PUT /b/k", &of_upload("POST", "/complete")]);
    let expected = json!({"topic": "videos", "size": 43, "key": "order-17", "filename": "fox.txt", "sha256": Sha256::of(BYTES)});
    assert_eq!(requests[0].json(), expected);
    assert!(requests[0].header("idempotency-key").is_some_and(|key| key.parse::<Uuid>().is_ok()));
    assert_eq!(requests[1].body, BYTES);
    assert_eq!(requests[1].header("content-length"), Some("43"));
    assert_eq!(requests[1].header("transfer-encoding"), None);
    assert_eq!(requests[1].header("if-none-match"), Some("*"));
    assert_eq!(requests[1].header("authorization"), None);
    assert_eq!(requests[2].body, b"");
    let last = *reports.lock().unwrap().last().unwrap();
    assert_eq!(last, Progress { bytes_done: 43, bytes_total: 43, parts_done: 1, parts_total: 1 });
}

#[tokio::test]
async fn zero_bytes_and_binary_keys_can_be_uploaded() {
    let server = MockServer::new().await;
    let client = server.client();
    let put = server.signed("PUT", "/b/k", json!({"content-length": "0"}));
    let open = json_response("201 Created", &server.upload("open", 0, json!({"upload": put})));
    let exchange = server.respond(vec![open, ok(), completed("202 Accepted", "verified", Sha256::of(b""))]);
    client.upload(UploadOptions { key: Some(vec![0xff, 0]), ..options() }).bytes("").await.unwrap();
    let requests = exchange.requests().await;
    assert_eq!(requests[0].json(), json!({"topic": "videos", "size": 0, "key_base64": "/wA=", "sha256": Sha256::of(b"")}));
    assert_eq!(requests[1].header("content-length"), Some("0"));
    assert_eq!(requests[1].header("transfer-encoding"), None);
}

#[tokio::test]
async fn a_single_put_is_signed_again_with_its_key_and_412_means_that_it_succeeded() {
    let server = MockServer::new().await;
    let client = server.client();
    let responses = vec![
        single(&server),
        s3_error("403 Forbidden", "AccessDenied"),
        single(&server),
        s3_error("503 Slow Down", "SlowDown"),
        // The connection breaks before the response, so the client does not know whether the bytes arrived.
        Vec::new(),
        s3_error("412 Precondition Failed", "PreconditionFailed"),
        verified(),
    ];
    let exchange = server.respond(responses);
    client.upload(options()).bytes(BYTES).await.unwrap();
    let requests = exchange.requests().await;
    let put = "PUT /b/k";
    assert_eq!(request_lines(&requests), [OPEN, put, OPEN, put, put, put, &of_upload("POST", "/complete")]);
    assert_eq!(requests[0].header("idempotency-key"), requests[2].header("idempotency-key"));
    assert_eq!(requests[0].body, requests[2].body);
    assert_eq!(requests[5].body, BYTES);
}

#[tokio::test]
async fn a_denied_permission_is_signed_again_only_a_few_times() {
    let server = MockServer::new().await;
    let client = server.client();
    let refused = || s3_error("403 Forbidden", "AccessDenied");
    let responses = vec![single(&server), refused(), single(&server), refused(), single(&server), refused()];
    let exchange = server.respond(responses);
    let error = client.upload(options()).bytes(BYTES).await.unwrap_err();
    assert!(matches!(&error, Error::Storage { status: 403, code, .. } if code == "AccessDenied"), "{error}");
    assert_eq!(exchange.requests().await.len(), 6);
}

#[tokio::test]
async fn a_large_file_is_uploaded_in_parts_with_declared_hashes() {
    let server = MockServer::new().await;
    let client = server.client();
    let first = [part(&server, 1), part(&server, 2)];
    let open = json_response("201 Created", &multipart(&server, json!({"parts": first})));
    let bad = s3_error("400 Bad Request", "BadDigest");
    let expired = s3_error("400 Bad Request", "ExpiredToken");
    let responses = vec![open, bad, ok(), expired, parts(&server, &[2]), ok(), parts(&server, &[3]), ok(), verified()];
    let exchange = server.respond(responses);
    let (_directory, path) = a_file(BYTES);
    client.upload(options()).file(&path).await.unwrap();

    let requests = exchange.requests().await;
    let sign = of_upload("POST", "/parts");
    let complete = of_upload("POST", "/complete");
    let expected = [OPEN, "PUT /part/1", "PUT /part/1", "PUT /part/2", &sign, "PUT /part/2", &sign, "PUT /part/3", &complete];
    assert_eq!(request_lines(&requests), expected);
    let open = requests[0].json();
    let hashes: Vec<_> = BYTES.chunks(PART).map(Sha256::of).collect();
    assert_eq!((&open["part_size"], &open["part_sha256"]), (&json!(PART), &json!(hashes)));
    assert_eq!(requests[4].json(), json!({"part_numbers": [2]}));
    assert_eq!([&requests[2].body, &requests[5].body, &requests[7].body].map(|body| &body[..]).concat(), BYTES);
}

#[tokio::test]
async fn parts_are_uploaded_concurrently() {
    let server = MockServer::new().await;
    let client = server.client();
    let first = [part(&server, 1), part(&server, 2), part(&server, 3)];
    let open = json_response("201 X", &multipart(&server, json!({"parts": first})));
    // No part is answered before all three have arrived.
    let exchange = server.respond_in_groups(vec![vec![open], vec![ok(), ok(), ok()], vec![verified()]]);
    client.upload(UploadOptions { concurrency: 3, ..options() }).bytes(BYTES).await.unwrap();
    let mut requests = exchange.requests().await;
    requests[1..4].sort_by(|a, b| a.line.cmp(&b.line));
    assert_eq!(requests[1..4].iter().flat_map(|request| request.body.clone()).collect::<Vec<_>>(), BYTES);
}

#[tokio::test]
async fn resuming_sends_only_what_is_missing() {
    let server = MockServer::new().await;
    let client = server.client();
    let open = multipart(&server, json!({"missing_parts": [[2, 2]], "uploaded_parts": []}));
    let responses = vec![
        json_response("200 OK", &open),
        // This upload was opened with deferred hashes. Its state does not say so.
        problem(422, "validation-failed", false),
        parts(&server, &[2]),
        ok(),
        verified(),
    ];
    let exchange = server.respond(responses);
    let (_directory, path) = a_file(BYTES);
    let reports: Arc<Mutex<Vec<Progress>>> = Arc::default();
    let sink = Arc::clone(&reports);
    let uploader = client.upload(options()).on_progress(move |progress| sink.lock().unwrap().push(progress));
    uploader.resume(ID.parse().unwrap(), &path).await.unwrap();

    let requests = exchange.requests().await;
    let sign = of_upload("POST", "/parts");
    let complete = of_upload("POST", "/complete");
    assert_eq!(request_lines(&requests), [&of_upload("GET", ""), &sign, &sign, "PUT /part/2", &complete]);
    assert_eq!(requests[1].json(), json!({"part_numbers": [2]}));
    assert_eq!(requests[2].json(), json!({"parts": [{"part_number": 2, "sha256": Sha256::of(&BYTES[PART..2 * PART])}]}));
    assert_eq!(requests[3].body, &BYTES[PART..2 * PART]);
    assert_eq!(requests[4].json(), json!({"sha256": Sha256::of(BYTES)}));
    let reports = reports.lock().unwrap();
    assert_eq!((reports[0].bytes_done, reports[0].parts_done), (23, 2));
    assert_eq!((reports.last().unwrap().bytes_done, reports.last().unwrap().parts_done), (43, 3));
}

#[tokio::test]
async fn resuming_with_another_file_is_refused() {
    let server = MockServer::new().await;
    let client = server.client();
    let responses = vec![json_response("200 OK", &multipart(&server, json!({})))];
    let exchange = server.respond(responses);
    let (_directory, path) = a_file(b"short");
    let error = client.upload(options()).resume(ID.parse().unwrap(), &path).await.unwrap_err();
    let expected = format!("the file has 5 bytes, but upload {ID} is for 43 bytes: is it the same file?");
    assert_eq!(error.to_string(), expected);
    assert!(error.is_corrupt());
    assert_eq!(exchange.requests().await.len(), 1);
}

#[tokio::test]
async fn a_resumed_upload_is_never_completed_for_another_file_of_the_same_size() {
    let server = MockServer::new().await;
    let client = server.client();
    let open = multipart(&server, json!({"missing_parts": [], "uploaded_parts": []}));
    // The broker has a different hash from open. No other request may follow.
    let exchange = server.respond(vec![json_response("200 OK", &open), problem(422, "validation-failed", false)]);
    let (_directory, path) = a_file(BYTES);
    let error = client.upload(options()).resume(ID.parse().unwrap(), &path).await.unwrap_err();
    assert!(matches!(error, Error::Corrupt { .. }), "{error}");
    assert_eq!(request_lines(&exchange.requests().await), [&of_upload("GET", ""), &of_upload("POST", "/complete")]);
}

#[tokio::test]
async fn an_upload_cancelled_while_it_is_opened_is_found_by_its_key_and_aborted() {
    let server = MockServer::new().await;
    let client = server.client();
    let (cancel, cancelled) = tokio::sync::oneshot::channel();
    let responses = vec![single(&server), response("204 No Content", b"")];
    let listener = server.listener;
    let served = tokio::spawn(async move {
        let (mut unanswered, _) = listener.accept().await.unwrap();
        let first = crate::mock_server::read_request(&mut unanswered).await;
        cancel.send(()).unwrap();
        let mut requests = vec![first];
        for response in responses {
            let (mut stream, _) = listener.accept().await.unwrap();
            requests.push(crate::mock_server::read_request(&mut stream).await);
            stream.write_all(&response).await.unwrap();
            stream.shutdown().await.unwrap();
        }
        requests
    });
    let signal = async { cancelled.await.unwrap() };
    let error = client.upload(options()).cancelled_by(signal).bytes(BYTES).await.unwrap_err();
    assert!(matches!(error, Error::Cancelled { id: Some(_), aborted: true }), "{error:?}");
    let requests = tokio::time::timeout(Duration::from_secs(30), served).await.unwrap().unwrap();
    assert_eq!(request_lines(&requests), [OPEN, OPEN, &of_upload("DELETE", "")]);
    assert_eq!(requests[0].header("idempotency-key"), requests[1].header("idempotency-key"));
}

#[tokio::test]
async fn an_upload_of_a_pipe_without_data_can_be_cancelled() {
    let server = MockServer::new().await;
    let (_open, silent) = tokio::io::duplex(1);
    let uploading = server.client().upload(options()).cancelled_by(tokio::time::sleep(Duration::from_millis(20))).spooled(silent);
    let error = tokio::time::timeout(Duration::from_secs(30), uploading).await.expect("it ends").unwrap_err();
    assert!(matches!(error, Error::Cancelled { id: None, aborted: false }), "{error:?}");
}

#[tokio::test]
async fn the_wait_timeout_may_be_unlimited() {
    let server = MockServer::new().await;
    let client = server.client();
    let responses = vec![single(&server), ok(), verified()];
    let exchange = server.respond(responses);
    client.upload(UploadOptions { wait_timeout: Duration::MAX, ..options() }).bytes(BYTES).await.unwrap();
    assert_eq!(exchange.requests().await.len(), 3);
}

#[tokio::test]
async fn a_replayed_open_reads_which_parts_are_stored() {
    let server = MockServer::new().await;
    let client = server.client();
    let replay = json_response("200 OK", &multipart(&server, json!({"parts": []})));
    let read = json_response("200 OK", &multipart(&server, json!({"missing_parts": [[3, 3]]})));
    let responses = vec![replay, read, parts(&server, &[3]), ok(), verified()];
    let exchange = server.respond(responses);
    client.upload(UploadOptions { idempotency_key: Some("run-1".to_owned()), ..options() }).bytes(BYTES).await.unwrap();
    let requests = exchange.requests().await;
    assert_eq!(requests[0].header("idempotency-key"), Some("run-1"));
    assert_eq!(requests[3].body, &BYTES[2 * PART..]);
}

#[tokio::test]
async fn parts_that_are_missing_at_complete_are_uploaded_again() {
    let server = MockServer::new().await;
    let client = server.client();
    let first = [part(&server, 1), part(&server, 2), part(&server, 3)];
    let open = json_response("201 X", &multipart(&server, json!({"parts": first})));
    let read = json_response("200 OK", &multipart(&server, json!({"missing_parts": [[2, 2]]})));
    let incomplete = problem(409, "parts-incomplete", true);
    let responses = vec![open, ok(), ok(), ok(), incomplete, read, parts(&server, &[2]), ok(), verified()];
    let exchange = server.respond(responses);
    client.upload(options()).bytes(BYTES).await.unwrap();
    assert_eq!(exchange.requests().await[7].body, &BYTES[PART..2 * PART]);
}

#[tokio::test]
async fn the_client_waits_while_completing_and_then_completes_again() {
    let server = MockServer::new().await;
    let client = server.client();
    let state = |state: &str, version: u64| json_response("200 OK", &server.upload(state, 43, json!({"version": version})));
    let published = completed("200 OK", "published", Sha256::of(BYTES));
    let responses = vec![
        single(&server),
        ok(),
        json_response("202 Accepted", &json!({"id": ID, "state": "completing"})),
        state("completing", 2),
        state("verified", 3),
        verified(),
        state("verified", 3),
        state("published", 4),
        published,
    ];
    let exchange = server.respond(responses);
    let done = client.upload(UploadOptions { wait_published: true, ..options() }).bytes(BYTES).await.unwrap();
    assert_eq!(done.state, UploadState::Published);
    let request_lines: Vec<_> = exchange.requests().await.into_iter().map(|request| request.line).skip(2).collect();
    let (read, complete) = (of_upload("GET", ""), of_upload("POST", "/complete"));
    let expected = [
        complete.clone(),
        read.clone(),
        format!("{read}?wait=20&version=2"),
        complete.clone(),
        read.clone(),
        format!("{read}?wait=20&version=3"),
        complete,
    ];
    assert_eq!(request_lines, expected);
}

#[tokio::test]
async fn waiting_ends_at_the_wait_timeout() {
    let server = MockServer::new().await;
    let client = server.client();
    let completing = json_response("202 Accepted", &json!({"id": ID, "state": "completing"}));
    let responses = vec![single(&server), ok(), completing, json_response("200 OK", &server.upload("completing", 43, json!({})))];
    let exchange = server.respond(responses);
    let without_wait = UploadOptions { wait_timeout: Duration::ZERO, ..options() };
    let error = client.upload(without_wait).bytes(BYTES).await.unwrap_err();
    assert!(matches!(error, Error::WaitTimedOut { seconds: 0, .. }), "{error}");
    assert_eq!(exchange.requests().await.len(), 4);
}

#[tokio::test]
async fn a_stream_sends_each_hash_with_its_part_and_the_last_with_complete() {
    let server = MockServer::new().await;
    let client = server.client();
    let open = json_response("201 X", &multipart(&server, json!({"parts": []})));
    let expired = s3_error("403 Forbidden", "AccessDenied");
    let mut responses = vec![open, parts(&server, &[1]), expired, parts(&server, &[1]), ok()];
    responses.extend([parts(&server, &[2]), ok(), parts(&server, &[3]), ok(), verified()]);
    let exchange = server.respond(responses);
    client.upload(options()).stream(BYTES, 43).await.unwrap();
    let requests = exchange.requests().await;
    let open = requests[0].json();
    assert_eq!(open, json!({"topic": "videos", "size": 43, "part_size": PART, "part_hashes": "deferred"}));
    let hashes: Vec<_> = [1, 3, 5, 7].iter().map(|&call: &usize| requests[call].json()["parts"][0]["sha256"].clone()).collect();
    let of = |number: usize| json!(Sha256::of(BYTES.chunks(PART).nth(number - 1).unwrap()));
    assert_eq!(hashes, [of(1), of(1), of(2), of(3)]);
    assert_eq!([&requests[4].body, &requests[6].body, &requests[8].body].map(|body| &body[..]).concat(), BYTES);
    assert_eq!(requests[9].json(), json!({"sha256": Sha256::of(BYTES)}));
}

#[tokio::test]
async fn a_stream_in_a_single_put_is_retried() {
    let server = MockServer::new().await;
    let client = server.client();
    let responses = vec![single(&server), s3_error("500 X", "InternalError"), ok(), verified()];
    let exchange = server.respond(responses);
    client.upload(options()).stream(BYTES, 43).await.unwrap();
    let requests = exchange.requests().await;
    assert_eq!((&requests[1].body[..], &requests[2].body[..]), (BYTES, BYTES));
    assert_eq!(requests[3].json(), json!({"sha256": Sha256::of(BYTES)}));
}

#[tokio::test]
async fn a_stream_that_ends_early_aborts_its_upload() {
    let server = MockServer::new().await;
    let client = server.client();
    let open = json_response("201 X", &multipart(&server, json!({"parts": []})));
    let exchange = server.respond(vec![open, response("204 No Content", b"")]);
    let error = client.upload(options()).stream(&BYTES[..10], 43).await.unwrap_err();
    assert_eq!(error.to_string(), "the source ended after 10 of 20 bytes");
    assert_eq!(request_lines(&exchange.requests().await), [OPEN, &of_upload("DELETE", "")]);
}

#[tokio::test]
async fn cancelling_aborts_the_upload() {
    let server = MockServer::new().await;
    let client = server.client();
    let responses = vec![json_response("201 X", &multipart(&server, json!({"parts": []}))), response("204 No Content", b"")];
    let exchange = server.respond(responses);
    let stop = Arc::new(Notify::new());
    let opened = Arc::clone(&stop);
    let uploader = client.upload(options()).on_open(move |_| opened.notify_one());
    let (reader, _never_written) = tokio::io::duplex(8);
    let error = uploader.cancelled_by(async move { stop.notified().await }).stream(reader, 43).await.unwrap_err();
    assert!(matches!(error, Error::Cancelled { id: Some(id), aborted: true } if id.to_string() == ID), "{error}");
    assert_eq!(request_lines(&exchange.requests().await), [OPEN, &of_upload("DELETE", "")]);
}

#[tokio::test]
async fn a_pointer_to_other_bytes_is_an_error() {
    let server = MockServer::new().await;
    let client = server.client();
    let other = completed("200 OK", "published", Sha256::of(b"other"));
    let responses = vec![single(&server), ok(), other];
    let _exchange = server.respond(responses);
    let error = client.upload(options()).bytes(BYTES).await.unwrap_err();
    assert!(matches!(error, Error::Corrupt { .. }), "{error}");
}

#[tokio::test]
async fn a_part_signed_at_another_offset_is_not_sent() {
    let server = MockServer::new().await;
    let client = server.client();
    let mut moved = part(&server, 2);
    moved["offset"] = json!(0);
    let responses = vec![json_response("201 X", &multipart(&server, json!({"parts": [moved]})))];
    let exchange = server.respond(responses);
    let error = client.upload(options()).bytes(BYTES).await.unwrap_err();
    assert!(matches!(error, Error::Unexpected { .. }), "{error}");
    assert_eq!(exchange.requests().await.len(), 1);
}

fn assert_send<T: Send>(value: T) -> T {
    value
}

#[tokio::test]
async fn uploads_can_move_between_threads() {
    let client = Client::new("http://127.0.0.1:1").unwrap();
    drop(assert_send(client.upload("t").file("x")));
    drop(assert_send(client.upload("t").bytes("x")));
    drop(assert_send(client.upload("t").stream(BYTES, 3)));
    drop(assert_send(client.upload("t").spooled(BYTES)));
    drop(assert_send(client.upload("t").resume(Uuid::nil(), "x")));
    let directory = tempfile::tempdir().unwrap();
    let error = client.upload("t").file(directory.path()).await.unwrap_err();
    assert!(matches!(error, Error::Io(_)), "{error}");
}
