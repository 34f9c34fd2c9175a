//! What bytes are held against: MD5 for the ETag, and one of S3's five checksums.
//!
//! An object has exactly one checksum. Where the client named none it is CRC64NVME, as on AWS.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use crc_fast::CrcAlgorithm;
use hyper::HeaderMap;
use s3s::checksum::ChecksumHasher;
use s3s::crypto::{Checksum as _, Crc32, Crc32c, Crc64Nvme, Md5, Sha1, Sha256};
use s3s::{S3Error, S3Result, TrailingHeaders, s3_error};
use serde::{Deserialize, Serialize};

/// The algorithms that S3 has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Algorithm {
    Crc32,
    Crc32c,
    Crc64Nvme,
    Sha1,
    Sha256,
}

/// What a checksum of a multipart object covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Kind {
    /// Every byte, in order.
    FullObject,
    /// The checksums of the parts, in order.
    Composite,
}

/// A checksum as S3's headers carry it: base64, with `-N` behind it where it is composite.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Checksum {
    pub(super) algorithm: Algorithm,
    pub(super) value: String,
}

impl Algorithm {
    const ALL: [Self; 5] = [Self::Crc32, Self::Crc32c, Self::Crc64Nvme, Self::Sha1, Self::Sha256];

    /// Reads S3's name of it, as in `x-amz-checksum-algorithm`.
    pub(super) fn parse(name: &str) -> S3Result<Self> {
        let named = Self::ALL.into_iter().find(|algorithm| algorithm.name() == name);
        named.ok_or_else(|| s3_error!(InvalidRequest, "checksum algorithm {name} is not known"))
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Crc32 => "CRC32",
            Self::Crc32c => "CRC32C",
            Self::Crc64Nvme => "CRC64NVME",
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
            Self::Crc64Nvme => 8,
            Self::Sha1 => 20,
            Self::Sha256 => 32,
        }
    }

    /// The CRC behind it, for only a CRC of the whole follows from those of its parts.
    fn crc(self) -> Option<CrcAlgorithm> {
        match self {
            Self::Crc32 => Some(CrcAlgorithm::Crc32IsoHdlc),
            Self::Crc32c => Some(CrcAlgorithm::Crc32Iscsi),
            Self::Crc64Nvme => Some(CrcAlgorithm::Crc64Nvme),
            Self::Sha1 | Self::Sha256 => None,
        }
    }

    /// The kind a multipart upload has when it asks for `kind`, by AWS's table of what goes with what.
    pub(super) fn kind(self, kind: Option<Kind>) -> S3Result<Kind> {
        match (self, kind) {
            (Self::Sha1 | Self::Sha256, Some(Kind::FullObject)) | (Self::Crc64Nvme, Some(Kind::Composite)) => {
                Err(s3_error!(InvalidRequest, "the checksum type does not go with {}", self.name()))
            }
            (_, Some(kind)) => Ok(kind),
            (Self::Crc64Nvme, None) => Ok(Kind::FullObject),
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
    /// The value, if it is of `algorithm`: S3 has a field for each of them.
    pub(super) fn of(&self, algorithm: Algorithm) -> Option<String> {
        (self.algorithm == algorithm).then(|| self.value.clone())
    }

    fn bytes(&self) -> Vec<u8> {
        BASE64.decode(&self.value).unwrap_or_default()
    }
}

/// The one checksum among the five members of a request, checked for its form.
pub(super) fn single(members: [(Algorithm, &Option<String>); 5]) -> S3Result<Option<Checksum>> {
    let mut found = None;
    for (algorithm, value) in members {
        let Some(value) = value else { continue };
        if found.is_some() {
            return Err(s3_error!(InvalidRequest, "Expecting a single x-amz-checksum- header"));
        }
        // A composite one ends in the number of its parts.
        let digest = value.split_once('-').map_or(value.as_str(), |(digest, _)| digest);
        if BASE64.decode(digest).map(|bytes| bytes.len()).ok() != Some(algorithm.size_bytes()) {
            return Err(s3_error!(InvalidRequest, "Value for {} header is invalid.", algorithm.header()));
        }
        found = Some(Checksum { algorithm, value: value.clone() });
    }
    Ok(found)
}

/// Reads the five checksum members of one of s3s's inputs as one.
macro_rules! declared {
    ($input:expr) => {
        $crate::dev::s3::checksum::single([
            ($crate::dev::s3::checksum::Algorithm::Crc32, &$input.checksum_crc32),
            ($crate::dev::s3::checksum::Algorithm::Crc32c, &$input.checksum_crc32c),
            ($crate::dev::s3::checksum::Algorithm::Crc64Nvme, &$input.checksum_crc64nvme),
            ($crate::dev::s3::checksum::Algorithm::Sha1, &$input.checksum_sha1),
            ($crate::dev::s3::checksum::Algorithm::Sha256, &$input.checksum_sha256),
        ])
    };
}
pub(super) use declared;

/// Writes a checksum into the member of one of s3s's outputs that it belongs to.
macro_rules! show {
    ($output:expr, $checksum:expr) => {{
        let checksum: &$crate::dev::s3::checksum::Checksum = $checksum;
        $output.checksum_crc32 = checksum.of($crate::dev::s3::checksum::Algorithm::Crc32);
        $output.checksum_crc32c = checksum.of($crate::dev::s3::checksum::Algorithm::Crc32c);
        $output.checksum_crc64nvme = checksum.of($crate::dev::s3::checksum::Algorithm::Crc64Nvme);
        $output.checksum_sha1 = checksum.of($crate::dev::s3::checksum::Algorithm::Sha1);
        $output.checksum_sha256 = checksum.of($crate::dev::s3::checksum::Algorithm::Sha256);
    }};
}
pub(super) use show;

/// What a request says its body is: a checksum in a header or behind the body, and an MD5.
pub(super) struct Claim {
    pub(super) algorithm: Option<Algorithm>,
    value: Option<String>,
    trailers: Option<TrailingHeaders>,
    md5: Option<Vec<u8>>,
}

impl Claim {
    /// A body of which nothing is said.
    pub(super) fn none() -> Self {
        Self { algorithm: None, value: None, trailers: None, md5: None }
    }

    /// What the headers of a request say of its body.
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
            let algorithm = algorithm.ok_or_else(|| s3_error!(InvalidRequest, "trailer {trailer} is no checksum"))?;
            return Ok(Self { algorithm: Some(algorithm), value: None, trailers, md5 });
        }
        if text("x-amz-sdk-checksum-algorithm").is_some() {
            let missing = "x-amz-sdk-checksum-algorithm specified, but no corresponding x-amz-checksum-* or x-amz-trailer headers were found.";
            return Err(s3_error!(InvalidRequest, "{missing}"));
        }
        Ok(Self { algorithm: None, value: None, trailers: None, md5 })
    }

    /// Holds the bytes that came against what was said of them.
    pub(super) fn check(&self, found: &Digests) -> S3Result<()> {
        if self.md5.as_ref().is_some_and(|md5| md5[..] != found.md5) {
            return Err(s3_error!(BadDigest, "The Content-MD5 you specified did not match what we received."));
        }
        let Some(algorithm) = self.algorithm else { return Ok(()) };
        let behind =
            || self.trailers.as_ref()?.read(|trailers| trailers.get(algorithm.header())?.to_str().ok().map(str::to_owned))?;
        let Some(value) = self.value.clone().or_else(behind) else {
            return Err(s3_error!(InvalidRequest, "the trailer {} did not come", algorithm.header()));
        };
        if value != found.checksum.value {
            return Err(mismatch(algorithm));
        }
        Ok(())
    }
}

