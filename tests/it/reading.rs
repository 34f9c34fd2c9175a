//! What a reading shows in each state, the history, and waiting for a change.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use serde_json::json;

use crate::harness::{Answer, House, bytes, time};

fn has(answer: &Answer, members: &[&str]) {
    for member in members {
        assert!(answer.json.get(member).is_some(), "no {member} in {}", answer.text);
    }
}

fn lacks(answer: &Answer, members: &[&str]) {
    for member in members {
        assert!(answer.json.get(member).is_none(), "{member} in {}", answer.text);
    }
}

#[tokio::test]
async fn a_single_put_is_read_from_open_to_published() {
    let house = House::new().await;
    let more = json!({"key": "order-17", "content_type": "text/plain", "filename": "a.txt"});
    let opened = house.open(b"hello", more).await.expect(201);
    let id = opened.id();
    let read = house.upload(&id).await.expect(200);
    for (name, value) in
        opened.json.as_object().unwrap().iter().filter(|(name, _)| !["upload", "expires_in"].contains(&name.as_str()))
    {
        assert_eq!(&read.json[name], value, "{name}");
    }
    has(&read, &["key", "bucket", "object_key", "created_at", "updated_at", "expires_at"]);
    lacks(
        &read,
        &["upload", "parts", "uploaded_parts", "missing_parts", "key_base64", "pointer", "integrity", "record", "error"],
    );
    assert_eq!((read.json["next"].as_str(), read.json["mode"].as_str()), (Some("put"), Some("single")));
    let lasts = (time(&read.json["expires_at"]) - time(&read.json["created_at"])).whole_seconds();
    assert_eq!(lasts, 3600);
    assert!((3590..=3600).contains(&read.json["expires_in"].as_u64().unwrap()));

    house.put(&opened.json["upload"], b"hello").await.expect(200);
    assert_eq!(house.upload(&id).await.json["next"], "complete");
    let done = house.complete(&id).await.expect(200);
    let read = house.upload(&id).await.expect(200);
    assert_eq!((read.state(), read.json["next"].as_str()), ("published", Some("none")));
    for member in ["pointer", "integrity", "record"] {
        assert_eq!(read.json[member], done.json[member]);
    }
    lacks(&read, &["error", "upload"]);
    assert!(read.json["version"].as_i64() > opened.json["version"].as_i64());
    assert!(time(&read.json["updated_at"]) > time(&read.json["created_at"]));
}

