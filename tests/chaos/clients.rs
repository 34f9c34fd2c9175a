//! The clients: each does one job after the other, drawn from the seed, and retries like a real client.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use lfs_broker_client::checksum::Sha256;
use lfs_broker_client::{Client, Retry, Settings, UploadOptions};
use reqwest::Method;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::http_client::{ApiRequest, ApiResponse, HttpClient, Put};
use crate::jobs::{Job, JobKind, PART_BYTES};
use crate::journal::Journal;

/// After this a client gives an upload up: longer than the lifetime of a session.
const UPLOAD_TIMEOUT: Duration = Duration::from_secs(60);

/// One client with its connections.
pub(crate) struct Worker {
    pub(crate) number: usize,
    pub(crate) seed: u64,
    pub(crate) http: reqwest::Client,
    pub(crate) replicas: Vec<String>,
    pub(crate) journal: Arc<Journal>,
}

impl Worker {
    /// Does one job after the other until the run is over. The current job is always finished.
    pub(crate) async fn work(self, is_over: Arc<AtomicBool>) {
        let mut number = 0;
        while !is_over.load(Ordering::Relaxed) {
            let job = Job::draw(self.seed, self.number, number);
            number += 1;
            let outcome = match job.kind {
                JobKind::Sdk => self.sdk(&job).await,
                _ => RunningJob::new(&self, &job).run().await,
            };
            let name = match job.kind {
                JobKind::Abort(_) => "Abort".to_owned(),
                JobKind::Abandon(_) => "Abandon".to_owned(),
                kind => format!("{kind:?}"),
            };
            *self.journal.entries().outcomes.entry(format!("{name}: {outcome}")).or_default() += 1;
            tokio::time::sleep(job.pause).await;
        }
    }

    /// Uploads with the client crate, which retries by itself. When it fails, its user starts it again on the next replica.
    async fn sdk(&self, job: &Job) -> &'static str {
        let deadline = Instant::now() + UPLOAD_TIMEOUT;
        let options = UploadOptions {
            key: job.key.clone().map(String::into_bytes),
            partition: job.partition,
            idempotency_key: Some(job.name.clone()),
            wait_published: job.waits_for_record,
            wait_timeout: Duration::from_secs(15),
            ..UploadOptions::to(job.topic)
        };
        let settings = Settings {
            request_timeout: Duration::from_secs(6),
            stall_timeout: Duration::from_secs(6),
            retry: Retry { attempts: 4, ..Retry::default() },
        };
        let requested_at = self.journal.now();
        let mut replica = fastrand::usize(..self.replicas.len());
        while Instant::now() < deadline {
            let client = match Client::new(&self.replicas[replica]) {
                Ok(client) => client.with_http(self.http.clone()).with_settings(settings),
                Err(error) => panic!("{error}"),
            };
            let (journal, declared) = (Arc::clone(&self.journal), job.declared());
            let upload = client.upload(options.clone()).on_open(move |upload| journal.opened(upload.id, &declared));
            match upload.bytes(job.bytes.clone()).await {
                Ok(completed) => {
                    let response = serde_json::to_value(&completed).expect("a response has only strings and numbers");
                    return if self.journal.acknowledged(&response, requested_at) { "acknowledged" } else { "given up" };
                }
                Err(error) if error.problem().is_some_and(|problem| matches!(problem.status, 404 | 422)) => {
                    self.journal.unexpected(format!("job {}: {error}", job.name));
                    return "unexpected";
                }
                Err(error) if error.problem().is_some_and(|problem| problem.status == 410) => return "expired",
                Err(_) => replica = (replica + 1) % self.replicas.len(),
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        "given up"
    }
}

/// A running job that uses plain HTTP.
struct RunningJob<'a> {
    job: &'a Job,
    journal: &'a Journal,
    client: HttpClient<'a>,
    deadline: Instant,
}

/// The result of requesting completion.
enum Completion {
    Acknowledged,
    /// Bytes are missing.
    Missing,
    Failed(&'static str),
    GivenUp,
}

impl<'a> RunningJob<'a> {
    fn new(worker: &'a Worker, job: &'a Job) -> Self {
        let client = HttpClient { http: worker.http.clone(), replicas: &worker.replicas, journal: &worker.journal };
        Self { job, journal: &worker.journal, client, deadline: Instant::now() + UPLOAD_TIMEOUT }
    }