/// The answer to bytes that are not what their checksum says.
pub(super) fn mismatch(algorithm: Algorithm) -> S3Error {
    s3_error!(BadDigest, "The {} you specified did not match the calculated checksum.", algorithm.name())
}

/// Both digests of a body.
pub(super) struct Digests {
    pub(super) md5: [u8; 16],
    pub(super) checksum: Checksum,
}

/// Computes both digests of a body in one pass.
pub(super) struct Hasher {
    md5: Md5,
    algorithm: Algorithm,
    chosen: ChecksumHasher,
}

impl Hasher {
    pub(super) fn new(algorithm: Algorithm) -> Self {
        Self { md5: Md5::new(), algorithm, chosen: hasher(algorithm) }
    }

    pub(super) fn update(&mut self, bytes: &[u8]) {
        self.md5.update(bytes);
        self.chosen.update(bytes);
    }

    pub(super) fn finish(self) -> Digests {
        Digests { md5: self.md5.finalize(), checksum: finish(self.algorithm, self.chosen) }
    }
}

fn hasher(algorithm: Algorithm) -> ChecksumHasher {
    let mut hasher = ChecksumHasher::default();
    match algorithm {
        Algorithm::Crc32 => hasher.crc32 = Some(Crc32::new()),
        Algorithm::Crc32c => hasher.crc32c = Some(Crc32c::new()),
        Algorithm::Crc64Nvme => hasher.crc64nvme = Some(Crc64Nvme::new()),
        Algorithm::Sha1 => hasher.sha1 = Some(Sha1::new()),
        Algorithm::Sha256 => hasher.sha256 = Some(Sha256::new()),
    }
    hasher
}

