//! What S3 refuses for good ends, what was never opened holds nothing, and complete answers in time whatever is away.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::faults::{faulty, house_on};
use crate::harness::faults::wire_to_database;
use crate::harness::proxy::{Call, Fault, FaultyS3};
use crate::harness::uploads::PART;
use crate::harness::{Answer, House, bytes, sha256};

/// More often than anybody asks in these tests.
const ALWAYS: usize = 200;

fn always(s3: &FaultyS3, call: Call, fault: Fault) {
    (0..ALWAYS).for_each(|_| s3.next(call, fault));
}

/// The transitions that the broker keeps of an upload, oldest first.
async fn history(house: &House, id: &str) -> Vec<(Option<String>, String)> {
    let page = house.get(&format!("/lfs/uploads/{id}/history?limit=1000")).await.expect(200);
    let state = |value: &serde_json::Value| value.as_str().map(str::to_owned);
    page.json["items"].as_array().unwrap().iter().map(|item| (state(&item["from"]), state(&item["to"]).unwrap())).collect()
}

#[tokio::test]
async fn a_completion_that_s3_refuses_for_good_leaves_the_upload_open_to_be_aborted_or_to_expire() {
    let s3 = faulty().await;
    let house = house_on(&s3).await;
    let content = bytes(PART + 9, 1);
    let opened = house.open_hashed_parts(&content, json!({})).await.expect(201);
    let other = house.open_hashed_parts(&content, json!({})).await.expect(201);
    house.put_parts(&opened.json["parts"], &content).await;
    // As when somebody deletes the bucket.
    always(&s3, Call::ListParts, Fault::Instead(404, "NoSuchBucket"));
    for _ in 0..12 {
        let refused = house.complete(&opened.id()).await.expect_problem(503, "completion-unknown");
        assert_eq!(refused.json["upload_state"], "open");
        assert!(refused.json["detail"].as_str().unwrap().contains("NoSuchBucket"), "{}", refused.text);
    }
    // Every second transition goes on from the one before, and twelve calls left no 25 rows.
    let told = history(&house, &opened.id()).await;
    assert_eq!(told.len(), 5, "{told:?}");
    assert!(told.windows(2).all(|pair| pair[1].0.as_ref() == Some(&pair[0].1)), "{told:?}");

    house.delete(&format!("/lfs/uploads/{}", opened.id())).await.expect(204);
    house.complete(&other.id()).await.expect_problem(503, "completion-unknown");
    assert_eq!(house.quota().await, (1, content.len() as i64));
    house.push_clock(Duration::from_secs(3601));
    house.eventually("it has expired", || async { house.quota().await == (0, 0) }).await;
    assert_eq!(house.upload(&other.id()).await.state(), "expired");
}

#[tokio::test]
async fn a_completion_that_s3_never_answers_ends_with_the_last_end_of_its_session() {
    let s3 = faulty().await;
    let house = house_on(&s3).await;
    let content = bytes(PART + 9, 2);
    let opened = house.open_hashed_parts(&content, json!({})).await.expect(201);
    house.taken_by_the_dead(&opened.id()).await;
    always(&s3, Call::Head, Fault::Instead(503, "SlowDown"));
    // The session's own end is over, its last one is not: S3 may still prove the bytes.
    house.push_clock(Duration::from_secs(7200));
    house.eventually("the verifier has tried", || async { s3.count_of(Call::Head, &opened.id()) > 0 }).await;
    assert_eq!(house.upload(&opened.id()).await.state(), "completing");
    house.push_clock(Duration::from_secs(86_400));
    house.until(&opened.id(), "expired").await;
    assert_eq!(house.quota().await, (0, 0));
    let told = house.get(&format!("/lfs/uploads/{}/history", opened.id())).await;
    let last = told.json["items"].as_array().unwrap().last().unwrap().clone();
    assert_eq!((&last["from"], &last["to"]), (&json!("completing"), &json!("expired")));
}

#[tokio::test]
async fn an_upload_that_s3_did_not_open_holds_no_quota() {
    let s3 = faulty().await;
    let mut house = house_on(&s3).await;
    house.restart(|settings| settings.broker.quota.open_sessions = 2).await;
    let content = bytes(PART + 9, 3);
    let unavailable = Fault::Instead(503, "SlowDown");
    for _ in 0..4 {
        // As often as one call tries.
        (0..2).for_each(|_| s3.next(Call::Begin, unavailable));
        house.open_parts(&content, json!({})).await.expect_problem(503, "dependency-unavailable");
        assert!(s3.is_done());
        assert_eq!(house.quota().await, (0, 0));
    }
    let body = json!({"topic": house.topic, "size": content.len(), "sha256": sha256(&content), "part_size": PART});
    let keyed = |key: &'static str| house.send(house.request("POST", "/lfs/uploads").header("idempotency-key", key).json(&body));
    // Under a key the client may come again: the same upload goes on then, with all of its time.
    for key in ["kept", "lost"] {
        (0..2).for_each(|_| s3.next(Call::Begin, unavailable));
        keyed(key).await.expect_problem(503, "dependency-unavailable");
    }
    let kept = keyed("kept").await.expect(200);
    assert_eq!((kept.state(), kept.json["parts"].as_array().unwrap().len()), ("open", 2));
    assert!(kept.json["expires_in"].as_u64().unwrap() > 3500, "{}", kept.text);
    assert_eq!(house.quota().await.0, 2);
    // And nobody waits an hour for who did not.
    house.push_clock(Duration::from_secs(121));
    house.eventually("the other one has expired", || async { house.quota().await.0 == 1 }).await;
    assert_eq!(house.upload(&kept.id()).await.state(), "open");
}

