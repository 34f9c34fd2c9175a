//! Many connections, many long polls, large bodies, few file descriptors; and an orderly shutdown.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::harness::TestBroker;
use crate::harness::process::BrokerProcess;
use crate::harness::raw::RawConnection;
use crate::harness::tokens::token;

const HEALTH: &[u8] = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n";
const LIST: &[u8] = b"GET /lfs/uploads?limit=1 HTTP/1.1\r\nhost: localhost\r\n\r\n";

fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// The body timeout of a broker in a test that holds connections by unfinished bodies.
const UNFINISHED_BODY_TIMEOUT: Duration = Duration::from_secs(120);

/// The status line and headers of the next response, on a connection that may stay open.
async fn head(connection: &mut RawConnection) -> String {
    let mut bytes = Vec::new();
    let read = async {
        while !bytes.ends_with(b"\r\n\r\n") {
            bytes.push(connection.0.read_u8().await.expect("the broker answers"));
        }
    };
    tokio::time::timeout(Duration::from_secs(60), read).await.expect("the broker answers");
    String::from_utf8(bytes).unwrap().to_ascii_lowercase()
}

/// Opens connections whose request body never ends. Unlike a connection without a whole request head, the broker closes
/// none of them for others. The broker registers them in this order, before any later connection.
async fn open_unfinished_requests(broker: &TestBroker, count: usize) -> Vec<RawConnection> {
    assert!(broker.settings.http.body_timeout >= UNFINISHED_BODY_TIMEOUT);
    let mut held = Vec::new();
    for _ in 0..count {
        let mut connection = broker.connect().await;
        let head = "POST /lfs/uploads HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n";
        connection.send(head.as_bytes()).await;
        held.push(connection);
    }
    held
}

async fn head_of(broker: &TestBroker, request: &[u8]) -> String {
    let mut connection = broker.connect().await;
    connection.send(request).await;
    head(&mut connection).await
}

