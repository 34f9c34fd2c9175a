//! The edge of the door: what is the same for every request and every answer.

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

use super::address::client_address;
use super::problem::Problem;
use super::serve::Peer;
use super::{App, pages};
use crate::telemetry::foreign;

/// How much of a refused body is still read, in bytes, and for how long.
const UNWANTED_BYTES: usize = 8 << 20;
const PATIENCE: Duration = Duration::from_secs(2);
/// What a page of elsewhere, or whoever asks for a name of elsewhere, is told.
const NOT_HERE: &str = "a broker without tokens answers under names of this machine only, and no pages of elsewhere";
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// A request that is not served, and why.
#[derive(Clone)]
pub(super) struct Refused(pub(super) Problem);

/// Names the request, gives it a time, and writes whatever problem comes back.
pub(super) async fn edge(State(app): State<App>, mut request: Request, next: Next) -> Response {
    let id = request_id(request.headers());
    let peer = request.extensions().get::<Peer>().map_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED), |peer| peer.0);
    let client = client_address(peer, request.headers(), &app.settings.trusted_proxies);
    request.extensions_mut().insert(client);
    let path = request.uri().path();
    let method = foreign(request.method().as_str());
    let span = tracing::info_span!("request", id = %id, client = %client.0, %method, path = %foreign(path));
    let policy = pages::content_policy(path);
    let (mut parts, body) = request.into_parts();
    let is_let_in = app.settings.local.as_ref().is_none_or(|local| local.lets_in(&parts));
    let refused = parts.extensions.remove::<Refused>();
    let request = Request::from_parts(parts, Body::new(Patient(Some(body))));
    let served = async {
        match (refused, is_let_in) {
            (Some(Refused(problem)), _) => problem.into_response(),
            (None, true) => next.run(request).instrument(span).await,
            (None, false) => Problem::new(ErrorCode::HostForbidden, NOT_HERE).into_response(),
        }
    };
    let mut response = tokio::time::timeout(app.settings.request_time, served).await.unwrap_or_else(|_| {
        let seconds = app.settings.request_time.as_secs_f32();
        tracing::warn!(id, "a request was given up after {seconds} s");
        Problem::new(ErrorCode::DependencyUnavailable, format!("there was no answer within {seconds} s; ask again"))
            .into_response()
    });
    if response.extensions().get::<Problem>().is_none() {
        match response.status() {
            StatusCode::METHOD_NOT_ALLOWED => {
                response
                    .extensions_mut()
                    .insert(Problem::new(ErrorCode::MethodNotAllowed, "the route does not take this method"));
            }
            StatusCode::NOT_FOUND => {
                response.extensions_mut().insert(Problem::new(ErrorCode::NotFound, "no such page"));
            }
            _ => {}
        }
    }
    if let Some(problem) = response.extensions_mut().remove::<Problem>() {
        response = write(problem, &id, &app.base_path, response);
    }
    seal(response.headers_mut(), &id, policy);
    response
}

/// What every answer bears.
fn seal(headers: &mut HeaderMap, id: &str, policy: &'static str) {
    headers.insert(REQUEST_ID, HeaderValue::from_str(id).expect("checked, or a UUID"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    headers.entry(header::CONTENT_SECURITY_POLICY).or_insert(HeaderValue::from_static(policy));
    // Answers carry presigned URLs: no cache may keep them.
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
}

/// The bytes of an answer to what did not become a request; the connection ends with it.
pub(super) fn last_answer(problem: Problem, base_path: &str) -> Vec<u8> {
    let (id, status) = (Uuid::new_v4().to_string(), problem.kind().status);
    let (mut parts, body) = compose(problem, &id, base_path, Response::new(Body::empty()));
    seal(&mut parts.headers, &id, pages::content_policy(""));
    let reason = StatusCode::from_u16(status).ok().and_then(|status| status.canonical_reason()).unwrap_or_default();
    let mut answer =
        format!("HTTP/1.1 {status} {reason}\r\nconnection: close\r\ncontent-length: {}\r\n", body.len()).into_bytes();
    for (name, value) in &parts.headers {
        answer.extend([name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"].concat());
    }
    [answer.as_slice(), b"\r\n", &body].concat()
}

/// The caller's own id where it is harmless in a log, else a fresh one.
fn request_id(headers: &HeaderMap) -> String {
    let given = headers.get(REQUEST_ID).and_then(|value| value.to_str().ok());
    let harmless = |id: &&str| {
        (1..=128).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.:".contains(&byte))
    };
    given.filter(harmless).map_or_else(|| Uuid::new_v4().to_string(), str::to_owned)
}

fn write(problem: Problem, id: &str, base_path: &str, empty: Response) -> Response {
    let (parts, json) = compose(problem, id, base_path, empty);
    Response::from_parts(parts, Body::from(json))
}

fn compose(problem: Problem, id: &str, base_path: &str, empty: Response) -> (response::Parts, Vec<u8>) {
    let kind = problem.kind();
    let body = api::Problem {
        kind: format!("{base_path}/problems/{}", problem.code),
        title: kind.title.to_owned(),
        status: kind.status,
        detail: problem.detail,
        code: problem.code.to_string(),
        request_id: id.to_owned(),
        retryable: kind.retryable,
        upload_state: problem.state,
        errors: problem.errors,
    };
    let (mut parts, _) = empty.into_parts();
    parts.headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
    parts.headers.remove(header::CONTENT_LENGTH);
    match kind.status {
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

/// A handler that panicked is a bug: logged whole by the panic hook, told briefly.
pub(super) fn panicked(_: Box<dyn std::any::Any + Send + 'static>) -> Response {
    Problem::new(ErrorCode::Internal, "a bug in the broker; its log has more").into_response()
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
