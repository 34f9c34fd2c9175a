//! Object storage: the only module that speaks S3.
//!
//! It hides two endpoints (the broker's own, and the public one that URLs are signed for), two credentials, and the
//! differences between S3 stores. A response to a write proves nothing here: the caller verifies with a HEAD afterwards.

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

use crate::failpoint::InjectedError;
use crate::session::{Object, Session};
use crate::telemetry::error_chain;

mod connect;
mod download;
mod list;
mod lock;
mod multipart;
mod presign;
mod probe;
mod put_response;
mod remove;
mod undeclared;

pub use connect::Settings;
pub use list::{ListedObject, OpenMultipartUpload, Page, UploadMarker};
pub use multipart::{CompleteOutcome, Part};
pub use presign::{NewObject, PresignedUrl};
pub use probe::{Capabilities, PROBE_TIMEOUT};
pub(crate) use put_response::CLOCK_SKEW;
pub(crate) use undeclared::is_bucket_default_header;

use connect::{CallTimeouts, timeout_override};
use presign::Signer;
use undeclared::{BucketDefaults, undeclared};

/// The metadata key of the write token, which is the id of the upload that the object belongs to. HTTP adds the
/// prefix `x-amz-meta-`.
///
/// Every presigned write signs it, so an object with this token was written through a URL of this broker.
const TOKEN_KEY: &str = "lfs-upload-id";

/// Why nothing can be uploaded while no bucket is known.
pub(crate) const NO_BUCKET: &str = "no bucket is configured: set LFS_BROKER_S3_BUCKET, or `bucket` in a topic's policy";

/// A stream without a byte for this long is broken: a working S3 store sends data within milliseconds.
const STREAM_IDLE_TIMEOUT: Duration = Duration::from_secs(30);

/// The bucket and key of an object.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ObjectLocation {
    /// The bucket.
    pub bucket: String,
    /// The key, without a leading slash.
    pub key: String,
}

impl ObjectLocation {
    /// The location of a session's object.
    pub(crate) fn of(session: &Session) -> Self {
        Self { bucket: session.bucket.clone(), key: session.object_key.clone() }
    }
}

impl fmt::Display for ObjectLocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.bucket, self.key)
    }
}

/// Why a call to S3 failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No response, or a response that asks for a retry. The outcome is unknown, and the same call may succeed later.
    #[error("s3 is unavailable: {0}")]
    Unavailable(String),
    /// A final answer that a retry does not change: permissions, a bucket that does not exist, the settings.
    #[error("s3 refused: {code}: {message}")]
    Refused {
        /// S3's error code.
        code: String,
        /// The S3 operation and S3's message.
        message: String,
    },
    /// The object is no longer the one that an earlier call found.
    #[error("the object changed: {0}")]
    Changed(String),
    /// Object Lock retains the object, so it cannot be deleted yet.
    #[error("object lock retains the object {}", until.map_or_else(|| "by a legal hold".to_owned(), |until| format!("until {until}")))]
    Locked {
        /// When the retention ends; `None` for a legal hold, which has no end.
        until: Option<OffsetDateTime>,
    },
    /// The settings are not valid for an S3 client.
    #[error("s3 settings: {0}")]
    Settings(String),
}

impl Error {
    /// Whether the store's response is final: a retry helps only after an operator has changed something.
    pub(crate) fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused { .. } | Self::Settings(_))
    }
}

impl From<InjectedError> for Error {
    /// A failpoint acts like a lost response of S3.
    fn from(error: InjectedError) -> Self {
        Self::Unavailable(error.to_string())
    }
}

/// A client of the S3 store; clones share one connection pool.
#[derive(Clone)]
pub struct Objects(Arc<Inner>);

struct Inner {
    /// Sends the broker's own calls to the broker's own endpoint.
    client: Client,
    /// Signs PUT URLs for the public endpoint, with the write-only credential if one is set.
    upload_signer: Signer,
    /// Signs GET URLs for the public endpoint with the broker's credential, because a write-only credential cannot read.
    download_signer: Signer,
    /// Signs PUT URLs for the broker's own endpoint. The probe uses them if it cannot reach the public endpoint.
    internal_upload_signer: Signer,
    /// The broker's own endpoint, for errors.
    endpoint: String,
    bucket: Option<String>,
    /// The headers that buckets set on every object.
    bucket_defaults: BucketDefaults,
}

