//! S3, PostgreSQL or Kafka away: an answer within two seconds, nothing guessed, and recovery without help.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::harness::faults::{refused_soon, wire_to_database, wire_to_s3};
use crate::harness::proxy::Wire;
use crate::harness::uploads::PART;
use crate::harness::{House, bytes, sha256};

/// What nobody serves.
const CLOSED: &str = "127.0.0.1:9";

/// A house whose broker reaches S3 through a wire; its clients do not need it.
async fn house_behind_s3() -> (House, Wire) {
    let wire = wire_to_s3().await;
    let endpoint = format!("http://{}", wire.address());
    let house = House::with(|settings| {
        settings.objects.public_endpoint = settings.objects.endpoint.replace(endpoint);
    })
    .await;
    (house, wire)
}

async fn house_behind_database() -> (House, Wire) {
    house_behind_database_with(8).await
}

async fn house_behind_database_with(max_connections: u32) -> (House, Wire) {
    let wire = wire_to_database().await;
    let address = wire.address().to_string();
    let house = House::with(|settings| {
        settings.store.answer_within = lfs_broker::store::ANSWER_WITHIN;
        let (_, server) = settings.store.url.rsplit_once('@').unwrap();
        let (server, _) = server.split_once('/').unwrap();
        settings.store.url = settings.store.url.replace(server, &address);
        settings.store.max_connections = max_connections;
    })
    .await;
    (house, wire)
}

/// What can be asked of a broker without S3.
async fn without_s3(house: &House, wire: &Wire, silent: bool) {
    let content = bytes(PART + 9, 1);
    let waiting = house.put_up(b"hello", json!({})).await;
    let parts = house.put_up(&content, json!({"part_size": PART})).await;
    let reading = house.open_hashed_parts(&content, json!({})).await.expect(201);
    match silent {
        true => wire.silence(),
        false => wire.refuse().await,
    }
    let away = ["dependency-unavailable"];
    refused_soon(house.open_parts(&content, json!({})), &away).await;
    refused_soon(house.upload(&reading.id()), &away).await;
    refused_soon(house.complete(&waiting.id()), &away).await;
    let unknown = refused_soon(house.complete(&parts.id()), &["completion-unknown"]).await;
    assert_eq!(unknown.json["upload_state"], "completing");
    // One PUT is signed without asking S3.
    house.open(b"hello", json!({})).await.expect(201);
    let ready = house.get("/readyz").await.expect(503);
    assert_eq!((&ready.json["storage"]["ok"], &ready.json["database"]["ok"]), (&json!(false), &json!(true)));
    assert_eq!(house.records(&house.topic).await.len(), 0, "nothing was guessed");

    wire.restore().await;
    house.eventually("the broker is ready again", || async { house.get("/readyz").await.status == 200 }).await;
    house.insist(&waiting.id()).await;
    house.insist(&parts.id()).await;
    assert_eq!(house.upload(&reading.id()).await.expect(200).json["next"], "parts");
    assert_eq!(house.records(&house.topic).await.len(), 2);
}

#[tokio::test]
async fn an_s3_that_refuses_connections_is_told_within_two_seconds() {
    let (house, wire) = house_behind_s3().await;
    without_s3(&house, &wire, false).await;
}

#[tokio::test]
async fn an_s3_that_says_nothing_is_told_within_two_seconds() {
    let (house, wire) = house_behind_s3().await;
    without_s3(&house, &wire, true).await;
}

#[tokio::test]
async fn a_completion_that_s3_left_in_doubt_ends_without_anyone_asking() {
    let (house, wire) = house_behind_s3().await;
    let parts = house.put_up(&bytes(PART + 9, 2), json!({"part_size": PART})).await;
    wire.silence();
    refused_soon(house.complete(&parts.id()), &["completion-unknown"]).await;
    wire.restore().await;
    house.until(&parts.id(), "published").await;
    assert_eq!(house.records(&house.topic).await.len(), 1);
}

#[tokio::test]
async fn bytes_that_must_be_read_wait_for_s3() {
    let (house, wire) = house_behind_s3().await;
    let parts = house.put_up(&bytes(PART + 9, 3), json!({"part_size": PART})).await;
    let due = "update upload_sessions set state = 'completing', must_read = true, lease_owner = gen_random_uuid(),
                   lease_until = clock_timestamp(), version = version + 1";
    wire.refuse().await;
    sqlx::raw_sql(due).execute(&house.db).await.unwrap();
    house.eventually("the verifier has tried", || async { house.upload(&parts.id()).await.json["error"].is_object() }).await;
    assert_eq!(house.upload(&parts.id()).await.state(), "completing");
    wire.restore().await;
    // Its parts were never joined: it is the client's again.
    house.until(&parts.id(), "open").await;
    house.complete(&parts.id()).await;
    house.until(&parts.id(), "published").await;
    assert_eq!(house.records(&house.topic).await.len(), 1);
}

