//! The directory of the server's files, and its owner. When this process runs as root, the files belong to another user,
//! because the server does not run as root. That user must be able to reach the directory.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::process::Command;

use super::Error;
use super::fallback::{self, FALLBACK_PARENT, Fallback};

/// How many lines of the log an error shows.
const LOG_TAIL_LINES: usize = 8;

/// The number of attempts to remove the data, and the pause between two attempts.
const REMOVE_ATTEMPTS: usize = 10;
const REMOVE_PAUSE: Duration = Duration::from_millis(10);

#[derive(Debug, Clone, Copy)]
struct User {
    uid: u32,
    gid: u32,
}

/// The directory with the data, the password, the port and the log.
#[derive(Debug, Clone)]
pub(super) struct DataDir {
    /// The directory that the caller requested.
    requested: PathBuf,
    path: PathBuf,
    /// The fallback directory, if the server's user cannot reach the requested directory. Then `path` is this directory.
    fallback: Option<Fallback>,
    /// The user that runs the server, if it is not this process's user.
    user: Option<User>,
    ephemeral: bool,
}

impl DataDir {
    pub(super) fn find(data_dir: &Path, ephemeral: bool) -> Result<Self, Error> {
        fs::create_dir_all(data_dir).map_err(Error::file(data_dir))?;
        let requested = fs::canonicalize(data_dir).map_err(Error::file(data_dir))?;
        if !is_root(&requested)? {
            return Ok(Self { path: requested.clone(), requested, fallback: None, user: None, ephemeral });
        }
        let user = server_user()?;
        // The requested directory may be opened for others to pass through. Its parents are not changed.
        add_mode_bits(&requested, 0o011)?;
        let fallback_parent = Path::new(FALLBACK_PARENT);
        fallback::remove_orphans(fallback_parent);
        let is_reachable = requested.ancestors().all(|directory| can_traverse(directory, user));
        let fallback = Fallback::find(fallback_parent, &requested, is_reachable)?;
        let path = fallback.as_ref().map_or(requested.as_path(), Fallback::path).to_owned();
        Ok(Self { path, requested, fallback, user: Some(user), ephemeral })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn data(&self) -> PathBuf {
        self.path.join("data")
    }

    pub(super) fn log(&self) -> PathBuf {
        self.path.join("postgres.log")
    }

    /// The major version that created the data.
    pub(super) fn created_by(&self) -> Option<String> {
        fs::read_to_string(self.data().join("PG_VERSION")).ok().map(|version| version.trim().to_owned())
    }

    /// The port of the last start.
    pub(super) fn port(&self) -> Option<u16> {
        fs::read_to_string(self.path.join("port")).ok()?.trim().parse().ok()
    }

    pub(super) fn save_port(&self, port: u16) -> Result<(), Error> {
        let path = self.path.join("port");
        fs::write(&path, format!("{port}\n")).map_err(Error::file(&path))
    }

    /// The password, if the data directory is complete.
    pub(super) fn password(&self) -> Result<Option<String>, Error> {
        let path = self.path.join("password");
        match fs::read_to_string(&path) {
            Ok(password) if self.created_by().is_some() => Ok(Some(password.trim().to_owned())),
            Ok(_) => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::file(&path)(error)),
        }
    }

    /// Removes the data of an interrupted start. Returns a file from which the server's user can read the password.
    pub(super) fn begin_init(&self, password: &str) -> Result<PathBuf, Error> {
        let data = self.data();
        self.remove_data();
        DirBuilder::new().mode(0o700).create(&data).map_err(Error::file(&data))?;
        self.chown(&data)?;
        let file = self.path.join("password.new");
        write_private(&file, password)?;
        self.chown(&file)?;
        Ok(file)
    }

    /// Marks the data directory as complete.
    pub(super) fn finish_init(&self, password: &str, password_file: &Path) -> Result<(), Error> {
        write_private(&self.path.join("password"), password)?;
        fs::remove_file(password_file).map_err(Error::file(password_file))
    }

