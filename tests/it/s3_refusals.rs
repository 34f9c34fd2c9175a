//! Permanent refusals of S3: the upload can still end, an upload that was not opened holds no quota, and complete
//! answers in time.

use std::time::Duration;

use serde_json::json;

use crate::harness::fault_proxy::{Call, Fault, FaultyS3};
use crate::harness::faults::proxy_to_database;
use crate::harness::uploads::PART_BYTES;
use crate::harness::{TestBroker, bytes, sha256};
use crate::s3_faults::{start_broker_on, start_faulty_s3};

/// More calls than any test here makes.
const MANY_CALLS: usize = 200;

fn fail_always(s3: &FaultyS3, call: Call, fault: Fault) {
    (0..MANY_CALLS).for_each(|_| s3.fail_next(call, fault));
}

/// The stored transitions of an upload, oldest first.
async fn history(broker: &TestBroker, id: &str) -> Vec<(Option<String>, String)> {
    let page = broker.get(&format!("/lfs/uploads/{id}/history?limit=1000")).await.expect(200);
    let state = |value: &serde_json::Value| value.as_str().map(str::to_owned);
    page.json["items"].as_array().unwrap().iter().map(|item| (state(&item["from"]), state(&item["to"]).unwrap())).collect()
}

#[tokio::test]
async fn an_upload_whose_completion_s3_refuses_stays_open_and_can_be_aborted_or_expire() {
    let s3 = start_faulty_s3().await;
    let broker = start_broker_on(&s3).await;
    let content = bytes(PART_BYTES + 9, 1);
    let opened = broker.open_multipart_with_hashes(&content, json!({})).await.expect(201);
    let other = broker.open_multipart_with_hashes(&content, json!({})).await.expect(201);
    broker.put_parts(&opened.json["parts"], &content).await;
    // As when an administrator deletes the bucket.
    fail_always(&s3, Call::ListParts, Fault::NotExecuted(404, "NoSuchBucket"));
    for _ in 0..12 {
        let refused = broker.complete(&opened.id()).await.expect_problem(503, "completion-unknown");
        assert_eq!(refused.json["upload_state"], "open");
        assert!(refused.json["detail"].as_str().unwrap().contains("NoSuchBucket"), "{}", refused.text);
    }
    // Each transition continues from the previous one, and twelve completes left no 25 rows.
    let response = history(&broker, &opened.id()).await;
    assert_eq!(response.len(), 5, "{response:?}");
    assert!(response.windows(2).all(|pair| pair[1].0.as_ref() == Some(&pair[0].1)), "{response:?}");

    broker.delete(&format!("/lfs/uploads/{}", opened.id())).await.expect(204);
    broker.complete(&other.id()).await.expect_problem(503, "completion-unknown");
    assert_eq!(broker.tenant_usage().await, (1, content.len() as i64));
    broker.advance_clock(Duration::from_secs(3601));
    broker.eventually("the session has expired", || async { broker.tenant_usage().await == (0, 0) }).await;
    assert_eq!(broker.upload(&other.id()).await.state(), "expired");
}

#[tokio::test]
async fn a_completion_that_s3_never_answers_expires_with_its_sessions_maximum() {
    let s3 = start_faulty_s3().await;
    let broker = start_broker_on(&s3).await;
    let content = bytes(PART_BYTES + 9, 2);
    let opened = broker.open_multipart_with_hashes(&content, json!({})).await.expect(201);
    broker.lease_to_dead_replica(&opened.id()).await;
    fail_always(&s3, Call::Head, Fault::NotExecuted(503, "SlowDown"));
    // The session has expired, but its maximum lifetime has not: S3 may still verify the bytes.
    broker.advance_clock(Duration::from_secs(7200));
    broker.eventually("the verifier has tried", || async { s3.count_with(Call::Head, &opened.id()) > 0 }).await;
    assert_eq!(broker.upload(&opened.id()).await.state(), "completing");
    broker.advance_clock(Duration::from_secs(86_400));
    broker.wait_for_state(&opened.id(), "expired").await;
    assert_eq!(broker.tenant_usage().await, (0, 0));
    let response = broker.get(&format!("/lfs/uploads/{}/history", opened.id())).await;
    let last = response.json["items"].as_array().unwrap().last().unwrap().clone();
    assert_eq!((&last["from"], &last["to"]), (&json!("completing"), &json!("expired")));
}

#[tokio::test]
async fn an_upload_that_s3_did_not_open_holds_no_quota() {
    let s3 = start_faulty_s3().await;
    let mut broker = start_broker_on(&s3).await;
    broker.restart(|settings| settings.broker.quota.open_sessions = 2).await;
    let content = bytes(PART_BYTES + 9, 3);
    let unavailable = Fault::NotExecuted(503, "SlowDown");
    for _ in 0..4 {
        // As many failures as one call has attempts.
        (0..2).for_each(|_| s3.fail_next(Call::CreateMultipart, unavailable));
        broker.open_multipart(&content, json!({})).await.expect_problem(503, "dependency-unavailable");
        assert!(s3.all_faults_happened());
        assert_eq!(broker.tenant_usage().await, (0, 0));
    }
    let body = json!({"topic": broker.topic, "size": content.len(), "sha256": sha256(&content), "part_size": PART_BYTES});
    let open_with_key =
        |key: &'static str| broker.send(broker.request("POST", "/lfs/uploads").header("idempotency-key", key).json(&body));
    // With an idempotency key the client may retry: then the same upload continues with its whole lifetime.
    for key in ["kept", "lost"] {
        (0..2).for_each(|_| s3.fail_next(Call::CreateMultipart, unavailable));
        open_with_key(key).await.expect_problem(503, "dependency-unavailable");
    }
    let kept = open_with_key("kept").await.expect(200);
    assert_eq!((kept.state(), kept.json["parts"].as_array().unwrap().len()), ("open", 2));
    assert!(kept.json["expires_in"].as_u64().unwrap() > 3500, "{}", kept.text);
    assert_eq!(broker.tenant_usage().await.0, 2);
    // An upload whose client does not retry expires after two minutes, not after an hour.
    broker.advance_clock(Duration::from_secs(121));
    broker.eventually("the other one has expired", || async { broker.tenant_usage().await.0 == 1 }).await;
    assert_eq!(broker.upload(&kept.id()).await.state(), "open");
}

