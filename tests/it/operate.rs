//! Operators: try a pointer again, look at an object again, and how things stand.

use std::time::Duration;

use lfs_broker_client::api::Redrive;
use serde_json::json;
use uuid::Uuid;

use crate::harness::tokens::token;
use crate::harness::uploads::{PART, digest};
use crate::harness::{Answer, House, bytes};

async fn impatient_house() -> House {
    House::with(|settings| settings.broker.complete_wait = Duration::from_secs(1)).await
}

/// An upload whose pointer Kafka refuses: the partition that was asked for is gone.
async fn parked(house: &House, content: &[u8]) -> String {
    let opened = house.open(content, json!({"partition": 2, "key": "k"})).await.expect(201);
    let id = opened.id();
    let gone = sqlx::query("update upload_sessions set record_partition = 77 where id = $1");
    gone.bind(id.parse::<Uuid>().unwrap()).execute(&house.db).await.unwrap();
    house.put(&opened.json["upload"], content).await.expect(200);
    assert_eq!(house.complete(&id).await.expect(202).state(), "verified");
    house.eventually("it is parked", || async { !house.upload(&id).await.json["error"].is_null() }).await;
    id
}

async fn redrive(house: &House, id: &str, body: &serde_json::Value) -> Answer {
    house.post(&format!("/lfs/uploads/{id}/redrive"), body).await
}

async fn reverify(house: &House, id: &str) -> Answer {
    house.send(house.request("POST", &format!("/lfs/uploads/{id}/reverify"))).await
}

#[tokio::test]
async fn a_pointer_for_a_partition_that_is_gone_is_redriven_to_another() {
    let house = impatient_house().await;
    let id = parked(&house, b"hello").await;
    // Without the partition cleared it is tried again, and refused again.
    let attempts = || async { sqlx::query_scalar::<_, i32>("select attempts from outbox").fetch_one(&house.db).await.unwrap() };
    let before = attempts().await;
    let again = house.send(house.request("POST", &format!("/lfs/uploads/{id}/redrive"))).await.expect(200);
    assert_eq!((again.id(), again.state()), (id.clone(), "verified"));
    // Its attempts are counted anew.
    house.eventually("it is tried again", || async { attempts().await != before }).await;
    house.eventually("it is refused again", || async { !house.upload(&id).await.json["error"].is_null() }).await;
    assert!(house.records(&house.topic).await.is_empty());

    let cleared = redrive(&house, &id, &json!({"clear_partition": true})).await.expect(200);
    assert!(["verified", "published"].contains(&cleared.state()), "{}", cleared.text);
    let published = house.until(&id, "published").await;
    assert!(published.json["error"].is_null(), "{}", published.text);
    let records = house.records(&house.topic).await;
    assert_eq!(records.len(), 1);
    assert_eq!(json!(records[0].partition), published.json["record"]["partition"]);
    let history = house.get(&format!("/lfs/uploads/{id}/history")).await.expect(200);
    let reasons: Vec<&str> =
        history.json["items"].as_array().unwrap().iter().filter_map(|item| item["reason"].as_str()).collect();
    assert!(reasons.contains(&"redrive was asked for"), "{reasons:?}");
    assert!(reasons.contains(&"redrive to any partition was asked for"), "{reasons:?}");

    let same = redrive(&house, &id, &json!({"clear_partition": true})).await.expect(200);
    assert_eq!(same.json["version"], published.json["version"]);
}

#[tokio::test]
async fn what_comes_after_a_parked_pointer_of_its_key_follows_it_when_it_is_redriven() {
    let house = impatient_house().await;
    let first = parked(&house, b"first").await;
    let opened = house.open(b"second", json!({"key": "k"})).await.expect(201);
    house.put(&opened.json["upload"], b"second").await.expect(200);
    assert_eq!(house.complete(&opened.id()).await.expect(202).state(), "verified");
    house.client().redrive(first.parse().unwrap(), &Redrive { clear_partition: true }).await.unwrap();
    let (first, second) = (house.until(&first, "published").await, house.until(&opened.id(), "published").await);
    assert_eq!(first.json["record"]["partition"], second.json["record"]["partition"]);
    assert!(first.json["record"]["offset"].as_i64() < second.json["record"]["offset"].as_i64());
}

