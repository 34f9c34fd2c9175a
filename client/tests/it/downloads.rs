//! Downloads return the declared bytes or an error.

use std::io;

use lfs_broker_client::checksum::Sha256;
use lfs_broker_client::{Client, Download, Error};
use serde_json::{Value, json};
use tokio::io::AsyncReadExt as _;

use crate::mock_server::{Exchange, MockServer, json_response, problem, raw_response, response, s3_error};

const BYTES: &[u8] = b"the quick brown fox jumps over the lazy dog";

fn pointer(bytes: &[u8]) -> Vec<u8> {
    let json = format!(
        r#"{{"kfs_lfs":1,"bucket":"b","key":"k","size":{},"sha256":"{}","content_type":"a/b"}}"#,
        bytes.len(),
        Sha256::of(bytes)
    );
    json.into_bytes()
}

fn resolved(server: &MockServer, bytes: &[u8]) -> Vec<u8> {
    let mut response = server.signed("GET", "/b/k", json!({"x-amz-must": "be sent"}));
    let more = json!({"size": bytes.len(), "sha256": Sha256::of(bytes), "content_type": "a/b", "filename": "fox.txt",
        "integrity": "sha256", "upload_id": null});
    response.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    json_response("200 OK", &response)
}

/// A client of a server that resolves the pointer to [`BYTES`] and then sends `responses`.
async fn scripted(responses: Vec<Vec<u8>>) -> (Client, Exchange) {
    let server = MockServer::new().await;
    let client = server.client();
    let first = resolved(&server, BYTES);
    (client, server.respond([vec![first], responses].concat()))
}

#[tokio::test]
async fn the_bytes_are_verified_and_s3_never_receives_the_token() {
    let (client, exchange) = scripted(vec![response("200 OK", BYTES)]).await;
    let download = client.fetch(&pointer(BYTES)).await.unwrap();
    assert_eq!(download.resolved().unwrap().filename.as_deref(), Some("fox.txt"));
    assert_eq!(download.size(), BYTES.len() as u64);
    assert_eq!(download.to_vec(1000).await.unwrap(), BYTES);
    let requests = exchange.requests().await;
    assert_eq!(requests[0].line, "POST /lfs/resolve");
    assert_eq!(requests[0].body, pointer(BYTES));
    assert_eq!(requests[0].header("authorization"), Some("Bearer t0ken"));
    assert_eq!(requests[1].line, "GET /b/k?X-Amz-Signature=s3cret");
    assert_eq!(requests[1].header("authorization"), None);
    assert_eq!(requests[1].header("x-amz-must"), Some("be sent"));
    assert_eq!(requests[1].header("range"), None);
}

#[tokio::test]
async fn a_broken_download_continues_where_it_stopped() {
    let rest = |from: usize| format!("content-range: bytes {from}-{}/{}\r\n", BYTES.len() - 1, BYTES.len());
    let (client, exchange) = scripted(vec![
        raw_response("200 OK", "", BYTES.len(), &BYTES[..10]),
        s3_error("503 Slow Down", "SlowDown"),
        raw_response("206 Partial Content", &rest(10), BYTES.len() - 10, &BYTES[10..30]),
        raw_response("206 Partial Content", &rest(30), BYTES.len() - 30, &BYTES[30..]),
    ])
    .await;
    assert_eq!(client.fetch(&pointer(BYTES)).await.unwrap().to_vec(1000).await.unwrap(), BYTES);
    let ranges: Vec<_> =
        exchange.requests().await.iter().map(|request| request.header("range").map(str::to_owned)).skip(2).collect();
    assert_eq!(ranges, [Some("bytes=10-".to_owned()), Some("bytes=10-".to_owned()), Some("bytes=30-".to_owned())]);
}

#[tokio::test]
async fn bytes_before_the_range_are_skipped_when_a_store_ignores_ranges() {
    let (client, _exchange) =
        scripted(vec![raw_response("200 OK", "", BYTES.len(), &BYTES[..10]), response("200 OK", BYTES)]).await;
    assert_eq!(client.fetch(&pointer(BYTES)).await.unwrap().to_vec(1000).await.unwrap(), BYTES);
}

#[tokio::test]
async fn a_range_that_was_not_requested_is_an_error() {
    let (client, _exchange) = scripted(vec![
        raw_response("200 OK", "", BYTES.len(), &BYTES[..10]),
        raw_response("206 Partial Content", "content-range: bytes 9-42/43\r\n", BYTES.len() - 9, &BYTES[9..]),
    ])
    .await;
    let error = client.fetch(&pointer(BYTES)).await.unwrap().to_vec(1000).await.unwrap_err();
    assert!(matches!(error, Error::Unexpected { status: 206, .. }), "{error}");
}

