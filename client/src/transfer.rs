//! Bytes on their way from storage: over as many connections as it takes, in one stream or in pieces side by side.
//!
//! What was promised is the cap: no byte beyond it is taken, and every answer is held against it.

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

use crate::access::{Access, Place};
use crate::api::{ErrorCode, ResolveAnswer, ResolveOptions, Resolved, SignedRequest};
use crate::checksum::Digest;
use crate::error::{Error, quote};
use crate::http::Client;
use crate::retry::Backoff;
use crate::storage::{self, Wire};

/// From this size on an object comes in pieces: below, more connections cost more than they bring.
const PIECES_FROM: u64 = 32 << 20;

/// A piece: as many as come side by side are held in memory.
const PIECE_BYTES: u64 = 8 << 20;

/// Bytes that make a broken download worth new attempts: fewer would let a peer string it along for ever.
const PROGRESS_BYTES: u64 = 1 << 20;

/// How often a request may be signed again because it ran out without progress in between.
const SIGNATURES: u32 = 2;

/// What the bytes are held against.
#[derive(Debug, Clone)]
pub(crate) struct Promise {
    /// The exact size, where there is a pointer to name it.
    pub(crate) size: Option<u64>,
    /// No more than this is taken.
    pub(crate) limit: u64,
    pub(crate) digest: Option<Digest>,
}

/// Who says where the bytes are.
#[derive(Debug)]
pub(crate) enum Target {
    /// The broker, asked with the record's value.
    Broker { client: Client, value: Bytes, options: ResolveOptions },
    /// Own access.
    Own { access: Access, place: Place },
}

/// The way to one object, shared by all its pieces.
pub(crate) struct Link {
    wire: Wire,
    target: Target,
    promise: Promise,
    held: Mutex<Held>,
    /// The object's tag in the first answer: bytes of another object are not joined to it.
    etag: OnceLock<String>,
}

/// The last signature, and how many there were before.
#[derive(Default)]
struct Held {
    request: Option<SignedRequest>,
    generation: u32,
    resolved: Option<Resolved>,
}

impl Link {
    pub(crate) fn new(wire: Wire, target: Target, promise: Promise) -> Arc<Self> {
        Arc::new(Self { wire, target, promise, held: Mutex::default(), etag: OnceLock::new() })
    }

    /// What the broker said last.
    pub(crate) async fn resolved(&self) -> Option<Resolved> {
        self.held.lock().await.resolved.clone()
    }

    /// A signed GET, and which one it is.
    async fn request(&self) -> Result<(SignedRequest, u32), Error> {
        let mut held = self.held.lock().await;
        if let Some(request) = &held.request {
            return Ok((request.clone(), held.generation));
        }
        // The lock is held on purpose: other pieces find the answer.
        let request = match &self.target {
            Target::Own { access, place } => access.sign(place).await?,
            Target::Broker { client, value, options } => {
                let resolved = self.ask(client, value, options).await?;
                held.resolved.insert(resolved).request.clone()
            }
        };
        held.generation += 1;
        Ok((held.request.insert(request).clone(), held.generation))
    }

    async fn ask(&self, client: &Client, value: &[u8], options: &ResolveOptions) -> Result<Resolved, Error> {
        let answer = client.resolve(value, options).await.map_err(|error| match error {
            // The broker looked, and the object is not the one of the pointer.
            Error::Refused(problem) if problem.known_code() == Some(ErrorCode::SizeMismatch) => {
                let expected = self.promise.size.map_or("the pointer's size".to_owned(), |size| format!("{size} bytes"));
                Error::Corrupt { expected, found: problem.detail }
            }
            error => error,
        });
        match answer? {
            ResolveAnswer::Resolved(resolved) => match self.promise.size {
                Some(size) if size != resolved.size => Err(Error::Corrupt {
                    expected: format!("{size} bytes"),
                    found: format!("an object of {} bytes", resolved.size),
                }),
                _ => Ok(resolved),
            },
            ResolveAnswer::Validated(_) => {
                let detail = "a pointer was to be resolved and was only validated".to_owned();
                Err(Error::Unexpected { status: 200, detail })
            }
        }
    }

    /// Forgets a signature that was refused, unless another piece did already.
    async fn refused(&self, generation: u32) {
        let mut held = self.held.lock().await;
        if held.generation == generation {
            held.request = None;
        }
    }

