//! Open an upload, and sign its parts.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use lfs_broker_client::api::{
    FieldError, OpenUpload, PARTS_PER_CALL, SignParts, SignedPart, SignedParts, SignedRequest, Upload, UploadState,
};
use lfs_broker_client::checksum::{Digest, Sha256};
use time::OffsetDateTime;
use tracing::warn;
use uuid::{ContextV7, Timestamp, Uuid};

use super::view::view;
use super::{Broker, Error, session_error};
use crate::auth::Caller;
use crate::failpoint;
use crate::kafka::{self, RecordLimits};
use crate::objects::{NewObject, ObjectLocation, PresignedUrl};
use crate::policy::{self, ValidatedRequest};
use crate::session::{Layout, PartHashMode, Session, SessionError, State, UploadSpec};
use crate::store::{self, CreateOutcome, NewSession, StoredPolicy, Transition};

/// How long an upload that could not be opened stays for a retry with its Idempotency-Key. Clients stop retrying within a
/// minute.
const REPLAY_WINDOW: time::Duration = time::Duration::seconds(120);

/// How often an open reads its topic's policy, if the policy changes each time before the upload is stored.
const MAX_POLICY_READS: usize = 3;

/// The inputs of an open request besides its body.
#[derive(Debug, Clone, Default)]
pub(crate) struct OpenContext {
    pub(crate) idempotency_key: IdempotencyKey,
    pub(crate) traceparent: Option<String>,
}

/// The Idempotency-Key of an open request. A malformed key is refused only after the checks that come before it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) enum IdempotencyKey {
    #[default]
    Absent,
    Malformed,
    Valid(String),
}

/// An open request that is valid and that the caller may send.
#[derive(Clone)]
struct ValidOpen {
    validated: ValidatedRequest,
    fingerprint: Sha256,
    key: Option<String>,
    traceparent: Option<String>,
}

/// An opened upload, and whether this request opened it.
pub(crate) struct Opened {
    pub(crate) upload: Upload,
    pub(crate) is_new: bool,
}

impl Broker {
    /// Opens an upload, or returns the upload that an earlier request with this idempotency key opened.
    pub(crate) async fn open(&self, caller: &Caller, request: OpenUpload, context: OpenContext) -> Result<Opened, Error> {
        let validated = policy::validate(request)?;
        let fingerprint = request_fingerprint(&validated);
        let topic = validated.request.topic.clone();
        if !caller.may_use(&topic) {
            return Err(Error::TopicForbidden(topic));
        }
        if kafka::is_internal(&topic) {
            return Err(Error::TopicInternal(topic));
        }
        let key = match context.idempotency_key {
            IdempotencyKey::Absent => None,
            IdempotencyKey::Malformed => return Err(Error::IdempotencyKeyInvalid),
            IdempotencyKey::Valid(key) => Some(key),
        };
        let request = ValidOpen { validated, fingerprint, key, traceparent: context.traceparent };
        // With a policy that an earlier open read, one statement opens the upload and checks that the policy still holds.
        if let Some(policy) = self.remembered_policies.get(&topic) {
            match self.open_under(caller, request.clone(), policy).await {
                Ok(Some(opened)) => return Ok(opened),
                Err(error @ (Error::Store(_) | Error::Objects(_) | Error::OutcomeUnknown)) => return Err(error),
                // The policy has changed, or it refuses what the stored one may allow.
                Ok(None) | Err(_) => {}
            }
        }
        for _ in 0..MAX_POLICY_READS {
            // A request that is repeated gets the upload that it opened, whatever the policy says now.
            if let Some(replayed) = self.replay(caller, request.key.as_deref(), &request.fingerprint).await? {
                return Ok(replayed);
            }
            let policy = self.read_policy(&topic).await?;
            if let Some(opened) = self.open_under(caller, request.clone(), policy).await? {
                return Ok(opened);
            }
        }
        Err(Error::OutcomeUnknown)
    }

