//! Presigned URLs: what a client may do to S3, and for how long.
//!
//! Every promise is signed as a header, for S3 holds a request to its signed headers only: a checksum that moves
//! into the query protects nothing. The SDK decides what it signs, so each answer is checked before it leaves.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, SystemTime};

use aws_sdk_s3::Client;
use aws_sdk_s3::config::{Builder, Credentials, IdentityCache, ProvideCredentials as _, SharedCredentialsProvider};
use aws_sdk_s3::presigning::{PresignedRequest, PresigningConfig};
use aws_sdk_s3::types::ServerSideEncryption;
use lfs_broker_client::checksum::{Algorithm, Digest, Sha256};
use tokio::sync::Mutex;

use super::download::{disposition, safe_type};
use super::{Error, Objects, Place, TOKEN, chain, failed};

/// The longest life of a presigned URL (Amazon S3 User Guide).
const LONGEST: Duration = Duration::from_secs(7 * 24 * 3600);
/// A URL ends this long before its credential: S3 and we have different clocks, and a slow PUT must have begun.
const MARGIN: Duration = Duration::from_secs(30);
/// New credentials are there five minutes before the old ones end (Amazon EC2 instance metadata); ask from then on.
const RENEW_BEFORE: Duration = Duration::from_secs(300);
/// While the source keeps to the old ones, or does not answer, ask again this often.
const RENEW_PAUSE: Duration = Duration::from_secs(20);
/// Credentials without an end are read again this often, in case somebody rotated them.
const REREAD: Duration = Duration::from_secs(900);
/// A source of credentials that takes longer is taken as unavailable.
const SOURCE_TIMEOUT: Duration = Duration::from_secs(5);

/// What a write promises; all of it is signed.
#[derive(Clone, Copy, Debug)]
pub struct Put<'a> {
    /// Where the object goes.
    pub place: &'a Place,
    /// The session's id.
    pub token: &'a str,
    /// The media type.
    pub content_type: &'a str,
    /// The size in bytes.
    pub size_bytes: u64,
    /// The digest that S3 checks the bytes against.
    pub digest: Option<&'a Digest>,
    /// The KMS key that S3 encrypts with.
    pub kms_key_id: Option<&'a str>,
}

/// A request that its holder may send as it stands.
#[derive(Clone, PartialEq, Eq)]
pub struct Signed {
    /// `PUT` or `GET`.
    pub method: &'static str,
    /// The URL: a secret for as long as it lives.
    pub url: String,
    /// Exactly the headers that must be sent besides `host`, in lower case.
    pub headers: BTreeMap<String, String>,
    /// How long S3 accepts it: no longer than asked, and shorter where the credentials end earlier.
    pub expires_in: Duration,
}

impl fmt::Debug for Signed {
    /// Leaves out the URL: whoever reads a log must not be able to use it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Signed").field("method", &self.method).field("expires_in", &self.expires_in).finish_non_exhaustive()
    }
}

impl Objects {
    /// Signs a PUT of a whole object where none is yet.
    ///
    /// # Errors
    /// Where the credentials cannot be had, or the signature would not cover every promise.
    pub async fn sign_put(&self, put: &Put<'_>, expires_in: Duration) -> Result<Signed, Error> {
        self.0.uploads.put(put, expires_in).await
    }

    /// Signs a PUT of one part.
    ///
    /// # Errors
    /// As [`Objects::sign_put`].
    pub async fn sign_part(
        &self,
        place: &Place,
        s3_upload_id: &str,
        number: u32,
        size_bytes: u64,
        sha256: Option<&Sha256>,
        expires_in: Duration,
    ) -> Result<Signed, Error> {
        self.0.uploads.part(place, s3_upload_id, number, size_bytes, sha256, expires_in).await
    }

