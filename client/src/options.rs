//! The caller's options for an upload, and the open request built from them.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use uuid::Uuid;

use crate::api::{Headers, OpenUpload, PartHashes, Upload};
use crate::error::Error;
use crate::parts::OpenRequest;
use crate::source::{self, Hashes};

/// Options of an upload.
#[derive(Debug, Clone)]
pub struct UploadOptions {
    /// The Kafka topic that receives the pointer.
    pub topic: String,
    /// The record's key. JSON carries bytes that are not UTF-8 as base64.
    pub key: Option<Vec<u8>>,
    /// Headers of the record in Kafka, in order.
    pub headers: Headers,
    /// Media type of the bytes. When absent, the broker uses `application/octet-stream`.
    pub content_type: Option<String>,
    /// The file name that a download gets. When absent, the name of the uploaded file.
    pub filename: Option<String>,
    /// The partition of the record. When absent, the partitioner chooses it by the key.
    pub partition: Option<i32>,
    /// The size of a part in bytes. When absent, 16 MiB, or more if the upload would need over 10,000 parts.
    pub part_size: Option<u64>,
    /// The idempotency key: a second run with the same key continues the same upload. When absent, a random key. Set a
    /// key to be able to resume a single PUT.
    pub idempotency_key: Option<String>,
    /// How many parts are uploaded concurrently. A stream always uploads one part and buffers the next.
    pub concurrency: usize,
    /// Whether to wait until the pointer is in Kafka. Otherwise the upload returns at state `verified`.
    pub wait_published: bool,
    /// The longest wait for the broker's verification, and for Kafka if `wait_published` is set.
    pub wait_timeout: Duration,
}

impl Default for UploadOptions {
    fn default() -> Self {
        Self {
            topic: String::new(),
            key: None,
            headers: Headers::default(),
            content_type: None,
            filename: None,
            partition: None,
            part_size: None,
            idempotency_key: None,
            concurrency: 4,
            wait_published: false,
            // The broker needs about half an hour to read a terabyte again.
            wait_timeout: Duration::from_secs(3600),
        }
    }
}

impl UploadOptions {
    /// Options for an upload to `topic`, with the default for every other field.
    pub fn to(topic: impl Into<String>) -> Self {
        Self { topic: topic.into(), ..Self::default() }
    }

    /// The members `key` and `key_base64`: the key as text, or as base64 if it is not UTF-8.
    fn json_key(&self) -> (Option<String>, Option<String>) {
        match self.key.clone().map(String::from_utf8) {
            Some(Ok(text)) => (Some(text), None),
            Some(Err(bytes)) => (None, Some(BASE64.encode(bytes.as_bytes()))),
            None => (None, None),
        }
    }

    /// Fails if the resumed upload has another topic or key than the options.
    pub(crate) fn check_matches(&self, upload: &Upload) -> Result<(), Error> {
        if upload.topic != self.topic {
            let (id, topic) = (upload.id, &upload.topic);
            return Err(Error::Invalid(format!("upload {id} has the topic {topic}, not {}", self.topic)));
        }
        // Without a key in the options, the upload keeps the key that it was opened with.
        if self.key.is_some() && self.json_key() != (upload.key.clone(), upload.key_base64.clone()) {
            return Err(Error::Invalid(format!("upload {} has another record key than the given one", upload.id)));
        }
        Ok(())
    }

    /// The request that opens the upload. It lists the hashes of the parts only if there is more than one part.
    pub(crate) fn open_request(&self, size: u64, hashes: Option<&Hashes>) -> OpenRequest {
        let (key, key_base64) = self.json_key();
        let parts = hashes.filter(|hashes| hashes.parts.len() > 1);
        let part_size = match hashes {
            Some(_) => parts.map(|hashes| hashes.part_size),
            None => Some(source::part_size(size, self.part_size)),
        };
        let body = OpenUpload {
            topic: self.topic.clone(),
            size,
            key,
            key_base64,
            sha256: hashes.map(|hashes| hashes.whole),
            checksum_alg: None,
            checksum: None,
            content_type: self.content_type.clone(),
            filename: self.filename.clone(),
            headers: self.headers.clone(),
            partition: self.partition,
            part_size,
            part_sha256: parts.map(|hashes| hashes.parts.clone()),
            part_hashes: hashes.is_none().then_some(PartHashes::Deferred),
        };
        OpenRequest { body, idempotency_key: self.idempotency_key.clone().unwrap_or_else(|| Uuid::new_v4().to_string()) }
    }
}

impl From<&str> for UploadOptions {
    fn from(topic: &str) -> Self {
        Self::to(topic)
    }
}

impl From<String> for UploadOptions {
    fn from(topic: String) -> Self {
        Self::to(topic)
    }
}
