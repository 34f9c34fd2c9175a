//! Sends the bytes of one upload to S3. It signs a request when a URL is needed, signs again when the URL expired, and
//! retries failed requests.
//!
//! Part URLs are signed in windows as the upload advances, so that none is signed hours before its use.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use futures_util::stream::{self, StreamExt as _};
use sha2::Digest as _;
use tokio::io::AsyncRead;
use tokio::sync::Mutex;
use uuid::Uuid;

use crate::api::{
    ErrorCode, MAX_PARTS, Mode, OpenUpload, PARTS_PER_CALL, PartRequest, SignParts, SignedPart, SignedRequest, Upload,
    UploadState,
};
use crate::checksum::Sha256;
use crate::error::Error;
use crate::http::Client;
use crate::progress::{AttemptCounter, ProgressTotals};
use crate::retry::Backoff;
use crate::source::{self, Source};
use crate::storage;

/// The most new signatures of one PUT. An expired URL needs one. If S3 denies permission, more signatures do not help.
const MAX_NEW_SIGNATURES: u32 = 2;

/// The most retries after S3 found a wrong checksum. The network may damage bytes once; a source that changed stays
/// changed.
const MAX_DIGEST_RETRIES: u32 = 1;

/// A presigned request, and until when it may be used, by the local monotonic clock.
#[derive(Debug, Clone)]
pub(crate) struct PresignedRequest {
    request: SignedRequest,
    usable_until: Instant,
}

impl PresignedRequest {
    /// `requested_at` is a time before the request was signed. A tenth of its lifetime, at most 10 s, is reserved for
    /// sending the request to S3.
    pub(crate) fn new(request: SignedRequest, requested_at: Instant) -> Self {
        let lifetime = Duration::from_secs(request.expires_in.min(7 * 86_400));
        Self { request, usable_until: requested_at + (lifetime - (lifetime / 10).min(Duration::from_secs(10))) }
    }

    fn is_usable(&self) -> bool {
        Instant::now() < self.usable_until
    }
}

/// The request that opens an upload. Sent again with the same key, it returns a new URL for a single PUT.
#[derive(Debug, Clone)]
pub(crate) struct OpenRequest {
    pub(crate) body: OpenUpload,
    pub(crate) idempotency_key: String,
}

/// The offsets and sizes of the parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Layout {
    size: u64,
    part_size: u64,
    count: u32,
}

impl Layout {
    /// The parts that the broker chose. Fails if they do not add up to the upload's size.
    pub(crate) fn of(upload: &Upload) -> Result<Self, Error> {
        let invalid = || Error::Unexpected {
            status: 200,
            detail: format!(
                "{:?} parts of {:?} bytes do not add up to {} bytes",
                upload.part_count, upload.part_size, upload.size
            ),
        };
        let part_size = upload.part_size.filter(|size| *size > 0).ok_or_else(invalid)?;
        let count = upload.part_count.filter(|count| u64::from(*count) <= MAX_PARTS).ok_or_else(invalid)?;
        match source::part_count(upload.size, part_size) == u64::from(count) {
            true => Ok(Self { size: upload.size, part_size, count }),
            false => Err(invalid()),
        }
    }

    pub(crate) fn count(&self) -> u32 {
        self.count
    }

    /// Offset and size of a part.
    pub(crate) fn part(&self, number: u32) -> (u64, u64) {
        let offset = u64::from(number.saturating_sub(1)) * self.part_size;
        (offset, self.part_size.min(self.size.saturating_sub(offset)))
    }

    /// The numbers of the parts that `upload` lacks; all numbers if it does not list them.
    pub(crate) fn missing(&self, upload: &Upload) -> BTreeSet<u32> {
        match &upload.missing_parts {
            Some(ranges) => ranges.iter().flat_map(|[from, to]| (*from).max(1)..=(*to).min(self.count)).collect(),
            None => (1..=self.count).collect(),
        }
    }
}

/// The target of one PUT: the whole object or one part.
enum PutTarget<'a> {
    Whole { id: Uuid, open_request: Option<&'a OpenRequest>, client: &'a Client },
    Part { uploader: &'a PartUploader<'a>, number: u32, hash: Option<Sha256> },
}

