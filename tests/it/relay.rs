//! From the outbox to Kafka: in order, exactly once, and a refused pointer blocks only its own key.

use std::time::{Duration, Instant};

use lfs_broker::kafka::Delivery;
use serde_json::json;

use crate::harness::faults::{retry_while_unavailable, upload_id_of};
use crate::harness::servers::{self, servers};
use crate::harness::{TestBroker, sha256};

/// A port on which no server listens.
const NO_SERVER: &str = "127.0.0.1:9";

#[tokio::test]
async fn two_hundred_uploads_of_few_keys_over_two_replicas_are_published_in_order_per_key() {
    let broker = TestBroker::start().await;
    broker.log_outbox_inserts().await;
    let replica = broker.replica().await;
    let bases = [broker.url(), format!("http://{}", replica.address())];
    for _ in 0..10 {
        let uploads = (0..20).map(|number| {
            let (broker, base) = (&broker, &bases[number % 2]);
            async move {
                let opened = broker.open_and_put(b"hello", json!({"key": format!("k{}", number % 5)})).await;
                let complete = broker.http.post(format!("{base}/lfs/uploads/{}/complete", opened.id()));
                broker.send(complete).await.expect(200);
            }
        });
        futures_util::future::join_all(uploads).await;
    }
    let records = broker.records(&broker.topic).await;
    assert_eq!(records.len(), 200);
    TestBroker::assert_key_order(&records, &broker.outbox_numbers().await);
    replica.stop().await;
}

#[tokio::test]
async fn a_replica_that_acquires_the_shards_of_a_dead_one_keeps_the_order() {
    let mut broker = TestBroker::start_with(|settings| settings.broker.complete_wait = Duration::ZERO).await;
    broker.log_outbox_inserts().await;
    let replica = broker.replica().await;
    let base = format!("http://{}", replica.address());
    for round in 0..3 {
        for number in 0..12 {
            let opened = broker.open_and_put(b"hello", json!({"key": format!("k{}", number % 3)})).await;
            let complete = broker.http.post(format!("{base}/lfs/uploads/{}/complete", opened.id()));
            let complete = async || broker.send(complete.try_clone().unwrap()).await;
            assert!([200, 202].contains(&retry_while_unavailable(complete).await.status));
        }
        if round == 0 {
            broker.crash(|_| {}).await;
        }
    }
    replica.crash();
    broker.eventually("every pointer is published", || async { broker.outbox_rows().await == 0 }).await;
    let records = broker.distinct_records().await;
    assert_eq!(records.len(), 36);
    TestBroker::assert_key_order(&records, &broker.outbox_numbers().await);
}

#[tokio::test]
async fn a_pointer_that_kafka_refuses_blocks_its_key_and_no_other() {
    // The producer's own size limit stands in for a topic's limit: it works with every Kafka.
    let mut broker = TestBroker::start_with(|settings| {
        settings.kafka.properties.insert("message.max.bytes".to_owned(), "1500".to_owned());
        settings.broker.complete_wait = Duration::from_millis(500);
    })
    .await;
    broker.log_outbox_inserts().await;
    let large = broker.open_and_put(b"a", json!({"key": "bad", "headers": {"large": "x".repeat(2000)}})).await.id();
    let behind = broker.open_and_put(b"b", json!({"key": "bad"})).await.id();
    assert_eq!(broker.complete_until_verified(&large).await.expect(202).state(), "verified");
    assert_eq!(broker.complete_until_verified(&behind).await.expect(202).state(), "verified");
    for number in 0..8 {
        let other = broker.open_and_put(b"c", json!({"key": format!("good-{number}")})).await.id();
        broker.complete(&other).await;
        broker.wait_for_state(&other, "published").await;
    }
    let seen = broker.upload(&large).await.expect(200);
    assert_eq!((seen.state(), seen.json["error"]["code"].as_str()), ("verified", Some("dependency-unavailable")));
    assert!(seen.json["error"]["detail"].as_str().unwrap().to_lowercase().contains("too large"), "{}", seen.text);
    assert_eq!(broker.upload(&behind).await.state(), "verified", "it must not overtake the refused pointer");

    broker.restart(|settings| settings.kafka.properties.clear()).await;
    let done = broker.wait_for_state(&large, "published").await;
    assert_eq!(done.json.get("error"), None, "{}", done.text);
    broker.wait_for_state(&behind, "published").await;
    let records = broker.distinct_records().await;
    assert_eq!(records.len(), 10);
    TestBroker::assert_key_order(&records, &broker.outbox_numbers().await);
}

