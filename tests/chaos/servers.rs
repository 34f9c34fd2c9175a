//! The servers that are killed and stopped. Each runs in processes of its own, always on the same port and data.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::sync::Mutex as StdMutex;
use std::time::{Duration, Instant};

use tokio::process::{Child, Command};
use tokio::sync::Mutex;

use crate::Failure;

/// How long a server may take to be ready, including starts that fail because another server is down.
const READY_TIMEOUT: Duration = Duration::from_secs(180);
/// The pause before a server that has exited is started again, as a supervisor does.
const RESTART_DELAY: Duration = Duration::from_millis(300);

/// How a server shows that it is ready.
#[derive(Debug, Clone)]
pub(crate) enum Probe {
    /// The port accepts connections.
    Tcp(u16),
    /// The URL answers with 200.
    Http(String),
    /// PostgreSQL answers a query.
    Postgres(String),
}

/// How a server is started.
#[derive(Debug, Clone)]
pub(crate) struct ServerSpec {
    pub(crate) name: String,
    pub(crate) program: PathBuf,
    pub(crate) arguments: Vec<String>,
    pub(crate) environment: BTreeMap<String, String>,
    /// Options of setpriv that change the user.
    pub(crate) user: Vec<String>,
    pub(crate) probe: Probe,
    pub(crate) log: PathBuf,
}

/// A server, running or not.
pub(crate) struct Server {
    spec: ServerSpec,
    child: Mutex<Option<Child>>,
    /// Whether the server has been ready since its last start. If it exits later, no other server is the cause.
    was_ready: StdMutex<bool>,
    /// The exits of the server that no kill caused.
    unexpected_exits: StdMutex<Vec<String>>,
    /// The exits of the server that no kill caused.
    http: reqwest::Client,
}

/// A command whose processes are killed with this one, and which runs as the user of these setpriv options.
pub(crate) fn command(program: &std::path::Path, user: &[String]) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL"]).args(user).arg("--").arg(program);
    for name in ["http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"] {
        command.env_remove(name);
    }
    command.stdin(Stdio::null());
    command
}

impl Server {
    pub(crate) fn new(spec: ServerSpec, http: reqwest::Client) -> Self {
        Self { spec, child: Mutex::new(None), was_ready: StdMutex::new(false), unexpected_exits: StdMutex::new(Vec::new()), http }
    }

    pub(crate) fn name(&self) -> &str {
        &self.spec.name
    }

