//! Listings in pages: buckets, objects, versions, uploads.

use std::ops::Bound;
use std::sync::Arc;

use s3s::dto::{
    Bucket, ChecksumAlgorithm, ChecksumType, CommonPrefix, ListBucketsOutput, ListMultipartUploadsInput,
    ListMultipartUploadsOutput, ListObjectVersionsInput, ListObjectVersionsOutput, ListObjectsV2Input, ListObjectsV2Output,
    MultipartUpload, ObjectStorageClass, ObjectVersion, ObjectVersionStorageClass, Owner,
};
use s3s::{S3Result, s3_error};

use super::api::Api;
use super::objects::{etag, kind, length};
use super::record::Object;

/// The most entries of one page.
const MAX_PAGE_ENTRIES: i32 = 1000;

/// A page of a sorted listing.
#[derive(Debug)]
struct Page<T> {
    entries: Vec<T>,
    /// The common prefixes, which replace the entries below them.
    prefixes: Vec<String>,
    /// The next page begins after this name.
    next: Option<String>,
}

/// The query of a listing.
struct Query<'a> {
    prefix: &'a str,
    delimiter: Option<&'a str>,
    /// The listing begins after this name. A common prefix also stands for all names below it.
    after: Option<&'a str>,
    max_entries: usize,
}

impl<'a> Query<'a> {
    fn new(prefix: &'a Option<String>, delimiter: &'a Option<String>, after: Option<&'a str>, max_entries: Option<i32>) -> Self {
        Self {
            prefix: prefix.as_deref().unwrap_or_default(),
            delimiter: delimiter.as_deref().filter(|delimiter| !delimiter.is_empty()),
            after: after.filter(|after| !after.is_empty()),
            max_entries: max_entries.unwrap_or(MAX_PAGE_ENTRIES).clamp(0, MAX_PAGE_ENTRIES).unsigned_abs() as usize,
        }
    }

    /// The lower bound of the names in the listing.
    fn start(&self) -> Bound<&'a str> {
        match self.after {
            Some(after) if after >= self.prefix => Bound::Excluded(after),
            _ => Bound::Included(self.prefix),
        }
    }

    /// Builds a page from sorted names that begin at [`Query::start`].
    fn page<'n, T>(&self, sorted: impl Iterator<Item = (&'n str, T)>) -> Page<T> {
        let mut page = Page { entries: Vec::new(), prefixes: Vec::<String>::new(), next: None };
        let mut last = None;
        for (name, entry) in sorted.take_while(|(name, _)| name.starts_with(self.prefix)) {
            let rest = &name[self.prefix.len()..];
            let common_prefix = self.delimiter.and_then(|delimiter| {
                let end = rest.find(delimiter)? + delimiter.len();
                Some(&name[..self.prefix.len() + end])
            });
            if common_prefix.is_some_and(|common_prefix| {
                self.after == Some(common_prefix) || page.prefixes.last().is_some_and(|last| last == common_prefix)
            }) {
                continue;
            }
            if page.entries.len() + page.prefixes.len() == self.max_entries {
                page.next = last;
                return page;
            }
            last = Some(common_prefix.unwrap_or(name).to_owned());
            match common_prefix {
                Some(common_prefix) => page.prefixes.push(common_prefix.to_owned()),
                None => page.entries.push(entry),
            }
        }
        page
    }
}

impl Api {
    pub(super) fn buckets(&self) -> ListBucketsOutput {
        let buckets = self.store.with_buckets(|buckets| {
            let listed = buckets.iter().map(|(name, bucket)| Bucket {
                name: Some(name.clone()),
                creation_date: Some(bucket.created.into()),
                ..Default::default()
            });
            listed.collect()
        });
        let owner = Owner { id: Some("lfs-broker".to_owned()), display_name: None };
        ListBucketsOutput { buckets: Some(buckets), owner: Some(owner), ..Default::default() }
    }

