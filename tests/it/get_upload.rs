//! GET of an upload in each state, its history, and the long poll.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use serde_json::json;

use crate::harness::{ApiResponse, TestBroker, bytes, time};

fn assert_has(response: &ApiResponse, members: &[&str]) {
    for member in members {
        assert!(response.json.get(member).is_some(), "no {member} in {}", response.text);
    }
}

fn assert_lacks(response: &ApiResponse, members: &[&str]) {
    for member in members {
        assert!(response.json.get(member).is_none(), "{member} in {}", response.text);
    }
}

#[tokio::test]
async fn a_single_put_upload_can_be_read_from_open_to_published() {
    let broker = TestBroker::start().await;
    let more = json!({"key": "order-17", "content_type": "text/plain", "filename": "a.txt"});
    let opened = broker.open(b"hello", more).await.expect(201);
    let id = opened.id();
    let read = broker.upload(&id).await.expect(200);
    for (name, value) in
        opened.json.as_object().unwrap().iter().filter(|(name, _)| !["upload", "expires_in"].contains(&name.as_str()))
    {
        assert_eq!(&read.json[name], value, "{name}");
    }
    assert_has(&read, &["key", "bucket", "object_key", "created_at", "updated_at", "expires_at"]);
    assert_lacks(
        &read,
        &["upload", "parts", "uploaded_parts", "missing_parts", "key_base64", "pointer", "integrity", "record", "error"],
    );
    assert_eq!((read.json["next"].as_str(), read.json["mode"].as_str()), (Some("put"), Some("single")));
    let lifetime_seconds = (time(&read.json["expires_at"]) - time(&read.json["created_at"])).whole_seconds();
    assert_eq!(lifetime_seconds, 3600);
    assert!((3590..=3600).contains(&read.json["expires_in"].as_u64().unwrap()));

    broker.put(&opened.json["upload"], b"hello").await.expect(200);
    assert_eq!(broker.upload(&id).await.json["next"], "complete");
    let done = broker.complete(&id).await.expect(200);
    let read = broker.upload(&id).await.expect(200);
    assert_eq!((read.state(), read.json["next"].as_str()), ("published", Some("none")));
    for member in ["pointer", "integrity", "record"] {
        assert_eq!(read.json[member], done.json[member]);
    }
    assert_lacks(&read, &["error", "upload"]);
    assert!(read.json["version"].as_i64() > opened.json["version"].as_i64());
    assert!(time(&read.json["updated_at"]) > time(&read.json["created_at"]));
}

#[tokio::test]
async fn a_multipart_upload_shows_its_uploaded_and_missing_parts() {
    let broker = TestBroker::start().await;
    let content = bytes((20 << 20) + 3, 1);
    let opened = broker.open(&content, json!({"part_size": 5 << 20, "key_base64": "/w=="})).await.expect(201);
    assert_eq!((&opened.json["part_count"], &opened.json["part_size"]), (&json!(5), &json!(5 << 20)));
    let read = || async { broker.upload(&opened.id()).await.expect(200) };
    let first = read().await;
    assert_eq!((&first.json["next"], &first.json["uploaded_parts"]), (&json!("parts"), &json!([])));
    assert_eq!(first.json["missing_parts"], json!([[1, 5]]));
    assert_eq!(first.json["key_base64"], "/w==");
    assert_lacks(&first, &["key", "upload", "parts"]);
    let put = async |number: usize| {
        let part = &opened.json["parts"][number - 1];
        let (offset, size) = (part["offset"].as_u64().unwrap() as usize, part["size"].as_u64().unwrap() as usize);
        broker.put(part, &content[offset..offset + size]).await.expect(200);
    };
    put(5).await;
    put(3).await;
    let some = read().await;
    assert_eq!(some.json["uploaded_parts"], json!([{"part_number": 3, "size": 5 << 20}, {"part_number": 5, "size": 3}]));
    assert_eq!((&some.json["missing_parts"], &some.json["next"]), (&json!([[1, 2], [4, 4]]), &json!("parts")));
    for number in [1, 2, 4] {
        put(number).await;
    }
    let all = read().await;
    assert_eq!((&all.json["missing_parts"], &all.json["next"]), (&json!([]), &json!("complete")));
    broker.complete(&opened.id()).await;
    let done = broker.wait_for_state(&opened.id(), "published").await;
    assert_lacks(&done, &["uploaded_parts", "missing_parts"]);
    assert_has(&done, &["part_size", "part_count", "pointer", "integrity", "record"]);
}

