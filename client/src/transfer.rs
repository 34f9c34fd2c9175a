//! Downloads from S3: in one stream, or in ranges that are read concurrently. Broken connections are retried.
//!
//! The declared size is the limit: no byte beyond it is accepted, and every response is checked against it.

use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf as _, Bytes};
use futures_util::stream::{self, BoxStream, StreamExt as _};
use reqwest::header::{CONTENT_RANGE, ETAG};
use reqwest::{Response, StatusCode};
use tokio::sync::Mutex;
use tokio::task::JoinHandle;

use crate::access::{Access, ObjectLocation};
use crate::api::{ErrorCode, ResolveAnswer, ResolveOptions, Resolved, SignedRequest};
use crate::checksum::Digest;
use crate::error::{Error, quote};
use crate::http::Client;
use crate::retry::Backoff;
use crate::storage::{self, StorageClient};

/// An object of at least this size is read in concurrent ranges. For smaller objects, more connections cost more than
/// they save.
const MIN_SIZE_FOR_RANGES_BYTES: u64 = 32 << 20;

/// The size of one range. All ranges that are read concurrently are in memory.
const RANGE_BYTES: u64 = 8 << 20;

/// Progress of this many bytes resets the retries. A lower limit would let a server that sends a few bytes per connection
/// keep the download running without an end.
const MIN_PROGRESS_BYTES: u64 = 1 << 20;

/// The most new signatures of one range without progress in between.
const MAX_NEW_SIGNATURES: u32 = 2;

/// The size and the digest that the bytes must match.
#[derive(Debug, Clone)]
pub(crate) struct Expected {
    /// The exact size, if a pointer declares it.
    pub(crate) size: Option<u64>,
    /// The most bytes that are accepted.
    pub(crate) limit: u64,
    pub(crate) digest: Option<Digest>,
}

/// The source of the signed GETs.
#[derive(Debug)]
pub(crate) enum UrlSigner {
    /// The broker, which resolves the record's value.
    Broker { client: Client, value: Bytes, options: ResolveOptions },
    /// The caller's access to S3.
    Access { access: Access, location: ObjectLocation },
}

/// The object to download, shared by all its ranges.
pub(crate) struct DownloadSource {
    storage_client: StorageClient,
    signer: UrlSigner,
    expected: Expected,
    cached: Mutex<CachedUrl>,
    /// The ETag in the first response. Bytes of an object with another ETag are not accepted.
    etag: OnceLock<String>,
}

/// The last signed request, and how many were signed so far.
#[derive(Default)]
struct CachedUrl {
    request: Option<SignedRequest>,
    generation: u32,
    resolved: Option<Resolved>,
}

impl DownloadSource {
    pub(crate) fn new(storage_client: StorageClient, signer: UrlSigner, expected: Expected) -> Arc<Self> {
        Arc::new(Self { storage_client, signer, expected, cached: Mutex::default(), etag: OnceLock::new() })
    }

    /// The broker's last response to resolve.
    pub(crate) async fn resolved(&self) -> Option<Resolved> {
        self.cached.lock().await.resolved.clone()
    }

    /// A signed GET, and its generation.
    async fn request(&self) -> Result<(SignedRequest, u32), Error> {
        let mut cached = self.cached.lock().await;
        if let Some(request) = &cached.request {
            return Ok((request.clone(), cached.generation));
        }
        // The lock is held while signing, so that the other ranges use this request.
        let request = match &self.signer {
            UrlSigner::Access { access, location } => access.sign(location).await?,
            UrlSigner::Broker { client, value, options } => {
                let resolved = self.resolve(client, value, options).await?;
                cached.resolved.insert(resolved).request.clone()
            }
        };
        cached.generation += 1;
        Ok((cached.request.insert(request).clone(), cached.generation))
    }

    async fn resolve(&self, client: &Client, value: &[u8], options: &ResolveOptions) -> Result<Resolved, Error> {
        let response = client.resolve(value, options).await.map_err(|error| match error {
            // The broker compared the object with the pointer, and their sizes differ.
            Error::Refused(problem) if problem.known_code() == Some(ErrorCode::SizeMismatch) => Error::WrongSize(problem.detail),
            error => error,
        });
        match response? {
            ResolveAnswer::Resolved(resolved) => match self.expected.size {
                Some(size) if size != resolved.size => {
                    let found = resolved.size;
                    Err(Error::WrongSize(format!("the pointer declares {size} bytes, but the object has {found}")))
                }
                _ => Ok(resolved),
            },
            ResolveAnswer::Validated(_) => {
                let detail = "the broker validated the pointer instead of resolving it".to_owned();
                Err(Error::Unexpected { status: 200, detail })
            }
        }
    }

    /// Discards a refused signature, unless another range has already replaced it.
    async fn discard_signature(&self, generation: u32) {
        let mut cached = self.cached.lock().await;
        if cached.generation == generation {
            cached.request = None;
        }
    }

