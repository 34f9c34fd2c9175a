//! Crashes: what is under way goes on, whoever comes next, and nothing is lost or done twice.

use std::time::{Duration, Instant};

use aws_sdk_s3::types::{CompletedMultipartUpload, CompletedPart};
use serde_json::{Value, json};

use crate::harness::faults::upload_of;
use crate::harness::uploads::PART;
use crate::harness::{House, bytes};

/// What nobody serves.
const CLOSED: &str = "127.0.0.1:9";

/// Longer than a dead owner's lease.
const LEASE_OVER: Duration = Duration::from_secs(31);

/// Joins an upload's parts as a broker does that dies before it can write that down.
async fn join_parts(house: &House, opened: &Value) {
    let (key, id) = (opened["object_key"].as_str().unwrap(), opened["id"].as_str().unwrap());
    let s3_id: (String,) = sqlx::query_as("select s3_upload_id from upload_sessions where id = $1::uuid")
        .bind(id)
        .fetch_one(&house.db)
        .await
        .unwrap();
    let listed = house.s3.list_parts().bucket(&house.bucket).key(key).upload_id(&s3_id.0).send().await.unwrap();
    let parts = listed.parts().iter().map(|part| {
        CompletedPart::builder()
            .set_part_number(part.part_number())
            .set_e_tag(part.e_tag().map(str::to_owned))
            .set_checksum_sha256(part.checksum_sha256().map(str::to_owned))
            .build()
    });
    let parts = CompletedMultipartUpload::builder().set_parts(Some(parts.collect())).build();
    let finish = house.s3.complete_multipart_upload().bucket(&house.bucket).key(key).upload_id(&s3_id.0);
    finish.multipart_upload(parts).send().await.unwrap_or_else(|error| panic!("{error:?}"));
}

#[tokio::test]
async fn an_upload_outlives_crashes_at_every_step() {
    let mut house = House::new().await;
    let content = bytes(2 * PART + 9, 1);
    let single = house.open(b"hello", json!({"key": "k"})).await.expect(201);
    let parts = house.open_hashed_parts(&content, json!({"key": "k"})).await.expect(201);
    house.crash(|_| {}).await;
    house.put(&single.json["upload"], b"hello").await.expect(200);
    house.put(&parts.json["parts"][0], &content[..PART]).await.expect(200);
    house.crash(|_| {}).await;
    assert_eq!(house.upload(&single.id()).await.json["next"], "complete");
    assert_eq!(house.upload(&parts.id()).await.json["missing_parts"], json!([[2, 3]]));
    house.put(&parts.json["parts"][1], &content[PART..2 * PART]).await.expect(200);
    house.put(&parts.json["parts"][2], &content[2 * PART..]).await.expect(200);
    house.crash(|_| {}).await;
    let first = house.complete(&single.id()).await.expect(200);
    let second = house.complete(&parts.id()).await.expect(200);
    house.crash(|_| {}).await;
    assert_eq!(house.complete(&single.id()).await.expect(200).json, first.json);
    assert_eq!(house.complete(&parts.id()).await.expect(200).json, second.json);
    assert_eq!(house.distinct_records().await.len(), 2);
    assert_eq!(house.quota().await, (0, 0));
}

#[tokio::test]
async fn an_open_whose_answer_was_lost_in_a_crash_is_asked_again() {
    let mut house = House::new().await;
    let content = bytes(PART + 9, 2);
    let body =
        json!({"topic": house.topic, "size": content.len(), "sha256": crate::harness::sha256(&content), "part_size": PART});
    let open = async |house: &House| {
        house.send(house.request("POST", "/lfs/uploads").header("idempotency-key", "one").json(&body)).await
    };
    let first = open(&house).await.expect(201);
    // As when the broker died before S3's answer to the begin was stored.
    let forgotten = sqlx::query("update upload_sessions set s3_upload_id = null");
    forgotten.execute(&house.db).await.unwrap();
    house.crash(|_| {}).await;
    let again = open(&house).await.expect(200);
    assert_eq!(again.id(), first.id());
    house.put_parts(&again.json["parts"], &content).await;
    house.complete(&again.id()).await.expect(200);
    assert_eq!(house.distinct_records().await.len(), 1);
    // The first begin is nobody's: it is gone too.
    assert!(!house.has_open_multipart(again.json["object_key"].as_str().unwrap()).await);
}

#[tokio::test]
async fn a_completion_whose_owner_died_is_taken_over_without_anyone_asking() {
    let mut house = House::new().await;
    let content = bytes(PART + 9, 3);
    let hashed = json!({"part_size": PART, "part_sha256": crate::harness::uploads::part_hashes(&content, PART)});
    let single = house.put_up(b"hello", json!({})).await;
    let apart = house.put_up(&content, hashed.clone()).await;
    let joined = house.put_up(&content, hashed.clone()).await;
    join_parts(&house, &joined.json).await;
    let to_be_read = house.put_up(&content, json!({"part_size": PART})).await;
    let all = [&single, &apart, &joined, &to_be_read];
    for opened in all {
        house.taken_by_the_dead(&opened.id()).await;
    }
    house.crash(|_| {}).await;
    for opened in all {
        assert_eq!(house.upload(&opened.id()).await.state(), "completing", "its owner may be alive");
    }
    house.push_clock(LEASE_OVER);
    for opened in all {
        house.until(&opened.id(), "published").await;
    }
    assert_eq!(house.distinct_records().await.len(), all.len());
    for opened in all {
        assert!(!house.has_open_multipart(opened.json["object_key"].as_str().unwrap()).await);
    }
}

