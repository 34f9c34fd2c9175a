//! Readiness: checks regularly that everything an upload needs works, and keeps the last results.
//!
//! A server that answers may still fail uploads: a clock, credential, permission or bucket may be wrong. So the checks sign
//! and send a PUT, write a row and roll it back, and write to Kafka with a producer.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use lfs_broker_client::api::Dependency;
use tracing::{info, warn};

use crate::kafka::{CheckError, Kafka};
use crate::objects::{self, Objects};
use crate::store::{self, Deployment, Store};

/// The time between checks. Each check costs seven S3 requests and one Kafka producer.
pub(crate) const CHECK_INTERVAL: Duration = Duration::from_secs(30);
/// The time between checks while one fails: a failure is confirmed, and its end is noticed, within seconds.
pub(crate) const RETRY_INTERVAL: Duration = Duration::from_secs(3);
/// The delay before the first check: the broker has just used the dependencies to start.
const FIRST_CHECK_DELAY: Duration = Duration::from_secs(2);
/// After a success, this many failures in a row make a dependency not ready: a single failure may be chance.
const FAILURES_TO_CONFIRM: u32 = 2;

/// Why a check failed: the whole error for the log, and the reason that clients may see.
pub(crate) struct CheckFailure {
    pub(crate) log: String,
    pub(crate) public_reason: String,
}

impl From<store::Error> for CheckFailure {
    fn from(error: store::Error) -> Self {
        let public_reason = match &error {
            store::Error::ReadOnly => error.to_string(),
            _ => "a row could not be written; the log has the error".to_owned(),
        };
        Self { log: error.to_string(), public_reason }
    }
}

impl From<CheckError> for CheckFailure {
    fn from(error: CheckError) -> Self {
        Self { log: error.to_string(), public_reason: error.public_reason() }
    }
}

/// Why no object can be put into a bucket.
pub(crate) fn put_check_failure(bucket: &str, error: &objects::Error) -> CheckFailure {
    let public_reason = match error {
        objects::Error::Refused { code, .. } if code == "NoSuchBucket" => format!("bucket {bucket} does not exist"),
        objects::Error::Refused { code, message } if code == objects::CLOCK_SKEW => {
            // The broker builds this message: first the cause, then S3's own text.
            message.split(": ").next().unwrap_or_default().to_owned()
        }
        objects::Error::Refused { code, .. } => {
            let code: String = code.chars().filter(|c| c.is_ascii_alphanumeric() || *c == '-').take(50).collect();
            format!("a signed PUT to bucket {bucket} was refused: {code}")
        }
        _ => format!("a signed PUT to bucket {bucket} failed; the log has the error"),
    };
    CheckFailure { log: error.to_string(), public_reason }
}

/// The last results of one dependency's check.
#[derive(Default)]
struct CheckResult {
    /// Failures since the last success.
    failures: u32,
    has_succeeded: bool,
    /// The last failure: its text for the log, and the reason that clients may see.
    log: String,
    public_reason: String,
}

/// Whether one dependency passes its check.
pub(crate) struct DependencyState {
    name: &'static str,
    result: Mutex<CheckResult>,
}

impl DependencyState {
    fn new(name: &'static str) -> Self {
        Self { name, result: Mutex::default() }
    }

    /// Records the result of a check, and logs it if it has changed.
    pub(crate) fn record(&self, checked: Result<(), CheckFailure>) {
        let mut result = self.result.lock().unwrap_or_else(PoisonError::into_inner);
        match checked {
            Ok(()) => {
                if result.failures > 0 {
                    info!("{} passes its readiness check again after {} failures", self.name, result.failures);
                }
                *result = CheckResult { has_succeeded: true, ..CheckResult::default() };
            }
            Err(CheckFailure { log, public_reason }) => {
                if result.failures == 0 || result.log != log {
                    warn!("{} fails its readiness check: {log}; retrying in {} s", self.name, RETRY_INTERVAL.as_secs());
                }
                let failures = result.failures.saturating_add(1);
                *result = CheckResult { failures, log, public_reason, ..*result };
            }
        }
    }

    /// Why the dependency fails, once the failure is confirmed.
    fn confirmed_failure(&self) -> Option<String> {
        let result = self.result.lock().unwrap_or_else(PoisonError::into_inner);
        let is_confirmed = result.failures >= if result.has_succeeded { FAILURES_TO_CONFIRM } else { 1 };
        is_confirmed.then(|| result.public_reason.clone())
    }

    fn is_failing(&self) -> bool {
        self.result.lock().unwrap_or_else(PoisonError::into_inner).failures > 0
    }

    /// The dependency's state: a confirmed failure of the checks, else its current answer.
    pub(crate) fn combined_with(&self, current: Dependency) -> Dependency {
        match self.confirmed_failure() {
            Some(reason) => Dependency { ok: false, reason: Some(reason) },
            None => current,
        }
    }
}

/// The last results of all checks.
pub(crate) struct ReadinessState {
    pub(crate) database: DependencyState,
    pub(crate) storage: DependencyState,
    pub(crate) kafka: DependencyState,
    /// For each bucket named by policies that refuses a PUT, the failure that was logged last.
    buckets: Mutex<HashMap<String, String>>,
}

