//! Topic policies: read, store, delete and list.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use lfs_broker_client::api::{FieldError, ListTopics, Policy, TopicPage, TopicPolicy};

use super::read::{invalid_cursor, page_limit};
use super::{Broker, Error};
use crate::kafka;
use crate::policy;
use crate::store::StoredPolicy;

/// The most topics whose policies are remembered. A broker has far fewer, unless callers ask for topics that Kafka lacks.
const MAX_REMEMBERED: usize = 1000;

/// The policies that opens read last. An open that uses one asks the database in the same statement whether it still holds, so
/// a changed policy applies at once.
#[derive(Default)]
pub(super) struct RememberedPolicies(Mutex<HashMap<String, Arc<StoredPolicy>>>);

impl RememberedPolicies {
    pub(super) fn get(&self, topic: &str) -> Option<Arc<StoredPolicy>> {
        self.policies().get(topic).cloned()
    }

    fn remember(&self, topic: &str, policy: &Arc<StoredPolicy>) {
        let mut policies = self.policies();
        if policies.len() >= MAX_REMEMBERED {
            policies.clear();
        }
        policies.insert(topic.to_owned(), Arc::clone(policy));
    }

    fn policies(&self) -> MutexGuard<'_, HashMap<String, Arc<StoredPolicy>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Broker {
    /// The policy that applies to a topic: its own, or the broker's default.
    pub(super) async fn policy_of(&self, topic: &str) -> Result<Policy, Error> {
        Ok(self.store.policy(topic).await?.unwrap_or_else(|| self.policy.default_policy()))
    }

    /// Reads the stored policy of a topic, and remembers it.
    pub(super) async fn read_policy(&self, topic: &str) -> Result<Arc<StoredPolicy>, Error> {
        let policy = Arc::new(self.store.stored_policy(topic).await?);
        self.remembered_policies.remember(topic, &policy);
        Ok(policy)
    }

    /// The values of members that a stored policy does not set.
    pub(crate) fn base_policy(&self) -> Policy {
        self.policy.base_policy()
    }

    /// A topic's stored policy.
    pub(crate) async fn topic(&self, topic: &str) -> Result<Policy, Error> {
        let missing = || Error::PolicyNotFound(topic.to_owned());
        // An impossible topic name has no policy, so the database is not queried.
        if policy::is_topic(topic) { self.store.policy(topic).await?.ok_or_else(missing) } else { Err(missing()) }
    }

    /// Replaces a topic's policy. It applies at once, on every replica.
    pub(crate) async fn put_topic(&self, topic: &str, policy: Policy) -> Result<Policy, Error> {
        let mut errors = policy::validate_policy(&policy);
        if !policy::is_topic(topic) {
            errors.push(FieldError::new("", policy::TOPIC_RULE));
        }
        if !errors.is_empty() {
            return Err(policy::PolicyViolation::Invalid(errors).into());
        }
        if kafka::is_internal(topic) {
            return Err(Error::TopicInternal(topic.to_owned()));
        }
        if let Some(bucket) = &policy.bucket {
            self.probe_bucket(bucket).await?;
        }
        let now = self.store.now().await?;
        self.store.put_policy(topic, &policy, now).await?;
        Ok(policy)
    }

    /// Probes the S3 store if that was not possible at the start, because no bucket was known, and safe URLs need it.
    async fn probe_bucket(&self, bucket: &str) -> Result<(), Error> {
        if !self.must_refuse_copy_source || self.capabilities.get().is_some() {
            return Ok(());
        }
        let found = self.objects.probe(bucket).await?;
        if !found.refuses_copy_source() {
            let detail = "the bucket's store accepts an unsigned x-amz-copy-source: uploads need a write-only signing credential";
            return Err(policy::PolicyViolation::Invalid(vec![FieldError::new("/bucket", detail)]).into());
        }
        let _ = self.capabilities.set(found);
        Ok(())
    }

    /// Deletes a topic's policy.
    pub(crate) async fn delete_topic(&self, topic: &str) -> Result<(), Error> {
        if policy::is_topic(topic) { Ok(self.store.delete_policy(topic).await?) } else { Ok(()) }
    }

    /// A page of stored policies, ordered by topic name.
    pub(crate) async fn topics(&self, query: &ListTopics) -> Result<TopicPage, Error> {
        let limit = page_limit(query.limit)?;
        let after = match &query.cursor {
            Some(cursor) => URL_SAFE_NO_PAD
                .decode(cursor)
                .ok()
                .and_then(|bytes| String::from_utf8(bytes).ok())
                .filter(|topic| policy::is_topic(topic))
                .ok_or_else(|| invalid_cursor("this is not a cursor"))?,
            None => String::new(),
        };
        let mut rows = self.store.policies(&after, i64::from(limit) + 1).await?;
        let has_more = rows.len() > limit as usize;
        rows.truncate(limit as usize);
        let next_cursor = rows.last().filter(|_| has_more).map(|(topic, _)| URL_SAFE_NO_PAD.encode(topic));
        Ok(TopicPage { items: rows.into_iter().map(|(topic, policy)| TopicPolicy { topic, policy }).collect(), next_cursor })
    }
}
