//! Opens a consumer's records with one call, for any Kafka client. Inline data is returned as it is; pointers are
//! followed and their bytes verified.
//!
//! Two formats are supported. A *pointer* is the record's value ([`mod@crate::pointer`]), and its bytes are verified. A
//! *reference* is a record without a value whose header `S3-REF-FILE-PATH` names an object in a configured bucket. It has
//! neither size nor checksum, so its bytes are downloaded without verification.

use std::path::Path;
use std::str::FromStr as _;

use bytes::Bytes;
use uuid::Uuid;

use crate::access::{Access, ObjectLocation};
use crate::api::{Integrity, MAX_OBJECT_BYTES};
use crate::download::Download;
use crate::error::Error;
use crate::pointer::{NotAPointer, Pointer};
use crate::resolve::{Resolver, Value};
use crate::save::{PartialFile, SavedFile};

/// The header of a reference, as other claim-check products write it.
pub const REFERENCE_HEADER: &str = "S3-REF-FILE-PATH";

/// Opens records of any Kafka client.
///
/// ```no_run
/// use lfs_broker_client::{Client, Consumer, consumer::Content};
///
/// # async fn each(topic: &str, value: Option<&[u8]>, headers: Vec<(&str, &[u8])>) -> Result<(), lfs_broker_client::Error> {
/// let consumer = Consumer::new(Client::new("http://127.0.0.1:8080")?.with_token("…"));
/// // For each record of the Kafka client:
/// let message = consumer.open_record(topic, value, headers).await?;
/// println!("upload {:?}, verified by {:?}", message.metadata.upload_id, message.metadata.integrity);
/// match message.content {
///     Content::Tombstone => println!("a tombstone"),
///     Content::Inline(bytes) => println!("{} bytes came with the record", bytes.len()),
///     // An `AsyncRead` and a `Stream` that fails if the bytes do not match the pointer.
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

/// An opened record.
#[derive(Debug)]
pub struct Message<'a> {
    /// The record's headers.
    pub metadata: Metadata,
    /// Its bytes, or a download of them.
    pub content: Content<'a>,
}

/// The content of a record.
#[derive(Debug)]
pub enum Content<'a> {
    /// No value. In a compacted topic this is a tombstone.
    Tombstone,
    /// The value itself.
    Inline(&'a [u8]),
    /// The bytes of a pointer, verified while they are read.
    Pointer(Download),
    /// The bytes of a reference, without verification.
    Reference(Download),
}

/// The headers of a record.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Metadata {
    /// The upload's id (`lfs-upload-id`).
    pub upload_id: Option<Uuid>,
    /// How far the broker verified the bytes (`lfs-integrity`).
    pub integrity: Option<Integrity>,
    /// The object's version, in versioned buckets (`lfs-version-id`).
    pub version_id: Option<String>,
    /// The trace of the upload (`traceparent`).
    pub traceparent: Option<String>,
    /// All other headers, in order: the producer's own.
    pub headers: Vec<(String, Vec<u8>)>,
}