impl fmt::Debug for Objects {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Objects").field("bucket", &self.0.bucket).finish_non_exhaustive()
    }
}

impl Objects {
    /// The bucket of topics whose policy names no bucket.
    pub fn default_bucket(&self) -> Option<&str> {
        self.0.bucket.as_deref()
    }

    /// What S3 holds at a location; `None` if there is no object.
    ///
    /// # Errors
    /// If S3 does not answer or refuses. Without `s3:ListBucket` S3 answers 403 for a missing object.
    pub async fn head(&self, location: &ObjectLocation, version_id: Option<&str>) -> Result<Option<Object>, Error> {
        let result = self
            .0
            .client
            .head_object()
            .bucket(&location.bucket)
            .key(&location.key)
            .set_version_id(version_id.map(str::to_owned))
            .checksum_mode(ChecksumMode::Enabled)
            .send()
            .await;
        match result {
            Ok(output) => {
                let object = object_from_head(&output);
                let undeclared_headers = self.0.bucket_defaults.without_defaults(&location.bucket, object.undeclared_headers);
                Ok(Some(Object { undeclared_headers, ..object }))
            }
            Err(error) if http_status(&error) == Some(404) => Ok(None),
            // The version id is malformed (400) or names a delete marker (405). The call without a version shows other
            // errors, for example a bad bucket name.
            Err(error) if version_id.is_some() && matches!(http_status(&error), Some(400 | 405)) => {
                Box::pin(self.head(location, None)).await.map(|_| None)
            }
            Err(error) => Err(call_error("HeadObject", &error)),
        }
    }

    /// As [`Self::head`], for a location that a client sent in a pointer. A key that the store rejects counts as no object.
    ///
    /// # Errors
    /// As [`Self::head`].
    pub async fn head_pointer_target(
        &self,
        location: &ObjectLocation,
        version_id: Option<&str>,
    ) -> Result<Option<Object>, Error> {
        match self.head(location, version_id).await {
            // A HEAD response has no body with a reason. If HeadBucket succeeds, the key is the cause.
            Err(Error::Refused { code, message }) if code == "http-400" => {
                match self.0.client.head_bucket().bucket(&location.bucket).send().await {
                    Ok(_) => Ok(None),
                    Err(_) => Err(Error::Refused { code, message }),
                }
            }
            result => result,
        }
    }

    /// Starts to read an object, which must still have this ETag.
    ///
    /// # Errors
    /// [`Error::Changed`] if the object was replaced or deleted.
    pub async fn read(
        &self,
        location: &ObjectLocation,
        etag: Option<&str>,
        version_id: Option<&str>,
    ) -> Result<ObjectReader, Error> {
        let result = self
            .0
            .client
            .get_object()
            .bucket(&location.bucket)
            .key(&location.key)
            .set_if_match(etag.map(str::to_owned))
            .set_version_id(version_id.map(str::to_owned))
            .customize()
            .config_override(timeout_override(CallTimeouts::READ))
            .send()
            .await;
        match result {
            Ok(output) => Ok(ObjectReader { body: output.body, idle_timeout: STREAM_IDLE_TIMEOUT }),
            Err(error) if matches!(http_status(&error), Some(404 | 412)) => {
                Err(Error::Changed(format!("GetObject: {}", code_and_message(&error))))
            }
            Err(error) => Err(call_error("GetObject", &error)),
        }
    }
}

/// The bytes of an object as they arrive.
pub struct ObjectReader {
    body: ByteStream,
    idle_timeout: Duration,
}

impl fmt::Debug for ObjectReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ObjectReader").finish_non_exhaustive()
    }
}

impl ObjectReader {
    /// The next chunk; `None` at the end.
    ///
    /// # Errors
    /// If the stream breaks, ends early or stalls. The caller must read again from the start.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        match tokio::time::timeout(self.idle_timeout, self.body.try_next()).await {
            Ok(Ok(chunk)) => Ok(chunk),
            Ok(Err(error)) => Err(Error::Unavailable(format!("GetObject: {}", error_chain(&error)))),
            Err(_) => {
                Err(Error::Unavailable(format!("GetObject: the stream sent no byte for {} ms", self.idle_timeout.as_millis())))
            }
        }
    }
}

