//! One `Idempotency-Key`, one session, whatever happens in between.

use std::collections::BTreeSet;
use std::time::Duration;

use serde_json::{Value, json};

use crate::harness::tokens::{claims, sign};
use crate::harness::{Answer, House, bytes, sha256};

async fn open_under(house: &House, key: &str, body: &Value) -> Answer {
    house.send(house.request("POST", "/lfs/uploads").header("idempotency-key", key).json(body)).await
}

fn request(house: &House) -> Value {
    json!({"topic": house.topic, "size": 5, "sha256": sha256(b"hello"), "key": "k", "headers": {"a": "1", "b": "2"}})
}

#[tokio::test]
async fn a_replay_gives_the_same_session_with_fresh_urls() {
    let house = House::new().await;
    let first = open_under(&house, "key-1", &request(&house)).await.expect(201);
    // A signature's time has whole seconds: the next second signs another URL.
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let second = open_under(&house, "key-1", &request(&house)).await.expect(200);
    assert_eq!((first.id(), &first.headers["location"]), (second.id(), &second.headers["location"]));
    assert_eq!((&first.json["version"], &first.json["object_key"]), (&second.json["version"], &second.json["object_key"]));
    assert_ne!(first.json["upload"]["url"], second.json["upload"]["url"]);
    house.put(&second.json["upload"], b"hello").await.expect(200);
    house.complete(&first.id()).await.expect(200);

    let content = bytes(6 << 20, 1);
    let parted = json!({"topic": house.topic, "size": content.len(), "sha256": sha256(&content), "part_size": 5 << 20});
    let first = open_under(&house, "key-2", &parted).await.expect(201);
    let second = open_under(&house, "key-2", &parted).await.expect(200);
    assert_eq!(first.id(), second.id());
    house.put(&first.json["parts"][0], &content[..5 << 20]).await.expect(200);
    house.put(&second.json["parts"][1], &content[5 << 20..]).await.expect(200);
    house.complete(&first.id()).await.expect(200);
}

#[tokio::test]
async fn a_key_means_the_same_bare_or_quoted() {
    let house = House::new().await;
    let bare = open_under(&house, "key", &request(&house)).await.expect(201);
    let quoted = open_under(&house, "\"key\"", &request(&house)).await.expect(200);
    assert_eq!(bare.id(), quoted.id());
    let other = open_under(&house, "Key", &request(&house)).await.expect(201);
    assert_ne!(bare.id(), other.id());
}

#[tokio::test]
async fn another_request_under_the_same_key_is_refused() {
    let house = House::new().await;
    open_under(&house, "key", &request(&house)).await.expect(201);
    for (member, value) in [
        ("size", json!(6)),
        ("sha256", json!(sha256(b"other"))),
        ("key", json!("l")),
        ("headers", json!({"a": "1"})),
        ("headers", json!({"a": "2", "b": "1"})),
        ("partition", json!(0)),
        ("filename", json!("a")),
        ("content_type", json!("a/b")),
        ("topic", json!("elsewhere")),
        ("part_size", json!(5 << 20)),
    ] {
        let mut other = request(&house);
        other[member] = value;
        open_under(&house, "key", &other).await.expect_problem(422, "idempotency-key-reused");
    }
    open_under(&house, "key", &request(&house)).await.expect(200);
}

