//! The client's methods: what they send, what they retry, and which errors they return.

use std::time::{Duration, Instant};

use lfs_broker_client::api::{ErrorCode, ListTopics, ListUploads, OpenUpload, Policy, ReadUpload, ResolveOptions, UploadState};
use lfs_broker_client::{Client, Error, Retry, Settings};
use serde_json::json;
use time::macros::datetime;
use uuid::Uuid;

use crate::mock_server::{ID, MockServer, json_response, problem, raw_response, response};

fn id() -> Uuid {
    ID.parse().unwrap()
}

#[tokio::test]
async fn a_503_is_retried_after_its_retry_after() {
    let server = MockServer::new().await;
    let client = server.client();
    let upload = json_response("200 OK", &server.upload("open", 5, json!({})));
    let exchange = server.respond(vec![raw_response("503 X", "retry-after: 1\r\n", 0, b""), upload]);
    let begun = Instant::now();
    assert_eq!(client.read(id(), &ReadUpload::default()).await.unwrap().state, UploadState::Open);
    assert!(begun.elapsed() >= Duration::from_secs(1), "{:?}", begun.elapsed());
    assert_eq!(exchange.request_lines().await.len(), 2);
}

#[tokio::test]
async fn a_retry_after_beyond_the_total_wait_ends_the_attempts() {
    let server = MockServer::new().await;
    let client = server.client();
    let exchange = server.respond(vec![raw_response("503 X", "retry-after: 3600\r\n", 0, b"")]);
    let error = client.history(id()).await.unwrap_err();
    assert!(matches!(error, Error::Unexpected { status: 503, .. }), "{error}");
    assert_eq!(exchange.request_lines().await.len(), 1);
}

#[tokio::test]
async fn open_is_retried_only_with_an_idempotency_key() {
    let request = OpenUpload { topic: "videos".to_owned(), size: 5, ..OpenUpload::default() };

    let server = MockServer::new().await;
    let client = server.client();
    let exchange = server.respond(vec![problem(503, "dependency-unavailable", true)]);
    let error = client.open(&request, None).await.unwrap_err();
    assert!(error.is_problem(ErrorCode::DependencyUnavailable), "{error}");
    assert_eq!(exchange.requests().await[0].header("idempotency-key"), None);

    let server = MockServer::new().await;
    let client = server.client();
    let upload = json_response("201 Created", &server.upload("open", 5, json!({})));
    // The second connection ends before a response, so the client does not know whether the upload was opened.
    let exchange = server.respond(vec![problem(503, "dependency-unavailable", true), Vec::new(), upload]);
    assert_eq!(client.open(&request, Some("k-1")).await.unwrap().id, id());
    let requests = exchange.requests().await;
    assert_eq!(requests.len(), 3);
    for request in requests {
        assert_eq!(request.header("idempotency-key"), Some("k-1"));
        assert_eq!(request.header("authorization"), Some("Bearer t0ken"));
        assert_eq!(request.header("content-type"), Some("application/json"));
        assert_eq!(request.json(), json!({"topic": "videos", "size": 5}));
    }
}

#[tokio::test]
async fn an_error_keeps_the_brokers_problem() {
    let server = MockServer::new().await;
    let client = server.client();
    let url = server.url.clone();
    let responses = vec![
        problem(404, "upload-not-found", false),
        problem(410, "object-gone", false),
        problem(403, "pointer-forbidden", false),
        response("404 Not Found", b"<html>a proxy</html>"),
    ];
    let exchange = server.respond(responses);
    let error = client.abort(id()).await.unwrap_err();
    let Error::Refused(refused) = &error else { panic!("{error}") };
    assert_eq!((refused.status, refused.request_id.as_str()), (404, "r-1"));
    assert_eq!(error.to_string(), "the broker refused: 404 upload-not-found: d");
    let options = ResolveOptions::default();
    assert!(matches!(client.resolve(b"{}", &options).await, Err(Error::Gone(problem)) if problem.code == "object-gone"));
    assert!(matches!(client.resolve(b"{}", &options).await, Err(Error::Forbidden { .. })));
    let error = client.history(id()).await.unwrap_err();
    let expected = format!(
        "unexpected response, status 404: {url} answered with something that is not of an lfs-broker: <html>a proxy</html>"
    );
    assert_eq!(error.to_string(), expected);
    assert_eq!(exchange.request_lines().await[0], format!("DELETE /lfs/uploads/{ID}"));
}

#[tokio::test]
async fn redirects_are_not_followed_so_the_token_goes_to_one_host() {
    let server = MockServer::new().await;
    let client = server.client();
    let location = format!("location: {}/other\r\n", server.url);
    let exchange = server.respond(vec![raw_response("307 Temporary Redirect", &location, 0, b"")]);
    let error = client.history(id()).await.unwrap_err();
    assert!(matches!(error, Error::Unexpected { status: 307, .. }), "{error}");
    assert_eq!(exchange.request_lines().await.len(), 1);
}

