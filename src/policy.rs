//! The rules for uploads: the validation of a request, and the check against its topic's policy.
//!
//! Pure: the result depends on the arguments alone. `validate` runs before the broker checks the caller's rights to the
//! topic, and `apply_policy` after, so these are two functions.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use lfs_broker_client::api::{
    DEFAULT_PART_BYTES, FieldError, MAX_OBJECT_BYTES, MAX_PART_BYTES, MAX_PARTS, MAX_PUT_BYTES, MIN_PART_BYTES, OpenUpload,
    PartHashes, Policy, is_valid_filename, part_bytes,
};
use lfs_broker_client::checksum::{Algorithm, Digest, Sha256};

use crate::session::{Layout, PartHashMode, UploadSpec, max_integrity};

/// The longest record key, in bytes: every row and record stores it.
const MAX_RECORD_KEY_BYTES: usize = 4096;
/// The longest object key, in bytes (Amazon S3, "Creating object key names").
pub(crate) const MAX_OBJECT_KEY_BYTES: usize = 1024;
/// The names and values of all record headers together, in bytes: a pointer record stays small.
const MAX_RECORD_HEADERS_BYTES: usize = 8192;
/// The longest lifetime of a session and of a URL, in seconds (Amazon S3 User Guide: a signature is valid for 7 days).
pub(crate) const MAX_LIFETIME_SECONDS: u64 = 7 * 86_400;

/// How uploads are split into parts, and the policy of a topic that has none.
#[derive(Debug, Clone)]
pub struct Settings {
    /// `LFS_BROKER_TOPICS_DEFAULT_ENABLED`.
    pub default_enabled: bool,
    /// `LFS_BROKER_SINGLE_PUT_MAX_BYTES`.
    pub single_put_max_bytes: u64,
    /// `LFS_BROKER_PART_SIZE_BYTES`.
    pub part_size_bytes: u64,
    /// `LFS_BROKER_SESSION_SECONDS`.
    pub session_seconds: u64,
    /// `LFS_BROKER_SESSION_MAX_SECONDS`.
    pub session_max_seconds: u64,
    /// `LFS_BROKER_URL_SECONDS`.
    pub url_seconds: u64,
}

impl Default for Settings {
    fn default() -> Self {
        let Policy { session_seconds, session_max_seconds, url_seconds, .. } = Policy::default();
        Self {
            default_enabled: false,
            single_put_max_bytes: 64 << 20,
            part_size_bytes: DEFAULT_PART_BYTES,
            session_seconds,
            session_max_seconds,
            url_seconds,
        }
    }
}

impl Settings {
    /// The values of members that a stored policy does not set.
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

/// Why the broker does not open an upload.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum PolicyViolation {
    /// The request is not valid.
    #[error("{}", .0.first().map_or("the request is not valid", |error| error.detail.as_str()))]
    Invalid(Vec<FieldError>),
    /// The record's headers are too large.
    #[error("the record's headers have {0} bytes, at most {MAX_RECORD_HEADERS_BYTES} are allowed")]
    RecordTooLarge(usize),
    /// The topic accepts no uploads.
    #[error("topic {0} is not enabled for uploads")]
    TopicNotEnabled(String),
    /// The topic is enabled, but neither its policy nor the broker's settings name a bucket.
    #[error("topic {0} has no bucket: set one in its policy or in LFS_BROKER_S3_BUCKET")]
    NoBucket(String),
    /// The upload is larger than the topic allows.
    #[error("the upload has {size_bytes} bytes, the topic allows {max_bytes}")]
    TooLarge {
        /// The declared size in bytes.
        size_bytes: u64,
        /// The allowed size in bytes.
        max_bytes: u64,
    },
    /// The topic does not allow this checksum.
    #[error("{0}")]
    ChecksumNotAllowed(String),
    /// The topic does not allow this media type.
    #[error("content type {0} is not allowed on this topic")]
    ContentTypeNotAllowed(String),
}

