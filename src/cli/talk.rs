//! What the commands say to people: on stderr, so that stdout stays data.

use std::io::{self, IsTerminal as _, Write as _};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::Error;

/// A bar that moves more often is not easier to read.
const REDRAW: Duration = Duration::from_millis(100);
/// In a log, a line now and then is enough; what is done sooner needs none.
const LINE: Duration = Duration::from_secs(2);
const BAR_CHARACTERS: usize = 30;

/// Writes a line of data to stdout.
pub(super) fn data(line: &str) -> Result<(), Error> {
    writeln!(io::stdout().lock(), "{line}").map_err(Error::Output)
}

/// The contract's types as a line of JSON.
pub(super) fn json<T: serde::Serialize>(value: &T) -> String {
    serde_json::to_string(value).expect("the contract's types have only strings and numbers")
}

/// How far one transfer is: a bar on a terminal, a line now and then elsewhere, nothing for machines.
pub(super) struct Meter {
    what: String,
    style: Style,
    started: Instant,
    told: Mutex<Option<Instant>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Style {
    Bar,
    Lines,
    Silent,
}

impl Meter {
    pub(super) fn new(what: &str, silent: bool) -> Self {
        let style = match silent {
            true => Style::Silent,
            false if io::stderr().is_terminal() => Style::Bar,
            false => Style::Lines,
        };
        Self { what: what.to_owned(), style, started: Instant::now(), told: Mutex::new(None) }
    }

    /// Says how far it is, unless it said so a moment ago.
    pub(super) fn tell(&self, done: u64, total: u64) {
        let every = match self.style {
            Style::Bar => REDRAW,
            Style::Lines => LINE,
            Style::Silent => return,
        };
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.unwrap_or(self.started).elapsed() < every {
            return;
        }
        *told = Some(Instant::now());
        let line = progress(&self.what, done, total, self.started.elapsed());
        // Talk that nobody reads must not end the transfer.
        let _ = match self.style {
            Style::Bar => write!(io::stderr().lock(), "\r\x1b[K{} {line}", bar(done, total)),
            _ => writeln!(io::stderr().lock(), "{line}"),
        };
    }

    /// Wipes the bar and says how it ended.
    pub(super) fn end(&self, text: &str) {
        self.wipe();
        if self.style != Style::Silent {
            let _ = writeln!(io::stderr().lock(), "{}: {text}", self.what);
        }
    }

    /// Leaves an empty line for an error.
    pub(super) fn wipe(&self) {
        let told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if self.style == Style::Bar && told.is_some() {
            let _ = write!(io::stderr().lock(), "\r\x1b[K");
        }
    }
}

fn progress(what: &str, done: u64, total: u64, elapsed: Duration) -> String {
    let speed = done as f64 / elapsed.as_secs_f64().max(0.001);
    format!("{what}: {} of {}, {} MB/s", megabytes(done), size(total), (speed / 1e6).round())
}

fn bar(done: u64, total: u64) -> String {
    let share = if total == 0 { 1.0 } else { (done as f64 / total as f64).min(1.0) };
    let full = (share * BAR_CHARACTERS as f64) as usize;
    format!("[{}{}] {:3.0} %", "#".repeat(full), "-".repeat(BAR_CHARACTERS - full), share * 100.0)
}

fn megabytes(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / 1e6)
}

/// A size as people say it.
pub(super) fn size(bytes: u64) -> String {
    match bytes {
        0..1_000_000 => format!("{bytes} bytes"),
        _ => format!("{} MB", megabytes(bytes)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_how_far_and_how_fast() {
        let line = progress("a.bin", 21_000_000, 42_000_000, Duration::from_secs(2));
        assert_eq!(line, "a.bin: 21.0 of 42.0 MB, 11 MB/s");
        assert_eq!(bar(21, 42), format!("[{}{}]  50 %", "#".repeat(15), "-".repeat(15)));
        assert_eq!(bar(0, 0), format!("[{}] 100 %", "#".repeat(30)));
        assert_eq!(size(5), "5 bytes");
    }
}