/// Every route, while the database is away.
async fn without_database(house: &House, wire: &Wire, silent: bool) {
    let content = bytes(PART + 9, 4);
    let single = house.put_up(b"hello", json!({"key": "k"})).await;
    let parts = house.put_up(&content, json!({"part_size": PART})).await;
    let done = house.publish(b"done", json!({})).await;
    let value = house.records(&house.topic).await.remove(0).value;
    match silent {
        true => wire.silence(),
        false => wire.refuse().await,
    }
    let id = parts.id();
    let away = ["dependency-unavailable"];
    refused_soon(house.upload(&id), &away).await;
    let (history, own) = (format!("/lfs/uploads/{id}/history"), format!("/lfs/uploads/{id}"));
    let (third, no_policy) = (done.id(), json!({}));
    // Two at a time: neither takes the other's.
    tokio::join!(refused_soon(house.open(b"new", json!({})), &away), refused_soon(house.get("/lfs/uploads"), &away));
    tokio::join!(refused_soon(house.get(&history), &away), refused_soon(house.sign(&id, json!({"part_numbers": [1]})), &away));
    tokio::join!(refused_soon(house.complete(&id), &away), refused_soon(house.complete(&third), &away));
    tokio::join!(refused_soon(house.delete(&own), &away), refused_soon(house.resolve(&value, ""), &away));
    tokio::join!(refused_soon(house.get("/lfs/topics"), &away), refused_soon(house.put_policy("other", &no_policy), &away));
    // More at once than the pool has connections.
    let many = (0..30).map(|_| refused_soon(house.upload(&id), &away));
    futures_util::future::join_all(many).await;
    let ready = house.get("/readyz").await.expect(503);
    assert_eq!((&ready.json["storage"]["ok"], &ready.json["database"]["ok"]), (&json!(true), &json!(false)));
    house.get("/healthz").await.expect(200);

    wire.restore().await;
    house.eventually("the broker is ready again", || async { house.get("/readyz").await.status == 200 }).await;
    house.insist(&single.id()).await;
    house.insist(&parts.id()).await;
    assert_eq!(house.complete(&done.id()).await.expect(200).json, done.json);
    assert_eq!(house.distinct_records().await.len(), 3);
}

#[tokio::test]
async fn a_database_that_refuses_connections_is_told_within_two_seconds() {
    let (house, wire) = house_behind_database().await;
    without_database(&house, &wire, false).await;
}

#[tokio::test]
async fn a_database_that_says_nothing_is_told_within_two_seconds() {
    let (house, wire) = house_behind_database().await;
    without_database(&house, &wire, true).await;
}

#[tokio::test]
async fn a_database_that_falls_silent_under_load_does_not_keep_its_connections() {
    let (house, wire) = house_behind_database().await;
    let mut ids = Vec::new();
    for number in 0..16 {
        ids.push(house.put_up(b"hello", json!({"key": format!("k{}", number % 3)})).await.id());
    }
    for id in &ids {
        let complete = house.http.post(format!("{}/lfs/uploads/{id}/complete", house.url()));
        tokio::spawn(complete.send());
    }
    tokio::time::sleep(Duration::from_millis(15)).await;
    // Everything that is under way in the database meets the silence.
    wire.silence();
    tokio::time::sleep(Duration::from_secs(2)).await;
    wire.restore().await;
    let back = Instant::now();
    house.eventually("the broker is ready again", || async { house.get("/readyz").await.status == 200 }).await;
    for id in &ids {
        // Who was told to come again does.
        house.insist(id).await;
        assert!(back.elapsed() < Duration::from_secs(20), "some waited until a lease had run out");
    }
    assert_eq!(house.distinct_records().await.len(), ids.len());
}

