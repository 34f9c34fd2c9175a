//! Handles requests before the protocol layer: the checks of AWS that s3s does not make, and CORS.

use std::net::IpAddr;
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

/// The longest lifetime of a presigned URL on AWS.
const MAX_LIFETIME_SECONDS: u64 = 7 * 24 * 3600;

/// How long the rest of a refused body is read. Closing the connection while the client sends could make the client miss
/// the response.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

/// Handles every request. Cloning is cheap.
#[derive(Clone)]
pub(super) struct RequestHandler {
    s3: S3Service,
}

impl RequestHandler {
    pub(super) fn new(api: Api, access_key_id: String, secret_access_key: &str) -> Self {
        let mut builder = S3ServiceBuilder::new(api);
        builder.set_auth(Credential { access_key_id, secret: SecretKey::from(secret_access_key) });
        Self { s3: builder.build() }
    }

    pub(super) async fn handle(&self, request: Request<Incoming>) -> Result<HttpResponse, HttpError> {
        let is_cross_origin = request.headers().contains_key(header::ORIGIN);
        let (mut parts, body) = request.into_parts();
        join_encodings(&mut parts.headers);
        let body = DrainOnDrop(Some(body));
        let mut response = if parts.method == Method::OPTIONS {
            preflight(&parts.headers)
        } else if let Err(error) = check_request(&parts) {
            error.to_http_response().map_err(|error| HttpError::new(Box::new(error)))?
        } else {
            self.s3.call(Request::from_parts(parts, Body::http_body_unsync(body))).await?
        };
        if is_cross_origin {
            let headers = response.headers_mut();
            headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
            headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static("ETag"));
        }
        Ok(response)
    }
}

/// The accepted credential.
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

/// Answers a CORS preflight: every page may send the requests of the broker's URLs, as a bucket with a CORS rule for
/// uploads allows.
fn preflight(request_headers: &HeaderMap) -> HttpResponse {
    let mut response = HttpResponse::new(Body::empty());
    let method = request_headers.get(header::ACCESS_CONTROL_REQUEST_METHOD).map(HeaderValue::as_bytes);
    let (Some(b"GET" | b"PUT" | b"HEAD"), true) = (method, request_headers.contains_key(header::ORIGIN)) else {
        *response.status_mut() = StatusCode::FORBIDDEN;
        return response;
    };
    let headers = response.headers_mut();
    headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, PUT, HEAD"));
    if let Some(names) = request_headers.get(header::ACCESS_CONTROL_REQUEST_HEADERS) {
        headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, names.clone());
    }
    headers.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("3000"));
    response
}

/// Joins several `Content-Encoding` headers. SDKs announce chunking in a second one, and s3s accepts each header only
/// once. The signature covers the joined value in both forms.
fn join_encodings(headers: &mut HeaderMap) {
    let encodings: Vec<&[u8]> = headers.get_all(header::CONTENT_ENCODING).iter().map(HeaderValue::as_bytes).collect();
    if encodings.len() > 1
        && let Ok(joined) = HeaderValue::from_bytes(&encodings.join(&b','))
    {
        headers.insert(header::CONTENT_ENCODING, joined);
    }
}

