//! Topic configurations, cached for a while. No caller waits long for one.

use std::collections::HashMap;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rdkafka::admin::{AdminClient, AdminOptions, ResourceSpecifier};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};

use super::client::{self, Context};
use super::topics::{CACHE_TTL, MAX_CACHED_TOPICS};
use super::{Kafka, drop_blocking, run_blocking};

/// A response takes milliseconds. An upload that is opened waits at most this long, and then continues without the limits.
const QUERY_TIMEOUT: Duration = Duration::from_millis(300);
/// How long no configuration is queried after Kafka did not answer, or does not support the request.
const UNANSWERED_PAUSE: Duration = Duration::from_secs(10);
const UNSUPPORTED_PAUSE: Duration = Duration::from_secs(600);

/// Which records a topic never accepts. A setting that Kafka does not report is no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RecordLimits {
    /// The topic is compacted, so every record needs a key.
    pub needs_key: bool,
    /// `max.message.bytes`: the largest record batch. A batch with one record counts too.
    pub max_bytes: Option<usize>,
}

/// The cached record limits, and the client that queries them.
#[derive(Default)]
pub(super) struct ConfigCache {
    limits: HashMap<String, (RecordLimits, Instant)>,
    paused_until: Option<Instant>,
    client: Option<Arc<Client>>,
}

/// `None` only during drop. Dropping needs a thread of its own, because librdkafka joins its threads.
struct Client(Option<AdminClient<Context>>);

impl Drop for Client {
    fn drop(&mut self) {
        if let Some(client) = self.0.take() {
            drop_blocking(client);
        }
    }
}

impl Kafka {
    /// Which records a topic never accepts.
    pub async fn record_limits(&self, topic: &str) -> RecordLimits {
        let cached_limits = {
            let cache = &mut *self.config_cache();
            let cached = cache.limits.get(topic).copied();
            let cached_limits = cached.map(|(limits, _)| limits).unwrap_or_default();
            let is_fresh = cached.is_some_and(|(_, at)| at.elapsed() < CACHE_TTL);
            if is_fresh || cache.paused_until.is_some_and(|until| Instant::now() < until) {
                return cached_limits;
            }
            // Only one request queries Kafka. Caching the old limits again lets concurrent requests use them meanwhile.
            cache_limits(&mut cache.limits, topic, cached_limits);
            cached_limits
        };
        match self.describe_topic(topic, QUERY_TIMEOUT).await {
            Some(config) => {
                // With compression, the size of the record is no limit: the compressed batch is smaller.
                let compresses = ["compression.type", "compression.codec"]
                    .iter()
                    .any(|key| self.settings().properties.get(*key).is_some_and(|codec| codec != "none"));
                let max_bytes = config.get("max.message.bytes").and_then(|bytes| bytes.parse().ok());
                let limits = RecordLimits {
                    needs_key: config.get("cleanup.policy").is_some_and(|policy| policy.contains("compact")),
                    max_bytes: max_bytes.filter(|_| !compresses),
                };
                cache_limits(&mut self.config_cache().limits, topic, limits);
                limits
            }
            None => cached_limits,
        }
    }

    /// A topic's `cleanup.policy`, if Kafka reports it.
    pub(super) async fn cleanup_policy(&self, topic: &str) -> Option<String> {
        let is_paused = self.config_cache().paused_until.is_some_and(|until| Instant::now() < until);
        if is_paused {
            return None;
        }
        self.describe_topic(topic, super::REQUEST_TIMEOUT).await?.remove("cleanup.policy")
    }

    /// A topic's configuration; `None` if Kafka does not answer in time, or rejects the request.
    async fn describe_topic(&self, topic: &str, timeout: Duration) -> Option<HashMap<String, String>> {
        let client = self.admin_client().await?;
        let client = client.0.as_ref()?;
        let options = AdminOptions::new().request_timeout(Some(timeout));
        let resources = [ResourceSpecifier::Topic(topic)];
        let answer = tokio::time::timeout(timeout, client.describe_configs(&resources, &options)).await;
        let pause = match answer {
            Ok(Ok(resources)) => {
                let config = resources.into_iter().flatten().next()?;
                let entries = config.entries.into_iter();
                return Some(entries.filter_map(|entry| Some((entry.name, entry.value?))).collect());
            }
            Ok(Err(error)) if is_unsupported(&error) => UNSUPPORTED_PAUSE,
            Ok(Err(_)) | Err(_) => UNANSWERED_PAUSE,
        };
        self.config_cache().paused_until = Some(Instant::now() + pause);
        None
    }

    async fn admin_client(&self) -> Option<Arc<Client>> {
        if let Some(client) = &self.config_cache().client {
            return Some(Arc::clone(client));
        }
        let settings = self.settings().clone();
        let created = run_blocking(move || client::admin(&settings)).await.ok()?;
        // A concurrent request may have created a client first. Then that client is used.
        Some(Arc::clone(self.config_cache().client.get_or_insert_with(|| Arc::new(Client(Some(created))))))
    }

    fn config_cache(&self) -> MutexGuard<'_, ConfigCache> {
        // Each statement leaves the value complete, so it is still valid after a panic elsewhere.
        self.0.config_cache.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn cache_limits(cache: &mut HashMap<String, (RecordLimits, Instant)>, topic: &str, limits: RecordLimits) {
    if cache.len() >= MAX_CACHED_TOPICS {
        cache.retain(|_, (_, at)| at.elapsed() < CACHE_TTL);
    }
    if cache.len() < MAX_CACHED_TOPICS {
        cache.insert(topic.to_owned(), (limits, Instant::now()));
    }
}

fn is_unsupported(error: &KafkaError) -> bool {
    use RDKafkaErrorCode as Code;
    let code = match error {
        KafkaError::AdminOp(code) => Some(*code),
        error => error.rdkafka_error_code(),
    };
    matches!(code, Some(Code::UnsupportedFeature | Code::UnsupportedVersion))
}
