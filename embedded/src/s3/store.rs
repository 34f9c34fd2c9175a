//! The store behind the protocol layer: an index in memory, and files with the same content.
//!
//! ```text
//! root/lock                            locked while a store is open
//! root/content/{id}                    the bytes of objects and parts
//! root/buckets/{bucket}/bucket.json
//! root/buckets/{bucket}/objects/{sha256 of the key}.json
//! root/uploads/{upload id}/upload.json and {part number}.json
//! root/new/                            metadata files before they are renamed to one of the names above
//! ```
//!
//! Content is on disk before a metadata file refers to it, and metadata files are written atomically. So after a crash an
//! object is complete or absent. The next start removes content without a reference. Only bucket names come from clients,
//! and their alphabet has no path separators.
//!
//! Nothing here is async. An async caller may be dropped at any await when its client disconnects. A thread of the
//! blocking pool always finishes, so that disk and index stay equal.

mod disk;

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use s3s::path::check_bucket_name;
use s3s::{S3Result, s3_error};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use uuid::Uuid;

use super::conditions;
use super::record::{Object, ObjectRecord, Part, PartRecord, SegmentRecord, Upload, UploadFacts};
use super::{Error, internal_error};

/// The number of locks that serialize the writers of each key. At most this many keys are written concurrently.
const KEY_LOCKS: usize = 64;

/// The content of a bucket, in the order of listings.
pub(super) struct Bucket {
    pub(super) created: OffsetDateTime,
    pub(super) objects: BTreeMap<String, Arc<Object>>,
    /// The multipart uploads, by key and upload id.
    pub(super) uploads: BTreeMap<(String, String), Upload>,
}

#[derive(Serialize, Deserialize)]
struct BucketRecord {
    #[serde(with = "time::serde::rfc3339")]
    created: OffsetDateTime,
}

/// The store of one root directory.
pub(super) struct Store {
    root: PathBuf,
    buckets: RwLock<BTreeMap<String, Bucket>>,
    key_locks: [Mutex<()>; KEY_LOCKS],
    /// Prevents a second store in the same directory.
    _lock: File,
}

impl Store {
    /// Opens `root`. A missing directory is created, and what a crash left in it is removed.
    pub(super) fn open(root: &Path) -> Result<Self, Error> {
        let lock = disk::prepare(root)?;
        let buckets = disk::load(root)?;
        Ok(Self {
            root: root.to_owned(),
            buckets: RwLock::new(buckets),
            key_locks: std::array::from_fn(|_| Mutex::default()),
            _lock: lock,
        })
    }

    /// The directory of the content files.
    pub(super) fn content(&self) -> PathBuf {
        self.root.join("content")
    }

