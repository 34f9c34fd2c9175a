//! Bytes that can be read several times: a file or memory, split into parts and hashed before the upload.
//!
//! Only a few chunks of a file are in memory.

use std::fs;
use std::io::{self, Read as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};

use bytes::{Bytes, BytesMut};
use futures_util::stream::{self, Stream};
use sha2::Digest as _;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncSeekExt as _};

use crate::api::{DEFAULT_PART_BYTES, part_bytes};
use crate::checksum::Sha256;
use crate::progress::{AttemptCounter, HashCallback};

/// The bytes of one read. It is large, so that the switch to the blocking pool costs little in comparison.
const CHUNK_BYTES: usize = 512 << 10;
/// How many chunks wait for the thread that hashes parts.
const MAX_QUEUED_CHUNKS: usize = 8;

/// The part size for `size` bytes: the requested size or the broker's default, increased until 10,000 parts are enough.
pub(crate) fn part_size(size: u64, requested: Option<u64>) -> u64 {
    part_bytes(size, requested.unwrap_or(DEFAULT_PART_BYTES).max(1))
}

/// The number of parts of `part_size` for `size` bytes. Zero bytes still need one part.
pub(crate) fn part_count(size: u64, part_size: u64) -> u64 {
    size.div_ceil(part_size).max(1)
}

/// The bytes of an upload.
#[derive(Debug, Clone)]
pub(crate) enum Source {
    /// The caller's file.
    File(PathBuf),
    /// A temporary file. Dropping the last reference removes it.
    Spooled(Arc<tempfile::TempPath>),
    /// Memory.
    Memory(Bytes),
}

/// The size and the hashes of a source, from one read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Hashes {
    pub(crate) size: u64,
    pub(crate) part_size: u64,
    pub(crate) whole: Sha256,
    pub(crate) parts: Vec<Sha256>,
}

