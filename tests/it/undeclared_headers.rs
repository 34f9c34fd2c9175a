//! Unsigned headers that a client adds to a presigned PUT.

use reqwest::RequestBuilder;
use serde_json::{Value, json};

use crate::harness::servers::servers;
use crate::harness::uploads::PART_BYTES;
use crate::harness::{ApiResponse, TestBroker, bytes};
use crate::s3_faults::{start_broker_on, start_faulty_s3};
use crate::s3_server::Flavour;

/// A PUT with the signed headers and one more.
fn put_request_with(broker: &TestBroker, request: &Value, content: &[u8], (name, value): (&str, &str)) -> RequestBuilder {
    let mut put = broker.http.put(request["url"].as_str().unwrap()).body(content.to_vec()).header(name, value);
    for (name, value) in request["headers"].as_object().unwrap().iter().filter(|(name, _)| *name != "content-length") {
        put = put.header(name, value.as_str().unwrap());
    }
    put
}

async fn put_with(broker: &TestBroker, request: &Value, content: &[u8], header: (&str, &str)) -> ApiResponse {
    broker.send(put_request_with(broker, request, content, header)).await
}

#[tokio::test]
async fn an_object_that_was_stored_with_an_undeclared_header_is_rejected() {
    let broker = TestBroker::start().await;
    let headers = [
        ("content-encoding", "gzip"),
        ("content-language", "de"),
        ("content-disposition", "inline"),
        ("cache-control", "public, max-age=31536000"),
        ("expires", "Thu, 01 Dec 2044 16:00:00 GMT"),
        ("x-amz-tagging", "team=other"),
        ("x-amz-storage-class", "REDUCED_REDUNDANCY"),
        ("x-amz-meta-extra", "x"),
        ("x-amz-website-redirect-location", "https://example.org/"),
        ("x-amz-object-lock-legal-hold", "ON"),
    ];
    let mut refused = Vec::new();
    for (name, value) in headers {
        let opened = broker.open(b"hello", json!({})).await.expect(201);
        let put = put_with(&broker, &opened.json["upload"], b"hello", (name, value)).await;
        if put.status != 200 {
            // The store refuses an unsigned header; a PUT with the signed headers only still works.
            broker.put(&opened.json["upload"], b"hello").await.expect(200);
            broker.complete(&opened.id()).await.expect(200);
            continue;
        }
        let response = broker.complete(&opened.id()).await;
        if response.status == 200 {
            // The store accepted the PUT and ignored the header.
            let key = opened.json["object_key"].as_str().unwrap();
            let head = broker.s3.head_object().bucket(&broker.bucket).key(key).send().await.unwrap();
            assert_eq!((head.tag_count(), head.content_encoding()), (None, None), "{name}");
            continue;
        }
        let response = response.expect_problem(422, "object-foreign");
        let detail = response.json["detail"].as_str().unwrap();
        assert!(detail.contains(name) && detail.contains("did not declare"), "{detail}");
        assert_eq!(
            broker.complete(&opened.id()).await.expect(422).json["detail"],
            detail,
            "a repeated complete gets the same response"
        );
        refused.push(name);
    }
    // No store of the tests refuses these headers in a PUT.
    for always in ["content-encoding", "content-language", "content-disposition", "cache-control"] {
        assert!(refused.contains(&always), "{always} was not refused: {refused:?}");
    }
    if servers().s3.flavour == Flavour::Minio {
        assert!(refused.contains(&"x-amz-tagging") && refused.contains(&"x-amz-storage-class"), "{refused:?}");
    }
}

#[tokio::test]
async fn headers_that_browsers_add_by_themselves_are_accepted() {
    let broker = TestBroker::start().await;
    for header in [("cache-control", "no-cache"), ("cache-control", "max-age=0, no-store"), ("content-encoding", "identity")] {
        let opened = broker.open(b"hello", json!({})).await.expect(201);
        put_with(&broker, &opened.json["upload"], b"hello", header).await.expect(200);
        broker.complete(&opened.id()).await.expect(200);
    }
}

#[tokio::test]
async fn headers_that_a_bucket_sets_on_every_object_are_accepted() {
    let s3 = start_faulty_s3().await;
    let broker = start_broker_on(&s3).await;
    // The bucket's defaults change twice while the broker runs.
    s3.show_head_headers(&[("x-amz-server-side-encryption", "AES256"), ("x-amz-storage-class", "EXPRESS_ONEZONE")]);
    broker.publish(b"one", json!({})).await;
    s3.show_head_headers(&[("x-amz-server-side-encryption", "aws:kms"), ("x-amz-server-side-encryption-aws-kms-key-id", "k")]);
    broker.publish(b"two", json!({})).await;
    // A header that no bucket sets is rejected at once.
    s3.show_head_headers(&[("x-amz-tagging-count", "1")]);
    let opened = broker.open_and_put(b"three", json!({})).await;
    broker.complete(&opened.id()).await.expect_problem(422, "object-foreign");
}

#[tokio::test]
async fn a_content_encoding_that_another_writer_set_is_not_shown_when_a_pointer_resolves() {
    let broker = TestBroker::start().await;
    broker.publish(b"hello", json!({})).await;
    let record = broker.records(&broker.topic).await.remove(0);
    let pointer: Value = serde_json::from_slice(&record.value).unwrap();
    let key = pointer["key"].as_str().unwrap();
    let put = broker.s3.put_object().bucket(&broker.bucket).key(key).body(b"hello".to_vec().into()).content_encoding("gzip");
    put.send().await.unwrap();
    let resolved = broker.resolve(&record.value, "").await.expect(200);
    let got = broker.http.get(resolved.json["url"].as_str().unwrap()).send().await.unwrap();
    assert_eq!(got.status(), 200);
    let encoding = got.headers().get("content-encoding").map(|value| value.to_str().unwrap().to_owned());
    assert_eq!(encoding.as_deref(), Some("identity"));
    assert_eq!(got.bytes().await.unwrap().as_ref(), b"hello");
}

#[tokio::test]
async fn a_part_cannot_give_its_object_an_undeclared_header() {
    let broker = TestBroker::start().await;
    let content = bytes(PART_BYTES + 9, 1);
    for header in [("content-encoding", "gzip"), ("x-amz-tagging", "a=b")] {
        let opened = broker.open_multipart_with_hashes(&content, json!({})).await.expect(201);
        for part in opened.json["parts"].as_array().unwrap() {
            let (from, size) = (part["offset"].as_u64().unwrap() as usize, part["size"].as_u64().unwrap() as usize);
            // A store that refuses the request may close the connection before it has read the whole part.
            let put = put_request_with(&broker, part, &content[from..from + size], header).send().await;
            if !put.is_ok_and(|response| response.status() == 200) {
                broker.put(part, &content[from..from + size]).await.expect(200);
            }
        }
        broker.complete_with_retries(&opened.id()).await;
        let key = opened.json["object_key"].as_str().unwrap();
        let head = broker.s3.head_object().bucket(&broker.bucket).key(key).send().await.unwrap();
        assert_eq!((head.content_encoding(), head.tag_count()), (None, None), "{header:?}");
    }
}
