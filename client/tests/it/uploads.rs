//! Uploads: what goes up, in which requests, and how trouble on the way is met.

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

use crate::canned::{Asked, Canned, ID, answer, json_answer, problem, s3_error};

pub(crate) const BYTES: &[u8] = b"the quick brown fox jumps over the lazy dog";

/// Parts of 20 bytes make two whole ones and a rest of 3.
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

pub(crate) fn single(canned: &Canned) -> Vec<u8> {
    let put = canned.signed("PUT", "/b/k", json!({"if-none-match": "*", "x-amz-meta-lfs-upload-id": ID}));
    json_answer("201 Created", &canned.upload("open", BYTES.len(), json!({"upload": put})))
}

fn part(canned: &Canned, number: usize) -> Value {
    let mut part = canned.signed("PUT", &format!("/part/{number}"), json!({}));
    part["part_number"] = json!(number);
    part["offset"] = json!((number - 1) * PART);
    part["size"] = json!(PART.min(BYTES.len() - (number - 1) * PART));
    part
}

pub(crate) fn multipart(canned: &Canned, more: Value) -> Value {
    let mut upload = canned.upload("open", BYTES.len(), json!({"mode": "multipart", "part_size": PART, "part_count": 3}));
    upload.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    upload
}

fn parts(canned: &Canned, numbers: &[usize]) -> Vec<u8> {
    let parts: Vec<_> = numbers.iter().map(|&number| part(canned, number)).collect();
    json_answer("200 OK", &json!({"parts": parts}))
}

fn completed(status: &str, state: &str, sha256: Sha256) -> Vec<u8> {
    let pointer = json!({"kfs_lfs": 1, "bucket": "b", "key": "k", "size": BYTES.len(), "sha256": sha256});
    json_answer(status, &json!({"id": ID, "state": state, "pointer": pointer, "integrity": "sha256"}))
}

pub(crate) fn verified() -> Vec<u8> {
    completed("202 Accepted", "verified", Sha256::of(BYTES))
}

pub(crate) fn ok() -> Vec<u8> {
    answer("200 OK", b"")
}

pub(crate) fn lines(asked: &[Asked]) -> Vec<&str> {
    asked.iter().map(|asked| asked.line.split('?').next().unwrap_or_default()).collect()
}

pub(crate) const OPEN: &str = "POST /lfs/uploads";

pub(crate) fn of_upload(method: &str, rest: &str) -> String {
    format!("{method} /lfs/uploads/{ID}{rest}")
}

#[tokio::test]
async fn a_small_file_is_opened_put_and_completed() {
    let canned = Canned::new().await;
    let client = canned.client();
    let script = vec![single(&canned), ok(), verified()];
    let script = canned.answers(script);
    let (_keep, path) = a_file(BYTES);
    let told: Arc<Mutex<Vec<Progress>>> = Arc::default();
    let sink = Arc::clone(&told);
    let done = client
        .upload(UploadOptions { key: Some(b"order-17".to_vec()), part_size: None, ..options() })
        .on_progress(move |progress| sink.lock().unwrap().push(progress))
        .file(&path)
        .await
        .unwrap();
    assert_eq!(done.state, UploadState::Verified);

    let asked = script.asked().await;
    assert_eq!(lines(&asked), [OPEN, "PUT /b/k", &of_upload("POST", "/complete")]);
    let expected = json!({"topic": "videos", "size": 43, "key": "order-17", "filename": "fox.txt", "sha256": Sha256::of(BYTES)});
    assert_eq!(asked[0].json(), expected);
    assert!(asked[0].header("idempotency-key").is_some_and(|key| key.parse::<Uuid>().is_ok()));
    assert_eq!(asked[1].body, BYTES);
    assert_eq!(asked[1].header("content-length"), Some("43"));
    assert_eq!(asked[1].header("transfer-encoding"), None);
    assert_eq!(asked[1].header("if-none-match"), Some("*"));
    assert_eq!(asked[1].header("authorization"), None);
    assert_eq!(asked[2].body, b"");
    let last = *told.lock().unwrap().last().unwrap();
    assert_eq!(last, Progress { bytes_done: 43, bytes_total: 43, parts_done: 1, parts_total: 1 });
}

