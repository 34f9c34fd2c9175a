//! Undeclared headers: headers of a stored object that its upload did not declare.
//!
//! A signature covers only the signed headers, so a store may keep other headers that the holder of a URL added.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, PoisonError};

use aws_sdk_s3::operation::head_object::HeadObjectOutput;

use super::TOKEN_KEY;

/// Names of the headers that the defaults of a bucket may set on every object.
const BUCKET_DEFAULT_HEADERS: [&str; 5] = [
    "x-amz-storage-class",
    "x-amz-server-side-encryption",
    "x-amz-server-side-encryption-aws-kms-key-id",
    "x-amz-object-lock-mode",
    "x-amz-object-lock-legal-hold",
];

/// Header values stored per bucket. More than one value per header is needed, because the defaults of a bucket can change.
const MAX_HEADERS_PER_BUCKET: usize = 64;

/// A header name in lower case and the header value.
pub(super) type Header = (String, String);

/// The headers in a HEAD response that no upload declares.
pub(super) fn undeclared(output: &HeadObjectOutput) -> Vec<Header> {
    let encryption = output.server_side_encryption().map(|encryption| encryption.as_str());
    let storage_class = output.storage_class().map(|class| class.as_str()).filter(|class| *class != "STANDARD");
    let legal_hold = output.object_lock_legal_hold_status().map(|hold| hold.as_str()).filter(|hold| *hold != "OFF");
    let tag_count = output.tag_count().filter(|count| *count > 0).map(|count| count.to_string());
    let standard = [
        ("content-encoding", output.content_encoding()),
        ("content-disposition", output.content_disposition()),
        ("content-language", output.content_language()),
        ("cache-control", output.cache_control()),
        ("expires", output.expires_string()),
        ("x-amz-website-redirect-location", output.website_redirect_location()),
        ("x-amz-tagging-count", tag_count.as_deref()),
        ("x-amz-server-side-encryption-customer-algorithm", output.sse_customer_algorithm()),
        ("x-amz-storage-class", storage_class),
        ("x-amz-server-side-encryption", encryption),
        ("x-amz-server-side-encryption-aws-kms-key-id", output.ssekms_key_id()),
        ("x-amz-object-lock-mode", output.object_lock_mode().map(|mode| mode.as_str())),
        ("x-amz-object-lock-legal-hold", legal_hold),
    ];
    let standard = standard.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?.to_owned())));
    let metadata = output.metadata().into_iter().flatten().filter(|(name, _)| *name != TOKEN_KEY);
    let metadata = metadata.map(|(name, value)| (format!("x-amz-meta-{name}"), value.clone()));
    let mut headers: Vec<Header> = standard.filter(|(_, value)| !value.is_empty()).chain(metadata).collect();
    headers.sort();
    headers
}

/// Whether the defaults of a bucket may set this header.
pub(crate) fn is_bucket_default_header(name: &str) -> bool {
    BUCKET_DEFAULT_HEADERS.contains(&name)
}

/// The headers that each bucket sets on every object, and the buckets in which the broker may not delete.
#[derive(Default)]
pub(super) struct BucketDefaults {
    headers: Mutex<HashMap<String, DefaultHeaders>>,
    undeletable: Mutex<HashSet<String>>,
}

/// The headers that a bucket sets on every object.
enum DefaultHeaders {
    /// Exactly these headers.
    Known(Vec<Header>),
    /// Unknown. Object Lock retains the bucket's probe object, so that object shows old defaults and not today's.
    Any,
}

impl BucketDefaults {
    /// Adds the headers of an object that was put without undeclared headers. Earlier headers stay accepted, because an
    /// upload may have begun before the bucket's defaults changed.
    pub(super) fn learn(&self, bucket: &str, found: &[Header]) {
        let mut headers = self.headers.lock().unwrap_or_else(PoisonError::into_inner);
        match headers.entry(bucket.to_owned()).or_insert_with(|| DefaultHeaders::Known(Vec::new())) {
            DefaultHeaders::Known(known) => {
                known.retain(|header| !found.contains(header));
                known.extend_from_slice(found);
                let excess = known.len().saturating_sub(MAX_HEADERS_PER_BUCKET);
                known.drain(..excess);
            }
            DefaultHeaders::Any => {}
        }
    }

    /// From now on accepts any value of the [`BUCKET_DEFAULT_HEADERS`] in this bucket.
    pub(super) fn accept_any(&self, bucket: &str) {
        self.set(bucket, DefaultHeaders::Any);
    }

