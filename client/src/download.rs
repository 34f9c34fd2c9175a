//! Downloads: verified while they are read. As a file, they appear whole or not at all.

use std::fmt;
use std::future::poll_fn;
use std::io;
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, Bytes};
use futures_util::stream::{self, BoxStream, Stream, StreamExt as _, TryStreamExt as _};
use tokio::io::{AsyncRead, ReadBuf};

use crate::api::Resolved;
use crate::checksum::{Digest, Hasher};
use crate::error::Error;
use crate::pointer::Pointer;
use crate::save::{PartialFile, SavedFile};
use crate::storage::StorageClient;
use crate::transfer::{self, DownloadSource, Expected, UrlSigner};

/// A larger chunk is hashed on the blocking pool, because it would block a runtime thread for milliseconds.
const MAX_INLINE_HASH_BYTES: usize = 1 << 20;

/// The bytes of a pointer: an [`AsyncRead`] and a [`Stream`] that fails if they do not match the pointer.
///
/// The last chunk is returned only after size and digest are verified, so a reader that read everything has the right
/// bytes. Earlier chunks are not verified yet: use them only after the end. A failed download does not end like a
/// complete one: each read fails again. As a [`Stream`] it ends after the error.
pub struct Download {
    pointer: Option<Pointer>,
    resolved: Option<Resolved>,
    size: u64,
    digest: Option<Digest>,
    bytes: BoxStream<'static, Result<Bytes, Error>>,
    current: Bytes,
    /// The error that ended the download.
    failed: Option<Error>,
}

impl fmt::Debug for Download {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Download").field("pointer", &self.pointer).field("size", &self.size).finish_non_exhaustive()
    }
}

impl Download {
    pub(crate) async fn start(
        storage_client: StorageClient,
        signer: UrlSigner,
        expected: Expected,
        concurrency: usize,
        pointer: Option<Pointer>,
    ) -> Result<Self, Error> {
        let digest = expected.digest.clone();
        let source = DownloadSource::new(storage_client, signer, expected);
        let (size, bytes) = transfer::start(&source, concurrency).await?;
        let resolved = source.resolved().await;
        let bytes = verify(bytes, size, digest.clone());
        Ok(Self { pointer, resolved, size, digest, bytes, current: Bytes::new(), failed: None })
    }

    /// The pointer. None for an object that was requested by its name.
    pub fn pointer(&self) -> Option<&Pointer> {
        self.pointer.as_ref()
    }

    /// The broker's response to resolve: the file's name, its media type, its level of integrity. None without a broker.
    pub fn resolved(&self) -> Option<&Resolved> {
        self.resolved.as_ref()
    }

    /// The size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The digest that the bytes must match. None for an object without a pointer, and for a topic that allows uploads
    /// without a checksum. Then only the size is checked.
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// Calls `callback` with the number of received bytes, for each chunk. It must not block.
    #[must_use]
    pub fn on_progress(mut self, callback: impl Fn(u64) + Send + 'static) -> Self {
        let mut received = 0;
        self.bytes = self
            .bytes
            .inspect_ok(move |chunk| {
                received += chunk.len() as u64;
                callback(received);
            })
            .boxed();
        self
    }

    /// Reads the next chunk. `None` is the verified end.
    ///
    /// # Errors
    /// [`Error::Corrupt`], [`Error::WrongSize`], or why the bytes could not be read. Each further call fails again.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, Error> {
        poll_fn(|cx| self.poll_chunk(cx)).await
    }

    fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Error>> {
        if let Some(error) = &self.failed {
            return Poll::Ready(Err(repeat_error(error)));
        }
        if !self.current.is_empty() {
            return Poll::Ready(Ok(Some(std::mem::take(&mut self.current))));
        }
        let next = ready!(self.bytes.as_mut().poll_next(cx)).transpose();
        self.failed = next.as_ref().err().map(repeat_error);
        Poll::Ready(next)
    }

    /// Reads everything into memory.
    ///
    /// # Errors
    /// [`Error::TooLarge`] when the size is more than `limit` bytes, before any byte is read. Otherwise as
    /// [`Download::chunk`].
    pub async fn to_vec(mut self, limit: u64) -> Result<Vec<u8>, Error> {
        let size = self.size();
        let capacity = usize::try_from(size).ok().filter(|_| size <= limit).ok_or(Error::TooLarge { size, limit })?;
        let mut bytes = Vec::with_capacity(capacity);
        while let Some(chunk) = self.chunk().await? {
            bytes.extend_from_slice(&chunk);
        }
        Ok(bytes)
    }

    /// Writes all bytes to a file. The file appears, or is replaced, only after its bytes are complete, verified and
    /// synced to disk.
    ///
    /// # Errors
    /// As [`Download::chunk`], or when the file cannot be written. Then `path` is unchanged.
    pub async fn to_file(mut self, path: impl AsRef<Path>) -> Result<SavedFile, Error> {
        let sha256 = self.digest.as_ref().and_then(Digest::sha256);
        let mut partial = PartialFile::create_for(path.as_ref(), sha256).await?;
        while let Some(chunk) = self.chunk().await? {
            partial.write(chunk).await?;
        }
        partial.commit().await
    }
}

