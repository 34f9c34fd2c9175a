//! The metadata of objects, uploads and parts, in memory and on disk.

use std::collections::BTreeMap;
use std::sync::Arc;

use s3s::dto::Timestamp;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use super::checksum::{Algorithm, Checksum, Kind};
use super::content::Segment;

/// The headers and user metadata that a client sends with an object. S3 returns them with the object.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct ObjectHeaders {
    pub(super) content_type: Option<String>,
    pub(super) content_disposition: Option<String>,
    pub(super) content_encoding: Option<String>,
    pub(super) content_language: Option<String>,
    pub(super) cache_control: Option<String>,
    pub(super) expires: Option<Timestamp>,
    pub(super) metadata: BTreeMap<String, String>,
}

/// Reads the object headers of an s3s input.
macro_rules! object_headers {
    ($input:expr) => {
        $crate::s3::record::ObjectHeaders {
            content_type: $input.content_type.clone(),
            content_disposition: $input.content_disposition.clone(),
            content_encoding: $crate::s3::record::without_chunking($input.content_encoding.as_deref()),
            content_language: $input.content_language.clone(),
            cache_control: $input.cache_control.clone(),
            expires: $input.expires.clone(),
            metadata: $input.metadata.clone().unwrap_or_default().into_iter().collect(),
        }
    };
}
pub(super) use object_headers;

/// Writes the headers of an object into an s3s output.
macro_rules! set_object_headers {
    ($output:expr, $headers:expr) => {{
        let headers: &$crate::s3::record::ObjectHeaders = $headers;
        $output.content_type = headers.content_type.clone().or_else(|| Some("binary/octet-stream".to_owned()));
        $output.content_disposition = headers.content_disposition.clone();
        $output.content_encoding = headers.content_encoding.clone();
        $output.content_language = headers.content_language.clone();
        $output.cache_control = headers.cache_control.clone();
        $output.expires = headers.expires.clone();
        $output.metadata = (!headers.metadata.is_empty()).then(|| headers.metadata.clone().into_iter().collect());
    }};
}
pub(super) use set_object_headers;

/// `aws-chunked` is a transfer encoding, which S3 does not store.
pub(super) fn without_chunking(encoding: Option<&str>) -> Option<String> {
    let encodings: Vec<&str> =
        encoding?.split(',').map(str::trim).filter(|name| !name.is_empty() && *name != "aws-chunked").collect();
    (!encodings.is_empty()).then(|| encodings.join(","))
}

/// The metadata of an object, as it is on disk.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct ObjectFacts {
    pub(super) key: String,
    pub(super) size_bytes: u64,
    pub(super) etag: String,
    pub(super) checksum: Checksum,
    pub(super) kind: Kind,
    #[serde(with = "time::serde::rfc3339")]
    pub(super) modified: OffsetDateTime,
    #[serde(rename = "labels")]
    pub(super) headers: ObjectHeaders,
    /// The multipart upload of the object. After a crash, the store sees from it that the upload is complete.
    pub(super) upload_id: Option<String>,
}

/// An object: its metadata, and its segments in order.
pub(super) struct Object {
    pub(super) facts: ObjectFacts,
    pub(super) content: Vec<Arc<Segment>>,
}

/// A segment as metadata files refer to it.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct SegmentRecord {
    pub(super) name: String,
    pub(super) size_bytes: u64,
}

impl SegmentRecord {
    pub(super) fn of(segment: &Segment) -> Self {
        Self { name: segment.name(), size_bytes: segment.size_bytes }
    }
}

/// The metadata file of an object.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct ObjectRecord {
    pub(super) facts: ObjectFacts,
    pub(super) content: Vec<SegmentRecord>,
}

/// The metadata of a multipart upload, as it is on disk.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct UploadFacts {
    pub(super) upload_id: String,
    pub(super) bucket: String,
    pub(super) key: String,
    /// The declared checksum. Without one, S3 computes CRC64NVME.
    pub(super) declared: Option<(Algorithm, Kind)>,
    #[serde(with = "time::serde::rfc3339")]
    pub(super) initiated: OffsetDateTime,
    #[serde(rename = "labels")]
    pub(super) headers: ObjectHeaders,
}

impl UploadFacts {
    /// The checksum algorithm of every part, and the type of the object's checksum.
    pub(super) fn checksum(&self) -> (Algorithm, Kind) {
        self.declared.unwrap_or((Algorithm::Crc64nvme, Kind::FullObject))
    }
}

/// The metadata file of a part.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct PartRecord {
    pub(super) number: i32,
    pub(super) etag: String,
    pub(super) checksum: Checksum,
    #[serde(with = "time::serde::rfc3339")]
    pub(super) modified: OffsetDateTime,
    pub(super) content: SegmentRecord,
}

/// A complete part.
#[derive(Clone)]
pub(super) struct Part {
    pub(super) etag: String,
    pub(super) checksum: Checksum,
    pub(super) modified: OffsetDateTime,
    pub(super) segment: Arc<Segment>,
}

/// A multipart upload that is neither complete nor aborted.
#[derive(Clone)]
pub(super) struct Upload {
    pub(super) facts: Arc<UploadFacts>,
    pub(super) parts: BTreeMap<i32, Part>,
}
