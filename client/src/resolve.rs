//! From a record's value to verified bytes.
//!
//! The pointer in the record is what is trusted: its size is the cap, its digest the proof. Whatever the
//! broker or storage says on the way is held against it.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, Bytes};
use futures_util::stream::{self, Stream, StreamExt as _, TryStreamExt as _};
use reqwest::StatusCode;
use reqwest::header::CONTENT_RANGE;
use tokio::io::{AsyncRead, AsyncWriteExt as _, ReadBuf};

use crate::api::{ResolveAnswer, ResolveOptions, Resolved};
use crate::checksum::{Digest, Hasher};
use crate::error::Error;
use crate::http::Client;
use crate::pointer::{NotAPointer, Pointer, looks_like_pointer};
use crate::retry::Backoff;
use crate::storage;

/// Bytes that make a broken download worth new attempts: fewer would let a peer string it along for ever.
const PROGRESS_BYTES: u64 = 1 << 20;

/// How often the pointer may be resolved again because its URL ran out without progress in between.
const SIGNATURES: u32 = 2;

/// What a record carries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value<'a> {
    /// The data itself.
    Inline(&'a [u8]),
    /// A pointer to the data.
    Pointer(Pointer),
}

impl<'a> Value<'a> {
    /// Tells data from pointers by the envelope's published rule.
    ///
    /// # Errors
    /// When the value begins like a pointer but cannot be read as one: handing it on as data would hide the loss.
    pub fn of(record_value: &'a [u8]) -> Result<Self, NotAPointer> {
        match looks_like_pointer(record_value) {
            true => Pointer::parse(record_value).map(Self::Pointer),
            false => Ok(Self::Inline(record_value)),
        }
    }
}

impl Client {
    /// Fetches the bytes that a record's value points to. They are verified while they are read.
    ///
    /// # Errors
    /// [`Error::NotAPointer`], [`Error::Forbidden`], [`Error::Gone`], [`Error::Missing`], and what any call may meet.
    pub async fn fetch(&self, value: &[u8]) -> Result<Download, Error> {
        self.fetch_version(value, None).await
    }

    /// Fetches a certain version: the record's `lfs-version-id` header.
    ///
    /// # Errors
    /// As [`Client::fetch`].
    pub async fn fetch_version(&self, value: &[u8], version_id: Option<&str>) -> Result<Download, Error> {
        let pointer = Pointer::parse(value)?;
        let mut transfer = Transfer::new(self, value, version_id, &pointer);
        transfer.connect(0).await?;
        let resolved = transfer.resolved.clone().expect("connecting resolves");
        let digest = transfer.digest.clone();
        let bytes =
            stream::try_unfold(transfer, |mut transfer| async { Ok(transfer.next().await?.map(|chunk| (chunk, transfer))) });
        Ok(Download { pointer, resolved, digest, bytes: bytes.boxed(), current: Bytes::new() })
    }
}

/// The bytes behind a pointer: an [`AsyncRead`] and a [`Stream`] that fails where they are not the promised ones.
///
/// The last byte is given out only once the whole has the pointer's size and digest: whoever has read
/// everything has read the right thing. Bytes before that are not proved, so act on them only at the end.
pub struct Download {
    pointer: Pointer,
    resolved: Resolved,
    digest: Option<Digest>,
    bytes: Pin<Box<dyn Stream<Item = Result<Bytes, Error>> + Send>>,
    current: Bytes,
}

impl fmt::Debug for Download {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Download").field("pointer", &self.pointer).finish_non_exhaustive()
    }
}

impl Download {
    /// The pointer that is followed.
    pub fn pointer(&self) -> &Pointer {
        &self.pointer
    }

    /// What the broker said of it: the file's name, its media type, the level of proof.
    pub fn resolved(&self) -> &Resolved {
        &self.resolved
    }

    /// The size in bytes.
    pub fn size(&self) -> u64 {
        self.pointer.size
    }

    /// What the bytes are held against; none where the topic allowed uploads without a checksum: then only the size is.
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// Tells `report` how many bytes have come, piece by piece; it must not block.
    #[must_use]
    pub fn on_progress(mut self, report: impl Fn(u64) + Send + 'static) -> Self {
        let mut received = 0;
        self.bytes = self
            .bytes
            .inspect_ok(move |chunk| {
                received += chunk.len() as u64;
                report(received);
            })
            .boxed();
        self
    }

