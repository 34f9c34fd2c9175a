//! A request that is wrong in two ways hears of the earlier one: route, method, sizes, token, scope, media type, JSON,
//! shape, the token's topics, idempotency, policy, Kafka's metadata, quota.

use serde_json::{Value, json};

use crate::harness::tokens::token;
use crate::harness::{Answer, House, sha256};

const UNKNOWN: &str = "01920000-0000-7000-8000-000000000000";

/// One request, step by step less wrong.
struct Wrong<'a> {
    house: &'a House,
    method: &'static str,
    path: &'static str,
    token: Option<String>,
    media_type: &'static str,
    key: &'static str,
    body: Vec<u8>,
}

impl Wrong<'_> {
    async fn send(&self) -> Answer {
        let mut request = self.house.request(self.method, self.path).body(self.body.clone());
        if let Some(token) = &self.token {
            request = request.bearer_auth(token);
        }
        self.house.send(request.header("content-type", self.media_type).header("idempotency-key", self.key)).await
    }
}

#[tokio::test]
async fn a_request_that_is_wrong_in_every_way_hears_of_one_after_the_other() {
    let house = House::with_tokens(|settings| settings.policy.default_enabled = false).await;
    let mut request = Wrong {
        house: &house,
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
    let nobody = request.send().await.expect_problem(401, "unauthenticated");
    assert!(nobody.headers.contains_key("www-authenticate"));
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
    let policy = house.request("PUT", "/lfs/topics/lacking").bearer_auth(token("acme", "lfs:admin", &[]));
    house.send(policy.json(&json!({}))).await.expect(200);
    request.send().await.expect_problem(404, "topic-not-found");
}

#[tokio::test]
async fn headers_are_counted_after_the_route_and_before_the_token() {
    let house = House::with_tokens(|settings| settings.policy.default_enabled = false).await;
    let padded = |method, path| house.request(method, path).header("x-padding", "x".repeat(17 << 10));
    house.send(padded("GET", "/nope")).await.expect_problem(404, "not-found");
    house.send(padded("PUT", "/lfs/uploads")).await.expect_problem(405, "method-not-allowed");
    house.send(padded("GET", "/lfs/uploads")).await.expect_problem(431, "headers-too-large");
}

#[tokio::test]
async fn a_key_that_was_used_otherwise_is_told_before_policy_kafka_and_quota() {
    let house = House::with(|settings| settings.broker.quota.open_sessions = 1).await;
    let open = |more: Value| {
        let mut body = json!({"topic": house.topic, "size": 1, "sha256": sha256(b"x")});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        house.send(house.request("POST", "/lfs/uploads").header("idempotency-key", "k").json(&body))
    };
    open(json!({})).await.expect(201);
    house.put_policy(&house.topic, &json!({"enabled": false})).await.expect(200);
    open(json!({"size": 2})).await.expect_problem(422, "idempotency-key-reused");
    open(json!({"size": 2, "filename": "a/b"})).await.expect_problem(422, "validation-failed");
    open(json!({})).await.expect(200);
}

#[tokio::test]
async fn policy_comes_before_kafka_and_kafka_before_quota() {
    let house = House::with(|settings| settings.broker.quota.open_sessions = 1).await;
    house.open(b"x", json!({})).await.expect(201);
    let lacking = format!("{}-lacking", house.topic);
    house.put_policy(&lacking, &json!({"max_bytes": 1})).await.expect(200);
    house.open(b"xy", json!({"topic": lacking})).await.expect_problem(422, "object-too-large");
    house.open(b"x", json!({"topic": lacking})).await.expect_problem(404, "topic-not-found");
    house.open(b"x", json!({"partition": 99})).await.expect_problem(422, "validation-failed");
    house.open(b"x", json!({})).await.expect_problem(429, "quota-sessions-exceeded");
    house.put_policy(&house.topic, &json!({"enabled": false, "max_bytes": 0})).await.expect(200);
    house.open(b"x", json!({})).await.expect_problem(403, "topic-not-enabled");
}

#[tokio::test]
async fn what_no_topic_takes_is_too_large_and_no_wrong_shape() {
    let house = House::new().await;
    let one_more = 5_497_558_138_881_u64;
    house.open(b"", json!({"size": one_more, "sha256": null})).await.expect_problem(422, "object-too-large");
    house.open(b"", json!({"size": u64::MAX, "sha256": null})).await.expect_problem(422, "validation-failed");
}

#[tokio::test]
async fn the_shape_is_looked_at_before_the_upload_is_looked_up() {
    let house = House::new().await;
    let upload = format!("/lfs/uploads/{UNKNOWN}");
    house.get(&format!("{upload}?wait=31")).await.expect_problem(422, "validation-failed");
    house.get(&format!("{upload}?nonsense=1")).await.expect_problem(422, "validation-failed");
    house.get(&format!("{upload}?wait=soon")).await.expect_problem(422, "validation-failed");
    for body in [
        json!({}),
        json!({"part_numbers": []}),
        json!({"part_numbers": [1], "parts": []}),
        json!({"part_numbers": (1..=101).collect::<Vec<u32>>()}),
        json!({"part_numbers": [1, 1]}),
        json!({"part_numbers": [-1]}),
        json!({"parts": [{"part_number": 1, "sha256": "x"}]}),
    ] {
        house.post(&format!("{upload}/parts"), &body).await.expect_problem(422, "validation-failed");
    }
    for body in [json!({"sha256": "x"}), json!({"etag": "x"}), json!([])] {
        house.post(&format!("{upload}/complete"), &body).await.expect_problem(422, "validation-failed");
    }
}