    pub(super) fn objects(&self, input: ListObjectsV2Input) -> S3Result<ListObjectsV2Output> {
        let token_name = input.continuation_token.as_deref().map(decode).transpose()?;
        let after = token_name.as_deref().or(input.start_after.as_deref());
        let page = self.object_page(&input.bucket, &Query::new(&input.prefix, &input.delimiter, after, input.max_keys))?;
        let count = i32::try_from(page.entries.len() + page.prefixes.len()).expect("a page has at most 1000 entries");
        let contents = page.entries.iter().map(|object| s3s::dto::Object {
            key: Some(object.facts.key.clone()),
            size: Some(length(object.facts.size_bytes)),
            e_tag: Some(etag(object)),
            last_modified: Some(object.facts.modified.into()),
            checksum_algorithm: Some(vec![ChecksumAlgorithm::from_static(object.facts.checksum.algorithm.name())]),
            checksum_type: Some(kind(object)),
            storage_class: Some(ObjectStorageClass::from_static(ObjectStorageClass::STANDARD)),
            ..Default::default()
        });
        Ok(ListObjectsV2Output {
            contents: Some(contents.collect()),
            common_prefixes: Some(prefixes(page.prefixes)),
            key_count: Some(count),
            max_keys: Some(input.max_keys.unwrap_or(MAX_PAGE_ENTRIES)),
            is_truncated: Some(page.next.is_some()),
            next_continuation_token: page.next.map(hex::encode),
            continuation_token: input.continuation_token,
            name: Some(input.bucket),
            prefix: input.prefix.or_else(|| Some(String::new())),
            delimiter: input.delimiter,
            start_after: input.start_after,
            ..Default::default()
        })
    }

    pub(super) fn versions(&self, input: ListObjectVersionsInput) -> S3Result<ListObjectVersionsOutput> {
        let after = input.key_marker.as_deref();
        let page = self.object_page(&input.bucket, &Query::new(&input.prefix, &input.delimiter, after, input.max_keys))?;
        let versions = page.entries.iter().map(|object| ObjectVersion {
            key: Some(object.facts.key.clone()),
            version_id: Some("null".to_owned()),
            is_latest: Some(true),
            size: Some(length(object.facts.size_bytes)),
            e_tag: Some(etag(object)),
            last_modified: Some(object.facts.modified.into()),
            checksum_type: Some(kind(object)),
            storage_class: Some(ObjectVersionStorageClass::from_static(ObjectVersionStorageClass::STANDARD)),
            ..Default::default()
        });
        Ok(ListObjectVersionsOutput {
            versions: Some(versions.collect()),
            common_prefixes: Some(prefixes(page.prefixes)),
            is_truncated: Some(page.next.is_some()),
            next_version_id_marker: page.next.as_ref().map(|_| "null".to_owned()),
            next_key_marker: page.next,
            key_marker: input.key_marker.or_else(|| Some(String::new())),
            max_keys: Some(input.max_keys.unwrap_or(MAX_PAGE_ENTRIES)),
            name: Some(input.bucket),
            prefix: input.prefix.or_else(|| Some(String::new())),
            delimiter: input.delimiter,
            ..Default::default()
        })
    }