/// The kind of a record, decided without a request.
#[derive(Debug, PartialEq, Eq)]
enum RecordKind<'a> {
    Tombstone,
    Inline(&'a [u8]),
    Pointer(&'a [u8]),
    Reference(String),
}

impl Consumer {
    /// Follows pointers with this resolver. A [`Client`](crate::Client) is accepted too.
    pub fn new(resolver: impl Into<Resolver>) -> Self {
        Self { pointers: resolver.into(), references: None }
    }

    /// Also follows references, into this bucket. `access` needs no other permission: this call allows the bucket.
    ///
    /// # Errors
    /// When no HTTP client can be built.
    pub fn with_references(mut self, bucket: impl Into<String>, access: Access) -> Result<Self, Error> {
        let bucket = bucket.into();
        let resolver = Resolver::with_access(access.allow(bucket.clone(), ""))?;
        self.references = Some((resolver.with_settings(self.pointers.settings()), bucket));
        Ok(self)
    }

    /// Opens a record by its value and headers. Pass a header without a value with an empty value.
    ///
    /// # Errors
    /// [`Error::NotAPointer`] for a value that begins like a pointer but is invalid, [`Error::Forbidden`],
    /// [`Error::Gone`], [`Error::Missing`], [`Error::NoReferenceBucket`], and the errors of any call. An invalid pointer
    /// is never returned as data.
    pub async fn open<'a, 'h>(
        &self,
        value: Option<&'a [u8]>,
        headers: impl IntoIterator<Item = (&'h str, &'h [u8])>,
    ) -> Result<Message<'a>, Error> {
        self.open_with_topic(None, value, headers).await
    }

    /// Opens a record of this topic. The broker refuses a pointer that was copied from another topic
    /// ([`Resolver::fetch_record`]). Use this method if the topic is known.
    ///
    /// # Errors
    /// As [`Consumer::open`], and the problem `pointer-forbidden`.
    pub async fn open_record<'a, 'h>(
        &self,
        topic: &str,
        value: Option<&'a [u8]>,
        headers: impl IntoIterator<Item = (&'h str, &'h [u8])>,
    ) -> Result<Message<'a>, Error> {
        self.open_with_topic(Some(topic), value, headers).await
    }

    async fn open_with_topic<'a, 'h>(
        &self,
        topic: Option<&str>,
        value: Option<&'a [u8]>,
        headers: impl IntoIterator<Item = (&'h str, &'h [u8])>,
    ) -> Result<Message<'a>, Error> {
        let (metadata, reference) = read_headers(headers);
        let content = match record_kind(value, reference)? {
            RecordKind::Tombstone => Content::Tombstone,
            RecordKind::Inline(bytes) => Content::Inline(bytes),
            RecordKind::Pointer(value) => {
                let version_id = metadata.version_id.as_deref();
                Content::Pointer(match topic {
                    Some(topic) => self.pointers.fetch_record(topic, value, version_id).await?,
                    None => self.pointers.fetch_version(value, version_id).await?,
                })
            }
            RecordKind::Reference(key) => {
                let Some((resolver, bucket)) = &self.references else {
                    return Err(Error::NoReferenceBucket(key));
                };
                let location = ObjectLocation { bucket: bucket.clone(), key, version_id: None };
                // A reference has no size, so the largest S3 object limits its download.
                Content::Reference(resolver.fetch_object(location, MAX_OBJECT_BYTES).await?)
            }
        };
        Ok(Message { metadata, content })
    }
}

impl Content<'_> {
    /// Whether the bytes are compared with a digest while they are read. Inline bytes are not: they only have Kafka's own
    /// checksum.
    pub fn is_verified(&self) -> bool {
        matches!(self, Self::Pointer(download) if download.digest().is_some())
    }

    /// The pointer, if the record has one.
    pub fn pointer(&self) -> Option<&Pointer> {
        match self {
            Self::Pointer(download) => download.pointer(),
            _ => None,
        }
    }

    /// Calls `callback` with the number of received bytes, for each chunk. It must not block.
    #[must_use]
    pub fn on_progress(self, callback: impl Fn(u64) + Send + 'static) -> Self {
        match self {
            Self::Pointer(download) => Self::Pointer(download.on_progress(callback)),
            Self::Reference(download) => Self::Reference(download.on_progress(callback)),
            unchanged @ (Self::Tombstone | Self::Inline(_)) => unchanged,
        }
    }

    /// Writes the bytes to a file. The file appears, or is replaced, only after its bytes are complete, verified if they
    /// have a digest, and synced to disk. Returns `None` for a tombstone and writes nothing.
    ///
    /// # Errors
    /// As [`Download::to_file`].
    pub async fn save(self, path: impl AsRef<Path>) -> Result<Option<SavedFile>, Error> {
        match self {
            Self::Tombstone => Ok(None),
            Self::Pointer(download) | Self::Reference(download) => download.to_file(path).await.map(Some),
            Self::Inline(bytes) => {
                let mut partial = PartialFile::create_for(path.as_ref(), None).await?;
                partial.write(Bytes::copy_from_slice(bytes)).await?;
                partial.commit().await.map(Some)
            }
        }
    }
}

