//! URLs that the broker signs and somebody else uses.

use std::time::{Duration, SystemTime};

use aws_sdk_s3::types::ChecksumType;
use bytes::Bytes;
use futures_util::StreamExt as _;
use lfs_broker_client::checksum::{Algorithm, Sha256};

use super::{
    Case, Holder, OK, assert_outcome, base64, expected, get, head, holder, md5_hex, minutes, outcome, put, signed_since,
};
use crate::stores::{Flavour, Place, Store};

const BODY: &[u8] = b"the bytes that were promised";

#[tokio::test]
async fn a_put_with_everything_signed_is_stored_with_its_checksum() {
    let store = Store::for_tests().await;
    let request = put(&store, "key", BODY).content_disposition("attachment; filename=\"a.txt\"");
    let answer = holder(request).await.send(BODY).await;
    assert_eq!(answer.outcome(), (200, String::new()));
    let etag = format!("\"{}\"", md5_hex(BODY));
    assert_eq!(answer.header("etag"), Some(etag.as_str()));
    let found = head(&store, "key").await.unwrap();
    assert_eq!(found.content_length, Some(BODY.len() as i64));
    assert_eq!(found.checksum_sha256, Some(Sha256::of(BODY).base64()));
    assert_eq!(found.checksum_type, Some(ChecksumType::FullObject));
    assert_eq!(found.e_tag, Some(etag));
    assert_eq!(found.content_type.as_deref(), Some("text/plain"));
    assert_eq!(found.content_disposition.as_deref(), Some("attachment; filename=\"a.txt\""));
    assert_eq!(found.metadata.unwrap()["lfs-upload-id"], "write-token");
    assert!(found.version_id.is_none_or(|version| version == "null"));
    assert_eq!(get(&store, "key").await, BODY);
}

#[tokio::test]
async fn everything_that_is_set_is_signed_as_a_header() {
    let store = Store::for_tests().await;
    let presigned = put(&store, "key", BODY).presigned(minutes(10)).await.unwrap();
    let (_, query) = presigned.uri().split_once('?').unwrap();
    let signed = query.split('&').find_map(|pair| pair.strip_prefix("X-Amz-SignedHeaders=")).unwrap();
    let wanted = "content-length;content-type;host;if-none-match;x-amz-checksum-sha256;x-amz-meta-lfs-upload-id";
    assert_eq!(signed.replace("%3B", ";"), wanted);
    let names: Vec<_> = query.split('&').filter_map(|pair| pair.split('=').next()).collect();
    assert!(!names.iter().any(|name| name.to_lowercase().contains("checksum")), "{query}");
}

#[tokio::test]
async fn a_body_of_another_size_than_signed_is_refused() {
    let store = Store::for_tests().await;
    let longer = [BODY, b" and more"].concat();
    let request = store.client.put_object().bucket(&store.bucket).key("key").content_length(BODY.len() as i64);
    // The holder says truly how much it sends, which is not what was signed.
    let answer = holder(request).await.without("content-length").send(longer).await;
    assert_eq!(answer.outcome(), (403, "SignatureDoesNotMatch".to_owned()));
    assert!(head(&store, "key").await.is_none());
}

#[tokio::test]
async fn a_url_without_a_signed_length_takes_any_size() {
    let store = Store::for_tests().await;
    let request = store.client.put_object().bucket(&store.bucket).key("key");
    assert_eq!(holder(request).await.send(BODY).await.status, 200);
    assert_eq!(get(&store, "key").await, BODY);
}

#[tokio::test]
async fn a_body_of_unknown_length_is_refused() {
    let store = Store::for_tests().await;
    let request = store.client.put_object().bucket(&store.bucket).key("key");
    let pieces = futures_util::stream::iter([Ok::<_, std::io::Error>(Bytes::from_static(BODY))]);
    let answer = holder(request).await.send(reqwest::Body::wrap_stream(pieces)).await;
    assert_outcome(&store, Case::UnknownLength, answer.outcome());
    assert!(head(&store, "key").await.is_none());
}

