//! The wire: what passes between a client and hyper, and when.
//!
//! hyper knows neither how long a client may be silent nor how a problem is written: it answers what it cannot parse
//! with a bare status. The wire notes what moved when ([`Pulse`]), and keeps such an answer back for a better one.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes};
use hyper::body::{Frame, SizeHint};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::time::Instant;

/// For how long what a client still sends is read after the last word, and how long a silence ends it: closing on a
/// client that is sending takes the answer from it.
const PATIENCE: Duration = Duration::from_secs(2);
const SILENCE: Duration = Duration::from_millis(200);
/// Who has said nothing for so long is as good as idle.
const SILENT: Duration = Duration::from_secs(1);
/// A head arrives in one packet or two. One that takes longer makes room where others need its place.
const SLOW_HEAD: Duration = Duration::from_secs(2);
/// A bare answer has a status line and three headers.
const BARE_BYTES: usize = 256;

/// How long a client may be silent.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// From the first byte of a request's head to its last.
    pub(super) head: Duration,
    /// Between two requests.
    pub(super) idle: Duration,
    /// While it takes nothing of an answer.
    pub(super) write: Duration,
}

/// Where a connection stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Nothing was heard of it yet.
    Fresh,
    /// A request's head is arriving.
    Head,
    /// A request is being served.
    Busy,
    /// An answer is over, and no other request has begun.
    Idle,
}

/// What moved last, and when.
#[derive(Debug)]
pub(super) struct Pulse(Mutex<Beat>);

#[derive(Debug, Clone, Copy)]
struct Beat {
    phase: Phase,
    since: Instant,
    /// Since when the client takes nothing.
    stuck: Option<Instant>,
    /// Whether it was asked to end, for others need its place.
    dismissed: bool,
}

impl Beat {
    /// Whether nothing is under way: no request, no rest of an answer that the client has not taken yet. A head that takes
    /// its time is no request.
    fn may_end(&self) -> bool {
        match self.phase {
            Phase::Idle => self.stuck.is_none(),
            Phase::Fresh => self.since.elapsed() >= SILENT,
            Phase::Head => self.since.elapsed() >= SLOW_HEAD,
            Phase::Busy => false,
        }
    }
}

impl Pulse {
    pub(super) fn new() -> Self {
        Self(Mutex::new(Beat { phase: Phase::Fresh, since: Instant::now(), stuck: None, dismissed: false }))
    }

    fn beat(&self) -> Beat {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Beat)) {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn enter(&self, phase: Phase) {
        self.change(|beat| (beat.phase, beat.since, beat.dismissed) = (phase, Instant::now(), false));
    }

    pub(super) fn phase(&self) -> Phase {
        self.beat().phase
    }

    /// Since when nothing is under way; none while something is, or where it was asked to end.
    pub(super) fn idle_since(&self) -> Option<Instant> {
        let beat = self.beat();
        (beat.may_end() && !beat.dismissed).then_some(beat.since)
    }

    /// Whether it may be closed for others: no answer is being sent, and no request is arriving in good time.
    pub(super) fn may_end(&self) -> bool {
        self.beat().may_end()
    }

    /// Whether no request is being served, and it was not asked to end.
    pub(super) fn is_silent(&self) -> bool {
        let beat = self.beat();
        beat.phase != Phase::Busy && !beat.dismissed
    }

    /// Notes that it was asked to end.
    pub(super) fn dismiss(&self) {
        self.change(|beat| beat.dismissed = true);
    }

    fn heard(&self) {
        if matches!(self.phase(), Phase::Fresh | Phase::Idle) {
            self.enter(Phase::Head);
        }
    }

    /// A request's head is there. What comes back is dropped when its answer is over.
    pub(super) fn serve(self: &Arc<Self>) -> Serving {
        self.enter(Phase::Busy);
        Serving(Arc::clone(self))
    }

    fn wrote<T>(&self, outcome: &Poll<T>) {
        match outcome {
            Poll::Pending => self.change(|beat| beat.stuck = beat.stuck.or_else(|| Some(Instant::now()))),
            Poll::Ready(_) => self.change(|beat| beat.stuck = None),
        }
    }

    /// Returns when the client was silent for too long.
    pub(super) async fn overdue(&self, limits: Limits) {
        let shortest = limits.head.min(limits.idle).min(limits.write);
        loop {
            let beat = self.beat();
            let silent = match beat.phase {
                Phase::Fresh | Phase::Head => Some(beat.since + limits.head),
                Phase::Idle => beat.stuck.is_none().then(|| beat.since + limits.idle),
                Phase::Busy => None,
            };
            let stuck = beat.stuck.map(|since| since + limits.write);
            let now = Instant::now();
            let due = silent.into_iter().chain(stuck).min().unwrap_or(now + shortest);
            if due <= now {
                return;
            }
            // Whatever begins meanwhile is not over before the shortest limit has passed.
            tokio::time::sleep_until(due.min(now + shortest)).await;
        }
    }
}

/// A request that is being served.
pub(super) struct Serving(Arc<Pulse>);

impl Drop for Serving {
    fn drop(&mut self) {
        self.0.enter(Phase::Idle);
    }
}