#[tokio::test]
async fn with_every_connection_taken_health_is_answered_and_other_requests_get_503() {
    let broker = TestBroker::start_with(|settings| {
        settings.http.connections = 4;
        settings.http.body_timeout = UNFINISHED_BODY_TIMEOUT;
    })
    .await;
    let held = open_unfinished_requests(&broker, 4).await;
    for path in ["/healthz", "/readyz"] {
        let response = head_of(&broker, format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n").as_bytes()).await;
        assert!(response.starts_with("http/1.1 200") && response.contains("connection: close"), "{response}");
    }
    let refused = broker.send_raw(LIST).await;
    refused[0].expect_problem(503, "dependency-unavailable");
    assert!(refused[0].head.contains("retry-after: 1"), "{refused:?}");
    drop(held);
    let asked = join_all((0..40).map(|_| head_of(&broker, LIST)));
    let served = asked.await;
    assert!(served.iter().filter(|response| response.starts_with("http/1.1 200")).count() >= 4, "{served:?}");
    broker.eventually("the broker serves again", async || head_of(&broker, LIST).await.starts_with("http/1.1 200")).await;
}

#[tokio::test]
async fn idle_connections_are_closed_for_new_clients() {
    let broker = TestBroker::start_with(|settings| {
        settings.http.connections = 3;
        settings.http.body_timeout = UNFINISHED_BODY_TIMEOUT;
    })
    .await;
    let mut idle = Vec::new();
    for _ in 0..2 {
        let mut connection = broker.connect().await;
        connection.send(HEALTH).await;
        head(&mut connection).await;
        idle.push(connection);
    }
    let _held = open_unfinished_requests(&broker, 1).await;
    // An idle connection that is not closed for others stays open for 75 s, and a request waits for a second.
    for _ in 0..5 {
        broker
            .eventually("an idle connection is closed", async || head_of(&broker, LIST).await.starts_with("http/1.1 200"))
            .await;
    }
}

#[tokio::test]
async fn one_address_cannot_take_every_connection() {
    let broker = TestBroker::start_with(|settings| {
        settings.http.connections_per_address = 3;
        settings.http.body_timeout = UNFINISHED_BODY_TIMEOUT;
    })
    .await;
    let held = open_unfinished_requests(&broker, 3).await;
    assert!(head_of(&broker, HEALTH).await.starts_with("http/1.1 200"));
    let refused = broker.send_raw(LIST).await;
    refused[0].expect_problem(429, "rate-limited");
    assert!(refused[0].head.contains("retry-after: 1"), "{refused:?}");
    drop(held);
    broker.eventually("the address is served again", async || head_of(&broker, LIST).await.starts_with("http/1.1 200")).await;
}

#[tokio::test]
async fn a_tenant_has_a_limit_of_concurrent_long_polls_that_affects_no_other_request() {
    let broker = TestBroker::start_with_tokens(|settings| settings.http.tenant_long_polls = 2).await;
    let body = json!({"topic": broker.topic, "size": 1, "sha256": crate::harness::sha256(b"x")});
    let open = async |tenant: &str| {
        let request = broker.request("POST", "/lfs/uploads").bearer_auth(token(tenant, "lfs:write", &["*"]));
        broker.send(request.json(&body)).await.expect(201).id()
    };
    let read = async |tenant: &str, id: &str, wait: u32| {
        let request = broker.request("GET", &format!("/lfs/uploads/{id}?wait={wait}"));
        broker.send(request.bearer_auth(token(tenant, "lfs:read", &["*"]))).await
    };
    let (own, other) = (open("acme").await, open("other").await);
    // Each of the two retries until it is among the allowed long polls, then waits until the upload changes.
    let waits = async || {
        while read("acme", &own, 30).await.status != 200 {
            tokio::time::sleep(millis(20)).await;
        }
    };
    let refused = async {
        broker.eventually("a third is refused", async || read("acme", &own, 1).await.status == 429).await;
        let response = read("acme", &own, 1).await.expect_problem(429, "rate-limited");
        assert_eq!(response.headers["retry-after"], "1");
        // The limit affects neither a request without a wait nor another tenant.
        read("acme", &own, 0).await.expect(200);
        read("other", &other, 1).await.expect(200);
        let abort = broker.request("DELETE", &format!("/lfs/uploads/{own}"));
        broker.send(abort.bearer_auth(token("acme", "lfs:write", &["*"]))).await.expect(204);
    };
    tokio::join!(waits(), waits(), refused);
    read("acme", &own, 1).await.expect(200);
}

#[tokio::test]
async fn request_bodies_share_a_memory_budget_and_small_ones_need_none() {
    let broker = TestBroker::start_with(|settings| {
        settings.http.body_memory_bytes = 1 << 20;
        settings.http.body_timeout = millis(6000);
    })
    .await;
    let open = json!({"topic": broker.topic, "size": 1, "sha256": crate::harness::sha256(b"x")}).to_string().into_bytes();
    let whole = [open, vec![b' '; 900_000]].concat();
    let send_half = async || {
        let mut connection = broker.connect().await;
        let head = "POST /lfs/uploads HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n";
        connection.send(format!("{head}content-length: {}\r\n\r\n", whole.len()).as_bytes()).await;
        connection.send(&whole[..500_000]).await;
        connection
    };
    // Half of each body fits, and no more. The first waits until its time is over, then frees enough for the second.
    let mut first = send_half().await;
    tokio::time::sleep(millis(300)).await;
    let mut second = send_half().await;
    tokio::time::sleep(millis(300)).await;
    let ((first_answer, mut first_rest), (second_answer, mut second_rest)) = (first.0.split(), second.0.split());
    let small = async {
        // By then both wait for memory, unless the machine is busy. Nothing shows when they do.
        tokio::time::sleep(millis(300)).await;
        broker.open(b"x", json!({})).await.expect(201);
        for answer in [first_answer, second_answer] {
            let unanswered = answer.try_read(&mut [0; 1]).unwrap_err();
            assert_eq!(unanswered.kind(), std::io::ErrorKind::WouldBlock, "a small body waited for a large one");
        }
    };
    let rest = &whole[500_000..];
    let ((), _, _) = tokio::join!(small, first_rest.write_all(rest), second_rest.write_all(rest));
    let (first, second) = (first.responses().await, second.responses().await);
    let (refused, others): (Vec<_>, Vec<_>) = first.into_iter().chain(second).partition(|response| response.status == 503);
    assert!(!refused.is_empty() && others.iter().all(|response| response.status == 201), "{refused:?} {others:?}");
    for refused in refused {
        refused.expect_problem(503, "dependency-unavailable");
        let reason = "the memory for request bodies is in use";
        assert!(refused.head.contains("retry-after") && refused.body.contains(reason), "{refused:?}");
    }
    broker.send_json("POST", "/lfs/uploads", whole).await.expect(201);
}

/// Opens connections that send nothing.
async fn open_silent_connections(process: &BrokerProcess, count: usize) -> Vec<tokio::net::TcpStream> {
    let address = process.url().trim_start_matches("http://").to_owned();
    let mut held = Vec::new();
    for _ in 0..count {
        held.push(tokio::net::TcpStream::connect(&address).await.expect("the system accepts the connection"));
    }
    held
}

#[tokio::test]
async fn a_low_limit_of_open_files_does_not_delay_health_checks() {
    let broker = TestBroker::start().await;
    // The broker raises a soft limit to the hard limit. Under a low hard limit it allows fewer connections.
    for limit in ["ulimit -Sn 300", "ulimit -n 400"] {
        // Without room for others, a request would wait until these connections are closed because they send nothing.
        let process = broker.spawn_process_after(limit, &[("LFS_BROKER_HEADER_SECONDS", "60")]).await;
        let held = open_silent_connections(&process, 420).await;
        let begun = Instant::now();
        let response = broker.http.get(format!("{}/healthz", process.url())).send().await;
        assert!(response.as_ref().is_ok_and(|response| response.status() == 200), "{limit}: {response:?}\n{}", process.log());
        assert!(begun.elapsed() < Duration::from_secs(40), "{limit}: {:?} instead of 60 s", begun.elapsed());
        broker
            .eventually("other requests are served too", async || {
                broker.send(broker.http.get(format!("{}/lfs/uploads", process.url()))).await.status == 200
            })
            .await;
        assert!(begun.elapsed() < Duration::from_secs(40), "{limit}: {:?} instead of 60 s", begun.elapsed());
        assert!(!process.log().contains("cannot accept"), "{limit}: {}", process.log());
        drop(held);
    }
}

#[tokio::test]
async fn a_broker_that_shuts_down_reports_it_first_and_resets_no_connection() {
    let broker = TestBroker::start().await;
    let id = broker.open(b"x", json!({})).await.expect(201).id();
    let mut process = broker.spawn_process(&[("LFS_BROKER_SHUTDOWN_DELAY_SECONDS", "4")]).await;
    let connect =
        async || RawConnection(tokio::net::TcpStream::connect(process.url().trim_start_matches("http://")).await.unwrap());
    let (mut kept, mut waiting) = (connect().await, connect().await);
    kept.send(HEALTH).await;
    assert!(!head(&mut kept).await.contains("connection: close"));
    let mut body = [0; 15];
    kept.0.read_exact(&mut body).await.unwrap();
    waiting.send(format!("GET /lfs/uploads/{id}?wait=30 HTTP/1.1\r\nhost: localhost\r\n\r\n").as_bytes()).await;
    let begun = Instant::now();
    process.signal("TERM");
    process.wait_for_log("shutting down").await;
    let ready = broker.send(broker.http.get(format!("{}/readyz", process.url()))).await;
    assert_eq!((ready.status, ready.json["status"].as_str()), (503, Some("shutting-down")), "{}", ready.text);
    let new = broker.send(broker.http.get(format!("{}/lfs/uploads", process.url()))).await.expect(200);
    assert_eq!(new.headers["connection"], "close");
    kept.send(LIST).await;
    let last = kept.responses().await;
    assert!(last[0].status == 200 && last[0].head.contains("connection: close"), "{last:?}");
    // A long poll gets the current state when the broker shuts down, not a closed connection.
    let waited = waiting.responses().await;
    assert_eq!(waited[0].status, 200, "{waited:?}");
    let elapsed = begun.elapsed();
    assert!((4..25).contains(&elapsed.as_secs()), "{elapsed:?} instead of the delay of 4 s, or of the whole long poll, 30 s");
    let mut has_exited = false;
    for _ in 0..20 {
        has_exited = has_exited || process.has_exited().await;
    }
    assert!(has_exited, "{}", process.log());
}

#[tokio::test]
async fn a_second_signal_stops_the_broker_at_once() {
    let broker = TestBroker::start().await;
    let mut process = broker.spawn_process(&[("LFS_BROKER_SHUTDOWN_DELAY_SECONDS", "100")]).await;
    process.signal("TERM");
    process.wait_for_log("shutting down").await;
    assert!(!process.has_exited().await);
    process.signal("TERM");
    process.wait_for_log("a second signal arrived").await;
    let mut has_exited = false;
    for _ in 0..30 {
        has_exited = has_exited || process.has_exited().await;
    }
    assert!(has_exited, "{}", process.log());
}