    /// Signs a GET. The answer is a download under `filename`, of a type that no browser runs.
    ///
    /// # Errors
    /// Where the credentials cannot be had.
    pub async fn sign_get(
        &self,
        place: &Place,
        version_id: Option<&str>,
        filename: Option<&str>,
        content_type: Option<&str>,
        expires_in: Duration,
    ) -> Result<Signed, Error> {
        let (client, window) = self.0.downloads.window(expires_in).await?;
        let request = client
            .get_object()
            .bucket(&place.bucket)
            .key(&place.key)
            .set_version_id(version_id.map(str::to_owned))
            .response_content_disposition(disposition(filename))
            .response_content_type(safe_type(content_type))
            // A browser must show the bytes that were verified, not what comes of decoding them.
            .response_content_encoding("identity")
            .presigned(window.clone())
            .await
            .map_err(|error| failed("signing a GET", &error))?;
        answer("GET", &request, &[], window.expires())
    }
}

/// Signs for one endpoint with one credential.
pub(super) struct Signer {
    config: Builder,
    source: SharedCredentialsProvider,
    held: Mutex<Option<Held>>,
}

/// A client whose credential is fixed, so that the end of what it signs is known.
struct Held {
    client: Client,
    expires_at: Option<SystemTime>,
    renew_at: SystemTime,
}

impl Signer {
    pub(super) fn new(config: Builder, source: SharedCredentialsProvider) -> Self {
        Self { config, source, held: Mutex::new(None) }
    }

    pub(super) async fn put(&self, put: &Put<'_>, expires_in: Duration) -> Result<Signed, Error> {
        let (client, window) = self.window(expires_in).await?;
        let mut request = client
            .put_object()
            .bucket(&put.place.bucket)
            .key(&put.place.key)
            .content_length(length(put.size_bytes))
            .content_type(put.content_type)
            .if_none_match("*")
            .metadata(TOKEN, put.token);
        let mut wanted = vec!["content-length", "content-type", "if-none-match", "x-amz-meta-lfs-upload-id"];
        if let Some(key_id) = put.kms_key_id {
            request = request.server_side_encryption(ServerSideEncryption::AwsKms).ssekms_key_id(key_id);
            wanted.extend(["x-amz-server-side-encryption", "x-amz-server-side-encryption-aws-kms-key-id"]);
        }
        if let Some(digest) = put.digest {
            wanted.extend(digest.algorithm.header());
            request = match digest.algorithm {
                Algorithm::Sha256 => request.checksum_sha256(digest.base64()),
                Algorithm::Crc64nvme => request.checksum_crc64_nvme(digest.base64()),
                Algorithm::Crc32c => request.checksum_crc32_c(digest.base64()),
                Algorithm::Crc32 => request.checksum_crc32(digest.base64()),
                Algorithm::Md5 => request.content_md5(digest.base64()),
                Algorithm::None => request,
            };
        }
        let request = request.presigned(window.clone()).await.map_err(|error| failed("signing a PUT", &error))?;
        answer("PUT", &request, &wanted, window.expires())
    }

    pub(super) async fn part(
        &self,
        place: &Place,
        s3_upload_id: &str,
        number: u32,
        size_bytes: u64,
        sha256: Option<&Sha256>,
        expires_in: Duration,
    ) -> Result<Signed, Error> {
        let (client, window) = self.window(expires_in).await?;
        let request = client
            .upload_part()
            .bucket(&place.bucket)
            .key(&place.key)
            .upload_id(s3_upload_id)
            .part_number(i32::try_from(number).unwrap_or(i32::MAX))
            .content_length(length(size_bytes))
            .set_checksum_sha256(sha256.map(Sha256::base64))
            .presigned(window.clone())
            .await
            .map_err(|error| failed("signing a part", &error))?;
        let mut wanted = vec!["content-length"];
        wanted.extend(sha256.and_then(|_| Algorithm::Sha256.header()));
        answer("PUT", &request, &wanted, window.expires())
    }