#[tokio::test]
async fn nothing_and_keys_that_are_no_text_can_be_uploaded() {
    let canned = Canned::new().await;
    let client = canned.client();
    let put = canned.signed("PUT", "/b/k", json!({"content-length": "0"}));
    let open = json_answer("201 Created", &canned.upload("open", 0, json!({"upload": put})));
    let script = canned.answers(vec![open, ok(), completed("202 Accepted", "verified", Sha256::of(b""))]);
    client.upload(UploadOptions { key: Some(vec![0xff, 0]), ..options() }).bytes("").await.unwrap();
    let asked = script.asked().await;
    assert_eq!(asked[0].json(), json!({"topic": "videos", "size": 0, "key_base64": "/wA=", "sha256": Sha256::of(b"")}));
    assert_eq!(asked[1].header("content-length"), Some("0"));
    assert_eq!(asked[1].header("transfer-encoding"), None);
}

#[tokio::test]
async fn a_single_put_is_signed_again_under_its_key_and_412_means_that_it_arrived() {
    let canned = Canned::new().await;
    let client = canned.client();
    let script = vec![
        single(&canned),
        s3_error("403 Forbidden", "AccessDenied"),
        single(&canned),
        s3_error("503 Slow Down", "SlowDown"),
        // The connection breaks with the answer: whether the bytes arrived is unknown.
        Vec::new(),
        s3_error("412 Precondition Failed", "PreconditionFailed"),
        verified(),
    ];
    let script = canned.answers(script);
    client.upload(options()).bytes(BYTES).await.unwrap();
    let asked = script.asked().await;
    let put = "PUT /b/k";
    assert_eq!(lines(&asked), [OPEN, put, OPEN, put, put, put, &of_upload("POST", "/complete")]);
    assert_eq!(asked[0].header("idempotency-key"), asked[2].header("idempotency-key"));
    assert_eq!(asked[0].body, asked[2].body);
    assert_eq!(asked[5].body, BYTES);
}

#[tokio::test]
async fn a_refused_permission_is_not_signed_for_ever() {
    let canned = Canned::new().await;
    let client = canned.client();
    let refused = || s3_error("403 Forbidden", "AccessDenied");
    let script = vec![single(&canned), refused(), single(&canned), refused(), single(&canned), refused()];
    let script = canned.answers(script);
    let error = client.upload(options()).bytes(BYTES).await.unwrap_err();
    assert!(matches!(&error, Error::Storage { status: 403, code, .. } if code == "AccessDenied"), "{error}");
    assert_eq!(script.asked().await.len(), 6);
}

#[tokio::test]
async fn a_large_file_goes_up_in_parts_that_were_promised_by_hash() {
    let canned = Canned::new().await;
    let client = canned.client();
    let first = [part(&canned, 1), part(&canned, 2)];
    let open = json_answer("201 Created", &multipart(&canned, json!({"parts": first})));
    let bad = s3_error("400 Bad Request", "BadDigest");
    let expired = s3_error("400 Bad Request", "ExpiredToken");
    let script = vec![open, bad, ok(), expired, parts(&canned, &[2]), ok(), parts(&canned, &[3]), ok(), verified()];
    let script = canned.answers(script);
    let (_keep, path) = a_file(BYTES);
    client.upload(options()).file(&path).await.unwrap();

    let asked = script.asked().await;
    let sign = of_upload("POST", "/parts");
    let complete = of_upload("POST", "/complete");
    let expected = [OPEN, "PUT /part/1", "PUT /part/1", "PUT /part/2", &sign, "PUT /part/2", &sign, "PUT /part/3", &complete];
    assert_eq!(lines(&asked), expected);
    let open = asked[0].json();
    let hashes: Vec<_> = BYTES.chunks(PART).map(Sha256::of).collect();
    assert_eq!((&open["part_size"], &open["part_sha256"]), (&json!(PART), &json!(hashes)));
    assert_eq!(asked[4].json(), json!({"part_numbers": [2]}));
    assert_eq!([&asked[2].body, &asked[5].body, &asked[7].body].map(|body| &body[..]).concat(), BYTES);
}

#[tokio::test]
async fn parts_go_up_side_by_side() {
    let canned = Canned::new().await;
    let client = canned.client();
    let first = [part(&canned, 1), part(&canned, 2), part(&canned, 3)];
    let open = json_answer("201 X", &multipart(&canned, json!({"parts": first})));
    // No part is answered before all three have come.
    let script = canned.groups(vec![vec![open], vec![ok(), ok(), ok()], vec![verified()]]);
    client.upload(UploadOptions { concurrency: 3, ..options() }).bytes(BYTES).await.unwrap();
    let mut asked = script.asked().await;
    asked[1..4].sort_by(|a, b| a.line.cmp(&b.line));
    assert_eq!(asked[1..4].iter().flat_map(|asked| asked.body.clone()).collect::<Vec<_>>(), BYTES);
}

