//! The verbs: what travels, what is tried again, and what an error becomes.

use std::time::{Duration, Instant};

use lfs_broker_client::api::{ListTopics, ListUploads, OpenUpload, Policy, ReadUpload, ResolveOptions, UploadState};
use lfs_broker_client::{Client, Error, Retry, Settings};
use serde_json::json;
use time::macros::datetime;
use uuid::Uuid;

use crate::canned::{Canned, ID, answer, json_answer, problem, raw};

fn id() -> Uuid {
    ID.parse().unwrap()
}

#[tokio::test]
async fn a_503_is_tried_again_after_the_time_that_it_names() {
    let canned = Canned::new().await;
    let client = canned.client();
    let upload = json_answer("200 OK", &canned.upload("open", 5, json!({})));
    let script = canned.answers(vec![raw("503 X", "retry-after: 1\r\n", 0, b""), upload]);
    let begun = Instant::now();
    assert_eq!(client.read(id(), &ReadUpload::default()).await.unwrap().state, UploadState::Open);
    assert!(begun.elapsed() >= Duration::from_secs(1), "{:?}", begun.elapsed());
    assert_eq!(script.lines().await.len(), 2);
}

#[tokio::test]
async fn a_retry_after_beyond_all_patience_ends_the_attempts() {
    let canned = Canned::new().await;
    let client = canned.client();
    let script = canned.answers(vec![raw("503 X", "retry-after: 3600\r\n", 0, b"")]);
    let error = client.history(id()).await.unwrap_err();
    assert!(matches!(error, Error::Unexpected { status: 503, .. }), "{error}");
    assert_eq!(script.lines().await.len(), 1);
}

#[tokio::test]
async fn open_is_repeated_only_under_an_idempotency_key() {
    let request = OpenUpload { topic: "videos".to_owned(), size: 5, ..OpenUpload::default() };

    let canned = Canned::new().await;
    let client = canned.client();
    let script = canned.answers(vec![problem(503, "dependency-unavailable", true)]);
    let error = client.open(&request, None).await.unwrap_err();
    assert!(error.is_problem("dependency-unavailable"), "{error}");
    assert_eq!(script.asked().await[0].header("idempotency-key"), None);

    let canned = Canned::new().await;
    let client = canned.client();
    let upload = json_answer("201 Created", &canned.upload("open", 5, json!({})));
    // The second connection ends before an answer: whether the upload was opened is unknown.
    let script = canned.answers(vec![problem(503, "dependency-unavailable", true), Vec::new(), upload]);
    assert_eq!(client.open(&request, Some("k-1")).await.unwrap().id, id());
    let asked = script.asked().await;
    assert_eq!(asked.len(), 3);
    for one in asked {
        assert_eq!(one.header("idempotency-key"), Some("k-1"));
        assert_eq!(one.header("authorization"), Some("Bearer t0ken"));
        assert_eq!(one.header("content-type"), Some("application/json"));
        assert_eq!(one.json(), json!({"topic": "videos", "size": 5}));
    }
}

#[tokio::test]
async fn a_problem_keeps_all_that_the_broker_said() {
    let canned = Canned::new().await;
    let client = canned.client();
    let answers = vec![
        problem(404, "upload-not-found", false),
        problem(410, "object-gone", false),
        problem(403, "pointer-forbidden", false),
        answer("404 Not Found", b"<html>a proxy</html>"),
    ];
    let script = canned.answers(answers);
    let error = client.abort(id()).await.unwrap_err();
    let Error::Refused(refused) = &error else { panic!("{error}") };
    assert_eq!((refused.status, refused.request_id.as_str()), (404, "r-1"));
    assert_eq!(error.to_string(), "the broker refused: 404 upload-not-found: d");
    let options = ResolveOptions::default();
    assert!(matches!(client.resolve(b"{}", &options).await, Err(Error::Gone(problem)) if problem.code == "object-gone"));
    assert!(matches!(client.resolve(b"{}", &options).await, Err(Error::Forbidden { .. })));
    let error = client.history(id()).await.unwrap_err();
    assert_eq!(error.to_string(), "unexpected answer, status 404: <html>a proxy</html>");
    assert_eq!(script.lines().await[0], format!("DELETE /lfs/uploads/{ID}"));
}

#[tokio::test]
async fn a_redirect_does_not_take_the_token_elsewhere() {
    let canned = Canned::new().await;
    let client = canned.client();
    let location = format!("location: {}/other\r\n", canned.url);
    let script = canned.answers(vec![raw("307 Temporary Redirect", &location, 0, b"")]);
    let error = client.history(id()).await.unwrap_err();
    assert!(matches!(error, Error::Unexpected { status: 307, .. }), "{error}");
    assert_eq!(script.lines().await.len(), 1);
}

