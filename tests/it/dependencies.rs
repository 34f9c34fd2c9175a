//! S3, PostgreSQL or Kafka is away: the broker answers within two seconds, assumes nothing, and recovers by itself.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::harness::fault_proxy::FaultProxy;
use crate::harness::faults::{expect_quick_refusal, proxy_to_database, proxy_to_s3, retry_while_unavailable};
use crate::harness::uploads::PART_BYTES;
use crate::harness::{TestBroker, bytes, sha256};

/// A port on which no server listens.
const NO_SERVER: &str = "127.0.0.1:9";

/// A test broker that reaches S3 through a proxy; its clients connect to S3 directly.
async fn broker_behind_s3() -> (TestBroker, FaultProxy) {
    let proxy = proxy_to_s3().await;
    let endpoint = format!("http://{}", proxy.address());
    let broker = TestBroker::start_with(|settings| {
        settings.objects.public_endpoint = settings.objects.endpoint.replace(endpoint);
        settings.objects.call_timeout = None;
    })
    .await;
    (broker, proxy)
}

async fn broker_behind_database() -> (TestBroker, FaultProxy) {
    broker_behind_database_with(8).await
}

async fn broker_behind_database_with(max_connections: u32) -> (TestBroker, FaultProxy) {
    let proxy = proxy_to_database().await;
    let address = proxy.address().to_string();
    let broker = TestBroker::start_with(|settings| {
        settings.store.call_timeout = lfs_broker::store::CALL_TIMEOUT;
        let (_, server) = settings.store.url.rsplit_once('@').unwrap();
        let (server, _) = server.split_once('/').unwrap();
        settings.store.url = settings.store.url.replace(server, &address);
        settings.store.max_connections = max_connections;
    })
    .await;
    (broker, proxy)
}

/// What the broker answers while S3 is away.
async fn without_s3(broker: &TestBroker, proxy: &FaultProxy, stalled: bool) {
    let content = bytes(PART_BYTES + 9, 1);
    let waiting = broker.open_and_put(b"hello", json!({})).await;
    let parts = broker.open_and_put(&content, json!({"part_size": PART_BYTES})).await;
    let open = async || broker.open_multipart_with_hashes(&content, json!({})).await;
    let reading = retry_while_unavailable(open).await.expect(201);
    match stalled {
        true => proxy.stall(),
        false => proxy.refuse_connections().await,
    }
    let away = ["dependency-unavailable"];
    expect_quick_refusal(async || broker.open_multipart(&content, json!({})).await, &away).await;
    expect_quick_refusal(async || broker.upload(&reading.id()).await, &away).await;
    expect_quick_refusal(async || broker.complete(&waiting.id()).await, &away).await;
    let unknown = expect_quick_refusal(async || broker.complete(&parts.id()).await, &["completion-unknown"]).await;
    assert_eq!(unknown.json["upload_state"], "completing");
    // The broker presigns a single PUT without a call to S3.
    broker.open(b"hello", json!({})).await.expect(201);
    let ready = broker.get("/readyz").await.expect(503);
    assert_eq!((&ready.json["storage"]["ok"], &ready.json["database"]["ok"]), (&json!(false), &json!(true)));
    assert_eq!(broker.records(&broker.topic).await.len(), 0, "no pointer was published");

    proxy.restore().await;
    broker.eventually("the broker is ready again", || async { broker.get("/readyz").await.status == 200 }).await;
    broker.complete_with_retries(&waiting.id()).await;
    broker.complete_with_retries(&parts.id()).await;
    let read = retry_while_unavailable(async || broker.upload(&reading.id()).await).await.expect(200);
    assert_eq!(read.json["next"], "parts");
    assert_eq!(broker.records(&broker.topic).await.len(), 2);
}

#[tokio::test]
async fn an_s3_that_refuses_connections_is_reported_within_two_seconds() {
    let (broker, proxy) = broker_behind_s3().await;
    without_s3(&broker, &proxy, false).await;
}

