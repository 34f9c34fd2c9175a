//! The edge of the door: what is the same for every request and every answer.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::Request;
use axum::http::header::{self, HeaderName, HeaderValue};
use axum::http::{HeaderMap, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http_body_util::{BodyExt as _, Limited};
use hyper::body::{Frame, SizeHint};
use lfs_broker_client::api;
use tracing::Instrument as _;
use uuid::Uuid;

use super::problem::Problem;

/// How much of a refused body is still read, in bytes, and for how long.
const UNWANTED_BYTES: usize = 8 << 20;
const PATIENCE: Duration = Duration::from_secs(2);
/// How soon asking again makes sense, in seconds.
const RETRY_AFTER: HeaderValue = HeaderValue::from_static("1");

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Names the request, and writes whatever problem comes back.
pub(super) async fn edge(request: Request, next: Next) -> Response {
    let id = request_id(request.headers());
    let span = tracing::info_span!("request", id = %id, method = %request.method(), path = request.uri().path());
    let request = request.map(|body| Body::new(Patient(Some(body))));
    let mut response = next.run(request).instrument(span).await;
    if response.extensions().get::<Problem>().is_none() {
        match response.status() {
            StatusCode::METHOD_NOT_ALLOWED => {
                response.extensions_mut().insert(Problem::new("method-not-allowed", "the route does not take this method"));
            }
            StatusCode::NOT_FOUND => {
                response.extensions_mut().insert(Problem::new("not-found", "no such page"));
            }
            _ => {}
        }
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

/// A body whose rest is still read when nobody wants it: closing on a client that is sending takes the answer from it.
struct Patient(Option<Body>);

impl hyper::body::Body for Patient {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        match &mut self.0 {
            Some(body) => Pin::new(body).poll_frame(context),
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.0.as_ref().is_none_or(hyper::body::Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.0.as_ref().map(hyper::body::Body::size_hint).unwrap_or_default()
    }
}

impl Drop for Patient {
    fn drop(&mut self) {
        let Some(body) = self.0.take().filter(|body| !hyper::body::Body::is_end_stream(body)) else { return };
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            let rest = Limited::new(body, UNWANTED_BYTES);
            runtime.spawn(async move {
                let read = async {
                    let mut rest = rest;
                    while let Some(Ok(_)) = rest.frame().await {}
                };
                let _ = tokio::time::timeout(PATIENCE, read).await;
            });
        }
    }
}
