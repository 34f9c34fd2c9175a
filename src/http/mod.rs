//! The HTTP API. A handler extracts the request, calls one method of the broker, and wraps the result in a response.

mod admin;
pub(crate) mod allowed_hosts;
mod client_ip;
mod connection_limits;
mod descriptors;
mod error_responses;
mod extract;
mod json;
mod long_polls;
mod middleware;
mod monitored_io;
mod openapi;
mod pointers;
mod problem;
mod public_routes;
mod rate_limits;
mod serve;
mod swagger_ui;
pub mod tls;
mod topics;
mod uploads;

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::{HeaderName, Method, header, request};
use ipnet::IpNet;
use lfs_broker_client::api::{self, ErrorCode, ReadUpload, Upload};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::cors::{AllowOrigin, CorsLayer};
use tracing::info;
use utoipa::{Modify as _, OpenApi};
use utoipa_axum::router::OpenApiRouter;
use uuid::Uuid;

use crate::auth::{self, Auth, Caller};
use crate::broker::Broker;
use crate::telemetry::sanitize;
pub use allowed_hosts::AllowedHosts;
use client_ip::ClientIp;
pub(crate) use descriptors::raise_limit as raise_file_limit;
use long_polls::LongPolls;
use problem::Problem;
use rate_limits::RateLimits;
pub(crate) use serve::serve;
pub(crate) use tls::Tls;

/// The valid values of [`Settings::body_memory_bytes`]: at least one whole body, at most what the semaphore can count.
pub const BODY_MEMORY: RangeInclusive<u64> = 1 << 20..=1 << 40;

/// Timeouts and limits of the HTTP server. `docs/configuration.md` describes the settings and gives the reasons for the defaults.
#[derive(Debug, Clone)]
pub struct Settings {
    /// `LFS_BROKER_HEADER_SECONDS`.
    pub header_timeout: Duration,
    /// `LFS_BROKER_BODY_SECONDS`.
    pub body_timeout: Duration,
    /// `LFS_BROKER_REQUEST_SECONDS`.
    pub request_timeout: Duration,
    /// `LFS_BROKER_IDLE_SECONDS`.
    pub idle_timeout: Duration,
    /// How long a client may read nothing from a response.
    pub write_timeout: Duration,
    /// `LFS_BROKER_CONNECTIONS`.
    pub connections: usize,
    /// `LFS_BROKER_CONNECTIONS_PER_ADDRESS`; 0: no limit.
    pub connections_per_address: usize,
    /// `LFS_BROKER_TENANT_LONG_POLLS`; 0: no limit.
    pub tenant_long_polls: usize,
    /// `LFS_BROKER_BODY_MEMORY_BYTES`.
    pub body_memory_bytes: usize,
    /// `LFS_BROKER_SHUTDOWN_DELAY_SECONDS`.
    pub shutdown_delay: Duration,
    /// `LFS_BROKER_SHUTDOWN_GRACE_SECONDS`.
    pub shutdown_grace: Duration,
    /// The certificate; `None`: no TLS.
    pub tls: Option<tls::Settings>,
    /// `LFS_BROKER_TRUSTED_PROXIES`.
    pub trusted_proxies: Vec<IpNet>,
    /// The hosts and origins that a broker without tokens accepts; `None`: all.
    pub allowed_hosts: Option<AllowedHosts>,
    /// `LFS_BROKER_TENANT_REQUESTS_PER_SECOND`; 0: no limit.
    pub tenant_requests_per_second: u32,
    /// `LFS_BROKER_FAILED_LOGINS_PER_MINUTE`; 0: no limit.
    pub failed_logins_per_minute: u32,
}

impl Default for Settings {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Self {
            header_timeout: seconds(10),
            body_timeout: seconds(10),
            request_timeout: seconds(60),
            idle_timeout: seconds(75),
            write_timeout: seconds(30),
            connections: 4096,
            connections_per_address: 2048,
            tenant_long_polls: 1024,
            body_memory_bytes: 64 << 20,
            shutdown_delay: seconds(5),
            shutdown_grace: seconds(20),
            tls: None,
            trusted_proxies: Vec::new(),
            allowed_hosts: None,
            tenant_requests_per_second: 1000,
            failed_logins_per_minute: 600,
        }
    }
}