#[tokio::test]
async fn bytes_that_are_not_what_their_checksum_says_are_refused_and_not_stored() {
    let store = Store::for_tests().await;
    let other = b"the bytes that weren't there";
    assert_eq!(other.len(), BODY.len());
    let request = || store.client.put_object().bucket(&store.bucket).key("key");
    let requests = [
        request().checksum_sha256(Sha256::of(BODY).base64()),
        request().checksum_crc32(base64(Algorithm::Crc32, BODY)),
        request().checksum_crc32_c(base64(Algorithm::Crc32c, BODY)),
        request().checksum_crc64_nvme(base64(Algorithm::Crc64nvme, BODY)),
    ];
    for request in requests {
        let answer = holder(request).await.send(other.as_slice()).await;
        assert_outcome(&store, Case::WrongChecksum, answer.outcome());
        assert!(head(&store, "key").await.is_none());
    }
    let answer = holder(request().content_md5(base64(Algorithm::Md5, BODY))).await.send(other.as_slice()).await;
    assert_eq!(answer.outcome(), (400, "BadDigest".to_owned()));
    assert!(head(&store, "key").await.is_none());
}

#[tokio::test]
async fn bytes_that_are_what_their_checksum_says_are_stored_with_it() {
    let store = Store::for_tests().await;
    let request = |key: &str| store.client.put_object().bucket(&store.bucket).key(key);
    let (crc32, crc32c) = (base64(Algorithm::Crc32, BODY), base64(Algorithm::Crc32c, BODY));
    let crc64nvme = base64(Algorithm::Crc64nvme, BODY);
    let requests = [
        request("crc32").checksum_crc32(&crc32),
        request("crc32c").checksum_crc32_c(&crc32c),
        request("crc64nvme").checksum_crc64_nvme(&crc64nvme),
        request("md5").content_md5(base64(Algorithm::Md5, BODY)),
    ];
    for request in requests {
        assert_eq!(holder(request).await.send(BODY).await.status, 200);
    }
    assert_eq!(head(&store, "crc32").await.unwrap().checksum_crc32, Some(crc32));
    assert_eq!(head(&store, "crc32c").await.unwrap().checksum_crc32_c, Some(crc32c));
    let found = head(&store, "crc64nvme").await.unwrap();
    assert_eq!(found.checksum_crc64_nvme, Some(crc64nvme));
    assert_eq!(found.checksum_type, Some(ChecksumType::FullObject));
    assert_eq!(head(&store, "md5").await.unwrap().e_tag, Some(format!("\"{}\"", md5_hex(BODY))));
}

#[tokio::test]
async fn a_checksum_in_the_query_protects_nothing() {
    let store = Store::for_tests().await;
    let request = store.client.put_object().bucket(&store.bucket).key("key").customize().mutate_request(|request| {
        let sum = Sha256::of(b"something else").base64().replace('+', "%2B").replace('/', "%2F").replace('=', "%3D");
        let uri = format!("{}&x-amz-checksum-sha256={sum}", request.uri());
        request.set_uri(uri).unwrap();
    });
    let presigned = request.presigned(minutes(10)).await.unwrap();
    assert!(presigned.uri().contains("x-amz-checksum-sha256"));
    assert_eq!(Holder::of(&presigned).send(BODY).await.outcome(), (200, String::new()));
    assert_eq!(get(&store, "key").await, BODY);
}

#[tokio::test]
async fn a_second_put_under_if_none_match_is_refused() {
    let store = Store::for_tests().await;
    assert_eq!(holder(put(&store, "key", BODY)).await.send(BODY).await.status, 200);
    let later = holder(put(&store, "key", b"later")).await.send(b"later".as_slice()).await;
    assert_eq!(later.outcome(), (412, "PreconditionFailed".to_owned()));
    assert_eq!(get(&store, "key").await, BODY);
}

