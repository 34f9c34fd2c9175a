//! URLs that the broker presigns and a client uses.

use std::time::{Duration, SystemTime};

use aws_sdk_s3::types::ChecksumType;
use bytes::Bytes;
use futures_util::StreamExt as _;
use lfs_broker_client::checksum::{Algorithm, Sha256};

use super::{
    Case, OK, PresignedCall, assert_outcome, base64, expected, get, head, md5_hex, minutes, outcome, presign, presigned_since,
    put,
};
use crate::s3_server::{Flavour, S3Server, TestBucket};

const BODY: &[u8] = b"the bytes that were declared";

#[tokio::test]
async fn a_put_with_every_header_signed_is_stored_with_its_checksum() {
    let s3 = TestBucket::for_tests().await;
    let request = put(&s3, "key", BODY).content_disposition("attachment; filename=\"a.txt\"");
    let response = presign(request).await.send(BODY).await;
    assert_eq!(response.outcome(), (200, String::new()));
    let etag = format!("\"{}\"", md5_hex(BODY));
    assert_eq!(response.header("etag"), Some(etag.as_str()));
    let found = head(&s3, "key").await.unwrap();
    assert_eq!(found.content_length, Some(BODY.len() as i64));
    assert_eq!(found.checksum_sha256, Some(Sha256::of(BODY).base64()));
    assert_eq!(found.checksum_type, Some(ChecksumType::FullObject));
    assert_eq!(found.e_tag, Some(etag));
    assert_eq!(found.content_type.as_deref(), Some("text/plain"));
    assert_eq!(found.content_disposition.as_deref(), Some("attachment; filename=\"a.txt\""));
    assert_eq!(found.metadata.unwrap()["lfs-upload-id"], "write-token");
    assert!(found.version_id.is_none_or(|version| version == "null"));
    assert_eq!(get(&s3, "key").await, BODY);
}

#[tokio::test]
async fn every_set_value_is_signed_as_a_header() {
    let s3 = TestBucket::for_tests().await;
    let presigned = put(&s3, "key", BODY).presigned(minutes(10)).await.unwrap();
    let (_, query) = presigned.uri().split_once('?').unwrap();
    let signed = query.split('&').find_map(|pair| pair.strip_prefix("X-Amz-SignedHeaders=")).unwrap();
    let expected_headers = "content-length;content-type;host;if-none-match;x-amz-checksum-sha256;x-amz-meta-lfs-upload-id";
    assert_eq!(signed.replace("%3B", ";"), expected_headers);
    let names: Vec<_> = query.split('&').filter_map(|pair| pair.split('=').next()).collect();
    assert!(!names.iter().any(|name| name.to_lowercase().contains("checksum")), "{query}");
}

#[tokio::test]
async fn a_body_of_another_size_than_signed_is_refused() {
    let s3 = TestBucket::for_tests().await;
    let longer = [BODY, b" and more"].concat();
    let request = s3.client.put_object().bucket(&s3.bucket).key("key").content_length(BODY.len() as i64);
    // The client sends a true content-length, which is not the signed one.
    let response = presign(request).await.without("content-length").send(longer).await;
    assert_eq!(response.outcome(), (403, "SignatureDoesNotMatch".to_owned()));
    assert!(head(&s3, "key").await.is_none());
}

#[tokio::test]
async fn a_url_without_a_signed_length_takes_any_size() {
    let s3 = TestBucket::for_tests().await;
    let request = s3.client.put_object().bucket(&s3.bucket).key("key");
    assert_eq!(presign(request).await.send(BODY).await.status, 200);
    assert_eq!(get(&s3, "key").await, BODY);
}

#[tokio::test]
async fn a_body_of_unknown_length_is_refused() {
    let s3 = TestBucket::for_tests().await;
    let request = s3.client.put_object().bucket(&s3.bucket).key("key");
    let chunks = futures_util::stream::iter([Ok::<_, std::io::Error>(Bytes::from_static(BODY))]);
    let response = presign(request).await.send(reqwest::Body::wrap_stream(chunks)).await;
    assert_outcome(&s3, Case::UnknownLength, response.outcome());
    assert!(head(&s3, "key").await.is_none());
}

