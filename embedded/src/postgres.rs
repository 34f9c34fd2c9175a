//! Runs a real PostgreSQL from the installed programs, with its files in the data directory.
//!
//! The server stops when this process ends, even if the process is killed. A shell between the two reads from a pipe
//! whose write end only this process has. When the pipe closes, the shell shuts the server down.

use std::fs;
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};
use sqlx::{Connection, Executor, PgConnection};
use tokio::io::AsyncReadExt as _;
use tokio::process::Child;
use tracing::{debug, info};

mod data_dir;
mod fallback;
mod programs;

use data_dir::DataDir;
use programs::Programs;

const USER: &str = "lfs";
const DATABASE: &str = "lfs_broker";

/// The start timeout. A start takes 0.1 s; recovery after a crash takes longer.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// The stop timeout. A fast shutdown ends sessions and writes a checkpoint.
const STOP_TIMEOUT: Duration = Duration::from_secs(30);

/// How long to wait until the server of an earlier process has shut down.
const PREVIOUS_SERVER_TIMEOUT: Duration = Duration::from_secs(10);

/// The pause between two connection attempts while the server starts.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Runs the server ("$@"), and stops it when standard input closes. SIGINT requests a fast shutdown, which does not wait
/// for clients. If `$0` is not empty, it is the directory of data that nobody needs after the stop: SIGQUIT requests an
/// immediate shutdown, which writes no checkpoint, and after a clean stop the script removes the directory.
const SUPERVISOR_SCRIPT: &str = r#"
exec 3<&0 </dev/null
signal=INT
[ -z "$0" ] || signal=QUIT
"$@" 3<&- &
server=$!
{ read -r _ <&3; kill -"$signal" "$server"; } 2>/dev/null &
watcher=$!
exec 3<&-
wait "$server"
status=$?
kill "$watcher" 2>/dev/null
[ "$status" -ne 0 ] || [ -z "$0" ] || rm -rf -- "$0" 2>/dev/null
exit "$status"
"#;

/// An error of the PostgreSQL server.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The programs of PostgreSQL are not installed.
    #[error("PostgreSQL is not installed; hint: `apt-get install postgresql`, or `brew install postgresql`")]
    NotInstalled,
    /// The programs have another major version than the data.
    #[error(
        "{data} was created by PostgreSQL {created_by}, but version {found} is installed; hint: install {created_by}, or use another data directory"
    )]
    Version {
        /// The data directory.
        data: PathBuf,
        /// The major version that created the data.
        created_by: String,
        /// The installed major version.
        found: String,
    },
    /// The server programs refuse to run as root, and no other user was found.
    #[error("PostgreSQL does not run as root, and /etc/passwd has neither `postgres` nor `nobody`")]
    NoUser,
    /// A file could not be read or written, or its owner could not be changed.
    #[error("{path}: {source}")]
    File {
        /// Its name.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
    /// A program did not run, or failed.
    #[error("{program} failed: {reason}")]
    Program {
        /// Its name.
        program: String,
        /// The end of its output.
        reason: String,
    },
    /// Another server uses the directory of the files.
    #[error("{0} is in use by another server")]
    InUse(PathBuf),
    /// The requested port is in use.
    #[error("port {0} of 127.0.0.1 is in use")]
    PortInUse(u16),
    /// The server runs, but no connection could be opened.
    #[error("cannot connect to PostgreSQL: {0}")]
    NoConnection(String),
    /// The server answered with an error.
    #[error("PostgreSQL: {0}")]
    Sql(#[from] sqlx::Error),
    /// The server did not stop in time.
    #[error("PostgreSQL did not stop within {} s", STOP_TIMEOUT.as_secs())]
    StillRunning,
}

impl Error {
    fn file(path: &Path) -> impl Fn(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File { path: path.clone(), source }
    }
}

/// Settings of the server.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The directory of its files. A missing directory is created.
    pub data_dir: PathBuf,
    /// The port on 127.0.0.1. When absent, the last port if it is free, or any free port.
    pub port: Option<u16>,
    /// Whether a commit waits for the disk. Without it tests are faster, and a power failure may damage the data.
    pub fsync: bool,
    /// Whether the files are removed when the server stops.
    pub ephemeral: bool,
}

impl Settings {
    /// Settings of a server that keeps its files, on any port.
    pub fn new(data_dir: impl Into<PathBuf>) -> Self {
        Self { data_dir: data_dir.into(), port: None, fsync: true, ephemeral: false }
    }
}

/// A running PostgreSQL. Dropping it stops the server; [`Server::stop`] also waits for the end.
pub struct Server {
    /// The shell that supervises the server. The server stops when the shell's standard input is closed.
    supervisor: Child,
    data_dir: DataDir,
    port: u16,
    password: String,
}

