//! Extractors: give handlers the caller, the upload id, the body and the query. Each rejection is a [`Problem`].

use std::collections::HashSet;
use std::ops::Deref;
use std::sync::Arc;

use axum::extract::{FromRequest, FromRequestParts, MatchedPath, OriginalUri, Path, Query as AxumQuery, Request};
use axum::http::request::Parts;
use axum::http::{Extensions, HeaderMap, header};
use http_body_util::BodyExt as _;
use lfs_broker_client::api::{ErrorCode, FieldError, ListUploads, UploadState};
use lfs_broker_client::json_words::in_words;
use serde::de::DeserializeOwned;
use time::format_description::well_known::Rfc3339;
use time::{OffsetDateTime, UtcOffset};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, timeout_at};
use uuid::Uuid;

use super::App;
use super::json::{check_json, parse};
use super::problem::Problem;
use crate::auth::{Caller, Scope};

/// The largest total size of a request's headers, names and values, in bytes.
const MAX_HEADERS_BYTES: usize = 16 << 10;
/// The largest body, in bytes. Most requests have a few hundred.
const MAX_BODY_BYTES: usize = 64 << 10;
/// The largest body with part hashes, in bytes: 10,000 hashes have 670,000 characters.
const MAX_HASHES_BODY_BYTES: usize = 1 << 20;

/// How many bytes a body may use without a share of the memory for all bodies. Nearly every request fits.
const UNRESERVED_BYTES: usize = 8 << 10;
/// The largest step by which a body's buffer grows.
const MAX_GROWTH_BYTES: usize = 64 << 10;

/// The largest body that the matched route accepts.
fn body_limit(extensions: &Extensions) -> usize {
    match extensions.get::<MatchedPath>().map(MatchedPath::as_str) {
        Some("/lfs/uploads" | "/lfs/uploads/{id}/parts") => MAX_HASHES_BODY_BYTES,
        _ => MAX_BODY_BYTES,
    }
}

/// A request whose headers and `Content-Length` are within the limits.
pub(super) struct SizeChecked;

impl FromRequestParts<App> for SizeChecked {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &App) -> Result<Self, Problem> {
        check_sizes(parts).map(|()| Self)
    }
}

fn check_sizes(parts: &Parts) -> Result<(), Problem> {
    let bytes: usize = parts.headers.iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
    if bytes > MAX_HEADERS_BYTES {
        let detail = format!("the headers have {bytes} bytes, at most {MAX_HEADERS_BYTES} are allowed");
        return Err(Problem::new(ErrorCode::HeadersTooLarge, detail));
    }
    let limit = body_limit(&parts.extensions);
    let length = parts.headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok());
    let length = length.and_then(|text| text.parse::<u64>().ok());
    if length.is_some_and(|length| length > limit as u64) { Err(too_large(limit)) } else { Ok(()) }
}

/// A caller with the scope to write.
pub(super) struct CanWrite(pub(super) Caller);
/// A caller with the scope to write or read.
pub(super) struct CanRead(pub(super) Caller);
/// A caller with the scope to resolve.
pub(super) struct CanResolve(pub(super) Caller);
/// A caller with the scope to administer.
pub(super) struct Admin(pub(super) Caller);
/// Any authenticated caller.
pub(super) struct Authenticated(#[expect(dead_code, reason = "the handlers need only the check")] pub(super) Caller);

async fn authorize(parts: &Parts, app: &App, scopes: &[Scope]) -> Result<Caller, Problem> {
    check_sizes(parts)?;
    let caller = app.caller(parts).await?;
    if scopes.is_empty() || scopes.iter().any(|scope| caller.has(*scope)) {
        return app.check_rate_limit(caller);
    }
    let names: Vec<&str> = scopes.iter().map(|scope| scope.name()).collect();
    Err(Problem::new(ErrorCode::InsufficientScope, format!("this route needs {}", names.join(" or "))))
}

macro_rules! caller_extractors {
    ($($name:ident: $scopes:expr),+) => {$(
        impl FromRequestParts<App> for $name {
            type Rejection = Problem;

            async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Problem> {
                authorize(parts, app, &$scopes).await.map(Self)
            }
        }
    )+};
}

caller_extractors!(
    CanWrite: [Scope::Write],
    CanRead: [Scope::Write, Scope::Read],
    CanResolve: [Scope::Read],
    Admin: [Scope::Admin],
    Authenticated: []
);

/// The upload id of the path. A malformed id becomes the nil UUID, which no upload has.
pub(super) struct UploadId(pub(super) Uuid);

impl FromRequestParts<App> for UploadId {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Problem> {
        let path = Path::<String>::from_request_parts(parts, app).await;
        Ok(Self(path.ok().and_then(|Path(text)| Uuid::try_parse(&text).ok()).unwrap_or_default()))
    }
}

/// The query parameters.
pub(super) struct Query<T>(pub(super) T);

impl<T: DeserializeOwned> FromRequestParts<App> for Query<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Problem> {
        match AxumQuery::<T>::from_request_parts(parts, app).await {
            Ok(AxumQuery(query)) => Ok(Self(query)),
            Err(rejection) => {
                let error = std::error::Error::source(&rejection).map_or_else(|| rejection.to_string(), ToString::to_string);
                // The error begins with the parameter's name, if the parser knows it.
                let is_name = |text: &str| text.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_');
                let (pointer, error) = match error.split_once(": ") {
                    Some((name, error)) if is_name(name) => (format!("/{name}"), error),
                    _ => (String::new(), error.as_str()),
                };
                Err(Problem::invalid(vec![FieldError::new(&pointer, in_words(error))]))
            }
        }
    }
}

