//! Readiness: what an upload needs is tried again and again, and the last outcome is kept for whoever asks.
//!
//! That a server answers does not say that an upload works: its clock, a credential, a right or a bucket may be wrong. So
//! a PUT is signed and sent, a row is written and rolled back, and a producer writes to Kafka.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use lfs_broker_client::api::Dependency;
use tokio::sync::watch;
use tracing::{info, warn};

use crate::kafka::{CheckError, Kafka};
use crate::objects::{self, Objects};
use crate::store::{self, Deployment, Store};

/// How often everything is tried. Each time costs S3 seven requests and Kafka one producer.
pub(crate) const EVERY: Duration = Duration::from_secs(30);
/// How soon it is tried again while something fails: a failure is confirmed, and its end is noticed, within seconds.
pub(crate) const AGAIN: Duration = Duration::from_secs(3);
/// When the dependencies are first checked: the start itself has just used them.
const FIRST_CHECK: Duration = Duration::from_secs(2);
/// So many failures in a row count, where it worked before: one may be chance.
const CONFIRMED: u32 = 2;

/// Why a check failed: whole for the log, and as much of it as anybody may see.
pub(crate) struct Failure {
    pub(crate) log: String,
    pub(crate) answer: String,
}

impl From<store::Error> for Failure {
    fn from(error: store::Error) -> Self {
        let answer = match &error {
            store::Error::ReadOnly => error.to_string(),
            _ => "a row could not be written; the log has more".to_owned(),
        };
        Self { log: error.to_string(), answer }
    }
}

impl From<CheckError> for Failure {
    fn from(error: CheckError) -> Self {
        Self { log: error.to_string(), answer: error.public_reason() }
    }
}

/// Why no object can be put into a bucket.
pub(crate) fn put_failure(bucket: &str, error: &objects::Error) -> Failure {
    let answer = match error {
        objects::Error::Refused { code, .. } if code == "NoSuchBucket" => format!("bucket {bucket} does not exist"),
        objects::Error::Refused { code, message } if code == objects::CLOCK => {
            // Ours: the cause comes first, then what S3 said.
            message.split(": ").next().unwrap_or_default().to_owned()
        }
        objects::Error::Refused { code, .. } => {
            let code: String = code.chars().filter(|c| c.is_ascii_alphanumeric() || *c == '-').take(50).collect();
            format!("a signed PUT to bucket {bucket} was refused: {code}")
        }
        _ => format!("a signed PUT to bucket {bucket} did not work; the log has more"),
    };
    Failure { log: error.to_string(), answer }
}

/// The last outcomes of a check.
#[derive(Default)]
struct Outcome {
    /// Failures since the last success.
    failures: u32,
    has_succeeded: bool,
    /// The last failure, as the log and as an answer may name it.
    log: String,
    answer: String,
}

/// The outcomes of one dependency's check.
pub(crate) struct Checked {
    name: &'static str,
    outcome: Mutex<Outcome>,
}

impl Checked {
    fn new(name: &'static str) -> Self {
        Self { name, outcome: Mutex::default() }
    }

    /// Takes an outcome, and logs what is new about it.
    pub(crate) fn record(&self, checked: Result<(), Failure>) {
        let mut outcome = self.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        match checked {
            Ok(()) => {
                if outcome.failures > 0 {
                    info!("{} passes its readiness check again, after {} failures", self.name, outcome.failures);
                }
                *outcome = Outcome { has_succeeded: true, ..Outcome::default() };
            }
            Err(Failure { log, answer }) => {
                if outcome.failures == 0 || outcome.log != log {
                    warn!("{} fails its readiness check: {log}; trying again in {} s", self.name, AGAIN.as_secs());
                }
                let failures = outcome.failures.saturating_add(1);
                *outcome = Outcome { failures, log, answer, ..*outcome };
            }
        }
    }

    /// Why it does not work, once that is sure.
    fn failing(&self) -> Option<String> {
        let outcome = self.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        let is_sure = outcome.failures >= if outcome.has_succeeded { CONFIRMED } else { 1 };
        is_sure.then(|| outcome.answer.clone())
    }

    fn is_failing(&self) -> bool {
        self.outcome.lock().unwrap_or_else(PoisonError::into_inner).failures > 0
    }

    /// What is known of a dependency, from what it answered just now and from the last checks.
    pub(crate) fn with(&self, now: Dependency) -> Dependency {
        match self.failing() {
            Some(reason) => Dependency { ok: false, reason: Some(reason) },
            None => now,
        }
    }
}

/// The outcomes of every check.
pub(crate) struct Outcomes {
    pub(crate) database: Checked,
    pub(crate) storage: Checked,
    pub(crate) kafka: Checked,
    /// Why buckets that policies name cannot be put into, as it was logged.
    buckets: Mutex<HashMap<String, String>>,
}