#[tokio::test]
async fn a_failed_upload_has_no_next_step_and_shows_its_error() {
    let broker = TestBroker::start().await;
    let rejected = broker.open(b"hello", json!({})).await.expect(201);
    let key = rejected.json["object_key"].as_str().unwrap();
    broker.put_object(key, b"hello", None).await;
    broker.complete(&rejected.id()).await.expect_problem(422, "object-foreign");
    let aborted = broker.open(b"hello", json!({})).await.expect(201);
    broker.delete(&format!("/lfs/uploads/{}", aborted.id())).await.expect(204);
    let expired = broker.open(b"hello", json!({})).await.expect(201);
    broker.advance_clock(Duration::from_secs(3600));
    for (upload, state) in [(&rejected, "rejected"), (&aborted, "aborted"), (&expired, "expired")] {
        let read = broker.upload(&upload.id()).await.expect(200);
        assert_eq!((read.state(), read.json["next"].as_str()), (state, Some("none")));
        assert_lacks(&read, &["pointer", "integrity", "record", "upload", "uploaded_parts"]);
        assert_eq!(read.json["error"]["code"].as_str(), (state == "rejected").then_some("object-foreign"));
    }
    assert_eq!(broker.upload(&expired.id()).await.json["expires_in"], 0);
}

#[tokio::test]
async fn the_error_of_a_failed_complete_is_shown_until_the_next_complete() {
    let broker = TestBroker::start().await;
    let opened = broker.open(b"hello", json!({})).await.expect(201);
    broker.complete(&opened.id()).await.expect_problem(409, "object-missing");
    let read = broker.upload(&opened.id()).await;
    assert_eq!((read.state(), read.json["error"]["code"].as_str()), ("open", Some("object-missing")));
    broker.put(&opened.json["upload"], b"hello").await.expect(200);
    broker.complete(&opened.id()).await.expect(200);
    assert_lacks(&broker.upload(&opened.id()).await, &["error"]);
}

#[tokio::test]
async fn a_verified_upload_has_its_pointer_before_kafka_has_the_record() {
    let broker = TestBroker::start_with(|settings| settings.broker.complete_wait = Duration::ZERO).await;
    // The relay waits for a lock on this table.
    let mut lock = broker.db.begin().await.unwrap();
    sqlx::query("lock table relay_shards in access exclusive mode").execute(&mut *lock).await.unwrap();
    let opened = broker.open(b"hello", json!({})).await.expect(201);
    broker.put(&opened.json["upload"], b"hello").await.expect(200);
    let verified = broker.complete_until_verified(&opened.id()).await.expect(202);
    assert!(verified.headers.contains_key("retry-after"));
    assert_eq!((verified.state(), verified.json["integrity"].as_str()), ("verified", Some("sha256")));
    assert_lacks(&verified, &["record"]);
    let read = broker.upload(&opened.id()).await.expect(200);
    assert_eq!((read.state(), read.json["next"].as_str()), ("verified", Some("wait")));
    assert_eq!(read.json["pointer"], verified.json["pointer"]);
    assert_lacks(&read, &["record"]);
    broker.delete(&format!("/lfs/uploads/{}", opened.id())).await.expect_problem(409, "state-conflict");
    lock.rollback().await.unwrap();
    let done = broker.wait_for_state(&opened.id(), "published").await;
    assert_eq!(done.json["pointer"], verified.json["pointer"]);
    let again = broker.complete(&opened.id()).await.expect(200);
    assert_eq!(again.json["record"], done.json["record"]);
}