    /// The next piece, or none at the verified end.
    ///
    /// # Errors
    /// [`Error::Corrupt`], or why the bytes could not be had.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, Error> {
        if !self.current.is_empty() {
            return Ok(Some(std::mem::take(&mut self.current)));
        }
        self.bytes.next().await.transpose()
    }

    /// Reads everything into memory.
    ///
    /// # Errors
    /// [`Error::TooLarge`] when it is more than `limit` bytes, before any is read; else as [`Download::chunk`].
    pub async fn to_vec(mut self, limit: u64) -> Result<Vec<u8>, Error> {
        let size = self.size();
        let room = usize::try_from(size).ok().filter(|_| size <= limit).ok_or(Error::TooLarge { size, limit })?;
        let mut bytes = Vec::with_capacity(room);
        while let Some(chunk) = self.chunk().await? {
            bytes.extend_from_slice(&chunk);
        }
        Ok(bytes)
    }

    /// Writes everything to a file that appears, or is replaced, only when it is whole, verified and on disk.
    ///
    /// # Errors
    /// As [`Download::chunk`], or when the file cannot be written; then `path` is what it was before.
    pub async fn to_file(mut self, path: impl AsRef<Path>) -> Result<(), Error> {
        let path = path.as_ref().to_owned();
        let directory = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        let beside = directory.clone();
        let (file, temporary) = blocking(move || Ok(new_file().tempfile_in(beside)?.into_parts())).await?;
        let mut file = tokio::fs::File::from_std(file);
        while let Some(chunk) = self.chunk().await? {
            file.write_all(&chunk).await?;
        }
        file.flush().await?;
        file.sync_all().await?;
        drop(file);
        blocking(move || {
            temporary.persist(&path).map_err(|error| error.error)?;
            sync_directory(&directory)
        })
        .await?;
        Ok(())
    }
}

impl Stream for Download {
    type Item = Result<Bytes, Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        match self.current.is_empty() {
            false => Poll::Ready(Some(Ok(std::mem::take(&mut self.current)))),
            true => self.bytes.as_mut().poll_next(cx),
        }
    }
}

impl AsyncRead for Download {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        while self.current.is_empty() {
            match ready!(self.bytes.as_mut().poll_next(cx)) {
                Some(chunk) => self.current = chunk?,
                None => return Poll::Ready(Ok(())),
            }
        }
        let taken = self.current.len().min(buffer.remaining());
        buffer.put_slice(&self.current[..taken]);
        self.current.advance(taken);
        Poll::Ready(Ok(()))
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await?
}

/// A temporary file with the rights that a file made directly would have, for it is to become one.
fn new_file() -> tempfile::Builder<'static, 'static> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".lfs-download-");
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    builder
}

/// A rename is on disk only once its directory is.
#[cfg(unix)]
fn sync_directory(directory: &Path) -> io::Result<()> {
    std::fs::File::open(directory)?.sync_all()
}

#[cfg(not(unix))]
fn sync_directory(_: &Path) -> io::Result<()> {
    Ok(())
}

/// A download as it runs, over as many connections as it takes.
struct Transfer {
    client: Client,
    value: Bytes,
    options: ResolveOptions,
    size: u64,
    digest: Option<Digest>,
    hasher: Option<Hasher>,
    resolved: Option<Resolved>,
    response: Option<reqwest::Response>,
    /// Bytes that were given out or are about to be.
    received: u64,
    /// Bytes of the current answer that were received before, where storage ignores ranges.
    skip: u64,
    backoff: Backoff,
    /// `received` when the attempts were last counted from the start.
    counted_from: u64,
    signatures: u32,
}

impl Transfer {
    fn new(client: &Client, value: &[u8], version_id: Option<&str>, pointer: &Pointer) -> Self {
        let digest = pointer.digest();
        Self {
            client: client.clone(),
            value: Bytes::copy_from_slice(value),
            options: ResolveOptions { version_id: version_id.map(str::to_owned), validate: false },
            size: pointer.size,
            hasher: digest.as_ref().map(|digest| digest.algorithm.hasher()),
            digest,
            resolved: None,
            response: None,
            received: 0,
            skip: 0,
            backoff: Backoff::new(client.settings().retry),
            counted_from: 0,
            signatures: 0,
        }
    }

