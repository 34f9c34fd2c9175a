//! Bytes that can be read again: a file or memory, cut into parts, hashed before they go up.
//!
//! Nothing here holds more than a chunk of a file in memory.

use std::fs;
use std::io::{self, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::{Bytes, BytesMut};
use futures_util::stream::{self, Stream};
use sha2::Digest as _;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncSeekExt as _};

use crate::checksum::Sha256;
use crate::progress::Meter;

/// Bytes read at a time: large enough that a hop to the blocking pool costs little beside it.
const CHUNK_BYTES: usize = 512 << 10;

/// The part size where the caller names none: the broker's own default.
const PART_BYTES: u64 = 16 << 20;

/// Most parts that S3 takes.
const MOST_PARTS: u64 = 10_000;

/// Part sizes grow in whole MiB.
const MIB: u64 = 1 << 20;

/// The size of a part for `size` bytes: what was asked for, or 16 MiB, grown until 10,000 parts suffice.
pub(crate) fn part_size(size: u64, asked: Option<u64>) -> u64 {
    let needed = size.div_ceil(MOST_PARTS);
    match asked.unwrap_or(PART_BYTES).max(1) {
        enough if enough >= needed => enough,
        _ => needed.div_ceil(MIB) * MIB,
    }
}

/// How many parts of `part_size` hold `size` bytes; nothing still takes one.
pub(crate) fn part_count(size: u64, part_size: u64) -> u64 {
    size.div_ceil(part_size).max(1)
}

/// The bytes of an upload.
#[derive(Debug, Clone)]
pub(crate) enum Source {
    /// A file of the caller's.
    File(PathBuf),
    /// A temporary file that goes with its last user.
    Spooled(Arc<tempfile::TempPath>),
    /// Memory.
    Memory(Bytes),
}

/// What one reading of a source found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Hashes {
    pub(crate) size: u64,
    pub(crate) part_size: u64,
    pub(crate) whole: Sha256,
    pub(crate) parts: Vec<Sha256>,
}

/// Tells the hashing thread that nobody waits for it any more.
struct Stop(Arc<AtomicBool>);

impl Drop for Stop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Source {
    /// The file, or the memory.
    fn place(&self) -> Result<&Path, &Bytes> {
        match self {
            Self::File(path) => Ok(path),
            Self::Spooled(path) => Ok(path),
            Self::Memory(bytes) => Err(bytes),
        }
    }

    /// Keeps a reader's bytes in a temporary file: all of them, or exactly `size`.
    pub(crate) async fn spooled(mut reader: impl AsyncRead + Unpin, size: Option<u64>) -> io::Result<Self> {
        let (file, path) = tokio::task::spawn_blocking(tempfile::NamedTempFile::new).await??.into_parts();
        let mut file = tokio::fs::File::from_std(file);
        let copied = match size {
            Some(size) => tokio::io::copy(&mut (&mut reader).take(size), &mut file).await?,
            None => tokio::io::copy(&mut reader, &mut file).await?,
        };
        tokio::io::AsyncWriteExt::flush(&mut file).await?;
        match size {
            Some(size) if copied < size => Err(ended(copied, size)),
            _ => Ok(Self::Spooled(Arc::new(path))),
        }
    }

    /// The size in bytes, as it is now.
    pub(crate) async fn size(&self) -> io::Result<u64> {
        let path = match self.place() {
            Ok(path) => path,
            Err(bytes) => return Ok(bytes.len() as u64),
        };
        let meta = tokio::fs::metadata(path).await?;
        // A pipe or a directory has no size to promise.
        match meta.is_file() {
            true => Ok(meta.len()),
            false => Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{} is not a file", path.display()))),
        }
    }

    /// Reads everything once: SHA-256 of the whole and of each part.
    pub(crate) async fn hash(&self, part_size: u64) -> io::Result<Hashes> {
        let source = self.clone();
        let stopped = Arc::new(AtomicBool::new(false));
        let _stop = Stop(Arc::clone(&stopped));
        tokio::task::spawn_blocking(move || match source.place() {
            Ok(path) => hash(fs::File::open(path)?, part_size, &stopped),
            Err(bytes) => hash(&bytes[..], part_size, &stopped),
        })
        .await?
    }