impl PutTarget<'_> {
    /// A new presigned request, or `None` if the upload accepts no more PUTs. Then complete returns the reason.
    async fn sign(&self) -> Result<Option<PresignedRequest>, Error> {
        match self {
            Self::Part { uploader, number, hash } => Ok(uploader.sign(&[*number], *hash).await?.remove(number)),
            Self::Whole { open_request: None, .. } => Ok(None),
            Self::Whole { id, open_request: Some(open_request), client } => {
                let requested_at = Instant::now();
                let (upload, _) = client.open_or_replay(&open_request.body, Some(&open_request.idempotency_key)).await?;
                if upload.id != *id {
                    return Err(Error::Invalid(format!("the idempotency key opened upload {}, not {id}", upload.id)));
                }
                let open = upload.state == UploadState::Open && upload.mode == Mode::Single;
                Ok(upload.upload.filter(|_| open).map(|request| PresignedRequest::new(request, requested_at)))
            }
        }
    }
}

/// Sends all bytes in a single PUT.
pub(crate) async fn put_single(
    client: &Client,
    upload: &Upload,
    requested_at: Instant,
    open_request: Option<&OpenRequest>,
    source: &Source,
    totals: &Arc<ProgressTotals>,
) -> Result<(), Error> {
    let signed = upload.upload.clone().map(|request| PresignedRequest::new(request, requested_at));
    put(client, &PutTarget::Whole { id: upload.id, open_request, client }, signed, source, (0, upload.size), totals).await
}

async fn put(
    client: &Client,
    target: &PutTarget<'_>,
    mut signed: Option<PresignedRequest>,
    source: &Source,
    (offset, size): (u64, u64),
    totals: &Arc<ProgressTotals>,
) -> Result<(), Error> {
    let mut backoff = Backoff::new(client.settings().retry);
    let (mut signatures, mut digest_failures) = (0, 0);
    loop {
        let presigned = match signed.filter(PresignedRequest::is_usable) {
            Some(fresh) => fresh,
            None => match target.sign().await? {
                Some(fresh) => fresh,
                None => return Ok(()),
            },
        };
        let counter = AttemptCounter::new(totals);
        let body = source.body(offset, size, &counter);
        let Err(failure) = storage::put(&client.storage_client(), &presigned.request, size, body, &counter).await else {
            totals.part_done();
            return Ok(());
        };
        counter.roll_back();
        let error = failure.error;
        // The object exists: an earlier attempt succeeded and its response was lost. Complete verifies what is stored.
        if matches!(target, PutTarget::Whole { .. }) && matches!(error, Error::Storage { status: 412, .. }) {
            AttemptCounter::new(totals).add(size);
            totals.part_done();
            return Ok(());
        }
        signed = Some(presigned);
        let retryable = if error.needs_new_signature() {
            signed = None;
            signatures += 1;
            signatures <= MAX_NEW_SIGNATURES
        } else if error.is_bad_digest() {
            digest_failures += 1;
            digest_failures <= MAX_DIGEST_RETRIES
        } else {
            error.is_transient()
        };
        match if retryable { backoff.next(failure.retry_after) } else { None } {
            Some(wait) => client.retry_reporter.report_and_wait(&error, wait, &backoff).await,
            None => return Err(error),
        }
    }
}

/// Uploads the parts of one multipart upload.
pub(crate) struct PartUploader<'a> {
    client: &'a Client,
    id: Uuid,
    layout: Layout,
    totals: &'a Arc<ProgressTotals>,
    /// The hashes of the parts, if they are known before signing.
    hashes: &'a [Sha256],
    /// Whether the broker expects the hashes with each `/parts` call.
    deferred: AtomicBool,
    window: Mutex<SigningWindow>,
}

/// The parts that have a presigned request, and those that are not signed yet.
#[derive(Default)]
struct SigningWindow {
    signed: BTreeMap<u32, PresignedRequest>,
    unsigned: BTreeSet<u32>,
}

impl<'a> PartUploader<'a> {
    /// `hashes` is empty if each part's hash is computed with its bytes, as in a stream.
    pub(crate) fn new(
        client: &'a Client,
        upload: &Upload,
        layout: Layout,
        hashes: &'a [Sha256],
        deferred: bool,
        totals: &'a Arc<ProgressTotals>,
    ) -> Self {
        let deferred = AtomicBool::new(deferred);
        Self { client, id: upload.id, layout, totals, hashes, deferred, window: Mutex::default() }
    }

