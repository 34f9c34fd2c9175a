//! The S3 behaviour that the broker relies on, tested with the store of this run.
//!
//! The embedded store must answer like AWS. `expected` lists where MinIO and VersityGW differ, so that every test
//! asserts an exact outcome on each store.

mod multipart;
mod objects;
mod presigned;

use std::time::{Duration, SystemTime};

use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::operation::head_object::HeadObjectOutput;
use aws_sdk_s3::operation::put_object::builders::PutObjectFluentBuilder;
use aws_sdk_s3::presigning::{PresignedRequest, PresigningConfig};
use aws_sdk_s3::types::ChecksumMode;
use lfs_broker_client::checksum::{Algorithm, Sha256};
use reqwest::Method;

use crate::s3_server::{Flavour, TestBucket};

/// The smallest size of a part that is not the last.
const PART_BYTES: usize = 5 << 20;

/// A response in short: its status and its error code.
type Outcome = (u16, &'static str);

const OK: Outcome = (200, "");

/// Requests to which the stores answer differently.
#[derive(Debug, Clone, Copy)]
enum Case {
    WrongChecksum,
    UnsignedCopySource,
    UnsignedHeader,
    SignedHeaderMissing,
    EndsAfterUrlExpiry,
    UnknownLength,
    LifetimeOverOneWeek,
    UnknownCredential,
    RefusedChecksumType,
    PartWithoutChecksum,
    CrcPartWithoutChecksum,
    CrcListedWithoutChecksum,
    UndeclaredChecksum,
    WrongOrder,
    ListedWithoutChecksum,
    WrongObjectSize,
    SecondComplete,
    SecondAbort,
}

/// What a store answers. Arms without a store name are for AWS and the embedded store.
fn expected(flavour: Flavour, case: Case) -> Outcome {
    use Case::*;
    use Flavour::*;
    match (case, flavour) {
        (WrongChecksum, Minio) => (400, "XAmzContentChecksumMismatch"),
        (WrongChecksum, _) => (400, "BadDigest"),
        (UnsignedCopySource, Minio) => OK,
        (UnsignedCopySource, _) => (403, "AccessDenied"),
        (UnsignedHeader, Minio) => (400, "AccessDenied"),
        (UnsignedHeader, _) => (403, "AccessDenied"),
        (SignedHeaderMissing, Minio) => (400, "AccessDenied"),
        (SignedHeaderMissing, _) => (403, "SignatureDoesNotMatch"),
        // VersityGW checks the URL's expiry only after it has read the body.
        (EndsAfterUrlExpiry, Versitygw) => (403, "AccessDenied"),
        (EndsAfterUrlExpiry, _) => OK,
        (UnknownLength, _) => (411, "MissingContentLength"),
        (LifetimeOverOneWeek, _) => (400, "AuthorizationQueryParametersError"),
        (UnknownCredential, Versitygw) => (404, "XAdminUserNotFound"),
        (UnknownCredential, _) => (403, "InvalidAccessKeyId"),
        (CrcPartWithoutChecksum, Embedded | Versitygw) | (CrcListedWithoutChecksum, Embedded) => OK,
        (RefusedChecksumType | PartWithoutChecksum | CrcPartWithoutChecksum, Minio) => (400, "InvalidArgument"),
        (RefusedChecksumType | PartWithoutChecksum, _) => (400, "InvalidRequest"),
        (UndeclaredChecksum, _) => OK,
        // VersityGW checks the part sizes first.
        (WrongOrder, Versitygw) => (400, "EntityTooSmall"),
        (WrongOrder, _) => (400, "InvalidPartOrder"),
        (ListedWithoutChecksum | CrcListedWithoutChecksum, Minio) => (400, "InvalidPart"),
        (ListedWithoutChecksum | CrcListedWithoutChecksum, _) => (400, "InvalidRequest"),
        (WrongObjectSize, Minio) => OK,
        (WrongObjectSize, _) => (400, "InvalidRequest"),
        (SecondComplete, Versitygw) => OK,
        (SecondComplete, _) => (404, "NoSuchUpload"),
        (SecondAbort, Minio) => (204, ""),
        (SecondAbort, _) => (404, "NoSuchUpload"),
    }
}

/// Asserts that `found` is what the store of this run answers in `case`.
#[track_caller]
fn assert_outcome(s3: &TestBucket, case: Case, found: (u16, String)) {
    let (status, code) = expected(s3.server.flavour, case);
    assert_eq!(found, (status, code.to_owned()), "{case:?} on {:?}", s3.server.flavour);
}

/// A presigned request as its client sends it.
struct PresignedCall {
    method: Method,
    url: String,
    headers: Vec<(String, String)>,
}

impl PresignedCall {
    fn of(presigned: &PresignedRequest) -> Self {
        Self {
            method: presigned.method().parse().unwrap(),
            url: presigned.uri().to_owned(),
            headers: presigned.headers().map(|(name, value)| (name.to_owned(), value.to_owned())).collect(),
        }
    }

    fn with(mut self, name: &str, value: &str) -> Self {
        self.headers.retain(|(found, _)| found != name);
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    fn without(mut self, name: &str) -> Self {
        self.headers.retain(|(found, _)| found != name);
        self
    }

    async fn send(self, body: impl Into<reqwest::Body>) -> S3Response {
        let request = reqwest::Client::new().request(self.method, self.url).body(body);
        let request = self.headers.iter().fold(request, |request, (name, value)| request.header(name, value));
        S3Response::of(request.timeout(Duration::from_secs(60)).send().await.unwrap()).await
    }
}

/// An S3 response.
#[derive(Debug)]
struct S3Response {
    status: u16,
    headers: reqwest::header::HeaderMap,
    body: Vec<u8>,
}

impl S3Response {
    async fn of(response: reqwest::Response) -> Self {
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        Self { status, headers, body: response.bytes().await.unwrap().into() }
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }

    /// The status, and the error code in the XML body.
    fn outcome(&self) -> (u16, String) {
        let text = String::from_utf8_lossy(&self.body);
        let code = text.split_once("<Code>").and_then(|(_, rest)| rest.split_once("</Code>"));
        (self.status, code.map_or(String::new(), |(code, _)| code.to_owned()))
    }
}

/// The outcome of an SDK call.
fn outcome<T, E: ProvideErrorMetadata>(result: &Result<T, SdkError<E>>) -> (u16, String) {
    match result {
        Ok(_) => (200, String::new()),
        Err(SdkError::ServiceError(error)) => (error.raw().status().as_u16(), error.err().code().unwrap_or_default().to_owned()),
        Err(_) => panic!("the store did not answer"),
    }
}

fn minutes(minutes: u64) -> PresigningConfig {
    PresigningConfig::expires_in(Duration::from_secs(minutes * 60)).unwrap()
}

/// A presigning configuration that began `ago` and is valid for `life`.
fn presigned_since(ago: Duration, life: Duration) -> PresigningConfig {
    PresigningConfig::builder().start_time(SystemTime::now() - ago).expires_in(life).build().unwrap()
}

fn base64(algorithm: Algorithm, bytes: &[u8]) -> String {
    let mut hasher = algorithm.hasher();
    hasher.update(bytes);
    hasher.finish().base64()
}

fn md5_hex(bytes: &[u8]) -> String {
    let mut hasher = Algorithm::Md5.hasher();
    hasher.update(bytes);
    hasher.finish().hex()
}

/// Bytes that depend on their position and the seed.
fn bytes(size: usize, seed: u8) -> Vec<u8> {
    (0..size).map(|position| (position % 251) as u8 ^ (position >> 12) as u8 ^ seed).collect()
}

/// A PUT with the headers that the broker signs.
fn put(s3: &TestBucket, key: &str, body: &[u8]) -> PutObjectFluentBuilder {
    let request = s3.client.put_object().bucket(&s3.bucket).key(key).content_type("text/plain").if_none_match("*");
    let request = request.content_length(i64::try_from(body.len()).unwrap()).metadata("lfs-upload-id", "write-token");
    request.checksum_sha256(Sha256::of(body).base64())
}

async fn presign(request: PutObjectFluentBuilder) -> PresignedCall {
    PresignedCall::of(&request.presigned(minutes(10)).await.unwrap())
}

/// The object's HEAD with its checksum; `None` if there is no object.
async fn head(s3: &TestBucket, key: &str) -> Option<HeadObjectOutput> {
    let request = s3.client.head_object().bucket(&s3.bucket).key(key).checksum_mode(ChecksumMode::Enabled);
    let result = request.send().await;
    if let Err(error) = &result {
        assert!(error.as_service_error().is_some_and(|error| error.is_not_found()), "{error:?}");
    }
    result.ok()
}

/// The bytes of an object.
async fn get(s3: &TestBucket, key: &str) -> Vec<u8> {
    let found = s3.client.get_object().bucket(&s3.bucket).key(key).send().await.unwrap();
    found.body.collect().await.unwrap().to_vec()
}
