//! The broker's routes as typed verbs, tried again where that is safe.
//!
//! Safe are reads, what the contract makes repeatable (complete, parts, abort, resolve, policies), and
//! open when it carries an `Idempotency-Key`. Anything may be tried again when not even a connection came about.

mod operate;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue};
use reqwest::{Method, StatusCode, Url};
use serde::Serialize;
use serde::de::DeserializeOwned;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

use crate::api::{
    CompleteUpload, Completed, History, ListTopics, ListUploads, OpenUpload, Policy, Problem, ReadUpload, ResolveAnswer,
    ResolveOptions, SignParts, SignedParts, TopicPage, TopicPolicy, Upload, UploadPage,
};
use crate::error::{Error, quote};
use crate::retry::{Backoff, Retry, retry_after};
use crate::storage::Wire;

/// Who it was, in [`Error::Unreachable`].
const BROKER: &str = "the broker";

/// How long a connection may take to come about: a dead address must not eat the time for retries.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Largest answer that is read: 10,000 parts or 200 uploads take less than 1 MiB.
const ANSWER_BYTES: usize = 16 << 20;

/// How patient a client is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// The longest that the broker may take for an answer; a long-poll gets its wait on top.
    pub request_timeout: Duration,
    /// The longest that bytes to or from storage may stand still. There is no limit on a whole transfer: it has its size.
    pub stall_timeout: Duration,
    /// How failed steps are tried again: each call to the broker, each part, each break of a download.
    pub retry: Retry,
}

impl Default for Settings {
    /// A minute each: the broker answers within seconds or says 503, and S3 may think that long about a slow disk.
    fn default() -> Self {
        Self { request_timeout: Duration::from_secs(60), stall_timeout: Duration::from_secs(60), retry: Retry::default() }
    }
}

/// A broker, as seen by one token. Cloning is cheap and shares the connections.
#[derive(Clone)]
pub struct Client {
    http: reqwest::Client,
    base: Arc<Url>,
    token: Option<Arc<dyn Fn() -> String + Send + Sync>>,
    settings: Settings,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let host = self.base.host_str().unwrap_or_default();
        f.debug_struct("Client").field("host", &host).field("settings", &self.settings).finish_non_exhaustive()
    }
}

/// A call as it can be sent any number of times.
struct Call {
    method: Method,
    url: Url,
    body: Option<Bytes>,
    idempotency_key: Option<String>,
    timeout: Duration,
    repeatable: bool,
}

struct Answer {
    status: StatusCode,
    body: Bytes,
}

/// A failed attempt: why, when to come back, and whether the request can have reached the broker.
struct Failure {
    error: Error,
    retry_after: Option<Duration>,
    sent: bool,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self { error, retry_after: None, sent: true }
    }
}

impl Client {
    /// A client of the broker at `base_url`, without a token.
    ///
    /// # Errors
    /// When `base_url` is not an http or https URL.
    pub fn new(base_url: &str) -> Result<Self, Error> {
        let mut base: Url =
            base_url.parse().map_err(|error| Error::Invalid(format!("the broker's address is not a URL: {error}")))?;
        if !matches!(base.scheme(), "http" | "https") {
            return Err(Error::Invalid(format!("the broker's address has the scheme {}, not http or https", base.scheme())));
        }
        base.set_query(None);
        base.set_fragment(None);
        Ok(Self { http: http()?, base: Arc::new(base), token: None, settings: Settings::default() })
    }

    /// The same with a bearer token for the broker. Storage never sees it.
    #[must_use]
    pub fn with_token(self, token: impl Into<String>) -> Self {
        let token = token.into();
        self.with_token_from(move || token.clone())
    }

    /// The same with a token that is asked for at each call, for uploads that outlive one token.
    #[must_use]
    pub fn with_token_from(mut self, source: impl Fn() -> String + Send + Sync + 'static) -> Self {
        self.token = Some(Arc::new(source));
        self
    }

    /// The same with other patience.
    #[must_use]
    pub fn with_settings(mut self, settings: Settings) -> Self {
        self.settings = settings;
        self
    }

    /// The same over the caller's own connections, for private certificate authorities and proxies.
    ///
    /// Build it with `redirect(Policy::none())` and without a total timeout: a signed request cannot
    /// follow a redirect, and a large upload takes its time.
    #[must_use]
    pub fn with_http(mut self, http: reqwest::Client) -> Self {
        self.http = http;
        self
    }

