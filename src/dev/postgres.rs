//! A real PostgreSQL for one machine, run from the programs that are installed, with its files beside the other data.
//!
//! The server dies with this process, however that ends: a shell between the two waits for the end of a pipe that only
//! this process holds, and then shuts the server down.

use std::fs;
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use sqlx::{Connection, Executor, PgConnection};
use tokio::process::Child;
use tracing::{debug, info};

mod place;
mod programs;

use place::Place;
use programs::Programs;

const USER: &str = "lfs";
const DATABASE: &str = "lfs_broker";

/// A start takes a tenth of a second, recovery after a crash longer.
const START_WITHIN: Duration = Duration::from_secs(60);

/// A fast shutdown ends sessions and writes a checkpoint.
const STOP_WITHIN: Duration = Duration::from_secs(30);

/// A server that this process's predecessor left behind is still shutting down for a moment.
const PREDECESSOR_ENDS_WITHIN: Duration = Duration::from_secs(10);

/// Between two looks at a server that is starting.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Runs the server ("$@") and stops it when standard input ends, by SIGINT: a fast shutdown, which does not wait for
/// clients. Once it has stopped in order, `$0` is removed, unless it is empty.
const KEEPER: &str = r#"
exec 3<&0 </dev/null
"$@" 3<&- &
server=$!
{ read -r _ <&3; kill -INT "$server"; } 2>/dev/null &
watcher=$!
exec 3<&-
wait "$server"
status=$?
kill "$watcher" 2>/dev/null
[ "$status" -ne 0 ] || [ -z "$0" ] || rm -rf -- "$0" 2>/dev/null
exit "$status"
"#;

/// Why there is no PostgreSQL.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No programs on this machine.
    #[error("PostgreSQL is not installed; hint: `apt-get install postgresql`, or `brew install postgresql`")]
    NotInstalled,
    /// The programs are of another major version than the data.
    #[error(
        "{data} was made by PostgreSQL {made_by}, but {found} is installed; hint: install {made_by}, or use another data directory"
    )]
    Version {
        /// The data directory.
        data: PathBuf,
        /// The major version that made it.
        made_by: String,
        /// The major version there is.
        found: String,
    },
    /// The server programs refuse to run as root, and there is nobody else to run them.
    #[error("PostgreSQL does not run as root, and /etc/passwd has neither `postgres` nor `nobody`")]
    NoUser,
    /// A file could not be read, written or handed over.
    #[error("{path}: {source}")]
    File {
        /// Which one.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A program could not be run, or failed.
    #[error("{program} failed: {reason}")]
    Program {
        /// Which one.
        program: String,
        /// Its last words.
        reason: String,
    },
    /// The port that was asked for is in use.
    #[error("port {0} of 127.0.0.1 is in use")]
    Port(u16),
    /// It runs, but does not let us in.
    #[error("PostgreSQL did not let us in: {0}")]
    Silent(String),
    /// It answered with an error.
    #[error("PostgreSQL: {0}")]
    Sql(#[from] sqlx::Error),
    /// It did not stop in time.
    #[error("PostgreSQL did not stop within {} s", STOP_WITHIN.as_secs())]
    StillRunning,
}

impl Error {
    fn file(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File { path, source }
    }
}

/// How the server runs.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where its files are; made when missing.
    pub data_dir: PathBuf,
    /// The port on 127.0.0.1; otherwise the last one, or a free one.
    pub port: Option<u16>,
    /// Whether a commit waits for the disk. Without it tests are faster, and a power cut may spoil the data.
    pub fsync: bool,
    /// The files go when the server stops.
    pub ephemeral: bool,
}

impl Settings {
    /// A lasting server on any port.
    pub fn new(data_dir: impl Into<PathBuf>) -> Self {
        Self { data_dir: data_dir.into(), port: None, fsync: true, ephemeral: false }
    }
}

/// A running PostgreSQL. It stops when this is dropped, [`Server::stop`] waits for it.
pub struct Server {
    /// The shell that keeps the server; its standard input is the pipe whose end is the server's.
    keeper: Child,
    place: Place,
    port: u16,
    password: String,
}

impl Server {
    /// Starts the server, after making its data directory and database when they are missing.
    pub async fn start(settings: &Settings) -> Result<Self, Error> {
        let place = Place::find(&settings.data_dir, settings.ephemeral)?;
        let is_fresh = place.made_by().is_none();
        let started = Self::start_at(&place, settings).await;
        if started.is_err() && is_fresh {
            place.clean_up();
        }
        started
    }

    async fn start_at(place: &Place, settings: &Settings) -> Result<Self, Error> {
        let programs = Programs::find(place.made_by().as_deref())?;
        let password = match place.password()? {
            Some(password) => password,
            None => init(&programs, place, settings.fsync).await?,
        };
        if let Some(made_by) = place.made_by().filter(|made_by| *made_by != programs.version) {
            return Err(Error::Version { data: place.data(), made_by, found: programs.version });
        }
        let deadline = Instant::now() + PREDECESSOR_ENDS_WITHIN;
        loop {
            let port = pick_port(settings.port, place.port())?;
            let started = Self::start_on(&programs, place, settings, port, &password).await;
            // Another process took the port, or the predecessor has not let go of the data yet.
            match started {
                Err(Error::Program { reason, .. }) if Instant::now() < deadline && is_passing(&reason) => {
                    debug!("postgres does not start yet: {reason}");
                    tokio::time::sleep(LOOK_AGAIN * 5).await;
                }
                Err(error) => return Err(error),
                Ok(server) => {
                    place.remember_port(port)?;
                    server.create_database(DATABASE).await?;
                    info!(port, data = %place.data().display(), "started PostgreSQL {}", programs.version);
                    return Ok(server);
                }
            }
        }
    }

