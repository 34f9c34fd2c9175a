//! The session: what was promised, where it stands, and which moves are legal.
//!
//! Pure: no I/O, no clock, no randomness. A state carries exactly what is known once it is reached, a move
//! takes `self` and gives back the next session or a [`Refusal`], and every move answers every state.

mod proof;
mod refusal;

use lfs_broker_client::api::{FieldError, Integrity, UploadState};
use lfs_broker_client::checksum::{Algorithm, Digest, Sha256};
use lfs_broker_client::pointer::Pointer;
use time::{Duration, OffsetDateTime};
use uuid::Uuid;

pub(crate) use proof::reachable;
use proof::{is_harmless, proof_by_s3};
pub use refusal::{Refusal, Rejection};

/// Most parts of a multipart upload (Amazon S3, "Multipart upload limits").
pub const MAX_PARTS: u64 = 10_000;
/// The smallest part but the last, in bytes (ibid.).
pub const MIN_PART_BYTES: u64 = 5 << 20;
/// The largest part, and the largest single PUT, in bytes (ibid.).
pub const MAX_PUT_BYTES: u64 = 5 << 30;
/// The largest part in bytes: a part is a PUT.
pub const MAX_PART_BYTES: u64 = MAX_PUT_BYTES;

/// What the client promised at open; it never changes but for a sha256 that complete may bring.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Promise {
    pub(crate) topic: String,
    pub(crate) key: Option<Vec<u8>>,
    pub(crate) partition: Option<i32>,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) traceparent: Option<String>,
    pub(crate) content_type: String,
    pub(crate) filename: Option<String>,
    pub(crate) size_bytes: u64,
    pub(crate) algorithm: Algorithm,
    /// None for [`Algorithm::None`], and for a sha256 that is still to come.
    pub(crate) digest: Option<Digest>,
    pub(crate) min_integrity: Integrity,
    pub(crate) layout: Layout,
    pub(crate) kms_key_id: Option<String>,
    pub(crate) url_seconds: u32,
    pub(crate) session_seconds: u32,
    pub(crate) session_max_seconds: u32,
}

/// One PUT or parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    Single,
    Multipart { part_bytes: u64, parts: u32, hashes: Hashes },
}

/// Whether part hashes were promised, and when they come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hashes {
    None,
    Given,
    Deferred,
}

impl Layout {
    /// Where part `number` begins, and its size, in bytes.
    pub(crate) fn part(&self, number: u32, size_bytes: u64) -> Option<(u64, u64)> {
        match *self {
            Self::Multipart { part_bytes, parts, .. } if (1..=parts).contains(&number) => {
                let offset = u64::from(number - 1) * part_bytes;
                Some((offset, part_bytes.min(size_bytes - offset)))
            }
            _ => None,
        }
    }

    pub(crate) fn has_part_hashes(&self) -> bool {
        matches!(self, Self::Multipart { hashes: Hashes::Given | Hashes::Deferred, .. })
    }
}

/// Who completes a session, until when, and how often that was tried.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Lease {
    pub(crate) owner: Uuid,
    pub(crate) until: OffsetDateTime,
    pub(crate) attempt: i32,
}

/// What S3 says it holds.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Object {
    /// Its size in bytes.
    pub size_bytes: u64,
    /// The write token in its metadata.
    pub token: Option<String>,
    /// The ETag with its quotes, as `If-Match` takes it.
    pub etag: Option<String>,
    /// The version, in a versioned bucket.
    pub version_id: Option<String>,
    /// SHA-256 of the whole, where S3 computed it over the whole.
    pub sha256: Option<Sha256>,
    /// The composite SHA-256 of the parts, `<base64>-N`.
    pub composite_sha256: Option<String>,
    /// Other checksums of the whole.
    pub checksums: Vec<Digest>,
    /// Headers that it was stored with and that no upload declares: names in lower case, and values. Without those that
    /// its bucket sets on every object.
    pub undeclared: Vec<(String, String)>,
}

/// What was proved, and the pointer that says so.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Proof {
    pub(crate) verified_at: OffsetDateTime,
    pub(crate) integrity: Integrity,
    pub(crate) etag: Option<String>,
    pub(crate) version_id: Option<String>,
    /// The record's value, byte for byte.
    pub(crate) pointer: String,
}

