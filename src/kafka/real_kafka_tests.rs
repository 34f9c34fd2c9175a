//! Tests of exactly-once delivery on a real Kafka. The embedded Kafka accepts transactions but does not implement them.
//! Run with `LFS_TEST_KAFKA=HOST:PORT` and `--ignored`.

use std::collections::BTreeMap;
use std::time::Instant;

use rdkafka::admin::{NewTopic, TopicReplication};
use rdkafka::message::Message;
use rdkafka::producer::{FutureRecord, Producer};
use uuid::Uuid;

use super::tests::{listed, read, record, settings};
use super::{Delivery, Kafka, Marker, PublishError, Record, Settings};

fn server() -> String {
    std::env::var("LFS_TEST_KAFKA").expect("LFS_TEST_KAFKA names a real Kafka, as HOST:PORT")
}

/// Creates a topic with four partitions for one test, its transactional id, and the marker topic.
async fn create_topics() -> (Kafka, String, String) {
    let name = Uuid::now_v7().simple().to_string();
    let kafka = Kafka::connect(&settings(server(), Delivery::ExactlyOnce)).unwrap();
    kafka.create_topic(NewTopic::new(&name, 4, TopicReplication::Fixed(1))).await.unwrap();
    kafka.ensure_marker_topic(4).await.unwrap();
    (kafka, name.clone(), format!("lfs-broker.{name}.0"))
}

/// The upload ids in a topic, as a consumer with this isolation level sees them.
async fn upload_ids(topic: &str, isolation: &'static str) -> Vec<Uuid> {
    let topic = topic.to_owned();
    let read_all = move || {
        let records = (0..4).flat_map(|partition| read(&server(), &topic, partition, isolation));
        records.map(|record| Uuid::parse_str(std::str::from_utf8(record.payload().unwrap()).unwrap()).unwrap()).collect()
    };
    tokio::task::spawn_blocking(read_all).await.unwrap()
}

fn pointer(topic: &str) -> Record {
    let record = record(topic, None);
    Record { value: record.upload_id.to_string().into_bytes(), ..record }
}

fn sorted_ids(records: &[Record]) -> Vec<Uuid> {
    let mut ids: Vec<_> = records.iter().map(|record| record.upload_id).collect();
    ids.sort();
    ids
}

async fn committed_ids(topic: &str) -> Vec<Uuid> {
    let mut found = upload_ids(topic, "read_committed").await;
    found.sort();
    found
}

#[tokio::test]
#[ignore = "needs a real Kafka: .ci/run runs it"]
async fn a_batch_is_published_with_its_marker() {
    let (kafka, topic, id) = create_topics().await;
    let producer = kafka.open_producer(&id, 0).await.unwrap();
    assert_eq!(producer.last_marker().await.unwrap(), None);
    let sent: Vec<_> = (0..500).map(|_| pointer(&topic)).collect();
    let published = producer.publish(7, &sent).await.unwrap();
    assert_eq!(producer.last_marker().await.unwrap(), Some(Marker { batch: 7, published: listed(&published) }));
    assert_eq!(committed_ids(&topic).await, sorted_ids(&sent));
    for delivered in [&published[0], &published[499]] {
        let (topic, partition) = (topic.clone(), delivered.partition);
        let found = tokio::task::spawn_blocking(move || read(&server(), &topic, partition, "read_committed"));
        let found = found.await.unwrap().into_iter().find(|record| record.offset() == delivered.offset).unwrap();
        assert_eq!(found.payload(), Some(delivered.upload_id.to_string().as_bytes()));
        assert_eq!(found.timestamp().to_millis(), Some(delivered.timestamp_ms));
    }
}

