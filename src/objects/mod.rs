//! Objects: the only room that speaks S3.
//!
//! It hides two endpoints (the broker's own and the public one that URLs are signed for), two credentials, and
//! what the servers disagree on. It promises nothing by itself: a HEAD after the fact is the proof.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use aws_sdk_s3::Client;
use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::operation::head_object::HeadObjectOutput;
use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::{ChecksumMode, ChecksumType};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use lfs_broker_client::checksum::{Algorithm, Digest};
use time::OffsetDateTime;

use crate::failpoint::Struck;
use crate::session::Object;

mod answer;
mod connect;
mod download;
mod list;
mod lock;
mod multipart;
mod probe;
mod remove;
mod sign;
mod undeclared;

pub(crate) use answer::CLOCK;
pub use connect::Settings;
pub use list::{Behind, Listed, OpenUpload, Page};
pub use multipart::{Finish, Part};
pub use probe::{Capabilities, LONGEST_TRIAL};
pub use sign::{Put, Signed};
pub(crate) use undeclared::is_set_by_buckets;

use connect::{READING, patient};
use sign::Signer;
use undeclared::{Defaults, undeclared};

/// The metadata that names the session an object was written for (`x-amz-meta-` in front on the wire).
///
/// It is signed into every write, so an object that carries it was written through our own URL.
const TOKEN: &str = "lfs-upload-id";

/// A stream that brings no byte for this long is broken: S3 sends at once or not at all.
const STALLED: Duration = Duration::from_secs(30);

/// An object's address.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Place {
    /// The bucket.
    pub bucket: String,
    /// The key, without a leading slash.
    pub key: String,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.bucket, self.key)
    }
}

/// Why S3 did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No answer, or one that asks to come again: the outcome is unknown, and the same call may succeed later.
    #[error("s3 is unavailable: {0}")]
    Unavailable(String),
    /// An answer that will not change by asking again: permissions, a bucket that does not exist, the settings.
    #[error("s3 refused: {code}: {message}")]
    Refused {
        /// S3's error code.
        code: String,
        /// The call and S3's words.
        message: String,
    },
    /// The object is no longer the one that was looked at.
    #[error("the object changed: {0}")]
    Changed(String),
    /// Object Lock keeps the object: it cannot be deleted yet.
    #[error("object lock keeps the object {}", until.map_or_else(|| "by a legal hold".to_owned(), |until| format!("until {until}")))]
    Locked {
        /// When its retention ends; none where a legal hold has no end.
        until: Option<OffsetDateTime>,
    },
    /// A header would not be protected by the signature, so no URL is given out.
    #[error("a presigned URL signs {signed:?} but must sign {wanted:?}")]
    Unsigned {
        /// The headers that the signature covers.
        signed: Vec<String>,
        /// The headers that it must cover.
        wanted: Vec<String>,
    },
    /// The settings do not make a client.
    #[error("s3 settings: {0}")]
    Settings(String),
}

impl Error {
    /// Whether the store answered, and the answer was no: asking again helps once somebody has changed something.
    pub(crate) fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused { .. } | Self::Settings(_) | Self::Unsigned { .. })
    }
}

impl From<Struck> for Error {
    /// As when S3's answer is lost.
    fn from(struck: Struck) -> Self {
        Self::Unavailable(struck.to_string())
    }
}

/// A handle on the store; clones share one connection pool.
#[derive(Clone)]
pub struct Objects(Arc<Inner>);

struct Inner {
    /// The broker's own calls, on its own endpoint.
    calls: Client,
    /// PUT URLs for the public endpoint, by the write-only credential where there is one.
    uploads: Signer,
    /// GET URLs for the public endpoint, by the broker's credential: a write-only one may not read.
    downloads: Signer,
    /// PUT URLs for the broker's own endpoint: the probe's way in where the public one is out of its reach.
    inside: Signer,
    bucket: Option<String>,
    /// What buckets set on every object by themselves.
    defaults: Defaults,
}

impl fmt::Debug for Objects {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Objects").field("bucket", &self.0.bucket).finish_non_exhaustive()
    }
}

