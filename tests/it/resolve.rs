//! Resolving: a record's value in, a download URL out, also for pointers that another writer made.

use lfs_broker_client::api::ErrorCode;
use serde_json::{Value, json};

use crate::harness::{TestBroker, sha256};

fn pointer(bucket: &str, key: &str, size: usize) -> String {
    format!(r#"{{"kfs_lfs":1,"bucket":"{bucket}","key":"{key}","size":{size}}}"#)
}

impl TestBroker {
    /// Publishes an upload and returns its id and its record's value.
    async fn published_value(&self, content: &[u8], more: Value) -> (String, Vec<u8>) {
        let done = self.publish(content, more).await;
        let records = self.records(&self.topic).await;
        let record = records.iter().find(|record| record.header("lfs-upload-id") == Some(done.id().as_str()));
        (done.id(), record.expect("a record").value.clone())
    }
}

#[tokio::test]
async fn a_records_value_is_enough_to_download_its_object() {
    let broker = TestBroker::start().await;
    let more = json!({"content_type": "video/mp4", "filename": "Zoë \"1\".mp4"});
    let (id, value) = broker.published_value(b"hello", more).await;
    let resolved = broker.resolve(&value, "").await.expect(200).json;
    assert_eq!((&resolved["method"], &resolved["headers"], &resolved["size"]), (&json!("GET"), &json!({}), &json!(5)));
    assert_eq!((&resolved["sha256"], &resolved["content_type"]), (&json!(sha256(b"hello")), &json!("video/mp4")));
    assert_eq!((&resolved["integrity"], &resolved["upload_id"]), (&json!("sha256"), &json!(id)));
    assert_eq!((&resolved["filename"], &resolved["expires_in"]), (&json!("Zoë \"1\".mp4"), &json!(900)));

    let got = broker.http.get(resolved["url"].as_str().unwrap()).send().await.unwrap();
    assert_eq!(got.status(), 200);
    assert_eq!(
        got.headers()["content-disposition"],
        "attachment; filename=\"Zo_ _1_.mp4\"; filename*=UTF-8''Zo%C3%AB%20%221%22.mp4"
    );
    assert_eq!(got.headers()["content-type"], "video/mp4");
    assert_eq!(got.bytes().await.unwrap(), b"hello".as_slice());
}

/// Whatever content type the store and the pointer have.
#[tokio::test]
async fn a_browser_downloads_the_object_and_never_runs_it() {
    let broker = TestBroker::start().await;
    for stored in ["text/html", "image/svg+xml", "application/xhtml+xml; charset=utf-8", "text/javascript"] {
        let (_, value) = broker.published_value(b"<script>", json!({"content_type": stored})).await;
        let mut pointers = vec![(String::from_utf8(value.clone()).unwrap(), "application/octet-stream")];
        let content_type_member = format!(",\"content_type\":{}", json!(stored));
        assert!(pointers[0].0.contains(&content_type_member), "{}", pointers[0].0);
        pointers.push((pointers[0].0.replace(&content_type_member, ""), "application/octet-stream"));
        pointers.push((pointers[0].0.replace(&content_type_member, ",\"content_type\":\"video/mp4\""), "video/mp4"));
        pointers.push((
            pointers[0].0.replace(&content_type_member, ",\"content_type\":\"video/mp4\\r\\nx: y\""),
            "application/octet-stream",
        ));
        for (pointer, expected) in pointers {
            let resolved = broker.resolve(pointer.as_bytes(), "").await.expect(200).json;
            let got = broker.http.get(resolved["url"].as_str().unwrap()).send().await.unwrap();
            assert_eq!((got.status().as_u16(), got.headers()["content-type"].to_str().unwrap()), (200, expected), "{pointer}");
            assert_eq!(got.headers()["content-disposition"], "attachment");
        }
    }
}

#[tokio::test]
async fn validating_returns_the_result_without_a_url() {
    let broker = TestBroker::start().await;
    let (_, value) = broker.published_value(b"hello", json!({})).await;
    let validated = broker.resolve(&value, "?validate=true").await.expect(200);
    assert_eq!(validated.json, json!({"valid": true, "size": 5, "integrity": "sha256"}));
    let other = String::from_utf8(value).unwrap().replace("\"size\":5", "\"size\":6");
    broker.resolve(other.as_bytes(), "?validate=true").await.expect_problem(422, "size-mismatch");
    broker.resolve(other.as_bytes(), "?nonsense=1").await.expect_problem(422, "validation-failed");
}

#[tokio::test]
async fn a_pointer_with_another_checksum_than_verified_is_refused() {
    let broker = TestBroker::start().await;
    let (_, value) = broker.published_value(b"hello", json!({})).await;
    let value = String::from_utf8(value).unwrap();
    let forged = value.replace(&sha256(b"hello"), &sha256(b"other"));
    for query in ["", "?validate=true"] {
        let refused = broker.resolve(forged.as_bytes(), query).await.expect_problem(422, "checksum-mismatch");
        let detail = refused.json["detail"].as_str().unwrap();
        assert!(detail.contains(&sha256(b"hello")) && detail.contains(&sha256(b"other")), "{detail}");
        assert_eq!(broker.resolve(value.as_bytes(), query).await.expect(200).json["integrity"], "sha256");
        // A pointer without a checksum is not wrong, but its bytes are not verified.
        let without_checksum = value.replace(&format!("\"sha256\":\"{}\",", sha256(b"hello")), "");
        assert_eq!(broker.resolve(without_checksum.as_bytes(), query).await.expect(200).json["integrity"], Value::Null);
    }

    broker.put_policy(&broker.topic, &json!({"checksums": ["crc32"], "min_integrity": "size"})).await.expect(200);
    let more = json!({"sha256": null, "checksum_alg": "crc32", "checksum": crate::harness::uploads::digest("crc32", b"hello")});
    let (_, value) = broker.published_value(b"hello", more).await;
    let value = String::from_utf8(value).unwrap();
    let other = crate::harness::uploads::digest("crc32", b"other");
    let forged = value.replace(&crate::harness::uploads::digest("crc32", b"hello"), &other);
    broker.resolve(forged.as_bytes(), "").await.expect_problem(422, "checksum-mismatch");
    assert_eq!(broker.resolve(value.as_bytes(), "").await.expect(200).json["integrity"], "checksum");
}

#[tokio::test]
async fn a_pointer_that_was_copied_into_another_topic_does_not_resolve_there() {
    let broker = TestBroker::start().await;
    let (_, value) = broker.published_value(b"hello", json!({})).await;
    for query in ["", "&validate=true"] {
        broker.resolve(&value, &format!("?topic={}{query}", broker.topic)).await.expect(200);
        broker.resolve(&value, &format!("?topic=other{query}")).await.expect_problem(403, "pointer-forbidden");
        broker.resolve(&value, &format!("?topic={query}")).await.expect_problem(403, "pointer-forbidden");
    }
    // Without a session the topic is taken from the object's key.
    let key = format!("default/{}/lfs/x", broker.topic);
    broker.put_object(&key, b"hello", None).await;
    let unknown = pointer(&broker.bucket, &key, 5);
    broker.resolve(unknown.as_bytes(), &format!("?topic={}", broker.topic)).await.expect(200);
    broker.resolve(unknown.as_bytes(), "?topic=other").await.expect_problem(403, "pointer-forbidden");

    // The client sends the topic that it read the record from.
    let client = broker.client();
    let downloaded = client.fetch_record(&broker.topic, &value, None).await.unwrap();
    assert_eq!(downloaded.to_vec(5).await.unwrap(), b"hello");
    let refused = client.fetch_record("other", &value, None).await.unwrap_err();
    assert!(refused.is_problem(ErrorCode::PointerForbidden), "{refused}");
}

/// An integrity level belongs to one pointer and one object; for any other object it is unknown.
#[tokio::test]
async fn the_integrity_of_a_replaced_object_is_unknown() {
    let broker = TestBroker::start().await;
    let (id, value) = broker.published_value(b"hello", json!({})).await;

    let key = broker.objects().await.remove(0);
    for token in [None, Some(id.as_str())] {
        broker.put_object(&key, b"olleh", token).await;
        assert_eq!(broker.resolve(&value, "").await.expect(200).json["integrity"], Value::Null);
        assert_eq!(broker.resolve(&value, "?validate=true").await.expect(200).json["integrity"], Value::Null);
    }
}

#[tokio::test]
async fn older_pointers_stay_readable_after_the_maximum_size_is_lowered() {
    let broker = TestBroker::start().await;
    let (_, value) = broker.published_value(b"hello", json!({})).await;
    broker.put_policy(&broker.topic, &json!({"min_bytes": 0, "max_bytes": 4})).await.expect(200);
    let resolved = broker.resolve(&value, "").await.expect(200);
    assert_eq!(broker.download(&resolved.json).await, b"hello");
    let refused = broker.resolve(&value, "?validate=true").await.expect_problem(422, "pointer-invalid");
    assert_eq!(refused.json["detail"], "the pointer declares 5 bytes, the topic allows 4");
}

#[tokio::test]
async fn a_size_mismatch_is_reported_with_both_sizes() {
    let broker = TestBroker::start().await;
    let key = format!("default/{}/lfs/x", broker.topic);
    broker.put_object(&key, b"hello", None).await;
    let refused = broker.resolve(pointer(&broker.bucket, &key, 4).as_bytes(), "").await.expect_problem(422, "size-mismatch");
    let detail = refused.json["detail"].as_str().unwrap();
    assert!(detail.contains('4') && detail.contains('5'), "{detail}");
}

#[tokio::test]
async fn a_deleted_object_is_reported_as_gone() {
    let broker = TestBroker::start().await;
    let (_, value) = broker.published_value(b"hello", json!({})).await;
    let key = broker.objects().await.remove(0);
    broker.s3.delete_object().bucket(&broker.bucket).key(&key).send().await.unwrap();
    broker.resolve(&value, "").await.expect_problem(410, "object-gone");
    broker.resolve(&value, "?validate=true").await.expect_problem(410, "object-gone");
}

#[tokio::test]
async fn an_invalid_pointer_is_refused() {
    let broker = TestBroker::start().await;
    let key = format!("default/{}/lfs/x", broker.topic);
    let good = pointer(&broker.bucket, &key, 5);
    let late = format!(r#"{{"padding":"{}",{}"#, "x".repeat(60), &good[1..]);
    for bad in ["", "hello", r#"{"kfs_lfs":1"#, &good.replace('}', ",\"size\":5}"), "\u{feff}{}"] {
        broker.resolve(bad.as_bytes(), "").await.expect_problem(400, "malformed-json");
    }
    for bad in [
        "[]",
        "{}",
        "null",
        "5",
        r#"[1,"b","k",5]"#,
        r#"{"kfs_lfs":1}"#,
        r#"{"kfs_lfs":1,"bucket":"b","key":"k","size":-1}"#,
        &good.replace("\"kfs_lfs\":1", "\"kfs_lfs\":2"),
        &good.replace("\"kfs_lfs\":1", "\"kfs_lfs\":\"1\""),
        &good.replace(",\"size\":5", ""),
        &good.replace(&key, ""),
        &good.replace('}', ",\"sha256\":\"abc\"}"),
    ] {
        let refused = broker.resolve(bad.as_bytes(), "").await;
        assert_eq!((refused.status, refused.code()), (422, "pointer-invalid"), "{bad}: {}", refused.text);
    }
    // The strict form tells pointers from other records. In this request the client already says that it is a pointer.
    let reordered = format!(r#"{{"size":5,"key":"{key}","bucket":"{}","kfs_lfs":1}}"#, broker.bucket);
    for good in [&good, &format!(" {good}\n"), &late, &reordered] {
        broker.resolve(good.as_bytes(), "").await.expect_problem(410, "object-gone");
    }
}

#[tokio::test]
async fn a_pointer_above_its_topics_maximum_size_is_invalid() {
    let broker = TestBroker::start().await;
    broker.put_policy(&broker.topic, &json!({"max_bytes": 4})).await.expect(200);
    let key = format!("default/{}/lfs/x", broker.topic);
    broker.put_object(&key, b"hello", None).await;
    broker.resolve(pointer(&broker.bucket, &key, 5).as_bytes(), "").await.expect_problem(422, "pointer-invalid");
}

/// Each position in a key that may name its topic costs a query, and the client chooses the key.
#[tokio::test]
async fn a_key_that_could_name_many_topics_is_checked_up_to_a_limit() {
    let broker = TestBroker::start().await;
    for (segments, status) in [(7, 410), (8, 403)] {
        let prefix = vec!["x/lfs"; segments].join("/");
        broker.put_policy(&broker.topic, &json!({"prefix": prefix})).await.expect(200);
        let key = format!("{prefix}/default/{}/lfs/x", broker.topic);
        assert_eq!(broker.resolve(pointer(&broker.bucket, &key, 5).as_bytes(), "").await.status, status, "{key}");
    }
    let key = format!("{}default/{}/lfs/x", "x/lfs/".repeat(5000), broker.topic);
    broker.resolve(pointer(&broker.bucket, &key, 5).as_bytes(), "").await.expect_problem(403, "pointer-forbidden");
}

#[tokio::test]
async fn a_pointer_outside_the_policies_is_forbidden_whether_or_not_its_object_exists() {
    let broker = TestBroker::start().await;
    let topic = &broker.topic;
    let other = format!("{}-other", broker.bucket);
    broker.s3.create_bucket().bucket(&other).send().await.unwrap();
    broker.put_object("secret", b"hello", None).await;
    let inside = format!("default/{topic}/lfs/x");
    for (bucket, key) in [
        (other.as_str(), inside.clone()),
        ("no-such-bucket", inside.clone()),
        (&broker.bucket, "secret".to_owned()),
        (&broker.bucket, format!("cold/default/{topic}/lfs/x")),
        (&broker.bucket, format!("default/{topic}/x")),
        (&broker.bucket, format!("default/{topic}/lfs")),
        (&broker.bucket, format!("default/{topic}/lfs/")),
        (&broker.bucket, format!("default/{topic}/lfs/../../../secret")),
        (&broker.bucket, format!("default/{topic}/lfs//x")),
        (&broker.bucket, format!("/{inside}")),
        (&broker.bucket, format!("{topic}/lfs/x")),
    ] {
        let refused = broker.resolve(pointer(bucket, &key, 5).as_bytes(), "").await;
        assert_eq!((refused.status, refused.code()), (403, "pointer-forbidden"), "{bucket}/{key}: {}", refused.text);
    }
}

#[tokio::test]
async fn pointers_of_kafscale_resolve() {
    let broker = TestBroker::start().await;
    let key = format!("default/{}/lfs/2026/01/02/obj-1", broker.topic);
    broker.put_object(&key, b"abc", None).await;
    let hash = sha256(b"abc").to_uppercase();
    let value = format!(
        r#"{{"kfs_lfs":1,"bucket":"{}","key":"{key}","size":3,"sha256":"{hash}","checksum":"","checksum_alg":"sha256","content_type":"text/plain","original_headers":{{"a":"b"}},"created_at":"2026-01-02T03:04:05Z","proxy_id":"p"}}"#,
        broker.bucket
    );
    let resolved = broker.resolve(value.as_bytes(), "").await.expect(200).json;
    assert_eq!((&resolved["integrity"], &resolved["upload_id"]), (&Value::Null, &Value::Null));
    assert!(resolved.as_object().unwrap().contains_key("integrity") && resolved.as_object().unwrap().contains_key("upload_id"));
    assert_eq!((&resolved["sha256"], &resolved["content_type"]), (&json!(sha256(b"abc")), &json!("text/plain")));
    assert_eq!(broker.download(&resolved).await, b"abc");
    let validated = broker.resolve(value.as_bytes(), "?validate=true").await.expect(200);
    assert_eq!(validated.json, json!({"valid": true, "size": 3, "integrity": null}));
}

#[tokio::test]
async fn a_topic_may_have_a_bucket_and_a_prefix_of_its_own() {
    let broker = TestBroker::start().await;
    let bucket = format!("{}-cold", broker.bucket);
    broker.s3.create_bucket().bucket(&bucket).send().await.unwrap();
    let before = broker.published_value(b"before", json!({})).await.1;
    let policy = json!({"bucket": bucket, "prefix": "lfs/cold", "url_seconds": 60});
    broker.put_policy(&broker.topic, &policy).await.expect(200);
    let value = broker.published_value(b"cold", json!({})).await.1;
    let pointer: Value = serde_json::from_slice(&value).unwrap();
    assert_eq!(pointer["bucket"], json!(bucket));
    assert!(pointer["key"].as_str().unwrap().starts_with(&format!("lfs/cold/default/{}/lfs/", broker.topic)), "{pointer}");
    let resolved = broker.resolve(&value, "").await.expect(200).json;
    assert_eq!(resolved["expires_in"], 60);
    assert_eq!(broker.download(&resolved).await, b"cold");
    broker.resolve(&before, "").await.expect_problem(403, "pointer-forbidden");
    let moved = String::from_utf8(value).unwrap().replace("lfs/cold/", "lfs/cold/lfs/cold/");
    broker.resolve(moved.as_bytes(), "").await.expect_problem(403, "pointer-forbidden");
}

#[tokio::test]
async fn a_pointer_needs_a_json_media_type() {
    let broker = TestBroker::start().await;
    let (_, value) = broker.published_value(b"hello", json!({})).await;
    let send = |kind: &'static str| {
        let request = broker.http.post(format!("{}/lfs/resolve", broker.url())).header("content-type", kind);
        broker.send(request.body(value.clone()))
    };
    for kind in ["application/json", "Application/JSON; charset=utf-8", "application/vnd.kafscale.lfs+json", "text/x+json"] {
        send(kind).await.expect(200);
    }
    for kind in ["text/plain", "application/octet-stream", "json", "+json", "application/jsonp"] {
        send(kind).await.expect_problem(415, "unsupported-media-type");
    }
}
