//! Output of the commands: data goes to stdout, messages and progress go to stderr.

use std::io::{self, IsTerminal as _, Write as _};
use std::path::Path;
use std::sync::{LazyLock, Mutex, Once, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::Error;

/// The interval between progress lines if stderr is not a terminal. A shorter transfer prints no line.
const LINE_INTERVAL: Duration = Duration::from_secs(2);

/// The number of parts comes last, because a narrow terminal cuts off the end of the line.
const BAR_TEMPLATE: &str =
    "{msg} [{bar:25}] {percent:>3} % of {decimal_total_bytes}, {decimal_bytes_per_sec}, {eta} left{prefix}";

/// All progress bars. They are hidden while a line is printed. Without a terminal there are none.
static BARS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

/// Writes a line of data to stdout.
pub(super) fn print_data(line: &str) -> Result<(), Error> {
    BARS.suspend(|| writeln!(io::stdout().lock(), "{line}").map_err(Error::Output))
}

/// Prints a message to stderr. A failure to print is ignored, because it must not stop the command.
pub(super) fn print_note(line: &str) {
    BARS.suspend(|| {
        let _ = writeln!(io::stderr().lock(), "{line}");
    });
}

/// A type of the API as one line of JSON.
pub(super) fn to_json<T: serde::Serialize>(value: &T) -> String {
    serde_json::to_string(value).expect("the types of the API contain only strings and numbers")
}

/// Reports the progress of one transfer: a bar on a terminal, lines elsewhere, nothing with `--json`.
pub(super) struct ProgressReporter {
    name: String,
    style: Style,
}

enum Style {
    Bar { bar: ProgressBar, first_hash_report: Once, first_report: Once },
    Lines { hashing: Mutex<Option<LineState>>, transfer: Mutex<Option<LineState>> },
    Silent,
}

/// The start of the progress lines. A resumed transfer does not start at 0 bytes.
#[derive(Clone, Copy)]
struct LineState {
    initial_bytes: u64,
    started_at: Instant,
    printed_at: Instant,
}

impl ProgressReporter {
    pub(super) fn new(name: &str, silent: bool) -> Self {
        let style = match silent {
            true => Style::Silent,
            false if io::stderr().is_terminal() => {
                Style::Bar { bar: BARS.add(progress_bar(name)), first_hash_report: Once::new(), first_report: Once::new() }
            }
            false => Style::Lines { hashing: Mutex::default(), transfer: Mutex::default() },
        };
        Self { name: name.to_owned(), style }
    }

    /// Reports the progress in bytes. Lines appear at most once per [`LINE_INTERVAL`].
    pub(super) fn report(&self, done_bytes: u64, total_bytes: u64) {
        self.report_parts(done_bytes, total_bytes, (0, 1));
    }

    /// Reports how many bytes of a file are hashed. Hashing comes before the transfer.
    pub(super) fn report_hashing(&self, done_bytes: u64, total_bytes: u64) {
        match &self.style {
            Style::Bar { bar, first_hash_report, .. } => {
                first_hash_report.call_once(|| bar.set_message(hashing_name(&self.name)));
                bar.set_length(total_bytes);
                bar.set_position(done_bytes);
            }
            Style::Lines { hashing, .. } => {
                print_line_if_due(hashing, &hashing_name(&self.name), done_bytes, total_bytes, (0, 1));
            }
            Style::Silent => {}
        }
    }

    /// As [`Self::report`], with the number of finished parts and of all parts.
    pub(super) fn report_parts(&self, done_bytes: u64, total_bytes: u64, parts: (u32, u32)) {
        match &self.style {
            Style::Bar { bar, first_report, .. } => {
                bar.set_length(total_bytes);
                bar.set_prefix(parts_text(parts));
                bar.set_position(done_bytes);
                first_report.call_once(|| {
                    bar.set_message(self.name.clone());
                    // Hashed bytes and the bytes of an earlier run must not count for the rate of the transfer.
                    bar.reset_eta();
                });
            }
            Style::Lines { transfer, .. } => print_line_if_due(transfer, &self.name, done_bytes, total_bytes, parts),
            Style::Silent => {}
        }
    }

    /// Removes the bar and prints the outcome of the transfer.
    pub(super) fn finish(&self, text: &str) {
        self.clear();
        self.eprintln(text);
    }

    /// Prints a message about the transfer, but not with `--json`.
    pub(super) fn eprintln(&self, text: &str) {
        if !matches!(self.style, Style::Silent) {
            self.eprintln_always(text);
        }
    }

    /// Prints a message about the transfer, also with `--json`.
    pub(super) fn eprintln_always(&self, text: &str) {
        print_note(&format!("{}: {text}", self.name));
    }

    /// Removes the bar, so that the next message starts on an empty line.
    pub(super) fn clear(&self) {
        if let Style::Bar { bar, .. } = &self.style {
            bar.finish_and_clear();
            BARS.remove(bar);
        }
    }
}

fn hashing_name(name: &str) -> String {
    format!("hashing {name}")
}

/// Prints a progress line unless the last one was printed less than [`LINE_INTERVAL`] ago.
fn print_line_if_due(state: &Mutex<Option<LineState>>, name: &str, done_bytes: u64, total_bytes: u64, parts: (u32, u32)) {
    let (mut state, now) = (state.lock().unwrap_or_else(PoisonError::into_inner), Instant::now());
    let state = state.get_or_insert(LineState { initial_bytes: done_bytes, started_at: now, printed_at: now });
    if now - state.printed_at < LINE_INTERVAL {
        return;
    }
    state.printed_at = now;
    let transferred = (done_bytes.saturating_sub(state.initial_bytes), now - state.started_at);
    print_note(&progress_line(name, done_bytes, total_bytes, parts, transferred));
}

fn progress_bar(name: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(BAR_TEMPLATE).expect("the template is valid").progress_chars("#>-");
    ProgressBar::new(0).with_style(style).with_message(name.to_owned())
}

/// A progress line. The rate follows from the bytes and the time of this run only.
fn progress_line(
    name: &str,
    done_bytes: u64,
    total_bytes: u64,
    parts: (u32, u32),
    (transferred_bytes, elapsed): (u64, Duration),
) -> String {
    let bytes_per_second = transferred_bytes as f64 / elapsed.as_secs_f64().max(0.001);
    let remaining_seconds = total_bytes.saturating_sub(done_bytes) as f64 / bytes_per_second;
    let left = Duration::try_from_secs_f64(remaining_seconds).unwrap_or(Duration::MAX);
    let left = if left < Duration::from_secs(24 * 3600) { format!(", {} s left", left.as_secs()) } else { String::new() };
    let of_total = format!("{} of {}", megabytes(done_bytes), format_size(total_bytes));
    format!("{name}: {of_total}, {} MB/s{left}{}", (bytes_per_second / 1e6).round(), parts_text(parts))
}

fn parts_text((done, total): (u32, u32)) -> String {
    if total > 1 { format!(", {done} of {total} parts") } else { String::new() }
}

fn megabytes(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / 1e6)
}

