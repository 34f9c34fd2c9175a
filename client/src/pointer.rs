//! The pointer: the small JSON value in Kafka that stands for the bytes in S3.
//!
//! It is KafScale's LFS envelope. Its readers look at the first byte (`{`), look for `"kfs_lfs"` in the
//! first 50 bytes, and some of them refuse any member they do not know: so the broker writes exactly
//! the members of [`Pointer`], in this order, and reads leniently.

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use crate::checksum::{Algorithm, Digest, Sha256};

/// How far into the value a reader looks for the marker member.
const MARKER_WINDOW_BYTES: usize = 50;

/// What the broker publishes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[cfg_attr(feature = "openapi", schema(example = json!({"kfs_lfs": 1, "bucket": "lfs",
    "key": "acme/videos/lfs/2026/11/21/01934d2e-7c00-7000-8000-5f2b8c1d9e3a", "size": 5,
    "sha256": "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824", "content_type": "video/mp4", "created_at": "2026-11-21T06:35:59Z"})))]
pub struct Pointer {
    /// The version of the envelope: 1.
    pub kfs_lfs: u32,
    /// The bucket that holds the object.
    pub bucket: String,
    /// The object's key.
    pub key: String,
    /// The object's size in bytes.
    pub size: u64,
    /// SHA-256 of the bytes, lower-case hex; absent only where the topic allowed another checksum.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<Sha256>,
    /// The other checksum in hex, where the topic allowed one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checksum: Option<String>,
    /// The other checksum's algorithm.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checksum_alg: Option<Algorithm>,
    /// The media type that the producer named.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content_type: Option<String>,
    /// When the bytes were verified: RFC 3339, whole seconds, `Z`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created_at: Option<String>,
}

impl Pointer {
    /// A pointer of version 1 to `size` bytes whose digest is `digest`.
    pub fn new(bucket: &str, key: &str, size: u64, digest: &Digest, content_type: &str, created_at: OffsetDateTime) -> Self {
        let sha256 = digest.sha256();
        let other = sha256.is_none();
        Self {
            kfs_lfs: 1,
            bucket: bucket.to_owned(),
            key: key.to_owned(),
            size,
            sha256,
            checksum: (other && digest.algorithm != Algorithm::None).then(|| digest.hex()),
            checksum_alg: other.then_some(digest.algorithm),
            content_type: Some(content_type.to_owned()),
            created_at: Some(whole_seconds(created_at)),
        }
    }

    /// The record's value: compact JSON, members in their order.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("a pointer has only strings and numbers")
    }

    /// Reads a record's value. Members that are not ours (KafScale writes eleven) are passed over.
    ///
    /// # Errors
    /// [`NotAPointer`] says which of the envelope's rules the value breaks.
    pub fn parse(value: &[u8]) -> Result<Self, NotAPointer> {
        if !looks_like_pointer(value) {
            return Err(NotAPointer::NotAnEnvelope);
        }
        Self::parse_any_order(value)
    }

    /// Reads what is said to be a pointer, its members in any order and with any white space: as [`Pointer::parse`], which
    /// tells pointers from other records, but for the envelope's first bytes.
    ///
    /// # Errors
    /// [`NotAPointer`] says which of the envelope's rules the value breaks.
    pub fn parse_any_order(value: &[u8]) -> Result<Self, NotAPointer> {
        // Left to itself serde also reads a struct from an array, by position.
        if value.trim_ascii_start().first() != Some(&b'{') {
            return Err(NotAPointer::Malformed("it is not a JSON object".to_owned()));
        }
        let loose: Loose = serde_json::from_slice(value).map_err(|error| NotAPointer::Malformed(error.to_string()))?;
        loose.check()
    }

    /// The digest that the bytes must have, where the pointer names one. A checksum without an algorithm is a SHA-256.
    pub fn digest(&self) -> Option<Digest> {
        match (self.sha256, self.checksum_alg, &self.checksum) {
            (Some(sha256), _, _) => Some(sha256.into()),
            (None, Some(Algorithm::None), _) | (None, _, None) => None,
            (None, algorithm, Some(hex)) => algorithm.unwrap_or(Algorithm::Sha256).digest(hex).ok(),
        }
    }
}

