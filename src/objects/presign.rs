//! Presigned URLs: the requests that a client may send to S3, and for how long.
//!
//! Every declared property is signed as a header, because S3 enforces only signed headers: a checksum in the query
//! protects nothing. The SDK chooses the headers that it signs, so the broker checks each URL before it returns it.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, SystemTime};

use aws_sdk_s3::Client;
use aws_sdk_s3::config::{Builder, Credentials, IdentityCache, ProvideCredentials as _, SharedCredentialsProvider};
use aws_sdk_s3::presigning::{PresignedRequest, PresigningConfig};
use aws_sdk_s3::types::ServerSideEncryption;
use lfs_broker_client::checksum::{Algorithm, Digest, Sha256};
use tokio::sync::Mutex;

use super::download::{content_disposition, safe_content_type};
use super::{Error, ObjectLocation, Objects, TOKEN_KEY, call_error};
use crate::policy;
use crate::telemetry::error_chain;

/// The longest lifetime of a presigned URL.
const MAX_URL_LIFETIME: Duration = Duration::from_secs(policy::MAX_LIFETIME_SECONDS);
/// A URL expires this long before its credential, because clocks differ and a slow PUT must start before the expiry.
const EXPIRY_MARGIN: Duration = Duration::from_secs(30);
/// New credentials are available five minutes before the old ones expire (Amazon EC2 instance metadata), so renew from then on.
const RENEW_BEFORE: Duration = Duration::from_secs(300);
/// The retry interval while the source still returns the old credentials or does not answer.
const RENEW_RETRY_INTERVAL: Duration = Duration::from_secs(20);
/// Credentials without an expiry are read again at this interval, because an operator may have rotated them.
const REREAD_INTERVAL: Duration = Duration::from_secs(900);
/// A source of credentials that takes longer counts as unavailable.
const SOURCE_TIMEOUT: Duration = Duration::from_secs(5);

/// The declared properties of an object to be written; every property is signed.
#[derive(Clone, Copy, Debug)]
pub struct NewObject<'a> {
    /// The bucket and key of the object.
    pub location: &'a ObjectLocation,
    /// The write token: the id of the upload.
    pub token: &'a str,
    /// The media type.
    pub content_type: &'a str,
    /// The size in bytes.
    pub size_bytes: u64,
    /// The digest that S3 compares the bytes with.
    pub digest: Option<&'a Digest>,
    /// The KMS key that S3 encrypts with.
    pub kms_key_id: Option<&'a str>,
}

/// A presigned URL with the method and headers that its holder must send.
#[derive(Clone, PartialEq, Eq)]
pub struct PresignedUrl {
    /// `PUT` or `GET`.
    pub method: &'static str,
    /// The URL, which is a secret until it expires.
    pub url: String,
    /// Exactly the headers that the holder must send besides `host`, in lower case.
    pub headers: BTreeMap<String, String>,
    /// How long S3 accepts the URL: the requested time, or less if the credentials expire earlier.
    pub expires_in: Duration,
}

impl fmt::Debug for PresignedUrl {
    /// Omits the URL, because a reader of a log must not be able to use it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PresignedUrl").field("method", &self.method).field("expires_in", &self.expires_in).finish_non_exhaustive()
    }
}

impl Objects {
    /// Signs a PUT of a whole object, which S3 refuses if the key already has an object.
    ///
    /// # Errors
    /// If no credentials are available, or the signature would not cover every declared property.
    pub async fn presign_put(&self, object: &NewObject<'_>, expires_in: Duration) -> Result<PresignedUrl, Error> {
        self.0.upload_signer.put(object, expires_in).await
    }

    /// Signs a PUT of one part.
    ///
    /// # Errors
    /// As [`Objects::presign_put`].
    pub async fn presign_part(
        &self,
        location: &ObjectLocation,
        s3_upload_id: &str,
        number: u32,
        size_bytes: u64,
        sha256: Option<&Sha256>,
        expires_in: Duration,
    ) -> Result<PresignedUrl, Error> {
        self.0.upload_signer.part(location, s3_upload_id, number, size_bytes, sha256, expires_in).await
    }