#[tokio::test]
async fn resuming_sends_only_what_is_missing() {
    let canned = Canned::new().await;
    let client = canned.client();
    let open = multipart(&canned, json!({"missing_parts": [[2, 2]], "uploaded_parts": []}));
    let script = vec![
        json_answer("200 OK", &open),
        // This upload was opened with deferred hashes, which its state does not tell.
        problem(422, "validation-failed", false),
        parts(&canned, &[2]),
        ok(),
        verified(),
    ];
    let script = canned.answers(script);
    let (_keep, path) = a_file(BYTES);
    let told: Arc<Mutex<Vec<Progress>>> = Arc::default();
    let sink = Arc::clone(&told);
    let uploader = client.upload(options()).on_progress(move |progress| sink.lock().unwrap().push(progress));
    uploader.resume(ID.parse().unwrap(), &path).await.unwrap();

    let asked = script.asked().await;
    let sign = of_upload("POST", "/parts");
    let complete = of_upload("POST", "/complete");
    assert_eq!(lines(&asked), [&of_upload("GET", ""), &sign, &sign, "PUT /part/2", &complete]);
    assert_eq!(asked[1].json(), json!({"part_numbers": [2]}));
    assert_eq!(asked[2].json(), json!({"parts": [{"part_number": 2, "sha256": Sha256::of(&BYTES[PART..2 * PART])}]}));
    assert_eq!(asked[3].body, &BYTES[PART..2 * PART]);
    assert_eq!(asked[4].json(), json!({"sha256": Sha256::of(BYTES)}));
    let told = told.lock().unwrap();
    assert_eq!((told[0].bytes_done, told[0].parts_done), (23, 2));
    assert_eq!((told.last().unwrap().bytes_done, told.last().unwrap().parts_done), (43, 3));
}

#[tokio::test]
async fn resuming_with_another_file_is_refused() {
    let canned = Canned::new().await;
    let client = canned.client();
    let script = vec![json_answer("200 OK", &multipart(&canned, json!({})))];
    let script = canned.answers(script);
    let (_keep, path) = a_file(b"short");
    let error = client.upload(options()).resume(ID.parse().unwrap(), &path).await.unwrap_err();
    assert_eq!(error.to_string(), "the bytes are corrupt: expected 43 bytes, found a file of 5");
    assert_eq!(script.asked().await.len(), 1);
}

#[tokio::test]
async fn a_resumed_upload_is_never_completed_for_another_file_of_the_same_size() {
    let canned = Canned::new().await;
    let client = canned.client();
    let open = multipart(&canned, json!({"missing_parts": [], "uploaded_parts": []}));
    // The broker knows another hash, from open; nothing may be asked after that.
    let script = canned.answers(vec![json_answer("200 OK", &open), problem(422, "validation-failed", false)]);
    let (_keep, path) = a_file(BYTES);
    let error = client.upload(options()).resume(ID.parse().unwrap(), &path).await.unwrap_err();
    assert!(matches!(error, Error::Corrupt { .. }), "{error}");
    assert_eq!(lines(&script.asked().await), [&of_upload("GET", ""), &of_upload("POST", "/complete")]);
}

#[tokio::test]
async fn an_upload_cancelled_while_it_is_opened_is_found_by_its_key_and_aborted() {
    let canned = Canned::new().await;
    let client = canned.client();
    let (cancel, cancelled) = tokio::sync::oneshot::channel();
    let answers = vec![single(&canned), answer("204 No Content", b"")];
    let listener = canned.listener;
    let served = tokio::spawn(async move {
        let (mut unanswered, _) = listener.accept().await.unwrap();
        let first = crate::canned::read(&mut unanswered).await;
        cancel.send(()).unwrap();
        let mut asked = vec![first];
        for answer in answers {
            let (mut stream, _) = listener.accept().await.unwrap();
            asked.push(crate::canned::read(&mut stream).await);
            stream.write_all(&answer).await.unwrap();
            stream.shutdown().await.unwrap();
        }
        asked
    });
    let signal = async { cancelled.await.unwrap() };
    let error = client.upload(options()).cancelled_by(signal).bytes(BYTES).await.unwrap_err();
    assert!(matches!(error, Error::Cancelled { id: Some(_), aborted: true }), "{error:?}");
    let asked = tokio::time::timeout(Duration::from_secs(30), served).await.unwrap().unwrap();
    assert_eq!(lines(&asked), [OPEN, OPEN, &of_upload("DELETE", "")]);
    assert_eq!(asked[0].header("idempotency-key"), asked[1].header("idempotency-key"));
}