#[tokio::test]
#[ignore = "needs a real Kafka: .ci/run runs it"]
async fn an_aborted_batch_publishes_nothing_and_keeps_the_last_marker() {
    let (kafka, topic, id) = create_topics().await;
    let producer = kafka.open_producer(&id, 1).await.unwrap();
    let first = [pointer(&topic)];
    let published = producer.publish(1, &first).await.unwrap();
    let marker = Marker { batch: 1, published: listed(&published) };

    // librdkafka rejects the large record after the other record was sent, so the transaction is aborted.
    let large = Record { value: vec![b' '; 2_000_000], ..pointer(&topic) };
    for batch in 2..=4 {
        let rejected = producer.publish(batch, &[pointer(&topic), large.clone()]).await;
        assert!(matches!(rejected, Err(PublishError::Rejected { delivered, .. }) if delivered.is_empty()));
        assert_eq!(producer.last_marker().await.unwrap(), Some(marker.clone()));
    }
    assert_eq!(committed_ids(&topic).await, sorted_ids(&first));

    // Write 300 markers of aborted batches, with their control records, to the end of the log.
    let settings = kafka.settings().clone();
    drop(producer);
    tokio::task::spawn_blocking({
        let id = id.clone();
        move || {
            let producer = super::producer::connect(&settings, Some(&id)).unwrap();
            producer.init_transactions(super::REQUEST_TIMEOUT * 10).unwrap();
            for batch in 100..400 {
                producer.begin_transaction().unwrap();
                let value = serde_json::to_vec(&Marker { batch, published: Vec::new() }).unwrap();
                let record = FutureRecord::to(super::MARKER_TOPIC).partition(1).key(&id).payload(&value);
                let delivery = super::producer::send(&producer, record).unwrap();
                tokio::runtime::Handle::current().block_on(delivery).unwrap().unwrap();
                producer.abort_transaction(super::REQUEST_TIMEOUT).unwrap();
            }
        }
    })
    .await
    .unwrap();
    let producer = kafka.open_producer(&id, 1).await.unwrap();
    assert_eq!(producer.last_marker().await.unwrap(), Some(marker));
    producer.publish(401, &[]).await.unwrap();
    assert_eq!(producer.last_marker().await.unwrap(), Some(Marker { batch: 401, published: Vec::new() }));
}

#[tokio::test]
#[ignore = "needs a real Kafka: .ci/run runs it"]
async fn a_new_owner_fences_the_previous_owner_and_reads_its_last_marker() {
    let (kafka, topic, id) = create_topics().await;
    let zombie = kafka.open_producer(&id, 2).await.unwrap();
    let first = [pointer(&topic)];
    let published = zombie.publish(1, &first).await.unwrap();

    let owner = kafka.open_producer(&id, 2).await.unwrap();
    assert_eq!(owner.last_marker().await.unwrap(), Some(Marker { batch: 1, published: listed(&published) }));
    let fenced = zombie.publish(2, &[pointer(&topic)]).await;
    assert!(matches!(fenced, Err(PublishError::Fenced(_))), "{fenced:?}");
    let again = zombie.publish(3, &[pointer(&topic)]).await;
    assert!(matches!(again, Err(PublishError::OutcomeUnknown(_))), "{again:?}");

    let second = [pointer(&topic)];
    let published = owner.publish(2, &second).await.unwrap();
    assert_eq!(owner.last_marker().await.unwrap(), Some(Marker { batch: 2, published: listed(&published) }));
    assert_eq!(committed_ids(&topic).await, sorted_ids(&[first, second].concat()));
}

#[tokio::test]
#[ignore = "needs a real Kafka: .ci/run runs it"]
async fn a_transaction_left_open_is_aborted_by_the_next_owner() {
    let (kafka, topic, id) = create_topics().await;
    let (settings, left, id_of_dead) = (kafka.settings().clone(), pointer(&topic), id.clone());
    // A record and its marker are acknowledged but never committed, as after a kill -9.
    let dead = tokio::task::spawn_blocking(move || {
        let producer = super::producer::connect(&settings, Some(&id_of_dead)).unwrap();
        producer.init_transactions(super::REQUEST_TIMEOUT * 10).unwrap();
        producer.begin_transaction().unwrap();
        let record = FutureRecord::<(), _>::to(&left.topic).payload(&left.value);
        drop(super::producer::send(&producer, record).unwrap());
        let value = serde_json::to_vec(&Marker { batch: 1, published: Vec::new() }).unwrap();
        let marker = FutureRecord::to(super::MARKER_TOPIC).partition(3).key(&id_of_dead).payload(&value);
        drop(super::producer::send(&producer, marker).unwrap());
        producer.flush(super::REQUEST_TIMEOUT * 5).unwrap();
        producer
    })
    .await
    .unwrap();

    let opened = Instant::now();
    let owner = kafka.open_producer(&id, 3).await.unwrap();
    assert_eq!(owner.last_marker().await.unwrap(), None);
    // A takeover that waits for the open transaction takes until its timeout of a minute.
    assert!(opened.elapsed().as_secs() < 40, "the takeover took {:?}", opened.elapsed());
    let sent = [pointer(&topic)];
    owner.publish(2, &sent).await.unwrap();
    assert_eq!(committed_ids(&topic).await, sorted_ids(&sent));
    assert_eq!(upload_ids(&topic, "read_uncommitted").await.len(), 2);
    super::drop_blocking(dead);
}