/// Stops the hashing thread when the caller is dropped.
struct StopOnDrop(Arc<AtomicBool>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Source {
    /// The path of the file, or the bytes in memory.
    fn path_or_bytes(&self) -> Result<&Path, &Bytes> {
        match self {
            Self::File(path) => Ok(path),
            Self::Spooled(path) => Ok(path),
            Self::Memory(bytes) => Err(bytes),
        }
    }

    /// Copies a reader's bytes to a temporary file: all of them, or exactly `size`.
    pub(crate) async fn spooled(mut reader: impl AsyncRead + Unpin, size: Option<u64>) -> io::Result<Self> {
        let (file, path) = tokio::task::spawn_blocking(tempfile::NamedTempFile::new).await??.into_parts();
        let mut file = tokio::fs::File::from_std(file);
        let copied = match size {
            Some(size) => tokio::io::copy(&mut (&mut reader).take(size), &mut file).await?,
            None => tokio::io::copy(&mut reader, &mut file).await?,
        };
        tokio::io::AsyncWriteExt::flush(&mut file).await?;
        match size {
            Some(size) if copied < size => Err(unexpected_end(copied, size)),
            _ => Ok(Self::Spooled(Arc::new(path))),
        }
    }

    /// The current size in bytes.
    pub(crate) async fn size(&self) -> io::Result<u64> {
        let path = match self.path_or_bytes() {
            Ok(path) => path,
            Err(bytes) => return Ok(bytes.len() as u64),
        };
        let meta = tokio::fs::metadata(path).await?;
        // A pipe or a directory has no size that could be declared.
        if meta.is_dir() {
            return Err(io::Error::new(io::ErrorKind::IsADirectory, format!("{} is a directory", path.display())));
        }
        match meta.is_file() {
            true => Ok(meta.len()),
            false => Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{} is not a file", path.display()))),
        }
    }

    /// Reads all bytes once and computes the SHA-256 of the whole and of each part. `on_progress` gets the number of bytes
    /// read so far.
    pub(crate) async fn hash(&self, part_size: u64, on_progress: Option<HashCallback>) -> io::Result<Hashes> {
        let source = self.clone();
        let stopped = Arc::new(AtomicBool::new(false));
        let _stop = StopOnDrop(Arc::clone(&stopped));
        tokio::task::spawn_blocking(move || match source.path_or_bytes() {
            Ok(path) => hash_reader(fs::File::open(path)?, part_size, &stopped, on_progress.as_ref()),
            Err(bytes) => hash_reader(&bytes[..], part_size, &stopped, on_progress.as_ref()),
        })
        .await?
    }

    /// A request body of `size` bytes from `offset`, read while it is sent, and counted by `counter`.
    pub(crate) fn body(&self, offset: u64, size: u64, counter: &Arc<AttemptCounter>) -> reqwest::Body {
        if size == 0 {
            return reqwest::Body::from(Bytes::new());
        }
        match self.path_or_bytes() {
            Ok(path) => reqwest::Body::wrap_stream(file_stream(path.to_owned(), offset, size, Arc::clone(counter))),
            Err(bytes) => {
                let range = usize::try_from(offset).ok().zip(usize::try_from(offset + size).ok());
                let piece = range.filter(|(_, end)| *end <= bytes.len()).map(|(start, end)| bytes.slice(start..end));
                // A range outside the memory gives an empty body under a larger content-length, which every server
                // refuses.
                reqwest::Body::wrap_stream(memory_stream(piece.unwrap_or_default(), Arc::clone(counter)))
            }
        }
    }
}

/// Reads all bytes once. A second thread hashes the parts after the first one meanwhile. The first part needs no thread: when it
/// ends, its hash is that of the whole so far.
fn hash_reader(
    reader: impl io::Read,
    part_size: u64,
    stopped: &AtomicBool,
    on_progress: Option<&HashCallback>,
) -> io::Result<Hashes> {
    std::thread::scope(|scope| {
        let (later_chunks, received) = mpsc::sync_channel(MAX_QUEUED_CHUNKS);
        let later_parts = scope.spawn(move || hash_parts(received, part_size));
        let (size, whole, first_part) = hash_whole(reader, part_size, &later_chunks, stopped, on_progress)?;
        drop(later_chunks);
        let later_parts = later_parts.join().map_err(|_| io::Error::other("the thread that hashes the parts panicked"))?;
        Ok(Hashes { size, part_size, whole, parts: std::iter::once(first_part).chain(later_parts).collect() })
    })
}

/// The number of bytes, the hash of all of them, and the hash of the first part. Sends the chunks of all other parts; no chunk
/// extends over the end of a part.
fn hash_whole(
    mut reader: impl io::Read,
    part_size: u64,
    later_chunks: &mpsc::SyncSender<Bytes>,
    stopped: &AtomicBool,
    on_progress: Option<&HashCallback>,
) -> io::Result<(u64, Sha256, Sha256)> {
    let (mut size, mut whole, mut first_part) = (0, sha2::Sha256::new(), None);
    loop {
        let max_bytes = (part_size - size % part_size).min(CHUNK_BYTES as u64);
        let mut chunk = Vec::with_capacity(CHUNK_BYTES);
        let read = reader.by_ref().take(max_bytes).read_to_end(&mut chunk)?;
        if stopped.load(Ordering::Relaxed) {
            return Err(io::Error::new(io::ErrorKind::Interrupted, "the upload was cancelled"));
        }
        if read == 0 {
            break;
        }
        if size == part_size {
            first_part = Some(whole.clone());
        }
        size += read as u64;
        whole.update(&chunk);
        if first_part.is_some() {
            later_chunks.send(chunk.into()).map_err(io::Error::other)?;
        }
        if let Some(on_progress) = on_progress {
            on_progress(size);
        }
    }
    let first_part = first_part.unwrap_or_else(|| whole.clone());
    Ok((size, Sha256(whole.finalize().into()), Sha256(first_part.finalize().into())))
}

/// The hashes of the parts to which these chunks belong, in order.
fn hash_parts(chunks: mpsc::Receiver<Bytes>, part_size: u64) -> Vec<Sha256> {
    let (mut part, mut hashed, mut parts) = (sha2::Sha256::new(), 0, Vec::new());
    for chunk in chunks {
        part.update(&chunk);
        hashed += chunk.len() as u64;
        if hashed == part_size {
            parts.push(Sha256(part.finalize_reset().into()));
            hashed = 0;
        }
    }
    if hashed > 0 {
        parts.push(Sha256(part.finalize().into()));
    }
    parts
}

fn unexpected_end(found: u64, expected: u64) -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, format!("the source ended after {found} of {expected} bytes"))
}

