//! What may be uploaded: the shape of a request, and a topic's policy held against it.
//!
//! Pure: the answer depends on the arguments alone. The shape is checked before the caller's rights to the
//! topic, the policy after them, so the two are two functions.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use lfs_broker_client::api::{FieldError, OpenUpload, PartHashes, Policy};
use lfs_broker_client::checksum::{Algorithm, Digest, Sha256};

use crate::session::{Hashes, Layout, MAX_PART_BYTES, MAX_PARTS, MAX_PUT_BYTES, MIN_PART_BYTES, Promise, reachable};

/// Longest record key in bytes: it stands in every row and record.
const MAX_KEY_BYTES: usize = 4096;
/// Amazon S3, "Creating object key names".
pub(crate) const MAX_OBJECT_KEY_BYTES: usize = 1024;
/// All record headers together, names and values, in bytes: a pointer record stays small.
const MAX_HEADERS_BYTES: usize = 8192;
/// The largest object, in bytes (Amazon S3: 5 TiB).
const MAX_OBJECT_BYTES: u64 = 5 << 40;
/// Longest session and the longest life of a URL, in seconds (SigV4: 7 days).
pub(crate) const MAX_SECONDS: u64 = 7 * 86_400;

/// How uploads are cut, and what a topic without a policy may do.
#[derive(Debug, Clone)]
pub struct Settings {
    /// `LFS_BROKER_TOPICS_DEFAULT_ENABLED`: whether a topic without a policy takes uploads.
    pub default_enabled: bool,
    /// `LFS_BROKER_SINGLE_PUT_MAX_BYTES`: larger uploads go up in parts.
    pub single_put_max_bytes: u64,
    /// `LFS_BROKER_PART_SIZE_BYTES`: the size of a part, which grows with the file.
    pub part_size_bytes: u64,
    /// `LFS_BROKER_SESSION_SECONDS`: how long an upload stays open.
    pub session_seconds: u64,
    /// `LFS_BROKER_SESSION_MAX_SECONDS`: how long it stays open at most.
    pub session_max_seconds: u64,
    /// `LFS_BROKER_URL_SECONDS`: how long a URL lives.
    pub url_seconds: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            default_enabled: false,
            single_put_max_bytes: 64 << 20,
            part_size_bytes: 16 << 20,
            session_seconds: 3600,
            session_max_seconds: 86_400,
            url_seconds: 900,
        }
    }
}

impl Settings {
    /// What an absent member of a stored policy means.
    pub(crate) fn base_policy(&self) -> Policy {
        Policy {
            session_seconds: self.session_seconds,
            session_max_seconds: self.session_max_seconds,
            url_seconds: self.url_seconds,
            ..Policy::default()
        }
    }

    /// The policy of a topic that has none.
    pub(crate) fn default_policy(&self) -> Policy {
        Policy { enabled: self.default_enabled, ..self.base_policy() }
    }
}

/// Why an upload may not be opened.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Refusal {
    /// The request has the wrong shape.
    #[error("{}", .0.first().map_or("the request is not valid", |error| error.detail.as_str()))]
    Invalid(Vec<FieldError>),
    /// The record's headers are too large.
    #[error("the record's headers have {0} bytes, at most {MAX_HEADERS_BYTES} are allowed")]
    RecordTooLarge(usize),
    /// The topic takes no uploads.
    #[error("topic {0} is not enabled for uploads")]
    TopicNotEnabled(String),
    /// The topic is enabled, but nobody said which bucket takes its bytes.
    #[error("topic {0} has no bucket: neither its policy nor the broker names one")]
    NoBucket(String),
    /// The upload is larger than the topic allows.
    #[error("the upload has {size} bytes, the topic allows {max}")]
    TooLarge {
        /// Bytes promised.
        size: u64,
        /// Bytes allowed.
        max: u64,
    },
    /// The topic does not take this checksum.
    #[error("{0}")]
    ChecksumNotAllowed(String),
    /// The topic does not take this media type.
    #[error("content type {0} is not allowed on this topic")]
    ContentTypeNotAllowed(String),
}

