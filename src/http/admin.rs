//! Administration: redrive, reverify and discard an upload, and statistics.

use axum::Json;
use axum::extract::State;
use lfs_broker_client::api::{Redrive, Stats, Upload, Validated};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::App;
use super::extract::{Admin, MaybeBody, UploadId};
use super::problem::Problem;

/// The routes of this file.
pub(super) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(redrive_upload))
        .routes(routes!(reverify_upload))
        .routes(routes!(discard_upload))
        .routes(routes!(get_stats))
}

/// Publish now
///
/// For a verified upload whose pointer Kafka refused: the broker retries at once instead of at the next scheduled time. With
/// `clear_partition` the broker ignores the requested partition, for example because it no longer exists. A published upload
/// does not change.
#[utoipa::path(
    post, path = "/lfs/uploads/{id}/redrive", operation_id = "redriveUpload", tag = "operations",
    request_body(content = Option<Redrive>, description = "Optional"),
    params(("id" = Uuid, Path, description = "The upload")),
    responses(
        (status = 200, description = "The upload. It is published soon, or shows the last publish error", body = Upload),
    )
)]
async fn redrive_upload(
    State(app): State<App>,
    Admin(caller): Admin,
    UploadId(id): UploadId,
    MaybeBody(request): MaybeBody<Redrive>,
) -> Result<Json<Upload>, Problem> {
    Ok(Json(app.broker.redrive(&caller, id, &request).await?))
}

/// Check the object again
///
/// For a verified or published upload: compares the size, write token and checksum of the object in S3 with the stored values.
/// The broker does not read the bytes.
#[utoipa::path(
    post, path = "/lfs/uploads/{id}/reverify", operation_id = "reverifyUpload", tag = "operations",
    params(("id" = Uuid, Path, description = "The upload")),
    responses(
        (status = 200, description = "The object is the verified one", body = Validated),
    )
)]
async fn reverify_upload(
    State(app): State<App>,
    Admin(caller): Admin,
    UploadId(id): UploadId,
) -> Result<Json<Validated>, Problem> {
    Ok(Json(app.broker.reverify(&caller, id).await?))
}

/// Discard an upload that can never be published
///
/// For a verified upload whose pointer Kafka refuses. The upload becomes `rejected` with the code `unpublishable` and Kafka's
/// last error, and its object is removed. Later completes answer 422 `unpublishable`. The response is 409 `state-conflict` if
/// Kafka has not refused the pointer, if the pointer is being sent, or in any other state. A discard cannot be undone.
#[utoipa::path(
    post, path = "/lfs/uploads/{id}/discard", operation_id = "discardUpload", tag = "operations",
    params(("id" = Uuid, Path, description = "The upload")),
    responses(
        (status = 200, description = "The upload, rejected", body = Upload),
    )
)]
async fn discard_upload(State(app): State<App>, Admin(caller): Admin, UploadId(id): UploadId) -> Result<Json<Upload>, Problem> {
    Ok(Json(app.broker.discard(&caller, id).await?))
}

/// Read statistics
///
/// The number of uploads in each state, the age of the oldest verified upload that is not in Kafka yet, the size of the outbox,
/// and whether the database, object storage and Kafka answer.
#[utoipa::path(
    get, path = "/lfs/stats", operation_id = "getStats", tag = "operations",
    responses(
        (status = 200, description = "The statistics", body = Stats),
    )
)]
async fn get_stats(State(app): State<App>, _: Admin) -> Result<Json<Stats>, Problem> {
    Ok(Json(app.broker.stats().await?))
}