#[tokio::test]
#[ignore = "needs a real Kafka: .ci/run runs it"]
async fn pointers_of_a_deleted_topic_wait_until_it_exists_again() {
    assert!(servers().real_kafka, "the embedded Kafka cannot delete a topic");
    let broker = TestBroker::start_with(|settings| settings.broker.complete_wait = Duration::from_millis(500)).await;
    let (missing_topic, other) = (format!("{}-gone", broker.topic), &broker.topic);
    broker.create_topic(&missing_topic, 3).await;
    let with_partition = broker.open_and_put(b"a", json!({"topic": missing_topic, "partition": 2})).await.id();
    let with_key = broker.open_and_put(b"b", json!({"topic": missing_topic, "key": "k"})).await.id();
    servers::delete_topic(&missing_topic).await;
    for id in [&with_partition, &with_key] {
        assert_eq!(broker.complete_until_verified(id).await.expect(202).state(), "verified");
    }
    broker.publish_soon(other).await;
    for id in [&with_partition, &with_key] {
        broker
            .eventually("the error is reported", || async {
                broker.upload(id).await.json["error"]["code"] == "dependency-unavailable"
            })
            .await;
    }
    broker.create_topic(&missing_topic, 1).await;
    // The requested partition does not exist; only an operator can choose another.
    broker
        .eventually("the missing partition is reported", || async {
            broker.upload(&with_partition).await.json["error"]["detail"]
                .as_str()
                .is_some_and(|detail| detail.contains("none with number 2"))
        })
        .await;
    broker
        .eventually("the pointer with a key is published", || async { broker.upload(&with_key).await.state() == "published" })
        .await;
    assert_eq!(broker.records(&missing_topic).await.len(), 1);
    assert_eq!(broker.upload(&with_partition).await.state(), "verified");
}

#[tokio::test]
async fn ten_thousand_pointers_of_a_missing_topic_delay_no_other_key_and_are_logged_once() {
    let mut broker = TestBroker::start().await;
    broker.log_outbox_inserts().await;
    broker.publish(b"hello", json!({"key": "k"})).await;
    broker.stop().await;
    // The pointers are in the shard of the key, without a key, and before its pointers.
    let missing_topic = "with made as (
             insert into upload_sessions
             select (jsonb_populate_record(seed, jsonb_build_object('id', gen_random_uuid(), 'object_key', object_key || '-' || n,
                 'topic', topic || '-gone', 'record_key', null, 'state', 'verified',
                 'published_partition', null, 'published_offset', null, 'published_at', null))).*
             from upload_sessions seed, generate_series(1, 10000) n returning *)
         insert into outbox (session_id, shard, topic, value, headers, created_at, next_try_at)
             select id, (select shard from outbox_log limit 1), topic, pointer,
                    jsonb_build_array(jsonb_build_array('lfs-upload-id', id)), verified_at, verified_at from made";
    sqlx::raw_sql(missing_topic).execute(&broker.db).await.unwrap();
    let process = broker.spawn_process(&[("LFS_BROKER_COMPLETE_WAIT_SECONDS", "20")]).await;
    let begun = Instant::now();
    // The uploads take long enough for the first refused pointers to be retried several times.
    let mut longest = Duration::ZERO;
    for _ in 0..20 {
        let asked = Instant::now();
        let body = json!({"topic": broker.topic, "size": 5, "sha256": sha256(b"hello"), "key": "k"});
        let open = || broker.http.post(format!("{}/lfs/uploads", process.url())).json(&body);
        let opened = retry_while_unavailable(async || broker.send(open()).await).await.expect(201);
        broker.put(&opened.json["upload"], b"hello").await.expect(200);
        let complete = || broker.http.post(format!("{}/lfs/uploads/{}/complete", process.url(), opened.id()));
        retry_while_unavailable(async || broker.send(complete()).await).await.expect(200);
        longest = longest.max(asked.elapsed());
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
    eprintln!("20 uploads beside 10,000 refused pointers: {:?}, the longest {longest:?}", begun.elapsed());
    let log = process.log();
    assert_eq!(log.lines().filter(|line| line.contains("Kafka rejected")).count(), 1, "{log}");
    let reported: (i64,) =
        sqlx::query_as("select count(*) from upload_sessions where error_detail like 'kafka has no topic%-gone'")
            .fetch_one(&broker.db)
            .await
            .unwrap();
    assert_eq!((reported.0, broker.outbox_rows().await), (10_000, 10_000));
}

