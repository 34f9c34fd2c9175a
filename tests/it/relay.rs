//! From the outbox to Kafka: in order, once, and one key's trouble is not another's.

use std::time::{Duration, Instant};

use lfs_broker::kafka::Delivery;
use serde_json::json;

use crate::harness::faults::upload_of;
use crate::harness::servers::{self, servers};
use crate::harness::{House, sha256};

/// What nobody serves.
const CLOSED: &str = "127.0.0.1:9";

#[tokio::test]
async fn two_hundred_uploads_of_few_keys_over_two_replicas_keep_the_order_of_their_promises() {
    let house = House::new().await;
    house.log_the_outbox().await;
    let replica = house.replica().await;
    let bases = [house.url(), format!("http://{}", replica.address())];
    for _ in 0..10 {
        let uploads = (0..20).map(|number| {
            let (house, base) = (&house, &bases[number % 2]);
            async move {
                let opened = house.put_up(b"hello", json!({"key": format!("k{}", number % 5)})).await;
                let complete = house.http.post(format!("{base}/lfs/uploads/{}/complete", opened.id()));
                house.send(complete).await.expect(200);
            }
        });
        futures_util::future::join_all(uploads).await;
    }
    let records = house.records(&house.topic).await;
    assert_eq!(records.len(), 200);
    House::assert_in_order(&records, &house.promises().await);
    replica.stop().await;
}

#[tokio::test]
async fn a_replica_that_takes_the_shards_over_keeps_the_order() {
    let mut house = House::with(|settings| settings.broker.complete_wait = Duration::ZERO).await;
    house.log_the_outbox().await;
    let replica = house.replica().await;
    let base = format!("http://{}", replica.address());
    for round in 0..3 {
        for number in 0..12 {
            let opened = house.put_up(b"hello", json!({"key": format!("k{}", number % 3)})).await;
            let complete = house.http.post(format!("{base}/lfs/uploads/{}/complete", opened.id()));
            assert!([200, 202].contains(&house.send(complete).await.status));
        }
        if round == 0 {
            house.crash(|_| {}).await;
        }
    }
    replica.crash();
    house.eventually("all is published", || async { house.outbox().await == 0 }).await;
    let records = house.distinct_records().await;
    assert_eq!(records.len(), 36);
    House::assert_in_order(&records, &house.promises().await);
}

#[tokio::test]
async fn a_pointer_that_kafka_refuses_parks_its_key_and_no_other() {
    // The client's own limit stands for a topic's: one that every Kafka has.
    let mut house = House::with(|settings| {
        settings.kafka.properties.insert("message.max.bytes".to_owned(), "1500".to_owned());
        settings.broker.complete_wait = Duration::from_millis(500);
    })
    .await;
    house.log_the_outbox().await;
    let large = house.put_up(b"a", json!({"key": "bad", "headers": {"large": "x".repeat(2000)}})).await.id();
    let behind = house.put_up(b"b", json!({"key": "bad"})).await.id();
    assert_eq!(house.complete(&large).await.expect(202).state(), "verified");
    assert_eq!(house.complete(&behind).await.expect(202).state(), "verified");
    for number in 0..8 {
        let other = house.put_up(b"c", json!({"key": format!("good-{number}")})).await.id();
        house.complete(&other).await;
        house.until(&other, "published").await;
    }
    let seen = house.upload(&large).await.expect(200);
    assert_eq!((seen.state(), seen.json["error"]["code"].as_str()), ("verified", Some("dependency-unavailable")));
    assert!(seen.json["error"]["detail"].as_str().unwrap().to_lowercase().contains("too large"), "{}", seen.text);
    assert_eq!(house.upload(&behind).await.state(), "verified", "it would be before the one that waits");

    house.restart(|settings| settings.kafka.properties.clear()).await;
    let done = house.until(&large, "published").await;
    assert_eq!(done.json.get("error"), None, "{}", done.text);
    house.until(&behind, "published").await;
    let records = house.distinct_records().await;
    assert_eq!(records.len(), 10);
    House::assert_in_order(&records, &house.promises().await);
}

