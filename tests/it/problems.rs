//! Every error code that needs no token, returned once.

use std::time::Duration;

use futures_util::StreamExt as _;
use reqwest::header::HeaderValue;
use serde_json::{Value, json};

use crate::harness::faults::retry_while_unavailable;
use crate::harness::{TestBroker, bytes, sha256};

const UNKNOWN: &str = "01920000-0000-7000-8000-000000000000";

/// Every error code of the API with its status.
pub(crate) const CODES: [(u16, &str); 43] = [
    (400, "malformed-request"),
    (400, "malformed-json"),
    (400, "idempotency-key-invalid"),
    (401, "unauthenticated"),
    (401, "invalid-token"),
    (403, "insufficient-scope"),
    (403, "topic-forbidden"),
    (403, "topic-not-enabled"),
    (403, "pointer-forbidden"),
    (403, "host-forbidden"),
    (404, "not-found"),
    (404, "upload-not-found"),
    (404, "topic-not-found"),
    (405, "method-not-allowed"),
    (415, "unsupported-media-type"),
    (408, "request-timeout"),
    (409, "object-missing"),
    (409, "parts-incomplete"),
    (409, "state-conflict"),
    (409, "idempotency-in-flight"),
    (409, "completion-in-progress"),
    (410, "upload-expired"),
    (410, "upload-aborted"),
    (410, "object-gone"),
    (413, "request-too-large"),
    (431, "headers-too-large"),
    (422, "validation-failed"),
    (422, "object-too-large"),
    (422, "size-mismatch"),
    (422, "checksum-mismatch"),
    (422, "object-foreign"),
    (422, "checksum-not-allowed"),
    (422, "content-type-not-allowed"),
    (422, "idempotency-key-reused"),
    (422, "record-too-large"),
    (422, "unpublishable"),
    (422, "pointer-invalid"),
    (429, "rate-limited"),
    (429, "quota-bytes-exceeded"),
    (429, "quota-sessions-exceeded"),
    (500, "internal"),
    (503, "dependency-unavailable"),
    (503, "completion-unknown"),
];

#[tokio::test]
async fn every_error_code_has_a_page_that_explains_it() {
    let broker = TestBroker::start().await;
    for (status, code) in CODES {
        let page = broker.get(&format!("/problems/{code}")).await.expect(200);
        assert!(page.headers["content-type"].to_str().unwrap().starts_with("text/html"));
        assert!(page.text.contains(code) && page.text.contains(&status.to_string()), "{}", page.text);
    }
    broker.get("/problems/no-such-code").await.expect_problem(404, "not-found");
    broker.get("/problems/%FF").await.expect_problem(404, "not-found");
}

#[tokio::test]
async fn invalid_json_is_malformed_on_every_route_that_takes_json() {
    let broker = TestBroker::start().await;
    let deep = format!("{}{}", "[".repeat(200), "]".repeat(200));
    let bad: [&[u8]; 9] = [
        b"",
        b"{",
        b"{\"topic\":\"t\",\"size\":1",
        b"{\"topic\":\"t\",\"size\":1}x",
        b"{\"topic\":\"t\",\"size\":1,\"size\":1}",
        b"{\"topic\":\"t\",\"size\":1,\"headers\":{\"a\":\"1\",\"a\":\"2\"}}",
        b"{\"topic\":\"\xff\",\"size\":1}",
        b"{\"topic\":\"\\ud800\",\"size\":1}",
        deep.as_bytes(),
    ];
    for body in bad {
        broker.send_json("POST", "/lfs/uploads", body.to_vec()).await.expect_problem(400, "malformed-json");
    }
    for (method, path) in [
        ("POST", format!("/lfs/uploads/{UNKNOWN}/parts")),
        ("POST", format!("/lfs/uploads/{UNKNOWN}/complete")),
        ("PUT", "/lfs/topics/t".to_owned()),
    ] {
        broker.send_json(method, &path, "{\"a\":1,\"a\":2}").await.expect_problem(400, "malformed-json");
        broker.send_json(method, &path, "{").await.expect_problem(400, "malformed-json");
    }
}

