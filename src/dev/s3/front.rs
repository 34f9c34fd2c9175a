//! What stands in front of the protocol layer: the checks of AWS that s3s does not make, and CORS.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body as _, Frame, Incoming, SizeHint};
use hyper::header::{self, HeaderMap, HeaderValue};
use hyper::{Method, Request, StatusCode};
use s3s::auth::{S3Auth, SecretKey};
use s3s::service::{S3Service, S3ServiceBuilder};
use s3s::{Body, HttpError, HttpResponse, S3Error, S3ErrorCode, S3Result, s3_error};

use super::api::Api;
use crate::http::local::is_loopback;

/// The longest life of a presigned URL on AWS.
const WEEK_SECONDS: u64 = 7 * 24 * 3600;

/// How long the rest of a refused body is still read: closing on a client that is sending may take the answer from it.
const PATIENCE: Duration = Duration::from_secs(5);

/// Answers every request, and is cheap to clone.
#[derive(Clone)]
pub(super) struct Front {
    s3: S3Service,
}

impl Front {
    pub(super) fn new(api: Api, access_key_id: String, secret_access_key: &str) -> Self {
        let mut builder = S3ServiceBuilder::new(api);
        builder.set_auth(Credential { access_key_id, secret: SecretKey::from(secret_access_key) });
        Self { s3: builder.build() }
    }

    pub(super) async fn answer(&self, request: Request<Incoming>) -> Result<HttpResponse, HttpError> {
        let foreign = request.headers().contains_key(header::ORIGIN);
        let (mut parts, body) = request.into_parts();
        join_encodings(&mut parts.headers);
        let body = Patient(Some(body));
        let mut response = if parts.method == Method::OPTIONS {
            preflight(&parts.headers)
        } else if let Err(error) = guard(&parts) {
            error.to_http_response().map_err(|error| HttpError::new(Box::new(error)))?
        } else {
            self.s3.call(Request::from_parts(parts, Body::http_body_unsync(body))).await?
        };
        if foreign {
            let headers = response.headers_mut();
            headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
            headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static("ETag"));
        }
        Ok(response)
    }
}

/// The one credential.
struct Credential {
    access_key_id: String,
    secret: SecretKey,
}

#[async_trait::async_trait]
impl S3Auth for Credential {
    async fn get_secret_key(&self, access_key: &str) -> S3Result<SecretKey> {
        if access_key != self.access_key_id {
            return Err(s3_error!(InvalidAccessKeyId, "The AWS Access Key Id you provided does not exist in our records."));
        }
        Ok(self.secret.clone())
    }
}

/// Lets every page send what the broker's URLs ask for, as a bucket with a CORS rule for uploads does.
fn preflight(asked: &HeaderMap) -> HttpResponse {
    let mut response = HttpResponse::new(Body::empty());
    let method = asked.get(header::ACCESS_CONTROL_REQUEST_METHOD).map(HeaderValue::as_bytes);
    let (Some(b"GET" | b"PUT" | b"HEAD"), true) = (method, asked.contains_key(header::ORIGIN)) else {
        *response.status_mut() = StatusCode::FORBIDDEN;
        return response;
    };
    let headers = response.headers_mut();
    headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, PUT, HEAD"));
    if let Some(names) = asked.get(header::ACCESS_CONTROL_REQUEST_HEADERS) {
        headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, names.clone());
    }
    headers.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("3000"));
    response
}

/// SDKs announce their chunking in a second `Content-Encoding`, and s3s takes no header twice. The signature is made
/// over the joined value in either form.
fn join_encodings(headers: &mut HeaderMap) {
    let encodings: Vec<&[u8]> = headers.get_all(header::CONTENT_ENCODING).iter().map(HeaderValue::as_bytes).collect();
    if encodings.len() > 1
        && let Ok(joined) = HeaderValue::from_bytes(&encodings.join(&b','))
    {
        headers.insert(header::CONTENT_ENCODING, joined);
    }
}

/// Refuses what AWS refuses before it looks at a signature, and what the store does not do at all.
fn guard(request: &hyper::http::request::Parts) -> S3Result<()> {
    // A page whose name was pointed at this machine asks for that name.
    let host = request.headers.get(header::HOST).and_then(|host| host.to_str().ok());
    if host.is_some_and(|host| !is_loopback(host)) {
        return Err(s3_error!(AccessDenied, "This store answers under names of this machine only."));
    }
    let text = |name| request.headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok()).unwrap_or_default();
    // Decoded just as s3s does it, so that both see the same parameters.
    let query: Vec<_> = form_urlencoded::parse(request.uri.query().unwrap_or_default().as_bytes()).collect();
    let parameter = |name: &str| query.iter().find(|(found, _)| found == name).map(|(_, value)| &**value);
    let authorization = text(header::AUTHORIZATION);
    if parameter("Signature").is_some() || authorization.starts_with("AWS ") {
        let why = "The authorization mechanism you have provided is not supported. Please use AWS4-HMAC-SHA256.";
        return Err(s3_error!(InvalidRequest, "{why}"));
    }
    if request.method == Method::POST && text(header::CONTENT_TYPE).starts_with("multipart/form-data") {
        return Err(s3_error!(NotImplemented, "Uploads by HTML forms are not implemented."));
    }
    if parameter("X-Amz-Signature").is_some() {
        let life = parameter("X-Amz-Expires").and_then(|seconds| seconds.parse().ok()).unwrap_or(0);
        if !(1..=WEEK_SECONDS).contains(&life) {
            let why = "X-Amz-Expires must be between 1 and 604800 seconds";
            return Err(S3Error::with_message(S3ErrorCode::AuthorizationQueryParametersError, why));
        }
        return all_signed(&request.headers, parameter("X-Amz-SignedHeaders").unwrap_or_default());
    }
    let signed = authorization.split([' ', ',']).find_map(|field| field.strip_prefix("SignedHeaders="));
    signed.map_or(Ok(()), |signed| all_signed(&request.headers, signed))
}

/// An `x-amz-*` header changes what a request does: whoever signed it must have known it.
fn all_signed(headers: &HeaderMap, signed: &str) -> S3Result<()> {
    let known = |name: &str| signed.split(';').any(|signed| signed.eq_ignore_ascii_case(name));
    match headers.keys().find(|name| name.as_str().starts_with("x-amz-") && !known(name.as_str())) {
        Some(name) => Err(s3_error!(AccessDenied, "There were headers present in the request which were not signed: {name}")),
        None => Ok(()),
    }
}

/// A body that is read on for a moment when nobody wants the rest of it.
struct Patient(Option<Incoming>);

impl hyper::body::Body for Patient {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let body = self.0.as_mut().expect("the body is taken only when it is dropped");
        Pin::new(body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.0.as_ref().is_none_or(Incoming::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.0.as_ref().map(Incoming::size_hint).unwrap_or_default()
    }
}

impl Drop for Patient {
    fn drop(&mut self) {
        let Some(body) = self.0.take().filter(|body| !body.is_end_stream()) else { return };
        // Outside a runtime the server itself is going away.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(tokio::time::timeout(PATIENCE, drain(body)));
        }
    }
}

async fn drain(mut body: Incoming) {
    use http_body_util::BodyExt as _;
    while let Some(Ok(_)) = body.frame().await {}
}
