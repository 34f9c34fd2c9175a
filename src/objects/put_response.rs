//! The response of a store to a presigned PUT, and the likely cause of a refusal.

use std::time::SystemTime;

use aws_sdk_s3::primitives::{DateTime, DateTimeFormat};
use reqwest::header::DATE;
use reqwest::{Response, StatusCode};

use super::Error;

/// The code of [`Error::Refused`] for a refusal that different clocks cause.
pub(crate) const CLOCK_SKEW: &str = "ClockSkew";
/// S3's error code for a bucket that does not exist.
const NO_SUCH_BUCKET: &str = "NoSuchBucket";
/// A larger difference of the clocks counts as the cause of a refusal. Stores allow 15 minutes, but a URL expires by the
/// store's clock.
const MAX_CLOCK_SKEW_SECONDS: i64 = 60;

/// The response of a store to a PUT.
pub(super) struct PutResponse {
    pub(super) status: StatusCode,
    /// S3's error code and message, if the body contains them.
    code: Option<String>,
    message: Option<String>,
    /// Scheme, host and port of the store that answered.
    endpoint: String,
    /// By how many seconds the broker's clock is ahead of the `Date` header of the response.
    clock_ahead_seconds: Option<i64>,
}

impl PutResponse {
    pub(super) async fn read(response: Response) -> Self {
        let date = response.headers().get(DATE).and_then(|date| date.to_str().ok());
        let store_time = date.and_then(|date| DateTime::from_str(date, DateTimeFormat::HttpDate).ok());
        let now = DateTime::from(SystemTime::now());
        let clock_ahead_seconds = store_time.map(|store_time| now.secs() - store_time.secs());
        let status = response.status();
        let endpoint = response.url().origin().ascii_serialization();
        // If the body cannot be read, the status is still useful.
        let body = if status.is_success() { String::new() } else { response.text().await.unwrap_or_default() };
        Self { status, code: xml_element(&body, "Code"), message: xml_element(&body, "Message"), endpoint, clock_ahead_seconds }
    }

    /// The reason why the store refused a valid PUT into this bucket.
    pub(super) fn to_error(&self, bucket: &str) -> Error {
        let code = self.code.clone().unwrap_or_else(|| format!("http-{}", self.status.as_u16()));
        let detail = self.message.as_deref().map(|message| format!(": {message}")).unwrap_or_default();
        let message = format!("a presigned PUT to bucket {bucket} was answered {} {code}{detail}", self.status.as_u16());
        if self.status.is_server_error() && self.status != StatusCode::NOT_IMPLEMENTED {
            return Error::Unavailable(message);
        }
        let skew_seconds = self.clock_ahead_seconds.filter(|seconds| seconds.abs() > MAX_CLOCK_SKEW_SECONDS);
        match skew_seconds {
            Some(seconds) if matches!(self.status, StatusCode::FORBIDDEN | StatusCode::BAD_REQUEST) => {
                let direction = if seconds > 0 { "ahead" } else { "behind" };
                let seconds = with_thousands_separators(seconds.unsigned_abs());
                let cause = format!("the clock differs from the store's by {seconds} s (ours is {direction})");
                Error::Refused { code: CLOCK_SKEW.to_owned(), message: format!("{cause}: {message}") }
            }
            _ if code == NO_SUCH_BUCKET => {
                Error::Refused { code, message: format!("bucket {bucket} does not exist at {}", self.endpoint) }
            }
            // Some stores send no error document. A PUT to an existing bucket is never answered with 404.
            _ if self.code.is_none() && self.status == StatusCode::NOT_FOUND => {
                let message = format!("bucket {bucket} does not exist at {}, or that is not an S3 store", self.endpoint);
                Error::Refused { code: NO_SUCH_BUCKET.to_owned(), message }
            }
            _ => Error::Refused { code, message },
        }
    }
}

/// The text of an XML element without children.
fn xml_element(body: &str, name: &str) -> Option<String> {
    let (_, rest) = body.split_once(&format!("<{name}>"))?;
    let (text, _) = rest.split_once(&format!("</{name}>"))?;
    // The text goes into one log line.
    Some(text.chars().filter(|c| !c.is_control()).take(200).collect())
}

/// A number with a comma between each group of three digits.
fn with_thousands_separators(number: u64) -> String {
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

    fn error(status: u16, code: &str, clock_ahead_seconds: Option<i64>) -> Error {
        let status = StatusCode::from_u16(status).unwrap();
        let code = Some(code.to_owned()).filter(|code| !code.is_empty());
        PutResponse { status, code, message: None, endpoint: "http://s3:9000".to_owned(), clock_ahead_seconds }.to_error("b")
    }

    #[test]
    fn a_refused_put_names_the_clock_or_the_missing_bucket_as_its_cause() {
        let text = |status, code, clock_ahead_seconds| error(status, code, clock_ahead_seconds).to_string();
        let clock = text(403, "AccessDenied", Some(-1203));
        assert!(clock.contains("the clock differs from the store's by 1,203 s (ours is behind)"), "{clock}");
        assert!(!text(403, "SignatureDoesNotMatch", Some(1)).contains("clock"));
        assert_eq!(text(404, "NoSuchBucket", None), "s3 refused: NoSuchBucket: bucket b does not exist at http://s3:9000");
        assert!(text(404, "", None).contains("bucket b does not exist at http://s3:9000"), "{}", text(404, "", None));
        assert!(matches!(error(503, "SlowDown", Some(-1203)), Error::Unavailable(_)));
        assert_eq!([0, 999, 1000, 1_234_567].map(with_thousands_separators), ["0", "999", "1,000", "1,234,567"]);
        assert_eq!(xml_element("<Error><Code>X</Code></Error>", "Code").as_deref(), Some("X"));
    }
}
