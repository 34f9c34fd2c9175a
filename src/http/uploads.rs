//! Uploads: open, read, list, sign parts, complete, abort.

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use lfs_broker_client::api::{
    CompleteUpload, Completed, History, ListUploads, OpenUpload, ReadHistory, ReadUpload, SignParts, SignedParts, Upload,
    UploadPage, UploadState,
};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::App;
use super::extract::{Body, CanRead, CanWrite, Filters, MaybeBody, Query, UploadId};
use super::problem::Problem;
use crate::broker::{IdempotencyKey, OpenContext};

/// The routes of this file.
pub(super) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(open_upload, list_uploads))
        .routes(routes!(get_upload, abort_upload))
        .routes(routes!(get_upload_history))
        .routes(routes!(sign_parts))
        .routes(routes!(complete_upload))
}

/// Open an upload
///
/// Stores the declared size and checksum. The response has presigned URLs to upload directly to S3: one PUT, or several parts.
/// With an `Idempotency-Key`, repeating the request returns the same upload with fresh URLs.
#[utoipa::path(
    post, path = "/lfs/uploads", operation_id = "openUpload", tag = "uploads", request_body = OpenUpload,
    params((
        "Idempotency-Key" = Option<String>, Header, description = "1 to 255 visible ASCII characters, bare or quoted",
        pattern = r#"^(?!""$)([!-~]{1,255}|"[!-~]{1,255}")$"#
    )),
    responses(
        (status = 201, description = "Opened", body = Upload, headers(("Location" = String, description = "The upload"))),
        (status = 200, description = "Already opened with this Idempotency-Key", body = Upload),
    )
)]
async fn open_upload(
    State(app): State<App>,
    CanWrite(caller): CanWrite,
    headers: HeaderMap,
    Body(request): Body<OpenUpload>,
) -> Result<Response, Problem> {
    let context = OpenContext { idempotency_key: idempotency_key(&headers), traceparent: traceparent(&headers) };
    let opened = app.broker.open(&caller, request, context).await?;
    let status = if opened.is_new { StatusCode::CREATED } else { StatusCode::OK };
    let location = format!("{}/lfs/uploads/{}", app.public_url, opened.upload.id);
    Ok((status, [(header::LOCATION, location)], Json(opened.upload)).into_response())
}

/// Read an upload
///
/// The whole state without URLs: the parts that S3 holds, the next step, and the pointer once it exists. With `wait`, the response
/// comes as soon as the upload changes.
#[utoipa::path(
    get, path = "/lfs/uploads/{id}", operation_id = "getUpload", tag = "uploads",
    params(("id" = Uuid, Path, description = "The upload"), ReadUpload),
    responses(
        (status = 200, description = "The upload", body = Upload),
    )
)]
async fn get_upload(
    State(app): State<App>,
    CanRead(caller): CanRead,
    UploadId(id): UploadId,
    Query(options): Query<ReadUpload>,
) -> Result<Json<Upload>, Problem> {
    Ok(Json(app.read(&caller, id, &options).await?))
}

/// List uploads
///
/// Newest first. A cursor is valid only with the filters of the request that returned it.
#[utoipa::path(
    get, path = "/lfs/uploads", operation_id = "listUploads", tag = "uploads", params(ListUploads),
    responses(
        (status = 200, description = "A page", body = UploadPage),
    )
)]
async fn list_uploads(
    State(app): State<App>,
    CanRead(caller): CanRead,
    Filters(query): Filters,
) -> Result<Json<UploadPage>, Problem> {
    Ok(Json(app.broker.list(&caller, &query).await?))
}

/// Read an upload's history
///
/// All transitions, oldest first. If transitions repeat, only the first and the last round are kept. There are at most 1,000.
#[utoipa::path(
    get, path = "/lfs/uploads/{id}/history", operation_id = "getUploadHistory", tag = "uploads",
    params(("id" = Uuid, Path, description = "The upload"), ReadHistory),
    responses(
        (status = 200, description = "A page of transitions", body = History),
    )
)]
async fn get_upload_history(
    State(app): State<App>,
    CanRead(caller): CanRead,
    UploadId(id): UploadId,
    Query(query): Query<ReadHistory>,
) -> Result<Json<History>, Problem> {
    Ok(Json(app.broker.history(&caller, id, &query).await?))
}

/// Sign parts
///
/// Fresh URLs for up to 100 parts, for the first time or again. This extends the upload's deadline.
#[utoipa::path(
    post, path = "/lfs/uploads/{id}/parts", operation_id = "signParts", tag = "uploads", request_body = SignParts,
    params(("id" = Uuid, Path, description = "The upload")),
    responses(
        (status = 200, description = "Signed parts", body = SignedParts),
    )
)]
async fn sign_parts(
    State(app): State<App>,
    CanWrite(caller): CanWrite,
    UploadId(id): UploadId,
    Body(request): Body<SignParts>,
) -> Result<Json<SignedParts>, Problem> {
    Ok(Json(app.broker.sign_parts(&caller, id, request).await?))
}

