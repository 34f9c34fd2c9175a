//! What the store knows of an object, an upload and a part, in memory and on disk.

use std::collections::BTreeMap;
use std::sync::Arc;

use s3s::dto::Timestamp;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use super::checksum::{Algorithm, Checksum, Kind};
use super::content::Segment;

/// What a client says about an object besides its bytes; it gets the same back.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Labels {
    pub(super) content_type: Option<String>,
    pub(super) content_disposition: Option<String>,
    pub(super) content_encoding: Option<String>,
    pub(super) content_language: Option<String>,
    pub(super) cache_control: Option<String>,
    pub(super) expires: Option<Timestamp>,
    pub(super) metadata: BTreeMap<String, String>,
}

/// Reads the labels of one of s3s's inputs.
macro_rules! labels {
    ($input:expr) => {
        $crate::dev::s3::record::Labels {
            content_type: $input.content_type.clone(),
            content_disposition: $input.content_disposition.clone(),
            content_encoding: $crate::dev::s3::record::without_chunking($input.content_encoding.as_deref()),
            content_language: $input.content_language.clone(),
            cache_control: $input.cache_control.clone(),
            expires: $input.expires.clone(),
            metadata: $input.metadata.clone().unwrap_or_default().into_iter().collect(),
        }
    };
}
pub(super) use labels;

/// Writes the labels of an object into one of s3s's outputs.
macro_rules! describe {
    ($output:expr, $labels:expr) => {{
        let labels: &$crate::dev::s3::record::Labels = $labels;
        $output.content_type = labels.content_type.clone().or_else(|| Some("binary/octet-stream".to_owned()));
        $output.content_disposition = labels.content_disposition.clone();
        $output.content_encoding = labels.content_encoding.clone();
        $output.content_language = labels.content_language.clone();
        $output.cache_control = labels.cache_control.clone();
        $output.expires = labels.expires.clone();
        $output.metadata = (!labels.metadata.is_empty()).then(|| labels.metadata.clone().into_iter().collect());
    }};
}
pub(super) use describe;

/// `aws-chunked` says how a body travelled, not what it is: S3 does not keep it.
pub(super) fn without_chunking(encoding: Option<&str>) -> Option<String> {
    let kept: Vec<&str> = encoding?.split(',').map(str::trim).filter(|name| !name.is_empty() && *name != "aws-chunked").collect();
    (!kept.is_empty()).then(|| kept.join(","))
}

/// The facts of an object, as they are on disk.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct ObjectFacts {
    pub(super) key: String,
    pub(super) size_bytes: u64,
    pub(super) etag: String,
    pub(super) checksum: Checksum,
    pub(super) kind: Kind,
    #[serde(with = "time::serde::rfc3339")]
    pub(super) modified: OffsetDateTime,
    pub(super) labels: Labels,
    /// The multipart upload it came from: a start after a crash tells by it that the upload is complete.
    pub(super) upload_id: Option<String>,
}

/// An object: its facts, and its bytes in order.
pub(super) struct Object {
    pub(super) facts: ObjectFacts,
    pub(super) content: Vec<Arc<Segment>>,
}

/// A segment as records on disk name it.
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

/// An object as it is on disk.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct ObjectRecord {
    pub(super) facts: ObjectFacts,
    pub(super) content: Vec<SegmentRecord>,
}

/// The facts of a multipart upload, as they are on disk.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct UploadFacts {
    pub(super) upload_id: String,
    pub(super) bucket: String,
    pub(super) key: String,
    /// The checksum that was declared; without one S3 computes CRC64NVME for itself.
    pub(super) declared: Option<(Algorithm, Kind)>,
    #[serde(with = "time::serde::rfc3339")]
    pub(super) initiated: OffsetDateTime,
    pub(super) labels: Labels,
}

impl UploadFacts {
    /// The checksum that every part gets, and what it covers in the end.
    pub(super) fn checksum(&self) -> (Algorithm, Kind) {
        self.declared.unwrap_or((Algorithm::Crc64nvme, Kind::FullObject))
    }
}

/// A part as it is on disk.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct PartRecord {
    pub(super) number: i32,
    pub(super) etag: String,
    pub(super) checksum: Checksum,
    #[serde(with = "time::serde::rfc3339")]
    pub(super) modified: OffsetDateTime,
    pub(super) content: SegmentRecord,
}

/// A part that came whole.
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