    /// Uploads the parts of `missing`, `concurrency` at a time. `signed_parts` are those that the response to open
    /// signed.
    pub(crate) async fn put_missing(
        &self,
        source: &Source,
        missing: BTreeSet<u32>,
        signed_parts: &[SignedPart],
        requested_at: Instant,
        concurrency: usize,
    ) -> Result<(), Error> {
        let numbers: Vec<u32> = missing.iter().copied().collect();
        {
            let mut window = self.window.lock().await;
            for part in signed_parts {
                self.check_layout(part)?;
                window.signed.insert(part.part_number, PresignedRequest::new(part.request.clone(), requested_at));
            }
            window.unsigned = missing;
        }
        let puts = numbers.into_iter().map(|number| self.put_part(source, number));
        let mut puts = stream::iter(puts).buffer_unordered(concurrency.clamp(1, PARTS_PER_CALL));
        while let Some(done) = puts.next().await {
            done?;
        }
        Ok(())
    }

    /// Uploads all parts of a stream in order. One part is sent while the next is read. Returns the hash of the whole.
    pub(crate) async fn put_stream(&self, reader: &mut (dyn AsyncRead + Send + Unpin)) -> Result<Sha256, Error> {
        let mut reader = reader;
        let (bytes, hash, mut whole) = source::read_part(&mut reader, self.layout.part(1).1, sha2::Sha256::new()).await?;
        let mut current = (Source::Memory(bytes), hash);
        for number in 1..=self.layout.count {
            let put = self.put_buffered_part(number, &current.0, current.1);
            if number == self.layout.count {
                put.await?;
                break;
            }
            let size = self.layout.part(number + 1).1;
            let read = async { Ok(source::read_part(&mut reader, size, whole).await?) };
            let ((), (bytes, hash, hasher)) = tokio::try_join!(put, read)?;
            current = (Source::Memory(bytes), hash);
            whole = hasher;
        }
        Ok(Sha256(whole.finalize().into()))
    }

    async fn put_part(&self, source: &Source, number: u32) -> Result<(), Error> {
        let signed = self.presigned_request(number).await?;
        let target = PutTarget::Part { uploader: self, number, hash: None };
        put(self.client, &target, signed, source, self.layout.part(number), self.totals).await
    }

    async fn put_buffered_part(&self, number: u32, part: &Source, hash: Sha256) -> Result<(), Error> {
        let target = PutTarget::Part { uploader: self, number, hash: Some(hash) };
        put(self.client, &target, None, part, (0, self.layout.part(number).1), self.totals).await
    }

    /// Returns the presigned request for a part. If there is none, this call signs this part and those after it.
    async fn presigned_request(&self, number: u32) -> Result<Option<PresignedRequest>, Error> {
        let mut window = self.window.lock().await;
        window.unsigned.remove(&number);
        if let Some(signed) = window.signed.remove(&number).filter(PresignedRequest::is_usable) {
            return Ok(Some(signed));
        }
        window.signed.retain(|_, signed| signed.is_usable());
        let unsigned = window.unsigned.range(number..).filter(|other| !window.signed.contains_key(other));
        let numbers: Vec<u32> = std::iter::once(number).chain(unsigned.copied()).take(PARTS_PER_CALL).collect();
        // The lock is held while signing, so that concurrent callers find their parts in this response.
        let mut signed = self.sign(&numbers, None).await?;
        let own = signed.remove(&number);
        window.signed.append(&mut signed);
        Ok(own)
    }

    /// Signs parts. `hash` is the hash of a single part whose bytes have just been read.
    async fn sign(&self, numbers: &[u32], hash: Option<Sha256>) -> Result<BTreeMap<u32, PresignedRequest>, Error> {
        let requested_at = Instant::now();
        let deferred = self.deferred.load(Ordering::Relaxed);
        let response = match self.client.sign_parts(self.id, &self.sign_parts_request(numbers, hash, deferred)).await {
            // The state of an upload does not say whether its hashes are deferred. For a resumed upload, only
            // this error shows it.
            Err(error) if !deferred && !self.hashes.is_empty() && error.is_problem(ErrorCode::ValidationFailed) => {
                let response = self.client.sign_parts(self.id, &self.sign_parts_request(numbers, hash, true)).await?;
                self.deferred.store(true, Ordering::Relaxed);
                response
            }
            other => other?,
        };
        let mut signed = BTreeMap::new();
        for part in response.parts {
            self.check_layout(&part)?;
            signed.insert(part.part_number, PresignedRequest::new(part.request, requested_at));
        }
        match numbers.iter().find(|number| !signed.contains_key(number)) {
            None => Ok(signed),
            Some(number) => {
                Err(Error::Unexpected { status: 200, detail: format!("part {number} was requested, but not signed") })
            }
        }
    }

