//! Helpers for multipart uploads, other checksums, and objects written without the broker.

use aws_sdk_s3::error::ProvideErrorMetadata as _;
use lfs_broker_client::checksum::Algorithm;
use serde_json::{Value, json};

use super::{ApiResponse, Record, TestBroker, sha256};

/// The smallest part that S3 joins.
pub(crate) const PART_BYTES: usize = 5 << 20;

/// The SHA-256 of each part of this size.
pub(crate) fn part_hashes(content: &[u8], part_bytes: usize) -> Vec<String> {
    content.chunks(part_bytes).map(sha256).collect()
}

/// The hex digest of the content by the algorithm's name.
pub(crate) fn digest(algorithm: &str, content: &[u8]) -> String {
    let mut hasher = algorithm.parse::<Algorithm>().unwrap().hasher();
    hasher.update(content);
    hasher.finish().hex()
}

impl Record {
    /// The first header with this name.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(header, _)| header == name).map(|(_, value)| value.as_str())
    }

    /// The value as JSON.
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.value).unwrap()
    }
}

impl TestBroker {
    /// Opens an upload in parts of 5 MiB without part hashes. `more` adds or replaces members.
    pub(crate) async fn open_multipart(&self, content: &[u8], more: Value) -> ApiResponse {
        let mut members = json!({"part_size": PART_BYTES});
        members.as_object_mut().unwrap().extend(more.as_object().expect("an object").clone());
        self.open(content, members).await
    }

    /// Opens an upload in parts of 5 MiB with the hash of every part.
    pub(crate) async fn open_multipart_with_hashes(&self, content: &[u8], more: Value) -> ApiResponse {
        let mut members = json!({"part_sha256": part_hashes(content, PART_BYTES)});
        members.as_object_mut().unwrap().extend(more.as_object().expect("an object").clone());
        self.open_multipart(content, members).await
    }

    /// Requests presigned URLs for parts.
    pub(crate) async fn presign_parts(&self, id: &str, body: Value) -> ApiResponse {
        self.post(&format!("/lfs/uploads/{id}/parts"), &body).await
    }

    pub(crate) async fn complete_with(&self, id: &str, body: Value) -> ApiResponse {
        self.post(&format!("/lfs/uploads/{id}/complete"), &body).await
    }

    /// Completes an upload that the broker may have to read back: 200, or 202 and published later. Returns the published state.
    pub(crate) async fn complete_and_wait(&self, id: &str, body: Value) -> ApiResponse {
        let response = self.complete_with(id, body).await;
        assert!([200, 202].contains(&response.status), "{}", response.text);
        self.wait_for_state(id, "published").await
    }

    /// Resolves a record's value to a download URL.
    pub(crate) async fn resolve(&self, value: &[u8], query: &str) -> ApiResponse {
        let request = self.http.post(format!("{}/lfs/resolve{query}", self.url()));
        self.send(request.header("content-type", "application/json").body(value.to_vec())).await
    }

    /// Downloads with a resolved pointer, like a client that knows nothing else.
    pub(crate) async fn download(&self, resolved: &Value) -> Vec<u8> {
        let got = self.http.get(resolved["url"].as_str().expect("a URL")).send().await.unwrap();
        assert_eq!(got.status(), 200);
        got.bytes().await.unwrap().to_vec()
    }

    /// The only record of the broker's topic, and the content of its object.
    pub(crate) async fn only_record(&self) -> (Record, Vec<u8>) {
        let mut records = self.records(&self.topic).await;
        assert_eq!(records.len(), 1);
        let record = records.remove(0);
        let resolved = self.resolve(&record.value, "").await.expect(200);
        let content = self.download(&resolved.json).await;
        (record, content)
    }

    /// Writes an object directly with the broker's S3 credentials. `token` becomes the write token in its metadata.
    pub(crate) async fn put_object(&self, key: &str, content: &[u8], token: Option<&str>) {
        for _ in 0..20 {
            let put = self.s3.put_object().bucket(&self.bucket).key(key).body(content.to_vec().into());
            let put = match token {
                Some(token) => put.metadata("lfs-upload-id", token),
                None => put,
            };
            match put.send().await {
                Ok(_) => return,
                Err(error) if error.code().is_some_and(|code| is_versitygw_directory_race(409, code)) => {}
                Err(error) => panic!("{error:?}"),
            }
        }
        panic!("{key}: every PUT failed because of concurrent DELETEs");
    }

    /// Waits until S3 holds no object, and no open multipart upload for this key.
    pub(crate) async fn wait_until_s3_is_empty(&self, object_key: &str) {
        self.eventually("nothing is left in S3", || async {
            self.objects().await.is_empty() && !self.has_open_multipart(object_key).await
        })
        .await;
    }
}

/// Whether VersityGW removed the directory above a key while it wrote there. A DELETE removes empty directories, and a
/// concurrent PUT then fails like this without storing anything (1.8.0, seen in 7 of 100 PUTs beside constant DELETEs).
/// Clients retry such a PUT.
pub(super) fn is_versitygw_directory_race(status: u16, text: &str) -> bool {
    status == 409 && text.contains("ExistingObjectIsDirectory")
}
