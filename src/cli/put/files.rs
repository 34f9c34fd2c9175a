//! The files of a `put`: the arguments themselves, or with `--recursive` the files below directories.

use std::path::{Path, PathBuf};

use lfs_broker_client as client;

use crate::cli::Error;
use crate::cli::output::print_note;

/// The argument that means standard input.
const STDIN: &str = "-";

pub(super) fn is_stdin(file: &Path) -> bool {
    file.as_os_str() == STDIN
}

/// The name of a file in messages.
pub(super) fn display_name(file: &Path) -> String {
    if is_stdin(file) { "standard input".to_owned() } else { file.display().to_string() }
}

/// The files to upload, in the order of the arguments. The files of a directory are sorted by name.
pub(super) fn expand(arguments: &[PathBuf], recursive: bool) -> Result<Vec<PathBuf>, Error> {
    if !recursive {
        return Ok(arguments.to_vec());
    }
    let mut files = Vec::new();
    for argument in arguments {
        match !is_stdin(argument) && argument.is_dir() {
            true => add_directory(argument, &mut files).map_err(|(path, error)| read_error(&path, error))?,
            false => files.push(argument.clone()),
        }
    }
    match files.is_empty() {
        true => Err(Error::Failed("the directories contain no files".to_owned())),
        false => Ok(files),
    }
}

/// Adds the files of a directory and of its subdirectories. A symbolic link to a directory is not followed, because it may
/// lead back to a directory above it.
fn add_directory(directory: &Path, files: &mut Vec<PathBuf>) -> Result<(), (PathBuf, std::io::Error)> {
    let failed = |error| (directory.to_owned(), error);
    let mut entries = std::fs::read_dir(directory).and_then(Iterator::collect::<Result<Vec<_>, _>>).map_err(failed)?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let (path, kind) = (entry.path(), entry.file_type().map_err(failed)?);
        if kind.is_dir() {
            add_directory(&path, files)?;
        } else if kind.is_symlink() && path.is_dir() {
            print_note(&format!("note: {} is not followed: it is a symbolic link to a directory", path.display()));
        } else if kind.is_file() || kind.is_symlink() {
            files.push(path);
        } else {
            print_note(&format!("note: {} is skipped: it is not a file", path.display()));
        }
    }
    Ok(())
}

fn read_error(path: &Path, error: std::io::Error) -> Error {
    Error::file(client::Error::Io(error), &path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_become_their_files_in_order_and_linked_directories_are_not_followed() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        std::fs::create_dir_all(path("d/b")).unwrap();
        for name in ["d/c", "d/b/x", "d/a", "f"] {
            std::fs::write(path(name), name).unwrap();
        }
        std::os::unix::fs::symlink(path("d"), path("d/b/loop")).unwrap();
        std::os::unix::fs::symlink(path("f"), path("d/link")).unwrap();
        let arguments = [path("f"), PathBuf::from(STDIN), path("d")];
        let expected = [path("f"), PathBuf::from(STDIN), path("d/a"), path("d/b/x"), path("d/c"), path("d/link")];
        assert_eq!(expand(&arguments, true).unwrap(), expected);
        assert_eq!(expand(&arguments, false).unwrap(), arguments);
        std::fs::create_dir(path("empty")).unwrap();
        assert!(expand(&[path("empty")], true).unwrap_err().to_string().contains("no files"));
    }
}
