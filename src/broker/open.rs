//! Open an upload, and sign its parts.

use std::collections::BTreeMap;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use lfs_broker_client::api::{
    OpenUpload, PARTS_PER_CALL, SignParts, SignedPart, SignedParts, SignedRequest, Upload, UploadState,
};
use lfs_broker_client::checksum::{Digest, Sha256};
use time::OffsetDateTime;
use tracing::warn;
use uuid::{ContextV7, Timestamp, Uuid};

use super::{Broker, Error, refused};
use crate::auth::Caller;
use crate::failpoint;
use crate::finish::place;
use crate::kafka;
use crate::objects::{Put, Signed};
use crate::policy::{self, Shaped, wrong};
use crate::session::{Hashes, Layout, Refusal, Session, State};
use crate::store::{self, Created, Move};

/// How long an upload that could not be opened waits for its Idempotency-Key to come again. Clients give up within a minute.
const REPLAY_WITHIN: time::Duration = time::Duration::seconds(120);

/// What comes beside the body of an open.
#[derive(Debug, Clone, Default)]
pub(crate) struct OpenContext {
    /// `Some(None)`: there is one, but it has the wrong shape.
    pub(crate) idempotency_key: Option<Option<String>>,
    pub(crate) traceparent: Option<String>,
}

/// An opened upload, and whether this request opened it.
pub(crate) struct Opened {
    pub(crate) upload: Upload,
    pub(crate) fresh: bool,
}

impl Broker {
    /// Opens an upload, or gives back the one that the idempotency key opened before.
    pub(crate) async fn open(&self, caller: &Caller, request: OpenUpload, context: OpenContext) -> Result<Opened, Error> {
        let shaped = policy::shape(request)?;
        let digest = meaning(&shaped);
        let topic = shaped.request.topic.clone();
        if !caller.may_use(&topic) {
            return Err(Error::TopicForbidden(topic));
        }
        if kafka::is_internal(&topic) {
            return Err(Error::TopicInternal(topic));
        }
        let key = context.idempotency_key.map(|key| key.ok_or(Error::KeyInvalid)).transpose()?;
        if let Some(replayed) = self.replay(caller, key.as_deref(), &digest).await? {
            return Ok(replayed);
        }
        let policy = self.policy_of(&topic).await?;
        let (promise, hashes) = policy::admit(shaped, &policy, &self.policy, context.traceparent)?;
        let bucket = policy.bucket.as_deref().or(self.objects.default_bucket());
        let bucket = bucket.ok_or_else(|| policy::Refusal::NoBucket(topic.clone()))?;
        let partitions = self.kafka.partitions(&topic).await?.ok_or_else(|| Error::TopicNotFound(topic.clone()))?;
        if promise.partition.is_some_and(|partition| partition >= partitions) {
            let detail = format!("topic {topic} has {partitions} partitions");
            return Err(policy::Refusal::Invalid(vec![wrong("/partition", detail)]).into());
        }
        let limits = self.kafka.record_limits(&topic).await;
        if limits.needs_key && promise.key.is_none() {
            let detail = format!("topic {topic} is compacted: Kafka takes no record without a key");
            return Err(policy::Refusal::Invalid(vec![wrong("/key", detail)]).into());
        }
        let now = self.store.now().await?;
        let id = new_id(now);
        let object_key = policy::object_key(policy.prefix.as_deref(), &caller.tenant, &topic, id, now);
        let session = Session::open(id, &caller.tenant, &caller.subject, (bucket.to_owned(), object_key), promise, now);
        if let Some(max) = limits.max_bytes.filter(|max| session.record_bytes() > *max) {
            return Err(Error::RecordTooLarge { topic, bytes: session.record_bytes(), max });
        }
        let idempotency = key.as_deref().map(|key| (key, digest.0.as_slice()));
        match self.store.create(&session, &hashes, idempotency, self.settings.quota).await? {
            Created::New => {}
            Created::KeyTaken => return self.replay(caller, key.as_deref(), &digest).await?.ok_or(Error::KeyInFlight),
            Created::KeyInFlight => return Err(Error::KeyInFlight),
            Created::TooManySessions => return Err(Error::TooManySessions),
            Created::TooManyBytes => return Err(Error::TooManyBytes),
        }
        let upload = self.sign_or_give_back(session, hashes, key.is_some(), now).await?;
        failpoint::reach("open.answered").await.map_err(store::Error::from)?;
        Ok(Opened { upload, fresh: true })
    }