    /// How patient this client is.
    pub fn settings(&self) -> Settings {
        self.settings
    }

    pub(crate) fn wire(&self) -> Wire {
        Wire { http: self.http.clone(), settings: self.settings }
    }

    /// Opens an upload. Without an idempotency key it is tried again only where no connection came about.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn open(&self, request: &OpenUpload, idempotency_key: Option<&str>) -> Result<Upload, Error> {
        Ok(self.open_or_replay(request, idempotency_key).await?.0)
    }

    /// Opens an upload; the second value says whether the key had opened it before.
    pub(crate) async fn open_or_replay(
        &self,
        request: &OpenUpload,
        idempotency_key: Option<&str>,
    ) -> Result<(Upload, bool), Error> {
        let mut call = self.post(&["lfs", "uploads"], json(request)?)?;
        call.repeatable = idempotency_key.is_some();
        call.idempotency_key = idempotency_key.map(str::to_owned);
        let answer = self.call(&call).await?;
        Ok((parse(&answer)?, answer.status == StatusCode::OK))
    }

    /// Reads an upload; with `wait`, as soon as it changes.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn read(&self, id: Uuid, options: &ReadUpload) -> Result<Upload, Error> {
        let mut call = self.get(&["lfs", "uploads", &id.to_string()])?;
        set_query(&mut call.url, &[("wait", text(&options.wait)), ("version", text(&options.version))]);
        // A caller without impatience may say so with the longest time of all.
        call.timeout = call.timeout.saturating_add(Duration::from_secs(options.wait.unwrap_or(0)));
        parse(&self.call(&call).await?)
    }

    /// Lists uploads, newest first.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn list(&self, filters: &ListUploads) -> Result<UploadPage, Error> {
        let mut call = self.get(&["lfs", "uploads"])?;
        add_filters(&mut call.url, filters)?;
        parse(&self.call(&call).await?)
    }

    /// Reads an upload's transitions: all that the broker keeps.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn history(&self, id: Uuid) -> Result<History, Error> {
        let mut call = self.get(&["lfs", "uploads", &id.to_string(), "history"])?;
        // The largest page, and as much as a broker keeps of one upload.
        call.url.query_pairs_mut().append_pair("limit", "1000");
        parse(&self.call(&call).await?)
    }

    /// Signs part URLs, at most [`PARTS_PER_CALL`](crate::api::PARTS_PER_CALL).
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn sign_parts(&self, id: Uuid, request: &SignParts) -> Result<SignedParts, Error> {
        parse(&self.call(&self.post(&["lfs", "uploads", &id.to_string(), "parts"], json(request)?)?).await?)
    }

    /// Completes an upload: the broker verifies, records and publishes. Asking again gives the same answer.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn complete(&self, id: Uuid, request: &CompleteUpload) -> Result<Completed, Error> {
        let empty = request.sha256.is_none() && request.parts.is_none();
        let body = if empty { None } else { json(request)? };
        parse(&self.call(&self.post(&["lfs", "uploads", &id.to_string(), "complete"], body)?).await?)
    }

    /// Takes an upload back.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn abort(&self, id: Uuid) -> Result<(), Error> {
        self.call(&self.request(Method::DELETE, &["lfs", "uploads", &id.to_string()], None)?).await.map(drop)
    }

    /// Resolves a record's value to a signed GET. [`Client::fetch`] goes on to the verified bytes.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn resolve(&self, value: &[u8], options: &ResolveOptions) -> Result<ResolveAnswer, Error> {
        let mut call = self.post(&["lfs", "resolve"], Some(Bytes::copy_from_slice(value)))?;
        let validate = options.validate.then(|| "true".to_owned());
        let (version_id, topic) = (options.version_id.clone(), options.topic.clone());
        set_query(&mut call.url, &[("version_id", version_id), ("topic", topic), ("validate", validate)]);
        parse(&self.call(&call).await?)
    }

    /// Lists the topics that have a policy.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn topics(&self, options: &ListTopics) -> Result<TopicPage, Error> {
        let mut call = self.get(&["lfs", "topics"])?;
        set_query(&mut call.url, &[("limit", text(&options.limit)), ("cursor", options.cursor.clone())]);
        let page: LooseTopicPage = parse(&self.call(&call).await?)?;
        let items = page.items.into_iter().map(|item| Ok(TopicPolicy { topic: item.topic, policy: known(item.policy)? }));
        Ok(TopicPage { items: items.collect::<Result<_, Error>>()?, next_cursor: page.next_cursor })
    }

    /// Reads a topic's policy; `topic-not-found` where none is stored.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn topic(&self, topic: &str) -> Result<Policy, Error> {
        known(parse(&self.call(&self.get(&["lfs", "topics", topic])?).await?)?)
    }

    /// Replaces a topic's policy and gives back the one in force. A [`Policy`], or JSON with some of its members:
    /// the broker gives the others their defaults.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn put_topic(&self, topic: &str, policy: &impl serde::Serialize) -> Result<Policy, Error> {
        let call = self.request(Method::PUT, &["lfs", "topics", topic], json(policy)?)?;
        known(parse(&self.call(&call).await?)?)
    }

    /// Deletes a topic's policy.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn delete_topic(&self, topic: &str) -> Result<(), Error> {
        self.call(&self.request(Method::DELETE, &["lfs", "topics", topic], None)?).await.map(drop)
    }

    fn get(&self, path: &[&str]) -> Result<Call, Error> {
        self.request(Method::GET, path, None)
    }

    fn post(&self, path: &[&str], body: Option<Bytes>) -> Result<Call, Error> {
        self.request(Method::POST, path, body)
    }

    fn request(&self, method: Method, path: &[&str], body: Option<Bytes>) -> Result<Call, Error> {
        // A URL has no place for these: they would be left out, and another route asked.
        let lost = |segment: &&&str| matches!(**segment, "" | "." | "..") || segment.contains(['\t', '\n', '\r']);
        if let Some(segment) = path.iter().find(lost) {
            return Err(Error::Invalid(format!("{segment:?} is not a name that can be asked for")));
        }
        let mut url = Url::clone(&self.base);
        url.path_segments_mut().expect("http URLs have a path").pop_if_empty().extend(path);
        let timeout = self.settings.request_timeout;
        Ok(Call { method, url, body, idempotency_key: None, timeout, repeatable: true })
    }

    async fn call(&self, call: &Call) -> Result<Answer, Error> {
        let mut backoff = Backoff::new(self.settings.retry);
        loop {
            let failure = match self.attempt(call).await {
                Ok(answer) => return Ok(answer),
                Err(failure) => failure,
            };
            let again = failure.error.is_transient() && (call.repeatable || !failure.sent);
            match if again { backoff.next(failure.retry_after) } else { None } {
                Some(wait) => tokio::time::sleep(wait).await,
                None => return Err(failure.error),
            }
        }
    }

    async fn attempt(&self, call: &Call) -> Result<Answer, Failure> {
        let mut request = self.http.request(call.method.clone(), call.url.clone()).timeout(call.timeout);
        if let Some(token) = &self.token {
            let bearer = HeaderValue::try_from(format!("Bearer {}", token()));
            let mut bearer = bearer.map_err(|_| Error::Invalid("the token has characters that no header may have".to_owned()))?;
            bearer.set_sensitive(true);
            request = request.header(AUTHORIZATION, bearer);
        }
        if let Some(key) = &call.idempotency_key {
            request = request.header("idempotency-key", key);
        }
        if let Some(body) = &call.body {
            request = request.header(CONTENT_TYPE, "application/json").body(body.clone());
        }
        let response = request.send().await.map_err(|error| Failure {
            sent: !(error.is_connect() || error.is_builder()),
            error: unsent(error),
            retry_after: None,
        })?;
        let status = response.status();
        let retry_after = retry_after(response.headers());
        let body = read_bounded(response, ANSWER_BYTES).await.map_err(|error| Error::of_transport(BROKER, error))?;
        let Some(body) = body else {
            let detail = format!("the answer is longer than {ANSWER_BYTES} bytes");
            return Err(Error::Unexpected { status: status.as_u16(), detail }.into());
        };
        match status.is_success() {
            true => Ok(Answer { status, body }),
            false => Err(Failure { error: refusal(status, &body), retry_after, sent: true }),
        }
    }
}