/// Names [`UploadState::ALL`].
const NOT_A_STATE: &str = "not an upload state: open, completing, verified, published, aborted, expired or rejected";

/// The filters of a list request. The parameter `state` may repeat.
pub(super) struct Filters(pub(super) ListUploads);

impl FromRequestParts<App> for Filters {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Problem> {
        let Query(pairs) = Query::<Vec<(String, String)>>::from_request_parts(parts, app).await?;
        filters(pairs).map(Self).map_err(Problem::invalid)
    }
}

fn filters(pairs: Vec<(String, String)>) -> Result<ListUploads, Vec<FieldError>> {
    let mut list = ListUploads::default();
    let mut errors = Vec::new();
    let mut seen = HashSet::new();
    for (name, value) in pairs {
        let outcome = match name != "state" && !seen.insert(name.clone()) {
            true => Err("is given twice"),
            false => filter(&mut list, &name, value),
        };
        errors.extend(outcome.err().map(|reason| FieldError::new(&format!("/{name}"), reason)));
    }
    if errors.is_empty() { Ok(list) } else { Err(errors) }
}

fn filter(list: &mut ListUploads, name: &str, value: String) -> Result<(), &'static str> {
    // Converting to UTC can move a time out of the supported years.
    let in_utc = |at: OffsetDateTime| at.checked_to_offset(UtcOffset::UTC).filter(|at| (0..=9999).contains(&at.year()));
    let time = |value: &str| {
        let at = OffsetDateTime::parse(value, &Rfc3339).ok().and_then(in_utc);
        at.ok_or("not an RFC 3339 time in the years 0 to 9999; in a query, write + as %2B")
    };
    match name {
        // PostgreSQL cannot store a NUL in a text, so no row could match.
        _ if value.contains('\0') => return Err("contains a NUL character"),
        "topic" => list.topic = Some(value),
        "key_prefix" => list.key_prefix = Some(value),
        "tenant" => list.tenant = Some(value),
        "cursor" => list.cursor = Some(value),
        "state" => {
            let state = UploadState::ALL.into_iter().find(|state| state.name() == value);
            list.state.push(state.ok_or(NOT_A_STATE)?);
        }
        "limit" => list.limit = Some(value.parse().map_err(|_| "not a number from 1 to 200")?),
        "created_after" => list.created_after = Some(time(&value)?),
        "created_before" => list.created_before = Some(time(&value)?),
        _ => return Err("no such filter"),
    }
    Ok(())
}

/// A JSON body.
pub(super) struct Body<T>(pub(super) T);
/// An optional JSON body.
pub(super) struct MaybeBody<T>(pub(super) T);
/// The bytes of a valid JSON body, for a handler that parses them.
pub(super) struct RawJson(pub(super) BufferedBody);

impl<T: DeserializeOwned> FromRequest<App> for Body<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, app: &App) -> Result<Self, Problem> {
        check_media_type(request.headers())?;
        parse(&read_body(request, app).await?).map(Self)
    }
}

impl<T: DeserializeOwned + Default> FromRequest<App> for MaybeBody<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, app: &App) -> Result<Self, Problem> {
        let media_type = check_media_type(request.headers());
        let bytes = read_body(request, app).await?;
        if bytes.is_empty() {
            return Ok(Self(T::default()));
        }
        media_type?;
        // Generated clients send `null` for an absent body.
        if bytes.trim_ascii() == b"null" {
            return Ok(Self(T::default()));
        }
        parse(&bytes).map(Self)
    }
}

impl FromRequest<App> for RawJson {
    type Rejection = Problem;

    async fn from_request(request: Request, app: &App) -> Result<Self, Problem> {
        check_media_type(request.headers())?;
        let bytes = read_body(request, app).await?;
        check_json(&bytes).map(|()| Self(bytes))
    }
}

/// `application/json` or any media type with the suffix `+json` (RFC 6839).
fn check_media_type(headers: &HeaderMap) -> Result<(), Problem> {
    let value = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let essence = value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    let is_json = essence == "application/json" || (essence.contains('/') && essence.ends_with("+json"));
    if is_json { Ok(()) } else { Err(Problem::new(ErrorCode::UnsupportedMediaType, "Content-Type must be application/json")) }
}

