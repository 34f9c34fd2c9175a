//! The door: routes, and nothing but routes. A handler extracts, calls one verb of the broker, and wraps the answer.

mod address;
mod descriptors;
mod docs;
mod document;
mod edge;
mod extract;
pub(crate) mod local;
mod operate;
mod pages;
mod pointers;
mod polls;
mod problem;
mod rates;
mod seats;
mod serve;
pub mod tls;
mod topics;
mod uploads;
mod wire;

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::http::{HeaderName, Method, header, request};
use ipnet::IpNet;
use lfs_broker_client::api::ErrorCode;
use lfs_broker_client::api::{ReadUpload, Upload};
use tokio::sync::{Semaphore, watch};
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::cors::{AllowOrigin, CorsLayer};
use tracing::info;
use utoipa::{Modify as _, OpenApi};
use utoipa_axum::router::OpenApiRouter;
use uuid::Uuid;

use crate::auth::{self, Auth, Caller};
use crate::broker::Broker;
use crate::telemetry::foreign;
use address::ClientAddress;
pub(crate) use descriptors::raise as raise_descriptors;
pub use local::Local;
use polls::Polls;
use problem::Problem;
use rates::Rates;
pub(crate) use serve::serve;
pub(crate) use tls::Tls;

/// What [`Settings::body_memory_bytes`] may be: at least one whole body, at most what permits can count.
pub const BODY_MEMORY: RangeInclusive<usize> = 1 << 20..=1 << 40;

/// How patient the door is, and for how many.
#[derive(Debug, Clone)]
pub struct Settings {
    /// `LFS_BROKER_HEADER_SECONDS`: how long a request's head may take to arrive, and a TLS handshake.
    pub header_time: Duration,
    /// `LFS_BROKER_BODY_SECONDS`: how long a body may take to arrive: one of 64 KiB takes as much on 50 kbit/s.
    pub body_time: Duration,
    /// `LFS_BROKER_REQUEST_SECONDS`: how long a request may take in all: more than the longest wait, which is 30 s.
    pub request_time: Duration,
    /// `LFS_BROKER_IDLE_SECONDS`: how long a connection may wait for its next request: longer than proxies keep theirs
    /// (60 s is common), or they send a request into a connection that is being closed.
    pub idle_time: Duration,
    /// How long a client may take nothing of its answer.
    pub write_time: Duration,
    /// `LFS_BROKER_CONNECTIONS`: how many are served at once. A request on one more waits 1 s, then 503; health checks do not.
    pub connections: usize,
    /// `LFS_BROKER_CONNECTIONS_PER_ADDRESS`: how many of them one address may hold, trusted proxies aside; 0: no limit. Half of
    /// all: an office behind one address has room, and nobody takes everything.
    pub connections_per_address: usize,
    /// `LFS_BROKER_TENANT_LONG_POLLS`: how many reads of a tenant may wait at once (`?wait=`); 0: no limit. A quarter of all
    /// connections, for each holds one for up to 30 s.
    pub tenant_long_polls: usize,
    /// `LFS_BROKER_BODY_MEMORY_BYTES`: what all request bodies together may hold beyond the first 8 KiB of each: 64 with 1 MiB of
    /// part hashes at once.
    pub body_memory_bytes: usize,
    /// `LFS_BROKER_SHUTDOWN_DELAY_SECONDS`: how long everything is still served once the end was asked for, while `/readyz` says
    /// that it is near: load balancers look every few seconds.
    pub shutdown_delay: Duration,
    /// `LFS_BROKER_SHUTDOWN_GRACE_SECONDS`: how long what is under way may take to end after that. With the delay it stays
    /// below the 30 s after which Kubernetes kills.
    pub shutdown_grace: Duration,
    /// The certificate; none: no TLS.
    pub tls: Option<tls::Settings>,
    /// `LFS_BROKER_TRUSTED_PROXIES`: whose `X-Forwarded-For` is believed.
    pub trusted_proxies: Vec<IpNet>,
    /// Whether a broker without tokens answers only under names of this machine; none: under any.
    pub local: Option<Local>,
    /// `LFS_BROKER_TENANT_REQUESTS_PER_SECOND`: 0: no limit. Without tokens there is none.
    pub tenant_requests_per_second: u32,
    /// `LFS_BROKER_FAILED_LOGINS_PER_MINUTE`: tokens that are not valid, by the client's address; 0: no limit.
    pub failed_logins_per_minute: u32,
}

