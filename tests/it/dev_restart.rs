//! What `lfs-broker dev` keeps over a restart, where its data is, and that an interrupted start ends at once.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use lfs_broker::dev::Endpoints;
use lfs_broker_client::{Client, UploadOptions};
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::message::Message as _;
use rdkafka::{ClientConfig, Offset, TopicPartitionList};

/// A running `dev`. It is killed when a test fails before it stops it.
struct Dev(Child);

impl Drop for Dev {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Dev {
    fn spawn(data_dir: &Path, more: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lfs-broker"));
        command.args(["dev", "--listen", "127.0.0.1:0", "--data-dir"]).arg(data_dir).args(more);
        Self(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap())
    }

    /// Starts `dev` and waits for `dev.json`, which is written once every server answers.
    async fn start(data_dir: &Path, more: &[&str]) -> (Self, Endpoints) {
        let mut dev = Self::spawn(data_dir, more);
        for _ in 0..1200 {
            if let Ok(json) = std::fs::read(data_dir.join("dev.json")) {
                return (dev, serde_json::from_slice(&json).unwrap());
            }
            assert!(dev.0.try_wait().unwrap().is_none(), "dev ended before it answered: {}", dev.stderr());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("no dev.json after a minute");
    }

    async fn interrupt(&mut self) {
        let sent = Command::new("kill").args(["-INT", &self.0.id().to_string()]).status().unwrap();
        assert!(sent.success());
        let interrupted = Instant::now();
        while interrupted.elapsed() < Duration::from_secs(60) {
            if let Some(status) = self.0.try_wait().unwrap() {
                assert_eq!(status.code(), Some(0));
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("dev did not end within a minute");
    }

    /// The log of a `dev` that has ended.
    fn stderr(&mut self) -> String {
        std::io::read_to_string(self.0.stderr.take().unwrap()).unwrap()
    }
}

/// A data directory that PostgreSQL's user cannot enter if this test runs as root.
fn private_data_dir() -> (tempfile::TempDir, PathBuf) {
    // Hard links to /var/lib must be possible, which they are not from a /tmp in memory.
    let home = tempfile::tempdir_in("/var/tmp").unwrap();
    std::fs::set_permissions(home.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
    let data_dir = home.path().join("data");
    (home, data_dir)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_continues_after_a_restart_of_dev() {
    let (_home, data_dir) = private_data_dir();
    let (mut dev, endpoints) = Dev::start(&data_dir, &[]).await;
    let options = || UploadOptions { partition: Some(0), wait_published: true, ..UploadOptions::to("demo") };
    Client::new(&endpoints.broker_url).unwrap().upload(options()).bytes(&b"first"[..]).await.unwrap();
    let consumer: BaseConsumer =
        ClientConfig::new().set("bootstrap.servers", &endpoints.kafka_bootstrap).set("group.id", "it").create().unwrap();
    let mut assignment = TopicPartitionList::new();
    assignment.add_partition_offset("demo", 0, Offset::Beginning).unwrap();
    consumer.assign(&assignment).unwrap();
    assert_eq!(next_offset(&consumer), 0);
    dev.interrupt().await;

    let (mut dev, again) = Dev::start(&data_dir, &["--ephemeral"]).await;
    assert_eq!(again.kafka_bootstrap, endpoints.kafka_bootstrap);
    assert_eq!(again.s3_endpoint, endpoints.s3_endpoint);
    assert_eq!(again.database_url, endpoints.database_url);
    Client::new(&again.broker_url).unwrap().upload(options()).bytes(&b"second"[..]).await.unwrap();
    assert_eq!(next_offset(&consumer), 1);
    // A consumer commits its offset when it is dropped, and waits without a limit if Kafka is gone.
    drop(consumer);
    dev.interrupt().await;
    assert!(!data_dir.exists());
}

/// The offset of the next record that the consumer reads.
fn next_offset(consumer: &BaseConsumer) -> i64 {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        assert!(Instant::now() < deadline, "no record within a minute");
        // While the server is away, the consumer returns errors and connects again.
        if let Some(Ok(message)) = consumer.poll(Duration::from_millis(200)) {
            return message.offset();
        }
    }
}

#[tokio::test]
async fn a_kafka_port_that_is_taken_is_replaced() {
    let (_home, data_dir) = private_data_dir();
    let (mut dev, endpoints) = Dev::start(&data_dir, &[]).await;
    dev.interrupt().await;
    let _occupied = std::net::TcpListener::bind(&endpoints.kafka_bootstrap).unwrap();
    let (mut dev, again) = Dev::start(&data_dir, &["--ephemeral"]).await;
    assert_ne!(again.kafka_bootstrap, endpoints.kafka_bootstrap);
    dev.interrupt().await;
    let log = dev.stderr();
    assert!(log.contains("cannot listen on") && log.contains(&endpoints.kafka_bootstrap), "{log}");
}

#[tokio::test]
async fn removing_the_data_directory_leaves_no_database() {
    let (home, data_dir) = private_data_dir();
    let (mut dev, endpoints) = Dev::start(&data_dir, &[]).await;
    dev.interrupt().await;
    // As root, the directory is elsewhere. For other users it is in the data directory.
    assert!(endpoints.postgres_dir.join("data").is_dir(), "dev.json names {}", endpoints.postgres_dir.display());
    let is_elsewhere = !endpoints.postgres_dir.starts_with(data_dir.canonicalize().unwrap());
    let log = dev.stderr();
    assert_eq!(log.contains(&format!("so the database is in {}", endpoints.postgres_dir.display())), is_elsewhere, "{log}");
    std::fs::remove_dir_all(&data_dir).unwrap();

    let other = home.path().join("other");
    let (mut dev, new) = Dev::start(&other, &["--ephemeral"]).await;
    assert!(!endpoints.postgres_dir.exists(), "the database of the removed data directory remains");
    assert!(new.postgres_dir.join("data").is_dir());
    dev.interrupt().await;
    assert!(!new.postgres_dir.exists() && !other.exists(), "--ephemeral leaves files");
}

#[tokio::test]
async fn an_interrupted_start_does_not_wait_for_initdb() {
    let (_home, data_dir) = private_data_dir();
    let mut dev = Dev::spawn(&data_dir, &[]);
    let postgres_dir = wait_for_initdb(&data_dir).await;
    dev.interrupt().await;
    // The password is written when `initdb` has ended.
    assert!(!postgres_dir.join("password").exists(), "dev waited for initdb: {}", dev.stderr());
    assert!(!postgres_dir.join("data").exists(), "incomplete data remains");
    // What remains of the start does not prevent the next one.
    let (mut dev, endpoints) = Dev::start(&data_dir, &["--ephemeral"]).await;
    assert_eq!(endpoints.postgres_dir, postgres_dir);
    dev.interrupt().await;
    assert!(!data_dir.exists() && !postgres_dir.exists());
}

/// Waits until `initdb` writes its first file. Returns the directory of PostgreSQL's files.
async fn wait_for_initdb(data_dir: &Path) -> PathBuf {
    let requested = data_dir.join("postgres");
    for _ in 0..6000 {
        let elsewhere = std::fs::read_to_string(requested.join("files-are-in"));
        let postgres_dir = elsewhere.map_or_else(|_| requested.clone(), |path| PathBuf::from(path.trim()));
        if postgres_dir.join("data/PG_VERSION").exists() {
            return postgres_dir.canonicalize().unwrap();
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("initdb did not start");
}
