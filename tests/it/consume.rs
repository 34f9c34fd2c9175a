//! `consume`: every record of a topic becomes a file, proved and whole, and its place is noted only after.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use rdkafka::producer::{FutureProducer, FutureRecord};
use serde_json::{Value, json};

use crate::audit::{produce, refer};
use crate::harness::serving::signal;
use crate::harness::uploads::PART;
use crate::harness::{House, bytes, sha256};

/// Joining a group takes 3 s where Kafka waits for more members.
const PATIENCE: Duration = Duration::from_secs(60);

/// Follows the house's topic until it has saved so many records. A group is named after the topic: tests that shared one
/// would send its members away from each other's places.
async fn consume(house: &House, directory: &Path, records: usize, more: &[&str]) -> Output {
    consume_with(house, directory, records, more, &[]).await
}

async fn consume_with(house: &House, directory: &Path, records: usize, more: &[&str], environment: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lfs-broker"));
    command.args(["consume", "--topic", &house.topic, "--max-records", &records.to_string(), "--dir"]).arg(directory).args(more);
    let kafka = house.settings.kafka.bootstrap_servers.clone();
    command.env_clear().env("LFS_BROKER_URL", house.url()).env("KAFKA_BOOTSTRAP_SERVERS", kafka).stdin(Stdio::null());
    command.envs(environment.iter().copied());
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program starts");
    let id = child.id();
    let ending = tokio::task::spawn_blocking(move || child.wait_with_output().unwrap());
    match tokio::time::timeout(PATIENCE, ending).await {
        Ok(ended) => ended.unwrap(),
        Err(_) => {
            // What waits for records that never come waits for ever.
            signal(id, "KILL");
            panic!("consume did not end within {PATIENCE:?}");
        }
    }
}

/// What was printed, a line a file.
fn lines(output: &Output) -> Vec<Value> {
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[tokio::test]
async fn a_topic_becomes_files_and_a_group_remembers_where_it_was() {
    let house = House::new().await;
    let directory = tempfile::tempdir().unwrap();
    let large = bytes(2 * PART + 9, 1);
    let put = house.put_up(&large, json!({"key": "k", "partition": 1, "part_size": PART, "filename": "a b.tar.gz"})).await;
    house.complete_and_wait(&put.id(), json!({})).await;
    house.publish(b"hello", json!({"partition": 0, "filename": "b.txt"})).await;
    produce(&house.topic, 2, b"no pointer", None).await;

    let contents = BTreeMap::from([(0, b"hello".to_vec()), (1, large), (2, b"no pointer".to_vec())]);
    let told = lines(&consume(&house, directory.path(), 3, &["--group", &house.topic]).await);
    assert_eq!(told.len(), 3);
    for line in &told {
        let content = &contents[&line["partition"].as_i64().unwrap()];
        let path = Path::new(line["path"].as_str().unwrap());
        assert_eq!(path.parent(), Some(directory.path()), "{line}");
        assert!(std::fs::read(path).unwrap() == *content, "{line}");
        assert_eq!((&line["size"], &line["sha256"]), (&json!(content.len()), &json!(sha256(content))));
        assert_eq!((&line["topic"], line["offset"].is_u64()), (&json!(house.topic), true));
    }
    let named = |partition: i64| told.iter().find(|line| line["partition"] == partition).unwrap();
    assert_eq!((&named(1)["key"], &named(0)["key"]), (&json!("k"), &Value::Null));
    assert!(named(1)["path"].as_str().unwrap().ends_with(".gz"));
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 3, "nothing half done is left");

    // The group goes on where it was; without one it is all there again, under the same names.
    let next = house.publish(b"next", json!({"partition": 0})).await;
    let told = lines(&consume(&house, directory.path(), 1, &["--group", &house.topic]).await);
    assert_eq!((&told[0]["offset"], &told[0]["size"]), (&next.json["record"]["offset"], &json!(4)));
    assert_eq!(lines(&consume(&house, directory.path(), 4, &[]).await).len(), 4);
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 4);
}