#[tokio::test]
async fn an_idempotency_key_has_1_to_255_visible_ascii_characters_and_is_sent_once() {
    let broker = TestBroker::start().await;
    let body = json!({"topic": broker.topic, "size": 1, "sha256": sha256(b"x")});
    let open = || broker.request("POST", "/lfs/uploads").json(&body);
    let long = "k".repeat(256);
    let bad = [b"".as_slice(), b"\"\"", long.as_bytes(), b"a b", b"\xc3\xa9", b"a\tb"];
    for key in bad {
        let key = HeaderValue::from_bytes(key).unwrap();
        broker.send(open().header("idempotency-key", key)).await.expect_problem(400, "idempotency-key-invalid");
    }
    let twice = open().header("idempotency-key", "a").header("idempotency-key", "a");
    broker.send(twice).await.expect_problem(400, "idempotency-key-invalid");
    broker.send(open().header("idempotency-key", "k".repeat(255))).await.expect(201);
    broker.send(open().header("idempotency-key", format!("\"{}\"", "q".repeat(255)))).await.expect(201);
}

#[tokio::test]
async fn an_unknown_or_malformed_upload_id_is_not_found_on_every_route() {
    let broker = TestBroker::start().await;
    for id in [UNKNOWN, "nope", "00000000-0000-0000-0000-000000000000", "%FF", "%2F"] {
        broker.get(&format!("/lfs/uploads/{id}")).await.expect_problem(404, "upload-not-found");
        broker.get(&format!("/lfs/uploads/{id}/history")).await.expect_problem(404, "upload-not-found");
        broker.delete(&format!("/lfs/uploads/{id}")).await.expect_problem(404, "upload-not-found");
        broker.complete(id).await.expect_problem(404, "upload-not-found");
        let parts = json!({"part_numbers": [1]});
        broker.post(&format!("/lfs/uploads/{id}/parts"), &parts).await.expect_problem(404, "upload-not-found");
    }
}

#[tokio::test]
async fn unknown_routes_are_404_and_known_ones_list_their_methods() {
    let broker = TestBroker::start().await;
    for path in ["/nope", "/lfs", "/lfs/uploads/", "/lfs/uploads/a/b", "/docs/nope.js", "/lfs//uploads"] {
        broker.get(path).await.expect_problem(404, "not-found");
        broker.send(broker.request("POST", path).body("x")).await;
    }
    for (method, path, allowed) in [
        ("PUT", "/lfs/uploads".to_owned(), vec!["GET", "POST"]),
        ("PATCH", format!("/lfs/uploads/{UNKNOWN}"), vec!["DELETE", "GET"]),
        ("GET", format!("/lfs/uploads/{UNKNOWN}/complete"), vec!["POST"]),
        ("DELETE", "/lfs/resolve".to_owned(), vec!["POST"]),
        ("POST", "/lfs/topics/t".to_owned(), vec!["DELETE", "GET", "PUT"]),
        ("POST", "/healthz".to_owned(), vec!["GET"]),
    ] {
        let response = broker.send(broker.request(method, &path)).await.expect_problem(405, "method-not-allowed");
        let allow = response.headers["allow"].to_str().unwrap();
        let mut methods: Vec<&str> = allow.split(',').map(str::trim).filter(|method| *method != "HEAD").collect();
        methods.sort_unstable();
        assert_eq!(methods, allowed, "{method} {path}");
    }
}

