//! Uploads that cannot be: what is refused before it begins, and what is taken back after it failed.

use lfs_broker_client::UploadOptions;
use serde_json::json;

use crate::canned::Canned;
use crate::uploads::{BYTES, a_file, ok, options, single, verified};

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
