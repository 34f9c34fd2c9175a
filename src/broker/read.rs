//! Read an upload, list uploads, and tell an upload's history.

use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD as BASE64, URL_SAFE_NO_PAD};
use lfs_broker_client::api::{
    History, ListUploads, Mode, Next, ReadHistory, ReadUpload, Record, Transition, Upload, UploadError, UploadPage, UploadState,
    UploadedPart,
};
use lfs_broker_client::checksum::Sha256;
use time::OffsetDateTime;
use uuid::Uuid;

use super::complete::pointer;
use super::{Broker, Error};
use crate::auth::Caller;
use crate::finish::{missing, place, present};
use crate::policy::{self, wrong};
use crate::session::{Layout, Place, Session, State};
use crate::store::{Filter, Listed};

/// The longest that a reading waits, in seconds: proxies cut at 60.
pub(crate) const MAX_WAIT_SECONDS: u64 = 30;
/// Items a page, and at most.
const PAGE: u32 = 50;
const MAX_PAGE: u32 = 200;
/// The same of a history, whose items are small: one page can hold all that is kept.
const HISTORY_PAGE: u32 = 200;
const MAX_HISTORY_PAGE: u32 = 1000;

impl Broker {
    /// An upload as it stands; with `wait`, as it stands once it changed or the time is over.
    pub(crate) async fn read(&self, caller: &Caller, id: Uuid, options: &ReadUpload) -> Result<Upload, Error> {
        let wait = options.wait.unwrap_or(0);
        if wait > MAX_WAIT_SECONDS {
            let detail = format!("at most {MAX_WAIT_SECONDS} seconds");
            return Err(policy::Refusal::Invalid(vec![wrong("/wait", detail)]).into());
        }
        let deadline = Instant::now() + Duration::from_secs(wait);
        let mut changes = self.wakes.listen(id);
        let (mut session, mut now) = self.current(caller, id).await?;
        let known = options.version.unwrap_or(session.version);
        while session.version == known && !session.state.name().is_final() && Instant::now() < deadline {
            changes.wait(session.version, deadline).await;
            (session, now) = self.current(caller, id).await?;
        }
        self.whole(&session, now).await
    }

    async fn whole(&self, session: &Session, now: OffsetDateTime) -> Result<Upload, Error> {
        let mut upload = view(session, now)?;
        if session.state != State::Open {
            return Ok(upload);
        }
        let next = match session.promise.layout {
            Layout::Single => match self.objects.head(&place(session), None).await? {
                Some(_) => Next::Complete,
                None => Next::Put,
            },
            Layout::Multipart { parts, .. } => {
                let uploaded = self.uploaded(session).await?;
                let missing = ranges(missing(parts, uploaded.iter().map(|part| part.part_number)));
                let next = if missing.is_empty() { Next::Complete } else { Next::Parts };
                upload.uploaded_parts = Some(uploaded);
                upload.missing_parts = Some(missing);
                next
            }
        };
        upload.next = Some(next);
        Ok(upload)
    }

    async fn uploaded(&self, session: &Session) -> Result<Vec<UploadedPart>, Error> {
        let Some(upload_id) = session.s3_upload_id.as_deref() else { return Ok(Vec::new()) };
        let place = place(session);
        let Some(listed) = self.objects.list_parts(&place, upload_id).await? else {
            return match self.objects.head(&place, None).await? {
                // Joined already by a completion that did not come to write it down: nothing is missing.
                Some(_) => Ok(all_parts(session)),
                None => Ok(Vec::new()),
            };
        };
        let hashes = match session.promise.layout.has_part_hashes() {
            true => self.store.part_hashes(session.id).await?,
            false => Vec::new(),
        };
        let present = present(session, listed, &hashes);
        Ok(present.into_iter().map(|(part_number, size)| UploadedPart { part_number, size }).collect())
    }

    /// A page of an upload's transitions, oldest first.
    pub(crate) async fn history(&self, caller: &Caller, id: Uuid, query: &ReadHistory) -> Result<History, Error> {
        let limit = within(query.limit.unwrap_or(HISTORY_PAGE), MAX_HISTORY_PAGE)?;
        let after = match &query.cursor {
            Some(cursor) => {
                read_history_cursor(cursor, id).ok_or_else(|| invalid_cursor("of another history, or not a cursor"))?
            }
            None => 0,
        };
        let session = self.session(caller, id).await?;
        let state = |name: &str| UploadState::ALL.into_iter().find(|state| state.name() == name).unwrap_or(session.state.name());
        let mut told = self.store.history(id, after, i64::from(limit) + 1).await?;
        let more = told.len() > limit as usize;
        told.truncate(limit as usize);
        let next_cursor = told.last().filter(|_| more).map(|last| write_history_cursor(id, last.version));
        let items = told.into_iter().map(|told| Transition {
            at: told.at,
            from: told.from_state.as_deref().map(state),
            to: state(&told.to_state),
            reason: told.reason,
            by: told.by,
        });
        Ok(History { items: items.collect(), next_cursor })
    }

