//! Finds PostgreSQL's programs, which most systems do not put on the PATH.

use std::path::{Path, PathBuf};
use std::{env, fs};

use super::Error;

/// `initdb` and `postgres` of one version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Programs {
    pub(super) initdb: PathBuf,
    pub(super) postgres: PathBuf,
    /// The major version. A data directory works only with the version that created it.
    pub(super) version: String,
}

impl Programs {
    /// The programs of the version that created the data. For new data the first found: on the PATH, then the highest
    /// version.
    pub(super) fn find(created_by: Option<&str>) -> Result<Self, Error> {
        let mut found: Vec<Self> = directories().iter().filter_map(|directory| Self::in_directory(directory)).collect();
        let matching = found.iter().position(|programs| Some(programs.version.as_str()) == created_by).unwrap_or(0);
        if matching < found.len() { Ok(found.swap_remove(matching)) } else { Err(Error::NotInstalled) }
    }

    fn in_directory(directory: &Path) -> Option<Self> {
        let (initdb, postgres) = (directory.join("initdb"), directory.join("postgres"));
        if !initdb.is_file() || !postgres.is_file() {
            return None;
        }
        // "postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)"
        let output = std::process::Command::new(&postgres).arg("--version").output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        let version = text.split_whitespace().nth(2)?;
        let version = version.split(|c: char| !c.is_ascii_digit()).next()?.to_owned();
        Some(Self { initdb, postgres, version })
    }
}

fn directories() -> Vec<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let mut directories: Vec<PathBuf> = env::split_paths(&path).collect();
    directories.extend(versions("/usr/lib/postgresql", "", "bin"));
    directories.extend(versions("/opt/homebrew/opt", "postgresql", "bin"));
    directories.extend(versions("/usr/local/opt", "postgresql", "bin"));
    directories.extend(versions("/usr/local", "pgsql", "bin"));
    directories
}

/// The directories `{parent}/{prefix}*/{bin}`, the highest version first.
fn versions(parent: &str, prefix: &str, bin: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(parent).into_iter().flatten().flatten();
    let mut found: Vec<(u32, PathBuf)> = entries
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let version = name.strip_prefix(prefix)?.trim_start_matches('@');
            Some((version.parse().unwrap_or(0), entry.path().join(bin)))
        })
        .collect();
    found.sort_by(|left, right| right.cmp(left));
    found.into_iter().map(|(_, path)| path).collect()
}
