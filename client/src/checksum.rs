//! Digests: computed, written as hex and base64, and named in S3's headers.

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use md5::Md5;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::Digest as _;

/// A SHA-256 digest of 32 bytes. Text and JSON show it in lower-case hex.
///
/// Upper-case hex is accepted and normalised, because some tools write it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[cfg_attr(feature = "openapi", schema(value_type = String, pattern = "^[0-9a-fA-F]{64}$",
    example = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"))]
pub struct Sha256(pub [u8; 32]);

impl Sha256 {
    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(sha2::Sha256::digest(bytes).into())
    }

    /// The digest in base64, as in S3's headers.
    pub fn base64(&self) -> String {
        BASE64.encode(self.0)
    }
}

/// The composite SHA-256 of an S3 multipart object: the digest of the parts' digests in base64, a dash, and the number of
/// parts.
///
/// Source: Amazon S3 User Guide, "Checking object integrity", composite checksums.
pub fn composite(parts: &[Sha256]) -> String {
    let mut hasher = sha2::Sha256::new();
    for part in parts {
        hasher.update(part.0);
    }
    format!("{}-{}", BASE64.encode(hasher.finalize()), parts.len())
}

impl fmt::Display for Sha256 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for Sha256 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A digest that its algorithm cannot produce.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected {expected} hex digits, found {found}")]
pub struct NotADigest {
    expected: usize,
    found: String,
}

fn decode_hex(text: &str, bytes: usize) -> Result<Vec<u8>, NotADigest> {
    let invalid = |found: String| NotADigest { expected: bytes * 2, found };
    match hex::decode(text) {
        Ok(value) if value.len() == bytes => Ok(value),
        Ok(value) => Err(invalid(format!("{}", value.len() * 2))),
        Err(_) => Err(invalid(format!("{} characters that are not all hex digits", text.chars().count()))),
    }
}

impl FromStr for Sha256 {
    type Err = NotADigest;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bytes = decode_hex(text, 32)?;
        Ok(Self(bytes.try_into().expect("decode_hex checked the length")))
    }
}

impl Serialize for Sha256 {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Sha256 {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// The algorithm of the checksum that a client declares for an upload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum Algorithm {
    /// SHA-256, the default and the only cryptographic one.
    Sha256,
    /// CRC-64/NVME of the whole object.
    Crc64nvme,
    /// CRC-32C (Castagnoli) of the whole object.
    Crc32c,
    /// CRC-32 (ISO-HDLC) of the whole object.
    Crc32,
    /// MD5, for single PUTs only.
    Md5,
    /// No checksum: only the size is checked.
    None,
}

impl Algorithm {
    /// Every algorithm, strongest first.
    pub const ALL: [Self; 6] = [Self::Sha256, Self::Crc64nvme, Self::Crc32c, Self::Crc32, Self::Md5, Self::None];

    /// The name in JSON, SQL and the pointer.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::Crc64nvme => "crc64nvme",
            Self::Crc32c => "crc32c",
            Self::Crc32 => "crc32",
            Self::Md5 => "md5",
            Self::None => "none",
        }
    }

    /// The length of a digest in bytes.
    pub fn digest_bytes(self) -> usize {
        match self {
            Self::Sha256 => 32,
            Self::Crc64nvme => 8,
            Self::Crc32c | Self::Crc32 => 4,
            Self::Md5 => 16,
            Self::None => 0,
        }
    }

    /// The request header that makes S3 verify the digest of a PUT. None for [`Algorithm::None`].
    pub fn header(self) -> Option<&'static str> {
        match self {
            Self::Sha256 => Some("x-amz-checksum-sha256"),
            Self::Crc64nvme => Some("x-amz-checksum-crc64nvme"),
            Self::Crc32c => Some("x-amz-checksum-crc32c"),
            Self::Crc32 => Some("x-amz-checksum-crc32"),
            Self::Md5 => Some("content-md5"),
            Self::None => None,
        }
    }

    /// Parses a digest of this algorithm from hex.
    ///
    /// # Errors
    /// When the text is not hex or not as long as the algorithm's digest.
    pub fn digest(self, text: &str) -> Result<Digest, NotADigest> {
        Ok(Digest { algorithm: self, value: decode_hex(text, self.digest_bytes())? })
    }

    /// A hasher of this algorithm.
    pub fn hasher(self) -> Hasher {
        match self {
            Self::Sha256 => Hasher::Sha256(sha2::Sha256::new()),
            Self::Md5 => Hasher::Md5(Md5::new()),
            Self::Crc64nvme => Hasher::Crc(self, crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc64Nvme)),
            Self::Crc32c => Hasher::Crc(self, crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi)),
            Self::Crc32 => Hasher::Crc(self, crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32IsoHdlc)),
            Self::None => Hasher::None,
        }
    }
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Algorithm {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|algorithm| algorithm.name() == text)
            .ok_or_else(|| format!("unknown checksum algorithm {text}"))
    }
}