/// Where the record is in Kafka.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Place {
    pub(crate) partition: i32,
    pub(crate) offset: i64,
    pub(crate) at: OffsetDateTime,
}

/// Why something went wrong, in a form that is stored and shown.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Trouble {
    pub(crate) code: String,
    pub(crate) detail: String,
    pub(crate) items: Vec<FieldError>,
}

/// Where a session stands.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum State {
    Open,
    /// `must_read`: the object is whole, its bytes must be read to prove them.
    Completing {
        lease: Lease,
        must_read: bool,
    },
    Verified(Proof),
    Published(Proof, Place),
    Aborted,
    Expired,
    Rejected(Trouble),
}

impl State {
    pub(crate) fn name(&self) -> UploadState {
        match self {
            Self::Open => UploadState::Open,
            Self::Completing { .. } => UploadState::Completing,
            Self::Verified(_) => UploadState::Verified,
            Self::Published(..) => UploadState::Published,
            Self::Aborted => UploadState::Aborted,
            Self::Expired => UploadState::Expired,
            Self::Rejected(_) => UploadState::Rejected,
        }
    }

    /// What was proved, once it was.
    pub(crate) fn proof(&self) -> Option<&Proof> {
        match self {
            Self::Verified(proof) | Self::Published(proof, _) => Some(proof),
            Self::Open | Self::Completing { .. } | Self::Aborted | Self::Expired | Self::Rejected(_) => None,
        }
    }
}

/// An upload as the broker keeps it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Session {
    pub(crate) id: Uuid,
    pub(crate) tenant: String,
    pub(crate) subject: String,
    pub(crate) version: i64,
    pub(crate) promise: Promise,
    pub(crate) bucket: String,
    pub(crate) object_key: String,
    pub(crate) s3_upload_id: Option<String>,
    pub(crate) state: State,
    pub(crate) created_at: OffsetDateTime,
    pub(crate) updated_at: OffsetDateTime,
    pub(crate) expires_at: OffsetDateTime,
    pub(crate) expires_latest_at: OffsetDateTime,
    /// Why it went back to open, or is not published yet.
    pub(crate) trouble: Option<Trouble>,
    /// The promised digest came with a complete: it counts only as long as that completion lasts, unless it is proved.
    pub(crate) digest_by_complete: bool,
}

impl Session {
    /// Opens a session under a fresh id.
    pub(crate) fn open(
        id: Uuid,
        tenant: &str,
        subject: &str,
        place: (String, String),
        promise: Promise,
        now: OffsetDateTime,
    ) -> Self {
        let seconds = |seconds: u32| Duration::seconds(seconds.into());
        let latest = now + seconds(promise.session_max_seconds);
        Self {
            id,
            tenant: tenant.to_owned(),
            subject: subject.to_owned(),
            version: 1,
            bucket: place.0,
            object_key: place.1,
            s3_upload_id: None,
            state: State::Open,
            created_at: now,
            updated_at: now,
            expires_at: latest.min(now + seconds(promise.session_seconds)),
            expires_latest_at: latest,
            trouble: None,
            digest_by_complete: false,
            promise,
        }
    }

    /// Whether the time to put bytes is over.
    pub(crate) fn is_overdue(&self, now: OffsetDateTime) -> bool {
        self.state == State::Open && now >= self.expires_at
    }

    /// How long a URL signed now may live: no longer than its session.
    pub(crate) fn url_life(&self, now: OffsetDateTime) -> std::time::Duration {
        let left = (self.expires_at - now).whole_seconds().max(1).unsigned_abs();
        std::time::Duration::from_secs(left.min(self.promise.url_seconds.into()))
    }

    /// When the last URL ends of a session that ended at `ended_at`: none was signed after that, and none outlives the
    /// session. A minute more for one that was being signed at that moment.
    pub(crate) fn urls_end_at(&self, ended_at: OffsetDateTime) -> OffsetDateTime {
        let signing = Duration::seconds(60);
        self.expires_at.min(ended_at + Duration::seconds(self.promise.url_seconds.into()) + signing)
    }

    /// Where an open session's end slides to when parts are signed.
    pub(crate) fn slid(&self, now: OffsetDateTime) -> OffsetDateTime {
        (now + Duration::seconds(self.promise.session_seconds.into())).min(self.expires_latest_at).max(self.expires_at)
    }