#[tokio::test]
async fn of_racing_puts_under_if_none_match_exactly_one_wins() {
    let store = Store::for_tests().await;
    let mut holders = Vec::new();
    for racer in 0..8_u8 {
        holders.push((holder(put(&store, "key", &[racer; 1000])).await, racer));
    }
    let race = holders.into_iter().map(|(holder, racer)| async move { (holder.send(vec![racer; 1000]).await, racer) });
    let answers: Vec<_> = futures_util::stream::iter(race).buffer_unordered(8).collect().await;
    let winners: Vec<u8> = answers.iter().filter(|(answer, _)| answer.status == 200).map(|(_, racer)| *racer).collect();
    assert_eq!(winners.len(), 1, "{answers:?}");
    // A loser is told to give up or to try again; nothing else.
    assert!(answers.iter().all(|(answer, _)| [200, 409, 412].contains(&answer.status)), "{answers:?}");
    assert_eq!(get(&store, "key").await, [winners[0]; 1000]);
}

#[tokio::test]
async fn a_copy_source_that_was_not_signed_is_refused() {
    let store = Store::for_tests().await;
    assert_eq!(holder(put(&store, "secret", BODY)).await.send(BODY).await.status, 200);
    let request = store.client.put_object().bucket(&store.bucket).key("copy");
    let source = format!("{}/secret", store.bucket);
    let answer = holder(request).await.with("x-amz-copy-source", &source).send("").await;
    assert_outcome(&store, Case::UnsignedCopySource, answer.outcome());
    assert_eq!(head(&store, "copy").await.is_some(), expected(store.place.flavour, Case::UnsignedCopySource) == OK);
}

#[tokio::test]
async fn metadata_that_was_not_signed_is_refused() {
    let store = Store::for_tests().await;
    let request = store.client.put_object().bucket(&store.bucket).key("key");
    let answer = holder(request).await.with("x-amz-meta-lfs-upload-id", "forged").send(BODY).await;
    assert_outcome(&store, Case::UnsignedHeader, answer.outcome());
    assert!(head(&store, "key").await.is_none());
}

#[tokio::test]
async fn a_signed_header_that_is_left_out_or_changed_is_refused() {
    let store = Store::for_tests().await;
    let forged = Sha256::of(b"forged").base64();
    let changes = [
        ("if-none-match", "\"other\""),
        ("content-type", "text/html"),
        ("x-amz-meta-lfs-upload-id", "forged"),
        ("x-amz-checksum-sha256", forged.as_str()),
    ];
    for (name, value) in changes {
        let without = holder(put(&store, "key", BODY)).await.without(name).send(BODY).await;
        assert_outcome(&store, Case::HeaderLeftOut, without.outcome());
        let changed = holder(put(&store, "key", BODY)).await.with(name, value).send(BODY).await;
        assert_eq!(changed.outcome(), (403, "SignatureDoesNotMatch".to_owned()), "{name}");
    }
    assert!(head(&store, "key").await.is_none());
}

#[tokio::test]
async fn a_url_is_refused_after_its_end() {
    let store = Store::for_tests().await;
    let ended = signed_since(Duration::from_secs(61), Duration::from_secs(60));
    let presigned = put(&store, "key", BODY).presigned(ended).await.unwrap();
    assert_eq!(Holder::of(&presigned).send(BODY).await.outcome(), (403, "AccessDenied".to_owned()));
    assert!(head(&store, "key").await.is_none());
}