    /// Signs a GET. The browser saves the response as `filename`, with a content type that no browser executes.
    ///
    /// # Errors
    /// If no credentials are available.
    pub async fn presign_get(
        &self,
        location: &ObjectLocation,
        version_id: Option<&str>,
        filename: Option<&str>,
        content_type: Option<&str>,
        expires_in: Duration,
    ) -> Result<PresignedUrl, Error> {
        let (client, presigning) = self.0.download_signer.presigning(expires_in).await?;
        let request = client
            .get_object()
            .bucket(&location.bucket)
            .key(&location.key)
            .set_version_id(version_id.map(str::to_owned))
            .response_content_disposition(content_disposition(filename))
            .response_content_type(safe_content_type(content_type))
            // The browser must save the verified bytes. With another encoding it would decode them first.
            .response_content_encoding("identity")
            .presigned(presigning.clone())
            .await
            .map_err(|error| call_error("signing a GET", &error))?;
        check_signed_headers("GET", &request, &[], presigning.expires())
    }
}

/// Signs for one endpoint with one credential.
pub(super) struct Signer {
    config: Builder,
    source: SharedCredentialsProvider,
    cached: Mutex<Option<CachedClient>>,
}

/// A client with a fixed credential, so that the expiry of its signatures is known.
struct CachedClient {
    client: Client,
    expires_at: Option<SystemTime>,
    renew_at: SystemTime,
}

impl Signer {
    pub(super) fn new(config: Builder, source: SharedCredentialsProvider) -> Self {
        Self { config, source, cached: Mutex::new(None) }
    }

    pub(super) async fn put(&self, object: &NewObject<'_>, expires_in: Duration) -> Result<PresignedUrl, Error> {
        let (client, presigning) = self.presigning(expires_in).await?;
        let mut request = client
            .put_object()
            .bucket(&object.location.bucket)
            .key(&object.location.key)
            .content_length(content_length(object.size_bytes))
            .content_type(object.content_type)
            .if_none_match("*")
            .metadata(TOKEN_KEY, object.token);
        let mut required = vec!["content-length", "content-type", "if-none-match", "x-amz-meta-lfs-upload-id"];
        if let Some(key_id) = object.kms_key_id {
            request = request.server_side_encryption(ServerSideEncryption::AwsKms).ssekms_key_id(key_id);
            required.extend(["x-amz-server-side-encryption", "x-amz-server-side-encryption-aws-kms-key-id"]);
        }
        if let Some(digest) = object.digest {
            required.extend(digest.algorithm.header());
            request = match digest.algorithm {
                Algorithm::Sha256 => request.checksum_sha256(digest.base64()),
                Algorithm::Crc64nvme => request.checksum_crc64_nvme(digest.base64()),
                Algorithm::Crc32c => request.checksum_crc32_c(digest.base64()),
                Algorithm::Crc32 => request.checksum_crc32(digest.base64()),
                Algorithm::Md5 => request.content_md5(digest.base64()),
                Algorithm::None => request,
            };
        }
        let request = request.presigned(presigning.clone()).await.map_err(|error| call_error("signing a PUT", &error))?;
        check_signed_headers("PUT", &request, &required, presigning.expires())
    }

    pub(super) async fn part(
        &self,
        location: &ObjectLocation,
        s3_upload_id: &str,
        number: u32,
        size_bytes: u64,
        sha256: Option<&Sha256>,
        expires_in: Duration,
    ) -> Result<PresignedUrl, Error> {
        let (client, presigning) = self.presigning(expires_in).await?;
        let request = client
            .upload_part()
            .bucket(&location.bucket)
            .key(&location.key)
            .upload_id(s3_upload_id)
            .part_number(i32::try_from(number).unwrap_or(i32::MAX))
            .content_length(content_length(size_bytes))
            .set_checksum_sha256(sha256.map(Sha256::base64))
            .presigned(presigning.clone())
            .await
            .map_err(|error| call_error("signing a part", &error))?;
        let mut required = vec!["content-length"];
        required.extend(sha256.and_then(|_| Algorithm::Sha256.header()));
        check_signed_headers("PUT", &request, &required, presigning.expires())
    }

