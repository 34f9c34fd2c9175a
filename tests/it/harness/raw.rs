//! Bytes on a connection, as no HTTP client would send them.

use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::House;

/// No test waits longer for a connection to end.
const PATIENCE: Duration = Duration::from_secs(30);

/// A connection.
pub(crate) struct Raw(pub(crate) TcpStream);

/// What came back on a connection: status, headers in lower case, body.
#[derive(Debug)]
pub(crate) struct RawAnswer {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: String,
}

impl RawAnswer {
    /// Asserts that it is a problem of this status and code, whole and named.
    #[track_caller]
    pub(crate) fn expect_problem(&self, status: u16, code: &str) {
        assert_eq!(self.status, status, "{self:?}");
        let json: Value = serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"));
        assert_eq!((json["code"].as_str(), json["status"].as_u64()), (Some(code), Some(status.into())), "{self:?}");
        assert!(self.head.contains("content-type: application/problem+json\r\n"), "{self:?}");
        assert!(self.head.contains(&format!("x-request-id: {}\r\n", json["request_id"].as_str().unwrap())), "{self:?}");
        assert!(self.head.contains("connection: close\r\n"), "{self:?}");
    }
}

impl House {
    /// A connection to the broker.
    pub(crate) async fn connect(&self) -> Raw {
        Raw(TcpStream::connect(self.url().trim_start_matches("http://")).await.expect("the broker listens"))
    }

    /// What is answered to these bytes, on a connection of their own that ends with them.
    pub(crate) async fn raw(&self, bytes: &[u8]) -> Vec<RawAnswer> {
        let mut raw = self.connect().await;
        // The broker may close before all is sent; what it said counts.
        let _ = raw.0.write_all(bytes).await;
        raw.answers().await
    }
}

impl Raw {
    pub(crate) async fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).await.expect("the broker reads");
    }

    /// Everything until the broker closes.
    pub(crate) async fn answers(&mut self) -> Vec<RawAnswer> {
        let mut bytes = Vec::new();
        let read = tokio::time::timeout(PATIENCE, self.0.read_to_end(&mut bytes)).await;
        let _ = read.expect("the broker ends the connection");
        parse(&String::from_utf8(bytes).expect("answers are text"))
    }
}

fn parse(mut text: &str) -> Vec<RawAnswer> {
    let mut answers = Vec::new();
    while !text.is_empty() {
        let (head, rest) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("half an answer: {text}"));
        let head = format!("{}\r\n", head.to_ascii_lowercase());
        let status = head[9..12].parse().unwrap_or_else(|_| panic!("no status in {head}"));
        let length = head.split("content-length: ").nth(1).and_then(|rest| rest.split("\r\n").next());
        let length: usize = length.map_or(0, |length| length.parse().unwrap());
        let (body, rest) = rest.split_at(length);
        answers.push(RawAnswer { status, head, body: body.to_owned() });
        text = rest;
    }
    answers
}
