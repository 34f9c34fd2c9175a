//! The store behind the protocol: an index in memory, and files that say the same.
//!
//! ```text
//! root/lock                            held while a store is open
//! root/content/{id}                    the bytes of objects and parts
//! root/buckets/{bucket}/bucket.json
//! root/buckets/{bucket}/objects/{sha256 of the key}.json
//! root/uploads/{upload id}/upload.json and {part number}.json
//! root/new/                            records on their way to one of the names above
//! ```
//!
//! Bytes are on disk before a record names them, and a record appears under its name whole or not at all. So after a
//! crash an object is there or it is not; bytes that nothing names are removed at the next start. No name on disk
//! comes from a client but a bucket's, whose alphabet has no path in it.
//!
//! Nothing here is async: a caller whose client goes away may be dropped at any await, a thread of the blocking pool
//! is not, and disk and index move together.

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
use super::{Error, broken};

/// Writers of one key take turns; this many keys can be written at once.
const TURNS: usize = 64;

/// Everything a bucket holds, in the order in which it is listed.
pub(super) struct Bucket {
    pub(super) created: OffsetDateTime,
    pub(super) objects: BTreeMap<String, Arc<Object>>,
    /// By key and upload id.
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
    turns: [Mutex<()>; TURNS],
    /// Keeps a second store out of the same directory.
    _lock: File,
}

impl Store {
    /// Opens `root`, which is made if it is not there, and removes what a crash left in it.
    pub(super) fn open(root: &Path) -> Result<Self, Error> {
        let lock = disk::prepare(root)?;
        let buckets = disk::load(root)?;
        Ok(Self {
            root: root.to_owned(),
            buckets: RwLock::new(buckets),
            turns: std::array::from_fn(|_| Mutex::default()),
            _lock: lock,
        })
    }

    /// Where bodies are written while nothing names them yet.
    pub(super) fn content(&self) -> PathBuf {
        self.root.join("content")
    }