#[tokio::test]
async fn an_upload_that_kafka_will_never_take_is_discarded_and_holds_nothing_up() {
    let house = impatient_house().await;
    let id = parked(&house, b"hello").await;
    let behind = house.open(b"behind", json!({"key": "k"})).await.expect(201);
    house.put(&behind.json["upload"], b"behind").await.expect(200);
    house.complete(&behind.id()).await.expect(202);
    let why = house.upload(&id).await.json["error"]["detail"].clone();

    let discarded = house.send(house.request("POST", &format!("/lfs/uploads/{id}/discard"))).await.expect(200);
    assert_eq!((discarded.state(), discarded.json["error"]["code"].as_str()), ("rejected", Some("unpublishable")));
    assert_eq!(discarded.json["error"]["detail"], why, "Kafka's last word");
    assert!(why.as_str().unwrap().contains("none with number 77"), "{why}");
    house.until(&behind.id(), "published").await;
    for _ in 0..2 {
        let told = house.complete(&id).await.expect_problem(422, "unpublishable");
        assert_eq!((told.json["detail"].clone(), told.json["upload_state"].as_str()), (why.clone(), Some("rejected")));
    }
    house.client().discard(id.parse().unwrap()).await.unwrap_err();
    let again = house.send(house.request("POST", &format!("/lfs/uploads/{id}/discard"))).await;
    assert_eq!(again.expect_problem(409, "state-conflict").json["upload_state"], "rejected");
    let key = discarded.json["object_key"].as_str().unwrap().to_owned();
    let gone = || async { house.s3.head_object().bucket(&house.bucket).key(&key).send().await.is_err() };
    house.eventually("its object is removed", gone).await;
    let history = house.get(&format!("/lfs/uploads/{id}/history")).await.expect(200);
    let last = history.json["items"].as_array().unwrap().last().unwrap().clone();
    assert_eq!((last["from"].as_str(), last["to"].as_str()), (Some("verified"), Some("rejected")));
    assert!(last["by"].as_str().unwrap().starts_with("client:"), "{last}");
    assert_eq!(house.records(&house.topic).await.len(), 1);
    assert_eq!(house.client().stats().await.unwrap().uploads["rejected"], 1);
}

#[tokio::test]
async fn only_a_pointer_that_kafka_has_refused_can_be_discarded() {
    let house = impatient_house().await;
    let open = house.open(b"hello", json!({})).await.expect(201).id();
    let published = house.put_up(b"hello", json!({})).await.id();
    house.complete(&published).await;
    house.until(&published, "published").await;
    // Behind a parked one of its key: nobody has refused this one.
    let first = parked(&house, b"first").await;
    let behind = house.open(b"behind", json!({"key": "k"})).await.expect(201);
    house.put(&behind.json["upload"], b"behind").await.expect(200);
    house.complete(&behind.id()).await.expect(202);
    // Parked, and being sent again at this moment.
    sqlx::query("update outbox set batch = 77 where error is not null").execute(&house.db).await.unwrap();
    for (id, state) in [(open, "open"), (published, "published"), (behind.id(), "verified"), (first, "verified")] {
        let refused = house.send(house.request("POST", &format!("/lfs/uploads/{id}/discard"))).await;
        assert_eq!(refused.expect_problem(409, "state-conflict").json["upload_state"], state);
        assert_eq!(house.upload(&id).await.state(), state);
    }
}

#[tokio::test]
async fn only_what_is_promised_can_be_redriven_or_looked_at_again() {
    let house = House::new().await;
    let open = house.open(b"hello", json!({})).await.expect(201).id();
    let aborted = house.open(b"hello", json!({})).await.expect(201).id();
    house.delete(&format!("/lfs/uploads/{aborted}")).await.expect(204);
    for (id, state) in [(open, "open"), (aborted, "aborted")] {
        let refused = redrive(&house, &id, &json!({})).await.expect_problem(409, "state-conflict");
        assert_eq!(refused.json["upload_state"], state);
        reverify(&house, &id).await.expect_problem(409, "state-conflict");
    }
    let nobody = Uuid::now_v7().to_string();
    redrive(&house, &nobody, &json!({})).await.expect_problem(404, "upload-not-found");
    reverify(&house, &nobody).await.expect_problem(404, "upload-not-found");
    redrive(&house, &nobody, &json!({"clear": true})).await.expect_problem(422, "validation-failed");
}

#[tokio::test]
async fn an_object_is_held_against_its_record_again() {
    let house = House::new().await;
    let mut uploads = Vec::new();
    for content in [b"sound", b"other", b"empty", b"alien"] {
        let id = house.publish(content, json!({})).await.id();
        let key = house.upload(&id).await.json["object_key"].as_str().unwrap().to_owned();
        let sound = reverify(&house, &id).await.expect(200);
        assert_eq!(sound.json, json!({"valid": true, "size": 5, "integrity": "sha256"}));
        uploads.push((id, key));
    }
    house.put_object(&uploads[1].1, b"other than it was", Some(&uploads[1].0)).await;
    reverify(&house, &uploads[1].0).await.expect_problem(422, "size-mismatch");
    house.s3.delete_object().bucket(&house.bucket).key(&uploads[2].1).send().await.unwrap();
    reverify(&house, &uploads[2].0).await.expect_problem(410, "object-gone");
    house.put_object(&uploads[3].1, b"alien", Some("somebody")).await;
    reverify(&house, &uploads[3].0).await.expect_problem(422, "object-foreign");
    let sound = house.client().reverify(uploads[0].0.parse().unwrap()).await.unwrap();
    assert_eq!((sound.valid, sound.size), (true, 5));
}

