//! Logs: one event is always exactly one line.
//!
//! Some logged text comes from clients, tokens, S3 and Kafka. A line break or terminal escape code in it must not forge a log
//! line, and a long text must not fill the disk. So each field is escaped and truncated here, where it is written.

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

/// The longest field of a log line, in characters. The broker's longest own error has about 500.
const MAX_FIELD_CHARACTERS: usize = 1000;
/// The longest untrusted text in a log line, in characters: longer than any valid path, algorithm or key id.
const MAX_UNTRUSTED_CHARACTERS: usize = 200;

/// Starts logging to stderr: text lines, or JSON with `LFS_BROKER_LOG_FORMAT=json`. `RUST_LOG` filters the events.
pub(crate) fn init_logging(default: &str) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    // At debug level, the embedded S3's protocol layer logs whole requests with their signed URLs. It also logs every refused
    // request as an error, though the broker's probe is refused on purpose. The caller gets the error in the response.
    let filter = filter.add_directive("s3s=off".parse().expect("a valid directive"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter);
    match std::env::var("LFS_BROKER_LOG_FORMAT").as_deref() {
        Ok("json") => builder.json().with_writer(Sanitized(io::stderr)).init(),
        _ => {
            let fields = debug_fn(write_field).delimited(" ");
            let builder = builder.fmt_fields(fields).with_writer(io::stderr);
            builder.with_ansi(io::IsTerminal::is_terminal(&io::stderr())).init();
        }
    }
}

/// Untrusted text made safe for a log: control characters are escaped, and long text is truncated.
pub(crate) fn sanitize(text: &str) -> Cow<'_, str> {
    escape_and_truncate(text, MAX_UNTRUSTED_CHARACTERS)
}

/// An error and its causes in one line.
pub(crate) fn error_chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    // Real chains are much shorter than 16. The limit stops an endless chain.
    for _ in 0..16 {
        let Some(error) = cause else { break };
        let _ = write!(text, ": {error}");
        cause = error.source();
    }
    text
}

/// Whether a character would move a terminal's cursor, start a new line, or change the text direction.
fn is_unsafe(c: char) -> bool {
    c.is_control() || matches!(c, '\u{2028}' | '\u{2029}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

fn escape_and_truncate(text: &str, max_characters: usize) -> Cow<'_, str> {
    // A text never has more characters than bytes, so its length in bytes is a cheap first check.
    if text.len() <= max_characters && !text.contains(is_unsafe) {
        return Cow::Borrowed(text);
    }
    let mut escaped = String::new();
    for c in text.chars().take(max_characters) {
        match is_unsafe(c) {
            true => escaped.extend(c.escape_default()),
            false => escaped.push(c),
        }
    }
    let omitted = text.chars().count().saturating_sub(max_characters);
    if omitted > 0 {
        let _ = write!(escaped, "... ({omitted} more characters)");
    }
    Cow::Owned(escaped)
}

/// Writes one field of an event or a span. The message is written without its name.
fn write_field(writer: &mut Writer<'_>, field: &Field, value: &dyn fmt::Debug) -> fmt::Result {
    let text = format!("{value:?}");
    let text = escape_and_truncate(&text, MAX_FIELD_CHARACTERS);
    match field.name() {
        "message" => writer.write_str(&text),
        name => write!(writer, "{name}={text}"),
    }
}

/// Writes JSON events after escaping and truncating their texts.
struct Sanitized<M>(M);

impl<'a, M: MakeWriter<'a>> MakeWriter<'a> for Sanitized<M> {
    type Writer = Sanitized<M::Writer>;

    fn make_writer(&'a self) -> Self::Writer {
        Sanitized(self.0.make_writer())
    }
}

impl<W: io::Write> io::Write for Sanitized<W> {
    /// The JSON formatter passes each event in one call.
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let line = match serde_json::from_slice::<Value>(event) {
            Ok(mut value) => {
                sanitize_json(&mut value);
                value.to_string()
            }
            Err(_) => escape_and_truncate(&String::from_utf8_lossy(event), MAX_FIELD_CHARACTERS).into_owned(),
        };
        self.0.write_all(format!("{line}\n").as_bytes())?;
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

fn sanitize_json(value: &mut Value) {
    match value {
        Value::String(text) => {
            if let Cow::Owned(safe) = escape_and_truncate(text, MAX_FIELD_CHARACTERS) {
                *text = safe;
            }
        }
        Value::Array(items) => items.iter_mut().for_each(sanitize_json),
        Value::Object(members) => members.values_mut().for_each(sanitize_json),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    /// Captures the written log.
    #[derive(Clone, Default)]
    struct CapturedOutput(Arc<Mutex<Vec<u8>>>);

    impl io::Write for CapturedOutput {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl CapturedOutput {
        fn line(&self) -> String {
            let text = String::from_utf8(std::mem::take(&mut *self.0.lock().unwrap())).unwrap();
            let line = text.strip_suffix('\n').expect("an event ends with a line break");
            assert!(!line.contains(is_unsafe) && line.len() < 8000, "{line:?}");
            line.to_owned()
        }
    }

    fn log_hostile_text() {
        let evil = "a\r\n\u{1b}[31mINFO fine\u{9b}2J\u{7f}\u{2028}\u{202e}";
        let span = tracing::info_span!("request", path = evil);
        let _in = span.enter();
        tracing::info!(error = %evil, long = "x".repeat(20_000), "{evil} was logged");
    }

    #[test]
    fn log_fields_are_escaped_and_truncated() {
        let captured = CapturedOutput::default();
        let (text, json) = (captured.clone(), captured.clone());
        let fields = debug_fn(write_field).delimited(" ");
        let subscriber = tracing_subscriber::fmt().fmt_fields(fields).with_ansi(false).with_writer(move || text.clone());
        tracing::subscriber::with_default(subscriber.finish(), log_hostile_text);
        let line = captured.line();
        assert!(line.contains("request{path=") && line.contains("\\u{1b}[31mINFO") && line.contains("more characters"), "{line}");

        let subscriber = tracing_subscriber::fmt().json().with_writer(Sanitized(move || json.clone()));
        tracing::subscriber::with_default(subscriber.finish(), log_hostile_text);
        let event: Value = serde_json::from_str(&captured.line()).unwrap();
        assert!(event["fields"]["message"].as_str().unwrap().ends_with(" was logged"), "{event}");
        assert!(event["fields"]["long"].as_str().unwrap().len() < MAX_FIELD_CHARACTERS + 50, "{event}");
        assert!(event["span"]["path"].as_str().unwrap().contains("\\u{1b}"), "{event}");
    }

    #[test]
    fn an_error_is_written_with_its_causes() {
        let inner = io::Error::other("invalid peer certificate: UnknownIssuer");
        assert_eq!(error_chain(&io::Error::other(inner)), "invalid peer certificate: UnknownIssuer");
        assert_eq!(sanitize("short"), "short");
        assert!(sanitize(&"é".repeat(300)).ends_with("(100 more characters)"));
    }
}
