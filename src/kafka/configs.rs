//! What topics' configurations say, as far as Kafka tells: remembered for a while, and never worth a long wait.

use std::collections::HashMap;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rdkafka::admin::{AdminClient, AdminOptions, ResourceSpecifier};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};

use super::client::{self, Context};
use super::{Kafka, blocking, drop_aside};

/// An answer takes milliseconds. An open waits for it no longer than this, and then goes on without.
const ANSWER_WITHIN: Duration = Duration::from_millis(300);
/// As long as what Kafka's metadata says of a topic.
const KNOWN_FOR: Duration = Duration::from_secs(10);
/// How long nothing is asked of a Kafka that did not answer, and of one that does not know the question.
const SILENT_FOR: Duration = Duration::from_secs(10);
const UNSUPPORTED_FOR: Duration = Duration::from_secs(600);
/// Topic names come from requests, so what is remembered of them is bounded.
const MOST_TOPICS: usize = 10_000;

/// Which records a topic never takes. What Kafka does not tell is no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RecordLimits {
    /// It is compacted: a record needs a key.
    pub needs_key: bool,
    /// `max.message.bytes`: the largest batch, that of a single record included.
    pub max_bytes: Option<usize>,
}

/// What is remembered, and who asks.
#[derive(Default)]
pub(super) struct Configs {
    known: HashMap<String, (RecordLimits, Instant)>,
    silent_until: Option<Instant>,
    client: Option<Arc<Client>>,
}

/// Always there, except while dropping, which is done aside: librdkafka joins its threads.
struct Client(Option<AdminClient<Context>>);

impl Drop for Client {
    fn drop(&mut self) {
        if let Some(client) = self.0.take() {
            drop_aside(client);
        }
    }
}

impl Kafka {
    /// Which records a topic never takes.
    pub async fn record_limits(&self, topic: &str) -> RecordLimits {
        let remembered = {
            let configs = &mut *self.configs();
            let known = configs.known.get(topic).copied();
            let remembered = known.map(|(limits, _)| limits).unwrap_or_default();
            let is_fresh = known.is_some_and(|(_, at)| at.elapsed() < KNOWN_FOR);
            if is_fresh || configs.silent_until.is_some_and(|until| Instant::now() < until) {
                return remembered;
            }
            // One request asks; those that come meanwhile go by what is remembered.
            remember(&mut configs.known, topic, remembered);
            remembered
        };
        match self.describe(topic, ANSWER_WITHIN).await {
            Some(config) => {
                // What is compressed is smaller than it looks.
                let compresses = ["compression.type", "compression.codec"]
                    .iter()
                    .any(|key| self.settings().properties.get(*key).is_some_and(|codec| codec != "none"));
                let max_bytes = config.get("max.message.bytes").and_then(|bytes| bytes.parse().ok());
                let limits = RecordLimits {
                    needs_key: config.get("cleanup.policy").is_some_and(|policy| policy.contains("compact")),
                    max_bytes: max_bytes.filter(|_| !compresses),
                };
                remember(&mut self.configs().known, topic, limits);
                limits
            }
            None => remembered,
        }
    }

    /// A topic's `cleanup.policy`, if Kafka tells.
    pub(super) async fn cleanup_policy(&self, topic: &str) -> Option<String> {
        let is_silent = self.configs().silent_until.is_some_and(|until| Instant::now() < until);
        if is_silent {
            return None;
        }
        self.describe(topic, super::ANSWER_WITHIN).await?.remove("cleanup.policy")
    }

    /// A topic's configuration; `None` where Kafka does not tell in time, or not us.
    async fn describe(&self, topic: &str, within: Duration) -> Option<HashMap<String, String>> {
        let client = self.configs_client().await?;
        let client = client.0.as_ref()?;
        let options = AdminOptions::new().request_timeout(Some(within));
        let asked = [ResourceSpecifier::Topic(topic)];
        let answer = tokio::time::timeout(within, client.describe_configs(&asked, &options)).await;
        let silent_for = match answer {
            Ok(Ok(resources)) => {
                let config = resources.into_iter().flatten().next()?;
                let entries = config.entries.into_iter();
                return Some(entries.filter_map(|entry| Some((entry.name, entry.value?))).collect());
            }
            Ok(Err(error)) if is_unsupported(&error) => UNSUPPORTED_FOR,
            Ok(Err(_)) | Err(_) => SILENT_FOR,
        };
        self.configs().silent_until = Some(Instant::now() + silent_for);
        None
    }

    async fn configs_client(&self) -> Option<Arc<Client>> {
        if let Some(client) = &self.configs().client {
            return Some(Arc::clone(client));
        }
        let settings = self.settings().clone();
        let made = blocking(move || client::admin(&settings)).await.ok()?;
        // Another may have been quicker; then its client is used.
        Some(Arc::clone(self.configs().client.get_or_insert_with(|| Arc::new(Client(Some(made))))))
    }

    fn configs(&self) -> MutexGuard<'_, Configs> {
        // It is whole after every statement, so a panic elsewhere does not spoil it.
        self.0.configs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn remember(known: &mut HashMap<String, (RecordLimits, Instant)>, topic: &str, limits: RecordLimits) {
    if known.len() >= MOST_TOPICS {
        known.retain(|_, (_, at)| at.elapsed() < KNOWN_FOR);
    }
    if known.len() < MOST_TOPICS {
        known.insert(topic.to_owned(), (limits, Instant::now()));
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