#[tokio::test]
async fn bytes_that_do_not_match_their_checksum_are_refused_and_not_stored() {
    let s3 = TestBucket::for_tests().await;
    let other = b"the bytes that weren't there";
    assert_eq!(other.len(), BODY.len());
    let request = || s3.client.put_object().bucket(&s3.bucket).key("key");
    let requests = [
        request().checksum_sha256(Sha256::of(BODY).base64()),
        request().checksum_crc32(base64(Algorithm::Crc32, BODY)),
        request().checksum_crc32_c(base64(Algorithm::Crc32c, BODY)),
        request().checksum_crc64_nvme(base64(Algorithm::Crc64nvme, BODY)),
    ];
    for request in requests {
        let response = presign(request).await.send(other.as_slice()).await;
        assert_outcome(&s3, Case::WrongChecksum, response.outcome());
        assert!(head(&s3, "key").await.is_none());
    }
    let response = presign(request().content_md5(base64(Algorithm::Md5, BODY))).await.send(other.as_slice()).await;
    assert_eq!(response.outcome(), (400, "BadDigest".to_owned()));
    assert!(head(&s3, "key").await.is_none());
}

#[tokio::test]
async fn bytes_that_match_their_checksum_are_stored_with_it() {
    let s3 = TestBucket::for_tests().await;
    let request = |key: &str| s3.client.put_object().bucket(&s3.bucket).key(key);
    let (crc32, crc32c) = (base64(Algorithm::Crc32, BODY), base64(Algorithm::Crc32c, BODY));
    let crc64nvme = base64(Algorithm::Crc64nvme, BODY);
    let requests = [
        request("crc32").checksum_crc32(&crc32),
        request("crc32c").checksum_crc32_c(&crc32c),
        request("crc64nvme").checksum_crc64_nvme(&crc64nvme),
        request("md5").content_md5(base64(Algorithm::Md5, BODY)),
    ];
    for request in requests {
        assert_eq!(presign(request).await.send(BODY).await.status, 200);
    }
    assert_eq!(head(&s3, "crc32").await.unwrap().checksum_crc32, Some(crc32));
    assert_eq!(head(&s3, "crc32c").await.unwrap().checksum_crc32_c, Some(crc32c));
    let found = head(&s3, "crc64nvme").await.unwrap();
    assert_eq!(found.checksum_crc64_nvme, Some(crc64nvme));
    assert_eq!(found.checksum_type, Some(ChecksumType::FullObject));
    assert_eq!(head(&s3, "md5").await.unwrap().e_tag, Some(format!("\"{}\"", md5_hex(BODY))));
}

#[tokio::test]
async fn a_checksum_in_the_query_is_not_checked() {
    let s3 = TestBucket::for_tests().await;
    let request = s3.client.put_object().bucket(&s3.bucket).key("key").customize().mutate_request(|request| {
        let sum = Sha256::of(b"something else").base64().replace('+', "%2B").replace('/', "%2F").replace('=', "%3D");
        let uri = format!("{}&x-amz-checksum-sha256={sum}", request.uri());
        request.set_uri(uri).unwrap();
    });
    let presigned = request.presigned(minutes(10)).await.unwrap();
    assert!(presigned.uri().contains("x-amz-checksum-sha256"));
    assert_eq!(PresignedCall::of(&presigned).send(BODY).await.outcome(), (200, String::new()));
    assert_eq!(get(&s3, "key").await, BODY);
}

#[tokio::test]
async fn a_second_put_with_if_none_match_is_refused() {
    let s3 = TestBucket::for_tests().await;
    assert_eq!(presign(put(&s3, "key", BODY)).await.send(BODY).await.status, 200);
    let later = presign(put(&s3, "key", b"later")).await.send(b"later".as_slice()).await;
    assert_eq!(later.outcome(), (412, "PreconditionFailed".to_owned()));
    assert_eq!(get(&s3, "key").await, BODY);
}

