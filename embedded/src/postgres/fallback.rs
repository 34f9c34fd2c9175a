//! The directory of the server's files if the server's user cannot reach the requested directory.
//!
//! PostgreSQL does not run as root. If root's data directory is below /root, for example, no other user can enter it.
//!
//! ```text
//! {requested}/files-are-in      contains the path of the fallback directory
//! /var/lib/lfs-broker/{id}/     the fallback directory
//!     files-are-in              a hard link to the file in the requested directory
//!     belongs-to                contains the path of the requested directory
//!     lock                      locked while a process uses the fallback directory
//! ```
//!
//! The hard link shows whether the requested directory still exists. If the directory is removed, one link remains. If it is
//! moved within its file system, both links remain. On another file system a hard link is impossible. Such a fallback
//! directory is never removed without a request, because a moved directory and a removed directory look the same.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::process::{Pid, test_kill_process};
use tracing::{info, warn};

use super::Error;
use super::data_dir::add_mode_bits;

/// The parent of the fallback directories.
pub(super) const FALLBACK_PARENT: &str = "/var/lib/lfs-broker";

const LINK: &str = "files-are-in";
const OWNER: &str = "belongs-to";
const LOCK: &str = "lock";

/// A fallback directory. It stays locked while this value or a clone exists.
#[derive(Debug, Clone)]
pub(super) struct Fallback {
    path: PathBuf,
    _lock: Arc<File>,
}

impl Fallback {
    /// The fallback directory of `requested`. A directory that the server's user can reach has one only if the data is
    /// already there.
    pub(super) fn find(parent: &Path, requested: &Path, is_reachable: bool) -> Result<Option<Self>, Error> {
        let path = match named_fallback(parent, requested) {
            Some(path) if is_copy(&path, requested) => {
                warn!(
                    "{} is a copy, and its database in {} was not copied, so an empty database is created",
                    requested.display(),
                    path.display()
                );
                remove(requested, LINK)?;
                None
            }
            named => named,
        };
        let path = match path {
            Some(path) if !is_reachable || path.join("data").is_dir() => path,
            _ if is_reachable => return Ok(None),
            _ => choose(parent, requested)?,
        };
        for directory in [parent, &path] {
            fs::create_dir_all(directory).map_err(Error::file(directory))?;
            add_mode_bits(directory, 0o011)?;
        }
        let lock = File::create(path.join(LOCK)).map_err(Error::file(&path.join(LOCK)))?;
        lock.try_lock().map_err(|_| Error::InUse(path.clone()))?;
        link(&path, requested)?;
        let (requested, found) = (requested.display(), path.display());
        match is_reachable {
            true => info!("the database of {requested} is in {found}, where an earlier start created it"),
            false => {
                info!("PostgreSQL does not run as root, and its user cannot enter {requested}, so the database is in {found}")
            }
        }
        Ok(Some(Self { path, _lock: Arc::new(lock) }))
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Removes the directory. Errors are ignored, because the next start removes what remains.
    pub(super) fn remove(&self, requested: &Path) {
        drop(fs::remove_file(requested.join(LINK)));
        drop(fs::remove_dir_all(&self.path));
    }
}

/// Removes every fallback directory whose requested directory no longer exists. Errors are ignored, because what remains
/// does no harm, and the next start removes it.
pub(super) fn remove_orphans(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let path = entry.path();
        let Some(owner) = orphaned_from(&path) else { continue };
        // Locked until the removal ends.
        let Ok(lock) = File::open(path.join(LOCK)) else { continue };
        if lock.try_lock().is_err() || has_running_server(&path) {
            continue;
        }
        match fs::remove_dir_all(&path) {
            Ok(()) => info!("{} no longer exists, so its database in {} was removed", owner.display(), path.display()),
            Err(error) => {
                warn!("{} no longer exists, but its database in {} was not removed: {error}", owner.display(), path.display())
            }
        }
    }
}