#[tokio::test]
async fn an_s3_that_does_not_answer_is_reported_within_two_seconds() {
    let (broker, proxy) = broker_behind_s3().await;
    without_s3(&broker, &proxy, true).await;
}

#[tokio::test]
async fn a_completion_that_s3_left_unanswered_is_completed_without_a_further_request() {
    let (broker, proxy) = broker_behind_s3().await;
    let parts = broker.open_and_put(&bytes(PART_BYTES + 9, 2), json!({"part_size": PART_BYTES})).await;
    proxy.stall();
    expect_quick_refusal(async || broker.complete(&parts.id()).await, &["completion-unknown"]).await;
    proxy.restore().await;
    broker.wait_for_state(&parts.id(), "published").await;
    assert_eq!(broker.records(&broker.topic).await.len(), 1);
}

#[tokio::test]
async fn an_upload_that_must_be_read_back_waits_for_s3() {
    let (broker, proxy) = broker_behind_s3().await;
    let parts = broker.open_and_put(&bytes(PART_BYTES + 9, 3), json!({"part_size": PART_BYTES})).await;
    let due = "update upload_sessions set state = 'completing', must_read = true, lease_owner = gen_random_uuid(),
                   lease_until = clock_timestamp(), version = version + 1";
    proxy.refuse_connections().await;
    sqlx::raw_sql(due).execute(&broker.db).await.unwrap();
    broker.eventually("the verifier has tried", || async { broker.upload(&parts.id()).await.json["error"].is_object() }).await;
    assert_eq!(broker.upload(&parts.id()).await.state(), "completing");
    proxy.restore().await;
    // Its parts were never joined: the upload is open again.
    broker.wait_for_state(&parts.id(), "open").await;
    retry_while_unavailable(async || broker.complete(&parts.id()).await).await;
    broker.wait_for_state(&parts.id(), "published").await;
    assert_eq!(broker.records(&broker.topic).await.len(), 1);
}

/// What every route answers while the database is away.
async fn without_database(broker: &TestBroker, proxy: &FaultProxy, stalled: bool) {
    let content = bytes(PART_BYTES + 9, 4);
    let single = broker.open_and_put(b"hello", json!({"key": "k"})).await;
    let parts = broker.open_and_put(&content, json!({"part_size": PART_BYTES})).await;
    let done = broker.publish(b"done", json!({})).await;
    let value = broker.records(&broker.topic).await.remove(0).value;
    match stalled {
        true => proxy.stall(),
        false => proxy.refuse_connections().await,
    }
    let id = parts.id();
    let away = ["dependency-unavailable"];
    expect_quick_refusal(async || broker.upload(&id).await, &away).await;
    let (history, own) = (format!("/lfs/uploads/{id}/history"), format!("/lfs/uploads/{id}"));
    let (third, no_policy) = (done.id(), json!({}));
    // Two requests at a time, so that neither takes the other's connection.
    tokio::join!(
        expect_quick_refusal(async || broker.open(b"new", json!({})).await, &away),
        expect_quick_refusal(async || broker.get("/lfs/uploads").await, &away)
    );
    tokio::join!(
        expect_quick_refusal(async || broker.get(&history).await, &away),
        expect_quick_refusal(async || broker.presign_parts(&id, json!({"part_numbers": [1]})).await, &away)
    );
    tokio::join!(
        expect_quick_refusal(async || broker.complete(&id).await, &away),
        expect_quick_refusal(async || broker.complete(&third).await, &away)
    );
    tokio::join!(
        expect_quick_refusal(async || broker.delete(&own).await, &away),
        expect_quick_refusal(async || broker.resolve(&value, "").await, &away)
    );
    tokio::join!(
        expect_quick_refusal(async || broker.get("/lfs/topics").await, &away),
        expect_quick_refusal(async || broker.put_policy("other", &no_policy).await, &away)
    );
    // More requests at once than the pool has connections.
    let many = (0..30).map(|_| expect_quick_refusal(async || broker.upload(&id).await, &away));
    futures_util::future::join_all(many).await;
    let ready = broker.get("/readyz").await.expect(503);
    assert_eq!((&ready.json["storage"]["ok"], &ready.json["database"]["ok"]), (&json!(true), &json!(false)));
    broker.get("/healthz").await.expect(200);

    proxy.restore().await;
    broker.eventually("the broker is ready again", || async { broker.get("/readyz").await.status == 200 }).await;
    broker.complete_with_retries(&single.id()).await;
    broker.complete_with_retries(&parts.id()).await;
    let again = retry_while_unavailable(async || broker.complete(&done.id()).await).await;
    assert_eq!(again.expect(200).json, done.json);
    assert_eq!(broker.distinct_records().await.len(), 3);
}

