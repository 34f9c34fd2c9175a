//! HTTP limits: every limit is met, and every response is a whole problem document.

use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use futures_util::future::join_all;
use futures_util::stream::FuturesUnordered;
use lfs_broker::http;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::harness::TestBroker;
use crate::harness::raw::READ_TIMEOUT;
use crate::harness::tokens::token;
use crate::s3_faults::{start_broker_on, start_faulty_s3};

const HEALTH: &[u8] = b"GET /healthz HTTP/1.1\r\nhost: a\r\n\r\n";

fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

#[tokio::test]
async fn too_many_or_too_large_headers_get_a_problem_document() {
    let broker = TestBroker::start().await;
    let with = |headers: String| format!("GET /healthz HTTP/1.1\r\nhost: a\r\nconnection: close\r\n{headers}\r\n").into_bytes();
    let many = |count: usize| with((0..count).map(|n| format!("x-{n}: 1\r\n")).collect());
    let large = |bytes: usize| with(format!("x: {}\r\n", "x".repeat(bytes)));
    for (case, request) in [
        ("99 and two", many(99)),
        ("1,000", many(1000)),
        ("20,000", many(20_000)),
        ("17 KiB", large(17 << 10)),
        ("60 KiB", large(60 << 10)),
        ("70 KiB", large(70 << 10)),
        ("500 KiB", large(500 << 10)),
        ("5 MiB", large(5 << 20)),
        ("a path of 70 KiB", format!("GET /{} HTTP/1.1\r\nhost: a\r\n\r\n", "x".repeat(70 << 10)).into_bytes()),
        ("no end", large(5 << 20)[..2 << 20].to_vec()),
    ] {
        let responses = broker.send_raw(&request).await;
        assert_eq!(responses.len(), 1, "{case}");
        responses[0].expect_problem(431, "headers-too-large");
        assert!(responses[0].head.contains("x-content-type-options: nosniff"), "{case}: {:?}", responses[0]);
    }
    broker.get("/healthz").await.expect(200);
    assert_eq!(broker.send_raw(&many(98)).await[0].status, 200);
}

