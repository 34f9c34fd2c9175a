//! What holds on any Kafka, tried on the embedded one. What only a real one can show is in `real`.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::{Headers, Message, OwnedMessage};
use uuid::Uuid;

use super::{Delivery, Error, Kafka, Placing, PublishError, Record, Settings};
use crate::dev::kafka::Server;

pub(super) fn settings(bootstrap_servers: String, delivery: Delivery) -> Settings {
    // A test that waits for a time-out should not wait long.
    let properties = BTreeMap::from([("message.timeout.ms".to_owned(), "2000".to_owned())]);
    Settings { bootstrap_servers, properties, delivery, create_topics: false }
}

pub(super) fn record(topic: &str, key: Option<&str>) -> Record {
    Record {
        upload_id: Uuid::now_v7(),
        topic: topic.to_owned(),
        partition: None,
        key: key.map(|key| key.as_bytes().to_vec()),
        value: br#"{"kfs_lfs":1}"#.to_vec(),
        headers: vec![("b".into(), b"2".to_vec()), ("a".into(), vec![0, 255]), ("b".into(), Vec::new())],
    }
}

/// Reads a partition from its beginning to its end.
pub(super) fn read(bootstrap_servers: &str, topic: &str, partition: i32, isolation: &str) -> Vec<OwnedMessage> {
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", bootstrap_servers)
        .set("group.id", "test")
        .set("enable.partition.eof", "true")
        .set("isolation.level", isolation)
        .set("fetch.wait.max.ms", "20")
        .create()
        .unwrap();
    let mut place = rdkafka::TopicPartitionList::new();
    place.add_partition_offset(topic, partition, rdkafka::Offset::Beginning).unwrap();
    consumer.assign(&place).unwrap();
    let (mut found, deadline) = (Vec::new(), Instant::now() + Duration::from_secs(20));
    while Instant::now() < deadline {
        match consumer.poll(Duration::from_millis(100)) {
            Some(Ok(message)) => found.push(message.detach()),
            Some(Err(rdkafka::error::KafkaError::PartitionEOF(_))) => return found,
            _ => {}
        }
    }
    panic!("{topic}/{partition} has no end after {} records", found.len());
}

async fn house(delivery: Delivery, topic: &str, partitions: i32) -> (Server, Kafka) {
    let server = Server::start().unwrap();
    server.create_topic(topic, partitions).await.unwrap();
    server.create_topic(super::MARKER_TOPIC, 2).await.unwrap();
    let kafka = Kafka::connect(&settings(server.bootstrap_servers(), delivery)).unwrap();
    (server, kafka)
}