    /// Opens an upload that this policy allows. `None`: the stored policy is another one.
    async fn open_under(&self, caller: &Caller, request: ValidOpen, stored: Arc<StoredPolicy>) -> Result<Option<Opened>, Error> {
        let ValidOpen { validated, fingerprint, key, traceparent } = request;
        let topic = validated.request.topic.clone();
        let policy = stored.policy.clone().unwrap_or_else(|| self.policy.default_policy());
        let (spec, hashes) = policy::apply_policy(validated, &policy, &self.policy, traceparent)?;
        let bucket = policy.bucket.as_deref().or(self.objects.default_bucket());
        let bucket = bucket.ok_or_else(|| policy::PolicyViolation::NoBucket(topic.clone()))?;
        let limits = self.check_topic(&spec).await?;
        let now = self.store.now().await?;
        let id = new_id(now);
        let object_key = policy::object_key(policy.prefix.as_deref(), &caller.tenant, &topic, id, now);
        let session = Session::open(id, &caller.tenant, &caller.subject, (bucket.to_owned(), object_key), spec, now);
        if let Some(max_bytes) = limits.max_bytes.filter(|max_bytes| session.min_record_bytes() > *max_bytes) {
            return Err(Error::RecordTooLarge { topic, size_bytes: session.min_record_bytes(), max_bytes });
        }
        let idempotency = key.clone().map(|key| (key, fingerprint));
        let quota = self.settings.quota;
        let new = NewSession { session: session.clone(), part_hashes: hashes.clone(), idempotency, policy: stored };
        match self.store.create(new, quota).await? {
            CreateOutcome::Created => {}
            CreateOutcome::PolicyChanged => return Ok(None),
            CreateOutcome::KeyExists => {
                let replayed = self.replay(caller, key.as_deref(), &fingerprint).await?;
                return replayed.map(Some).ok_or(Error::IdempotencyKeyInFlight);
            }
            CreateOutcome::KeyInFlight => return Err(Error::IdempotencyKeyInFlight),
            CreateOutcome::TooManySessions => return Err(Error::TooManySessions(quota.open_sessions)),
            CreateOutcome::TooManyBytes => {
                let size_bytes = session.spec.size_bytes;
                return Err(Error::TooManyBytes { size_bytes, max_bytes: quota.reserved_bytes });
            }
        }
        let upload = self.sign_or_release(session, hashes, key.is_some(), now).await?;
        failpoint::reach("open.answered").await.map_err(store::Error::from)?;
        Ok(Some(Opened { upload, is_new: true }))
    }

    /// Checks that Kafka has the topic and the partition, and that the topic takes a record with such a key.
    async fn check_topic(&self, spec: &UploadSpec) -> Result<RecordLimits, Error> {
        let topic = &spec.topic;
        let partitions = self.kafka.partition_count(topic).await?.ok_or_else(|| Error::TopicNotFound(topic.clone()))?;
        if let Some(partition) = spec.partition.filter(|partition| *partition >= partitions) {
            let last = partitions - 1;
            let detail = format!("partition {partition} does not exist: topic {topic} has partitions 0 to {last}");
            return Err(policy::PolicyViolation::Invalid(vec![FieldError::new("/partition", detail)]).into());
        }
        let limits = self.kafka.record_limits(topic).await;
        if limits.needs_key && spec.key.is_none() {
            let detail = format!("topic {topic} is compacted: every record needs a key");
            return Err(policy::PolicyViolation::Invalid(vec![FieldError::new("/key", detail)]).into());
        }
        Ok(limits)
    }

    /// Signs the first URLs of an upload that was just stored, or releases its quota if that fails. This runs in its own
    /// task, so that a client that disconnects does not leave an upload that it does not know.
    async fn sign_or_release(
        &self,
        session: Session,
        hashes: Vec<Sha256>,
        may_be_replayed: bool,
        now: OffsetDateTime,
    ) -> Result<Upload, Error> {
        let broker = self.clone();
        let signing = tokio::spawn(async move {
            let signed = broker.with_signed_urls(session.clone(), &hashes, now).await;
            if signed.is_err() {
                broker.release_unopened(session, may_be_replayed, now).await;
            }
            signed
        });
        match signing.await {
            Ok(signed) => signed,
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            Err(_) => Err(Error::OutcomeUnknown),
        }
    }

