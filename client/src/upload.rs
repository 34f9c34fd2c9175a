//! From bytes to a pointer in Kafka: open, put, complete, with everything in between that can go wrong.
//!
//! Bytes that can be read again (a file, memory) are hashed first, whole and part by part, so that storage
//! checks every part against what was promised. A stream is hashed as it passes.

use std::fmt;
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::io::AsyncRead;
use uuid::Uuid;

use crate::api::{CompleteUpload, Completed, Mode, ReadUpload, Upload, UploadState};
use crate::checksum::Sha256;
use crate::error::Error;
use crate::http::Client;
use crate::options::UploadOptions;
use crate::parts::{self, Layout, Opening, Parts};
use crate::progress::{Progress, Report, Tally};
use crate::source::{self, Hashes, Source};

/// How often complete may find something missing and have it put again.
const ROUNDS: u32 = 3;

/// One long-poll: below the contract's 30 seconds, so that no proxy's own half minute cuts it.
const POLL_SECONDS: u64 = 20;

/// How long a cancelled upload that was just being opened is looked for, and how long taking back a failed one may take.
const CANCEL_PATIENCE: Duration = Duration::from_secs(5);

/// A year: the clock takes no `Duration::MAX`.
const LONGEST_WAIT: Duration = Duration::from_secs(365 * 86_400);

/// The pause after a long-poll that came back at once without news.
const POLL_PAUSE: Duration = Duration::from_millis(500);

impl Client {
    /// Prepares an upload; a topic's name is enough where the defaults fit.
    pub fn upload(&self, options: impl Into<UploadOptions>) -> Uploader {
        let (opening, opened) = (OnceLock::new(), OnceLock::new());
        let job = Job { client: self.clone(), options: options.into(), report: None, on_open: None, opening, opened };
        Uploader { job, cancel: None }
    }
}

/// An upload that waits for its bytes: [`file`](Self::file), [`bytes`](Self::bytes), [`stream`](Self::stream),
/// [`spooled`](Self::spooled) or [`resume`](Self::resume) runs it.
///
/// Dropping the running future stops it and leaves the upload open until it expires; it can be resumed until then.
#[must_use = "nothing is uploaded before it gets its bytes"]
pub struct Uploader {
    job: Job,
    cancel: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

impl fmt::Debug for Uploader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Uploader").field("options", &self.job.options).finish_non_exhaustive()
    }
}

/// Where the bytes come from.
enum Work {
    Source(Source),
    Stream(Box<dyn AsyncRead + Send + Unpin>, u64),
    Resume(Uuid, Source),
}

impl Uploader {
    /// Tells `report` how far it is, several times a second at most speed; it must not block.
    pub fn on_progress(mut self, report: impl Fn(Progress) + Send + Sync + 'static) -> Self {
        self.job.report = Some(Arc::new(report));
        self
    }

    /// Tells `opened` the upload before its bytes go up: its id is what [`resume`](Self::resume) needs later.
    pub fn on_open(mut self, opened: impl Fn(&Upload) + Send + Sync + 'static) -> Self {
        self.job.on_open = Some(Arc::new(opened));
        self
    }

    /// Stops when `signal` completes: the upload is aborted at the broker, the answer is [`Error::Cancelled`].
    pub fn cancelled_by(mut self, signal: impl Future<Output = ()> + Send + 'static) -> Self {
        self.cancel = Some(Box::pin(signal));
        self
    }

    /// Uploads a file, reading it twice: once for its hashes, once to send it.
    ///
    /// # Errors
    /// See [`Error`]. Parts that were put stay, for [`resume`](Self::resume); a single PUT that failed is taken back, unless
    /// an `idempotency_key` of the caller's leads to it again.
    pub async fn file(mut self, path: impl AsRef<Path>) -> Result<Completed, Error> {
        self.name_after(path.as_ref());
        let source = Source::File(path.as_ref().to_owned());
        self.run(async { Ok(Work::Source(source)) }).await
    }

