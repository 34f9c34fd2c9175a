//! A listener that answers one request after the other with bytes written beforehand, and notes what it was asked.

use std::time::Duration;

use lfs_broker_client::{Client, Retry, Settings};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

/// The id of every canned upload.
pub(crate) const ID: &str = "0192aaaa-0000-7000-8000-000000000001";

/// Longer than any test takes; a client that asks too little must not hang the suite.
const PATIENCE: Duration = Duration::from_secs(30);

/// A request as it came.
#[derive(Debug)]
pub(crate) struct Asked {
    pub(crate) line: String,
    pub(crate) head: String,
    pub(crate) body: Vec<u8>,
}

impl Asked {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let lines = self.head.lines().filter_map(|line| line.split_once(": "));
        lines.into_iter().find(|(found, _)| found.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }
}

pub(crate) struct Canned {
    pub(crate) listener: TcpListener,
    pub(crate) url: String,
}

impl Canned {
    pub(crate) async fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        Self { listener, url }
    }

    /// A client that waits next to nothing between attempts.
    pub(crate) fn client(&self) -> Client {
        let retry = Retry { attempts: 4, first_wait: Duration::from_millis(1), ..Retry::default() };
        let client = Client::new(&self.url).unwrap().with_token("t0ken");
        client.with_settings(Settings { retry, ..Settings::default() })
    }

    /// Gives each answer once, in order, on a connection of its own; then nobody listens any more.
    pub(crate) fn answers(self, answers: Vec<Vec<u8>>) -> Script {
        self.groups(answers.into_iter().map(|answer| vec![answer]).collect())
    }

    /// The same, but each group is answered only once all its requests are there.
    pub(crate) fn groups(self, groups: Vec<Vec<Vec<u8>>>) -> Script {
        Script(tokio::spawn(async move {
            let mut asked = Vec::new();
            for group in groups {
                let mut streams = Vec::new();
                for _ in &group {
                    let (mut stream, _) = self.listener.accept().await.unwrap();
                    asked.push(read(&mut stream).await);
                    streams.push(stream);
                }
                for (mut stream, answer) in streams.into_iter().zip(group) {
                    stream.write_all(&answer).await.unwrap();
                    stream.shutdown().await.unwrap();
                }
            }
            asked
        }))
    }

    /// A signed request to this listener.
    pub(crate) fn signed(&self, method: &str, path: &str, headers: Value) -> Value {
        json!({"method": method, "url": format!("{}{path}?X-Amz-Signature=s3cret", self.url), "headers": headers,
            "expires_at": "2026-11-21T07:00:00Z", "expires_in": 900})
    }

    /// An open upload with the members of `more`.
    pub(crate) fn upload(&self, state: &str, size: usize, more: Value) -> Value {
        let mut upload = json!({"id": ID, "state": state, "version": 1, "mode": "single", "topic": "videos", "bucket": "b",
            "object_key": "k", "size": size, "created_at": "2026-11-21T06:00:00Z", "updated_at": "2026-11-21T06:00:00Z",
            "expires_at": "2026-11-21T07:00:00Z", "expires_in": 3600});
        upload.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        upload
    }
}

pub(crate) struct Script(JoinHandle<Vec<Asked>>);

impl Script {
    /// What was asked, once every answer was given.
    pub(crate) async fn asked(self) -> Vec<Asked> {
        tokio::time::timeout(PATIENCE, self.0).await.expect("the client asked less than expected").unwrap()
    }

    /// The request lines alone.
    pub(crate) async fn lines(self) -> Vec<String> {
        self.asked().await.into_iter().map(|asked| asked.line).collect()
    }
}

pub(crate) async fn read(stream: &mut TcpStream) -> Asked {
    let mut all = Vec::new();
    let end = loop {
        if let Some(end) = all.windows(4).position(|bytes| bytes == b"\r\n\r\n") {
            break end;
        }
        assert!(stream.read_buf(&mut all).await.unwrap() > 0, "the request ended within its head");
    };
    let head = String::from_utf8(all[..end].to_vec()).unwrap();
    let (line, head) = head.split_once("\r\n").unwrap();
    let mut asked = Asked { line: line.trim_end_matches(" HTTP/1.1").to_owned(), head: head.to_owned(), body: Vec::new() };
    asked.body = all[end + 4..].to_vec();
    let length: usize = asked.header("content-length").map_or(0, |length| length.parse().unwrap());
    while asked.body.len() < length {
        assert!(stream.read_buf(&mut asked.body).await.unwrap() > 0, "the request ended within its body");
    }
    asked
}

/// An answer of `status` with these header lines and this body, whose length is `length`.
pub(crate) fn raw(status: &str, headers: &str, length: usize, body: &[u8]) -> Vec<u8> {
    let head = format!("HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {length}\r\n{headers}\r\n");
    [head.as_bytes(), body].concat()
}

pub(crate) fn answer(status: &str, body: &[u8]) -> Vec<u8> {
    raw(status, "", body.len(), body)
}

pub(crate) fn json_answer(status: &str, body: &Value) -> Vec<u8> {
    answer(status, body.to_string().as_bytes())
}

pub(crate) fn problem(status: u16, code: &str, retryable: bool) -> Vec<u8> {
    let body = json!({"type": format!("/problems/{code}"), "title": "T", "status": status, "detail": "d", "code": code,
        "request_id": "r-1", "retryable": retryable, "new_member": 1});
    json_answer(&format!("{status} X"), &body)
}

pub(crate) fn s3_error(status: &str, code: &str) -> Vec<u8> {
    answer(status, format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>m</Message></Error>").as_bytes())
}