    /// The first URLs of an upload that was just stored; where none can be signed, it holds no quota. A task of its own: a
    /// client that goes away meanwhile must not leave an upload that nobody knows of.
    async fn sign_or_give_back(
        &self,
        session: Session,
        hashes: Vec<Sha256>,
        may_be_replayed: bool,
        now: OffsetDateTime,
    ) -> Result<Upload, Error> {
        let broker = self.clone();
        let signing = tokio::spawn(async move {
            let signed = broker.with_urls(session.clone(), &hashes, now).await;
            if signed.is_err() {
                broker.give_back(session, may_be_replayed, now).await;
            }
            signed
        });
        match signing.await {
            Ok(signed) => signed,
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            Err(_) => Err(Error::Unknown),
        }
    }

    /// Gives back the quota of an upload that could not be opened: no client knows of it. Under an Idempotency-Key the
    /// client may come again, so there it ends soon, but not at once.
    async fn give_back(&self, session: Session, may_be_replayed: bool, now: OffsetDateTime) {
        let id = session.id;
        let given_back = match (may_be_replayed, session.abort()) {
            (true, _) => self.store.end_unopened(id, now + REPLAY_WITHIN).await,
            (false, Ok(Some(aborted))) => {
                // There is no URL that could still bring bytes.
                let aborted = Session { expires_at: now, ..aborted };
                let reason = "no URL could be signed, so that it was never opened";
                let step = Move { from: UploadState::Open, to: &aborted, reason, by: "broker", now };
                self.store.save(&step, self.deployment.shards).await.map(|_| self.wakes.sweeper.notify_one())
            }
            (false, _) => Ok(()),
        };
        // Moved: somebody else has ended it.
        if let Err(error) = given_back
            && !matches!(error, store::Error::Moved(_))
        {
            warn!(session.id = %id, %error, "could not give back the quota of {id}, which could not be opened; it expires");
        }
    }

    async fn replay(&self, caller: &Caller, key: Option<&str>, digest: &Sha256) -> Result<Option<Opened>, Error> {
        let Some(key) = key else { return Ok(None) };
        let Some((id, opened_by)) = self.store.idempotent(&caller.tenant, &caller.subject, key).await? else { return Ok(None) };
        if opened_by != digest.0 {
            return Err(Error::KeyReused);
        }
        let session = self.store.session(id).await?.ok_or(Error::NotFound)?;
        let now = self.store.now().await?;
        let session = self.ended(session, now).await?;
        let upload = match session.state {
            State::Open => {
                let session = self.with_its_time(session, now).await?;
                let hashes: Vec<Sha256> = self.store.part_hashes(id).await?.into_iter().map(|(_, sha256)| sha256).collect();
                self.with_urls(session, &hashes, now).await?
            }
            _ => super::read::view(&session, now)?,
        };
        Ok(Some(Opened { upload, fresh: false }))
    }

    /// Gives an upload its time again that was to end soon, because no URL could be signed for its first request.
    async fn with_its_time(&self, session: Session, now: OffsetDateTime) -> Result<Session, Error> {
        let whole = session.created_at + time::Duration::seconds(session.promise.session_seconds.into());
        if session.promise.layout != Layout::Single || session.expires_at >= whole.min(session.expires_latest_at) {
            return Ok(session);
        }
        let expires_at = self.store.slide(session.id, session.slid(now)).await?.unwrap_or(session.expires_at);
        Ok(Session { expires_at, ..session })
    }

    /// An open session with the URLs to begin with.
    async fn with_urls(&self, mut session: Session, hashes: &[Sha256], now: OffsetDateTime) -> Result<Upload, Error> {
        let mut upload = super::read::view(&session, now)?;
        match session.promise.layout {
            Layout::Single => {
                let token = session.id.to_string();
                let place = place(&session);
                let signed = self.objects.sign_put(&put(&session, &token, &place), session.url_life(now)).await?;
                upload.upload = Some(request(signed, now));
            }
            Layout::Multipart { parts, hashes: promised, .. } => {
                let upload_id = self.s3_upload(&mut session, now).await?;
                upload = super::read::view(&session, now)?;
                let window = match promised {
                    Hashes::Deferred => 0,
                    Hashes::None | Hashes::Given => parts.min(u32::try_from(PARTS_PER_CALL).expect("100")),
                };
                let wanted: Vec<Wanted> = (1..=window).map(|number| (number, hashes.get(number as usize - 1).copied())).collect();
                upload.parts = Some(self.sign(&session, &upload_id, &wanted, now).await?);
            }
        }
        Ok(upload)
    }

