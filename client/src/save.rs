//! Files that appear only when they are whole: written aside, synced, renamed.
//!
//! What a killed process leaves behind is locked by nobody, which is how [`clean`] tells it from a file that is being
//! written.

use std::fs::{File, Metadata, Permissions, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use tempfile::TempPath;
use tokio::io::AsyncWriteExt as _;

use crate::checksum::Sha256;

/// What unfinished files are called; the dot keeps them out of most listings.
const PREFIX: &str = ".lfs-download-";

/// How often a file that `clean` took away before it was locked is made again.
const ATTEMPTS: u32 = 10;

/// A file that was saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Saved {
    /// Its size in bytes.
    pub size: u64,
    /// The SHA-256 of its bytes.
    pub sha256: Sha256,
}

/// A file that is being written. Dropped before [`keep`](Self::keep), it leaves nothing.
pub(crate) struct Draft {
    file: tokio::fs::File,
    temporary: TempPath,
    path: PathBuf,
    directory: PathBuf,
    size: u64,
    /// The SHA-256 that whoever reads the bytes holds them against; hashed here where nobody does.
    known: Option<Sha256>,
    hasher: sha2::Sha256,
}

impl Draft {
    /// Begins a file in the directory of `path`, with the rights of the file that it is to replace.
    pub(crate) async fn beside(path: &Path, known: Option<Sha256>) -> io::Result<Self> {
        let path = path.to_owned();
        let directory = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        let (beside, target) = (directory.clone(), path.clone());
        let (file, temporary) = blocking(move || {
            let replaced = std::fs::metadata(&target).ok();
            // Known before the first byte, rather than after the last.
            if replaced.as_ref().is_some_and(Metadata::is_dir) {
                return Err(io::Error::new(io::ErrorKind::IsADirectory, format!("{} is a directory", target.display())));
            }
            let (file, temporary) = locked(&beside)?;
            if let Some(replaced) = replaced {
                file.set_permissions(rights(&replaced))?;
            }
            Ok((file, temporary))
        })
        .await?;
        let file = tokio::fs::File::from_std(file);
        Ok(Self { file, temporary, path, directory, size: 0, known, hasher: sha2::Digest::new() })
    }

    pub(crate) async fn write(&mut self, chunk: Bytes) -> io::Result<()> {
        self.size += chunk.len() as u64;
        self.file.write_all(&chunk).await?;
        if self.known.is_none() {
            sha2::Digest::update(&mut self.hasher, &chunk);
        }
        Ok(())
    }

    /// Puts the file in its place, where it stays whatever happens next.
    pub(crate) async fn keep(mut self) -> Result<Saved, crate::Error> {
        self.file.flush().await?;
        self.file.sync_all().await?;
        let sha256 = self.known.unwrap_or_else(|| Sha256(sha2::Digest::finalize(self.hasher).into()));
        let saved = Saved { size: self.size, sha256 };
        let Self { temporary, path, directory, .. } = self;
        blocking(move || {
            temporary.persist(&path).map_err(|error| error.error)?;
            sync_directory(&directory)
        })
        .await?;
        Ok(saved)
    }
}

/// Makes a file of a name of its own, and locks it.
fn locked(directory: &Path) -> io::Result<(File, TempPath)> {
    for _ in 0..ATTEMPTS {
        let (file, path) = new_file().tempfile_in(directory)?.into_parts();
        // Where the file system knows no locks, `clean` gets none either, and removes nothing.
        let _ = file.lock();
        if path.try_exists()? {
            return Ok((file, path));
        }
    }
    Err(io::Error::other(format!("files in {} are removed as soon as they are made", directory.display())))
}

/// A temporary file with the rights that a file made directly would have, for it is to become one.
fn new_file() -> tempfile::Builder<'static, 'static> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(PREFIX);
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    builder
}

