//! Tests that hold for any Kafka; they run on the embedded one. Tests that need a real Kafka are in `real_kafka_tests`.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use lfs_broker_embedded::kafka::Server;
use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::{Headers, Message, OwnedMessage};
use uuid::Uuid;

use super::{Delivery, Error, Kafka, PartitionedBatch, PublishError, Record, RecordMetadata, Settings};

pub(super) fn settings(bootstrap_servers: String, delivery: Delivery) -> Settings {
    // A short timeout, so that tests that wait for it are fast.
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

/// What the marker of a batch lists: the published records, whose positions were not known when it was sent.
pub(super) fn listed(published: &[RecordMetadata]) -> Vec<RecordMetadata> {
    published.iter().map(|record| RecordMetadata { partition: -1, offset: -1, ..*record }).collect()
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
    let mut assignment = rdkafka::TopicPartitionList::new();
    assignment.add_partition_offset(topic, partition, rdkafka::Offset::Beginning).unwrap();
    consumer.assign(&assignment).unwrap();
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

async fn start_kafka(delivery: Delivery, topic: &str, partitions: i32) -> (Server, Kafka) {
    let server = Server::start().unwrap();
    server.create_topic(topic, partitions).await.unwrap();
    server.create_topic(super::MARKER_TOPIC, 2).await.unwrap();
    let kafka = Kafka::connect(&settings(server.bootstrap_servers(), delivery)).unwrap();
    (server, kafka)
}

#[tokio::test]
async fn a_record_is_published_with_its_partition_key_value_headers_and_timestamp() {
    let (server, kafka) = start_kafka(Delivery::AtLeastOnce, "videos", 2).await;
    let producer = kafka.open_producer("lfs-broker.test.0", 0).await.unwrap();
    let sent = [
        Record { partition: Some(1), ..record("videos", Some("k")) },
        Record { partition: Some(1), ..record("videos", None) },
        Record { partition: Some(1), ..record("videos", Some("")) },
    ];
    let before = super::shard::now_ms();
    let delivered = producer.publish(1, &sent).await.unwrap();
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
async fn a_key_gets_the_same_partition_as_from_javas_default_partitioner() {
    const PARTITIONS: i32 = 7;
    let (_server, kafka) = start_kafka(Delivery::AtLeastOnce, "videos", PARTITIONS).await;
    let producer = kafka.open_producer("lfs-broker.test.0", 0).await.unwrap();
    // The hashes come from the tests of Java's `Utils.murmur2`.
    let known = [
        ("21", -973_932_308_i32),
        ("foobar", -790_332_482),
        ("a-little-bit-long-string", -985_981_536),
        ("a-little-bit-longer-string", -1_486_304_829),
    ];
    for (key, hash) in known {
        let delivered = producer.publish(1, &[record("videos", Some(key))]).await.unwrap();
        assert_eq!(delivered[0].partition, (hash & 0x7fff_ffff) % PARTITIONS, "{key}");
        assert_eq!(super::partitioner::partition_of(key.as_bytes(), PARTITIONS), delivered[0].partition, "{key}");
    }
    // `partition_of` agrees with librdkafka for keys of any length and with any bytes.
    for length in 0..20 {
        let key: Vec<u8> = (0..length).map(|at| 255 - at * 7).collect();
        let sent = Record { key: Some(key.clone()), ..record("videos", None) };
        let delivered = producer.publish(1, &[sent]).await.unwrap();
        assert_eq!(super::partitioner::partition_of(&key, PARTITIONS), delivered[0].partition, "{key:?}");
    }
}

#[tokio::test]
async fn a_metadata_query_does_not_create_the_topic() {
    let (_server, kafka) = start_kafka(Delivery::AtLeastOnce, "videos", 3).await;
    assert_eq!(kafka.partition_count("videos").await.unwrap(), Some(3));
    assert_eq!(kafka.partition_count("images").await.unwrap(), None);
    kafka.invalidate_topic("images");
    assert_eq!(kafka.partition_count("images").await.unwrap(), None, "the query must not create the topic");
}

#[tokio::test]
async fn a_new_topic_is_found_before_the_metadata_of_known_topics_expires() {
    let (server, kafka) = start_kafka(Delivery::AtLeastOnce, "videos", 1).await;
    assert_eq!(kafka.partition_count("images").await.unwrap(), None);
    server.create_topic("images", 2).await.unwrap();
    let deadline = Instant::now() + super::topics::CACHE_TTL;
    while kafka.partition_count("images").await.unwrap() != Some(2) {
        assert!(Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn in_dev_a_topic_is_created_on_first_use() {
    let server = Server::start().unwrap();
    server.create_topic(super::MARKER_TOPIC, 1).await.unwrap();
    let settings = Settings { create_topics: true, ..settings(server.bootstrap_servers(), Delivery::AtLeastOnce) };
    let kafka = Kafka::connect(&settings).unwrap();
    assert_eq!(kafka.partition_count("images").await.unwrap(), Some(4));
    let producer = kafka.open_producer("lfs-broker.test.0", 0).await.unwrap();
    let batch = kafka.assign_partitions(vec![record("images", None), record("audio", None)]).await.unwrap();
    assert_eq!(producer.publish(1, &batch.records).await.unwrap().len(), 2);
}

/// The rejected records: upload id, whether the rejection is permanent, and the reason.
fn rejections(batch: &PartitionedBatch) -> Vec<(Uuid, bool, &str)> {
    batch.rejected.iter().map(|rejection| (rejection.upload_id, rejection.permanent, rejection.reason.as_str())).collect()
}

#[tokio::test]
async fn a_record_for_a_missing_topic_or_partition_is_rejected_permanently_and_blocks_only_its_key() {
    let (_server, kafka) = start_kafka(Delivery::AtLeastOnce, "videos", 2).await;
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
    let batch = kafka.assign_partitions(sent.to_vec()).await.unwrap();
    assert_eq!(
        rejections(&batch),
        [
            (sent[1].upload_id, true, "kafka has no topic images"),
            (sent[2].upload_id, true, "topic videos has 2 partitions, none with number 2"),
            (sent[3].upload_id, true, "topic videos has 2 partitions, none with number -1"),
            (sent[6].upload_id, true, "kafka has no topic images"),
        ]
    );
    assert_eq!(batch.records, [sent[0].clone(), sent[5].clone()]);
}

#[tokio::test]
async fn a_pointer_for_an_internal_topic_is_rejected_and_blocks_no_other_record() {
    let (server, kafka) = start_kafka(Delivery::AtLeastOnce, "videos", 1).await;
    server.create_topic("__transaction_state", 1).await.unwrap();
    server.create_topic(super::MARKER_TOPIC, 1).await.unwrap();
    let sent = [record("__transaction_state", None), record("videos", None), record(super::MARKER_TOPIC, None)];
    let batch = kafka.assign_partitions(sent.to_vec()).await.unwrap();
    assert_eq!(batch.records, [sent[1].clone()]);
    let rejections = rejections(&batch).into_iter().map(|(_, permanent, reason)| (permanent, reason.contains("is internal")));
    assert_eq!(rejections.collect::<Vec<_>>(), [(true, true), (true, true)]);
}

#[tokio::test]
async fn a_record_for_a_partition_without_a_leader_is_rejected_and_records_without_a_key_go_to_other_partitions() {
    let (server, kafka) = start_kafka(Delivery::AtLeastOnce, "videos", 3).await;
    server.create_topic("images", 1).await.unwrap();
    server.set_leader("videos", 1, false).await.unwrap();
    server.set_leader("images", 0, false).await.unwrap();
    let keyed = |partition| {
        let key = (0..).map(|n| n.to_string()).find(|key| super::partitioner::partition_of(key.as_bytes(), 3) == partition);
        record("videos", key.as_deref())
    };
    let mut sent = vec![record("images", None), keyed(1), Record { partition: Some(1), ..record("videos", None) }];
    let rejected = sent.clone();
    sent.extend([keyed(0), keyed(2), Record { partition: Some(2), ..record("videos", None) }]);
    sent.extend((0..20).map(|_| record("videos", None)));
    let batch = kafka.assign_partitions(sent).await.unwrap();
    assert_eq!(
        rejections(&batch),
        [
            (rejected[0].upload_id, true, "no partition of topic images has a leader"),
            (rejected[1].upload_id, true, "partition 1 of topic videos has no leader"),
            (rejected[2].upload_id, true, "partition 1 of topic videos has no leader"),
        ]
    );
    let producer = kafka.open_producer("lfs-broker.test.0", 0).await.unwrap();
    let delivered = producer.publish(1, &batch.records).await.unwrap();
    assert_eq!(delivered.iter().take(3).map(|d| d.partition).collect::<Vec<_>>(), [0, 2, 2]);
    assert_eq!((delivered.len(), delivered.iter().any(|d| d.partition == 1)), (23, false));

    server.set_leader("videos", 1, true).await.unwrap();
    let deadline = Instant::now() + super::topics::CACHE_TTL;
    while !kafka.assign_partitions(vec![keyed(1)]).await.unwrap().rejected.is_empty() {
        assert!(Instant::now() < deadline, "the new leader is not found");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn a_missing_leader_is_detected_after_the_first_failed_publish() {
    let (server, kafka) = start_kafka(Delivery::AtLeastOnce, "videos", 1).await;
    let producer = kafka.open_producer("lfs-broker.test.0", 0).await.unwrap();
    let sent = vec![record("videos", Some("k"))];
    producer.publish(1, &kafka.assign_partitions(sent.clone()).await.unwrap().records).await.unwrap();
    // The mock cluster crashes on a record for a partition without a leader, so it is stopped first.
    server.down().await.unwrap();
    let batch = kafka.assign_partitions(sent.clone()).await.unwrap();
    assert_eq!(batch.records, sent, "the cached metadata is used");
    assert!(matches!(producer.publish(2, &batch.records).await, Err(PublishError::MarkerNotWritten(_))));
    server.set_leader("videos", 0, false).await.unwrap();
    server.up().await.unwrap();
    let deadline = Instant::now() + super::topics::CACHE_TTL;
    while kafka.assign_partitions(sent.clone()).await.unwrap().rejected.is_empty() {
        assert!(Instant::now() < deadline, "the outdated metadata is still used");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn a_record_that_is_too_large_is_rejected_with_its_upload_id() {
    for delivery in [Delivery::ExactlyOnce, Delivery::AtLeastOnce] {
        let (server, kafka) = start_kafka(delivery, "videos", 1).await;
        server.create_topic("images", 1).await.unwrap();
        server.create_topic(super::MARKER_TOPIC, 1).await.unwrap();
        let producer = kafka.open_producer("lfs-broker.test.0", 0).await.unwrap();
        let large = Record { value: vec![b' '; 2_000_000], ..record("images", None) };
        let small = record("videos", None);
        let Err(PublishError::Rejected { rejected, delivered }) = producer.publish(1, &[small.clone(), large.clone()]).await
        else {
            panic!("not rejected");
        };
        assert_eq!(rejected.iter().map(|r| (r.upload_id, r.permanent)).collect::<Vec<_>>(), [(large.upload_id, true)]);
        let delivered: Vec<_> = delivered.iter().map(|delivered| delivered.upload_id).collect();
        match delivery {
            Delivery::ExactlyOnce => assert!(delivered.is_empty()),
            Delivery::AtLeastOnce => assert_eq!(delivered, [small.upload_id]),
        }
        producer.publish(2, &[small]).await.unwrap();
    }
}

#[tokio::test]
async fn a_stopped_kafka_is_detected_and_publishing_continues_after_its_restart() {
    let (server, kafka) = start_kafka(Delivery::AtLeastOnce, "videos", 1).await;
    let producer = kafka.open_producer("lfs-broker.test.0", 0).await.unwrap();
    let batch = kafka.assign_partitions(vec![record("videos", None)]).await.unwrap();
    producer.publish(1, &batch.records).await.unwrap();
    kafka.reachable().await.unwrap();

    server.down().await.unwrap();
    let stopped = Instant::now();
    assert!(matches!(kafka.reachable().await, Err(Error::Unreachable(_))));
    assert!(matches!(kafka.partition_count("images").await, Err(Error::Unreachable(_))));
    // Without the broker's own timeout of 1.5 s librdkafka would wait for a minute.
    assert!(stopped.elapsed() < Duration::from_secs(20), "{:?} for two answers", stopped.elapsed());
    kafka.invalidate_topic("videos");
    assert_eq!(kafka.partition_count("videos").await.unwrap(), Some(1), "the cached metadata is used");
    assert!(matches!(producer.publish(2, &[record("videos", None)]).await, Err(PublishError::MarkerNotWritten(_))));

    server.up().await.unwrap();
    let restarted = Instant::now();
    let sent = loop {
        match producer.publish(2, &[record("videos", None)]).await {
            Ok(delivered) => break delivered,
            Err(error) => assert!(restarted.elapsed() < Duration::from_secs(60), "{error}"),
        }
    };
    assert!(sent[0].offset >= 1);
    // The metadata client must recover too.
    while let Err(error) = kafka.reachable().await {
        assert!(restarted.elapsed() < Duration::from_secs(60), "{error}");
    }
}

#[tokio::test]
async fn connect_returns_without_waiting_for_kafka() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let settings = settings(format!("127.0.0.1:{port}"), Delivery::ExactlyOnce);
    let started = Instant::now();
    let kafka = Kafka::connect(&settings).unwrap();
    // A request to Kafka would take until its timeout.
    assert!(started.elapsed() < super::REQUEST_TIMEOUT, "{:?}", started.elapsed());
    assert!(matches!(kafka.partition_count("videos").await, Err(Error::Unreachable(_))));
    assert!(started.elapsed() < Duration::from_secs(20), "{:?} instead of {:?}", started.elapsed(), super::REQUEST_TIMEOUT);
}

#[tokio::test]
async fn a_batch_that_is_dropped_before_its_end_leaves_the_producer_unusable() {
    let (_server, kafka) = start_kafka(Delivery::AtLeastOnce, "videos", 1).await;
    let producer = kafka.open_producer("lfs-broker.test.0", 0).await.unwrap();
    let batch = [record("videos", None)];
    {
        let publishing = producer.publish(1, &batch);
        assert!(tokio::time::timeout(Duration::ZERO, publishing).await.is_err());
    }
    assert!(matches!(producer.publish(2, &batch).await, Err(PublishError::OutcomeUnknown(_))));
}

#[tokio::test]
async fn a_transaction_publishes_its_records_and_its_marker() {
    let (server, kafka) = start_kafka(Delivery::ExactlyOnce, "videos", 4).await;
    server.create_topic(super::MARKER_TOPIC, 2).await.unwrap();
    let producer = kafka.open_producer("lfs-broker.test.1", 1).await.unwrap();
    assert_eq!(producer.last_marker().await.unwrap(), None);
    for batch in 1..=3 {
        let sent: Vec<_> = (0..5).map(|_| record("videos", None)).collect();
        let published = producer.publish(batch, &sent).await.unwrap();
        let marker = super::Marker { batch, published: listed(&published) };
        assert_eq!(producer.last_marker().await.unwrap(), Some(marker));
    }
    // The marker contains a partition that was known before the records were sent.
    let published = producer.publish(4, &[Record { partition: Some(3), ..record("videos", None) }]).await.unwrap();
    let marker = producer.last_marker().await.unwrap().unwrap();
    assert_eq!(marker.published, [RecordMetadata { offset: -1, ..published[0] }]);
    assert_eq!(marker.published[0].partition, 3);
    assert_eq!(kafka.last_marker("lfs-broker.test.0", 1).await.unwrap(), None, "the marker belongs to another shard");
}

#[tokio::test]
async fn without_transactions_the_marker_of_a_batch_is_written_before_its_records() {
    let (server, kafka) = start_kafka(Delivery::AtLeastOnce, "videos", 1).await;
    let producer = kafka.open_producer("lfs-broker.test.1", 1).await.unwrap();
    assert_eq!(producer.last_marker().await.unwrap(), None);
    producer.publish(7, &[record("videos", None)]).await.unwrap();
    let marker = |batch| Some(super::Marker { batch, published: Vec::new() });
    assert_eq!(producer.last_marker().await.unwrap(), marker(7));
    // If the records are not published, the marker still is, because some record might have been published.
    let large = Record { value: vec![b' '; 2_000_000], ..record("videos", None) };
    producer.publish(8, &[large]).await.unwrap_err();
    assert_eq!(producer.last_marker().await.unwrap(), marker(8));
    // If the marker cannot be written, no record is sent. Here the marker topic lacks the partition.
    let producer = kafka.open_producer("lfs-broker.test.5", 5).await.unwrap();
    assert!(matches!(producer.publish(9, &[record("videos", None)]).await, Err(PublishError::MarkerNotWritten(_))));
    let sent = read(&server.bootstrap_servers(), "videos", 0, "read_committed");
    assert_eq!(sent.len(), 1, "no record may be sent without the marker of its batch");
}

#[tokio::test]
async fn a_record_in_the_marker_topic_that_is_not_a_marker_is_skipped() {
    let (server, kafka) = start_kafka(Delivery::ExactlyOnce, "videos", 1).await;
    server.create_topic(super::MARKER_TOPIC, 1).await.unwrap();
    let id = "lfs-broker.test.0";
    let producer = kafka.open_producer(id, 0).await.unwrap();
    let published = producer.publish(1, &[record("videos", None)]).await.unwrap();
    let other_producer = super::producer::connect(kafka.settings(), None).unwrap();
    for value in [Some(&b"{\"kfs_lfs\":1}"[..]), Some(&b"garbage"[..]), None] {
        let mut garbage = rdkafka::producer::FutureRecord::<str, [u8]>::to(super::MARKER_TOPIC).partition(0).key(id);
        garbage.payload = value;
        super::producer::send(&other_producer, garbage).unwrap().await.unwrap().unwrap();
    }
    assert_eq!(producer.last_marker().await.unwrap(), Some(super::Marker { batch: 1, published: listed(&published) }));
    let published = producer.publish(2, &[record("videos", None)]).await.unwrap();
    assert_eq!(producer.last_marker().await.unwrap(), Some(super::Marker { batch: 2, published: listed(&published) }));
}

#[tokio::test]
async fn a_kafka_without_topic_configurations_does_not_delay_the_opening_of_uploads() {
    let (server, kafka) = start_kafka(Delivery::AtLeastOnce, "videos", 1).await;
    server.create_topic(super::MARKER_TOPIC, 1).await.unwrap();
    kafka.record_limits("videos").await;
    let started = Instant::now();
    for number in 0..100 {
        assert_eq!(kafka.record_limits(&format!("videos-{number}")).await, super::RecordLimits::default());
    }
    // A hundred queries that wait for their timeout of 300 ms would take 30 s.
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
    // The cleanup policy of the marker topic is unknown too, and the relay starts anyway.
    assert!(!kafka.ensure_marker_topic(1).await.unwrap());
}

#[tokio::test]
async fn a_topic_that_kafka_rejects_in_a_transaction_is_reported_and_the_producer_stays_usable() {
    let (server, kafka) = start_kafka(Delivery::ExactlyOnce, "videos", 1).await;
    server.create_topic("secret", 1).await.unwrap();
    server.create_topic(super::MARKER_TOPIC, 1).await.unwrap();
    let producer = kafka.open_producer("lfs-broker.test.0", 0).await.unwrap();
    // librdkafka must know both topics before Kafka rejects one.
    producer.publish(1, &[record("videos", None), record("secret", None)]).await.unwrap();
    server.refuse_topic("secret", true).await.unwrap();
    let (good, bad) = (record("videos", None), record("secret", None));
    let Err(PublishError::Rejected { rejected, .. }) = producer.publish(2, &[good.clone(), bad.clone()]).await else {
        panic!("not rejected")
    };
    assert!(
        rejected.iter().all(|rejection| !rejection.permanent && !rejection.whole_topic),
        "librdkafka does not name the topic: {rejected:?}"
    );
    let Err(PublishError::Rejected { rejected, .. }) = producer.publish(3, &[bad.clone(), record("secret", None)]).await else {
        panic!("not rejected")
    };
    assert!(
        rejected.iter().all(|rejection| rejection.whole_topic && rejection.reason.contains("TopicAuthorizationFailed")),
        "{rejected:?}"
    );
    assert_eq!(rejected.len(), 2);
    producer.publish(4, &[good]).await.unwrap();
    server.refuse_topic("secret", false).await.unwrap();
}

#[tokio::test]
async fn a_marker_that_kafka_rejects_is_reported_and_no_record_is() {
    let (server, kafka) = start_kafka(Delivery::ExactlyOnce, "videos", 1).await;
    let mut producer = kafka.open_producer("lfs-broker.test.0", 0).await.unwrap();
    producer.publish(1, &[record("videos", None)]).await.unwrap();
    server.refuse_topic(super::MARKER_TOPIC, true).await.unwrap();
    let failed = producer.publish(2, &[record("videos", None)]).await;
    let Err(PublishError::MarkerNotWritten(reason)) = &failed else { panic!("{failed:?}") };
    assert!(reason.contains(super::MARKER_TOPIC), "{reason}");
    server.refuse_topic(super::MARKER_TOPIC, false).await.unwrap();
    if producer.needs_replacement() {
        producer = kafka.open_producer("lfs-broker.test.0", 0).await.unwrap();
    }
    producer.publish(3, &[record("videos", None)]).await.unwrap();
}

#[test]
fn a_property_that_delivery_depends_on_is_rejected() {
    let with = |key: &str, value: &str| {
        let mut settings = settings("127.0.0.1:1".into(), Delivery::ExactlyOnce);
        settings.properties = BTreeMap::from([(key.to_owned(), value.to_owned())]);
        Kafka::connect(&settings).err().map(|error| error.to_string())
    };
    let reserved = "is set by lfs-broker and cannot be changed";
    for key in ["acks", "request.required.acks", "enable.idempotence", "transactional.id", "partitioner"] {
        assert_eq!(with(key, "1"), Some(format!("kafka property `{key}` {reserved}")));
    }
    let limit = "kafka property `transaction.timeout.ms` is 900000, but must be a number from 1 to 60000";
    assert_eq!(with("transaction.timeout.ms", "900000").as_deref(), Some(limit));
    assert!(with("no.such.property", "1").is_some_and(|error| error.contains("no.such.property")));
    assert_eq!(with("compression.type", "zstd"), None);
    assert_eq!(with("delivery.timeout.ms", "3000"), None);
    assert_eq!(with("sasl.mechanism", "SCRAM-SHA-512"), None);
}

#[tokio::test]
async fn a_metadata_client_without_an_answer_is_replaced() {
    // No server listens on this port.
    let kafka = Kafka::connect(&settings("127.0.0.1:1".into(), Delivery::ExactlyOnce)).unwrap();
    let first = std::sync::Arc::downgrade(&kafka.metadata_client().0);
    let deadline = Instant::now() + Duration::from_secs(30);
    while first.upgrade().is_some() && Instant::now() < deadline {
        assert!(matches!(kafka.reachable().await, Err(Error::Unreachable(_))));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(first.upgrade().is_none(), "the first client is still used");
}

#[tokio::test]
async fn the_readiness_check_writes_tombstones_to_the_marker_topic() {
    for delivery in [Delivery::ExactlyOnce, Delivery::AtLeastOnce] {
        let (server, kafka) = start_kafka(delivery, super::MARKER_TOPIC, 1).await;
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
async fn the_readiness_check_lists_unreachable_addresses_but_not_in_its_public_reason() {
    let kafka = Kafka::connect(&settings("127.0.0.1:9".to_owned(), Delivery::ExactlyOnce)).unwrap();
    let failed = kafka.check(Uuid::nil()).await.unwrap_err();
    assert_eq!(failed.to_string(), "these addresses in KAFKA_BOOTSTRAP_SERVERS cannot be reached from here: 127.0.0.1:9");
    assert_eq!(failed.public_reason(), "an address in KAFKA_BOOTSTRAP_SERVERS cannot be reached; the log contains it");
}