    async fn run(&self) -> &'static str {
        let Some(opened) = self.open().await else { return "not opened" };
        let Some(id) = opened.id() else { return "not opened" };
        match self.job.kind {
            JobKind::Abort(stage) => {
                self.upload_partly(&opened, id, stage).await;
                self.abort(id).await
            }
            JobKind::Abandon(stage) => {
                self.upload_partly(&opened, id, stage).await;
                "abandoned"
            }
            JobKind::Late => {
                let aborted = self.abort(id).await;
                self.client.put(&opened.json["upload"], &self.job.bytes).await;
                aborted
            }
            JobKind::Race => {
                self.client.put(&opened.json["upload"], &self.job.bytes).await;
                let requested_at = self.journal.now();
                let (completed, aborted) = tokio::join!(self.complete(id, requested_at), self.abort(id));
                if matches!(completed, Completion::Acknowledged) { "acknowledged" } else { aborted }
            }
            _ => self.upload(opened, id).await,
        }
    }

    /// Opens the upload, or opens it again with fresh URLs.
    async fn open(&self) -> Option<ApiResponse> {
        let body = self.job.open_body();
        let key = self.job.with_idempotency_key.then_some(self.job.name.as_str());
        let request = ApiRequest {
            body: Some(&body),
            idempotency_key: key,
            repeatable: key.is_some(),
            ..ApiRequest::new(Method::POST, "/lfs/uploads".into())
        };
        let response = self.client.send(&request, self.deadline).await?;
        match (response.status, response.id()) {
            (200 | 201, Some(id)) => {
                self.journal.opened(id, &self.job.declared());
                Some(response)
            }
            _ => {
                self.journal.unexpected(format!("job {}: open was answered with {response:?}", self.job.name));
                None
            }
        }
    }

