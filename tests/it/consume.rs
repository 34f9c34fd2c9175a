//! `consume`: it writes each record of a topic to a file, and commits the group offset only after the file is whole and verified.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use rdkafka::producer::{FutureProducer, FutureRecord};
use serde_json::{Value, json};

use crate::audit::{produce, produce_reference};
use crate::harness::process::signal;
use crate::harness::uploads::PART_BYTES;
use crate::harness::{TestBroker, bytes, sha256};

/// Joining a group takes 3 s while Kafka waits for more members.
const MAX_RUN_TIME: Duration = Duration::from_secs(60);

/// Consumes the broker's topic until this many records are saved. Each test's group is named after its topic, because a
/// shared group would rebalance across tests.
async fn consume(broker: &TestBroker, directory: &Path, records: usize, more: &[&str]) -> Output {
    consume_with(broker, directory, records, more, &[]).await
}

async fn consume_with(
    broker: &TestBroker,
    directory: &Path,
    records: usize,
    more: &[&str],
    environment: &[(&str, &str)],
) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lfs-broker"));
    command.args(["consume", "--topic", &broker.topic, "--max-records", &records.to_string(), "--dir"]).arg(directory).args(more);
    let kafka = broker.settings.kafka.bootstrap_servers.clone();
    command.env_clear().env("LFS_BROKER_URL", broker.url()).env("KAFKA_BOOTSTRAP_SERVERS", kafka).stdin(Stdio::null());
    command.envs(environment.iter().copied());
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program starts");
    let id = child.id();
    let waiting = tokio::task::spawn_blocking(move || child.wait_with_output().unwrap());
    match tokio::time::timeout(MAX_RUN_TIME, waiting).await {
        Ok(finished) => finished.unwrap(),
        Err(_) => {
            // Without a record limit that is reached, the command never exits.
            signal(id, "KILL");
            panic!("consume did not end within {MAX_RUN_TIME:?}");
        }
    }
}

/// The printed lines, one per file.
fn lines(output: &Output) -> Vec<Value> {
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[tokio::test]
async fn consume_writes_each_record_to_a_file_and_a_group_continues_at_its_offset() {
    let broker = TestBroker::start().await;
    let directory = tempfile::tempdir().unwrap();
    let large = bytes(2 * PART_BYTES + 9, 1);
    let put =
        broker.open_and_put(&large, json!({"key": "k", "partition": 1, "part_size": PART_BYTES, "filename": "a b.tar.gz"})).await;
    broker.complete_and_wait(&put.id(), json!({})).await;
    broker.publish(b"hello", json!({"partition": 0, "filename": "b.txt"})).await;
    produce(&broker.topic, 2, b"no pointer", None).await;

    let contents = BTreeMap::from([(0, b"hello".to_vec()), (1, large), (2, b"no pointer".to_vec())]);
    let output = lines(&consume(&broker, directory.path(), 3, &["--group", &broker.topic]).await);
    assert_eq!(output.len(), 3);
    for line in &output {
        let content = &contents[&line["partition"].as_i64().unwrap()];
        let path = Path::new(line["path"].as_str().unwrap());
        assert_eq!(path.parent(), Some(directory.path()), "{line}");
        assert!(std::fs::read(path).unwrap() == *content, "{line}");
        assert_eq!((&line["size"], &line["sha256"]), (&json!(content.len()), &json!(sha256(content))));
        assert_eq!((&line["topic"], line["offset"].is_u64()), (&json!(broker.topic), true));
    }
    let named = |partition: i64| output.iter().find(|line| line["partition"] == partition).unwrap();
    assert_eq!((&named(1)["key"], &named(0)["key"]), (&json!("k"), &Value::Null));
    assert!(named(1)["path"].as_str().unwrap().ends_with(".gz"));
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 3, "no partial file is left");

    // The group continues at its offset. Without a group, every record is written again to the same file names.
    let next = broker.publish(b"next", json!({"partition": 0})).await;
    let output = lines(&consume(&broker, directory.path(), 1, &["--group", &broker.topic]).await);
    assert_eq!((&output[0]["offset"], &output[0]["size"]), (&next.json["record"]["offset"], &json!(4)));
    assert_eq!(lines(&consume(&broker, directory.path(), 4, &[]).await).len(), 4);
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 4);
}

