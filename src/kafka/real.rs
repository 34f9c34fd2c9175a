//! What exactly-once delivery rests on, tried on a real Kafka: the embedded one accepts transactions without their
//! meaning. Run with `LFS_TEST_KAFKA=HOST:PORT` and `--ignored`.

use std::collections::BTreeMap;
use std::time::Instant;

use rdkafka::admin::{NewTopic, TopicReplication};
use rdkafka::message::Message;
use rdkafka::producer::{FutureRecord, Producer};
use uuid::Uuid;

use super::tests::{read, record, settings};
use super::{Delivery, Kafka, Marker, PublishError, Record, Settings, client};

fn server() -> String {
    std::env::var("LFS_TEST_KAFKA").expect("LFS_TEST_KAFKA names a real Kafka, as HOST:PORT")
}

/// A topic with four partitions and a transactional id of the test's own, and the marker topic.
async fn house() -> (Kafka, String, String) {
    let name = Uuid::now_v7().simple().to_string();
    let kafka = Kafka::connect(&settings(server(), Delivery::ExactlyOnce)).unwrap();
    kafka.create_topic(NewTopic::new(&name, 4, TopicReplication::Fixed(1))).await.unwrap();
    kafka.ensure_marker_topic(4).await.unwrap();
    (kafka, name.clone(), format!("lfs-broker.{name}.0"))
}

