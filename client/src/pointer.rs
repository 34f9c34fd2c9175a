//! The pointer: the small JSON value of the Kafka record that refers to the bytes in S3.
//!
//! The format is KafScale's LFS envelope. Its readers check that the first byte is `{` and that `"kfs_lfs"` is in the
//! first 50 bytes, and some readers reject unknown members. So the broker writes exactly the members of [`Pointer`], in
//! this order, and its own parser is lenient.

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use crate::checksum::{Algorithm, Digest, Sha256};
use crate::json_words::in_words;

/// The first bytes of the value, in which a reader expects the marker member.
const MARKER_WINDOW_BYTES: usize = 50;

/// The pointer that the broker publishes.
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
    /// SHA-256 of the bytes in lower-case hex. Absent if the topic allowed another checksum.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<Sha256>,
    /// The other checksum in hex, if the topic allowed one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checksum: Option<String>,
    /// The other checksum's algorithm.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checksum_alg: Option<Algorithm>,
    /// The media type that the producer declared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content_type: Option<String>,
    /// When the bytes were verified: RFC 3339, whole seconds, `Z`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created_at: Option<String>,
}

impl Pointer {
    /// A pointer of version 1 to `size` bytes with this digest.
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

    /// The record's value: compact JSON with the members in this order.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("a pointer has only strings and numbers")
    }

    /// Parses a record's value. Unknown members are ignored (KafScale writes eleven members).
    ///
    /// # Errors
    /// [`NotAPointer`] names the rule of the envelope that the value breaks.
    pub fn parse(value: &[u8]) -> Result<Self, NotAPointer> {
        if !looks_like_pointer(value) {
            return Err(NotAPointer::NotAnEnvelope);
        }
        Self::parse_any_order(value)
    }

    /// Parses a value that the caller knows to be a pointer. Members may be in any order and with any white space. Unlike
    /// [`Pointer::parse`], it does not check the first bytes, which distinguish pointers from other records.
    ///
    /// # Errors
    /// [`NotAPointer`] names the rule of the envelope that the value breaks.
    pub fn parse_any_order(value: &[u8]) -> Result<Self, NotAPointer> {
        // Without this check, serde would also accept an array and assign its items by position.
        if value.trim_ascii_start().first() != Some(&b'{') {
            return Err(NotAPointer::Malformed("the value is not a JSON object".to_owned()));
        }
        let lenient: LenientPointer = serde_json::from_slice(value).map_err(|error| {
            let text = error.to_string();
            NotAPointer::Malformed(if error.is_data() { in_words(&text) } else { text })
        })?;
        lenient.validate()
    }

    /// The digest that the bytes must have, if the pointer has one. A checksum without an algorithm is a SHA-256.
    pub fn digest(&self) -> Option<Digest> {
        match (self.sha256, self.checksum_alg, &self.checksum) {
            (Some(sha256), _, _) => Some(sha256.into()),
            (None, Some(Algorithm::None), _) | (None, _, None) => None,
            (None, algorithm, Some(hex)) => algorithm.unwrap_or(Algorithm::Sha256).digest(hex).ok(),
        }
    }
}

/// Whether a record's value is a pointer and not data, by KafScale's published rule.
pub fn looks_like_pointer(value: &[u8]) -> bool {
    let window = &value[..value.len().min(MARKER_WINDOW_BYTES)];
    value.first() == Some(&b'{') && window.windows(9).any(|bytes| bytes == b"\"kfs_lfs\"")
}

/// Why a value is not a valid pointer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotAPointer {
    /// The first byte is not `{`, or `"kfs_lfs"` is not in the first 50 bytes.
    #[error("the value does not begin like a pointer: the first byte must be {{, and \"kfs_lfs\" must be in the first 50 bytes")]
    NotAnEnvelope,
    /// The value is not JSON, or a member has the wrong type.
    #[error("the pointer is malformed: {0}")]
    Malformed(String),
    /// The envelope's version is not 1.
    #[error("the pointer has version {0}, but only version 1 is supported")]
    Version(u32),
    /// A required member is missing or empty.
    #[error("the pointer has no {0}")]
    Missing(&'static str),
    /// The header of a reference is not `<prefix>/<uuid>`; see [`mod@crate::consumer`].
    #[error("the reference {0:?} is not <prefix>/<uuid>")]
    Reference(String),
}