#[tokio::test]
async fn exactly_one_of_several_concurrent_puts_with_if_none_match_succeeds() {
    let s3 = TestBucket::for_tests().await;
    let mut calls = Vec::new();
    for writer in 0..8_u8 {
        calls.push((presign(put(&s3, "key", &[writer; 1000])).await, writer));
    }
    let race = calls.into_iter().map(|(call, writer)| async move { (call.send(vec![writer; 1000]).await, writer) });
    let responses: Vec<_> = futures_util::stream::iter(race).buffer_unordered(8).collect().await;
    let winners: Vec<u8> = responses.iter().filter(|(response, _)| response.status == 200).map(|(_, writer)| *writer).collect();
    assert_eq!(winners.len(), 1, "{responses:?}");
    // Each other PUT gets 412 or 409, and nothing else.
    assert!(responses.iter().all(|(response, _)| [200, 409, 412].contains(&response.status)), "{responses:?}");
    assert_eq!(get(&s3, "key").await, [winners[0]; 1000]);
}

#[tokio::test]
async fn an_unsigned_copy_source_is_refused() {
    let s3 = TestBucket::for_tests().await;
    assert_eq!(presign(put(&s3, "secret", BODY)).await.send(BODY).await.status, 200);
    let request = s3.client.put_object().bucket(&s3.bucket).key("copy");
    let source = format!("{}/secret", s3.bucket);
    let response = presign(request).await.with("x-amz-copy-source", &source).send("").await;
    assert_outcome(&s3, Case::UnsignedCopySource, response.outcome());
    assert_eq!(head(&s3, "copy").await.is_some(), expected(s3.server.flavour, Case::UnsignedCopySource) == OK);
}

#[tokio::test]
async fn unsigned_metadata_is_refused() {
    let s3 = TestBucket::for_tests().await;
    let request = s3.client.put_object().bucket(&s3.bucket).key("key");
    let response = presign(request).await.with("x-amz-meta-lfs-upload-id", "forged").send(BODY).await;
    assert_outcome(&s3, Case::UnsignedHeader, response.outcome());
    assert!(head(&s3, "key").await.is_none());
}

#[tokio::test]
async fn a_signed_header_that_is_missing_or_changed_is_refused() {
    let s3 = TestBucket::for_tests().await;
    let forged = Sha256::of(b"forged").base64();
    let changes = [
        ("if-none-match", "\"other\""),
        ("content-type", "text/html"),
        ("x-amz-meta-lfs-upload-id", "forged"),
        ("x-amz-checksum-sha256", forged.as_str()),
    ];
    for (name, value) in changes {
        let without = presign(put(&s3, "key", BODY)).await.without(name).send(BODY).await;
        assert_outcome(&s3, Case::SignedHeaderMissing, without.outcome());
        let changed = presign(put(&s3, "key", BODY)).await.with(name, value).send(BODY).await;
        assert_eq!(changed.outcome(), (403, "SignatureDoesNotMatch".to_owned()), "{name}");
    }
    assert!(head(&s3, "key").await.is_none());
}

#[tokio::test]
async fn an_expired_url_is_refused() {
    let s3 = TestBucket::for_tests().await;
    let ended = presigned_since(Duration::from_secs(61), Duration::from_secs(60));
    let presigned = put(&s3, "key", BODY).presigned(ended).await.unwrap();
    assert_eq!(PresignedCall::of(&presigned).send(BODY).await.outcome(), (403, "AccessDenied".to_owned()));
    assert!(head(&s3, "key").await.is_none());
}