fn finish(algorithm: Algorithm, hasher: ChecksumHasher) -> Checksum {
    let sums = hasher.finalize();
    let found = [sums.checksum_crc32, sums.checksum_crc32c, sums.checksum_crc64nvme, sums.checksum_sha1, sums.checksum_sha256];
    let value = found.into_iter().flatten().next().expect("exactly one of the five was asked for");
    Checksum { algorithm, value }
}

/// The checksum of the parts' checksums.
pub(super) fn composite<'a>(algorithm: Algorithm, parts: impl ExactSizeIterator<Item = &'a Checksum>) -> Checksum {
    let count = parts.len();
    let mut hasher = hasher(algorithm);
    for part in parts {
        hasher.update(&part.bytes());
    }
    let Checksum { value, .. } = finish(algorithm, hasher);
    Checksum { algorithm, value: format!("{value}-{count}") }
}

/// The CRC of all bytes, from the CRCs and sizes of the parts; a hash has no such thing.
pub(super) fn combined<'a>(algorithm: Algorithm, parts: impl Iterator<Item = (&'a Checksum, u64)>) -> Option<Checksum> {
    let crc = algorithm.crc()?;
    let number = |checksum: &Checksum| checksum.bytes().iter().fold(0, |number, byte| number << 8 | u64::from(*byte));
    let joined = parts.map(|(checksum, size_bytes)| (number(checksum), size_bytes));
    let (sum, _) = joined.reduce(|(left, _), (right, size)| (crc_fast::checksum_combine(crc, left, right, size), 0))?;
    let value = BASE64.encode(&sum.to_be_bytes()[8 - algorithm.size_bytes()..]);
    Some(Checksum { algorithm, value })
}

/// The MD5 of the parts' MD5s, as the ETag of a multipart object has it.
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
        let mut hasher = Hasher::new(algorithm);
        hasher.update(bytes);
        hasher.finish().checksum
    }

    #[test]
    fn the_crc_of_the_whole_follows_from_its_parts() {
        for algorithm in [Algorithm::Crc32, Algorithm::Crc32c, Algorithm::Crc64Nvme] {
            let parts = [b"the first part, ".as_slice(), b"", b"another one, ", b"and the end"];
            let sums = parts.map(|part| (checksum(algorithm, part), part.len() as u64));
            let whole = combined(algorithm, sums.iter().map(|(sum, size)| (sum, *size)));
            assert_eq!(whole, Some(checksum(algorithm, &parts.concat())), "{algorithm:?}");
        }
    }

    #[test]
    fn the_whole_hash_does_not_follow_from_the_hashes_of_the_parts() {
        let part = checksum(Algorithm::Sha256, b"part");
        assert_eq!(combined(Algorithm::Sha256, [(&part, 4)].into_iter()), None);
    }

    #[test]
    fn two_checksums_in_one_request_are_refused() {
        let (sha256, crc32) = (checksum(Algorithm::Sha256, b"x").value, checksum(Algorithm::Crc32, b"x").value);
        let none = None;
        let members = |sha256: Option<&String>, crc32: Option<&String>| {
            let (sha256, crc32) = (sha256.cloned(), crc32.cloned());
            let (crc32c, crc64, sha1) = ((Algorithm::Crc32c, &none), (Algorithm::Crc64Nvme, &none), (Algorithm::Sha1, &none));
            single([(Algorithm::Crc32, &crc32), crc32c, crc64, sha1, (Algorithm::Sha256, &sha256)])
        };
        assert!(members(Some(&sha256), None).unwrap().is_some());
        assert!(members(Some(&sha256), Some(&crc32)).is_err());
        assert!(members(Some(&"c2hvcnQ=".to_owned()), None).is_err());
    }
}