/// A body, with its share of the memory for all bodies.
#[derive(Default)]
pub(super) struct BufferedBody {
    bytes: Vec<u8>,
    memory_permit: Option<OwnedSemaphorePermit>,
}

impl Deref for BufferedBody {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl BufferedBody {
    /// Appends a chunk. Fails if the memory for it does not become free before the deadline.
    async fn append(&mut self, chunk: &[u8], app: &App, deadline: Instant) -> Result<(), Problem> {
        let needed = self.bytes.len() + chunk.len();
        let mut capacity = self.bytes.capacity().max(UNRESERVED_BYTES);
        while capacity < needed {
            capacity += capacity.min(MAX_GROWTH_BYTES);
        }
        let reserved_kib = self.memory_permit.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        let needed_kib = (capacity - UNRESERVED_BYTES) >> 10;
        if needed_kib > reserved_kib {
            let more = u32::try_from(needed_kib - reserved_kib).expect("a body has at most 1 MiB");
            let more = timeout_at(deadline, Arc::clone(&app.body_memory).acquire_many_owned(more)).await;
            let Ok(Ok(more)) = more else {
                let detail = "the memory for request bodies is in use; retry";
                return Err(Problem::new(ErrorCode::DependencyUnavailable, detail));
            };
            match &mut self.memory_permit {
                Some(permit) => permit.merge(more),
                None => self.memory_permit = Some(more),
            }
        }
        // The buffer grows with the received bytes. A large `Content-Length` alone reserves nothing.
        self.bytes.reserve_exact(capacity - self.bytes.len());
        self.bytes.extend_from_slice(chunk);
        Ok(())
    }
}

async fn read_body(request: Request, app: &App) -> Result<BufferedBody, Problem> {
    let (limit, timeout) = (body_limit(request.extensions()), app.settings.body_timeout);
    let (mut body, mut buffered, deadline) = (request.into_body(), BufferedBody::default(), Instant::now() + timeout);
    loop {
        match timeout_at(deadline, body.frame()).await {
            Ok(Some(Ok(frame))) => match frame.into_data() {
                Ok(chunk) if buffered.len() + chunk.len() > limit => return Err(too_large(limit)),
                Ok(chunk) if chunk.is_empty() => {}
                Ok(chunk) => buffered.append(&chunk, app, deadline).await?,
                // Trailers are ignored.
                Err(_) => {}
            },
            Ok(Some(Err(_))) => return Err(Problem::new(ErrorCode::MalformedJson, "the body is incomplete")),
            Ok(None) => return Ok(buffered),
            Err(_) => {
                let detail = format!("the body did not arrive within {} s", timeout.as_secs_f32());
                return Err(Problem::new(ErrorCode::RequestTimeout, detail));
            }
        }
    }
}

fn too_large(limit: usize) -> Problem {
    Problem::new(ErrorCode::RequestTooLarge, format!("the body has more than {limit} bytes"))
}

/// The topic name of the path. It may contain any characters.
pub(super) struct TopicName(pub(super) String);

impl FromRequestParts<App> for TopicName {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Problem> {
        match Path::<String>::from_request_parts(parts, app).await {
            Ok(Path(topic)) => Ok(Self(topic)),
            Err(_) => {
                let uri = OriginalUri::from_request_parts(parts, app).await.map(|uri| uri.path().to_owned()).unwrap_or_default();
                Err(Problem::new(ErrorCode::NotFound, format!("no such route: {uri}")))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn list_filters_are_parsed_and_errors_name_the_filter() {
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let list = filters(vec![pair("state", "open"), pair("state", "verified"), pair("created_after", "2026-11-21T00:00:00Z")])
            .unwrap();
        assert_eq!(list.state, [UploadState::Open, UploadState::Verified]);
        assert!(list.created_after.is_some());
        for bad in [pair("state", "x"), pair("limit", "-1"), pair("created_before", "yesterday"), pair("nonsense", "1")] {
            let name = format!("/{}", bad.0);
            assert_eq!(filters(vec![bad]).unwrap_err()[0].pointer, name);
        }
        let states = &filters(vec![pair("state", "x")]).unwrap_err()[0].detail;
        assert!(UploadState::ALL.iter().all(|state| states.contains(state.name())), "{states}");
        assert_eq!(filters(vec![pair("topic", "a"), pair("topic", "b")]).unwrap_err()[0].pointer, "/topic");
    }

    proptest! {
        #[test]
        fn no_filter_causes_a_panic(
            name in "topic|key_prefix|tenant|cursor|state|limit|created_after|created_before|[ -~]{0,9}",
            value in "\\PC{0,40}|[0-9]{4}-[01][0-9]-[0-3][0-9]T[012][0-9]:[0-5][0-9]:[0-6][0-9](Z|[+-][0-2][0-9]:[0-5][0-9])",
        ) {
            if let Ok(list) = filters(vec![(name, value)]) {
                let times = [list.created_after, list.created_before];
                prop_assert!(times.into_iter().flatten().all(|at| (0..=9999).contains(&at.year()) && at.offset().is_utc()));
            }
        }
    }
}