    /// Answers a caller who wants to put bytes: only an open session may.
    pub(crate) fn must_be_open(&self) -> Result<(), Refusal> {
        match &self.state {
            State::Open => Ok(()),
            State::Aborted => Err(Refusal::Aborted),
            State::Expired => Err(Refusal::Expired(self.expires_at)),
            State::Completing { .. } | State::Verified(_) | State::Published(..) | State::Rejected(_) => {
                Err(Refusal::State(self.state.name()))
            }
        }
    }

    /// Takes the sha256 that complete brings, where open did not.
    pub(crate) fn promise_sha256(mut self, brought: Option<Sha256>) -> Result<Self, Refusal> {
        let promised = self.promise.digest.as_ref().and_then(Digest::sha256);
        match (self.promise.algorithm, promised, brought) {
            (Algorithm::Sha256, None, None) => Err(Refusal::Sha256("sha256 is required here: open did not bring it")),
            (Algorithm::Sha256, Some(promised), Some(brought)) if promised != brought => {
                Err(Refusal::Sha256("sha256 is not the one promised at open"))
            }
            (Algorithm::Sha256, None, Some(brought)) => {
                self.promise.digest = Some(brought.into());
                self.digest_by_complete = true;
                Ok(self)
            }
            _ => Ok(self),
        }
    }

    /// Whether a lease was given back because S3 gave no verdict.
    pub(crate) fn is_released(&self) -> bool {
        matches!(self.state, State::Completing { .. }) && self.trouble.is_some()
    }

    /// Takes the session to complete it; a lease that ran out or was given back is taken over.
    pub(crate) fn claim(self, owner: Uuid, now: OffsetDateTime, until: OffsetDateTime) -> Result<Self, Refusal> {
        match self.state {
            State::Open if now >= self.expires_at => Err(Refusal::Expired(self.expires_at)),
            State::Open => Ok(Self {
                state: State::Completing { lease: Lease { owner, until, attempt: 1 }, must_read: false },
                trouble: None,
                ..self
            }),
            State::Completing { ref lease, must_read } if lease.until <= now || self.trouble.is_some() => {
                let lease = Lease { owner, until, attempt: lease.attempt + 1 };
                Ok(Self { state: State::Completing { lease, must_read }, trouble: None, ..self })
            }
            State::Completing { .. } => Err(Refusal::InProgress),
            State::Verified(_) | State::Published(..) => Err(Refusal::State(self.state.name())),
            State::Aborted => Err(Refusal::Aborted),
            State::Expired => Err(Refusal::Expired(self.expires_at)),
            State::Rejected(trouble) => Err(Refusal::Rejected(Box::new(trouble.into()))),
        }
    }

    /// Holds what S3 says it has against the promise. Where S3's word is not proof enough, the bytes must be read.
    pub(crate) fn verify(self, found: &Object, parts: &[Sha256], now: OffsetDateTime) -> Result<Self, Refusal> {
        let State::Completing { .. } = self.state else { return Err(Refusal::State(self.state.name())) };
        self.is_ours(found)?;
        self.is_as_declared(found)?;
        match proof_by_s3(&self.promise, found, parts)? {
            Some(integrity) if integrity >= self.promise.min_integrity => Ok(self.proved(integrity, found, now)),
            _ => Ok(self.needing_a_read(now)),
        }
    }

    /// Holds the digest of bytes that were read back against the promise.
    pub(crate) fn verify_read(
        self,
        found: &Object,
        read: &Digest,
        read_bytes: u64,
        now: OffsetDateTime,
    ) -> Result<Self, Refusal> {
        let State::Completing { .. } = self.state else { return Err(Refusal::State(self.state.name())) };
        self.is_as_declared(found)?;
        if read_bytes != self.promise.size_bytes {
            return Err(Refusal::Size { promised: self.promise.size_bytes, found: read_bytes });
        }
        match &self.promise.digest {
            Some(promised) if promised == read => {
                let integrity = reachable(self.promise.algorithm);
                Ok(self.proved(integrity, found, now))
            }
            Some(promised) => Err(Refusal::Checksum { promised: format!("{promised:?}"), found: format!("{read:?}") }),
            None => Err(Refusal::Sha256("sha256 was never promised")),
        }
    }