    /// Uploads bytes from memory.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn bytes(self, bytes: impl Into<Bytes>) -> Result<Completed, Error> {
        let source = Source::Memory(bytes.into());
        self.run(async { Ok(Work::Source(source)) }).await
    }

    /// Uploads exactly `size` bytes of a reader that cannot go back, holding two parts in memory.
    ///
    /// # Errors
    /// See [`Error`]. A reader that fails or ends early aborts the upload: nobody else can finish it.
    pub async fn stream(self, reader: impl AsyncRead + Send + Unpin + 'static, size: u64) -> Result<Completed, Error> {
        self.run(async move { Ok(Work::Stream(Box::new(reader), size)) }).await
    }

    /// Uploads all bytes of a reader of unknown size, by way of a temporary file.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn spooled(self, reader: impl AsyncRead + Send + Unpin) -> Result<Completed, Error> {
        self.run(async { Ok(Work::Source(Source::spooled(reader, None).await?)) }).await
    }

    /// Goes on with an upload that another run left open: only what storage lacks is sent.
    ///
    /// The file must be the one of before: its size is compared at once, its hash at complete, before anything is
    /// published. A single PUT gets a fresh URL only with the options and the `idempotency_key` that opened it.
    ///
    /// # Errors
    /// [`Error::Corrupt`] where it is another file, [`Error::Invalid`] where the options name another topic or key than the
    /// upload has; else see [`Error`].
    pub async fn resume(mut self, id: Uuid, path: impl AsRef<Path>) -> Result<Completed, Error> {
        self.name_after(path.as_ref());
        let source = Source::File(path.as_ref().to_owned());
        self.run(async move { Ok(Work::Resume(id, source)) }).await
    }

    fn name_after(&mut self, path: &Path) {
        let name = || path.file_name().and_then(|name| name.to_str()).filter(|name| is_welcome(name)).map(str::to_owned);
        self.job.options.filename = self.job.options.filename.take().or_else(name);
    }

    async fn run(self, work: impl Future<Output = Result<Work, Error>>) -> Result<Completed, Error> {
        let Self { job, cancel } = self;
        let work = async { job.run(work.await?).await };
        let Some(cancel) = cancel else { return work.await };
        tokio::select! {
            biased;
            () = cancel => {}
            done = work => return done,
        }
        // Only now, with every request of the upload dropped, can nothing be put behind the abort.
        let id = job.found().await;
        let aborted = match id {
            Some(id) => job.client.abort(id).await.is_ok(),
            None => false,
        };
        Err(Error::Cancelled { id, aborted })
    }
}

type OnOpen = Arc<dyn Fn(&Upload) + Send + Sync>;

/// One upload as it runs.
struct Job {
    client: Client,
    options: UploadOptions,
    report: Option<Report>,
    on_open: Option<OnOpen>,
    /// What was sent to open it.
    opening: OnceLock<Opening>,
    opened: OnceLock<Uuid>,
}

/// An upload and when its URLs were asked for.
struct Opened {
    upload: Upload,
    asked: Instant,
}

impl Job {
    async fn run(&self, work: Work) -> Result<Completed, Error> {
        match work {
            Work::Source(source) => self.upload(source).await,
            Work::Resume(id, source) => self.resume(id, source).await,
            Work::Stream(reader, size) => self.stream(reader, size).await,
        }
    }

    /// The upload, also where the answer to its opening was not waited for: the same key gives it again.
    async fn found(&self) -> Option<Uuid> {
        if let Some(id) = self.opened.get() {
            return Some(*id);
        }
        let opening = self.opening.get()?;
        let asking = self.client.open_or_replay(&opening.request, Some(&opening.key));
        let (upload, _) = tokio::time::timeout(CANCEL_PATIENCE, asking).await.ok()?.ok()?;
        Some(upload.id)
    }

    async fn upload(&self, source: Source) -> Result<Completed, Error> {
        let size = source.size().await?;
        let hashes = source.hash(source::part_size(size, self.options.part_size)).await?;
        let opening = self.options.opening(hashes.size, Some(&hashes));
        let opened = self.open(&opening).await?;
        self.transfer(&source, &hashes, opened, Some(&opening), None).await
    }

    async fn resume(&self, id: Uuid, source: Source) -> Result<Completed, Error> {
        let asked = Instant::now();
        let upload = self.client.read(id, &ReadUpload::default()).await?;
        self.options.check_same(&upload)?;
        self.tell(&upload);
        let size = source.size().await?;
        if size != upload.size {
            return Err(Error::Corrupt { expected: format!("{} bytes", upload.size), found: format!("a file of {size}") });
        }
        let part_size = upload.part_size.unwrap_or_else(|| source::part_size(size, self.options.part_size));
        let hashes = source.hash(part_size).await?;
        let single = upload.mode == Mode::Single && self.options.idempotency_key.is_some();
        let opening = single.then(|| self.options.opening(size, Some(&hashes)));
        let sha256 = Some(hashes.whole);
        self.transfer(&source, &hashes, Opened { upload, asked }, opening.as_ref(), sha256).await
    }