#[tokio::test]
async fn pointers_go_to_the_requested_partition_and_need_no_key() {
    let broker = TestBroker::start().await;
    for partition in [2, 0, 1, 2] {
        let done = broker.publish(b"hello", json!({"partition": partition})).await;
        assert_eq!(done.json["record"]["partition"], partition);
    }
    let with_key = broker.publish(b"hello", json!({"partition": 1, "key": "k"})).await;
    assert_eq!(with_key.json["record"]["partition"], 1);
    let records = broker.records(&broker.topic).await;
    assert_eq!(records.iter().map(|record| record.partition).collect::<Vec<_>>(), [0, 1, 1, 2, 2]);
    assert_eq!(records.iter().filter(|record| record.key.is_none()).count(), 4);
}

impl TestBroker {
    /// How many rows the outbox has.
    pub(crate) async fn outbox_rows(&self) -> i64 {
        let waiting: (i64,) = sqlx::query_as("select count(*) from outbox").fetch_one(&self.db).await.unwrap();
        waiting.0
    }

    async fn free_shards(&self) -> i64 {
        let free: (i64,) =
            sqlx::query_as("select count(*) from relay_shards where owner is null").fetch_one(&self.db).await.unwrap();
        free.0
    }

    async fn publish_soon(&self, topic: &str) {
        let opened = self.open_and_put(b"hello", json!({"topic": topic})).await;
        self.complete(&opened.id()).await;
        self.wait_for_state(&opened.id(), "published").await;
    }

    /// Moves a published upload back to the state after its record was sent and before it was marked published.
    async fn forget_publication(&self) {
        let back = "update upload_sessions set state = 'verified', published_partition = null, published_offset = null, published_at = null;
             update upload_history set from_state = from_state, version = version + 100 where to_state = 'published';
             insert into outbox (session_id, shard, topic, ordering, partition, key, value, headers, created_at, next_try_at, batch, attempts)
                 select session_id, shard, topic, ordering, partition, key, value, headers, created_at, next_try_at,
                        (select last_batch from relay_shards where relay_shards.shard = outbox_log.shard), 1
                 from outbox_log;";
        sqlx::raw_sql(back).execute(&self.db).await.unwrap();
    }
}

#[tokio::test]
#[ignore = "needs a real Kafka: .ci/run runs it"]
async fn a_sent_pointer_that_was_not_marked_published_is_found_in_the_marker_and_not_sent_again() {
    let mut broker = TestBroker::start().await;
    assert!(broker.is_exactly_once(), "the embedded Kafka accepts transactional calls, but has no transactions");
    broker.log_outbox_inserts().await;
    let done = broker.publish(b"hello", json!({"key": "k"})).await;
    broker.forget_publication().await;
    broker.crash(|_| {}).await;
    broker.wait_for_state(&done.id(), "published").await;
    assert_eq!(broker.complete(&done.id()).await.expect(200).json, done.json);
    // A later pointer, so that an earlier one in flight would have arrived before it.
    broker.publish(b"after", json!({"key": "k"})).await;
    assert_eq!(broker.records(&broker.topic).await.len(), 2);
}