/// One wrong place in a request.
pub(crate) fn wrong(pointer: &str, detail: impl Into<String>) -> FieldError {
    FieldError { pointer: pointer.to_owned(), detail: detail.into() }
}

/// A request of the right shape, with its parts read.
#[derive(Debug, Clone)]
pub(crate) struct Shaped {
    pub(crate) request: OpenUpload,
    pub(crate) key: Option<Vec<u8>>,
    pub(crate) algorithm: Algorithm,
    pub(crate) digest: Option<Digest>,
    pub(crate) content_type: String,
}

/// Whether Kafka could have such a topic (its own rule: 1 to 249 of `[a-zA-Z0-9._-]`, not `.` or `..`).
pub(crate) fn is_topic(name: &str) -> bool {
    (1..=249).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
        && name != "."
        && name != ".."
}

/// Reads a request, or says every place where its shape is wrong.
pub(crate) fn shape(request: OpenUpload) -> Result<Shaped, Refusal> {
    let mut errors = Vec::new();
    if !is_topic(&request.topic) {
        errors.push(wrong("/topic", "a topic has 1 to 249 characters of a-z A-Z 0-9 . _ -"));
    }
    if i64::try_from(request.size).is_err() {
        errors.push(wrong("/size", format!("{} bytes are more than 2^63 - 1", request.size)));
    }
    if request.partition.is_some_and(i32::is_negative) {
        errors.push(wrong("/partition", "a partition is 0 or more"));
    }
    let key = record_key(&request, &mut errors);
    let (algorithm, digest) = promised(&request, &mut errors);
    let content_type = request.content_type.clone().unwrap_or_else(|| "application/octet-stream".to_owned());
    if !is_media_type(&content_type) {
        errors.push(wrong("/content_type", "a media type is type/subtype, at most 255 visible ASCII characters"));
    }
    if request.filename.as_deref().is_some_and(|name| !is_filename(name)) {
        errors.push(wrong("/filename", "a file name has 1 to 255 bytes, no slash, no backslash, no control character"));
    }
    let headers_bytes = headers(&request, &mut errors);
    part_members(&request, algorithm, &mut errors);
    if !errors.is_empty() {
        return Err(Refusal::Invalid(errors));
    }
    if headers_bytes > MAX_HEADERS_BYTES {
        return Err(Refusal::RecordTooLarge(headers_bytes));
    }
    Ok(Shaped { key, algorithm, digest, content_type, request })
}

fn record_key(request: &OpenUpload, errors: &mut Vec<FieldError>) -> Option<Vec<u8>> {
    let (pointer, key) = match (&request.key, &request.key_base64) {
        (Some(_), Some(_)) => {
            errors.push(wrong("/key_base64", "key and key_base64 exclude each other"));
            return None;
        }
        (None, None) => return None,
        (Some(text), None) => ("/key", Some(text.clone().into_bytes())),
        (None, Some(text)) => ("/key_base64", BASE64.decode(text).ok()),
    };
    match key {
        Some(key) if key.len() <= MAX_KEY_BYTES => Some(key),
        Some(key) => {
            errors.push(wrong(pointer, format!("the key has {} bytes, at most {MAX_KEY_BYTES} are allowed", key.len())));
            None
        }
        None => {
            errors.push(wrong(pointer, "not base64 (RFC 4648, section 4, with padding)"));
            None
        }
    }
}

fn promised(request: &OpenUpload, errors: &mut Vec<FieldError>) -> (Algorithm, Option<Digest>) {
    let algorithm = request.checksum_alg.unwrap_or(Algorithm::Sha256);
    match (&request.sha256, request.checksum_alg, &request.checksum) {
        (Some(_), Some(_), _) | (Some(_), _, Some(_)) => {
            errors.push(wrong("/checksum", "sha256 and checksum exclude each other"))
        }
        (Some(sha256), None, None) => return (algorithm, Some((*sha256).into())),
        (None, None, None) => {}
        (None, None, Some(_)) => errors.push(wrong("/checksum_alg", "a checksum needs its algorithm")),
        (None, Some(Algorithm::None), Some(_)) => errors.push(wrong("/checksum", "none has no checksum")),
        (None, Some(Algorithm::None | Algorithm::Sha256), None) => {}
        (None, Some(_), None) => errors.push(wrong("/checksum", format!("{algorithm} needs its checksum at open"))),
        (None, Some(_), Some(hex)) => match algorithm.digest(hex) {
            Ok(digest) => return (algorithm, Some(digest)),
            Err(error) => errors.push(wrong("/checksum", error.to_string())),
        },
    }
    (algorithm, None)
}

