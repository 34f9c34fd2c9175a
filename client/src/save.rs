//! Writes files atomically: to a temporary file in the same directory, which is synced and then renamed.
//!
//! A temporary file is locked while it is written. After its process was killed it is unlocked, and
//! [`remove_partial_downloads`] removes it.

use std::fs::{File, Metadata, Permissions, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use tempfile::TempPath;
use tokio::io::AsyncWriteExt as _;

use crate::checksum::Sha256;

/// The prefix of temporary files. The dot hides them in most listings.
const PARTIAL_PREFIX: &str = ".lfs-download-";

/// How often a temporary file is created again after `remove_partial_downloads` removed it before it was locked.
const MAX_ATTEMPTS: u32 = 10;

/// A file that was saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SavedFile {
    /// Its size in bytes.
    pub size: u64,
    /// The SHA-256 of its bytes.
    pub sha256: Sha256,
}

/// A file that is being written. If it is dropped before [`commit`](Self::commit), it is removed.
pub(crate) struct PartialFile {
    file: tokio::fs::File,
    temporary: TempPath,
    path: PathBuf,
    directory: PathBuf,
    size: u64,
    /// The SHA-256 that the download verifies. If there is none, it is computed here.
    expected_sha256: Option<Sha256>,
    hasher: sha2::Sha256,
}

impl PartialFile {
    /// Creates the temporary file in the directory of `path`, with the permissions of the file that it replaces.
    pub(crate) async fn create_for(path: &Path, expected_sha256: Option<Sha256>) -> io::Result<Self> {
        let path = path.to_owned();
        let directory = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        let (parent, target) = (directory.clone(), path.clone());
        let (file, temporary) = blocking(move || {
            let replaced = std::fs::metadata(&target).ok();
            // Fail before the first byte, not after the last.
            if replaced.as_ref().is_some_and(Metadata::is_dir) {
                return Err(io::Error::new(io::ErrorKind::IsADirectory, format!("{} is a directory", target.display())));
            }
            // The error of a missing directory would show the name of the temporary file.
            if !parent.try_exists()? {
                let text = format!("the directory {} does not exist", parent.display());
                return Err(io::Error::new(io::ErrorKind::NotFound, text));
            }
            let (file, temporary) = create_locked(&parent)?;
            if let Some(replaced) = replaced {
                file.set_permissions(permissions(&replaced))?;
            }
            Ok((file, temporary))
        })
        .await?;
        let file = tokio::fs::File::from_std(file);
        Ok(Self { file, temporary, path, directory, size: 0, expected_sha256, hasher: sha2::Digest::new() })
    }

    pub(crate) async fn write(&mut self, chunk: Bytes) -> io::Result<()> {
        self.size += chunk.len() as u64;
        self.file.write_all(&chunk).await?;
        if self.expected_sha256.is_none() {
            sha2::Digest::update(&mut self.hasher, &chunk);
        }
        Ok(())
    }

    /// Syncs the file, renames it to `path` and syncs the directory.
    pub(crate) async fn commit(mut self) -> Result<SavedFile, crate::Error> {
        self.file.flush().await?;
        self.file.sync_all().await?;
        let sha256 = self.expected_sha256.unwrap_or_else(|| Sha256(sha2::Digest::finalize(self.hasher).into()));
        let saved = SavedFile { size: self.size, sha256 };
        let Self { temporary, path, directory, .. } = self;
        blocking(move || {
            temporary.persist(&path).map_err(|error| error.error)?;
            sync_directory(&directory)
        })
        .await?;
        Ok(saved)
    }
}

/// Creates a file with a unique name and locks it.
fn create_locked(directory: &Path) -> io::Result<(File, TempPath)> {
    for _ in 0..MAX_ATTEMPTS {
        let (file, path) = new_file().tempfile_in(directory)?.into_parts();
        // If the file system does not support locks, `remove_partial_downloads` gets no lock either and removes nothing.
        let _ = file.lock();
        if path.try_exists()? {
            return Ok((file, path));
        }
    }
    Err(io::Error::other(format!(
        "temporary files in {} were removed {MAX_ATTEMPTS} times before they could be locked",
        directory.display()
    )))
}

/// A temporary file with the permissions of a new regular file, because it becomes one.
fn new_file() -> tempfile::Builder<'static, 'static> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(PARTIAL_PREFIX);
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    builder
}

/// The permissions of the replaced file, without set-user-id and set-group-id: they must not apply to other bytes.
#[cfg(unix)]
fn permissions(replaced: &Metadata) -> Permissions {
    use std::os::unix::fs::PermissionsExt as _;
    Permissions::from_mode(replaced.permissions().mode() & 0o777)
}