/// Whether a record's value is a pointer rather than data: KafScale's published rule.
pub fn looks_like_pointer(value: &[u8]) -> bool {
    let window = &value[..value.len().min(MARKER_WINDOW_BYTES)];
    value.first() == Some(&b'{') && window.windows(9).any(|bytes| bytes == b"\"kfs_lfs\"")
}

/// Why a value is not a pointer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotAPointer {
    /// The first byte is not `{`, or `"kfs_lfs"` is not in the first 50 bytes.
    #[error("the value does not begin like a pointer: first byte {{, \"kfs_lfs\" within 50 bytes")]
    NotAnEnvelope,
    /// It is not JSON, or a member has the wrong type.
    #[error("the pointer cannot be read: {0}")]
    Malformed(String),
    /// The envelope's version is not 1.
    #[error("the pointer has version {0}, this reader knows 1")]
    Version(u32),
    /// A member that a pointer cannot do without is missing or empty.
    #[error("the pointer has no {0}")]
    Missing(&'static str),
    /// The header of a reference is not `<prefix>/<uuid>`; see [`mod@crate::consumer`].
    #[error("the reference {0:?} is not <prefix>/<uuid>")]
    Reference(String),
}

/// The envelope as others may write it: hashes in any case, empty strings for absent members.
#[derive(Deserialize)]
struct Loose {
    kfs_lfs: u32,
    bucket: Option<String>,
    key: Option<String>,
    size: Option<u64>,
    sha256: Option<String>,
    checksum: Option<String>,
    checksum_alg: Option<String>,
    content_type: Option<String>,
    created_at: Option<String>,
}

impl Loose {
    fn check(self) -> Result<Pointer, NotAPointer> {
        if self.kfs_lfs != 1 {
            return Err(NotAPointer::Version(self.kfs_lfs));
        }
        let malformed = |error: &dyn std::fmt::Display| NotAPointer::Malformed(error.to_string());
        let filled = |text: Option<String>| text.filter(|text| !text.is_empty());
        let sha256 = filled(self.sha256).map(|text| text.parse::<Sha256>()).transpose().map_err(|error| malformed(&error))?;
        let algorithm =
            filled(self.checksum_alg).map(|text| text.parse::<Algorithm>()).transpose().map_err(|error| malformed(&error))?;
        let checksum = filled(self.checksum);
        // A checksum that cannot be read would otherwise count as none, and the bytes as not to be checked.
        if let (None, Some(hex)) = (sha256, &checksum) {
            algorithm.unwrap_or(Algorithm::Sha256).digest(hex).map_err(|error| malformed(&error))?;
        }
        Ok(Pointer {
            kfs_lfs: 1,
            bucket: filled(self.bucket).ok_or(NotAPointer::Missing("bucket"))?,
            key: filled(self.key).ok_or(NotAPointer::Missing("key"))?,
            size: self.size.ok_or(NotAPointer::Missing("size"))?,
            sha256,
            checksum,
            checksum_alg: algorithm,
            content_type: filled(self.content_type),
            created_at: filled(self.created_at),
        })
    }
}

fn whole_seconds(at: OffsetDateTime) -> String {
    let utc = at.to_offset(time::UtcOffset::UTC).replace_nanosecond(0).expect("zero is a nanosecond");
    utc.format(&time::format_description::well_known::Rfc3339).expect("years 0 to 9999 have an RFC 3339 form")
}

#[cfg(test)]
mod tests {
    use super::*;
    use time::macros::datetime;

    #[test]
    fn a_pointer_is_byte_for_byte_the_golden_one() {
        let digest = Sha256::of(b"hello").into();
        let pointer = Pointer::new(
            "lfs",
            "acme/videos/lfs/2026/11/21/0192",
            5,
            &digest,
            "video/mp4",
            datetime!(2026-11-21 06:35:59.987 UTC),
        );
        assert_eq!(
            pointer.to_json(),
            r#"{"kfs_lfs":1,"bucket":"lfs","key":"acme/videos/lfs/2026/11/21/0192","size":5,"sha256":"2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824","content_type":"video/mp4","created_at":"2026-11-21T06:35:59Z"}"#
        );
        assert_eq!(Pointer::parse(pointer.to_json().as_bytes()).unwrap(), pointer);
    }