    async fn stream(&self, mut reader: Box<dyn AsyncRead + Send + Unpin>, size: u64) -> Result<Completed, Error> {
        let part_size = source::part_size(size, self.options.part_size);
        if size <= part_size {
            let (bytes, ..) = source::read_part(&mut reader, size, sha2::Sha256::default()).await?;
            return self.upload(Source::Memory(bytes)).await;
        }
        let opening = self.options.opening(size, None);
        let opened = self.open(&opening).await?;
        let id = opened.upload.id;
        let sent = match (opened.upload.state, opened.upload.mode) {
            (UploadState::Open, Mode::Multipart) => self.put_stream(reader, &opened.upload).await,
            // A single PUT cannot be tried again from a stream, but from a file it can.
            (UploadState::Open, Mode::Single) => self.put_spooled(reader, opened, &opening).await,
            // A key of before: whatever became of that upload is the answer.
            _ => return self.finish(id, None).await,
        };
        match sent {
            Err(Error::Io(error)) => {
                // Best effort: without the source only expiry would end it.
                let _ = self.client.abort(id).await;
                Err(Error::Io(error))
            }
            other => other,
        }
    }

    async fn put_stream(&self, mut reader: Box<dyn AsyncRead + Send + Unpin>, upload: &Upload) -> Result<Completed, Error> {
        let layout = Layout::of(upload)?;
        let tally = self.tally(upload.size, layout.count());
        tally.begin_with(0, 0);
        let whole = Parts::new(&self.client, upload, layout, &[], true, &tally).put_stream(&mut *reader).await?;
        checked(self.finish(upload.id, Some(whole)).await?, whole)
    }

    async fn put_spooled(
        &self,
        reader: Box<dyn AsyncRead + Send + Unpin>,
        opened: Opened,
        opening: &Opening,
    ) -> Result<Completed, Error> {
        let source = Source::spooled(reader, Some(opened.upload.size)).await?;
        let hashes = source.hash(opened.upload.size).await?;
        self.transfer(&source, &hashes, opened, Some(opening), Some(hashes.whole)).await
    }

    async fn open(&self, opening: &Opening) -> Result<Opened, Error> {
        self.opening.get_or_init(|| opening.clone());
        let asked = Instant::now();
        let (upload, replayed) = self.client.open_or_replay(&opening.request, Some(&opening.key)).await?;
        self.tell(&upload);
        // An upload of before may hold parts already; only reading it says which.
        if replayed && upload.state == UploadState::Open && upload.mode == Mode::Multipart {
            let upload = self.client.read(upload.id, &ReadUpload::default()).await?;
            return Ok(Opened { upload, asked });
        }
        Ok(Opened { upload, asked })
    }

    fn tell(&self, upload: &Upload) {
        if self.opened.set(upload.id).is_ok()
            && let Some(on_open) = &self.on_open
        {
            on_open(upload);
        }
    }

    fn tally(&self, bytes: u64, parts: u32) -> Arc<Tally> {
        Arc::new(Tally::new(bytes, parts, self.report.clone()))
    }

    /// Puts what is missing and completes, until nothing is missing any more.
    async fn transfer(
        &self,
        source: &Source,
        hashes: &Hashes,
        mut opened: Opened,
        opening: Option<&Opening>,
        sha256: Option<Sha256>,
    ) -> Result<Completed, Error> {
        let id = opened.upload.id;
        let mut round = 1;
        loop {
            if let Err(error) = self.put(source, hashes, &opened, opening).await {
                // Nobody else knows a key that was drawn at random: what it opened could only wait for its end.
                if opened.upload.mode == Mode::Single && opening.is_some() && self.options.idempotency_key.is_none() {
                    let _ = tokio::time::timeout(CANCEL_PATIENCE, self.client.abort(id)).await;
                }
                return Err(error);
            }
            let missing = match self.finish(id, sha256).await {
                Err(error) if error.is_problem("object-missing") || error.is_problem("parts-incomplete") => error,
                other => return checked(other?, hashes.whole),
            };
            let signable = opened.upload.mode == Mode::Multipart || opening.is_some();
            if round == ROUNDS || !signable {
                return Err(missing);
            }
            round += 1;
            let asked = Instant::now();
            opened = Opened { upload: self.client.read(id, &ReadUpload::default()).await?, asked };
        }
    }

