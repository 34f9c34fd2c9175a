//! Crowds: many connections, many that wait, large bodies, few descriptors; and how a broker ends before them.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::harness::House;
use crate::harness::raw::Raw;
use crate::harness::serving::Serving;
use crate::harness::tokens::token;

const HEALTH: &[u8] = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n";
const LIST: &[u8] = b"GET /lfs/uploads?limit=1 HTTP/1.1\r\nhost: localhost\r\n\r\n";

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// The next answer's status line and head, on a connection that may stay.
async fn head(raw: &mut Raw) -> String {
    let mut bytes = Vec::new();
    let read = async {
        while !bytes.ends_with(b"\r\n\r\n") {
            bytes.push(raw.0.read_u8().await.expect("the broker answers"));
        }
    };
    tokio::time::timeout(Duration::from_secs(20), read).await.expect("the broker answers in time");
    String::from_utf8(bytes).unwrap().to_ascii_lowercase()
}

/// Connections whose request never ends.
async fn hold(house: &House, count: usize) -> Vec<Raw> {
    join_all((0..count).map(async |_| {
        let mut raw = house.connect().await;
        raw.send(b"GET /healthz HTTP/1.1\r\n").await;
        raw
    }))
    .await
}

async fn asks(house: &House, request: &[u8]) -> String {
    let mut raw = house.connect().await;
    raw.send(request).await;
    head(&mut raw).await
}