#[tokio::test]
async fn another_spelling_of_the_same_request_is_the_same_request() {
    let house = House::new().await;
    let first = open_under(&house, "key", &request(&house)).await.expect(201);
    let (topic, hash) = (&house.topic, sha256(b"hello"));
    for spelling in [
        format!(r#" {{ "headers" : {{"b":"2","a":"1"}}, "key":"k","sha256":"{hash}", "size":5,"topic":"{topic}" }} "#),
        format!(
            r#"{{"topic":"{topic}","size":5,"sha256":"{}","key":"\u006b","headers":{{"a":"1","b":"2"}}}}"#,
            hash.to_uppercase()
        ),
        format!(
            r#"{{"topic":"{topic}","size":5,"checksum_alg":"sha256","checksum":"{hash}","key_base64":"aw==","headers":{{"a":"1","b":"2"}}}}"#
        ),
        format!(
            r#"{{"topic":"{topic}","size":5,"sha256":"{hash}","key":"k","headers":{{"a":"1","b":"2"}},"content_type":"application/octet-stream","filename":null}}"#
        ),
    ] {
        let request = house.request("POST", "/lfs/uploads").header("idempotency-key", "key");
        let again = house.send(request.header("content-type", "application/json").body(spelling.clone())).await;
        assert_eq!((again.status, again.json["id"].as_str()), (200, Some(first.id().as_str())), "{spelling}: {}", again.text);
    }
}

#[tokio::test]
async fn a_replay_says_what_became_of_the_session() {
    let house = House::new().await;
    let mut seen = Vec::new();
    for key in ["published", "aborted", "expired"] {
        let opened = open_under(&house, key, &request(&house)).await.expect(201);
        seen.push(opened.id());
        match key {
            "published" => {
                house.put(&opened.json["upload"], b"hello").await.expect(200);
                house.complete(&opened.id()).await.expect(200);
            }
            "aborted" => {
                house.delete(&format!("/lfs/uploads/{}", opened.id())).await.expect(204);
            }
            _ => house.push_clock(Duration::from_secs(3601)),
        }
    }
    for (key, id) in ["published", "aborted", "expired"].into_iter().zip(seen) {
        let replayed = open_under(&house, key, &request(&house)).await.expect(200);
        assert_eq!((replayed.state(), replayed.id()), (key, id.clone()));
        assert!(replayed.json.get("upload").is_none() && replayed.json.get("parts").is_none(), "{}", replayed.text);
        // As it is now: a pointer, too, where there is one.
        let mut now = house.upload(&id).await.json;
        let mut replayed = replayed.json;
        for answer in [&mut now, &mut replayed] {
            answer.as_object_mut().unwrap().remove("expires_in");
        }
        assert_eq!(replayed, now);
        assert_eq!(replayed.get("pointer").is_some(), key == "published");
    }
    assert_eq!(house.get("/lfs/uploads").await.json["items"].as_array().unwrap().len(), 3);
}

#[tokio::test]
async fn a_key_is_forgotten_a_day_after_its_session_ended_and_not_before() {
    let house = House::new().await;
    let first = open_under(&house, "key", &request(&house)).await.expect(201);
    house.put(&first.json["upload"], b"hello").await.expect(200);
    house.complete(&first.id()).await.expect(200);
    house.push_clock(Duration::from_secs(23 * 3600));
    assert_eq!(open_under(&house, "key", &request(&house)).await.expect(200).id(), first.id());
    house.push_clock(Duration::from_secs(2 * 3600));
    let keys =
        || async { sqlx::query_scalar::<_, i64>("select count(*) from idempotency_keys").fetch_one(&house.db).await.unwrap() };
    house.eventually("the key is forgotten", || async { keys().await == 0 }).await;
    assert_ne!(open_under(&house, "key", &request(&house)).await.expect(201).id(), first.id());
}

#[tokio::test]
async fn twenty_opens_at_once_under_one_key_make_one_session() {
    let house = House::new().await;
    let body = request(&house);
    let answers = futures_util::future::join_all((0..20).map(|_| open_under(&house, "key", &body))).await;
    let mut ids = BTreeSet::new();
    let mut fresh = 0;
    for answer in answers {
        match answer.status {
            409 => drop(answer.expect_problem(409, "idempotency-in-flight")),
            status => {
                fresh += usize::from(status == 201);
                assert!(status == 200 || status == 201, "{}", answer.text);
                ids.insert(answer.id());
            }
        }
    }
    assert_eq!((ids.len(), fresh), (1, 1));
    assert_eq!(house.get("/lfs/uploads").await.json["items"].as_array().unwrap().len(), 1);
    let held: i64 = sqlx::query_scalar("select open_sessions from tenants").fetch_one(&house.db).await.unwrap();
    assert_eq!(held, 1);
}

#[tokio::test]
async fn a_retry_that_meets_its_first_request_is_a_replay_although_that_one_took_the_last_room() {
    let house = House::with(|settings| settings.broker.quota.open_sessions = 1).await;
    let body = request(&house);
    let answers = futures_util::future::join_all((0..20).map(|_| open_under(&house, "key", &body))).await;
    let statuses: BTreeSet<u16> = answers.iter().map(|answer| answer.status).collect();
    assert!(statuses.is_subset(&BTreeSet::from([200, 201, 409])), "{statuses:?}");
    open_under(&house, "another", &body).await.expect_problem(429, "quota-sessions-exceeded");
}

#[tokio::test]
async fn a_refused_open_takes_no_key() {
    let house = House::new().await;
    house.put_policy(&house.topic, &json!({"enabled": false})).await.expect(200);
    open_under(&house, "key", &request(&house)).await.expect_problem(403, "topic-not-enabled");
    house.put_policy(&house.topic, &json!({})).await.expect(200);
    let mut other = request(&house);
    other["size"] = json!(6);
    open_under(&house, "key", &other).await.expect(201);
}

#[tokio::test]
async fn a_replay_asks_neither_policy_nor_kafka_nor_quota() {
    let house = House::with(|settings| settings.broker.quota.open_sessions = 1).await;
    let first = open_under(&house, "key", &request(&house)).await.expect(201);
    house.put_policy(&house.topic, &json!({"enabled": false})).await.expect(200);
    let replayed = open_under(&house, "key", &request(&house)).await.expect(200);
    assert_eq!(first.id(), replayed.id());
    open_under(&house, "other", &request(&house)).await.expect_problem(403, "topic-not-enabled");
}

#[tokio::test]
async fn a_key_belongs_to_one_tenant_and_subject() {
    let house = House::with_tokens(|_| {}).await;
    let mut ids = BTreeSet::new();
    for (tenant, subject) in [("acme", "a"), ("acme", "b"), ("other", "a")] {
        let mut claims = claims(tenant, "lfs:write", &["*"]);
        claims["sub"] = subject.into();
        let token = sign(&claims);
        let open =
            || house.request("POST", "/lfs/uploads").header("idempotency-key", "key").bearer_auth(&token).json(&request(&house));
        let first = house.send(open()).await.expect(201);
        assert_eq!(house.send(open()).await.expect(200).id(), first.id());
        ids.insert(first.id());
    }
    assert_eq!(ids.len(), 3);
}
