//! A method for each of the broker's routes, with retries where a retry is safe.
//!
//! A retry is safe for reads, for the requests that the API defines as idempotent (complete, parts, abort, resolve,
//! policies), and for open with an `Idempotency-Key`. Any request is safe to retry if no connection was established.

mod admin;

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
use crate::http_client::{Settings, http_client, read_bounded};
use crate::retry::{Backoff, RetryEvent, RetryReporter, retry_after};
use crate::storage::StorageClient;
use crate::transport::address;

/// The `peer` of [`Error::Unreachable`].
const BROKER: &str = "the broker";

/// A host and a port alone are not a URL.
const WRONG_SCHEME: &str = "the broker's address must begin with http:// or https://, such as http://127.0.0.1:8080";

/// The largest response body that is read: 10,000 parts or 200 uploads take less than 1 MiB.
const MAX_RESPONSE_BYTES: usize = 16 << 20;

/// A client of one broker with one token. Cloning is cheap and shares the connections.
#[derive(Clone)]
pub struct Client {
    http: reqwest::Client,
    base: Arc<Url>,
    token: Option<Arc<dyn Fn() -> String + Send + Sync>>,
    settings: Settings,
    pub(crate) retry_reporter: RetryReporter,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let host = self.base.host_str().unwrap_or_default();
        f.debug_struct("Client").field("host", &host).field("settings", &self.settings).finish_non_exhaustive()
    }
}

/// An API call that can be sent several times.
struct Call {
    method: Method,
    url: Url,
    body: Option<Bytes>,
    idempotency_key: Option<String>,
    timeout: Duration,
    is_retry_safe: bool,
}

struct Response {
    status: StatusCode,
    base: Arc<Url>,
    body: Bytes,
}

/// A failed attempt: its error, its `Retry-After`, and whether the request may have reached the broker.
struct Failure {
    error: Error,
    retry_after: Option<Duration>,
    may_have_arrived: bool,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self { error, retry_after: None, may_have_arrived: true }
    }
}

impl Client {
    /// Creates a client of the broker at `base_url`, without a token.
    ///
    /// # Errors
    /// When `base_url` is not an http or https URL.
    pub fn new(base_url: &str) -> Result<Self, Error> {
        let mut base: Url = base_url.parse().map_err(|error| match base_url.contains("://") {
            true => Error::Invalid(format!("the broker's address is not a URL: {error}")),
            false => Error::Invalid(WRONG_SCHEME.to_owned()),
        })?;
        if !matches!(base.scheme(), "http" | "https") {
            return Err(Error::Invalid(WRONG_SCHEME.to_owned()));
        }
        base.set_query(None);
        base.set_fragment(None);
        let (settings, retry_reporter) = (Settings::default(), RetryReporter::default());
        Ok(Self { http: http_client()?, base: Arc::new(base), token: None, settings, retry_reporter })
    }

    /// Returns the client with a bearer token for the broker. S3 never receives the token.
    #[must_use]
    pub fn with_token(self, token: impl Into<String>) -> Self {
        let token = token.into();
        self.with_token_from(move || token.clone())
    }

    /// Returns the client with a function that returns the token for each call, for uploads that outlive one token.
    #[must_use]
    pub fn with_token_from(mut self, source: impl Fn() -> String + Send + Sync + 'static) -> Self {
        self.token = Some(Arc::new(source));
        self
    }

    /// Returns the client with other timeouts and retries.
    #[must_use]
    pub fn with_settings(mut self, settings: Settings) -> Self {
        self.settings = settings;
        self
    }

    /// Returns the client with the caller's HTTP client, for private certificate authorities and proxies.
    ///
    /// Build it with `redirect(Policy::none())` and without a total timeout. A signed request cannot follow a redirect,
    /// and a large upload takes long.
    #[must_use]
    pub fn with_http(mut self, http: reqwest::Client) -> Self {
        self.http = http;
        self
    }

    /// Returns the client with a function that is called before each retry, for calls to the broker and to storage. It
    /// must not block.
    #[must_use]
    pub fn on_retry(mut self, callback: impl Fn(&RetryEvent<'_>) + Send + Sync + 'static) -> Self {
        self.retry_reporter = RetryReporter(Some(Arc::new(callback)));
        self
    }

    /// The timeouts and retries of this client.
    pub fn settings(&self) -> Settings {
        self.settings
    }

    pub(crate) fn storage_client(&self) -> StorageClient {
        StorageClient { http: self.http.clone(), settings: self.settings, retry_reporter: self.retry_reporter.clone() }
    }

    /// Opens an upload. Without an idempotency key, it is retried only if no connection was established.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn open(&self, request: &OpenUpload, idempotency_key: Option<&str>) -> Result<Upload, Error> {
        Ok(self.open_or_replay(request, idempotency_key).await?.0)
    }

    /// Opens an upload. The second value is true if an earlier request with this key had opened it.
    pub(crate) async fn open_or_replay(
        &self,
        request: &OpenUpload,
        idempotency_key: Option<&str>,
    ) -> Result<(Upload, bool), Error> {
        let mut call = self.post(&["lfs", "uploads"], json_body(request)?)?;
        call.is_retry_safe = idempotency_key.is_some();
        call.idempotency_key = idempotency_key.map(str::to_owned);
        let response = self.call(&call).await?;
        Ok((parse_json(&response)?, response.status == StatusCode::OK))
    }