#[tokio::test]
async fn health_is_answered_when_every_seat_is_taken_and_the_rest_is_told_to_come_again() {
    let house = House::with(|settings| settings.http.connections = 4).await;
    let held = hold(&house, 4).await;
    tokio::time::sleep(ms(100)).await;
    let begun = Instant::now();
    for path in ["/healthz", "/readyz"] {
        let answer = asks(&house, format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n").as_bytes()).await;
        assert!(answer.starts_with("http/1.1 200") && answer.contains("connection: close"), "{answer}");
    }
    assert!(begun.elapsed() < ms(3000), "{:?}", begun.elapsed());
    let refused = house.raw(LIST).await;
    refused[0].expect_problem(503, "dependency-unavailable");
    assert!(refused[0].head.contains("retry-after: 1"), "{refused:?}");
    drop(held);
    let asked = join_all((0..40).map(|_| asks(&house, LIST)));
    let served = tokio::time::timeout(Duration::from_secs(20), asked).await.expect("all are served");
    assert!(served.iter().filter(|answer| answer.starts_with("http/1.1 200")).count() >= 4, "{served:?}");
    house.eventually("it recovers", async || asks(&house, LIST).await.starts_with("http/1.1 200")).await;
}

#[tokio::test]
async fn idle_connections_make_room_for_whoever_comes() {
    let house = House::with(|settings| settings.http.connections = 3).await;
    let mut idle = Vec::new();
    for _ in 0..3 {
        let mut raw = house.connect().await;
        raw.send(HEALTH).await;
        head(&mut raw).await;
        idle.push(raw);
    }
    let begun = Instant::now();
    for _ in 0..5 {
        let answer = asks(&house, LIST).await;
        assert!(answer.starts_with("http/1.1 200"), "{answer}");
    }
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn one_address_does_not_take_every_connection() {
    let house = House::with(|settings| settings.http.connections_per_address = 3).await;
    let held = hold(&house, 3).await;
    tokio::time::sleep(ms(100)).await;
    assert!(asks(&house, HEALTH).await.starts_with("http/1.1 200"));
    let refused = house.raw(LIST).await;
    refused[0].expect_problem(429, "rate-limited");
    assert!(refused[0].head.contains("retry-after: 1"), "{refused:?}");
    drop(held);
    house.eventually("the address may come again", async || asks(&house, LIST).await.starts_with("http/1.1 200")).await;
}

#[tokio::test]
async fn a_tenant_waits_for_few_changes_at_once_and_keeps_nobody_else_waiting() {
    let house = House::with_tokens(|settings| settings.http.tenant_long_polls = 2).await;
    let body = json!({"topic": house.topic, "size": 1, "sha256": crate::harness::sha256(b"x")});
    let open = async |tenant: &str| {
        let request = house.request("POST", "/lfs/uploads").bearer_auth(token(tenant, "lfs:write", &["*"]));
        house.send(request.json(&body)).await.expect(201).id()
    };
    let read = async |tenant: &str, id: &str, wait: u32| {
        let request = house.request("GET", &format!("/lfs/uploads/{id}?wait={wait}"));
        house.send(request.bearer_auth(token(tenant, "lfs:read", &["*"]))).await
    };
    let (own, other) = (open("acme").await, open("other").await);
    // Each comes again until it is one of the two that wait, and waits until the upload changes.
    let waits = async || {
        while read("acme", &own, 30).await.status != 200 {
            tokio::time::sleep(ms(20)).await;
        }
    };
    let refused = async {
        house.eventually("a third is refused", async || read("acme", &own, 1).await.status == 429).await;
        let answer = read("acme", &own, 1).await.expect_problem(429, "rate-limited");
        assert_eq!(answer.headers["retry-after"], "1");
        // Neither who does not wait, nor another tenant.
        read("acme", &own, 0).await.expect(200);
        read("other", &other, 1).await.expect(200);
        let abort = house.request("DELETE", &format!("/lfs/uploads/{own}"));
        house.send(abort.bearer_auth(token("acme", "lfs:write", &["*"]))).await.expect(204);
    };
    tokio::join!(waits(), waits(), refused);
    read("acme", &own, 1).await.expect(200);
}

#[tokio::test]
async fn request_bodies_share_a_budget_and_small_ones_need_none() {
    let house = House::with(|settings| {
        settings.http.body_memory_bytes = 1 << 20;
        settings.http.body_time = ms(2500);
    })
    .await;
    let open = json!({"topic": house.topic, "size": 1, "sha256": crate::harness::sha256(b"x")}).to_string().into_bytes();
    let whole = [open, vec![b' '; 900_000]].concat();
    let begin = async || {
        let mut raw = house.connect().await;
        let head = "POST /lfs/uploads HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n";
        raw.send(format!("{head}content-length: {}\r\n\r\n", whole.len()).as_bytes()).await;
        raw.send(&whole[..500_000]).await;
        raw
    };
    // Half of each fits, and no more: the first one waits until its time is over, and what it gives back is enough for the other.
    let mut first = begin().await;
    tokio::time::sleep(ms(500)).await;
    let mut second = begin().await;
    tokio::time::sleep(ms(200)).await;
    let small = Instant::now();
    house.open(b"x", json!({})).await.expect(201);
    assert!(small.elapsed() < ms(1500), "a small one waits for nobody");
    let ((), ()) = tokio::join!(async { drop(first.0.write_all(&whole[500_000..]).await) }, async {
        drop(second.0.write_all(&whole[500_000..]).await)
    });
    let (first, second) = (first.answers().await, second.answers().await);
    first[0].expect_problem(503, "dependency-unavailable");
    assert!(first[0].head.contains("retry-after") && first[0].body.contains("request bodies hold"), "{first:?}");
    assert!([201, 503].contains(&second[0].status), "{second:?}");
    house.send_json("POST", "/lfs/uploads", whole).await.expect(201);
}

/// As many connections as that, which say nothing.
async fn silent(serving: &Serving, count: usize) -> Vec<tokio::net::TcpStream> {
    let address = serving.url().trim_start_matches("http://").to_owned();
    let mut held = Vec::new();
    for _ in 0..count {
        held.push(tokio::net::TcpStream::connect(&address).await.expect("the system takes it in"));
    }
    held
}

#[tokio::test]
async fn a_low_limit_of_open_files_keeps_no_health_check_waiting() {
    let house = House::new().await;
    // A soft limit is raised to the hard one; under a hard one there are fewer connections.
    for limit in ["ulimit -Sn 300", "ulimit -n 400"] {
        let serving = house.serving_after(limit, &[]).await;
        let held = silent(&serving, 420).await;
        let begun = Instant::now();
        let answer = house.http.get(format!("{}/healthz", serving.url())).send().await;
        assert!(answer.as_ref().is_ok_and(|answer| answer.status() == 200), "{limit}: {answer:?}\n{}", serving.log());
        assert!(begun.elapsed() < Duration::from_secs(6), "{limit}: {:?}", begun.elapsed());
        house
            .eventually("others are served too", async || {
                house.send(house.http.get(format!("{}/lfs/uploads", serving.url()))).await.status == 200
            })
            .await;
        assert!(begun.elapsed() < Duration::from_secs(8), "{limit}: {:?}", begun.elapsed());
        assert!(!serving.log().contains("cannot accept"), "{limit}: {}", serving.log());
        drop(held);
    }
}

#[tokio::test]
async fn a_broker_that_is_asked_to_end_says_so_first_and_resets_nobody() {
    let house = House::new().await;
    let id = house.open(b"x", json!({})).await.expect(201).id();
    let mut serving = house.serving(&[("LFS_BROKER_SHUTDOWN_DELAY_SECONDS", "2")]).await;
    let connect = async || Raw(tokio::net::TcpStream::connect(serving.url().trim_start_matches("http://")).await.unwrap());
    let (mut kept, mut waiting) = (connect().await, connect().await);
    kept.send(HEALTH).await;
    assert!(!head(&mut kept).await.contains("connection: close"));
    let mut body = [0; 15];
    kept.0.read_exact(&mut body).await.unwrap();
    waiting.send(format!("GET /lfs/uploads/{id}?wait=30 HTTP/1.1\r\nhost: localhost\r\n\r\n").as_bytes()).await;
    let begun = Instant::now();
    serving.signal("TERM");
    serving.says("ending").await;
    let ready = house.send(house.http.get(format!("{}/readyz", serving.url()))).await;
    assert_eq!((ready.status, ready.json["status"].as_str()), (503, Some("shutting-down")), "{}", ready.text);
    let new = house.send(house.http.get(format!("{}/lfs/uploads", serving.url()))).await.expect(200);
    assert_eq!(new.headers["connection"], "close");
    kept.send(LIST).await;
    let last = kept.answers().await;
    assert!(last[0].status == 200 && last[0].head.contains("connection: close"), "{last:?}");
    // Whoever waits for a change hears how things stand when the broker ends, and not that it has ended.
    let waited = waiting.answers().await;
    assert_eq!(waited[0].status, 200, "{waited:?}");
    assert!(begun.elapsed() >= ms(1900) && begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    let mut has_ended = false;
    for _ in 0..20 {
        has_ended = has_ended || serving.has_ended().await;
    }
    assert!(has_ended, "{}", serving.log());
}

#[tokio::test]
async fn a_second_signal_ends_a_broker_at_once() {
    let house = House::new().await;
    let mut serving = house.serving(&[("LFS_BROKER_SHUTDOWN_DELAY_SECONDS", "100")]).await;
    serving.signal("TERM");
    serving.says("ending").await;
    assert!(!serving.has_ended().await);
    serving.signal("TERM");
    serving.says("asked to end twice").await;
    let mut has_ended = false;
    for _ in 0..10 {
        has_ended = has_ended || serving.has_ended().await;
    }
    assert!(has_ended, "{}", serving.log());
}
