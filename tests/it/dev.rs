//! `lfs-broker dev` as users run it: the real program is started, restarted, interrupted and killed.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use lfs_broker::dev::Endpoints;
use lfs_broker_client::api::{ListUploads, UploadState};
use lfs_broker_client::{Client, UploadOptions};
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::message::Message as _;
use rdkafka::{ClientConfig, Offset, TopicPartitionList};

use crate::harness::bytes;

const PROGRAM: &str = env!("CARGO_BIN_EXE_lfs-broker");

/// A running `dev`. It is killed when a test fails before it stops it.
struct Dev(Child);

impl Drop for Dev {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn dev(data_dir: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(PROGRAM);
    command.args(["dev", "--listen", "127.0.0.1:0", "--data-dir"]).arg(data_dir).args(more);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// Starts `dev` and waits for `dev.json`, which is written once every server answers.
async fn start(data_dir: &Path, more: &[&str]) -> (Dev, Endpoints) {
    let mut child = Dev(dev(data_dir, more).spawn().expect("the program starts"));
    for _ in 0..600 {
        if let Ok(json) = std::fs::read(data_dir.join("dev.json")) {
            return (child, serde_json::from_slice(&json).expect("dev.json is complete"));
        }
        assert!(child.0.try_wait().unwrap().is_none(), "dev ended before it answered");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("no dev.json after a minute");
}

async fn signal(child: &mut Dev, name: &str) -> Option<i32> {
    let sent = Command::new("kill").args([name, &child.0.id().to_string()]).status().unwrap();
    assert!(sent.success());
    for _ in 0..600 {
        if let Some(status) = child.0.try_wait().unwrap() {
            return status.code();
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("dev did not end within a minute of {name}");
}

#[test]
fn a_dev_without_tokens_may_listen_on_loopback_only() {
    let scratch = tempfile::tempdir().unwrap();
    let data_dir = scratch.path().join("data");
    let mut command = Command::new(PROGRAM);
    command.args(["dev", "--listen", "0.0.0.0:0", "--data-dir"]).arg(&data_dir).stdin(Stdio::null());
    let output = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains("auth mode none is refused on 0.0.0.0:0") && stderr.contains("hint:"), "{stderr}");
    assert!(!data_dir.exists(), "no directory was created");
}

/// Waits until PostgreSQL's port is closed, which shows that PostgreSQL has stopped.
async fn wait_until_postgres_stops(endpoints: &Endpoints) {
    let address = endpoints.database_url.rsplit_once('@').unwrap().1.split('/').next().unwrap();
    for _ in 0..1200 {
        if tokio::net::TcpStream::connect(address).await.is_err() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("PostgreSQL outlived dev");
}

/// Starts `dev`, kills it once every server answers, and waits until its PostgreSQL has stopped.
async fn start_and_kill(data_dir: &Path) {
    let (mut child, endpoints) = start(data_dir, &[]).await;
    child.0.kill().unwrap();
    child.0.wait().unwrap();
    wait_until_postgres_stops(&endpoints).await;
}

/// The record at an offset, read by a plain consumer.
fn record_at(endpoints: &Endpoints, topic: &str, partition: i32, offset: i64) -> Vec<u8> {
    let consumer: BaseConsumer =
        ClientConfig::new().set("bootstrap.servers", &endpoints.kafka_bootstrap).set("group.id", "it").create().unwrap();
    let mut assignment = TopicPartitionList::new();
    assignment.add_partition_offset(topic, partition, Offset::Offset(offset)).unwrap();
    consumer.assign(&assignment).unwrap();
    let message = consumer.poll(Duration::from_secs(20)).expect("a record in time").expect("a record");
    assert_eq!(message.offset(), offset);
    message.payload().unwrap().to_vec()
}

#[tokio::test]
async fn state_survives_a_restart_and_records_keep_their_offsets() {
    let home = tempfile::tempdir().unwrap();
    let data_dir = home.path().join("data");
    let (mut child, endpoints) = start(&data_dir, &[]).await;
    let client = Client::new(&endpoints.broker_url).unwrap();
    let content = bytes(100_000, 1);
    let options = || UploadOptions { key: Some(b"k".to_vec()), wait_published: true, ..UploadOptions::to("demo") };
    client.upload(options()).bytes(content.clone()).await.unwrap();
    let second = client.upload(options()).bytes(content.clone()).await.unwrap();
    let value = second.pointer.unwrap().to_json().into_bytes();
    let record = second.record.unwrap();
    assert_eq!(record_at(&endpoints, "demo", record.partition, record.offset), value);
    assert_eq!(signal(&mut child, "-INT").await, Some(0), "Ctrl-C stops it in order");
    assert!(!data_dir.join("dev.json").exists(), "dev.json exists only while dev runs");
    wait_until_postgres_stops(&endpoints).await;

    let (mut child, again) = start(&data_dir, &[]).await;
    assert_eq!(again.s3_endpoint, endpoints.s3_endpoint, "URLs that were presigned before stay valid");
    let client = Client::new(&again.broker_url).unwrap();
    let listed = client.list(&ListUploads::default()).await.unwrap();
    assert_eq!(listed.items.iter().map(|item| item.state).collect::<Vec<_>>(), [UploadState::Published; 2]);
    assert_eq!(record_at(&again, "demo", record.partition, record.offset), value);
    assert!(client.fetch(&value).await.unwrap().to_vec(1 << 20).await.unwrap() == content);
    let third = client.upload(options()).bytes(content).await.unwrap().record.unwrap();
    assert_eq!((third.partition, third.offset), (record.partition, record.offset + 1));
    assert_eq!(signal(&mut child, "-TERM").await, Some(0));
    wait_until_postgres_stops(&again).await;
}

#[tokio::test]
async fn a_data_directory_can_have_only_one_dev() {
    let home = tempfile::tempdir().unwrap();
    let data_dir = home.path().join("data");
    let (mut child, _) = start(&data_dir, &["--ephemeral"]).await;
    let second = dev(&data_dir, &[]).stderr(Stdio::piped()).output().unwrap();
    assert_eq!(second.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&second.stderr).contains("another lfs-broker dev runs on"));
    assert!(String::from_utf8_lossy(&second.stderr).contains("hint: stop it, or use another --data-dir"));
    assert_eq!(signal(&mut child, "-INT").await, Some(0));
    assert!(!data_dir.exists(), "--ephemeral leaves no files");
}

#[tokio::test]
async fn the_postgresql_of_a_killed_dev_stops_too() {
    let home = tempfile::tempdir().unwrap();
    let data_dir = home.path().join("data");
    start_and_kill(&data_dir).await;
    // The files that a kill leaves do not prevent the next start.
    std::fs::remove_file(data_dir.join("dev.json")).unwrap();
    let (mut child, _) = start(&data_dir, &[]).await;
    assert_eq!(signal(&mut child, "-INT").await, Some(0));
}

/// Creates foreign files in the data directory.
fn create_foreign_files(data_dir: &Path) {
    for name in ["photos", "s3", "postgres"] {
        std::fs::create_dir_all(data_dir.join(name)).unwrap();
        std::fs::write(data_dir.join(name).join("1.jpg"), name).unwrap();
    }
}

/// Every path below a directory.
fn names_in(directory: &Path) -> Vec<String> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(directory).into_iter().flatten() {
        let path = entry.unwrap().path();
        names.push(path.display().to_string());
        if path.is_dir() {
            names.extend(names_in(&path));
        }
    }
    names
}

fn names_of_foreign_files(data_dir: &Path) -> Vec<String> {
    let name = |name: &str| data_dir.join(name).display().to_string();
    let mut names = ["photos", "s3", "postgres"].map(|directory| [name(directory), name(&format!("{directory}/1.jpg"))]).concat();
    names.sort();
    names
}

/// Runs `dev` until it exits by itself.
async fn wait_for_exit(mut command: Command) -> std::process::Output {
    let child = command.stderr(Stdio::piped()).spawn().unwrap();
    let waiting = tokio::task::spawn_blocking(move || child.wait_with_output().unwrap());
    tokio::time::timeout(Duration::from_secs(60), waiting).await.expect("dev ends within a minute").unwrap()
}

#[tokio::test]
async fn an_ephemeral_dev_removes_only_files_that_it_created() {
    let home = tempfile::tempdir().unwrap();
    let data_dir = home.path().join("data");
    create_foreign_files(&data_dir);
    let (mut child, endpoints) = start(&data_dir, &["--ephemeral"]).await;
    Client::new(&endpoints.broker_url).unwrap().upload(UploadOptions::to("demo")).bytes(bytes(9, 1)).await.unwrap();
    assert_eq!(signal(&mut child, "-INT").await, Some(0));
    let mut left = names_in(&data_dir);
    left.sort();
    assert_eq!(left, names_of_foreign_files(&data_dir));
}

#[tokio::test]
async fn a_dev_whose_port_is_taken_starts_no_server_and_leaves_no_files() {
    let home = tempfile::tempdir().unwrap();
    let data_dir = home.path().join("data");
    let occupied = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = occupied.local_addr().unwrap().to_string();
    for more in [["--ephemeral"].as_slice(), &[]] {
        let mut command = Command::new(PROGRAM);
        command.args(["dev", "--listen", &address, "--data-dir"]).arg(&data_dir).args(more).stdin(Stdio::null());
        let output = wait_for_exit(command).await;
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        assert!(stderr.starts_with("error: cannot listen on") && stderr.contains("hint:"), "{stderr}");
        assert!(!data_dir.exists(), "{:?}", names_in(home.path()));
    }
}

#[tokio::test]
async fn an_ephemeral_dev_that_is_interrupted_while_it_starts_leaves_no_files() {
    let home = tempfile::tempdir().unwrap();
    // Interrupted at the earliest moment, once PostgreSQL's data exists, and once S3's settings exist.
    for begun in ["lock", "postgres/data", "s3.json"] {
        let data_dir = home.path().join("data");
        let mut child = Dev(dev(&data_dir, &["--ephemeral"]).spawn().unwrap());
        for _ in 0..6000 {
            if names_in(&data_dir).iter().any(|name| name.ends_with(begun)) || postgres_has_other_directory(&data_dir, begun) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(signal(&mut child, "-INT").await, Some(0), "at {begun}");
        assert!(!data_dir.exists(), "at {begun}: {:?}", names_in(home.path()));
    }
}

/// As root, PostgreSQL keeps its files in another directory that its user can reach.
fn postgres_has_other_directory(data_dir: &Path, begun: &str) -> bool {
    begun == "postgres/data" && data_dir.join("postgres/files-are-in").exists()
}

#[tokio::test]
async fn a_dev_that_fails_to_start_removes_the_dev_json_of_an_earlier_run() {
    let home = tempfile::tempdir().unwrap();
    let data_dir = home.path().join("data");
    start_and_kill(&data_dir).await;
    assert!(data_dir.join("dev.json").exists(), "a kill leaves the file");
    let occupied = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut command = Command::new(PROGRAM);
    command.args(["dev", "--listen", &occupied.local_addr().unwrap().to_string(), "--data-dir"]).arg(&data_dir);
    assert_eq!(wait_for_exit(command).await.status.code(), Some(1));
    assert!(!data_dir.join("dev.json").exists(), "dev.json exists only while dev runs");
}

#[tokio::test]
async fn a_dev_whose_kafka_is_unreachable_is_not_reported_as_ready() {
    let home = tempfile::tempdir().unwrap();
    let data_dir = home.path().join("data");
    let output = wait_for_exit(dev(&data_dir, &["--ephemeral", "--kafka", "127.0.0.1:1"])).await;
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(5), "{stderr}");
    assert!(stderr.contains("127.0.0.1:1") && stderr.contains("hint:") && !stderr.contains("is ready"), "{stderr}");
    assert!(!data_dir.exists());
}
