//! HTTP like real clients: a timeout, a pause, then a retry on the next replica.

use std::time::{Duration, Instant};

use serde_json::Value;
use uuid::Uuid;

use crate::journal::Journal;

/// A response of the broker.
#[derive(Debug)]
pub(crate) struct ApiResponse {
    pub(crate) status: u16,
    pub(crate) json: Value,
}

impl ApiResponse {
    pub(crate) fn text<'a>(&'a self, member: &str) -> &'a str {
        self.json[member].as_str().unwrap_or_default()
    }

    pub(crate) fn id(&self) -> Option<Uuid> {
        self.text("id").parse().ok()
    }
}

/// The result of a PUT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Put {
    /// S3 has stored these bytes now or in an earlier attempt.
    Stored,
    /// S3 refused with this status: the bytes are wrong, or the URL has expired.
    Refused(u16),
    /// No response arrived, so the result is unknown.
    Unknown,
}

/// A request that is retried until it is answered.
pub(crate) struct ApiRequest<'a> {
    pub(crate) method: reqwest::Method,
    pub(crate) path: String,
    pub(crate) body: Option<&'a Value>,
    pub(crate) idempotency_key: Option<&'a str>,
    /// The longest time of one attempt.
    pub(crate) timeout: Duration,
    /// Whether the request may be repeated. Otherwise a lost response ends it without a result.
    pub(crate) repeatable: bool,
}

/// A client's access to the replicas and to S3.
pub(crate) struct HttpClient<'a> {
    pub(crate) http: reqwest::Client,
    pub(crate) replicas: &'a [String],
    pub(crate) journal: &'a Journal,
}

impl<'a> ApiRequest<'a> {
    pub(crate) fn new(method: reqwest::Method, path: String) -> Self {
        Self { method, path, body: None, idempotency_key: None, timeout: Duration::from_secs(6), repeatable: true }
    }
}

/// Pauses for a random time, so that clients do not retry all at once.
async fn back_off(attempts: u32) {
    let max_ms = 100u64 << attempts.min(4);
    tokio::time::sleep(Duration::from_millis(fastrand::u64(max_ms / 2..=max_ms))).await;
}

impl HttpClient<'_> {
    /// Sends the request until a response is final. `None` at the deadline, or if the request may not be repeated.
    pub(crate) async fn send(&self, api_request: &ApiRequest<'_>, until: Instant) -> Option<ApiResponse> {
        let mut replica = fastrand::usize(..self.replicas.len());
        let mut attempts = 0;
        while Instant::now() < until {
            let mut request =
                self.http.request(api_request.method.clone(), format!("{}{}", self.replicas[replica], api_request.path));
            request = request.timeout(api_request.timeout);
            if let Some(body) = api_request.body {
                request = request.json(body);
            }
            if let Some(key) = api_request.idempotency_key {
                request = request.header("idempotency-key", key);
            }
            self.journal.entries().requests += 1;
            let response = self.send_once(request, api_request).await;
            match response {
                Some(response) if !is_retryable(&response) => return Some(response),
                None if !api_request.repeatable => return None,
                _ => {}
            }
            self.journal.entries().retries += 1;
            back_off(attempts).await;
            attempts += 1;
            replica = (replica + 1) % self.replicas.len();
        }
        None
    }

    async fn send_once(&self, request: reqwest::RequestBuilder, api_request: &ApiRequest<'_>) -> Option<ApiResponse> {
        let response = request.send().await.ok()?;
        let status = response.status().as_u16();
        let bytes = response.bytes().await.ok()?;
        let json: Value = match bytes.is_empty() {
            true => Value::Null,
            false => serde_json::from_slice(&bytes).unwrap_or(Value::Null),
        };
        // A 500 is always a bug, whatever else is broken.
        if status == 500 {
            self.journal.unexpected(format!("{} {} was answered with 500: {json}", api_request.method, api_request.path));
        }
        Some(ApiResponse { status, json })
    }

    /// Sends bytes with a presigned request, in up to four attempts.
    pub(crate) async fn put(&self, signed: &Value, bytes: &[u8]) -> Put {
        let Some(url) = signed["url"].as_str() else { return Put::Unknown };
        for attempts in 0..4 {
            let mut request = self.http.put(url).timeout(Duration::from_secs(8)).body(bytes.to_vec());
            for (name, value) in signed["headers"].as_object().into_iter().flatten() {
                if name != "content-length" || bytes.is_empty() {
                    request = request.header(name, value.as_str().unwrap_or_default());
                }
            }
            self.journal.entries().requests += 1;
            match request.send().await.map(|response| response.status().as_u16()) {
                // 412: the object exists already, from an attempt whose response was lost.
                Ok(200 | 412) => return Put::Stored,
                Ok(status @ (400 | 403 | 404)) => return Put::Refused(status),
                Ok(_) | Err(_) => {}
            }
            self.journal.entries().retries += 1;
            back_off(attempts).await;
        }
        Put::Unknown
    }
}

/// Whether the same request may get another response a moment later.
fn is_retryable(response: &ApiResponse) -> bool {
    matches!(response.status, 408 | 429 | 500 | 502 | 503 | 504) || response.text("code") == "idempotency-in-flight"
}
