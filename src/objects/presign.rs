//! Presigned URLs: the requests that a client may send to S3, and for how long.
//!
//! Every declared property is signed as a header, because S3 enforces only signed headers: a checksum in the query
//! protects nothing. The SDK's signer signs every header of a request; a test compares the URLs with those of the whole SDK.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fmt::{self, Write as _};
use std::time::{Duration, SystemTime};

use aws_sdk_s3::Client;
use aws_sdk_s3::config::{Builder, Credentials, IdentityCache, ProvideCredentials as _, SharedCredentialsProvider};
use aws_sdk_s3::presigning::PresigningConfig;
use aws_sigv4::http_request::{
    self, PercentEncodingMode, SignableBody, SignableRequest, SignatureLocation, SigningSettings, UriPathNormalizationMode,
};
use aws_sigv4::sign::v4;
use lfs_broker_client::checksum::{Algorithm, Digest, Sha256};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
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
        let mut query: Query = Vec::with_capacity(5);
        query.extend(version_id.map(|version_id| ("versionId", version_id.into())));
        query.push(("response-content-disposition", content_disposition(filename).into()));
        query.push(("response-content-type", safe_content_type(content_type).into()));
        // The browser must save the verified bytes. With another encoding it would decode them first.
        query.push(("response-content-encoding", "identity".into()));
        query.push(("x-id", "GetObject".into()));
        self.0.download_signer.sign("GET", location, query, BTreeMap::new(), expires_in).await
    }
}

/// The parameters of a URL, before they are encoded.
type Query<'a> = Vec<(&'static str, Cow<'a, str>)>;

/// Signs for one endpoint with one credential.
pub(super) struct Signer {
    config: Builder,
    source: SharedCredentialsProvider,
    cached: Mutex<Option<CachedCredentials>>,
}

/// A fixed credential, so that the expiry of its signatures is known, and what the SDK says about requests with it.
struct CachedCredentials {
    credentials: Credentials,
    client: Client,
    endpoints: HashMap<String, Endpoint>,
    expires_at: Option<SystemTime>,
    renew_at: SystemTime,
}

/// Where the SDK sends requests for a bucket.
#[derive(Clone)]
struct Endpoint {
    /// The URL of the bucket, to which a key is appended.
    bucket_url: String,
    /// The region in the signature.
    region: String,
}

/// How requests are signed now.
struct Signing {
    credentials: Credentials,
    endpoint: Endpoint,
    settings: SigningSettings,
    now: SystemTime,
    expires_in: Duration,
}

/// All bytes that a URL encodes: all but the unreserved characters of RFC 3986, 2.3.
const IN_QUERY: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');
/// In a path the slash separates segments.
const IN_PATH: &AsciiSet = &IN_QUERY.remove(b'/');

impl Signer {
    pub(super) fn new(config: Builder, source: SharedCredentialsProvider) -> Self {
        Self { config, source, cached: Mutex::new(None) }
    }

    pub(super) async fn put(&self, object: &NewObject<'_>, expires_in: Duration) -> Result<PresignedUrl, Error> {
        let mut headers = BTreeMap::from([
            ("content-length".to_owned(), object.size_bytes.to_string()),
            ("content-type".to_owned(), object.content_type.to_owned()),
            ("if-none-match".to_owned(), "*".to_owned()),
            (format!("x-amz-meta-{TOKEN_KEY}"), object.token.to_owned()),
        ]);
        if let Some(key_id) = object.kms_key_id {
            headers.insert("x-amz-server-side-encryption".to_owned(), "aws:kms".to_owned());
            headers.insert("x-amz-server-side-encryption-aws-kms-key-id".to_owned(), key_id.to_owned());
        }
        if let Some((header, digest)) = object.digest.and_then(|digest| Some((digest.algorithm.header()?, digest))) {
            headers.insert(header.to_owned(), digest.base64());
        }
        self.sign("PUT", object.location, vec![("x-id", "PutObject".into())], headers, expires_in).await
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
        let query =
            vec![("x-id", "UploadPart".into()), ("partNumber", number.to_string().into()), ("uploadId", s3_upload_id.into())];
        let mut headers = BTreeMap::from([("content-length".to_owned(), size_bytes.to_string())]);
        if let Some((header, sha256)) = Algorithm::Sha256.header().zip(sha256) {
            headers.insert(header.to_owned(), sha256.base64());
        }
        self.sign("PUT", location, query, headers, expires_in).await
    }

