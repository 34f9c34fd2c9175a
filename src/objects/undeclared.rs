//! What HEAD shows of an object besides what every upload declares.
//!
//! A signature covers the headers that were signed, and a store may keep others that the holder of a URL added.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, PoisonError};

use aws_sdk_s3::operation::head_object::HeadObjectOutput;

use super::TOKEN;

/// What a bucket's own defaults set on every object, by header name. [`Defaults`] says what is usual in a bucket.
const SET_BY_BUCKETS: [&str; 5] = [
    "x-amz-storage-class",
    "x-amz-server-side-encryption",
    "x-amz-server-side-encryption-aws-kms-key-id",
    "x-amz-object-lock-mode",
    "x-amz-object-lock-legal-hold",
];

/// Headers that are remembered of a bucket: its defaults change now and then.
const MOST_USUAL: usize = 64;

/// A header's name in lower case, and its value.
pub(super) type Header = (String, String);

/// The headers that HEAD shows and that no upload declares by itself.
pub(super) fn undeclared(output: &HeadObjectOutput) -> Vec<Header> {
    let kind = output.server_side_encryption().map(|kind| kind.as_str());
    let class = output.storage_class().map(|class| class.as_str()).filter(|class| *class != "STANDARD");
    let hold = output.object_lock_legal_hold_status().map(|hold| hold.as_str()).filter(|hold| *hold != "OFF");
    let tags = output.tag_count().filter(|count| *count > 0).map(|count| count.to_string());
    let named = [
        ("content-encoding", output.content_encoding()),
        ("content-disposition", output.content_disposition()),
        ("content-language", output.content_language()),
        ("cache-control", output.cache_control()),
        ("expires", output.expires_string()),
        ("x-amz-website-redirect-location", output.website_redirect_location()),
        ("x-amz-tagging-count", tags.as_deref()),
        ("x-amz-server-side-encryption-customer-algorithm", output.sse_customer_algorithm()),
        ("x-amz-storage-class", class),
        ("x-amz-server-side-encryption", kind),
        ("x-amz-server-side-encryption-aws-kms-key-id", output.ssekms_key_id()),
        ("x-amz-object-lock-mode", output.object_lock_mode().map(|mode| mode.as_str())),
        ("x-amz-object-lock-legal-hold", hold),
    ];
    let named = named.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?.to_owned())));
    let metadata = output.metadata().into_iter().flatten().filter(|(name, _)| *name != TOKEN);
    let metadata = metadata.map(|(name, value)| (format!("x-amz-meta-{name}"), value.clone()));
    let mut found: Vec<Header> = named.filter(|(_, value)| !value.is_empty()).chain(metadata).collect();
    found.sort();
    found
}

/// Whether a bucket's defaults may set this header.
pub(crate) fn is_set_by_buckets(name: &str) -> bool {
    SET_BY_BUCKETS.contains(&name)
}

/// What each bucket sets on an object that asks for nothing, and the buckets in which the broker may not delete.
#[derive(Default)]
pub(super) struct Defaults(Mutex<HashMap<String, Usual>>, Mutex<HashSet<String>>);

/// What is usual in a bucket.
enum Usual {
    /// Just these headers.
    Headers(Vec<Header>),
    /// Any: its probe object cannot be deleted (Object Lock), so what the bucket sets today is not known.
    Any,
}

