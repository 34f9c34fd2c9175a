//! A consumer's records opened: data as it came, pointers followed and verified, in one call and with any Kafka client.
//!
//! Two formats are known. A *pointer* is the record's value ([`mod@crate::pointer`]); its bytes are verified. A
//! *reference* is a record without a value whose header `S3-REF-FILE-PATH` names an object of a bucket that both sides
//! know; it names neither size nor checksum, so its bytes can be fetched, and not verified.

use std::path::Path;
use std::str::FromStr as _;

use bytes::Bytes;
use uuid::Uuid;

use crate::access::{Access, Place};
use crate::api::Integrity;
use crate::download::Download;
use crate::error::Error;
use crate::pointer::{NotAPointer, Pointer};
use crate::resolve::{Resolver, Value};
use crate::save::{Draft, Saved};

/// The header of a record whose bytes are in S3, as the claim check of other products writes it.
pub const REFERENCE_HEADER: &str = "S3-REF-FILE-PATH";

/// What S3 takes in one object: references name no size, so something else must end them.
const LARGEST_OBJECT: u64 = 5 << 40;

/// Opens records, whoever consumes them.
///
/// ```no_run
/// use lfs_broker_client::{Client, Consumer, consumer::Content};
///
/// # async fn each(topic: &str, value: Option<&[u8]>, headers: Vec<(&str, &[u8])>) -> Result<(), lfs_broker_client::Error> {
/// let consumer = Consumer::new(Client::new("http://127.0.0.1:8080")?.with_token("…"));
/// // For each record that the Kafka client hands over:
/// let message = consumer.open_record(topic, value, headers).await?;
/// println!("upload {:?}, proved by {:?}", message.metadata.upload_id, message.metadata.integrity);
/// match message.content {
///     Content::Nothing => println!("a tombstone"),
///     Content::Inline(bytes) => println!("{} bytes came with the record", bytes.len()),
///     // An `AsyncRead` and a `Stream` that fails where the bytes are not those that were promised.
///     Content::Pointer(download) | Content::Reference(download) => {
///         download.to_file("order-17.mp4").await?;
///     }
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Consumer {
    pointers: Resolver,
    references: Option<(Resolver, String)>,
}

/// A record, opened.
#[derive(Debug)]
pub struct Message<'a> {
    /// What the record says of itself.
    pub metadata: Metadata,
    /// Its bytes, or the way to them.
    pub content: Content<'a>,
}

/// What a record carries, or stands for.
#[derive(Debug)]
pub enum Content<'a> {
    /// No value: a tombstone, where the topic is compacted.
    Nothing,
    /// The value itself.
    Inline(&'a [u8]),
    /// The bytes behind a pointer, verified while they are read.
    Pointer(Download),
    /// The bytes behind a reference, which nothing vouches for.
    Reference(Download),
}

/// What the headers of a record say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Metadata {
    /// The upload at the broker (`lfs-upload-id`).
    pub upload_id: Option<Uuid>,
    /// How far the broker proved the bytes (`lfs-integrity`).
    pub integrity: Option<Integrity>,
    /// The object's version, in buckets that keep several (`lfs-version-id`).
    pub version_id: Option<String>,
    /// The trace that the upload belongs to (`traceparent`).
    pub traceparent: Option<String>,
    /// Every other header, in order: the producer's own.
    pub headers: Vec<(String, Vec<u8>)>,
}