fn memory_stream(piece: Bytes, counter: Arc<AttemptCounter>) -> impl Stream<Item = io::Result<Bytes>> {
    stream::unfold(piece, move |mut piece| {
        let chunk = piece.split_to(piece.len().min(CHUNK_BYTES));
        counter.add(chunk.len() as u64);
        std::future::ready((!chunk.is_empty()).then_some((Ok(chunk), piece)))
    })
}

/// Reads a range of a file in chunks. A read error is recorded in the counter, because the HTTP client reports it as a
/// broken connection.
fn file_stream(path: PathBuf, offset: u64, size: u64, counter: Arc<AttemptCounter>) -> impl Stream<Item = io::Result<Bytes>> {
    stream::try_unfold((None, size), move |(file, left)| {
        let (path, counter) = (path.clone(), Arc::clone(&counter));
        async move {
            if left == 0 {
                return Ok(None);
            }
            match next_chunk(file, &path, offset, left).await {
                Ok((_, chunk)) if chunk.is_empty() => Err(counter.record_source_error(unexpected_end(size - left, size))),
                Ok((file, chunk)) => {
                    let taken = chunk.len() as u64;
                    counter.add(taken);
                    Ok(Some((chunk, (Some(file), left - taken))))
                }
                Err(error) => Err(counter.record_source_error(error)),
            }
        }
    })
}

async fn next_chunk(file: Option<tokio::fs::File>, path: &Path, offset: u64, left: u64) -> io::Result<(tokio::fs::File, Bytes)> {
    let mut file = match file {
        Some(file) => file,
        None => {
            let mut file = tokio::fs::File::open(path).await?;
            file.seek(SeekFrom::Start(offset)).await?;
            file
        }
    };
    let max_bytes = usize::try_from(left).unwrap_or(CHUNK_BYTES).min(CHUNK_BYTES);
    let mut chunk = BytesMut::with_capacity(max_bytes);
    // The buffer's capacity may be larger than requested, and the following bytes belong to the next part.
    (&mut file).take(max_bytes as u64).read_buf(&mut chunk).await?;
    Ok((file, chunk.freeze()))
}

