//! What the clients know: what they sent, what they were promised, and what they were told had failed.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;
use uuid::Uuid;

/// What a client meant an upload to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Intent {
    pub(crate) topic: String,
    pub(crate) key: Option<String>,
    pub(crate) size_bytes: u64,
    /// Of the bytes that were meant, in hex.
    pub(crate) sha256: String,
    /// Whether the bytes that are meant are ever sent.
    pub(crate) is_sound: bool,
}

/// A complete that was answered with 200, or with 202 `verified`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Promise {
    pub(crate) id: Uuid,
    pub(crate) pointer: Value,
    /// Partition and offset, where it was published already.
    pub(crate) place: Option<(i32, i64)>,
    /// When complete was first asked for, since the beginning of the run.
    pub(crate) asked_at: Duration,
    /// When the promise was heard.
    pub(crate) heard_at: Duration,
}

/// All that the clients know.
#[derive(Debug, Default)]
pub(crate) struct Known {
    pub(crate) intents: HashMap<Uuid, Intent>,
    pub(crate) promises: Vec<Promise>,
    /// Uploads that were told to have failed for good, and by which word.
    pub(crate) failed: HashMap<Uuid, String>,
    /// When each upload was first heard of, and when it was told to have failed.
    pub(crate) opened_at: HashMap<Uuid, Duration>,
    pub(crate) failed_at: HashMap<Uuid, Duration>,
    /// Answers that the contract does not allow for what was asked.
    pub(crate) unexpected: Vec<String>,
    pub(crate) outcomes: BTreeMap<String, u64>,
    pub(crate) requests: u64,
    pub(crate) retries: u64,
}

/// Where the clients write it down.
pub(crate) struct Journal {
    began: Instant,
    known: Mutex<Known>,
}

impl Journal {
    pub(crate) fn new() -> Self {
        Self { began: Instant::now(), known: Mutex::default() }
    }

    pub(crate) fn now(&self) -> Duration {
        self.began.elapsed()
    }

    pub(crate) fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn unexpected(&self, what: String) {
        self.known().unexpected.push(what);
    }

    /// Takes note of an upload. One upload stays what it was meant to be.
    pub(crate) fn opened(&self, id: Uuid, intent: &Intent) {
        let now = self.now();
        let mut known = self.known();
        known.opened_at.entry(id).or_insert(now);
        let before = known.intents.entry(id).or_insert_with(|| intent.clone());
        if before != intent {
            let what = format!("{id} was opened for {before:?} and given out for {intent:?}");
            known.unexpected.push(what);
        }
    }

    pub(crate) fn failed(&self, id: Uuid, why: &str) {
        let now = self.now();
        let mut known = self.known();
        known.failed.insert(id, why.to_owned());
        known.failed_at.insert(id, now);
    }

    /// Takes note of an answer of complete, or of a state, that promises the pointer; `false` when it promises nothing.
    pub(crate) fn promised(&self, answer: &Value, asked_at: Duration) -> bool {
        let Some(id) = answer["id"].as_str().and_then(|id| id.parse().ok()) else { return false };
        if !matches!(answer["state"].as_str(), Some("verified" | "published")) {
            return false;
        }
        let record = &answer["record"];
        let partition = record["partition"].as_i64().and_then(|partition| i32::try_from(partition).ok());
        let place = partition.zip(record["offset"].as_i64());
        if answer["state"] == "published" && place.is_none() {
            self.unexpected(format!("{id} is published and nobody says where: {answer}"));
        }
        let heard_at = self.now();
        self.known().promises.push(Promise { id, pointer: answer["pointer"].clone(), place, asked_at, heard_at });
        true
    }
}
