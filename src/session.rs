//! The session: the client's declaration, the state, and the allowed transitions.
//!
//! Pure: no I/O, no clock, no randomness. A state carries exactly what is known once it is reached. A transition
//! takes `self` and returns the next session or a [`SessionError`]. Every transition handles every state.

mod error;
mod record;
mod spec;
mod verification;

use lfs_broker_client::api::{Integrity, UploadState};
use lfs_broker_client::checksum::{Algorithm, Digest, Sha256};
use lfs_broker_client::pointer::Pointer;
use time::{Duration, OffsetDateTime};
use uuid::Uuid;

pub use error::{Failure, SessionError};
pub use lfs_broker_client::api::{MAX_PART_BYTES, MAX_PUT_BYTES, MIN_PART_BYTES};
pub use record::RecordMetadata;
pub(crate) use record::{ordering_key, shard};
pub(crate) use spec::{Layout, PartHashMode, UploadSpec};
pub(crate) use verification::max_integrity;
use verification::{integrity_from_s3, is_harmless};

/// Which replica completes a session, until when, and the number of this attempt.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Lease {
    pub(crate) owner: Uuid,
    pub(crate) until: OffsetDateTime,
    pub(crate) attempt: i32,
}

/// An object as S3 describes it in the response to a HEAD.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Object {
    /// Its size in bytes.
    pub size_bytes: u64,
    /// The write token in its metadata: the session's id.
    pub token: Option<String>,
    /// The ETag with its quotes, as `If-Match` takes it.
    pub etag: Option<String>,
    /// The version, in a versioned bucket.
    pub version_id: Option<String>,
    /// SHA-256 of the whole object, if S3 computed one over the whole object.
    pub sha256: Option<Sha256>,
    /// The composite SHA-256 of the parts, `<base64>-N`.
    pub composite_sha256: Option<String>,
    /// Other checksums of the whole object.
    pub checksums: Vec<Digest>,
    /// Headers that the object was stored with and that no upload declares: lowercase names, and values. Headers that
    /// the bucket sets on every object are left out.
    pub undeclared_headers: Vec<(String, String)>,
}

/// The result of a successful verification, with the pointer to publish.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Verification {
    pub(crate) verified_at: OffsetDateTime,
    pub(crate) integrity: Integrity,
    pub(crate) etag: Option<String>,
    pub(crate) version_id: Option<String>,
    /// The record's value, byte for byte.
    pub(crate) pointer: String,
}

/// A session's state.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum State {
    Open,
    /// `must_read`: the object is complete, but the broker must read its bytes to verify them.
    Completing {
        lease: Lease,
        must_read: bool,
    },
    Verified(Verification),
    Published(Verification, RecordMetadata),
    Aborted,
    Expired,
    Rejected(Failure),
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

    /// The verification, in the states that have one.
    pub(crate) fn verification(&self) -> Option<&Verification> {
        match self {
            Self::Verified(verification) | Self::Published(verification, _) => Some(verification),
            Self::Open | Self::Completing { .. } | Self::Aborted | Self::Expired | Self::Rejected(_) => None,
        }
    }
}

/// An upload as the broker stores it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Session {
    pub(crate) id: Uuid,
    pub(crate) tenant: String,
    pub(crate) subject: String,
    pub(crate) version: i64,
    pub(crate) spec: UploadSpec,
    pub(crate) bucket: String,
    pub(crate) object_key: String,
    pub(crate) s3_upload_id: Option<String>,
    pub(crate) state: State,
    pub(crate) created_at: OffsetDateTime,
    pub(crate) updated_at: OffsetDateTime,
    pub(crate) expires_at: OffsetDateTime,
    pub(crate) expires_latest_at: OffsetDateTime,
    /// Why the last completion failed, or why the pointer is not published yet.
    pub(crate) last_failure: Option<Failure>,
    /// The digest came with a complete request. It is kept only if that completion verifies it.
    pub(crate) digest_by_complete: bool,
}

impl Session {
    /// Opens a session under a new id.
    pub(crate) fn open(
        id: Uuid,
        tenant: &str,
        subject: &str,
        (bucket, object_key): (String, String),
        spec: UploadSpec,
        now: OffsetDateTime,
    ) -> Self {
        let seconds = |seconds: u32| Duration::seconds(seconds.into());
        let latest = now + seconds(spec.session_max_seconds);
        Self {
            id,
            tenant: tenant.to_owned(),
            subject: subject.to_owned(),
            version: 1,
            bucket,
            object_key,
            s3_upload_id: None,
            state: State::Open,
            created_at: now,
            updated_at: now,
            expires_at: latest.min(now + seconds(spec.session_seconds)),
            expires_latest_at: latest,
            last_failure: None,
            digest_by_complete: false,
            spec,
        }
    }