    /// A command that runs as the server's user, in a directory that this user may enter.
    pub(super) fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.current_dir(&self.path).env("LC_ALL", "C");
        if let Some(User { uid, gid }) = self.user {
            command.uid(uid).gid(gid);
        }
        command
    }

    /// The end of the server's log.
    pub(super) fn log_tail(&self) -> String {
        let log = fs::read(self.log()).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = log.lines().collect();
        let from = lines.len().saturating_sub(LOG_TAIL_LINES);
        if lines.is_empty() { "the log is empty".into() } else { lines[from..].join("; ") }
    }

    /// Removes the files of an ephemeral server. Errors are ignored, because remaining files do no harm.
    pub(super) fn remove_if_ephemeral(&self) {
        if self.ephemeral {
            self.remove_data();
            for name in ["password", "password.new", "port", "postgres.log"] {
                drop(fs::remove_file(self.path.join(name)));
            }
            if let Some(fallback) = &self.fallback {
                fallback.remove(&self.requested);
            }
        }
    }

    /// Removes the data of an interrupted start, of which the next start could not use anything.
    pub(super) fn remove_if_incomplete(&self) {
        if matches!(self.password(), Ok(None)) {
            self.remove_data();
            drop(fs::remove_file(self.path.join("password.new")));
        }
    }

    fn remove_data(&self) {
        // A killed program may still finish one call, which can add a file to a directory that is being removed.
        for _ in 0..REMOVE_ATTEMPTS {
            match fs::remove_dir_all(self.data()) {
                Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => std::thread::sleep(REMOVE_PAUSE),
                _ => break,
            }
        }
    }

    fn chown(&self, path: &Path) -> Result<(), Error> {
        self.user.map_or(Ok(()), |user| chown(path, Some(user.uid), Some(user.gid)).map_err(Error::file(path)))
    }
}

/// Whether this process runs as root: the owner of a new file shows that without an unsafe call.
fn is_root(directory: &Path) -> Result<bool, Error> {
    let file = tempfile::NamedTempFile::new_in(directory).map_err(Error::file(directory))?;
    Ok(file.as_file().metadata().map_err(Error::file(directory))?.uid() == 0)
}

/// The user `postgres` if it exists, otherwise `nobody`.
fn server_user() -> Result<User, Error> {
    let path = Path::new("/etc/passwd");
    let accounts = fs::read_to_string(path).map_err(Error::file(path))?;
    let find = |name: &str| {
        accounts.lines().find_map(|line| {
            let fields: Vec<&str> = line.split(':').collect();
            match fields[..] {
                [account, _, uid, gid, ..] if account == name => Some(User { uid: uid.parse().ok()?, gid: gid.parse().ok()? }),
                _ => None,
            }
        })
    };
    find("postgres").or_else(|| find("nobody")).ok_or(Error::NoUser)
}

fn can_traverse(directory: &Path, user: User) -> bool {
    fs::metadata(directory).is_ok_and(|found| {
        let bit = match (found.uid() == user.uid, found.gid() == user.gid) {
            (true, _) => 0o100,
            (_, true) => 0o010,
            _ => 0o001,
        };
        found.mode() & bit != 0
    })
}

pub(super) fn add_mode_bits(directory: &Path, bits: u32) -> Result<(), Error> {
    let mode = fs::metadata(directory).map_err(Error::file(directory))?.mode();
    if mode & bits == bits {
        return Ok(());
    }
    fs::set_permissions(directory, fs::Permissions::from_mode(mode | bits)).map_err(Error::file(directory))
}

fn write_private(path: &Path, text: &str) -> Result<(), Error> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    let written = options.open(path).and_then(|mut file| {
        // `mode` applies only to a new file.
        file.set_permissions(fs::Permissions::from_mode(0o600))?;
        file.write_all(text.as_bytes())
    });
    written.map_err(Error::file(path))
}