    /// A request body of `size` bytes from `offset`, read as they go out and counted by `meter`.
    pub(crate) fn body(&self, offset: u64, size: u64, meter: &Arc<Meter>) -> reqwest::Body {
        if size == 0 {
            return reqwest::Body::from(Bytes::new());
        }
        match self.place() {
            Ok(path) => reqwest::Body::wrap_stream(file(path.to_owned(), offset, size, Arc::clone(meter))),
            Err(bytes) => {
                let range = usize::try_from(offset).ok().zip(usize::try_from(offset + size).ok());
                let piece = range.filter(|(_, end)| *end <= bytes.len()).map(|(start, end)| bytes.slice(start..end));
                // Out of range would be an empty body under a larger content-length, which no server takes.
                reqwest::Body::wrap_stream(memory(piece.unwrap_or_default(), Arc::clone(meter)))
            }
        }
    }
}

fn hash(mut reader: impl io::Read, part_size: u64, stopped: &AtomicBool) -> io::Result<Hashes> {
    let mut chunk = vec![0; CHUNK_BYTES];
    let (mut whole, mut part) = (sha2::Sha256::new(), sha2::Sha256::new());
    let (mut size, mut left, mut parts) = (0, part_size, Vec::new());
    loop {
        let most = usize::try_from(left).unwrap_or(CHUNK_BYTES).min(CHUNK_BYTES);
        let read = match reader.read(&mut chunk[..most]) {
            Ok(0) => break,
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        if stopped.load(Ordering::Relaxed) {
            return Err(io::Error::new(io::ErrorKind::Interrupted, "the upload was cancelled"));
        }
        whole.update(&chunk[..read]);
        part.update(&chunk[..read]);
        size += read as u64;
        left -= read as u64;
        if left == 0 {
            parts.push(Sha256(part.finalize_reset().into()));
            left = part_size;
        }
    }
    if left < part_size || parts.is_empty() {
        parts.push(Sha256(part.finalize().into()));
    }
    Ok(Hashes { size, part_size, whole: Sha256(whole.finalize().into()), parts })
}

fn ended(found: u64, expected: u64) -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, format!("the source ended after {found} of {expected} bytes"))
}

fn memory(piece: Bytes, meter: Arc<Meter>) -> impl Stream<Item = io::Result<Bytes>> {
    stream::unfold(piece, move |mut piece| {
        let chunk = piece.split_to(piece.len().min(CHUNK_BYTES));
        meter.add(chunk.len() as u64);
        std::future::ready((!chunk.is_empty()).then_some((Ok(chunk), piece)))
    })
}