    /// The next piece, connecting again where the connection breaks.
    async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        // An empty object has no last byte to hold back: its end is what is checked.
        if self.received == self.size {
            return if self.size == 0 { self.finish().map(|()| None) } else { Ok(None) };
        }
        loop {
            if self.response.is_none() {
                self.connect(self.received).await?;
            }
            let Some(response) = &mut self.response else { continue };
            match storage::chunk(&self.client, response).await {
                Ok(Some(chunk)) => {
                    if let Some(chunk) = self.take(chunk).await? {
                        return Ok(Some(chunk));
                    }
                }
                Ok(None) => {
                    let found = format!("{} bytes", self.received);
                    return Err(Error::Corrupt { expected: format!("{} bytes", self.size), found });
                }
                Err(error) => self.pause(error, None).await?,
            }
        }
    }

    /// Counts and hashes a piece; at the last one everything must fit.
    async fn take(&mut self, mut chunk: Bytes) -> Result<Option<Bytes>, Error> {
        let skipped = self.skip.min(chunk.len() as u64);
        self.skip -= skipped;
        chunk.advance(usize::try_from(skipped).expect("no longer than the chunk"));
        if chunk.is_empty() {
            return Ok(None);
        }
        if chunk.len() as u64 > self.size - self.received {
            return Err(self.too_long());
        }
        if let Some(hasher) = &mut self.hasher {
            hasher.update(&chunk);
        }
        self.received += chunk.len() as u64;
        if self.received == self.size {
            if let Some(response) = &mut self.response {
                // A connection that breaks behind the last byte harms nothing: the digest decides.
                while let Ok(Some(more)) = storage::chunk(&self.client, response).await {
                    if !more.is_empty() {
                        return Err(self.too_long());
                    }
                }
            }
            self.finish()?;
        }
        Ok(Some(chunk))
    }

    fn too_long(&self) -> Error {
        Error::Corrupt { expected: format!("{} bytes", self.size), found: "more".to_owned() }
    }

    fn finish(&mut self) -> Result<(), Error> {
        self.response = None;
        let Some((digest, hasher)) = self.digest.as_ref().zip(self.hasher.take()) else { return Ok(()) };
        let found = hasher.finish();
        match found == *digest {
            true => Ok(()),
            false => Err(Error::Corrupt { expected: format!("{digest:?}"), found: format!("{found:?}") }),
        }
    }

    /// Asks storage for the bytes from `from` on, resolving the pointer first where there is no URL.
    async fn connect(&mut self, from: u64) -> Result<(), Error> {
        loop {
            let request = match &self.resolved {
                Some(resolved) => resolved.request.clone(),
                None => self.resolve().await?,
            };
            match storage::get(&self.client, &request, from).await {
                Ok(response) => return self.begin(response, from),
                Err(failure) if failure.error.wants_signature() && self.signatures < SIGNATURES => {
                    self.signatures += 1;
                    self.resolved = None;
                }
                Err(failure) => self.pause(failure.error, failure.retry_after).await?,
            }
        }
    }

    async fn resolve(&mut self) -> Result<crate::api::SignedRequest, Error> {
        let misfit = |detail: &str| Error::Unexpected { status: 200, detail: detail.to_owned() };
        match self.client.resolve(&self.value, &self.options).await? {
            ResolveAnswer::Resolved(resolved) if resolved.size != self.size => Err(Error::Corrupt {
                expected: format!("{} bytes", self.size),
                found: format!("an object of {} bytes", resolved.size),
            }),
            ResolveAnswer::Resolved(resolved) => Ok(self.resolved.insert(resolved).request.clone()),
            ResolveAnswer::Validated(_) => Err(misfit("a pointer was to be resolved and was only validated")),
        }
    }

    /// Takes up an answer: the range that was asked for, or the whole, of which the known beginning is passed over.
    fn begin(&mut self, response: reqwest::Response, from: u64) -> Result<(), Error> {
        let partial = response.status() == StatusCode::PARTIAL_CONTENT;
        if partial {
            let range = response.headers().get(CONTENT_RANGE).and_then(|range| range.to_str().ok()).unwrap_or_default();
            if !range.starts_with(&format!("bytes {from}-")) {
                let detail = format!("asked for the bytes from {from}, got {}", crate::error::quote(range));
                return Err(Error::Unexpected { status: 206, detail });
            }
        }
        self.skip = if partial { 0 } else { from };
        let expected = self.size - if partial { from } else { 0 };
        match response.content_length() {
            Some(length) if length != expected => {
                Err(Error::Corrupt { expected: format!("{expected} bytes"), found: format!("{length} bytes") })
            }
            _ => {
                self.response = Some(response);
                Ok(())
            }
        }
    }

    /// Waits before the next attempt, or gives the error back where there is none.
    async fn pause(&mut self, error: Error, retry_after: Option<std::time::Duration>) -> Result<(), Error> {
        self.response = None;
        if let Error::Storage { status: 404, .. } = error {
            return Err(Error::Missing);
        }
        if self.received - self.counted_from >= PROGRESS_BYTES {
            self.counted_from = self.received;
            self.signatures = 0;
            self.backoff.progressed();
        }
        match if error.is_transient() { self.backoff.next(retry_after) } else { None } {
            Some(wait) => {
                tokio::time::sleep(wait).await;
                Ok(())
            }
            None => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_data_or_a_pointer_and_never_a_broken_pointer_as_data() {
        assert_eq!(Value::of(b"plain"), Ok(Value::Inline(b"plain")));
        assert_eq!(Value::of(b"{\"a\":1}"), Ok(Value::Inline(b"{\"a\":1}")));
        let json = br#"{"kfs_lfs":1,"bucket":"b","key":"k","size":1}"#;
        assert!(matches!(Value::of(json), Ok(Value::Pointer(pointer)) if pointer.size == 1));
        assert!(Value::of(br#"{"kfs_lfs":1,"bucket":"b"}"#).is_err());
    }
}