#[tokio::test]
async fn a_put_may_end_after_its_url_has_expired() {
    let s3 = TestBucket::for_tests().await;
    let life = Duration::from_secs(60);
    let started = SystemTime::now() - life + Duration::from_secs(3);
    let config = aws_sdk_s3::presigning::PresigningConfig::builder().start_time(started).expires_in(life).build().unwrap();
    let presigned = put(&s3, "key", BODY).presigned(config).await.unwrap();
    // The first half is sent at once, the second after the URL has expired. Its times are whole seconds.
    let (first, second) = BODY.split_at(10);
    let ended = async move {
        while SystemTime::now() < started + life + Duration::from_secs(1) {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Ok::<_, std::io::Error>(Bytes::from_static(second))
    };
    let chunks = futures_util::stream::iter([Ok(Bytes::from_static(first))]).chain(futures_util::stream::once(ended));
    let response = PresignedCall::of(&presigned).send(reqwest::Body::wrap_stream(chunks)).await;
    assert_outcome(&s3, Case::EndsAfterUrlExpiry, response.outcome());
    assert_eq!(head(&s3, "key").await.is_some(), expected(s3.server.flavour, Case::EndsAfterUrlExpiry) == OK);
}

#[tokio::test]
async fn a_url_with_a_lifetime_of_more_than_a_week_is_refused() {
    let s3 = TestBucket::for_tests().await;
    let mut long = presign(put(&s3, "key", BODY)).await;
    long.url = long.url.replace("X-Amz-Expires=600", "X-Amz-Expires=604801");
    assert_outcome(&s3, Case::LifetimeOverOneWeek, long.send(BODY).await.outcome());
}

#[tokio::test]
async fn a_request_without_a_valid_signature_is_refused() {
    let s3 = TestBucket::for_tests().await;
    let mut unsigned = presign(put(&s3, "key", BODY)).await;
    unsigned.url.truncate(unsigned.url.find('?').unwrap());
    assert_eq!(unsigned.send(BODY).await.outcome(), (403, "AccessDenied".to_owned()));
    let forger = s3.server.client("not the secret");
    let listed = forger.list_objects_v2().bucket(&s3.bucket).send().await;
    assert_eq!(outcome(&listed), (403, "SignatureDoesNotMatch".to_owned()));
    let server = S3Server { access_key_id: "nobody".to_owned(), ..s3.server.clone() };
    let listed = server.client("any secret").list_objects_v2().bucket(&s3.bucket).send().await;
    assert_outcome(&s3, Case::UnknownCredential, outcome(&listed));
    assert!(head(&s3, "key").await.is_none());
}

#[tokio::test]
async fn a_body_that_ends_early_is_not_stored() {
    let s3 = TestBucket::for_tests().await;
    let presigned = put(&s3, "key", BODY).presigned(minutes(10)).await.unwrap();
    let broken = [Ok(Bytes::from_static(&BODY[..10])), Err(std::io::Error::other("the client dies"))];
    let body = reqwest::Body::wrap_stream(futures_util::stream::iter(broken));
    let mut request = reqwest::Client::new().put(presigned.uri()).body(body);
    for (name, value) in presigned.headers() {
        request = request.header(name, value);
    }
    assert!(request.send().await.is_err());
    assert!(head(&s3, "key").await.is_none());
}

#[tokio::test]
async fn a_presigned_get_sets_content_type_and_disposition() {
    let s3 = TestBucket::for_tests().await;
    assert_eq!(presign(put(&s3, "key", BODY)).await.send(BODY).await.status, 200);
    let request = s3.client.get_object().bucket(&s3.bucket).key("key").response_content_type("text/csv");
    let request = request.response_content_disposition("attachment; filename=\"b.csv\"");
    let presigned = request.presigned(minutes(10)).await.unwrap();
    let response = PresignedCall::of(&presigned).send("").await;
    assert_eq!((response.status, response.body.as_slice()), (200, BODY));
    assert_eq!(response.header("content-disposition"), Some("attachment; filename=\"b.csv\""));
    assert_eq!(response.header("content-type"), Some("text/csv"));
    let ranged = PresignedCall::of(&presigned).with("range", "bytes=4-8").send("").await;
    assert_eq!((ranged.status, ranged.body.as_slice()), (206, b"bytes".as_slice()));
    let changed = PresignedCall { url: presigned.uri().replace("b.csv", "c.exe"), ..PresignedCall::of(&presigned) };
    assert_eq!(changed.send("").await.status, 403);
}

#[tokio::test]
async fn the_tests_use_the_store_that_the_environment_names() {
    let asked = std::env::var("LFS_TEST_S3_FLAVOUR").unwrap_or_else(|_| "embedded".to_owned());
    let found = match S3Server::for_tests().flavour {
        Flavour::Embedded => "embedded",
        Flavour::Minio => "minio",
        Flavour::Versitygw => "versitygw",
    };
    assert_eq!(found, asked);
}
