//! The parts that every request shares: the timeouts, the HTTP client, and responses of limited length.

use std::time::Duration;

use bytes::Bytes;

use crate::error::Error;
use crate::retry::Retry;

/// The connect timeout. It is short, so that an address that does not answer leaves time for retries.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Timeouts and retries of a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// The longest wait for a response of the broker. A long poll adds its `wait`.
    pub request_timeout: Duration,
    /// The longest time without a byte to or from storage. A whole transfer has no time limit, because its duration
    /// depends on its size.
    pub stall_timeout: Duration,
    /// The retries of each call to the broker, each part, and each break of a download.
    pub retry: Retry,
}

impl Default for Settings {
    /// A minute each. The broker answers within seconds or sends 503, and S3 can need a minute on a slow disk.
    fn default() -> Self {
        Self { request_timeout: Duration::from_secs(60), stall_timeout: Duration::from_secs(60), retry: Retry::default() }
    }
}

/// An HTTP client that follows no redirect: a presigned request is valid for one host, and a token is for one broker.
pub(crate) fn http_client() -> Result<reqwest::Client, Error> {
    let builder = || {
        reqwest::Client::builder()
            .user_agent(concat!("lfs-broker-client/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_TIMEOUT)
            .redirect(reqwest::redirect::Policy::none())
    };
    // Without CA certificates, for example in a bare container, http still works and https fails at the handshake.
    builder()
        .build()
        .or_else(|_| builder().tls_certs_only([]).build())
        .map_err(|error| Error::Invalid(format!("no HTTP client can be built: {error}")))
}

/// Reads a body, or returns `None` if it is longer than `limit`.
pub(crate) async fn read_bounded(mut response: reqwest::Response, limit: usize) -> Result<Option<Bytes>, reqwest::Error> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await? {
        if body.len() + chunk.len() > limit {
            return Ok(None);
        }
        body.extend_from_slice(&chunk);
    }
    Ok(Some(body.into()))
}