    /// A client that signs, and the validity of its signatures.
    async fn presigning(&self, requested: Duration) -> Result<(Client, PresigningConfig), Error> {
        let mut cached = self.cached.lock().await;
        let now = SystemTime::now();
        if cached.as_ref().is_none_or(|cached| cached.renew_at <= now) {
            self.renew(&mut cached, now).await?;
        }
        let cached = cached.as_ref().ok_or_else(|| Error::Unavailable("no s3 credentials are available".to_owned()))?;
        let remaining = match cached.expires_at {
            Some(expires_at) => expires_at.duration_since(now).unwrap_or_default().saturating_sub(EXPIRY_MARGIN),
            None => MAX_URL_LIFETIME,
        };
        // S3 counts whole seconds. Rounding up would let the URL outlive the session.
        let expires_in = Duration::from_secs(requested.min(remaining).min(MAX_URL_LIFETIME).as_secs());
        if expires_in.is_zero() {
            return Err(Error::Unavailable(format!(
                "a presigned URL would expire in less than 1 s: requested {} ms, the s3 credentials allow {} ms",
                requested.as_millis(),
                remaining.as_millis()
            )));
        }
        let presigning = PresigningConfig::builder().start_time(now).expires_in(expires_in).build();
        Ok((cached.client.clone(), presigning.map_err(|error| Error::Settings(error_chain(&error)))?))
    }

    /// Gets credentials from the source. A failure of the source is an error only if the old credentials can no longer sign.
    async fn renew(&self, cached: &mut Option<CachedClient>, now: SystemTime) -> Result<(), Error> {
        let failure = match tokio::time::timeout(SOURCE_TIMEOUT, self.source.provide_credentials()).await {
            Ok(Ok(credentials)) => {
                *cached = Some(self.client_with(credentials, now));
                return Ok(());
            }
            Ok(Err(error)) => error_chain(&error),
            Err(_) => format!("the source did not answer within {} s", SOURCE_TIMEOUT.as_secs()),
        };
        match cached {
            Some(cached) if cached.expires_at.is_none_or(|expires_at| expires_at > now + EXPIRY_MARGIN) => {
                cached.renew_at = now + RENEW_RETRY_INTERVAL;
                Ok(())
            }
            _ => Err(Error::Unavailable(format!("no s3 credentials are available: {failure}"))),
        }
    }

    fn client_with(&self, credentials: Credentials, now: SystemTime) -> CachedClient {
        let expires_at = credentials.expiry();
        let renew_at = match expires_at {
            Some(expires_at) => {
                expires_at.checked_sub(RENEW_BEFORE).filter(|early| *early > now).unwrap_or(now + RENEW_RETRY_INTERVAL)
            }
            None => now + REREAD_INTERVAL,
        };
        // The credential is fixed, so the SDK's cache would only keep each old credential in memory.
        let config = self.config.clone().credentials_provider(credentials).identity_cache(IdentityCache::no_cache());
        let client = Client::from_conf(config.build());
        CachedClient { client, expires_at, renew_at }
    }
}

/// Converts the SDK's request, and rejects it unless the signature covers exactly the headers that must be sent.
fn check_signed_headers(
    method: &'static str,
    request: &PresignedRequest,
    required: &[&str],
    expires_in: Duration,
) -> Result<PresignedUrl, Error> {
    let headers: BTreeMap<String, String> = request
        .headers()
        .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
        .filter(|(name, _)| name != "host")
        .collect();
    let signed = signed_headers(request.uri());
    let is_covered = |name: &str| headers.contains_key(name) && signed.iter().any(|signed| signed == name);
    let is_complete = required.iter().all(|name| is_covered(name))
        && headers.keys().all(|name| is_covered(name))
        && signed.iter().all(|name| name == "host" || headers.contains_key(name));
    if request.method() != method || !is_complete {
        return Err(Error::UnsignedHeader { signed, required: required.iter().map(|&name| name.to_owned()).collect() });
    }
    Ok(PresignedUrl { method, url: request.uri().to_owned(), headers, expires_in })
}