#[tokio::test]
async fn at_least_once_sends_an_unmarked_pointer_again_in_the_same_bytes() {
    let mut broker = TestBroker::start_with(|settings| settings.kafka.delivery = Delivery::AtLeastOnce).await;
    broker.log_outbox_inserts().await;
    let done = broker.publish(b"hello", json!({"key": "k", "headers": {"a": "1"}})).await;
    // A running broker that holds the shard would notice the change and send the pointer again by itself.
    broker.stop().await;
    broker.forget_publication().await;
    broker.start_again(|_| {}).await;
    broker.wait_for_state(&done.id(), "published").await;
    let records = broker.records(&broker.topic).await;
    assert_eq!(records.len(), 2);
    assert_eq!(records[0].value, records[1].value);
    assert_eq!((&records[0].key, &records[0].headers), (&records[1].key, &records[1].headers));
    assert_eq!(upload_id_of(&records[1]), done.id());
}

#[tokio::test]
async fn a_relay_that_lost_its_shards_does_not_release_the_next_owners_batches() {
    let mut broker = TestBroker::start().await;
    broker.publish(b"hello", json!({"key": "k"})).await;
    // Within the second in which the relay has not noticed yet: the next owner has every shard, with one claimed
    // batch in each.
    let steal_shards = "update relay_shards set owner = gen_random_uuid(), epoch = epoch + 1, last_batch = last_batch + 1,
             until = clock_timestamp() + interval '1 hour';
         with made as (
             insert into upload_sessions
             select (jsonb_populate_record(seed, jsonb_build_object('id', gen_random_uuid(), 'object_key', gen_random_uuid(),
                 'state', 'verified', 'published_partition', null, 'published_offset', null, 'published_at', null))).*
             from upload_sessions seed, relay_shards where seed.state = 'published' limit 4 returning *)
         insert into outbox (session_id, shard, topic, value, headers, created_at, next_try_at, batch)
             select id, n, topic, pointer, jsonb_build_array(jsonb_build_array('lfs-upload-id', id)), verified_at, verified_at,
                    (select last_batch from relay_shards where shard = n)
             from (select *, row_number() over () - 1 n from made) numbered";
    for _ in 0..3 {
        // A relay that has just started has no producer for the shard yet, so it would create one.
        broker.restart(|_| {}).await;
        broker.eventually("the relay owns the shards", || async { broker.free_shards().await == 0 }).await;
        sqlx::raw_sql(steal_shards).execute(&broker.db).await.unwrap();
        // In this time the relay has noticed and could have released the batches. Nothing shows that it has noticed.
        tokio::time::sleep(Duration::from_millis(1500)).await;
        let claimed: (i64,) =
            sqlx::query_as("select count(*) from outbox where batch is not null").fetch_one(&broker.db).await.unwrap();
        assert_eq!((claimed.0, broker.outbox_rows().await), (4, 4), "the next owner's batches were released");
        // The next owner dies; now its batches may be released.
        sqlx::raw_sql("update relay_shards set owner = null, until = null").execute(&broker.db).await.unwrap();
        broker.eventually("every pointer is published", || async { broker.outbox_rows().await == 0 }).await;
    }
    assert_eq!(broker.distinct_records().await.len(), 13);
}