impl Default for Settings {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Self {
            header_time: seconds(10),
            body_time: seconds(10),
            request_time: seconds(60),
            idle_time: seconds(75),
            write_time: seconds(30),
            connections: 4096,
            connections_per_address: 2048,
            tenant_long_polls: 1024,
            body_memory_bytes: 64 << 20,
            shutdown_delay: seconds(5),
            shutdown_grace: seconds(20),
            tls: None,
            trusted_proxies: Vec::new(),
            local: None,
            tenant_requests_per_second: 1000,
            failed_logins_per_minute: 600,
        }
    }
}

impl Settings {
    /// The same with as many connections as the limit of open files has room for, and its shares of them.
    pub(crate) fn fitted(self) -> Self {
        let connections = descriptors::room(self.connections);
        if connections == self.connections {
            return self;
        }
        let share = |part: usize| if part == 0 { 0 } else { (part * connections / self.connections).max(1) };
        Self {
            connections_per_address: share(self.connections_per_address),
            tenant_long_polls: share(self.tenant_long_polls),
            connections,
            ..self
        }
    }
}

/// Whether the broker is about to end.
#[derive(Clone)]
pub(crate) struct Ending {
    near: Arc<AtomicBool>,
    /// True once no new request is taken.
    pub(crate) stopped: watch::Receiver<bool>,
}

impl Ending {
    pub(crate) fn new(stopped: watch::Receiver<bool>) -> Self {
        Self { near: Arc::default(), stopped }
    }

    /// From now on the broker says that it is not ready, and every answer ends its connection.
    pub(crate) fn announce(&self) {
        self.near.store(true, Ordering::Relaxed);
    }

    fn is_near(&self) -> bool {
        self.near.load(Ordering::Relaxed)
    }
}

/// What every handler may use.
#[derive(Clone)]
pub(crate) struct App(Arc<Parts>);

pub(crate) struct Parts {
    pub(crate) broker: Broker,
    auth: Auth,
    /// Base of `Location`, without a slash at its end; empty for a path alone.
    public_url: String,
    /// Its path: base of what is linked to in answers.
    pub(crate) base_path: String,
    settings: Settings,
    rates: Rates,
    polls: Polls,
    /// What request bodies may hold together, in KiB.
    bodies: Arc<Semaphore>,
    ending: Ending,
}

impl std::ops::Deref for App {
    type Target = Parts;

    fn deref(&self) -> &Parts {
        &self.0
    }
}

impl App {
    pub(crate) fn new(broker: Broker, auth: Auth, public_url: &str, settings: Settings, ending: Ending) -> Self {
        let per_second = if auth.tells_tenants_apart() { settings.tenant_requests_per_second } else { 0 };
        let rates = Rates::new(per_second, settings.failed_logins_per_minute);
        let public_url = public_url.trim_end_matches('/').to_owned();
        let base_path = base_path(&public_url).to_owned();
        let (polls, bodies) =
            (Polls::new(settings.tenant_long_polls), Arc::new(Semaphore::new(settings.body_memory_bytes >> 10)));
        Self(Arc::new(Parts { broker, auth, public_url, base_path, settings, rates, polls, bodies, ending }))
    }

    /// Who asks. Whoever comes with a valid token is let in, however many others failed at the same address.
    async fn caller(&self, parts: &request::Parts) -> Result<Caller, Problem> {
        let token = parts.headers.get(header::AUTHORIZATION).map(|value| value.to_str().unwrap_or_default());
        self.auth.caller(token).await.map_err(|error| match error {
            auth::Error::Unauthenticated => Problem::new(ErrorCode::Unauthenticated, "the request has no bearer token"),
            auth::Error::Invalid(reason) => self.failed_login(parts, reason, reason),
            auth::Error::Refused(cause) => self.failed_login(parts, "the token is not valid here", &cause),
            auth::Error::Unavailable => {
                Problem::new(ErrorCode::DependencyUnavailable, "the keys of tokens cannot be fetched now")
            }
        })
    }