impl Stream for Download {
    type Item = Result<Bytes, Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        match self.failed {
            // A caller that ignores errors must not loop for ever.
            Some(_) => Poll::Ready(None),
            None => self.poll_chunk(cx).map(Result::transpose),
        }
    }
}

impl AsyncRead for Download {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        while self.current.is_empty() {
            match ready!(self.poll_chunk(cx))? {
                Some(chunk) => self.current = chunk,
                None => return Poll::Ready(Ok(())),
            }
        }
        let taken = self.current.len().min(buffer.remaining());
        buffer.put_slice(&self.current[..taken]);
        self.current.advance(taken);
        Poll::Ready(Ok(()))
    }
}

/// The error for further reads of a failed download.
fn repeat_error(error: &Error) -> Error {
    match error {
        Error::Corrupt { expected, found } => Error::Corrupt { expected: expected.clone(), found: found.clone() },
        Error::WrongSize(text) => Error::WrongSize(text.clone()),
        // Not a retryable error: this download returns no more bytes.
        error => Error::Io(io::Error::other(error.to_string())),
    }
}

/// Compares the bytes with the digest, and returns the last chunk only if they match.
fn verify(
    bytes: BoxStream<'static, Result<Bytes, Error>>,
    size: u64,
    digest: Option<Digest>,
) -> BoxStream<'static, Result<Bytes, Error>> {
    let hasher = digest.as_ref().map(|digest| digest.algorithm.hasher());
    let verifier = Verifier { bytes, left: size, hasher, digest };
    stream::try_unfold(verifier, |mut verifier| async { Ok(verifier.next().await?.map(|chunk| (chunk, verifier))) }).boxed()
}

struct Verifier {
    bytes: BoxStream<'static, Result<Bytes, Error>>,
    left: u64,
    hasher: Option<Hasher>,
    digest: Option<Digest>,
}

impl Verifier {
    async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        let Some(chunk) = self.bytes.next().await.transpose()? else {
            if self.left > 0 {
                let (expected, found) = (format!("{} more bytes", self.left), "the end".to_owned());
                return Err(Error::Corrupt { expected, found });
            }
            // An object without bytes has no last chunk, so it is checked here.
            return self.finish().map(|()| None);
        };
        if let Some(hasher) = self.hasher.take() {
            self.hasher = Some(update_hasher(hasher, chunk.clone()).await?);
        }
        self.left = self.left.saturating_sub(chunk.len() as u64);
        if self.left == 0 {
            self.finish()?;
        }
        Ok(Some(chunk))
    }

    fn finish(&mut self) -> Result<(), Error> {
        let Some((digest, hasher)) = self.digest.as_ref().zip(self.hasher.take()) else { return Ok(()) };
        let found = hasher.finish();
        match found == *digest {
            true => Ok(()),
            false => Err(Error::Corrupt { expected: format!("{digest:?}"), found: format!("{found:?}") }),
        }
    }
}

/// Hashes a chunk, on the blocking pool if it is large.
async fn update_hasher(mut hasher: Hasher, chunk: Bytes) -> io::Result<Hasher> {
    if chunk.len() <= MAX_INLINE_HASH_BYTES {
        hasher.update(&chunk);
        return Ok(hasher);
    }
    let updated = tokio::task::spawn_blocking(move || {
        hasher.update(&chunk);
        hasher
    });
    Ok(updated.await?)
}
