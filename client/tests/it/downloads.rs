//! Downloads: whatever happens on the way, the bytes are the promised ones or there is an error.

use std::io;

use lfs_broker_client::checksum::Sha256;
use lfs_broker_client::{Client, Download, Error};
use serde_json::{Value, json};
use tokio::io::AsyncReadExt as _;

use crate::canned::{Canned, Script, answer, json_answer, problem, raw, s3_error};

const BYTES: &[u8] = b"the quick brown fox jumps over the lazy dog";

fn pointer(bytes: &[u8]) -> Vec<u8> {
    let json = format!(
        r#"{{"kfs_lfs":1,"bucket":"b","key":"k","size":{},"sha256":"{}","content_type":"a/b"}}"#,
        bytes.len(),
        Sha256::of(bytes)
    );
    json.into_bytes()
}

fn resolved(canned: &Canned, bytes: &[u8]) -> Vec<u8> {
    let mut answer = canned.signed("GET", "/b/k", json!({"x-amz-must": "be sent"}));
    let more = json!({"size": bytes.len(), "sha256": Sha256::of(bytes), "content_type": "a/b", "filename": "fox.txt",
        "integrity": "sha256", "upload_id": null});
    answer.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    json_answer("200 OK", &answer)
}

/// A client of a listener that resolves the pointer to [`BYTES`] and then gives `answers`.
async fn scripted(answers: Vec<Vec<u8>>) -> (Client, Script) {
    let canned = Canned::new().await;
    let client = canned.client();
    let first = resolved(&canned, BYTES);
    (client, canned.answers([vec![first], answers].concat()))
}

#[tokio::test]
async fn the_bytes_come_verified_and_storage_never_sees_the_token() {
    let (client, script) = scripted(vec![answer("200 OK", BYTES)]).await;
    let download = client.fetch(&pointer(BYTES)).await.unwrap();
    assert_eq!(download.resolved().unwrap().filename.as_deref(), Some("fox.txt"));
    assert_eq!(download.size(), BYTES.len() as u64);
    assert_eq!(download.to_vec(1000).await.unwrap(), BYTES);
    let asked = script.asked().await;
    assert_eq!(asked[0].line, "POST /lfs/resolve");
    assert_eq!(asked[0].body, pointer(BYTES));
    assert_eq!(asked[0].header("authorization"), Some("Bearer t0ken"));
    assert_eq!(asked[1].line, "GET /b/k?X-Amz-Signature=s3cret");
    assert_eq!(asked[1].header("authorization"), None);
    assert_eq!(asked[1].header("x-amz-must"), Some("be sent"));
    assert_eq!(asked[1].header("range"), None);
}

#[tokio::test]
async fn a_cut_download_goes_on_where_it_stopped() {
    let rest = |from: usize| format!("content-range: bytes {from}-{}/{}\r\n", BYTES.len() - 1, BYTES.len());
    let (client, script) = scripted(vec![
        raw("200 OK", "", BYTES.len(), &BYTES[..10]),
        s3_error("503 Slow Down", "SlowDown"),
        raw("206 Partial Content", &rest(10), BYTES.len() - 10, &BYTES[10..30]),
        raw("206 Partial Content", &rest(30), BYTES.len() - 30, &BYTES[30..]),
    ])
    .await;
    assert_eq!(client.fetch(&pointer(BYTES)).await.unwrap().to_vec(1000).await.unwrap(), BYTES);
    let ranges: Vec<_> = script.asked().await.iter().map(|asked| asked.header("range").map(str::to_owned)).skip(2).collect();
    assert_eq!(ranges, [Some("bytes=10-".to_owned()), Some("bytes=10-".to_owned()), Some("bytes=30-".to_owned())]);
}

#[tokio::test]
async fn storage_that_ignores_ranges_is_read_from_the_start_and_passed_over() {
    let (client, _script) = scripted(vec![raw("200 OK", "", BYTES.len(), &BYTES[..10]), answer("200 OK", BYTES)]).await;
    assert_eq!(client.fetch(&pointer(BYTES)).await.unwrap().to_vec(1000).await.unwrap(), BYTES);
}

#[tokio::test]
async fn a_range_that_was_not_asked_for_is_refused() {
    let (client, _script) = scripted(vec![
        raw("200 OK", "", BYTES.len(), &BYTES[..10]),
        raw("206 Partial Content", "content-range: bytes 9-42/43\r\n", BYTES.len() - 9, &BYTES[9..]),
    ])
    .await;
    let error = client.fetch(&pointer(BYTES)).await.unwrap().to_vec(1000).await.unwrap_err();
    assert!(matches!(error, Error::Unexpected { status: 206, .. }), "{error}");
}