    /// Reads an upload. With `wait`, the broker answers as soon as the upload changes.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn read(&self, id: Uuid, options: &ReadUpload) -> Result<Upload, Error> {
        let mut call = self.get(&["lfs", "uploads", &id.to_string()])?;
        set_query(&mut call.url, &[("wait", optional_text(&options.wait)), ("version", optional_text(&options.version))]);
        // The caller may set `Duration::MAX` as the timeout.
        call.timeout = call.timeout.saturating_add(Duration::from_secs(options.wait.unwrap_or(0)));
        parse_json(&self.call(&call).await?)
    }

    /// Lists uploads, newest first.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn list(&self, filters: &ListUploads) -> Result<UploadPage, Error> {
        let mut call = self.get(&["lfs", "uploads"])?;
        add_filters(&mut call.url, filters)?;
        parse_json(&self.call(&call).await?)
    }

    /// Reads all transitions of an upload that the broker keeps.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn history(&self, id: Uuid) -> Result<History, Error> {
        let mut call = self.get(&["lfs", "uploads", &id.to_string(), "history"])?;
        // 1,000 is the largest page, and the most transitions that a broker keeps of one upload.
        call.url.query_pairs_mut().append_pair("limit", "1000");
        parse_json(&self.call(&call).await?)
    }

    /// Signs part URLs, at most [`PARTS_PER_CALL`](crate::api::PARTS_PER_CALL) in one call.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn sign_parts(&self, id: Uuid, request: &SignParts) -> Result<SignedParts, Error> {
        parse_json(&self.call(&self.post(&["lfs", "uploads", &id.to_string(), "parts"], json_body(request)?)?).await?)
    }

    /// Completes an upload: the broker verifies the object and publishes its pointer. A repeated call gets the same
    /// response.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn complete(&self, id: Uuid, request: &CompleteUpload) -> Result<Completed, Error> {
        let empty = request.sha256.is_none() && request.parts.is_none();
        let body = if empty { None } else { json_body(request)? };
        parse_json(&self.call(&self.post(&["lfs", "uploads", &id.to_string(), "complete"], body)?).await?)
    }

    /// Aborts an upload.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn abort(&self, id: Uuid) -> Result<(), Error> {
        self.call(&self.request(Method::DELETE, &["lfs", "uploads", &id.to_string()], None)?).await.map(drop)
    }

    /// Resolves a record's value to a signed GET. [`Client::fetch`] also downloads and verifies the bytes.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn resolve(&self, value: &[u8], options: &ResolveOptions) -> Result<ResolveAnswer, Error> {
        let mut call = self.post(&["lfs", "resolve"], Some(Bytes::copy_from_slice(value)))?;
        let validate = options.validate.then(|| "true".to_owned());
        let (version_id, topic) = (options.version_id.clone(), options.topic.clone());
        set_query(&mut call.url, &[("version_id", version_id), ("topic", topic), ("validate", validate)]);
        parse_json(&self.call(&call).await?)
    }

    /// Lists the topics that have a policy.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn topics(&self, options: &ListTopics) -> Result<TopicPage, Error> {
        let mut call = self.get(&["lfs", "topics"])?;
        set_query(&mut call.url, &[("limit", optional_text(&options.limit)), ("cursor", options.cursor.clone())]);
        let page: LenientTopicPage = parse_json(&self.call(&call).await?)?;
        let items = page.items.into_iter().map(|item| Ok(TopicPolicy { topic: item.topic, policy: parse_policy(item.policy)? }));
        Ok(TopicPage { items: items.collect::<Result<_, Error>>()?, next_cursor: page.next_cursor })
    }

    /// Reads a topic's policy. Without a stored policy, the error is `topic-not-found`.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn topic(&self, topic: &str) -> Result<Policy, Error> {
        parse_policy(parse_json(&self.call(&self.get(&["lfs", "topics", topic])?).await?)?)
    }

    /// Replaces a topic's policy and returns the policy in force. `policy` is a [`Policy`], or JSON with some of its
    /// members: the broker sets the others to their defaults.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn put_topic(&self, topic: &str, policy: &impl serde::Serialize) -> Result<Policy, Error> {
        let call = self.request(Method::PUT, &["lfs", "topics", topic], json_body(policy)?)?;
        parse_policy(parse_json(&self.call(&call).await?)?)
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
        // The URL parser drops these segments, so the request would go to another route.
        let is_dropped = |segment: &&&str| matches!(**segment, "" | "." | "..") || segment.contains(['\t', '\n', '\r']);
        if let Some(segment) = path.iter().find(is_dropped) {
            return Err(Error::Invalid(format!("{segment:?} cannot be a segment of a URL path")));
        }
        let mut url = Url::clone(&self.base);
        url.path_segments_mut().expect("http URLs have a path").pop_if_empty().extend(path);
        let timeout = self.settings.request_timeout;
        Ok(Call { method, url, body, idempotency_key: None, timeout, is_retry_safe: true })
    }

    async fn call(&self, call: &Call) -> Result<Response, Error> {
        let mut backoff = Backoff::new(self.settings.retry);
        loop {
            let failure = match self.attempt(call).await {
                Ok(response) => return Ok(response),
                Err(failure) => failure,
            };
            let retryable = failure.error.is_transient() && (call.is_retry_safe || !failure.may_have_arrived);
            match if retryable { backoff.next(failure.retry_after) } else { None } {
                Some(wait) => self.retry_reporter.report_and_wait(&failure.error, wait, &backoff).await,
                None => return Err(failure.error),
            }
        }
    }

    async fn attempt(&self, call: &Call) -> Result<Response, Failure> {
        let mut request = self.http.request(call.method.clone(), call.url.clone()).timeout(call.timeout);
        if let Some(token) = &self.token {
            let bearer = HeaderValue::try_from(format!("Bearer {}", token()));
            let mut bearer = bearer
                .map_err(|_| Error::Invalid("the token has characters that are not allowed in an HTTP header".to_owned()))?;
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
            may_have_arrived: !(error.is_connect() || error.is_builder()),
            error: send_error(error),
            retry_after: None,
        })?;
        let status = response.status();
        let retry_after = retry_after(response.headers());
        let body = read_bounded(response, MAX_RESPONSE_BYTES).await.map_err(|error| Error::from_transport(BROKER, error))?;
        let Some(body) = body else {
            let detail = format!("the response body is longer than {MAX_RESPONSE_BYTES} bytes");
            return Err(Error::Unexpected { status: status.as_u16(), detail }.into());
        };
        match status.is_success() {
            true => Ok(Response { status, base: Arc::clone(&self.base), body }),
            false => Err(Failure { error: error_of_response(&self.base, status, &body), retry_after, may_have_arrived: true }),
        }
    }
}

