//! The client's declaration at open, and how the bytes are split into parts.

use lfs_broker_client::api::Integrity;
use lfs_broker_client::checksum::{Algorithm, Digest};

/// The client's declaration at open. It never changes, except that complete may add a sha256.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct UploadSpec {
    pub(crate) topic: String,
    pub(crate) key: Option<Vec<u8>>,
    pub(crate) partition: Option<i32>,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) traceparent: Option<String>,
    pub(crate) content_type: String,
    pub(crate) filename: Option<String>,
    pub(crate) size_bytes: u64,
    pub(crate) algorithm: Algorithm,
    /// `None` for [`Algorithm::None`], and for a sha256 that complete will bring.
    pub(crate) digest: Option<Digest>,
    pub(crate) min_integrity: Integrity,
    pub(crate) layout: Layout,
    pub(crate) kms_key_id: Option<String>,
    pub(crate) url_seconds: u32,
    pub(crate) session_seconds: u32,
    pub(crate) session_max_seconds: u32,
}

/// One PUT, or a multipart upload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    Single,
    Multipart { part_bytes: u64, part_count: u32, part_hashes: PartHashMode },
}

/// Whether the client declares part hashes, and when: at open (`Given`), or when it asks for part URLs (`Deferred`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PartHashMode {
    None,
    Given,
    Deferred,
}

impl Layout {
    /// The offset and size of part `number`, in bytes.
    pub(crate) fn part_range(&self, number: u32, size_bytes: u64) -> Option<(u64, u64)> {
        match *self {
            Self::Multipart { part_bytes, part_count, .. } if (1..=part_count).contains(&number) => {
                let offset = u64::from(number - 1) * part_bytes;
                Some((offset, part_bytes.min(size_bytes - offset)))
            }
            _ => None,
        }
    }

    pub(crate) fn has_part_hashes(&self) -> bool {
        matches!(self, Self::Multipart { part_hashes: PartHashMode::Given | PartHashMode::Deferred, .. })
    }
}
