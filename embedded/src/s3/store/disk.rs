//! Metadata files: written atomically, so that a crash leaves the old or the new version, and read back at the start.

use std::collections::{BTreeMap, HashSet};
use std::ffi::OsStr;
use std::fs::{self, DirEntry, File, TryLockError};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;
use serde::de::DeserializeOwned;
use uuid::Uuid;

use super::{Bucket, BucketRecord};
use crate::s3::Error;
use crate::s3::content::Segment;
use crate::s3::record::{Object, ObjectRecord, Part, PartRecord, SegmentRecord, Upload, UploadFacts};

/// Creates the directories of a store and locks the store.
pub(super) fn prepare(root: &Path) -> Result<File, Error> {
    let at = |source| Error::File { path: root.to_owned(), source };
    for name in ["content", "buckets", "uploads", "new"] {
        fs::create_dir_all(root.join(name)).map_err(at)?;
    }
    let lock = File::create(root.join("lock")).map_err(at)?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(Error::InUse(root.to_owned())),
        Err(TryLockError::Error(source)) => return Err(at(source)),
    }
    // Files that the last run did not rename are incomplete.
    fs::remove_dir_all(root.join("new")).and_then(|()| fs::create_dir(root.join("new"))).map_err(at)?;
    Ok(lock)
}

/// Writes a metadata file: first in `new`, then renamed to `path`.
pub(super) fn write(new: &Path, path: &Path, record: &impl Serialize) -> io::Result<()> {
    let temporary = new.join(Uuid::new_v4().simple().to_string());
    let written = File::create_new(&temporary).and_then(|mut file| {
        file.write_all(&serde_json::to_vec(record)?)?;
        file.sync_all()?;
        rename(&temporary, path)
    });
    if written.is_err() {
        // The file may already be renamed. Then there is nothing to remove.
        let _ = fs::remove_file(&temporary);
    }
    written
}

/// Renames a file and syncs its directory, so that the new name survives a crash.
pub(super) fn rename(from: &Path, to: &Path) -> io::Result<()> {
    fs::rename(from, to)?;
    sync(parent(to))
}

/// Removes a file and syncs its directory, so that the name does not return after a crash.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    fs::remove_file(path)?;
    sync(parent(path))
}

/// Makes the names in a directory durable.
pub(super) fn sync(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

fn parent(path: &Path) -> &Path {
    path.parent().expect("every name of the store is below its root")
}

/// Reads every metadata file, and removes content without a reference.
pub(super) fn load(root: &Path) -> Result<BTreeMap<String, Bucket>, Error> {
    let mut content_index = ContentIndex { directory: root.join("content"), referenced: HashSet::new() };
    let mut buckets = BTreeMap::new();
    for entry in entries(&root.join("buckets"))? {
        // A bucket without a metadata file was not completely created before the store ended.
        let record = entry.path().join("bucket.json");
        if record.exists() {
            let BucketRecord { created } = parse(&record)?;
            let objects = load_objects(&entry.path().join("objects"), &mut content_index)?;
            let name = entry.file_name().to_string_lossy().into_owned();
            buckets.insert(name, Bucket { created, objects, uploads: BTreeMap::new() });
        }
    }
    load_uploads(&root.join("uploads"), &mut buckets, &mut content_index)?;
    for entry in entries(&content_index.directory)? {
        if !content_index.referenced.contains(&entry.file_name().to_string_lossy().into_owned()) {
            let path = entry.path();
            fs::remove_file(&path).map_err(|source| Error::File { path, source })?;
        }
    }
    Ok(buckets)
}

/// The content files, and which of them are referenced.
struct ContentIndex {
    directory: PathBuf,
    referenced: HashSet<String>,
}

impl ContentIndex {
    /// The segment of a metadata file, or `None` if its content is missing or has another size.
    fn segment(&mut self, record: SegmentRecord) -> Option<Arc<Segment>> {
        let path = self.directory.join(&record.name);
        let found = fs::metadata(&path).ok()?;
        self.referenced.insert(record.name);
        (found.len() == record.size_bytes).then(|| Segment::referenced(path, record.size_bytes))
    }
}

fn load_objects(directory: &Path, content_index: &mut ContentIndex) -> Result<BTreeMap<String, Arc<Object>>, Error> {
    let mut objects = BTreeMap::new();
    for entry in entries(directory)? {
        let ObjectRecord { facts, content } = parse(&entry.path())?;
        let content: Option<Vec<_>> = content.into_iter().map(|record| content_index.segment(record)).collect();
        // An incomplete object must not be served, so the start fails.
        let Some(content) = content else { return Err(Error::MissingContent(entry.path())) };
        objects.insert(facts.key.clone(), Arc::new(Object { facts, content }));
    }
    Ok(objects)
}

fn load_uploads(directory: &Path, buckets: &mut BTreeMap<String, Bucket>, content_index: &mut ContentIndex) -> Result<(), Error> {
    for entry in entries(directory)? {
        let path = entry.path();
        let facts: UploadFacts = parse(&path.join("upload.json"))?;
        let object = buckets.get(&facts.bucket).and_then(|bucket| bucket.objects.get(&facts.key));
        let complete = object.is_some_and(|object| object.facts.upload_id.as_ref() == Some(&facts.upload_id));
        let Some(bucket) = buckets.get_mut(&facts.bucket).filter(|_| !complete) else {
            // The store ended after it wrote the object and before it removed the upload.
            fs::remove_dir_all(&path).map_err(|source| Error::File { path, source })?;
            continue;
        };
        let mut parts = BTreeMap::new();
        for entry in entries(&path)? {
            if entry.path().file_name() == Some(OsStr::new("upload.json")) {
                continue;
            }
            let PartRecord { number, etag, checksum, modified, content } = parse(&entry.path())?;
            let segment = content_index.segment(content).ok_or_else(|| Error::MissingContent(entry.path()))?;
            parts.insert(number, Part { etag, checksum, modified, segment });
        }
        let upload_key = (facts.key.clone(), facts.upload_id.clone());
        bucket.uploads.insert(upload_key, Upload { facts: Arc::new(facts), parts });
    }
    Ok(())
}

fn entries(directory: &Path) -> Result<Vec<DirEntry>, Error> {
    let read = fs::read_dir(directory).and_then(|entries| entries.collect());
    read.map_err(|source| Error::File { path: directory.to_owned(), source })
}

fn parse<T: DeserializeOwned>(path: &Path) -> Result<T, Error> {
    let bytes = fs::read(path).map_err(|source| Error::File { path: path.to_owned(), source })?;
    serde_json::from_slice(&bytes).map_err(|source| Error::Metadata { path: path.to_owned(), source })
}