#[tokio::test]
async fn a_wrong_sha256_that_came_too_early_is_not_kept() {
    let broker = TestBroker::start().await;
    let opened = broker.open(b"hello", json!({"sha256": null})).await.expect(201);
    let id = opened.id();
    let wrong = json!({"sha256": sha256(b"other")});
    broker.complete_with(&id, wrong.clone()).await.expect_problem(409, "object-missing");
    broker.put(&opened.json["upload"], b"hello").await.expect(200);
    // The hash was not kept, so it is required again.
    broker.complete(&id).await.expect_problem(422, "validation-failed");
    let done = broker.complete_and_wait(&id, json!({"sha256": sha256(b"hello")})).await;
    assert_eq!(done.json["pointer"]["sha256"], sha256(b"hello"));
    // After the verification the hash cannot be changed.
    broker.complete_with(&id, wrong).await.expect_problem(422, "validation-failed");

    // A hash given at open cannot be changed.
    let declared = broker.open(b"hello", json!({})).await.expect(201);
    broker.complete(&declared.id()).await.expect_problem(409, "object-missing");
    let other = json!({"sha256": sha256(b"other")});
    broker.complete_with(&declared.id(), other).await.expect_problem(422, "validation-failed");
}

#[tokio::test]
async fn complete_answers_in_time_during_another_replicas_lease_and_with_a_slow_s3() {
    for wait in [Duration::ZERO, Duration::from_secs(1)] {
        let s3 = start_faulty_s3().await;
        let mut broker = start_broker_on(&s3).await;
        let s3_timeout = Duration::from_secs(30);
        broker
            .restart(|settings| {
                settings.broker.complete_wait = wait;
                settings.objects.call_timeout = Some(s3_timeout);
            })
            .await;
        let leased = broker.open_and_put(b"hello", json!({})).await.id();
        let slow = broker.open_and_put(b"hello", json!({})).await.id();
        broker.lease_to_dead_replica(&leased).await;
        // `lease_to_dead_replica` leases for this long.
        let response = broker.complete_in_time(&leased, Duration::from_secs(30)).await.expect(202);
        assert_eq!((response.state(), response.headers.contains_key("retry-after")), ("completing", true));
        s3.delay_calls(s3_timeout * 2);
        let response = broker.complete_in_time(&slow, s3_timeout).await;
        assert!(response.state() == "completing" || response.code() == "completion-unknown", "{}", response.text);
        s3.delay_calls(Duration::ZERO);
        broker.complete_with_retries(&slow).await;
    }
}

#[tokio::test]
async fn complete_answers_in_time_when_the_database_does_not() {
    let proxy = proxy_to_database().await;
    let address = proxy.address().to_string();
    let broker = TestBroker::start_with(|settings| {
        // Longer than complete may take, so that the limit of complete is what ends it.
        settings.store.call_timeout = Duration::from_secs(30);
        settings.broker.complete_wait = Duration::from_millis(500);
        let (_, server) = settings.store.url.rsplit_once('@').unwrap();
        let (server, _) = server.split_once('/').unwrap();
        settings.store.url = settings.store.url.replace(server, &address);
    })
    .await;
    let id = broker.open_and_put(b"hello", json!({})).await.id();
    proxy.stall();
    let response =
        broker.complete_in_time(&id, broker.settings.store.call_timeout).await.expect_problem(503, "completion-unknown");
    assert!(response.headers.contains_key("retry-after"));
    proxy.restore().await;
}

#[tokio::test]
async fn a_cleanup_that_s3_refuses_permanently_is_not_retried_every_minute() {
    let s3 = start_faulty_s3().await;
    let broker = start_broker_on(&s3).await;
    for (status, code, min_delay) in [(404, "NoSuchBucket", "4 minutes"), (403, "AccessDenied", "50 minutes")] {
        let id = broker.open(b"hello", json!({})).await.expect(201).id();
        let before = s3.count(Call::ListUploads);
        fail_always(&s3, Call::ListUploads, Fault::NotExecuted(status, code));
        broker.delete(&format!("/lfs/uploads/{id}")).await.expect(204);
        // After a cleanup that finds nothing left, the next one is at the usual time.
        let due = "select cleanup_due_at > clock_timestamp() + $2::text::interval from upload_sessions where id = $1::uuid";
        let due = || async { sqlx::query_scalar::<_, bool>(due).bind(&id).bind(min_delay).fetch_one(&broker.db).await.unwrap() };
        broker.eventually("the next cleanup is later", due).await;
        assert_eq!(s3.count(Call::ListUploads) - before, 1, "{code}");
        s3.clear_faults();
    }
}