    /// The broker's database, its password included.
    pub fn url(&self) -> String {
        self.url_of(DATABASE)
    }

    /// The database from which others are made.
    pub fn admin_url(&self) -> String {
        self.url_of("postgres")
    }

    /// The URL of another database of this server.
    pub fn url_of(&self, database: &str) -> String {
        format!("postgres://{USER}:{}@127.0.0.1:{}/{database}", self.password, self.port)
    }

    /// Makes a database, unless it is there, and gives its URL.
    pub async fn create_database(&self, name: &str) -> Result<String, Error> {
        let mut connection = PgConnection::connect(&self.admin_url()).await?;
        let exists = sqlx::query("select 1 from pg_database where datname = $1").bind(name);
        if exists.fetch_optional(&mut connection).await?.is_none() {
            // A name cannot be a parameter here.
            let quoted = format!("create database \"{}\"", name.replace('"', "\"\""));
            connection.execute(sqlx::AssertSqlSafe(quoted)).await?;
        }
        connection.close().await?;
        Ok(self.url_of(name))
    }

    /// Where the server's files are, its log among them.
    pub fn home(&self) -> &Path {
        self.place.home()
    }

    /// Stops the server and waits until it has written everything.
    pub async fn stop(mut self) -> Result<(), Error> {
        drop(self.keeper.stdin.take());
        match tokio::time::timeout(STOP_WITHIN, self.keeper.wait()).await {
            Ok(ended) => drop(ended.map_err(Error::file(Path::new("sh")))?),
            Err(_) => return Err(Error::StillRunning),
        }
        self.place.clean_up();
        Ok(())
    }

    /// Starts the server and waits until it lets us in.
    async fn start_on(programs: &Programs, place: &Place, settings: &Settings, port: u16, password: &str) -> Result<Self, Error> {
        let mut keeper = keep(programs, place, settings, port)?;
        let url = format!("postgres://{USER}:{password}@127.0.0.1:{port}/postgres");
        let deadline = Instant::now() + START_WITHIN;
        loop {
            if keeper.try_wait().map_err(Error::file(Path::new("sh")))?.is_some() {
                return Err(Error::Program { program: "postgres".into(), reason: place.last_words() });
            }
            match PgConnection::connect(&url).await {
                Ok(connection) => {
                    connection.close().await?;
                    break;
                }
                Err(error) if Instant::now() > deadline => return Err(Error::Silent(error.to_string())),
                Err(_) => tokio::time::sleep(LOOK_AGAIN).await,
            }
        }
        Ok(Self { keeper, place: place.clone(), port, password: password.to_owned() })
    }
}

/// Makes the data directory; the password is written last, so that one without it is made anew.
async fn init(programs: &Programs, place: &Place, fsync: bool) -> Result<String, Error> {
    let password = uuid::Uuid::new_v4().simple().to_string();
    let password_file = place.begin(&password)?;
    let mut command = place.command(&programs.initdb);
    command
        .arg("--pgdata")
        .arg(place.data())
        .args(["--username", USER, "--auth=scram-sha-256", "--encoding=UTF8", "--no-locale"])
        .arg("--pwfile")
        .arg(&password_file)
        .stdin(Stdio::null());
    if !fsync {
        command.arg("--no-sync");
    }
    let output = command.output().await.map_err(Error::file(&programs.initdb))?;
    if !output.status.success() {
        let reason = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(Error::Program { program: "initdb".into(), reason });
    }
    place.finish(&password, &password_file)?;
    Ok(password)
}

/// Starts the shell that runs the server and ends it when our end of the pipe closes, by us or by our death.
fn keep(programs: &Programs, place: &Place, settings: &Settings, port: u16) -> Result<Child, Error> {
    let log = fs::File::create(place.log()).map_err(Error::file(&place.log()))?;
    let mut command = place.command(Path::new("/bin/sh"));
    command.arg("-c").arg(KEEPER);
    command.arg(if settings.ephemeral { place.data().into_os_string() } else { "".into() });
    command.arg(&programs.postgres).arg("-D").arg(place.data()).arg("-p").arg(port.to_string());
    let options = [
        "listen_addresses=127.0.0.1",
        "unix_socket_directories=",
        // Tests open a pool each, many at a time.
        "max_connections=300",
    ];
    let risky = ["fsync=off", "synchronous_commit=off", "full_page_writes=off"];
    for option in options.iter().chain(risky.iter().filter(|_| !settings.fsync)) {
        command.arg("-c").arg(option);
    }
    command
        .stdin(Stdio::piped())
        .stdout(log.try_clone().map_err(Error::file(&place.log()))?)
        .stderr(log)
        // A Ctrl-C in the terminal is for us: we stop the server when we no longer need it.
        .process_group(0)
        .spawn()
        .map_err(Error::file(Path::new("/bin/sh")))
}

fn pick_port(wanted: Option<u16>, last: Option<u16>) -> Result<u16, Error> {
    if let Some(port) = wanted {
        return if is_free(port) { Ok(port) } else { Err(Error::Port(port)) };
    }
    match last.filter(|port| is_free(*port)) {
        Some(port) => Ok(port),
        None => TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .and_then(|listener| listener.local_addr())
            .map(|address| address.port())
            .map_err(Error::file(Path::new("127.0.0.1"))),
    }
}

fn is_free(port: u16) -> bool {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
}

fn is_passing(reason: &str) -> bool {
    reason.contains("postmaster.pid") || reason.contains("Address already in use") || reason.contains("shared memory block")
}

#[cfg(test)]
mod tests;