    /// Reads an upload. One that waits for a change is counted, and answered as it stands when the broker ends.
    async fn read(&self, caller: &Caller, id: Uuid, options: &ReadUpload) -> Result<Upload, Problem> {
        let mut stopped = self.ending.stopped.clone();
        let ends = async { drop(stopped.wait_for(|stopped| *stopped).await) };
        let waits = options.wait.unwrap_or(0) > 0;
        let poll = waits.then(|| self.polls.begin(&caller.tenant));
        if let Some(None) = poll {
            let most = self.polls.most;
            return Err(limited(1, &format!("the tenant has {most} reads that wait for a change, as many as it may")));
        }
        tokio::select! {
            read = self.broker.read(caller, id, options) => Ok(read?),
            () = ends => Ok(self.broker.read(caller, id, &ReadUpload::default()).await?),
        }
    }

    /// Counts a token that is not valid. What is answered 429 is not logged: a flood of tokens must not flood the log.
    fn failed_login(&self, parts: &request::Parts, told: &str, cause: &str) -> Problem {
        let counted = parts.extensions.get::<ClientAddress>().map(|client| self.rates.failed_login(client.0));
        match counted {
            Some(Err(seconds)) => limited(seconds, "too many tokens that are not valid come from this address"),
            _ => {
                info!(error = %foreign(cause), "refused a token");
                Problem::new(ErrorCode::InvalidToken, told)
            }
        }
    }

    /// Counts what the caller asks.
    fn admit(&self, caller: Caller) -> Result<Caller, Problem> {
        match self.rates.request(&caller.tenant) {
            Ok(()) => Ok(caller),
            Err(seconds) => Err(limited(seconds, "the tenant sends more requests than it may")),
        }
    }
}

/// The path of a URL without a slash at its end, such as `/api`; mostly empty.
fn base_path(url: &str) -> &str {
    let place = url.split_once("://").map_or(url, |(_, place)| place);
    place.find('/').map_or("", |path| &place[path..])
}

fn limited(seconds: u64, detail: &str) -> Problem {
    Problem { retry_after_seconds: seconds.max(1), ..Problem::new(ErrorCode::RateLimited, detail) }
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "lfs-broker",
        description = "The claim check for Kafka: bytes go straight into S3, verified pointers into Kafka.",
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    security(("bearer" = [])),
    tags(
        (name = "uploads", description = "Open, put, complete"),
        (name = "pointers", description = "From the record in Kafka back to the bytes"),
        (name = "topics", description = "What is allowed on a topic"),
        (name = "operations", description = "Health and help"),
    )
)]
struct Document;

fn api() -> OpenApiRouter<App> {
    OpenApiRouter::with_openapi(Document::openapi())
        .merge(uploads::routes())
        .merge(pointers::routes())
        .merge(topics::routes())
        .merge(operate::routes())
        .merge(pages::routes())
}

fn cors(origins: &[String]) -> CorsLayer {
    // No cookie is involved, and no answer is for whoever has no token: any origin may be let in.
    let origins = match origins.iter().any(|origin| origin == "*") {
        true => AllowOrigin::any(),
        false => AllowOrigin::list(origins.iter().filter_map(|origin| origin.parse().ok())),
    };
    let asked = [
        header::AUTHORIZATION,
        header::CONTENT_TYPE,
        HeaderName::from_static("idempotency-key"),
        HeaderName::from_static("traceparent"),
    ];
    let answer = [header::LOCATION, header::RETRY_AFTER, HeaderName::from_static("x-request-id")];
    let methods = [Method::GET, Method::POST, Method::PUT, Method::DELETE];
    CorsLayer::new().allow_origin(origins).allow_methods(methods).allow_headers(asked).expose_headers(answer)
}

/// The OpenAPI 3.1 document of these routes.
pub fn openapi() -> utoipa::openapi::OpenApi {
    let (_, mut document) = api().split_for_parts();
    document::Finish.modify(&mut document);
    document
}

/// The whole service.
///
/// Pages of `cors_origins` may call it from a browser; an origin that is not one is left out.
pub(crate) fn router(app: App, cors_origins: &[String]) -> Router {
    let (routes, _) = api().split_for_parts();
    let routes = routes.merge(docs::routes(&app.base_path)).fallback(async || Problem::new(ErrorCode::NotFound, "no such route"));
    // The layer answers every OPTIONS, whether there is such a route or not.
    let routes = if cors_origins.is_empty() { routes } else { routes.layer(cors(cors_origins)) };
    routes
        .layer(CatchPanicLayer::custom(edge::panicked))
        .layer(axum::middleware::from_fn_with_state(app.clone(), edge::edge))
        .with_state(app)
}
