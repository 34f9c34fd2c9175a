//! HTTP as real clients do it: a time-out, a pause, the next replica, again.

use std::time::{Duration, Instant};

use serde_json::Value;
use uuid::Uuid;

use crate::journal::Journal;

/// An answer of the broker.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) json: Value,
}

impl Answer {
    pub(crate) fn text<'a>(&'a self, member: &str) -> &'a str {
        self.json[member].as_str().unwrap_or_default()
    }

    pub(crate) fn id(&self) -> Option<Uuid> {
        self.text("id").parse().ok()
    }
}

/// What became of a PUT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Put {
    /// S3 has these bytes, or has some already.
    There,
    /// S3 said no with this status: the bytes are wrong, or the URL has ended.
    Refused(u16),
    /// Nobody knows.
    Unknown,
}

/// One request, to be sent until it is answered.
pub(crate) struct Ask<'a> {
    pub(crate) method: reqwest::Method,
    pub(crate) path: String,
    pub(crate) body: Option<&'a Value>,
    pub(crate) idempotency_key: Option<&'a str>,
    /// How long one try may take.
    pub(crate) patience: Duration,
    /// A request that may not be repeated is answered with nothing when nobody knows what became of it.
    pub(crate) repeatable: bool,
}

/// A client's way to the replicas and to S3.
pub(crate) struct Caller<'a> {
    pub(crate) http: reqwest::Client,
    pub(crate) replicas: &'a [String],
    pub(crate) journal: &'a Journal,
}

impl<'a> Ask<'a> {
    pub(crate) fn new(method: reqwest::Method, path: String) -> Self {
        Self { method, path, body: None, idempotency_key: None, patience: Duration::from_secs(6), repeatable: true }
    }
}

/// Clients do not come back all at once.
async fn pause(tries: u32) {
    let most = 100u64 << tries.min(4);
    tokio::time::sleep(Duration::from_millis(fastrand::u64(most / 2..=most))).await;
}

impl Caller<'_> {
    /// Asks until there is an answer that is not "try again"; none by the deadline, or where asking again is not allowed.
    pub(crate) async fn ask(&self, ask: &Ask<'_>, until: Instant) -> Option<Answer> {
        let mut replica = fastrand::usize(..self.replicas.len());
        let mut tries = 0;
        while Instant::now() < until {
            let mut request = self.http.request(ask.method.clone(), format!("{}{}", self.replicas[replica], ask.path));
            request = request.timeout(ask.patience);
            if let Some(body) = ask.body {
                request = request.json(body);
            }
            if let Some(key) = ask.idempotency_key {
                request = request.header("idempotency-key", key);
            }
            self.journal.known().requests += 1;
            let answer = self.once(request, ask).await;
            match answer {
                Some(answer) if !is_passing(&answer) => return Some(answer),
                None if !ask.repeatable => return None,
                _ => {}
            }
            self.journal.known().retries += 1;
            pause(tries).await;
            tries += 1;
            replica = (replica + 1) % self.replicas.len();
        }
        None
    }

    async fn once(&self, request: reqwest::RequestBuilder, ask: &Ask<'_>) -> Option<Answer> {
        let answer = request.send().await.ok()?;
        let status = answer.status().as_u16();
        let bytes = answer.bytes().await.ok()?;
        let json: Value = match bytes.is_empty() {
            true => Value::Null,
            false => serde_json::from_slice(&bytes).unwrap_or(Value::Null),
        };
        // A bug by the contract, whatever else is broken.
        if status == 500 {
            self.journal.unexpected(format!("{} {} was answered with 500: {json}", ask.method, ask.path));
        }
        Some(Answer { status, json })
    }

    /// Sends bytes by a signed request, a few times.
    pub(crate) async fn put(&self, signed: &Value, bytes: &[u8]) -> Put {
        let Some(url) = signed["url"].as_str() else { return Put::Unknown };
        for tries in 0..4 {
            let mut request = self.http.put(url).timeout(Duration::from_secs(8)).body(bytes.to_vec());
            for (name, value) in signed["headers"].as_object().into_iter().flatten() {
                if name != "content-length" || bytes.is_empty() {
                    request = request.header(name, value.as_str().unwrap_or_default());
                }
            }
            self.journal.known().requests += 1;
            match request.send().await.map(|answer| answer.status().as_u16()) {
                // 412: an object is there already, ours from a try whose answer was lost.
                Ok(200 | 412) => return Put::There,
                Ok(status @ (400 | 403 | 404)) => return Put::Refused(status),
                Ok(_) | Err(_) => {}
            }
            self.journal.known().retries += 1;
            pause(tries).await;
        }
        Put::Unknown
    }
}

/// Whether the same request may be answered otherwise a moment later.
fn is_passing(answer: &Answer) -> bool {
    matches!(answer.status, 408 | 429 | 500 | 502 | 503 | 504) || answer.text("code") == "idempotency-in-flight"
}