#[tokio::test]
async fn a_record_arrives_as_it_was_given() {
    let (server, kafka) = house(Delivery::AtLeastOnce, "videos", 2).await;
    let shard = kafka.shard("lfs-broker.test.0", 0).await.unwrap();
    let sent = [
        Record { partition: Some(1), ..record("videos", Some("k")) },
        Record { partition: Some(1), ..record("videos", None) },
        Record { partition: Some(1), ..record("videos", Some("")) },
    ];
    let before = super::shard::now_ms();
    let delivered = shard.publish(1, &sent).await.unwrap();
    assert_eq!(delivered.iter().map(|d| (d.partition, d.offset)).collect::<Vec<_>>(), [(1, 0), (1, 1), (1, 2)]);
    assert_eq!(delivered.iter().map(|d| d.upload_id).collect::<Vec<_>>(), sent.each_ref().map(|r| r.upload_id));

    let found = read(&server.bootstrap_servers(), "videos", 1, "read_committed");
    assert_eq!(found.len(), 3);
    let keys: Vec<_> = found.iter().map(Message::key).collect();
    assert_eq!(keys[..2], [Some(b"k".as_slice()), None]);
    // An empty key is a key.
    assert_eq!(keys[2], Some(b"".as_slice()));
    for (message, delivered) in found.iter().zip(&delivered) {
        assert_eq!(message.payload(), Some(br#"{"kfs_lfs":1}"#.as_slice()));
        let headers = message.headers().unwrap();
        let headers: Vec<_> = headers.iter().map(|h| (h.key.to_owned(), h.value.unwrap_or(b"null").to_vec())).collect();
        assert_eq!(headers, sent[0].headers);
        assert_eq!(message.timestamp().to_millis(), Some(delivered.timestamp_ms));
        assert!((before..before + 10_000).contains(&delivered.timestamp_ms));
    }
}

#[tokio::test]
async fn a_key_has_the_partition_that_java_gives_it() {
    const PARTITIONS: i32 = 7;
    let (_server, kafka) = house(Delivery::AtLeastOnce, "videos", PARTITIONS).await;
    let shard = kafka.shard("lfs-broker.test.0", 0).await.unwrap();
    // The hashes are those of the tests of Java's `Utils.murmur2`.
    let known = [
        ("21", -973_932_308_i32),
        ("foobar", -790_332_482),
        ("a-little-bit-long-string", -985_981_536),
        ("a-little-bit-longer-string", -1_486_304_829),
    ];
    for (key, hash) in known {
        let delivered = shard.publish(1, &[record("videos", Some(key))]).await.unwrap();
        assert_eq!(delivered[0].partition, (hash & 0x7fff_ffff) % PARTITIONS, "{key}");
        assert_eq!(super::place::partition_of(key.as_bytes(), PARTITIONS), delivered[0].partition, "{key}");
    }
    // Also where librdkafka is not asked, of any length and of any bytes.
    for length in 0..20 {
        let key: Vec<u8> = (0..length).map(|at| 255 - at * 7).collect();
        let sent = Record { key: Some(key.clone()), ..record("videos", None) };
        let delivered = shard.publish(1, &[sent]).await.unwrap();
        assert_eq!(super::place::partition_of(&key, PARTITIONS), delivered[0].partition, "{key:?}");
    }
}

#[tokio::test]
async fn asking_for_a_topic_does_not_make_it() {
    let (_server, kafka) = house(Delivery::AtLeastOnce, "videos", 3).await;
    assert_eq!(kafka.partitions("videos").await.unwrap(), Some(3));
    assert_eq!(kafka.partitions("images").await.unwrap(), None);
    kafka.doubt("images");
    assert_eq!(kafka.partitions("images").await.unwrap(), None, "the mock cluster makes topics that it is asked to");
}

#[tokio::test]
async fn a_new_topic_is_seen_within_seconds() {
    let (server, kafka) = house(Delivery::AtLeastOnce, "videos", 1).await;
    assert_eq!(kafka.partitions("images").await.unwrap(), None);
    server.create_topic("images", 2).await.unwrap();
    let deadline = Instant::now() + Duration::from_secs(5);
    while kafka.partitions("images").await.unwrap() != Some(2) {
        assert!(Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn in_dev_a_topic_is_made_on_first_use() {
    let server = Server::start().unwrap();
    server.create_topic(super::MARKER_TOPIC, 1).await.unwrap();
    let settings = Settings { create_topics: true, ..settings(server.bootstrap_servers(), Delivery::AtLeastOnce) };
    let kafka = Kafka::connect(&settings).unwrap();
    assert_eq!(kafka.partitions("images").await.unwrap(), Some(4));
    let shard = kafka.shard("lfs-broker.test.0", 0).await.unwrap();
    let placing = kafka.place(vec![record("images", None), record("audio", None)]).await.unwrap();
    assert_eq!(shard.publish(1, &placing.records).await.unwrap().len(), 2);
}

/// Which records have no place, whether for good, and why.
fn told(placing: &Placing) -> Vec<(Uuid, bool, &str)> {
    placing.refused.iter().map(|refusal| (refusal.upload_id, refusal.permanent, refusal.reason.as_str())).collect()
}

#[tokio::test]
async fn a_record_for_a_topic_or_partition_that_is_missing_is_refused_for_good_and_holds_up_its_key_only() {
    let (_server, kafka) = house(Delivery::AtLeastOnce, "videos", 2).await;
    let of = |partition, key| Record { partition: Some(partition), ..record("videos", key) };
    let sent = [
        record("videos", None),
        record("images", None),
        of(2, None),
        of(-1, Some("k")),
        record("videos", Some("k")),
        record("videos", Some("l")),
        record("images", Some("k")),
        record("images", Some("k")),
    ];
    let placing = kafka.place(sent.to_vec()).await.unwrap();
    assert_eq!(
        told(&placing),
        [
            (sent[1].upload_id, true, "kafka has no topic images"),
            (sent[2].upload_id, true, "topic videos has 2 partitions, none with number 2"),
            (sent[3].upload_id, true, "topic videos has 2 partitions, none with number -1"),
            (sent[6].upload_id, true, "kafka has no topic images"),
        ]
    );
    assert_eq!(placing.records, [sent[0].clone(), sent[5].clone()]);
}

#[tokio::test]
async fn a_pointer_for_a_topic_of_kafkas_own_is_refused_and_holds_up_no_other() {
    let (server, kafka) = house(Delivery::AtLeastOnce, "videos", 1).await;
    server.create_topic("__transaction_state", 1).await.unwrap();
    server.create_topic(super::MARKER_TOPIC, 1).await.unwrap();
    let sent = [record("__transaction_state", None), record("videos", None), record(super::MARKER_TOPIC, None)];
    let placing = kafka.place(sent.to_vec()).await.unwrap();
    assert_eq!(placing.records, [sent[1].clone()]);
    let why = told(&placing).into_iter().map(|(_, permanent, why)| (permanent, why.contains("own"))).collect::<Vec<_>>();
    assert_eq!(why, [(true, true), (true, true)]);
}

#[tokio::test]
async fn a_record_for_a_partition_without_a_leader_is_refused_and_what_may_go_elsewhere_goes() {
    let (server, kafka) = house(Delivery::AtLeastOnce, "videos", 3).await;
    server.create_topic("images", 1).await.unwrap();
    server.lead("videos", 1, false).await.unwrap();
    server.lead("images", 0, false).await.unwrap();
    let keyed = |partition| {
        let key = (0..).map(|n| n.to_string()).find(|key| super::place::partition_of(key.as_bytes(), 3) == partition);
        record("videos", key.as_deref())
    };
    let mut sent = vec![record("images", None), keyed(1), Record { partition: Some(1), ..record("videos", None) }];
    let refused = sent.clone();
    sent.extend([keyed(0), keyed(2), Record { partition: Some(2), ..record("videos", None) }]);
    sent.extend((0..20).map(|_| record("videos", None)));
    let placing = kafka.place(sent).await.unwrap();
    assert_eq!(
        told(&placing),
        [
            (refused[0].upload_id, true, "no partition of topic images has a leader"),
            (refused[1].upload_id, true, "partition 1 of topic videos has no leader"),
            (refused[2].upload_id, true, "partition 1 of topic videos has no leader"),
        ]
    );
    let shard = kafka.shard("lfs-broker.test.0", 0).await.unwrap();
    let delivered = shard.publish(1, &placing.records).await.unwrap();
    assert_eq!(delivered.iter().take(3).map(|d| d.partition).collect::<Vec<_>>(), [0, 2, 2]);
    assert_eq!((delivered.len(), delivered.iter().any(|d| d.partition == 1)), (23, false));

    server.lead("videos", 1, true).await.unwrap();
    let deadline = Instant::now() + Duration::from_secs(5);
    while !kafka.place(vec![keyed(1)]).await.unwrap().refused.is_empty() {
        assert!(Instant::now() < deadline, "a leader that is back is not seen");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn a_leader_that_went_is_found_out_by_the_first_record_that_does_not_arrive() {
    let (server, kafka) = house(Delivery::AtLeastOnce, "videos", 1).await;
    let shard = kafka.shard("lfs-broker.test.0", 0).await.unwrap();
    let sent = vec![record("videos", Some("k"))];
    shard.publish(1, &kafka.place(sent.clone()).await.unwrap().records).await.unwrap();
    // The mock cluster does not survive a record for a partition without a leader.
    server.down().await.unwrap();
    let placing = kafka.place(sent.clone()).await.unwrap();
    assert_eq!(placing.records, sent, "what Kafka said a moment ago");
    assert!(matches!(shard.publish(2, &placing.records).await, Err(PublishError::NoMarker(_))));
    server.lead("videos", 0, false).await.unwrap();
    server.up().await.unwrap();
    let deadline = Instant::now() + Duration::from_secs(4);
    while kafka.place(sent.clone()).await.unwrap().refused.is_empty() {
        assert!(Instant::now() < deadline, "what Kafka said is still believed");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn a_record_that_is_too_large_is_refused_and_named() {
    for delivery in [Delivery::ExactlyOnce, Delivery::AtLeastOnce] {
        let (server, kafka) = house(delivery, "videos", 1).await;
        server.create_topic("images", 1).await.unwrap();
        server.create_topic(super::MARKER_TOPIC, 1).await.unwrap();
        let shard = kafka.shard("lfs-broker.test.0", 0).await.unwrap();
        let large = Record { value: vec![b' '; 2_000_000], ..record("images", None) };
        let small = record("videos", None);
        let Err(PublishError::Refused { refused, delivered }) = shard.publish(1, &[small.clone(), large.clone()]).await else {
            panic!("not refused");
        };
        assert_eq!(refused.iter().map(|r| (r.upload_id, r.permanent)).collect::<Vec<_>>(), [(large.upload_id, true)]);
        let delivered: Vec<_> = delivered.iter().map(|delivered| delivered.upload_id).collect();
        match delivery {
            Delivery::ExactlyOnce => assert!(delivered.is_empty()),
            Delivery::AtLeastOnce => assert_eq!(delivered, [small.upload_id]),
        }
        shard.publish(2, &[small]).await.unwrap();
    }
}

#[tokio::test]
async fn a_stopped_kafka_is_noticed_in_time_and_publishing_goes_on_when_it_is_back() {
    let (server, kafka) = house(Delivery::AtLeastOnce, "videos", 1).await;
    let shard = kafka.shard("lfs-broker.test.0", 0).await.unwrap();
    let placing = kafka.place(vec![record("videos", None)]).await.unwrap();
    shard.publish(1, &placing.records).await.unwrap();
    kafka.reachable().await.unwrap();

    server.down().await.unwrap();
    let asked = Instant::now();
    assert!(matches!(kafka.reachable().await, Err(Error::Unreachable(_))));
    assert!(matches!(kafka.partitions("images").await, Err(Error::Unreachable(_))));
    assert!(asked.elapsed() < Duration::from_secs(4), "{:?} for two answers", asked.elapsed());
    kafka.doubt("videos");
    assert_eq!(kafka.partitions("videos").await.unwrap(), Some(1), "a known topic stays known");
    assert!(matches!(shard.publish(2, &[record("videos", None)]).await, Err(PublishError::NoMarker(_))));

    server.up().await.unwrap();
    let back = Instant::now();
    let sent = loop {
        match shard.publish(2, &[record("videos", None)]).await {
            Ok(delivered) => break delivered,
            Err(error) => assert!(back.elapsed() < Duration::from_secs(10), "{error}"),
        }
    };
    assert!(sent[0].offset >= 1);
    // The client that asks has to come back too.
    while let Err(error) = kafka.reachable().await {
        assert!(back.elapsed() < Duration::from_secs(10), "{error}");
    }
}

#[tokio::test]
async fn connecting_does_not_wait_for_kafka() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let settings = settings(format!("127.0.0.1:{port}"), Delivery::ExactlyOnce);
    let started = Instant::now();
    let kafka = Kafka::connect(&settings).unwrap();
    assert!(started.elapsed() < Duration::from_secs(1));
    assert!(matches!(kafka.partitions("videos").await, Err(Error::Unreachable(_))));
    assert!(started.elapsed() < Duration::from_secs(3));
}

#[tokio::test]
async fn a_batch_that_nobody_awaited_leaves_the_shard_unusable() {
    let (_server, kafka) = house(Delivery::AtLeastOnce, "videos", 1).await;
    let shard = kafka.shard("lfs-broker.test.0", 0).await.unwrap();
    let batch = [record("videos", None)];
    {
        let publishing = shard.publish(1, &batch);
        assert!(tokio::time::timeout(Duration::ZERO, publishing).await.is_err());
    }
    assert!(matches!(shard.publish(2, &batch).await, Err(PublishError::Lost(_))));
}

#[tokio::test]
async fn a_transaction_publishes_its_records_and_its_marker() {
    let (server, kafka) = house(Delivery::ExactlyOnce, "videos", 4).await;
    server.create_topic(super::MARKER_TOPIC, 2).await.unwrap();
    let shard = kafka.shard("lfs-broker.test.1", 1).await.unwrap();
    assert_eq!(shard.last_marker().await.unwrap(), None);
    for batch in 1..=3 {
        let sent: Vec<_> = (0..5).map(|_| record("videos", None)).collect();
        let published = shard.publish(batch, &sent).await.unwrap();
        assert_eq!(shard.last_marker().await.unwrap(), Some(super::Marker { batch, published }));
    }
    assert_eq!(kafka.last_marker("lfs-broker.test.0", 1).await.unwrap(), None, "a marker is its shard's");
}

#[tokio::test]
async fn without_transactions_a_batch_leaves_its_number_before_any_of_its_records() {
    let (server, kafka) = house(Delivery::AtLeastOnce, "videos", 1).await;
    let shard = kafka.shard("lfs-broker.test.1", 1).await.unwrap();
    assert_eq!(shard.last_marker().await.unwrap(), None);
    shard.publish(7, &[record("videos", None)]).await.unwrap();
    let marker = |batch| Some(super::Marker { batch, published: Vec::new() });
    assert_eq!(shard.last_marker().await.unwrap(), marker(7));
    // Where the records do not arrive, the number does: some might have.
    let large = Record { value: vec![b' '; 2_000_000], ..record("videos", None) };
    shard.publish(8, &[large]).await.unwrap_err();
    assert_eq!(shard.last_marker().await.unwrap(), marker(8));
    // And where the number does not, nothing is sent: the marker topic has no such partition.
    let shard = kafka.shard("lfs-broker.test.5", 5).await.unwrap();
    assert!(matches!(shard.publish(9, &[record("videos", None)]).await, Err(PublishError::NoMarker(_))));
    let sent = read(&server.bootstrap_servers(), "videos", 0, "read_committed");
    assert_eq!(sent.len(), 1, "a record was sent whose batch Kafka does not know");
}

#[tokio::test]
async fn a_record_that_is_no_marker_is_passed_over() {
    let (server, kafka) = house(Delivery::ExactlyOnce, "videos", 1).await;
    server.create_topic(super::MARKER_TOPIC, 1).await.unwrap();
    let id = "lfs-broker.test.0";
    let shard = kafka.shard(id, 0).await.unwrap();
    let published = shard.publish(1, &[record("videos", None)]).await.unwrap();
    let stranger = super::client::producer(kafka.settings(), None).unwrap();
    for value in [Some(&b"{\"kfs_lfs\":1}"[..]), Some(&b"garbage"[..]), None] {
        let mut garbage = rdkafka::producer::FutureRecord::<str, [u8]>::to(super::MARKER_TOPIC).partition(0).key(id);
        garbage.payload = value;
        stranger.send_result(garbage).unwrap().await.unwrap().unwrap();
    }
    assert_eq!(shard.last_marker().await.unwrap(), Some(super::Marker { batch: 1, published }));
    let published = shard.publish(2, &[record("videos", None)]).await.unwrap();
    assert_eq!(shard.last_marker().await.unwrap(), Some(super::Marker { batch: 2, published }));
}

#[tokio::test]
async fn a_kafka_that_does_not_tell_its_topics_configuration_costs_an_open_no_time() {
    let (server, kafka) = house(Delivery::AtLeastOnce, "videos", 1).await;
    server.create_topic(super::MARKER_TOPIC, 1).await.unwrap();
    kafka.record_limits("videos").await;
    let asked = Instant::now();
    for number in 0..100 {
        assert_eq!(kafka.record_limits(&format!("videos-{number}")).await, super::RecordLimits::default());
    }
    assert!(asked.elapsed() < Duration::from_millis(50), "{:?}", asked.elapsed());
    // The marker topic's policy is not known either, and that is no reason not to begin.
    assert!(!kafka.ensure_marker_topic(1).await.unwrap());
}

#[tokio::test]
async fn a_topic_that_kafka_refuses_in_a_transaction_is_named_and_the_shard_goes_on() {
    let (server, kafka) = house(Delivery::ExactlyOnce, "videos", 1).await;
    server.create_topic("secret", 1).await.unwrap();
    server.create_topic(super::MARKER_TOPIC, 1).await.unwrap();
    let shard = kafka.shard("lfs-broker.test.0", 0).await.unwrap();
    // Both are known to librdkafka before the one is refused.
    shard.publish(1, &[record("videos", None), record("secret", None)]).await.unwrap();
    server.refuse_topic("secret", true).await.unwrap();
    let (good, bad) = (record("videos", None), record("secret", None));
    let Err(PublishError::Refused { refused, .. }) = shard.publish(2, &[good.clone(), bad.clone()]).await else {
        panic!("not refused")
    };
    assert!(refused.iter().all(|refusal| !refusal.permanent && !refusal.whole_topic), "which topic, nobody said: {refused:?}");
    let Err(PublishError::Refused { refused, .. }) = shard.publish(3, &[bad.clone(), record("secret", None)]).await else {
        panic!("not refused")
    };
    assert!(
        refused.iter().all(|refusal| refusal.whole_topic && refusal.reason.contains("TopicAuthorizationFailed")),
        "{refused:?}"
    );
    assert_eq!(refused.len(), 2);
    shard.publish(4, &[good]).await.unwrap();
    server.refuse_topic("secret", false).await.unwrap();
}

#[test]
fn a_property_that_weakens_a_promise_is_refused() {
    let with = |key: &str, value: &str| {
        let mut settings = settings("127.0.0.1:1".into(), Delivery::ExactlyOnce);
        settings.properties = BTreeMap::from([(key.to_owned(), value.to_owned())]);
        Kafka::connect(&settings).err().map(|error| error.to_string())
    };
    let ours = "is set by lfs-broker and cannot be changed";
    for key in ["acks", "request.required.acks", "enable.idempotence", "transactional.id", "partitioner"] {
        assert_eq!(with(key, "1"), Some(format!("kafka property `{key}` {ours}")));
    }
    let limit = "kafka property `transaction.timeout.ms` is 900000, but must be a number from 1 to 60000";
    assert_eq!(with("transaction.timeout.ms", "900000").as_deref(), Some(limit));
    assert!(with("no.such.property", "1").is_some_and(|error| error.contains("no.such.property")));
    assert_eq!(with("compression.type", "zstd"), None);
    assert_eq!(with("delivery.timeout.ms", "3000"), None);
    assert_eq!(with("sasl.mechanism", "SCRAM-SHA-512"), None);
}

#[tokio::test]
async fn a_client_that_found_no_answer_is_not_asked_for_ever() {
    // Nobody listens there.
    let kafka = Kafka::connect(&settings("127.0.0.1:1".into(), Delivery::ExactlyOnce)).unwrap();
    let first = std::sync::Arc::downgrade(&kafka.observer().0);
    let deadline = Instant::now() + Duration::from_secs(30);
    while first.upgrade().is_some() && Instant::now() < deadline {
        assert!(matches!(kafka.reachable().await, Err(Error::Unreachable(_))));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(first.upgrade().is_none(), "the same client is asked again and again");
}

#[tokio::test]
async fn the_check_writes_as_a_shard_does_and_readers_of_committed_records_see_nothing_of_a_transaction() {
    for delivery in [Delivery::ExactlyOnce, Delivery::AtLeastOnce] {
        let (server, kafka) = house(delivery, super::MARKER_TOPIC, 1).await;
        kafka.check(Uuid::nil()).await.unwrap();
        kafka.check(Uuid::nil()).await.unwrap();
        let bootstrap = server.bootstrap_servers();
        let found =
            tokio::task::spawn_blocking(move || read(&bootstrap, super::MARKER_TOPIC, 0, "read_uncommitted")).await.unwrap();
        assert_eq!(found.len(), 2, "{delivery:?}");
        let key = b"lfs-broker.00000000-0000-0000-0000-000000000000.check";
        assert!(found.iter().all(|record| record.key() == Some(key) && record.payload().is_none()), "{delivery:?}");
    }
}

#[tokio::test]
async fn the_check_names_the_addresses_that_cannot_be_reached() {
    let kafka = Kafka::connect(&settings("127.0.0.1:9".to_owned(), Delivery::ExactlyOnce)).unwrap();
    let failed = kafka.check(Uuid::nil()).await.unwrap_err();
    assert_eq!(failed.to_string(), "these Kafka addresses cannot be reached from here: 127.0.0.1:9");
    assert!(!failed.public_reason().contains("127.0.0.1"));
}