    /// A page of uploads, newest first.
    pub(crate) async fn list(&self, caller: &Caller, query: &ListUploads) -> Result<UploadPage, Error> {
        let limit = page_size(query.limit)?;
        let bound = filters_digest(caller, query);
        let page = match &query.cursor {
            Some(cursor) => Some(read_cursor(cursor, &bound).ok_or_else(|| invalid_cursor("of another list, or not a cursor"))?),
            None => None,
        };
        let tenant = match (caller.is_admin(), &query.tenant) {
            (true, tenant) => tenant.clone(),
            (false, None) => Some(caller.tenant.clone()),
            (false, Some(tenant)) if *tenant == caller.tenant => Some(caller.tenant.clone()),
            (false, Some(_)) => {
                return Err(policy::Refusal::Invalid(vec![wrong("/tenant", "only administrators may ask for a tenant")]).into());
            }
        };
        // No index knows of a topic that the token does not name, and no row of it is shown.
        if !caller.is_admin() && query.topic.as_ref().is_some_and(|topic| !caller.may_use(topic)) {
            return Ok(UploadPage { items: Vec::new(), next_cursor: None });
        }
        let filter = Filter {
            tenant,
            topic: query.topic.clone(),
            topics: (!caller.is_admin()).then(|| caller.topic_filter()),
            states: query.state.iter().map(|state| state.name().to_owned()).collect(),
            key_prefix: query.key_prefix.clone().map(String::into_bytes),
            created_after: query.created_after,
            created_before: query.created_before,
        };
        let Listed { sessions, next } = self.store.list(&filter, page, limit as usize).await?;
        let next_cursor = next.map(|(at, id)| write_cursor(at, id, &bound));
        let now = self.store.now().await?;
        let items = sessions.iter().map(|session| view(session, now)).collect::<Result<_, _>>()?;
        Ok(UploadPage { items, next_cursor })
    }
}

/// What every reading of a session shows, without asking S3.
pub(super) fn view(session: &Session, now: OffsetDateTime) -> Result<Upload, Error> {
    let promise = &session.promise;
    let text = promise.key.as_ref().map(|key| String::from_utf8(key.clone()).map_err(|error| BASE64.encode(error.into_bytes())));
    let (key, key_base64) = match text {
        Some(Ok(text)) => (Some(text), None),
        Some(Err(base64)) => (None, Some(base64)),
        None => (None, None),
    };
    let (mode, part_size, part_count) = match promise.layout {
        Layout::Single => (Mode::Single, None, None),
        Layout::Multipart { part_bytes, parts, .. } => (Mode::Multipart, Some(part_bytes), Some(parts)),
    };
    let trouble = match &session.state {
        State::Rejected(trouble) => Some(trouble),
        _ => session.trouble.as_ref(),
    };
    let proof = session.state.proof();
    let record = match &session.state {
        State::Published(_, place) => Some(record(session, place)),
        _ => None,
    };
    let next = match &session.state {
        // Only S3 knows.
        State::Open => None,
        State::Completing { .. } | State::Verified(_) => Some(Next::Wait),
        State::Published(..) | State::Aborted | State::Expired | State::Rejected(_) => Some(Next::None),
    };
    Ok(Upload {
        id: session.id,
        state: session.state.name(),
        version: session.version,
        mode,
        topic: promise.topic.clone(),
        key,
        key_base64,
        bucket: session.bucket.clone(),
        object_key: session.object_key.clone(),
        size: promise.size_bytes,
        upload: None,
        part_size,
        part_count,
        parts: None,
        uploaded_parts: None,
        missing_parts: None,
        next,
        pointer: proof.map(|proof| pointer(session, proof)).transpose()?,
        integrity: proof.map(|proof| proof.integrity),
        record,
        error: trouble.map(|trouble| UploadError { code: trouble.code.clone(), detail: trouble.detail.clone() }),
        created_at: session.created_at,
        updated_at: session.updated_at,
        expires_at: session.expires_at,
        expires_in: u64::try_from((session.expires_at - now).whole_seconds()).unwrap_or(0),
    })
}

pub(super) fn record(session: &Session, place: &Place) -> Record {
    Record { topic: session.promise.topic.clone(), partition: place.partition, offset: place.offset, timestamp: place.at }
}

fn all_parts(session: &Session) -> Vec<UploadedPart> {
    let Layout::Multipart { parts, .. } = session.promise.layout else { return Vec::new() };
    let part = |number| {
        session
            .promise
            .layout
            .part(number, session.promise.size_bytes)
            .map(|(_, size)| UploadedPart { part_number: number, size })
    };
    (1..=parts).filter_map(part).collect()
}

/// Ascending numbers as inclusive ranges.
fn ranges(numbers: impl Iterator<Item = u32>) -> Vec<[u32; 2]> {
    let mut ranges: Vec<[u32; 2]> = Vec::new();
    for number in numbers {
        match ranges.last_mut() {
            Some([_, end]) if *end + 1 == number => *end = number,
            _ => ranges.push([number, number]),
        }
    }
    ranges
}