#[tokio::test]
#[ignore = "needs a real Kafka: .ci/run runs it"]
async fn reading_the_last_marker_waits_for_an_open_transaction_of_another_producer() {
    let (kafka, topic, id) = create_topics().await;
    // Only this test uses this partition, because the open transaction would delay other tests.
    let partition = 0;
    let (settings, other_id) = (kafka.settings().clone(), format!("{id}.other"));
    let other = tokio::task::spawn_blocking(move || {
        let producer = super::producer::connect(&settings, Some(&other_id)).unwrap();
        producer.init_transactions(super::REQUEST_TIMEOUT * 10).unwrap();
        producer.begin_transaction().unwrap();
        let record = FutureRecord::to(super::MARKER_TOPIC).partition(partition).key(&other_id).payload("{}");
        drop(super::producer::send(&producer, record).unwrap());
        producer.flush(super::REQUEST_TIMEOUT * 5).unwrap();
        producer
    })
    .await
    .unwrap();

    let producer = kafka.open_producer(&id, partition).await.unwrap();
    let published = producer.publish(1, &[pointer(&topic)]).await.unwrap();
    let mut waiting = Box::pin(producer.last_marker());
    let early = tokio::time::timeout(super::REQUEST_TIMEOUT, &mut waiting).await;
    assert!(early.is_err(), "the answer {early:?} came while a record could not be read");
    let ended = tokio::task::spawn_blocking(move || {
        other.commit_transaction(super::REQUEST_TIMEOUT * 5).unwrap();
        other
    });
    assert_eq!(waiting.await.unwrap(), Some(Marker { batch: 1, published: listed(&published) }));
    super::drop_blocking(ended.await.unwrap());
}

#[tokio::test]
#[ignore = "needs a real Kafka: .ci/run runs it"]
async fn a_record_larger_than_its_topic_allows_is_rejected_permanently_only_when_sent_alone() {
    let (kafka, _, id) = create_topics().await;
    let topic = format!("small-{}", Uuid::now_v7().simple());
    let new = NewTopic::new(&topic, 1, TopicReplication::Fixed(1));
    kafka.create_topic(new.set("max.message.bytes", "2000")).await.unwrap();
    let producer = kafka.open_producer(&id, 2).await.unwrap();
    let large = Record { value: vec![b' '; 5000], ..pointer(&topic) };
    let small = pointer(&topic);

    // Kafka validates records that are sent together as one batch, so no record is certainly at fault.
    let Err(PublishError::Rejected { rejected, .. }) = producer.publish(1, &[small.clone(), large.clone()]).await else {
        panic!("not rejected")
    };
    assert!(rejected.iter().any(|rejection| rejection.upload_id == large.upload_id));
    assert!(rejected.iter().all(|rejection| !rejection.permanent));
    let Err(PublishError::Rejected { rejected, .. }) = producer.publish(2, &[large]).await else { panic!("not rejected") };
    assert!(rejected[0].permanent && rejected[0].reason.contains("too large"), "{rejected:?}");
    // librdkafka counts the rejected record as sent. It detects this in the next transaction and gets a new epoch.
    for batch in 3..6 {
        match producer.publish(batch, std::slice::from_ref(&small)).await {
            Err(PublishError::Retry(_)) if batch < 5 => {}
            published => return drop(published.unwrap()),
        }
    }
}

#[tokio::test]
#[ignore = "needs a real Kafka: .ci/run runs it"]
async fn a_metadata_query_does_not_create_a_topic_even_if_kafka_creates_topics_on_first_use() {
    let kafka = Kafka::connect(&settings(server(), Delivery::ExactlyOnce)).unwrap();
    let topic = format!("never-{}", Uuid::now_v7().simple());
    for _ in 0..3 {
        assert_eq!(kafka.partition_count(&topic).await.unwrap(), None);
        kafka.invalidate_topic(&topic);
    }
    assert_eq!(kafka.partition_count("no such topic!").await.unwrap(), None);
    kafka.ensure_marker_topic(4).await.unwrap();
    let too_many = kafka.ensure_marker_topic(1000).await;
    assert!(matches!(too_many, Err(super::Error::MarkerPartitions { wanted: 1000, .. })), "{too_many:?}");
}

#[tokio::test]
#[ignore = "needs a real Kafka: .ci/run runs it"]
async fn in_dev_a_topic_of_a_real_kafka_is_created_on_first_use() {
    let settings = Settings { create_topics: true, ..settings(server(), Delivery::ExactlyOnce) };
    let kafka = Kafka::connect(&settings).unwrap();
    let topic = format!("first-{}", Uuid::now_v7().simple());
    assert!(kafka.partition_count(&topic).await.unwrap().is_some_and(|partitions| partitions > 0));
}

#[tokio::test]
#[ignore = "needs a real Kafka: .ci/run runs it"]
async fn without_transactions_a_new_owner_reads_the_number_of_the_last_batch() {
    let (_, topic, id) = create_topics().await;
    let settings = Settings { properties: BTreeMap::new(), ..settings(server(), Delivery::AtLeastOnce) };
    let kafka = Kafka::connect(&settings).unwrap();
    let producer = kafka.open_producer(&id, 0).await.unwrap();
    let sent: Vec<_> = (0..100).map(|_| pointer(&topic)).collect();
    producer.publish(1, &sent).await.unwrap();
    let marker = Some(Marker { batch: 1, published: Vec::new() });
    assert_eq!(kafka.open_producer(&id, 0).await.unwrap().last_marker().await.unwrap(), marker);
    assert_eq!(committed_ids(&topic).await, sorted_ids(&sent));
}

