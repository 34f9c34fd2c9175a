//! What the broker relies on in an object store, held against the store at hand.
//!
//! The embedded store must answer as AWS documents it. Where MinIO and VersityGW are known to differ, `expected` says
//! how, so that every test asserts something definite on each of them.

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

use crate::stores::{Flavour, Store};

/// The least size of a part that is not the last.
const PART_BYTES: usize = 5 << 20;

/// An answer in short: its status, and the code of its error.
type Outcome = (u16, &'static str);

const OK: Outcome = (200, "");

/// What the stores differ in.
#[derive(Debug, Clone, Copy)]
enum Case {
    WrongChecksum,
    UnsignedCopySource,
    UnsignedHeader,
    HeaderLeftOut,
    EndsAfterTheUrl,
    UnknownLength,
    LifeOverAWeek,
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
    AbortAgain,
}

/// What a store answers; the arm of no name is AWS and the embedded store.
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
        (HeaderLeftOut, Minio) => (400, "AccessDenied"),
        (HeaderLeftOut, _) => (403, "SignatureDoesNotMatch"),
        // It looks at the clock only when the body is there.
        (EndsAfterTheUrl, Versitygw) => (403, "AccessDenied"),
        (EndsAfterTheUrl, _) => OK,
        (UnknownLength, _) => (411, "MissingContentLength"),
        (LifeOverAWeek, _) => (400, "AuthorizationQueryParametersError"),
        (UnknownCredential, Versitygw) => (404, "XAdminUserNotFound"),
        (UnknownCredential, _) => (403, "InvalidAccessKeyId"),
        (CrcPartWithoutChecksum, Embedded | Versitygw) | (CrcListedWithoutChecksum, Embedded) => OK,
        (RefusedChecksumType | PartWithoutChecksum | CrcPartWithoutChecksum, Minio) => (400, "InvalidArgument"),
        (RefusedChecksumType | PartWithoutChecksum, _) => (400, "InvalidRequest"),
        (UndeclaredChecksum, _) => OK,
        // It looks at the sizes first.
        (WrongOrder, Versitygw) => (400, "EntityTooSmall"),
        (WrongOrder, _) => (400, "InvalidPartOrder"),
        (ListedWithoutChecksum | CrcListedWithoutChecksum, Minio) => (400, "InvalidPart"),
        (ListedWithoutChecksum | CrcListedWithoutChecksum, _) => (400, "InvalidRequest"),
        (WrongObjectSize, Minio) => OK,
        (WrongObjectSize, _) => (400, "InvalidRequest"),
        (SecondComplete, Versitygw) => OK,
        (SecondComplete, _) => (404, "NoSuchUpload"),
        (AbortAgain, Minio) => (204, ""),
        (AbortAgain, _) => (404, "NoSuchUpload"),
    }
}

/// Asserts that `found` is what the store at hand answers in `case`.
#[track_caller]
fn assert_outcome(store: &Store, case: Case, found: (u16, String)) {
    let (status, code) = expected(store.place.flavour, case);
    assert_eq!(found, (status, code.to_owned()), "{case:?} on {:?}", store.place.flavour);
}

/// A request that somebody presigned, as its holder sends it.
struct Holder {
    method: Method,
    url: String,
    headers: Vec<(String, String)>,
}

impl Holder {
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

    async fn send(self, body: impl Into<reqwest::Body>) -> Answer {
        let request = reqwest::Client::new().request(self.method, self.url).body(body);
        let request = self.headers.iter().fold(request, |request, (name, value)| request.header(name, value));
        Answer::of(request.timeout(Duration::from_secs(60)).send().await.unwrap()).await
    }
}

/// What came back.
#[derive(Debug)]
struct Answer {
    status: u16,
    headers: reqwest::header::HeaderMap,
    body: Vec<u8>,
}

impl Answer {
    async fn of(response: reqwest::Response) -> Self {
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        Self { status, headers, body: response.bytes().await.unwrap().into() }
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }

    /// Its status, and the code in its XML.
    fn outcome(&self) -> (u16, String) {
        let text = String::from_utf8_lossy(&self.body);
        let code = text.split_once("<Code>").and_then(|(_, rest)| rest.split_once("</Code>"));
        (self.status, code.map_or(String::new(), |(code, _)| code.to_owned()))
    }
}

/// The outcome of a call of the SDK.
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

/// A presigning that begins `ago` and lives for `life`.
fn signed_since(ago: Duration, life: Duration) -> PresigningConfig {
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

/// Bytes that differ from place to place and from seed to seed.
fn bytes(size: usize, seed: u8) -> Vec<u8> {
    (0..size).map(|place| (place % 251) as u8 ^ (place >> 12) as u8 ^ seed).collect()
}

/// A PUT as the broker signs it.
fn put(store: &Store, key: &str, body: &[u8]) -> PutObjectFluentBuilder {
    let request = store.client.put_object().bucket(&store.bucket).key(key).content_type("text/plain").if_none_match("*");
    let request = request.content_length(i64::try_from(body.len()).unwrap()).metadata("lfs-upload-id", "write-token");
    request.checksum_sha256(Sha256::of(body).base64())
}

async fn holder(request: PutObjectFluentBuilder) -> Holder {
    Holder::of(&request.presigned(minutes(10)).await.unwrap())
}

/// What S3 says of an object with its checksum; `None` where there is none.
async fn head(store: &Store, key: &str) -> Option<HeadObjectOutput> {
    let request = store.client.head_object().bucket(&store.bucket).key(key).checksum_mode(ChecksumMode::Enabled);
    let result = request.send().await;
    if let Err(error) = &result {
        assert!(error.as_service_error().is_some_and(|error| error.is_not_found()), "{error:?}");
    }
    result.ok()
}

/// The bytes of an object.
async fn get(store: &Store, key: &str) -> Vec<u8> {
    let found = store.client.get_object().bucket(&store.bucket).key(key).send().await.unwrap();
    found.body.collect().await.unwrap().to_vec()
}
