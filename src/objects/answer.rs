//! What a store answered to a presigned PUT, and the likely cause where it refused.

use std::time::SystemTime;

use aws_sdk_s3::primitives::{DateTime, DateTimeFormat};
use reqwest::header::DATE;
use reqwest::{Response, StatusCode};

use super::Error;

/// The code of a refusal whose cause is that the clocks differ.
pub(crate) const CLOCK: &str = "ClockSkew";
/// Clocks this far apart explain a refusal. Stores allow 15 minutes, and end a URL by their own clock.
const CLOCK_SECONDS: i64 = 60;

/// A store's answer to a PUT.
pub(super) struct Answer {
    pub(super) status: StatusCode,
    /// S3's error code and message, where the body has them.
    code: Option<String>,
    message: Option<String>,
    /// How far our clock is ahead of the store's, in seconds, by its `Date`.
    ahead_seconds: Option<i64>,
}

impl Answer {
    pub(super) async fn read(response: Response) -> Self {
        let date = response.headers().get(DATE).and_then(|date| date.to_str().ok());
        let theirs = date.and_then(|date| DateTime::from_str(date, DateTimeFormat::HttpDate).ok());
        let ours = DateTime::from(SystemTime::now());
        let ahead_seconds = theirs.map(|theirs| ours.secs() - theirs.secs());
        let status = response.status();
        // A body that does not come is no reason to forget the status.
        let body = if status.is_success() { String::new() } else { response.text().await.unwrap_or_default() };
        Self { status, code: element(&body, "Code"), message: element(&body, "Message"), ahead_seconds }
    }

    /// Why an honest PUT into this bucket was refused.
    pub(super) fn refusal(&self, bucket: &str) -> Error {
        let code = self.code.clone().unwrap_or_else(|| format!("http-{}", self.status.as_u16()));
        let words = self.message.as_deref().map(|message| format!(": {message}")).unwrap_or_default();
        let message = format!("a presigned PUT to bucket {bucket} was answered {} {code}{words}", self.status.as_u16());
        if self.status.is_server_error() && self.status != StatusCode::NOT_IMPLEMENTED {
            return Error::Unavailable(message);
        }
        let off = self.ahead_seconds.filter(|seconds| seconds.abs() > CLOCK_SECONDS);
        match off {
            Some(seconds) if matches!(self.status, StatusCode::FORBIDDEN | StatusCode::BAD_REQUEST) => {
                let which = if seconds > 0 { "ahead" } else { "behind" };
                let seconds = grouped(seconds.unsigned_abs());
                let cause = format!("the clock differs from the store's by {seconds} s (ours is {which})");
                Error::Refused { code: CLOCK.to_owned(), message: format!("{cause}: {message}") }
            }
            _ if code == "NoSuchBucket" => Error::Refused { code, message: format!("bucket {bucket} does not exist: {message}") },
            _ => Error::Refused { code, message },
        }
    }
}

/// The text of an XML element without children.
fn element(body: &str, name: &str) -> Option<String> {
    let (_, rest) = body.split_once(&format!("<{name}>"))?;
    let (text, _) = rest.split_once(&format!("</{name}>"))?;
    // It goes into a log line.
    Some(text.chars().filter(|c| !c.is_control()).take(200).collect())
}

/// A number with commas between its thousands.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status: u16, code: &str, ahead_seconds: Option<i64>) -> Error {
        let status = StatusCode::from_u16(status).unwrap();
        Answer { status, code: Some(code.to_owned()), message: None, ahead_seconds }.refusal("b")
    }

    #[test]
    fn a_refused_put_names_the_clock_or_the_bucket_where_that_is_the_cause() {
        let named = |status, code, ahead| answer(status, code, ahead).to_string();
        let clock = named(403, "AccessDenied", Some(-1203));
        assert!(clock.contains("the clock differs from the store's by 1,203 s (ours is behind)"), "{clock}");
        assert!(!named(403, "SignatureDoesNotMatch", Some(1)).contains("clock"));
        assert!(named(404, "NoSuchBucket", None).contains("bucket b does not exist"));
        assert!(matches!(answer(503, "SlowDown", Some(-1203)), Error::Unavailable(_)));
        assert_eq!([0, 999, 1000, 1_234_567].map(grouped), ["0", "999", "1,000", "1,234,567"]);
        assert_eq!(element("<Error><Code>X</Code></Error>", "Code").as_deref(), Some("X"));
    }
}