    /// What a failure means here.
    fn sorted(&self, error: Error) -> Error {
        match error {
            Error::Storage { status: 404, .. } => Error::Missing,
            Error::Storage { status: 412, .. } if self.etag.get().is_some() => {
                Error::Corrupt { expected: "the object that the bytes before came from".to_owned(), found: "another".to_owned() }
            }
            Error::Storage { status: 403, .. } if matches!(self.target, Target::Own { .. }) => {
                Error::Forbidden { reason: error.to_string(), problem: None }
            }
            error => error,
        }
    }
}

/// Begins to fetch: the size, and the bytes in their order, not yet held against the digest.
pub(crate) async fn begin(link: &Arc<Link>, lanes: usize) -> Result<(u64, BoxStream<'static, Result<Bytes, Error>>), Error> {
    let (size, limit) = (link.promise.size, link.promise.limit);
    let in_pieces = size.is_some_and(|size| size >= PIECES_FROM) && lanes > 1;
    let end = if in_pieces { Some(PIECE_BYTES) } else { size };
    let mut first = Stretch::new(link, 0, end);
    first.connect().await?;
    // One that has no promised size has learnt it, or has no end at all.
    let (size, end) = match (size.or(first.end), first.end) {
        (Some(size), Some(end)) if size <= limit => (size, end),
        (Some(size), _) => return Err(Error::TooLarge { size, limit }),
        (None, _) => return Err(Error::Unexpected { status: 200, detail: "storage does not say how large it is".to_owned() }),
    };
    if end == size {
        return Ok((size, first.stream()));
    }
    let link = Arc::clone(link);
    let starts = (1..size.div_ceil(PIECE_BYTES)).map(|number| number * PIECE_BYTES);
    let rest = starts.map(move |at| Stretch::new(&link, at, Some((at + PIECE_BYTES).min(size))));
    // Each in a task of its own, so that bytes arrive while others are hashed and written.
    let pieces = stream::iter(std::iter::once(first).chain(rest)).map(|stretch| Task(tokio::spawn(stretch.collect())));
    Ok((size, pieces.buffered(lanes).boxed()))
}

/// A task that ends with whoever waits for it.
struct Task<T>(JoinHandle<Result<T, Error>>);

impl<T> Drop for Task<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl<T> Future for Task<T> {
    type Output = Result<T, Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(cx).map(|joined| joined.unwrap_or_else(|error| Err(std::io::Error::from(error).into())))
    }
}

/// A stretch of the object, read over as many connections as it takes.
struct Stretch {
    link: Arc<Link>,
    /// Where it goes on.
    at: u64,
    /// Where it ends, once that is known.
    end: Option<u64>,
    response: Option<Response>,
    /// Bytes of the current answer that lie before `at`, where storage ignores ranges.
    skip: u64,
    backoff: Backoff,
    /// `at` when the attempts were last counted from the start.
    counted_from: u64,
    signatures: u32,
}

impl Stretch {
    fn new(link: &Arc<Link>, at: u64, end: Option<u64>) -> Self {
        let backoff = Backoff::new(link.wire.settings.retry);
        Self { link: Arc::clone(link), at, end, response: None, skip: 0, backoff, counted_from: at, signatures: 0 }
    }

    /// The whole object's size, as promised or as learnt.
    fn size(&self) -> Option<u64> {
        self.link.promise.size.or(self.end)
    }