#[cfg(not(unix))]
fn permissions(replaced: &Metadata) -> Permissions {
    replaced.permissions()
}

/// Removes the temporary files of killed processes from `directory` and returns their number.
///
/// # Errors
/// When the directory cannot be read, or a file in it cannot be removed.
pub fn remove_partial_downloads(directory: &Path) -> io::Result<usize> {
    let mut removed = 0;
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        if !entry.file_name().to_string_lossy().starts_with(PARTIAL_PREFIX) || !entry.file_type()?.is_file() {
            continue;
        }
        let is_not_found = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
        let file = match File::open(entry.path()) {
            // Its writer has renamed or removed it in the meantime.
            Err(error) if is_not_found(&error) => continue,
            other => other?,
        };
        match file.try_lock() {
            // The file is removed while it is locked here, so that its writer sees after locking that it is gone.
            Ok(()) => match std::fs::remove_file(entry.path()) {
                Ok(()) => removed += 1,
                Err(error) if is_not_found(&error) => {}
                Err(error) => return Err(error),
            },
            Err(TryLockError::WouldBlock | TryLockError::Error(_)) => {}
        }
    }
    Ok(removed)
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await?
}

/// A rename is durable only after its directory is synced.
#[cfg(unix)]
fn sync_directory(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

#[cfg(not(unix))]
fn sync_directory(_: &Path) -> io::Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(directory).unwrap();
        entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect()
    }

    #[tokio::test]
    async fn a_file_appears_when_it_is_complete_and_a_dropped_one_is_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a");
        let mut partial = PartialFile::create_for(&path, None).await.unwrap();
        partial.write(Bytes::from_static(b"hel")).await.unwrap();
        assert!(!path.exists());
        partial.write(Bytes::from_static(b"lo")).await.unwrap();
        assert_eq!(partial.commit().await.unwrap(), SavedFile { size: 5, sha256: Sha256::of(b"hello") });
        assert_eq!(std::fs::read(&path).unwrap(), b"hello");
        let mut partial = PartialFile::create_for(&path, None).await.unwrap();
        partial.write(Bytes::from_static(b"x")).await.unwrap();
        drop(partial);
        assert_eq!(names(directory.path()), ["a"]);
    }

    #[cfg(unix)]
    #[tokio::test]
    async fn a_replaced_file_keeps_its_permissions() {
        use std::os::unix::fs::PermissionsExt as _;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a");
        std::fs::write(&path, "old").unwrap();
        for (found, kept) in [(0o600, 0o600), (0o4711, 0o711), (0o444, 0o444)] {
            std::fs::set_permissions(&path, Permissions::from_mode(found)).unwrap();
            let mut partial = PartialFile::create_for(&path, None).await.unwrap();
            partial.write(Bytes::from_static(b"new")).await.unwrap();
            let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o7777;
            assert_eq!(mode(&partial.temporary), kept, "before its bytes are there");
            partial.commit().await.unwrap();
            assert_eq!((mode(&path), std::fs::read(&path).unwrap()), (kept, b"new".to_vec()));
        }
    }

    #[tokio::test]
    async fn a_directory_and_a_missing_directory_are_refused_before_any_byte_is_written() {
        let directory = tempfile::tempdir().unwrap();
        let error = PartialFile::create_for(directory.path(), None).await.err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::IsADirectory);
        assert_eq!(error.to_string(), format!("{} is a directory", directory.path().display()));
        let missing = directory.path().join("missing");
        let error = PartialFile::create_for(&missing.join("a"), None).await.err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert_eq!(error.to_string(), format!("the directory {} does not exist", missing.display()));
    }

    #[tokio::test]
    async fn only_temporary_files_of_ended_processes_are_removed() {
        let directory = tempfile::tempdir().unwrap();
        let left = directory.path().join(".lfs-download-dead");
        std::fs::write(&left, "half").unwrap();
        std::fs::write(directory.path().join("other"), "x").unwrap();
        let mut partial = PartialFile::create_for(&directory.path().join("a"), None).await.unwrap();
        assert_eq!(remove_partial_downloads(directory.path()).unwrap(), 1);
        assert!(!left.exists());
        partial.write(Bytes::from_static(b"hello")).await.unwrap();
        partial.commit().await.unwrap();
        let mut found = names(directory.path());
        found.sort();
        assert_eq!(found, ["a", "other"]);
    }
}
