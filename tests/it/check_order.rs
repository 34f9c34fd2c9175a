//! A request with several errors gets the first in this order: route, method, sizes, token, scope, media type, JSON,
//! shape, the token's topics, idempotency, policy, Kafka's metadata, quota.

use serde_json::{Value, json};

use crate::harness::tokens::token;
use crate::harness::{ApiResponse, TestBroker, sha256};

const UNKNOWN: &str = "01920000-0000-7000-8000-000000000000";

/// One request, whose errors are fixed step by step.
struct FaultyRequest<'a> {
    broker: &'a TestBroker,
    method: &'static str,
    path: &'static str,
    token: Option<String>,
    media_type: &'static str,
    key: &'static str,
    body: Vec<u8>,
}

impl FaultyRequest<'_> {
    async fn send(&self) -> ApiResponse {
        let mut request = self.broker.request(self.method, self.path).body(self.body.clone());
        if let Some(token) = &self.token {
            request = request.bearer_auth(token);
        }
        self.broker.send(request.header("content-type", self.media_type).header("idempotency-key", self.key)).await
    }
}

#[tokio::test]
async fn the_errors_of_a_request_are_reported_in_a_fixed_order() {
    let broker = TestBroker::start_with_tokens(|settings| settings.policy.default_enabled = false).await;
    let mut request = FaultyRequest {
        broker: &broker,
        method: "PUT",
        path: "/lfs/uploadz",
        token: None,
        media_type: "text/plain",
        key: "a b",
        body: vec![b'{'; (1 << 20) + 1],
    };
    request.send().await.expect_problem(404, "not-found");
    request.path = "/lfs/uploads";
    request.send().await.expect_problem(405, "method-not-allowed");
    request.method = "POST";
    request.send().await.expect_problem(413, "request-too-large");
    request.body = b"{".to_vec();
    let anonymous = request.send().await.expect_problem(401, "unauthenticated");
    assert!(anonymous.headers.contains_key("www-authenticate"));
    request.token = Some("nonsense".to_owned());
    request.send().await.expect_problem(401, "invalid-token");
    request.token = Some(token("acme", "lfs:read", &[]));
    request.send().await.expect_problem(403, "insufficient-scope");
    request.token = Some(token("acme", "lfs:write", &[]));
    request.send().await.expect_problem(415, "unsupported-media-type");
    request.media_type = "application/json";
    request.send().await.expect_problem(400, "malformed-json");
    request.body = json!({"topic": "lacking", "size": "big"}).to_string().into();
    request.send().await.expect_problem(422, "validation-failed");
    request.body = json!({"topic": "lacking", "size": 1 << 20, "sha256": sha256(b"x")}).to_string().into();
    request.send().await.expect_problem(403, "topic-forbidden");
    request.token = Some(token("acme", "lfs:write", &["lack*"]));
    request.send().await.expect_problem(400, "idempotency-key-invalid");
    request.key = "k";
    request.send().await.expect_problem(403, "topic-not-enabled");
    let policy = broker.request("PUT", "/lfs/topics/lacking").bearer_auth(token("acme", "lfs:admin", &[]));
    broker.send(policy.json(&json!({}))).await.expect(200);
    request.send().await.expect_problem(404, "topic-not-found");
}

#[tokio::test]
async fn headers_are_limited_after_the_route_and_before_the_token() {
    let broker = TestBroker::start_with_tokens(|settings| settings.policy.default_enabled = false).await;
    let padded = |method, path| broker.request(method, path).header("x-padding", "x".repeat(17 << 10));
    broker.send(padded("GET", "/nope")).await.expect_problem(404, "not-found");
    broker.send(padded("PUT", "/lfs/uploads")).await.expect_problem(405, "method-not-allowed");
    broker.send(padded("GET", "/lfs/uploads")).await.expect_problem(431, "headers-too-large");
}

#[tokio::test]
async fn a_reused_idempotency_key_is_reported_before_policy_kafka_and_quota() {
    let broker = TestBroker::start_with(|settings| settings.broker.quota.open_sessions = 1).await;
    let open = |more: Value| {
        let mut body = json!({"topic": broker.topic, "size": 1, "sha256": sha256(b"x")});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        broker.send(broker.request("POST", "/lfs/uploads").header("idempotency-key", "k").json(&body))
    };
    open(json!({})).await.expect(201);
    broker.put_policy(&broker.topic, &json!({"enabled": false})).await.expect(200);
    open(json!({"size": 2})).await.expect_problem(422, "idempotency-key-reused");
    open(json!({"size": 2, "filename": "a/b"})).await.expect_problem(422, "validation-failed");
    open(json!({})).await.expect(200);
}

#[tokio::test]
async fn policy_is_checked_before_kafka_and_kafka_before_quota() {
    let broker = TestBroker::start_with(|settings| settings.broker.quota.open_sessions = 1).await;
    broker.open(b"x", json!({})).await.expect(201);
    let lacking = format!("{}-lacking", broker.topic);
    broker.put_policy(&lacking, &json!({"max_bytes": 1})).await.expect(200);
    broker.open(b"xy", json!({"topic": lacking})).await.expect_problem(422, "object-too-large");
    broker.open(b"x", json!({"topic": lacking})).await.expect_problem(404, "topic-not-found");
    let refused = broker.open(b"x", json!({"partition": 99})).await.expect_problem(422, "validation-failed");
    let detail = refused.json["detail"].as_str().unwrap();
    assert!(detail.starts_with("partition 99 does not exist: topic ") && detail.ends_with(" has partitions 0 to 2"), "{detail}");
    broker.open(b"x", json!({})).await.expect_problem(429, "quota-sessions-exceeded");
    broker.put_policy(&broker.topic, &json!({"enabled": false, "max_bytes": 0})).await.expect(200);
    broker.open(b"x", json!({})).await.expect_problem(403, "topic-not-enabled");
}

#[tokio::test]
async fn a_size_beyond_every_topics_limit_is_too_large_and_not_invalid() {
    let broker = TestBroker::start().await;
    let one_more = 5_497_558_138_881_u64;
    broker.open(b"", json!({"size": one_more, "sha256": null})).await.expect_problem(422, "object-too-large");
    broker.open(b"", json!({"size": u64::MAX, "sha256": null})).await.expect_problem(422, "validation-failed");
}

#[tokio::test]
async fn the_shape_of_a_request_is_checked_before_its_upload_is_read() {
    let broker = TestBroker::start().await;
    let upload = format!("/lfs/uploads/{UNKNOWN}");
    broker.get(&format!("{upload}?wait=31")).await.expect_problem(422, "validation-failed");
    broker.get(&format!("{upload}?nonsense=1")).await.expect_problem(422, "validation-failed");
    broker.get(&format!("{upload}?wait=soon")).await.expect_problem(422, "validation-failed");
    for body in [
        json!({}),
        json!({"part_numbers": []}),
        json!({"part_numbers": [1], "parts": []}),
        json!({"part_numbers": (1..=101).collect::<Vec<u32>>()}),
        json!({"part_numbers": [1, 1]}),
        json!({"part_numbers": [-1]}),
        json!({"parts": [{"part_number": 1, "sha256": "x"}]}),
    ] {
        broker.post(&format!("{upload}/parts"), &body).await.expect_problem(422, "validation-failed");
    }
    for body in [json!({"sha256": "x"}), json!({"etag": "x"}), json!([])] {
        broker.post(&format!("{upload}/complete"), &body).await.expect_problem(422, "validation-failed");
    }
}