#[tokio::test]
async fn a_relay_waits_until_another_owners_lease_has_expired() {
    let broker = TestBroker::start().await;
    broker.publish(b"hello", json!({"key": "k"})).await;
    let steal_shards =
        "update relay_shards set owner = gen_random_uuid(), epoch = epoch + 1, until = clock_timestamp() + interval '3 seconds'";
    let opened = broker.open_and_put(b"again", json!({"key": "k"})).await;
    let begun = Instant::now();
    sqlx::raw_sql(steal_shards).execute(&broker.db).await.unwrap();
    broker.complete(&opened.id()).await.expect(200);
    assert!(begun.elapsed() >= Duration::from_secs(3), "published under another's lease, after {:?}", begun.elapsed());
    assert_eq!(broker.records(&broker.topic).await.len(), 2);
}

#[tokio::test]
async fn a_shard_that_another_transaction_has_locked_delays_no_other_shard() {
    let broker = TestBroker::start_with(|settings| settings.broker.complete_wait = Duration::ZERO).await;
    broker.publish_soon(&broker.topic).await;
    // This lock conflicts with a claim, but not with the renewal of the leases.
    let mut locking = broker.db.begin().await.unwrap();
    sqlx::query("select from relay_shards where shard = 0 for key share").execute(&mut *locking).await.unwrap();
    let waiting = async |condition: &'static str| -> i64 {
        sqlx::query_scalar(sqlx::AssertSqlSafe(format!("select count(*) from outbox where {condition}")))
            .fetch_one(&broker.db)
            .await
            .unwrap()
    };
    // Uploads without a key are spread over all shards.
    let mut uploads = 0;
    while waiting("shard = 0").await == 0 || uploads < 8 {
        uploads += 1;
        assert!(uploads < 100, "no upload is in shard 0");
        let opened = broker.open_and_put(b"hello", json!({})).await;
        broker.complete_until_verified(&opened.id()).await;
    }
    broker.eventually("the other shards publish", || async { waiting("shard <> 0").await == 0 }).await;
    assert!(waiting("shard = 0 and batch is null").await > 0);
    locking.rollback().await.unwrap();
    broker.eventually("every pointer is published", || async { broker.outbox_rows().await == 0 }).await;
    assert_eq!(broker.distinct_records().await.len(), uploads + 1);
}

/// A test broker whose Kafka is away while a thousand pointers of 20 keys wait, and the address of that Kafka.
async fn broker_with_a_thousand_waiting() -> (TestBroker, String) {
    let mut broker = TestBroker::start_with(|settings| settings.broker.complete_wait = Duration::ZERO).await;
    broker.log_outbox_inserts().await;
    let id = broker.open_and_put(b"hello", json!({"key": "seed"})).await.id();
    let kafka = broker.settings.kafka.bootstrap_servers.clone();
    broker.restart(|settings| settings.kafka.bootstrap_servers = NO_SERVER.to_owned()).await;
    broker.complete_until_verified(&id).await.expect(202);
    let multiply = "with made as (
             insert into upload_sessions
             select (jsonb_populate_record(seed, jsonb_build_object('id', gen_random_uuid(), 'object_key', object_key || '-' || n))).*
             from upload_sessions seed, generate_series(1, 999) n where seed.state = 'verified' returning *)
         insert into outbox (session_id, shard, topic, ordering, key, value, headers, created_at, next_try_at)
             select id, n % 20 % 4, topic, n % 20, convert_to('k' || n % 20, 'UTF8'), pointer,
                    jsonb_build_array(jsonb_build_array('lfs-upload-id', id)), verified_at, verified_at
             from (select *, row_number() over () n from made) numbered";
    sqlx::raw_sql(multiply).execute(&broker.db).await.unwrap();
    assert_eq!(broker.outbox_rows().await, 1000);
    (broker, kafka)
}

/// Publishes the waiting pointers and asserts their order.
async fn assert_published_in_order(mut broker: TestBroker, kafka: String) {
    broker.restart(|settings| settings.kafka.bootstrap_servers = kafka).await;
    let begun = Instant::now();
    broker.eventually("the outbox is empty", || async { broker.outbox_rows().await == 0 }).await;
    eprintln!("1,000 pointers in {:?}", begun.elapsed());
    let records = broker.distinct_records().await;
    assert_eq!(records.len(), 1000);
    TestBroker::assert_key_order(&records, &broker.outbox_numbers().await);
}

