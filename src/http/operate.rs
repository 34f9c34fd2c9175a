//! Operators' routes: try again, look again, and how things stand.

use axum::Json;
use axum::extract::State;
use lfs_broker_client::api::{self, Redrive, Stats, Upload, Validated};
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

/// Try to publish now
///
/// For a verified upload whose pointer Kafka refused: it is tried at once instead of at its next turn. With
/// `clear_partition` the partition that was asked for is forgotten, for one that is gone. A published upload stays as it is.
#[utoipa::path(
    post, path = "/lfs/uploads/{id}/redrive", operation_id = "redriveUpload", tag = "operations",
    request_body(content = Option<Redrive>, description = "May be left out"),
    params(("id" = Uuid, Path, description = "The upload")),
    responses(
        (status = 200, description = "The upload; it is published soon, or says why not", body = Upload),
        (status = "4XX", description = "Refused", body = api::Problem, content_type = "application/problem+json"),
        (status = 503, description = "A dependency does not answer", body = api::Problem, content_type = "application/problem+json"),
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

/// Look at the object again
///
/// Asks S3 for a verified or published upload's object and holds size, write token and checksum against the record.
/// The bytes are not read.
#[utoipa::path(
    post, path = "/lfs/uploads/{id}/reverify", operation_id = "reverifyUpload", tag = "operations",
    params(("id" = Uuid, Path, description = "The upload")),
    responses(
        (status = 200, description = "The object is what was proved", body = Validated),
        (status = "4XX", description = "Refused, or the object is another or gone", body = api::Problem, content_type = "application/problem+json"),
        (status = 503, description = "A dependency does not answer", body = api::Problem, content_type = "application/problem+json"),
    )
)]
async fn reverify_upload(
    State(app): State<App>,
    Admin(caller): Admin,
    UploadId(id): UploadId,
) -> Result<Json<Validated>, Problem> {
    Ok(Json(app.broker.reverify(&caller, id).await?))
}

/// Give up an upload that can never publish
///
/// For a verified upload whose pointer Kafka refuses: it becomes `rejected` with the code `unpublishable` and Kafka's last
/// word, and its object is removed. Later completes answer 422 `unpublishable`. A pointer that is not parked (Kafka has not
/// refused it, or it is being sent), and any other state: 409 `state-conflict`. It cannot be undone.
#[utoipa::path(
    post, path = "/lfs/uploads/{id}/discard", operation_id = "discardUpload", tag = "operations",
    params(("id" = Uuid, Path, description = "The upload")),
    responses(
        (status = 200, description = "The upload, rejected", body = Upload),
        (status = "4XX", description = "Refused", body = api::Problem, content_type = "application/problem+json"),
        (status = 503, description = "A dependency does not answer", body = api::Problem, content_type = "application/problem+json"),
    )
)]
async fn discard_upload(State(app): State<App>, Admin(caller): Admin, UploadId(id): UploadId) -> Result<Json<Upload>, Problem> {
    Ok(Json(app.broker.discard(&caller, id).await?))
}

/// How things stand
///
/// Uploads by state, the age of the oldest promise that Kafka has not yet, what waits in the outbox, and whether the
/// database, object storage and Kafka answer.
#[utoipa::path(
    get, path = "/lfs/stats", operation_id = "getStats", tag = "operations",
    responses(
        (status = 200, description = "The figures", body = Stats),
        (status = "4XX", description = "Refused", body = api::Problem, content_type = "application/problem+json"),
        (status = 503, description = "A dependency does not answer", body = api::Problem, content_type = "application/problem+json"),
    )
)]
async fn get_stats(State(app): State<App>, _: Admin) -> Result<Json<Stats>, Problem> {
    Ok(Json(app.broker.stats().await?))
}
