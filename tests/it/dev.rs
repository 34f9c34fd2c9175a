//! `lfs-broker dev` as a user runs it: the real program, started, restarted, interrupted and killed.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use lfs_broker::dev::Places;
use lfs_broker_client::api::{ListUploads, UploadState};
use lfs_broker_client::{Client, UploadOptions};
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::message::Message as _;
use rdkafka::{ClientConfig, Offset, TopicPartitionList};

use crate::harness::bytes;

const PROGRAM: &str = env!("CARGO_BIN_EXE_lfs-broker");

/// A running `dev`, killed if a test fails before it ends it.
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

/// Starts it, and waits for `dev.json`, which is written once everything answers.
async fn start(data_dir: &Path, more: &[&str]) -> (Dev, Places) {
    let mut child = Dev(dev(data_dir, more).spawn().expect("the program starts"));
    for _ in 0..600 {
        if let Ok(json) = std::fs::read(data_dir.join("dev.json")) {
            return (child, serde_json::from_slice(&json).expect("dev.json is whole"));
        }
        assert!(child.0.try_wait().unwrap().is_none(), "dev ended before it answered");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("no dev.json after a minute");
}

async fn signal(child: &mut Dev, name: &str) -> Option<i32> {
    let sent = Command::new("kill").args([name, &child.0.id().to_string()]).status().unwrap();
    assert!(sent.success());
    for _ in 0..300 {
        if let Some(status) = child.0.try_wait().unwrap() {
            return status.code();
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("dev did not end within 30 s of {name}");
}

#[test]
fn a_dev_without_tokens_is_refused_on_any_address_but_loopback() {
    let scratch = tempfile::tempdir().unwrap();
    let data_dir = scratch.path().join("data");
    let mut command = Command::new(PROGRAM);
    command.args(["dev", "--listen", "0.0.0.0:0", "--data-dir"]).arg(&data_dir).stdin(Stdio::null());
    let told = command.output().unwrap();
    let words = String::from_utf8_lossy(&told.stderr);
    assert_eq!(told.status.code(), Some(2), "{words}");
    assert!(words.contains("auth mode none is refused on 0.0.0.0:0") && words.contains("hint:"), "{words}");
    assert!(!data_dir.exists(), "nothing was made");
}

/// PostgreSQL's port answers as long as it runs.
async fn postgres_ends(places: &Places) {
    let address = places.database_url.rsplit_once('@').unwrap().1.split('/').next().unwrap();
    for _ in 0..200 {
        if tokio::net::TcpStream::connect(address).await.is_err() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("PostgreSQL outlived dev");
}

/// Starts it, kills it once everything answers, and waits until nothing of it runs.
async fn start_and_kill(data_dir: &Path) {
    let (mut child, places) = start(data_dir, &[]).await;
    child.0.kill().unwrap();
    child.0.wait().unwrap();
    postgres_ends(&places).await;
}

/// The record at a place, read by a consumer that is not ours.
fn record_at(places: &Places, topic: &str, partition: i32, offset: i64) -> Vec<u8> {
    let consumer: BaseConsumer =
        ClientConfig::new().set("bootstrap.servers", &places.kafka_bootstrap).set("group.id", "it").create().unwrap();
    let mut place = TopicPartitionList::new();
    place.add_partition_offset(topic, partition, Offset::Offset(offset)).unwrap();
    consumer.assign(&place).unwrap();
    let message = consumer.poll(Duration::from_secs(20)).expect("a record in time").expect("a record");
    assert_eq!(message.offset(), offset);
    message.payload().unwrap().to_vec()
}

#[tokio::test]
async fn state_survives_a_restart_and_offsets_stay_true() {
    let home = tempfile::tempdir().unwrap();
    let data_dir = home.path().join("data");
    let (mut child, places) = start(&data_dir, &[]).await;
    let client = Client::new(&places.broker_url).unwrap();
    let content = bytes(100_000, 1);
    let options = || UploadOptions { key: Some(b"k".to_vec()), wait_published: true, ..UploadOptions::to("demo") };
    client.upload(options()).bytes(content.clone()).await.unwrap();
    let second = client.upload(options()).bytes(content.clone()).await.unwrap();
    let value = second.pointer.unwrap().to_json().into_bytes();
    let record = second.record.unwrap();
    assert_eq!(record_at(&places, "demo", record.partition, record.offset), value);
    assert_eq!(signal(&mut child, "-INT").await, Some(0), "Ctrl-C ends it in order");
    assert!(!data_dir.join("dev.json").exists(), "dev.json says what runs");
    postgres_ends(&places).await;

    let (mut child, again) = start(&data_dir, &[]).await;
    assert_eq!(again.s3_endpoint, places.s3_endpoint, "URLs signed before stay good");
    let client = Client::new(&again.broker_url).unwrap();
    let listed = client.list(&ListUploads::default()).await.unwrap();
    assert_eq!(listed.items.iter().map(|item| item.state).collect::<Vec<_>>(), [UploadState::Published; 2]);
    assert_eq!(record_at(&again, "demo", record.partition, record.offset), value);
    assert!(client.fetch(&value).await.unwrap().to_vec(1 << 20).await.unwrap() == content);
    let third = client.upload(options()).bytes(content).await.unwrap().record.unwrap();
    assert_eq!((third.partition, third.offset), (record.partition, record.offset + 1));
    assert_eq!(signal(&mut child, "-TERM").await, Some(0));
    postgres_ends(&again).await;
}

#[tokio::test]
async fn one_data_directory_has_one_dev() {
    let home = tempfile::tempdir().unwrap();
    let data_dir = home.path().join("data");
    let (mut child, _) = start(&data_dir, &["--ephemeral"]).await;
    let second = dev(&data_dir, &[]).stderr(Stdio::piped()).output().unwrap();
    assert_eq!(second.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&second.stderr).contains("another lfs-broker dev runs on"));
    assert_eq!(signal(&mut child, "-INT").await, Some(0));
    assert!(!data_dir.exists(), "--ephemeral leaves nothing");
}

#[tokio::test]
async fn a_killed_dev_takes_its_postgresql_with_it() {
    let home = tempfile::tempdir().unwrap();
    let data_dir = home.path().join("data");
    start_and_kill(&data_dir).await;
    // What a kill leaves behind keeps nobody from starting again.
    std::fs::remove_file(data_dir.join("dev.json")).unwrap();
    let (mut child, _) = start(&data_dir, &[]).await;
    assert_eq!(signal(&mut child, "-INT").await, Some(0));
}

/// Files that were there before, in the data directory.
fn strangers(data_dir: &Path) {
    for name in ["photos", "s3", "postgres"] {
        std::fs::create_dir_all(data_dir.join(name)).unwrap();
        std::fs::write(data_dir.join(name).join("1.jpg"), name).unwrap();
    }
}

/// What lies in a directory, and below.
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

fn names_of_strangers(data_dir: &Path) -> Vec<String> {
    let name = |name: &str| data_dir.join(name).display().to_string();
    let mut names = ["photos", "s3", "postgres"].map(|place| [name(place), name(&format!("{place}/1.jpg"))]).concat();
    names.sort();
    names
}

/// Runs `dev` until it ends by itself.
async fn ended(mut command: Command) -> std::process::Output {
    let child = command.stderr(Stdio::piped()).spawn().unwrap();
    let ending = tokio::task::spawn_blocking(move || child.wait_with_output().unwrap());
    tokio::time::timeout(Duration::from_secs(60), ending).await.expect("dev ends within a minute").unwrap()
}

#[tokio::test]
async fn an_ephemeral_dev_removes_nothing_that_it_did_not_make() {
    let home = tempfile::tempdir().unwrap();
    let data_dir = home.path().join("data");
    strangers(&data_dir);
    let (mut child, places) = start(&data_dir, &["--ephemeral"]).await;
    Client::new(&places.broker_url).unwrap().upload(UploadOptions::to("demo")).bytes(bytes(9, 1)).await.unwrap();
    assert_eq!(signal(&mut child, "-INT").await, Some(0));
    let mut left = names_in(&data_dir);
    left.sort();
    assert_eq!(left, names_of_strangers(&data_dir));
}

#[tokio::test]
async fn an_ephemeral_dev_that_does_not_start_leaves_nothing() {
    let home = tempfile::tempdir().unwrap();
    let data_dir = home.path().join("data");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let mut command = Command::new(PROGRAM);
    command.args(["dev", "--ephemeral", "--listen", &address, "--data-dir"]).arg(&data_dir).stdin(Stdio::null());
    let told = ended(command).await;
    let words = String::from_utf8_lossy(&told.stderr).into_owned();
    assert_eq!(told.status.code(), Some(1), "{words}");
    assert!(words.contains("cannot listen on"), "{words}");
    assert!(!data_dir.exists(), "{:?}", names_in(home.path()));
}

#[tokio::test]
async fn an_ephemeral_dev_that_is_ended_while_it_starts_leaves_nothing() {
    let home = tempfile::tempdir().unwrap();
    // At the earliest, once PostgreSQL's data is begun, and once S3's is.
    for begun in ["lock", "postgres/data", "s3.json"] {
        let data_dir = home.path().join("data");
        let mut child = Dev(dev(&data_dir, &["--ephemeral"]).spawn().unwrap());
        for _ in 0..6000 {
            if names_in(&data_dir).iter().any(|name| name.ends_with(begun)) || home_of_postgres(&data_dir, begun) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(signal(&mut child, "-INT").await, Some(0), "at {begun}");
        assert!(!data_dir.exists(), "at {begun}: {:?}", names_in(home.path()));
    }
}

/// Root's PostgreSQL has its files elsewhere, where its user can reach them.
fn home_of_postgres(data_dir: &Path, begun: &str) -> bool {
    begun == "postgres/data" && data_dir.join("postgres/files-are-in").exists()
}

#[tokio::test]
async fn a_dev_that_does_not_start_leaves_no_dev_json_of_before() {
    let home = tempfile::tempdir().unwrap();
    let data_dir = home.path().join("data");
    start_and_kill(&data_dir).await;
    assert!(data_dir.join("dev.json").exists(), "a kill leaves it");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut command = Command::new(PROGRAM);
    command.args(["dev", "--listen", &taken.local_addr().unwrap().to_string(), "--data-dir"]).arg(&data_dir);
    assert_eq!(ended(command).await.status.code(), Some(1));
    assert!(!data_dir.join("dev.json").exists(), "dev.json says what runs");
}

#[tokio::test]
async fn a_dev_without_its_kafka_is_not_called_ready() {
    let home = tempfile::tempdir().unwrap();
    let data_dir = home.path().join("data");
    let told = ended(dev(&data_dir, &["--ephemeral", "--kafka", "127.0.0.1:1"])).await;
    let words = String::from_utf8_lossy(&told.stderr).into_owned();
    assert_eq!(told.status.code(), Some(5), "{words}");
    assert!(words.contains("127.0.0.1:1") && words.contains("hint:") && !words.contains("is ready"), "{words}");
    assert!(!data_dir.exists());
}