impl ReadinessState {
    /// Whether to log the result of a bucket's check: only if it differs from the last one.
    fn should_log(&self, bucket: &str, failure: Option<&str>) -> bool {
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        match failure {
            Some(failure) => buckets.insert(bucket.to_owned(), failure.to_owned()).as_deref() != Some(failure),
            None => buckets.remove(bucket).is_some(),
        }
    }
}

impl Default for ReadinessState {
    fn default() -> Self {
        let [database, storage, kafka] = ["the database", "object storage", "Kafka"].map(DependencyState::new);
        Self { database, storage, kafka, buckets: Mutex::default() }
    }
}

/// Runs the readiness checks.
pub(crate) struct ReadinessChecker {
    store: Store,
    objects: Objects,
    kafka: Kafka,
    deployment: Deployment,
    state: Arc<ReadinessState>,
}

impl ReadinessChecker {
    /// Runs the checks in a loop, more often while one of them fails.
    pub(crate) async fn run(self) {
        let (mut pause, mut is_first) = (FIRST_CHECK_DELAY, true);
        loop {
            // Jitter: replicas that started together must not check at the same time.
            let jittered = pause.mul_f64(0.75 + fastrand::f64() / 2.0);
            tokio::time::sleep(jittered).await;
            pause = if self.tick(is_first).await { CHECK_INTERVAL } else { RETRY_INTERVAL };
            is_first = false;
        }
    }

    pub(crate) fn new(store: Store, objects: Objects, kafka: Kafka, deployment: Deployment, state: Arc<ReadinessState>) -> Self {
        Self { store, objects, kafka, deployment, state }
    }

    /// Runs every check once, and returns whether all passed. The start has already checked the storage, so the first
    /// tick skips it unless that check failed.
    pub(crate) async fn tick(&self, is_first: bool) -> bool {
        let storage = async {
            if !is_first || self.state.storage.is_failing() {
                self.check_storage().await;
            }
        };
        let database = async { self.state.database.record(self.store.check_write().await.map_err(CheckFailure::from)) };
        let kafka = async {
            self.state.kafka.record(self.kafka.check(self.deployment.id).await.map_err(CheckFailure::from));
        };
        tokio::join!(storage, database, kafka);
        let ReadinessState { database, storage, kafka, .. } = &*self.state;
        ![database, storage, kafka].iter().any(|checked| checked.is_failing())
    }

    /// Checks the default bucket. Without one, a single working bucket of those that policies name is enough: a policy's
    /// bucket concerns only its own topics.
    async fn check_storage(&self) {
        let default = self.objects.default_bucket().map(str::to_owned);
        let named = self.store.policy_buckets().await.unwrap_or_default();
        let mut result = None;
        if let Some(bucket) = &default {
            result = Some(self.check_put(bucket).await);
        }
        for bucket in named.iter().filter(|bucket| Some(*bucket) != default.as_ref()) {
            let put = self.check_put(bucket).await;
            let should_log = self.state.should_log(bucket, put.as_ref().err().map(|failure| failure.log.as_str()));
            if let (Err(failure), true) = (&put, should_log) {
                warn!("a PUT to bucket {bucket} failed, so topics whose policy names it accept no uploads: {}", failure.log);
            }
            if default.is_none() && !matches!(result, Some(Ok(()))) {
                result = Some(put);
            }
        }
        if let Some(result) = result {
            self.state.storage.record(result);
        }
    }

    /// Sends a PUT to a bucket. A bucket may accept only objects encrypted with a KMS key of its topics, so one working key
    /// is enough.
    async fn check_put(&self, bucket: &str) -> Result<(), CheckFailure> {
        let mut put = self.objects.probe_put(bucket, None).await;
        if matches!(put, Err(objects::Error::Refused { .. })) {
            let default = self.objects.default_bucket().unwrap_or_default();
            for key in self.store.kms_keys(bucket, default).await.unwrap_or_default() {
                if self.objects.probe_put(bucket, Some(&key)).await.is_ok() {
                    put = Ok(());
                    break;
                }
            }
        }
        put.map_err(|error| put_check_failure(bucket, &error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_a_success_only_a_second_failure_in_a_row_makes_a_dependency_not_ready() {
        let answers = || Dependency { ok: true, reason: None };
        let fails = || Err(CheckFailure { log: "10.0.0.1 said no".to_owned(), public_reason: "no".to_owned() });
        let checked = DependencyState::new("it");
        assert!(checked.combined_with(answers()).ok, "nothing is known yet");
        checked.record(fails());
        assert!(!checked.combined_with(answers()).ok, "it never worked");
        checked.record(Ok(()));
        checked.record(fails());
        assert!(checked.combined_with(answers()).ok);
        checked.record(fails());
        let now = checked.combined_with(answers());
        assert_eq!((now.ok, now.reason.as_deref()), (false, Some("no")));
        checked.record(Ok(()));
        assert!(checked.combined_with(answers()).ok);
    }
}