/// The object that a HEAD response describes. A checksum covers the whole object only if it is not a composite. Some
/// stores omit the checksum type, but every composite value ends in `-<parts>`, which [`parse_digest`] rejects.
fn object_from_head(output: &HeadObjectOutput) -> Object {
    let is_composite = matches!(output.checksum_type(), Some(ChecksumType::Composite));
    let full_object = |text: Option<&str>, algorithm: Algorithm| match text {
        Some(text) if !is_composite => parse_digest(text, algorithm),
        _ => None,
    };
    let checksums = [
        full_object(output.checksum_crc64_nvme(), Algorithm::Crc64nvme),
        full_object(output.checksum_crc32_c(), Algorithm::Crc32c),
        full_object(output.checksum_crc32(), Algorithm::Crc32),
    ];
    Object {
        size_bytes: output.content_length().and_then(|bytes| u64::try_from(bytes).ok()).unwrap_or(0),
        token: output.metadata().and_then(|metadata| metadata.get(TOKEN_KEY)).cloned(),
        etag: output.e_tag().map(str::to_owned),
        // A bucket without versioning, or with suspended versioning, reports its only version as "null".
        version_id: output.version_id().filter(|id| *id != "null").map(str::to_owned),
        sha256: full_object(output.checksum_sha256(), Algorithm::Sha256).and_then(|digest| digest.sha256()),
        composite_sha256: output.checksum_sha256().filter(|text| text.contains('-')).map(str::to_owned),
        checksums: checksums.into_iter().flatten().collect(),
        undeclared_headers: undeclared(output),
    }
}

/// The digest in an S3 checksum header; `None` if the value has another form. A composite value ends in `-<parts>`.
fn parse_digest(text: &str, algorithm: Algorithm) -> Option<Digest> {
    let value = BASE64.decode(text).ok()?;
    (value.len() == algorithm.digest_bytes()).then_some(Digest { algorithm, value })
}

/// Error codes with a status below 500 that are worth a retry.
const TRANSIENT_CODES: [&str; 10] = [
    // CompleteMultipartUpload can send status 200 first and then one of these codes in the body.
    "InternalError",
    "ServiceUnavailable",
    "SlowDown",
    "RequestTimeout",
    "Throttling",
    "TooManyRequests",
    // The SDK renews the credentials before the next call.
    "ExpiredToken",
    "TokenRefreshRequired",
    // Two conditional writes ran at the same time; the next HEAD shows which of them succeeded.
    "ConditionalRequestConflict",
    "OperationAborted",
];

/// The HTTP status of an error response.
fn http_status<E>(error: &SdkError<E, HttpResponse>) -> Option<u16> {
    error.raw_response().map(|response| response.status().as_u16())
}

/// S3's error code. A HEAD response has no body with a code, so the code follows from the status.
fn error_code<E: ProvideErrorMetadata>(error: &SdkError<E, HttpResponse>) -> String {
    match (error.code(), http_status(error)) {
        (Some("NotFound") | None, Some(404)) => "NotFound".to_owned(),
        (Some(code), _) => code.to_owned(),
        (None, Some(403)) => "AccessDenied".to_owned(),
        (None, Some(status)) => format!("http-{status}"),
        (None, None) => "unknown".to_owned(),
    }
}

/// S3's code and message in one line.
fn code_and_message<E: ProvideErrorMetadata>(error: &SdkError<E, HttpResponse>) -> String {
    match error.message() {
        Some(message) => format!("{}: {message}", error_code(error)),
        None => error_code(error),
    }
}

/// Whether the store does not implement this operation.
fn is_unsupported<E: ProvideErrorMetadata>(error: &SdkError<E, HttpResponse>) -> bool {
    matches!(http_status(error), Some(405 | 501)) || matches!(error_code(error).as_str(), "NotImplemented" | "MethodNotAllowed")
}

/// Classifies a failed call: a retry may help ([`Error::Unavailable`]) or cannot help (the other variants). The SDK's debug
/// output is not used, because it contains requests and their URLs.
fn call_error<E>(operation: &str, error: &SdkError<E, HttpResponse>) -> Error
where
    E: ProvideErrorMetadata + std::error::Error + 'static,
{
    match error {
        SdkError::ServiceError(_) => {
            let (status, code) = (http_status(error).unwrap_or(0), error_code(error));
            // 501 means that the store does not implement the operation, so a retry cannot help.
            if (status >= 500 && status != 501) || status == 429 || TRANSIENT_CODES.contains(&code.as_str()) {
                return Error::Unavailable(format!("{operation}: {}", code_and_message(error)));
            }
            let message = error.message().map_or_else(|| format!("HTTP status {status}"), str::to_owned);
            Error::Refused { code, message: format!("{operation}: {message}") }
        }
        SdkError::TimeoutError(_) => Error::Unavailable(format!("{operation}: no answer before the timeout")),
        SdkError::ConstructionFailure(_) => Error::Settings(format!("{operation}: {}", error_chain(error))),
        _ => Error::Unavailable(format!("{operation}: {}", error_chain(error))),
    }
}