/// Who may read and write a file. Running as its owner is not passed on to other bytes.
#[cfg(unix)]
fn rights(replaced: &Metadata) -> Permissions {
    use std::os::unix::fs::PermissionsExt as _;
    Permissions::from_mode(replaced.permissions().mode() & 0o777)
}

#[cfg(not(unix))]
fn rights(replaced: &Metadata) -> Permissions {
    replaced.permissions()
}

/// Removes from `directory` what killed processes had not finished, and gives back how many files that were.
///
/// # Errors
/// When the directory cannot be read, or a file in it not removed.
pub fn clean(directory: &Path) -> io::Result<usize> {
    let mut removed = 0;
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        if !entry.file_name().to_string_lossy().starts_with(PREFIX) || !entry.file_type()?.is_file() {
            continue;
        }
        let gone = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
        let file = match File::open(entry.path()) {
            // Its writer has finished in between.
            Err(error) if gone(&error) => continue,
            other => other?,
        };
        match file.try_lock() {
            // Removed while the lock is held: a writer that comes late sees that its file is gone.
            Ok(()) => match std::fs::remove_file(entry.path()) {
                Ok(()) => removed += 1,
                Err(error) if gone(&error) => {}
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

/// A rename is on disk only once its directory is.
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
    async fn a_file_is_there_when_it_is_whole_and_what_was_dropped_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a");
        let mut draft = Draft::beside(&path, None).await.unwrap();
        draft.write(Bytes::from_static(b"hel")).await.unwrap();
        assert!(!path.exists());
        draft.write(Bytes::from_static(b"lo")).await.unwrap();
        assert_eq!(draft.keep().await.unwrap(), Saved { size: 5, sha256: Sha256::of(b"hello") });
        assert_eq!(std::fs::read(&path).unwrap(), b"hello");
        let mut draft = Draft::beside(&path, None).await.unwrap();
        draft.write(Bytes::from_static(b"x")).await.unwrap();
        drop(draft);
        assert_eq!(names(directory.path()), ["a"]);
    }

    #[cfg(unix)]
    #[tokio::test]
    async fn a_file_that_only_its_owner_may_read_stays_so_when_it_is_replaced() {
        use std::os::unix::fs::PermissionsExt as _;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a");
        std::fs::write(&path, "old").unwrap();
        for (found, kept) in [(0o600, 0o600), (0o4711, 0o711), (0o444, 0o444)] {
            std::fs::set_permissions(&path, Permissions::from_mode(found)).unwrap();
            let mut draft = Draft::beside(&path, None).await.unwrap();
            draft.write(Bytes::from_static(b"new")).await.unwrap();
            let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o7777;
            assert_eq!(mode(&draft.temporary), kept, "before its bytes are there");
            draft.keep().await.unwrap();
            assert_eq!((mode(&path), std::fs::read(&path).unwrap()), (kept, b"new".to_vec()));
        }
    }

    #[tokio::test]
    async fn a_directory_is_refused_before_anything_is_written() {
        let directory = tempfile::tempdir().unwrap();
        let error = Draft::beside(directory.path(), None).await.err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::IsADirectory);
        assert_eq!(error.to_string(), format!("{} is a directory", directory.path().display()));
    }

    #[tokio::test]
    async fn only_what_nobody_writes_any_more_is_removed() {
        let directory = tempfile::tempdir().unwrap();
        let left = directory.path().join(".lfs-download-dead");
        std::fs::write(&left, "half").unwrap();
        std::fs::write(directory.path().join("other"), "x").unwrap();
        let mut draft = Draft::beside(&directory.path().join("a"), None).await.unwrap();
        assert_eq!(clean(directory.path()).unwrap(), 1);
        assert!(!left.exists());
        draft.write(Bytes::from_static(b"hello")).await.unwrap();
        draft.keep().await.unwrap();
        let mut found = names(directory.path());
        found.sort();
        assert_eq!(found, ["a", "other"]);
    }
}