/// Reads a range of a file chunk by chunk. A source that fails is noted in the meter: to the sender it looks like a broken connection.
fn file(path: PathBuf, offset: u64, size: u64, meter: Arc<Meter>) -> impl Stream<Item = io::Result<Bytes>> {
    stream::try_unfold((None, size), move |(file, left)| {
        let (path, meter) = (path.clone(), Arc::clone(&meter));
        async move {
            if left == 0 {
                return Ok(None);
            }
            match next_chunk(file, &path, offset, left).await {
                Ok((_, chunk)) if chunk.is_empty() => Err(meter.fail(ended(size - left, size))),
                Ok((file, chunk)) => {
                    let taken = chunk.len() as u64;
                    meter.add(taken);
                    Ok(Some((chunk, (Some(file), left - taken))))
                }
                Err(error) => Err(meter.fail(error)),
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
    let most = usize::try_from(left).unwrap_or(CHUNK_BYTES).min(CHUNK_BYTES);
    let mut chunk = BytesMut::with_capacity(most);
    // The buffer may have more room than was asked for, and the next part's bytes are not ours to send.
    (&mut file).take(most as u64).read_buf(&mut chunk).await?;
    Ok((file, chunk.freeze()))
}

/// Reads the next part of a stream into memory: `size` bytes, and both hashers fed.
pub(crate) async fn read_part(
    reader: &mut (impl AsyncRead + Unpin),
    size: u64,
    mut whole: sha2::Sha256,
) -> io::Result<(Bytes, Sha256, sha2::Sha256)> {
    let room = usize::try_from(size).map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
    let mut part = Vec::with_capacity(room);
    let read = reader.take(size).read_to_end(&mut part).await? as u64;
    if read < size {
        return Err(ended(read, size));
    }
    // Hashing takes tens of milliseconds a part: too long for a thread that other tasks share.
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
    use crate::progress::Tally;
    use futures_util::TryStreamExt as _;

    #[test]
    fn parts_are_as_asked_and_grow_where_ten_thousand_do_not_suffice() {
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
        fn one_reading_gives_the_hash_of_the_whole_and_of_each_part(
            bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200), size in 1_u64..64,
        ) {
            let hashes = hash(&bytes[..], size, &AtomicBool::new(false)).unwrap();
            let mut parts: Vec<_> = bytes.chunks(size as usize).map(Sha256::of).collect();
            if parts.is_empty() {
                parts.push(Sha256::of(b""));
            }
            proptest::prop_assert_eq!(hashes, Hashes { size: bytes.len() as u64, part_size: size, whole: Sha256::of(&bytes), parts });
        }
    }

    #[test]
    fn hashing_ends_when_nobody_waits() {
        let error = hash(&b"abc"[..], 2, &AtomicBool::new(true)).unwrap_err();
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
    async fn a_part_is_its_range_and_nothing_of_the_next() {
        let bytes: Vec<u8> = (0..3 * CHUNK_BYTES).map(|i| (i % 251) as u8).collect();
        let (_keep, path) = a_file(&bytes);
        for (offset, size) in [(0, 7), (5, CHUNK_BYTES + 3), (CHUNK_BYTES, 2 * CHUNK_BYTES)] {
            let meter = Meter::new(&Arc::new(Tally::new(bytes.len() as u64, 1, None)));
            let sent = collect(file(path.clone(), offset as u64, size as u64, Arc::clone(&meter))).await.unwrap();
            assert!(sent == bytes[offset..offset + size], "{offset} {size}");
            assert_eq!(meter.sent(), size as u64);

            let meter = Meter::new(&Arc::new(Tally::new(bytes.len() as u64, 1, None)));
            let piece = Bytes::copy_from_slice(&bytes[offset..offset + size]);
            let sent = collect(memory(piece, Arc::clone(&meter))).await.unwrap();
            assert!(sent == bytes[offset..offset + size], "{offset} {size}");
            assert_eq!(meter.sent(), size as u64);
        }
    }

    #[tokio::test]
    async fn a_source_that_shrank_fails_as_such() {
        let (_keep, path) = a_file(b"12345");
        let meter = Meter::new(&Arc::new(Tally::new(9, 1, None)));
        let error = collect(file(path, 0, 9, Arc::clone(&meter))).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(meter.failure().unwrap().to_string(), "the source ended after 5 of 9 bytes");
    }

    #[tokio::test]
    async fn a_spooled_reader_is_a_file_of_exactly_its_bytes() {
        let source = Source::spooled(&b"123456789"[..], Some(4)).await.unwrap();
        assert_eq!(source.size().await.unwrap(), 4);
        assert_eq!(source.hash(16).await.unwrap().whole, Sha256::of(b"1234"));
        let path = source.place().unwrap().to_owned();
        drop(source);
        assert!(!path.exists());
        let all = Source::spooled(&b"123456789"[..], None).await.unwrap();
        assert_eq!(all.size().await.unwrap(), 9);
        let error = Source::spooled(&b"123"[..], Some(4)).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[tokio::test]
    async fn a_stream_is_read_a_part_at_a_time() {
        let mut reader = &b"123456789"[..];
        let (part, hash, whole) = read_part(&mut reader, 5, sha2::Sha256::new()).await.unwrap();
        assert_eq!((&part[..], hash), (&b"12345"[..], Sha256::of(b"12345")));
        let (part, _, whole) = read_part(&mut reader, 4, whole).await.unwrap();
        assert_eq!(&part[..], b"6789");
        assert_eq!(Sha256(whole.finalize().into()), Sha256::of(b"123456789"));
        assert!(read_part(&mut reader, 1, sha2::Sha256::new()).await.is_err());
    }
}