#[tokio::test]
async fn filters_become_a_query_and_none_become_nothing() {
    let canned = Canned::new().await;
    let client = canned.client();
    let page = json_answer("200 OK", &json!({"items": [canned.upload("published", 5, json!({}))], "next_cursor": "c"}));
    let script = canned.answers(vec![page.clone(), page.clone(), page]);
    let filters = ListUploads {
        topic: Some("a b&c".to_owned()),
        state: vec![UploadState::Open, UploadState::Verified],
        key_prefix: Some("ä/".to_owned()),
        created_after: Some(datetime!(2026-11-21 08:00 +02:00)),
        limit: Some(7),
        ..ListUploads::default()
    };
    assert_eq!(client.list(&filters).await.unwrap().next_cursor.as_deref(), Some("c"));
    client.list(&ListUploads::default()).await.unwrap();
    let versioned = ResolveOptions { version_id: Some("v/1".to_owned()), topic: Some("a.b".to_owned()), validate: true };
    assert!(client.resolve(b"{}", &versioned).await.is_err());
    assert_eq!(
        script.lines().await,
        [
            "GET /lfs/uploads?topic=a+b%26c&state=open&state=verified&key_prefix=%C3%A4%2F\
             &created_after=2026-11-21T06%3A00%3A00Z&limit=7",
            "GET /lfs/uploads",
            "POST /lfs/resolve?version_id=v%2F1&topic=a.b&validate=true",
        ]
    );
}

#[tokio::test]
async fn policies_may_grow_members_and_topics_are_escaped() {
    let canned = Canned::new().await;
    let client = Client::new(&format!("{}/base/", canned.url)).unwrap();
    let policy = json!({"enabled": false, "invented_later": {"a": 1}});
    let list = json!({"items": [{"topic": "videos", "policy": policy, "also_new": 1}], "next_cursor": null});
    let script = canned.answers(vec![
        json_answer("200 OK", &policy),
        json_answer("200 OK", &list),
        json_answer("200 OK", &policy),
        answer("204 No Content", b""),
    ]);
    let expected = Policy { enabled: false, ..Policy::default() };
    assert_eq!(client.topic("a/b?c").await.unwrap(), expected);
    assert_eq!(client.topics(&ListTopics::default()).await.unwrap().items[0].policy, expected);
    assert_eq!(client.put_topic("videos", &expected).await.unwrap(), expected);
    client.delete_topic("videos").await.unwrap();
    assert_eq!(
        script.lines().await,
        [
            "GET /base/lfs/topics/a%2Fb%3Fc",
            "GET /base/lfs/topics",
            "PUT /base/lfs/topics/videos",
            "DELETE /base/lfs/topics/videos",
        ]
    );
}

#[tokio::test]
async fn a_topic_that_a_url_would_swallow_is_not_asked_for() {
    let canned = Canned::new().await;
    let client = canned.client();
    // The list of topics would answer to the first three, and another topic to the last.
    let script = tokio::spawn(async move { canned.listener.accept().await.map(drop) });
    for topic in ["", ".", "..", "vid\teos"] {
        let error = client.topic(topic).await.unwrap_err();
        assert!(matches!(error, Error::Invalid(_)), "{topic:?}: {error}");
        assert!(matches!(client.delete_topic(topic).await, Err(Error::Invalid(_))), "{topic:?}");
        assert!(matches!(client.put_topic(topic, &json!({})).await, Err(Error::Invalid(_))), "{topic:?}");
    }
    assert!(!script.is_finished());
    script.abort();
}

#[tokio::test]
async fn an_answer_that_is_no_policy_does_not_become_the_default_one() {
    let canned = Canned::new().await;
    let client = canned.client();
    let list = json!({"items": [], "next_cursor": null});
    let script = canned.answers(vec![json_answer("200 OK", &list), json_answer("200 OK", &json!([]))]);
    for _ in 0..2 {
        let error = client.topic("videos").await.unwrap_err();
        assert!(matches!(error, Error::Unexpected { status: 200, .. }), "{error}");
    }
    script.asked().await;
}

#[tokio::test]
async fn a_client_of_endless_patience_can_long_poll() {
    let canned = Canned::new().await;
    let client = canned.client().with_settings(Settings { request_timeout: Duration::MAX, ..Settings::default() });
    let upload = json_answer("200 OK", &canned.upload("open", 5, json!({})));
    let script = canned.answers(vec![upload]);
    let options = ReadUpload { wait: Some(20), version: Some(1) };
    assert_eq!(client.read(id(), &options).await.unwrap().state, UploadState::Open);
    assert_eq!(script.lines().await, [format!("GET /lfs/uploads/{ID}?wait=20&version=1")]);
}

#[tokio::test]
async fn a_dead_address_is_unreachable_after_every_attempt() {
    let canned = Canned::new().await;
    let client = canned.client();
    drop(canned);
    // Nothing was sent, so even an open without a key is tried again, and still ends.
    let error = client.open(&OpenUpload::default(), None).await.unwrap_err();
    assert!(matches!(&error, Error::Unreachable { peer: "the broker", .. }), "{error}");
    assert!(error.to_string().contains("refused") && !error.to_string().contains("http://"), "{error}");
}

#[tokio::test]
async fn a_broker_that_does_not_answer_is_given_up_on() {
    let canned = Canned::new().await;
    let retry = Retry { attempts: 2, first_wait: Duration::from_millis(1), ..Retry::default() };
    let patience = Settings { request_timeout: Duration::from_millis(50), retry, ..Settings::default() };
    let client = canned.client().with_settings(patience);
    // Nobody accepts: the connection comes about in the listener's backlog and then nothing follows.
    let error = client.history(id()).await.unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");
    drop(canned);
}

#[test]
fn only_http_addresses_are_taken() {
    for wrong in ["", "localhost:8080", "ftp://x", "file:///etc/passwd"] {
        assert!(matches!(Client::new(wrong), Err(Error::Invalid(_))), "{wrong}");
    }
}
