//! Signed requests as storage gets them: one attempt each, watched, never with a token.

use std::sync::Arc;
use std::time::Duration;

use reqwest::header::{CONTENT_LENGTH, HeaderMap, HeaderName, HeaderValue, IF_MATCH, RANGE};
use reqwest::{Body, Method, Response, StatusCode};

use crate::api::SignedRequest;
use crate::error::Error;
use crate::http::{Settings, read_bounded};
use crate::progress::Meter;
use crate::retry::retry_after;

/// Who it was, in [`Error::Unreachable`].
const STORAGE: &str = "storage";

/// Longest error document that is read; S3's take a few hundred bytes.
const ERROR_BYTES: usize = 64 << 10;

/// The connections to storage, and how patient they are.
#[derive(Debug, Clone)]
pub(crate) struct Wire {
    pub(crate) http: reqwest::Client,
    pub(crate) settings: Settings,
}

/// A failed attempt, and when storage wants to be asked again.
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

/// Puts `size` bytes.
pub(crate) async fn put(wire: &Wire, request: &SignedRequest, size: u64, body: Body, meter: &Arc<Meter>) -> Result<(), Failure> {
    let mut headers = headers(request)?;
    // A streamed body without a length would go chunked, which S3 refuses.
    headers.insert(CONTENT_LENGTH, HeaderValue::from(size));
    let sending = wire.http.request(method(request)?, &request.url).headers(headers).body(body).send();
    let answered = match watched(wire.settings.stall_timeout, meter, sending).await? {
        Ok(response) => check(wire, response).await.map(drop),
        Err(error) => Err(Error::of_transport(STORAGE, error).into()),
    };
    // To the connection a source that fails looks like the peer's fault.
    answered.map_err(|failure| meter.failure().map_or(failure, |error| Error::Io(error).into()))
}

/// Gets the object, or the bytes from one on, to the end or to another one, if its tag is still that. The answer may also
/// be the whole: see its status.
pub(crate) async fn get(
    wire: &Wire,
    request: &SignedRequest,
    range: Option<(u64, Option<u64>)>,
    etag: Option<&str>,
) -> Result<Response, Failure> {
    let mut headers = headers(request)?;
    if let Some((from, last)) = range {
        let range = format!("bytes={from}-{}", last.map(|last| last.to_string()).unwrap_or_default());
        headers.insert(RANGE, value(&range)?);
    }
    if let Some(etag) = etag {
        headers.insert(IF_MATCH, value(etag)?);
    }
    let sending = wire.http.request(method(request)?, &request.url).headers(headers).send();
    let stall = wire.settings.stall_timeout;
    let response = match tokio::time::timeout(stall, sending).await {
        Ok(sent) => sent.map_err(|error| Error::of_transport(STORAGE, error))?,
        Err(_) => return Err(Error::stalled(STORAGE, stall.as_secs()).into()),
    };
    check(wire, response).await
}

/// The next bytes of an answer, or none at its end.
pub(crate) async fn chunk(wire: &Wire, response: &mut Response) -> Result<Option<bytes::Bytes>, Error> {
    let stall = wire.settings.stall_timeout;
    match tokio::time::timeout(stall, response.chunk()).await {
        Ok(read) => read.map_err(|error| Error::of_transport(STORAGE, error)),
        Err(_) => Err(Error::stalled(STORAGE, stall.as_secs())),
    }
}

/// Runs `sending` for as long as bytes move: the time of a whole transfer depends on its size, a stand-still does not.
async fn watched<T>(stall: Duration, meter: &Meter, sending: impl Future<Output = T>) -> Result<T, Error> {
    tokio::pin!(sending);
    let mut seen = meter.sent();
    loop {
        match tokio::time::timeout(stall, &mut sending).await {
            Ok(done) => return Ok(done),
            Err(_) if meter.sent() == seen => return Err(Error::stalled(STORAGE, stall.as_secs())),
            Err(_) => seen = meter.sent(),
        }
    }
}

async fn check(wire: &Wire, response: Response) -> Result<Response, Failure> {
    let status = response.status();
    if matches!(status, StatusCode::OK | StatusCode::CREATED | StatusCode::NO_CONTENT | StatusCode::PARTIAL_CONTENT) {
        return Ok(response);
    }
    let retry_after = retry_after(response.headers());
    let reading = tokio::time::timeout(wire.settings.stall_timeout, read_bounded(response, ERROR_BYTES));
    // The status alone is enough to decide by where the document is cut off.
    let body = reading.await.ok().and_then(Result::ok).flatten().unwrap_or_default();
    Err(Failure { error: Error::of_storage(status.as_u16(), &body), retry_after })
}

fn value(text: &str) -> Result<HeaderValue, Error> {
    HeaderValue::try_from(text).map_err(|_| Error::Invalid(format!("{text:?} has no header form")))
}

fn method(request: &SignedRequest) -> Result<Method, Error> {
    let wrong = |_| Error::Unexpected { status: 200, detail: "the signed request has no HTTP method".to_owned() };
    Method::from_bytes(request.method.as_bytes()).map_err(wrong)
}

fn headers(request: &SignedRequest) -> Result<HeaderMap, Error> {
    let mut headers = HeaderMap::with_capacity(request.headers.len());
    for (name, value) in &request.headers {
        let pair = HeaderName::try_from(name).ok().zip(HeaderValue::try_from(value).ok());
        let wrong = || Error::Unexpected { status: 200, detail: format!("the signed header {name} is not a header") };
        let (name, value) = pair.ok_or_else(wrong)?;
        headers.insert(name, value);
    }
    Ok(headers)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Tally;
    use std::task::Poll;

    /// Each poll finds the stall's time over, for it is zero: what counts is whether bytes moved in between.
    #[tokio::test]
    async fn a_transfer_may_take_long_but_not_stand_still() {
        let meter = Meter::new(&Arc::new(Tally::new(10, 1, None)));
        let mut polls = 0;
        let slow = std::future::poll_fn(|cx| {
            polls += 1;
            meter.add(1);
            cx.waker().wake_by_ref();
            if polls < 10 { Poll::Pending } else { Poll::Ready(()) }
        });
        assert!(watched(Duration::ZERO, &meter, slow).await.is_ok());
        let stuck = std::future::pending::<()>();
        let error = watched(Duration::ZERO, &meter, stuck).await.unwrap_err();
        assert_eq!(error.to_string(), "storage cannot be reached: no byte moved for 0 seconds");
    }
}