/// A size in bytes, or in MB from 1 MB on.
pub(super) fn format_size(bytes: u64) -> String {
    match bytes {
        0..1_000_000 => format!("{bytes} bytes"),
        _ => format!("{} MB", megabytes(bytes)),
    }
}

/// A path as an argument in a shell command. A name that starts with `-` gets `./` in front, so that it is not an option.
pub(super) fn shell_path(path: &Path) -> String {
    let name = path.display().to_string();
    shell_quote(&if name.starts_with('-') && name != "-" { format!("./{name}") } else { name })
}

/// A text as one word in a shell command.
pub(super) fn shell_quote(name: &str) -> String {
    let needs_no_quotes = |byte: u8| byte.is_ascii_alphanumeric() || b"-_./:,+@%=".contains(&byte);
    match !name.is_empty() && name.bytes().all(needs_no_quotes) {
        true => name.to_owned(),
        false => format!("'{}'", name.replace('\'', r"'\''")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_progress_line_shows_the_progress_the_rate_and_the_remaining_time() {
        let two = Duration::from_secs(2);
        let line = progress_line("a.bin", 21_000_000, 42_000_000, (4, 8), (21_000_000, two));
        assert_eq!(line, "a.bin: 21.0 of 42.0 MB, 11 MB/s, 2 s left, 4 of 8 parts");
        let resumed = progress_line("a.bin", 39_000_000, 42_000_000, (7, 8), (2_000_000, two));
        assert_eq!(resumed, "a.bin: 39.0 of 42.0 MB, 1 MB/s, 3 s left, 7 of 8 parts");
        assert_eq!(progress_line("a", 0, 7, (0, 1), (0, two)), "a: 0.0 of 7 bytes, 0 MB/s");
        assert_eq!(format_size(5), "5 bytes");
    }

    #[test]
    fn the_template_of_the_progress_bar_is_valid() {
        let bar = progress_bar("a.bin");
        bar.set_length(10);
        assert_eq!((bar.message(), bar.length()), ("a.bin".to_owned(), Some(10)));
    }

    #[test]
    fn a_quoted_name_stays_one_word_in_a_shell() {
        for (name, expected) in
            [("a/b-1.bin", "a/b-1.bin"), ("a b", "'a b'"), ("it's", r"'it'\''s'"), ("$(x)", "'$(x)'"), ("", "''")]
        {
            assert_eq!(shell_quote(name), expected);
        }
    }
}