#[tokio::test]
async fn a_silent_pipe_can_be_cancelled() {
    let canned = Canned::new().await;
    let (_open, silent) = tokio::io::duplex(1);
    let uploading = canned.client().upload(options()).cancelled_by(tokio::time::sleep(Duration::from_millis(20))).spooled(silent);
    let error = tokio::time::timeout(Duration::from_secs(30), uploading).await.expect("it ends").unwrap_err();
    assert!(matches!(error, Error::Cancelled { id: None, aborted: false }), "{error:?}");
}

#[tokio::test]
async fn the_longest_wait_may_be_without_end() {
    let canned = Canned::new().await;
    let client = canned.client();
    let script = vec![single(&canned), ok(), verified()];
    let script = canned.answers(script);
    client.upload(UploadOptions { wait_timeout: Duration::MAX, ..options() }).bytes(BYTES).await.unwrap();
    assert_eq!(script.asked().await.len(), 3);
}

#[tokio::test]
async fn a_replayed_open_learns_what_is_there_already() {
    let canned = Canned::new().await;
    let client = canned.client();
    let replay = json_answer("200 OK", &multipart(&canned, json!({"parts": []})));
    let read = json_answer("200 OK", &multipart(&canned, json!({"missing_parts": [[3, 3]]})));
    let script = vec![replay, read, parts(&canned, &[3]), ok(), verified()];
    let script = canned.answers(script);
    client.upload(UploadOptions { idempotency_key: Some("run-1".to_owned()), ..options() }).bytes(BYTES).await.unwrap();
    let asked = script.asked().await;
    assert_eq!(asked[0].header("idempotency-key"), Some("run-1"));
    assert_eq!(asked[3].body, &BYTES[2 * PART..]);
}

#[tokio::test]
async fn parts_that_complete_finds_missing_are_put_again() {
    let canned = Canned::new().await;
    let client = canned.client();
    let first = [part(&canned, 1), part(&canned, 2), part(&canned, 3)];
    let open = json_answer("201 X", &multipart(&canned, json!({"parts": first})));
    let read = json_answer("200 OK", &multipart(&canned, json!({"missing_parts": [[2, 2]]})));
    let incomplete = problem(409, "parts-incomplete", true);
    let script = vec![open, ok(), ok(), ok(), incomplete, read, parts(&canned, &[2]), ok(), verified()];
    let script = canned.answers(script);
    client.upload(options()).bytes(BYTES).await.unwrap();
    assert_eq!(script.asked().await[7].body, &BYTES[PART..2 * PART]);
}

#[tokio::test]
async fn completing_is_waited_for_and_then_asked_again() {
    let canned = Canned::new().await;
    let client = canned.client();
    let state = |state: &str, version: u64| json_answer("200 OK", &canned.upload(state, 43, json!({"version": version})));
    let published = completed("200 OK", "published", Sha256::of(BYTES));
    let script = vec![
        single(&canned),
        ok(),
        json_answer("202 Accepted", &json!({"id": ID, "state": "completing"})),
        state("completing", 2),
        state("verified", 3),
        verified(),
        state("verified", 3),
        state("published", 4),
        published,
    ];
    let script = canned.answers(script);
    let done = client.upload(UploadOptions { wait_published: true, ..options() }).bytes(BYTES).await.unwrap();
    assert_eq!(done.state, UploadState::Published);
    let lines: Vec<_> = script.asked().await.into_iter().map(|asked| asked.line).skip(2).collect();
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
    assert_eq!(lines, expected);
}

#[tokio::test]
async fn waiting_ends_with_its_time() {
    let canned = Canned::new().await;
    let client = canned.client();
    let completing = json_answer("202 Accepted", &json!({"id": ID, "state": "completing"}));
    let script = vec![single(&canned), ok(), completing, json_answer("200 OK", &canned.upload("completing", 43, json!({})))];
    let script = canned.answers(script);
    let impatient = UploadOptions { wait_timeout: Duration::ZERO, ..options() };
    let error = client.upload(impatient).bytes(BYTES).await.unwrap_err();
    assert!(matches!(error, Error::Unfinished { seconds: 0, .. }), "{error}");
    assert_eq!(script.asked().await.len(), 4);
}

