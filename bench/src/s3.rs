//! Direct requests to S3 with presigned URLs: the limit of every upload.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use aws_credential_types::Credentials;
use aws_sigv4::http_request::{
    PercentEncodingMode, SignableBody, SignableRequest, SignatureLocation, SigningSettings, UriPathNormalizationMode, sign,
};
use aws_sigv4::sign::v4;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use hyper::Method;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use sha2::{Digest as _, Sha256};
use tokio::task::JoinSet;

use crate::Failure;
use crate::http::HttpClient;

/// How many parts are sent at the same time, as the client of the broker does.
pub(crate) const CONCURRENT_PARTS: usize = 4;
/// The broker's default part size.
pub(crate) const PART_BYTES: usize = 16 << 20;
const REGION: &str = "us-east-1";
const URL_LIFETIME: Duration = Duration::from_secs(3600);
/// The characters that a signed query does not percent-encode.
const QUERY_ENCODE_SET: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// Signs requests to one bucket.
#[derive(Clone)]
pub(crate) struct Bucket {
    /// The URL of the bucket, without a slash at its end.
    url: Arc<str>,
    credentials: Credentials,
}

/// Base64 of the SHA-256 of some bytes, as S3's checksum headers carry it.
pub(crate) fn sha256_base64(bytes: &[u8]) -> String {
    BASE64.encode(Sha256::digest(bytes))
}

impl Bucket {
    /// The bucket `name` behind `endpoint`.
    pub(crate) fn new(endpoint: &str, name: &str, access_key_id: &str, secret_access_key: &str) -> Self {
        let credentials = Credentials::new(access_key_id, secret_access_key, None, None, "bench");
        Self { url: format!("{}/{name}", endpoint.trim_end_matches('/')).into(), credentials }
    }

    /// Presigns a request. `target` is the key with its query, percent-encoded. The request must carry `headers`.
    pub(crate) fn presign(&self, method: &str, target: &str, headers: &[(&str, &str)]) -> Result<String, Failure> {
        let signing = |error: &dyn std::fmt::Display| Failure(format!("cannot sign {method} {target}: {error}"));
        let identity = self.credentials.clone().into();
        let mut settings = SigningSettings::default();
        settings.signature_location = SignatureLocation::QueryParams;
        settings.expires_in = Some(URL_LIFETIME);
        settings.percent_encoding_mode = PercentEncodingMode::Single;
        settings.uri_path_normalization_mode = UriPathNormalizationMode::Disabled;
        let parameters = v4::SigningParams::builder()
            .identity(&identity)
            .region(REGION)
            .name("s3")
            .time(SystemTime::now())
            .settings(settings)
            .build()
            .map_err(|error| signing(&error))?
            .into();
        let mut url = match target {
            "" => self.url.to_string(),
            _ => format!("{}/{target}", self.url),
        };
        let request = SignableRequest::new(method, url.clone(), headers.iter().copied(), SignableBody::UnsignedPayload);
        let signed = sign(request.map_err(|error| signing(&error))?, &parameters).map_err(|error| signing(&error))?;
        let mut separator = if url.contains('?') { '&' } else { '?' };
        for (name, value) in signed.into_parts().0.into_parts().1 {
            url.push_str(&format!("{separator}{name}={}", utf8_percent_encode(&value, QUERY_ENCODE_SET)));
            separator = '&';
        }
        Ok(url)
    }

    /// Creates the bucket.
    pub(crate) async fn create(&self) -> Result<(), Failure> {
        let url = self.presign("PUT", "", &[])?;
        HttpClient::default().send(Method::PUT, &url, &[], Bytes::new()).await?.expect(&[200]).map(drop)
    }

    /// PUTs a new object with the headers that the broker's URLs sign: type, checksum and `If-None-Match`.
    pub(crate) async fn put(&self, http: &mut HttpClient, key: &str, bytes: &Bytes, sha256_base64: &str) -> Result<(), Failure> {
        let headers = [
            ("content-type", "application/octet-stream"),
            ("if-none-match", "*"),
            ("x-amz-checksum-sha256", sha256_base64),
            ("x-amz-meta-lfs-upload-id", key),
        ];
        let url = self.presign("PUT", key, &headers)?;
        http.send(Method::PUT, &url, &headers, bytes.clone()).await?.expect(&[200]).map(drop)
    }

