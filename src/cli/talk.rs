//! What the commands say to people: on stderr, so that stdout stays data.

use std::io::{self, IsTerminal as _, Write as _};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use super::Error;

/// In a log, a line now and then is enough; what is done sooner needs none.
const LINE: Duration = Duration::from_secs(2);

/// Parts stand last: a terminal that is too narrow cuts them off first.
const BAR: &str = "{msg} [{bar:25}] {percent:>3} % of {decimal_total_bytes}, {decimal_bytes_per_sec}, {eta} left{prefix}";

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
}

enum Style {
    Bar(ProgressBar),
    Lines { started: Instant, told: Mutex<Instant> },
    Silent,
}

impl Meter {
    pub(super) fn new(what: &str, silent: bool) -> Self {
        let style = match silent {
            true => Style::Silent,
            false if io::stderr().is_terminal() => Style::Bar(bar(what)),
            false => Style::Lines { started: Instant::now(), told: Mutex::new(Instant::now()) },
        };
        Self { what: what.to_owned(), style }
    }

    /// Says how far it is, unless it said so a moment ago.
    pub(super) fn tell(&self, done: u64, total: u64) {
        self.tell_parts(done, total, (0, 1));
    }

    /// The same with how many parts are done, of how many.
    pub(super) fn tell_parts(&self, done: u64, total: u64, parts: (u32, u32)) {
        match &self.style {
            Style::Bar(bar) => {
                bar.set_length(total);
                bar.set_prefix(of_parts(parts));
                bar.set_position(done);
            }
            Style::Lines { started, told } => {
                let mut told = told.lock().unwrap_or_else(PoisonError::into_inner);
                if told.elapsed() < LINE {
                    return;
                }
                *told = Instant::now();
                // Talk that nobody reads must not end the transfer.
                let _ = writeln!(io::stderr().lock(), "{}", progress(&self.what, done, total, parts, started.elapsed()));
            }
            Style::Silent => {}
        }
    }

    /// Wipes the bar and says how it ended.
    pub(super) fn end(&self, text: &str) {
        self.wipe();
        if !matches!(self.style, Style::Silent) {
            let _ = writeln!(io::stderr().lock(), "{}: {text}", self.what);
        }
    }

    /// Leaves an empty line for an error.
    pub(super) fn wipe(&self) {
        if let Style::Bar(bar) = &self.style {
            bar.finish_and_clear();
        }
    }
}

fn bar(what: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(BAR).expect("the template is sound").progress_chars("#>-");
    ProgressBar::new(0).with_style(style).with_message(what.to_owned())
}

/// What a line says in a log.
fn progress(what: &str, done: u64, total: u64, parts: (u32, u32), elapsed: Duration) -> String {
    let speed = done as f64 / elapsed.as_secs_f64().max(0.001);
    let left = Duration::try_from_secs_f64(total.saturating_sub(done) as f64 / speed).unwrap_or(Duration::MAX);
    let left = if left < Duration::from_secs(24 * 3600) { format!(", {} s left", left.as_secs()) } else { String::new() };
    let of_total = format!("{} of {}", megabytes(done), size(total));
    format!("{what}: {of_total}, {} MB/s{left}{}", (speed / 1e6).round(), of_parts(parts))
}

fn of_parts((done, total): (u32, u32)) -> String {
    if total > 1 { format!(", {done} of {total} parts") } else { String::new() }
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

/// A name as a shell reads it back.
pub(super) fn quoted(name: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_./:,+@%=".contains(&byte);
    match !name.is_empty() && name.bytes().all(plain) {
        true => name.to_owned(),
        false => format!("'{}'", name.replace('\'', r"'\''")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_how_far_how_fast_and_how_long() {
        let line = progress("a.bin", 21_000_000, 42_000_000, (4, 8), Duration::from_secs(2));
        assert_eq!(line, "a.bin: 21.0 of 42.0 MB, 11 MB/s, 2 s left, 4 of 8 parts");
        assert_eq!(progress("a", 0, 7, (0, 1), Duration::from_secs(2)), "a: 0.0 of 7 bytes, 0 MB/s");
        assert_eq!(size(5), "5 bytes");
    }

    #[test]
    fn the_bar_has_a_sound_template() {
        let bar = bar("a.bin");
        bar.set_length(10);
        assert_eq!((bar.message(), bar.length()), ("a.bin".to_owned(), Some(10)));
    }

    #[test]
    fn names_survive_a_shell() {
        for (name, wanted) in
            [("a/b-1.bin", "a/b-1.bin"), ("a b", "'a b'"), ("it's", r"'it'\''s'"), ("$(x)", "'$(x)'"), ("", "''")]
        {
            assert_eq!(quoted(name), wanted);
        }
    }
}
