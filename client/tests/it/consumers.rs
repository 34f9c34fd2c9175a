//! Own access to S3, pieces side by side, and records opened: against a store of one object.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use lfs_broker_client::api::{Integrity, SignedRequest};
use lfs_broker_client::checksum::Sha256;
use lfs_broker_client::consumer::Content;
use lfs_broker_client::{Access, Client, Consumer, Error, Place, Resolver, Retry, Settings};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpListener;

use crate::canned::{Asked, answer, raw, read, s3_error};

const MIB: usize = 1 << 20;

/// What a store of one object does.
#[derive(Clone, Copy, Default)]
struct Habits {
    /// Gives the whole whatever is asked.
    ignores_ranges: bool,
    /// Breaks every second answer in its middle.
    breaks: bool,
    /// Has another object, of another tag, from this request on.
    replaced_from: Option<usize>,
    /// Refuses this request as one whose signature ran out.
    refuses: Option<usize>,
    /// The first signature is good for one request.
    ends: bool,
    /// Says that it is this much larger than it is.
    total_off_by: usize,
}

/// A store with one object, which notes what it was asked.
struct Store {
    url: String,
    asked: Arc<Mutex<Vec<Asked>>>,
}

impl Store {
    async fn of(bytes: Vec<u8>, habits: Habits) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (notes, bytes) = (Arc::clone(&asked), Arc::new(bytes));
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let (notes, bytes) = (Arc::clone(&notes), Arc::clone(&bytes));
                tokio::spawn(async move {
                    let request = read(&mut stream).await;
                    let answer = {
                        let mut notes = notes.lock().unwrap();
                        notes.push(request);
                        habits.answer(&bytes, notes.last().unwrap(), notes.len())
                    };
                    // Whoever has enough may hang up.
                    let _ = stream.write_all(&answer).await;
                    let _ = stream.shutdown().await;
                });
            }
        });
        Self { url, asked }
    }

    /// Access that signs by naming the store, and a counter.
    fn access(&self) -> Access {
        let (url, count) = (self.url.clone(), Arc::new(Mutex::new(0)));
        Access::signed_by(move |place: Place| {
            let mut count = count.lock().unwrap();
            *count += 1;
            let url = format!("{url}/{place}?versionId={}&signature={count}", place.version_id.as_deref().unwrap_or("-"));
            std::future::ready(Ok(SignedRequest::get(url, Duration::from_secs(60))))
        })
    }

    fn resolver(&self) -> Resolver {
        let retry = Retry { attempts: 4, first_wait: Duration::from_millis(1), ..Retry::default() };
        let resolver = Resolver::with_access(self.access().allow("b", "")).unwrap();
        resolver.with_settings(Settings { retry, ..Settings::default() })
    }

    fn headers(&self, name: &str) -> Vec<Option<String>> {
        self.asked.lock().unwrap().iter().map(|asked| asked.header(name).map(str::to_owned)).collect()
    }

    fn lines(&self) -> Vec<String> {
        self.asked.lock().unwrap().iter().map(|asked| asked.line.clone()).collect()
    }
}

impl Habits {
    fn answer(self, bytes: &[u8], asked: &Asked, number: usize) -> Vec<u8> {
        if self.refuses == Some(number) || (self.ends && number > 1 && asked.line.ends_with("signature=1")) {
            return s3_error("403 Forbidden", "AccessDenied");
        }
        let tag = if self.replaced_from.is_some_and(|from| number >= from) { "\"two\"" } else { "\"one\"" };
        if asked.header("if-match").is_some_and(|wanted| wanted != tag) {
            return s3_error("412 Precondition Failed", "PreconditionFailed");
        }
        let range = asked.header("range").filter(|_| !self.ignores_ranges).map(|range| {
            let (from, to) = range.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
            (from.parse::<usize>().unwrap(), to.parse::<usize>().map_or(bytes.len(), |to| to + 1))
        });
        let (from, to) = range.unwrap_or((0, bytes.len()));
        let sent = if self.breaks && number % 2 == 1 { from + (to - from) / 2 } else { to };
        match range {
            None => raw("200 OK", &format!("etag: {tag}\r\n"), to - from, &bytes[from..sent]),
            Some(_) => {
                let head =
                    format!("etag: {tag}\r\ncontent-range: bytes {from}-{}/{}\r\n", to - 1, bytes.len() + self.total_off_by);
                raw("206 Partial Content", &head, to - from, &bytes[from..sent])
            }
        }
    }
}

