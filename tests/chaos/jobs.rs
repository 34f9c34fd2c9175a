//! The clients' jobs: uploads of every kind, drawn from the seed.

use std::time::Duration;

use lfs_broker_client::checksum::Sha256;
use serde_json::{Value, json};

use crate::cluster::{PARTITIONS, TOPICS};
use crate::journal::DeclaredUpload;

/// The size of every part but the last; S3 accepts no smaller ones.
pub(crate) const PART_BYTES: usize = 5 << 20;

/// The kinds of jobs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum JobKind {
    /// An upload with the client crate.
    Sdk,
    /// A single PUT with its hash at open.
    Single,
    /// A single PUT whose hash comes with complete: the broker reads the bytes back.
    Deferred,
    /// Wrong bytes that S3 refuses because of their signed hash.
    WrongBytes,
    /// Wrong bytes that the broker rejects after it has read them back.
    WrongHash,
    /// Parts with hashes at open.
    PartsGiven,
    /// Parts whose hashes come when they are presigned.
    PartsDeferred,
    /// Parts without hashes: the broker reads the object back.
    PartsRead,
    /// An upload that is aborted; the number is the stage that it reaches before.
    Abort(u8),
    /// An upload that is abandoned; the number is the stage that it reaches before.
    Abandon(u8),
    /// Bytes that are put after the abort.
    Late,
    /// Abort and complete at the same time.
    Race,
}

/// One upload, before it starts.
#[derive(Debug, Clone)]
pub(crate) struct Job {
    pub(crate) kind: JobKind,
    pub(crate) name: String,
    pub(crate) topic: &'static str,
    pub(crate) key: Option<String>,
    pub(crate) partition: Option<i32>,
    pub(crate) bytes: Vec<u8>,
    pub(crate) with_idempotency_key: bool,
    /// Whether the client gives up its first requests to complete.
    pub(crate) gives_up_early: bool,
    /// Whether the client waits for the record's position.
    pub(crate) waits_for_record: bool,
    pub(crate) pause: Duration,
}

impl Job {
    /// The client's job with this number, derived from the seed.
    pub(crate) fn draw(seed: u64, client: usize, number: usize) -> Self {
        let mixed = seed ^ (client as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ ((number as u64 + 1) << 20);
        let mut random = fastrand::Rng::with_seed(mixed);
        let kind = match random.u32(..200) {
            0..44 => JobKind::Sdk,
            44..122 => JobKind::Single,
            122..134 => JobKind::Deferred,
            134..140 => JobKind::WrongBytes,
            140..146 => JobKind::WrongHash,
            146..148 => JobKind::PartsGiven,
            148..150 => JobKind::PartsDeferred,
            150..152 => JobKind::PartsRead,
            152..166 => JobKind::Abort(random.u8(..4)),
            166..180 => JobKind::Abandon(random.u8(..4)),
            180..190 => JobKind::Late,
            _ => JobKind::Race,
        };
        let is_multipart = match kind {
            JobKind::PartsGiven | JobKind::PartsDeferred | JobKind::PartsRead => true,
            // The last stage of aborted and abandoned uploads.
            JobKind::Abort(3) | JobKind::Abandon(3) => random.bool(),
            _ => false,
        };
        let size = match is_multipart {
            true => PART_BYTES * random.usize(1..3) + random.usize(1..2000),
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
            kind,
            name: format!("{seed}-{client}-{number}"),
            topic: TOPICS[usize::from(random.u32(..4) == 0)],
            key,
            partition,
            bytes,
            with_idempotency_key: random.u32(..8) > 0,
            gives_up_early: random.u32(..6) == 0,
            waits_for_record: random.bool(),
            pause: Duration::from_millis(random.u64(..700)),
        }
    }

    pub(crate) fn is_multipart(&self) -> bool {
        self.bytes.len() > PART_BYTES
    }

    pub(crate) fn parts(&self) -> impl Iterator<Item = &[u8]> {
        self.bytes.chunks(PART_BYTES)
    }

    /// The body of the open. Its hashes are those of the right bytes.
    pub(crate) fn open_body(&self) -> Value {
        let sha256 = Sha256::of(&self.bytes).to_string();
        let mut body = json!({"topic": self.topic, "size": self.bytes.len(), "headers": {"job": self.name}});
        let mut put = |name: &str, value: Value| body[name] = value;
        if let Some(key) = &self.key {
            put("key", json!(key));
        }
        if let Some(partition) = self.partition {
            put("partition", json!(partition));
        }
        match self.kind {
            JobKind::Deferred | JobKind::WrongHash => {}
            JobKind::PartsGiven => {
                put("sha256", json!(sha256));
                put("part_size", json!(PART_BYTES));
                put("part_sha256", self.parts().map(|part| json!(Sha256::of(part).to_string())).collect());
            }
            JobKind::PartsDeferred => {
                put("sha256", json!(sha256));
                put("part_size", json!(PART_BYTES));
                put("part_hashes", json!("deferred"));
            }
            _ => put("sha256", json!(sha256)),
        }
        body
    }

    pub(crate) fn declared(&self) -> DeclaredUpload {
        DeclaredUpload {
            topic: self.topic.to_owned(),
            key: self.key.clone(),
            size_bytes: self.bytes.len() as u64,
            sha256: Sha256::of(&self.bytes).to_string(),
            sends_right_bytes: !matches!(self.kind, JobKind::WrongBytes | JobKind::WrongHash),
        }
    }

    /// The bytes that are sent: the right ones, or in some jobs wrong ones of the same size.
    pub(crate) fn bytes_to_send(&self) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        if matches!(self.kind, JobKind::WrongBytes | JobKind::WrongHash) {
            match bytes.first_mut() {
                Some(first) => *first ^= 1,
                None => bytes.push(0),
            }
        }
        bytes
    }
}