    /// Puts and completes until the upload is acknowledged or has failed.
    async fn upload(&self, mut opened: ApiResponse, id: Uuid) -> &'static str {
        let requested_at = self.journal.now();
        let mut refused = false;
        for _ in 0..6 {
            if opened.text("state") == "open" {
                let put = match self.job.is_multipart() {
                    true => self.put_parts(&opened, id).await,
                    false => self.client.put(&opened.json["upload"], &self.job.bytes_to_send()).await,
                };
                refused = matches!(put, Put::Refused(_));
            }
            match self.complete(id, requested_at).await {
                Completion::Acknowledged => return "acknowledged",
                Completion::Failed(reason) => return reason,
                Completion::GivenUp => return "given up",
                // Expected for wrong bytes; another attempt would fail the same way.
                Completion::Missing if refused && !self.job.declared().sends_right_bytes => return "refused by S3",
                Completion::Missing if !self.job.with_idempotency_key && !self.job.is_multipart() => return "lost its URL",
                Completion::Missing => {}
            }
            opened = match self.job.with_idempotency_key {
                true => match self.open().await {
                    Some(reopened) => reopened,
                    None => return "given up",
                },
                false => opened,
            };
        }
        "given up"
    }

    /// Puts the missing parts, with fresh URLs.
    async fn put_parts(&self, opened: &ApiResponse, id: Uuid) -> Put {
        let bytes_to_send = self.job.bytes_to_send();
        let listed = opened.json["parts"].as_array().cloned().unwrap_or_default();
        let presigned = if listed.is_empty() { self.presign_parts(id).await } else { listed };
        let mut last = Put::Unknown;
        for part in &presigned {
            let number = part["part_number"].as_u64().and_then(|number| usize::try_from(number).ok()).unwrap_or(0);
            let Some(bytes) = number.checked_sub(1).and_then(|index| bytes_to_send.chunks(PART_BYTES).nth(index)) else {
                continue;
            };
            last = self.client.put(part, bytes).await;
            if last != Put::Stored {
                return last;
            }
        }
        last
    }

    async fn presign_parts(&self, id: Uuid) -> Vec<Value> {
        let state = self.client.send(&ApiRequest::new(Method::GET, format!("/lfs/uploads/{id}")), self.deadline).await;
        let missing = state.map(|state| state.json["missing_parts"].clone()).unwrap_or_default();
        let ranges = missing.as_array().into_iter().flatten();
        let numbers = ranges.flat_map(|range| range[0].as_u64().unwrap_or(1)..=range[1].as_u64().unwrap_or(0));
        let body = match self.job.kind {
            JobKind::PartsDeferred => {
                let parts: Vec<&[u8]> = self.job.parts().collect();
                let hash = |number: u64| Sha256::of(parts[usize::try_from(number).unwrap_or(1) - 1]).to_string();
                json!({"parts": numbers.map(|n| json!({"part_number": n, "sha256": hash(n)})).collect::<Vec<_>>()})
            }
            _ => json!({"part_numbers": numbers.collect::<Vec<_>>()}),
        };
        let request = ApiRequest { body: Some(&body), ..ApiRequest::new(Method::POST, format!("/lfs/uploads/{id}/parts")) };
        let presigned = self.client.send(&request, self.deadline).await;
        presigned.and_then(|presigned| presigned.json["parts"].as_array().cloned()).unwrap_or_default()
    }

    /// Requests completion until there is a final response.
    async fn complete(&self, id: Uuid, requested_at: Duration) -> Completion {
        let body = match self.job.kind {
            JobKind::Deferred | JobKind::WrongHash => json!({"sha256": Sha256::of(&self.job.bytes).to_string()}),
            _ => json!({}),
        };
        let mut early_attempts = u32::from(self.job.gives_up_early) * 2;
        while Instant::now() < self.deadline {
            let mut request =
                ApiRequest { body: Some(&body), ..ApiRequest::new(Method::POST, format!("/lfs/uploads/{id}/complete")) };
            if early_attempts > 0 {
                early_attempts -= 1;
                request.timeout = Duration::from_millis(60);
                request.repeatable = false;
            }
            let Some(response) = self.client.send(&request, self.deadline).await else { continue };
            match (response.status, response.text("code")) {
                (200 | 202, _) if self.journal.acknowledged(&response.json, requested_at) => {
                    if response.status == 202 && self.job.waits_for_record {
                        self.wait_for_record(id, requested_at).await;
                    }
                    return Completion::Acknowledged;
                }
                (202, _) => tokio::time::sleep(Duration::from_millis(200)).await,
                (409, "object-missing" | "parts-incomplete") => return Completion::Missing,
                (410, "upload-expired") => return self.failed(id, "expired"),
                (410, "upload-aborted") => return self.failed(id, "aborted"),
                (422, "checksum-mismatch") => return self.failed(id, "rejected"),
                _ => {
                    self.journal.unexpected(format!("job {}: complete of {id} was answered with {response:?}", self.job.name));
                    return Completion::Failed("unexpected");
                }
            }
        }
        Completion::GivenUp
    }

    fn failed(&self, id: Uuid, reason: &'static str) -> Completion {
        self.journal.failed(id, reason);
        Completion::Failed(reason)
    }

    /// Reads the upload for up to 10 s, until it names its record.
    async fn wait_for_record(&self, id: Uuid, requested_at: Duration) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while Instant::now() < deadline {
            let request = ApiRequest::new(Method::GET, format!("/lfs/uploads/{id}?wait=2"));
            let Some(response) = self.client.send(&request, deadline).await else { return };
            match response.text("state") {
                "published" => {
                    self.journal.acknowledged(&response.json, requested_at);
                    return;
                }
                "verified" => {}
                _ => return self.journal.unexpected(format!("{id} was acknowledged, but is then {response:?}")),
            }
        }
    }

    async fn abort(&self, id: Uuid) -> &'static str {
        while Instant::now() < self.deadline {
            let Some(response) =
                self.client.send(&ApiRequest::new(Method::DELETE, format!("/lfs/uploads/{id}")), self.deadline).await
            else {
                return "given up";
            };
            match (response.status, response.text("code")) {
                (204, _) => {
                    self.journal.failed(id, "aborted");
                    return "aborted";
                }
                (409, "completion-in-progress") => tokio::time::sleep(Duration::from_millis(200)).await,
                (409, "state-conflict") => return "too late to abort",
                _ => {
                    self.journal.unexpected(format!("job {}: abort of {id} was answered with {response:?}", self.job.name));
                    return "unexpected";
                }
            }
        }
        "given up"
    }

    /// Uploads partly. Stages: 0 nothing, 1 a PUT that breaks off, 2 the whole bytes, 3 some parts.
    async fn upload_partly(&self, opened: &ApiResponse, id: Uuid, stage: u8) {
        match stage {
            0 => {}
            1 => {
                let put = self.client.put(&opened.json["upload"], &self.job.bytes);
                let _ = tokio::time::timeout(Duration::from_millis(3), put).await;
            }
            2 => drop(self.client.put(&opened.json["upload"], &self.job.bytes).await),
            _ if self.job.is_multipart() => {
                let _ = tokio::time::timeout(Duration::from_millis(150), self.put_parts(opened, id)).await;
            }
            _ => {}
        }
    }
}