/// The requested directory of a fallback directory, if it is certain that the requested directory no longer exists.
fn orphaned_from(path: &Path) -> Option<PathBuf> {
    let link = fs::symlink_metadata(path.join(LINK)).ok()?;
    let owner = PathBuf::from(fs::read_to_string(path.join(OWNER)).ok()?.trim());
    // A backup that was restored without hard links has one link for each file. Then the content of the file decides.
    let is_named = fs::read_to_string(owner.join(LINK)).is_ok_and(|named| Path::new(named.trim()) == path);
    (link.is_file() && link.nlink() == 1 && !is_named).then_some(owner)
}

/// Whether the process in `postmaster.pid` exists. After a crash of the machine it may be another process.
fn has_running_server(path: &Path) -> bool {
    let Ok(text) = fs::read_to_string(path.join("data/postmaster.pid")) else { return false };
    let pid = text.lines().next().and_then(|line| line.trim().parse().ok()).and_then(Pid::from_raw);
    pid.is_none_or(|pid| test_kill_process(pid) != Err(rustix::io::Errno::SRCH))
}

/// The fallback directory that the file in `requested` names. Only names that [`choose`] chooses are accepted,
/// because `--ephemeral` removes the directory.
fn named_fallback(parent: &Path, requested: &Path) -> Option<PathBuf> {
    let text = fs::read_to_string(requested.join(LINK)).ok()?;
    let path = Path::new(text.trim());
    let id = path.file_name()?.to_str()?;
    (path.parent() == Some(parent) && uuid::Uuid::try_parse(id).is_ok()).then(|| path.to_owned())
}

/// Whether the fallback directory belongs to another directory that still exists, so that `requested` is a copy of that one.
fn is_copy(path: &Path, requested: &Path) -> bool {
    let Ok(owner) = fs::read_to_string(path.join(OWNER)) else { return false };
    let owner = Path::new(owner.trim());
    let is_named = fs::read_to_string(owner.join(LINK)).is_ok_and(|named| Path::new(named.trim()) == path);
    is_named && owner != requested
}

/// Chooses a new name for a fallback directory, and writes it to the file in `requested`.
fn choose(parent: &Path, requested: &Path) -> Result<PathBuf, Error> {
    let path = parent.join(uuid::Uuid::new_v4().simple().to_string());
    let file = requested.join(LINK);
    // A new file: an existing one may be a hard link.
    remove(requested, LINK)?;
    fs::write(&file, format!("{}\n", path.display())).map_err(Error::file(&file))?;
    Ok(path)
}

/// Records to which directory the fallback directory belongs. `requested` may have been moved since the last start.
fn link(path: &Path, requested: &Path) -> Result<(), Error> {
    let owner = path.join(OWNER);
    fs::write(&owner, format!("{}\n", requested.display())).map_err(Error::file(&owner))?;
    let inode = |directory: &Path| fs::metadata(directory.join(LINK)).map(|file| (file.dev(), file.ino())).ok();
    if inode(path) != inode(requested) {
        remove(path, LINK)?;
        // Impossible on another file system. Without the link, the fallback directory is never an orphan.
        if let Err(error) = fs::hard_link(requested.join(LINK), path.join(LINK)) {
            tracing::debug!("{} cannot be linked into {}: {error}", requested.join(LINK).display(), path.display());
        }
    }
    Ok(())
}

