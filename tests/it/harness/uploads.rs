//! What uploads need besides one PUT: parts and their hashes, other checksums, objects put behind the broker's back.

use aws_sdk_s3::error::ProvideErrorMetadata as _;
use lfs_broker_client::checksum::Algorithm;
use serde_json::{Value, json};

use super::{Answer, House, Record, sha256};

/// The smallest part that S3 joins, in bytes.
pub(crate) const PART: usize = 5 << 20;

/// The SHA-256 of each part of this size.
pub(crate) fn part_hashes(content: &[u8], part_bytes: usize) -> Vec<String> {
    content.chunks(part_bytes).map(sha256).collect()
}

/// The digest by an algorithm's name, hex.
pub(crate) fn digest(algorithm: &str, content: &[u8]) -> String {
    let mut hasher = algorithm.parse::<Algorithm>().unwrap().hasher();
    hasher.update(content);
    hasher.finish().hex()
}

impl Record {
    /// The first header of this name.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(header, _)| header == name).map(|(_, value)| value.as_str())
    }

    /// The value as JSON.
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.value).unwrap()
    }
}

impl House {
    /// Opens an upload in parts of 5 MiB without part hashes; `more` adds or replaces members.
    pub(crate) async fn open_parts(&self, content: &[u8], more: Value) -> Answer {
        let mut members = json!({"part_size": PART});
        members.as_object_mut().unwrap().extend(more.as_object().expect("an object").clone());
        self.open(content, members).await
    }

    /// The same with the hash of every part.
    pub(crate) async fn open_hashed_parts(&self, content: &[u8], more: Value) -> Answer {
        let mut members = json!({"part_sha256": part_hashes(content, PART)});
        members.as_object_mut().unwrap().extend(more.as_object().expect("an object").clone());
        self.open_parts(content, members).await
    }

    /// Asks for part URLs.
    pub(crate) async fn sign(&self, id: &str, body: Value) -> Answer {
        self.post(&format!("/lfs/uploads/{id}/parts"), &body).await
    }

    pub(crate) async fn complete_with(&self, id: &str, body: Value) -> Answer {
        self.post(&format!("/lfs/uploads/{id}/complete"), &body).await
    }

    /// Completes what may have to be read back first: 200 at once, or 202 and published soon. Gives what GET says then.
    pub(crate) async fn complete_and_wait(&self, id: &str, body: Value) -> Answer {
        let answer = self.complete_with(id, body).await;
        assert!([200, 202].contains(&answer.status), "{}", answer.text);
        self.until(id, "published").await
    }

    /// Asks for the bytes behind a record's value.
    pub(crate) async fn resolve(&self, value: &[u8], query: &str) -> Answer {
        let request = self.http.post(format!("{}/lfs/resolve{query}", self.url()));
        self.send(request.header("content-type", "application/json").body(value.to_vec())).await
    }

    /// Downloads by a resolved pointer, as a client that knows nothing else would.
    pub(crate) async fn download(&self, resolved: &Value) -> Vec<u8> {
        let got = self.http.get(resolved["url"].as_str().expect("a URL")).send().await.unwrap();
        assert_eq!(got.status(), 200);
        got.bytes().await.unwrap().to_vec()
    }

    /// The only record of the house's topic, and the bytes behind it.
    pub(crate) async fn only_record(&self) -> (Record, Vec<u8>) {
        let mut records = self.records(&self.topic).await;
        assert_eq!(records.len(), 1);
        let record = records.remove(0);
        let resolved = self.resolve(&record.value, "").await.expect(200);
        let content = self.download(&resolved.json).await;
        (record, content)
    }

    /// Writes an object with the house's own credentials, past the broker; `token` is the write token it bears.
    pub(crate) async fn put_object(&self, key: &str, content: &[u8], token: Option<&str>) {
        for _ in 0..20 {
            let put = self.s3.put_object().bucket(&self.bucket).key(key).body(content.to_vec().into());
            let put = match token {
                Some(token) => put.metadata("lfs-upload-id", token),
                None => put,
            };
            match put.send().await {
                Ok(_) => return,
                Err(error) if error.code().is_some_and(|code| lost_its_directory(409, code)) => {}
                Err(error) => panic!("{error:?}"),
            }
        }
        panic!("{key}: no PUT outlived the removals beside it");
    }

    /// Waits until S3 holds neither objects nor, under this key, parts.
    pub(crate) async fn until_nothing_is_left(&self, object_key: &str) {
        self.eventually("nothing is left in S3", || async {
            self.objects().await.is_empty() && !self.has_open_multipart(object_key).await
        })
        .await;
    }
}

/// Whether VersityGW removed the directory above a key while it wrote there: a DELETE takes empty directories away, and a
/// PUT that meets it answers so and has stored nothing (1.8.0, seen in 7 of 100 PUTs beside constant DELETEs). Clients try
/// again.
pub(super) fn lost_its_directory(status: u16, text: &str) -> bool {
    status == 409 && text.contains("ExistingObjectIsDirectory")
}
