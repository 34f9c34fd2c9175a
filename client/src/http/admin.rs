//! Methods for operators.

use serde_json::{Map, Value};
use uuid::Uuid;

use super::{Client, json_body, parse_json, parse_policy};
use crate::api::{ErrorCode, Policy, Redrive, Stats, Upload, Validated};
use crate::error::Error;

impl Client {
    /// Changes the given members of a topic's policy and keeps the others. A member that is null gets its default. Returns
    /// the policy before, if one was stored, and the policy in force.
    ///
    /// This is a read and a [`Client::put_topic`], so a change that another caller makes in between is overwritten.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn update_topic(&self, topic: &str, changes: &Map<String, Value>) -> Result<(Option<Policy>, Policy), Error> {
        // JSON instead of `Policy`, because a newer broker may have members that `Policy` does not have.
        let stored = match self.call(&self.get(&["lfs", "topics", topic])?).await {
            Ok(response) => Some(parse_json::<Map<String, Value>>(&response)?),
            Err(error) if error.is_problem(ErrorCode::TopicNotFound) => None,
            Err(error) => return Err(error),
        };
        let before = stored.clone().map(|members| parse_policy(Value::Object(members))).transpose()?;
        let mut members = stored.unwrap_or_default();
        members.extend(changes.clone());
        for (name, _) in changes.iter().filter(|(_, value)| value.is_null()) {
            members.remove(name);
        }
        Ok((before, self.put_topic(topic, &members).await?))
    }

    /// Makes the broker publish a verified upload's pointer now.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn redrive(&self, id: Uuid, request: &Redrive) -> Result<Upload, Error> {
        parse_json(&self.call(&self.post(&["lfs", "uploads", &id.to_string(), "redrive"], json_body(request)?)?).await?)
    }

    /// Discards a verified upload whose pointer Kafka refuses.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn discard(&self, id: Uuid) -> Result<Upload, Error> {
        parse_json(&self.call(&self.post(&["lfs", "uploads", &id.to_string(), "discard"], None)?).await?)
    }

    /// Verifies the object of a verified or published upload again.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn reverify(&self, id: Uuid) -> Result<Validated, Error> {
        parse_json(&self.call(&self.post(&["lfs", "uploads", &id.to_string(), "reverify"], None)?).await?)
    }

    /// Reads the broker's statistics.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn stats(&self) -> Result<Stats, Error> {
        parse_json(&self.call(&self.get(&["lfs", "stats"])?).await?)
    }
}