    /// Converts an error of S3 to its meaning for a download.
    fn classify(&self, error: Error) -> Error {
        match error {
            Error::Storage { status: 404, .. } => Error::Missing,
            Error::Storage { status: 412, .. } if self.etag.get().is_some() => {
                Error::Corrupt { expected: "the object of the earlier bytes".to_owned(), found: "another object".to_owned() }
            }
            Error::Storage { status: 403, .. } if matches!(self.signer, UrlSigner::Access { .. }) => {
                Error::Forbidden { reason: error.to_string(), problem: None }
            }
            error => error,
        }
    }
}

/// Starts the download. Returns the size and the bytes in order, not yet compared with the digest.
pub(crate) async fn start(
    source: &Arc<DownloadSource>,
    concurrency: usize,
) -> Result<(u64, BoxStream<'static, Result<Bytes, Error>>), Error> {
    let (size, limit) = (source.expected.size, source.expected.limit);
    let in_ranges = size.is_some_and(|size| size >= MIN_SIZE_FOR_RANGES_BYTES) && concurrency > 1;
    let end = if in_ranges { Some(RANGE_BYTES) } else { size };
    let mut first = RangeReader::new(source, 0, end);
    first.connect().await?;
    // Without a declared size, the first response has set `end`, or the size is unknown.
    let (size, end) = match (size.or(first.end), first.end) {
        (Some(size), Some(end)) if size <= limit => (size, end),
        (Some(size), _) => return Err(Error::TooLarge { size, limit }),
        (None, _) => {
            return Err(Error::Unexpected { status: 200, detail: "storage did not send the size of the object".to_owned() });
        }
    };
    if end == size {
        return Ok((size, first.stream()));
    }
    let source = Arc::clone(source);
    let starts = (1..size.div_ceil(RANGE_BYTES)).map(|number| number * RANGE_BYTES);
    let rest = starts.map(move |position| RangeReader::new(&source, position, Some((position + RANGE_BYTES).min(size))));
    // Each range has its own task, so that bytes arrive while others are hashed and written.
    let ranges = stream::iter(std::iter::once(first).chain(rest)).map(|reader| AbortOnDrop(tokio::spawn(reader.collect())));
    Ok((size, ranges.buffered(concurrency).boxed()))
}

/// A task that is aborted when its handle is dropped.
struct AbortOnDrop<T>(JoinHandle<Result<T, Error>>);

impl<T> Drop for AbortOnDrop<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl<T> Future for AbortOnDrop<T> {
    type Output = Result<T, Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(cx).map(|joined| joined.unwrap_or_else(|error| Err(std::io::Error::from(error).into())))
    }
}

/// Reads a range of the object. A broken connection is replaced by a new one.
struct RangeReader {
    source: Arc<DownloadSource>,
    /// The offset of the next byte.
    position: u64,
    /// The end of the range, once it is known.
    end: Option<u64>,
    response: Option<Response>,
    /// Bytes of the current response before `position`, if S3 ignored the range.
    skip: u64,
    backoff: Backoff,
    /// The `position` at which the retries were last reset.
    last_reset_position: u64,
    signatures: u32,
}

impl RangeReader {
    fn new(source: &Arc<DownloadSource>, position: u64, end: Option<u64>) -> Self {
        let backoff = Backoff::new(source.storage_client.settings.retry);
        Self {
            source: Arc::clone(source),
            position,
            end,
            response: None,
            skip: 0,
            backoff,
            last_reset_position: position,
            signatures: 0,
        }
    }

    /// The size of the whole object, declared or learned from a response.
    fn size(&self) -> Option<u64> {
        self.source.expected.size.or(self.end)
    }