    /// Looks at every bucket.
    pub(super) fn look<T>(&self, look: impl FnOnce(&BTreeMap<String, Bucket>) -> T) -> T {
        look(&self.buckets.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Looks at one bucket.
    pub(super) fn bucket<T>(&self, name: &str, look: impl FnOnce(&Bucket) -> S3Result<T>) -> S3Result<T> {
        self.look(|buckets| look(buckets.get(name).ok_or_else(no_such_bucket)?))
    }

    /// The object under `key`, if there is one.
    pub(super) fn find(&self, bucket: &str, key: &str) -> S3Result<Option<Arc<Object>>> {
        self.bucket(bucket, |bucket| Ok(bucket.objects.get(key).cloned()))
    }

    /// Looks at the upload `id` of `key`.
    pub(super) fn upload<T>(&self, bucket: &str, key: &str, id: &str, look: impl FnOnce(&Upload) -> T) -> S3Result<T> {
        let place = (key.to_owned(), id.to_owned());
        self.bucket(bucket, |bucket| bucket.uploads.get(&place).map(look).ok_or_else(no_such_upload))
    }

    /// Makes a bucket; `false` when it is there already.
    pub(super) fn create_bucket(&self, name: &str) -> Result<bool, Error> {
        if !check_bucket_name(name) {
            return Err(Error::BucketName(name.to_owned()));
        }
        let _turn = self.turn(name, "");
        if self.look(|buckets| buckets.contains_key(name)) {
            return Ok(false);
        }
        let created = OffsetDateTime::now_utc();
        let directory = self.root.join("buckets").join(name);
        let at = |source| Error::Root { path: directory.clone(), source };
        fs::create_dir_all(directory.join("objects")).map_err(at)?;
        self.write(&directory.join("bucket.json"), &BucketRecord { created }).map_err(at)?;
        disk::sync(&self.root.join("buckets")).map_err(at)?;
        let bucket = Bucket { created, objects: BTreeMap::new(), uploads: BTreeMap::new() };
        self.change(|buckets| buckets.insert(name.to_owned(), bucket));
        Ok(true)
    }

    /// Puts an object under its key if `condition` holds there at that moment.
    pub(super) fn put(&self, bucket: &str, object: Object, condition: &conditions::Write) -> S3Result<Arc<Object>> {
        let _turn = self.turn(bucket, &object.facts.key);
        self.place(bucket, object, condition)
    }

    fn place(&self, bucket: &str, object: Object, condition: &conditions::Write) -> S3Result<Arc<Object>> {
        let found = self.find(bucket, &object.facts.key)?;
        condition.check(found.as_deref())?;
        let content = object.content.iter().map(|segment| SegmentRecord::of(segment)).collect();
        let record = ObjectRecord { facts: object.facts.clone(), content };
        // Kept before it is named: where the disk fails in between, the bytes wait for the next start.
        object.content.iter().for_each(|segment| segment.keep());
        self.write(&self.object_path(bucket, &object.facts.key), &record).map_err(broken)?;
        let object = Arc::new(object);
        let before = self.change(|buckets| {
            let bucket = buckets.get_mut(bucket)?;
            bucket.objects.insert(object.facts.key.clone(), Arc::clone(&object))
        });
        release(before.as_deref());
        Ok(object)
    }

    /// Removes the object under `key`; nothing happens when there is none.
    pub(super) fn remove(&self, bucket: &str, key: &str) -> S3Result<()> {
        let _turn = self.turn(bucket, key);
        if self.find(bucket, key)?.is_none() {
            return Ok(());
        }
        disk::remove(&self.object_path(bucket, key)).map_err(broken)?;
        let before = self.change(|buckets| buckets.get_mut(bucket)?.objects.remove(key));
        release(before.as_deref());
        Ok(())
    }

    /// Begins a multipart upload.
    pub(super) fn begin(&self, facts: UploadFacts) -> S3Result<()> {
        let _turn = self.turn(&facts.bucket, &facts.key);
        self.bucket(&facts.bucket, |_| Ok(()))?;
        // The directory gets its name with its record inside: an upload is on disk whole or not at all.
        let fresh = self.root.join("new").join(&facts.upload_id);
        fs::create_dir(&fresh).map_err(broken)?;
        self.write(&fresh.join("upload.json"), &facts).map_err(broken)?;
        disk::rename(&fresh, &self.upload_path(&facts.upload_id)).map_err(broken)?;
        let place = (facts.key.clone(), facts.upload_id.clone());
        let bucket = facts.bucket.clone();
        let upload = Upload { facts: Arc::new(facts), parts: BTreeMap::new() };
        self.change(|buckets| buckets.get_mut(&bucket)?.uploads.insert(place, upload));
        Ok(())
    }

    /// Puts a part into an upload that is still open; a part of the same number is replaced.
    pub(super) fn put_part(&self, facts: &UploadFacts, number: i32, part: Part) -> S3Result<()> {
        let _turn = self.turn(&facts.bucket, &facts.key);
        self.upload(&facts.bucket, &facts.key, &facts.upload_id, |_| ())?;
        let record = PartRecord {
            number,
            etag: part.etag.clone(),
            checksum: part.checksum.clone(),
            modified: part.modified,
            content: SegmentRecord::of(&part.segment),
        };
        let path = self.upload_path(&facts.upload_id).join(format!("{number}.json"));
        part.segment.keep();
        self.write(&path, &record).map_err(broken)?;
        let place = (facts.key.clone(), facts.upload_id.clone());
        let before = self.change(|buckets| {
            let upload = buckets.get_mut(&facts.bucket)?.uploads.get_mut(&place)?;
            upload.parts.insert(number, part)
        });
        if let Some(before) = before {
            before.segment.release();
        }
        Ok(())
    }

    /// Turns an upload into the object that `assemble` makes of it, if `condition` holds. Whatever refuses it, the
    /// upload stays as it was.
    pub(super) fn complete(
        &self,
        (bucket, key, id): (&str, &str, &str),
        condition: &conditions::Write,
        assemble: impl FnOnce(&Upload) -> S3Result<Object>,
    ) -> S3Result<Arc<Object>> {
        let _turn = self.turn(bucket, key);
        let upload = self.upload(bucket, key, id, Upload::clone)?;
        let object = self.place(bucket, assemble(&upload)?, condition)?;
        let used: HashSet<_> = object.content.iter().map(Arc::as_ptr).collect();
        self.forget(&upload, |part| used.contains(&Arc::as_ptr(&part.segment)))?;
        Ok(object)
    }

    /// Gives an upload up, with its parts.
    pub(super) fn abort(&self, bucket: &str, key: &str, id: &str) -> S3Result<()> {
        let _turn = self.turn(bucket, key);
        let upload = self.upload(bucket, key, id, Upload::clone)?;
        self.forget(&upload, |_| false)
    }

    fn forget(&self, upload: &Upload, still_used: impl Fn(&Part) -> bool) -> S3Result<()> {
        let UploadFacts { bucket, key, upload_id, .. } = &*upload.facts;
        // Renamed first, for a directory cannot be removed in one step.
        let gone = self.root.join("new").join(Uuid::new_v4().simple().to_string());
        disk::rename(&self.upload_path(upload_id), &gone).map_err(broken)?;
        self.change(|buckets| buckets.get_mut(bucket)?.uploads.remove(&(key.clone(), upload_id.clone())));
        upload.parts.values().filter(|part| !still_used(part)).for_each(|part| part.segment.release());
        fs::remove_dir_all(&gone).map_err(broken)
    }

    fn change<T>(&self, change: impl FnOnce(&mut BTreeMap<String, Bucket>) -> T) -> T {
        change(&mut self.buckets.write().unwrap_or_else(PoisonError::into_inner))
    }

    /// Waits for the turn to write `key`, so that what was checked still holds when it is written.
    fn turn(&self, bucket: &str, key: &str) -> MutexGuard<'_, ()> {
        let mut hasher = DefaultHasher::new();
        (bucket, key).hash(&mut hasher);
        let place = usize::try_from(hasher.finish() % TURNS as u64).expect("a number below 64");
        self.turns[place].lock().unwrap_or_else(PoisonError::into_inner)
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

/// An object that lost its place: its bytes go when its last reader is done.
fn release(object: Option<&Object>) {
    object.iter().flat_map(|object| &object.content).for_each(|segment| segment.release());
}

fn no_such_bucket() -> s3s::S3Error {
    s3_error!(NoSuchBucket, "The specified bucket does not exist")
}

fn no_such_upload() -> s3s::S3Error {
    s3_error!(NoSuchUpload, "The specified upload does not exist. It may have been aborted or completed.")
}