#[tokio::test]
async fn a_topic_that_was_deleted_is_waited_for() {
    if !servers().real_kafka {
        // The embedded Kafka cannot delete a topic.
        return;
    }
    let house = House::with(|settings| settings.broker.complete_wait = Duration::from_millis(500)).await;
    let (gone, other) = (format!("{}-gone", house.topic), &house.topic);
    house.make_topic(&gone, 3).await;
    let placed = house.put_up(b"a", json!({"topic": gone, "partition": 2})).await.id();
    let keyed = house.put_up(b"b", json!({"topic": gone, "key": "k"})).await.id();
    servers::delete_topic(&gone).await;
    for id in [&placed, &keyed] {
        assert_eq!(house.complete(id).await.expect(202).state(), "verified");
    }
    house.publish_soon(other).await;
    for id in [&placed, &keyed] {
        house
            .eventually("the error is told", || async {
                house.upload(id).await.json["error"]["code"] == "dependency-unavailable"
            })
            .await;
    }
    house.make_topic(&gone, 1).await;
    // What was asked for is not there; only an operator can say what shall be instead.
    house
        .eventually("the missing partition is told", || async {
            house.upload(&placed).await.json["error"]["detail"]
                .as_str()
                .is_some_and(|detail| detail.contains("none with number 2"))
        })
        .await;
    house.eventually("what can be sent is sent", || async { house.upload(&keyed).await.state() == "published" }).await;
    assert_eq!(house.records(&gone).await.len(), 1);
    assert_eq!(house.upload(&placed).await.state(), "verified");
}

#[tokio::test]
async fn thousands_of_pointers_for_a_topic_that_is_gone_hold_up_no_other_key_and_are_told_of_once() {
    let mut house = House::new().await;
    house.log_the_outbox().await;
    house.publish(b"hello", json!({"key": "k"})).await;
    house.stop().await;
    // In the shard of the key, keyless and before it.
    let gone = "with made as (
             insert into upload_sessions
             select (jsonb_populate_record(seed, jsonb_build_object('id', gen_random_uuid(), 'object_key', object_key || '-' || n,
                 'topic', topic || '-gone', 'record_key', null, 'state', 'verified',
                 'published_partition', null, 'published_offset', null, 'published_at', null))).*
             from upload_sessions seed, generate_series(1, 10000) n returning *)
         insert into outbox (session_id, shard, topic, value, headers, created_at, next_try_at)
             select id, (select shard from outbox_log limit 1), topic, pointer,
                    jsonb_build_array(jsonb_build_array('lfs-upload-id', id)), verified_at, verified_at from made";
    sqlx::raw_sql(gone).execute(&house.db).await.unwrap();
    let serving = house.serving(&[("LFS_BROKER_COMPLETE_WAIT_SECONDS", "20")]).await;
    let begun = Instant::now();
    // As long as it takes for the first ones to be tried again, and again.
    let mut longest = Duration::ZERO;
    for _ in 0..20 {
        let asked = Instant::now();
        let body = json!({"topic": house.topic, "size": 5, "sha256": sha256(b"hello"), "key": "k"});
        let opened = house.send(house.http.post(format!("{}/lfs/uploads", serving.url())).json(&body)).await.expect(201);
        house.put(&opened.json["upload"], b"hello").await.expect(200);
        house.send(house.http.post(format!("{}/lfs/uploads/{}/complete", serving.url(), opened.id()))).await.expect(200);
        longest = longest.max(asked.elapsed());
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
    eprintln!("20 beside 10,000 that are refused: {:?}, the longest {longest:?}", begun.elapsed());
    let log = serving.log();
    assert_eq!(log.lines().filter(|line| line.contains("Kafka refused")).count(), 1, "{log}");
    let told: (i64,) = sqlx::query_as("select count(*) from upload_sessions where error_detail like 'kafka has no topic%-gone'")
        .fetch_one(&house.db)
        .await
        .unwrap();
    assert_eq!((told.0, house.outbox().await), (10_000, 10_000));
}

#[tokio::test]
async fn pointers_go_where_they_were_asked_to_and_need_no_key() {
    let house = House::new().await;
    for partition in [2, 0, 1, 2] {
        let done = house.publish(b"hello", json!({"partition": partition})).await;
        assert_eq!(done.json["record"]["partition"], partition);
    }
    let keyed = house.publish(b"hello", json!({"partition": 1, "key": "k"})).await;
    assert_eq!(keyed.json["record"]["partition"], 1);
    let records = house.records(&house.topic).await;
    assert_eq!(records.iter().map(|record| record.partition).collect::<Vec<_>>(), [0, 1, 1, 2, 2]);
    assert_eq!(records.iter().filter(|record| record.key.is_none()).count(), 4);
}