#[tokio::test]
async fn a_record_that_cannot_be_saved_is_not_passed_over() {
    let house = House::new().await;
    let directory = tempfile::tempdir().unwrap();
    let gone = house.publish(b"gone", json!({"partition": 0})).await;
    house.publish(b"after", json!({"partition": 0})).await;
    let key = gone.json["pointer"]["key"].as_str().unwrap();
    house.s3.delete_object().bucket(&house.bucket).key(key).send().await.unwrap();
    let told = consume(&house, directory.path(), 2, &["--group", &house.topic]).await;
    let words = String::from_utf8_lossy(&told.stderr).into_owned();
    assert_eq!((told.status.code(), told.stdout.len()), (Some(3), 0), "{words}");
    assert!(words.contains(&format!("{}-0-", house.topic)), "it says which: {words}");
    let offset = gone.json["record"]["offset"].as_i64().unwrap();
    let past = format!("--group {0} --topic {0}:0 --reset-offsets --to-offset {1} --execute", house.topic, offset + 1);
    assert!(words.contains("hint: ") && words.contains(&past), "how the group gets past it: {words}");
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    // Other bytes in its place are a failure of another kind, whoever finds it.
    for (other, group) in [(b"evil".as_slice(), ["--group", &house.topic].as_slice()), (b"larger", &[])] {
        house.put_object(key, other, None).await;
        let told = consume(&house, directory.path(), 2, group).await;
        assert_eq!((told.status.code(), told.stdout.len()), (Some(4), 0), "{}", String::from_utf8_lossy(&told.stderr));
    }
    house.put_object(key, b"gone", None).await;
    assert_eq!(lines(&consume(&house, directory.path(), 2, &["--group", &house.topic]).await).len(), 2);
}

#[tokio::test]
async fn a_topic_or_a_kafka_that_is_not_there_is_told() {
    let house = House::new().await;
    let directory = tempfile::tempdir().unwrap();
    let told = consume(&house, directory.path(), 1, &["--kafka", "127.0.0.1:9"]).await;
    assert_eq!(told.status.code(), Some(5), "{}", String::from_utf8_lossy(&told.stderr));
    let mut elsewhere = house;
    elsewhere.topic = "not-there".to_owned();
    let told = consume(&elsewhere, directory.path(), 1, &[]).await;
    let words = String::from_utf8_lossy(&told.stderr).into_owned();
    assert_eq!(told.status.code(), Some(1), "{words}");
    assert!(words.contains("no topic not-there"), "{words}");
}

#[tokio::test]
async fn a_reference_is_followed_into_the_bucket_that_was_named_and_never_called_verified() {
    let house = House::new().await;
    let directory = tempfile::tempdir().unwrap();
    let key = format!("large/{}", uuid::Uuid::new_v4());
    house.put_object(&key, b"by reference", None).await;
    refer(&house.topic, &key).await;

    let untold = consume(&house, directory.path(), 1, &["--group", &house.topic]).await;
    let words = String::from_utf8_lossy(&untold.stderr).into_owned();
    assert_eq!((untold.status.code(), untold.stdout.len()), (Some(1), 0), "not taken for a tombstone: {words}");
    assert!(words.contains("hint:") && words.contains("--reference-bucket"), "{words}");

    let s3 = &house.settings.objects;
    let environment = [
        ("AWS_ENDPOINT_URL_S3", s3.endpoint.as_deref().unwrap()),
        ("AWS_ACCESS_KEY_ID", s3.access_key_id.as_deref().unwrap()),
        ("AWS_SECRET_ACCESS_KEY", s3.secret_access_key.as_deref().unwrap()),
        ("AWS_REGION", s3.region.as_deref().unwrap()),
    ];
    let more = ["--group", &house.topic, "--reference-bucket", &house.bucket];
    let told = consume_with(&house, directory.path(), 1, &more, &environment).await;
    let line = &lines(&told)[0];
    assert_eq!((&line["verified"], &line["size"]), (&json!(false), &json!(12)));
    assert_eq!(line["sha256"], json!(sha256(b"by reference")), "of what came, whatever it should have been");
    assert_eq!(std::fs::read(line["path"].as_str().unwrap()).unwrap(), b"by reference");
    assert!(String::from_utf8_lossy(&told.stderr).contains("could not be verified"));

    house.s3.delete_object().bucket(&house.bucket).key(&key).send().await.unwrap();
    let told = consume_with(&house, directory.path(), 1, &more[2..], &environment).await;
    assert_eq!((told.status.code(), told.stdout.len()), (Some(1), 0), "{}", String::from_utf8_lossy(&told.stderr));
}