    /// Signs a request with all its headers.
    async fn sign(
        &self,
        method: &'static str,
        location: &ObjectLocation,
        query: Query<'_>,
        headers: BTreeMap<String, String>,
        expires_in: Duration,
    ) -> Result<PresignedUrl, Error> {
        let Signing { credentials, endpoint, settings, now, expires_in } = self.signing(&location.bucket, expires_in).await?;
        let mut url = format!("{}/{}", endpoint.bucket_url, utf8_percent_encode(&location.key, IN_PATH));
        let append = |url: &mut String, name: &str, value: &str| {
            let separator = if url.contains('?') { '&' } else { '?' };
            let _ = write!(url, "{separator}{}={}", utf8_percent_encode(name, IN_QUERY), utf8_percent_encode(value, IN_QUERY));
        };
        query.iter().for_each(|(name, value)| append(&mut url, name, value));
        let identity = credentials.into();
        let params = v4::SigningParams::builder().identity(&identity).region(&endpoint.region).name("s3").time(now);
        let params = params.settings(settings).build().map_err(|error| Error::Settings(error_chain(&error)))?.into();
        let signed_headers = headers.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        let signed = SignableRequest::new(method, url.as_str(), signed_headers, SignableBody::UnsignedPayload)
            .and_then(|request| http_request::sign(request, &params));
        let (instructions, _) = signed.map_err(|error| Error::Settings(error_chain(&error)))?.into_parts();
        instructions.params().iter().for_each(|(name, value)| append(&mut url, name, value));
        Ok(PresignedUrl { method, url, headers, expires_in })
    }

    /// The credential, the endpoint of a bucket, and the validity of signatures.
    async fn signing(&self, bucket: &str, requested: Duration) -> Result<Signing, Error> {
        let mut cached = self.cached.lock().await;
        let now = SystemTime::now();
        if cached.as_ref().is_none_or(|cached| cached.renew_at <= now) {
            self.renew(&mut cached, now).await?;
        }
        let cached = cached.as_mut().ok_or_else(|| Error::Unavailable("no s3 credentials are available".to_owned()))?;
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
        let endpoint = cached.endpoint(bucket).await?;
        // As the SDK signs for S3: a key is encoded once, and its dots are part of its name.
        let mut settings = SigningSettings::default();
        settings.signature_location = SignatureLocation::QueryParams;
        settings.expires_in = Some(expires_in);
        settings.percent_encoding_mode = PercentEncodingMode::Single;
        settings.uri_path_normalization_mode = UriPathNormalizationMode::Disabled;
        Ok(Signing { credentials: cached.credentials.clone(), endpoint, settings, now, expires_in })
    }

    /// Gets credentials from the source. A failure of the source is an error only if the old credentials can no longer sign.
    async fn renew(&self, cached: &mut Option<CachedCredentials>, now: SystemTime) -> Result<(), Error> {
        let failure = match tokio::time::timeout(SOURCE_TIMEOUT, self.source.provide_credentials()).await {
            Ok(Ok(credentials)) => {
                *cached = Some(self.cache(credentials, now));
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

    fn cache(&self, credentials: Credentials, now: SystemTime) -> CachedCredentials {
        let expires_at = credentials.expiry();
        let renew_at = match expires_at {
            Some(expires_at) => {
                expires_at.checked_sub(RENEW_BEFORE).filter(|early| *early > now).unwrap_or(now + RENEW_RETRY_INTERVAL)
            }
            None => now + REREAD_INTERVAL,
        };
        // The credential is fixed, so the SDK's cache would only keep each old credential in memory.
        let config = self.config.clone().credentials_provider(credentials.clone()).identity_cache(IdentityCache::no_cache());
        let client = Client::from_conf(config.build());
        CachedCredentials { credentials, client, endpoints: HashMap::new(), expires_at, renew_at }
    }
}

impl CachedCredentials {
    /// The endpoint of a bucket, from a URL that the SDK signs: it knows all rules of regions, paths and host names.
    async fn endpoint(&mut self, bucket: &str) -> Result<Endpoint, Error> {
        if let Some(endpoint) = self.endpoints.get(bucket) {
            return Ok(endpoint.clone());
        }
        const KEY: &str = "key";
        let presigning = PresigningConfig::expires_in(Duration::from_secs(1));
        let presigning = presigning.map_err(|error| Error::Settings(error_chain(&error)))?;
        let request = self.client.get_object().bucket(bucket).key(KEY).presigned(presigning).await;
        let request = request.map_err(|error| call_error("signing a GET", &error))?;
        let (url, query) = request.uri().split_once('?').unwrap_or((request.uri(), ""));
        // X-Amz-Credential is KEY/DATE/REGION/SERVICE/aws4_request (AWS, "Authenticating Requests: Using Query Parameters").
        let scope = query.split('&').find_map(|pair| pair.strip_prefix("X-Amz-Credential=")).unwrap_or_default();
        let endpoint = url.strip_suffix(&format!("/{KEY}")).zip(scope.rsplit("%2F").nth(2));
        let (bucket_url, region) = endpoint.ok_or_else(|| Error::Settings(format!("the SDK signed an unknown URL: {url}")))?;
        let endpoint = Endpoint { bucket_url: bucket_url.to_owned(), region: region.to_owned() };
        self.endpoints.insert(bucket.to_owned(), endpoint.clone());
        Ok(endpoint)
    }
}

#[cfg(test)]
#[path = "presign_tests.rs"]
mod tests;
