//! A monitored TCP or TLS stream between a client and hyper.
//!
//! hyper has no timeout for idle clients or blocked writes, and it answers unparsable requests with a bare status line.
//! [`MonitoredIo`] records reads and writes in [`ConnectionActivity`]. It suppresses hyper's bare response, so that the broker
//! can send a problem document instead.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes};
use hyper::body::{Frame, SizeHint};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::time::Instant;

/// How long the final response may take, with reading the rest of the request. Closing on a client that still sends would
/// reset the connection, and the client would lose the response.
const FINAL_RESPONSE_TIMEOUT: Duration = Duration::from_secs(2);
/// The connection is closed when the client sends nothing for this long after the final response.
const FINAL_READ_TIMEOUT: Duration = Duration::from_millis(200);
/// A connection without any request data counts as idle after this time.
const SILENT_AFTER: Duration = Duration::from_secs(1);
/// A request head arrives in one or two packets. A slower connection may be closed when others need its permit.
const SLOW_HEAD_AFTER: Duration = Duration::from_secs(2);
/// hyper's own error response has a status line and three headers.
const MAX_HYPER_ERROR_BYTES: usize = 256;

/// The timeouts of a connection.
#[derive(Debug, Clone, Copy)]
pub(super) struct ConnectionTimeouts {
    /// From the first to the last byte of a request head.
    pub(super) head: Duration,
    /// Between two requests.
    pub(super) idle: Duration,
    /// While the client reads nothing from a response.
    pub(super) write: Duration,
}

/// The phase of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ConnectionPhase {
    /// The client has sent nothing yet.
    New,
    /// A request head is arriving.
    ReadingHead,
    /// A request is being served.
    Serving,
    /// A response is complete, and no other request has begun.
    Idle,
}

/// The activity of a connection: its phase, and when that began.
#[derive(Debug)]
pub(super) struct ConnectionActivity(Mutex<ActivityState>);

#[derive(Debug, Clone, Copy)]
struct ActivityState {
    phase: ConnectionPhase,
    since: Instant,
    /// Since when a write is blocked because the client reads nothing.
    write_blocked_since: Option<Instant>,
    /// Whether the connection was asked to close, because others need its permit.
    close_requested: bool,
}

impl ActivityState {
    /// Whether no request is being served and no response is unsent. A slow request head does not prevent closing.
    fn may_close(&self) -> bool {
        match self.phase {
            ConnectionPhase::Idle => self.write_blocked_since.is_none(),
            ConnectionPhase::New => self.since.elapsed() >= SILENT_AFTER,
            ConnectionPhase::ReadingHead => self.since.elapsed() >= SLOW_HEAD_AFTER,
            ConnectionPhase::Serving => false,
        }
    }
}

impl ConnectionActivity {
    pub(super) fn new() -> Self {
        Self(Mutex::new(ActivityState {
            phase: ConnectionPhase::New,
            since: Instant::now(),
            write_blocked_since: None,
            close_requested: false,
        }))
    }