#[tokio::test]
async fn a_group_that_begins_at_the_end_does_not_pass_over_what_it_could_not_save() {
    let house = House::new().await;
    let directory = tempfile::tempdir().unwrap();
    house.publish(b"before", json!({"partition": 0})).await;
    let latest = ["--group", &house.topic, "--from", "latest"];
    // It ends at once, and its places are noted.
    assert!(lines(&consume(&house, directory.path(), 0, &latest).await).is_empty());
    let gone = house.publish(b"gone", json!({"partition": 0})).await;
    let key = gone.json["pointer"]["key"].as_str().unwrap();
    house.s3.delete_object().bucket(&house.bucket).key(key).send().await.unwrap();
    let told = consume(&house, directory.path(), 1, &latest).await;
    assert_eq!((told.status.code(), told.stdout.len()), (Some(3), 0), "{}", String::from_utf8_lossy(&told.stderr));
    house.put_object(key, b"gone", None).await;
    let told = lines(&consume(&house, directory.path(), 1, &latest).await);
    assert_eq!((&told[0]["offset"], &told[0]["size"]), (&gone.json["record"]["offset"], &json!(4)));
}

#[tokio::test]
async fn a_pointer_without_a_checksum_is_never_called_verified() {
    let house = House::new().await;
    let directory = tempfile::tempdir().unwrap();
    house.put_policy(&house.topic, &json!({"checksums": ["none"], "min_integrity": "size"})).await.expect(200);
    house.publish(b"hello", json!({"sha256": null, "checksum_alg": "none", "partition": 0})).await;
    let told = consume(&house, directory.path(), 1, &[]).await;
    let line = &lines(&told)[0];
    assert_eq!((&line["verified"], &line["size"]), (&json!(false), &json!(5)));
    assert!(String::from_utf8_lossy(&told.stderr).contains("could not be verified"));
}

#[tokio::test]
async fn a_kafka_that_goes_away_and_comes_back_is_told_once() {
    let house = House::new().await;
    let directory = tempfile::tempdir().unwrap();
    let kafka = lfs_broker::dev::kafka::Server::start().unwrap();
    kafka.create_topic(&house.topic, 1).await.unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_lfs-broker"));
    command.args(["consume", "--topic", &house.topic, "--kafka", &kafka.bootstrap_servers(), "--dir"]).arg(directory.path());
    command.env_clear().env("LFS_BROKER_URL", house.url()).stdin(Stdio::null());
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let told = std::io::BufReader::new(child.stderr.take().unwrap());
    let (send, lines) = std::sync::mpsc::channel();
    std::thread::spawn(move || std::io::BufRead::lines(told).map_while(Result::ok).for_each(|line| drop(send.send(line))));
    // A record that it has saved says that it follows.
    let producer: FutureProducer =
        rdkafka::ClientConfig::new().set("bootstrap.servers", kafka.bootstrap_servers()).create().unwrap();
    let record = FutureRecord::<str, [u8]>::to(&house.topic).partition(0).payload(b"inline");
    producer.send(record, Duration::from_secs(10)).await.unwrap();
    drop(producer);
    let saved = || std::fs::read_dir(directory.path()).unwrap().count();
    house.eventually("it follows", async || saved() == 1).await;
    let hear =
        |lines: std::sync::mpsc::Receiver<String>| tokio::task::spawn_blocking(move || (lines.recv_timeout(PATIENCE), lines));
    kafka.down().await.unwrap();
    let (away, lines) = hear(lines).await.unwrap();
    kafka.up().await.unwrap();
    let (back, lines) = hear(lines).await.unwrap();
    signal(child.id(), "INT");
    assert_eq!(child.wait().unwrap().code(), Some(0));
    let away = away.unwrap();
    assert!(away.starts_with("note: Kafka is away") && away.ends_with("waiting for it"), "{away}");
    assert_eq!(back.unwrap(), "note: Kafka is back");
    assert_eq!(lines.iter().collect::<Vec<_>>(), Vec::<String>::new(), "once");
}
