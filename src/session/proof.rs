//! What S3's answer proves of a promise, and which headers of an object make no difference.

use lfs_broker_client::api::Integrity;
use lfs_broker_client::checksum::{Algorithm, Sha256, composite};

use super::{Object, Promise, Refusal};

/// Whether a header changes nothing for readers. Browsers add `Cache-Control` by themselves when a page is reloaded, or
/// while their cache is switched off.
pub(super) fn is_harmless(name: &str, value: &str) -> bool {
    let words = |harmless: &[&str]| value.split(',').all(|word| harmless.contains(&word.trim().to_ascii_lowercase().as_str()));
    match name {
        "content-encoding" => words(&["", "identity"]),
        "cache-control" => words(&["max-age=0", "must-revalidate", "no-cache", "no-store", "private"]),
        _ => false,
    }
}

/// The level that S3's own word proves; `None` where it says nothing.
pub(super) fn proof_by_s3(promise: &Promise, found: &Object, parts: &[Sha256]) -> Result<Option<Integrity>, Refusal> {
    let compare = |promised: String, found: String, level: Integrity| match promised == found {
        true => Ok(Some(level)),
        false => Err(Refusal::Checksum { promised, found }),
    };
    match (&promise.digest, promise.layout.has_part_hashes()) {
        (_, true) => match &found.composite_sha256 {
            Some(found) => compare(composite(parts), found.clone(), Integrity::PartsSha256),
            None => Ok(None),
        },
        (Some(promised), false) if promised.algorithm == Algorithm::Sha256 => match found.sha256 {
            Some(found) => compare(promised.hex(), found.to_string(), Integrity::Sha256),
            None => Ok(None),
        },
        (Some(promised), false) if promised.algorithm == Algorithm::Md5 => {
            // S3 checked the signed Content-MD5; an ETag of another shape (KMS) only fails to repeat it.
            match &found.etag {
                Some(etag) if etag.trim_matches('"') == promised.hex() => Ok(Some(Integrity::Checksum)),
                _ => Ok(None),
            }
        }
        (Some(promised), false) => match found.checksums.iter().find(|found| found.algorithm == promised.algorithm) {
            Some(found) => compare(promised.hex(), found.hex(), Integrity::Checksum),
            None => Ok(None),
        },
        (None, false) if promise.algorithm == Algorithm::None => Ok(Some(Integrity::Size)),
        (None, false) => Ok(None),
    }
}

/// The best level that a promise by `algorithm` can be proved to.
pub(crate) fn reachable(algorithm: Algorithm) -> Integrity {
    match algorithm {
        Algorithm::Sha256 => Integrity::Sha256,
        Algorithm::Crc64nvme | Algorithm::Crc32c | Algorithm::Crc32 | Algorithm::Md5 => Integrity::Checksum,
        Algorithm::None => Integrity::Size,
    }
}