#[tokio::test]
async fn a_record_that_cannot_be_saved_is_not_skipped() {
    let broker = TestBroker::start().await;
    let directory = tempfile::tempdir().unwrap();
    let lost = broker.publish(b"gone", json!({"partition": 0})).await;
    broker.publish(b"after", json!({"partition": 0})).await;
    let key = lost.json["pointer"]["key"].as_str().unwrap();
    broker.s3.delete_object().bucket(&broker.bucket).key(key).send().await.unwrap();
    let output = consume(&broker, directory.path(), 2, &["--group", &broker.topic]).await;
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!((output.status.code(), output.stdout.len()), (Some(3), 0), "{stderr}");
    assert!(stderr.contains(&format!("{}-0-", broker.topic)), "the record is named: {stderr}");
    let offset = lost.json["record"]["offset"].as_i64().unwrap();
    let past = format!("--group {0} --topic {0}:0 --reset-offsets --to-offset {1} --execute", broker.topic, offset + 1);
    assert!(stderr.contains("hint: ") && stderr.contains(&past), "the hint skips the record: {stderr}");
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    // Other bytes in the object's place are another kind of failure, whether the broker or the client finds it.
    for (other, group) in [(b"evil".as_slice(), ["--group", &broker.topic].as_slice()), (b"larger", &[])] {
        broker.put_object(key, other, None).await;
        let output = consume(&broker, directory.path(), 2, group).await;
        assert_eq!((output.status.code(), output.stdout.len()), (Some(4), 0), "{}", String::from_utf8_lossy(&output.stderr));
    }
    broker.put_object(key, b"gone", None).await;
    assert_eq!(lines(&consume(&broker, directory.path(), 2, &["--group", &broker.topic]).await).len(), 2);
}

#[tokio::test]
async fn a_missing_topic_and_an_unreachable_kafka_are_reported() {
    let broker = TestBroker::start().await;
    let directory = tempfile::tempdir().unwrap();
    let output = consume(&broker, directory.path(), 1, &["--kafka", "127.0.0.1:9"]).await;
    assert_eq!(output.status.code(), Some(5), "{}", String::from_utf8_lossy(&output.stderr));
    let mut other_topic = broker;
    other_topic.topic = "not-there".to_owned();
    let output = consume(&other_topic, directory.path(), 1, &[]).await;
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("no topic not-there"), "{stderr}");
}

#[tokio::test]
async fn a_reference_is_fetched_from_the_named_bucket_and_never_reported_as_verified() {
    let broker = TestBroker::start().await;
    let directory = tempfile::tempdir().unwrap();
    let key = format!("large/{}", uuid::Uuid::new_v4());
    broker.put_object(&key, b"by reference", None).await;
    produce_reference(&broker.topic, &key).await;

    let without_bucket = consume(&broker, directory.path(), 1, &["--group", &broker.topic]).await;
    let stderr = String::from_utf8_lossy(&without_bucket.stderr).into_owned();
    assert_eq!(
        (without_bucket.status.code(), without_bucket.stdout.len()),
        (Some(1), 0),
        "the record is not treated as a tombstone: {stderr}"
    );
    assert!(stderr.contains("hint:") && stderr.contains("--reference-bucket"), "{stderr}");

    let s3 = &broker.settings.objects;
    let environment = [
        ("AWS_ENDPOINT_URL_S3", s3.endpoint.as_deref().unwrap()),
        ("AWS_ACCESS_KEY_ID", s3.access_key_id.as_deref().unwrap()),
        ("AWS_SECRET_ACCESS_KEY", s3.secret_access_key.as_deref().unwrap()),
        ("AWS_REGION", s3.region.as_deref().unwrap()),
    ];
    let more = ["--group", &broker.topic, "--reference-bucket", &broker.bucket];
    let output = consume_with(&broker, directory.path(), 1, &more, &environment).await;
    let line = &lines(&output)[0];
    assert_eq!((&line["verified"], &line["size"]), (&json!(false), &json!(12)));
    assert_eq!(line["sha256"], json!(sha256(b"by reference")), "the hash is that of the received bytes");
    assert_eq!(std::fs::read(line["path"].as_str().unwrap()).unwrap(), b"by reference");
    assert!(String::from_utf8_lossy(&output.stderr).contains("could not be verified"));

    broker.s3.delete_object().bucket(&broker.bucket).key(&key).send().await.unwrap();
    let output = consume_with(&broker, directory.path(), 1, &more[2..], &environment).await;
    assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0), "{}", String::from_utf8_lossy(&output.stderr));
}

