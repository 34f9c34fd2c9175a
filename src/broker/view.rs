//! A session as the API shows it: the upload, its pointer and its record.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use lfs_broker_client::api::{Mode, Next, Record, Upload, UploadError};
use lfs_broker_client::pointer::Pointer;
use time::OffsetDateTime;

use super::Error;
use crate::session::{Layout, RecordMetadata, Session, State, Verification};
use crate::store;

/// An upload as every read shows it, without a request to S3.
pub(super) fn view(session: &Session, now: OffsetDateTime) -> Result<Upload, Error> {
    let spec = &session.spec;
    let text = spec.key.as_ref().map(|key| String::from_utf8(key.clone()).map_err(|error| BASE64.encode(error.into_bytes())));
    let (key, key_base64) = match text {
        Some(Ok(text)) => (Some(text), None),
        Some(Err(base64)) => (None, Some(base64)),
        None => (None, None),
    };
    let (mode, part_size, part_count) = match spec.layout {
        Layout::Single => (Mode::Single, None, None),
        Layout::Multipart { part_bytes, part_count, .. } => (Mode::Multipart, Some(part_bytes), Some(part_count)),
    };
    let failure = match &session.state {
        State::Rejected(failure) => Some(failure),
        _ => session.last_failure.as_ref(),
    };
    let verification = session.state.verification();
    let record = match &session.state {
        State::Published(_, metadata) => record(session, metadata),
        _ => None,
    };
    let next = match &session.state {
        // Only S3 knows whether the object or parts are there.
        State::Open => None,
        State::Completing { .. } | State::Verified(_) => Some(Next::Wait),
        State::Published(..) | State::Aborted | State::Expired | State::Rejected(_) => Some(Next::None),
    };
    Ok(Upload {
        id: session.id,
        state: session.state.name(),
        version: session.version,
        mode,
        topic: spec.topic.clone(),
        key,
        key_base64,
        bucket: session.bucket.clone(),
        object_key: session.object_key.clone(),
        size: spec.size_bytes,
        upload: None,
        part_size,
        part_count,
        parts: None,
        uploaded_parts: None,
        missing_parts: None,
        next,
        pointer: verification.map(|verification| pointer(session, verification)).transpose()?,
        integrity: verification.map(|verification| verification.integrity),
        record,
        error: failure.map(|failure| UploadError { code: failure.code.to_string(), detail: failure.detail.clone() }),
        created_at: session.created_at,
        updated_at: session.updated_at,
        expires_at: session.expires_at,
        expires_in: u64::try_from((session.expires_at - now).whole_seconds()).unwrap_or(0),
    })
}

/// The position of the published record; `None` if it is not known. That happens only if a relay stopped before it saved
/// the position, and the record was deleted from its topic before the next relay looked for it.
pub(super) fn record(session: &Session, metadata: &RecordMetadata) -> Option<Record> {
    let RecordMetadata { partition, offset, .. } = *metadata;
    let topic = session.spec.topic.clone();
    metadata.has_offset().then(|| Record { topic, partition, offset, timestamp: metadata.timestamp() })
}

/// The pointer as it was stored.
pub(super) fn pointer(session: &Session, verification: &Verification) -> Result<Pointer, Error> {
    Pointer::parse(verification.pointer.as_bytes())
        .map_err(|error| Error::Store(store::Error::Corrupt { id: session.id, reason: error.to_string() }))
}