#[tokio::test]
async fn the_history_shows_every_transition_with_its_reason_and_author() {
    let broker = TestBroker::start().await;
    let opened = broker.open(b"hello", json!({})).await.expect(201);
    broker.complete(&opened.id()).await.expect_problem(409, "object-missing");
    broker.put(&opened.json["upload"], b"hello").await.expect(200);
    broker.complete(&opened.id()).await.expect(200);
    let history = broker.get(&format!("/lfs/uploads/{}/history", opened.id())).await.expect(200);
    let items = history.json["items"].as_array().unwrap();
    let transitions: Vec<(Option<&str>, &str)> =
        items.iter().map(|item| (item["from"].as_str(), item["to"].as_str().unwrap())).collect();
    assert_eq!(
        transitions,
        [
            (None, "open"),
            (Some("open"), "completing"),
            (Some("completing"), "open"),
            (Some("open"), "completing"),
            (Some("completing"), "verified"),
            (Some("verified"), "published")
        ]
    );
    let authors: Vec<&str> = items.iter().map(|item| item["by"].as_str().unwrap()).collect();
    assert_eq!(authors, ["client:anonymous", "client:anonymous", "broker", "client:anonymous", "broker", "relay"]);
    assert!(items.windows(2).all(|pair| time(&pair[0]["at"]) <= time(&pair[1]["at"])));
    for item in items {
        assert_eq!(item.as_object().unwrap().len(), 5, "{item}");
        assert!(!item["reason"].as_str().unwrap().is_empty());
    }
}

#[tokio::test]
async fn the_history_of_a_failed_upload_names_the_client_or_the_sweeper() {
    let broker = TestBroker::start().await;
    let aborted = broker.open(b"a", json!({})).await.expect(201).id();
    broker.delete(&format!("/lfs/uploads/{aborted}")).await.expect(204);
    let expired = broker.open(b"b", json!({})).await.expect(201).id();
    broker.advance_clock(Duration::from_secs(3600));
    broker.upload(&expired).await.expect(200);
    for (id, state, by) in [(aborted, "aborted", "client:anonymous"), (expired, "expired", "sweeper")] {
        let history = broker.get(&format!("/lfs/uploads/{id}/history")).await.expect(200).json;
        assert_eq!(history["items"].as_array().unwrap().len(), 2);
        let last = &history["items"][1];
        assert_eq!((&last["from"], &last["to"], &last["by"]), (&json!("open"), &json!(state), &json!(by)));
    }
}

/// Reads with a long poll, and returns how long it took.
async fn long_poll(broker: &TestBroker, id: &str, query: &str) -> (ApiResponse, Duration) {
    let begun = Instant::now();
    let response = broker.get(&format!("/lfs/uploads/{id}?{query}")).await.expect(200);
    (response, begun.elapsed())
}

/// The long polls that a change must end wait for 30 s: one that is not ended takes longer than this.
const MAX_DELAY: Duration = Duration::from_secs(20);

#[tokio::test]
async fn a_long_poll_is_answered_at_once_for_another_version_or_a_final_state() {
    let broker = TestBroker::start().await;
    let id = broker.open(b"hello", json!({})).await.expect(201).id();
    let (read, elapsed) = long_poll(&broker, &id, "wait=30&version=7").await;
    assert_eq!(read.state(), "open");
    assert!(elapsed < MAX_DELAY, "{elapsed:?} instead of the whole wait, 30 s");
    broker.delete(&format!("/lfs/uploads/{id}")).await.expect(204);
    let version = broker.upload(&id).await.json["version"].clone();
    for query in ["wait=30".to_owned(), format!("wait=30&version={version}")] {
        let (read, elapsed) = long_poll(&broker, &id, &query).await;
        assert_eq!(read.state(), "aborted");
        assert!(elapsed < MAX_DELAY, "{elapsed:?} instead of the whole wait, 30 s");
    }
}

