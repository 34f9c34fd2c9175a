//! Presigned GETs with an access key: AWS Signature Version 4 in the query.

use std::fmt;
use std::time::{Duration, SystemTime};

use aws_credential_types::Credentials;
use aws_sigv4::http_request::{
    PercentEncodingMode, SignableBody, SignableRequest, SignatureLocation, SigningSettings, UriPathNormalizationMode, sign,
};
use aws_sigv4::sign::v4;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use reqwest::Url;

use super::ObjectLocation;
use crate::api::SignedRequest;
use crate::error::Error;

/// The lifetime of a signature. It is enough for one range on a slow connection. After it, the next request is signed
/// again.
const SIGNATURE_LIFETIME: Duration = Duration::from_secs(900);

/// The characters that S3 does not percent-encode in a path (Amazon S3 API Reference, "Authenticating Requests").
const PATH_ENCODE_SET: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~').remove(b'/');
const QUERY_ENCODE_SET: &AsciiSet = &PATH_ENCODE_SET.add(b'/');

/// An S3 access key, and the region and endpoint that it is for.
#[derive(Clone, PartialEq, Eq)]
pub struct Keys {
    /// The key's id.
    pub access_key_id: String,
    /// The secret access key.
    pub secret_access_key: String,
    /// The session token of temporary credentials.
    pub session_token: Option<String>,
    /// The region of the signature.
    pub region: String,
    /// The endpoint of a store that expects the bucket in the path. When absent, Amazon S3.
    pub endpoint: Option<String>,
}

impl fmt::Debug for Keys {
    /// Omits the secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keys")
            .field("access_key_id", &self.access_key_id)
            .field("region", &self.region)
            .field("endpoint", &self.endpoint)
            .finish_non_exhaustive()
    }
}

impl Keys {
    /// Reads the environment variables of the AWS tools: `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`,
    /// `AWS_SESSION_TOKEN`, `AWS_REGION` (`us-east-1` when absent) and `AWS_ENDPOINT_URL_S3`.
    ///
    /// # Errors
    /// When one of the first two is not set.
    pub fn from_environment() -> Result<Self, Error> {
        let get = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let required = |name: &str| get(name).ok_or_else(|| Error::Invalid(format!("{name} is not set")));
        Ok(Self {
            access_key_id: required("AWS_ACCESS_KEY_ID")?,
            secret_access_key: required("AWS_SECRET_ACCESS_KEY")?,
            session_token: get("AWS_SESSION_TOKEN"),
            region: get("AWS_REGION").unwrap_or_else(|| "us-east-1".to_owned()),
            endpoint: get("AWS_ENDPOINT_URL_S3"),
        })
    }

    /// Presigns a GET of `location` for 15 minutes.
    pub(super) fn sign(&self, location: &ObjectLocation) -> Result<SignedRequest, Error> {
        self.presign(self.url(location)?, SIGNATURE_LIFETIME, SystemTime::now())
    }

    fn presign(&self, mut url: Url, lifetime: Duration, now: SystemTime) -> Result<SignedRequest, Error> {
        let token = self.session_token.clone();
        let identity = Credentials::new(&self.access_key_id, &self.secret_access_key, token, None, "lfs-broker-client").into();
        let mut settings = SigningSettings::default();
        settings.signature_location = SignatureLocation::QueryParams;
        settings.expires_in = Some(lifetime);
        // S3 signs the path as it is sent, without normalization.
        settings.percent_encoding_mode = PercentEncodingMode::Single;
        settings.uri_path_normalization_mode = UriPathNormalizationMode::Disabled;
        let parameters = v4::SigningParams::builder()
            .identity(&identity)
            .region(&self.region)
            .name("s3")
            .time(now)
            .settings(settings)
            .build()
            .map_err(Error::signing)?
            .into();
        let request = SignableRequest::new("GET", url.as_str().to_owned(), std::iter::empty(), SignableBody::UnsignedPayload);
        let signed = sign(request.map_err(Error::signing)?, &parameters).map_err(Error::signing)?;
        let mut query = url.query().unwrap_or_default().to_owned();
        for (name, value) in signed.into_parts().0.into_parts().1 {
            let separator = if query.is_empty() { "" } else { "&" };
            query.push_str(&format!("{separator}{name}={}", utf8_percent_encode(&value, QUERY_ENCODE_SET)));
        }
        url.set_query(Some(&query));
        Ok(SignedRequest::get(url.as_str(), lifetime))
    }

