//! The clients: each does one job after the other, drawn from the seed, and does not give up where a real one would not.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use lfs_broker_client::checksum::Sha256;
use lfs_broker_client::{Client, Retry, Settings, UploadOptions};
use reqwest::Method;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::caller::{Answer, Ask, Caller, Put};
use crate::jobs::{Job, PART, Work};
use crate::journal::Journal;

/// A client gives an upload up after this: more than a session lives.
const PATIENCE: Duration = Duration::from_secs(60);

/// One client and its way to the world.
pub(crate) struct Worker {
    pub(crate) number: usize,
    pub(crate) seed: u64,
    pub(crate) http: reqwest::Client,
    pub(crate) replicas: Vec<String>,
    pub(crate) journal: Arc<Journal>,
}

impl Worker {
    /// Does one job after the other until told to end; the last one is finished.
    pub(crate) async fn work(self, ended: Arc<AtomicBool>) {
        let mut number = 0;
        while !ended.load(Ordering::Relaxed) {
            let job = Job::draw(self.seed, self.number, number);
            number += 1;
            let outcome = match job.work {
                Work::Sdk => self.sdk(&job).await,
                _ => Doing::new(&self, &job).run().await,
            };
            let name = match job.work {
                Work::Abort(_) => "Abort".to_owned(),
                Work::Abandon(_) => "Abandon".to_owned(),
                work => format!("{work:?}"),
            };
            *self.journal.known().outcomes.entry(format!("{name}: {outcome}")).or_default() += 1;
            tokio::time::sleep(job.think).await;
        }
    }

