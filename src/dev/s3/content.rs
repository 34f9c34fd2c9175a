//! Bytes on their way to disk and back.
//!
//! Nothing holds more than a few hundred kilobytes of an object in memory. Hashing and writing happen on the blocking
//! pool, so that a large upload does not make the others wait.

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

use super::broken;
use super::checksum::{Algorithm, Checksum, Claim, Digests, Hasher};

/// How much is hashed and written in one go: enough to make the hop to the blocking pool cheap.
const BATCH_BYTES: usize = 512 * 1024;

/// How much of an object is read at a time.
const CHUNK_BYTES: u64 = 256 * 1024;

/// How long a sender may be silent before its request is given up, as on AWS, so that a hung client holds no file.
const SILENCE: Duration = Duration::from_secs(60);

/// A run of bytes on disk. It is gone with its last holder, unless something durable names it.
///
/// So a body that never became an object leaves nothing behind, and a reader of an object that is deleted meanwhile
/// still gets all of it.
pub(super) struct Segment {
    path: PathBuf,
    pub(super) size_bytes: u64,
    kept: AtomicBool,
}

impl Segment {
    /// A segment that is on disk already, and named there.
    pub(super) fn kept(path: PathBuf, size_bytes: u64) -> Arc<Self> {
        Arc::new(Self { path, size_bytes, kept: AtomicBool::new(true) })
    }

    /// The file's name, under which records on disk know it.
    pub(super) fn name(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Something durable names it now.
    pub(super) fn keep(&self) {
        self.kept.store(true, Ordering::Relaxed);
    }

    /// Nothing names it any more.
    pub(super) fn release(&self) {
        self.kept.store(false, Ordering::Relaxed);
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        if !self.kept.load(Ordering::Relaxed)
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            // The next start removes it, for nothing names it.
            tracing::warn!(%error, "left {} behind", self.path.display());
        }
    }
}

/// A body that came whole and is what its sender said.
pub(super) struct Received {
    pub(super) segment: Arc<Segment>,
    /// The MD5 in hex, which is the ETag of a body that came in one piece.
    pub(super) etag: String,
    pub(super) checksum: Checksum,
}

/// Writes a body to disk and holds it against its claim; `algorithm` is the checksum that the store keeps.
pub(super) async fn receive<S>(
    directory: &Path,
    body: S,
    size_bytes: u64,
    claim: &Claim,
    algorithm: Algorithm,
) -> S3Result<Received>
where
    S: Stream<Item = Result<Bytes, StdError>> + Unpin,
{
    let path = directory.join(Uuid::new_v4().simple().to_string());
    let hasher = Hasher::default().with(algorithm).with(claim.algorithm.unwrap_or(algorithm));
    let mut body = body;
    let mut came = 0;
    let mut working = tokio::task::spawn_blocking(move || Sink::create(path, hasher));
    loop {
        let (batch, ended) = batch(&mut body).await?;
        came += batch.iter().map(|bytes| bytes.len() as u64).sum::<u64>();
        if came > size_bytes || (ended && came < size_bytes) {
            return Err(s3_error!(IncompleteBody, "announced {size_bytes} bytes, {came} came"));
        }
        let sink = done(working.await)?;
        if ended {
            let (segment, digests) = done(tokio::task::spawn_blocking(move || sink.write(batch)?.finish()).await)?;
            claim.check(&digests)?;
            let checksum = digests.checksum(algorithm).expect("it was asked for");
            return Ok(Received { segment, etag: hex::encode(digests.md5), checksum });
        }
        working = tokio::task::spawn_blocking(move || sink.write(batch));
    }
}

/// The next few pieces of a body, and whether they are its last.
async fn batch<S>(body: &mut S) -> S3Result<(Vec<Bytes>, bool)>
where
    S: Stream<Item = Result<Bytes, StdError>> + Unpin,
{
    let (mut batch, mut size) = (Vec::new(), 0);
    while size < BATCH_BYTES {
        let next = tokio::time::timeout(SILENCE, body.next()).await;
        match next.map_err(|_| s3_error!(RequestTimeout, "nothing came for {} s", SILENCE.as_secs()))? {
            Some(Ok(bytes)) => {
                size += bytes.len();
                batch.push(bytes);
            }
            Some(Err(error)) => return Err(refused(&error)),
            None => return Ok((batch, true)),
        }
    }
    Ok((batch, false))
}

/// Why a body ended early. s3s checks signed bodies as they pass, but keeps the types of its errors to itself.
fn refused(error: &StdError) -> S3Error {
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

fn done<T>(outcome: Result<io::Result<T>, tokio::task::JoinError>) -> S3Result<T> {
    outcome.map_err(broken)?.map_err(broken)
}

/// A file that is being written and hashed.
struct Sink {
    file: File,
    segment: Segment,
    hasher: Hasher,
}

impl Sink {
    fn create(path: PathBuf, hasher: Hasher) -> io::Result<Self> {
        let file = File::create_new(&path)?;
        Ok(Self { file, segment: Segment { path, size_bytes: 0, kept: AtomicBool::new(false) }, hasher })
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
        // Its name has to survive a crash as well as its bytes.
        File::open(self.segment.path.parent().expect("it is in a directory"))?.sync_all()?;
        Ok((Arc::new(self.segment), self.hasher.finish()))
    }
}

/// Streams `range` of the bytes that `segments` hold one after the other.
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
    futures_util::stream::try_unfold(Reader { left, open: None }, |reader| async move {
        tokio::task::spawn_blocking(move || reader.next()).await.map_err(io::Error::other)?
    })
}

/// What is still to be read, and the file that it is being read from.
struct Reader {
    left: VecDeque<(Arc<Segment>, Range<u64>)>,
    open: Option<(Arc<Segment>, File, u64)>,
}

impl Reader {
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