/// Complete an upload
///
/// Compares the object in S3 with the declared size and checksum, and publishes its pointer to Kafka. 200 returns the position of
/// the record. 202 `verified`: the pointer is queued and will be published. 202 `completing`: the object is still being checked.
/// Repeating the request is safe. A list of `parts`, which other APIs require, is accepted and ignored: the broker asks S3.
#[utoipa::path(
    post, path = "/lfs/uploads/{id}/complete", operation_id = "completeUpload", tag = "uploads",
    request_body(content = Option<CompleteUpload>, description = "Optional if the checksum was declared at open"),
    params(("id" = Uuid, Path, description = "The upload")),
    responses(
        (status = 200, description = "Published: the pointer is in Kafka", body = Completed),
        (status = 202, description = "Verified: the pointer will be published to Kafka. Completing: retry", body = Completed, headers(("Retry-After" = u64, description = "Seconds to wait before the retry."))),
    )
)]
async fn complete_upload(
    State(app): State<App>,
    CanWrite(caller): CanWrite,
    UploadId(id): UploadId,
    headers: HeaderMap,
    MaybeBody(request): MaybeBody<CompleteUpload>,
) -> Result<Response, Problem> {
    let completed = app.broker.complete(&caller, id, request, traceparent(&headers)).await?;
    Ok(match completed.state {
        UploadState::Published => Json(completed).into_response(),
        _ => (StatusCode::ACCEPTED, [(header::RETRY_AFTER, "1")], Json(completed)).into_response(),
    })
}

/// Abort an upload
///
/// Removes the data of the upload from S3. The response is also 204 if the upload is already aborted, rejected or expired. It is
/// 409 if the pointer is published or will be published, and while a completion checks the object.
#[utoipa::path(
    delete, path = "/lfs/uploads/{id}", operation_id = "abortUpload", tag = "uploads",
    params(("id" = Uuid, Path, description = "The upload")),
    responses(
        (status = 204, description = "Aborted, or already aborted, rejected or expired"),
    )
)]
async fn abort_upload(State(app): State<App>, CanWrite(caller): CanWrite, UploadId(id): UploadId) -> Result<StatusCode, Problem> {
    app.broker.abort(&caller, id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// The `Idempotency-Key`, bare or as an RFC 8941 string. A repeated header is malformed.
fn idempotency_key(headers: &HeaderMap) -> IdempotencyKey {
    let mut values = headers.get_all("idempotency-key").iter();
    let text = match (values.next(), values.next()) {
        (None, _) => return IdempotencyKey::Absent,
        (Some(first), None) => first.to_str().unwrap_or_default().trim(),
        (Some(_), Some(_)) => return IdempotencyKey::Malformed,
    };
    let key = text.strip_prefix('"').and_then(|text| text.strip_suffix('"')).unwrap_or(text);
    match (1..=255).contains(&key.len()) && key.bytes().all(|byte| byte.is_ascii_graphic()) {
        true => IdempotencyKey::Valid(key.to_owned()),
        false => IdempotencyKey::Malformed,
    }
}

/// The W3C trace context, if it has the format of version 00.
fn traceparent(headers: &HeaderMap) -> Option<String> {
    let value = headers.get("traceparent")?.to_str().ok()?;
    let fields: Vec<&str> = value.split('-').collect();
    let hex = |text: &str, length: usize| {
        text.len() == length && text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
    };
    match fields.as_slice() {
        [version, trace, parent, flags] if hex(version, 2) && hex(trace, 32) && hex(parent, 16) && hex(flags, 2) => {
            Some(value.to_owned())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;
    use proptest::prelude::*;

    fn with(name: &'static str, value: &[u8]) -> Option<HeaderMap> {
        Some(HeaderMap::from_iter([(name.parse().ok()?, HeaderValue::from_bytes(value).ok()?)]))
    }

    proptest! {
        #[test]
        fn an_idempotency_key_is_visible_ascii_bare_or_quoted(key in "[!-~]{1,255}", any in proptest::collection::vec(any::<u8>(), 0..300)) {
            let bare = !(key.len() > 1 && key.starts_with('"') && key.ends_with('"'));
            let read = |value: &[u8]| with("idempotency-key", value).map(|headers| idempotency_key(&headers));
            prop_assert_eq!(read(format!("\"{key}\"").as_bytes()), Some(IdempotencyKey::Valid(key.clone())));
            prop_assert!(!bare || read(key.as_bytes()) == Some(IdempotencyKey::Valid(key)));
            if let Some(IdempotencyKey::Valid(key)) = read(&any) {
                prop_assert!((1..=255).contains(&key.len()) && key.bytes().all(|byte| byte.is_ascii_graphic()));
            }
        }

        #[test]
        fn a_traceparent_is_accepted_unchanged_or_ignored(any in "[ -~]{0,60}", ids in "[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}") {
            let read = |value: &str| with("traceparent", value.as_bytes()).and_then(|headers| traceparent(&headers));
            let valid = format!("00-{ids}");
            prop_assert_eq!(read(&valid), Some(valid.clone()));
            prop_assert_eq!(read(&valid.to_uppercase()).is_some(), valid == valid.to_uppercase());
            prop_assert!(read(&any).is_none_or(|accepted| accepted == any));
        }
    }
}
