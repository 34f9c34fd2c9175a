//! A record's value in, the bytes out: for whoever holds a pointer, whoever wrote it.

use serde_json::{Value, json};

use crate::harness::{House, sha256};

fn pointer(bucket: &str, key: &str, size: usize) -> String {
    format!(r#"{{"kfs_lfs":1,"bucket":"{bucket}","key":"{key}","size":{size}}}"#)
}

impl House {
    /// A published upload's record value.
    async fn published_value(&self, content: &[u8], more: Value) -> (String, Vec<u8>) {
        let done = self.publish(content, more).await;
        let records = self.records(&self.topic).await;
        let record = records.iter().find(|record| record.header("lfs-upload-id") == Some(done.id().as_str()));
        (done.id(), record.expect("a record").value.clone())
    }
}

#[tokio::test]
async fn a_records_value_is_all_that_is_needed() {
    let house = House::new().await;
    let more = json!({"content_type": "video/mp4", "filename": "Zoë \"1\".mp4"});
    let (id, value) = house.published_value(b"hello", more).await;
    let resolved = house.resolve(&value, "").await.expect(200).json;
    assert_eq!((&resolved["method"], &resolved["headers"], &resolved["size"]), (&json!("GET"), &json!({}), &json!(5)));
    assert_eq!((&resolved["sha256"], &resolved["content_type"]), (&json!(sha256(b"hello")), &json!("video/mp4")));
    assert_eq!((&resolved["integrity"], &resolved["upload_id"]), (&json!("sha256"), &json!(id)));
    assert_eq!((&resolved["filename"], &resolved["expires_in"]), (&json!("Zoë \"1\".mp4"), &json!(900)));

    let got = house.http.get(resolved["url"].as_str().unwrap()).send().await.unwrap();
    assert_eq!(got.status(), 200);
    assert_eq!(
        got.headers()["content-disposition"],
        "attachment; filename=\"Zo_ _1_.mp4\"; filename*=UTF-8''Zo%C3%AB%20%221%22.mp4"
    );
    assert_eq!(got.headers()["content-type"], "video/mp4");
    assert_eq!(got.bytes().await.unwrap(), b"hello".as_slice());
}

/// Whatever the store remembers of the object, and whatever the pointer says of it.
#[tokio::test]
async fn a_page_is_downloaded_and_never_run() {
    let house = House::new().await;
    for stored in ["text/html", "image/svg+xml", "application/xhtml+xml; charset=utf-8", "text/javascript"] {
        let (_, value) = house.published_value(b"<script>", json!({"content_type": stored})).await;
        let mut pointers = vec![(String::from_utf8(value.clone()).unwrap(), "application/octet-stream")];
        let as_written = format!(",\"content_type\":{}", json!(stored));
        assert!(pointers[0].0.contains(&as_written), "{}", pointers[0].0);
        pointers.push((pointers[0].0.replace(&as_written, ""), "application/octet-stream"));
        pointers.push((pointers[0].0.replace(&as_written, ",\"content_type\":\"video/mp4\""), "video/mp4"));
        pointers
            .push((pointers[0].0.replace(&as_written, ",\"content_type\":\"video/mp4\\r\\nx: y\""), "application/octet-stream"));
        for (pointer, shown) in pointers {
            let resolved = house.resolve(pointer.as_bytes(), "").await.expect(200).json;
            let got = house.http.get(resolved["url"].as_str().unwrap()).send().await.unwrap();
            assert_eq!((got.status().as_u16(), got.headers()["content-type"].to_str().unwrap()), (200, shown), "{pointer}");
            assert_eq!(got.headers()["content-disposition"], "attachment");
        }
    }
}

#[tokio::test]
async fn validating_answers_without_a_url() {
    let house = House::new().await;
    let (_, value) = house.published_value(b"hello", json!({})).await;
    let validated = house.resolve(&value, "?validate=true").await.expect(200);
    assert_eq!(validated.json, json!({"valid": true, "size": 5, "integrity": "sha256"}));
    let other = String::from_utf8(value).unwrap().replace("\"size\":5", "\"size\":6");
    house.resolve(other.as_bytes(), "?validate=true").await.expect_problem(422, "size-mismatch");
    house.resolve(other.as_bytes(), "?nonsense=1").await.expect_problem(422, "validation-failed");
}

#[tokio::test]
async fn a_pointer_with_another_checksum_than_was_proved_is_refused() {
    let house = House::new().await;
    let (_, value) = house.published_value(b"hello", json!({})).await;
    let value = String::from_utf8(value).unwrap();
    let forged = value.replace(&sha256(b"hello"), &sha256(b"other"));
    for query in ["", "?validate=true"] {
        let refused = house.resolve(forged.as_bytes(), query).await.expect_problem(422, "checksum-mismatch");
        let detail = refused.json["detail"].as_str().unwrap();
        assert!(detail.contains(&sha256(b"hello")) && detail.contains(&sha256(b"other")), "{detail}");
        assert_eq!(house.resolve(value.as_bytes(), query).await.expect(200).json["integrity"], "sha256");
        // One that says nothing of the bytes is not wrong, and nothing is proved of it.
        let silent = value.replace(&format!("\"sha256\":\"{}\",", sha256(b"hello")), "");
        assert_eq!(house.resolve(silent.as_bytes(), query).await.expect(200).json["integrity"], Value::Null);
    }

    house.put_policy(&house.topic, &json!({"checksums": ["crc32"], "min_integrity": "size"})).await.expect(200);
    let more = json!({"sha256": null, "checksum_alg": "crc32", "checksum": crate::harness::uploads::digest("crc32", b"hello")});
    let (_, value) = house.published_value(b"hello", more).await;
    let value = String::from_utf8(value).unwrap();
    let other = crate::harness::uploads::digest("crc32", b"other");
    let forged = value.replace(&crate::harness::uploads::digest("crc32", b"hello"), &other);
    house.resolve(forged.as_bytes(), "").await.expect_problem(422, "checksum-mismatch");
    assert_eq!(house.resolve(value.as_bytes(), "").await.expect(200).json["integrity"], "checksum");
}

#[tokio::test]
async fn a_pointer_copied_into_another_topic_does_not_resolve_from_there() {
    let house = House::new().await;
    let (_, value) = house.published_value(b"hello", json!({})).await;
    for query in ["", "&validate=true"] {
        house.resolve(&value, &format!("?topic={}{query}", house.topic)).await.expect(200);
        house.resolve(&value, &format!("?topic=other{query}")).await.expect_problem(403, "pointer-forbidden");
        house.resolve(&value, &format!("?topic={query}")).await.expect_problem(403, "pointer-forbidden");
    }
    // Also where no session is known: the object's key names its topic.
    let key = format!("default/{}/lfs/x", house.topic);
    house.put_object(&key, b"hello", None).await;
    let unknown = pointer(&house.bucket, &key, 5);
    house.resolve(unknown.as_bytes(), &format!("?topic={}", house.topic)).await.expect(200);
    house.resolve(unknown.as_bytes(), "?topic=other").await.expect_problem(403, "pointer-forbidden");

    // Our client says where a record was read.
    let client = house.client();
    let back = client.fetch_record(&house.topic, &value, None).await.unwrap();
    assert_eq!(back.to_vec(5).await.unwrap(), b"hello");
    let refused = client.fetch_record("other", &value, None).await.unwrap_err();
    assert!(refused.is_problem("pointer-forbidden"), "{refused}");
}

/// The level of proof is that of one pointer and one object; of any other, nobody knows.
#[tokio::test]
async fn no_proof_is_told_of_a_replaced_object() {
    let house = House::new().await;
    let (id, value) = house.published_value(b"hello", json!({})).await;

    let key = house.objects().await.remove(0);
    for token in [None, Some(id.as_str())] {
        house.put_object(&key, b"olleh", token).await;
        assert_eq!(house.resolve(&value, "").await.expect(200).json["integrity"], Value::Null);
        assert_eq!(house.resolve(&value, "?validate=true").await.expect(200).json["integrity"], Value::Null);
    }
}

#[tokio::test]
async fn a_lower_maximum_size_leaves_older_pointers_readable() {
    let house = House::new().await;
    let (_, value) = house.published_value(b"hello", json!({})).await;
    house.put_policy(&house.topic, &json!({"min_bytes": 0, "max_bytes": 4})).await.expect(200);
    let resolved = house.resolve(&value, "").await.expect(200);
    assert_eq!(house.download(&resolved.json).await, b"hello");
    let refused = house.resolve(&value, "?validate=true").await.expect_problem(422, "pointer-invalid");
    assert_eq!(refused.json["detail"], "the pointer says 5 bytes, the topic allows 4");
}

#[tokio::test]
async fn a_size_that_differs_is_told_with_both_numbers() {
    let house = House::new().await;
    let key = format!("default/{}/lfs/x", house.topic);
    house.put_object(&key, b"hello", None).await;
    let refused = house.resolve(pointer(&house.bucket, &key, 4).as_bytes(), "").await.expect_problem(422, "size-mismatch");
    let detail = refused.json["detail"].as_str().unwrap();
    assert!(detail.contains('4') && detail.contains('5'), "{detail}");
}

#[tokio::test]
async fn an_object_that_was_deleted_is_gone() {
    let house = House::new().await;
    let (_, value) = house.published_value(b"hello", json!({})).await;
    let key = house.objects().await.remove(0);
    house.s3.delete_object().bucket(&house.bucket).key(&key).send().await.unwrap();
    house.resolve(&value, "").await.expect_problem(410, "object-gone");
    house.resolve(&value, "?validate=true").await.expect_problem(410, "object-gone");
}

#[tokio::test]
async fn what_is_no_pointer_is_told_so() {
    let house = House::new().await;
    let key = format!("default/{}/lfs/x", house.topic);
    let good = pointer(&house.bucket, &key, 5);
    let late = format!(r#"{{"padding":"{}",{}"#, "x".repeat(60), &good[1..]);
    for bad in ["", "hello", r#"{"kfs_lfs":1"#, &good.replace('}', ",\"size\":5}"), "\u{feff}{}"] {
        house.resolve(bad.as_bytes(), "").await.expect_problem(400, "malformed-json");
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
        let refused = house.resolve(bad.as_bytes(), "").await;
        assert_eq!((refused.status, refused.code()), (422, "pointer-invalid"), "{bad}: {}", refused.text);
    }
    // The strict shape is for telling records apart: who asks says that it is a pointer.
    let turned = format!(r#"{{"size":5,"key":"{key}","bucket":"{}","kfs_lfs":1}}"#, house.bucket);
    for good in [&good, &format!(" {good}\n"), &late, &turned] {
        house.resolve(good.as_bytes(), "").await.expect_problem(410, "object-gone");
    }
}

#[tokio::test]
async fn a_pointer_larger_than_its_topic_allows_is_not_valid() {
    let house = House::new().await;
    house.put_policy(&house.topic, &json!({"max_bytes": 4})).await.expect(200);
    let key = format!("default/{}/lfs/x", house.topic);
    house.put_object(&key, b"hello", None).await;
    house.resolve(pointer(&house.bucket, &key, 5).as_bytes(), "").await.expect_problem(422, "pointer-invalid");
}

/// Each place where a key may name its topic costs a query, and whoever asks chooses the key.
#[tokio::test]
async fn a_key_that_could_name_many_topics_is_looked_at_so_far_and_no_further() {
    let house = House::new().await;
    for (segments, status) in [(7, 410), (8, 403)] {
        let prefix = vec!["x/lfs"; segments].join("/");
        house.put_policy(&house.topic, &json!({"prefix": prefix})).await.expect(200);
        let key = format!("{prefix}/default/{}/lfs/x", house.topic);
        assert_eq!(house.resolve(pointer(&house.bucket, &key, 5).as_bytes(), "").await.status, status, "{key}");
    }
    let key = format!("{}default/{}/lfs/x", "x/lfs/".repeat(5000), house.topic);
    house.resolve(pointer(&house.bucket, &key, 5).as_bytes(), "").await.expect_problem(403, "pointer-forbidden");
}

#[tokio::test]
async fn a_pointer_outside_the_policies_is_forbidden_whether_or_not_it_exists() {
    let house = House::new().await;
    let topic = &house.topic;
    let other = format!("{}-other", house.bucket);
    house.s3.create_bucket().bucket(&other).send().await.unwrap();
    house.put_object("secret", b"hello", None).await;
    let inside = format!("default/{topic}/lfs/x");
    for (bucket, key) in [
        (other.as_str(), inside.clone()),
        ("no-such-bucket", inside.clone()),
        (&house.bucket, "secret".to_owned()),
        (&house.bucket, format!("cold/default/{topic}/lfs/x")),
        (&house.bucket, format!("default/{topic}/x")),
        (&house.bucket, format!("default/{topic}/lfs")),
        (&house.bucket, format!("default/{topic}/lfs/")),
        (&house.bucket, format!("default/{topic}/lfs/../../../secret")),
        (&house.bucket, format!("default/{topic}/lfs//x")),
        (&house.bucket, format!("/{inside}")),
        (&house.bucket, format!("{topic}/lfs/x")),
    ] {
        let refused = house.resolve(pointer(bucket, &key, 5).as_bytes(), "").await;
        assert_eq!((refused.status, refused.code()), (403, "pointer-forbidden"), "{bucket}/{key}: {}", refused.text);
    }
}

#[tokio::test]
async fn kafscales_own_pointers_resolve() {
    let house = House::new().await;
    let key = format!("default/{}/lfs/2026/01/02/obj-1", house.topic);
    house.put_object(&key, b"abc", None).await;
    let hash = sha256(b"abc").to_uppercase();
    let value = format!(
        r#"{{"kfs_lfs":1,"bucket":"{}","key":"{key}","size":3,"sha256":"{hash}","checksum":"","checksum_alg":"sha256","content_type":"text/plain","original_headers":{{"a":"b"}},"created_at":"2026-01-02T03:04:05Z","proxy_id":"p"}}"#,
        house.bucket
    );
    let resolved = house.resolve(value.as_bytes(), "").await.expect(200).json;
    assert_eq!((&resolved["integrity"], &resolved["upload_id"]), (&Value::Null, &Value::Null));
    assert!(resolved.as_object().unwrap().contains_key("integrity") && resolved.as_object().unwrap().contains_key("upload_id"));
    assert_eq!((&resolved["sha256"], &resolved["content_type"]), (&json!(sha256(b"abc")), &json!("text/plain")));
    assert_eq!(house.download(&resolved).await, b"abc");
    let validated = house.resolve(value.as_bytes(), "?validate=true").await.expect(200);
    assert_eq!(validated.json, json!({"valid": true, "size": 3, "integrity": null}));
}

#[tokio::test]
async fn a_topic_may_have_a_bucket_and_a_prefix_of_its_own() {
    let house = House::new().await;
    let bucket = format!("{}-cold", house.bucket);
    house.s3.create_bucket().bucket(&bucket).send().await.unwrap();
    let before = house.published_value(b"before", json!({})).await.1;
    let policy = json!({"bucket": bucket, "prefix": "lfs/cold", "url_seconds": 60});
    house.put_policy(&house.topic, &policy).await.expect(200);
    let value = house.published_value(b"cold", json!({})).await.1;
    let pointer: Value = serde_json::from_slice(&value).unwrap();
    assert_eq!(pointer["bucket"], json!(bucket));
    assert!(pointer["key"].as_str().unwrap().starts_with(&format!("lfs/cold/default/{}/lfs/", house.topic)), "{pointer}");
    let resolved = house.resolve(&value, "").await.expect(200).json;
    assert_eq!(resolved["expires_in"], 60);
    assert_eq!(house.download(&resolved).await, b"cold");
    house.resolve(&before, "").await.expect_problem(403, "pointer-forbidden");
    let moved = String::from_utf8(value).unwrap().replace("lfs/cold/", "lfs/cold/lfs/cold/");
    house.resolve(moved.as_bytes(), "").await.expect_problem(403, "pointer-forbidden");
}

#[tokio::test]
async fn any_json_media_type_carries_a_pointer_and_no_other_does() {
    let house = House::new().await;
    let (_, value) = house.published_value(b"hello", json!({})).await;
    let send = |kind: &'static str| {
        let request = house.http.post(format!("{}/lfs/resolve", house.url())).header("content-type", kind);
        house.send(request.body(value.clone()))
    };
    for kind in ["application/json", "Application/JSON; charset=utf-8", "application/vnd.kafscale.lfs+json", "text/x+json"] {
        send(kind).await.expect(200);
    }
    for kind in ["text/plain", "application/octet-stream", "json", "+json", "application/jsonp"] {
        send(kind).await.expect_problem(415, "unsupported-media-type");
    }
}