/// Reads the next part of a stream, `size` bytes, into memory, and updates both hashers.
pub(crate) async fn read_part(
    reader: &mut (impl AsyncRead + Unpin),
    size: u64,
    mut whole: sha2::Sha256,
) -> io::Result<(Bytes, Sha256, sha2::Sha256)> {
    let capacity = usize::try_from(size).map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
    let mut part = Vec::with_capacity(capacity);
    let read = reader.take(size).read_to_end(&mut part).await? as u64;
    if read < size {
        return Err(unexpected_end(read, size));
    }
    // Hashing a part takes tens of milliseconds, which is too long on a thread of the async runtime.
    let (part, hash, whole) = tokio::task::spawn_blocking(move || {
        whole.update(&part);
        let hash = Sha256::of(&part);
        (part, hash, whole)
    })
    .await?;
    Ok((part.into(), hash, whole))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::ProgressTotals;
    use futures_util::TryStreamExt as _;

    #[test]
    fn part_sizes_are_as_requested_and_grow_when_ten_thousand_parts_are_not_enough() {
        assert_eq!(part_size(0, None), 16 << 20);
        assert_eq!(part_size(1 << 30, None), 16 << 20);
        assert_eq!(part_size(1 << 30, Some(5 << 20)), 5 << 20);
        assert_eq!(part_size(160_000 << 20, None), 16 << 20);
        assert_eq!(part_size((160_000 << 20) + 1, None), 17 << 20);
        for size in [1, 5 << 40, u64::MAX >> 8] {
            assert!(part_count(size, part_size(size, Some(5 << 20))) <= 10_000, "{size}");
        }
        assert_eq!(part_count(0, 5), 1);
        assert_eq!(part_count(10, 5), 2);
        assert_eq!(part_count(11, 5), 3);
    }

    proptest::proptest! {
        #[test]
        fn one_read_gives_the_hash_of_the_whole_and_of_each_part(
            bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200), size in 1_u64..64,
        ) {
            let hashes = hash_reader(&bytes[..], size, &AtomicBool::new(false), None).unwrap();
            let mut parts: Vec<_> = bytes.chunks(size as usize).map(Sha256::of).collect();
            if parts.is_empty() {
                parts.push(Sha256::of(b""));
            }
            proptest::prop_assert_eq!(hashes, Hashes { size: bytes.len() as u64, part_size: size, whole: Sha256::of(&bytes), parts });
        }
    }

    #[test]
    fn hashing_stops_when_its_caller_is_dropped() {
        let error = hash_reader(&b"abc"[..], 2, &AtomicBool::new(true), None).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::Interrupted);
    }

    fn a_file(bytes: &[u8]) -> (tempfile::NamedTempFile, PathBuf) {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), bytes).unwrap();
        let path = file.path().to_owned();
        (file, path)
    }

    async fn collect(stream: impl Stream<Item = io::Result<Bytes>>) -> io::Result<Vec<u8>> {
        let chunks: Vec<Bytes> = stream.try_collect().await?;
        Ok(chunks.concat())
    }

    #[tokio::test]
    async fn a_part_has_exactly_the_bytes_of_its_range() {
        let bytes: Vec<u8> = (0..3 * CHUNK_BYTES).map(|i| (i % 251) as u8).collect();
        let (_file, path) = a_file(&bytes);
        for (offset, size) in [(0, 7), (5, CHUNK_BYTES + 3), (CHUNK_BYTES, 2 * CHUNK_BYTES)] {
            let counter = AttemptCounter::new(&Arc::new(ProgressTotals::new(bytes.len() as u64, 1, None)));
            let sent = collect(file_stream(path.clone(), offset as u64, size as u64, Arc::clone(&counter))).await.unwrap();
            assert!(sent == bytes[offset..offset + size], "{offset} {size}");
            assert_eq!(counter.sent_bytes(), size as u64);

            let counter = AttemptCounter::new(&Arc::new(ProgressTotals::new(bytes.len() as u64, 1, None)));
            let piece = Bytes::copy_from_slice(&bytes[offset..offset + size]);
            let sent = collect(memory_stream(piece, Arc::clone(&counter))).await.unwrap();
            assert!(sent == bytes[offset..offset + size], "{offset} {size}");
            assert_eq!(counter.sent_bytes(), size as u64);
        }
    }

    #[tokio::test]
    async fn a_source_that_became_shorter_is_an_unexpected_end() {
        let (_file, path) = a_file(b"12345");
        let counter = AttemptCounter::new(&Arc::new(ProgressTotals::new(9, 1, None)));
        let error = collect(file_stream(path, 0, 9, Arc::clone(&counter))).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(counter.take_source_error().unwrap().to_string(), "the source ended after 5 of 9 bytes");
    }

    #[tokio::test]
    async fn a_spooled_reader_becomes_a_file_with_exactly_its_bytes() {
        let source = Source::spooled(&b"123456789"[..], Some(4)).await.unwrap();
        assert_eq!(source.size().await.unwrap(), 4);
        assert_eq!(source.hash(16, None).await.unwrap().whole, Sha256::of(b"1234"));
        let path = source.path_or_bytes().unwrap().to_owned();
        drop(source);
        assert!(!path.exists());
        let all = Source::spooled(&b"123456789"[..], None).await.unwrap();
        assert_eq!(all.size().await.unwrap(), 9);
        let error = Source::spooled(&b"123"[..], Some(4)).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[tokio::test]
    async fn a_stream_is_read_one_part_at_a_time() {
        let mut reader = &b"123456789"[..];
        let (part, hash, whole) = read_part(&mut reader, 5, sha2::Sha256::new()).await.unwrap();
        assert_eq!((&part[..], hash), (&b"12345"[..], Sha256::of(b"12345")));
        let (part, _, whole) = read_part(&mut reader, 4, whole).await.unwrap();
        assert_eq!(&part[..], b"6789");
        assert_eq!(Sha256(whole.finalize().into()), Sha256::of(b"123456789"));
        assert!(read_part(&mut reader, 1, sha2::Sha256::new()).await.is_err());
    }
}