    /// The lease ends here: whoever reads takes one of its own.
    fn needing_a_read(self, now: OffsetDateTime) -> Self {
        match self.state {
            State::Completing { lease, .. } => {
                Self { state: State::Completing { lease: Lease { until: now, ..lease }, must_read: true }, ..self }
            }
            _ => self,
        }
    }

    fn proved(self, integrity: Integrity, found: &Object, now: OffsetDateTime) -> Self {
        let none = Digest { algorithm: Algorithm::None, value: Vec::new() };
        let promise = &self.promise;
        let digest = promise.digest.as_ref().unwrap_or(&none);
        let pointer = Pointer::new(&self.bucket, &self.object_key, promise.size_bytes, digest, &promise.content_type, now);
        let proof = Proof {
            verified_at: now,
            integrity,
            etag: found.etag.clone(),
            version_id: found.version_id.clone(),
            pointer: pointer.to_json(),
        };
        Self { state: State::Verified(proof), trouble: None, ..self }
    }

    /// What is proved today of an object that was proved before: as much as then while it is the very object that was
    /// looked at, by its ETag; of one that was written again, what S3's own word proves of it and no more than then.
    /// `parts` are the promised part hashes, which are needed only where the ETag is another.
    pub(crate) fn holds(&self, proof: &Proof, found: &Object, parts: &[Sha256]) -> Result<Integrity, Refusal> {
        self.is_ours(found)?;
        if proof.etag.is_some() && proof.etag == found.etag {
            return Ok(proof.integrity);
        }
        match proof_by_s3(&self.promise, found, parts)? {
            Some(integrity) => Ok(integrity.min(proof.integrity)),
            None => {
                let etag = |etag: &Option<String>| format!("ETag {}", etag.as_deref().unwrap_or("none"));
                Err(Refusal::Checksum { promised: etag(&proof.etag), found: etag(&found.etag) })
            }
        }
    }

    /// Whether an object bears this session's write token and the promised size.
    fn is_ours(&self, found: &Object) -> Result<(), Refusal> {
        if found.token.as_deref() != Some(self.id.to_string().as_str()) {
            return Err(Refusal::Foreign);
        }
        if found.size_bytes != self.promise.size_bytes {
            return Err(Refusal::Size { promised: self.promise.size_bytes, found: found.size_bytes });
        }
        Ok(())
    }