/// Checks what AWS checks before the signature, and refuses unsupported features.
fn check_request(request: &hyper::http::request::Parts) -> S3Result<()> {
    // Against DNS rebinding: a page whose host name resolves to this machine sends that name as `Host`.
    let host = request.headers.get(header::HOST).and_then(|host| host.to_str().ok());
    if host.is_some_and(|host| !is_loopback(host)) {
        return Err(s3_error!(AccessDenied, "This store answers under names of this machine only."));
    }
    let text = |name| request.headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok()).unwrap_or_default();
    // Decoded in the same way as in s3s, so that both see the same parameters.
    let query: Vec<_> = form_urlencoded::parse(request.uri.query().unwrap_or_default().as_bytes()).collect();
    let parameter = |name: &str| query.iter().find(|(found, _)| found == name).map(|(_, value)| &**value);
    let authorization = text(header::AUTHORIZATION);
    if parameter("Signature").is_some() || authorization.starts_with("AWS ") {
        let message = "The authorization mechanism you have provided is not supported. Please use AWS4-HMAC-SHA256.";
        return Err(s3_error!(InvalidRequest, "{message}"));
    }
    if request.method == Method::POST && text(header::CONTENT_TYPE).starts_with("multipart/form-data") {
        return Err(s3_error!(NotImplemented, "Uploads by HTML forms are not implemented."));
    }
    if parameter("X-Amz-Signature").is_some() {
        let lifetime_seconds = parameter("X-Amz-Expires").and_then(|seconds| seconds.parse().ok()).unwrap_or(0);
        if !(1..=MAX_LIFETIME_SECONDS).contains(&lifetime_seconds) {
            let message = "X-Amz-Expires must be between 1 and 604800 seconds";
            return Err(S3Error::with_message(S3ErrorCode::AuthorizationQueryParametersError, message));
        }
        return check_signed_headers(&request.headers, parameter("X-Amz-SignedHeaders").unwrap_or_default());
    }
    let signed = authorization.split([' ', ',']).find_map(|field| field.strip_prefix("SignedHeaders="));
    signed.map_or(Ok(()), |signed| check_signed_headers(&request.headers, signed))
}

/// Whether the host of `name:port` is a loopback address, `localhost`, or a name below it, which resolves to it (RFC 6761).
fn is_loopback(authority: &str) -> bool {
    let (host, port) = match authority.rfind(':') {
        Some(colon) if !authority.ends_with(']') => (&authority[..colon], &authority[colon + 1..]),
        _ => (authority, ""),
    };
    if !port.bytes().all(|byte| byte.is_ascii_digit()) {
        return false;
    }
    let host = host.trim_end_matches('.').to_ascii_lowercase();
    match host.trim_matches(['[', ']']).parse::<IpAddr>() {
        Ok(address) => address.to_canonical().is_loopback(),
        Err(_) => host == "localhost" || host.ends_with(".localhost"),
    }
}

/// Requires that every `x-amz-*` header is signed, because these headers change what a request does.
fn check_signed_headers(headers: &HeaderMap, signed: &str) -> S3Result<()> {
    let is_signed = |name: &str| signed.split(';').any(|signed| signed.eq_ignore_ascii_case(name));
    match headers.keys().find(|name| name.as_str().starts_with("x-amz-") && !is_signed(name.as_str())) {
        Some(name) => Err(s3_error!(AccessDenied, "There were headers present in the request which were not signed: {name}")),
        None => Ok(()),
    }
}

/// A body whose rest is read for a moment after it is dropped.
struct DrainOnDrop(Option<Incoming>);

impl hyper::body::Body for DrainOnDrop {
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

impl Drop for DrainOnDrop {
    fn drop(&mut self) {
        let Some(body) = self.0.take().filter(|body| !body.is_end_stream()) else { return };
        // Without a runtime, the server itself is shutting down.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(tokio::time::timeout(DRAIN_TIMEOUT, drain(body)));
        }
    }
}

async fn drain(mut body: Incoming) {
    use http_body_util::BodyExt as _;
    while let Some(Ok(_)) = body.frame().await {}
}

#[cfg(test)]
mod tests {
    use super::is_loopback;

    #[test]
    fn only_names_of_this_machine_are_loopback() {
        for host in
            ["localhost", "LOCALHOST:8080", "127.0.0.1:8080", "127.9.9.9", "[::1]:80", "[::1]", "a.localhost:1", "localhost."]
        {
            assert!(is_loopback(host), "{host}");
        }
        for host in
            ["evil.example", "0.0.0.0:80", "127.0.0.1.evil.example", "localhost.evil", "", ":80", "127.0.0.1:80@evil", "[::2]"]
        {
            assert!(!is_loopback(host), "{host}");
        }
    }
}