    fn state(&self) -> ActivityState {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut ActivityState)) {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn enter(&self, phase: ConnectionPhase) {
        self.change(|state| (state.phase, state.since, state.close_requested) = (phase, Instant::now(), false));
    }

    pub(super) fn phase(&self) -> ConnectionPhase {
        self.state().phase
    }

    /// Since when the connection is idle. `None` if it is not idle, or was already asked to close.
    pub(super) fn idle_since(&self) -> Option<Instant> {
        let state = self.state();
        (state.may_close() && !state.close_requested).then_some(state.since)
    }

    /// Whether the connection may be closed for others: no response is being sent, and no request is arriving in time.
    pub(super) fn may_close(&self) -> bool {
        self.state().may_close()
    }

    /// Whether no request is being served, and the connection was not asked to close yet.
    pub(super) fn may_close_in_reserve(&self) -> bool {
        let state = self.state();
        state.phase != ConnectionPhase::Serving && !state.close_requested
    }

    /// Records that the connection was asked to close.
    pub(super) fn request_close(&self) {
        self.change(|state| state.close_requested = true);
    }

    fn on_read(&self) {
        if matches!(self.phase(), ConnectionPhase::New | ConnectionPhase::Idle) {
            self.enter(ConnectionPhase::ReadingHead);
        }
    }

    /// Records that a request head is complete. The guard is dropped at the end of the response.
    pub(super) fn begin_request(self: &Arc<Self>) -> RequestGuard {
        self.enter(ConnectionPhase::Serving);
        RequestGuard(Arc::clone(self))
    }

    fn on_write<T>(&self, outcome: &Poll<T>) {
        match outcome {
            Poll::Pending => {
                self.change(|state| state.write_blocked_since = state.write_blocked_since.or_else(|| Some(Instant::now())))
            }
            Poll::Ready(_) => self.change(|state| state.write_blocked_since = None),
        }
    }

    /// Returns when a timeout has passed.
    pub(super) async fn timed_out(&self, timeouts: ConnectionTimeouts) {
        let shortest = timeouts.head.min(timeouts.idle).min(timeouts.write);
        loop {
            let state = self.state();
            let phase_ends = match state.phase {
                ConnectionPhase::New | ConnectionPhase::ReadingHead => Some(state.since + timeouts.head),
                ConnectionPhase::Idle => state.write_blocked_since.is_none().then(|| state.since + timeouts.idle),
                ConnectionPhase::Serving => None,
            };
            let write_ends = state.write_blocked_since.map(|since| since + timeouts.write);
            let now = Instant::now();
            let due = phase_ends.into_iter().chain(write_ends).min().unwrap_or(now + shortest);
            if due <= now {
                return;
            }
            // A timeout that begins during the sleep cannot pass before the shortest timeout has.
            tokio::time::sleep_until(due.min(now + shortest)).await;
        }
    }
}

/// A request that is being served.
pub(super) struct RequestGuard(Arc<ConnectionActivity>);

impl Drop for RequestGuard {
    fn drop(&mut self) {
        self.0.enter(ConnectionPhase::Idle);
    }
}

/// A response body. Dropping it marks the end of the response.
pub(super) struct MonitoredBody {
    pub(super) body: Body,
    pub(super) _guard: RequestGuard,
}