#[tokio::test]
async fn a_body_must_be_declared_as_json() {
    let broker = TestBroker::start().await;
    let body = json!({"topic": broker.topic, "size": 1, "sha256": sha256(b"x")}).to_string();
    for media_type in [None, Some("text/plain"), Some("application/x-www-form-urlencoded"), Some("json"), Some("")] {
        let mut request = broker.request("POST", "/lfs/uploads").body(body.clone());
        if let Some(media_type) = media_type {
            request = request.header("content-type", media_type);
        }
        broker.send(request).await.expect_problem(415, "unsupported-media-type");
    }
    for media_type in ["application/json; charset=utf-8", "Application/JSON", "application/merge-patch+json"] {
        let request = broker.request("POST", "/lfs/uploads").header("content-type", media_type);
        broker.send(request.body(body.clone())).await.expect(201);
    }
    let complete = format!("/lfs/uploads/{UNKNOWN}/complete");
    broker.send(broker.request("POST", &complete).body("{}")).await.expect_problem(415, "unsupported-media-type");
    broker.send(broker.request("POST", &complete)).await.expect_problem(404, "upload-not-found");
    broker.send_json("POST", &complete, "null").await.expect_problem(404, "upload-not-found");
    broker.send_json("POST", &complete, " ").await.expect_problem(400, "malformed-json");
}

/// Sends the body in chunks, so that its length is unknown before its end.
fn chunked(body: Vec<u8>) -> reqwest::Body {
    let chunks: Vec<Result<Vec<u8>, std::io::Error>> = body.chunks(10_000).map(|chunk| Ok(chunk.to_vec())).collect();
    reqwest::Body::wrap_stream(futures_util::stream::iter(chunks))
}

#[tokio::test]
async fn a_body_has_at_most_64_kib_or_1_mib_on_routes_with_part_hashes() {
    let broker = TestBroker::start().await;
    let padded = |length: usize| [b"{}".to_vec(), vec![b' '; length - 2]].concat();
    let small = format!("/lfs/uploads/{UNKNOWN}/complete");
    let parts = format!("/lfs/uploads/{UNKNOWN}/parts");
    for (method, path, limit) in [
        ("POST", small.as_str(), 64 << 10),
        ("POST", "/lfs/resolve", 64 << 10),
        ("PUT", "/lfs/topics/t", 64 << 10),
        ("POST", "/lfs/uploads", 1 << 20),
        ("POST", parts.as_str(), 1 << 20),
    ] {
        let fits = broker.send_json(method, path, padded(limit)).await;
        assert_ne!(fits.code(), "request-too-large", "{method} {path}");
        let fits = broker.send_json(method, path, chunked(padded(limit))).await;
        assert_ne!(fits.code(), "request-too-large", "{method} {path}");
        broker.send_json(method, path, padded(limit + 1)).await.expect_problem(413, "request-too-large");
        broker.send_json(method, path, chunked(padded(limit + 1))).await.expect_problem(413, "request-too-large");
    }
    broker.send_json("POST", "/lfs/uploads", padded(6 << 20)).await.expect_problem(413, "request-too-large");

    let hashes = vec![sha256(b"part"); 10_000];
    let most = json!({"topic": broker.topic, "size": 10_000 * (5u64 << 20), "part_size": 5 << 20, "part_sha256": hashes});
    assert!(most.to_string().len() > 600_000);
    let opened = broker.post("/lfs/uploads", &most).await.expect(201);
    assert_eq!(opened.json["parts"].as_array().unwrap().len(), 100);
}

#[tokio::test]
async fn headers_have_at_most_16_kib_together() {
    let broker = TestBroker::start().await;
    for path in ["/healthz", "/lfs/uploads", "/openapi.json", "/readyz", "/problems/internal"] {
        let one = broker.request("GET", path).header("x-padding", "x".repeat(17 << 10));
        broker.send(one).await.expect_problem(431, "headers-too-large");
        let many = (0..20).fold(broker.request("GET", path), |request, n| request.header(format!("x-{n}"), "x".repeat(1000)));
        broker.send(many).await.expect_problem(431, "headers-too-large");
        broker.send(broker.request("GET", path).header("x-padding", "x".repeat(15 << 10))).await.expect(200);
    }
}