impl Objects {
    /// The bucket of topics that name none.
    pub fn default_bucket(&self) -> Option<&str> {
        self.0.bucket.as_deref()
    }

    /// What S3 holds at a place; none where it holds nothing.
    ///
    /// # Errors
    /// Where S3 does not answer, or refuses: without `s3:ListBucket` it refuses instead of saying "nothing".
    pub async fn head(&self, place: &Place, version_id: Option<&str>) -> Result<Option<Object>, Error> {
        let answer = self
            .0
            .calls
            .head_object()
            .bucket(&place.bucket)
            .key(&place.key)
            .set_version_id(version_id.map(str::to_owned))
            .checksum_mode(ChecksumMode::Enabled)
            .send()
            .await;
        match answer {
            Ok(output) => {
                let found = found(&output);
                let undeclared = self.0.defaults.subtract(&place.bucket, found.undeclared);
                Ok(Some(Object { undeclared, ..found }))
            }
            Err(error) if status(&error) == Some(404) => Ok(None),
            // A version that cannot be, or one that says "deleted"; unless S3 dislikes more than the version.
            Err(error) if version_id.is_some() && matches!(status(&error), Some(400 | 405)) => {
                Box::pin(self.head(place, None)).await.map(|_| None)
            }
            Err(error) => Err(failed("HeadObject", &error)),
        }
    }

    /// The same for a place that somebody else named: under a name that this store cannot have it holds nothing.
    ///
    /// # Errors
    /// As [`Self::head`].
    pub async fn head_of_pointer(&self, place: &Place, version_id: Option<&str>) -> Result<Option<Object>, Error> {
        match self.head(place, version_id).await {
            // A HEAD has no body that would tell more. Where the bucket answers, the key is what the store dislikes.
            Err(Error::Refused { code, message }) if code == "http-400" => {
                match self.0.calls.head_bucket().bucket(&place.bucket).send().await {
                    Ok(_) => Ok(None),
                    Err(_) => Err(Error::Refused { code, message }),
                }
            }
            answer => answer,
        }
    }

    /// Begins to read an object, which must still have this entity tag.
    ///
    /// # Errors
    /// [`Error::Changed`] where the object is another or gone.
    pub async fn read(&self, place: &Place, etag: Option<&str>, version_id: Option<&str>) -> Result<Reading, Error> {
        let answer = self
            .0
            .calls
            .get_object()
            .bucket(&place.bucket)
            .key(&place.key)
            .set_if_match(etag.map(str::to_owned))
            .set_version_id(version_id.map(str::to_owned))
            .customize()
            .config_override(patient(READING))
            .send()
            .await;
        match answer {
            Ok(output) => Ok(Reading { body: output.body, longest_pause: STALLED }),
            Err(error) if matches!(status(&error), Some(404 | 412)) => {
                Err(Error::Changed(format!("GetObject: {}", words(&error))))
            }
            Err(error) => Err(failed("GetObject", &error)),
        }
    }
}

/// The bytes of an object as they arrive.
pub struct Reading {
    body: ByteStream,
    longest_pause: Duration,
}

impl fmt::Debug for Reading {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reading").finish_non_exhaustive()
    }
}

impl Reading {
    /// The next piece; none at the end.
    ///
    /// # Errors
    /// Where the stream breaks, ends early or stalls: begin again.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        match tokio::time::timeout(self.longest_pause, self.body.try_next()).await {
            Ok(Ok(piece)) => Ok(piece),
            Ok(Err(error)) => Err(Error::Unavailable(format!("GetObject: {}", chain(&error)))),
            Err(_) => Err(Error::Unavailable(format!("GetObject: no byte for {} ms", self.longest_pause.as_millis()))),
        }
    }
}

