//! The edge of the door: what is the same for every request and every answer.

use axum::body::Body;
use axum::extract::Request;
use axum::http::header::{self, HeaderName, HeaderValue};
use axum::http::{HeaderMap, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use lfs_broker_client::api;
use tracing::Instrument as _;
use uuid::Uuid;

use super::extract::{HASHES_BYTES, too_large};
use super::problem::Problem;

/// All headers of a request together, names and values, in bytes.
const HEADERS_BYTES: usize = 16 << 10;
/// How soon asking again makes sense, in seconds.
const RETRY_AFTER: HeaderValue = HeaderValue::from_static("1");

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Names the request, checks its sizes, and writes whatever problem comes back.
pub(super) async fn edge(request: Request, next: Next) -> Response {
    let id = request_id(request.headers());
    let span = tracing::info_span!("request", id = %id, method = %request.method(), path = request.uri().path());
    let mut response = match check_sizes(request.headers()) {
        Ok(()) => next.run(request).instrument(span).await,
        Err(problem) => problem.into_response(),
    };
    if response.status() == StatusCode::METHOD_NOT_ALLOWED && response.extensions().get::<Problem>().is_none() {
        response.extensions_mut().insert(Problem::new("method-not-allowed", "the route does not take this method"));
    }
    if let Some(problem) = response.extensions_mut().remove::<Problem>() {
        response = write(problem, &id, response);
    }
    let headers = response.headers_mut();
    headers.insert(REQUEST_ID, HeaderValue::from_str(&id).expect("checked, or a UUID"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    // Answers carry presigned URLs: no cache may keep them.
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    response
}

/// The caller's own id where it is harmless in a log, else a fresh one.
fn request_id(headers: &HeaderMap) -> String {
    let given = headers.get(REQUEST_ID).and_then(|value| value.to_str().ok());
    let harmless = |id: &&str| {
        (1..=128).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.:".contains(&byte))
    };
    given.filter(harmless).map_or_else(|| Uuid::new_v4().to_string(), str::to_owned)
}

fn check_sizes(headers: &HeaderMap) -> Result<(), Problem> {
    let bytes: usize = headers.iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
    if bytes > HEADERS_BYTES {
        return Err(Problem::new(
            "headers-too-large",
            format!("the headers have {bytes} bytes, at most {HEADERS_BYTES} are allowed"),
        ));
    }
    let length =
        headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()).and_then(|text| text.parse::<usize>().ok());
    if length.is_some_and(|length| length > HASHES_BYTES) { Err(too_large(HASHES_BYTES)) } else { Ok(()) }
}

fn write(problem: Problem, id: &str, empty: Response) -> Response {
    let kind = problem.kind();
    let body = api::Problem {
        kind: format!("/problems/{}", kind.code),
        title: kind.title.to_owned(),
        status: kind.status,
        detail: problem.detail,
        code: kind.code.to_owned(),
        request_id: id.to_owned(),
        retryable: kind.retryable,
        upload_state: problem.state,
        errors: problem.errors,
    };
    let (mut parts, _) = empty.into_parts();
    parts.headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
    parts.headers.remove(header::CONTENT_LENGTH);
    match kind.status {
        401 if kind.code == "unauthenticated" => {
            parts.headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"lfs-broker\""));
        }
        401 => {
            let challenge = HeaderValue::from_static("Bearer realm=\"lfs-broker\", error=\"invalid_token\"");
            parts.headers.insert(header::WWW_AUTHENTICATE, challenge);
        }
        429 | 503 => {
            parts.headers.insert(header::RETRY_AFTER, RETRY_AFTER);
        }
        _ => {}
    }
    let json = serde_json::to_vec(&body).expect("a problem has only strings and numbers");
    Response::from_parts(parts, Body::from(json))
}

/// A handler that panicked is a bug: logged whole by the panic hook, told briefly.
pub(super) fn panicked(_: Box<dyn std::any::Any + Send + 'static>) -> Response {
    Problem::new("internal", "a bug in the broker; its log has more").into_response()
}