impl House {
    /// How many pointers wait.
    async fn outbox(&self) -> i64 {
        let waiting: (i64,) = sqlx::query_as("select count(*) from outbox").fetch_one(&self.db).await.unwrap();
        waiting.0
    }

    async fn free_shards(&self) -> i64 {
        let free: (i64,) =
            sqlx::query_as("select count(*) from relay_shards where owner is null").fetch_one(&self.db).await.unwrap();
        free.0
    }

    async fn publish_soon(&self, topic: &str) {
        let opened = self.put_up(b"hello", json!({"topic": topic})).await;
        self.complete(&opened.id()).await;
        self.until(&opened.id(), "published").await;
    }

    /// Puts a published upload back to where it was when its record was sent and that was not written down yet.
    async fn forget_the_mark(&self) {
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
async fn a_pointer_that_was_sent_but_not_marked_is_found_in_the_marker_and_not_sent_again() {
    let mut house = House::new().await;
    if !house.is_exactly_once() {
        // The embedded Kafka has transactions in name only.
        return;
    }
    house.log_the_outbox().await;
    let done = house.publish(b"hello", json!({"key": "k"})).await;
    house.forget_the_mark().await;
    house.crash(|_| {}).await;
    house.until(&done.id(), "published").await;
    assert_eq!(house.complete(&done.id()).await.expect(200).json, done.json);
    // A later one, so that an earlier one that is under way would have arrived.
    house.publish(b"after", json!({"key": "k"})).await;
    assert_eq!(house.records(&house.topic).await.len(), 2);
}

#[tokio::test]
async fn at_least_once_sends_what_was_not_marked_again_in_the_same_bytes() {
    let mut house = House::with(|settings| settings.kafka.delivery = Delivery::AtLeastOnce).await;
    house.log_the_outbox().await;
    let done = house.publish(b"hello", json!({"key": "k", "headers": {"a": "1"}})).await;
    // A broker that holds the shard would notice, and send it again by itself.
    house.stop().await;
    house.forget_the_mark().await;
    house.start(|_| {}).await;
    house.until(&done.id(), "published").await;
    let records = house.records(&house.topic).await;
    assert_eq!(records.len(), 2);
    assert_eq!(records[0].value, records[1].value);
    assert_eq!((&records[0].key, &records[0].headers), (&records[1].key, &records[1].headers));
    assert_eq!(upload_of(&records[1]), done.id());
}

#[tokio::test]
async fn a_relay_that_lost_its_shards_takes_no_stamp_of_the_next_owner_back() {
    let mut house = House::new().await;
    house.publish(b"hello", json!({"key": "k"})).await;
    // Within the second in which the relay does not know yet: the next owner has every shard, and one of its own
    // batches under way in each.
    let stolen = "update relay_shards set owner = gen_random_uuid(), epoch = epoch + 1, last_batch = last_batch + 1,
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
        // A relay that has just come holds no shard's producer, so that it would take one.
        house.restart(|_| {}).await;
        house.eventually("it owns the shards", || async { house.free_shards().await == 0 }).await;
        sqlx::raw_sql(stolen).execute(&house.db).await.unwrap();
        tokio::time::sleep(Duration::from_millis(1500)).await;
        let stamped: (i64,) =
            sqlx::query_as("select count(*) from outbox where batch is not null").fetch_one(&house.db).await.unwrap();
        assert_eq!((stamped.0, house.outbox().await), (4, 4), "the next owner's stamps were taken back");
        // The next owner dies; now they may.
        sqlx::raw_sql("update relay_shards set owner = null, until = null").execute(&house.db).await.unwrap();
        house.eventually("all is published", || async { house.outbox().await == 0 }).await;
    }
    assert_eq!(house.distinct_records().await.len(), 13);
}

#[tokio::test]
async fn a_shard_is_left_to_its_owner_for_as_long_as_its_lease_lasts() {
    let house = House::new().await;
    house.publish(b"hello", json!({"key": "k"})).await;
    let stolen =
        "update relay_shards set owner = gen_random_uuid(), epoch = epoch + 1, until = clock_timestamp() + interval '3 seconds'";
    sqlx::raw_sql(stolen).execute(&house.db).await.unwrap();
    let opened = house.put_up(b"again", json!({"key": "k"})).await;
    let begun = Instant::now();
    house.complete(&opened.id()).await.expect(200);
    assert!(begun.elapsed() > Duration::from_secs(2), "published under another's lease, after {:?}", begun.elapsed());
    assert_eq!(house.records(&house.topic).await.len(), 2);
}

/// A house whose Kafka is away while a thousand pointers of a few keys wait for it, and where its Kafka is.
async fn a_thousand_waiting() -> (House, String) {
    let mut house = House::with(|settings| settings.broker.complete_wait = Duration::ZERO).await;
    house.log_the_outbox().await;
    let id = house.put_up(b"hello", json!({"key": "seed"})).await.id();
    let kafka = house.settings.kafka.bootstrap_servers.clone();
    house.restart(|settings| settings.kafka.bootstrap_servers = CLOSED.to_owned()).await;
    house.complete(&id).await.expect(202);
    let multiply = "with made as (
             insert into upload_sessions
             select (jsonb_populate_record(seed, jsonb_build_object('id', gen_random_uuid(), 'object_key', object_key || '-' || n))).*
             from upload_sessions seed, generate_series(1, 999) n where seed.state = 'verified' returning *)
         insert into outbox (session_id, shard, topic, ordering, key, value, headers, created_at, next_try_at)
             select id, n % 20 % 4, topic, n % 20, convert_to('k' || n % 20, 'UTF8'), pointer,
                    jsonb_build_array(jsonb_build_array('lfs-upload-id', id)), verified_at, verified_at
             from (select *, row_number() over () n from made) numbered";
    sqlx::raw_sql(multiply).execute(&house.db).await.unwrap();
    assert_eq!(house.outbox().await, 1000);
    (house, kafka)
}