    /// Asks for the size and the checksum of an object.
    pub(crate) async fn head(&self, http: &mut HttpClient, key: &str) -> Result<(), Failure> {
        let headers = [("x-amz-checksum-mode", "ENABLED")];
        let url = self.presign("HEAD", key, &headers)?;
        http.send(Method::HEAD, &url, &headers, Bytes::new()).await?.expect(&[200]).map(drop)
    }

    /// Uploads `bytes` in parts, with a SHA-256 for each part, several parts at the same time.
    pub(crate) async fn put_in_parts(&self, key: &str, bytes: &Bytes) -> Result<(), Failure> {
        let mut http = HttpClient::default();
        let headers = [("x-amz-checksum-algorithm", "SHA256")];
        let url = self.presign("POST", &format!("{key}?uploads="), &headers)?;
        let created = http.send(Method::POST, &url, &headers, Bytes::new()).await?.expect(&[200])?;
        let text = String::from_utf8_lossy(&created.body).into_owned();
        let upload_id = text.split_once("<UploadId>").and_then(|(_, rest)| rest.split_once("</UploadId>"));
        let (upload_id, _) = upload_id.ok_or_else(|| Failure("S3's answer has no UploadId".into()))?;
        let upload_id = utf8_percent_encode(upload_id, QUERY_ENCODE_SET).to_string();

        let mut tasks = JoinSet::new();
        for first in 0..CONCURRENT_PARTS {
            let (bucket, key, upload_id, bytes) = (self.clone(), key.to_owned(), upload_id.clone(), bytes.clone());
            tasks.spawn(async move { bucket.put_every_fourth(&key, &upload_id, &bytes, first).await });
        }
        let mut parts = Vec::new();
        while let Some(joined) = tasks.join_next().await {
            parts.extend(joined.map_err(|error| Failure(format!("a part failed: {error}")))??);
        }
        parts.sort_by_key(|(number, _)| *number);
        let list: String = parts.into_iter().map(|(_, xml)| xml).collect();
        let body = format!("<CompleteMultipartUpload>{list}</CompleteMultipartUpload>");
        let url = self.presign("POST", &format!("{key}?uploadId={upload_id}"), &[])?;
        http.send(Method::POST, &url, &[], body.into()).await?.expect(&[200]).map(drop)
    }

    /// Sends the parts `first`, `first + 4`, ... one after the other. Returns their numbers and their entries in the list of
    /// parts.
    async fn put_every_fourth(
        &self,
        key: &str,
        upload_id: &str,
        bytes: &Bytes,
        first: usize,
    ) -> Result<Vec<(usize, String)>, Failure> {
        let (mut http, mut parts) = (HttpClient::default(), Vec::new());
        for index in (first..bytes.len().div_ceil(PART_BYTES)).step_by(CONCURRENT_PARTS) {
            let part = bytes.slice(index * PART_BYTES..bytes.len().min((index + 1) * PART_BYTES));
            let number = index + 1;
            let hashed = part.clone();
            let sha256 = tokio::task::spawn_blocking(move || sha256_base64(&hashed)).await;
            let sha256 = sha256.map_err(|error| Failure(format!("hashing a part failed: {error}")))?;
            let headers = [("x-amz-checksum-sha256", sha256.as_str())];
            let url = self.presign("PUT", &format!("{key}?partNumber={number}&uploadId={upload_id}"), &headers)?;
            let response = http.send(Method::PUT, &url, &headers, part).await?.expect(&[200])?;
            let etag = response.header("etag").unwrap_or_default().to_owned();
            let checksum = format!("<ChecksumSHA256>{sha256}</ChecksumSHA256>");
            parts.push((number, format!("<Part><PartNumber>{number}</PartNumber><ETag>{etag}</ETag>{checksum}</Part>")));
        }
        Ok(parts)
    }
}