/// Reads what HEAD says. A SHA-256 counts as the whole's only where nothing marks it as composite: some stores
/// leave the type out, but every composite ends in `-<parts>`.
fn found(output: &HeadObjectOutput) -> Object {
    let composite = matches!(output.checksum_type(), Some(ChecksumType::Composite));
    let whole = |text: Option<&str>, algorithm: Algorithm| match text {
        Some(text) if !composite => digest(text, algorithm),
        _ => None,
    };
    let checksums = [
        whole(output.checksum_crc64_nvme(), Algorithm::Crc64nvme),
        whole(output.checksum_crc32_c(), Algorithm::Crc32c),
        whole(output.checksum_crc32(), Algorithm::Crc32),
    ];
    Object {
        size_bytes: output.content_length().and_then(|bytes| u64::try_from(bytes).ok()).unwrap_or(0),
        token: output.metadata().and_then(|metadata| metadata.get(TOKEN)).cloned(),
        etag: output.e_tag().map(str::to_owned),
        // "null" is what a bucket without versions, or one that stopped to keep them, calls its only one.
        version_id: output.version_id().filter(|id| *id != "null").map(str::to_owned),
        sha256: whole(output.checksum_sha256(), Algorithm::Sha256).and_then(|digest| digest.sha256()),
        composite_sha256: output.checksum_sha256().filter(|text| text.contains('-')).map(str::to_owned),
        checksums: checksums.into_iter().flatten().collect(),
        undeclared: undeclared(output),
    }
}

/// The digest in one of S3's headers; none where it is not one of this algorithm (a composite has a count behind it).
fn digest(text: &str, algorithm: Algorithm) -> Option<Digest> {
    let value = BASE64.decode(text).ok()?;
    (value.len() == algorithm.digest_bytes()).then_some(Digest { algorithm, value })
}

/// Codes of answers below 500 that ask to come again.
const PASSING: [&str; 10] = [
    // CompleteMultipartUpload sends 200 before it knows, and then these.
    "InternalError",
    "ServiceUnavailable",
    "SlowDown",
    "RequestTimeout",
    "Throttling",
    "TooManyRequests",
    // The credentials are renewed before the next call.
    "ExpiredToken",
    "TokenRefreshRequired",
    // Two conditional writes met; the next HEAD tells who won.
    "ConditionalRequestConflict",
    "OperationAborted",
];

/// The HTTP status of an answer that is an error.
fn status<E>(error: &SdkError<E, HttpResponse>) -> Option<u16> {
    error.raw_response().map(|response| response.status().as_u16())
}

/// S3's error code; a HEAD has no body to carry one, so its status speaks.
fn code<E: ProvideErrorMetadata>(error: &SdkError<E, HttpResponse>) -> String {
    match (error.code(), status(error)) {
        (Some("NotFound") | None, Some(404)) => "NotFound".to_owned(),
        (Some(code), _) => code.to_owned(),
        (None, Some(403)) => "AccessDenied".to_owned(),
        (None, Some(status)) => format!("http-{status}"),
        (None, None) => "unknown".to_owned(),
    }
}

/// S3's code and words in one line.
fn words<E: ProvideErrorMetadata>(error: &SdkError<E, HttpResponse>) -> String {
    match error.message() {
        Some(message) => format!("{}: {message}", code(error)),
        None => code(error),
    }
}

/// Sorts a failed call into what may pass and what will not.
fn failed<E>(call: &str, error: &SdkError<E, HttpResponse>) -> Error
where
    E: ProvideErrorMetadata + std::error::Error + 'static,
{
    match error {
        SdkError::ServiceError(_) => {
            let (status, code) = (status(error).unwrap_or(0), code(error));
            // 501 is a store that lacks the call.
            if (status >= 500 && status != 501) || status == 429 || PASSING.contains(&code.as_str()) {
                return Error::Unavailable(format!("{call}: {}", words(error)));
            }
            let message = error.message().map_or_else(|| format!("HTTP status {status}"), str::to_owned);
            Error::Refused { code, message: format!("{call}: {message}") }
        }
        SdkError::TimeoutError(_) => Error::Unavailable(format!("{call}: no answer in time")),
        SdkError::ConstructionFailure(_) => Error::Settings(format!("{call}: {}", chain(error))),
        _ => Error::Unavailable(format!("{call}: {}", chain(error))),
    }
}

