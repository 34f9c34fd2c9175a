//! Uploads bytes and publishes their pointer: open, put, complete, with retries of each step.
//!
//! A file or bytes in memory can be read twice, so they are hashed first, whole and part by part. S3 then checks every
//! part against its declared hash. A stream is hashed while it is sent.

use std::fmt;
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::io::AsyncRead;
use uuid::Uuid;

use crate::api::{CompleteUpload, Completed, ErrorCode, Mode, ReadUpload, Upload, UploadState, is_valid_filename};
use crate::checksum::Sha256;
use crate::error::Error;
use crate::http::Client;
use crate::options::UploadOptions;
use crate::parts::{self, Layout, OpenRequest, PartUploader};
use crate::progress::{HashCallback, Progress, ProgressCallback, ProgressTotals};
use crate::source::{self, Hashes, Source};

/// How often the missing bytes are sent again after complete found them missing.
const MAX_ROUNDS: u32 = 3;

/// The wait of one long poll. It is below the API's limit of 30 s, because many proxies have a timeout of 30 s.
const LONG_POLL_SECONDS: u64 = 20;

/// The time limit for finding the id of a cancelled upload, and for aborting a failed upload.
const ABORT_TIMEOUT: Duration = Duration::from_secs(5);

/// The upper limit of the wait. Adding `Duration::MAX` to an `Instant` would overflow.
const MAX_WAIT: Duration = Duration::from_secs(365 * 86_400);

/// The pause after a long poll that returned early without a change.
const LONG_POLL_PAUSE: Duration = Duration::from_millis(500);

impl Client {
    /// Prepares an upload. The topic's name is enough if the default options fit.
    pub fn upload(&self, options: impl Into<UploadOptions>) -> Uploader {
        let (open_request, opened) = (OnceLock::new(), OnceLock::new());
        let upload_run = UploadRun {
            client: self.clone(),
            options: options.into(),
            on_progress: None,
            on_hash_progress: None,
            on_open: None,
            open_request,
            opened,
        };
        Uploader { upload_run, cancel: None }
    }
}

/// A prepared upload. [`file`](Self::file), [`bytes`](Self::bytes), [`stream`](Self::stream), [`spooled`](Self::spooled)
/// or [`resume`](Self::resume) runs it.
///
/// Dropping the running future stops the upload. It stays open until it expires and can be resumed until then.
#[must_use = "nothing is uploaded until file, bytes, stream, spooled or resume is called"]
pub struct Uploader {
    upload_run: UploadRun,
    cancel: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

impl fmt::Debug for Uploader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Uploader").field("options", &self.upload_run.options).finish_non_exhaustive()
    }
}

/// The source that the upload reads.
enum Input {
    Source(Source),
    Stream(Box<dyn AsyncRead + Send + Unpin>, u64),
    Resume(Uuid, Source),
}

impl Uploader {
    /// Calls `callback` with the progress, at most several times a second. It must not block.
    pub fn on_progress(mut self, callback: impl Fn(Progress) + Send + Sync + 'static) -> Self {
        self.upload_run.on_progress = Some(Arc::new(callback));
        self
    }

    /// Calls `callback` while the bytes are hashed, before the upload is opened, with the number of hashed bytes and of all
    /// bytes. It must not block.
    pub fn on_hash_progress(mut self, callback: impl Fn(u64, u64) + Send + Sync + 'static) -> Self {
        self.upload_run.on_hash_progress = Some(Arc::new(callback));
        self
    }

    /// Calls `callback` with the opened upload before its bytes are sent. [`resume`](Self::resume) needs its id later.
    pub fn on_open(mut self, callback: impl Fn(&Upload) + Send + Sync + 'static) -> Self {
        self.upload_run.on_open = Some(Arc::new(callback));
        self
    }

    /// Cancels the upload when `signal` completes: the upload is aborted at the broker, and the result is
    /// [`Error::Cancelled`].
    pub fn cancelled_by(mut self, signal: impl Future<Output = ()> + Send + 'static) -> Self {
        self.cancel = Some(Box::pin(signal));
        self
    }

    /// Uploads a file. It is read twice: to hash it and to send it.
    ///
    /// # Errors
    /// See [`Error`]. After an error, uploaded parts are kept for [`resume`](Self::resume). A failed single PUT is
    /// aborted, unless the caller set an `idempotency_key` to continue it.
    pub async fn file(mut self, path: impl AsRef<Path>) -> Result<Completed, Error> {
        self.set_default_filename(path.as_ref());
        let source = Source::File(path.as_ref().to_owned());
        self.run(async { Ok(Input::Source(source)) }).await
    }

