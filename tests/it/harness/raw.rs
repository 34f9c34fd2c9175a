//! Raw bytes on a connection, for requests that no HTTP client would send.

use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::TestBroker;

/// The longest wait for the broker to close a connection.
pub(crate) const READ_TIMEOUT: Duration = Duration::from_secs(30);

/// A TCP connection to the broker.
pub(crate) struct RawConnection(pub(crate) TcpStream);

/// One response on a raw connection: status, headers in lower case, body.
#[derive(Debug)]
pub(crate) struct RawResponse {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: String,
}

impl RawResponse {
    /// Asserts a whole problem with this status and code, a request id and `Connection: close`.
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

impl TestBroker {
    /// Opens a connection to the broker.
    pub(crate) async fn connect(&self) -> RawConnection {
        RawConnection(TcpStream::connect(self.url().trim_start_matches("http://")).await.expect("the broker listens"))
    }

    /// Sends these bytes on a new connection and returns every response until the broker closes it.
    pub(crate) async fn send_raw(&self, bytes: &[u8]) -> Vec<RawResponse> {
        let mut connection = self.connect().await;
        // The broker may close the connection before everything is sent; its response still counts.
        let _ = connection.0.write_all(bytes).await;
        connection.responses().await
    }
}

impl RawConnection {
    pub(crate) async fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).await.expect("the broker reads");
    }

    /// Reads responses until the broker closes the connection.
    pub(crate) async fn responses(&mut self) -> Vec<RawResponse> {
        let mut bytes = Vec::new();
        let read = tokio::time::timeout(READ_TIMEOUT, self.0.read_to_end(&mut bytes)).await;
        let _ = read.expect("the broker ends the connection");
        parse(&String::from_utf8(bytes).expect("answers are text"))
    }
}

fn parse(mut text: &str) -> Vec<RawResponse> {
    let mut responses = Vec::new();
    while !text.is_empty() {
        let (head, rest) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("an incomplete response: {text}"));
        let head = format!("{}\r\n", head.to_ascii_lowercase());
        let status = head[9..12].parse().unwrap_or_else(|_| panic!("no status in {head}"));
        let length = head.split("content-length: ").nth(1).and_then(|rest| rest.split("\r\n").next());
        let length: usize = length.map_or(0, |length| length.parse().unwrap());
        let (body, rest) = rest.split_at(length);
        responses.push(RawResponse { status, head, body: body.to_owned() });
        text = rest;
    }
    responses
}