/// RFC 9110, section 8.3.1, as strictly as a header that is signed and stored needs it.
fn is_media_type(text: &str) -> bool {
    let token = |part: &str| {
        !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"!#$&^_.+-%'*`|~".contains(&byte))
    };
    let (essence, parameters) = text.split_once(';').map_or((text, ""), |(essence, rest)| (essence, rest));
    let visible = parameters.bytes().all(|byte| (b' '..=b'~').contains(&byte));
    match essence.trim_end().split_once('/') {
        Some((kind, subtype)) => text.len() <= 255 && token(kind) && token(subtype) && visible && !text.ends_with(' '),
        None => false,
    }
}

fn is_filename(name: &str) -> bool {
    (1..=255).contains(&name.len())
        && !name.chars().any(|c| c.is_control() || c == '/' || c == '\\')
        && name != "."
        && name != ".."
}

fn headers(request: &OpenUpload, errors: &mut Vec<FieldError>) -> usize {
    let mut bytes = 0;
    for (name, value) in &request.headers.0 {
        let pointer = format!("/headers/{}", name.replace('~', "~0").replace('/', "~1"));
        if name.is_empty() || name.chars().any(char::is_control) {
            errors.push(wrong(&pointer, "a header's name is not empty and has no control character"));
        } else if name.to_ascii_lowercase().starts_with("lfs-") {
            errors.push(wrong(&pointer, "names that begin with lfs- are the broker's"));
        } else if value.contains('\0') {
            // PostgreSQL's text holds every character but this one.
            errors.push(wrong(&pointer, "a header's value has no NUL character"));
        }
        bytes += name.len() + value.len();
    }
    bytes
}

fn part_members(request: &OpenUpload, algorithm: Algorithm, errors: &mut Vec<FieldError>) {
    if request.part_sha256.is_some() && request.part_hashes.is_some() {
        errors.push(wrong("/part_hashes", "part_sha256 and part_hashes exclude each other"));
    }
    if (request.part_sha256.is_some() || request.part_hashes.is_some()) && algorithm != Algorithm::Sha256 {
        errors.push(wrong("/checksum_alg", "part hashes go with sha256"));
    }
    if (request.part_sha256.is_some() || request.part_hashes.is_some()) && request.size == 0 {
        errors.push(wrong("/size", "an empty upload has no parts"));
    }
    if let Some(part_size) = request.part_size {
        if !(MIN_PART_BYTES..=MAX_PART_BYTES).contains(&part_size) {
            errors.push(wrong("/part_size", format!("a part has {MIN_PART_BYTES} to {MAX_PART_BYTES} bytes")));
        } else if request.size.div_ceil(part_size) > MAX_PARTS {
            errors.push(wrong("/part_size", format!("{part_size} bytes a part make more than {MAX_PARTS} parts")));
        }
    }
    match (&request.part_sha256, request.part_size) {
        (Some(_), None) => errors.push(wrong("/part_size", "part_sha256 needs part_size")),
        (Some(hashes), Some(part_size)) if part_size > 0 && hashes.len() as u64 != request.size.div_ceil(part_size) => {
            let needed = request.size.div_ceil(part_size);
            errors.push(wrong("/part_sha256", format!("{} hashes for {needed} parts", hashes.len())));
        }
        _ => {}
    }
}