#[tokio::test]
async fn a_long_poll_ends_unchanged_when_nothing_happens() {
    let broker = TestBroker::start().await;
    let id = broker.open(b"hello", json!({})).await.expect(201).id();
    for query in ["wait=1", "wait=1&version=1"] {
        let (read, elapsed) = long_poll(&broker, &id, query).await;
        assert_eq!((read.state(), &read.json["version"]), ("open", &json!(1)));
        assert!(
            (Duration::from_secs(1)..MAX_DELAY).contains(&elapsed),
            "{elapsed:?} instead of 1 s, or of the longest wait, 30 s"
        );
    }
    let (_, elapsed) = long_poll(&broker, &id, "wait=0").await;
    assert!(elapsed < MAX_DELAY, "{elapsed:?} instead of 0 s, or of the longest wait, 30 s");
    for wait in ["31", "-1", "abc"] {
        let refused = broker.get(&format!("/lfs/uploads/{id}?wait={wait}")).await.expect_problem(422, "validation-failed");
        assert_eq!(refused.json["errors"][0]["pointer"], "/wait", "{}", refused.text);
    }
}

#[tokio::test]
async fn a_long_poll_ends_as_soon_as_any_replica_changes_the_upload() {
    let broker = TestBroker::start().await;
    let other = broker.replica().await;
    for base in [broker.url(), format!("http://{}", other.address())] {
        let id = broker.open(b"hello", json!({})).await.expect(201).id();
        let wait = async |query: &str| long_poll(&broker, &id, query).await;
        let abort = async {
            // By then both long polls wait, unless the machine is busy. A later one would find a final state at once.
            tokio::time::sleep(Duration::from_millis(300)).await;
            broker.send(broker.http.delete(format!("{base}/lfs/uploads/{id}"))).await.expect(204);
        };
        let (with, without, ()) = tokio::join!(wait("wait=30&version=1"), wait("wait=30"), abort);
        for (read, elapsed) in [with, without] {
            assert_eq!(read.state(), "aborted");
            assert!(elapsed < MAX_DELAY, "{elapsed:?} instead of the whole wait, 30 s");
        }
    }
    other.stop().await;
}

#[tokio::test]
async fn a_long_poll_ends_when_the_upload_expires() {
    let broker = TestBroker::start().await;
    let id = broker.open(b"hello", json!({})).await.expect(201).id();
    let advance = async {
        // By then the long poll waits, unless the machine is busy. A later one would find a final state at once.
        tokio::time::sleep(Duration::from_millis(300)).await;
        broker.advance_clock(Duration::from_secs(3600));
    };
    let ((read, elapsed), ()) = tokio::join!(long_poll(&broker, &id, "wait=30"), advance);
    assert_eq!(read.state(), "expired");
    assert!(elapsed < MAX_DELAY, "{elapsed:?} instead of the whole wait, 30 s");
}

/// If each of fifty clients polled the database four times a second, five seconds would take 2,000 transactions.
#[tokio::test]
async fn concurrent_long_polls_share_their_database_queries() {
    let broker = TestBroker::start().await;
    let opened = broker.open(b"hello", json!({})).await.expect(201);
    let transactions = async || -> i64 {
        let counted = sqlx::query_scalar("select xact_commit from pg_stat_database where datname = current_database()");
        counted.fetch_one(&broker.db).await.unwrap()
    };
    let before = transactions().await;
    let path = format!("/lfs/uploads/{}?wait=5", opened.id());
    let begun = Instant::now();
    for response in join_all((0..50).map(|_| broker.get(&path))).await {
        response.expect(200);
    }
    assert!(begun.elapsed() >= Duration::from_secs(5));
    let needed = transactions().await - before;
    assert!(needed < 1000, "{needed} transactions");
}