    #[test]
    fn another_checksum_takes_the_place_of_sha256() {
        let digest = Algorithm::Crc32.digest("cbf43926").unwrap();
        let json = Pointer::new("b", "k", 9, &digest, "a/b", datetime!(2026-11-21 00:00 UTC)).to_json();
        assert_eq!(
            json,
            r#"{"kfs_lfs":1,"bucket":"b","key":"k","size":9,"checksum":"cbf43926","checksum_alg":"crc32","content_type":"a/b","created_at":"2026-11-21T00:00:00Z"}"#
        );
        assert_eq!(Pointer::parse(json.as_bytes()).unwrap().digest(), Some(digest));
    }

    #[test]
    fn kafscales_eleven_members_are_read() {
        let value = br#"{"kfs_lfs":1,"bucket":"b","key":"ns/t/lfs/2026/01/02/obj-1","size":3,"sha256":"BA7816BF8F01CFEA414140DE5DAE2223B00361A396177A9CB410FF61F20015AD","checksum":"","checksum_alg":"sha256","content_type":"","original_headers":{"a":"b"},"created_at":"2026-01-02T03:04:05Z","proxy_id":"p"}"#;
        let pointer = Pointer::parse(value).unwrap();
        assert_eq!(pointer.digest(), Some(Sha256::of(b"abc").into()));
        assert_eq!(pointer.content_type, None);
    }

    #[test]
    fn what_is_not_a_pointer_is_told_apart() {
        let long = format!("{{\"padding\":\"{}\",\"kfs_lfs\":1}}", "x".repeat(50));
        for (value, expected) in [
            (b" {\"kfs_lfs\":1}".as_slice(), NotAPointer::NotAnEnvelope),
            (b"", NotAPointer::NotAnEnvelope),
            (long.as_bytes(), NotAPointer::NotAnEnvelope),
            (b"{\"kfs_lfs\":2,\"bucket\":\"b\"}", NotAPointer::Version(2)),
            (b"{\"kfs_lfs\":1,\"bucket\":\"b\",\"key\":\"k\"}", NotAPointer::Missing("size")),
            (b"{\"kfs_lfs\":1,\"bucket\":\"\",\"key\":\"k\",\"size\":1}", NotAPointer::Missing("bucket")),
        ] {
            assert_eq!(Pointer::parse(value), Err(expected));
        }
        assert!(matches!(Pointer::parse(b"{\"kfs_lfs\":1,"), Err(NotAPointer::Malformed(_))));
    }

    #[test]
    fn a_checksum_that_cannot_be_read_is_not_taken_for_none() {
        let value = br#"{"kfs_lfs":1,"bucket":"b","key":"k","size":9,"checksum":"cbf4","checksum_alg":"crc32"}"#;
        assert!(matches!(Pointer::parse(value), Err(NotAPointer::Malformed(_))));
    }

    #[test]
    fn a_checksum_without_an_algorithm_is_a_sha256_to_be_verified() {
        let value = |alg: &str, hex: &str| format!(r#"{{"kfs_lfs":1,"bucket":"b","key":"k","size":3,"checksum":"{hex}"{alg}}}"#);
        let sha256 = Sha256::of(b"abc");
        for alg in ["", r#","checksum_alg":"""#, r#","checksum_alg":null"#] {
            let pointer = Pointer::parse(value(alg, &sha256.to_string()).as_bytes()).unwrap();
            assert_eq!(pointer.digest(), Some(sha256.into()), "{alg}");
        }
        assert!(matches!(Pointer::parse(value("", "cbf43926").as_bytes()), Err(NotAPointer::Malformed(_))));
    }

    proptest::proptest! {
        #[test]
        fn no_value_makes_a_reader_panic(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200), rest in "[ -~]{0,120}") {
            let _ = Pointer::parse(&bytes);
            let _ = Pointer::parse(format!("{{\"kfs_lfs\":1,{rest}}}").as_bytes());
        }

        #[test]
        fn what_is_written_is_read_back(bucket in "[a-z0-9.-]{3,63}", key in "\\PC{1,80}", size: u64, kind in "[ -~]{1,40}", hash: [u8; 32]) {
            let at = OffsetDateTime::from_unix_timestamp(1_763_706_959).unwrap();
            let written = Pointer::new(&bucket, &key, size, &Digest::from(Sha256(hash)), &kind, at);
            proptest::prop_assert_eq!(Pointer::parse(written.to_json().as_bytes()).unwrap(), written);
        }
    }
}