/// A valid request, with its key, digest and content type parsed.
#[derive(Debug, Clone)]
pub(crate) struct ValidatedRequest {
    pub(crate) request: OpenUpload,
    pub(crate) key: Option<Vec<u8>>,
    pub(crate) algorithm: Algorithm,
    pub(crate) digest: Option<Digest>,
    pub(crate) content_type: String,
}

/// The rule of [`is_topic`], in an error.
pub(crate) const TOPIC_RULE: &str = "a topic has 1 to 249 characters of a-z A-Z 0-9 . _ -";

/// Whether Kafka allows such a topic name (1 to 249 of `[a-zA-Z0-9._-]`, not `.` or `..`).
pub(crate) fn is_topic(name: &str) -> bool {
    (1..=249).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
        && name != "."
        && name != ".."
}

/// Parses a request, or lists every member that is not valid.
pub(crate) fn validate(request: OpenUpload) -> Result<ValidatedRequest, PolicyViolation> {
    let mut errors = Vec::new();
    if !is_topic(&request.topic) {
        errors.push(FieldError::new("/topic", TOPIC_RULE));
    }
    if i64::try_from(request.size).is_err() {
        errors.push(FieldError::new("/size", format!("the size is {} bytes, at most 2^63 - 1 are allowed", request.size)));
    }
    if let Some(partition) = request.partition.filter(|partition| *partition < 0) {
        errors.push(FieldError::new("/partition", format!("partition {partition} does not exist: a partition is 0 or greater")));
    }
    let key = validate_key(&request, &mut errors);
    let (algorithm, digest) = declared_digest(&request, &mut errors);
    let content_type = request.content_type.clone().unwrap_or_else(|| "application/octet-stream".to_owned());
    if !is_media_type(&content_type) {
        errors.push(FieldError::new("/content_type", "a media type is type/subtype, at most 255 visible ASCII characters"));
    }
    if request.filename.as_deref().is_some_and(|name| !is_valid_filename(name)) {
        errors.push(FieldError::new("/filename", "a file name has 1 to 255 bytes, no slash, no backslash, no control character"));
    }
    let headers_bytes = validate_headers(&request, &mut errors);
    validate_parts(&request, algorithm, &mut errors);
    if !errors.is_empty() {
        return Err(PolicyViolation::Invalid(errors));
    }
    if headers_bytes > MAX_RECORD_HEADERS_BYTES {
        return Err(PolicyViolation::RecordTooLarge(headers_bytes));
    }
    Ok(ValidatedRequest { key, algorithm, digest, content_type, request })
}

fn validate_key(request: &OpenUpload, errors: &mut Vec<FieldError>) -> Option<Vec<u8>> {
    let (pointer, key) = match (&request.key, &request.key_base64) {
        (Some(_), Some(_)) => {
            errors.push(FieldError::new("/key_base64", "send either key or key_base64, not both"));
            return None;
        }
        (None, None) => return None,
        (Some(text), None) => ("/key", Some(text.clone().into_bytes())),
        (None, Some(text)) => ("/key_base64", BASE64.decode(text).ok()),
    };
    match key {
        Some(key) if key.len() <= MAX_RECORD_KEY_BYTES => Some(key),
        Some(key) => {
            errors.push(FieldError::new(
                pointer,
                format!("the key has {} bytes, at most {MAX_RECORD_KEY_BYTES} are allowed", key.len()),
            ));
            None
        }
        None => {
            errors.push(FieldError::new(pointer, "the key is not base64 (RFC 4648, section 4, with padding)"));
            None
        }
    }
}