/// Holds a request against its topic's policy. Gives the promise to keep and the hashes of its parts.
pub(crate) fn admit(
    shaped: Shaped,
    policy: &Policy,
    settings: &Settings,
    traceparent: Option<String>,
) -> Result<(Promise, Vec<Sha256>), Refusal> {
    let request = shaped.request;
    if !policy.enabled {
        return Err(Refusal::TopicNotEnabled(request.topic));
    }
    if request.size > policy.max_bytes {
        return Err(Refusal::TooLarge { size: request.size, max: policy.max_bytes });
    }
    if !policy.content_types.iter().any(|allowed| matches_type(allowed, &shaped.content_type)) {
        return Err(Refusal::ContentTypeNotAllowed(shaped.content_type));
    }
    let layout = layout(&request, settings);
    check_algorithm(shaped.algorithm, layout, policy)?;
    let seconds = |seconds: u64| u32::try_from(seconds.min(MAX_SECONDS)).expect("seven days fit");
    let promise = Promise {
        key: shaped.key,
        partition: request.partition,
        headers: request.headers.0,
        traceparent,
        content_type: shaped.content_type,
        filename: request.filename,
        size_bytes: request.size,
        algorithm: shaped.algorithm,
        digest: shaped.digest,
        min_integrity: policy.min_integrity,
        layout,
        kms_key_id: policy.kms_key_id.clone(),
        url_seconds: seconds(policy.url_seconds),
        session_seconds: seconds(policy.session_seconds),
        session_max_seconds: seconds(policy.session_max_seconds),
        topic: request.topic,
    };
    Ok((promise, request.part_sha256.unwrap_or_default()))
}

fn check_algorithm(algorithm: Algorithm, layout: Layout, policy: &Policy) -> Result<(), Refusal> {
    let no = |detail: String| Err(Refusal::ChecksumNotAllowed(detail));
    if !policy.checksums.contains(&algorithm) {
        let allowed: Vec<&str> = policy.checksums.iter().map(|algorithm| algorithm.name()).collect();
        return no(format!("checksum {algorithm} is not allowed on this topic, which takes {}", allowed.join(", ")));
    }
    if algorithm == Algorithm::Md5 && layout != Layout::Single {
        return no("md5 proves single PUTs only, and this upload goes up in parts".to_owned());
    }
    if reachable(algorithm) < policy.min_integrity {
        return no(format!("{algorithm} cannot reach {}, the least proof of this topic", policy.min_integrity.name()));
    }
    Ok(())
}

/// Cuts the upload: in parts where it is large, or where the client asked for parts.
fn layout(request: &OpenUpload, settings: &Settings) -> Layout {
    let hashes = match (&request.part_sha256, request.part_hashes) {
        (Some(_), _) => Hashes::Given,
        (None, Some(PartHashes::Deferred)) => Hashes::Deferred,
        (None, None) => Hashes::None,
    };
    let single_max = settings.single_put_max_bytes.min(MAX_PUT_BYTES);
    let asked_for_parts = hashes != Hashes::None || request.part_size.is_some_and(|part_size| part_size < request.size);
    if request.size == 0 || (request.size <= single_max && !asked_for_parts) {
        return Layout::Single;
    }
    let part_bytes = request.part_size.unwrap_or_else(|| default_part_bytes(request.size, settings));
    let parts = u32::try_from(request.size.div_ceil(part_bytes)).expect("the shape allows 10,000 parts");
    Layout::Multipart { part_bytes, parts, hashes }
}

/// The configured part size, or whole MiB enough to stay within 10,000 parts.
fn default_part_bytes(size: u64, settings: &Settings) -> u64 {
    const MIB: u64 = 1 << 20;
    settings.part_size_bytes.clamp(MIN_PART_BYTES, MAX_PART_BYTES).max(size.div_ceil(MAX_PARTS).div_ceil(MIB) * MIB)
}

/// Whether `allowed` (`a/b`, `a/*`, `*/*`) covers a media type, whatever its parameters.
fn matches_type(allowed: &str, content_type: &str) -> bool {
    let essence = content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    let allowed = allowed.to_ascii_lowercase();
    match allowed.strip_suffix("/*") {
        Some("*") => true,
        Some(kind) => essence.split('/').next() == Some(kind),
        None => allowed == essence,
    }
}