    /// A client that signs, and how long what it signs will live.
    async fn window(&self, asked: Duration) -> Result<(Client, PresigningConfig), Error> {
        let mut held = self.held.lock().await;
        let now = SystemTime::now();
        if held.as_ref().is_none_or(|held| held.renew_at <= now) {
            self.renew(&mut held, now).await?;
        }
        let held = held.as_ref().ok_or_else(|| Error::Unavailable("there are no credentials".to_owned()))?;
        let left = match held.expires_at {
            Some(end) => end.duration_since(now).unwrap_or_default().saturating_sub(MARGIN),
            None => LONGEST,
        };
        // S3 counts whole seconds; rounding up would outlive the session.
        let expires_in = Duration::from_secs(asked.min(left).min(LONGEST).as_secs());
        if expires_in.is_zero() {
            return Err(Error::Unavailable(format!("a URL would live {} ms: asked {} ms", left.as_millis(), asked.as_millis())));
        }
        let window = PresigningConfig::builder().start_time(now).expires_in(expires_in).build();
        Ok((held.client.clone(), window.map_err(|error| Error::Settings(chain(&error)))?))
    }

    /// Asks the source again; its failure is one only once the old credentials cannot sign any more.
    async fn renew(&self, held: &mut Option<Held>, now: SystemTime) -> Result<(), Error> {
        let failure = match tokio::time::timeout(SOURCE_TIMEOUT, self.source.provide_credentials()).await {
            Ok(Ok(credentials)) => {
                *held = Some(self.hold(credentials, now));
                return Ok(());
            }
            Ok(Err(error)) => chain(&error),
            Err(_) => format!("no answer in {} s", SOURCE_TIMEOUT.as_secs()),
        };
        match held {
            Some(held) if held.expires_at.is_none_or(|end| end > now + MARGIN) => {
                held.renew_at = now + RENEW_PAUSE;
                Ok(())
            }
            _ => Err(Error::Unavailable(format!("there are no credentials: {failure}"))),
        }
    }

    fn hold(&self, credentials: Credentials, now: SystemTime) -> Held {
        let expires_at = credentials.expiry();
        let renew_at = match expires_at {
            Some(end) => end.checked_sub(RENEW_BEFORE).filter(|early| *early > now).unwrap_or(now + RENEW_PAUSE),
            None => now + REREAD,
        };
        // The credential is at hand; the SDK's cache would only keep each old one.
        let config = self.config.clone().credentials_provider(credentials).identity_cache(IdentityCache::no_cache());
        let client = Client::from_conf(config.build());
        Held { client, expires_at, renew_at }
    }
}

/// Takes the SDK's answer apart, and refuses one whose signature does not cover exactly what must be sent.
fn answer(method: &'static str, request: &PresignedRequest, wanted: &[&str], expires_in: Duration) -> Result<Signed, Error> {
    let headers: BTreeMap<String, String> = request
        .headers()
        .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
        .filter(|(name, _)| name != "host")
        .collect();
    let signed = signed_headers(request.uri());
    let is_covered = |name: &str| headers.contains_key(name) && signed.iter().any(|signed| signed == name);
    let is_whole = wanted.iter().all(|name| is_covered(name))
        && headers.keys().all(|name| is_covered(name))
        && signed.iter().all(|name| name == "host" || headers.contains_key(name));
    if request.method() != method || !is_whole {
        return Err(Error::Unsigned { signed, wanted: wanted.iter().map(|&name| name.to_owned()).collect() });
    }
    Ok(Signed { method, url: request.uri().to_owned(), headers, expires_in })
}