#[tokio::test]
async fn a_download_that_always_breaks_ends_with_an_error() {
    let mut responses = vec![raw_response("200 OK", "", BYTES.len(), &BYTES[..10])];
    // One byte per attempt is not enough progress to reset the attempts.
    responses.extend((10..13).map(|from| {
        let range = format!("content-range: bytes {from}-42/43\r\n");
        raw_response("206 Partial Content", &range, BYTES.len() - from, &BYTES[from..=from])
    }));
    let (client, exchange) = scripted(responses).await;
    let error = client.fetch(&pointer(BYTES)).await.unwrap().to_vec(1000).await.unwrap_err();
    assert!(matches!(error, Error::Unreachable { peer: "storage", .. }), "{error}");
    assert!(!error.to_string().contains("refused"), "there was another attempt: {error}");
    assert!(!error.to_string().contains("s3cret"), "{error}");
    assert_eq!(exchange.request_lines().await.len(), 5);
}

#[tokio::test]
async fn corrupt_bytes_are_detected_before_the_last_one_is_returned() {
    let mut wrong = BYTES.to_vec();
    wrong[3] ^= 1;
    let (client, _exchange) = scripted(vec![response("200 OK", &wrong)]).await;
    let mut download = client.fetch(&pointer(BYTES)).await.unwrap();
    let mut read = vec![0; BYTES.len()];
    // A reader of exactly the declared number of bytes gets the error too, although it never reads the end.
    let error = download.read_exact(&mut read).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    let Ok(Error::Corrupt { expected, found }) = error.downcast::<Error>() else { panic!() };
    assert_eq!(expected, format!("sha256:{}", Sha256::of(BYTES)));
    assert_eq!(found, format!("sha256:{}", Sha256::of(&wrong)));
}

#[tokio::test]
async fn a_failed_download_never_ends_like_a_complete_one() {
    let mut wrong = BYTES.to_vec();
    wrong[3] ^= 1;
    let cut = || raw_response("200 OK", "", BYTES.len(), &BYTES[..10]);
    for (responses, corrupt) in [(vec![response("200 OK", &wrong)], true), (vec![cut()], false)] {
        let (client, _exchange) = scripted(responses).await;
        let mut download = client.fetch(&pointer(BYTES)).await.unwrap();
        let first = loop {
            match download.chunk().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("it ended like a complete download"),
                Err(error) => break error,
            }
        };
        assert_eq!(first.is_corrupt(), corrupt, "{first}");
        for _ in 0..2 {
            let error = download.chunk().await.unwrap_err();
            assert_eq!((error.to_string(), error.is_corrupt()), (first.to_string(), corrupt));
            assert_eq!(download.read(&mut [0; 10]).await.unwrap_err().to_string(), first.to_string());
        }
        // As a stream, the download returns its error once and then ends, so a caller that ignores errors does not loop.
        assert!(futures_util::StreamExt::next(&mut download).await.is_none());
        assert!(download.to_vec(1000).await.is_err());
    }

    let (client, _exchange) = scripted(vec![response("200 OK", &wrong)]).await;
    let mut download = client.fetch(&pointer(BYTES)).await.unwrap();
    let mut read = Vec::new();
    assert!(download.read_to_end(&mut read).await.is_err());
    assert!(download.read_to_end(&mut read).await.is_err());
}

#[tokio::test]
async fn no_byte_beyond_the_pointers_size_is_accepted() {
    let longer = [BYTES, b"!"].concat();
    let chunked = |chunks: &[&[u8]]| {
        let head = b"HTTP/1.1 200 OK\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n".to_vec();
        let framed = chunks.iter().flat_map(|bytes| [format!("{:x}\r\n", bytes.len()).as_bytes(), bytes, b"\r\n"].concat());
        [head, framed.collect(), b"0\r\n\r\n".to_vec()].concat()
    };
    let (client, _exchange) = scripted(vec![response("200 OK", &longer)]).await;
    assert!(matches!(client.fetch(&pointer(BYTES)).await, Err(Error::Corrupt { .. })));

    for chunks in [&[&longer[..]][..], &[BYTES, b"!"]] {
        let (client, _exchange) = scripted(vec![chunked(chunks)]).await;
        let error = client.fetch(&pointer(BYTES)).await.unwrap().to_vec(1000).await.unwrap_err();
        assert_eq!(error.to_string(), "the bytes are corrupt: expected 43 bytes, found more");
    }

    let (client, _exchange) = scripted(vec![chunked(&[&BYTES[..20]])]).await;
    let error = client.fetch(&pointer(BYTES)).await.unwrap().to_vec(1000).await.unwrap_err();
    assert_eq!(error.to_string(), "the bytes are corrupt: expected 43 bytes, found 20 bytes");

    let (client, _exchange) = scripted(vec![response("200 OK", BYTES)]).await;
    let error = client.fetch(&pointer(BYTES)).await.unwrap().to_vec(42).await.unwrap_err();
    assert!(matches!(error, Error::TooLarge { size: 43, limit: 42 }), "{error}");
}