    /// Uploads bytes from memory.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn bytes(self, bytes: impl Into<Bytes>) -> Result<Completed, Error> {
        let source = Source::Memory(bytes.into());
        self.run(async { Ok(Input::Source(source)) }).await
    }

    /// Uploads exactly `size` bytes of a reader that cannot be read twice. Two parts are in memory at a time.
    ///
    /// # Errors
    /// See [`Error`]. A reader that fails or ends early aborts the upload, because its bytes cannot be read again.
    pub async fn stream(self, reader: impl AsyncRead + Send + Unpin + 'static, size: u64) -> Result<Completed, Error> {
        self.run(async move { Ok(Input::Stream(Box::new(reader), size)) }).await
    }

    /// Uploads all bytes of a reader of unknown size. They are written to a temporary file first.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn spooled(self, reader: impl AsyncRead + Send + Unpin) -> Result<Completed, Error> {
        self.run(async { Ok(Input::Source(Source::spooled(reader, None).await?)) }).await
    }

    /// Continues an upload that an earlier run left open. Only the bytes that storage lacks are sent.
    ///
    /// The file must be the same as before. Its size is compared at once, and its hash at complete, before the pointer is
    /// published. A single PUT gets a new URL only with the options and the `idempotency_key` that opened it.
    ///
    /// # Errors
    /// [`Error::WrongSize`] or [`Error::Corrupt`] for another file. [`Error::Invalid`] if the options have another topic or key than the upload.
    /// Otherwise see [`Error`].
    pub async fn resume(mut self, id: Uuid, path: impl AsRef<Path>) -> Result<Completed, Error> {
        self.set_default_filename(path.as_ref());
        let source = Source::File(path.as_ref().to_owned());
        self.run(async move { Ok(Input::Resume(id, source)) }).await
    }

    /// Uses the file's own name if the broker accepts it. An invalid name is omitted: the bytes matter more than the name.
    fn set_default_filename(&mut self, path: &Path) {
        let name = || path.file_name().and_then(|name| name.to_str()).filter(|name| is_valid_filename(name)).map(str::to_owned);
        self.upload_run.options.filename = self.upload_run.options.filename.take().or_else(name);
    }

    async fn run(self, work: impl Future<Output = Result<Input, Error>>) -> Result<Completed, Error> {
        let Self { upload_run, cancel } = self;
        let work = async { upload_run.run(work.await?).await };
        let Some(cancel) = cancel else { return work.await };
        tokio::select! {
            biased;
            () = cancel => {}
            done = work => return done,
        }
        // All requests of the upload are dropped before the abort, so that none is sent after it.
        let id = upload_run.find_id().await;
        let aborted = match id {
            Some(id) => upload_run.client.abort(id).await.is_ok(),
            None => false,
        };
        Err(Error::Cancelled { id, aborted })
    }
}

type OnOpen = Arc<dyn Fn(&Upload) + Send + Sync>;

/// One running upload.
struct UploadRun {
    client: Client,
    options: UploadOptions,
    on_progress: Option<ProgressCallback>,
    on_hash_progress: Option<Arc<dyn Fn(u64, u64) + Send + Sync>>,
    on_open: Option<OnOpen>,
    /// The request that opens the upload.
    open_request: OnceLock<OpenRequest>,
    opened: OnceLock<Uuid>,
}

/// An open upload, and when its URLs were requested.
struct Opened {
    upload: Upload,
    requested_at: Instant,
}

impl UploadRun {
    async fn run(&self, work: Input) -> Result<Completed, Error> {
        match work {
            Input::Source(source) => self.upload(source).await,
            Input::Resume(id, source) => self.resume(id, source).await,
            Input::Stream(reader, size) => self.stream(reader, size).await,
        }
    }

    /// The upload's id. If the response to open was not received, the same request with the same key returns it.
    async fn find_id(&self) -> Option<Uuid> {
        if let Some(id) = self.opened.get() {
            return Some(*id);
        }
        let open_request = self.open_request.get()?;
        let opening = self.client.open_or_replay(&open_request.body, Some(&open_request.idempotency_key));
        let (upload, _) = tokio::time::timeout(ABORT_TIMEOUT, opening).await.ok()?.ok()?;
        Some(upload.id)
    }

    async fn upload(&self, source: Source) -> Result<Completed, Error> {
        let size = source.size().await?;
        let hashes = self.hash(&source, size, source::part_size(size, self.options.part_size)).await?;
        let open_request = self.options.open_request(hashes.size, Some(&hashes));
        let opened = self.open(&open_request).await?;
        self.transfer(&source, &hashes, opened, Some(&open_request), None).await
    }

    async fn hash(&self, source: &Source, size: u64, part_size: u64) -> Result<Hashes, Error> {
        let on_progress =
            self.on_hash_progress.clone().map(|callback| -> HashCallback { Arc::new(move |hashed| callback(hashed, size)) });
        Ok(source.hash(part_size, on_progress).await?)
    }

