//! Read an upload, list uploads, and read an upload's history.

use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use lfs_broker_client::api::{
    FieldError, History, ListUploads, Next, ReadHistory, ReadUpload, Transition, Upload, UploadPage, UploadState, UploadedPart,
};
use lfs_broker_client::checksum::Sha256;
use time::OffsetDateTime;
use uuid::Uuid;

use super::view::view;
use super::{Broker, Error};
use crate::auth::Caller;
use crate::completion::{missing_part_numbers, uploaded_parts};
use crate::objects::ObjectLocation;
use crate::policy;
use crate::session::{Layout, Session, State};
use crate::store::{Filter, SessionPage};

/// The longest wait of a read, in seconds: common proxies end a request after 60 seconds.
pub(crate) const MAX_WAIT_SECONDS: u64 = 30;
/// The items of a page of uploads: by default, and at most.
const DEFAULT_PAGE_ITEMS: u32 = 50;
const MAX_PAGE_ITEMS: u32 = 200;
/// The same for a history. Its items are small, so one page can hold all stored items.
const DEFAULT_HISTORY_ITEMS: u32 = 200;
const MAX_HISTORY_ITEMS: u32 = 1000;

impl Broker {
    /// Reads an upload. With `wait`, returns when the upload has changed or the wait is over.
    pub(crate) async fn read(&self, caller: &Caller, id: Uuid, options: &ReadUpload) -> Result<Upload, Error> {
        let wait = options.wait.unwrap_or(0);
        if wait > MAX_WAIT_SECONDS {
            let detail = format!("at most {MAX_WAIT_SECONDS} seconds, found {wait}");
            return Err(policy::PolicyViolation::Invalid(vec![FieldError::new("/wait", detail)]).into());
        }
        let deadline = Instant::now() + Duration::from_secs(wait);
        let mut changes = self.notifier.subscribe(id);
        let (mut session, mut now) = self.current_session(caller, id).await?;
        let known = options.version.unwrap_or(session.version);
        while session.version == known && !session.state.name().is_final() && Instant::now() < deadline {
            changes.wait_for_change(session.version, deadline).await;
            (session, now) = self.current_session(caller, id).await?;
        }
        self.view_with_next(&session, now).await
    }

    async fn view_with_next(&self, session: &Session, now: OffsetDateTime) -> Result<Upload, Error> {
        let mut upload = view(session, now)?;
        if session.state != State::Open {
            return Ok(upload);
        }
        let next = match session.spec.layout {
            Layout::Single => match self.objects.head(&ObjectLocation::of(session), None).await? {
                Some(_) => Next::Complete,
                None => Next::Put,
            },
            Layout::Multipart { part_count, .. } => {
                let uploaded = self.list_uploaded_parts(session).await?;
                let missing = ranges(missing_part_numbers(part_count, uploaded.iter().map(|part| part.part_number)));
                let next = if missing.is_empty() { Next::Complete } else { Next::Parts };
                upload.uploaded_parts = Some(uploaded);
                upload.missing_parts = Some(missing);
                next
            }
        };
        upload.next = Some(next);
        Ok(upload)
    }

    async fn list_uploaded_parts(&self, session: &Session) -> Result<Vec<UploadedPart>, Error> {
        let Some(upload_id) = session.s3_upload_id.as_deref() else { return Ok(Vec::new()) };
        let location = ObjectLocation::of(session);
        let Some(listed) = self.objects.list_parts(&location, upload_id).await? else {
            return match self.objects.head(&location, None).await? {
                // An earlier completion has joined the parts but could not save the result: no part is missing.
                Some(_) => Ok(declared_parts(session)),
                None => Ok(Vec::new()),
            };
        };
        let hashes = match session.spec.layout.has_part_hashes() {
            true => self.store.part_hashes(session.id).await?,
            false => Vec::new(),
        };
        let present = uploaded_parts(session, listed, &hashes);
        Ok(present.into_iter().map(|(part_number, size)| UploadedPart { part_number, size }).collect())
    }

    /// A page of an upload's transitions, oldest first.
    pub(crate) async fn history(&self, caller: &Caller, id: Uuid, query: &ReadHistory) -> Result<History, Error> {
        let limit = checked_limit(query.limit.unwrap_or(DEFAULT_HISTORY_ITEMS), MAX_HISTORY_ITEMS)?;
        let after = match &query.cursor {
            Some(cursor) => {
                read_history_cursor(cursor, id).ok_or_else(|| invalid_cursor("this is not a cursor of this history"))?
            }
            None => 0,
        };
        let session = self.session(caller, id).await?;
        let state = |name: &str| UploadState::ALL.into_iter().find(|state| state.name() == name).unwrap_or(session.state.name());
        let mut entries = self.store.history(id, after, i64::from(limit) + 1).await?;
        let has_more = entries.len() > limit as usize;
        entries.truncate(limit as usize);
        let next_cursor = entries.last().filter(|_| has_more).map(|last| write_history_cursor(id, last.version));
        let items = entries.into_iter().map(|entry| Transition {
            at: entry.at,
            from: entry.from_state.as_deref().map(state),
            to: state(&entry.to_state),
            reason: entry.reason,
            by: entry.by,
        });
        Ok(History { items: items.collect(), next_cursor })
    }