#[tokio::test]
async fn a_put_may_end_after_its_url_did() {
    let store = Store::for_tests().await;
    let life = Duration::from_secs(60);
    let started = SystemTime::now() - life + Duration::from_secs(3);
    let config = aws_sdk_s3::presigning::PresigningConfig::builder().start_time(started).expires_in(life).build().unwrap();
    let presigned = put(&store, "key", BODY).presigned(config).await.unwrap();
    // The first half goes at once, the second when the URL has ended: its times are whole seconds.
    let (first, second) = BODY.split_at(10);
    let ended = async move {
        while SystemTime::now() < started + life + Duration::from_secs(1) {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Ok::<_, std::io::Error>(Bytes::from_static(second))
    };
    let pieces = futures_util::stream::iter([Ok(Bytes::from_static(first))]).chain(futures_util::stream::once(ended));
    let answer = Holder::of(&presigned).send(reqwest::Body::wrap_stream(pieces)).await;
    assert_outcome(&store, Case::EndsAfterTheUrl, answer.outcome());
    assert_eq!(head(&store, "key").await.is_some(), expected(store.place.flavour, Case::EndsAfterTheUrl) == OK);
}

#[tokio::test]
async fn a_url_that_lives_for_more_than_a_week_is_refused() {
    let store = Store::for_tests().await;
    let mut long = holder(put(&store, "key", BODY)).await;
    long.url = long.url.replace("X-Amz-Expires=600", "X-Amz-Expires=604801");
    assert_outcome(&store, Case::LifeOverAWeek, long.send(BODY).await.outcome());
}

#[tokio::test]
async fn a_request_without_a_valid_signature_is_refused() {
    let store = Store::for_tests().await;
    let mut unsigned = holder(put(&store, "key", BODY)).await;
    unsigned.url.truncate(unsigned.url.find('?').unwrap());
    assert_eq!(unsigned.send(BODY).await.outcome(), (403, "AccessDenied".to_owned()));
    let forger = store.place.client("not the secret");
    let listed = forger.list_objects_v2().bucket(&store.bucket).send().await;
    assert_eq!(outcome(&listed), (403, "SignatureDoesNotMatch".to_owned()));
    let place = Place { access_key_id: "nobody".to_owned(), ..store.place.clone() };
    let listed = place.client("any secret").list_objects_v2().bucket(&store.bucket).send().await;
    assert_outcome(&store, Case::UnknownCredential, outcome(&listed));
    assert!(head(&store, "key").await.is_none());
}

#[tokio::test]
async fn a_body_that_ends_early_is_not_stored() {
    let store = Store::for_tests().await;
    let presigned = put(&store, "key", BODY).presigned(minutes(10)).await.unwrap();
    let torn = [Ok(Bytes::from_static(&BODY[..10])), Err(std::io::Error::other("the client dies"))];
    let body = reqwest::Body::wrap_stream(futures_util::stream::iter(torn));
    let mut request = reqwest::Client::new().put(presigned.uri()).body(body);
    for (name, value) in presigned.headers() {
        request = request.header(name, value);
    }
    assert!(request.send().await.is_err());
    assert!(head(&store, "key").await.is_none());
}

#[tokio::test]
async fn a_signed_get_says_how_the_bytes_are_to_be_saved() {
    let store = Store::for_tests().await;
    assert_eq!(holder(put(&store, "key", BODY)).await.send(BODY).await.status, 200);
    let request = store.client.get_object().bucket(&store.bucket).key("key").response_content_type("text/csv");
    let request = request.response_content_disposition("attachment; filename=\"b.csv\"");
    let presigned = request.presigned(minutes(10)).await.unwrap();
    let answer = Holder::of(&presigned).send("").await;
    assert_eq!((answer.status, answer.body.as_slice()), (200, BODY));
    assert_eq!(answer.header("content-disposition"), Some("attachment; filename=\"b.csv\""));
    assert_eq!(answer.header("content-type"), Some("text/csv"));
    let ranged = Holder::of(&presigned).with("range", "bytes=4-8").send("").await;
    assert_eq!((ranged.status, ranged.body.as_slice()), (206, b"bytes".as_slice()));
    let changed = Holder { url: presigned.uri().replace("b.csv", "c.exe"), ..Holder::of(&presigned) };
    assert_eq!(changed.send("").await.status, 403);
}

#[tokio::test]
async fn the_store_at_hand_is_the_one_that_was_asked_for() {
    let asked = std::env::var("LFS_TEST_S3_FLAVOUR").unwrap_or_else(|_| "embedded".to_owned());
    let found = match Place::for_tests().flavour {
        Flavour::Embedded => "embedded",
        Flavour::Minio => "minio",
        Flavour::Versitygw => "versitygw",
    };
    assert_eq!(found, asked);
}
