//! Direct access to S3, concurrent ranges, and records of each kind, against a store with one object.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use lfs_broker_client::api::{Integrity, SignedRequest};
use lfs_broker_client::checksum::Sha256;
use lfs_broker_client::consumer::Content;
use lfs_broker_client::{Access, Client, Consumer, Error, ObjectLocation, Resolver, Retry, Settings};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpListener;

use crate::mock_server::{ReceivedRequest, raw_response, read_request, response, s3_error};

const MIB: usize = 1 << 20;

/// How the store behaves.
#[derive(Clone, Copy, Default)]
struct Behavior {
    /// Sends the whole object for every range.
    ignores_ranges: bool,
    /// Breaks the connection in the middle of every second response.
    breaks_connections: bool,
    /// From this request on, has another object with another ETag.
    replaced_from: Option<usize>,
    /// Refuses this request as if its signature had expired.
    refused_request: Option<usize>,
    /// The first signature is valid for one request.
    first_signature_expires: bool,
    /// Reports a total size that is larger by this many bytes.
    extra_total_bytes: usize,
}

/// A store with one object. It records its requests.
struct MockStore {
    url: String,
    requests: Arc<Mutex<Vec<ReceivedRequest>>>,
}

impl MockStore {
    async fn of(bytes: Vec<u8>, behavior: Behavior) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (recorded, bytes) = (Arc::clone(&requests), Arc::new(bytes));
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let (recorded, bytes) = (Arc::clone(&recorded), Arc::clone(&bytes));
                tokio::spawn(async move {
                    let request = read_request(&mut stream).await;
                    let response = {
                        let mut recorded = recorded.lock().unwrap();
                        recorded.push(request);
                        behavior.response(&bytes, recorded.last().unwrap(), recorded.len())
                    };
                    // The client may close the connection before the end.
                    let _ = stream.write_all(&response).await;
                    let _ = stream.shutdown().await;
                });
            }
        });
        Self { url, requests }
    }

    /// Access whose signed URLs contain the number of the signature.
    fn access(&self) -> Access {
        let (url, count) = (self.url.clone(), Arc::new(Mutex::new(0)));
        Access::signed_by(move |location: ObjectLocation| {
            let mut count = count.lock().unwrap();
            *count += 1;
            let url = format!("{url}/{location}?versionId={}&signature={count}", location.version_id.as_deref().unwrap_or("-"));
            std::future::ready(Ok(SignedRequest::get(url, Duration::from_secs(60))))
        })
    }

    fn resolver(&self) -> Resolver {
        let retry = Retry { attempts: 4, first_wait: Duration::from_millis(1), ..Retry::default() };
        let resolver = Resolver::with_access(self.access().allow("b", "")).unwrap();
        resolver.with_settings(Settings { retry, ..Settings::default() })
    }

    fn headers(&self, name: &str) -> Vec<Option<String>> {
        self.requests.lock().unwrap().iter().map(|request| request.header(name).map(str::to_owned)).collect()
    }

    fn lines(&self) -> Vec<String> {
        self.requests.lock().unwrap().iter().map(|request| request.line.clone()).collect()
    }
}

impl Behavior {
    fn response(self, bytes: &[u8], request: &ReceivedRequest, number: usize) -> Vec<u8> {
        if self.refused_request == Some(number)
            || (self.first_signature_expires && number > 1 && request.line.ends_with("signature=1"))
        {
            return s3_error("403 Forbidden", "AccessDenied");
        }
        let tag = if self.replaced_from.is_some_and(|from| number >= from) { "\"two\"" } else { "\"one\"" };
        if request.header("if-match").is_some_and(|wanted| wanted != tag) {
            return s3_error("412 Precondition Failed", "PreconditionFailed");
        }
        let range = request.header("range").filter(|_| !self.ignores_ranges).map(|range| {
            let (from, to) = range.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
            (from.parse::<usize>().unwrap(), to.parse::<usize>().map_or(bytes.len(), |to| to + 1))
        });
        let (from, to) = range.unwrap_or((0, bytes.len()));
        let sent = if self.breaks_connections && number % 2 == 1 { from + (to - from) / 2 } else { to };
        match range {
            None => raw_response("200 OK", &format!("etag: {tag}\r\n"), to - from, &bytes[from..sent]),
            Some(_) => {
                let head =
                    format!("etag: {tag}\r\ncontent-range: bytes {from}-{}/{}\r\n", to - 1, bytes.len() + self.extra_total_bytes);
                raw_response("206 Partial Content", &head, to - from, &bytes[from..sent])
            }
        }
    }
}