    async fn resume(&self, id: Uuid, source: Source) -> Result<Completed, Error> {
        let requested_at = Instant::now();
        let upload = self.client.read(id, &ReadUpload::default()).await?;
        self.options.check_matches(&upload)?;
        self.report_open(&upload);
        let size = source.size().await?;
        if size != upload.size {
            let declared = upload.size;
            return Err(Error::WrongSize(format!(
                "the file has {size} bytes, but upload {id} is for {declared} bytes: is it the same file?"
            )));
        }
        let part_size = upload.part_size.unwrap_or_else(|| source::part_size(size, self.options.part_size));
        let hashes = self.hash(&source, size, part_size).await?;
        let single = upload.mode == Mode::Single && self.options.idempotency_key.is_some();
        let open_request = single.then(|| self.options.open_request(size, Some(&hashes)));
        let sha256 = Some(hashes.whole);
        self.transfer(&source, &hashes, Opened { upload, requested_at }, open_request.as_ref(), sha256).await
    }

    async fn stream(&self, mut reader: Box<dyn AsyncRead + Send + Unpin>, size: u64) -> Result<Completed, Error> {
        let part_size = source::part_size(size, self.options.part_size);
        if size <= part_size {
            let (bytes, ..) = source::read_part(&mut reader, size, sha2::Sha256::default()).await?;
            return self.upload(Source::Memory(bytes)).await;
        }
        let open_request = self.options.open_request(size, None);
        let opened = self.open(&open_request).await?;
        let id = opened.upload.id;
        let sent = match (opened.upload.state, opened.upload.mode) {
            (UploadState::Open, Mode::Multipart) => self.put_stream(reader, &opened.upload).await,
            // A single PUT of a stream cannot be retried. From a temporary file it can.
            (UploadState::Open, Mode::Single) => self.put_spooled(reader, opened, &open_request).await,
            // An earlier run with this key has already left state `open`, so complete returns its result.
            _ => return self.complete_and_wait(id, None).await,
        };
        match sent {
            Err(Error::Io(error)) => {
                // Best effort. Without its source, the upload could only expire.
                let _ = self.client.abort(id).await;
                Err(Error::Io(error))
            }
            other => other,
        }
    }

    async fn put_stream(&self, mut reader: Box<dyn AsyncRead + Send + Unpin>, upload: &Upload) -> Result<Completed, Error> {
        let layout = Layout::of(upload)?;
        let totals = self.totals(upload.size, layout.count());
        totals.set_initial(0, 0);
        let whole = PartUploader::new(&self.client, upload, layout, &[], true, &totals).put_stream(&mut *reader).await?;
        check_pointer(self.complete_and_wait(upload.id, Some(whole)).await?, whole)
    }

    async fn put_spooled(
        &self,
        reader: Box<dyn AsyncRead + Send + Unpin>,
        opened: Opened,
        open_request: &OpenRequest,
    ) -> Result<Completed, Error> {
        let source = Source::spooled(reader, Some(opened.upload.size)).await?;
        let hashes = self.hash(&source, opened.upload.size, opened.upload.size).await?;
        self.transfer(&source, &hashes, opened, Some(open_request), Some(hashes.whole)).await
    }

    async fn open(&self, open_request: &OpenRequest) -> Result<Opened, Error> {
        self.open_request.get_or_init(|| open_request.clone());
        let requested_at = Instant::now();
        let (upload, replayed) = self.client.open_or_replay(&open_request.body, Some(&open_request.idempotency_key)).await?;
        self.report_open(&upload);
        // An upload of an earlier run may already have parts. Only a read of the upload lists them.
        if replayed && upload.state == UploadState::Open && upload.mode == Mode::Multipart {
            let upload = self.client.read(upload.id, &ReadUpload::default()).await?;
            return Ok(Opened { upload, requested_at });
        }
        Ok(Opened { upload, requested_at })
    }

    fn report_open(&self, upload: &Upload) {
        if self.opened.set(upload.id).is_ok()
            && let Some(on_open) = &self.on_open
        {
            on_open(upload);
        }
    }

    fn totals(&self, bytes: u64, parts: u32) -> Arc<ProgressTotals> {
        Arc::new(ProgressTotals::new(bytes, parts, self.on_progress.clone()))
    }