/// A Kafka client whose user may not write to topics with the prefix `refused-`, one allowed topic and one refused topic.
async fn limited_user(delivery: Delivery) -> (Kafka, String, String, String) {
    let (_, allowed, id) = create_topics().await;
    let refused = format!("refused-{allowed}");
    let admin = Kafka::connect(&settings(server(), Delivery::ExactlyOnce)).unwrap();
    admin.create_topic(NewTopic::new(&refused, 2, TopicReplication::Fixed(1))).await.unwrap();
    let limited = std::env::var("LFS_TEST_KAFKA_LIMITED").expect("LFS_TEST_KAFKA_LIMITED names the same Kafka's SASL listener");
    let mut settings = settings(limited, delivery);
    for (key, value) in [
        ("security.protocol", "SASL_PLAINTEXT"),
        ("sasl.mechanism", "PLAIN"),
        ("sasl.username", "limited"),
        ("sasl.password", "limited"),
    ] {
        settings.properties.insert(key.to_owned(), value.to_owned());
    }
    (Kafka::connect(&settings).unwrap(), allowed, refused, id)
}

#[tokio::test]
#[ignore = "needs a real Kafka: .ci/run runs it"]
async fn a_topic_without_write_permission_does_not_block_other_topics_in_both_delivery_modes() {
    for delivery in [Delivery::ExactlyOnce, Delivery::AtLeastOnce] {
        let (kafka, allowed, refused, id) = limited_user(delivery).await;
        let mut producer = kafka.open_producer(&id, 2).await.unwrap();
        // A committed transaction comes first: then Kafka rejects the abort of a transaction whose first topic it rejected.
        producer.publish(1, &[pointer(&allowed)]).await.unwrap();
        let bad = [pointer(&refused), pointer(&refused)];
        let Err(PublishError::Rejected { rejected, .. }) = producer.publish(2, &bad).await else { panic!("not rejected") };
        assert_eq!(rejected.len(), 2);
        assert!(
            rejected.iter().all(|rejection| rejection.whole_topic && rejection.reason.contains("TopicAuthorizationFailed")),
            "{rejected:?}"
        );
        if delivery == Delivery::ExactlyOnce {
            assert!(producer.needs_replacement(), "librdkafka's producer is unusable after a rejected abort");
            producer = kafka.open_producer(&id, 2).await.unwrap();
            assert_eq!(producer.last_marker().await.unwrap().unwrap().batch, 1);
        }
        let good = pointer(&allowed);
        let sent = producer.publish(3, &[good.clone(), pointer(&refused)]).await;
        let Err(PublishError::Rejected { delivered, .. }) = sent else { panic!("{sent:?}") };
        if delivery == Delivery::AtLeastOnce {
            assert_eq!(delivered.iter().map(|delivered| delivered.upload_id).collect::<Vec<_>>(), [good.upload_id]);
        } else {
            assert!(delivered.is_empty());
        }
    }
}

#[tokio::test]
#[ignore = "needs a real Kafka: .ci/run runs it"]
async fn the_record_limits_of_a_topic_come_from_its_configuration() {
    let kafka = Kafka::connect(&settings(server(), Delivery::ExactlyOnce)).unwrap();
    let topic = format!("compacted-{}", Uuid::now_v7().simple());
    let new = NewTopic::new(&topic, 1, TopicReplication::Fixed(1)).set("cleanup.policy", "compact");
    kafka.create_topic(new.set("max.message.bytes", "2000")).await.unwrap();
    let limits = kafka.record_limits(&topic).await;
    assert_eq!(limits, super::RecordLimits { needs_key: true, max_bytes: Some(2000) });
    let plain = format!("plain-{}", Uuid::now_v7().simple());
    kafka.create_topic(NewTopic::new(&plain, 1, TopicReplication::Fixed(1))).await.unwrap();
    assert!(!kafka.record_limits(&plain).await.needs_key);
    // A topic with any other cleanup policy than compact deletes markers.
    assert!(kafka.check_policy(&topic).await.is_ok());
    let deletes = kafka.check_policy(&plain).await;
    assert!(matches!(&deletes, Err(super::Error::MarkerPolicy { found }) if found == "delete"), "{deletes:?}");
    let missing = kafka.record_limits("no-such-topic").await;
    assert_eq!(missing, super::RecordLimits::default());
    assert!(kafka.record_limits(&topic).await.needs_key, "a missing topic does not pause the queries for other topics");
}
