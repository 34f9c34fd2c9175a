//! Uploads that cannot be: what is refused before it begins, and what is taken back after it failed.

use std::path::Path;

use lfs_broker_client::checksum::Sha256;
use lfs_broker_client::{Error, UploadOptions};
use serde_json::json;

use crate::canned::{Canned, ID, json_answer};
use crate::uploads::{BYTES, a_file, multipart, ok, options, single, verified};

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