    /// Whether the session is open past its expiry.
    pub(crate) fn is_overdue(&self, now: OffsetDateTime) -> bool {
        self.state == State::Open && now >= self.expires_at
    }

    /// How long a URL signed now is valid: never longer than its session.
    pub(crate) fn url_lifetime(&self, now: OffsetDateTime) -> std::time::Duration {
        let left = (self.expires_at - now).whole_seconds().max(1).unsigned_abs();
        std::time::Duration::from_secs(left.min(self.spec.url_seconds.into()))
    }

    /// When the last URL expires of a session that ended at `ended_at`. No URL is signed after `ended_at`, and none
    /// outlives the session. One more minute covers a URL that was being signed at that moment.
    pub(crate) fn urls_expire_at(&self, ended_at: OffsetDateTime) -> OffsetDateTime {
        let signing = Duration::seconds(60);
        self.expires_at.min(ended_at + Duration::seconds(self.spec.url_seconds.into()) + signing)
    }

    /// The new expiry of an open session when parts are signed.
    pub(crate) fn extended_expiry(&self, now: OffsetDateTime) -> OffsetDateTime {
        (now + Duration::seconds(self.spec.session_seconds.into())).min(self.expires_latest_at).max(self.expires_at)
    }

    /// Fails unless the session is open: only then may a client put bytes.
    pub(crate) fn ensure_open(&self) -> Result<(), SessionError> {
        match &self.state {
            State::Open => Ok(()),
            State::Aborted => Err(SessionError::Aborted),
            State::Expired => Err(SessionError::Expired(self.expires_at)),
            State::Completing { .. } | State::Verified(_) | State::Published(..) | State::Rejected(_) => {
                Err(SessionError::WrongState(self.state.name()))
            }
        }
    }

    /// Adds the sha256 of the complete request if open declared none.
    pub(crate) fn declare_sha256(mut self, at_complete: Option<Sha256>) -> Result<Self, SessionError> {
        let at_open = self.spec.digest.as_ref().and_then(Digest::sha256);
        match (self.spec.algorithm, at_open, at_complete) {
            (Algorithm::Sha256, None, None) => {
                Err(SessionError::InvalidSha256("sha256 is required at complete: open did not declare it"))
            }
            (Algorithm::Sha256, Some(at_open), Some(at_complete)) if at_open != at_complete => {
                Err(SessionError::InvalidSha256("sha256 differs from the one declared at open"))
            }
            (Algorithm::Sha256, None, Some(at_complete)) => {
                self.spec.digest = Some(at_complete.into());
                self.digest_by_complete = true;
                Ok(self)
            }
            _ => Ok(self),
        }
    }

    /// Whether the lease was released because S3 or the database did not answer.
    pub(crate) fn is_released(&self) -> bool {
        matches!(self.state, State::Completing { .. }) && self.last_failure.is_some()
    }

    /// Claims the session to complete it. An expired or released lease is taken over.
    pub(crate) fn claim(self, owner: Uuid, now: OffsetDateTime, until: OffsetDateTime) -> Result<Self, SessionError> {
        match self.state {
            State::Open if now >= self.expires_at => Err(SessionError::Expired(self.expires_at)),
            State::Open => Ok(Self {
                state: State::Completing { lease: Lease { owner, until, attempt: 1 }, must_read: false },
                last_failure: None,
                ..self
            }),
            State::Completing { ref lease, must_read } if lease.until <= now || self.last_failure.is_some() => {
                let lease = Lease { owner, until, attempt: lease.attempt + 1 };
                Ok(Self { state: State::Completing { lease, must_read }, last_failure: None, ..self })
            }
            State::Completing { .. } => Err(SessionError::CompletionInProgress),
            State::Verified(_) | State::Published(..) => Err(SessionError::WrongState(self.state.name())),
            State::Aborted => Err(SessionError::Aborted),
            State::Expired => Err(SessionError::Expired(self.expires_at)),
            State::Rejected(failure) => Err(SessionError::Rejected(Box::new(failure))),
        }
    }

