//! Where the server's files are and whose they are. As root they belong to somebody else, because the server does not
//! run as root, and that somebody must be able to reach them.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use tokio::process::Command;
use tracing::info;

use super::Error;

/// How much of the log an error shows.
const LAST_LINES: usize = 8;

/// Where the files are kept when root's data directory is closed to others, as everything below /root is.
const SHARED: &str = "/var/lib/lfs-broker";

/// Names, in the data directory, the place below [`SHARED`].
const POINTER: &str = "files-are-in";

#[derive(Debug, Clone, Copy)]
struct User {
    uid: u32,
    gid: u32,
}

/// A directory with the data, the password, the port and the log in it.
#[derive(Debug, Clone)]
pub(super) struct Place {
    /// What the caller asked for.
    asked: PathBuf,
    home: PathBuf,
    /// Who runs the server, when it is not us.
    user: Option<User>,
    ephemeral: bool,
}

impl Place {
    pub(super) fn find(data_dir: &Path, ephemeral: bool) -> Result<Self, Error> {
        fs::create_dir_all(data_dir).map_err(Error::file(data_dir))?;
        let asked = fs::canonicalize(data_dir).map_err(Error::file(data_dir))?;
        if !is_root(&asked)? {
            return Ok(Self { home: asked.clone(), asked, user: None, ephemeral });
        }
        let user = server_user()?;
        // The directory itself is ours to open, as far as letting others through; those above it are not.
        open_to(&asked, 0o011)?;
        let home = if asked.ancestors().all(|directory| can_pass(directory, user)) { asked.clone() } else { elsewhere(&asked)? };
        Ok(Self { asked, home, user: Some(user), ephemeral })
    }

    pub(super) fn home(&self) -> &Path {
        &self.home
    }

    pub(super) fn data(&self) -> PathBuf {
        self.home.join("data")
    }

    pub(super) fn log(&self) -> PathBuf {
        self.home.join("postgres.log")
    }

    /// The major version that made the data.
    pub(super) fn made_by(&self) -> Option<String> {
        fs::read_to_string(self.data().join("PG_VERSION")).ok().map(|version| version.trim().to_owned())
    }

    /// The port of the last start.
    pub(super) fn port(&self) -> Option<u16> {
        fs::read_to_string(self.home.join("port")).ok()?.trim().parse().ok()
    }

    pub(super) fn remember_port(&self, port: u16) -> Result<(), Error> {
        let path = self.home.join("port");
        fs::write(&path, format!("{port}\n")).map_err(Error::file(&path))
    }

    /// The password, once the data has been made whole.
    pub(super) fn password(&self) -> Result<Option<String>, Error> {
        let path = self.home.join("password");
        match fs::read_to_string(&path) {
            Ok(password) if self.made_by().is_some() => Ok(Some(password.trim().to_owned())),
            Ok(_) => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::file(&path)(error)),
        }
    }

    /// Clears what an interrupted start left, and gives a file from which the server's user can read the password.
    pub(super) fn begin(&self, password: &str) -> Result<PathBuf, Error> {
        let data = self.data();
        match fs::remove_dir_all(&data) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(Error::file(&data)(error)),
            _ => {}
        }
        DirBuilder::new().mode(0o700).create(&data).map_err(Error::file(&data))?;
        self.hand_over(&data)?;
        let file = self.home.join("password.new");
        write_private(&file, password)?;
        self.hand_over(&file)?;
        Ok(file)
    }

    /// From now on the data counts as whole.
    pub(super) fn finish(&self, password: &str, password_file: &Path) -> Result<(), Error> {
        write_private(&self.home.join("password"), password)?;
        fs::remove_file(password_file).map_err(Error::file(password_file))
    }

    /// A program that runs as the server's user, at home in a directory it may enter.
    pub(super) fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.current_dir(&self.home).env("LC_ALL", "C");
        if let Some(User { uid, gid }) = self.user {
            command.uid(uid).gid(gid);
        }
        command
    }

    /// The end of the server's log.
    pub(super) fn last_words(&self) -> String {
        let log = fs::read(self.log()).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = log.lines().collect();
        let from = lines.len().saturating_sub(LAST_LINES);
        if lines.is_empty() { "it said nothing".into() } else { lines[from..].join("; ") }
    }

    /// Removes what an ephemeral server leaves. What cannot be removed is only litter, so nothing fails here.
    pub(super) fn clean_up(&self) {
        if self.ephemeral {
            drop(fs::remove_dir_all(self.data()));
            for name in ["password", "password.new", "port", "postgres.log", POINTER] {
                drop(fs::remove_file(self.home.join(name)));
                drop(fs::remove_file(self.asked.join(name)));
            }
            if self.home != self.asked {
                drop(fs::remove_dir(&self.home));
            }
        }
    }

    fn hand_over(&self, path: &Path) -> Result<(), Error> {
        self.user.map_or(Ok(()), |user| chown(path, Some(user.uid), Some(user.gid)).map_err(Error::file(path)))
    }
}

/// Whether we are root: what we have just made, or may enter anyway, tells without asking the kernel unsafely.
fn is_root(directory: &Path) -> Result<bool, Error> {
    let probe = tempfile::NamedTempFile::new_in(directory).map_err(Error::file(directory))?;
    Ok(probe.as_file().metadata().map_err(Error::file(directory))?.uid() == 0)
}

/// `postgres` where the system has it, else `nobody`.
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

fn can_pass(directory: &Path, user: User) -> bool {
    fs::metadata(directory).is_ok_and(|found| {
        let bit = match (found.uid() == user.uid, found.gid() == user.gid) {
            (true, _) => 0o100,
            (_, true) => 0o010,
            _ => 0o001,
        };
        found.mode() & bit != 0
    })
}

fn open_to(directory: &Path, bits: u32) -> Result<(), Error> {
    let mode = fs::metadata(directory).map_err(Error::file(directory))?.mode();
    if mode & bits == bits {
        return Ok(());
    }
    fs::set_permissions(directory, fs::Permissions::from_mode(mode | bits)).map_err(Error::file(directory))
}

/// A place below [`SHARED`] that belongs to this data directory. Whoever deletes the data directory gets a new, empty
/// one, because its name is only written down there.
fn elsewhere(asked: &Path) -> Result<PathBuf, Error> {
    let pointer = asked.join(POINTER);
    let home = match fs::read_to_string(&pointer) {
        Ok(home) => PathBuf::from(home.trim()),
        Err(_) => {
            let home = Path::new(SHARED).join(uuid::Uuid::new_v4().simple().to_string());
            fs::write(&pointer, format!("{}\n", home.display())).map_err(Error::file(&pointer))?;
            home
        }
    };
    fs::create_dir_all(&home).map_err(Error::file(&home))?;
    open_to(Path::new(SHARED), 0o011)?;
    open_to(&home, 0o011)?;
    info!("PostgreSQL's user cannot reach {}, so its files are in {}", asked.display(), home.display());
    Ok(home)
}

fn write_private(path: &Path, text: &str) -> Result<(), Error> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    let written = options.open(path).and_then(|mut file| {
        // `mode` is for a new file only.
        file.set_permissions(fs::Permissions::from_mode(0o600))?;
        file.write_all(text.as_bytes())
    });
    written.map_err(Error::file(path))
}
