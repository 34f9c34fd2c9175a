//! Operators' verbs.

use uuid::Uuid;

use super::{Client, json, parse};
use crate::api::{Redrive, Stats, Upload, Validated};
use crate::error::Error;

impl Client {
    /// Tries to publish a verified upload's pointer now.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn redrive(&self, id: Uuid, request: &Redrive) -> Result<Upload, Error> {
        parse(&self.call(&self.post(&["lfs", "uploads", &id.to_string(), "redrive"], json(request)?)?).await?)
    }

    /// Gives up a verified upload whose pointer Kafka refuses.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn discard(&self, id: Uuid) -> Result<Upload, Error> {
        parse(&self.call(&self.post(&["lfs", "uploads", &id.to_string(), "discard"], None)?).await?)
    }

    /// Looks at a verified or published upload's object again.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn reverify(&self, id: Uuid) -> Result<Validated, Error> {
        parse(&self.call(&self.post(&["lfs", "uploads", &id.to_string(), "reverify"], None)?).await?)
    }

    /// Reads how things stand.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn stats(&self) -> Result<Stats, Error> {
        parse(&self.call(&self.get(&["lfs", "stats"])?).await?)
    }
}
