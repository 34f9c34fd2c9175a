//! Routes that need no token: health checks, the OpenAPI document, and the pages that explain error codes.

use std::sync::LazyLock;

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{Html, IntoResponse, Response};
use lfs_broker_client::api::{Dependencies, Dependency, ErrorCode};
use serde::Serialize;
use utoipa::ToSchema;
use utoipa::openapi::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::App;
use super::extract::SizeChecked;
use super::openapi::Contract;
use super::problem::{Problem, code_info};
use crate::objects::Capabilities;

/// The routes of this file.
pub(super) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(healthz))
        .routes(routes!(readyz))
        .routes(routes!(contract))
        .routes(routes!(explain_problem))
}

/// The `Content-Security-Policy` of a response: only what the page needs, and nothing from other hosts.
pub(super) fn content_policy(path: &str) -> &'static str {
    match path.split('/').nth(1) {
        Some("docs") => {
            "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; connect-src 'self'; \
             base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        }
        Some("problems") => {
            "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        }
        _ => "default-src 'none'; frame-ancestors 'none'",
    }
}

/// The liveness of the process.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({"status": "ok"}))]
struct Health {
    /// `ok`.
    status: &'static str,
}

/// Whether the broker can open and complete uploads.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({"status": "degraded", "database": {"ok": true}, "storage": {"ok": true},
    "kafka": {"ok": false, "reason": "it does not answer; the log has more"}}))]
pub(super) struct Readiness {
    /// `ok`, `degraded` (uploads are accepted, but pointers wait for Kafka), `unavailable` or `shutting-down`.
    status: &'static str,
    /// PostgreSQL.
    database: Dependency,
    /// S3.
    storage: Dependency,
    /// Kafka. While it is down, complete answers 202, and pointers wait in the outbox.
    kafka: Dependency,
    /// The capabilities of the S3 store, as probed with the default bucket at the start. Absent until they are known.
    #[serde(skip_serializing_if = "Option::is_none")]
    capabilities: Option<Capabilities>,
}

/// Liveness
///
/// 200 while the process serves requests.
#[utoipa::path(get, path = "/healthz", operation_id = "getHealth", tag = "operations", security(()), responses((status = 200, description = "Alive", body = Health)))]
async fn healthz(_: SizeChecked) -> Json<Health> {
    Json(Health { status: "ok" })
}

/// Readiness
///
/// 200 while uploads can be opened and completed, else 503. Gives the reason for each dependency that fails.
#[utoipa::path(
    get, path = "/readyz", operation_id = "getReadiness", tag = "operations", security(()),
    responses(
        (status = 200, description = "Ready", body = Readiness),
        (status = 503, description = "Not ready", body = Readiness,
            headers(("Retry-After" = u64, description = "Seconds to wait before the retry."))),
    )
)]
async fn readyz(_: SizeChecked, State(app): State<App>) -> Response {
    let Dependencies { database, storage, kafka } = app.broker.dependencies().await;
    let (code, status) = match (database.ok && storage.ok, kafka.ok) {
        _ if app.shutdown.announced.is_cancelled() => (StatusCode::SERVICE_UNAVAILABLE, "shutting-down"),
        (true, true) => (StatusCode::OK, "ok"),
        (true, false) => (StatusCode::OK, "degraded"),
        (false, _) => (StatusCode::SERVICE_UNAVAILABLE, "unavailable"),
    };
    let capabilities = app.broker.capabilities.get().cloned();
    let mut response = (code, Json(Readiness { status, database, storage, kafka, capabilities })).into_response();
    if code == StatusCode::SERVICE_UNAVAILABLE {
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    }
    response
}

/// Read the OpenAPI document
///
/// This document, in OpenAPI 3.1.
#[utoipa::path(
    get, path = "/openapi.json", operation_id = "getContract", tag = "operations", security(()),
    responses((status = 200, description = "The document", body = Contract))
)]
async fn contract(_: SizeChecked, State(app): State<App>) -> Response {
    static CONTRACT: LazyLock<OpenApi> = LazyLock::new(super::openapi);
    let mut contract = CONTRACT.clone();
    // Behind a prefix, the paths of the document are relative to that prefix.
    if let (false, Some([server])) = (app.base_path.is_empty(), contract.servers.as_deref_mut()) {
        server.url.clone_from(&app.base_path);
    }
    let json = contract.to_pretty_json().expect("the document has only strings and numbers");
    ([(header::CONTENT_TYPE, "application/json")], json).into_response()
}

/// Explain an error code
///
/// The page that the `type` of a problem links to.
#[utoipa::path(
    get, path = "/problems/{code}", operation_id = "explainProblem", tag = "operations", security(()),
    params(("code" = String, Path, description = "The error code")),
    responses((status = 200, description = "The explanation", body = String, content_type = "text/html"), )
)]
async fn explain_problem(_: SizeChecked, code: Result<Path<String>, PathRejection>) -> Result<Html<String>, Problem> {
    let code = code.ok().and_then(|Path(code)| ErrorCode::named(&code));
    let code = code.ok_or_else(|| Problem::new(ErrorCode::NotFound, "no such problem"))?;
    let info = code_info(code);
    let advice =
        if info.retryable { "A retry may succeed." } else { "The same request gets the same response, so do not retry it." };
    Ok(Html(format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>{title}</title>\
         <style>body{{font:16px/1.5 system-ui;max-width:40em;margin:3em auto;padding:0 1em}}</style>\
         <h1>{title}</h1><p><code>{code}</code>, HTTP status {status}</p><p>{meaning}</p><p>{advice}</p></html>",
        title = info.title,
        status = info.status,
        meaning = info.meaning,
    )))
}