#[tokio::test]
async fn another_size_at_the_broker_is_an_error_before_any_byte_is_requested() {
    let server = MockServer::new().await;
    let client = server.client();
    let responses = vec![resolved(&server, b"other")];
    let exchange = server.respond(responses);
    let error = client.fetch(&pointer(BYTES)).await.unwrap_err();
    assert_eq!(error.to_string(), "the pointer declares 43 bytes, but the object has 5");
    assert!(error.is_corrupt());
    assert_eq!(exchange.request_lines().await.len(), 1);
}

#[tokio::test]
async fn a_file_appears_only_complete_and_verified() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("fox.txt");
    std::fs::write(&path, "before").unwrap();

    let (client, _exchange) = scripted(vec![response("200 OK", &vec![b'x'; BYTES.len()])]).await;
    let error = client.fetch(&pointer(BYTES)).await.unwrap().to_file(&path).await.unwrap_err();
    assert!(matches!(error, Error::Corrupt { .. }), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), b"before");

    let (client, _exchange) = scripted(vec![response("200 OK", BYTES)]).await;
    client.fetch(&pointer(BYTES)).await.unwrap().to_file(&path).await.unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), BYTES);
    let left: Vec<_> = std::fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["fox.txt"]);
}

#[tokio::test]
async fn an_expired_url_is_resolved_again() {
    let server = MockServer::new().await;
    let client = server.client();
    let again = resolved(&server, BYTES);
    let exchange =
        server.respond(vec![again.clone(), s3_error("403 Forbidden", "AccessDenied"), again, response("200 OK", BYTES)]);
    assert_eq!(client.fetch(&pointer(BYTES)).await.unwrap().to_vec(1000).await.unwrap(), BYTES);
    let lines = exchange.request_lines().await;
    assert_eq!(lines.iter().filter(|line| *line == "POST /lfs/resolve").count(), 2);
}

#[tokio::test]
async fn a_missing_object_a_gone_object_and_a_forbidden_pointer_are_different_errors() {
    let (client, _exchange) = scripted(vec![s3_error("404 Not Found", "NoSuchKey")]).await;
    assert!(matches!(client.fetch(&pointer(BYTES)).await, Err(Error::Missing)));
    for (response, gone) in [(problem(410, "object-gone", false), true), (problem(403, "pointer-forbidden", false), false)] {
        let server = MockServer::new().await;
        let client = server.client();
        let _exchange = server.respond(vec![response]);
        let error = client.fetch(&pointer(BYTES)).await.unwrap_err();
        assert_eq!(matches!(error, Error::Gone(_)), gone, "{error}");
        assert_eq!(matches!(error, Error::Forbidden { .. }), !gone, "{error}");
    }
    assert!(matches!(client.fetch(b"no pointer").await, Err(Error::NotAPointer(_))));
}

#[tokio::test]
async fn an_empty_object_can_be_downloaded() {
    let server = MockServer::new().await;
    let client = server.client();
    let first = resolved(&server, b"");
    let _exchange = server.respond(vec![first, response("200 OK", b"")]);
    assert!(client.fetch(&pointer(b"")).await.unwrap().to_vec(0).await.unwrap().is_empty());
}

#[tokio::test]
async fn a_crc_is_verified() {
    // CRC-32 of "123456789" is cbf43926: the check value of the CRC catalogue.
    let value = br#"{"kfs_lfs":1,"bucket":"b","key":"k","size":9,"checksum":"cbf43926","checksum_alg":"crc32"}"#;
    for (bytes, right) in [(b"123456789", true), (b"123456780", false)] {
        let server = MockServer::new().await;
        let client = server.client();
        let mut first: Value = server.signed("GET", "/b/k", json!({}));
        first["size"] = json!(9);
        let first = json_response("200 OK", &first);
        let _exchange = server.respond(vec![first, response("200 OK", bytes)]);
        let download = client.fetch(value).await.unwrap();
        assert!(download.digest().is_some());
        assert_eq!(download.to_vec(9).await.is_ok(), right);
    }
}

fn assert_send<T: Send>(value: T) -> T {
    value
}

#[tokio::test]
async fn downloads_can_move_between_threads() {
    let client = Client::new("http://127.0.0.1:1").unwrap();
    drop(assert_send(client.fetch(b"")));
    let to_file = |download: Download| assert_send(download.to_file("x"));
    let _ = to_file;
}
