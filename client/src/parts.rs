//! Puts the bytes of one upload: signs when a URL is needed, signs again when it ran out, tries again when it failed.
//!
//! URLs are asked for in windows as the parts come up, so that none is signed hours before its turn.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use futures_util::stream::{self, StreamExt as _};
use sha2::Digest as _;
use tokio::io::AsyncRead;
use tokio::sync::Mutex;
use uuid::Uuid;

use crate::api::{Mode, OpenUpload, PARTS_PER_CALL, PartRequest, SignParts, SignedPart, SignedRequest, Upload, UploadState};
use crate::checksum::Sha256;
use crate::error::Error;
use crate::http::Client;
use crate::progress::{Meter, Tally};
use crate::retry::Backoff;
use crate::source::{self, Source};
use crate::storage;

/// How often a PUT may ask for another signature: an expired URL needs one, a refused permission is not cured by more.
const SIGNATURES: u32 = 2;

/// How often bytes that storage found damaged go again: the line may have done it once; a changed source stays changed.
const DAMAGED: u32 = 1;

/// A request and how long it may be used, by the local monotonic clock.
#[derive(Debug, Clone)]
pub(crate) struct Signed {
    request: SignedRequest,
    until: Instant,
}

impl Signed {
    /// `asked` is a time before it was signed; a tenth of its life, at most 10 seconds, is left for the way to storage.
    pub(crate) fn new(request: SignedRequest, asked: Instant) -> Self {
        let life = Duration::from_secs(request.expires_in.min(7 * 86_400));
        Self { request, until: asked + (life - (life / 10).min(Duration::from_secs(10))) }
    }

    fn is_fresh(&self) -> bool {
        Instant::now() < self.until
    }
}

/// The request that opened an upload. Sent again under its key, it gives a single PUT a fresh URL.
#[derive(Debug, Clone)]
pub(crate) struct Opening {
    pub(crate) request: OpenUpload,
    pub(crate) key: String,
}

/// Where a part lies in the whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Layout {
    size: u64,
    part_size: u64,
    count: u32,
}

impl Layout {
    /// The parts that the broker chose, if they make up the whole.
    pub(crate) fn of(upload: &Upload) -> Result<Self, Error> {
        let misfit = || Error::Unexpected {
            status: 200,
            detail: format!("{:?} parts of {:?} bytes do not make up {} bytes", upload.part_count, upload.part_size, upload.size),
        };
        let part_size = upload.part_size.filter(|size| *size > 0).ok_or_else(misfit)?;
        let count = upload.part_count.filter(|count| *count <= 10_000).ok_or_else(misfit)?;
        match source::part_count(upload.size, part_size) == u64::from(count) {
            true => Ok(Self { size: upload.size, part_size, count }),
            false => Err(misfit()),
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

    /// The numbers that `upload` lacks: all of them where it does not say.
    pub(crate) fn missing(&self, upload: &Upload) -> BTreeSet<u32> {
        match &upload.missing_parts {
            Some(ranges) => ranges.iter().flat_map(|[from, to]| (*from).max(1)..=(*to).min(self.count)).collect(),
            None => (1..=self.count).collect(),
        }
    }
}

/// One PUT and what signs it.
enum Slot<'a> {
    Whole { id: Uuid, opening: Option<&'a Opening>, client: &'a Client },
    Part { parts: &'a Parts<'a>, number: u32, hash: Option<Sha256> },
}

impl Slot<'_> {
    /// A fresh request, or none where nothing can be put any more: complete will say why.
    async fn sign(&self) -> Result<Option<Signed>, Error> {
        match self {
            Self::Part { parts, number, hash } => Ok(parts.sign(&[*number], *hash).await?.remove(number)),
            Self::Whole { opening: None, .. } => Ok(None),
            Self::Whole { id, opening: Some(opening), client } => {
                let asked = Instant::now();
                let (upload, _) = client.open_or_replay(&opening.request, Some(&opening.key)).await?;
                if upload.id != *id {
                    return Err(Error::Invalid(format!("the idempotency key opened upload {}, not {id}", upload.id)));
                }
                let open = upload.state == UploadState::Open && upload.mode == Mode::Single;
                Ok(upload.upload.filter(|_| open).map(|request| Signed::new(request, asked)))
            }
        }
    }
}

/// Puts the whole in one request.
pub(crate) async fn put_whole(
    client: &Client,
    upload: &Upload,
    opened: Instant,
    opening: Option<&Opening>,
    source: &Source,
    tally: &Arc<Tally>,
) -> Result<(), Error> {
    let signed = upload.upload.clone().map(|request| Signed::new(request, opened));
    put(client, &Slot::Whole { id: upload.id, opening, client }, signed, source, (0, upload.size), tally).await
}