/// A request that cannot even be built is the caller's, not the network's.
fn unsent(error: reqwest::Error) -> Error {
    match error.is_builder() {
        true => Error::Invalid(format!("the request cannot be sent: {}", error.without_url())),
        false => Error::of_transport(BROKER, error),
    }
}

/// Connections that follow no redirect: a presigned request is signed for one host, and a token is for one broker.
pub(crate) fn http() -> Result<reqwest::Client, Error> {
    let builder = || {
        reqwest::Client::builder()
            .user_agent(concat!("lfs-broker-client/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_TIMEOUT)
            .redirect(reqwest::redirect::Policy::none())
    };
    // A machine without CA certificates (a bare container) can still speak http; there, https fails at the handshake.
    builder()
        .build()
        .or_else(|_| builder().tls_certs_only([]).build())
        .map_err(|error| Error::Invalid(format!("no HTTP client can be built: {error}")))
}

/// Reads a body, or none when it is longer than `limit`.
pub(crate) async fn read_bounded(mut response: reqwest::Response, limit: usize) -> Result<Option<Bytes>, reqwest::Error> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await? {
        if body.len() + chunk.len() > limit {
            return Ok(None);
        }
        body.extend_from_slice(&chunk);
    }
    Ok(Some(body.into()))
}

fn refusal(status: StatusCode, body: &[u8]) -> Error {
    match serde_json::from_slice::<Problem>(body) {
        Ok(problem) => Error::of_problem(problem),
        Err(_) => Error::Unexpected { status: status.as_u16(), detail: quote(&String::from_utf8_lossy(body)) },
    }
}

fn parse<T: DeserializeOwned>(answer: &Answer) -> Result<T, Error> {
    serde_json::from_slice(&answer.body)
        .map_err(|error| Error::Unexpected { status: answer.status.as_u16(), detail: quote(&error.to_string()) })
}

fn json<T: Serialize>(body: &T) -> Result<Option<Bytes>, Error> {
    let body = serde_json::to_vec(body).map_err(|error| Error::Invalid(format!("the request has no JSON form: {error}")))?;
    Ok(Some(body.into()))
}

fn text<T: ToString>(value: &Option<T>) -> Option<String> {
    value.as_ref().map(T::to_string)
}

/// Appends the parameters that are there; a URL without any keeps no lone `?`.
fn set_query(url: &mut Url, parameters: &[(&str, Option<String>)]) {
    for (name, value) in parameters {
        if let Some(value) = value {
            url.query_pairs_mut().append_pair(name, value);
        }
    }
}

fn add_filters(url: &mut Url, filters: &ListUploads) -> Result<(), Error> {
    let at = |time: Option<OffsetDateTime>| {
        let written = time.map(|time| time.to_offset(time::UtcOffset::UTC).format(&Rfc3339)).transpose();
        written.map_err(|_| Error::Invalid("the filter's time has no RFC 3339 form".to_owned()))
    };
    set_query(url, &[("topic", filters.topic.clone())]);
    for state in &filters.state {
        set_query(url, &[("state", Some(state.name().to_owned()))]);
    }
    set_query(
        url,
        &[
            ("key_prefix", filters.key_prefix.clone()),
            ("created_after", at(filters.created_after)?),
            ("created_before", at(filters.created_before)?),
            ("tenant", filters.tenant.clone()),
            ("limit", text(&filters.limit)),
            ("cursor", filters.cursor.clone()),
        ],
    );
    Ok(())
}

#[derive(serde::Deserialize)]
struct LooseTopicPage {
    items: Vec<LooseTopic>,
    next_cursor: Option<String>,
}

#[derive(serde::Deserialize)]
struct LooseTopic {
    topic: String,
    policy: serde_json::Value,
}

/// Reads a policy from an answer: as a request it refuses members it does not know, as an answer it may have grown some.
fn known(mut policy: serde_json::Value) -> Result<Policy, Error> {
    let misfit = |error: serde_json::Error| Error::Unexpected { status: 200, detail: quote(&error.to_string()) };
    // Defaults are for what an older broker leaves out, not for an answer that is none of a policy.
    if policy.get("enabled").is_none() {
        return Err(Error::Unexpected { status: 200, detail: "the answer is not a policy: it has no `enabled`".to_owned() });
    }
    let ours = serde_json::to_value(Policy::default()).map_err(misfit)?;
    if let Some(members) = policy.as_object_mut() {
        members.retain(|name, _| ours.get(name).is_some());
    }
    serde_json::from_value(policy).map_err(misfit)
}
