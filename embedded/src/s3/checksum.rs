//! Checksums: MD5 for the ETag, and one of S3's five checksum algorithms.
//!
//! An object has exactly one checksum. Without a declared algorithm it is CRC64NVME, as on AWS.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use crc_fast::CrcAlgorithm;
use hyper::HeaderMap;
use s3s::checksum::ChecksumHasher;
use s3s::crypto::{Checksum as _, Crc32, Crc32c, Crc64Nvme, Md5, Sha1, Sha256};
use s3s::dto::Checksum as Sums;
use s3s::{S3Error, S3Result, TrailingHeaders, s3_error};
use serde::{Deserialize, Serialize};

/// The checksum algorithms of S3.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Algorithm {
    Crc32,
    Crc32c,
    Crc64nvme,
    Sha1,
    Sha256,
}

/// S3's checksum type: what the checksum of a multipart object covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Kind {
    /// Every byte, in order.
    FullObject,
    /// The checksums of the parts, in order.
    Composite,
}

/// A checksum as in S3's headers: base64, followed by `-N` if it is composite.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Checksum {
    pub(super) algorithm: Algorithm,
    pub(super) value: String,
}

impl Algorithm {
    const ALL: [Self; 5] = [Self::Crc32, Self::Crc32c, Self::Crc64nvme, Self::Sha1, Self::Sha256];

    /// Parses S3's name of an algorithm, as in `x-amz-checksum-algorithm`.
    pub(super) fn parse(name: &str) -> S3Result<Self> {
        let named = Self::ALL.into_iter().find(|algorithm| algorithm.name() == name);
        named.ok_or_else(|| s3_error!(InvalidRequest, "checksum algorithm {name} is not known"))
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Crc32 => "CRC32",
            Self::Crc32c => "CRC32C",
            Self::Crc64nvme => "CRC64NVME",
            Self::Sha1 => "SHA1",
            Self::Sha256 => "SHA256",
        }
    }

    fn header(self) -> String {
        format!("x-amz-checksum-{}", self.name().to_ascii_lowercase())
    }

    fn size_bytes(self) -> usize {
        match self {
            Self::Crc32 | Self::Crc32c => 4,
            Self::Crc64nvme => 8,
            Self::Sha1 => 20,
            Self::Sha256 => 32,
        }
    }

    /// The CRC of the algorithm. Only a CRC of the whole can be computed from those of the parts.
    fn crc(self) -> Option<CrcAlgorithm> {
        match self {
            Self::Crc32 => Some(CrcAlgorithm::Crc32IsoHdlc),
            Self::Crc32c => Some(CrcAlgorithm::Crc32Iscsi),
            Self::Crc64nvme => Some(CrcAlgorithm::Crc64Nvme),
            Self::Sha1 | Self::Sha256 => None,
        }
    }

    /// The checksum type of a multipart upload that requests `kind`, by AWS's table of allowed combinations.
    pub(super) fn kind(self, kind: Option<Kind>) -> S3Result<Kind> {
        match (self, kind) {
            (Self::Sha1 | Self::Sha256, Some(Kind::FullObject)) | (Self::Crc64nvme, Some(Kind::Composite)) => {
                Err(s3_error!(InvalidRequest, "the checksum type is not allowed for {}", self.name()))
            }
            (_, Some(kind)) => Ok(kind),
            (Self::Crc64nvme, None) => Ok(Kind::FullObject),
            (_, None) => Ok(Kind::Composite),
        }
    }
}

impl Kind {
    pub(super) fn parse(name: &str) -> S3Result<Self> {
        match name {
            "FULL_OBJECT" => Ok(Self::FullObject),
            "COMPOSITE" => Ok(Self::Composite),
            other => Err(s3_error!(InvalidRequest, "checksum type {other} is not known")),
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::FullObject => "FULL_OBJECT",
            Self::Composite => "COMPOSITE",
        }
    }
}

impl Checksum {
    /// The value, if it has this algorithm. S3 has one member for each algorithm.
    pub(super) fn of(&self, algorithm: Algorithm) -> Option<String> {
        (self.algorithm == algorithm).then(|| self.value.clone())
    }

    fn bytes(&self) -> Vec<u8> {
        BASE64.decode(&self.value).unwrap_or_default()
    }
}

/// The only checksum among the five members of a request, with its length checked.
pub(super) fn single_checksum(members: [(Algorithm, &Option<String>); 5]) -> S3Result<Option<Checksum>> {
    let mut found = None;
    for (algorithm, value) in members {
        let Some(value) = value else { continue };
        if found.is_some() {
            return Err(s3_error!(InvalidRequest, "Expecting a single x-amz-checksum- header"));
        }
        // A composite checksum ends with the number of its parts.
        let digest = value.split_once('-').map_or(value.as_str(), |(digest, _)| digest);
        if BASE64.decode(digest).map(|bytes| bytes.len()).ok() != Some(algorithm.size_bytes()) {
            return Err(s3_error!(InvalidRequest, "Value for {} header is invalid.", algorithm.header()));
        }
        found = Some(Checksum { algorithm, value: value.clone() });
    }
    Ok(found)
}

