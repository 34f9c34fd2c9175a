//! An HTTP server that sends scripted responses in order and records the requests.

use std::time::Duration;

use lfs_broker_client::{Client, Retry, Settings};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

/// The id of every upload of these tests.
pub(crate) const ID: &str = "0192aaaa-0000-7000-8000-000000000001";

/// Longer than any test takes, so that a client that sends too few requests does not block the tests.
const TEST_TIMEOUT: Duration = Duration::from_secs(30);

/// A received request.
#[derive(Debug)]
pub(crate) struct ReceivedRequest {
    pub(crate) line: String,
    pub(crate) head: String,
    pub(crate) body: Vec<u8>,
}

impl ReceivedRequest {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let lines = self.head.lines().filter_map(|line| line.split_once(": "));
        lines.into_iter().find(|(found, _)| found.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }
}

pub(crate) struct MockServer {
    pub(crate) listener: TcpListener,
    pub(crate) url: String,
}

impl MockServer {
    pub(crate) async fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        Self { listener, url }
    }

    /// A client that waits only milliseconds between attempts.
    pub(crate) fn client(&self) -> Client {
        let retry = Retry { attempts: 4, first_wait: Duration::from_millis(1), ..Retry::default() };
        let client = Client::new(&self.url).unwrap().with_token("t0ken");
        client.with_settings(Settings { retry, ..Settings::default() })
    }

    /// Sends each response once, in order, on its own connection. Then the server stops listening.
    pub(crate) fn respond(self, responses: Vec<Vec<u8>>) -> Exchange {
        self.respond_in_groups(responses.into_iter().map(|response| vec![response]).collect())
    }

    /// The same, but each group of requests is answered only after all of them arrived.
    pub(crate) fn respond_in_groups(self, groups: Vec<Vec<Vec<u8>>>) -> Exchange {
        Exchange(tokio::spawn(async move {
            let mut requests = Vec::new();
            for group in groups {
                let mut streams = Vec::new();
                for _ in &group {
                    let (mut stream, _) = self.listener.accept().await.unwrap();
                    requests.push(read_request(&mut stream).await);
                    streams.push(stream);
                }
                for (mut stream, response) in streams.into_iter().zip(group) {
                    stream.write_all(&response).await.unwrap();
                    stream.shutdown().await.unwrap();
                }
            }
            requests
        }))
    }

    /// A signed request to this server.
    pub(crate) fn signed(&self, method: &str, path: &str, headers: Value) -> Value {
        json!({"method": method, "url": format!("{}{path}?X-Amz-Signature=s3cret", self.url), "headers": headers,
            "expires_at": "2026-11-21T07:00:00Z", "expires_in": 900})
    }

    /// The JSON of an upload with the members of `extra`.
    pub(crate) fn upload(&self, state: &str, size: usize, extra: Value) -> Value {
        let mut upload = json!({"id": ID, "state": state, "version": 1, "mode": "single", "topic": "videos", "bucket": "b",
            "object_key": "k", "size": size, "created_at": "2026-11-21T06:00:00Z", "updated_at": "2026-11-21T06:00:00Z",
            "expires_at": "2026-11-21T07:00:00Z", "expires_in": 3600});
        upload.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        upload
    }
}

/// The running server of one test.
pub(crate) struct Exchange(JoinHandle<Vec<ReceivedRequest>>);

impl Exchange {
    /// The received requests, after every response was sent.
    pub(crate) async fn requests(self) -> Vec<ReceivedRequest> {
        tokio::time::timeout(TEST_TIMEOUT, self.0).await.expect("the client sent too few requests").unwrap()
    }

    /// Only the request lines.
    pub(crate) async fn request_lines(self) -> Vec<String> {
        self.requests().await.into_iter().map(|request| request.line).collect()
    }
}

pub(crate) async fn read_request(stream: &mut TcpStream) -> ReceivedRequest {
    let mut all = Vec::new();
    let end = loop {
        if let Some(end) = all.windows(4).position(|bytes| bytes == b"\r\n\r\n") {
            break end;
        }
        assert!(stream.read_buf(&mut all).await.unwrap() > 0, "the request ended within its head");
    };
    let head = String::from_utf8(all[..end].to_vec()).unwrap();
    let (line, head) = head.split_once("\r\n").unwrap();
    let mut request =
        ReceivedRequest { line: line.trim_end_matches(" HTTP/1.1").to_owned(), head: head.to_owned(), body: Vec::new() };
    request.body = all[end + 4..].to_vec();
    let length: usize = request.header("content-length").map_or(0, |length| length.parse().unwrap());
    while request.body.len() < length {
        assert!(stream.read_buf(&mut request.body).await.unwrap() > 0, "the request ended within its body");
    }
    request
}

/// A response with this status, these header lines and this body. `length` is its content-length.
pub(crate) fn raw_response(status: &str, headers: &str, length: usize, body: &[u8]) -> Vec<u8> {
    let head = format!("HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {length}\r\n{headers}\r\n");
    [head.as_bytes(), body].concat()
}

pub(crate) fn response(status: &str, body: &[u8]) -> Vec<u8> {
    raw_response(status, "", body.len(), body)
}

pub(crate) fn json_response(status: &str, body: &Value) -> Vec<u8> {
    response(status, body.to_string().as_bytes())
}

pub(crate) fn problem(status: u16, code: &str, retryable: bool) -> Vec<u8> {
    let body = json!({"type": format!("/problems/{code}"), "title": "T", "status": status, "detail": "d", "code": code,
        "request_id": "r-1", "retryable": retryable, "new_member": 1});
    json_response(&format!("{status} X"), &body)
}

pub(crate) fn s3_error(status: &str, code: &str) -> Vec<u8> {
    response(status, format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>m</Message></Error>").as_bytes())
}
