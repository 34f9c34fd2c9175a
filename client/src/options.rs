//! What the caller says of an upload, and the request that becomes of it.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use uuid::Uuid;

use crate::api::{Headers, OpenUpload, PartHashes, Upload};
use crate::error::Error;
use crate::parts::Opening;
use crate::source::{self, Hashes};

/// What to upload under, and how.
#[derive(Debug, Clone)]
pub struct UploadOptions {
    /// The Kafka topic that gets the pointer.
    pub topic: String,
    /// The record's key; bytes that are not UTF-8 travel as base64.
    pub key: Option<Vec<u8>>,
    /// Headers of the record in Kafka, in order.
    pub headers: Headers,
    /// Media type of the bytes; the broker takes `application/octet-stream` when absent.
    pub content_type: Option<String>,
    /// The name that a download is offered under; that of the file when absent.
    pub filename: Option<String>,
    /// The partition of the record; the key decides when absent.
    pub partition: Option<i32>,
    /// The size of a part in bytes: 16 MiB when absent, and more where 10,000 parts would not suffice.
    pub part_size: Option<u64>,
    /// What makes a second run the same upload; a random one when absent. Keep it to resume a single PUT.
    pub idempotency_key: Option<String>,
    /// How many parts go up at a time. A stream always has one going up and the next one in memory.
    pub concurrency: usize,
    /// Whether to wait until the pointer is in Kafka. Otherwise the broker's promise (`verified`) is enough.
    pub wait_published: bool,
    /// The longest wait for the broker's verification, and for Kafka where that is waited for.
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
            // Re-reading a terabyte takes about half of it.
            wait_timeout: Duration::from_secs(3600),
        }
    }
}

impl UploadOptions {
    /// An upload to `topic` with everything else at its default.
    pub fn to(topic: impl Into<String>) -> Self {
        Self { topic: topic.into(), ..Self::default() }
    }

    /// The key as JSON carries it: as text, or else in base64.
    fn written_key(&self) -> (Option<String>, Option<String>) {
        match self.key.clone().map(String::from_utf8) {
            Some(Ok(text)) => (Some(text), None),
            Some(Err(bytes)) => (None, Some(BASE64.encode(bytes.as_bytes()))),
            None => (None, None),
        }
    }

    /// Refuses to go on with an upload that leads elsewhere than the caller says.
    pub(crate) fn check_same(&self, upload: &Upload) -> Result<(), Error> {
        if upload.topic != self.topic {
            let (id, topic) = (upload.id, &upload.topic);
            return Err(Error::Invalid(format!("upload {id} is to the topic {topic}, not to {}", self.topic)));
        }
        // Without a key nothing is said of it: the upload keeps the one that it was opened with.
        if self.key.is_some() && self.written_key() != (upload.key.clone(), upload.key_base64.clone()) {
            return Err(Error::Invalid(format!("upload {} has another key than the one given", upload.id)));
        }
        Ok(())
    }

    /// The request that opens the upload. Hashes of parts are worth their bytes only where there is more than one part.
    pub(crate) fn opening(&self, size: u64, hashes: Option<&Hashes>) -> Opening {
        let (key, key_base64) = self.written_key();
        let parts = hashes.filter(|hashes| hashes.parts.len() > 1);
        let part_size = match hashes {
            Some(_) => parts.map(|hashes| hashes.part_size),
            None => Some(source::part_size(size, self.part_size)),
        };
        let request = OpenUpload {
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
        Opening { request, key: self.idempotency_key.clone().unwrap_or_else(|| Uuid::new_v4().to_string()) }
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