#[tokio::test]
async fn bytes_that_were_replaced_under_the_write_token_are_not_called_proved() {
    let house = House::new().await;
    let policy = json!({"checksums": ["sha256", "crc32"], "min_integrity": "checksum"});
    house.put_policy(&house.topic, &policy).await.expect(200);
    let crc32 = json!({"sha256": null, "checksum_alg": "crc32", "checksum": digest("crc32", b"hello")});
    for promise in [json!({}), crc32] {
        let id = house.publish(b"hello", promise).await.id();
        let key = house.upload(&id).await.json["object_key"].as_str().unwrap().to_owned();
        house.put_object(&key, b"olleh", Some(&id)).await;
        let refused = reverify(&house, &id).await.expect_problem(422, "checksum-mismatch");
        assert!(refused.json["detail"].as_str().unwrap().starts_with("promised "), "{}", refused.text);
    }

    let content = bytes(PART + 7, 3);
    let opened = house.open_hashed_parts(&content, json!({})).await.expect(201);
    house.put_parts(&opened.json["parts"], &content).await;
    let done = house.complete_and_wait(&opened.id(), json!({})).await;
    assert_eq!(done.json["integrity"], "parts-sha256");
    reverify(&house, &opened.id()).await.expect(200);
    house.put_object(opened.json["object_key"].as_str().unwrap(), &bytes(PART + 7, 4), Some(&opened.id())).await;
    reverify(&house, &opened.id()).await.expect_problem(422, "checksum-mismatch");
}

#[tokio::test]
async fn the_figures_are_those_of_the_house() {
    let house = impatient_house().await;
    let fresh = house.client().stats().await.unwrap();
    assert_eq!(fresh.uploads.len(), 7);
    assert_eq!((fresh.uploads.values().sum::<u64>(), fresh.oldest_verified_seconds), (0, None));
    let parked = parked(&house, b"parked").await;
    // It waits behind the parked one of its key.
    let behind = house.open(b"behind", json!({"key": "k"})).await.expect(201);
    house.put(&behind.json["upload"], b"behind").await.expect(200);
    house.complete(&behind.id()).await.expect(202);
    house.publish(b"through", json!({"key": "another"})).await;
    house.open(b"open", json!({})).await.expect(201);
    // A redrive may be under way in no time, so the parked one is counted before.
    let stats = house.get("/lfs/stats").await.expect(200).json;
    let uploads = json!({"open": 1, "completing": 0, "verified": 2, "published": 1, "aborted": 0, "expired": 0, "rejected": 0});
    assert_eq!(stats["uploads"], uploads);
    assert_eq!(stats["outbox"]["waiting"].as_u64().unwrap() + stats["outbox"]["parked"].as_u64().unwrap(), 2);
    assert!(stats["oldest_verified_seconds"].as_u64().unwrap() < 60);
    house.push_clock(Duration::from_secs(1000));
    let later = house.client().stats().await.unwrap();
    assert!(later.oldest_verified_seconds.unwrap() >= 1000);
    assert!(later.dependencies.database.ok && later.dependencies.storage.ok && later.dependencies.kafka.ok);
    redrive(&house, &parked, &json!({"clear_partition": true})).await.expect(200);
    house.until(&behind.id(), "published").await;
    let outbox = house.client().stats().await.unwrap().outbox;
    assert_eq!((outbox.waiting, outbox.parked), (0, 0));
}

#[tokio::test]
async fn operating_needs_an_administrator() {
    let house = House::with_tokens(|_| {}).await;
    let id = Uuid::now_v7();
    for (method, path) in [
        ("POST", format!("/lfs/uploads/{id}/redrive")),
        ("POST", format!("/lfs/uploads/{id}/reverify")),
        ("GET", "/lfs/stats".into()),
    ] {
        house.send(house.request(method, &path)).await.expect_problem(401, "unauthenticated");
        let user = house.request(method, &path).bearer_auth(token("acme", "lfs:read lfs:write", &["*"]));
        house.send(user).await.expect_problem(403, "insufficient-scope");
        let admin = house.send(house.request(method, &path).bearer_auth(token("acme", "lfs:admin", &["*"]))).await;
        assert_eq!(admin.status, if method == "GET" { 200 } else { 404 }, "{}", admin.text);
    }
}