fn noise(length: usize) -> Vec<u8> {
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
async fn a_large_object_comes_in_pieces_side_by_side_and_in_order() {
    let bytes = noise(41 * MIB + 5);
    for habits in [Habits::default(), Habits { breaks: true, ..Habits::default() }] {
        let store = Store::of(bytes.clone(), habits).await;
        let download = store.resolver().fetch(&pointer(&bytes)).await.unwrap();
        assert!(download.to_vec(u64::MAX).await.unwrap() == bytes, "the bytes came back changed");
        let mut ranges: Vec<String> = store.headers("range").into_iter().flatten().collect();
        assert!(ranges.contains(&"bytes=0-8388607".to_owned()), "{ranges:?}");
        assert!(ranges.contains(&"bytes=41943040-".to_owned()), "{ranges:?}");
        ranges.sort();
        // Each answer that broke is asked for again from where it ended.
        assert_eq!(ranges.len() > 6, habits.breaks, "{ranges:?}");
    }
}

#[tokio::test]
async fn a_small_object_or_a_patient_reader_takes_one_stream() {
    let bytes = noise(33 * MIB);
    let store = Store::of(bytes.clone(), Habits::default()).await;
    let download = store.resolver().with_concurrency(1).fetch(&pointer(&bytes)).await.unwrap();
    assert!(download.to_vec(u64::MAX).await.unwrap() == bytes);
    assert_eq!(store.headers("range"), [None]);
}

#[tokio::test]
async fn storage_that_ignores_ranges_is_read_once() {
    let bytes = noise(33 * MIB);
    let store = Store::of(bytes.clone(), Habits { ignores_ranges: true, ..Habits::default() }).await;
    let download = store.resolver().fetch(&pointer(&bytes)).await.unwrap();
    assert!(download.to_vec(u64::MAX).await.unwrap() == bytes);
    assert_eq!(store.lines().len(), 1);
}

#[tokio::test]
async fn pieces_of_another_object_are_never_joined() {
    let bytes = noise(33 * MIB);
    let store = Store::of(bytes.clone(), Habits { replaced_from: Some(3), ..Habits::default() }).await;
    let error = store.resolver().fetch(&pointer(&bytes)).await.unwrap().to_vec(u64::MAX).await.unwrap_err();
    assert!(matches!(error, Error::Corrupt { .. }), "{error}");
    let store = Store::of(bytes.clone(), Habits { total_off_by: 1, ..Habits::default() }).await;
    let error = store.resolver().fetch(&pointer(&bytes)).await.unwrap_err();
    assert!(matches!(error, Error::Corrupt { .. }), "{error}");
    let mut other = bytes.clone();
    other[20 * MIB] ^= 1;
    let store = Store::of(other, Habits::default()).await;
    let error = store.resolver().fetch(&pointer(&bytes)).await.unwrap().to_vec(u64::MAX).await.unwrap_err();
    assert!(matches!(error, Error::Corrupt { .. }), "{error}");
}

#[tokio::test]
async fn a_signature_that_ran_out_is_renewed_once_for_all_pieces() {
    let bytes = noise(33 * MIB);
    let store = Store::of(bytes.clone(), Habits { ends: true, ..Habits::default() }).await;
    assert!(store.resolver().fetch(&pointer(&bytes)).await.unwrap().to_vec(u64::MAX).await.unwrap() == bytes);
    let signatures = |number: &str| store.lines().iter().filter(|line| line.ends_with(number)).count();
    assert!(signatures("signature=1") > 2, "several pieces were refused: {:?}", store.lines());
    assert_eq!((signatures("signature=2"), signatures("signature=3")), (4, 0), "{:?}", store.lines());
}

#[tokio::test]
async fn own_access_needs_no_broker_and_goes_no_further_than_allowed() {
    let store = Store::of(b"hello".to_vec(), Habits::default()).await;
    let download = store.resolver().fetch_version(&pointer(b"hello"), Some("v1")).await.unwrap();
    assert!(download.resolved().is_none() && download.pointer().is_some());
    assert_eq!(download.to_vec(5).await.unwrap(), b"hello");
    assert_eq!(store.lines(), ["GET /b/k?versionId=v1&signature=1"]);

    let elsewhere = Resolver::with_access(store.access().allow("b", "mine/")).unwrap();
    assert!(matches!(elsewhere.fetch(&pointer(b"hello")).await, Err(Error::Forbidden { problem: None, .. })));
    assert_eq!(store.lines().len(), 1, "nothing was asked");

    let refused = Store::of(Vec::new(), Habits { refuses: Some(1), ..Habits::default() }).await;
    // Signed again, it is let in; a store that goes on refusing is a matter of rights.
    assert!(matches!(refused.resolver().fetch(&pointer(b"hello")).await, Err(Error::Corrupt { .. })));
    let canned = crate::canned::Canned::new().await;
    let url = canned.url.clone();
    let _script = canned.answers(vec![s3_error("403 Forbidden", "AccessDenied"); 3]);
    let access = Access::signed_by(move |place| {
        std::future::ready(Ok(SignedRequest::get(format!("{url}/{place}"), Duration::from_secs(60))))
    });
    let error = Resolver::with_access(access.allow("b", "")).unwrap().fetch(&pointer(b"x")).await.unwrap_err();
    assert!(matches!(error, Error::Forbidden { problem: None, .. }), "{error}");
}

#[tokio::test]
async fn an_object_without_a_pointer_is_bounded_and_cannot_be_verified() {
    let place = || Place { bucket: "b".to_owned(), key: "k".to_owned(), version_id: None };
    let store = Store::of(noise(3 * MIB), Habits { breaks: true, ..Habits::default() }).await;
    let download = store.resolver().fetch_object(place(), 3 << 20).await.unwrap();
    assert!(download.digest().is_none() && download.pointer().is_none());
    assert!(download.to_vec(u64::MAX).await.unwrap() == noise(3 * MIB));
    assert_eq!(store.headers("if-match"), [None, Some("\"one\"".to_owned())], "it goes on with the same object");

    let error = store.resolver().fetch_object(place(), (3 << 20) - 1).await.unwrap_err();
    assert!(matches!(error, Error::TooLarge { .. }), "{error}");
    let asking = Resolver::from(Client::new("http://127.0.0.1:1").unwrap());
    assert!(matches!(asking.fetch_object(place(), 1).await, Err(Error::Invalid(_))));
}

#[tokio::test]
async fn records_of_every_kind_are_opened_and_saved() {
    let store = Store::of(b"hello".to_vec(), Habits::default()).await;
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
    assert!(matches!(error, Error::NoReferenceBucket(_)), "never taken for a tombstone: {error}");
    let consumer = consumer.with_references("shared", store.access()).unwrap();
    let message = consumer.open(None, reference).await.unwrap();
    assert!(matches!(message.content, Content::Reference(_)) && !message.content.is_verified());
    let saved = message.content.save(&path).await.unwrap().unwrap();
    assert_eq!((saved.size, saved.sha256), (5, Sha256::of(b"hello")));
    assert!(store.lines()[1].starts_with("GET /shared/large/0190f2f4-0000-7000-8000-000000000001?"), "{:?}", store.lines());
}

#[tokio::test]
async fn a_weaker_checksum_is_checked_and_the_sha256_of_what_came_is_told() {
    // CRC-32 of "123456789" is cbf43926: the check value of the CRC catalogue.
    let value = br#"{"kfs_lfs":1,"bucket":"b","key":"k","size":9,"checksum":"cbf43926","checksum_alg":"crc32"}"#;
    let store = Store::of(b"123456789".to_vec(), Habits::default()).await;
    let directory = tempfile::tempdir().unwrap();
    let saved = store.resolver().fetch(value).await.unwrap().to_file(directory.path().join("a")).await.unwrap();
    assert_eq!((saved.size, saved.sha256), (9, Sha256::of(b"123456789")));
}

#[tokio::test]
async fn a_body_without_a_length_cannot_be_a_reference() {
    let canned = crate::canned::Canned::new().await;
    let url = canned.url.clone();
    let endless = b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nabc".to_vec();
    let _script = canned.answers(vec![endless, answer("404 Not Found", b"")]);
    let access = Access::signed_by(move |place| {
        std::future::ready(Ok(SignedRequest::get(format!("{url}/{place}"), Duration::from_secs(60))))
    });
    let resolver = Resolver::with_access(access.allow("b", "")).unwrap();
    let place = || Place { bucket: "b".to_owned(), key: "k".to_owned(), version_id: None };
    let error = resolver.fetch_object(place(), 1 << 40).await.unwrap_err();
    assert!(matches!(error, Error::Unexpected { .. }), "{error}");
    assert!(matches!(resolver.fetch_object(place(), 1).await, Err(Error::Missing)));
}