    /// The session's multipart upload in S3, made now if there is none; then the session's time begins anew.
    async fn s3_upload(&self, session: &mut Session, now: OffsetDateTime) -> Result<String, Error> {
        if let Some(upload_id) = &session.s3_upload_id {
            return Ok(upload_id.clone());
        }
        let token = session.id.to_string();
        let place = place(session);
        let with_hashes = session.promise.layout.has_part_hashes();
        let made = self.objects.begin_multipart(&put(session, &token, &place), with_hashes).await?;
        if let Some(expires_at) = self.store.set_s3_upload(session.id, &made, session.slid(now)).await? {
            session.expires_at = expires_at;
            return Ok(made);
        }
        // Somebody else was first, or the session is over: this one is nobody's.
        let standing = self.store.session(session.id).await?.ok_or(Error::NotFound)?;
        match standing.s3_upload_id.clone() {
            Some(upload_id) if standing.state == State::Open => {
                self.objects.abort_upload(&place, &made).await?;
                session.expires_at = standing.expires_at;
                Ok(upload_id)
            }
            _ => {
                self.objects.abort_upload(&place, &made).await?;
                standing.must_be_open().map_err(|refusal| refused(refusal, &standing))?;
                Err(Error::Unknown)
            }
        }
    }

    /// Signs parts of an open multipart upload, and slides its end.
    pub(crate) async fn sign_parts(&self, caller: &Caller, id: Uuid, request: SignParts) -> Result<SignedParts, Error> {
        let (member, wanted) = asked_parts(request)?;
        let (mut session, now) = self.current(caller, id).await?;
        session.must_be_open().map_err(|refusal| refused(refusal, &session))?;
        check_parts(&session, member, &wanted)?;
        let wanted = self.standing_hashes(&session, wanted).await?;
        match self.store.slide(id, session.slid(now)).await? {
            Some(expires_at) => session.expires_at = expires_at,
            None => {
                let session = self.session(caller, id).await?;
                session.must_be_open().map_err(|refusal| refused(refusal, &session))?;
            }
        }
        let upload_id = self.s3_upload(&mut session, now).await?;
        Ok(SignedParts { parts: self.sign(&session, &upload_id, &wanted, now).await? })
    }

    /// The hashes to sign: promised at open, or promised by this call and from now on.
    async fn standing_hashes(&self, session: &Session, wanted: Vec<Wanted>) -> Result<Vec<Wanted>, Error> {
        let Layout::Multipart { hashes, .. } = session.promise.layout else { return Ok(wanted) };
        if hashes == Hashes::None {
            return Ok(wanted);
        }
        let numbers: Vec<u32> = wanted.iter().map(|(number, _)| *number).collect();
        let standing: BTreeMap<u32, Sha256> = self.store.part_hashes_of(session.id, &numbers).await?.into_iter().collect();
        // Before anything is promised: a call that is refused promises nothing.
        let signed = agreed(session, &wanted, &standing)?;
        if hashes == Hashes::Given {
            return Ok(signed);
        }
        let brought: Vec<(u32, Sha256)> = wanted.iter().filter_map(|(number, sha256)| sha256.map(|s| (*number, s))).collect();
        // Another call may have been quicker; the first promise stands.
        let standing = self.store.promise_parts(session.id, &brought).await?.into_iter().collect();
        agreed(session, &wanted, &standing)
    }

    async fn sign(
        &self,
        session: &Session,
        upload_id: &str,
        wanted: &[Wanted],
        now: OffsetDateTime,
    ) -> Result<Vec<SignedPart>, Error> {
        let place = place(session);
        let life = session.url_life(now);
        let mut parts = Vec::with_capacity(wanted.len());
        for (number, sha256) in wanted {
            let (offset, size) =
                session.promise.layout.part(*number, session.promise.size_bytes).expect("the numbers were checked");
            let signed = self.objects.sign_part(&place, upload_id, *number, size, sha256.as_ref(), life).await?;
            parts.push(SignedPart { part_number: *number, offset, size, request: request(signed, now) });
        }
        Ok(parts)
    }
}

type Wanted = (u32, Option<Sha256>);

