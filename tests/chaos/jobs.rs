//! What the clients are to do: uploads of every kind, drawn from the seed.

use std::time::Duration;

use lfs_broker_client::checksum::Sha256;
use serde_json::{Value, json};

use crate::journal::Intent;
use crate::stage::{PARTITIONS, TOPICS};

/// Size of every part but the last; S3 takes no smaller ones.
pub(crate) const PART: usize = 5 << 20;

/// What a job is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Work {
    /// The crate that we ship does it.
    Sdk,
    /// One PUT with its hash.
    Single,
    /// One PUT whose hash comes with complete: the bytes are read again.
    Deferred,
    /// S3 refuses the bytes, by their hash.
    WrongBytes,
    /// The broker refuses the bytes, after it has read them.
    WrongHash,
    /// Parts with hashes from the start.
    PartsGiven,
    /// Parts whose hashes come as they are signed.
    PartsDeferred,
    /// Parts without hashes: the object is read again.
    PartsRead,
    /// Aborted; the number says how far it got.
    Abort(u8),
    /// Left alone; the number says how far it got.
    Abandon(u8),
    /// Bytes that are sent after the abort.
    Late,
    /// Abort and complete at the same time.
    Race,
}

/// One upload, before anything has happened to it.
#[derive(Debug, Clone)]
pub(crate) struct Job {
    pub(crate) work: Work,
    pub(crate) name: String,
    pub(crate) topic: &'static str,
    pub(crate) key: Option<String>,
    pub(crate) partition: Option<i32>,
    pub(crate) bytes: Vec<u8>,
    pub(crate) with_idempotency_key: bool,
    /// Does not wait for the first answers to complete.
    pub(crate) is_impatient: bool,
    /// Wants to know where the record is.
    pub(crate) follows: bool,
    pub(crate) think: Duration,
}

impl Job {
    /// The job of this number of a client; it follows from the seed.
    pub(crate) fn draw(seed: u64, client: usize, number: usize) -> Self {
        let mixed = seed ^ (client as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ ((number as u64 + 1) << 20);
        let mut random = fastrand::Rng::with_seed(mixed);
        let work = match random.u32(..200) {
            0..44 => Work::Sdk,
            44..122 => Work::Single,
            122..134 => Work::Deferred,
            134..140 => Work::WrongBytes,
            140..146 => Work::WrongHash,
            146..148 => Work::PartsGiven,
            148..150 => Work::PartsDeferred,
            150..152 => Work::PartsRead,
            152..166 => Work::Abort(random.u8(..4)),
            166..180 => Work::Abandon(random.u8(..4)),
            180..190 => Work::Late,
            _ => Work::Race,
        };
        let is_multipart = match work {
            Work::PartsGiven | Work::PartsDeferred | Work::PartsRead => true,
            // The last stage of what is broken off.
            Work::Abort(3) | Work::Abandon(3) => random.bool(),
            _ => false,
        };
        let size = match is_multipart {
            true => PART * random.usize(1..3) + random.usize(1..2000),
            false => random.usize(..3000).saturating_sub(40),
        };
        let mut bytes = vec![0; size];
        random.fill(&mut bytes);
        let (key, partition) = match random.u32(..10) {
            0..6 => (Some(format!("client-{client}")), None),
            6..8 => (Some(format!("shared-{}", random.u32(..4))), None),
            8 => (None, None),
            _ => (None, Some(random.i32(0..PARTITIONS))),
        };
        Self {
            work,
            name: format!("{seed}-{client}-{number}"),
            topic: TOPICS[usize::from(random.u32(..4) == 0)],
            key,
            partition,
            bytes,
            with_idempotency_key: random.u32(..8) > 0,
            is_impatient: random.u32(..6) == 0,
            follows: random.bool(),
            think: Duration::from_millis(random.u64(..700)),
        }
    }

    pub(crate) fn is_multipart(&self) -> bool {
        self.bytes.len() > PART
    }

    pub(crate) fn parts(&self) -> impl Iterator<Item = &[u8]> {
        self.bytes.chunks(PART)
    }

    /// What is asked for; the hashes are those of the bytes that are meant.
    pub(crate) fn opening(&self) -> Value {
        let sha256 = Sha256::of(&self.bytes).to_string();
        let mut body = json!({"topic": self.topic, "size": self.bytes.len(), "headers": {"job": self.name}});
        let mut put = |name: &str, value: Value| body[name] = value;
        if let Some(key) = &self.key {
            put("key", json!(key));
        }
        if let Some(partition) = self.partition {
            put("partition", json!(partition));
        }
        match self.work {
            Work::Deferred | Work::WrongHash => {}
            Work::PartsGiven => {
                put("sha256", json!(sha256));
                put("part_size", json!(PART));
                put("part_sha256", self.parts().map(|part| json!(Sha256::of(part).to_string())).collect());
            }
            Work::PartsDeferred => {
                put("sha256", json!(sha256));
                put("part_size", json!(PART));
                put("part_hashes", json!("deferred"));
            }
            _ => put("sha256", json!(sha256)),
        }
        body
    }

    pub(crate) fn intent(&self) -> Intent {
        Intent {
            topic: self.topic.to_owned(),
            key: self.key.clone(),
            size_bytes: self.bytes.len() as u64,
            sha256: Sha256::of(&self.bytes).to_string(),
            is_sound: !matches!(self.work, Work::WrongBytes | Work::WrongHash),
        }
    }

    /// The bytes that are sent: as many, but in some jobs others.
    pub(crate) fn sent(&self) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        if matches!(self.work, Work::WrongBytes | Work::WrongHash) {
            match bytes.first_mut() {
                Some(first) => *first ^= 1,
                None => bytes.push(0),
            }
        }
        bytes
    }
}