    /// Whether any value is accepted in this bucket, because Object Lock retains its objects.
    pub(super) fn accepts_any(&self, bucket: &str) -> bool {
        let headers = self.headers.lock().unwrap_or_else(PoisonError::into_inner);
        matches!(headers.get(bucket), Some(DefaultHeaders::Any))
    }

    /// Records that the broker may not delete in this bucket.
    pub(super) fn mark_undeletable(&self, bucket: &str) {
        self.undeletable.lock().unwrap_or_else(PoisonError::into_inner).insert(bucket.to_owned());
    }

    /// Whether the broker may not delete in this bucket.
    pub(super) fn is_undeletable(&self, bucket: &str) -> bool {
        self.undeletable.lock().unwrap_or_else(PoisonError::into_inner).contains(bucket)
    }

    fn set(&self, bucket: &str, defaults: DefaultHeaders) {
        // The map stays small: only administrators name buckets, in settings and policies.
        self.headers.lock().unwrap_or_else(PoisonError::into_inner).insert(bucket.to_owned(), defaults);
    }

    /// Removes the headers that the bucket itself sets. Headers of an unknown bucket stay, so the caller must run the
    /// probe, which learns the defaults, and then repeat the HEAD.
    pub(super) fn without_defaults(&self, bucket: &str, mut found: Vec<Header>) -> Vec<Header> {
        let headers = self.headers.lock().unwrap_or_else(PoisonError::into_inner);
        match headers.get(bucket) {
            Some(DefaultHeaders::Known(known)) => {
                // A gateway may add headers to every response. An encoding stays, because it changes the bytes for readers.
                found.retain(|header| header.0 == "content-encoding" || !known.contains(header));
            }
            Some(DefaultHeaders::Any) => found.retain(|(name, _)| !is_bucket_default_header(name)),
            None => {}
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use aws_sdk_s3::types::{ServerSideEncryption, StorageClass};

    use super::*;

    #[test]
    fn every_header_that_the_upload_did_not_declare_is_listed() {
        let head = HeadObjectOutput::builder()
            .content_encoding("gzip")
            .tag_count(2)
            .storage_class(StorageClass::ReducedRedundancy)
            .server_side_encryption(ServerSideEncryption::Aes256)
            .metadata(TOKEN_KEY, "id")
            .metadata("extra", "x")
            .build();
        let listed: Vec<String> = undeclared(&head).into_iter().map(|(name, value)| format!("{name}: {value}")).collect();
        let expected = [
            "content-encoding: gzip",
            "x-amz-meta-extra: x",
            "x-amz-server-side-encryption: AES256",
            "x-amz-storage-class: REDUCED_REDUNDANCY",
            "x-amz-tagging-count: 2",
        ];
        assert_eq!(listed, expected);
        let plain = HeadObjectOutput::builder().metadata(TOKEN_KEY, "id").storage_class(StorageClass::Standard).tag_count(0);
        assert_eq!(undeclared(&plain.build()), []);
    }

    #[test]
    fn only_the_headers_that_the_bucket_itself_sets_are_removed() {
        let header = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let (aes, gzip) = (header("x-amz-server-side-encryption", "AES256"), header("content-encoding", "gzip"));
        let kms = header("x-amz-server-side-encryption", "aws:kms");
        let defaults = BucketDefaults::default();
        let remaining = |bucket: &str, found: &[&Header]| {
            defaults.without_defaults(bucket, found.iter().map(|&header| header.clone()).collect())
        };
        assert_eq!(remaining("b", &[&aes]).len(), 1, "the bucket is still unknown");
        defaults.learn("b", &[aes.clone(), gzip.clone()]);
        assert_eq!(remaining("b", &[&aes, &gzip]).first(), Some(&gzip), "no bucket sets an encoding");
        assert_eq!(remaining("b", &[&kms]).first(), Some(&kms));
        // The default of the bucket changes while an upload is in progress.
        let cached = header("cache-control", "max-age=14400");
        defaults.learn("b", &[kms.clone(), cached.clone()]);
        assert_eq!(remaining("b", &[&aes, &kms, &cached]), [], "earlier defaults stay accepted");
        assert_eq!(remaining("b", &[&header("cache-control", "no-store")]).len(), 1);
        assert_eq!(remaining("other", &[&aes]).first(), Some(&aes));
        defaults.accept_any("b");
        defaults.learn("b", &[]);
        assert_eq!(remaining("b", &[&kms, &gzip]).first(), Some(&gzip));
    }
}