    /// Compares the object in S3 with the client's declaration. If S3's checksums do not reach the required integrity,
    /// the bytes must be read.
    pub(crate) fn verify(self, found: &Object, parts: &[Sha256], now: OffsetDateTime) -> Result<Self, SessionError> {
        let State::Completing { .. } = self.state else { return Err(SessionError::WrongState(self.state.name())) };
        self.check_identity(found)?;
        self.check_headers(found)?;
        match integrity_from_s3(&self.spec, found, parts)? {
            Some(integrity) if integrity >= self.spec.min_integrity => Ok(self.verified(integrity, found, now)),
            _ => Ok(self.require_read_back(now)),
        }
    }

    /// Compares the digest of the bytes that were read back with the client's declaration.
    pub(crate) fn verify_read_back(
        self,
        found: &Object,
        read: &Digest,
        read_bytes: u64,
        now: OffsetDateTime,
    ) -> Result<Self, SessionError> {
        let State::Completing { .. } = self.state else { return Err(SessionError::WrongState(self.state.name())) };
        self.check_headers(found)?;
        if read_bytes != self.spec.size_bytes {
            return Err(SessionError::SizeMismatch { declared: self.spec.size_bytes, found: read_bytes });
        }
        match &self.spec.digest {
            Some(declared) if declared == read => {
                let integrity = max_integrity(self.spec.algorithm);
                Ok(self.verified(integrity, found, now))
            }
            Some(declared) => {
                Err(SessionError::ChecksumMismatch { declared: format!("{declared:?}"), found: format!("{read:?}") })
            }
            None => Err(SessionError::InvalidSha256("sha256 was not declared, neither at open nor at complete")),
        }
    }

    /// Ends the lease and marks the session to be read: the verifier takes a lease of its own.
    fn require_read_back(self, now: OffsetDateTime) -> Self {
        match self.state {
            State::Completing { lease, .. } => {
                Self { state: State::Completing { lease: Lease { until: now, ..lease }, must_read: true }, ..self }
            }
            _ => self,
        }
    }

    fn verified(self, integrity: Integrity, found: &Object, now: OffsetDateTime) -> Self {
        let none = Digest { algorithm: Algorithm::None, value: Vec::new() };
        let spec = &self.spec;
        let digest = spec.digest.as_ref().unwrap_or(&none);
        let pointer = Pointer::new(&self.bucket, &self.object_key, spec.size_bytes, digest, &spec.content_type, now);
        let verification = Verification {
            verified_at: now,
            integrity,
            etag: found.etag.clone(),
            version_id: found.version_id.clone(),
            pointer: pointer.to_json(),
        };
        Self { state: State::Verified(verification), last_failure: None, ..self }
    }

    /// The integrity of a verified object as it is now. While its ETag is unchanged, the integrity is the verified one.
    /// After it was written again, S3's checksums decide, and the verified integrity is the maximum.
    /// `parts` are the declared part hashes; they are needed only if the ETag has changed.
    pub(crate) fn recheck(
        &self,
        verification: &Verification,
        found: &Object,
        parts: &[Sha256],
    ) -> Result<Integrity, SessionError> {
        self.check_identity(found)?;
        if verification.etag.is_some() && verification.etag == found.etag {
            return Ok(verification.integrity);
        }
        match integrity_from_s3(&self.spec, found, parts)? {
            Some(integrity) => Ok(integrity.min(verification.integrity)),
            None => {
                let etag = |etag: &Option<String>| format!("ETag {}", etag.as_deref().unwrap_or("none"));
                Err(SessionError::ChecksumMismatch { declared: etag(&verification.etag), found: etag(&found.etag) })
            }
        }
    }

    /// Checks that the object has this session's write token and the declared size.
    fn check_identity(&self, found: &Object) -> Result<(), SessionError> {
        if found.token.as_deref() != Some(self.id.to_string().as_str()) {
            return Err(SessionError::ForeignObject);
        }
        if found.size_bytes != self.spec.size_bytes {
            return Err(SessionError::SizeMismatch { declared: self.spec.size_bytes, found: found.size_bytes });
        }
        Ok(())
    }