fn declared_digest(request: &OpenUpload, errors: &mut Vec<FieldError>) -> (Algorithm, Option<Digest>) {
    let algorithm = request.checksum_alg.unwrap_or(Algorithm::Sha256);
    match (&request.sha256, request.checksum_alg, &request.checksum) {
        (Some(_), Some(_), _) | (Some(_), _, Some(_)) => {
            errors.push(FieldError::new("/checksum", "send either sha256 or checksum, not both"))
        }
        (Some(sha256), None, None) => return (algorithm, Some((*sha256).into())),
        (None, None, None) => {}
        (None, None, Some(_)) => errors.push(FieldError::new("/checksum_alg", "checksum needs checksum_alg")),
        (None, Some(Algorithm::None), Some(_)) => errors.push(FieldError::new("/checksum", "algorithm none has no checksum")),
        (None, Some(Algorithm::None | Algorithm::Sha256), None) => {}
        (None, Some(_), None) => errors.push(FieldError::new("/checksum", format!("{algorithm} needs its checksum at open"))),
        (None, Some(_), Some(hex)) => match algorithm.digest(hex) {
            Ok(digest) => return (algorithm, Some(digest)),
            Err(error) => errors.push(FieldError::new("/checksum", error.to_string())),
        },
    }
    (algorithm, None)
}

/// Checks a media type by RFC 9110, section 8.3.1, but stricter: it becomes a signed and stored header.
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

fn validate_headers(request: &OpenUpload, errors: &mut Vec<FieldError>) -> usize {
    let mut bytes = 0;
    for (name, value) in &request.headers.0 {
        let pointer = format!("/headers/{}", name.replace('~', "~0").replace('/', "~1"));
        if name.is_empty() || name.chars().any(char::is_control) {
            errors.push(FieldError::new(&pointer, "a header name must not be empty or contain a control character"));
        } else if name.to_ascii_lowercase().starts_with("lfs-") {
            errors.push(FieldError::new(&pointer, "header names that begin with lfs- are reserved for the broker"));
        } else if value.contains('\0') {
            // PostgreSQL cannot store a NUL character in text.
            errors.push(FieldError::new(&pointer, "a header value must not contain a NUL character"));
        }
        bytes += name.len() + value.len();
    }
    bytes
}

fn validate_parts(request: &OpenUpload, algorithm: Algorithm, errors: &mut Vec<FieldError>) {
    if request.part_sha256.is_some() && request.part_hashes.is_some() {
        errors.push(FieldError::new("/part_hashes", "send either part_sha256 or part_hashes, not both"));
    }
    if (request.part_sha256.is_some() || request.part_hashes.is_some()) && algorithm != Algorithm::Sha256 {
        errors.push(FieldError::new("/checksum_alg", "part hashes need checksum algorithm sha256"));
    }
    if (request.part_sha256.is_some() || request.part_hashes.is_some()) && request.size == 0 {
        errors.push(FieldError::new("/size", "an empty upload has no parts"));
    }
    if let Some(part_size) = request.part_size {
        if !(MIN_PART_BYTES..=MAX_PART_BYTES).contains(&part_size) {
            errors.push(FieldError::new(
                "/part_size",
                format!("{part_size} bytes, but a part has {MIN_PART_BYTES} to {MAX_PART_BYTES} bytes"),
            ));
        } else if request.size.div_ceil(part_size) > MAX_PARTS {
            let part_count = request.size.div_ceil(part_size);
            let detail = format!("parts of {part_size} bytes make {part_count} parts, at most {MAX_PARTS} are allowed");
            errors.push(FieldError::new("/part_size", detail));
        }
    }
    match (&request.part_sha256, request.part_size) {
        (Some(_), None) => errors.push(FieldError::new("/part_size", "part_sha256 needs part_size")),
        (Some(hashes), Some(part_size)) if part_size > 0 && hashes.len() as u64 != request.size.div_ceil(part_size) => {
            let needed = request.size.div_ceil(part_size);
            errors.push(FieldError::new("/part_sha256", format!("found {} hashes for {needed} parts", hashes.len())));
        }
        _ => {}
    }
}

