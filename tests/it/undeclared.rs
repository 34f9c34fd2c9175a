//! Headers that were not signed, added to a PUT by whoever holds its URL.

use reqwest::RequestBuilder;
use serde_json::{Value, json};

use crate::faults::{faulty, house_on};
use crate::harness::servers::servers;
use crate::harness::uploads::PART;
use crate::harness::{Answer, House, bytes};
use crate::stores::Flavour;

/// What was signed, and one header more.
fn with(house: &House, request: &Value, content: &[u8], (name, value): (&str, &str)) -> RequestBuilder {
    let mut put = house.http.put(request["url"].as_str().unwrap()).body(content.to_vec()).header(name, value);
    for (name, value) in request["headers"].as_object().unwrap().iter().filter(|(name, _)| *name != "content-length") {
        put = put.header(name, value.as_str().unwrap());
    }
    put
}

async fn put_with(house: &House, request: &Value, content: &[u8], header: (&str, &str)) -> Answer {
    house.send(with(house, request, content, header)).await
}

#[tokio::test]
async fn an_object_stored_with_a_header_that_nobody_declared_is_refused() {
    let house = House::new().await;
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
        let opened = house.open(b"hello", json!({})).await.expect(201);
        let put = put_with(&house, &opened.json["upload"], b"hello", (name, value)).await;
        if put.status != 200 {
            // The store holds the PUT to what was signed: the honest one still works.
            house.put(&opened.json["upload"], b"hello").await.expect(200);
            house.complete(&opened.id()).await.expect(200);
            continue;
        }
        let answer = house.complete(&opened.id()).await;
        if answer.status == 200 {
            // The store took the PUT and dropped the header.
            let key = opened.json["object_key"].as_str().unwrap();
            let head = house.s3.head_object().bucket(&house.bucket).key(key).send().await.unwrap();
            assert_eq!((head.tag_count(), head.content_encoding()), (None, None), "{name}");
            continue;
        }
        let answer = answer.expect_problem(422, "object-foreign");
        let told = answer.json["detail"].as_str().unwrap();
        assert!(told.contains(name) && told.contains("did not declare"), "{told}");
        assert_eq!(house.complete(&opened.id()).await.expect(422).json["detail"], told, "the same answer again");
        refused.push(name);
    }
    // No store that the tests know holds a PUT to these.
    for always in ["content-encoding", "content-language", "content-disposition", "cache-control"] {
        assert!(refused.contains(&always), "{always} was not refused: {refused:?}");
    }
    if servers().s3.flavour == Flavour::Minio {
        assert!(refused.contains(&"x-amz-tagging") && refused.contains(&"x-amz-storage-class"), "{refused:?}");
    }
}

#[tokio::test]
async fn a_header_that_browsers_add_by_themselves_is_no_reason_to_refuse() {
    let house = House::new().await;
    for header in [("cache-control", "no-cache"), ("cache-control", "max-age=0, no-store"), ("content-encoding", "identity")] {
        let opened = house.open(b"hello", json!({})).await.expect(201);
        put_with(&house, &opened.json["upload"], b"hello", header).await.expect(200);
        house.complete(&opened.id()).await.expect(200);
    }
}

#[tokio::test]
async fn what_a_bucket_sets_on_every_object_is_no_reason_to_refuse() {
    let s3 = faulty().await;
    let house = house_on(&s3).await;
    // The bucket's defaults change while the broker runs, twice.
    s3.show(&[("x-amz-server-side-encryption", "AES256"), ("x-amz-storage-class", "EXPRESS_ONEZONE")]);
    house.publish(b"one", json!({})).await;
    s3.show(&[("x-amz-server-side-encryption", "aws:kms"), ("x-amz-server-side-encryption-aws-kms-key-id", "k")]);
    house.publish(b"two", json!({})).await;
    // What no bucket sets is refused at once.
    s3.show(&[("x-amz-tagging-count", "1")]);
    let opened = house.put_up(b"three", json!({})).await;
    house.complete(&opened.id()).await.expect_problem(422, "object-foreign");
}

#[tokio::test]
async fn an_encoding_that_somebody_gave_an_object_does_not_reach_who_resolves_its_pointer() {
    let house = House::new().await;
    house.publish(b"hello", json!({})).await;
    let record = house.records(&house.topic).await.remove(0);
    let pointer: Value = serde_json::from_slice(&record.value).unwrap();
    let key = pointer["key"].as_str().unwrap();
    let put = house.s3.put_object().bucket(&house.bucket).key(key).body(b"hello".to_vec().into()).content_encoding("gzip");
    put.send().await.unwrap();
    let resolved = house.resolve(&record.value, "").await.expect(200);
    let got = house.http.get(resolved.json["url"].as_str().unwrap()).send().await.unwrap();
    assert_eq!(got.status(), 200);
    let encoding = got.headers().get("content-encoding").map(|value| value.to_str().unwrap().to_owned());
    assert_eq!(encoding.as_deref(), Some("identity"));
    assert_eq!(got.bytes().await.unwrap().as_ref(), b"hello");
}

#[tokio::test]
async fn a_part_cannot_give_its_object_a_header_that_nobody_declared() {
    let house = House::new().await;
    let content = bytes(PART + 9, 1);
    for header in [("content-encoding", "gzip"), ("x-amz-tagging", "a=b")] {
        let opened = house.open_hashed_parts(&content, json!({})).await.expect(201);
        for part in opened.json["parts"].as_array().unwrap() {
            let (from, size) = (part["offset"].as_u64().unwrap() as usize, part["size"].as_u64().unwrap() as usize);
            // A store that refuses may close the connection before it has read all of the part.
            let put = with(&house, part, &content[from..from + size], header).send().await;
            if !put.is_ok_and(|answer| answer.status() == 200) {
                house.put(part, &content[from..from + size]).await.expect(200);
            }
        }
        house.insist(&opened.id()).await;
        let key = opened.json["object_key"].as_str().unwrap();
        let head = house.s3.head_object().bucket(&house.bucket).key(key).send().await.unwrap();
        assert_eq!((head.content_encoding(), head.tag_count()), (None, None), "{header:?}");
    }
}