    /// Releases the quota of an upload that could not be opened: no client knows its id. With an Idempotency-Key the client
    /// may retry, so the upload expires soon instead of at once.
    async fn release_unopened(&self, session: Session, may_be_replayed: bool, now: OffsetDateTime) {
        let id = session.id;
        let released = match (may_be_replayed, session.abort()) {
            (true, _) => self.store.shorten_expiry(id, now + REPLAY_WINDOW).await,
            (false, Ok(Some(aborted))) => {
                // No URL was signed, so no bytes can arrive later.
                let aborted = Session { expires_at: now, ..aborted };
                let reason = "no URL could be signed, so the upload was not opened";
                let transition = Transition { from: UploadState::Open, to: &aborted, reason, by: "broker", now };
                self.store.save(&transition).await.map(|_| self.notifier.sweeper.notify_one())
            }
            (false, _) => Ok(()),
        };
        // A version conflict means that another writer has ended the session.
        if let Err(error) = released
            && !matches!(error, store::Error::VersionConflict(_))
        {
            warn!(
                session.id = %id, %error,
                "releasing the quota of unopened upload {id} failed: {error}; it is released at expiry"
            );
        }
    }

    async fn replay(&self, caller: &Caller, key: Option<&str>, fingerprint: &Sha256) -> Result<Option<Opened>, Error> {
        let Some(key) = key else { return Ok(None) };
        let Some((id, opened_by)) = self.store.session_by_idempotency_key(&caller.tenant, &caller.subject, key).await? else {
            return Ok(None);
        };
        if opened_by != fingerprint.0 {
            return Err(Error::IdempotencyKeyReused);
        }
        let session = self.store.session(id).await?.ok_or(Error::NotFound)?;
        let now = self.store.now().await?;
        let session = self.expire_if_overdue(session, now).await?;
        let upload = match session.state {
            State::Open => {
                let session = self.with_full_lifetime(session, now).await?;
                let hashes: Vec<Sha256> = self.store.part_hashes(id).await?.into_iter().map(|(_, sha256)| sha256).collect();
                self.with_signed_urls(session, &hashes, now).await?
            }
            _ => view(&session, now)?,
        };
        Ok(Some(Opened { upload, is_new: false }))
    }

    /// Restores the full lifetime of an upload whose expiry was shortened because its first request could not be signed.
    async fn with_full_lifetime(&self, session: Session, now: OffsetDateTime) -> Result<Session, Error> {
        let full_expiry = session.created_at + time::Duration::seconds(session.spec.session_seconds.into());
        if session.spec.layout != Layout::Single || session.expires_at >= full_expiry.min(session.expires_latest_at) {
            return Ok(session);
        }
        let expires_at = self.store.extend_expiry(session.id, session.extended_expiry(now)).await?.unwrap_or(session.expires_at);
        Ok(Session { expires_at, ..session })
    }

    /// The response for an open session, with its first URLs.
    async fn with_signed_urls(&self, mut session: Session, hashes: &[Sha256], now: OffsetDateTime) -> Result<Upload, Error> {
        let mut upload = view(&session, now)?;
        match session.spec.layout {
            Layout::Single => {
                let token = session.id.to_string();
                let location = ObjectLocation::of(&session);
                let signed = self.objects.presign_put(&put(&session, &token, &location), session.url_lifetime(now)).await?;
                upload.upload = Some(signed_request(signed, now));
            }
            Layout::Multipart { part_count, part_hashes, .. } => {
                let upload_id = self.ensure_s3_upload(&mut session, now).await?;
                upload = view(&session, now)?;
                let first_parts = match part_hashes {
                    PartHashMode::Deferred => 0,
                    PartHashMode::None | PartHashMode::Given => part_count.min(u32::try_from(PARTS_PER_CALL).expect("100")),
                };
                let requested: Vec<RequestedPart> =
                    (1..=first_parts).map(|number| (number, hashes.get(number as usize - 1).copied())).collect();
                upload.parts = Some(self.sign(&session, &upload_id, &requested, now).await?);
            }
        }
        Ok(upload)
    }

    /// The session's multipart upload in S3. Creates one if there is none, and then extends the session's expiry.
    async fn ensure_s3_upload(&self, session: &mut Session, now: OffsetDateTime) -> Result<String, Error> {
        if let Some(upload_id) = &session.s3_upload_id {
            return Ok(upload_id.clone());
        }
        let token = session.id.to_string();
        let location = ObjectLocation::of(session);
        let with_hashes = session.spec.layout.has_part_hashes();
        let new_upload_id = self.objects.create_multipart_upload(&put(session, &token, &location), with_hashes).await?;
        if let Some(expires_at) = self.store.set_s3_upload(session.id, &new_upload_id, session.extended_expiry(now)).await? {
            session.expires_at = expires_at;
            return Ok(new_upload_id);
        }
        // Another request stored its multipart upload first, the session has ended, or PostgreSQL lost the session's row.
        // So this multipart upload is unused.
        let stored = self.store.session(session.id).await?;
        self.objects.abort_multipart_upload(&location, &new_upload_id).await?;
        // A lost row is a conflict, so the client retries: an open is then stored anew, and for parts the id is unknown.
        let stored = stored.ok_or(store::Error::VersionConflict(session.id))?;
        match &stored.s3_upload_id {
            Some(upload_id) if stored.state == State::Open => {
                session.expires_at = stored.expires_at;
                Ok(upload_id.clone())
            }
            _ => {
                stored.ensure_open().map_err(|error| session_error(error, &stored))?;
                Err(Error::OutcomeUnknown)
            }
        }
    }