    /// Sends the missing bytes and completes the upload, until nothing is missing.
    async fn transfer(
        &self,
        source: &Source,
        hashes: &Hashes,
        mut opened: Opened,
        open_request: Option<&OpenRequest>,
        sha256: Option<Sha256>,
    ) -> Result<Completed, Error> {
        let id = opened.upload.id;
        let mut round = 1;
        loop {
            if let Err(error) = self.put(source, hashes, &opened, open_request).await {
                // No later run knows a random key, so the upload could only expire.
                if opened.upload.mode == Mode::Single && open_request.is_some() && self.options.idempotency_key.is_none() {
                    let _ = tokio::time::timeout(ABORT_TIMEOUT, self.client.abort(id)).await;
                }
                return Err(error);
            }
            let missing_error = match self.complete_and_wait(id, sha256).await {
                Err(error) if error.is_problem(ErrorCode::ObjectMissing) || error.is_problem(ErrorCode::PartsIncomplete) => error,
                other => return check_pointer(other?, hashes.whole),
            };
            let signable = opened.upload.mode == Mode::Multipart || open_request.is_some();
            if round == MAX_ROUNDS || !signable {
                return Err(missing_error);
            }
            round += 1;
            let requested_at = Instant::now();
            opened = Opened { upload: self.client.read(id, &ReadUpload::default()).await?, requested_at };
        }
    }

    async fn put(
        &self,
        source: &Source,
        hashes: &Hashes,
        Opened { upload, requested_at }: &Opened,
        open_request: Option<&OpenRequest>,
    ) -> Result<(), Error> {
        if upload.state != UploadState::Open {
            return Ok(());
        }
        if upload.mode == Mode::Single {
            let totals = self.totals(upload.size, 1);
            totals.set_initial(0, 0);
            return parts::put_single(&self.client, upload, *requested_at, open_request, source, &totals).await;
        }
        let layout = Layout::of(upload)?;
        let missing = layout.missing(upload);
        let totals = self.totals(upload.size, layout.count());
        let left: u64 = missing.iter().map(|number| layout.part(*number).1).sum();
        totals.set_initial(upload.size - left, layout.count() - missing.len() as u32);
        // Hashes for another part size do not apply to these parts.
        let known = if upload.part_size == Some(hashes.part_size) { &hashes.parts[..] } else { &[] };
        let parts = PartUploader::new(&self.client, upload, layout, known, false, &totals);
        let signed_parts = upload.parts.as_deref().unwrap_or_default();
        parts.put_missing(source, missing, signed_parts, *requested_at, self.options.concurrency).await
    }

    /// Completes the upload. Waits while the broker verifies, or until the record is published if the caller asked for
    /// that.
    async fn complete_and_wait(&self, id: Uuid, sha256: Option<Sha256>) -> Result<Completed, Error> {
        let deadline = Instant::now() + self.options.wait_timeout.min(MAX_WAIT);
        loop {
            let completed = self.complete(id, sha256).await?;
            let wait = match completed.state {
                UploadState::Completing => true,
                UploadState::Verified => self.options.wait_published,
                _ => false,
            };
            if !wait {
                return Ok(completed);
            }
            if !self.wait_for_change(id, completed.state, deadline).await? {
                return match completed.state {
                    // The pointer is queued in the outbox. The state `verified` says that it is not published yet.
                    UploadState::Verified => Ok(completed),
                    _ => Err(Error::WaitTimedOut { id, seconds: self.options.wait_timeout.as_secs() }),
                };
            }
        }
    }

    async fn complete(&self, id: Uuid, sha256: Option<Sha256>) -> Result<Completed, Error> {
        let completed = self.client.complete(id, &CompleteUpload { sha256, parts: None }).await;
        match (sha256, completed) {
            // The broker accepts the declared hash again. A different hash means a different file.
            (Some(sha256), Err(error)) if error.is_problem(ErrorCode::ValidationFailed) => {
                let (expected, found) = ("the declared bytes".to_owned(), format!("bytes with sha256 {sha256}: {error}"));
                Err(Error::Corrupt { expected, found })
            }
            (_, completed) => completed,
        }
    }

    /// Long-polls until the upload has left `state`. Returns false if the deadline passed first.
    async fn wait_for_change(&self, id: Uuid, state: UploadState, deadline: Instant) -> Result<bool, Error> {
        let mut version = None;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            // The first read only gets the version, so that a change before it is not missed.
            let wait = version.map(|_| LONG_POLL_SECONDS.min(left.as_secs()));
            let requested_at = Instant::now();
            let upload = self.client.read(id, &ReadUpload { wait, version }).await?;
            if upload.state != state {
                return Ok(true);
            }
            if left.is_zero() {
                return Ok(false);
            }
            if version.is_some() && requested_at.elapsed() < LONG_POLL_PAUSE {
                tokio::time::sleep(LONG_POLL_PAUSE.min(left)).await;
            }
            version = Some(upload.version);
        }
    }
}

/// Compares the pointer with the sent bytes. A resumed or replayed upload may be of other bytes.
fn check_pointer(completed: Completed, sent: Sha256) -> Result<Completed, Error> {
    match completed.pointer.as_ref().and_then(|pointer| pointer.sha256) {
        Some(found) if found != sent => {
            Err(Error::Corrupt { expected: format!("sha256 {sent}"), found: format!("a pointer to {found}") })
        }
        _ => Ok(completed),
    }
}