    fn sign_parts_request(&self, numbers: &[u32], hash: Option<Sha256>, deferred: bool) -> SignParts {
        if !deferred {
            return SignParts { part_numbers: Some(numbers.to_vec()), parts: None };
        }
        let known = |number: u32| self.hashes.get(number as usize - 1).copied();
        let part = |number: &u32| PartRequest { part_number: *number, sha256: hash.or_else(|| known(*number)) };
        SignParts { part_numbers: None, parts: Some(numbers.iter().map(part).collect()) }
    }

    /// Checks the offset and size that the broker signed. A part at another offset would not match its hash.
    fn check_layout(&self, part: &SignedPart) -> Result<(), Error> {
        let number = part.part_number;
        match (1..=self.layout.count).contains(&number) && self.layout.part(number) == (part.offset, part.size) {
            true => Ok(()),
            false => Err(Error::Unexpected {
                status: 200,
                detail: format!("part {number} has {} bytes at offset {}, which is not in the layout", part.size, part.offset),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn upload(size: u64, part_size: u64, part_count: u32, missing: Option<Vec<[u32; 2]>>) -> Upload {
        let at = time::OffsetDateTime::UNIX_EPOCH;
        Upload {
            id: Uuid::nil(),
            state: UploadState::Open,
            version: 1,
            mode: Mode::Multipart,
            topic: "t".to_owned(),
            key: None,
            key_base64: None,
            bucket: "b".to_owned(),
            object_key: "k".to_owned(),
            size,
            upload: None,
            part_size: Some(part_size),
            part_count: Some(part_count),
            parts: None,
            uploaded_parts: None,
            missing_parts: missing,
            next: None,
            pointer: None,
            integrity: None,
            record: None,
            error: None,
            created_at: at,
            updated_at: at,
            expires_at: at,
            expires_in: 0,
        }
    }

    #[test]
    fn all_parts_but_the_last_have_the_same_size() {
        let layout = Layout::of(&upload(23, 10, 3, None)).unwrap();
        assert_eq!([1, 2, 3].map(|number| layout.part(number)), [(0, 10), (10, 10), (20, 3)]);
        for (size, part_size, count) in [(23, 10, 2), (23, 0, 3), (20_000, 1, 20_000), (23, 10, 4)] {
            assert!(Layout::of(&upload(size, part_size, count, None)).is_err(), "{size} {part_size} {count}");
        }
    }

    #[test]
    fn missing_ranges_are_inclusive_and_limited_to_the_parts() {
        let of = |missing| {
            let upload = upload(50, 10, 5, missing);
            Layout::of(&upload).unwrap().missing(&upload).into_iter().collect::<Vec<_>>()
        };
        assert_eq!(of(None), [1, 2, 3, 4, 5]);
        assert!(of(Some(vec![])).is_empty());
        assert_eq!(of(Some(vec![[2, 2], [4, 9]])), [2, 4, 5]);
        assert_eq!(of(Some(vec![[0, 1], [0, u32::MAX]])), [1, 2, 3, 4, 5]);
    }

    #[test]
    fn a_signature_is_used_for_nine_tenths_of_its_lifetime() {
        let request = |expires_in| SignedRequest {
            method: "PUT".to_owned(),
            url: String::new(),
            headers: BTreeMap::new(),
            expires_at: time::OffsetDateTime::UNIX_EPOCH,
            expires_in,
        };
        let ago = |seconds| Instant::now().checked_sub(Duration::from_secs(seconds)).unwrap();
        assert!(PresignedRequest::new(request(100), ago(80)).is_usable());
        assert!(!PresignedRequest::new(request(100), ago(91)).is_usable());
        assert!(PresignedRequest::new(request(900), ago(880)).is_usable());
        assert!(!PresignedRequest::new(request(900), ago(891)).is_usable());
        assert!(!PresignedRequest::new(request(0), ago(0)).is_usable());
    }
}