    async fn put(
        &self,
        source: &Source,
        hashes: &Hashes,
        Opened { upload, asked }: &Opened,
        opening: Option<&Opening>,
    ) -> Result<(), Error> {
        if upload.state != UploadState::Open {
            return Ok(());
        }
        if upload.mode == Mode::Single {
            let tally = self.tally(upload.size, 1);
            tally.begin_with(0, 0);
            return parts::put_whole(&self.client, upload, *asked, opening, source, &tally).await;
        }
        let layout = Layout::of(upload)?;
        let missing = layout.missing(upload);
        let tally = self.tally(upload.size, layout.count());
        let left: u64 = missing.iter().map(|number| layout.part(*number).1).sum();
        tally.begin_with(upload.size - left, layout.count() - missing.len() as u32);
        // Hashes of parts cut otherwise belong to other bytes.
        let known = if upload.part_size == Some(hashes.part_size) { &hashes.parts[..] } else { &[] };
        let parts = Parts::new(&self.client, upload, layout, known, false, &tally);
        let first = upload.parts.as_deref().unwrap_or_default();
        parts.put_missing(source, missing, first, *asked, self.options.concurrency).await
    }

    /// Completes, and waits where the broker has not decided yet or the caller wants the record.
    async fn finish(&self, id: Uuid, sha256: Option<Sha256>) -> Result<Completed, Error> {
        let deadline = Instant::now() + self.options.wait_timeout.min(LONGEST_WAIT);
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
            if !self.moved_on(id, completed.state, deadline).await? {
                return match completed.state {
                    // The pointer is promised; that it is not there yet, the state says.
                    UploadState::Verified => Ok(completed),
                    _ => Err(Error::Unfinished { id, seconds: self.options.wait_timeout.as_secs() }),
                };
            }
        }
    }

    async fn complete(&self, id: Uuid, sha256: Option<Sha256>) -> Result<Completed, Error> {
        let completed = self.client.complete(id, &CompleteUpload { sha256, parts: None }).await;
        match (sha256, completed) {
            // The same hash may come twice; another than the one of before is of another file.
            (Some(sha256), Err(error)) if error.is_problem("validation-failed") => {
                let (expected, found) =
                    ("the bytes that were promised".to_owned(), format!("bytes with sha256 {sha256}: {error}"));
                Err(Error::Corrupt { expected, found })
            }
            (_, completed) => completed,
        }
    }

    /// Long-polls until the upload has left `state`; false when the deadline came first.
    async fn moved_on(&self, id: Uuid, state: UploadState, deadline: Instant) -> Result<bool, Error> {
        let mut seen = None;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            // The first reading learns the version: a change before it must not be waited for.
            let wait = seen.map(|_| POLL_SECONDS.min(left.as_secs()));
            let asked = Instant::now();
            let upload = self.client.read(id, &ReadUpload { wait, version: seen }).await?;
            if upload.state != state {
                return Ok(true);
            }
            if left.is_zero() {
                return Ok(false);
            }
            if seen.is_some() && asked.elapsed() < POLL_PAUSE {
                tokio::time::sleep(POLL_PAUSE.min(left)).await;
            }
            seen = Some(upload.version);
        }
    }
}

/// Whether the broker takes a file's own name: a download can do without one better than without its bytes.
fn is_welcome(name: &str) -> bool {
    (1..=255).contains(&name.len())
        && !matches!(name, "." | "..")
        && !name.contains(|c: char| c.is_control() || matches!(c, '/' | '\\'))
}

/// Holds the pointer against the bytes that were sent: a resumed or replayed upload may be of other bytes.
fn checked(completed: Completed, sent: Sha256) -> Result<Completed, Error> {
    match completed.pointer.as_ref().and_then(|pointer| pointer.sha256) {
        Some(found) if found != sent => {
            Err(Error::Corrupt { expected: format!("sha256 {sent}"), found: format!("a pointer to {found}") })
        }
        _ => Ok(completed),
    }
}
