//! The edge of the door: every limit met, every answer whole.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::harness::faults::wire_to_s3;
use crate::harness::tokens::token;
use crate::harness::{Answer, House};

const HEALTH: &[u8] = b"GET /healthz HTTP/1.1\r\nhost: a\r\n\r\n";

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

#[tokio::test]
async fn too_many_or_too_large_headers_are_never_answered_barely() {
    let house = House::new().await;
    let with = |headers: String| format!("GET /healthz HTTP/1.1\r\nhost: a\r\nconnection: close\r\n{headers}\r\n").into_bytes();
    let many = |count: usize| with((0..count).map(|n| format!("x-{n}: 1\r\n")).collect());
    let large = |bytes: usize| with(format!("x: {}\r\n", "x".repeat(bytes)));
    for (what, request) in [
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
        let answers = house.raw(&request).await;
        assert_eq!(answers.len(), 1, "{what}");
        answers[0].expect_problem(431, "headers-too-large");
        assert!(answers[0].head.contains("x-content-type-options: nosniff"), "{what}: {:?}", answers[0]);
    }
    house.get("/healthz").await.expect(200);
    assert_eq!(house.raw(&many(98)).await[0].status, 200);
}

#[tokio::test]
async fn what_is_not_http_is_told_so_behind_what_was() {
    let house = House::new().await;
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
        let answers = house.raw(bad).await;
        assert_eq!(answers.len(), 1, "{}", String::from_utf8_lossy(bad));
        answers[0].expect_problem(400, "malformed-request");
        let answers = house.raw(&[HEALTH, HEALTH, bad].concat()).await;
        assert_eq!(answers.iter().map(|answer| answer.status).collect::<Vec<_>>(), [200, 200, 400]);
        answers[2].expect_problem(400, "malformed-request");
    }
    // Who speaks HTTP/2 without asking could not read an answer in HTTP/1.1.
    assert!(house.raw(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.is_empty());
}

#[tokio::test]
async fn a_client_that_drips_its_headers_is_ended_in_time() {
    let house = House::with(|settings| settings.http.header_time = ms(600)).await;
    let begun = Instant::now();
    let drip = async |first: &'static [u8], more: &'static [u8]| {
        let mut raw = house.connect().await;
        raw.send(first).await;
        let (mut from, mut to) = raw.0.split();
        let mut said = Vec::new();
        tokio::select! {
            read = from.read_to_end(&mut said) => drop(read),
            () = async { while to.write_all(more).await.is_ok() { tokio::time::sleep(ms(50)).await } } => {}
        }
        (begun.elapsed(), String::from_utf8(said).unwrap())
    };
    let clients = [(b"G".as_slice(), b"E".as_slice()), (b"GET / HTTP/1.1\r\n", b"x: y\r\n"), (b"GET / HTTP/1.1\r\nx: ", b"y")];
    let slow = join_all(clients.into_iter().cycle().take(30).map(|(first, more)| drip(first, more))).await;
    for (took, said) in slow {
        assert!(took >= ms(550) && took < ms(9000), "{took:?}");
        assert!(said.starts_with("HTTP/1.1 408 ") && said.contains("\"request-timeout\""), "{said}");
    }
    println!("slow headers: 30 connections ended within {:?} of a limit of 600 ms", begun.elapsed());

    // Who says nothing at all asked for nothing, and hears nothing.
    let begun = Instant::now();
    assert!(house.connect().await.answers().await.is_empty());
    assert!(begun.elapsed() >= ms(550) && begun.elapsed() < ms(9000));
}