    fn url(&self, ObjectLocation { bucket, key, version_id }: &ObjectLocation) -> Result<Url, Error> {
        // A bucket name with a dot does not match the certificate's wildcard, so it goes into the path.
        let (base, path) = match &self.endpoint {
            Some(endpoint) => (endpoint.trim_end_matches('/').to_owned(), format!("{bucket}/{key}")),
            None if bucket.contains('.') => (format!("https://s3.{}.amazonaws.com", self.region), format!("{bucket}/{key}")),
            None => (format!("https://{bucket}.s3.{}.amazonaws.com", self.region), key.clone()),
        };
        let version = match version_id {
            Some(version) => format!("?versionId={}", utf8_percent_encode(version, QUERY_ENCODE_SET)),
            None => String::new(),
        };
        let url = format!("{base}/{}{version}", utf8_percent_encode(&path, PATH_ENCODE_SET));
        url.parse().map_err(|error| Error::Invalid(format!("the S3 endpoint is not a URL: {error}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(endpoint: Option<&str>) -> Keys {
        Keys {
            access_key_id: "AKIAIOSFODNN7EXAMPLE".to_owned(),
            secret_access_key: "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY".to_owned(),
            session_token: None,
            region: "us-east-1".to_owned(),
            endpoint: endpoint.map(str::to_owned),
        }
    }

    fn location(bucket: &str, key: &str, version: Option<&str>) -> ObjectLocation {
        ObjectLocation { bucket: bucket.to_owned(), key: key.to_owned(), version_id: version.map(str::to_owned) }
    }

    #[test]
    fn urls_follow_the_endpoint_and_the_bucket() {
        let url = |endpoint, location: &ObjectLocation| keys(endpoint).url(location).unwrap().to_string();
        assert_eq!(url(None, &location("b", "a/ü 1+.bin", None)), "https://b.s3.us-east-1.amazonaws.com/a/%C3%BC%201%2B.bin");
        assert_eq!(url(None, &location("b.c", "k", None)), "https://s3.us-east-1.amazonaws.com/b.c/k");
        assert_eq!(url(Some("http://127.0.0.1:9/"), &location("b", "k", Some("v/1"))), "http://127.0.0.1:9/b/k?versionId=v%2F1");
        assert!(keys(Some("nowhere")).url(&location("b", "k", None)).is_err());
    }

    /// The example of the Amazon S3 API Reference, "Authenticating Requests: Using Query Parameters".
    #[test]
    fn a_get_has_the_signature_of_amazons_example() {
        let url = "https://examplebucket.s3.amazonaws.com/test.txt".parse().unwrap();
        // 2013-05-24T00:00:00Z
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_369_353_600);
        let signed = keys(None).presign(url, Duration::from_secs(86_400), now).unwrap();
        assert_eq!(
            signed.url,
            "https://examplebucket.s3.amazonaws.com/test.txt?X-Amz-Algorithm=AWS4-HMAC-SHA256\
             &X-Amz-Credential=AKIAIOSFODNN7EXAMPLE%2F20130524%2Fus-east-1%2Fs3%2Faws4_request\
             &X-Amz-Date=20130524T000000Z&X-Amz-Expires=86400&X-Amz-SignedHeaders=host\
             &X-Amz-Signature=aeeed9bbccd4d02ee5c0109b86d86835f995330da4c265957d157751f604d404"
        );
        assert!(!format!("{signed:?} {:?}", keys(None)).contains("EXAMPLEKEY"));
    }
}