    /// Starts the server until it is ready, and starts it again while it exits.
    pub(crate) async fn start_until_ready(&self) -> Result<(), Failure> {
        let deadline = Instant::now() + READY_TIMEOUT;
        let mut child = self.child.lock().await;
        while Instant::now() < deadline {
            let running = match child.as_mut() {
                Some(running) => running,
                None => child.insert(self.spawn()?),
            };
            if running.try_wait()?.is_some() {
                *child = None;
                tokio::time::sleep(RESTART_DELAY).await;
            } else if self.is_ready().await {
                *self.was_ready.lock().expect("no thread panics") = true;
                return Ok(());
            } else {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        Err(Failure(format!(
            "{} was not ready within {} s; see {}",
            self.name(),
            READY_TIMEOUT.as_secs(),
            self.spec.log.display()
        )))
    }

    fn spawn(&self) -> Result<Child, Failure> {
        let log = std::fs::OpenOptions::new().create(true).append(true).open(&self.spec.log)?;
        let mut command = command(&self.spec.program, &self.spec.user);
        command.args(&self.spec.arguments).envs(&self.spec.environment).kill_on_drop(true);
        let spawned = command.stdout(log.try_clone()?).stderr(log).spawn();
        spawned.map_err(|error| Failure(format!("{}: {error}", self.name())))
    }

    /// Whether the server is ready now.
    async fn is_ready(&self) -> bool {
        let timeout = Duration::from_secs(2);
        match &self.spec.probe {
            Probe::Tcp(port) => {
                matches!(tokio::time::timeout(timeout, tokio::net::TcpStream::connect(("127.0.0.1", *port))).await, Ok(Ok(_)))
            }
            Probe::Http(url) => {
                self.http.get(url).timeout(timeout).send().await.is_ok_and(|response| response.status().is_success())
            }
            Probe::Postgres(url) => {
                use sqlx::{Connection as _, Executor as _};
                let query = async {
                    let mut connection = sqlx::PgConnection::connect(url).await?;
                    connection.execute("select 1").await?;
                    connection.close().await
                };
                matches!(tokio::time::timeout(timeout, query).await, Ok(Ok(())))
            }
        }
    }

    /// Kills all processes of the server and waits until they are gone.
    pub(crate) async fn kill(&self) -> Result<(), Failure> {
        let mut child = self.child.lock().await;
        let Some(mut running) = child.take() else { return Ok(()) };
        let was_ready = std::mem::take(&mut *self.was_ready.lock().expect("no thread panics"));
        match (running.try_wait()?, running.id()) {
            (Some(status), _) => self.record_exit(status, was_ready),
            (None, Some(id)) => {
                let process_tree = process_tree(id);
                signal("KILL", &process_tree).await;
                running.wait().await?;
                wait_until_gone(&process_tree).await?;
            }
            (None, None) => {}
        }
        Ok(())
    }

    /// Kills one child process, chosen by the number; none if there is no child.
    pub(crate) async fn kill_one_child(&self, number: usize) {
        let child = self.child.lock().await;
        let Some(id) = child.as_ref().and_then(Child::id) else { return };
        let children = process_tree(id).split_off(1);
        if let Some(chosen) = children.get(number.checked_rem(children.len()).unwrap_or(0)) {
            signal("KILL", &[*chosen]).await;
        }
    }

    /// Sends a signal to all processes of the server.
    pub(crate) async fn signal(&self, name: &str) {
        let child = self.child.lock().await;
        if let Some(id) = child.as_ref().and_then(Child::id) {
            signal(name, &process_tree(id)).await;
        }
    }

    fn record_exit(&self, status: ExitStatus, was_ready: bool) {
        if was_ready {
            let text = format!("{} exited by itself: {status}", self.name());
            self.unexpected_exits.lock().expect("no thread panics").push(text);
        }
    }

    /// The exits that no kill caused; checks the running process first.
    pub(crate) async fn unexpected_exits(&self) -> Vec<String> {
        if let Some(running) = self.child.lock().await.as_mut()
            && let Ok(Some(status)) = running.try_wait()
        {
            self.record_exit(status, true);
        }
        self.unexpected_exits.lock().expect("no thread panics").clone()
    }

    /// The server's log.
    pub(crate) fn log(&self) -> String {
        std::fs::read(&self.spec.log).map(|text| String::from_utf8_lossy(&text).into_owned()).unwrap_or_default()
    }
}

/// A process and all its descendants, the process itself first.
fn process_tree(root: u32) -> Vec<u32> {
    let mut parents: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(id) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let stat = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        // pid (name) state ppid: a name may contain anything, so parse behind its last bracket.
        let parent = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(1)?.parse().ok());
        if let Some(parent) = parent {
            parents.entry(parent).or_default().push(id);
        }
    }
    let mut process_tree = vec![root];
    let mut next = 0;
    while let Some(id) = process_tree.get(next) {
        process_tree.extend(parents.remove(id).unwrap_or_default());
        next += 1;
    }
    process_tree
}

/// Sends a signal to processes of this run. A process that is gone already is no error.
async fn signal(name: &str, ids: &[u32]) {
    let ids = ids.iter().map(u32::to_string);
    let _ = Command::new("kill").arg(format!("-{name}")).args(ids).stderr(Stdio::null()).status().await;
}

/// Waits until killed processes are gone: PostgreSQL does not start while old processes of it exist.
async fn wait_until_gone(ids: &[u32]) -> Result<(), Failure> {
    for _ in 0..1000 {
        let remaining = ids.iter().filter(|id| {
            let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
            stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
        });
        if remaining.count() == 0 {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Err(Failure(format!("processes {ids:?} were killed, but still exist after 10 s")))
}