impl Settings {
    /// These settings with no more connections than the limit of open files allows. The limits that are shares of the
    /// connections shrink in proportion.
    pub(crate) fn limited_by_open_files(self) -> Self {
        let connections = descriptors::connections_within_limit(self.connections);
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

/// The two steps of the shutdown.
#[derive(Clone)]
pub(crate) struct Shutdown {
    /// Cancelled first: `/readyz` answers 503 from then on, and every response closes its connection.
    pub(crate) announced: CancellationToken,
    /// Cancelled when new requests are no longer accepted.
    pub(crate) stopped: CancellationToken,
}

/// The state that all handlers share.
#[derive(Clone)]
pub(crate) struct App(Arc<AppState>);

pub(crate) struct AppState {
    pub(crate) broker: Broker,
    auth: Auth,
    /// Base URL of the `Location` header, without a trailing slash. If empty, `Location` is a path.
    public_url: String,
    /// The path of `public_url`: the prefix of links in responses.
    pub(crate) base_path: String,
    settings: Settings,
    rate_limits: RateLimits,
    long_polls: LongPolls,
    /// Memory for request bodies; one permit is 1 KiB.
    body_memory: Arc<Semaphore>,
    shutdown: Shutdown,
}

impl std::ops::Deref for App {
    type Target = AppState;

    fn deref(&self) -> &AppState {
        &self.0
    }
}

impl App {
    pub(crate) fn new(broker: Broker, auth: Auth, public_url: &str, settings: Settings, shutdown: Shutdown) -> Self {
        let per_second = if auth.has_tenants() { settings.tenant_requests_per_second } else { 0 };
        let rate_limits = RateLimits::new(per_second, settings.failed_logins_per_minute);
        let public_url = public_url.trim_end_matches('/').to_owned();
        let base_path = base_path(&public_url).to_owned();
        let (long_polls, body_memory) =
            (LongPolls::new(settings.tenant_long_polls), Arc::new(Semaphore::new(settings.body_memory_bytes >> 10)));
        Self(Arc::new(AppState { broker, auth, public_url, base_path, settings, rate_limits, long_polls, body_memory, shutdown }))
    }

    /// Authenticates the caller. A valid token is always accepted, even after many invalid ones from the same address.
    async fn caller(&self, parts: &request::Parts) -> Result<Caller, Problem> {
        let token = parts.headers.get(header::AUTHORIZATION).map(|value| value.to_str().unwrap_or_default());
        self.auth.caller(token).await.map_err(|error| match error {
            auth::Error::Unauthenticated => Problem::new(ErrorCode::Unauthenticated, "the request has no bearer token"),
            auth::Error::Invalid(reason) => self.failed_login(parts, reason, reason),
            auth::Error::VerificationFailed(cause) => self.failed_login(parts, "the token is not valid here", &cause),
            auth::Error::Unavailable => Problem::new(ErrorCode::DependencyUnavailable, "the token keys cannot be fetched; retry"),
        })
    }

    /// Reads an upload. A read that waits for a change counts as a long poll. On shutdown it returns the upload as it is.
    async fn read(&self, caller: &Caller, id: Uuid, options: &ReadUpload) -> Result<Upload, Problem> {
        let waits = options.wait.unwrap_or(0) > 0;
        let permit = waits.then(|| self.long_polls.try_acquire(&caller.tenant));
        if let Some(None) = permit {
            let limit = self.long_polls.max_per_tenant;
            return Err(rate_limited(1, &format!("the tenant has {limit} waiting reads, which is the limit")));
        }
        tokio::select! {
            read = self.broker.read(caller, id, options) => Ok(read?),
            () = self.shutdown.stopped.cancelled() => Ok(self.broker.read(caller, id, &ReadUpload::default()).await?),
        }
    }

    /// Counts an invalid token. A 429 response is not logged, so that many invalid tokens do not flood the log.
    fn failed_login(&self, parts: &request::Parts, detail: &str, cause: &str) -> Problem {
        let counted = parts.extensions.get::<ClientIp>().map(|client| self.rate_limits.failed_login(client.0));
        match counted {
            Some(Err(seconds)) => rate_limited(seconds, "too many invalid tokens from this address"),
            _ => {
                info!(error = %sanitize(cause), "refused a token: {}", sanitize(cause));
                Problem::new(ErrorCode::InvalidToken, detail)
            }
        }
    }

    /// Counts the caller's request against the tenant's rate limit.
    fn check_rate_limit(&self, caller: Caller) -> Result<Caller, Problem> {
        match self.rate_limits.request(&caller.tenant) {
            Ok(()) => Ok(caller),
            Err(seconds) => {
                let limit = self.settings.tenant_requests_per_second;
                Err(rate_limited(seconds, &format!("the tenant sends more than {limit} requests per second")))
            }
        }
    }
}

/// The path of a URL, such as `/api`. Usually empty.
fn base_path(url: &str) -> &str {
    let authority_and_path = url.split_once("://").map_or(url, |(_, rest)| rest);
    authority_and_path.find('/').map_or("", |start| &authority_and_path[start..])
}

fn rate_limited(seconds: u64, detail: &str) -> Problem {
    Problem { retry_after_seconds: seconds.max(1), ..Problem::new(ErrorCode::RateLimited, detail) }
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "lfs-broker",
        description = "The claim check pattern for Kafka: clients upload files directly to S3, and the broker publishes verified pointers to Kafka.",
        contact(name = "The lfs-broker maintainers"),
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    servers((url = "/", description = "The broker that serves this document")),
    components(schemas(api::Problem)),
    security(("bearer" = [])),
    tags(
        (name = "uploads", description = "Open, upload and complete"),
        (name = "pointers", description = "From a Kafka record to the file"),
        (name = "topics", description = "The policy of each topic"),
        (name = "operations", description = "Health, documentation and administration"),
    )
)]
struct ApiDocument;

fn api() -> OpenApiRouter<App> {
    OpenApiRouter::with_openapi(ApiDocument::openapi())
        .merge(uploads::routes())
        .merge(pointers::routes())
        .merge(topics::routes())
        .merge(admin::routes())
        .merge(public_routes::routes())
}

fn cors(origins: &[String]) -> CorsLayer {
    // The API uses no cookies, so a page of any origin gets nothing without a token. Any origin may be allowed.
    let origins = match origins.iter().any(|origin| origin == "*") {
        true => AllowOrigin::any(),
        false => AllowOrigin::list(origins.iter().filter_map(|origin| origin.parse().ok())),
    };
    let request_headers = [
        header::AUTHORIZATION,
        header::CONTENT_TYPE,
        HeaderName::from_static("idempotency-key"),
        HeaderName::from_static("traceparent"),
    ];
    let response_headers = [header::LOCATION, header::RETRY_AFTER, HeaderName::from_static("x-request-id")];
    let methods = [Method::GET, Method::POST, Method::PUT, Method::DELETE];
    CorsLayer::new().allow_origin(origins).allow_methods(methods).allow_headers(request_headers).expose_headers(response_headers)
}

/// The OpenAPI 3.1 document of these routes.
pub fn openapi() -> utoipa::openapi::OpenApi {
    let (_, mut document) = api().split_for_parts();
    openapi::PostProcess.modify(&mut document);
    document
}

/// The router of the whole service.
///
/// Browsers may call it from pages of `cors_origins`. Invalid origins are ignored.
pub(crate) fn router(app: App, cors_origins: &[String]) -> Router {
    let (routes, _) = api().split_for_parts();
    let routes = routes
        .merge(swagger_ui::routes(&app.base_path))
        .fallback(async || Problem::new(ErrorCode::NotFound, "no such route; /docs lists the routes"));
    // The CORS layer answers every OPTIONS request, even for unknown routes. So add it only if it is needed.
    let routes = if cors_origins.is_empty() { routes } else { routes.layer(cors(cors_origins)) };
    routes
        .layer(CatchPanicLayer::custom(middleware::panic_response))
        .layer(axum::middleware::from_fn_with_state(app.clone(), middleware::request_context))
        .with_state(app)
}