/// The names in `X-Amz-SignedHeaders`.
fn signed_headers(url: &str) -> Vec<String> {
    let query = url.split_once('?').map_or("", |(_, query)| query);
    let names = query.split('&').find_map(|pair| pair.strip_prefix("X-Amz-SignedHeaders=")).unwrap_or("");
    names.replace("%3B", ";").split(';').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

fn length(size_bytes: u64) -> i64 {
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

    fn place() -> Place {
        Place { bucket: "bucket".to_owned(), key: "acme/videos/lfs/1".to_owned() }
    }

    fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[tokio::test]
    async fn a_put_signs_every_promise_as_a_header() {
        let (place, digest) = (place(), Digest::from(Sha256::of(b"hello")));
        let put = Put {
            place: &place,
            token: "0190",
            content_type: "video/mp4",
            size_bytes: 5,
            digest: Some(&digest),
            kms_key_id: Some("key-1"),
        };
        let signed = objects().await.sign_put(&put, MINUTE).await.unwrap();
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
    async fn every_algorithm_signs_its_own_header() {
        let (objects, place) = (objects().await, place());
        for algorithm in Algorithm::ALL {
            let mut hasher = algorithm.hasher();
            hasher.update(b"hello");
            let digest = hasher.finish();
            let put =
                Put { place: &place, token: "0190", content_type: "a/b", size_bytes: 5, digest: Some(&digest), kms_key_id: None };
            let mut expected = map(&[
                ("content-length", "5"),
                ("content-type", "a/b"),
                ("if-none-match", "*"),
                ("x-amz-meta-lfs-upload-id", "0190"),
            ]);
            if let Some(header) = algorithm.header() {
                expected.insert(header.to_owned(), digest.base64());
            }
            assert_eq!(objects.sign_put(&put, MINUTE).await.unwrap().headers, expected, "{algorithm}");
        }
    }

    #[tokio::test]
    async fn a_part_signs_its_size_and_hash() {
        let (objects, place) = (objects().await, place());
        let sha256 = Sha256::of(b"hello");
        let signed = objects.sign_part(&place, "up load", 7, 5, Some(&sha256), MINUTE).await.unwrap();
        assert_eq!(signed.headers, map(&[("content-length", "5"), ("x-amz-checksum-sha256", &sha256.base64())]));
        assert!(signed.url.contains("partNumber=7&uploadId=up%20load"), "{}", signed.url);
        let signed = objects.sign_part(&place, "u", 7, 0, None, MINUTE).await.unwrap();
        assert_eq!(signed.headers, map(&[("content-length", "0")]));
    }

    #[tokio::test]
    async fn a_get_is_a_download_signed_by_the_broker() {
        let signed =
            objects().await.sign_get(&place(), Some("v1"), Some("a b.svg"), Some("image/svg+xml"), MINUTE).await.unwrap();
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
        let signed = objects().await.sign_get(&place(), None, None, Some("video/mp4"), MINUTE).await.unwrap();
        assert!(signed.url.contains("response-content-type=video%2Fmp4"), "{}", signed.url);
        let signed = objects().await.sign_get(&place(), None, None, None, MINUTE).await.unwrap();
        assert!(signed.url.contains("response-content-type=application%2Foctet-stream"), "{}", signed.url);
    }

    #[tokio::test]
    async fn a_url_ends_before_its_credentials() {
        let lives = |left: Option<u64>, asked: Duration| async move {
            let end = left.map(|seconds| SystemTime::now() + Duration::from_secs(seconds));
            let key = Credentials::new("TEMP", "secret", Some("session".to_owned()), end, "test");
            let config = aws_sdk_s3::Config::builder()
                .behavior_version(aws_config::BehaviorVersion::v2026_01_12())
                .region(aws_sdk_s3::config::Region::new("us-east-1"));
            let signer = Signer::new(config, SharedCredentialsProvider::new(key));
            let signed = signer.part(&place(), "u", 1, 5, None, asked).await?;
            assert!(signed.url.contains("X-Amz-Security-Token=session"));
            assert!(signed.url.contains(&format!("X-Amz-Expires={}&", signed.expires_in.as_secs())), "{}", signed.url);
            Ok::<u64, Error>(signed.expires_in.as_secs())
        };
        assert_eq!(lives(None, 10 * MINUTE).await.unwrap(), 600);
        assert_eq!(lives(Some(3600), 10 * MINUTE).await.unwrap(), 600);
        let short = lives(Some(100), 10 * MINUTE).await.unwrap();
        assert!((60..=70).contains(&short), "{short}");
        assert_eq!(lives(None, 30 * 24 * 60 * MINUTE).await.unwrap(), LONGEST.as_secs());
        assert!(matches!(lives(Some(20), MINUTE).await, Err(Error::Unavailable(_))));
        assert!(matches!(lives(None, Duration::from_millis(900)).await, Err(Error::Unavailable(_))));
    }
}