/// Reads the headers. The second value is the reference, if there is one.
fn read_headers<'h>(headers: impl IntoIterator<Item = (&'h str, &'h [u8])>) -> (Metadata, Option<&'h [u8]>) {
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

fn record_kind<'a>(value: Option<&'a [u8]>, reference: Option<&[u8]>) -> Result<RecordKind<'a>, NotAPointer> {
    match (value, reference) {
        (Some(value), _) => Ok(match Value::of(value)? {
            Value::Inline(bytes) => RecordKind::Inline(bytes),
            Value::Pointer(_) => RecordKind::Pointer(value),
        }),
        (None, None) => Ok(RecordKind::Tombstone),
        (None, Some(reference)) => {
            let malformed = || NotAPointer::Reference(String::from_utf8_lossy(reference).chars().take(200).collect());
            let key = std::str::from_utf8(reference).map_err(|_| malformed())?;
            // A claim check writes `<prefix>/<uuid>`. Any other value is not a reference.
            let (prefix, id) = key.rsplit_once('/').ok_or_else(malformed)?;
            let valid = !prefix.is_empty() && !prefix.split('/').any(|segment| matches!(segment, "" | "." | ".."));
            match valid && Uuid::try_parse(id).is_ok() {
                true => Ok(RecordKind::Reference(key.to_owned())),
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
    fn value_and_header_decide_the_kind_of_a_record() {
        let pointer = br#"{"kfs_lfs":1,"bucket":"b","key":"k","size":1}"#.as_slice();
        assert_eq!(record_kind(Some(b"plain"), None), Ok(RecordKind::Inline(b"plain")));
        assert_eq!(record_kind(Some(b""), None), Ok(RecordKind::Inline(b"")));
        assert_eq!(record_kind(None, None), Ok(RecordKind::Tombstone));
        assert_eq!(record_kind(Some(pointer), None), Ok(RecordKind::Pointer(pointer)));
        assert_eq!(record_kind(None, Some(KEY.as_bytes())), Ok(RecordKind::Reference(KEY.to_owned())));
        // A record with a value is not a reference, even with the header.
        assert_eq!(record_kind(Some(b"plain"), Some(KEY.as_bytes())), Ok(RecordKind::Inline(b"plain")));
        assert!(record_kind(Some(br#"{"kfs_lfs":1,"bucket":"b"}"#), None).is_err());
    }

    #[test]
    fn a_reference_is_a_prefix_and_a_uuid() {
        let id = "0190f2f4-0000-7000-8000-000000000001";
        for wrong in ["", id, &format!("/{id}"), &format!("a/../{id}"), &format!("a//{id}"), "a/b", "a/", &format!("a/{id}/")] {
            assert!(matches!(record_kind(None, Some(wrong.as_bytes())), Err(NotAPointer::Reference(_))), "{wrong}");
        }
        assert!(record_kind(None, Some(b"a/\xff")).is_err());
    }

    #[test]
    fn broker_headers_are_parsed_and_other_headers_are_kept() {
        let headers: [(&str, &[u8]); 7] = [
            ("lfs-upload-id", b"0190f2f4-0000-7000-8000-000000000001"),
            ("lfs-integrity", b"parts-sha256"),
            ("lfs-version-id", b"v1"),
            ("traceparent", b"00-1-2-01"),
            ("trace", b"\xff"),
            ("s3-ref-file-path", KEY.as_bytes()),
            ("trace", b""),
        ];
        let (metadata, reference) = read_headers(headers);
        assert_eq!(reference, Some(KEY.as_bytes()));
        assert_eq!(metadata.upload_id.unwrap().to_string(), "0190f2f4-0000-7000-8000-000000000001");
        assert_eq!(metadata.integrity, Some(Integrity::PartsSha256));
        assert_eq!((metadata.version_id.as_deref(), metadata.traceparent.as_deref()), (Some("v1"), Some("00-1-2-01")));
        let names: Vec<_> = metadata.headers.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["trace", "s3-ref-file-path", "trace"]);
        assert_eq!(read_headers([("lfs-integrity", b"magic".as_slice()), ("lfs-upload-id", b"x")]).0, Metadata::default());
    }
}