/// The envelope as other programs may write it: hashes in any case, empty strings for absent members.
#[derive(Deserialize)]
struct LenientPointer {
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

impl LenientPointer {
    fn validate(self) -> Result<Pointer, NotAPointer> {
        if self.kfs_lfs != 1 {
            return Err(NotAPointer::Version(self.kfs_lfs));
        }
        let malformed = |error: &dyn std::fmt::Display| NotAPointer::Malformed(error.to_string());
        let non_empty = |text: Option<String>| text.filter(|text| !text.is_empty());
        let sha256 = non_empty(self.sha256).map(|text| text.parse::<Sha256>()).transpose().map_err(|error| malformed(&error))?;
        let algorithm =
            non_empty(self.checksum_alg).map(|text| text.parse::<Algorithm>()).transpose().map_err(|error| malformed(&error))?;
        let checksum = non_empty(self.checksum);
        // An invalid checksum is an error. Ignoring it would leave the bytes unverified.
        if let (None, Some(hex)) = (sha256, &checksum) {
            algorithm.unwrap_or(Algorithm::Sha256).digest(hex).map_err(|error| malformed(&error))?;
        }
        Ok(Pointer {
            kfs_lfs: 1,
            bucket: non_empty(self.bucket).ok_or(NotAPointer::Missing("bucket"))?,
            key: non_empty(self.key).ok_or(NotAPointer::Missing("key"))?,
            size: self.size.ok_or(NotAPointer::Missing("size"))?,
            sha256,
            checksum,
            checksum_alg: algorithm,
            content_type: non_empty(self.content_type),
            created_at: non_empty(self.created_at),
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
    fn a_pointer_has_exactly_the_published_bytes() {
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
    fn another_checksum_replaces_sha256() {
        let digest = Algorithm::Crc32.digest("cbf43926").unwrap();
        let json = Pointer::new("b", "k", 9, &digest, "a/b", datetime!(2026-11-21 00:00 UTC)).to_json();
        assert_eq!(
            json,
            r#"{"kfs_lfs":1,"bucket":"b","key":"k","size":9,"checksum":"cbf43926","checksum_alg":"crc32","content_type":"a/b","created_at":"2026-11-21T00:00:00Z"}"#
        );
        assert_eq!(Pointer::parse(json.as_bytes()).unwrap().digest(), Some(digest));
    }

    #[test]
    fn pointers_of_kafscale_are_read() {
        let value = br#"{"kfs_lfs":1,"bucket":"b","key":"ns/t/lfs/2026/01/02/obj-1","size":3,"sha256":"BA7816BF8F01CFEA414140DE5DAE2223B00361A396177A9CB410FF61F20015AD","checksum":"","checksum_alg":"sha256","content_type":"","original_headers":{"a":"b"},"created_at":"2026-01-02T03:04:05Z","proxy_id":"p"}"#;
        let pointer = Pointer::parse(value).unwrap();
        assert_eq!(pointer.digest(), Some(Sha256::of(b"abc").into()));
        assert_eq!(pointer.content_type, None);
    }

    #[test]
    fn values_that_are_not_pointers_are_rejected_with_a_reason() {
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
    fn an_invalid_checksum_is_rejected() {
        let value = br#"{"kfs_lfs":1,"bucket":"b","key":"k","size":9,"checksum":"cbf4","checksum_alg":"crc32"}"#;
        assert!(matches!(Pointer::parse(value), Err(NotAPointer::Malformed(_))));
    }

    #[test]
    fn a_checksum_without_an_algorithm_is_a_sha256() {
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
        fn no_value_makes_the_parser_panic(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200), rest in "[ -~]{0,120}") {
            let _ = Pointer::parse(&bytes);
            let _ = Pointer::parse(format!("{{\"kfs_lfs\":1,{rest}}}").as_bytes());
        }

        #[test]
        fn a_written_pointer_is_read_back(bucket in "[a-z0-9.-]{3,63}", key in "\\PC{1,80}", size: u64, kind in "[ -~]{1,40}", hash: [u8; 32]) {
            let at = OffsetDateTime::from_unix_timestamp(1_763_706_959).unwrap();
            let written = Pointer::new(&bucket, &key, size, &Digest::from(Sha256(hash)), &kind, at);
            proptest::prop_assert_eq!(Pointer::parse(written.to_json().as_bytes()).unwrap(), written);
        }
    }
}