#[tokio::test]
async fn a_database_that_refuses_connections_is_reported_within_two_seconds() {
    let (broker, proxy) = broker_behind_database().await;
    without_database(&broker, &proxy, false).await;
}

#[tokio::test]
async fn a_database_that_does_not_answer_is_reported_within_two_seconds() {
    let (broker, proxy) = broker_behind_database().await;
    without_database(&broker, &proxy, true).await;
}

#[tokio::test]
async fn a_database_that_stalls_under_load_does_not_keep_the_pools_connections() {
    const LEASE: Duration = Duration::from_secs(120);
    let (mut broker, proxy) = broker_behind_database().await;
    broker.restart(|settings| settings.completion.lease = LEASE).await;
    let mut ids = Vec::new();
    for number in 0..16 {
        ids.push(broker.open_and_put(b"hello", json!({"key": format!("k{}", number % 3)})).await.id());
    }
    let complete = |id: &String| tokio::spawn(broker.http.post(format!("{}/lfs/uploads/{id}/complete", broker.url())).send());
    let completes: Vec<_> = ids.iter().map(complete).collect();
    // Any moment of the completions will do; this one is in the middle of them on an idle machine.
    tokio::time::sleep(Duration::from_millis(15)).await;
    // Every statement in flight stalls, until its timeout ends the request.
    proxy.stall();
    for complete in completes {
        let response = complete.await.unwrap().unwrap();
        assert!([200, 202, 503].contains(&response.status().as_u16()), "{response:?}");
    }
    proxy.restore().await;
    let recovered = Instant::now();
    broker.eventually("the broker is ready again", || async { broker.get("/readyz").await.status == 200 }).await;
    for id in &ids {
        // Each client retries after its 503.
        broker.complete_with_retries(id).await;
        assert!(recovered.elapsed() < LEASE / 2, "a completion waited until a lease of {LEASE:?} had expired");
    }
    assert_eq!(broker.distinct_records().await.len(), ids.len());
}

#[tokio::test]
async fn a_locked_row_is_reported_as_database_unavailable_and_not_as_a_key_in_flight() {
    let broker = TestBroker::start().await;
    let id = broker.open_and_put(b"hello", json!({})).await.id();
    // As when a replica's connection hangs in the middle of its transaction.
    let mut blocking = broker.db.begin().await.unwrap();
    sqlx::query("select from upload_sessions for update").execute(&mut *blocking).await.unwrap();
    sqlx::query("select from tenants for update").execute(&mut *blocking).await.unwrap();
    expect_quick_refusal(async || broker.delete(&format!("/lfs/uploads/{id}")).await, &["dependency-unavailable"]).await;
    expect_quick_refusal(async || broker.open(b"x", json!({})).await, &["dependency-unavailable"]).await;
    let body = json!({"topic": broker.topic, "size": 1, "sha256": sha256(b"x")});
    let under_key = || broker.request("POST", "/lfs/uploads").header("idempotency-key", "k").json(&body);
    expect_quick_refusal(async || broker.send(under_key()).await, &["dependency-unavailable"]).await;
    blocking.rollback().await.unwrap();
    broker.complete(&id).await.expect(200);
}

