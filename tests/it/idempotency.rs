//! One `Idempotency-Key` belongs to one session, whatever happens in between.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::harness::tokens::{claims, sign};
use crate::harness::{ApiResponse, TestBroker, bytes, sha256};

async fn open_with_key(broker: &TestBroker, key: &str, body: &Value) -> ApiResponse {
    broker.send(broker.request("POST", "/lfs/uploads").header("idempotency-key", key).json(body)).await
}

fn request(broker: &TestBroker) -> Value {
    json!({"topic": broker.topic, "size": 5, "sha256": sha256(b"hello"), "key": "k", "headers": {"a": "1", "b": "2"}})
}

#[tokio::test]
async fn a_replay_returns_the_same_session_with_fresh_urls() {
    let broker = TestBroker::start().await;
    let begun = Instant::now();
    let first = open_with_key(&broker, "key-1", &request(&broker)).await.expect(201);
    // A signature contains whole seconds: in the next second the URL is another.
    let mut second = open_with_key(&broker, "key-1", &request(&broker)).await.expect(200);
    while first.json["upload"]["url"] == second.json["upload"]["url"] && begun.elapsed() < Duration::from_secs(10) {
        second = open_with_key(&broker, "key-1", &request(&broker)).await.expect(200);
    }
    assert_eq!((first.id(), &first.headers["location"]), (second.id(), &second.headers["location"]));
    assert_eq!((&first.json["version"], &first.json["object_key"]), (&second.json["version"], &second.json["object_key"]));
    assert_ne!(first.json["upload"]["url"], second.json["upload"]["url"]);
    broker.put(&second.json["upload"], b"hello").await.expect(200);
    broker.complete(&first.id()).await.expect(200);

    let content = bytes(6 << 20, 1);
    let multipart = json!({"topic": broker.topic, "size": content.len(), "sha256": sha256(&content), "part_size": 5 << 20});
    let first = open_with_key(&broker, "key-2", &multipart).await.expect(201);
    let second = open_with_key(&broker, "key-2", &multipart).await.expect(200);
    assert_eq!(first.id(), second.id());
    broker.put(&first.json["parts"][0], &content[..5 << 20]).await.expect(200);
    broker.put(&second.json["parts"][1], &content[5 << 20..]).await.expect(200);
    broker.complete(&first.id()).await.expect(200);
}

#[tokio::test]
async fn a_key_means_the_same_with_or_without_quotes() {
    let broker = TestBroker::start().await;
    let bare = open_with_key(&broker, "key", &request(&broker)).await.expect(201);
    let quoted = open_with_key(&broker, "\"key\"", &request(&broker)).await.expect(200);
    assert_eq!(bare.id(), quoted.id());
    let other = open_with_key(&broker, "Key", &request(&broker)).await.expect(201);
    assert_ne!(bare.id(), other.id());
}

#[tokio::test]
async fn another_request_under_the_same_key_is_refused() {
    let broker = TestBroker::start().await;
    open_with_key(&broker, "key", &request(&broker)).await.expect(201);
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
        let mut other = request(&broker);
        other[member] = value;
        open_with_key(&broker, "key", &other).await.expect_problem(422, "idempotency-key-reused");
    }
    open_with_key(&broker, "key", &request(&broker)).await.expect(200);
}

#[tokio::test]
async fn another_spelling_of_the_same_request_is_a_replay() {
    let broker = TestBroker::start().await;
    let first = open_with_key(&broker, "key", &request(&broker)).await.expect(201);
    let (topic, hash) = (&broker.topic, sha256(b"hello"));
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
        let request = broker.request("POST", "/lfs/uploads").header("idempotency-key", "key");
        let again = broker.send(request.header("content-type", "application/json").body(spelling.clone())).await;
        assert_eq!((again.status, again.json["id"].as_str()), (200, Some(first.id().as_str())), "{spelling}: {}", again.text);
    }
}

#[tokio::test]
async fn a_replay_shows_the_current_state_of_the_session() {
    let broker = TestBroker::start().await;
    let mut ids = Vec::new();
    for key in ["published", "aborted", "expired"] {
        let opened = open_with_key(&broker, key, &request(&broker)).await.expect(201);
        ids.push(opened.id());
        match key {
            "published" => {
                broker.put(&opened.json["upload"], b"hello").await.expect(200);
                broker.complete(&opened.id()).await.expect(200);
            }
            "aborted" => {
                broker.delete(&format!("/lfs/uploads/{}", opened.id())).await.expect(204);
            }
            _ => broker.advance_clock(Duration::from_secs(3601)),
        }
    }
    for (key, id) in ["published", "aborted", "expired"].into_iter().zip(ids) {
        let replayed = open_with_key(&broker, key, &request(&broker)).await.expect(200);
        assert_eq!((replayed.state(), replayed.id()), (key, id.clone()));
        assert!(replayed.json.get("upload").is_none() && replayed.json.get("parts").is_none(), "{}", replayed.text);
        // The replay shows the current session, with its pointer if it has one.
        let mut now = broker.upload(&id).await.json;
        let mut replayed = replayed.json;
        for response in [&mut now, &mut replayed] {
            response.as_object_mut().unwrap().remove("expires_in");
        }
        assert_eq!(replayed, now);
        assert_eq!(replayed.get("pointer").is_some(), key == "published");
    }
    assert_eq!(broker.get("/lfs/uploads").await.json["items"].as_array().unwrap().len(), 3);
}

