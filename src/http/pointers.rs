//! Pointers: resolved into a signed GET.

use axum::Json;
use axum::extract::State;
use lfs_broker_client::api::{self, ResolveAnswer, ResolveOptions};
use lfs_broker_client::pointer::Pointer;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::App;
use super::extract::{Query, RawJson, Resolver};
use super::problem::Problem;

/// The routes of this file.
pub(super) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(resolve_pointer))
}

/// Resolve a pointer
///
/// The body is the record's value. The answer is a presigned GET of the bytes, or with `validate` whether the
/// pointer is sound. No upload need be known: older pointers and KafScale's resolve too.
#[utoipa::path(
    post, path = "/lfs/resolve", operation_id = "resolvePointer", tag = "pointers", request_body = Pointer, params(ResolveOptions),
    responses(
        (status = 200, description = "The request that yields the bytes, or the verdict", body = ResolveAnswer),
        (status = "4XX", description = "Refused", body = api::Problem, content_type = "application/problem+json"),
        (status = 503, description = "A dependency does not answer", body = api::Problem, content_type = "application/problem+json"),
    )
)]
async fn resolve_pointer(
    State(app): State<App>,
    Resolver(caller): Resolver,
    Query(options): Query<ResolveOptions>,
    RawJson(value): RawJson,
) -> Result<Json<ResolveAnswer>, Problem> {
    Ok(Json(app.broker.resolve(&caller, &value, &options).await?))
}
