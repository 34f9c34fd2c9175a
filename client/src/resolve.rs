//! Turns a record's value into a download: with the broker's signed URLs, or with direct access to S3.

use bytes::Bytes;

use crate::access::{Access, ObjectLocation};
use crate::api::ResolveOptions;
use crate::download::Download;
use crate::error::Error;
use crate::http::Client;
use crate::http_client::{Settings, http_client};
use crate::pointer::{NotAPointer, Pointer, looks_like_pointer};
use crate::retry::RetryReporter;
use crate::storage::StorageClient;
use crate::transfer::{Expected, UrlSigner};

/// The Java client's serializer uploads to a staging topic of this suffix.
const STAGING_SUFFIX: &str = ".lfs-staging";

/// How many ranges of a large object are read concurrently.
const DEFAULT_CONCURRENCY: usize = 4;

/// The content of a record's value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value<'a> {
    /// The data itself.
    Inline(&'a [u8]),
    /// A pointer to the data.
    Pointer(Pointer),
}

impl<'a> Value<'a> {
    /// Distinguishes data from pointers by the envelope's published rule.
    ///
    /// # Errors
    /// When the value begins like a pointer but is invalid. Returning it as data would hide that the data is missing.
    pub fn of(record_value: &'a [u8]) -> Result<Self, NotAPointer> {
        match looks_like_pointer(record_value) {
            true => Pointer::parse(record_value).map(Self::Pointer),
            false => Ok(Self::Inline(record_value)),
        }
    }
}

impl Client {
    /// Fetches the bytes of a record's pointer. They are verified while they are read.
    ///
    /// # Errors
    /// [`Error::NotAPointer`], [`Error::Forbidden`], [`Error::Gone`], [`Error::Missing`], and the errors of any call.
    pub async fn fetch(&self, value: &[u8]) -> Result<Download, Error> {
        self.fetch_version(value, None).await
    }

    /// Fetches one version of the object: the record's `lfs-version-id` header.
    ///
    /// # Errors
    /// As [`Client::fetch`].
    pub async fn fetch_version(&self, value: &[u8], version_id: Option<&str>) -> Result<Download, Error> {
        Resolver::from(self.clone()).fetch_version(value, version_id).await
    }

    /// Fetches the bytes of the pointer in a record of this topic; see [`Resolver::fetch_record`].
    ///
    /// # Errors
    /// As [`Resolver::fetch_record`].
    pub async fn fetch_record(&self, topic: &str, value: &[u8], version_id: Option<&str>) -> Result<Download, Error> {
        Resolver::from(self.clone()).fetch_record(topic, value, version_id).await
    }
}

/// Fetches the bytes of pointers: with URLs from a broker, or directly from S3. Cloning is cheap and shares the
/// connections.
///
/// ```no_run
/// use lfs_broker_client::{Access, Client, Keys, Resolver};
///
/// # async fn fetch(record_value: &[u8]) -> Result<(), lfs_broker_client::Error> {
/// // With a broker, the reader needs a token and no S3 credentials.
/// let with_broker = Resolver::from(Client::new("http://127.0.0.1:8080")?.with_token("…"));
/// // With S3 credentials, the reader needs no broker. Only pointers into these buckets and prefixes are followed.
/// let with_keys = Resolver::with_access(Access::with_keys(Keys::from_environment()?).allow("lfs", "acme/"))?;
/// with_keys.fetch(record_value).await?.to_file("order-17.mp4").await?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Resolver {
    storage_client: StorageClient,
    signing_method: SigningMethod,
    concurrency: usize,
}

#[derive(Debug, Clone)]
enum SigningMethod {
    Broker(Client),
    Access(Access),
}

impl From<Client> for Resolver {
    /// Requests a signed URL from the broker for each pointer.
    fn from(client: Client) -> Self {
        Self {
            storage_client: client.storage_client(),
            signing_method: SigningMethod::Broker(client),
            concurrency: DEFAULT_CONCURRENCY,
        }
    }
}

impl Resolver {
    /// Fetches directly from S3, without a broker.
    ///
    /// # Errors
    /// When no HTTP client can be built.
    pub fn with_access(access: Access) -> Result<Self, Error> {
        let (settings, retry_reporter) = (Settings::default(), RetryReporter::default());
        let storage_client = StorageClient { http: http_client()?, settings, retry_reporter };
        Ok(Self { storage_client, signing_method: SigningMethod::Access(access), concurrency: DEFAULT_CONCURRENCY })
    }

    /// Returns the resolver with other timeouts and retries.
    #[must_use]
    pub fn with_settings(mut self, settings: Settings) -> Self {
        self.storage_client.settings = settings;
        self
    }

    pub(crate) fn settings(&self) -> Settings {
        self.storage_client.settings
    }

    /// Returns the resolver with this number of concurrent ranges for a large object (default 4), 8 MiB of memory each.
    /// With 1, the object comes in one stream.
    #[must_use]
    pub fn with_concurrency(mut self, concurrency: usize) -> Self {
        self.concurrency = concurrency.max(1);
        self
    }

