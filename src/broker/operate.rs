//! Operations for administrators: redrive, discard, reverify, statistics, and the state of the dependencies.

use std::collections::BTreeMap;

use lfs_broker_client::api::{Dependencies, Dependency, OutboxDepth, ReadUpload, Redrive, Stats, Upload, UploadState, Validated};
use uuid::Uuid;

use super::{Broker, Error, session_error};
use crate::auth::Caller;
use crate::completion::still_verified;
use crate::kafka;
use crate::objects::{self, ObjectLocation};
use crate::restore_check::ADVICE;
use crate::session::{SessionError, State};
use crate::store;

impl Broker {
    /// Retries a waiting pointer now, and returns the upload. A published upload is not changed.
    pub(crate) async fn redrive(&self, caller: &Caller, id: Uuid, request: &Redrive) -> Result<Upload, Error> {
        loop {
            let (session, now) = self.current_session(caller, id).await?;
            match session.state {
                State::Published(..) => break,
                State::Verified(_) => {
                    let by = format!("client:{}", caller.subject);
                    if self.store.redrive(id, request.clear_partition, &by, now).await? {
                        self.notifier.pointer_queued(self.store.deployment().await?.shard_of(&session));
                        self.notifier.notify(id);
                        break;
                    }
                    // The relay changed the session first: read it again.
                }
                _ => return Err(session_error(SessionError::WrongState(session.state.name()), &session)),
            }
        }
        self.read(caller, id, &ReadUpload::default()).await
    }

    /// Discards a verified upload whose pointer Kafka refuses. The sweeper removes its object.
    pub(crate) async fn discard(&self, caller: &Caller, id: Uuid) -> Result<Upload, Error> {
        let (session, now) = self.current_session(caller, id).await?;
        let state = session.state.name();
        session.clone().discard(String::new()).map_err(|error| session_error(error, &session))?;
        let by = format!("client:{}", caller.subject);
        if !self.store.discard(id, &by, now).await? {
            let session = self.session(caller, id).await?;
            let detail =
                "the pointer is not parked: only a pointer that Kafka refused and that is not being sent can be discarded";
            let error = if session.state.name() == state {
                SessionError::Conflict(detail.to_owned())
            } else {
                SessionError::WrongState(session.state.name())
            };
            return Err(session_error(error, &session));
        }
        tracing::info!(session.id = %id, "discarded upload {id}: Kafka refuses its pointer");
        self.notifier.sweeper.notify_one();
        // Later pointers with the same key are no longer blocked.
        self.notifier.pointer_queued(self.store.deployment().await?.shard_of(&session));
        self.notifier.notify(id);
        self.read(caller, id, &ReadUpload::default()).await
    }

    /// Checks the object of a verified upload again, and compares S3's data about it with the verification.
    pub(crate) async fn reverify(&self, caller: &Caller, id: Uuid) -> Result<Validated, Error> {
        let session = self.session(caller, id).await?;
        let Some(verification) = session.state.verification() else {
            return Err(session_error(SessionError::WrongState(session.state.name()), &session));
        };
        let found = self
            .objects
            .head(&ObjectLocation::of(&session), verification.version_id.as_deref())
            .await?
            .ok_or(Error::ObjectGone)?;
        match still_verified(&self.store, &session, verification, &found).await? {
            Ok(integrity) => Ok(Validated { valid: true, size: found.size_bytes, integrity: Some(integrity) }),
            Err(error) => Err(session_error(error, &session)),
        }
    }

    /// Counts of uploads and outbox rows, and the state of the dependencies.
    pub(crate) async fn stats(&self) -> Result<Stats, Error> {
        let (depths, dependencies) = tokio::join!(self.store.stats(), self.dependencies());
        let depths = depths?;
        let now = self.store.now().await?;
        let count = |number: i64| number.unsigned_abs();
        let mut uploads: BTreeMap<String, u64> = UploadState::ALL.iter().map(|state| (state.name().to_owned(), 0)).collect();
        uploads.extend(depths.sessions.into_iter().map(|(state, number)| (state, count(number))));
        Ok(Stats {
            uploads,
            oldest_verified_seconds: depths.oldest_verified_at.map(|at| (now - at).whole_seconds().max(0).unsigned_abs()),
            outbox: OutboxDepth { waiting: count(depths.waiting), parked: count(depths.parked) },
            dependencies,
        })
    }

    /// Whether each dependency answers now and passed its last readiness checks.
    pub(crate) async fn dependencies(&self) -> Dependencies {
        let (database, storage, kafka) = tokio::join!(self.store.reachable(), self.storage(), self.kafka.reachable());
        let database = match (self.restore_check.is_kafka_ahead(), database) {
            (true, Ok(())) => Dependency { ok: false, reason: Some(ADVICE.to_owned()) },
            // This error text names no address, so the caller may see it.
            (_, Err(error @ store::Error::ReadOnly)) => Dependency { ok: false, reason: Some(error.to_string()) },
            (_, answered) => dependency("the database", answered, store::Error::is_refusal),
        };
        let kafka = dependency("Kafka", kafka, kafka::Error::is_refusal);
        Dependencies {
            database: self.readiness.database.combined_with(database),
            storage: self.readiness.storage.combined_with(storage),
            kafka: self.readiness.kafka.combined_with(kafka),
        }
    }

    /// The current state of object storage. If it fails and no bucket is configured, that is the reason.
    async fn storage(&self) -> Dependency {
        let reachable = self.objects.reachable().await;
        let has_no_bucket =
            reachable.is_err() && self.objects.default_bucket().is_none() && matches!(self.store.policy_bucket().await, Ok(None));
        match has_no_bucket {
            true => Dependency { ok: false, reason: Some(objects::NO_BUCKET.to_owned()) },
            false => dependency("object storage", reachable, objects::Error::is_refusal),
        }
    }
}

/// The state of a dependency by the result of its check. The error goes only to the log, because it may name addresses.
fn dependency<E: std::fmt::Display>(name: &str, outcome: Result<(), E>, is_refusal: fn(&E) -> bool) -> Dependency {
    match outcome {
        Ok(()) => Dependency { ok: true, reason: None },
        Err(error) => {
            let failure = if is_refusal(&error) { "refuses the broker's request" } else { "does not answer" };
            tracing::warn!(%error, "{name} {failure}: {error}");
            Dependency { ok: false, reason: Some(format!("{name} {failure}; the log has the error")) }
        }
    }
}