#[tokio::test]
async fn a_sha256_that_came_too_early_and_wrong_does_not_bind() {
    let house = House::new().await;
    let opened = house.open(b"hello", json!({"sha256": null})).await.expect(201);
    let id = opened.id();
    let wrong = json!({"sha256": sha256(b"other")});
    house.complete_with(&id, wrong.clone()).await.expect_problem(409, "object-missing");
    house.put(&opened.json["upload"], b"hello").await.expect(200);
    // It is forgotten, so that it is required again.
    house.complete(&id).await.expect_problem(422, "validation-failed");
    let done = house.complete_and_wait(&id, json!({"sha256": sha256(b"hello")})).await;
    assert_eq!(done.json["pointer"]["sha256"], sha256(b"hello"));
    // Once it is proved it stands.
    house.complete_with(&id, wrong).await.expect_problem(422, "validation-failed");

    // One that open brought stands from then on.
    let promised = house.open(b"hello", json!({})).await.expect(201);
    house.complete(&promised.id()).await.expect_problem(409, "object-missing");
    let other = json!({"sha256": sha256(b"other")});
    house.complete_with(&promised.id(), other).await.expect_problem(422, "validation-failed");
}

/// Completes, and holds the time that it took against the wait and one second.
async fn in_time(house: &House, id: &str) -> Answer {
    let begun = Instant::now();
    let answer = house.complete(id).await;
    let (took, wait) = (begun.elapsed(), house.settings.broker.complete_wait);
    assert!(took <= wait + Duration::from_secs(1), "{took:?} with a wait of {wait:?}: {}", answer.text);
    answer
}

#[tokio::test]
async fn complete_answers_in_time_whoever_holds_the_lease_and_however_slow_s3_is() {
    for wait in [Duration::ZERO, Duration::from_secs(1)] {
        let s3 = faulty().await;
        let mut house = house_on(&s3).await;
        house.restart(|settings| settings.broker.complete_wait = wait).await;
        let held = house.put_up(b"hello", json!({})).await.id();
        let slow = house.put_up(b"hello", json!({})).await.id();
        house.taken_by_the_dead(&held).await;
        let told = in_time(&house, &held).await.expect(202);
        assert_eq!((told.state(), told.headers.contains_key("retry-after")), ("completing", true));
        s3.slow_down(Duration::from_secs(10));
        let told = in_time(&house, &slow).await;
        assert!(told.state() == "completing" || told.code() == "dependency-unavailable", "{}", told.text);
        s3.slow_down(Duration::ZERO);
        house.insist(&slow).await;
    }
}

#[tokio::test]
async fn complete_answers_in_time_when_the_database_does_not() {
    let wire = wire_to_database().await;
    let address = wire.address().to_string();
    let house = House::with(|settings| {
        // Longer than complete may take: its own end is what is met.
        settings.store.answer_within = Duration::from_secs(15);
        settings.broker.complete_wait = Duration::from_millis(500);
        let (_, server) = settings.store.url.rsplit_once('@').unwrap();
        let (server, _) = server.split_once('/').unwrap();
        settings.store.url = settings.store.url.replace(server, &address);
    })
    .await;
    let id = house.put_up(b"hello", json!({})).await.id();
    wire.silence();
    let told = in_time(&house, &id).await.expect_problem(503, "completion-unknown");
    assert!(told.headers.contains_key("retry-after"));
    wire.restore().await;
}

#[tokio::test]
async fn a_cleanup_that_s3_refuses_for_good_is_not_asked_for_every_minute() {
    let s3 = faulty().await;
    let house = house_on(&s3).await;
    for (status, code, passes) in [(404, "NoSuchBucket", "4 minutes"), (403, "AccessDenied", "50 minutes")] {
        let id = house.open(b"hello", json!({})).await.expect(201).id();
        let before = s3.count(Call::ListUploads);
        always(&s3, Call::ListUploads, Fault::Instead(status, code));
        house.delete(&format!("/lfs/uploads/{id}")).await.expect(204);
        // Where everything is gone, the next pass is the usual one.
        let due = "select cleanup_due_at > clock_timestamp() + $2::text::interval from upload_sessions where id = $1::uuid";
        let due = || async { sqlx::query_scalar::<_, bool>(due).bind(&id).bind(passes).fetch_one(&house.db).await.unwrap() };
        house.eventually("the next pass is later", due).await;
        assert_eq!(s3.count(Call::ListUploads) - before, 1, "{code}");
        s3.forget();
    }
}