impl Server {
    /// Starts the server. A missing data directory or database is created.
    pub async fn start(settings: &Settings) -> Result<Self, Error> {
        let started = Self::start_unless(settings, std::future::pending()).await?;
        Ok(started.expect("a future that is always pending cannot stop the start"))
    }

    /// Like [`Server::start`], but returns `None` if `shutdown` completes first. Then no process of the start keeps running,
    /// and incomplete data is removed.
    pub async fn start_unless(settings: &Settings, shutdown: impl Future<Output = ()>) -> Result<Option<Self>, Error> {
        let data_dir = DataDir::find(&settings.data_dir, settings.ephemeral)?;
        let is_new = data_dir.created_by().is_none();
        let mut processes = Processes::default();
        let started = tokio::select! {
            biased;
            () = shutdown => None,
            started = Self::start_at(&data_dir, settings, &mut processes) => Some(started),
        };
        match started {
            Some(Ok(())) => Ok(processes.server),
            Some(Err(error)) => {
                // Return the error of the start. An error of the stop is ignored.
                drop(processes.stop().await);
                if is_new {
                    data_dir.remove_if_ephemeral();
                }
                Err(error)
            }
            None => {
                processes.stop().await?;
                data_dir.remove_if_incomplete();
                data_dir.remove_if_ephemeral();
                Ok(None)
            }
        }
    }

    /// Starts the server and leaves it in `processes`.
    async fn start_at(data_dir: &DataDir, settings: &Settings, processes: &mut Processes) -> Result<(), Error> {
        let programs = Programs::find(data_dir.created_by().as_deref())?;
        let password = match data_dir.password()? {
            Some(password) => password,
            None => init(&programs, data_dir, settings.fsync, &mut processes.initdb).await?,
        };
        if let Some(created_by) = data_dir.created_by().filter(|created_by| *created_by != programs.version) {
            return Err(Error::Version { data: data_dir.data(), created_by, found: programs.version });
        }
        let deadline = Instant::now() + PREVIOUS_SERVER_TIMEOUT;
        loop {
            let port = pick_port(settings.port, data_dir.port())?;
            let supervisor = start_supervisor(&programs, data_dir, settings, port)?;
            let server = Self { supervisor, data_dir: data_dir.clone(), port, password: password.clone() };
            let server = processes.server.insert(server);
            // Another process took the port, or the server of an earlier process still uses the data.
            match server.wait_until_ready().await {
                Err(Error::Program { reason, .. }) if Instant::now() < deadline && is_temporary(&reason) => {
                    debug!("PostgreSQL did not start, retrying in {} ms: {reason}", (POLL_INTERVAL * 5).as_millis());
                    tokio::time::sleep(POLL_INTERVAL * 5).await;
                }
                Err(error) => return Err(error),
                Ok(()) => {
                    data_dir.save_port(port)?;
                    server.create_database(DATABASE).await?;
                    info!(port, data = %data_dir.data().display(), "started PostgreSQL {}", programs.version);
                    return Ok(());
                }
            }
        }
    }

    /// The URL of the broker's database, with the password.
    pub fn url(&self) -> String {
        self.url_of(DATABASE)
    }

    /// The URL of the database that is used to create other databases.
    pub fn admin_url(&self) -> String {
        self.url_of("postgres")
    }

    /// The URL of another database of this server.
    pub fn url_of(&self, database: &str) -> String {
        format!("postgres://{USER}:{}@127.0.0.1:{}/{database}", self.password, self.port)
    }

    /// Creates a database if it does not exist, and returns its URL.
    pub async fn create_database(&self, name: &str) -> Result<String, Error> {
        let mut connection = PgConnection::connect(&self.admin_url()).await?;
        let exists = sqlx::query("select 1 from pg_database where datname = $1").bind(name);
        if exists.fetch_optional(&mut connection).await?.is_none() {
            // A database name cannot be a query parameter.
            let quoted = format!("create database \"{}\"", name.replace('"', "\"\""));
            connection.execute(sqlx::AssertSqlSafe(quoted)).await?;
        }
        connection.close().await?;
        Ok(self.url_of(name))
    }

    /// The directory of the server's files, including its log.
    pub fn data_dir(&self) -> &Path {
        self.data_dir.path()
    }

    /// Stops the server and waits until it has ended.
    pub async fn stop(mut self) -> Result<(), Error> {
        self.wait_until_stopped().await?;
        self.data_dir.remove_if_ephemeral();
        Ok(())
    }

    async fn wait_until_stopped(&mut self) -> Result<(), Error> {
        drop(self.supervisor.stdin.take());
        match tokio::time::timeout(STOP_TIMEOUT, self.supervisor.wait()).await {
            Ok(ended) => ended.map(drop).map_err(Error::file(Path::new("sh"))),
            Err(_) => Err(Error::StillRunning),
        }
    }

