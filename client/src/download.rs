//! The bytes behind a pointer as the caller gets them: verified while they are read, and whole or not at all in a file.

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
use crate::save::{Draft, Saved};
use crate::storage::Wire;
use crate::transfer::{self, Link, Promise, Target};

/// Hashing more than this at a time keeps a thread that other tasks share from them for milliseconds.
const HASH_ASIDE_BYTES: usize = 1 << 20;

/// The bytes behind a pointer: an [`AsyncRead`] and a [`Stream`] that fails where they are not the promised ones.
///
/// The last byte is given out only once the whole has the pointer's size and digest: whoever has read
/// everything has read the right thing. Bytes before that are not proved, so act on them only at the end.
/// A download that failed never ends like a whole one: it fails again; only as a stream it ends with its error.
pub struct Download {
    pointer: Option<Pointer>,
    resolved: Option<Resolved>,
    size: u64,
    digest: Option<Digest>,
    bytes: BoxStream<'static, Result<Bytes, Error>>,
    current: Bytes,
    /// Why there are no more bytes, where that is not their end.
    failed: Option<Error>,
}

impl fmt::Debug for Download {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Download").field("pointer", &self.pointer).field("size", &self.size).finish_non_exhaustive()
    }
}

impl Download {
    pub(crate) async fn begin(
        wire: Wire,
        target: Target,
        promise: Promise,
        lanes: usize,
        pointer: Option<Pointer>,
    ) -> Result<Self, Error> {
        let digest = promise.digest.clone();
        let link = Link::new(wire, target, promise);
        let (size, bytes) = transfer::begin(&link, lanes).await?;
        let resolved = link.resolved().await;
        let bytes = verified(bytes, size, digest.clone());
        Ok(Self { pointer, resolved, size, digest, bytes, current: Bytes::new(), failed: None })
    }

    /// The pointer that is followed; none for an object that was asked for by name.
    pub fn pointer(&self) -> Option<&Pointer> {
        self.pointer.as_ref()
    }

    /// What the broker said of it: the file's name, its media type, the level of proof. None without a broker.
    pub fn resolved(&self) -> Option<&Resolved> {
        self.resolved.as_ref()
    }

    /// The size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// What the bytes are held against. None where nothing vouches for them: an object without a pointer, or a topic that
    /// allowed uploads without a checksum; then only the size is checked.
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
    /// [`Error::Corrupt`], or why the bytes could not be had: from then on as often as it is asked.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, Error> {
        poll_fn(|cx| self.poll_chunk(cx)).await
    }

    fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Error>> {
        if let Some(error) = &self.failed {
            return Poll::Ready(Err(again(error)));
        }
        if !self.current.is_empty() {
            return Poll::Ready(Ok(Some(std::mem::take(&mut self.current))));
        }
        let next = ready!(self.bytes.as_mut().poll_next(cx)).transpose();
        self.failed = next.as_ref().err().map(again);
        Poll::Ready(next)
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
    pub async fn to_file(mut self, path: impl AsRef<Path>) -> Result<Saved, Error> {
        let known = self.digest.as_ref().and_then(Digest::sha256);
        let mut draft = Draft::beside(path.as_ref(), known).await?;
        while let Some(chunk) = self.chunk().await? {
            draft.write(chunk).await?;
        }
        draft.keep().await
    }
}

impl Stream for Download {
    type Item = Result<Bytes, Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        match self.failed {
            // Whoever passes over errors would go round for ever.
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

/// The error of a download that is asked again.
fn again(error: &Error) -> Error {
    match error {
        Error::Corrupt { expected, found } => Error::Corrupt { expected: expected.clone(), found: found.clone() },
        // Not what it was, which may have been worth another try: of this download nothing comes any more.
        error => Error::Io(io::Error::other(error.to_string())),
    }
}

/// Holds the bytes against the digest, and the last of them back until it fits.
fn verified(
    bytes: BoxStream<'static, Result<Bytes, Error>>,
    size: u64,
    digest: Option<Digest>,
) -> BoxStream<'static, Result<Bytes, Error>> {
    let hasher = digest.as_ref().map(|digest| digest.algorithm.hasher());
    let check = Check { bytes, left: size, hasher, digest };
    stream::try_unfold(check, |mut check| async { Ok(check.next().await?.map(|chunk| (chunk, check))) }).boxed()
}

struct Check {
    bytes: BoxStream<'static, Result<Bytes, Error>>,
    left: u64,
    hasher: Option<Hasher>,
    digest: Option<Digest>,
}

impl Check {
    async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        let Some(chunk) = self.bytes.next().await.transpose()? else {
            if self.left > 0 {
                let (expected, found) = (format!("{} more bytes", self.left), "the end".to_owned());
                return Err(Error::Corrupt { expected, found });
            }
            // An object without bytes has no last one to hold back.
            return self.finish().map(|()| None);
        };
        if let Some(hasher) = self.hasher.take() {
            self.hasher = Some(hashed(hasher, chunk.clone()).await?);
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

/// Hashes a chunk, aside where it is a long one.
async fn hashed(mut hasher: Hasher, chunk: Bytes) -> io::Result<Hasher> {
    if chunk.len() <= HASH_ASIDE_BYTES {
        hasher.update(&chunk);
        return Ok(hasher);
    }
    let aside = tokio::task::spawn_blocking(move || {
        hasher.update(&chunk);
        hasher
    });
    Ok(aside.await?)
}