fn random_bytes(length: usize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(length as u64);
    let mut bytes = vec![0; length];
    random.fill(&mut bytes);
    bytes
}

fn pointer(bytes: &[u8]) -> Vec<u8> {
    let json = format!(r#"{{"kfs_lfs":1,"bucket":"b","key":"k","size":{},"sha256":"{}"}}"#, bytes.len(), Sha256::of(bytes));
    json.into_bytes()
}

#[tokio::test]
async fn a_large_object_is_read_in_concurrent_ranges_and_returned_in_order() {
    let bytes = random_bytes(41 * MIB + 5);
    for behavior in [Behavior::default(), Behavior { breaks_connections: true, ..Behavior::default() }] {
        let store = MockStore::of(bytes.clone(), behavior).await;
        let download = store.resolver().fetch(&pointer(&bytes)).await.unwrap();
        assert!(download.to_vec(u64::MAX).await.unwrap() == bytes, "the bytes came back changed");
        let mut ranges: Vec<String> = store.headers("range").into_iter().flatten().collect();
        assert!(ranges.contains(&"bytes=0-8388607".to_owned()), "{ranges:?}");
        assert!(ranges.contains(&"bytes=41943040-".to_owned()), "{ranges:?}");
        ranges.sort();
        // After a broken response, the rest of the range is requested.
        assert_eq!(ranges.len() > 6, behavior.breaks_connections, "{ranges:?}");
    }
}

#[tokio::test]
async fn a_reader_without_concurrency_uses_one_stream() {
    let bytes = random_bytes(33 * MIB);
    let store = MockStore::of(bytes.clone(), Behavior::default()).await;
    let download = store.resolver().with_concurrency(1).fetch(&pointer(&bytes)).await.unwrap();
    assert!(download.to_vec(u64::MAX).await.unwrap() == bytes);
    assert_eq!(store.headers("range"), [None]);
}

#[tokio::test]
async fn a_store_that_ignores_ranges_is_read_once() {
    let bytes = random_bytes(33 * MIB);
    let store = MockStore::of(bytes.clone(), Behavior { ignores_ranges: true, ..Behavior::default() }).await;
    let download = store.resolver().fetch(&pointer(&bytes)).await.unwrap();
    assert!(download.to_vec(u64::MAX).await.unwrap() == bytes);
    assert_eq!(store.lines().len(), 1);
}

#[tokio::test]
async fn bytes_of_different_objects_are_never_joined() {
    let bytes = random_bytes(33 * MIB);
    let store = MockStore::of(bytes.clone(), Behavior { replaced_from: Some(3), ..Behavior::default() }).await;
    let error = store.resolver().fetch(&pointer(&bytes)).await.unwrap().to_vec(u64::MAX).await.unwrap_err();
    assert!(matches!(error, Error::Corrupt { .. }), "{error}");
    let store = MockStore::of(bytes.clone(), Behavior { extra_total_bytes: 1, ..Behavior::default() }).await;
    let error = store.resolver().fetch(&pointer(&bytes)).await.unwrap_err();
    assert!(matches!(error, Error::Corrupt { .. }), "{error}");
    let mut other = bytes.clone();
    other[20 * MIB] ^= 1;
    let store = MockStore::of(other, Behavior::default()).await;
    let error = store.resolver().fetch(&pointer(&bytes)).await.unwrap().to_vec(u64::MAX).await.unwrap_err();
    assert!(matches!(error, Error::Corrupt { .. }), "{error}");
}

#[tokio::test]
async fn an_expired_signature_is_renewed_once_for_all_ranges() {
    let bytes = random_bytes(33 * MIB);
    let store = MockStore::of(bytes.clone(), Behavior { first_signature_expires: true, ..Behavior::default() }).await;
    assert!(store.resolver().fetch(&pointer(&bytes)).await.unwrap().to_vec(u64::MAX).await.unwrap() == bytes);
    let signatures = |number: &str| store.lines().iter().filter(|line| line.ends_with(number)).count();
    assert!(signatures("signature=1") > 2, "several pieces were refused: {:?}", store.lines());
    assert_eq!((signatures("signature=2"), signatures("signature=3")), (4, 0), "{:?}", store.lines());
}

#[tokio::test]
async fn direct_access_needs_no_broker_and_reads_only_allowed_objects() {
    let store = MockStore::of(b"hello".to_vec(), Behavior::default()).await;
    let download = store.resolver().fetch_version(&pointer(b"hello"), Some("v1")).await.unwrap();
    assert!(download.resolved().is_none() && download.pointer().is_some());
    assert_eq!(download.to_vec(5).await.unwrap(), b"hello");
    assert_eq!(store.lines(), ["GET /b/k?versionId=v1&signature=1"]);

    let other_prefix = Resolver::with_access(store.access().allow("b", "mine/")).unwrap();
    assert!(matches!(other_prefix.fetch(&pointer(b"hello")).await, Err(Error::Forbidden { problem: None, .. })));
    assert_eq!(store.lines().len(), 1, "no request was sent");

    let refused = MockStore::of(Vec::new(), Behavior { refused_request: Some(1), ..Behavior::default() }).await;
    // With a new signature the request succeeds. A store that refuses every signature denies permission.
    assert!(matches!(refused.resolver().fetch(&pointer(b"hello")).await, Err(Error::Corrupt { .. })));
    let server = crate::mock_server::MockServer::new().await;
    let url = server.url.clone();
    let _exchange = server.respond(vec![s3_error("403 Forbidden", "AccessDenied"); 3]);
    let access = Access::signed_by(move |location| {
        std::future::ready(Ok(SignedRequest::get(format!("{url}/{location}"), Duration::from_secs(60))))
    });
    let error = Resolver::with_access(access.allow("b", "")).unwrap().fetch(&pointer(b"x")).await.unwrap_err();
    assert!(matches!(error, Error::Forbidden { problem: None, .. }), "{error}");
}

#[tokio::test]
async fn an_object_without_a_pointer_is_limited_in_size_and_not_verified() {
    let location = || ObjectLocation { bucket: "b".to_owned(), key: "k".to_owned(), version_id: None };
    let store = MockStore::of(random_bytes(3 * MIB), Behavior { breaks_connections: true, ..Behavior::default() }).await;
    let download = store.resolver().fetch_object(location(), 3 << 20).await.unwrap();
    assert!(download.digest().is_none() && download.pointer().is_none());
    assert!(download.to_vec(u64::MAX).await.unwrap() == random_bytes(3 * MIB));
    assert_eq!(store.headers("if-match"), [None, Some("\"one\"".to_owned())], "the rest comes from the same object");

    let error = store.resolver().fetch_object(location(), (3 << 20) - 1).await.unwrap_err();
    assert!(matches!(error, Error::TooLarge { .. }), "{error}");
    let with_broker = Resolver::from(Client::new("http://127.0.0.1:1").unwrap());
    assert!(matches!(with_broker.fetch_object(location(), 1).await, Err(Error::Invalid(_))));
}

#[tokio::test]
async fn records_of_every_kind_are_opened_and_saved() {
    let store = MockStore::of(b"hello".to_vec(), Behavior::default()).await;
    let consumer = Consumer::new(store.resolver());
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a");

    let value = pointer(b"hello");
    let headers: [(&str, &[u8]); 2] = [("lfs-integrity", b"sha256"), ("lfs-version-id", b"v7")];
    let message = consumer.open(Some(&value), headers).await.unwrap();
    assert_eq!(message.metadata.integrity, Some(Integrity::Sha256));
    assert!(message.content.is_verified() && message.content.pointer().is_some());
    let saved = message.content.save(&path).await.unwrap().unwrap();
    assert_eq!((saved.size, saved.sha256), (5, Sha256::of(b"hello")));
    assert_eq!(std::fs::read(&path).unwrap(), b"hello");
    assert!(store.lines()[0].contains("versionId=v7"));

    let message = consumer.open(Some(b"plain"), []).await.unwrap();
    assert!(matches!(message.content, Content::Inline(b"plain")) && !message.content.is_verified());
    let saved = message.content.save(&path).await.unwrap().unwrap();
    assert_eq!((saved.size, saved.sha256), (5, Sha256::of(b"plain")));
    assert_eq!(std::fs::read(&path).unwrap(), b"plain");

    let message = consumer.open(None, []).await.unwrap();
    assert_eq!(message.content.save(directory.path().join("none")).await.unwrap(), None);
    assert!(!directory.path().join("none").exists());

    let reference = [("S3-REF-FILE-PATH", b"large/0190f2f4-0000-7000-8000-000000000001".as_slice())];
    let error = consumer.open(None, reference).await.unwrap_err();
    assert!(matches!(error, Error::NoReferenceBucket(_)), "a reference is not a tombstone: {error}");
    let consumer = consumer.with_references("shared", store.access()).unwrap();
    let message = consumer.open(None, reference).await.unwrap();
    assert!(matches!(message.content, Content::Reference(_)) && !message.content.is_verified());
    let saved = message.content.save(&path).await.unwrap().unwrap();
    assert_eq!((saved.size, saved.sha256), (5, Sha256::of(b"hello")));
    assert!(store.lines()[1].starts_with("GET /shared/large/0190f2f4-0000-7000-8000-000000000001?"), "{:?}", store.lines());
}

#[tokio::test]
async fn a_crc_is_verified_and_the_sha256_of_the_saved_bytes_is_returned() {
    // CRC-32 of "123456789" is cbf43926: the check value of the CRC catalogue.
    let value = br#"{"kfs_lfs":1,"bucket":"b","key":"k","size":9,"checksum":"cbf43926","checksum_alg":"crc32"}"#;
    let store = MockStore::of(b"123456789".to_vec(), Behavior::default()).await;
    let directory = tempfile::tempdir().unwrap();
    let saved = store.resolver().fetch(value).await.unwrap().to_file(directory.path().join("a")).await.unwrap();
    assert_eq!((saved.size, saved.sha256), (9, Sha256::of(b"123456789")));
}

#[tokio::test]
async fn a_reference_without_a_content_length_is_an_error() {
    let server = crate::mock_server::MockServer::new().await;
    let url = server.url.clone();
    let endless = b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nabc".to_vec();
    let _exchange = server.respond(vec![endless, response("404 Not Found", b"")]);
    let access = Access::signed_by(move |location| {
        std::future::ready(Ok(SignedRequest::get(format!("{url}/{location}"), Duration::from_secs(60))))
    });
    let resolver = Resolver::with_access(access.allow("b", "")).unwrap();
    let location = || ObjectLocation { bucket: "b".to_owned(), key: "k".to_owned(), version_id: None };
    let error = resolver.fetch_object(location(), 1 << 40).await.unwrap_err();
    assert!(matches!(error, Error::Unexpected { .. }), "{error}");
    assert!(matches!(resolver.fetch_object(location(), 1).await, Err(Error::Missing)));
}
