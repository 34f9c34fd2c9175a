//! Upload progress, counted as the bytes are sent.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The progress of an upload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Bytes sent to storage. The count decreases when an attempt fails.
    pub bytes_done: u64,
    /// All bytes of the upload.
    pub bytes_total: u64,
    /// Parts that storage has confirmed.
    pub parts_done: u32,
    /// All parts of the upload; 1 for a single PUT.
    pub parts_total: u32,
}

/// The caller's progress callback.
pub(crate) type ProgressCallback = Arc<dyn Fn(Progress) + Send + Sync>;

/// A callback for the number of bytes that were hashed.
pub(crate) type HashCallback = Arc<dyn Fn(u64) + Send + Sync>;

/// The progress of an upload, summed over all its parts.
pub(crate) struct ProgressTotals {
    bytes_done: AtomicU64,
    bytes_total: u64,
    parts_done: AtomicU32,
    parts_total: u32,
    callback: Option<ProgressCallback>,
}

impl ProgressTotals {
    pub(crate) fn new(bytes_total: u64, parts_total: u32, callback: Option<ProgressCallback>) -> Self {
        Self { bytes_done: AtomicU64::new(0), bytes_total, parts_done: AtomicU32::new(0), parts_total, callback }
    }

    /// Counts the bytes and parts that storage already held before this run.
    pub(crate) fn set_initial(&self, bytes: u64, parts: u32) {
        self.bytes_done.store(bytes, Ordering::Relaxed);
        self.parts_done.store(parts, Ordering::Relaxed);
        self.notify();
    }

    pub(crate) fn part_done(&self) {
        self.parts_done.fetch_add(1, Ordering::Relaxed);
        self.notify();
    }

    fn notify(&self) {
        if let Some(callback) = &self.callback {
            callback(Progress {
                bytes_done: self.bytes_done.load(Ordering::Relaxed),
                bytes_total: self.bytes_total,
                parts_done: self.parts_done.load(Ordering::Relaxed),
                parts_total: self.parts_total,
            });
        }
    }
}

impl fmt::Debug for ProgressTotals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ProgressTotals").field("bytes_done", &self.bytes_done).finish_non_exhaustive()
    }
}

/// The bytes of one attempt, and the error of its source.
#[derive(Debug)]
pub(crate) struct AttemptCounter {
    totals: Arc<ProgressTotals>,
    attempt: Mutex<Attempt>,
}

#[derive(Debug, Default)]
struct Attempt {
    sent_bytes: u64,
    ended: bool,
    source_error: Option<io::Error>,
}

impl AttemptCounter {
    pub(crate) fn new(totals: &Arc<ProgressTotals>) -> Arc<Self> {
        Arc::new(Self { totals: Arc::clone(totals), attempt: Mutex::default() })
    }

    fn attempt(&self) -> MutexGuard<'_, Attempt> {
        self.attempt.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn sent_bytes(&self) -> u64 {
        self.attempt().sent_bytes
    }

    pub(crate) fn add(&self, bytes: u64) {
        {
            let mut attempt = self.attempt();
            // The connection may still poll the body for a moment after the attempt ended.
            if attempt.ended {
                return;
            }
            attempt.sent_bytes += bytes;
            self.totals.bytes_done.fetch_add(bytes, Ordering::Relaxed);
        }
        self.totals.notify();
    }

    /// Subtracts the attempt's bytes from the totals: a retry sends them again.
    pub(crate) fn roll_back(&self) {
        {
            let mut attempt = self.attempt();
            attempt.ended = true;
            self.totals.bytes_done.fetch_sub(attempt.sent_bytes, Ordering::Relaxed);
            attempt.sent_bytes = 0;
        }
        self.totals.notify();
    }

    /// Records the source's error and returns a copy of it that ends the request body.
    pub(crate) fn record_source_error(&self, error: io::Error) -> io::Error {
        let copy = io::Error::new(error.kind(), error.to_string());
        self.attempt().source_error = Some(error);
        copy
    }

    /// Takes the source's error.
    pub(crate) fn take_source_error(&self) -> Option<io::Error> {
        self.attempt().source_error.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_failed_attempts_are_subtracted() {
        let reports = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&reports);
        let callback: ProgressCallback =
            Arc::new(move |progress: Progress| sink.lock().unwrap().push((progress.bytes_done, progress.parts_done)));
        let totals = Arc::new(ProgressTotals::new(30, 3, Some(callback)));
        totals.set_initial(10, 1);
        let attempt = AttemptCounter::new(&totals);
        attempt.add(7);
        attempt.roll_back();
        attempt.add(2);
        let attempt = AttemptCounter::new(&totals);
        attempt.add(10);
        totals.part_done();
        assert_eq!(*reports.lock().unwrap(), [(10, 1), (17, 1), (10, 1), (20, 1), (20, 2)]);
    }
}