/// An error in building the request is the caller's, not the network's.
fn send_error(error: reqwest::Error) -> Error {
    match error.is_builder() {
        true => Error::Invalid(format!("the request cannot be sent: {}", error.without_url())),
        false => Error::from_transport(BROKER, error),
    }
}

fn error_of_response(base: &Url, status: StatusCode, body: &[u8]) -> Error {
    match serde_json::from_slice::<Problem>(body) {
        Ok(problem) => Error::from_problem(problem),
        Err(_) => foreign_response(base, status, body),
    }
}

fn parse_json<T: DeserializeOwned>(response: &Response) -> Result<T, Error> {
    serde_json::from_slice(&response.body).map_err(|error| match error.is_data() {
        true => Error::Unexpected { status: response.status.as_u16(), detail: quote(&error.to_string()) },
        false => foreign_response(&response.base, response.status, &response.body),
    })
}

/// A response that is not the JSON of a broker. Another server, or a proxy in between, sent it.
fn foreign_response(base: &Url, status: StatusCode, body: &[u8]) -> Error {
    let server = address(base).unwrap_or_default();
    let body = quote(&String::from_utf8_lossy(body));
    let detail = format!(
        "{}://{server}{} answered with something that is not of an lfs-broker: {body}",
        base.scheme(),
        base.path().trim_end_matches('/')
    );
    Error::Unexpected { status: status.as_u16(), detail }
}

fn json_body<T: Serialize>(body: &T) -> Result<Option<Bytes>, Error> {
    let body =
        serde_json::to_vec(body).map_err(|error| Error::Invalid(format!("the request cannot be written as JSON: {error}")))?;
    Ok(Some(body.into()))
}

fn optional_text<T: ToString>(value: &Option<T>) -> Option<String> {
    value.as_ref().map(T::to_string)
}

/// Appends the parameters that have a value. A URL without parameters gets no trailing `?`.
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
        written.map_err(|_| Error::Invalid("the filter's time cannot be written as RFC 3339".to_owned()))
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
            ("limit", optional_text(&filters.limit)),
            ("cursor", filters.cursor.clone()),
        ],
    );
    Ok(())
}

#[derive(serde::Deserialize)]
struct LenientTopicPage {
    items: Vec<LenientTopic>,
    next_cursor: Option<String>,
}

#[derive(serde::Deserialize)]
struct LenientTopic {
    topic: String,
    policy: serde_json::Value,
}

/// Parses a policy of a response. `Policy` rejects unknown members, as the broker does in requests, so members of newer
/// brokers are removed first.
fn parse_policy(mut policy: serde_json::Value) -> Result<Policy, Error> {
    let unexpected = |error: serde_json::Error| Error::Unexpected { status: 200, detail: quote(&error.to_string()) };
    // Defaults replace members that an older broker does not send. A response without `enabled` is not a policy.
    if policy.get("enabled").is_none() {
        return Err(Error::Unexpected { status: 200, detail: "the response is not a policy: it has no `enabled`".to_owned() });
    }
    let known = serde_json::to_value(Policy::default()).map_err(unexpected)?;
    if let Some(members) = policy.as_object_mut() {
        members.retain(|name, _| known.get(name).is_some());
    }
    serde_json::from_value(policy).map_err(unexpected)
}