/// What becomes of a record before anything is asked.
#[derive(Debug, PartialEq, Eq)]
enum Kind<'a> {
    Nothing,
    Inline(&'a [u8]),
    Pointer(&'a [u8]),
    Reference(String),
}

impl Consumer {
    /// Follows pointers by this resolver; a [`Client`](crate::Client) is one too.
    pub fn new(resolver: impl Into<Resolver>) -> Self {
        Self { pointers: resolver.into(), references: None }
    }

    /// Follows references as well, into this bucket. The access need allow nothing: the bucket is allowed here.
    ///
    /// # Errors
    /// When no HTTP client can be built.
    pub fn with_references(mut self, bucket: impl Into<String>, access: Access) -> Result<Self, Error> {
        let bucket = bucket.into();
        let resolver = Resolver::with_access(access.allow(bucket.clone(), ""))?;
        self.references = Some((resolver.with_settings(self.pointers.settings()), bucket));
        Ok(self)
    }

    /// Opens a record by its value and headers. A header without a value is one with an empty value.
    ///
    /// # Errors
    /// [`Error::NotAPointer`] where it begins like a pointer and cannot be read as one, [`Error::Forbidden`],
    /// [`Error::Gone`], [`Error::Missing`], [`Error::NoReferenceBucket`], and what any call may meet. Nothing is handed on as data that only looks like it.
    pub async fn open<'a, 'h>(
        &self,
        value: Option<&'a [u8]>,
        headers: impl IntoIterator<Item = (&'h str, &'h [u8])>,
    ) -> Result<Message<'a>, Error> {
        self.opened(None, value, headers).await
    }

    /// The same of a record of this topic: the broker refuses a pointer that somebody copied there from another topic
    /// ([`Resolver::fetch_record`]). Where the topic is known, this is the one to use.
    ///
    /// # Errors
    /// As [`Consumer::open`], and the problem `pointer-forbidden`.
    pub async fn open_record<'a, 'h>(
        &self,
        topic: &str,
        value: Option<&'a [u8]>,
        headers: impl IntoIterator<Item = (&'h str, &'h [u8])>,
    ) -> Result<Message<'a>, Error> {
        self.opened(Some(topic), value, headers).await
    }

    async fn opened<'a, 'h>(
        &self,
        topic: Option<&str>,
        value: Option<&'a [u8]>,
        headers: impl IntoIterator<Item = (&'h str, &'h [u8])>,
    ) -> Result<Message<'a>, Error> {
        let (metadata, reference) = read(headers);
        let content = match kind(value, reference)? {
            Kind::Nothing => Content::Nothing,
            Kind::Inline(bytes) => Content::Inline(bytes),
            Kind::Pointer(value) => {
                let version_id = metadata.version_id.as_deref();
                Content::Pointer(match topic {
                    Some(topic) => self.pointers.fetch_record(topic, value, version_id).await?,
                    None => self.pointers.fetch_version(value, version_id).await?,
                })
            }
            Kind::Reference(key) => {
                let Some((resolver, bucket)) = &self.references else {
                    return Err(Error::NoReferenceBucket(key));
                };
                let place = Place { bucket: bucket.clone(), key, version_id: None };
                Content::Reference(resolver.fetch_object(place, LARGEST_OBJECT).await?)
            }
        };
        Ok(Message { metadata, content })
    }
}

impl Content<'_> {
    /// Whether the bytes are held against a digest while they are read. Those that came with the record were not: Kafka's
    /// own checksum is all they have.
    pub fn is_verified(&self) -> bool {
        matches!(self, Self::Pointer(download) if download.digest().is_some())
    }

    /// The pointer, where it is one.
    pub fn pointer(&self) -> Option<&Pointer> {
        match self {
            Self::Pointer(download) => download.pointer(),
            _ => None,
        }
    }

    /// Tells `report` how many bytes have come, piece by piece; it must not block.
    #[must_use]
    pub fn on_progress(self, report: impl Fn(u64) + Send + 'static) -> Self {
        match self {
            Self::Pointer(download) => Self::Pointer(download.on_progress(report)),
            Self::Reference(download) => Self::Reference(download.on_progress(report)),
            here @ (Self::Nothing | Self::Inline(_)) => here,
        }
    }

    /// Writes the bytes to a file that appears, or is replaced, only when it is whole, verified as far as it can be, and
    /// on disk. None where there are no bytes: then nothing is written.
    ///
    /// # Errors
    /// As [`Download::to_file`].
    pub async fn save(self, path: impl AsRef<Path>) -> Result<Option<Saved>, Error> {
        match self {
            Self::Nothing => Ok(None),
            Self::Pointer(download) | Self::Reference(download) => download.to_file(path).await.map(Some),
            Self::Inline(bytes) => {
                let mut draft = Draft::beside(path.as_ref(), None).await?;
                draft.write(Bytes::copy_from_slice(bytes)).await?;
                draft.keep().await.map(Some)
            }
        }
    }
}

