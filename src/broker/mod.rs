//! The broker: what it does when it is asked. One verb a route, each whole.
//!
//! It meets the verifier, the relay and the sweeper in the store only, and wakes them to save time.

mod complete;
mod open;
mod operate;
mod read;
mod resolve;
mod topics;

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use lfs_broker_client::api::{FieldError, UploadState};
use time::OffsetDateTime;
use tokio::sync::Semaphore;
use uuid::Uuid;

pub(crate) use open::OpenContext;
pub(crate) use read::MAX_WAIT_SECONDS;

use crate::auth::Caller;
use crate::finish::{self, Finisher};
use crate::kafka::{self, Kafka};
use crate::objects::{self, Capabilities, Objects};
use crate::policy;
use crate::readiness::Outcomes;
use crate::restore_check::RestoreCheck;
use crate::session::{self, Session};
use crate::store::{self, Deployment, Quota, Store, Turns};
use crate::wakes::Wakes;

/// How patient the broker is, and how generous.
#[derive(Debug, Clone)]
pub struct Settings {
    /// `LFS_BROKER_COMPLETE_WAIT_SECONDS`: how long complete waits for Kafka before it answers 202.
    pub complete_wait: Duration,
    /// What a tenant may hold at once.
    pub quota: Quota,
    /// `LFS_BROKER_CONCURRENT_COMPLETES`: how many uploads one replica completes at once; each asks S3 a few times.
    pub completes: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Self { complete_wait: Duration::from_secs(5), quota: Quota::default(), completes: 256 }
    }
}

/// Why a verb was not done.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("{refusal}")]
    Session { refusal: session::Refusal, state: UploadState, items: Vec<FieldError> },
    #[error("{0}")]
    Policy(#[from] policy::Refusal),
    #[error("no such upload")]
    NotFound,
    #[error("Kafka has no topic {0}")]
    TopicNotFound(String),
    #[error("topic {0} has no policy")]
    PolicyNotFound(String),
    #[error("the token does not allow topic {0}")]
    TopicForbidden(String),
    #[error("topic {0} is Kafka's or the broker's own: it takes no uploads")]
    TopicInternal(String),
    #[error("the record would have {bytes} bytes or more, topic {topic} takes {max} (max.message.bytes)")]
    RecordTooLarge { topic: String, bytes: usize, max: usize },
    #[error("an Idempotency-Key has 1 to 255 visible ASCII characters and comes once")]
    KeyInvalid,
    #[error("this Idempotency-Key opened another upload")]
    KeyReused,
    #[error("a request with this Idempotency-Key is being stored")]
    KeyInFlight,
    #[error("the tenant has as many open uploads as it may")]
    TooManySessions,
    #[error("the tenant has as many bytes reserved as it may")]
    TooManyBytes,
    #[error("{0}")]
    PointerInvalid(String),
    #[error("{0}")]
    PointerForbidden(&'static str),
    #[error("the object is gone")]
    ObjectGone,
    #[error("the pointer says {promised} bytes, S3 holds {found}")]
    PointerSize { promised: u64, found: u64 },
    #[error("the pointer says {promised}, the object was proved to have {found}")]
    PointerChecksum { promised: String, found: String },
    #[error("this replica completes as many uploads as it may; ask again")]
    Full,
    #[error("the completion's outcome is not known yet; asking again resolves it")]
    Unknown,
    #[error("{0}")]
    Store(#[from] store::Error),
    #[error("{0}")]
    Objects(#[from] objects::Error),
    #[error("{0}")]
    Kafka(#[from] kafka::Error),
}

/// The verbs; cheap to clone.
#[derive(Clone)]
pub(crate) struct Broker {
    parts: Arc<Parts>,
    /// One for each upload that is being completed.
    seats: Arc<Semaphore>,
    /// Half of them at most for one tenant.
    completing: Arc<Turns>,
}

pub(crate) struct Parts {
    pub(crate) store: Store,
    pub(crate) objects: Objects,
    pub(crate) kafka: Kafka,
    pub(crate) wakes: Arc<Wakes>,
    pub(crate) finisher: Finisher,
    pub(crate) restore_check: RestoreCheck,
    pub(crate) deployment: Deployment,
    pub(crate) policy: policy::Settings,
    pub(crate) settings: Settings,
    /// What the store was seen to do, once that is known.
    pub(crate) capabilities: Arc<OnceLock<Capabilities>>,
    /// What the last checks of the dependencies came to.
    pub(crate) outcomes: Arc<Outcomes>,
    /// Whether no URL may be signed on a store that accepts an unsigned copy-source.
    pub(crate) must_refuse_copy_source: bool,
}

impl std::ops::Deref for Broker {
    type Target = Parts;

    fn deref(&self) -> &Parts {
        &self.parts
    }
}

impl Broker {
    pub(crate) fn new(parts: Parts) -> Self {
        let completes = parts.settings.completes;
        let share = u32::try_from(completes.div_ceil(2)).unwrap_or(u32::MAX);
        let (seats, completing) = (Arc::new(Semaphore::new(completes)), Arc::new(Turns::new(share)));
        Self { seats, completing, parts: Arc::new(parts) }
    }

    /// The caller's session. Another tenant's does not exist, nor one of a topic that the token does not name.
    async fn session(&self, caller: &Caller, id: Uuid) -> Result<Session, Error> {
        let session = self.store.session(id).await?.ok_or(Error::NotFound)?;
        let own = session.tenant == caller.tenant && caller.may_use(&session.promise.topic);
        if own || caller.is_admin() { Ok(session) } else { Err(Error::NotFound) }
    }

    /// The same, ended first if its time is over: nobody is shown an open session that is not.
    async fn current(&self, caller: &Caller, id: Uuid) -> Result<(Session, OffsetDateTime), Error> {
        let session = self.session(caller, id).await?;
        let now = self.store.now().await?;
        self.ended(session, now).await.map(|session| (session, now))
    }

    async fn ended(&self, session: Session, now: OffsetDateTime) -> Result<Session, Error> {
        if !session.is_overdue(now) {
            return Ok(session);
        }
        let id = session.id;
        if finish::expire(&self.store, session, now, self.deployment.shards).await? {
            self.wakes.sweeper.notify_one();
            self.wakes.changed(id);
        }
        self.store.session(id).await?.ok_or(Error::NotFound)
    }
}

/// A refusal together with the state it was met in.
fn refused(refusal: session::Refusal, session: &Session) -> Error {
    let items = refusal.trouble().items;
    Error::Session { refusal, state: session.state.name(), items }
}