    /// The first header of an object that the upload did not declare and that makes a difference.
    pub(crate) fn undeclared<'a>(&self, found: &'a Object) -> Option<&'a (String, String)> {
        let is_declared = |name: &str| self.promise.kms_key_id.is_some() && name.starts_with("x-amz-server-side-encryption");
        found.undeclared.iter().find(|(name, value)| !is_declared(name) && !is_harmless(name, value))
    }

    /// Whether an object was stored with nothing that the upload did not declare. Only its first verification asks: what
    /// an operator or a lifecycle rule changes later is theirs to change.
    fn is_as_declared(&self, found: &Object) -> Result<(), Refusal> {
        match self.undeclared(found) {
            Some((name, value)) => Err(Refusal::Undeclared { header: name.clone(), value: value.clone() }),
            None => Ok(()),
        }
    }

    /// Gives a session back to its client: bytes or parts are missing, or S3 refuses for good. A digest that came with
    /// this completion goes with it: the next one may bring another.
    pub(crate) fn reopen(mut self, why: &Refusal) -> Result<Self, Refusal> {
        match self.state {
            State::Completing { .. } => {
                if std::mem::take(&mut self.digest_by_complete) {
                    self.promise.digest = None;
                }
                Ok(Self { state: State::Open, trouble: Some(why.trouble()), ..self })
            }
            State::Open | State::Verified(_) | State::Published(..) | State::Aborted | State::Expired | State::Rejected(_) => {
                Err(Refusal::State(self.state.name()))
            }
        }
    }

    /// Rejects a session for good: the bytes are not what was promised.
    pub(crate) fn reject(self, why: &Refusal) -> Result<Self, Refusal> {
        match self.state {
            State::Completing { .. } => Ok(Self { state: State::Rejected(why.trouble()), ..self }),
            State::Open | State::Verified(_) | State::Published(..) | State::Aborted | State::Expired | State::Rejected(_) => {
                Err(Refusal::State(self.state.name()))
            }
        }
    }

    /// Gives up an upload whose pointer Kafka refuses.
    pub(crate) fn discard(self, why: String) -> Result<Self, Refusal> {
        match self.state {
            State::Verified(_) => {
                Ok(Self { state: State::Rejected(Refusal::Unpublishable(why).trouble()), trouble: None, ..self })
            }
            State::Open
            | State::Completing { .. }
            | State::Published(..)
            | State::Aborted
            | State::Expired
            | State::Rejected(_) => Err(Refusal::State(self.state.name())),
        }
    }

    /// The bytes that the record has at least, as Kafka counts a batch of one (its format is KIP-98's, version 2).
    pub(crate) fn record_bytes(&self) -> usize {
        /// The batch's header, and the record's attributes and differences.
        const FRAME: usize = 61 + 4;
        let none = Digest { algorithm: Algorithm::None, value: Vec::new() };
        let unknown = Digest { algorithm: Algorithm::Sha256, value: vec![0; 32] };
        let promise = &self.promise;
        let digest = match promise.algorithm {
            Algorithm::None => &none,
            _ => promise.digest.as_ref().unwrap_or(&unknown),
        };
        let pointer =
            Pointer::new(&self.bucket, &self.object_key, promise.size_bytes, digest, &promise.content_type, self.created_at);
        let header = |name: usize, value: usize| 2 + name + value;
        let ours = header("lfs-upload-id".len(), 36) + header("lfs-integrity".len(), promise.min_integrity.name().len());
        let trace = promise.traceparent.as_ref().map_or(0, |trace| header("traceparent".len(), trace.len()));
        let theirs: usize = promise.headers.iter().map(|(name, value)| header(name.len(), value.len())).sum();
        FRAME + promise.key.as_ref().map_or(0, Vec::len) + pointer.to_json().len() + ours + trace + theirs
    }

    /// Takes an upload back. `None`: it is over already, and nothing is left to do.
    pub(crate) fn abort(self) -> Result<Option<Self>, Refusal> {
        match self.state {
            State::Open | State::Completing { must_read: true, .. } => Ok(Some(Self { state: State::Aborted, ..self })),
            State::Aborted | State::Expired | State::Rejected(_) => Ok(None),
            State::Completing { must_read: false, .. } => Err(Refusal::InProgress),
            State::Verified(_) | State::Published(..) => Err(Refusal::State(self.state.name())),
        }
    }

    /// Ends a session that is being completed and whose bytes cannot be proved, once its last possible end is over.
    /// `None`: the next attempt may still prove them.
    pub(crate) fn give_up(self, now: OffsetDateTime) -> Option<Self> {
        let is_completing = matches!(self.state, State::Completing { .. });
        if is_completing && now >= self.expires_latest_at { Some(Self { state: State::Expired, ..self }) } else { None }
    }

    /// Ends an open session whose time is over. `None`: there is nothing to end.
    pub(crate) fn expire(self, now: OffsetDateTime) -> Option<Self> {
        if self.is_overdue(now) { Some(Self { state: State::Expired, ..self }) } else { None }
    }
}

/// The shard of a record: records of one topic and key always share one, keyless ones are spread by session.
pub(crate) fn shard(topic: &str, key: Option<&[u8]>, id: Uuid, shards: i32) -> i32 {
    let hash = ordering(topic, key).unwrap_or_else(|| first_eight(Sha256::of(id.as_bytes())));
    i32::try_from(hash.rem_euclid(i64::from(shards))).expect("a remainder is smaller than the shards")
}

/// What records of one topic and key have in common; `None` for keyless ones, which have no order.
pub(crate) fn ordering(topic: &str, key: Option<&[u8]>) -> Option<i64> {
    // A topic cannot contain a NUL, so no two pairs collide by concatenation.
    key.map(|key| first_eight(Sha256::of(&[topic.as_bytes(), b"\0", key].concat())))
}

fn first_eight(digest: Sha256) -> i64 {
    i64::from_be_bytes(digest.0[..8].try_into().expect("a SHA-256 has more than eight bytes"))
}

#[cfg(test)]
#[path = "session_tests.rs"]
pub(crate) mod tests;
