//! What operators ask for: try a pointer again, look at an object again, and how things stand.

use std::collections::BTreeMap;

use lfs_broker_client::api::{Dependencies, Dependency, OutboxDepth, ReadUpload, Redrive, Stats, Upload, UploadState, Validated};
use uuid::Uuid;

use super::{Broker, Error, refused};
use crate::auth::Caller;
use crate::finish::{place, still_proved};
use crate::restore_check::ADVICE;
use crate::session::{Refusal, State};
use crate::store;

impl Broker {
    /// Tries now to publish what waits, and gives the upload as it is then. What is published stays as it is.
    pub(crate) async fn redrive(&self, caller: &Caller, id: Uuid, request: &Redrive) -> Result<Upload, Error> {
        loop {
            let (session, now) = self.current(caller, id).await?;
            match session.state {
                State::Published(..) => break,
                State::Verified(_) => {
                    let by = format!("client:{}", caller.subject);
                    if self.store.redrive(id, request.clear_partition, &by, now).await? {
                        self.wakes.relay.notify_one();
                        self.wakes.changed(id);
                        break;
                    }
                    // The relay was quicker: look again.
                }
                _ => return Err(refused(Refusal::State(session.state.name()), &session)),
            }
        }
        self.read(caller, id, &ReadUpload::default()).await
    }

    /// Ends a verified upload whose pointer Kafka refuses. The sweeper removes its object.
    pub(crate) async fn discard(&self, caller: &Caller, id: Uuid) -> Result<Upload, Error> {
        let (session, now) = self.current(caller, id).await?;
        let state = session.state.name();
        session.clone().discard(String::new()).map_err(|refusal| refused(refusal, &session))?;
        let by = format!("client:{}", caller.subject);
        if !self.store.discard(id, &by, now).await? {
            let session = self.session(caller, id).await?;
            let words =
                "the pointer is not parked: only one that Kafka has refused, and that is not being sent now, is discarded";
            let refusal = if session.state.name() == state {
                Refusal::Conflict(words.to_owned())
            } else {
                Refusal::State(session.state.name())
            };
            return Err(refused(refusal, &session));
        }
        tracing::info!(session.id = %id, "discarded {id}: Kafka refuses its pointer");
        self.wakes.sweeper.notify_one();
        // What comes after it in its key is not held up any more.
        self.wakes.relay.notify_one();
        self.wakes.changed(id);
        self.read(caller, id, &ReadUpload::default()).await
    }

    /// Looks at a promised upload's object again, and holds what S3 says against what was proved.
    pub(crate) async fn reverify(&self, caller: &Caller, id: Uuid) -> Result<Validated, Error> {
        let session = self.session(caller, id).await?;
        let Some(proof) = session.state.proof() else {
            return Err(refused(Refusal::State(session.state.name()), &session));
        };
        let found = self.objects.head(&place(&session), proof.version_id.as_deref()).await?.ok_or(Error::ObjectGone)?;
        match still_proved(&self.store, &session, proof, &found).await? {
            Ok(integrity) => Ok(Validated { valid: true, size: found.size_bytes, integrity: Some(integrity) }),
            Err(refusal) => Err(refused(refusal, &session)),
        }
    }

    /// How much of everything there is, and whether what the broker stands on answers.
    pub(crate) async fn stats(&self) -> Result<Stats, Error> {
        let (depths, dependencies) = tokio::join!(self.store.depths(), self.dependencies());
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

    /// Whether what the broker stands on answers, and did what uploads need when that was last tried.
    pub(crate) async fn dependencies(&self) -> Dependencies {
        let (database, storage, kafka) = tokio::join!(self.store.reachable(), self.objects.reachable(), self.kafka.reachable());
        let database = match (self.restore_check.is_older(), database) {
            (true, Ok(())) => Dependency { ok: false, reason: Some(ADVICE.to_owned()) },
            // Its cause is known, and names no address.
            (_, Err(error @ store::Error::ReadOnly)) => Dependency { ok: false, reason: Some(error.to_string()) },
            (_, answered) => dependency("the database", answered),
        };
        Dependencies {
            database: self.outcomes.database.with(database),
            storage: self.outcomes.storage.with(dependency("object storage", storage)),
            kafka: self.outcomes.kafka.with(dependency("Kafka", kafka)),
        }
    }
}

/// What is wrong stays in the log: it may name addresses.
fn dependency<E: std::fmt::Display>(name: &str, outcome: Result<(), E>) -> Dependency {
    match outcome {
        Ok(()) => Dependency { ok: true, reason: None },
        Err(error) => {
            tracing::warn!(%error, "{name} does not answer");
            Dependency { ok: false, reason: Some("it does not answer; the log has more".to_owned()) }
        }
    }
}