#[tokio::test]
async fn a_download_that_breaks_for_ever_ends() {
    let mut answers = vec![raw("200 OK", "", BYTES.len(), &BYTES[..10])];
    // A byte each time is not enough to be given new attempts.
    answers.extend((10..13).map(|from| {
        let range = format!("content-range: bytes {from}-42/43\r\n");
        raw("206 Partial Content", &range, BYTES.len() - from, &BYTES[from..=from])
    }));
    let (client, script) = scripted(answers).await;
    let error = client.fetch(&pointer(BYTES)).await.unwrap().to_vec(1000).await.unwrap_err();
    assert!(matches!(error, Error::Unreachable { peer: "storage", .. }), "{error}");
    assert!(!error.to_string().contains("refused"), "there was another attempt: {error}");
    assert!(!error.to_string().contains("s3cret"), "{error}");
    assert_eq!(script.lines().await.len(), 5);
}

#[tokio::test]
async fn corrupt_bytes_are_detected_before_the_last_one_is_given_out() {
    let mut wrong = BYTES.to_vec();
    wrong[3] ^= 1;
    let (client, _script) = scripted(vec![answer("200 OK", &wrong)]).await;
    let mut download = client.fetch(&pointer(BYTES)).await.unwrap();
    let mut read = vec![0; BYTES.len()];
    // Even who reads exactly the promised number and never sees an end is not deceived.
    let error = download.read_exact(&mut read).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    let Ok(Error::Corrupt { expected, found }) = error.downcast::<Error>() else { panic!() };
    assert_eq!(expected, format!("sha256:{}", Sha256::of(BYTES)));
    assert_eq!(found, format!("sha256:{}", Sha256::of(&wrong)));
}

#[tokio::test]
async fn a_download_that_failed_never_ends_like_a_whole_one() {
    let mut wrong = BYTES.to_vec();
    wrong[3] ^= 1;
    let cut = || raw("200 OK", "", BYTES.len(), &BYTES[..10]);
    for (answers, corrupt) in [(vec![answer("200 OK", &wrong)], true), (vec![cut()], false)] {
        let (client, _script) = scripted(answers).await;
        let mut download = client.fetch(&pointer(BYTES)).await.unwrap();
        let first = loop {
            match download.chunk().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("it ended like a whole one"),
                Err(error) => break error,
            }
        };
        assert_eq!(first.is_corrupt(), corrupt, "{first}");
        for _ in 0..2 {
            let error = download.chunk().await.unwrap_err();
            assert_eq!((error.to_string(), error.is_corrupt()), (first.to_string(), corrupt));
            assert_eq!(download.read(&mut [0; 10]).await.unwrap_err().to_string(), first.to_string());
        }
        // As a stream it has said so once, and whoever passes over errors comes to an end.
        assert!(futures_util::StreamExt::next(&mut download).await.is_none());
        assert!(download.to_vec(1000).await.is_err());
    }

    let (client, _script) = scripted(vec![answer("200 OK", &wrong)]).await;
    let mut download = client.fetch(&pointer(BYTES)).await.unwrap();
    let mut read = Vec::new();
    assert!(download.read_to_end(&mut read).await.is_err());
    assert!(download.read_to_end(&mut read).await.is_err());
}

#[tokio::test]
async fn no_byte_beyond_the_pointers_size_is_taken() {
    let longer = [BYTES, b"!"].concat();
    let chunked = |chunks: &[&[u8]]| {
        let head = b"HTTP/1.1 200 OK\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n".to_vec();
        let framed = chunks.iter().flat_map(|bytes| [format!("{:x}\r\n", bytes.len()).as_bytes(), bytes, b"\r\n"].concat());
        [head, framed.collect(), b"0\r\n\r\n".to_vec()].concat()
    };
    let (client, _script) = scripted(vec![answer("200 OK", &longer)]).await;
    assert!(matches!(client.fetch(&pointer(BYTES)).await, Err(Error::Corrupt { .. })));

    for chunks in [&[&longer[..]][..], &[BYTES, b"!"]] {
        let (client, _script) = scripted(vec![chunked(chunks)]).await;
        let error = client.fetch(&pointer(BYTES)).await.unwrap().to_vec(1000).await.unwrap_err();
        assert_eq!(error.to_string(), "the bytes are corrupt: expected 43 bytes, found more");
    }

    let (client, _script) = scripted(vec![chunked(&[&BYTES[..20]])]).await;
    let error = client.fetch(&pointer(BYTES)).await.unwrap().to_vec(1000).await.unwrap_err();
    assert_eq!(error.to_string(), "the bytes are corrupt: expected 43 bytes, found 20 bytes");

    let (client, _script) = scripted(vec![answer("200 OK", BYTES)]).await;
    let error = client.fetch(&pointer(BYTES)).await.unwrap().to_vec(42).await.unwrap_err();
    assert!(matches!(error, Error::TooLarge { size: 43, limit: 42 }), "{error}");
}