/// Publishes them, and asserts that it was in order.
async fn are_published_in_order(mut house: House, kafka: String) {
    house.restart(|settings| settings.kafka.bootstrap_servers = kafka).await;
    let begun = Instant::now();
    house.eventually("the backlog is gone", || async { house.outbox().await == 0 }).await;
    eprintln!("1,000 pointers in {:?}", begun.elapsed());
    let records = house.distinct_records().await;
    assert_eq!(records.len(), 1000);
    House::assert_in_order(&records, &house.promises().await);
}

#[tokio::test]
async fn a_thousand_pointers_that_waited_for_kafka_are_published_in_order() {
    let (house, kafka) = a_thousand_waiting().await;
    are_published_in_order(house, kafka).await;
}

#[tokio::test]
async fn a_pointer_that_was_refused_is_not_passed_by_its_key_when_a_batch_is_too_small_for_all() {
    let (mut house, kafka) = a_thousand_waiting().await;
    house.stop().await;
    // All in one shard. Of each key the first and the third have been refused, and are due again.
    let refused = "with nth as (select number, row_number() over (partition by ordering order by number) n from outbox)
         update outbox set shard = 0, error = case when n in (1, 3) then 'refused' end from nth where nth.number = outbox.number";
    sqlx::raw_sql(refused).execute(&house.db).await.unwrap();
    house.start(|_| {}).await;
    are_published_in_order(house, kafka).await;
}

impl House {
    /// Puts an upload's bytes and completes it, whether it is published by then or not.
    async fn promise(&self, more: serde_json::Value) -> String {
        let id = self.put_up(b"hello", more).await.id();
        assert!([200, 202].contains(&self.complete(&id).await.status));
        id
    }
}