#[tokio::test]
async fn an_idempotency_key_that_is_being_stored_is_in_flight() {
    let broker = TestBroker::start().await;
    let body = json!({"topic": broker.topic, "size": 1, "sha256": sha256(b"x")});
    let open = || broker.send(broker.request("POST", "/lfs/uploads").header("idempotency-key", "k").json(&body));
    let first = open().await.expect(201).id();
    let mut blocking = broker.db.begin().await.unwrap();
    // The same key, not yet committed, as while the first request stores it.
    sqlx::query("delete from idempotency_keys").execute(&broker.db).await.unwrap();
    let store = "insert into idempotency_keys (tenant, subject, key, request_sha256, session_id, created_at)
                 select tenant, subject, 'k', '\\x00', id, now() from upload_sessions";
    sqlx::query(store).execute(&mut *blocking).await.unwrap();
    open().await.expect_problem(409, "idempotency-in-flight");
    blocking.rollback().await.unwrap();
    assert_ne!(open().await.expect(201).id(), first);
}

#[tokio::test]
async fn a_pool_recovers_after_every_connection_has_stalled() {
    let (broker, proxy) = broker_behind_database_with(2).await;
    let id = broker.open_and_put(b"hello", json!({})).await.id();
    // Both connections wait for a lock when the database stalls.
    let mut lock = broker.db.begin().await.unwrap();
    sqlx::raw_sql("lock table upload_sessions in access exclusive mode").execute(&mut *lock).await.unwrap();
    let blocking = (0..6).map(|_| tokio::spawn(broker.http.get(format!("{}/lfs/uploads/{id}", broker.url())).send()));
    let blocking: Vec<_> = blocking.collect();
    broker
        .eventually("both connections wait", async || {
            broker.backends("query like '%upload_sessions%' and wait_event_type = 'Lock'").await == 2
        })
        .await;
    proxy.stall();
    lock.rollback().await.unwrap();
    for blocking in blocking {
        assert_eq!(blocking.await.unwrap().unwrap().status(), 503);
    }
    proxy.restore().await;
    broker.eventually("the broker is ready again", || async { broker.get("/readyz").await.status == 200 }).await;
    retry_while_unavailable(async || broker.upload(&id).await).await.expect(200);
}

#[tokio::test]
async fn without_kafka_uploads_are_verified_and_published_later() {
    let mut broker = TestBroker::start().await;
    let ids = [
        broker.open_and_put(b"one", json!({"key": "k"})).await.id(),
        broker.open_and_put(b"two", json!({"key": "k"})).await.id(),
    ];
    let kafka = broker.settings.kafka.bootstrap_servers.clone();
    broker
        .restart(|settings| {
            settings.kafka.bootstrap_servers = NO_SERVER.to_owned();
            settings.broker.complete_wait = Duration::from_secs(1);
        })
        .await;
    // This broker has no metadata of the topic yet.
    expect_quick_refusal(async || broker.open(b"three", json!({})).await, &["dependency-unavailable"]).await;
    let ready = broker.get("/readyz").await.expect(200);
    assert_eq!((ready.json["status"].as_str(), &ready.json["kafka"]["ok"]), (Some("degraded"), &json!(false)));
    for id in &ids {
        // Without a limit the answer comes when Kafka is back; the test's client waits for a minute.
        broker.complete_in_time(id, Duration::from_secs(60)).await.expect(202);
        let verified = broker.complete_until_verified(id).await.expect(202);
        assert_eq!((verified.state(), verified.headers.contains_key("retry-after")), ("verified", true));
        assert_eq!(verified.json["pointer"]["sha256"], json!(sha256(if id == &ids[0] { b"one" } else { b"two" })));
    }
    broker.restart(|settings| settings.kafka.bootstrap_servers = kafka).await;
    for id in &ids {
        broker.wait_for_state(id, "published").await;
    }
    let records = broker.records(&broker.topic).await;
    let sent: Vec<String> = records.iter().map(crate::harness::faults::upload_id_of).collect();
    assert_eq!(sent, ids);
}