#[tokio::test]
async fn a_malformed_request_gets_a_problem_document_after_the_responses_before_it() {
    let broker = TestBroker::start().await;
    for bad in [
        b"nonsense\r\n\r\n".as_slice(),
        b"GET /healthz HTTP/9.9\r\nhost: a\r\n\r\n",
        b"GET /heal thz HTTP/1.1\r\nhost: a\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nhost: a\r\nx: a\x00b\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nhost: a\r\nx y: a\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nhost: a\r\nx\x01: a\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nhost: a\r\n\r\n",
        b"POST /lfs/uploads HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
        b"POST /lfs/uploads HTTP/1.1\r\nhost: a\r\ncontent-length: -1\r\n\r\n",
        b"POST /lfs/uploads HTTP/1.1\r\nhost: a\r\ncontent-length: 18446744073709551616\r\n\r\n",
        b"POST /lfs/uploads HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked, identity\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ] {
        let responses = broker.send_raw(bad).await;
        assert_eq!(responses.len(), 1, "{}", String::from_utf8_lossy(bad));
        responses[0].expect_problem(400, "malformed-request");
        let responses = broker.send_raw(&[HEALTH, HEALTH, bad].concat()).await;
        assert_eq!(responses.iter().map(|response| response.status).collect::<Vec<_>>(), [200, 200, 400]);
        responses[2].expect_problem(400, "malformed-request");
    }
    // A client that starts with HTTP/2 could not read a response in HTTP/1.1.
    assert!(broker.send_raw(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.is_empty());
}

#[tokio::test]
async fn a_client_that_sends_its_headers_slowly_is_disconnected_in_time() {
    const DEFAULT: Duration = Duration::from_secs(10);
    assert_eq!(http::Settings::default().header_timeout, DEFAULT);
    let broker = TestBroker::start_with(|settings| settings.http.header_timeout = millis(600)).await;
    let begun = Instant::now();
    let send_slowly = async |first: &'static [u8], more: &'static [u8]| {
        let mut raw = broker.connect().await;
        raw.send(first).await;
        let (mut from, mut to) = raw.0.split();
        let mut received = Vec::new();
        tokio::select! {
            read = from.read_to_end(&mut received) => drop(read),
            () = async { while to.write_all(more).await.is_ok() { tokio::time::sleep(millis(50)).await } } => {}
        }
        (begun.elapsed(), String::from_utf8(received).unwrap())
    };
    let clients = [(b"G".as_slice(), b"E".as_slice()), (b"GET / HTTP/1.1\r\n", b"x: y\r\n"), (b"GET / HTTP/1.1\r\nx: ", b"y")];
    let slow = join_all(clients.into_iter().cycle().take(30).map(|(first, more)| send_slowly(first, more))).await;
    for (elapsed, received) in slow {
        assert!(elapsed >= millis(550) && elapsed < DEFAULT, "{elapsed:?} instead of 600 ms, or of the default, {DEFAULT:?}");
        assert!(received.starts_with("HTTP/1.1 408 ") && received.contains("\"request-timeout\""), "{received}");
    }

    // A client that sends nothing gets no response.
    let begun = Instant::now();
    assert!(broker.connect().await.responses().await.is_empty());
    let elapsed = begun.elapsed();
    assert!(elapsed >= millis(550) && elapsed < DEFAULT, "{elapsed:?} instead of 600 ms, or of the default, {DEFAULT:?}");
}

#[tokio::test]
async fn a_connection_waits_a_limited_time_for_its_next_request() {
    let broker = TestBroker::start_with(|settings| {
        settings.http.header_timeout = millis(300);
        settings.http.idle_timeout = millis(3000);
    })
    .await;
    let mut raw = broker.connect().await;
    for _ in 0..2 {
        raw.send(HEALTH).await;
        // Longer than a request head may take.
        tokio::time::sleep(millis(600)).await;
    }
    // With the default idle timeout the connection would outlast the wait for its end.
    assert!(http::Settings::default().idle_timeout > READ_TIMEOUT);
    assert_eq!(raw.responses().await.iter().map(|response| response.status).collect::<Vec<_>>(), [200, 200]);
}

#[tokio::test]
async fn a_client_that_does_not_read_is_disconnected() {
    let broker = TestBroker::start_with(|settings| {
        settings.http.connections = 2;
        settings.http.write_timeout = millis(1000);
        // The other connection stays open.
        settings.http.body_timeout = Duration::from_secs(120);
    })
    .await;
    let mut unread = broker.connect().await;
    unread.send(&b"GET /docs/swagger-ui-bundle.js HTTP/1.1\r\nhost: a\r\n\r\n".repeat(20)).await;
    // By then the responses fill every buffer, unless the machine is busy. Then the broker, which has no place left, ends
    // this connection after one response, and the test shows less.
    tokio::time::sleep(millis(300)).await;
    let mut other = broker.connect().await;
    other.send(b"POST /lfs/uploads HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n").await;
    // The default write timeout is longer than this waits.
    assert_eq!(http::Settings::default().write_timeout, Duration::from_secs(30));
    broker.eventually("the connection is closed", async || broker.get("/lfs/uploads").await.status == 200).await;
    drop((unread, other));
}

#[tokio::test]
async fn a_request_that_takes_too_long_gets_503() {
    let broker = TestBroker::start_with(|settings| settings.http.request_timeout = millis(700)).await;
    let opened = broker.open(b"x", json!({})).await.expect(201);
    let begun = Instant::now();
    let response = broker.get(&format!("/lfs/uploads/{}?wait=30", opened.id())).await;
    let response = response.expect_problem(503, "dependency-unavailable");
    assert!(response.headers.contains_key("retry-after") && response.json["retryable"] == true);
    let elapsed = begun.elapsed();
    assert!(elapsed >= millis(700) && elapsed < Duration::from_secs(20), "{elapsed:?} instead of 0.7 s, or of the wait, 30 s");
    broker.get(&format!("/lfs/uploads/{}", opened.id())).await.expect(200);
}

#[tokio::test]
async fn the_number_of_concurrent_completions_is_limited() {
    let s3 = start_faulty_s3().await;
    let mut broker = start_broker_on(&s3).await;
    broker
        .restart(|settings| {
            settings.broker.max_concurrent_completes = 1;
            settings.objects.call_timeout = Some(Duration::from_secs(60));
        })
        .await;
    let mut waiting = Vec::new();
    for n in 0..6u8 {
        waiting.push(broker.open_and_put(&[n], json!({})).await.id());
    }
    s3.delay_calls(Duration::from_secs(60));
    let mut completes: FuturesUnordered<_> = waiting.iter().map(|id| broker.complete(id)).collect();
    // One completion waits for S3, and the others wait for it.
    for _ in 0..5 {
        let refused = completes.next().await.unwrap().expect_problem(503, "dependency-unavailable");
        assert!(refused.json["detail"].as_str().unwrap().contains("has reached its limit of"), "{}", refused.text);
        assert!(refused.headers.contains_key("retry-after"));
    }
    s3.delay_calls(Duration::ZERO);
    completes.next().await.unwrap().expect(200);
    drop(completes);
    for id in waiting {
        broker.complete_with_retries(&id).await;
    }
    assert_eq!(broker.distinct_records().await.len(), 6);
}

#[tokio::test]
async fn a_tenants_request_rate_is_limited_without_affecting_other_tenants() {
    let broker = TestBroker::start_with_tokens(|settings| settings.http.tenant_requests_per_second = 5).await;
    let list = async |tenant: &str| {
        broker.send(broker.request("GET", "/lfs/uploads").bearer_auth(token(tenant, "lfs:read", &["*"]))).await
    };
    let mut served = 0;
    let limited = loop {
        let response = list("acme").await;
        if response.status == 429 {
            break response.expect_problem(429, "rate-limited");
        }
        response.expect(200);
        served += 1;
        assert!(served < 500, "no request was limited");
    };
    assert!(served >= 5, "{served}");
    assert_eq!((&limited.headers["retry-after"], &limited.json["retryable"]), (&"1".parse().unwrap(), &json!(true)));
    list("other").await.expect(200);

    // The rate limit applies after the scope check and before the media type. Pages without a token are not counted.
    let exhausted = async || while list("acme").await.status != 429 {};
    let post = |scope| broker.send(broker.request("POST", "/lfs/uploads").bearer_auth(token("acme", scope, &["*"])).body("x"));
    exhausted().await;
    post("lfs:read").await.expect_problem(403, "insufficient-scope");
    let mut refused = post("lfs:write").await;
    for _ in 0..50 {
        // On a busy machine the limit has free places again when the request arrives.
        if refused.status != 415 {
            break;
        }
        exhausted().await;
        refused = post("lfs:write").await;
    }
    refused.expect_problem(429, "rate-limited");
    broker.get("/healthz").await.expect(200);
    broker.eventually("the tenant is served again", async || list("acme").await.status == 200).await;
}

#[tokio::test]
async fn without_tokens_or_with_a_limit_of_0_no_request_is_counted() {
    let broker = TestBroker::start_with(|settings| settings.http.tenant_requests_per_second = 1).await;
    for _ in 0..20 {
        broker.get("/lfs/uploads").await.expect(200);
    }
    let broker = TestBroker::start_with_tokens(|settings| {
        settings.http.tenant_requests_per_second = 0;
        settings.http.failed_logins_per_minute = 0;
    })
    .await;
    for _ in 0..20 {
        broker.send(broker.request("GET", "/lfs/uploads").bearer_auth(token("acme", "lfs:read", &["*"]))).await.expect(200);
        broker.send(broker.request("GET", "/lfs/uploads").bearer_auth("x")).await.expect_problem(401, "invalid-token");
    }
}

#[tokio::test]
async fn failed_logins_of_an_address_are_limited_and_valid_tokens_still_work() {
    let broker = TestBroker::start_with_tokens(|settings| settings.http.failed_logins_per_minute = 3).await;
    let guess = async |broker: &TestBroker, forwarded: &str| {
        let request = broker.request("GET", "/lfs/uploads").bearer_auth("a.b.c").header("x-forwarded-for", forwarded);
        broker.send(request).await
    };
    for n in 0..3 {
        guess(&broker, &format!("192.0.2.{n}")).await.expect_problem(401, "invalid-token");
    }
    // This peer is no trusted proxy: it counts as one address, whatever it sends.
    let limited = guess(&broker, "192.0.2.9").await.expect_problem(429, "rate-limited");
    let wait: u64 = limited.headers["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((1..=20).contains(&wait), "{wait}");
    broker.send(broker.request("GET", "/lfs/uploads").bearer_auth(token("acme", "lfs:read", &["*"]))).await.expect(200);
    broker.get("/lfs/uploads").await.expect_problem(401, "unauthenticated");

    let broker = TestBroker::start_with_tokens(|settings| {
        settings.http.failed_logins_per_minute = 3;
        settings.http.trusted_proxies = vec!["127.0.0.0/8".parse().unwrap(), "10.0.0.0/8".parse().unwrap()];
    })
    .await;
    for client in ["192.0.2.1", "192.0.2.2"] {
        for n in 0..3 {
            guess(&broker, &format!("6.6.6.{n}, {client}, 10.0.0.7")).await.expect_problem(401, "invalid-token");
        }
        guess(&broker, &format!("6.6.6.6, {client}, 10.0.0.7")).await.expect_problem(429, "rate-limited");
    }
}

#[tokio::test]
async fn without_cors_origins_options_is_an_unsupported_method() {
    let broker = TestBroker::start().await;
    let refused = broker.send(broker.request("OPTIONS", "/lfs/uploads")).await.expect_problem(405, "method-not-allowed");
    assert!(refused.headers["allow"].to_str().unwrap().contains("POST"));
    broker.send(broker.request("OPTIONS", "/nowhere")).await.expect_problem(404, "not-found");
}

#[tokio::test]
async fn a_page_of_an_allowed_origin_can_read_the_headers_that_it_needs() {
    let broker = TestBroker::start_with(|settings| settings.cors_origins = vec!["https://app.example".into()]).await;
    let preflight_from = |origin: &'static str| {
        let preflight = broker.request("OPTIONS", "/lfs/uploads").header("origin", origin);
        broker.send(
            preflight.header("access-control-request-method", "POST").header("access-control-request-headers", "idempotency-key"),
        )
    };
    let allowed = preflight_from("https://app.example").await.expect(200);
    assert_eq!(allowed.headers["access-control-allow-origin"], "https://app.example");
    for name in ["authorization", "content-type", "idempotency-key", "traceparent"] {
        assert!(allowed.headers["access-control-allow-headers"].to_str().unwrap().contains(name));
    }
    assert!(!preflight_from("https://evil.example").await.headers.contains_key("access-control-allow-origin"));
    for (method, path) in [("GET", "/lfs/uploads"), ("GET", "/nope"), ("PUT", "/lfs/uploads"), ("POST", "/lfs/uploads")] {
        let response = broker.send(broker.request(method, path).header("origin", "https://app.example")).await;
        assert_eq!(response.headers["access-control-allow-origin"], "https://app.example", "{method} {path}");
        let exposed = response.headers["access-control-expose-headers"].to_str().unwrap();
        assert!(["location", "retry-after", "x-request-id"].iter().all(|name| exposed.contains(name)), "{exposed}");
        assert!(!response.headers.contains_key("access-control-allow-credentials"));
    }
    let any_origin = TestBroker::start_with(|settings| settings.cors_origins = vec!["*".into()]).await;
    let response = any_origin.send(any_origin.request("GET", "/lfs/uploads").header("origin", "https://a.example")).await;
    assert_eq!(response.headers["access-control-allow-origin"], "*");
    let no_origin = TestBroker::start().await;
    let response = no_origin.send(no_origin.request("GET", "/lfs/uploads").header("origin", "https://app.example")).await;
    assert!(!response.headers.contains_key("access-control-allow-origin"));
}

#[tokio::test]
async fn no_page_loads_anything_from_outside_or_can_be_framed() {
    let broker = TestBroker::start().await;
    let index = broker.get("/docs/").await.expect(200).text;
    assert!(!index.contains("<script>") && !index.contains("//cdn"), "{index}");
    let initializer = broker.get("/docs/swagger-initializer.js").await.expect(200).text;
    for path in [
        "/docs/",
        "/docs/swagger-ui-bundle.js",
        "/problems/internal",
        "/healthz",
        "/openapi.json",
        "/nope",
        "/lfs/uploads",
        "/readyz",
    ] {
        let response = broker.get(path).await;
        let policy = response.headers["content-security-policy"].to_str().unwrap();
        assert!(policy.starts_with("default-src 'none'") && policy.contains("frame-ancestors 'none'"), "{path}: {policy}");
        assert!(!policy.contains("http") && !policy.contains('*') && !policy.contains("unsafe-eval"), "{path}: {policy}");
        assert!(
            !policy.contains("script-src") || (path.starts_with("/docs") && policy.contains("script-src 'self';")),
            "{policy}"
        );
        assert_eq!(response.headers["x-content-type-options"], "nosniff", "{path}");
        assert_eq!(response.headers["referrer-policy"], "no-referrer", "{path}");
    }
    assert!(initializer.contains("/openapi.json") && !initializer.contains("https://"), "{initializer}");
}

#[tokio::test]
async fn a_ready_broker_reports_the_capabilities_of_its_store() {
    let broker = TestBroker::start().await;
    // The start waits for the probe, but only for a limited time.
    let is_probed = async || broker.get("/readyz").await.json["capabilities"].is_object();
    broker.eventually("the store was probed", is_probed).await;
    let ready = broker.get("/readyz").await.expect(200);
    let capabilities = &ready.json["capabilities"];
    for required in ["refuses_wrong_bytes", "refuses_overwrite", "keeps_token", "refuses_other_size"] {
        assert_eq!(capabilities[required], true, "{required}: {}", ready.text);
    }
    for optional in [
        "refuses_unsigned_copy_source_put",
        "refuses_unsigned_copy_source_part",
        "refuses_unsigned_content_encoding",
        "refuses_unsigned_tagging",
        "refuses_unsigned_storage_class",
        "refuses_unsigned_checksum_algorithm",
        "refuses_unsigned_acl",
        "versioned",
        "returns_sha256_on_head",
        "object_lock",
    ] {
        assert!(capabilities[optional].is_boolean(), "{optional}: {}", ready.text);
    }
    assert!(capabilities.as_object().unwrap().contains_key("answers_cors"));
    assert!(broker.objects().await.is_empty(), "the probe left an object");

    let with_tokens = TestBroker::start_with_tokens(|_| {}).await;
    let same_capabilities = async || with_tokens.get("/readyz").await.expect(200).json["capabilities"] == *capabilities;
    with_tokens.eventually("the store was probed again", same_capabilities).await;
    let without_bucket = TestBroker::start_with(|settings| settings.objects.bucket = None).await;
    assert!(without_bucket.get("/readyz").await.json.get("capabilities").is_none());
}