#[tokio::test]
async fn a_row_that_stays_locked_is_told_as_the_database_and_not_as_a_key_in_flight() {
    let house = House::new().await;
    let id = house.put_up(b"hello", json!({})).await.id();
    // As when a replica's connection hung in the middle of its transaction.
    let mut stuck = house.db.begin().await.unwrap();
    sqlx::query("select from upload_sessions for update").execute(&mut *stuck).await.unwrap();
    sqlx::query("select from tenants for update").execute(&mut *stuck).await.unwrap();
    refused_soon(house.delete(&format!("/lfs/uploads/{id}")), &["dependency-unavailable"]).await;
    refused_soon(house.open(b"x", json!({})), &["dependency-unavailable"]).await;
    let body = json!({"topic": house.topic, "size": 1, "sha256": sha256(b"x")});
    let under_key = house.request("POST", "/lfs/uploads").header("idempotency-key", "k").json(&body);
    refused_soon(house.send(under_key), &["dependency-unavailable"]).await;
    stuck.rollback().await.unwrap();
    house.complete(&id).await.expect(200);
}

#[tokio::test]
async fn a_key_that_is_being_stored_is_in_flight() {
    let house = House::new().await;
    let body = json!({"topic": house.topic, "size": 1, "sha256": sha256(b"x")});
    let open = || house.send(house.request("POST", "/lfs/uploads").header("idempotency-key", "k").json(&body));
    let first = open().await.expect(201).id();
    let mut stuck = house.db.begin().await.unwrap();
    // The same key, not yet committed: as the first request holds it while it is stored.
    sqlx::query("delete from idempotency_keys").execute(&house.db).await.unwrap();
    let store = "insert into idempotency_keys (tenant, subject, key, request_sha256, session_id, created_at)
                 select tenant, subject, 'k', '\\x00', id, now() from upload_sessions";
    sqlx::query(store).execute(&mut *stuck).await.unwrap();
    open().await.expect_problem(409, "idempotency-in-flight");
    stuck.rollback().await.unwrap();
    assert_ne!(open().await.expect(201).id(), first);
}

#[tokio::test]
async fn a_pool_whose_every_connection_hangs_is_whole_again() {
    let (house, wire) = house_behind_database_with(2).await;
    let id = house.open(b"hello", json!({})).await.expect(201).id();
    // Both connections wait for a lock when the database falls silent.
    let mut lock = house.db.begin().await.unwrap();
    sqlx::raw_sql("lock table upload_sessions in access exclusive mode").execute(&mut *lock).await.unwrap();
    let stuck = (0..6).map(|_| tokio::spawn(house.http.get(format!("{}/lfs/uploads/{id}", house.url())).send()));
    let stuck: Vec<_> = stuck.collect();
    tokio::time::sleep(Duration::from_millis(300)).await;
    wire.silence();
    lock.rollback().await.unwrap();
    for stuck in stuck {
        assert_eq!(stuck.await.unwrap().unwrap().status(), 503);
    }
    wire.restore().await;
    house.eventually("the broker is ready again", || async { house.get("/readyz").await.status == 200 }).await;
    house.upload(&id).await.expect(200);
}

#[tokio::test]
async fn without_kafka_uploads_are_promised_and_published_later() {
    let mut house = House::new().await;
    let ids = [house.put_up(b"one", json!({"key": "k"})).await.id(), house.put_up(b"two", json!({"key": "k"})).await.id()];
    let kafka = house.settings.kafka.bootstrap_servers.clone();
    house
        .restart(|settings| {
            settings.kafka.bootstrap_servers = CLOSED.to_owned();
            settings.broker.complete_wait = Duration::from_secs(1);
        })
        .await;
    // A topic that this broker has never seen.
    refused_soon(house.open(b"three", json!({})), &["dependency-unavailable"]).await;
    let ready = house.get("/readyz").await.expect(200);
    assert_eq!((ready.json["status"].as_str(), &ready.json["kafka"]["ok"]), (Some("degraded"), &json!(false)));
    for id in &ids {
        let begun = Instant::now();
        let promised = house.complete(id).await.expect(202);
        assert!(begun.elapsed() < Duration::from_millis(2500), "promised after {:?}", begun.elapsed());
        assert_eq!((promised.state(), promised.headers.contains_key("retry-after")), ("verified", true));
        assert_eq!(promised.json["pointer"]["sha256"], json!(sha256(if id == &ids[0] { b"one" } else { b"two" })));
    }
    house.restart(|settings| settings.kafka.bootstrap_servers = kafka).await;
    for id in &ids {
        house.until(id, "published").await;
    }
    let records = house.records(&house.topic).await;
    let sent: Vec<String> = records.iter().map(crate::harness::faults::upload_of).collect();
    assert_eq!(sent, ids);
}
