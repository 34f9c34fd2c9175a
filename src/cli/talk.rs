//! What the commands say to people: on stderr, so that stdout stays data.

use std::io::{self, IsTerminal as _, Write as _};
use std::path::Path;
use std::sync::{Mutex, Once, PoisonError};
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

/// Says something to people. What nobody hears must not end the command.
pub(super) fn note(line: &str) {
    let _ = writeln!(io::stderr().lock(), "{line}");
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
    Bar { bar: ProgressBar, began: Once },
    Lines(Mutex<Option<Told>>),
    Silent,
}

/// Where a transfer stood when it was first told of, which may be half-way, and when it was told of last.
#[derive(Clone, Copy)]
struct Told {
    base: u64,
    began: Instant,
    last: Instant,
}

impl Meter {
    pub(super) fn new(what: &str, silent: bool) -> Self {
        let style = match silent {
            true => Style::Silent,
            false if io::stderr().is_terminal() => Style::Bar { bar: bar(what), began: Once::new() },
            false => Style::Lines(Mutex::new(None)),
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
            Style::Bar { bar, began } => {
                bar.set_length(total);
                bar.set_prefix(of_parts(parts));
                bar.set_position(done);
                // What was there before this run says nothing of its rate.
                began.call_once(|| bar.reset_eta());
            }
            Style::Lines(told) => {
                let (mut told, now) = (told.lock().unwrap_or_else(PoisonError::into_inner), Instant::now());
                let at = told.get_or_insert(Told { base: done, began: now, last: now });
                if now - at.last < LINE {
                    return;
                }
                at.last = now;
                note(&progress(&self.what, done, total, parts, (done.saturating_sub(at.base), now - at.began)));
            }
            Style::Silent => {}
        }
    }

    /// Wipes the bar and says how it ended.
    pub(super) fn end(&self, text: &str) {
        self.wipe();
        self.say(text);
    }

    /// Says something of the transfer, to people.
    pub(super) fn say(&self, text: &str) {
        if !matches!(self.style, Style::Silent) {
            self.say_anyway(text);
        }
    }

    /// The same where a machine's owner needs it too.
    pub(super) fn say_anyway(&self, text: &str) {
        let line = format!("{}: {text}", self.what);
        match &self.style {
            Style::Bar { bar, .. } => bar.suspend(|| note(&line)),
            Style::Lines(_) | Style::Silent => note(&line),
        }
    }

    /// Leaves an empty line for an error.
    pub(super) fn wipe(&self) {
        if let Style::Bar { bar, .. } = &self.style {
            bar.finish_and_clear();
        }
    }
}

fn bar(what: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(BAR).expect("the template is sound").progress_chars("#>-");
    ProgressBar::new(0).with_style(style).with_message(what.to_owned())
}

/// What a line says in a log; the rate is that of the bytes and the time of this run.
fn progress(what: &str, done: u64, total: u64, parts: (u32, u32), (moved, elapsed): (u64, Duration)) -> String {
    let speed = moved as f64 / elapsed.as_secs_f64().max(0.001);
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

/// A file's name as a command reads it back from a shell: one that begins like an option is no option.
pub(super) fn file(path: &Path) -> String {
    let name = path.display().to_string();
    quoted(&if name.starts_with('-') && name != "-" { format!("./{name}") } else { name })
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
        let two = Duration::from_secs(2);
        let line = progress("a.bin", 21_000_000, 42_000_000, (4, 8), (21_000_000, two));
        assert_eq!(line, "a.bin: 21.0 of 42.0 MB, 11 MB/s, 2 s left, 4 of 8 parts");
        let resumed = progress("a.bin", 39_000_000, 42_000_000, (7, 8), (2_000_000, two));
        assert_eq!(resumed, "a.bin: 39.0 of 42.0 MB, 1 MB/s, 3 s left, 7 of 8 parts");
        assert_eq!(progress("a", 0, 7, (0, 1), (0, two)), "a: 0.0 of 7 bytes, 0 MB/s");
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