#[tokio::test]
async fn a_thousand_pointers_that_waited_for_kafka_are_published_in_order() {
    let (broker, kafka) = broker_with_a_thousand_waiting().await;
    assert_published_in_order(broker, kafka).await;
}

#[tokio::test]
async fn a_refused_pointer_is_not_overtaken_by_its_key_when_a_batch_is_full() {
    let (mut broker, kafka) = broker_with_a_thousand_waiting().await;
    broker.stop().await;
    // All rows are in one shard. The first and the third row of each key were refused and are due again.
    let refused = "with nth as (select number, row_number() over (partition by ordering order by number) n from outbox)
         update outbox set shard = 0, error = case when n in (1, 3) then 'refused' end from nth where nth.number = outbox.number";
    sqlx::raw_sql(refused).execute(&broker.db).await.unwrap();
    broker.start_again(|_| {}).await;
    assert_published_in_order(broker, kafka).await;
}

impl TestBroker {
    /// Puts an upload's bytes and completes it until it is verified or published.
    async fn verify(&self, more: serde_json::Value) -> String {
        let id = self.open_and_put(b"hello", more).await.id();
        self.complete_until_verified(&id).await;
        id
    }
}

#[tokio::test]
#[ignore = "needs a real Kafka: .ci/run runs it"]
async fn uploads_to_an_unauthorized_topic_are_deferred_and_all_others_are_published() {
    let limited = std::env::var("LFS_TEST_KAFKA_LIMITED").expect("LFS_TEST_KAFKA_LIMITED names Kafka's SASL listener");
    for delivery in [Delivery::ExactlyOnce, Delivery::AtLeastOnce] {
        let broker = TestBroker::start_with(|settings| {
            settings.kafka.bootstrap_servers.clone_from(&limited);
            settings.kafka.delivery = delivery;
            let user = [("security.protocol", "SASL_PLAINTEXT"), ("sasl.mechanism", "PLAIN")];
            let secret = [("sasl.username", "limited"), ("sasl.password", "limited")];
            settings
                .kafka
                .properties
                .extend(user.into_iter().chain(secret).map(|(key, value)| (key.to_owned(), value.to_owned())));
            settings.broker.complete_wait = Duration::ZERO;
        })
        .await;
        let refused_topic = format!("refused-{}", broker.topic);
        broker.create_topic(&refused_topic, 3).await;
        // Each shard has committed a transaction before: only then does Kafka refuse the abort too.
        let mut good = Vec::new();
        for number in 0..8 {
            good.push(broker.verify(json!({"key": format!("first-{number}")})).await);
        }
        for id in &good {
            broker.wait_for_state(id, "published").await;
        }
        let mut bad = Vec::new();
        for number in 0..8 {
            bad.push(broker.verify(json!({"topic": refused_topic, "key": format!("k{number}")})).await);
        }
        for number in 0..24 {
            good.push(broker.verify(json!({"key": format!("k{number}")})).await);
        }
        for id in &good {
            broker.wait_for_state(id, "published").await;
        }
        for id in &bad {
            let is_deferred = || async {
                let seen = broker.upload(id).await;
                seen.state() == "verified"
                    && seen.json["error"]["detail"].as_str().is_some_and(|why| why.contains("TopicAuthorizationFailed"))
            };
            broker.eventually("Kafka's reason is on the upload", is_deferred).await;
        }
        assert_eq!(broker.client().stats().await.unwrap().outbox.parked, 8);
        assert_eq!(broker.records(&broker.topic).await.len(), 32);
        // A redrive sends the pointer at once, and Kafka refuses it again.
        let version = broker.upload(&bad[0]).await.json["version"].as_i64();
        broker.post(&format!("/lfs/uploads/{}/redrive", bad[0]), &json!({})).await.expect(200);
        let again = || async {
            let seen = broker.upload(&bad[0]).await;
            seen.json["version"].as_i64() > version.map(|version| version + 1) && !seen.json["error"].is_null()
        };
        broker.eventually("the pointer is refused again", again).await;
    }
}