/// Reads the five checksum members of an s3s input as one checksum.
macro_rules! declared {
    ($input:expr) => {
        $crate::s3::checksum::single_checksum([
            ($crate::s3::checksum::Algorithm::Crc32, &$input.checksum_crc32),
            ($crate::s3::checksum::Algorithm::Crc32c, &$input.checksum_crc32c),
            ($crate::s3::checksum::Algorithm::Crc64nvme, &$input.checksum_crc64nvme),
            ($crate::s3::checksum::Algorithm::Sha1, &$input.checksum_sha1),
            ($crate::s3::checksum::Algorithm::Sha256, &$input.checksum_sha256),
        ])
    };
}
pub(super) use declared;

/// Writes a checksum to its member of an s3s output.
macro_rules! set_checksum {
    ($output:expr, $checksum:expr) => {{
        let checksum: &$crate::s3::checksum::Checksum = $checksum;
        $output.checksum_crc32 = checksum.of($crate::s3::checksum::Algorithm::Crc32);
        $output.checksum_crc32c = checksum.of($crate::s3::checksum::Algorithm::Crc32c);
        $output.checksum_crc64nvme = checksum.of($crate::s3::checksum::Algorithm::Crc64nvme);
        $output.checksum_sha1 = checksum.of($crate::s3::checksum::Algorithm::Sha1);
        $output.checksum_sha256 = checksum.of($crate::s3::checksum::Algorithm::Sha256);
    }};
}
pub(super) use set_checksum;

/// The digest that a request declares for its body: a checksum in a header or trailer, and an MD5.
pub(super) struct ExpectedDigest {
    pub(super) algorithm: Option<Algorithm>,
    value: Option<String>,
    trailers: Option<TrailingHeaders>,
    md5: Option<Vec<u8>>,
}

impl ExpectedDigest {
    /// No declared digest.
    pub(super) fn none() -> Self {
        Self { algorithm: None, value: None, trailers: None, md5: None }
    }

    /// Reads the declared digest from the headers of a request.
    pub(super) fn read(
        declared: Option<Checksum>,
        content_md5: Option<&str>,
        headers: &HeaderMap,
        trailers: Option<TrailingHeaders>,
    ) -> S3Result<Self> {
        let md5 = match content_md5.map(|value| BASE64.decode(value)) {
            Some(Ok(digest)) if digest.len() == 16 => Some(digest),
            Some(_) => return Err(s3_error!(InvalidDigest, "The Content-MD5 you specified was invalid.")),
            None => None,
        };
        if let Some(Checksum { algorithm, value }) = declared {
            return Ok(Self { algorithm: Some(algorithm), value: Some(value), trailers: None, md5 });
        }
        let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
        if let Some(trailer) = text("x-amz-trailer") {
            let algorithm = Algorithm::ALL.into_iter().find(|algorithm| algorithm.header() == trailer);
            let algorithm = algorithm.ok_or_else(|| s3_error!(InvalidRequest, "the trailer {trailer} is not a checksum"))?;
            return Ok(Self { algorithm: Some(algorithm), value: None, trailers, md5 });
        }
        if text("x-amz-sdk-checksum-algorithm").is_some() {
            let missing = "x-amz-sdk-checksum-algorithm specified, but no corresponding x-amz-checksum-* or x-amz-trailer headers were found.";
            return Err(s3_error!(InvalidRequest, "{missing}"));
        }
        Ok(Self { algorithm: None, value: None, trailers: None, md5 })
    }

    /// Compares the received bytes with the declared digest.
    pub(super) fn check(&self, found: &Digests) -> S3Result<()> {
        if self.md5.as_ref().is_some_and(|md5| md5[..] != found.md5) {
            return Err(s3_error!(BadDigest, "The Content-MD5 you specified did not match what we received."));
        }
        let Some(algorithm) = self.algorithm else { return Ok(()) };
        let from_trailer =
            || self.trailers.as_ref()?.read(|trailers| trailers.get(algorithm.header())?.to_str().ok().map(str::to_owned))?;
        let Some(value) = self.value.clone().or_else(from_trailer) else {
            return Err(s3_error!(InvalidRequest, "the trailer {} is missing", algorithm.header()));
        };
        match found.checksum(algorithm) {
            Some(found) if found.value == value => Ok(()),
            _ => Err(mismatch(algorithm)),
        }
    }
}

/// The error for bytes that do not match their checksum.
pub(super) fn mismatch(algorithm: Algorithm) -> S3Error {
    s3_error!(BadDigest, "The {} you specified did not match the calculated checksum.", algorithm.name())
}

/// The digests of a body.
pub(super) struct Digests {
    pub(super) md5: [u8; 16],
    sums: Sums,
}

impl Digests {
    /// The checksum of this algorithm, if it was computed.
    pub(super) fn checksum(&self, algorithm: Algorithm) -> Option<Checksum> {
        let value = match algorithm {
            Algorithm::Crc32 => &self.sums.checksum_crc32,
            Algorithm::Crc32c => &self.sums.checksum_crc32c,
            Algorithm::Crc64nvme => &self.sums.checksum_crc64nvme,
            Algorithm::Sha1 => &self.sums.checksum_sha1,
            Algorithm::Sha256 => &self.sums.checksum_sha256,
        };
        value.clone().map(|value| Checksum { algorithm, value })
    }
}

