//! Clients of the broker: open, whole upload, list, resolve. Each repeats one operation under load.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use hyper::{Method, StatusCode};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use crate::Failure;
use crate::http::{HttpClient, Response};
use crate::load::{Latencies, Work};
use crate::servers::TOPIC;

/// The size of a small upload.
pub(crate) const SMALL_BYTES: usize = 1024;
/// How often a watcher reads again before the upload counts as stuck.
const MAX_READS: usize = 100;

/// Some bytes, and the body of the request that opens an upload of them.
#[derive(Clone)]
pub(crate) struct Payload {
    pub(crate) bytes: Bytes,
    sha256: Arc<str>,
}

/// A client with its connections. Each request goes to the next replica.
pub(crate) struct BrokerClient {
    http: HttpClient,
    replicas: Arc<[String]>,
    tokens: Arc<[String]>,
    next_replica: usize,
}

/// An upload that a client has opened.
#[derive(Deserialize)]
pub(crate) struct Opened {
    pub(crate) id: String,
    upload: Option<SignedPut>,
    /// The tenant's token.
    #[serde(skip)]
    token: usize,
}

#[derive(Deserialize)]
struct SignedPut {
    url: String,
    headers: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct UploadStatus {
    state: String,
    version: i64,
}

impl Payload {
    /// Random bytes.
    pub(crate) fn random(size: usize) -> Self {
        let mut bytes = vec![0; size];
        fastrand::fill(&mut bytes);
        Self { sha256: hex::encode(Sha256::digest(&bytes)).into(), bytes: bytes.into() }
    }

    /// The request that opens an upload. The record gets a random key, as records of different things have.
    fn open_request(&self) -> Bytes {
        let (size, sha256, key) = (self.bytes.len(), &self.sha256, fastrand::u64(..));
        format!(r#"{{"topic":"{TOPIC}","key":"{key}","size":{size},"sha256":"{sha256}"}}"#).into()
    }
}

impl BrokerClient {
    /// A client of these replicas. Each upload belongs to the tenant of a random one of these tokens.
    pub(crate) fn new(replicas: &[&str], tokens: &[String]) -> Self {
        let replicas: Arc<[String]> = replicas.iter().map(|url| (*url).to_owned()).collect();
        let next_replica = fastrand::usize(..replicas.len());
        Self { http: HttpClient::default(), replicas, tokens: tokens.into(), next_replica }
    }

    /// Sends a request to the next replica, as the tenant of a token.
    pub(crate) async fn call(
        &mut self,
        method: Method,
        path: &str,
        token: usize,
        headers: &[(&str, &str)],
        body: Bytes,
    ) -> Result<Response, Failure> {
        self.next_replica = (self.next_replica + 1) % self.replicas.len();
        let url = format!("{}{path}", self.replicas[self.next_replica]);
        let bearer = format!("Bearer {}", self.tokens[token]);
        let mut all = vec![("authorization", bearer.as_str())];
        if !body.is_empty() {
            all.push(("content-type", "application/json"));
        }
        all.extend(headers);
        self.http.send(method, &url, &all, body).await
    }

    /// Opens an upload.
    pub(crate) async fn open(&mut self, payload: &Payload, with_key: bool) -> Result<Opened, Failure> {
        let token = fastrand::usize(..self.tokens.len());
        let key = if with_key { format!("{:032x}", fastrand::u128(..)) } else { String::new() };
        let header = [("idempotency-key", key.as_str())];
        let headers: &[(&str, &str)] = if with_key { &header } else { &[] };
        let response = self.call(Method::POST, "/lfs/uploads", token, headers, payload.open_request()).await?;
        Ok(Opened { token, ..response.expect(&[201])?.json()? })
    }

    /// PUTs the bytes of an open upload into S3.
    pub(crate) async fn put(&mut self, opened: &Opened, payload: &Payload) -> Result<(), Failure> {
        let signed = opened.upload.as_ref().ok_or_else(|| Failure("the broker's answer has no signed PUT".into()))?;
        // The length follows from the body.
        let headers = signed.headers.iter().filter(|(name, _)| *name != "content-length");
        let headers: Vec<(&str, &str)> = headers.map(|(name, value)| (name.as_str(), value.as_str())).collect();
        self.http.send(Method::PUT, &signed.url, &headers, payload.bytes.clone()).await?.expect(&[200]).map(drop)
    }