    /// The client that we ship, which tries again by itself; when it gives up, its user runs it again on the next replica.
    async fn sdk(&self, job: &Job) -> &'static str {
        let until = Instant::now() + PATIENCE;
        let options = UploadOptions {
            key: job.key.clone().map(String::into_bytes),
            partition: job.partition,
            idempotency_key: Some(job.name.clone()),
            wait_published: job.follows,
            wait_timeout: Duration::from_secs(15),
            ..UploadOptions::to(job.topic)
        };
        let settings = Settings {
            request_timeout: Duration::from_secs(6),
            stall_timeout: Duration::from_secs(6),
            retry: Retry { attempts: 4, ..Retry::default() },
        };
        let asked_at = self.journal.now();
        let mut replica = fastrand::usize(..self.replicas.len());
        while Instant::now() < until {
            let client = match Client::new(&self.replicas[replica]) {
                Ok(client) => client.with_http(self.http.clone()).with_settings(settings),
                Err(error) => panic!("{error}"),
            };
            let (journal, intent) = (Arc::clone(&self.journal), job.intent());
            let upload = client.upload(options.clone()).on_open(move |upload| journal.opened(upload.id, &intent));
            match upload.bytes(job.bytes.clone()).await {
                Ok(completed) => {
                    let answer = serde_json::to_value(&completed).expect("an answer has only strings and numbers");
                    return if self.journal.promised(&answer, asked_at) { "promised" } else { "given up" };
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

/// A job under way, over plain HTTP.
struct Doing<'a> {
    job: &'a Job,
    journal: &'a Journal,
    caller: Caller<'a>,
    until: Instant,
}

/// What became of asking for completion.
enum Completion {
    Promised,
    /// Bytes are missing.
    Missing,
    Failed(&'static str),
    GivenUp,
}

impl<'a> Doing<'a> {
    fn new(worker: &'a Worker, job: &'a Job) -> Self {
        let caller = Caller { http: worker.http.clone(), replicas: &worker.replicas, journal: &worker.journal };
        Self { job, journal: &worker.journal, caller, until: Instant::now() + PATIENCE }
    }

    async fn run(&self) -> &'static str {
        let Some(opened) = self.open().await else { return "not opened" };
        let Some(id) = opened.id() else { return "not opened" };
        match self.job.work {
            Work::Abort(stage) => {
                self.some_of_it(&opened, id, stage).await;
                self.abort(id).await
            }
            Work::Abandon(stage) => {
                self.some_of_it(&opened, id, stage).await;
                "left alone"
            }
            Work::Late => {
                let aborted = self.abort(id).await;
                self.caller.put(&opened.json["upload"], &self.job.bytes).await;
                aborted
            }
            Work::Race => {
                self.caller.put(&opened.json["upload"], &self.job.bytes).await;
                let asked_at = self.journal.now();
                let (completed, aborted) = tokio::join!(self.complete(id, asked_at), self.abort(id));
                if matches!(completed, Completion::Promised) { "promised" } else { aborted }
            }
            _ => self.upload(opened, id).await,
        }
    }

    /// Opens the upload, or gets it again with fresh URLs.
    async fn open(&self) -> Option<Answer> {
        let body = self.job.opening();
        let key = self.job.with_idempotency_key.then_some(self.job.name.as_str());
        let ask = Ask {
            body: Some(&body),
            idempotency_key: key,
            repeatable: key.is_some(),
            ..Ask::new(Method::POST, "/lfs/uploads".into())
        };
        let answer = self.caller.ask(&ask, self.until).await?;
        match (answer.status, answer.id()) {
            (200 | 201, Some(id)) => {
                self.journal.opened(id, &self.job.intent());
                Some(answer)
            }
            _ => {
                self.journal.unexpected(format!("job {}: open was answered with {answer:?}", self.job.name));
                None
            }
        }
    }

    /// Puts and completes until it is promised or has failed.
    async fn upload(&self, mut opened: Answer, id: Uuid) -> &'static str {
        let asked_at = self.journal.now();
        let mut refused = false;
        for _ in 0..6 {
            if opened.text("state") == "open" {
                let put = match self.job.is_multipart() {
                    true => self.put_parts(&opened, id).await,
                    false => self.caller.put(&opened.json["upload"], &self.job.sent()).await,
                };
                refused = matches!(put, Put::Refused(_));
            }
            match self.complete(id, asked_at).await {
                Completion::Promised => return "promised",
                Completion::Failed(why) => return why,
                Completion::GivenUp => return "given up",
                // As it should be, and trying again would end the same.
                Completion::Missing if refused && !self.job.intent().is_sound => return "refused by S3",
                Completion::Missing if !self.job.with_idempotency_key && !self.job.is_multipart() => return "lost its URL",
                Completion::Missing => {}
            }
            opened = match self.job.with_idempotency_key {
                true => match self.open().await {
                    Some(again) => again,
                    None => return "given up",
                },
                false => opened,
            };
        }
        "given up"
    }

    /// Puts what is missing, with fresh URLs.
    async fn put_parts(&self, opened: &Answer, id: Uuid) -> Put {
        let sent = self.job.sent();
        let known = opened.json["parts"].as_array().cloned().unwrap_or_default();
        let signed = if known.is_empty() { self.sign_parts(id).await } else { known };
        let mut last = Put::Unknown;
        for part in &signed {
            let number = part["part_number"].as_u64().and_then(|number| usize::try_from(number).ok()).unwrap_or(0);
            let Some(bytes) = number.checked_sub(1).and_then(|index| sent.chunks(PART).nth(index)) else { continue };
            last = self.caller.put(part, bytes).await;
            if last != Put::There {
                return last;
            }
        }
        last
    }

    async fn sign_parts(&self, id: Uuid) -> Vec<Value> {
        let state = self.caller.ask(&Ask::new(Method::GET, format!("/lfs/uploads/{id}")), self.until).await;
        let missing = state.map(|state| state.json["missing_parts"].clone()).unwrap_or_default();
        let ranges = missing.as_array().into_iter().flatten();
        let numbers = ranges.flat_map(|range| range[0].as_u64().unwrap_or(1)..=range[1].as_u64().unwrap_or(0));
        let body = match self.job.work {
            Work::PartsDeferred => {
                let parts: Vec<&[u8]> = self.job.parts().collect();
                let hash = |number: u64| Sha256::of(parts[usize::try_from(number).unwrap_or(1) - 1]).to_string();
                json!({"parts": numbers.map(|n| json!({"part_number": n, "sha256": hash(n)})).collect::<Vec<_>>()})
            }
            _ => json!({"part_numbers": numbers.collect::<Vec<_>>()}),
        };
        let ask = Ask { body: Some(&body), ..Ask::new(Method::POST, format!("/lfs/uploads/{id}/parts")) };
        let signed = self.caller.ask(&ask, self.until).await;
        signed.and_then(|signed| signed.json["parts"].as_array().cloned()).unwrap_or_default()
    }

    /// Asks for completion until there is an answer that stands.
    async fn complete(&self, id: Uuid, asked_at: Duration) -> Completion {
        let body = match self.job.work {
            Work::Deferred | Work::WrongHash => json!({"sha256": Sha256::of(&self.job.bytes).to_string()}),
            _ => json!({}),
        };
        let mut hurried = u32::from(self.job.is_impatient) * 2;
        while Instant::now() < self.until {
            let mut ask = Ask { body: Some(&body), ..Ask::new(Method::POST, format!("/lfs/uploads/{id}/complete")) };
            if hurried > 0 {
                hurried -= 1;
                ask.patience = Duration::from_millis(60);
                ask.repeatable = false;
            }
            let Some(answer) = self.caller.ask(&ask, self.until).await else { continue };
            match (answer.status, answer.text("code")) {
                (200 | 202, _) if self.journal.promised(&answer.json, asked_at) => {
                    if answer.status == 202 && self.job.follows {
                        self.follow(id, asked_at).await;
                    }
                    return Completion::Promised;
                }
                (202, _) => tokio::time::sleep(Duration::from_millis(200)).await,
                (409, "object-missing" | "parts-incomplete") => return Completion::Missing,
                (410, "upload-expired") => return self.failed(id, "expired"),
                (410, "upload-aborted") => return self.failed(id, "aborted"),
                (422, "checksum-mismatch") => return self.failed(id, "rejected"),
                _ => {
                    self.journal.unexpected(format!("job {}: complete of {id} was answered with {answer:?}", self.job.name));
                    return Completion::Failed("unexpected");
                }
            }
        }
        Completion::GivenUp
    }

    fn failed(&self, id: Uuid, why: &'static str) -> Completion {
        self.journal.failed(id, why);
        Completion::Failed(why)
    }

    /// Asks where the record is, for a while.
    async fn follow(&self, id: Uuid, asked_at: Duration) {
        let until = Instant::now() + Duration::from_secs(10);
        while Instant::now() < until {
            let ask = Ask::new(Method::GET, format!("/lfs/uploads/{id}?wait=2"));
            let Some(answer) = self.caller.ask(&ask, until).await else { return };
            match answer.text("state") {
                "published" => {
                    self.journal.promised(&answer.json, asked_at);
                    return;
                }
                "verified" => {}
                _ => return self.journal.unexpected(format!("{id} was promised and is then {answer:?}")),
            }
        }
    }

    async fn abort(&self, id: Uuid) -> &'static str {
        while Instant::now() < self.until {
            let Some(answer) = self.caller.ask(&Ask::new(Method::DELETE, format!("/lfs/uploads/{id}")), self.until).await else {
                return "given up";
            };
            match (answer.status, answer.text("code")) {
                (204, _) => {
                    self.journal.failed(id, "aborted");
                    return "aborted";
                }
                (409, "completion-in-progress") => tokio::time::sleep(Duration::from_millis(200)).await,
                (409, "state-conflict") => return "came too late to abort",
                _ => {
                    self.journal.unexpected(format!("job {}: abort of {id} was answered with {answer:?}", self.job.name));
                    return "unexpected";
                }
            }
        }
        "given up"
    }

    /// Begins an upload and leaves it: 0 nothing, 1 an answer nobody waits for, 2 the bytes, 3 some parts.
    async fn some_of_it(&self, opened: &Answer, id: Uuid, stage: u8) {
        match stage {
            0 => {}
            1 => {
                let put = self.caller.put(&opened.json["upload"], &self.job.bytes);
                let _ = tokio::time::timeout(Duration::from_millis(3), put).await;
            }
            2 => drop(self.caller.put(&opened.json["upload"], &self.job.bytes).await),
            _ if self.job.is_multipart() => {
                let _ = tokio::time::timeout(Duration::from_millis(150), self.put_parts(opened, id)).await;
            }
            _ => {}
        }
    }
}