    /// Signs URLs for parts of an open multipart upload, and extends its expiry.
    pub(crate) async fn sign_parts(&self, caller: &Caller, id: Uuid, request: SignParts) -> Result<SignedParts, Error> {
        let (member, requested) = parse_parts(request)?;
        let (mut session, now) = self.current_session(caller, id).await?;
        session.ensure_open().map_err(|error| session_error(error, &session))?;
        check_parts(&session, member, &requested)?;
        let requested = self.declared_hashes(&session, requested).await?;
        match self.store.extend_expiry(id, session.extended_expiry(now)).await? {
            Some(expires_at) => session.expires_at = expires_at,
            None => {
                let session = self.session(caller, id).await?;
                session.ensure_open().map_err(|error| session_error(error, &session))?;
            }
        }
        let upload_id = self.ensure_s3_upload(&mut session, now).await?;
        Ok(SignedParts { parts: self.sign(&session, &upload_id, &requested, now).await? })
    }

    /// The requested parts with the hashes to sign: those declared at open or by earlier calls, and those that this call
    /// declares.
    async fn declared_hashes(&self, session: &Session, requested: Vec<RequestedPart>) -> Result<Vec<RequestedPart>, Error> {
        let Layout::Multipart { part_hashes, .. } = session.spec.layout else { return Ok(requested) };
        if part_hashes == PartHashMode::None {
            return Ok(requested);
        }
        let numbers: Vec<u32> = requested.iter().map(|(number, _)| *number).collect();
        let declared: BTreeMap<u32, Sha256> = self.store.part_hashes_of(session.id, &numbers).await?.into_iter().collect();
        // Check before anything is stored: a refused call declares no hash.
        let signed = merge_hashes(session, &requested, &declared)?;
        if part_hashes == PartHashMode::Given {
            return Ok(signed);
        }
        let new_hashes: Vec<(u32, Sha256)> =
            requested.iter().filter_map(|(number, sha256)| sha256.map(|s| (*number, s))).collect();
        // A concurrent call may have declared a hash first; the first declaration counts.
        let declared = self.store.store_part_hashes(session.id, &new_hashes).await?.into_iter().collect();
        merge_hashes(session, &requested, &declared)
    }

    async fn sign(
        &self,
        session: &Session,
        upload_id: &str,
        requested: &[RequestedPart],
        now: OffsetDateTime,
    ) -> Result<Vec<SignedPart>, Error> {
        let location = ObjectLocation::of(session);
        let lifetime = session.url_lifetime(now);
        let mut parts = Vec::with_capacity(requested.len());
        for (number, sha256) in requested {
            let (offset, size) =
                session.spec.layout.part_range(*number, session.spec.size_bytes).expect("the part numbers were checked");
            let signed = self.objects.presign_part(&location, upload_id, *number, size, sha256.as_ref(), lifetime).await?;
            parts.push(SignedPart { part_number: *number, offset, size, request: signed_request(signed, now) });
        }
        Ok(parts)
    }
}

type RequestedPart = (u32, Option<Sha256>);

/// A hash of the meaning of an open request. Two spellings of the same request have the same hash.
fn request_fingerprint(validated: &ValidatedRequest) -> Sha256 {
    let mut same = validated.request.clone();
    same.key = None;
    same.key_base64 = validated.key.as_deref().map(|key| BASE64.encode(key));
    same.sha256 = None;
    same.checksum_alg = Some(validated.algorithm);
    same.checksum = validated.digest.as_ref().map(Digest::hex);
    same.content_type = Some(validated.content_type.clone());
    same.headers.0.sort();
    Sha256::of(&serde_json::to_vec(&same).expect("a request has only strings and numbers"))
}

