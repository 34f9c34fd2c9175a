//! The broker: the operations behind the HTTP routes, one method for each route.
//!
//! It shares data with the verifier, the relay and the sweeper only through the store, and notifies them to save time.

mod complete;
mod open;
mod operate;
mod read;
mod resolve;
mod topics;
mod view;

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use lfs_broker_client::api::UploadState;
use time::OffsetDateTime;
use tokio::sync::Semaphore;
use uuid::Uuid;

pub(crate) use open::{IdempotencyKey, OpenContext};
pub(crate) use read::MAX_WAIT_SECONDS;

use crate::auth::Caller;
use crate::completion::CompletionWorker;
use crate::kafka::{self, Kafka};
use crate::notify::ChangeNotifier;
use crate::objects::{self, Capabilities, Objects};
use crate::policy;
use crate::readiness::ReadinessState;
use crate::restore_check::RestoreCheck;
use crate::session::{Failure, Session, SessionError};
use crate::store::{self, Quota, Store, TenantLimiter};

/// How long the broker waits, and which quotas it applies.
#[derive(Debug, Clone)]
pub struct Settings {
    /// `LFS_BROKER_COMPLETE_WAIT_SECONDS`: how long complete waits for Kafka before it answers 202.
    pub complete_wait: Duration,
    /// The open sessions and reserved bytes that one tenant may have.
    pub quota: Quota,
    /// `LFS_BROKER_CONCURRENT_COMPLETES`: how many uploads one replica completes at once. Each needs a few S3 requests.
    pub max_concurrent_completes: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Self { complete_wait: Duration::from_secs(5), quota: Quota::default(), max_concurrent_completes: 256 }
    }
}

/// Why an operation failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("{}", failure.detail)]
    Session { failure: Failure, state: UploadState },
    #[error("{0}")]
    Policy(#[from] policy::PolicyViolation),
    #[error("no such upload")]
    NotFound,
    #[error("Kafka has no topic {0}")]
    TopicNotFound(String),
    #[error("topic {0} has no policy")]
    PolicyNotFound(String),
    #[error("the token does not allow topic {0}")]
    TopicForbidden(String),
    #[error("topic {0} is internal to Kafka or the broker: it accepts no uploads")]
    TopicInternal(String),
    #[error("the record would have at least {size_bytes} bytes, topic {topic} allows {max_bytes} (max.message.bytes)")]
    RecordTooLarge { topic: String, size_bytes: usize, max_bytes: usize },
    #[error("send the header Idempotency-Key once, with 1 to 255 visible ASCII characters")]
    IdempotencyKeyInvalid,
    #[error("this Idempotency-Key was used for another request: use a new key")]
    IdempotencyKeyReused,
    #[error("another request with this Idempotency-Key is in progress; retry")]
    IdempotencyKeyInFlight,
    #[error("the tenant has reached its limit of {0} open uploads; retry when some have ended")]
    TooManySessions(i64),
    #[error(
        "an upload of {size_bytes} bytes exceeds the tenant's limit of {max_bytes} reserved bytes; retry when others have ended"
    )]
    TooManyBytes { size_bytes: u64, max_bytes: i64 },
    #[error("{0}")]
    PointerInvalid(String),
    #[error("{0}")]
    PointerForbidden(&'static str),
    #[error("object storage does not have the object")]
    ObjectGone,
    #[error("the pointer declares {declared} bytes, the object has {found}")]
    PointerSize { declared: u64, found: u64 },
    #[error("the pointer declares {declared}, the object was verified with {found}")]
    PointerChecksum { declared: String, found: String },
    #[error("this replica has reached its limit of {0} concurrent completions, or half of it for this tenant; retry")]
    TooManyCompletions(usize),
    #[error("the completion's outcome is not known yet; retry to get it")]
    OutcomeUnknown,
    #[error("{0}")]
    Store(#[from] store::Error),
    #[error("{0}")]
    Objects(#[from] objects::Error),
    #[error("{0}")]
    Kafka(#[from] kafka::Error),
}

/// The operations; cheap to clone.
#[derive(Clone)]
pub(crate) struct Broker {
    deps: Arc<BrokerDeps>,
    /// One permit for each upload that is being completed.
    completion_permits: Arc<Semaphore>,
    /// Gives one tenant at most half of the permits.
    tenant_permits: Arc<TenantLimiter>,
    remembered_policies: Arc<topics::RememberedPolicies>,
}

/// The components and settings that the operations use.
pub(crate) struct BrokerDeps {
    pub(crate) store: Store,
    pub(crate) objects: Objects,
    pub(crate) kafka: Kafka,
    pub(crate) notifier: Arc<ChangeNotifier>,
    pub(crate) completion_worker: CompletionWorker,
    pub(crate) restore_check: RestoreCheck,
    pub(crate) policy: policy::Settings,
    pub(crate) settings: Settings,
    /// The capabilities of the S3 store, once a probe has found them.
    pub(crate) capabilities: Arc<OnceLock<Capabilities>>,
    /// The last results of the readiness checks.
    pub(crate) readiness: Arc<ReadinessState>,
    /// Whether URLs are refused on a store that accepts an unsigned copy-source.
    pub(crate) must_refuse_copy_source: bool,
}

impl std::ops::Deref for Broker {
    type Target = BrokerDeps;

    fn deref(&self) -> &BrokerDeps {
        &self.deps
    }
}

impl Broker {
    pub(crate) fn new(deps: BrokerDeps) -> Self {
        let completes = deps.settings.max_concurrent_completes;
        let tenant_share = u32::try_from(completes.div_ceil(2)).unwrap_or(u32::MAX);
        let completion_permits = Arc::new(Semaphore::new(completes));
        Self {
            completion_permits,
            tenant_permits: Arc::new(TenantLimiter::new(tenant_share)),
            remembered_policies: Arc::default(),
            deps: Arc::new(deps),
        }
    }

    /// The caller's session. Sessions of other tenants, and of topics that the token does not name, are not found.
    async fn session(&self, caller: &Caller, id: Uuid) -> Result<Session, Error> {
        let session = self.store.session(id).await?.ok_or(Error::NotFound)?;
        let own = session.tenant == caller.tenant && caller.may_use(&session.spec.topic);
        if own || caller.is_admin() { Ok(session) } else { Err(Error::NotFound) }
    }

    /// The caller's session, expired first if it is overdue: no response shows an overdue session as open.
    async fn current_session(&self, caller: &Caller, id: Uuid) -> Result<(Session, OffsetDateTime), Error> {
        let session = self.session(caller, id).await?;
        let now = self.store.now().await?;
        self.expire_if_overdue(session, now).await.map(|session| (session, now))
    }

    async fn expire_if_overdue(&self, session: Session, now: OffsetDateTime) -> Result<Session, Error> {
        if !session.is_overdue(now) {
            return Ok(session);
        }
        let id = session.id;
        if self.store.expire(session, now).await? {
            self.notifier.sweeper.notify_one();
            self.notifier.notify(id);
        }
        self.store.session(id).await?.ok_or(Error::NotFound)
    }
}

/// A session error together with the session's state.
fn session_error(error: SessionError, session: &Session) -> Error {
    Error::Session { failure: error.failure(), state: session.state.name() }
}