/// The error and its causes in one line. Only their words: the SDK's debug form would show requests and their URLs.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    // Sixteen is far more than a chain has; the bound is for one that never ends.
    for _ in 0..16 {
        let Some(error) = cause else { break };
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use lfs_broker_client::checksum::Sha256;

    use super::*;

    fn answer(sha256: &str, kind: Option<ChecksumType>) -> Object {
        found(&HeadObjectOutput::builder().content_length(5).checksum_sha256(sha256).set_checksum_type(kind).build())
    }

    #[test]
    fn a_composite_is_never_taken_for_the_whole() {
        let (digest, composite) = (Sha256::of(b"x"), format!("{}-1", Sha256::of(b"x").base64()));
        assert_eq!(answer(&digest.base64(), None).sha256, Some(digest), "a store that states no type");
        assert_eq!(answer(&digest.base64(), Some(ChecksumType::FullObject)).sha256, Some(digest));
        assert_eq!(answer(&digest.base64(), Some(ChecksumType::Composite)).sha256, None);
        for kind in [None, Some(ChecksumType::Composite), Some(ChecksumType::FullObject)] {
            let found = answer(&composite, kind);
            assert_eq!((found.sha256, found.composite_sha256.as_ref()), (None, Some(&composite)));
        }
    }

    #[test]
    fn crcs_of_the_whole_are_found_and_composite_ones_are_not() {
        let head = |kind| {
            let output = HeadObjectOutput::builder().checksum_crc32("y/Q5Jg==").checksum_crc64_nvme("rosUhgp5mIg=");
            found(&output.checksum_type(kind).build()).checksums
        };
        let hex: Vec<_> = head(ChecksumType::FullObject).iter().map(|digest| format!("{digest:?}")).collect();
        assert_eq!(hex, ["crc64nvme:ae8b14860a799888", "crc32:cbf43926"]);
        assert_eq!(head(ChecksumType::Composite), []);
    }

    #[tokio::test]
    async fn a_stream_that_stalls_is_an_error() {
        use futures_util::{StreamExt as _, stream};
        let first = stream::iter([Ok::<_, std::io::Error>(Bytes::from_static(b"hello"))]);
        let body = reqwest::Body::wrap_stream(first.chain(stream::pending()));
        let body = ByteStream::new(aws_sdk_s3::primitives::SdkBody::from_body_1_x(body));
        let mut reading = Reading { body, longest_pause: Duration::from_millis(20) };
        assert_eq!(reading.next().await, Ok(Some(Bytes::from_static(b"hello"))));
        assert!(matches!(reading.next().await, Err(Error::Unavailable(_))));
    }

    #[tokio::test]
    async fn a_key_that_the_store_cannot_have_holds_nothing() {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        // MinIO answers so to a key with a backslash.
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut request = [0; 4096];
                let read = stream.read(&mut request).await.unwrap_or(0);
                let request = String::from_utf8_lossy(&request[..read]).into_owned();
                let is_bad = request.contains("%5C") || request.starts_with("HEAD /closed");
                let status = if is_bad { "400 Bad Request" } else { "200 OK" };
                let answer = format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
                let _ = stream.write_all(answer.as_bytes()).await;
            }
        });
        let text = |text: &str| Some(text.to_owned());
        let settings = Settings {
            endpoint: Some(endpoint),
            region: text("us-east-1"),
            access_key_id: text("a"),
            secret_access_key: text("b"),
            ..Settings::default()
        };
        let objects = Objects::connect(&settings).await.unwrap();
        let place = |bucket: &str, key: &str| Place { bucket: bucket.to_owned(), key: key.to_owned() };
        assert_eq!(objects.head_of_pointer(&place("bucket", r"a\b"), None).await, Ok(None));
        assert!(objects.head_of_pointer(&place("bucket", "ab"), None).await.is_ok_and(|found| found.is_some()));
        let closed = objects.head_of_pointer(&place("closed", "ab"), None).await;
        assert!(matches!(closed, Err(Error::Refused { .. })), "{closed:?}");
    }

    #[test]
    fn the_null_version_is_no_version() {
        let version = |id: &str| found(&HeadObjectOutput::builder().version_id(id).build()).version_id;
        assert_eq!(version("null"), None);
        assert_eq!(version("v1").as_deref(), Some("v1"));
    }
}
