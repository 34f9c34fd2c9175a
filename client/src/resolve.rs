//! From a record's value to a download: by the broker's signed URLs, or with own access to S3.

use bytes::Bytes;

use crate::access::{Access, Place};
use crate::api::ResolveOptions;
use crate::download::Download;
use crate::error::Error;
use crate::http::{Client, Settings, http};
use crate::pointer::{NotAPointer, Pointer, looks_like_pointer};
use crate::storage::Wire;
use crate::transfer::{Promise, Target};

/// What the serializer of our Java client uploads goes to a topic of its own, which is named so after the record's.
const STAGING: &str = ".lfs-staging";

/// Pieces of a large object that come at the same time.
const LANES: usize = 4;

/// What a record carries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value<'a> {
    /// The data itself.
    Inline(&'a [u8]),
    /// A pointer to the data.
    Pointer(Pointer),
}

impl<'a> Value<'a> {
    /// Tells data from pointers by the envelope's published rule.
    ///
    /// # Errors
    /// When the value begins like a pointer but cannot be read as one: handing it on as data would hide the loss.
    pub fn of(record_value: &'a [u8]) -> Result<Self, NotAPointer> {
        match looks_like_pointer(record_value) {
            true => Pointer::parse(record_value).map(Self::Pointer),
            false => Ok(Self::Inline(record_value)),
        }
    }
}

impl Client {
    /// Fetches the bytes that a record's value points to. They are verified while they are read.
    ///
    /// # Errors
    /// [`Error::NotAPointer`], [`Error::Forbidden`], [`Error::Gone`], [`Error::Missing`], and what any call may meet.
    pub async fn fetch(&self, value: &[u8]) -> Result<Download, Error> {
        self.fetch_version(value, None).await
    }

    /// Fetches a certain version: the record's `lfs-version-id` header.
    ///
    /// # Errors
    /// As [`Client::fetch`].
    pub async fn fetch_version(&self, value: &[u8], version_id: Option<&str>) -> Result<Download, Error> {
        Resolver::from(self.clone()).fetch_version(value, version_id).await
    }

    /// Fetches what a record of this topic points to; see [`Resolver::fetch_record`].
    ///
    /// # Errors
    /// As [`Resolver::fetch_record`].
    pub async fn fetch_record(&self, topic: &str, value: &[u8], version_id: Option<&str>) -> Result<Download, Error> {
        Resolver::from(self.clone()).fetch_record(topic, value, version_id).await
    }
}

/// Fetches what pointers point to: through a broker, or straight from S3. Cloning is cheap and shares the connections.
///
/// ```no_run
/// use lfs_broker_client::{Access, Client, Keys, Resolver};
///
/// # async fn fetch(record_value: &[u8]) -> Result<(), lfs_broker_client::Error> {
/// // Whoever asks the broker needs a token, and no right in S3.
/// let asking = Resolver::from(Client::new("http://127.0.0.1:8080")?.with_token("…"));
/// // Whoever has keys needs no broker. Pointers are followed into these buckets and prefixes only.
/// let own = Resolver::with_access(Access::with_keys(Keys::from_environment()?).allow("lfs", "acme/"))?;
/// own.fetch(record_value).await?.to_file("order-17.mp4").await?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Resolver {
    wire: Wire,
    way: Way,
    lanes: usize,
}

#[derive(Debug, Clone)]
enum Way {
    Broker(Client),
    Own(Access),
}

impl From<Client> for Resolver {
    /// Asks the broker for a signed URL each time.
    fn from(client: Client) -> Self {
        Self { wire: client.wire(), way: Way::Broker(client), lanes: LANES }
    }
}

impl Resolver {
    /// Fetches with own access to S3, without a broker.
    ///
    /// # Errors
    /// When no HTTP client can be built.
    pub fn with_access(access: Access) -> Result<Self, Error> {
        let wire = Wire { http: http()?, settings: Settings::default() };
        Ok(Self { wire, way: Way::Own(access), lanes: LANES })
    }

    /// The same with other patience.
    #[must_use]
    pub fn with_settings(mut self, settings: Settings) -> Self {
        self.wire.settings = settings;
        self
    }

    pub(crate) fn settings(&self) -> Settings {
        self.wire.settings
    }

    /// The same with so many pieces of a large object under way at a time (4 otherwise), 8 MiB of memory each. With 1
    /// it comes in one stream.
    #[must_use]
    pub fn with_concurrency(mut self, lanes: usize) -> Self {
        self.lanes = lanes.max(1);
        self
    }