    /// Reads the index of all buckets.
    pub(super) fn with_buckets<T>(&self, read: impl FnOnce(&BTreeMap<String, Bucket>) -> T) -> T {
        read(&self.buckets.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Reads the index of one bucket.
    pub(super) fn with_bucket<T>(&self, name: &str, read: impl FnOnce(&Bucket) -> S3Result<T>) -> S3Result<T> {
        self.with_buckets(|buckets| read(buckets.get(name).ok_or_else(no_such_bucket)?))
    }

    /// The object with this key, if it exists.
    pub(super) fn find(&self, bucket: &str, key: &str) -> S3Result<Option<Arc<Object>>> {
        self.with_bucket(bucket, |bucket| Ok(bucket.objects.get(key).cloned()))
    }

    /// Reads the upload `id` of `key`.
    pub(super) fn with_upload<T>(&self, bucket: &str, key: &str, id: &str, read: impl FnOnce(&Upload) -> T) -> S3Result<T> {
        let upload_key = (key.to_owned(), id.to_owned());
        self.with_bucket(bucket, |bucket| bucket.uploads.get(&upload_key).map(read).ok_or_else(no_such_upload))
    }

    /// Creates a bucket. Returns `false` if it already exists.
    pub(super) fn create_bucket(&self, name: &str) -> Result<bool, Error> {
        if !check_bucket_name(name) {
            return Err(Error::BucketName(name.to_owned()));
        }
        let _guard = self.lock_key(name, "");
        if self.with_buckets(|buckets| buckets.contains_key(name)) {
            return Ok(false);
        }
        let created = OffsetDateTime::now_utc();
        let directory = self.root.join("buckets").join(name);
        let at = |source| Error::File { path: directory.clone(), source };
        fs::create_dir_all(directory.join("objects")).map_err(at)?;
        self.write(&directory.join("bucket.json"), &BucketRecord { created }).map_err(at)?;
        disk::sync(&self.root.join("buckets")).map_err(at)?;
        let bucket = Bucket { created, objects: BTreeMap::new(), uploads: BTreeMap::new() };
        self.update_buckets(|buckets| buckets.insert(name.to_owned(), bucket));
        Ok(true)
    }

    /// Stores an object under its key if `condition` holds at that moment.
    pub(super) fn put(&self, bucket: &str, object: Object, condition: &conditions::Write) -> S3Result<Arc<Object>> {
        let _guard = self.lock_key(bucket, &object.facts.key);
        self.insert_object(bucket, object, condition)
    }

    fn insert_object(&self, bucket: &str, object: Object, condition: &conditions::Write) -> S3Result<Arc<Object>> {
        let found = self.find(bucket, &object.facts.key)?;
        condition.check(found.as_deref())?;
        let content = object.content.iter().map(|segment| SegmentRecord::of(segment)).collect();
        let record = ObjectRecord { facts: object.facts.clone(), content };
        // The content is marked as referenced before the metadata file exists. If the disk fails in between, the next
        // start removes the content.
        object.content.iter().for_each(|segment| segment.mark_referenced());
        self.write(&self.object_path(bucket, &object.facts.key), &record).map_err(internal_error)?;
        let object = Arc::new(object);
        let previous = self.update_buckets(|buckets| {
            let bucket = buckets.get_mut(bucket)?;
            bucket.objects.insert(object.facts.key.clone(), Arc::clone(&object))
        });
        release_content(previous.as_deref());
        Ok(object)
    }

    /// Removes the object with this key, if it exists.
    pub(super) fn remove(&self, bucket: &str, key: &str) -> S3Result<()> {
        let _guard = self.lock_key(bucket, key);
        if self.find(bucket, key)?.is_none() {
            return Ok(());
        }
        disk::remove(&self.object_path(bucket, key)).map_err(internal_error)?;
        let previous = self.update_buckets(|buckets| buckets.get_mut(bucket)?.objects.remove(key));
        release_content(previous.as_deref());
        Ok(())
    }

    /// Creates a multipart upload.
    pub(super) fn create_upload(&self, facts: UploadFacts) -> S3Result<()> {
        let _guard = self.lock_key(&facts.bucket, &facts.key);
        self.with_bucket(&facts.bucket, |_| Ok(()))?;
        // The directory is renamed with its metadata file inside, so that an upload is on disk completely or not at all.
        let temporary = self.root.join("new").join(&facts.upload_id);
        fs::create_dir(&temporary).map_err(internal_error)?;
        self.write(&temporary.join("upload.json"), &facts).map_err(internal_error)?;
        disk::rename(&temporary, &self.upload_path(&facts.upload_id)).map_err(internal_error)?;
        let upload_key = (facts.key.clone(), facts.upload_id.clone());
        let bucket = facts.bucket.clone();
        let upload = Upload { facts: Arc::new(facts), parts: BTreeMap::new() };
        self.update_buckets(|buckets| buckets.get_mut(&bucket)?.uploads.insert(upload_key, upload));
        Ok(())
    }

    /// Stores a part of an open upload. A part with the same number is replaced.
    pub(super) fn put_part(&self, facts: &UploadFacts, number: i32, part: Part) -> S3Result<()> {
        let _guard = self.lock_key(&facts.bucket, &facts.key);
        self.with_upload(&facts.bucket, &facts.key, &facts.upload_id, |_| ())?;
        let record = PartRecord {
            number,
            etag: part.etag.clone(),
            checksum: part.checksum.clone(),
            modified: part.modified,
            content: SegmentRecord::of(&part.segment),
        };
        let path = self.upload_path(&facts.upload_id).join(format!("{number}.json"));
        part.segment.mark_referenced();
        self.write(&path, &record).map_err(internal_error)?;
        let upload_key = (facts.key.clone(), facts.upload_id.clone());
        let previous = self.update_buckets(|buckets| {
            let upload = buckets.get_mut(&facts.bucket)?.uploads.get_mut(&upload_key)?;
            upload.parts.insert(number, part)
        });
        if let Some(previous) = previous {
            previous.segment.mark_unreferenced();
        }
        Ok(())
    }

    /// Completes an upload: stores the object that `assemble` returns, if `condition` holds. After an error, the upload
    /// is unchanged.
    pub(super) fn complete(
        &self,
        (bucket, key, id): (&str, &str, &str),
        condition: &conditions::Write,
        assemble: impl FnOnce(&Upload) -> S3Result<Object>,
    ) -> S3Result<Arc<Object>> {
        let _guard = self.lock_key(bucket, key);
        let upload = self.with_upload(bucket, key, id, Upload::clone)?;
        let object = self.insert_object(bucket, assemble(&upload)?, condition)?;
        let used: HashSet<_> = object.content.iter().map(Arc::as_ptr).collect();
        self.remove_upload(&upload, |part| used.contains(&Arc::as_ptr(&part.segment)))?;
        Ok(object)
    }

    /// Aborts an upload and removes its parts.
    pub(super) fn abort(&self, bucket: &str, key: &str, id: &str) -> S3Result<()> {
        let _guard = self.lock_key(bucket, key);
        let upload = self.with_upload(bucket, key, id, Upload::clone)?;
        self.remove_upload(&upload, |_| false)
    }

    fn remove_upload(&self, upload: &Upload, still_used: impl Fn(&Part) -> bool) -> S3Result<()> {
        let UploadFacts { bucket, key, upload_id, .. } = &*upload.facts;
        // Renamed first, because removing a directory takes several steps.
        let removed = self.root.join("new").join(Uuid::new_v4().simple().to_string());
        disk::rename(&self.upload_path(upload_id), &removed).map_err(internal_error)?;
        self.update_buckets(|buckets| buckets.get_mut(bucket)?.uploads.remove(&(key.clone(), upload_id.clone())));
        upload.parts.values().filter(|part| !still_used(part)).for_each(|part| part.segment.mark_unreferenced());
        fs::remove_dir_all(&removed).map_err(internal_error)
    }

    fn update_buckets<T>(&self, update: impl FnOnce(&mut BTreeMap<String, Bucket>) -> T) -> T {
        update(&mut self.buckets.write().unwrap_or_else(PoisonError::into_inner))
    }

    /// Locks `key` for writing, so that the checked state still holds when the object is written.
    fn lock_key(&self, bucket: &str, key: &str) -> MutexGuard<'_, ()> {
        let mut hasher = DefaultHasher::new();
        (bucket, key).hash(&mut hasher);
        let index = usize::try_from(hasher.finish() % KEY_LOCKS as u64).expect("a number below 64");
        self.key_locks[index].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn object_path(&self, bucket: &str, key: &str) -> PathBuf {
        let name = format!("{}.json", hex::encode(<s3s::crypto::Sha256 as s3s::crypto::Checksum>::checksum(key.as_bytes())));
        self.root.join("buckets").join(bucket).join("objects").join(name)
    }

    fn upload_path(&self, id: &str) -> PathBuf {
        self.root.join("uploads").join(id)
    }

    fn write(&self, path: &Path, record: &impl Serialize) -> std::io::Result<()> {
        disk::write(&self.root.join("new"), path, record)
    }
}

/// Marks the content of a replaced or removed object as unreferenced. It is removed when its last reader ends.
fn release_content(object: Option<&Object>) {
    object.iter().flat_map(|object| &object.content).for_each(|segment| segment.mark_unreferenced());
}

fn no_such_bucket() -> s3s::S3Error {
    s3_error!(NoSuchBucket, "The specified bucket does not exist")
}

fn no_such_upload() -> s3s::S3Error {
    s3_error!(NoSuchUpload, "The specified upload does not exist. It may have been aborted or completed.")
}