    /// Fetches the bytes of a record's pointer. They are verified while they are read.
    ///
    /// # Errors
    /// [`Error::NotAPointer`], [`Error::Forbidden`], [`Error::Gone`], [`Error::Missing`], and the errors of any call.
    pub async fn fetch(&self, value: &[u8]) -> Result<Download, Error> {
        self.fetch_version(value, None).await
    }

    /// Fetches one version of the object: the record's `lfs-version-id` header.
    ///
    /// # Errors
    /// As [`Resolver::fetch`].
    pub async fn fetch_version(&self, value: &[u8], version_id: Option<&str>) -> Result<Download, Error> {
        self.fetch_for_topic(None, value, version_id).await
    }

    /// Fetches the bytes of the pointer in a record of this topic. The broker refuses a pointer that was copied from
    /// another topic: the upload must belong to this topic, or to `<topic>.lfs-staging`, where the Java serializer
    /// uploads. With direct access to S3, only the allowed buckets and prefixes are checked.
    ///
    /// # Errors
    /// As [`Resolver::fetch`], and the problem `pointer-forbidden`.
    pub async fn fetch_record(&self, topic: &str, value: &[u8], version_id: Option<&str>) -> Result<Download, Error> {
        self.fetch_for_topic(Some(topic), value, version_id).await
    }

    async fn fetch_for_topic(&self, topic: Option<&str>, value: &[u8], version_id: Option<&str>) -> Result<Download, Error> {
        let pointer = Pointer::parse_any_order(value)?;
        let topic = topic.map(|topic| owning_topic(topic, &pointer));
        let version_id = version_id.map(str::to_owned);
        let signer = match &self.signing_method {
            SigningMethod::Broker(client) => UrlSigner::Broker {
                client: client.clone(),
                value: Bytes::copy_from_slice(value),
                options: ResolveOptions { version_id, topic, validate: false },
            },
            SigningMethod::Access(access) => {
                let location = ObjectLocation { bucket: pointer.bucket.clone(), key: pointer.key.clone(), version_id };
                UrlSigner::Access { access: access.clone(), location }
            }
        };
        let expected = Expected { size: Some(pointer.size), limit: pointer.size, digest: pointer.digest() };
        Download::start(self.storage_client.clone(), signer, expected, self.concurrency, Some(pointer)).await
    }

    /// Fetches an object by its name, directly from S3. Nothing declares its size or digest, so the bytes are not
    /// verified. They are limited to `limit` bytes, and all come from the same object.
    ///
    /// # Errors
    /// [`Error::Forbidden`], [`Error::Missing`], [`Error::TooLarge`], and [`Error::Invalid`] without direct access to S3.
    pub async fn fetch_object(&self, location: ObjectLocation, limit: u64) -> Result<Download, Error> {
        let SigningMethod::Access(access) = &self.signing_method else {
            return Err(Error::Invalid("an object without a pointer needs direct access to S3".to_owned()));
        };
        let signer = UrlSigner::Access { access: access.clone(), location };
        Download::start(self.storage_client.clone(), signer, Expected { size: None, limit, digest: None }, 1, None).await
    }
}

/// The topic that the object must belong to: `topic` or its staging topic.
fn owning_topic(topic: &str, pointer: &Pointer) -> String {
    let staging = format!("{topic}{STAGING_SUFFIX}");
    if pointer.key.contains(&format!("/{staging}/lfs/")) { staging } else { topic.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pointer_belongs_to_the_records_topic_or_to_its_staging_topic() {
        let owning_topic = |key: &str| {
            owning_topic(
                "t",
                &Pointer::parse(format!(r#"{{"kfs_lfs":1,"bucket":"b","key":"{key}","size":1}}"#).as_bytes()).unwrap(),
            )
        };
        assert_eq!(owning_topic("acme/t/lfs/2026/x"), "t");
        assert_eq!(owning_topic("acme/other/lfs/2026/x"), "t");
        assert_eq!(owning_topic("acme/t.lfs-staging/lfs/2026/x"), "t.lfs-staging");
        assert_eq!(owning_topic("acme/other.lfs-staging/lfs/2026/x"), "t");
    }

    #[test]
    fn an_invalid_pointer_is_an_error_and_not_data() {
        assert_eq!(Value::of(b"plain"), Ok(Value::Inline(b"plain")));
        assert_eq!(Value::of(b"{\"a\":1}"), Ok(Value::Inline(b"{\"a\":1}")));
        let json = br#"{"kfs_lfs":1,"bucket":"b","key":"k","size":1}"#;
        assert!(matches!(Value::of(json), Ok(Value::Pointer(pointer)) if pointer.size == 1));
        assert!(Value::of(br#"{"kfs_lfs":1,"bucket":"b"}"#).is_err());
    }
}