    /// Fetches the bytes that a record's value points to. They are verified while they are read.
    ///
    /// # Errors
    /// [`Error::NotAPointer`], [`Error::Forbidden`], [`Error::Gone`], [`Error::Missing`], and what any call may meet.
    pub async fn fetch(&self, value: &[u8]) -> Result<Download, Error> {
        self.fetch_version(value, None).await
    }

    /// Fetches a certain version: the record's `lfs-version-id` header.
    ///
    /// # Errors
    /// As [`Resolver::fetch`].
    pub async fn fetch_version(&self, value: &[u8], version_id: Option<&str>) -> Result<Download, Error> {
        self.fetch_bound(None, value, version_id).await
    }

    /// Fetches what a record of this topic points to. The broker refuses a pointer that was copied from another topic: only
    /// the topic's own uploads are followed, and those of `<topic>.lfs-staging`, where our Java serializer puts them. With
    /// own access to S3 the buckets and prefixes that it allows decide, as ever.
    ///
    /// # Errors
    /// As [`Resolver::fetch`], and the problem `pointer-forbidden`.
    pub async fn fetch_record(&self, topic: &str, value: &[u8], version_id: Option<&str>) -> Result<Download, Error> {
        self.fetch_bound(Some(topic), value, version_id).await
    }

    async fn fetch_bound(&self, topic: Option<&str>, value: &[u8], version_id: Option<&str>) -> Result<Download, Error> {
        let pointer = Pointer::parse_any_order(value)?;
        let topic = topic.map(|topic| owner(topic, &pointer));
        let version_id = version_id.map(str::to_owned);
        let target = match &self.way {
            Way::Broker(client) => Target::Broker {
                client: client.clone(),
                value: Bytes::copy_from_slice(value),
                options: ResolveOptions { version_id, topic, validate: false },
            },
            Way::Own(access) => {
                let place = Place { bucket: pointer.bucket.clone(), key: pointer.key.clone(), version_id };
                Target::Own { access: access.clone(), place }
            }
        };
        let promise = Promise { size: Some(pointer.size), limit: pointer.size, digest: pointer.digest() };
        Download::begin(self.wire.clone(), target, promise, self.lanes, Some(pointer)).await
    }

    /// Fetches an object by its name alone, with own access. Nothing vouches for its bytes: they cannot be verified, only
    /// kept to at most `limit` of them, and to those of one object.
    ///
    /// # Errors
    /// [`Error::Forbidden`], [`Error::Missing`], [`Error::TooLarge`], and [`Error::Invalid`] without own access.
    pub async fn fetch_object(&self, place: Place, limit: u64) -> Result<Download, Error> {
        let Way::Own(access) = &self.way else {
            return Err(Error::Invalid("an object without a pointer needs own access to S3".to_owned()));
        };
        let target = Target::Own { access: access.clone(), place };
        Download::begin(self.wire.clone(), target, Promise { size: None, limit, digest: None }, 1, None).await
    }
}

/// The topic that a pointer's object must belong to where it was read from `topic`.
fn owner(topic: &str, pointer: &Pointer) -> String {
    let staging = format!("{topic}{STAGING}");
    if pointer.key.contains(&format!("/{staging}/lfs/")) { staging } else { topic.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_bound_to_its_own_topic_or_to_the_staging_topic_of_that_one() {
        let owner = |key: &str| {
            owner("t", &Pointer::parse(format!(r#"{{"kfs_lfs":1,"bucket":"b","key":"{key}","size":1}}"#).as_bytes()).unwrap())
        };
        assert_eq!(owner("acme/t/lfs/2026/x"), "t");
        assert_eq!(owner("acme/other/lfs/2026/x"), "t");
        assert_eq!(owner("acme/t.lfs-staging/lfs/2026/x"), "t.lfs-staging");
        assert_eq!(owner("acme/other.lfs-staging/lfs/2026/x"), "t");
    }

    #[test]
    fn a_value_is_data_or_a_pointer_and_never_a_broken_pointer_as_data() {
        assert_eq!(Value::of(b"plain"), Ok(Value::Inline(b"plain")));
        assert_eq!(Value::of(b"{\"a\":1}"), Ok(Value::Inline(b"{\"a\":1}")));
        let json = br#"{"kfs_lfs":1,"bucket":"b","key":"k","size":1}"#;
        assert!(matches!(Value::of(json), Ok(Value::Pointer(pointer)) if pointer.size == 1));
        assert!(Value::of(br#"{"kfs_lfs":1,"bucket":"b"}"#).is_err());
    }
}