impl Defaults {
    /// Remembers what an object showed that was put with nothing undeclared. What was usual before stays so: an upload
    /// may have begun under it.
    pub(super) fn learn(&self, bucket: &str, shown: &[Header]) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match known.entry(bucket.to_owned()).or_insert_with(|| Usual::Headers(Vec::new())) {
            Usual::Headers(usual) => {
                usual.retain(|header| !shown.contains(header));
                usual.extend_from_slice(shown);
                let older = usual.len().saturating_sub(MOST_USUAL);
                usual.drain(..older);
            }
            Usual::Any => {}
        }
    }

    /// Judges nothing in this bucket that its defaults may set.
    pub(super) fn accept_any(&self, bucket: &str) {
        self.remember(bucket, Usual::Any);
    }

    /// Whether nothing is judged in this bucket: what is put there cannot be deleted.
    pub(super) fn is_any_accepted(&self, bucket: &str) -> bool {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        matches!(known.get(bucket), Some(Usual::Any))
    }

    /// Notes that the broker may not delete in this bucket.
    pub(super) fn keep(&self, bucket: &str) {
        self.1.lock().unwrap_or_else(PoisonError::into_inner).insert(bucket.to_owned());
    }

    /// Whether the broker may not delete in this bucket.
    pub(super) fn is_kept(&self, bucket: &str) -> bool {
        self.1.lock().unwrap_or_else(PoisonError::into_inner).contains(bucket)
    }

    fn remember(&self, bucket: &str, usual: Usual) {
        // Buckets come from settings and policies, which administrators write: there are few.
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(bucket.to_owned(), usual);
    }

    /// Takes away what the bucket itself sets. What is not known of a bucket stays: whoever sees it learns and asks again.
    pub(super) fn subtract(&self, bucket: &str, mut found: Vec<Header>) -> Vec<Header> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match known.get(bucket) {
            Some(Usual::Headers(usual)) => {
                // A gateway may add headers to every answer; an encoding is what changes the bytes for readers.
                found.retain(|header| header.0 == "content-encoding" || !usual.contains(header));
            }
            Some(Usual::Any) => found.retain(|(name, _)| !is_set_by_buckets(name)),
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
    fn everything_that_was_not_declared_is_named() {
        let head = HeadObjectOutput::builder()
            .content_encoding("gzip")
            .tag_count(2)
            .storage_class(StorageClass::ReducedRedundancy)
            .server_side_encryption(ServerSideEncryption::Aes256)
            .metadata(TOKEN, "id")
            .metadata("extra", "x")
            .build();
        let named: Vec<String> = undeclared(&head).into_iter().map(|(name, value)| format!("{name}: {value}")).collect();
        let wanted = [
            "content-encoding: gzip",
            "x-amz-meta-extra: x",
            "x-amz-server-side-encryption: AES256",
            "x-amz-storage-class: REDUCED_REDUNDANCY",
            "x-amz-tagging-count: 2",
        ];
        assert_eq!(named, wanted);
        let plain = HeadObjectOutput::builder().metadata(TOKEN, "id").storage_class(StorageClass::Standard).tag_count(0);
        assert_eq!(undeclared(&plain.build()), []);
    }

    #[test]
    fn what_a_bucket_sets_itself_is_taken_away_and_nothing_else() {
        let header = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let (aes, gzip) = (header("x-amz-server-side-encryption", "AES256"), header("content-encoding", "gzip"));
        let kms = header("x-amz-server-side-encryption", "aws:kms");
        let defaults = Defaults::default();
        let left =
            |bucket: &str, found: &[&Header]| defaults.subtract(bucket, found.iter().map(|&header| header.clone()).collect());
        assert_eq!(left("b", &[&aes]).len(), 1, "nothing is known yet");
        defaults.learn("b", &[aes.clone(), gzip.clone()]);
        assert_eq!(left("b", &[&aes, &gzip]).first(), Some(&gzip), "no bucket sets an encoding");
        assert_eq!(left("b", &[&kms]).first(), Some(&kms));
        // The bucket's default changes while an upload is under way.
        let cached = header("cache-control", "max-age=14400");
        defaults.learn("b", &[kms.clone(), cached.clone()]);
        assert_eq!(left("b", &[&aes, &kms, &cached]), [], "what was usual stays so, whatever adds it");
        assert_eq!(left("b", &[&header("cache-control", "no-store")]).len(), 1);
        assert_eq!(left("other", &[&aes]).first(), Some(&aes));
        defaults.accept_any("b");
        defaults.learn("b", &[]);
        assert_eq!(left("b", &[&kms, &gzip]).first(), Some(&gzip));
    }
}
