//! Failed connections: the error names the cause and the address, and each retry is reported.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use lfs_broker_client::api::ListTopics;
use lfs_broker_client::{Client, Error, Retry, Settings};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

use crate::mock_server::MockServer;
use crate::uploads::{BYTES, a_file, ok, options, single, verified};

fn client(url: &str, attempts: u32) -> Client {
    let retry = Retry { attempts, first_wait: Duration::from_millis(1), ..Retry::default() };
    Client::new(url).unwrap().with_settings(Settings { retry, ..Settings::default() })
}

#[tokio::test]
async fn each_retry_is_reported_with_the_time_that_is_left() {
    let server = MockServer::new().await;
    let events: Arc<Mutex<Vec<(String, Duration)>>> = Arc::default();
    let sink = Arc::clone(&events);
    let client =
        client(&server.url, 4).on_retry(move |event| sink.lock().unwrap().push((event.error.to_string(), event.remaining)));
    let address = server.listener.local_addr().unwrap();
    drop(server);
    let error = client.topics(&ListTopics::default()).await.unwrap_err();
    assert!(error.to_string().contains(&format!("{address} refused the connection")), "{error}");
    let events = events.lock().unwrap();
    assert_eq!(events.len(), 3, "four attempts");
    assert!(events.iter().all(|(text, _)| *text == error.to_string()), "{events:?}");
    // The waits are at most 1, 2 and 4 ms.
    assert!(events[0].1 <= Duration::from_millis(7) && events[2].1 <= Duration::from_millis(4), "{events:?}");
    assert!(events[0].1 > events[2].1, "{events:?}");
}

/// A server that answers each connection with these bytes.
async fn start_server(answer: &'static [u8]) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let _ = stream.read(&mut [0; 1024]).await;
            let _ = stream.write_all(answer).await;
        }
    });
    address
}

#[tokio::test]
async fn a_wrong_scheme_is_named_and_not_retried() {
    for (scheme, answer, cause) in [
        ("https", b"HTTP/1.1 400 Bad Request\r\n\r\n".as_slice(), "does not speak TLS"),
        // A TLS alert.
        ("http", b"\x15\x03\x03\x00\x02\x02\x46".as_slice(), "does not answer in HTTP"),
    ] {
        let address = start_server(answer).await;
        let client = client(&format!("{scheme}://{address}"), 4).on_retry(|event| panic!("retried: {}", event.error));
        let error = client.topics(&ListTopics::default()).await.unwrap_err();
        assert!(matches!(error, Error::Unreachable { is_retryable: false, .. }), "{error}");
        assert!(error.to_string().contains(&address) && error.to_string().contains(cause), "{error}");
    }
}

#[tokio::test]
async fn an_unknown_host_name_is_named() {
    // No name below `.invalid` exists (RFC 6761).
    let error = client("http://broker.invalid:8080", 1).topics(&ListTopics::default()).await.unwrap_err();
    let text = error.to_string();
    assert!(text.contains("the host name of broker.invalid:8080 cannot be resolved: "), "{text}");
}

#[tokio::test]
async fn hashing_is_reported_before_the_upload_opens() {
    let server = MockServer::new().await;
    let client = server.client();
    let responses = vec![single(&server), ok(), verified()];
    let exchange = server.respond(responses);
    let (_directory, path) = a_file(BYTES);
    let events: Arc<Mutex<Vec<(u64, u64)>>> = Arc::default();
    let (hash_sink, open_sink) = (Arc::clone(&events), Arc::clone(&events));
    let uploader = client
        .upload(options())
        .on_hash_progress(move |done_bytes, total_bytes| hash_sink.lock().unwrap().push((done_bytes, total_bytes)))
        .on_open(move |_| open_sink.lock().unwrap().push((0, 0)));
    uploader.file(path).await.unwrap();
    let size = BYTES.len() as u64;
    assert_eq!(*events.lock().unwrap(), [(20, size), (40, size), (size, size), (0, 0)]);
    exchange.requests().await;
}