#[tokio::test]
async fn a_body_that_does_not_arrive_is_a_timeout() {
    let broker = TestBroker::start_with(|settings| settings.http.body_timeout = Duration::from_millis(300)).await;
    let first = futures_util::stream::iter([Ok::<_, std::io::Error>(b"{\"topic\":".to_vec())]);
    let stalled = reqwest::Body::wrap_stream(first.chain(futures_util::stream::pending()));
    let response = broker.send_json("POST", "/lfs/uploads", stalled).await.expect_problem(408, "request-timeout");
    assert_eq!(response.json["retryable"], true);
}

#[tokio::test]
async fn every_invalid_member_of_an_open_is_named() {
    let broker = TestBroker::start().await;
    let hash = sha256(b"x");
    for (more, pointer) in [
        (json!({"topic": null}), ""),
        (json!({"size": null}), ""),
        (json!({"size": -1}), "/size"),
        (json!({"size": "5"}), "/size"),
        (json!({"size": u64::MAX}), "/size"),
        (json!({"state": "published"}), "/state"),
        (json!({"topic": "a b"}), "/topic"),
        (json!({"topic": ".."}), "/topic"),
        (json!({"sha256": "abc"}), "/sha256"),
        (json!({"key": "a", "key_base64": "YQ=="}), "/key_base64"),
        (json!({"key_base64": "%"}), "/key_base64"),
        (json!({"key": "k".repeat(4097)}), "/key"),
        (json!({"partition": -1}), "/partition"),
        (json!({"partition": 3}), "/partition"),
        (json!({"filename": "../x"}), "/filename"),
        (json!({"content_type": "video"}), "/content_type"),
        (json!({"headers": {"LFS-id": "1"}}), "/headers/LFS-id"),
        (json!({"headers": {"a": 1}}), "/headers/a"),
        (json!({"headers": ["a"]}), "/headers"),
        (json!({"part_size": 5}), "/part_size"),
        (json!({"part_sha256": [hash]}), "/part_size"),
        (json!({"part_size": 5 << 20, "part_sha256": [hash, hash]}), "/part_sha256"),
        (json!({"part_size": 5 << 20, "part_sha256": ["x"]}), "/part_sha256/0"),
        (json!({"part_size": 5 << 20, "part_sha256": [hash], "part_hashes": "deferred"}), "/part_hashes"),
        (json!({"part_hashes": "later"}), "/part_hashes"),
        (json!({"checksum_alg": "crc32", "checksum": "00000000"}), "/checksum"),
        (json!({"sha256": null, "checksum": "00000000"}), "/checksum_alg"),
        (json!({"sha256": null, "checksum_alg": "crc32", "checksum": "0"}), "/checksum"),
        (json!({"sha256": null, "checksum_alg": "sha1", "checksum": "0"}), "/checksum_alg"),
    ] {
        let response = broker.open(b"x", more.clone()).await.expect_problem(422, "validation-failed");
        assert_eq!(response.json["errors"][0]["pointer"], pointer, "{more}: {}", response.text);
        assert!(!response.json["errors"][0]["detail"].as_str().unwrap().is_empty());
    }
    let two = broker.open(b"x", json!({"topic": "a b", "filename": "a/b"})).await.expect_problem(422, "validation-failed");
    assert_eq!(two.json["errors"].as_array().unwrap().len(), 2);
    broker.open(b"x", json!({"key": "k".repeat(4096), "partition": 2})).await.expect(201);
}

#[tokio::test]
async fn record_headers_have_at_most_8_kib_together() {
    let broker = TestBroker::start().await;
    broker.open(b"x", json!({"headers": {"a": "x".repeat(8191)}})).await.expect(201);
    broker.open(b"x", json!({"headers": {"a": "x".repeat(8192)}})).await.expect_problem(422, "record-too-large");
}