fn remove(directory: &Path, name: &str) -> Result<(), Error> {
    match fs::remove_file(directory.join(name)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::file(&directory.join(name))(error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two directories: the parent of the fallback directories, and a requested directory.
    fn directories() -> (tempfile::TempDir, PathBuf, PathBuf) {
        let root = tempfile::tempdir().unwrap();
        let (parent, requested) = (root.path().join("fallbacks"), root.path().join("project/data/postgres"));
        fs::create_dir_all(&requested).unwrap();
        (root, parent, requested)
    }

    /// Starts and stops a server that keeps its files, except for the server itself.
    fn use_fallback(parent: &Path, requested: &Path) -> PathBuf {
        let fallback = Fallback::find(parent, requested, false).unwrap().unwrap();
        fs::create_dir_all(fallback.path().join("data")).unwrap();
        fallback.path().to_owned()
    }

    #[test]
    fn a_fallback_is_removed_once_its_directory_is_gone() {
        let (_root, parent, requested) = directories();
        let path = use_fallback(&parent, &requested);
        remove_orphans(&parent);
        assert!(path.exists(), "the requested directory exists");
        assert_eq!(use_fallback(&parent, &requested), path, "a later start uses the same directory");
        fs::remove_dir_all(requested.ancestors().nth(2).unwrap()).unwrap();
        remove_orphans(&parent);
        assert!(!path.exists(), "the requested directory is gone");
    }

    #[test]
    fn a_fallback_in_use_is_not_removed() {
        let (_root, parent, requested) = directories();
        let fallback = Fallback::find(&parent, &requested, false).unwrap().unwrap();
        let second = Fallback::find(&parent, &requested, false);
        assert!(matches!(second, Err(Error::InUse(ref path)) if path == fallback.path()), "{second:?}");
        fs::create_dir(fallback.path().join("data")).unwrap();
        fs::remove_dir_all(&requested).unwrap();
        remove_orphans(&parent);
        assert!(fallback.path().exists(), "a process uses it");
        fs::write(fallback.path().join("data/postmaster.pid"), format!("{}\n", std::process::id())).unwrap();
        let path = fallback.path().to_owned();
        drop(fallback);
        remove_orphans(&parent);
        assert!(path.exists(), "its server still runs");
        fs::remove_file(path.join("data/postmaster.pid")).unwrap();
        remove_orphans(&parent);
        assert!(!path.exists());
    }

    #[test]
    fn a_moved_directory_keeps_its_fallback() {
        let (root, parent, requested) = directories();
        let path = use_fallback(&parent, &requested);
        let moved = root.path().join("moved");
        fs::rename(&requested, &moved).unwrap();
        remove_orphans(&parent);
        assert_eq!(use_fallback(&parent, &moved), path);
        // This also applies if the server's user can enter the new directory, because the data is in the fallback.
        assert_eq!(Fallback::find(&parent, &moved, true).unwrap().unwrap().path(), path);
        assert_eq!(fs::read_to_string(path.join(OWNER)).unwrap().trim(), moved.to_str().unwrap());
        fs::remove_dir_all(&moved).unwrap();
        remove_orphans(&parent);
        assert!(!path.exists());
    }

    #[test]
    fn a_copy_gets_a_fallback_of_its_own() {
        let (root, parent, requested) = directories();
        let path = use_fallback(&parent, &requested);
        let copy = root.path().join("copy");
        fs::create_dir(&copy).unwrap();
        fs::copy(requested.join(LINK), copy.join(LINK)).unwrap();
        assert_ne!(use_fallback(&parent, &copy), path);
        fs::remove_dir_all(&copy).unwrap();
        remove_orphans(&parent);
        assert!(path.exists(), "the original still uses it");
        assert_eq!(fs::read_dir(&parent).unwrap().count(), 1, "the fallback of the copy was removed");
    }

    #[test]
    fn a_fallback_without_a_proof_is_not_removed() {
        let (_root, parent, requested) = directories();
        let path = use_fallback(&parent, &requested);
        // A backup that was restored without hard links: each of the two files has one link.
        let text = fs::read_to_string(path.join(LINK)).unwrap();
        fs::remove_file(path.join(LINK)).unwrap();
        fs::write(path.join(LINK), text).unwrap();
        remove_orphans(&parent);
        assert!(path.exists(), "the requested directory names it");
        // Without a link, as on another file system.
        fs::remove_file(path.join(LINK)).unwrap();
        fs::remove_dir_all(&requested).unwrap();
        remove_orphans(&parent);
        assert!(path.exists());
    }

    #[test]
    fn only_a_directory_of_this_module_is_accepted_as_a_fallback() {
        let (root, parent, requested) = directories();
        let foreign = root.path().join("foreign");
        fs::create_dir_all(foreign.join("data")).unwrap();
        fs::write(requested.join(LINK), foreign.to_str().unwrap()).unwrap();
        assert_ne!(use_fallback(&parent, &requested), foreign);
        fs::write(requested.join(LINK), parent.join("..").to_str().unwrap()).unwrap();
        assert_ne!(use_fallback(&parent, &requested), parent.join(".."));
    }
}