/// Says every place where a policy contradicts itself or S3.
pub(crate) fn check(policy: &Policy) -> Vec<FieldError> {
    let mut errors = Vec::new();
    for (place, bytes) in [("/min_bytes", policy.min_bytes), ("/max_bytes", policy.max_bytes)] {
        if bytes > MAX_OBJECT_BYTES {
            errors.push(wrong(place, format!("S3 holds {MAX_OBJECT_BYTES} bytes at most")));
        }
    }
    if policy.checksums.is_empty() {
        errors.push(wrong("/checksums", "at least one checksum must be allowed"));
    } else if !policy.checksums.iter().any(|algorithm| reachable(*algorithm) >= policy.min_integrity) {
        errors.push(wrong("/min_integrity", "none of the checksums can reach it"));
    }
    for (place, seconds) in [
        ("/session_seconds", policy.session_seconds),
        ("/session_max_seconds", policy.session_max_seconds),
        ("/url_seconds", policy.url_seconds),
    ] {
        if !(1..=MAX_SECONDS).contains(&seconds) {
            errors.push(wrong(place, format!("1 to {MAX_SECONDS} seconds")));
        }
    }
    if policy.content_types.iter().any(|allowed| !is_media_type(allowed)) {
        errors.push(wrong("/content_types", "type/subtype, type/* or */*"));
    }
    if policy.bucket.as_deref().is_some_and(|bucket| !is_bucket(bucket)) {
        errors.push(wrong("/bucket", "a bucket has 3 to 63 characters of a-z 0-9 . -"));
    }
    if policy.prefix.as_deref().is_some_and(|prefix| !is_prefix(prefix)) {
        errors.push(wrong("/prefix", "segments of a-z A-Z 0-9 . _ - joined by single slashes, at most 200 characters"));
    }
    if policy
        .kms_key_id
        .as_deref()
        .is_some_and(|key| key.is_empty() || key.len() > 2048 || !key.bytes().all(|b| b.is_ascii_graphic()))
    {
        errors.push(wrong("/kms_key_id", "1 to 2048 visible ASCII characters"));
    }
    errors
}

/// Amazon S3, "Bucket naming rules", the part that every store shares.
fn is_bucket(name: &str) -> bool {
    (3..=63).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b".-".contains(&byte))
}

fn is_prefix(prefix: &str) -> bool {
    (1..=200).contains(&prefix.len()) && prefix.split('/').all(is_topic)
}

/// Where an upload's object is: nothing in the key comes from the client but the allow-listed topic.
pub(crate) fn object_key(prefix: Option<&str>, tenant: &str, topic: &str, id: uuid::Uuid, at: time::OffsetDateTime) -> String {
    let lead = prefix.map(|prefix| format!("{prefix}/")).unwrap_or_default();
    let date = at.to_offset(time::UtcOffset::UTC).date();
    format!("{lead}{tenant}/{topic}/lfs/{:04}/{:02}/{:02}/{id}", date.year(), u8::from(date.month()), date.day())
}

/// The tenant and topic that an object's key names, given the prefix it must have.
pub(crate) fn owner_of<'a>(prefix: Option<&str>, object_key: &'a str) -> Option<(&'a str, &'a str)> {
    let rest = match prefix {
        Some(prefix) => object_key.strip_prefix(prefix)?.strip_prefix('/')?,
        None => object_key,
    };
    let mut segments = rest.split('/');
    let (tenant, topic, lfs) = (segments.next()?, segments.next()?, segments.next()?);
    let plain = |segment: &str| !matches!(segment, "" | "." | "..") && !segment.chars().any(char::is_control);
    let clean = object_key.len() <= MAX_OBJECT_KEY_BYTES && segments.clone().next().is_some() && segments.all(plain);
    (lfs == "lfs" && clean && !tenant.is_empty() && is_topic(topic)).then_some((tenant, topic))
}

#[cfg(test)]
#[path = "policy_tests.rs"]
mod tests;
