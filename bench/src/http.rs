//! A small HTTP client for load: one connection to each server, and no work beside the request.

use std::collections::HashMap;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{CONNECTION, HOST, HeaderMap};
use hyper::{Method, Request, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use crate::Failure;

/// How much of a response body an error shows.
const MAX_SHOWN_BYTES: usize = 300;

/// The connections of one client, at most one to each server.
#[derive(Default)]
pub(crate) struct HttpClient {
    connections: HashMap<String, SendRequest<Full<Bytes>>>,
}

/// A response whose body was read.
pub(crate) struct Response {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl HttpClient {
    /// Sends a request and reads the whole response. `url` is absolute, and only `http` is supported.
    pub(crate) async fn send(
        &mut self,
        method: Method,
        url: &str,
        headers: &[(&str, &str)],
        body: Bytes,
    ) -> Result<Response, Failure> {
        let uri: Uri = url.parse().map_err(|error| Failure(format!("{url} is not a URL: {error}")))?;
        let (Some(authority), Some(path)) = (uri.authority(), uri.path_and_query()) else {
            return Err(Failure(format!("{url} has no host or no path")));
        };
        let mut request = Request::builder().method(method.clone()).uri(path.as_str()).header(HOST, authority.as_str());
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::new(body)).map_err(|error| Failure(format!("{method} {url}: {error}")))?;
        let failed = |error: hyper::Error| Failure(format!("{method} {}: {error}", path.path()));
        let sender = self.connection(authority.as_str()).await?;
        let response = sender.send_request(request).await.map_err(failed)?;
        let (head, body) = response.into_parts();
        let body = body.collect().await.map_err(failed)?.to_bytes();
        // The server announced the end of the connection. `is_closed` may notice it only after the next request was sent.
        if head.headers.get(CONNECTION).is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"close")) {
            self.connections.remove(authority.as_str());
        }
        Ok(Response { status: head.status, headers: head.headers, body })
    }

    async fn connection(&mut self, authority: &str) -> Result<&mut SendRequest<Full<Bytes>>, Failure> {
        let is_usable = match self.connections.get_mut(authority) {
            Some(sender) => sender.ready().await.is_ok(),
            None => false,
        };
        if !is_usable {
            let stream = TcpStream::connect(authority).await;
            let stream = stream.map_err(|error| Failure(format!("cannot connect to {authority}: {error}")))?;
            stream.set_nodelay(true)?;
            let opened = http1::handshake(TokioIo::new(stream)).await;
            let (sender, connection) = opened.map_err(|error| Failure(format!("{authority}: {error}")))?;
            // The task ends when the sender is dropped. An error of the connection also reaches the request.
            tokio::spawn(async move { drop(connection.await) });
            self.connections.insert(authority.to_owned(), sender);
        }
        self.connections.get_mut(authority).ok_or_else(|| Failure(format!("no connection to {authority}")))
    }
}

impl Response {
    /// The response, if it has one of these status codes.
    pub(crate) fn expect(self, statuses: &[u16]) -> Result<Self, Failure> {
        if statuses.contains(&self.status.as_u16()) {
            return Ok(self);
        }
        let body = String::from_utf8_lossy(&self.body[..self.body.len().min(MAX_SHOWN_BYTES)]).into_owned();
        Err(Failure(format!("the status is {}, expected {statuses:?}: {body}", self.status)))
    }

    /// Parses the body as JSON.
    pub(crate) fn json<T: serde::de::DeserializeOwned>(&self) -> Result<T, Failure> {
        serde_json::from_slice(&self.body).map_err(|error| Failure(format!("the response is not the expected JSON: {error}")))
    }

    /// A header's text.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }
}