    /// Completes an upload; it is published when this returns.
    pub(crate) async fn complete(&mut self, opened: &Opened) -> Result<Response, Failure> {
        let path = format!("/lfs/uploads/{}/complete", opened.id);
        let completed = self.call(Method::POST, &path, opened.token, &[], Bytes::new()).await?.expect(&[200, 202])?;
        // The broker answers 202 if Kafka needs longer than the broker's own wait.
        if completed.status == StatusCode::ACCEPTED {
            self.wait_until_published(opened).await?;
        }
        Ok(completed)
    }

    /// Reads an upload again and again, with a wait for the next change, until it is published.
    pub(crate) async fn wait_until_published(&mut self, opened: &Opened) -> Result<(), Failure> {
        let mut version = 1;
        for _ in 0..MAX_READS {
            let path = format!("/lfs/uploads/{}?wait=30&version={version}", opened.id);
            let found = self.call(Method::GET, &path, opened.token, &[], Bytes::new()).await?.expect(&[200])?;
            let found: UploadStatus = found.json()?;
            match found.state.as_str() {
                "published" => return Ok(()),
                "rejected" | "aborted" | "expired" => {
                    return Err(Failure(format!("the upload {} is {}", opened.id, found.state)));
                }
                _ => version = found.version,
            }
        }
        Err(Failure(format!("the upload {} was not published after {MAX_READS} reads", opened.id)))
    }

    /// One whole upload, which is published when this returns.
    pub(crate) async fn upload(&mut self, payload: &Payload) -> Result<Response, Failure> {
        let opened = self.open(payload, false).await?;
        self.put(&opened, payload).await?;
        self.complete(&opened).await
    }
}

/// Opens uploads.
pub(crate) struct Opens {
    pub(crate) client: BrokerClient,
    pub(crate) payload: Payload,
    /// Whether each open carries an `Idempotency-Key`.
    pub(crate) with_key: bool,
}

impl Work for Opens {
    async fn once(&mut self) -> Result<(), Failure> {
        self.client.open(&self.payload, self.with_key).await.map(drop)
    }
}

/// Makes whole uploads, and keeps how long each complete took.
pub(crate) struct Uploads {
    pub(crate) client: BrokerClient,
    /// Watches each upload with `?wait` while it is completed.
    pub(crate) watcher: Option<BrokerClient>,
    pub(crate) payload: Payload,
    pub(crate) completes: Vec<Duration>,
    /// How long after the start of complete the watcher saw the upload published.
    pub(crate) waits: Vec<Duration>,
}

impl Uploads {
    /// A client without a watcher.
    pub(crate) fn new(client: BrokerClient, payload: &Payload) -> Self {
        Self { client, watcher: None, payload: payload.clone(), completes: Vec::new(), waits: Vec::new() }
    }

    /// The latencies of the completes and of the watchers of all clients. The clients forget them.
    pub(crate) fn take_latencies(clients: &mut [Self]) -> (Latencies, Latencies) {
        let completes = clients.iter_mut().flat_map(|client| std::mem::take(&mut client.completes)).collect();
        let waits = clients.iter_mut().flat_map(|client| std::mem::take(&mut client.waits)).collect();
        (Latencies::new(completes), Latencies::new(waits))
    }
}

impl Work for Uploads {
    async fn once(&mut self) -> Result<(), Failure> {
        let Self { client, watcher, payload, completes, waits } = self;
        let opened = client.open(payload, false).await?;
        client.put(&opened, payload).await?;
        let began = Instant::now();
        let watching = async {
            match watcher {
                Some(watcher) => watcher.wait_until_published(&opened).await.map(|()| Some(began.elapsed())),
                None => Ok(None),
            }
        };
        let completing = async { client.complete(&opened).await.map(|_| began.elapsed()) };
        let (waited, completed) = tokio::try_join!(watching, completing)?;
        completes.push(completed);
        waits.extend(waited);
        Ok(())
    }
}

/// Sends the same request again and again: a list, or a resolve.
pub(crate) struct SameRequest {
    pub(crate) client: BrokerClient,
    pub(crate) method: Method,
    pub(crate) path: String,
    pub(crate) body: Bytes,
}

impl Work for SameRequest {
    async fn once(&mut self) -> Result<(), Failure> {
        let called = self.client.call(self.method.clone(), &self.path, 0, &[], self.body.clone()).await?;
        called.expect(&[200]).map(drop)
    }
}
