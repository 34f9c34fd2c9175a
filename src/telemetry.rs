//! Logs: one event is one line, whatever the words of others hold.
//!
//! Clients, tokens, S3 and Kafka choose parts of what is logged. A line break or a terminal's escape code of theirs must not
//! write a line of its own, and a long text must not fill the disk: each field is escaped and cut here, where it is written.

use std::borrow::Cow;
use std::error::Error;
use std::fmt::{self, Write as _};
use std::io;

use serde_json::Value;
use tracing::field::Field;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::field::MakeExt as _;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::format::{Writer, debug_fn};

/// The longest field of a log line, in characters: the longest error of our own has about 500.
const FIELD_CHARACTERS: usize = 1000;
/// The longest text that a stranger chose, in characters: longer than any honest path, algorithm or key id.
const FOREIGN_CHARACTERS: usize = 200;

/// Logs to stderr: lines for a terminal, JSON for machines (`LFS_BROKER_LOG_FORMAT=json`), filtered by `RUST_LOG`.
pub(crate) fn log(default: &str) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    // The embedded S3's protocol layer writes whole requests, signed URLs among them, at its debug level, and whatever
    // it refuses as an error, though the broker's own trial is refused on purpose. Whoever asked it is told.
    let filter = filter.add_directive("s3s=off".parse().expect("a directive"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter);
    match std::env::var("LFS_BROKER_LOG_FORMAT").as_deref() {
        Ok("json") => builder.json().with_writer(Cleaned(io::stderr)).init(),
        _ => {
            let fields = debug_fn(write_field).delimited(" ");
            let builder = builder.fmt_fields(fields).with_writer(io::stderr);
            builder.with_ansi(io::IsTerminal::is_terminal(&io::stderr())).init();
        }
    }
}

/// A stranger's text as it may stand in a log: without control characters, and cut.
pub(crate) fn foreign(text: &str) -> Cow<'_, str> {
    plain(text, FOREIGN_CHARACTERS)
}

/// An error and its causes in one line.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    // Sixteen is far more than a chain has; the bound is for one that never ends.
    for _ in 0..16 {
        let Some(error) = cause else { break };
        let _ = write!(text, ": {error}");
        cause = error.source();
    }
    text
}

/// Whether a character would move a terminal's cursor, begin a line, or turn the direction of writing.
fn is_unsafe(c: char) -> bool {
    c.is_control() || matches!(c, '\u{2028}' | '\u{2029}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

fn plain(text: &str, most: usize) -> Cow<'_, str> {
    // Bytes are never fewer than characters.
    if text.len() <= most && !text.contains(is_unsafe) {
        return Cow::Borrowed(text);
    }
    let mut told = String::new();
    for c in text.chars().take(most) {
        match is_unsafe(c) {
            true => told.extend(c.escape_default()),
            false => told.push(c),
        }
    }
    let left = text.chars().count().saturating_sub(most);
    if left > 0 {
        let _ = write!(told, "... ({left} more characters)");
    }
    Cow::Owned(told)
}

/// One field of an event or a span. The message comes first and has no name.
fn write_field(writer: &mut Writer<'_>, field: &Field, value: &dyn fmt::Debug) -> fmt::Result {
    let text = format!("{value:?}");
    let text = plain(&text, FIELD_CHARACTERS);
    match field.name() {
        "message" => writer.write_str(&text),
        name => write!(writer, "{name}={text}"),
    }
}

/// Writes events in JSON whose texts are made plain first.
struct Cleaned<M>(M);

impl<'a, M: MakeWriter<'a>> MakeWriter<'a> for Cleaned<M> {
    type Writer = Cleaned<M::Writer>;

    fn make_writer(&'a self) -> Self::Writer {
        Cleaned(self.0.make_writer())
    }
}

impl<W: io::Write> io::Write for Cleaned<W> {
    /// An event comes whole, in one call.
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let line = match serde_json::from_slice::<Value>(event) {
            Ok(mut value) => {
                clean(&mut value);
                value.to_string()
            }
            Err(_) => plain(&String::from_utf8_lossy(event), FIELD_CHARACTERS).into_owned(),
        };
        self.0.write_all(format!("{line}\n").as_bytes())?;
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

fn clean(value: &mut Value) {
    match value {
        Value::String(text) => {
            if let Cow::Owned(plain) = plain(text, FIELD_CHARACTERS) {
                *text = plain;
            }
        }
        Value::Array(items) => items.iter_mut().for_each(clean),
        Value::Object(members) => members.values_mut().for_each(clean),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    /// What is written is kept.
    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Kept {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Kept {
        fn line(&self) -> String {
            let text = String::from_utf8(std::mem::take(&mut *self.0.lock().unwrap())).unwrap();
            let line = text.strip_suffix('\n').expect("an event ends its line");
            assert!(!line.contains(is_unsafe) && line.len() < 8000, "{line:?}");
            line.to_owned()
        }
    }

    fn say_it() {
        let evil = "a\r\n\u{1b}[31mINFO fine\u{9b}2J\u{7f}\u{2028}\u{202e}";
        let span = tracing::info_span!("request", path = evil);
        let _in = span.enter();
        tracing::info!(error = %evil, long = "x".repeat(20_000), "{evil} was said");
    }

    #[test]
    fn no_control_character_reaches_a_log_and_no_field_is_endless() {
        let kept = Kept::default();
        let (text, json) = (kept.clone(), kept.clone());
        let fields = debug_fn(write_field).delimited(" ");
        let subscriber = tracing_subscriber::fmt().fmt_fields(fields).with_ansi(false).with_writer(move || text.clone());
        tracing::subscriber::with_default(subscriber.finish(), say_it);
        let line = kept.line();
        assert!(line.contains("request{path=") && line.contains("\\u{1b}[31mINFO") && line.contains("more characters"), "{line}");

        let subscriber = tracing_subscriber::fmt().json().with_writer(Cleaned(move || json.clone()));
        tracing::subscriber::with_default(subscriber.finish(), say_it);
        let event: Value = serde_json::from_str(&kept.line()).unwrap();
        assert!(event["fields"]["message"].as_str().unwrap().ends_with(" was said"), "{event}");
        assert!(event["fields"]["long"].as_str().unwrap().len() < FIELD_CHARACTERS + 50, "{event}");
        assert!(event["span"]["path"].as_str().unwrap().contains("\\u{1b}"), "{event}");
    }

    #[test]
    fn an_error_is_told_with_its_causes() {
        let inner = io::Error::other("invalid peer certificate: UnknownIssuer");
        assert_eq!(chain(&io::Error::other(inner)), "invalid peer certificate: UnknownIssuer");
        assert_eq!(foreign("short"), "short");
        assert!(foreign(&"é".repeat(300)).ends_with("(100 more characters)"));
    }
}