/// Checks a request against its topic's policy. Returns the upload's spec and its part hashes.
pub(crate) fn apply_policy(
    validated: ValidatedRequest,
    policy: &Policy,
    settings: &Settings,
    traceparent: Option<String>,
) -> Result<(UploadSpec, Vec<Sha256>), PolicyViolation> {
    let request = validated.request;
    if !policy.enabled {
        return Err(PolicyViolation::TopicNotEnabled(request.topic));
    }
    if request.size > policy.max_bytes {
        return Err(PolicyViolation::TooLarge { size_bytes: request.size, max_bytes: policy.max_bytes });
    }
    if !policy.content_types.iter().any(|allowed| matches_type(allowed, &validated.content_type)) {
        return Err(PolicyViolation::ContentTypeNotAllowed(validated.content_type));
    }
    let layout = layout(&request, settings);
    check_algorithm(validated.algorithm, layout, policy)?;
    let seconds = |seconds: u64| u32::try_from(seconds.min(MAX_LIFETIME_SECONDS)).expect("seven days fit");
    let spec = UploadSpec {
        key: validated.key,
        partition: request.partition,
        headers: request.headers.0,
        traceparent,
        content_type: validated.content_type,
        filename: request.filename,
        size_bytes: request.size,
        algorithm: validated.algorithm,
        digest: validated.digest,
        min_integrity: policy.min_integrity,
        layout,
        kms_key_id: policy.kms_key_id.clone(),
        url_seconds: seconds(policy.url_seconds),
        session_seconds: seconds(policy.session_seconds),
        session_max_seconds: seconds(policy.session_max_seconds),
        topic: request.topic,
    };
    Ok((spec, request.part_sha256.unwrap_or_default()))
}

fn check_algorithm(algorithm: Algorithm, layout: Layout, policy: &Policy) -> Result<(), PolicyViolation> {
    let not_allowed = |detail: String| Err(PolicyViolation::ChecksumNotAllowed(detail));
    if !policy.checksums.contains(&algorithm) {
        let allowed: Vec<&str> = policy.checksums.iter().map(|algorithm| algorithm.name()).collect();
        return not_allowed(format!("checksum {algorithm} is not allowed on this topic, which allows {}", allowed.join(", ")));
    }
    if algorithm == Algorithm::Md5 && layout != Layout::Single {
        return not_allowed("md5 verifies single PUTs only, and this is a multipart upload".to_owned());
    }
    if max_integrity(algorithm) < policy.min_integrity {
        let needed = policy.min_integrity.name();
        return not_allowed(format!("{algorithm} cannot reach integrity {needed}, the minimum of this topic"));
    }
    Ok(())
}

/// Chooses the layout: parts if the upload is large or the client asked for parts, else a single PUT.
fn layout(request: &OpenUpload, settings: &Settings) -> Layout {
    let part_hashes = match (&request.part_sha256, request.part_hashes) {
        (Some(_), _) => PartHashMode::Given,
        (None, Some(PartHashes::Deferred)) => PartHashMode::Deferred,
        (None, None) => PartHashMode::None,
    };
    let single_put_max_bytes = settings.single_put_max_bytes.min(MAX_PUT_BYTES);
    let asked_for_parts =
        part_hashes != PartHashMode::None || request.part_size.is_some_and(|part_size| part_size < request.size);
    if request.size == 0 || (request.size <= single_put_max_bytes && !asked_for_parts) {
        return Layout::Single;
    }
    let configured = settings.part_size_bytes.clamp(MIN_PART_BYTES, MAX_PART_BYTES);
    let part_bytes = request.part_size.unwrap_or_else(|| part_bytes(request.size, configured));
    let part_count = u32::try_from(request.size.div_ceil(part_bytes)).expect("a valid request has at most 10,000 parts");
    Layout::Multipart { part_bytes, part_count, part_hashes }
}