    pub(super) fn uploads(&self, input: ListMultipartUploadsInput) -> S3Result<ListMultipartUploadsOutput> {
        if input.delimiter.is_some() {
            return Err(s3_error!(NotImplemented, "Listing uploads by a delimiter is not implemented."));
        }
        let query = Query::new(&input.prefix, &None, None, input.max_uploads);
        let marker = input.key_marker.as_deref().filter(|marker| !marker.is_empty());
        let id_marker = input.upload_id_marker.as_deref();
        // Without an upload id, the listing continues after all uploads of the marker's key.
        let is_after_marker = |key: &str, id: &str| {
            marker.is_none_or(|marker| key > marker || (key == marker && id_marker.is_some_and(|id_marker| id > id_marker)))
        };
        let mut listed = self.store.with_bucket(&input.bucket, |bucket| {
            let all = bucket.uploads.iter().filter(|((key, id), _)| key.starts_with(query.prefix) && is_after_marker(key, id));
            Ok(all.take(query.max_entries + 1).map(|(_, upload)| Arc::clone(&upload.facts)).collect::<Vec<_>>())
        })?;
        let truncated = listed.len() > query.max_entries;
        listed.truncate(query.max_entries);
        let last = listed.last().filter(|_| truncated);
        let uploads = listed.iter().map(|facts| MultipartUpload {
            key: Some(facts.key.clone()),
            upload_id: Some(facts.upload_id.clone()),
            initiated: Some(facts.initiated.into()),
            checksum_algorithm: facts.declared.map(|(algorithm, _)| ChecksumAlgorithm::from_static(algorithm.name())),
            checksum_type: facts.declared.map(|(_, kind)| ChecksumType::from_static(kind.name())),
            ..Default::default()
        });
        Ok(ListMultipartUploadsOutput {
            uploads: Some(uploads.collect()),
            is_truncated: Some(truncated),
            next_key_marker: last.map(|facts| facts.key.clone()),
            next_upload_id_marker: last.map(|facts| facts.upload_id.clone()),
            key_marker: input.key_marker.clone(),
            upload_id_marker: input.upload_id_marker.clone(),
            max_uploads: Some(input.max_uploads.unwrap_or(MAX_PAGE_ENTRIES)),
            prefix: input.prefix.clone(),
            bucket: Some(input.bucket.clone()),
            ..Default::default()
        })
    }

    fn object_page(&self, bucket: &str, query: &Query<'_>) -> S3Result<Page<Arc<Object>>> {
        self.store.with_bucket(bucket, |bucket| {
            let sorted = bucket.objects.range::<str, _>((query.start(), Bound::Unbounded));
            Ok(query.page(sorted.map(|(key, object)| (key.as_str(), Arc::clone(object)))))
        })
    }
}

fn prefixes(prefixes: Vec<String>) -> Vec<CommonPrefix> {
    prefixes.into_iter().map(|prefix| CommonPrefix { prefix: Some(prefix) }).collect()
}

/// Decodes a continuation token: the last name of the previous page in hex, because names may contain characters that a
/// URL may not.
fn decode(token: &str) -> S3Result<String> {
    let name = hex::decode(token).ok().and_then(|bytes| String::from_utf8(bytes).ok());
    name.ok_or_else(|| s3_error!(InvalidArgument, "The continuation token provided is incorrect"))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn list_all(names: &[&str], prefix: &str, delimiter: Option<&str>, max_entries: i32) -> Vec<(Vec<String>, Vec<String>)> {
        let names: BTreeSet<&str> = names.iter().copied().collect();
        let (prefix, delimiter) = (Some(prefix.to_owned()), delimiter.map(str::to_owned));
        let (mut pages, mut after) = (Vec::new(), None);
        for _ in 0..=names.len() {
            let query = Query::new(&prefix, &delimiter, after.as_deref(), Some(max_entries));
            let sorted = names.range::<str, _>((query.start(), Bound::Unbounded));
            let page = query.page(sorted.map(|name| (*name, (*name).to_owned())));
            pages.push((page.entries, page.prefixes));
            after = page.next;
            if after.is_none() {
                return pages;
            }
        }
        panic!("a listing of {} names does not end", names.len());
    }

    fn strings(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn pages_have_every_name_once_and_in_order() {
        let names = ["a/1", "a/2", "a/3", "b", "c"];
        let pages = list_all(&names, "", None, 2);
        assert_eq!(pages.len(), 3);
        assert_eq!(pages.into_iter().flat_map(|(entries, _)| entries).collect::<Vec<_>>(), strings(&names));
        assert_eq!(list_all(&names, "a/", None, 9), [(strings(&["a/1", "a/2", "a/3"]), vec![])]);
    }

    #[test]
    fn a_common_prefix_is_listed_once_across_pages() {
        let names = ["a/1", "a/2", "b", "c/1", "c/2"];
        let pages = list_all(&names, "", Some("/"), 1);
        let prefix = |name| (vec![], strings(&[name]));
        assert_eq!(pages, [prefix("a/"), (strings(&["b"]), vec![]), prefix("c/")]);
    }
}