/// An answer's body; its end is the answer's.
pub(super) struct Answer {
    pub(super) body: Body,
    pub(super) _serving: Serving,
}

impl hyper::body::Body for Answer {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A stream that is watched.
pub(super) struct Wire<S> {
    stream: S,
    pulse: Arc<Pulse>,
    kept_back: Option<u16>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Wire<S> {
    pub(super) fn new(stream: S, pulse: Arc<Pulse>) -> Self {
        Self { stream, pulse, kept_back: None }
    }

    /// The status that hyper answered barely, where it did.
    pub(super) fn kept_back(&self) -> Option<u16> {
        self.kept_back
    }

    /// Says this instead, and closes.
    pub(super) async fn last_word(mut self, answer: &[u8]) {
        let said = async {
            self.stream.write_all(answer).await?;
            self.stream.shutdown().await?;
            let mut unwanted = vec![0; 16 << 10];
            while let Ok(Ok(1..)) = tokio::time::timeout(SILENCE, self.stream.read(&mut unwanted)).await {}
            Ok::<_, io::Error>(())
        };
        // Whoever does not listen is left.
        let _ = tokio::time::timeout(PATIENCE, said).await;
    }
}

/// Where in `bytes` an answer of hyper's own begins, which is always the last, and its status. Answers of ours name
/// the request; a body of ours never ends with the head of an answer.
fn bare_answer(bytes: &[u8]) -> Option<(usize, u16)> {
    if !bytes.ends_with(b"\r\n\r\n") {
        return None;
    }
    let window = bytes.len().saturating_sub(BARE_BYTES);
    let at = window + bytes[window..].windows(7).rposition(|word| word == b"HTTP/1.")?;
    let head = std::str::from_utf8(&bytes[at..]).ok()?;
    let status = head.get(9..12)?.parse().ok()?;
    (matches!(status, 400 | 414 | 431) && !head.contains("x-request-id")).then_some((at, status))
}

impl<S: AsyncRead + Unpin> AsyncRead for Wire<S> {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let outcome = Pin::new(&mut self.stream).poll_read(context, buffer);
        if buffer.filled().len() > before {
            self.pulse.heard();
        }
        outcome
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Wire<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let wanted = match bare_answer(bytes) {
            _ if self.kept_back.is_some() => return Poll::Ready(Ok(bytes.len())),
            Some((0, status)) => {
                self.kept_back = Some(status);
                return Poll::Ready(Ok(bytes.len()));
            }
            Some((at, _)) => &bytes[..at],
            None => bytes,
        };
        let outcome = Pin::new(&mut self.stream).poll_write(context, wanted);
        self.pulse.wrote(&outcome);
        outcome
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let outcome = Pin::new(&mut self.stream).poll_flush(context);
        self.pulse.wrote(&outcome);
        outcome
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.kept_back {
            // Something is to be said yet.
            Some(_) => Poll::Ready(Ok(())),
            None => Pin::new(&mut self.stream).poll_shutdown(context),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn hypers_own_answers_are_told_from_ours() {
        let bare = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\ndate: now\r\n\r\n".as_slice();
        assert_eq!(bare_answer(bare), Some((0, 431)));
        let ours = b"HTTP/1.1 200 OK\r\nx-request-id: 1\r\ncontent-length: 2\r\n\r\n{}".as_slice();
        assert_eq!(bare_answer(&[ours, bare].concat()), Some((ours.len(), 431)));
        for other in [
            ours,
            b"HTTP/1.1 100 Continue\r\n\r\n",
            b"HTTP/1.1 204 No Content\r\nx-request-id: 1\r\n\r\n",
            b"HTTP/1.1 400 Bad Request\r\nx-request-id: 1\r\ncontent-length: 0\r\n\r\n",
            b"\r\n\r\n",
            b"HTTP/1.\r\n\r\n",
        ] {
            assert_eq!(bare_answer(other), None, "{}", String::from_utf8_lossy(other));
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), end in any::<bool>()) {
            let end: &[u8] = if end { b"HTTP/1.1 4\r\n\r\n" } else { b"" };
            let _ = bare_answer(&[&bytes, end].concat());
        }
    }

    #[tokio::test]
    async fn each_silence_has_its_own_limit() {
        let ms = Duration::from_millis;
        let limits = Limits { head: ms(50), idle: ms(200), write: ms(100) };
        let lasted = async |pulse: &Pulse, limit: Duration| {
            let begun = Instant::now();
            pulse.overdue(limits).await;
            assert!(begun.elapsed() + ms(5) >= limit, "{:?} instead of {limit:?}", begun.elapsed());
        };
        let pulse = Arc::new(Pulse::new());
        lasted(&pulse, ms(50)).await;
        pulse.heard();
        lasted(&pulse, ms(50)).await;
        assert_eq!(pulse.phase(), Phase::Head);
        let serving = pulse.serve();
        assert!(tokio::time::timeout(ms(400), pulse.overdue(limits)).await.is_err());
        pulse.wrote(&Poll::<()>::Pending);
        lasted(&pulse, ms(100)).await;
        pulse.wrote(&Poll::Ready(()));
        drop(serving);
        lasted(&pulse, ms(200)).await;
        assert_eq!(pulse.phase(), Phase::Idle);
    }
}
