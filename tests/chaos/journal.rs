//! The clients' knowledge: the uploads that they declared, and which of them were acknowledged or reported as failed.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::Value;
use uuid::Uuid;

/// A client's declaration of an upload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DeclaredUpload {
    pub(crate) topic: String,
    pub(crate) key: Option<String>,
    pub(crate) size_bytes: u64,
    /// The hash of the right bytes, in hex.
    pub(crate) sha256: String,
    /// Whether the client ever sends the right bytes.
    pub(crate) sends_right_bytes: bool,
}

/// A complete that was answered with 200, or with 202 `verified`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Acknowledgement {
    pub(crate) id: Uuid,
    pub(crate) pointer: Value,
    /// Partition and offset, if the upload was published already.
    pub(crate) position: Option<(i32, i64)>,
    /// When complete was first requested, since the start of the run.
    pub(crate) requested_at: Duration,
    /// When the acknowledgement was received.
    pub(crate) received_at: Duration,
}

/// Everything that the clients know.
#[derive(Debug, Default)]
pub(crate) struct JournalEntries {
    pub(crate) declared: HashMap<Uuid, DeclaredUpload>,
    pub(crate) acknowledged: Vec<Acknowledgement>,
    /// Uploads that were reported as finally failed, and how.
    pub(crate) failed: HashMap<Uuid, String>,
    /// When each upload was first opened, and when it was reported as failed.
    pub(crate) opened_at: HashMap<Uuid, Duration>,
    pub(crate) failed_at: HashMap<Uuid, Duration>,
    /// Responses that the API does not allow for the request.
    pub(crate) unexpected: Vec<String>,
    pub(crate) outcomes: BTreeMap<String, u64>,
    pub(crate) requests: u64,
    pub(crate) retries: u64,
}

/// The journal that the clients share.
pub(crate) struct Journal {
    began: Instant,
    /// When the run started, since 1970.
    started: Duration,
    entries: Mutex<JournalEntries>,
}

impl Journal {
    pub(crate) fn new() -> Self {
        let started = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { began: Instant::now(), started, entries: Mutex::default() }
    }

    /// When the run started, since 1970.
    pub(crate) fn started(&self) -> Duration {
        self.started
    }

    pub(crate) fn now(&self) -> Duration {
        self.began.elapsed()
    }

    pub(crate) fn entries(&self) -> MutexGuard<'_, JournalEntries> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn unexpected(&self, description: String) {
        self.entries().unexpected.push(description);
    }

    /// Records an upload. All clients must see the same declaration for one id.
    pub(crate) fn opened(&self, id: Uuid, declared: &DeclaredUpload) {
        let now = self.now();
        let mut entries = self.entries();
        entries.opened_at.entry(id).or_insert(now);
        let before = entries.declared.entry(id).or_insert_with(|| declared.clone());
        if before != declared {
            let description = format!("{id} was opened for {before:?} and returned for {declared:?}");
            entries.unexpected.push(description);
        }
    }

    pub(crate) fn failed(&self, id: Uuid, reason: &str) {
        let now = self.now();
        let mut entries = self.entries();
        entries.failed.insert(id, reason.to_owned());
        entries.failed_at.insert(id, now);
    }

    /// Records a response that acknowledges the upload. Returns `false` if the response acknowledges nothing.
    pub(crate) fn acknowledged(&self, response: &Value, requested_at: Duration) -> bool {
        let Some(id) = response["id"].as_str().and_then(|id| id.parse().ok()) else { return false };
        if !matches!(response["state"].as_str(), Some("verified" | "published")) {
            return false;
        }
        let record = &response["record"];
        let partition = record["partition"].as_i64().and_then(|partition| i32::try_from(partition).ok());
        let position = partition.zip(record["offset"].as_i64());
        if response["state"] == "published" && position.is_none() {
            self.unexpected(format!("{id} is published, but the response has no record position: {response}"));
        }
        let received_at = self.now();
        self.entries().acknowledged.push(Acknowledgement {
            id,
            pointer: response["pointer"].clone(),
            position,
            requested_at,
            received_at,
        });
        true
    }
}
