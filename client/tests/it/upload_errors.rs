//! Uploads that fail: which are refused before they begin, and which are aborted after they failed.

use std::path::Path;

use lfs_broker_client::checksum::Sha256;
use lfs_broker_client::{Error, UploadOptions};
use serde_json::json;

use crate::mock_server::{ID, MockServer, ReceivedRequest, json_response, response, s3_error};
use crate::uploads::{BYTES, OPEN, a_file, multipart, of_upload, ok, options, request_lines, single, verified};

fn no_content() -> Vec<u8> {
    response("204 No Content", b"")
}

#[tokio::test]
async fn a_file_with_an_invalid_name_is_uploaded_without_a_name() {
    for name in ["a\nb", "a\\b", "\u{9b}1m", "\u{7f}"] {
        let server = MockServer::new().await;
        let client = server.client();
        let responses = vec![single(&server), ok(), verified()];
        let exchange = server.respond(responses);
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(name);
        std::fs::write(&path, BYTES).unwrap();
        client.upload(options()).file(&path).await.unwrap();
        assert_eq!(exchange.requests().await[0].json()["filename"], json!(null), "{name:?}");
    }
    // An explicit file name of the caller is sent unchanged, and the broker decides about it.
    let server = MockServer::new().await;
    let client = server.client();
    let responses = vec![single(&server), ok(), verified()];
    let exchange = server.respond(responses);
    let (_directory, path) = a_file(BYTES);
    client.upload(UploadOptions { filename: Some("a\nb".to_owned()), ..options() }).file(&path).await.unwrap();
    assert_eq!(exchange.requests().await[0].json()["filename"], json!("a\nb"));
}

/// Uploads a file whose single PUT fails permanently, and returns the requests.
async fn failed_put(key: Option<&str>) -> Vec<ReceivedRequest> {
    let server = MockServer::new().await;
    let client = server.client();
    let damaged = || s3_error("400 Bad Request", "BadDigest");
    let mut responses = vec![single(&server), damaged(), damaged()];
    responses.extend(key.is_none().then(no_content));
    let exchange = server.respond(responses);
    let (_directory, path) = a_file(BYTES);
    let whole = UploadOptions { part_size: None, idempotency_key: key.map(str::to_owned), ..options() };
    let error = client.upload(whole).file(&path).await.unwrap_err();
    assert!(matches!(&error, Error::Storage { status: 400, .. }) && error.is_corrupt(), "{error}");
    exchange.requests().await
}

#[tokio::test]
async fn a_single_put_that_fails_permanently_is_aborted() {
    let put = "PUT /b/k";
    assert_eq!(request_lines(&failed_put(None).await), [OPEN, put, put, &of_upload("DELETE", "")]);
    // A caller with its own key can continue the upload.
    assert_eq!(request_lines(&failed_put(Some("mine")).await), [OPEN, put, put]);
}

#[tokio::test]
async fn an_upload_is_not_resumed_with_another_topic_or_key() {
    let (_directory, path) = a_file(BYTES);
    let resumed = async |options: UploadOptions| -> Error {
        let server = MockServer::new().await;
        let client = server.client();
        let open = multipart(&server, json!({"key": "order-17", "missing_parts": [], "uploaded_parts": []}));
        let exchange = server.respond(vec![json_response("200 OK", &open), verified()]);
        let path: &Path = &path;
        let outcome = client
            .upload(options)
            .on_open(|_| panic!("the upload does not match the options"))
            .resume(ID.parse().unwrap(), path)
            .await;
        drop(exchange);
        outcome.unwrap_err()
    };
    let other_topic = resumed(UploadOptions::to("other")).await;
    assert!(matches!(other_topic, Error::Invalid(_)), "{other_topic}");
    assert_eq!(other_topic.to_string(), format!("upload {ID} has the topic videos, not other"));
    for key in [&b"order-18"[..], b"\xff"] {
        let error = resumed(UploadOptions { key: Some(key.to_vec()), ..options() }).await;
        assert!(matches!(&error, Error::Invalid(text) if text.contains("another record key")), "{error}");
    }

    // The same key, or no key, continues the upload.
    for key in [Some(b"order-17".to_vec()), None] {
        let server = MockServer::new().await;
        let client = server.client();
        let open = multipart(&server, json!({"key": "order-17", "missing_parts": [], "uploaded_parts": []}));
        let exchange = server.respond(vec![json_response("200 OK", &open), verified()]);
        client.upload(UploadOptions { key, ..options() }).resume(ID.parse().unwrap(), &path).await.unwrap();
        assert_eq!(exchange.requests().await[1].json(), json!({"sha256": Sha256::of(BYTES)}));
    }
}