#[tokio::test]
async fn a_multipart_upload_tells_which_parts_are_there_and_which_are_missing() {
    let house = House::new().await;
    let content = bytes((20 << 20) + 3, 1);
    let opened = house.open(&content, json!({"part_size": 5 << 20, "key_base64": "/w=="})).await.expect(201);
    assert_eq!((&opened.json["part_count"], &opened.json["part_size"]), (&json!(5), &json!(5 << 20)));
    let read = || async { house.upload(&opened.id()).await.expect(200) };
    let first = read().await;
    assert_eq!((&first.json["next"], &first.json["uploaded_parts"]), (&json!("parts"), &json!([])));
    assert_eq!(first.json["missing_parts"], json!([[1, 5]]));
    assert_eq!(first.json["key_base64"], "/w==");
    lacks(&first, &["key", "upload", "parts"]);
    let put = async |number: usize| {
        let part = &opened.json["parts"][number - 1];
        let (offset, size) = (part["offset"].as_u64().unwrap() as usize, part["size"].as_u64().unwrap() as usize);
        house.put(part, &content[offset..offset + size]).await.expect(200);
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
    house.complete(&opened.id()).await;
    let done = house.until(&opened.id(), "published").await;
    lacks(&done, &["uploaded_parts", "missing_parts"]);
    has(&done, &["part_size", "part_count", "pointer", "integrity", "record"]);
}

#[tokio::test]
async fn failed_uploads_say_that_nothing_comes_next_and_why() {
    let house = House::new().await;
    let rejected = house.open(b"hello", json!({})).await.expect(201);
    let key = rejected.json["object_key"].as_str().unwrap();
    house.put_object(key, b"hello", None).await;
    house.complete(&rejected.id()).await.expect_problem(422, "object-foreign");
    let aborted = house.open(b"hello", json!({})).await.expect(201);
    house.delete(&format!("/lfs/uploads/{}", aborted.id())).await.expect(204);
    let expired = house.open(b"hello", json!({})).await.expect(201);
    house.push_clock(Duration::from_secs(3600));
    for (upload, state) in [(&rejected, "rejected"), (&aborted, "aborted"), (&expired, "expired")] {
        let read = house.upload(&upload.id()).await.expect(200);
        assert_eq!((read.state(), read.json["next"].as_str()), (state, Some("none")));
        lacks(&read, &["pointer", "integrity", "record", "upload", "uploaded_parts"]);
        assert_eq!(read.json["error"]["code"].as_str(), (state == "rejected").then_some("object-foreign"));
    }
    assert_eq!(house.upload(&expired.id()).await.json["expires_in"], 0);
}

#[tokio::test]
async fn a_complete_that_found_nothing_leaves_its_reason_until_the_next_one() {
    let house = House::new().await;
    let opened = house.open(b"hello", json!({})).await.expect(201);
    house.complete(&opened.id()).await.expect_problem(409, "object-missing");
    let read = house.upload(&opened.id()).await;
    assert_eq!((read.state(), read.json["error"]["code"].as_str()), ("open", Some("object-missing")));
    house.put(&opened.json["upload"], b"hello").await.expect(200);
    house.complete(&opened.id()).await.expect(200);
    lacks(&house.upload(&opened.id()).await, &["error"]);
}

#[tokio::test]
async fn a_verified_upload_has_its_pointer_before_kafka_has() {
    let house = House::with(|settings| settings.broker.complete_wait = Duration::ZERO).await;
    // Whoever wants to relay must wait for this table.
    let mut relay = house.db.begin().await.unwrap();
    sqlx::query("lock table relay_shards in access exclusive mode").execute(&mut *relay).await.unwrap();
    let opened = house.open(b"hello", json!({})).await.expect(201);
    house.put(&opened.json["upload"], b"hello").await.expect(200);
    let mut promised = house.complete(&opened.id()).await.expect(202);
    for _ in 0..20 {
        // On a busy machine S3's verdict may come a moment later.
        if promised.state() == "verified" {
            break;
        }
        promised = house.complete(&opened.id()).await.expect(202);
    }
    assert!(promised.headers.contains_key("retry-after"));
    assert_eq!((promised.state(), promised.json["integrity"].as_str()), ("verified", Some("sha256")));
    lacks(&promised, &["record"]);
    let read = house.upload(&opened.id()).await.expect(200);
    assert_eq!((read.state(), read.json["next"].as_str()), ("verified", Some("wait")));
    assert_eq!(read.json["pointer"], promised.json["pointer"]);
    lacks(&read, &["record"]);
    house.delete(&format!("/lfs/uploads/{}", opened.id())).await.expect_problem(409, "state-conflict");
    relay.rollback().await.unwrap();
    let done = house.until(&opened.id(), "published").await;
    assert_eq!(done.json["pointer"], promised.json["pointer"]);
    let again = house.complete(&opened.id()).await.expect(200);
    assert_eq!(again.json["record"], done.json["record"]);
}

#[tokio::test]
async fn the_history_tells_every_transition_with_its_reason_and_its_author() {
    let house = House::new().await;
    let opened = house.open(b"hello", json!({})).await.expect(201);
    house.complete(&opened.id()).await.expect_problem(409, "object-missing");
    house.put(&opened.json["upload"], b"hello").await.expect(200);
    house.complete(&opened.id()).await.expect(200);
    let history = house.get(&format!("/lfs/uploads/{}/history", opened.id())).await.expect(200);
    let items = history.json["items"].as_array().unwrap();
    let moves: Vec<(Option<&str>, &str)> =
        items.iter().map(|item| (item["from"].as_str(), item["to"].as_str().unwrap())).collect();
    assert_eq!(
        moves,
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
async fn the_history_of_what_failed_names_the_client_or_the_sweeper() {
    let house = House::new().await;
    let aborted = house.open(b"a", json!({})).await.expect(201).id();
    house.delete(&format!("/lfs/uploads/{aborted}")).await.expect(204);
    let expired = house.open(b"b", json!({})).await.expect(201).id();
    house.push_clock(Duration::from_secs(3600));
    house.upload(&expired).await.expect(200);
    for (id, state, by) in [(aborted, "aborted", "client:anonymous"), (expired, "expired", "sweeper")] {
        let history = house.get(&format!("/lfs/uploads/{id}/history")).await.expect(200).json;
        assert_eq!(history["items"].as_array().unwrap().len(), 2);
        let last = &history["items"][1];
        assert_eq!((&last["from"], &last["to"], &last["by"]), (&json!("open"), &json!(state), &json!(by)));
    }
}

/// A reading that waits, and how long it took.
async fn waiting(house: &House, id: &str, query: &str) -> (Answer, Duration) {
    let begun = Instant::now();
    let answer = house.get(&format!("/lfs/uploads/{id}?{query}")).await.expect(200);
    (answer, begun.elapsed())
}

const AT_ONCE: Duration = Duration::from_secs(5);

#[tokio::test]
async fn waiting_answers_at_once_where_the_version_is_another_or_the_state_is_final() {
    let house = House::new().await;
    let id = house.open(b"hello", json!({})).await.expect(201).id();
    let (read, took) = waiting(&house, &id, "wait=30&version=7").await;
    assert_eq!(read.state(), "open");
    assert!(took < AT_ONCE, "{took:?}");
    house.delete(&format!("/lfs/uploads/{id}")).await.expect(204);
    let version = house.upload(&id).await.json["version"].clone();
    for query in ["wait=30".to_owned(), format!("wait=30&version={version}")] {
        let (read, took) = waiting(&house, &id, &query).await;
        assert_eq!(read.state(), "aborted");
        assert!(took < AT_ONCE, "{took:?}");
    }
}

#[tokio::test]
async fn waiting_ends_unchanged_when_nothing_happens() {
    let house = House::new().await;
    let id = house.open(b"hello", json!({})).await.expect(201).id();
    for query in ["wait=1", "wait=1&version=1"] {
        let (read, took) = waiting(&house, &id, query).await;
        assert_eq!((read.state(), &read.json["version"]), ("open", &json!(1)));
        assert!((Duration::from_secs(1)..AT_ONCE).contains(&took), "{took:?}");
    }
    let (_, took) = waiting(&house, &id, "wait=0").await;
    assert!(took < Duration::from_secs(1));
    house.get(&format!("/lfs/uploads/{id}?wait=31")).await.expect_problem(422, "validation-failed");
    house.get(&format!("/lfs/uploads/{id}?wait=-1")).await.expect_problem(422, "validation-failed");
}

#[tokio::test]
async fn waiting_ends_as_soon_as_the_upload_changes_even_by_another_replica() {
    let house = House::new().await;
    let other = house.replica().await;
    for base in [house.url(), format!("http://{}", other.address())] {
        let id = house.open(b"hello", json!({})).await.expect(201).id();
        let wait = async |query: &str| waiting(&house, &id, query).await;
        let abort = async {
            // The readings are under way: they were sent before, and take no time to arrive.
            tokio::time::sleep(Duration::from_millis(300)).await;
            house.send(house.http.delete(format!("{base}/lfs/uploads/{id}"))).await.expect(204);
        };
        let (with, without, ()) = tokio::join!(wait("wait=25&version=1"), wait("wait=25"), abort);
        for (read, took) in [with, without] {
            assert_eq!(read.state(), "aborted");
            assert!(took < AT_ONCE, "{took:?}");
        }
    }
    other.stop().await;
}

#[tokio::test]
async fn waiting_sees_the_end_of_an_upload_whose_time_is_over() {
    let house = House::new().await;
    let id = house.open(b"hello", json!({})).await.expect(201).id();
    let push = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        house.push_clock(Duration::from_secs(3600));
    };
    let ((read, took), ()) = tokio::join!(waiting(&house, &id, "wait=25"), push);
    assert_eq!(read.state(), "expired");
    assert!(took < AT_ONCE, "{took:?}");
}

/// Fifty who wait for five seconds: each looking for itself four times a second was 2,000 transactions.
#[tokio::test]
async fn many_who_wait_ask_the_database_together() {
    let house = House::new().await;
    let opened = house.open(b"hello", json!({})).await.expect(201);
    let transactions = async || -> i64 {
        let counted = sqlx::query_scalar("select xact_commit from pg_stat_database where datname = current_database()");
        counted.fetch_one(&house.db).await.unwrap()
    };
    let before = transactions().await;
    let path = format!("/lfs/uploads/{}?wait=5", opened.id());
    let begun = Instant::now();
    for answer in join_all((0..50).map(|_| house.get(&path))).await {
        answer.expect(200);
    }
    assert!(begun.elapsed() >= Duration::from_secs(5));
    let needed = transactions().await - before;
    assert!(needed < 1000, "{needed} transactions");
}