/// Computes the digests of a body in one pass: its MD5, and the requested checksums.
#[derive(Default)]
pub(super) struct Hasher {
    md5: Md5,
    sums: ChecksumHasher,
}

impl Hasher {
    /// Adds one more algorithm.
    pub(super) fn with(mut self, algorithm: Algorithm) -> Self {
        match algorithm {
            Algorithm::Crc32 => self.sums.crc32 = Some(Crc32::new()),
            Algorithm::Crc32c => self.sums.crc32c = Some(Crc32c::new()),
            Algorithm::Crc64nvme => self.sums.crc64nvme = Some(Crc64Nvme::new()),
            Algorithm::Sha1 => self.sums.sha1 = Some(Sha1::new()),
            Algorithm::Sha256 => self.sums.sha256 = Some(Sha256::new()),
        }
        self
    }

    pub(super) fn update(&mut self, bytes: &[u8]) {
        self.md5.update(bytes);
        self.sums.update(bytes);
    }

    pub(super) fn finish(self) -> Digests {
        Digests { md5: self.md5.finalize(), sums: self.sums.finalize() }
    }
}

/// The composite checksum: the checksum of the parts' checksums.
pub(super) fn composite<'a>(algorithm: Algorithm, parts: impl ExactSizeIterator<Item = &'a Checksum>) -> Checksum {
    let count = parts.len();
    let mut hasher = Hasher::default().with(algorithm);
    for part in parts {
        hasher.update(&part.bytes());
    }
    let Checksum { value, .. } = hasher.finish().checksum(algorithm).expect("the hasher has this algorithm");
    Checksum { algorithm, value: format!("{value}-{count}") }
}

/// The CRC of all bytes, from the CRCs and sizes of the parts. Hashes cannot be combined.
pub(super) fn combine_crcs<'a>(algorithm: Algorithm, parts: impl Iterator<Item = (&'a Checksum, u64)>) -> Option<Checksum> {
    let crc = algorithm.crc()?;
    let number = |checksum: &Checksum| checksum.bytes().iter().fold(0, |number, byte| number << 8 | u64::from(*byte));
    let joined = parts.map(|(checksum, size_bytes)| (number(checksum), size_bytes));
    let (sum, _) = joined.reduce(|(left, _), (right, size)| (crc_fast::checksum_combine(crc, left, right, size), 0))?;
    let value = BASE64.encode(&sum.to_be_bytes()[8 - algorithm.size_bytes()..]);
    Some(Checksum { algorithm, value })
}

/// The ETag of a multipart object: the MD5 of the parts' MD5s.
pub(super) fn multipart_etag<'a>(etags: impl ExactSizeIterator<Item = &'a str>) -> String {
    let count = etags.len();
    let mut md5 = Md5::new();
    for etag in etags {
        md5.update(&hex::decode(etag).unwrap_or_default());
    }
    format!("{}-{count}", hex::encode(md5.finalize()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checksum(algorithm: Algorithm, bytes: &[u8]) -> Checksum {
        let mut hasher = Hasher::default().with(algorithm);
        hasher.update(bytes);
        hasher.finish().checksum(algorithm).unwrap()
    }

    #[test]
    fn the_crc_of_the_whole_is_computed_from_its_parts() {
        for algorithm in [Algorithm::Crc32, Algorithm::Crc32c, Algorithm::Crc64nvme] {
            let parts = [b"the first part, ".as_slice(), b"", b"another one, ", b"and the end"];
            let sums = parts.map(|part| (checksum(algorithm, part), part.len() as u64));
            let whole = combine_crcs(algorithm, sums.iter().map(|(sum, size)| (sum, *size)));
            assert_eq!(whole, Some(checksum(algorithm, &parts.concat())), "{algorithm:?}");
        }
    }

    #[test]
    fn the_hash_of_the_whole_cannot_be_computed_from_its_parts() {
        let part = checksum(Algorithm::Sha256, b"part");
        assert_eq!(combine_crcs(Algorithm::Sha256, [(&part, 4)].into_iter()), None);
    }

    #[test]
    fn two_checksums_in_one_request_are_refused() {
        let value = |algorithm| Some(checksum(algorithm, b"x").value);
        let (crc32, sha256, short, none) = (value(Algorithm::Crc32), value(Algorithm::Sha256), Some("c2hvcnQ=".to_owned()), None);
        let read = |crc32, sha256| {
            let [_, crc32c, crc64nvme, sha1, _] = Algorithm::ALL.map(|algorithm| (algorithm, &none));
            single_checksum([(Algorithm::Crc32, crc32), crc32c, crc64nvme, sha1, (Algorithm::Sha256, sha256)])
        };
        assert_eq!(read(&none, &sha256).unwrap().unwrap().algorithm, Algorithm::Sha256);
        assert!(read(&none, &none).unwrap().is_none());
        assert!(read(&crc32, &sha256).is_err());
        assert!(read(&none, &short).is_err());
    }
}
