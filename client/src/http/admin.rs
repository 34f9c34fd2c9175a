//! Methods for operators.

use uuid::Uuid;

use super::{Client, json_body, parse_json};
use crate::api::{Redrive, Stats, Upload, Validated};
use crate::error::Error;

impl Client {
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