/// The names in `X-Amz-SignedHeaders`.
fn signed_headers(url: &str) -> Vec<String> {
    let query = url.split_once('?').map_or("", |(_, query)| query);
    let names = query.split('&').find_map(|pair| pair.strip_prefix("X-Amz-SignedHeaders=")).unwrap_or("");
    names.replace("%3B", ";").split(';').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

fn content_length(size_bytes: u64) -> i64 {
    i64::try_from(size_bytes).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::super::Settings;
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    async fn objects() -> Objects {
        let settings = Settings {
            endpoint: Some("http://127.0.0.1:9".to_owned()),
            public_endpoint: Some("https://s3.example.net".to_owned()),
            region: Some("eu-central-1".to_owned()),
            access_key_id: Some("OWN".to_owned()),
            secret_access_key: Some("own-secret".to_owned()),
            signing_access_key_id: Some("WRITER".to_owned()),
            signing_secret_access_key: Some("writer-secret".to_owned()),
            ..Settings::default()
        };
        Objects::connect(&settings).await.unwrap()
    }

    fn location() -> ObjectLocation {
        ObjectLocation { bucket: "bucket".to_owned(), key: "acme/videos/lfs/1".to_owned() }
    }

    fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[tokio::test]
    async fn a_presigned_put_signs_every_declared_property_as_a_header() {
        let (location, digest) = (location(), Digest::from(Sha256::of(b"hello")));
        let object = NewObject {
            location: &location,
            token: "0190",
            content_type: "video/mp4",
            size_bytes: 5,
            digest: Some(&digest),
            kms_key_id: Some("key-1"),
        };
        let signed = objects().await.presign_put(&object, MINUTE).await.unwrap();
        assert_eq!(
            signed.headers,
            map(&[
                ("content-length", "5"),
                ("content-type", "video/mp4"),
                ("if-none-match", "*"),
                ("x-amz-checksum-sha256", "LPJNul+wow4m6DsqxbninhsWHlwfp0JecwQzYpOLmCQ="),
                ("x-amz-meta-lfs-upload-id", "0190"),
                ("x-amz-server-side-encryption", "aws:kms"),
                ("x-amz-server-side-encryption-aws-kms-key-id", "key-1"),
            ])
        );
        let names: Vec<String> = signed_headers(&signed.url).into_iter().filter(|name| name != "host").collect();
        assert_eq!(names, signed.headers.keys().cloned().collect::<Vec<_>>());
        assert!(signed.url.starts_with("https://s3.example.net/bucket/acme/videos/lfs/1?"), "{}", signed.url);
        assert!(signed.url.contains("X-Amz-Credential=WRITER%2F") && signed.url.contains("X-Amz-Expires=60&"));
        assert!(!signed.url.contains("checksum-sha256="), "{}", signed.url);
        assert!(!format!("{signed:?}").contains("http"));
    }

    #[tokio::test]
    async fn a_presigned_put_signs_the_checksum_header_of_its_algorithm() {
        let (objects, location) = (objects().await, location());
        for algorithm in Algorithm::ALL {
            let mut hasher = algorithm.hasher();
            hasher.update(b"hello");
            let digest = hasher.finish();
            let object = NewObject {
                location: &location,
                token: "0190",
                content_type: "a/b",
                size_bytes: 5,
                digest: Some(&digest),
                kms_key_id: None,
            };
            let mut expected = map(&[
                ("content-length", "5"),
                ("content-type", "a/b"),
                ("if-none-match", "*"),
                ("x-amz-meta-lfs-upload-id", "0190"),
            ]);
            if let Some(header) = algorithm.header() {
                expected.insert(header.to_owned(), digest.base64());
            }
            assert_eq!(objects.presign_put(&object, MINUTE).await.unwrap().headers, expected, "{algorithm}");
        }
    }

    #[tokio::test]
    async fn a_presigned_part_signs_its_size_and_its_sha256() {
        let (objects, location) = (objects().await, location());
        let sha256 = Sha256::of(b"hello");
        let signed = objects.presign_part(&location, "up load", 7, 5, Some(&sha256), MINUTE).await.unwrap();
        assert_eq!(signed.headers, map(&[("content-length", "5"), ("x-amz-checksum-sha256", &sha256.base64())]));
        assert!(signed.url.contains("partNumber=7&uploadId=up%20load"), "{}", signed.url);
        let signed = objects.presign_part(&location, "u", 7, 0, None, MINUTE).await.unwrap();
        assert_eq!(signed.headers, map(&[("content-length", "0")]));
    }

    #[tokio::test]
    async fn a_presigned_get_is_a_download_signed_with_the_brokers_own_key() {
        let signed =
            objects().await.presign_get(&location(), Some("v1"), Some("a b.svg"), Some("image/svg+xml"), MINUTE).await.unwrap();
        assert_eq!((signed.method, signed.headers.len()), ("GET", 0));
        for piece in [
            "https://s3.example.net/bucket/acme/videos/lfs/1?",
            "X-Amz-Credential=OWN%2F",
            "versionId=v1",
            "response-content-disposition=attachment%3B%20filename%3D%22a%20b.svg%22",
            "response-content-type=application%2Foctet-stream",
            "response-content-encoding=identity",
        ] {
            assert!(signed.url.contains(piece), "{piece} in {}", signed.url);
        }
        let signed = objects().await.presign_get(&location(), None, None, Some("video/mp4"), MINUTE).await.unwrap();
        assert!(signed.url.contains("response-content-type=video%2Fmp4"), "{}", signed.url);
        let signed = objects().await.presign_get(&location(), None, None, None, MINUTE).await.unwrap();
        assert!(signed.url.contains("response-content-type=application%2Foctet-stream"), "{}", signed.url);
    }

    #[tokio::test]
    async fn a_presigned_url_expires_before_its_credentials() {
        let lifetime = |credentials_seconds: Option<u64>, requested: Duration| async move {
            let expires_at = credentials_seconds.map(|seconds| SystemTime::now() + Duration::from_secs(seconds));
            let key = Credentials::new("TEMP", "secret", Some("session".to_owned()), expires_at, "test");
            let config = aws_sdk_s3::Config::builder()
                .behavior_version(aws_config::BehaviorVersion::v2026_01_12())
                .region(aws_sdk_s3::config::Region::new("us-east-1"));
            let signer = Signer::new(config, SharedCredentialsProvider::new(key));
            let signed = signer.part(&location(), "u", 1, 5, None, requested).await?;
            assert!(signed.url.contains("X-Amz-Security-Token=session"));
            assert!(signed.url.contains(&format!("X-Amz-Expires={}&", signed.expires_in.as_secs())), "{}", signed.url);
            Ok::<u64, Error>(signed.expires_in.as_secs())
        };
        assert_eq!(lifetime(None, 10 * MINUTE).await.unwrap(), 600);
        assert_eq!(lifetime(Some(3600), 10 * MINUTE).await.unwrap(), 600);
        let short = lifetime(Some(100), 10 * MINUTE).await.unwrap();
        assert!((60..=70).contains(&short), "{short}");
        assert_eq!(lifetime(None, 30 * 24 * 60 * MINUTE).await.unwrap(), MAX_URL_LIFETIME.as_secs());
        assert!(matches!(lifetime(Some(20), MINUTE).await, Err(Error::Unavailable(_))));
        assert!(matches!(lifetime(None, Duration::from_millis(900)).await, Err(Error::Unavailable(_))));
    }
}