    fn stream(self) -> BoxStream<'static, Result<Bytes, Error>> {
        stream::try_unfold(self, |mut stretch| async { Ok(stretch.next().await?.map(|chunk| (chunk, stretch))) }).boxed()
    }

    async fn collect(mut self) -> Result<Bytes, Error> {
        let room = self.end.unwrap_or_default().saturating_sub(self.at).min(PIECE_BYTES);
        let mut bytes = Vec::with_capacity(usize::try_from(room).unwrap_or_default());
        while let Some(chunk) = self.next().await? {
            bytes.extend_from_slice(&chunk);
        }
        Ok(bytes.into())
    }

    /// The next piece, connecting again where the connection breaks.
    async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        loop {
            if self.end == Some(self.at) {
                return Ok(None);
            }
            let Some(response) = &mut self.response else {
                self.connect().await?;
                continue;
            };
            match storage::chunk(&self.link.wire, response).await {
                Ok(Some(chunk)) => {
                    if let Some(chunk) = self.take(chunk).await? {
                        return Ok(Some(chunk));
                    }
                }
                Ok(None) => return Err(self.corrupt(format!("{} bytes", self.at))),
                Err(error) => self.pause(error, None).await?,
            }
        }
    }

    /// Takes what belongs to the stretch; at its end nothing may follow but the rest of what was not asked for.
    async fn take(&mut self, mut chunk: Bytes) -> Result<Option<Bytes>, Error> {
        let skipped = self.skip.min(chunk.len() as u64);
        self.skip -= skipped;
        chunk.advance(usize::try_from(skipped).expect("no longer than the chunk"));
        let left = self.end.unwrap_or(u64::MAX) - self.at;
        if chunk.len() as u64 > left {
            if self.end == self.size() {
                return Err(self.corrupt("more".to_owned()));
            }
            chunk.truncate(usize::try_from(left).expect("shorter than the chunk"));
        }
        self.at += chunk.len() as u64;
        if self.end == Some(self.at) {
            let response = self.response.take();
            if let (Some(mut response), true) = (response, self.end == self.size()) {
                // A connection that breaks behind the last byte harms nothing: the digest decides.
                while let Ok(Some(more)) = storage::chunk(&self.link.wire, &mut response).await {
                    if !more.is_empty() {
                        return Err(self.corrupt("more".to_owned()));
                    }
                }
            }
        }
        Ok(Some(chunk).filter(|chunk| !chunk.is_empty()))
    }

    fn corrupt(&self, found: String) -> Error {
        Error::Corrupt { expected: format!("{} bytes", self.size().unwrap_or_default()), found }
    }

    /// Asks storage for what is left, signing first where there is no signature.
    async fn connect(&mut self) -> Result<(), Error> {
        loop {
            let (request, generation) = self.link.request().await?;
            let last = self.end.filter(|end| Some(*end) != self.size()).map(|end| end - 1);
            let range = (self.at > 0 || last.is_some()).then_some((self.at, last));
            match storage::get(&self.link.wire, &request, range, self.link.etag.get().map(String::as_str)).await {
                Ok(response) => return self.begin(response),
                Err(failure) if failure.error.wants_signature() && self.signatures < SIGNATURES => {
                    self.signatures += 1;
                    self.link.refused(generation).await;
                }
                Err(failure) => self.pause(failure.error, failure.retry_after).await?,
            }
        }
    }

    /// Takes up an answer: the range that was asked for, or the whole, of which the known beginning is passed over.
    fn begin(&mut self, response: Response) -> Result<(), Error> {
        let partial = response.status() == StatusCode::PARTIAL_CONTENT;
        if partial {
            let range = response.headers().get(CONTENT_RANGE).and_then(|range| range.to_str().ok()).unwrap_or_default();
            if !range.starts_with(&format!("bytes {}-", self.at)) {
                let detail = format!("asked for the bytes from {}, got {}", self.at, quote(range));
                return Err(Error::Unexpected { status: 206, detail });
            }
            let total = range.rsplit_once('/').and_then(|(_, total)| total.parse::<u64>().ok());
            if let (Some(total), Some(size)) = (total, self.size())
                && total != size
            {
                return Err(self.corrupt(format!("{total} bytes")));
            }
        } else if self.at == 0 && self.end != self.size() {
            // Storage that ignores ranges sends the whole each time: once is enough.
            self.end = self.size();
        }
        self.skip = if partial { 0 } else { self.at };
        let length = response.content_length();
        self.end = self.end.or(length);
        let expected = if partial { self.end.map(|end| end - self.at) } else { self.size() };
        if let (Some(length), Some(expected)) = (length, expected)
            && length != expected
        {
            return Err(Error::Corrupt { expected: format!("{expected} bytes"), found: format!("{length} bytes") });
        }
        // A weak tag does not stand for the same bytes.
        let tag = response.headers().get(ETAG).and_then(|tag| tag.to_str().ok()).filter(|tag| tag.starts_with('"'));
        if let Some(tag) = tag {
            self.link.etag.get_or_init(|| tag.to_owned());
        }
        self.response = Some(response);
        Ok(())
    }

    /// Waits before the next attempt, or gives the error back where there is none.
    async fn pause(&mut self, error: Error, retry_after: Option<Duration>) -> Result<(), Error> {
        self.response = None;
        if self.at - self.counted_from >= PROGRESS_BYTES {
            self.counted_from = self.at;
            self.signatures = 0;
            self.backoff.progressed();
        }
        match if error.is_transient() { self.backoff.next(retry_after) } else { None } {
            Some(wait) => {
                tokio::time::sleep(wait).await;
                Ok(())
            }
            None => Err(self.link.sorted(error)),
        }
    }
}
