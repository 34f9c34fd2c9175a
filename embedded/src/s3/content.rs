//! Writes and reads content: the bytes of objects and parts.
//!
//! At most a few hundred kilobytes of an object are in memory. Hashing and disk access run on the blocking pool, so that
//! a large upload does not delay the others.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _};
use s3s::{S3Error, S3ErrorCode, S3Result, StdError, s3_error};
use uuid::Uuid;

use super::checksum::{Algorithm, Checksum, Digests, ExpectedDigest, Hasher};
use super::internal_error;

/// How many bytes are hashed and written at once: enough to make the switch to the blocking pool cheap.
const BATCH_BYTES: usize = 512 * 1024;

/// How many bytes of an object are read at once.
const CHUNK_BYTES: u64 = 256 * 1024;

/// How long a sender may send no byte before its request fails, as on AWS. Without the limit, a stalled client would keep
/// its file.
const READ_TIMEOUT: Duration = Duration::from_secs(60);

/// A content file. It is removed with its last reference in memory, unless a metadata file refers to it.
///
/// So a body that never became an object is removed, and a reader of an object that is deleted meanwhile still gets all
/// its bytes.
pub(super) struct Segment {
    path: PathBuf,
    pub(super) size_bytes: u64,
    is_referenced: AtomicBool,
}

impl Segment {
    /// A segment on disk to which a metadata file refers.
    pub(super) fn referenced(path: PathBuf, size_bytes: u64) -> Arc<Self> {
        Arc::new(Self { path, size_bytes, is_referenced: AtomicBool::new(true) })
    }

    /// The file's name, as in metadata files.
    pub(super) fn name(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Marks that a metadata file refers to the segment.
    pub(super) fn mark_referenced(&self) {
        self.is_referenced.store(true, Ordering::Relaxed);
    }

    /// Marks that no metadata file refers to the segment.
    pub(super) fn mark_unreferenced(&self) {
        self.is_referenced.store(false, Ordering::Relaxed);
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        if !self.is_referenced.load(Ordering::Relaxed)
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            // The next start removes the file, because no metadata file refers to it.
            tracing::warn!(%error, "could not remove {}, the next start removes it", self.path.display());
        }
    }
}

/// A complete body that matches its declared checksum.
pub(super) struct ReceivedBody {
    pub(super) segment: Arc<Segment>,
    /// The MD5 in hex. It is the ETag of an object that was sent in one PUT.
    pub(super) etag: String,
    pub(super) checksum: Checksum,
}

/// Writes a body to disk and compares it with `expected`. `algorithm` is the checksum that the store keeps.
pub(super) async fn receive<S>(
    directory: &Path,
    body: S,
    size_bytes: u64,
    expected: &ExpectedDigest,
    algorithm: Algorithm,
) -> S3Result<ReceivedBody>
where
    S: Stream<Item = Result<Bytes, StdError>> + Unpin,
{
    let path = directory.join(Uuid::new_v4().simple().to_string());
    let hasher = Hasher::default().with(algorithm).with(expected.algorithm.unwrap_or(algorithm));
    let mut body = body;
    let mut received_bytes = 0;
    let mut writing = tokio::task::spawn_blocking(move || ContentWriter::create(path, hasher));
    loop {
        let (batch, ended) = read_batch(&mut body).await?;
        received_bytes += batch.iter().map(|bytes| bytes.len() as u64).sum::<u64>();
        if received_bytes > size_bytes || (ended && received_bytes < size_bytes) {
            return Err(s3_error!(
                IncompleteBody,
                "content-length is {size_bytes} bytes, but {received_bytes} bytes were received"
            ));
        }
        let writer = flatten_result(writing.await)?;
        if ended {
            let (segment, digests) = flatten_result(tokio::task::spawn_blocking(move || writer.write(batch)?.finish()).await)?;
            expected.check(&digests)?;
            let checksum = digests.checksum(algorithm).expect("the hasher has this algorithm");
            return Ok(ReceivedBody { segment, etag: hex::encode(digests.md5), checksum });
        }
        writing = tokio::task::spawn_blocking(move || writer.write(batch));
    }
}