#[tokio::test]
async fn filters_become_query_parameters() {
    let server = MockServer::new().await;
    let client = server.client();
    let page = json_response("200 OK", &json!({"items": [server.upload("published", 5, json!({}))], "next_cursor": "c"}));
    let exchange = server.respond(vec![page.clone(), page.clone(), page]);
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
        exchange.request_lines().await,
        [
            "GET /lfs/uploads?topic=a+b%26c&state=open&state=verified&key_prefix=%C3%A4%2F\
             &created_after=2026-11-21T06%3A00%3A00Z&limit=7",
            "GET /lfs/uploads",
            "POST /lfs/resolve?version_id=v%2F1&topic=a.b&validate=true",
        ]
    );
}

#[tokio::test]
async fn unknown_members_of_policies_are_ignored_and_topics_are_escaped() {
    let server = MockServer::new().await;
    let client = Client::new(&format!("{}/base/", server.url)).unwrap();
    let policy = json!({"enabled": false, "invented_later": {"a": 1}});
    let list = json!({"items": [{"topic": "videos", "policy": policy, "also_new": 1}], "next_cursor": null});
    let exchange = server.respond(vec![
        json_response("200 OK", &policy),
        json_response("200 OK", &list),
        json_response("200 OK", &policy),
        response("204 No Content", b""),
    ]);
    let expected = Policy { enabled: false, ..Policy::default() };
    assert_eq!(client.topic("a/b?c").await.unwrap(), expected);
    assert_eq!(client.topics(&ListTopics::default()).await.unwrap().items[0].policy, expected);
    assert_eq!(client.put_topic("videos", &expected).await.unwrap(), expected);
    client.delete_topic("videos").await.unwrap();
    assert_eq!(
        exchange.request_lines().await,
        [
            "GET /base/lfs/topics/a%2Fb%3Fc",
            "GET /base/lfs/topics",
            "PUT /base/lfs/topics/videos",
            "DELETE /base/lfs/topics/videos",
        ]
    );
}

#[tokio::test]
async fn a_topic_that_a_url_would_drop_is_refused_by_the_client() {
    let server = MockServer::new().await;
    let client = server.client();
    // Without the check, the first three would request the list of topics, and the last another topic.
    let exchange = tokio::spawn(async move { server.listener.accept().await.map(drop) });
    for topic in ["", ".", "..", "vid\teos"] {
        let error = client.topic(topic).await.unwrap_err();
        assert!(matches!(error, Error::Invalid(_)), "{topic:?}: {error}");
        assert!(matches!(client.delete_topic(topic).await, Err(Error::Invalid(_))), "{topic:?}");
        assert!(matches!(client.put_topic(topic, &json!({})).await, Err(Error::Invalid(_))), "{topic:?}");
    }
    assert!(!exchange.is_finished());
    exchange.abort();
}

#[tokio::test]
async fn a_response_that_is_not_a_policy_is_an_error() {
    let server = MockServer::new().await;
    let client = server.client();
    let list = json!({"items": [], "next_cursor": null});
    let exchange = server.respond(vec![json_response("200 OK", &list), json_response("200 OK", &json!([]))]);
    for _ in 0..2 {
        let error = client.topic("videos").await.unwrap_err();
        assert!(matches!(error, Error::Unexpected { status: 200, .. }), "{error}");
    }
    exchange.requests().await;
}

#[tokio::test]
async fn a_client_without_a_request_timeout_can_long_poll() {
    let server = MockServer::new().await;
    let client = server.client().with_settings(Settings { request_timeout: Duration::MAX, ..Settings::default() });
    let upload = json_response("200 OK", &server.upload("open", 5, json!({})));
    let exchange = server.respond(vec![upload]);
    let options = ReadUpload { wait: Some(20), version: Some(1) };
    assert_eq!(client.read(id(), &options).await.unwrap().state, UploadState::Open);
    assert_eq!(exchange.request_lines().await, [format!("GET /lfs/uploads/{ID}?wait=20&version=1")]);
}

#[tokio::test]
async fn an_address_without_a_listener_is_unreachable_after_every_attempt() {
    let server = MockServer::new().await;
    let client = server.client();
    drop(server);
    // Nothing was sent, so even an open without a key is retried until the attempts end.
    let error = client.open(&OpenUpload::default(), None).await.unwrap_err();
    assert!(matches!(&error, Error::Unreachable { peer: "the broker", .. }), "{error}");
    assert!(error.to_string().contains("refused") && !error.to_string().contains("http://"), "{error}");
}

#[tokio::test]
async fn a_broker_that_does_not_answer_is_unreachable_after_the_timeout() {
    let server = MockServer::new().await;
    let retry = Retry { attempts: 2, first_wait: Duration::from_millis(1), ..Retry::default() };
    let settings = Settings { request_timeout: Duration::from_millis(50), retry, ..Settings::default() };
    let client = server.client().with_settings(settings);
    // The server does not accept. The connection is established in the listener's backlog, and no response follows.
    let error = client.history(id()).await.unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");
    drop(server);
}

#[test]
fn only_http_addresses_are_accepted() {
    for wrong in ["", "localhost:8080", "ftp://x", "file:///etc/passwd"] {
        assert!(matches!(Client::new(wrong), Err(Error::Invalid(_))), "{wrong}");
    }
}