/// A digest together with the algorithm that made it.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Digest {
    /// The algorithm.
    pub algorithm: Algorithm,
    /// The digest's bytes, big-endian for the CRCs as in S3's headers.
    pub value: Vec<u8>,
}

impl Digest {
    /// Lower-case hex, as in JSON.
    pub fn hex(&self) -> String {
        hex::encode(&self.value)
    }

    /// Base64, as in S3's headers.
    pub fn base64(&self) -> String {
        BASE64.encode(&self.value)
    }

    /// The SHA-256, if the algorithm is SHA-256.
    pub fn sha256(&self) -> Option<Sha256> {
        match self.algorithm {
            Algorithm::Sha256 => self.value.as_slice().try_into().ok().map(Sha256),
            _ => None,
        }
    }
}

impl From<Sha256> for Digest {
    fn from(sha256: Sha256) -> Self {
        Self { algorithm: Algorithm::Sha256, value: sha256.0.to_vec() }
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.algorithm, self.hex())
    }
}

/// Computes a digest of bytes that arrive in chunks.
pub enum Hasher {
    /// SHA-256.
    Sha256(sha2::Sha256),
    /// MD5.
    Md5(Md5),
    /// One of the CRCs.
    Crc(Algorithm, crc_fast::Digest),
    /// Computes no digest.
    None,
}

impl Hasher {
    /// Adds the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hasher) => hasher.update(bytes),
            Self::Md5(hasher) => hasher.update(bytes),
            Self::Crc(_, hasher) => hasher.update(bytes),
            Self::None => {}
        }
    }

    /// The digest of all added bytes.
    pub fn finish(self) -> Digest {
        match self {
            Self::Sha256(hasher) => Digest { algorithm: Algorithm::Sha256, value: hasher.finalize().to_vec() },
            Self::Md5(hasher) => Digest { algorithm: Algorithm::Md5, value: hasher.finalize().to_vec() },
            Self::Crc(algorithm, hasher) => {
                let all = hasher.finalize().to_be_bytes();
                Digest { algorithm, value: all[all.len() - algorithm.digest_bytes()..].to_vec() }
            }
            Self::None => Digest { algorithm: Algorithm::None, value: Vec::new() },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_agree_with_the_published_check_values() {
        // The "check" column of the CRC catalogue, RFC 1321 and FIPS 180-4: the digest of "123456789".
        let expected = [
            (Algorithm::Crc32, "cbf43926"),
            (Algorithm::Crc32c, "e3069283"),
            (Algorithm::Crc64nvme, "ae8b14860a799888"),
            (Algorithm::Md5, "25f9e794323b453885f5181f1b624d0b"),
            (Algorithm::Sha256, "15e2b0d3c33891ebb0f1ef609ec419420c20e320ce94c65fbc8c3312448eb225"),
            (Algorithm::None, ""),
        ];
        for (algorithm, hex) in expected {
            let mut hasher = algorithm.hasher();
            hasher.update(b"1234");
            hasher.update(b"56789");
            assert_eq!(hasher.finish().hex(), hex, "{algorithm}");
        }
    }

    #[test]
    fn upper_case_hashes_are_normalised() {
        let lower = Sha256::of(b"x").to_string();
        assert_eq!(lower.to_uppercase().parse::<Sha256>().unwrap().to_string(), lower);
        assert!("ab".parse::<Sha256>().is_err());
        assert!("z".repeat(64).parse::<Sha256>().is_err());
    }

    #[test]
    fn the_composite_is_the_digest_of_digests_and_a_count() {
        let parts = [Sha256::of(b"a"), Sha256::of(b"b")];
        let joined: Vec<u8> = parts.iter().flat_map(|part| part.0).collect();
        assert_eq!(composite(&parts), format!("{}-2", Sha256::of(&joined).base64()));
    }
}
