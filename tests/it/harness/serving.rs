//! A broker that is a process of its own: it can be killed, stopped, and told where to be struck.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lfs_broker::kafka::Delivery;

use super::House;

/// A `lfs-broker serve` that runs, or did. Killed when dropped.
pub(crate) struct Serving {
    child: Child,
    log: Arc<Mutex<Vec<String>>>,
    url: String,
}

impl House {
    /// Starts a process beside the house, on the same database, S3 and Kafka, with short times.
    pub(crate) async fn serving(&self, more: &[(&str, &str)]) -> Serving {
        self.serving_after(":", more).await
    }

    /// The same, after the shell did this.
    pub(crate) async fn serving_after(&self, first: &str, more: &[(&str, &str)]) -> Serving {
        let (settings, objects) = (&self.settings, &self.settings.objects);
        let text = |value: &Option<String>| value.clone().expect("the house has set it");
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
        environment.extend(more.iter().map(|(name, value)| (*name, (*value).to_owned())));
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", &format!("{first} && exec \"$0\" serve"), env!("CARGO_BIN_EXE_lfs-broker")])
            .env_clear()
            .envs(environment)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut child = command.spawn().expect("the program starts");
        let log = Arc::new(Mutex::new(Vec::new()));
        let (lines, written) = (BufReader::new(child.stderr.take().unwrap()).lines(), Arc::clone(&log));
        std::thread::spawn(move || lines.map_while(Result::ok).for_each(|line| written.lock().unwrap().push(line)));
        let mut serving = Serving { child, log, url: String::new() };
        let told = serving.says("serving on http://").await;
        serving.url = format!("http://{}", told.rsplit("http://").next().unwrap().split([' ', '"']).next().unwrap());
        serving
    }
}

impl Serving {
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// Everything that it has written.
    pub(crate) fn log(&self) -> String {
        self.log.lock().unwrap().join("\n")
    }

    /// Waits for a line with these words.
    pub(crate) async fn says(&self, words: &str) -> String {
        for _ in 0..600 {
            if let Some(line) = self.log.lock().unwrap().iter().find(|line| line.contains(words)) {
                return line.clone();
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("it never said {words:?}:\n{}", self.log());
    }

    /// Whether it has ended, within a moment: a connection breaks before the process is gone.
    pub(crate) async fn has_ended(&mut self) -> bool {
        for _ in 0..20 {
            if self.child.try_wait().expect("a child can be asked").is_some() {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        false
    }

    /// Sends it a signal by its name.
    pub(crate) fn signal(&self, name: &str) {
        signal(self.child.id(), name);
    }
}

/// Sends a signal to a process that the test started.
pub(crate) fn signal(process: u32, name: &str) {
    let sent = Command::new("kill").arg(format!("-{name}")).arg(process.to_string()).status();
    assert!(sent.expect("kill runs").success());
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