/// Sorts the headers; the second value is where a reference leads.
fn read<'h>(headers: impl IntoIterator<Item = (&'h str, &'h [u8])>) -> (Metadata, Option<&'h [u8]>) {
    let (mut metadata, mut reference) = (Metadata::default(), None);
    for (name, value) in headers {
        let text = std::str::from_utf8(value).ok();
        match name {
            "lfs-upload-id" => metadata.upload_id = text.and_then(|text| Uuid::from_str(text).ok()),
            "lfs-integrity" => {
                metadata.integrity = Integrity::ALL.into_iter().find(|level| Some(level.name()) == text);
            }
            "lfs-version-id" => metadata.version_id = text.map(str::to_owned),
            "traceparent" => metadata.traceparent = text.map(str::to_owned),
            _ => {
                if name.eq_ignore_ascii_case(REFERENCE_HEADER) {
                    reference = Some(value);
                }
                metadata.headers.push((name.to_owned(), value.to_vec()));
            }
        }
    }
    (metadata, reference)
}

fn kind<'a>(value: Option<&'a [u8]>, reference: Option<&[u8]>) -> Result<Kind<'a>, NotAPointer> {
    match (value, reference) {
        (Some(value), _) => Ok(match Value::of(value)? {
            Value::Inline(bytes) => Kind::Inline(bytes),
            Value::Pointer(_) => Kind::Pointer(value),
        }),
        (None, None) => Ok(Kind::Nothing),
        (None, Some(reference)) => {
            let malformed = || NotAPointer::Reference(String::from_utf8_lossy(reference).chars().take(200).collect());
            let key = std::str::from_utf8(reference).map_err(|_| malformed())?;
            // `<prefix>/<uuid>`: what else it names was not written by a claim check.
            let (prefix, id) = key.rsplit_once('/').ok_or_else(malformed)?;
            let sound = !prefix.is_empty() && !prefix.split('/').any(|segment| matches!(segment, "" | "." | ".."));
            match sound && Uuid::try_parse(id).is_ok() {
                true => Ok(Kind::Reference(key.to_owned())),
                false => Err(malformed()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "large/0190f2f4-0000-7000-8000-000000000001";

    #[test]
    fn records_are_told_apart_by_value_and_header() {
        let pointer = br#"{"kfs_lfs":1,"bucket":"b","key":"k","size":1}"#.as_slice();
        assert_eq!(kind(Some(b"plain"), None), Ok(Kind::Inline(b"plain")));
        assert_eq!(kind(Some(b""), None), Ok(Kind::Inline(b"")));
        assert_eq!(kind(None, None), Ok(Kind::Nothing));
        assert_eq!(kind(Some(pointer), None), Ok(Kind::Pointer(pointer)));
        assert_eq!(kind(None, Some(KEY.as_bytes())), Ok(Kind::Reference(KEY.to_owned())));
        // A header does not make something else of a value.
        assert_eq!(kind(Some(b"plain"), Some(KEY.as_bytes())), Ok(Kind::Inline(b"plain")));
        assert!(kind(Some(br#"{"kfs_lfs":1,"bucket":"b"}"#), None).is_err());
    }

    #[test]
    fn a_reference_is_a_prefix_and_a_uuid_and_nothing_else() {
        let id = "0190f2f4-0000-7000-8000-000000000001";
        for wrong in ["", id, &format!("/{id}"), &format!("a/../{id}"), &format!("a//{id}"), "a/b", "a/", &format!("a/{id}/")] {
            assert!(matches!(kind(None, Some(wrong.as_bytes())), Err(NotAPointer::Reference(_))), "{wrong}");
        }
        assert!(kind(None, Some(b"a/\xff")).is_err());
    }

    #[test]
    fn the_brokers_headers_are_read_and_the_others_kept() {
        let headers: [(&str, &[u8]); 7] = [
            ("lfs-upload-id", b"0190f2f4-0000-7000-8000-000000000001"),
            ("lfs-integrity", b"parts-sha256"),
            ("lfs-version-id", b"v1"),
            ("traceparent", b"00-1-2-01"),
            ("trace", b"\xff"),
            ("s3-ref-file-path", KEY.as_bytes()),
            ("trace", b""),
        ];
        let (metadata, reference) = read(headers);
        assert_eq!(reference, Some(KEY.as_bytes()));
        assert_eq!(metadata.upload_id.unwrap().to_string(), "0190f2f4-0000-7000-8000-000000000001");
        assert_eq!(metadata.integrity, Some(Integrity::PartsSha256));
        assert_eq!((metadata.version_id.as_deref(), metadata.traceparent.as_deref()), (Some("v1"), Some("00-1-2-01")));
        let names: Vec<_> = metadata.headers.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["trace", "s3-ref-file-path", "trace"]);
        assert_eq!(read([("lfs-integrity", b"magic".as_slice()), ("lfs-upload-id", b"x")]).0, Metadata::default());
    }
}