/// What an open asks for, however it is written: two spellings of one request are the same under an idempotency key.
fn meaning(shaped: &Shaped) -> Sha256 {
    let mut same = shaped.request.clone();
    same.key = None;
    same.key_base64 = shaped.key.as_deref().map(|key| BASE64.encode(key));
    same.sha256 = None;
    same.checksum_alg = Some(shaped.algorithm);
    same.checksum = shaped.digest.as_ref().map(Digest::hex);
    same.content_type = Some(shaped.content_type.clone());
    same.headers.0.sort();
    Sha256::of(&serde_json::to_vec(&same).expect("a request has only strings and numbers"))
}

fn invalid(pointer: &str, detail: String) -> Error {
    policy::Refusal::Invalid(vec![wrong(pointer, detail)]).into()
}

/// Reads which parts are asked for, and by which member.
fn asked_parts(request: SignParts) -> Result<(&'static str, Vec<Wanted>), Error> {
    let (member, wanted): (&str, Vec<Wanted>) = match (request.part_numbers, request.parts) {
        (Some(numbers), None) => ("part_numbers", numbers.into_iter().map(|number| (number, None)).collect()),
        (None, Some(parts)) => ("parts", parts.into_iter().map(|part| (part.part_number, part.sha256)).collect()),
        _ => return Err(invalid("", "either part_numbers or parts".to_owned())),
    };
    if wanted.is_empty() || wanted.len() > PARTS_PER_CALL {
        return Err(invalid(&format!("/{member}"), format!("1 to {PARTS_PER_CALL} parts a call, found {}", wanted.len())));
    }
    let mut seen = std::collections::BTreeSet::new();
    match wanted.iter().position(|(number, _)| !seen.insert(*number)) {
        Some(index) => Err(invalid(&format!("/{member}/{index}"), format!("part {} is asked for twice", wanted[index].0))),
        None => Ok((member, wanted)),
    }
}

/// Holds the parts that are asked for against what the session expects.
fn check_parts(session: &Session, member: &str, wanted: &[Wanted]) -> Result<(), Error> {
    let Layout::Multipart { parts: count, hashes, .. } = session.promise.layout else {
        return Err(refused(Refusal::Conflict("the upload is one PUT and has no parts".to_owned()), session));
    };
    for (index, (number, sha256)) in wanted.iter().enumerate() {
        let place = format!("/{member}/{index}");
        if !(1..=count).contains(number) {
            return Err(invalid(&place, format!("part {number} of an upload with {count} parts")));
        }
        match (hashes, sha256) {
            (Hashes::Deferred, None) => {
                return Err(invalid(&place, format!("part {number} needs its sha256: part hashes were deferred")));
            }
            (Hashes::None, Some(_)) => {
                return Err(invalid(&place, format!("part {number} brings a sha256, but none was promised")));
            }
            (Hashes::Given | Hashes::Deferred, Some(_)) | (Hashes::None | Hashes::Given, None) => {}
        }
    }
    Ok(())
}

/// The hash to sign for each part: the one that stands, which must be the one that is brought.
fn agreed(session: &Session, wanted: &[Wanted], standing: &BTreeMap<u32, Sha256>) -> Result<Vec<Wanted>, Error> {
    let agree = |(number, brought): &Wanted| match (brought, standing.get(number).copied()) {
        (Some(brought), Some(standing)) if *brought != standing => {
            Err(refused(Refusal::Conflict(format!("part {number} was promised with another sha256")), session))
        }
        (_, standing) => Ok((*number, standing)),
    };
    wanted.iter().map(agree).collect()
}

fn put<'a>(session: &'a Session, token: &'a str, place: &'a crate::objects::Place) -> Put<'a> {
    Put {
        place,
        token,
        content_type: &session.promise.content_type,
        size_bytes: session.promise.size_bytes,
        digest: session.promise.digest.as_ref(),
        kms_key_id: session.promise.kms_key_id.as_deref(),
    }
}

pub(super) fn request(signed: Signed, now: OffsetDateTime) -> SignedRequest {
    SignedRequest {
        method: signed.method.to_owned(),
        url: signed.url,
        headers: signed.headers,
        expires_at: ending(now, signed.expires_in),
        expires_in: signed.expires_in.as_secs(),
    }
}

fn ending(now: OffsetDateTime, life: Duration) -> OffsetDateTime {
    (now + life).replace_nanosecond(0).expect("zero is a nanosecond")
}

/// A UUID of version 7 at the database's time, so that ids and `created_at` sort alike.
fn new_id(now: OffsetDateTime) -> Uuid {
    let seconds = u64::try_from(now.unix_timestamp()).expect("after 1970");
    Uuid::new_v7(Timestamp::from_unix(ContextV7::new(), seconds, now.nanosecond()))
}