/// Reads the next chunks of a body, and whether they are its last.
async fn read_batch<S>(body: &mut S) -> S3Result<(Vec<Bytes>, bool)>
where
    S: Stream<Item = Result<Bytes, StdError>> + Unpin,
{
    let (mut batch, mut size) = (Vec::new(), 0);
    while size < BATCH_BYTES {
        let next = tokio::time::timeout(READ_TIMEOUT, body.next()).await;
        match next.map_err(|_| s3_error!(RequestTimeout, "no byte was received for {} s", READ_TIMEOUT.as_secs()))? {
            Some(Ok(bytes)) => {
                size += bytes.len();
                batch.push(bytes);
            }
            Some(Err(error)) => return Err(body_error(&error)),
            None => return Ok((batch, true)),
        }
    }
    Ok((batch, false))
}

/// Why a body ended early. s3s verifies signed bodies while they are read, but its error types are private.
fn body_error(error: &StdError) -> S3Error {
    let message = error.to_string();
    if message.contains("Sha256Mismatch") {
        let mut error = S3Error::new(S3ErrorCode::Custom("XAmzContentSHA256Mismatch".into()));
        error.set_status_code(hyper::StatusCode::BAD_REQUEST);
        error.set_message("The provided 'x-amz-content-sha256' header does not match what was computed.");
        return error;
    }
    if message.contains("SignatureMismatch") {
        return s3_error!(SignatureDoesNotMatch, "the signature of a chunk does not match");
    }
    s3_error!(IncompleteBody, "the body ended early")
}

fn flatten_result<T>(outcome: Result<io::Result<T>, tokio::task::JoinError>) -> S3Result<T> {
    outcome.map_err(internal_error)?.map_err(internal_error)
}

/// A content file that is being written and hashed.
struct ContentWriter {
    file: File,
    segment: Segment,
    hasher: Hasher,
}

impl ContentWriter {
    fn create(path: PathBuf, hasher: Hasher) -> io::Result<Self> {
        let file = File::create_new(&path)?;
        Ok(Self { file, segment: Segment { path, size_bytes: 0, is_referenced: AtomicBool::new(false) }, hasher })
    }

    fn write(mut self, batch: Vec<Bytes>) -> io::Result<Self> {
        for bytes in batch {
            self.file.write_all(&bytes)?;
            self.hasher.update(&bytes);
            self.segment.size_bytes += bytes.len() as u64;
        }
        Ok(self)
    }

    fn finish(self) -> io::Result<(Arc<Segment>, Digests)> {
        self.file.sync_all()?;
        // The directory is synced too, so that the name survives a crash.
        File::open(self.segment.path.parent().expect("it is in a directory"))?.sync_all()?;
        Ok((Arc::new(self.segment), self.hasher.finish()))
    }
}

/// Streams `range` of the concatenated bytes of `segments`.
pub(super) fn read(segments: &[Arc<Segment>], range: Range<u64>) -> impl Stream<Item = Result<Bytes, io::Error>> + use<> {
    let mut left = VecDeque::new();
    let mut start = 0;
    for segment in segments {
        let end = start + segment.size_bytes;
        let (from, to) = (range.start.max(start), range.end.min(end));
        if from < to {
            left.push_back((Arc::clone(segment), from - start..to - start));
        }
        start = end;
    }
    futures_util::stream::try_unfold(SegmentReader { left, open: None }, |reader| async move {
        tokio::task::spawn_blocking(move || reader.next()).await.map_err(io::Error::other)?
    })
}

/// The segments that are still to be read, and the open file.
struct SegmentReader {
    left: VecDeque<(Arc<Segment>, Range<u64>)>,
    open: Option<(Arc<Segment>, File, u64)>,
}

impl SegmentReader {
    fn next(mut self) -> io::Result<Option<(Bytes, Self)>> {
        if self.open.is_none() {
            let Some((segment, range)) = self.left.pop_front() else { return Ok(None) };
            let mut file = File::open(&segment.path)?;
            file.seek(SeekFrom::Start(range.start))?;
            self.open = Some((segment, file, range.end - range.start));
        }
        let (segment, mut file, left_bytes) = self.open.take().expect("a file was opened just above");
        let size = left_bytes.min(CHUNK_BYTES);
        let mut chunk = vec![0; usize::try_from(size).expect("a chunk fits in memory")];
        file.read_exact(&mut chunk)?;
        if left_bytes > size {
            self.open = Some((segment, file, left_bytes - size));
        }
        Ok(Some((chunk.into(), self)))
    }
}
