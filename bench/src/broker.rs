//! A running broker: its process, and the CPU time and the memory that it used.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use bytes::Bytes;
use hyper::Method;
use rustix::process::{Pid, Signal, kill_process};
use tokio::process::Child;

use crate::Failure;
use crate::http::HttpClient;
use crate::servers::Servers;

const START_TIMEOUT: Duration = Duration::from_secs(60);
/// Longer than the broker's own grace period of 20 s.
const STOP_TIMEOUT: Duration = Duration::from_secs(30);
/// The unit of CPU times in /proc on Linux.
const TICK: Duration = Duration::from_millis(10);
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// A process of `lfs-broker serve`.
pub(crate) struct Broker {
    child: Child,
    pid: i32,
    url: String,
    log: PathBuf,
}

impl Broker {
    /// Starts a broker on a database, and returns when it serves. Its log is `NAME.log` beside the logs of the servers.
    pub(crate) async fn start(servers: &Servers, name: &str, database: &str, settings: &[(&str, &str)]) -> Result<Self, Failure> {
        let listen = free_address()?;
        let log = servers.dir.join(format!("{name}.log"));
        let file = std::fs::OpenOptions::new().create(true).append(true).open(&log)?;
        let mut command = servers.broker(database, settings);
        command.arg("serve").env("LFS_BROKER_LISTEN", &listen).stdin(Stdio::null());
        let child = command.stdout(file.try_clone()?).stderr(file).spawn();
        let child = child.map_err(|error| Failure(format!("cannot start {name}: {error}")))?;
        let pid = child.id().and_then(|pid| i32::try_from(pid).ok()).ok_or_else(|| Failure(format!("{name} has exited")))?;
        let mut broker = Self { child, pid, url: format!("http://{listen}"), log };
        broker.wait_until_healthy().await?;
        Ok(broker)
    }

    async fn wait_until_healthy(&mut self) -> Result<(), Failure> {
        let (began, url) = (Instant::now(), format!("{}/healthz", self.url));
        while began.elapsed() < START_TIMEOUT {
            if let Some(status) = self.child.try_wait()? {
                let log = std::fs::read_to_string(&self.log).unwrap_or_default();
                let last: Vec<&str> = log.lines().rev().take(5).collect();
                return Err(Failure(format!("the broker exited with {status}; the end of its log, last line first: {last:?}")));
            }
            if HttpClient::default().send(Method::GET, &url, &[], Bytes::new()).await.is_ok_and(|found| found.status == 200) {
                return Ok(());
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
        Err(Failure(format!("the broker did not serve within {} s; see {}", START_TIMEOUT.as_secs(), self.log.display())))
    }

    /// The URL of its API.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// Shuts the broker down as an operator would, and kills it if that takes too long.
    pub(crate) async fn stop(mut self) -> Result<(), Failure> {
        if let Some(pid) = Pid::from_raw(self.pid) {
            // An error means that the process has exited, and then `wait` returns at once.
            let _ = kill_process(pid, Signal::TERM);
        }
        if tokio::time::timeout(STOP_TIMEOUT, self.child.wait()).await.is_err() {
            self.child.kill().await?;
        }
        Ok(())
    }

    /// The CPU time that it has used, in steps of 10 ms.
    pub(crate) fn cpu(&self) -> Result<Duration, Failure> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid))?;
        // The name of the program, in parentheses, may contain spaces. utime and stime are the 12th and 13th field after it: see
        // proc_pid_stat(5).
        let fields = stat.rsplit_once(") ").map(|(_, fields)| fields).unwrap_or_default().split(' ');
        let ticks: Vec<u64> = fields.skip(11).take(2).filter_map(|ticks| ticks.parse().ok()).collect();
        let [user, system] = ticks[..] else { return Err(Failure(format!("process {} has no CPU times", self.pid))) };
        Ok(TICK * u32::try_from(user + system).unwrap_or(u32::MAX))
    }

    /// The memory that it has now, in MiB.
    pub(crate) fn memory_mib(&self) -> Result<f64, Failure> {
        self.status_mib("VmRSS:")
    }

    /// The most memory that it had since the start or since [`Self::forget_peak`], in MiB.
    pub(crate) fn peak_memory_mib(&self) -> Result<f64, Failure> {
        self.status_mib("VmHWM:")
    }

    /// Lets the peak start again at the memory of now.
    pub(crate) fn forget_peak(&self) -> Result<(), Failure> {
        // 5 resets the peak: see proc_pid_clear_refs(5).
        Ok(std::fs::write(format!("/proc/{}/clear_refs", self.pid), "5")?)
    }

    fn status_mib(&self, name: &str) -> Result<f64, Failure> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid))?;
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<f64>().ok());
        kib.map(|kib| kib / 1024.0).ok_or_else(|| Failure(format!("the status of process {} has no {name}", self.pid)))
    }
}

/// A free port outside of the range for outgoing connections, so that no connection of the load takes it.
fn free_address() -> Result<String, Failure> {
    for _ in 0..1000 {
        let address = format!("127.0.0.1:{}", fastrand::u16(12_000..30_000));
        if std::net::TcpListener::bind(&address).is_ok() {
            return Ok(address);
        }
    }
    Err(Failure("no port between 12000 and 30000 is free".into()))
}