#[tokio::test]
async fn a_connection_waits_for_its_next_request_and_not_for_ever() {
    let house = House::with(|settings| {
        settings.http.header_time = ms(300);
        settings.http.idle_time = ms(1200);
    })
    .await;
    let mut raw = house.connect().await;
    for _ in 0..2 {
        raw.send(HEALTH).await;
        // Longer than a head may take.
        tokio::time::sleep(ms(600)).await;
    }
    let begun = Instant::now();
    assert_eq!(raw.answers().await.iter().map(|answer| answer.status).collect::<Vec<_>>(), [200, 200]);
    assert!(begun.elapsed() < ms(9000), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_client_that_does_not_read_loses_its_seat() {
    let house = House::with(|settings| {
        settings.http.connections = 2;
        settings.http.write_time = ms(1000);
    })
    .await;
    let mut greedy = house.connect().await;
    greedy.send(&b"GET /docs/swagger-ui-bundle.js HTTP/1.1\r\nhost: a\r\n\r\n".repeat(20)).await;
    tokio::time::sleep(ms(300)).await;
    let mut other = house.connect().await;
    other.send(b"GET /healthz HTTP/1.1\r\n").await;
    let begun = Instant::now();
    house.eventually("it has lost its seat", async || house.get("/lfs/uploads").await.status == 200).await;
    assert!(begun.elapsed() < ms(5000), "{:?}", begun.elapsed());
    drop(greedy);
}

#[tokio::test]
async fn a_request_that_takes_too_long_is_given_up() {
    let house = House::with(|settings| settings.http.request_time = ms(700)).await;
    let opened = house.open(b"x", json!({})).await.expect(201);
    let begun = Instant::now();
    let answer = house.get(&format!("/lfs/uploads/{}?wait=30", opened.id())).await;
    let answer = answer.expect_problem(503, "dependency-unavailable");
    assert!(answer.headers.contains_key("retry-after") && answer.json["retryable"] == true);
    assert!(begun.elapsed() >= ms(700) && begun.elapsed() < ms(4000), "{:?}", begun.elapsed());
    house.get(&format!("/lfs/uploads/{}", opened.id())).await.expect(200);
}

#[tokio::test]
async fn no_more_uploads_are_completed_at_once_than_there_are_seats() {
    let wire = wire_to_s3().await;
    let house = House::with(|settings| {
        settings.objects.public_endpoint = settings.objects.endpoint.replace(format!("http://{}", wire.address()));
        settings.broker.completes = 1;
    })
    .await;
    let mut waiting = Vec::new();
    for n in 0..6u8 {
        waiting.push(house.put_up(&[n], json!({})).await.id());
    }
    wire.silence();
    let answers = join_all(waiting.iter().map(|id| house.complete(id))).await;
    let full = answers.into_iter().map(|answer| answer.expect_problem(503, "dependency-unavailable"));
    let full = full.filter(|answer| answer.json["detail"].as_str().unwrap().contains("as many uploads as it may"));
    let full: Vec<Answer> = full.collect();
    assert!((3..=5).contains(&full.len()), "{} of 6", full.len());
    assert!(full.iter().all(|answer| answer.headers.contains_key("retry-after")));
    wire.restore().await;
    for id in waiting {
        house.insist(&id).await;
    }
    assert_eq!(house.distinct_records().await.len(), 6);
}

#[tokio::test]
async fn a_tenant_asks_as_often_as_it_may_and_no_other_pays_for_it() {
    let house = House::with_tokens(|settings| settings.http.tenant_requests_per_second = 5).await;
    let list = async |tenant: &str| {
        house.send(house.request("GET", "/lfs/uploads").bearer_auth(token(tenant, "lfs:read", &["*"]))).await
    };
    let mut served = 0;
    let limited = loop {
        let answer = list("acme").await;
        if answer.status == 429 {
            break answer.expect_problem(429, "rate-limited");
        }
        answer.expect(200);
        served += 1;
        assert!(served < 500, "nobody stops it");
    };
    assert!(served >= 5, "{served}");
    assert_eq!((&limited.headers["retry-after"], &limited.json["retryable"]), (&"1".parse().unwrap(), &json!(true)));
    list("other").await.expect(200);

    // After the scope, before the media type and all that follows; pages that need no token are not counted.
    let exhausted = async || while list("acme").await.status != 429 {};
    let post = |scope| house.send(house.request("POST", "/lfs/uploads").bearer_auth(token("acme", scope, &["*"])).body("x"));
    exhausted().await;
    post("lfs:read").await.expect_problem(403, "insufficient-scope");
    exhausted().await;
    post("lfs:write").await.expect_problem(429, "rate-limited");
    house.get("/healthz").await.expect(200);
    house.eventually("the tenant may ask again", async || list("acme").await.status == 200).await;
}

#[tokio::test]
async fn without_tokens_and_at_zero_nobody_counts() {
    let house = House::with(|settings| settings.http.tenant_requests_per_second = 1).await;
    for _ in 0..20 {
        house.get("/lfs/uploads").await.expect(200);
    }
    let house = House::with_tokens(|settings| {
        settings.http.tenant_requests_per_second = 0;
        settings.http.failed_logins_per_minute = 0;
    })
    .await;
    for _ in 0..20 {
        house.send(house.request("GET", "/lfs/uploads").bearer_auth(token("acme", "lfs:read", &["*"]))).await.expect(200);
        house.send(house.request("GET", "/lfs/uploads").bearer_auth("x")).await.expect_problem(401, "invalid-token");
    }
}

#[tokio::test]
async fn an_address_guesses_few_tokens_and_locks_nobody_out() {
    let house = House::with_tokens(|settings| settings.http.failed_logins_per_minute = 3).await;
    let guess = async |house: &House, forwarded: &str| {
        let request = house.request("GET", "/lfs/uploads").bearer_auth("a.b.c").header("x-forwarded-for", forwarded);
        house.send(request).await
    };
    for n in 0..3 {
        guess(&house, &format!("192.0.2.{n}")).await.expect_problem(401, "invalid-token");
    }
    // Nobody trusts this peer: it is one address, whatever it says.
    let limited = guess(&house, "192.0.2.9").await.expect_problem(429, "rate-limited");
    let wait: u64 = limited.headers["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((1..=20).contains(&wait), "{wait}");
    house.send(house.request("GET", "/lfs/uploads").bearer_auth(token("acme", "lfs:read", &["*"]))).await.expect(200);
    house.get("/lfs/uploads").await.expect_problem(401, "unauthenticated");

    let house = House::with_tokens(|settings| {
        settings.http.failed_logins_per_minute = 3;
        settings.http.trusted_proxies = vec!["127.0.0.0/8".parse().unwrap(), "10.0.0.0/8".parse().unwrap()];
    })
    .await;
    for client in ["192.0.2.1", "192.0.2.2"] {
        for n in 0..3 {
            guess(&house, &format!("6.6.6.{n}, {client}, 10.0.0.7")).await.expect_problem(401, "invalid-token");
        }
        guess(&house, &format!("6.6.6.6, {client}, 10.0.0.7")).await.expect_problem(429, "rate-limited");
    }
}

#[tokio::test]
async fn where_no_origin_is_let_in_options_is_a_method_like_any_other() {
    let house = House::new().await;
    let refused = house.send(house.request("OPTIONS", "/lfs/uploads")).await.expect_problem(405, "method-not-allowed");
    assert!(refused.headers["allow"].to_str().unwrap().contains("POST"));
    house.send(house.request("OPTIONS", "/nowhere")).await.expect_problem(404, "not-found");
}

#[tokio::test]
async fn a_client_on_another_origin_reads_what_it_needs_if_it_is_let_in() {
    let house = House::with(|settings| settings.cors_origins = vec!["https://app.example".into()]).await;
    let asked = |origin: &'static str| {
        let preflight = house.request("OPTIONS", "/lfs/uploads").header("origin", origin);
        house.send(
            preflight.header("access-control-request-method", "POST").header("access-control-request-headers", "idempotency-key"),
        )
    };
    let let_in = asked("https://app.example").await.expect(200);
    assert_eq!(let_in.headers["access-control-allow-origin"], "https://app.example");
    for name in ["authorization", "content-type", "idempotency-key", "traceparent"] {
        assert!(let_in.headers["access-control-allow-headers"].to_str().unwrap().contains(name));
    }
    assert!(!asked("https://evil.example").await.headers.contains_key("access-control-allow-origin"));
    for (method, path) in [("GET", "/lfs/uploads"), ("GET", "/nope"), ("PUT", "/lfs/uploads"), ("POST", "/lfs/uploads")] {
        let answer = house.send(house.request(method, path).header("origin", "https://app.example")).await;
        assert_eq!(answer.headers["access-control-allow-origin"], "https://app.example", "{method} {path}");
        let exposed = answer.headers["access-control-expose-headers"].to_str().unwrap();
        assert!(["location", "retry-after", "x-request-id"].iter().all(|name| exposed.contains(name)), "{exposed}");
        assert!(!answer.headers.contains_key("access-control-allow-credentials"));
    }
    let anyone = House::with(|settings| settings.cors_origins = vec!["*".into()]).await;
    let answer = anyone.send(anyone.request("GET", "/lfs/uploads").header("origin", "https://a.example")).await;
    assert_eq!(answer.headers["access-control-allow-origin"], "*");
    let nobody = House::new().await;
    let answer = nobody.send(nobody.request("GET", "/lfs/uploads").header("origin", "https://app.example")).await;
    assert!(!answer.headers.contains_key("access-control-allow-origin"));
}

#[tokio::test]
async fn no_page_loads_anything_from_outside_or_is_framed() {
    let house = House::new().await;
    let index = house.get("/docs/").await.expect(200).text;
    assert!(!index.contains("<script>") && !index.contains("//cdn"), "{index}");
    let initializer = house.get("/docs/swagger-initializer.js").await.expect(200).text;
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
        let answer = house.get(path).await;
        let policy = answer.headers["content-security-policy"].to_str().unwrap();
        assert!(policy.starts_with("default-src 'none'") && policy.contains("frame-ancestors 'none'"), "{path}: {policy}");
        assert!(!policy.contains("http") && !policy.contains('*') && !policy.contains("unsafe-eval"), "{path}: {policy}");
        assert!(
            !policy.contains("script-src") || (path.starts_with("/docs") && policy.contains("script-src 'self';")),
            "{policy}"
        );
        assert_eq!(answer.headers["x-content-type-options"], "nosniff", "{path}");
        assert_eq!(answer.headers["referrer-policy"], "no-referrer", "{path}");
    }
    assert!(initializer.contains("/openapi.json") && !initializer.contains("https://"), "{initializer}");
}

#[tokio::test]
async fn the_store_was_tried_out_when_the_broker_is_ready() {
    let house = House::new().await;
    // The start waits for the trial, though not for ever.
    let is_tried = async || house.get("/readyz").await.json["capabilities"].is_object();
    house.eventually("the store was tried out", is_tried).await;
    let ready = house.get("/readyz").await.expect(200);
    let seen = &ready.json["capabilities"];
    for kept in ["refuses_wrong_bytes", "refuses_overwrite", "keeps_token", "refuses_other_size"] {
        assert_eq!(seen[kept], true, "{kept}: {}", ready.text);
    }
    for told in [
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
        assert!(seen[told].is_boolean(), "{told}: {}", ready.text);
    }
    assert!(seen.as_object().unwrap().contains_key("answers_cors"));
    assert!(house.objects().await.is_empty(), "the trial left something");

    let with_tokens = House::with_tokens(|_| {}).await;
    let seen_again = async || with_tokens.get("/readyz").await.expect(200).json["capabilities"] == *seen;
    with_tokens.eventually("the store was tried out again", seen_again).await;
    let without_bucket = House::with(|settings| settings.objects.bucket = None).await;
    assert!(without_bucket.get("/readyz").await.json.get("capabilities").is_none());
}
