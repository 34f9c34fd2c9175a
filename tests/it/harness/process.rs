//! A broker in a process of its own: a test can kill it, signal it, and set failpoints in it.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lfs_broker::kafka::Delivery;

use super::TestBroker;

/// A running or ended `lfs-broker serve`. It is killed when it is dropped.
pub(crate) struct BrokerProcess {
    child: Child,
    log: Arc<Mutex<Vec<String>>>,
    url: String,
}

impl TestBroker {
    /// Starts a process beside the test broker, on the same database, S3 and Kafka, with short intervals.
    pub(crate) async fn spawn_process(&self, environment_changes: &[(&str, &str)]) -> BrokerProcess {
        self.spawn_process_after(":", environment_changes).await
    }

    /// Runs a shell command first, then starts the process in the same shell.
    pub(crate) async fn spawn_process_after(&self, shell_command: &str, environment_changes: &[(&str, &str)]) -> BrokerProcess {
        let (settings, objects) = (&self.settings, &self.settings.objects);
        let text = |value: &Option<String>| value.clone().expect("the test broker has set it");
        let delivery = match settings.kafka.delivery {
            Delivery::ExactlyOnce => "exactly_once",
            Delivery::AtLeastOnce => "at_least_once",
        };
        let mut environment: BTreeMap<&str, String> = BTreeMap::from([
            ("DATABASE_URL", settings.store.url.clone()),
            ("KAFKA_BOOTSTRAP_SERVERS", settings.kafka.bootstrap_servers.clone()),
            ("AWS_ENDPOINT_URL_S3", text(&objects.endpoint)),
            ("AWS_ACCESS_KEY_ID", text(&objects.access_key_id)),
            ("AWS_SECRET_ACCESS_KEY", text(&objects.secret_access_key)),
            ("AWS_REGION", text(&objects.region)),
            ("LFS_BROKER_S3_BUCKET", self.bucket.clone()),
            ("LFS_BROKER_DELIVERY", delivery.to_owned()),
            ("LFS_BROKER_AUTH_MODE", "none".to_owned()),
            ("LFS_BROKER_TOPICS_DEFAULT_ENABLED", "true".to_owned()),
            ("LFS_BROKER_LISTEN", "127.0.0.1:0".to_owned()),
            ("LFS_BROKER_LEASE_SECONDS", "3".to_owned()),
            ("LFS_BROKER_SWEEP_SECONDS", "1".to_owned()),
            ("LFS_BROKER_SHUTDOWN_DELAY_SECONDS", "0".to_owned()),
        ]);
        environment.extend(environment_changes.iter().map(|(name, value)| (*name, (*value).to_owned())));
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", &format!("{shell_command} && exec \"$0\" serve"), env!("CARGO_BIN_EXE_lfs-broker")])
            .env_clear()
            .envs(environment)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut child = command.spawn().expect("the program starts");
        let log = Arc::new(Mutex::new(Vec::new()));
        let (lines, written) = (BufReader::new(child.stderr.take().unwrap()).lines(), Arc::clone(&log));
        std::thread::spawn(move || lines.map_while(Result::ok).for_each(|line| written.lock().unwrap().push(line)));
        let mut process = BrokerProcess { child, log, url: String::new() };
        let line = process.wait_for_log("serving on http://").await;
        process.url = format!("http://{}", line.rsplit("http://").next().unwrap().split([' ', '"']).next().unwrap());
        process
    }
}

impl BrokerProcess {
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// Every log line so far.
    pub(crate) fn log(&self) -> String {
        self.log.lock().unwrap().join("\n")
    }

    /// Waits for a log line that contains these words.
    pub(crate) async fn wait_for_log(&self, words: &str) -> String {
        for _ in 0..1200 {
            if let Some(line) = self.log.lock().unwrap().iter().find(|line| line.contains(words)) {
                return line.clone();
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("the broker never logged {words:?}:\n{}", self.log());
    }

    /// Whether the process exits within a second: its connections break before the process is gone.
    pub(crate) async fn has_exited(&mut self) -> bool {
        for _ in 0..20 {
            if self.child.try_wait().expect("the state of a child process can be read").is_some() {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        false
    }

    /// Sends the process a signal by the signal's name.
    pub(crate) fn signal(&self, name: &str) {
        signal(self.child.id(), name);
    }
}

/// Sends a signal to a process that the test started.
pub(crate) fn signal(process: u32, name: &str) {
    let sent = Command::new("kill").arg(format!("-{name}")).arg(process.to_string()).status();
    assert!(sent.expect("kill runs").success());
}

impl Drop for BrokerProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