#[tokio::test]
async fn a_group_that_starts_at_the_latest_offset_does_not_skip_a_record_that_it_could_not_save() {
    let broker = TestBroker::start().await;
    let directory = tempfile::tempdir().unwrap();
    broker.publish(b"before", json!({"partition": 0})).await;
    let latest = ["--group", &broker.topic, "--from", "latest"];
    // The command exits at once and commits its offsets.
    assert!(lines(&consume(&broker, directory.path(), 0, &latest).await).is_empty());
    let lost = broker.publish(b"gone", json!({"partition": 0})).await;
    let key = lost.json["pointer"]["key"].as_str().unwrap();
    broker.s3.delete_object().bucket(&broker.bucket).key(key).send().await.unwrap();
    let output = consume(&broker, directory.path(), 1, &latest).await;
    assert_eq!((output.status.code(), output.stdout.len()), (Some(3), 0), "{}", String::from_utf8_lossy(&output.stderr));
    broker.put_object(key, b"gone", None).await;
    let output = lines(&consume(&broker, directory.path(), 1, &latest).await);
    assert_eq!((&output[0]["offset"], &output[0]["size"]), (&lost.json["record"]["offset"], &json!(4)));
}

#[tokio::test]
async fn a_pointer_without_a_checksum_is_never_reported_as_verified() {
    let broker = TestBroker::start().await;
    let directory = tempfile::tempdir().unwrap();
    broker.put_policy(&broker.topic, &json!({"checksums": ["none"], "min_integrity": "size"})).await.expect(200);
    broker.publish(b"hello", json!({"sha256": null, "checksum_alg": "none", "partition": 0})).await;
    let output = consume(&broker, directory.path(), 1, &[]).await;
    let line = &lines(&output)[0];
    assert_eq!((&line["verified"], &line["size"]), (&json!(false), &json!(5)));
    assert!(String::from_utf8_lossy(&output.stderr).contains("could not be verified"));
}

#[tokio::test]
async fn a_kafka_outage_is_reported_once() {
    let broker = TestBroker::start().await;
    let directory = tempfile::tempdir().unwrap();
    let kafka = lfs_broker::dev::kafka::Server::start().unwrap();
    kafka.create_topic(&broker.topic, 1).await.unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_lfs-broker"));
    command.args(["consume", "--topic", &broker.topic, "--kafka", &kafka.bootstrap_servers(), "--dir"]).arg(directory.path());
    command.env_clear().env("LFS_BROKER_URL", broker.url()).stdin(Stdio::null());
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let output = std::io::BufReader::new(child.stderr.take().unwrap());
    let (send, lines) = std::sync::mpsc::channel();
    std::thread::spawn(move || std::io::BufRead::lines(output).map_while(Result::ok).for_each(|line| drop(send.send(line))));
    // The saved record shows that the command consumes the topic.
    let producer: FutureProducer =
        rdkafka::ClientConfig::new().set("bootstrap.servers", kafka.bootstrap_servers()).create().unwrap();
    let record = FutureRecord::<str, [u8]>::to(&broker.topic).partition(0).payload(b"inline");
    producer.send(record, Duration::from_secs(10)).await.unwrap();
    drop(producer);
    let saved = || std::fs::read_dir(directory.path()).unwrap().count();
    broker.eventually("the command consumes the topic", async || saved() == 1).await;
    let next_line =
        |lines: std::sync::mpsc::Receiver<String>| tokio::task::spawn_blocking(move || (lines.recv_timeout(MAX_RUN_TIME), lines));
    kafka.down().await.unwrap();
    let (away, lines) = next_line(lines).await.unwrap();
    kafka.up().await.unwrap();
    let (back, lines) = next_line(lines).await.unwrap();
    signal(child.id(), "INT");
    assert_eq!(child.wait().unwrap().code(), Some(0));
    let away = away.unwrap();
    assert!(away.starts_with("note: Kafka is unavailable") && away.ends_with("waiting for it"), "{away}");
    assert_eq!(back.unwrap(), "note: Kafka is available again");
    assert_eq!(lines.iter().collect::<Vec<_>>(), Vec::<String>::new(), "each state is reported once");
}