#[tokio::test]
async fn a_key_is_deleted_one_day_after_its_session_ended_and_not_before() {
    let broker = TestBroker::start().await;
    let first = open_with_key(&broker, "key", &request(&broker)).await.expect(201);
    broker.put(&first.json["upload"], b"hello").await.expect(200);
    broker.complete(&first.id()).await.expect(200);
    broker.advance_clock(Duration::from_secs(23 * 3600));
    assert_eq!(open_with_key(&broker, "key", &request(&broker)).await.expect(200).id(), first.id());
    broker.advance_clock(Duration::from_secs(2 * 3600));
    let keys =
        || async { sqlx::query_scalar::<_, i64>("select count(*) from idempotency_keys").fetch_one(&broker.db).await.unwrap() };
    broker.eventually("the key is deleted", || async { keys().await == 0 }).await;
    assert_ne!(open_with_key(&broker, "key", &request(&broker)).await.expect(201).id(), first.id());
}

#[tokio::test]
async fn twenty_concurrent_opens_under_one_key_create_one_session() {
    let broker = TestBroker::start().await;
    let body = request(&broker);
    let responses = futures_util::future::join_all((0..20).map(|_| open_with_key(&broker, "key", &body))).await;
    let mut ids = BTreeSet::new();
    let mut created = 0;
    for response in responses {
        match response.status {
            409 => drop(response.expect_problem(409, "idempotency-in-flight")),
            status => {
                created += usize::from(status == 201);
                assert!(status == 200 || status == 201, "{}", response.text);
                ids.insert(response.id());
            }
        }
    }
    assert_eq!((ids.len(), created), (1, 1));
    assert_eq!(broker.get("/lfs/uploads").await.json["items"].as_array().unwrap().len(), 1);
    let open_sessions: i64 = sqlx::query_scalar("select open_sessions from tenants").fetch_one(&broker.db).await.unwrap();
    assert_eq!(open_sessions, 1);
}

#[tokio::test]
async fn a_retry_during_its_first_request_is_a_replay_even_if_that_request_took_the_last_quota() {
    let broker = TestBroker::start_with(|settings| settings.broker.quota.open_sessions = 1).await;
    let body = request(&broker);
    let responses = futures_util::future::join_all((0..20).map(|_| open_with_key(&broker, "key", &body))).await;
    let statuses: BTreeSet<u16> = responses.iter().map(|response| response.status).collect();
    assert!(statuses.is_subset(&BTreeSet::from([200, 201, 409])), "{statuses:?}");
    open_with_key(&broker, "another", &body).await.expect_problem(429, "quota-sessions-exceeded");
}

#[tokio::test]
async fn a_refused_open_does_not_use_its_key() {
    let broker = TestBroker::start().await;
    broker.put_policy(&broker.topic, &json!({"enabled": false})).await.expect(200);
    open_with_key(&broker, "key", &request(&broker)).await.expect_problem(403, "topic-not-enabled");
    broker.put_policy(&broker.topic, &json!({})).await.expect(200);
    let mut other = request(&broker);
    other["size"] = json!(6);
    open_with_key(&broker, "key", &other).await.expect(201);
}

#[tokio::test]
async fn a_replay_is_checked_against_neither_policy_nor_kafka_nor_quota() {
    let broker = TestBroker::start_with(|settings| settings.broker.quota.open_sessions = 1).await;
    let first = open_with_key(&broker, "key", &request(&broker)).await.expect(201);
    broker.put_policy(&broker.topic, &json!({"enabled": false})).await.expect(200);
    let replayed = open_with_key(&broker, "key", &request(&broker)).await.expect(200);
    assert_eq!(first.id(), replayed.id());
    open_with_key(&broker, "other", &request(&broker)).await.expect_problem(403, "topic-not-enabled");
}

#[tokio::test]
async fn a_key_belongs_to_one_tenant_and_subject() {
    let broker = TestBroker::start_with_tokens(|_| {}).await;
    let mut ids = BTreeSet::new();
    for (tenant, subject) in [("acme", "a"), ("acme", "b"), ("other", "a")] {
        let mut claims = claims(tenant, "lfs:write", &["*"]);
        claims["sub"] = subject.into();
        let token = sign(&claims);
        let open = || {
            broker.request("POST", "/lfs/uploads").header("idempotency-key", "key").bearer_auth(&token).json(&request(&broker))
        };
        let first = broker.send(open()).await.expect(201);
        assert_eq!(broker.send(open()).await.expect(200).id(), first.id());
        ids.insert(first.id());
    }
    assert_eq!(ids.len(), 3);
}
