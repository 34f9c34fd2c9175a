//! Pointers: resolves a pointer to a presigned GET.

use axum::Json;
use axum::extract::State;
use lfs_broker_client::api::{ResolveAnswer, ResolveOptions};
use lfs_broker_client::pointer::Pointer;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::App;
use super::extract::{CanResolve, Query, RawJson};
use super::problem::Problem;

/// The routes of this file.
pub(super) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(resolve_pointer))
}

/// Resolve a pointer
///
/// The request body is the value of the Kafka record. The response is a presigned GET for the file, or with `validate` the result
/// of checking the pointer. Pointers without a known upload work too, such as old ones and those of KafScale.
#[utoipa::path(
    post, path = "/lfs/resolve", operation_id = "resolvePointer", tag = "pointers", request_body = Pointer, params(ResolveOptions),
    responses(
        (status = 200, description = "The request that downloads the file, or the result of the check", body = ResolveAnswer),
    )
)]
async fn resolve_pointer(
    State(app): State<App>,
    CanResolve(caller): CanResolve,
    Query(options): Query<ResolveOptions>,
    RawJson(value): RawJson,
) -> Result<Json<ResolveAnswer>, Problem> {
    Ok(Json(app.broker.resolve(&caller, &value, &options).await?))
}
