//! Uploads that cannot be: what is refused before it begins, and what is taken back after it failed.

use std::path::Path;

use lfs_broker_client::checksum::Sha256;
use lfs_broker_client::{Error, UploadOptions};
use serde_json::json;

use crate::canned::{Asked, Canned, ID, answer, json_answer, s3_error};
use crate::uploads::{BYTES, OPEN, a_file, lines, multipart, of_upload, ok, options, single, verified};

fn gone() -> Vec<u8> {
    answer("204 No Content", b"")
}

#[tokio::test]
async fn a_file_whose_name_the_broker_refuses_goes_up_without_it() {
    for name in ["a\nb", "a\\b", "\u{9b}1m", "\u{7f}"] {
        let canned = Canned::new().await;
        let client = canned.client();
        let script = vec![single(&canned), ok(), verified()];
        let script = canned.answers(script);
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(name);
        std::fs::write(&path, BYTES).unwrap();
        client.upload(options()).file(&path).await.unwrap();
        assert_eq!(script.asked().await[0].json()["filename"], json!(null), "{name:?}");
    }
    // What the caller names itself is the broker's to refuse.
    let canned = Canned::new().await;
    let client = canned.client();
    let script = vec![single(&canned), ok(), verified()];
    let script = canned.answers(script);
    let (_keep, path) = a_file(BYTES);
    client.upload(UploadOptions { filename: Some("a\nb".to_owned()), ..options() }).file(&path).await.unwrap();
    assert_eq!(script.asked().await[0].json()["filename"], json!("a\nb"));
}

/// Uploads a file whose single PUT fails for good, and gives back what was asked.
async fn refused(key: Option<&str>) -> Vec<Asked> {
    let canned = Canned::new().await;
    let client = canned.client();
    let damaged = || s3_error("400 Bad Request", "BadDigest");
    let mut script = vec![single(&canned), damaged(), damaged()];
    script.extend(key.is_none().then(gone));
    let script = canned.answers(script);
    let (_keep, path) = a_file(BYTES);
    let whole = UploadOptions { part_size: None, idempotency_key: key.map(str::to_owned), ..options() };
    let error = client.upload(whole).file(&path).await.unwrap_err();
    assert!(matches!(&error, Error::Storage { status: 400, .. }) && error.is_corrupt(), "{error}");
    script.asked().await
}

#[tokio::test]
async fn a_single_put_that_failed_for_good_leaves_nothing_open_behind() {
    let put = "PUT /b/k";
    assert_eq!(lines(&refused(None).await), [OPEN, put, put, &of_upload("DELETE", "")]);
    // Whoever has the key can go on under it.
    assert_eq!(lines(&refused(Some("mine")).await), [OPEN, put, put]);
}

#[tokio::test]
async fn an_upload_is_not_resumed_to_another_topic_or_key() {
    let (_keep, path) = a_file(BYTES);
    let resumed = async |options: UploadOptions| -> Error {
        let canned = Canned::new().await;
        let client = canned.client();
        let open = multipart(&canned, json!({"key": "order-17", "missing_parts": [], "uploaded_parts": []}));
        let script = canned.answers(vec![json_answer("200 OK", &open), verified()]);
        let path: &Path = &path;
        let outcome = client.upload(options).on_open(|_| panic!("it is not this upload")).resume(ID.parse().unwrap(), path).await;
        drop(script);
        outcome.unwrap_err()
    };
    let elsewhere = resumed(UploadOptions::to("other")).await;
    assert!(matches!(elsewhere, Error::Invalid(_)), "{elsewhere}");
    assert_eq!(elsewhere.to_string(), format!("upload {ID} is to the topic videos, not to other"));
    for key in [&b"order-18"[..], b"\xff"] {
        let error = resumed(UploadOptions { key: Some(key.to_vec()), ..options() }).await;
        assert!(matches!(&error, Error::Invalid(text) if text.contains("another key")), "{error}");
    }

    // The same key, and none, go on.
    for key in [Some(b"order-17".to_vec()), None] {
        let canned = Canned::new().await;
        let client = canned.client();
        let open = multipart(&canned, json!({"key": "order-17", "missing_parts": [], "uploaded_parts": []}));
        let script = canned.answers(vec![json_answer("200 OK", &open), verified()]);
        client.upload(UploadOptions { key, ..options() }).resume(ID.parse().unwrap(), &path).await.unwrap();
        assert_eq!(script.asked().await[1].json(), json!({"sha256": Sha256::of(BYTES)}));
    }
}