    fn stream(self) -> BoxStream<'static, Result<Bytes, Error>> {
        stream::try_unfold(self, |mut reader| async { Ok(reader.next().await?.map(|chunk| (chunk, reader))) }).boxed()
    }

    async fn collect(mut self) -> Result<Bytes, Error> {
        let capacity = self.end.unwrap_or_default().saturating_sub(self.position).min(RANGE_BYTES);
        let mut bytes = Vec::with_capacity(usize::try_from(capacity).unwrap_or_default());
        while let Some(chunk) = self.next().await? {
            bytes.extend_from_slice(&chunk);
        }
        Ok(bytes.into())
    }

    /// Reads the next chunk. Reconnects if the connection breaks.
    async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        loop {
            if self.end == Some(self.position) {
                return Ok(None);
            }
            let Some(response) = &mut self.response else {
                self.connect().await?;
                continue;
            };
            match storage::chunk(&self.source.storage_client, response).await {
                Ok(Some(chunk)) => {
                    if let Some(chunk) = self.accept_chunk(chunk).await? {
                        return Ok(Some(chunk));
                    }
                }
                Ok(None) => return Err(self.size_mismatch(format!("{} bytes", self.position))),
                Err(error) => self.wait_or_fail(error, None).await?,
            }
        }
    }

    /// Keeps the bytes of the range. After the range, only the rest of an object that was not requested may follow.
    async fn accept_chunk(&mut self, mut chunk: Bytes) -> Result<Option<Bytes>, Error> {
        let skipped = self.skip.min(chunk.len() as u64);
        self.skip -= skipped;
        chunk.advance(usize::try_from(skipped).expect("no longer than the chunk"));
        let left = self.end.unwrap_or(u64::MAX) - self.position;
        if chunk.len() as u64 > left {
            if self.end == self.size() {
                return Err(self.size_mismatch("more".to_owned()));
            }
            chunk.truncate(usize::try_from(left).expect("shorter than the chunk"));
        }
        self.position += chunk.len() as u64;
        if self.end == Some(self.position) {
            let response = self.response.take();
            if let (Some(mut response), true) = (response, self.end == self.size()) {
                // A connection that breaks after the last byte does no harm, because the digest is checked.
                while let Ok(Some(more)) = storage::chunk(&self.source.storage_client, &mut response).await {
                    if !more.is_empty() {
                        return Err(self.size_mismatch("more".to_owned()));
                    }
                }
            }
        }
        Ok(Some(chunk).filter(|chunk| !chunk.is_empty()))
    }

    fn size_mismatch(&self, found: String) -> Error {
        Error::Corrupt { expected: format!("{} bytes", self.size().unwrap_or_default()), found }
    }

    /// Requests the rest of the range from S3, and signs the request if needed.
    async fn connect(&mut self) -> Result<(), Error> {
        loop {
            let (request, generation) = self.source.request().await?;
            let last = self.end.filter(|end| Some(*end) != self.size()).map(|end| end - 1);
            let range = (self.position > 0 || last.is_some()).then_some((self.position, last));
            match storage::get(&self.source.storage_client, &request, range, self.source.etag.get().map(String::as_str)).await {
                Ok(response) => return self.accept_response(response),
                Err(failure) if failure.error.needs_new_signature() && self.signatures < MAX_NEW_SIGNATURES => {
                    self.signatures += 1;
                    self.source.discard_signature(generation).await;
                }
                Err(failure) => self.wait_or_fail(failure.error, failure.retry_after).await?,
            }
        }
    }

    /// Accepts a response: the requested range, or the whole object, whose bytes before `position` are skipped.
    fn accept_response(&mut self, response: Response) -> Result<(), Error> {
        let partial = response.status() == StatusCode::PARTIAL_CONTENT;
        if partial {
            let range = response.headers().get(CONTENT_RANGE).and_then(|range| range.to_str().ok()).unwrap_or_default();
            if !range.starts_with(&format!("bytes {}-", self.position)) {
                let detail = format!("requested the bytes from {}, got the range {:?}", self.position, quote(range));
                return Err(Error::Unexpected { status: 206, detail });
            }
            let total = range.rsplit_once('/').and_then(|(_, total)| total.parse::<u64>().ok());
            if let (Some(total), Some(size)) = (total, self.size())
                && total != size
            {
                return Err(self.size_mismatch(format!("{total} bytes")));
            }
        } else if self.position == 0 && self.end != self.size() {
            // S3 servers that ignore ranges send the whole object each time, so it is read only once.
            self.end = self.size();
        }
        self.skip = if partial { 0 } else { self.position };
        let length = response.content_length();
        self.end = self.end.or(length);
        let expected = if partial { self.end.map(|end| end - self.position) } else { self.size() };
        if let (Some(length), Some(expected)) = (length, expected)
            && length != expected
        {
            return Err(Error::Corrupt { expected: format!("{expected} bytes"), found: format!("{length} bytes") });
        }
        // Objects with the same weak ETag may have different bytes.
        let tag = response.headers().get(ETAG).and_then(|tag| tag.to_str().ok()).filter(|tag| tag.starts_with('"'));
        if let Some(tag) = tag {
            self.source.etag.get_or_init(|| tag.to_owned());
        }
        self.response = Some(response);
        Ok(())
    }

    /// Waits before the next attempt, or returns the error if there is none.
    async fn wait_or_fail(&mut self, error: Error, retry_after: Option<Duration>) -> Result<(), Error> {
        self.response = None;
        if self.position - self.last_reset_position >= MIN_PROGRESS_BYTES {
            self.last_reset_position = self.position;
            self.signatures = 0;
            self.backoff.reset();
        }
        match if error.is_transient() { self.backoff.next(retry_after) } else { None } {
            Some(wait) => {
                self.source.storage_client.retry_reporter.report_and_wait(&error, wait, &self.backoff).await;
                Ok(())
            }
            None => Err(self.source.classify(error)),
        }
    }
}
