//! Uploads: open, read, list, sign parts, complete, abort.

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use lfs_broker_client::api::{
    self, CompleteUpload, History, ListUploads, OpenUpload, ReadHistory, ReadUpload, SignParts, SignedParts, Upload, UploadPage,
    UploadState,
};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::App;
use super::document::Completed;
use super::extract::{Body, Filters, MaybeBody, Query, Reader, UploadId, Writer};
use super::problem::Problem;
use crate::broker::OpenContext;

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
/// Stores the promise and answers with what puts the bytes straight into S3: one presigned PUT, or presigned parts.
/// With an `Idempotency-Key` asking again gives the same upload with fresh URLs.
#[utoipa::path(
    post, path = "/lfs/uploads", operation_id = "openUpload", tag = "uploads", request_body = OpenUpload,
    params((
        "Idempotency-Key" = Option<String>, Header, description = "1 to 255 visible ASCII characters, bare or quoted",
        pattern = r#"^(?!""$)([!-~]{1,255}|"[!-~]{1,255}")$"#
    )),
    responses(
        (status = 201, description = "Opened", body = Upload, headers(("Location" = String, description = "The upload"))),
        (status = 200, description = "Opened before under this Idempotency-Key", body = Upload),
        (status = "4XX", description = "Refused", body = api::Problem, content_type = "application/problem+json"),
        (status = 503, description = "A dependency does not answer", body = api::Problem, content_type = "application/problem+json"),
    )
)]
async fn open_upload(
    State(app): State<App>,
    Writer(caller): Writer,
    headers: HeaderMap,
    Body(request): Body<OpenUpload>,
) -> Result<Response, Problem> {
    let context = OpenContext { idempotency_key: idempotency_key(&headers), traceparent: traceparent(&headers) };
    let opened = app.broker.open(&caller, request, context).await?;
    let status = if opened.fresh { StatusCode::CREATED } else { StatusCode::OK };
    let location = format!("{}/lfs/uploads/{}", app.public_url, opened.upload.id);
    Ok((status, [(header::LOCATION, location)], Json(opened.upload)).into_response())
}

/// Read an upload
///
/// The whole state without URLs: which parts S3 holds, what to do next, the pointer once there is one. With `wait`
/// the answer comes as soon as the upload changes.
#[utoipa::path(
    get, path = "/lfs/uploads/{id}", operation_id = "getUpload", tag = "uploads",
    params(("id" = Uuid, Path, description = "The upload"), ReadUpload),
    responses(
        (status = 200, description = "The upload", body = Upload),
        (status = "4XX", description = "Refused", body = api::Problem, content_type = "application/problem+json"),
        (status = 503, description = "A dependency does not answer", body = api::Problem, content_type = "application/problem+json"),
    )
)]
async fn get_upload(
    State(app): State<App>,
    Reader(caller): Reader,
    UploadId(id): UploadId,
    Query(options): Query<ReadUpload>,
) -> Result<Json<Upload>, Problem> {
    Ok(Json(app.read(&caller, id, &options).await?))
}

/// List uploads
///
/// Newest first. A cursor goes on with the filters that it came from.
#[utoipa::path(
    get, path = "/lfs/uploads", operation_id = "listUploads", tag = "uploads", params(ListUploads),
    responses(
        (status = 200, description = "A page", body = UploadPage),
        (status = "4XX", description = "Refused", body = api::Problem, content_type = "application/problem+json"),
        (status = 503, description = "A dependency does not answer", body = api::Problem, content_type = "application/problem+json"),
    )
)]
async fn list_uploads(
    State(app): State<App>,
    Reader(caller): Reader,
    Filters(query): Filters,
) -> Result<Json<UploadPage>, Problem> {
    Ok(Json(app.broker.list(&caller, &query).await?))
}

/// Tell an upload's history
///
/// Every transition, oldest first. Of transitions that repeat themselves the first and the last round are kept, and at
/// most 1,000 in all.
#[utoipa::path(
    get, path = "/lfs/uploads/{id}/history", operation_id = "getUploadHistory", tag = "uploads",
    params(("id" = Uuid, Path, description = "The upload"), ReadHistory),
    responses(
        (status = 200, description = "A page of transitions", body = History),
        (status = "4XX", description = "Refused", body = api::Problem, content_type = "application/problem+json"),
        (status = 503, description = "A dependency does not answer", body = api::Problem, content_type = "application/problem+json"),
    )
)]
async fn get_upload_history(
    State(app): State<App>,
    Reader(caller): Reader,
    UploadId(id): UploadId,
    Query(query): Query<ReadHistory>,
) -> Result<Json<History>, Problem> {
    Ok(Json(app.broker.history(&caller, id, &query).await?))
}