#[tokio::test]
async fn a_topic_that_kafka_lacks_takes_no_upload() {
    let broker = TestBroker::start().await;
    broker.open(b"x", json!({"topic": format!("{}-lacking", broker.topic)})).await.expect_problem(404, "topic-not-found");
    assert!(broker.objects().await.is_empty());
}

#[tokio::test]
async fn an_invalid_pointer_is_refused_as_invalid_and_a_foreign_one_as_forbidden() {
    let broker = TestBroker::start().await;
    let done = broker.publish(b"hello", json!({})).await;
    let pointer = &done.json["pointer"];
    let with = |name: &str, value: Value| {
        let mut changed = pointer.as_object().unwrap().clone();
        changed.insert(name.to_owned(), value);
        // The marker of the envelope must come first, but the map sorts its members.
        let rest = changed.iter().filter(|(name, _)| *name != "kfs_lfs").map(|(name, value)| format!(",{}:{value}", json!(name)));
        format!("{{\"kfs_lfs\":{}{}}}", changed["kfs_lfs"], rest.collect::<String>())
    };
    let resolve = |body: String| broker.send_json("POST", "/lfs/resolve", body);
    resolve(with("size", json!(5))).await.expect(200);
    for bad in [
        "[]".to_owned(),
        "{}".to_owned(),
        "\"x\"".to_owned(),
        with("kfs_lfs", json!(2)),
        with("key", json!("")),
        with("size", json!(-1)),
    ] {
        resolve(bad).await.expect_problem(422, "pointer-invalid");
    }
    let key = pointer["key"].as_str().unwrap();
    for (member, value) in [
        ("bucket", json!("another-bucket")),
        ("key", json!("no/prefix")),
        ("key", json!(format!("../{key}"))),
        ("key", json!(format!("elsewhere/{key}"))),
    ] {
        resolve(with(member, value)).await.expect_problem(403, "pointer-forbidden");
    }
    resolve(with("size", json!(6))).await.expect_problem(422, "size-mismatch");
    broker.s3.delete_object().bucket(&broker.bucket).key(key).send().await.unwrap();
    resolve(with("size", json!(5))).await.expect_problem(410, "object-gone");
    let request = broker.request("POST", "/lfs/resolve").body(pointer.to_string());
    broker.send(request).await.expect_problem(415, "unsupported-media-type");
}

#[tokio::test]
async fn a_tenants_open_sessions_are_limited_and_released_when_they_end() {
    let broker = TestBroker::start_with(|settings| settings.broker.quota.open_sessions = 2).await;
    let first = broker.open(b"1", json!({})).await.expect(201);
    broker.open(b"2", json!({})).await.expect(201);
    let refused = broker.open(b"3", json!({})).await.expect_problem(429, "quota-sessions-exceeded");
    assert!(refused.headers["retry-after"].to_str().unwrap().parse::<u64>().unwrap() >= 1);
    assert_eq!(refused.json["retryable"], true);
    broker.delete(&format!("/lfs/uploads/{}", first.id())).await.expect(204);
    broker.publish(b"3", json!({})).await;
    broker.open(b"4", json!({})).await.expect(201);
    broker.open(b"5", json!({})).await.expect_problem(429, "quota-sessions-exceeded");
}

#[tokio::test]
async fn a_tenants_reserved_bytes_are_limited() {
    let broker = TestBroker::start_with(|settings| settings.broker.quota.reserved_bytes = 10).await;
    let first = broker.open(b"123456", json!({})).await.expect(201);
    let refused = broker.open(b"12345", json!({})).await.expect_problem(429, "quota-bytes-exceeded");
    assert!(refused.headers.contains_key("retry-after"));
    broker.open(b"1234", json!({})).await.expect(201);
    broker.delete(&format!("/lfs/uploads/{}", first.id())).await.expect(204);
    broker.open(b"12345", json!({})).await.expect(201);
}