async fn put(
    client: &Client,
    slot: &Slot<'_>,
    mut signed: Option<Signed>,
    source: &Source,
    (offset, size): (u64, u64),
    tally: &Arc<Tally>,
) -> Result<(), Error> {
    let mut backoff = Backoff::new(client.settings().retry);
    let (mut signatures, mut damaged) = (0, 0);
    loop {
        let usable = match signed.filter(Signed::is_fresh) {
            Some(fresh) => fresh,
            None => match slot.sign().await? {
                Some(fresh) => fresh,
                None => return Ok(()),
            },
        };
        let meter = Meter::new(tally);
        let body = source.body(offset, size, &meter);
        let Err(failure) = storage::put(&client.wire(), &usable.request, size, body, &meter).await else {
            tally.part_done();
            return Ok(());
        };
        meter.take_back();
        let error = failure.error;
        // The object exists: an earlier attempt arrived and its answer was lost. Complete looks at what is there.
        if matches!(slot, Slot::Whole { .. }) && matches!(error, Error::Storage { status: 412, .. }) {
            Meter::new(tally).add(size);
            tally.part_done();
            return Ok(());
        }
        signed = Some(usable);
        let again = if error.wants_signature() {
            signed = None;
            signatures += 1;
            signatures <= SIGNATURES
        } else if error.is_bad_digest() {
            damaged += 1;
            damaged <= DAMAGED
        } else {
            error.is_transient()
        };
        match if again { backoff.next(failure.retry_after) } else { None } {
            Some(wait) => tokio::time::sleep(wait).await,
            None => return Err(error),
        }
    }
}

/// The parts of one upload.
pub(crate) struct Parts<'a> {
    client: &'a Client,
    id: Uuid,
    layout: Layout,
    tally: &'a Arc<Tally>,
    /// The parts' hashes, where they are known before signing.
    hashes: &'a [Sha256],
    /// Whether `/parts` wants the hashes.
    deferred: AtomicBool,
    window: Mutex<Window>,
}

/// What is signed and what is still to come.
#[derive(Default)]
struct Window {
    ready: BTreeMap<u32, Signed>,
    waiting: BTreeSet<u32>,
}

impl<'a> Parts<'a> {
    /// `hashes` may be empty where each part's comes with its bytes, as in a stream.
    pub(crate) fn new(
        client: &'a Client,
        upload: &Upload,
        layout: Layout,
        hashes: &'a [Sha256],
        deferred: bool,
        tally: &'a Arc<Tally>,
    ) -> Self {
        let deferred = AtomicBool::new(deferred);
        Self { client, id: upload.id, layout, tally, hashes, deferred, window: Mutex::default() }
    }

    /// Puts the parts of `missing`, `concurrency` at a time; `first` are those that open signed.
    pub(crate) async fn put_missing(
        &self,
        source: &Source,
        missing: BTreeSet<u32>,
        first: &[SignedPart],
        opened: Instant,
        concurrency: usize,
    ) -> Result<(), Error> {
        let numbers: Vec<u32> = missing.iter().copied().collect();
        {
            let mut window = self.window.lock().await;
            for part in first {
                self.check(part)?;
                window.ready.insert(part.part_number, Signed::new(part.request.clone(), opened));
            }
            window.waiting = missing;
        }
        let puts = numbers.into_iter().map(|number| self.put_one(source, number));
        let mut puts = stream::iter(puts).buffer_unordered(concurrency.clamp(1, PARTS_PER_CALL));
        while let Some(done) = puts.next().await {
            done?;
        }
        Ok(())
    }

