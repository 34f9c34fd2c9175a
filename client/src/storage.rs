//! Sends signed requests to S3: one attempt each, with a stall timeout, and never with the broker's token.

use std::sync::Arc;
use std::time::Duration;

use reqwest::header::{CONTENT_LENGTH, HeaderMap, HeaderName, HeaderValue, IF_MATCH, RANGE};
use reqwest::{Body, Method, Response, StatusCode};

use crate::api::SignedRequest;
use crate::error::Error;
use crate::http_client::{Settings, read_bounded};
use crate::progress::AttemptCounter;
use crate::retry::{RetryReporter, retry_after};

/// The `peer` of [`Error::Unreachable`].
const STORAGE: &str = "storage";

/// The longest error document that is read. S3's take a few hundred bytes.
const MAX_ERROR_BYTES: usize = 64 << 10;

/// The HTTP client for S3, with its timeouts and retries.
#[derive(Debug, Clone)]
pub(crate) struct StorageClient {
    pub(crate) http: reqwest::Client,
    pub(crate) settings: Settings,
    pub(crate) retry_reporter: RetryReporter,
}

/// A failed attempt, with the `Retry-After` of S3.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) error: Error,
    pub(crate) retry_after: Option<Duration>,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self { error, retry_after: None }
    }
}

/// Sends a PUT of `size` bytes.
pub(crate) async fn put(
    client: &StorageClient,
    request: &SignedRequest,
    size: u64,
    body: Body,
    counter: &Arc<AttemptCounter>,
) -> Result<(), Failure> {
    let mut headers = headers(request)?;
    // Without a length, a streamed body is sent chunked, which S3 refuses.
    headers.insert(CONTENT_LENGTH, HeaderValue::from(size));
    let sending = client.http.request(method(request)?, &request.url).headers(headers).body(body).send();
    let answered = match with_stall_timeout(client.settings.stall_timeout, counter, sending).await? {
        Ok(response) => check_status(client, response).await.map(drop),
        Err(error) => Err(Error::from_transport(STORAGE, error).into()),
    };
    // The HTTP client reports a failed source as a failed connection, so the source's own error replaces it.
    answered.map_err(|failure| counter.take_source_error().map_or(failure, |error| Error::Io(error).into()))
}

/// Sends a GET of the object, or of `range`: first byte, and last byte or the end. With `etag`, only if the object still
/// has this ETag. S3 may send the whole object instead of the range: see the response's status.
pub(crate) async fn get(
    client: &StorageClient,
    request: &SignedRequest,
    range: Option<(u64, Option<u64>)>,
    etag: Option<&str>,
) -> Result<Response, Failure> {
    let mut headers = headers(request)?;
    if let Some((from, last)) = range {
        let range = format!("bytes={from}-{}", last.map(|last| last.to_string()).unwrap_or_default());
        headers.insert(RANGE, header_value(&range)?);
    }
    if let Some(etag) = etag {
        headers.insert(IF_MATCH, header_value(etag)?);
    }
    let sending = client.http.request(method(request)?, &request.url).headers(headers).send();
    let stall_timeout = client.settings.stall_timeout;
    let response = match tokio::time::timeout(stall_timeout, sending).await {
        Ok(sent) => sent.map_err(|error| Error::from_transport(STORAGE, error))?,
        Err(_) => return Err(Error::stalled(STORAGE, stall_timeout.as_secs()).into()),
    };
    check_status(client, response).await
}

/// Reads the next chunk of a response, or `None` at its end.
pub(crate) async fn chunk(client: &StorageClient, response: &mut Response) -> Result<Option<bytes::Bytes>, Error> {
    let stall_timeout = client.settings.stall_timeout;
    match tokio::time::timeout(stall_timeout, response.chunk()).await {
        Ok(read) => read.map_err(|error| Error::from_transport(STORAGE, error)),
        Err(_) => Err(Error::stalled(STORAGE, stall_timeout.as_secs())),
    }
}

/// Runs `sending` until it ends or stalls. The duration of a whole transfer depends on its size, so only the time without
/// a byte is limited.
async fn with_stall_timeout<T>(
    stall_timeout: Duration,
    counter: &AttemptCounter,
    sending: impl Future<Output = T>,
) -> Result<T, Error> {
    tokio::pin!(sending);
    let mut seen = counter.sent_bytes();
    loop {
        match tokio::time::timeout(stall_timeout, &mut sending).await {
            Ok(done) => return Ok(done),
            Err(_) if counter.sent_bytes() == seen => return Err(Error::stalled(STORAGE, stall_timeout.as_secs())),
            Err(_) => seen = counter.sent_bytes(),
        }
    }
}

async fn check_status(client: &StorageClient, response: Response) -> Result<Response, Failure> {
    let status = response.status();
    if matches!(status, StatusCode::OK | StatusCode::CREATED | StatusCode::NO_CONTENT | StatusCode::PARTIAL_CONTENT) {
        return Ok(response);
    }
    let retry_after = retry_after(response.headers());
    let reading = tokio::time::timeout(client.settings.stall_timeout, read_bounded(response, MAX_ERROR_BYTES));
    // If the error document cannot be read, the status alone decides what follows.
    let body = reading.await.ok().and_then(Result::ok).flatten().unwrap_or_default();
    Err(Failure { error: Error::from_storage(status.as_u16(), &body), retry_after })
}

fn header_value(text: &str) -> Result<HeaderValue, Error> {
    HeaderValue::try_from(text).map_err(|_| Error::Invalid(format!("{text:?} cannot be the value of an HTTP header")))
}

fn method(request: &SignedRequest) -> Result<Method, Error> {
    let invalid = |_| Error::Unexpected { status: 200, detail: "the signed request has no HTTP method".to_owned() };
    Method::from_bytes(request.method.as_bytes()).map_err(invalid)
}

fn headers(request: &SignedRequest) -> Result<HeaderMap, Error> {
    let mut headers = HeaderMap::with_capacity(request.headers.len());
    for (name, value) in &request.headers {
        let pair = HeaderName::try_from(name).ok().zip(HeaderValue::try_from(value).ok());
        let invalid =
            || Error::Unexpected { status: 200, detail: format!("the signed header {name} is not a valid HTTP header") };
        let (name, value) = pair.ok_or_else(invalid)?;
        headers.insert(name, value);
    }
    Ok(headers)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::ProgressTotals;
    use std::task::Poll;

    /// The stall timeout is zero, so it has passed at each poll. Only the transfer of a byte in between prevents the
    /// error.
    #[tokio::test]
    async fn a_slow_transfer_continues_and_a_stalled_one_fails() {
        let counter = AttemptCounter::new(&Arc::new(ProgressTotals::new(10, 1, None)));
        let mut polls = 0;
        let slow = std::future::poll_fn(|cx| {
            polls += 1;
            counter.add(1);
            cx.waker().wake_by_ref();
            if polls < 10 { Poll::Pending } else { Poll::Ready(()) }
        });
        assert!(with_stall_timeout(Duration::ZERO, &counter, slow).await.is_ok());
        let stuck = std::future::pending::<()>();
        let error = with_stall_timeout(Duration::ZERO, &counter, stuck).await.unwrap_err();
        assert_eq!(error.to_string(), "storage cannot be reached: no byte was transferred for 0 s");
    }
}
