//! Middleware around every request: request id, logging span, host check, timeout, problem documents and security headers.

use std::net::{IpAddr, Ipv4Addr};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::header::{self, HeaderName, HeaderValue};
use axum::http::{HeaderMap, StatusCode, response};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http_body_util::{BodyExt as _, Limited};
use hyper::body::{Frame, SizeHint};
use lfs_broker_client::api::{self, ErrorCode};
use tracing::Instrument as _;
use uuid::Uuid;

use super::client_ip::{PeerIp, client_ip};
use super::problem::Problem;
use super::{App, public_routes};
use crate::telemetry::sanitize;

/// How much of an unwanted body is still read, in bytes, and for how long.
const MAX_DRAIN_BYTES: usize = 8 << 20;
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);
const HOST_FORBIDDEN_DETAIL: &str = "a broker without tokens accepts only local or configured Host and Origin headers";
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Marks a request that the server refused before routing, with the problem to send.
#[derive(Clone)]
pub(super) struct RefusedRequest(pub(super) Problem);

/// Gives the request an id and a timeout, and writes the problem document if there is a problem.
pub(super) async fn request_context(State(app): State<App>, mut request: Request, next: Next) -> Response {
    let id = request_id(request.headers());
    let peer = request.extensions().get::<PeerIp>().map_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED), |peer| peer.0);
    let client = client_ip(peer, request.headers(), &app.settings.trusted_proxies);
    request.extensions_mut().insert(client);
    let path = request.uri().path();
    let method = sanitize(request.method().as_str());
    let span = tracing::info_span!("request", id = %id, client = %client.0, %method, path = %sanitize(path));
    let policy = public_routes::content_policy(path);
    let (mut parts, body) = request.into_parts();
    let is_allowed = app.settings.allowed_hosts.as_ref().is_none_or(|allowed_hosts| allowed_hosts.allows(&parts));
    let refused = parts.extensions.remove::<RefusedRequest>();
    let request = Request::from_parts(parts, Body::new(DrainOnDrop(Some(body))));
    let served = async {
        match (refused, is_allowed) {
            (Some(RefusedRequest(problem)), _) => problem.into_response(),
            (None, true) => next.run(request).instrument(span).await,
            (None, false) => Problem::new(ErrorCode::HostForbidden, HOST_FORBIDDEN_DETAIL).into_response(),
        }
    };
    let mut response = tokio::time::timeout(app.settings.request_timeout, served).await.unwrap_or_else(|_| {
        let seconds = app.settings.request_timeout.as_secs_f32();
        tracing::warn!(id, "request {id} was aborted: no answer within {seconds} s");
        Problem::new(ErrorCode::DependencyUnavailable, format!("there was no answer within {seconds} s; retry")).into_response()
    });
    if response.extensions().get::<Problem>().is_none() {
        match response.status() {
            StatusCode::METHOD_NOT_ALLOWED => {
                response
                    .extensions_mut()
                    .insert(Problem::new(ErrorCode::MethodNotAllowed, "the route does not support this method"));
            }
            StatusCode::NOT_FOUND => {
                response.extensions_mut().insert(Problem::new(ErrorCode::NotFound, "no such page"));
            }
            _ => {}
        }
    }
    if let Some(problem) = response.extensions_mut().remove::<Problem>() {
        response = problem_response(problem, &id, &app.base_path, response);
    }
    security_headers(response.headers_mut(), &id, policy);
    response
}

/// Sets the headers that every response has.
fn security_headers(headers: &mut HeaderMap, id: &str, policy: &'static str) {
    headers.insert(REQUEST_ID, HeaderValue::from_str(id).expect("a request id is checked, or a UUID"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    headers.entry(header::CONTENT_SECURITY_POLICY).or_insert(HeaderValue::from_static(policy));
    // Responses carry presigned URLs, so no cache may store them.
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
}

/// The bytes of a response to input that could not be parsed as a request. The connection closes after this response.
pub(super) fn final_response(problem: Problem, base_path: &str) -> Vec<u8> {
    let (id, status) = (Uuid::new_v4().to_string(), problem.code_info().status);
    let (mut parts, body) = problem_parts(problem, &id, base_path, Response::new(Body::empty()));
    security_headers(&mut parts.headers, &id, public_routes::content_policy(""));
    let reason = StatusCode::from_u16(status).ok().and_then(|status| status.canonical_reason()).unwrap_or_default();
    let mut bytes = format!("HTTP/1.1 {status} {reason}\r\nconnection: close\r\ncontent-length: {}\r\n", body.len()).into_bytes();
    for (name, value) in &parts.headers {
        bytes.extend([name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"].concat());
    }
    [bytes.as_slice(), b"\r\n", &body].concat()
}

/// The client's own request id if it is safe in a log, else a new id.
fn request_id(headers: &HeaderMap) -> String {
    let given = headers.get(REQUEST_ID).and_then(|value| value.to_str().ok());
    let is_safe = |id: &&str| {
        (1..=128).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.:".contains(&byte))
    };
    given.filter(is_safe).map_or_else(|| Uuid::new_v4().to_string(), str::to_owned)
}

fn problem_response(problem: Problem, id: &str, base_path: &str, response: Response) -> Response {
    let (parts, json) = problem_parts(problem, id, base_path, response);
    Response::from_parts(parts, Body::from(json))
}

fn problem_parts(problem: Problem, id: &str, base_path: &str, response: Response) -> (response::Parts, Vec<u8>) {
    let info = problem.code_info();
    let body = api::Problem {
        kind: format!("{base_path}/problems/{}", problem.code),
        title: info.title.to_owned(),
        status: info.status,
        detail: problem.detail,
        code: problem.code.to_string(),
        request_id: id.to_owned(),
        retryable: info.retryable,
        upload_state: problem.state,
        errors: problem.errors,
    };
    let (mut parts, _) = response.into_parts();
    parts.headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
    parts.headers.remove(header::CONTENT_LENGTH);
    match info.status {
        401 if problem.code == ErrorCode::Unauthenticated => {
            parts.headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"lfs-broker\""));
        }
        401 => {
            let challenge = HeaderValue::from_static("Bearer realm=\"lfs-broker\", error=\"invalid_token\"");
            parts.headers.insert(header::WWW_AUTHENTICATE, challenge);
        }
        429 | 503 => {
            parts.headers.insert(header::RETRY_AFTER, HeaderValue::from(problem.retry_after_seconds));
        }
        _ => {}
    }
    (parts, serde_json::to_vec(&body).expect("a problem has only strings and numbers"))
}

/// The response after a handler panicked, which is a bug. The panic hook logs the details.
pub(super) fn panic_response(_: Box<dyn std::any::Any + Send + 'static>) -> Response {
    Problem::new(ErrorCode::Internal, "a bug in the broker; its log has the details").into_response()
}

/// A request body whose rest is read when the body is dropped. If the connection closed while the client still sends, the client
/// would lose the response.
struct DrainOnDrop(Option<Body>);

impl hyper::body::Body for DrainOnDrop {
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

impl Drop for DrainOnDrop {
    fn drop(&mut self) {
        let Some(body) = self.0.take().filter(|body| !hyper::body::Body::is_end_stream(body)) else { return };
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            let rest = Limited::new(body, MAX_DRAIN_BYTES);
            runtime.spawn(async move {
                let read = async {
                    let mut rest = rest;
                    while let Some(Ok(_)) = rest.frame().await {}
                };
                let _ = tokio::time::timeout(DRAIN_TIMEOUT, read).await;
            });
        }
    }
}