#[tokio::test]
async fn complete_names_what_is_missing_and_the_upload_stays_open() {
    let broker = TestBroker::start().await;
    let opened = broker.open(b"hello", json!({})).await.expect(201);
    let complete = async |id: &str| retry_while_unavailable(async || broker.complete(id).await).await;
    let missing = complete(&opened.id()).await.expect_problem(409, "object-missing");
    assert_eq!(missing.json["upload_state"], "open");
    broker.put(&opened.json["upload"], b"hello").await.expect(200);
    complete(&opened.id()).await.expect(200);
    broker.delete(&format!("/lfs/uploads/{}", opened.id())).await.expect_problem(409, "state-conflict");

    let content = bytes(6 << 20, 1);
    let opened = broker.open(&content, json!({"part_size": 5 << 20})).await.expect(201);
    let missing = complete(&opened.id()).await.expect_problem(409, "parts-incomplete");
    assert_eq!(missing.json["errors"].as_array().unwrap().len(), 2);
    broker.put(&opened.json["parts"][1], &content[5 << 20..]).await.expect(200);
    let missing = complete(&opened.id()).await.expect_problem(409, "parts-incomplete");
    assert_eq!(missing.json["errors"], json!([{"pointer": "/parts/0", "detail": "part 1 is missing"}]));
    assert_eq!(broker.upload(&opened.id()).await.state(), "open");
}

#[tokio::test]
async fn an_ended_upload_reports_how_it_ended() {
    let broker = TestBroker::start().await;
    let aborted = broker.open(b"a", json!({})).await.expect(201).id();
    broker.delete(&format!("/lfs/uploads/{aborted}")).await.expect(204);
    let response = broker.complete(&aborted).await.expect_problem(410, "upload-aborted");
    assert_eq!(response.json["upload_state"], "aborted");
    let expired = broker.open(b"b", json!({})).await.expect(201).id();
    broker.advance_clock(Duration::from_secs(3601));
    let response = broker.complete(&expired).await.expect_problem(410, "upload-expired");
    assert_eq!(response.json["upload_state"], "expired");
}

#[tokio::test]
async fn an_object_of_another_writer_is_rejected_finally() {
    let broker = TestBroker::start().await;
    let opened = broker.open(b"hello", json!({})).await.expect(201);
    let key = opened.json["object_key"].as_str().unwrap();
    broker.put_object(key, b"hello", None).await;
    let first = broker.complete(&opened.id()).await.expect_problem(422, "object-foreign");
    let second = broker.complete(&opened.id()).await.expect_problem(422, "object-foreign");
    assert_eq!(first.json["upload_state"], "rejected");
    assert_eq!(first.json["detail"], second.json["detail"]);
}

#[tokio::test]
async fn a_storage_error_is_503_without_internal_details() {
    let broker = TestBroker::start().await;
    broker.put_policy(&broker.topic, &json!({"bucket": "no-such-bucket-anywhere"})).await.expect(200);
    let response = broker.open(&bytes(6 << 20, 1), json!({"part_size": 5 << 20})).await;
    let response = response.expect_problem(503, "dependency-unavailable");
    assert!(response.headers.contains_key("retry-after"));
    assert!(!response.text.contains("no-such-bucket"), "{}", response.text);
    assert_eq!(response.json["detail"], "object storage refused the request");
}

#[tokio::test]
async fn a_database_error_is_not_reported_as_a_timeout() {
    let broker = TestBroker::start().await;
    sqlx::query("alter table idempotency_keys rename to elsewhere").execute(&broker.db).await.unwrap();
    sqlx::query("alter table upload_sessions rename to elsewhere_too").execute(&broker.db).await.unwrap();
    let response = broker.get("/lfs/uploads").await.expect_problem(503, "dependency-unavailable");
    assert_eq!(response.json["detail"], "the database refused the request");
}