#[tokio::test]
async fn a_stream_brings_each_hash_with_its_part_and_the_last_with_complete() {
    let canned = Canned::new().await;
    let client = canned.client();
    let open = json_answer("201 X", &multipart(&canned, json!({"parts": []})));
    let expired = s3_error("403 Forbidden", "AccessDenied");
    let mut script = vec![open, parts(&canned, &[1]), expired, parts(&canned, &[1]), ok()];
    script.extend([parts(&canned, &[2]), ok(), parts(&canned, &[3]), ok(), verified()]);
    let script = canned.answers(script);
    client.upload(options()).stream(BYTES, 43).await.unwrap();
    let asked = script.asked().await;
    let open = asked[0].json();
    assert_eq!(open, json!({"topic": "videos", "size": 43, "part_size": PART, "part_hashes": "deferred"}));
    let hashes: Vec<_> = [1, 3, 5, 7].iter().map(|&call: &usize| asked[call].json()["parts"][0]["sha256"].clone()).collect();
    let of = |number: usize| json!(Sha256::of(BYTES.chunks(PART).nth(number - 1).unwrap()));
    assert_eq!(hashes, [of(1), of(1), of(2), of(3)]);
    assert_eq!([&asked[4].body, &asked[6].body, &asked[8].body].map(|body| &body[..]).concat(), BYTES);
    assert_eq!(asked[9].json(), json!({"sha256": Sha256::of(BYTES)}));
}

#[tokio::test]
async fn a_stream_that_is_to_be_put_at_once_can_still_be_tried_again() {
    let canned = Canned::new().await;
    let client = canned.client();
    let script = vec![single(&canned), s3_error("500 X", "InternalError"), ok(), verified()];
    let script = canned.answers(script);
    client.upload(options()).stream(BYTES, 43).await.unwrap();
    let asked = script.asked().await;
    assert_eq!((&asked[1].body[..], &asked[2].body[..]), (BYTES, BYTES));
    assert_eq!(asked[3].json(), json!({"sha256": Sha256::of(BYTES)}));
}

#[tokio::test]
async fn a_stream_that_ends_early_aborts_its_upload() {
    let canned = Canned::new().await;
    let client = canned.client();
    let open = json_answer("201 X", &multipart(&canned, json!({"parts": []})));
    let script = canned.answers(vec![open, answer("204 No Content", b"")]);
    let error = client.upload(options()).stream(&BYTES[..10], 43).await.unwrap_err();
    assert_eq!(error.to_string(), "the source ended after 10 of 20 bytes");
    assert_eq!(lines(&script.asked().await), [OPEN, &of_upload("DELETE", "")]);
}

#[tokio::test]
async fn cancelling_aborts_the_upload() {
    let canned = Canned::new().await;
    let client = canned.client();
    let script = vec![json_answer("201 X", &multipart(&canned, json!({"parts": []}))), answer("204 No Content", b"")];
    let script = canned.answers(script);
    let stop = Arc::new(Notify::new());
    let opened = Arc::clone(&stop);
    let uploader = client.upload(options()).on_open(move |_| opened.notify_one());
    let (reader, _never_written) = tokio::io::duplex(8);
    let error = uploader.cancelled_by(async move { stop.notified().await }).stream(reader, 43).await.unwrap_err();
    assert!(matches!(error, Error::Cancelled { id: Some(id), aborted: true } if id.to_string() == ID), "{error}");
    assert_eq!(lines(&script.asked().await), [OPEN, &of_upload("DELETE", "")]);
}

#[tokio::test]
async fn a_pointer_to_other_bytes_is_not_taken_for_ours() {
    let canned = Canned::new().await;
    let client = canned.client();
    let other = completed("200 OK", "published", Sha256::of(b"other"));
    let script = vec![single(&canned), ok(), other];
    let _script = canned.answers(script);
    let error = client.upload(options()).bytes(BYTES).await.unwrap_err();
    assert!(matches!(error, Error::Corrupt { .. }), "{error}");
}

#[tokio::test]
async fn a_part_that_lies_elsewhere_is_not_sent() {
    let canned = Canned::new().await;
    let client = canned.client();
    let mut moved = part(&canned, 2);
    moved["offset"] = json!(0);
    let script = vec![json_answer("201 X", &multipart(&canned, json!({"parts": [moved]})))];
    let script = canned.answers(script);
    let error = client.upload(options()).bytes(BYTES).await.unwrap_err();
    assert!(matches!(error, Error::Unexpected { .. }), "{error}");
    assert_eq!(script.asked().await.len(), 1);
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