#[tokio::test]
#[ignore = "needs a real Kafka: .ci/run runs it"]
async fn a_sent_pointer_is_found_in_its_topic_when_no_marker_lists_it() {
    let mut broker = TestBroker::start().await;
    assert!(broker.is_exactly_once(), "the embedded Kafka has no transactions");
    broker.log_outbox_inserts().await;
    let done = broker.publish(b"hello", json!({"key": "k"})).await;
    broker.forget_publication().await;
    // As if the marker topic was deleted: a new deployment id has no markers.
    sqlx::raw_sql("update deployment set id = gen_random_uuid()").execute(&broker.db).await.unwrap();
    broker.crash(|_| {}).await;
    broker.wait_for_state(&done.id(), "published").await;
    assert_eq!(broker.complete(&done.id()).await.expect(200).json, done.json);
    broker.publish(b"after", json!({"key": "k"})).await;
    assert_eq!(broker.records(&broker.topic).await.len(), 2);
}

#[tokio::test]
#[ignore = "needs a real Kafka: .ci/run runs it"]
async fn an_upload_that_its_topic_can_never_take_is_refused_at_open() {
    let broker = TestBroker::start().await;
    let compacted = format!("{}-compacted", broker.topic);
    broker.create_topic(&compacted, 1).await;
    servers::set_config(&compacted, &[("cleanup.policy", "compact"), ("max.message.bytes", "2000")]).await;
    let refused = broker.open(b"hello", json!({"topic": compacted})).await.expect_problem(422, "validation-failed");
    assert_eq!(refused.json["errors"][0]["pointer"], "/key");
    let large = json!({"topic": compacted, "key": "k", "headers": {"large": "x".repeat(1900)}});
    let refused = broker.open(b"hello", large).await.expect_problem(422, "record-too-large");
    assert!(refused.json["detail"].as_str().unwrap().contains("allows 2000"), "{}", refused.text);
    // An accepted upload is always published: the limit at open is neither too low nor too high.
    let fits = |bytes: usize| json!({"topic": compacted, "key": "k", "headers": {"large": "x".repeat(bytes)}});
    let (mut fit, mut too_large) = (1000, 1900);
    while too_large - fit > 1 {
        let between = usize::midpoint(fit, too_large);
        match broker.open(b"hello", fits(between)).await.status {
            201 => fit = between,
            _ => too_large = between,
        }
    }
    broker.publish(b"hello", fits(fit - 20)).await;
}

#[tokio::test]
async fn uploads_show_the_error_while_kafka_is_unavailable() {
    let (mut broker, kafka) = {
        let broker = TestBroker::start_with(|settings| settings.broker.complete_wait = Duration::ZERO).await;
        let kafka = broker.settings.kafka.bootstrap_servers.clone();
        (broker, kafka)
    };
    let id = broker.open_and_put(b"hello", json!({"key": "k"})).await.id();
    broker.restart(|settings| settings.kafka.bootstrap_servers = NO_SERVER.to_owned()).await;
    broker.complete_until_verified(&id).await.expect(202);
    let reported = || async { broker.upload(&id).await.json["error"]["code"] == "dependency-unavailable" };
    broker.eventually("the error is reported", reported).await;
    let seen = broker.upload(&id).await;
    assert_eq!(seen.state(), "verified");
    assert!(!seen.text.contains(NO_SERVER), "{}", seen.text);
    let deferred = broker.client().stats().await.unwrap().outbox.parked;
    assert_eq!(deferred, 0, "the pointer is sent as soon as Kafka is back");
    broker.restart(|settings| settings.kafka.bootstrap_servers = kafka).await;
    let done = broker.wait_for_state(&id, "published").await;
    assert!(done.json["error"].is_null(), "{}", done.text);
}