#[tokio::test]
async fn links_in_responses_are_under_the_path_of_the_public_url() {
    let broker = TestBroker::start_with(|settings| settings.public_url = Some("https://x.example/api/".to_owned())).await;
    assert_eq!(broker.get("/nope").await.expect(404).json["type"], "/api/problems/not-found");
    let malformed = broker.send_raw(b"nonsense\r\n\r\n").await;
    assert!(malformed[0].body.contains("\"/api/problems/malformed-request\""), "{malformed:?}");
    assert!(broker.get("/docs/swagger-initializer.js").await.expect(200).text.contains("/api/openapi.json"));
    let opened = broker.open(b"x", json!({})).await.expect(201);
    assert_eq!(opened.headers["location"], format!("https://x.example/api/lfs/uploads/{}", opened.id()));
}

#[tokio::test]
async fn a_broker_without_tokens_answers_only_under_names_of_this_machine() {
    let broker =
        TestBroker::start_with(|settings| settings.http.allowed_hosts = Some(lfs_broker::http::AllowedHosts::default())).await;
    let status_for = async |headers: &[(&str, &str)]| {
        let request =
            headers.iter().fold(broker.request("GET", "/lfs/uploads"), |request, (name, value)| request.header(*name, *value));
        broker.send(request).await
    };
    for host in ["localhost:8080", "127.0.0.1", "[::1]:8080"] {
        status_for(&[("host", host)]).await.expect(200);
    }
    status_for(&[("origin", "http://localhost:3000")]).await.expect(200);
    for headers in [
        [("host", "evil.example:8080")].as_slice(),
        &[("host", "127.0.0.1.evil.example")],
        &[("origin", "https://evil.example")],
        &[("origin", "null")],
    ] {
        status_for(headers).await.expect_problem(403, "host-forbidden");
    }
    let absolute =
        broker.send_raw(b"GET http://evil.example/lfs/uploads HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").await;
    assert_eq!(absolute[0].status, 403, "{absolute:?}");
}

#[tokio::test]
async fn every_response_has_a_request_id_and_echoes_a_valid_one() {
    let broker = TestBroker::start().await;
    for (method, path) in [
        ("GET", "/healthz"),
        ("GET", "/nope"),
        ("PUT", "/lfs/uploads"),
        ("GET", "/docs/"),
        ("GET", "/openapi.json"),
        ("POST", "/lfs/uploads"),
    ] {
        let own = broker.send(broker.request(method, path)).await;
        assert!(uuid::Uuid::try_parse(own.headers["x-request-id"].to_str().unwrap()).is_ok(), "{method} {path}");
        let echoed = broker.send(broker.request(method, path).header("x-request-id", "a-B_1.2:3")).await;
        assert_eq!(echoed.headers["x-request-id"], "a-B_1.2:3", "{method} {path}");
        for invalid in ["a b", "a\tb", "{}", "", &"x".repeat(129)] {
            let own = broker.send(broker.request(method, path).header("x-request-id", invalid)).await;
            assert_ne!(own.headers["x-request-id"], invalid);
        }
    }
}

#[tokio::test]
async fn a_corrupt_row_is_an_internal_error_without_details() {
    let broker = TestBroker::start().await;
    let id = broker.open(b"x", json!({})).await.expect(201).id();
    let corrupt = sqlx::query("update upload_sessions set record_headers = '\"spoilt\"' where id = $1");
    corrupt.bind(id.parse::<uuid::Uuid>().unwrap()).execute(&broker.db).await.unwrap();
    let response = broker.upload(&id).await.expect_problem(500, "internal");
    assert!(!response.text.contains("headers") && response.json["retryable"] == false, "{}", response.text);
}

/// Every error code is asserted in some test.
#[test]
fn every_error_code_is_covered_by_a_test() {
    let mut tests = String::new();
    for entry in std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "rs") {
            tests += &std::fs::read_to_string(path).unwrap();
        }
    }
    let is_untested = |(status, code): &&(u16, &str)| !tests.contains(&format!("expect_problem({status}, \"{code}\")"));
    assert_eq!(CODES.iter().filter(is_untested).collect::<Vec<_>>(), Vec::<&(u16, &str)>::new());
}