#[tokio::test]
#[ignore = "needs a real Kafka: .ci/run runs it"]
async fn uploads_to_a_topic_that_may_not_be_written_are_parked_and_all_others_go_on() {
    let limited = std::env::var("LFS_TEST_KAFKA_LIMITED").expect("LFS_TEST_KAFKA_LIMITED names Kafka's SASL listener");
    for delivery in [Delivery::ExactlyOnce, Delivery::AtLeastOnce] {
        let house = House::with(|settings| {
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
        let refused_topic = format!("refused-{}", house.topic);
        house.make_topic(&refused_topic, 3).await;
        // Each shard has committed something before: only then Kafka refuses an abort too.
        let mut good = Vec::new();
        for number in 0..8 {
            good.push(house.promise(json!({"key": format!("first-{number}")})).await);
        }
        for id in &good {
            house.until(id, "published").await;
        }
        let mut bad = Vec::new();
        for number in 0..8 {
            bad.push(house.promise(json!({"topic": refused_topic, "key": format!("k{number}")})).await);
        }
        for number in 0..24 {
            good.push(house.promise(json!({"key": format!("k{number}")})).await);
        }
        for id in &good {
            house.until(id, "published").await;
        }
        for id in &bad {
            let parked = || async {
                let seen = house.upload(id).await;
                seen.state() == "verified"
                    && seen.json["error"]["detail"].as_str().is_some_and(|why| why.contains("TopicAuthorizationFailed"))
            };
            house.eventually("Kafka's reason is on the upload", parked).await;
        }
        assert_eq!(house.client().stats().await.unwrap().outbox.parked, 8);
        assert_eq!(house.records(&house.topic).await.len(), 32);
        // Redriven, it is tried now, and refused again.
        let version = house.upload(&bad[0]).await.json["version"].as_i64();
        house.post(&format!("/lfs/uploads/{}/redrive", bad[0]), &json!({})).await.expect(200);
        let again = || async {
            let seen = house.upload(&bad[0]).await;
            seen.json["version"].as_i64() > version.map(|version| version + 1) && !seen.json["error"].is_null()
        };
        house.eventually("it is refused again", again).await;
    }
}

#[tokio::test]
#[ignore = "needs a real Kafka: .ci/run runs it"]
async fn a_pointer_that_was_sent_is_found_in_its_topic_where_no_marker_tells_of_it() {
    let mut house = House::new().await;
    assert!(house.is_exactly_once(), "the embedded Kafka has transactions in name only");
    house.log_the_outbox().await;
    let done = house.publish(b"hello", json!({"key": "k"})).await;
    house.forget_the_mark().await;
    // As if the marker topic had been deleted: nothing is known under the new name.
    sqlx::raw_sql("update deployment set id = gen_random_uuid()").execute(&house.db).await.unwrap();
    house.crash(|_| {}).await;
    house.until(&done.id(), "published").await;
    assert_eq!(house.complete(&done.id()).await.expect(200).json, done.json);
    house.publish(b"after", json!({"key": "k"})).await;
    assert_eq!(house.records(&house.topic).await.len(), 2);
}

#[tokio::test]
#[ignore = "needs a real Kafka: .ci/run runs it"]
async fn an_upload_that_its_topic_never_takes_is_refused_at_open() {
    let house = House::new().await;
    let compacted = format!("{}-compacted", house.topic);
    house.make_topic(&compacted, 1).await;
    servers::set_config(&compacted, &[("cleanup.policy", "compact"), ("max.message.bytes", "2000")]).await;
    let refused = house.open(b"hello", json!({"topic": compacted})).await.expect_problem(422, "validation-failed");
    assert_eq!(refused.json["errors"][0]["pointer"], "/key");
    let large = json!({"topic": compacted, "key": "k", "headers": {"large": "x".repeat(1900)}});
    let refused = house.open(b"hello", large).await.expect_problem(422, "record-too-large");
    assert!(refused.json["detail"].as_str().unwrap().contains("takes 2000"), "{}", refused.text);
    // What is let in is taken: nothing is refused too early, or too late.
    let fits = |bytes: usize| json!({"topic": compacted, "key": "k", "headers": {"large": "x".repeat(bytes)}});
    let (mut fit, mut too_large) = (1000, 1900);
    while too_large - fit > 1 {
        let between = usize::midpoint(fit, too_large);
        match house.open(b"hello", fits(between)).await.status {
            201 => fit = between,
            _ => too_large = between,
        }
    }
    house.publish(b"hello", fits(fit - 20)).await;
}

#[tokio::test]
async fn uploads_say_why_while_kafka_takes_nothing() {
    let (mut house, kafka) = {
        let house = House::with(|settings| settings.broker.complete_wait = Duration::ZERO).await;
        let kafka = house.settings.kafka.bootstrap_servers.clone();
        (house, kafka)
    };
    let id = house.put_up(b"hello", json!({"key": "k"})).await.id();
    house.restart(|settings| settings.kafka.bootstrap_servers = CLOSED.to_owned()).await;
    house.complete(&id).await.expect(202);
    let told = || async { house.upload(&id).await.json["error"]["code"] == "dependency-unavailable" };
    house.eventually("the error is told", told).await;
    let seen = house.upload(&id).await;
    assert_eq!(seen.state(), "verified");
    assert!(!seen.text.contains(CLOSED), "{}", seen.text);
    let parked = house.client().stats().await.unwrap().outbox.parked;
    assert_eq!(parked, 0, "it is sent as soon as Kafka is back");
    house.restart(|settings| settings.kafka.bootstrap_servers = kafka).await;
    let done = house.until(&id, "published").await;
    assert!(done.json["error"].is_null(), "{}", done.text);
}