impl Outcomes {
    /// Whether what a bucket's check came to is to be logged: not again while it stays the same.
    fn is_news(&self, bucket: &str, failure: Option<&str>) -> bool {
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        match failure {
            Some(failure) => buckets.insert(bucket.to_owned(), failure.to_owned()).as_deref() != Some(failure),
            None => buckets.remove(bucket).is_some(),
        }
    }
}

impl Default for Outcomes {
    fn default() -> Self {
        let [database, storage, kafka] = ["the database", "object storage", "Kafka"].map(Checked::new);
        Self { database, storage, kafka, buckets: Mutex::default() }
    }
}

/// Tries what uploads need.
pub(crate) struct Checks {
    store: Store,
    objects: Objects,
    kafka: Kafka,
    deployment: Deployment,
    outcomes: Arc<Outcomes>,
}

impl Checks {
    /// Tries what uploads need, soon again while something fails, until the end is asked for.
    pub(crate) async fn run(self, mut stopped: watch::Receiver<bool>) {
        let (mut pause, mut is_first) = (FIRST_CHECK, true);
        loop {
            // Replicas that were started together must not stay in step.
            let jittered = pause.mul_f64(0.75 + fastrand::f64() / 2.0);
            tokio::select! {
                () = tokio::time::sleep(jittered) => {}
                _ = stopped.wait_for(|stopped| *stopped) => return,
            }
            pause = tokio::select! {
                is_sound = self.tick(is_first) => if is_sound { EVERY } else { AGAIN },
                _ = stopped.wait_for(|stopped| *stopped) => return,
            };
            is_first = false;
        }
    }

    pub(crate) fn new(store: Store, objects: Objects, kafka: Kafka, deployment: Deployment, outcomes: Arc<Outcomes>) -> Self {
        Self { store, objects, kafka, deployment, outcomes }
    }

    /// Tries everything once; says whether all of it works. The start has tried the storage itself, so the first round
    /// leaves it out unless that failed.
    pub(crate) async fn tick(&self, is_first: bool) -> bool {
        let storage = async {
            if !is_first || self.outcomes.storage.is_failing() {
                self.check_storage().await;
            }
        };
        let database = async { self.outcomes.database.record(self.store.check_write().await.map_err(Failure::from)) };
        let kafka = async {
            self.outcomes.kafka.record(self.kafka.check(self.deployment.id).await.map_err(Failure::from));
        };
        tokio::join!(storage, database, kafka);
        let Outcomes { database, storage, kafka, .. } = &*self.outcomes;
        ![database, storage, kafka].iter().any(|checked| checked.is_failing())
    }

    /// The default bucket decides; where there is none, the buckets that policies name, of which one that works is enough:
    /// a policy's bucket concerns its topics only.
    async fn check_storage(&self) {
        let default = self.objects.default_bucket().map(str::to_owned);
        let named = self.store.policy_buckets().await.unwrap_or_default();
        let mut outcome = None;
        if let Some(bucket) = &default {
            outcome = Some(self.try_put(bucket).await);
        }
        for bucket in named.iter().filter(|bucket| Some(*bucket) != default.as_ref()) {
            let put = self.try_put(bucket).await;
            let is_news = self.outcomes.is_news(bucket, put.as_ref().err().map(|failure| failure.log.as_str()));
            if let (Err(failure), true) = (&put, is_news) {
                warn!("topics whose policy names bucket {bucket} cannot take uploads: {}", failure.log);
            }
            if default.is_none() && !matches!(outcome, Some(Ok(()))) {
                outcome = Some(put);
            }
        }
        if let Some(outcome) = outcome {
            self.outcomes.storage.record(outcome);
        }
    }

    /// A bucket may take only what is encrypted with a key that its topics name: one of them that works is enough.
    async fn try_put(&self, bucket: &str) -> Result<(), Failure> {
        let mut put = self.objects.try_put(bucket, None).await;
        if matches!(put, Err(objects::Error::Refused { .. })) {
            let default = self.objects.default_bucket().unwrap_or_default();
            for key in self.store.kms_keys(bucket, default).await.unwrap_or_default() {
                if self.objects.try_put(bucket, Some(&key)).await.is_ok() {
                    put = Ok(());
                    break;
                }
            }
        }
        put.map_err(|error| put_failure(bucket, &error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_failure_where_it_worked_before_changes_nothing_and_a_second_does() {
        let answers = || Dependency { ok: true, reason: None };
        let fails = || Err(Failure { log: "10.0.0.1 said no".to_owned(), answer: "no".to_owned() });
        let checked = Checked::new("it");
        assert!(checked.with(answers()).ok, "nothing is known yet");
        checked.record(fails());
        assert!(!checked.with(answers()).ok, "it never worked");
        checked.record(Ok(()));
        checked.record(fails());
        assert!(checked.with(answers()).ok);
        checked.record(fails());
        let now = checked.with(answers());
        assert_eq!((now.ok, now.reason.as_deref()), (false, Some("no")));
        checked.record(Ok(()));
        assert!(checked.with(answers()).ok);
    }
}