impl hyper::body::Body for MonitoredBody {
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

/// A stream that records its activity.
pub(super) struct MonitoredIo<S> {
    stream: S,
    activity: Arc<ConnectionActivity>,
    suppressed_status: Option<u16>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> MonitoredIo<S> {
    pub(super) fn new(stream: S, activity: Arc<ConnectionActivity>) -> Self {
        Self { stream, activity, suppressed_status: None }
    }

    /// The status of hyper's own error response, if there was one. It was not sent to the client.
    pub(super) fn suppressed_status(&self) -> Option<u16> {
        self.suppressed_status
    }

    /// Writes this response instead, and closes the connection.
    pub(super) async fn write_final_response(mut self, response: &[u8]) {
        let written = async {
            self.stream.write_all(response).await?;
            self.stream.shutdown().await?;
            let mut unwanted = vec![0; 16 << 10];
            while let Ok(Ok(1..)) = tokio::time::timeout(FINAL_READ_TIMEOUT, self.stream.read(&mut unwanted)).await {}
            Ok::<_, io::Error>(())
        };
        // A client that does not read is dropped after the timeout.
        let _ = tokio::time::timeout(FINAL_RESPONSE_TIMEOUT, written).await;
    }
}

/// Finds hyper's own error response in `bytes`: its start and its status. It is always last. The broker's responses carry
/// `x-request-id`, and their bodies never end with a response head.
fn hyper_error_response(bytes: &[u8]) -> Option<(usize, u16)> {
    if !bytes.ends_with(b"\r\n\r\n") {
        return None;
    }
    let window = bytes.len().saturating_sub(MAX_HYPER_ERROR_BYTES);
    let at = window + bytes[window..].windows(7).rposition(|word| word == b"HTTP/1.")?;
    let head = std::str::from_utf8(&bytes[at..]).ok()?;
    let status = head.get(9..12)?.parse().ok()?;
    (matches!(status, 400 | 414 | 431) && !head.contains("x-request-id")).then_some((at, status))
}

impl<S: AsyncRead + Unpin> AsyncRead for MonitoredIo<S> {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let outcome = Pin::new(&mut self.stream).poll_read(context, buffer);
        if buffer.filled().len() > before {
            self.activity.on_read();
        }
        outcome
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for MonitoredIo<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let wanted = match hyper_error_response(bytes) {
            _ if self.suppressed_status.is_some() => return Poll::Ready(Ok(bytes.len())),
            Some((0, status)) => {
                self.suppressed_status = Some(status);
                return Poll::Ready(Ok(bytes.len()));
            }
            Some((at, _)) => &bytes[..at],
            None => bytes,
        };
        let outcome = Pin::new(&mut self.stream).poll_write(context, wanted);
        self.activity.on_write(&outcome);
        outcome
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let outcome = Pin::new(&mut self.stream).poll_flush(context);
        self.activity.on_write(&outcome);
        outcome
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.suppressed_status {
            // The final response is still to be written.
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
    fn hypers_error_responses_are_distinguished_from_the_brokers() {
        let hypers = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\ndate: now\r\n\r\n".as_slice();
        assert_eq!(hyper_error_response(hypers), Some((0, 431)));
        let ours = b"HTTP/1.1 200 OK\r\nx-request-id: 1\r\ncontent-length: 2\r\n\r\n{}".as_slice();
        assert_eq!(hyper_error_response(&[ours, hypers].concat()), Some((ours.len(), 431)));
        for other in [
            ours,
            b"HTTP/1.1 100 Continue\r\n\r\n",
            b"HTTP/1.1 204 No Content\r\nx-request-id: 1\r\n\r\n",
            b"HTTP/1.1 400 Bad Request\r\nx-request-id: 1\r\ncontent-length: 0\r\n\r\n",
            b"\r\n\r\n",
            b"HTTP/1.\r\n\r\n",
        ] {
            assert_eq!(hyper_error_response(other), None, "{}", String::from_utf8_lossy(other));
        }
    }

    proptest! {
        #[test]
        fn no_bytes_cause_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), end in any::<bool>()) {
            let end: &[u8] = if end { b"HTTP/1.1 4\r\n\r\n" } else { b"" };
            let _ = hyper_error_response(&[&bytes, end].concat());
        }
    }

    #[tokio::test]
    async fn each_phase_has_its_own_timeout() {
        let ms = Duration::from_millis;
        let timeouts = ConnectionTimeouts { head: ms(50), idle: ms(200), write: ms(100) };
        let lasted = async |activity: &ConnectionActivity, limit: Duration| {
            let begun = Instant::now();
            activity.timed_out(timeouts).await;
            assert!(begun.elapsed() + ms(5) >= limit, "{:?} instead of {limit:?}", begun.elapsed());
        };
        let activity = Arc::new(ConnectionActivity::new());
        lasted(&activity, ms(50)).await;
        activity.on_read();
        lasted(&activity, ms(50)).await;
        assert_eq!(activity.phase(), ConnectionPhase::ReadingHead);
        let request = activity.begin_request();
        assert!(tokio::time::timeout(ms(400), activity.timed_out(timeouts)).await.is_err());
        activity.on_write(&Poll::<()>::Pending);
        lasted(&activity, ms(100)).await;
        activity.on_write(&Poll::Ready(()));
        drop(request);
        lasted(&activity, ms(200)).await;
        assert_eq!(activity.phase(), ConnectionPhase::Idle);
    }
}