    /// Waits until the server accepts connections.
    async fn wait_until_ready(&mut self) -> Result<(), Error> {
        let url = self.admin_url();
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            if self.supervisor.try_wait().map_err(Error::file(Path::new("sh")))?.is_some() {
                return Err(Error::Program { program: "postgres".into(), reason: self.data_dir.log_tail() });
            }
            match PgConnection::connect(&url).await {
                Ok(connection) => return Ok(connection.close().await?),
                Err(error) if Instant::now() > deadline => return Err(Error::NoConnection(error.to_string())),
                Err(_) => tokio::time::sleep(POLL_INTERVAL).await,
            }
        }
    }
}

/// The processes of a start that has not ended yet.
#[derive(Default)]
struct Processes {
    initdb: Option<Child>,
    server: Option<Server>,
}

impl Processes {
    async fn stop(self) -> Result<(), Error> {
        if let Some(mut initdb) = self.initdb {
            // `initdb` runs other programs in its process group. None of them must write to the directory any more.
            if let Some(pid) = initdb.id().and_then(|id| Pid::from_raw(id.cast_signed())) {
                let _ = kill_process_group(pid, Signal::KILL);
            }
            initdb.wait().await.map_err(Error::file(Path::new("initdb")))?;
        }
        match self.server {
            Some(mut server) => server.wait_until_stopped().await,
            None => Ok(()),
        }
    }
}

/// Creates the data directory. The password is written last: a directory without it is incomplete and is created again.
///
/// While the program runs, it is in `running`.
async fn init(programs: &Programs, data_dir: &DataDir, fsync: bool, running: &mut Option<Child>) -> Result<String, Error> {
    let password = uuid::Uuid::new_v4().simple().to_string();
    let password_file = data_dir.begin_init(&password)?;
    let mut command = data_dir.command(&programs.initdb);
    command
        .arg("--pgdata")
        .arg(data_dir.data())
        .args(["--username", USER, "--auth=scram-sha-256", "--encoding=UTF8", "--no-locale"])
        .arg("--pwfile")
        .arg(&password_file)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        // A Ctrl-C in the terminal must reach only this process, which then kills the whole group.
        .process_group(0);
    if !fsync {
        command.arg("--no-sync");
    }
    let failed = Error::file(&programs.initdb);
    let initdb = running.insert(command.spawn().map_err(&failed)?);
    let mut errors = Vec::new();
    if let Some(stderr) = &mut initdb.stderr {
        stderr.read_to_end(&mut errors).await.map_err(&failed)?;
    }
    let status = initdb.wait().await.map_err(&failed)?;
    *running = None;
    if !status.success() {
        let reason = String::from_utf8_lossy(&errors).trim().to_owned();
        return Err(Error::Program { program: "initdb".into(), reason });
    }
    data_dir.finish_init(&password, &password_file)?;
    Ok(password)
}

/// Starts the shell that supervises the server.
fn start_supervisor(programs: &Programs, data_dir: &DataDir, settings: &Settings, port: u16) -> Result<Child, Error> {
    let log = fs::File::create(data_dir.log()).map_err(Error::file(&data_dir.log()))?;
    let mut command = data_dir.command(Path::new("/bin/sh"));
    command.arg("-c").arg(SUPERVISOR_SCRIPT);
    command.arg(if settings.ephemeral { data_dir.data().into_os_string() } else { "".into() });
    command.arg(&programs.postgres).arg("-D").arg(data_dir.data()).arg("-p").arg(port.to_string());
    let options = [
        "listen_addresses=127.0.0.1",
        "unix_socket_directories=",
        // Many tests run concurrently, and each opens a pool.
        "max_connections=300",
    ];
    let unsafe_options = ["fsync=off", "synchronous_commit=off", "full_page_writes=off"];
    for option in options.iter().chain(unsafe_options.iter().filter(|_| !settings.fsync)) {
        command.arg("-c").arg(option);
    }
    command
        .stdin(Stdio::piped())
        .stdout(log.try_clone().map_err(Error::file(&data_dir.log()))?)
        .stderr(log)
        // A Ctrl-C in the terminal must reach only this process, which stops the server when it no longer needs it.
        .process_group(0)
        .spawn()
        .map_err(Error::file(Path::new("/bin/sh")))
}

fn pick_port(wanted: Option<u16>, last: Option<u16>) -> Result<u16, Error> {
    if let Some(port) = wanted {
        return if is_free(port) { Ok(port) } else { Err(Error::PortInUse(port)) };
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

fn is_temporary(reason: &str) -> bool {
    reason.contains("postmaster.pid") || reason.contains("Address already in use") || reason.contains("shared memory block")
}

#[cfg(test)]
mod tests;