/// The ids of the uploads in a topic, as a reader of this kind sees them.
async fn uploads(topic: &str, isolation: &'static str) -> Vec<Uuid> {
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

fn sorted(records: &[Record]) -> Vec<Uuid> {
    let mut ids: Vec<_> = records.iter().map(|record| record.upload_id).collect();
    ids.sort();
    ids
}

async fn committed(topic: &str) -> Vec<Uuid> {
    let mut found = uploads(topic, "read_committed").await;
    found.sort();
    found
}

#[tokio::test]
#[ignore = "needs a real Kafka: .ci/run runs it"]
async fn a_batch_is_published_with_its_marker() {
    let (kafka, topic, id) = house().await;
    let shard = kafka.shard(&id, 0).await.unwrap();
    assert_eq!(shard.last_marker().await.unwrap(), None);
    let sent: Vec<_> = (0..500).map(|_| pointer(&topic)).collect();
    let published = shard.publish(7, &sent).await.unwrap();
    assert_eq!(shard.last_marker().await.unwrap(), Some(Marker { batch: 7, published: published.clone() }));
    assert_eq!(committed(&topic).await, sorted(&sent));
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
async fn an_aborted_batch_leaves_nothing_and_the_last_marker_stays() {
    let (kafka, topic, id) = house().await;
    let shard = kafka.shard(&id, 1).await.unwrap();
    let first = [pointer(&topic)];
    let published = shard.publish(1, &first).await.unwrap();
    let marker = Marker { batch: 1, published };

    // Refused by librdkafka after its sibling was sent: the sibling's transaction is aborted.
    let large = Record { value: vec![b' '; 2_000_000], ..pointer(&topic) };
    for batch in 2..=4 {
        let refused = shard.publish(batch, &[pointer(&topic), large.clone()]).await;
        assert!(matches!(refused, Err(PublishError::Refused { delivered, .. }) if delivered.is_empty()));
        assert_eq!(shard.last_marker().await.unwrap(), Some(marker.clone()));
    }
    assert_eq!(committed(&topic).await, sorted(&first));

    // Markers of aborted batches, with their control records, at the end of the log.
    let settings = kafka.settings().clone();
    drop(shard);
    tokio::task::spawn_blocking({
        let id = id.clone();
        move || {
            let producer = client::producer(&settings, Some(&id)).unwrap();
            producer.init_transactions(super::ANSWER_WITHIN * 10).unwrap();
            for batch in 100..400 {
                producer.begin_transaction().unwrap();
                let value = serde_json::to_vec(&Marker { batch, published: Vec::new() }).unwrap();
                let record = FutureRecord::to(super::MARKER_TOPIC).partition(1).key(&id).payload(&value);
                let delivery = producer.send_result(record).unwrap();
                tokio::runtime::Handle::current().block_on(delivery).unwrap().unwrap();
                producer.abort_transaction(super::ANSWER_WITHIN).unwrap();
            }
        }
    })
    .await
    .unwrap();
    let shard = kafka.shard(&id, 1).await.unwrap();
    assert_eq!(shard.last_marker().await.unwrap(), Some(marker));
    shard.publish(401, &[]).await.unwrap();
    assert_eq!(shard.last_marker().await.unwrap(), Some(Marker { batch: 401, published: Vec::new() }));
}

#[tokio::test]
#[ignore = "needs a real Kafka: .ci/run runs it"]
async fn a_new_owner_fences_the_old_one_and_sees_what_it_published() {
    let (kafka, topic, id) = house().await;
    let zombie = kafka.shard(&id, 2).await.unwrap();
    let first = [pointer(&topic)];
    let published = zombie.publish(1, &first).await.unwrap();

    let owner = kafka.shard(&id, 2).await.unwrap();
    assert_eq!(owner.last_marker().await.unwrap(), Some(Marker { batch: 1, published }));
    let fenced = zombie.publish(2, &[pointer(&topic)]).await;
    assert!(matches!(fenced, Err(PublishError::Fenced(_))), "{fenced:?}");
    let again = zombie.publish(3, &[pointer(&topic)]).await;
    assert!(matches!(again, Err(PublishError::Lost(_))), "{again:?}");

    let second = [pointer(&topic)];
    let published = owner.publish(2, &second).await.unwrap();
    assert_eq!(owner.last_marker().await.unwrap(), Some(Marker { batch: 2, published }));
    assert_eq!(committed(&topic).await, sorted(&[first, second].concat()));
}

#[tokio::test]
#[ignore = "needs a real Kafka: .ci/run runs it"]
async fn a_transaction_left_open_is_aborted_by_the_next_owner() {
    let (kafka, topic, id) = house().await;
    let (settings, left, id_of_dead) = (kafka.settings().clone(), pointer(&topic), id.clone());
    // Sent and acknowledged, marker too, but never committed: as after a kill -9.
    let dead = tokio::task::spawn_blocking(move || {
        let producer = client::producer(&settings, Some(&id_of_dead)).unwrap();
        producer.init_transactions(super::ANSWER_WITHIN * 10).unwrap();
        producer.begin_transaction().unwrap();
        let record = FutureRecord::<(), _>::to(&left.topic).payload(&left.value);
        drop(producer.send_result(record).unwrap());
        let value = serde_json::to_vec(&Marker { batch: 1, published: Vec::new() }).unwrap();
        let marker = FutureRecord::to(super::MARKER_TOPIC).partition(3).key(&id_of_dead).payload(&value);
        drop(producer.send_result(marker).unwrap());
        producer.flush(super::ANSWER_WITHIN * 5).unwrap();
        producer
    })
    .await
    .unwrap();

    let opened = Instant::now();
    let owner = kafka.shard(&id, 3).await.unwrap();
    assert_eq!(owner.last_marker().await.unwrap(), None);
    assert!(opened.elapsed().as_secs() < 10, "took over after {:?}", opened.elapsed());
    let sent = [pointer(&topic)];
    owner.publish(2, &sent).await.unwrap();
    assert_eq!(committed(&topic).await, sorted(&sent));
    assert_eq!(uploads(&topic, "read_uncommitted").await.len(), 2);
    super::drop_aside(dead);
}

#[tokio::test]
#[ignore = "needs a real Kafka: .ci/run runs it"]
async fn a_marker_behind_a_strangers_open_transaction_is_waited_for() {
    let (kafka, topic, id) = house().await;
    // A partition of its own, because the open transaction would hold up the other tests.
    let partition = 0;
    let (settings, stranger_id) = (kafka.settings().clone(), format!("{id}.stranger"));
    let stranger = tokio::task::spawn_blocking(move || {
        let producer = client::producer(&settings, Some(&stranger_id)).unwrap();
        producer.init_transactions(super::ANSWER_WITHIN * 10).unwrap();
        producer.begin_transaction().unwrap();
        let record = FutureRecord::to(super::MARKER_TOPIC).partition(partition).key(&stranger_id).payload("{}");
        drop(producer.send_result(record).unwrap());
        producer.flush(super::ANSWER_WITHIN * 5).unwrap();
        producer
    })
    .await
    .unwrap();

    let shard = kafka.shard(&id, partition).await.unwrap();
    let published = shard.publish(1, &[pointer(&topic)]).await.unwrap();
    let mut waiting = Box::pin(shard.last_marker());
    let early = tokio::time::timeout(super::ANSWER_WITHIN, &mut waiting).await;
    assert!(early.is_err(), "answered {early:?} although a record could not be read");
    let ended = tokio::task::spawn_blocking(move || {
        stranger.commit_transaction(super::ANSWER_WITHIN * 5).unwrap();
        stranger
    });
    assert_eq!(waiting.await.unwrap(), Some(Marker { batch: 1, published }));
    super::drop_aside(ended.await.unwrap());
}

#[tokio::test]
#[ignore = "needs a real Kafka: .ci/run runs it"]
async fn a_record_that_the_topic_does_not_take_is_refused_alone() {
    let (kafka, _, id) = house().await;
    let topic = format!("small-{}", Uuid::now_v7().simple());
    let new = NewTopic::new(&topic, 1, TopicReplication::Fixed(1));
    kafka.create_topic(new.set("max.message.bytes", "2000")).await.unwrap();
    let shard = kafka.shard(&id, 2).await.unwrap();
    let large = Record { value: vec![b' '; 5000], ..pointer(&topic) };
    let small = pointer(&topic);

    // A broker judges what is sent together, so together nobody is surely at fault.
    let Err(PublishError::Refused { refused, .. }) = shard.publish(1, &[small.clone(), large.clone()]).await else {
        panic!("not refused")
    };
    assert!(refused.iter().any(|refusal| refusal.upload_id == large.upload_id));
    assert!(refused.iter().all(|refusal| !refusal.permanent));
    let Err(PublishError::Refused { refused, .. }) = shard.publish(2, &[large]).await else { panic!("not refused") };
    assert!(refused[0].permanent && refused[0].reason.contains("too large"), "{refused:?}");
    // librdkafka counts the refused record as sent; it notices in the next transaction and takes a new epoch.
    for batch in 3..6 {
        match shard.publish(batch, std::slice::from_ref(&small)).await {
            Err(PublishError::Retry(_)) if batch < 5 => {}
            published => return drop(published.unwrap()),
        }
    }
}

#[tokio::test]
#[ignore = "needs a real Kafka: .ci/run runs it"]
async fn asking_a_kafka_that_makes_topics_does_not_make_one() {
    let kafka = Kafka::connect(&settings(server(), Delivery::ExactlyOnce)).unwrap();
    let topic = format!("never-{}", Uuid::now_v7().simple());
    for _ in 0..3 {
        assert_eq!(kafka.partitions(&topic).await.unwrap(), None);
        kafka.doubt(&topic);
    }
    assert_eq!(kafka.partitions("no such topic!").await.unwrap(), None);
    let too_many = kafka.ensure_marker_topic(1000).await;
    assert!(matches!(too_many, Err(super::Error::MarkerPartitions { wanted: 1000, .. })), "{too_many:?}");
}

#[tokio::test]
#[ignore = "needs a real Kafka: .ci/run runs it"]
async fn in_dev_a_topic_of_a_real_kafka_is_made_on_first_use() {
    let settings = Settings { create_topics: true, ..settings(server(), Delivery::ExactlyOnce) };
    let kafka = Kafka::connect(&settings).unwrap();
    let topic = format!("first-{}", Uuid::now_v7().simple());
    assert!(kafka.partitions(&topic).await.unwrap().is_some_and(|partitions| partitions > 0));
}

#[tokio::test]
#[ignore = "needs a real Kafka: .ci/run runs it"]
async fn without_transactions_a_batch_leaves_its_number_and_a_new_owner_sees_it() {
    let (_, topic, id) = house().await;
    let settings = Settings { properties: BTreeMap::new(), ..settings(server(), Delivery::AtLeastOnce) };
    let kafka = Kafka::connect(&settings).unwrap();
    let shard = kafka.shard(&id, 0).await.unwrap();
    let sent: Vec<_> = (0..100).map(|_| pointer(&topic)).collect();
    shard.publish(1, &sent).await.unwrap();
    let marker = Some(Marker { batch: 1, published: Vec::new() });
    assert_eq!(kafka.shard(&id, 0).await.unwrap().last_marker().await.unwrap(), marker);
    assert_eq!(committed(&topic).await, sorted(&sent));
}

/// Kafka as a user sees it who may not write to topics that begin with `refused-`, and one topic of each kind.
async fn limited(delivery: Delivery) -> (Kafka, String, String, String) {
    let (_, allowed, id) = house().await;
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
async fn a_topic_that_may_not_be_written_is_refused_alone_in_both_delivery_modes() {
    for delivery in [Delivery::ExactlyOnce, Delivery::AtLeastOnce] {
        let (kafka, allowed, refused, id) = limited(delivery).await;
        let mut shard = kafka.shard(&id, 2).await.unwrap();
        // After a committed transaction Kafka refuses the abort of one whose first topic it refused.
        shard.publish(1, &[pointer(&allowed)]).await.unwrap();
        let bad = [pointer(&refused), pointer(&refused)];
        let Err(PublishError::Refused { refused: told, .. }) = shard.publish(2, &bad).await else { panic!("not refused") };
        assert_eq!(told.len(), 2);
        assert!(told.iter().all(|told| told.whole_topic && told.reason.contains("TopicAuthorizationFailed")), "{told:?}");
        if delivery == Delivery::ExactlyOnce {
            assert!(shard.is_spent(), "librdkafka does nothing more after an abort that was refused");
            shard = kafka.shard(&id, 2).await.unwrap();
            assert_eq!(shard.last_marker().await.unwrap().unwrap().batch, 1);
        }
        let good = pointer(&allowed);
        let sent = shard.publish(3, &[good.clone(), pointer(&refused)]).await;
        let Err(PublishError::Refused { delivered, .. }) = sent else { panic!("{sent:?}") };
        if delivery == Delivery::AtLeastOnce {
            assert_eq!(delivered.iter().map(|delivered| delivered.upload_id).collect::<Vec<_>>(), [good.upload_id]);
        } else {
            assert!(delivered.is_empty());
        }
    }
}

#[tokio::test]
#[ignore = "needs a real Kafka: .ci/run runs it"]
async fn what_a_topic_never_takes_is_told_by_its_configuration() {
    let kafka = Kafka::connect(&settings(server(), Delivery::ExactlyOnce)).unwrap();
    let topic = format!("compacted-{}", Uuid::now_v7().simple());
    let new = NewTopic::new(&topic, 1, TopicReplication::Fixed(1)).set("cleanup.policy", "compact");
    kafka.create_topic(new.set("max.message.bytes", "2000")).await.unwrap();
    let limits = kafka.record_limits(&topic).await;
    assert_eq!(limits, super::RecordLimits { needs_key: true, max_bytes: Some(2000) });
    let plain = format!("plain-{}", Uuid::now_v7().simple());
    kafka.create_topic(NewTopic::new(&plain, 1, TopicReplication::Fixed(1))).await.unwrap();
    assert!(!kafka.record_limits(&plain).await.needs_key);
    // Markers would vanish from a topic that is not compacted, or not only.
    assert!(kafka.check_policy(&topic).await.is_ok());
    let deletes = kafka.check_policy(&plain).await;
    assert!(matches!(&deletes, Err(super::Error::MarkerPolicy { found }) if found == "delete"), "{deletes:?}");
    let missing = kafka.record_limits("no-such-topic").await;
    assert_eq!(missing, super::RecordLimits::default());
    assert!(kafka.record_limits(&topic).await.needs_key, "a topic that is missing silences nothing");
}
