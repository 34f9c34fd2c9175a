//! The door: routes, and nothing but routes. A handler extracts, calls one verb of the broker, and wraps the answer.

mod edge;
mod extract;
mod operate;
mod pages;
mod pointers;
mod problem;
mod topics;
mod uploads;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, header};
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::cors::CorsLayer;
use utoipa::OpenApi;
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa_axum::router::OpenApiRouter;
use utoipa_swagger_ui::{Config, SwaggerUi};

use crate::auth::{self, Auth, Caller};
use crate::broker::Broker;
use problem::Problem;

/// How patient the door is.
#[derive(Debug, Clone)]
pub struct Settings {
    /// How long a body may take to arrive: one of 64 KiB takes as much on 50 kbit/s.
    pub body_time: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self { body_time: Duration::from_secs(10) }
    }
}

/// What every handler may use.
#[derive(Clone)]
pub(crate) struct App {
    pub(crate) broker: Broker,
    pub(crate) auth: Arc<Auth>,
    /// Base of `Location`, without a slash at its end; empty for a path alone.
    pub(crate) public_url: Arc<str>,
    pub(crate) settings: Settings,
}

impl App {
    async fn caller(&self, headers: &HeaderMap) -> Result<Caller, Problem> {
        let token = headers.get(header::AUTHORIZATION).map(|value| value.to_str().unwrap_or_default());
        self.auth.caller(token).await.map_err(|error| match error {
            auth::Error::Unauthenticated => Problem::new("unauthenticated", "the request has no bearer token"),
            auth::Error::Invalid(reason) => Problem::new("invalid-token", reason),
            auth::Error::Unavailable => Problem::new("dependency-unavailable", "the keys of tokens cannot be fetched now"),
        })
    }
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
    let origins: Vec<HeaderValue> = origins.iter().filter_map(|origin| origin.parse().ok()).collect();
    let request = [
        header::AUTHORIZATION,
        header::CONTENT_TYPE,
        HeaderName::from_static("idempotency-key"),
        HeaderName::from_static("traceparent"),
    ];
    let answer = [header::LOCATION, header::RETRY_AFTER, HeaderName::from_static("x-request-id")];
    let methods = [Method::GET, Method::POST, Method::PUT, Method::DELETE];
    CorsLayer::new().allow_origin(origins).allow_methods(methods).allow_headers(request).expose_headers(answer)
}

/// The OpenAPI 3.1 document of these routes.
pub fn openapi() -> utoipa::openapi::OpenApi {
    let (_, mut document) = api().split_for_parts();
    let bearer = SecurityScheme::Http(HttpBuilder::new().scheme(HttpAuthScheme::Bearer).bearer_format("JWT").build());
    document.components.get_or_insert_default().add_security_scheme("bearer", bearer);
    document
}

/// The whole service.
///
/// Pages of `cors_origins` may call it from a browser; an origin that is not one is left out.
pub(crate) fn router(app: App, cors_origins: &[String]) -> Router {
    let (routes, _) = api().split_for_parts();
    let docs = SwaggerUi::new("/docs").config(Config::from("/openapi.json").validator_url("none"));
    routes
        .merge(docs)
        .fallback(async || Problem::new("not-found", "no such route"))
        .layer(cors(cors_origins))
        .layer(CatchPanicLayer::custom(edge::panicked))
        .layer(axum::middleware::from_fn(edge::edge))
        .with_state(app)
}