fn invalid(pointer: &str, detail: String) -> Error {
    policy::PolicyViolation::Invalid(vec![FieldError::new(pointer, detail)]).into()
}

/// Parses the requested parts, and names the member that lists them.
fn parse_parts(request: SignParts) -> Result<(&'static str, Vec<RequestedPart>), Error> {
    let (member, requested): (&str, Vec<RequestedPart>) = match (request.part_numbers, request.parts) {
        (Some(numbers), None) => ("part_numbers", numbers.into_iter().map(|number| (number, None)).collect()),
        (None, Some(parts)) => ("parts", parts.into_iter().map(|part| (part.part_number, part.sha256)).collect()),
        _ => return Err(invalid("", "send either part_numbers or parts".to_owned())),
    };
    if requested.is_empty() || requested.len() > PARTS_PER_CALL {
        return Err(invalid(&format!("/{member}"), format!("1 to {PARTS_PER_CALL} parts a call, found {}", requested.len())));
    }
    let mut seen = std::collections::BTreeSet::new();
    match requested.iter().position(|(number, _)| !seen.insert(*number)) {
        Some(index) => Err(invalid(&format!("/{member}/{index}"), format!("part {} is requested twice", requested[index].0))),
        None => Ok((member, requested)),
    }
}

/// Checks that the requested parts exist, and that they have a sha256 exactly where the upload needs one.
fn check_parts(session: &Session, member: &str, requested: &[RequestedPart]) -> Result<(), Error> {
    let Layout::Multipart { part_count, part_hashes, .. } = session.spec.layout else {
        return Err(session_error(SessionError::Conflict("the upload is a single PUT and has no parts".to_owned()), session));
    };
    for (index, (number, sha256)) in requested.iter().enumerate() {
        let pointer = format!("/{member}/{index}");
        if !(1..=part_count).contains(number) {
            return Err(invalid(&pointer, format!("part {number} does not exist: the upload has {part_count} parts")));
        }
        match (part_hashes, sha256) {
            (PartHashMode::Deferred, None) => {
                return Err(invalid(
                    &pointer,
                    format!("part {number} needs its sha256: the upload declared deferred part hashes"),
                ));
            }
            (PartHashMode::None, Some(_)) => {
                return Err(invalid(&pointer, format!("part {number} has a sha256, but the upload declared no part hashes")));
            }
            (PartHashMode::Given | PartHashMode::Deferred, Some(_)) | (PartHashMode::None | PartHashMode::Given, None) => {}
        }
    }
    Ok(())
}

/// The hash to sign for each part: the declared one. A hash in the request must equal it.
fn merge_hashes(
    session: &Session,
    requested: &[RequestedPart],
    declared: &BTreeMap<u32, Sha256>,
) -> Result<Vec<RequestedPart>, Error> {
    let merge = |(number, sha256): &RequestedPart| match (sha256, declared.get(number).copied()) {
        (Some(sha256), Some(declared)) if *sha256 != declared => {
            Err(session_error(SessionError::Conflict(format!("part {number} was declared with another sha256")), session))
        }
        (_, declared) => Ok((*number, declared)),
    };
    requested.iter().map(merge).collect()
}

fn put<'a>(session: &'a Session, token: &'a str, location: &'a ObjectLocation) -> NewObject<'a> {
    NewObject {
        location,
        token,
        content_type: &session.spec.content_type,
        size_bytes: session.spec.size_bytes,
        digest: session.spec.digest.as_ref(),
        kms_key_id: session.spec.kms_key_id.as_deref(),
    }
}

pub(super) fn signed_request(signed: PresignedUrl, now: OffsetDateTime) -> SignedRequest {
    SignedRequest {
        method: signed.method.to_owned(),
        url: signed.url,
        headers: signed.headers,
        expires_at: expiry(now, signed.expires_in),
        expires_in: signed.expires_in.as_secs(),
    }
}

fn expiry(now: OffsetDateTime, lifetime: Duration) -> OffsetDateTime {
    (now + lifetime).replace_nanosecond(0).expect("zero is a nanosecond")
}

/// A UUID of version 7 with the database's time, so that ids sort in the order of `created_at`.
fn new_id(now: OffsetDateTime) -> Uuid {
    let seconds = u64::try_from(now.unix_timestamp()).expect("after 1970");
    Uuid::new_v7(Timestamp::from_unix(ContextV7::new(), seconds, now.nanosecond()))
}
