//! The parts that are killed and stopped: each a real server in processes of its own, always on the same port and data.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::sync::Mutex as Held;
use std::time::{Duration, Instant};

use tokio::process::{Child, Command};
use tokio::sync::Mutex;

use crate::Failure;

/// How long a part may take to answer, starts that fail because another part is down included.
const UP_WITHIN: Duration = Duration::from_secs(180);
/// As a supervisor does: a program that ends is started again after this.
const AGAIN_AFTER: Duration = Duration::from_millis(300);

/// How a part shows that it works.
#[derive(Debug, Clone)]
pub(crate) enum Probe {
    /// Something listens.
    Tcp(u16),
    /// An address answers with 200.
    Http(String),
    /// PostgreSQL answers a query.
    Postgres(String),
}

/// How a part is started.
#[derive(Debug, Clone)]
pub(crate) struct Spec {
    pub(crate) name: String,
    pub(crate) program: PathBuf,
    pub(crate) arguments: Vec<String>,
    pub(crate) environment: BTreeMap<String, String>,
    /// Options of setpriv that make it another user.
    pub(crate) user: Vec<String>,
    pub(crate) probe: Probe,
    pub(crate) log: PathBuf,
}

/// A part, running or not.
pub(crate) struct Part {
    spec: Spec,
    child: Mutex<Option<Child>>,
    /// Whether it has answered since it was started: ending after that is not for want of another part.
    answered: Held<bool>,
    /// How it ended when nobody had killed it.
    ended_alone: Held<Vec<String>>,
    http: reqwest::Client,
}

/// A command whose processes end with this one, as the user that `user` says.
pub(crate) fn command(program: &std::path::Path, user: &[String]) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL"]).args(user).arg("--").arg(program);
    for name in ["http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"] {
        command.env_remove(name);
    }
    command.stdin(Stdio::null());
    command
}

impl Part {
    pub(crate) fn new(spec: Spec, http: reqwest::Client) -> Self {
        Self { spec, child: Mutex::new(None), answered: Held::new(false), ended_alone: Held::new(Vec::new()), http }
    }

    pub(crate) fn name(&self) -> &str {
        &self.spec.name
    }

    /// Starts it, again and again while it ends by itself, until it answers.
    pub(crate) async fn up(&self) -> Result<(), Failure> {
        let deadline = Instant::now() + UP_WITHIN;
        let mut child = self.child.lock().await;
        while Instant::now() < deadline {
            let running = match child.as_mut() {
                Some(running) => running,
                None => child.insert(self.spawn()?),
            };
            if running.try_wait()?.is_some() {
                *child = None;
                tokio::time::sleep(AGAIN_AFTER).await;
            } else if self.answers().await {
                *self.answered.lock().expect("no thread panics") = true;
                return Ok(());
            } else {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        Err(Failure(format!("{} did not answer within {} s; see {}", self.name(), UP_WITHIN.as_secs(), self.spec.log.display())))
    }

    fn spawn(&self) -> Result<Child, Failure> {
        let log = std::fs::OpenOptions::new().create(true).append(true).open(&self.spec.log)?;
        let mut command = command(&self.spec.program, &self.spec.user);
        command.args(&self.spec.arguments).envs(&self.spec.environment).kill_on_drop(true);
        let spawned = command.stdout(log.try_clone()?).stderr(log).spawn();
        spawned.map_err(|error| Failure(format!("{}: {error}", self.name())))
    }

    /// Whether it answers now.
    async fn answers(&self) -> bool {
        let within = Duration::from_secs(2);
        match &self.spec.probe {
            Probe::Tcp(port) => {
                matches!(tokio::time::timeout(within, tokio::net::TcpStream::connect(("127.0.0.1", *port))).await, Ok(Ok(_)))
            }
            Probe::Http(url) => self.http.get(url).timeout(within).send().await.is_ok_and(|answer| answer.status().is_success()),
            Probe::Postgres(url) => {
                use sqlx::{Connection as _, Executor as _};
                let asked = async {
                    let mut connection = sqlx::PgConnection::connect(url).await?;
                    connection.execute("select 1").await?;
                    connection.close().await
                };
                matches!(tokio::time::timeout(within, asked).await, Ok(Ok(())))
            }
        }
    }

    /// Kills all of its processes, and waits until they are gone.
    pub(crate) async fn kill(&self) -> Result<(), Failure> {
        let mut child = self.child.lock().await;
        let Some(mut running) = child.take() else { return Ok(()) };
        let answered = std::mem::take(&mut *self.answered.lock().expect("no thread panics"));
        match (running.try_wait()?, running.id()) {
            (Some(status), _) => self.ended(status, answered),
            (None, Some(id)) => {
                let tree = tree(id);
                signal("KILL", &tree).await;
                running.wait().await?;
                gone(&tree).await?;
            }
            (None, None) => {}
        }
        Ok(())
    }

    /// Kills one process that it has begun, by chance; none when it has none.
    pub(crate) async fn kill_one_child(&self, chance: usize) {
        let child = self.child.lock().await;
        let Some(id) = child.as_ref().and_then(Child::id) else { return };
        let children = tree(id).split_off(1);
        if let Some(victim) = children.get(chance.checked_rem(children.len()).unwrap_or(0)) {
            signal("KILL", &[*victim]).await;
        }
    }

    /// Stops or continues all of its processes.
    pub(crate) async fn signal(&self, name: &str) {
        let child = self.child.lock().await;
        if let Some(id) = child.as_ref().and_then(Child::id) {
            signal(name, &tree(id)).await;
        }
    }

    fn ended(&self, status: ExitStatus, answered: bool) {
        if answered {
            let text = format!("{} ended by itself: {status}", self.name());
            self.ended_alone.lock().expect("no thread panics").push(text);
        }
    }

    /// How it ended when nobody had killed it; looks whether it runs now.
    pub(crate) async fn ended_alone(&self) -> Vec<String> {
        if let Some(running) = self.child.lock().await.as_mut()
            && let Ok(Some(status)) = running.try_wait()
        {
            self.ended(status, true);
        }
        self.ended_alone.lock().expect("no thread panics").clone()
    }

    /// What it wrote.
    pub(crate) fn log(&self) -> String {
        std::fs::read(&self.spec.log).map(|text| String::from_utf8_lossy(&text).into_owned()).unwrap_or_default()
    }
}

/// A process and all that it has begun, itself first.
fn tree(root: u32) -> Vec<u32> {
    let mut parents: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(id) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let stat = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        // pid (name) state ppid: a name may hold anything, so look behind its last bracket.
        let parent = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(1)?.parse().ok());
        if let Some(parent) = parent {
            parents.entry(parent).or_default().push(id);
        }
    }
    let mut tree = vec![root];
    let mut next = 0;
    while let Some(id) = tree.get(next) {
        tree.extend(parents.remove(id).unwrap_or_default());
        next += 1;
    }
    tree
}

/// Sends a signal to processes that are ours; one that is gone already is no error.
async fn signal(name: &str, ids: &[u32]) {
    let ids = ids.iter().map(u32::to_string);
    let _ = Command::new("kill").arg(format!("-{name}")).args(ids).stderr(Stdio::null()).status().await;
}

/// Waits until processes that were killed have left: PostgreSQL does not start beside what is left of itself.
async fn gone(ids: &[u32]) -> Result<(), Failure> {
    for _ in 0..1000 {
        let left = ids.iter().filter(|id| {
            let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
            stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
        });
        if left.count() == 0 {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Err(Failure(format!("processes {ids:?} were killed and did not leave")))
}