/// Whether `allowed` (`a/b`, `a/*`, `*/*`) covers a media type. Parameters are ignored.
fn matches_type(allowed: &str, content_type: &str) -> bool {
    let essence = content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    let allowed = allowed.to_ascii_lowercase();
    match allowed.strip_suffix("/*") {
        Some("*") => true,
        Some(kind) => essence.split('/').next() == Some(kind),
        None => allowed == essence,
    }
}

/// Lists every member where a policy contradicts itself or a limit of S3.
pub(crate) fn validate_policy(policy: &Policy) -> Vec<FieldError> {
    let mut errors = Vec::new();
    for (pointer, bytes) in [("/min_bytes", policy.min_bytes), ("/max_bytes", policy.max_bytes)] {
        if bytes > MAX_OBJECT_BYTES {
            errors.push(FieldError::new(pointer, format!("{bytes} bytes, but S3 allows at most {MAX_OBJECT_BYTES}")));
        }
    }
    if policy.checksums.is_empty() {
        errors.push(FieldError::new("/checksums", "at least one checksum must be allowed"));
    } else if !policy.checksums.iter().any(|algorithm| max_integrity(*algorithm) >= policy.min_integrity) {
        errors.push(FieldError::new("/min_integrity", "none of the allowed checksums can reach this integrity"));
    }
    for (pointer, seconds) in [
        ("/session_seconds", policy.session_seconds),
        ("/session_max_seconds", policy.session_max_seconds),
        ("/url_seconds", policy.url_seconds),
    ] {
        if !(1..=MAX_LIFETIME_SECONDS).contains(&seconds) {
            errors.push(FieldError::new(pointer, format!("1 to {MAX_LIFETIME_SECONDS} seconds, found {seconds}")));
        }
    }
    if policy.content_types.iter().any(|allowed| !is_media_type(allowed)) {
        errors.push(FieldError::new("/content_types", "a content type is type/subtype, type/* or */*"));
    }
    if policy.bucket.as_deref().is_some_and(|bucket| !is_bucket_name(bucket)) {
        errors.push(FieldError::new("/bucket", "a bucket has 3 to 63 characters of a-z 0-9 . -"));
    }
    if policy.prefix.as_deref().is_some_and(|prefix| !is_prefix(prefix)) {
        let detail = "a prefix has segments of a-z A-Z 0-9 . _ - joined by single slashes, at most 200 characters";
        errors.push(FieldError::new("/prefix", detail));
    }
    if policy
        .kms_key_id
        .as_deref()
        .is_some_and(|key| key.is_empty() || key.len() > 2048 || !key.bytes().all(|b| b.is_ascii_graphic()))
    {
        errors.push(FieldError::new("/kms_key_id", "a KMS key id has 1 to 2048 visible ASCII characters"));
    }
    errors
}

/// Whether a bucket name follows the rules that every S3 store shares (Amazon S3, "Bucket naming rules").
fn is_bucket_name(name: &str) -> bool {
    (3..=63).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b".-".contains(&byte))
}

fn is_prefix(prefix: &str) -> bool {
    (1..=200).contains(&prefix.len()) && prefix.split('/').all(is_topic)
}

/// The key of an upload's object. Only the allow-listed topic comes from the client.
pub(crate) fn object_key(prefix: Option<&str>, tenant: &str, topic: &str, id: uuid::Uuid, at: time::OffsetDateTime) -> String {
    let lead = prefix.map(|prefix| format!("{prefix}/")).unwrap_or_default();
    let date = at.to_offset(time::UtcOffset::UTC).date();
    format!("{lead}{tenant}/{topic}/lfs/{:04}/{:02}/{:02}/{id}", date.year(), u8::from(date.month()), date.day())
}

/// The tenant and topic in an object key, if the key has this prefix and the form of [`object_key`].
pub(crate) fn parse_object_key<'a>(prefix: Option<&str>, object_key: &'a str) -> Option<(&'a str, &'a str)> {
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