    /// The first header of an object that the upload did not declare and that matters to readers.
    pub(crate) fn first_undeclared_header<'a>(&self, found: &'a Object) -> Option<&'a (String, String)> {
        let is_declared = |name: &str| self.spec.kms_key_id.is_some() && name.starts_with("x-amz-server-side-encryption");
        found.undeclared_headers.iter().find(|(name, value)| !is_declared(name) && !is_harmless(name, value))
    }

    /// Checks that the object was stored only with headers that the upload declared. Only the first verification checks
    /// this: an operator or a lifecycle rule may change headers later.
    fn check_headers(&self, found: &Object) -> Result<(), SessionError> {
        match self.first_undeclared_header(found) {
            Some((name, value)) => Err(SessionError::UndeclaredHeader { header: name.clone(), value: value.clone() }),
            None => Ok(()),
        }
    }

    /// Returns the session to open: bytes or parts are missing, or S3 refuses permanently. A digest that came with this
    /// complete request is dropped: the next request may bring another one.
    pub(crate) fn reopen(mut self, error: &SessionError) -> Result<Self, SessionError> {
        match self.state {
            State::Completing { .. } => {
                if std::mem::take(&mut self.digest_by_complete) {
                    self.spec.digest = None;
                }
                Ok(Self { state: State::Open, last_failure: Some(error.failure()), ..self })
            }
            State::Open | State::Verified(_) | State::Published(..) | State::Aborted | State::Expired | State::Rejected(_) => {
                Err(SessionError::WrongState(self.state.name()))
            }
        }
    }

    /// Rejects a session permanently: the bytes differ from the declared bytes.
    pub(crate) fn reject(self, error: &SessionError) -> Result<Self, SessionError> {
        match self.state {
            State::Completing { .. } => Ok(Self { state: State::Rejected(error.failure()), ..self }),
            State::Open | State::Verified(_) | State::Published(..) | State::Aborted | State::Expired | State::Rejected(_) => {
                Err(SessionError::WrongState(self.state.name()))
            }
        }
    }

    /// Rejects a verified upload whose pointer Kafka refuses.
    pub(crate) fn discard(self, cause: String) -> Result<Self, SessionError> {
        match self.state {
            State::Verified(_) => {
                Ok(Self { state: State::Rejected(SessionError::Unpublishable(cause).failure()), last_failure: None, ..self })
            }
            State::Open
            | State::Completing { .. }
            | State::Published(..)
            | State::Aborted
            | State::Expired
            | State::Rejected(_) => Err(SessionError::WrongState(self.state.name())),
        }
    }

    /// The minimum size of the record, as Kafka counts a batch of one record (format version 2, KIP-98).
    pub(crate) fn min_record_bytes(&self) -> usize {
        /// The batch header, and the record's attributes and deltas.
        const OVERHEAD_BYTES: usize = 61 + 4;
        let none = Digest { algorithm: Algorithm::None, value: Vec::new() };
        let unknown = Digest { algorithm: Algorithm::Sha256, value: vec![0; 32] };
        let spec = &self.spec;
        let digest = match spec.algorithm {
            Algorithm::None => &none,
            _ => spec.digest.as_ref().unwrap_or(&unknown),
        };
        let pointer = Pointer::new(&self.bucket, &self.object_key, spec.size_bytes, digest, &spec.content_type, self.created_at);
        let header = |name: usize, value: usize| 2 + name + value;
        let broker_headers = header("lfs-upload-id".len(), 36) + header("lfs-integrity".len(), spec.min_integrity.name().len());
        let trace = spec.traceparent.as_ref().map_or(0, |trace| header("traceparent".len(), trace.len()));
        let client_headers: usize = spec.headers.iter().map(|(name, value)| header(name.len(), value.len())).sum();
        let key = spec.key.as_ref().map_or(0, Vec::len);
        OVERHEAD_BYTES + key + pointer.to_json().len() + broker_headers + trace + client_headers
    }

    /// Aborts an upload. `None`: the upload is already aborted, rejected or expired.
    pub(crate) fn abort(self) -> Result<Option<Self>, SessionError> {
        match self.state {
            State::Open | State::Completing { must_read: true, .. } => Ok(Some(Self { state: State::Aborted, ..self })),
            State::Aborted | State::Expired | State::Rejected(_) => Ok(None),
            State::Completing { must_read: false, .. } => Err(SessionError::CompletionInProgress),
            State::Verified(_) | State::Published(..) => Err(SessionError::WrongState(self.state.name())),
        }
    }

    /// Expires a completing session that is past its latest expiry and could not be verified.
    /// `None`: a later attempt may still verify it.
    pub(crate) fn expire_completing(self, now: OffsetDateTime) -> Option<Self> {
        let is_completing = matches!(self.state, State::Completing { .. });
        if is_completing && now >= self.expires_latest_at { Some(Self { state: State::Expired, ..self }) } else { None }
    }

    /// Expires an open session that is past its expiry. Returns `None` for any other session.
    pub(crate) fn expire(self, now: OffsetDateTime) -> Option<Self> {
        if self.is_overdue(now) { Some(Self { state: State::Expired, ..self }) } else { None }
    }
}

#[cfg(test)]
#[path = "session_tests.rs"]
pub(crate) mod tests;
