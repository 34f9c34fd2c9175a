//! How far an upload has come, counted where the bytes leave.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// How far an upload has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Bytes handed to storage; falls back when an attempt failed.
    pub bytes_done: u64,
    /// Bytes in all.
    pub bytes_total: u64,
    /// Parts that storage has confirmed.
    pub parts_done: u32,
    /// Parts in all; 1 for a single PUT.
    pub parts_total: u32,
}

/// Who is told.
pub(crate) type Report = Arc<dyn Fn(Progress) + Send + Sync>;

/// The sums over all parts of an upload.
pub(crate) struct Tally {
    bytes_done: AtomicU64,
    bytes_total: u64,
    parts_done: AtomicU32,
    parts_total: u32,
    report: Option<Report>,
}

impl Tally {
    pub(crate) fn new(bytes_total: u64, parts_total: u32, report: Option<Report>) -> Self {
        Self { bytes_done: AtomicU64::new(0), bytes_total, parts_done: AtomicU32::new(0), parts_total, report }
    }

    /// Counts what storage held before this run.
    pub(crate) fn begin_with(&self, bytes: u64, parts: u32) {
        self.bytes_done.store(bytes, Ordering::Relaxed);
        self.parts_done.store(parts, Ordering::Relaxed);
        self.tell();
    }

    pub(crate) fn part_done(&self) {
        self.parts_done.fetch_add(1, Ordering::Relaxed);
        self.tell();
    }

    fn tell(&self) {
        if let Some(report) = &self.report {
            report(Progress {
                bytes_done: self.bytes_done.load(Ordering::Relaxed),
                bytes_total: self.bytes_total,
                parts_done: self.parts_done.load(Ordering::Relaxed),
                parts_total: self.parts_total,
            });
        }
    }
}

impl fmt::Debug for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tally").field("bytes_done", &self.bytes_done).finish_non_exhaustive()
    }
}

/// The bytes of one attempt, and why its source failed if it did.
#[derive(Debug)]
pub(crate) struct Meter {
    tally: Arc<Tally>,
    attempt: Mutex<Attempt>,
}

#[derive(Debug, Default)]
struct Attempt {
    sent: u64,
    over: bool,
    failure: Option<io::Error>,
}

impl Meter {
    pub(crate) fn new(tally: &Arc<Tally>) -> Arc<Self> {
        Arc::new(Self { tally: Arc::clone(tally), attempt: Mutex::default() })
    }

    fn attempt(&self) -> MutexGuard<'_, Attempt> {
        self.attempt.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn sent(&self) -> u64 {
        self.attempt().sent
    }

    pub(crate) fn add(&self, bytes: u64) {
        {
            let mut attempt = self.attempt();
            // The connection may still ask for bytes for a moment after the attempt was given up.
            if attempt.over {
                return;
            }
            attempt.sent += bytes;
            self.tally.bytes_done.fetch_add(bytes, Ordering::Relaxed);
        }
        self.tally.tell();
    }

    /// Takes the attempt's bytes out of the sums: they go again, or nowhere.
    pub(crate) fn take_back(&self) {
        {
            let mut attempt = self.attempt();
            attempt.over = true;
            self.tally.bytes_done.fetch_sub(attempt.sent, Ordering::Relaxed);
            attempt.sent = 0;
        }
        self.tally.tell();
    }

    /// Notes the source's failure and gives back one that ends the body.
    pub(crate) fn fail(&self, error: io::Error) -> io::Error {
        let ending = io::Error::new(error.kind(), error.to_string());
        self.attempt().failure = Some(error);
        ending
    }

    /// The source's failure, once.
    pub(crate) fn failure(&self) -> Option<io::Error> {
        self.attempt().failure.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_attempts_are_taken_back() {
        let told = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&told);
        let report: Report =
            Arc::new(move |progress: Progress| sink.lock().unwrap().push((progress.bytes_done, progress.parts_done)));
        let tally = Arc::new(Tally::new(30, 3, Some(report)));
        tally.begin_with(10, 1);
        let attempt = Meter::new(&tally);
        attempt.add(7);
        attempt.take_back();
        attempt.add(2);
        let attempt = Meter::new(&tally);
        attempt.add(10);
        tally.part_done();
        assert_eq!(*told.lock().unwrap(), [(10, 1), (17, 1), (10, 1), (20, 1), (20, 2)]);
    }
}