/// Sign parts
///
/// Fresh URLs for up to 100 parts, again or for the first time. Slides the upload's end.
#[utoipa::path(
    post, path = "/lfs/uploads/{id}/parts", operation_id = "signParts", tag = "uploads", request_body = SignParts,
    params(("id" = Uuid, Path, description = "The upload")),
    responses(
        (status = 200, description = "Signed parts", body = SignedParts),
        (status = "4XX", description = "Refused", body = api::Problem, content_type = "application/problem+json"),
        (status = 503, description = "A dependency does not answer", body = api::Problem, content_type = "application/problem+json"),
    )
)]
async fn sign_parts(
    State(app): State<App>,
    Writer(caller): Writer,
    UploadId(id): UploadId,
    Body(request): Body<SignParts>,
) -> Result<Json<SignedParts>, Problem> {
    Ok(Json(app.broker.sign_parts(&caller, id, request).await?))
}

/// Complete an upload
///
/// Checks the object in S3 against the promise and hands its pointer to Kafka. 200 says where the pointer is; 202
/// `verified` promises that it will reach Kafka; 202 `completing` promises nothing yet. Asking again gives the same answer.
/// A list of parts, as other APIs want one, is accepted as `parts` and ignored: the broker asks S3.
#[utoipa::path(
    post, path = "/lfs/uploads/{id}/complete", operation_id = "completeUpload", tag = "uploads",
    request_body(content = Option<CompleteUpload>, description = "May be left out where open brought the checksum"),
    params(("id" = Uuid, Path, description = "The upload")),
    responses(
        (status = 200, description = "Published: the pointer is in Kafka", body = Completed),
        (status = 202, description = "Verified: the pointer will reach Kafka. Completing: ask again", body = Completed, headers(("Retry-After" = u64, description = "Seconds"))),
        (status = "4XX", description = "Refused", body = api::Problem, content_type = "application/problem+json"),
        (status = 503, description = "A dependency does not answer", body = api::Problem, content_type = "application/problem+json"),
    )
)]
async fn complete_upload(
    State(app): State<App>,
    Writer(caller): Writer,
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
/// What S3 holds of it is removed. Aborting what is over already is no error.
#[utoipa::path(
    delete, path = "/lfs/uploads/{id}", operation_id = "abortUpload", tag = "uploads",
    params(("id" = Uuid, Path, description = "The upload")),
    responses(
        (status = 204, description = "Aborted, or over already"),
        (status = "4XX", description = "Refused", body = api::Problem, content_type = "application/problem+json"),
        (status = 503, description = "A dependency does not answer", body = api::Problem, content_type = "application/problem+json"),
    )
)]
async fn abort_upload(State(app): State<App>, Writer(caller): Writer, UploadId(id): UploadId) -> Result<StatusCode, Problem> {
    app.broker.abort(&caller, id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// The key as the client means it: bare, or as an RFC 8941 string. `Some(None)`: there is one of the wrong shape.
fn idempotency_key(headers: &HeaderMap) -> Option<Option<String>> {
    let mut values = headers.get_all("idempotency-key").iter();
    let first = values.next()?;
    if values.next().is_some() {
        return Some(None);
    }
    let text = first.to_str().ok().map(str::trim);
    let bare = text.map(|text| text.strip_prefix('"').and_then(|text| text.strip_suffix('"')).unwrap_or(text));
    Some(bare.filter(|key| (1..=255).contains(&key.len()) && key.bytes().all(|byte| byte.is_ascii_graphic())).map(str::to_owned))
}

/// The W3C trace context, where it has the shape of version 00.
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
        fn a_key_is_visible_ascii_bare_or_quoted(key in "[!-~]{1,255}", any in proptest::collection::vec(any::<u8>(), 0..300)) {
            let bare = !(key.len() > 1 && key.starts_with('"') && key.ends_with('"'));
            let read = |value: &[u8]| with("idempotency-key", value).and_then(|headers| idempotency_key(&headers));
            prop_assert_eq!(read(format!("\"{key}\"").as_bytes()), Some(Some(key.clone())));
            prop_assert!(!bare || read(key.as_bytes()) == Some(Some(key)));
            if let Some(Some(key)) = read(&any) {
                prop_assert!((1..=255).contains(&key.len()) && key.bytes().all(|byte| byte.is_ascii_graphic()));
            }
        }

        #[test]
        fn a_trace_is_taken_whole_or_not_at_all(any in "[ -~]{0,60}", ids in "[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}") {
            let read = |value: &str| with("traceparent", value.as_bytes()).and_then(|headers| traceparent(&headers));
            let sound = format!("00-{ids}");
            prop_assert_eq!(read(&sound), Some(sound.clone()));
            prop_assert_eq!(read(&sound.to_uppercase()).is_some(), sound == sound.to_uppercase());
            prop_assert!(read(&any).is_none_or(|taken| taken == any));
        }
    }
}