#[cfg(test)]
mod tests {
    use lfs_broker_client::checksum::Sha256;

    use super::*;

    fn object(sha256: &str, kind: Option<ChecksumType>) -> Object {
        object_from_head(&HeadObjectOutput::builder().content_length(5).checksum_sha256(sha256).set_checksum_type(kind).build())
    }

    #[test]
    fn a_composite_checksum_never_counts_as_the_checksum_of_the_whole_object() {
        let (digest, composite) = (Sha256::of(b"x"), format!("{}-1", Sha256::of(b"x").base64()));
        assert_eq!(object(&digest.base64(), None).sha256, Some(digest), "a store that sends no checksum type");
        assert_eq!(object(&digest.base64(), Some(ChecksumType::FullObject)).sha256, Some(digest));
        assert_eq!(object(&digest.base64(), Some(ChecksumType::Composite)).sha256, None);
        for kind in [None, Some(ChecksumType::Composite), Some(ChecksumType::FullObject)] {
            let object = object(&composite, kind);
            assert_eq!((object.sha256, object.composite_sha256.as_ref()), (None, Some(&composite)));
        }
    }

    #[test]
    fn crcs_of_the_whole_object_are_read_and_composite_crcs_are_not() {
        let head = |kind| {
            let output = HeadObjectOutput::builder().checksum_crc32("y/Q5Jg==").checksum_crc64_nvme("rosUhgp5mIg=");
            object_from_head(&output.checksum_type(kind).build()).checksums
        };
        let hex: Vec<_> = head(ChecksumType::FullObject).iter().map(|digest| format!("{digest:?}")).collect();
        assert_eq!(hex, ["crc64nvme:ae8b14860a799888", "crc32:cbf43926"]);
        assert_eq!(head(ChecksumType::Composite), []);
    }

    #[tokio::test]
    async fn a_stream_that_stalls_returns_an_error() {
        use futures_util::{StreamExt as _, stream};
        let first = stream::iter([Ok::<_, std::io::Error>(Bytes::from_static(b"hello"))]);
        let body = reqwest::Body::wrap_stream(first.chain(stream::pending()));
        let body = ByteStream::new(aws_sdk_s3::primitives::SdkBody::from_body_1_x(body));
        let mut reader = ObjectReader { body, idle_timeout: Duration::from_millis(20) };
        assert_eq!(reader.next().await, Ok(Some(Bytes::from_static(b"hello"))));
        assert!(matches!(reader.next().await, Err(Error::Unavailable(_))));
    }

    #[tokio::test]
    async fn a_key_that_the_store_rejects_counts_as_no_object() {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        // MinIO answers 400 to a key with a backslash.
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut request = [0; 4096];
                let read = stream.read(&mut request).await.unwrap_or(0);
                let request = String::from_utf8_lossy(&request[..read]).into_owned();
                let is_rejected = request.contains("%5C") || request.starts_with("HEAD /closed");
                let status = if is_rejected { "400 Bad Request" } else { "200 OK" };
                let response = format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
                let _ = stream.write_all(response.as_bytes()).await;
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
        let location = |bucket: &str, key: &str| ObjectLocation { bucket: bucket.to_owned(), key: key.to_owned() };
        assert_eq!(objects.head_pointer_target(&location("bucket", r"a\b"), None).await, Ok(None));
        assert!(objects.head_pointer_target(&location("bucket", "ab"), None).await.is_ok_and(|found| found.is_some()));
        let closed = objects.head_pointer_target(&location("closed", "ab"), None).await;
        assert!(matches!(closed, Err(Error::Refused { .. })), "{closed:?}");
    }

    #[test]
    fn the_version_id_null_counts_as_no_version() {
        let version = |id: &str| object_from_head(&HeadObjectOutput::builder().version_id(id).build()).version_id;
        assert_eq!(version("null"), None);
        assert_eq!(version("v1").as_deref(), Some("v1"));
    }
}
