//! Which integrity S3's response proves, and which object headers do not matter to readers.

use lfs_broker_client::api::Integrity;
use lfs_broker_client::checksum::{Algorithm, Sha256, composite};

use super::{Object, SessionError, UploadSpec};

/// Whether a header changes nothing for readers. Browsers add `Cache-Control` on their own when a page is reloaded or
/// while their cache is disabled.
pub(super) fn is_harmless(name: &str, value: &str) -> bool {
    let only = |allowed: &[&str]| value.split(',').all(|word| allowed.contains(&word.trim().to_ascii_lowercase().as_str()));
    match name {
        "content-encoding" => only(&["", "identity"]),
        "cache-control" => only(&["max-age=0", "must-revalidate", "no-cache", "no-store", "private"]),
        _ => false,
    }
}

/// The integrity that S3's checksums prove; `None` if S3 gave none to compare.
pub(super) fn integrity_from_s3(spec: &UploadSpec, found: &Object, parts: &[Sha256]) -> Result<Option<Integrity>, SessionError> {
    let compare = |declared: String, found: String, level: Integrity| match declared == found {
        true => Ok(Some(level)),
        false => Err(SessionError::ChecksumMismatch { declared, found }),
    };
    match (&spec.digest, spec.layout.has_part_hashes()) {
        (_, true) => match &found.composite_sha256 {
            Some(found) => compare(composite(parts), found.clone(), Integrity::PartsSha256),
            None => Ok(None),
        },
        (Some(declared), false) if declared.algorithm == Algorithm::Sha256 => match found.sha256 {
            Some(found) => compare(declared.hex(), found.to_string(), Integrity::Sha256),
            None => Ok(None),
        },
        (Some(declared), false) if declared.algorithm == Algorithm::Md5 => {
            // S3 checked the signed Content-MD5 at the PUT. With KMS the ETag is not an MD5, so it proves nothing.
            match &found.etag {
                Some(etag) if etag.trim_matches('"') == declared.hex() => Ok(Some(Integrity::Checksum)),
                _ => Ok(None),
            }
        }
        (Some(declared), false) => match found.checksums.iter().find(|found| found.algorithm == declared.algorithm) {
            Some(found) => compare(declared.hex(), found.hex(), Integrity::Checksum),
            None => Ok(None),
        },
        (None, false) if spec.algorithm == Algorithm::None => Ok(Some(Integrity::Size)),
        (None, false) => Ok(None),
    }
}

/// The highest integrity that a digest by `algorithm` can prove.
pub(crate) fn max_integrity(algorithm: Algorithm) -> Integrity {
    match algorithm {
        Algorithm::Sha256 => Integrity::Sha256,
        Algorithm::Crc64nvme | Algorithm::Crc32c | Algorithm::Crc32 | Algorithm::Md5 => Integrity::Checksum,
        Algorithm::None => Integrity::Size,
    }
}