#[tokio::test]
async fn a_completion_whose_owner_died_before_the_bytes_came_is_open_again() {
    let house = House::new().await;
    let content = bytes(PART + 9, 4);
    let single = house.open(b"hello", json!({})).await.expect(201);
    let parts = house.open_hashed_parts(&content, json!({})).await.expect(201);
    for opened in [&single, &parts] {
        house.taken_by_the_dead(&opened.id()).await;
    }
    house.push_clock(LEASE_OVER);
    house.complete(&single.id()).await.expect_problem(409, "object-missing");
    house.complete(&parts.id()).await.expect_problem(409, "parts-incomplete");
    house.put(&single.json["upload"], b"hello").await.expect(200);
    house.put_parts(&parts.json["parts"], &content).await;
    house.complete(&single.id()).await.expect(200);
    house.complete(&parts.id()).await.expect(200);
    assert_eq!(house.records(&house.topic).await.len(), 2);
}

#[tokio::test]
async fn what_was_promised_before_two_crashes_is_published_once() {
    let mut house = House::with(|settings| settings.broker.complete_wait = Duration::from_millis(300)).await;
    let mut ids = Vec::new();
    for number in 0..8 {
        ids.push(house.put_up(b"hello", json!({"key": format!("k{}", number % 3)})).await.id());
    }
    let kafka = house.settings.kafka.bootstrap_servers.clone();
    house.crash(|settings| settings.kafka.bootstrap_servers = CLOSED.to_owned()).await;
    house.log_the_outbox().await;
    for id in &ids {
        assert_eq!(house.complete(id).await.expect(202).state(), "verified");
    }
    house.crash(|_| {}).await;
    house.crash(|settings| settings.kafka.bootstrap_servers = kafka).await;
    for id in &ids {
        house.until(id, "published").await;
    }
    let records = house.distinct_records().await;
    assert_eq!(records.len(), ids.len());
    House::assert_in_order(&records, &house.promises().await);
}

#[tokio::test]
async fn crashes_in_the_middle_of_completing_lose_nothing() {
    let mut house = House::with(|settings| settings.finish.lease = Duration::from_secs(3)).await;
    let mut ids = Vec::new();
    for number in 0..24 {
        ids.push(house.put_up(b"hello", json!({"key": format!("k{}", number % 4)})).await.id());
    }
    for (round, ids) in ids.chunks(8).enumerate() {
        let asked: Vec<_> = ids
            .iter()
            .map(|id| tokio::spawn(house.http.post(format!("{}/lfs/uploads/{id}/complete", house.url())).send()))
            .collect();
        tokio::time::sleep(Duration::from_millis(5 + 15 * round as u64)).await;
        house.crash(|_| {}).await;
        for asked in asked {
            drop(asked.await.unwrap());
        }
    }
    for id in &ids {
        house.insist(id).await;
    }
    let records = house.distinct_records().await;
    let mut found: Vec<String> = records.iter().map(upload_of).collect();
    found.sort();
    ids.sort();
    assert_eq!(found, ids);
    assert_eq!(house.quota().await, (0, 0));
}

#[tokio::test]
async fn a_broker_that_was_killed_publishes_again_within_five_seconds() {
    let mut house = House::new().await;
    house.publish(b"first", json!({})).await;
    let opened = house.put_up(b"second", json!({})).await;
    let killed = Instant::now();
    house.crash(|_| {}).await;
    house.complete(&opened.id()).await.expect(200);
    assert!(killed.elapsed() < Duration::from_secs(6), "published {:?} after the crash", killed.elapsed());
}

#[tokio::test]
async fn twenty_completes_at_once_on_two_replicas_publish_once() {
    let house = House::new().await;
    let replica = house.replica().await;
    let content = bytes(PART + 9, 5);
    for opened in [house.put_up(b"hello", json!({})).await, house.put_up(&content, json!({"part_size": PART})).await] {
        let bases = [house.url(), format!("http://{}", replica.address())];
        let asks = (0..20).map(|number| {
            let url = format!("{}/lfs/uploads/{}/complete", bases[number % 2], opened.id());
            house.send(house.http.post(url))
        });
        let answers = futures_util::future::join_all(asks).await;
        for answer in &answers {
            assert_eq!((answer.status, &answer.json), (200, &answers[0].json), "{}", answer.text);
        }
    }
    assert_eq!(house.records(&house.topic).await.len(), 2);
    replica.stop().await;
}