    /// A page of uploads, newest first.
    pub(crate) async fn list(&self, caller: &Caller, query: &ListUploads) -> Result<UploadPage, Error> {
        let limit = page_limit(query.limit)?;
        let filters_hash = filters_hash(caller, query);
        let page = match &query.cursor {
            Some(cursor) => {
                Some(read_cursor(cursor, &filters_hash).ok_or_else(|| invalid_cursor("this is not a cursor of this list"))?)
            }
            None => None,
        };
        let tenant = match (caller.is_admin(), &query.tenant) {
            (true, tenant) => tenant.clone(),
            (false, None) => Some(caller.tenant.clone()),
            (false, Some(tenant)) if *tenant == caller.tenant => Some(caller.tenant.clone()),
            (false, Some(_)) => {
                let detail = "only administrators may list another tenant";
                return Err(policy::PolicyViolation::Invalid(vec![FieldError::new("/tenant", detail)]).into());
            }
        };
        // The token does not allow this topic, so the list is empty. No index covers such a query.
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
        let SessionPage { sessions, next } = self.store.list(&filter, page, limit as usize).await?;
        let next_cursor = next.map(|(at, id)| write_cursor(at, id, &filters_hash));
        let now = self.store.now().await?;
        let items = sessions.iter().map(|session| view(session, now)).collect::<Result<_, _>>()?;
        Ok(UploadPage { items, next_cursor })
    }
}

fn declared_parts(session: &Session) -> Vec<UploadedPart> {
    let Layout::Multipart { part_count, .. } = session.spec.layout else { return Vec::new() };
    let part = |number| {
        session
            .spec
            .layout
            .part_range(number, session.spec.size_bytes)
            .map(|(_, size)| UploadedPart { part_number: number, size })
    };
    (1..=part_count).filter_map(part).collect()
}

/// Merges ascending numbers into inclusive ranges.
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

pub(super) fn page_limit(requested: Option<u32>) -> Result<u32, Error> {
    checked_limit(requested.unwrap_or(DEFAULT_PAGE_ITEMS), MAX_PAGE_ITEMS)
}

fn checked_limit(limit: u32, max: u32) -> Result<u32, Error> {
    if (1..=max).contains(&limit) {
        return Ok(limit);
    }
    Err(policy::PolicyViolation::Invalid(vec![FieldError::new("/limit", format!("1 to {max}, found {limit}"))]).into())
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
    policy::PolicyViolation::Invalid(vec![FieldError::new("/cursor", detail)]).into()
}

/// A hash of everything except cursor and limit. A cursor contains it, so it works only for the list it came from.
fn filters_hash(caller: &Caller, query: &ListUploads) -> [u8; 8] {
    let mut filters = ListUploads { cursor: None, limit: None, ..query.clone() };
    // The order of the states does not change the list.
    filters.state.sort_by_key(|state| state.name());
    filters.state.dedup();
    let text = format!("{}\n{}\n{filters:?}", caller.tenant, caller.is_admin());
    Sha256::of(text.as_bytes()).0[..8].try_into().expect("a SHA-256 has more than eight bytes")
}

fn write_cursor(at: OffsetDateTime, id: Uuid, filters_hash: &[u8; 8]) -> String {
    let at = at.unix_timestamp_nanos().to_be_bytes();
    URL_SAFE_NO_PAD.encode([filters_hash.as_slice(), &at, id.as_bytes()].concat())
}

fn read_cursor(cursor: &str, filters_hash: &[u8; 8]) -> Option<(OffsetDateTime, Uuid)> {
    let bytes: [u8; 40] = URL_SAFE_NO_PAD.decode(cursor).ok()?.try_into().ok()?;
    let (filters, rest) = bytes.split_first_chunk::<8>()?;
    let (at, id) = rest.split_first_chunk::<16>()?;
    let at = OffsetDateTime::from_unix_timestamp_nanos(i128::from_be_bytes(*at)).ok()?;
    // PostgreSQL has no times before 4713 BC, so a cursor with a negative year is not valid.
    let at = Some(at).filter(|at| at.year() >= 0)?;
    (filters == filters_hash).then_some((at, Uuid::from_slice(id).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn missing_parts_are_listed_as_ranges() {
        assert_eq!(ranges([1, 2, 3, 7, 9, 10].into_iter()), [[1, 3], [7, 7], [9, 10]]);
        assert_eq!(ranges(std::iter::empty()), Vec::<[u32; 2]>::new());
    }

    proptest! {
        #[test]
        fn ranges_contain_every_number_once_and_no_other(numbers in proptest::collection::btree_set(1u32..400, 0..200)) {
            let ranges = ranges(numbers.iter().copied());
            prop_assert!(ranges.windows(2).all(|pair| pair[0][1] + 1 < pair[1][0]), "{:?}", ranges);
            let back: Vec<u32> = ranges.iter().flat_map(|[from, to]| *from..=*to).collect();
            prop_assert_eq!(back, numbers.into_iter().collect::<Vec<_>>());
        }

        #[test]
        fn a_cursor_works_only_for_its_own_list(hash: [u8; 8], other: [u8; 8], bytes: [u8; 40], text in "[ -~]{0,60}") {
            let whole = |hash: [u8; 8]| URL_SAFE_NO_PAD.encode([hash.as_slice(), &bytes[8..]].concat());
            for (at, _) in [read_cursor(&text, &hash), read_cursor(&whole(hash), &hash)].into_iter().flatten() {
                prop_assert!((0..=9999).contains(&at.year()));
            }
            prop_assert!(hash == other || read_cursor(&whole(hash), &other).is_none());
            let now = OffsetDateTime::UNIX_EPOCH + time::Duration::nanoseconds(i64::from_be_bytes(other));
            let id = Uuid::from_slice(&bytes[..16]).unwrap();
            let nanos = now.unix_timestamp_nanos().to_be_bytes();
            let written = URL_SAFE_NO_PAD.encode([hash.as_slice(), &nanos, id.as_bytes()].concat());
            prop_assert_eq!(read_cursor(&written, &hash), Some((now, id)));
        }
    }
}