#[tokio::test]
async fn another_size_at_the_broker_is_corrupt_before_a_byte_moves() {
    let canned = Canned::new().await;
    let client = canned.client();
    let script = vec![resolved(&canned, b"other")];
    let script = canned.answers(script);
    assert!(matches!(client.fetch(&pointer(BYTES)).await, Err(Error::Corrupt { .. })));
    assert_eq!(script.lines().await.len(), 1);
}

#[tokio::test]
async fn a_file_appears_only_whole_and_verified() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("fox.txt");
    std::fs::write(&path, "before").unwrap();

    let (client, _script) = scripted(vec![answer("200 OK", &vec![b'x'; BYTES.len()])]).await;
    let error = client.fetch(&pointer(BYTES)).await.unwrap().to_file(&path).await.unwrap_err();
    assert!(matches!(error, Error::Corrupt { .. }), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), b"before");

    let (client, _script) = scripted(vec![answer("200 OK", BYTES)]).await;
    client.fetch(&pointer(BYTES)).await.unwrap().to_file(&path).await.unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), BYTES);
    let left: Vec<_> = std::fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["fox.txt"]);
}

#[tokio::test]
async fn a_url_that_ran_out_is_resolved_again() {
    let canned = Canned::new().await;
    let client = canned.client();
    let again = resolved(&canned, BYTES);
    let script = canned.answers(vec![again.clone(), s3_error("403 Forbidden", "AccessDenied"), again, answer("200 OK", BYTES)]);
    assert_eq!(client.fetch(&pointer(BYTES)).await.unwrap().to_vec(1000).await.unwrap(), BYTES);
    let lines = script.lines().await;
    assert_eq!(lines.iter().filter(|line| *line == "POST /lfs/resolve").count(), 2);
}

#[tokio::test]
async fn what_is_not_there_says_how() {
    let (client, _script) = scripted(vec![s3_error("404 Not Found", "NoSuchKey")]).await;
    assert!(matches!(client.fetch(&pointer(BYTES)).await, Err(Error::Missing)));
    for (answer, gone) in [(problem(410, "object-gone", false), true), (problem(403, "pointer-forbidden", false), false)] {
        let canned = Canned::new().await;
        let client = canned.client();
        let _script = canned.answers(vec![answer]);
        let error = client.fetch(&pointer(BYTES)).await.unwrap_err();
        assert_eq!(matches!(error, Error::Gone(_)), gone, "{error}");
        assert_eq!(matches!(error, Error::Forbidden { .. }), !gone, "{error}");
    }
    assert!(matches!(client.fetch(b"no pointer").await, Err(Error::NotAPointer(_))));
}

#[tokio::test]
async fn an_object_of_no_bytes_is_an_object() {
    let canned = Canned::new().await;
    let client = canned.client();
    let first = resolved(&canned, b"");
    let _script = canned.answers(vec![first, answer("200 OK", b"")]);
    assert!(client.fetch(&pointer(b"")).await.unwrap().to_vec(0).await.unwrap().is_empty());
}

#[tokio::test]
async fn a_weaker_checksum_is_checked_as_well() {
    // CRC-32 of "123456789" is cbf43926: the check value of the CRC catalogue.
    let value = br#"{"kfs_lfs":1,"bucket":"b","key":"k","size":9,"checksum":"cbf43926","checksum_alg":"crc32"}"#;
    for (bytes, right) in [(b"123456789", true), (b"123456780", false)] {
        let canned = Canned::new().await;
        let client = canned.client();
        let mut first: Value = canned.signed("GET", "/b/k", json!({}));
        first["size"] = json!(9);
        let first = json_answer("200 OK", &first);
        let _script = canned.answers(vec![first, answer("200 OK", bytes)]);
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