pub(super) fn page_size(asked: Option<u32>) -> Result<u32, Error> {
    within(asked.unwrap_or(PAGE), MAX_PAGE)
}

fn within(limit: u32, most: u32) -> Result<u32, Error> {
    if (1..=most).contains(&limit) {
        return Ok(limit);
    }
    Err(policy::Refusal::Invalid(vec![wrong("/limit", format!("1 to {most}, found {limit}"))]).into())
}

fn write_history_cursor(id: Uuid, version: i64) -> String {
    URL_SAFE_NO_PAD.encode([id.as_bytes().as_slice(), &version.to_be_bytes()].concat())
}

fn read_history_cursor(cursor: &str, id: Uuid) -> Option<i64> {
    let bytes: [u8; 24] = URL_SAFE_NO_PAD.decode(cursor).ok()?.try_into().ok()?;
    let (of, version) = bytes.split_first_chunk::<16>()?;
    (of == id.as_bytes()).then_some(i64::from_be_bytes(version.try_into().ok()?))
}

pub(super) fn invalid_cursor(detail: &str) -> Error {
    policy::Refusal::Invalid(vec![wrong("/cursor", detail)]).into()
}

/// Everything but the cursor and the limit: a cursor goes on with the list that it came from.
fn filters_digest(caller: &Caller, query: &ListUploads) -> [u8; 8] {
    let mut filters = ListUploads { cursor: None, limit: None, ..query.clone() };
    // The same states in another order are the same list.
    filters.state.sort_by_key(|state| state.name());
    filters.state.dedup();
    let text = format!("{}\n{}\n{filters:?}", caller.tenant, caller.is_admin());
    Sha256::of(text.as_bytes()).0[..8].try_into().expect("a SHA-256 has more than eight bytes")
}

fn write_cursor(at: OffsetDateTime, id: Uuid, bound: &[u8; 8]) -> String {
    let at = at.unix_timestamp_nanos().to_be_bytes();
    URL_SAFE_NO_PAD.encode([bound.as_slice(), &at, id.as_bytes()].concat())
}

fn read_cursor(cursor: &str, bound: &[u8; 8]) -> Option<(OffsetDateTime, Uuid)> {
    let bytes: [u8; 40] = URL_SAFE_NO_PAD.decode(cursor).ok()?.try_into().ok()?;
    let (filters, rest) = bytes.split_first_chunk::<8>()?;
    let (at, id) = rest.split_first_chunk::<16>()?;
    let at = OffsetDateTime::from_unix_timestamp_nanos(i128::from_be_bytes(*at)).ok()?;
    // Nobody has uploads from before Christ, nor PostgreSQL times from before 4713 BC.
    let at = Some(at).filter(|at| at.year() >= 0)?;
    (filters == bound).then_some((at, Uuid::from_slice(id).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn missing_parts_are_told_as_ranges() {
        assert_eq!(ranges([1, 2, 3, 7, 9, 10].into_iter()), [[1, 3], [7, 7], [9, 10]]);
        assert_eq!(ranges(std::iter::empty()), Vec::<[u32; 2]>::new());
    }

    proptest! {
        #[test]
        fn ranges_hold_every_number_once_and_no_other(numbers in proptest::collection::btree_set(1u32..400, 0..200)) {
            let ranges = ranges(numbers.iter().copied());
            prop_assert!(ranges.windows(2).all(|pair| pair[0][1] + 1 < pair[1][0]), "{:?}", ranges);
            let back: Vec<u32> = ranges.iter().flat_map(|[from, to]| *from..=*to).collect();
            prop_assert_eq!(back, numbers.into_iter().collect::<Vec<_>>());
        }

        #[test]
        fn a_cursor_is_what_was_written_and_nothing_else(bound: [u8; 8], other: [u8; 8], bytes: [u8; 40], text in "[ -~]{0,60}") {
            let whole = |bound: [u8; 8]| URL_SAFE_NO_PAD.encode([bound.as_slice(), &bytes[8..]].concat());
            for (at, _) in [read_cursor(&text, &bound), read_cursor(&whole(bound), &bound)].into_iter().flatten() {
                prop_assert!((0..=9999).contains(&at.year()));
            }
            prop_assert!(bound == other || read_cursor(&whole(bound), &other).is_none());
            let now = OffsetDateTime::UNIX_EPOCH + time::Duration::nanoseconds(i64::from_be_bytes(other));
            let id = Uuid::from_slice(&bytes[..16]).unwrap();
            let nanos = now.unix_timestamp_nanos().to_be_bytes();
            let written = URL_SAFE_NO_PAD.encode([bound.as_slice(), &nanos, id.as_bytes()].concat());
            prop_assert_eq!(read_cursor(&written, &bound), Some((now, id)));
        }
    }
}