    /// Puts all parts of a stream in order, one going up while the next one is read; gives back the hash of the whole.
    pub(crate) async fn put_stream(&self, reader: &mut (dyn AsyncRead + Send + Unpin)) -> Result<Sha256, Error> {
        let mut reader = reader;
        let (bytes, hash, mut whole) = source::read_part(&mut reader, self.layout.part(1).1, sha2::Sha256::new()).await?;
        let mut current = (Source::Memory(bytes), hash);
        for number in 1..=self.layout.count {
            let put = self.put_buffered(number, &current.0, current.1);
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

    async fn put_one(&self, source: &Source, number: u32) -> Result<(), Error> {
        let signed = self.next_window(number).await?;
        let slot = Slot::Part { parts: self, number, hash: None };
        put(self.client, &slot, signed, source, self.layout.part(number), self.tally).await
    }

    async fn put_buffered(&self, number: u32, part: &Source, hash: Sha256) -> Result<(), Error> {
        let slot = Slot::Part { parts: self, number, hash: Some(hash) };
        put(self.client, &slot, None, part, (0, self.layout.part(number).1), self.tally).await
    }

    /// The request for a part; where it is not there, this part and those after it are signed in one call.
    async fn next_window(&self, number: u32) -> Result<Option<Signed>, Error> {
        let mut window = self.window.lock().await;
        window.waiting.remove(&number);
        if let Some(signed) = window.ready.remove(&number).filter(Signed::is_fresh) {
            return Ok(Some(signed));
        }
        window.ready.retain(|_, signed| signed.is_fresh());
        let unsigned = window.waiting.range(number..).filter(|other| !window.ready.contains_key(other));
        let numbers: Vec<u32> = std::iter::once(number).chain(unsigned.copied()).take(PARTS_PER_CALL).collect();
        // The lock is held on purpose: whoever comes next finds its part in this answer.
        let mut signed = self.sign(&numbers, None).await?;
        let own = signed.remove(&number);
        window.ready.append(&mut signed);
        Ok(own)
    }

    /// Signs parts; `hash` is the hash of a single one whose bytes have just become known.
    async fn sign(&self, numbers: &[u32], hash: Option<Sha256>) -> Result<BTreeMap<u32, Signed>, Error> {
        let asked = Instant::now();
        let deferred = self.deferred.load(Ordering::Relaxed);
        let answer = match self.client.sign_parts(self.id, &self.request(numbers, hash, deferred)).await {
            // Reading an upload does not tell how its hashes come: who resumes finds out here.
            Err(error) if !deferred && !self.hashes.is_empty() && error.is_problem("validation-failed") => {
                let answer = self.client.sign_parts(self.id, &self.request(numbers, hash, true)).await?;
                self.deferred.store(true, Ordering::Relaxed);
                answer
            }
            other => other?,
        };
        let mut signed = BTreeMap::new();
        for part in answer.parts {
            self.check(&part)?;
            signed.insert(part.part_number, Signed::new(part.request, asked));
        }
        match numbers.iter().find(|number| !signed.contains_key(number)) {
            None => Ok(signed),
            Some(number) => Err(Error::Unexpected { status: 200, detail: format!("part {number} was asked for and not signed") }),
        }
    }

    fn request(&self, numbers: &[u32], hash: Option<Sha256>, deferred: bool) -> SignParts {
        if !deferred {
            return SignParts { part_numbers: Some(numbers.to_vec()), parts: None };
        }
        let known = |number: u32| self.hashes.get(number as usize - 1).copied();
        let part = |number: &u32| PartRequest { part_number: *number, sha256: hash.or_else(|| known(*number)) };
        SignParts { part_numbers: None, parts: Some(numbers.iter().map(part).collect()) }
    }

    /// A part that lies elsewhere than it was hashed would be refused by storage at best.
    fn check(&self, part: &SignedPart) -> Result<(), Error> {
        let number = part.part_number;
        match (1..=self.layout.count).contains(&number) && self.layout.part(number) == (part.offset, part.size) {
            true => Ok(()),
            false => Err(Error::Unexpected {
                status: 200,
                detail: format!("part {number} of {} bytes at {} is not where it should be", part.size, part.offset),
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
    fn parts_are_equal_but_the_last() {
        let layout = Layout::of(&upload(23, 10, 3, None)).unwrap();
        assert_eq!([1, 2, 3].map(|number| layout.part(number)), [(0, 10), (10, 10), (20, 3)]);
        for (size, part_size, count) in [(23, 10, 2), (23, 0, 3), (20_000, 1, 20_000), (23, 10, 4)] {
            assert!(Layout::of(&upload(size, part_size, count, None)).is_err(), "{size} {part_size} {count}");
        }
    }

    #[test]
    fn missing_ranges_are_inclusive_and_stay_within_the_parts() {
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
    fn a_signature_is_used_for_nine_tenths_of_its_life() {
        let request = |expires_in| SignedRequest {
            method: "PUT".to_owned(),
            url: String::new(),
            headers: BTreeMap::new(),
            expires_at: time::OffsetDateTime::UNIX_EPOCH,
            expires_in,
        };
        let ago = |seconds| Instant::now().checked_sub(Duration::from_secs(seconds)).unwrap();
        assert!(Signed::new(request(100), ago(80)).is_fresh());
        assert!(!Signed::new(request(100), ago(91)).is_fresh());
        assert!(Signed::new(request(900), ago(880)).is_fresh());
        assert!(!Signed::new(request(900), ago(891)).is_fresh());
        assert!(!Signed::new(request(0), ago(0)).is_fresh());
    }
}
